"""Ranking, policy and value losses."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax import losses

ranking_loss = jax.jit(losses.ranking_loss, static_argnames='divisor')
clipped_policy_loss = jax.jit(
  losses.clipped_policy_loss, static_argnames='clip'
)
clipped_value_loss = jax.jit(losses.clipped_value_loss, static_argnames='clip')


def ranking_loop(scores, ranks, divisor):
  """Equation 1, one pair at a time; 0 marks an absent candidate."""
  out = []
  for row, places in zip(scores, ranks, strict=True):
    present = [i for i, place in enumerate(places) if place > 0]
    terms, won = [], 0.0
    for w, x in itertools.permutations(present, 2):
      if places[w] < places[x]:
        margin = float(row[w]) - float(row[x])
        terms.append(math.log1p(math.exp(-margin)))
        won += 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
    K = len(present)
    Z = len(terms) if divisor == 'surviving' else K * (K - 1) / 2
    out.append((sum(terms) / max(Z, 1), len(terms), won))
  return [np.array(column) for column in zip(*out, strict=True)]


def test_ranking_by_hand():
  # b > c > a; scores 0, 2, 1. Pairs (b, c): margin 1; (b, a): 2; (c, a): 1.
  loss, pairs, correct = ranking_loss(
    jnp.array([[0.0, 2.0, 1.0]]), jnp.array([[3, 1, 2]])
  )
  # -log sigmoid(1) = 0.3132617, -log sigmoid(2) = 0.1269280.
  expected = (2 * 0.3132617 + 0.1269280) / 3
  np.testing.assert_allclose(loss, [expected], rtol=1e-5)
  assert (pairs.tolist(), correct.tolist()) == ([3.0], [3.0])


def test_ranking_of_two_is_the_pairwise_loss():
  loss, pairs, correct = ranking_loss(
    jnp.array([[0.5, 0.5], [1.0, 3.0]]), jnp.array([[1, 2], [1, 2]])
  )
  # log 2 where the scores tie (half right), log(1 + e^2) where they are wrong.
  np.testing.assert_allclose(loss, [0.6931472, 2.1269280], rtol=1e-5)
  assert (pairs.tolist(), correct.tolist()) == ([1.0, 1.0], [0.5, 0.0])


def test_ties_are_dropped_under_both_divisors():
  # a = b > c with scores 0, 5, 0: pairs (a, c) margin 0 and (b, c) margin 5.
  scores, ranks = jnp.array([[0.0, 5.0, 0.0]]), jnp.array([[1, 1, 2]])
  total = 0.6931472 + 0.0067153
  for divisor, Z in (('surviving', 2), ('all', 3)):
    loss, pairs, correct = ranking_loss(scores, ranks, divisor)
    np.testing.assert_allclose(loss, [total / Z], rtol=1e-5)
    assert (pairs.tolist(), correct.tolist()) == ([2.0], [1.5])


@pytest.mark.parametrize('divisor', ['surviving', 'all'])
def test_ranking_against_a_loop(rng, divisor):
  scores = rng.normal(size=(20, 5)).astype(np.float32)
  scores[0, 1] = scores[0, 0]
  ranks = rng.integers(0, 4, (20, 5)).astype(np.int32)
  ranks[1], ranks[2], ranks[3] = 0, (1, 0, 0, 0, 0), 2
  result = ranking_loss(jnp.array(scores), jnp.array(ranks), divisor)
  for ours, expected in zip(
    result, ranking_loop(scores, ranks, divisor), strict=True
  ):
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
  # No candidates, one candidate, all tied: nothing to learn.
  assert result[0][1:4].tolist() == [0, 0, 0]
  assert result[1][1:4].tolist() == [0, 0, 0]


@pytest.mark.parametrize('divisor', ['surviving', 'all'])
def test_a_prompt_is_the_mean_of_its_labelers(rng, divisor):
  scores = rng.normal(size=(6, 4)).astype(np.float32)
  ranks = rng.integers(1, 4, (6, 3, 4)).astype(np.int32)
  ranks[0, 1:] = 0  # One labeler.
  ranks[1, 2] = 2  # The third one ties everything.
  ranks[2] = 1  # All do.
  ranks[3, :, 3] = 0  # Three candidates.
  loss, pairs, correct = ranking_loss(
    jnp.array(scores)[:, None], jnp.array(ranks), divisor
  )
  loss = losses.mean_over_rankings(loss, pairs)
  result = loss, pairs.sum(axis=1), correct.sum(axis=1)
  for prompt in range(6):
    loss, pairs, correct = ranking_loop(
      [scores[prompt]] * 3, ranks[prompt], divisor
    )
    counted = loss[pairs > 0]
    expected = counted.mean() if counted.size else 0.0
    ours = [float(column[prompt]) for column in result]
    np.testing.assert_allclose(
      ours, [expected, pairs.sum(), correct.sum()], rtol=1e-5, atol=1e-6
    )


# --- Plackett-Luce ------------------------------------------------------------


def plackett_luce_loop(scores, ranks):
  """One choice at a time; 0 marks an absent candidate."""
  out = []
  for row, places in zip(scores, ranks, strict=True):
    terms = []
    for i, place in enumerate(places):
      worse = [row[j] for j, other in enumerate(places) if other > place > 0]
      if worse:
        total = math.exp(row[i]) + sum(map(math.exp, worse))
        terms.append(math.log(total) - float(row[i]))
    out.append((sum(terms) / max(len(terms), 1), len(terms)))
  return [np.array(column) for column in zip(*out, strict=True)]


def test_plackett_luce_by_hand():
  # b > c > a with scores 0, 2, 1: the choice of b among e^0, e^2, e^1, then of
  # c among e^0, e^1. log(1 + e^2 + e) - 2 = 0.4076060, log(1 + e) - 1 =
  # 0.3132617. A tie of all has no choice.
  loss, choices = losses.plackett_luce_loss(
    jnp.array([[0.0, 2, 1], [3, 1, 2]]), jnp.array([[3, 1, 2], [1, 1, 1]])
  )
  np.testing.assert_allclose(loss, [0.3604338, 0], rtol=1e-5)
  assert choices.tolist() == [2, 0]


def test_plackett_luce_against_a_loop_with_ties_and_gaps(rng):
  scores = rng.normal(size=(40, 5)).astype(np.float32)
  ranks = rng.integers(0, 4, (40, 5)).astype(np.int32)
  loss, choices = losses.plackett_luce_loss(jnp.array(scores), jnp.array(ranks))
  expected = plackett_luce_loop(scores, ranks)
  np.testing.assert_allclose(loss, expected[0], rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(choices, expected[1])


def test_plackett_luce_of_two_is_the_pairwise_loss(rng):
  scores = jnp.asarray(rng.normal(size=(8, 2)), jnp.float32)
  ranks = jnp.array([[1, 2], [2, 1]] * 4)
  loss, _ = losses.plackett_luce_loss(scores, ranks)
  np.testing.assert_allclose(loss, ranking_loss(scores, ranks)[0], rtol=1e-5)


def test_an_absent_candidate_has_no_gradient_under_plackett_luce():
  scores = jnp.array([[1.0, jnp.nan, 0.5]])
  ranks = jnp.array([[1, 0, 2]])
  gradient = jax.grad(
    lambda s: jnp.sum(losses.plackett_luce_loss(s, ranks)[0])
  )(scores)
  # p = sigmoid(0.5) = 0.6224593: the chosen one gets p - 1.
  np.testing.assert_allclose(gradient, [[-0.3775407, 0, 0.3775407]], rtol=1e-5)


def test_ranking_sees_differences_and_not_the_order_of_candidates(rng):
  scores = rng.normal(size=(6, 5)).astype(np.float32)
  ranks = rng.integers(0, 4, (6, 5)).astype(np.int32)
  loss, *_ = ranking_loss(jnp.array(scores), jnp.array(ranks))
  order = rng.permutation(5)
  permuted, *_ = ranking_loss(
    jnp.array(scores[:, order]), jnp.array(ranks[:, order])
  )
  np.testing.assert_allclose(permuted, loss, rtol=1e-5)
  shifted, *_ = ranking_loss(
    jnp.array(scores + rng.normal(size=(6, 1)).astype(np.float32)),
    jnp.array(ranks),
  )
  np.testing.assert_allclose(shifted, loss, rtol=1e-4)
  # Only the order of the ranks counts, not their distance.
  spread, *_ = ranking_loss(jnp.array(scores), jnp.array(ranks * 7))
  np.testing.assert_array_equal(spread, loss)


def test_every_prompt_weighs_the_same():
  """A prompt with 3 pairs is no more than one with 1: the gradient of the mean
  over prompts pushes equally on both when their margins are equal."""
  ranks = jnp.array([[1, 2, 2, 2], [1, 2, 0, 0]])

  def mean_loss(scores):
    return jnp.mean(ranking_loss(scores, ranks)[0])

  grads = np.asarray(jax.grad(mean_loss)(jnp.zeros((2, 4))))
  # d/dm -log sigmoid(m) at 0 is -1/2; halved by the mean over two prompts.
  np.testing.assert_allclose(grads[:, 0], [-0.25, -0.25], rtol=1e-6)
  np.testing.assert_allclose(grads[0, 1:], 0.25 / 3, rtol=1e-6)
  np.testing.assert_allclose(grads[1, 1:], [0.25, 0, 0], rtol=1e-6)


@pytest.mark.parametrize('hidden', [np.nan, np.inf, -np.inf])
def test_absent_candidates_reach_neither_loss_nor_gradient(rng, hidden):
  scores = rng.normal(size=(4, 4)).astype(np.float32)
  ranks = jnp.array([[1, 2, 0, 3], [0, 1, 1, 2], [0, 0, 0, 0], [2, 1, 3, 4]])

  @jax.jit
  def run(scores):
    def summed(scores):
      loss, pairs, correct = ranking_loss(scores, ranks)
      return jnp.sum(loss), (loss, pairs, correct)

    return jax.value_and_grad(summed, has_aux=True)(scores)

  absent = np.asarray(ranks) == 0
  expected = run(np.where(absent, 0, scores))
  got = run(np.where(absent, np.float32(hidden), scores))
  jax.tree.map(np.testing.assert_array_equal, got, expected)
  assert np.isfinite(got[1]).all()


def test_unknown_divisor():
  with pytest.raises(ValueError, match="'surviving' or 'all': 'pairs'"):
    ranking_loss(jnp.zeros((1, 2)), jnp.array([[1, 2]]), 'pairs')


def test_policy_loss_by_hand():
  # Ratios 1, 1.5, 1.5, 0.5, 0.5 with advantages 2, 1, -1, 1, -1; clip 0.2:
  #   -2 * 1                               = -2
  #   max(-1.5, -1.2)                      = -1.2, cut off: it has moved enough
  #   max(1.5, 1.2)                        = 1.5, not cut off: it moved wrongly
  #   max(-0.5, -0.8)                      = -0.5, not cut off
  #   max(0.5, 0.8)                        = 0.8, cut off
  ratios = jnp.array([[1.0, 1.5, 1.5, 0.5, 0.5]])
  advantages = jnp.array([[2.0, 1.0, -1.0, 1.0, -1.0]])
  old = jnp.full((1, 5), -1.3)
  new = old + jnp.log(ratios)
  loss, ratio, clipped = clipped_policy_loss(new, old, advantages)
  np.testing.assert_allclose(loss, [[-2, -1.2, 1.5, -0.5, 0.8]], rtol=1e-5)
  np.testing.assert_allclose(ratio, ratios, rtol=1e-5)
  assert clipped.tolist() == [[False, True, False, False, True]]
  grads = jax.grad(
    lambda new: jnp.sum(clipped_policy_loss(new, old, advantages)[0])
  )(new)
  # -A * ratio where the gradient lives, 0 where it is cut off.
  np.testing.assert_allclose(grads, [[-2, 0, 1.5, -0.5, 0]], rtol=1e-5)


def test_value_loss_by_hand():
  # V_old 0, clip 0.2. V, G -> squares of (V - G) and of (clip(V) - G):
  #   0.1, 1 -> 0.81, 0.81; 0.5, 1 -> 0.25, 0.64 (the clipped one is larger);
  #   0.5, 0 -> 0.25, 0.04; -1, -2 -> 1, 3.24 (larger).
  values = jnp.array([[0.1, 0.5, 0.5, -1.0]])
  returns = jnp.array([[1.0, 1.0, 0.0, -2.0]])
  old = jnp.zeros((1, 4))
  loss, clipped = clipped_value_loss(values, old, returns, 0.2)
  np.testing.assert_allclose(loss, [[0.405, 0.32, 0.125, 1.62]], rtol=1e-5)
  assert clipped.tolist() == [[False, True, False, True]]
  grads = jax.grad(
    lambda v: jnp.sum(clipped_value_loss(v, old, returns, 0.2)[0])
  )(values)
  # V - G, and 0 where V has already moved by more than the clip towards G.
  # In the first entry both branches are equal, and their gradients too.
  np.testing.assert_allclose(grads, [[-0.9, 0, 0.5, 0]], rtol=1e-5)


def test_losses_against_loops(rng):
  arrays = rng.normal(size=(4, 6, 7)).astype(np.float32)
  new, old, advantages, returns = arrays
  loss, _, clipped = losses.clipped_policy_loss(
    *(jnp.asarray(x) for x in arrays[:3]), 0.3
  )
  value_loss, value_clipped = losses.clipped_value_loss(
    *(jnp.asarray(arrays[i]) for i in (0, 1, 3)), 0.4
  )
  loss, clipped, value_loss, value_clipped = (
    np.asarray(x) for x in (loss, clipped, value_loss, value_clipped)
  )
  for i in range(6):
    for j in range(7):
      r = math.exp(float(new[i, j]) - float(old[i, j]))
      limited = min(max(r, 0.7), 1.3)
      a = float(advantages[i, j])
      np.testing.assert_allclose(
        loss[i, j], max(-a * r, -a * limited), rtol=1e-4
      )
      assert bool(clipped[i, j]) == (-a * limited > -a * r)
      v, g = float(new[i, j]), float(returns[i, j])
      near = min(max(v, float(old[i, j]) - 0.4), float(old[i, j]) + 0.4)
      np.testing.assert_allclose(
        value_loss[i, j], max((v - g) ** 2, (near - g) ** 2) / 2, rtol=1e-4
      )
      assert bool(value_clipped[i, j]) == ((near - g) ** 2 > (v - g) ** 2)
