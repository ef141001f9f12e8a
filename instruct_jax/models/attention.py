"""Attention by the platform's flash kernel, where it has one.

TPU: splash attention (Pallas), one kernel a shard of the mesh under
`jax.shard_map`. It reads the segment numbers and holds no [T, T] array in
memory. NVIDIA GPU: cuDNN's, through `jax.nn.dot_product_attention`, which holds
no scores either, but takes the segments as a mask: jax makes of it a bias
[B, 1, T, T] in bfloat16, 2 B T² bytes, for each call. Both agree with
`transformer.attend` to rounding; what they say about padding means nothing.
"""

import functools

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

from instruct_jax.models.config import TransformerConfig

# Tokens of the kernels' smallest tile; shorter rows never use them.
TILE = 128


def choose(
  config: TransformerConfig, batch: int, num_tokens: int
) -> str | None:
  """The kernel for these rows: 'splash', 'cudnn', or None for plain XLA.

  Looks at `config.attention`, at the platform of the current mesh (which may
  be one that is only described, when a program is compiled ahead of time) and
  at what the kernels can do.

  Raises:
    ValueError: `attention` is 'flash' and rows of at least 128 tokens cannot
      have it; the reason is named.
  """
  if config.attention == 'xla' or num_tokens < TILE:
    return None
  mesh = jax.sharding.get_abstract_mesh()
  device = mesh.abstract_device if mesh.shape else None
  platform = device.platform if device else jax.default_backend()
  # On CPU the interpreter runs the TPU kernel: slow, for tests, never chosen.
  is_gpu = platform in ('gpu', 'cuda')
  problem = _problem(config, batch, num_tokens, mesh.shape, is_gpu)
  if config.attention == 'flash':
    if problem:
      raise ValueError(f"model.attention = 'flash': {problem}; use 'auto'")
    return 'cudnn' if is_gpu else 'splash'
  if problem or not (is_gpu or platform == 'tpu'):
    return None
  return 'cudnn' if is_gpu else 'splash'


def _problem(config, batch, num_tokens, sizes, is_gpu) -> str | None:
  if any(config.window_layers) and (
    config.window < num_tokens or config.window_rotary is not None
  ):
    return f'layers with a window of {config.window} tokens, or other rotaries'
  if is_gpu:
    if config.attention_softcap:
      return 'cuDNN has no soft-cap'
    if config.compute_dtype != 'bfloat16':
      return f'cuDNN computes in bfloat16, not {config.compute_dtype}'
    if config.head_dim % 8 or config.head_dim > 128:
      return f'cuDNN wants heads of 8 to 128 components: {config.head_dim}'
    return None
  if num_tokens % TILE:
    return f'{num_tokens} tokens are not a multiple of {TILE}'
  if config.head_dim % 64:
    return f'heads of {config.head_dim} components are not a multiple of 64'
  rows = sizes.get('data', 1) * sizes.get('fsdp', 1)
  if batch % rows or config.kv_heads % sizes.get('tensor', 1):
    return (
      f'{batch} rows and {config.kv_heads} key heads do not divide over the '
      f'mesh {dict(sizes)}'
    )
  return None


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
  scale = config.query_scale or config.head_dim**-0.5
  if kernel == 'cudnn':
    allowed = segments[:, None, :, None] == segments[:, None, None, :]
    mixed = jax.nn.dot_product_attention(
      *(jnp.swapaxes(x, 1, 2) for x in (queries, keys, values)),
      mask=allowed,
      scale=scale,
      is_causal=True,
      implementation='cudnn',
    )
    return jnp.swapaxes(mixed, 1, 2)
  mesh = jax.sharding.get_abstract_mesh()
  device = mesh.abstract_device if mesh.shape else None
  platform = device.platform if device else jax.default_backend()
  one_shard = functools.partial(
    _splash, softcap=config.attention_softcap, interpret=platform == 'cpu'
  )
  if mesh.shape:
    heads = P(('data', 'fsdp'), 'tensor')
    one_shard = jax.shard_map(
      one_shard,
      in_specs=(heads, heads, heads, P(('data', 'fsdp'))),
      out_specs=heads,
      check_vma=False,
    )
  return one_shard(queries * scale, keys, values, segments)


# --- Segments much shorter than their rows ------------------------------------


def block_size(num_tokens: int, longest: int) -> int:
  """Tokens of a block; 0 where whole rows cost no more.

  Half of the longest segment: a token then looks at its own block and the two
  before, one and a half times what it needs at most.
  """
  block = -(-longest // 2)
  return block if longest and num_tokens > 3 * block else 0


def _blocks(x: Array, block: int, num_before: int) -> Array:
  """[B, T, ...] to [B * blocks, (num_before + 1) * block, ...]: each block with
  those before it, zeros where there are none."""
  num_blocks = -(-x.shape[1] // block)
  filler = num_blocks * block - x.shape[1]
  padding = [(0, 0), (num_before * block, filler), *[(0, 0)] * (x.ndim - 2)]
  x = jnp.pad(x, padding)
  x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
  parts = [x[:, i : i + num_blocks] for i in range(num_before + 1)]
  x = jnp.concatenate(parts, axis=2)
  return x.reshape(-1, *x.shape[2:])


def _num_before(longest: int, block: int) -> int:
  # The first token of a block sees longest - 1 tokens before itself.
  return -(-(longest - 1) // block)


def allowed_in_blocks(
  segments: Int[Array, 'B T'], longest: int, block: int
) -> Bool[Array, 'b t s']:
  """Which keys of its own and the blocks before each query sees."""
  num_before = _num_before(longest, block)
  queries = _blocks(segments, block, 0)
  keys = _blocks(segments, block, num_before)
  rows = num_before * block + jnp.arange(block)
  columns = jnp.arange((num_before + 1) * block)
  allowed = queries[:, :, None] == keys[:, None, :]
  allowed &= (rows[:, None] >= columns[None, :])[None]
  return allowed & (keys > 0)[:, None, :]


def in_blocks(
  attend_fn,
  queries: Float[Array, 'B N T H'],
  keys: Float[Array, 'B K T H'],
  values: Float[Array, 'B K T H'],
  allowed: Bool[Array, 'b t s'],
  block: int,
) -> Float[Array, 'B N T H']:
  """Attention of rows whose segments are short, block by block.

  Args:
    attend_fn: (queries, keys, values, allowed) -> mixed values, of rows.
    queries, keys, values: of whole rows.
    allowed: of `allowed_in_blocks`.
    block: tokens of a block.
  """
  num_rows, num_tokens = queries.shape[0], queries.shape[2]
  num_before = allowed.shape[2] // block - 1

  def cut(x, num_before):
    x = _blocks(jnp.swapaxes(x, 1, 2), block, num_before)
    return jnp.swapaxes(x, 1, 2)

  mixed = attend_fn(
    cut(queries, 0), cut(keys, num_before), cut(values, num_before), allowed
  )
  mixed = jnp.swapaxes(mixed, 1, 2)
  mixed = mixed.reshape(num_rows, -1, *mixed.shape[2:])[:, :num_tokens]
  return jnp.swapaxes(mixed, 1, 2)


def _splash(queries, keys, values, segments, *, softcap, interpret):
  num_heads, num_tokens = queries.shape[1:3]
  block = next(size for size in (512, 256, 128) if num_tokens % size == 0)
  causal = splash_mask.CausalMask((num_tokens, num_tokens))
  kernel = splash_kernel.make_splash_mha(
    splash_mask.MultiHeadMask([causal] * num_heads),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=softcap or None,
    interpret=interpret,
    block_sizes=splash_kernel.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
  )

  def one_row(queries, keys, values, segments):
    ids = splash_kernel.SegmentIds(q=segments, kv=segments)
    return kernel(queries, keys, values, segment_ids=ids)

  return jax.vmap(one_row)(queries, keys, values, segments)
