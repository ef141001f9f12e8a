"""What claims of `configs/study.py` vary: copies of the recipe's stages.

`Study.need` adds what a claim of `evals/claims.py` needs: one of `SWEEPS`, or a
function of `chains.py`.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import chains


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Varies one key of a stage: by multiples of its own value, or other values.

  `zero` is another stage that does what the parent would do with 0.
  """

  parent: str
  key: str
  values: tuple[float, ...]
  are_multiples: bool = True
  zero: str = ''


BETAS = (0, 0.1, 0.3, 1, 3, 10, 100)
RATES = (1, 2, 4, 8, 16, 32)

# For a key's own value, the run is the parent itself.
SWEEPS = {
  'gamma': Sweep('ppo_ptx', 'ptx_coef', (0, 0.1, 0.3, 1, 3, 10), zero='ppo'),
  'beta': Sweep('ppo', 'kl_coef', BETAS),
  'beta_ptx': Sweep('ppo_ptx', 'kl_coef', BETAS),
  'rate': Sweep('ppo', 'learning_rate', RATES),
  'rate_ptx': Sweep('ppo_ptx', 'learning_rate', RATES),
  'ratio': Sweep('ppo_ptx', 'ptx_per_episode', (1, 2, 4, 8), False),
  'length': Sweep('ppo_ptx', 'num_episodes', (1, 4)),
  'whitening': Sweep('ppo', 'whiten_advantages', (0, 1), False),
  'epsilon': Sweep('ppo', 'adam_eps', (1e-8, 1e-5), False),
  'warmup': Sweep('ppo', 'num_warmup_iterations', (0, 4), False),
  'epochs_reward': Sweep('reward', 'num_epochs', (1, 2, 4)),
  'rate_reward': Sweep('reward', 'learning_rate', (0.5, 1, 1.5)),
}


class Study:
  """Adds stages to the miniature's recipe.

  Args:
    config: config of the recipe.
  """

  def __init__(self, config: ConfigDict):
    self.config, self.stages = config, config.stages
    self.workdir = config.get_ref('workdir')
    self.order: list[str] = []
    self.used: list[str] = []  # By sweeps, in their order.
    config.sweeps = ConfigDict()  # Name -> stage -> its value.
    config.stages_of = ConfigDict()  # Name -> its stages.

  def derive(self, parent, name, reads=None, **changes) -> str:
    """Adds a copy of a stage with some keys changed, once; returns its name.

    Args:
      reads: key -> path below the work directory.
    """
    if name not in self.stages:
      found = ConfigDict(self.stages[parent])  # Keeps references to paths.
      changes |= {k: self.workdir + f'/{p}' for k, p in (reads or {}).items()}
      for key, value in {'name': name, **changes}.items():
        del found[key]  # Setting a reference changes its target.
        found[key] = value
      self.stages[name] = found
      self.order.append(name)
    self.used.append(name)
    return name

  def need(self, name: str) -> None:
    """Adds the stages of a sweep, and its points: stage -> value, if any."""
    before = len(self.used)
    found = (
      self.swept(SWEEPS[name])
      if name in SWEEPS
      else getattr(chains, name)(self)
    )
    self.config.sweeps[name] = ConfigDict(found or {})
    self.config.stages_of[name] = tuple(dict.fromkeys(self.used[before:]))

  def varied(self, parent, key, value, is_multiple=True) -> str:
    """The stage with a multiple of one key's value, or with another value."""
    own = self.stages[parent][key]
    wanted = type(own)(value * own if is_multiple else value)
    if wanted == own:
      return parent
    name = f'{parent}_{key}_{value:g}'.replace('.', 'p')
    return self.derive(parent, name, **{key: wanted})

  def swept(self, sweep: Sweep) -> dict[str, float]:
    """Adds the stages of a sweep: stage -> value."""
    found = {}
    for value in sweep.values:
      stage = sweep.zero if not value else ''
      stage = stage or self.varied(
        sweep.parent, sweep.key, value, sweep.are_multiples
      )
      found[stage] = float(value)
    return found
