"""Public human data in the formats that their authors publish, as records.

One function a format, from a file (plain or `.gz`, JSON or JSONL) to an
`Imported`. What a file holds and cannot be used is counted with its reason;
what does not look like the format at all is an error with its line and key.
Null, and the NaN of tables, is an empty text everywhere.
`python -m instruct_jax.data.convert` writes the outcome as JSONL splits.

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

Prompts of conversations have `turns`, and `records.text_of_turns` of them as
their text; a completion then begins with the space that follows "Assistant:",
as in the HH files. Prompts of instructions end in a blank line, and an input
that only says that there is none (`<noinput>`, `N/A`) is none.

A demonstration is what a labeler wrote. Rows that say that a model wrote the
answer (`sources.model_of`: AlpacaEval's outputs, Self-Instruct's predictions,
OpenAssistant's synthetic messages) are kept apart. HH's chosen answers are what
people chose among answers of models, for want of better.
"""

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from instruct_jax.data import invisible, records, restaurant, sources

# What `convert` says beside the counts of a format.
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


@dataclasses.dataclass
class Imported:
  """What a file gave.

  Attributes:
    demonstrations: written by people, as far as the file says.
    model_demonstrations: written by the model that `labeler` names.
    skipped: reason -> how many entries were left out for it.
  """

  demonstrations: list[records.Demonstration] = dataclasses.field(
    default_factory=list
  )
  comparisons: list[records.Comparison] = dataclasses.field(
    default_factory=list
  )
  model_demonstrations: list[records.Demonstration] = dataclasses.field(
    default_factory=list
  )
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

  def every_demonstration(self) -> list[records.Demonstration]:
    """Those of people, then those of models."""
    return [*self.demonstrations, *self.model_demonstrations]

  def prompts(self) -> list[records.Prompt]:
    """The distinct prompts, in order, numbered; copies that differ in how
    accents are spelt are one."""
    found = {}
    for row in (*self.comparisons, *self.every_demonstration()):
      found.setdefault(
        records.composed(row.prompt),
        records.Prompt(
          id=f'p{len(found)}',
          text=row.prompt,
          user=row.user,
          category=row.category,
          turns=row.turns,
        ),
      )
    return list(found.values())


class _Entry:
  """An object of a file and its place, which every error names."""

  def __init__(self, values: Any, place: str):
    if not isinstance(values, Mapping):
      raise records.RecordError(
        f'{place}: expected an object, found a {type(values).__name__}'
      )
    self.values, self.place = values, place

  def _get(self, key: str, kinds: type | tuple[type, ...], what: str) -> Any:
    if key not in self.values:
      raise records.RecordError(
        f'{self.place}: field {key!r} is missing (found '
        f'{", ".join(map(str, self.values)) or "nothing"})'
      )
    value = self.values[key]
    # NaN is what tables have for null.
    if value is None or value != value:
      return None
    if not isinstance(value, kinds) or isinstance(value, bool) != (
      kinds is bool
    ):
      raise records.RecordError(
        f'{self.place}: {key!r} is a {type(value).__name__}, expected {what}'
      )
    return value

  def text(self, key: str) -> str:
    """A field that must be there; null is the empty text."""
    text = self._get(key, str, 'a text') or ''
    _check_text(text, f'{self.place}: {key!r}')
    return text

  def optional(self, key: str) -> str:
    """A text or number that may be missing."""
    if key not in self.values:
      return ''
    value = self._get(key, (str, int, float), 'a text')
    text = '' if value is None else str(value)
    _check_text(text, f'{self.place}: {key!r}')
    return text

  def number(self, key: str) -> int | float | None:
    return self._get(key, (int, float), 'a number')

  def items(self, key: str) -> list:
    """A list that must be there; null is an empty one."""
    return self._get(key, list, 'a list') or []

  def entries(self, key: str) -> list['_Entry']:
    """The objects of a list."""
    return [
      _Entry(item, f'{self.place}: {key}[{number}]')
      for number, item in enumerate(self.items(key))
    ]

  def entry(self, key: str) -> '_Entry':
    return _Entry(
      self._get(key, dict, 'an object') or {}, f'{self.place}: {key}'
    )


def _check_text(text: str, where: str) -> None:
  if not records.encodable(text):
    raise records.RecordError(
      f'{where} holds a lone surrogate; re-encode the text'
    )


def _texts(items: Sequence[Any], where: str) -> list[str]:
  """The items of a list as texts; null is the empty one."""
  found = []
  for number, item in enumerate(items):
    if item is None or item != item:
      item = ''
    if not isinstance(item, str):
      raise records.RecordError(
        f'{where}[{number}] is a {type(item).__name__}, expected a text'
      )
    _check_text(item, f'{where}[{number}]')
    found.append(item)
  return found


def _entries(
  path: epath.PathLike, fields: Mapping[str, type | tuple[type, ...]]
) -> Iterator[tuple[int, _Entry]]:
  """(line, entry) of JSONL, or (position, entry) of one JSON list.

  Raises:
    RecordError: not the format, or fields missing or of another type; up to
      10 bad entries are reported together.
  """
  found, bad = [], []
  for number, values in sources.read_objects(path):
    problem = values if isinstance(values, str) else _problem(values, fields)
    if problem:
      bad.append((number, problem))
    else:
      found.append((number, _Entry(values, f'{path}:{number}')))
  records.raise_problems(path, bad)
  if not found:
    raise records.RecordError(f'{path}: holds no entries')
  yield from found


def _problem(values, fields) -> str:
  for name, kind in fields.items():
    if name not in values:
      return (
        f'field {name!r} is missing (found {", ".join(values)}); is this the '
        'format of this file?'
      )
    value = values[name]
    is_null = value is None or value != value
    if not is_null and not isinstance(value, kind):
      return f'{name!r} is a {type(value).__name__}'
  return ''


@functools.lru_cache(maxsize=1)
def _name(path: epath.PathLike) -> str:
  return epath.Path(path).name.split('.')[0]


def _instruction(instruction: str, given: str = '') -> str:
  """An instruction and its input as a raw prompt."""
  if _NO_INPUT.fullmatch(given.strip()):
    given = ''
  parts = [part.strip() for part in (instruction, given)]
  parts = [part for part in parts if not invisible.is_blank(part)]
  return '\n\n'.join(parts) + '\n\n' if parts else ''


# --- Conversations ------------------------------------------------------------


def read_hh(path: epath.PathLike) -> Imported:
  """Comparisons and, from the chosen side, demonstrations.

  Both texts are dialogues that differ in the assistant's last turn only;
  entries whose earlier turns differ, or whose answers are the same, are left
  out and counted.
  """
  imported = Imported()
  for line, entry in _entries(path, {'chosen': str, 'rejected': str}):
    chosen, rejected = (
      records.dialogue_turns(entry.text(name))
      for name in ('chosen', 'rejected')
    )
    # An even number of turns ends with the assistant's.
    if not chosen or len(chosen) % 2 or not rejected or len(rejected) % 2:
      imported.skipped['not a dialogue that ends with the assistant'] += 1
      continue
    if chosen[:-1] != rejected[:-1]:
      imported.skipped['the two sides answer different prompts'] += 1
      continue
    completions = tuple(side[-1].content for side in (chosen, rejected))
    if completions[0].strip() == completions[1].strip():
      imported.skipped['both answers are the same'] += 1
      continue
    if invisible.is_blank(chosen[-2].content):
      imported.skipped['the last question is empty'] += 1
      continue
    about = {
      'prompt': records.text_of_turns(chosen[:-1]),
      'id': f'hh:{_name(path)}:{line}',
      'turns': chosen[:-1],
    }
    completions = tuple(f' {text}' if text else '' for text in completions)
    imported.comparisons.append(
      records.Comparison(completions=completions, ranks=(1, 2), **about)
    )
    if not invisible.is_blank(completions[0]):
      imported.add(records.Demonstration(response=completions[0], **about))
    else:
      imported.skipped['no demonstration: the chosen answer is empty'] += 1
  return imported


_OASST_ROLES = {'prompter': 'user', 'assistant': 'assistant'}


def read_oasst(path: epath.PathLike) -> Imported:
  """Every prompter's message with its ranked replies; the best demonstrates.

  `rank` 0 is best. Deleted messages and those that failed review are left out,
  with all below them. Ranks are those that the annotators' votes were merged
  into, so no labeler is named. Where the best reply is a model's, as its
  `synthetic` says, it demonstrates nothing.
  """
  imported = Imported()
  for line, tree in _entries(path, {'prompt': dict}):
    name = tree.optional('message_tree_id') or str(line)
    try:
      left = [(_Entry(tree.values['prompt'], 'prompt'), ())]
      # A stack, for conversations may be deeper than Python's calls.
      while left:
        node, turns = left.pop()
        node.place = f'message {node.values.get("message_id")!r}'
        left += reversed(_visit_oasst(imported, node, turns, name))
    except records.RecordError as error:
      raise records.RecordError(
        f'{path}:{line}: tree {name} is not an OpenAssistant tree ({error})'
      ) from error
  return imported


def _is_gone(node: _Entry) -> bool:
  values = node.values
  return bool(values.get('deleted')) or values.get('review_result') is False


def _visit_oasst(imported, node, turns, tree):
  """Adds what a message asks for; returns the messages below it."""
  if _is_gone(node):
    imported.skipped['deleted or failed review'] += 1
    return []
  role, text = _OASST_ROLES.get(node.text('role')), node.text('text')
  if role is None or invisible.is_blank(text):
    imported.skipped['unknown role or empty text'] += 1
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
  if role == 'user' and replies:
    about = {
      'prompt': records.text_of_turns(turns),
      'id': f'oasst:{node.optional("message_id") or tree}',
      'user': node.optional('user_id'),
      'category': node.optional('lang'),
      'turns': turns,
    }
    numbers = [
      reply.number('rank') if 'rank' in reply.values else None
      for reply in replies
    ]
    ranked = [
      (rank, reply)
      for rank, reply in zip(numbers, replies, strict=True)
      if rank is not None
    ]
    ranked.sort(key=lambda pair: pair[0])
    if len(ranked) > 1:
      levels = sorted({rank for rank, _ in ranked})
      imported.comparisons.append(
        records.Comparison(
          completions=tuple(f' {reply.text("text")}' for _, reply in ranked),
          ranks=tuple(1 + levels.index(rank) for rank, _ in ranked),
          time=node.optional('created_date'),
          **about,
        )
      )
      if len(ranked) < len(replies):
        imported.skipped['a reply without a rank beside ranked ones'] += len(
          replies
        ) - len(ranked)
    else:
      imported.skipped['fewer than two ranked replies'] += 1
    best = ranked[0][1] if ranked else replies[0]
    model = ''
    if best.values.get('synthetic') is True:
      model = best.optional('model_name') or 'unnamed'
    imported.add(
      records.Demonstration(response=f' {best.text("text")}', **about), model
    )
  return [(reply, turns) for reply in below]


# --- Summaries and answers ----------------------------------------------------


def _post(info: _Entry) -> str:
  """The prompt of Stiennon et al. 2020, Table 15; or an article; '' if it is
  empty."""
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


def read_summarize_feedback(path: epath.PathLike) -> Imported:
  """Pairs of summaries of a post, with workers and, if given, confidence.

  Files of single summaries rated on axes hold no comparison and are refused.
  """
  imported = Imported()
  fields = {'info': dict, 'summaries': list, 'choice': int, 'worker': str}
  for line, entry in _entries(path, fields):
    summaries = entry.entries('summaries')
    texts = tuple(summary.text('text') for summary in summaries)
    choice = entry.number('choice')
    if choice is None:
      imported.skipped['no choice was made'] += 1
      continue
    if len(texts) != 2 or choice not in (0, 1):
      raise records.RecordError(
        f'{path}:{line}: {len(texts)} summaries with choice {choice}; expected '
        'two, and 0 or 1'
      )
    if texts[0].strip() == texts[1].strip():
      imported.skipped['both summaries are the same'] += 1
      continue
    info = entry.entry('info')
    prompt = _post(info)
    if not prompt:
      imported.skipped['the post is empty'] += 1
      continue
    extra = entry.values.get('extra')
    imported.comparisons.append(
      records.Comparison(
        prompt=prompt,
        completions=texts,
        ranks=(1, 2) if choice == 0 else (2, 1),
        id=info.optional('id') or f'{_name(path)}:{line}',
        labeler=entry.text('worker'),
        category=entry.optional('batch'),
        metadata={
          'policies': [summary.optional('policy') for summary in summaries],
          'split': entry.optional('split'),
          'extra': extra if isinstance(extra, dict) else {},
        },
      )
    )
  return imported


def read_tldr(path: epath.PathLike) -> Imported:
  """Posts with the summaries that their authors wrote."""
  imported = Imported()
  fields = dict.fromkeys(('subreddit', 'title', 'post', 'summary'), str)
  for line, entry in _entries(path, fields):
    summary, prompt = entry.text('summary').strip(), _post(entry)
    if invisible.is_blank(summary) or not prompt:
      imported.skipped['the summary or the post is empty'] += 1
      continue
    imported.add(
      records.Demonstration(
        prompt=prompt,
        response=f' {summary}',
        id=entry.optional('id') or f'{_name(path)}:{line}',
        category=entry.text('subreddit'),
      )
    )
  return imported


def read_qa_feedback(path: epath.PathLike) -> Imported:
  """K = 4 rankings from six preferences, and written answers.

  A completion's score is the number of the others that it was preferred to,
  half for "no preference" (Copeland); equal scores tie. The gold answer is the
  demonstration.
  """
  imported = Imported()
  names = [f'prediction {number}' for number in range(1, 5)]
  fields = {
    'question': str,
    'passages': list,
    'gold': str,
    'preference': list,
    **dict.fromkeys(names, str),
  }
  for number, entry in _entries(path, fields):
    preference = entry.items('preference')
    if len(preference) != 6 or any(p not in (0, 1, 2) for p in preference):
      raise records.RecordError(
        f'{path}:{number}: preference {preference}; expected six of 0, 1 and 2'
      )
    passages = []
    for position, passage in enumerate(entry.items('passages')):
      where = f'{entry.place}: passages[{position}]'
      if not isinstance(passage, list):
        raise records.RecordError(f'{where} is no list of sentences')
      passages.append(' '.join(filter(None, _texts(passage[1:], where))))
    question = entry.text('question')
    if invisible.is_blank(question):
      imported.skipped['the question is empty'] += 1
      continue
    prompt = _instruction('\n\n'.join(filter(None, passages)), question)
    about = {'prompt': prompt, 'id': f'qa_feedback:{number}'}
    scores = [0.0] * 4
    pairs = itertools.combinations(range(4), 2)
    for (a, b), choice in zip(pairs, preference, strict=True):
      scores[a] += {1: 1.0, 2: 0.0, 0: 0.5}[choice]
      scores[b] += {1: 0.0, 2: 1.0, 0: 0.5}[choice]
    # The same text sampled twice is one completion, with its mean score.
    merged = collections.defaultdict(list)
    for name, score in zip(names, scores, strict=True):
      merged[records.composed(entry.text(name).strip())].append(score)
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
      if len(merged) < 4:
        imported.skipped['an answer that repeats another, merged'] += 4 - len(
          merged
        )
    else:
      imported.skipped['all answers are the same'] += 1
    gold = entry.text('gold').strip()
    if not invisible.is_blank(gold):
      imported.add(records.Demonstration(response=gold, **about))
    else:
      imported.skipped['no demonstration: the gold answer is empty'] += 1
  return imported


# --- Instructions -------------------------------------------------------------


def _add_instruction(imported, prompt, response, name, category='', model=''):
  if not prompt or invisible.is_blank(response):
    imported.skipped['instruction or answer is empty'] += 1
    return
  imported.add(
    records.Demonstration(
      prompt=prompt, response=response.strip(), id=name, category=category
    ),
    model,
  )


def read_dolly(path: epath.PathLike) -> Imported:
  """instruction, context, response, category; or prompt, response as they are.

  Files that keep the answer in `text` are read, too.
  """
  imported = Imported()
  for line, entry in _entries(path, {}):
    name = f'dolly:{_name(path)}:{line}'
    answer = 'response'
    if answer not in entry.values and 'text' in entry.values:
      answer = 'text'
    model, _ = sources.model_of(entry.values, (answer,))
    if 'prompt' in entry.values and answer in entry.values:
      prompt = entry.text('prompt')
      prompt = '' if invisible.is_blank(prompt) else prompt
    else:
      problem = _problem(entry.values, {'instruction': str, answer: str})
      if problem:
        raise records.RecordError(f'{entry.place}: {problem}')
      prompt = _instruction(
        entry.text('instruction'), entry.optional('context')
      )
    _add_instruction(
      imported,
      prompt,
      entry.text(answer),
      name,
      entry.optional('category'),
      model,
    )
  return imported


def read_self_instruct(path: epath.PathLike) -> Imported:
  """Tasks; each of their instances is a demonstration."""
  imported = Imported()
  for line, entry in _entries(path, {'instruction': str, 'instances': list}):
    name = entry.optional('id') or f'{_name(path)}:{line}'
    instances = entry.entries('instances')
    if not instances:
      imported.skipped['a task without instances'] += 1
    for number, instance in enumerate(instances):
      model = (
        sources.model_of(entry.values)[0]
        or sources.model_of(instance.values, ('output',))[0]
      )
      _add_instruction(
        imported,
        _instruction(entry.text('instruction'), instance.text('input')),
        instance.text('output'),
        f'{name}:{number}',
        'classification' if entry.values.get('is_classification') else '',
        model,
      )
  return imported


def read_alpaca(path: epath.PathLike) -> Imported:
  """instruction, input (may be empty), output."""
  imported = Imported()
  for number, entry in _entries(path, {'instruction': str, 'output': str}):
    _add_instruction(
      imported,
      _instruction(entry.text('instruction'), entry.optional('input')),
      entry.text('output'),
      f'alpaca:{_name(path)}:{number}',
      model=sources.model_of(entry.values, ('output',))[0],
    )
  return imported


def read_natural_instructions(path: epath.PathLike) -> Imported:
  """One task: its definition and an instance's input ask for its first output.

  Version 1 has a title and a prompt, version 2 a list of definitions.
  """
  imported = Imported()
  task = _Entry(records.read_json(path), str(path))
  problem = _problem(
    task.values, {'Definition': (str, list), 'Instances': list}
  )
  if problem:
    raise records.RecordError(f'{path}: {problem}')
  definition = _one_or_more(task, 'Definition')
  categories = ('Categories', 'Title')
  names = [
    name
    for key in categories
    if key in task.values
    for name in _one_or_more(task, key)[:1]
  ]
  for number, instance in enumerate(task.entries('Instances')):
    outputs = _one_or_more(instance, 'output')
    if len(outputs) > 1:
      imported.skipped['a further right answer of an instance'] += (
        len(outputs) - 1
      )
    _add_instruction(
      imported,
      _instruction('\n'.join(definition), instance.text('input')),
      outputs[0] if outputs else '',
      instance.optional('id') or f'{_name(path)}:{number}',
      names[0] if names else '',
      sources.model_of(instance.values, ('output',))[0],
    )
  return imported


def _one_or_more(entry: _Entry, key: str) -> list[str]:
  """A field that is a text or a list of texts, as a list."""
  value = entry._get(key, (str, list), 'a text or a list of texts')
  if isinstance(value, list):
    return _texts(value, f'{entry.place}: {key}')
  return [entry.text(key)]


def _read_e2e_demonstrations(path):
  demonstrations, repeated = restaurant.read_demonstrations_and_count(path)
  imported = Imported(demonstrations=demonstrations)
  if repeated:
    imported.skipped['the same sentence for the same facts again'] = repeated
  return imported


def _read_e2e(criterion):
  def read(path):
    comparisons, counts = restaurant.read_rankings_and_counts(path, criterion)
    skipped = {
      'check items failed': counts.tainted,
      'fewer than two texts': counts.too_few,
      'rows of which some texts are the same, merged': counts.merged,
    }
    return Imported(
      comparisons=comparisons, skipped=collections.Counter(skipped)
    )

  return read


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
  'e2e_quality': _read_e2e('quality'),
  'e2e_naturalness': _read_e2e('naturalness'),
}
