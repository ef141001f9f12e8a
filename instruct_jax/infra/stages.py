"""Checks before the stages of a run start, or start again.

Keys must be in range, inputs must exist or be made by an earlier stage, and a
stage that has saved anything must continue with the config and inputs that it
began with.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from instruct_jax.infra import inputs, loop, run

CONFIG_FILE = 'config.json'
HISTORY_FILE = 'config_history.json'
_MAX_LINES = 20

# Sizes that must be at least 1 in any stage; 0 would fail late or do nothing.
_AT_LEAST_ONE = (
  *('batch_size', 'eval_batch_size', 'eval_every', 'num_epochs'),
  *('num_microbatches', 'row_length', 'prompt_length', 'response_length'),
  *('num_minibatches', 'num_episodes', 'samples_per_prompt', 'num_slices'),
  *('checkpoint_every', 'words_per_document', 'prompts_per_user'),
  *('duplicate_prefix_words', 'num_steps', 'log_every'),
)
# (key, rule for the error message, test), for keys that mean the same in every
# stage.
_NUMBERS = (
  *((key, 'be at least 1', lambda x: x >= 1) for key in _AT_LEAST_ONE),
  *(
    (f'max_{name}', 'not be negative (0 for all)', lambda x: x >= 0)
    for name in ('demonstrations', 'comparisons', 'valid_comparisons')
  ),
  *(
    (key, 'be positive and finite', lambda x: 0 < x < math.inf)
    for key in ('learning_rate', 'value_learning_rate')
  ),
  *(
    (key, 'be in [0, 1)', lambda x: 0 <= x < 1)
    for key in ('adam_b1', 'adam_b2')
  ),
  *(
    (key, 'be finite, and not negative', lambda x: 0 <= x < math.inf)
    for key in ('kl_coef', 'adam_eps')
  ),
  *(
    (key, 'not be negative (0 for none)', lambda x: x >= 0)
    for key in ('snapshot_every', 'probe_every', 'num_warmup_iterations')
  ),
  ('reward_weight', 'be finite', math.isfinite),
  (
    'max_grad_norm',
    'not be negative (0 for no clipping)',
    lambda x: x >= 0,
  ),
  ('max_candidates', 'be at least 2', lambda x: x >= 2),
  ('seed', 'not be negative', lambda x: x >= 0),
  (
    'temperature',
    'be finite and not negative (0 takes the most probable token)',
    lambda x: 0 <= x < math.inf,
  ),
  (
    'mesh',
    'be () or three numbers, devices along data, fsdp and tensor',
    lambda x: len(x) in (0, 3),
  ),
)

# Keys that may change at any time, as may all keys nested below them: results
# stay the same, except for rounding.
MAY_CHANGE = {
  'mesh': 'over which devices arrays are cut',
  'xla_flags': 'how programs are compiled',
  'compilation_cache': 'where compiled programs are kept',
  'default_workdir': 'where a run without --workdir lives',
  'loggers': 'which services show a run',
  'loop': 'how a loop saves, stops and is traced',
  'checkpoint_every': 'how much a kill can cost',
  'remat': 'what the backward pass recomputes',
  'attention': 'which kernel computes it',
  'logprob_chunk': 'how many logits exist at a time',
  'scan_unroll': 'how many layers are unrolled',
  'num_slices': 'in how many parts a batch is scored',
  'num_slots': "a sample's noise belongs to its prompt, not to its slot",
  'gather_weights': 'where the weights lie while tokens are sampled',
  'offload': 'which weights wait in host memory',
  'pack_episodes': 'how episodes are laid out in rows',
  'pack_spare': 'how episodes are laid out in rows',
  'eval_batch_size': 'how many rows are evaluated at a time',
  'probe_batch_size': 'how many queries are asked at a time',
  'length_multiple': 'padding',
  'cache': 'where answers are kept, by a hash of all they depend on',
  'timeout': 'how long to wait for a service',
  'max_retries': 'how often to ask a service again',
  'url': 'where a service is; the model that it serves stays',
  'requests_per_minute': 'how fast to ask a service',
  'num_workers': 'how many questions are asked at a time',
  'num_processes': 'how many runs of a study go at a time',
  'seeds': 'which runs a study judges',
  'records': 'which of them ran elsewhere',
  'key_variable': 'which variable holds the key of a service',
  'max_answers': 'what is refused beforehand',
}
# Keys added in later versions -> the value that keeps the earlier behaviour.
_ADDED = {'max_demonstrations': 0, 'context_length': 0}


def _dropout(stage: Mapping[str, Any]) -> float:
  return stage.get('dropout', stage.get('model.dropout', 0.0))


# Keys that may change in stages for which the condition holds.
MAY_CHANGE_IF: dict[str, Callable[[Mapping[str, Any]], bool]] = {
  # Gradients are summed over the batch, however it is split. But each
  # microbatch draws its own dropout, and RL assigns episodes by length.
  'num_microbatches': lambda stage: (
    not _dropout(stage) and 'num_episodes' not in stage
  ),
  # Without training it only sets how many rows run at a time.
  'batch_size': lambda stage: 'learning_rate' not in stage,
  # RL lays out the same episodes either way; in SFT it changes the batches.
  'pack': lambda stage: 'num_episodes' in stage,
}

# Files of a stage that a restart does not need, so they are no progress.
# Without a checkpoint, lines of metrics are written again.
_NO_PROGRESS = (
  *(inputs.INPUTS_FILE, inputs.ACCEPTED_FILE, CONFIG_FILE, HISTORY_FILE),
  *('provenance.json', 'seconds.json', 'metrics.jsonl', 'timing.jsonl'),
  *('logger.json', 'tensorboard', 'wandb', 'profile'),
)


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of a run, or a run of one stage.

  Attributes:
    config: with this machine's paths.
    described: dotted key -> value without these paths, as in config.json.
    folder: the stage's folder in the work directory, or that directory itself.
    prefix: of the stage's keys on the command line, such as 'stages.sft.'.
    experiment: the module, or None.
  """

  config: ConfigDict
  described: Mapping[str, Any]
  folder: epath.Path
  prefix: str
  experiment: ModuleType | None

  @property
  def name(self) -> str:
    """The name that paths and messages use."""
    return self.config.name

  @property
  def is_done(self) -> bool:
    """Whether it has finished, now or earlier."""
    return run.is_done(self.folder)

  @property
  def runs_again(self) -> bool:
    """Whether it runs even if it has finished, to pick up new inputs."""
    return getattr(self.experiment, 'RUNS_AGAIN', False)

  @property
  def has_progress(self) -> bool:
    """Whether it has saved anything that a restart needs."""
    if not self.folder.exists():
      return False
    reads = self.inputs().values()
    for path in self.folder.iterdir():
      if path.name == 'checkpoints':
        if any(step.name.isdigit() for step in path.iterdir()):
          return True
      elif path.name in _NO_PROGRESS or path.name.startswith('.'):
        continue
      elif not any(_is_within(read, path) for read in reads):
        return True
    return False

  def inputs(self) -> dict[str, str]:
    """Label -> path of its inputs; see `inputs.read_by`."""
    found = inputs.read_by(self.experiment, self.config)
    if 'lengths' in self.config:
      found['lengths'] = self.config.lengths
    return found

  def key(self, label: str) -> str:
    """The command-line key of an input; '' if there is none."""
    key = inputs.key_of(label, self.described)
    return f'{self.prefix}{key}' if key in self.described else ''


def of_run(
  config: ConfigDict,
  described: ConfigDict,
  workdir: epath.Path,
  find_experiment: Callable[[str], ModuleType],
) -> list[Stage]:
  """The stages of a config, in order.

  Args:
    config: with `workdir` filled in.
    described: the same without this machine's paths.
    workdir: where the run lives.
    find_experiment: name -> module.

  Raises:
    ValueError: `stage_order` has an unknown or repeated name.
  """
  if 'stages' not in config:
    values = run.flat(run.plain(described))
    experiment = find_experiment(config.experiment)
    return [Stage(config, values, workdir, '', experiment)]
  unknown = [name for name in config.stage_order if name not in config.stages]
  repeated = len(config.stage_order) - len(set(config.stage_order))
  if unknown or repeated:
    raise ValueError(
      f'stage_order must hold names of stages, each once: {unknown or ""} '
      f'{config.stage_order}; known: {", ".join(config.stages)}'
    )
  return [
    Stage(
      config.stages[name],
      run.flat(run.plain(described.stages[name])),
      workdir / config.stages[name].name,
      f'stages.{name}.',
      find_experiment(config.stages[name].experiment),
    )
    for name in config.stage_order
  ]


# --- Keys ---------------------------------------------------------------------


def check_numbers(name: str, config: ConfigDict) -> None:
  """Raises ValueError with the stage and the key for a number out of range."""
  for key, rule, holds in _NUMBERS:
    if key not in config or config[key] is None:
      continue
    if not holds(config[key]):
      raise ValueError(f'{name}: {key} must {rule}, got {config[key]}')


def validate(stage: Stage) -> None:
  """Raises ValueError, with the stage and the key, if a config is wrong."""
  check_numbers(stage.name, stage.config)
  try:
    if 'loop' in stage.config and 'checkpoint_every' in stage.config:
      keys = {'log_every', 'checkpoint_every'} & set(stage.config)
      loop.check(
        **{key: stage.config[key] for key in keys}, **stage.config.loop
      )
    stage.experiment.validate(stage.config)
  except ValueError as error:
    raise ValueError(f'{stage.name}: {error}') from error
  except (AttributeError, KeyError) as error:
    key = str(error).replace('\\', '').split('\n')[0].strip('\'"')
    if not key.isidentifier() or key in stage.config:
      raise  # A bug in the experiment.
    raise ValueError(
      f'{stage.name}: {stage.experiment.__name__} reads the key {key!r}, which '
      'the config of this stage lacks; declare it in a file of configs/, as '
      'configs/rloo.py does for its stage'
    ) from error


def may_change(key: str, stage: Mapping[str, Any]) -> bool:
  """Whether a key may change in a stage, given as dotted key -> value."""
  parts = key.split('.')
  if any(part in MAY_CHANGE for part in parts):
    return True
  return parts[-1] in MAY_CHANGE_IF and MAY_CHANGE_IF[parts[-1]](stage)


# --- Missing inputs -----------------------------------------------------------


def find_missing(
  stages: Sequence[Stage], have_run: Iterable[str] = ()
) -> dict[str, str]:
  """Checks that all inputs of stages still to run exist or will be made.

  Args:
    stages: of the run, in order.
    have_run: names of stages that this process has already run: it will not
      make their missing outputs any more.

  Returns:
    Name -> reason, for finished stages that must run again because their
    outputs are gone and still needed.

  Raises:
    ValueError: inputs that no stage will make are missing; one line each.
  """
  again, missing = {}, {}
  for number in reversed(range(len(stages))):
    stage = stages[number]
    if stage.is_done and stage.name not in again:
      continue
    for label, path in reversed(stage.inputs().items()):
      reason, maker = inputs.problem(path), _maker(path, stages[:number])
      if not reason and maker is not None:
        reason = inputs.torn(path)
      if not reason:
        continue
      if maker is not None and maker.is_done and maker.name in have_run:
        reason = (
          f'{path} is missing, though {maker.name} is done; delete '
          f'{maker.folder} to run {maker.name} from its start'
        )
        maker = None
      if maker is None:
        key = label if reason == inputs.EMPTY else reason
        missing.setdefault(key, []).insert(0, (stage, label, reason))
      elif maker.is_done:
        again.setdefault(
          maker.name, f'{path}, which {stage.name} reads, is gone'
        )
  if missing:
    lines = [_missing(*found) for found in reversed(missing.values())]
    raise ValueError('\n'.join(lines))
  return again


def check_turn(
  stage: Stage,
  stages: Sequence[Stage],
  have_run: Sequence[str],
  accept_new_inputs: bool,
) -> None:
  """Calls `find_missing` and `check_inputs` just before a stage runs.

  Marks finished stages that have to run again as not done.
  """
  again = find_missing(stages, have_run)
  for other in stages:
    if other.name in again:
      run.say(f'{other.name}: {again[other.name]}; it runs again')
      run.mark_undone(other.folder)
  check_inputs([stage], stages, accept_new_inputs)


def _maker(path: str, stages: Sequence[Stage]) -> Stage | None:
  """The stage whose folder contains a path, or None."""
  for stage in stages:
    if stage.prefix and _is_within(path, stage.folder):
      return stage
  return None


def _is_within(path: str, folder: epath.Path) -> bool:
  # Both come from the same config, so they are spelled alike.
  return f'{path}/'.startswith(f'{folder}/')


def _missing(*found) -> str:
  """A line about one missing input, which several stages may read."""
  stage, label, reason = found[0]
  key = stage.key(label)
  who = stage.name
  if len(found) > 1:
    who += f' (and {", ".join(other.name for other, _, _ in found[1:])})'
  if not key:  # An output of an earlier stage.
    return f'{who}: {reason}'
  if reason == inputs.EMPTY:
    other = ', or a reward_fn' * (label == 'reward_model')
    return f'{who}: {label} is empty; give --config.{key}=PATH{other}'
  return f'{who}: {label}: {reason}; correct --config.{key}'


# --- Changes since the last start ---------------------------------------------


def check_unchanged(
  stages: Sequence[Stage],
  described: ConfigDict,
  workdir: epath.Path,
  accept_new_inputs: bool,
) -> None:
  """Compares config and inputs with those that each stage began with.

  Writes config.json, which keeps stages that this config lacks, and appends the
  changes to config_history.json.

  Args:
    stages: of the run, in order.
    described: the whole config, without this machine's paths.
    workdir: where the run lives.
    accept_new_inputs: see `check_inputs`.

  Raises:
    run.WorkdirError: they differ for a stage that has saved anything.
  """
  now, path = run.plain(described), workdir / CONFIG_FILE
  saved = run.read_json(path) if path.exists() else None
  lines, changed, notes = [], [], []
  for stage in stages if saved is not None else ():
    before = _saved(saved, stage)
    if before is None:
      continue
    found, noted = _changes(stage, before)
    notes += noted
    if found:
      changed.append(stage)
      lines += found
  if lines:
    raise run.WorkdirError(
      f'{workdir} was created with a different config:\n{_listed(lines)}\n'
      'Go back to these values, choose another --workdir, or '
      + _start_anew(changed, stages)
    )
  check_inputs(stages, stages, accept_new_inputs)
  for note in notes:
    run.say(note)
  _save(workdir, saved, now)


def _saved(saved, stage):
  """The flat config saved for a stage, or None if there was no such stage."""
  if stage.prefix:
    saved = saved.get('stages', {}).get(stage.prefix.split('.')[1])
  return None if saved is None else run.flat(saved)


def _changes(stage, before):
  """Messages about changed keys that must not change, and about the others."""
  state = _state(stage)
  moved = _moved(stage) if state else ()
  lines, notes = [], []
  for key in sorted({*before, *stage.described}):
    old, new = (
      json.dumps(values[key]) if key in values else '(no such key)'
      for values in (before, stage.described)
    )
    is_new = key not in before and key.rpartition('.')[2] in _ADDED
    if old == new or (
      is_new and stage.described[key] == _ADDED[key.rpartition('.')[2]]
    ):
      continue
    text = f'{stage.prefix}{key}: was {old}, is now {new}'
    if may_change(key, before) and may_change(key, stage.described):
      notes.append(f'{stage.name}: {text}; this change is allowed')
    elif not state:
      notes.append(f'{stage.name}: {text}; nothing of it was saved yet')
    elif key in moved:
      notes.append(f'{stage.name}: {text}; the contents are the same')
    else:
      lines.append(f'{stage.name} is {state}; {text}')
  return lines, notes


def _state(stage) -> str:
  if stage.is_done:
    return 'finished'
  return 'under way' if stage.has_progress else ''


def _moved(stage):
  """Keys whose paths may change, since `check_inputs` compares the contents."""
  known, paths = inputs.known(stage.folder), stage.inputs()

  def of_key(key, labels):
    return {x for x in labels if inputs.key_of(x, stage.described) == key}

  return {
    key
    for key in stage.described
    if (now := of_key(key, paths))
    and now == of_key(key, known)
    and not any(inputs.problem(paths[label]) for label in now)
  }


def check_inputs(
  chosen: Iterable[Stage], stages: Sequence[Stage], accept_new_inputs: bool
) -> None:
  """Compares the inputs of the chosen stages with those they began with.

  Raises:
    run.WorkdirError: the contents of an input have changed. With
      `accept_new_inputs` the new ones are recorded instead.
  """
  lines, changed = [], []
  for stage in chosen:
    state = _state(stage)
    paths = {
      label: path
      for label, path in stage.inputs().items()
      # An incomplete output will be made again by its stage.
      if _maker(path, stages) is None or not inputs.torn(path)
    }
    found = inputs.differences(stage.folder, paths) if state else {}
    if found and accept_new_inputs:
      inputs.accept(stage.folder, found)
    elif found:
      changed.append(stage)
    for label, (before, after) in found.items():
      text = (
        f'{stage.name} is {state}; {stage.key(label) or label}: '
        f'{after["path"]} had '
        f'SHA-256 {before["sha256"][:12]}, now {after["sha256"][:12]}'
      )
      if accept_new_inputs:
        run.say(f'{text}; accepted')
      lines.append(text)
  if changed:
    raise run.WorkdirError(
      'inputs have changed since these stages began:\n'
      f'{_listed(lines)}\nRestore them, continue with the new ones by '
      '--accept_new_inputs, or ' + _start_anew(changed, stages)
    )


def record_inputs(stage: Stage) -> None:
  """Writes inputs.json when a stage begins; a resumed stage keeps its file."""
  path = stage.folder / inputs.INPUTS_FILE
  if stage.has_progress and path.exists():
    return
  (stage.folder / inputs.ACCEPTED_FILE).unlink(missing_ok=True)
  run.write_json(path, inputs.hashes(stage.inputs()))


def _listed(lines):
  left_out = len(lines) - _MAX_LINES
  if left_out > 0:
    lines = [*lines[:_MAX_LINES], f'and {left_out} more']
  return '\n'.join(f'  {line}' for line in lines)


def _start_anew(changed, stages):
  """Advice to delete the changed stages and all that read their outputs."""
  found = []
  for stage in stages:
    reads = stage.inputs().values()
    if stage in changed or any(
      _is_within(path, other.folder) for path in reads for other in found
    ):
      found.append(stage)
  folders = [str(stage.folder) for stage in found if stage.folder.exists()]
  return (
    'delete these folders, and the same command makes them again: '
    + ' '.join(folders)
  )


def _save(workdir, saved, now):
  """Writes config.json, and appends its changes to the history."""
  if saved is not None and 'stages' in now:
    # Keeps stages that this config lacks: the next one may have them again.
    kept = saved.get('stages', {})
    names = set(now['stage_order']) | (set(now['stages']) - set(kept))
    new = {name: now['stages'][name] for name in sorted(names)}
    now = {**now, 'stages': kept | new}
  if saved == now:
    return
  if saved is not None:
    before, after, path = run.flat(saved), run.flat(now), workdir / HISTORY_FILE
    rows = run.read_json(path) if path.exists() else []
    changes = {
      key: [before.get(key), after.get(key)]
      for key in sorted({*before, *after})
      if before.get(key) != after.get(key)
    }
    rows.append({'time': run.timestamp(), 'changes': changes})
    run.write_json(path, rows)
  run.write_json(workdir / CONFIG_FILE, now)
