"""Scoring a rollout and updating on it.

Most tests use a table in place of a Transformer: the next token depends on the
present one alone, and a value on the token it stands at.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instruct_jax import (
  advantages,
  alarms,
  masked,
  model_fns,
  packing,
  ppo,
  rewards,
  supervised,
)
from instruct_jax.infra import sharding, train_state
from instruct_jax.models.heads import token_logprobs
from instruct_jax.types import RLBatch, Rollout, TextBatch
from tests import tiny

pytestmark = pytest.mark.usefixtures('quick_compile')

V, B, P, R = 8, 12, 2, 5
T = P + R
PPO = ppo.PPOConfig(ptx_coef=0.0, num_minibatches=3)
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}


def table_logprobs(params, tokens, segments, where=None, dropout_key=None):
  del segments, dropout_key
  if where is None:
    found = token_logprobs(params['table'][tokens[:, :-1]], tokens[:, 1:])
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (1, 0))), found)
  columns = jnp.minimum(where + 1, tokens.shape[1] - 1)
  here, after = (
    jnp.take_along_axis(tokens, x, axis=1) for x in (where, columns)
  )
  return token_logprobs(params['table'][here], after)


def table_values(params, tokens, segments):
  del segments
  return params['values'][tokens]


PTX_LOSS = supervised.make_text_loss(table_logprobs)


def sgd(rate):
  """Its rate lives in the state: one program for every rate."""
  return optax.inject_hyperparams(optax.sgd)(learning_rate=rate)


def make_state(rate=0.0, seed=0, optimizer=sgd):
  rng = np.random.default_rng(seed)
  policy = {'table': jnp.asarray(rng.normal(size=(V, V)), jnp.float32)}
  value = {'values': jnp.asarray(rng.normal(size=V), jnp.float32)}
  return ppo.RLState(
    policy=train_state.create(policy, optimizer(rate)),
    value=train_state.create(value, optimizer(rate)),
    ema=policy,
    kl=rewards.KLState(coef=jnp.float32(0.1)),
  )


def make_rollout(seed=0) -> Rollout:
  """Ragged responses: the first is empty, the second fills the buffer without
  an end, the others end on their own."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, R + 1, B)
  lengths[:2] = 0, R
  response_mask = np.arange(R)[None] < lengths[:, None]
  ended = lengths < R
  ended[0] = False
  tokens = rng.integers(0, V, (B, T))
  mask = np.concatenate([np.ones((B, P), bool), response_mask], axis=1)
  return jax.tree.map(
    jnp.asarray,
    Rollout(
      tokens=tokens.astype(np.int32),
      mask=mask,
      response_mask=response_mask,
      logprobs=np.zeros((B, R), np.float32),
      ended=ended,
    ),
  )


@functools.partial(jax.jit, static_argnums=6)
def make_fields(sampled, scores, old, ref, values, kl_coef, config):
  return ppo.penalised(
    sampled,
    scores,
    old,
    ref,
    values,
    kl_coef,
    ppo.gae_advantages(config),
    config,
  )


@pytest.mark.parametrize('shape', ['B B R', 'B'])
def test_advantages_of_another_shape_are_refused(shape):
  """Broadcast by mistake, they would be other tokens' advantages."""
  sampled = make_rollout()

  def advantage_fn(token_rewards, mask, values):
    returns = jnp.sum(token_rewards, axis=1)
    if shape == 'B':
      return returns, None
    return jnp.where(mask, returns[:, None, None], 0.0), None

  tokens = jnp.zeros(sampled.response_mask.shape)
  with pytest.raises(ValueError, match='advantages of shape'):
    ppo.penalised(
      sampled,
      jnp.zeros(len(tokens)),
      tokens,
      tokens,
      None,
      jnp.float32(0.1),
      advantage_fn,
      PPO,
    )


def read(params, sampled):
  """What the tables say of a rollout as it is: [B, R]."""
  rows = tiny.as_rows(sampled)
  logprobs, _ = table_logprobs(
    params.get('policy'), rows.tokens, rows.segments, rows.where
  )
  values = table_values(params.get('value'), rows.tokens, rows.segments)
  return logprobs, jnp.take_along_axis(values, rows.where, axis=1)


def scored(config=PPO, state=None, scores=None):
  """Fields [B, R] of a batch whose old log-probabilities and values are the
  state's own, and the metrics."""
  state = make_state() if state is None else state
  sampled = make_rollout()
  params = {'policy': state.policy.params, 'value': state.value.params}
  old_logprobs, values = read(params, sampled)
  if scores is None:
    scores = jnp.linspace(-1.0, 1.0, B)
  return make_fields(
    sampled,
    scores,
    old_logprobs,
    old_logprobs - 0.1,
    values,
    jnp.float32(0.1),
    config,
  )


def batch_of(config=PPO, fields=None, sampled=None, seed=0) -> RLBatch:
  """Fields [B, R] in the rows of every step, an episode alone in its row."""
  fields = scored(config)[0] if fields is None else fields
  sampled = make_rollout() if sampled is None else sampled
  layout = tiny.lay_out(
    sampled,
    seed=(seed,),
    num_minibatches=config.num_minibatches,
    num_microbatches=config.num_microbatches,
    num_epochs=config.num_epochs,
  )
  layout = jax.tree.map(jnp.asarray, layout)
  return RLBatch(
    packing.pack_episodes(sampled, layout),
    **{name: packing.pack_responses(x, layout) for name, x in fields.items()},
  )


def ptx_batch(rows=12) -> TextBatch:
  rng = np.random.default_rng(7)
  lengths = rng.integers(2, T + 1, rows)
  mask = np.arange(T)[None] < lengths[:, None]
  loss_mask = mask.copy()
  loss_mask[:, 0] = False
  return TextBatch(
    jnp.asarray(rng.integers(0, V, (rows, T)), jnp.int32),
    jnp.asarray(mask),
    jnp.asarray(loss_mask),
    jnp.asarray(mask, jnp.int32),
  )


@functools.cache
def make_train(
  config=PPO,
  optimizer=None,
  policy_loss_fn=None,
  value_loss_fn=None,
  ptx_loss=None,
):
  optimizer = optimizer or sgd(0.0)
  train = jax.jit(
    ppo.make_train(
      {
        'policy': policy_loss_fn
        or ppo.make_policy_loss(table_logprobs, config),
        'value': value_loss_fn or ppo.make_value_loss(table_values, config),
        'ptx': ptx_loss or PTX_LOSS,
      },
      {'policy': optimizer, 'value': optimizer},
      config,
    )
  )

  def run(state, batch, text, key):
    return train(state, {}, batch, text, state.kl, key)

  return run


KEY = jax.random.key(3)


def ratio(metrics, name):
  total, count = metrics[name]
  return float(total) / float(count)


# --- The batch ----------------------------------------------------------------


def test_batch_by_hand():
  """Four hand-made masks, lambda 1, beta 0.5, values 0."""
  response_mask = jnp.array(
    [
      [False, False, False],  # Empty.
      [True, True, True],  # Full, never ended.
      [True, True, False],  # Ended.
      [True, False, False],  # One token, which ended it.
    ]
  )
  sampled = Rollout(
    tokens=jnp.ones((4, 4), jnp.int32),
    mask=jnp.concatenate([jnp.ones((4, 1), bool), response_mask], axis=1),
    response_mask=response_mask,
    logprobs=jnp.zeros((4, 3)),
    ended=jnp.array([False, False, True, True]),
  )
  old = jnp.array([[9.0, 9, 9], [-1, -1, -1], [-1, -2, 9], [-1, 9, 9]])
  ref = jnp.array([[9.0, 9, 9], [-1, -1, -3], [-2, -1, 9], [-1, 9, 9]])
  config = ppo.PPOConfig(
    gae_lambda=1.0, whiten_advantages=False, missing_end_score=-1.0
  )
  batch, metrics = make_fields(
    sampled,
    jnp.array([0.7, 0.7, 0.7, 0.7]),
    old,
    ref,
    jnp.zeros((4, 3)),
    jnp.float32(0.5),
    config,
  )
  # Row 1: no end, so -1 instead of 0.7, and -0.5 * 2 on the last token.
  # Row 2: -0.5 and +0.5 + 0.7; from the first token on: 0.7. Row 3: 0.7.
  expected = [[0, 0, 0], [-2, -2, -2], [0.7, 1.2, 0], [0.7, 0, 0]]
  np.testing.assert_allclose(batch['returns'], expected, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(batch['advantages'], batch['returns'])
  assert batch['returns'].dtype == batch['advantages'].dtype == jnp.float32
  assert not np.asarray(batch['old_logprobs'])[~np.asarray(response_mask)].any()
  # Over the three responses there are: 0.7 each as scored, KL 2, 0 and 0.
  np.testing.assert_allclose(ratio(metrics, 'objective/score'), 0.7, rtol=1e-6)
  np.testing.assert_allclose(ratio(metrics, 'objective/kl'), 2 / 3, rtol=1e-6)
  np.testing.assert_allclose(
    ratio(metrics, 'objective/reward'), (-2 + 0.7 + 0.7) / 3, rtol=1e-5
  )
  assert ratio(metrics, 'objective/length') == 2.0
  np.testing.assert_allclose(
    ratio(metrics, 'objective/ended'), 2 / 3, rtol=1e-6
  )
  assert metrics['ppo/return'][1] == 6.0


def test_a_value_is_the_one_before_its_token():
  # Columns 0 and 1 are the prompt, 2 to 4 the response. The first response
  # token is emitted after column 1, the last after column 3.
  sampled = Rollout(
    tokens=jnp.array([[0, 1, 2, 3, 4]]),
    mask=jnp.ones((1, 5), bool),
    response_mask=jnp.ones((1, 3), bool),
    logprobs=jnp.zeros((1, 3)),
    ended=jnp.array([True]),
  )
  rows = tiny.as_rows(sampled)
  assert rows.where.tolist() == [[1, 2, 3]]
  laid = tiny.lay_out(sampled, num_minibatches=1)
  assert laid.where.tolist() == [[1, 2, 3]]


def test_missing_end_score_is_an_option():
  with_score, metrics = scored(
    dataclasses.replace(PPO, missing_end_score=-5.0, whiten_advantages=False)
  )
  without, plain = scored(dataclasses.replace(PPO, whiten_advantages=False))
  differs = np.any(
    np.asarray(with_score['returns'] != without['returns']), axis=1
  )
  # Of the responses there are, those that did not end.
  sampled = make_rollout()
  open_ended = ~sampled.ended & jnp.any(sampled.response_mask, axis=1)
  np.testing.assert_array_equal(differs, open_ended)
  # The reported score is the reward model's own.
  assert metrics['objective/score'] == plain['objective/score']


def test_scores_are_not_rounded_to_the_tokens_type():
  batch, _ = scored(
    dataclasses.replace(PPO, whiten_advantages=False),
    scores=jnp.full(B, 0.7, jnp.bfloat16),
  )
  assert batch['returns'].dtype == jnp.float32
  assert np.unique(np.round(np.asarray(batch['returns']), 3)).size > 2


def test_kl_is_zero_before_the_first_update():
  """Policy and reference are one set of weights: not small, zero."""
  prompts = jax.tree.map(jnp.asarray, tiny.prompts())
  state = tiny.ppo_state()
  policy = state.policy.params
  sampled = tiny.generate(policy, prompts, KEY)
  layout = tiny.lay_out(sampled)
  scores = tiny.score(tiny.params('scalar'), sampled, layout)
  _, _, metrics = tiny.penalise(
    state, {'reference': policy}, sampled, layout, scores
  )
  assert metrics['objective/kl'][0] == metrics['objective/kl_k3'][0] == 0.0
  assert ratio(metrics, 'objective/score') == pytest.approx(
    ratio(metrics, 'objective/reward'), rel=1e-4
  )


def test_advantages_are_whitened_over_response_tokens():
  batch, _ = scored()
  mask = np.asarray(make_rollout().response_mask)
  real = np.asarray(batch['advantages'])[mask]
  np.testing.assert_allclose((real.mean(), real.std()), (0, 1), atol=1e-5)
  raw, _ = scored(dataclasses.replace(PPO, whiten_advantages=False))
  # The returns are made of the unwhitened ones, by another program.
  np.testing.assert_allclose(
    batch['returns'], raw['returns'], rtol=1e-6, atol=1e-7
  )
  np.testing.assert_allclose(
    np.asarray(raw['advantages'] + raw['old_values'])[mask],
    np.asarray(raw['returns'])[mask],
    rtol=1e-6,
  )


# --- Ratios -------------------------------------------------------------------


def test_learning_rate_zero_keeps_every_ratio_at_one():
  config = dataclasses.replace(PPO, num_epochs=2)
  state = make_state(0.0)
  after, metrics = make_train(config)(state, batch_of(config), None, KEY)
  total, count = metrics['ppo/policy/ratio']
  assert count == 2 * int(make_rollout().response_mask.sum())
  # One program computed the old log-probabilities, another the new ones: they
  # may differ by their last bit, 1e-7 of a nat, and approxkl by its square.
  assert float(total) == pytest.approx(float(count), rel=1e-6)
  assert metrics['ppo/policy/clipfrac'][0] == 0
  assert abs(float(metrics['ppo/policy/approxkl'][0])) < 1e-10
  assert metrics['ppo/val/clipfrac'][0] == 0
  tiny.assert_trees_equal(after.policy.params, state.policy.params)
  assert after.policy.step == 6


def test_a_large_step_is_clipped_but_not_in_the_first_minibatch():
  config = dataclasses.replace(PPO, num_epochs=2)
  # Not larger: values that jump over their returns are not clipped.
  _, metrics = make_train(config)(make_state(5.0), batch_of(config), None, KEY)
  assert ratio(metrics, 'ppo/policy/clipfrac') > 0.1
  assert metrics['ppo/policy/approxkl'][0] > 0
  assert metrics['ppo/val/clipfrac'][0] > 0
  total, count = metrics['first/ppo/policy/ratio']
  assert float(total) == pytest.approx(float(count), rel=1e-6)  # See above.
  assert metrics['first/ppo/policy/clipfrac'][0] == 0


def test_metrics_count_response_tokens_only():
  _, metrics = make_train(PPO)(make_state(0.0), batch_of(), None, KEY)
  tokens = int(make_rollout().response_mask.sum())
  for name in ('ratio', 'clipfrac', 'approxkl', 'entropy'):
    assert metrics[f'ppo/policy/{name}'][1] == tokens
  for name in ('ppo/loss/policy', 'ppo/loss/value', 'ppo/val/value'):
    assert metrics[name][1] == tokens


# --- Gradients ----------------------------------------------------------------


@pytest.fixture(scope='module')
def gradients():
  """Of the plain policy gradient, of the value error and of the text."""
  batch, state, text = scored()[0], make_state(), ptx_batch()
  sampled = make_rollout()
  mask = sampled.response_mask
  count = jnp.sum(mask)

  def policy_gradient(params):
    logprobs, _ = read({'policy': params, 'value': state.value.params}, sampled)
    return -jnp.sum(jnp.where(mask, batch['advantages'] * logprobs, 0)) / count

  def value_error(params):
    _, values = read({'policy': state.policy.params, 'value': params}, sampled)
    error = jnp.square(values - batch['returns'])
    return 0.5 * jnp.sum(jnp.where(mask, error, 0)) / count

  def text_loss(params):
    summed, (count, _) = PTX_LOSS(params, {}, text, None)
    return summed / count

  return {
    'policy': jax.jit(jax.grad(policy_gradient))(state.policy.params),
    'value': jax.jit(jax.grad(value_error))(state.value.params),
    'ptx': jax.jit(jax.grad(text_loss))(state.policy.params),
  }


ONE = dataclasses.replace(PPO, num_minibatches=1)


def test_first_gradient_is_the_plain_policy_gradient(gradients):
  """Before any update the ratio is 1, so clipping does nothing: PPO is
  sum A grad log pi, and the value loss a square."""
  state = make_state(1.0)
  after, _ = make_train(ONE)(state, batch_of(ONE), None, KEY)
  for name, before, now in (
    ('policy', state.policy.params, after.policy.params),
    ('value', state.value.params, after.value.params),
  ):
    tiny.assert_trees_close(
      jax.tree.map(jnp.subtract, before, now), gradients[name], **CLOSE
    )


def test_ptx_gradients_are_added_before_the_step(gradients):
  config = dataclasses.replace(ONE, ptx_coef=1.5)
  state = make_state(1.0)
  after, metrics = make_train(config)(state, batch_of(config), ptx_batch(), KEY)
  combined = jax.tree.map(
    lambda g, p: g + 1.5 * p, gradients['policy'], gradients['ptx']
  )
  tiny.assert_trees_close(
    jax.tree.map(jnp.subtract, state.policy.params, after.policy.params),
    combined,
    **CLOSE,
  )
  np.testing.assert_allclose(
    ratio(metrics, 'ptx/gradient_norm'),
    1.5 * optax.tree.norm(gradients['ptx']),
    rtol=1e-5,
  )
  assert metrics['ptx/loss'][1] == jnp.sum(ptx_batch().loss_mask)


def test_ptx_is_one_step_of_adam_and_not_two(gradients):
  """Two steps would cancel the coefficient: Adam is blind to scale."""
  config = dataclasses.replace(ONE, ptx_coef=1.5)
  optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1))
  state = make_state(optimizer=lambda rate: optimizer)
  after, _ = make_train(config, optimizer)(
    state, batch_of(config), ptx_batch(), KEY
  )
  combined = jax.tree.map(
    lambda g, p: g + 1.5 * p, gradients['policy'], gradients['ptx']
  )
  updates, _ = optimizer.update(
    combined, state.policy.opt_state, state.policy.params
  )
  tiny.assert_trees_close(
    after.policy.params,
    optax.apply_updates(state.policy.params, updates),
    **CLOSE,
  )
  counts = optax.tree.get_all_with_path(after.policy.opt_state, 'count')
  assert [int(count) for _, count in counts] == [1]


def test_ptx_coefficient_zero_is_ppo_bit_for_bit():
  """The pretraining part takes no key and no order away from PPO: a run whose
  pretraining gradients vanish, and one that has none, are one run.

  With gamma 0 it is one program, too: bit for bit. With gradients that vanish
  it is another, which may add up in another order.
  """

  def nothing(params, frozen, batch, key):
    zero = jnp.sum(params['table'] * 0.0)
    return zero, (jnp.float32(1.0), {'nll': (zero, jnp.float32(1.0))})

  state, batch = make_state(0.5), batch_of()
  plain, plain_metrics = make_train(PPO)(state, batch, None, KEY)
  given, _ = make_train(PPO)(state, batch, ptx_batch(), KEY)
  tiny.assert_trees_equal(given, plain)
  with_ptx = dataclasses.replace(PPO, ptx_coef=1.0)
  zero, zero_metrics = make_train(with_ptx, ptx_loss=nothing)(
    state, batch, ptx_batch(), KEY
  )
  tiny.assert_trees_close(zero, plain, rtol=1e-6, atol=1e-7)
  assert set(zero_metrics) - set(plain_metrics) == {
    'ptx/loss',
    'ptx/gradient_norm',
    'ppo/policy/ppo_gradient_norm',
  }


def test_microbatches_change_nothing():
  """Rows of a minibatch have different lengths: averages of averages would
  show."""
  state = make_state(0.5)
  config = dataclasses.replace(PPO, ptx_coef=1.5)
  whole, whole_metrics = make_train(config)(
    state, batch_of(config), ptx_batch(), KEY
  )
  halved = dataclasses.replace(config, num_microbatches=2)
  # The same minibatches, each in two groups.
  sampled = make_rollout()
  prompts, responses = tiny.lengths_of(sampled)
  groups = packing.deal(prompts + responses, 3, np.random.default_rng([0, 0]))
  layouts = [
    tiny.lay_out(
      sampled,
      groups.reshape(3 * num, -1),
      num_minibatches=3,
      num_microbatches=num,
    )
    for num in (1, 2)
  ]
  fields = scored()[0]
  batches = [
    RLBatch(
      packing.pack_episodes(sampled, layout),
      **{name: packing.pack_responses(x, layout) for name, x in fields.items()},
    )
    for layout in jax.tree.map(jnp.asarray, layouts)
  ]
  tiny.assert_trees_equal(batches[0], batch_of(config))
  halves, metrics = make_train(halved)(state, batches[1], ptx_batch(), KEY)
  tiny.assert_trees_close(halves, whole, **CLOSE)
  tiny.assert_trees_close(metrics, whole_metrics, rtol=1e-4, atol=1e-4)


def assert_same_place(a, b):
  assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.shape, a.sharding)


def test_a_mesh_changes_nothing():
  """The tiny Transformers with PPO-ptx, on one device and on eight."""
  state = tiny.ppo_state()
  sampled = tiny.generate(
    state.policy.params, jax.tree.map(jnp.asarray, tiny.prompts()), KEY
  )

  layout = tiny.lay_out(sampled)

  def iterate(state, sampled, layout, text):
    scores = tiny.score(tiny.params('scalar'), sampled, layout)
    batch, kl, metrics = tiny.penalise(
      state, {'reference': state.ema}, sampled, layout, scores
    )
    state, more = tiny.train(state, {}, batch, text, kl, KEY)
    return batch, state, {**metrics, **more}

  alone = iterate(
    state, sampled, layout, jax.tree.map(jnp.asarray, tiny.text())
  )
  mesh = sharding.make_mesh((2, 2, 2))

  def put(params, kind):
    layout = model_fns.abstract_params(kind, tiny.CONFIG, mesh)
    return jax.device_put(params, sharding.shardings_of(layout))

  with sharding.use_mesh(mesh):
    policy = put(state.policy.params, 'policy')
    value = put(state.value.params, 'scalar')
    cut = state.replace(
      policy=train_state.create(policy, tiny.POLICY_ADAM),
      value=train_state.create(value, tiny.VALUE_ADAM),
      ema=policy,
    )
    spread = iterate(
      cut,
      sharding.put_batch(jax.device_get(sampled), mesh),
      sharding.put_batch(layout, mesh),
      sharding.put_batch(tiny.text(), mesh),
    )
  tiny.assert_trees_close(spread[0], alone[0], **CLOSE)
  # Adam divides by small numbers: 1e-5 of the weights, not of the steps.
  tiny.assert_trees_close(
    spread[1].policy.params, alone[1].policy.params, **CLOSE
  )
  tiny.assert_trees_close(
    spread[1].value.params, alone[1].value.params, **CLOSE
  )
  tiny.assert_trees_close(spread[1].ema, alone[1].ema, **CLOSE)
  tiny.assert_trees_close(spread[2], alone[2], rtol=1e-3, atol=1e-3)
  # Scored with 16 rows, updated with 8, on any mesh: the first ratio is 1.
  for out in (alone, spread):
    first = ratio(out[2], 'first/ppo/policy/ratio')
    np.testing.assert_allclose(first, 1, atol=1e-5)
  # New weights and moments stay where the old ones were.
  for tree in (
    spread[1].policy.params,
    spread[1].ema,
    spread[1].policy.opt_state[1][0].mu,
  ):
    jax.tree.map(assert_same_place, tree, policy)


# --- Order --------------------------------------------------------------------


def test_each_inner_epoch_takes_every_row_once_in_an_order_of_its_own():
  """A policy of counters: its gradient marks, in the line of the present
  update, the rows of the minibatch."""
  config = dataclasses.replace(PPO, num_epochs=3, num_minibatches=4)
  num_steps = 12

  def mark(params, frozen, batch, key):
    line = jnp.round(params['step']).astype(jnp.int32)
    # The episode's number stands in its first column.
    rows = batch.episodes.tokens[:, 0]
    loss = -params['step'] - jnp.sum(params['seen'][line][rows])
    one = (jnp.float32(1.0), jnp.float32(1.0))
    return loss, (jnp.float32(1.0), {'ppo/policy/ratio': one})

  sampled = make_rollout()
  sampled = sampled.replace(
    tokens=sampled.tokens.at[:, 0].set(jnp.arange(B)),
  )
  # The value table has to read the row numbers, too.
  value = {'values': jnp.zeros(B)}
  policy = {'seen': jnp.zeros((num_steps, B)), 'step': jnp.zeros(())}
  state = ppo.RLState(
    policy=train_state.create(policy, sgd(1.0)),
    value=train_state.create(value, sgd(0.0)),
    ema=policy,
    kl=rewards.KLState(coef=jnp.float32(0.1)),
  )
  train = make_train(config, policy_loss_fn=mark)
  orders = []
  for seed in (0, 0, 1):
    batch = batch_of(config, sampled=sampled, seed=seed)
    after, _ = train(state, batch, None, KEY)
    seen = np.asarray(after.policy.params['seen'])
    assert after.policy.params['step'] == num_steps
    # A minibatch has 3 of the 12 rows; an epoch's 4 have each row once.
    np.testing.assert_array_equal(seen.sum(axis=1), 3)
    np.testing.assert_array_equal(seen.reshape(3, 4, B).sum(axis=1), 1)
    orders.append(seen.reshape(3, -1))
  np.testing.assert_array_equal(orders[0], orders[1])
  for a, b in ((0, 1), (0, 2), (1, 2)):
    assert (orders[0][a] != orders[0][b]).any()
  for epoch in range(3):
    assert (orders[0][epoch] != orders[2][epoch]).any()


# --- Moving average -----------------------------------------------------------


@pytest.mark.parametrize(
  ('ema_every', 'expected'), [('update', 0.971), ('iteration', 0.98)]
)
def test_moving_average_by_hand(ema_every, expected):
  """One weight, 1, whose gradient is 1: 0.9 and 0.8 after two updates.

  every update:     0.9 * 1 + 0.1 * 0.9 = 0.99; 0.9 * 0.99 + 0.1 * 0.8 = 0.971
  every iteration:  0.9 * 1 + 0.1 * 0.8 = 0.98
  """

  def slope(params, frozen, batch, key):
    one = jnp.float32(1.0)
    metrics = {
      'ppo/policy/ratio': (one, one),
      'ppo/policy/clipfrac': (one, one),
    }
    return params['weight'], (one, metrics)

  config = dataclasses.replace(
    PPO, num_minibatches=2, ema_decay=0.9, ema_every=ema_every
  )
  policy = {'weight': jnp.ones(())}
  state = make_state(0.1).replace(
    policy=train_state.create(policy, sgd(0.1)), ema=policy
  )
  after, _ = make_train(config, policy_loss_fn=slope)(
    state, batch_of(config), None, KEY
  )
  np.testing.assert_allclose(after.policy.params['weight'], 0.8, rtol=1e-6)
  np.testing.assert_allclose(after.ema['weight'], expected, rtol=1e-6)
  # The KL coefficient is not the update's business, but it is kept.
  assert after.kl.coef == state.kl.coef


# --- Things that are not numbers ----------------------------------------------


def test_a_score_that_is_not_finite_skips_the_updates_it_reaches():
  bad = jnp.linspace(-1.0, 1.0, B).at[4].set(jnp.nan)
  state = make_state(0.5)
  # Whitened over the whole batch, it reaches every minibatch of the policy;
  # the value model misses only the minibatch that has it.
  batch = batch_of(fields=scored(scores=bad)[0])
  after, metrics = make_train(PPO)(state, batch, None, KEY)
  tiny.assert_trees_equal(after.policy.params, state.policy.params)
  assert after.policy.num_skipped == after.policy.num_consecutive_skipped == 3
  assert metrics['policy/optimizer/skipped'] == (3.0, 3.0)
  assert after.value.num_skipped == 1
  assert metrics['value/optimizer/skipped'] == (1.0, 3.0)
  assert metrics['value/optimizer/gradient_norm'][1] == 2.0
  tiny.assert_trees_close(after.ema, state.ema, rtol=1e-6)
  # Not whitened, it skips one update of either; the others are made.
  raw, _ = scored(dataclasses.replace(PPO, whiten_advantages=False), scores=bad)
  after, _ = make_train(PPO)(state, batch_of(fields=raw), None, KEY)
  assert (after.policy.num_skipped, after.value.num_skipped) == (1, 1)
  assert after.policy.step == 3
  params = np.asarray(after.policy.params['table'])
  assert np.isfinite(params).all()
  assert (params != np.asarray(state.policy.params['table'])).any()


def test_what_stands_in_padding_reaches_no_weight():
  """Garbage where the mask is False: in tokens, values and log-probabilities
  of the models, NaN included."""
  state, batch = make_state(0.5), batch_of()
  clean, clean_metrics = make_train(PPO)(state, batch, None, KEY)

  mask = batch.episodes.response_mask
  minibatches = jnp.swapaxes(mask.reshape(-1, 3, R), 0, 1)

  def real_of(where):
    """The mask of the minibatch that has these rows."""
    found = [
      (where == w).all()
      for w in jnp.swapaxes(batch.episodes.where.reshape(-1, 3, R), 0, 1)
    ]
    return jnp.select(found, list(minibatches))

  def dirty_logprobs(params, tokens, segments, where=None, dropout_key=None):
    logprobs, entropies = table_logprobs(params, tokens, segments, where)
    # Added, so that a gradient that reaches the padding reaches the table.
    return (
      logprobs + jnp.where(real_of(where), 0.0, jnp.nan),
      entropies + jnp.where(real_of(where), 0.0, jnp.inf),
    )

  def dirty_values(params, tokens, segments):
    before_real = jnp.pad(segments[:, 1:] > 0, ((0, 0), (0, 1)))
    values = table_values(params, tokens, segments)
    return values + jnp.where(before_real, 0.0, jnp.nan)

  dirty, metrics = make_train(
    PPO,
    policy_loss_fn=ppo.make_policy_loss(dirty_logprobs, PPO),
    value_loss_fn=ppo.make_value_loss(dirty_values, PPO),
  )(state, batch, None, KEY)
  # Two programs: what got through would be NaN, and not a last bit.
  tiny.assert_trees_close(dirty, clean, rtol=1e-6, atol=1e-7)
  tiny.assert_trees_close(metrics, clean_metrics, rtol=1e-6, atol=1e-7)


# --- Errors -------------------------------------------------------------------


def abstractly(config, text=None, batch=None):
  return jax.eval_shape(
    make_train(config),
    make_state(),
    batch_of(config) if batch is None else batch,
    text,
    KEY,
  )


def test_sizes_that_do_not_divide():
  fives = dataclasses.replace(PPO, num_minibatches=5)
  with pytest.raises(ValueError, match='12 rows of episodes .* into 5 steps'):
    abstractly(fives, batch=batch_of())
  with pytest.raises(ValueError, match='3 microbatches do not .* batch of 4'):
    abstractly(dataclasses.replace(PPO, num_microbatches=3), batch=batch_of())
  with_ptx = dataclasses.replace(PPO, ptx_coef=1.0)
  with pytest.raises(ValueError, match='10 pretraining rows .* 3 minibatches'):
    abstractly(with_ptx, ptx_batch(10))
  with pytest.raises(ValueError, match='needs pretraining rows'):
    abstractly(with_ptx)
  with pytest.raises(ValueError, match=r"no loss is given for \['ptx'\]"):
    ppo.make_train(
      {'policy': ppo.make_policy_loss(table_logprobs, PPO)}, {}, with_ptx
    )


def kl_gradient(estimator):
  """Of the penalty alone, as one step of size 1; policy and reference.

  16 responses of one token each, as often as the policy's probabilities of 8,
  4, 2 and 2 sixteenths say: a mean over them is an expectation.
  """
  tokens = np.repeat([0, 1, 2, 3], [8, 4, 2, 2])
  table = np.full((V, V), -1e9, np.float32)
  table[V - 1, :4] = np.log([8 / 16, 4 / 16, 2 / 16, 2 / 16])
  reference = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
  sampled = Rollout(
    tokens=jnp.asarray(np.stack([np.full(16, V - 1), tokens], 1), jnp.int32),
    mask=jnp.ones((16, 2), bool),
    response_mask=jnp.ones((16, 1), bool),
    logprobs=jnp.zeros((16, 1)),
    ended=jnp.ones(16, bool),
  )
  config = dataclasses.replace(ONE, kl_in='loss', kl_estimator=estimator)
  old = jnp.asarray(table[V - 1, tokens])[:, None]
  batch = batch_of(
    config,
    {
      'old_logprobs': old,
      'ref_logprobs': reference[tokens][:, None],
      'advantages': jnp.zeros((16, 1)),
    },
    sampled,
  )
  loss_fn = ppo.make_policy_loss(table_logprobs, config)
  gradient, _, _ = train_state.accumulate_gradients(
    loss_fn, {'table': jnp.asarray(table)}, {'kl_coef': 0.5}, batch, KEY
  )
  return gradient['table'][V - 1, :4], table[V - 1, :4], reference


@pytest.mark.parametrize('estimator', ['k1', 'k2', 'k3'])
def test_the_gradient_of_a_penalty_in_the_loss(estimator):
  """k1 and k2: of KL(pi || ref). k3: of KL(ref || pi)."""

  def divergence(logits, reference):
    logprobs = jax.nn.log_softmax(logits)
    if estimator == 'k3':
      return jnp.sum(jnp.exp(reference) * (reference - logprobs))
    return jnp.sum(jnp.exp(logprobs) * (logprobs - reference))

  found, logits, reference = kl_gradient(estimator)
  expected = 0.5 * jax.grad(divergence)(jnp.asarray(logits), reference)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
  assert np.abs(expected).min() > 0.01


def test_a_penalty_in_the_loss_is_not_in_the_reward():
  inside, metrics = scored(
    dataclasses.replace(PPO, kl_in='loss', whiten_advantages=False)
  )
  without, _ = scored(dataclasses.replace(PPO, whiten_advantages=False))
  assert np.abs(inside['returns'] - without['returns']).max() > 1e-3
  # What is paid is the score; the divergence is reported all the same.
  assert metrics['objective/reward'] == metrics['objective/score']
  assert metrics['objective/kl'][0] > 0
  np.testing.assert_array_equal(inside['ref_logprobs'], without['ref_logprobs'])


def test_group_advantages_are_those_of_the_responses():
  """The same for all of a response's tokens; 0 on padding; no returns."""
  token_rewards = jnp.array([[1.0, 2, 9], [4, 9, 9], [0, 0, 5], [9, 9, 9]])
  mask = jnp.array(
    [[True, True, False], [True, False, False], [True] * 3, [False] * 3]
  )
  found, returns = ppo.group_advantages(advantages.leave_one_out, 2)(
    jnp.where(mask, token_rewards, 0), mask, None
  )
  # Returns 3, 4, 5 and 0 in groups of two: -1, 1, 5, -5.
  np.testing.assert_array_equal(
    found, [[-1, -1, 0], [1, 0, 0], [5, 5, 5], [0, 0, 0]]
  )
  assert returns is None


@pytest.mark.parametrize(
  ('num_minibatches', 'num_slices', 'expected'),
  # Rows of the sample, and then of a slice of the whole.
  [(1, 8, [2, 2]), (8, 1, [2, 16]), (4, 8, [2, 2]), (1, 1, [16, 16])],
)
def test_the_sampler_is_compared_on_at_most_a_slice(
  num_minibatches, num_slices, expected
):
  sampled = make_rollout()
  layout = tiny.lay_out(sampled)
  rows = packing.first_epoch(packing.pack_episodes(sampled, layout), layout)
  rows = jax.tree.map(lambda x: jnp.repeat(x[:1], 16, axis=0), rows)
  sizes = []

  def read(rows):
    sizes.append(len(rows.tokens))
    return jnp.zeros(rows.response_mask.shape)

  config = dataclasses.replace(PPO, num_minibatches=num_minibatches)
  # One number is far off, in a row that every sample has.
  logprobs = jnp.zeros(rows.response_mask.shape).at[0, 0].set(-1.0)
  found, metrics = ppo._old_logprobs(read, rows, logprobs, num_slices, config)
  assert sizes == expected
  np.testing.assert_array_equal(found, 0.0)
  assert metrics['objective/sampler_trusted'][0] == 0


def test_without_a_value_model_there_is_none():
  """No values in the batch, no value in the state, no value loss."""
  sampled, config = make_rollout(), PPO
  state = make_state(0.5).replace(value=None)

  def advantage_fn(token_rewards, mask, values):
    assert values is None
    total = jnp.sum(token_rewards, axis=1, keepdims=True)
    return jnp.where(mask, total, 0.0), None

  penalise = ppo.make_penalise(table_logprobs, None, advantage_fn, config)
  train = ppo.make_train(
    {'policy': ppo.make_policy_loss(table_logprobs, config)},
    {'policy': sgd(0.0)},
    config,
  )

  @jax.jit
  def iterate(state, sampled, layout):
    frozen = {'reference': state.policy.params}
    scores = jnp.linspace(-1.0, 1.0, B)
    batch, kl, metrics = penalise(state, frozen, sampled, layout, scores)
    assert batch.old_values is None and batch.returns is None
    state, more = train(state, {}, batch, None, kl, KEY)
    return state, {**metrics, **more}

  layout = tiny.lay_out(sampled, num_minibatches=3)
  after, metrics = iterate(state, sampled, layout)
  assert after.value is None
  assert not [name for name in metrics if 'val' in name]
  assert ratio(metrics, 'ppo/advantage') != 0
  assert (after.policy.params['table'] != state.policy.params['table']).any()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'ema_every': 'epoch'}, "one of 'update', 'iteration': 'epoch'"),
    ({'num_minibatches': 0}, 'num_minibatches must be at least 1: 0'),
    ({'num_epochs': 0}, 'num_epochs must be at least 1: 0'),
    ({'num_microbatches': -1}, 'num_microbatches must be at least 1: -1'),
    ({'clip': 0.0}, 'clip must be positive: 0.0'),
    ({'value_clip': float('nan')}, 'value_clip must be positive: nan'),
    ({'ptx_coef': -1.0}, 'ptx_coef must be .* not negative: -1.0'),
    ({'ptx_coef': math.inf}, 'ptx_coef must be finite, .*: inf'),
    ({'missing_end_score': math.nan}, 'missing_end_score must be .*: nan'),
    ({'kl_target': math.inf}, 'kl_target must be positive, .*: inf'),
    ({'kl_target': 0.0}, 'kl_target must be positive'),
    ({'kl_horizon': 0}, 'kl_horizon must be at least 1: 0'),
    ({'ema_decay': 1.0}, r'ema_decay must be in \[0, 1\): 1.0'),
  ],
)
def test_config_errors(changes, message):
  with pytest.raises(ValueError, match=message):
    ppo.PPOConfig(**changes)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_first_minibatch_tells_a_fault_from_rounding(dtype):
  """In both dtypes: another batch is none; temperature and positions are."""
  config = dataclasses.replace(tiny.CONFIG, compute_dtype=dtype)
  logprobs_fn = model_fns.logprobs_fn(
    model_fns.make_module('policy', config), tiny.TEMPERATURE
  )
  hotter = model_fns.logprobs_fn(
    model_fns.make_module('policy', config), 1.3 * tiny.TEMPERATURE
  )
  policy = tiny.params('policy')
  sampled = tiny.generate(
    policy, jax.tree.map(jnp.asarray, tiny.prompts()), jax.random.key(0)
  )
  rows = tiny.as_rows(sampled)

  def read(fn, rows):
    return fn(policy, rows.tokens, rows.segments, rows.where)[0]

  old = read(logprobs_fn, rows)

  def alarm(new):
    ratios = jnp.exp(new - old)
    kl = masked.mean(ratios - 1 - new + old, sampled.response_mask)
    ratio = masked.mean(ratios, sampled.response_mask)
    row = {
      'step': 1,
      'first/ppo/policy/ratio': float(ratio),
      'first/ppo/policy/approxkl': float(kl),
    }
    return set(alarms.find([row], compute_dtype=dtype))

  halves = [
    read(logprobs_fn, jax.tree.map(lambda x, i=i: x[i : i + 2], rows))
    for i in range(0, len(rows.tokens), 2)
  ]
  assert alarm(jnp.concatenate(halves)) == set()
  assert alarm(read(hotter, rows)) == {'ratio'}
  # Padding taken for text moves every position.
  all_real = rows.replace(segments=jnp.ones_like(rows.segments))
  assert alarm(read(logprobs_fn, all_real)) == {'ratio'}
