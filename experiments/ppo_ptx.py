"""PPO and PPO-ptx against a reward model (paper 3.5, C.4).

One iteration: sample a batch of prompts' responses, score them, subtract the
per-token KL penalty, estimate advantages, and take one pass of minibatch
updates, each of which adds gamma times the gradient on pretraining text.
`ptx_coef = 0` is PPO.

The policy starts from the RL initialisation, which is also the KL reference;
the value model starts from the reward model, head included.
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
  masked,
  packing,
  ppo,
  queries,
  rewards,
  rollout,
  supervised,
)
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import heldout_loss
from instruct_jax.evals.benchmarks import probe, runner
from instruct_jax.infra import loop, metrics, optimizer, sharding, train_state
from instruct_jax.infra import run as run_lib
from instruct_jax.models import attention
from instruct_jax.models.config import (
  ATTENTIONS,
  COMPUTE_DTYPES,
  REMAT_POLICIES,
)
from instruct_jax.types import PackedPPOBatch

OFFLOADED = ('ema', 'reference', 'reward')


def validate(config):
  method = ppo_config(config)
  if config.num_episodes % config.batch_size:
    raise ValueError(
      f'batch_size {config.batch_size} does not divide num_episodes '
      f'{config.num_episodes}'
    )
  if config.batch_size % config.num_minibatches:
    raise ValueError(
      f'num_minibatches {config.num_minibatches} does not divide batch_size '
      f'{config.batch_size}'
    )
  minibatch = config.batch_size // config.num_minibatches
  if minibatch % config.num_microbatches:
    raise ValueError(
      f'num_microbatches {config.num_microbatches} does not divide a '
      f'minibatch of {minibatch} episodes'
    )
  if config.batch_size % config.num_slices:
    raise ValueError(
      f'num_slices {config.num_slices} does not divide batch_size '
      f'{config.batch_size}'
    )
  if config.sampler_tolerance < 0:
    raise ValueError(
      f'sampler_tolerance must not be negative: {config.sampler_tolerance}'
    )
  if not 0 <= config.num_slots <= config.batch_size:
    raise ValueError(
      f'num_slots must be 0 (as batch_size) to {config.batch_size}: '
      f'{config.num_slots}'
    )
  if config.pack_episodes < 1:
    raise ValueError(f'pack_episodes must be positive: {config.pack_episodes}')
  if config.pack_spare < 1:
    raise ValueError(f'pack_spare must be at least 1: {config.pack_spare}')
  run_lib.check_choice(config, 'frozen_dtype', COMPUTE_DTYPES)
  run_lib.check_choice(config, 'offload', OFFLOADED)
  run_lib.check_choice(config, 'remat', REMAT_POLICIES)
  run_lib.check_choice(config, 'attention', ATTENTIONS)
  if not config.temperature > 0:
    raise ValueError(f'temperature must be positive: {config.temperature}')
  if config.ptx_per_episode < 1 and method.ptx_coef > 0:
    raise ValueError(
      f'ptx_coef {method.ptx_coef} needs ptx_per_episode >= 1: '
      f'{config.ptx_per_episode}'
    )

  probes = artifacts.named_folders(config.probes, 'probes')
  if config.probe_every:
    probe.check_names(list(probes))
    if not probes:
      raise ValueError(
        f'probe_every is {config.probe_every} and probes names no task'
      )


def inputs(config):
  """What this stage reads, by config key."""
  keys = ['tokenizer', 'init', 'reward_model', 'prompts']
  if config.ptx_coef > 0:
    keys.append('documents')
  if config.valid_documents:
    keys.append('valid_documents')
  found = {key: config[key] for key in keys}
  if config.probe_every:
    for name, path in artifacts.named_folders(config.probes, 'probes').items():
      found[f'probes.{name}'] = path
  return found


def ppo_config(config) -> ppo.PPOConfig:
  """The method's numbers; a missing_end_score of NaN-free None means none."""
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

  return make(config.learning_rate), make(config.value_learning_rate)


def build_programs(
  config, policy_module, scalar_module, tokenizer, score_fn=None
):
  """The jitted programs of one iteration.

  Args:
    config: of the stage.
    policy_module, scalar_module: pure modules.
    tokenizer: its `stop_ids` end responses.
    score_fn: (reward model's parameters, tokens, mask) -> scores [B], for
      rewards that no model gives; None reads the reward model.
  """
  method = ppo_config(config)
  policy_tx, value_tx = make_optimizers(config)
  logprobs_fn = artifacts.logprobs_fn(policy_module, config.temperature)
  scalars_fn = artifacts.scalars_fn(scalar_module)
  text_logprobs_fn = artifacts.text_logprobs_fn(policy_module)
  R = config.response_length
  longest = config.prompt_length + R
  packed_logprobs_fn = artifacts.packed_logprobs_fn(
    policy_module, config.temperature, longest
  )
  packed_scalars_fn = artifacts.scalars_fn(scalar_module, longest)

  # A row's noise depends on its prompt's number, not on its neighbours: the
  # slots change the memory that the cache takes and the time, nothing else.
  generate = functools.partial(
    rollout.generate,
    decoder=artifacts.decoder(policy_module, config.gather_weights),
    num_response=R,
    stop_ids=tokenizer.stop_ids,
    temperature=config.temperature,
    num_slots=config.num_slots,
  )

  def choose_old(read_old, rows, num_slices, sampler, mask):
    """The sampler's log-probabilities, where those of every so many rows agree
    with the training graph's; else the graph's of all rows."""
    if config.sampler_tolerance == 0:
      old_logprobs = rollout.in_slices(read_old, rows, num_slices)
      difference = jnp.abs(old_logprobs - sampler)
      return old_logprobs, {
        'objective/sampler_difference': masked.metric(difference, mask)
      }

    def some(x):
      return x[:: config.num_minibatches]

    difference = jnp.abs(read_old(jax.tree.map(some, rows)) - some(sampler))
    largest = jnp.max(jnp.where(some(mask), difference, 0.0))
    agrees = largest <= config.sampler_tolerance
    old_logprobs = jax.lax.cond(
      agrees,
      lambda: sampler,
      lambda: rollout.in_slices(read_old, rows, num_slices),
    )
    return old_logprobs, {
      'objective/sampler_difference': masked.metric(difference, some(mask)),
      'objective/sampler_difference_max': masked.scalar(largest),
      'objective/sampler_trusted': masked.scalar(agrees.astype(jnp.float32)),
    }

  def score_padded(policy, reference, value, reward, sampled):
    def read(rows):
      tokens, mask = rows.tokens, rows.mask
      ref_logprobs, _ = logprobs_fn(reference, tokens, mask, R)
      old_values = ppo.response_values(scalars_fn(value, tokens, mask), R)
      if score_fn is None:
        scores = masked.at_last(scalars_fn(reward, tokens, mask), mask)
      else:
        scores = score_fn(reward, tokens, mask)
      return scores, ref_logprobs, old_values

    scores, *others = rollout.in_slices(read, sampled, config.num_slices)
    old_logprobs, more = choose_old(
      lambda rows: logprobs_fn(policy, rows.tokens, rows.mask, R)[0],
      sampled,
      config.num_slices,
      sampled.logprobs,
      sampled.response_mask,
    )
    return (scores, old_logprobs, *others), more

  def score_packed(policy, reference, value, reward, sampled, layout):
    def first_epoch(x):
      return packing.first_epoch(x, layout)

    def unpack(values):
      return packing.unpack_responses(values, layout, sampled.response_mask)

    def read(rows):
      tokens, segments, where, _ = rows
      ref_logprobs, _ = packed_logprobs_fn(reference, *rows)
      values = packed_scalars_fn(value, tokens, segments)
      values = jnp.take_along_axis(values, where, axis=1)
      if score_fn is None:
        return ref_logprobs, values, packed_scalars_fn(reward, tokens, segments)
      return ref_logprobs, values

    tokens, targets = packing.pack_tokens(sampled.tokens, layout)
    rows = jax.tree.map(
      first_epoch, (tokens, layout.segments, layout.where, targets)
    )
    # Rows come in multiples of minibatches, and not always of slices.
    num_slices = math.gcd(config.num_slices, rows[0].shape[0])
    ref_logprobs, values, *scalars = rollout.in_slices(read, rows, num_slices)
    if score_fn is None:
      scores = scalars[0].reshape(-1)[layout.ends]
    else:
      scores = score_fn(reward, sampled.tokens, sampled.mask)
    sampler = packing.pack_responses(sampled.logprobs, layout)
    old_logprobs, more = choose_old(
      lambda rows: packed_logprobs_fn(policy, *rows)[0],
      rows,
      num_slices,
      first_epoch(sampler),
      first_epoch(layout.response_mask),
    )
    others = map(unpack, (old_logprobs, ref_logprobs, values))
    return (scores, *others), more

  def score(policy, reference, value, reward, kl, sampled, layout=None):
    """Everything about a rollout that the update holds fixed."""
    models = (policy, reference, value, reward)
    if layout is None:
      read_rows, more = score_padded(*models, sampled)
    else:
      read_rows, more = score_packed(*models, sampled, layout)
    batch, score_metrics = ppo.make_ppo_batch(
      sampled, *read_rows, kl.coef, method
    )
    if layout is not None:
      batch = packing.pack_batch(batch, layout)
      real = layout.segments > 0
      more |= {
        'packing/fill': masked.metric(real.astype(jnp.float32), real | True),
        'packing/row_length': masked.scalar(jnp.asarray(real.shape[1])),
        'packing/row_responses': masked.scalar(
          jnp.asarray(layout.where.shape[1])
        ),
      }
    return batch, {**score_metrics, **more}

  losses = {
    False: (
      ppo.make_policy_loss(logprobs_fn, method),
      ppo.make_value_loss(scalars_fn, method),
    ),
    True: (
      ppo.make_packed_policy_loss(packed_logprobs_fn, method),
      ppo.make_packed_value_loss(packed_scalars_fn, method),
    ),
  }
  update = functools.partial(
    ppo.ppo_update,
    ptx_loss_fn=supervised.make_text_loss(text_logprobs_fn),
    policy_optimizer=policy_tx,
    value_optimizer=value_tx,
    config=method,
  )

  def finish(state, batch, ptx_batch, key, measured_kl):
    policy_loss_fn, value_loss_fn = losses[isinstance(batch, PackedPPOBatch)]
    state, update_metrics = update(
      state,
      batch,
      ptx_batch,
      key,
      policy_loss_fn=policy_loss_fn,
      value_loss_fn=value_loss_fn,
    )
    kl = rewards.update_kl_coef(
      state.kl,
      measured_kl,
      config.batch_size,
      config.kl_target,
      config.kl_horizon,
    )
    return state.replace(kl=kl), update_metrics

  def episode_lengths(sampled):
    responses = jnp.sum(sampled.response_mask, axis=1)
    lengths = jnp.stack([jnp.sum(sampled.mask, axis=1) - responses, responses])
    # Whole on every host: each makes the same plan.
    return sharding.constrain(lengths, None, None)

  def text_logprobs(params, batch):
    return text_logprobs_fn(params, batch.tokens, batch.segments, None)

  return {
    'policy_optimizer': policy_tx,
    'value_optimizer': value_tx,
    'generate': jax.jit(generate),
    'lengths': jax.jit(episode_lengths),
    'score': jax.jit(score),
    'update': jax.jit(finish, donate_argnums=0),
    'text_logprobs': jax.jit(text_logprobs),
  }


def plan_rows(config, programs, sampled, mesh, iteration, known=()):
  """Where score and update find a rollout's episodes: a layout on the mesh.

  None without packing, or where it would save less than a twentieth. Waits for
  the rollout, since lengths decide shapes; `known` ones (of `layout_shapes`)
  are used again.
  """
  if not config.pack:
    return None
  prompts, responses = np.asarray(programs['lengths'](sampled))
  if np.sum(prompts + responses) > 0.95 * sampled.mask.size:
    return None
  # A TPU's flash kernel reads whole tiles.
  on_tpu = mesh.devices.flat[0].platform == 'tpu'
  tiled = config.attention == 'flash' or (config.attention == 'auto' and on_tpu)
  layout = packing.plan(
    prompts,
    responses,
    prompt_columns=config.prompt_length,
    response_columns=config.response_length,
    num_minibatches=config.num_minibatches,
    num_microbatches=config.num_microbatches,
    num_epochs=config.num_epochs,
    num_shards=mesh.shape['data'] * mesh.shape['fsdp'],
    row_episodes=config.pack_episodes,
    multiple=attention.TILE if tiled else 8,
    seed=(config.seed, iteration),
    known=known,
    spare=config.pack_spare,
  )
  # With few episodes a device, every row holds one and some hold none.
  if layout.source.size > 0.95 * config.num_epochs * sampled.mask.size:
    return None
  # Every host has the whole plan and hands over its own rows of it.
  layout = jax.tree.map(
    lambda x: np.split(x, jax.process_count())[jax.process_index()], layout
  )
  return sharding.put_batch(layout, mesh)


def layout_shapes(rows) -> set[tuple[int, int]]:
  """Shapes of layouts in the metrics so far.

  From there and not from memory: a resumed run must choose as the one that was
  cut would have chosen.
  """
  names = ('packing/row_length', 'packing/row_responses')
  return {
    tuple(int(row[name]) for name in names)
    for row in rows
    if row.get(names[0]) is not None
  }


def initial_state(programs, policy, value, kl_coef) -> ppo.PPOState:
  """Before the first update; the parameters given are copied.

  Donated states must not share buffers with the frozen models.
  """

  def copy(params):
    return jax.tree.map(jnp.copy, params)

  return ppo.PPOState(
    policy=train_state.create(copy(policy), programs['policy_optimizer']),
    value=train_state.create(copy(value), programs['value_optimizer']),
    ema=copy(policy),
    kl=rewards.KLState(coef=jnp.float32(kl_coef)),
  )


def freeze(params, dtype):
  """Weights of a model that never learns: it needs no master weights."""
  return jax.tree.map(lambda x: x.astype(dtype), params)


def run(config, workdir: epath.Path):
  validate(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  for folder in (config.init, config.reward_model):
    tokenizer_lib.check_published(tokenizer, folder)
  minibatch = config.batch_size // config.num_minibatches
  mesh = artifacts.make_mesh(
    config.mesh,
    [config.init, config.reward_model],
    [
      minibatch // config.num_microbatches,
      config.batch_size // config.num_slices,
      config.eval_batch_size,
    ],
  )
  use_ptx = config.ptx_coef > 0

  # 1. Data: prompts, and pretraining rows for the ptx part.
  found_prompts = records.read_jsonl(config.prompts, records.Prompt)
  prompt_rows, num_dropped = loader.prompt_rows(
    found_prompts, tokenizer, config.prompt_length
  )
  run_lib.say_dropped(
    config.name,
    num_dropped,
    len(found_prompts),
    'prompts',
    'prompt_length',
    config.prompt_length,
  )
  run_lib.check_enough(
    loader.num_rows(prompt_rows), config.batch_size, 'prompts', 'batch_size'
  )
  processes = {
    'process_index': jax.process_index(),
    'process_count': jax.process_count(),
  }
  prompts = loader.make_batches(
    prompt_rows, batch_size=config.batch_size, seed=config.seed, **processes
  )

  def pack(path, cut):
    texts = records.read_jsonl(path, records.Document)
    return loader.pack_documents(
      tokenizer.encode_documents([d.text for d in texts]),
      config.ptx_row_length,
      tokenizer.eos_id,
      tokenizer.pad_id,
      cut=cut,
    )

  # Held-out documents are whole, so that losses compare.
  valid_rows = None
  if config.valid_documents:
    valid_rows = pack(config.valid_documents, False)
  if use_ptx:
    num_ptx = config.batch_size * config.ptx_per_episode * config.num_epochs
    ptx_rows = pack(config.documents, config.cut_documents)
    run_lib.check_enough(
      loader.num_rows(ptx_rows),
      num_ptx,
      'rows of documents',
      'batch_size x ptx_per_episode x num_epochs',
    )
    ptx = loader.make_batches(
      ptx_rows,
      batch_size=num_ptx,
      seed=config.seed,
      **processes,
    )

  num_iterations = config.num_episodes // config.batch_size
  root = jax.random.key(config.seed)
  with sharding.use_mesh(mesh):
    # 2. Models. The description of all is checked before any is read.
    for folder, kind in (
      (config.init, 'policy'),
      (config.reward_model, 'scalar'),
    ):
      artifacts.check(folder, kind, tokenizer.fingerprint)
    load = functools.partial(
      artifacts.load,
      mesh=mesh,
      tokenizer_fingerprint=tokenizer.fingerprint,
      vocab_size=tokenizer.vocab_size,
    )
    changes = {'remat': config.remat, 'attention': config.attention}
    policy = load(
      config.init, 'policy', logprob_chunk=config.logprob_chunk, **changes
    )
    reward = load(config.reward_model, 'scalar', **changes)
    for model in (policy, reward):
      artifacts.check_context(
        model,
        config.prompt_length + config.response_length,
        'prompt_length + response_length',
      )
    artifacts.check_context(policy, config.ptx_row_length, 'ptx_row_length')
    programs = build_programs(config, policy.module, reward.module, tokenizer)

    state = initial_state(
      programs, policy.params, reward.params, config.kl_coef
    )
    reference = freeze(policy.params, config.frozen_dtype)
    reward_params = freeze(reward.params, config.frozen_dtype)

    def rest(name, params):
      return sharding.to_host(params) if name in config.offload else params

    def wake(name, params):
      return sharding.to_device(params) if name in config.offload else params

    reference = rest('reference', reference)
    reward_params = rest('reward', reward_params)
    reward_metadata, policy_module = reward.metadata, policy.module
    del (
      policy,
      reward,
      model,
    )  # Their float32 weights live on in the state alone.

    def pretraining_losses(models):
      """Ending -> policy becomes metric -> loss, where there is text for it."""
      if valid_rows is None:
        return {}

      def loss(params):
        return heldout_loss.heldout_loss(
          lambda batch: sharding.fetch(
            programs['text_logprobs'](params, sharding.put_whole(batch, mesh))
          ),
          valid_rows,
          config.eval_batch_size,
        ).mean

      return {
        f'eval/pretraining_loss{ending}': loss(params)
        for ending, params in models.items()
      }

    stop_ids = runner.stop_ids(tokenizer) if config.probe_every else ()
    probes = []
    if config.probe_every:
      probes = probe.make_probes(
        artifacts.named_folders(config.probes, 'probes'),
        tokenizer,
        policy_module.config.context_length,
        config.probe_items,
        config.probe_few_shot,
        config.seed,
      )

    def probe_scores(params, ending=''):
      functions = queries.make_functions(
        policy_module,
        params,
        tokenizer,
        mesh,
        stop_ids,
        config.probe_batch_size,
        64,
      )
      scores = probe.ask(probes, tokenizer, *functions, config.probe_batch_size)
      return {f'probe{ending}/{k}': value for k, value in scores.items()}

    # 3. The loop.
    told = set()
    with loop.Loop(
      workdir,
      config.name,
      num_iterations,
      log_every=1,
      checkpoint_every=config.checkpoint_every,
      **config.loop,
    ) as iterations:
      programs = iterations.watched(programs)
      state = iterations.restore(sharding.place(state, mesh))
      # The first process alone writes lines, and looks at them.
      rows = []
      if jax.process_index() == 0:
        rows = metrics.read_lines(workdir / metrics.METRICS_FILE)
      data = loader.ahead(lambda i: (prompts[i], ptx[i] if use_ptx else None))
      for iteration, (prompt_batch, ptx_rows) in iterations.steps_with(data):
        keys = dict(
          zip(
            ('rollout', 'update'),
            jax.random.split(jax.random.fold_in(root, iteration)),
            strict=True,
          )
        )
        values = {}
        if iteration == 0:
          values |= pretraining_losses({'_before': state.policy.params})
          if config.probe_every:
            values |= probe_scores(state.policy.params, '_before')
        batch = sharding.put_batch(prompt_batch, mesh)
        state = state.replace(ema=rest('ema', state.ema))
        sampled = programs['generate'](
          state.policy.params, batch, keys['rollout']
        )
        layout = plan_rows(
          config, programs, sampled, mesh, iteration, layout_shapes(rows)
        )
        ppo_batch, score_metrics = programs['score'](
          state.policy.params,
          wake('reference', reference),
          state.value.params,
          wake('reward', reward_params),
          state.kl,
          sampled,
          layout,
        )
        ptx_batch = sharding.put_batch(ptx_rows, mesh) if use_ptx else None
        state = state.replace(ema=wake('ema', state.ema))
        kl_sum, kl_count = score_metrics['objective/kl']
        state, update_metrics = programs['update'](
          state, ppo_batch, ptx_batch, keys['update'], kl_sum / kl_count
        )
        done = iteration + 1
        if done % config.eval_every == 0 or done == num_iterations:
          values |= pretraining_losses(
            {'': state.policy.params, '_ema': state.ema}
          )
        if config.probe_every and (
          done % config.probe_every == 0 or done == num_iterations
        ):
          values |= probe_scores(state.policy.params)
        # The last one is the policy folder.
        if config.snapshot_every and (
          done % config.snapshot_every == 0 and done < num_iterations
        ):
          artifacts.save(
            workdir / 'snapshots' / str(done),
            artifacts.Model('policy', policy_module, state.policy.params, {}),
            tokenizer.fingerprint,
            {'stage': config.name, 'iteration': done},
          )
        line = iterations.end_step(
          iteration,
          state,
          {**score_metrics, **update_metrics},
          states={
            f'{config.name} policy': state.policy,
            f'{config.name} value': state.value,
          },
          values=values,
          num_items=config.batch_size,
          text_fn=_summary,
        )
        rows.append({'step': done, **line})
        for name, text in alarms.find(
          rows, tuple(reward_metadata['score_range']), config.response_length
        ).items():
          if name not in told:
            told.add(name)
            run_lib.say(f'{config.name}: alarm: {text}')

    # 4. Outputs: the policy and its moving average, each on its own.
    found = alarms.find(
      rows, tuple(reward_metadata['score_range']), config.response_length
    )
    about = {
      'stage': config.name,
      'seed': config.seed,
      'ptx_coef': config.ptx_coef,
      'num_episodes': config.num_episodes,
    }
    for name, params in (('policy', state.policy.params), ('ema', state.ema)):
      artifacts.save(
        workdir / name,
        artifacts.Model('policy', policy_module, params, {}),
        tokenizer.fingerprint,
        {**about, 'weights': name},
      )
  run_lib.write_json(workdir / 'alarms.json', found)
  return {
    'num_prompts': loader.num_rows(prompt_rows),
    'num_prompts_dropped': num_dropped,
    'alarms': found,
  }


def _summary(line) -> str:
  return (
    f'score {line["objective/score"]:.3f} kl {line["objective/kl"]:.2f} '
    f'length {line["objective/length"]:.1f}'
  )
