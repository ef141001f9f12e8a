"""Runs a config: one experiment, or the stages of a pipeline in order.

An experiment is a module with `validate(config)`, `run(config, workdir)`,
`inputs(config)` if it reads files, and `PROCESSES`. This says which of several
processes call `run`: 'all'; the 'first', while the others wait; or 'one', which
must be the only process. With `RUNS_AGAIN = True` it runs even if it has
finished.
"""

import contextlib
import importlib
import shlex
import sys
import time
from types import ModuleType

import jax
from etils import epath
from ml_collections import ConfigDict

from instruct_jax.infra import logger, measure, origin, run, stages

FOLDERS = ('experiments', 'instruct_jax.jobs')
PROCESSES = ('all', 'first', 'one')


def find_experiment(name: str) -> ModuleType:
  """Imports a module of `experiments` or `instruct_jax/jobs`, or a dotted name.

  Raises:
    ValueError: there is no such module, or it lacks a part of an experiment.
  """
  names = [name] if '.' in name else [f'{folder}.{name}' for folder in FOLDERS]
  for full in names:
    try:
      module = importlib.import_module(full)
      break
    except ModuleNotFoundError as error:
      # A module that this one imports may be missing.
      if error.name is None or not full.startswith(error.name):
        raise ValueError(f'{full}: {error}') from error
  else:
    where = ' or '.join(names)
    raise ValueError(
      f'no experiment {name!r}: there is no module {where}; experiment is the '
      "name of a file in experiments/ or jobs/ without '.py', or a dotted name"
    )
  for function in ('run', 'validate'):
    if not callable(getattr(module, function, None)):
      raise ValueError(
        f'{module.__name__} has no function {function}(config, ...)'
      )
  if getattr(module, 'PROCESSES', None) not in PROCESSES:
    raise ValueError(
      f'{module.__name__} must set PROCESSES to one of {PROCESSES}: which of '
      'several processes call its run'
    )
  return module


def run_stage(stage: stages.Stage, shown: logger.Logger) -> None:
  """Runs a stage in its folder, unless it has finished there.

  Args:
    stage: of a run.
    shown: the logger that shows the stage while it runs.
  """
  folder = stage.folder
  if run.agreed(stage.is_done) and not stage.runs_again:
    run.say(f'{stage.name}: already done, in {folder}')
    return
  run.say(f'{stage.name}: starts')
  measure.reset_peak()
  begin = time.monotonic()
  folder.mkdir(parents=True, exist_ok=True)
  seconds_file = folder / 'seconds.json'
  spent = run.read_json(seconds_file) if seconds_file.exists() else 0.0
  info = None
  try:
    run.in_first(lambda: stages.record_inputs(stage))
    if jax.process_index() == 0 or stage.experiment.PROCESSES != 'first':
      with shown:
        info = stage.experiment.run(origin.with_lengths(stage.config), folder)
  except (ValueError, OSError, RuntimeError) as error:
    error.stage = stage.name
    raise
  finally:
    seconds = spent + time.monotonic() - begin
    # If the disk is full or gone, the stage's own error is the one to raise.
    with contextlib.suppress(OSError):
      if folder.exists():
        run.write_json(seconds_file, seconds)
  peak = {'host': measure.peak_host_bytes()}
  if (on_device := measure.peak_device_bytes()) is not None:
    peak['device'] = on_device  # Since the process began.
  done = {'seconds': seconds, 'peak_bytes': peak, 'info': info}
  run.mark_done(folder, done)
  memory = ', '.join(f'{v / 2**30:.1f} GiB on the {k}' for k, v in peak.items())
  run.say(f'{stage.name}: done in {seconds:.1f} s, at most {memory}')


def check(
  config: ConfigDict, workdir: epath.Path, described: ConfigDict
) -> list[stages.Stage]:
  """Checks all keys and inputs of a run, and returns its stages.

  Args: see `run_all`.

  Raises:
    ValueError: a wrong key or a missing input.
  """
  found = stages.of_run(config, described, workdir, find_experiment)
  for stage in found:
    stages.validate(stage)
    is_idle = getattr(stage.experiment, 'is_idle', lambda config: False)
    if (
      jax.process_count() > 1
      and stage.experiment.PROCESSES == 'one'
      and not is_idle(stage.config)
    ):
      raise ValueError(
        f'{stage.name}: {stage.config.experiment} runs in a single process, '
        f'and there are {jax.process_count()}; leave it out of '
        '--config.stage_order, and run the same command without it in one '
        'process afterwards'
      )
  run.in_first(lambda: stages.find_missing(found))
  return found


def run_all(
  config: ConfigDict,
  workdir: epath.Path,
  described: ConfigDict,
  accept_new_inputs: bool = False,
) -> None:
  """Validates everything, then runs the experiment or all of its stages.

  Args:
    config: with `workdir` filled in.
    workdir: where the run lives.
    described: the config without this machine's paths.
    accept_new_inputs: continue with inputs whose contents have changed.

  Raises:
    ValueError: a wrong key or a missing input.
    run.WorkdirError: the directory is in use, or a stage in it began with
      another config or other inputs.
    run.Stopped: SIGTERM came, and everything that can be saved is saved.
  """
  found = check(config, workdir, described)
  loggers = config.loggers
  known = workdir / stages.CONFIG_FILE
  run.in_first(lambda: logger.check(loggers, is_new=not known.exists()))
  with run.StopSignal(at_once=True) as stop, run.lock_workdir(workdir):
    run.in_first(
      lambda: stages.check_unchanged(
        found, described, workdir, accept_new_inputs
      )
    )
    provenance = run.provenance(config.seed)
    run.write_json(
      workdir / 'provenance.json',
      {
        **provenance,
        'command': shlex.join(
          ['python', '-m', 'instruct_jax.main', *sys.argv[1:]]
        ),
      },
    )
    have_run = []
    for stage in found:
      if stop.requested:
        raise run.Stopped(f'stopped before {stage.name}', True)
      run.in_first(
        lambda stage=stage: stages.check_turn(
          stage, found, have_run, accept_new_inputs
        )
      )
      shown = logger.Logger(
        loggers,
        stage.folder,
        workdir.name,
        stage.name,
        {**stage.described, 'commit': provenance['commit']},
      )
      run_stage(stage, shown)
      have_run.append(stage.name)
