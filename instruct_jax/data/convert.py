"""Writes published data as the JSONL files that the stages read.

  python -m instruct_jax.data.convert hh FILE... --output=DIR --valid=0.05

DIR gets comparisons, demonstrations and prompts, each with `_train.jsonl` and
`_valid.jsonl`, as far as the format has them. Formats: see `importers.py`.

  python -m instruct_jax.data.convert documents books.txt tfds:lm1b/train \\
    --weights=3,1 --output=DIR
  python -m instruct_jax.data.convert demonstrations datasets:FOLDER \\
    --field='prompt={question}\\n' --field='response={answer}' --output=DIR
  python -m instruct_jax.data.convert comparisons ranked.csv \\
    --field='prompt={question}\\n' --field='completions={a}' \\
    --field='completions={b}' --field='scores={score_a}' \\
    --field='scores={score_b}' --output=DIR
  python -m instruct_jax.data.convert comparisons A.jsonl B.jsonl \\
    --weights=1,1 --output=DIR

read JSONL of `records.py` and the sources of `sources.py`, and mix them by
weight. Tables (tfds:, datasets:, .csv, .tsv, .json, other .jsonl) need a
--field for each field of the record.

All rows that begin with the same question (`records.opening`) are in one split:
every branch of a tree and every length of a dialogue. The split depends on that
opening and the seed alone, so conversions with the same seed and share fit
together.

What is left out is counted with its reason. Of identical demonstrations by one
labeler, one is kept. Demonstrations that a model wrote, as far as the file
says, need --model_outputs. `folders.py` describes how files are replaced.
"""

import argparse
import collections
import hashlib
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
  text = f'{seed}\0{records.opening(row)}'
  digest = hashlib.blake2b(text.encode(), digest_size=8)
  return 'valid' if int(digest.hexdigest(), 16) < valid * 2**64 else 'train'


def convert(
  format_name: str,
  paths: Sequence[epath.PathLike],
  output: epath.PathLike,
  *,
  valid: float,
  seed: int,
  model_outputs: bool = False,
  replace: bool = False,
) -> dict[str, int]:
  """Reads files of one of `importers.FORMATS` and writes splits to `output`.

  Args:
    format_name, paths, output: the format, its files, a folder.
    valid: share of the conversations that are validation, in (0, 1).
    seed: of the split.
    model_outputs: keep demonstrations by models, with `labeler` `model:NAME`.
    replace: see `folders.writing`.

  Returns:
    How many records each file got (0: there is no such file), and
    `skipped: REASON` -> how many entries.

  Raises:
    RecordError: an unreadable file, or nothing is left; nothing is written.
    ValueError: an unknown format or a bad share.
  """
  if format_name not in importers.FORMATS:
    raise ValueError(
      f'format {format_name!r}; known: '
      + ', '.join((*importers.FORMATS, *RECORDS))
    )
  _check(valid, paths)
  whole = importers.Imported()
  for path in paths:
    whole.extend(importers.FORMATS[format_name](path))
  counts = collections.Counter(
    {f'skipped: {reason}': n for reason, n in whole.skipped.items()}
  )
  prompts = whole.prompts()
  # One entry may give a comparison and a demonstration.
  entries = {(row.id, row.prompt) for row in whole.rows()}
  counts['skipped: the same prompt again, in prompts'] = len(entries) - len(
    prompts
  )
  demonstrations = whole.demonstrations
  if model_outputs:
    demonstrations = demonstrations + whole.model_demonstrations
  else:
    counts[
      'skipped: demonstrations that models wrote, by what the file says; '
      '--model_outputs takes them'
    ] = len(whole.model_demonstrations)
  return _write(
    {
      'comparisons': whole.comparisons,
      'demonstrations': demonstrations,
      'prompts': prompts,
    },
    counts,
    output,
    inputs=paths,
    by=f'convert {format_name}',
    split={'valid': valid, 'seed': seed},
    replace=replace,
  )


def gather(
  name: str,
  specs: Sequence[str],
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
  """Reads records of one kind from any sources, mixes them, writes the splits.

  Args:
    name: one of `RECORDS`.
    specs: JSONL of `records.py`; with `fields`, tables; for documents, all that
      `sources.read_documents` reads.
    weights: one a source, see `sources.mix`; () is all records in order.
    fields: format strings over the columns of tables, see `sources.py`.
    words_per_document: about how long pieces of plain text are.
    output, valid, seed, model_outputs, replace: as in `convert`; `seed` is also
      that of the mixture.

  Returns, raises: as `convert`.
  """
  _check(valid, specs)
  parts, counts = [], collections.Counter()
  for spec in specs:
    if fields:
      part, skipped = sources.read_fields(
        spec, RECORDS[name], fields, model_outputs=model_outputs
      )
      counts.update({f'skipped: {why}': n for why, n in skipped.items()})
    elif name == 'documents':
      part = sources.read_documents(spec, words_per_document=words_per_document)
    elif sources.is_table(spec):
      raise records.RecordError(
        f'{spec}: is a table; say with --field what each field of {name} is, '
        "such as --field='prompt={question}'"
      )
    else:
      part = records.read_jsonl(spec, RECORDS[name])
    parts.append(part)
  rows = [row for part in parts for row in part]
  if weights:
    mixed = sources.mix(parts, weights, seed)
    counts['skipped: beyond the weights of the mixture'] = len(rows) - len(
      mixed
    )
    rows = mixed
  if name == 'prompts':
    records.check_ids(specs, parts)
  return _write(
    {name: rows},
    counts,
    output,
    inputs=specs,
    by=f'convert {name}',
    split={'valid': valid, 'seed': seed},
    replace=replace,
  )


def _check(valid: float, paths: Sequence[epath.PathLike]) -> None:
  if not 0 < valid < 1:
    raise ValueError(f'valid is {valid}; it must be in (0, 1)')
  for path, times in collections.Counter(map(str, paths)).items():
    if times > 1:
      raise ValueError(f'{path} is given {times} times')


def _without_copies(kind, rows, counts):
  """Drops copies of demonstrations; copies of comparisons are only counted,
  because two people may have ranked alike."""
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


def _write(
  kinds: dict[str, Sequence[records.Record]],
  counts: dict[str, int],
  output: epath.PathLike,
  *,
  inputs: Sequence[epath.PathLike],
  by: str,
  split: Mapping[str, int | float],
  replace: bool,
) -> dict[str, int]:
  for kind in ('comparisons', 'demonstrations'):
    if kind in kinds:
      kinds[kind] = _without_copies(kind, kinds[kind], counts)
  counts = {reason: number for reason, number in counts.items() if number}
  if not any(kinds.values()):
    raise records.RecordError(
      f'{", ".join(map(str, inputs))}: nothing is left to write; '
      + '; '.join(f'{reason}: {number}' for reason, number in counts.items())
    )
  _check_neighbours(output, kinds, split)
  written = {}
  with folders.writing(
    output,
    [f'{kind}_*' for kind in kinds],
    command=by,
    settings=split,
    inputs=[path for path in inputs if not sources.is_data_set(path)],
    replace=replace,
  ) as folder:
    # By text, which the kinds share.
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
  return written | counts


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
    help='take demonstrations that models wrote, by what the file says',
  )
  parser.add_argument(
    '--replace',
    action='store_true',
    help='remove files of an earlier run that this one does not write',
  )
  options = parser.parse_args(arguments)
  common = {
    'valid': options.valid,
    'seed': options.seed,
    'model_outputs': options.model_outputs,
    'replace': options.replace,
  }
  try:
    if options.format in RECORDS:
      fields = collections.defaultdict(list)
      for field, template in options.field:
        fields[field].append(template)
      counts = gather(
        options.format,
        options.files,
        options.output,
        weights=options.weights,
        fields=fields,
        words_per_document=options.words,
        **common,
      )
    elif options.weights or options.field:
      raise ValueError(
        f'--weights and --field go with {", ".join(RECORDS)}; convert '
        f'{options.format} first, then mix its files'
      )
    else:
      counts = convert(options.format, options.files, options.output, **common)
  except (ValueError, OSError) as error:
    print(error, file=sys.stderr)
    return 1
  for name, number in counts.items():
    print(f'{name}: {number}')
  for kind in RECORDS:
    _warn_of_uneven(kind, counts, options.valid)
  if counts.get('demonstrations_train') and options.format in importers.NOTES:
    print(f'note: {importers.NOTES[options.format]}', file=sys.stderr)
  return 0


def _warn_of_uneven(kind, counts, valid) -> None:
  train, found = (
    counts.get(f'{kind}_{name}', 0) for name in ('train', 'valid')
  )
  expected = valid * (train + found)
  if expected >= 20 and not expected / 2 < found < 2 * expected:
    print(
      f'note: {kind}_valid has {found} records, about {expected:.0f} were to '
      'be expected: few openings begin many conversations, and each is in one '
      'split; or this seed has split them before',
      file=sys.stderr,
    )


if __name__ == '__main__':
  command.end(main)
