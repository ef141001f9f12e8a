"""A decoder-only Transformer as one pure Linen module.

GPT-3's by default: pre-layer-norm blocks, learned positions, GELU, tied
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
from instruct_jax.models.config import Rotary, TransformerConfig

# Finite, so that a row that masks everything gives uniform weights and not NaN.
MASKED = -1e9


@flax.struct.dataclass
class LayerCache:
  """One layer's keys and values, each row filled as far as it goes.

  Column c holds the token in position c, so that a row's padding costs nothing
  and rows need no common clock.

  Attributes:
    keys, values: in the compute dtype.
    lengths: columns filled in each row.
  """

  keys: Float[Array, 'S K W H']
  values: Float[Array, 'S K W H']
  lengths: Int[Array, 'S']

  def extended(self, keys, values):
    """With the tokens' own keys and values, and what they may look at."""

    def put(row, new, length):
      return jax.lax.dynamic_update_slice(row, new, (0, length, 0))

    keys = jax.vmap(put)(self.keys, keys, self.lengths)
    values = jax.vmap(put)(self.values, values, self.lengths)
    return self.replace(keys=keys, values=values), keys, values


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
  bias: Float[Array, '*outer'] | None,
  num_in: int = 1,
  kernel_first: bool = False,
) -> Float[Array, '*out']:
  """Contracts the last `num_in` axes of x with the first of the kernel, and
  adds the bias, if there is one, which has the shape of the rest.

  As one matrix product: XLA's CPU backend computes the weight gradient of a
  product with several batch axes 2.5 times slower than this. With
  `kernel_first` the kernel is the left factor: for a few dozen rows twice as
  fast there, provided that its columns lie in memory one behind the other.
  """
  batch, inner = x.shape[: x.ndim - num_in], x.shape[x.ndim - num_in :]
  outer = kernel.shape[num_in:]
  size = math.prod(inner)
  x, kernel = x.reshape(-1, size), kernel.reshape(size, -1)
  if kernel_first:
    # The barriers keep the compiler from exchanging the factors again, and the
    # rows, as columns, in the order in which the product reads them.
    columns = jax.lax.optimization_barrier(x.T)
    product = jax.lax.optimization_barrier(kernel.T @ columns).T
  else:
    product = x @ kernel
  if bias is not None:
    product += bias.reshape(1, -1)
  return product.reshape(*batch, *outer)


class RMSNorm(nn.Module):
  """x / sqrt(mean(x²) + epsilon) in float32, times weight (or 1 + weight)."""

  epsilon: float
  plus_one: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
    scale = self.param(
      'scale',
      nn.with_logical_partitioning(init, ('norm',)),
      (x.shape[-1],),
      jnp.float32,
    )
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(
      jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon
    )
    scale = scale.reshape((1,) * (x.ndim - 1) + (-1,)) + self.plus_one
    return (x * scale).astype(self.dtype)


def make_norm(config: TransformerConfig, name: str | None = None) -> nn.Module:
  """The kind of norm that the config names."""
  dtype = jnp.dtype(config.compute_dtype)
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
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'silu': jax.nn.silu,
  'relu': jax.nn.relu,
}


def rotary_tables(
  rotary: Rotary, positions: Int[Array, 'B T']
) -> tuple[Float[Array, 'B 1 T half'], Float[Array, 'B 1 T half']]:
  """Cosines and sines by which `rotate` turns the heads of each token."""
  frequencies = jnp.asarray(rotary.frequencies(), jnp.float32)
  angles = positions[:, None, :, None].astype(jnp.float32)
  angles = angles * frequencies[None, None, None, :]
  return jnp.cos(angles) * rotary.magnitude, jnp.sin(angles) * rotary.magnitude


def rotate(
  x: Float[Array, 'B N T H'], tables, rotary: Rotary
) -> Float[Array, 'B N T H']:
  """Turns the first `rotary.dim` components of each head, pair by pair."""
  cos, sin = tables
  turned, rest = x[..., : rotary.dim].astype(jnp.float32), x[..., rotary.dim :]
  if rotary.interleaved:
    first, second = turned[..., 0::2], turned[..., 1::2]
  else:
    first, second = jnp.split(turned, 2, axis=-1)
  pair = (first * cos - second * sin, second * cos + first * sin)
  if rotary.interleaved:
    turned = jnp.stack(pair, axis=-1).reshape(turned.shape)
  else:
    turned = jnp.concatenate(pair, axis=-1)
  return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def softcap(x: jax.Array, cap: float) -> jax.Array:
  """cap tanh(x / cap), which never leaves (-cap, cap); 0 leaves x alone."""
  return cap * jnp.tanh(x / cap) if cap else x


@flax.struct.dataclass
class Sight:
  """What all layers of one kind share: which slots are seen, and positions.

  A flash kernel reads the segments; plain attention reads `allowed`.
  """

  allowed: Bool[Array, 'B T S'] | None
  segments: Int[Array, 'B T'] | None
  tables: tuple[jax.Array, jax.Array] | None
  kernel: str | None = flax.struct.field(pytree_node=False, default=None)
  # Tokens of a block, where attention reaches over a few blocks only.
  block: int = flax.struct.field(pytree_node=False, default=0)


def make_sights(
  config: TransformerConfig,
  positions: Int[Array, 'B T'],
  slot_positions: Int[Array, 'B S'],
  allowed: Bool[Array, 'B T S'],
  segments: Int[Array, 'B T'] | None,
  kernel: str | None,
) -> list[Sight]:
  """The `Sight` of plain layers and, where there are any, of windowed ones.

  Args:
    config: of the model.
    positions: of the tokens that look.
    slot_positions: of the tokens that may be looked at.
    allowed: which of them, windows apart.
    segments: of the tokens; read by a flash kernel only.
    kernel: a flash kernel's name, or None for plain attention.
  """

  def tables(rotary):
    return None if rotary is None else rotary_tables(rotary, positions)

  if kernel is not None:
    return [Sight(None, segments, tables(config.rotary), kernel)]
  sights = [Sight(allowed, None, tables(config.rotary))]
  if any(config.window_layers):
    near = positions[:, :, None] - slot_positions[:, None, :] < config.window
    rotary = config.window_rotary or config.rotary
    sights.append(Sight(allowed & near, None, tables(rotary)))
  return sights


class Block(nn.Module):
  """One layer: x + attention(norm(x)), then x + MLP(norm(x)), or in parallel.

  Args of a call:
    x: the residual stream [B, T, D].
    windowed: whether the layer has the window.
    sights: the `Sight` of plain layers and, where the model has windows, that
      of windowed ones.
    deterministic: True switches dropout off.
    keeps_keys: return the tokens' own keys and values, too.
    cache: keys and values of earlier tokens, to which these are added.

  Returns:
    The stream, and: the cache; or (keys, values) [B, K, T, H]; or None.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(
    self, x, windowed, sights, deterministic, keeps_keys=False, cache=None
  ):
    config = self.config
    dtype = jnp.dtype(config.compute_dtype)
    sight = sights[0]
    if len(sights) > 1:
      sight = jax.tree.map(
        lambda plain, window: jnp.where(windowed, window, plain), *sights
      )
    # GPT-2: the 2L projections onto the residual stream start 1/sqrt(2L)
    # smaller, so that the stream's variance does not grow with depth.
    residual_scale = (2 * config.num_layers) ** -0.5

    def param(name, init, shape, axes):
      return self.param(
        name, nn.with_logical_partitioning(init, axes), shape, jnp.float32
      ).astype(dtype)

    def norm(name, x):
      return make_norm(config, name)(x)

    def post_norm(name, x):
      return norm(name, x) if config.post_norms else x

    def drop(x):
      return nn.Dropout(config.dropout)(x, deterministic=deterministic)

    D, N, K = config.width, config.num_heads, config.kv_heads
    H, F = config.head_dim, config.mlp_dim

    # One token a row: weights are most of what is read.
    is_step = cache is not None and x.shape[1] == 1
    project = functools.partial(dense, kernel_first=is_step)

    def linear(name, inputs, outputs, has_bias, init=None):
      """h -> h W + b, and (alpha / r) (h A) B where `name` has an adapter.

      Inputs and outputs are sizes by axis name.
      """
      num_in, shape = len(inputs), (*inputs.values(), *outputs.values())
      kernel = param(
        f'{name}_kernel', init or _normal(), shape, (*inputs, *outputs)
      )
      bias = None
      if has_bias:
        axes = ('norm',) if 'embed' in outputs else tuple(outputs)
        bias = param(
          f'{name}_bias', nn.initializers.zeros, shape[num_in:], axes
        )
      # The frozen base and merged weights come without adapters.
      if not self._has_adapter(name):
        return lambda h: project(h, kernel, bias, num_in)
      # Hu et al. 2021, 4.1: A is Gaussian and B is 0. Their code draws A
      # uniformly, with this variance.
      std = (3 * math.prod(inputs.values())) ** -0.5
      rank = config.lora.rank
      factor_a = param(
        f'{name}_lora_a',
        nn.initializers.normal(std),
        (*inputs.values(), rank),
        (*inputs, 'rank'),
      )
      factor_b = param(
        f'{name}_lora_b',
        nn.initializers.zeros,
        (rank, *outputs.values()),
        ('rank', *outputs),
      )

      def adapted(h):
        low = config.lora.scale * project(h, factor_a, None, num_in)
        return project(h, kernel, bias, num_in) + project(low, factor_b, None)

      return adapted

    def project_heads(name, h, num, axis):
      heads = {axis: num, 'head_dim': H}
      # [B, N, T, H]: batch axes first, as the products below want them.
      return jnp.swapaxes(
        linear(name, {'embed': D}, heads, config.qkv_bias)(h), 1, 2
      )

    x = nn.with_logical_constraint(x, ('batch', 'length', None))
    h = norm('attention_norm', x)
    queries = project_heads('query', h, N, 'heads')
    kv_axis = 'heads' if K == N else 'kv_heads'
    keys = project_heads('key', h, K, kv_axis)
    values = project_heads('value', h, K, kv_axis)
    if config.qk_norm:
      queries = norm('query_norm', queries)
      keys = norm('key_norm', keys)
    if config.rotary is not None:
      queries = rotate(queries, sight.tables, config.rotary)
      keys = rotate(keys, sight.tables, config.rotary)
    kept = (keys, values) if keeps_keys else None
    if cache is not None:
      kept, keys, values = cache.extended(keys, values)
    if sight.kernel is not None:
      mixed = attention.flash(
        config, sight.kernel, queries, keys, values, sight.segments
      )
    elif sight.block:
      mixed = attention.in_blocks(
        functools.partial(attend, config),
        queries,
        keys,
        values,
        sight.allowed,
        sight.block,
      )
    else:
      mixed = attend(config, queries, keys, values, sight.allowed)
    mixed = jnp.swapaxes(mixed, 1, 2)
    out = linear(
      'out',
      {'heads': N, 'head_dim': H},
      {'embed': D},
      config.out_bias,
      _normal(residual_scale),
    )
    attended = out(mixed)
    attended = drop(post_norm('attention_post_norm', attended))
    if config.residual == 'sequential':
      x = x + attended

    up = linear('up', {'embed': D}, {'mlp': F}, config.mlp_bias)
    down = linear(
      'down',
      {'mlp': F},
      {'embed': D},
      config.mlp_bias,
      _normal(residual_scale),
    )
    activation = ACTIVATIONS[config.activation]
    if config.residual != 'parallel_one_norm':
      h = norm('mlp_norm', x)
    if config.gated_mlp:
      gate = linear('gate', {'embed': D}, {'mlp': F}, config.mlp_bias)
      h = activation(gate(h)) * up(h)
    else:
      h = activation(up(h))
    h = drop(post_norm('mlp_post_norm', down(h)))
    x = x + h if config.residual == 'sequential' else x + attended + h
    return x, kept

  def _has_adapter(self, name):
    lora, found = self.config.lora, f'{name}_lora_a'
    is_there = self.has_variable('params', found)
    if lora is None or (lora.targets and name not in lora.targets):
      if is_there:
        raise ValueError(f'{found} is there, and the config has no adapter')
      return False
    return is_there or self.is_initializing()


def attend(
  config: TransformerConfig,
  queries: Float[Array, 'B N T H'],
  keys: Float[Array, 'B K S H'],
  values: Float[Array, 'B K S H'],
  allowed: Bool[Array, 'B T S'],
) -> Float[Array, 'B N T H']:
  """Softmax attention; query head n reads key head n // (N / K)."""
  scale = config.query_scale or config.head_dim**-0.5
  shape, num_groups = queries.shape, queries.shape[1] // keys.shape[1]
  if num_groups > 1:
    # The queries of a group as more rows of one product.
    B, N, T, H = shape
    queries = queries.reshape(B, N // num_groups, num_groups * T, H)
    allowed = jnp.tile(allowed, (1, num_groups, 1))
  scores = jnp.einsum('bnth,bnsh->bnts', queries, keys) * scale
  scores = scores.astype(jnp.float32)
  scores = softcap(scores, config.attention_softcap)
  scores = jnp.where(allowed[:, None, :, :], scores, MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  return jnp.einsum('bnts,bnsh->bnth', weights, values).reshape(shape)


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

  Without `unembeds` it has no unembedding of its own (scalar models).
  """

  config: TransformerConfig
  unembeds: bool = True

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
    if config.rotary is None:
      self.position_embedding = self.param(
        'position_embedding',
        nn.with_logical_partitioning(
          nn.initializers.normal(0.01), ('length', 'embed')
        ),
        (config.context_length, config.width),
        jnp.float32,
      )
    if self.unembeds and not config.tied:
      self.unembedding = self.param(
        'unembedding',
        nn.with_logical_partitioning(
          nn.initializers.normal(0.02), ('vocab', 'embed')
        ),
        (config.vocab_rows, config.width),
        jnp.float32,
      )
    if self.unembeds and config.unembed_bias:
      self.unembedding_bias = self.param(
        'unembedding_bias',
        nn.with_logical_partitioning(nn.initializers.zeros, ('vocab',)),
        (config.vocab_rows,),
        jnp.float32,
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
      tokens: ids; any value where padded.
      segments: 0 on padding, 1.. on real tokens (a mask is a fine one).
        Tokens attend to earlier tokens of their own segment only.
      deterministic: True switches dropout off.
      longest: tokens of the longest segment, when rows may be much longer:
        attention then costs what segments cost, and not what rows do. 0: a
        segment may be as long as a row.
      keeps_keys: return keys and values of all layers [L, B, K, T, H], too.

    Raises:
      ValueError: segments that may be longer than the context length.
    """
    config = self.config
    num_tokens = tokens.shape[1]
    if (longest or num_tokens) > config.context_length:
      raise ValueError(
        f'{longest or num_tokens} tokens in a context of '
        f'{config.context_length}'
      )
    positions = positions_of(segments)
    columns = jnp.arange(num_tokens)
    allowed = segments[:, :, None] == segments[:, None, :]
    allowed &= (columns[:, None] >= columns[None, :])[None]
    allowed &= (segments > 0)[:, None, :]
    positions = jnp.clip(positions, 0, config.context_length - 1)
    x = self.embedding_dropout(
      self.embed(tokens, positions), deterministic=deterministic
    )
    kernel = attention.choose(config, tokens.shape[0], num_tokens)
    windowed = config.window_layers or (False,) * config.num_layers
    block = 0
    if kernel is None and not any(windowed):
      block = attention.block_size(num_tokens, longest)
    if block:
      allowed = attention.allowed_in_blocks(segments, longest, block)
      tables = None
      if config.rotary is not None:
        tables = rotary_tables(config.rotary, positions)
      sights = [Sight(allowed, None, tables, block=block)]
    else:
      sights = make_sights(
        config, positions, positions, allowed, segments, kernel
      )
    x, kept = self.layers(
      x,
      jnp.asarray(windowed, bool),
      sights,
      deterministic,
      keeps_keys,
    )
    return self.final_norm(x), kept

  def embed(
    self, tokens: Int[Array, 'B T'], positions: Int[Array, 'B T']
  ) -> Float[Array, 'B T D']:
    """What the first layer reads; positions count from 0."""
    config = self.config
    # Whole rows of the table: looked up in pieces of rows, they would have to
    # be gathered for the rows of all devices before they can be put together.
    table = nn.with_logical_constraint(self.token_embedding, ('vocab', None))
    x = table[tokens]
    if config.embedding_scale != 1.0:
      x = x * config.embedding_scale
    if config.rotary is None:
      x = x + self.position_embedding[positions]
    return x.astype(config.compute_dtype)

  def logits(
    self, x: Float[Array, '*b D'], kernel_first: bool
  ) -> Float[Array, '*b V']:
    """`unembed` of what the last layer wrote."""
    return self.unembed(self.final_norm(x), kernel_first)

  def unembed(
    self, hidden: Float[Array, '*b D'], kernel_first: bool = False
  ) -> Float[Array, '*b V']:
    """Float32 logits over the embedding rows; unused rows get `MASKED`.

    `kernel_first` is faster for few rows, as in `dense`.
    """
    config = self.config
    rows = hidden.reshape(-1, config.width)
    embedding = self.token_embedding if config.tied else self.unembedding
    embedding = embedding.astype(hidden.dtype)
    if kernel_first:
      logits = jax.lax.optimization_barrier(
        jnp.matmul(embedding, rows.T, preferred_element_type=jnp.float32)
      ).T
    else:
      logits = jnp.einsum(
        'md,vd->mv', rows, embedding, preferred_element_type=jnp.float32
      )
    logits = logits.reshape(*hidden.shape[:-1], config.vocab_rows)
    if config.unembed_bias:
      logits += self.unembedding_bias[(None,) * (logits.ndim - 1)]
    logits = softcap(logits, config.logit_softcap)
    if config.vocab_rows > config.vocab_size:
      unused = jnp.arange(config.vocab_rows) >= config.vocab_size
      logits = jnp.where(unused[(None,) * (logits.ndim - 1)], MASKED, logits)
    return logits
