"""Starts of `python -m MODULE ...`, without importing everything each time.

A server that has imported the libraries, and no device, forks for each start
and runs the module as `python -m` does. Signals, exit codes, output, working
directory and environment are those of a process of its own.
"""

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import pathlib
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time

# A variable of the environment: the most bytes of a file that a start writes.
FILE_LIMIT = 'TEST_FILE_LIMIT'

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass
class Ended:
  """What a start left."""

  returncode: int
  stdout: str
  stderr: str


class Starts:
  """The server, from the side of the tests."""

  def __init__(self):
    self._server = subprocess.Popen(
      [sys.executable, __file__],
      cwd=ROOT,
      env={**os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def __call__(
    self,
    module,
    *arguments,
    env=(),
    stdin='',
    until=None,
    number=signal.SIGTERM,
  ) -> Ended:
    """One start, to its end.

    Args:
      module: such as 'instruct_jax.main'.
      *arguments: of its command line.
      env: variables beside those of this process.
      stdin: what it reads.
      until: called over and over; once it is true, the process gets a signal.
      number: which one.
    """
    with tempfile.TemporaryDirectory() as folder:
      out, err, given = (pathlib.Path(folder) / name for name in 'oei')
      given.write_text(stdin)
      request = {
        'module': module,
        'arguments': list(map(str, arguments)),
        'env': dict(env),
        'files': [str(given), str(out), str(err)],
      }
      self._server.stdin.write(json.dumps(request) + '\n')
      self._server.stdin.flush()
      pid = json.loads(self._server.stdout.readline())
      try:
        if until is not None:
          process = pathlib.Path('/proc') / str(pid)
          while not until() and process.exists():
            time.sleep(0.005)
          with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
      except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
      finally:
        code = json.loads(self._server.stdout.readline())
      return Ended(code, out.read_text(), err.read_text())

  def close(self):
    self._server.stdin.close()
    self._server.wait()


def serve():
  """Forks for each line of standard input."""
  sys.path[0] = str(ROOT)
  for folder in ('experiments', 'instruct_jax/jobs'):
    for path in sorted((ROOT / folder).glob('[a-z]*.py')):
      importlib.import_module(f'{folder.replace("/", ".")}.{path.stem}')
  with contextlib.suppress(ModuleNotFoundError):  # An extra.
    for name in ('uvicorn', 'instruct_jax.labeling.web'):
      importlib.import_module(name)
  gc.freeze()  # Collections in a fork would copy all of it.
  for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if not pid:
      run(request)
      return
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)


def run(request):
  """What `python -m` would do."""
  for number, (path, flags) in enumerate(
    zip(
      request['files'],
      (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2),
      strict=True,
    )
  ):
    os.dup2(os.open(path, flags, 0o600), number)
  sys.stdin = os.fdopen(0, closefd=False)
  os.environ.update(request['env'])
  sys.path[1:1] = os.environ.get('PYTHONPATH', '').split(os.pathsep)
  sys.argv[1:] = request['arguments']
  if FILE_LIMIT in request['env']:
    # As on a disk with so little room: writing more to one file fails.
    limit = int(request['env'][FILE_LIMIT])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
  sys.modules.pop(request['module'], None)
  runpy.run_module(request['module'], run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  serve()
