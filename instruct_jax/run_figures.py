"""Reads fields of `figures.Figures` from the runs that trained the models.

Metrics, alarms and epochs are files beside a model, and its run has a config.
They are read whatever the method is called.
"""

import collections
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from instruct_jax import asking, model_folder
from instruct_jax.evals import (
  figures,
  judges,
  model_card,
  preference_accuracy,
  released_samples,
  win_rate,
)
from instruct_jax.infra import checkpoint, origin
from instruct_jax.infra import metrics as metrics_lib
from instruct_jax.infra import run as run_lib

# Keys with these prefixes say how a stage ran, not what it learned. The model
# card leaves them out.
_MACHINERY = (
  *('attention', 'checkpoint_', 'compute_dtype', 'eval_', 'experiment', 'log'),
  *('frozen_dtype', 'gather_', 'loop', 'max_valid_', 'mesh', 'name', 'offload'),
  *('num_microbatches', 'num_slices', 'num_slots', 'pack', 'probe', 'remat'),
  *('sampler_', 'scan_', 'seed', 'snapshot_', 'vocab_multiple', 'workdir'),
)


def of_models(config, models: Mapping[str, asking.Model]) -> dict[str, Any]:
  """Training, data, hygiene and alarms of the models, without recorded ones."""
  loaded = {n: m.source for n, m in models.items() if not m.is_recorded}
  stages = _stages(loaded, config.reward_model)
  rl, alarms, epochs, seen = {}, [], {}, set()
  for name, source in loaded.items():
    folder = epath.Path(source).parent
    if folder in seen:
      continue
    seen.add(folder)
    beside = origin.beside(source)
    rows = beside.get(metrics_lib.METRICS_FILE, ())
    if any('objective/kl' in row for row in rows):
      rl[name] = rows
    alarms += [
      f'{name}: {text}' for text in beside.get('alarms.json', {}).values()
    ]
    if 'epochs.json' in beside and models[name].has_columns:
      info = next((s.info for s in stages.values() if s.folder == folder), {})
      epochs[name] = figures.Epochs(
        beside['epochs.json'],
        info.get('selected_epoch'),
        info.get('selected_by', ''),
      )
  sizes, hygiene = {}, {}
  for (run, _), stage in stages.items():
    sizes |= {(run, key): size for key, size in stage.records.items()}
    if (stage.folder / 'hygiene.json').exists():
      dropped = run_lib.flat(run_lib.read_json(stage.folder / 'hygiene.json'))
      hygiene |= {
        (run, key.replace('.', ' ')): count
        for key, count in dropped.items()
        if count != {}
      }
  named = _unique(stages)
  return {
    'rl_metrics': rl,
    'alarms': alarms,
    'epochs': epochs,
    'parameters': {
      name: model_folder.shape_of(source).num_params
      for name, source in loaded.items()
    },
    'trained': {
      name: figures.Training(
        settings_of(stage.config), operations_of(config, stage)
      )
      for name, stage in named.items()
      if _made(stage) is not None and 'learning_rate' in stage.config
    },
    'seconds': {name: stage.seconds for name, stage in named.items()},
    'data_sizes': _unique(sizes),
    'hygiene': _unique(hygiene),
  }


def _stages(
  loaded: Mapping[str, str], reward_model: str
) -> dict[tuple[str, str], origin.Stage]:
  """(run, name) -> stage behind the models; a run is named by its models."""
  called = {}
  for name, source in loaded.items():
    called.setdefault(origin.stages_of(source)[0], []).append(name)
  sources = [*loaded.values()]
  if reward_model:
    sources.append(reward_model)
    called.setdefault(origin.stages_of(reward_model)[0], ['reward_model'])
  return {
    (', '.join(called[folder]), name): stage
    for (folder, name), stage in origin.stages_behind(sources).items()
  }


def _unique(values: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
  """Renames (run, name) to name, or to `name (run)` if several runs have it."""
  number = collections.Counter(name for _, name in values)
  return {
    f'{name} ({run})' if number[name] > 1 else name: value
    for (run, name), value in values.items()
  }


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
  """The settings of a stage's method: dotted key -> value."""
  return {
    key: value
    for key, value in run_lib.flat(config).items()
    if value not in ('', None, [])
    and '/' not in str(value)
    and not any(part.startswith(_MACHINERY) for part in key.split('.'))
    and (not key.startswith('lora.') or config['lora']['rank'])
  }


def _made(stage: origin.Stage):
  """The folder of the model that a stage made, or None."""
  paths = [stage.folder / name for name in ('policy', 'model')]
  return next((path for path in paths if path.exists()), None)


def operations_of(config, stage: origin.Stage) -> float | None:
  """Floating-point operations of a stage's training, by formula.

  RL is counted by episodes, a reward model by rankings, other training by rows
  of text. None for any other stage, and if a length or a shape is unknown.
  """
  own, size = stage.config, model_folder.shape_of(_made(stage)).num_params
  has_adapters = bool(own.get('lora', {}).get('rank'))
  if 'num_episodes' in own:
    scalar = 0
    if own['reward_model']:
      place = epath.Path(f'{stage.folder.parent}{own["reward_model"]}')
      try:
        scalar = model_folder.shape_of(
          place if place.exists() else own['reward_model']
        ).num_params
      except (checkpoint.CheckpointError, ValueError):
        return None  # The run was copied without its reward model.
    text = own['num_episodes'] * own['num_epochs'] * own['ptx_per_episode']
    return model_card.rl_operations(
      size,
      scalar,
      scalar or size if 'value_learning_rate' in own else 0,
      own['num_episodes'],
      own['prompt_length'] + own['response_length'],
      own['num_epochs'],
      text * own['ptx_row_length'] if own['ptx_coef'] > 0 else 0,
      has_adapters,
    )
  results = stage.folder / 'results.json'
  if 'comparisons' in own and results.exists():
    # Each prompt with each of its answers, at the lengths of this evaluation.
    lengths = config.prompt_length, config.response_length
    if None in lengths:  # Recorded answers need none.
      return None
    answers = run_lib.read_json(results)['num_forwards'] * own['num_epochs']
    tokens = answers * sum(lengths)
    return model_card.training_operations(size, tokens, has_adapters)
  metrics = stage.folder / metrics_lib.METRICS_FILE
  if 'row_length' in own and metrics.exists():
    rows = metrics_lib.read_lines(metrics)[-1]['step'] * own['batch_size']
    tokens = rows * own['row_length']
    return model_card.training_operations(size, tokens, has_adapters)
  return None


# --- Rankings, reward model and suite -----------------------------------------


def of_reward_model(
  config, rankings: Mapping[str, figures.Rankings], judge: judges.Judge
) -> figures.RewardFigures | None:
  """The figures of `config.reward_model`; None without rankings."""
  if not rankings:
    return None
  folds = {}
  if config.crossval:
    results = run_lib.read_json(config.crossval)
    folds = {
      name: preference_accuracy.Spread(
        results[name]['mean'], results[name]['error'], len(results['runs'])
      )
      for name in ('intra', 'inter')
    }
  first = next(iter(rankings.values())).accuracies
  ceiling = None
  if judge.is_ceiling and 'judge' in first:
    ceiling = first['judge'].accuracy
  curve = origin.beside(config.reward_model).get(metrics_lib.METRICS_FILE, ())
  return figures.RewardFigures(
    rankings=rankings, ceiling=ceiling, curve=curve, **folds
  )


def of_suite(path: str) -> dict[str, Any]:
  """Reads scores and judges from a suite.json; {} for '' or a missing file."""
  if not path or not epath.Path(path).exists():
    return {}
  result = run_lib.read_json(path)
  found = {}
  for cell in result['cells']:
    row = found.setdefault(released_samples.line_name(cell), {})
    row[cell['model']] = win_rate.Interval(
      cell['score'], cell['low'], cell['high'], cell['num_items']
    )
  return {'suite': found, 'suite_judges': result['judges']}


def of_labeling(rankings: Iterable[str]) -> dict[str, Any]:
  """Reads the labeling site's statistics.json beside rankings; {} if none."""
  for path in rankings:
    found = epath.Path(path).parent / 'statistics.json'
    if found.exists():
      return run_lib.read_json(found)
  return {}
