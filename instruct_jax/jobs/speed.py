"""Measures how long each part of an iteration takes, and its utilization.

Runs the programs of ppo_ptx.py and sft.py unchanged on random weights and
tokens. Utilization is a share of the matmul and bandwidth ceilings, which the
same process measures. It counts useful work only: real tokens,
log-probabilities of response tokens, and weights read once for a full batch of
slots. Padding, idle slots, recomputation and unused logits lower it.

Phases inside one program are measured by difference. Prefill is a rollout of
one token; decode is a whole rollout minus prefill. Ptx is an update with
pretraining text minus one without. The moving average is timed by itself.
"""

import collections
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator

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
from instruct_jax.models import product_forms, products
from instruct_jax.models.config import TransformerConfig
from instruct_jax.types import PromptBatch, TextBatch

PROCESSES = 'one'

WORKS = ('iteration', 'rollout', 'sft', 'check', 'products')
GROWTHS = ('response', 'batch', 'model')
ROOT = pathlib.Path(__file__).parents[2]

# Work -> the peers' scripts for the same work at size s: name, config key of
# the script's Python, command line. The ragged iteration has no own script:
# peers decode to the full length anyway, so it takes them just as long.
_PPO_PEERS = (
  ('Tunix PPO, one step', 'tunix_python', 'tunix_ppo.py S accum 7'),
  ('Tunix PPO, four steps', 'tunix_python', 'tunix_ppo.py S mini 7'),
  ('TRL PPO', 'trl_python', 'trl_ppo.py S 6'),
)
PEERS = {
  'rollout': (
    ('Tunix', 'tunix_python', 'tunix_bench.py W1 S'),
    ('transformers', 'hf_python', 'hf_bench.py W1 S'),
  ),
  'rollout_ragged': (
    ('Tunix', 'tunix_python', 'tunix_bench.py W1b S'),
    ('transformers', 'hf_python', 'hf_bench.py W1b S'),
  ),
  'sft': (
    ('Tunix', 'tunix_python', 'tunix_bench.py W2 S'),
    ('torch loop', 'hf_python', 'hf_bench.py W2 S'),
    ('TRL SFTTrainer', 'hf_python', 'trl_sft.py S'),
  ),
  'iteration': _PPO_PEERS,
  'iteration_ragged': _PPO_PEERS,
}
TORCH = pathlib.Path(__file__).with_name('speed_torch')  # Run as a program.
PEAKS = ('peak_rss_mib', 'peak_device_mib')  # A peer's; only GPUs report both.


def validate(config):
  """Checks this and the timed stages' configs. ValueError names the key."""
  run_lib.check_choice(config, 'work', (*WORKS, 'all'))
  run_lib.check_choice(config, 'reward', ('model', 'tokens'))
  if config.num_iterations < 5:
    raise ValueError(
      f'num_iterations must be at least 5 to measure the spread: '
      f'{config.num_iterations}'
    )
  if not 0 < config.stop_fraction < 1:
    raise ValueError(f'stop_fraction must be in (0, 1): {config.stop_fraction}')
  run_lib.check_choice({'growth': growths(config)}, 'growth', GROWTHS)
  run_lib.check_choice(
    {'torch_precisions': precisions(config)},
    'torch_precisions',
    ('float32', 'bfloat16'),
  )
  if config.peers and not pathlib.Path(config.peers).is_dir():
    raise ValueError(f"peers: there is no folder '{config.peers}'")
  for name in ('policy', 'scalar'):
    with run_lib.naming('model', name):
      shape_of(config, name)
  for stage, name in ((ppo_ptx, 'ppo'), (sft, 'sft')):
    stage.validate(config[name])
    if config[name].lora.rank:
      raise ValueError(f'{name}.lora.rank must be 0: all weights are trained')


def inputs(config):
  """None: weights are random, and peers' scripts do not count as inputs."""
  del config
  return {}


def precisions(config) -> list[str]:
  """The precisions in which torch does the same work."""
  return [name for name in config.torch_precisions.split(',') if name]


def growths(config) -> list[str]:
  """The dimensions of the work that are scaled up, one at a time."""
  return [name for name in config.growth.split(',') if name]


def shape_of(config, name: str, **changes) -> TransformerConfig:
  """The shape of the 'policy' or the 'scalar' models."""
  return TransformerConfig.from_dict({**config[name].to_dict(), **changes})


# --- Useful work --------------------------------------------------------------


def matmul_weights(shape: TransformerConfig) -> int:
  """Number of matmul weights applied to every token; no embedding."""
  attention = 2 * shape.width * shape.head_dim
  attention *= shape.num_heads + shape.kv_heads
  mlp = (2 + shape.gated_mlp) * shape.width * shape.mlp_dim
  return shape.num_layers * (attention + mlp)


def forward_flops(shape, lengths, num_logits) -> float:
  """FLOPs of one causal forward pass over sequences of `lengths` tokens.

  The pass computes the logits of `num_logits` positions.
  """
  lengths = np.asarray(lengths, np.float64)
  pairs = np.sum(lengths * (lengths + 1) / 2)
  attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * pairs
  logits = 2 * shape.width * shape.vocab_size * num_logits
  return float(2 * matmul_weights(shape) * lengths.sum() + attention + logits)


def decode_work(shape, prompts, responses, num_slots) -> tuple[float, float]:
  """FLOPs and minimum bytes read to decode all but each first token.

  Every step reads the weights once for all slots, and the filled part of the
  cache.
  """
  p, r = np.asarray(prompts, float), np.asarray(responses, float)
  flops = forward_flops(shape, p + r - 1, np.sum(r - 1))
  flops -= forward_flops(shape, p, 0)
  width = jnp.dtype(shape.compute_dtype).itemsize
  entry_width = products.activation_dtype(shape.compute_dtype).itemsize
  weights = matmul_weights(shape) + shape.width * shape.vocab_size
  steps = np.sum(r - 1) / num_slots
  # Step t of a sequence reads p + t entries, t = 1 .. r - 1.
  entries = np.sum((r - 1) * p + (r - 1) * r / 2)
  entry = 2 * shape.num_layers * shape.kv_heads * shape.head_dim
  moved = width * steps * weights + entry_width * entries * entry
  return float(flops), float(moved)


# --- Random work --------------------------------------------------------------


def stop_ids(config) -> tuple[int, ...]:
  """Ids that end a response in the ragged works."""
  num_tokens = config.policy.vocab_size
  ids = np.random.default_rng(7).permutation(np.arange(3, num_tokens))
  return tuple(sorted(ids[: int(config.stop_fraction * num_tokens)].tolist()))


def random_tokens(config, *shape: int) -> np.ndarray:
  """Random token ids, without the special ones."""
  rng = np.random.default_rng(config.seed)
  return rng.integers(3, config.policy.vocab_size, shape).astype(np.int32)


def random_prompts(config, num_batches) -> PromptBatch:
  """Prompts of random tokens, all of the full length."""
  number = num_batches * config.ppo.batch_size
  tokens = random_tokens(config, number, config.ppo.prompt_length)
  mask = np.ones(tokens.shape, bool)
  return PromptBatch(tokens, mask, np.arange(number, dtype=np.int32))


def random_text(config, num_rows, length) -> TextBatch:
  """Rows of random tokens, each row one document."""
  tokens = random_tokens(config, num_rows, length)
  mask = np.ones(tokens.shape, bool)
  loss_mask = mask.copy()
  loss_mask[:, 0] = False
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
    seconds: a median, or a difference of medians.
    tokens: number of tokens read or written.
    flops: useful FLOPs.
    bytes: minimum bytes moved; 0 where arithmetic is the limit.
  """

  seconds: float
  tokens: int | float = 0
  flops: int | float = 0.0
  bytes: int | float = 0.0

  def row(self, ceilings) -> dict:
    """As JSON, with shares of the ceilings."""
    seconds = max(self.seconds, 1e-12)
    return dataclasses.asdict(self) | {
      'tokens_per_second': self.tokens / seconds,
      'matmul_share': self.flops / seconds / ceilings['matmul'],
      'bandwidth_share': self.bytes / seconds / ceilings['bandwidth'],
    }


def measure_ceilings(config) -> dict[str, float]:
  """FLOP/s and bytes/s of all devices: one is measured, times their number."""
  count = len(jax.devices())
  dtype = config.policy.compute_dtype
  return {
    'matmul': count * measure.matmul_peak(dtype, config.matmul_size),
    'bandwidth': count * measure.read_bandwidth(config.bandwidth_bytes),
  }


class Rollouts:
  """A policy, its prompts, and the programs of ppo_ptx.py."""

  def __init__(self, config, mesh):
    self.config, self.mesh, self.stage = config, mesh, config.ppo
    stage = self.stage
    self.root = jax.random.key(config.seed)
    chunk = stage.logprob_chunk
    changes = {'logprob_chunk': chunk} if chunk else {}
    self.shape = shape_of(config, 'policy', **changes)
    self.scalar_shape = shape_of(config, 'scalar')
    self.keys = jax.random.split(self.root, 3)
    policy = model_fns.init('policy', self.shape, mesh, self.keys[0])
    self.module, self.params = policy.module, policy.params
    self.num_params = sum(x.size for x in jax.tree.leaves(self.params))
    self.programs = self.build()
    self.num_slots = stage.num_slots or stage.batch_size
    self.prompts = loader.make_batches(
      random_prompts(config, 4), batch_size=stage.batch_size, seed=config.seed
    )

  def build(self, **changes):
    """The programs, with `changes` to the stage's config."""
    stage = self.stage.copy_and_resolve_references()
    stage.update(changes)
    scalar = model_fns.make_module('scalar', self.scalar_shape)
    ends = (self.shape.vocab_size,)  # Never occurs.
    # 'check' has several episodes in a row, for the attention kernels.
    if self.config.variant.endswith(('_ragged', ',check')):
      ends = stop_ids(self.config)
    return ppo_ptx.build_programs(stage, self.module, scalar, ends)

  def respond(self, params, prompts, number):
    """Samples an iteration's responses."""
    key = jax.random.fold_in(self.root, number)
    return self.programs['respond'](params, prompts, key)

  def sampling(self, lengths) -> dict:
    """How full the slots were, and how long the responses."""
    longest = lengths.reshape(-1, self.num_slots).max(axis=1)
    return {
      'occupancy': float(lengths.sum() / (self.num_slots * longest.sum())),
      'mean_response': float(lengths.mean()),
    }


class Iteration(Rollouts):
  """All models and data of one configuration of ppo_ptx.py."""

  def __init__(self, config, mesh):
    super().__init__(config, mesh)
    stage = self.stage
    value = model_fns.init('scalar', self.scalar_shape, mesh, self.keys[1])
    self.state = rl.initial_state(stage, self.params, value.params)
    models = {'reference': self.params}
    if config.reward == 'model':
      models['reward'] = value.params
    self.frozen = rl.Frozen(stage, models, bases={})
    del self.params  # From here on, use the state's.
    updates = stage.num_minibatches * stage.num_epochs
    self.num_averages = updates if stage.ema_every == 'update' else 1
    self.num_ptx = stage.batch_size * stage.ptx_per_episode * stage.num_epochs
    if stage.ptx_coef > 0:
      self.ptx = loader.make_batches(
        random_text(config, 4 * self.num_ptx, stage.ptx_row_length),
        batch_size=self.num_ptx,
        seed=config.seed,
      )

  def batches(self, number):
    """An iteration's prompts and pretraining rows (or None), on the mesh."""
    prompts = sharding.put_batch(self.prompts[number], self.mesh)
    ptx = None
    if self.stage.ptx_coef > 0:
      ptx = sharding.put_batch(self.ptx[number], self.mesh)
    return prompts, ptx

  def sample(self, prompts, number):
    """Samples an iteration's responses from the state's policy."""
    return self.respond(self.state.policy.params, prompts, number)

  def score(self, sampled, layout):
    """Scores the episodes; returns the update's batch, the KL, and metrics."""
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

  def run(self, number, call=lambda phase, fn, *args: fn(*args)):
    """One iteration as ppo_ptx.py runs it; `call` may time its phases."""
    prompts, ptx = call('host', self.batches, number)
    sampled = call('generate', self.sample, prompts, number)
    layout = call(
      'host', rl.lay_out, self.stage, self.programs, sampled, self.mesh, number
    )
    batch, kl, scored = call('score', self.score, sampled, layout)
    trained = call('update', self.train, self.programs, batch, kl, ptx, number)
    call('host', metrics.to_host, {**scored, **trained})
    return prompts, sampled, layout, batch, kl


def measure_iteration(config, workdir) -> dict:
  """Times whole iterations as a user runs them, then each of their phases."""
  mesh = sharding.make_mesh(config.mesh)
  with sharding.use_mesh(mesh):
    work = Iteration(config, mesh)
    numbers, lengths = itertools.count(), []

    def whole():
      _, sampled, *_ = work.run(next(numbers))
      lengths.append(np.asarray(sampled.response_mask).sum(axis=1))

    times, counts = timed(config, whole)
    found = {
      'unit': 's/iteration',
      'seconds': times.summary(),
      'value': times.median,
      'num_params': work.num_params,
      **counts,
    }
    save(config, workdir, found, ['phases'])
    run_lib.say(f'{config.name}: {times.median:.4g} s/iteration')
    seconds, last = phase_seconds(config, work)
    host_share = seconds['host'] / sum(seconds.values())
    seconds |= inner_seconds(config, work, last, seconds['update'])
    saved = config.saves and measure_checkpoint(work.state, workdir)
  lengths = np.concatenate(lengths[config.num_warmups :])
  phases = phases_of(config, work, seconds, lengths)
  if saved:
    phases['checkpoint'] = Phase(saved[0])
  _, sampled, layout, *_ = last
  return found | {
    'tokens_per_second': lengths.sum() / config.num_iterations / times.median,
    'phases': phases,
    'host_share': host_share,
    'checkpoint_written_seconds': saved[1] if saved else None,
    'padding': 1 - packing.fill_fraction(layout),
    'padding_without_packing': float(1 - np.mean(np.asarray(sampled.mask))),
    **work.sampling(lengths),
  }


def phase_seconds(config, work) -> tuple[dict[str, float], tuple]:
  """Median seconds of each phase, with the host blocking after each call.

  Also returns the results of the last iteration, for `inner_seconds`.
  """
  watch = measure.Stopwatch()
  laps = [collections.Counter() for _ in range(config.num_iterations)]
  for number, seconds in enumerate(laps):

    def call(phase, fn, *args, seconds=seconds):
      result = jax.block_until_ready(fn(*args))
      seconds[phase] += watch.lap()[0]
      return result

    watch.lap()
    last = work.run(number, call)
  return {x: statistics.median(row[x] for row in laps) for x in laps[0]}, last


def inner_seconds(config, work, last, update) -> dict[str, float]:
  """Seconds of the 'prefill', an update 'without_ptx', and the 'ema'.

  `last` is from `phase_seconds`; `update` is the seconds of a whole update.
  """
  repeat = functools.partial(measure.repeat, num_repeats=config.num_iterations)
  prompts, _, _, batch, kl = last
  short = work.build(response_length=1)['respond']
  prefill = repeat(lambda: short(work.state.policy.params, prompts, work.root))
  without_ptx = update
  if work.stage.ptx_coef > 0:
    plain = work.build(ptx_coef=0.0)
    without_ptx = repeat(lambda: work.train(plain, batch, kl, None, 0)).median
  average = jax.jit(
    functools.partial(train_state.ema_update, decay=work.stage.ema_decay),
    donate_argnums=0,
  )
  ema = jax.tree.map(jnp.copy, work.state.ema)

  def move():
    nonlocal ema
    ema = average(ema, work.state.policy.params)
    return ema

  moved = work.num_averages * repeat(move).median
  return {'prefill': prefill.median, 'without_ptx': without_ptx, 'ema': moved}


def phases_of(config, work, seconds, lengths) -> dict[str, Phase]:
  """Phase -> its seconds and useful work in one iteration.

  `seconds` are from `phase_seconds` and `inner_seconds`; `lengths` are those of
  the responses of all timed iterations.
  """
  stage, count = work.stage, config.num_iterations
  prompts = np.full(len(lengths), stage.prompt_length)
  real = prompts + lengths
  tokens = real.sum() / count
  prefill_flops = forward_flops(work.shape, prompts, len(lengths)) / count
  decode_flops, decode_bytes = decode_work(
    work.shape, prompts, lengths, work.num_slots
  )
  read_policy = forward_flops(work.shape, real, lengths.sum()) / count
  read_scalar = forward_flops(work.scalar_shape, real, 0) / count
  # With a tolerance, assumes the sampler's log-probabilities are reused.
  score_flops = read_policy * (1 + (stage.sampler_tolerance == 0))
  score_flops += read_scalar * (1 + (config.reward == 'model'))
  epochs = stage.num_epochs
  found = {
    'prefill': Phase(
      seconds['prefill'], stage.batch_size * stage.prompt_length, prefill_flops
    ),
    'decode': Phase(
      seconds['generate'] - seconds['prefill'],
      lengths.sum() / count - stage.batch_size,
      decode_flops / count,
      decode_bytes / count,
    ),
    'score': Phase(seconds['score'], tokens, score_flops),
    'update': Phase(
      seconds['without_ptx'] - seconds['ema'],
      epochs * tokens,
      3 * epochs * (read_policy + read_scalar),
    ),
    'ptx': Phase(seconds['update'] - seconds['without_ptx']),
    # Reads the average and the weights, and writes the average.
    'ema': Phase(
      seconds['ema'], bytes=work.num_averages * 12 * work.num_params
    ),
    'host': Phase(seconds['host']),
  }
  if stage.ptx_coef > 0:
    rows = np.full(work.num_ptx, stage.ptx_row_length)
    found['ptx'].tokens = float(rows.sum())
    found['ptx'].flops = 3 * forward_flops(work.shape, rows, rows.sum())
  return found


def measure_checkpoint(state, workdir) -> tuple[float, float]:
  """Seconds until training can continue, and until the files are complete."""
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
  """Times sampling alone, without other models; counts tokens to the stop."""
  del workdir
  mesh = sharding.make_mesh(config.mesh)
  with sharding.use_mesh(mesh):
    work = Rollouts(config, mesh)
    numbers, lengths = itertools.count(), []
    prompts = sharding.put_batch(work.prompts[0], mesh)

    def sample():
      sampled = jax.block_until_ready(
        work.respond(work.params, prompts, next(numbers))
      )
      lengths.append(np.asarray(sampled.response_mask).sum(axis=1))

    times, counts = timed(config, sample)
  lengths = np.stack(lengths[config.num_warmups :])
  prompt_lengths = np.full(lengths.size, config.ppo.prompt_length)
  flops, moved = decode_work(
    work.shape, prompt_lengths, lengths.ravel(), work.num_slots
  )
  flops += forward_flops(work.shape, prompt_lengths, lengths.size)
  count = config.num_iterations
  rates = lengths.sum(axis=1) / np.asarray(times.seconds)
  return {
    'unit': 'tokens/s',
    'value': float(np.median(rates)),
    'seconds': times.summary(),
    'phases': {
      'rollout': Phase(
        times.median, lengths.sum() / count, flops / count, moved / count
      )
    },
    **work.sampling(lengths),
    **counts,
  }


def measure_sft(config, workdir) -> dict:
  """Times one supervised step on full rows."""
  del workdir
  stage = config.sft
  mesh = sharding.make_mesh(config.mesh)
  with sharding.use_mesh(mesh):
    shape = shape_of(config, 'policy')
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

    times, counts = timed(config, step)
  rows = np.full(stage.batch_size, stage.row_length)
  flops = 3 * forward_flops(shape, rows, rows.sum())
  return {
    'unit': 'tokens/s',
    'value': float(rows.sum() / times.median),
    'seconds': times.summary(),
    'phases': {'step': Phase(times.median, float(rows.sum()), flops)},
    **counts,
  }


def measure_products(config) -> list[dict]:
  """FLOP/s of each form of matrix product that 'sft' and 'rollout' need.

  Measured in 'float32', and in bfloat16 as 'written' (einsum) and as the
  'model' computes it.
  """
  forms = product_forms.forms_of(
    shape_of(config, 'policy'),
    config.sft.batch_size,
    config.sft.row_length,
    config.ppo.num_slots or config.ppo.batch_size,
  )
  ways = {
    'float32': (product_forms.as_model, 'float32'),
    'written': (product_forms.as_einsum, 'bfloat16'),
    'model': (product_forms.as_model, 'bfloat16'),
  }

  def rate(form, fn, dtype):
    call, number = product_forms.program(form, fn, dtype)
    times = measure.repeat(call, config.num_iterations, config.num_warmups)
    return number * form.flops / min(times.seconds)

  return [
    {'name': form.name, 'flops': form.flops}
    | {name: rate(form, *way) for name, way in ways.items()}
    for form in forms
  ]


# --- The device against the CPU -----------------------------------------------

# Compute dtype -> largest allowed differences between device and CPU.
# 'logprobs' and 'sampler': mean absolute difference of log-probabilities, in
# nats per token, in the training graph and in the sampler (before its first
# different token). 'flips': responses that get a different token, by tokens
# sampled up to there; with random weights all are almost equally probable, so
# rounding changes some. 'metrics': relative, of scores, losses and gradient
# norms. 'changes': of the parameters, relative to their change in training.
TOLERANCES = {
  'float32': {
    'flips': 0.005,
    'logprobs': 1e-4,
    'sampler': 1e-4,
    'metrics': 0.01,
    'changes': 0.1,
  },
  'bfloat16': {
    'flips': 0.25,
    'logprobs': 0.05,
    'sampler': 0.05,
    'metrics': 0.1,
    'changes': 0.5,
  },
}
_COMPARED = (
  *('objective/score', 'ppo/loss/policy', 'ppo/loss/value'),
  *('policy/optimizer/gradient_norm', 'value/optimizer/gradient_norm'),
)
NUM_STEPS = 3  # Number of compared PPO iterations.


def check_device(config, dtype: str) -> dict[str, float]:
  """Compares `NUM_STEPS` PPO iterations on the first device and on the CPU.

  Both train on the CPU's samples, and their models start from the same key.

  Returns:
    The differences, by the keys of `TOLERANCES`; 'flips' and 'sampler' are of
    the first rollout.
  """
  config = config.copy_and_resolve_references()
  with config.unlocked():
    for name in ('policy', 'scalar'):
      config[name].compute_dtype = dtype
      config[name].attention = 'auto'
    # Both train on the CPU's samples, so each must recompute log-probabilities.
    config.ppo.sampler_tolerance = 0.0
  works, samples, found = {}, {}, collections.defaultdict(list)
  precision = 'highest' if dtype == 'float32' else None
  devices = {'cpu': jax.devices('cpu')[0], 'device': jax.devices()[0]}
  with jax.default_matmul_precision(precision):
    for name, device in devices.items():
      mesh = sharding.make_mesh((1, 1, 1), [device])
      with sharding.use_mesh(mesh):
        works[name] = Iteration(config, mesh)
    start = jax.device_get(works['cpu'].state.policy.params)
    for number in range(NUM_STEPS):
      for name, work in works.items():
        with sharding.use_mesh(work.mesh):
          prompts, ptx = work.batches(number)
          sampled = jax.device_get(work.sample(prompts, number))
          samples[name, number] = sampled
          sampled = sharding.put_batch(samples['cpu', number], work.mesh)
          layout = rl.lay_out(
            work.stage, work.programs, sampled, work.mesh, number
          )
          batch, kl, scored = work.score(sampled, layout)
          trained = work.train(work.programs, batch, kl, ptx, number)
          values = metrics.to_host({**scored, **trained})
          found[name].append([values[key] for key in _COMPARED])
          found[name, 'logprobs'] = jax.device_get(batch.old_logprobs)
  ours, theirs = (np.asarray(found[name]) for name in devices)
  last = samples['cpu', NUM_STEPS - 1].response_mask
  gap = np.abs(found['cpu', 'logprobs'] - found['device', 'logprobs'])
  after = [jax.device_get(work.state.policy.params) for work in works.values()]
  return {
    **_samples_differ(*(samples[name, 0] for name in devices)),
    'logprobs': float(gap.sum() / last.sum()),
    'metrics': float(
      np.max(np.abs(ours - theirs) / np.maximum(np.abs(ours), 0.01))
    ),
    'changes': _distance(after[0], after[1]) / _distance(after[0], start),
  }


def _samples_differ(first, second) -> dict[str, float]:
  """'flips' and 'sampler' of two rollouts, see `TOLERANCES`."""
  mask = first.response_mask
  equal = (first.tokens == second.tokens)[:, -mask.shape[1] :] & mask
  until = equal & (np.cumsum(mask & ~equal, axis=1) == 0)
  gap = np.abs(first.logprobs - second.logprobs)[until]
  # A response stays different after its first different token.
  flips = int((mask & ~equal).any(axis=1).sum())
  return {
    'flips': flips / (int(until.sum()) + flips),
    'sampler': float(gap.mean()) if gap.size else np.inf,
  }


def _distance(first, second) -> float:
  """The Euclidean norm of the difference between two trees."""
  squares = jax.tree.map(
    lambda x, y: float(((x - y) ** 2).sum()), first, second
  )
  return sum(jax.tree.leaves(squares)) ** 0.5


def measure_check(config, workdir) -> dict:
  """Runs `check_device` in both dtypes.

  Raises:
    RuntimeError: something differs by more than `TOLERANCES`.
  """
  del workdir
  found, wrong = {}, []
  for dtype, most in TOLERANCES.items():
    found[dtype] = check_device(config, dtype)
    text = ', '.join(f'{key} {x:.3g}' for key, x in found[dtype].items())
    run_lib.say(f'{config.name}: {dtype}: {text}')
    wrong += [
      f'{dtype}: {key} differ by {found[dtype][key]:.3g}, at most {limit}'
      for key, limit in most.items()
      if not found[dtype][key] <= limit
    ]
  kind = jax.devices()[0].device_kind
  if wrong:
    raise RuntimeError(f'{kind} does not agree with the CPU: {wrong}')
  return {'differences': found, 'devices': [kind]}


# --- Repeats ------------------------------------------------------------------


def timed(config, fn) -> tuple[measure.Repeats, dict]:
  """Times repeats of `fn`; also returns compilations and peak memory."""
  before = measure.compilations()
  for _ in range(config.num_warmups):
    jax.block_until_ready(fn())
  between = measure.compilations()
  times = measure.repeat(fn, config.num_iterations, 0)
  compiled = between - before
  return times, {
    'compile_seconds': compiled.seconds,
    'programs_compiled': compiled.programs,
    'programs_from_disk': compiled.from_disk,
    'recompilations': (measure.compilations() - between).programs,
    'peak_host_bytes': measure.peak_host_bytes(),
    'peak_device_bytes': measure.peak_device_bytes(),
  }


# --- Other processes ----------------------------------------------------------

# Keys that a child gets from its variant, or that only the parent uses.
_NOT_PASSED = {
  *('name', 'experiment', 'workdir', 'default_workdir', 'variant', 'work'),
  *('growth', 'peers', 'hf_python', 'trl_python', 'tunix_python'),
  *('num_rounds', 'torch_precisions', 'platforms'),
}


def command_of(config, variant, workdir) -> list[str]:
  """The main.py command that runs this config in a separate process."""
  size = config.variant.partition(',')[0]
  file = ROOT / 'configs' / 'speed.py'
  return [
    *(sys.executable, '-m', 'instruct_jax.main'),
    f'--config={file}:{size},{variant}',
    f'--workdir={workdir}',
    *(
      f'--config.{key}={value}'
      for key, value in run_lib.flat(config.to_dict()).items()
      if value not in (None, {}) and _NOT_PASSED.isdisjoint(key.split('.'))
    ),
  ]


def run_process(command, log, config, environment=None, folder=ROOT) -> None:
  """Runs a command on the first `config.cores` cores.

  Raises:
    RuntimeError: the command failed; gives the end of its output.
  """
  can_pin = config.cores and hasattr(os, 'sched_setaffinity')
  allowed = os.sched_getaffinity(0) if can_pin else None
  if can_pin:  # The child inherits it; this thread restores its own below.
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
  """Measures one work in a separate process; returns its results."""
  config = config.copy_and_resolve_references()
  config.unlock()
  config.update_from_flattened_dict(changes or {})
  workdir.mkdir(parents=True, exist_ok=True)
  names = {'JAX_PLATFORMS': config.platforms} if config.platforms else {}
  command = command_of(config, variant, workdir)
  run_process(command, workdir / 'log.txt', config, names)
  return run_lib.read_json(workdir / 'speed.json')


def spec_of(config, variant, precision) -> dict:
  """The specification of a work for `speed_torch`."""
  names = 'vocab_size context_length num_layers width num_heads num_kv_heads'
  names += ' head_dim mlp_dim'
  return {
    'work': variant.removesuffix('_ragged'),
    'precision': precision,
    'num_threads': num_threads(config),
    'num_warmups': config.num_warmups,
    'num_repeats': config.num_iterations,
    'prompt_length': config.ppo.prompt_length,
    'response_length': config.ppo.response_length,
    'batch_size': config.ppo.batch_size,
    'num_minibatches': config.ppo.num_minibatches,
    'num_microbatches': config.ppo.num_microbatches,
    'sft_rows': config.sft.batch_size,
    'sft_length': config.sft.row_length,
    'stop_ids': stop_ids(config) if variant.endswith('_ragged') else (),
    **{name: config.policy[name] for name in names.split()},
  }


def num_threads(config) -> int:
  """The number of threads of a peer's process."""
  return config.cores or os.cpu_count() or 1


def commands_of(config, variant, folder):
  """Yields (name, Python, command line) of each peer to compare with ours."""
  if config.peers and config.variant.startswith('s,'):
    for name, key, command in PEERS[variant]:
      if config[key]:
        yield name, config[key], command
  if config.hf_python:
    for precision in precisions(config):
      path = folder / f'torch_{variant}_{precision}.json'
      run_lib.write_json(path, spec_of(config, variant, precision))
      yield f'torch, {precision}', config.hf_python, f'{TORCH} {path}'


def run_peer(config, python, command, log) -> dict:
  """Runs a peer's script; returns the result on its last RESULT line."""
  threads = str(num_threads(config))
  environment = {
    'OMP_NUM_THREADS': threads,
    'MKL_NUM_THREADS': threads,
    'OPENBLAS_NUM_THREADS': threads,
    'JAX_PLATFORMS': 'cpu',
    'HF_HUB_OFFLINE': '1',
    'TOKENIZERS_PARALLELISM': 'false',
    'XLA_FLAGS': '',
  }
  run_process(
    [python, *command.split()],
    log,
    config,
    environment,
    config.peers or ROOT,
  )
  lines = [x for x in log.read_text().splitlines() if x.startswith('RESULT ')]
  if not lines:
    raise RuntimeError(f'{command} printed no result ({log})')
  return json.loads(lines[-1].removeprefix('RESULT '))


# --- Growth and comparison ----------------------------------------------------


def grown(config, kind, factor) -> dict:
  """Config changes that make a work `factor` times as large."""
  if kind == 'response':
    return {'ppo.response_length': factor * config.ppo.response_length}
  if kind == 'batch':
    return {
      f'{stage}.batch_size': factor * config[stage].batch_size
      for stage in ('ppo', 'sft')
    }
  # Doubling the width quadruples the weights; doubling the depth doubles them.
  names = ['num_heads', 'width', 'mlp_dim'] if factor == 4 else ['num_layers']
  return {
    f'{model}.{name}': 2 * config[model][name]
    for model in ('policy', 'scalar')
    for name in names
  }


def measure_growth(config, variant, workdir, base) -> list[dict]:
  """Seconds of each larger work; its time and FLOPs relative to `base`."""

  def flops(result):
    return sum(phase['flops'] for phase in result['phases'].values())

  rows = []
  for kind, factor in itertools.product(growths(config), (2, 4)):
    folder = workdir / f'{kind}_{factor}'
    result = run_ours(config, variant, folder, grown(config, kind, factor))
    seconds = result['seconds']['median']
    rows.append(
      {
        'growth': kind,
        'factor': factor,
        'seconds': seconds,
        'seconds_ratio': seconds / base['seconds']['median'],
        'work_ratio': flops(result) / flops(base),
        'phases': {
          name: phase['seconds'] for name, phase in result['phases'].items()
        },
        'peak_host_bytes': result['peak_host_bytes'],
      }
    )
  return rows


def compare(config, variant, workdir) -> Iterator[list[dict]]:
  """Runs ours and the peers' in turn; yields the table's rows at each end."""
  # Who -> (value, peak bytes on the host, on a device or 0) of each run.
  found = collections.defaultdict(list)
  for turn in range(1, config.num_rounds + 1):
    ours = run_ours(config, variant, workdir / f'ours_{variant}_{turn}')
    on_device = ours['peak_device_bytes'] or 0
    found['ours'].append((ours['value'], ours['peak_host_bytes'], on_device))
    commands = commands_of(config, variant, workdir)
    for number, (name, python, command) in enumerate(commands):
      log = workdir / f'peer_{variant}_{number}_{turn}.txt'
      try:
        result = run_peer(config, python, command, log)
      except RuntimeError as error:
        print(f'{config.name}: {name}: {error}', flush=True)
        continue
      peaks = (result[key] * 2**20 for key in PEAKS if key in result)
      found[name].append((result['median'], next(peaks), next(peaks, 0)))
    yield compared(variant, ours['unit'], found)


def compared(variant, unit, found) -> list[dict]:
  """A row for each of `found`: who -> (value, host, device bytes) of runs."""
  own = statistics.median(value for value, *_ in found['ours'])
  rows = []
  for name, runs in found.items():
    values, peaks, on_device = zip(*runs, strict=True)
    value = statistics.median(values)
    rows.append(
      {
        'work': variant,
        'who': name,
        'unit': unit,
        'value': value,
        'runs': values,
        'peak_host_bytes': max(peaks),
        'peak_device_bytes': max(on_device),
        'ours_is_faster_by': own / value if unit == 'tokens/s' else value / own,
      }
    )
  return rows


def save(config, workdir, found, unfinished=()) -> str:
  """Writes speed.json and speed.md; returns the table.

  Also what has been found so far: a time limit may end the process before the
  `unfinished` works or parts.
  """
  summary = {
    'variant': config.variant,
    'compute_dtype': config.policy.compute_dtype,
    'processor': measure.processor(),
    **found,
  }
  if unfinished:
    summary['unfinished'] = list(unfinished)
  run_lib.write_json(workdir / 'speed.json', summary)
  text = table(summary)
  (workdir / 'speed.md').write_text(f'# Speed\n\n{text}')
  return text


def run(config, workdir: epath.Path):
  """Times the work that the config names, or compares it with the peers.

  Writes speed.json and speed.md.
  """
  validate(config)
  workdir.mkdir(parents=True, exist_ok=True)
  variants = [config.variant.partition(',')[2]]
  if config.work == 'all':
    variants = list(PEERS)
  if config.peers or config.hf_python:
    rows = []
    for number, variant in enumerate(variants, 1):
      new = []
      for new in compare(config, variant, workdir):
        left = variants[number - 1 :]
        save(config, workdir, {'comparison': rows + new}, left)
      rows += new
      save(config, workdir, {'comparison': rows}, variants[number:])
    found = {'comparison': rows}
  elif config.work == 'all':
    found = {}
    for number, variant in enumerate(variants, 1):
      found[variant] = run_ours(config, variant, workdir / variant)
      save(config, workdir, found, variants[number:])
  else:
    found = measure_one(config, workdir)
    if config.growth:
      save(config, workdir, found, growths(config))
      found['growth'] = measure_growth(config, variants[0], workdir, found)
  print(save(config, workdir, found), flush=True)
  return {'variant': config.variant}


def measure_one(config, workdir) -> dict:
  """Measures one work, then the ceilings, in this process.

  The ceilings come last, so that their matrices do not count towards the work's
  peak memory.
  """
  if config.work == 'check':
    return measure_check(config, workdir)
  if config.work == 'products':
    return {'products': measure_products(config)}
  measure_work = {
    'iteration': measure_iteration,
    'rollout': measure_rollout,
    'sft': measure_sft,
  }[config.work]
  result = measure_work(config, workdir)
  ceilings = measure_ceilings(config)
  return result | {
    'ceilings': ceilings,
    'phases': {
      name: phase.row(ceilings) for name, phase in result['phases'].items()
    },
    'devices': [d.device_kind for d in jax.devices()],
  }


# --- Tables -------------------------------------------------------------------


def table(summary) -> str:
  """The results as Markdown."""
  machine = [*sorted(set(summary.get('devices', ()))), summary['processor']]
  lines = [
    f'{summary["variant"]} in {summary["compute_dtype"]}, on '
    f'{", ".join(machine)}'
  ]
  if 'unfinished' in summary:
    lines += ['', f'Not finished: {", ".join(summary["unfinished"])}.']
    if 'value' in summary:
      lines.append(f'So far {summary["value"]:.4g} {summary["unit"]}.')
  for name in (*PEERS, ''):
    part = summary.get(name) if name else summary
    if part and 'phases' in part:
      lines += phase_table(name or summary['variant'], part)
  if 'products' in summary:
    lines += _head(
      *('product', 'GFLOP', 'float32, GFLOP/s', 'bfloat16', 'so in the models')
    )
    for row in summary['products']:
      rates = (row[way] / 1e9 for way in ('float32', 'written', 'model'))
      cells = (f'{x:.3g}' for x in (row['flops'] / 1e9, *rates))
      lines.append(f'| {row["name"]} | {" | ".join(cells)} |')
  if 'growth' in summary:
    lines += _head('times', 's', 'times the time', 'times the work', 'peak MiB')
    lines += [
      f'| {row["growth"]} x{row["factor"]} | {row["seconds"]:.4g} '
      f'| {row["seconds_ratio"]:.2f} | {row["work_ratio"]:.2f} '
      f'| {row["peak_host_bytes"] / 2**20:.0f} |'
      for row in summary['growth']
    ]
  if 'comparison' in summary:
    lines += _head(
      *('work', 'who', 'figure', 'unit', 'peak MiB', 'on a device'),
      'ours is faster by',
    )
    lines += [
      f'| {row["work"]} | {row["who"]} | {row["value"]:.4g} | {row["unit"]} '
      f'| {row["peak_host_bytes"] / 2**20:.0f} '
      f'| {row["peak_device_bytes"] / 2**20:.0f} '
      f'| {row["ours_is_faster_by"]:.2f} |'
      for row in summary['comparison']
    ]
  return '\n'.join(lines).strip() + '\n'


def _head(*titles) -> list[str]:
  return ['', f'| {" | ".join(titles)} |', '|---' * len(titles) + '|']


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
    *_head('phase', 's', 'tokens/s', 'of matmul peak', 'of bandwidth'),
  ]
  for phase, row in result['phases'].items():
    cells = [
      f'{row["tokens_per_second"]:,.0f}' if row['tokens'] else '',
      f'{row["matmul_share"]:.1%}' if row['flops'] else '',
      f'{row["bandwidth_share"]:.1%}' if row['bytes'] else '',
    ]
    lines.append(f'| {phase} | {row["seconds"]:.4g} | {" | ".join(cells)} |')
  return lines
