"""Attention by the platform's flash kernel, where it has one.

TPU: splash attention (Pallas), one kernel a shard of the mesh under
`jax.shard_map`. NVIDIA GPU: cuDNN's, through `jax.nn.dot_product_attention`.
Both read the segment numbers, hold no [T, T] array in memory and agree with
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
from jaxtyping import Array, Float, Int

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
