"""The CSV layout of OpenAI's released samples: read, checked, and written.

A file holds one task, a row one model, prompt type and item; the first column
has no name and numbers the rows. `|` separates alternative references, or in
`tldr` and `cnn_dm` the sentences of one summary; translations never contain it.
Suite runs on our own models write the same columns, so one command scores both.
"""

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence

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
    columns: all columns except the unnamed one.
    item: columns that identify an item.
    prompts: allowed values of `prompt_type`; if the file lacks that column, the
      one value that all rows get.
    numbers: columns that hold a number from 0 to 1.
    released: whether OpenAI released such a file.
  """

  columns: tuple[str, ...]
  item: tuple[str, ...]
  prompts: tuple[str, ...]
  numbers: tuple[str, ...] = ()
  released: bool = True


def _layout(
  columns: str, item: str, prompts=SHOTS, numbers: str = '', released=True
) -> Layout:
  """A layout from space-separated names, plus the two columns all share."""
  columns = ('model_type', 'prompt_type', *columns.split())
  return Layout(
    columns, tuple(item.split()), prompts, tuple(numbers.split()), released
  )


_ANSWERS = _layout('context ref_text sample', 'context')
_OURS = dataclasses.replace(_ANSWERS, released=False)
_SUMMARY = Layout(
  ('model_type', 'context', 'ref_text', 'sample'), ('context',), ('zeroshot',)
)
_CHOICE = _layout(
  'context choices logprobs num_tokens ref_text sample',
  'context choices',
  released=False,
)
_ENTROPY = _layout(
  'context choices logprobs', 'choices', PREFIXES, released=False
)

LAYOUTS: Mapping[str, Layout] = {
  'drop': _ANSWERS,
  'squadv2': _ANSWERS,
  'quac': _ANSWERS,
  'fr_to_en': _ANSWERS,
  'tldr': _SUMMARY,
  'cnn_dm': _SUMMARY,
  'real_toxicity': _layout(
    'context sample toxicity', 'context', PREFIXES, 'toxicity'
  ),
  'truthful_qa': _layout(
    'adversarial question answer true info',
    'question',
    TRUTHFUL_PROMPTS,
    'true info',
  ),
  'wsc': _layout(
    'context candidate ref_text sample', 'context candidate', released=False
  ),
  'truthful_mc1': dataclasses.replace(_CHOICE, prompts=TRUTHFUL_PROMPTS),
  'truthful_mc2': dataclasses.replace(_CHOICE, prompts=TRUTHFUL_PROMPTS),
  'lambada': dataclasses.replace(_OURS, prompts=SHOTS[:1]),
  'xstest': _layout(
    'context label kind sample', 'context', SHOTS[:1], released=False
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
  """OpenAI's name for the file with the samples of a task."""
  return f'{task}_samples.csv'


def find(path: epath.Path) -> epath.Path | None:
  """The path itself or with `.gz` appended, whichever exists, or None."""
  for found in (path, path.with_name(f'{path.name}.gz')):
    if found.exists():
      return found
  return None


def find_file(folder: epath.PathLike, task: str) -> epath.Path | None:
  """`TASK_samples.csv` in a folder, plain or gzipped, or None."""
  return find(epath.Path(folder) / file_name(task))


def read(path: epath.PathLike, task: str) -> list[Row]:
  """Reads and checks one task's file.

  Args:
    path: plain or `.gz`.
    task: a key of `LAYOUTS`.

  Returns:
    One mapping per row, with `prompt_type` filled in if the file has none.

  Raises:
    RecordError: the file is not UTF-8 or not CSV, lacks a column or has no row,
      a number is missing or outside 0 to 1, a prompt type is unknown, or two
      rows have the same model, prompt and item. The message names file, line
      and column.
  """
  path, layout = epath.Path(path), LAYOUTS[task]
  reader = csv.DictReader(io.StringIO(records.read_text(path), newline=''))
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
      row.setdefault('prompt_type', layout.prompts[0])
      if problem := _problem(row, layout):
        raise records.RecordError(f'{place}: {problem}')
      columns = ('model_type', 'prompt_type', *layout.item)
      key = tuple(row[column] for column in columns)
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


def _problem(row: Row, layout: Layout) -> str:
  """What is wrong with a row; '' if nothing is."""
  short = [column for column in layout.columns if row[column] is None]
  if short:
    return f'the row ends before {short[0]}; is the file cut?'
  if None in row:
    return 'more cells than the header has columns'
  if row['prompt_type'] not in layout.prompts:
    return (
      f'prompt_type {row["prompt_type"]!r} is not one of '
      f'{", ".join(layout.prompts)}'
    )
  if not row['model_type']:
    return 'model_type is empty'
  if 'ref_text' in layout.columns and not row['ref_text'].strip():
    return 'ref_text is empty'
  for column in layout.numbers:
    try:
      value = float(row[column])
    except ValueError:
      value = math.nan
    if not 0 <= value <= 1:
      return f'{column} is {row[column]!r}, not a number from 0 to 1'
  return ''


def references(row: Row, task: str) -> list[str]:
  """The accepted answers of a row, or the one text of a translation or summary.

  Empty pieces between two separators are dropped.
  """
  text = row['ref_text']
  if task in ('tldr', 'cnn_dm'):
    return [text.replace(SEPARATOR, ' ')]
  if task == 'fr_to_en':
    return [text]
  return [part for part in text.split(SEPARATOR) if part.strip()] or [text]


def join(texts: Iterable[str]) -> str:
  """Joins texts into one cell; a `|` inside a text becomes a space."""
  return SEPARATOR.join(text.replace(SEPARATOR, ' ') for text in texts)


def write(path: epath.PathLike, task: str, rows: Sequence[Row]) -> None:
  """Writes a file for `read`, atomically."""
  columns = LAYOUTS[task].columns
  buffer = io.StringIO(newline='')
  writer = csv.writer(buffer, lineterminator='\n')
  writer.writerow(['', *columns])
  for number, row in enumerate(rows):
    writer.writerow([number, *(row[column] for column in columns)])
  records.write_bytes(path, buffer.getvalue().encode('utf-8'))
