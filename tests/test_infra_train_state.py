"""Steps, skipped steps and averaged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instruct_jax.infra import train_state
from instruct_jax.infra.train_state import NonFiniteError


def make(optimizer):
  params = {'w': jnp.array([1.0, 2.0]), 'b': jnp.array(3.0)}
  return train_state.create(params, optimizer)


GRADS = {'w': jnp.array([3.0, 0.0]), 'b': jnp.array(4.0)}


def test_apply_gradients_by_hand():
  optimizer = optax.sgd(0.1)
  state, metrics = train_state.apply_gradients(
    make(optimizer), GRADS, optimizer, jnp.array(1.0)
  )
  # w - 0.1 * (3, 0); b - 0.1 * 4; norm sqrt(9 + 16).
  np.testing.assert_allclose(state.params['w'], [0.7, 2.0], rtol=1e-6)
  np.testing.assert_allclose(state.params['b'], 2.6, rtol=1e-6)
  assert metrics['optimizer/gradient_norm'] == (5.0, 1.0)
  assert metrics['optimizer/skipped'] == (0.0, 1.0)
  assert (state.step, state.num_skipped) == (1, 0)


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize('where', ['loss', 'gradient'])
def test_non_finite_update_is_skipped_in_full(bad, where):
  optimizer = optax.adam(0.1)
  step = jax.jit(
    lambda state, grads, loss: train_state.apply_gradients(
      state, grads, optimizer, loss
    )
  )
  before, _ = step(make(optimizer), GRADS, jnp.array(1.0))
  grads, loss = GRADS, jnp.array(1.0)
  if where == 'loss':
    loss = jnp.array(bad)
  else:
    grads = GRADS | {'w': jnp.array([0.0, bad])}
  after, metrics = step(before, grads, loss)
  jax.tree.map(
    np.testing.assert_array_equal,
    (after.params, after.opt_state),
    (before.params, before.opt_state),
  )
  assert metrics['optimizer/gradient_norm'] == (0.0, 0.0)
  assert metrics['optimizer/skipped'] == (1.0, 1.0)
  assert (after.step, after.num_skipped) == (2, 1)
  assert after.num_consecutive_skipped == 1

  # A good update afterwards is the one that would have come next anyway.
  resumed, _ = step(after, GRADS, jnp.array(1.0))
  expected, _ = step(before, GRADS, jnp.array(1.0))
  jax.tree.map(np.testing.assert_array_equal, resumed.params, expected.params)
  assert (resumed.num_skipped, resumed.num_consecutive_skipped) == (1, 0)


def test_check_skips_names_stage_and_step():
  optimizer = optax.sgd(0.1)
  state = make(optimizer)
  train_state.check_skips(state, 2, 'sft', '')
  for _ in range(2):
    state, _ = train_state.apply_gradients(
      state, GRADS, optimizer, jnp.array(jnp.nan)
    )
    if state.step == 1:
      with pytest.warns(UserWarning, match='sft: update skipped at step 1'):
        train_state.check_skips(state, 2, 'sft', '')
  with pytest.raises(NonFiniteError, match='sft: .* 2 updates in a row up to'):
    train_state.check_skips(state, 2, 'sft', '')


def test_ema_is_float32():
  ema = {'w': jnp.array([1.0, 0.0])}
  params = {'w': jnp.array([0.0, 1.0], jnp.bfloat16)}
  for _ in range(2):
    ema = train_state.ema_update(ema, params, 0.992)
  # 0.992^2 = 0.984064 of the old, the rest of the new.
  assert ema['w'].dtype == jnp.float32
  np.testing.assert_allclose(ema['w'], [0.984064, 0.015936], rtol=1e-5)


def test_state_can_be_donated():
  optimizer = optax.adam(0.1)
  step = jax.jit(
    lambda state: train_state.apply_gradients(
      state, GRADS, optimizer, jnp.array(1.0)
    )[0],
    donate_argnums=0,
  )
  assert step(step(make(optimizer))).step == 2
