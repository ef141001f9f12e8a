"""How long each part of an iteration takes, and what share of the machine.

Runs the programs of ppo_ptx.py and sft.py, as they stand, on random weights and
tokens. Shares are of ceilings measured by the same process, and count useful
work only: real tokens, log-probabilities of response tokens, weights read once
for a full batch of slots. Padding, idle slots, recomputation and logits that
nobody reads make them smaller.

Phases inside one program are told apart by leaving them out: prefill is a
rollout of one token, decode the rest of a whole one; ptx is an update with
pretraining text less one without; the moving average runs by itself.
"""

import collections
import dataclasses
import functools
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments import ppo_ptx, sft
from instruct_jax import model_fns, packing, rl
from instruct_jax.data import loader
from instruct_jax.infra import (
  checkpoint,
  measure,
  metrics,
  sharding,
  train_state,
)
from instruct_jax.infra import run as run_lib
from instruct_jax.models.config import TransformerConfig
from instruct_jax.types import PromptBatch, TextBatch

PROCESSES = 'one'

WORKS = ('iteration', 'rollout', 'sft')
GROWTHS = ('response', 'batch', 'model')
ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Peer:
  """One of the peers' scripts: name, key of its python, its command line."""

  name: str
  python: str
  command: str


# For each of our works the scripts that do the same; the ragged iteration has
# none of its own: a peer's costs as much as the full one, which it decodes.
_PPO_PEERS = (
  Peer('Tunix PPO, one step', 'tunix_python', 'tunix_ppo.py S accum 7'),
  Peer('Tunix PPO, four steps', 'tunix_python', 'tunix_ppo.py S mini 7'),
  Peer('TRL PPO', 'trl_python', 'trl_ppo.py S 6'),
)
PEERS = {
  'rollout': (
    Peer('Tunix', 'tunix_python', 'tunix_bench.py W1 S'),
    Peer('transformers', 'hf_python', 'hf_bench.py W1 S'),
  ),
  'rollout_ragged': (
    Peer('Tunix', 'tunix_python', 'tunix_bench.py W1b S'),
    Peer('transformers', 'hf_python', 'hf_bench.py W1b S'),
  ),
  'sft': (
    Peer('Tunix', 'tunix_python', 'tunix_bench.py W2 S'),
    Peer('torch loop', 'hf_python', 'hf_bench.py W2 S'),
    Peer('TRL SFTTrainer', 'hf_python', 'trl_sft.py S'),
  ),
  'iteration': _PPO_PEERS,
  'iteration_ragged': _PPO_PEERS,
}


def validate(config):
  """Checks the config, and those of the stages that it times.

  Raises:
    ValueError: the key, what it is, and what it should be.
  """
  run_lib.check_choice(config, 'work', (*WORKS, 'all'))
  run_lib.check_choice(config, 'reward', ('model', 'tokens'))
  if config.num_iterations < 5:
    raise ValueError(
      f'num_iterations must be at least 5, or the spread says nothing: '
      f'{config.num_iterations}'
    )
  if not 0 <= config.stop_fraction < 1:
    raise ValueError(f'stop_fraction must be in [0, 1): {config.stop_fraction}')
  run_lib.check_choice({'growth': growths(config)}, 'growth', GROWTHS)
  if config.peers and not pathlib.Path(config.peers).is_dir():
    raise ValueError(f"peers: there is no folder '{config.peers}'")
  for name in ('policy', 'scalar'):
    with run_lib.naming('model', name):
      TransformerConfig.from_dict(config[name].to_dict())
  for stage, name in ((ppo_ptx, 'ppo'), (sft, 'sft')):
    stage.validate(config[name])
    if config[name].lora.rank:
      raise ValueError(f'{name}.lora.rank must be 0: all weights are trained')


def inputs(config):
  """Nothing: the weights are random. The peers' scripts are programs."""
  del config
  return {}


def growths(config) -> list[str]:
  """What is made larger, one after the other."""
  return [name for name in config.growth.split(',') if name]


# --- Useful work --------------------------------------------------------------


def matmul_weights(shape: TransformerConfig) -> int:
  """Weights that every token is multiplied with; no embedding."""
  attention = 2 * shape.width * shape.head_dim
  attention *= shape.num_heads + shape.kv_heads
  mlp = (2 + shape.gated_mlp) * shape.width * shape.mlp_dim
  return shape.num_layers * (attention + mlp)


def forward_flops(shape, lengths, num_logits) -> float:
  """Arithmetic of reading whole sequences causally.

  Args:
    shape: of the model.
    lengths: tokens of each sequence.
    num_logits: positions that meet the unembedding.
  """
  lengths = np.asarray(lengths, np.float64)
  pairs = np.sum(lengths * (lengths + 1) / 2)
  attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * pairs
  logits = 2 * shape.width * shape.vocab_size * num_logits
  return float(2 * matmul_weights(shape) * lengths.sum() + attention + logits)


def decode_work(shape, prompts, responses, num_slots) -> tuple[float, float]:
  """Arithmetic, and bytes read at least, after the first token of each.

  Every step reads the weights once for all slots, and of the cache what its
  sequences have filled.
  """
  p, r = np.asarray(prompts, float), np.asarray(responses, float)
  flops = forward_flops(shape, p + r - 1, np.sum(r - 1))
  flops -= forward_flops(shape, p, 0)
  width = jnp.dtype(shape.compute_dtype).itemsize
  weights = matmul_weights(shape) + shape.width * shape.vocab_size
  steps = np.sum(r - 1) / num_slots
  # Step t of a sequence reads p + t entries, t = 1 .. r - 1.
  entries = np.sum((r - 1) * p + (r - 1) * r / 2)
  entry = 2 * shape.num_layers * shape.kv_heads * shape.head_dim
  return float(flops), float(width * (steps * weights + entries * entry))


# --- Random work --------------------------------------------------------------


def stop_ids(config) -> tuple[int, ...]:
  """Ids that end a response; without raggedness one that cannot be sampled."""
  num_tokens = config.policy.vocab_size
  if not config.stop_fraction:
    return (num_tokens,)
  rng = np.random.default_rng(7)
  count = int(config.stop_fraction * num_tokens)
  chosen = rng.permutation(np.arange(3, num_tokens))[:count]
  return tuple(sorted(chosen.tolist()))


def random_prompts(config, num_batches) -> PromptBatch:
  """Prompts of random tokens, all of the full length."""
  stage = config.ppo
  shape = (num_batches * stage.batch_size, stage.prompt_length)
  rng = np.random.default_rng(config.seed)
  tokens = rng.integers(3, config.policy.vocab_size, shape).astype(np.int32)
  indices = np.arange(shape[0], dtype=np.int32)
  return PromptBatch(tokens, np.ones(shape, bool), indices)


def random_text(config, num_rows, length) -> TextBatch:
  """Rows of random tokens, each one document."""
  rng = np.random.default_rng(config.seed)
  shape = (num_rows, length)
  tokens = rng.integers(3, config.policy.vocab_size, shape).astype(np.int32)
  mask = np.ones(shape, bool)
  loss_mask = np.broadcast_to(np.arange(length) > 0, shape).copy()
  return TextBatch(tokens, mask, loss_mask, mask.astype(np.int32))


@jax.jit
def share_of_small_ids(sampled):
  """The peers' reward: the share of tokens below 100, in [0, 1]."""
  small = jnp.sum((sampled.tokens < 100) & sampled.mask, axis=1)
  return small / jnp.maximum(jnp.sum(sampled.mask, axis=1), 1)


# --- Measuring ----------------------------------------------------------------


@dataclasses.dataclass
class Phase:
  """Seconds of a phase in one iteration, and its useful work.

  Attributes:
    seconds: medians, or differences of medians.
    tokens: read or written.
    flops: arithmetic.
    bytes: read at least; 0 where arithmetic is what counts.
  """

  seconds: float
  tokens: int | float = 0
  flops: int | float = 0.0
  bytes: int | float = 0.0

  def row(self, ceilings) -> dict:
    """As JSON, with shares of the ceilings."""
    row = dataclasses.asdict(self)
    seconds = max(self.seconds, 1e-12)
    row['tokens_per_second'] = self.tokens / seconds
    row['matmul_share'] = self.flops / seconds / ceilings['matmul']
    row['bandwidth_share'] = self.bytes / seconds / ceilings['bandwidth']
    return row


def measure_ceilings(config) -> dict[str, float]:
  """Of one device, times the number of devices."""
  count = len(jax.devices())
  dtype = config.policy.compute_dtype
  return {
    'matmul': count * measure.matmul_peak(dtype, config.matmul_size),
    'bandwidth': count * measure.read_bandwidth(config.bandwidth_bytes),
  }


class Iteration:
  """The models, programs and data of one configuration of ppo_ptx.py."""

  def __init__(self, config):
    stage = config.ppo
    self.config, self.stage = config, stage
    self.mesh = sharding.make_mesh(config.mesh)
    self.root = jax.random.key(config.seed)
    self.shape = TransformerConfig.from_dict(
      {**config.policy.to_dict(), 'logprob_chunk': stage.logprob_chunk}
      if stage.logprob_chunk
      else config.policy.to_dict()
    )
    self.scalar_shape = TransformerConfig.from_dict(config.scalar.to_dict())
    keys = jax.random.split(self.root, 3)
    self.policy = model_fns.init('policy', self.shape, self.mesh, keys[0])
    value = model_fns.init('scalar', self.scalar_shape, self.mesh, keys[1])
    self.programs = self.build(stage)
    self.state = ppo_ptx.initial_state(stage, self.policy.params, value.params)
    models = {'reference': self.policy.params}
    if config.reward == 'model':
      models['reward'] = value.params
    self.frozen = rl.Frozen(stage, models, bases={})
    self.policy = dataclasses.replace(self.policy, params=None)
    self.prompts = loader.make_batches(
      random_prompts(config, 4), batch_size=stage.batch_size, seed=config.seed
    )
    self.num_ptx = stage.batch_size * stage.ptx_per_episode * stage.num_epochs
    if stage.ptx_coef > 0:
      self.ptx = loader.make_batches(
        random_text(config, 4 * self.num_ptx, stage.ptx_row_length),
        batch_size=self.num_ptx,
        seed=config.seed,
      )

  def build(self, stage):
    """Programs of ppo_ptx.py for a stage's numbers."""
    return ppo_ptx.build_programs(
      stage,
      self.policy.module,
      model_fns.make_module('scalar', self.scalar_shape),
      stop_ids(self.config),
    )

  def changed(self, **changes):
    """The stage with other numbers."""
    stage = self.stage.copy_and_resolve_references()
    for name, value in changes.items():
      stage[name] = value
    return stage

  def batches(self, number):
    """Host: what an iteration takes from the data, on the mesh."""
    prompts = sharding.put_batch(self.prompts[number], self.mesh)
    ptx = None
    if self.stage.ptx_coef > 0:
      ptx = sharding.put_batch(self.ptx[number], self.mesh)
    return prompts, ptx

  def respond(self, prompts, number):
    """Samples an iteration's responses."""
    return self.programs['respond'](
      self.state.policy.params, prompts, jax.random.fold_in(self.root, number)
    )

  def lay_out(self, sampled, number):
    """The rows of the sampled episodes."""
    return rl.lay_out(self.stage, self.programs, sampled, self.mesh, number)

  def score(self, sampled, layout):
    """Scores, and the batch that they make: all that the update reads."""
    if self.config.reward != 'model':
      scores = share_of_small_ids(sampled)
    else:
      scores = self.programs['score'](self.frozen['reward'], sampled, layout)
    return self.programs['penalise'](
      self.state.replace(ema=None),
      {'reference': self.frozen['reference']},
      sampled,
      layout,
      scores,
    )

  def train(self, programs, batch, kl, ptx, number):
    """Updates the state; returns the update's metrics."""
    self.state, train_metrics = programs['train'](
      self.state, {}, batch, ptx, kl, jax.random.fold_in(self.root, number)
    )
    return train_metrics

  def whole(self, number):
    """One iteration as ppo_ptx.py runs it; what it sampled."""
    prompts, ptx = self.batches(number)
    sampled = self.respond(prompts, number)
    layout = self.lay_out(sampled, number)
    batch, kl, score_metrics = self.score(sampled, layout)
    train_metrics = self.train(self.programs, batch, kl, ptx, number)
    metrics.to_host({**score_metrics, **train_metrics})
    return sampled


def measure_iteration(config, workdir) -> dict:
  """The whole iteration, then its phases one by one."""
  stage = config.ppo
  mesh = sharding.make_mesh(config.mesh)
  with sharding.use_mesh(mesh):
    work = Iteration(config)
    before = measure.compilations()
    for number in range(config.num_warmups):
      jax.block_until_ready(work.whole(number))
    compiled = measure.compilations() - before

    # 1. Whole iterations, as a user runs them.
    before = measure.compilations()
    numbers = iter(range(config.num_warmups, 10**9))
    lengths = []

    def whole():
      sampled = work.whole(next(numbers))
      lengths.append(np.asarray(sampled.response_mask).sum(axis=1))

    whole_times = measure.repeat(whole, config.num_iterations, 0)
    recompiled = measure.compilations() - before
    peak_device = measure.peak_device_bytes()
    peak_host = measure.peak_host_bytes()

    # 2. The same, waiting between the phases.
    laps = collections.defaultdict(list)
    watch = measure.Stopwatch()
    for number in range(config.num_iterations):
      watch.lap()
      prompts, ptx = jax.block_until_ready(work.batches(number))
      laps['host'].append(watch.lap()[0])
      sampled = jax.block_until_ready(work.respond(prompts, number))
      laps['generate'].append(watch.lap()[0])
      layout = jax.block_until_ready(work.lay_out(sampled, number))
      laps['host'][-1] += watch.lap()[0]
      batch, kl, score_metrics = jax.block_until_ready(
        work.score(sampled, layout)
      )
      laps['score'].append(watch.lap()[0])
      train_metrics = jax.block_until_ready(
        work.train(work.programs, batch, kl, ptx, number)
      )
      laps['update'].append(watch.lap()[0])
      metrics.to_host({**score_metrics, **train_metrics})
      laps['host'][-1] += watch.lap()[0]
    seconds = {name: statistics.median(x) for name, x in laps.items()}

    # 3. What lies inside one program.
    repeats = config.num_iterations
    short = work.build(work.changed(response_length=1))['respond']
    prefill = measure.repeat(
      lambda: short(work.state.policy.params, prompts, work.root), repeats
    ).median
    without_ptx = seconds['update']
    if stage.ptx_coef > 0:
      plain = work.build(work.changed(ptx_coef=0.0))
      without_ptx = measure.repeat(
        lambda: work.train(plain, batch, kl, None, 0), repeats
      ).median
    average = jax.jit(
      functools.partial(train_state.ema_update, decay=stage.ema_decay),
      donate_argnums=0,
    )
    ema = jax.tree.map(jnp.copy, work.state.ema)

    def move():
      nonlocal ema
      ema = average(ema, work.state.policy.params)
      return ema

    num_updates = stage.num_minibatches * stage.num_epochs
    num_averages = num_updates if stage.ema_every == 'update' else 1
    ema_seconds = num_averages * measure.repeat(move, repeats).median
    del ema
    saved, written = measure_checkpoint(work.state, workdir)

  lengths = np.concatenate(lengths)
  real = stage.prompt_length + lengths
  per_iteration = 1 / config.num_iterations
  tokens, responses = real.sum() * per_iteration, lengths.sum() * per_iteration
  prompts_read = np.full(len(lengths), stage.prompt_length)
  slots = stage.num_slots or stage.batch_size
  decode_flops, decode_bytes = decode_work(
    work.shape, prompts_read, lengths, slots
  )
  read_policy = forward_flops(work.shape, real, lengths.sum())
  read_scalar = forward_flops(work.scalar_shape, real, 0)
  # The old log-probabilities are the sampler's, where those agree.
  score_flops = read_policy * (1 + (stage.sampler_tolerance == 0))
  score_flops += read_scalar * (1 + (config.reward == 'model'))
  epochs = stage.num_epochs
  num_params = sum(x.size for x in jax.tree.leaves(work.state.policy.params))
  phases = {
    'prefill': Phase(
      prefill,
      stage.batch_size * stage.prompt_length,
      forward_flops(work.shape, prompts_read, len(lengths)) * per_iteration,
    ),
    'decode': Phase(
      seconds['generate'] - prefill,
      responses - stage.batch_size,
      decode_flops * per_iteration,
      decode_bytes * per_iteration,
    ),
    'score': Phase(seconds['score'], tokens, score_flops * per_iteration),
    'update': Phase(
      without_ptx - ema_seconds,
      epochs * tokens,
      3 * epochs * (read_policy + read_scalar) * per_iteration,
    ),
    'ptx': Phase(seconds['update'] - without_ptx),
    # Reads average and weights, writes the average.
    'ema': Phase(ema_seconds, bytes=num_averages * 12 * num_params),
    'host': Phase(seconds['host']),
    'checkpoint': Phase(saved),
  }
  if stage.ptx_coef > 0:
    rows = np.full(work.num_ptx, stage.ptx_row_length)
    phases['ptx'].tokens = float(rows.sum())
    phases['ptx'].flops = 3 * forward_flops(work.shape, rows, rows.sum())
  blocked = sum(seconds.values())
  longest = lengths.reshape(-1, slots).max(axis=1)
  return {
    'unit': 's/iteration',
    'seconds': whole_times.summary(),
    'value': whole_times.median,
    'tokens_per_second': responses / whole_times.median,
    'phases': phases,
    'host_share': seconds['host'] / blocked,
    'checkpoint_written_seconds': written,
    'padding': 1 - packing.fill_fraction(layout),
    'padding_without_packing': float(1 - np.mean(np.asarray(sampled.mask))),
    'occupancy': float(lengths.sum() / (slots * longest.sum())),
    'mean_response': float(lengths.mean()),
    'compile_seconds': compiled.seconds,
    'programs_compiled': compiled.programs,
    'programs_from_disk': compiled.from_disk,
    'recompilations': recompiled.programs,
    'peak_host_bytes': peak_host,
    'peak_device_bytes': peak_device,
    'num_params': num_params,
  }


def measure_checkpoint(state, workdir) -> tuple[float, float]:
  """Seconds until training may go on, and until the files are there."""
  writer = checkpoint.Checkpointer(workdir / 'checkpoints', keep=1)
  watch = measure.Stopwatch()
  writer.save(1, state, {})
  saved, _ = watch.lap()
  writer.wait()
  waited, _ = watch.lap()
  writer.close()
  (workdir / 'checkpoints').rmtree()
  return saved, saved + waited


def measure_rollout(config, workdir) -> dict:
  """Sampling alone; tokens up to the stop count."""
  del workdir
  mesh = sharding.make_mesh(config.mesh)
  with sharding.use_mesh(mesh):
    work = Iteration(config)
    numbers, lengths = iter(range(10**9)), []
    prompts, _ = work.batches(0)

    def sample():
      sampled = jax.block_until_ready(work.generate(prompts, next(numbers)))
      lengths.append(np.asarray(sampled.response_mask).sum(axis=1))

    times, compiled, recompiled = timed(config, sample)
  lengths = np.stack(lengths[config.num_warmups :])
  prompt_lengths = np.full(lengths.size, config.ppo.prompt_length)
  slots = config.ppo.num_slots or config.ppo.batch_size
  flops, moved = decode_work(work.shape, prompt_lengths, lengths.ravel(), slots)
  flops += forward_flops(work.shape, prompt_lengths, lengths.size)
  count = config.num_iterations
  rates = lengths.sum(axis=1) / np.asarray(times.seconds)
  longest = lengths.reshape(-1, slots).max(axis=1)
  return {
    'unit': 'tokens/s',
    'value': float(np.median(rates)),
    'seconds': times.summary(),
    'phases': {
      'rollout': Phase(
        times.median, lengths.sum() / count, flops / count, moved / count
      )
    },
    'occupancy': float(lengths.sum() / (slots * longest.sum())),
    'mean_response': float(lengths.mean()),
    **compile_counts(compiled, recompiled),
  }


def measure_sft(config, workdir) -> dict:
  """One supervised step on full rows."""
  del workdir
  stage = config.sft
  mesh = sharding.make_mesh(config.mesh)
  with sharding.use_mesh(mesh):
    shape = TransformerConfig.from_dict(config.policy.to_dict())
    root = jax.random.key(config.seed)
    model = model_fns.init('policy', shape, mesh, root)
    programs = sft.build_programs(stage, model.module, 1_000)
    state = train_state.create(model.params, programs['optimizer'])
    del model
    batch = sharding.put_batch(
      random_text(config, stage.batch_size, stage.row_length), mesh
    )

    def step():
      nonlocal state
      state, line = programs['update'](state, {}, batch, root)
      return line

    times, compiled, recompiled = timed(config, step)
  rows = np.full(stage.batch_size, stage.row_length)
  flops = 3 * forward_flops(shape, rows, rows.sum())
  return {
    'unit': 'tokens/s',
    'value': float(rows.sum() / times.median),
    'seconds': times.summary(),
    'phases': {'step': Phase(times.median, float(rows.sum()), flops)},
    **compile_counts(compiled, recompiled),
  }


def timed(config, fn):
  """Repeats of a piece of work, what it compiled first, and what later."""
  before = measure.compilations()
  for _ in range(config.num_warmups):
    jax.block_until_ready(fn())
  between = measure.compilations()
  times = measure.repeat(fn, config.num_iterations, 0)
  return times, between - before, measure.compilations() - between


def compile_counts(compiled, recompiled) -> dict:
  """Seconds and number of compilations, and peak memory; JSON."""
  return {
    'compile_seconds': compiled.seconds,
    'programs_compiled': compiled.programs,
    'programs_from_disk': compiled.from_disk,
    'recompilations': recompiled.programs,
    'peak_host_bytes': measure.peak_host_bytes(),
    'peak_device_bytes': measure.peak_device_bytes(),
  }


# --- Other processes ----------------------------------------------------------


def command_of(config, variant, workdir) -> list[str]:
  """main.py with this config's values, for a process of its own."""
  size = config.variant.partition(',')[0]
  flags = []

  def add(prefix, values):
    for key, value in values.items():
      if isinstance(value, dict):
        add(f'{prefix}{key}.', value)
      elif value is not None and key not in (
        'name',
        'experiment',
        'workdir',
        'default_workdir',
        'variant',
        'work',
        'stop_fraction',
        'growth',
        'peers',
      ):
        flags.append(f'--config.{prefix}{key}={value}')

  add('', config.to_dict())
  file = ROOT / 'configs' / 'speed.py'
  return [
    sys.executable,
    '-m',
    'instruct_jax.main',
    f'--config={file}:{size},{variant}',
    f'--workdir={workdir}',
    *flags,
  ]


def run_process(command, log, config, environment=None, folder=ROOT) -> None:
  """Runs a command on the first `config.cores` cores.

  Raises:
    RuntimeError: it failed; with the end of what it printed.
  """
  can_pin = config.cores and hasattr(os, 'sched_setaffinity')
  allowed = os.sched_getaffinity(0) if can_pin else None
  if can_pin:  # A child inherits it; this thread gets its own back.
    os.sched_setaffinity(0, sorted(allowed)[: config.cores])
  try:
    done = subprocess.run(
      command,
      cwd=folder,
      env={**os.environ, **(environment or {})},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      check=False,
    )
  finally:
    if can_pin:
      os.sched_setaffinity(0, allowed)
  log.write_text(done.stdout)
  if done.returncode:
    end = '\n'.join(done.stdout.strip().splitlines()[-3:])
    raise RuntimeError(
      f'{shlex.join(map(str, command[:3]))} ... ended with '
      f'{done.returncode} ({log}):\n{end}'
    )


def run_ours(config, variant, workdir, changes=None) -> dict:
  """One work in a process of its own; its results."""
  config = config.copy_and_resolve_references()
  config.unlock()
  for key, value in (changes or {}).items():
    part, _, name = key.rpartition('.')
    (config[part] if part else config)[name] = value
  workdir.mkdir(parents=True, exist_ok=True)
  run_process(command_of(config, variant, workdir), workdir / 'log.txt', config)
  return run_lib.read_json(workdir / 'speed.json')


def run_peer(config, peer, log) -> dict:
  """One of the peers' scripts; the line it ends with."""
  threads = str(config.cores or os.cpu_count())
  environment = dict.fromkeys(
    ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'), threads
  )
  environment |= {
    'JAX_PLATFORMS': 'cpu',
    'HF_HUB_OFFLINE': '1',
    'TOKENIZERS_PARALLELISM': 'false',
    'XLA_FLAGS': '',
  }
  command = [config[peer.python], *peer.command.split()]
  run_process(command, log, config, environment, config.peers)
  lines = [x for x in log.read_text().splitlines() if x.startswith('RESULT ')]
  if not lines:
    raise RuntimeError(f'{peer.command} printed no result ({log})')
  return json.loads(lines[-1].removeprefix('RESULT '))


# --- Growth and comparison ----------------------------------------------------


def grown(config, kind, factor) -> dict:
  """Changed keys for a work that is `factor` times as large."""
  if kind == 'response':
    return {'ppo.response_length': factor * config.ppo.response_length}
  if kind == 'batch':
    return {
      'ppo.batch_size': factor * config.ppo.batch_size,
      'sft.batch_size': factor * config.sft.batch_size,
    }
  # Four times the weights: twice as wide. Twice: twice as deep.
  changes = {}
  for model in ('policy', 'scalar'):
    names = ['num_heads', 'width', 'mlp_dim'] if factor == 4 else ['num_layers']
    changes |= {f'{model}.{name}': 2 * config[model][name] for name in names}
  return changes


def measure_growth(config, variant, workdir, base) -> list[dict]:
  """Seconds and useful work of each larger work, over the base's."""

  def totals(result):
    phases = result['phases'].values()
    flops = sum(p['flops'] for p in phases)
    return result['seconds']['median'], flops

  seconds, flops = totals(base)
  rows = []
  for kind in growths(config):
    for factor in (2, 4):
      folder = workdir / f'{kind}_{factor}'
      result = run_ours(config, variant, folder, grown(config, kind, factor))
      row_seconds, row_flops = totals(result)
      rows.append(
        {
          'growth': kind,
          'factor': factor,
          'seconds': row_seconds,
          'seconds_ratio': row_seconds / seconds,
          'work_ratio': row_flops / flops,
          'phases': {
            name: phase['seconds'] for name, phase in result['phases'].items()
          },
          'peak_host_bytes': result['peak_host_bytes'],
        }
      )
  return rows


def compare(config, variant, workdir) -> list[dict]:
  """Ours and the peers', one after the other, `num_rounds` times."""
  found = collections.defaultdict(list)
  for turn in range(1, config.num_rounds + 1):
    ours = run_ours(config, variant, workdir / f'ours_{variant}_{turn}')
    found['ours'].append((ours['value'], ours['peak_host_bytes']))
    unit = ours['unit']
    for number, peer in enumerate(PEERS[variant]):
      if not config[peer.python]:
        continue
      log = workdir / f'peer_{variant}_{number}_{turn}.txt'
      try:
        result = run_peer(config, peer, log)
      except RuntimeError as error:
        print(f'{config.name}: {peer.name}: {error}', flush=True)
        continue
      peak = result['peak_rss_mib'] * 2**20
      found[peer.name].append((result['median'], peak))
  own = statistics.median(value for value, _ in found['ours'])
  rows = []
  for name, runs in found.items():
    value = statistics.median(value for value, _ in runs)
    ratio = own / value if unit == 'tokens/s' else value / own
    rows.append(
      {
        'work': variant,
        'who': name,
        'unit': unit,
        'value': value,
        'runs': [value for value, _ in runs],
        'peak_host_bytes': max(peak for _, peak in runs),
        'ours_is_faster_by': ratio,
      }
    )
  return rows


def run(config, workdir: epath.Path):
  """Times the work that the config names, or its peers.

  Writes speed.json and speed.md; reads those of earlier runs where peers are
  compared with them.
  """
  validate(config)
  workdir.mkdir(parents=True, exist_ok=True)
  variants = [config.variant.partition(',')[2]]
  summary = {'variant': config.variant}
  if config.work == 'all':
    variants = list(PEERS)
    for variant in [] if config.peers else variants:
      summary[variant] = run_ours(config, variant, workdir / variant)
  elif not config.peers:
    summary |= measure_one(config, workdir)
    if config.growth:
      summary['growth'] = measure_growth(config, variants[0], workdir, summary)
  if config.peers:
    summary['comparison'] = [
      row for variant in variants for row in compare(config, variant, workdir)
    ]
  run_lib.write_json(workdir / 'speed.json', summary)
  text = table(summary)
  (workdir / 'speed.md').write_text(f'# Speed\n\n{text}')
  print(text, flush=True)
  return {'variant': config.variant}


def measure_one(config, workdir) -> dict:
  """One work, then the ceilings, in this process.

  The ceilings' matrices would count as memory of a work that comes after them.
  """
  measure_work = {
    'iteration': measure_iteration,
    'rollout': measure_rollout,
    'sft': measure_sft,
  }[config.work]
  result = measure_work(config, workdir)
  ceilings = measure_ceilings(config)
  result['ceilings'] = ceilings
  result['phases'] = {
    name: phase.row(ceilings) for name, phase in result['phases'].items()
  }
  result['devices'] = [d.device_kind for d in jax.devices()]
  return result


# --- Tables -------------------------------------------------------------------


def table(summary) -> str:
  """The results as Markdown."""
  lines = []
  for name in (*PEERS, ''):
    part = summary if not name else summary.get(name)
    if part and 'phases' in part:
      lines += phase_table(name or summary['variant'], part)
  if 'growth' in summary:
    lines += [
      '',
      '| times | s | times the time | times the work | peak MiB |',
      '|---|---|---|---|---|',
    ]
    lines += [
      f'| {row["growth"]} x{row["factor"]} | {row["seconds"]:.4g} '
      f'| {row["seconds_ratio"]:.2f} | {row["work_ratio"]:.2f} '
      f'| {row["peak_host_bytes"] / 2**20:.0f} |'
      for row in summary['growth']
    ]
  if 'comparison' in summary:
    lines += [
      '',
      '| work | who | figure | unit | peak MiB | ours is faster by |',
      '|---|---|---|---|---|---|',
    ]
    lines += [
      f'| {row["work"]} | {row["who"]} | {row["value"]:.4g} | {row["unit"]} '
      f'| {row["peak_host_bytes"] / 2**20:.0f} '
      f'| {row["ours_is_faster_by"]:.2f} |'
      for row in summary['comparison']
    ]
  return '\n'.join(lines).strip() + '\n'


def phase_table(name, result) -> list[str]:
  """One work as Markdown: facts, then a row for each phase."""
  ceilings, seconds = result['ceilings'], result['seconds']
  facts = [
    f'{result["value"]:.4g} {result["unit"]}',
    f'{seconds["least"]:.4g} to {seconds["most"]:.4g} s in '
    f'{len(seconds["runs"])}, {seconds["disturbed"]} disturbed by others',
    f'matmul peak {ceilings["matmul"] / 1e9:.4g} GFLOP/s',
    f'memory {ceilings["bandwidth"] / 1e9:.4g} GB/s',
    f'{result["programs_compiled"]} programs compiled in '
    f'{result["compile_seconds"]:.3g} s '
    f'({result["programs_from_disk"]} from disk)',
    f'{result["recompilations"]} recompiled',
    f'peak {result["peak_host_bytes"] / 2**20:.0f} MiB on the host',
  ]
  if result['peak_device_bytes'] is not None:
    facts.append(f'{result["peak_device_bytes"] / 2**30:.1f} GiB on a device')
  for key, words in (
    ('host_share', 'waiting for the host'),
    ('padding', 'padding'),
    ('occupancy', 'of the slots busy'),
  ):
    if key in result:
      facts.append(f'{result[key]:.1%} {words}')
  lines = [
    '',
    f'{name}: {"; ".join(facts)}.',
    '',
    '| phase | s | tokens/s | of matmul peak | of bandwidth |',
    '|---|---|---|---|---|',
  ]
  for phase, row in result['phases'].items():
    cells = [
      f'{row["tokens_per_second"]:,.0f}' if row['tokens'] else '',
      f'{row["matmul_share"]:.1%}' if row['flops'] else '',
      f'{row["bandwidth_share"]:.1%}' if row['bytes'] else '',
    ]
    lines.append(f'| {phase} | {row["seconds"]:.4g} | {" | ".join(cells)} |')
  return lines
