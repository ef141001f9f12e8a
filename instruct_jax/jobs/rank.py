"""Samples a model's answers, which simulated, noisy labelers rank.

A labeler scores the K answers to a prompt with `score_fn`, adds independent
noise, and orders them (Ziegler et al. 2019 use K = 4).
"""

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from instruct_jax import asking, model_fns, queries, score_fns
from instruct_jax.data import records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import sharding
from instruct_jax.models.config import check_stage

PROCESSES = 'all'
SPLITS = {'train': 'prompts', 'valid': 'valid_prompts'}


def validate(config: ConfigDict) -> None:
  """Checks sizes, and that `score_fn` exists."""
  check_stage(config)
  if config.num_candidates < 2 or config.num_labelers < 1:
    raise ValueError(
      'num_candidates must be at least 2 and num_labelers at least 1: '
      f'{config.num_candidates}, {config.num_labelers}'
    )
  score_fns.find_function(config.score_fn)


def inputs(config: ConfigDict) -> dict[str, str]:
  """What this stage reads, by config key."""
  keys = ('model', 'tokenizer', *SPLITS.values())
  found = {key: config[key] for key in keys}
  return found | score_fns.source_of(config.score_fn, 'score_fn')


def rank(
  config: ConfigDict,
  prompts: list[records.Prompt],
  texts: list[list[str]],
  ended: list[list[bool]],
  scores: np.ndarray,
  rng: np.random.Generator,
) -> list[records.Comparison]:
  """One labeler's ranking of each prompt's answers.

  Args:
    config: has `num_labelers` and `labeler_noise`.
    prompts: N prompts.
    texts: K answers to each prompt.
    ended: whether each answer ended by itself.
    scores: the scores of the answers [N, K].
    rng: draws the labelers and their noise.
  """
  noise = rng.normal(scale=config.labeler_noise, size=scores.shape)
  labelers = rng.integers(config.num_labelers, size=len(prompts))
  return [
    records.Comparison(
      prompt=prompt.text,
      completions=tuple(several),
      ranks=records.ranks_of_scores(row.tolist()),
      id=prompt.id,
      labeler=f'simulated:{labeler}',
      ended=tuple(ends),
    )
    for prompt, several, ends, row, labeler in zip(
      prompts, texts, ended, scores + noise, labelers, strict=True
    )
  ]


def run(config: ConfigDict, workdir: epath.Path) -> dict[str, int]:
  """Samples, scores and ranks; writes comparisons_train and _valid.jsonl.

  Returns:
    The number of rankings in each file.
  """
  validate(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  function = score_fns.find_function(config.score_fn)
  mesh, counts, K = sharding.make_mesh(config.mesh), {}, config.num_candidates
  with sharding.use_mesh(mesh):
    policy = queries.load_policy(
      config.model, tokenizer, mesh, compute_dtype=config.compute_dtype
    )
    model_fns.check_context(
      policy,
      config.prompt_length + config.response_length,
      'prompt_length + response_length',
    )
    for number, (split, key) in enumerate(SPLITS.items()):
      drawn, _ = asking.draw(config, key, config[f'num_{key}'])
      answers = asking.sample(config, split, policy, drawn, tokenizer, mesh, K)
      by_id = {prompt.id: prompt for prompt in drawn}
      prompts = [by_id[answer.prompt_id] for answer in answers]
      scores = score_fns.score_texts(
        f'score_fn {config.score_fn}',
        function,
        prompts,
        [answer.response for answer in answers],
        [answer.ended for answer in answers],
        [answer.num_tokens for answer in answers],
      ).reshape(-1, K)
      groups = [answers[i : i + K] for i in range(0, len(answers), K)]
      texts = [[answer.response for answer in each] for each in groups]
      ended = [[answer.ended for answer in each] for each in groups]
      rng = np.random.default_rng([config.seed, number])
      rows = rank(config, prompts[::K], texts, ended, scores, rng)
      if jax.process_index() == 0:
        records.write_jsonl(workdir / f'comparisons_{split}.jsonl', rows)
      counts[f'comparisons_{split}'] = len(rows)
  return counts
