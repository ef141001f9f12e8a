"""Means with 95 % intervals from a clustered bootstrap.

The paper prints win rates with 95 % intervals (Figure 1), but says neither how
the intervals are made nor how ties count (3.6). Here ties count one half, and
intervals are percentile bootstraps that resample whole clusters, usually
prompts: two samples of one prompt, or the 36 pairs of one ranking, are not
independent, and an interval that treats them as independent is too narrow.

Runs on the host in NumPy, float64. A redraw (one bootstrap resample) needs only
each cluster's sums, so 2,000 redraws are one matrix product.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

# Figures and ids may be plain Python or NumPy.
Number = float | int | np.number
Numbers = Sequence[Number] | np.ndarray
Ids = Sequence[str | int] | np.ndarray

# Percent of the redraws on either side of a 95 % interval.
_TAIL = 100 * (1 - 0.95) / 2
# Normal quantile of a two-sided 95 % interval.
Z95 = 1.959964
# Cells of the redraw matrix held at once: 4e6 float64 are 32 MB.
_MAX_CELLS = 4_000_000


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean with its 95 % interval, in the unit of the values."""

  mean: float
  low: float
  high: float
  num_clusters: int


def cluster_codes(cluster_ids: Ids) -> tuple[np.ndarray, int]:
  """Codes [n] that number the clusters by first appearance, and their count."""
  # Not np.unique: ids may mix types.
  numbers: dict[str | int, int] = {}
  codes = [numbers.setdefault(each, len(numbers)) for each in cluster_ids]
  return np.array(codes, dtype=np.int64), len(numbers)


def bounds(redraws: Numbers) -> np.ndarray:
  """2.5th and 97.5th percentile [2, ...] of redraws [num_bootstrap, ...]."""
  return np.percentile(redraws, [_TAIL, 100 - _TAIL], axis=0)


def intervals(
  estimates: Numbers, redraws: np.ndarray, num_clusters: int
) -> list[Interval]:
  """Intervals of K estimates from their redraws [num_bootstrap, K]."""
  # Not `bounds`, whose percentiles differ from these in the last bit: published
  # figures stay reproducible.
  lows, highs = np.percentile(redraws, [2.5, 97.5], axis=0)
  return [
    Interval(float(mean), float(low), float(high), num_clusters)
    for mean, low, high in zip(estimates, lows, highs, strict=True)
  ]


def _vector(name: str, values: Numbers) -> np.ndarray:
  values = np.asarray(values, dtype=np.float64)
  if values.ndim != 1 or not values.size:
    raise ValueError(
      f'{name} must be a list of at least one number, got shape {values.shape}'
    )
  bad = np.flatnonzero(~np.isfinite(values))
  if bad.size:
    raise ValueError(
      f'{name} holds {bad.size} of {values.size} values that are not finite, '
      f'first at index {bad[0]}'
    )
  return values


def _same_length(**columns: Sequence | np.ndarray) -> None:
  lengths = {name: len(column) for name, column in columns.items()}
  if len(set(lengths.values())) > 1:
    raise ValueError(f'lengths differ: {lengths}')


def ratio_interval(
  numerators: Numbers,
  denominators: Numbers,
  cluster_ids: Ids,
  *,
  num_bootstrap: int = 2000,
  seed: int = 0,
) -> Interval:
  """Pooled ratio sum(numerators) / sum(denominators), resampled by cluster.

  With cluster sums a_c and b_c of n clusters, and multiplicities m drawn from
  Multinomial(n, 1/n), a redraw is Σ m_c a_c / Σ m_c b_c. The interval runs from
  the 2.5th to the 97.5th percentile of the redraws. It has width 0 if there is
  one cluster or all clusters agree.

  Args:
    numerators: n finite numbers.
    denominators: n numbers, none negative, with a positive sum.
    cluster_ids: n ids; rows with the same id are resampled together.
    num_bootstrap: number of redraws.
    seed: of the redraws.

  Returns:
    The ratio over all rows, its interval and the number of clusters. Redraws
    whose denominators are all 0 are left out.

  Raises:
    ValueError: lengths differ, no row, no redraw, values not finite, or
      denominators negative or all 0.
  """
  numerators = _vector('numerators', numerators)
  denominators = _vector('denominators', denominators)
  _same_length(
    numerators=numerators, denominators=denominators, cluster_ids=cluster_ids
  )
  if num_bootstrap < 1:
    raise ValueError(f'num_bootstrap must be at least 1, got {num_bootstrap}')
  if (denominators < 0).any() or not denominators.sum() > 0:
    raise ValueError(
      'denominators must not be negative and must not all be 0; minimum '
      f'{denominators.min()}, sum {denominators.sum()}'
    )
  redraws, num_clusters = ratio_redraws(
    numerators[:, None],
    denominators[:, None],
    cluster_ids,
    num_bootstrap=num_bootstrap,
    seed=seed,
  )
  low, high = bounds(redraws[~np.isnan(redraws)])
  mean = numerators.sum() / denominators.sum()
  return Interval(float(mean), float(low), float(high), num_clusters)


def ratio_redraws(
  numerators: np.ndarray,
  denominators: np.ndarray,
  cluster_ids: Ids,
  *,
  num_bootstrap: int = 2000,
  seed: int = 0,
) -> tuple[np.ndarray, int]:
  """Redraws of K pooled ratios that share their clusters.

  All columns of a redraw have the same clusters, so sums and differences of
  columns have intervals, too.

  Args:
    numerators, denominators: [n, K]; a row that does not count in a column has
      0 in both.
    cluster_ids: n ids.
    num_bootstrap: number of redraws.
    seed: of the redraws.

  Returns:
    The ratios [num_bootstrap, K], NaN where the denominators drawn are all 0,
    and the number of clusters.
  """
  codes, num_clusters = cluster_codes(cluster_ids)
  both = np.concatenate([numerators, denominators], axis=1)
  sums = np.stack(
    [np.bincount(codes, column, num_clusters) for column in both.T], axis=1
  )  # [clusters, 2 K]
  redraws = []
  for counts in redraw_counts(num_clusters, num_bootstrap, seed):
    top, bottom = np.split(counts @ sums, 2, axis=1)
    missing = np.full(top.shape, np.nan)
    redraws.append(np.divide(top, bottom, out=missing, where=bottom > 0))
  return np.concatenate(redraws), num_clusters


def redraw_counts(
  num_clusters: int, num_bootstrap: int, seed: int
) -> Iterator[np.ndarray]:
  """Yields how often each cluster is drawn, in blocks [redraws, clusters]."""
  block = max(1, _MAX_CELLS // num_clusters)
  if num_bootstrap <= block:
    yield _one_block(num_clusters, num_bootstrap, seed).astype(float)
    return
  generator = np.random.default_rng(seed)
  for start in range(0, num_bootstrap, block):
    size = min(block, num_bootstrap - start)
    yield _draw(generator, num_clusters, size).astype(float)


def _draw(generator: np.random.Generator, number: int, size: int) -> np.ndarray:
  chances = np.full(number, 1 / number)
  return generator.multinomial(number, chances, size=size).astype(np.int32)


@functools.lru_cache(maxsize=4)
def _one_block(number: int, size: int, seed: int) -> np.ndarray:
  """Kept: a report has hundreds of intervals over the same prompts.

  Drawing costs ten times as much as the sums that are made of it.
  """
  return _draw(np.random.default_rng(seed), number, size)


def mean_interval(
  values: Numbers,
  cluster_ids: Ids,
  *,
  weights: Numbers | None = None,
  num_bootstrap: int = 2000,
  seed: int = 0,
) -> Interval:
  """Weighted mean Σ w v / Σ w with its interval; see `ratio_interval`.

  Args:
    values: n numbers, say each document's loss in nats per token.
    cluster_ids: n ids.
    weights: n weights, say each document's token count; None for equal weights.
    num_bootstrap: number of redraws.
    seed: of the redraws.
  """
  values = _vector('values', values)
  weights = np.ones_like(values) if weights is None else np.asarray(weights)
  _same_length(values=values, weights=weights, cluster_ids=cluster_ids)
  return ratio_interval(
    weights * values,
    weights,
    cluster_ids,
    num_bootstrap=num_bootstrap,
    seed=seed,
  )


def share_interval(
  values: Numbers, cluster_ids: Ids, *, num_bootstrap: int = 2000
) -> Interval:
  """`mean_interval` of zeros and ones; Wilson's interval if all agree."""
  share = mean_interval(values, cluster_ids, num_bootstrap=num_bootstrap)
  if share.low == share.high:
    low, high = wilson_interval(share.mean, share.num_clusters)
    share = dataclasses.replace(share, low=low, high=high)
  return share


def student_interval(values: Numbers) -> Interval:
  """Mean of a few runs with Student's 95 % interval; infinite for one run.

  Raises:
    ValueError: no value, or one that is not finite.
  """
  from scipy import stats

  x = _vector('values', values)
  mean, room = float(x.mean()), math.inf
  if x.size > 1:
    error = float(x.std(ddof=1)) / math.sqrt(x.size)
    room = error * float(stats.t.ppf(0.975, x.size - 1))
  return Interval(mean, mean - room, mean + room, x.size)


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
  """Wilson's 95 % interval of a share: sound at 0 and 1, and for few items."""
  centre = mean + Z95**2 / (2 * count)
  half = Z95 * math.sqrt(mean * (1 - mean) / count + Z95**2 / (4 * count**2))
  scale = 1 + Z95**2 / count
  # Rounding would leave 1e-17 where the bound is exactly 0 or 1.
  low = 0.0 if mean == 0 else (centre - half) / scale
  high = 1.0 if mean == 1 else (centre + half) / scale
  return low, high
