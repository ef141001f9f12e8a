"""What researchers do: import, screening, agreement, export.

Agreement counts pairs of outputs that both people ordered; a pair that either
tied is left out, as in `evals.preference_accuracy`.
"""

import codecs
import collections
import dataclasses
import datetime
import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from etils import epath

from instruct_jax.data import folders, invisible, labels, records
from instruct_jax.evals import preference_accuracy, win_rate
from instruct_jax.labeling import answers, schema, store

MAX_OUTPUTS = 12
_FIELDS = {
  'prompt': str,
  'text': str,
  'id': str,
  'user': str,
  'category': str,
  'style': str,
  'completions': list,
  'models': list,
  'metadata': dict,
  'turns': list,
}
# What of them is kept with a task.
_RECORD = ('id', 'user', 'category', 'metadata', 'style', 'turns')


# --- Import -----------------------------------------------------------------


def _problems(values, kind):
  """What keeps one imported object from being a task of this kind."""
  found = []
  for name, value in values.items():
    if name not in _FIELDS:
      found.append(
        f'unknown field {name!r}; known: {", ".join(_FIELDS)}; put anything '
        'else under "metadata"'
      )
    elif not isinstance(value, _FIELDS[name]):
      found.append(f'{name!r} must be a {_FIELDS[name].__name__}')
  if found:
    return found
  turns = values.get('turns', [])
  num_texts = ('prompt' in values) + ('text' in values)
  if num_texts == 2 or not (num_texts or turns):
    found.append("give either 'prompt' or 'text'; or 'turns'")
  else:
    found += records.problems(_asked(values), records.Prompt)
  completions = values.get('completions', [])
  models = values['models'] if 'models' in values else ['' for _ in completions]
  texts = [*completions, *models]
  if not all(isinstance(text, str) for text in texts):
    found.append("'completions' and 'models' must be lists of strings")
    return found
  if len(models) != len(completions):
    found.append(
      f"'models' has {len(models)} names for {len(completions)} completions"
    )
  least = {'rating': 1, 'ranking': 2, 'toxicity': 2}.get(kind, 0)
  most = MAX_OUTPUTS if least else 0
  if not least <= len(completions) <= most:
    found.append(
      f'{len(completions)} completions; a {kind} task has {least} to {most}'
    )
  style = values.get('style', 'plain')
  if style not in answers.STYLES:
    found.append(f"'style' must be one of {', '.join(answers.STYLES)}")
  texts += [value for value in values.values() if isinstance(value, str)]
  if not found:
    texts += [turn['content'] for turn in turns]
  try:
    for text in texts:
      answers.clean(text, 'A text')
  except answers.AnswerError as error:
    found.append(str(error))
  return found


def _asked(values):
  """What a line asks, by the names that `records.Prompt` has for it."""
  text = values['prompt'] if 'prompt' in values else values.get('text')
  asked = {'id': '-', 'text': text, 'turns': values.get('turns', [])}
  return records.completed(asked, records.Prompt)


def _turns(values):
  return tuple(records.Turn(**turn) for turn in values.get('turns', ()))


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
  by: int | None = None,
) -> int:
  """Makes a batch of tasks from JSONL; all lines or none.

  A line is {"prompt": "...", "completions": ["...", ...], "models": ["sft",
  ...]} and may have id, user, category, metadata and, for kind `prompt`, style;
  `text` may stand for `prompt`, and so may `turns`, so `records.Prompt` files
  are demonstration tasks as they are. A line of kind `rating` makes one task
  per completion.

  Args:
    the_store: where to.
    content: the file.
    source: its name, for messages.
    name: of the batch; unique.
    kind: one of `answers.KINDS`.
    phase: one of `answers.PHASES`: the instructions that labelers see.
    overlap: labelers a task; without effect in screening.
    screening: whether new labelers are compared with researchers on it.
    by: the account that imports.

  Returns:
    The number of tasks.

  Raises:
    RecordError: bad lines, up to ten of them as `file:line: what, what to do`.
    StoreError: a setting that cannot be.
  """
  if kind not in answers.KINDS:
    raise store.StoreError(
      f'kind {kind!r} is not one of {", ".join(answers.KINDS)}'
    )
  if phase not in answers.PHASES:
    raise store.StoreError(
      f'phase {phase!r} is not one of {", ".join(answers.PHASES)}'
    )
  if not 1 <= overlap <= 100:
    raise store.StoreError(f'overlap must be from 1 to 100, found {overlap}')
  name = answers.clean(name, 'The name').strip()
  if len(name) > 80 or invisible.is_blank(name):
    raise store.StoreError('The batch needs a name of at most 80 characters')
  items, bad = [], []
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
    found = _problems(values, kind)
    # PostgreSQL takes no NUL inside JSON either.
    if '\\u0000' in json.dumps(values):
      found.append('holds a NUL character; remove it')
    bad += [(number, problem) for problem in found]
    items.append(values)
  records.raise_problems(source, bad)
  if not items:
    raise records.RecordError(f'{source}: holds no tasks')
  with the_store.write() as c:
    if c.scalar(
      sa.select(schema.batches.c.id).where(schema.batches.c.name == name)
    ):
      raise store.StoreError(f'There is a batch {name!r} already')
    batch_id = c.execute(
      schema.batches.insert().values(
        name=name,
        kind=kind,
        phase=phase,
        overlap=overlap,
        screening=screening,
        closed=False,
        created=the_store.clock(),
      )
    ).inserted_primary_key[0]
    count = 0
    for item in items:
      completions = item.get('completions', [])
      models = item['models'] if 'models' in item else [''] * len(completions)
      pairs = list(zip(completions, models, strict=True))
      for group in [[pair] for pair in pairs] if kind == 'rating' else [pairs]:
        count += 1
        task_id = c.execute(
          schema.tasks.insert().values(
            batch_id=batch_id,
            prompt=_asked(item)['text'],
            record={key: item[key] for key in _RECORD if key in item},
          )
        ).inserted_primary_key[0]
        for position, (text, model) in enumerate(group):
          c.execute(
            schema.outputs.insert().values(
              task_id=task_id, position=position, text=text, model=model
            )
          )
        if not screening:
          c.execute(
            schema.slots.insert(),
            [
              {'task_id': task_id, 'number': i, 'holder': None}
              for i in range(1, overlap + 1)
            ],
          )
    the_store.audit(c, by, 'import', f'{name}: {count} {kind} tasks')
  return count


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
  prompt: str
  record: dict[str, Any]
  texts: tuple[str, ...]
  models: tuple[str, ...]
  account_id: int
  labeler: str
  role: str
  content: dict[str, Any]
  order: tuple[int, ...]
  instructions: str
  time: float
  seconds: float
  revision: int

  @property
  def is_researcher(self) -> bool:
    return self.role != 'labeler'


def labeled(the_store: store.Store, task_id: int | None = None):
  """All answers that count, of one task or of all, oldest first."""
  t = schema
  newest = (
    sa.select(
      t.answers.c.assignment_id,
      sa.func.max(t.answers.c.revision).label('revision'),
    )
    .group_by(t.answers.c.assignment_id)
    .subquery()
  )
  query = (
    sa.select(
      t.answers,
      t.assignments.c.task_id,
      t.assignments.c.account_id,
      t.assignments.c.order,
      t.tasks.c.prompt,
      t.tasks.c.record,
      t.batches.c.name.label('batch'),
      t.batches.c.kind,
      t.batches.c.phase,
      t.batches.c.screening,
      t.accounts.c.name.label('labeler'),
      t.accounts.c.role,
      t.instructions.c.phase.label('instruction_phase'),
      t.instructions.c.version,
    )
    .join(
      newest,
      (newest.c.assignment_id == t.answers.c.assignment_id)
      & (newest.c.revision == t.answers.c.revision),
    )
    .join(t.assignments, t.assignments.c.id == t.answers.c.assignment_id)
    .join(t.tasks, t.tasks.c.id == t.assignments.c.task_id)
    .join(t.batches, t.batches.c.id == t.tasks.c.batch_id)
    .join(t.accounts, t.accounts.c.id == t.assignments.c.account_id)
    .join(t.instructions, t.instructions.c.id == t.answers.c.instruction_id)
    .order_by(t.answers.c.id)
  )
  wanted_outputs = sa.select(t.outputs).order_by(t.outputs.c.position)
  if task_id is not None:
    query = query.where(t.tasks.c.id == task_id)
    wanted_outputs = wanted_outputs.where(t.outputs.c.task_id == task_id)
  with the_store.read() as c:
    rows = c.execute(query).all()
    outputs = collections.defaultdict(list)
    for row in c.execute(wanted_outputs):
      outputs[row.task_id].append(row)
  return [
    Labeled(
      assignment_id=row.assignment_id,
      task_id=row.task_id,
      batch=row.batch,
      kind=row.kind,
      phase=row.phase,
      screening=row.screening,
      prompt=row.prompt,
      record=row.record,
      texts=tuple(output.text for output in outputs[row.task_id]),
      models=tuple(output.model for output in outputs[row.task_id]),
      account_id=row.account_id,
      labeler=row.labeler,
      role=row.role,
      content=row.content,
      order=tuple(row.order),
      instructions=f'{row.instruction_phase}/{row.version}',
      time=row.time,
      seconds=row.seconds,
      revision=row.revision,
    )
    for row in rows
  ]


# --- Agreement --------------------------------------------------------------


def _interval(counts, seed):
  """counts: list of (agreed, counted, task id)."""
  agreed, counted, clusters = zip(*counts, strict=True) if counts else ((),) * 3
  if not sum(counted):
    return None
  interval = win_rate.ratio_interval(agreed, counted, clusters, seed=seed)
  return preference_accuracy.Agreement(
    interval.mean, interval.low, interval.high, sum(counted)
  )


def _between(rows, keep, seed):
  """Agreement over rankings of one task by two people for whom `keep` holds."""
  by_task = collections.defaultdict(list)
  for row in rows:
    by_task[row.task_id].append(row)
  counts = [
    (*labels.pair_counts(a.content['ranks'], b.content['ranks']), task_id)
    for task_id, group in by_task.items()
    for a, b in itertools.combinations(group, 2)
    if keep(a, b)
  ]
  return _interval(counts, seed)


def _ranked(rows):
  return [row for row in rows if row.kind in answers.RANKED]


def agreement(rows: Sequence[Labeled], seed: int) -> dict[str, Any]:
  """Of labelers with one another, with researchers, and researchers' own."""
  rows = _ranked(rows)
  return {
    'labelers': _between(
      rows, lambda a, b: not a.is_researcher and not b.is_researcher, seed
    ),
    'labelers and researchers': _between(
      rows, lambda a, b: a.is_researcher != b.is_researcher, seed
    ),
    'researchers': _between(
      rows, lambda a, b: a.is_researcher and b.is_researcher, seed
    ),
  }


def disagreements(rows: Sequence[Labeled]) -> list[dict[str, Any]]:
  """Ranked tasks with several answers, the least agreed first."""
  by_task = collections.defaultdict(list)
  for row in _ranked(rows):
    by_task[row.task_id].append(row)
  found = []
  for task_id, group in by_task.items():
    pairs = [
      labels.pair_counts(a.content['ranks'], b.content['ranks'])
      for a, b in itertools.combinations(group, 2)
    ]
    counted = sum(pair[1] for pair in pairs)
    if counted:
      agreed = sum(pair[0] for pair in pairs)
      found.append(
        {
          'task_id': task_id,
          'prompt': group[0].prompt,
          'batch': group[0].batch,
          'rate': agreed / counted,
          'num_pairs': counted,
          'people': len(group),
        }
      )
  return sorted(found, key=lambda item: (item['rate'], item['task_id']))


# --- People -----------------------------------------------------------------


def _median(values):
  ordered = sorted(values)
  return ordered[len(ordered) // 2] if ordered else None


def people(the_store: store.Store, rows: Sequence[Labeled]) -> list[dict]:
  """Per account: answers, pace, ties, skips, agreement with intervals."""
  seed = the_store.config.seed
  t = schema
  with the_store.read() as c:
    accounts = c.execute(sa.select(t.accounts).order_by(t.accounts.c.id)).all()
    states = collections.defaultdict(collections.Counter)
    for row in c.execute(
      sa.select(
        t.assignments.c.account_id, t.assignments.c.state, sa.func.count()
      ).group_by(t.assignments.c.account_id, t.assignments.c.state)
    ):
      states[row[0]][row[1]] = row[2]
  ranked = _ranked(rows)
  found = []
  for account in accounts:
    own = [row for row in rows if row.account_id == account.id]
    ties = pairs = 0
    for row in _ranked(own):
      for a, b in itertools.combinations(row.content['ranks'], 2):
        ties += a == b
        pairs += 1
    seconds = sum(row.seconds for row in own)
    skipped = states[account.id]['skipped']

    def mine(a, b, me=account.id):
      return me in (a.account_id, b.account_id)

    found.append(
      {
        'id': account.id,
        'name': account.name,
        'role': account.role,
        'status': account.status,
        'answers': len(own),
        'open': states[account.id]['open'],
        'median_seconds': _median([row.seconds for row in own]),
        'per_hour': len(own) / (seconds / 3600) if seconds > 0 else None,
        'tie_rate': ties / pairs if pairs else None,
        'skip_rate': skipped / (skipped + len(own))
        if skipped + len(own)
        else None,
        'last': max((row.time for row in own), default=None),
        'agreement': _between(
          ranked,
          lambda a, b, mine=mine: (
            mine(a, b) and not a.is_researcher and not b.is_researcher
          ),
          seed,
        ),
        'with_researchers': _between(
          ranked,
          lambda a, b, mine=mine: (
            mine(a, b) and a.is_researcher != b.is_researcher
          ),
          seed,
        ),
      }
    )
  return found


def screening(the_store: store.Store, rows: Sequence[Labeled]) -> list[dict]:
  """Per labeler in the screening round: B.1's first three criteria.

  Flags: share of prompts on which the labeler's answer to "sensitive" is a
  researcher's. Rankings: share of pairs ordered alike. Demonstrations: mean
  grade by researchers. Each with its cut-off; None where nothing can be
  compared yet. The fourth criterion asks people about themselves; we do not.
  """
  config = the_store.config
  rows = [row for row in rows if row.screening]
  by_task = collections.defaultdict(list)
  for row in rows:
    if row.is_researcher:
      by_task[row.task_id].append(row)
  with the_store.read() as c:
    grades = collections.defaultdict(list)
    for row in c.execute(sa.select(schema.grades)):
      grades[row.assignment_id].append(row.grade)
  found = {}
  for row in rows:
    if row.is_researcher:
      continue
    person = found.setdefault(
      row.account_id,
      {
        'id': row.account_id,
        'name': row.labeler,
        'done': 0,
        'flags': [],
        'rankings': [],
        'grades': [],
      },
    )
    person['done'] += 1
    person['grades'] += grades[row.assignment_id]
    for other in by_task[row.task_id]:
      if 'prompt' in row.content and 'sensitive' in row.content['prompt']:
        same = (
          row.content['prompt']['sensitive']
          == other.content['prompt']['sensitive']
        )
        person['flags'].append((int(same), 1, row.task_id))
      if row.kind in answers.RANKED:
        pair = labels.pair_counts(row.content['ranks'], other.content['ranks'])
        person['rankings'].append((*pair, row.task_id))
  for person in found.values():
    for name in ('flags', 'rankings'):
      person[name] = _interval(person[name], config.seed)
    marks = person.pop('grades')
    person['demonstrations'] = sum(marks) / len(marks) if marks else None
    checks = [
      (person['flags'] and person['flags'].rate, config.cut_flags),
      (person['rankings'] and person['rankings'].rate, config.cut_rankings),
      (person['demonstrations'], config.cut_demonstrations),
    ]
    known = [value >= cut for value, cut in checks if value is not None]
    person['passes'] = all(known) if known else None
  return list(found.values())


def grade(
  the_store: store.Store, assignment_id: int, account_id: int, value: int
) -> None:
  """A researcher's grade, 1 to 7, of a screening demonstration."""
  if not 1 <= value <= 7:
    raise store.StoreError('A grade is from 1 to 7')
  t = schema
  with the_store.write() as c:
    if not c.scalar(
      sa.select(t.assignments.c.id)
      .join(t.tasks, t.tasks.c.id == t.assignments.c.task_id)
      .join(t.batches, t.batches.c.id == t.tasks.c.batch_id)
      .where(
        t.assignments.c.id == assignment_id,
        t.assignments.c.state == 'submitted',
        t.batches.c.screening,
        t.batches.c.kind == 'demonstration',
      )
    ):
      raise store.StoreError('No such demonstration')
    c.execute(
      t.grades.delete().where(
        t.grades.c.assignment_id == assignment_id,
        t.grades.c.account_id == account_id,
      )
    )
    c.execute(
      t.grades.insert().values(
        assignment_id=assignment_id, account_id=account_id, grade=value
      )
    )


def progress(the_store: store.Store) -> list[dict[str, Any]]:
  """Per batch: tasks, wanted answers, and how many are in each state."""
  t = schema
  with the_store.read() as c:
    batches = c.execute(sa.select(t.batches).order_by(t.batches.c.id)).all()
    counts = dict(
      c.execute(
        sa.select(t.tasks.c.batch_id, sa.func.count()).group_by(
          t.tasks.c.batch_id
        )
      ).all()
    )
    states = collections.defaultdict(collections.Counter)
    for row in c.execute(
      sa.select(
        t.tasks.c.batch_id,
        t.assignments.c.state,
        sa.func.count(),
      )
      .join(t.assignments, t.assignments.c.task_id == t.tasks.c.id)
      .join(t.accounts, t.accounts.c.id == t.assignments.c.account_id)
      .where(t.accounts.c.role == 'labeler')
      .group_by(t.tasks.c.batch_id, t.assignments.c.state)
    ):
      states[row[0]][row[1]] = row[2]
  return [
    {
      **batch._mapping,
      'num_tasks': counts[batch.id],
      'wanted': None if batch.screening else counts[batch.id] * batch.overlap,
      'submitted': states[batch.id]['submitted'],
      'open': states[batch.id]['open'],
      'skipped': states[batch.id]['skipped'],
    }
    for batch in batches
  ]


# --- Export -----------------------------------------------------------------


def _clock_text(seconds):
  moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
  return moment.isoformat(timespec='seconds')


def _own(row):
  """What every exported line says about where it comes from."""
  return {
    'batch': row.batch,
    'task': row.task_id,
    'instructions': row.instructions,
    'seconds': round(row.seconds, 1),
    'revision': row.revision,
    'time': _clock_text(row.time),
  }


def _given(row, name, otherwise=''):
  return row.record.get(name, otherwise)


def _comparison(row):
  metadata = {
    **_given(row, 'metadata', {}),
    'labeling': {
      **_own(row),
      'models': list(row.models),
      'order_shown': list(row.order),
      'about_prompt': row.content['prompt'],
      'ratings': row.content['ratings'],
    },
  }
  return records.Comparison(
    prompt=row.prompt,
    completions=row.texts,
    ranks=tuple(row.content['ranks']),
    id=_given(row, 'id') or f'task{row.task_id}',
    user=_given(row, 'user'),
    labeler=row.labeler,
    category=_given(row, 'category'),
    time=_clock_text(row.time),
    metadata=metadata,
    turns=_turns(row.record),
  )


def few_shot(instruction: str, pairs: Sequence[Sequence[str]]):
  """A.3: of K examples, each in turn is answered with the others as context.

  Yields:
    (prompt, response), K of them.
  """
  for i, (query, response) in enumerate(pairs):
    shown = [f'{q}\n{r}' for j, (q, r) in enumerate(pairs) if j != i]
    yield '\n\n'.join([instruction, *shown, f'{query}\n']), response


def _demonstrations(row):
  """(prompt, response) pairs that one answer gives."""
  if row.kind == 'demonstration':
    return [(row.prompt, row.content['response'])]
  if row.content['style'] == 'few-shot':
    return list(few_shot(row.content['text'], row.content['pairs']))
  pair = (row.content['text'], row.content['response'])
  return [] if invisible.is_blank(pair[1]) else [pair]


def _split(
  comparisons: Sequence[records.Comparison], fraction: float
) -> list[str]:
  """'train' or 'valid' of each comparison, about `fraction` of them valid.

  What shares a user (A.2) or the opening of a conversation is in one split, and
  so is what shares them by way of others.
  """
  first = {}

  def root(name):
    while first.setdefault(name, name) != name:
      name = first[name]
    return name

  # Users come before openings, which decide where there is none.
  def names(comparison):
    user = [(0, f'user {comparison.user}')] if comparison.user else []
    return [*user, (1, records.opening(comparison))]

  for comparison in comparisons:
    roots = sorted(map(root, names(comparison)))
    first.update(dict.fromkeys(roots, roots[0]))

  def split(comparison):
    _, unit = root(names(comparison)[0])
    digest = hashlib.sha256(unit.encode()).digest()
    is_valid = int.from_bytes(digest[:8], 'big') < fraction * 2**64
    return 'valid' if is_valid else 'train'

  return list(map(split, comparisons))


# All files that an export may write, besides statistics.json.
_EXPORTED = (
  'comparisons',
  'comparisons_train',
  'comparisons_valid',
  'comparisons_evaluation',
  'comparisons_toxicity',
  'comparisons_researchers',
  'demonstrations',
  'prompts',
  'ratings',
)


def export(the_store: store.Store, folder: epath.PathLike) -> dict[str, Any]:
  """Writes the files that the experiments read, and the statistics.

  comparisons.jsonl and its split by user and prompt into comparisons_train and
  comparisons_valid: rankings by labelers under the training instructions.
  comparisons_evaluation, comparisons_toxicity and comparisons_researchers are
  kept apart: they follow other criteria, or were made to compare with.
  demonstrations.jsonl, prompts.jsonl, ratings.jsonl, statistics.json. Answers
  of the screening round are not data and stay out. All files come together, and
  those of an earlier export go (`data/folders.py`).

  Returns:
    Line counts by file; a file without lines is not written.
  """
  everything = labeled(the_store)
  rows = [row for row in everything if not row.screening]
  files = collections.defaultdict(list)
  for row in rows:
    if row.kind in answers.RANKED:
      comparison = _comparison(row)
      if row.is_researcher:
        files['comparisons_researchers'].append(comparison)
      elif row.kind == 'toxicity':
        files['comparisons_toxicity'].append(comparison)
      elif row.phase != 'training':
        files['comparisons_evaluation'].append(comparison)
      else:
        files['comparisons'].append(comparison)
    elif row.kind in ('demonstration', 'prompt') and not row.is_researcher:
      own = {'labeling': _own(row)}
      written = row.kind == 'prompt'
      for i, (prompt, response) in enumerate(_demonstrations(row)):
        files['demonstrations'].append(
          records.Demonstration(
            prompt=prompt,
            response=response,
            id=f'answer{row.assignment_id}-{i}'
            if written
            else _given(row, 'id') or f'task{row.task_id}',
            # Who writes a prompt is its user.
            user=row.labeler if written else _given(row, 'user'),
            labeler=row.labeler,
            category=_given(row, 'category'),
            metadata={**_given(row, 'metadata', {}), **own},
            turns=() if written else _turns(row.record),
          )
        )
      if written and row.content['style'] != 'few-shot':
        files['prompts'].append(
          records.Prompt(
            id=f'answer{row.assignment_id}',
            text=row.content['text'],
            user=row.labeler,
            category=_given(row, 'category'),
            metadata={'style': row.content['style'], **own},
          )
        )
  ratings = [
    {
      'prompt': row.prompt,
      'turns': row.record.get('turns', []),
      'completion': row.texts[position],
      'model': row.models[position],
      'kind': row.kind,
      'phase': row.phase,
      'rating': rating,
      'about_prompt': row.content['prompt'],
      'labeler': row.labeler,
      'researcher': row.is_researcher,
      'id': _given(row, 'id') or f'task{row.task_id}',
      **_own(row),
    }
    for row in rows
    if 'ratings' in row.content
    for position, rating in enumerate(row.content['ratings'])
  ]
  ranked = files['comparisons']
  splits = _split(ranked, the_store.config.valid_fraction)
  for comparison, split in zip(ranked, splits, strict=True):
    files[f'comparisons_{split}'].append(comparison)
  files = {name: found for name, found in files.items() if found}
  counts = {name: len(found) for name, found in sorted(files.items())}
  if ratings:
    counts['ratings'] = len(ratings)
  summary = statistics(the_store, everything) | {'files': counts}
  with folders.writing(
    folder,
    ('statistics.json', *(f'{name}.jsonl' for name in _EXPORTED)),
    command='labeling --export',
    replace=True,
  ) as unfinished:
    for name, found in files.items():
      records.write_jsonl(unfinished / f'{name}.jsonl', found)
    if ratings:
      lines = [json.dumps(line, ensure_ascii=False) for line in ratings]
      records.write_bytes(
        unfinished / 'ratings.jsonl', '\n'.join([*lines, '']).encode()
      )
    records.write_bytes(
      unfinished / 'statistics.json', json.dumps(summary, indent=2).encode()
    )
  return counts


def statistics(the_store: store.Store, rows: Sequence[Labeled]) -> dict:
  """What a model card says about the labelers (JSON)."""
  data = [row for row in rows if not row.screening]
  by_labelers = [row for row in data if not row.is_researcher]
  plain = [
    {
      name: dataclasses.asdict(value)
      if dataclasses.is_dataclass(value)
      else value
      for name, value in person.items()
      if name not in ('id', 'last', 'open')
    }
    for person in people(the_store, data)
    if person['answers']
  ]
  return {
    'num_labelers': len({row.account_id for row in by_labelers}),
    'num_answers': len(by_labelers),
    'by_kind': dict(collections.Counter(row.kind for row in by_labelers)),
    'instructions': sorted({row.instructions for row in by_labelers}),
    'agreement': {
      name: value and dataclasses.asdict(value)
      for name, value in agreement(data, the_store.config.seed).items()
    },
    'labelers': plain,
  }
