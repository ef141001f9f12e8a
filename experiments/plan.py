"""What a run would need on chips one does not have yet.

Compiles the programs of the other experiments, as they stand, ahead of time
for a described TPU topology: memory, arithmetic, traffic, and the least time
that the chip's published figures allow. What does not fit is compiled again
in smaller slices and microbatches, with another mesh and another remat; of
what fits, the fastest is the plan. Every attempt is kept in `tried.json`, and
a plan that was cut goes on from there.

Needs `pip install -r requirements-plan.txt`; a TPU it needs not.
"""

import collections
import dataclasses
import functools
import math
import operator
import os
import re
import time

import jax
import jax.numpy as jnp
from etils import epath

from experiments import ppo_ptx, reward, sft
from instruct_jax import artifacts, ppo, rewards
from instruct_jax.infra import programs as programs_lib
from instruct_jax.infra import run as run_lib
from instruct_jax.infra import sharding
from instruct_jax.models.config import TransformerConfig
from instruct_jax.types import (
  PackedComparisons,
  PPOBatch,
  PromptBatch,
  Rollout,
  TextBatch,
)

EPISODES = ('generate', 'score', 'update')
# Programs that run with the same models in memory, on one mesh.
STAGES = (('sft',), ('reward',), EPISODES)
SLICED = ('generate', 'score')

Tokenizer = collections.namedtuple('Tokenizer', ['stop_ids'])


def validate(config):
  if config.chip not in programs_lib.CHIPS:
    raise ValueError(
      f'chip must be one of {sorted(programs_lib.CHIPS)}: {config.chip!r}'
    )
  known = [name for names in STAGES for name in names]
  unknown = sorted(set(config.programs) - set(known))
  if unknown:
    raise ValueError(f'unknown programs {unknown}; known: {known}')
  if not config.meshes:
    raise ValueError('meshes is empty: there is nothing to try')


def topology_devices(config):
  """The chips of `config.topology`, described by libtpu.

  Raises:
    RuntimeError: libtpu cannot be imported.
  """
  # Otherwise libtpu asks the metadata server of a cloud machine who it is.
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  os.environ['TPU_WORKER_HOSTNAMES'] = 'localhost'
  # No chip is held, so that two plans may be made at a time.
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  from jax.experimental import topologies

  options = {}
  if config.megacore:
    options['chip_config_name'] = 'megacore'
  try:
    return topologies.get_topology_desc(
      platform='tpu', topology_name=config.topology, **options
    ).devices
  except (RuntimeError, ImportError) as error:
    raise RuntimeError(
      f'no topology {config.topology!r}: {error}. Planning for TPUs needs '
      '`pip install -r requirements-plan.txt` (and no TPU).'
    ) from error


def models(config, remat):
  """Shapes of policy and of reward and value model."""

  def shape(values):
    values = {**values.to_dict(), 'remat': remat}
    return TransformerConfig.from_dict(values)

  return shape(config.policy), shape(config.scalar)


def rows_of(mesh, batch_type, **shapes):
  """A batch of described arrays, rows cut over the mesh."""
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  arrays = {}
  for name, (dtype, *shape) in shapes.items():
    if shape[0] % parts:
      raise ValueError(f'{shape[0]} rows do not divide over {parts} shards')
    arrays[name] = jax.ShapeDtypeStruct(
      tuple(shape), dtype, sharding=sharding.batch_sharding(mesh)
    )
  return batch_type(**arrays)


def text_rows(mesh, num_rows, length):
  shape = (num_rows, length)
  return rows_of(
    mesh,
    TextBatch,
    tokens=(jnp.int32, *shape),
    mask=(bool, *shape),
    loss_mask=(bool, *shape),
    segments=(jnp.int32, *shape),
  )


def as_dtype(tree, dtype):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), tree
  )


def scalar_on(mesh):
  return jax.ShapeDtypeStruct(
    (), jnp.float32, sharding=sharding.replicated(mesh)
  )


def described_key():
  return jax.eval_shape(lambda: jax.random.key(0))


def sft_program(config, mesh, remat, parts):
  stage = config.sft.copy_and_resolve_references()
  stage.num_microbatches = parts
  sft.validate(stage)
  shape, _ = models(config, remat)
  shape = dataclasses.replace(
    shape, dropout=stage.dropout, logprob_chunk=stage.logprob_chunk
  )
  built = sft.build_programs(stage, artifacts.make_module('policy', shape), 100)
  state = artifacts.abstract_state('policy', shape, mesh, built['optimizer'])
  batch = text_rows(mesh, stage.batch_size, stage.row_length)
  resident = {'parameters': state.params, 'optimizer': state.opt_state}
  return built['update'], (state, batch, described_key()), resident


def reward_program(config, mesh, remat, parts):
  stage = config.reward.copy_and_resolve_references()
  stage.num_microbatches = parts
  reward.validate(stage)
  _, shape = models(config, remat)
  built = reward.build_programs(
    stage, artifacts.make_module('scalar', shape), 100
  )
  state = artifacts.abstract_state('scalar', shape, mesh, built['optimizer'])
  # Each microbatch is packed by itself, into rows that the mesh divides.
  shards = parts * mesh.shape['data'] * mesh.shape['fsdp']
  num_rows = -(-config.num_reward_rows // shards) * shards
  rows, candidates = stage.batch_size, stage.max_candidates
  batch = rows_of(
    mesh,
    PackedComparisons,
    tokens=(jnp.int32, num_rows, stage.row_length),
    segments=(jnp.int32, num_rows, stage.row_length),
    ends=(jnp.int32, rows, candidates),
    ranks=(jnp.int32, rows, candidates),
    prompt_mask=(bool, rows),
  )
  resident = {'parameters': state.params, 'optimizer': state.opt_state}
  return built['update'], (state, batch, described_key()), resident


def ppo_program(name, config, mesh, remat, parts):
  stage = config.ppo.copy_and_resolve_references()
  if name == 'update':
    stage.num_microbatches = parts
  else:
    stage.num_slices = parts
  ppo_ptx.validate(stage)
  policy_shape, scalar_shape = models(config, remat)
  policy_shape = dataclasses.replace(
    policy_shape, logprob_chunk=stage.logprob_chunk
  )
  built = ppo_ptx.build_programs(
    stage,
    artifacts.make_module('policy', policy_shape),
    artifacts.make_module('scalar', scalar_shape),
    Tokenizer(stop_ids=(1,)),
  )
  policy = artifacts.abstract_state(
    'policy', policy_shape, mesh, built['policy_optimizer']
  )
  value = artifacts.abstract_state(
    'scalar', scalar_shape, mesh, built['value_optimizer']
  )
  kl = rewards.KLState(coef=scalar_on(mesh))
  state = ppo.PPOState(policy=policy, value=value, ema=policy.params, kl=kl)
  frozen = jnp.dtype(stage.frozen_dtype)
  reference = as_dtype(policy.params, frozen)
  reward_model = as_dtype(value.params, frozen)
  B, P, R = stage.batch_size, stage.prompt_length, stage.response_length
  T = P + R
  resident = {
    'parameters': (policy.params, value.params),
    'optimizer': (policy.opt_state, value.opt_state),
    'ema': state.ema,
    'reference': reference,
    'reward': reward_model,
  }
  needs = {'score': ('reference', 'reward'), 'update': ('ema',)}
  for away in set(stage.offload) - set(needs.get(name, ())):
    del resident[away]  # It waits on the host.
  if name == 'generate':
    prompts = rows_of(
      mesh,
      PromptBatch,
      tokens=(jnp.int32, B, P),
      mask=(bool, B, P),
      indices=(jnp.int32, B),
    )
    return built[name], (policy.params, prompts, described_key()), resident
  if name == 'score':
    sampled = rows_of(
      mesh,
      Rollout,
      tokens=(jnp.int32, B, T),
      mask=(bool, B, T),
      response_mask=(bool, B, R),
      logprobs=(jnp.float32, B, R),
      ended=(bool, B),
    )
    models_read = (policy.params, reference, value.params, reward_model)
    return built[name], (*models_read, kl, sampled), resident
  batch = rows_of(
    mesh,
    PPOBatch,
    tokens=(jnp.int32, B, T),
    mask=(bool, B, T),
    response_mask=(bool, B, R),
    old_logprobs=(jnp.float32, B, R),
    old_values=(jnp.float32, B, R),
    advantages=(jnp.float32, B, R),
    returns=(jnp.float32, B, R),
  )
  ptx = None
  if stage.ptx_coef > 0:
    num_ptx = B * stage.ptx_per_episode * stage.num_epochs
    ptx = text_rows(mesh, num_ptx, stage.ptx_row_length)
  arguments = (state, batch, ptx, described_key(), scalar_on(mesh))
  return built[name], arguments, resident


def build(name, config, mesh, remat, parts):
  """A jitted program, its described arguments, and what lies beside it."""
  if name == 'sft':
    return sft_program(config, mesh, remat, parts)
  if name == 'reward':
    return reward_program(config, mesh, remat, parts)
  return ppo_program(name, config, mesh, remat, parts)


def largest_parts(name, config, mesh) -> int:
  """Microbatches or slices at most: one row in each, on every shard."""
  if name == 'reward':
    return config.reward.batch_size  # Packed into as many rows as it takes.
  rows = config.sft.batch_size
  if name in EPISODES:
    rows = config.ppo.batch_size
  if name == 'update':
    rows //= config.ppo.num_minibatches
  return max(1, rows // (mesh.shape['data'] * mesh.shape['fsdp']))


def measure(name, config, mesh, remat, parts, too_slow=math.inf):
  """Compiles one program; everything known about it, bytes and seconds.

  Not compiled is what cannot win: models that alone are larger than the
  memory, and arithmetic that alone takes `too_slow` seconds.
  """
  chip = programs_lib.CHIPS[config.chip]
  program, arguments, resident = build(name, config, mesh, remat, parts)
  row = {
    'program': name,
    'mesh': list(mesh.shape.values()),
    'remat': remat,
    'parts': parts,
    'resident': {
      kind: programs_lib.bytes_per_chip(tree) for kind, tree in resident.items()
    },
  }
  kept = sum(row['resident'].values())
  row['cache'] = cache_bytes(config, mesh, parts) if name == 'generate' else 0.0
  if kept + row['cache'] > chip.memory:
    needed = kept + row['cache']
    return row | {'needed': needed, 'missing': needed - chip.memory}
  # Sampling reads the prompts, then runs one loop step a token.
  phases = {name: 1}
  if name == 'generate':
    phases = {'prefill': 0, 'decode': config.ppo.response_length - 1}
  begin = time.monotonic()
  with sharding.use_mesh(mesh):
    traced = program.trace(*arguments)
    flops = _by_phase(
      phases, lambda n: programs_lib.flops(traced.jaxpr, n) / mesh.size
    )
    row['flops'] = sum(flops.values())
    if row['flops'] / chip.flops >= too_slow:
      return row | {'slower': row['flops'] / chip.flops}
    lowered = traced.lower(lowering_platforms=('tpu',))
    try:
      options = dict(o.split('=', 1) for o in config.compiler_options)
      compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
      needed = _needed_bytes(str(error))
      if needed is None:
        raise
      if 'HLO temporaries' in str(error):
        needed += kept
      row['compile_seconds'] = time.monotonic() - begin
      return row | {'needed': needed, 'missing': needed - chip.memory}
  row['compile_seconds'] = time.monotonic() - begin
  text, memory = compiled.as_text(), compiled.memory_analysis()
  inputs = memory.argument_size_in_bytes
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  # Of the arguments, the models are among the residents; the rest is new.
  fresh = max(0.0, inputs - _residents_read(arguments, resident))
  row['temporaries'] = float(memory.temp_size_in_bytes)
  row['batches'] = float(fresh + outputs)
  row['code'] = float(memory.generated_code_size_in_bytes)
  row['needed'] = kept + row['temporaries'] + row['batches'] + row['code']
  row['missing'] = row['needed'] - chip.memory
  traffic = _by_phase(phases, lambda n: programs_lib.traffic(text, n))
  moved = functools.reduce(operator.add, traffic.values())
  row['memory_traffic'] = moved.memory
  row['collectives'] = dict(moved.collectives)
  row['kernels'] = programs_lib.num_kernels(text)
  row['seconds'] = {
    phase: programs_lib.ceiling(chip, flops[phase], traffic[phase])
    for phase in phases
  }
  row['least_seconds'] = sum(max(s.values()) for s in row['seconds'].values())
  return row


def _by_phase(phases, cost_of_trips):
  """What each phase costs, from the cost of the program by its loop's trips.

  `phases` maps names to trips; the loop's own share is what they add.
  """
  if len(phases) == 1:
    return {name: cost_of_trips(trips) for name, trips in phases.items()}
  (outside, _), (inside, trips) = phases.items()
  before, more = cost_of_trips(0), cost_of_trips(1)
  if isinstance(before, float):
    return {outside: before, inside: trips * (more - before)}
  return {outside: before, inside: (more + before.times(-1)).times(trips)}


def _residents_read(arguments, resident) -> float:
  """Bytes of those arguments that are residents too."""
  known = {id(leaf) for leaf in jax.tree.leaves(resident)}
  return programs_lib.bytes_per_chip(
    [x for x in jax.tree.leaves(arguments) if id(x) in known]
  )


def cache_bytes(config, mesh, parts) -> float:
  """Keys and values of one slice of prompts, a chip's share; these bytes are
  among the temporaries."""
  shape, _ = models(config, 'none')
  stage = config.ppo
  slots = stage.prompt_length + stage.response_length
  size = 2 * shape.num_layers * shape.kv_heads * shape.head_dim * slots
  size *= jnp.dtype(shape.compute_dtype).itemsize * stage.batch_size / parts
  return size / mesh.size


def _needed_bytes(message: str) -> float | None:
  """What the compiler says that a program would use, when it gives up."""
  match = re.search(
    r'(?:Used |temporaries \()([\d.]+)([KMGT])(?: of|\) exceeds)', message
  )
  if match is None:
    return None
  return float(match[1]) * 1024 ** ('KMGT'.index(match[2]) + 1)


class Attempts:
  """All that was tried, on disk as it comes: a plan that was cut goes on."""

  def __init__(self, path: epath.Path):
    self._path = path
    self.rows = run_lib.read_json(path) if path.exists() else []

  def find(self, name, mesh, remat, parts):
    """The row of an earlier attempt, or None."""
    for row in self.rows:
      if row['program'] == name and row['mesh'] == list(mesh.shape.values()):
        # Without a backward pass there is nothing to compute again.
        same = name in SLICED or row['remat'] == remat
        if same and row['parts'] == parts and 'slower' not in row:
          return row
    return None

  def add(self, row):
    self.rows.append(row)
    run_lib.write_json(self._path, self.rows)


def attempt(name, config, mesh, remat, parts, attempts, too_slow):
  """One row, measured now or before; a problem is a row too."""
  row = attempts.find(name, mesh, remat, parts)
  if row is not None:
    return row
  try:
    row = measure(name, config, mesh, remat, parts, too_slow)
  except ValueError as error:
    row = {
      'program': name,
      'mesh': list(mesh.shape.values()),
      'remat': remat,
      'parts': parts,
      'problem': str(error),
    }
  attempts.add(row)
  print(f'plan: {_describe(row)}: {_verdict(row)}', flush=True)
  return row


def fit(name, config, mesh, remat, parts, attempts, too_slow=math.inf):
  """The first number of microbatches or slices at which a program fits.

  None where none does, or where it is slower than `too_slow` seconds.
  """
  chip = programs_lib.CHIPS[config.chip]
  while True:
    row = attempt(name, config, mesh, remat, parts, attempts, too_slow)
    if 'problem' in row or 'slower' in row:
      return None
    if row['missing'] <= 0:
      return row
    kept = sum(row['resident'].values())
    room, rest = chip.memory - kept, row['needed'] - kept
    # Where the models alone are too large, smaller pieces help nothing.
    largest = largest_parts(name, config, mesh)
    if room <= 0 or 2 * parts > largest:
      return None
    parts *= 2
    # What is not the models shrinks with the pieces, at the best.
    while room * 2 < rest and 2 * parts <= largest:
      parts, rest = 2 * parts, rest / 2


def _describe(row) -> str:
  kind = 'slices' if row['program'] in SLICED else 'microbatches'
  mesh = 'x'.join(map(str, row['mesh']))
  return (
    f'{row["program"]} on {mesh}, remat {row["remat"]}, {row["parts"]} {kind}'
  )


def _verdict(row) -> str:
  if 'problem' in row:
    return row['problem']
  if 'slower' in row:
    return f'not compiled: {row["slower"]:.3g} s of arithmetic, slower anyway'
  size = f'{row["needed"] / 2**30:.1f} GiB'
  when = 'not compiled: models and cache alone'
  if 'compile_seconds' in row:
    when = f'compiled in {row["compile_seconds"]:.0f} s'
  if row['missing'] > 0:
    return f'{size}, {row["missing"] / 2**30:.1f} GiB too much ({when})'
  return f'{size}, at least {row["least_seconds"]:.3g} s ({when})'


def plan_once(names, config, mesh, remat, attempts, too_slow):
  """The programs of one stage on one mesh; None unless each fits."""
  found, slices = {}, 1
  for name in names:
    spent = sum(row['least_seconds'] for row in found.values())
    # One key says in how many slices a batch is sampled and scored.
    parts = slices if name in SLICED else 1
    row = fit(name, config, mesh, remat, parts, attempts, too_slow - spent)
    if row is None:
      return None
    found[name] = row
    if name in SLICED and row['parts'] > slices:
      slices = row['parts']
      if name == 'score' and 'generate' in found:
        again = fit('generate', config, mesh, remat, slices, attempts)
        if again is None:
          return None
        found['generate'] = again
  return found


def search(names, config, devices, attempts):
  """The fastest of the meshes and remats on which a stage's programs fit.

  Meshes come in the order of their tensor parallelism: once more of it is
  slower, the rest are left out.
  """
  best, best_seconds = None, math.inf
  for remat in config.remats:
    for shape in config.meshes:
      mesh = sharding.make_mesh(shape, devices)
      found = plan_once(names, config, mesh, remat, attempts, best_seconds)
      if found is None:
        continue
      seconds = sum(row['least_seconds'] for row in found.values())
      is_slower = seconds >= best_seconds
      if not is_slower:
        best, best_seconds = found, seconds
      if is_slower or config.stop_at_first:
        break
    if best and config.stop_at_first:
      break
  return best


def run(config, workdir: epath.Path):
  validate(config)
  devices = topology_devices(config)
  attempts = Attempts(workdir / 'tried.json')
  rows, without = {}, []
  for names in STAGES:
    names = [name for name in names if name in config.programs]
    found = search(names, config, devices, attempts) if names else {}
    if found is None:
      without += names
    else:
      rows |= found
  summary = {
    'size': config.size,
    'chip': config.chip,
    'num_chips': len(devices),
    'programs': rows,
    'knobs': knobs(rows, attempts.rows),
  }
  if set(EPISODES) <= set(rows):
    summary['iteration'] = iteration(config, rows, len(devices))
  text = table(summary)
  (workdir / 'plan.md').write_text(text)
  print(text, flush=True)
  if without:
    raise RuntimeError(
      f'{config.size}: {", ".join(without)} fit on {config.topology} in none '
      f'of {len(attempts.rows)} attempts ({workdir / "tried.json"}): add '
      'chips, meshes with more tensor parallelism, or remat "full"'
    )
  run_lib.write_json(workdir / 'plan.json', summary)
  return summary


def knobs(rows, tried) -> list[str]:
  """For each attempt that did not fit, by how much, and what made it fit."""
  lines = []
  for failed in tried:
    if not failed.get('missing', 0) > 0:
      continue
    line = f'{_describe(failed)}: {_verdict(failed)}'
    name, change = failed['program'], None
    for row in tried:
      if row['program'] != name or row.get('missing', 1) > 0:
        continue
      keys = [k for k in ('mesh', 'remat', 'parts') if row[k] != failed[k]]
      # The smallest change that was tried.
      if change is None or len(keys) < len(change[0]):
        change = keys, row
    if change is None and name in rows:
      change = ('mesh', 'remat', 'parts'), rows[name]
    if change is None:
      line += '; nothing that was tried makes it fit'
    else:
      keys, row = change
      told = ', '.join(_knob(key, row) for key in keys)
      line += f'; fits with {told}: {row["needed"] / 2**30:.1f} GiB'
    lines.append(line)
  return lines


def _knob(key, row) -> str:
  if key == 'mesh':
    return f'mesh {tuple(row["mesh"])}'
  if key == 'remat':
    return f'remat "{row["remat"]}"'
  kind = 'num_slices' if row['program'] in SLICED else 'num_microbatches'
  return f'{kind} {row["parts"]}'


def iteration(config, rows, num_chips):
  """Sample, score and update once, and the paper's 256,000 episodes."""
  stage = config.ppo
  seconds = sum(rows[name]['least_seconds'] for name in EPISODES)
  tokens = stage.batch_size * (stage.prompt_length + stage.response_length)
  count = stage.num_episodes / stage.batch_size
  return {
    'seconds': seconds,
    'tokens_per_second_per_chip': tokens / seconds / num_chips,
    'chip_hours': count * seconds * num_chips / 3600,
  }


def table(summary) -> str:
  """The plan as Markdown."""
  lines = [
    f'{summary["size"]} on {summary["num_chips"]} x {summary["chip"]}; figures '
    'per chip.',
    '',
    '| program | mesh, remat, parts | memory GiB: models, optimizer, cache, '
    'temporaries, all | TFLOP | memory traffic GB | between chips GB '
    '| kernels | compiled s | least time s |',
    '|---|---|---|---|---|---|---|---|---|',
  ]
  for name, row in summary['programs'].items():
    kept = row['resident']
    sizes = (
      sum(kept.values()) - kept['optimizer'],
      kept['optimizer'],
      row['cache'],
      # The cache is one of the temporaries.
      row['needed'] - sum(kept.values()) - row['cache'],
      row['needed'],
    )
    sizes = ', '.join(f'{size / 2**30:.2f}' for size in sizes)
    collectives = ', '.join(
      f'{kind} {size / 1e9:.3g}' for kind, size in row['collectives'].items()
    )
    mesh = 'x'.join(map(str, row['mesh']))
    times = ', '.join(
      f'{phase} {max(seconds.values()):.3g} ({max(seconds, key=seconds.get)})'
      for phase, seconds in row['seconds'].items()
    )
    lines.append(
      f'| {name} | {mesh}, {row["remat"]}, {row["parts"]} '
      f'| {sizes} | {row["flops"] / 1e12:.3g} '
      f'| {row["memory_traffic"] / 1e9:.3g} | {collectives or "none"} '
      f'| {row["kernels"]} | {row["compile_seconds"]:.0f} | {times} |'
    )
  if 'iteration' in summary:
    whole = summary['iteration']
    lines += [
      '',
      f'One iteration takes at least {whole["seconds"]:.3g} s: at most '
      f'{whole["tokens_per_second_per_chip"]:.0f} tokens a second and chip, at '
      f'least {whole["chip_hours"]:.3g} chip-hours for all episodes.',
    ]
  if summary['knobs']:
    lines += ['', 'What did not fit, and what made it fit:', '']
    lines += [f'- {line}' for line in summary['knobs']]
  return '\n'.join(lines) + '\n'
