"""A run on its machine: its directory, its lock, its record, its end."""

import contextlib
import datetime
import fcntl
import gc
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
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
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'numpy',
  'transformers',
  'tokenizers',
  'tensorboardX',
  'ml_collections',
)


class WorkdirError(RuntimeError):
  """The work directory is in use, or belongs to another run."""


class Stopped(SystemExit):
  """Raised by a loop that was asked to stop and has saved.

  The process exits with code 75; the message goes to standard error.

  Args:
    message: where it stopped.
    is_agreed: of several processes, all stop here: an orderly end waits for no
      other one.
  """

  def __init__(self, message: str, is_agreed: bool = False):
    super().__init__(STOPPED_EXIT_CODE)
    self.message, self.is_agreed = message, is_agreed
    print(f'{message}; the same command continues', file=sys.stderr)


# --- JSON files ---------------------------------------------------------------


def write_json(path: epath.PathLike, value: Any) -> None:
  """Writes a JSON file that is at every moment the old or the new one.

  Of several processes only the first writes.
  """
  if jax.process_index() != 0:
    return
  text = json.dumps(value, indent=2, sort_keys=True) + '\n'
  files.write_bytes(path, text.encode())


def read_json(path: epath.PathLike) -> Any:
  """Reads a JSON file.

  Raises:
    FileNotFoundError: it is absent.
    ValueError: it is not JSON; the path is named.
  """
  try:
    return json.loads(epath.Path(path).read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f'{path} is not JSON: {error}') from error


def timestamp() -> str:
  """Now, in UTC, to the second."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


# --- The work directory -------------------------------------------------------


class WorkdirLock:
  """Keeps a second run out of a work directory, while entered.

  The kernel holds the lock and drops it with the process, however that ends:
  there are no stale locks. Object stores have no locks; there it does nothing.

  Raises:
    WorkdirError: on entering, naming the process that holds the directory.
  """

  def __init__(self, workdir: epath.PathLike):
    self._workdir = epath.Path(workdir)
    self._file = None

  def __enter__(self) -> 'WorkdirLock':
    if files.is_remote(self._workdir) or jax.process_index() != 0:
      return self
    self._workdir.mkdir(parents=True, exist_ok=True)
    # 'a+' leaves the holder's entry readable until the lock is ours.
    file = open(self._workdir / '.lock', 'a+')
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      file.seek(0)
      holder = file.read().strip() or 'a process that is just starting'
      file.close()
      raise WorkdirError(
        f'{self._workdir} is in use by another run: {holder}. Wait for it, '
        'stop it, or choose another work directory.'
      ) from error
    file.truncate(0)
    file.write(
      f'pid {os.getpid()} on {socket.gethostname()} since {timestamp()}\n'
    )
    file.flush()
    self._file = file
    return self

  def __exit__(self, *exception) -> None:
    if self._file is not None:
      self._file.truncate(0)
      self._file.close()
      self._file = None


def plain(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
  """JSON's view of a config: tuples are lists, integer keys are strings."""
  if isinstance(config, ConfigDict):
    config = config.to_dict()
  return json.loads(json.dumps(dict(config)))


def flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Dotted key -> value; an empty mapping is a value."""
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
  """Refuses a value of an enumerated key, or of one that lists such values.

  Raises:
    ValueError: key, value and the values there are.
  """
  given = config[key]
  for value in (given,) if isinstance(given, str) else given:
    if value not in known:
      raise ValueError(
        f'{key} must be one of {", ".join(map(repr, known))}: {value!r}'
      )


@contextlib.contextmanager
def naming(known: str, key: str) -> Iterator[None]:
  """Lets errors about the key `known` name `key`, where the same stands."""
  try:
    yield
  except ValueError as error:
    raise ValueError(str(error).replace(f'{known}.', f'{key}.')) from error


def check_enough(number: int, needed: int, what: str, keys: str) -> None:
  """Refuses a data set that does not fill one batch.

  Args:
    number: of its rows, say, that are there.
    needed: for a batch.
    what: they are, in the plural.
    keys: of the config that decide what is needed.

  Raises:
    ValueError: there are too few.
  """
  if number < needed:
    raise ValueError(
      f'{number} {what} do not fill a batch of {needed} ({keys}); lower it, or '
      'give more of them'
    )


def mark_done(stage_dir: epath.PathLike, info: Mapping[str, Any]) -> None:
  """Records that a stage is finished; its outputs are written before.

  Returns in all processes once the first has written it.
  """
  write_json(epath.Path(stage_dir) / DONE_FILE, dict(info))
  wait_for_all(f'{stage_dir} is done')


def is_done(stage_dir: epath.PathLike) -> bool:
  """Whether `mark_done` was called; the info is in `done.json`."""
  return (epath.Path(stage_dir) / DONE_FILE).exists()


def mark_undone(stage_dir: epath.PathLike) -> None:
  """Takes `mark_done` back, in the first process."""
  if jax.process_index() == 0:
    (epath.Path(stage_dir) / DONE_FILE).unlink(missing_ok=True)


# --- Several processes --------------------------------------------------------


def say(text: str) -> None:
  """Prints a line, in the first process."""
  if jax.process_index() == 0:
    print(text, flush=True)


def tell_dropped(name: str, text: str) -> None:
  """Says what a stage leaves out; '' is nothing."""
  if text:
    say(f'{name}: {text}')


def agreed(value: bool) -> bool:
  """The first process's answer, in every process; all must ask.

  What one process sees of a shared directory, another may see a moment later.
  """
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def in_first(function: Callable[[], None]) -> None:
  """Calls a function in the first process; where it fails, all fail.

  Raises:
    ValueError, RuntimeError, OSError: as it did, in the first process.
    WorkdirError: in the others.
  """
  problem = None
  if jax.process_index() == 0:
    try:
      function()
    except (ValueError, RuntimeError, OSError) as error:
      problem = error
  if not agreed(problem is None):
    raise problem or WorkdirError('the first process refuses; it says why')


def wait_for_all(name: str) -> None:
  """Returns once every process has come here; the name must be the same."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def say_drawn(stage: str, number: int, total: int, what: str) -> None:
  """A line about how many records of a file are used, where not all are."""
  if number < total:
    say(f'{stage}: {number} of {total} {what}, drawn by seed')


def say_left_out(
  stage: str, number: int, total: int, what: str, limit: str
) -> None:
  """A line about records that do not fit; none where `number` is 0.

  Args:
    stage: its name.
    number: left out.
    total: with these.
    what: they are, in the plural.
    limit: key of the config and number of tokens.
  """
  if number:
    say(f'{stage}: {number} of {total} {what} left out: do not fit {limit}')


# --- Where the numbers come from ----------------------------------------------


def provenance(seed: int) -> dict[str, Any]:
  """What one needs to run this again.

  Returns:
    `seed`, `commit` (None outside a git checkout), `dirty` (tracked files
    differ from the commit, or there is Python code that is not tracked),
    `versions` by package, `python`, `platform`, `devices` (count by kind) and
    `num_processes`.
  """
  versions = {}
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  kinds = [device.device_kind for device in jax.devices()]
  commit, dirty = _git_state(pathlib.Path(__file__).parents[2])
  return {
    'seed': seed,
    'commit': commit,
    'dirty': dirty,
    'versions': versions,
    'python': platform.python_version(),
    'platform': platform.platform(),
    'devices': {kind: kinds.count(kind) for kind in sorted(set(kinds))},
    'num_processes': jax.process_count(),
  }


def _git_state(root) -> tuple[str | None, bool | None]:
  def git(*arguments):
    return subprocess.run(
      ('git', '-C', str(root), *arguments),
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()

  # Installed into an environment that lies inside some other repository, the
  # package must not report that one's commit.
  try:
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
  """Turns SIGTERM into a flag, while entered; loops look at it every step.

  with StopSignal() as stop:
    for step in ...:
      ...
      if stop.requested:
        checkpointer.save(...); checkpointer.close()
        raise Stopped(f'sft: stopped at step {step}')

  They nest: what one of them received, those inside it see as well, and what
  the inner one did not act on is passed to the outer one when it is left.

  Args:
    at_once: raise `Stopped` where the signal meets the program, or, where
      Python would drop an exception, at the next step of a `Progress`. For what
      lies between loops: there is nothing to save there.
  """

  _entered: ClassVar[list['StopSignal']] = []

  def __init__(self, at_once: bool = False):
    self._at_once = at_once
    self._received = False
    self._previous = None

  def __enter__(self) -> 'StopSignal':
    if threading.current_thread() is threading.main_thread():
      self._previous = signal.signal(signal.SIGTERM, self._receive)
    self._entered.append(self)
    return self

  def __exit__(self, *exception) -> None:
    self._entered.remove(self)
    if self._received and self._entered:
      self._entered[-1]._received = True
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)
      self._previous = None

  def _receive(self, number, frame):
    self._received = True
    if not _drops_exceptions(frame):
      self.check()

  @classmethod
  def check(cls) -> None:
    """Raises `Stopped` where a signal came that is to stop the program at once.

    Only the main thread does.
    """
    if (
      cls._entered
      and cls._entered[-1]._at_once
      and threading.current_thread() is threading.main_thread()
      and cls._came()
    ):
      raise Stopped('stopped outside of a training loop')

  @classmethod
  def _came(cls) -> bool:
    return any(stop._received for stop in cls._entered)

  @property
  def requested(self) -> bool:
    """Whether SIGTERM came to any process.

    With several processes it is a collective, so that all stop at the same
    step: each must ask equally often.
    """
    if jax.process_count() == 1:
      return self._came()
    received = multihost_utils.process_allgather(np.array(self._came()))
    return bool(np.any(received))


def _drops_exceptions(frame) -> bool:
  """Whether Python only prints what is raised in a frame: inside finalizers and
  callbacks of the garbage collector."""
  callbacks = {getattr(call, '__code__', None) for call in gc.callbacks}
  while frame is not None:
    if frame.f_code.co_name == '__del__' or frame.f_code in callbacks:
      return True
    frame = frame.f_back
  return False


class Progress:
  """Steps done, rate and time left: a bar on a terminal, else a line about
  every ten seconds and one at the end.

  Args:
    name: the stage.
    total: steps in all.
    initial: steps done before, by a run that was cut; not part of the rate.
    unit: what a step is called.
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
    """Counts steps; `text` is shown behind them.

    Raises:
      Stopped: see `StopSignal`.
    """
    StopSignal.check()
    self._done += num_steps
    self._text = text
    if self._bar is not None:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(num_steps)
    elif time.monotonic() - self._last_line >= self._SECONDS_BETWEEN_LINES:
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
      left = (self._total - self._done) / rate if rate else None
      when = f'{_clock(left) if left is not None else "?"} left'
    percent = 100 * self._done // max(self._total, 1)
    line = (
      f'{self._name}: {self._done}/{self._total} ({percent} %), '
      f'{rate:.3g} {self._unit}/s, {when}'
    )
    print(f'{line}, {self._text}' if self._text else line, file=sys.stderr)
    sys.stderr.flush()

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
  return (
    f'{hours}:{minutes:02}:{seconds:02}'
    if hours
    else (f'{minutes}:{seconds:02}')
  )
