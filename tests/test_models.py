"""The Transformer, its heads and its shapes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from instruct_jax import model_fns, rollout, supervised
from instruct_jax.infra import sharding
from instruct_jax.models import decoding, transformer
from instruct_jax.models.config import PRESETS, TransformerConfig
from instruct_jax.types import TextBatch
from tests import tiny
from tests.tiny import CONFIG, B, P, R, T

pytestmark = pytest.mark.usefixtures('quick_compile')

# float32 sums in another order; between bfloat16 and float32 see below.
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}


def forward(tokens, segments):
  out = tiny.forward(
    tiny.params('policy'),
    tiny.params('scalar'),
    jnp.asarray(tokens, jnp.int32),
    jnp.asarray(segments, jnp.int32),
  )
  return jax.tree.map(np.asarray, out)


# --- Positions and padding ----------------------------------------------------


def test_positions():
  segments = jnp.array(
    [
      [0, 0, 1, 1, 1, 0],  # Padding on both sides.
      [1, 1, 2, 2, 2, 2],  # Packed.
      [0, 1, 1, 2, 3, 0],
    ]
  )
  positions = np.asarray(transformer.positions_of(segments))
  np.testing.assert_array_equal(positions[0, 2:5], [0, 1, 2])
  np.testing.assert_array_equal(positions[1], [0, 1, 0, 1, 2, 3])
  np.testing.assert_array_equal(positions[2, 1:5], [0, 1, 0, 0])
  # For a mask: max(cumsum(mask) - 1, 0) on the real tokens.
  mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
  np.testing.assert_array_equal(
    np.asarray(transformer.positions_of(jnp.array(mask)))[mask > 0],
    np.maximum(np.cumsum(mask, axis=1) - 1, 0)[mask > 0],
  )


def test_neither_padding_nor_neighbours_nor_packing_change_a_sequence(rng):
  """One sequence of 7 tokens, in every place a batch could put it."""
  sequence = rng.integers(2, 30, 7)
  tokens = rng.integers(0, 30, (B, T))  # Noise where padded, too.
  segments = np.zeros((B, T), int)
  offsets = [0, 1, 4, T - 7]  # Right-, both- and left-padded.
  for row, offset in enumerate(offsets):
    tokens[row, offset : offset + 7] = sequence
    segments[row, offset : offset + 7] = 1
  # Packed: as the second of two, as the first of two, as the third of three.
  packed = {4: (5, 2), 5: (0, 1), 6: (8, 3)}
  for row, (offset, number) in packed.items():
    segments[row] = 1 + (np.arange(T) >= 4) + (np.arange(T) >= 8)
    if row == 4:
      segments[row] = np.where(np.arange(T) < 5, 1, 2)
    if row == 5:
      segments[row] = np.where(np.arange(T) < 7, 1, 2)
    tokens[row, offset : offset + 7] = sequence
    segments[row, offset : offset + 7] = number
    segments[row, offset + 7 :] *= row == 5
  segments[7:] = 1  # The other rows are unrelated and full.
  out = forward(tokens, segments)

  def at(name, row, offset, start=0):
    return out[name][row, offset + start : offset + 7]

  for row, offset in [
    *enumerate(offsets),
    *((r, packed[r][0]) for r in packed),
  ]:
    for name, start in (('logits', 0), ('text_logprobs', 1), ('hidden', 0)):
      np.testing.assert_allclose(
        at(name, row, offset, start), at(name, 0, 0, start), **CLOSE
      )
    if row < 4:  # Scores and values are taken from unpacked rows.
      np.testing.assert_allclose(
        at('scalars', row, offset), at('scalars', 0, 0), **CLOSE
      )
  # And in another batch altogether, in another row.
  tokens[:] = rng.integers(2, 30, (B, T))
  segments[:] = 1
  tokens[9, 3:10], segments[9] = sequence, 0
  segments[9, 3:10] = 1
  other = forward(tokens, segments)
  for name in ('logits', 'scalars'):
    np.testing.assert_allclose(other[name][9, 3:10], out[name][0, :7], **CLOSE)


def test_only_earlier_tokens_of_the_same_segment_are_seen(rng):
  batch = tiny.text()
  tokens = np.array(batch.tokens)
  before = forward(tokens, batch.segments)
  changed = tokens.copy()
  changed[:, 5] = (tokens[:, 5] + 7) % 28 + 2
  after = forward(changed, batch.segments)
  reached = np.arange(T)[None] >= 5
  reached = reached & (batch.segments == batch.segments[:, 5:6])
  reached &= batch.mask
  for name in ('logits', 'scalars', 'hidden'):
    moved = np.abs(after[name] - before[name])
    moved = moved if moved.ndim == 2 else moved.max(axis=2)
    if name == 'scalars':  # It takes a mask: both documents are one text.
      seen = (np.arange(T)[None] >= 5) & batch.mask
    else:
      seen = reached
    assert (moved[seen] > 1e-4).all()
    assert moved[~seen & batch.mask].max() < 1e-6


def test_more_tokens_than_positions():
  with pytest.raises(ValueError, match='25 tokens in a context of 24'):
    jax.eval_shape(
      lambda t: tiny.POLICY.apply({'params': tiny.params('policy')}, t, t),
      jnp.ones((1, 25), jnp.int32),
    )


# --- Log-probabilities --------------------------------------------------------


def test_logprobs_and_entropies_against_a_loop():
  prompts = tiny.prompts()
  rng = np.random.default_rng(1)
  tokens = np.concatenate([prompts.tokens, rng.integers(2, 30, (B, R))], axis=1)
  mask = np.concatenate([prompts.mask, np.ones((B, R), bool)], axis=1)
  out = forward(tokens, mask)
  logits = out['logits'].astype(np.float64)
  assert not out['text_logprobs'][:, 0].any()
  for row in range(0, B, 5):
    for t in range(P, T):
      scaled = logits[row, t - 1] / tiny.TEMPERATURE
      scaled -= np.log(np.exp(scaled - scaled.max()).sum()) + scaled.max()
      entropy = -(np.exp(scaled) * scaled).sum()
      np.testing.assert_allclose(
        out['logprobs'][row, t - P], scaled[tokens[row, t]], rtol=1e-4
      )
      np.testing.assert_allclose(
        out['entropies'][row, t - P], entropy, rtol=1e-4
      )
      plain = logits[row, t - 1]
      plain = plain - np.log(np.exp(plain - plain.max()).sum()) - plain.max()
      np.testing.assert_allclose(
        out['text_logprobs'][row, t], plain[tokens[row, t]], rtol=1e-4
      )


def test_unused_rows_have_no_probability():
  out = forward(tiny.text().tokens, tiny.text().segments)
  assert out['logits'].shape == (B, T, 32)
  assert (out['logits'][..., 30:] == transformer.MASKED).all()
  probs = np.asarray(jax.nn.softmax(out['logits'], axis=-1))
  assert not probs[..., 30:].any()
  np.testing.assert_allclose(probs.sum(axis=-1), 1, rtol=1e-5)


# --- Decoding -----------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=2)
def decoded(tokens, lengths, num_steps):
  """Logits after each row's prompt and its next tokens, [num_steps, B, V]."""
  decoder = model_fns.decoder(tiny.POLICY)
  weights = decoder.prepare(tiny.params('policy'))
  bank = decoder.read(weights, tokens[:, :P], lengths)
  cache = rollout.put_first(
    decoder.make_cache(B, T),
    bank,
  )
  found = []
  for t in range(num_steps):
    place = lengths - 1 + t
    logits, cache = decoder.step(
      weights, tokens[jnp.arange(B), place], place, cache
    )
    found.append(logits)
  return jnp.stack(found)


def test_cached_decoding_equals_the_full_forward(rng):
  """Prompts of any length, one cache, every row at its own place."""
  tokens = jnp.asarray(rng.integers(2, 30, (B, T)), jnp.int32)
  lengths = np.asarray(rng.integers(1, P + 1, B), np.int32)
  full = np.asarray(forward(tokens, jnp.ones((B, T), jnp.int32))['logits'])
  for t, logits in enumerate(decoded(tokens, jnp.asarray(lengths), R)):
    wanted = full[np.arange(B), lengths - 1 + t]
    np.testing.assert_allclose(logits, wanted, **CLOSE)


def test_several_tokens_at_a_time_equal_one_by_one(rng):
  tokens = jnp.asarray(rng.integers(2, 30, (B, T)), jnp.int32)
  lengths = jnp.asarray(rng.integers(1, P + 1, B), jnp.int32)

  @jax.jit
  def at_once(tokens, lengths):
    weights = model_fns.decoder(tiny.POLICY).prepare(tiny.params('policy'))
    bank = decoding.read(tiny.POLICY, weights, tokens[:, :P], lengths)
    cache = decoding.make_cache(tiny.POLICY.config, B, T)
    cache = rollout.put_first(cache, bank)
    places = lengths[:, None] - 1 + jnp.arange(R)[None, :]
    more = jnp.take_along_axis(tokens, places, axis=1)
    x, _ = decoding.extend(tiny.POLICY, weights, more, lengths - 1, cache)
    return decoding.logits_of(tiny.POLICY, weights, x)

  np.testing.assert_allclose(
    jnp.swapaxes(at_once(tokens, lengths), 0, 1),
    decoded(tokens, lengths, R),
    **CLOSE,
  )


# --- Switches -----------------------------------------------------------------


def make_loss(config):
  """Jitted value and gradient of the mean text loss of a policy."""
  loss_fn = supervised.make_text_loss(
    model_fns.logprobs_fn(model_fns.make_module('policy', config))
  )

  def mean_loss(params, batch):
    summed, (count, _) = loss_fn(params, {}, batch, jax.random.key(0))
    return summed / count

  return jax.jit(jax.value_and_grad(mean_loss))


def text_batch():
  return jax.tree.map(jnp.asarray, tiny.text())


@pytest.fixture(scope='module')
def plain_loss():
  """Loss and gradients without any switch."""
  return make_loss(CONFIG)(tiny.params('policy'), text_batch())


@pytest.mark.parametrize(
  'changes', [{'remat': 'dots'}, {'remat': 'full', 'scan_unroll': 2}], ids=str
)
def test_memory_switches_change_no_number(plain_loss, changes):
  got = make_loss(dataclasses.replace(CONFIG, **changes))(
    tiny.params('policy'), text_batch()
  )
  tiny.assert_trees_close(got, plain_loss, **CLOSE)


def text_logprobs(drops, **changes):
  """Jitted key -> log-probabilities of the text, with another config."""
  module = model_fns.make_module(
    'policy', dataclasses.replace(CONFIG, **changes)
  )
  function = model_fns.logprobs_fn(module)
  batch = text_batch()
  return jax.jit(
    lambda key: function(
      tiny.params('policy'),
      batch.tokens,
      batch.segments,
      dropout_key=key if drops else None,
    )[0]
  )


def test_dropout():
  plain = forward(tiny.text().tokens, tiny.text().segments)['text_logprobs']
  drop = text_logprobs(True, dropout=0.2)
  keys = [jax.random.key(seed) for seed in (0, 0, 1)]
  first, same, other = (np.asarray(drop(key)) for key in keys)
  np.testing.assert_array_equal(first, same)
  assert np.abs(first - other).max() > 0.1
  assert np.abs(first - plain).max() > 0.1
  # Off: the rate in the config changes nothing, whatever the key.
  off = text_logprobs(False, dropout=0.2)
  for key in keys[1:]:
    np.testing.assert_allclose(off(key), plain, **CLOSE)


def test_bfloat16_compute_stays_near_float32_and_returns_float32():
  plain = forward(tiny.text().tokens, tiny.text().segments)['text_logprobs']
  got = text_logprobs(False, compute_dtype='bfloat16')(jax.random.key(0))
  assert got.dtype == jnp.float32
  real = tiny.text().loss_mask
  # bfloat16 has 8 bits of mantissa: a part in 256 in each of a few sums.
  assert 0 < np.abs(np.asarray(got) - plain)[real].mean() < 0.05


# --- Initialisation -----------------------------------------------------------


def test_reward_head_starts_as_in_the_paper():
  """N(0, 1/(d_model + 1)), bias 0, on the policy's own trunk."""
  config = TransformerConfig(
    vocab_size=8,
    context_length=4,
    num_layers=1,
    width=4096,
    num_heads=1,
    head_dim=1,
    mlp_dim=1,
    vocab_multiple=8,
  )
  mesh = tiny.one_device()
  policy = model_fns.init('policy', config, mesh, jax.random.key(0))
  reward = model_fns.scalar_from_policy(policy, mesh, jax.random.key(1))
  kernel = np.asarray(reward.params['head_kernel'])
  # 4096 draws know their standard deviation to 1.1 %.
  np.testing.assert_allclose(kernel.std(), 4097**-0.5, rtol=0.05)
  assert abs(kernel.mean()) < 4 * 4097**-0.5 / 64
  assert reward.params['head_bias'] == 0.0
  tiny.assert_trees_equal(reward.params['trunk'], policy.params['trunk'])
  for ours, theirs in zip(
    jax.tree.leaves(reward.params['trunk']),
    jax.tree.leaves(policy.params['trunk']),
    strict=True,
  ):
    assert ours is not theirs  # Either may be donated.


@pytest.mark.parametrize(
  ('name', 'billions'), [('1p3b', 1.3), ('6b', 6.7), ('175b', 175)]
)
def test_presets_build_on_a_mesh(name, billions):
  config = TransformerConfig(**PRESETS[name])
  mesh = sharding.make_mesh((1, 2, 4))
  policy = model_fns.abstract_params('policy', config, mesh)
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(policy))
  assert count == config.num_params
  np.testing.assert_allclose(count, billions * 1e9, rtol=0.025)
  assert config.num_heads * config.head_dim == config.width
  value = model_fns.abstract_params('scalar', config, mesh)
  scalar_count = sum(math.prod(x.shape) for x in jax.tree.leaves(value))
  assert scalar_count == count + config.width + 1
  specs = {
    name: x.sharding.spec
    for name, x in policy['trunk']['layers'].items()
    if name.endswith('kernel')
  }
  assert specs == {
    'query_kernel': PartitionSpec(None, 'fsdp', 'tensor', None),
    'key_kernel': PartitionSpec(None, 'fsdp', 'tensor', None),
    'value_kernel': PartitionSpec(None, 'fsdp', 'tensor', None),
    'out_kernel': PartitionSpec(None, 'tensor', None, 'fsdp'),
    'up_kernel': PartitionSpec(None, 'fsdp', 'tensor'),
    'down_kernel': PartitionSpec(None, 'tensor', 'fsdp'),
  }
  assert policy['trunk']['token_embedding'].sharding.spec == PartitionSpec(
    'tensor', 'fsdp'
  )


def test_config_round_trip_and_errors():
  values = CONFIG.to_dict()
  assert TransformerConfig.from_dict(values) == CONFIG
  assert (CONFIG.vocab_rows, CONFIG.vocab_size) == (32, 30)
  with pytest.raises(ValueError, match=r"unknown model keys \['depth'\]"):
    TransformerConfig.from_dict(values | {'depth': 3})
  del values['width']
  with pytest.raises(ValueError, match="incomplete: .*'width'"):
    TransformerConfig.from_dict(values)
  for changes, message in [
    ({'width': 0}, 'model.width must be a positive integer: 0'),
    ({'num_heads': -1}, 'model.num_heads must be'),
    ({'dropout': 1.0}, r'model.dropout must be in \[0, 1\): 1.0'),
    ({'compute_dtype': 'float16'}, "compute_dtype must be one of .*'float16'"),
    ({'remat': 'all'}, "remat must be one of .*'all'"),
  ]:
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(CONFIG, **changes)


def test_unknown_kind():
  with pytest.raises(ValueError, match=r"\['policy', 'scalar'\]: 'value'"):
    model_fns.make_module('value', CONFIG)


# --- Meshes -------------------------------------------------------------------


@functools.cache
def loss_and_outputs(mesh_shape):
  """A policy's loss and gradients, and scalars, on a mesh."""
  devices = jax.devices()[: math.prod(mesh_shape)]
  mesh = sharding.make_mesh(mesh_shape, devices)
  params = {}
  for kind in ('policy', 'scalar'):
    shardings = sharding.shardings_of(
      model_fns.abstract_params(kind, CONFIG, mesh)
    )
    params[kind] = jax.device_put(tiny.params(kind), shardings)

  def mean_loss(policy, scalar, batch: TextBatch):
    loss_fn = supervised.make_text_loss(model_fns.logprobs_fn(tiny.POLICY))
    summed, (count, _) = loss_fn(policy, {}, batch, jax.random.key(0))
    scalars = model_fns.scalars_fn(tiny.SCALAR)(
      scalar, batch.tokens, batch.mask
    )
    return summed / count, scalars

  with sharding.use_mesh(mesh):
    batch = sharding.put_batch(tiny.text(), mesh)
    out = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(
      params['policy'], params['scalar'], batch
    )
  return params, out


@pytest.mark.parametrize('mesh_shape', [(8, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_every_mesh_gives_the_numbers_of_one_device(mesh_shape):
  _, expected = loss_and_outputs((1, 1, 1))
  params, got = loss_and_outputs(mesh_shape)
  tiny.assert_trees_close(got, expected, **CLOSE)
  # The weights really are cut, and not copied to every device.
  kernel = params['policy']['trunk']['layers']['query_kernel']
  _, fsdp, tensor = mesh_shape
  assert kernel.sharding.spec == PartitionSpec(None, 'fsdp', 'tensor', None)
  assert kernel.addressable_shards[0].data.shape == (
    2,
    16 // fsdp,
    4 // tensor,
    4,
  )


def test_initialisation_on_a_mesh_gives_sharded_parameters():
  mesh = sharding.make_mesh((2, 2, 2))
  model = model_fns.init('policy', CONFIG, mesh, jax.random.key(3))
  alone = model_fns.init('policy', CONFIG, tiny.one_device(), jax.random.key(3))
  # The same draws; compiled for shards, the last bits may round otherwise.
  tiny.assert_trees_close(
    jax.device_get(model.params),
    jax.device_get(alone.params),
    rtol=1e-6,
    atol=1e-7,
  )
  embedding = model.params['trunk']['token_embedding']
  assert embedding.sharding.spec == PartitionSpec('tensor', 'fsdp')
  assert embedding.addressable_shards[0].data.shape == (16, 8)


def test_a_mesh_that_does_not_divide_is_named():
  config = dataclasses.replace(CONFIG, num_heads=3)
  with pytest.raises(ValueError, match="'heads' of size 3 .* 4 parts"):
    model_fns.abstract_params('policy', config, sharding.make_mesh((1, 2, 4)))
