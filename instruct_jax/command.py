"""Command-line programs: errors that the user can fix are printed as one line.

A program is a module whose `main(arguments)` returns its exit code, and which
calls `command.end(main)` when it is run as a program.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict

# Environment variable; if it is set, `end` shows the traceback of an error.
TRACEBACK_VARIABLE = 'INSTRUCT_JAX_TRACEBACK'

# `~` where a path begins: in FOLDER, NAME=FOLDER, and a list of either.
_HOME = re.compile(r'(?:^|(?<=[=,:]))~(?=/)|(?:^|(?<==))~$')


def with_home(value: Any) -> Any:
  """Replaces `~` by the home folder where a path begins, as a shell would.

  `value` is a text, or a list or tuple of texts; others are returned as is.
  """
  if isinstance(value, list | tuple):
    return type(value)(map(with_home, value))
  if not isinstance(value, str):
    return value
  return _HOME.sub(lambda _: os.path.expanduser('~'), value)


def _expand_config(config: ConfigDict) -> None:
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      _expand_config(value)
    # `infra.machine` expands it; a run's config.json has it for every machine.
    elif key != 'compilation_cache' and (found := with_home(value)) != value:
      config[key] = found


class Parser(argparse.ArgumentParser):
  """An argument parser whose errors are one line, with exit code 2.

  Required arguments must not be empty: an empty path would mean the current
  folder. `~` is the home folder.
  """

  def parse_args(self, args=None, namespace=None):
    """Like the base class, but refuses empty values of required arguments."""
    found = super().parse_args(args, namespace)
    vars(found).update({k: with_home(v) for k, v in vars(found).items()})
    for action in self._actions:
      value = getattr(found, action.dest, None)
      if action.required and value in ('', ['']):
        name = (action.option_strings or [action.metavar or action.dest])[0]
        self.error(f'{name} is empty')
    return found

  def error(self, message: str) -> NoReturn:
    """Ends the program with one line."""
    self.exit(2, f'error: {message}; --help lists the arguments\n')


def one_line(error: BaseException) -> str:
  """Type and text of a library's error on one line, to end a message."""
  return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'


def parse_flags(argv: list[str], config: flags.FlagHolder) -> list[str]:
  """absl's parser, with one line for a wrong flag, key, variant or file.

  `~` is the home folder, in flags and in the config. A flag must not be empty,
  since a script may have given a variable that is not set.

  Args:
    argv: the program's arguments.
    config: the flag of the config file.
  """
  try:
    rest = flags.FLAGS(with_home(argv))
    _expand_config(config.value)  # Raises what the config file raised.
    for name, value in flags.FLAGS.flag_values_dict().items():
      is_given = value == '' and flags.FLAGS[name].present
      if is_given and not name.startswith(f'{config.name}.'):
        raise flags.Error(f'--{name} is empty; is a variable not set?')
    return rest
  except (AttributeError, KeyError) as error:
    # ml_collections raises either, possibly one wrapped in the other. The text
    # may end with a suggestion.
    text = error.args[0]
    while isinstance(text, KeyError):
      text = text.args[0]
    text = f'no such config key: {text}'
  except (flags.Error, OSError) as error:
    # An error in the config file arrives as a traceback; its last line has the
    # message.
    text = str(error)
    if 'Traceback' in text or isinstance(error, OSError):
      text = f'--config: {text.strip().splitlines()[-1].strip()}'
  print(f'error: {text}', file=sys.stderr, flush=True)
  sys.exit(1)


def end(main: Callable[[], int | None]) -> NoReturn:
  """Runs `main` and ends the process with its exit code.

  Errors that a user can fix (a path, a value, a file, a service that does not
  answer) arrive as ValueError, OSError or RuntimeError. They are printed
  without a traceback, and the exit code is 1. Any other exception is a bug.
  """
  try:
    code = main()
  except (ValueError, OSError, RuntimeError) as error:
    if os.environ.get(TRACEBACK_VARIABLE):
      raise
    print(f'error: {error}', file=sys.stderr, flush=True)
    code = 1
  sys.exit(code or 0)
