"""Benchmarks of answers that a chat model judges: files, layouts and figures.

  alpaca_eval   AlpacaEval 2 (Dubois et al. 2024): win rate against a baseline,
                and the same at equal length
  mt_bench      MT-Bench (Zheng et al. 2023): questions of two turns, graded
                from 1 to 10, or compared with a baseline (pairwise)
  arena_hard    Arena-Hard (Li et al. 2024), both versions of its files: win
                rate against a baseline; clear verdicts count three times. In
                version 2 each category has its own baseline and its own system
                prompt for the judge

Questions, layouts of the judge's prompt and recorded answers are upstream's own
files; answers and judgements are written as upstream's tools read them.
"""

import collections
import dataclasses
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from instruct_jax.data import records, sources
from instruct_jax.evals import chat_judge, win_rate

BENCHMARKS = ('alpaca_eval', 'mt_bench', 'arena_hard')
# Sampling temperatures by category; others use `_TEMPERATURE`.
_TEMPERATURES = {
  'mt_bench': {
    **dict.fromkeys(('writing', 'roleplay'), 0.7),
    **dict.fromkeys(('extraction', 'math', 'coding', 'reasoning'), 0.0),
    **dict.fromkeys(('stem', 'humanities'), 0.1),
  },
  'alpaca_eval': {},
  'arena_hard': {},
}
_TEMPERATURE = {'mt_bench': 0.7, 'alpaca_eval': 0.7, 'arena_hard': 0.0}
# The most turns that MT-Bench's layouts support.
_MAX_TURNS = 2
# Categories of MT-Bench whose judge sees a reference answer.
_REFERENCED = ('math', 'reasoning', 'coding')
# Weight of Arena-Hard's clear verdicts.
_CLEAR = 3
# Total weight of AlpacaEval's two gamed baselines, number of folds, and penalty
# strengths to try.
_GAMED_WEIGHT, _NUM_FOLDS = 0.2, 5
_STRENGTHS = np.logspace(-4, 4, 10)
# Bootstrap refits per interval.
_NUM_REFITS = 200
# Limits on Newton steps and on the sweeps in each; a few suffice.
_MAX_STEPS, _MAX_SWEEPS = 100, 1000
_ONE_RATING = tuple(
  map(re.compile, (r'\[\[(\d+\.?\d*)\]\]', r'\[(\d+\.?\d*)\]'))
)


@dataclasses.dataclass(frozen=True)
class Question:
  """One question; `id` is the file's, or its position for AlpacaEval."""

  id: int | str
  turns: tuple[str, ...]
  category: str = ''
  row: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Question's id -> the answer to each turn.
Answers = Mapping[int | str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Request:
  """One prompt for the judge.

  Attributes:
    messages: of the chat.
    about: what it is about, as fields for the row of its judgement.
    is_swapped: whether the order is swapped: the model's answer comes first,
      except in MT-Bench's pairs, where it then comes second.
  """

  messages: list[dict[str, str]]
  about: dict[str, Any]
  is_swapped: bool = False


# --- Files --------------------------------------------------------------------


def _rows(path: epath.PathLike) -> list[tuple[str, Mapping[str, Any]]]:
  """(place, fields) of the objects of a JSON list or of JSONL."""
  found = []
  for number, values in sources.read_objects(path):
    if isinstance(values, str):
      raise records.RecordError(f'{path}:{number}: {values}')
    found.append((f'{path}:{number}', values))
  if not found:
    raise records.RecordError(f'{path}: holds no entries')
  return found


def _get(row: Mapping[str, Any], place: str, key: str, kind: Any) -> Any:
  if not isinstance(row.get(key), kind):
    found = ', '.join(map(str, row)) or 'nothing'
    raise records.RecordError(
      f'{place}: field {key!r} is missing or of another type (found {found})'
    )
  return row[key]


def _category(row: Mapping[str, Any], place: str, key: str) -> str:
  return _get(row, place, key, str) if key in row else ''


def _texts(items: Any, place: str) -> tuple[str, ...]:
  """Turns: texts, or objects with the text as `content`."""
  texts = tuple(
    item.get('content') if isinstance(item, Mapping) else item for item in items
  )
  if not texts or not all(isinstance(text, str) for text in texts):
    raise records.RecordError(f'{place}: turns must be texts: {items!r:.80}')
  return texts


def read_questions(name: str, path: epath.PathLike) -> list[Question]:
  """The questions of a benchmark's own file.

  Raises:
    records.RecordError: a bad entry; names file, entry and field.
  """
  found = []
  for number, (place, row) in enumerate(_rows(path)):
    if name == 'alpaca_eval':
      # Upstream's difficulties are indexed by position.
      turns = (_get(row, place, 'instruction', str),)
      category = _category(row, place, 'dataset')
      found.append(Question(number, turns, category, row))
      continue
    if 'uid' in row:
      key = _get(row, place, 'uid', (int, str))
      turns = (_get(row, place, 'prompt', str),)
    else:
      key = _get(row, place, 'question_id', (int, str))
      turns = _texts(_get(row, place, 'turns', list), place)
    if name == 'mt_bench' and len(turns) > _MAX_TURNS:
      raise records.RecordError(
        f'{place}: {len(turns)} turns; there are layouts for {_MAX_TURNS}'
      )
    category = _category(row, place, 'category')
    found.append(Question(key, turns, category, row))
  repeated = len(found) - len({question.id for question in found})
  if repeated:
    raise records.RecordError(f'{path}: {repeated} questions repeat an id')
  return found


def _answer_of(name: str, row: Mapping[str, Any], place: str):
  """(key of the question, turns) of a recorded answer."""
  if name == 'alpaca_eval':
    return _get(row, place, 'instruction', str), (
      _get(row, place, 'output', str),
    )
  if 'messages' in row:
    key, messages = 'uid', _get(row, place, 'messages', list)
    turns = messages[-1:]
    if turns and isinstance(turns[0], Mapping):
      content = turns[0].get('content')
      turns = [content]
      if isinstance(content, Mapping):
        turns = [content.get('answer')]
  else:
    key, choices = 'question_id', _get(row, place, 'choices', list)
    choice = choices[0] if choices else None
    if not isinstance(choice, Mapping):
      raise records.RecordError(f'{place}: choices holds no answer')
    turns = _get(choice, f'{place}: choices', 'turns', list)
  return _get(row, place, key, (int, str)), _texts(turns, place)


def read_answers(
  name: str, path: epath.PathLike, questions: Sequence[Question]
) -> Answers:
  """Reads recorded answers to these questions, as upstream writes them.

  If a question has several answers, the last counts. An AlpacaEval instruction
  that occurs twice takes the answer at its own position in the file.

  Raises:
    records.RecordError: a bad entry, or a question without an answer to each of
      its turns.
  """
  given = {}
  for number, (place, row) in enumerate(_rows(path)):
    key, turns = _answer_of(name, row, place)
    given[key] = given[number, key] = turns
  found = {}
  for question in questions:
    key = question.turns[0] if name == 'alpaca_eval' else question.id
    turns = given.get((question.id, key), given.get(key, ()))
    if len(turns) < len(question.turns):
      raise records.RecordError(
        f'{path}: no answer to question {question.id} '
        f'({question.turns[0]!r:.60})'
      )
    found[question.id] = turns
  return found


def answer_rows(
  name: str, model: str, questions: Sequence[Question], answers: Answers
) -> list[dict[str, Any]]:
  """Answers as rows of upstream's files."""
  rows = []
  for question in questions:
    turns = list(answers[question.id])
    if name == 'alpaca_eval':
      about = {'dataset': question.category}
      about |= {'instruction': question.turns[0], 'output': turns[0]}
      rows.append(about | {'generator': model})
    elif 'uid' in question.row:
      message = {'role': 'user', 'content': question.turns[0]}
      reply = {'role': 'assistant', 'content': {'answer': turns[0]}}
      about = {'uid': question.id, 'ans_id': f'{model}-{question.id}'}
      about |= {'model': model, 'messages': [message, reply]}
      rows.append(about | {'tstamp': time.time(), 'metadata': {}})
    else:
      if name == 'arena_hard':
        turns = [{'content': text} for text in turns]
      about = {'question_id': question.id, 'model_id': model}
      about['answer_id'] = f'{model}-{question.id}'
      choices = [{'index': 0, 'turns': turns}]
      rows.append(about | {'choices': choices, 'tstamp': time.time()})
  return rows


def temperature(name: str, category: str) -> float:
  """The authors' sampling temperature; our choice for AlpacaEval."""
  return _TEMPERATURES[name].get(category, _TEMPERATURE[name])


# --- The judge's prompts ------------------------------------------------------


def needs_reference(question: Question) -> bool:
  """Whether MT-Bench's judge sees a reference answer to it."""
  return question.category in _REFERENCED


def read_layout(name: str, path: epath.PathLike) -> Any:
  """Reads the published layout of the judge's prompt.

  This is AlpacaEval's text file with <|im_start|> blocks, MT-Bench's
  judge_prompts.jsonl (returned by name), or Arena-Hard's YAML with
  `prompt_template`, `regex_pattern` (version 2: `regex_patterns`) and
  `system_prompt`, which may be a text for each category.

  Raises:
    records.RecordError: it does not have that form.
  """
  if name == 'alpaca_eval':
    text = records.read_text(path)
    blocks = re.findall(
      r'<\|im_start\|>(\w+)\n(.*?)\n?<\|im_end\|>', text, re.DOTALL
    )
    lacking = [
      key
      for key in ('instruction', 'output_1', 'output_2')
      if f'{{{key}}}' not in text
    ]
    if not blocks or lacking:
      raise records.RecordError(
        f'{path}: expected <|im_start|>ROLE ... <|im_end|> blocks with '
        '{instruction}, {output_1} and {output_2}'
      )
    return blocks
  if name == 'mt_bench':
    found = {}
    for place, row in _rows(path):
      for key in ('system_prompt', 'prompt_template', 'output_format'):
        _get(row, place, key, str)
      found[_get(row, place, 'name', str)] = row
    return found
  import yaml

  try:
    found = yaml.safe_load(records.read_text(path))
  except yaml.YAMLError as error:
    mark = getattr(error, 'problem_mark', None)
    line = f':{mark.line + 1}' if mark else ''
    text = getattr(error, 'problem', None) or ' '.join(str(error).split())
    raise records.RecordError(f'{path}{line}: not YAML ({text})') from error
  if not isinstance(found, Mapping):
    raise records.RecordError(f'{path}: expected keys and values')
  templates, several = found.get('prompt_template'), 'regex_patterns' in found
  patterns = (
    found['regex_patterns'] if several else [found.get('regex_pattern')]
  )
  templates = templates if isinstance(templates, list) else [templates]
  for key, values in (
    ('prompt_template', templates),
    ('regex_patterns' if several else 'regex_pattern', patterns),
  ):
    texts = values if isinstance(values, list) else [None]
    if not texts or not all(isinstance(text, str) for text in texts):
      raise records.RecordError(f'{path}: needs {key}, a text')
  system = found.get('system_prompt')
  texts = system.values() if isinstance(system, Mapping) else [system]
  if not texts or not all(isinstance(text, str) for text in texts):
    raise records.RecordError(
      f'{path}: needs system_prompt, a text, or a text for each category; '
      'version 2 has it in utils/judge_utils.py: copy it into this file'
    )
  try:
    patterns = [re.compile(pattern) for pattern in patterns]
  except re.error as error:
    raise records.RecordError(
      f'{path}: not a regular expression ({error})'
    ) from error
  return {
    'system_prompt': system,
    'prompt_template': templates[0],
    'patterns': patterns,
    'takes_last': several,
  }


def _system_prompt(layout: Mapping[str, Any], category: str) -> str:
  """Arena-Hard's system prompt, for the category if there are several."""
  system = layout['system_prompt']
  if isinstance(system, str):
    return system
  if category not in system:
    raise records.RecordError(
      f'the layout has no system_prompt for category {category!r}; it has '
      f'{", ".join(map(str, system))}'
    )
  return system[category]


def _filled(template: str, values: Mapping[str, str], where: str) -> str:
  try:
    return template.format(**values)
  except (KeyError, IndexError, ValueError) as error:
    raise records.RecordError(
      f'{where}: the layout asks for {error}; there are {", ".join(values)}'
    ) from error


def alpaca_requests(layout, model, questions, answers, baseline, seed):
  """One request per question; the seed decides which answer comes first."""
  requests = []
  for question in questions:
    ours, theirs = answers[question.id][0], baseline[question.id][0]
    drawn = records.draw(seed, 'alpaca_eval', question.turns[0], model)
    is_swapped = drawn[0] % 2 == 1
    first, second = (ours, theirs) if is_swapped else (theirs, ours)
    values = {'instruction': question.turns[0]}
    values |= {'output_1': first, 'output_2': second}
    messages = [
      {
        'role': role,
        # In one pass: an answer may contain another placeholder.
        'content': re.sub(
          r'\{(instruction|output_1|output_2)\}',
          lambda mark, values=values: values[mark[1]],
          text,
        ),
      }
      for role, text in layout
    ]
    about = {'index': question.id, 'instruction': question.turns[0]}
    about |= {'output_1': theirs, 'output_2': ours, 'generator_2': model}
    about['dataset'] = question.category
    requests.append(Request(messages, about, is_swapped))
  return requests


def mt_requests(layout, model, questions, answers, references, baseline=None):
  """One request per turn; for pairs (with a baseline) two, in both orders.

  The first turn is judged alone, the second with the first before it.
  """
  requests, form = [], 'single' if baseline is None else 'pair'
  for question in questions:
    is_referenced = needs_reference(question)
    for turn in range(1, len(question.turns) + 1):
      prompt = {'single': 'single-v1', 'pair': 'pair-v2'}[form]
      if is_referenced:
        prompt = f'{form}-math-v1'
      prompt += '-multi-turn' * (turn == 2)
      if prompt not in layout:
        raise records.RecordError(
          f'the layouts have no {prompt!r}: {", ".join(layout)}'
        )
      values = {'question': question.turns[0]}
      values |= {f'question_{i + 1}': x for i, x in enumerate(question.turns)}
      if is_referenced:
        if question.id not in references:
          raise records.RecordError(
            f'question {question.id} ({question.category}) needs a reference '
            'answer; give the file as references'
          )
        for i, text in enumerate(references[question.id]):
          values[f'ref_answer_{i + 1}'] = text
      for is_swapped in (False, True)[: 1 if baseline is None else 2]:
        ours, theirs = answers[question.id], (baseline or {}).get(question.id)
        if baseline is None:
          named = {'answer': ours}
        elif is_swapped:
          named = {'answer_a': theirs, 'answer_b': ours}
        else:
          named = {'answer_a': ours, 'answer_b': theirs}
        for key, turns in named.items():
          values[key] = turns[0]
          values |= {f'{key}_{i + 1}': text for i, text in enumerate(turns)}
        row = layout[prompt]
        user = _filled(row['prompt_template'], values, prompt)
        messages = [
          {'role': 'system', 'content': row['system_prompt']},
          {'role': 'user', 'content': user},
        ]
        about = {'question_id': question.id, 'turn': turn, 'prompt': prompt}
        about['category'] = question.category
        requests.append(Request(messages, about | {'model': model}, is_swapped))
  return requests


def arena_requests(layout, model, questions, answers, baseline):
  """Two requests per question: the baseline first, then the model first."""
  requests = []
  for question in questions:
    system = _system_prompt(layout, question.category)
    ours, theirs = answers[question.id][0], baseline[question.id][0]
    for is_swapped in (False, True):
      first, second = (ours, theirs) if is_swapped else (theirs, ours)
      values = {'question_1': question.turns[0], 'QUESTION': question.turns[0]}
      values |= {'answer_1': first, 'ANSWER_A': first}
      values |= {'answer_2': second, 'ANSWER_B': second}
      user = _filled(layout['prompt_template'], values, 'prompt_template')
      messages = [
        {'role': 'system', 'content': system},
        {'role': 'user', 'content': user},
      ]
      about = {'question': question.id, 'model': model}
      about |= {'category': question.category, 'is_v2': 'uid' in question.row}
      requests.append(Request(messages, about, is_swapped))
  return requests


# --- Replies ------------------------------------------------------------------


def _said(reply: Any) -> str:
  """The text of a reply without its reasoning, which may name any verdict."""
  return chat_judge.without_reasoning(chat_judge.content_of(reply)).strip()


def read_alpaca(reply: Any) -> float:
  """Preference, from 1 (the first output) to 2, as AlpacaEval 2 weighs it.

  This is 2 minus the share of 'm' in the probability of 'm' and 'M', if the
  service gives these for the first token and the reply has no reasoning.
  Otherwise the last 'm' or 'M' in the text decides.

  Raises:
    ValueError: the reply has neither.
  """
  try:
    top = reply['choices'][0]['logprobs']['content'][0]['top_logprobs']
    chances = {each['token']: math.exp(each['logprob']) for each in top}
  except (KeyError, IndexError, TypeError):
    chances = {}
  m, capital = chances.get('m', 0.0), chances.get('M', 0.0)
  said = _said(reply)
  reasons = said != chat_judge.content_of(reply).strip()
  if m + capital > 0 and not reasons:
    return 2 - m / (m + capital)
  found = re.findall(r'\b[mM]\b', said)
  if not found:
    raise ValueError('neither m nor M')
  return 1.0 if found[-1] == 'm' else 2.0


def read_grade(reply: Any) -> float:
  """The number in [[ ]], or in [ ]; ValueError if there is none."""
  text = _said(reply)
  for pattern in _ONE_RATING:
    if match := pattern.search(text):
      return float(match[1])
  raise ValueError(f'no [[rating]] in {text[-80:]!r}')


def read_winner(reply: Any) -> str:
  """'A', 'B' or 'tie' for [[A]], [[B]], [[C]]; ValueError if none is there."""
  text = _said(reply)
  for mark, winner in (('[[A]]', 'A'), ('[[B]]', 'B'), ('[[C]]', 'tie')):
    if mark in text:
      return winner
  raise ValueError(f'no verdict in {text[-80:]!r}')


def read_label(reply: Any, layout: Mapping[str, Any]) -> str:
  """Arena-Hard's verdict, such as A>>B.

  Follows upstream's code: in version 1, several different verdicts count as
  none; in version 2 (`takes_last`), the last one counts.

  Raises:
    ValueError: there is no verdict.
  """
  text = _said(reply)
  for pattern in layout['patterns']:
    said = text.upper() if layout['takes_last'] else text
    found = [match.strip() for match in pattern.findall(said) if match]
    if not found:
      continue
    if not layout['takes_last'] and len(set(found)) > 1:
      raise ValueError(f'several verdicts: {sorted(set(found))}')
    if _label_scores(found[-1]) is not None:
      return found[-1]
    break
  raise ValueError(f'no verdict in {text[-80:]!r}')


def _label_scores(label: str) -> list[float] | None:
  """A's score for a label, repeated if it is clear; None for other labels."""
  match = re.fullmatch(r'([AB])(>>|>|=|<|<<)([AB])', label)
  if not match or match[1] == match[3]:
    return None
  if match[2] == '=':
    return [0.5]
  score = float((match[1] == 'A') == ('>' in match[2]))
  return [score] * (_CLEAR if len(match[2]) == 2 else 1)


# --- Judgements, as upstream's files have them --------------------------------


def alpaca_rows(requests, values, texts, generator, annotator):
  """Rows of annotations.json; the preference is for output_2, the model's."""
  rows = []
  for request, value, text in zip(requests, values, texts, strict=True):
    if value is not None and request.is_swapped:
      value = 3 - value
    about = {k: v for k, v in request.about.items() if k != 'index'}
    about |= {'generator_1': generator, 'annotator': annotator}
    rows.append(about | {'preference': value, 'raw_completion': text})
  return rows


def mt_rows(requests, values, texts, judge, generator=None):
  """Lines of JUDGE_single.jsonl or, with a baseline, JUDGE_pair.jsonl."""
  rows, step = [], 1 if generator is None else 2
  for start in range(0, len(requests), step):
    request = requests[start]
    about = {key: request.about[key] for key in ('question_id', 'turn')}
    about |= {'judge': [judge, request.about['prompt']], 'tstamp': time.time()}
    if generator is None:
      score = -1 if values[start] is None else values[start]
      about |= {'model': request.about['model'], 'score': score}
      about['user_prompt'] = request.messages[-1]['content']
      about['judgment'] = texts[start]
    else:
      about |= {'model_1': request.about['model'], 'model_2': generator}
      for game in range(2):
        asked = requests[start + game]
        sides = ('model_2', 'model_1') if asked.is_swapped else (
          'model_1', 'model_2'
        )  # fmt: skip
        winner = {'A': sides[0], 'B': sides[1], None: 'error'}.get(
          values[start + game], 'tie'
        )
        about[f'g{game + 1}_winner'] = winner
        about[f'g{game + 1}_user_prompt'] = asked.messages[-1]['content']
        about[f'g{game + 1}_judgment'] = texts[start + game]
    rows.append(about)
  return rows


def arena_rows(requests, values, texts, judge, generator):
  """Lines of model_judgment/JUDGE/MODEL.jsonl, in the questions' version."""
  rows = []
  for start in range(0, len(requests), 2):
    about, games = requests[start].about, []
    for place in (start, start + 1):
      messages = requests[place].messages
      if about['is_v2']:
        game = {'judgment': {'answer': texts[place]}, 'prompt': messages}
      else:
        game = {'judgment': texts[place]}
        game['user_prompt'] = messages[-1]['content']
      games.append({'score': values[place], **game})
    row = {'model': about['model'], 'judge': judge, 'games': games}
    if about['is_v2']:
      row |= {'uid': about['question'], 'category': about['category']}
      row['baseline'] = generator
    else:
      row['question_id'] = about['question']
    rows.append(row)
  return rows


# --- Figures ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gamed:
  """The content of AlpacaEval's df_gamed.csv.

  It has preferences for two gamed baselines, one instructed to be terse and one
  to be verbose, and the difficulty of each instruction.
  """

  index: np.ndarray  # [n] number of the instruction.
  preference: np.ndarray  # [n] 0 to 1; NaN if there is none.
  length: np.ndarray  # [n] difference of lengths in standard deviations.
  difficulty: np.ndarray  # [n]


def read_gamed(path: epath.PathLike) -> Gamed:
  """Reads df_gamed.csv.

  Raises:
    records.RecordError: a column is missing, or a cell is not a number.
  """
  columns = ('index', 'preference', 'std_delta_len', 'instruction_difficulty')
  found = collections.defaultdict(list)
  for line, row in sources.read_csv(path, columns):
    for name in columns:
      cell = row[name]
      if name == 'preference':
        cell = cell.strip() or 'nan'
      try:
        found[name].append(float(cell))
      except ValueError as error:
        raise records.RecordError(f'{path}:{line}: {name}: {error}') from error
  index, *others = (np.array(found[name]) for name in columns)
  if not np.isfinite([index, *others[1:]]).all():
    raise records.RecordError(f'{path}: a cell is not a finite number')
  return Gamed(index.astype(int), *others)


def _logistic(x: np.ndarray) -> np.ndarray:
  return (1 + np.tanh(x / 2)) / 2


def fit_lasso(
  design: np.ndarray,
  y: np.ndarray,
  weights: np.ndarray,
  strength: float,
  start: np.ndarray | None = None,
) -> np.ndarray:
  """Logistic regression on fractions with an L1 penalty, in liblinear's form.

  Minimises |θ|₁ + C Σ w [y log(1 + e^-z) + (1 - y) log(1 + e^z)], z = design θ,
  by Newton's method: each step minimises the quadratic approximation together
  with the penalty, and is halved until the objective falls.

  Args:
    design: [n, k]
    y: [n] from 0 to 1.
    weights: [n]
    strength: C.
    start: [k] a first guess; None is 0.
  """

  def objective(theta):
    z = design @ theta
    loss = y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)
    return np.abs(theta).sum() + strength * (weights @ loss)

  theta = np.zeros(design.shape[1]) if start is None else start
  value = objective(theta)
  for _ in range(_MAX_STEPS):
    chance = _logistic(design @ theta)
    gradient = strength * (design.T @ (weights * (chance - y)))
    curvature = strength * weights * chance * (1 - chance)
    hessian = (design.T * curvature) @ design
    step = _penalised_step(theta, gradient, hessian)
    size = 1.0
    while size > 1e-9 and objective(theta + size * step) > value:
      size /= 2
    theta = theta + size * step
    last, value = value, objective(theta)
    if last - value <= 1e-13 * (1 + abs(value)):
      break
  return theta


def _penalised_step(theta, gradient, hessian):
  """Minimises gradient·d + d·hessian·d / 2 + |θ + d|₁ by coordinate descent."""
  step, slope = np.zeros_like(theta), gradient.copy()
  for _ in range(_MAX_SWEEPS):
    largest = 0.0
    for k, bend in enumerate(np.diag(hessian)):
      if not bend > 0:
        continue  # The column is 0.
      free = theta[k] + step[k] - slope[k] / bend
      change = np.sign(free) * max(abs(free) - 1 / bend, 0.0)
      change -= theta[k] + step[k]
      step[k] += change
      slope += change * hessian[k]
      largest = max(largest, abs(change))
    if largest <= 1e-10 * (1 + np.abs(theta + step).max()):
      break
  return step


def choose_strength(
  design: np.ndarray, y: np.ndarray, weights: np.ndarray
) -> float:
  """The C with the lowest weighted log loss over five folds.

  Rows are dealt to the folds in turn. Upstream's folds differ: they depend on
  how a library sorts equal numbers.
  """
  folds = np.arange(len(y)) % _NUM_FOLDS
  losses = np.zeros((len(_STRENGTHS), _NUM_FOLDS))
  for i, strength in enumerate(_STRENGTHS):
    for fold in range(_NUM_FOLDS):
      seen, unseen = folds != fold, folds == fold
      theta = fit_lasso(design[seen], y[seen], weights[seen], strength)
      z = design[unseen] @ theta
      y_out = y[unseen]
      loss = y_out * np.logaddexp(0, -z) + (1 - y_out) * np.logaddexp(0, z)
      losses[i, fold] = np.mean(weights[unseen] * loss)
  return float(_STRENGTHS[losses.mean(axis=1).argmin()])


def check_difficulties(index: Sequence[int], gamed: Gamed) -> None:
  """Raises ValueError if the file lacks the difficulty of an instruction."""
  known = set(gamed.index.tolist())
  unknown = [each for each in index if each not in known]
  if unknown:
    raise ValueError(
      f'{len(unknown)} instructions are not in the file of difficulties, first '
      f'number {unknown[0]}; questions must be in the published order'
    )


def length_controlled(
  index: Sequence[int],
  preference: win_rate.Numbers,
  lengths: np.ndarray,
  gamed: Gamed,
) -> win_rate.Interval:
  """AlpacaEval 2's length-controlled win rate (Dubois et al. 2024, version 1).

  A logistic regression of the preference on tanh of the difference of lengths
  (in standard deviations), the instruction's difficulty, and a constant. The
  two gamed baselines are rows without the constant, with a total weight of 0.2.
  The rate is the mean prediction at equal lengths. The penalty's strength is
  chosen by cross-validation (`choose_strength`).

  Args:
    index: [n] positions of the instructions in the benchmark's file.
    preference: [n] for the model, 0 to 1; NaN if it is not known. Such an
      instruction is predicted, as upstream does, but not learned from.
    lengths: [n, 2] characters of the baseline's and of the model's answers.
    gamed: the published file.

  Returns:
    The rate, 0 to 1; its interval resamples instructions at the same strength.

  Raises:
    ValueError: the file lacks an instruction, or the differences of lengths do
      not vary.
  """
  check_difficulties(index, gamed)
  pairs = zip(gamed.index.tolist(), gamed.difficulty.tolist(), strict=True)
  difficulty_of = dict(pairs)
  difficulty = np.array([difficulty_of[each] for each in index])
  difference = np.asarray(lengths, float)[:, 0] - np.asarray(lengths)[:, 1]
  if len(difference) < 2 or not difference.std() > 0:
    raise ValueError('the differences of lengths do not vary')
  ones = np.ones(len(difficulty))
  ours = np.column_stack(
    [np.tanh(difference / difference.std(ddof=1)), difficulty, ones]
  )
  theirs = np.column_stack(
    [np.tanh(gamed.length), gamed.difficulty, np.zeros(len(gamed.index))]
  )
  design = np.concatenate([theirs, ours])
  y = np.concatenate([gamed.preference, np.asarray(preference, float)])
  known = np.isfinite(y)
  light = np.full(len(gamed.index), _GAMED_WEIGHT / 2)
  equal = np.column_stack([0 * ones, difficulty, ones])

  def known_rows(counts):
    return design[known], y[known], np.concatenate([light, counts])[known]

  def rate(theta, counts):
    return float(counts @ _logistic(equal @ theta) / counts.sum())

  strength = choose_strength(*known_rows(ones))
  found = fit_lasso(*known_rows(ones), strength)
  redraws = [
    rate(fit_lasso(*known_rows(counts), strength, found), counts)
    for block in win_rate.redraw_counts(len(ones), _NUM_REFITS, 0)
    for counts in block
  ]
  low, high = map(float, win_rate.bounds(redraws))
  return win_rate.Interval(rate(found, ones), low, high, len(ones))


def measure_alpaca(
  requests: Sequence[Request],
  rows: Sequence[Mapping[str, Any]],
  gamed: Gamed | None,
  num_bootstrap: int,
) -> dict[str, Any]:
  """Win rate, with `gamed` also length-controlled, and mean characters."""
  index = [request.about['index'] for request in requests]
  preference = np.array(
    [
      math.nan if row['preference'] is None else row['preference'] - 1
      for row in rows
    ]
  )
  lengths = np.array([[len(x['output_1']), len(x['output_2'])] for x in rows])
  read, found = np.flatnonzero(np.isfinite(preference)), {}
  if len(read) and gamed is not None:
    try:
      found['length-controlled win rate'] = length_controlled(
        index, preference, lengths, gamed
      )
    except ValueError as error:
      found['without length control'] = str(error)
  if len(read):
    found['win rate'] = win_rate.mean_interval(
      preference[read], read, num_bootstrap=num_bootstrap
    )
  found['characters'] = float(lengths[:, 1].mean())
  return found | {'unread': len(rows) - len(read)}


def measure_mt(
  requests: Sequence[Request],
  rows: Sequence[Mapping[str, Any]],
  num_bootstrap: int,
) -> dict[str, Any]:
  """Mean grade, or win rate, over all turns, by turn and by category.

  A pair is won or lost if both orders agree; otherwise it is a tie, which
  counts half.
  """
  step = len(requests) // len(rows)
  values, unread = collections.defaultdict(list), 0
  for row, request in zip(rows, requests[::step], strict=True):
    if 'score' in row:
      value = None if row['score'] == -1 else row['score']
    else:
      winners = {row['g1_winner'], row['g2_winner']}
      value = {'model_1': 1.0, 'model_2': 0.0}.get(
        row['g1_winner'] if len(winners) == 1 else 'tie', 0.5
      )
      value = None if 'error' in winners else value
    if value is None:
      unread += 1
      continue
    names = ('all', f'turn {row["turn"]}', request.about['category'])
    for name in filter(None, names):
      values[name].append((value, row['question_id']))
  order = ['all', 'turn 1', 'turn 2', *sorted(values)]
  return {
    name: win_rate.mean_interval(
      *zip(*values[name], strict=True), num_bootstrap=num_bootstrap
    )
    for name in dict.fromkeys(order)
    if name in values
  } | {'unread': unread}


def measure_arena(
  requests: Sequence[Request],
  rows: Sequence[Mapping[str, Any]],
  num_bootstrap: int,
) -> dict[str, Any]:
  """Win rate over both games, for all questions and for each category.

  Categories are measured only if there are several. A question with an unread
  game is left out.
  """
  wins, counts, categories = [], [], []
  for request, row in zip(requests[::2], rows, strict=True):
    labels = [game['score'] for game in row['games']]
    if None in labels:
      continue
    # The model is B in the first game and A in the second.
    scores = [1 - score for score in _label_scores(labels[0])]
    scores += _label_scores(labels[1])
    wins.append(sum(scores))
    counts.append(len(scores))
    categories.append(request.about['category'])
  found, categories = {}, np.array(categories)
  wins, counts = np.array(wins, float), np.array(counts, float)
  places = {'win rate': np.arange(len(wins))}
  if len(set(categories)) > 1:
    places |= {
      str(x): np.flatnonzero(categories == x) for x in sorted(set(categories))
    }
  for name, where in places.items():
    if len(where):
      found[name] = win_rate.ratio_interval(
        wins[where], counts[where], where, num_bootstrap=num_bootstrap
      )
  return found | {'unread': len(rows) - len(wins)}


def to_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
  """The rows as JSONL."""
  return ''.join(
    json.dumps(row, ensure_ascii=False) + '\n' for row in rows
  ).encode()
