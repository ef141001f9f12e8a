"""Matrix products, and the dtype of activations.

Accelerators multiply bfloat16, accumulate in float32, and return and keep
bfloat16. Products for gradients of weights return the weights' float32, so that
these gradients are not rounded before devices add them up.
On a CPU only the factors of products are bfloat16. XLA's fast kernels there
return float32, and want the contracted axis last in the left factor. XLA has no
other bfloat16 arithmetic there, and to write a part of a bfloat16 array it
converts all of it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


def platform() -> str:
  """Platform of the current mesh, which may be abstract, or of the process."""
  mesh = jax.sharding.get_abstract_mesh()
  device = mesh.abstract_device if mesh.shape else None
  return device.platform if device else jax.default_backend()


def is_bfloat16_on_cpu(dtype: str) -> bool:
  """Whether products are written for the bfloat16 kernels of one CPU device.

  Several devices cannot use them: layout constraints do not work with sharding.
  """
  mesh = jax.sharding.get_abstract_mesh()
  one_device = not mesh.shape or mesh.size == 1
  return dtype == 'bfloat16' and one_device and platform() == 'cpu'


def activation_dtype(dtype: str) -> jnp.dtype:
  """The dtype of activations, which products of this dtype read and return."""
  return jnp.dtype('float32' if is_bfloat16_on_cpu(dtype) else dtype)


def product(
  spec: str,
  x: Float[Array, '*x'],
  y: Float[Array, '*y'],
  dtype: str,
  out: str = '',
) -> Float[Array, '*out']:
  """`jnp.einsum` of two factors in a dtype.

  Args:
    spec: as for einsum; x and y have one axis each that the other lacks, and
      one in common that the product lacks.
    dtype: the `compute_dtype`.
    out: dtype of the product; '' is `activation_dtype`.
  """
  if is_bfloat16_on_cpu(dtype):
    return _float32_sums(spec, x, y)
  if dtype == 'bfloat16':
    return _as_given(spec, out or dtype, x, y)
  x, y = x.astype(dtype), y.astype(dtype)
  return jnp.einsum(spec, x, y, preferred_element_type=out or dtype)


def rounded(x: Float[Array, '*x'], dtype: str) -> Float[Array, '*x']:
  """x with its numbers rounded as a product in this dtype would read them."""
  if not is_bfloat16_on_cpu(dtype):
    return x
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def product_with_rounded(
  spec: str, x: Float[Array, '*x'], y: Float[Array, '*y'], dtype: str
) -> Float[Array, '*out']:
  """`product` for a y that is already `rounded`, and much larger than x.

  On a CPU it multiplies the same numbers in float32, because XLA would convert
  a large y to bfloat16 and back for each product of a few rows.
  """
  if is_bfloat16_on_cpu(dtype):
    return product(spec, rounded(x, dtype), y, 'float32')
  return product(spec, x, y, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _as_given(spec, out, x, y):
  """A product in bfloat16, with gradients in the dtypes of x and y.

  The backward pass keeps weights as they are: cast ones would be copies.
  """
  x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
  return jnp.einsum(spec, x, y, preferred_element_type=out)


def _as_given_forward(spec, out, x, y):
  return _as_given(spec, out, x, y), (x, y)


def _as_given_backward(spec, out, factors, gradient):
  del out
  x, y = factors
  left, right, product = spec.replace('->', ',').split(',')
  return (
    _as_given(f'{product},{right}->{left}', x.dtype, gradient, y),
    _as_given(f'{left},{product}->{right}', y.dtype, x, gradient),
  )


_as_given.defvjp(_as_given_forward, _as_given_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _float32_sums(spec, x, y):
  """A product in bfloat16, returned in float32, as are those of gradients."""
  return _multiply(spec, x, y)


def _forward(spec, x, y):
  return _multiply(spec, x, y), (x, y)


def _backward(spec, factors, gradient):
  x, y = factors
  left, right, out = spec.replace('->', ',').split(',')
  return (
    _multiply(f'{out},{right}->{left}', gradient, y).astype(x.dtype),
    _multiply(f'{left},{out}->{right}', x, gradient).astype(y.dtype),
  )


_float32_sums.defvjp(_forward, _backward)


def _multiply(spec, x, y):
  """The product, with every array in the layout that the kernels want."""
  left, right, out = spec.replace('->', ',').split(',')
  (row,) = set(left) - set(right)
  (column,) = set(right) - set(left)
  if out.index(row) > out.index(column):
    left, right, x, y = right, left, y, x
  (inner,) = set(left) & set(right) - set(out)
  x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
  if left[-1] != inner:
    x = rows_first(jnp.swapaxes(x, left.index(inner), -1))
  batch = tuple(range(len(out) - 2))
  dims = ((x.ndim - 1,), (right.index(inner),)), (batch, batch)
  return rows_first(
    jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)
  )


def rows_first(x: Float[Array, '*x']) -> Float[Array, '*x']:
  """x itself, with its last axis contiguous in memory.

  Otherwise XLA would pass a transposed view to the kernel, which costs more
  than the copy; where the result is the view, there is no fast kernel at all.
  """
  return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
