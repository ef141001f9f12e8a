"""Rankings in the JSON of Label Studio; see `formats`."""

import collections
import dataclasses
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from instruct_jax.labeling import parts

_BUCKET = re.compile(r'(?:rank|place)?[ _-]?(\d{1,3})', re.IGNORECASE)
# Keys of a JSON_MIN record that are neither data nor answers.
_MIN = (
  'id', 'annotator', 'annotation_id', 'created_at', 'updated_at', 'lead_time',
  'agreement',
)  # fmt: skip


def read(found, source, told):
  """(number, item) of numbered records; counts notes to the user in `told`."""
  return parts.each(_joined(found, told), source, lambda x: _item(x, told))


def _joined(found, told):
  """Groups JSON_MIN records, flat and of one annotation each, into tasks.

  Other records stay as they are.
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
  """The task whose annotations are these JSON_MIN records."""
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


def _item(record, told):
  data = record.get('data', record)
  if not isinstance(data, dict) or (data is record and 'annotations' in record):
    raise parts.BadError("'data' is missing; it holds the prompt and the items")
  ours, known = parts.read_ours(
    parts.an_object(record.get('meta'), "'meta'").get(parts.OURS)
  )
  keys, names, completions = _outputs(data)
  rest = {k: v for k, v in data.items() if k not in keys}
  texts = [k for k, v in rest.items() if isinstance(v, str)]
  if 'prompt' not in rest and len(texts) != 1:
    raise parts.BadError(
      f"'data' has the texts {', '.join(texts) or '(none)'}; one must be the "
      "prompt: name it 'prompt'"
    )
  key = 'prompt' if 'prompt' in rest else texts[0]
  values = parts.prompt_fields(rest.pop(key), f'{key!r}')
  values['completions'] = completions
  if ours:
    rest |= parts.an_object(ours.pop('metadata', None), 'metadata')
  else:
    values['models'] = names
    if 'id' in record and data is not record:
      values['id'] = str(record['id'])
  if rest:
    values['metadata'] = rest
  for made in _described(record, 'predictions', told):
    ranks = _ranks(made, names, told)
    if 'suggestion' in values or ranks is None:
      told['predictions left out'] += 1
    elif None in ranks:
      raise parts.BadError('a prediction does not rank all items')
    else:
      source = str(made.get('model_version') or '')
      suggested = {'ranks': list(parts.dense(ranks)), 'source': source}
      values['suggestion'] = suggested
  answers = []
  for made in parts.objects(record.get('annotations'), "'annotations'"):
    said = _said(made, 'completed_by', known)
    person = made.get('completed_by')
    # An export may describe the person, with address and name.
    person = person.get('id') if isinstance(person, dict) else person
    if said is None and 'completed_by' in made and person is None:
      told['annotations of deleted users left out'] += 1
      continue
    if said is None and type(person) is not int:
      raise parts.BadError("'completed_by' of an annotation must be a number")
    answers.append(_answer(made, person, names, said, told))
  for made in _described(record, 'drafts', told):
    said = _said(made, 'user', known)
    person = made.get('user')
    if said is None and type(person) is not int:  # Usually an e-mail address.
      told['drafts of people without a number left out'] += 1
      continue
    draft = _answer(made, person, names, said, told)
    answers.append(dataclasses.replace(draft, state='unfinished'))
  decided = [answer for answer in answers if answer.state == 'decided']
  if len(decided) > 1:  # Imported annotations have the mark by default.
    told['marks of ground truths ignored: several in one task'] += len(decided)
    answers = [
      dataclasses.replace(answer, state='submitted')
      if answer.state == 'decided'
      else answer
      for answer in answers
    ]
  return parts.Item({**values, **ours}, tuple(answers))


def _described(record, name, told):
  """Predictions or drafts, without those of which an export has only ids."""
  found = record.get(name)
  if isinstance(found, list):
    whole = [one for one in found if type(one) is not int]
    if len(whole) < len(found):
      told[f'{name} left out'] += len(found) - len(whole)
    found = whole
  return parts.objects(found, f'{name!r}')


def _said(made, person, known):
  """What we stored beside an annotation or draft that we exported, or None.

  Its `id` is the number of our account. On import, Label Studio assigns a new
  `id` and the importing user as the person, and keeps ours as `import_id`.
  """
  number = made.get('import_id') if person in made else made.get('id')
  return known.get(str(number))


def _outputs(data):
  """(keys in the data, ids, texts) of the items that are ranked."""
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
      raise parts.BadError(f'an item of {lists[0]!r} has no text as its body')
    names = [str(item['id']) for item in items]
    if len(set(names)) < len(names):
      raise parts.BadError(f'two items of {lists[0]!r} have the same id')
    return lists, names, texts
  strings = {key for key, value in data.items() if isinstance(value, str)}
  pairs = [
    (key, key[:-1] + other)
    for key in data
    for first, other in ('12', 'ab', 'AB')
    if key in strings and key.endswith(first) and key[:-1] + other in strings
  ]
  if lists or len(pairs) != 1:
    raise parts.BadError(
      "'data' must have one list of items with id and body, or two texts such "
      'as answer1 and answer2'
    )
  return pairs[0], list(pairs[0]), [data[key] for key in pairs[0]]


def _answer(made, person, names, said, told):
  ranks = _ranks(made, names, told)
  state = 'skipped' if made.get('was_cancelled') else 'submitted'
  if ranks is None:
    ranks = (None,) * len(names)
  # The file, not what we stored, says whether it is a decision.
  known = {**(said or {}), 'state': None}
  if made.get('ground_truth') and state == 'submitted':
    known['state'] = 'decided'
  return parts.make_answer(
    state,
    () if state == 'skipped' else ranks,
    known,
    labeler=f'label-studio-{person}',
    time=parts.seconds(made.get('created_at')),
    seconds=parts.number(made.get('lead_time'), "'lead_time'"),
  )


def _ranks(made, names, told):
  """Ranks that an annotation gives the items; None if it has no ranking."""
  found = []
  for part in parts.objects(made.get('result'), "'result'"):
    if part.get('type') in ('ranker', 'pairwise'):
      found.append(part)
    else:
      told[f'results of type {part.get("type")} left out'] += 1
  if not found:
    return None
  if len(found) > 1:
    raise parts.BadError('an annotation has several rankings')
  value = parts.an_object(found[0].get('value'), "'value'")
  if found[0]['type'] == 'pairwise':
    sides = {'left': (1, 2), 'right': (2, 1)}
    selected = str(value.get('selected'))
    if selected not in sides or len(names) != 2:
      raise parts.BadError(f"'selected' must be left or right: {value!r:.60}")
    return sides[selected]
  groups = _groups(value.get('ranker'), found[0].get('from_name'))
  ranks: dict[str, int | None] = dict.fromkeys(names)
  for place, group in enumerate(groups, 1):
    for item in map(str, group):
      if item not in ranks or ranks[item] is not None:
        problem = 'is not an item' if item not in ranks else 'is ranked twice'
        raise parts.BadError(f'{item!r:.40} {problem}')
      ranks[item] = place
  return tuple(ranks.values())


def _groups(ranker, name):
  """Groups of ids, the best first. The bucket `_` holds unranked items.

  Without buckets there is one list in rank order, under the question's name.
  """
  if isinstance(ranker, list):
    return [[item] for item in ranker]
  ranker = parts.an_object(ranker, "'ranker'")
  buckets = {key: value for key, value in ranker.items() if key != '_'}
  if not all(isinstance(value, list) for value in buckets.values()):
    raise parts.BadError("'ranker' must have lists of ids")
  numbers = {key: _BUCKET.fullmatch(key) for key in buckets}
  if list(ranker) != [name] and all(numbers.values()):
    order = sorted(buckets, key=lambda key: int(numbers[key][1]))
    return [buckets[key] for key in order]
  if len(buckets) > 1:
    raise parts.BadError(
      f'the buckets {", ".join(buckets)} are not ranks; name them rank1, '
      'rank2, ...'
    )
  return [[item] for items in buckets.values() for item in items]


def files(items: Sequence[parts.Item]) -> dict[str, bytes]:
  """One file of tasks, and one of the labeling interface that they need."""
  most = max((len(item.values['completions']) for item in items), default=0)
  tasks = [_task(item, most) for item in items]
  buckets = ''.join(
    f'    <Bucket name="rank{rank}" title="Rank {rank}"/>\n'
    for rank in range(1, most + 1)
  )
  view = (
    '<View>\n  <Text name="prompt" value="$prompt"/>\n'
    '  <List name="outputs" value="$items" title="Outputs"/>\n'
    f'  <Ranker name="rank" toName="outputs">\n{buckets}  </Ranker>\n</View>\n'
  )
  return {
    'label_studio.json': parts.to_json(tasks),
    'label_studio.xml': view.encode(),
  }


def _task(item: parts.Item, num_buckets: int) -> Mapping[str, Any]:
  texts = item.values['completions']
  names = [f'output{place}' for place in range(1, len(texts) + 1)]
  people = parts.people(
    item, lambda a: str(a.account), lambda a: str(-a.account)
  )

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

  suggestion = parts.shown(item)
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
        'result': result(parts.dense(suggestion['ranks']), 'suggestion'),
      }
    ]
    if suggestion
    else [],
    'meta': {parts.OURS: parts.beside(item, people)},
  }
