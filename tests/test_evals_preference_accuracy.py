"""Pairwise accuracy, its ceiling, labeler agreement, folds of labelers."""

import collections

import numpy as np
import pytest

from instruct_jax.data import records
from instruct_jax.evals import preference_accuracy as preference

# One standard deviation of label noise, in units of the utility's own.
_NOISE = 1.0


def _ranking(prompt, labeler, **ranks):
  return records.Comparison(
    prompt=prompt,
    completions=tuple(ranks),
    ranks=tuple(ranks.values()),
    labeler=labeler,
  )


def test_by_hand():
  # Comparison 0, ranks 1 2 3, scores 3 1 2: pairs (0,1) right, (0,2) right,
  # (1,2) wrong -> 2 of 3. Comparison 1, ranks 1 1 2: the tied pair drops;
  # scores 5 4 4: (0,2) right, (1,2) tied score -> 1.5 of 2. 3.5 / 5 = 0.7.
  result = preference.pairwise_accuracy(
    [[3.0, 1.0, 2.0], [5.0, 4.0, 4.0]], [[1, 2, 3], [1, 1, 2]], ['a', 'b']
  )
  assert result.accuracy == pytest.approx(0.7)
  assert result.num_pairs == 5
  # Two clusters: redraws are 2/3, 0.7 or 0.75.
  assert result.low == pytest.approx(2 / 3)
  assert result.high == pytest.approx(0.75)


def test_a_gap_is_paired():
  # Right on the same 12 of 20 rankings, and the first on two more: what both
  # have in common does not widen the interval.
  ranks, ids = [[1, 2]] * 20, [str(i) for i in range(20)]
  right, wrong = [1.0, 0.0], [0.0, 1.0]
  first = [right] * 14 + [wrong] * 6
  second = [right] * 12 + [wrong] * 8
  gap = preference.accuracy_gap(first, second, ranks, ids)
  assert gap.mean == pytest.approx(0.1)
  assert 0 <= gap.low < 0.1 < gap.high <= 0.25
  alone = preference.pairwise_accuracy(first, ranks, ids)
  assert gap.high - gap.low < 0.75 * (alone.high - alone.low)
  mirrored = preference.accuracy_gap(second, first, ranks, ids)
  assert (mirrored.low, mirrored.high) == (-gap.high, -gap.low)
  same = preference.accuracy_gap(first, first, ranks, ids)
  assert (same.low, same.high) == (0, 0)


def test_constant_scores_are_chance_and_reversed_scores_mirror():
  generator = np.random.default_rng(0)
  scores = [generator.normal(size=4) for _ in range(20)]
  ranks = [generator.integers(1, 5, size=4) for _ in range(20)]
  ids = range(20)
  right = preference.pairwise_accuracy(scores, ranks, ids)
  wrong = preference.pairwise_accuracy([-s for s in scores], ranks, ids)
  flat = preference.pairwise_accuracy([0 * s for s in scores], ranks, ids)
  assert right.accuracy + wrong.accuracy == pytest.approx(1)
  assert flat.accuracy == 0.5


def test_gold_utility_reaches_the_ceiling_that_the_noise_allows():
  # Utilities N(0, 1), labels from utility + N(0, 1) noise. A pair's labels
  # agree with the utility where two normals of correlation
  # 1 / sqrt(1 + 1) = 0.707 have one sign: 1/2 + asin(0.707)/π = 0.75.
  generator = np.random.default_rng(1)
  gold = [generator.normal(size=4) for _ in range(1500)]
  labels = [g + _NOISE * generator.normal(size=4) for g in gold]
  ranks = [(-label).argsort().argsort() + 1 for label in labels]
  result = preference.pairwise_accuracy(gold, ranks, range(1500))
  assert result.accuracy == pytest.approx(0.75, abs=0.02)
  assert result.low < 0.75 < result.high
  assert result.num_pairs == 1500 * 6


def test_rankings_of_one_prompt_are_one_cluster():
  generator = np.random.default_rng(2)
  scores, ranks, prompts = [], [], []
  for prompt in range(40):
    # Either all eight labelers agree with the scores or none does.
    good = generator.random() < 0.6
    for _ in range(8):
      scores.append([1.0, 0.0])
      ranks.append([1, 2] if good else [2, 1])
      prompts.append(prompt)
  clustered = preference.pairwise_accuracy(scores, ranks, prompts)
  independent = preference.pairwise_accuracy(scores, ranks, range(320))
  ratio = (clustered.high - clustered.low) / (
    independent.high - independent.low
  )
  assert 2.3 < ratio < 3.4  # sqrt(8) = 2.83


@pytest.mark.parametrize(
  ('scores', 'ranks', 'ids', 'message'),
  [
    ([[1.0, 2.0]], [[1, 2], [1, 2]], ['a'], '1 score rows, 2 rank rows'),
    ([[1.0, 2.0]], [[1, 2, 3]], ['a'], 'comparison 0'),
    ([[1.0, float('nan')]], [[1, 2]], ['a'], 'finite'),
    ([[1.0, 2.0]], [[0, 1]], ['a'], 'at least 1'),
    ([[1.0, 2.0]], [[1, 1]], ['a'], '1 comparisons, every pair tied'),
    ([], [], [], 'no pair to judge: no comparisons'),
  ],
)
def test_bad_input(scores, ranks, ids, message):
  with pytest.raises(ValueError, match=message):
    preference.pairwise_accuracy(scores, ranks, ids)


def test_agreement_by_hand():
  comparisons = [
    # x > y > z against x > z > y: (x,y) and (x,z) agree, (y,z) does not.
    _ranking('p', 'ann', x=1, y=2, z=3),
    _ranking('p', 'bob', x=1, y=3, z=2),
    # Against ann: cid shares x and y alone and orders them the other way; with
    # bob likewise. Two more disagreements.
    _ranking('p', 'cid', y=1, x=2, w=3),
    # One labeler twice, a nameless one, another prompt: nothing counts.
    _ranking('p', 'cid', y=2, x=1),
    _ranking('p', '', x=1, y=2),
    _ranking('p', '', x=2, y=1),
    _ranking('q', 'ann', x=1, y=2),
    # A tie on one side leaves the pair out.
    _ranking('r', 'ann', x=1, y=1),
    _ranking('r', 'bob', x=1, y=2),
  ]
  # cid's second ranking agrees with ann and bob on (x, y): 2 more pairs.
  # Agree: 2 + 2 = 4 of 3 + 2 + 2 = 7.
  result = preference.agreement(comparisons)
  assert result.num_pairs == 7
  assert result.rate == pytest.approx(4 / 7)


def test_a_text_ranked_twice_has_its_mean_rank():
  twice = records.Comparison(
    prompt='p', completions=('x', 'y', 'x'), ranks=(1, 2, 5), labeler='ann'
  )
  # x has mean rank 3, behind y.
  other = _ranking('p', 'bob', y=1, x=2)
  result = preference.agreement([twice, other])
  assert (result.rate, result.num_pairs) == (1.0, 1)


def test_no_agreement_without_two_labelers_of_one_pair():
  assert preference.agreement([_ranking('p', 'ann', x=1, y=2)]) is None
  assert preference.agreement([]) is None


def test_folds_are_a_partition_of_similar_sizes():
  generator = np.random.default_rng(3)
  labelers = [
    f'w{i}' for i in range(37) for _ in range(generator.integers(5, 80))
  ]
  folds = preference.label_folds(labelers, 5, seed=0)
  assert sorted(sum(folds, [])) == sorted(set(labelers))
  count = collections.Counter(labelers)
  loads = [sum(count[name] for name in fold) for fold in folds]
  assert sum(loads) == len(labelers)
  assert max(loads) - min(loads) <= 10  # Of about 300 each.
  assert folds == preference.label_folds(labelers, 5, seed=0)
  assert folds == preference.label_folds(labelers[::-1], 5, seed=0)


def test_the_seed_regroups_labelers_of_equal_size():
  labelers = [f'w{i:02}' for i in range(20)]
  groupings = {
    tuple(map(tuple, preference.label_folds(labelers, 5, seed)))
    for seed in range(4)
  }
  assert len(groupings) == 4


def test_bad_folds():
  with pytest.raises(ValueError, match='at least 3 labelers, got 2'):
    preference.label_folds(['a', 'b', 'a'], 3, seed=0)
  with pytest.raises(ValueError, match='name no labeler'):
    preference.label_folds(['a', '', 'b'], 2, seed=0)


def test_spread():
  # Values 0.70 0.72 0.74: mean 0.72, s = 0.02, s / √3 = 0.011547.
  result = preference.spread([0.70, 0.72, 0.74])
  assert result.mean == pytest.approx(0.72)
  assert result.error == pytest.approx(0.011547, abs=1e-6)
  assert preference.spread([0.7]) == preference.Spread(0.7, None, 1)
  with pytest.raises(ValueError, match='finite'):
    preference.spread([])
