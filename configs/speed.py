"""How fast an iteration is, and where its time goes.

  python -m instruct_jax.main --config=configs/speed.py:s,iteration

Before the comma a size: tiny (seconds, for tests), s (6.3 M parameters), 124m,
both in float32 for CPUs, 1p3b (bfloat16, one GPU of 140 GB). After it a work:

  iteration         PPO: rollout, score, 4 minibatches (8 at 1p3b), checkpoint
  iteration_ragged  the same with responses that end early
  rollout           the rollout alone, every response at full length
  rollout_ragged    the same with responses that end early
  sft               one supervised step
  all               the five above, each in a process of its own

`--config.growth=response,batch,model` repeats the work with each of these
twice and four times as large. `--config.peers=DIR` with the pythons of the
peers' environments runs their scripts (README there) alternately with ours.
"""

from ml_collections import ConfigDict

from configs import common, rl, sft

WORKS = {
  'iteration': 0.0,
  'iteration_ragged': 1.0,
  'rollout': 0.0,
  'rollout_ragged': 1.0,
  'sft': 0.0,
  'all': 0.0,
}


def llama(**shape) -> ConfigDict:
  """Llama's switches; a shape as in the peers' scripts."""
  values = dict(
    vocab_multiple=128,
    dropout=0.0,
    compute_dtype='float32',
    remat='none',
    attention='auto',
    logprob_chunk=0,
    scan_unroll=1,
    num_kv_heads=0,
    norm='rms',
    norm_epsilon=1e-6,
    gated_mlp=True,
    activation='silu',
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    tied=True,
    rotary=ConfigDict({'dim': shape['head_dim']}),
  )
  values.update(shape)
  return ConfigDict(values)


SHAPES = {
  'tiny': dict(
    vocab_size=64,
    context_length=64,
    num_layers=2,
    width=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
  ),
  's': dict(
    vocab_size=8_192,
    context_length=1_024,
    num_layers=4,
    width=256,
    num_heads=4,
    head_dim=64,
    mlp_dim=1_024,
    scan_unroll=4,
  ),
  '124m': dict(
    vocab_size=50_257,
    context_length=1_024,
    num_layers=12,
    width=768,
    num_heads=12,
    head_dim=64,
    mlp_dim=2_048,  # Gated: three products, as large as GPT-2's two.
  ),
  '1p3b': dict(
    vocab_size=50_257,
    context_length=2_048,
    num_layers=24,
    width=2_048,
    num_heads=16,
    head_dim=128,
    mlp_dim=5_504,
    compute_dtype='bfloat16',
    remat='dots',
    logprob_chunk=1_024,
  ),
}


def get_config(argument: str = 's,iteration'):
  size, _, work = argument.partition(',')
  work = work or 'iteration'
  if size not in SHAPES or work not in WORKS:
    raise ValueError(
      f'unknown variant {argument!r}; write SIZE,WORK with a size of '
      f'{", ".join(SHAPES)} and a work of {", ".join(WORKS)}'
    )
  config = common.stage(f'speed_{work}', 'speed', 0, '')
  config.variant = f'{size},{work}'
  config.work = work.removesuffix('_ragged')
  config.policy = llama(**SHAPES[size])
  config.scalar = llama(**SHAPES[size])  # Value and reward model.
  # What pays: 'model', or 'tokens', a function of the ids, as in the peers'
  # scripts: then no reward model is read.
  config.reward = 'tokens'
  # Share of the vocabulary that ends a response. The weights are random, so
  # lengths are near geometric: 0.038 gives a mean of 24 of at most 64.
  config.stop_fraction = 0.038 * WORKS[work]
  config.ppo = rl.stage(0, '')
  config.ppo.prompt_length = 64
  config.ppo.response_length = 64
  config.ppo.ptx_row_length = 128
  config.ppo.batch_size = 32
  config.ppo.num_minibatches = 4
  config.ppo.ptx_coef = 0.0
  config.ppo.ptx_per_episode = 1
  config.sft = sft.stage(0, '')
  config.sft.dropout = 0.0
  config.sft.batch_size = 16
  config.sft.row_length = 128
  config.num_warmups = 2  # Iterations before the clock starts; they compile.
  config.num_iterations = 7  # Timed; at least 5.
  config.matmul_size = 2_048  # Rows and columns of the ceiling's product.
  config.bandwidth_bytes = 2**29  # Read for the ceiling of the memory.
  config.growth = ''  # Of response, batch, model: each times 2 and 4.
  config.cores = 0  # Processes compared run on the first so many; 0 is all.
  config.num_rounds = 1  # Of ours and peers, alternately.
  config.peers = ''  # Folder of the peers' scripts; '' compares with nobody.
  config.tunix_python = ''  # Pythons of the peers' environments; '' skips one.
  config.hf_python = ''
  config.trl_python = ''  # Of the last TRL with a PPO trainer.
  if size == 'tiny':
    config.ppo.prompt_length = 6
    config.ppo.response_length = 8
    config.ppo.ptx_row_length = 16
    config.ppo.batch_size = 8
    config.sft.batch_size = 4
    config.sft.row_length = 16
    config.num_iterations = 5
    config.matmul_size = 128
    config.bandwidth_bytes = 2**20
  if size == '124m':
    config.ppo.logprob_chunk = 64
    config.num_warmups = 1
    config.num_iterations = 5
  if size == '1p3b':
    config.reward = 'model'
    config.stop_fraction = 0.01 * WORKS[work]  # Mean 92 of at most 256.
    config.ppo.prompt_length = 128
    config.ppo.response_length = 256
    config.ppo.batch_size = 512
    config.ppo.num_minibatches = 8
    config.ppo.frozen_dtype = 'bfloat16'
    config.ppo.num_slices = 8
    config.ppo.num_microbatches = 2
    config.sft.batch_size = 32
    config.sft.row_length = 1_024
    config.matmul_size = 8_192
    config.bandwidth_bytes = 2**32
  return common.single(config, size)
