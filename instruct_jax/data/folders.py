"""Output folders of commands: all files of a run, or none.

A command writes into the folder that `writing` yields, and all its files move
into place together at the end. If an earlier run's file would be left beside
the new ones, the run is refused; with --replace the file is removed instead.
written.json lists a folder's files and the command that wrote each; only files
that still match it are ever removed.

A new folder appears in one step. In an existing folder, and in an object store,
the old files are removed before the new ones arrive, so that a killed process
never leaves a mixture. It leaves a folder `*.unfinished`, which the next run
removes.
"""

import argparse
import contextlib
import fnmatch
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from instruct_jax import files
from instruct_jax.data import records

MANIFEST = 'written.json'
_UNFINISHED = '.unfinished'
_MAX_NAMED = 5


def written(folder: epath.PathLike) -> dict[str, dict[str, Any]]:
  """The entries of a folder's written.json: name -> bytes, command, settings.

  Raises:
    RecordError: written.json is not of the form that `writing` writes.
  """
  path = epath.Path(folder) / MANIFEST
  if not path.exists():
    return {}
  found = records.read_json(path)
  entries = found.get('files') if isinstance(found, dict) else None
  if not isinstance(entries, dict) or not all(
    isinstance(entry, dict) for entry in entries.values()
  ):
    raise records.RecordError(
      f'{path}: not a list of files that this project wrote; move it away'
    )
  return entries


@contextlib.contextmanager
def writing(
  folder: epath.PathLike,
  owned: Sequence[str],
  *,
  command: str,
  settings: Mapping[str, Any] | None = None,
  inputs: Iterable[epath.PathLike] = (),
  replace: bool = False,
) -> Iterator[epath.Path]:
  """Yields an empty folder whose files move to `folder` at the end.

  `folder` does not change if the body raises or the run is refused.

  Args:
    folder: created if missing.
    owned: patterns (`prompts_*`) of the names that this command owns. Other
      files may stay; a line on standard error names those that are JSONL or
      in written.json.
    command, settings: recorded in written.json: the command, and the settings
      (JSON) that determined the content.
    inputs: files and folders that are read; none may be overwritten.
    replace: whether to remove owned files of earlier runs that this run does
      not write.

  Raises:
    RecordError: an owned file would be left beside new ones, an input is among
      the owned files, another process writes there, or `folder` is a file.
  """
  is_remote = files.is_remote(folder)
  # Absolute, so that `.` has a name and a parent.
  folder = files.absolute(epath.Path(folder).expanduser())
  if folder.exists() and not folder.is_dir():
    raise records.RecordError(f'{folder}: is a file; name a folder')
  place = _resolved(folder)
  for path in map(files.absolute, inputs):
    real = _resolved(path)
    if real == place or (real.parent == place and _is_owned(real.name, owned)):
      raise records.RecordError(
        f'{path}: is an input and would be overwritten; name another folder '
        'for the output'
      )
  is_new = not is_remote and not folder.exists()
  if is_remote:  # Objects cannot be renamed, but each appears in one step.
    unfinished = epath.Path(tempfile.mkdtemp())
  elif is_new:
    unfinished = folder.parent / f'.{folder.name}{_UNFINISHED}'
  else:
    unfinished = folder / _UNFINISHED

  def finish():
    new = sorted(_names(unfinished))
    known = written(folder)
    stale = _stale(folder, owned, new, known, replace)
    entries = {n: entry for n, entry in known.items() if n not in stale}
    for name in new:
      entries[name] = {
        'bytes': (unfinished / name).stat().length,
        'command': command,
        'settings': dict(settings or {}),
      }
    text = json.dumps({'files': entries}, indent=2, sort_keys=True) + '\n'
    if is_new and not folder.exists():
      records.write_bytes(unfinished / MANIFEST, text.encode())
      unfinished.rename(folder)
      return
    for name in (*stale, *new):
      (folder / name).unlink(missing_ok=True)
    for name in new:
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      if is_remote:
        (folder / name).write_bytes((unfinished / name).read_bytes())
      else:
        (unfinished / name).rename(folder / name)
    records.write_bytes(folder / MANIFEST, text.encode())

  try:
    with files.locked(unfinished):
      yield unfinished
      finish()
  except files.InUseError as error:
    raise records.RecordError(
      f'{folder}: another process is writing there; wait until it has ended, '
      'or name another folder'
    ) from error
  except records.RecordError as error:
    # The message names a bad file by its final path.
    raise records.RecordError(
      str(error).replace(str(unfinished), str(folder))
    ) from error


def add_replace(parser: argparse.ArgumentParser) -> None:
  """Adds the flag --replace, for `writing`, to a command's parser."""
  parser.add_argument(
    '--replace',
    action='store_true',
    help='remove files of an earlier run that this one does not write',
  )


def _is_owned(name: str, owned: Sequence[str]) -> bool:
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in owned)


def _resolved(path: epath.Path) -> epath.Path:
  """The path without links."""
  if files.is_remote(path):
    return path
  return epath.Path(os.path.realpath(path))


def _names(folder: epath.Path, prefix: str = '') -> Iterator[str]:
  """Names of the files in a folder and its subfolders, relative to it."""
  for path in folder.iterdir():
    if path.is_dir():
      yield from _names(path, f'{prefix}{path.name}/')
    else:
      yield f'{prefix}{path.name}'


def _stale(
  folder: epath.Path,
  owned: Sequence[str],
  new: Sequence[str],
  known: Mapping[str, Mapping[str, Any]],
  replace: bool,
) -> list[str]:
  """The owned files to remove; prints notes about them and others that stay.

  Raises RecordError if one of them may not be removed.
  """
  if not folder.exists():
    return []
  found = {path.name for path in folder.iterdir() if not path.is_dir()}
  # Subfolders count only if this run or an earlier one wrote there.
  for below in {n.split('/')[0] for n in (*new, *known) if '/' in n}:
    if (folder / below).is_dir():
      found.update(_names(folder / below, f'{below}/'))
  left = sorted(
    name for name in found - {*new, MANIFEST} if not name.startswith('.')
  )
  stale = [name for name in left if _is_owned(name, owned)]
  others = [
    name
    for name in left
    if name not in stale and (name in known or '.jsonl' in name)
  ]

  def by(name):
    return known[name].get('command', '?')

  foreign = [
    name
    for name in stale
    if known.get(name, {}).get('bytes') != (folder / name).stat().length
  ]
  if foreign:
    raise records.RecordError(
      f'{folder}: holds {_listed(foreign)}, which this run does not write and '
      f'{MANIFEST} does not list as it is; move it away, or name another folder'
    )
  if stale and not replace:
    raise records.RecordError(
      f'{folder}: holds {_listed(stale)} of an earlier run ({by(stale[0])}), '
      'which this run does not write; name another folder, or add --replace to '
      'remove old files'
    )
  if stale:
    _note(f'{folder}: removed {_listed(stale)} of {by(stale[0])}')
  if others:
    commands = '; '.join(sorted({by(name) for name in others if name in known}))
    _note(
      f'{folder}: also holds {_listed(others)}, not written by this run'
      + f' but by {commands}' * bool(commands)
    )
  return stale


def _listed(names: Sequence[str]) -> str:
  shown = ', '.join(names[:_MAX_NAMED])
  left = len(names) - _MAX_NAMED
  return f'{shown} and {left} more' if left > 0 else shown


def _note(text: str) -> None:
  print(f'note: {text}', file=sys.stderr)
