"""Checks JSONL files and describes what is in them.

  python -m instruct_jax.data FILE...

The record type is told from the fields of the first line. Prints counts, a
table of lengths in words, and for comparisons the histogram of K, the share of
tied pairs and the labelers. Exit code 1 if any file is bad.
"""

import argparse
import collections
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from instruct_jax.data import records


def guess_type(values: Mapping[str, Any]) -> type:
  """The record type whose telling field `values` has.

  Raises:
    RecordError: it has none of them.
  """
  for field, record_type in (
    ('completions', records.Comparison),
    ('ranks', records.Comparison),
    ('response', records.Demonstration),
    ('prompt', records.Demonstration),
    ('id', records.Prompt),
    ('user', records.Prompt),
    ('text', records.Document),
  ):
    if field in values:
      return record_type
  raise records.RecordError(
    f'fields {", ".join(values) or "(none)"} fit no record type; see '
    'instruct_jax/data/records.py'
  )


def read_any(path: str) -> list[Any]:
  """Reads a JSONL file of whichever record type its first line has."""
  record_type = records.Document
  for number, values in records.iterate_lines(path):
    if isinstance(values, str):
      continue  # `read_jsonl` reports it with the other bad lines.
    try:
      record_type = guess_type(values)
    except records.RecordError as error:
      raise records.RecordError(f'{path}:{number}: {error}') from error
    break
  return records.read_jsonl(path, record_type)


def describe(path: str, rows: Sequence[Any]) -> str:
  """A few lines of text about the records of one file."""
  lines = [f'{path}: {len(rows)} {type(rows[0]).__name__} records']
  texts = collections.defaultdict(list)
  for row in rows:
    for field in ('text', 'prompt', 'response'):
      if field in vars(row):
        texts[field].append(vars(row)[field])
    if isinstance(row, records.Comparison):
      texts['completions'].extend(row.completions)
  lines.append(f'  {"words":<12}{"min":>8}{"median":>8}{"mean":>8}{"max":>8}')
  for field, values in texts.items():
    lengths = [len(value.split()) for value in values]
    lines.append(
      f'  {field:<12}{min(lengths):>8}{np.median(lengths):>8.0f}'
      f'{np.mean(lengths):>8.1f}{max(lengths):>8}'
    )
  for field in ('user', 'labeler', 'category', 'source'):
    if field in vars(rows[0]):
      found = collections.Counter(vars(row)[field] for row in rows)
      unknown = found.pop('', 0)
      common = ', '.join(f'{k} {n}' for k, n in found.most_common(3))
      lines.append(
        f'  {field}: {len(found)} distinct'
        + (f' ({common}{", ..." if len(found) > 3 else ""})' if found else '')
        + (f', {unknown} records without' if unknown else '')
      )
  if isinstance(rows[0], records.Comparison):
    sizes = collections.Counter(len(row.ranks) for row in rows)
    pairs = [
      a == b for row in rows for a, b in itertools.combinations(row.ranks, 2)
    ]
    lines.append(
      '  completions ranked: '
      + ', '.join(f'K={k} {n}' for k, n in sorted(sizes.items()))
    )
    lines.append(
      f'  pairs: {len(pairs)}, tied {sum(pairs)} ({np.mean(pairs):.1%}); '
      f'all tied in {sum(len(set(row.ranks)) == 1 for row in rows)} records'
    )
  return '\n'.join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the check; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m instruct_jax.data', description='Checks JSONL files.'
  )
  parser.add_argument('files', nargs='+', metavar='FILE')
  failed = 0
  for path in parser.parse_args(arguments).files:
    try:
      print(describe(path, read_any(path)))
    except records.RecordError as error:
      failed += 1
      print(error, file=sys.stderr)
  return int(failed > 0)


if __name__ == '__main__':
  sys.exit(main())
