"""Rankings in the JSON of Argilla and of Label Studio.

A file is a list of records, or has one record per line. A record holds a
prompt, its completions, and how several people and models ranked them.

  Argilla       pages of the REST interface, version 1, and rows of a data set
                on the Hub, all with ranks and ties; version 2's
                `records.to_json`, which has none (`argilla._check_orders`)
  Label Studio  the JSON and JSON_MIN exports: `Ranker`, whose buckets may be
                ranks (`rank1`, `rank2`, ...), or `Pairwise`

Neither has fields for all that the site knows. We write the rest under the key
`instruct_jax` of a record's metadata (Argilla, as text) or meta (Label Studio),
which these programs preserve. A suggestion that labelers do not see goes there,
too, because in its usual field these programs would show it. Both identify
people by ids.
"""

import collections
import dataclasses
import json
from collections.abc import Sequence

from instruct_jax.data import records
from instruct_jax.labeling import argilla, label_studio, parts

FORMATS = {
  'jsonl': 'JSON lines',
  'argilla': 'Argilla',
  'label_studio': 'Label Studio',
}
_PROGRAMS = {'argilla': argilla, 'label_studio': label_studio}


def check_format(content: bytes, source: str, name: str) -> None:
  """Raises RecordError if a file's first record is of another format."""
  text = content.decode('utf-8-sig', 'replace').lstrip()
  try:
    first, _ = json.JSONDecoder().raw_decode(text, text.index('{', 0, 1000))
  except (ValueError, RecursionError):
    return  # The reader reports what is wrong.
  looks = _look(first)
  if looks and name not in looks:
    title = {'jsonl': 'JSON lines'}.get(looks[0], f"{FORMATS[looks[0]]}'s")
    raise records.RecordError(
      f'{source}: this looks like {title}; give --format={looks[0]}'
    )


def _look(record):
  """The formats that a record looks like; empty if none is recognized."""
  keys = set(record)
  is_argilla = (
    isinstance(record.get('fields'), dict)
    or any(key.endswith(('.responses', '-suggestion')) for key in keys)
    or any(
      isinstance(one, dict)
      and not {'fields', 'record', 'user_id'}.isdisjoint(one)
      for value in record.values()
      if isinstance(value, list)
      for one in value[:1]
    )
  )
  is_studio = (
    isinstance(record.get('data'), dict)
    or {'annotator', 'annotation_id'} <= keys
  )
  is_ours = isinstance(record.get('completions'), list)
  found = {'argilla': is_argilla, 'label_studio': is_studio, 'jsonl': is_ours}
  return [name for name, looks in found.items() if looks]


def read(
  content: bytes, source: str, name: str
) -> tuple[list[parts.Item], dict[str, int]]:
  """Reads a file of a format other than JSONL.

  Args:
    content: bytes of the file.
    source: the file's name, for messages.
    name: of the format, one of `FORMATS`.

  Returns:
    The tasks in file order; and notes to the user about them, with counts.

  Raises:
    RecordError: the file is not in the format, in one line; or bad records, up
      to ten, each with its number from 1.
  """
  told = collections.Counter()
  found = list(enumerate(_records(content, source, name), start=1))
  items = _PROGRAMS[name].read(found, source, told)
  return [dataclasses.replace(item, number=n) for n, item in items], dict(told)


def _records(content, source, name):
  try:
    text = content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise records.RecordError(
      f'{source}: byte {error.start} is not UTF-8; convert the file'
    ) from error
  try:
    found = parts.loads(text)
  except (ValueError, RecursionError) as error:
    first = text.strip().partition('\n')[0].rstrip()
    if not (first.startswith('{') and first.endswith('}')):
      raise records.RecordError(
        f'{source}: not JSON ({error}); export it again as JSON'
      ) from error
    found = _lines(text, source)
  if isinstance(found, dict):
    found = [found]
  if name == 'argilla' and isinstance(found, list):
    found = [record for page in found for record in _unwrapped(page)]
  if not isinstance(found, list) or not found:
    raise records.RecordError(f'{source}: holds no records of {FORMATS[name]}')
  records.raise_problems(
    source,
    [
      (number, 'expected a JSON object')
      for number, record in enumerate(found, 1)
      if not isinstance(record, dict)
    ],
    'record',
  )
  return found


def _unwrapped(page):
  """The records of a page of Argilla's REST interface, or the record itself."""
  if not isinstance(page, dict) or not isinstance(page.get('items'), list):
    return [page]
  return [
    one['record'] if isinstance(one, dict) and 'record' in one else one
    for one in page['items']
  ]


def _lines(text, source):
  found, bad = [], []
  for number, line in enumerate(text.split('\n'), 1):
    try:
      found += [parts.loads(line)] if line.strip() else []
    except (ValueError, RecursionError) as error:
      bad.append((number, f'not JSON ({error})'))
  records.raise_problems(source, bad)
  return found


def written(name: str, items: Sequence[parts.Item]) -> dict[str, bytes]:
  """Returns the files for tasks with their answers, by file name.

  Args:
    name: 'argilla' or 'label_studio'.
    items: the tasks, with distinct numbers.
  """
  return _PROGRAMS[name].files(items)
