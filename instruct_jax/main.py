"""Runs an experiment, or a pipeline of them, from a config file.

  python -m instruct_jax.main --config=configs/ppo_ptx.py
  python -m instruct_jax.main --config=configs/ppo_ptx.py:smoke --workdir=/tmp/x

A config with `stages` is a pipeline: its stages run in order, each in its own
folder, except those that have finished. The same command resumes an interrupted
run.
"""

import os
import signal

if __name__ == '__main__':
  # Installed first, since the imports below take seconds.
  def stop_at_once(number, frame) -> None:
    del number, frame
    os.write(2, b'stopped before the run began; the same command starts it\n')
    os._exit(75)

  signal.signal(signal.SIGTERM, stop_at_once)

  from instruct_jax.infra import machine

  machine.ask_for_huge_pages()

import logging as python_logging
import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from instruct_jax import command, files
from instruct_jax.infra import machine

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config file, say configs/ppo_ptx.py:smoke.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where the run lives; config.default_workdir if not given.'
)
_ACCEPT_NEW_INPUTS = flags.DEFINE_bool(
  'accept_new_inputs',
  False,
  'Go on with input files that have changed since a stage began.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, "HOST:PORT of process 0 of several; 'auto' on a TPU pod."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, "How many there are; not with 'auto'."
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, "This one's number, from 0; not with 'auto'."
)


def main(argv: list[str]) -> None:
  """Runs the config given on the command line; user errors are one line."""
  if len(argv) > 1:
    sys.exit(f'error: unexpected arguments: {argv[1:]}')
  if '--verbosity' not in ' '.join(sys.argv):
    logging.set_verbosity(logging.WARNING)  # Libraries are verbose at INFO.
    # If several writes of a checkpoint fail, the first is raised and printed in
    # one line; asyncio would log the others with tracebacks.
    python_logging.getLogger('asyncio').setLevel(python_logging.CRITICAL)
  config = _CONFIG.value
  # Stages find each other's outputs by paths that refer to `workdir`. It stays
  # empty until the config has been copied for config.json, which leaves it out.
  given, config.workdir = config.workdir, ''
  place = _WORKDIR.value or given or config.default_workdir
  machine.prepare(config)
  from instruct_jax import score_fns
  from instruct_jax.infra import pipeline, precision, processes
  from instruct_jax.infra import run as run_lib

  workdir = files.absolute(place)
  print(f'work directory: {workdir}', flush=True)

  try:
    processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    precision.resolve(config, workdir)
    if 'prepare' in config:
      prepare = score_fns.find(config.prepare, 'prepare')
      if not prepare(config, workdir):
        return  # A dry run, which only describes the run.
    described = config.copy_and_resolve_references()
    config.workdir = str(workdir)
    pipeline.run_all(config, workdir, described, _ACCEPT_NEW_INPUTS.value)
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
    # A bug: the other processes must not wait for this one.
    traceback.print_exc()
    processes.fail(f'error: {type(error).__name__}: {error}', error)
  processes.leave()
  print(f'work directory: {workdir}', flush=True)


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parser, which reports an error in one line."""
  return command.parse_flags(argv, _CONFIG)


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  app.run(main, flags_parser=parse_flags)
