"""PPO and PPO-ptx against a reward model (paper 3.5, C.4).

  respond -> score -> penalise -> train

One iteration: sample a batch of prompts' responses, score them, subtract the
per-token KL penalty and estimate advantages, and take one pass of minibatch
updates, each of which adds gamma times the gradient on pretraining text.
`ptx_coef = 0` is PPO.

The policy starts from the RL initialisation, which is also the KL reference;
the value model starts from the reward model, head included, or, where scores
come from a Python function alone (`reward_fn`), from the policy's trunk.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from instruct_jax import (
  alarms,
  artifacts,
  packing,
  ppo,
  queries,
  rewards,
  rollout,
  score_fns,
  supervised,
)
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals.benchmarks import probe
from instruct_jax.infra import loop, optimizer, sharding, train_state
from instruct_jax.infra import run as run_lib
from instruct_jax.models import attention, heads
from instruct_jax.models.config import check_stage

OFFLOADED = ('ema', 'reference', 'reward')


def validate(config):
  check_stage(config)
  method = ppo_config(config)
  for divisor, size in (
    ('batch_size', 'num_episodes'),
    ('num_minibatches', 'batch_size'),
    ('num_slices', 'batch_size'),
  ):
    if config[size] % config[divisor]:
      raise ValueError(
        f'{divisor} {config[divisor]} does not divide {size} {config[size]}'
      )
  minibatch = config.batch_size // config.num_minibatches
  if minibatch % config.num_microbatches:
    raise ValueError(
      f'num_microbatches {config.num_microbatches} does not divide a '
      f'minibatch of {minibatch} episodes'
    )
  if not 0 <= config.num_slots <= config.batch_size:
    raise ValueError(
      f'num_slots must be 0 (as batch_size) to {config.batch_size}: '
      f'{config.num_slots}'
    )
  for key, least in (('pack_episodes', 1), ('pack_spare', 1.0)):
    if config[key] < least:
      raise ValueError(f'{key} must be at least {least}: {config[key]}')
  run_lib.check_choice(config, 'offload', OFFLOADED)
  if not config.temperature > 0:
    raise ValueError(f'temperature must be positive: {config.temperature}')
  if config.ptx_per_episode < 1 and method.ptx_coef > 0:
    raise ValueError(
      f'ptx_coef {method.ptx_coef} needs ptx_per_episode >= 1: '
      f'{config.ptx_per_episode}'
    )
  for name in score_fns.parse_weights(config.reward_fn):
    score_fns.find_function(name)
  if config.probe_every:
    probes = artifacts.named_folders(config.probes, 'probes')
    probe.check_names(list(probes))
    if not probes:
      raise ValueError(
        f'probe_every is {config.probe_every} and probes names no task'
      )


def inputs(config):
  """What this stage reads, by config key."""
  if not config.reward_model and not config.reward_fn:
    raise ValueError('reward_model and reward_fn are empty; give one of them')
  keys = ['tokenizer', 'init', 'prompts']
  keys += ['documents'] * (config.ptx_coef > 0)
  # Where no function pays, a reward model has to.
  keys += ['reward_model'] * bool(config.reward_model or not config.reward_fn)
  keys += ['valid_documents'] * bool(config.valid_documents)
  found = {key: config[key] for key in keys}
  if config.probe_every:
    for name, path in artifacts.named_folders(config.probes, 'probes').items():
      found[f'probes.{name}'] = path
  return found


def ppo_config(config) -> ppo.PPOConfig:
  """The method's numbers; a missing_end_score of None means none."""
  names = [field.name for field in dataclasses.fields(ppo.PPOConfig)]
  return ppo.PPOConfig(**{name: config[name] for name in names})


def make_optimizers(config):
  """Separate Adams for policy and value model, both warmed up (C.4)."""
  updates = config.num_minibatches * config.num_epochs

  def make(peak):
    return optimizer.make_adam(
      optimizer.constant_with_warmup(
        peak, config.num_warmup_iterations, 0.1, updates
      ),
      b1=config.adam_b1,
      b2=config.adam_b2,
      eps=config.adam_eps,
      max_grad_norm=config.max_grad_norm,
    )

  return {
    'policy': make(config.learning_rate),
    'value': make(config.value_learning_rate),
  }


def row_sizes(config, mesh) -> packing.Sizes:
  """What decides the shapes of rows, besides the lengths of episodes."""
  # A TPU's flash kernel reads whole tiles.
  on_tpu = mesh.devices.flat[0].platform == 'tpu'
  tiled = config.attention == 'flash' or (config.attention == 'auto' and on_tpu)
  return packing.Sizes(
    prompt_columns=config.prompt_length,
    response_columns=config.response_length,
    num_minibatches=config.num_minibatches,
    num_microbatches=config.num_microbatches,
    num_epochs=config.num_epochs,
    num_shards=mesh.shape['data'] * mesh.shape['fsdp'],
    row_episodes=config.pack_episodes if config.pack else 0,
    multiple=attention.TILE if tiled else 8,
    spare=config.pack_spare,
  )


def build_programs(config, policy, value, stop_ids):
  """The jitted programs of one iteration.

  Args:
    config: of the stage.
    policy, value: pure modules; the reward model has the value model's.
    stop_ids: tokens that end responses.
  """
  method = ppo_config(config)
  longest = config.prompt_length + config.response_length
  logprobs_fn = artifacts.logprobs_fn(policy, config.temperature, longest)
  values_fn = artifacts.scalars_fn(value, longest)
  # A row's noise depends on its prompt's number, not on its neighbours: the
  # slots change the memory that the cache takes and the time, nothing else.
  respond = functools.partial(
    rollout.generate,
    decoder=artifacts.decoder(policy, config.gather_weights),
    num_response=config.response_length,
    stop_ids=stop_ids,
    temperature=config.temperature,
    num_slots=config.num_slots,
  )
  score = score_fns.reward_program(
    values_fn, functools.partial(heads.read_scores, value), config.num_slices
  )
  penalise = ppo.make_penalise(
    logprobs_fn, values_fn, ppo.gae_advantages(method), method
  )
  train = ppo.make_train(
    {
      'policy': ppo.make_policy_loss(logprobs_fn, method),
      'value': ppo.make_value_loss(values_fn, method),
      'ptx': supervised.make_text_loss(artifacts.logprobs_fn(policy)),
    },
    make_optimizers(config),
    method,
  )
  return {
    'respond': jax.jit(respond),
    'lengths': jax.jit(rollout.episode_lengths),
    'score': jax.jit(score),
    'penalise': jax.jit(penalise),
    'train': jax.jit(train, donate_argnums=0),
  }


def lay_out(config, programs, sampled, mesh, iteration) -> packing.Layout:
  """Where programs find a rollout's episodes, on the mesh.

  Waits for the rollout, whose lengths choose one of few shapes.
  """
  prompts, responses = np.asarray(programs['lengths'](sampled))
  sizes = row_sizes(config, mesh)
  groups = packing.deal_epochs(
    prompts + responses, sizes, (config.seed, iteration)
  )
  layout = packing.lay_out(prompts, responses, groups, sizes)
  # Every host has the whole layout and hands over its own rows of it.
  own = jax.tree.map(
    lambda x: np.split(x, jax.process_count())[jax.process_index()], layout
  )
  return sharding.put_batch(own, mesh)


def initial_state(config, policy, value) -> ppo.RLState:
  """Before the first update; the parameters given are copied.

  Donated states must not share buffers with the frozen models.
  """

  def copy(params):
    return jax.tree.map(jnp.copy, params)

  optimizers = make_optimizers(config)
  return ppo.RLState(
    policy=train_state.create(copy(policy), optimizers['policy']),
    value=train_state.create(copy(value), optimizers['value']),
    ema=copy(policy),
    kl=rewards.KLState(coef=jnp.float32(config.kl_coef)),
  )


def freeze(params, dtype):
  """Weights of a model that never learns: it needs no master weights."""
  return jax.tree.map(lambda x: x.astype(dtype), params)


def load_models(config, tokenizer, mesh):
  """(policy, reward model or None, value model), checked against the rows."""
  changes = {
    'remat': config.remat,
    'attention': config.attention,
    'compute_dtype': config.compute_dtype,
  }
  load = functools.partial(artifacts.load, mesh=mesh, tokenizer=tokenizer)
  policy = load(
    config.init, 'policy', logprob_chunk=config.logprob_chunk, **changes
  )
  reward = None
  if config.reward_model:
    reward = value = load(config.reward_model, 'scalar', **changes)
  else:
    # fold_in: the head must not share its noise with the rollouts' keys.
    key = jax.random.fold_in(jax.random.key(config.seed), -1)
    value = artifacts.scalar_from_policy(policy, mesh, key)
  for model in (policy, value):
    artifacts.check_context(
      model,
      config.prompt_length + config.response_length,
      'prompt_length + response_length',
    )
  if config.ptx_coef > 0 or config.valid_documents:
    artifacts.check_context(policy, config.ptx_row_length, 'ptx_row_length')
  return policy, reward, value


def make_score_fn(config, programs, reward_params, prompts, tokenizer, mesh):
  """The `score_fns.ScoreFn` of this stage.

  Args:
    reward_params: () -> the reward model's parameters, on the device; None
      without one.
    prompts: the data set that responses answer.
  """
  parts = {}
  if reward_params is not None:
    parts['reward_model'] = (
      lambda sampled: programs['score'](
        reward_params(), sampled.rollout, sampled.layout
      ),
      config.reward_weight,
    )
  for name, weight in score_fns.parse_weights(config.reward_fn).items():
    function = score_fns.find_function(name)
    parts[name] = (
      score_fns.of_function(name, function, prompts, tokenizer, mesh),
      weight,
    )
  return score_fns.weighted(parts)


def run(config, workdir: epath.Path):
  """Trains a policy; see the top of this file.

  Reads the initialisation, the reward model, prompts and pretraining text;
  writes `policy` and `ema` (model folders), metrics, alarms.json, snapshots.
  """
  validate(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  # The description of all is checked before any is read.
  folders = {config.init: 'policy', config.reward_model: 'scalar'}
  folders = {folder: kind for folder, kind in folders.items() if folder}
  for folder, kind in folders.items():
    artifacts.check(folder, kind, tokenizer)
  microbatch = config.batch_size // config.num_minibatches
  microbatch //= config.num_microbatches
  slice_size = config.batch_size // config.num_slices
  mesh = artifacts.make_mesh(
    config.mesh,
    list(folders),
    [microbatch, slice_size, config.eval_batch_size],
  )
  use_ptx = config.ptx_coef > 0
  num_iterations = config.num_episodes // config.batch_size

  # 1. Data: prompts, and pretraining rows for the ptx part.
  asked = records.read_jsonl(config.prompts, records.Prompt)
  prompt_rows, dropped = loader.prompt_rows(
    asked, tokenizer, config.prompt_length
  )
  run_lib.tell_dropped(
    config.name, dropped.describe('prompts', 'prompt_length')
  )
  run_lib.check_enough(
    loader.num_rows(prompt_rows), config.batch_size, 'prompts', 'batch_size'
  )
  make_batches = functools.partial(
    loader.make_batches,
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  prompts = make_batches(prompt_rows, batch_size=config.batch_size)
  documents = functools.partial(
    loader.document_rows, tokenizer=tokenizer, row_length=config.ptx_row_length
  )
  if use_ptx:
    num_ptx = config.batch_size * config.ptx_per_episode * config.num_epochs
    ptx_rows = documents(config.documents, cut=config.cut_documents)
    run_lib.check_enough(
      loader.num_rows(ptx_rows),
      num_ptx,
      'rows of documents',
      'batch_size x ptx_per_episode x num_epochs',
    )
    ptx = make_batches(ptx_rows, batch_size=num_ptx)

  with sharding.use_mesh(mesh):
    # 2. Models.
    policy, reward, value = load_models(config, tokenizer, mesh)
    programs = build_programs(
      config, policy.module, value.module, tokenizer.stop_ids
    )
    state = initial_state(config, policy.params, value.params)
    offload = sharding.Offload(config.offload)
    reference = offload.store(
      'reference', freeze(policy.params, config.frozen_dtype)
    )
    reward_params, score_range = None, (-math.inf, math.inf)
    if reward is not None:
      frozen_reward = offload.store(
        'reward', freeze(reward.params, config.frozen_dtype)
      )
      reward_params = functools.partial(offload.load, 'reward', frozen_reward)
      score_range = tuple(reward.metadata['score_range'])
    module = policy.module
    # Their float32 weights live on in the state alone.
    del policy, reward, value

    pretraining_loss = None
    if config.valid_documents:
      # Held-out documents are whole, so that losses compare.
      pretraining_loss = queries.make_heldout_loss(
        module, documents(config.valid_documents), config.eval_batch_size, mesh
      )
    prober = None
    if config.probe_every:
      prober = queries.make_prober(config, module, tokenizer, mesh)
    reporter = alarms.Reporter(
      score_range, config.response_length, module.config.compute_dtype
    )

    def evaluate(done, state):
      """Losses and probes that are due after so many iterations."""
      values, params = {}, state.policy.params
      last = done == num_iterations
      if pretraining_loss is not None:
        if done == 0:
          values['eval/pretraining_loss_before'] = pretraining_loss(params).mean
        elif last or done % config.eval_every == 0:
          values['eval/pretraining_loss'] = pretraining_loss(params).mean
          values['eval/pretraining_loss_ema'] = pretraining_loss(state.ema).mean
      if prober is not None and (last or done % config.probe_every == 0):
        values |= prober(params, '_before' if done == 0 else '')
      return values

    def save(folder, params, **about):
      artifacts.save(
        workdir / folder,
        artifacts.Model('policy', module, params, {}),
        tokenizer,
        {'stage': config.name, 'seed': config.seed, **about},
      )

    # 3. The loop.
    with loop.Loop(
      workdir,
      config.name,
      num_iterations,
      log_every=1,
      checkpoint_every=config.checkpoint_every,
      **config.loop,
    ) as iterations:
      programs = iterations.watched(programs)
      score_fn = make_score_fn(
        config, programs, reward_params, asked, tokenizer, mesh
      )
      state = iterations.restore(sharding.place(state, mesh))
      data = loader.ahead(lambda i: (prompts[i], ptx[i] if use_ptx else None))
      root = jax.random.key(config.seed)
      for iteration, (prompt_batch, ptx_rows) in iterations.steps_with(data):
        keys = jax.random.split(jax.random.fold_in(root, iteration))
        keys = dict(zip(('respond', 'train'), keys, strict=True))
        values = evaluate(0, state) if iteration == 0 else {}

        # Respond.
        ema = offload.store('ema', state.ema)
        responses = programs['respond'](
          state.policy.params,
          sharding.put_batch(prompt_batch, mesh),
          keys['respond'],
        )
        layout = lay_out(config, programs, responses, mesh, iteration)
        # Score.
        scores = score_fn(
          score_fns.Sampled(responses, layout, prompt_batch.indices)
        )
        # Penalise.
        batch, kl, metrics = programs['penalise'](
          state.replace(ema=None),
          {'reference': offload.load('reference', reference)},
          responses,
          layout,
          scores,
        )
        # Train.
        state, more = programs['train'](
          state.replace(ema=offload.load('ema', ema)),
          {},
          batch,
          sharding.put_batch(ptx_rows, mesh) if use_ptx else None,
          kl,
          keys['train'],
        )

        done = iteration + 1
        values |= evaluate(done, state)
        # The last one is the policy folder.
        if config.snapshot_every and (
          done % config.snapshot_every == 0 and done < num_iterations
        ):
          save(f'snapshots/{done}', state.policy.params, iteration=done)
        iterations.end_step(
          iteration,
          state,
          {**metrics, **more},
          states={
            f'{config.name} policy': state.policy,
            f'{config.name} value': state.value,
          },
          values=values,
          num_items=config.batch_size,
          text_fn=_summary,
        )
        for text in reporter.new(iterations.lines):
          run_lib.say(f'{config.name}: alarm: {text}')

    # 4. Outputs: the policy and its moving average, each on its own.
    for name, params in (('policy', state.policy.params), ('ema', state.ema)):
      save(
        name,
        params,
        weights=name,
        ptx_coef=config.ptx_coef,
        num_episodes=config.num_episodes,
      )
  found = reporter.find(iterations.lines)
  run_lib.write_json(workdir / 'alarms.json', found)
  return {
    'num_prompts': loader.num_rows(prompt_rows),
    'num_prompts_dropped': dropped.total,
    'alarms': found,
  }


def _summary(line) -> str:
  """The line in few words; what is None was not a finite number."""

  def show(name, digits):
    value = line.get(f'objective/{name}')
    return f'{name} {"?" if value is None else f"{value:.{digits}f}"}'

  return ' '.join((show('score', 3), show('kl', 2), show('length', 1)))
