"""The alignment tax of PPO runs, plotted as the paper's Figures 33 to 35.

  python -m instruct_jax.evals.tax NAME=RUN/ppo NAME=RUN/ppo_ptx --output=DIR

Reads the log of the PPO stage (`probe_every`, `eval_every`) and writes
`tax_along_rl.png` (Figure 35), `tax.json` and, for a coefficient in which the
runs differ, `tax_ptx_coef.png` (Figure 33) or `tax_kl_coef.png` (Figure 34).
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from instruct_jax import command
from instruct_jax.data import folders as folders_lib
from instruct_jax.data import records
from instruct_jax.evals import plots

_LOSS = 'eval/pretraining_loss'
# Shown besides the public tasks: metric of the run -> title.
_OTHERS = {
  _LOSS: 'pretraining loss, nats per token',
  'objective/score': 'reward-model score',
}
_COEFFICIENTS = {
  'ptx_coef': 'gamma, the pretraining coefficient',
  'kl_coef': 'beta, the KL coefficient',
}


def read_run(folder: epath.PathLike) -> tuple[list[dict], dict[str, Any]]:
  """(rows of metrics.jsonl, config) of a PPO stage.

  Raises:
    ValueError: a file is missing, or the config has no such stage.
  """
  folder = epath.Path(folder)
  metrics = folder / 'metrics.jsonl'
  if not metrics.exists():
    raise ValueError(f'{metrics}: no such file; give the folder of a PPO stage')
  rows = [json.loads(line) for line in metrics.read_text().splitlines() if line]
  for path in (folder / 'config.json', folder.parent / 'config.json'):
    if path.exists():
      config = json.loads(path.read_text())
      if 'stages' in config:
        if folder.name not in config['stages']:
          raise ValueError(f'{path}: has no stage {folder.name!r}')
        config = config['stages'][folder.name]
      missing = [key for key in _COEFFICIENTS if key not in config]
      if missing:
        raise ValueError(
          f'{folder} is no PPO stage: its config in {path} has no '
          + ' and no '.join(missing)
        )
      return rows, config
  raise ValueError(f'{folder}: neither it nor its parent has a config.json')


def _last(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
  """The last finite value of a metric, or None."""
  for row in reversed(rows):
    if row.get(key) is not None and math.isfinite(row[key]):
      return row[key]
  return None


def _summary(
  rows: Sequence[Mapping[str, Any]],
  config: Mapping[str, Any],
  tasks: Sequence[str],
) -> dict[str, Any]:
  """A run's coefficients, and its figures before RL and at the end."""
  before = {task: _last(rows, f'probe_before/{task}') for task in tasks}
  before[_OTHERS[_LOSS]] = _last(rows, f'{_LOSS}_before')
  return {
    **{key: config[key] for key in _COEFFICIENTS},
    'before': {k: v for k, v in before.items() if v is not None},
    'end': {
      **{task: _last(rows, f'probe/{task}') for task in tasks},
      **{title: _last(rows, key) for key, title in _OTHERS.items()},
    },
  }


def write(
  folders: Mapping[str, epath.PathLike], output: epath.PathLike
) -> list[str]:
  """Writes the plots and tax.json; returns the names of the files.

  Plots of an earlier sweep are removed (`data/folders.py`).

  Raises:
    ValueError: see `read_run` and `folders.writing`.
  """
  runs = {name: read_run(folder) for name, folder in folders.items()}
  logs = {name: rows for name, (rows, _) in runs.items()}
  tasks = plots.probe_names(logs)
  summary = {name: _summary(*run, tasks) for name, run in runs.items()}
  found = list(summary.values())
  files = {
    'tax.json': (json.dumps(summary, indent=2) + '\n').encode(),
    'tax_along_rl.png': plots.tax_along(logs),
  }
  before = {k: v for row in found for k, v in row['before'].items()}
  ends = {k: [row['end'][k] for row in found] for k in found[0]['end']}
  for key, label in _COEFFICIENTS.items():
    values = [row[key] for row in found]
    if len(set(values)) > 1:
      files[f'tax_{key}.png'] = plots.tax_against(values, ends, before, label)
  written = {name: content for name, content in files.items() if content}
  with folders_lib.writing(
    output, ('tax.json', 'tax_*.png'), command='tax', replace=True
  ) as unfinished:
    for name, content in written.items():
      records.write_bytes(unfinished / name, content)
  return list(written)


def main(arguments: Sequence[str] | None = None) -> int:
  """Plots the runs named on the command line; returns the exit status."""
  parser = command.Parser(description='Alignment tax of PPO runs.')
  parser.add_argument('runs', nargs='+', help='NAME=FOLDER of a PPO stage')
  parser.add_argument('--output', required=True)
  flags = parser.parse_args(arguments)
  folders = {}
  for run in flags.runs:
    name, separator, folder = run.partition('=')
    if not separator or name in folders:
      parser.error(f'expected NAME=FOLDER with distinct names: {run!r}')
    folders[name] = folder
  for name in write(folders, flags.output):
    print(f'{flags.output}/{name}')
  return 0


if __name__ == '__main__':
  command.end(main)
