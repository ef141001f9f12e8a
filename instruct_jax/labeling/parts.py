"""What the formats of rankings share: tasks, answers, and parts of JSON.

Whatever is wrong with a record is a `BadError`; `each` gathers them.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

from instruct_jax.data import records

# What a ranking may be: `decided` is a researcher's, `unfinished` is a draft.
STATES = ('submitted', 'decided', 'unfinished', 'skipped')
_LATEST = 253402300800.0  # The year 10000, which has no date.
OURS = 'instruct_jax'


class BadError(ValueError):
  """What is wrong with one record."""


@dataclasses.dataclass(frozen=True)
class Answer:
  """What one person said of one task.

  Attributes:
    labeler: a pseudonym.
    state: one of `STATES`.
    ranks: of the completions, 1 for the best; None where there is none yet. ()
      if the task was skipped.
    time: seconds since 1970, if known.
    seconds: worked.
    note: of a decision, or the reason of a skip.
    account: id, for the file.
  """

  labeler: str
  state: str
  ranks: tuple[int | None, ...] = ()
  time: float | None = None
  seconds: float = 0.0
  note: str = ''
  account: int = 0


@dataclasses.dataclass(frozen=True)
class Item:
  """A task: the fields of a line of JSONL, and the answers to it."""

  values: dict[str, Any]
  answers: tuple[Answer, ...] = ()
  batch: Mapping[str, str] = dataclasses.field(default_factory=dict)
  number: int = 0  # Of the record in its file; or, to write it, of the task.
  suggests: bool = False  # To write it: whether labelers see its suggestion.


def _refuse(name):
  raise ValueError(f'{name} is no JSON')


loads = functools.partial(json.loads, parse_constant=_refuse)


def each(found, source, function):
  """(number, function of the record) of each (number, record); raises one error
  for all bad ones."""
  done, bad = [], []
  for number, record in found:
    try:
      done.append((number, function(record)))
    except BadError as error:
      bad.append((number, str(error)))
  records.raise_problems(source, bad, 'record')
  return done


def an_object(value, what):
  """A JSON object, {} for null; raises `BadError` if it is another type."""
  if value is None:
    return {}
  if not isinstance(value, dict):
    raise BadError(f'{what} must be an object')
  return value


def objects(value, what):
  """A list of JSON objects, [] for null; raises `BadError` for another type."""
  if value is None:
    return []
  if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
    raise BadError(f'{what} must be a list of objects')
  return value


def seconds(text):
  """Seconds since 1970 of a time in ISO 8601, UTC unless it says otherwise."""
  if text is None:
    return None
  try:
    moment = datetime.datetime.fromisoformat(text)
  except (TypeError, ValueError) as error:
    raise BadError(f'{text!r:.40} is no time in ISO 8601') from error
  if moment.tzinfo is None:
    moment = moment.replace(tzinfo=datetime.UTC)
  return number(moment.timestamp(), 'a time')


def number(value, what):
  """A number of seconds as a float, or None for null."""
  if value is None:
    return None
  if type(value) not in (int, float) or not 0 <= value < _LATEST:
    raise BadError(f'{what} is {value!r:.40}; it must be seconds from 0')
  return float(value)


def prompt_fields(value, what):
  """The field `prompt` or `turns` of a task."""
  if isinstance(value, str):
    return {'prompt': value}
  if is_conversation(value):
    turns = [{key: turn[key] for key in ('role', 'content')} for turn in value]
    return {'turns': turns}
  raise BadError(f'{what} must be a text or a list of messages')


def is_conversation(value):
  """Whether it is a list of messages."""
  return isinstance(value, list) and all(
    isinstance(turn, dict) and {'role', 'content'} <= set(turn)
    for turn in value
  )


def dense(ranks):
  """The same order with ranks 1, 2, ...; None stays."""
  order = sorted({rank for rank in ranks if rank is not None})
  return tuple(None if r is None else order.index(r) + 1 for r in ranks)


def read_ours(value):
  """What we wrote beside a record: (values of the task, answers by person)."""
  if isinstance(value, str):
    try:
      value = loads(value)
    except (ValueError, RecursionError) as error:
      raise BadError(f'{OURS} is not JSON ({error})') from error
  value = an_object(value, OURS)
  known = an_object(value.get('answers'), f'answers of {OURS}')
  for person, said in known.items():
    known[person] = an_object(said, f'an answer of {OURS}')
  return an_object(value.get('task'), f'task of {OURS}'), known


def make_answer(state, ranks, known, **found):
  """An answer of a file, with what we know beside it."""
  if state == 'submitted' and None in ranks:
    state = 'unfinished'
  if state == 'submitted' and known.get('state') == 'decided':
    state = 'decided'
  texts = ('labeler', 'note')
  found |= {name: known[name] for name in texts if name in known}
  for name in texts:
    if not isinstance(found.get(name, ''), str):
      raise BadError(f'{name} of {OURS} must be a text')
  for name in ('time', 'seconds'):
    value = number(known.get(name), f'{name} of {OURS}')
    found |= {} if value is None else {name: value}
  found = {key: value for key, value in found.items() if value is not None}
  ranks = () if state == 'skipped' else dense(ranks)
  return Answer(state=state, ranks=ranks, **found)


def to_json(value):
  """As a file that people can read."""
  return (json.dumps(value, ensure_ascii=False, indent=1) + '\n').encode()


def people(item, name, other):
  """(key of a person, answer); who also decided the task has another key for
  the decision."""
  found = {}
  for answer in item.answers:
    key = name(answer)
    found[other(answer) if key in found else key] = answer
  return list(found.items())


def shown(item):
  """The suggestion that the other program is to show, or None."""
  return item.values.get('suggestion') if item.suggests else None


def beside(item, people: Iterable[tuple[str, Answer]]) -> dict[str, Any]:
  """What the format has no room for."""
  task = {
    name: value
    for name, value in item.values.items()
    if name not in ('prompt', 'completions')
  }
  names = ('labeler', 'state', 'time', 'seconds', 'note')
  answers = {
    person: {
      name: value
      for name in names
      if (value := getattr(answer, name)) not in (None, '')
    }
    for person, answer in people
  }
  return {'task': task, 'batch': dict(item.batch), 'answers': answers}
