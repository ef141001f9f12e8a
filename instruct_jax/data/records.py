"""The four record types and their JSONL files.

Every stage reads and writes these: one JSON object per line, UTF-8 with or
without a byte order mark, plain or `.gz`, local or gs://. Fields with a default
may be missing or null. Unknown fields are errors: a misspelt `labeller` would
otherwise be lost silently.

  Document       {"text": "The owl lives in a barn.", "source": "animals"}
  Prompt         {"id": "p7", "text": "Name a bird.", "user": "u3",
                  "category": "open qa", "metadata": {"answer": "owl"}}
  Demonstration  {"prompt": "Name a bird.", "response": "An owl.",
                  "user": "u3", "labeler": "w1"}
  Comparison     {"prompt": "Name a bird.", "completions": ["Owl.", "", "No."],
                  "ranks": [1, 2, 2], "user": "u3", "labeler": "w1"}

Rank 1 is best and equal numbers are ties. A comparison may have `scores`
(higher is better) instead of ranks: {"prompt": "Name a bird.",
"completions": ["Owl.", "No."], "scores": [6.5, 2], "time": "2022-01-31"}.
A completion may be empty, because a policy may stop at once; all other texts
must have visible characters. The model sees the prompt's text unchanged, so a
separator before the response is part of the text.

A prompt may be a conversation, whose last turn is the user's. {"id": "p8",
"turns": [{"role": "user", "content": "Name a bird."},
{"role": "assistant", "content": "Owl."}, {"role": "user", "content": "More!"}]}
A tokenizer with a chat template renders the turns. The text defaults to
`text_of_turns`. If it is given, it must equal that (or the message itself, if
there is only one), except for white space.

Splits are by the `opening` of a conversation, so that all its branches and
lengths are in one split.
"""

import codecs
import collections
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from etils import epath

from instruct_jax import files
from instruct_jax.data import invisible

MAX_REPORTED_LINES = 10
# Far beyond any context length; a whole corpus on one line is a mistake.
MAX_LINE_BYTES = 8 * 1024**2
ROLES = ('system', 'user', 'assistant')
LFS_MARK = files.LFS_MARK
# First bytes of files that are not text, and what to do about them.
NO_TEXT = {
  LFS_MARK: files.LFS_PROBLEM,
  b'\x1f\x8b': 'is compressed with gzip; let its name end in .gz',
  b'\xfd7zXZ': 'is compressed with xz; unpack it',
  b'\x28\xb5\x2f\xfd': 'is compressed with zstd; unpack it',
  b'PK\x03\x04': 'is a zip archive or an Excel file; unpack it, or let its '
  'name end in .xlsx',
  b'PAR1': 'is a Parquet file; let its name end in .parquet',
}


class RecordError(ValueError):
  """An unusable data file; the message names file, line and field."""


@dataclasses.dataclass(frozen=True)
class Turn:
  """One message of a conversation; `role` is one of `ROLES`."""

  role: str
  content: str


@dataclasses.dataclass(frozen=True)
class Document:
  """Plain text for pretraining and the ptx mix."""

  text: str
  source: str = ''


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt as a user (API customer) sent it or a labeler wrote it.

  `id` is unique in its file. `user` is for the caps and splits of A.2.
  `category` is a use case of Table 1, or ''. `metadata` is any JSON, which
  training passes on and never reads. `turns` is the conversation so far; () for
  a single turn.
  """

  id: str
  text: str
  user: str = ''
  category: str = ''
  metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
  turns: tuple[Turn, ...] = ()


@dataclasses.dataclass(frozen=True)
class Demonstration:
  """A prompt and the response that a labeler wrote for it (paper 3.2)."""

  prompt: str
  response: str
  id: str = ''
  user: str = ''
  labeler: str = ''
  category: str = ''
  metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
  turns: tuple[Turn, ...] = ()


@dataclasses.dataclass(frozen=True)
class Comparison:
  """K >= 2 completions of a prompt, ranked by one labeler (paper 3.5: 4 to 9).

  Rank 1 is best, and equal ranks are ties. `scores` are the scores that the
  ranks were computed from, or (). `ended` says of each completion whether it
  ended by itself or was cut and has no end token; () means that all ended.
  `time` is when it was labeled, as free text, or ''.
  """

  prompt: str
  completions: tuple[str, ...]
  ranks: tuple[int, ...]
  id: str = ''
  user: str = ''
  labeler: str = ''
  category: str = ''
  time: str = ''
  metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
  turns: tuple[Turn, ...] = ()
  scores: tuple[float, ...] = ()
  ended: tuple[bool, ...] = ()


# ValueError: bad syntax, or a number with thousands of digits. RecursionError:
# nested too deeply.
_JSON_ERRORS = (ValueError, RecursionError)
RECORD_TYPES = (Document, Prompt, Demonstration, Comparison)
Record = TypeVar('Record', Document, Prompt, Demonstration, Comparison)

MAX_RANK = 10**6
# Required fields whose text must have visible characters.
_NEVER_EMPTY = ('text', 'prompt', 'response', 'id')
_MARKS = {'system': '', 'user': '\n\nHuman:', 'assistant': '\n\nAssistant:'}


def _is_list_of(value: Any, item_type: type | tuple[type, ...]) -> bool:
  # bool is an int in Python, but `true` is not a rank.
  return isinstance(value, list | tuple) and all(
    isinstance(item, item_type) and not isinstance(item, bool) for item in value
  )


def _shown(value: Any) -> str:
  try:
    text = json.dumps(value, ensure_ascii=True, default=repr)
  except (ValueError, RecursionError):
    text = f'a {type(value).__name__}'
  return text if len(text) <= 60 else text[:57] + '...'


def text_of_turns(turns: Iterable[Turn]) -> str:
  """A conversation as plain text that asks for the assistant's next turn.

  The layout is that of Anthropic's HH files (Bai et al. 2022); a system turn
  has no mark before it, only line breaks if it is not the first turn.
  """
  text = ''
  for turn in turns:
    if turn.role != 'system':
      text += f'{_MARKS[turn.role]} {turn.content}'
    else:
      text += '\n\n' * bool(text) + turn.content
  return text + _MARKS['assistant']


def dialogue_turns(text: str) -> tuple[Turn, ...]:
  """The turns of a text in the layout of `text_of_turns`; () for other texts.

  The user comes first and the speakers alternate; there is no system turn. A
  mark out of turn is part of the message, because answers may quote a dialogue.
  """
  if not text.startswith(_MARKS['user']):
    return ()
  turns, role, other, start = [], 'user', 'assistant', 0
  while True:
    start += len(_MARKS[role])
    end = text.find(_MARKS[other], start)
    turns.append(Turn(role, text[start : end if end >= 0 else None].strip()))
    if end < 0:
      return tuple(turns)
    role, other, start = other, role, end


def conversation(
  row: 'Prompt | Demonstration | Comparison',
) -> tuple[Turn, ...]:
  """The turns before the answer: a record's `turns`, or those of its text."""
  if row.turns:
    return row.turns
  return turns_of(row.text if isinstance(row, Prompt) else row.prompt)


def turns_of(text: str) -> tuple[Turn, ...]:
  """The turns of a prompt in the layout of `text_of_turns`.

  The line breaks at its start may be missing, and may be Windows' everywhere.
  Any other text is a single user turn.
  """
  read = text.replace('\r\n', '\n')
  if read.lstrip().startswith(_MARKS['user'].lstrip()):
    read = '\n\n' + read.lstrip()
  start = read.find(_MARKS['user'])
  if start >= 0 and read.rstrip().endswith(_MARKS['assistant']):
    *turns, last = dialogue_turns(read[start:])
    if last == Turn('assistant', ''):
      system = read[:start].strip()
      return ((Turn('system', system),) if system else ()) + tuple(turns)
  return (Turn('user', text),)


def answers_of(row: Record) -> tuple[str, ...]:
  """A demonstration's response or a ranking's completions; () for others."""
  if isinstance(row, Demonstration):
    return (row.response,)
  return row.completions if isinstance(row, Comparison) else ()


def ends_of(comparison: Comparison) -> tuple[bool, ...]:
  """Whether each completion ended by itself; all did if that is not said."""
  return comparison.ended or (True,) * len(comparison.completions)


def composed(text: str) -> str:
  """The text with composed accents (NFC), as most keyboards write them."""
  return unicodedata.normalize('NFC', text)


def comparable(text: str) -> str:
  """The key for finding duplicates: NFC, case-folded, single spaces, without
  invisible characters."""
  if not text.isascii():
    text = invisible.HIDDEN.sub('', ' '.join(text.split()))
    text = composed(unicodedata.normalize('NFD', text).casefold())
  return ' '.join(text.casefold().split())


def opening(row: Any) -> str:
  """The key for splits: the user's first turn, as `comparable` text.

  All rows of a conversation tree share it, and so do a conversation and a
  single question that begin the same way. A document is its own opening.
  """
  if isinstance(row, Document):
    return comparable(row.text)
  for turn in conversation(row):
    if turn.role == 'user' and not invisible.is_blank(turn.content):
      return comparable(turn.content)
  return comparable(row.text if isinstance(row, Prompt) else row.prompt)


def draw(seed: int, *parts: str) -> bytes:
  """A pseudo-random key of 8 bytes that depends only on its arguments."""
  text = '\0'.join((str(seed), *parts))
  return hashlib.blake2b(text.encode(), digest_size=8).digest()


def ranks_of_scores(scores: Iterable[int | float]) -> tuple[int, ...]:
  """Ranks from 1 for the highest score; equal scores share a rank.

  Ranks are dense: (80, 100, 100, 60) has ranks (2, 1, 1, 3).
  """
  scores = tuple(scores)
  order = sorted(set(scores), reverse=True)
  return tuple(order.index(score) + 1 for score in scores)


def completed(
  values: Mapping[str, Any], record_type: type
) -> Mapping[str, Any]:
  """Fills in missing ranks and prompt text in the values of a file.

  Missing `ranks` come from `scores`, and the prompt's missing text from
  `turns`. Optional fields that are null are left out. Bad values stay for
  `problems` to report.
  """
  required = fields_of(record_type)
  filled = {
    name: value
    for name, value in values.items()
    if value is not None or required.get(name, True)
  }
  scores, turns = filled.get('scores'), filled.get('turns')
  if (
    record_type is Comparison
    and filled.get('ranks') is None
    and _are_scores(scores)
  ):
    filled['ranks'] = list(ranks_of_scores(scores))
  name = 'text' if record_type is Prompt else 'prompt'
  if (
    record_type is not Document
    and filled.get(name) is None
    and not _turn_problem(turns)
  ):
    filled[name] = text_of_turns(Turn(**turn) for turn in turns)
  return filled


@functools.cache
def fields_of(record_type: type) -> dict[str, bool]:
  """Field name -> whether it is required."""
  return {
    field.name: field.default is field.default_factory is dataclasses.MISSING
    for field in dataclasses.fields(record_type)
  }


def problems(values: Mapping[str, Any], record_type: type) -> list[str]:
  """The reasons why `values`, as parsed from JSON, are not a valid record.

  Each is one sentence: the field, what was found, what to do.
  """
  fields = fields_of(record_type)
  found = [
    f'unknown field {name!r}; {record_type.__name__} has '
    f'{", ".join(fields)}; put anything else under "metadata"'
    for name in values
    if name not in fields
  ]
  for name, is_required in fields.items():
    if name in values:
      found += _field_problems(name, values, is_required)
    elif is_required:
      found.append(f'field {name!r} is missing; add it')
  return found


def _field_problems(name, values, is_required) -> Iterator[str]:
  value = values[name]
  if name in ('scores', 'turns', 'ended') and value in ((), []):
    return  # None given.
  if name == 'turns':
    problem = _turn_problem(value) or _text_problem(values)
    if problem:
      yield problem
    return
  is_valid, kind = _KINDS.get(name, _TEXT)
  if not is_valid(value):
    yield f'{name!r} must be {kind}, found {_shown(value)}'
    return
  if name == 'completions' and len(value) < 2:
    yield (
      f'{name!r} has {len(value)} texts; a comparison needs at least 2: '
      'drop the record'
    )
  elif name == 'ranks':
    if any(not 1 <= rank <= MAX_RANK for rank in value):
      yield (
        f'{name!r} must be from 1 (best) to {MAX_RANK}, found {_shown(value)}'
      )
    completions = values.get('completions')
    if isinstance(completions, list | tuple) and len(completions) != len(value):
      yield (
        f'{name!r} has {len(value)} numbers for {len(completions)} '
        'completions; give one rank each'
      )
  elif name == 'ended':
    completions = values.get('completions')
    if isinstance(completions, list | tuple) and len(completions) != len(value):
      yield (
        f'{name!r} has {len(value)} values for {len(completions)} '
        'completions; give true or false for each'
      )
  elif name == 'scores':
    ranks, expected = values.get('ranks'), ranks_of_scores(value)
    if _is_list_of(ranks, int) and tuple(ranks) != expected:
      yield (
        f'{name!r} {_shown(value)} and ranks {_shown(ranks)} differ; the '
        f'scores have ranks {list(expected)}: leave the ranks out'
      )
  elif name == 'metadata' and not is_json(value):
    yield (
      f'{name!r} is not JSON: {_shown(value)}; numbers must be finite, '
      'texts without lone surrogates'
    )
  elif name in _NEVER_EMPTY and is_required and invisible.is_blank(value):
    yield f'{name!r} is empty; fill it in or drop the record'
  for text in value if name == 'completions' else [value]:
    # JSON can spell half of a surrogate pair, which no tokenizer takes.
    if isinstance(text, str) and not encodable(text):
      yield f'{name!r} holds a lone surrogate; re-encode the text'


def is_number(value: Any) -> bool:
  """Whether it is a number that a float can hold; a bool is not a number."""
  try:
    return not isinstance(value, bool | str) and math.isfinite(value)
  except (TypeError, OverflowError):
    return False


def _are_scores(value: Any) -> bool:
  return isinstance(value, list | tuple) and all(map(is_number, value))


# Name -> (check, description) of the fields that are not texts.
_KINDS = {
  'completions': (lambda value: _is_list_of(value, str), 'a list of strings'),
  'ranks': (lambda value: _is_list_of(value, int), 'a list of integers'),
  'scores': (_are_scores, 'a list of finite numbers'),
  'ended': (
    lambda value: (
      isinstance(value, list | tuple)
      and all(isinstance(item, bool) for item in value)
    ),
    'a list of true and false',
  ),
  'metadata': (lambda value: isinstance(value, dict), 'an object'),
}
_TEXT = (lambda value: isinstance(value, str), 'a string')


def _turn_problem(value: Any) -> str:
  if not isinstance(value, list) or not value:
    return f"'turns' must be a list of turns, found {_shown(value)}"
  for number, turn in enumerate(value, start=1):
    where = f"'turns': turn {number}"
    if not isinstance(turn, dict) or set(turn) != {'role', 'content'}:
      return f'{where} must have a role and a content, found {_shown(turn)}'
    if turn['role'] not in ROLES or not isinstance(turn['content'], str):
      return (
        f'{where} must have a role of {", ".join(ROLES)} and a text as '
        f'content, found {_shown(turn)}'
      )
    if not encodable(turn['content']):
      return f'{where} holds a lone surrogate; re-encode it'
  if value[-1]['role'] != 'user':
    return "'turns' must end with the user's turn; leave the answer out"
  if invisible.is_blank(value[-1]['content']):
    return "'turns' ends with an empty message; fill it in or drop the record"
  return ''


def _spaced(text: str) -> str:
  return ' '.join(composed(text).split())


def _text_problem(values: Mapping[str, Any]) -> str:
  """Describes the problem if text and turns differ; otherwise ''."""
  name = 'text' if 'text' in values else 'prompt'
  text, turns = values.get(name), values['turns']
  expected = [text_of_turns(Turn(**turn) for turn in turns)]
  if len(turns) == 1:
    expected.append(turns[0]['content'])
  if not isinstance(text, str) or _spaced(text) in map(_spaced, expected):
    return ''
  return (
    f"{name!r} and 'turns' say different things: {_shown(text)} is neither the "
    f'conversation nor its only message; leave {name!r} out'
  )


def is_json(value: Any) -> bool:
  """Whether JSON can hold it: finite numbers, no lone surrogates."""
  left = [value]  # A stack instead of recursion, because it may be deep.
  while left:
    part = left.pop()
    if isinstance(part, dict):
      if not all(isinstance(key, str) for key in part):
        return False
      left += [*part, *part.values()]
    elif isinstance(part, list | tuple):
      left += part
    elif not (
      part is None
      or isinstance(part, int)
      or (isinstance(part, str) and encodable(part))
      or (isinstance(part, float) and math.isfinite(part))
    ):
      return False
  return True


def encodable(text: str) -> bool:
  """Whether UTF-8 can encode it, that is, it has no lone surrogate."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


_FROM_JSON = {
  'completions': tuple,
  'ranks': tuple,
  'ended': tuple,
  'scores': lambda scores: tuple(map(float, scores)),
  'turns': lambda turns: tuple(Turn(**turn) for turn in turns),
}


def from_values(values: Mapping[str, Any], record_type: type[Record]) -> Record:
  """Builds a record from values in which `problems` finds nothing."""
  return record_type(
    **{
      name: _FROM_JSON[name](value) if name in _FROM_JSON else value
      for name, value in values.items()
    }
  )


def to_values(record: Record) -> dict[str, Any]:
  """A record's fields as JSON types, without those at their default."""
  values = {}
  for name, is_required in fields_of(type(record)).items():
    value = getattr(record, name)
    if not is_required and value in ('', (), {}):
      continue
    if name == 'turns':
      value = [dict(vars(turn)) for turn in value]
    values[name] = list(value) if isinstance(value, tuple) else value
  return values


def read_bytes(path: epath.PathLike) -> bytes:
  """Reads a file, unpacking it if its name ends in `.gz`.

  Raises:
    RecordError: the file is missing, a folder, or a damaged gzip file.
  """
  with _opened(epath.Path(path)) as file:
    return file.read()


def read_text(path: epath.PathLike) -> str:
  """Reads a UTF-8 file, plain or `.gz`, with or without a byte order mark.

  Raises:
    RecordError: as in `read_bytes`; or the content is not UTF-8.
  """
  content = read_bytes(path)
  check_start(path, content)
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = content.count(b'\n', 0, error.start) + 1
    raise RecordError(
      f'{path}:{line}: byte {error.start} of the file is not UTF-8; convert it'
    ) from error


def read_json(path: epath.PathLike) -> Any:
  """Reads a file that is one JSON value; raises RecordError if it is not."""
  text = read_text(path)
  try:
    return json.loads(text, object_pairs_hook=distinct_keys)
  except _JSON_ERRORS as error:
    raise RecordError(f'{path}: not JSON ({error})') from error


def distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """The object of these pairs; `json` alone would keep a repeated key's last.

  Raises ValueError if a key is repeated.
  """
  values = dict(pairs)
  if len(values) < len(pairs):
    counts = collections.Counter(key for key, _ in pairs)
    twice = [key for key, number in counts.items() if number > 1]
    raise ValueError(f'key {", ".join(map(repr, twice))} more than once')
  return values


def check_start(path: epath.PathLike, start: bytes) -> None:
  """Raises RecordError if a file that begins so is not UTF-8 text."""
  if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    raise RecordError(f'{path}: is UTF-16; convert the file to UTF-8')
  for mark, problem in NO_TEXT.items():
    if start.startswith(mark):
      raise RecordError(f'{path}: {problem}')


def write_bytes(path: epath.PathLike, content: bytes) -> None:
  """Writes a file atomically, compressing it if its name ends in `.gz`."""
  path = epath.Path(path)
  if path.name.endswith('.gz'):
    content = gzip.compress(content, mtime=0)  # Same records, same bytes.
  files.write_bytes(path, content)


def raise_problems(
  path: epath.PathLike, bad_lines: Iterable[tuple[int, str]], unit: str = 'line'
) -> None:
  """Raises one `RecordError` for all (line number, problem), if there are any.

  It shows `MAX_REPORTED_LINES` lines and counts the others. In a file that is
  one JSON list the numbers count another `unit`, such as 'record'.
  """
  by_line = collections.defaultdict(list)
  for number, problem in bad_lines:
    by_line[number].append(problem)
  place = f'{path}:' if unit == 'line' else f'{path}: {unit} '
  shown = [
    f'{place}{number}: {"; ".join(by_line[number])}'
    for number in sorted(by_line)[:MAX_REPORTED_LINES]
  ]
  if len(by_line) > len(shown):
    left = len(by_line) - len(shown)
    shown.append(f'... and {left} more bad {unit}s in this file')
  if shown:
    raise RecordError('\n'.join(shown))


def iterate_lines(
  path: epath.PathLike,
) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
  """Yields (line number, JSON object), or (line number, what is wrong).

  One line is held in memory at a time.

  Raises:
    RecordError: as in `read_bytes`; or the file is UTF-16, one of `NO_TEXT`, or
      one JSON value over several lines.
  """
  is_first = True
  for number, line in _raw_lines(epath.Path(path)):
    if isinstance(line, str):
      yield number, line
      continue
    # Each of several concatenated files may have had a byte order mark.
    line = line.removeprefix(codecs.BOM_UTF8)
    if not line.strip():
      continue
    if is_first and line.strip() in (b'[', b'[{', b'{'):
      raise RecordError(
        f'{path}:{number}: one JSON value over several lines; write one JSON '
        'object a line, or convert the file'
      )
    is_first = False
    try:
      values = json.loads(line.decode(), object_pairs_hook=distinct_keys)
    except UnicodeDecodeError as error:
      yield number, f'byte {error.start} is not UTF-8; convert the file'
    except _JSON_ERRORS as error:
      yield number, f'not JSON ({error}); write one JSON object a line'
    else:
      if not isinstance(values, dict):
        values = f'expected a JSON object, found {_shown(values)}'
      yield number, values


def begins_with(path: epath.PathLike, mark: bytes) -> bool:
  """Whether a file (plain or `.gz`) begins with `mark`, after any byte order
  mark and white space."""
  with _opened(epath.Path(path)) as file:
    start = file.read(64 * 1024)
  check_start(path, start)
  return start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(mark)


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[Any]:
  if not path.exists():
    raise RecordError(f'{path}: no such file')
  if path.is_dir():
    raise RecordError(f'{path}: is a folder; give the files inside it')
  with path.open('rb') as file:
    if not path.name.endswith('.gz'):
      # `readline` of object-store files takes no size limit.
      is_plain = isinstance(file, io.BufferedIOBase)
      yield file if is_plain else io.BufferedReader(file)
      return
    try:
      yield io.BufferedReader(gzip.GzipFile(fileobj=file))
    except (OSError, EOFError, zlib.error) as error:
      raise RecordError(
        f'{path}: not a whole gzip file ({error}); fetch it again'
      ) from error


def _raw_lines(path: epath.Path) -> Iterator[tuple[int, bytes | str]]:
  """Yields (line number, line), or (line number, problem) if it is too long."""
  with _opened(path) as file:
    for number in itertools.count(1):
      line = file.readline(MAX_LINE_BYTES + 1)
      if not line:
        return
      if number == 1:
        check_start(path, line)
      size = len(line)
      if size <= MAX_LINE_BYTES:
        yield number, line
        continue
      while line and not line.endswith(b'\n'):
        line = file.readline(MAX_LINE_BYTES)
        size += len(line)
      yield (
        number,
        f'{size:,} bytes on one line, at most {MAX_LINE_BYTES:,} are read; '
        'split the text, or write one JSON object a line',
      )


def _record_problems(
  values: Mapping[str, Any],
  record_type: type,
  number: int,
  line_of_id: dict[str, int],
) -> str:
  """What is wrong with the record of a line, duplicate prompt ids included."""
  found = problems(values, record_type)
  if record_type is Prompt and not found:
    first = line_of_id.setdefault(values['id'], number)
    if first != number:
      return (
        f"'id' {_shown(values['id'])} is already that of line {first}; ids "
        'must be distinct'
      )
  return '; '.join(found)


def read_jsonl(path: epath.PathLike, record_type: type[Record]) -> list[Record]:
  """Reads and checks all records of a JSONL file (plain or `.gz`).

  The list is in file order and never empty.

  Raises:
    RecordError: no such file, no records, or bad lines (a prompt that repeats
      an earlier id is one); see `raise_problems`.
  """
  found, bad_lines = [], []
  line_of_id: dict[str, int] = {}
  for number, values in iterate_lines(path):
    if isinstance(values, str):
      bad_lines.append((number, values))
      continue
    values = completed(values, record_type)
    problem = _record_problems(values, record_type, number, line_of_id)
    if problem:
      bad_lines.append((number, problem))
    else:
      found.append(from_values(values, record_type))
  raise_problems(path, bad_lines)
  if not found:
    raise RecordError(
      f'{path}: holds no records; expected one {record_type.__name__} a line'
    )
  return found


def check_ids(
  paths: Sequence[epath.PathLike], parts: Sequence[Sequence[Prompt]]
) -> None:
  """Raises RecordError if two files share a prompt id.

  `parts` are the prompts of each file.
  """
  path_of: dict[str, epath.PathLike] = {}
  for path, part in zip(paths, parts, strict=True):
    for prompt in part:
      other = path_of.setdefault(prompt.id, path)
      if other != path:
        raise RecordError(
          f'{path}: the id {prompt.id!r} is also in {other}; ids must be '
          'distinct'
        )


def check_labels(
  comparisons: Sequence[Comparison], path: epath.PathLike
) -> None:
  """Raises RecordError if every comparison ties all of its completions."""
  if all(len(set(comparison.ranks)) == 1 for comparison in comparisons):
    raise RecordError(
      f'{path}: in all {len(comparisons)} comparisons every completion has the '
      'same rank; ties teach a reward model nothing: check the ranks'
    )


def write_jsonl(path: epath.PathLike, records: Iterable[Record]) -> None:
  """Writes records for `read_jsonl` to read back, atomically.

  The same records always give the same bytes.

  Raises:
    RecordError: there are no records, or one is invalid; nothing is written.
  """
  lines, bad_lines = [], []
  line_of_id: dict[str, int] = {}
  for number, record in enumerate(records, start=1):
    values = to_values(record)
    problem = _record_problems(values, type(record), number, line_of_id)
    try:
      lines.append(json.dumps(values, ensure_ascii=False) + '\n')
    except (TypeError, ValueError, RecursionError) as error:
      problem = problem or f"'metadata' is not JSON: {error}"
    if problem:
      bad_lines.append((number, problem))
  raise_problems(path, bad_lines)
  if not lines:
    raise RecordError(f'{path}: refused to write a file without records')
  write_bytes(path, ''.join(lines).encode())
