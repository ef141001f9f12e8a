"""Generalised advantage estimation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax import advantages

gae = jax.jit(advantages.gae, static_argnames=('discount', 'gae_lambda'))


def gae_loop(rewards, values, mask, discount, gae_lambda):
  """Each response on its own, cut to its real tokens."""
  out, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
  for row, real in enumerate(mask):
    length = int(real.sum())
    for t in range(length):
      for k in range(t, length):
        after = values[row, k + 1] if k + 1 < length else 0.0
        delta = rewards[row, k] + discount * after - values[row, k]
        out[row, t] += (discount * gae_lambda) ** (k - t) * delta
      returns[row, t] = out[row, t] + values[row, t]
  return out, returns


def ragged(rng, B=6, R=7):
  rewards, values = rng.normal(size=(2, B, R)).astype(np.float32)
  lengths = rng.integers(1, R + 1, B)
  lengths[0], lengths[1] = 0, R  # An empty response, and a full buffer.
  return rewards, values, np.arange(R)[None] < lengths[:, None]


def test_by_hand():
  # Rewards 0, 0, 1; values 0.5, 0.25, 0.75; lambda 0.5:
  #   delta = 0.25 - 0.5, 0.75 - 0.25, 1 - 0.75 = -0.25, 0.5, 0.25
  #   A_2 = 0.25; A_1 = 0.5 + 0.125 = 0.625; A_0 = -0.25 + 0.3125 = 0.0625
  # The fourth column is padding: its 9s must not be bootstrapped from.
  out, returns = gae(
    jnp.array([[0.0, 0.0, 1.0, 9.0]]),
    jnp.array([[0.5, 0.25, 0.75, 9.0]]),
    jnp.array([[True, True, True, False]]),
    gae_lambda=0.5,
  )
  np.testing.assert_allclose(out, [[0.0625, 0.625, 0.25, 0]], rtol=1e-6)
  np.testing.assert_allclose(returns, [[0.5625, 0.875, 1, 0]], rtol=1e-6)


@pytest.mark.parametrize(
  ('discount', 'gae_lambda'), [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0)]
)
def test_against_a_loop(rng, discount, gae_lambda):
  rewards, values, mask = ragged(rng)
  got = gae(rewards, values, mask, discount, gae_lambda)
  expected = gae_loop(rewards, values, mask, discount, gae_lambda)
  np.testing.assert_allclose(got[0], expected[0], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(got[1], expected[1], rtol=1e-4, atol=1e-5)


def test_lambda_one_gives_returns_minus_values(rng):
  rewards, values, mask = ragged(rng)
  out, returns = gae(rewards, values, mask, 1.0, 1.0)
  # What is still to come, summed from the end; no value enters.
  to_come = np.cumsum(np.where(mask, rewards, 0)[:, ::-1], axis=1)[:, ::-1]
  np.testing.assert_allclose(
    returns, np.where(mask, to_come, 0), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
    out, np.where(mask, to_come - values, 0), rtol=1e-4, atol=1e-5
  )


def test_masked_out_entries_do_not_matter(rng):
  rewards, values, mask = ragged(rng)

  @jax.jit
  def run(rewards, values):
    def summed(rewards, values):
      out, returns = gae(rewards, values, jnp.asarray(mask))
      return jnp.sum(out * out + returns), (out, returns)

    return jax.value_and_grad(summed, (0, 1), has_aux=True)(rewards, values)

  clean = run(np.where(mask, rewards, 0), np.where(mask, values, 0))
  dirty = run(
    np.where(mask, rewards, np.float32(np.nan)),
    np.where(mask, values, np.float32(np.inf)),
  )
  jax.tree.map(np.testing.assert_array_equal, dirty, clean)
  out, returns = clean[0][1]
  assert not np.asarray(out)[~mask].any()
  assert not np.asarray(returns)[~mask].any()
  assert np.isfinite(clean[1]).all()


# --- Baselines from samples alone ---------------------------------------------


def test_leave_one_out_by_hand():
  # Two prompts of three responses. 1 - (2 + 6) / 2 = -3, 2 - (1 + 6) / 2 =
  # -1.5, 6 - (1 + 2) / 2 = 4.5; then 0 - 1 / 2, 0 - 1 / 2, 1 - 0.
  found = advantages.leave_one_out(jnp.array([1.0, 2, 6, 0, 0, 1]), 3)
  np.testing.assert_allclose(found, [-3, -1.5, 4.5, -0.5, -0.5, 1])


def test_group_normalised_by_hand():
  # Mean 3, deviations -2, -1, 3: variance 14 / 3, standard deviation 2.160247.
  found = advantages.group_normalised(jnp.array([1.0, 2, 6, 5, 5, 5]), 3)
  np.testing.assert_allclose(
    found, [-0.925820, -0.462910, 1.388730, 0, 0, 0], atol=1e-4
  )
  assert found[3:].tolist() == [0, 0, 0]  # Equal returns teach nothing.


@pytest.mark.parametrize(
  'baseline_fn', [advantages.leave_one_out, advantages.group_normalised]
)
def test_groups_do_not_meet_and_a_shift_changes_nothing(rng, baseline_fn):
  returns = rng.normal(size=12).astype(np.float32)
  whole = baseline_fn(jnp.asarray(returns), 4)
  for group in range(3):
    part = slice(4 * group, 4 * group + 4)
    alone = baseline_fn(jnp.asarray(returns[part]), 4)
    np.testing.assert_allclose(alone, whole[part], rtol=1e-6)
    assert abs(float(jnp.sum(alone))) < 1e-5
  np.testing.assert_allclose(
    baseline_fn(jnp.asarray(returns + 3), 4), whole, atol=1e-5
  )


def test_leave_one_out_is_the_scaled_deviation_from_the_mean(rng):
  """n / (n - 1) times it (Kool et al. 2019)."""
  returns = rng.normal(size=(5, 6)).astype(np.float32)
  expected = 6 / 5 * (returns - returns.mean(axis=1, keepdims=True))
  found = advantages.leave_one_out(jnp.asarray(returns.reshape(-1)), 6)
  np.testing.assert_allclose(found, expected.reshape(-1), rtol=1e-4, atol=1e-5)
