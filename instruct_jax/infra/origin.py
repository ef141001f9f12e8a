"""Looks up what the run that made a model or a file recorded about it.

The run's config.json has the lengths and the world that its models and prompts
were made for, so an evaluation need not set them again. Files beside a model
tell how it was trained.
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
# The stage that makes the world; its `seed` is the world's seed.
_WORLD_STAGE = 'instruct_jax.worlds.miniature'
# Files that a stage writes beside its model.
_BESIDE = ('metrics.jsonl', 'alarms.json', 'epochs.json')
# JSON-lines files that are not data sets.
_LOGS = (metrics.METRICS_FILE, metrics.TIMING_FILE)
_LOGS += ('samples.jsonl', 'judgements.jsonl', 'journal.jsonl')


def stages_of(path: str) -> tuple[epath.Path, dict[str, dict[str, Any]]]:
  """Returns the folder of the run that contains `path`, and its stages.

  Stages are name -> config: first the one that contains the path, then those
  that evaluate, then the others. Outside of a run, the folder is `path` itself
  and there are no stages.
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


def fill(stage: Any, lengths: Mapping[str, Any]) -> None:
  """Sets the keys of a stage's config that are None to measured lengths."""
  for key, value in lengths.items():
    if key in stage and stage[key] is None:
      stage[key] = value


def with_lengths(config: ConfigDict) -> ConfigDict:
  """Returns a stage's config with measured lengths where they are None.

  `config.lengths` names the JSON file that a data stage wrote; without that key
  the config is returned unchanged.
  """
  if 'lengths' not in config:
    return config
  found = ConfigDict(config.copy_and_resolve_references())
  fill(found, run.read_json(config.lengths))
  return found


def _measured(folder: epath.Path, stage: Mapping[str, Any]) -> dict[str, Any]:
  """Like `with_lengths`, for a stage's config in the config.json of a run."""
  found = dict(stage)
  if 'lengths' in found:
    # config.json has the file's path without the folder of the run.
    file = folder / found['lengths'].lstrip('/')
    fill(found, run.read_json(file) if file.exists() else {})
  return found


def _said(path, key):
  """Value of a key (`LENGTHS`, `WORLD`) -> the stage that has it; or {}."""
  folder, stages = stages_of(path)
  for name, stage in stages.items():
    stage, place = _measured(folder, stage), f'{folder}, stage {name}'
    if key == WORLD and stage.get('experiment') == _WORLD_STAGE:
      return {stage['seed']: place}
    if key != WORLD and all(stage.get(length) for length in LENGTHS):
      return {stage[key]: place}
  return {}


def filled(
  config: ConfigDict,
  keys: Sequence[str],
  models: Mapping[str, str],
  prompts: str,
) -> ConfigDict:
  """Returns the config with keys that are None filled in from earlier runs.

  Prints each value and its source. Lengths come from the runs of the models,
  or else from the run of the prompts; the world comes from the run of the
  prompts.

  Args:
    config: a stage's config.
    keys: the keys of `LENGTHS` and `WORLD` that the stage needs.
    models: label -> folder.
    prompts: file of the prompts.

  Raises:
    ValueError: a key is None and no run has it, or two runs differ.
  """
  config = ConfigDict(config.copy_and_resolve_references())
  for key in keys:
    if config[key] is not None:
      continue
    where = [] if key == WORLD else [*models.values()]
    values = {}
    for path in where:
      values |= _said(path, key)
    values = values or _said(prompts, key)
    if not values:
      raise ValueError(
        f'{key} is not given, and no run that contains '
        f'{" or ".join([*where, prompts])} records it; set --config.{key}'
      )
    if len(values) > 1:
      found = ', '.join(
        f'{value} in {place}' for value, place in values.items()
      )
      raise ValueError(
        f'{key} is not given, and the runs differ ({found}); set --config.{key}'
      )
    ((config[key], place),) = values.items()
    run.say(f'{config.name}: {key} is {config[key]}, as in {place}')
  return config


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage of a run.

  Attributes:
    folder: the stage's folder.
    config: from the run's config.json.
    info: what its `run` returned; {} if nothing.
    seconds: how long it took.
  """

  folder: epath.Path
  config: Mapping[str, Any]
  info: Mapping[str, Any]
  seconds: float

  @property
  def records(self) -> dict[str, int]:
    """Name -> number of records, for each data set that the stage wrote."""
    found = {}
    for path in sorted(self.folder.glob('*.jsonl')):
      if path.name not in _LOGS:
        with path.open('rb') as lines:
          found[path.stem] = sum(1 for _ in lines)
    return found


def stages_behind(paths: Sequence[str]) -> dict[tuple[epath.Path, str], Stage]:
  """Returns the finished stages of all runs that contain the paths.

  Keys are (folder of the run, name of the stage), in the order of running.
  """
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
  """Name -> content of the files that a stage wrote beside a model folder."""
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
