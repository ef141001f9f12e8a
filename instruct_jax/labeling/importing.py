"""Imports tasks from files, and other programs' answers to them.

JSONL holds only tasks; `formats` reads Argilla's and Label Studio's JSON.
"""

import codecs
import collections
import dataclasses
import json
import secrets

import sqlalchemy as sa

from instruct_jax.data import records
from instruct_jax.labeling import (
  answers,
  formats,
  parts,
  research,
  schema,
  store,
)

MAX_OUTPUTS = 12
_FIELDS = {
  **dict.fromkeys(('prompt', 'text', 'id', 'user', 'category', 'style'), str),
  **dict.fromkeys(('completions', 'models', 'ended', 'turns'), list),
  **dict.fromkeys(('metadata', 'suggestion'), dict),
  'known_ranks': list,
}
_LEAST_OUTPUTS = {'rating': 1, 'ranking': 2, 'toxicity': 2}
# State of an answer in a file -> state of its assignment.
_STATES = {
  'submitted': 'submitted',
  'unfinished': 'expired',
  'skipped': 'skipped',
}
# Problems with `known_ranks`, by whether the batch is for calibration.
_CALIBRATED = {
  True: "'known_ranks' is missing; a calibration task needs it",
  False: "'known_ranks' are for calibration batches; import it as one",
}


def _prompt(values):
  """An imported line's prompt, in the fields of `records.Prompt`."""
  text = values['prompt'] if 'prompt' in values else values.get('text')
  prompt = {'id': '-', 'text': text, 'turns': values.get('turns', [])}
  prompt['metadata'] = values.get('metadata', {})
  return records.completed(prompt, records.Prompt)


def _outputs(values):
  """(completion, model) pairs of an imported line."""
  completions = values.get('completions', [])
  models = values.get('models', [''] * len(completions))
  return list(zip(completions, models, strict=True))


def _type_problems(values):
  for name, value in values.items():
    if name not in _FIELDS:
      yield (
        f'unknown field {name!r}; known: {", ".join(_FIELDS)}; put anything '
        'else under "metadata"'
      )
    elif not isinstance(value, _FIELDS[name]):
      yield f'{name!r} must be a {_FIELDS[name].__name__}'


def _rank_problems(values, kind):
  """What is wrong with the suggestion and the known ranks, if there are any."""
  suggestion = values.get('suggestion', {})
  if 'suggestion' in values and set(suggestion) != {'ranks', 'source'}:
    yield "'suggestion' must have 'ranks' and a name as 'source'"
  elif not isinstance(suggestion.get('source', ''), str):
    yield "the source of 'suggestion' must be a string"
  number = len(values.get('completions', []))
  for name, ranks in (
    ("'known_ranks'", values.get('known_ranks')),
    ("the ranks of 'suggestion'", suggestion.get('ranks')),
  ):
    if ranks is None:
      continue
    if kind not in answers.RANKED:
      yield f'{name} are for {" and ".join(answers.RANKED)} tasks'
    elif not isinstance(ranks, list) or len(ranks) != number:
      yield f'{name} must be a list of {number} ranks, one per completion'
    elif any(
      type(rank) is not int or not 1 <= rank <= number for rank in ranks
    ):
      yield f'{name} must be integers from 1 (best) to {number}'
    elif name == "'known_ranks'" and len(set(ranks)) == 1:
      yield f'{name} are all equal, so no answer can be checked by them'
    elif name == "'known_ranks'":
      yield from _twin_problems(values['completions'], ranks)


def _twin_problems(completions, ranks):
  """Names the first completion that is there twice with different ranks."""
  first = {}
  for place, text in enumerate(completions):
    twin = first.setdefault(text, place)
    if ranks[twin] != ranks[place]:
      yield (
        f'completions {twin + 1} and {place + 1} are the same text, and '
        f"'known_ranks' gives them {ranks[twin]} and {ranks[place]}; give both "
        'the same rank'
      )
      return


def _problems(values, kind):
  """Why an imported object cannot be a task of this kind."""
  found = list(_type_problems(values))
  if found:
    return found
  turns = values.get('turns', [])
  num_texts = ('prompt' in values) + ('text' in values)
  if num_texts == 2 or not (num_texts or turns):
    found.append("give either 'prompt' or 'text'; or 'turns'")
  else:
    found += records.problems(_prompt(values), records.Prompt)
  completions, models = values.get('completions', []), values.get('models')
  texts = [*completions, *(models or [])]
  if not all(isinstance(text, str) for text in texts):
    return [*found, "'completions' and 'models' must be lists of strings"]
  if models is not None and len(models) != len(completions):
    found.append(
      f"'models' has {len(models)} names for {len(completions)} completions"
    )
  ended = values.get('ended', [])
  if not all(isinstance(value, bool) for value in ended):
    found.append("'ended' must be a list of true and false")
  elif ended and len(ended) != len(completions):
    found.append(
      f"'ended' has {len(ended)} values for {len(completions)} completions"
    )
  found += _rank_problems(values, kind)
  least = _LEAST_OUTPUTS.get(kind, 0)
  most = MAX_OUTPUTS if least else 0
  if not least <= len(completions) <= most:
    found.append(
      f'{len(completions)} completions; a {kind} task has {least} to {most}'
    )
  if answers.style({'record': values}) not in answers.STYLES:
    found.append(f"'style' must be one of {', '.join(answers.STYLES)}")
  texts += [value for value in values.values() if isinstance(value, str)]
  source = values.get('suggestion', {}).get('source')
  texts += [source] if isinstance(source, str) else []
  if not found:
    texts += [turn['content'] for turn in turns]
  try:
    for text in texts:
      answers.clean(text, 'A text')
  except answers.AnswerError as error:
    found.append(str(error))
  return found


def _read_tasks(content, source, kind, name, calibration):
  """(checked tasks of a file, notes to the user with counts)."""
  formats.check_format(content, source, name)
  if name == 'jsonl':
    found, unit, told = list(_lines(content)), 'line', {}
  elif kind not in answers.RANKED:
    raise store.StoreError(
      f'{formats.FORMATS[name]} files hold rankings; the kind must be one of '
      f'{", ".join(answers.RANKED)}, not {kind}'
    )
  else:
    items, told = formats.read(content, source, name)
    found, unit = [(item.number, item) for item in items], 'record'
  bad = []
  for number, item in found:
    if isinstance(item, str):
      bad.append((number, item))
      continue
    bad += [(number, problem) for problem in _problems(item.values, kind)]
    if ('known_ranks' in item.values) != calibration:
      bad.append((number, _CALIBRATED[calibration]))
    bad += [(number, problem) for problem in _answer_problems(item.answers)]
    # PostgreSQL refuses NUL inside JSON, too.
    if '\\u0000' in json.dumps(item.values):
      bad.append((number, 'holds a NUL character; remove it'))
  records.raise_problems(source, bad, unit)
  if not found:
    raise records.RecordError(f'{source}: holds no tasks')
  return [item for _, item in found], told


def _lines(content):
  """(number, task or problem) of the lines of JSONL; blank ones are skipped."""
  for number, line in enumerate(content.split(b'\n'), start=1):
    line = line.removeprefix(codecs.BOM_UTF8)
    if not line.strip():
      continue
    try:
      values = parts.loads(line.decode('utf-8'))
    except (ValueError, RecursionError) as error:
      yield number, f'not JSON in UTF-8 ({error})'
      continue
    if isinstance(values, dict):
      yield number, parts.Item(values)
    else:
      yield number, 'expected a JSON object'


def _answer_problems(found):
  """Why the answers of a file cannot be stored."""
  for answer in found:
    try:
      store.pseudonym(answer.labeler)
      answers.clean(answer.note, 'A note')
    except (store.StoreError, answers.AnswerError) as error:
      yield f'{error}; change the annotator or the note in the file'


def import_tasks(
  the_store: store.Store,
  content: bytes,
  *,
  source: str,
  name: str,
  kind: str,
  phase: str,
  overlap: int,
  screening: bool = False,
  calibration: bool = False,
  suggestions: bool = False,
  file_format: str = 'jsonl',
  by: int | None = None,
) -> dict[str, int]:
  """Makes a batch of tasks from a file: all of its records, or none.

  A line of JSONL is {"prompt": "...", "completions": ["...", ...], "models":
  ["sft", ...]} and may have id, user, category, metadata, ended (as in
  `records.Comparison`) and, for kind `prompt`, style. Tasks to rank may have
  a suggestion, {"ranks": [2, 1], "source": "a model"}, and those of a
  calibration batch have `known_ranks`. Equal ranks are ties.
  `text` or `turns` may replace `prompt`, so `records.Prompt` files are
  demonstration tasks as they are. A line of kind `rating` makes one task per
  completion.

  Files of Argilla and Label Studio also hold answers (`formats.py`). People
  without an account of that name here get a suspended one. Imported answers
  count under separate instructions, `imported/1` and so on. What the site
  already has is left out and counted (`_new`). A file without answers may
  import the same tasks again, for a second round.

  Args:
    the_store: the site's store.
    content: bytes of the file.
    source: the file's name, for messages.
    name: the batch's name; unique.
    kind: one of `answers.KINDS`.
    phase: one of `answers.PHASES`: the instructions that labelers see.
    overlap: labelers per task; ignored in screening and calibration.
    screening: whether the batch compares new labelers with researchers.
    calibration: whether the answers are known; such tasks are mixed into the
      work of all labelers.
    suggestions: whether labelers see the tasks' suggestions.
    file_format: one of `formats.FORMATS`.
    by: id of the account that imports.

  Returns:
    Numbers of tasks, of answers by state, and of what was left out or is
    doubtful.

  Raises:
    RecordError: bad lines, up to ten of them as `file:line: what, what to do`;
      or bad records, as `file: record number: what`.
    StoreError: a bad setting; or the site has all tasks and answers already.
  """
  allowed = {
    'kind': (kind, answers.KINDS),
    'phase': (phase, answers.PHASES),
    'format': (file_format, formats.FORMATS),
  }
  for key, (value, names) in allowed.items():
    if value not in names:
      raise store.StoreError(
        f'{key} {value!r} is not one of {", ".join(names)}'
      )
  if not 1 <= overlap <= 100:
    raise store.StoreError(f'overlap must be from 1 to 100, found {overlap}')
  missing = 'The batch needs a name of at most 80 characters'
  name = store.given(name, 'The name', missing)
  if len(name) > 80:
    raise store.StoreError(missing)
  if calibration and (screening or kind not in answers.RANKED):
    raise store.StoreError(
      'calibration is for batches of rankings outside the screening round'
    )
  found, told = _read_tasks(content, source, kind, file_format, calibration)
  if suggestions and not any('suggestion' in item.values for item in found):
    raise store.StoreError(
      f'{source}: suggestions are asked for, but it has none'
    )
  has_answers = any(item.answers for item in found)
  if has_answers and (screening or calibration):
    raise store.StoreError(
      f'{source}: has answers, which cannot be part of screening or calibration'
    )
  batches = schema.batches
  with the_store.write() as c:
    if c.scalar(sa.select(batches.c.id).filter_by(name=name)):
      raise store.StoreError(f'A batch {name!r} exists already')
    if has_answers:
      found, left_out = _new(c, found, source, kind, phase)
      told = {**told, **left_out}
    tasks = _tasks(found, kind)
    states = (answer.state for item in found for answer in item.answers)
    counts = {'tasks': len(tasks), **collections.Counter(states), **told}
    batch_id = schema.insert(
      c,
      batches,
      name=name,
      kind=kind,
      phase=phase,
      overlap=overlap,
      screening=screening,
      calibration=calibration,
      suggestions=suggestions,
      closed=False,
      created=the_store.clock(),
    )
    num_slots = 0 if screening or calibration else overlap
    if has_answers:
      text = f'Rankings from {formats.FORMATS[file_format]}: {source}'
      writer = _Writer(c, the_store, file_format, text)
    for item, values, outputs in tasks:
      task_id = _insert_task(c, batch_id, values, outputs, num_slots)
      if item.answers:
        writer.add(task_id, item, len(outputs))
    listed = ', '.join(f'{n} {what}' for what, n in counts.items())
    the_store.audit(c, by, 'import', f'{name}: {kind}, {listed}')
  return counts


def _tasks(found, kind):
  """(item, values, outputs) per task; `rating` has a task per completion."""
  tasks = []
  for item in found:
    values, outputs = item.values, _outputs(item.values)
    if kind != 'rating':
      tasks.append((item, values, outputs))
      continue
    ended = values.get('ended') or [True] * len(outputs)
    for output, has_ended in zip(outputs, ended, strict=True):
      tasks.append((item, {**values, 'ended': [has_ended]}, [output]))
  return tasks


def _new(connection, found, source, kind, phase):
  """The parts of a file with answers that the site does not have yet.

  Only the data counts, that is, batches other than screening and calibration.
  An answer is left out if its author has one of the same state on a task of the
  same prompt, completions, kind and phase; a draft or skip also if its author
  has submitted an answer there. A task that is already in the data is kept only
  if some of its answers are new. A record that the file repeats is kept once.

  Returns:
    The tasks with their new answers, and counts of what is left out.

  Raises:
    StoreError: nothing is new.
  """
  here = _here(connection, kind, phase)
  kept, seen, left_out, names = [], set(), collections.Counter(), set()
  for item in found:
    record = json.dumps([item.values, list(map(str, item.answers))])
    content = _prompt(item.values)['text'], tuple(item.values['completions'])
    batch, said = here.get(content, (None, set()))
    given = [answer for answer in item.answers if _is_new(answer, said)]
    names |= {batch} if batch else set()
    if record in seen:
      left_out['records that the file repeats left out'] += 1
    elif batch and not given:
      left_out['tasks without a new answer left out'] += 1
    else:
      kept.append(dataclasses.replace(item, answers=tuple(given)))
    known = len(item.answers) - len(given)
    left_out['answers that are here already left out'] += known
    seen.add(record)
  if not kept:
    listed = ', '.join(map(repr, sorted(names)))
    raise store.StoreError(
      f'{source}: all {len(found)} tasks and their answers are already in '
      f'batch {listed}; to have the tasks labeled again, import them as JSONL, '
      'without answers'
    )
  return kept, +left_out


def _is_new(answer, said):
  name = store.pseudonym(answer.labeler)
  states = {answer.state}
  if answer.state != 'decided':
    # Once its author has submitted an answer, a draft or skip is not new.
    states.add('submitted')
  return said.isdisjoint((name, state) for state in states)


def _here(connection, kind, phase):
  """(prompt, completions) -> (name of a batch, {(labeler, state)}).

  Of the tasks in the data (`research.IN_DATA`): a batch that has the task, and
  the answers to it.
  """
  batches, accounts = schema.batches, schema.accounts
  wanted = (batches.c.kind == kind, batches.c.phase == phase, *research.IN_DATA)
  rows = connection.execute(
    sa.select(schema.tasks.c['id', 'prompt'], batches.c.name)
    .join(batches)
    .where(*wanted)
  ).all()
  said = connection.execute(
    sa.select(schema.assignments.c['task_id', 'state'], accounts.c.name)
    .select_from(schema.work.join(accounts))
    .where(*wanted)
  ).all()
  decided = connection.execute(
    sa.select(schema.decisions.c.task_id, accounts.c.name).join(accounts)
  ).all()
  # Assignment state -> state in a file; others, such as open, are drafts.
  states = {found: ours for ours, found in _STATES.items()}
  by_task = collections.defaultdict(set)
  for row in said:
    state = states.get(row.state, 'unfinished')
    by_task[row.task_id].add((row.name, state))
  for row in decided:
    by_task[row.task_id].add((row.name, 'decided'))
  outputs = research.outputs_of(connection)
  found = {}
  for row in rows:
    content = row.prompt, outputs[row.id]['texts']
    found.setdefault(content, (row.name, set()))[1].update(by_task[row.id])
  return found


def _insert_task(connection, batch_id, values, outputs, num_slots):
  task_id = schema.insert(
    connection,
    schema.tasks,
    batch_id=batch_id,
    prompt=_prompt(values)['text'],
    record={key: values[key] for key in schema.RECORD_FIELDS if key in values},
  )
  output_rows = [
    {'task_id': task_id, 'position': position, 'text': text, 'model': model}
    for position, (text, model) in enumerate(outputs)
  ]
  slot_rows = [
    {'task_id': task_id, 'number': number} for number in range(1, num_slots + 1)
  ]
  for table, rows in ((schema.outputs, output_rows), (schema.slots, slot_rows)):
    if rows:
      connection.execute(table.insert(), rows)
  return task_id


class _Writer:
  """Stores the answers of a file."""

  def __init__(self, connection, the_store, file_format, text):
    self._connection, self._store = connection, the_store
    self._format, self._now = file_format, the_store.clock()
    self._accounts = {}
    last = the_store.newest_instructions(connection, answers.IMPORTED)
    self._instructions = schema.insert(
      connection,
      schema.instructions,
      phase=answers.IMPORTED,
      version=last.version + 1 if last else 1,
      text=text,
      created=self._now,
    )

  def add(self, task_id, item, num_outputs):
    """Adds the answers to a task; each person's last complete one counts."""
    people = research.grouped(item.answers, 'labeler')
    for name, own in people.items():
      decided = [answer for answer in own if answer.state == 'decided']
      if decided:
        self._decide(task_id, name, decided[-1])
      given = [answer for answer in own if answer.state != 'decided']
      if given:
        self._answer(task_id, name, given, num_outputs)

  def _account(self, name, role):
    name = store.pseudonym(name)
    if name not in self._accounts:
      table = schema.accounts
      found = self._connection.scalar(
        sa.select(table.c.id).filter_by(name=name)
      )
      self._accounts[name] = found or schema.insert(
        self._connection,
        table,
        name=name,
        role=role,
        status='suspended',
        created=self._now,
      )
    return self._accounts[name]

  def _decide(self, task_id, name, answer):
    self._connection.execute(
      schema.decisions.delete().filter_by(task_id=task_id)
    )
    schema.insert(
      self._connection,
      schema.decisions,
      task_id=task_id,
      account_id=self._account(name, 'researcher'),
      ranks=list(answer.ranks),
      note=answer.note,
      instruction_id=self._instructions,
      time=self._now if answer.time is None else answer.time,
    )

  def _answer(self, task_id, name, given, num_outputs):
    account_id = self._account(name, 'labeler')
    complete = [answer for answer in given if answer.state == 'submitted']
    unfinished = [answer for answer in given if answer.state == 'unfinished']
    last = (complete or unfinished or given)[-1]
    time = self._now if last.time is None else last.time
    ranks = {
      f'rank{position}': str(rank)
      for position, rank in enumerate(last.ranks)
      if rank is not None
    }
    assignment_id = schema.insert(
      self._connection,
      schema.assignments,
      task_id=task_id,
      account_id=account_id,
      state=_STATES[last.state],
      claimed=time,
      touched=time,
      expires=time,
      seconds=last.seconds,
      order=list(range(num_outputs)),
      draft={'ranks': ranks} if ranks else {},
      reason=last.note if last.state == 'skipped' else '',
    )
    for revision, answer in enumerate(complete, start=1):
      schema.insert(
        self._connection,
        schema.answers,
        assignment_id=assignment_id,
        revision=revision,
        submission=secrets.token_hex(16),
        content={
          'ranks': list(answer.ranks),
          'prompt': {},
          'ratings': [],
          answers.IMPORTED: self._format,
        },
        instruction_id=self._instructions,
        time=self._now if answer.time is None else answer.time,
        seconds=answer.seconds,
      )
    if complete:
      self._store.take_slot(self._connection, task_id, account_id)
