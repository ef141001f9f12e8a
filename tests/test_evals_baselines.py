"""Length and bag-of-words judges."""

import numpy as np
import pytest

from instruct_jax.data import records
from instruct_jax.evals import baselines, preference_accuracy


def _accuracy(judge, comparisons):
  return preference_accuracy.pairwise_accuracy(
    judge.scores(comparisons),
    [comparison.ranks for comparison in comparisons],
    range(len(comparisons)),
  ).accuracy


def _comparison(better, worse):
  return records.Comparison(
    prompt='p', completions=(worse, better), ranks=(2, 1)
  )


@pytest.mark.parametrize('sign', [1, -1])
def test_length_takes_the_better_direction(sign):
  pair = ('one two three', 'one')
  comparisons = [_comparison(*pair[::sign])]
  judge = baselines.fit_length(comparisons)
  assert judge.sign == sign
  assert _accuracy(judge, comparisons) == 1.0
  # Words: 1 and 3 (longer better), or 3 and 1.
  assert judge.scores(comparisons)[0].tolist() == (
    [1.0, 3.0] if sign == 1 else [-3.0, -1.0]
  )


def test_bag_of_words_solves_the_one_word_problem():
  # Only the better text has the word "good", n = 8 pairs, all other words
  # cancel. The optimum of 8 log(1 + e^-w) + w²/2 has w = 8 σ(-w): w = 1.4816.
  comparisons = [_comparison('the good pub', 'the pub')] * 8
  judge = baselines.fit_bag_of_words(comparisons, l2=1.0)
  weight = dict(zip(judge.vocabulary, judge.weights, strict=True))
  assert weight['good'] == pytest.approx(8 / (1 + np.exp(weight['good'])))
  assert weight['the'] == pytest.approx(0, abs=1e-9)


def test_bag_of_words_counts_every_labeler_of_a_pair():
  # Three prefer it and one does not: the optimum of 3 log(1 + e^-w) + log(1 +
  # e^w) + w²/2 has w = 3 σ(-w) - σ(w). The text that wins comes second in two.
  comparisons = [_comparison('the good pub', 'the pub')] * 2
  comparisons += [
    records.Comparison('p', ('the good pub', 'the pub'), ranks)
    for ranks in ((1, 2), (2, 1))
  ]
  judge = baselines.fit_bag_of_words(comparisons, l2=1.0)
  weight = dict(zip(judge.vocabulary, judge.weights, strict=True))['good']
  sigmoid = 1 / (1 + np.exp(-weight))
  assert weight == pytest.approx(3 * (1 - sigmoid) - sigmoid)
  assert weight > 0.5


def test_bag_of_words_finds_planted_tastes_on_new_texts():
  generator = np.random.default_rng(0)
  vocabulary = [f'w{i}' for i in range(30)]
  taste = generator.normal(size=30)
  comparisons = []
  for _ in range(400):
    counts = generator.integers(0, 3, size=(4, 30))
    noisy = counts @ taste + generator.logistic(size=4)
    comparisons.append(
      records.Comparison(
        prompt='p',
        completions=tuple(
          ' '.join(np.repeat(vocabulary, row)) for row in counts
        ),
        ranks=tuple((-noisy).argsort().argsort().tolist()),
      )
    )
  comparisons = [
    records.Comparison(
      prompt='p', completions=c.completions, ranks=tuple(r + 1 for r in c.ranks)
    )
    for c in comparisons
  ]
  judge = baselines.fit_bag_of_words(comparisons[:300])
  assert _accuracy(judge, comparisons[300:]) > 0.85
  weight = dict(zip(judge.vocabulary, judge.weights, strict=True))
  found = [weight[word] for word in vocabulary]
  assert np.corrcoef(found, taste)[0, 1] > 0.95
  again = baselines.fit_bag_of_words(comparisons[:300])
  np.testing.assert_array_equal(judge.weights, again.weights)


def test_separable_data_and_rare_words_are_supported():
  # 500 pairs that one word separates: the ridge keeps its weight finite.
  comparisons = [_comparison('yes ' * 50, 'no ' * 50)] * 500
  judge = baselines.fit_bag_of_words(comparisons, l2=1e-3)
  assert np.isfinite(judge.weights).all()
  assert set(judge.vocabulary) == {'yes', 'no'}
  unknown = [_comparison('never seen', 'nor this')]
  assert judge.scores(unknown)[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize('noisy', [False, True])
def test_the_ridge_is_chosen_on_held_out_prompts(noisy):
  """One word that always predicts the label, or 300 that never do."""
  generator = np.random.default_rng(1)
  comparisons = []
  for number in range(200):
    pair = [
      ' '.join(f'w{i}' for i in generator.integers(0, 300, 20)) for _ in 'ab'
    ]
    if not noisy:
      pair[0] += ' good'
    comparisons.append(
      records.Comparison(
        prompt=f'p{number}', completions=tuple(pair), ranks=(1, 2)
      )
    )
  l2 = baselines.choose_l2(comparisons, (0.1, 10.0, 1000.0))
  assert l2 == (1000.0 if noisy else 0.1)
  # Both comparisons of a prompt are on the same side.
  with pytest.raises(ValueError, match='no pair to learn from: no comparis'):
    baselines.choose_l2(comparisons[:1] * 2)


def test_bad_input():
  tied = [records.Comparison(prompt='p', completions=('a', 'b'), ranks=(1, 1))]
  with pytest.raises(ValueError, match='every pair tied'):
    baselines.fit_length(tied)
  with pytest.raises(ValueError, match='every pair tied'):
    baselines.fit_bag_of_words(tied)
  with pytest.raises(ValueError, match='l2 must be positive'):
    baselines.fit_bag_of_words([_comparison('a', 'b')], l2=0.0)


def test_folds_are_scored_by_what_the_others_teach():
  # One prompt's long answer is worse; the nine others' is better. A judge that
  # had seen all would have the same sign; one that sees its fold alone not.
  rows = [
    records.Comparison(f'p{i}', ('one two', 'one'), (1, 2)) for i in range(9)
  ]
  rows += [records.Comparison('q', ('one two', 'one'), (2, 1))] * 12
  found = baselines.cross_fitted(baselines.fit_length, rows, num_folds=10)
  # Without q, longer is better; with q, which has 12 rankings, shorter is.
  assert [row.tolist() for row in found[9:]] == [[2.0, 1.0]] * 12
  assert [row.tolist() for row in found[:9]] == [[-2.0, -1.0]] * 9
  with pytest.raises(ValueError, match='1 prompt; folds need at least two'):
    baselines.cross_fitted(baselines.fit_length, rows[9:])
