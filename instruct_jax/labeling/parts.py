"""What the formats of rankings share: tasks, answers, and JSON helpers.

A problem with a record raises `BadError`; `each` collects these errors.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

from instruct_jax.data import records

# States of a ranking; `decided` is by a researcher, `unfinished` is a draft.
STATES = ('submitted', 'decided', 'unfinished', 'skipped')
_LATEST = 253402300800.0  # Year 10000, beyond datetime's range.
OURS = 'instruct_jax'


class BadError(ValueError):
  """What is wrong with one record."""


@dataclasses.dataclass(frozen=True)
class Answer:
  """One person's answer to one task.

  Attributes:
    labeler: a pseudonym.
    state: one of `STATES`.
    ranks: of the completions, 1 for the best; None for one without a rank yet.
      () if the task was skipped.
    time: seconds since 1970, if known.
    seconds: working time.
    note: the note on a decision, or the reason for a skip.
    account: id of the account, for the file.
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
  """A task: the fields of a JSONL line, and the answers to it."""

  values: dict[str, Any]
  answers: tuple[Answer, ...] = ()
  batch: Mapping[str, str] = dataclasses.field(default_factory=dict)
  number: int = 0  # The record's, if read; the task's id, if written.
  suggests: bool = False  # If written: whether labelers see its suggestion.


def _refuse(name):
  raise ValueError(f'{name} is not valid JSON')


loads = functools.partial(
  json.loads,
  parse_constant=_refuse,
  object_pairs_hook=records.distinct_keys,
)


def each(found, source, function):
  """Maps each (number, record) to (number, function(record)).

  Raises one error that lists all bad records.
  """
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
  """Seconds since 1970 of an ISO 8601 time, UTC unless it says otherwise."""
  if text is None:
    return None
  try:
    moment = datetime.datetime.fromisoformat(text)
  except (TypeError, ValueError) as error:
    raise BadError(f'{text!r:.40} is not an ISO 8601 time') from error
  if moment.tzinfo is None:
    moment = moment.replace(tzinfo=datetime.UTC)
  return number(moment.timestamp(), 'a time')


def number(value, what):
  """A number of seconds as a float, or None for null."""
  if value is None:
    return None
  if type(value) not in (int, float) or not 0 <= value < _LATEST:
    raise BadError(f'{what} is {value!r:.40}; it must be seconds, 0 or more')
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
  """Whether a value is a list of messages."""
  return isinstance(value, list) and all(
    isinstance(turn, dict) and {'role', 'content'} <= set(turn)
    for turn in value
  )


def dense(ranks):
  """The same order with the dense ranks 1, 2, ...; None stays None."""
  order = sorted({rank for rank in ranks if rank is not None})
  return tuple(None if r is None else order.index(r) + 1 for r in ranks)


def read_ours(value):
  """Reads what we stored in a record: (task values, answers by person)."""
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
  """Makes an answer from what a file gives and what we stored beside it."""
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
  """Encodes a value as indented JSON, for people to read."""
  return (json.dumps(value, ensure_ascii=False, indent=1) + '\n').encode()


def people(item, name, other):
  """Pairs of (key of the person, answer).

  If a person both ranked and decided the task, the decision has the key
  `other(answer)`.
  """
  found = {}
  for answer in item.answers:
    key = name(answer)
    found[other(answer) if key in found else key] = answer
  return list(found.items())


def shown(item):
  """The suggestion that the other program should show, or None."""
  return item.values.get('suggestion') if item.suggests else None


def beside(item, people: Iterable[tuple[str, Answer]]) -> dict[str, Any]:
  """What the other format has no field for."""
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
