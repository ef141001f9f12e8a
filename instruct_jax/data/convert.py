"""Writes published data as the JSONL files that the stages read.

  python -m instruct_jax.data.convert hh FILE... --output=DIR --valid=0.05

DIR gets `_train.jsonl` and `_valid.jsonl` files of comparisons, demonstrations
and prompts, whichever the format (see `importers`) has.

  python -m instruct_jax.data.convert documents books.txt tfds:lm1b/train \\
    --weights=3,1 --output=DIR
  python -m instruct_jax.data.convert comparisons ranked.csv \\
    --field='prompt={question}\\n' --field='completions={a}' \\
    --field='completions={b}' --field='scores={score_a}' \\
    --field='scores={score_b}' --output=DIR

read JSONL of `records.py` and the sources of `sources.py`, and mix them by
weight. Tables (tfds:, datasets:, .csv, .tsv, .parquet, .xlsx, .json, other
.jsonl) need a --field for each field of the record. A folder stands for the
data files in it (or, if it has none, in its subfolders) and is one source; a
note names what else is in it.

All rows that begin with the same question (`records.opening`) are in one split,
which depends only on that opening and the seed, so conversions with the same
seed and share are consistent. What is left out is counted by reason. Identical
demonstrations by one labeler are kept once.
"""

import argparse
import collections
import itertools
import math
import sys
from collections.abc import Mapping, Sequence

from etils import epath

from instruct_jax import command
from instruct_jax.data import folders, importers, records, sources

RECORDS = {
  'documents': records.Document,
  'prompts': records.Prompt,
  'demonstrations': records.Demonstration,
  'comparisons': records.Comparison,
}


def split_of(row: records.Record, valid: float, seed: int) -> str:
  """'valid' for about the share `valid` of all conversations, else 'train'."""
  drawn = int.from_bytes(records.draw(seed, records.opening(row)))
  return 'valid' if drawn < valid * 2**64 else 'train'


def convert(
  name: str,
  specs: Sequence[epath.PathLike],
  output: epath.PathLike,
  *,
  valid: float,
  seed: int,
  weights: Sequence[float] = (),
  fields: Mapping[str, str | Sequence[str]] | None = None,
  words_per_document: int = 300,
  model_outputs: bool = False,
  replace: bool = False,
) -> dict[str, int]:
  """Reads published files or other sources and writes splits to `output`.

  Args:
    name: one of `importers.FORMATS`, or of `RECORDS` for other sources.
    specs: files of the format, or folders of them; for `RECORDS`, JSONL of
      `records.py`, tables with `fields`, or, for documents, anything that
      `sources.read_documents` reads.
    output: a folder.
    valid: share of the conversations (or documents) used for validation.
    seed: of the split and of the mixture.
    weights: one per source, see `sources.mix`; () keeps all records in order.
    fields: format strings over the columns of tables, see `sources.py`.
    words_per_document: approximate length of pieces of plain text.
    model_outputs: whether to keep demonstrations that models wrote; those of
      `importers.FORMATS` have the `labeler` `model:NAME`.
    replace: see `folders.writing`.

  Returns:
    How many records each file got (0 means that there is no such file), and
    `skipped: REASON` -> how many entries.

  Raises:
    RecordError: an unreadable source, or nothing is left; nothing is written.
    ValueError: an unknown format, a bad share, or the wrong number of weights.
  """
  if not 0 < valid < 1:
    raise ValueError(f'valid is {valid}; it must be in (0, 1)')
  _check_distinct(specs)
  counts = collections.Counter()
  if name in RECORDS:
    parts = [
      _read(spec, name, fields, words_per_document, model_outputs, counts)
      for spec in specs
    ]
    if name == 'prompts':
      records.check_ids(specs, parts)
    rows = [row for part in parts for row in part]
    if weights:
      total, rows = len(rows), sources.mix(parts, weights, seed)
      reason = 'skipped: beyond the weights of the mixture'
      counts[reason] = total - len(rows)
    kinds = {name: rows}
  elif weights or fields:
    raise ValueError(
      f'--weights and --field go with {", ".join(RECORDS)}; convert {name} '
      'first, then mix its files'
    )
  elif name in importers.FORMATS:
    kinds = _import(name, specs, model_outputs, counts)
  else:
    known = ', '.join((*importers.FORMATS, *RECORDS))
    raise ValueError(f'format {name!r}; known: {known}')
  for kind in ('comparisons', 'demonstrations'):
    if kind in kinds:
      kinds[kind] = _without_copies(kind, kinds[kind], counts)
  reason = 'kept: a comparison that prefers an answer to itself'
  counts[reason] = sum(map(_prefers_a_copy, kinds.get('comparisons', ())))
  counts = {reason: number for reason, number in counts.items() if number}
  if not any(kinds.values()):
    raise records.RecordError(
      f'{", ".join(map(str, specs))}: nothing is left to write; '
      + '; '.join(f'{reason}: {number}' for reason, number in counts.items())
    )
  split = {'valid': valid, 'seed': seed}
  _check_neighbours(output, kinds, split)
  with folders.writing(
    output,
    [f'{kind}_*' for kind in kinds],
    command=f'convert {name}',
    settings=split,
    inputs=[path for path in specs if not sources.is_data_set(path)],
    replace=replace,
  ) as folder:
    written = _write(folder, kinds, split)
  return written | counts


def _check_distinct(specs):
  """Raises ValueError if a path is given more than once."""
  counts = collections.Counter(str(epath.Path(spec)) for spec in specs)
  for path, times in counts.items():
    if times > 1:
      raise ValueError(f'{path} is given {times} times')


def _write(folder, kinds, split):
  """Writes the splits; returns how many records each file got."""
  written = {}
  # Text -> split, so that all kinds of a text go to the same one.
  splits: dict[str, str] = {}
  for kind, rows in kinds.items():
    parts = {'train': [], 'valid': []}
    for row in rows:
      text = row.prompt if hasattr(row, 'prompt') else row.text
      if text not in splits:
        splits[text] = split_of(row, **split)
      parts[splits[text]].append(row)
    for name, part in parts.items():
      if part:
        records.write_jsonl(folder / f'{kind}_{name}.jsonl', part)
      if rows:
        written[f'{kind}_{name}'] = len(part)
  return written


def _files_of(spec, name, fields):
  """The files that a source stands for."""
  if name == 'documents' and not fields:
    return sources.document_files(spec)
  return sources.files_of(spec)


def _read(spec, name, fields, words_per_document, model_outputs, counts):
  """Records of one kind from one source."""
  if name == 'documents' and not fields:
    return sources.read_documents(spec, words_per_document=words_per_document)
  files = _files_of(spec, name, fields)
  if files != [str(spec)]:
    arguments = (name, fields, words_per_document, model_outputs, counts)
    return [row for file in files for row in _read(file, *arguments)]
  if fields:
    rows, skipped = sources.read_fields(
      spec, RECORDS[name], fields, model_outputs=model_outputs
    )
    counts.update({f'skipped: {why}': n for why, n in skipped.items()})
    return rows
  if sources.is_table(spec):
    raise records.RecordError(
      f'{spec}: is a table; give each field of {name} with --field, such as '
      "--field='prompt={question}'"
    )
  return records.read_jsonl(spec, RECORDS[name])


def _import(name, paths, model_outputs, counts):
  """Reads published files; returns kind -> records."""
  whole = importers.Imported()
  files = list(itertools.chain(*map(sources.files_of, paths)))
  _check_distinct(files)
  for path, own in importers.names_of(files).items():
    whole.extend(importers.FORMATS[name](path).named(path, own))
  counts.update({f'skipped: {why}': n for why, n in whole.skipped.items()})
  prompts, demonstrations = whole.prompts(), whole.demonstrations
  # One entry may give a comparison and a demonstration.
  entries = {(row.id, row.prompt) for row in whole.rows()}
  reason = 'skipped: the same prompt again, in prompts'
  counts[reason] = len(entries) - len(prompts)
  if model_outputs:
    demonstrations = demonstrations + whole.model_demonstrations
  else:
    counts[
      'skipped: demonstrations that models wrote, according to the file; '
      '--model_outputs keeps them'
    ] = len(whole.model_demonstrations)
  return {
    'comparisons': whole.comparisons,
    'demonstrations': demonstrations,
    'prompts': prompts,
  }


def _without_copies(kind, rows, counts):
  """Drops repeated demonstrations and only counts repeated comparisons.

  Two people may have ranked the same answers the same way.
  """
  distinct = {}
  for row in rows:
    answers = row.completions if kind == 'comparisons' else (row.response,)
    texts = tuple(map(records.composed, (row.prompt, *answers)))
    ranks = getattr(row, 'ranks', ())
    distinct.setdefault((row.labeler, ranks, texts), row)
  kept = rows if kind == 'comparisons' else list(distinct.values())
  verb = 'kept' if kind == 'comparisons' else 'skipped'
  counts[f'{verb}: the same {kind[:-1]} again'] = len(rows) - len(distinct)
  return kept


def _prefers_a_copy(row: records.Comparison) -> bool:
  """Whether the same answer comes twice, with different ranks."""
  ended = records.ends_of(row)
  ranks = collections.defaultdict(set)
  for *answer, rank in zip(row.completions, ended, row.ranks, strict=True):
    ranks[tuple(answer)].add(rank)
  return any(len(found) > 1 for found in ranks.values())


def _check_neighbours(output, kinds, split) -> None:
  """Raises RecordError if a conversation could be in two splits of a folder."""

  def flags(settings):
    return ' '.join(f'--{name}={settings[name]}' for name in sorted(settings))

  for name, entry in folders.written(output).items():
    kind, settings = name.split('_')[0], entry.get('settings', {})
    if (
      kind in RECORDS
      and 'documents' not in (kind, *kinds)
      and kind not in kinds
      and settings != split
      and (epath.Path(output) / name).exists()
    ):
      raise records.RecordError(
        f'{output}: {name} was split by {entry.get("command")} with '
        f'{flags(settings)}, this run splits with {flags(split)}; a '
        'conversation could be in two splits: use the same settings, or '
        'another folder'
      )


def _key_and_value(text: str) -> tuple[str, str]:
  key, separator, value = text.partition('=')
  if not separator:
    raise argparse.ArgumentTypeError(f'{text!r} is not FIELD=TEXT')
  return key, value.replace('\\n', '\n')


def _numbers(text: str) -> list[float]:
  found = [float(part) for part in text.split(',')]
  if not all(map(math.isfinite, found)):
    raise argparse.ArgumentTypeError(f'{text!r} are not all finite numbers')
  return found


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the conversion; returns the exit code."""
  parser = command.Parser(
    prog='python -m instruct_jax.data.convert',
    description='Writes published data as JSONL.',
  )
  parser.add_argument('format', help=', '.join((*importers.FORMATS, *RECORDS)))
  parser.add_argument('files', nargs='+', metavar='FILE')
  parser.add_argument('--output', required=True, metavar='DIR')
  parser.add_argument('--valid', type=float, default=0.05)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--weights', type=_numbers, default=(), metavar='W,W,..')
  parser.add_argument(
    '--field',
    type=_key_and_value,
    action='append',
    default=[],
    metavar='FIELD=TEXT',
    help='of tables; {name} is a column, \\n a line break',
  )
  parser.add_argument('--words', type=int, default=300, help='a document')
  parser.add_argument(
    '--model_outputs',
    action='store_true',
    help='keep demonstrations that models wrote, according to the file',
  )
  folders.add_replace(parser)
  options = parser.parse_args(arguments)
  fields = collections.defaultdict(list)
  for field, template in options.field:
    fields[field].append(template)
  try:
    counts = convert(
      options.format,
      options.files,
      options.output,
      valid=options.valid,
      seed=options.seed,
      weights=options.weights,
      fields=fields,
      words_per_document=options.words,
      model_outputs=options.model_outputs,
      replace=options.replace,
    )
  except (ValueError, OSError) as error:
    print(error, file=sys.stderr)
    return 1
  for name, number in counts.items():
    print(f'{name}: {number}')
  for kind in RECORDS:
    train, found = (counts.get(f'{kind}_{s}', 0) for s in ('train', 'valid'))
    expected = options.valid * (train + found)
    if expected >= 20 and not expected / 2 < found < 2 * expected:
      print(
        f'note: {kind}_valid has {found} records, expected about '
        f'{expected:.0f}: many conversations share few openings, and each '
        'opening is in one split; or this seed has split them before',
        file=sys.stderr,
      )
  for spec in options.files:
    files = _files_of(spec, options.format, fields)
    if unread := sources.unread(files, spec):
      print(f'note: {unread}', file=sys.stderr)
  if options.format in importers.FORMATS:
    tests = [
      file
      for spec in options.files
      for file in sources.files_of(spec)
      if sources.is_test_split(file, spec)
    ]
    if tests:
      print(
        'note: files of a test split by their names are split like the others '
        f'({len(tests)}, first {tests[0]}); give files by name to leave them '
        'out',
        file=sys.stderr,
      )
  note = getattr(importers.FORMATS.get(options.format), 'note', '')
  if counts.get('demonstrations_train') and note:
    print(f'note: {note}', file=sys.stderr)
  return 0


if __name__ == '__main__':
  command.end(main)
