"""The four record types and their JSONL files.

Every stage reads and writes these, so the embedded world, public human data
and a user's own files all run through the same loops. One JSON object a line,
UTF-8, plain or `.gz`, local or gs:// (paths go through `etils.epath`). Fields
with a default may be left out, or null; unknown fields are errors, because a
misspelt `labeller` would otherwise be lost without a word.

  Document       {"text": "The owl lives in a barn.", "source": "animals"}
  Prompt         {"id": "p7", "text": "Name a bird.", "user": "u3",
                  "category": "open qa", "metadata": {"answer": "owl"}}
  Demonstration  {"prompt": "Name a bird.", "response": "An owl.",
                  "user": "u3", "labeler": "w1"}
  Comparison     {"prompt": "Name a bird.", "completions": ["Owl.", "", "No."],
                  "ranks": [1, 2, 2], "user": "u3", "labeler": "w1"}

Ranks: 1 is best and equal numbers are ties. A comparison may have `scores`
(higher is better) in place of ranks: {"prompt": "Name a bird.",
"completions": ["Owl.", "No."], "scores": [6.5, 2], "time": "2022-01-31"}.
A completion may be the empty string, because a policy may end at once; all
other texts must say something. The prompt's text is what the model sees before
its first own token: if a separator is wanted, it is part of the text.

A conversation is a prompt, too. With `turns`, the text may be left out and is
then `text_of_turns`; a tokenizer with a chat template renders the turns its own
way. The last turn is the user's. {"id": "p8", "turns": [
{"role": "user", "content": "Name a bird."},
{"role": "assistant", "content": "Owl."}, {"role": "user", "content": "More!"}]}
Where both are given they must say the same: the text is `text_of_turns`, or the
message itself if there is only one. White space does not count.

Every file may begin with a UTF-8 byte order mark; UTF-16 is refused.

Splits go by conversation, never by the prompt that a model sees: what follows
the same `opening` belongs together, whatever was said later.
"""

import codecs
import collections
import contextlib
import dataclasses
import functools
import gzip
import io
import json
import math
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from etils import epath

from instruct_jax import files
from instruct_jax.data import invisible

MAX_REPORTED_LINES = 10
# Far beyond any context length; a whole corpus on one line is a mistake.
MAX_LINE_BYTES = 8 * 1024**2
ROLES = ('system', 'user', 'assistant')


class RecordError(ValueError):
  """A data file that cannot be used; the text names file, line and field."""


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

  Attributes:
    id: unique in its file.
    text: all that the model is given.
    user: who sent it; the caps and splits of A.2 go by this.
    category: one of the use cases of Table 1, or ''.
    metadata: anything JSON; the loops carry it and never read it.
    turns: the conversation so far, the user's turn last; () is one turn.
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
  """K completions of one prompt, ranked by one labeler (paper 3.5, K 4 to 9).

  Attributes:
    prompt: the prompt's text.
    completions: the K >= 2 texts that were ranked.
    ranks: K integers from 1 (best); equal numbers are ties.
    time: when it was labeled, as free text, or ''.
    scores: K finite numbers that gave the ranks, or ().
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


RECORD_TYPES = (Document, Prompt, Demonstration, Comparison)
Record = TypeVar('Record', Document, Prompt, Demonstration, Comparison)

# Texts that must hold something to see.
_NEVER_EMPTY = ('text', 'prompt', 'response', 'id')
_MARKS = {'system': '', 'user': '\n\nHuman:', 'assistant': '\n\nAssistant:'}


def _is_list_of(value: Any, item_type: type | tuple[type, ...]) -> bool:
  # bool is an int to Python, but `true` is no rank.
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

  The layout of Anthropic's HH files (Bai et al. 2022), which models without a
  chat template read like any other text; a system turn comes first, bare.
  """
  text = ''.join(
    f'{_MARKS[turn.role]} {turn.content}'
    if turn.role != 'system'
    else turn.content
    for turn in turns
  )
  return text + _MARKS['assistant']


def dialogue_turns(text: str) -> tuple[Turn, ...]:
  """The turns of a text in that layout; () if it is in another.

  The user comes first and the speakers alternate: a mark out of turn belongs
  to what is being said, because answers may quote a dialogue.
  """
  if not text.startswith(_MARKS['user']):
    return ()
  turns, role, start = [], 'user', 0
  while True:
    other = 'assistant' if role == 'user' else 'user'
    start += len(_MARKS[role])
    end = text.find(_MARKS[other], start)
    turns.append(Turn(role, text[start : end if end >= 0 else None].strip()))
    if end < 0:
      return tuple(turns)
    role, start = other, end


def conversation(
  row: 'Prompt | Demonstration | Comparison',
) -> tuple[Turn, ...]:
  """The turns before the answer, whichever way a record gives them.

  Its `turns`; or those of a text in the layout of `text_of_turns`; or the text
  as one turn of the user's.
  """
  if row.turns:
    return row.turns
  text = row.text if isinstance(row, Prompt) else row.prompt
  start = text.find(_MARKS['user'])
  if start >= 0 and text.rstrip().endswith(_MARKS['assistant']):
    turns = dialogue_turns(text[start:])
    if turns[-1] == Turn('assistant', ''):
      system = text[:start].strip()
      first = (Turn('system', system),) if system else ()
      return (*first, *turns[:-1])
  return (Turn('user', text),)


def composed(text: str) -> str:
  """The text with each accent in its letter (NFC), as most keyboards write."""
  return text if text.isascii() else unicodedata.normalize('NFC', text)


def comparable(text: str) -> str:
  """A text by which copies are told: composed characters (NFC), one case,
  single spaces, nothing invisible."""
  if not text.isascii():
    text = invisible.HIDDEN.sub('', ' '.join(text.split()))
    text = unicodedata.normalize('NFD', text).casefold()
    text = unicodedata.normalize('NFC', text)
  return ' '.join(text.casefold().split())


def opening(row: Any) -> str:
  """What a split goes by: the user's first turn, as `comparable` text.

  All rows of a conversation tree share it, and so do a long conversation and a
  single question that begin alike. A document is its own opening.
  """
  if not isinstance(row, Document):
    for turn in conversation(row):
      if turn.role == 'user' and not invisible.is_blank(turn.content):
        return comparable(turn.content)
  return comparable(row.text if hasattr(row, 'text') else row.prompt)


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
  """Values as a file may spell them, with ranks and text filled in.

  `scores` stand for `ranks` and `turns` for the prompt's text, and a field that
  may be left out is left out by null; what is wrong with any is left for
  `problems` to say.
  """
  filled = dict(values)
  if None in filled.values():
    may_lack = {
      name
      for name, (required, _) in _fields_of(record_type).items()
      if not required
    }
    filled = {
      name: value
      for name, value in filled.items()
      if value is not None or name not in may_lack
    }
  if (
    record_type is Comparison
    and filled.get('ranks') is None
    and _are_scores(values.get('scores'))
  ):
    filled['ranks'] = list(ranks_of_scores(values['scores']))
  name = 'text' if record_type is Prompt else 'prompt'
  if (
    record_type is not Document
    and filled.get(name) is None
    and 'turns' in filled
    and not _turn_problems(filled['turns'])
  ):
    turns = [Turn(**turn) for turn in filled['turns']]
    filled[name] = text_of_turns(turns)
  return filled


def _are_scores(value: Any) -> bool:
  return _is_list_of(value, (int, float)) and all(map(math.isfinite, value))


def _turn_problems(value: Any) -> str:
  if not isinstance(value, list) or not value:
    return f"'turns' must be a list of turns, found {_shown(value)}"
  for number, turn in enumerate(value, start=1):
    if not isinstance(turn, dict) or set(turn) != {'role', 'content'}:
      return (
        f"'turns': turn {number} must have a role and a content, found "
        f'{_shown(turn)}'
      )
    if turn['role'] not in ROLES or not isinstance(turn['content'], str):
      return (
        f"'turns': turn {number} must have a role of {', '.join(ROLES)} and a "
        f'text as content, found {_shown(turn)}'
      )
    if not encodable(turn['content']):
      return f"'turns': turn {number} holds a lone surrogate; re-encode it"
  if value[-1]['role'] != 'user':
    return "'turns' must end with the user's turn; the answer is no part of it"
  if invisible.is_blank(value[-1]['content']):
    return "'turns' ends with an empty message; fill it in or drop the record"
  return ''


@functools.cache
def _fields_of(record_type: type) -> dict[str, tuple[bool, Any]]:
  """Name -> (required, default)."""
  return {
    field.name: (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING,
      field.default,
    )
    for field in dataclasses.fields(record_type)
  }


def problems(values: Mapping[str, Any], record_type: type) -> list[str]:
  """Says what keeps `values` from being a `record_type`; [] if nothing does.

  Args:
    values: field name to value, as parsed from JSON.
    record_type: one of `RECORD_TYPES`.

  Returns:
    One sentence per problem: the field, what was found, what to do.
  """
  fields = _fields_of(record_type)
  found = []
  for name in values:
    if name not in fields:
      found.append(
        f'unknown field {name!r}; {record_type.__name__} has '
        f'{", ".join(fields)}; put anything else under "metadata"'
      )
  for name, (required, _) in fields.items():
    if name not in values:
      if required:
        found.append(f'field {name!r} is missing; add it')
      continue
    value = values[name]
    if name == 'completions':
      if not _is_list_of(value, str):
        found.append(
          f'{name!r} must be a list of strings, found {_shown(value)}'
        )
        continue
      if len(value) < 2:
        found.append(
          f'{name!r} has {len(value)} texts; a comparison needs at least 2: '
          'drop the record'
        )
    elif name == 'ranks':
      if not _is_list_of(value, int):
        found.append(
          f'{name!r} must be a list of integers, found {_shown(value)}'
        )
        continue
      if any(rank < 1 for rank in value):
        found.append(
          f'{name!r} must be 1 (best) or more, found {_shown(value)}'
        )
      completions = values.get('completions')
      if isinstance(completions, list | tuple) and len(completions) != len(
        value
      ):
        found.append(
          f'{name!r} has {len(value)} numbers for {len(completions)} '
          'completions; give one rank each'
        )
    elif name in ('scores', 'turns') and value in ((), []):
      continue  # None given.
    elif name == 'scores':
      if not _are_scores(value):
        found.append(
          f'{name!r} must be a list of finite numbers, found {_shown(value)}'
        )
        continue
      if _is_list_of(values.get('ranks'), int) and tuple(
        values['ranks']
      ) != ranks_of_scores(value):
        found.append(
          f'{name!r} {_shown(value)} and ranks {_shown(values["ranks"])} '
          f'differ; the scores have ranks {list(ranks_of_scores(value))}: '
          'leave the ranks out'
        )
      continue
    elif name == 'turns':
      problem = _turn_problems(value)
      text_name = 'text' if record_type is Prompt else 'prompt'
      text = values.get(text_name)
      if not problem and isinstance(text, str) and not _agree(text, value):
        problem = (
          f"{text_name!r} and 'turns' say different things: "
          f'{_shown(text)} is neither the conversation nor its only message; '
          f'leave {text_name!r} out'
        )
      if problem:
        found.append(problem)
      continue
    elif name == 'metadata':
      if not isinstance(value, dict):
        found.append(f'{name!r} must be an object, found {_shown(value)}')
      elif value and not _is_json(value):
        found.append(
          f'{name!r} is not JSON: {_shown(value)}; numbers must be finite, '
          'texts without lone surrogates'
        )
      continue
    elif not isinstance(value, str):
      found.append(f'{name!r} must be a string, found {_shown(value)}')
      continue
    elif name in _NEVER_EMPTY and required and invisible.is_blank(value):
      found.append(f'{name!r} is empty; fill it in or drop the record')
    for text in value if name == 'completions' else [value]:
      # JSON can spell half of a surrogate pair, which no tokenizer takes.
      if isinstance(text, str) and not encodable(text):
        found.append(f'{name!r} holds a lone surrogate; re-encode the text')
  return found


def _agree(text: str, turns: list[dict[str, str]]) -> bool:
  whole = text_of_turns(Turn(**turn) for turn in turns)
  if text == whole:
    return True
  said = {' '.join(unicodedata.normalize('NFC', whole).split())}
  if len(turns) == 1:
    said.add(
      ' '.join(unicodedata.normalize('NFC', turns[0]['content']).split())
    )
  return ' '.join(unicodedata.normalize('NFC', text).split()) in said


def _is_json(value: Any) -> bool:
  left = [value]  # A stack, for it may be deep.
  while left:
    part = left.pop()
    if isinstance(part, dict):
      left += [*part, *part.values()]
      if not all(isinstance(key, str) for key in part):
        return False
    elif isinstance(part, list | tuple):
      left += part
    elif isinstance(part, str):
      if not encodable(part):
        return False
    elif isinstance(part, float):
      if not math.isfinite(part):
        return False
    elif part is not None and not isinstance(part, int):
      return False
  return True


def encodable(text: str) -> bool:
  """Whether UTF-8 can hold a text: half of a surrogate pair it cannot."""
  if text.isascii():
    return True
  try:
    text.encode('utf-8')
  except UnicodeEncodeError:
    return False
  return True


def from_values(values: Mapping[str, Any], record_type: type[Record]) -> Record:
  """Builds a record from values that `problems` found nothing wrong with."""
  values = dict(values)
  for name in ('completions', 'ranks'):
    if name in values:
      values[name] = tuple(values[name])
  if 'scores' in values:
    values['scores'] = tuple(map(float, values['scores']))
  if 'turns' in values:
    values['turns'] = tuple(Turn(**turn) for turn in values['turns'])
  return record_type(**values)


def to_values(record: Record) -> dict[str, Any]:
  """A record's fields as JSON types, without those that hold their default."""
  values = {}
  for name, (_, default) in _fields_of(type(record)).items():
    value = getattr(record, name)
    if value == default or (name == 'metadata' and not value):
      continue
    values[name] = list(value) if isinstance(value, tuple) else value
    if name == 'turns':
      values['turns'] = [
        {'role': turn.role, 'content': turn.content} for turn in value
      ]
  return values


def read_bytes(path: epath.PathLike) -> bytes:
  """Reads a file, unpacking it if its name ends in `.gz`.

  Raises:
    RecordError: the file is missing, is a folder, or is cut short.
  """
  path = epath.Path(path)
  _check_file(path)
  content = path.read_bytes()
  if path.name.endswith('.gz'):
    try:
      content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
      raise _gzip_error(path, error) from error
  return content


def read_text(path: epath.PathLike) -> str:
  """Reads a UTF-8 file, plain or `.gz`, with or without a byte order mark.

  Raises:
    RecordError: as in `read_bytes`; or a byte is not UTF-8.
  """
  content = read_bytes(path)
  _check_start(path, content)
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = content.count(b'\n', 0, error.start) + 1
    raise RecordError(
      f'{path}:{line}: byte {error.start} of the file is not UTF-8; convert it'
    ) from error


def read_json(path: epath.PathLike) -> Any:
  """Reads a file that is one JSON value.

  Raises:
    RecordError: as in `read_text`; or it is not JSON.
  """
  text = read_text(path)
  try:
    return json.loads(text)
  # A number of thousands of digits or too deep nesting, besides bad syntax.
  except (ValueError, RecursionError) as error:
    raise RecordError(f'{path}: not JSON ({error})') from error


def _check_start(path: epath.PathLike, start: bytes) -> None:
  if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    raise RecordError(f'{path}: is UTF-16; convert the file to UTF-8')
  if start.startswith(b'\x1f\x8b'):
    raise RecordError(
      f'{path}: is compressed with gzip; let its name end in .gz'
    )


def _check_file(path: epath.Path) -> None:
  if not path.exists():
    raise RecordError(f'{path}: no such file')
  if path.is_dir():
    raise RecordError(f'{path}: is a folder; give the files inside it')


def _gzip_error(path: epath.Path, error: Exception) -> RecordError:
  return RecordError(f'{path}: not a whole gzip file ({error}); fetch it again')


def write_bytes(path: epath.PathLike, content: bytes) -> None:
  """Writes a file whole or not at all, packing it if its name ends in `.gz`."""
  path = epath.Path(path)
  if path.name.endswith('.gz'):
    content = gzip.compress(content, mtime=0)  # Same records, same bytes.
  files.write_bytes(path, content)


def raise_problems(
  path: epath.PathLike, bad_lines: Iterable[tuple[int, str]]
) -> None:
  """Raises one `RecordError` for all (line number, problem), if there are any.

  At most `MAX_REPORTED_LINES` lines are shown, and the rest counted.
  """
  by_line = collections.defaultdict(list)
  for number, problem in bad_lines:
    by_line[number].append(problem)
  if not by_line:
    return
  shown = [
    f'{path}:{number}: {"; ".join(found)}'
    for number, found in sorted(by_line.items())[:MAX_REPORTED_LINES]
  ]
  rest = len(by_line) - len(shown)
  if rest:
    shown.append(f'... and {rest} more bad lines in this file')
  raise RecordError('\n'.join(shown))


def iterate_lines(
  path: epath.PathLike,
) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
  """Yields (line number, JSON object), or (line number, what is wrong).

  One line is held in memory at a time.

  Raises:
    RecordError: as in `read_bytes`, UTF-16, or a JSON list over several lines.
  """
  is_first = True
  for number, line in _raw_lines(epath.Path(path)):
    if isinstance(line, str):
      yield number, line
      continue
    # Also where files were joined that each began with one.
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
      values = json.loads(line.decode('utf-8'))
    except UnicodeDecodeError as error:
      yield number, f'byte {error.start} is not UTF-8; convert the file'
      continue
    # A number of thousands of digits or too deep nesting, besides bad syntax.
    except (ValueError, RecursionError) as error:
      yield number, f'not JSON ({error}); write one JSON object a line'
      continue
    if isinstance(values, dict):
      yield number, values
    else:
      yield number, f'expected a JSON object, found {_shown(values)}'


def begins_with(path: epath.PathLike, mark: bytes) -> bool:
  """Whether a file does, plain or `.gz`, but for white space and a BOM.

  Raises:
    RecordError: as in `read_bytes`, or UTF-16.
  """
  with _opened(epath.Path(path)) as file:
    start = file.read(64 * 1024)
  _check_start(path, start)
  return start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(mark)


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[Any]:
  _check_file(path)
  with path.open('rb') as file:
    if not path.name.endswith('.gz'):
      if not isinstance(file, io.BufferedIOBase):
        # Those of object stores know no longest line.
        file = io.BufferedReader(file)
      yield file
      return
    try:
      yield io.BufferedReader(gzip.GzipFile(fileobj=file))
    except (OSError, EOFError, zlib.error) as error:
      raise _gzip_error(path, error) from error


def _raw_lines(path: epath.Path) -> Iterator[tuple[int, bytes | str]]:
  with _opened(path) as file:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
      number += 1
      if number == 1:
        _check_start(path, line)
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


def _repeated_id(
  name: str, number: int, line_of_id: dict[str, int]
) -> list[str]:
  first = line_of_id.setdefault(name, number)
  if first == number:
    return []
  return [
    f"'id' {_shown(name)} is that of line {first}, too; ids must be distinct"
  ]


def read_jsonl(path: epath.PathLike, record_type: type[Record]) -> list[Record]:
  """Reads and checks all records of a JSONL file (plain or `.gz`).

  Args:
    path: a file, local or gs://.
    record_type: one of `RECORD_TYPES`.

  Returns:
    The records in file order; never an empty list.

  Raises:
    RecordError: no such file, no records, or bad lines; up to 10 bad lines are
      reported together as `file:line: field, what was found, what to do`. Two
      prompts with one id are a bad line, too.
  """
  records, bad_lines = [], []
  line_of_id: dict[str, int] = {}
  for number, values in iterate_lines(path):
    if isinstance(values, str):
      bad_lines.append((number, values))
      continue
    values = completed(values, record_type)
    found = problems(values, record_type)
    if record_type is Prompt and not found:
      found = _repeated_id(values['id'], number, line_of_id)
    if found:
      bad_lines.append((number, '; '.join(found)))
    else:
      records.append(from_values(values, record_type))
  raise_problems(path, bad_lines)
  if not records:
    raise RecordError(
      f'{path}: holds no records; expected one {record_type.__name__} a line'
    )
  return records


def check_labels(
  comparisons: Iterable[Comparison], path: epath.PathLike
) -> None:
  """Refuses rankings from which no reward model could learn.

  Raises:
    RecordError: in every comparison all completions are tied.
  """
  comparisons = list(comparisons)
  if any(len(set(comparison.ranks)) > 1 for comparison in comparisons):
    return
  raise RecordError(
    f'{path}: in all {len(comparisons)} comparisons every completion has the '
    'same rank; ties teach a reward model nothing: check the ranks'
  )


def write_jsonl(path: epath.PathLike, records: Iterable[Record]) -> None:
  """Writes records so that `read_jsonl` gives them back; whole or not at all.

  The same records always give the same bytes. Folders are made as needed.

  Raises:
    RecordError: there are no records, or one would be refused on reading; the
      file is then not touched.
  """
  lines, bad_lines = [], []
  line_of_id: dict[str, int] = {}
  for number, record in enumerate(records, start=1):
    values = to_values(record)
    found = problems(values, type(record))
    if isinstance(record, Prompt) and not found:
      found = _repeated_id(record.id, number, line_of_id)
    if found:
      bad_lines.append((number, '; '.join(found)))
      continue
    try:
      line = json.dumps(values, ensure_ascii=False, allow_nan=False)
      lines.append(line.encode('utf-8'))
    except (TypeError, ValueError, RecursionError) as error:
      bad_lines.append((number, f"'metadata' is not JSON: {error}"))
  raise_problems(path, bad_lines)
  if not lines:
    raise RecordError(f'{path}: refused to write a file without records')
  write_bytes(path, b'\n'.join([*lines, b'']))
