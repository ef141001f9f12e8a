"""Flash attention, in the interpreter, and chunked log-probabilities."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax import model_fns
from instruct_jax.infra import sharding
from instruct_jax.models import attention
from instruct_jax.models.config import TransformerConfig

pytestmark = pytest.mark.usefixtures('quick_compile')

CONFIG = TransformerConfig(
  vocab_size=38,
  context_length=256,
  num_layers=2,
  width=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=64,
  mlp_dim=32,
  vocab_multiple=8,
  attention='flash',
)
B, T = 4, 128
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}


def rows(seed=0):
  """Packed segments, a row padded on the left, one on the right, a full one."""
  rng = np.random.default_rng(seed)
  segments = np.zeros((B, T), np.int32)
  segments[0, :50], segments[0, 50:110] = 1, 2
  segments[1, 40:] = 1
  segments[2, :70] = 1
  segments[3] = 1
  tokens = rng.integers(2, 30, (B, T)).astype(np.int32) * (segments > 0)
  return jnp.asarray(tokens), jnp.asarray(segments)


def by_hand(queries, keys, values, segments, scale):
  """Softmax attention in float64, one query at a time."""
  mixed = np.zeros(queries.shape)
  num_groups = queries.shape[1] // keys.shape[1]
  for b, n, t in np.ndindex(queries.shape[:3]):
    if segments[b, t] == 0:
      continue
    seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
    scores = keys[b, n // num_groups, seen] @ queries[b, n, t] * scale
    weights = np.exp(scores - scores.max())
    mixed[b, n, t] = weights / weights.sum() @ values[b, n // num_groups, seen]
  return mixed


def test_splash_equals_attention_by_hand():
  _, segments = rows()
  rng = np.random.default_rng(1)
  queries = rng.normal(size=(B, 4, T, 64)).astype(np.float32)
  keys, values = rng.normal(size=(2, B, 2, T, 64)).astype(np.float32)
  mixed = attention.flash(
    CONFIG, 'splash', *map(jnp.asarray, (queries, keys, values)), segments
  )
  expected = by_hand(
    *(x.astype(np.float64) for x in (queries, keys, values)),
    np.asarray(segments),
    64**-0.5,
  )
  real = np.asarray(segments)[:, None, :, None] > 0
  np.testing.assert_allclose(np.where(real, mixed, 0), expected, **CLOSE)


@functools.cache
def params():
  rng = np.random.default_rng(3)
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.asarray(
      ('scale' in jax.tree_util.keystr(path)) + rng.normal(0, 0.2, x.shape),
      jnp.float32,
    ),
    model_fns.abstract_params(
      'policy', CONFIG, sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    ),
  )


def loss_and_gradients(config, mesh=None):
  """A sum over the real tokens' log-probabilities, each with its own weight."""
  tokens, segments = rows()
  logprobs_fn = model_fns.logprobs_fn(model_fns.make_module('policy', config))
  weights = jnp.asarray(np.random.default_rng(5).normal(size=(B, T)))
  # A segment's first token is predicted from what is not its own.
  real = (segments > 0) & (segments == jnp.roll(segments, 1, axis=1))
  real &= jnp.arange(T)[None] > 0

  def loss(params):
    logprobs = logprobs_fn(params, tokens, segments)[0]
    logprobs = jnp.where(real, logprobs, 0.0)
    return jnp.sum(logprobs * weights), logprobs

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  if mesh is None:
    return run(params())
  shardings = sharding.shardings_of(
    model_fns.abstract_params('policy', config, mesh)
  )
  with sharding.use_mesh(mesh):
    return jax.device_get(run(jax.device_put(params(), shardings)))


@functools.cache
def plain():
  return loss_and_gradients(dataclasses.replace(CONFIG, attention='xla'))


def assert_close(a, b):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4), a, b
  )


def test_flash_equals_plain_in_values_and_gradients_on_a_mesh():
  # Rows over data 2 x fsdp 2, heads over tensor 2.
  mesh = sharding.make_mesh((2, 2, 2))
  found = loss_and_gradients(CONFIG, mesh)
  assert_close(found, jax.device_get(plain()))
  # The plain program must not have been compared with itself.
  with sharding.use_mesh(mesh):
    assert attention.choose(CONFIG, B, T) == 'splash'


@pytest.mark.parametrize('chunk', [50, 127])
def test_chunks_change_neither_values_nor_gradients(chunk):
  config = dataclasses.replace(CONFIG, attention='xla', logprob_chunk=chunk)
  assert_close(loss_and_gradients(config), plain())


def test_chunked_logits_never_exist_as_a_whole():
  config = dataclasses.replace(CONFIG, attention='xla', logprob_chunk=32)
  module = model_fns.make_module('policy', config)
  tokens, segments = rows()

  def loss(params):
    return jnp.sum(model_fns.logprobs_fn(module)(params, tokens, segments)[0])

  text = str(jax.make_jaxpr(jax.grad(loss))(params()))
  assert f'f32[{B},32,{config.vocab_rows}]' in text
  for length in (T, T - 1):
    assert f'[{B},{length},{config.vocab_rows}]' not in text
    assert f'[{B * length},{config.vocab_rows}]' not in text


def test_prompts_are_read_by_the_kernel_and_continued_without_it():
  tokens, _ = rows()
  tokens, length = tokens[1:2], jnp.asarray([T - 3], jnp.int32)
  results = []
  for config in (CONFIG, dataclasses.replace(CONFIG, attention='xla')):
    decoder = model_fns.decoder(model_fns.make_module('policy', config))

    @jax.jit
    def run(params, decoder=decoder):
      weights = decoder.prepare(params)
      cache = decoder.read(weights, tokens, length)
      return decoder.step(weights, jnp.asarray([7]), length, cache)[0]

    results.append(run(params()))
  assert_close(*results)


@pytest.mark.parametrize(
  ('changes', 'batch', 'num_tokens', 'message'),
  [
    ({}, 3, 128, '3 rows and 2 key heads do not divide'),
    ({}, 4, 200, '200 tokens are not a multiple of 128'),
    ({'head_dim': 32}, 4, 128, 'heads of 32 components'),
    (
      {'window': 16, 'window_layers': (True, False)},
      4,
      128,
      'window of 16 tokens',
    ),
  ],
)
def test_what_stops_the_kernel_is_named(changes, batch, num_tokens, message):
  config = dataclasses.replace(CONFIG, **changes)
  automatic = dataclasses.replace(config, attention='auto')
  with sharding.use_mesh(sharding.make_mesh((2, 2, 2))):
    with pytest.raises(ValueError, match=message):
      attention.choose(config, batch, num_tokens)
    # On CPU 'auto' is plain XLA, and short rows are so everywhere.
    assert attention.choose(automatic, batch, num_tokens) is None
    assert attention.choose(config, batch, 64) is None
