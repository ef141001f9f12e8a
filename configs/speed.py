"""How fast an iteration is, and where its time goes.

  python -m instruct_jax.main --config=configs/speed.py:s,iteration

Before the comma is a size: tiny (seconds, for tests); s (6.3 M parameters) and
124m, both in the dtype that the machine multiplies faster; or, in bfloat16 for
accelerators, 135m (SmolLM2's shape) and 1p3b (one GPU of 80 GB). After it is a
workload:

  iteration         PPO: rollout, score, minibatches, checkpoint
  iteration_ragged  the same with responses that end early
  rollout           the rollout alone, every response at full length
  rollout_ragged    the same with responses that end early
  sft               one supervised step
  all               the five above, each in a separate process
  check             not timed: whether the first device agrees with the CPU
  products          each form of matrix product of a step, in both dtypes

`--config.growth=response,batch,model` repeats the workload with each of these
twice and four times as large. `--config.hf_python=PYTHON`, of an environment
with torch and transformers, compares it with the same workload in PyTorch, in
float32 and in bfloat16, run alternately. `--config.peers=DIR` with the Pythons
of their environments adds the peers' scripts (README there), at size s.
"""

from ml_collections import ConfigDict

from configs import common, rl, sft

WORKS = ('iteration', 'iteration_ragged', 'rollout', 'rollout_ragged', 'sft')
WORKS += ('all', 'check', 'products')


def llama(**shape) -> ConfigDict:
  """A Llama of the given shape, as in the peers' scripts."""
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
  return ConfigDict(values | shape)


def _shape(vocab_size, context, layers, width, heads, mlp_dim, **switches):
  return {
    'vocab_size': vocab_size,
    'context_length': context,
    'num_layers': layers,
    'width': width,
    'num_heads': heads,
    'head_dim': width // heads,
    'mlp_dim': mlp_dim,
    **switches,
  }


# bfloat16 where the processor multiplies it faster than float32.
FASTER = {'compute_dtype': 'auto'}
SHAPES = {
  'tiny': _shape(64, 64, 2, 16, 2, 32),
  's': _shape(8_192, 1_024, 4, 256, 4, 1_024, scan_unroll=4, **FASTER),
  # Gated: three matrices of width 2,048 are as large as GPT-2's two.
  '124m': _shape(50_257, 1_024, 12, 768, 12, 2_048, **FASTER),
  '135m': _shape(49_153, 2_048, 30, 576, 9, 1_536, num_kv_heads=3)
  | {'compute_dtype': 'bfloat16', 'logprob_chunk': 1_024},
  '1p3b': _shape(50_257, 2_048, 24, 2_048, 16, 5_504)
  | {'compute_dtype': 'bfloat16', 'remat': 'dots', 'logprob_chunk': 1_024},
}


def get_config(argument: str = 's,iteration'):
  """The measurement of 'SIZE,WORK'."""
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
  # The reward comes from a 'model', or from 'tokens', a function of the ids as
  # in the peers' scripts, which needs no reward model.
  config.reward = 'tokens'
  # Share of the vocabulary that ends a response in a ragged workload. The
  # weights are random, so lengths are almost geometric: with 0.038, and at most
  # 64, their mean is 24.
  config.stop_fraction = 0.038
  config.ppo = rl.stage(0, '')
  config.ppo.update(prompt_length=64, response_length=64, ptx_row_length=128)
  config.ppo.update(batch_size=32, num_minibatches=4)
  config.ppo.update(ptx_coef=0.0, ptx_per_episode=1)
  config.sft = sft.stage(0, '')
  config.sft.update(dropout=0.0, batch_size=16, row_length=128)
  config.num_warmups = 2  # Iterations before the clock starts; they compile.
  config.num_iterations = 7  # Timed; at least 5.
  config.saves = True  # The workload 'iteration' also times a checkpoint.
  config.matmul_size = 2_048  # Size of the matrices that measure the ceiling.
  config.bandwidth_bytes = 2**29  # Read to measure the memory's ceiling.
  config.growth = ''  # Some of response, batch, model: times 2 and 4.
  # JAX_PLATFORMS of our process in a comparison; '' is the environment's. With
  # JAX_PLATFORMS=cpu, the process that compares leaves a GPU to the others.
  config.platforms = ''
  config.cores = 0  # Compared processes run on the first N cores; 0 is all.
  config.num_rounds = 1  # Of our program and the peers, alternately.
  config.hf_python = ''  # Has torch and transformers; '' compares with none.
  config.torch_precisions = 'float32,bfloat16'  # Of the workload there.
  config.peers = ''  # Folder of other peers' scripts.
  config.tunix_python = ''  # Python of its environment; '' skips Tunix.
  config.trl_python = ''  # With the last TRL that has a PPO trainer.
  if work == 'check':  # Ids below 100 are rewarded; scores must differ.
    vocab_size = max(200, config.policy.vocab_size)
    config.policy.vocab_size = config.scalar.vocab_size = vocab_size
  if size == 'tiny':
    config.ppo.update(prompt_length=6, response_length=8, ptx_row_length=16)
    config.ppo.batch_size = 8
    config.sft.update(batch_size=4, row_length=16)
    config.update(num_iterations=5, matmul_size=128, bandwidth_bytes=2**20)
  if size == '124m':
    config.ppo.logprob_chunk = 64
    config.update(num_warmups=1, num_iterations=5)
  if size in ('135m', '1p3b'):
    config.reward = 'model'
    config.stop_fraction = 0.01  # Mean length 92, at most 256.
    config.ppo.update(prompt_length=128, response_length=256, batch_size=512)
    config.ppo.update(num_minibatches=8, num_slices=8)
    if size == '1p3b':
      config.ppo.update(batch_size=128, num_minibatches=4, num_microbatches=2)
      config.ppo.num_slices = 2
      # A checkpoint has about 35 GB.
      config.update(num_warmups=1, num_iterations=5, saves=False)
    config.ppo.frozen_dtype = 'bfloat16'
    config.sft.update(batch_size=32, row_length=1_024)
    config.update(matmul_size=8_192, bandwidth_bytes=2**32)
  return common.single(config, size)
