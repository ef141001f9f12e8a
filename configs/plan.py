"""What a size needs on a TPU topology, compiled without one.

  python -m instruct_jax.main --config=configs/plan.py:1p3b,v5e-8

Sizes: miniature, 1p3b, 6b, 175b (policy; reward and value model are at most
6b, as in the paper). Topologies: v5e-1 to v5e-256, v4-8 to v4-1024, v5p-8 to
v5p-1024; the numbers count as in Google's names, v4 and v5p by cores, two to a
chip. The programs are those of sft.py, reward.py and ppo_ptx.py with the
paper's batches.
"""

from ml_collections import ConfigDict

from configs import common, ppo_ptx, reward, sft

# Grid of chips by Google's name of the slice.
TOPOLOGIES = {
  'v5e-1': '1x1',
  'v5e-4': '2x2',
  'v5e-8': '2x4',
  'v5e-16': '4x4',
  'v5e-32': '4x8',
  'v5e-64': '8x8',
  'v5e-128': '8x16',
  'v5e-256': '16x16',
  'v4-8': '2x2x1',
  'v4-32': '2x2x4',
  'v4-64': '2x4x4',
  'v4-128': '4x4x4',
  'v4-512': '4x8x8',
  'v4-1024': '8x8x8',
  'v5p-8': '2x2x1',
  'v5p-32': '2x2x4',
  'v5p-64': '2x4x4',
  'v5p-128': '4x4x4',
  'v5p-512': '4x8x8',
  'v5p-1024': '8x8x8',
}


def paper_stages(size, config):
  # 'flash': a program without the attention kernel is no plan.
  config.policy = common.model(size, attention='flash')
  # 6B reward and value models for every policy (paper 3.5, C.2), save where
  # the policy itself is smaller: one fits on small slices only with the like.
  config.scalar = common.model(
    '1p3b' if size == '1p3b' else '6b', attention='flash'
  )
  config.sft = sft.get_config(size).copy_and_resolve_references()
  config.reward = reward.get_config(size).copy_and_resolve_references()
  config.ppo = ppo_ptx.get_config(size).copy_and_resolve_references()
  config.num_reward_rows = 288  # 64 prompts x 9 answers of half a row each.


def miniature_stages(config):
  stages = ppo_ptx.get_config('miniature').stages
  values = dict(stages.pretrain.model, vocab_size=512)
  config.policy = ConfigDict(values)
  config.scalar = ConfigDict(values)
  config.sft = stages.sft.copy_and_resolve_references()
  config.reward = stages.reward.copy_and_resolve_references()
  config.ppo = stages.ppo_ptx.copy_and_resolve_references()
  config.num_reward_rows = 16


def get_config(argument: str = '1p3b,v5e-8'):
  size, _, topology = argument.partition(',')
  if topology not in TOPOLOGIES:
    raise ValueError(
      f'unknown topology {topology!r} in {argument!r}; write SIZE,TOPOLOGY '
      f'with one of {", ".join(TOPOLOGIES)}'
    )
  config = common.stage('plan', 'plan', 0, '')
  config.size = size
  config.chip = topology.partition('-')[0]  # Row of the published figures.
  config.topology = f'{config.chip}:{TOPOLOGIES[topology]}'  # Of libtpu.
  config.megacore = config.chip == 'v4'  # Two cores are one device there.
  if size == 'miniature':
    miniature_stages(config)
  else:
    paper_stages(size, config)
  # Meshes to try, in this order: data, fsdp, tensor; -1 fills.
  config.meshes = ((1, -1, 1), (1, -1, 2), (1, -1, 4), (1, -1, 8))
  if size == '175b':
    # 64 sequences of a minibatch are too few for more shards of rows.
    config.meshes = ((1, 64, -1), (1, 32, -1))
  # Policies to try on each mesh: what saves most memory first.
  config.remats = ('none',) if size == 'miniature' else ('full', 'dots')
  config.stop_at_first = False  # Or take the first mesh and remat that fit.
  config.programs = (
    'sft',
    'reward',
    'decode',
    'prefill',
    'score',
    'penalise',
    'train',
  )
  # 'NAME=VALUE' for the TPU compiler; none is what a run would use.
  config.compiler_options = ()
  return common.single(config, f'{size}_{topology}')
