"""A decoder-only Transformer of GPT-3's shape as one pure Linen module.

Pre-layer-norm blocks, learned positions, GELU, tied embedding. The layers run
through `nn.scan`, so that compile time does not grow with depth and parameters
are stacked with a leading `layers` axis. `deterministic` and `cache` are call
arguments: the same module trains, scores and decodes.
"""

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from instruct_jax.models.config import TransformerConfig

# Finite, so that a row that masks everything gives uniform weights and not NaN.
MASKED = -1e9


@flax.struct.dataclass
class Cache:
  """Keys and values of the tokens already read, one slot a token.

  Attributes:
    keys, values: in the compute dtype; heads before slots, so that a decode
      step multiplies them as they lie.
    mask: slots that hold a real token.
    length: slots written so far, the same for every row.
  """

  keys: Float[Array, 'L B N S H']
  values: Float[Array, 'L B N S H']
  mask: Bool[Array, 'B S']
  length: Int[Array, '']


def make_cache(config: TransformerConfig, batch: int, slots: int) -> Cache:
  """An empty cache for `batch` rows of up to `slots` tokens."""
  shape = (
    config.num_layers,
    batch,
    config.num_heads,
    slots,
    config.head_dim,
  )
  dtype = jnp.dtype(config.compute_dtype)
  return Cache(
    keys=jnp.zeros(shape, dtype),
    values=jnp.zeros(shape, dtype),
    mask=jnp.zeros((batch, slots), bool),
    length=jnp.zeros((), jnp.int32),
  )


def positions_of(segments: Int[Array, 'B T']) -> Int[Array, 'B T']:
  """Each token's place within its own segment, from 0.

  With a mask as the segments (0 or 1) and padding on either side this equals
  max(cumsum(mask) - 1, 0) on real tokens. Segments are contiguous.
  """
  length = segments.shape[1]
  columns = jnp.arange(length)[None, :]
  previous = jnp.pad(segments, ((0, 0), (1, 0)))[:, :length]
  starts = jnp.where(segments != previous, columns, 0)
  return columns - jax.lax.cummax(starts, axis=1)


def _normal(scale: float = 1.0):
  return nn.initializers.normal(0.02 * scale)


def dense(
  x: Float[Array, '*batch inner'],
  kernel: Float[Array, '*dims'],
  bias: Float[Array, '*outer'],
  num_in: int = 1,
) -> Float[Array, '*out']:
  """Contracts the last `num_in` axes of x with the first of the kernel, and
  adds the bias, which has the shape of the rest.

  As one matrix product: XLA's CPU backend computes the weight gradient of a
  product with several batch axes 2.5 times slower than this.
  """
  batch, inner = x.shape[: x.ndim - num_in], x.shape[x.ndim - num_in :]
  outer = kernel.shape[num_in:]
  size = math.prod(inner)
  product = x.reshape(-1, size) @ kernel.reshape(size, -1)
  product += bias.reshape(1, -1)
  return product.reshape(*batch, *outer)


class Block(nn.Module):
  """One pre-LN layer: x + attention(LN(x)), then x + MLP(LN(x))."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, carry, layer, allowed, deterministic):
    config = self.config
    dtype = jnp.dtype(config.compute_dtype)
    x, cache = carry
    # GPT-2: the 2L projections onto the residual stream start 1/sqrt(2L)
    # smaller, so that the stream's variance does not grow with depth.
    residual_scale = (2 * config.num_layers) ** -0.5

    def param(name, init, shape, axes):
      return self.param(
        name, nn.with_logical_partitioning(init, axes), shape, jnp.float32
      ).astype(dtype)

    def norm(name, x):
      return nn.LayerNorm(
        epsilon=1e-5,
        dtype=dtype,
        scale_init=nn.with_logical_partitioning(
          nn.initializers.ones, ('norm',)
        ),
        bias_init=nn.with_logical_partitioning(
          nn.initializers.zeros, ('norm',)
        ),
        name=name,
      )(x)

    def drop(x):
      return nn.Dropout(config.dropout)(x, deterministic=deterministic)

    D, N, H, F = config.width, config.num_heads, config.head_dim, config.mlp_dim

    def project_heads(name, h):
      kernel = param(
        f'{name}_kernel',
        _normal(),
        (D, N, H),
        ('embed', 'heads', 'head_dim'),
      )
      bias = param(
        f'{name}_bias', nn.initializers.zeros, (N, H), ('heads', 'head_dim')
      )
      # [B, N, T, H]: batch axes first, as the products below want them.
      return jnp.swapaxes(dense(h, kernel, bias), 1, 2)

    x = nn.with_logical_constraint(x, ('batch', 'length', None))
    h = norm('attention_norm', x)
    queries = project_heads('query', h)
    keys = project_heads('key', h)
    values = project_heads('value', h)
    if cache is not None:
      # The whole stack is carried and written in place: one [B, t] stripe a
      # layer, not a copy of the cache.
      start = (layer, 0, 0, cache.length, 0)
      cache = cache.replace(
        keys=jax.lax.dynamic_update_slice(cache.keys, keys[None], start),
        values=jax.lax.dynamic_update_slice(cache.values, values[None], start),
      )
      keys = jax.lax.dynamic_index_in_dim(cache.keys, layer, keepdims=False)
      values = jax.lax.dynamic_index_in_dim(cache.values, layer, keepdims=False)
    scores = jnp.einsum('bnth,bnsh->bnts', queries, keys) * H**-0.5
    scores = jnp.where(
      allowed[:, None, :, :], scores.astype(jnp.float32), MASKED
    )
    weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
    mixed = jnp.einsum('bnts,bnsh->bnth', weights, values)
    mixed = jnp.swapaxes(mixed, 1, 2)
    out_kernel = param(
      'out_kernel',
      _normal(residual_scale),
      (N, H, D),
      ('heads', 'head_dim', 'embed'),
    )
    out_bias = param('out_bias', nn.initializers.zeros, (D,), ('norm',))
    x = x + drop(dense(mixed, out_kernel, out_bias, num_in=2))

    up_kernel = param('up_kernel', _normal(), (D, F), ('embed', 'mlp'))
    up_bias = param('up_bias', nn.initializers.zeros, (F,), ('mlp',))
    down_kernel = param(
      'down_kernel', _normal(residual_scale), (F, D), ('mlp', 'embed')
    )
    down_bias = param('down_bias', nn.initializers.zeros, (D,), ('norm',))
    h = jax.nn.gelu(dense(norm('mlp_norm', x), up_kernel, up_bias))
    x = x + drop(dense(h, down_kernel, down_bias))
    return (x, cache), None


def _remat(block, policy: str):
  if policy == 'none':
    return block
  policies = {
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'full': jax.checkpoint_policies.nothing_saveable,
  }
  # `deterministic` (argument 4, `self` counted) is a Python bool.
  return nn.remat(
    block, policy=policies[policy], prevent_cse=False, static_argnums=(4,)
  )


class Transformer(nn.Module):
  """Tokens to final hidden states; the trunk of every model here."""

  config: TransformerConfig

  def setup(self):
    config = self.config
    self.token_embedding = self.param(
      'token_embedding',
      nn.with_logical_partitioning(
        nn.initializers.normal(0.02), ('vocab', 'embed')
      ),
      (config.vocab_rows, config.width),
      jnp.float32,
    )
    self.position_embedding = self.param(
      'position_embedding',
      nn.with_logical_partitioning(
        nn.initializers.normal(0.01), ('length', 'embed')
      ),
      (config.context_length, config.width),
      jnp.float32,
    )
    layers = nn.scan(
      _remat(Block, config.remat),
      variable_axes={'params': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=(0, nn.broadcast, nn.broadcast),
      length=config.num_layers,
      unroll=config.scan_unroll,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    self.layers = layers(config)
    self.final_norm = nn.LayerNorm(
      epsilon=1e-5,
      dtype=jnp.dtype(config.compute_dtype),
      scale_init=nn.with_logical_partitioning(nn.initializers.ones, ('norm',)),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('norm',)),
    )
    self.embedding_dropout = nn.Dropout(config.dropout)

  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    segments: Int[Array, 'B T'],
    *,
    deterministic: bool = True,
    cache: Cache | None = None,
  ) -> tuple[Float[Array, 'B T D'], Cache | None]:
    """Hidden states after the final norm.

    Args:
      tokens: ids; any value where padded.
      segments: 0 on padding, 1.. on real tokens (a mask is a fine one).
        Tokens attend to earlier tokens of their own segment only.
      deterministic: True switches dropout off.
      cache: when given, the tokens continue the cached ones (one segment a
        row) and the cache comes back with them added.

    Raises:
      ValueError: more tokens than the context length.
    """
    config = self.config
    num_tokens = tokens.shape[1]
    if num_tokens > config.context_length:
      raise ValueError(
        f'{num_tokens} tokens in a context of {config.context_length}'
      )
    mask = segments > 0
    if cache is None:
      positions = positions_of(segments)
      columns = jnp.arange(num_tokens)
      allowed = segments[:, :, None] == segments[:, None, :]
      allowed &= (columns[:, None] >= columns[None, :])[None]
      allowed &= mask[:, None, :]
    else:
      before = jnp.sum(cache.mask, axis=1, dtype=jnp.int32, keepdims=True)
      positions = before + jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
      cached_mask = jax.lax.dynamic_update_slice(
        cache.mask, mask, (0, cache.length)
      )
      slots = jnp.arange(cached_mask.shape[1])
      rows = cache.length + jnp.arange(num_tokens)
      allowed = (rows[:, None] >= slots[None, :])[None]
      allowed = allowed & cached_mask[:, None, :]
    positions = jnp.clip(positions, 0, config.context_length - 1)
    dtype = jnp.dtype(config.compute_dtype)
    x = self.token_embedding[tokens] + self.position_embedding[positions]
    x = self.embedding_dropout(x.astype(dtype), deterministic=deterministic)
    (x, new_cache), _ = self.layers(
      (x, cache), jnp.arange(config.num_layers), allowed, deterministic
    )
    if cache is not None:
      new_cache = new_cache.replace(
        mask=cached_mask, length=cache.length + num_tokens
      )
    return self.final_norm(x), new_cache

  def unembed(self, hidden: Float[Array, '*b D']) -> Float[Array, '*b V']:
    """Float32 logits over the embedding rows; unused rows get `MASKED`."""
    config = self.config
    rows = hidden.reshape(-1, config.width)
    logits = jnp.einsum(
      'md,vd->mv',
      rows,
      self.token_embedding.astype(hidden.dtype),
      preferred_element_type=jnp.float32,
    ).reshape(*hidden.shape[:-1], config.vocab_rows)
    if config.vocab_rows > config.vocab_size:
      unused = jnp.arange(config.vocab_rows) >= config.vocab_size
      logits = jnp.where(unused[(None,) * (logits.ndim - 1)], MASKED, logits)
    return logits
