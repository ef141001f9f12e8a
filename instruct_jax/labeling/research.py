"""What researchers look at and decide: screening, agreement, adjudication.

Agreement counts pairs of outputs that both people ordered. A pair that either
of them tied is left out, as in `evals.preference_accuracy`. If one person tied
a pair and another ordered it, researchers still get the task to decide.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from instruct_jax.data import labels, records
from instruct_jax.evals import preference_accuracy, win_rate
from instruct_jax.labeling import answers, schema, store

# Conditions on the batches whose answers are exported.
IN_DATA = (~schema.batches.c.screening, ~schema.batches.c.calibration)
# The kinds of agreement, by the number of researchers in a pair of people.
_AGREEMENTS = ('labelers', 'labelers and researchers', 'researchers')


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
    """Whether a researcher or admin answered, not a labeler."""
    return self.role != 'labeler'

  @property
  def is_data(self) -> bool:
    """Whether the task is for neither screening nor calibration."""
    return not (self.screening or self.calibration)


@dataclasses.dataclass(frozen=True)
class Decision:
  """A researcher's ranking of a task on which labelers disagreed."""

  task_id: int
  batch: str
  kind: str
  phase: str
  prompt: str
  record: dict[str, Any]
  texts: tuple[str, ...]
  models: tuple[str, ...]
  labeler: str  # The researcher who decided.
  ranks: list[int]
  note: str
  instructions: str
  time: float


def grouped(rows: Iterable[Any], name: str) -> dict[Any, list]:
  """Groups rows by the value of an attribute."""
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
      schema.batches.c['screening', 'calibration'],
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
    outputs = outputs_of(c, task_id)
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
    outputs = outputs_of(c)
  return [Decision(**row, **outputs[row['task_id']]) for row in rows]


def _shared_columns():
  """Columns of task, author and instructions, for answers and decisions."""
  version = sa.cast(schema.instructions.c.version, sa.Text)
  return (
    *schema.tasks.c['prompt', 'record'],
    *schema.batches.c['kind', 'phase'],
    schema.batches.c.name.label('batch'),
    schema.accounts.c.name.label('labeler'),
    (schema.instructions.c.phase + '/' + version).label('instructions'),
  )


def outputs_of(
  connection: sa.Connection, task_id: int | None = None
) -> dict[int, dict[str, tuple[str, ...]]]:
  """Task id -> texts and models, of one task or of all."""
  query = sa.select(schema.outputs).order_by(schema.outputs.c.position)
  if task_id is not None:
    query = query.filter_by(task_id=task_id)
  found = collections.defaultdict(lambda: {'texts': (), 'models': ()})
  for key, outputs in grouped(connection.execute(query), 'task_id').items():
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
  """(a, b, (agreed, counted, task id)) of any two rankings of the same task."""
  return [
    (a, b, (*labels.pair_counts(a.content['ranks'], b.content['ranks']), task))
    for task, group in grouped(_ranked(rows), 'task_id').items()
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
  """Ranked tasks with several answers, those with the least agreement first.

  `rate` is the agreement on the `num_pairs` that two people both ordered; None
  if there are none. `num_tied` counts the pairs that one of two people tied and
  the other ordered; tasks that differ only in these come after those with
  contradicting orders. `differs` is true if people contradict each other or
  `num_tied` is not 0.
  """
  found = []
  for task_id, group in grouped(_ranked(rows), 'task_id').items():
    counts = [pair for _, _, pair in _pairs(group)]
    agreed, counted = (sum(pair[i] for pair in counts) for i in (0, 1))
    tied = sum(
      _num_tied(a.content['ranks'], b.content['ranks'])
      for a, b in itertools.combinations(group, 2)
    )
    if counted or tied:
      found.append(
        {
          'task_id': task_id,
          'prompt': group[0].prompt,
          'rate': agreed / counted if counted else None,
          'num_pairs': counted,
          'num_tied': tied,
          'differs': agreed < counted or tied > 0,
          'people': len(group),
        }
      )

  def order(item):
    rate = 1.0 if item['rate'] is None else item['rate']
    return rate, -item['num_tied'], item['task_id']

  return sorted(found, key=order)


def _num_tied(a, b):
  """Number of pairs that exactly one of two rankings ties."""
  pairs = itertools.combinations(range(len(a)), 2)
  return sum((a[i] == a[j]) != (b[i] == b[j]) for i, j in pairs)


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


def decided(the_store: store.Store) -> set[int]:
  """The ids of the tasks that have a decision."""
  with the_store.read() as c:
    return set(c.scalars(sa.select(schema.decisions.c.task_id)))


def queue(the_store: store.Store) -> list[dict[str, Any]]:
  """The tasks to decide, without those decided, ordered as `disagreements`."""
  rows = [
    row for row in labeled(the_store) if row.is_data and not row.is_researcher
  ]
  done = decided(the_store)
  return [
    item
    for item in disagreements(rows)
    if item['differs'] and item['task_id'] not in done
  ]


def deciding(
  the_store: store.Store, task_id: int, account_id: int
) -> dict[str, Any] | None:
  """A task as its adjudicator sees it, or None if there is none to decide.

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
    decision = c.execute(sa.select(table).filter_by(task_id=task_id)).first()
  found = disagreements(rows)
  if not found or not (found[0]['differs'] or decision):
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
    'ranks': decision.ranks if decision else None,
    'note': decision.note if decision else '',
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
    # Only one writer at a time, because a task has one decision.
    c.execute(
      sa.select(schema.tasks.c.id).filter_by(id=task_id).with_for_update()
    )
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


def people(
  the_store: store.Store, rows: Sequence[Labeled], *where: sa.ColumnElement
) -> list[dict]:
  """Answers, pace, ties, skips and agreement with intervals, per account.

  Args:
    the_store: the site's store.
    rows: the answers.
    *where: conditions on the batches whose skips count.
  """
  table = schema.accounts
  with the_store.read() as c:
    accounts = c.execute(sa.select(table).order_by(table.c.id)).all()
    states = _states(c, table.c.id, *where)
  by_account = grouped(rows, 'account_id')
  pairs = _pairs(rows)

  def describe(account):
    own = by_account[account.id]
    ties = [
      a == b
      for row in _ranked(own)
      for a, b in itertools.combinations(row.content['ranks'], 2)
    ]
    # Imported answers without a working time have 0 seconds.
    timed = [
      row.seconds
      for row in own
      if row.seconds or answers.IMPORTED not in row.content
    ]
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
      'median_seconds': store.median(timed),
      'per_hour': 3600 * len(timed) / sum(timed) if any(timed) else None,
      'tie_rate': sum(ties) / len(ties) if ties else None,
      'skip_rate': skipped / decided if decided else None,
      'last': max((row.time for row in own), default=None),
      'agreement': between['labelers'],
      'with_researchers': between['labelers and researchers'],
    }

  return [describe(account) for account in accounts]


def screening(the_store: store.Store, rows: Sequence[Labeled]) -> list[dict]:
  """B.1's first three criteria, for each labeler in the screening round.

  Flags: share of prompts where the answer to "sensitive" is a researcher's.
  Rankings: share of pairs in the order of a researcher. Demonstrations: mean
  grade by researchers. Each has its cut-off, and is None as long as there is
  nothing to compare. The fourth criterion is left out, because it asks people
  about themselves.
  """
  config = the_store.config
  rows = [row for row in rows if row.screening]
  by_researchers = grouped((r for r in rows if r.is_researcher), 'task_id')
  by_labeler = grouped((r for r in rows if not r.is_researcher), 'account_id')
  with the_store.read() as c:
    grades = grouped(c.execute(sa.select(schema.grades)), 'assignment_id')
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
  """Tasks, wanted answers and labelers' assignments by state, per batch."""
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
