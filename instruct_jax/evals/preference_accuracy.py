"""Reward-model accuracy and labeler agreement on ranked completions.

Paper 4.1 and E.2: 72.4 ± 0.4 % of the pairs are ordered as the labelers of the
training groups ordered them (intra), 69.6 ± 0.9 % as labelers of the held-out
group did (inter). Paper 3.4: labelers agree with one another on 72.6 ± 1.5 %
of the pairs (training) and 77.3 ± 1.3 % (held-out), which bounds what any
reward model can reach.
"""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from instruct_jax.data import labels, records
from instruct_jax.evals import win_rate


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """Share of labeled pairs ordered correctly, with its 95 % interval."""

  accuracy: float
  low: float
  high: float
  num_pairs: int


@dataclasses.dataclass(frozen=True)
class Agreement:
  """Share of pairs two labelers order alike, with its 95 % interval."""

  rate: float
  low: float
  high: float
  num_pairs: int


@dataclasses.dataclass(frozen=True)
class Spread:
  """Mean over runs (folds, seeds) with the standard error of that mean.

  `error` is None for a single run, which shows no spread.
  """

  mean: float
  error: float | None
  num_runs: int


def spread(values: win_rate.Numbers) -> Spread:
  """Mean and standard error over runs, as E.2 prints 72.4 ± 0.4 %.

  The paper does not say what its ± is. Ours is s / √n, s with n - 1; folds
  share training data, so it understates what new labelers would bring.

  Raises:
    ValueError: no value, or one that is not finite.
  """
  values = np.asarray(values, dtype=np.float64)
  if not values.size or not np.isfinite(values).all():
    raise ValueError(f'expected finite accuracies of runs, got {values}')
  error = None
  if values.size > 1:
    error = float(values.std(ddof=1) / np.sqrt(values.size))
  return Spread(float(values.mean()), error, values.size)


def pairwise_accuracy(
  scores: Sequence[win_rate.Numbers],
  ranks: Sequence[win_rate.Numbers],
  cluster_ids: win_rate.Ids,
  *,
  num_bootstrap: int = 2000,
  seed: int = 0,
) -> Accuracy:
  """How often scores order a pair of completions as the labeler did.

  Pairs that the labeler tied carry no label and are dropped, as in training
  (C.2); pairs with equal scores count one half. Pooled over pairs, so a prompt
  with K = 9 weighs up to 36 times one with K = 2; redrawn by cluster.

  With the gold utility as `scores` this is the ceiling: what the best possible
  judge reaches on these very pairs, given the labelers' noise.

  Args:
    scores: per comparison, one score per completion; higher is better.
    ranks: per comparison, one rank per completion; 1 is best, equal = tie.
    cluster_ids: per comparison; the prompt, when several labelers ranked it.
    num_bootstrap: see `win_rate.ratio_interval`.
    seed: see `win_rate.ratio_interval`.

  Returns:
    Accuracy in [0, 1], 95 % interval, number of pairs that count.

  Raises:
    ValueError: lengths differ, scores not finite, ranks below 1, or no pair.
  """
  if not len(scores) == len(ranks) == len(cluster_ids):
    raise ValueError(
      f'{len(scores)} score rows, {len(ranks)} rank rows and '
      f'{len(cluster_ids)} cluster ids; expected one of each per comparison'
    )
  correct = np.zeros(len(scores))
  num_pairs = np.zeros(len(scores))
  for row, (score, rank) in enumerate(zip(scores, ranks, strict=True)):
    score = np.asarray(score, dtype=np.float64)
    rank = np.asarray(rank)
    if score.ndim != 1 or score.shape != rank.shape:
      raise ValueError(
        f'comparison {row}: scores have shape {score.shape}, ranks '
        f'{rank.shape}; expected one of each per completion'
      )
    if not np.isfinite(score).all() or (rank < 1).any():
      raise ValueError(
        f'comparison {row}: scores must be finite and ranks at least 1, got '
        f'{score.tolist()} and {rank.tolist()}'
      )
    # [C, C]: +1 where the row beats the column, by score and by label. Both
    # triangles hold every pair, hence the halves.
    by_score = np.sign(score[:, None] - score[None, :])
    by_label = np.sign(rank[None, :] - rank[:, None])
    labeled = by_label != 0
    num_pairs[row] = labeled.sum() / 2
    correct[row] = ((by_score * by_label + 1) / 2)[labeled].sum() / 2
  if not num_pairs.sum():
    raise ValueError(
      f'no pair to judge: {len(scores)} comparisons, every pair tied'
    )
  interval = win_rate.ratio_interval(
    correct, num_pairs, cluster_ids, num_bootstrap=num_bootstrap, seed=seed
  )
  return Accuracy(
    interval.mean, interval.low, interval.high, int(num_pairs.sum())
  )


def agreement(
  comparisons: Sequence[records.Comparison],
  *,
  num_bootstrap: int = 2000,
  seed: int = 0,
) -> Agreement | None:
  """How often two labelers order the same two completions alike (3.4).

  Args:
    comparisons: rankings, in any order; `labels.agreement` says which count.
    num_bootstrap: see `win_rate.ratio_interval`; redrawn by prompt.
    seed: see `win_rate.ratio_interval`.

  Returns:
    Rate in [0, 1] with its interval, or None when no two named labelers ordered
    the same two completions.
  """
  found = labels.agreement(comparisons)
  if not sum(found.counted):
    return None
  interval = win_rate.ratio_interval(
    found.agreed,
    found.counted,
    found.prompts,
    num_bootstrap=num_bootstrap,
    seed=seed,
  )
  return Agreement(
    interval.mean, interval.low, interval.high, sum(found.counted)
  )


def label_folds(
  labelers: Sequence[str], num_folds: int, seed: int
) -> list[list[str]]:
  """Groups labelers so that every group has about the same amount of data.

  Paper E.2: five groups of similar data size; the reward model trains on four
  and is tested on the fifth. From the largest labeler to the smallest, each
  joins the group that has the least data so far; the seed orders equals.

  Args:
    labelers: the labeler of every comparison, with repetition.
    num_folds: number of groups, at least 2.
    seed: another seed gives another grouping of similar sizes.

  Returns:
    `num_folds` sorted lists of names; every name is in exactly one.

  Raises:
    ValueError: fewer than 2 groups, nameless rows or too few labelers.
  """
  sizes = collections.Counter(labelers)
  if num_folds < 2:
    raise ValueError(f'num_folds must be at least 2, got {num_folds}')
  if '' in sizes:
    raise ValueError(
      f'{sizes[""]} of {len(labelers)} comparisons name no labeler; folds over '
      'labelers need a name on every comparison'
    )
  if len(sizes) < num_folds:
    raise ValueError(
      f'{num_folds} folds need at least {num_folds} labelers, got {len(sizes)}'
    )
  names = sorted(sizes)
  np.random.default_rng(seed).shuffle(names)
  names.sort(
    key=lambda name: -sizes[name]
  )  # Stable: the shuffle orders equals.
  folds: list[list[str]] = [[] for _ in range(num_folds)]
  loads = [0] * num_folds
  for name in names:
    smallest = min(range(num_folds), key=lambda i: (loads[i], len(folds[i])))
    folds[smallest].append(name)
    loads[smallest] += sizes[name]
  return [sorted(fold) for fold in folds]
