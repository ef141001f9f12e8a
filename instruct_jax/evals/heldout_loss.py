"""Loss on held-out text: nats per token, and per row for paired comparisons."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from instruct_jax.evals import win_rate
from instruct_jax.types import TextBatch


@dataclasses.dataclass(frozen=True)
class HeldoutLoss:
  """Negative log-likelihood of held-out tokens."""

  mean: float  # Nats per token, over all tokens (not a mean of row means).
  row_sums: np.ndarray  # Nats, summed over each row's loss tokens.
  row_counts: np.ndarray  # Loss tokens of each row.


def heldout_loss(
  logprobs_fn: Callable[[TextBatch], jax.Array],
  rows: TextBatch,
  batch_size: int,
  progress: Callable[[int], None] | None = None,
) -> HeldoutLoss:
  """Scores every row; the last batch is padded with rows that do not count.

  Args:
    logprobs_fn: jitted; maps a batch to log-probabilities [B, T] in nats.
    rows: NumPy, N rows; only `loss_mask` tokens count.
    batch_size: rows per call, so that it compiles once.
    progress: called with the number of rows of each batch once it is done.

  Raises:
    ValueError: no token enters the loss.
  """
  num_rows = rows.tokens.shape[0]
  sums, counts = np.zeros(num_rows), np.zeros(num_rows)
  for start in range(0, num_rows, batch_size):
    kept = np.arange(start, min(start + batch_size, num_rows))
    wanted = np.arange(start, start + batch_size) % num_rows
    batch = jax.tree.map(lambda x, wanted=wanted: x[wanted], rows)
    logprobs = np.asarray(jax.device_get(logprobs_fn(batch)), np.float64)
    mask = np.asarray(batch.loss_mask)
    sums[kept] = np.where(mask, -logprobs, 0.0).sum(axis=1)[: len(kept)]
    counts[kept] = mask.sum(axis=1)[: len(kept)]
    if progress is not None:
      progress(len(kept))
  if not counts.sum():
    raise ValueError(f'no token of {num_rows} held-out rows enters the loss')
  return HeldoutLoss(float(sums.sum() / counts.sum()), sums, counts)


def interval(loss: HeldoutLoss) -> win_rate.Interval:
  """Nats per token with the 95 % interval, resampling rows."""
  ids = range(len(loss.row_sums))
  return win_rate.ratio_interval(loss.row_sums, loss.row_counts, ids)


def difference(loss: HeldoutLoss, other: HeldoutLoss) -> win_rate.Interval:
  """Nats per token by which `loss` exceeds `other`, paired by row."""
  sums = loss.row_sums - other.row_sums
  return win_rate.ratio_interval(sums, loss.row_counts, range(len(sums)))
