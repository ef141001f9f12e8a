"""Win rates and the clustered bootstrap."""

import dataclasses
import math

import numpy as np
import pytest

from instruct_jax.evals import heldout_loss, run_figures, win_rate
from instruct_jax.jobs import evaluate


def test_ties_count_one_half():
  # Prompt a: 2 > 1 wins; b: 1 < 3 loses; c: 5 = 5 one half; d: 4 > 0 wins.
  # (1 + 0 + 0.5 + 1) / 4 = 0.625.
  result = win_rate.win_rate([2, 1, 5, 4], [1, 3, 5, 0], ['a', 'b', 'c', 'd'])
  assert result.rate == 0.625
  assert result.num_prompts == 4
  assert result.low < 0.625 < result.high


def test_prompts_weigh_the_same_whatever_their_number_of_samples():
  # Prompt a: 3 samples, 3 wins -> 1; prompt b: 1 sample, a loss -> 0.
  # Mean over prompts 0.5; over samples it would be 0.75.
  result = win_rate.win_rate([1, 1, 1, 0], [0, 0, 0, 1], ['a', 'a', 'a', 'b'])
  assert result.rate == 0.5
  assert result.num_prompts == 2


def test_identical_models_have_exactly_one_half():
  scores = np.random.default_rng(0).normal(size=50)
  result = win_rate.win_rate(scores, scores, range(50))
  assert (result.rate, result.low, result.high) == (0.5, 0.5, 0.5)


def test_interval_is_the_binomial_one_for_independent_prompts():
  # 400 prompts, 280 wins: 0.7 ± 1.96 sqrt(0.7 · 0.3 / 400) = 0.7 ± 0.0449.
  wins = np.arange(400) < 280
  result = win_rate.win_rate(wins, np.full(400, 0.5), range(400))
  assert result.rate == pytest.approx(0.7)
  assert result.low == pytest.approx(0.7 - 0.0449, abs=0.006)
  assert result.high == pytest.approx(0.7 + 0.0449, abs=0.006)


def test_interval_covers_the_truth_about_95_times_in_100():
  generator = np.random.default_rng(1)
  covered = 0
  for trial in range(300):
    wins = generator.random(200) < 0.65
    result = win_rate.win_rate(
      wins, np.full(200, 0.5), range(200), num_bootstrap=400, seed=trial
    )
    covered += result.low <= 0.65 <= result.high
  # Standard deviation of the count at 0.95: sqrt(300 · 0.95 · 0.05) = 3.8; the
  # percentile bootstrap itself is a little short on 200 prompts.
  assert 300 * 0.90 <= covered <= 300 * 0.985


def test_clustered_interval_is_wider_by_the_design_effect():
  # 60 clusters of 16 equal values: only 60 are independent, so the interval is
  # sqrt(16) = 4 times as wide as one that takes all 960 for independent.
  value = np.random.default_rng(2).normal(size=60).repeat(16)
  clustered = win_rate.mean_interval(value, np.arange(60).repeat(16))
  independent = win_rate.mean_interval(value, np.arange(960))
  assert clustered.mean == pytest.approx(independent.mean)
  ratio = (clustered.high - clustered.low) / (
    independent.high - independent.low
  )
  assert 3.4 < ratio < 4.6
  assert (clustered.num_clusters, independent.num_clusters) == (60, 960)


def test_weights_are_token_counts():
  # 10 tokens at 2 nats and 30 at 4: (20 + 120) / 40 = 3.5, not 3.
  result = win_rate.mean_interval([2.0, 4.0], ['a', 'b'], weights=[10, 30])
  assert result.mean == 3.5


def test_matches_a_plain_loop():
  generator = np.random.default_rng(3)
  top, bottom = generator.random(30), generator.random(30) + 0.1
  clusters = generator.integers(0, 7, size=30)
  result = win_rate.ratio_interval(top, bottom, clusters, num_bootstrap=500)
  redraws = []
  names = list(dict.fromkeys(clusters.tolist()))
  counts = np.concatenate(list(win_rate.redraw_counts(7, 500, seed=0)))
  assert counts.shape == (500, 7)
  for row in counts:
    a = b = 0.0
    for cluster, count in zip(names, row, strict=True):
      for i in range(30):
        if clusters[i] == cluster:
          a += count * top[i]
          b += count * bottom[i]
    redraws.append(a / b)
  assert result.low == pytest.approx(np.percentile(redraws, 2.5))
  assert result.high == pytest.approx(np.percentile(redraws, 97.5))
  assert result.mean == pytest.approx(top.sum() / bottom.sum())


def test_blocks_do_not_change_the_redraws(monkeypatch):
  generator = np.random.default_rng(4)
  values = generator.normal(size=20)
  whole = win_rate.mean_interval(values, range(20), num_bootstrap=101)
  monkeypatch.setattr(win_rate, '_MAX_CELLS', 70)
  parts = win_rate.mean_interval(values, range(20), num_bootstrap=101)
  # The redraws are the same. Their product with the values, cut into other
  # blocks, may go through another kernel, which adds in another order: some
  # units in the last place of a float64. Other redraws differ by 1e-2.
  assert dataclasses.astuple(parts) == pytest.approx(
    dataclasses.astuple(whole), rel=1e-12, abs=1e-12
  )


def test_paired_difference_is_narrower_than_the_two_intervals():
  generator = np.random.default_rng(5)
  counts = generator.integers(20, 60, 100).astype(float)
  hard = counts * generator.normal(3, 1, 100)  # Rows differ by 1 nat a token,
  ppo = hard + counts * (0.05 + 0.01 * generator.normal(size=100))  # not 0.05.

  def loss(sums):
    return heldout_loss.HeldoutLoss(sums.sum() / counts.sum(), sums, counts)

  result = evaluate.paired_difference(loss(ppo), loss(hard))
  assert result.mean == pytest.approx((ppo - hard).sum() / counts.sum())
  assert 0.045 < result.low < result.high < 0.055
  alone = win_rate.ratio_interval(ppo, counts, range(100))
  assert alone.low < hard.sum() / counts.sum() < alone.high


def test_by_category():
  rates = win_rate.win_rate_by_category(
    [1, 0, 1], [0, 1, 0], ['p', 'q', 'r'], ['qa', 'chat', 'qa']
  )
  assert list(rates) == ['chat', 'qa']
  assert rates['qa'].rate == 1.0
  assert rates['qa'].num_prompts == 2
  assert rates['chat'].rate == 0.0


def test_wilson_interval():
  # Both ends solve |p - x| = z sqrt(p (1 - p) / n): what the interval means.
  for mean, count in [(0.3, 50), (0.9, 10), (0.5, 7)]:
    for p in win_rate.wilson_interval(mean, count):
      z = abs(mean - p) / math.sqrt(p * (1 - p) / count)
      assert z == pytest.approx(1.96, abs=1e-3)
  assert win_rate.wilson_interval(0.0, 50) == (
    0.0,
    pytest.approx(0.0714, abs=1e-3),
  )
  assert win_rate.wilson_interval(1.0, 50)[1] == 1.0


def test_a_share_that_all_prompts_agree_on_has_an_interval():
  # 0 of 50 prompts, each asked twice: Wilson's for 50, not the bootstrap's 0.
  ids = [i // 2 for i in range(100)]
  share = win_rate.share_interval([0] * 100, ids)
  assert (share.mean, share.low) == (0, 0)
  assert share.high == pytest.approx(win_rate.wilson_interval(0.0, 50)[1])
  mixed = [i % 4 == 0 for i in range(100)]
  assert win_rate.share_interval(mixed, ids) == win_rate.mean_interval(
    mixed, ids
  )


def test_labels_of_answers_are_clustered_by_prompt():
  """Two answers of one prompt are no more than one; None of a label is out."""
  flags = {
    model: [
      {'rude': i % 2 == 0, **({'kind': True} if i < 4 else {})}
      for i in range(20)
      for _ in range(5)
    ]
    for model in run_figures.MODELS
  }
  ids = [f'p{i}' for i in range(20) for _ in range(5)]
  rates = evaluate.metadata_rates(flags, ids)['ppo']
  assert rates['rude'].mean == 0.5 and rates['rude'].num_clusters == 20
  once = win_rate.mean_interval([i % 2 == 0 for i in range(20)], range(20))
  assert (rates['rude'].low, rates['rude'].high) == (once.low, once.high)
  assert rates['kind'].mean == 1 and rates['kind'].num_clusters == 4
  assert rates['kind'].low < 1


@pytest.mark.parametrize(
  ('scores', 'baseline', 'ids', 'said'),
  [
    ([1.0], [1.0, 2.0], ['a'], 'lengths differ'),
    ([1.0, 2.0], [1.0, 2.0], ['a'], 'lengths differ'),
    ([], [], [], 'at least one'),
    ([1.0, float('nan')], [0.0, 0.0], ['a', 'b'], 'first at index 1'),
    ([1.0], [float('inf')], ['a'], 'baseline_scores'),
  ],
)
def test_bad_input(scores, baseline, ids, said):
  with pytest.raises(ValueError, match=said):
    win_rate.win_rate(scores, baseline, ids)


def test_no_weight_is_an_error():
  with pytest.raises(ValueError, match='must not all be 0'):
    win_rate.mean_interval([1.0], ['a'], weights=[0.0])
