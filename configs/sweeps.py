"""What claims of `configs/study.py` vary: stages like those of the recipe.

`Study.need` adds what a claim of `evals/claims.py` needs: one of `SWEEPS`, or a
function of `chains.py`.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import chains


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


class Study:
  """Adds stages to the miniature's recipe.

  Args:
    config: of the recipe.
  """

  def __init__(self, config: ConfigDict):
    self.config, self.stages = config, config.stages
    self.workdir = config.get_ref('workdir')
    self.order: list[str] = []
    self.used: list[str] = []  # By the sweeps, one after the other.
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
