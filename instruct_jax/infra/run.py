"""A run's work directory, lock, provenance, progress and orderly stop."""

import contextlib
import datetime
import fcntl
import gc
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from instruct_jax import files

# `EX_TEMPFAIL` of sysexits.h: run the same command again.
STOPPED_EXIT_CODE = 75
DONE_FILE = 'done.json'

_PACKAGES = (
  *('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy'),
  *('transformers', 'tokenizers', 'tensorboardX', 'ml_collections'),
)


class WorkdirError(RuntimeError):
  """The work directory is in use, or belongs to another run."""


class Stopped(SystemExit):
  """Ends, with exit code 75, a process that was asked to stop and has saved.

  Args:
    message: where it stopped, for standard error.
    is_agreed: whether all processes stop here.
  """

  def __init__(self, message: str, is_agreed: bool = False):
    super().__init__(STOPPED_EXIT_CODE)
    self.message, self.is_agreed = message, is_agreed
    print(f'{message}; the same command continues', file=sys.stderr)


# --- JSON files ---------------------------------------------------------------


def write_json(path: epath.PathLike, value: Any) -> None:
  """Writes a JSON file atomically, in the first process."""
  if jax.process_index() == 0:
    text = json.dumps(value, indent=2, sort_keys=True) + '\n'
    files.write_bytes(path, text.encode())


def read_json(path: epath.PathLike) -> Any:
  """Reads a JSON file; ValueError with its path if it is not JSON."""
  try:
    return json.loads(epath.Path(path).read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f'{path} is not JSON: {error}') from error


def timestamp() -> str:
  """The UTC time, to the second."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


# --- The work directory -------------------------------------------------------


@contextlib.contextmanager
def lock_workdir(workdir: epath.PathLike) -> Iterator[None]:
  """Keeps other runs out of a work directory, except in object stores.

  The kernel releases the lock when the process ends, so no lock is ever stale.

  Raises:
    WorkdirError: another process holds the directory; the message names it.
  """
  workdir = epath.Path(workdir)
  if files.is_remote(workdir) or jax.process_index() != 0:
    yield
    return
  workdir.mkdir(parents=True, exist_ok=True)
  # 'a+' keeps the holder's entry readable until the lock is ours.
  with open(workdir / '.lock', 'a+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      file.seek(0)
      holder = file.read().strip() or 'a process that is just starting'
      raise WorkdirError(
        f'{workdir} is in use by another run: {holder}. Wait for it, '
        'stop it, or choose another work directory.'
      ) from error
    file.truncate(0)
    file.write(
      f'pid {os.getpid()} on {socket.gethostname()} since {timestamp()}\n'
    )
    file.flush()
    try:
      yield
    finally:
      file.truncate(0)


def plain(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
  """A config as JSON reads it: tuples are lists, integer keys are strings."""
  if isinstance(config, ConfigDict):
    config = config.to_dict()
  return json.loads(json.dumps(dict(config)))


def flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Flattens a tree to dotted key -> value; an empty mapping is a value."""
  found = {}
  for key, value in tree.items():
    name = f'{prefix}{key}'
    if isinstance(value, dict) and value:
      found |= flat(value, f'{name}.')
    else:
      found[name] = value
  return found


def check_choice(
  config: ConfigDict | Mapping[str, Any], key: str, known: Sequence[str]
) -> None:
  """Checks the value of an enumerated key, or each value of a list.

  Raises:
    ValueError: a value is not known; the message lists those that are.
  """
  given = config[key]
  for value in (given,) if isinstance(given, str) else given:
    if value not in known:
      raise ValueError(
        f'{key} must be one of {", ".join(map(repr, known))}: {value!r}'
      )


@contextlib.contextmanager
def naming(known: str, key: str) -> Iterator[None]:
  """Replaces the key `known` by `key` in the errors raised inside."""
  try:
    yield
  except ValueError as error:
    raise ValueError(str(error).replace(f'{known}.', f'{key}.')) from error


def check_enough(number: int, needed: int, what: str, keys: str) -> None:
  """Raises ValueError if `number` rows do not fill a batch of `needed`.

  `keys` names the config keys that decide `needed`.
  """
  if number < needed:
    raise ValueError(
      f'{number} {what} do not fill a batch of {needed} ({keys}); lower it, or '
      'give more of them'
    )


def check_room(workdir: epath.Path, needed: float, what: str) -> None:
  """Raises ValueError if a disk has less than `needed` bytes free for `what`.

  Object stores are not checked.
  """
  if files.is_remote(workdir):
    return
  place = workdir
  while not place.exists():
    place = place.parent
  free = shutil.disk_usage(place).free
  if free < needed:
    raise ValueError(
      f'{workdir}: {free / 1e9:.1f} GB are free, and {what} take '
      f'{needed / 1e9:.1f} GB; make room, or give a --workdir elsewhere'
    )


def mark_done(stage_dir: epath.PathLike, info: Mapping[str, Any]) -> None:
  """Records, in `done.json`, that a stage and its outputs are finished.

  Returns in all processes once the first has written it.
  """
  write_json(epath.Path(stage_dir) / DONE_FILE, dict(info))
  wait_for_all(f'{stage_dir} is done')


def is_done(stage_dir: epath.PathLike) -> bool:
  """Whether `mark_done` was called."""
  return (epath.Path(stage_dir) / DONE_FILE).exists()


def mark_undone(stage_dir: epath.PathLike) -> None:
  """Undoes `mark_done`, in the first process."""
  if jax.process_index() == 0:
    (epath.Path(stage_dir) / DONE_FILE).unlink(missing_ok=True)


# --- Several processes --------------------------------------------------------


def say(text: str) -> None:
  """Prints a line, in the first process."""
  if jax.process_index() == 0:
    print(text, flush=True)


def tell_dropped(name: str, text: str) -> None:
  """Prints what a stage leaves out, unless `text` is empty."""
  if text:
    say(f'{name}: {text}')


def agreed(value: bool) -> bool:
  """The first process's value, in every process; all must call it.

  Processes may see a change of a shared directory at different times.
  """
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def in_first(function: Callable[[], None]) -> None:
  """Calls a function in the first process.

  Raises:
    ValueError, RuntimeError, OSError: from the function; WorkdirError in the
      other processes.
  """
  problem = None
  if jax.process_index() == 0:
    try:
      function()
    except (ValueError, RuntimeError, OSError) as error:
      problem = error
  if not agreed(problem is None):
    raise problem or WorkdirError('the first process failed; see its message')


def wait_for_all(name: str) -> None:
  """Returns once every process has called it with the same name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def say_drawn(stage: str, number: int, total: int, what: str) -> None:
  """Prints how many records of a file are used, unless all are."""
  if number < total:
    say(f'{stage}: {number} of {total} {what}, drawn by seed')


def say_left_out(
  stage: str, number: int, total: int, what: str, limit: str
) -> None:
  """Prints how many of `total` records exceed the `limit`, unless none does."""
  if number:
    say(f'{stage}: {number} of {total} {what} left out: do not fit {limit}')


# --- Provenance ---------------------------------------------------------------


def provenance(seed: int) -> dict[str, Any]:
  """Returns what is needed to reproduce this run.

  `commit` is None outside a git checkout; `dirty` means changed tracked files
  or untracked Python code; `devices` counts them by kind; the version of a
  package that is not installed is None.
  """
  kinds = Counter(device.device_kind for device in jax.devices())
  commit, dirty = _git_state(pathlib.Path(__file__).parents[2])
  return {
    'seed': seed,
    'commit': commit,
    'dirty': dirty,
    'versions': {name: _version(name) for name in _PACKAGES},
    'python': platform.python_version(),
    'platform': platform.platform(),
    'devices': dict(sorted(kinds.items())),
    'num_processes': jax.process_count(),
  }


def _version(package: str) -> str | None:
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    return importlib.metadata.version(package)
  return None


def _git_state(root) -> tuple[str | None, bool | None]:
  def git(*arguments):
    return subprocess.run(
      ('git', '-C', str(root), *arguments),
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()

  try:
    # The package may be installed inside some other repository.
    if pathlib.Path(git('rev-parse', '--show-toplevel')) != root.resolve():
      return None, None
    commit = git('rev-parse', 'HEAD')
    changed = git('status', '--porcelain', '--untracked-files=no')
    untracked = git('ls-files', '--others', '--exclude-standard', '*.py')
    return commit, bool(changed or untracked)
  except (OSError, subprocess.CalledProcessError):
    return None, None


# --- While it runs ------------------------------------------------------------


class StopSignal:
  """Context manager that turns SIGTERM into the flag `requested`.

  Instances nest: all see a signal until the outermost one exits.

  Args:
    at_once: raise `Stopped` as soon as the signal comes, or, where Python would
      drop an exception, at the next step of a `Progress`. For code that has
      nothing to save.
  """

  _entered: ClassVar[list['StopSignal']] = []
  _came: ClassVar[bool] = False  # Reset when the outermost one exits.

  def __init__(self, at_once: bool = False):
    self._at_once = at_once
    self._previous = None

  def __enter__(self) -> 'StopSignal':
    if threading.current_thread() is threading.main_thread():
      self._previous = signal.signal(signal.SIGTERM, self._receive)
    self._entered.append(self)
    return self

  def __exit__(self, *exception) -> None:
    self._entered.remove(self)
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)
      self._previous = None
    StopSignal._came &= bool(self._entered)

  def _receive(self, number, frame):
    StopSignal._came = True
    if not _drops_exceptions(frame):
      self.check()

  @classmethod
  def check(cls) -> None:
    """Raises `Stopped`, in the main thread, if a signal came and the innermost
    instance has `at_once`."""
    if (
      cls._entered
      and cls._entered[-1]._at_once
      and threading.current_thread() is threading.main_thread()
      and cls._came
    ):
      raise Stopped('stopped outside of a training loop')

  @property
  def requested(self) -> bool:
    """Whether SIGTERM came to any process; all must read this equally often."""
    if jax.process_count() == 1:
      return self._came
    received = multihost_utils.process_allgather(np.array(self._came))
    return bool(np.any(received))


def _drops_exceptions(frame) -> bool:
  """Whether Python only prints exceptions of a frame, as it does in finalizers
  and callbacks of the garbage collector."""
  callbacks = {getattr(call, '__code__', None) for call in gc.callbacks}
  while frame is not None:
    if frame.f_code.co_name == '__del__' or frame.f_code in callbacks:
      return True
    frame = frame.f_back
  return False


class Progress:
  """Shows steps done, rate and time left.

  It is a bar on a terminal, otherwise a line about every ten seconds and at the
  end.

  Args:
    name: of the stage.
    total: number of steps, including those of earlier runs.
    initial: steps of earlier runs, which are not part of the rate.
    unit: plural name of the steps.
  """

  _SECONDS_BETWEEN_LINES = 10.0

  def __init__(
    self, name: str, total: int, initial: int = 0, unit: str = 'steps'
  ):
    self._name, self._total, self._initial = name, total, initial
    self._unit = unit
    self._done = initial
    self._text = ''
    self._start = self._last_line = time.monotonic()
    self._is_shown = jax.process_index() == 0
    self._bar = None
    if self._is_shown and sys.stderr.isatty():
      self._bar = tqdm(
        total=total,
        initial=initial,
        desc=name,
        unit=f' {unit}',
        dynamic_ncols=True,
      )

  def update(self, num_steps: int = 1, text: str = '') -> None:
    """Counts steps and shows `text` after them; may raise `Stopped`."""
    StopSignal.check()
    self._done += num_steps
    self._text = text
    if self._bar is not None:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(num_steps)
    elif (
      self._done < self._total  # `close` prints the last line.
      and time.monotonic() - self._last_line >= self._SECONDS_BETWEEN_LINES
    ):
      self._print_line()

  def skip(self, num_steps: int) -> None:
    """Counts steps that took no time: they are not part of the rate."""
    self._done += num_steps
    self._initial += num_steps
    if self._bar is not None:
      self._bar.initial += num_steps
      self._bar.update(num_steps)

  def _print_line(self):
    if not self._is_shown:
      return
    self._last_line = time.monotonic()
    seconds = max(self._last_line - self._start, 1e-9)
    rate = (self._done - self._initial) / seconds
    if self._done >= self._total:
      when = f'took {_clock(seconds)}'
    else:
      left = _clock((self._total - self._done) / rate) if rate else '?'
      when = f'{left} left'
    percent = 100 * self._done // max(self._total, 1)
    line = (
      f'{self._name}: {self._done}/{self._total} ({percent} %), '
      f'{rate:.3g} {self._unit}/s, {when}'
    )
    if self._text:
      line += f', {self._text}'
    print(line, file=sys.stderr, flush=True)

  def close(self) -> None:
    """Ends the bar, or prints the last line."""
    if self._bar is not None:
      self._bar.close()
    else:
      self._print_line()

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *exception) -> None:
    self.close()


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}:{minutes:02}:{seconds:02}'
  return f'{minutes}:{seconds:02}'
