"""Win rates and the clustered bootstrap."""

import dataclasses
import math

import numpy as np
import pytest

from instruct_jax.evals import heldout_loss, win_rate


def test_interval_is_the_binomial_one_for_independent_values():
  # 400 prompts, 280 wins: 0.7 ± 1.96 sqrt(0.7 · 0.3 / 400) = 0.7 ± 0.0449.
  result = win_rate.mean_interval(np.arange(400) < 280, range(400))
  assert result.mean == pytest.approx(0.7)
  assert result.low == pytest.approx(0.7 - 0.0449, abs=0.006)
  assert result.high == pytest.approx(0.7 + 0.0449, abs=0.006)


def test_interval_covers_the_truth_about_95_times_in_100():
  generator = np.random.default_rng(1)
  covered = 0
  for trial in range(300):
    wins = generator.random(200) < 0.65
    result = win_rate.mean_interval(
      wins, range(200), num_bootstrap=400, seed=trial
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


def test_redraws_that_are_kept_cannot_be_changed():
  (first,) = win_rate.redraw_counts(9, 40, seed=5)
  kept = first.copy()
  first += 1
  (again,) = win_rate.redraw_counts(9, 40, seed=5)
  np.testing.assert_array_equal(again, kept)
  # As a generator of that seed draws them, and other seeds do not.
  drawn = np.random.default_rng(5).multinomial(9, [1 / 9] * 9, size=40)
  np.testing.assert_array_equal(kept, drawn)
  assert (next(win_rate.redraw_counts(9, 40, seed=6)) != kept).any()


def test_paired_difference_is_narrower_than_the_two_intervals():
  generator = np.random.default_rng(5)
  counts = generator.integers(20, 60, 100).astype(float)
  hard = counts * generator.normal(3, 1, 100)  # Rows differ by 1 nat a token,
  ppo = hard + counts * (0.05 + 0.01 * generator.normal(size=100))  # not 0.05.

  def loss(sums):
    return heldout_loss.HeldoutLoss(sums.sum() / counts.sum(), sums, counts)

  result = heldout_loss.difference(loss(ppo), loss(hard))
  assert result.mean == pytest.approx((ppo - hard).sum() / counts.sum())
  assert 0.045 < result.low < result.high < 0.055
  alone = win_rate.ratio_interval(ppo, counts, range(100))
  assert alone.low < hard.sum() / counts.sum() < alone.high


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


def test_a_share_of_equal_outcomes_has_an_interval():
  # 0 of 50 prompts, each asked twice: Wilson's for 50, not the bootstrap's 0.
  ids = [i // 2 for i in range(100)]
  share = win_rate.share_interval([0] * 100, ids)
  assert (share.mean, share.low) == (0, 0)
  assert share.high == pytest.approx(win_rate.wilson_interval(0.0, 50)[1])
  mixed = [i % 4 == 0 for i in range(100)]
  assert win_rate.share_interval(mixed, ids) == win_rate.mean_interval(
    mixed, ids
  )


@pytest.mark.parametrize(
  ('values', 'ids', 'message'),
  [
    ([1.0, 2.0], ['a'], 'lengths differ'),
    ([], [], 'at least one'),
    ([1.0, float('nan')], ['a', 'b'], 'first at index 1'),
  ],
)
def test_bad_input(values, ids, message):
  with pytest.raises(ValueError, match=message):
    win_rate.mean_interval(values, ids)


def test_no_weight_is_an_error():
  with pytest.raises(ValueError, match='must not all be 0'):
    win_rate.mean_interval([1.0], ['a'], weights=[0.0])
