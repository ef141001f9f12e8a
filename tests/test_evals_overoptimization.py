"""Best-of-n by enumeration, and fits of curves that are known."""

import itertools
import math

import numpy as np
import pytest

from instruct_jax.evals import overoptimization


def test_kl_of_stiennon_et_al():
  # Their table: 8 -> 1.2, 64 -> 3.2, 128 -> 3.9, 256 -> 4.5, 512 -> 5.2.
  found = [overoptimization.best_of_n_kl(n) for n in (8, 64, 128, 256, 512)]
  assert np.round(found, 1).tolist() == [1.2, 3.2, 3.9, 4.5, 5.2]
  assert overoptimization.best_of_n_kl(1) == 0


def test_kl_equals_the_exact_distribution():
  # 4 distinct answers of equal chance in the limit of many: by enumeration of
  # a uniform score, density n u^(n-1), KL = ∫ n u^(n-1) log(n u^(n-1)) du.
  u = (np.arange(200_000) + 0.5) / 200_000
  for n in (2, 5):
    density = n * u ** (n - 1)
    integral = np.mean(density * np.log(density))
    assert overoptimization.best_of_n_kl(n) == pytest.approx(integral, abs=1e-4)


def test_expectation_equals_all_subsets(rng):
  proxy, gold = rng.normal(size=(2, 3, 6))
  found = overoptimization.best_of_n(proxy, gold, [1, 2, 4, 6])
  for row in range(3):
    for column, n in enumerate((1, 2, 4, 6)):
      chosen = [
        gold[row, max(subset, key=lambda i: proxy[row, i])]
        for subset in itertools.combinations(range(6), n)
      ]
      assert found[row, column] == pytest.approx(np.mean(chosen))


def test_ties_share():
  proxy = np.array([[1.0, 1.0, 0.0]])
  gold = np.array([[4.0, 2.0, 0.0]])
  # Of 3 pairs each has a tied best: (3, 3, 3); the mean is 3.
  assert overoptimization.best_of_n(proxy, gold, [2])[0, 0] == pytest.approx(3)
  assert overoptimization.best_of_n(proxy, gold, [1])[0, 0] == pytest.approx(2)


def test_sizes_beyond_the_samples_are_named():
  with pytest.raises(ValueError, match=r'\[8\] are not in 1 ... 4'):
    overoptimization.best_of_n(np.zeros((2, 4)), np.zeros((2, 4)), [2, 8])


@pytest.mark.parametrize('kind', overoptimization.KINDS)
def test_known_curves_come_back(kind, rng):
  kl = np.array([0.0, 0.3, 1.0, 2.0, 4.0, 9.0])
  d = np.sqrt(kl[1:])
  exact = d * (1.2 - 0.3 * (d if kind == 'best_of_n' else np.log(d)))
  gains = np.concatenate([[0], exact]) + rng.normal(0, 0.4, (500, 6))
  found = overoptimization.fit(kind, kl, gains, num_bootstrap=200)
  assert found.alpha.low < 1.2 < found.alpha.high
  assert found.beta.low < 0.3 < found.beta.high
  assert found.alpha.high - found.alpha.low < 0.3
  assert found.num_points == 5 and found.r_squared > 0.9
  # Peaks: d* = 1.2 / 0.6 = 2, or e^(1.2/0.3 - 1) = e^3.
  expected = 4.0 if kind == 'best_of_n' else math.exp(6)
  assert math.log(found.peak_kl) == pytest.approx(math.log(expected), abs=1)
  exact_curve = overoptimization.curve(kind, 1.2, 0.3, kl[1:])
  np.testing.assert_allclose(exact_curve, exact)


def test_a_curve_that_never_bends_has_no_peak():
  kl = np.array([1.0, 4.0, 9.0])
  found = overoptimization.fit('best_of_n', kl, np.tile(np.sqrt(kl), (5, 1)))
  assert found.beta.mean == pytest.approx(0, abs=1e-9)
  assert found.peak_kl is None or found.peak_kl > 1e6


def test_two_points_are_no_fit():
  with pytest.raises(ValueError, match='2 points with positive KL'):
    overoptimization.fit('rl', np.array([0, 1.0, 2.0]), np.zeros((4, 3)))
