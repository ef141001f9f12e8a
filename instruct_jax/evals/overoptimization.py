"""Best-of-n and RL against a reward model, scored by a separate gold judge.

Gao et al. 2022: with d = √KL(π ‖ π_init) in nats, the gold score gained is
d (α - β d) under best-of-n and d (α - β log d) under RL, 0 at d = 0. Runs on
the host in NumPy, float64.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from instruct_jax.evals import win_rate

KINDS = ('best_of_n', 'rl')


def best_of_n_kl(n: int) -> float:
  """KL of best-of-n from the policy it samples from: log n - (n-1)/n, nats.

  Exact if no two samples tie in score or are the same answer; otherwise an
  upper bound.
  """
  if n < 1:
    raise ValueError(f'n must be at least 1, got {n}')
  return math.log(n) - (n - 1) / n


def best_of_n(
  proxy: np.ndarray, gold: np.ndarray, sizes: Sequence[int]
) -> np.ndarray:
  """Expected gold score of the best of n by the proxy, for each prompt.

  This is the mean over all size-n subsets of a prompt's N samples: the sample
  of ascending rank i is the best in C(i-1, n-1) of the C(N, n) subsets. Samples
  of equal proxy score share the mean of their gold scores.

  Args:
    proxy: scores that pick the best sample [prompts, N].
    gold: scores that are averaged [prompts, N]; pass `proxy` for its own curve.
    sizes: the values of n, each at most N.

  Returns:
    [prompts, len(sizes)].

  Raises:
    ValueError: shapes differ or a size lies outside 1 ... N.
  """
  proxy, gold = np.asarray(proxy, float), np.asarray(gold, float)
  if proxy.shape != gold.shape or proxy.ndim != 2:
    raise ValueError(
      f'shapes {proxy.shape} and {gold.shape}, expected two equal ones '
      '[prompts, N]'
    )
  N = proxy.shape[1]
  bad = [n for n in sizes if not 1 <= n <= N]
  if bad:
    raise ValueError(f'sizes {bad} are not in 1 ... {N}, the samples a prompt')
  order = np.argsort(proxy, axis=1, kind='stable')
  proxy = np.take_along_axis(proxy, order, axis=1)
  gold = np.take_along_axis(gold, order, axis=1)
  for row in range(len(gold)):
    _, group = np.unique(proxy[row], return_inverse=True)
    means = np.bincount(group, gold[row]) / np.bincount(group)
    gold[row] = means[group]
  weights = [
    [math.comb(i, n - 1) / math.comb(N, n) for n in sizes] for i in range(N)
  ]
  return gold @ np.array(weights)


@dataclasses.dataclass(frozen=True)
class Fit:
  """One of the two curves, fitted by least squares."""

  kind: str  # 'best_of_n' or 'rl'.
  alpha: win_rate.Interval  # Interval by resampling prompts, as for beta.
  beta: win_rate.Interval
  peak_kl: float | None  # KL at the curve's peak, nats; None if β <= 0.
  r_squared: float  # Share of the points' variance that the curve explains.
  num_points: int  # Points with KL > 0.


def curve(kind: str, alpha: float, beta: float, kl: np.ndarray) -> np.ndarray:
  """Gold score gained at these KLs (nats, positive)."""
  return _design(kind, np.asarray(kl, float)) @ np.array([alpha, beta])


def _design(kind, kl):
  if kind not in KINDS:
    raise ValueError(f'kind must be one of {KINDS}: {kind!r}')
  d = np.sqrt(kl)
  bend = d * d if kind == 'best_of_n' else d * np.log(d)
  return np.stack([d, -bend], axis=1)


def _peak(kind, alpha, beta):
  if beta <= 0:
    return None
  # d* = α/2β, or e^(α/β - 1), which is capped at e^50.
  if kind == 'best_of_n':
    return max(alpha / (2 * beta), 0.0) ** 2
  return math.exp(min(alpha / beta - 1, 50.0)) ** 2


def fit(
  kind: str,
  kl: np.ndarray,
  gains: np.ndarray,
  num_bootstrap: int = 1000,
  seed: int = 0,
) -> Fit:
  """Fits α and β, with intervals that resample prompts.

  Args:
    kind: 'best_of_n' or 'rl'.
    kl: KL of each point from the initial policy, nats: [points], or
      [prompts, points] if it is measured per prompt. Points whose mean KL is
      not positive are left out.
    gains: gold score minus the initial policy's, [prompts, points].
    num_bootstrap: number of redraws.
    seed: of the redraws.

  Raises:
    ValueError: fewer than three points with positive KL; the curve fits any two
      points exactly.
  """
  gains = np.asarray(gains, float)
  kl = np.broadcast_to(np.asarray(kl, float), gains.shape)
  kept = kl.mean(axis=0) > 1e-9
  if kept.sum() < 3:
    raise ValueError(
      f'{kept.sum()} point{"s" * bool(kept.sum() != 1)} with positive KL; the '
      'curve has two parameters and needs at least three'
    )
  kl, gains = kl[:, kept], gains[:, kept]
  num_prompts = len(gains)

  def solve(mean_kl, mean_gain):
    design = _design(kind, np.maximum(mean_kl, 1e-9))
    return np.linalg.lstsq(design, mean_gain, rcond=None)[0]

  x, y = kl.mean(axis=0), gains.mean(axis=0)
  estimate = solve(x, y)
  redraws = np.array(
    [
      solve(count @ kl / num_prompts, count @ gains / num_prompts)
      for counts in win_rate.redraw_counts(num_prompts, num_bootstrap, seed)
      for count in counts
    ]
  )
  alpha, beta = win_rate.intervals(estimate, redraws, num_prompts)
  spread = float(((y - y.mean()) ** 2).sum())
  left = float(((y - _design(kind, x) @ estimate) ** 2).sum())
  return Fit(
    kind=kind,
    alpha=alpha,
    beta=beta,
    peak_kl=_peak(kind, alpha.mean, beta.mean),
    r_squared=1 - left / spread if spread > 0 else float('nan'),
    num_points=int(kept.sum()),
  )
