"""Finds and hashes what a stage reads, and detects later changes.

A stage's `inputs.json` has the hashes of the inputs that it began with. They
are compared when the stage continues and when the finished stage is used again.
Only contents count, not paths or times.
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from instruct_jax import files, hub
from instruct_jax.infra import run

INPUTS_FILE = 'inputs.json'
ACCEPTED_FILE = 'accepted_inputs.json'
MODEL_FILE = 'model.json'
EMPTY = 'is empty'

# Keys whose values are never inputs, even if there is a file of that name.
_NO_INPUTS = ('name', 'experiment', 'workdir', 'compilation_cache')
# Prefix of a named data set, which its own library checks.
_NAMED_DATA = 'tfds:'


def read_by(
  experiment: ModuleType | None, config: ConfigDict
) -> dict[str, str]:
  """Returns the inputs that a stage reads.

  Args:
    experiment: the module, whose `inputs(config)` lists them. Without such a
      function, each config value that names an existing file or folder counts.
    config: of the stage.

  Returns:
    Label -> path. A label begins with the dotted config key of the path:
    'documents', 'models.sft' for NAME=PATH, 'sft/epochs.json'.
  """
  if hasattr(experiment, 'inputs'):
    return {
      label: path or '' for label, path in experiment.inputs(config).items()
    }
  return {
    label: path
    for label, path in _values(run.flat(run.plain(config)))
    if not problem(path)
  }


def _values(flat: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  for key, value in flat.items():
    if not isinstance(value, str) or key.split('.')[-1] in _NO_INPUTS:
      continue
    # One path, or NAME=PATH,NAME=PATH.
    for part in value.split(','):
      name, separator, place = part.partition('=')
      path = place if separator else part
      # Neither '.' nor an address is an input.
      if path.strip('./') and not path.startswith(('http://', 'https://')):
        yield (f'{key}.{name}' if separator else key), path


def key_of(label: str, keys: Mapping[str, Any]) -> str:
  """The config key that a label begins with, or the label itself."""
  start = label.partition('/')[0]
  while start not in keys and '.' in start:
    start = start.rpartition('.')[0]
  return start if start in keys else label


def problem(path: str) -> str:
  """Returns why `path` cannot be read: `EMPTY` for ''; '' if it exists."""
  if not path:
    return EMPTY
  if path.startswith(_NAMED_DATA):
    return ''
  try:
    found = _place(path).exists()
  except ValueError as error:  # Raised by the hub.
    return str(error)
  except KeyError as error:  # A scheme unknown to epath.
    return f'{path}: no paths begin with {error}'
  return '' if found else f'{path}: no such file or folder'


def torn(path: str) -> str:
  """Returns why one of our model folders is incomplete; '' for all else."""
  place = epath.Path(path)
  if (place / 'params').exists() and not (place / MODEL_FILE).exists():
    return f'{path}: a model folder without its {MODEL_FILE}'
  return ''


def _place(path: str) -> epath.Path:
  return epath.Path(hub.locate(path) if path.startswith('hf:') else path)


def hashes(paths: Mapping[str, str]) -> dict[str, dict[str, str]]:
  """Returns `{label: {'path': ..., 'sha256': ...}}` of inputs that exist."""
  return {
    label: {'path': path, 'sha256': content_hash(path)}
    for label, path in sorted(paths.items())
    if not problem(path) and not path.startswith(_NAMED_DATA)
  }


def content_hash(path: str) -> str:
  """SHA-256 of the content of a file, or of names and contents in a folder.

  For one of our model folders only model.json is hashed: it has a checksum of
  each array, and how arrays are split into files does not matter.
  """
  place = _place(path)
  if place.is_dir() and (place / MODEL_FILE).exists():
    place = place / MODEL_FILE
  if not place.is_dir():
    return _file_hash(place)
  total = hashlib.sha256()
  folders = [place]
  while folders:
    # epath has no recursive glob.
    for entry in sorted(folders.pop().iterdir()):
      if entry.is_dir():
        folders.append(entry)
      else:
        name = entry.relative_to(place).as_posix()
        total.update(f'{name}\0{_file_hash(entry)}\0'.encode())
  return total.hexdigest()


def _file_hash(path: epath.Path) -> str:
  if files.is_remote(path):
    found = path.stat()
    return _hash_of(os.fspath(path), (found.length, found.mtime))
  found = os.stat(path)
  version = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
  return _hash_of(os.fspath(path), version)


@functools.lru_cache(maxsize=4096)
def _hash_of(path: str, version: tuple) -> str:
  """SHA-256 of one version of a file, cached: several stages read it."""
  del version
  total = hashlib.sha256()
  with epath.Path(path).open('rb') as file:
    while block := file.read(1 << 24):
      total.update(block)
  return total.hexdigest()


def known(folder: epath.Path) -> dict[str, dict[str, str]]:
  """The inputs that a stage began with, or accepted later."""
  if not (folder / INPUTS_FILE).exists():
    return {}
  found = run.read_json(folder / INPUTS_FILE)
  if (folder / ACCEPTED_FILE).exists():
    for row in run.read_json(folder / ACCEPTED_FILE):
      found[row['label']] = {'path': row['path'], 'sha256': row['sha256']}
  return found


def differences(
  folder: epath.Path, paths: Mapping[str, str]
) -> dict[str, tuple[dict[str, str], dict[str, str]]]:
  """Label -> (before, now) of each recorded input whose contents have changed.

  Inputs that no longer exist are left out.
  """
  before = known(folder)
  now = hashes(
    {label: path for label, path in paths.items() if label in before}
  )
  return {
    label: (before[label], found)
    for label, found in now.items()
    if found['sha256'] != before[label]['sha256']
  }


def accept(
  folder: epath.Path, found: Mapping[str, tuple[dict[str, str], dict[str, str]]]
) -> None:
  """Records these differences as accepted, with the time."""
  path = folder / ACCEPTED_FILE
  rows = run.read_json(path) if path.exists() else []
  now = run.timestamp()
  rows += [
    {'label': label, 'time': now, 'before': before['sha256'], **after}
    for label, (before, after) in found.items()
  ]
  run.write_json(path, rows)
