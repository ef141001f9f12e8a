"""Folders that commands write: every file of a run, or none; old ones named.

A command writes its files below the folder that `writing` yields, and they come
to their place together when all of them are there. A file of an earlier run
that this run would have to replace and does not write is never left beside the
new ones: the run is refused and the file named, or, with --replace, the file
goes. What a folder holds, and which command wrote it, is in its written.json;
only files that are listed there unchanged are ever removed.

A new folder appears at once. In a folder that exists, and in an object store,
the old files go before the new ones come, so that no kill leaves a mixture;
what a killed run leaves is a folder whose name ends in `.unfinished`, which the
next run clears away.
"""

import contextlib
import fnmatch
import json
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
  """What a folder's written.json lists: name -> bytes, command, settings.

  {} where there is none.

  Raises:
    RecordError: there is one that `writing` did not write.
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
      f'{path}: not a list of files that a command of ours wrote; move it away'
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
  """Yields an empty folder; what is written there goes to `folder` at the end.

  Nothing of `folder` changes when the body raises, or when the run is refused.

  Args:
    folder: made if it is missing.
    owned: patterns (`prompts_*`) of the names that this command answers for.
      Files with other names may stay; a line on standard error names those
      that a command of ours wrote, and other JSONL.
    command: what writes, for written.json and messages.
    settings: what decided the content, for written.json (JSON).
    inputs: files and folders that are read: none may be overwritten.
    replace: remove owned files of earlier runs that this run does not write.

  Raises:
    RecordError: an owned file would be left beside new ones, or an input lies
      among the owned ones, or `folder` is a file.
  """
  folder = epath.Path(folder)
  is_remote = files.is_remote(folder)
  if not is_remote:  # Absolute, so that `.` has a name and a parent.
    folder = folder.expanduser().absolute()
  if folder.exists() and not folder.is_dir():
    raise records.RecordError(f'{folder}: is a file; name a folder')
  _check_inputs(folder, owned, inputs)
  is_new = not is_remote and not folder.exists()
  if is_remote:  # Nothing is moved there, but an object appears at once.
    unfinished = epath.Path(tempfile.mkdtemp())
  elif is_new:
    unfinished = folder.parent / f'.{folder.name}{_UNFINISHED}'
  else:
    unfinished = folder / _UNFINISHED
  _clear(unfinished)
  unfinished.mkdir(parents=True)
  try:
    yield unfinished
    new = sorted(_names(unfinished))
    known = written(folder)
    stale = _stale(folder, owned, new, known, replace)
    entries = {
      name: entry for name, entry in known.items() if name not in stale
    }
    for name in new:
      entries[name] = {
        'bytes': (unfinished / name).stat().length,
        'command': command,
        'settings': dict(settings or {}),
      }
    text = json.dumps({'files': entries}, indent=2, sort_keys=True) + '\n'
    if is_new:
      records.write_bytes(unfinished / MANIFEST, text.encode('utf-8'))
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
    records.write_bytes(folder / MANIFEST, text.encode('utf-8'))
  except records.RecordError as error:
    # What is wrong with a file is said of the place where it was to be.
    raise records.RecordError(
      str(error).replace(str(unfinished), str(folder))
    ) from error
  finally:
    _clear(unfinished)


def _check_inputs(folder, owned, inputs) -> None:
  for path in inputs:
    path = epath.Path(path)
    if not files.is_remote(path):
      path = path.absolute()
    if path == folder or (
      path.parent == folder and _is_owned(path.name, owned)
    ):
      raise records.RecordError(
        f'{path}: is read and would be overwritten; name another folder for '
        'the output'
      )


def _is_owned(name: str, owned: Sequence[str]) -> bool:
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in owned)


def _clear(folder: epath.Path) -> None:
  if folder.exists():
    folder.rmtree()


def _names(folder: epath.Path, prefix: str = '') -> Iterator[str]:
  """Names of the files in a folder and below, relative to it."""
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
  """The owned files that may and must go; names the others that stay."""
  if not folder.exists():
    return []
  there = {path.name for path in folder.iterdir() if not path.is_dir()}
  # Below, only where this run or an earlier one wrote.
  for below in sorted({n.split('/')[0] for n in (*new, *known) if '/' in n}):
    if (folder / below).is_dir():
      there.update(_names(folder / below, f'{below}/'))
  left = sorted(
    name for name in there - set(new) - {MANIFEST} if not name.startswith('.')
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
    if name not in known
    or known[name].get('bytes') != (folder / name).stat().length
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
      'remove what is old'
    )
  if stale:
    _note(f'{folder}: removed {_listed(stale)} of {by(stale[0])}')
  if others:
    commands = sorted({by(name) for name in others if name in known})
    _note(
      f'{folder}: also holds {_listed(others)}, not written by this run'
      + (f' but by {"; ".join(commands)}' if commands else '')
    )
  return stale


def _listed(names: Sequence[str]) -> str:
  more = len(names) - _MAX_NAMED
  return ', '.join(names[:_MAX_NAMED]) + (f' and {more} more' * (more > 0))


def _note(text: str) -> None:
  print(f'note: {text}', file=sys.stderr)
