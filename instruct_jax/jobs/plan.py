"""Plans a run for TPUs or GPUs that are not at hand.

Compiles the programs of the other experiments ahead of time for a described
topology. This gives memory, arithmetic, traffic, and the least time by the
chip's published figures. What does not fit is compiled again in smaller slices
and microbatches, and with other meshes and remats; the plan is the fastest that
fits. `tried.json` keeps all attempts, and an interrupted plan resumes from it.

Needs `pip install -r requirements-plan.txt`, or requirements-plan-gpu.txt to
plan for GPUs; needs no TPU or GPU.
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments import ppo_ptx, reward, sft
from instruct_jax import (
  lora,
  model_fns,
  packing,
  ppo,
  rewards,
  rl,
  rollout,
  sampling,
)
from instruct_jax.infra import cost, sharding
from instruct_jax.infra import run as run_lib
from instruct_jax.models import cudnn
from instruct_jax.models.config import (
  REMAT_POLICIES,
  TransformerConfig,
  lora_of,
)
from instruct_jax.types import (
  Episodes,
  PackedComparisons,
  RLBatch,
  Rollout,
  TextBatch,
)

PROCESSES = 'one'

# One iteration of PPO. Sampling reads prompts and decodes tokens in loops whose
# trip counts depend on the data, so each loop body is compiled separately.
SAMPLING = ('decode', 'prefill')
EPISODES = (*SAMPLING, 'score', 'penalise', 'train')
# Programs that run with the same models in memory, on one mesh.
STAGES = (('sft',), ('reward',), EPISODES)
# These have no backward pass, so remat changes nothing.
READING = (*SAMPLING, 'score', 'penalise')
# How the config calls the pieces into which a program's rows are split.
PIECES = {
  'sft': 'microbatches',
  'reward': 'microbatches',
  'decode': 'parts of the slots',
  'prefill': 'parts of the slots',
  'score': 'slices',
  'penalise': 'slices',
  'train': 'microbatches',
}


def validate(config):
  """Checks the config and those of the stages that it plans.

  Raises:
    ValueError: a wrong value; names the key.
  """
  run_lib.check_choice(config, 'chip', tuple(cost.CHIPS))
  run_lib.check_choice(config, 'remats', REMAT_POLICIES)
  run_lib.check_choice(config, 'programs', tuple(PIECES))
  for name in ('policy', 'scalar'):
    with run_lib.naming('model', name):
      TransformerConfig.from_dict(config[name].to_dict())
  for stage, name in ((sft, 'sft'), (reward, 'reward'), (ppo_ptx, 'ppo')):
    stage.validate(config[name])
  if not config.meshes:
    raise ValueError('meshes is empty: there is nothing to try')


def inputs(config):
  """None: only shapes are compiled."""
  del config
  return {}


# An H100 SXM for XLA's compiler, from NVIDIA's data sheet and tuning guide.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def is_gpu(config) -> bool:
  """Whether the plan is for GPUs."""
  return config.chip.startswith('h100')


def topology_devices(config):
  """The chips of `config.topology`, described by libtpu or by XLA for CUDA.

  Raises:
    RuntimeError: the topology cannot be described, such as without libtpu.
  """
  from jax.experimental import topologies

  kind, _, grid = config.topology.partition(':')
  if is_gpu(config):
    # Cached programs cannot be read back without a GPU.
    jax.config.update('jax_enable_compilation_cache', False)
    wanted = {'platform': 'cuda', 'topology': grid, 'target_config': H100}
    needs = 'requirements-plan-gpu.txt` (and no GPU)'
  else:
    # Otherwise libtpu queries the metadata server of a cloud machine.
    os.environ['TPU_SKIP_MDS_QUERY'] = '1'
    os.environ['TPU_WORKER_HOSTNAMES'] = 'localhost'
    # No chip is held, so several plans may run at the same time.
    os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
    wanted = {'platform': 'tpu', 'topology_name': f'{kind}:{grid}'}
    if config.megacore:
      wanted['chip_config_name'] = 'megacore'
    needs = 'requirements-plan.txt` (and no TPU)'
  try:
    return topologies.get_topology_desc(**wanted).devices
  except (RuntimeError, ImportError, NotImplementedError) as error:
    raise RuntimeError(
      f'no topology {config.topology!r}: {error}. Planning for it needs '
      f'`pip install -r {needs}.'
    ) from error


def compiled(traced, mesh, options=None):
  """Compiles a traced program for the described chips of a mesh."""
  platform = mesh.devices.flat[0].platform
  platform = 'cuda' if platform == 'gpu' else platform
  return traced.lower(lowering_platforms=(platform,)).compile(options)


def models(config, remat):
  """The shapes of the policy, and of the reward and value models."""

  def shape(values):
    values = {**values.to_dict(), 'remat': remat}
    return TransformerConfig.from_dict(values)

  return shape(config.policy), shape(config.scalar)


# --- Described arguments ------------------------------------------------------


def num_shards(mesh) -> int:
  """Number of shards into which the mesh splits the rows of a batch."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def rows_of(mesh, dtype, *shape):
  """A described array whose rows are sharded over the mesh."""
  if shape[0] % num_shards(mesh):
    raise ValueError(
      f'{shape[0]} rows do not divide over {num_shards(mesh)} shards'
    )
  place = sharding.batch_sharding(mesh)
  return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def text_rows(mesh, *shape):
  """Described rows of text."""
  return TextBatch(
    tokens=rows_of(mesh, jnp.int32, *shape),
    mask=rows_of(mesh, bool, *shape),
    loss_mask=rows_of(mesh, bool, *shape),
    segments=rows_of(mesh, jnp.int32, *shape),
  )


def described_key():
  """A described random key."""
  return jax.eval_shape(lambda: jax.random.key(0))


def full_layout(stage, mesh):
  """The described layout of full-length episodes."""
  sizes = rl.row_sizes(stage, mesh)
  prompts = np.full(stage.batch_size, stage.prompt_length)
  responses = np.full(stage.batch_size, stage.response_length)
  groups = packing.deal_epochs(prompts + responses, sizes, (0,))
  return jax.tree.map(
    lambda x: rows_of(mesh, x.dtype, *x.shape),
    packing.lay_out(prompts, responses, groups, sizes),
  )


# --- Programs -----------------------------------------------------------------


def build(name, config, mesh, remat, parts):
  """A jitted program, its described arguments, and what stays in memory.

  Args:
    name: a key of `PIECES`.
    config: the config of the plan.
    mesh: a mesh of described chips.
    remat: what the backward pass recomputes.
    parts: into how many pieces the program's rows are split; see `PIECES`.
  """
  if name in EPISODES:
    return ppo_program(name, config, mesh, remat, parts)
  return supervised_program(name, config, mesh, remat, parts)


def supervised_program(name, config, mesh, remat, parts):
  """The update of SFT or of the reward model; see `build`."""
  stage = config[name].copy_and_resolve_references()
  stage.num_microbatches = parts
  experiment, kind = (sft, 'policy') if name == 'sft' else (reward, 'scalar')
  experiment.validate(stage)
  policy_shape, shape = models(config, remat)
  if name == 'sft':
    shape = dataclasses.replace(
      policy_shape, dropout=stage.dropout, logprob_chunk=stage.logprob_chunk
    )
    batch = text_rows(mesh, stage.batch_size, stage.row_length)
  else:
    # Each microbatch is packed separately, into rows that the mesh divides.
    shards = parts * num_shards(mesh)
    num_rows = -(-config.num_reward_rows // shards) * shards
    rows, candidates = stage.batch_size, stage.max_candidates
    batch = PackedComparisons(
      tokens=rows_of(mesh, jnp.int32, num_rows, stage.row_length),
      segments=rows_of(mesh, jnp.int32, num_rows, stage.row_length),
      ends=rows_of(mesh, jnp.int32, rows, candidates),
      ranks=rows_of(mesh, jnp.int32, rows, 1, candidates),
      prompt_mask=rows_of(mesh, bool, rows),
    )
  shape = dataclasses.replace(shape, lora=lora_of(stage))
  built = experiment.build_programs(
    stage, model_fns.make_module(kind, shape), 100
  )
  state, base = model_fns.abstract_state(kind, shape, mesh, built['optimizer'])
  resident = {
    'parameters': (state.params, base),
    'optimizer': state.opt_state,
  }
  frozen = {'policy' if name == 'sft' else 'reward': base}
  return built['update'], (state, frozen, batch, described_key()), resident


def ppo_program(name, config, mesh, remat, parts):
  """A program of a PPO iteration; see `build`."""
  stage = config.ppo.copy_and_resolve_references()
  if name == 'train':
    stage.num_microbatches = parts
  elif name in SAMPLING:
    stage.num_slots = stage.batch_size // parts
  else:
    stage.num_slices = parts
  ppo_ptx.validate(stage)
  policy_shape, scalar_shape = models(config, remat)
  adapters = lora_of(stage)
  policy_shape = dataclasses.replace(
    policy_shape, logprob_chunk=stage.logprob_chunk, lora=adapters
  )
  scalar_shape = dataclasses.replace(scalar_shape, lora=adapters)
  built = ppo_ptx.build_programs(
    stage,
    model_fns.make_module('policy', policy_shape),
    model_fns.make_module('scalar', scalar_shape),
    (1,),
  )
  optimizers = rl.make_optimizers(stage)
  policy, policy_base = model_fns.abstract_state(
    'policy', policy_shape, mesh, optimizers['policy']
  )
  value, value_base = model_fns.abstract_state(
    'scalar', scalar_shape, mesh, optimizers['value']
  )
  bases = {'policy': policy_base, 'value': value_base}
  coef = jax.ShapeDtypeStruct(
    (), jnp.float32, sharding=sharding.replicated(mesh)
  )
  kl = rewards.KLState(coef=coef)
  state = ppo.RLState(policy=policy, value=value, ema=policy.params, kl=kl)
  resident = {
    'parameters': (policy.params, value.params, bases),
    'optimizer': (policy.opt_state, value.opt_state),
    'ema': state.ema,
  }
  if adapters is None:
    reference, reward_model = jax.tree.map(
      lambda x: x.update(dtype=jnp.dtype(stage.frozen_dtype)),
      (policy.params, value.params),
    )
    resident |= {'reference': reference, 'reward': reward_model}
  else:  # Both share the arrays of their base, as in `rl.Frozen`.
    reference = policy_base
    head, _ = lora.split(
      model_fns.abstract_params(
        'scalar', dataclasses.replace(scalar_shape, lora=None), mesh
      )
    )
    reward_model = lora.join(head, value_base)
  read = {'score': 'reward', 'penalise': 'reference', 'train': 'ema'}
  for tree in set(stage.offload) - {read.get(name)}:
    resident.pop(tree, None)  # Offloaded to the host.
  if name in SAMPLING:
    params = lora.join(policy.params, policy_base)
    return sampling_program(name, stage, policy_shape, mesh, params, resident)
  layout = full_layout(stage, mesh)
  if name == 'train':
    arguments = (state, bases, *_training_rows(stage, mesh, layout), kl)
    return built[name], (*arguments, described_key()), resident
  B, R = stage.batch_size, stage.response_length
  T = stage.prompt_length + R
  sampled = Rollout(
    tokens=rows_of(mesh, jnp.int32, B, T),
    mask=rows_of(mesh, bool, B, T),
    response_mask=rows_of(mesh, bool, B, R),
    logprobs=rows_of(mesh, jnp.float32, B, R),
    ended=rows_of(mesh, bool, B),
  )
  if name == 'score':
    return built[name], (reward_model, sampled, layout), resident
  scores = rows_of(mesh, jnp.float32, B)
  trees = (state.replace(ema=None), {'reference': reference, **bases})
  return built[name], (*trees, sampled, layout, scores), resident


def _training_rows(stage, mesh, layout):
  """The described training batch, and pretraining rows or None."""
  each = rows_of(mesh, jnp.float32, *layout.where.shape)
  batch = RLBatch(
    episodes=Episodes(
      layout.segments, layout.segments, layout.where, layout.response_mask
    ),
    old_logprobs=each,
    ref_logprobs=each,
    advantages=each,
    old_values=each,
    returns=each,
  )
  if stage.ptx_coef <= 0:
    return batch, None
  num_ptx = stage.batch_size * stage.ptx_per_episode * stage.num_epochs
  return batch, text_rows(mesh, num_ptx, stage.ptx_row_length)


@functools.lru_cache(maxsize=1)
def sampling_weights(module, gather_weights, mesh):
  """Describes the weights as sampling prepares them once per rollout.

  Compiles the preparation, since the compiler decides their sharding.
  """
  params = model_fns.abstract_params('policy', module.config, mesh)
  prepare = jax.jit(model_fns.decoder(module, gather_weights).prepare)
  with sharding.use_mesh(mesh):
    found = compiled(prepare.trace(params), mesh)
  return sharding.with_shardings(found.out_info, found.output_shardings)


def sampling_program(name, stage, shape, mesh, params, resident):
  """One decoding step in every slot, or one prefill; see `build`.

  The phase in which the last slots run empty is left out.
  """
  module = model_fns.make_module('policy', shape)
  decoder = model_fns.decoder(module, stage.gather_weights)
  shards = num_shards(mesh)
  sizes = rollout.make_sizes(
    stage.batch_size,
    stage.prompt_length,
    stage.response_length,
    stage.num_slots,
    1,
    shards,
  )
  num_slots, num_read = sizes.slots * shards, sizes.bank * shards

  def cache_of(rows, columns):
    spec = sharding.partition_spec(('batch', 'kv_heads', None, None))
    place = jax.sharding.NamedSharding(mesh, spec)
    with sharding.use_mesh(mesh):  # The mesh's platform decides the dtype.
      cache = jax.eval_shape(lambda: decoder.make_cache(rows, columns))
    return jax.tree.map(lambda x: x.update(sharding=place), cache)

  weights = sampling_weights(module, stage.gather_weights, mesh)
  cache = cache_of(num_slots, sizes.widths[-1])
  # Prefill uses the training layers, with their sharding.
  trunk = weights.trunk | {'layers': params['trunk']['layers']}
  resident = resident | {
    'sampling weights': weights.replace(trunk=trunk | {'layers': {}}),
    'cache': cache,
  }
  weights = weights.replace(trunk=trunk)
  if name == 'prefill':
    tokens = rows_of(mesh, jnp.int32, num_read, stage.prompt_length)
    arguments = (weights, tokens, rows_of(mesh, jnp.int32, num_read))
    return jax.jit(decoder.read), arguments, resident

  def step(cache, weights, tokens, lengths, uniform):
    logits, cache = decoder.step(weights, tokens, lengths, cache)
    return sampling.sample_tokens(logits, uniform, stage.temperature), cache

  # Prefilled prompts wait for a free slot in a cache of their own.
  resident['cache'] = (cache, cache_of(num_read, stage.prompt_length))
  each = rows_of(mesh, jnp.int32, num_slots)
  noise = rows_of(mesh, jnp.float32, num_slots)
  arguments = (cache, weights, each, each, noise)
  return jax.jit(step, donate_argnums=0), arguments, resident


def num_calls(name, config, mesh, parts) -> int:
  """Number of calls of a program per iteration or step, at full lengths."""
  stage = config.ppo
  if name == 'decode':
    return parts * stage.response_length
  if name == 'prefill':
    shards = num_shards(mesh)
    slots = stage.batch_size // parts
    read = max(1, slots // shards // 4) * shards
    return -(-stage.batch_size // read)
  return 1


def largest_parts(name, config, mesh) -> int:
  """The most pieces possible: each has one row on every shard."""
  if name == 'reward':
    return config.reward.batch_size  # Packed into as many rows as needed.
  rows = (config.ppo if name in EPISODES else config.sft).batch_size
  if name == 'train':
    rows //= config.ppo.num_minibatches
  return max(1, rows // num_shards(mesh))


# --- Attempts -----------------------------------------------------------------


def measure(name, config, mesh, remat, parts, too_slow=math.inf):
  """Compiles one program; returns its row of bytes, FLOPs and seconds.

  Skips compilation if the program cannot win: if the models alone exceed the
  memory, or the arithmetic alone takes `too_slow` seconds.
  """
  chip = cost.CHIPS[config.chip]
  row = _row(name, mesh, remat, parts)

  def refused(error, others=0.0):
    """The row of a program that is too large for the compiler."""
    needed = _needed_bytes(str(error))
    if needed is None:
      raise error
    if 'HLO temporaries' in str(error):
      needed += others
    return row | {'needed': needed, 'missing': needed - chip.memory}

  try:
    program, arguments, resident = build(name, config, mesh, remat, parts)
  except jax.errors.JaxRuntimeError as error:
    # The program that prepares the weights for sampling does not fit.
    found = refused(error)
    return found | {'resident': {'sampling weights': found['needed']}}
  row['resident'] = {
    kind: cost.bytes_per_chip(tree) for kind, tree in resident.items()
  }
  kept = sum(row['resident'].values())
  if kept > chip.memory:
    return row | {'needed': kept, 'missing': kept - chip.memory}
  row['calls'] = num_calls(name, config, mesh, parts)
  begin = time.monotonic()
  with sharding.use_mesh(mesh):
    traced = program.trace(*arguments)
    row['flops'] = cost.flops(traced.jaxpr) / mesh.size
    arithmetic = row['calls'] * row['flops'] / chip.flops
    if arithmetic >= too_slow:
      return row | {'slower': arithmetic}
    try:
      options = dict(o.split('=', 1) for o in config.compiler_options)
      program = compiled(traced, mesh, options)
    except jax.errors.JaxRuntimeError as error:
      seconds = time.monotonic() - begin
      return refused(error, kept) | {'compile_seconds': seconds}
  row['compile_seconds'] = time.monotonic() - begin
  row |= _memory(program.memory_analysis(), arguments, resident)
  row['needed'] = kept + row['temporaries'] + row['batches'] + row['code']
  row['missing'] = row['needed'] - chip.memory
  text = program.as_text()
  moved = cost.traffic(text)
  row['memory_traffic'] = moved.memory
  row['collectives'] = dict(moved.collectives)
  row['kernels'] = cost.num_kernels(text)
  row['seconds'] = cost.ceiling(chip, row['flops'], moved)
  row['least_seconds'] = row['calls'] * max(row['seconds'].values())
  return row


def _memory(compiled, arguments, resident) -> dict[str, float]:
  """Bytes that a compiled program needs in addition to `resident`."""
  known = {id(leaf) for leaf in jax.tree.leaves(resident)}
  read = [x for x in jax.tree.leaves(arguments) if id(x) in known]
  fresh = compiled.argument_size_in_bytes - cost.bytes_per_chip(read)
  outputs = compiled.output_size_in_bytes - compiled.alias_size_in_bytes
  return {
    'temporaries': float(compiled.temp_size_in_bytes),
    'batches': float(max(0.0, fresh) + outputs),
    'code': float(compiled.generated_code_size_in_bytes),
  }


def _row(name, mesh, remat, parts):
  return {
    'program': name,
    'mesh': list(mesh.shape.values()),
    'remat': remat,
    'parts': parts,
  }


def _needed_bytes(message: str) -> float | None:
  """The bytes a program needs, parsed from the compiler's size error."""
  match = re.search(
    r'(?:Used |temporaries \()([\d.]+)([KMGT])(?: of|\) exceeds)', message
  )
  if match is None:
    return None
  return float(match[1]) * 1024 ** ('KMGT'.index(match[2]) + 1)


class Attempts:
  """The rows of all attempts, kept on disk."""

  def __init__(self, path: epath.Path):
    self._path = path
    self.rows = run_lib.read_json(path) if path.exists() else []

  def find(self, name, mesh, remat, parts):
    """The row of an earlier attempt, or None."""
    wanted = _row(name, mesh, remat, parts)
    if name in READING:
      del wanted['remat']
    rows = (row for row in self.rows if 'slower' not in row)
    return next((row for row in rows if row | wanted == row), None)

  def add(self, row):
    """Adds a row and saves all rows."""
    self.rows.append(row)
    run_lib.write_json(self._path, self.rows)


def attempt(name, config, mesh, remat, parts, attempts, too_slow):
  """The row of an attempt, earlier or new; a ValueError is also kept as one."""
  row = attempts.find(name, mesh, remat, parts)
  if row is not None:
    return row
  try:
    row = measure(name, config, mesh, remat, parts, too_slow)
  except ValueError as error:
    row = {**_row(name, mesh, remat, parts), 'problem': str(error)}
  attempts.add(row)
  print(f'plan: {_describe(row)}: {_verdict(row)}', flush=True)
  return row


def fit(name, config, mesh, remat, parts, attempts, too_slow=math.inf):
  """The row with the fewest pieces, at least `parts`, where a program fits.

  None if it never fits, cannot be built, or is known to be too slow.
  """
  chip = cost.CHIPS[config.chip]
  while True:
    row = attempt(name, config, mesh, remat, parts, attempts, too_slow)
    if 'problem' in row or 'slower' in row:
      return None
    if row['missing'] <= 0:
      return row
    # The cache shrinks with the pieces; the models do not.
    kept = sum(row['resident'].values()) - row['resident'].get('cache', 0.0)
    room, above = chip.memory - kept, row['needed'] - kept
    largest = largest_parts(name, config, mesh)
    if room <= 0 or 2 * parts > largest:
      return None
    parts *= 2
    # Skip counts that cannot fit even if all but the models shrinks as much.
    while room * 2 < above and 2 * parts <= largest:
      parts, above = 2 * parts, above / 2


def _describe(row) -> str:
  kind = PIECES[row['program']]
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
  when = 'not compiled: models and cache are too large'
  if 'compile_seconds' in row:
    when = f'compiled in {row["compile_seconds"]:.0f} s'
  if row['missing'] > 0:
    return f'{size}, {row["missing"] / 2**30:.1f} GiB too much ({when})'
  return f'{size}, at least {row["least_seconds"]:.3g} s ({when})'


def plan_once(names, config, mesh, remat, attempts, too_slow):
  """Program -> row of one stage's programs on one mesh; None if any fails."""
  found = {}
  for name in names:
    spent = sum(row['least_seconds'] for row in found.values())
    # Decode and prefill share the slots.
    parts = found['decode']['parts'] if name == 'prefill' else 1
    row = fit(name, config, mesh, remat, parts, attempts, too_slow - spent)
    if row is None:
      return None
    found[name] = row
    if name == 'prefill' and row['parts'] > parts:
      again = fit('decode', config, mesh, remat, row['parts'], attempts)
      if again is None:
        return None
      found['decode'] = again
  return found


def search(names, config, devices, attempts):
  """The rows of the fastest mesh and remat with which a stage's programs fit.

  Meshes are in order of increasing tensor parallelism: once a mesh is slower
  than the best, those after it are skipped. So are meshes that do not divide
  the devices.

  Raises:
    ValueError: no mesh divides the devices.
  """
  best, best_seconds = None, math.inf
  shapes = [
    shape
    for shape in config.meshes
    if len(devices) % math.prod(size for size in shape if size > 0) == 0
  ]
  if not shapes:
    raise ValueError(
      f'meshes {tuple(config.meshes)}: none divides {len(devices)} devices'
    )
  for remat in config.remats:
    for shape in shapes:
      mesh = sharding.make_mesh(shape, devices)
      found = plan_once(names, config, mesh, remat, attempts, best_seconds)
      if found is None:
        continue
      seconds = sum(row['least_seconds'] for row in found.values())
      if seconds >= best_seconds:
        break
      best, best_seconds = found, seconds
      if config.stop_at_first:
        return best
  return best


def run(config, workdir: epath.Path):
  """Searches for a plan for each group of programs.

  Resumes from tried.json, if there is one. Writes tried.json, plan.md, and,
  if all programs fit, plan.json.

  Returns:
    The content of plan.json.

  Raises:
    RuntimeError: a program never fits, or the topology cannot be described.
  """
  validate(config)
  with cudnn.described_hopper() if is_gpu(config) else contextlib.nullcontext():
    return make_plan(config, workdir)


def make_plan(config, workdir):
  """`run` with a config that was already checked."""
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
    'knobs': knobs(attempts.rows),
  }
  if set(EPISODES) <= set(rows):
    summary['iteration'] = iteration(config, rows, len(devices))
  text = table(summary)
  (workdir / 'plan.md').write_text(f'# Plan\n\n{text}')
  print(text, flush=True)
  if without:
    raise RuntimeError(
      f'{config.size}: {", ".join(without)} fit on {config.topology} in none '
      f'of {len(attempts.rows)} attempts ({workdir / "tried.json"}): add '
      'chips, meshes with more tensor parallelism, or remat "full"'
    )
  run_lib.write_json(workdir / 'plan.json', summary)
  return summary


def knobs(tried) -> list[str]:
  """A line for each attempt that did not fit: by how much, and what does."""
  lines = []
  for failed in tried:
    if not failed.get('missing', 0) > 0:
      continue
    line = f'{_describe(failed)}: {_verdict(failed)}'
    changes = [
      ([k for k in ('mesh', 'remat', 'parts') if row[k] != failed[k]], row)
      for row in tried
      if row['program'] == failed['program'] and row.get('missing', 1) <= 0
    ]
    if changes:
      # The smallest change that was tried.
      keys, row = min(changes, key=lambda change: len(change[0]))
      settings = ', '.join(_knob(key, row) for key in keys)
      line += f'; fits with {settings}: {row["needed"] / 2**30:.1f} GiB'
    else:
      line += '; nothing that was tried makes it fit'
    lines.append(line)
  return lines


def _knob(key, row) -> str:
  if key == 'mesh':
    return f'mesh {tuple(row["mesh"])}'
  if key == 'remat':
    return f'remat "{row["remat"]}"'
  if row['program'] in SAMPLING:
    return f'num_slots a {row["parts"]}th of batch_size'
  return f'num_{PIECES[row["program"]]} {row["parts"]}'


def iteration(config, rows, num_chips):
  """Time and throughput of a PPO iteration; chip-hours of all episodes."""
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
    'are per chip and call, times for all calls.',
    '',
    '| program | mesh, remat, parts | memory GiB: models, optimizer, cache, '
    'temporaries, all | TFLOP | memory traffic GB | between chips GB '
    '| kernels | compiled s | calls | least time s |',
    '|---|---|---|---|---|---|---|---|---|---|',
  ]
  for name, row in summary['programs'].items():
    kept = sum(row['resident'].values())
    optimizer = row['resident']['optimizer']
    cache = row['resident'].get('cache', 0.0)
    needed = row['needed']
    sizes = (kept - optimizer - cache, optimizer, cache, needed - kept, needed)
    sizes = ', '.join(f'{size / 2**30:.2f}' for size in sizes)
    collectives = ', '.join(
      f'{kind} {size / 1e9:.3g}' for kind, size in row['collectives'].items()
    )
    mesh = 'x'.join(map(str, row['mesh']))
    bound = max(row['seconds'], key=row['seconds'].get)
    lines.append(
      f'| {name} | {mesh}, {row["remat"]}, {row["parts"]} '
      f'| {sizes} | {row["flops"] / 1e12:.3g} '
      f'| {row["memory_traffic"] / 1e9:.3g} | {collectives or "none"} '
      f'| {row["kernels"]} | {row["compile_seconds"]:.0f} | {row["calls"]} '
      f'| {row["least_seconds"]:.3g} ({bound}) |'
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
