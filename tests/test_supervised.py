"""The step that pretraining, SFT and reward models share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instruct_jax import losses, masked, model_fns, supervised
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import train_state
from instruct_jax.models.heads import token_logprobs
from instruct_jax.types import TextBatch
from tests import tiny

pytestmark = pytest.mark.usefixtures('quick_compile')

V, B, T = 8, 8, 6
KEY = jax.random.key(0)
OPTIMIZER = optax.adam(0.1)


def table_logprobs(params, tokens, segments, where=None, dropout_key=None):
  found = token_logprobs(params['table'][tokens[:, :-1]], tokens[:, 1:])
  return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (1, 0))), found)


LOSS = supervised.make_text_loss(table_logprobs)


def make_state(seed=0):
  rng = np.random.default_rng(seed)
  table = jnp.asarray(rng.normal(size=(V, V)), jnp.float32)
  return train_state.create({'table': table}, OPTIMIZER)


def make_text(rng) -> TextBatch:
  """Very ragged rows: 1 token of loss in one half, all in the other."""
  lengths = np.where(np.arange(B) < B // 2, 2, T)
  mask = np.arange(T)[None] < lengths[:, None]
  loss_mask = mask & (np.arange(T)[None] > 0)
  return jax.tree.map(
    jnp.asarray,
    TextBatch(
      rng.integers(0, V, (B, T)).astype(np.int32),
      mask,
      loss_mask,
      mask.astype(np.int32),
    ),
  )


@functools.cache
def make_update(num_microbatches=1, loss_fn=LOSS):
  return jax.jit(supervised.make_update(loss_fn, OPTIMIZER, num_microbatches))


def test_loss_by_hand():
  # A table of zeros gives each of 8 tokens log(1/8) = -2.0794415.
  batch = TextBatch(
    tokens=jnp.array([[1, 2, 3], [4, 5, 0]]),
    mask=jnp.array([[True, True, True], [True, True, False]]),
    loss_mask=jnp.array([[False, True, True], [False, True, False]]),
    segments=jnp.array([[1, 1, 1], [1, 1, 0]]),
  )
  summed, (count, metrics) = LOSS({'table': jnp.zeros((V, V))}, {}, batch, KEY)
  np.testing.assert_allclose(summed, 3 * 2.0794415, rtol=1e-6)
  assert count == 3.0
  assert metrics['nll'] == (summed, count)


def test_packed_rows_have_the_loss_of_rows_of_their_own():
  """Through a Transformer: no attention across, positions from 0 again."""
  words = tokenizer_lib.train_word_level([f'w{i}' for i in range(27)])
  generator = np.random.default_rng(0)

  def text(low, high):
    numbers = generator.integers(0, 27, generator.integers(low, high))
    return ' '.join(f'w{number}' for number in numbers)

  demonstrations = [
    records.Demonstration(text(1, 5), text(1, 6)) for _ in range(tiny.B)
  ]
  loss_fn = supervised.make_text_loss(model_fns.logprobs_fn(tiny.POLICY))

  @jax.jit
  def loss_and_gradient(params, batch):
    def mean(params):
      summed, (count, _) = loss_fn(params, {}, batch, KEY)
      return summed / count, count

    return jax.value_and_grad(mean, has_aux=True)(params)

  found = []
  for pack in (False, True):
    rows, dropped = loader.demonstration_rows(
      demonstrations, words, tiny.T, loss_on='response', pack=pack
    )
    assert not dropped.total
    assert (rows.segments.max() > 1) == pack
    assert (loader.num_rows(rows) < tiny.B) == pack
    found.append(loss_and_gradient(tiny.params('policy'), rows))
  (alone, packed) = found
  assert alone[0][1] == packed[0][1] > tiny.B  # As many tokens.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
    alone,
    packed,
  )


def test_microbatches_change_nothing(rng):
  batch = make_text(rng)
  whole, metrics = make_update()(make_state(), {}, batch, KEY)
  assert metrics['nll'][1] == batch.loss_mask.sum()
  np.testing.assert_allclose(
    metrics['loss'][0], metrics['nll'][0] / metrics['nll'][1], rtol=1e-6
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    make_update(4)(make_state(), {}, batch, KEY),
    (whole, metrics),
  )


def test_reward_microbatches_keep_the_weight_of_a_prompt(rng):
  """Prompts with many pairs, few and none, in halves that hold unequal numbers
  of them: each prompt that has a pair weighs the same."""

  def loss_fn(params, frozen, batch, key):
    scores, ranks = params['scores'][batch['rows']], batch['ranks']
    loss, pairs, _ = losses.ranking_loss(scores, ranks)
    counted = pairs > 0
    summed, weight = masked.metric(loss, counted)
    return summed, (weight, {'loss': (summed, weight)})

  ranks = np.zeros((B, 4), np.int32)
  ranks[0], ranks[1, :2], ranks[2] = (1, 2, 3, 4), (1, 2), 1
  ranks[5], ranks[6, :3], ranks[7] = (2, 1, 1, 3), (1, 2, 3), (4, 3, 2, 1)
  batch = {'rows': jnp.arange(B), 'ranks': jnp.asarray(ranks)}
  params = {'scores': jnp.asarray(rng.normal(size=(B, 4)), jnp.float32)}
  state = train_state.create(params, OPTIMIZER)
  accumulate = jax.jit(train_state.accumulate_gradients, static_argnums=(0, 5))
  whole = accumulate(loss_fn, params, {}, batch, KEY, 1)
  parts = accumulate(loss_fn, params, {}, batch, KEY, 4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    parts,
    whole,
  )
  # Prompts 0, 1, 5, 6 and 7 have a pair. The mean is over these five.
  assert whole[2]['loss'][1] == 5.0
  # A batch without any pair moves nothing, and is finite.
  ties = batch | {'ranks': jnp.ones((B, 4), jnp.int32)}
  after, metrics = make_update(2, loss_fn)(state, {}, ties, KEY)
  assert metrics['optimizer/skipped'] == (0.0, 1.0)
  np.testing.assert_array_equal(after.params['scores'], params['scores'])


@pytest.mark.parametrize('num_microbatches', [1, 4])
def test_a_loss_that_is_not_finite_is_skipped(rng, num_microbatches):
  batch = make_text(rng)
  bad = make_state()
  bad = bad.replace(params={'table': bad.params['table'].at[3].set(jnp.nan)})
  batch = batch.replace(tokens=batch.tokens.at[B - 1, 1].set(3))
  update = make_update(num_microbatches)
  after, metrics = update(bad, {}, batch, KEY)
  jax.tree.map(
    np.testing.assert_array_equal,
    (after.params, after.opt_state),
    (bad.params, bad.opt_state),
  )
  assert metrics['optimizer/skipped'] == (1.0, 1.0)
  assert metrics['optimizer/gradient_norm'] == (0.0, 0.0)
  assert (after.num_skipped, after.step) == (1, 1)
