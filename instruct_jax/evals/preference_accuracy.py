"""Reward-model accuracy and labeler agreement on ranked completions.

In the paper, reward models order 72.4 ± 0.4 % of the pairs as the labelers of
the training groups did (intra) and 69.6 ± 0.9 % as labelers of the held-out
group did (inter; 4.1, E.2). Labelers agree with one another on 72.6 ± 1.5 % of
the pairs (training) and 77.3 ± 1.3 % (held-out; 3.4).
"""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from instruct_jax.data import labels, records
from instruct_jax.evals import win_rate


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """Share of labeled pairs ordered correctly, with its 95 % interval.

  `log_loss` is the loss of the scores as log-odds, nats per pair.
  """

  accuracy: float
  low: float
  high: float
  num_pairs: int
  log_loss: float


@dataclasses.dataclass(frozen=True)
class Agreement:
  """Share of pairs two labelers order alike, with its 95 % interval."""

  rate: float
  low: float
  high: float
  num_pairs: int


@dataclasses.dataclass(frozen=True)
class Spread:
  """Mean over runs (folds, seeds) and its standard error; None for one run."""

  mean: float
  error: float | None
  num_runs: int


def spread(values: win_rate.Numbers) -> Spread:
  """Mean and standard error over runs, as E.2 prints 72.4 ± 0.4 %.

  The paper does not define its ±. Ours is s / √n, with n - 1 in s. Folds share
  training data, so it understates the spread over new labelers.

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
) -> Accuracy:
  """How often scores order a pair of completions as the labeler did.

  Pairs that the labeler tied are dropped, as in training (C.2); pairs with
  equal scores count one half. Pooled over pairs, so a prompt with K = 9 weighs
  up to 36 times as much as one with K = 2. With the gold utility as `scores`,
  this is the most that any judge can reach, given the labelers' noise.

  Args:
    scores: per comparison, one score per completion; higher is better.
    ranks: per comparison, one rank per completion; 1 is best, equal = tie.
    cluster_ids: per comparison; the prompt, if several labelers ranked it.

  Returns:
    Accuracy in [0, 1], 95 % interval, number of pairs that count, and the mean
    of -log sigmoid(better - worse) over these pairs.

  Raises:
    ValueError: lengths differ, scores not finite, ranks below 1, or no pair.
  """
  correct, num_pairs, loss = _counted(scores, ranks, cluster_ids)
  found = win_rate.ratio_interval(correct, num_pairs, cluster_ids)
  count = num_pairs.sum()
  return Accuracy(
    found.mean, found.low, found.high, int(count), float(loss.sum() / count)
  )


def accuracy_gap(
  scores: Sequence[win_rate.Numbers],
  others: Sequence[win_rate.Numbers],
  ranks: Sequence[win_rate.Numbers],
  cluster_ids: win_rate.Ids,
) -> win_rate.Interval:
  """Accuracy of `scores` minus that of `others` on the same pairs.

  The interval resamples both together: one may be better on nearly every redraw
  although their separate intervals overlap.

  Args and Raises: as `pairwise_accuracy`.
  """
  correct, num_pairs, _ = _counted(scores, ranks, cluster_ids)
  correct -= _counted(others, ranks, cluster_ids)[0]
  return win_rate.ratio_interval(correct, num_pairs, cluster_ids)


def _counted(scores, ranks, cluster_ids):
  """(pairs in the labeler's order, all pairs, loss) of each comparison."""
  if not len(scores) == len(ranks) == len(cluster_ids):
    raise ValueError(
      f'{len(scores)} score rows, {len(ranks)} rank rows and '
      f'{len(cluster_ids)} cluster ids; expected one of each per comparison'
    )
  correct, num_pairs, loss = np.zeros((3, len(scores)))
  for row, (score, rank) in enumerate(zip(scores, ranks, strict=True)):
    score, rank = np.asarray(score, dtype=np.float64), np.asarray(rank)
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
    # [C, C]: +1 where the row beats the column, by score and by label. Every
    # pair is in both triangles, hence the halves.
    by_score = np.sign(score[:, None] - score[None, :])
    by_label = np.sign(rank[None, :] - rank[:, None])
    labeled = by_label != 0
    num_pairs[row] = labeled.sum() / 2
    correct[row] = ((by_score * by_label + 1) / 2)[labeled].sum() / 2
    better = (score[:, None] - score[None, :])[by_label > 0]
    loss[row] = np.logaddexp(0.0, -better).sum()
  if not num_pairs.sum():
    why = f'{len(scores)} comparisons, every pair tied'
    raise ValueError(
      f'no pair to judge: {why if len(scores) else "no comparisons"}'
    )
  return correct, num_pairs, loss


def agreement(comparisons: Sequence[records.Comparison]) -> Agreement | None:
  """How often two labelers order the same two completions alike (3.4).

  `labels.agreement` decides which pairs count. None if no two named labelers
  ordered the same two completions. The interval resamples prompts.
  """
  found = labels.agreement(comparisons)
  if not sum(found.counted):
    return None
  interval = win_rate.ratio_interval(found.agreed, found.counted, found.prompts)
  return Agreement(
    interval.mean, interval.low, interval.high, sum(found.counted)
  )


def label_folds(
  labelers: Sequence[str], num_folds: int, seed: int
) -> list[list[str]]:
  """Groups labelers so that every group has about the same amount of data.

  Paper E.2: five groups of similar data size; the reward model trains on four
  and is tested on the fifth. From the largest labeler to the smallest, each
  joins the group with the least data so far; the seed breaks ties in size.

  Args:
    labelers: the labeler of every comparison, with repetition.
    num_folds: number of groups, at least 2.
    seed: another seed gives another grouping of similar sizes.

  Returns:
    `num_folds` sorted lists of names; every name is in exactly one.

  Raises:
    ValueError: fewer than 2 groups, rows without a labeler or too few labelers.
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
  folds: list[list[str]] = [[] for _ in range(num_folds)]
  loads = [0] * num_folds
  # The sort is stable, so the shuffle breaks ties.
  for name in sorted(names, key=lambda name: -sizes[name]):
    smallest = min(range(num_folds), key=lambda i: (loads[i], len(folds[i])))
    folds[smallest].append(name)
    loads[smallest] += sizes[name]
  return [sorted(fold) for fold in folds]
