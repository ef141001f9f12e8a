"""Reads records from files, folders and data sets.

The sources are text, JSON, JSONL, CSV, Parquet, Excel, TensorFlow Datasets and
saved `datasets`. To turn a table into records, each field needs a format string
over the names of the columns: `prompt={context}\\n{question}\\n`. A column may
hold

  nothing            null, NaN or an empty cell is the empty text. A field is
                     empty if all its columns are. A row without a prompt or a
                     response is an error that names the row; so is one with a
                     completion that is null, but an empty cell is an empty one
  text, a number     used unchanged; `{price:.2f}` formats a number
  a list, an object  `{answers[0]}` and `{answer[text]}` are entries of it; a
                     whole list is not a text and is an error

`completions`, `ranks`, `scores` and `turns` are lists: `{answers}` alone gives
the column's list (in a CSV file, a cell with a JSON list), or the field is
given several times, `completions={a}` and `completions={b}`, each then a text.
Ranks and scores may be numbers or numbers written as text. `metadata={column}`
keeps a column under its name. Prompts without an `id` are numbered by row.
"""

import collections
import csv
import datetime
import fractions
import io
import itertools
import json
import math
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from instruct_jax import command
from instruct_jax.data import invisible, records

_TFDS = 'tfds:'
_DATASETS = 'datasets:'
_SPLITS = 'dataset_dict.json'
_SUFFIXES = ('.txt', '.txt.gz', '.jsonl', '.jsonl.gz')
_BINARY_TABLES = ('.parquet', '.xlsx')
_TABLES = ('.csv', '.tsv', *_BINARY_TABLES)
JSON_SUFFIXES = ('.jsonl', '.jsonl.gz', '.json', '.json.gz')
_DATA_SUFFIXES = (
  *JSON_SUFFIXES,
  *('.csv', '.csv.gz', '.tsv', '.tsv.gz'),
  *_BINARY_TABLES,
)
# Files in which the Hub, `save_to_disk` and `folders.writing` describe others.
_NO_DATA = (
  *('dataset_info.json', 'dataset_infos.json', _SPLITS),
  'written.json',
)
# testimonials.jsonl is not a test set.
_TEST = re.compile(r'test(?:s|ing|set|sets|data|file|files|split)?(?![a-z])')
_LIST_FIELDS = ('completions', 'ranks', 'scores', 'turns')
# Fields that may be given instead of another one.
_OR = {'text': 'turns', 'prompt': 'turns', 'ranks': 'scores'}
# The most files that a line about unread ones names.
_MOST_UNREAD = 20
_BATCH_ROWS = 1024  # In memory at a time; rows may be long conversations.
_DELIMITERS = (',', ';', '\t', '|')
# `answers[text][0]`: a column, then keys.
_ENTRY = re.compile(r'([^\[\]]+)((?:\[[^\[\]]+\])+)')
# Keys by which published files say that a model wrote the answer, and authors'
# names that mean people. Self-Instruct's generations have metadata of the API;
# its predictions have the reference next to the response.
_GENERATORS = ('generator', 'model', 'model_name', 'model_id', 'generated_by')
_GENERATED = ('synthetic', 'is_synthetic', 'machine_generated', 'is_generated')
_API_KEYS = ('instance_metadata', 'raw_instances', 'finish_reason', 'logprobs')
_PREDICTED = (
  ('response', 'target'),
  ('output', 'target'),
  ('prediction', 'prediction'),
  ('predictions', 'predictions'),
)
_PEOPLE = re.compile(
  r'humans?|people|person|labell?ers?|annotators?|experts?|workers?|crowd.*'
  r'|none|n/a|reference|gold'
)
Example = Mapping[str, Any]


def read_documents(
  spec: epath.PathLike, *, words_per_document: int
) -> list[records.Document]:
  """Reads the documents that `spec` names.

  Args:
    spec: one of
      a text file, plain or `.gz`, split by `split_text`;
      a `.jsonl` or `.jsonl.gz` file of `Document` records, not split;
      a folder: all .txt and .jsonl files in it (not in its subfolders), in
      order of name;
      `tfds:NAME/SPLIT`, such as `tfds:lm1b/train` or
      `tfds:wikipedia/20230601.en/train[:1%]`: the `text` feature of a prepared
      data set (in TFDS_DATA_DIR), split by `split_text`; read without
      TensorFlow;
      `datasets:FOLDER`: the `text` column, see `read_examples`; split, too.
    words_per_document: approximate length of the pieces of split text.

  Returns:
    The documents in file order; `source` names the file or data set.

  Raises:
    RecordError: there is nothing to read, or a file is not text.
  """
  if words_per_document < 1:
    raise ValueError(
      f'words_per_document is {words_per_document}; use 1 or more'
    )
  if is_data_set(spec):
    spec, fields = str(spec), {'text': '{text}'}
    rows, _ = read_fields(spec, records.Document, fields)
    texts, source = [row.text for row in rows], spec.partition(':')[2]
    return _split(texts, source, spec, words_per_document)
  return [
    document
    for file in document_files(spec)
    for document in _read_file(epath.Path(file), words_per_document)
  ]


def document_files(spec: epath.PathLike) -> list[str]:
  """The files of a folder that `read_documents` reads; otherwise `spec`.

  Raises:
    RecordError: there is none.
  """
  if is_data_set(spec) or not epath.Path(spec).is_dir():
    return [str(spec)]
  path = epath.Path(spec)
  files = [file for file in path.iterdir() if file.name.endswith(_SUFFIXES)]
  if not files:
    raise records.RecordError(
      f'{path}: no files that end in {", ".join(_SUFFIXES)}'
    )
  return [str(file) for file in sorted(files, key=lambda file: file.name)]


def split_text(text: str, words_per_document: int) -> list[str]:
  """Splits a text at blank lines into pieces of about `words_per_document`.

  Paragraphs are collected until a piece has that many words; none is cut, so a
  long paragraph makes a long piece. Those that cannot be seen are left out.
  Line breaks inside a paragraph become spaces, because they come from the width
  of a printed page and only some books have them.
  """
  pieces: list[list[str]] = []
  num_words = words_per_document
  for paragraph in re.split(r'\n\s*\n', text):
    if invisible.is_blank(paragraph):
      continue
    words = paragraph.split()
    if num_words >= words_per_document:
      pieces.append([])
      num_words = 0
    pieces[-1].append(' '.join(words))
    num_words += len(words)
  return ['\n\n'.join(paragraphs) for paragraphs in pieces]


def _read_file(
  path: epath.Path, words_per_document: int
) -> list[records.Document]:
  name = path.name.removesuffix('.gz')
  if name.endswith(('.jsonl', '.json')):
    return records.read_jsonl(path, records.Document)
  if name.endswith(_TABLES):
    raise records.RecordError(
      f"{path}: is a table; name its text with --field='text={{column}}'"
    )
  texts = [records.read_text(path)]
  return _split(texts, name.removesuffix('.txt'), path, words_per_document)


def _split(texts, source, spec, words_per_document):
  """The texts as documents of about `words_per_document` words."""
  documents = [
    records.Document(piece, source)
    for text in texts
    for piece in split_text(text, words_per_document)
  ]
  if not documents:
    raise records.RecordError(f'{spec}: holds no text')
  return documents


# --- Rows of tables -----------------------------------------------------------


def read_examples(
  spec: str, columns: Sequence[str] = ()
) -> Iterator[tuple[int, Example]]:
  """Yields (number or line, column -> value) for each example of a table.

  Args:
    spec: one of
      a `.csv` or `.tsv` file with a header (or `.gz`);
      a `.jsonl` file, or a `.json` file that is one list of objects (or `.gz`);
      a `.parquet` file; the first sheet of an `.xlsx` file (extra: xlsx);
      `tfds:NAME/SPLIT`, see `read_documents`;
      `datasets:FOLDER`, written by `save_to_disk` of Hugging Face `datasets`
      (for several splits, the folder of one of them).
    columns: the columns that a CSV file must have.

  Raises:
    RecordError: it cannot be opened or read.
  """
  name = spec.removesuffix('.gz')
  if spec.startswith(_DATASETS):
    folder = epath.Path(spec.removeprefix(_DATASETS))
    yield from enumerate(_read_saved(folder), start=1)
  elif spec.startswith(_TFDS):
    yield from enumerate(_read_tfds(spec), start=1)
  elif name.endswith(('.csv', '.tsv')):
    yield from read_csv(spec, columns)
  elif spec.endswith('.parquet'):
    yield from enumerate(_read_parquet(epath.Path(spec)), start=1)
  elif spec.endswith('.xlsx'):
    yield from _read_xlsx(epath.Path(spec))
  elif name.endswith(('.json', '.jsonl')):
    bad = []
    for number, values in read_objects(spec):
      if isinstance(values, str):
        bad.append((number, values))
      else:
        yield number, values
    records.raise_problems(spec, bad)
  else:
    raise records.RecordError(
      f'{spec}: expected tfds:NAME/SPLIT, datasets:FOLDER, or a file that ends '
      'in .json, .jsonl, .csv, .tsv (or in .gz after that), .parquet, .xlsx'
    )


def is_data_set(spec: epath.PathLike) -> bool:
  """Whether it is `tfds:...` or `datasets:...` and not a file."""
  return str(spec).startswith((_TFDS, _DATASETS))


def is_table(spec: epath.PathLike) -> bool:
  """Whether it needs format strings to become records."""
  name = str(spec).removesuffix('.gz')
  return (
    is_data_set(spec)
    or name.endswith(_TABLES)
    or (name.endswith('.json') and records.begins_with(spec, b'['))
  )


def files_of(
  spec: epath.PathLike, suffixes: Sequence[str] = _DATA_SUFFIXES
) -> list[str]:
  """The data files of a folder, in order of name; otherwise `spec` itself.

  If a folder has no data files, those of its subfolders are used, as in a
  repository of the Hub that has its files in `data`. A folder that
  `save_to_disk` wrote is read as `datasets:FOLDER`, one for each split.

  Raises:
    RecordError: there is no data file.
  """
  if is_data_set(spec) or not epath.Path(spec).is_dir():
    return [str(spec)]
  found = _files_in(epath.Path(spec), tuple(suffixes))
  if not found:
    raise records.RecordError(
      f'{spec}: no file in it ends in {", ".join(suffixes)}'
    )
  return found


def is_test_split(file: str, spec: epath.PathLike) -> bool:
  """Whether a file of `files_of(spec)` is a test split by its name.

  The name of a folder between `spec` and the file counts, too.
  """
  file, folder = (str(p).removeprefix(_DATASETS) for p in (file, spec))
  below = epath.Path(file).relative_to(folder)
  return any(_TEST.match(part.lower()) for part in below.parts)


def unread(files: Sequence[str], folder: epath.PathLike) -> str:
  """A line with a folder's files and subfolders that are not among `files`.

  '' if there are none.
  """
  if is_data_set(folder) or not epath.Path(folder).is_dir():
    return ''
  read = [file.removeprefix(_DATASETS) for file in files]
  left = sorted(_others(epath.Path(folder), read))
  if not left:
    return ''
  shown, more = left[:_MOST_UNREAD], len(left) - _MOST_UNREAD
  shown += [f'{more} more'] if more > 0 else []
  return f'{folder}: not read: {", ".join(shown)}'


def _others(folder: epath.Path, read: Sequence[str]) -> Iterator[str]:
  """Names below a folder that are neither read nor describe other files."""
  if str(folder) in read:
    return
  for path in folder.iterdir():
    name = path.name
    if name.startswith(('.', 'README', 'LICENSE')) or name in _NO_DATA:
      continue
    if any(file.startswith(f'{path}/') for file in read):
      yield from (f'{name}/{below}' for below in _others(path, read))
    elif str(path) not in read:
      yield name


def _files_in(folder: epath.Path, suffixes: tuple[str, ...]) -> list[str]:
  if (folder / 'state.json').exists():
    return [f'{_DATASETS}{folder}']
  inside = sorted(
    (path for path in folder.iterdir() if not path.name.startswith('.')),
    key=lambda path: path.name,
  )
  found = [
    str(path)
    for path in inside
    if path.name.endswith(suffixes) and path.name not in _NO_DATA
  ]
  stems = collections.Counter(name.removesuffix('.gz') for name in found)
  if twice := [name for name, number in stems.items() if number > 1]:
    raise records.RecordError(
      f'{twice[0]} is there plain and as .gz; remove one of them'
    )
  if found:
    return found
  below = [path for path in inside if path.is_dir()]
  return [file for path in below for file in _files_in(path, suffixes)]


def read_objects(path: epath.PathLike) -> Iterator[tuple[int, Example | str]]:
  """Yields (number, object) for each entry of a JSON file or table.

  The number is the line in JSONL, the position in a file that is one JSON list,
  and the row in a table. For a bad entry, a description of the problem replaces
  the object.
  """
  name = str(path).removesuffix('.gz')
  if is_data_set(path) or name.endswith(_TABLES):
    yield from read_examples(str(path))
    return
  if not records.begins_with(path, b'['):
    yield from records.iterate_lines(path)
    return
  for number, values in enumerate(records.read_json(path), start=1):
    if not isinstance(values, dict):
      values = f'expected an object, found a {type(values).__name__}'
    yield number, values


def read_csv(
  path: epath.PathLike, columns: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
  """Yields (first line of the row, column -> text); checks the header.

  The delimiter is a tab in a `.tsv` file; otherwise it is the one of comma,
  semicolon, tab and bar that gives the header these columns.

  Raises:
    RecordError: a column is missing or repeated, a row has the wrong number of
      fields, or the file is not CSV.
  """
  reader, header = _csv_reader(path, columns)
  repeated = sorted({name for name in header if header.count(name) > 1})
  if repeated:
    raise records.RecordError(
      f'{path}:1: column {repeated[0]!r} comes twice; rename one'
    )
  bad_lines, num_rows = [], 0
  while True:
    line = reader.line_num + 1  # A quoted field may span several lines.
    try:
      values = next(reader, None)
    except csv.Error as error:
      raise records.RecordError(
        f'{path}:{line}: not CSV ({error}); is the file whole?'
      ) from error
    if values is None:
      break
    if values and len(values) != len(header):
      problem = f'{len(values)} fields for {len(header)} columns'
      bad_lines.append((line, problem))
    elif values:
      num_rows += 1
      yield line, dict(zip(header, values, strict=True))
  records.raise_problems(path, bad_lines)
  if not num_rows:
    raise records.RecordError(f'{path}: has a header and no rows')


def _csv_reader(path, columns):
  """(reader positioned after the header, header), with the best delimiter."""
  text = records.read_text(path)
  csv.field_size_limit(records.MAX_LINE_BYTES)
  is_tsv = str(path).removesuffix('.gz').endswith('.tsv')
  found, problem = [], ''
  for delimiter in ('\t',) if is_tsv else _DELIMITERS:
    reader = csv.reader(
      io.StringIO(text, newline=''), delimiter=delimiter, strict=True
    )
    try:
      header = next(reader, [])
    except csv.Error as error:
      problem = problem or f'not CSV ({error})'
      continue
    missing = [column for column in columns if column not in header]
    found.append((len(missing), -len(header), len(found), reader, header))
  # The most required columns, then the most columns, then the order of
  # `_DELIMITERS`.
  num_missing, _, _, reader, header = min(found, default=(1, 0, 0, None, None))
  if found and not num_missing:
    return reader, header
  if text.lstrip()[:1] in ('{', '['):
    problem = 'not CSV; it looks like JSON'
  elif found:
    missing = [column for column in columns if column not in header]
    problem = (
      f'columns {", ".join(missing)} are missing; found '
      f'{", ".join(header) or "nothing"}'
    )
  raise records.RecordError(f'{path}:1: {problem}')


def model_of(values: Example, answer: Sequence[str] = ()) -> tuple[str, str]:
  """(model, key): who wrote the answer, if the row itself says a model did.

  AlpacaEval's outputs have a `generator`, OpenAssistant's messages `synthetic`
  and `model_name`, Self-Instruct's predictions a `target` next to the response.
  `answer` lists the keys that the answer was taken from. Returns ('', '') if
  nothing says so.
  """
  for key in _GENERATORS:
    name = values.get(key)
    if isinstance(name, str) and name.strip():
      is_person = _PEOPLE.fullmatch(name.strip().casefold())
      return ('', '') if is_person else (name.strip(), key)
  signs = [
    *(key for key in _GENERATED if values.get(key) is True),
    *(key for key in _API_KEYS if values.get(key) is not None),
    *(key for used, key in _PREDICTED if used in answer and key in values),
  ]
  return ('unnamed', signs[0]) if signs else ('', '')


# --- Format strings -----------------------------------------------------------


def read_fields(
  spec: str,
  record_type: type[records.Record],
  fields: Mapping[str, str | Sequence[str]],
  *,
  model_outputs: bool = False,
) -> tuple[list[records.Record], dict[str, int]]:
  """Records of a table; see `read_examples` and the top of this file.

  Args:
    spec, record_type: the table, and the type of record to make from it.
    fields: one format string per field, or several for lists.
    model_outputs: whether to keep demonstrations that models wrote according to
      their rows.

  Returns:
    The records; and how many rows were left out, by reason.

  Raises:
    RecordError: a bad format string, a column that the examples lack, or values
      that are not a valid record; up to 10 examples are reported together.
  """
  parsed, skipped = Fields(record_type, fields, spec), collections.Counter()

  def wanted():
    for number, example in read_examples(spec, parsed.columns):
      key = ''
      if record_type is records.Demonstration and not model_outputs:
        _, key = model_of(example, parsed.columns_of('response'))
      if key:
        reason = f'a model wrote the answer, according to {key!r}'
        skipped[f'{reason}; --model_outputs keeps it'] += 1
      else:
        yield number, example

  return parsed.fill(wanted()), skipped


class Fields:
  """Format strings, parsed once, that fill the fields of a record.

  Errors name `source`. `columns` lists the columns in the format strings.
  """

  def __init__(
    self,
    record_type: type,
    fields: Mapping[str, str | Sequence[str]],
    source: str,
  ):
    self._type, self._source = record_type, source
    required = records.fields_of(record_type)
    for name in fields:
      if name not in required:
        raise records.RecordError(
          f'--field={name}: {record_type.__name__} has {", ".join(required)}'
        )
    for name, is_required in required.items():
      given = {name, _OR.get(name)} & {*fields}
      if is_required and not given and name != 'id':  # Prompts are numbered.
        raise records.RecordError(
          f'{record_type.__name__} needs --field={name}=..., the text of that '
          'field with {column} where a column goes'
        )
    self._templates: dict[str, list[list[tuple]]] = {}
    for field, templates in fields.items():
      if isinstance(templates, str):
        templates = [templates]
      if len(templates) > 1 and field not in (*_LIST_FIELDS, 'metadata'):
        raise records.RecordError(
          f'--field={field} is given {len(templates)} times but is one text; '
          f'lists are {", ".join(_LIST_FIELDS)}'
        )
      self._templates[field] = [_parse(field, text) for text in templates]
    self.columns = list(
      dict.fromkeys(name for f in fields for name in self.columns_of(f))
    )

  def columns_of(self, field: str) -> list[str]:
    """The columns in a field's format strings."""
    pieces = itertools.chain(*self._templates.get(field, ()))
    return [column for _, column, _, _ in pieces if column is not None]

  def fill(self, examples: Iterable[tuple[int, Example]]) -> list:
    """The records of (number, example) pairs; see `read_fields`."""
    found, bad = [], []
    for number, example in examples:
      missing = [name for name in self.columns if name not in example]
      if missing:
        raise records.RecordError(
          f'{self._source}:{number}: examples have '
          f'{", ".join(sorted(map(str, example)))} and no '
          f'{", ".join(sorted(missing))}'
        )
      try:
        values = self._values(number, example)
        problems = records.problems(values, self._type)
      except ValueError as error:
        problems = [str(error)]
      if problems:
        bad.append((number, '; '.join(problems)))
      else:
        found.append(records.from_values(values, self._type))
    records.raise_problems(self._source, bad)
    return found

  def _values(self, number: int, example: Example) -> Mapping:
    values: dict[str, Any] = {}
    for field, templates in self._templates.items():
      if field == 'metadata':
        values[field] = _metadata(templates, example)
      elif field == 'completions' and len(templates) > 1:
        values[field] = [_completion(each, example) for each in templates]
      elif field in _LIST_FIELDS:
        values[field] = [
          _item(field, item)
          for template in templates
          for item in _items(field, template, example)
        ]
      else:
        values[field] = _text(templates[0], example)
    if self._type is records.Prompt and 'id' not in values:
      name = self._source.removeprefix(_DATASETS).removeprefix(_TFDS)
      values['id'] = f'{epath.Path(name).name.split(".")[0]}:{number}'
    return records.completed(values, self._type)


def _parse(field: str, template: str) -> list[tuple]:
  """Parses a format string into (text, column, keys, format) pieces.

  `column` is None for text alone.
  """
  try:
    parsed = list(string.Formatter().parse(template))
  except ValueError as error:
    raise records.RecordError(
      f'--field={field}={template}: {error}; {{{{ and }}}} are braces'
    ) from error
  pieces = []
  for text, name, form, conversion in parsed:
    if name is None:
      pieces.append((text, None, (), ''))
      continue
    entry = _ENTRY.fullmatch(name)
    column = entry[1] if entry else name
    keys = re.findall(r'\[([^\[\]]+)\]', entry[2]) if entry else ()
    if conversion or not column:
      raise records.RecordError(
        f'--field={field}={template}: {{{name}}} must name a column, without !'
      )
    pieces.append((text, column, tuple(keys), form))
  return pieces


def _lookup(example: Example, column: str, keys: Sequence[str]):
  value = example[column]
  for key in keys:
    value = _plain(value)
    if value is None:
      return None
    try:
      value = value[int(key) if isinstance(value, list | tuple) else key]
    except (LookupError, TypeError, ValueError):
      path = ''.join(f'[{k}]' for k in keys)
      raise ValueError(f'{{{column}{path}}}: there is no entry {key}') from None
  return _plain(value)


def _plain(value: Any) -> Any:
  """A value without bytes and NumPy types; None if it is missing or NaN."""
  if isinstance(value, bytes):
    try:
      return value.decode('utf-8')
    except UnicodeDecodeError as error:
      raise ValueError(
        f'byte {error.start} of {value[:20]!r} is not UTF-8'
      ) from error
  if isinstance(value, np.ndarray | np.generic):
    return _plain(value.tolist())
  # NaN, NaT and Decimal('NaN') differ from themselves.
  if value is None or (not isinstance(value, list | dict) and value != value):
    return None
  return value


def _as_text(value: Any, name: str, form: str) -> str:
  value = _plain(value)
  if value is None:
    return ''
  if isinstance(value, list | tuple | dict):
    kind = 'an object' if isinstance(value, dict) else 'a list'
    raise ValueError(
      f'{{{name}}} is {kind}, not a text; name an entry of it, such as '
      f'{{{name}[{"key" if isinstance(value, dict) else 0}]}}'
    )
  if not form:
    return str(value)
  try:
    return format(value, form)
  except (TypeError, ValueError) as error:
    raise ValueError(f'{{{name}:{form}}}: {error}') from error


def _text(pieces: Sequence[tuple], example: Example) -> str:
  """The pieces joined; '' if there are columns and all of them are empty."""
  parts, filled = [], []
  for text, column, keys, form in pieces:
    parts.append(text)
    if column is not None:
      filled.append(_as_text(_lookup(example, column, keys), column, form))
      parts.append(filled[-1])
  if filled and not any(text.strip() for text in filled):
    return ''
  return ''.join(parts)


def _completion(pieces: Sequence[tuple], example: Example) -> str | None:
  """The text of a format string; None if there is null and nothing else."""
  found = [_lookup(example, *each[1:3]) for each in pieces if each[1]]
  if found and all(value is None for value in found):
    return None
  return _text(pieces, example)


def _is_column(pieces: Sequence[tuple]) -> bool:
  return len(pieces) == 1 and not pieces[0][0] and not pieces[0][3]


def _items(field: str, pieces: Sequence[tuple], example: Example) -> list:
  if not _is_column(pieces):
    read_fn = _completion if field == 'completions' else _text
    return [read_fn(pieces, example)]
  value = _lookup(example, *pieces[0][1:3])
  if value is None and field == 'turns':
    return []
  if isinstance(value, str) and value.lstrip()[:1] == '[':
    # A CSV cell may have a JSON list.
    try:
      value = json.loads(value)
    except (ValueError, RecursionError):
      return [value]
  return list(value) if isinstance(value, list | tuple) else [value]


def _item(field: str, item: Any) -> Any:
  """One entry of a list field, converted to the type that the record needs."""
  item = _plain(item)
  if field == 'completions':
    return None if item is None else _as_text(item, field, '')
  if field == 'turns' or item is None:
    return _json(item)
  if isinstance(item, bool):
    return int(item) if field == 'scores' else item
  try:
    number = float(item)
  except (TypeError, ValueError):
    return item
  if field == 'scores':
    return item if isinstance(item, int | float) else number
  return int(number) if number.is_integer() else item


def _metadata(
  templates: Sequence[Sequence[tuple]], example: Example
) -> dict[str, Any]:
  found: dict[str, Any] = {}
  for pieces in templates:
    if not _is_column(pieces):
      raise ValueError("'metadata' takes whole columns, metadata={column}")
    column, keys = pieces[0][1:3]
    value = _json(_lookup(example, column, keys))
    name = keys[-1] if keys else column
    found |= value if isinstance(value, dict) else {name: value}
  return found


def _json(value: Any) -> Any:
  value = _plain(value)
  if isinstance(value, dict):
    return {str(key): _json(part) for key, part in value.items()}
  if isinstance(value, list | tuple):
    return [_json(part) for part in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if value is None or isinstance(value, str | bool | int | float):
    return value
  if isinstance(value, datetime.date | datetime.time):
    return value.isoformat()
  return str(value)


def mix(
  parts: Sequence[Sequence[records.Record]],
  weights: Sequence[int | float],
  seed: int,
) -> list[records.Record]:
  """A shuffled mixture of parts in the proportions of `weights`.

  Records are drawn without repeats, so the part that is smallest relative to
  its weight limits the size of the mixture.
  """
  if len(parts) != len(weights) or not parts:
    raise ValueError(f'{len(parts)} parts with {len(weights)} weights')
  if min(weights) <= 0 or not all(map(len, parts)):
    raise ValueError(
      f'weights {list(weights)} must be positive and parts of '
      f'{[len(part) for part in parts]} records not empty'
    )
  shares = [fractions.Fraction(w).limit_denominator(10**6) for w in weights]
  total = min(
    len(part) / share for part, share in zip(parts, shares, strict=True)
  )
  rng = np.random.default_rng(seed)
  mixed = []
  for part, share in zip(parts, shares, strict=True):
    chosen = rng.permutation(len(part))[: int(total * share)]
    mixed += [part[i] for i in chosen]
  return [mixed[i] for i in rng.permutation(len(mixed))]


def _read_saved(folder: epath.Path) -> Iterator[Example]:
  splits = folder / _SPLITS
  if splits.exists():
    names = _listed(records.read_json(splits), 'splits', splits)
    raise records.RecordError(
      f'{folder}: has splits; name the folder of one of '
      f'{", ".join(map(str, names))}'
    )
  state = folder / 'state.json'
  if not state.exists():
    raise records.RecordError(
      f'{folder}: no state.json; expected a folder that `save_to_disk` of '
      'Hugging Face datasets wrote'
    )
  described = records.read_json(state)
  entries = _listed(described, '_data_files', state)
  if described.get('_indices_data_files'):
    raise records.RecordError(
      f'{folder}: an index over its rows was saved with them; write it again '
      'with flatten_indices()'
    )
  import pyarrow.ipc

  for entry in entries:
    name = entry.get('filename') if isinstance(entry, dict) else None
    if not isinstance(name, str):
      raise records.RecordError(f"{state}: '_data_files' names no file")
    yield from _read_batches(folder / name, pyarrow.ipc.open_stream)


def _read_parquet(path: epath.Path) -> Iterator[Example]:
  import pyarrow.parquet

  yield from _read_batches(
    path,
    lambda file: pyarrow.parquet.ParquetFile(file).iter_batches(_BATCH_ROWS),
  )


def _read_batches(
  path: epath.Path, batches_of: Callable[[Any], Iterable[Any]]
) -> Iterator[Example]:
  """The rows of a file of Arrow batches, which `batches_of` reads."""
  import pyarrow

  if not path.exists():
    raise records.RecordError(f'{path}: no such file')
  row = 0
  with path.open('rb') as file:
    if file.read(len(records.LFS_MARK)) == records.LFS_MARK:
      raise records.RecordError(f'{path}: {records.NO_TEXT[records.LFS_MARK]}')
    file.seek(0)
    try:
      for batch in batches_of(file):
        for example in _to_microseconds(batch).to_pylist():
          row += 1
          yield example
    # Damaged texts and dates raise built-in Python exceptions.
    except (
      pyarrow.ArrowException,
      OSError,
      ValueError,
      ArithmeticError,
      LookupError,
    ) as error:
      raise records.RecordError(
        f'{path}: damaged after row {row} ({error})'
      ) from error


def _to_microseconds(batch):
  """Converts nanosecond timestamps, for which Python has no type."""
  import pyarrow

  for number, field in enumerate(batch.schema):
    if pyarrow.types.is_timestamp(field.type) and field.type.unit == 'ns':
      kind = pyarrow.timestamp('us', field.type.tz)
      column = batch.column(number).cast(kind, safe=False)
      batch = batch.set_column(number, field.name, column)
  return batch


def _read_xlsx(path: epath.Path) -> Iterator[tuple[int, Example]]:
  """(row number as Excel shows it, column -> value) of the first sheet."""
  try:
    import openpyxl
  except ImportError as error:
    raise records.RecordError(
      f"{path}: Excel files need openpyxl: pip install -e '.[xlsx]', or save "
      'the sheet as CSV'
    ) from error
  if not path.exists():
    raise records.RecordError(f'{path}: no such file')
  with path.open('rb') as file:
    try:
      book = openpyxl.load_workbook(file, read_only=True, data_only=True)
      rows = list(book.worksheets[0].iter_rows(values_only=True))
    # Damaged archives and XML raise various exceptions of zipfile and parser.
    except Exception as error:
      raise records.RecordError(
        f'{path}: not an Excel file ({command.one_line(error)})'
      ) from error
  if len(rows) < 2 or not any(rows[0]):
    raise records.RecordError(f'{path}: has no header with rows below it')
  header, *rows = rows
  names = collections.Counter(name for name in header if name is not None)
  name, times = names.most_common(1)[0]
  if times > 1:
    raise records.RecordError(
      f'{path}:1: column {str(name)!r} comes twice; rename one'
    )
  for number, row in enumerate(rows, start=2):
    if any(value is not None for value in row):
      # Some writers leave out empty cells at the end of a row.
      cells = itertools.zip_longest(header, row)
      yield number, {str(name): cell for name, cell in cells if name}


def _listed(values: Any, key: str, path: epath.Path) -> list:
  found = values.get(key) if isinstance(values, dict) else None
  if not isinstance(found, list):
    raise records.RecordError(f'{path}: has no list {key!r}')
  return found


def _read_tfds(spec: str) -> Iterator[Example]:
  name, _, split = spec.removeprefix(_TFDS).rpartition('/')
  if not name or not split:
    raise records.RecordError(
      f'{spec}: expected tfds:NAME/SPLIT, such as tfds:lm1b/train'
    )
  # The import takes two seconds, and few runs need it.
  import tensorflow_datasets as tfds

  try:
    source: Sequence = tfds.data_source(name, split=split, download=False)
  # Not found, not prepared and unknown split are unrelated exception types.
  except Exception as error:
    raise records.RecordError(
      f'{spec}: cannot be opened ({command.one_line(error)}); prepare it with '
      'tfds build, in the array_record format, and set TFDS_DATA_DIR to its '
      'folder'
    ) from error
  for row in range(len(source)):
    try:
      example = source[row]
    except Exception as error:  # Of the file format, the codec or the decoder.
      raise records.RecordError(
        f'{spec}: damaged at row {row + 1} ({error})'
      ) from error
    yield example
