"""Every family on every mesh: where arrays lie, and the numbers of one device.

The programs are those that the experiments jit. Meshes are data x fsdp x
tensor on eight fake devices; float32 throughout.
"""

import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs import ppo_ptx as ppo_config
from experiments import ppo_ptx, reward, sft
from instruct_jax import model_fns, ppo, rewards, rl
from instruct_jax.infra import sharding, train_state
from instruct_jax.models.config import PRESETS, TransformerConfig
from instruct_jax.types import PackedComparisons, PromptBatch, TextBatch

pytestmark = pytest.mark.usefixtures('quick_compile')

GOLDEN = pathlib.Path(__file__).parent / 'golden'
FAMILIES = (
  'gpt2',
  'gptj',
  'gpt_neox',
  'llama2',
  'llama3',
  'mistral',
  'qwen2',
  'qwen3',
  'gemma',
  'gemma2',
  'gemma3',
)
MESHES = ((1, 8, 1), (2, 2, 2), (8, 1, 1), (1, 1, 8))
# Eight rows for every device in a step, four of their sizes found in no other
# axis nor made by two of a device's own: 48 or 24 are the rows of all devices.
NUM_ROWS, PROMPT, RESPONSE, TEXT = 48, 6, 7, 16
TOLERANCE = {'rtol': 1e-4, 'atol': 2e-5}


def shape_of(family: str) -> TransformerConfig:
  """A tiny model of the family whose axes eight devices divide."""
  values = json.loads(str(np.load(GOLDEN / f'family_{family}.npz')['config']))
  sizes = {
    'vocab_size': 53,
    'n_embd': 32,
    'n_head': 8,
    'n_positions': 40,
    'hidden_size': 32,
    'num_attention_heads': 16,
    'num_key_value_heads': 8,
    'max_position_embeddings': 40,
    'intermediate_size': 40,
    'head_dim': 10,
    'rotary_dim': 2,
    'sliding_window': 4,
  }
  values |= {key: size for key, size in sizes.items() if key in values}
  for key in ('num_hidden_layers', 'n_layer'):
    if key in values:
      values[key] = 2
  if 'layer_types' in values:
    values['layer_types'] = values['layer_types'][:2]  # One has the window.
  if family == 'gpt_neox':
    values['rope_parameters']['partial_rotary_factor'] = 1.0
  shape = TransformerConfig.from_hf(values).to_dict()
  return TransformerConfig.from_dict(
    shape | {'vocab_multiple': 8, 'scan_unroll': 1}
  )


# --- Layouts ------------------------------------------------------------------

# By the last part of a parameter's name; layers are stacked in front.
SPECS = {
  'token_embedding': P('tensor', 'fsdp'),
  'unembedding': P('tensor', 'fsdp'),
  'position_embedding': P(None, 'fsdp'),
  'query_kernel': P(None, 'fsdp', 'tensor', None),
  'key_kernel': P(None, 'fsdp', 'tensor', None),
  'value_kernel': P(None, 'fsdp', 'tensor', None),
  'out_kernel': P(None, 'tensor', None, 'fsdp'),
  'up_kernel': P(None, 'fsdp', 'tensor'),
  'gate_kernel': P(None, 'fsdp', 'tensor'),
  'down_kernel': P(None, 'tensor', 'fsdp'),
}


def name_of(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/').split('/')[-1]


# Published shapes, as their config.json has them.
PUBLISHED = {
  'gpt2': {'n_embd': 1024, 'n_head': 16, 'n_layer': 24, 'n_positions': 1024},
  'gptj': {'n_embd': 4096, 'n_head': 16, 'n_layer': 28, 'n_positions': 2048},
  'gpt_neox': {
    'hidden_size': 6144,
    'num_attention_heads': 64,
    'num_hidden_layers': 44,
    'intermediate_size': 24576,
    'max_position_embeddings': 2048,
  },
  'llama2': {'num_key_value_heads': 32, 'intermediate_size': 11008},
  'llama3': {},
  'mistral': {},
  'qwen2': {
    'hidden_size': 8192,
    'num_attention_heads': 64,
    'num_hidden_layers': 80,
    'intermediate_size': 29568,
  },
  'qwen3': {'num_hidden_layers': 36, 'intermediate_size': 12288},
  'gemma': {
    'hidden_size': 3072,
    'num_attention_heads': 16,
    'num_key_value_heads': 16,
    'num_hidden_layers': 28,
    'intermediate_size': 24576,
    'head_dim': 256,
  },
  'gemma2': {
    'hidden_size': 3584,
    'num_attention_heads': 16,
    'num_hidden_layers': 42,
    'head_dim': 256,
  },
  'gemma3': {
    'hidden_size': 5376,
    'num_key_value_heads': 16,
    'num_hidden_layers': 62,
    'intermediate_size': 21504,
  },
}
USUAL = {
  'vocab_size': 50_304,
  'hidden_size': 4096,
  'num_attention_heads': 32,
  'num_key_value_heads': 8,
  'num_hidden_layers': 32,
  'intermediate_size': 14336,
  'head_dim': 128,
  'max_position_embeddings': 8192,
  'rotary_dim': 64,
}


def published_shape(family: str) -> TransformerConfig:
  values = json.loads(str(np.load(GOLDEN / f'family_{family}.npz')['config']))
  values |= {key: size for key, size in USUAL.items() if key in values}
  values |= PUBLISHED[family]
  if 'layer_types' in values:
    values['layer_types'] = ['full_attention'] * values['num_hidden_layers']
  return TransformerConfig.from_hf(values)


def large_and_whole(tree) -> list[str]:
  return [
    jax.tree_util.keystr(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if leaf.size * leaf.dtype.itemsize > 2**20
    and leaf.sharding.shard_shape(leaf.shape) == leaf.shape
  ]


def boxed_state(kind: str, shape: TransformerConfig):
  """A train state's shapes and axis names: what every layout comes from."""
  module = model_fns.make_module(kind, shape)
  optimizer = rl.make_optimizers(ppo_config.get_config('gpt2'))['policy']
  return jax.eval_shape(
    lambda key: train_state.create(model_fns._init_fn(module)(key), optimizer),
    jax.random.key(0),
  )


@pytest.mark.parametrize('name', [*PRESETS, *FAMILIES])
def test_full_sizes_lie_by_the_table_and_nothing_large_is_whole(name):
  """Weights and Adam's moments of published shapes; averages and frozen models
  lie like the weights.

  On 8 x 1 x 1 all is whole on purpose: `data` makes replicas.
  """
  if name in PRESETS:
    shape = TransformerConfig.from_dict(PRESETS[name])
  else:
    shape = published_shape(name)
  boxed = boxed_state('scalar' if name == '6b' else 'policy', shape)
  for mesh_shape in MESHES:
    mesh = sharding.make_mesh(mesh_shape)
    state = sharding.with_shardings(
      sharding.unbox(boxed), sharding.param_shardings(boxed, mesh)
    )
    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
      leaf_name = name_of(path)
      # Positions have no tensor axis: without fsdp they are cut as large.
      if leaf_name == 'position_embedding' and mesh_shape == (1, 1, 8):
        assert leaf.sharding.spec == P(None, 'tensor')
      elif leaf_name in SPECS:
        seen.add(leaf_name)
        assert leaf.sharding.spec == SPECS[leaf_name], path
    assert len(seen) >= 7
    found = large_and_whole(state)
    assert bool(found) == (mesh_shape == (8, 1, 1)), found
    # All of it: an equal part on each device, and a little more.
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    held = sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(state)
    )
    _, fsdp, tensor = mesh_shape
    assert total <= held * fsdp * tensor <= 1.03 * total


def test_states_that_a_run_makes_lie_like_the_described_ones():
  """Not described but made: moments, moving average and frozen models."""
  mesh = sharding.make_mesh((2, 2, 2))
  shape = shape_of('qwen3')
  with sharding.use_mesh(mesh):
    model = model_fns.init('policy', shape, mesh, jax.random.key(0))
    optimizer = rl.make_optimizers(ppo_config.get_config('gpt2'))['policy']
    state = train_state.create(jax.tree.map(jnp.copy, model.params), optimizer)
    frozen = jax.tree.map(lambda x: x.astype('bfloat16'), model.params)
  described, _ = model_fns.abstract_state('policy', shape, mesh, optimizer)
  for made, wanted in (
    (state.params, described.params),
    (frozen, described.params),
    (state.opt_state, described.opt_state),
  ):
    jax.tree.map(
      lambda a, b: (
        a.sharding.is_equivalent_to(b.sharding, a.ndim)
        or pytest.fail(f'{a.sharding} is not {b.sharding}')
      ),
      made,
      wanted,
    )


# --- Numbers ------------------------------------------------------------------


def prompts() -> PromptBatch:
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, PROMPT + 1, NUM_ROWS)
  mask = np.arange(PROMPT)[None] >= PROMPT - lengths[:, None]
  tokens = np.where(mask, rng.integers(2, 53, mask.shape), 0).astype(np.int32)
  return PromptBatch(tokens, mask, np.arange(NUM_ROWS, dtype=np.int32))


def text(seed: int) -> TextBatch:
  """Two documents a row, and padding."""
  rng = np.random.default_rng(seed)
  first, last = rng.integers(2, 7, (NUM_ROWS, 1)), rng.integers(9, TEXT + 1)
  columns = np.arange(TEXT)[None]
  segments = np.where(columns < first, 1, np.where(columns < last, 2, 0))
  mask = segments > 0
  loss_mask = mask & (columns > 0) & (columns != first)
  tokens = np.where(mask, rng.integers(2, 53, mask.shape), 0).astype(np.int32)
  return TextBatch(tokens, mask, loss_mask, segments.astype(np.int32))


def comparisons() -> PackedComparisons:
  """Three candidates a prompt, one to a segment, two segments a row."""
  rng = np.random.default_rng(3)
  num_prompts = 16
  tokens = rng.integers(2, 53, (NUM_ROWS, TEXT)).astype(np.int32)
  segments = np.repeat([[1, 2]], TEXT // 2, axis=1).reshape(1, TEXT)
  segments = np.sort(np.broadcast_to(segments, (NUM_ROWS, TEXT)), axis=1)
  ends = np.arange(num_prompts * 3).reshape(num_prompts, 3) * TEXT + TEXT - 1
  ranks = np.tile([[1, 2, 3], [2, 1, 1]], (num_prompts, 1, 1))
  ranks[::4, 0, 2] = 2  # A tie.
  ranks[::3, 1] = 0  # Only one labeler.
  return PackedComparisons(
    tokens,
    segments.astype(np.int32),
    ends.astype(np.int32),
    ranks.astype(np.int32),
    np.ones(num_prompts, bool),
  )


def stages():
  """The experiments' configs, for so few and short rows."""
  stages = ppo_config.get_config('miniature').copy_and_resolve_references()
  stages = stages.stages
  with stages.unlocked():
    stages.sft.batch_size = NUM_ROWS
    stages.sft.num_microbatches = 2
    stages.reward.num_microbatches = 1
    stages.ppo_ptx.batch_size = NUM_ROWS
    stages.ppo_ptx.num_minibatches = 2
    stages.ppo_ptx.prompt_length = PROMPT
    stages.ppo_ptx.response_length = RESPONSE
    stages.ppo_ptx.ptx_row_length = TEXT
    stages.ppo_ptx.ptx_per_episode = 1
    stages.ppo_ptx.num_warmup_iterations = 0
    # Alone in their rows: numbers of rows, and so layouts, depend on the mesh
    # where they are dense.
    stages.ppo_ptx.pack = False
  return stages.sft, stages.reward, stages.ppo_ptx


@functools.cache
def weights(family: str, kind: str, seed: int):
  """Far from a fresh model's, so that everything matters."""
  rng = np.random.default_rng(seed)
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  return jax.tree_util.tree_map_with_path(
    lambda path, x: np.float32(
      ('scale' in jax.tree_util.keystr(path)) + rng.normal(0, 0.3, x.shape)
    ),
    model_fns.abstract_params(kind, shape_of(family), mesh),
  )


def means(metrics):
  """As they are logged; a sum of many signs has no scale of its own."""
  return {
    name: (summed / jnp.maximum(weight, 1), weight)
    for name, (summed, weight) in jax.device_get(metrics).items()
  }


def run_everything(family: str, mesh_shape) -> dict:
  """A step of SFT and of the reward model, and an iteration of PPO-ptx.

  Returns:
    The numbers on the host, and `texts`, the compiled programs of PPO.
  """
  mesh = sharding.make_mesh(mesh_shape, jax.devices()[: math.prod(mesh_shape)])
  shape = shape_of(family)
  sft_config, reward_config, config = stages()
  key = jax.random.key(5)

  def place(kind, seed):
    layout = model_fns.abstract_params(kind, shape, mesh)
    return jax.device_put(
      weights(family, kind, seed), sharding.shardings_of(layout)
    )

  def update_of(programs, kind, batch):
    state = train_state.create(place(kind, 0), programs['optimizer'])
    state, metrics = programs['update'](
      state, {}, sharding.put_batch(batch, mesh), key
    )
    # Adam's first moment after one step: a tenth of the clipped gradient.
    return state.opt_state[1].mu, means(metrics)

  policy_module = model_fns.make_module('policy', shape)
  scalar_module = model_fns.make_module('scalar', shape)
  texts, numbers = {}, {}
  with sharding.use_mesh(mesh):
    numbers['sft'] = update_of(
      sft.build_programs(sft_config, policy_module, 10), 'policy', text(1)
    )
    numbers['reward'] = update_of(
      reward.build_programs(reward_config, scalar_module, 10),
      'scalar',
      comparisons(),
    )
    programs = ppo_ptx.build_programs(
      config, policy_module, scalar_module, (1, 7)
    )

    def call(name, *arguments):
      compiled = programs[name].lower(*arguments).compile()
      texts[name] = compiled.as_text()
      # One at a time: programs in flight together can starve each other of the
      # threads that eight fake devices need.
      return jax.block_until_ready(compiled(*arguments))

    optimizers = rl.make_optimizers(config)
    state = ppo.RLState(
      policy=train_state.create(place('policy', 0), optimizers['policy']),
      value=train_state.create(place('scalar', 1), optimizers['value']),
      ema=place('policy', 0),
      kl=rewards.KLState(coef=jnp.float32(0.1)),
    )
    frozen = {'reference': place('policy', 0)}
    asked = sharding.put_batch(prompts(), mesh)
    sampled = call('respond', state.policy.params, asked, key)
    numbers['samples'] = sampled
    layout = rl.lay_out(config, programs, sampled, mesh, 0)
    scores = call('score', place('scalar', 2), sampled, layout)
    numbers['scores'] = scores
    batch, kl, metrics = call(
      'penalise', state, frozen, sampled, layout, scores
    )
    numbers['batch'], numbers['penalise'] = batch, means(metrics)
    rows = sharding.put_batch(text(2), mesh)
    state, metrics = call('train', state, frozen, batch, rows, kl, key)
    numbers['train'] = means(metrics)
    # Adam's steps depend on the sign of gradients near 0: moments, not steps.
    numbers['policy moments'] = state.policy.opt_state[1].mu
    numbers['value moments'] = state.value.opt_state[1].mu
    numbers['weights'] = (state.policy.params, state.value.params, state.ema)
  return {'texts': texts, **jax.device_get(numbers)}


@functools.cache
def on_one_device(family: str):
  return run_everything(family, (1, 1, 1))


def compare(family: str, mesh_shape):
  """Asserts equal tokens, and all else within the tolerance.

  float32: 1e-4 of the value or 2e-5; weights, of size 1, within 1e-4 (a step
  of Adam is 2e-4, of either sign where a gradient is rounding alone).
  """
  expected = on_one_device(family)
  found = run_everything(family, mesh_shape)
  np.testing.assert_array_equal(
    found['samples'].tokens, expected['samples'].tokens
  )
  for name in expected:
    if name == 'texts':
      continue
    tolerance = TOLERANCE
    if name == 'weights':
      tolerance = {'rtol': 0, 'atol': 1e-4}

    def check(path, got, wanted, name=name, tolerance=tolerance):
      if not jnp.issubdtype(wanted.dtype, jnp.floating):
        np.testing.assert_array_equal(got, wanted)
        return
      np.testing.assert_allclose(
        got,
        wanted,
        err_msg=f'{name} {jax.tree_util.keystr(path)}',
        **tolerance,
      )

    jax.tree_util.tree_map_with_path(check, found[name], expected[name])
  return found


def rows_of_all_devices(text: str) -> list[str]:
  """Arrays of a partitioned program with an axis of all rows (48, or the 24 of
  a minibatch) that are larger than a few numbers for each token of them."""
  found = set()
  for kind, sizes in re.findall(r'\b([a-z]+\d+)\[([\d,]+)\]', text):
    sizes = [int(size) for size in sizes.split(',')]
    rows = next((size for size in sizes if size in (48, 24)), 0)
    if rows and math.prod(sizes) > rows * TEXT:
      found.add(f'{kind}{sizes}')
  return sorted(found)


@pytest.mark.slow
def test_a_mesh_changes_no_number_and_every_device_has_its_own_rows():
  found = compare('qwen3', (2, 2, 2))
  alone = on_one_device('qwen3')
  for name in ('respond', 'score', 'penalise', 'train'):
    # The search itself finds rows where there is one device.
    assert rows_of_all_devices(alone['texts'][name])
    assert not rows_of_all_devices(found['texts'][name]), name


@pytest.mark.slow
@pytest.mark.parametrize('mesh_shape', MESHES)
@pytest.mark.parametrize('family', FAMILIES)
def test_every_family_on_every_mesh(family, mesh_shape):
  compare(family, mesh_shape)
