"""What the policy is paid, and the controller of its KL penalty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax import rewards
from instruct_jax.rewards import KLState

token_rewards = jax.jit(rewards.token_rewards)
kl_estimates = jax.jit(rewards.kl_estimates)

# Rows: two tokens then padding; a full buffer; an empty response; one token.
MASK = np.array(
  [
    [True, True, False],
    [True, True, True],
    [False, False, False],
    [True, False, False],
  ]
)


def test_token_rewards_by_hand():
  old = jnp.array([[-1.0, -2, 9], [-1, -1, -1], [9, 9, 9], [-0.5, 9, 9]])
  ref = jnp.array([[-2.0, -1, 9], [-1, -1, -3], [9, 9, 9], [-0.5, 9, 9]])
  scores = jnp.array([0.7, -1.0, 5.0, 0.25])
  out = token_rewards(scores, old, ref, MASK, jnp.float32(0.1))
  # -0.1 * (old - ref), signed: -0.1 * 1 and -0.1 * -1, the score on the last.
  # The full buffer gets its score on its last column; an empty response none.
  np.testing.assert_allclose(
    out,
    [[-0.1, 0.1 + 0.7, 0], [0, 0, -0.2 - 1.0], [0, 0, 0], [0.25, 0, 0]],
    rtol=1e-6,
    atol=1e-7,
  )
  assert out.dtype == jnp.float32


def test_the_score_is_paid_once(rng):
  """Summed over tokens: score minus beta times the summed log-ratio, against a
  loop over ragged rows."""
  R = 6
  old, ref = rng.normal(size=(2, 9, R)).astype(np.float32)
  scores = rng.normal(size=9).astype(np.float32)
  lengths = rng.integers(0, R + 1, 9)
  lengths[:2] = 0, R
  mask = np.arange(R)[None] < lengths[:, None]
  # NaN wherever there is no token.
  old, ref = (np.where(mask, x, np.float32(np.nan)) for x in (old, ref))
  out = np.asarray(token_rewards(scores, old, ref, mask, jnp.array(0.3)))
  for row, length in enumerate(lengths):
    expected = np.zeros(R)
    for t in range(length):
      expected[t] = -0.3 * (old[row, t] - ref[row, t])
    if length:
      expected[length - 1] += scores[row]
    np.testing.assert_allclose(out[row], expected, rtol=1e-5, atol=1e-6)


def test_missing_end_score():
  scores = jnp.array([0.5, 0.6])
  ended = jnp.array([True, False])
  np.testing.assert_allclose(
    rewards.penalise_missing_end(scores, ended, -1.0), [0.5, -1.0]
  )
  assert rewards.penalise_missing_end(scores, ended, None) is scores


def test_kl_estimates():
  old = jnp.array([[-1.0, -2, 9], [-1, -1, -1], [9, 9, 9], [-1.0, 9, 9]])
  ref = jnp.array([[-2.0, -4, 0], [-1, -1, -1], [0, 0, 0], [-0.5, 0, 0]])
  signed, k3 = kl_estimates(old, ref, MASK)
  # Log-ratios 1 and 2; none; empty; -0.5. k3(d) = e^-d - 1 + d:
  # k3(1) = 0.3678794, k3(2) = 1.1353353, k3(-0.5) = 0.1487213.
  np.testing.assert_allclose(signed, [3, 0, 0, -0.5])
  np.testing.assert_allclose(k3, [1.5032147, 0, 0, 0.1487213], rtol=1e-5)
  # NaN on padding stays out.
  nan = jnp.where(MASK, old, jnp.nan)
  np.testing.assert_array_equal(kl_estimates(nan, ref, MASK)[1], k3)


def test_both_kl_estimates_have_the_same_mean(rng):
  """Averaged over tokens drawn from pi, both are KL(pi || ref), and the second
  is never negative."""
  pi, ref = rng.dirichlet(np.ones(6), 2)
  # One row for each of the tokens there are: the mean is exact.
  signed, k3 = kl_estimates(
    jnp.array(np.log(pi)[:, None], jnp.float32),
    jnp.array(np.log(ref)[:, None], jnp.float32),
    jnp.ones((6, 1), bool),
  )
  exact = np.sum(pi * np.log(pi / ref))
  np.testing.assert_allclose(np.sum(pi * signed), exact, rtol=1e-5)
  np.testing.assert_allclose(np.sum(pi * k3), exact, rtol=1e-5)
  assert np.min(signed) < 0 <= np.min(k3)


@pytest.mark.parametrize(
  ('measured', 'factor'),
  [
    (6.0, 1.0),  # On target.
    (6.6, 1 + 0.1 * 0.05),  # e = 0.1; 500 of 10,000 episodes.
    (60.0, 1 + 0.2 * 0.05),  # e is clipped at 0.2,
    (-3.0, 1 - 0.2 * 0.05),  # and at -0.2.
    (float('nan'), 1.0),  # A broken batch teaches nothing.
    (float('inf'), 1.0),
  ],
)
def test_adaptive_kl(measured, factor):
  state = rewards.update_kl_coef(
    KLState(coef=jnp.float32(0.2)), jnp.float32(measured), 500, 6.0, 10_000
  )
  np.testing.assert_allclose(state.coef, 0.2 * factor, rtol=1e-6)


def test_fixed_kl():
  state = KLState(coef=jnp.float32(0.02))
  assert rewards.update_kl_coef(state, jnp.float32(50), 512, None) is state


def test_kl_estimators_by_hand():
  d = jnp.array([0.5, -0.5, 0.0])
  np.testing.assert_allclose(rewards.kl_estimator(d, 'k1'), [0.5, -0.5, 0])
  np.testing.assert_allclose(rewards.kl_estimator(d, 'k2'), [0.125, 0.125, 0])
  # e^-0.5 - 1 + 0.5 = 0.1065307, e^0.5 - 1 - 0.5 = 0.1487213.
  np.testing.assert_allclose(
    rewards.kl_estimator(d, 'k3'), [0.1065307, 0.1487213, 0], rtol=1e-5
  )
  with pytest.raises(ValueError, match="one of .*'k3'.*: 'k4'"):
    rewards.kl_estimator(d, 'k4')


@pytest.mark.parametrize('name', ['k1', 'k3'])
def test_unbiased_estimators_have_the_mean_of_the_divergence(rng, name):
  """Over a table of 6 tokens, weighted by the policy: the exact KL."""
  policy, reference = (
    jax.nn.log_softmax(jnp.asarray(rng.normal(size=6))) for _ in range(2)
  )
  exact = jnp.sum(jnp.exp(policy) * (policy - reference))
  found = jnp.exp(policy) * rewards.kl_estimator(policy - reference, name)
  np.testing.assert_allclose(jnp.sum(found), exact, rtol=1e-5)


@pytest.mark.parametrize('estimator', rewards.KL_ESTIMATORS)
def test_token_rewards_take_any_estimator(rng, estimator):
  old, ref = jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)
  scores = jnp.array([0.7, -1.0, 5.0, 0.25])
  found = rewards.token_rewards(
    scores, old, ref, jnp.asarray(MASK), jnp.float32(0.1), estimator
  )
  plain = rewards.token_rewards(
    scores, old, ref, jnp.asarray(MASK), jnp.float32(0.0)
  )
  expected = -0.1 * rewards.kl_estimator(old - ref, estimator)
  np.testing.assert_allclose(
    found - plain, np.where(MASK, expected, 0), rtol=1e-4, atol=1e-6
  )
