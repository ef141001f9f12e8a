"""What claims of `configs/study.py` need beyond varying one key.

Each function that a claim names takes the `sweeps.Study`, adds its stages, and
returns stage -> value, or nothing.
"""

from ml_collections import ConfigDict

from configs import dpo, rloo

# Shares of the rankings for reward models; shares whose RL over-optimises.
SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
OVEROPTIMISED = (1 / 32, 1 / 8, 1 / 2)
FRONTIER = (0.0, 1.0, 3.0)  # Multiples of beta.
# Demonstrations. In 16 epochs so small a model overfits neither all 8,000, nor
# 500 with the recipe's batches and dropout (development seed 0).
FEW = 500
DPO_BETAS = (0.03, 0.1, 0.3, 1.0)


def sft_long(study):
  """SFT on few demonstrations for the paper's 16 epochs; epoch selection."""
  changes = {'batch_size': 4, 'dropout': 0.0, 'max_demonstrations': FEW}
  study.derive('sft', 'sft_long', num_epochs=16, **changes)
  study.derive('select', 'select_long', {'sft': 'sft_long'})


def pairs(study):
  """A reward model from shuffled pairs, in as many steps."""
  study.derive('reward', 'reward_pairs', split_pairs=True)


def crossval(study):
  """Cross-validation (E.2), a stage of the recipe."""
  study.order.append('crossval')
  study.used.append('crossval')


def sized(study, label: str, factor: float) -> str:
  """A pretrained model of another width; a larger one is also deeper."""
  model = ConfigDict(study.stages.pretrain.model.to_dict())
  keys = ('width', 'num_heads', 'mlp_dim')
  for key in (*keys, 'num_layers') if factor > 1 else keys:
    model[key] = max(1, int(factor * model[key]))
  return study.derive('pretrain', f'pretrain_{label}', model=model)


def large(study):
  """A pretrained model twice as wide and deep, with eight times the weights."""
  sized(study, 'large', 2)


def mix(study):
  """PPO-ptx from initialisations with other shares of pretraining data."""
  found = {'ppo_ptx': study.stages.rl_init.ptx_fraction}
  for share in (0.0, 0.5):
    label = f'mix_{share:g}'.replace('.', 'p')
    start = study.derive('rl_init', f'rl_init_{label}', ptx_fraction=share)
    stage = study.derive('ppo_ptx', f'ppo_{label}', {'init': f'{start}/model'})
    found[stage] = share
  return found


def reward_of(study, share: float) -> str:
  """A reward model from the first `share` of the rankings."""
  total = study.stages.data.num_reward_prompts
  total *= study.stages.compare.rankers_per_prompt
  count = round(share * total)
  return study.derive('reward', f'reward_{count}', max_comparisons=count)


def data_reward(study):
  """Reward models from parts of the rankings, and from all."""
  return {reward_of(study, share): share for share in SHARES} | {'reward': 1.0}


def frontier_of(study, stage: str, reward: str, **changes) -> str:
  """The frontier of an RL stage's snapshots, by reward model and judge."""
  model = {'reward_model': f'{reward}/model'}
  rl = f'{stage}=' + study.workdir + f'/{stage}'
  return study.derive('best_of_n', f'frontier_{stage}', model, rl=rl, **changes)


def along(study, label, reward, parent='ppo', **changes) -> str:
  """RL against a reward model, and its frontier."""
  model = {'reward_model': f'{reward}/model'}
  stage = study.derive(parent, f'{parent}_{label}', model, **changes)
  return frontier_of(study, stage, reward)


def overopt(study):
  """PPO of twice the length, without KL penalty, against weak reward models."""
  longer = 2 * study.stages.ppo.num_episodes
  changes = {'kl_coef': 0.0, 'num_episodes': longer}
  return {
    along(
      study, f'over_{1 / share:g}', reward_of(study, share), **changes
    ): share
    for share in OVEROPTIMISED
  }


def reward_sizes(study):
  """Reward models of three sizes: stage -> weights, relative to the recipe's.

  Each starts from a pretrained model of its size and learns from an eighth of
  the rankings.
  """
  few, found = reward_of(study, 1 / 8), {}
  for label, factor, share in (
    ('small', 0.5, 1 / 4), ('own', 1, 1.0), ('large', 2, 8.0),
  ):  # fmt: skip
    start = 'pretrain' if factor == 1 else sized(study, label, factor)
    model = {'init': f'{start}/model'}
    found[study.derive(few, f'reward_{label}', model)] = share
  return found


def sizes(study):
  """PPO of twice the length, without KL penalty, against `reward_sizes`.

  Value models have the policy's size.
  """
  changes = {'kl_coef': 0.0, 'num_episodes': 2 * study.stages.ppo.num_episodes}
  return {
    along(
      study, reward.removeprefix('reward_'), reward, value_from='policy',
      **changes,
    ): share
    for reward, share in reward_sizes(study).items()
  }  # fmt: skip


def with_beta(study, multiple: float) -> str:
  """The frontier of PPO with a multiple of its KL coefficient."""
  stage = study.varied('ppo', 'kl_coef', multiple)
  # PPO itself is compared with best of n, which needs more answers.
  own = {'num_samples': 32} if stage == 'ppo' else {}
  return frontier_of(study, stage, 'reward', **own)


def frontier(study):
  """PPO with several KL coefficients, against one reward model."""
  return {with_beta(study, multiple): multiple for multiple in FRONTIER}


def ending(study):
  """PPO in which responses that do not end get a fixed low score."""
  study.derive('ppo', 'ppo_ending', missing_end_score=-1.0)


def value_start(study):
  """PPO with a value model from the policy's trunk and a new head."""
  study.derive('ppo', 'ppo_value_from_policy', value_from='policy')


def ranked(study):
  """A reward model with mean 0 on ranked answers, not on demonstrations."""
  study.derive('reward', 'reward_ranked', demonstrations='')


def shift(study):
  """PPO against that reward model, with a value model that has a new head."""
  ranked(study)
  value_start(study)
  model = {'reward_model': 'reward_ranked/model'}
  study.derive('ppo_value_from_policy', 'ppo_reward_ranked', model)


def minimal_pairs(study):
  """Pairs of sentences that differ in whom they are about, as in Winogender."""
  data = ConfigDict(study.stages.nlp_suite.data)
  data.winogender = study.workdir + '/data/minimal_pairs.tsv'
  study.derive(
    'nlp_suite', 'minimal_pairs', data=data, prompt_types='basic prompt'
  )


def methods(study):
  """RLOO, GRPO and DPO compared with PPO; DPO with several betas."""
  stages, found = study.stages, {}
  stages.rloo = rloo.from_ppo(ConfigDict(stages.ppo))
  stages.dpo = dpo.from_reward(study.config)
  grpo = {
    'advantage': 'group_normalised', 'kl_in': 'loss', 'kl_estimator': 'k3',
  }  # fmt: skip
  found[with_beta(study, 1.0)] = 1.0
  found[along(study, 'method', 'reward', 'rloo')] = 2.0
  found[along(study, 'group', 'reward', 'rloo', **grpo)] = 3.0
  # DPO moves further from its start than PPO does with its own beta.
  found[with_beta(study, 0.1)] = 4.0
  # FLOPs per token: PPO 22 N, with reward and value model; the others 14 N.
  own = stages.ppo.num_episodes // stages.ppo.batch_size
  number = round(own * 22 / 14) * stages.ppo.batch_size
  study.derive('rloo', 'rloo_compute', num_episodes=number)
  study.derive('rloo_group', 'grpo_compute', num_episodes=number)
  for beta in DPO_BETAS:
    study.derive('dpo', f'dpo_{beta:g}'.replace('.', 'p'), beta=beta)
  return found
