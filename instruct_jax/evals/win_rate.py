"""Win rates, and the clustered bootstrap behind every interval of the report.

The paper reports win rates against a baseline model with 95 % intervals
(Figure 1) but neither how the intervals are made nor how ties count (3.6).
Here ties count one half, and intervals are percentile bootstraps that redraw
whole clusters, in general prompts: two samples of one prompt, or the 36 pairs
of one ranking, are not independent, and an interval that treats them as such
is too narrow.

Host side, NumPy, float64. The bootstrap needs per cluster only the sum of the
numerators and of the denominators, so 2,000 redraws are one matrix product.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

# What figures and ids may be: plain Python or NumPy.
Number = float | int | np.number
Numbers = Sequence[Number] | np.ndarray
Ids = Sequence[str | int] | np.ndarray

CONFIDENCE = 0.95
# Normal quantile of a two-sided 95 % interval.
_Z95 = 1.959964
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
  """Numbers the clusters in order of first sight: codes [n], and how many."""
  # A dictionary and not np.unique: ids may mix types, and sorting is not needed
  # for a result that depends on the order of the rows alone.
  numbers: dict[str | int, int] = {}
  codes = np.array(
    [numbers.setdefault(cluster, len(numbers)) for cluster in cluster_ids],
    dtype=np.int64,
  )
  return codes, len(numbers)


def _vector(name: str, values: Numbers) -> np.ndarray:
  values = np.asarray(values, dtype=np.float64)
  if values.ndim != 1 or not values.size:
    raise ValueError(
      f'{name} must be a list of at least one number, got shape {values.shape}'
    )
  if not np.isfinite(values).all():
    bad = np.flatnonzero(~np.isfinite(values))
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
  """Pooled ratio sum(numerators) / sum(denominators), redrawn by cluster.

  With clusters c = 1..n, cluster sums a_c and b_c, and multiplicities m drawn
  from Multinomial(n, 1/n), every redraw is Σ m_c a_c / Σ m_c b_c; the interval
  runs from the 2.5th to the 97.5th percentile of the redraws. One cluster, or
  clusters that all agree, give an interval of width 0: the bootstrap knows no
  more than it has seen.

  Args:
    numerators: n finite numbers.
    denominators: n numbers, none negative, with a positive sum.
    cluster_ids: n ids; rows of one id are redrawn together.
    num_bootstrap: number of redraws.
    seed: the redraws depend on nothing else besides the arguments.

  Returns:
    The ratio over all rows, its interval and the number of clusters. Redraws
    whose denominators are all 0 (every row with weight missed) are left out.

  Raises:
    ValueError: lengths differ, no row, values not finite or no weight.
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
  codes, num_clusters = cluster_codes(cluster_ids)
  # [clusters, 2]: what one cluster adds to the numerator, the denominator.
  sums = np.stack(
    [
      np.bincount(codes, numerators, num_clusters),
      np.bincount(codes, denominators, num_clusters),
    ],
    axis=1,
  )
  redraws = []
  for counts in redraw_counts(num_clusters, num_bootstrap, seed):
    top, bottom = (counts @ sums).T
    redraws.append(top[bottom > 0] / bottom[bottom > 0])
  tail = 100 * (1 - CONFIDENCE) / 2
  low, high = np.percentile(np.concatenate(redraws), [tail, 100 - tail])
  mean = numerators.sum() / denominators.sum()
  return Interval(float(mean), float(low), float(high), num_clusters)


def redraw_counts(
  num_clusters: int, num_bootstrap: int, seed: int
) -> Iterator[np.ndarray]:
  """Yields how often each cluster is drawn, in blocks [redraws, clusters]."""
  generator = np.random.default_rng(seed)
  chances = np.full(num_clusters, 1 / num_clusters)
  block = max(1, _MAX_CELLS // num_clusters)
  for start in range(0, num_bootstrap, block):
    size = min(block, num_bootstrap - start)
    yield generator.multinomial(num_clusters, chances, size=size).astype(float)


def mean_interval(
  values: Numbers,
  cluster_ids: Ids,
  *,
  weights: Numbers | None = None,
  num_bootstrap: int = 2000,
  seed: int = 0,
) -> Interval:
  """Weighted mean of `values` with its clustered bootstrap interval.

  Args:
    values: n numbers, say each document's loss in nats per token.
    cluster_ids: n ids, say the documents' own.
    weights: n weights, say each document's token count; None weighs all the
      same. A mean of per-document means would overweight short documents.
    num_bootstrap: see `ratio_interval`.
    seed: see `ratio_interval`.

  Returns:
    Σ w v / Σ w over all rows, and its 95 % interval.
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
  values: Numbers,
  cluster_ids: Ids,
  *,
  num_bootstrap: int = 2000,
  seed: int = 0,
) -> Interval:
  """`mean_interval` of zeros and ones, never of width 0.

  Where all clusters agree, redraws do too, and the interval is Wilson's for so
  many clusters.
  """
  share = mean_interval(
    values, cluster_ids, num_bootstrap=num_bootstrap, seed=seed
  )
  if share.low == share.high:
    low, high = wilson_interval(share.mean, share.num_clusters)
    share = dataclasses.replace(share, low=low, high=high)
  return share


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
  """Wilson's 95 % interval of a share: sound at 0 and 1, and for few items."""
  centre = mean + _Z95**2 / (2 * count)
  half = _Z95 * math.sqrt(mean * (1 - mean) / count + _Z95**2 / (4 * count**2))
  scale = 1 + _Z95**2 / count
  # Rounding would leave 1e-17 where the bound is exactly 0 or 1.
  low = 0.0 if mean == 0 else (centre - half) / scale
  high = 1.0 if mean == 1 else (centre + half) / scale
  return low, high
