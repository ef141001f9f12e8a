"""Rankings in the JSON of Argilla, both versions; see `formats`."""

import collections
import dataclasses
import json
import re
import uuid
from typing import Any

from instruct_jax.data import records
from instruct_jax.labeling import parts

_QUESTION = 'ranking'
# Status of Argilla's responses -> ours. Those without one were submitted.
_STATUSES = {
  None: 'submitted',
  'submitted': 'submitted',
  'draft': 'unfinished',
  'discarded': 'skipped',
}
# What Argilla accepts as the agent of a suggestion.
_AGENT = re.compile(r'[\w:./\s-]{1,200}', re.ASCII)
# Columns of a Hub row that are not fields, and those that belong to a question.
_NO_FIELDS = (
  'id',
  'external_id',
  'status',
  'metadata',
  '_server_id',
  'vectors',
)
_BESIDE = re.compile(r'\.(responses|suggestion)\.\w+$')


@dataclasses.dataclass
class _Response:
  """An answer to one question, by a person or a model.

  If `question` is None, the person has discarded the record. The question of a
  suggestion may be `_UNNAMED`.
  """

  person: str | None
  status: Any  # A text, or None.
  question: str | None
  value: Any
  time: Any = None


_UNNAMED = ''  # The REST interface names the question of a suggestion by an id.


def read(found, source, told):
  """(number, item) of numbered records; counts notes to the user in `told`."""
  found = parts.each(found, source, _normal)
  normal = [record for _, record in found]
  # A record may lack some fields, but its answers still name all of them.
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
  return parts.each(
    found, source, lambda x: _item(x, question, options, fields, told)
  )


def _is_asked(response, question, fields):
  """Whether a response answers the question that ranks the fields."""
  if response.question == _UNNAMED:
    return _ranks_fields(response.value, fields)
  return question is not None and response.question == question


def _ranks_fields(value, fields):
  entries = _entries(value) or ()
  return bool(entries) and {_key(name) for name, _ in entries} <= fields


def _is_bare(value):
  """Whether a value is a list of names without ranks."""
  return isinstance(value, list) and not any(
    isinstance(one, dict) and 'rank' in one for one in value
  )


def _check_orders(normal, question, number, source):
  """Refuses rankings that have lost their ranks.

  Argilla 2's `records.to_json` and `to_datasets` drop the ranks. A ranking that
  people made on its pages then lists all options (`number`) in the order of the
  question, whatever their ranks. Lists that a program has logged are in order
  of rank, so not all of them are the same.
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
        is_ours |= parts.OURS in record['metadata']
  if is_ours or len(orders) == 1:
    raise records.RecordError(
      f'{source}: the answers to {question} are lists without ranks, in the '
      "order of the question: Argilla 2's `to_json` and `to_datasets` drop the "
      'ranks; take the records from its REST interface, '
      '/api/v1/datasets/ID/records?include=responses&include=suggestions'
    )


def _normal(record):
  """Converts any layout to id, fields, metadata, responses, suggestions."""
  if 'fields' not in record:
    return _normal_row(record)
  given = record.get('responses')
  if isinstance(given, list):
    responses = [
      r for one in parts.objects(given, "'responses'") for r in _user(one)
    ]
  else:
    responses = [
      _Response(_person(one), one.get('status'), question, one.get('value'))
      for question, several in parts.an_object(given, "'responses'").items()
      for one in parts.objects(several, f'responses to {question!r}')
    ]
  given = record.get('suggestions')
  if not isinstance(given, list):
    given = [
      {
        **parts.an_object(one, f'suggestion of {question!r}'),
        'question_name': question,
      }
      for question, one in parts.an_object(given, "'suggestions'").items()
    ]
  suggestions = [
    _Response(
      _agent(one),
      None,
      str(one.get('question_name', _UNNAMED)),
      one.get('value'),
    )
    for one in parts.objects(given, "'suggestions'")
  ]
  return {
    'id': record.get('external_id') or record.get('id'),
    'fields': parts.an_object(record['fields'], "'fields'"),
    'metadata': parts.an_object(record.get('metadata'), "'metadata'"),
    'responses': responses,
    'suggestions': suggestions,
  }


def _user(one):
  """The answers of one person, in version 1's and the REST layout."""
  time = one.get('updated_at') or one.get('inserted_at')
  person, status = _person(one), one.get('status')
  values = parts.an_object(one.get('values'), "'values' of a response")
  if not values or status == 'discarded':  # Applies to the whole record.
    yield _Response(person, status, None, None, time)
    return
  for question, value in values.items():
    value = parts.an_object(value, f'the answer to {question!r}').get('value')
    yield _Response(person, status, question, value, time)


def _person(one):
  """The id of a user; None if the user was deleted."""
  found = one.get('user_id')
  if found is not None and (not found or not isinstance(found, str)):
    raise parts.BadError("the 'user_id' of a response must be a text")
  return found


def _agent(one):
  found = one.get('agent') or ''
  if not isinstance(found, str):
    raise parts.BadError("the 'agent' of a suggestion must be a name")
  return found


def _normal_row(row):
  """A row of a data set on the Hub, whose columns are fields and questions."""
  metadata = row.get('metadata')
  if isinstance(metadata, str):
    try:
      metadata = parts.loads(metadata)
    except (ValueError, RecursionError) as error:
      raise parts.BadError(f"'metadata' is not JSON ({error})") from error
  found = {
    'id': row.get('external_id') or row.get('id'),
    'fields': {},
    'metadata': dict(parts.an_object(metadata, "'metadata'")),
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
        raise parts.BadError(
          f'{name!r} and its .users or .status column differ in length'
        )
      found['responses'] += [
        _Response(_person({'user_id': person}), status, question, one)
        for person, status, one in zip(people, statuses, value, strict=True)
      ]
    elif name.endswith('-suggestion'):
      question = name.removesuffix('-suggestion')
      about = parts.an_object(row.get(f'{name}-metadata'), f'{name}-metadata')
      agent = _agent(about)
      found['suggestions'].append(_Response(agent, None, question, value))
    elif isinstance(value := _rows(value), list) and any(
      isinstance(one, dict) and 'user_id' in one for one in value
    ):
      found['responses'] += [
        _Response(_person(one), one.get('status'), name, one.get('value'))
        for one in parts.objects(value, f'{name!r}')
      ]
    elif name == parts.OURS:
      found['metadata'][name] = value
    elif isinstance(value, str) and not dot or parts.is_conversation(value):
      found['fields'][name] = value
    elif not (name.endswith('-suggestion-metadata') or _BESIDE.search(name)):
      found['metadata'][name] = value
  return found


def _rows(value):
  """Converts the lists user_id, value and status of old data sets to rows."""
  if not isinstance(value, dict) or not isinstance(value.get('user_id'), list):
    return value
  columns = [value['user_id'], value.get('value'), value.get('status')]
  if not all(
    isinstance(column, list) and len(column) == len(columns[0])
    for column in columns
  ):
    raise parts.BadError('user_id, value and status differ in length')
  names = ('user_id', 'value', 'status')
  return [
    dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)
  ]


def _entries(value):
  """(name, rank or None) of a ranking's options; None for any other value.

  Rows on the Hub hold a list of names and a list of ranks.
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
  """Normal form of a name; an option and its field have the same."""
  return re.sub('[^a-z0-9]', '', name.lower())


def _ranking_question(normal, fields, source):
  """The question whose answers rank fields; None if nothing was answered."""
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
  """Whether a field is one of the options of the ranking.

  A field that nobody has ranked counts if its name differs from an option's in
  the final number alone. Without options, all names that end in a number count.
  """
  stems = {re.sub(r'\d+$', '', option) for option in options}
  numbered = re.fullmatch(r'(.*?)\d+', key)
  return key in options or bool(
    numbered and (not options or numbered[1] in stems - options)
  )


def _item(record, question, options, fields, told):
  texts = {k: v for k, v in record['fields'].items() if v is not None}
  names = [name for name in texts if _is_option(_key(name), options)]
  others = [name for name in texts if name not in names]
  if len(others) != 1:
    raise parts.BadError(
      f'the fields {", ".join(others) or "(none)"} are not completions; just '
      'one must be left, the prompt: join them, or remove what is not shown'
    )
  completions = [texts[name] for name in names]
  values = parts.prompt_fields(texts[others[0]], f'the field {others[0]!r}')
  metadata = dict(record['metadata'])
  ours, known = parts.read_ours(metadata.pop(parts.OURS, None))
  values['completions'] = completions
  if ours:
    metadata |= parts.an_object(ours.pop('metadata', None), 'metadata')
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
    ranks = _ranks(response.value, names, fields, is_order)
    if None in ranks:
      raise parts.BadError('the suggestion does not rank all completions')
    suggested = {'ranks': list(parts.dense(ranks)), 'source': response.person}
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
      raise parts.BadError(f'unknown status of a response: {status!r:.40}')
    state = _STATUSES[status]
    is_asked = None not in (question, response.question)
    if state != 'skipped' and not (is_asked and response.value):
      told['empty answers left out'] += 1
      continue
    if status is None:
      told['answers without a status, taken as submitted'] += 1
    is_order = _is_bare(response.value)
    if is_order and state != 'skipped':
      told['rankings without ranks, read as best first'] += 1
    ranks = (
      ()
      if state == 'skipped'
      else _ranks(response.value, names, fields, is_order)
    )
    answers.append(
      parts.make_answer(
        state,
        ranks,
        known.get(response.person, {}),
        labeler=response.person,
        time=parts.seconds(response.time),
      )
    )
  return parts.Item({**values, **ours}, tuple(answers))


def _ranks(value, names, fields, is_order):
  """Ranks of a record's completions; None for one without a rank.

  Args:
    value: the value of a response.
    names: of the record's fields that hold completions.
    fields: the normal forms (`_key`) of all records' fields.
    is_order: whether the names have no ranks, but are in order of rank.
  """
  entries = _entries(value)
  if entries is None:
    raise parts.BadError(f'{value!r:.60} is not a ranking')
  if is_order:
    entries = [(name, rank) for rank, (name, _) in enumerate(entries, 1)]
  places = {_key(name): place for place, name in enumerate(names)}
  ranks: dict[int, int | None] = {}
  for name, rank in entries:
    place = places.get(_key(name))
    if place is None and _key(name) in fields:
      continue  # The record lacks this option.
    if place is None or place in ranks:
      problem = ', but is not a field' if place is None else ' twice'
      raise parts.BadError(f'{name!r:.40} is ranked{problem}')
    if rank is not None and (type(rank) is not int or rank < 1):
      raise parts.BadError(f'the rank of {name!r:.40} is {rank!r:.40}')
    ranks[place] = rank
  return tuple(ranks.get(place) for place in range(len(names)))


def files(items):
  """One file per number of completions, which is fixed in a data set."""
  by_number, ids = collections.defaultdict(list), set()
  for item in items:
    texts = item.values['completions']
    key = item.values.get('id') or f'task{item.number}'
    if key in ids:  # Argilla would replace the record with that id.
      key = f'{key}-task{item.number}'
    ids.add(key)
    people = parts.people(
      item, lambda a: a.labeler, lambda a: f'{a.labeler} twice'
    )
    people = [(_user_id(name), answer) for name, answer in people]
    names = [f'response_{place}' for place in range(1, len(texts) + 1)]
    suggestion = parts.shown(item)
    by_number[len(texts)].append(
      {
        'id': key,
        'fields': {
          'prompt': item.values['prompt'],
          **dict(zip(names, texts, strict=True)),
        },
        'metadata': {
          parts.OURS: json.dumps(parts.beside(item, people), ensure_ascii=False)
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
    f'argilla_{number}.json': parts.to_json(found)
    for number, found in sorted(by_number.items())
  }


def _user_id(name):
  """A user's id: the name if it is a UUID, else a UUID derived from it."""
  try:
    return str(uuid.UUID(name))
  except ValueError:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f'instruct_jax {name}'))


def _agent_name(source):
  """The source of a suggestion, or None if Argilla refuses such a name."""
  named = _AGENT.fullmatch(source) and re.search('[a-zA-Z0-9]', source)
  return source if named else None


def _in_order(names, ranks):
  places = sorted(range(len(names)), key=lambda place: ranks[place])
  return [names[place] for place in places]


def _with_ranks(names, ranks):
  """A ranking as Argilla stores it; empty if `ranks` is ()."""
  return [
    {'value': name, 'rank': rank}
    for name, rank in zip(names, ranks, strict=False)
  ]
