"""Plots the alignment tax of a sweep of PPO runs (E.6, Figures 33 to 35)."""

from etils import epath

from instruct_jax.evals import tax

PROCESSES = 'first'

_PARTS = ('rl_init/model', 'reward/model', 'data/tokenizer')


def validate(config):
  """Checks the config. ValueError if `source` is empty."""
  if not config.source:
    raise ValueError(
      'source is empty; give the folder of a finished run of configs/ppo_ptx.py'
    )


def inputs(config):
  """Parts of the source run, checked before hours of RL begin.

  The plots themselves read the stages of the sweep's own run.
  """
  return {f'source/{part}': f'{config.source}/{part}' for part in _PARTS}


def run(config, workdir: epath.Path):
  """Draws each figure of the sweep; returns figure -> names of its files.

  Reads the metrics and probes of the sweep's stages. Writes plots and tax.json
  into one folder per figure.
  """
  validate(config)
  root = epath.Path(config.workdir)
  return {
    figure: tax.write({name: root / name for name in names}, workdir / figure)
    for figure, names in config.figures.items()
  }
