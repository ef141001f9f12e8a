"""A policy's forward pass while it samples: one token a row, rows of any age.

The same blocks as in training, one after another instead of under `nn.scan`:
every layer has its weights and its cache as arrays of their own, which matrix
products read where they lie; slices of a stack would be copied for every token.
Prompts are read as in training.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from instruct_jax.models.config import TransformerConfig
from instruct_jax.models.heads import Policy
from instruct_jax.models.transformer import Block, LayerCache, make_sights
from instruct_jax.types import Params

# Of each layer: keys and values [S, K, W, H].
SlotCache = tuple[tuple[jax.Array, jax.Array], ...]


@flax.struct.dataclass
class Weights:
  """A policy's parameters laid out for decoding.

  Attributes:
    trunk: as it is trained; prompts are read with it, and embeddings are added
      up in float32.
    unembedding: all of it but the layers, in the compute dtype.
    layers: the parameters of each layer, matrices in the compute dtype and
      transposed: [outputs, inputs], all else as trained.
  """

  trunk: Params
  unembedding: Params
  layers: tuple[Params, ...]


def _turned(params: Params) -> Params:
  """A layer's kernels as matrices [outputs, inputs]; all else as it is."""

  def turn(name, x):
    if not name.endswith('_kernel'):
      return x
    num_in = 2 if name == 'out_kernel' else 1
    inputs = math.prod(x.shape[:num_in])
    return x.reshape(inputs, -1).T

  return {name: turn(name, x) for name, x in params.items()}


def _turned_back(config: TransformerConfig, params: Params) -> Params:
  """As the blocks want them: another name for the same numbers, no copy."""
  heads = {
    'query_kernel': (config.num_heads, config.head_dim),
    'key_kernel': (config.kv_heads, config.head_dim),
    'value_kernel': (config.kv_heads, config.head_dim),
  }

  def turn(name, x):
    if not name.endswith('_kernel'):
      return x
    if name == 'out_kernel':
      return x.T.reshape(config.num_heads, config.head_dim, -1)
    return x.T.reshape(x.shape[1], *heads.get(name, (x.shape[0],)))

  return {name: turn(name, x) for name, x in params.items()}


def in_compute_dtype(config: TransformerConfig, params: Params) -> Params:
  """Matrices in the compute dtype, which the blocks would cast them to.

  The scales of norms, [D] or [L, D], stay as they are.
  """
  dtype = jnp.dtype(config.compute_dtype)

  def cast(path, x):
    is_scale = 'norm' in jax.tree_util.keystr(path)
    return x if is_scale else x.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast, params)


def weights_of(
  config: TransformerConfig, params: Params, cast: Params
) -> Weights:
  """Takes the layers of stacked parameters apart.

  Args:
    config: of the model.
    params: of a policy, as trained.
    cast: `in_compute_dtype` of them, laid out as decoding wants it.
  """
  layers = tuple(
    _turned(jax.tree.map(lambda x, i=i: x[i], cast['trunk']['layers']))
    for i in range(config.num_layers)
  )
  unembedding = {
    name: x for name, x in cast['trunk'].items() if name != 'layers'
  }
  return Weights(params['trunk'], unembedding, layers)


def make_cache(
  config: TransformerConfig, num_slots: int, num_columns: int
) -> SlotCache:
  """An empty cache: for each layer keys and values [S, K, W, H]."""
  shape = (num_slots, config.kv_heads, num_columns, config.head_dim)
  dtype = jnp.dtype(config.compute_dtype)
  return tuple(
    (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    for _ in range(config.num_layers)
  )


def read(
  module: Policy,
  weights: Weights,
  tokens: Int[Array, 'S P'],
  lengths: Int[Array, 'S'],
) -> SlotCache:
  """Keys and values of prompts, [S, K, P, H] in each layer.

  No logits: the last token of a prompt is read again by the first `step`.
  Through the layers as in training, many tokens being worth a slice.

  Args:
    module: the policy.
    weights: of the policy.
    tokens: padded on the right.
    lengths: real tokens of each row.
  """
  segments = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
  _, (keys, values) = module.apply(
    {'params': {'trunk': weights.trunk}},
    tokens,
    segments.astype(jnp.int32),
    method=lambda model, tokens, segments: model.trunk(
      tokens, segments, keeps_keys=True
    ),
  )
  return tuple((keys[i], values[i]) for i in range(module.config.num_layers))


def extend(
  module: Policy,
  weights: Weights,
  tokens: Int[Array, 'S t'],
  lengths: Int[Array, 'S'],
  cache: SlotCache,
) -> tuple[Float[Array, 'S t D'], SlotCache]:
  """Reads more tokens in every row; what the last layer writes for each.

  Args:
    module: the policy.
    weights: of the policy.
    tokens: each row's next tokens.
    lengths: columns of each row that are filled, which is the position of the
      first token.
    cache: of the tokens before; comes back with these from column `lengths`
      on.
  """
  config = module.config
  positions = lengths[:, None] + jnp.arange(tokens.shape[1])[None, :]
  num_columns = cache[0][0].shape[2]
  columns = jnp.broadcast_to(
    jnp.arange(num_columns)[None, :], (tokens.shape[0], num_columns)
  )
  sights = make_sights(
    config,
    positions,
    columns,
    columns[:, None, :] <= positions[:, :, None],
    None,
    None,
  )
  x = module.apply(
    {'params': {'trunk': weights.trunk}},
    tokens,
    jnp.clip(positions, 0, config.context_length - 1),
    method=lambda model, *args: model.trunk.embed(*args),
  )
  windowed = config.window_layers or (False,) * config.num_layers
  after = []
  for params, (keys, values), is_windowed in zip(
    weights.layers, cache, windowed, strict=True
  ):
    x, layer = Block(config).apply(
      {'params': _turned_back(config, params)},
      x,
      False,
      [sights[is_windowed]],
      True,
      cache=LayerCache(keys, values, lengths),
    )
    after.append((layer.keys, layer.values))
  return x, tuple(after)


def logits_of(
  module: Policy, weights: Weights, x: Float[Array, '*b D']
) -> Float[Array, '*b V']:
  """float32 logits of the next token, from what `extend` gives."""
  return module.apply(
    {'params': {'trunk': weights.unembedding}},
    x,
    x.ndim == 2,  # One token a row.
    method=lambda model, *args: model.trunk.logits(*args),
  )


def step(
  module: Policy,
  weights: Weights,
  tokens: Int[Array, 'S'],
  lengths: Int[Array, 'S'],
  cache: SlotCache,
) -> tuple[Float[Array, 'S V'], SlotCache]:
  """Reads one more token in every row; float32 logits of the next.

  Args and cache as in `extend`, with one token a row.
  """
  x, cache = extend(module, weights, tokens[:, None], lengths, cache)
  return logits_of(module, weights, x[:, 0]), cache
