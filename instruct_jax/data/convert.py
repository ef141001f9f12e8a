"""Writes published data as the JSONL files that the stages read.

  python -m instruct_jax.data.convert hh FILE... --output=DIR --valid=0.05

DIR gets comparisons, demonstrations and prompts, each with `_train.jsonl` and
`_valid.jsonl`, as far as the format has them. A prompt, with all that belongs
to it, is in one split only, and which one depends on its text and the seed
alone. Formats: see `importers.py`.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence

from etils import epath

from instruct_jax.data import importers, records


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
      f'format {format_name!r}; known: {", ".join(importers.FORMATS)}'
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
    splits = {'train': [], 'valid': []}
    for row in rows:
      text = row.text if isinstance(row, records.Prompt) else row.prompt
      splits[split_of(text, valid, seed)].append(row)
    for split, part in splits.items():
      if part:
        records.write_jsonl(epath.Path(output) / f'{name}_{split}.jsonl', part)
        counts[f'{name}_{split}'] = len(part)
  for reason, number in whole.skipped.items():
    counts[f'skipped: {reason}'] = number
  return counts


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the conversion; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m instruct_jax.data.convert',
    description='Writes published data as JSONL.',
  )
  parser.add_argument('format', help=', '.join(importers.FORMATS))
  parser.add_argument('files', nargs='+', metavar='FILE')
  parser.add_argument('--output', required=True, metavar='DIR')
  parser.add_argument('--valid', type=float, default=0.05)
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args(arguments)
  try:
    counts = convert(
      options.format,
      options.files,
      options.output,
      valid=options.valid,
      seed=options.seed,
    )
  except ValueError as error:
    print(error, file=sys.stderr)
    return 1
  for name, number in counts.items():
    print(f'{name}: {number}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
