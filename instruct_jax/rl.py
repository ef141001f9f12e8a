"""What RL experiments share: data, models, rows, scores and evaluation.

Each is made from the config. An experiment's own file has the programs of its
method and the loop.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from instruct_jax import (
  advantages,
  alarms,
  model_fns,
  model_folder,
  packing,
  ppo,
  queries,
  rewards,
  rollout,
  score_fns,
)
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals.benchmarks import probe
from instruct_jax.infra import logger, optimizer, sharding, train_state
from instruct_jax.infra import run as run_lib
from instruct_jax.models import attention, heads
from instruct_jax.models.config import check_stage, lora_of
from instruct_jax.types import (
  Key,
  Params,
  PromptBatch,
  PyTree,
  Rollout,
  TextBatch,
)

OFFLOADED = ('ema', 'reference', 'reward')


# --- Config -------------------------------------------------------------------


def validate(config: ConfigDict) -> None:
  """Checks the keys that all RL stages have.

  Raises:
    ValueError: sizes that do not divide each other, or a bad value.
  """
  check_stage(config)
  method = method_of(config)
  for key in ('samples_per_prompt', 'pack_episodes', 'pack_spare'):
    if config[key] < 1:
      raise ValueError(f'{key} must be at least 1: {config[key]}')
  for divisor, size in (
    ('batch_size', 'num_episodes'),
    ('num_minibatches', 'batch_size'),
    ('num_slices', 'batch_size'),
    ('samples_per_prompt', 'batch_size'),
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
  run_lib.check_choice(config, 'offload', OFFLOADED)
  bases = {'reference': 'policy'}
  if 'value_from' in config:
    run_lib.check_choice(config, 'value_from', ('reward_model', 'policy'))
    if config.value_from == 'reward_model':
      bases['reward'] = 'value model'
  for name, trained in bases.items():
    if config.lora.rank and name in config.offload:
      raise ValueError(
        f'offload: with lora.rank > 0 the weights of {name!r} are also the '
        f'base of the {trained} in training; take {name!r} out of offload'
      )
  if not config.temperature > 0:
    raise ValueError(f'temperature must be positive: {config.temperature}')
  if method.kl_target is not None:
    if not config.kl_coef > 0:
      raise ValueError(
        'kl_coef must be positive if kl_target is set, which multiplies it: '
        f'{config.kl_coef}'
      )
    # An error of a fifth, the most that counts, then changes it by a fifth.
    if config.kl_horizon < config.batch_size:
      raise ValueError(
        'kl_horizon counts episodes, and must be at least the batch_size '
        f'{config.batch_size}: {config.kl_horizon}'
      )
  if config.ptx_per_episode < 1 and method.ptx_coef > 0:
    raise ValueError(
      f'ptx_coef {method.ptx_coef} needs ptx_per_episode >= 1: '
      f'{config.ptx_per_episode}'
    )
  for name in score_fns.parse_weights(config.reward_fn):
    score_fns.find_function(name)
  if config.probe_every:
    probes = model_folder.named_folders(config.probes, 'probes')
    probe.check_names(list(probes))
    if not probes:
      raise ValueError(
        f'probe_every is {config.probe_every}, but probes names no task'
      )


def validate_groups(config: ConfigDict) -> None:
  """`validate` for stages whose baselines are other samples for a prompt."""
  validate(config)
  choices = tuple(advantages.GROUP_ADVANTAGES)
  run_lib.check_choice(config, 'advantage', choices)
  if config.samples_per_prompt < 2:
    raise ValueError(
      'samples_per_prompt must be at least 2, since each is a baseline of the '
      f'others: {config.samples_per_prompt}'
    )


def inputs(config: ConfigDict) -> dict[str, str]:
  """The inputs of an RL stage: config key -> path."""
  needed = {
    'tokenizer': True,
    'init': True,
    'prompts': True,
    'documents': config.ptx_coef > 0,
    # Scores need a reward model or a function.
    'reward_model': config.reward_model or not config.reward_fn,
    'valid_documents': config.valid_documents,
  }
  found = {key: config[key] for key, is_needed in needed.items() if is_needed}
  for part in filter(None, config.reward_fn.split(',')):
    found |= score_fns.source_of(part)
  if config.probe_every:
    probes = model_folder.named_folders(config.probes, 'probes')
    found |= {f'probes.{name}': path for name, path in probes.items()}
  return found


def method_of(config: ConfigDict) -> ppo.PPOConfig:
  """The method's hyperparameters; `ppo.OF_VALUES` only with a value model.

  Raises:
    ValueError: a key is missing, or its value is out of range.
  """
  names = {field.name for field in dataclasses.fields(ppo.PPOConfig)}
  if 'value_learning_rate' not in config:
    names -= ppo.OF_VALUES
  if missing := sorted(names - set(config)):
    raise ValueError(f'{config.name}: keys are missing: {", ".join(missing)}')
  return ppo.PPOConfig(**{name: config[name] for name in names})


def num_iterations(config: ConfigDict) -> int:
  """Number of iterations of the whole stage."""
  return config.num_episodes // config.batch_size


def num_prompts(config: ConfigDict) -> int:
  """Number of prompts per iteration."""
  return config.batch_size // config.samples_per_prompt


def make_optimizer(
  config: ConfigDict, learning_rate: float
) -> optax.GradientTransformation:
  """Adam with a warmup from a tenth of the rate (C.4)."""
  updates = config.num_minibatches * config.num_epochs
  return optimizer.make_adam(
    optimizer.constant_with_warmup(
      learning_rate, config.num_warmup_iterations, 0.1, updates
    ),
    b1=config.adam_b1,
    b2=config.adam_b2,
    eps=config.adam_eps,
    max_grad_norm=config.max_grad_norm,
  )


def make_optimizers(
  config: ConfigDict,
) -> dict[str, optax.GradientTransformation]:
  """Adam for the policy, and another for the value model if there is one."""
  rates = {'policy': 'learning_rate', 'value': 'value_learning_rate'}
  return {
    name: make_optimizer(config, config[key])
    for name, key in rates.items()
    if key in config
  }


# --- Data ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Data:
  """What the iterations of a stage read.

  Attributes:
    prompts: the data set, to which `PromptBatch.indices` refer.
    num_kept, num_dropped: prompts that are short enough, and too long.
    prompt_batches: iteration -> this process's rows.
    ptx_batches: the same for pretraining text, or None.
    documents: (path, cut) -> rows of text, packed as for pretraining.
  """

  prompts: list[records.Prompt]
  num_kept: int
  num_dropped: int
  prompt_batches: grain.MapDataset
  ptx_batches: grain.MapDataset | None
  documents: Callable[..., TextBatch]

  def batches(self, iteration: int) -> tuple[PromptBatch, TextBatch | None]:
    """Prompts and pretraining rows of an iteration."""
    ptx = None if self.ptx_batches is None else self.ptx_batches[iteration]
    return self.prompt_batches[iteration], ptx


def read_data(config: ConfigDict, tokenizer: tokenizer_lib.Tokenizer) -> Data:
  """Reads prompts, and pretraining text if `ptx_coef` is not 0.

  Raises:
    ValueError: a bad record, or too few records for one iteration.
  """
  prompts = records.read_jsonl(config.prompts, records.Prompt)
  rows, dropped = loader.prompt_rows(prompts, tokenizer, config.prompt_length)
  run_lib.tell_dropped(
    config.name, dropped.describe('prompts', 'prompt_length')
  )
  run_lib.check_enough(
    loader.num_rows(rows),
    num_prompts(config),
    'prompts',
    'batch_size / samples_per_prompt',
  )
  make_batches = functools.partial(
    loader.make_batches,
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  documents = functools.partial(
    loader.document_rows, tokenizer=tokenizer, row_length=config.ptx_row_length
  )
  ptx = None
  if config.ptx_coef > 0:
    num_ptx = config.batch_size * config.ptx_per_episode * config.num_epochs
    ptx_rows = documents(config.documents, cut=config.cut_documents)
    run_lib.check_enough(
      loader.num_rows(ptx_rows),
      num_ptx,
      'rows of documents',
      'batch_size x ptx_per_episode x num_epochs',
    )
    ptx = make_batches(ptx_rows, batch_size=num_ptx)
  return Data(
    prompts=prompts,
    num_kept=loader.num_rows(rows),
    num_dropped=dropped.total,
    prompt_batches=make_batches(rows, batch_size=num_prompts(config)),
    ptx_batches=ptx,
    documents=documents,
  )


# --- Models -------------------------------------------------------------------


def make_mesh(
  config: ConfigDict, tokenizer: tokenizer_lib.Tokenizer
) -> jax.sharding.Mesh:
  """Checks the descriptions of a stage's models, and makes its mesh.

  Raises:
    ValueError: a folder without such a model, another tokenizer, or rows that
      the mesh does not divide.
  """
  folders = {config.init: 'policy', config.reward_model: 'scalar'}
  folders = {folder: kind for folder, kind in folders.items() if folder}
  for folder, kind in folders.items():
    model_folder.check(folder, kind, tokenizer)
  microbatch = config.batch_size // config.num_minibatches
  microbatch //= config.num_microbatches
  slice_size = config.batch_size // config.num_slices
  return model_folder.make_mesh(
    config.mesh,
    list(folders),
    [microbatch, slice_size, num_prompts(config), config.eval_batch_size],
  )


def load_models(
  config: ConfigDict,
  tokenizer: tokenizer_lib.Tokenizer,
  mesh: jax.sharding.Mesh,
) -> tuple[model_fns.Model, model_fns.Model | None]:
  """Loads the initial policy, and the reward model or None.

  Raises:
    ValueError: rows exceed a model's context.
  """
  load = functools.partial(
    model_folder.load,
    mesh=mesh,
    tokenizer=tokenizer,
    remat=config.remat,
    attention=config.attention,
    compute_dtype=config.compute_dtype,
  )
  policy = load(config.init, 'policy', logprob_chunk=config.logprob_chunk)
  reward = None
  if config.reward_model:
    reward = load(config.reward_model, 'scalar')
  for model in filter(None, (policy, reward)):
    model_fns.check_context(
      model,
      config.prompt_length + config.response_length,
      'prompt_length + response_length',
    )
  if config.ptx_coef > 0 or config.valid_documents:
    model_fns.check_context(policy, config.ptx_row_length, 'ptx_row_length')
  return policy, reward


def value_model(
  config: ConfigDict,
  policy: model_fns.Model,
  reward: model_fns.Model | None,
  mesh: jax.sharding.Mesh,
) -> model_fns.Model:
  """The model that the value model starts from.

  It is the reward model with its head (C.4) or, by `value_from` or without a
  reward model, the policy's trunk with a new head.
  """
  if reward is not None and config.value_from == 'reward_model':
    return reward
  # fold_in: the head must not share its noise with the rollouts' keys.
  key = jax.random.fold_in(jax.random.key(config.seed), 2**31)
  return model_fns.scalar_from_policy(policy, mesh, key)


def add_adapters(
  config: ConfigDict, mesh: jax.sharding.Mesh, *models: model_fns.Model
) -> list[model_fns.Model]:
  """The models, with fresh adapters if `lora.rank` is not 0."""
  return [
    model_fns.adapted(model, lora_of(config), mesh, config.seed)
    for model in models
  ]


class Frozen:
  """Models that are not trained, in `frozen_dtype`, offloaded if configured.

  Args:
    models: name -> parameters.
    bases: 'policy' and 'value' -> base of the adapters; None without adapters.
      Bases stay on the device and in their own dtype, as when saved adapters
      are loaded. Models may share their arrays.
  """

  def __init__(
    self,
    config: ConfigDict,
    models: Mapping[str, Params],
    bases: Mapping[str, Params | None],
  ):
    self._offload = sharding.Offload(config.offload)
    self.bases = dict(bases)
    # Keeps shared arrays only once.
    arrays = {id(x): x for x in jax.tree.leaves(self.bases)}

    def frozen(x):
      if id(x) not in arrays:
        arrays[id(x)] = x.astype(config.frozen_dtype)
      return arrays[id(x)]

    self._models = {
      name: self._offload.store(name, jax.tree.map(frozen, params))
      for name, params in models.items()
    }

  def __getitem__(self, name: str) -> PyTree:
    """A model's parameters, on the device."""
    return self._offload.load(name, self._models[name])

  def store(self, name: str, params: PyTree) -> PyTree:
    """Moves parameters to the host if configured; `load` is the inverse."""
    return self._offload.store(name, params)

  def load(self, name: str, params: PyTree) -> PyTree:
    """Moves stored parameters back to the device."""
    return self._offload.load(name, params)


# --- Programs and states ------------------------------------------------------


def make_respond(
  config: ConfigDict, policy: heads.Policy, stop_ids: tuple[int, ...]
) -> Callable[[Params, PromptBatch, Key], Rollout]:
  """`rollout.generate` with the settings of a stage.

  A row's noise depends on its prompt's number, not on its neighbours. So
  `num_slots` affects the cache's memory and the time, but not the samples.
  """
  return functools.partial(
    rollout.generate,
    decoder=model_fns.decoder(policy, config.gather_weights),
    num_response=config.response_length,
    stop_ids=stop_ids,
    temperature=config.temperature,
    num_slots=config.num_slots,
    num_samples=config.samples_per_prompt,
  )


def initial_state(
  config: ConfigDict, policy: Params, value: Params | None = None
) -> ppo.RLState:
  """The state before the first update.

  It has copies of the parameters, since donated states must not share buffers
  with frozen models.
  """
  optimizers = make_optimizers(config)

  def create(name, params):
    params = jax.tree.map(jnp.copy, params)
    return train_state.create(params, optimizers[name])

  return ppo.RLState(
    policy=create('policy', policy),
    value=None if value is None else create('value', value),
    ema=jax.tree.map(jnp.copy, policy),
    kl=rewards.KLState(coef=jnp.float32(config.kl_coef)),
  )


def in_training(
  config: ConfigDict, state: ppo.RLState
) -> dict[str, train_state.TrainState]:
  """The train states of a stage, by the names that messages use."""
  found = {'policy': state.policy, 'value': state.value}
  return {
    f'{config.name} {name}': model
    for name, model in found.items()
    if model is not None
  }


# --- Rows and scores ----------------------------------------------------------


def row_sizes(config: ConfigDict, mesh: jax.sharding.Mesh) -> packing.Sizes:
  """`packing.Sizes` of a stage."""
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


def lay_out(
  config: ConfigDict,
  programs: Mapping[str, Callable],
  responses: Rollout,
  mesh: jax.sharding.Mesh,
  iteration: int,
) -> packing.Layout:
  """The layout of a rollout's episodes in rows, on the mesh.

  Waits for the rollout, whose lengths determine the shape.

  Args:
    programs: 'lengths' is the jitted `rollout.episode_lengths`.
    iteration: with the seed, decides the deal into minibatches.
  """
  lengths, response_lengths = np.asarray(programs['lengths'](responses))
  sizes = row_sizes(config, mesh)
  groups = packing.deal_epochs(
    lengths + response_lengths, sizes, (config.seed, iteration)
  )
  layout = packing.lay_out(lengths, response_lengths, groups, sizes)
  # Every host computes the whole layout and passes its own rows of it.
  own = jax.tree.map(
    lambda x: np.split(x, jax.process_count())[jax.process_index()], layout
  )
  return sharding.put_batch(own, mesh)


def make_score(
  config: ConfigDict, module: heads.ScalarModel
) -> Callable[[Params, Rollout, packing.Layout], jax.Array]:
  """Makes a reward model's program; see `score_fns.reward_program`."""
  longest = config.prompt_length + config.response_length
  num_others = max(len(module.end_ids) - 1, 0)
  return score_fns.reward_program(
    model_fns.scalars_fn(module, longest + num_others),
    functools.partial(heads.read_scores, module),
    config.num_slices,
    functools.partial(heads.with_ends, module) if num_others else None,
  )


def sampled_of(
  config: ConfigDict,
  responses: Rollout,
  layout: packing.Layout,
  prompts: PromptBatch,
) -> score_fns.Sampled:
  """Makes the argument of a `ScoreFn`.

  Args:
    responses, layout: on the mesh.
    prompts: this process's prompts of the responses, on the host.
  """
  indices = np.repeat(prompts.indices, config.samples_per_prompt)
  return score_fns.Sampled(responses, layout, indices)


def make_score_fn(
  config: ConfigDict,
  programs: Mapping[str, Callable],
  frozen: Frozen,
  prompts: list[records.Prompt],
  tokenizer: tokenizer_lib.Tokenizer,
  mesh: jax.sharding.Mesh,
) -> score_fns.ScoreFn:
  """Makes the score function of a stage: `reward_model`, `reward_fn` or both.

  Args:
    programs: 'score' is the jitted `score_fns.reward_program`.
    frozen: has the 'reward' model, if there is one.
    prompts: the data set.
  """
  parts = {}
  if config.reward_model:
    parts['reward_model'] = (
      lambda sampled: programs['score'](
        frozen['reward'], sampled.rollout, sampled.layout
      ),
      config.reward_weight,
    )
  for name, weight in score_fns.parse_weights(config.reward_fn).items():
    function = score_fns.find_function(name)
    parts[name] = (
      score_fns.of_function(name, function, prompts, tokenizer, mesh),
      weight,
    )
  if config.reward_fn:
    terms = [f'{weight:g} x {name}' for name, (_, weight) in parts.items()]
    run_lib.say(f'{config.name}: a score is {" + ".join(terms)}')
  return score_fns.weighted(parts)


# --- Evaluation and outputs ---------------------------------------------------


def make_evaluate(
  config: ConfigDict,
  module: Any,
  tokenizer: tokenizer_lib.Tokenizer,
  mesh: jax.sharding.Mesh,
  data: Data,
) -> Callable[[int, PyTree, PyTree], dict[str, float]]:
  """Makes (iterations done, policy, its average) -> evaluations that are due.

  They are the loss on held-out text and scores on public NLP tasks. Held-out
  documents are kept whole, so that losses are comparable.
  """
  loss_fn = prober = None
  if config.valid_documents:
    loss_fn = queries.make_heldout_loss(
      module,
      data.documents(config.valid_documents),
      config.eval_batch_size,
      mesh,
    )
  if config.probe_every:
    prober = queries.make_prober(config, module, tokenizer, mesh)
  end = num_iterations(config)

  def evaluate(done, params, ema):
    values, ending = {}, '_before' if done == 0 else ''
    if loss_fn and (done in (0, end) or done % config.eval_every == 0):
      values[f'eval/pretraining_loss{ending}'] = loss_fn(params).mean
      if done > 0:
        values['eval/pretraining_loss_ema'] = loss_fn(ema).mean
    if prober and (done in (0, end) or done % config.probe_every == 0):
      values |= prober(params, ending)
    return values

  return evaluate


class Outputs:
  """What an RL stage writes besides metrics and checkpoints.

  Args:
    policy: the policy; its parameters are not used.
    reward: the reward model or None. The range of its scores on its training
      data is the range of plausible scores, unless `reward_fn` adds to them.
  """

  def __init__(
    self,
    config: ConfigDict,
    workdir: epath.Path,
    policy: model_fns.Model,
    tokenizer: tokenizer_lib.Tokenizer,
    reward: model_fns.Model | None,
  ):
    self._config, self._workdir, self._tokenizer = config, workdir, tokenizer
    self._policy = dataclasses.replace(policy, params=None, base=None)
    score_range = (-math.inf, math.inf)
    if reward is not None and not config.reward_fn:
      score_range = tuple(
        sorted(config.reward_weight * x for x in reward.metadata['score_range'])
      )
    self._reporter = alarms.Reporter(
      score_range, config.response_length, policy.module.config.compute_dtype
    )

  def save(self, folder: str, params: Params, **metadata: Any) -> None:
    """Writes a policy as a model folder."""
    model_folder.save(
      self._workdir / folder,
      dataclasses.replace(self._policy, params=params),
      self._tokenizer,
      {'stage': self._config.name, 'seed': self._config.seed, **metadata},
    )

  def snapshot(self, done: int, params: Params) -> None:
    """Writes a snapshot if one is due after `done` iterations.

    Call this before the iteration's checkpoint: a run that resumes from the
    checkpoint does not write the snapshot again.
    """
    every = self._config.snapshot_every
    # The last snapshot would equal the `policy` folder.
    if every and done % every == 0 and done < num_iterations(self._config):
      self.save(f'snapshots/{done}', params, iteration=done)

  def tell_alarms(self, lines: list[dict]) -> None:
    """Prints and logs new alarms, given the lines of metrics.jsonl so far."""
    for text in self._reporter.new(lines):
      run_lib.say(f'{self._config.name}: alarm: {text}')
      logger.current().alarm(lines[-1]['step'], text)

  def finish(
    self, params: Params, ema: Params, lines: list[dict], data: Data
  ) -> dict[str, Any]:
    """Writes the policy, its moving average and the alarms.

    Returns:
      The stage's record of the run.
    """
    for name, weights in (('policy', params), ('ema', ema)):
      self.save(
        name,
        weights,
        weights=name,
        ptx_coef=self._config.ptx_coef,
        num_episodes=self._config.num_episodes,
      )
    found = self._reporter.find(lines)
    run_lib.write_json(self._workdir / 'alarms.json', found)
    return {
      'num_prompts': data.num_kept,
      'num_prompts_dropped': data.num_dropped,
      'alarms': found,
    }


def summary(line: Mapping[str, Any]) -> str:
  """The main metrics of a line of metrics.jsonl, as text.

  A value of None was not finite.
  """

  def show(name, digits):
    value = line.get(f'objective/{name}')
    return f'{name} {"?" if value is None else f"{value:.{digits}f}"}'

  return ' '.join((show('score', 3), show('kl', 2), show('length', 1)))
