"""A policy's forward pass in sampling: one token per row, rows of any length.

It runs the same blocks as training, but one after another instead of under
`nn.scan`: every layer has its own arrays of weights and cache, which matrix
products read in place; slices of a stack would be copied for every token.
Prompts are read as in training.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from instruct_jax.models import attention
from instruct_jax.models.config import TransformerConfig
from instruct_jax.models.heads import Policy
from instruct_jax.models.products import activation_dtype
from instruct_jax.models.transformer import Block, LayerCache, plain_inputs
from instruct_jax.types import Params

# For each layer, keys and values [S, K, W, H]; keys are [S, K, H, W] where
# `attention.turns_keys`.
SlotCache = tuple[tuple[jax.Array, jax.Array], ...]


@flax.struct.dataclass
class Weights:
  """A policy's parameters laid out for decoding.

  Attributes:
    trunk: as trained; for prompts, and for embeddings, which are added in
      float32.
    unembedding: the trunk without its layers, `in_compute_dtype`.
    layers: the parameters of each layer, `in_compute_dtype`, with kernels
      transposed to [outputs, inputs].
  """

  trunk: Params
  unembedding: Params
  layers: tuple[Params, ...]


def _transposed(params: Params) -> Params:
  """A layer's kernels as matrices [outputs, inputs]; all else unchanged."""

  def transpose(name, x):
    if not name.endswith('_kernel'):
      return x
    num_in = 2 if name == 'out_kernel' else 1
    return x.reshape(math.prod(x.shape[:num_in]), -1).T

  return {name: transpose(name, x) for name, x in params.items()}


def _restored(config: TransformerConfig, params: Params) -> Params:
  """Inverse of `_transposed`: a view of the same numbers, no copy."""
  kv_heads = (config.kv_heads, config.head_dim)
  outer = {
    'query_kernel': (config.num_heads, config.head_dim),
    'key_kernel': kv_heads,
    'value_kernel': kv_heads,
  }

  def restore(name, x):
    if not name.endswith('_kernel'):
      return x
    if name == 'out_kernel':
      return x.T.reshape(config.num_heads, config.head_dim, -1)
    return x.T.reshape(x.shape[1], *outer.get(name, (x.shape[0],)))

  return {name: restore(name, x) for name, x in params.items()}


def in_compute_dtype(config: TransformerConfig, params: Params) -> Params:
  """Casts parameters to the compute dtype, as the blocks would.

  Those of norms, [D] or [L, D], keep their dtype. So do all biases where the
  compute dtype is bfloat16 but activations are float32 (on a CPU).
  """
  dtype = jnp.dtype(config.compute_dtype)
  same = dtype == activation_dtype(config.compute_dtype)
  uncast = ('norm',) if same else ('norm', 'bias')

  def cast(path, x):
    name = jax.tree_util.keystr(path)
    return x if any(part in name for part in uncast) else x.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast, params)


def weights_of(
  config: TransformerConfig, params: Params, cast: Params
) -> Weights:
  """Splits a policy's stacked parameters into one tree per layer.

  Args:
    params: of a policy, as trained.
    cast: `in_compute_dtype(params)`, laid out for decoding.
  """
  trunk = cast['trunk']
  layers = tuple(
    _transposed(jax.tree.map(lambda x, i=i: x[i], trunk['layers']))
    for i in range(config.num_layers)
  )
  unembedding = {name: x for name, x in trunk.items() if name != 'layers'}
  return Weights(params['trunk'], unembedding, layers)


def make_cache(
  config: TransformerConfig, num_slots: int, num_columns: int
) -> SlotCache:
  """Returns an empty cache."""
  shape = (num_slots, config.kv_heads, num_columns, config.head_dim)
  dtype = activation_dtype(config.compute_dtype)
  return tuple(
    (_turned(jnp.zeros(shape, dtype)), jnp.zeros(shape, dtype))
    for _ in range(config.num_layers)
  )


def _turned(keys):
  """Keys [S, K, W, H] in the layout of a cache."""
  return keys.mT if attention.turns_keys() else keys


def read(
  module: Policy,
  weights: Weights,
  tokens: Int[Array, 'S P'],
  lengths: Int[Array, 'S'],
) -> SlotCache:
  """Returns a cache of the prompts, with P columns.

  It computes no logits: the first `step` reads a prompt's last token again.
  Layers run as in training, since for many tokens copying a slice is cheap.

  Args:
    tokens: padded on the right.
    lengths: number of real tokens in each row.
  """
  segments = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
  _, (keys, values) = module.apply(
    {'params': {'trunk': weights.trunk}},
    tokens,
    segments.astype(jnp.int32),
    method=lambda model, *args: model.trunk(*args, keeps_keys=True),
  )
  return tuple(
    (_turned(keys[i]), values[i]) for i in range(module.config.num_layers)
  )


def extend(
  module: Policy,
  weights: Weights,
  tokens: Int[Array, 'S t'],
  lengths: Int[Array, 'S'],
  cache: SlotCache,
) -> tuple[Float[Array, 'S t D'], SlotCache]:
  """Reads more tokens in every row; returns the last layer's output.

  Args:
    tokens: each row's next tokens.
    lengths: number of filled columns in each row: the first token's position.
    cache: of earlier tokens; returned with these from column `lengths` on.
  """
  config = module.config
  positions = lengths[:, None] + jnp.arange(tokens.shape[1])[None, :]
  num_columns = cache[0][1].shape[2]
  columns = jnp.broadcast_to(
    jnp.arange(num_columns)[None, :], (tokens.shape[0], num_columns)
  )
  allowed = columns[:, None, :] <= positions[:, :, None]
  inputs = [
    each.replace(kernel='cache')
    for each in plain_inputs(config, positions, columns, allowed)
  ]
  x = module.apply(
    {'params': {'trunk': weights.trunk}},
    tokens,
    jnp.clip(positions, 0, config.context_length - 1),
    method=lambda model, *args: model.trunk.embed(*args),
  )
  after = []
  for params, (keys, values), windowed in zip(
    weights.layers, cache, config.is_windowed, strict=True
  ):
    x, layer = Block(config).apply(
      {'params': _restored(config, params)},
      x,
      False,
      [inputs[windowed]],
      True,
      cache=LayerCache(keys, values, lengths),
    )
    after.append((layer.keys, layer.values))
  return x, tuple(after)


def logits_of(
  module: Policy, weights: Weights, x: Float[Array, '*b D']
) -> Float[Array, '*b V']:
  """float32 logits of the next token, from the output of `extend`."""

  def unembed(model, x):
    one_each = x.ndim == 2  # One token per row.
    return model.trunk.unembed(model.trunk.final_norm(x), one_each)

  params = {'trunk': weights.unembedding}
  return module.apply({'params': params}, x, method=unembed)


def step(
  module: Policy,
  weights: Weights,
  tokens: Int[Array, 'S'],
  lengths: Int[Array, 'S'],
  cache: SlotCache,
) -> tuple[Float[Array, 'S V'], SlotCache]:
  """`extend` by one token per row; returns float32 logits of the next token."""
  x, cache = extend(module, weights, tokens[:, None], lengths, cache)
  return logits_of(module, weights, x[:, 0]), cache
