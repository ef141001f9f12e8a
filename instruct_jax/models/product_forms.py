"""The forms of matrix product that a model needs, as programs to time.

A product that one machine computes at its peak may take five times as long with
one factor transposed, or in another dtype (`models/products.py`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from instruct_jax.models import products, transformer
from instruct_jax.models.config import TransformerConfig

# Sampling steps per program: starting one takes longer than a small product.
_STEPS = 16


@dataclasses.dataclass(frozen=True)
class Form:
  """Products that are timed together.

  Attributes:
    name: what a model needs them for.
    spec: as for einsum.
    shapes: of the two factors.
    steps: True for a sampling step, one token per row: weights are laid out and
      cast in advance.
    number: number of equal products.
  """

  name: str
  spec: str
  shapes: tuple[tuple[int, ...], tuple[int, ...]]
  steps: bool = False
  number: int = 1

  @property
  def flops(self) -> int:
    """Floating-point operations of all of them."""
    left, right = self.spec.partition('->')[0].split(',')
    sizes = dict(zip(left + right, sum(self.shapes, ()), strict=True))
    return 2 * self.number * math.prod(sizes.values())


def forms_of(
  shape: TransformerConfig, num_rows: int, num_tokens: int, num_slots: int
) -> list[Form]:
  """The forms of a supervised step on full rows, and of a sampling step.

  Args:
    shape: of the model.
    num_rows, num_tokens: rows and tokens per row of the supervised step.
    num_slots: rows that sample, with `num_tokens` columns filled.
  """
  M, T, S = num_rows * num_tokens, num_tokens, num_slots
  D, F, V = shape.width, shape.mlp_dim, shape.vocab_rows
  N, K, H = shape.num_heads, shape.kv_heads, shape.head_dim
  each, queries = (num_rows, N, T, H), (S, K, N // K, H)
  cache, turned = (S, K, T, H), (S, K, H, T)
  qkv = (N + 2 * K) * H
  step = functools.partial(Form, steps=True)
  row = 'mk,nk->mn'
  return [
    Form('layer', 'mk,kn->mn', ((M, D), (D, F))),
    Form('layer, gradient of inputs', 'mn,kn->mk', ((M, F), (D, F))),
    Form('layer, gradient of weights', 'mk,mn->kn', ((M, D), (M, F))),
    Form('unembedding', 'md,vd->mv', ((M, D), (V, D))),
    Form('unembedding, gradient of inputs', 'mv,vd->md', ((M, V), (V, D))),
    Form('unembedding, gradient of weights', 'mv,md->vd', ((M, V), (M, D))),
    Form('attention, scores', 'bnth,bnsh->bnts', (each, each)),
    Form('attention, values', 'bnts,bnsh->bnth', ((*each[:3], T), each)),
    step('step, layer', row, ((S, D), (F, D))),
    step('step, unembedding', row, ((S, D), (V, D))),
    step('step, query, key and value as one', row, ((S, D), (qkv, D))),
    step('step, three of a third each', row, ((S, D), (qkv // 3, D)), number=3),
    step('step, scores', 'bnth,bnsh->bnts', (queries, cache)),
    step('step, scores of turned keys', 'bnth,bnhs->bnts', (queries, turned)),
    step('step, values', 'bnts,bnsh->bnth', ((*queries[:3], T), cache)),
  ]


def as_einsum(form: Form, dtype: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """The product in plain JAX, factors and result in one dtype."""
  return jnp.einsum(form.spec, x.astype(dtype), y.astype(dtype))


def as_model(form: Form, dtype: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """The product as the models compute it."""
  if form.steps and x.ndim == 2:
    return transformer.kernel_on_the_left(x, y, dtype)
  if form.steps:
    return products.product_with_rounded(form.spec, x, y, dtype)
  return products.product(form.spec, x, y, dtype)


def program(form: Form, fn, dtype: str) -> tuple[Callable[[], Any], int]:
  """Returns a call that computes the form, and how often it does so.

  `fn` is `as_einsum` or `as_model`.
  """
  key = jax.random.key(0)
  x, y = (jax.random.normal(key, shape) for shape in form.shapes)
  if not form.steps:
    call = jax.jit(functools.partial(fn, form, dtype))
    return lambda: call(x, y), 1
  # Kernels are cast in advance, and a cache holds rounded numbers.
  cast = y.astype(dtype) if x.ndim == 2 else products.rounded(y, dtype)
  ys = [cast + i for i in range(form.number)]

  @jax.jit
  def several(x, ys):
    def step(_, x):
      for y in ys:  # Each depends on the one before, as layers do.
        x += 1e-9 * jnp.max(fn(form, dtype, x, y)).astype(x.dtype)
      return x

    return jax.lax.fori_loop(0, _STEPS, step, x)

  return lambda: several(x, ys), _STEPS
