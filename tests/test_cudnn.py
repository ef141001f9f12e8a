"""cuDNN's attention over packed rows; what runs without a GPU."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import plan as config_file
from configs import speed as speed_file
from experiments import ppo_ptx
from instruct_jax import model_fns, packing, types
from instruct_jax.data import loader
from instruct_jax.infra import cost, sharding
from instruct_jax.jobs import plan, speed
from instruct_jax.models import attention, cudnn
from instruct_jax.models.config import TransformerConfig


@pytest.fixture(scope='module')
def h100():
  """A mesh of one described H100."""
  if importlib.util.find_spec('jax_cuda12_plugin') is None:
    pytest.skip('pip install -r requirements-plan-gpu.txt')
  devices = plan.topology_devices(config_file.get_config('135m,h100-1'))
  return sharding.make_mesh((1, 1, 1), devices)


def test_where_segments_are_by_hand():
  segments = jnp.array([[1, 1, 2, 2, 2, 3, 0, 0], [1] * 8, [0] * 8])
  lengths, offsets = cudnn.lengths_and_offsets(segments)
  assert lengths.shape == (3, 8) and offsets.shape == (3, 9)
  assert lengths[:, :4].tolist() == [
    [2, 3, 1, -1],
    [8, -1, -1, -1],
    [-1, -1, -1, -1],
  ]
  assert offsets[:, :4].tolist() == [
    [0, 2, 5, -1],
    [0, -1, -1, -1],
    [-1, -1, -1, -1],
  ]


def test_a_row_of_text_has_no_more_segments_than_the_kernel():
  row, offset, number = loader._best_fit([3] * 500, 1000)
  assert number.max() == types.MAX_SEGMENTS
  assert (np.bincount(row)[:-1] == types.MAX_SEGMENTS).all()
  assert (offset == 3 * (number - 1)).all()


def test_a_row_of_episodes_has_no_more_segments_than_the_kernel():
  count = 2 * types.MAX_SEGMENTS
  sizes = packing.Sizes(
    prompt_columns=100,
    response_columns=100,
    num_minibatches=1,
    num_microbatches=1,
    num_epochs=1,
    num_shards=1,
    row_episodes=count,
    spare=1.1,
    multiple=8,
  )
  lengths = np.full(count, 1)
  groups = packing.deal_epochs(2 * lengths, sizes, (0,))
  layout = packing.lay_out(lengths, lengths, groups, sizes)
  assert layout.segments.max() <= types.MAX_SEGMENTS


def test_the_kernel_of_the_platform(monkeypatch):
  config = TransformerConfig(
    *(64, 4096, 2, 512, 2, 256, 64), compute_dtype='bfloat16', attention='flash'
  )
  monkeypatch.setattr(attention, 'platform', lambda: 'gpu')
  with cudnn.described_hopper():
    assert attention.choose(config, 2, 2048) == 'cudnn'
  with pytest.raises(ValueError, match='heads of 8 to 128 components: 256'):
    attention.choose(config, 2, 2048)


def compiled_gradient(mesh, num_heads, kv_heads, num_tokens):
  """Text of the gradient of attention on described GPUs, and its operations."""
  B, T, H = 4, num_tokens, 64
  config = TransformerConfig(
    *(64, T, 1, num_heads * H, num_heads, H, 64), num_kv_heads=kv_heads
  )

  def loss(queries, keys, values, segments):
    mixed = attention.flash(config, 'cudnn', queries, keys, values, segments)
    return jnp.sum(mixed.astype(jnp.float32) ** 2)

  arguments = [
    plan.rows_of(mesh, jnp.bfloat16, B, heads, T, H)
    for heads in (num_heads, kv_heads, kv_heads)
  ]
  with cudnn.described_hopper(), sharding.use_mesh(mesh):
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(
      *arguments, plan.rows_of(mesh, jnp.int32, B, T)
    )
    text = plan.compiled(traced, mesh).as_text()
  return text, cost.flops(traced.jaxpr)


@pytest.mark.parametrize('kv_heads', [8, 2])
def test_the_compiled_kernel_has_no_bias(h100, kv_heads):
  text, flops = compiled_gradient(h100, 8, kv_heads, 1024)
  assert '__cudnn$fmhaSoftmax"' in text
  assert '__cudnn$fmhaSoftmaxBackward"' in text
  assert 'ScaleBias' not in text
  assert '1024,1024]' not in text
  assert cost.num_kernels(text) == 2
  # Two products forwards and five backwards.
  assert flops == 7 * 2 * 4 * 8 * 1024**2 * 64


def test_rows_of_odd_length_have_a_gradient(h100):
  text, _ = compiled_gradient(h100, 8, 8, 565)
  assert '__cudnn$fmhaSoftmaxBackward"' in text


def test_the_kernel_gets_rows_of_even_length(monkeypatch):
  """One column of padding more, which is cut from the result."""
  shapes = []

  def attend(queries, keys, values, segments, scale):
    shapes.append((queries.shape, keys.shape, segments.shape))
    assert not segments[:, -1].any() and not values[:, :, -1].any()
    return scale * queries

  monkeypatch.setattr(cudnn, 'attend', attend)
  config = TransformerConfig(64, 5, 1, 8, 2, 4, 8)
  queries = jnp.arange(80.0).reshape(2, 2, 5, 4)
  with cudnn.described_hopper():
    mixed = attention.flash(
      config, 'cudnn', queries, queries, queries, jnp.ones((2, 5), jnp.int32)
    )
  assert shapes == [((2, 2, 6, 4), (2, 2, 6, 4), (2, 6))]
  np.testing.assert_array_equal(mixed, config.score_scale * queries)


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['h100-1', 'h100-8', 'h100-2x8'])
@pytest.mark.parametrize('name', list(plan.PIECES))
def test_every_program_compiles_for_gpus(h100, topology, name):
  del h100  # Skips without what it needs.
  config = config_file.get_config(f'135m,{topology}')
  devices = plan.topology_devices(config)
  with cudnn.described_hopper():
    mesh = sharding.make_mesh((1, -1, 1), devices)
    row = plan.measure(name, config, mesh, 'dots', 1)
  assert row['missing'] < 0
  # Sampling reads one token a row, with weights that were gathered before.
  decodes = name == 'decode'
  assert (row['kernels'] > 0) == (not decodes)
  is_cut = len(devices) > 1 and not decodes
  assert (sum(row['collectives'].values()) > 0) == is_cut


def speed_config_of(size):
  """A plan for the works of infra/gpu.sh at a size, and their own config."""
  works = speed_file.get_config(f'{size},iteration')
  config = config_file.get_config('135m,h100-1')
  for name in ('policy', 'scalar', 'ppo', 'sft'):
    config[name] = works[name].copy_and_resolve_references()
  config.policy.compute_dtype = config.scalar.compute_dtype = 'bfloat16'
  return config, works


@pytest.mark.slow
@pytest.mark.parametrize('size', ['s', '135m', '1p3b'])
@pytest.mark.parametrize('name', [n for n in plan.PIECES if n != 'reward'])
def test_every_work_of_the_script_compiles_for_a_gpu(h100, size, name):
  config, works = speed_config_of(size)
  parts = {'train': works.ppo.num_microbatches}
  parts |= dict.fromkeys(('score', 'penalise'), works.ppo.num_slices)
  with cudnn.described_hopper():
    row = plan.measure(
      *(name, config, h100, works.policy.remat),
      parts=parts.get(name, 1),
    )
  assert row['missing'] < 0


@pytest.mark.slow
@pytest.mark.parametrize('size', ['s', '135m', '1p3b'])
def test_every_rollout_of_the_script_compiles_for_a_gpu(h100, size):
  config, works = speed_config_of(size)
  stage = config.ppo
  shape = dataclasses.replace(
    speed.shape_of(config, 'policy'), logprob_chunk=stage.logprob_chunk
  )
  programs = ppo_ptx.build_programs(
    stage,
    model_fns.make_module('policy', shape),
    model_fns.make_module('scalar', speed.shape_of(config, 'scalar')),
    (shape.vocab_size,),
  )
  B, P = stage.batch_size, stage.prompt_length
  prompts = types.PromptBatch(
    plan.rows_of(h100, jnp.int32, B, P),
    plan.rows_of(h100, bool, B, P),
    plan.rows_of(h100, jnp.int32, B),
  )
  params = model_fns.abstract_params('policy', shape, h100)
  with cudnn.described_hopper(), sharding.use_mesh(h100):
    traced = programs['respond'].trace(params, prompts, plan.described_key())
    memory = plan.compiled(traced, h100).memory_analysis()
  # Beside all that lies in memory while PPO trains.
  remat = works.policy.remat
  _, _, resident = plan.build('penalise', config, h100, remat, 1)
  kept = sum(cost.bytes_per_chip(tree) for tree in resident.values())
  assert kept + memory.temp_size_in_bytes < cost.CHIPS['h100'].memory
