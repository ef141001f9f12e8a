"""Programs on the command line: one line for what their user can mend.

A program is a module whose `main(arguments)` returns its exit code, and which
calls `command.end(main)` where it is run as a program.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import flags

# Set to anything, it lets the traceback of a refused input through.
TRACEBACK_VARIABLE = 'INSTRUCT_JAX_TRACEBACK'


class Parser(argparse.ArgumentParser):
  """An argument parser whose refusals are one line, with exit code 2.

  What has to be given has to be more than nothing: the empty path would be the
  current folder.
  """

  def parse_args(self, args=None, namespace=None):
    """As the base class; empty values of required arguments are refused."""
    found = super().parse_args(args, namespace)
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
  """Type and text of another library's error, for the end of a line."""
  return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'


def parse_flags(argv: list[str], config: flags.FlagHolder) -> list[str]:
  """absl's parser, with one line for a wrong flag, key, variant or file.

  Args:
    argv: of the program.
    config: the flag of the config file.
  """
  try:
    rest = flags.FLAGS(argv)
    _ = config.value.keys()  # A file that did not load says so when it is read.
    return rest
  except (AttributeError, KeyError) as error:
    # ml_collections raises either, one of them around the other; the text may
    # go on with a suggestion.
    text = error.args[0]
    while isinstance(text, KeyError):
      text = text.args[0]
    text = f'no such config key: {text}'
  except (flags.Error, OSError) as error:
    # What the config file raised comes as a traceback; its end says it.
    text = str(error)
    if 'Traceback' in text or isinstance(error, OSError):
      text = f'--config: {text.strip().splitlines()[-1].strip()}'
  print(f'error: {text}', file=sys.stderr, flush=True)
  sys.exit(1)


def end(main: Callable[[], int | None]) -> NoReturn:
  """Runs `main` and ends the process with its exit code.

  What a user can mend (a path, a value, a file, a service that does not
  answer) arrives as ValueError, OSError or RuntimeError: it is printed without
  a traceback, and the exit code is 1. Anything else is a fault of the program.
  """
  try:
    code = main()
  except (ValueError, OSError, RuntimeError) as error:
    if os.environ.get(TRACEBACK_VARIABLE):
      raise
    print(f'error: {error}', file=sys.stderr, flush=True)
    code = 1
  sys.exit(code or 0)
