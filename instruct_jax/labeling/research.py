"""What researchers do: import, screening, agreement, decisions, export.

Agreement counts pairs of outputs that both people ordered. A pair that either
of them tied is left out, as in `evals.preference_accuracy`.
"""

import codecs
import collections
import dataclasses
import datetime
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from etils import epath
from scipy.cluster import hierarchy

from instruct_jax.data import folders, invisible, labels, records
from instruct_jax.evals import preference_accuracy, win_rate
from instruct_jax.labeling import answers, schema, store

MAX_OUTPUTS = 12
_FIELDS = {
  **dict.fromkeys(('prompt', 'text', 'id', 'user', 'category', 'style'), str),
  **dict.fromkeys(('completions', 'models', 'ended', 'turns'), list),
  **dict.fromkeys(('metadata', 'suggestion'), dict),
  'known_ranks': list,
}
# The fields that are kept with a task.
_RECORD = (
  'id', 'user', 'category', 'metadata', 'style', 'turns', 'ended', 'suggestion',
  'known_ranks',
)  # fmt: skip
_LEAST_OUTPUTS = {'rating': 1, 'ranking': 2, 'toxicity': 2}
# What to do about `known_ranks`, by whether the batch is for calibration.
_CALIBRATED = {
  True: "'known_ranks' is missing; a calibration task needs it",
  False: "'known_ranks' are for calibration batches; import it as one",
}
# The kinds of agreement, by the number of researchers in a pair of people.
_AGREEMENTS = ('labelers', 'labelers and researchers', 'researchers')


# --- Import -----------------------------------------------------------------


def _prompt(values):
  """An imported line's prompt, in the fields of `records.Prompt`."""
  text = values['prompt'] if 'prompt' in values else values.get('text')
  prompt = {'id': '-', 'text': text, 'turns': values.get('turns', [])}
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
  if suggestion and set(suggestion) != {'ranks', 'source'}:
    yield "'suggestion' must have ranks, and as source a name"
  elif not isinstance(suggestion.get('source', ''), str):
    yield "the source of 'suggestion' must be a string"
  for name, ranks in (
    ("'known_ranks'", values.get('known_ranks')),
    ("the ranks of 'suggestion'", suggestion.get('ranks')),
  ):
    if ranks is None:
      continue
    if kind not in answers.RANKED:
      yield f'{name} are for {" and ".join(answers.RANKED)} tasks'
    elif not isinstance(ranks, list) or any(
      type(rank) is not int or rank < 1 for rank in ranks
    ):
      yield f'{name} must be a list of integers from 1 (best)'
    elif len(ranks) != len(values.get('completions', [])):
      yield (
        f'{name} are {len(ranks)} for {len(values.get("completions", []))} '
        'completions'
      )


def _problems(values, kind):
  """What keeps one imported object from being a task of this kind."""
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


def _read_tasks(content, source, kind, calibration):
  """The checked objects of a JSONL file; blank lines are skipped."""
  found, bad = [], []
  for number, line in enumerate(content.split(b'\n'), start=1):
    line = line.removeprefix(codecs.BOM_UTF8)
    if not line.strip():
      continue
    try:
      values = json.loads(line.decode('utf-8'))
    except (ValueError, RecursionError) as error:
      bad.append((number, f'not JSON in UTF-8 ({error})'))
      continue
    if not isinstance(values, dict):
      bad.append((number, 'expected a JSON object'))
      continue
    bad += [(number, problem) for problem in _problems(values, kind)]
    if ('known_ranks' in values) != calibration:
      bad.append((number, _CALIBRATED[calibration]))
    # PostgreSQL refuses NUL inside JSON, too.
    if '\\u0000' in json.dumps(values):
      bad.append((number, 'holds a NUL character; remove it'))
    found.append(values)
  records.raise_problems(source, bad)
  if not found:
    raise records.RecordError(f'{source}: holds no tasks')
  return found


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
  by: int | None = None,
) -> int:
  """Makes a batch of tasks from JSONL, all lines or none; returns their number.

  A line is {"prompt": "...", "completions": ["...", ...], "models": ["sft",
  ...]} and may have id, user, category, metadata, ended (as in
  `records.Comparison`) and, for kind `prompt`, style. Tasks to rank may have
  a suggestion, {"ranks": [2, 1], "source": "a model"}, and those of a
  calibration batch have `known_ranks`. Equal ranks are ties.
  `text` or `turns` may replace `prompt`, so `records.Prompt` files are
  demonstration tasks as they are. A line of kind `rating` makes one task per
  completion.

  Args:
    the_store: of the site.
    content: the file.
    source: its name, for messages.
    name: of the batch; unique.
    kind: one of `answers.KINDS`.
    phase: one of `answers.PHASES`: the instructions that labelers see.
    overlap: labelers per task; without effect in screening.
    screening: whether the batch compares new labelers with researchers.
    calibration: whether the answers are known; such tasks are mixed into the
      work of all labelers.
    suggestions: whether labelers see the tasks' suggestions.
    by: the account that imports.

  Raises:
    RecordError: bad lines, up to ten of them as `file:line: what, what to do`.
    StoreError: a bad setting.
  """
  allowed = {'kind': (kind, answers.KINDS), 'phase': (phase, answers.PHASES)}
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
  found = _read_tasks(content, source, kind, calibration)
  if suggestions and not any('suggestion' in values for values in found):
    raise store.StoreError(f'{source}: suggestions are asked for; it has none')
  tasks = []
  for values in found:
    outputs = _outputs(values)
    if kind != 'rating':
      tasks.append((values, outputs))
      continue
    ended = values.get('ended') or [True] * len(outputs)
    for output, has_ended in zip(outputs, ended, strict=True):
      tasks.append(({**values, 'ended': [has_ended]}, [output]))
  batches = schema.batches
  with the_store.write() as c:
    if c.scalar(sa.select(batches.c.id).filter_by(name=name)):
      raise store.StoreError(f'There is a batch {name!r} already')
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
    for values, outputs in tasks:
      _insert_task(c, batch_id, values, outputs, num_slots)
    the_store.audit(c, by, 'import', f'{name}: {len(tasks)} {kind} tasks')
  return len(tasks)


def _insert_task(connection, batch_id, values, outputs, num_slots):
  task_id = schema.insert(
    connection,
    schema.tasks,
    batch_id=batch_id,
    prompt=_prompt(values)['text'],
    record={key: values[key] for key in _RECORD if key in values},
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


# --- Reading the answers ----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Labeled:
  """The answer that counts (the last revision) of one assignment."""

  assignment_id: int
  task_id: int
  batch: str
  kind: str
  phase: str
  screening: bool
  calibration: bool
  prompt: str
  record: dict[str, Any]
  texts: tuple[str, ...]
  models: tuple[str, ...]
  account_id: int
  labeler: str
  role: str
  content: dict[str, Any]
  order: tuple[int, ...]
  suggested: float | None
  instructions: str
  time: float
  seconds: float
  revision: int

  @property
  def is_researcher(self) -> bool:
    return self.role != 'labeler'

  @property
  def is_data(self) -> bool:
    return not (self.screening or self.calibration)


@dataclasses.dataclass(frozen=True)
class Decision:
  """A researcher's ranking of a task on which labelers disagreed."""

  task_id: int
  batch: str
  prompt: str
  record: dict[str, Any]
  texts: tuple[str, ...]
  models: tuple[str, ...]
  labeler: str  # The researcher who decided.
  ranks: list[int]
  note: str
  instructions: str
  time: float


def _group(rows: Iterable[Any], name: str) -> dict[Any, list]:
  """Rows by the value of an attribute."""
  found = collections.defaultdict(list)
  for row in rows:
    found[getattr(row, name)].append(row)
  return found


def labeled(
  the_store: store.Store, task_id: int | None = None
) -> list[Labeled]:
  """All answers that count, of one task or of all, oldest first."""
  table, later = schema.answers, schema.answers.alias()
  query = (
    sa.select(
      table.c['assignment_id', 'content', 'time', 'seconds', 'revision'],
      schema.assignments.c['task_id', 'account_id', 'order', 'suggested'],
      schema.batches.c['kind', 'phase', 'screening', 'calibration'],
      schema.accounts.c.role,
      *_shared_columns(),
    )
    .select_from(
      table.join(schema.work).join(schema.accounts).join(schema.instructions)
    )
    .where(
      table.c.revision
      == sa.select(sa.func.max(later.c.revision))
      .where(later.c.assignment_id == table.c.assignment_id)
      .scalar_subquery()
    )
    .order_by(table.c.id)
  )
  if task_id is not None:
    query = query.where(schema.tasks.c.id == task_id)
  with the_store.read() as c:
    rows = c.execute(query).mappings().all()
    outputs = _outputs_of(c, task_id)
  return [
    Labeled(**{**row, 'order': tuple(row['order'])}, **outputs[row['task_id']])
    for row in rows
  ]


def decisions(the_store: store.Store) -> list[Decision]:
  """All decisions on tasks that labelers disagreed on, oldest first."""
  table = schema.decisions
  query = (
    sa.select(table.c['task_id', 'ranks', 'note', 'time'], *_shared_columns())
    .select_from(
      table.join(schema.tasks)
      .join(schema.batches)
      .join(schema.accounts)
      .join(schema.instructions)
    )
    .order_by(table.c.id)
  )
  with the_store.read() as c:
    rows = c.execute(query).mappings().all()
    outputs = _outputs_of(c)
  return [Decision(**row, **outputs[row['task_id']]) for row in rows]


def _shared_columns():
  """What answers and decisions say of task, author and instructions."""
  version = sa.cast(schema.instructions.c.version, sa.Text)
  return (
    *schema.tasks.c['prompt', 'record'],
    schema.batches.c.name.label('batch'),
    schema.accounts.c.name.label('labeler'),
    (schema.instructions.c.phase + '/' + version).label('instructions'),
  )


def _outputs_of(connection, task_id=None):
  """Task id -> texts and models, of one task or of all."""
  query = sa.select(schema.outputs).order_by(schema.outputs.c.position)
  if task_id is not None:
    query = query.filter_by(task_id=task_id)
  found = collections.defaultdict(lambda: {'texts': (), 'models': ()})
  for key, outputs in _group(connection.execute(query), 'task_id').items():
    found[key] = {
      'texts': tuple(output.text for output in outputs),
      'models': tuple(output.model for output in outputs),
    }
  return found


# --- Agreement --------------------------------------------------------------


def _interval(counts: Iterable[tuple[int, int, int]], seed: int):
  """Agreement from (agreed, counted, task id); None if nothing was counted."""
  counts = list(counts)
  if not any(counted for _, counted, _ in counts):
    return None
  agreed, counted, clusters = zip(*counts, strict=True)
  interval = win_rate.ratio_interval(agreed, counted, clusters, seed=seed)
  return preference_accuracy.Agreement(
    interval.mean, interval.low, interval.high, sum(counted)
  )


def _ranked(rows):
  return [row for row in rows if row.kind in answers.RANKED]


def _pairs(rows):
  """(a, b, (agreed, counted, task id)) of every two rankings of one task."""
  return [
    (a, b, (*labels.pair_counts(a.content['ranks'], b.content['ranks']), task))
    for task, group in _group(_ranked(rows), 'task_id').items()
    for a, b in itertools.combinations(group, 2)
  ]


def _by_kind(pairs, seed):
  """Agreement by kind of pair, as in `_AGREEMENTS`."""
  counts = [[] for _ in _AGREEMENTS]
  for a, b, pair in pairs:
    counts[a.is_researcher + b.is_researcher].append(pair)
  found = (_interval(kind, seed) for kind in counts)
  return dict(zip(_AGREEMENTS, found, strict=True))


def agreement(rows: Sequence[Labeled], seed: int) -> dict[str, Any]:
  """Agreement among labelers, with researchers and among researchers."""
  return _by_kind(_pairs(rows), seed)


def agreement_by_version(
  rows: Sequence[Labeled], seed: int
) -> list[dict[str, Any]]:
  """Agreement on rankings under each version of the instructions.

  The last row, if there are such pairs, compares people who ranked under
  different versions.
  """
  pairs = _pairs(rows)
  counts = collections.Counter(row.instructions for row in _ranked(rows))

  def found(name, num_rankings, chosen):
    counted = sum(pair[1] for _, _, pair in chosen)
    agreed = _by_kind(chosen, seed)
    return {'version': name, 'rankings': num_rankings, 'pairs': counted} | {
      'agreement': agreed
    }

  same = _group_pairs(pairs)
  mixed = same.pop(None, [])
  rows = [
    found(name, counts[name], same.get(name, []))
    for name in sorted(counts, key=_version_order)
  ]
  return rows + [found('different versions', None, mixed)] * bool(mixed)


def _version_order(name):
  phase, version = name.rsplit('/', 1)
  return phase, int(version)


def _group_pairs(pairs):
  """Pairs by the version that both people read; None if it differs."""
  found = collections.defaultdict(list)
  for a, b, pair in pairs:
    same = a.instructions == b.instructions
    found[a.instructions if same else None].append((a, b, pair))
  return found


def disagreements(rows: Sequence[Labeled]) -> list[dict[str, Any]]:
  """Ranked tasks with several answers, the least agreed first."""
  found = []
  for task_id, group in _group(_ranked(rows), 'task_id').items():
    counts = [pair for _, _, pair in _pairs(group)]
    counted = sum(pair[1] for pair in counts)
    if counted:
      found.append(
        {
          'task_id': task_id,
          'prompt': group[0].prompt,
          'rate': sum(pair[0] for pair in counts) / counted,
          'num_pairs': counted,
          'people': len(group),
        }
      )
  return sorted(found, key=lambda item: (item['rate'], item['task_id']))


def calibration(
  rows: Sequence[Labeled], seed: int
) -> dict[int, preference_accuracy.Agreement | None]:
  """Account id -> agreement with the known answers of calibration tasks."""
  found = collections.defaultdict(list)
  for row in rows:
    if row.calibration and not row.is_researcher:
      known = row.record['known_ranks']
      counts = labels.pair_counts(known, row.content['ranks'])
      found[row.account_id].append((*counts, row.task_id))
  return {account: _interval(own, seed) for account, own in found.items()}


# --- Adjudication -----------------------------------------------------------


def queue(the_store: store.Store) -> list[dict[str, Any]]:
  """The tasks to decide: not yet decided, the least agreed first."""
  with the_store.read() as c:
    decided = set(c.scalars(sa.select(schema.decisions.c.task_id)))
  rows = [
    row for row in labeled(the_store) if row.is_data and not row.is_researcher
  ]
  return [
    item
    for item in disagreements(rows)
    if item['rate'] < 1 and item['task_id'] not in decided
  ]


def deciding(
  the_store: store.Store, task_id: int, account_id: int
) -> dict[str, Any] | None:
  """A task as its adjudicator sees it, or None if labelers ranked it alike.

  Returns:
    prompt, record, phase, texts; `order`, the positions as shown, drawn for
    each account; `given`, the labelers' ranks of each position, best first; the
    decision so far as ranks (or None) and note; and the labelers' agreement.
    Names of models and labelers are left out.
  """
  rows = [
    row
    for row in labeled(the_store, task_id)
    if row.is_data and not row.is_researcher
  ]
  table = schema.decisions
  with the_store.read() as c:
    decided = c.execute(sa.select(table).filter_by(task_id=task_id)).first()
  found = disagreements(rows)
  if not found or (found[0]['rate'] == 1 and decided is None):
    return None
  number = len(rows[0].texts)

  def place(position):
    parts = map(str, (task_id, account_id, position))
    return records.draw(the_store.config.seed, 'adjudication', *parts)

  return {
    **found[0],
    'record': rows[0].record,
    'phase': rows[0].phase,
    'texts': rows[0].texts,
    'order': sorted(range(number), key=place),
    'given': [
      sorted(row.content['ranks'][position] for row in rows)
      for position in range(number)
    ],
    'ranks': decided.ranks if decided else None,
    'note': decided.note if decided else '',
  }


def decide(
  the_store: store.Store,
  task_id: int,
  account_id: int,
  ranks: Sequence[int],
  note: str,
) -> None:
  """Stores the decision on a task; a later one replaces it.

  Raises:
    StoreError: labelers do not disagree on this task.
  """
  task = deciding(the_store, task_id, account_id)
  if task is None:
    raise store.StoreError('Labelers do not disagree on this task')
  table = schema.decisions
  with the_store.write() as c:
    c.execute(table.delete().filter_by(task_id=task_id))
    schema.insert(
      c,
      table,
      task_id=task_id,
      account_id=account_id,
      ranks=list(ranks),
      note=note,
      instruction_id=the_store.newest_instructions(c, task['phase']).id,
      time=the_store.clock(),
    )
    the_store.audit(c, account_id, 'decide', f'task {task_id}')


# --- People -----------------------------------------------------------------


def _states(connection, key, *where):
  """(value of a column, state) -> number of assignments."""
  state = schema.assignments.c.state
  query = (
    sa.select(key, state, sa.func.count())
    .select_from(schema.work.join(schema.accounts))
    .where(*where)
    .group_by(key, state)
  )
  found = {(value, name): n for value, name, n in connection.execute(query)}
  return collections.Counter(found)


def people(the_store: store.Store, rows: Sequence[Labeled]) -> list[dict]:
  """Per account: answers, pace, ties, skips, agreement with intervals."""
  table = schema.accounts
  with the_store.read() as c:
    accounts = c.execute(sa.select(table).order_by(table.c.id)).all()
    states = _states(c, table.c.id)
  by_account = _group(rows, 'account_id')
  pairs = _pairs(rows)

  def describe(account):
    own = by_account[account.id]
    ties = [
      a == b
      for row in _ranked(own)
      for a, b in itertools.combinations(row.content['ranks'], 2)
    ]
    seconds = sum(row.seconds for row in own)
    skipped = states[account.id, 'skipped']
    decided = skipped + len(own)
    mine = [
      p for p in pairs if account.id in (p[0].account_id, p[1].account_id)
    ]
    between = _by_kind(mine, the_store.config.seed)
    return {
      'id': account.id,
      'name': account.name,
      'role': account.role,
      'status': account.status,
      'answers': len(own),
      'median_seconds': store.median([row.seconds for row in own]),
      'per_hour': len(own) / (seconds / 3600) if seconds > 0 else None,
      'tie_rate': sum(ties) / len(ties) if ties else None,
      'skip_rate': skipped / decided if decided else None,
      'last': max((row.time for row in own), default=None),
      'agreement': between['labelers'],
      'with_researchers': between['labelers and researchers'],
    }

  return [describe(account) for account in accounts]


def screening(the_store: store.Store, rows: Sequence[Labeled]) -> list[dict]:
  """Per labeler in the screening round: B.1's first three criteria.

  Flags: share of prompts with a researcher's answer to "sensitive". Rankings:
  share of pairs in a researcher's order. Demonstrations: mean grade by
  researchers. Each has its cut-off, and is None if there is nothing to compare
  yet. The fourth criterion asks people about themselves; we do not.
  """
  config = the_store.config
  rows = [row for row in rows if row.screening]
  by_researchers = _group((r for r in rows if r.is_researcher), 'task_id')
  by_labeler = _group((r for r in rows if not r.is_researcher), 'account_id')
  with the_store.read() as c:
    grades = _group(c.execute(sa.select(schema.grades)), 'assignment_id')
  found = []
  for account_id, own in by_labeler.items():
    compared = [
      (row.task_id, row.content, other.content)
      for row in own
      for other in by_researchers[row.task_id]
    ]
    flags = [
      (int(a['prompt']['sensitive'] == b['prompt']['sensitive']), 1, task_id)
      for task_id, a, b in compared
      if 'sensitive' in a.get('prompt', ())
    ]
    rankings = [
      (*labels.pair_counts(a['ranks'], b['ranks']), task_id)
      for task_id, a, b in compared
      if 'ranks' in a
    ]
    flags = _interval(flags, config.seed)
    rankings = _interval(rankings, config.seed)
    marks = [g.grade for row in own for g in grades[row.assignment_id]]
    mean_grade = sum(marks) / len(marks) if marks else None
    passed = [
      value >= cut
      for value, cut in (
        (flags and flags.rate, config.cut_flags),
        (rankings and rankings.rate, config.cut_rankings),
        (mean_grade, config.cut_demonstrations),
      )
      if value is not None
    ]
    found.append(
      {
        'id': account_id,
        'name': own[0].labeler,
        'done': len(own),
        'flags': flags,
        'rankings': rankings,
        'demonstrations': mean_grade,
        'passes': all(passed) if passed else None,
      }
    )
  return found


def grade(
  the_store: store.Store, assignment_id: int, account_id: int, value: int
) -> None:
  """Stores a researcher's grade, 1 to 7, of a screening demonstration."""
  if not 1 <= value <= 7:
    raise store.StoreError('A grade is from 1 to 7')
  key = {'assignment_id': assignment_id, 'account_id': account_id}
  with the_store.write() as c:
    graded = c.scalar(
      sa.select(schema.assignments.c.id)
      .select_from(schema.work)
      .where(
        schema.assignments.c.id == assignment_id,
        schema.assignments.c.state == 'submitted',
        schema.batches.c.screening,
        schema.batches.c.kind == 'demonstration',
      )
    )
    if graded is None:
      raise store.StoreError('No such demonstration')
    c.execute(schema.grades.delete().filter_by(**key))
    schema.insert(c, schema.grades, grade=value, **key)


def progress(the_store: store.Store) -> list[dict[str, Any]]:
  """Per batch: tasks, wanted answers, and labelers' assignments by state."""
  batches = schema.batches
  query = (
    sa.select(batches, sa.func.count(schema.tasks.c.id).label('num_tasks'))
    .join(schema.tasks)
    .group_by(*batches.c)
    .order_by(batches.c.id)
  )
  with the_store.read() as c:
    found = c.execute(query).mappings().all()
    states = _states(c, batches.c.id, schema.accounts.c.role == 'labeler')

  def describe(batch):
    is_counted = not (batch['screening'] or batch['calibration'])
    wanted = batch['num_tasks'] * batch['overlap'] if is_counted else None
    shown = ('submitted', 'open', 'skipped')
    counts = {state: states[batch['id'], state] for state in shown}
    return {**batch, 'wanted': wanted, **counts}

  return [describe(batch) for batch in found]


# --- Export -----------------------------------------------------------------


def _clock_text(seconds):
  moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
  return moment.isoformat(timespec='seconds')


def _origin(row):
  """What every exported line says about its origin."""
  found = {
    'batch': row.batch,
    'task': row.task_id,
    'instructions': row.instructions,
    'time': _clock_text(row.time),
  }
  if isinstance(row, Labeled):
    found |= {'seconds': round(row.seconds, 1), 'revision': row.revision}
  if 'active' in row.record:  # Such tasks are no random sample.
    found['active'] = row.record['active']
  return found


def _id(row):
  return row.record.get('id') or f'task{row.task_id}'


def _metadata(row, **labeling):
  given = row.record.get('metadata', {})
  return {**given, 'labeling': {**_origin(row), **labeling}}


def _turns(row):
  return tuple(records.Turn(**turn) for turn in row.record.get('turns', ()))


def _ranking(row, is_decided):
  """The comparison that an answer makes."""
  marks = {'adjudicated': True} if is_decided else {}
  if row.suggested is not None:
    shown = {'shown': _clock_text(row.suggested)}
    marks['suggestion'] = row.record['suggestion'] | shown
  return _comparison(
    row,
    row.content['ranks'],
    order_shown=list(row.order),
    about_prompt=row.content['prompt'],
    ratings=row.content['ratings'],
    **marks,
  )


def _decided(row):
  """The comparison that a decision makes, with its mark."""
  mark = {'decided_by': row.labeler, 'note': row.note}
  return _comparison(row, row.ranks, adjudication=mark)


def _comparison(row, ranks, **labeling):
  return records.Comparison(
    prompt=row.prompt,
    completions=row.texts,
    ranks=tuple(ranks),
    id=_id(row),
    user=row.record.get('user', ''),
    labeler=row.labeler,
    category=row.record.get('category', ''),
    time=_clock_text(row.time),
    metadata=_metadata(row, models=list(row.models), **labeling),
    turns=_turns(row),
    ended=tuple(row.record.get('ended', ())),
  )


def _few_shot(instruction: str, pairs: Sequence[Sequence[str]]):
  """(prompt, response) of each example, with the others as context (A.3)."""
  for i, (query, response) in enumerate(pairs):
    shown = [f'{q}\n{r}' for j, (q, r) in enumerate(pairs) if j != i]
    yield '\n\n'.join([instruction, *shown, f'{query}\n']), response


def _demonstrations(row):
  """The demonstrations that one answer gives."""
  content, is_given = row.content, row.kind == 'demonstration'
  prompt = row.prompt if is_given else content['text']
  if content.get('style') == 'few-shot':
    pairs = _few_shot(prompt, content['pairs'])
  elif not invisible.is_blank(content['response']):
    pairs = [(prompt, content['response'])]
  else:
    pairs = []
  for i, (prompt, response) in enumerate(pairs):
    yield records.Demonstration(
      prompt=prompt,
      response=response,
      id=_id(row) if is_given else f'answer{row.assignment_id}-{i}',
      # Whoever writes a prompt is its user.
      user=row.record.get('user', '') if is_given else row.labeler,
      labeler=row.labeler,
      category=row.record.get('category', ''),
      metadata=_metadata(row),
      turns=_turns(row) if is_given else (),
    )


def _written_prompt(row):
  return records.Prompt(
    id=f'answer{row.assignment_id}',
    text=row.content['text'],
    user=row.labeler,
    category=row.record.get('category', ''),
    metadata={'style': row.content['style'], 'labeling': _origin(row)},
  )


def _ratings(row):
  """One exported line per rated output."""
  ended = row.record.get('ended') or [True] * len(row.texts)
  for position, rating in enumerate(row.content.get('ratings', ())):
    yield {
      'prompt': row.prompt,
      'turns': row.record.get('turns', []),
      'completion': row.texts[position],
      'ended': ended[position],
      'model': row.models[position],
      'kind': row.kind,
      'phase': row.phase,
      'rating': rating,
      'about_prompt': row.content['prompt'],
      'labeler': row.labeler,
      'researcher': row.is_researcher,
      'id': _id(row),
      **_origin(row),
    }


def _split(
  comparisons: Sequence[records.Comparison], fraction: float
) -> list[str]:
  """'train' or 'valid' of each comparison, about `fraction` of them valid.

  Comparisons that share a user (A.2) or the opening of a conversation are in
  one split, and so are those linked by a chain of shared ones.
  """
  # Users sort before openings, so a group with a user is named by one.
  names = [
    [*([(0, f'user {c.user}')] if c.user else []), (1, records.opening(c))]
    for c in comparisons
  ]
  linked = hierarchy.DisjointSet(itertools.chain(*names))
  for own in names:
    linked.merge(own[0], own[-1])
  first = {}
  for group in linked.subsets():
    first |= dict.fromkeys(group, min(group))

  def split(own):
    _, unit = first[own[0]]
    digest = hashlib.sha256(unit.encode()).digest()
    is_valid = int.from_bytes(digest[:8], 'big') < fraction * 2**64
    return 'valid' if is_valid else 'train'

  return list(map(split, names))


# All files that an export may write, besides statistics.json.
_EXPORTED = (
  'comparisons', 'comparisons_train', 'comparisons_valid',
  'comparisons_evaluation', 'comparisons_toxicity', 'comparisons_researchers',
  'comparisons_adjudicated', 'demonstrations', 'prompts', 'ratings',
)  # fmt: skip


def _comparisons_file(row):
  if row.is_researcher:
    return 'comparisons_researchers'
  if row.kind == 'toxicity':
    return 'comparisons_toxicity'
  is_training = row.phase == 'training'
  return 'comparisons' if is_training else 'comparisons_evaluation'


def _files(rows, decided, valid_fraction):
  """File name -> its records; files without any are left out."""
  files = collections.defaultdict(list)
  files['comparisons_adjudicated'] = list(map(_decided, decided))
  tasks = {row.task_id for row in decided}
  for row in rows:
    files['ratings'] += _ratings(row)
    if row.kind in answers.RANKED:
      found = _ranking(row, row.task_id in tasks)
      files[_comparisons_file(row)].append(found)
    elif row.kind in ('demonstration', 'prompt') and not row.is_researcher:
      files['demonstrations'] += _demonstrations(row)
      if row.kind == 'prompt' and row.content['style'] != 'few-shot':
        files['prompts'].append(_written_prompt(row))
  ranked = files['comparisons']
  splits = _split(ranked, valid_fraction)
  for comparison, split in zip(ranked, splits, strict=True):
    files[f'comparisons_{split}'].append(comparison)
  return {name: found for name, found in sorted(files.items()) if found}


def export(the_store: store.Store, folder: epath.PathLike) -> dict[str, int]:
  """Writes the files that the experiments read, and statistics.json.

  comparisons.jsonl has labelers' rankings under the training instructions;
  comparisons_train and comparisons_valid are its split by user and prompt.
  Rankings under other criteria or to compare with are in files of their own
  (comparisons_evaluation, _toxicity, _researchers). So have researchers'
  decisions (_adjudicated); the labelers' rankings of these tasks say
  `adjudicated` in their metadata. The others are demonstrations, prompts and
  ratings. Answers of the screening round and to calibration tasks are not
  exported. All files appear together, and those of an earlier export are
  removed (`data/folders.py`).

  Returns:
    Line counts by file; a file without lines is not written.
  """
  everything = labeled(the_store)
  rows = [row for row in everything if row.is_data]
  fraction = the_store.config.valid_fraction
  files = _files(rows, decisions(the_store), fraction)
  counts = {name: len(found) for name, found in files.items()}
  summary = statistics(the_store, everything) | {'files': counts}
  with folders.writing(
    folder,
    ('statistics.json', *(f'{name}.jsonl' for name in _EXPORTED)),
    command='labeling --export',
    replace=True,
  ) as unfinished:
    for name, found in files.items():
      path = unfinished / f'{name}.jsonl'
      if name == 'ratings':
        lines = [json.dumps(line, ensure_ascii=False) for line in found]
        records.write_bytes(path, '\n'.join([*lines, '']).encode())
      else:
        records.write_jsonl(path, found)
    records.write_bytes(
      unfinished / 'statistics.json', json.dumps(summary, indent=2).encode()
    )
  return counts


def statistics(the_store: store.Store, rows: Sequence[Labeled]) -> dict:
  """What a model card says about the labelers (JSON)."""
  data = [row for row in rows if row.is_data]
  seed = the_store.config.seed
  scores = calibration(rows, seed)
  by_labelers = [row for row in data if not row.is_researcher]

  def plain(values):
    return {
      name: dataclasses.asdict(value)
      if isinstance(value, preference_accuracy.Agreement)
      else value
      for name, value in values.items()
      if name not in ('id', 'last')
    }

  return {
    'num_labelers': len({row.account_id for row in by_labelers}),
    'num_answers': len(by_labelers),
    'by_kind': dict(collections.Counter(row.kind for row in by_labelers)),
    'instructions': sorted({row.instructions for row in by_labelers}),
    'agreement': plain(agreement(data, seed)),
    'agreement_by_version': [
      row | {'agreement': plain(row['agreement'])}
      for row in agreement_by_version(data, seed)
    ],
    'suggestions_shown': sum(row.suggested is not None for row in by_labelers),
    'ordered_by': sorted(
      {row.record['active']['by'] for row in data if 'active' in row.record}
    ),
    'labelers': [
      plain(person | {'calibration': scores.get(person['id'])})
      for person in people(the_store, data)
      if person['answers']
    ],
  }
