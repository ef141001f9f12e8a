"""What a stage reads: found before it starts, hashed, and compared later.

`inputs.json` of a stage holds the hash of each of its inputs as the stage began
with it. It is compared when the stage goes on and when the finished stage is
used again. Contents count, not places or times: data may move, and be touched.
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

# Keys whose values name no input, though there may be a file of that name.
_NO_INPUTS = ('name', 'experiment', 'workdir', 'compilation_cache')
# A data set by name: the library that reads it checks it.
_NAMED_DATA = 'tfds:'


def read_by(
  experiment: ModuleType | None, config: ConfigDict
) -> dict[str, str]:
  """What a stage reads.

  Args:
    experiment: the module. Its `inputs(config)` says it; where there is no such
      function, each config value counts that names a file or folder there.
    config: of the stage.

  Returns:
    Label -> path. A label begins with the config key, dotted, that the path
    comes from: 'documents', 'models.sft' of NAME=PATH, 'sft/epochs.json'.
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
      # Every folder is a '.', and an address is no path.
      if path.strip('./') and not path.startswith(('http://', 'https://')):
        yield (f'{key}.{name}' if separator else key), path


def key_of(label: str, keys: Mapping[str, Any]) -> str:
  """The config key that a label begins with, or the label itself."""
  start = label.partition('/')[0]
  while start not in keys and '.' in start:
    start = start.rpartition('.')[0]
  return start if start in keys else label


def problem(path: str) -> str:
  """Why nothing can be read at `path`; '' where something is there.

  `EMPTY` of the empty path."""
  if not path:
    return EMPTY
  if path.startswith(_NAMED_DATA):
    return ''
  try:
    found = _place(path).exists()
  except ValueError as error:  # Of the hub, which says it all.
    return str(error)
  except KeyError as error:  # epath knows no such scheme.
    return f'{path}: no paths begin with {error}'
  return '' if found else f'{path}: no such file or folder'


def torn(path: str) -> str:
  """Why a model folder of ours is not whole; '' for all else."""
  place = epath.Path(path)
  if (place / 'params').exists() and not (place / MODEL_FILE).exists():
    return f'{path}: a model folder without its {MODEL_FILE}'
  return ''


def _place(path: str) -> epath.Path:
  return epath.Path(hub.locate(path) if path.startswith('hf:') else path)


def hashes(paths: Mapping[str, str]) -> dict[str, dict[str, str]]:
  """`{label: {'path': ..., 'sha256': ...}}` of those that are there."""
  return {
    label: {'path': path, 'sha256': content_hash(path)}
    for label, path in sorted(paths.items())
    if not problem(path) and not path.startswith(_NAMED_DATA)
  }


def content_hash(path: str) -> str:
  """SHA-256 of what is in a file, or of names and contents in a folder.

  A model folder of ours counts by its model.json, which holds a checksum of
  each array: how many files they are in, and when those were written, is not
  what the model is.
  """
  place = _place(path)
  if place.is_dir() and (place / MODEL_FILE).exists():
    place = place / MODEL_FILE
  if not place.is_dir():
    return _file_hash(place)
  total = hashlib.sha256()
  folders = [place]
  while folders:
    # epath has no recursive glob: object stores make it dear.
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
  """Of one file, once for each of its versions: several stages read it."""
  del version
  total = hashlib.sha256()
  with epath.Path(path).open('rb') as file:
    while block := file.read(1 << 24):
      total.update(block)
  return total.hexdigest()


def known(folder: epath.Path) -> dict[str, dict[str, str]]:
  """The inputs that a stage began with, or that were accepted since.

  Raises:
    ValueError: the record is not JSON.
  """
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
  """Label -> (as it was, as it is) of each input with other contents.

  What has vanished, and what the record does not name, is no difference here.
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
  folder: epath.Path,
  found: Mapping[str, tuple[dict[str, str], dict[str, str]]],
) -> None:
  """Records that these differences were accepted, and when."""
  path = folder / ACCEPTED_FILE
  rows = run.read_json(path) if path.exists() else []
  now = run.timestamp()
  rows += [
    {'label': label, 'time': now, 'before': before['sha256'], **after}
    for label, (before, after) in found.items()
  ]
  run.write_json(path, rows)
