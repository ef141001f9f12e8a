"""Checks JSONL files and describes their content.

  python -m instruct_jax.data FILE... [--tokenizer=FOLDER] [--limit=TOKENS]
  python -m instruct_jax.data formats [NAME...]

The fields of the first line determine the record type. The program prints
counts, a table of lengths, and how many records are longer than the limit as a
whole. Lengths are in words or, with a tokenizer, in tokens of training rows
(including template, BOS and the end of each response). For comparisons it also
prints the histogram of K, the share of tied pairs, the labelers, and how often
two labelers agree. The exit code is 1 if a file is bad or teaches nothing
(comparisons that are all ties).

`formats` lists the published formats that `convert` reads: what each one gives,
whose data it is, its licence, and entries as they are in its files.
"""

import collections
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from instruct_jax import command
from instruct_jax.data import importers, invisible, labels, loader, records
from instruct_jax.data import tokenizer as tokenizer_lib

# The first of these fields that a line has determines its record type.
_TYPES = {
  'completions': records.Comparison,
  'ranks': records.Comparison,
  'scores': records.Comparison,
  'response': records.Demonstration,
  'prompt': records.Demonstration,
  'id': records.Prompt,
  'user': records.Prompt,
  'turns': records.Prompt,
  'text': records.Document,
}


def read_any(path: str) -> list[Any]:
  """Reads a JSONL file whose first line determines the record type."""
  record_type = records.Document
  for number, values in records.iterate_lines(path):
    if isinstance(values, str):
      continue  # `read_jsonl` reports it with the other bad lines.
    found = [kind for field, kind in _TYPES.items() if field in values]
    if not found:
      raise records.RecordError(
        f'{path}:{number}: fields {", ".join(values) or "(none)"} fit no '
        'record type; see instruct_jax/data/records.py'
      )
    record_type = found[0]
    break
  return records.read_jsonl(path, record_type)


def describe(
  path: str,
  rows: Sequence[Any],
  tokenizer: tokenizer_lib.Tokenizer | None = None,
  limit: int | None = None,
) -> str:
  """A few lines of text about the records (of one type) of the file `path`.

  Lengths are in tokens, or in words without a tokenizer. With a `limit`, it
  counts the records whose prompt and response (or longest completion) together
  exceed it.
  """
  lines = [f'{path}: {len(rows)} {type(rows[0]).__name__} records']
  unit = 'words' if tokenizer is None else 'tokens'
  rows, lengths, refusals = _lengths(rows, tokenizer)
  if refusals:
    lines.append(f'  refused: {len(refusals)} records, first {refusals[0]}')
  if not rows:
    return '\n'.join(lines)
  columns = ('min', 'median', 'mean', '95 %', '99 %', 'max')
  lines.append(f'  {unit:<12}' + ''.join(f'{name:>8}' for name in columns))
  for field, found in lengths.items():
    low, median, high, higher, most = np.percentile(found, [0, 50, 95, 99, 100])
    lines.append(
      f'  {field:<12}{low:>8.0f}{median:>8.0f}{found.mean():>8.1f}'
      f'{high:>8.0f}{higher:>8.0f}{most:>8.0f}'
    )
  if limit is not None:
    whole = next(iter(lengths.values()))
    if 'response' in lengths:
      whole = whole + lengths['response']
    if 'completions' in lengths:
      ends = np.cumsum([0, *(len(row.completions) for row in rows[:-1])])
      whole = whole + np.maximum.reduceat(lengths['completions'], ends)
    lines.append(
      f'  longer than {limit} {unit}: {(whole > limit).sum()} records'
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
  if 'turns' in vars(rows[0]):
    turns = collections.Counter(len(row.turns) for row in rows if row.turns)
    if turns:
      lines.append(
        '  turns: ' + ', '.join(f'{k} {n}' for k, n in sorted(turns.items()))
      )
  if isinstance(rows[0], records.Comparison):
    lines += _describe_labels(rows)
  return '\n'.join(lines)


def _lengths(
  rows: Sequence[Any], tokenizer: tokenizer_lib.Tokenizer | None
) -> tuple[Sequence[Any], dict[str, np.ndarray], list[str]]:
  """(rows that the template accepts, field -> length of each text, refusals).

  The lengths of all rows' completions are in one array.
  """
  field = 'prompt' if hasattr(rows[0], 'prompt') else 'text'
  refusals: list[str] = []
  if tokenizer is None:
    found = [getattr(row, field).split() for row in rows]
  elif isinstance(rows[0], records.Document):
    documents = tokenizer.encode_documents([row.text for row in rows])
    found = [[*ids, tokenizer.eos_id] for ids in documents]
  else:
    found, refusals = loader.encode_prompts(rows, tokenizer)
    answers, others = loader.encode_answers(rows, tokenizer)
    refusals += others
    kept = [
      each
      for each in zip(rows, found, answers, strict=True)
      if None not in each[1:]
    ]
    rows, found, answers = zip(*kept, strict=True) if kept else ((), (), ())
  pieces = {field: found}
  for field in ('response', 'completions'):
    if rows and hasattr(rows[0], field):
      texts = [getattr(row, field) for row in rows]
      if field == 'completions':
        texts = [text for completions in texts for text in completions]
      if tokenizer is None:
        pieces[field] = [text.split() for text in texts]
      else:
        pieces[field] = [ids for each in answers for ids in each]
  lengths = {name: np.array([*map(len, p)]) for name, p in pieces.items()}
  return rows, lengths, refusals


def _describe_labels(rows: Sequence[records.Comparison]) -> list[str]:
  sizes = collections.Counter(len(row.ranks) for row in rows)
  pairs = [
    a == b for row in rows for a, b in itertools.combinations(row.ranks, 2)
  ]
  all_tied = sum(len(set(row.ranks)) == 1 for row in rows)
  empty = sum(
    invisible.is_blank(text) for row in rows for text in row.completions
  )
  lines = [
    '  completions ranked: '
    + ', '.join(f'K={k} {n}' for k, n in sorted(sizes.items())),
    f'  pairs: {len(pairs)}, tied {sum(pairs)} ({np.mean(pairs):.1%}); '
    f'all tied in {all_tied} records',
    f'  empty completions: {empty}',
  ]
  found = labels.agreement(rows)
  same, compared = sum(found.agreed), sum(found.counted)
  if compared:
    lines.append(
      f'  labelers agree on {same} of {compared} pairs ({same / compared:.1%}) '
      'that two of them ordered'
    )
  else:
    lines.append('  agreement: no completions were ranked by two labelers')
  nameless = sum(not row.labeler for row in rows)
  if nameless:
    lines.append(
      f"  without a labeler's name, so left out of the agreement: {nameless} "
      'records'
    )
  return lines


def describe_formats(names: Sequence[str] = ()) -> str:
  """A paragraph about each of these formats, or about every format.

  Raises:
    ValueError: there is no such format.
  """
  unknown = [name for name in names if name not in importers.FORMATS]
  if unknown:
    known = ', '.join(importers.FORMATS)
    raise ValueError(f'format {unknown[0]!r}; known: {known}')
  paragraphs = []
  for name in names or importers.FORMATS:
    form = importers.FORMATS[name]
    paragraphs.append(
      '\n  '.join(
        (
          f'{name}: {form.kind}',
          form.about,
          f'licence: {form.licence}',
          *([f'note: {form.note}'] if form.note else ()),
          *(f'| {line}' for line in form.lines()),
        )
      )
    )
  return '\n\n'.join(paragraphs)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the check, or lists the formats; returns the exit code."""
  parser = command.Parser(
    prog='python -m instruct_jax.data',
    description='Checks JSONL files; or lists the published formats.',
  )
  parser.add_argument(
    'files', nargs='+', metavar='FILE', help='or formats [NAME...]'
  )
  parser.add_argument('--tokenizer', metavar='FOLDER', help='or hf:NAME')
  parser.add_argument('--limit', type=int, metavar='TOKENS')
  options = parser.parse_args(arguments)
  tokenizer, failed = None, 0
  try:
    if options.files[0] == 'formats':
      print(describe_formats(options.files[1:]))
      return 0
    if options.tokenizer:
      tokenizer = tokenizer_lib.Tokenizer.load(options.tokenizer)
  except ValueError as error:
    print(error, file=sys.stderr)
    return 1
  for path in options.files:
    try:
      rows = read_any(path)
      print(describe(path, rows, tokenizer, options.limit))
      if isinstance(rows[0], records.Comparison):
        records.check_labels(rows, path)
    except (ValueError, OSError) as error:
      failed += 1
      print(error, file=sys.stderr)
  return int(failed > 0)


if __name__ == '__main__':
  command.end(main)
