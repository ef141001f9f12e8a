"""What a run would need on chips one does not have yet.

Compiles the programs of the other experiments, as they stand, ahead of time
for a described TPU topology: memory, arithmetic, traffic, and the least time
that the chip's published figures allow. What does not fit is compiled again
with another mesh, smaller slices and microbatches, until something does.

Needs `pip install libtpu==0.0.42.*`; a TPU it needs not.
"""

import collections
import dataclasses
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

STAGES = ('sft', 'reward', 'generate', 'score', 'update')
EPISODES = ('generate', 'score', 'update')

Tokenizer = collections.namedtuple('Tokenizer', ['stop_ids'])


def validate(config):
  if config.chip not in programs_lib.CHIPS:
    raise ValueError(
      f'chip must be one of {sorted(programs_lib.CHIPS)}: {config.chip!r}'
    )
  unknown = sorted(set(config.programs) - set(STAGES))
  if unknown:
    raise ValueError(f'unknown programs {unknown}; known: {STAGES}')
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
      '`pip install libtpu==0.0.42.*` (and no TPU).'
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
    'frozen models': (reference, reward_model),
  }
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


def largest_parts(name, config) -> int:
  """Microbatches or slices at most: one row in each."""
  if name in ('generate', 'score'):
    return config.ppo.batch_size
  if name == 'update':
    return config.ppo.batch_size // config.ppo.num_minibatches
  return config[name].batch_size


def first_parts(name, config) -> int:
  if name in ('generate', 'score'):
    return config.ppo.num_slices
  return config['ppo' if name == 'update' else name].num_microbatches


def measure(name, config, mesh, remat, parts):
  """Compiles one program; everything known about it, bytes and seconds."""
  chip = programs_lib.CHIPS[config.chip]
  program, arguments, resident = build(name, config, mesh, remat, parts)
  begin = time.monotonic()
  with sharding.use_mesh(mesh):
    traced = program.trace(*arguments)
    num_trips = config.ppo.response_length - 1 if name == 'generate' else 1
    num_flops = programs_lib.flops(traced.jaxpr, num_trips) / mesh.size
    lowered = traced.lower(lowering_platforms=('tpu',))
    row = {
      'program': name,
      'mesh': list(mesh.shape.values()),
      'remat': remat,
      'parts': parts,
      'flops': num_flops,
      'resident': {
        kind: programs_lib.bytes_per_chip(tree)
        for kind, tree in resident.items()
      },
    }
    try:
      options = dict(o.split('=', 1) for o in config.compiler_options)
      compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
      needed = _needed_bytes(str(error))
      if needed is None:
        raise
      if 'HLO temporaries' in str(error):
        needed += sum(row['resident'].values())
      row['compile_seconds'] = time.monotonic() - begin
      return row | {'needed': needed, 'missing': needed - chip.memory}
  row['compile_seconds'] = time.monotonic() - begin
  text, memory = compiled.as_text(), compiled.memory_analysis()
  moved = programs_lib.traffic(text, num_trips)
  kept = sum(row['resident'].values())
  inputs = memory.argument_size_in_bytes
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  # Of the arguments, the models are among the residents; the rest is new.
  fresh = max(0.0, inputs - _residents_read(arguments, resident))
  row['temporaries'] = float(memory.temp_size_in_bytes)
  row['cache'] = cache_bytes(config, mesh, parts) if name == 'generate' else 0.0
  row['batches'] = float(fresh + outputs)
  row['code'] = float(memory.generated_code_size_in_bytes)
  row['needed'] = kept + row['temporaries'] + row['batches'] + row['code']
  row['missing'] = row['needed'] - chip.memory
  row['memory_traffic'] = moved.memory
  row['collectives'] = dict(moved.collectives)
  row['kernels'] = programs_lib.num_kernels(text)
  row['seconds'] = programs_lib.ceiling(chip, num_flops, moved)
  row['least_seconds'] = max(row['seconds'].values())
  return row


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


def fit(name, config, mesh, remat, tried):
  """The first number of microbatches or slices at which a program fits."""
  parts = first_parts(name, config)
  while True:
    try:
      row = measure(name, config, mesh, remat, parts)
    except ValueError as error:
      tried.append(
        {
          'program': name,
          'mesh': list(mesh.shape.values()),
          'remat': remat,
          'parts': parts,
          'problem': str(error),
        }
      )
      print(f'plan: {_describe(tried[-1])}: {error}', flush=True)
      return None
    tried.append(row)
    print(f'plan: {_describe(row)}: {_verdict(row)}', flush=True)
    if row['missing'] <= 0:
      return row
    # Where the models alone are too large, smaller pieces help nothing.
    chip = programs_lib.CHIPS[config.chip]
    is_hopeless = sum(row['resident'].values()) > chip.memory
    if is_hopeless or 2 * parts > largest_parts(name, config):
      return None
    parts *= 2


def _describe(row) -> str:
  kind = 'slices' if row['program'] in ('generate', 'score') else 'microbatches'
  mesh = 'x'.join(map(str, row['mesh']))
  return (
    f'{row["program"]} on {mesh}, remat {row["remat"]}, {row["parts"]} {kind}'
  )


def _verdict(row) -> str:
  size, seconds = row['needed'] / 2**30, row['compile_seconds']
  if row['missing'] > 0:
    return (
      f'{size:.1f} GiB, {row["missing"] / 2**30:.1f} GiB too much '
      f'(compiled in {seconds:.0f} s)'
    )
  return (
    f'{size:.1f} GiB, at least {row["least_seconds"]:.3g} s '
    f'(compiled in {seconds:.0f} s)'
  )


def plan_once(config, devices, shape, remat, tried):
  """All programs on one mesh; None unless each fits."""
  mesh = sharding.make_mesh(shape, devices)
  found = {}
  for name in config.programs:
    row = fit(name, config, mesh, remat, tried)
    if row is None:
      return None
    found[name] = row
  return found


def run(config, workdir: epath.Path):
  validate(config)
  devices = topology_devices(config)
  tried, plans = [], []
  for shape in config.meshes:
    for remat in config.remats:
      found = plan_once(config, devices, shape, remat, tried)
      if found is not None:
        plans.append(found)
      run_lib.write_json(workdir / 'tried.json', tried)
      if plans and config.stop_at_first:
        break
    if plans and config.stop_at_first:
      break
  if not plans:
    raise RuntimeError(
      f'{config.size} fits on {config.topology} in none of '
      f'{len(tried)} attempts ({workdir / "tried.json"}): add chips, meshes '
      'with more tensor parallelism, or remat "full"'
    )
  best = min(plans, key=lambda p: sum(r['least_seconds'] for r in p.values()))
  summary = {
    'size': config.size,
    'chip': config.chip,
    'num_chips': len(devices),
    'programs': best,
  }
  if set(EPISODES) <= set(best):
    summary['iteration'] = iteration(config, best, len(devices))
  run_lib.write_json(workdir / 'plan.json', summary)
  text = table(summary)
  (workdir / 'plan.md').write_text(text)
  print(text, flush=True)
  return summary


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
    '| program | mesh, remat, parts | memory GiB (models, optimizer, rest) '
    '| TFLOP | memory traffic GB | between chips GB | kernels | compiled s '
    '| least time s |',
    '|---|---|---|---|---|---|---|---|---|',
  ]
  for name, row in summary['programs'].items():
    kept = row['resident']
    models_size = sum(kept.values()) - kept['optimizer']
    rest = row['needed'] - sum(kept.values())
    collectives = ', '.join(
      f'{kind} {size / 1e9:.3g}' for kind, size in row['collectives'].items()
    )
    mesh = 'x'.join(map(str, row['mesh']))
    lines.append(
      f'| {name} | {mesh}, {row["remat"]}, {row["parts"]} '
      f'| {row["needed"] / 2**30:.2f} ({models_size / 2**30:.2f}, '
      f'{kept["optimizer"] / 2**30:.2f}, {rest / 2**30:.2f}) '
      f'| {row["flops"] / 1e12:.3g} | {row["memory_traffic"] / 1e9:.3g} '
      f'| {collectives or "none"} | {row["kernels"]} '
      f'| {row["compile_seconds"]:.0f} | {row["least_seconds"]:.3g} |'
    )
  if 'iteration' in summary:
    whole = summary['iteration']
    lines += [
      '',
      f'One iteration takes at least {whole["seconds"]:.3g} s: at most '
      f'{whole["tokens_per_second_per_chip"]:.0f} tokens a second and chip, at '
      f'least {whole["chip_hours"]:.3g} chip-hours for all episodes.',
    ]
  return '\n'.join(lines) + '\n'
