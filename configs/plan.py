"""Memory and time of a model size on TPUs or GPUs, planned without having one.

  python -m instruct_jax.main --config=configs/plan.py:1p3b,v5e-8

Sizes: miniature, 135m and tldr_1b (of recipe.py), and the paper's 1p3b, 6b and
175b (of the policy; reward and value model are at most 6b). Topologies: v5e-1
to v5e-256, v4-8 to v4-1024, v5p-8 to v5p-1024, and h100-1, h100-8, h100-2x8
(two hosts). TPU numbers follow Google's names: v4 and v5p count cores, two per
chip. The programs are those of sft.py, reward.py and ppo_ptx.py.
"""

from ml_collections import ConfigDict

from configs import budgets, common, ppo_ptx, recipe, reward, sft

_CUBES = {
  8: '2x2x1',
  32: '2x2x4',
  64: '2x4x4',
  128: '4x4x4',
  512: '4x8x8',
  1024: '8x8x8',
}
_SQUARES = {1: '1x1', 4: '2x2', 8: '2x4', 16: '4x4'}
_SQUARES |= {32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}
# Grid of chips by Google's name of the slice.
TOPOLOGIES = {
  f'{chip}-{number}': grid
  for chip, grids in (('v5e', _SQUARES), ('v4', _CUBES), ('v5p', _CUBES))
  for number, grid in grids.items()
}
# Hosts x 1 x GPUs per host.
TOPOLOGIES |= {'h100-1': '1x1x1', 'h100-8': '1x1x8', 'h100-2x8': '2x1x8'}


def paper_stages(size, config):
  """The paper's stages at a size; its models as shapes."""
  # 'flash': a plan without the attention kernel would be misleading.
  config.policy = common.model(size, attention='flash')
  # 6B reward and value models for every policy (paper 3.5, C.2), except for
  # the smallest policy: small slices only fit models of its own size.
  config.scalar = common.model(
    '1p3b' if size == '1p3b' else '6b', attention='flash'
  )
  config.sft = sft.get_config(size).copy_and_resolve_references()
  config.reward = reward.get_config(size).copy_and_resolve_references()
  config.ppo = ppo_ptx.get_config(size).copy_and_resolve_references()
  config.num_reward_rows = 288  # 64 prompts x 9 answers of half a row each.


def recipe_stages(config, preset, **shape):
  """Stages of a preset of configs/recipe.py, all weights trained."""
  stages = recipe.get_config(preset).stages
  shape = ConfigDict(
    {
      'dropout': 0.0,
      'compute_dtype': 'bfloat16',
      'vocab_multiple': 128,
      'scan_unroll': 1,
      'attention': 'flash',
      'logprob_chunk': 128,
      **shape,
    }
  )
  config.policy, config.scalar = shape, ConfigDict(shape.to_dict())
  for name, key in (('sft', 'sft'), ('reward', 'reward'), ('ppo', 'ppo_ptx')):
    stage = config[name] = stages[key].copy_and_resolve_references()
    stage.lora.rank = 0
    stage.compute_dtype = ''  # That of the models.
    for each in {'remat', 'logprob_chunk'} & set(stage):
      stage[each] = shape[each]
  config.ppo.frozen_dtype = 'bfloat16'


def smollm_stages(config):
  """Stages of configs/recipe.py:gpu, with the shape of SmolLM2-135M."""
  recipe_stages(
    config,
    'gpu',
    vocab_size=49_153,  # Its tokens and our PAD.
    context_length=8192,
    num_layers=30,
    width=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    gated_mlp=True,
    norm='rms',
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    activation='silu',
    tied=True,
    rotary=ConfigDict({'dim': 64, 'theta': 100_000.0}),
    remat='dots',
  )
  data = budgets.PRESETS['gpu']['data']
  config.ppo.prompt_length = data['max_prompt_length']
  config.ppo.response_length = data['max_response_length']
  T = config.ppo.prompt_length + config.ppo.response_length
  config.ppo.ptx_row_length = config.sft.row_length = T
  config.reward.row_length = T
  config.num_reward_rows = 2 * config.reward.batch_size


def tldr_stages(config):
  """Stages of configs/recipe.py:tldr_1b, with the shape of Pythia 1B."""
  recipe_stages(
    config,
    'tldr_1b',
    vocab_size=50_278,  # Its tokens and our PAD.
    context_length=2048,
    num_layers=16,
    width=2048,
    num_heads=8,
    head_dim=256,
    mlp_dim=8192,
    residual='parallel',
    activation='gelu',
    tied=False,
    rotary=ConfigDict({'dim': 64}),
    remat='full',
    attention='auto',  # The kernel of TPUs does not take rows of 565 tokens.
  )
  config.ppo.prompt_length, config.ppo.response_length = 512, 53
  config.ppo.ptx_row_length = 640
  config.num_reward_rows = 128  # 64 prompts x 2 answers, a row each.


def miniature_stages(config):
  """The stages and shapes of the miniature."""
  stages = ppo_ptx.get_config('miniature').stages
  values = dict(stages.pretrain.model, vocab_size=512)
  config.policy = ConfigDict(values)
  config.scalar = ConfigDict(values)
  config.sft = stages.sft.copy_and_resolve_references()
  config.reward = stages.reward.copy_and_resolve_references()
  config.ppo = stages.ppo_ptx.copy_and_resolve_references()
  config.num_reward_rows = 16


def get_config(argument: str = '1p3b,v5e-8'):
  """The plan of 'SIZE,TOPOLOGY'."""
  size, _, topology = argument.partition(',')
  if topology not in TOPOLOGIES:
    raise ValueError(
      f'unknown topology {topology!r} in {argument!r}; write SIZE,TOPOLOGY '
      f'with one of {", ".join(TOPOLOGIES)}'
    )
  config = common.stage('plan', 'plan', 0, '')
  config.size = size
  config.chip = topology.partition('-')[0]  # Key of the published figures.
  if topology == 'h100-2x8':
    config.chip = 'h100_network'
  config.topology = f'{config.chip}:{TOPOLOGIES[topology]}'
  config.megacore = config.chip == 'v4'  # Two cores are one device there.
  if size == 'miniature':
    miniature_stages(config)
  elif size == '135m':
    smollm_stages(config)
  elif size == 'tldr_1b':
    tldr_stages(config)
  else:
    paper_stages(size, config)
  # Meshes to try, in this order: data, fsdp, tensor; -1 fills.
  config.meshes = ((1, -1, 1), (1, -1, 2), (1, -1, 4), (1, -1, 8))
  if size == '175b':
    # A minibatch of 64 sequences is too small for more shards of rows.
    config.meshes = ((1, 64, -1), (1, 32, -1))
  # Remat policies to try on each mesh: the one that saves most memory first.
  config.remats = ('none',) if size == 'miniature' else ('full', 'dots')
  config.stop_at_first = False  # True: take the first mesh and remat that fit.
  config.programs = (
    *('sft', 'reward', 'decode', 'prefill', 'score', 'penalise', 'train'),
  )
  # 'NAME=VALUE' for the compiler; () compiles as a run would.
  config.compiler_options = ()
  return common.single(config, f'{size}_{topology}')
