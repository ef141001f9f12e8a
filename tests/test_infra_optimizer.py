"""Schedules and Adam on numbers small enough to check by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.infra import optimizer


def test_cosine_ends_at_the_fraction():
  schedule = optimizer.cosine_to_fraction(2.0, 100, final_fraction=0.1)
  # u = 0, 1/2, 1: cosine term 1, 1/2, 0; rate 2, 2 * 0.55, 2 * 0.1.
  np.testing.assert_allclose(
    [schedule(0), schedule(50), schedule(100), schedule(500)],
    [2.0, 1.1, 0.2, 0.2],
    rtol=1e-6,
  )
  # u = 1/4: (1 + sqrt(1/2)) / 2 = 0.853553; 2 * (0.1 + 0.9 * 0.853553).
  np.testing.assert_allclose(schedule(25), 1.7363961, rtol=1e-6)


def test_cosine_after_warmup():
  schedule = optimizer.cosine_to_fraction(4.0, 12, 0.5, num_warmup=2)
  # Warm-up 4 * 1/2, 4 * 2/2; then from step 2 to step 12, 4 down to 2.
  np.testing.assert_allclose(
    [schedule(t) for t in (0, 1, 2, 7, 12)], [2, 4, 4, 3, 2], rtol=1e-6
  )
  with pytest.raises(ValueError, match='5 warm-up steps.*end of 5'):
    optimizer.cosine_to_fraction(1.0, 5, num_warmup=5)


def test_warmup_is_counted_in_iterations():
  schedule = optimizer.constant_with_warmup(
    10.0, 10, start_fraction=0.1, updates_per_iteration=8
  )
  # Iteration i is updates 8 i .. 8 i + 7, at 10 * (0.1 + 0.9 * i / 10).
  np.testing.assert_allclose(
    [schedule(t) for t in (0, 7, 8, 15, 40, 79, 80, 10_000)],
    [1.0, 1.0, 1.9, 1.9, 5.5, 9.1, 10.0, 10.0],
    rtol=1e-6,
  )
  assert optimizer.constant_with_warmup(10.0, 0)(0) == 10.0
  with pytest.raises(ValueError, match='updates_per_iteration=0'):
    optimizer.constant_with_warmup(1.0, 10, updates_per_iteration=0)


def numpy_adam(params, grads, rate, b1, b2, eps, max_norm):
  """Adam written out; one array, a list of gradients."""
  m = v = 0.0
  for t, grad in enumerate(grads, 1):
    norm = np.sqrt((grad**2).sum())
    if 0 < max_norm < norm:
      grad = grad * max_norm / norm
    m = b1 * m + (1 - b1) * grad
    v = b2 * v + (1 - b2) * grad**2
    step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    params = params - rate * step
  return params


@pytest.mark.parametrize('max_norm', [0.0, 0.5, 100.0])
def test_adam_matches_numpy(rng, max_norm):
  params = rng.normal(size=5)
  grads = rng.normal(size=(4, 5))
  adam = optimizer.make_adam(
    lambda step: 0.01,
    b1=0.9,
    b2=0.95,
    eps=1e-3,
    max_grad_norm=max_norm,
  )
  ours = jnp.asarray(params, jnp.float32)
  state = adam.init(ours)
  for grad in grads:
    updates, state = adam.update(jnp.asarray(grad, jnp.float32), state, ours)
    ours = ours + updates
  expected = numpy_adam(params, grads, 0.01, 0.9, 0.95, 1e-3, max_norm)
  np.testing.assert_allclose(ours, expected, rtol=2e-5)


def test_first_step_of_adam_by_hand():
  # m / (1 - b1) = g and v / (1 - b2) = g^2, so the step is rate * sign(g).
  adam = optimizer.make_adam(lambda step: 0.5, eps=0.0)
  params = jnp.array([1.0, 1.0])
  updates, _ = adam.update(jnp.array([3.0, -4.0]), adam.init(params), params)
  np.testing.assert_allclose(updates, [-0.5, 0.5], rtol=1e-6)
