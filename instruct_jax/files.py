"""Writes files on a disk or in an object store (gs://).

Reading needs only `etils.epath`. A store can neither rename nor append, but it
replaces an object atomically.
"""

import contextlib
import fcntl
import hashlib
import math
import os
import pathlib
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence

from etils import epath

# Local copies of a store's folders, for libraries that read only local files.
COPIES = '~/.cache/instruct_jax_copies'
_UNFINISHED = '.unfinished'
# How a pointer begins, which Git LFS leaves in the place of a large file.
LFS_MARK = b'version https://git-lfs'
LFS_PROBLEM = 'is a pointer of Git LFS; fetch the file itself (git lfs pull)'


def is_remote(path: epath.PathLike) -> bool:
  """Whether the path is in an object store."""
  return '://' in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
  """The absolute path.

  `epath.Path.absolute` would put the current folder before gs://.
  """
  path = epath.Path(path)
  return path if is_remote(path) else path.absolute()


@contextlib.contextmanager
def naming(path: epath.PathLike) -> Iterator[None]:
  """Makes an OSError of the body name `path`, if it names no finished file.

  A full disk is reported without a name.
  """
  try:
    yield
  except OSError as error:
    named = os.fspath(error.filename or _UNFINISHED)
    if error.errno is None or not named.endswith(_UNFINISHED):
      raise
    raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def write_bytes(path: epath.PathLike, content: bytes) -> None:
  """Writes or replaces a file atomically, and creates its folder."""
  path = epath.Path(path)
  if is_remote(path):
    path.write_bytes(content)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_name(f'.{path.name}.{os.getpid()}{_UNFINISHED}')
  with naming(path):
    try:
      with unfinished.open('wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
      unfinished.replace(path)
    except BaseException:
      unfinished.unlink(missing_ok=True)
      raise


class InUseError(OSError):
  """Another process writes there."""


@contextlib.contextmanager
def locked(folder: epath.PathLike) -> Iterator[None]:
  """Makes an empty folder on a disk, for this process alone; removes it after.

  What a killed process left there is removed first. The body may rename it. The
  kernel releases the lock when the process ends, so no lock is ever stale.

  Raises:
    InUseError: another process has it.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  handle = os.open(folder, os.O_RDONLY)

  def is_ours():
    there = folder.exists() and folder.stat()
    return there and os.path.samestat(there, os.fstat(handle))

  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
      is_free = is_ours()  # Not removed or renamed in between.
    except BlockingIOError:
      is_free = False
    except OSError:  # Some network file systems cannot lock folders.
      is_free = True
    if not is_free:
      raise InUseError(
        f'{folder}: another process is writing there; wait until it has ended'
      )
    try:
      for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
      yield
    finally:
      if is_ours():
        shutil.rmtree(folder)
  finally:
    os.close(handle)


class Appended:
  """A text file that grows by whole lines.

  On a disk, `write` flushes. In a store, the whole file is written again by
  `close`, and by `write` at most every ten seconds: stores allow about one
  replacement per second.

  Args:
    path: of the file, which keeps its content; its folder is created.
  """

  _SECONDS = 10.0

  def __init__(self, path: epath.PathLike):
    path = epath.Path(path)
    self.name = os.fspath(path)
    self._path, self._file = path, None
    self._lock = threading.Lock()
    self._text, self._is_written, self._when = '', True, -math.inf
    if is_remote(path):
      self._text = path.read_text() if path.exists() else ''
    else:
      path.parent.mkdir(parents=True, exist_ok=True)
      self._file = path.open('a')

  def write(self, text: str) -> None:
    """Appends text, which ends in a line break."""
    with self._lock:
      if self._file is not None:
        with naming(self.name):
          self._file.write(text)
          self._file.flush()
        return
      self._text += text
      self._is_written = False
      if time.monotonic() - self._when >= self._SECONDS:
        self._replace()

  def close(self) -> None:
    """Writes what is left and closes the file."""
    with self._lock:
      if self._file is not None:
        with naming(self.name):
          self._file.close()
      elif not self._is_written:
        self._replace()

  def _replace(self):
    self._path.write_text(self._text)
    self._is_written, self._when = True, time.monotonic()

  def __enter__(self) -> 'Appended':
    return self

  def __exit__(self, *exception) -> None:
    self.close()


def copy_folder(source: epath.PathLike, target: epath.PathLike) -> None:
  """Copies a folder's files and subfolders."""
  for path in epath.Path(source).iterdir():
    if path.is_dir():
      copy_folder(path, epath.Path(target) / path.name)
    else:
      write_bytes(epath.Path(target) / path.name, path.read_bytes())


def local_folder(
  folder: epath.PathLike, patterns: Sequence[str]
) -> pathlib.Path:
  """Returns a local copy of a store's folder, made once for each version.

  Args:
    folder: a folder in a store; its subfolders are left out.
    patterns: patterns for the names of the files to copy.

  Raises:
    FileNotFoundError: there is no such folder.
  """
  folder = epath.Path(folder)
  if not folder.is_dir():
    raise FileNotFoundError(f'{folder}: no such folder')
  found = {
    path.name: path.stat()
    for path in sorted(folder.iterdir())
    if any(path.match(pattern) for pattern in patterns) and not path.is_dir()
  }
  version = hashlib.sha256(os.fspath(folder).encode())
  for name, about in found.items():
    version.update(f'\0{name}\0{about.length}\0{about.mtime}'.encode())
  copies = pathlib.Path(COPIES).expanduser()
  place = copies / version.hexdigest()[:32]
  if place.is_dir():
    return place
  copies.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=copies) as unfinished:
    for name in found:
      with (
        (folder / name).open('rb') as source,
        open(os.path.join(unfinished, name), 'wb') as target,
      ):
        shutil.copyfileobj(source, target, 1 << 24)
    try:
      os.rename(unfinished, place)
    except OSError:  # Another process was quicker.
      if not place.is_dir():
        raise
    else:
      os.mkdir(unfinished)  # For the context to remove.
  return place
