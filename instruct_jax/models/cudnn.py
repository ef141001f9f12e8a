"""cuDNN's attention over packed rows, without a [T, T] array.

`jax.nn.dot_product_attention` passes segments to cuDNN as a bias [B, 1, T, T].
From Hopper on, cuDNN itself can take where each segment begins and how long it
is; jax offers that only in a private function.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jaxtyping import Array, Float, Int

from instruct_jax.types import MAX_SEGMENTS


def is_hopper() -> bool:
  """Whether this process's GPU, or the described one, is a Hopper or later.

  Older ones support neither packed rows nor heads of more than 128 components.
  """
  return fused.check_compute_capability('9.0')


@contextlib.contextmanager
def described_hopper() -> Iterator[None]:
  """Traces as for a Hopper, for GPUs that are described but not attached."""
  name = 'check_compute_capability'
  with mock.patch.object(fused, name, lambda capability: True):
    yield


def lengths_and_offsets(
  segments: Int[Array, 'B T'],
) -> tuple[Int[Array, 'B m'], Int[Array, 'B n']]:
  """Length and first column of each segment in row order, filled up with -1.

  Args:
    segments: adjacent equal numbers are one segment; 0 is padding.

  Returns:
    ([B, M] lengths, [B, M + 1] offsets), where M is `MAX_SEGMENTS` or, in
    shorter rows, their length.
  """
  num_segments = min(MAX_SEGMENTS, segments.shape[1])
  edges = jnp.pad(segments, ((0, 0), (1, 1)))
  starts = (segments > 0) & (segments != edges[:, :-2])
  ends = (segments > 0) & (segments != edges[:, 2:])

  def places(row):
    return jnp.nonzero(row, size=num_segments, fill_value=-1)[0]

  first, last = (jax.vmap(places)(x).astype(jnp.int32) for x in (starts, ends))
  lengths = jnp.where(first >= 0, last - first + 1, -1)
  return lengths, jnp.pad(first, ((0, 0), (0, 1)), constant_values=-1)


def attend(
  queries: Float[Array, 'B N T H'],
  keys: Float[Array, 'B K T H'],
  values: Float[Array, 'B K T H'],
  segments: Int[Array, 'B T'],
  scale: float,
) -> Float[Array, 'B N T H']:
  """Causal attention within segments; zeros on padding.

  Rows with more than `MAX_SEGMENTS` segments are NaN: the kernel would leave
  out the last ones.
  """
  lengths, offsets = lengths_and_offsets(segments)
  # jax multiplies the offsets of keys by the number of query heads.
  repeats = queries.shape[1] // keys.shape[1]
  keys, values = (jnp.repeat(x, repeats, axis=1) for x in (keys, values))
  is_real = (segments > 0)[:, :, None, None]
  # In both passes, forward and backward, the kernel does not write padding.
  inputs = [
    jnp.where(is_real, jnp.swapaxes(x, 1, 2), 0)
    for x in (queries, keys, values)
  ]
  mixed = fused.dot_product_attention(
    *inputs,
    q_seqlen=lengths,
    kv_seqlen=lengths,
    q_offsets=offsets,
    kv_offsets=offsets,
    scale=scale,
    mask_type=fused.MaskType.PADDING_CAUSAL,
  )
  all_read = jnp.sum(jnp.maximum(lengths, 0), axis=1) == jnp.sum(
    segments > 0, axis=1
  )
  mixed = jnp.where(is_real, mixed, 0)
  mixed = jnp.where(all_read[:, None, None, None], mixed, jnp.nan)
  return jnp.swapaxes(mixed, 1, 2)
