"""What the readers of published formats share.

A reader is a function that reads a file and returns an `Imported`. `reader`
makes one from a function that adds an entry, `rated_reader` from a function
that reads a rating. Both report all bad entries of a file together, by line.
"""

import ast
import collections
import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os.path
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from etils import epath

from instruct_jax.data import invisible, records, sources

# Spellings of "no input" by annotators and models. Not `Na`, which is sodium.
_NO_INPUT = re.compile(
  r'[<\[({"\'*]*(?:no[\s_-]*inputs?'
  r'(?:[\s_-]*(?:is|was|are))?'
  r'(?:[\s_-]*(?:required|needed|necessary|provided|given|available))?'
  r'|n/a|n\.a\.?|none|null|nan|not[\s_-]applicable)[>\])}"\'*.!]*',
  re.IGNORECASE,
)
# Keys of messages that call a tool; their content may be missing.
_CALLS = ('tool_calls', 'function_call', 'function_calls')
# Keys of a model's reasoning before its answer.
_THOUGHTS = ('reasoning_content', 'reasoning', 'thinking')
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content)['"]\s*:""")
# The most characters of field names that an error lists.
_MOST_SHOWN = 300
# Ranks of two answers: the first or the second is better, or they tie.
FIRST, SECOND, TIE = (1, 2), (2, 1), (1, 1)


def _list():
  return dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Imported:
  """The records read from files.

  `demonstrations` are by people, as far as the file says;
  `model_demonstrations` are by the model that `labeler` names. `skipped` counts
  the entries that were left out, by reason.
  """

  demonstrations: list[records.Demonstration] = _list()
  comparisons: list[records.Comparison] = _list()
  model_demonstrations: list[records.Demonstration] = _list()
  skipped: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )

  def add(self, demonstration: records.Demonstration, model: str = '') -> None:
    """Adds a demonstration by a person or, if `model` is given, that model."""
    if model:
      self.model_demonstrations.append(
        dataclasses.replace(demonstration, labeler=f'model:{model}')
      )
    else:
      self.demonstrations.append(demonstration)

  def skip(self, reason: str, count: int = 1) -> None:
    """Counts entries that are left out."""
    if count:
      self.skipped[reason] += count

  def extend(self, other: 'Imported') -> None:
    """Adds the content of another file."""
    for name, value in vars(other).items():
      setattr(self, name, getattr(self, name) + value)

  def named(self, path: epath.PathLike, name: str) -> 'Imported':
    """Returns the same records with another name of the file in their ids.

    Args:
      path: the file.
      name: its name according to `names_of`.
    """
    if name == stem(path):
      return self
    old = re.compile(rf'(^|:){re.escape(stem(path))}(?=:\d)')

    def renamed(rows):
      return [
        dataclasses.replace(
          row, id=old.sub(lambda found: found[1] + name, row.id, 1)
        )
        for row in rows
      ]

    return Imported(
      renamed(self.demonstrations),
      renamed(self.comparisons),
      renamed(self.model_demonstrations),
      self.skipped,
    )

  def add_scored(
    self,
    prompt: str | Sequence[records.Turn],
    completions: Sequence[str],
    scores: Sequence[int | float],
    **about,
  ) -> None:
    """Adds a ranking by scores; higher is better, and equal scores tie.

    Args:
      prompt: turns of which the last is the user's; or a text, which is used
        unchanged, as are the completions then.
      completions, scores: of two or more answers. Answers that differ only in
        surrounding white space become one, with the mean of their scores.
      **about: fields of the comparison; and `each`, metadata given as lists
        with one item per answer.

    Raises:
      Skip: there is no question, or only one distinct answer.
    """
    self._add_ranking(prompt, completions, scores, True, **about)

  def add_ranked(
    self,
    prompt: str | Sequence[records.Turn],
    completions: Sequence[str],
    ranks: Sequence[int | float],
    **about,
  ) -> None:
    """Adds a ranking by ranks, where 1 is best; otherwise as `add_scored`."""
    scores = [-rank for rank in ranks]
    self._add_ranking(prompt, completions, scores, False, **about)

  def _add_ranking(
    self,
    prompt,
    completions,
    scores,
    keeps_scores,
    *,
    each: Mapping[str, Sequence] | None = None,
    metadata: Mapping[str, Any] | None = None,
    **about,
  ):
    turns = () if isinstance(prompt, str) else tuple(prompt)
    if turns and turns[-1].role != 'user':
      raise Skip('the prompt does not end with a question')
    question = (
      prompt if isinstance(prompt, str) else turns and turns[-1].content
    )
    if not question or invisible.is_blank(question):
      raise Skip('the prompt is empty')
    first, merged = {}, collections.defaultdict(list)
    for number, (text, score) in enumerate(
      zip(completions, scores, strict=True)
    ):
      key = records.composed(text.strip())
      first.setdefault(key, number)
      merged[key].append(score)
    if len(merged) < 2:
      raise Skip('all answers are the same')
    copies = len(completions) - len(merged)
    self.skip('an answer that repeats another, merged', copies)
    kept = list(first.values())
    texts = [completions[number] for number in kept]
    if turns:
      prompt = records.text_of_turns(turns)
      texts = [f' {text.strip()}' if text.strip() else '' for text in texts]
    means = tuple(sum(found) / len(found) for found in merged.values())
    lists = {
      name: [values[number] for number in kept]
      for name, values in (each or {}).items()
    }
    self.comparisons.append(
      records.Comparison(
        prompt=prompt,
        completions=tuple(texts),
        ranks=records.ranks_of_scores(means),
        scores=means if keeps_scores else (),
        turns=turns,
        metadata={**(metadata or {}), **lists},
        **about,
      )
    )

  def rows(self) -> list[records.Comparison | records.Demonstration]:
    """Comparisons, then demonstrations by people, then those by models."""
    return [
      *self.comparisons,
      *self.demonstrations,
      *self.model_demonstrations,
    ]

  def prompts(self) -> list[records.Prompt]:
    """The distinct prompts, in order and numbered.

    Prompts that differ only in how accents are encoded are the same.
    """
    first = {}
    for row in self.rows():
      first.setdefault(records.composed(row.prompt), row)
    return [
      records.Prompt(f'p{i}', row.prompt, row.user, row.category, {}, row.turns)
      for i, row in enumerate(first.values())
    ]


class Skip(Exception):  # noqa: N818
  """An entry that cannot be used; the message is the reason to count."""


NO_ANSWER = 'an answer is missing (null)'


def _is_null(value: Any) -> bool:
  return value is None or value != value


def checked(value: Any, kinds: Any, where: str, what: str) -> Any:
  """Returns the value if it is of these types; None for null and NaN.

  NaN is the null of tables.

  Raises:
    RecordError: it is of another type, or a text with a lone surrogate.
  """
  if _is_null(value):
    return None
  if not isinstance(value, kinds) or isinstance(value, bool):
    raise records.RecordError(
      f'{where} is a {type(value).__name__}, expected {what}'
    )
  if isinstance(value, str) and not records.encodable(value):
    raise records.RecordError(
      f'{where} holds a lone surrogate; re-encode the text'
    )
  return value


_Meaning = TypeVar('_Meaning')


class Entry:
  """An object of a file; errors name its place in the file or in an entry.

  `place` is '' for a top-level entry; its `name` (file and line) is for ids.
  `path` is the path of the file.
  """

  def __init__(
    self,
    values: Any,
    place: str,
    name: str = '',
    line: int = 0,
    path: epath.PathLike = '',
  ):
    if not isinstance(values, Mapping):
      raise records.RecordError(
        f'{place}: expected an object, found a {type(values).__name__}'
      )
    self.values, self.place, self.name, self.line = values, place, name, line
    self.path = path

  def where(self, text: str) -> str:
    """The text, preceded by the place of this object."""
    return f'{self.place}: {text}' if self.place else text

  def get(self, key: str, kinds: Any, what: str) -> Any:
    """The value of a field that must be there; None for null."""
    if key not in self.values:
      found = ', '.join(map(str, self.values)) or 'nothing'
      if len(found) > _MOST_SHOWN:  # For example a text read as a header.
        found = f'{found[:_MOST_SHOWN]}...'
      raise records.RecordError(
        self.where(
          f'field {key!r} is missing (found {found}); is this the format of '
          'this file?'
        )
      )
    return checked(self.values[key], kinds, self.where(repr(key)), what)

  def text(self, key: str) -> str:
    """A text; '' for null."""
    return self.get(key, str, 'a text') or ''

  def answer(
    self, key: str, text_fn: Callable[[str], str] | None = None
  ) -> str:
    """The text of an answer, as `text` or another method reads it.

    Raises:
      Skip: it is null. An answer may be empty, but null is none.
    """
    text = (text_fn or self.text)(key)
    if _is_null(self.values[key]):
      raise Skip(NO_ANSWER)
    return text

  def cell(self, key: str) -> str:
    """The text of a cell; numbers and bools of a table become text."""
    value = self.values.get(key)
    if isinstance(value, bool):
      return str(value)
    value = self.get(key, (str, int, float), 'a text')
    if isinstance(value, float) and value.is_integer():
      value = int(value)
    return '' if value is None else str(value)

  def optional(self, key: str) -> str:
    """A text, number or date as text; '' if it is missing or null."""
    if key not in self.values:
      return ''
    kinds = (str, int, float, datetime.date)
    value = self.get(key, kinds, 'a text')
    return '' if value is None else str(value)

  def number(self, key: str) -> int | float | None:
    """A number, which may be written as text; None for null or blank text."""
    value = self.get(key, (int, float, str), 'a number')
    if isinstance(value, str):
      try:
        value = float(value) if value.strip() else None
      except ValueError:
        value = math.inf
    if value is not None and not records.is_number(value):
      raise records.RecordError(
        self.where(f'{key!r} is {self.values[key]!r:.80}, expected a number')
      )
    return value

  def label(self, key: str, meanings: Mapping[str, _Meaning]) -> _Meaning:
    """The meaning of a label; a number counts as its text."""
    value = self.get(key, (str, int, float), 'a label')
    if isinstance(value, float) and value.is_integer():
      value = int(value)
    name = '' if value is None else str(value).strip()
    if name not in meanings:
      raise records.RecordError(
        self.where(f'{key!r} is {value!r:.80}, expected {", ".join(meanings)}')
      )
    return meanings[name]

  def texts(self, key: str) -> list[str]:
    """A text or a list of texts, as a list."""
    value = self.get(key, (str, list), 'a text or a list of texts')
    if not isinstance(value, list):
      return [value or '']
    return texts_of(value, self.where(key))

  def json_texts(self, key: str) -> list[str]:
    """A list of texts, which may be given as JSON text."""
    value = self.get(key, (str, list), 'a list of texts')
    if isinstance(value, str):
      try:
        value = json.loads(value)
      except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list):
      raise records.RecordError(
        self.where(f'{key!r} is not a list of texts, nor the JSON of one')
      )
    if any(isinstance(v, str) and not records.encodable(v) for v in value):
      raise Skip('a text holds a lone surrogate')
    if any(map(_is_null, value)):
      raise Skip('a text is missing (null)')
    return texts_of(value, self.where(key))

  def holds_list(self, key: str) -> bool:
    """Whether a field is a list, or a list of messages written as text."""
    value = self.values.get(key)
    return isinstance(value, list) or _messages_in(value) is not None

  def items(self, key: str) -> list:
    """A list; empty for null. Messages may be written as text in a cell."""
    found = _messages_in(self.values.get(key))
    return self.get(key, list, 'a list') or [] if found is None else found

  def entries(self, key: str) -> list['Entry']:
    """The objects of a list."""
    return [
      Entry(item, self.where(f'{key}[{number}]'))
      for number, item in enumerate(self.items(key))
    ]

  def entry(self, key: str) -> 'Entry':
    """An object inside this one; empty for null."""
    return Entry(self.get(key, dict, 'an object') or {}, self.where(key))

  def messages(self, key: str) -> tuple[records.Turn, ...]:
    """The turns of a list of messages; see `message`."""
    return tuple(one.message() for one in self.entries(key))

  def message(self) -> records.Turn:
    """The turn of an object with `role` and `content`.

    The content may be a list of parts with `type` and `text`.

    Raises:
      Skip: the role is not system, user or assistant, there is more than text,
        such as tool calls or reasoning, or a question or an answer is null.
    """
    role = self.text('role')
    if role not in records.ROLES:
      raise Skip('a message is neither system, user nor assistant')
    if any(self.values.get(key) for key in _CALLS):
      raise Skip('a message holds more than text')
    if any(self.values.get(key) for key in _THOUGHTS):
      raise Skip('a message holds reasoning beside its text')
    if not isinstance(self.values.get('content'), list):
      turn = records.Turn(role, self.text('content'))
      if role != 'system' and _is_null(self.values['content']):
        raise Skip('a message has no content (null)')
      return turn
    parts = self.entries('content')
    if any(part.text('type') != 'text' for part in parts):
      raise Skip('a message holds more than text')
    return records.Turn(role, ''.join(part.text('text') for part in parts))

  def details(self, *keys: str) -> dict[str, Any]:
    """Metadata: those of these fields that are text, bool or finite number."""
    return {
      key: value
      for key in keys
      if isinstance(value := self.values.get(key), str | int | float)
      and (not isinstance(value, str) or records.encodable(value))
      and (not isinstance(value, float) or math.isfinite(value))
    }


def _messages_in(value: Any) -> list | None:
  """The messages in a text that is a list of them, in JSON or Python syntax.

  None for any other value.

  Raises:
    RecordError: it looks like a list of messages but cannot be parsed, such as
      what pandas writes for arrays.
  """
  if not isinstance(value, str) or not _MESSAGES.match(value):
    return None
  for parse in (json.loads, ast.literal_eval):
    with contextlib.suppress(ValueError, SyntaxError, RecursionError):
      found = parse(value.strip())
      if isinstance(found, list) and all(
        isinstance(one, dict) and {'role', 'content'} <= set(one)
        for one in found
      ):
        return found
      return None
  if value.rstrip().endswith(('}]', '} ]')):
    raise records.RecordError(
      f'a cell looks like a list of messages but is not JSON: {value[:60]!r}; '
      'save the table as JSONL or Parquet'
    )
  return None


def texts_of(items: list, where: str) -> list[str]:
  """The texts of a list; '' for null.

  Args:
    items: the list.
    where: its place, for errors.

  Raises:
    RecordError: an item is not a text.
  """
  return [
    checked(item, str, f'{where}[{number}]', 'a text') or ''
    for number, item in enumerate(items)
  ]


Entries = Callable[[epath.PathLike], Iterable[tuple[int, Any]]]


def reader(
  add: Callable[[Imported, Entry], str | None],
  *,
  entries: Entries = sources.read_objects,
) -> Callable[[epath.PathLike], Imported]:
  """Makes a function that reads a file from one that adds an entry.

  To skip an entry, `add(imported, entry)` returns the reason or raises it as
  `Skip`. `entries` gives the (line, object) pairs of a file. Bad entries are
  reported together; see `records.raise_problems`. If the first
  `MAX_REPORTED_LINES` entries all have the same problem, the file is of another
  format, and reading stops.
  """

  @functools.wraps(add)
  def read(path):
    imported, bad, line = Imported(), [], 0
    for number, (line, values) in enumerate(entries(path)):
      if (
        number == len(bad) == records.MAX_REPORTED_LINES
        and len({problem for _, problem in bad}) == 1
      ):
        first, problem = bad[0]
        raise records.RecordError(
          f'{path}:{first}: {problem} (the first {number} entries are all like '
          'this)'
        )
      if isinstance(values, str):
        bad.append((line, values))
        continue
      try:
        entry = Entry(values, '', f'{stem(path)}:{line}', line, path)
        reason = add(imported, entry)
      except Skip as skipped:
        reason = str(skipped)
      except records.RecordError as error:
        bad.append((line, str(error)))
        continue
      if reason:
        imported.skip(reason)
    records.raise_problems(path, bad)
    if not line:
      raise records.RecordError(f'{path}: holds no entries')
    return imported

  return read


@dataclasses.dataclass(frozen=True)
class Rating:
  """One answer with its score; ratings with the same `key` form one ranking.

  `prompt` and `about` are as in `Imported.add_scored`; `each` is the metadata
  of this answer.
  """

  key: Hashable
  prompt: str | Sequence[records.Turn]
  completion: str
  score: int | float
  about: Mapping[str, Any]
  each: Mapping[str, Any]


def rated_reader(
  rate: Callable[[Entry], Rating], *, entries: Entries = sources.read_objects
) -> Callable[[epath.PathLike], Imported]:
  """Makes a function that reads a file of ratings of single answers.

  A ranking keeps the scores of its ratings, and `prompt` and `about` of the
  first.
  """

  @functools.wraps(rate)
  def read(path):
    groups = collections.defaultdict(list)

    def add(imported, entry):
      rating = rate(entry)
      groups[rating.key].append(rating)

    imported = reader(add, entries=entries)(path)
    for ratings in groups.values():
      first = ratings[0]
      each = {
        name: [rating.each.get(name) for rating in ratings]
        for name in first.each
      }
      try:
        if len(ratings) < 2:
          raise Skip('an answer that is rated alone')
        imported.add_scored(
          first.prompt,
          [rating.completion for rating in ratings],
          [rating.score for rating in ratings],
          each=each,
          **first.about,
        )
      except Skip as reason:
        imported.skip(str(reason))
    return imported

  return read


# --- Prompts and answers ------------------------------------------------------


def stem(path: epath.PathLike) -> str:
  """A file's name up to its first dot."""
  return epath.Path(path).name.split('.')[0]


def names_of(paths: Sequence[epath.PathLike]) -> dict[str, str]:
  """Path -> the name of the file in ids: its name up to the first dot.

  For files that share a name, their folders below the common one are put before
  it, such as `Alpaca-7B/train`; their whole file names are used if that is not
  enough.
  """
  found = dict.fromkeys(map(str, paths), '')  # In this order.
  same = collections.defaultdict(list)
  for path in found:
    same[stem(path)].append(path)
  for name, files in same.items():
    folders = [epath.Path(path).parent.parts for path in files]
    common = len(os.path.commonprefix(folders))
    are_apart = len(set(folders)) == len(files)
    for path, parts in zip(files, folders, strict=True):
      own = name if are_apart or len(files) == 1 else epath.Path(path).name
      found[path] = '/'.join((*parts[common:], own))
  return found


def instruction_prompt(instruction: str, given: str = '') -> str:
  """An instruction and its input as a raw prompt."""
  if _NO_INPUT.fullmatch(given.strip()):
    given = ''
  parts = [part.strip() for part in (instruction, given)]
  parts = [part for part in parts if not invisible.is_blank(part)]
  return '\n\n'.join(parts) + '\n\n' if parts else ''


def post_prompt(info: Entry) -> str:
  """The prompt for a post (Stiennon et al. 2020, Table 15) or an article.

  '' if the post is empty.
  """
  article = info.optional('article')
  if not invisible.is_blank(article):
    title = info.optional('title')
    title = f'{title}\n\n' if title else ''
    return f'Article: {title}{article}\n\nTL;DR:'
  if 'article' in info.values and 'post' not in info.values:
    return ''
  subreddit, title, post = map(info.text, ('subreddit', 'title', 'post'))
  if invisible.is_blank(post):
    return ''
  return f'SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:'


def asked(question: str, system: str = '') -> tuple[records.Turn, ...]:
  """One question as a conversation, after a system turn if there is one."""
  turns = (records.Turn('user', question.strip()),)
  if invisible.is_blank(system):
    return turns
  return (records.Turn('system', system.strip()), *turns)


def split_answer(
  turns: Sequence[records.Turn],
) -> tuple[tuple[records.Turn, ...], str]:
  """(turns before the answer, answer); raises Skip if there is none."""
  roles = [turn.role for turn in turns[-2:]]
  if roles != ['user', 'assistant']:
    raise Skip('a conversation does not end with a question and its answer')
  return tuple(turns[:-1]), turns[-1].content


def split_answers(
  conversations: Iterable[Sequence[records.Turn]],
) -> tuple[tuple[records.Turn, ...], list[str]]:
  """(turns before the answers, answers) of conversations with the same prompt.

  Raises:
    Skip: they differ before the last turn, so their answers cannot be ranked.
  """
  parts = list(map(split_answer, conversations))
  if not parts:
    raise Skip('there is no answer')
  prompts, answers = zip(*parts, strict=True)
  if any(prompt != prompts[0] for prompt in prompts):
    raise Skip('the answers belong to different prompts')
  return prompts[0], list(answers)
