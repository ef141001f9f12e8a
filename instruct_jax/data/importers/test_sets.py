"""Readers for small preference sets that test reward models and judges."""

import collections
import dataclasses
import html
import json

from etils import epath

from instruct_jax.data import records, sources
from instruct_jax.data.importers.entries import (
  FIRST,
  SECOND,
  TIE,
  Rating,
  Skip,
  asked,
  instruction_prompt,
  rated_reader,
  reader,
  stem,
  texts_of,
)


def _folder(entry) -> str:
  return epath.Path(entry.path).parent.name


# --- Arguments ----------------------------------------------------------------


def _tab_entries(path):
  """Rows of tab-separated files, in which quotation marks are plain text."""
  header, *lines = records.read_text(path).split('\n')
  columns = header.rstrip('\r').split('\t')
  for number, line in enumerate(lines, start=2):
    fields = line.rstrip('\r').split('\t')
    if not line.strip():
      continue
    if len(fields) != len(columns):
      yield number, f'{len(fields)} fields for {len(columns)} columns'
    else:
      yield number, dict(zip(columns, fields, strict=True))


def _debate(entry) -> tuple[records.Turn, ...]:
  """The prompt for arguments, from a file name such as TOPIC_STANCE.csv."""
  topic, _, stance = stem(entry.path).partition('_')
  if not stance:
    raise records.RecordError(
      f'the file is called {stem(entry.path)!r}; upstream calls it '
      'TOPIC_STANCE, and both belong to the prompt'
    )
  topic, stance = (
    ' '.join(text.replace('-', ' ').split()) for text in (topic, stance)
  )
  return asked(
    f'Debate: {topic}\nStance: {stance}\n\nGive an argument for this stance.'
  )


def _argument(text: str) -> str:
  lines = html.unescape(text).split('<br/>')
  return '\n'.join(' '.join(line.split()) for line in lines)


def _add_ukp(imported, entry):
  """UKP: two arguments for one side of a debate, one more convincing."""
  ranks = entry.label('label', {'a1': FIRST, 'a2': SECOND, 'equal': TIE})
  imported.add_ranked(
    _debate(entry),
    [_argument(entry.answer(key)) for key in ('a1', 'a2')],
    ranks,
    id=f'ukp:{entry.text("#id")}',
    category=stem(entry.path),
  )


def _rate_ukp(entry):
  """UKP: an argument for one side; a lower rank is more convincing."""
  rank = entry.number('rank')
  if rank is None:
    raise Skip('an argument has no rank')
  name = stem(entry.path)
  return Rating(
    name,
    _debate(entry),
    _argument(entry.answer('argument')),
    -rank,
    about={'id': f'ukp_ranking:{name}', 'category': name},
    each={'ids': entry.text('#id')},
  )


# --- Answers of assistants ----------------------------------------------------


_HHH_SUBSETS = ('harmless', 'helpful', 'honest', 'other')


def _hhh_entries(path):
  """The examples of BIG-bench's task.json, or rows of the Hub."""
  name = str(path).removesuffix('.gz')
  if name.endswith('.json') and records.begins_with(path, b'{'):
    try:
      task = json.loads(records.read_text(path))
    except (ValueError, RecursionError):
      task = None  # One object a line.
    if isinstance(task, dict) and isinstance(task.get('examples'), list):
      for number, example in enumerate(task['examples'], start=1):
        is_object = isinstance(example, dict)
        yield number, example if is_object else 'an example is not an object'
      return
  yield from sources.read_objects(path)


def _add_hhh(imported, entry):
  """HHH: answers to a question or a dialogue, one of which is right."""
  if 'target_scores' in entry.values:
    targets = entry.entry('target_scores')
    answers = texts_of(list(targets.values), 'target_scores')
    scores = [targets.number(answer) for answer in targets.values]
  else:
    targets = entry.entry('targets')
    answers, labels = targets.json_texts('choices'), targets.items('labels')
    if len(labels) != len(answers) or any(
      label not in (0, 1) for label in labels
    ):
      raise records.RecordError("'labels' must have 0 or 1 for each choice")
    scores = labels
  if None in scores:
    raise Skip('an answer has no score')
  parts = epath.Path(entry.path).parent.parts
  subsets = [part for part in parts if part in _HHH_SUBSETS]
  imported.add_ranked(
    _hhh_turns(entry.text('input')),
    answers,
    [-score for score in scores],
    id=f'hhh:{entry.name}',
    category=subsets[-1] if subsets else '',
  )


def _hhh_turns(text: str) -> tuple[records.Turn, ...]:
  """The turns of a question, or of a dialogue.

  The dialogue's first "Human:" may be missing.
  """
  marked = text.strip().removeprefix('Human:').strip()
  turns = records.dialogue_turns(f'\n\nHuman: {marked}')
  return turns if len(turns) % 2 else asked(text)


@reader
def read_llmbar(imported, entry):
  """LLMBar: two outputs for an instruction, and the number of the better."""
  imported.add_ranked(
    asked(entry.text('input')),
    (entry.answer('output_1'), entry.answer('output_2')),
    entry.label('label', {'1': FIRST, '2': SECOND}),
    id=f'llmbar:{_folder(entry)}:{entry.line}',
    category=_folder(entry),
  )


@reader
def read_pandalm(imported, entry):
  """PandaLM: two answers and three votes, of which the majority counts.

  A vote is 1, 2, or 0 for a tie.
  """
  meanings = {'1': FIRST, '2': SECOND, '0': TIE}
  votes = [entry.label(f'annotator{number}', meanings) for number in (1, 2, 3)]
  (ranks, count), *_ = collections.Counter(votes).most_common(1)
  if count < 2:
    raise Skip('all three annotators differ')
  prompt = instruction_prompt(entry.cell('instruction'), entry.cell('input'))
  imported.add_ranked(
    asked(prompt),
    [entry.answer(key, entry.cell) for key in ('response1', 'response2')],
    ranks,
    id=f'pandalm:{entry.optional("idx") or entry.name}',
    category=entry.optional('motivation_app'),
    metadata={
      'agreed': count,
      **entry.details('cmp_key'),
    },
  )


@reader
def read_autoj(imported, entry):
  """testdata_pairwise.jsonl of Auto-J: two answers and a person's label."""
  imported.add_ranked(
    asked(entry.text('prompt')),
    (entry.answer('response 1'), entry.answer('response 2')),
    entry.label('label', {'0': FIRST, '1': SECOND, '2': TIE}),
    id=f'autoj:{entry.name}',
    category=entry.text('scenario'),
  )


_TULU = {
  'a-is-better': FIRST,
  'a-is-slightly-better': FIRST,
  'tie': TIE,
  'b-is-slightly-better': SECOND,
  'b-is-better': SECOND,
}


@reader
def _read_all_tulu(imported, entry):
  if entry.optional('instance_quality'):
    raise Skip('remarks on an instance instead of a preference')
  ranks = entry.label('preference', _TULU)
  imported.add_ranked(
    asked(entry.cell('prompt')),
    [entry.answer(f'completion_{side}', entry.cell) for side in 'ab'],
    ranks,
    id=f'tulu:{entry.cell("instance_id")}',
    labeler=entry.cell('evaluator'),
    time=entry.optional('timestamp'),
    metadata={
      'preference': entry.text('preference').strip(),
      **entry.details(
        'completion_a_is_acceptable', 'completion_b_is_acceptable'
      ),
    },
    each={'models': [entry.text('model_a'), entry.text('model_b')]},
  )


def read_tulu_human(path):
  """Annotations from the interface of Tulu 1, an Excel or CSV table.

  If one person judged an instance several times, the last judgment counts, as
  in upstream's figures.
  """
  imported = _read_all_tulu(path)
  latest = {}
  for row in sorted(imported.comparisons, key=lambda row: row.time):
    models = tuple(sorted(row.metadata['models']))
    latest[row.id, row.labeler, models] = row
  kept = set(map(id, latest.values()))
  rows = [row for row in imported.comparisons if id(row) in kept]
  imported.skip(
    'judged again by the same person', len(imported.comparisons) - len(rows)
  )
  return dataclasses.replace(imported, comparisons=rows)


READERS = {
  'ukp': reader(_add_ukp, entries=_tab_entries),
  'ukp_ranking': rated_reader(_rate_ukp, entries=_tab_entries),
  'hhh': reader(_add_hhh, entries=_hhh_entries),
  'llmbar': read_llmbar,
  'pandalm': read_pandalm,
  'autoj': read_autoj,
  'tulu_human': read_tulu_human,
}
