"""Rankings in the JSON of Argilla and of Label Studio.

A file is a list of records, or has one a line. A record holds a prompt, its
completions and what several people and models said of them.

  Argilla       pages of the REST interface, version 1, and rows of a data set
                on the Hub, all with ranks and ties; version 2's
                `records.to_json`, which has none (`_check_orders`)
  Label Studio  the JSON and JSON_MIN exports: `Ranker`, whose buckets may be
                ranks (`rank1`, `rank2`, ...), or `Pairwise`

Neither has room for all that the site knows. We write the rest under the key
`instruct_jax` of a record's metadata (Argilla, as text) or meta (Label Studio),
where these programs keep it. So is a suggestion that labelers do not see; they
would see it in the place that these programs have for one. People are in both
as numbers.
"""

import collections
import dataclasses
import datetime
import functools
import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from instruct_jax.data import records

FORMATS = {
  'jsonl': 'JSON lines',
  'argilla': 'Argilla',
  'label_studio': 'Label Studio',
}
# What a ranking may be: `decided` is a researcher's, `unfinished` is a draft.
STATES = ('submitted', 'decided', 'unfinished', 'skipped')
_LATEST = 253402300800.0  # The year 10000, which has no date.
_OURS = 'instruct_jax'
_QUESTION = 'ranking'
_BUCKET = re.compile(r'(?:rank|place)?[ _-]?(\d{1,3})', re.IGNORECASE)
# Of Argilla's responses. Without a status, they were submitted.
_STATUSES = {
  None: 'submitted',
  'submitted': 'submitted',
  'draft': 'unfinished',
  'discarded': 'skipped',
}
# What Argilla takes as the agent of a suggestion.
_AGENT = re.compile(r'[\w:./\s-]{1,200}', re.ASCII)
# Columns of a row on the Hub that are no fields, and those beside a question.
_NO_FIELDS = (
  'id',
  'external_id',
  'status',
  'metadata',
  '_server_id',
  'vectors',
)
_BESIDE = re.compile(r'\.(responses|suggestion)\.\w+$')


class _BadError(ValueError):
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


# --- Reading ----------------------------------------------------------------


def _refuse(name):
  raise ValueError(f'{name} is no JSON')


loads = functools.partial(json.loads, parse_constant=_refuse)


def check_format(content: bytes, source: str, name: str) -> None:
  """Raises RecordError if a file's first record is of another format."""
  text = content.decode('utf-8-sig', 'replace').lstrip()
  try:
    first, _ = json.JSONDecoder().raw_decode(text, text.index('{', 0, 1000))
  except (ValueError, RecursionError):
    return  # The reader says what is wrong.
  looks = _look(first)
  if looks and name not in looks:
    title = {'jsonl': 'JSON lines'}.get(looks[0], f"{FORMATS[looks[0]]}'s")
    raise records.RecordError(
      f'{source}: this looks like {title}; give --format={looks[0]}'
    )


def _look(record):
  """The formats that a record looks like; none if nothing tells."""
  keys = set(record)
  is_argilla = (
    isinstance(record.get('fields'), dict)
    or any(key.endswith(('.responses', '-suggestion')) for key in keys)
    or any(
      isinstance(one, dict)
      and not {'fields', 'record', 'user_id'}.isdisjoint(one)
      for value in record.values()
      if isinstance(value, list)
      for one in value[:1]
    )
  )
  is_studio = (
    isinstance(record.get('data'), dict)
    or {'annotator', 'annotation_id'} <= keys
  )
  is_ours = isinstance(record.get('completions'), list)
  found = {'argilla': is_argilla, 'label_studio': is_studio, 'jsonl': is_ours}
  return [name for name, looks in found.items() if looks]


def read(
  content: bytes, source: str, name: str
) -> tuple[list[Item], dict[str, int]]:
  """Reads a file of a format other than JSONL.

  Args:
    content: the file.
    source: its name, for messages.
    name: of `FORMATS`.

  Returns:
    The tasks in file order; and what is to be told about them, with counts.

  Raises:
    RecordError: the file is not in the format, in one line; or bad records, up
      to ten, each with its number from 1.
  """
  told = collections.Counter()
  found = list(enumerate(_records(content, source, name), start=1))
  if name == 'argilla':
    items = _argilla(found, source, told)
  else:
    items = _each(_joined(found, told), source, lambda x: _studio(x, told))
  return [dataclasses.replace(item, number=n) for n, item in items], dict(told)


def _records(content, source, name):
  try:
    text = content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise records.RecordError(
      f'{source}: byte {error.start} is not UTF-8; convert the file'
    ) from error
  try:
    found = loads(text)
  except (ValueError, RecursionError) as error:
    if not text.lstrip().startswith('{'):
      raise records.RecordError(
        f'{source}: not JSON ({error}); export it again as JSON'
      ) from error
    found = _lines(text, source)
  if isinstance(found, dict):
    found = [found]
  if name == 'argilla' and isinstance(found, list):
    found = [record for page in found for record in _unwrapped(page)]
  if not isinstance(found, list) or not found:
    raise records.RecordError(f'{source}: holds no records of {FORMATS[name]}')
  records.raise_problems(
    source,
    [
      (number, 'expected a JSON object')
      for number, record in enumerate(found, 1)
      if not isinstance(record, dict)
    ],
    'record',
  )
  return found


def _unwrapped(page):
  """The records of a page of Argilla's REST interface, or the record itself."""
  if not isinstance(page, dict) or not isinstance(page.get('items'), list):
    return [page]
  return [
    one['record'] if isinstance(one, dict) and 'record' in one else one
    for one in page['items']
  ]


def _lines(text, source):
  found, bad = [], []
  for number, line in enumerate(text.split('\n'), 1):
    try:
      found += [loads(line)] if line.strip() else []
    except (ValueError, RecursionError) as error:
      bad.append((number, f'not JSON ({error})'))
  records.raise_problems(source, bad)
  return found


def _each(found, source, function):
  """(number, function of the record) of each (number, record); raises one error
  for all bad ones."""
  done, bad = [], []
  for number, record in found:
    try:
      done.append((number, function(record)))
    except _BadError as error:
      bad.append((number, str(error)))
  records.raise_problems(source, bad, 'record')
  return done


def _object(value, what):
  """A JSON object, {} for null; raises `_BadError` if it is another type."""
  if value is None:
    return {}
  if not isinstance(value, dict):
    raise _BadError(f'{what} must be an object')
  return value


def _list(value, what):
  if value is None:
    return []
  if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
    raise _BadError(f'{what} must be a list of objects')
  return value


def _seconds(text):
  """Seconds since 1970 of a time in ISO 8601, UTC unless it says otherwise."""
  if text is None:
    return None
  try:
    moment = datetime.datetime.fromisoformat(text)
  except (TypeError, ValueError) as error:
    raise _BadError(f'{text!r:.40} is no time in ISO 8601') from error
  if moment.tzinfo is None:
    moment = moment.replace(tzinfo=datetime.UTC)
  return _number(moment.timestamp(), 'a time')


def _number(value, what):
  """A number of seconds as a float, or None for null."""
  if value is None:
    return None
  if type(value) not in (int, float) or not 0 <= value < _LATEST:
    raise _BadError(f'{what} is {value!r:.40}; it must be seconds from 0')
  return float(value)


def _prompt(value, what):
  """The field `prompt` or `turns` of a task."""
  if isinstance(value, str):
    return {'prompt': value}
  if _is_conversation(value):
    turns = [{key: turn[key] for key in ('role', 'content')} for turn in value]
    return {'turns': turns}
  raise _BadError(f'{what} must be a text or a list of messages')


def _is_conversation(value):
  return isinstance(value, list) and all(
    isinstance(turn, dict) and {'role', 'content'} <= set(turn)
    for turn in value
  )


def _dense(ranks):
  """The same order with ranks 1, 2, ...; None stays."""
  order = sorted({rank for rank in ranks if rank is not None})
  return tuple(None if r is None else order.index(r) + 1 for r in ranks)


def _ours(value):
  """What we wrote beside a record: (values of the task, answers by person)."""
  if isinstance(value, str):
    try:
      value = loads(value)
    except (ValueError, RecursionError) as error:
      raise _BadError(f'{_OURS} is not JSON ({error})') from error
  value = _object(value, _OURS)
  known = _object(value.get('answers'), f'answers of {_OURS}')
  for person, said in known.items():
    known[person] = _object(said, f'an answer of {_OURS}')
  return _object(value.get('task'), f'task of {_OURS}'), known


def _answer(state, ranks, known, **found):
  """An answer of a file, with what we know beside it."""
  if state == 'submitted' and None in ranks:
    state = 'unfinished'
  if state == 'submitted' and known.get('state') == 'decided':
    state = 'decided'
  texts = ('labeler', 'note')
  found |= {name: known[name] for name in texts if name in known}
  for name in texts:
    if not isinstance(found.get(name, ''), str):
      raise _BadError(f'{name} of {_OURS} must be a text')
  for name in ('time', 'seconds'):
    value = _number(known.get(name), f'{name} of {_OURS}')
    found |= {} if value is None else {name: value}
  found = {key: value for key, value in found.items() if value is not None}
  ranks = () if state == 'skipped' else _dense(ranks)
  return Answer(state=state, ranks=ranks, **found)


# --- Argilla ----------------------------------------------------------------


@dataclasses.dataclass
class _Response:
  """An answer to one question, by a person or a model.

  Without a question, the person has discarded the record. The question of a
  suggestion may be `_UNNAMED`.
  """

  person: str | None
  status: Any  # A text, or None.
  question: str | None
  value: Any
  time: Any = None


_UNNAMED = ''  # The REST interface names the question of a suggestion by an id.


def _argilla(found, source, told):
  found = _each(found, source, _normal)
  normal = [record for _, record in found]
  # A record may lack some of them, but its answers still name all.
  fields = {_key(name) for record in normal for name in record['fields']}
  question = _ranking_question(normal, fields, source)
  options = {
    _key(name)
    for record in normal
    for response in (*record['responses'], *record['suggestions'])
    if _is_asked(response, question, fields)
    for name, _ in _entries(response.value) or ()
  }
  number = sum(_is_option(name, options) for name in fields)
  _check_orders(normal, question, number, source)
  return _each(
    found, source, lambda x: _argilla_item(x, question, options, fields, told)
  )


def _is_asked(response, question, fields):
  """Whether it is about the question that ranks the fields."""
  if response.question == _UNNAMED:
    return _ranks_fields(response.value, fields)
  return question is not None and response.question == question


def _ranks_fields(value, fields):
  entries = _entries(value) or ()
  return bool(entries) and {_key(name) for name, _ in entries} <= fields


def _is_bare(value):
  """Whether it is a list of names without ranks."""
  return isinstance(value, list) and not any(
    isinstance(one, dict) and 'rank' in one for one in value
  )


def _check_orders(normal, question, number, source):
  """Refuses rankings that have lost their ranks.

  Argilla 2's `records.to_json` and `to_datasets` drop the ranks. What people
  ranked on its pages is then a list of all options (`number`) in the order of
  the question, which says nothing. Lists that a program has logged are in order
  of rank: some differ.
  """
  orders, is_ours = set(), False
  for record in normal:
    for response in record['responses']:
      order = _entries(response.value) or ()
      if (
        None not in (question, response.question)
        and response.question == question
        and _is_bare(response.value)
        and len(order) == number
      ):
        orders.add(tuple(_key(name) for name, _ in order))
        is_ours |= _OURS in record['metadata']
  if is_ours or len(orders) == 1:
    raise records.RecordError(
      f'{source}: the answers to {question} are lists without ranks, in the '
      "order of the question: Argilla 2's `to_json` and `to_datasets` drop the "
      'ranks; take the records from its REST interface, '
      '/api/v1/datasets/ID/records?include=responses&include=suggestions'
    )


def _normal(record):
  """Any layout as id, fields, metadata, responses and suggestions."""
  if 'fields' not in record:
    return _normal_row(record)
  given = record.get('responses')
  if isinstance(given, list):
    responses = [r for one in _list(given, "'responses'") for r in _user(one)]
  else:
    responses = [
      _Response(_person(one), one.get('status'), question, one.get('value'))
      for question, several in _object(given, "'responses'").items()
      for one in _list(several, f'responses to {question!r}')
    ]
  given = record.get('suggestions')
  if not isinstance(given, list):
    given = [
      {**_object(one, f'suggestion of {question!r}'), 'question_name': question}
      for question, one in _object(given, "'suggestions'").items()
    ]
  suggestions = [
    _Response(
      _agent(one),
      None,
      str(one.get('question_name', _UNNAMED)),
      one.get('value'),
    )
    for one in _list(given, "'suggestions'")
  ]
  return {
    'id': record.get('external_id') or record.get('id'),
    'fields': _object(record['fields'], "'fields'"),
    'metadata': _object(record.get('metadata'), "'metadata'"),
    'responses': responses,
    'suggestions': suggestions,
  }


def _user(one):
  """The answers of one person, as version 1 and REST have them."""
  time = one.get('updated_at') or one.get('inserted_at')
  person, status = _person(one), one.get('status')
  values = _object(one.get('values'), "'values' of a response")
  if not values or status == 'discarded':  # Of the whole record.
    yield _Response(person, status, None, None, time)
    return
  for question, value in values.items():
    value = _object(value, f'the answer to {question!r}').get('value')
    yield _Response(person, status, question, value, time)


def _person(one):
  """The id of a user; None if the user was deleted."""
  found = one.get('user_id')
  if found is not None and (not found or not isinstance(found, str)):
    raise _BadError("the 'user_id' of a response must be a text")
  return found


def _agent(one):
  found = one.get('agent') or ''
  if not isinstance(found, str):
    raise _BadError("the 'agent' of a suggestion must be a name")
  return found


def _normal_row(row):
  """A row of a data set on the Hub, whose columns are fields and questions."""
  metadata = row.get('metadata')
  if isinstance(metadata, str):
    try:
      metadata = loads(metadata)
    except (ValueError, RecursionError) as error:
      raise _BadError(f"'metadata' is not JSON ({error})") from error
  found = {
    'id': row.get('external_id') or row.get('id'),
    'fields': {},
    'metadata': dict(_object(metadata, "'metadata'")),
    'responses': [],
    'suggestions': [],
  }
  for name, value in row.items():
    question, dot, kind = name.rpartition('.')
    if value in (None, [], {}) or name in _NO_FIELDS:
      continue
    if dot and kind in ('responses', 'suggestion'):
      # Version 2: columns QUESTION.responses, QUESTION.responses.users, ...
      if kind == 'suggestion':
        agent = _agent({'agent': row.get(f'{name}.agent')})
        found['suggestions'].append(_Response(agent, None, question, value))
        continue
      people = row.get(f'{name}.users')
      statuses = row.get(f'{name}.status') or [None] * len(value)
      if not all(
        isinstance(column, list) and len(column) == len(value)
        for column in (value, people, statuses)
      ):
        raise _BadError(f'{name!r} and the columns beside it differ in length')
      found['responses'] += [
        _Response(_person({'user_id': person}), status, question, one)
        for person, status, one in zip(people, statuses, value, strict=True)
      ]
    elif name.endswith('-suggestion'):
      question = name.removesuffix('-suggestion')
      about = _object(row.get(f'{name}-metadata'), f'{name}-metadata')
      agent = _agent(about)
      found['suggestions'].append(_Response(agent, None, question, value))
    elif isinstance(value := _rows(value), list) and any(
      isinstance(one, dict) and 'user_id' in one for one in value
    ):
      found['responses'] += [
        _Response(_person(one), one.get('status'), name, one.get('value'))
        for one in _list(value, f'{name!r}')
      ]
    elif name == _OURS:
      found['metadata'][name] = value
    elif isinstance(value, str) and not dot or _is_conversation(value):
      found['fields'][name] = value
    elif not (name.endswith('-suggestion-metadata') or _BESIDE.search(name)):
      found['metadata'][name] = value
  return found


def _rows(value):
  """Lists of user_id, value and status, as old data sets have them, as rows."""
  if not isinstance(value, dict) or not isinstance(value.get('user_id'), list):
    return value
  columns = [value['user_id'], value.get('value'), value.get('status')]
  if not all(
    isinstance(column, list) and len(column) == len(columns[0])
    for column in columns
  ):
    raise _BadError('user_id, value and status differ in length')
  names = ('user_id', 'value', 'status')
  return [
    dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)
  ]


def _entries(value):
  """(name, rank or None) of a ranking's options, or None if it is no ranking.

  Rows on the Hub have two lists.
  """
  if isinstance(value, dict):
    names, ranks = value.get('value'), value.get('rank')
    if not isinstance(names, list) or not isinstance(ranks, list):
      return None
    if len(names) != len(ranks):
      return None
    value = [
      {'value': name, 'rank': rank}
      for name, rank in zip(names, ranks, strict=True)
    ]
  if not isinstance(value, list):
    return None
  found = [
    (one.get('value'), one.get('rank'))
    if isinstance(one, dict)
    else (one, None)
    for one in value
  ]
  return found if all(isinstance(name, str) for name, _ in found) else None


def _key(name):
  """What is equal in the names of an option and of its field."""
  return re.sub('[^a-z0-9]', '', name.lower())


def _ranking_question(normal, fields, source):
  """The question whose answers order fields; None if nothing was answered."""
  asked, ranking = set(), set()
  for record in normal:
    for response in (*record['responses'], *record['suggestions']):
      if response.question in (None, _UNNAMED):
        continue
      if response.value in (None, [], {}):
        continue
      asked.add(response.question)
      if _ranks_fields(response.value, fields):
        ranking.add(response.question)
  if len(ranking) == 1:
    return ranking.pop()
  if ranking:
    raise records.RecordError(
      f'{source}: the questions {", ".join(sorted(ranking))} all rank fields; '
      'keep one of them'
    )
  if asked:
    raise records.RecordError(
      f'{source}: none of the questions {", ".join(sorted(asked))} ranks the '
      f'fields ({", ".join(normal[0]["fields"])}); the options of a ranking '
      'must have the names of fields'
    )
  return None


def _is_option(key, options):
  """Whether a field is among the options, or is named like one that ends in a
  number, for nobody may have ranked it; without options, if it so ends."""
  stems = {re.sub(r'\d+$', '', option) for option in options}
  numbered = re.fullmatch(r'(.*?)\d+', key)
  return key in options or bool(
    numbered and (not options or numbered[1] in stems - options)
  )


def _argilla_item(record, question, options, fields, told):
  texts = {k: v for k, v in record['fields'].items() if v is not None}
  names = [name for name in texts if _is_option(_key(name), options)]
  others = [name for name in texts if name not in names]
  if len(others) != 1:
    raise _BadError(
      f'the fields {", ".join(others) or "(none)"} are not completions; just '
      'one must be left, the prompt: join them, or remove what is not shown'
    )
  completions = [texts[name] for name in names]
  values = _prompt(texts[others[0]], f'the field {others[0]!r}')
  metadata = dict(record['metadata'])
  ours, known = _ours(metadata.pop(_OURS, None))
  values['completions'] = completions
  if ours:
    metadata |= _object(ours.pop('metadata', None), 'metadata')
  else:
    values['models'] = names
    if record['id']:
      values['id'] = str(record['id'])
  if metadata:
    values['metadata'] = metadata
  for response in record['suggestions']:
    if not _is_asked(response, question, fields):
      asked = response.question or 'other questions'
      told[f'suggestions to {asked} left out'] += 1
      continue
    entries = _entries(response.value) or ()
    is_order = all(rank is None for _, rank in entries)
    ranks = _argilla_ranks(response.value, names, fields, is_order)
    if None in ranks:
      raise _BadError('the suggestion does not rank all completions')
    suggested = {'ranks': list(_dense(ranks)), 'source': response.person}
    values['suggestion'] = suggested
  answers = []
  for response in record['responses']:
    if response.question not in (question, None) and question is not None:
      told[f'answers to {response.question} left out'] += 1
      continue
    if response.person is None:
      told['answers of deleted users left out'] += 1
      continue
    status = response.status
    if not isinstance(status, str | None) or status not in _STATUSES:
      raise _BadError(f'no such status of a response: {status!r:.40}')
    state = _STATUSES[status]
    is_asked = None not in (question, response.question)
    if state != 'skipped' and not (is_asked and response.value):
      told['empty answers left out'] += 1
      continue
    if status is None:
      told['answers without a status, taken as submitted'] += 1
    is_order = _is_bare(response.value)
    if is_order and state != 'skipped':
      told['rankings without ranks, taken in their order'] += 1
    ranks = (
      ()
      if state == 'skipped'
      else _argilla_ranks(response.value, names, fields, is_order)
    )
    answers.append(
      _answer(
        state,
        ranks,
        known.get(response.person, {}),
        labeler=response.person,
        time=_seconds(response.time),
      )
    )
  return Item({**values, **ours}, tuple(answers))


def _argilla_ranks(value, names, fields, is_order):
  """Ranks of the fields that a record has; None where there is none.

  Args:
    value: of a response.
    names: of the fields that the record has.
    fields: keys of all that records have.
    is_order: the names have no ranks, but are in order of rank.
  """
  entries = _entries(value)
  if entries is None:
    raise _BadError(f'{value!r:.60} is no ranking')
  if is_order:
    entries = [(name, rank) for rank, (name, _) in enumerate(entries, 1)]
  places = {_key(name): place for place, name in enumerate(names)}
  ranks: dict[int, int | None] = {}
  for name, rank in entries:
    place = places.get(_key(name))
    if place is None and _key(name) in fields:
      continue  # The record lacks this option.
    if place is None or place in ranks:
      problem = ', but is no field' if place is None else ' twice'
      raise _BadError(f'{name!r:.40} is ranked{problem}')
    if rank is not None and (type(rank) is not int or rank < 1):
      raise _BadError(f'the rank of {name!r:.40} is {rank!r:.40}')
    ranks[place] = rank
  return tuple(ranks.get(place) for place in range(len(names)))


# --- Label Studio -----------------------------------------------------------


# Of a record of JSON_MIN, beside the data and the answers.
_MIN = (
  'id', 'annotator', 'annotation_id', 'created_at', 'updated_at', 'lead_time',
  'agreement',
)  # fmt: skip


def _joined(found, told):
  """Records of JSON_MIN, which are flat and hold an annotation each, as tasks.

  Others stay as they are.
  """
  tasks, several = [], collections.defaultdict(list)
  for number, record in found:
    if 'data' in record or not {'annotator', 'annotation_id'} <= set(record):
      tasks.append((number, record))
      continue
    own = several[json.dumps(record.get('id', f'record {number}'))]
    if not own:
      tasks.append((number, own))
    own.append(record)
  return [
    (number, _full(task, told) if isinstance(task, list) else task)
    for number, task in tasks
  ]


def _full(flat, told):
  """The task whose annotations are records of JSON_MIN."""
  data, annotations = {}, []
  results = [{} for _ in flat]
  for key in dict.fromkeys(key for record in flat for key in record):
    if key in _MIN:
      continue
    values = [record.get(key) for record in flat]
    if any(map(_is_min_result, values)):
      for own, value in zip(results, values, strict=True):
        own[key] = value if _is_min_result(value) else []
    elif all(value == values[0] for value in values):
      data[key] = values[0]
    else:  # Answers to another question.
      told[f'answers to {key} left out'] += len(values)
  for record, own in zip(flat, results, strict=True):
    if record['annotation_id'] is None:
      continue
    made = {name: record.get(name) for name in ('created_at', 'lead_time')}
    made['completed_by'] = record['annotator']
    made['result'] = [
      {
        'type': 'ranker' if 'ranker' in value else 'pairwise',
        'from_name': key,
        'value': value,
      }
      for key, several in own.items()
      for value in several
    ]
    annotations.append(made)
  task = {'data': data, 'annotations': annotations}
  return {'id': flat[0]['id'], **task} if 'id' in flat[0] else task


def _is_min_result(value):
  return (
    isinstance(value, list)
    and bool(value)
    and all(
      isinstance(one, dict) and not {'ranker', 'selected'}.isdisjoint(one)
      for one in value
    )
  )


def _studio(record, told):
  data = record.get('data', record)
  if not isinstance(data, dict) or (data is record and 'annotations' in record):
    raise _BadError("'data' is missing; it holds the prompt and the items")
  ours, known = _ours(_object(record.get('meta'), "'meta'").get(_OURS))
  keys, names, completions = _studio_outputs(data)
  rest = {k: v for k, v in data.items() if k not in keys}
  texts = [k for k, v in rest.items() if isinstance(v, str)]
  if 'prompt' not in rest and len(texts) != 1:
    raise _BadError(
      f"'data' has the texts {', '.join(texts) or '(none)'}; one must be the "
      "prompt: name it 'prompt'"
    )
  key = 'prompt' if 'prompt' in rest else texts[0]
  values = _prompt(rest.pop(key), f'{key!r}')
  values['completions'] = completions
  if ours:
    rest |= _object(ours.pop('metadata', None), 'metadata')
  else:
    values['models'] = names
    if 'id' in record and data is not record:
      values['id'] = str(record['id'])
  if rest:
    values['metadata'] = rest
  for made in _described(record, 'predictions', told):
    ranks = _studio_ranks(made, names, told)
    if 'suggestion' in values or ranks is None:
      told['predictions left out'] += 1
    elif None in ranks:
      raise _BadError('a prediction does not rank all items')
    else:
      source = str(made.get('model_version') or '')
      suggested = {'ranks': list(_dense(ranks)), 'source': source}
      values['suggestion'] = suggested
  answers = []
  for made in _list(record.get('annotations'), "'annotations'"):
    said = _said(made, 'completed_by', known)
    person = made.get('completed_by')
    # An export may describe the person, with address and name.
    person = person.get('id') if isinstance(person, dict) else person
    if said is None and 'completed_by' in made and person is None:
      told['annotations of deleted users left out'] += 1
      continue
    if said is None and type(person) is not int:
      raise _BadError("an annotation has no number as 'completed_by'")
    answers.append(_studio_answer(made, person, names, said, told))
  for made in _described(record, 'drafts', told):
    said = _said(made, 'user', known)
    person = made.get('user')
    if said is None and type(person) is not int:  # Usually an e-mail address.
      told['drafts of people without a number left out'] += 1
      continue
    draft = _studio_answer(made, person, names, said, told)
    answers.append(dataclasses.replace(draft, state='unfinished'))
  decided = [answer for answer in answers if answer.state == 'decided']
  if len(decided) > 1:  # Imported annotations have the mark by default.
    told['marks of several ground truths in a task left out'] += len(decided)
    answers = [
      dataclasses.replace(answer, state='submitted')
      if answer.state == 'decided'
      else answer
      for answer in answers
    ]
  return Item({**values, **ours}, tuple(answers))


def _described(record, name, told):
  """Predictions or drafts; an export may give only their ids."""
  found = record.get(name)
  if isinstance(found, list):
    whole = [one for one in found if type(one) is not int]
    if len(whole) < len(found):
      told[f'{name} left out'] += len(found) - len(whole)
    found = whole
  return _list(found, f'{name!r}')


def _said(made, person, known):
  """What we know beside an annotation or draft that we wrote, or None.

  Its `id` is the number of our account. Label Studio gives it another, with
  whoever imports it as the person, and keeps ours as `import_id`.
  """
  number = made.get('import_id') if person in made else made.get('id')
  return known.get(str(number))


def _studio_outputs(data):
  """(keys of the data, ids, texts) of what is ranked."""
  lists = [
    key
    for key, value in data.items()
    if isinstance(value, list)
    and value
    and all(isinstance(item, dict) and 'id' in item for item in value)
  ]
  if len(lists) == 1:
    items = data[lists[0]]
    texts = [item.get('body', item.get('title')) for item in items]
    if not all(isinstance(text, str) for text in texts):
      raise _BadError(f'an item of {lists[0]!r} has no text as its body')
    names = [str(item['id']) for item in items]
    if len(set(names)) < len(names):
      raise _BadError(f'two items of {lists[0]!r} have the same id')
    return lists, names, texts
  strings = {key for key, value in data.items() if isinstance(value, str)}
  pairs = [
    (key, key[:-1] + other)
    for key in data
    for first, other in ('12', 'ab', 'AB')
    if key in strings and key.endswith(first) and key[:-1] + other in strings
  ]
  if lists or len(pairs) != 1:
    raise _BadError(
      "'data' must have one list of items with id and body, or two texts such "
      'as answer1 and answer2'
    )
  return pairs[0], list(pairs[0]), [data[key] for key in pairs[0]]


def _studio_answer(made, person, names, said, told):
  ranks = _studio_ranks(made, names, told)
  state = 'skipped' if made.get('was_cancelled') else 'submitted'
  if ranks is None:
    ranks = (None,) * len(names)
  # The file itself says what is a decision.
  known = {**(said or {}), 'state': None}
  if made.get('ground_truth') and state == 'submitted':
    known['state'] = 'decided'
  return _answer(
    state,
    () if state == 'skipped' else ranks,
    known,
    labeler=f'label-studio-{person}',
    time=_seconds(made.get('created_at')),
    seconds=_number(made.get('lead_time'), "'lead_time'"),
  )


def _studio_ranks(made, names, told):
  """Ranks of the items by an annotation, or None if it has no ranking."""
  found = []
  for part in _list(made.get('result'), "'result'"):
    if part.get('type') in ('ranker', 'pairwise'):
      found.append(part)
    else:
      told[f'results of type {part.get("type")} left out'] += 1
  if not found:
    return None
  if len(found) > 1:
    raise _BadError('an annotation has several rankings')
  value = _object(found[0].get('value'), "'value'")
  if found[0]['type'] == 'pairwise':
    sides = {'left': (1, 2), 'right': (2, 1)}
    selected = str(value.get('selected'))
    if selected not in sides or len(names) != 2:
      raise _BadError(f"'selected' must be left or right: {value!r:.60}")
    return sides[selected]
  groups = _studio_groups(value.get('ranker'), found[0].get('from_name'))
  ranks: dict[str, int | None] = dict.fromkeys(names)
  for place, group in enumerate(groups, 1):
    for item in map(str, group):
      if item not in ranks or ranks[item] is not None:
        problem = 'is no item' if item not in ranks else 'is ranked twice'
        raise _BadError(f'{item!r:.40} {problem}')
      ranks[item] = place
  return tuple(ranks.values())


def _studio_groups(ranker, name):
  """Ids by rank, the best first. `_` holds what is not ranked.

  Without buckets, the only list is in order, under the name of the question.
  """
  if isinstance(ranker, list):
    return [[item] for item in ranker]
  ranker = _object(ranker, "'ranker'")
  buckets = {key: value for key, value in ranker.items() if key != '_'}
  if not all(isinstance(value, list) for value in buckets.values()):
    raise _BadError("'ranker' must have lists of ids")
  numbers = {key: _BUCKET.fullmatch(key) for key in buckets}
  if list(ranker) != [name] and all(numbers.values()):
    order = sorted(buckets, key=lambda key: int(numbers[key][1]))
    return [buckets[key] for key in order]
  if len(buckets) > 1:
    raise _BadError(
      f'the buckets {", ".join(buckets)} are no ranks; name them rank1, rank2, '
      '...'
    )
  return [[item] for items in buckets.values() for item in items]


# --- Writing ----------------------------------------------------------------


def written(name: str, items: Sequence[Item]) -> dict[str, bytes]:
  """The files that hold tasks with their answers, by file name.

  A data set of Argilla has one list of options, so there is a file for each
  number of completions. Label Studio's file comes with its interface.

  Args:
    name: 'argilla' or 'label_studio'.
    items: with distinct numbers.
  """
  if name == 'argilla':
    return _argilla_files(items)
  most = max((len(item.values['completions']) for item in items), default=0)
  tasks = [_studio_task(item, most) for item in items]
  buckets = ''.join(
    f'    <Bucket name="rank{rank}" title="Rank {rank}"/>\n'
    for rank in range(1, most + 1)
  )
  view = (
    '<View>\n  <Text name="prompt" value="$prompt"/>\n'
    '  <List name="outputs" value="$items" title="Outputs"/>\n'
    f'  <Ranker name="rank" toName="outputs">\n{buckets}  </Ranker>\n</View>\n'
  )
  return {'label_studio.json': _json(tasks), 'label_studio.xml': view.encode()}


def _json(value):
  return (json.dumps(value, ensure_ascii=False, indent=1) + '\n').encode()


def _people(item, name, other):
  """(key of a person, answer); who also decided the task has another key for
  the decision."""
  found = {}
  for answer in item.answers:
    key = name(answer)
    found[other(answer) if key in found else key] = answer
  return list(found.items())


def _shown(item):
  """The suggestion that the other program is to show, or None."""
  return item.values.get('suggestion') if item.suggests else None


def _beside(item, people: Iterable[tuple[str, Answer]]) -> dict[str, Any]:
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


def _argilla_files(items):
  by_number, ids = collections.defaultdict(list), set()
  for item in items:
    texts = item.values['completions']
    key = item.values.get('id') or f'task{item.number}'
    if key in ids:  # Argilla replaces the record with that id.
      key = f'{key}-task{item.number}'
    ids.add(key)
    people = _people(item, lambda a: a.labeler, lambda a: f'{a.labeler} twice')
    people = [(_argilla_user(name), answer) for name, answer in people]
    names = [f'response_{place}' for place in range(1, len(texts) + 1)]
    suggestion = _shown(item)
    by_number[len(texts)].append(
      {
        'id': key,
        'fields': {
          'prompt': item.values['prompt'],
          **dict(zip(names, texts, strict=True)),
        },
        'metadata': {
          _OURS: json.dumps(_beside(item, people), ensure_ascii=False)
        },
        'suggestions': {
          _QUESTION: {
            'value': _in_order(names, suggestion['ranks']),
            'score': None,
            'agent': _agent_name(suggestion['source']),
          }
        }
        if suggestion
        else {},
        'responses': {
          _QUESTION: [
            {
              'value': _with_ranks(names, answer.ranks),
              'user_id': person,
              'status': {'unfinished': 'draft', 'skipped': 'discarded'}.get(
                answer.state, 'submitted'
              ),
            }
            for person, answer in people
          ]
        },
        'vectors': {},
        '_server_id': None,
      }
    )
  return {
    f'argilla_{number}.json': _json(found)
    for number, found in sorted(by_number.items())
  }


def _argilla_user(name):
  """A user's id, which has to be a UUID; it is the name if that is one."""
  try:
    return str(uuid.UUID(name))
  except ValueError:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f'instruct_jax {name}'))


def _agent_name(source):
  """The source of a suggestion, if Argilla takes it as a name."""
  named = _AGENT.fullmatch(source) and re.search('[a-zA-Z0-9]', source)
  return source if named else None


def _in_order(names, ranks):
  places = sorted(range(len(names)), key=lambda place: ranks[place])
  return [names[place] for place in places]


def _with_ranks(names, ranks):
  """As Argilla stores a ranking; () is none at all."""
  return [
    {'value': name, 'rank': rank}
    for name, rank in zip(names, ranks, strict=False)
  ]


def _studio_task(item: Item, num_buckets: int) -> Mapping[str, Any]:
  texts = item.values['completions']
  names = [f'output{place}' for place in range(1, len(texts) + 1)]
  people = _people(item, lambda a: str(a.account), lambda a: str(-a.account))

  def result(ranks, number):
    buckets = {f'rank{rank}': [] for rank in range(1, num_buckets + 1)}
    buckets['_'] = []
    for name, rank in zip(names, ranks, strict=True):
      buckets['_' if rank is None else f'rank{rank}'].append(name)
    return [
      {
        'id': f'{item.number}-{number}',
        'from_name': 'rank',
        'to_name': 'outputs',
        'type': 'ranker',
        'value': {'ranker': buckets},
      }
    ]

  def made(person, answer):
    found = {
      'id': int(person),
      'result': result(answer.ranks, answer.account) if answer.ranks else [],
      'lead_time': answer.seconds,
    }
    if answer.time is not None:
      moment = datetime.datetime.fromtimestamp(answer.time, datetime.UTC)
      found['created_at'] = moment.isoformat()
    return found

  suggestion = _shown(item)
  return {
    'id': item.number,
    'data': {
      'prompt': item.values['prompt'],
      'items': [
        {'id': name, 'title': name.replace('output', 'Output '), 'body': text}
        for name, text in zip(names, texts, strict=True)
      ],
    },
    'annotations': [
      {
        'was_cancelled': answer.state == 'skipped',
        'ground_truth': answer.state == 'decided',
        **made(person, answer),
      }
      for person, answer in people
      if answer.state != 'unfinished'
    ],
    'drafts': [
      made(person, answer)
      for person, answer in people
      if answer.state == 'unfinished'
    ],
    'predictions': [
      {
        'model_version': suggestion['source'],
        'result': result(_dense(suggestion['ranks']), 'suggestion'),
      }
    ]
    if suggestion
    else [],
    'meta': {_OURS: _beside(item, people)},
  }
