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

from instruct_jax.data import records, sources

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
    values: columns that hold one of these texts, in upper or lower case.
    several_right: whether several of the choices may be right.
    released: whether OpenAI released such a file.
  """

  columns: tuple[str, ...]
  item: tuple[str, ...]
  prompts: tuple[str, ...]
  numbers: tuple[str, ...] = ()
  values: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )
  several_right: bool = False
  released: bool = True


def _layout(
  columns: str, item: str, prompts=SHOTS, numbers: str = '', **fields
) -> Layout:
  """A layout from space-separated names, plus the two columns all share."""
  columns = ('model_type', 'prompt_type', *columns.split())
  return Layout(
    columns, tuple(item.split()), prompts, tuple(numbers.split()), **fields
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
_TRUTHFUL = dataclasses.replace(
  _CHOICE, prompts=TRUTHFUL_PROMPTS, several_right=True
)
_TRUTH_VALUES = ('True', 'False')
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
    values={'adversarial': _TRUTH_VALUES},
  ),
  'wsc': _layout(
    'context candidate ref_text sample',
    'context candidate',
    values={'ref_text': _TRUTH_VALUES},
    released=False,
  ),
  'truthful_mc1': _TRUTHFUL,
  'truthful_mc2': _TRUTHFUL,
  'lambada': dataclasses.replace(_OURS, prompts=SHOTS[:1]),
  'xstest': _layout(
    'context label kind sample',
    'context',
    SHOTS[:1],
    values={'label': ('safe', 'unsafe')},
    released=False,
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
    One mapping per row, with `prompt_type` filled in if the file has none, and
    `Layout.values` spelled as there.

  Raises:
    RecordError: the file is not UTF-8 or not CSV, lacks a column or has no row,
      a value is missing or not of its column's kind, a prompt type is unknown,
      or two rows have the same model, prompt and item. The message names file,
      line (the first of the row) and column.
  """
  path, layout = epath.Path(path), LAYOUTS[task]
  rows: list[Row] = []
  seen: dict[tuple[str, ...], int] = {}
  for line, row in sources.read_csv(path, layout.columns):
    row.setdefault('prompt_type', layout.prompts[0])
    for column, values in layout.values.items():
      spelled = {value.lower(): value for value in values}
      row[column] = spelled.get(row[column].lower(), row[column])
    if problem := _problem(row, layout):
      raise records.RecordError(f'{path}:{line}: {problem}')
    columns = ('model_type', 'prompt_type', *layout.item)
    key = tuple(row[column] for column in columns)
    if key in seen:
      raise records.RecordError(
        f'{path}:{line}: the same model, prompt and item as on line '
        f'{seen[key]} ({key[0]}, {key[1]}); keep one'
      )
    seen[key] = line
    rows.append(row)
  return rows


def _problem(row: Row, layout: Layout) -> str:
  """What is wrong with a row; '' if nothing is."""
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
  for column, values in layout.values.items():
    if row[column] not in values:
      return f'{column} is {row[column]!r:.60}, not {" or ".join(values)}'
  return _choice_problem(row, layout) if 'choices' in layout.columns else ''


def _choice_problem(row: Row, layout: Layout) -> str:
  """What is wrong with the choices of a row and their numbers."""
  choices = row['choices'].split(SEPARATOR)
  for column, is_one, what in (
    ('logprobs', math.isfinite, 'finite numbers'),
    ('num_tokens', lambda x: 1 <= x < math.inf, 'numbers from 1'),
  ):
    if column not in layout.columns:
      continue
    try:
      found = [is_one(x) for x in numbers(row, column)]
    except ValueError:
      found = []
    if len(found) != len(choices) or not all(found):
      return (
        f'{column} is {row[column]!r:.60}; expected {len(choices)} {what}, one '
        f'for each choice, with {SEPARATOR} between them'
      )
  if 'ref_text' not in layout.columns:
    return ''
  right = row['ref_text'].split(SEPARATOR)
  if not layout.several_right:
    right = [row['ref_text']]
  if unknown := [text for text in right if text not in choices]:
    return f'ref_text {unknown[0]!r:.60} is not one of the choices'
  return 'every choice is right' if set(choices) <= set(right) else ''


def numbers(row: Row, column: str) -> list[float]:
  """The numbers of a cell; raises ValueError if it holds another text."""
  return [float(x) for x in row[column].split(SEPARATOR)]


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
