"""Masked sums and averages in float32.

Masked-out entries are ignored, whatever they hold, even NaN.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from instruct_jax.types import Metric


def total(
  values: Num[Array, '*shape'], mask: Bool[Array, '*shape']
) -> Float[Array, '']:
  """Sum of the unmasked values."""
  return jnp.sum(jnp.where(mask, values, 0).astype(jnp.float32))


def metric(values: Num[Array, '*shape'], mask: Bool[Array, '*shape']) -> Metric:
  """(sum, count) of the unmasked values."""
  return total(values, mask), jnp.sum(mask, dtype=jnp.float32)


def scalar(value: Num[Array, '']) -> Metric:
  """A plain number as a metric."""
  return jnp.asarray(value, jnp.float32), jnp.ones((), jnp.float32)


def mean(
  values: Num[Array, '*shape'], mask: Bool[Array, '*shape']
) -> Float[Array, '']:
  """Mean of the unmasked values; 0 when everything is masked."""
  summed, count = metric(values, mask)
  return summed / jnp.maximum(count, 1)


def variance(
  values: Num[Array, '*shape'], mask: Bool[Array, '*shape']
) -> Float[Array, '']:
  """Population variance (divisor n) of the unmasked values."""
  # Masked first: 0 times the gradient of a NaN would be NaN.
  values = jnp.where(mask, values, 0.0)
  return mean(jnp.square(values - mean(values, mask)), mask)


def whiten(
  values: Float[Array, '*shape'],
  mask: Bool[Array, '*shape'],
  epsilon: float = 1e-8,
) -> Float[Array, '*shape']:
  """(x - mean) / sqrt(variance + epsilon) over the mask; 0 where masked.

  Under `jax.jit` on a mesh the sums run over the global batch, so that the
  result does not depend on the number of devices.
  """
  values = jnp.where(mask, values, 0.0)
  centred = values - mean(values, mask)
  scale = jnp.sqrt(variance(values, mask) + epsilon)
  return jnp.where(mask, centred / scale, 0.0)


def last_index(mask: Bool[Array, 'B T']) -> Num[Array, 'B']:
  """Column of each row's last True; 0 for a row without any."""
  columns = jnp.arange(mask.shape[1])[None, :]
  return jnp.max(jnp.where(mask, columns, 0), axis=1)
