"""Loss on held-out text: nats per token, and per row for paired comparisons."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from instruct_jax.evals import win_rate
from instruct_jax.types import TextBatch


@dataclasses.dataclass(frozen=True)
class HeldoutLoss:
  """Negative log-likelihood of held-out tokens.

  Attributes:
    mean: nats per token, over all tokens (not a mean of row means).
    row_sums: nats, summed over each row's loss tokens.
    row_counts: loss tokens of each row.
  """

  mean: float
  row_sums: np.ndarray
  row_counts: np.ndarray


def heldout_loss(
  logprobs_fn: Callable[[TextBatch], jax.Array],
  rows: TextBatch,
  batch_size: int,
) -> HeldoutLoss:
  """Scores every row; the last batch is filled up with rows that do not count.

  Args:
    logprobs_fn: jitted; a batch of rows to log-probabilities [B, T], nats.
    rows: numpy, N rows; only `loss_mask` tokens count.
    batch_size: rows per call, one compilation.

  Raises:
    ValueError: no token counts.
  """
  num_rows = rows.tokens.shape[0]
  sums, counts = np.zeros(num_rows), np.zeros(num_rows)
  for start in range(0, num_rows, batch_size):
    wanted = np.arange(start, start + batch_size)
    batch = jax.tree.map(lambda x, w=wanted: x[w % num_rows], rows)
    logprobs = np.asarray(jax.device_get(logprobs_fn(batch)), np.float64)
    kept = min(batch_size, num_rows - start)
    mask = np.asarray(batch.loss_mask)
    part = np.where(mask, -logprobs, 0.0).sum(axis=1)
    sums[start : start + kept] = part[:kept]
    counts[start : start + kept] = mask.sum(axis=1)[:kept]
  if not counts.sum():
    raise ValueError(f'no token of {num_rows} held-out rows enters the loss')
  return HeldoutLoss(float(sums.sum() / counts.sum()), sums, counts)


def interval(loss: HeldoutLoss) -> win_rate.Interval:
  """Nats per token with the 95 % interval, redrawing rows."""
  return win_rate.ratio_interval(
    loss.row_sums, loss.row_counts, range(len(loss.row_sums))
  )


def difference(loss: HeldoutLoss, other: HeldoutLoss) -> win_rate.Interval:
  """Nats per token by which `loss` is higher, paired by row."""
  return win_rate.ratio_interval(
    loss.row_sums - other.row_sums,
    loss.row_counts,
    range(len(loss.row_sums)),
  )
