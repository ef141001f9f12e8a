"""Recorded answers: JSONL with a line per model and prompt; side-by-side rows.

All figures of the report that assess text can be recomputed from these files
(paper, appendix F).
"""

import collections
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from instruct_jax.data import records


@dataclasses.dataclass(frozen=True)
class Sample:
  """One answer of one model."""

  model: str  # The policy, say 'ppo_ptx'.
  prompt_id: str  # The same in every model's file.
  prompt: str  # As given to the model, without any few-shot prefix.
  response: str  # Decoded, without end-of-text.
  num_tokens: int  # Tokens sampled, end-of-text included.
  ended: bool  # Whether the policy itself ended the answer.
  category: str = ''  # Use case of the prompt.
  score_judge: float | None = None  # The judge's score, in its own unit.
  score_reward: float | None = None  # The reward model's, in reward units.
  # Labels of the answer, such as Table 3's.
  metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


def draw_prompts(prompts: Sequence[Any], number: int, seed: int) -> list[Any]:
  """Draws at most `number` of a file's prompts.

  The draw depends only on texts, ids and seed, not on the order of the file,
  which may be by topic or by time. If there are no more than `number`, all are
  returned in their order.

  Args:
    prompts: records with `text` and `id`.
    number: the most to draw.
    seed: of the draw.
  """
  if len(prompts) <= number:
    return list(prompts)

  def place(prompt):
    content = f'{seed}\0{prompt.text}\0{prompt.id}'
    return hashlib.sha256(content.encode()).digest()

  return sorted(prompts, key=place)[:number]


_SCORES = ('score_judge', 'score_reward')
# What each field may hold.
_TYPES: Mapping[str, type | tuple[type, ...]] = {
  'model': str,
  'prompt_id': str,
  'prompt': str,
  'response': str,
  'num_tokens': int,
  'ended': bool,
  'category': str,
  **dict.fromkeys(_SCORES, (float, int, type(None))),
  'metadata': dict,
}
# The fields without a default.
_REQUIRED = tuple(_TYPES)[:6]


def write_samples(
  path: epath.PathLike, samples: Iterable[Sample]
) -> epath.Path:
  """Writes samples as JSONL (or `.gz`), all or nothing; returns the path.

  Raises:
    ValueError: a score is not finite; JSON has no such number.
  """
  lines = []
  for sample in samples:
    for name in _SCORES:
      score = getattr(sample, name)
      if score is not None and not math.isfinite(score):
        raise ValueError(
          f'{name} of model {sample.model!r}, prompt {sample.prompt_id!r} is '
          f'{score}; expected a finite number or None'
        )
    values = dataclasses.asdict(sample)
    lines.append(json.dumps(values, ensure_ascii=False, allow_nan=False) + '\n')
  records.write_bytes(path, ''.join(lines).encode())
  return epath.Path(path)


def _problem(values: Mapping[str, Any]) -> str:
  """What is wrong with the values of a line; '' if nothing is."""
  unknown = sorted(set(values) - set(_TYPES))
  missing = [name for name in _REQUIRED if name not in values]
  if unknown or missing:
    return f'unknown fields {unknown}, missing fields {missing}'
  for name, value in values.items():
    # Python's bool is an int.
    is_bool = isinstance(value, bool)
    if not isinstance(value, _TYPES[name]) or is_bool != (name == 'ended'):
      return f'field {name!r} holds {value!r:.60}'
    is_score = name in _SCORES and value is not None
    if not records.is_json(value) or is_score and not records.is_number(value):
      return (
        f'field {name!r} is not JSON: numbers must be finite, texts without '
        'lone surrogates'
      )
  ids = values.get('metadata', {}).get('ids', [])
  if not isinstance(ids, list) or not all(
    type(number) is int and number >= 0 for number in ids
  ):
    return f"'ids' of 'metadata' must be a list of token ids, found {ids!r:.60}"
  return ''


def read_samples(path: epath.PathLike) -> list[Sample]:
  """Reads what `write_samples` wrote, plain or `.gz`, in order.

  Raises:
    RecordError: the file cannot be read, bad lines (see
      `records.raise_problems`), or no sample.
  """
  found, bad = [], []
  for number, values in records.iterate_lines(path):
    problem = values if isinstance(values, str) else _problem(values)
    if problem:
      bad.append((number, problem))
      continue
    # Other programs may write 1 for 1.0.
    scores = {
      name: float(values[name])
      for name in _SCORES
      if values.get(name) is not None
    }
    found.append(Sample(**{**values, **scores}))
  records.raise_problems(path, bad)
  if not found:
    raise records.RecordError(f'{path}: no sample in this file')
  return found


@dataclasses.dataclass(frozen=True)
class Row:
  """One prompt with each model's first recorded answer."""

  prompt_id: str
  prompt: str
  category: str
  answers: Mapping[str, Sample]

  @property
  def turns(self) -> tuple[records.Turn, ...]:
    """The prompt's turns; a prompt that is no conversation is one turn."""
    return records.turns_of(self.prompt)


def side_by_side(
  samples: Iterable[Sample], models: Sequence[str], num_prompts: int
) -> list[Row]:
  """Picks prompts that every model answered, round-robin over categories.

  Categories come in order of first appearance, and so do the prompts of each.

  Args:
    samples: answers of several models.
    models: columns of the table; others are ignored.
    num_prompts: the most rows to return.

  Returns:
    At most `num_prompts` rows; fewer if fewer prompts have all the answers.
  """
  answers = collections.defaultdict(dict)
  for sample in samples:
    if sample.model in models:
      answers[sample.prompt_id].setdefault(sample.model, sample)
  queues = collections.defaultdict(collections.deque)
  for prompt_id, by_model in answers.items():
    if len(by_model) == len(set(models)):
      first = by_model[models[0]]
      ordered = {model: by_model[model] for model in models}
      queues[first.category].append(
        Row(prompt_id, first.prompt, first.category, ordered)
      )
  rows = []
  while len(rows) < num_prompts and any(queues.values()):
    for queue in queues.values():
      if queue and len(rows) < num_prompts:
        rows.append(queue.popleft())
  return rows
