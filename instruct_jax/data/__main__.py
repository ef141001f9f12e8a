"""Checks JSONL files and describes what is in them.

  python -m instruct_jax.data FILE... [--tokenizer=FOLDER] [--limit=TOKENS]

The record type is told from the fields of the first line. Prints counts and a
table of lengths, in words or, with a tokenizer, in the tokens of training rows
(template, BOS and the end of each response included), and how many records are
longer than the limit as a whole. For comparisons also the histogram of K,
the share of tied pairs, the labelers, and how often two labelers of the same
completions agree. Exit code 1 if any file is bad, or if nothing can be learned
from it (comparisons that are all ties).
"""

import collections
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from instruct_jax import command
from instruct_jax.data import invisible, labels, loader, records
from instruct_jax.data import tokenizer as tokenizer_lib


def guess_type(values: Mapping[str, Any]) -> type:
  """The record type whose telling field `values` has.

  Raises:
    RecordError: it has none of them.
  """
  for field, record_type in (
    ('completions', records.Comparison),
    ('ranks', records.Comparison),
    ('scores', records.Comparison),
    ('response', records.Demonstration),
    ('prompt', records.Demonstration),
    ('id', records.Prompt),
    ('user', records.Prompt),
    ('turns', records.Prompt),
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


def describe(
  path: str,
  rows: Sequence[Any],
  tokenizer: tokenizer_lib.Tokenizer | None = None,
  limit: int | None = None,
) -> str:
  """A few lines of text about the records of one file.

  Args:
    path: named in the text.
    rows: of one record type.
    tokenizer: lengths are in its tokens; None counts words.
    limit: records with a longer text, prompt and response together, are
      counted; with completions, the longest of them.
  """
  lines = [f'{path}: {len(rows)} {type(rows[0]).__name__} records']
  if tokenizer is None:
    unit, lengths = 'words', _words_of(rows)
  else:
    unit = 'tokens'
    rows, lengths, refusals = _tokens_of(rows, tokenizer)
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
    whole = next(iter(lengths.values())).copy()
    if 'response' in lengths:
      whole += lengths['response']
    if 'completions' in lengths:
      ends = np.cumsum([len(row.completions) for row in rows])
      parts = np.split(lengths['completions'], ends[:-1])
      whole += np.array([part.max() for part in parts])
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


def _words_of(rows: Sequence[Any]) -> dict[str, np.ndarray]:
  """Field -> words of each text; all completions of all rows in one list."""
  texts = collections.defaultdict(list)
  for row in rows:
    for field in ('text', 'prompt', 'response'):
      if field in vars(row):
        texts[field].append(vars(row)[field])
    if isinstance(row, records.Comparison):
      texts['completions'].extend(row.completions)
  return {
    field: np.array([len(text.split()) for text in values])
    for field, values in texts.items()
  }


def _tokens_of(
  rows: Sequence[Any], tokenizer: tokenizer_lib.Tokenizer
) -> tuple[list[Any], dict[str, np.ndarray], list[str]]:
  """(rows that the template takes, `_words_of` in tokens, refusals)."""

  def lengths(encoded):
    return np.array([len(ids) for ids in encoded])

  if isinstance(rows[0], records.Document):
    documents = tokenizer.encode_documents([row.text for row in rows])
    return list(rows), {'text': lengths(documents) + 1}, []  # EOS ends them.
  prompts, refusals = loader.encode_prompts(rows, tokenizer)
  taken = [
    row for row, ids in zip(rows, prompts, strict=True) if ids is not None
  ]
  name = 'text' if isinstance(rows[0], records.Prompt) else 'prompt'
  found = {name: lengths(ids for ids in prompts if ids is not None)}
  if isinstance(rows[0], records.Demonstration):
    texts = [row.response for row in taken]
    found['response'] = lengths(tokenizer.encode_responses(texts, ended=True))
  elif isinstance(rows[0], records.Comparison):
    texts = [text for row in taken for text in row.completions]
    ids = tokenizer.encode_responses(texts, ended=True)
    found['completions'] = lengths(ids)
  return taken, found, refusals


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
  same, compared = agreement(rows)
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


def agreement(rows: Sequence[records.Comparison]) -> tuple[int, int]:
  """(pairs ordered alike, pairs ordered by both), over any two labelers of one
  prompt; see `labels.agreement`."""
  found = labels.agreement(rows)
  return sum(found.agreed), sum(found.counted)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the check; returns the exit code."""
  parser = command.Parser(
    prog='python -m instruct_jax.data', description='Checks JSONL files.'
  )
  parser.add_argument('files', nargs='+', metavar='FILE')
  parser.add_argument('--tokenizer', metavar='FOLDER', help='or hf:NAME')
  parser.add_argument('--limit', type=int, metavar='TOKENS')
  options = parser.parse_args(arguments)
  tokenizer = None
  if options.tokenizer:
    try:
      tokenizer = tokenizer_lib.Tokenizer.load(options.tokenizer)
    except ValueError as error:
      print(error, file=sys.stderr)
      return 1
  failed = 0
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
