"""What claims of `configs/study.py` vary: stages like those of the recipe.

`Study.need` adds a sweep of `evals/claims.py`: one of `SWEEPS`, or a method.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import dpo, rloo


@dataclasses.dataclass(frozen=True)
class Sweep:
  """One key of a stage varied: multiples of its own value, or other values."""

  parent: str
  key: str
  values: tuple[float, ...]
  are_multiples: bool = True


# The parent itself is the run with its own value.
SWEEPS = {
  'gamma': Sweep('ppo_ptx', 'ptx_coef', (0, 0.1, 0.3, 1, 3, 10)),
  'beta': Sweep('ppo', 'kl_coef', (0, 0.1, 0.3, 1, 3, 10, 100)),
  'rate': Sweep('ppo', 'learning_rate', (1, 3, 10, 30, 100)),
  'rate_ptx': Sweep('ppo_ptx', 'learning_rate', (1, 3, 10, 30, 100)),
  'ratio': Sweep('ppo_ptx', 'ptx_per_episode', (1, 2, 4, 8), False),
  'length': Sweep('ppo_ptx', 'num_episodes', (1, 2, 4)),
  'whitening': Sweep('ppo', 'whiten_advantages', (0, 1), False),
  'epsilon': Sweep('ppo', 'adam_eps', (1e-8, 1e-5), False),
  'warmup': Sweep('ppo', 'num_warmup_iterations', (0, 4), False),
  'epochs_reward': Sweep('reward', 'num_epochs', (1, 2, 4)),
  'rate_reward': Sweep('reward', 'learning_rate', (0.5, 1, 1.5)),
}
# Of the rankings, for reward models; and of those, whose RL is over-optimised.
SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
OVEROPTIMISED = (1 / 32, 1 / 8)
FRONTIER = (0.1, 1.0, 3.0)  # Multiples of beta.
DPO_BETAS = (0.03, 0.1, 0.3, 1.0)


class Study:
  """Adds stages to the miniature's recipe.

  Args:
    config: of the recipe.
  """

  def __init__(self, config: ConfigDict):
    self.config, self.stages = config, config.stages
    self.workdir = config.get_ref('workdir')
    self.order: list[str] = []
    config.sweeps = ConfigDict()  # Name -> stage -> its value.
    config.stages_of = ConfigDict()  # Name -> its stages.

  def derive(self, parent, name, reads=None, **changes) -> str:
    """A stage like another one, with some keys changed; made once.

    Args:
      reads: key -> path below the work directory.
    """
    if name not in self.stages:
      found = ConfigDict(self.stages[parent])  # Its links to paths stay.
      changes |= {k: self.workdir + f'/{p}' for k, p in (reads or {}).items()}
      for key, value in {'name': name, **changes}.items():
        del found[key]  # Setting a link would change what it leads to.
        found[key] = value
      self.stages[name] = found
      self.order.append(name)
    return name

  def need(self, name: str) -> None:
    """Adds the stages of a sweep, and its points: stage -> value, if any."""
    before = len(self.order)
    found = (
      self.swept(SWEEPS[name]) if name in SWEEPS else getattr(self, name)()
    )
    self.config.sweeps[name] = ConfigDict(found or {})
    self.config.stages_of[name] = tuple(self.order[before:])

  def swept(self, sweep: Sweep) -> dict[str, float]:
    """Stage -> value."""
    own, found = self.stages[sweep.parent][sweep.key], {}
    for value in sweep.values:
      wanted = type(own)(value * own if sweep.are_multiples else value)
      stage = sweep.parent
      if wanted != own:
        stage += f'_{sweep.key}_{value:g}'.replace('.', 'p')
        self.derive(sweep.parent, stage, **{sweep.key: wanted})
      found[stage] = float(value)
    return found

  def sft_long(self):
    """SFT for the paper's 16 epochs, and the choice among them."""
    self.derive('sft', 'sft_long', num_epochs=16)
    self.derive('select', 'select_long', {'sft': 'sft_long'})

  def pairs(self):
    """A reward model from shuffled pairs, in as many steps."""
    size = 19 * self.stages.reward.batch_size  # Pairs of a prompt, K 4 to 9.
    self.derive('reward', 'reward_pairs', split_pairs=True, batch_size=size)

  def crossval(self):
    """The folds of E.2, a stage of the recipe."""
    self.order.append('crossval')

  def large(self):
    """A pretrained model twice as wide and deep, of eight times the weights."""
    model = ConfigDict(self.stages.pretrain.model.to_dict())
    for key in ('width', 'num_heads', 'mlp_dim', 'num_layers'):
      model[key] *= 2
    self.derive('pretrain', 'pretrain_large', model=model)

  def mix(self):
    """PPO-ptx from initialisations with other shares of pretraining."""
    found = {'ppo_ptx': self.stages.rl_init.ptx_fraction}
    for share in (0.0, 0.5):
      label = f'mix_{share:g}'.replace('.', 'p')
      start = self.derive('rl_init', f'rl_init_{label}', ptx_fraction=share)
      stage = self.derive('ppo_ptx', f'ppo_{label}', {'init': f'{start}/model'})
      found[stage] = share
    return found

  def reward_of(self, share: float) -> str:
    """A reward model from the first part of the rankings."""
    total = self.stages.data.num_reward_prompts
    total *= self.stages.compare.rankers_per_prompt
    count = round(share * total)
    return self.derive('reward', f'reward_{count}', max_comparisons=count)

  def data_reward(self):
    """Reward models from parts of the rankings, and from all."""
    return {self.reward_of(share): share for share in SHARES} | {'reward': 1.0}

  def along(self, label, reward, parent='ppo', **changes) -> str:
    """RL with snapshots, and its frontier of reward model and judge."""
    model = {'reward_model': f'{reward}/model'}
    own = self.stages[parent]
    iterations = changes.get('num_episodes', own.num_episodes) // own.batch_size
    changes['snapshot_every'] = max(1, iterations // 10)
    stage = self.derive(parent, f'{parent}_{label}', model, **changes)
    rl = f'{stage}=' + self.workdir + f'/{stage}'
    return self.derive('best_of_n', f'frontier_{stage}', model, rl=rl)

  def overopt(self):
    """Twice as much PPO, without a penalty, against weak reward models."""
    longer = 2 * self.stages.ppo.num_episodes
    changes = {'kl_coef': 0.0, 'num_episodes': longer}
    return {
      self.along(f'over_{1 / share:g}', self.reward_of(share), **changes): share
      for share in OVEROPTIMISED
    }

  def frontier(self):
    """PPO with several KL coefficients, against one reward model."""
    own, found = self.stages.ppo.kl_coef, {}
    for multiple in FRONTIER:
      label = f'kl_{multiple:g}'.replace('.', 'p')
      found[self.along(label, 'reward', kl_coef=multiple * own)] = multiple
    return found

  def ending(self):
    """Responses that do not end are worth a fixed low score."""
    ending = self.derive('ppo', 'ppo_ending', missing_end_score=-1.0)
    return {'ppo': 0.0, ending: 1.0}

  def value_start(self):
    """A value model with the policy's trunk and a new head."""
    fresh = self.derive('ppo', 'ppo_value_from_policy', value_from='policy')
    return {fresh: 0.0, 'ppo': 1.0}

  def shift(self):
    """A reward model whose mean is 0 over ranked answers instead of
    demonstrations."""
    reward = self.derive('reward', 'reward_ranked', demonstrations='')
    model = {'reward_model': f'{reward}/model'}
    return {self.derive('ppo', 'ppo_reward_ranked', model): 0.0, 'ppo': 1.0}

  def methods(self):
    """RLOO, GRPO and DPO beside PPO: snapshots, and points of DPO's beta."""
    stages, found = self.stages, {}
    stages.rloo = rloo.from_ppo(ConfigDict(stages.ppo))
    stages.dpo = dpo.from_reward(self.config)
    grpo = {
      'advantage': 'group_normalised', 'kl_in': 'loss', 'kl_estimator': 'k3',
    }  # fmt: skip
    found[self.along('method', 'reward')] = 1.0
    found[self.along('method', 'reward', 'rloo')] = 2.0
    found[self.along('group', 'reward', 'rloo', **grpo)] = 3.0
    # Operations of a token: PPO 22 N, with reward and value model; RLOO 14 N.
    own = stages.ppo.num_episodes // stages.ppo.batch_size
    self.derive(
      'rloo', 'rloo_compute',
      num_episodes=round(own * 22 / 14) * stages.ppo.batch_size,
    )  # fmt: skip
    for beta in DPO_BETAS:
      self.derive('dpo', f'dpo_{beta:g}'.replace('.', 'p'), beta=beta)
    return found
