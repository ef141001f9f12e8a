"""A decoder-only Transformer as one pure Linen module.

By default it is GPT-3: pre-layer-norm blocks, learned positions, GELU, tied
embedding. The switches of `TransformerConfig` make it GPT-J, GPT-NeoX, Llama,
Mistral, Qwen or Gemma. The layers run through `nn.scan`, so that compile time
does not grow with depth and parameters are stacked with a leading `layers`
axis. `deterministic` and `cache` are call arguments: the same blocks train,
score and decode (`decoding.py`).
"""

import functools
import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from instruct_jax.models import attention
from instruct_jax.models.attention import MASKED
from instruct_jax.models.config import Rotary, TransformerConfig
from instruct_jax.models.products import (
  activation_dtype,
  is_bfloat16_on_cpu,
  product,
  rounded,
  rows_first,
)


@flax.struct.dataclass
class LayerCache:
  """One layer's keys and values.

  Column c holds the token at position c, so padding takes no columns, and rows
  may be at different positions.

  Attributes:
    keys: [S, K, W, H], or [S, K, H, W] where `attention.turns_keys`.
    values: [S, K, W, H].
    lengths: number of filled columns in each row.
  """

  keys: Float[Array, 'S K _ _']
  values: Float[Array, 'S K W H']
  lengths: Int[Array, 'S']

  def extended(self, keys, values):
    """Returns the cache with the keys and values of new tokens appended."""

    def put(row, new, length):
      return jax.lax.dynamic_update_slice(row, new, (0, length, 0))

    def put_turned(row, new, length):
      return jax.lax.dynamic_update_slice(row, new.mT, (0, 0, length))

    put_keys = put_turned if attention.turns_keys() else put
    keys = jax.vmap(put_keys)(self.keys, keys, self.lengths)
    values = jax.vmap(put)(self.values, values, self.lengths)
    return self.replace(keys=keys, values=values)


def positions_of(segments: Int[Array, 'B T']) -> Int[Array, 'B T']:
  """Each token's position within its own segment, from 0.

  With a mask as the segments (0 or 1) and padding on either side this equals
  max(cumsum(mask) - 1, 0) on real tokens. Segments are contiguous.
  """
  length = segments.shape[1]
  columns = jnp.arange(length)[None, :]
  previous = jnp.pad(segments, ((0, 0), (1, 0)))[:, :length]
  starts = jnp.where(segments != previous, columns, 0)
  return columns - jax.lax.cummax(starts, axis=1)


def make_param(module, name, init, shape, axes) -> jax.Array:
  """Makes a float32 parameter of a module, with its logical axis names."""
  init = nn.with_logical_partitioning(init, axes)
  return module.param(name, init, shape, jnp.float32)


def _normal(scale: float = 1.0):
  return nn.initializers.normal(0.02 * scale)


def dense(
  x: Float[Array, '*batch inner'],
  kernel: Float[Array, '*dims'],
  bias: Float[Array, '*outer'] | None,
  dtype: str,
  num_in: int = 1,
  kernel_first: bool = False,
) -> Float[Array, '*out']:
  """Contracts the last `num_in` axes of x with the first ones of the kernel.

  Adds the bias, which has the kernel's other axes. It is a single matrix
  product: XLA's CPU backend computes the weight gradient of one with several
  batch axes 2.5 times slower. `kernel_first` makes the kernel the left factor:
  for a few dozen rows twice as fast on CPU, if the kernel's columns are
  contiguous in memory.
  """
  batch, inner = x.shape[: x.ndim - num_in], x.shape[x.ndim - num_in :]
  outer = kernel.shape[num_in:]
  size = math.prod(inner)
  x, kernel = x.reshape(-1, size), kernel.reshape(size, -1)
  if kernel_first:
    y = kernel_on_the_left(x, kernel.T, dtype)
  else:
    y = product('mk,kn->mn', x, kernel, dtype)
  if bias is not None:
    y += bias.reshape(1, -1).astype(y.dtype)
  return y.reshape(*batch, *outer)


def kernel_on_the_left(
  x: Float[Array, 'm k'], kernel: Float[Array, 'n k'], dtype: str, out: str = ''
) -> Float[Array, 'm n']:
  """Computes x kernel^T as (kernel x^T)^T, for inference.

  For a few dozen rows this is twice as fast on CPU. The barriers, or layout
  constraints, keep the compiler from swapping the factors back, and keep the
  transposed rows in the memory order in which the product reads them.
  """
  barrier = jax.lax.optimization_barrier
  hold = rows_first if is_bfloat16_on_cpu(dtype) else barrier
  return hold(product('nk,km->nm', kernel, hold(x.T), dtype, out)).T


class RMSNorm(nn.Module):
  """x / sqrt(mean(x²) + epsilon) in float32, times weight (or 1 + weight)."""

  epsilon: float
  plus_one: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
    scale = make_param(self, 'scale', init, (x.shape[-1],), ('norm',))
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(
      jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon
    )
    scale = scale.reshape((1,) * (x.ndim - 1) + (-1,)) + self.plus_one
    return (x * scale).astype(self.dtype)


def make_norm(config: TransformerConfig, name: str | None = None) -> nn.Module:
  """The norm that the config names."""
  dtype = activation_dtype(config.compute_dtype)
  if config.norm != 'layer':
    plus_one = config.norm == 'rms_plus_one'
    return RMSNorm(config.norm_epsilon, plus_one, dtype, name=name)
  return nn.LayerNorm(
    epsilon=config.norm_epsilon,
    dtype=dtype,
    scale_init=nn.with_logical_partitioning(nn.initializers.ones, ('norm',)),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('norm',)),
    name=name,
  )


ACTIVATIONS = {
  'gelu_tanh': jax.nn.gelu,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'silu': jax.nn.silu,
  'relu': jax.nn.relu,
}


def rotary_tables(
  rotary: Rotary | None, positions: Int[Array, 'B T']
) -> tuple[Float[Array, 'B 1 T half'], Float[Array, 'B 1 T half']] | None:
  """Cosines and sines for `rotate`; None without rotary positions."""
  if rotary is None:
    return None
  frequencies = jnp.asarray(rotary.frequencies(), jnp.float32)
  angles = positions[:, None, :, None].astype(jnp.float32)
  angles = angles * frequencies[None, None, None, :]
  return jnp.cos(angles) * rotary.magnitude, jnp.sin(angles) * rotary.magnitude


def rotate(
  x: Float[Array, 'B N T H'], tables, rotary: Rotary
) -> Float[Array, 'B N T H']:
  """Rotates the first `rotary.dim` components of each head, pair by pair."""
  cos, sin = tables
  head, tail = x[..., : rotary.dim].astype(jnp.float32), x[..., rotary.dim :]
  if rotary.interleaved:
    first, second = head[..., 0::2], head[..., 1::2]
  else:
    first, second = jnp.split(head, 2, axis=-1)
  pair = (first * cos - second * sin, second * cos + first * sin)
  if rotary.interleaved:
    head = jnp.stack(pair, axis=-1).reshape(head.shape)
  else:
    head = jnp.concatenate(pair, axis=-1)
  return jnp.concatenate([head.astype(x.dtype), tail], axis=-1)


def plain_inputs(
  config: TransformerConfig,
  positions: Int[Array, 'B T'],
  key_positions: Int[Array, 'B S'],
  allowed: Bool[Array, 'B T S'],
) -> list[attention.Inputs]:
  """Inputs for layers without a window and, if any, for those with one.

  Args:
    positions: of the queries.
    key_positions: of the keys.
    allowed: which keys each query sees where there is no window.
  """
  tables = rotary_tables(config.rotary, positions)
  inputs = [attention.Inputs(allowed, tables=tables)]
  if any(config.window_layers):
    near = positions[:, :, None] - key_positions[:, None, :] < config.window
    tables = rotary_tables(config.window_rotary or config.rotary, positions)
    inputs.append(attention.Inputs(allowed & near, tables=tables))
  return inputs


class Block(nn.Module):
  """One layer: x + attention(norm(x)), then x + MLP(norm(x)), or in parallel.

  Args of a call:
    x: the residual stream [B, T, D].
    windowed: whether the layer has the window.
    inputs: see `plain_inputs`.
    deterministic: True switches dropout off.
    keeps_keys: also return the tokens' own keys and values.
    cache: `LayerCache` of earlier tokens, to which these are added.

  Returns:
    The stream, and the extended cache, or (keys, values) [B, K, T, H], or None.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(
    self, x, windowed, inputs, deterministic, keeps_keys=False, cache=None
  ):
    config = self.config
    D, N, F = config.width, config.num_heads, config.mlp_dim
    if len(inputs) > 1:
      inputs = [
        jax.tree.map(
          lambda plain, window: jnp.where(windowed, window, plain), *inputs
        )
      ]
    # With one token per row, most of what is read is weights.
    is_step = cache is not None and x.shape[1] == 1
    linear = functools.partial(self._linear, is_step)
    # GPT-2: the 2L projections onto the residual stream start 1/sqrt(2L)
    # smaller, so that the stream's variance does not grow with depth.
    onto_stream = _normal((2 * config.num_layers) ** -0.5)

    def norm(name, x):
      return make_norm(config, name)(x)

    def branch(name, x):
      """What a branch adds to the stream."""
      x = norm(name, x) if config.post_norms else x
      return nn.Dropout(config.dropout)(x, deterministic=deterministic)

    x = nn.with_logical_constraint(x, ('batch', 'length', None))
    h = norm('attention_norm', x)
    mixed, kept = self._mix(h, linear, norm, inputs[0], keeps_keys, cache)
    heads = {'heads': N, 'head_dim': config.head_dim}
    out = linear('out', heads, {'embed': D}, config.out_bias, onto_stream)
    attended = branch('attention_post_norm', out(mixed))
    if config.residual == 'sequential':
      x = x + attended

    up = linear('up', {'embed': D}, {'mlp': F}, config.mlp_bias)
    down = linear(
      'down', {'mlp': F}, {'embed': D}, config.mlp_bias, onto_stream
    )
    activation = ACTIVATIONS[config.activation]
    if config.residual != 'parallel_one_norm':
      h = norm('mlp_norm', x)
    if config.gated_mlp:
      gate = linear('gate', {'embed': D}, {'mlp': F}, config.mlp_bias)
      h = activation(gate(h)) * up(h)
    else:
      h = activation(up(h))
    h = branch('mlp_post_norm', down(h))
    x = x + h if config.residual == 'sequential' else x + attended + h
    return x, kept

  def _mix(self, h, linear, norm, inputs, keeps_keys, cache):
    """Attention before the output projection [B, T, N, H], and what to return.

    That is the extended cache, or (keys, values), or None.
    """
    config = self.config
    kv_axis = 'heads' if config.kv_heads == config.num_heads else 'kv_heads'

    def project(name, num, axis):
      heads = {axis: num, 'head_dim': config.head_dim}
      layer = linear(name, {'embed': config.width}, heads, config.qkv_bias)
      # [B, N, T, H]: batch axes first, as attention's products want them.
      return jnp.swapaxes(layer(h), 1, 2)

    queries = project('query', config.num_heads, 'heads')
    keys = project('key', config.kv_heads, kv_axis)
    values = project('value', config.kv_heads, kv_axis)
    if config.qk_norm:
      queries = norm('query_norm', queries)
      keys = norm('key_norm', keys)
    if config.rotary is not None:
      queries = rotate(queries, inputs.tables, config.rotary)
      keys = rotate(keys, inputs.tables, config.rotary)
    kept = None
    if keeps_keys or cache is not None:
      keys, values = (rounded(x, config.compute_dtype) for x in (keys, values))
    if keeps_keys:
      kept = keys, values
    if cache is not None:
      kept = cache.extended(keys, values)
      keys, values = kept.keys, kept.values
    mixed = attention.mix(config, queries, keys, values, inputs)
    return jnp.swapaxes(mixed, 1, 2), kept

  def _linear(self, is_step, name, inputs, outputs, has_bias, init=None):
    """Returns h -> h W + b, plus (alpha / r) (h A) B if `name` has an adapter.

    Inputs and outputs are sizes by axis name.
    """
    lora = self.config.lora
    num_in, shape = len(inputs), (*inputs.values(), *outputs.values())
    project = functools.partial(
      dense, dtype=self.config.compute_dtype, kernel_first=is_step
    )

    def param(suffix, init, shape, axes):
      name_of = f'{name}_{suffix}'
      return make_param(self, name_of, init, shape, axes)

    kernel = param('kernel', init or _normal(), shape, (*inputs, *outputs))
    bias = None
    if has_bias:
      axes = ('norm',) if 'embed' in outputs else tuple(outputs)
      bias = param('bias', nn.initializers.zeros, shape[num_in:], axes)
    if not self._has_adapter(name):
      return lambda h: project(h, kernel, bias, num_in=num_in)
    # Hu et al. 2021, 4.1: A is Gaussian and B is 0. Their code draws A
    # uniformly, with this variance.
    gaussian = nn.initializers.normal((3 * math.prod(inputs.values())) ** -0.5)
    factor_a = param(
      'lora_a', gaussian, (*inputs.values(), lora.rank), (*inputs, 'rank')
    )
    factor_b = param(
      'lora_b',
      nn.initializers.zeros,
      (lora.rank, *outputs.values()),
      ('rank', *outputs),
    )

    def adapted(h):
      low = lora.scale * project(h, factor_a, None, num_in=num_in)
      y = project(h, kernel, bias, num_in=num_in)
      return y + project(low, factor_b, None)

    return adapted

  def _has_adapter(self, name):
    """Whether the parameters have adapters for the matrix `name`.

    Frozen bases and merged weights have none, whatever the config says.
    """
    lora, leaf = self.config.lora, f'{name}_lora_a'
    has_leaf = self.has_variable('params', leaf)
    if lora is None or (lora.targets and name not in lora.targets):
      if has_leaf:
        raise ValueError(
          f'the parameters have {leaf}, but the config has no such adapter'
        )
      return False
    return has_leaf or self.is_initializing()


def _remat(block, policy: str):
  if policy == 'none':
    return block
  policies = {
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'full': jax.checkpoint_policies.nothing_saveable,
  }
  # `deterministic` and `keeps_keys` (`self` is argument 0) are Python bools.
  return nn.remat(
    block, policy=policies[policy], prevent_cse=False, static_argnums=(4, 5)
  )


class Transformer(nn.Module):
  """Tokens to final hidden states; the trunk of every model here.

  Scalar models have no unembedding (`unembeds` False).
  """

  config: TransformerConfig
  unembeds: bool = True

  def setup(self):
    config = self.config
    rows, normal = config.vocab_rows, nn.initializers.normal
    param = functools.partial(make_param, self)
    embedding = (rows, config.width), ('vocab', 'embed')
    self.token_embedding = param('token_embedding', normal(0.02), *embedding)
    if config.rotary is None:
      self.position_embedding = param(
        'position_embedding',
        normal(0.01),
        (config.context_length, config.width),
        ('length', 'embed'),
      )
    if self.unembeds and not config.tied:
      self.unembedding = param('unembedding', normal(0.02), *embedding)
    if self.unembeds and config.unembed_bias:
      self.unembedding_bias = param(
        'unembedding_bias', nn.initializers.zeros, (rows,), ('vocab',)
      )
    layers = nn.scan(
      _remat(Block, config.remat),
      variable_axes={'params': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=config.num_layers,
      unroll=config.scan_unroll,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    self.layers = layers(config)
    self.final_norm = make_norm(config)
    self.embedding_dropout = nn.Dropout(config.dropout)

  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    segments: Int[Array, 'B T'],
    *,
    deterministic: bool = True,
    longest: int = 0,
    keeps_keys: bool = False,
  ) -> tuple[Float[Array, 'B T D'], tuple[jax.Array, jax.Array] | None]:
    """Hidden states after the final norm.

    Args:
      tokens: ids; any value on padding.
      segments: 0 on padding, 1.. on real tokens (a mask will do). Tokens
        attend to earlier tokens of their own segment only.
      deterministic: True switches dropout off.
      longest: tokens in the longest segment, if rows may be much longer: the
        cost of attention then grows with segments, not rows. 0 is unknown.
      keeps_keys: also return keys and values of all layers [L, B, K, T, H].

    Raises:
      ValueError: segments may be longer than the context length.
    """
    config, num_tokens = self.config, tokens.shape[1]
    if (longest or num_tokens) > config.context_length:
      raise ValueError(
        f'{longest or num_tokens} tokens in a context of '
        f'{config.context_length}'
      )
    positions = positions_of(segments)
    positions = jnp.clip(positions, 0, config.context_length - 1)
    x = self.embedding_dropout(
      self.embed(tokens, positions), deterministic=deterministic
    )
    inputs = self._inputs(segments, positions, longest)
    windowed = jnp.asarray(config.is_windowed, bool)
    x, kept = self.layers(x, windowed, inputs, deterministic, keeps_keys)
    return self.final_norm(x), kept

  def _inputs(self, segments, positions, longest):
    """Attention's inputs for whole rows."""
    config, num_tokens = self.config, segments.shape[1]
    kernel = attention.choose(config, *segments.shape)
    if kernel is not None:
      tables = rotary_tables(config.rotary, positions)
      return [attention.Inputs(None, segments, tables, kernel)]
    block = attention.block_size(num_tokens, longest)
    if block and not any(config.window_layers):
      allowed = attention.allowed_in_blocks(segments, longest, block)
      tables = rotary_tables(config.rotary, positions)
      return [attention.Inputs(allowed, tables=tables, kernel='blocks')]
    columns = jnp.arange(num_tokens)
    allowed = segments[:, :, None] == segments[:, None, :]
    allowed &= (columns[:, None] >= columns[None, :])[None]
    allowed &= (segments > 0)[:, None, :]
    return plain_inputs(config, positions, positions, allowed)

  def embed(
    self, tokens: Int[Array, 'B T'], positions: Int[Array, 'B T']
  ) -> Float[Array, 'B T D']:
    """Input of the first layer; positions count from 0."""
    config = self.config
    # Whole rows of the table: if rows were split, lookups would have to be
    # gathered from all devices before the parts could be joined.
    table = nn.with_logical_constraint(self.token_embedding, ('vocab', None))
    x = table[tokens]
    if config.embedding_scale != 1.0:
      x = x * config.embedding_scale
    if config.rotary is None:
      x = x + self.position_embedding[positions]
    return x.astype(activation_dtype(config.compute_dtype))

  def unembed(
    self, hidden: Float[Array, '*b D'], kernel_first: bool = False
  ) -> Float[Array, '*b V']:
    """Float32 logits over the embedding rows; unused rows get `MASKED`.

    `kernel_first` is faster for few rows, as in `dense`.
    """
    config = self.config
    rows, dtype = hidden.reshape(-1, config.width), config.compute_dtype
    embedding = self.token_embedding if config.tied else self.unembedding
    if kernel_first:
      logits = kernel_on_the_left(rows, embedding, dtype, 'float32')
    else:
      logits = product('md,vd->mv', rows, embedding, dtype, 'float32')
    logits = logits.reshape(*hidden.shape[:-1], config.vocab_rows)
    if config.unembed_bias:
      logits += self.unembedding_bias[(None,) * (logits.ndim - 1)]
    logits = attention.softcap(logits, config.logit_softcap)
    if config.vocab_rows > config.vocab_size:
      unused = jnp.arange(config.vocab_rows) >= config.vocab_size
      logits = jnp.where(unused[(None,) * (logits.ndim - 1)], MASKED, logits)
    return logits
