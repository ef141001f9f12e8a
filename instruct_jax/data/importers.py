"""Public human data in the formats that their authors publish, as records.

One function a format, from a file (plain or `.gz`, JSON or JSONL) to an
`Imported`. What a file holds and cannot be used is counted with its reason;
what does not look like the format at all is an error with its line.
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
  e2e_demonstrations, e2e_quality, e2e_naturalness    see `e2e.py`

Prompts of conversations have `turns`, and `records.text_of_turns` of them as
their text; a completion then begins with the space that follows "Assistant:",
as in the HH files. Prompts of instructions end in a blank line.
"""

import collections
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from instruct_jax.data import e2e, records


@dataclasses.dataclass
class Imported:
  """What a file gave.

  Attributes:
    skipped: reason -> how many entries were left out for it.
  """

  demonstrations: list[records.Demonstration] = dataclasses.field(
    default_factory=list
  )
  comparisons: list[records.Comparison] = dataclasses.field(
    default_factory=list
  )
  skipped: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )

  def prompts(self) -> list[records.Prompt]:
    """The distinct prompts, in order, numbered."""
    found = {}
    for row in (*self.comparisons, *self.demonstrations):
      found.setdefault(
        row.prompt,
        records.Prompt(
          id=f'p{len(found)}',
          text=row.prompt,
          user=row.user,
          category=row.category,
          turns=row.turns,
        ),
      )
    return list(found.values())


def _entries(
  path: epath.PathLike, fields: Mapping[str, type | tuple[type, ...]]
) -> Iterator[tuple[int, dict[str, Any]]]:
  """(line, object) of JSONL, or (position, object) of one JSON list.

  Raises:
    RecordError: not the format, or fields missing or of another type; up to
      10 bad entries are reported together.
  """
  content = records.read_bytes(path)
  if content.lstrip()[:1] == b'[':
    try:
      entries = enumerate(json.loads(content.decode('utf-8')), start=1)
    except ValueError as error:
      raise records.RecordError(f'{path}: not JSON ({error})') from error
  else:
    entries = records.iterate_lines(path)
  found, bad = [], []
  for number, values in entries:
    problem = values if isinstance(values, str) else _problem(values, fields)
    if problem:
      bad.append((number, problem))
    else:
      found.append((number, values))
  records.raise_problems(path, bad)
  if not found:
    raise records.RecordError(f'{path}: holds no entries')
  yield from found


def _problem(values, fields) -> str:
  if not isinstance(values, dict):
    return f'expected an object, found {type(values).__name__}'
  for name, kind in fields.items():
    if name not in values:
      return (
        f'field {name!r} is missing (found {", ".join(values)}); is this the '
        'format of this file?'
      )
    if not isinstance(values[name], kind):
      return f'{name!r} is a {type(values[name]).__name__}'
  return ''


def _name(path: epath.PathLike) -> str:
  return epath.Path(path).name.split('.')[0]


def _instruction(instruction: str, given: str = '') -> str:
  """An instruction and its input as a raw prompt."""
  parts = [part.strip() for part in (instruction, given) if part.strip()]
  return '\n\n'.join(parts) + '\n\n' if parts else ''


# --- Conversations ------------------------------------------------------------


def read_hh(path: epath.PathLike) -> Imported:
  """Comparisons and, from the chosen side, demonstrations.

  Both texts are dialogues that differ in the assistant's last turn only;
  entries whose earlier turns differ, or whose answers are the same, are left
  out and counted.
  """
  imported = Imported()
  for line, values in _entries(path, {'chosen': str, 'rejected': str}):
    chosen, rejected = (
      _parse_dialogue(values[name]) for name in ('chosen', 'rejected')
    )
    if chosen is None or rejected is None:
      imported.skipped['not a dialogue that ends with the assistant'] += 1
      continue
    if chosen[:-1] != rejected[:-1]:
      imported.skipped['the two sides answer different prompts'] += 1
      continue
    completions = tuple(side[-1].content for side in (chosen, rejected))
    if completions[0].strip() == completions[1].strip():
      imported.skipped['both answers are the same'] += 1
      continue
    about = {
      'prompt': records.text_of_turns(chosen[:-1]),
      'id': f'hh:{_name(path)}:{line}',
      'turns': chosen[:-1],
    }
    if not about['prompt'].removesuffix('\n\nAssistant:').strip():
      imported.skipped['the prompt is empty'] += 1
      continue
    completions = tuple(f' {text}' if text else '' for text in completions)
    imported.comparisons.append(
      records.Comparison(completions=completions, ranks=(1, 2), **about)
    )
    if completions[0].strip():
      imported.demonstrations.append(
        records.Demonstration(response=completions[0], **about)
      )
  return imported


def _parse_dialogue(text: str) -> tuple[records.Turn, ...] | None:
  """`\\n\\nHuman: ..\\n\\nAssistant: ..` as turns, or None."""
  marks = {'\n\nHuman:': 'user', '\n\nAssistant:': 'assistant'}
  starts = sorted(
    (position, mark) for mark in marks for position in _positions(text, mark)
  )
  if not starts or starts[0][0] != 0:
    return None
  # Answers may quote a dialogue; speakers take turns, so what does not
  # alternate belongs to the turn before.
  kept = [starts[0]]
  for start in starts[1:]:
    if start[1] != kept[-1][1]:
      kept.append(start)
  ends = [position for position, _ in kept[1:]] + [len(text)]
  turns = tuple(
    records.Turn(marks[mark], text[position + len(mark) : end].strip())
    for (position, mark), end in zip(kept, ends, strict=True)
  )
  ends_well = turns[0].role == 'user' and turns[-1].role == 'assistant'
  return turns if ends_well else None


def _positions(text: str, mark: str) -> Iterator[int]:
  position = text.find(mark)
  while position >= 0:
    yield position
    position = text.find(mark, position + len(mark))


def read_oasst(path: epath.PathLike) -> Imported:
  """Every prompter's message with its ranked replies; the best demonstrates.

  `rank` 0 is best. Deleted messages and those that failed review are left out,
  with all below them. Ranks are those that the annotators' votes were merged
  into, so no labeler is named.
  """
  imported = Imported()

  def visit(node, turns, tree):
    if node.get('deleted') or node.get('review_result') is False:
      imported.skipped['deleted or failed review'] += 1
      return
    role = {'prompter': 'user', 'assistant': 'assistant'}.get(node['role'])
    if role is None or not node['text'].strip():
      imported.skipped['unknown role or empty text'] += 1
      return
    turns = (*turns, records.Turn(role, node['text']))
    replies = [
      reply
      for reply in node.get('replies') or ()
      if not reply.get('deleted') and reply.get('review_result') is not False
    ]
    if role == 'user' and replies:
      about = {
        'prompt': records.text_of_turns(turns),
        'id': f'oasst:{node.get("message_id") or tree}',
        'user': str(node.get('user_id') or ''),
        'category': str(node.get('lang') or ''),
        'turns': turns,
      }
      ranked = sorted(
        (r for r in replies if r.get('rank') is not None),
        key=lambda reply: reply['rank'],
      )
      if len(ranked) > 1:
        levels = sorted({reply['rank'] for reply in ranked})
        imported.comparisons.append(
          records.Comparison(
            completions=tuple(f' {reply["text"]}' for reply in ranked),
            ranks=tuple(1 + levels.index(r['rank']) for r in ranked),
            time=str(node.get('created_date') or ''),
            **about,
          )
        )
      else:
        imported.skipped['fewer than two ranked replies'] += 1
      best = ranked[0] if ranked else replies[0]
      if best['text'].strip():
        imported.demonstrations.append(
          records.Demonstration(response=f' {best["text"]}', **about)
        )
    for reply in node.get('replies') or ():
      visit(reply, turns, tree)

  for line, values in _entries(path, {'prompt': dict}):
    tree = str(values.get('message_tree_id') or line)
    try:
      visit(values['prompt'], (), tree)
    except (KeyError, TypeError, AttributeError) as error:
      raise records.RecordError(
        f'{path}:{line}: tree {tree} is not an OpenAssistant tree ({error!r})'
      ) from error
  return imported


# --- Summaries and answers ----------------------------------------------------


def _post(info: Mapping[str, Any]) -> str:
  """The prompt of Stiennon et al. 2020, Table 15; or an article."""
  if info.get('article'):
    title = f'{info["title"]}\n\n' if info.get('title') else ''
    return f'Article: {title}{info["article"]}\n\nTL;DR:'
  return (
    f'SUBREDDIT: r/{info["subreddit"]}\n\nTITLE: {info["title"]}\n\n'
    f'POST: {info["post"]}\n\nTL;DR:'
  )


def read_summarize_feedback(path: epath.PathLike) -> Imported:
  """Pairs of summaries of a post, with workers and, if given, confidence.

  Files of single summaries rated on axes hold no comparison and are refused.
  """
  imported = Imported()
  fields = {'info': dict, 'summaries': list, 'choice': int, 'worker': str}
  for line, values in _entries(path, fields):
    texts = tuple(summary['text'] for summary in values['summaries'])
    if len(texts) != 2 or values['choice'] not in (0, 1):
      raise records.RecordError(
        f'{path}:{line}: {len(texts)} summaries with choice '
        f'{values["choice"]}; expected two, and 0 or 1'
      )
    if texts[0].strip() == texts[1].strip():
      imported.skipped['both summaries are the same'] += 1
      continue
    try:
      prompt = _post(values['info'])
    except KeyError as error:
      raise records.RecordError(
        f"{path}:{line}: 'info' lacks {error}"
      ) from error
    imported.comparisons.append(
      records.Comparison(
        prompt=prompt,
        completions=texts,
        ranks=(1, 2) if values['choice'] == 0 else (2, 1),
        id=str(values['info'].get('id') or f'{_name(path)}:{line}'),
        labeler=values['worker'],
        category=str(values.get('batch') or ''),
        metadata={
          'policies': [str(s.get('policy')) for s in values['summaries']],
          'split': values.get('split'),
          'extra': values.get('extra') or {},
        },
      )
    )
  return imported


def read_tldr(path: epath.PathLike) -> Imported:
  """Posts with the summaries that their authors wrote."""
  imported = Imported()
  fields = dict.fromkeys(('subreddit', 'title', 'post', 'summary'), str)
  for line, values in _entries(path, fields):
    if not values['summary'].strip():
      imported.skipped['the summary is empty'] += 1
      continue
    imported.demonstrations.append(
      records.Demonstration(
        prompt=_post(values),
        response=' ' + values['summary'].strip(),
        id=str(values.get('id') or f'{_name(path)}:{line}'),
        category=values['subreddit'],
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
  for number, values in _entries(path, fields):
    if len(values['preference']) != 6 or set(values['preference']) - {0, 1, 2}:
      raise records.RecordError(
        f'{path}:{number}: preference {values["preference"]}; expected six of '
        '0, 1 and 2'
      )
    passages = '\n\n'.join(' '.join(p[1:]) for p in values['passages'])
    prompt = _instruction(passages, values['question'])
    about = {'prompt': prompt, 'id': f'qa_feedback:{number}'}
    scores = [0.0] * 4
    pairs = itertools.combinations(range(4), 2)
    for (a, b), choice in zip(pairs, values['preference'], strict=True):
      scores[a] += {1: 1.0, 2: 0.0, 0: 0.5}[choice]
      scores[b] += {1: 0.0, 2: 1.0, 0: 0.5}[choice]
    # The same text sampled twice is one completion, with its mean score.
    merged = collections.defaultdict(list)
    for name, score in zip(names, scores, strict=True):
      merged[values[name].strip()].append(score)
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
    else:
      imported.skipped['all answers are the same'] += 1
    if values['gold'].strip():
      imported.demonstrations.append(
        records.Demonstration(response=values['gold'].strip(), **about)
      )
  return imported


# --- Instructions -------------------------------------------------------------


def _add_instruction(imported, prompt, response, name, category=''):
  if not prompt or not response.strip():
    imported.skipped['instruction or answer is empty'] += 1
    return
  imported.demonstrations.append(
    records.Demonstration(
      prompt=prompt, response=response.strip(), id=name, category=category
    )
  )


def read_dolly(path: epath.PathLike) -> Imported:
  """instruction, context, response, category; or prompt, response as they are.

  Files that keep the answer in `text` are read, too.
  """
  imported = Imported()
  for line, values in _entries(path, {}):
    name = f'dolly:{_name(path)}:{line}'
    if _problem(values, {'prompt': str, 'response': str}) == '':
      _add_instruction(imported, values['prompt'], values['response'], name)
      continue
    answer = 'response' if 'response' in values else 'text'
    problem = _problem(values, {'instruction': str, answer: str})
    if problem:
      raise records.RecordError(f'{path}:{line}: {problem}')
    _add_instruction(
      imported,
      _instruction(values['instruction'], values.get('context') or ''),
      values[answer],
      name,
      values.get('category') or '',
    )
  return imported


def read_self_instruct(path: epath.PathLike) -> Imported:
  """Tasks; each of their instances is a demonstration."""
  imported = Imported()
  for line, values in _entries(path, {'instruction': str, 'instances': list}):
    name = str(values.get('id') or f'{_name(path)}:{line}')
    for number, instance in enumerate(values['instances']):
      _add_instruction(
        imported,
        _instruction(values['instruction'], instance['input']),
        instance['output'],
        f'{name}:{number}',
        'classification' if values.get('is_classification') else '',
      )
  return imported


def read_alpaca(path: epath.PathLike) -> Imported:
  """instruction, input (may be empty), output."""
  imported = Imported()
  for number, values in _entries(path, {'instruction': str, 'output': str}):
    _add_instruction(
      imported,
      _instruction(values['instruction'], values.get('input') or ''),
      values['output'],
      f'alpaca:{_name(path)}:{number}',
    )
  return imported


def read_natural_instructions(path: epath.PathLike) -> Imported:
  """One task: its definition and an instance's input ask for its first output.

  Version 1 has a title and a prompt, version 2 a list of definitions.
  """
  imported = Imported()
  try:
    task = json.loads(records.read_bytes(path).decode('utf-8'))
  except ValueError as error:
    if isinstance(error, records.RecordError):
      raise
    raise records.RecordError(f'{path}: not JSON ({error})') from error
  problem = _problem(task, {'Definition': (str, list), 'Instances': list})
  if problem:
    raise records.RecordError(f'{path}: {problem}')
  definition = task['Definition']
  if isinstance(definition, list):
    definition = '\n'.join(definition)
  categories = task.get('Categories') or [task.get('Title') or '']
  for number, instance in enumerate(task['Instances']):
    output = instance['output']
    output = output[0] if isinstance(output, list) and output else output
    _add_instruction(
      imported,
      _instruction(definition, instance['input']),
      output or '',
      str(instance.get('id') or f'{_name(path)}:{number}'),
      categories[0],
    )
  return imported


def _read_e2e_demonstrations(path):
  return Imported(demonstrations=e2e.read_demonstrations(path))


def _read_e2e(criterion):
  def read(path):
    comparisons, counts = e2e.read_rankings_and_counts(path, criterion)
    skipped = {'check items failed': counts.tainted}
    skipped['fewer than two texts'] = counts.too_few
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
