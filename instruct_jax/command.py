"""Programs on the command line: one line for what their user can mend.

if __name__ == '__main__':
  command.end(main)
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

# Set to anything, it lets the traceback of a refused input through.
TRACEBACK_VARIABLE = 'INSTRUCT_JAX_TRACEBACK'


class Parser(argparse.ArgumentParser):
  """An argument parser whose refusals are one line, with exit code 2."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f'error: {message}; --help lists the arguments\n')


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
