"""What the run that a file comes from says about it.

Models and prompts that lie in a run's folder were made with lengths, and for a
world, that the run's config.json holds: who evaluates them need not say it all
again. How they were trained lies beside them.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from instruct_jax import files
from instruct_jax.infra import metrics, run

LENGTHS = ('prompt_length', 'response_length')
WORLD = 'world_seed'
# The stage that makes the world, and whose seed is the world's.
_WORLD_STAGE = 'instruct_jax.worlds.miniature'
# Files that a stage writes beside the model that it made.
_BESIDE = ('metrics.jsonl', 'alarms.json', 'epochs.json')
# Lines of these are no data.
_LOGS = (metrics.METRICS_FILE, metrics.TIMING_FILE)
_LOGS += ('samples.jsonl', 'judgements.jsonl', 'journal.jsonl')


def stages_of(path: str) -> tuple[epath.Path, dict[str, dict[str, Any]]]:
  """Folder of the run that `path` lies in, and name -> config of its stages.

  The stage that the path lies in comes first, then those that evaluate. Without
  a run, the folder is `path` itself and there are no stages.
  """
  is_remote = files.is_remote(path)
  place = epath.Path(path if is_remote else os.path.abspath(path))
  for folder in place.parents:
    if is_remote and not files.is_remote(folder):
      break  # Above the bucket.
    file = folder / 'config.json'
    if not file.exists():
      continue
    config = run.read_json(file)
    if 'stages' in config:
      stages = config['stages']
      own = place.relative_to(folder).parts[0]
      order = sorted(
        stages,
        key=lambda name: (
          name != own,
          stages[name].get('experiment') != 'evaluate',
        ),
      )
      return folder, {name: stages[name] for name in order}
    # A published model has a config.json as well.
    if 'experiment' in config:
      return folder, {config['name']: config}
  return place, {}


def with_lengths(config: ConfigDict) -> ConfigDict:
  """The config of a stage with its lengths that are None as measured.

  `config.lengths` names the JSON file that a data stage wrote; a stage without
  that key keeps its config.
  """
  if not config.get('lengths'):
    return config
  found = ConfigDict(config.copy_and_resolve_references())
  for key, value in run.read_json(config.lengths).items():
    if key in found and found[key] is None:
      found[key] = value
  return found


def _measured(folder: epath.Path, stage: Mapping[str, Any]) -> dict[str, Any]:
  """`with_lengths` of a stage as the config.json in `folder` has it."""
  # The file's path is kept without the folder of the run.
  file = folder / stage.get('lengths', '').lstrip('/')
  if not stage.get('lengths') or not file.exists():
    return dict(stage)
  lengths = run.read_json(file)
  return {k: lengths.get(k) if v is None else v for k, v in stage.items()}


def _lengths(path):
  folder, stages = stages_of(path)
  for name, stage in stages.items():
    stage = _measured(folder, stage)
    if all(stage.get(key) for key in LENGTHS):
      return {key: stage[key] for key in LENGTHS}, f'{folder}, stage {name}'
  return {}, ''


def _world(path):
  folder, stages = stages_of(path)
  for name, stage in stages.items():
    if stage.get('experiment') == _WORLD_STAGE:
      return {WORLD: stage['seed']}, f'{folder}, stage {name}'
  return {}, ''


def filled(
  config: ConfigDict,
  keys: Sequence[str],
  models: Mapping[str, str],
  prompts: str,
) -> ConfigDict:
  """The config with those of its keys that are None read from the runs.

  Prints a line about what was taken from where.

  Args:
    config: of a stage.
    keys: that it needs, of `LENGTHS` and `WORLD`; given ones stay.
    models: label -> folder of models; the lengths are theirs, or else those of
      the prompts.
    prompts: file of the prompts; the world is theirs.

  Raises:
    ValueError: a key is None and no run says it, or two runs say other things;
      the key is named.
  """
  config = ConfigDict(config.copy_and_resolve_references())
  for key in keys:
    if config[key] is not None:
      continue
    if key == WORLD:
      found = [_world(prompts)]
    else:
      found = [_lengths(path) for path in models.values()]
      found = [row for row in found if row[0]] or [_lengths(prompts)]
    where = [prompts] if key == WORLD else [*models.values(), prompts]
    config[key] = _agreed(config.name, key, found, where)
  return config


def _agreed(
  name: str,
  key: str,
  found: Sequence[tuple[dict[str, int], str]],
  where: Sequence[str],
) -> int:
  """What all places say that say something."""
  values = {row[key]: place for row, place in found if key in row}
  if not values:
    raise ValueError(
      f'{key} is not given, and no config.json of a run in whose folder '
      f'{" or ".join(where)} lies says it; set --config.{key}'
    )
  if len(values) > 1:
    said = ', '.join(f'{value} in {place}' for value, place in values.items())
    raise ValueError(
      f'{key} is not given, and the runs differ ({said}); set --config.{key}'
    )
  ((value, place),) = values.items()
  run.say(f'{name}: {key} is {value}, as in {place}')
  return value


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage of a run.

  Attributes:
    folder: its own.
    config: as the run's config.json has it.
    info: what it said in the end; {} where it has not finished.
    seconds: it took, or None.
  """

  folder: epath.Path
  config: Mapping[str, Any]
  info: Mapping[str, Any]
  seconds: float | None

  @property
  def records(self) -> dict[str, int]:
    """Data set that it wrote -> number of its records."""
    found = {}
    for path in sorted(self.folder.glob('*.jsonl')):
      if path.name not in _LOGS:
        with path.open('rb') as lines:
          found[path.stem] = sum(1 for _ in lines)
    return found


def stages_behind(
  paths: Sequence[str],
) -> dict[tuple[epath.Path, str], Stage]:
  """(folder of the run, name) -> finished stage, in running order, of the runs
  that paths lie in."""
  found = {}
  for folder in dict.fromkeys(stages_of(path)[0] for path in paths):
    file = folder / 'config.json'
    config = run.read_json(file) if file.exists() else {}
    stages, folders = {}, {}
    if 'stages' in config:
      stages = config['stages']
      folders = {name: folder / name for name in config['stage_order']}
    elif 'experiment' in config:
      stages, folders = {config['name']: config}, {config['name']: folder}
    for name, own in folders.items():
      if run.is_done(own):
        done = run.read_json(own / run.DONE_FILE)
        found[folder, name] = Stage(
          own,
          _measured(folder, stages[name]),
          done['info'] or {},
          done['seconds'],
        )
  return found


def beside(model: str) -> dict[str, Any]:
  """Contents of the files that a stage wrote beside a model, by name.

  Args:
    model: folder of a model; beside one that no stage made there are none.
  """
  return {
    name: metrics.read_lines(path)
    if path.endswith('.jsonl')
    else run.read_json(path)
    for name, path in paths_beside(model).items()
  }


def paths_beside(model: str) -> dict[str, str]:
  """Name -> path of the files that `beside` reads."""
  if model.startswith('hf:'):
    return {}
  paths = {name: epath.Path(model).parent / name for name in _BESIDE}
  return {name: str(path) for name, path in paths.items() if path.exists()}
