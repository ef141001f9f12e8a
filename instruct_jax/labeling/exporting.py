"""Exports the files that the experiments read, and other programs' JSON."""

import collections
import dataclasses
import datetime
import hashlib
import itertools
import json
from collections.abc import Sequence

import sqlalchemy as sa
from etils import epath
from scipy.cluster import hierarchy

from instruct_jax.data import folders, invisible, records
from instruct_jax.evals import preference_accuracy
from instruct_jax.labeling import (
  answers,
  formats,
  parts,
  research,
  schema,
  store,
)


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
  if isinstance(row, research.Labeled):
    found |= {'seconds': round(row.seconds, 1), 'revision': row.revision}
  if 'active' in row.record:  # Such tasks are not a random sample.
    found['active'] = row.record['active']
  return found


def _id(row):
  return row.record.get('id') or f'task{row.task_id}'


def _metadata(row, **labeling):
  given = row.record.get('metadata', {})
  before = given.get('labeling')  # From a site whose export was imported.
  before = before if isinstance(before, dict) else {}
  kept = {k: v for k, v in before.items() if k == 'active'}
  return {**given, 'labeling': {**kept, **_origin(row), **labeling}}


def _turns(row):
  return tuple(records.Turn(**turn) for turn in row.record.get('turns', ()))


def _ranking(row, is_decided):
  """Converts an answer to a comparison."""
  found = {'adjudicated': True} if is_decided else {}
  if row.suggested is not None:
    shown = {'shown': _clock_text(row.suggested)}
    found['suggestion'] = row.record['suggestion'] | shown
  if answers.IMPORTED in row.content:
    found[answers.IMPORTED] = row.content[answers.IMPORTED]
  else:
    found |= {
      'order_shown': list(row.order),
      'about_prompt': row.content['prompt'],
      'ratings': row.content['ratings'],
    }
  return _comparison(row, row.content['ranks'], **found)


def _decided(row):
  """Converts a decision to a comparison that is marked as one."""
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
  the same split, even if only a chain of such comparisons links them.
  """
  # Users sort before openings, so a group with users is named after one.
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
  'comparisons_adjudicated', 'comparisons_evaluation_adjudicated',
  'comparisons_toxicity_adjudicated', 'demonstrations', 'prompts', 'ratings',
)  # fmt: skip


def _comparisons_file(row):
  """Name of the file for a ranking, by the criterion of the ranking."""
  if row.kind == 'toxicity':
    return 'comparisons_toxicity'
  is_training = row.phase == 'training'
  return 'comparisons' if is_training else 'comparisons_evaluation'


def _files(rows, decided, valid_fraction):
  """File name -> its records; empty files are left out."""
  files = collections.defaultdict(list)
  for row in decided:
    files[f'{_comparisons_file(row)}_adjudicated'].append(_decided(row))
  tasks = {row.task_id for row in decided}
  for row in rows:
    files['ratings'] += _ratings(row)
    if row.kind in answers.RANKED:
      found = _ranking(row, row.task_id in tasks)
      name = _comparisons_file(row)
      name = 'comparisons_researchers' if row.is_researcher else name
      files[name].append(found)
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
  Rankings by other criteria, and researchers' for comparison, are in separate
  files (comparisons_evaluation, _toxicity, _researchers). So are researchers'
  decisions, by criterion (comparisons_adjudicated and so on); the labelers'
  rankings of these tasks say `adjudicated` in their metadata. The other files
  are demonstrations, prompts and ratings. Answers to screening and calibration
  tasks are not exported. All files appear at once, and those of an earlier
  export are removed (`data/folders.py`).

  Returns:
    Line counts by file; a file without lines is not written.
  """
  everything = research.labeled(the_store)
  rows = [row for row in everything if row.is_data]
  fraction = the_store.config.valid_fraction
  files = _files(rows, research.decisions(the_store), fraction)
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


def export_as(
  the_store: store.Store, folder: epath.PathLike, file_format: str
) -> dict[str, int]:
  """Writes all ranking tasks, with their answers, for another program.

  The answers are labelers' rankings, skips and drafts, and researchers'
  decisions. Screening and calibration are left out. See `formats.written`.

  Args:
    the_store: the site's store.
    folder: for the files; those of an earlier export are removed.
    file_format: 'argilla' or 'label_studio'.

  Returns:
    The number of tasks in each file.

  Raises:
    StoreError: there are no tasks to rank.
  """
  items = _items(the_store)
  if not items:
    raise store.StoreError('There are no tasks to rank; nothing was exported')
  files = formats.written(file_format, items)
  with folders.writing(
    folder,
    (f'{file_format}*.json', f'{file_format}.xml'),
    command='labeling --export',
    replace=True,
  ) as unfinished:
    for name, content in files.items():
      records.write_bytes(unfinished / name, content)
  counts = collections.Counter(
    len(item.values['completions']) for item in items
  )
  return {
    name: counts[int(name[len('argilla_') : -len('.json')])]
    if file_format == 'argilla'
    else len(items)
    for name in files
    if name.endswith('.json')
  }


def _items(the_store):
  """The ranking tasks, with their answers, for another program."""
  tasks, batches = schema.tasks, schema.batches
  assignments, accounts = schema.assignments, schema.accounts
  wanted = (batches.c.kind.in_(answers.RANKED), *research.IN_DATA)
  query = (
    sa.select(
      tasks.c['id', 'prompt', 'record'],
      batches.c['name', 'kind', 'phase', 'suggestions'],
    )
    .join(batches)
    .where(*wanted)
    .order_by(tasks.c.id)
  )
  others = (
    sa.select(
      assignments.c['task_id', 'account_id', 'state', 'draft', 'reason'],
      assignments.c['touched', 'seconds'],
      accounts.c.name,
    )
    .select_from(schema.work.join(accounts))
    .where(
      *wanted,
      accounts.c.role == 'labeler',
      assignments.c.state != 'submitted',
    )
    .order_by(assignments.c.id)
  )
  decided = sa.select(schema.decisions, accounts.c.name).join(accounts)
  found = collections.defaultdict(list)
  for row in research.labeled(the_store):
    if row.is_data and not row.is_researcher and row.kind in answers.RANKED:
      found[row.task_id].append(
        parts.Answer(
          row.labeler,
          'submitted',
          tuple(row.content['ranks']),
          row.time,
          row.seconds,
          account=row.account_id,
        )
      )
  with the_store.read() as c:
    rows = c.execute(query).all()
    outputs = research.outputs_of(c)
    for row in c.execute(others):
      number = len(outputs[row.task_id]['texts'])
      answer = _unsubmitted(row, number)
      found[row.task_id] += [answer] if answer else []
    for row in c.execute(decided):
      found[row.task_id].append(
        parts.Answer(
          row.name,
          'decided',
          tuple(row.ranks),
          row.time,
          note=row.note,
          account=row.account_id,
        )
      )
  return [
    parts.Item(
      {
        'prompt': row.prompt,
        'completions': list(outputs[row.id]['texts']),
        'models': list(outputs[row.id]['models']),
        **_kept(row.record),
      },
      tuple(found[row.id]),
      {name: getattr(row, name) for name in ('name', 'kind', 'phase')},
      row.id,
      row.suggestions,
    )
    for row in rows
  ]


def _kept(record):
  """The imported line's fields; its metadata says what set the priority."""
  found = {k: record[k] for k in schema.RECORD_FIELDS if k in record}
  if 'active' in record:
    labeling = {'labeling': {'active': record['active']}}
    found['metadata'] = record.get('metadata', {}) | labeling
  return found


def _unsubmitted(row, num_outputs):
  """Converts a skip or a draft to an answer; None for an empty draft."""
  about = {'time': row.touched, 'seconds': row.seconds}
  about |= {'account': row.account_id}
  if row.state == 'skipped':
    return parts.Answer(row.name, 'skipped', note=row.reason, **about)
  draft = row.draft.get('ranks', {})
  # A draft holds text as it was posted, which may not be a rank.
  known = {str(rank): rank for rank in range(1, num_outputs + 1)}
  ranks = tuple(
    known.get(draft.get(f'rank{position}')) for position in range(num_outputs)
  )
  if not any(ranks):
    return None
  return parts.Answer(row.name, 'unfinished', ranks, **about)


def statistics(
  the_store: store.Store, rows: Sequence[research.Labeled]
) -> dict:
  """What a model card says about the labelers (JSON)."""
  data = [row for row in rows if row.is_data]
  seed = the_store.config.seed
  scores = research.calibration(rows, seed)
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
    'agreement': plain(research.agreement(data, seed)),
    'agreement_by_version': [
      row | {'agreement': plain(row['agreement'])}
      for row in research.agreement_by_version(data, seed)
    ],
    'suggestions_shown': sum(row.suggested is not None for row in by_labelers),
    'ordered_by': sorted(
      {row.record['active']['by'] for row in data if 'active' in row.record}
    ),
    'labelers': [
      plain(person | {'calibration': scores.get(person['id'])})
      for person in research.people(the_store, data, *research.IN_DATA)
      if person['answers']
    ],
  }
