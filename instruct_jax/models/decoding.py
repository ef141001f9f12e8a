"""A policy's forward pass while it samples: one token a row, rows of any age.

The same blocks as in training, one after another instead of under `nn.scan`:
every layer has its weights and its cache as arrays of their own, which matrix
products read where they lie; slices of a stack would be copied for every token.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from instruct_jax.models import attention
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
    outer: all but the layers, as they are trained: embeddings are added up in
      float32.
    unembedding: `outer` in the compute dtype.
    layers: the parameters of each layer, matrices in the compute dtype.
  """

  outer: Params
  unembedding: Params
  layers: tuple[Params, ...]


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
    jax.tree.map(lambda x, i=i: x[i], cast['trunk']['layers'])
    for i in range(config.num_layers)
  )
  outer, unembedding = (
    {name: x for name, x in tree['trunk'].items() if name != 'layers'}
    for tree in (params, cast)
  )
  return Weights(outer, unembedding, layers)


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


def _embed(module, weights, tokens, positions):
  return module.apply(
    {'params': {'trunk': weights.outer}},
    tokens,
    jnp.clip(positions, 0, module.config.context_length - 1),
    method=lambda model, *args: model.trunk.embed(*args),
  )


def _through_layers(config, weights, x, caches, sights):
  windowed = config.window_layers or (False,) * config.num_layers
  after = []
  for params, cache, is_windowed in zip(
    weights.layers, caches, windowed, strict=True
  ):
    # A flash kernel is chosen only where windows make no difference.
    sight = sights[is_windowed and len(sights) > 1]
    (x, cache), _ = Block(config).apply(
      {'params': params}, (x, cache), (0, False), [sight], True
    )
    after.append((cache.keys, cache.values))
  return x, tuple(after)


def read(
  module: Policy,
  weights: Weights,
  tokens: Int[Array, 'S P'],
  lengths: Int[Array, 'S'],
) -> SlotCache:
  """Keys and values of prompts, [S, K, P, H] in each layer.

  No logits: the last token of a prompt is read again by the first `step`.

  Args:
    module: the policy.
    weights: of the policy.
    tokens: padded on the right.
    lengths: real tokens of each row.
  """
  config = module.config
  num_rows, num_tokens = tokens.shape
  columns = jnp.arange(num_tokens)
  segments = (columns[None, :] < lengths[:, None]).astype(jnp.int32)
  positions = jnp.broadcast_to(columns[None, :], tokens.shape)
  allowed = (columns[:, None] >= columns[None, :])[None]
  allowed = jnp.broadcast_to(
    allowed & (segments > 0)[:, None, :], (num_rows, num_tokens, num_tokens)
  )
  sights = make_sights(
    config,
    positions,
    positions,
    allowed,
    segments,
    attention.choose(config, num_rows, num_tokens),
  )
  _, cache = _through_layers(
    config,
    weights,
    _embed(module, weights, tokens, positions),
    [LayerCache()] * config.num_layers,
    sights,
  )
  return cache


def step(
  module: Policy,
  weights: Weights,
  tokens: Int[Array, 'S'],
  lengths: Int[Array, 'S'],
  cache: SlotCache,
) -> tuple[Float[Array, 'S V'], SlotCache]:
  """Reads one more token in every row; float32 logits of the next.

  Args:
    module: the policy.
    weights: of the policy.
    tokens: each row's next token.
    lengths: columns of each row that are filled, which is the position of the
      token.
    cache: of the tokens before; comes back with this one in column `lengths`.
  """
  config = module.config
  positions = lengths[:, None]
  num_columns = cache[0][0].shape[2]
  columns = jnp.broadcast_to(
    jnp.arange(num_columns)[None, :], (tokens.shape[0], num_columns)
  )
  sights = make_sights(
    config,
    positions,
    columns,
    (columns <= positions)[:, None, :],
    None,
    None,
  )
  x, cache = _through_layers(
    config,
    weights,
    _embed(module, weights, tokens[:, None], positions),
    [LayerCache(keys, values, lengths) for keys, values in cache],
    sights,
  )
  logits = module.apply(
    {'params': {'trunk': weights.unembedding}},
    x[:, 0],
    method=lambda model, x: model.trunk.logits(x),
  )
  return logits, cache
