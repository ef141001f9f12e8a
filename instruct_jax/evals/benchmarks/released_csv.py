"""The CSV layout of OpenAI's released samples: read, checked, and written.

One file a task, one row per model, prompt type and item; the first column has
no name and numbers the rows. Alternative references are separated by `|` in
the question-answering files; in `tldr` and `cnn_dm` the same sign separates the
sentences of one summary, and translations never contain it. Suite runs of our
own models are written in these columns, so one command scores both.
"""

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence

from etils import epath

from instruct_jax.data import records

SHOTS = ('zeroshot', 'fewshot')
PREFIXES = ('basic prompt', 'respectful prompt', 'biased prompt')
TRUTHFUL_PROMPTS = ('QA prompt', 'QA + instruction', 'instruction prompt')
SEPARATOR = '|'


@dataclasses.dataclass(frozen=True)
class Layout:
  """One task's file.

  Attributes:
    columns: after the unnamed one.
    item: columns that tell one item from another.
    prompts: the values that `prompt_type` may take; without that column, the
      one value that stands for all rows.
    numbers: columns that hold a number from 0 to 1.
    released: whether OpenAI released such a file.
  """

  columns: tuple[str, ...]
  item: tuple[str, ...]
  prompts: tuple[str, ...]
  numbers: tuple[str, ...] = ()
  released: bool = True


_ANSWERS = Layout(
  ('model_type', 'prompt_type', 'context', 'ref_text', 'sample'),
  ('context',),
  SHOTS,
)
_SUMMARY = Layout(
  ('model_type', 'context', 'ref_text', 'sample'), ('context',), ('zeroshot',)
)
_OURS = dataclasses.replace(_ANSWERS, released=False)
_CHOICE = Layout(
  (
    'model_type',
    'prompt_type',
    'context',
    'choices',
    'logprobs',
    'num_tokens',
    'ref_text',
    'sample',
  ),
  ('context', 'choices'),
  SHOTS,
  released=False,
)
_ENTROPY = Layout(
  ('model_type', 'prompt_type', 'context', 'choices', 'logprobs'),
  ('choices',),
  PREFIXES,
  released=False,
)

LAYOUTS: Mapping[str, Layout] = {
  'drop': _ANSWERS,
  'squadv2': _ANSWERS,
  'quac': _ANSWERS,
  'fr_to_en': _ANSWERS,
  'tldr': _SUMMARY,
  'cnn_dm': _SUMMARY,
  'real_toxicity': Layout(
    ('model_type', 'prompt_type', 'context', 'sample', 'toxicity'),
    ('context',),
    PREFIXES,
    ('toxicity',),
  ),
  'truthful_qa': Layout(
    (
      'model_type',
      'prompt_type',
      'adversarial',
      'question',
      'answer',
      'true',
      'info',
    ),
    ('question',),
    TRUTHFUL_PROMPTS,
    ('true', 'info'),
  ),
  'wsc': dataclasses.replace(
    _OURS,
    columns=(
      'model_type',
      'prompt_type',
      'context',
      'candidate',
      'ref_text',
      'sample',
    ),
    item=('context', 'candidate'),
  ),
  'timequestions': _OURS,
  'tiq': _OURS,
  'hellaswag': _CHOICE,
  'rte': _CHOICE,
  'sst': _CHOICE,
  'winogender': _ENTROPY,
  'crows_pairs': _ENTROPY,
}

Row = Mapping[str, str]


def file_name(task: str) -> str:
  """What OpenAI called the samples of a task."""
  return f'{task}_samples.csv'


def find_file(folder: epath.PathLike, task: str) -> epath.Path | None:
  """`TASK_samples.csv`, plain or gzipped, or None."""
  for suffix in ('', '.gz'):
    path = epath.Path(folder) / f'{file_name(task)}{suffix}'
    if path.exists():
      return path
  return None


def _read_text(path: epath.Path) -> str:
  content = records.read_bytes(path)
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = content.count(b'\n', 0, error.start) + 1
    raise records.RecordError(
      f'{path}:{line}: byte {error.start} of the file is not UTF-8'
    ) from error


def read(path: epath.PathLike, task: str) -> list[Row]:
  """Reads and checks one task's file.

  Args:
    path: plain or `.gz`.
    task: a key of `LAYOUTS`.

  Returns:
    One mapping a row, with `prompt_type` filled in where the file has none.

  Raises:
    RecordError: names file, line and column: not UTF-8, not CSV, a column
      missing, no row, a number missing or outside 0 to 1, an unknown prompt
      type, two rows for one model, prompt and item.
  """
  path, layout = epath.Path(path), LAYOUTS[task]
  reader = csv.DictReader(io.StringIO(_read_text(path), newline=''))
  rows: list[Row] = []
  seen: dict[tuple[str, ...], int] = {}
  try:
    missing = [c for c in layout.columns if c not in (reader.fieldnames or ())]
    if missing:
      raise records.RecordError(
        f'{path}:1: column {", ".join(missing)} is missing; a {task} file has '
        f'{", ".join(layout.columns)}, this one {reader.fieldnames or "none"}'
      )
    for row in reader:
      place = f'{path}:{reader.line_num}'
      short = [c for c in layout.columns if row[c] is None]
      if short or None in row:
        raise records.RecordError(
          f'{place}: the row ends before {short[0]}; is the file cut?'
          if short
          else f'{place}: more cells than the header has columns'
        )
      row.setdefault('prompt_type', layout.prompts[0])
      _check_row(row, layout, place)
      key = (row['model_type'], row['prompt_type'])
      key += tuple(row[column] for column in layout.item)
      if key in seen:
        raise records.RecordError(
          f'{place}: the same model, prompt and item as on line {seen[key]} '
          f'({key[0]}, {key[1]}); keep one'
        )
      seen[key] = reader.line_num
      rows.append(row)
  except csv.Error as error:
    raise records.RecordError(
      f'{path}:{reader.line_num}: not CSV: {error}'
    ) from error
  if not rows:
    raise records.RecordError(f'{path}: no row below the header')
  return rows


def _check_row(row: Row, layout: Layout, place: str) -> None:
  if row['prompt_type'] not in layout.prompts:
    raise records.RecordError(
      f'{place}: prompt_type {row["prompt_type"]!r} is not one of '
      f'{", ".join(layout.prompts)}'
    )
  if not row['model_type']:
    raise records.RecordError(f'{place}: model_type is empty')
  if 'ref_text' in layout.columns and not row['ref_text'].strip():
    raise records.RecordError(f'{place}: ref_text is empty')
  for column in layout.numbers:
    try:
      value = float(row[column])
    except ValueError:
      value = math.nan
    if not 0 <= value <= 1:
      raise records.RecordError(
        f'{place}: {column} is {row[column]!r}, not a number from 0 to 1'
      )


def references(row: Row, task: str) -> list[str]:
  """The accepted answers of a row, or the one text of a translation or summary.

  Empty pieces between two separators are dropped.
  """
  text = row['ref_text']
  if task in ('tldr', 'cnn_dm'):
    return [' '.join(text.split(SEPARATOR))]
  if task == 'fr_to_en':
    return [text]
  return [part for part in text.split(SEPARATOR) if part.strip()] or [text]


def join_references(texts: Sequence[str]) -> str:
  """Inverse of `references`; a `|` inside a text becomes a space."""
  return SEPARATOR.join(
    text.replace(SEPARATOR, ' ') for text in dict.fromkeys(texts)
  )


def write(path: epath.PathLike, task: str, rows: Sequence[Row]) -> None:
  """Writes a file that `read` reads back; it appears only when complete."""
  layout = LAYOUTS[task]
  buffer = io.StringIO(newline='')
  writer = csv.writer(buffer, lineterminator='\n')
  writer.writerow(['', *layout.columns])
  for number, row in enumerate(rows):
    writer.writerow([number, *(row[column] for column in layout.columns)])
  records.write_bytes(path, buffer.getvalue().encode('utf-8'))
