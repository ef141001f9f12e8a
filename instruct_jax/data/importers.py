"""Public human data in its published formats, as records.

One function a format, from a file (plain or `.gz`, JSON or JSONL) to an
`Imported`. Unusable entries are counted with their reason; a file of another
format is an error with line and key. Null, and the NaN of tables, is the empty
text.

  hh                    Anthropic HH (Bai et al. 2022): chosen, rejected
  oasst                 OpenAssistant trees (Köpf et al. 2023)
  summarize_feedback    OpenAI, batch*.json of Stiennon et al. 2020
  tldr                  OpenAI's filtered TL;DR, *.jsonl
  qa_feedback           Wu et al. 2023: four answers, six preferences
  dolly                 databricks-dolly-15k, and prompt/response files
  self_instruct         Wang et al. 2022: tasks with instances
  alpaca                instruction, input, output
  natural_instructions  versions 1 and 2, one task a file
  e2e_demonstrations, e2e_quality, e2e_naturalness    `restaurant.py`

Prompts of conversations have `turns`, and their text is `records.text_of_turns`
of them; completions then begin with the space that follows "Assistant:" in HH
files. Prompts of instructions end in a blank line. Demonstrations that a model
wrote (`sources.model_of`) are kept apart.
"""

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from instruct_jax.data import invisible, records, restaurant, sources

# What `convert` prints besides the counts of a format.
NOTES = {
  'hh': (
    'the demonstrations are the chosen answers: models wrote them, people chose'
  ),
}
# "No input" as annotators and models spell it. `Na` alone is sodium.
_NO_INPUT = re.compile(
  r'[<\[({"\'*]*(?:no[\s_-]*inputs?'
  r'(?:[\s_-]*(?:is|was|are))?'
  r'(?:[\s_-]*(?:required|needed|necessary|provided|given|available))?'
  r'|n/a|n\.a\.?|none|null|nan|not[\s_-]applicable)[>\])}"\'*.!]*',
  re.IGNORECASE,
)


def _list():
  return dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Imported:
  """The content of files.

  `demonstrations` are by people, as far as the file says;
  `model_demonstrations` by the model that `labeler` names. `skipped` counts
  entries left out by reason.
  """

  demonstrations: list[records.Demonstration] = _list()
  comparisons: list[records.Comparison] = _list()
  model_demonstrations: list[records.Demonstration] = _list()
  skipped: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )

  def add(self, demonstration: records.Demonstration, model: str = '') -> None:
    """Adds what a person wrote, or the model of that name."""
    if model:
      self.model_demonstrations.append(
        dataclasses.replace(demonstration, labeler=f'model:{model}')
      )
    else:
      self.demonstrations.append(demonstration)

  def skip(self, reason: str, count: int = 1) -> None:
    """Counts entries that are left out."""
    if count:
      self.skipped[reason] += count

  def extend(self, other: 'Imported') -> None:
    """Adds the content of another file."""
    for name, value in vars(other).items():
      setattr(self, name, getattr(self, name) + value)

  def rows(self) -> list[records.Comparison | records.Demonstration]:
    """Comparisons, then demonstrations by people, then those by models."""
    return [
      *self.comparisons,
      *self.demonstrations,
      *self.model_demonstrations,
    ]

  def prompts(self) -> list[records.Prompt]:
    """The distinct prompts, in order, numbered; the encoding of accents does
    not count."""
    first = {}
    for row in self.rows():
      first.setdefault(records.composed(row.prompt), row)
    return [
      records.Prompt(f'p{i}', row.prompt, row.user, row.category, {}, row.turns)
      for i, row in enumerate(first.values())
    ]


def _checked(value: Any, kinds: Any, where: str, what: str) -> Any:
  """A value of these types; None for null and for NaN, the null of tables."""
  if value is None or value != value:
    return None
  if not isinstance(value, kinds) or isinstance(value, bool):
    raise records.RecordError(
      f'{where} is a {type(value).__name__}, expected {what}'
    )
  if isinstance(value, str) and not records.encodable(value):
    raise records.RecordError(
      f'{where} holds a lone surrogate; re-encode the text'
    )
  return value


class _Entry:
  """An object of a file; errors name its place, in the file or in an entry.

  `place` is '' for an entry of a JSONL file; its `name` (file and line) is for
  ids.
  """

  def __init__(self, values: Any, place: str, name: str = '', line: int = 0):
    if not isinstance(values, Mapping):
      raise records.RecordError(
        f'{place}: expected an object, found a {type(values).__name__}'
      )
    self.values, self.place, self.name, self.line = values, place, name, line

  def where(self, text: str) -> str:
    return f'{self.place}: {text}' if self.place else text

  def get(self, key: str, kinds: Any, what: str) -> Any:
    """A field that must be there."""
    if key not in self.values:
      found = ', '.join(map(str, self.values)) or 'nothing'
      raise records.RecordError(
        self.where(
          f'field {key!r} is missing (found {found}); is this the format of '
          'this file?'
        )
      )
    return _checked(self.values[key], kinds, self.where(repr(key)), what)

  def text(self, key: str) -> str:
    return self.get(key, str, 'a text') or ''

  def optional(self, key: str) -> str:
    """A text or number that may be missing."""
    if key not in self.values:
      return ''
    value = self.get(key, (str, int, float), 'a text')
    return '' if value is None else str(value)

  def texts(self, key: str) -> list[str]:
    """A text or a list of texts, as a list."""
    value = self.get(key, (str, list), 'a text or a list of texts')
    if not isinstance(value, list):
      return [value or '']
    return _texts(value, self.where(key))

  def items(self, key: str) -> list:
    return self.get(key, list, 'a list') or []

  def entries(self, key: str) -> list['_Entry']:
    """The objects of a list."""
    return [
      _Entry(item, self.where(f'{key}[{number}]'))
      for number, item in enumerate(self.items(key))
    ]

  def entry(self, key: str) -> '_Entry':
    return _Entry(self.get(key, dict, 'an object') or {}, self.where(key))


def _texts(items: list, where: str) -> list[str]:
  return [
    _checked(item, str, f'{where}[{number}]', 'a text') or ''
    for number, item in enumerate(items)
  ]


def _reader(
  add: Callable[[Imported, _Entry], str | None],
) -> Callable[[epath.PathLike], Imported]:
  """Makes a function of a file from one that adds an entry.

  `add(imported, entry)` returns the reason if it skips the entry. Bad entries
  are reported together, see `records.raise_problems`.
  """

  @functools.wraps(add)
  def read(path):
    imported, bad, line = Imported(), [], 0
    for line, values in sources.read_objects(path):
      if isinstance(values, str):
        bad.append((line, values))
        continue
      try:
        reason = add(
          imported, _Entry(values, '', f'{_stem(path)}:{line}', line)
        )
      except records.RecordError as error:
        bad.append((line, str(error)))
        continue
      if reason:
        imported.skip(reason)
    records.raise_problems(path, bad)
    if not line:
      raise records.RecordError(f'{path}: holds no entries')
    return imported

  return read


def _stem(path: epath.PathLike) -> str:
  return epath.Path(path).name.split('.')[0]


def _instruction(instruction: str, given: str = '') -> str:
  """An instruction and its input as a raw prompt."""
  if _NO_INPUT.fullmatch(given.strip()):
    given = ''
  parts = [part.strip() for part in (instruction, given)]
  parts = [part for part in parts if not invisible.is_blank(part)]
  return '\n\n'.join(parts) + '\n\n' if parts else ''


# --- Conversations ------------------------------------------------------------


@_reader
def read_hh(imported, entry):
  """Comparisons and, from the chosen side, demonstrations.

  Both texts are dialogues that differ in the assistant's last turn only. The
  chosen answers are what people chose among answers of models.
  """
  sides = [
    records.dialogue_turns(entry.text(name)) for name in ('chosen', 'rejected')
  ]
  # An even number of turns ends with the assistant's.
  if any(not side or len(side) % 2 for side in sides):
    return 'not a dialogue that ends with the assistant'
  turns = sides[0][:-1]
  if turns != sides[1][:-1]:
    return 'the two sides answer different prompts'
  texts = [side[-1].content for side in sides]
  if texts[0] == texts[1]:
    return 'both answers are the same'
  if invisible.is_blank(turns[-1].content):
    return 'the last question is empty'
  about = {
    'prompt': records.text_of_turns(turns),
    'id': f'hh:{entry.name}',
    'turns': turns,
  }
  completions = tuple(f' {text}' if text else '' for text in texts)
  imported.comparisons.append(
    records.Comparison(completions=completions, ranks=(1, 2), **about)
  )
  if invisible.is_blank(completions[0]):
    return 'no demonstration: the chosen answer is empty'
  imported.add(records.Demonstration(response=completions[0], **about))


_OASST_ROLES = {'prompter': 'user', 'assistant': 'assistant'}


@_reader
def read_oasst(imported, entry):
  """Every prompter's message with its ranked replies; the best demonstrates.

  `rank` 0 is best. Messages that were deleted or failed review are left out
  with all below them. Ranks are merged from the annotators' votes, so no
  labeler is named. A best reply that is `synthetic` is a model's.
  """
  tree = entry.optional('message_tree_id') or str(entry.line)
  try:
    left = [(entry.entry('prompt'), ())]
    # A stack instead of recursion, because conversations may be deep.
    while left:
      node, turns = left.pop()
      node.place = f'message {node.values.get("message_id")!r}'
      left += reversed(_visit_oasst(imported, node, turns, tree))
  except records.RecordError as error:
    raise records.RecordError(
      f'tree {tree} is not an OpenAssistant tree ({error})'
    ) from error


def _is_gone(node: _Entry) -> bool:
  values = node.values
  return bool(values.get('deleted')) or values.get('review_result') is False


def _visit_oasst(imported, node, turns, tree):
  """Adds what a message asks for; returns (message, turns) below it."""
  if _is_gone(node):
    imported.skip('deleted or failed review')
    return []
  role, text = _OASST_ROLES.get(node.text('role')), node.text('text')
  if role is None or invisible.is_blank(text):
    imported.skip('unknown role or empty text')
    return []
  turns = (*turns, records.Turn(role, text))
  below = node.entries('replies') if 'replies' in node.values else []
  replies = [
    reply
    for reply in below
    if not _is_gone(reply)
    and _OASST_ROLES.get(reply.text('role')) == 'assistant'
    and not invisible.is_blank(reply.text('text'))
  ]
  below = [(reply, turns) for reply in below]
  if role != 'user' or not replies:
    return below
  about = {
    'prompt': records.text_of_turns(turns),
    'id': f'oasst:{node.optional("message_id") or tree}',
    'user': node.optional('user_id'),
    'category': node.optional('lang'),
    'turns': turns,
  }
  ranked = []
  for reply in replies:
    if 'rank' in reply.values:
      rank = reply.get('rank', (int, float), 'a number')
      if rank is not None:
        ranked.append((rank, reply))
  ranked.sort(key=lambda pair: pair[0])
  if len(ranked) > 1:
    imported.comparisons.append(
      records.Comparison(
        completions=tuple(f' {reply.text("text")}' for _, reply in ranked),
        ranks=records.ranks_of_scores(-rank for rank, _ in ranked),
        time=node.optional('created_date'),
        **about,
      )
    )
    unranked = len(replies) - len(ranked)
    imported.skip('an unranked reply among ranked ones', unranked)
  else:
    imported.skip('fewer than two ranked replies')
  best = ranked[0][1] if ranked else replies[0]
  model = ''
  if best.values.get('synthetic') is True:
    model = best.optional('model_name') or 'unnamed'
  response = f' {best.text("text")}'
  imported.add(records.Demonstration(response=response, **about), model)
  return below


# --- Summaries and answers ----------------------------------------------------


def _post(info: _Entry) -> str:
  """The prompt of Stiennon et al. 2020, Table 15, or of an article; '' if the
  post is empty."""
  article = info.optional('article')
  if not invisible.is_blank(article):
    title = info.optional('title')
    title = f'{title}\n\n' if title else ''
    return f'Article: {title}{article}\n\nTL;DR:'
  if 'article' in info.values and 'post' not in info.values:
    return ''
  subreddit, title, post = map(info.text, ('subreddit', 'title', 'post'))
  if invisible.is_blank(post):
    return ''
  return f'SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:'


@_reader
def read_summarize_feedback(imported, entry):
  """Pairs of summaries of a post, with workers and, if given, confidence.

  Files of single summaries rated on axes hold no comparison and are refused.
  """
  summaries, info = entry.entries('summaries'), entry.entry('info')
  texts = tuple(summary.text('text') for summary in summaries)
  choice, worker = entry.get('choice', int, 'a number'), entry.text('worker')
  if choice is None:
    return 'no choice was made'
  if len(texts) != 2 or choice not in (0, 1):
    raise records.RecordError(
      f'{len(texts)} summaries with choice {choice}; expected two, and 0 or 1'
    )
  if texts[0].strip() == texts[1].strip():
    return 'both summaries are the same'
  prompt = _post(info)
  if not prompt:
    return 'the post is empty'
  extra = entry.values.get('extra')
  imported.comparisons.append(
    records.Comparison(
      prompt=prompt,
      completions=texts,
      ranks=(1, 2) if choice == 0 else (2, 1),
      id=info.optional('id') or entry.name,
      labeler=worker,
      category=entry.optional('batch'),
      metadata={
        'policies': [summary.optional('policy') for summary in summaries],
        'split': entry.optional('split'),
        'extra': extra if isinstance(extra, dict) else {},
      },
    )
  )


@_reader
def read_tldr(imported, entry):
  """Posts with the summaries that their authors wrote."""
  summary, subreddit = entry.text('summary').strip(), entry.text('subreddit')
  prompt = _post(entry)
  if invisible.is_blank(summary) or not prompt:
    return 'the summary or the post is empty'
  name = entry.optional('id') or entry.name
  imported.add(
    records.Demonstration(prompt, f' {summary}', name, category=subreddit)
  )


@_reader
def read_qa_feedback(imported, entry):
  """K = 4 rankings from six preferences, and written answers.

  A completion's score is the number of the others that it was preferred to,
  half for "no preference" (Copeland); equal scores tie. The gold answer is the
  demonstration.
  """
  preference, question = entry.items('preference'), entry.text('question')
  answers = [entry.text(f'prediction {number}') for number in range(1, 5)]
  gold = entry.text('gold').strip()
  if len(preference) != 6 or any(p not in (0, 1, 2) for p in preference):
    raise records.RecordError(
      f'preference {preference}; expected six of 0, 1 and 2'
    )
  passages = []
  for number, passage in enumerate(entry.items('passages')):
    where = f'passages[{number}]'
    if not isinstance(passage, list):
      raise records.RecordError(f'{where} is not a list of sentences')
    passages.append(' '.join(filter(None, _texts(passage[1:], where))))
  if invisible.is_blank(question):
    return 'the question is empty'
  prompt = _instruction('\n\n'.join(filter(None, passages)), question)
  about = {'prompt': prompt, 'id': f'qa_feedback:{entry.line}'}
  scores = [0.0] * 4
  pairs = itertools.combinations(range(4), 2)
  for (a, b), choice in zip(pairs, preference, strict=True):
    points = {0: 0.5, 1: 1.0, 2: 0.0}[choice]
    scores[a] += points
    scores[b] += 1 - points
  # A text that was sampled twice is one completion, with its mean score.
  merged = collections.defaultdict(list)
  for answer, score in zip(answers, scores, strict=True):
    merged[records.composed(answer.strip())].append(score)
  means = tuple(sum(found) / len(found) for found in merged.values())
  if len(merged) > 1:
    imported.comparisons.append(
      records.Comparison(
        completions=tuple(merged),
        ranks=records.ranks_of_scores(means),
        scores=means,
        **about,
      )
    )
    imported.skip('an answer that repeats another, merged', 4 - len(merged))
  else:
    imported.skip('all answers are the same')
  if invisible.is_blank(gold):
    return 'no demonstration: the gold answer is empty'
  imported.add(records.Demonstration(response=gold, **about))


# --- Instructions -------------------------------------------------------------


def _add_instruction(imported, prompt, response, name, category='', model=''):
  if not prompt or invisible.is_blank(response):
    imported.skip('instruction or answer is empty')
    return
  row = records.Demonstration(prompt, response.strip(), name, category=category)
  imported.add(row, model)


def _model_of(entry: _Entry, *answer: str) -> str:
  return sources.model_of(entry.values, answer)[0]


@_reader
def read_dolly(imported, entry):
  """instruction, context, response, category; or prompt, response as they are.

  The answer may also be in `text`.
  """
  keys = entry.values
  answer = 'text' if 'response' not in keys and 'text' in keys else 'response'
  if 'prompt' in keys and answer in keys:
    prompt = entry.text('prompt')
    prompt = '' if invisible.is_blank(prompt) else prompt
  else:
    prompt = _instruction(entry.text('instruction'), entry.optional('context'))
  _add_instruction(
    imported,
    prompt,
    entry.text(answer),
    f'dolly:{entry.name}',
    entry.optional('category'),
    _model_of(entry, answer),
  )


@_reader
def read_self_instruct(imported, entry):
  """Tasks; each of their instances is a demonstration."""
  name = entry.optional('id') or entry.name
  instruction = entry.text('instruction')
  instances = entry.entries('instances')
  for number, instance in enumerate(instances):
    _add_instruction(
      imported,
      _instruction(instruction, instance.text('input')),
      instance.text('output'),
      f'{name}:{number}',
      'classification' if entry.values.get('is_classification') else '',
      _model_of(entry) or _model_of(instance, 'output'),
    )
  return None if instances else 'a task without instances'


@_reader
def read_alpaca(imported, entry):
  """instruction, input (may be empty), output."""
  _add_instruction(
    imported,
    _instruction(entry.text('instruction'), entry.optional('input')),
    entry.text('output'),
    f'alpaca:{entry.name}',
    model=_model_of(entry, 'output'),
  )


def read_natural_instructions(path: epath.PathLike) -> Imported:
  """One task: its definition and an instance's input ask for its first output.

  Version 1 has a title, version 2 a list of definitions and categories.
  """
  imported = Imported()
  task = _Entry(records.read_json(path), str(path))
  definition = '\n'.join(task.texts('Definition'))
  categories = [
    name
    for key in ('Categories', 'Title')
    if key in task.values
    for name in task.texts(key)[:1]
  ]
  for number, instance in enumerate(task.entries('Instances')):
    outputs = instance.texts('output')
    further = len(outputs[1:])
    imported.skip('a further right answer of an instance', further)
    _add_instruction(
      imported,
      _instruction(definition, instance.text('input')),
      outputs[0] if outputs else '',
      instance.optional('id') or f'{_stem(path)}:{number}',
      categories[0] if categories else '',
      _model_of(instance, 'output'),
    )
  return imported


def _read_e2e_demonstrations(path):
  demonstrations, repeated = restaurant.read_demonstrations(path)
  imported = Imported(demonstrations)
  imported.skip('the same sentence for the same facts again', repeated)
  return imported


def _read_e2e(path, criterion):
  comparisons, counts = restaurant.read_rankings(path, criterion)
  imported = Imported(comparisons=comparisons)
  imported.skip('check items failed', counts.tainted)
  imported.skip('fewer than two texts', counts.too_few)
  imported.skip('rows with repeated texts, merged', counts.merged)
  return imported


FORMATS = {
  'hh': read_hh,
  'oasst': read_oasst,
  'summarize_feedback': read_summarize_feedback,
  'tldr': read_tldr,
  'qa_feedback': read_qa_feedback,
  'dolly': read_dolly,
  'self_instruct': read_self_instruct,
  'alpaca': read_alpaca,
  'natural_instructions': read_natural_instructions,
  'e2e_demonstrations': _read_e2e_demonstrations,
  'e2e_quality': functools.partial(_read_e2e, criterion='quality'),
  'e2e_naturalness': functools.partial(_read_e2e, criterion='naturalness'),
}
