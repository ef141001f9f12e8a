"""Applies a function of rows to some of the rows at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from instruct_jax.infra import sharding
from instruct_jax.types import PyTree


def in_slices(
  fn: Callable[[PyTree], PyTree], rows: PyTree, num_slices: int
) -> PyTree:
  """Applies a function, inside a program, to one slice of rows after another.

  Only one slice's temporaries exist at a time. Slice j holds rows j, j + n,
  j + 2 n, ..., so that rows split over devices stay on their device.

  Args:
    fn: maps rows to arrays with as many rows, each row independently.
    rows: pytree of arrays with B rows.
    num_slices: n, which divides B.
  """
  if num_slices == 1:
    return fn(rows)

  def cut(x):
    return jnp.swapaxes(x.reshape(-1, num_slices, *x.shape[1:]), 0, 1)

  def join(x):
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])

  return jax.tree.map(join, jax.lax.map(fn, jax.tree.map(cut, rows)))


def in_batches(
  fn: Callable[[PyTree], PyTree],
  rows: PyTree,
  batch_size: int,
  progress: Callable[[int], None] | None = None,
) -> PyTree:
  """Applies a jitted function to any number of rows, in equal batches.

  The last batch is filled with the first rows, whose results are dropped.

  Args:
    fn: maps a batch of rows to arrays with as many rows.
    rows: pytree of numpy arrays with N rows each; ValueError if N is 0.
    batch_size: rows per call; rounded up to a multiple of the shards of the
      current mesh.
    progress: called with the number of rows of each batch once it is done.

  Returns:
    The results as numpy arrays of N rows, in order.
  """
  num_rows = jax.tree.leaves(rows)[0].shape[0]
  if num_rows == 0:
    raise ValueError('no rows to run a model on')
  batch_size, parts = sharding.whole_rows(batch_size), []
  for start in range(0, num_rows, batch_size):
    wanted = np.arange(start, start + batch_size) % num_rows
    batch = jax.tree.map(lambda x, w=wanted: np.asarray(x)[w], rows)
    result = jax.device_get(fn(batch))
    kept = min(batch_size, num_rows - start)
    parts.append(jax.tree.map(lambda x, k=kept: x[:k], result))
    if progress is not None:
      progress(kept)
  return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
