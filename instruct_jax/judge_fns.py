"""Judges that the config names: reward models, and any Python function.

`config.judge` is the dotted name of a class or a function. A class must be a
`judges.Judge`: `RewardModel` below, `evals.judges.People`,
`evals.chat_judge.ChatJudge`, a judge of one of the worlds, or a user's own. A
function scores texts like a `reward_fn` (`score_fns.py`); the answer with the
higher score is better.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from instruct_jax import model_folder, queries, score_fns
from instruct_jax.data import records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import judges
from instruct_jax.evals import samples as samples_lib


def find(name: str) -> type[judges.Judge]:
  """The judge class of a dotted name; raises ValueError if there is none."""
  found = score_fns.find(name, 'judge')
  if isinstance(found, type) and issubclass(found, judges.Judge):
    return found
  if isinstance(found, type) or not callable(found):
    raise ValueError(
      f'judge {name!r} must be a function of texts or a class of judges.Judge'
    )
  return Function


def source_of(name: str) -> dict[str, str]:
  """`score_fns.source_of` a judge, without Python files of this package."""
  files = score_fns.source_of(name, 'judge')
  if name.startswith(f'{__package__}.'):
    files = {k: path for k, path in files.items() if not path.endswith('.py')}
  return files


class Function(judges.Judge):
  """A Python function of the texts, `config.judge`."""

  def __init__(self, config: ConfigDict, workdir: epath.Path, mesh: Any):
    super().__init__(config, workdir, mesh)
    self._function = score_fns.find(config.judge, 'judge')
    self.name = f'{config.judge} (a function of the texts)'
    self._key = f'judge {config.judge}'

  def score(self, answers: Sequence[judges.Answer]) -> np.ndarray:
    """See `score_fns.score_texts`."""
    prompts, samples = zip(*answers, strict=True)
    return score_fns.score_texts(
      self._key,
      self._function,
      prompts,
      [sample.response for sample in samples],
      [sample.ended for sample in samples],
      [sample.num_tokens for sample in samples],
    )


class RewardModel(judges.Judge):
  """The reward model `config.judge_model`, ours or a published classifier."""

  needs = reads = ('judge_model',)

  def __init__(
    self, config: ConfigDict, workdir: epath.Path, mesh: jax.sharding.Mesh
  ):
    super().__init__(config, workdir, mesh)
    self._score_fn, tokenizer = reward_score(config, config.judge_model, mesh)
    self.name = (
      f'a reward model (no person): {config.judge_model}; it reads '
      f'{tokenizer.describe()}'
    )

  def score(self, answers: Sequence[judges.Answer]) -> np.ndarray:
    """Scores in reward units; see `reward_score`."""
    return self._score_fn(answers)


def reward_score(
  config: ConfigDict, folder: str, mesh: jax.sharding.Mesh
) -> tuple[judges.ScoreFn, tokenizer_lib.Tokenizer]:
  """(score function of a reward model, in reward units; its tokenizer).

  Answers that were sampled with the same tokenizer are scored by their sampled
  ids. `config` has `tokenizer`, `compute_dtype` and `batch_size`.
  """
  tokenizer = queries.tokenizer_of(folder, config.tokenizer, chat=True)
  model = model_folder.load(
    folder, 'scalar', mesh, tokenizer, compute_dtype=config.compute_dtype
  )

  def score(answers):
    return queries.score_answers(
      model,
      tokenizer.encode_prompts([prompt for prompt, _ in answers]),
      [queries.answer_ids(tokenizer, answer) for _, answer in answers],
      tokenizer.pad_id,
      config.batch_size,
      mesh,
      shown_as=folder,
    )

  return score, tokenizer


def prompt_of(comparison: records.Comparison) -> records.Prompt:
  """The prompt of a comparison."""
  return records.Prompt(
    id=comparison.id,
    text=comparison.prompt,
    category=comparison.category,
    metadata=comparison.metadata,
    turns=comparison.turns,
  )


def comparison_scores(
  score_fn: judges.ScoreFn,
  comparisons: Sequence[records.Comparison],
  tokenizer: tokenizer_lib.Tokenizer,
) -> list[np.ndarray]:
  """The scores of each comparison's completions.

  `score_fn` gets them as the policy's answers, ended or cut as recorded;
  `tokenizer` counts their tokens. Completions that several labelers ranked are
  scored once.
  """

  def key(comparison):
    ends = records.ends_of(comparison)
    return comparison.prompt, comparison.turns, comparison.completions, ends

  distinct = {key(comparison): comparison for comparison in comparisons}
  owners, texts, ended = zip(
    *(
      (c, *answer)
      for c in distinct.values()
      for answer in zip(c.completions, records.ends_of(c), strict=True)
    ),
    strict=True,
  )
  ids = tokenizer.encode_responses(texts)
  pairs = [
    (
      prompt_of(c),
      samples_lib.Sample('', c.id, c.prompt, text, len(own) + end, end),
    )
    for c, text, end, own in zip(owners, texts, ended, ids, strict=True)
  ]
  ends = np.cumsum([len(c.completions) for c in distinct.values()])
  scores = np.split(np.asarray(score_fn(pairs), float), ends[:-1])
  by_key = dict(zip(distinct, scores, strict=True))
  return [by_key[key(comparison)] for comparison in comparisons]
