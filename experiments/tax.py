"""Plots the alignment tax of a sweep of PPO runs (E.6, Figures 33 to 35)."""

from etils import epath

from instruct_jax.evals import tax


def validate(config):
  if not config.source:
    raise ValueError(
      'source is empty; give the folder of a finished run of configs/ppo_ptx.py'
    )
  # Checked before hours of RL begin.
  for part in ('rl_init/model', 'reward/model', 'data/tokenizer'):
    path = epath.Path(config.source) / part
    if not path.exists():
      raise ValueError(
        f'{path}: no such folder; source must be a finished run of '
        'configs/ppo_ptx.py'
      )


def run(config, workdir: epath.Path):
  validate(config)
  root = epath.Path(config.workdir)
  return {
    figure: tax.write({name: root / name for name in names}, workdir / figure)
    for figure, names in config.figures.items()
  }
