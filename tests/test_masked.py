"""Averages over masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax import masked
from instruct_jax.infra import sharding


def ragged(rng, shape=(8, 6)):
  """Values, and a right-padded mask whose first row is empty."""
  values = rng.normal(2.0, 3.0, shape).astype(np.float32)
  lengths = rng.integers(1, shape[1] + 1, shape[0])
  lengths[0] = 0
  mask = np.arange(shape[1])[None] < lengths[:, None]
  return jnp.asarray(values), jnp.asarray(mask)


def test_by_hand():
  values = jnp.array([[1.0, 2.0, 9.0], [6.0, 9.0, 9.0]])
  mask = jnp.array([[True, True, False], [True, False, False]])
  assert masked.total(values, mask) == 9.0  # 1 + 2 + 6
  assert masked.metric(values, mask) == (9.0, 3.0)
  assert masked.mean(values, mask) == 3.0
  # ((1 - 3)^2 + (2 - 3)^2 + (6 - 3)^2) / 3 = 14 / 3
  np.testing.assert_allclose(masked.variance(values, mask), 14 / 3, rtol=1e-6)
  # (x - 3) / sqrt(14 / 3 = 4.6667) with sqrt = 2.160247
  np.testing.assert_allclose(
    masked.whiten(values, mask),
    [[-2 / 2.160247, -1 / 2.160247, 0], [3 / 2.160247, 0, 0]],
    rtol=1e-5,
  )
  assert masked.scalar(jnp.array(3)) == (3.0, 1.0)


def test_last_real_position():
  mask = jnp.array(
    [
      [True, True, False],  # Padded on the right.
      [False, True, True],  # On the left.
      [True, True, True],
      [False, False, False],  # Empty: column 0, by definition.
    ]
  )
  np.testing.assert_array_equal(masked.last_index(mask), [1, 2, 2, 0])


def test_against_a_loop(rng):
  values, mask = (np.asarray(x) for x in ragged(rng))
  kept = [
    float(values[i, j])
    for i in range(mask.shape[0])
    for j in range(mask.shape[1])
    if mask[i, j]
  ]
  mean = sum(kept) / len(kept)
  variance = sum((x - mean) ** 2 for x in kept) / len(kept)
  values, mask = jnp.asarray(values), jnp.asarray(mask)
  np.testing.assert_allclose(masked.total(values, mask), sum(kept), rtol=1e-5)
  np.testing.assert_allclose(masked.mean(values, mask), mean, rtol=1e-5)
  np.testing.assert_allclose(masked.variance(values, mask), variance, rtol=1e-5)
  white = np.asarray(masked.whiten(values, mask))
  np.testing.assert_allclose(
    white[np.asarray(mask)],
    (np.array(kept) - mean) / variance**0.5,
    rtol=1e-4,
    atol=1e-6,
  )
  assert not white[~np.asarray(mask)].any()


def test_nothing_unmasked_is_zero():
  values = jnp.full((2, 3), jnp.nan)
  mask = jnp.zeros((2, 3), bool)
  for function in (masked.total, masked.mean, masked.variance):
    assert function(values, mask) == 0.0
  np.testing.assert_array_equal(masked.whiten(values, mask), np.zeros((2, 3)))


@pytest.mark.parametrize('hidden', [np.nan, np.inf, 1e30])
@pytest.mark.parametrize('name', ['total', 'mean', 'variance', 'whiten'])
def test_what_is_masked_out_reaches_neither_values_nor_gradients(
  rng, name, hidden
):
  function = getattr(masked, name)
  values, mask = ragged(rng)
  weights = jnp.asarray(rng.normal(size=values.shape), jnp.float32)

  @jax.jit
  def run(values):
    def scalar(values):
      out = function(values, mask)
      # Whitened values sum to 0 whatever they are: weigh them.
      return jnp.sum(out * weights) if out.ndim else out, out

    (_, out), grads = jax.value_and_grad(scalar, has_aux=True)(values)
    return out, grads

  out, grads = run(jnp.where(mask, values, 0.0))
  hidden_out, hidden_grads = run(jnp.where(mask, values, hidden))
  np.testing.assert_array_equal(hidden_out, out)
  np.testing.assert_array_equal(hidden_grads, grads)
  assert np.isfinite(grads).all() and not grads[~mask].any()


def test_sums_are_float32():
  # In bfloat16, 256 + 1 is 256.
  values = jnp.ones((8, 64), jnp.bfloat16)
  total, count = masked.metric(values, jnp.ones((8, 64), bool))
  assert (total, count) == (512.0, 512.0)
  assert total.dtype == count.dtype == jnp.float32


@pytest.mark.parametrize('shape', [(8, 1, 1), (2, 2, 2)])
def test_whitening_takes_the_whole_batch_on_every_mesh(rng, shape):
  values, mask = ragged(rng)
  # Rows far apart: a mean per device would show at once.
  values += 10 * jnp.arange(8.0)[:, None]
  whiten = jax.jit(masked.whiten)
  alone = whiten(values, mask)
  mesh = sharding.make_mesh(shape)
  with sharding.use_mesh(mesh):
    cut = whiten(*sharding.put_batch((values, mask), mesh))
  np.testing.assert_allclose(cut, alone, atol=1e-5)
  assert abs(masked.mean(cut, mask)) < 1e-5
  np.testing.assert_allclose(masked.variance(cut, mask), 1.0, rtol=1e-4)
