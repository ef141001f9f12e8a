"""Writes published data as the JSONL files that the stages read.

  python -m instruct_jax.data.convert hh FILE... --output=DIR --valid=0.05

DIR gets comparisons, demonstrations and prompts, each with `_train.jsonl` and
`_valid.jsonl`, as far as the format has them. A prompt, with all that belongs
to it, is in one split only, and which one depends on its text and the seed
alone. Formats: see `importers.py`.

  python -m instruct_jax.data.convert documents books.txt tfds:lm1b/train \\
    --weights=3,1 --output=DIR
  python -m instruct_jax.data.convert demonstrations datasets:FOLDER \\
    --field='prompt={question}\\n' --field='response={answer}' --output=DIR
  python -m instruct_jax.data.convert comparisons A.jsonl B.jsonl \\
    --weights=1,1 --output=DIR

take the sources of `sources.py` (tables need a --field for each field of the
record, as a format string) and our own JSONL, and mix them by weight.
"""

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence

from etils import epath

from instruct_jax import command
from instruct_jax.data import importers, records, sources

RECORDS = {
  'documents': records.Document,
  'prompts': records.Prompt,
  'demonstrations': records.Demonstration,
  'comparisons': records.Comparison,
}


def split_of(prompt: str, valid: float, seed: int) -> str:
  """'valid' for about that share of all prompts, 'train' for the others."""
  digest = hashlib.blake2b(f'{seed}\0{prompt.strip()}'.encode(), digest_size=8)
  return 'valid' if int(digest.hexdigest(), 16) < valid * 2**64 else 'train'


def convert(
  format_name: str,
  paths: Sequence[epath.PathLike],
  output: epath.PathLike,
  *,
  valid: float,
  seed: int,
) -> dict[str, int]:
  """Reads `paths` and writes the splits to the folder `output`.

  Returns:
    How many records each file got, and `skipped: REASON` -> how many entries.

  Raises:
    RecordError: an unreadable file; nothing is written then.
    ValueError: an unknown format, or a share outside (0, 1).
  """
  if format_name not in importers.FORMATS:
    raise ValueError(
      f'format {format_name!r}; known: '
      + ', '.join((*importers.FORMATS, *RECORDS))
    )
  if not 0 < valid < 1:
    raise ValueError(f'valid is {valid}; it must be in (0, 1)')
  whole = importers.Imported()
  for path in paths:
    part = importers.FORMATS[format_name](path)
    whole.demonstrations += part.demonstrations
    whole.comparisons += part.comparisons
    whole.skipped += part.skipped
  counts = {}
  for name, rows in (
    ('comparisons', whole.comparisons),
    ('demonstrations', whole.demonstrations),
    ('prompts', whole.prompts()),
  ):
    counts |= _write_splits(name, rows, output, valid, seed)
  for reason, number in whole.skipped.items():
    counts[f'skipped: {reason}'] = number
  return counts


def _write_splits(name, rows, output, valid, seed):
  splits = {'train': [], 'valid': []}
  for row in rows:
    text = row.prompt if hasattr(row, 'prompt') else row.text
    splits[split_of(text, valid, seed)].append(row)
  counts = {}
  for split, part in splits.items():
    if part:
      records.write_jsonl(epath.Path(output) / f'{name}_{split}.jsonl', part)
      counts[f'{name}_{split}'] = len(part)
  return counts


def gather(
  name: str,
  specs: Sequence[str],
  output: epath.PathLike,
  *,
  valid: float,
  seed: int,
  weights: Sequence[float] = (),
  fields: Mapping[str, str] | None = None,
  words_per_document: int = 300,
) -> dict[str, int]:
  """Reads records of one kind from any sources, mixes them, writes the splits.

  Args:
    name: one of `RECORDS`.
    specs: JSONL files of ours; `tfds:` and `datasets:` tables; for documents
      all that `sources.read_documents` takes.
    output: folder.
    valid: share of the prompts (or documents) that are validation.
    seed: of the split and of the mixture.
    weights: one a source, see `sources.mix`; () is all records in order.
    fields: format strings over the features of tables.
    words_per_document: about how long pieces of plain text are.

  Returns:
    How many records each file got.

  Raises:
    RecordError: an unreadable source; nothing is written then.
    ValueError: a share outside (0, 1), weights that fit no source.
  """
  if not 0 < valid < 1:
    raise ValueError(f'valid is {valid}; it must be in (0, 1)')
  parts = []
  for spec in specs:
    if fields:
      examples = sources.read_examples(spec)
      part = sources.from_fields(examples, RECORDS[name], fields, spec)
    elif name == 'documents':
      part = sources.read_documents(spec, words_per_document=words_per_document)
    else:
      part = records.read_jsonl(spec, RECORDS[name])
    parts.append(part)
  rows = [row for part in parts for row in part]
  if weights:
    rows = sources.mix(parts, weights, seed)
  return _write_splits(name, rows, output, valid, seed)


def _key_and_value(text: str) -> tuple[str, str]:
  key, separator, value = text.partition('=')
  if not separator:
    raise argparse.ArgumentTypeError(f'{text!r} is not FIELD=TEXT')
  return key, value.replace('\\n', '\n')


def _numbers(text: str) -> list[float]:
  return [float(part) for part in text.split(',')]


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
    help='of tables; {name} is a feature, \\n a line break',
  )
  parser.add_argument('--words', type=int, default=300, help='a document')
  options = parser.parse_args(arguments)
  split = {'valid': options.valid, 'seed': options.seed}
  try:
    if options.format in RECORDS:
      counts = gather(
        options.format,
        options.files,
        options.output,
        weights=options.weights,
        fields=dict(options.field),
        words_per_document=options.words,
        **split,
      )
    elif options.weights or options.field:
      raise ValueError(
        f'--weights and --field go with {", ".join(RECORDS)}; convert '
        f'{options.format} first, then mix its files'
      )
    else:
      counts = convert(options.format, options.files, options.output, **split)
  except ValueError as error:
    print(error, file=sys.stderr)
    return 1
  for name, number in counts.items():
    print(f'{name}: {number}')
  return 0


if __name__ == '__main__':
  command.end(main)
