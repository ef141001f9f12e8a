"""Low-rank adapters (Hu et al. 2021): a parameter tree beside a frozen base.

An adapter of a matrix W is two more leaves beside it, A and B, and the layer
computes x W + (alpha / r) (x A) B (`models/transformer.py`). Only these leaves
are trained: gradients, Adam's moments, moving averages and checkpoints have
their size. A loss joins them with the frozen base; `merge` makes plain weights.
"""

import jax
import jax.numpy as jnp
from flax import traverse_util

from instruct_jax.types import Params, PyTree

_A, _B = '_lora_a', '_lora_b'
# A scalar model's head is trained whole: it is too small for adapters, and new
# when a stage starts.
_HEAD = ('head_kernel', 'head_bias')


def join(trained: Params, base: Params | None) -> Params:
  """Joins both trees without copying arrays.

  Args:
    trained: leaves under training: adapters and a scalar model's head, or all.
    base: the other leaves, frozen; None if all are trained.

  Raises:
    ValueError: a leaf is in both.
  """
  if base is None:
    return trained
  joined = dict(base)
  for name, value in trained.items():
    if name not in base:
      joined[name] = value
    elif isinstance(value, dict):
      joined[name] = join(value, base[name])
    else:
      raise ValueError(f'{name} is both trained and in the frozen base')
  return joined


def split(params: Params) -> tuple[Params, Params]:
  """Splits parameters into (adapters and a scalar model's head, base).

  The inverse of `join`. Nothing is copied; leaves may be abstract arrays.
  """
  trained, base = {}, {}
  for path, leaf in traverse_util.flatten_dict(params).items():
    is_trained = path[-1].endswith((_A, _B)) or path[-1] in _HEAD
    (trained if is_trained else base)[path] = leaf
  return (
    traverse_util.unflatten_dict(trained),
    traverse_util.unflatten_dict(base),
  )


def merge(params: Params, scale: float) -> Params:
  """Merges adapters into plain weights of the same model: W + scale A B.

  Computes in float32 even on accelerators, whose default precision is lower.

  Args:
    params: base and adapters, joined, with stacked layers: W [L, inputs...,
      outputs...], A [L, inputs..., r], B [L, r, outputs...].
    scale: alpha / r.
  """

  def product(a, b):
    return jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)

  merged = {}
  for name, value in params.items():
    if isinstance(value, dict):
      merged[name] = merge(value, scale)
    elif not name.endswith((_A, _B)):
      stem = name.removesuffix('_kernel')
      if f'{stem}{_A}' in params:
        change = jax.vmap(product)(params[f'{stem}{_A}'], params[f'{stem}{_B}'])
        value = value.astype(jnp.float32) + scale * change
      merged[name] = value
  return merged


def num_params(tree: PyTree) -> int:
  """Total number of elements of a tree."""
  return sum(x.size for x in jax.tree.leaves(tree))
