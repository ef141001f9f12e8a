"""Attention: plain, in blocks for short segments, or by a flash kernel.

TPU: splash attention (Pallas), one kernel per shard of the mesh under
`jax.shard_map`. It reads segment numbers and holds no [T, T] array in memory.
NVIDIA GPU from Hopper on: cuDNN's, which reads where segments begin
(`cudnn.py`). Before Hopper, cuDNN takes segments as a mask, which jax turns
into a bfloat16 bias [B, 1, T, T] on each call, 2 B T² bytes. All agree with
`attend` up to rounding on real tokens; on padding their values are meaningless.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as splash_mask,
)
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from instruct_jax.models import cudnn
from instruct_jax.models.config import TransformerConfig
from instruct_jax.models.products import (
  platform,
  product,
  product_with_rounded,
)

# Finite, so that a fully masked row gives uniform weights and not NaN.
MASKED = -1e9
# Tokens of the kernels' smallest tile; shorter rows never use them.
TILE = 128


@flax.struct.dataclass
class Inputs:
  """What attention reads besides queries, keys and values.

  Attributes:
    allowed: which keys each query sees; None for a flash kernel.
    segments: read by a flash kernel only.
    tables: from `transformer.rotary_tables`; None without rotary positions.
    kernel: 'plain', 'cache' (keys and values in the layout of a cache),
      'blocks' (`allowed` from `allowed_in_blocks`), 'splash' or 'cudnn'.
  """

  allowed: Bool[Array, 'b t s'] | None = None
  segments: Int[Array, 'B T'] | None = None
  tables: tuple[jax.Array, jax.Array] | None = None
  kernel: str = flax.struct.field(pytree_node=False, default='plain')


def mix(
  config: TransformerConfig,
  queries: Float[Array, 'B N T H'],
  keys: Float[Array, 'B K _ _'],
  values: Float[Array, 'B K S H'],
  inputs: Inputs,
) -> Float[Array, 'B N T H']:
  """The attention output of each query, by the kernel of `inputs`."""
  if inputs.kernel in ('plain', 'cache'):
    turned = inputs.kernel == 'cache' and turns_keys()
    return attend(config, queries, keys, values, inputs.allowed, turned)
  if inputs.kernel == 'blocks':
    return _in_blocks(config, queries, keys, values, inputs.allowed)
  return flash(config, inputs.kernel, queries, keys, values, inputs.segments)


def turns_keys() -> bool:
  """Whether a cache has its keys as [S, K, H, W], not [S, K, W, H].

  A CPU reads this layout faster for a few queries, most of all where several
  query heads share a key head.
  """
  return platform() == 'cpu'


def softcap(x: jax.Array, cap: float) -> jax.Array:
  """cap tanh(x / cap), which stays within (-cap, cap); 0 leaves x alone."""
  return cap * jnp.tanh(x / cap) if cap else x


def attend(
  config: TransformerConfig,
  queries: Float[Array, 'B N T H'],
  keys: Float[Array, 'B K _ _'],
  values: Float[Array, 'B K S H'],
  allowed: Bool[Array, 'B T S'],
  turned: bool = False,
) -> Float[Array, 'B N T H']:
  """Softmax attention; query head n reads key head n // (N / K).

  With one query per row, keys and values come from a cache, whose numbers are
  `rounded`. With `turned`, keys are [B, K, H, S].
  """
  multiply = product_with_rounded if queries.shape[2] == 1 else product
  shape, num_groups = queries.shape, queries.shape[1] // keys.shape[1]
  if num_groups > 1:
    # The queries of a group become more rows of one product.
    B, N, T, H = shape
    queries = queries.reshape(B, N // num_groups, num_groups * T, H)
    allowed = jnp.tile(allowed, (1, num_groups, 1))
  spec = 'bnth,bnhs->bnts' if turned else 'bnth,bnsh->bnts'
  scores = multiply(spec, queries, keys, config.compute_dtype)
  scores = scores.astype(jnp.float32) * config.score_scale
  scores = softcap(scores, config.attention_softcap)
  scores = jnp.where(allowed[:, None, :, :], scores, MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  mixed = multiply('bnts,bnsh->bnth', weights, values, config.compute_dtype)
  return mixed.reshape(shape)


# --- Flash kernels ------------------------------------------------------------


def choose(
  config: TransformerConfig, batch: int, num_tokens: int
) -> str | None:
  """Returns the flash kernel for these rows: 'splash', 'cudnn', or None.

  Depends on `config.attention`, on the platform of the current mesh (which may
  be an abstract one, for ahead-of-time compilation) and on what the kernels
  support.

  Raises:
    ValueError: `attention` is 'flash', and the kernel cannot take these rows
      although they have at least 128 tokens; names the reason.
  """
  if config.attention == 'xla' or num_tokens < TILE:
    return None
  is_gpu = platform() in ('gpu', 'cuda')
  problem = _problem(config, batch, num_tokens, is_gpu)
  if config.attention == 'flash':
    if problem:
      raise ValueError(f"model.attention = 'flash': {problem}; use 'auto'")
  # On CPU the TPU kernel is interpreted: slow, for tests only.
  elif problem or not (is_gpu or platform() == 'tpu'):
    return None
  return 'cudnn' if is_gpu else 'splash'


def _problem(config, batch, num_tokens, is_gpu) -> str | None:
  """Why the platform's kernel cannot take these rows; None where it can."""
  mesh = jax.sharding.get_abstract_mesh().shape
  num_shards = mesh.get('data', 1) * mesh.get('fsdp', 1)
  window = any(config.window_layers) and (
    config.window < num_tokens or config.window_rotary is not None
  )
  problems = [
    (
      window,
      f'layers with a window of {config.window} tokens, or other rotaries',
    )
  ]
  if is_gpu:
    most = 256 if cudnn.is_hopper() else 128
    problems += [
      (config.attention_softcap, 'cuDNN has no soft-cap'),
      (
        config.compute_dtype != 'bfloat16',
        f'cuDNN computes in bfloat16, not {config.compute_dtype}',
      ),
      (
        config.head_dim % 8 or config.head_dim > most,
        f'cuDNN wants heads of 8 to {most} components: {config.head_dim}',
      ),
    ]
  else:
    problems += [
      (num_tokens % TILE, f'{num_tokens} tokens are not a multiple of {TILE}'),
      (
        config.head_dim % 64,
        f'heads of {config.head_dim} components are not a multiple of 64',
      ),
      (
        batch % num_shards or config.kv_heads % mesh.get('tensor', 1),
        f'{batch} rows and {config.kv_heads} key heads do not divide over the '
        f'mesh {dict(mesh)}',
      ),
    ]
  return next((text for is_problem, text in problems if is_problem), None)


def flash(
  config: TransformerConfig,
  kernel: str,
  queries: Float[Array, 'B N T H'],
  keys: Float[Array, 'B K T H'],
  values: Float[Array, 'B K T H'],
  segments: Int[Array, 'B T'],
) -> Float[Array, 'B N T H']:
  """Causal attention within segments; query head n reads head n // (N / K).

  Padding (segment 0) attends to padding, so that every row of the softmax has
  an entry; no real token sees it.
  """
  num_tokens = segments.shape[1]
  if kernel == 'cudnn' and num_tokens % 2:
    # cuDNN has gradients for even lengths only: one column of padding more.
    column = ((0, 0), (0, 0), (0, 1), (0, 0))
    longer = (jnp.pad(x, column) for x in (queries, keys, values))
    segments = jnp.pad(segments, ((0, 0), (0, 1)))
    mixed = flash(config, kernel, *longer, segments)
    return mixed[:, :, :num_tokens]
  if kernel == 'cudnn' and cudnn.is_hopper():
    return cudnn.attend(queries, keys, values, segments, config.score_scale)
  if kernel == 'cudnn':
    allowed = segments[:, None, :, None] == segments[:, None, None, :]
    mixed = jax.nn.dot_product_attention(
      *(jnp.swapaxes(x, 1, 2) for x in (queries, keys, values)),
      mask=allowed,
      scale=config.score_scale,
      is_causal=True,
      implementation='cudnn',
    )
    return jnp.swapaxes(mixed, 1, 2)
  one_shard = functools.partial(
    _splash, softcap=config.attention_softcap, interpret=platform() == 'cpu'
  )
  if jax.sharding.get_abstract_mesh().shape:
    heads = P(('data', 'fsdp'), 'tensor')
    one_shard = jax.shard_map(
      one_shard,
      in_specs=(heads, heads, heads, P(('data', 'fsdp'))),
      out_specs=heads,
      check_vma=False,
    )
  return one_shard(queries * config.score_scale, keys, values, segments)


def _splash(queries, keys, values, segments, *, softcap, interpret):
  num_heads, num_tokens = queries.shape[1:3]
  block = next(size for size in (512, 256, 128) if num_tokens % size == 0)
  sizes = 'block_q block_kv block_q_dkv block_kv_dkv block_q_dq block_kv_dq'
  causal = splash_mask.CausalMask((num_tokens, num_tokens))
  kernel = splash_kernel.make_splash_mha(
    splash_mask.MultiHeadMask([causal] * num_heads),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=softcap or None,
    interpret=interpret,
    block_sizes=splash_kernel.BlockSizes(**dict.fromkeys(sizes.split(), block)),
  )

  def one_row(queries, keys, values, segments):
    ids = splash_kernel.SegmentIds(q=segments, kv=segments)
    return kernel(queries, keys, values, segment_ids=ids)

  return jax.vmap(one_row)(queries, keys, values, segments)


# --- Segments much shorter than their rows ------------------------------------


def block_size(num_tokens: int, longest: int) -> int:
  """Tokens in a block; 0 where whole rows cost no more.

  A block is half of the longest segment: each token then attends to its own
  block and the two before, at most one and a half times what it needs.
  """
  block = -(-longest // 2)
  return block if longest and num_tokens > 3 * block else 0


def _blocks(x: Array, block: int, num_before: int) -> Array:
  """Cuts rows into blocks, each joined to the `num_before` blocks before it.

  [B, T, ...] becomes [B * blocks, (num_before + 1) * block, ...], with zeros
  where there are no blocks before.
  """
  num_blocks = -(-x.shape[1] // block)
  filler = num_blocks * block - x.shape[1]
  padding = [(0, 0), (num_before * block, filler), *[(0, 0)] * (x.ndim - 2)]
  x = jnp.pad(x, padding)
  x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
  parts = [x[:, i : i + num_blocks] for i in range(num_before + 1)]
  x = jnp.concatenate(parts, axis=2)
  return x.reshape(-1, *x.shape[2:])


def allowed_in_blocks(
  segments: Int[Array, 'B T'], longest: int, block: int
) -> Bool[Array, 'b t s']:
  """Which keys of its own and the earlier blocks each query sees."""
  # The first token of a block sees longest - 1 tokens before itself.
  num_before = -(-(longest - 1) // block)
  queries = _blocks(segments, block, 0)
  keys = _blocks(segments, block, num_before)
  rows = num_before * block + jnp.arange(block)
  columns = jnp.arange((num_before + 1) * block)
  allowed = queries[:, :, None] == keys[:, None, :]
  allowed &= (rows[:, None] >= columns[None, :])[None]
  return allowed & (keys > 0)[:, None, :]


def _in_blocks(config, queries, keys, values, allowed):
  """`attend` of whole rows, block by block; see `allowed_in_blocks`."""
  num_rows, num_tokens = queries.shape[0], queries.shape[2]
  block = allowed.shape[1]
  num_before = allowed.shape[2] // block - 1

  def cut(x, num_before):
    x = _blocks(jnp.swapaxes(x, 1, 2), block, num_before)
    return jnp.swapaxes(x, 1, 2)

  mixed = attend(
    config,
    cut(queries, 0),
    cut(keys, num_before),
    cut(values, num_before),
    allowed,
  )
  mixed = jnp.swapaxes(mixed, 1, 2)
  mixed = mixed.reshape(num_rows, -1, *mixed.shape[2:])[:, :num_tokens]
  return jnp.swapaxes(mixed, 1, 2)
