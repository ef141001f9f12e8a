"""Runs an experiment, or a pipeline of them, from a config file.

  python -m instruct_jax.main --config=configs/ppo_ptx.py
  python -m instruct_jax.main --config=configs/ppo_ptx.py:smoke --workdir=/tmp/x

A config with `stages` is a pipeline: its stages run in order, each into a
folder of its own, and one that has finished is not run again. The same command
continues a run that was cut.
"""

import os
import signal

if __name__ == '__main__':
  # The imports below take seconds, in which there is nothing to save.
  def stop_at_once(number, frame) -> None:
    del number, frame
    os.write(2, b'stopped before anything began; the same command starts\n')
    os._exit(75)

  signal.signal(signal.SIGTERM, stop_at_once)

import contextlib
import ctypes
import importlib
import shlex
import sys
import time
import traceback

from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from instruct_jax import command, files

# Experiments without a device: of several processes only the first runs them.
HOST_EXPERIMENTS = ('miniature_data', 'e2e_data', 'hh_data', 'tax')

# Experiments whose host side has not been told apart: one process.
SINGLE_EXPERIMENTS = (
  'preferences',
  'best_of_n',
  'nlp_suite',
  'reward_baselines',
  'sample',
  'plan',
  'benchmark',
  'center_reward',
)

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config file, say configs/ppo_ptx.py:smoke.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where the run lives; config.default_workdir if not given.'
)
_ACCEPT_NEW_INPUTS = flags.DEFINE_bool(
  'accept_new_inputs',
  False,
  'Go on where files that a stage began with have other contents now.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  "HOST:PORT of process 0 where there are several; 'auto' on a TPU pod.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, "How many there are; not with 'auto'."
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, "This one's number, from 0; not with 'auto'."
)


def find_experiment(name: str):
  """The experiment module `experiments.NAME` or any dotted module name.

  Raises:
    ValueError: there is no such module, or it lacks `run` or `validate`.
  """
  full = name if '.' in name else f'experiments.{name}'
  try:
    module = importlib.import_module(full)
  except ModuleNotFoundError as error:
    raise ValueError(f'no experiment {full!r}: {error}') from error
  for function in ('run', 'validate'):
    if not hasattr(module, function):
      raise ValueError(f'{full} has no function {function}(config, ...)')
  return module


def run_stage(stage) -> None:
  """Runs one `stages.Stage` in its folder, unless it has finished there."""
  import jax

  from instruct_jax.infra import run as run_lib
  from instruct_jax.infra import stages as stages_lib

  config, folder = stage.config, stage.folder
  if run_lib.agreed(stage.is_done):
    run_lib.say(f'{stage.name}: done before, in {folder}')
    return
  run_lib.say(f'{stage.name}: starts')
  begin = time.monotonic()
  folder.mkdir(parents=True, exist_ok=True)
  seconds_file = folder / 'seconds.json'
  spent = run_lib.read_json(seconds_file) if seconds_file.exists() else 0.0
  info = None
  try:
    run_lib.in_first(lambda: stages_lib.record_inputs(stage))
    if jax.process_index() == 0 or config.experiment not in HOST_EXPERIMENTS:
      info = stage.experiment.run(config, folder)
  except (ValueError, OSError, RuntimeError) as error:
    error.stage = stage.name
    raise
  finally:
    seconds = spent + time.monotonic() - begin
    # The disk may be full or gone: what ended the stage is worth more.
    with contextlib.suppress(OSError):
      if folder.exists():
        run_lib.write_json(seconds_file, seconds)
  run_lib.mark_done(folder, {'seconds': seconds, 'info': info})
  run_lib.say(f'{stage.name}: done in {seconds:.1f} s')


def run(
  config, workdir: epath.Path, described, accept_new_inputs: bool = False
) -> None:
  """Validates everything, then runs the experiment or all of its stages.

  Args:
    config: with `workdir` filled in.
    workdir: where the run lives.
    described: the config as it came, without this machine's paths: what a
      later run in the same directory is compared with.
    accept_new_inputs: go on where inputs have other contents now.

  Raises:
    ValueError: a key or an input that is not as it should be.
    run_lib.WorkdirError: the directory is in use, or a stage in it began with
      another config or other inputs.
    run_lib.Stopped: SIGTERM came, and what can be saved is.
  """
  import jax

  from instruct_jax.infra import run as run_lib
  from instruct_jax.infra import stages as stages_lib

  stages = stages_lib.of_run(config, described, workdir, find_experiment)
  for stage in stages:
    stages_lib.validate(stage)
    experiment = stage.config.experiment
    is_idle = getattr(stage.experiment, 'is_idle', lambda config: False)
    if (
      jax.process_count() > 1
      and experiment in SINGLE_EXPERIMENTS
      and not is_idle(stage.config)
    ):
      raise ValueError(
        f'{stage.name}: {experiment} runs in a single process, and there are '
        f'{jax.process_count()}; leave it out of --config.stage_order, and run '
        'the same command without it in one process afterwards'
      )
  run_lib.in_first(lambda: stages_lib.find_missing(stages))
  with (
    run_lib.StopSignal(at_once=True) as stop,
    run_lib.WorkdirLock(workdir),
  ):
    run_lib.in_first(
      lambda: stages_lib.check_unchanged(
        stages, described, workdir, accept_new_inputs
      )
    )
    run_lib.write_json(
      workdir / 'provenance.json',
      {
        **run_lib.provenance(config.seed),
        'command': shlex.join(
          ['python', '-m', 'instruct_jax.main', *sys.argv[1:]]
        ),
      },
    )
    have_run = []
    for stage in stages:
      if stop.requested:
        raise run_lib.Stopped(f'stopped before {stage.name}', True)
      run_lib.in_first(
        lambda stage=stage: stages_lib.check_turn(
          stage, stages, have_run, accept_new_inputs
        )
      )
      run_stage(stage)
      have_run.append(stage.name)


def prepare_machine(config) -> None:
  """Compiler flags, cache and allocator, before the first use of a device."""
  os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'
  given = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{given} {config.xla_flags}'.strip()
  if sys.platform == 'linux':
    prepare_allocator()
  if config.compilation_cache:
    import jax

    folder = epath.Path(config.compilation_cache).expanduser()
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


def prepare_allocator() -> None:
  """Keeps what steps free for the next step, not what the compiler frees."""
  libc = ctypes.CDLL(None)
  if not hasattr(libc, 'mallopt'):  # Not glibc.
    return
  # glibc returns large buffers to the system when they are freed, and every
  # step faults them in again: an eighth of a small model's training step on
  # CPU. Keep them: no mmap (-4), no trimming (-1). And one arena (-8), or each
  # of the compiler's threads keeps one of its own.
  libc.mallopt(-8, 1)
  libc.mallopt(-4, 0)
  libc.mallopt(-1, 2**31 - 1)

  import jax

  def trim(event, seconds, **_):
    if event.endswith('backend_compile_duration') and seconds > 0.3:
      libc.malloc_trim(0)

  jax.monitoring.register_event_duration_secs_listener(trim)


def main(argv) -> None:
  if len(argv) > 1:
    sys.exit(f'error: unexpected arguments: {argv[1:]}')
  if '--verbosity' not in ' '.join(sys.argv):
    logging.set_verbosity(logging.WARNING)  # Libraries narrate at INFO.
  config = _CONFIG.value
  # Stages find each other's outputs by paths built on this reference; what is
  # kept of the config is free of them.
  given, config.workdir = config.workdir, ''
  described = config.copy_and_resolve_references()
  place = _WORKDIR.value or given or config.default_workdir
  prepare_machine(config)
  from instruct_jax.infra import processes
  from instruct_jax.infra import run as run_lib

  workdir = files.absolute(place)
  config.workdir = str(workdir)
  print(f'work directory: {workdir}', flush=True)

  try:
    processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    run(config, workdir, described, _ACCEPT_NEW_INPUTS.value)
  except (ValueError, FileNotFoundError, RuntimeError, OSError) as error:
    if logging.get_verbosity() >= logging.DEBUG:
      traceback.print_exc()
    text, stage = str(error), getattr(error, 'stage', '')
    if stage and not text.startswith(stage):
      text = f'{stage}: {text}'
    print(f'work directory: {workdir}', flush=True)
    processes.fail(f'error: {text}', error)
  except run_lib.Stopped as stopped:
    print(f'work directory: {workdir}', flush=True)
    if not stopped.is_agreed:
      processes.fail('', code=stopped.code)
    processes.leave()
    raise
  except BaseException as error:
    if not processes.are_joined():
      raise
    # A fault of the program: the others must not wait for this process.
    traceback.print_exc()
    processes.fail(f'error: {type(error).__name__}: {error}', error)
  processes.leave()
  print(f'work directory: {workdir}', flush=True)


def parse_flags(argv) -> list[str]:
  return command.parse_flags(argv, _CONFIG)


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  app.run(main, flags_parser=parse_flags)
