"""Centres a reward model, such as a published one, on demonstrations (3.5).

Published reward models have an arbitrary mean score. This job shifts the bias
of the head so that the labelers' demonstrations score 0 on average, as the
reward stage does for its own model, and stores the range of scores seen.
"""

import dataclasses

import numpy as np
from etils import epath

from instruct_jax import model_fns, model_folder, queries, rankings
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import run as run_lib
from instruct_jax.infra import sharding, slices
from instruct_jax.models.config import check_stage

PROCESSES = 'all'


def validate(config):
  """Checks the config. ValueError names the key."""
  check_stage(config)
  for key in ('reward_model', 'tokenizer', 'demonstrations'):
    if not config[key]:
      raise ValueError(f'{key} is empty; give its path')
  for key in ('row_length', 'batch_size'):
    if config[key] < 1:
      raise ValueError(f'{key} must be positive: {config[key]}')


def inputs(config):
  """What this stage reads, by config key."""
  keys = ['reward_model', 'tokenizer', 'demonstrations']
  keys += ['comparisons'] * bool(config.comparisons)
  return {key: config[key] for key in keys}


def scores_of(config, model, comparisons, tokenizer, mesh):
  """(scores of all completions that fit, number of records that do not)."""
  rows, dropped = loader.comparison_rows(
    comparisons,
    tokenizer,
    max(len(c.completions) for c in comparisons),
    config.row_length,
  )
  program = sharding.fetched(queries.score_program(model.module))
  present = rows.mask.any(axis=2)
  scores = slices.in_batches(
    lambda batch: program(model.params, *sharding.put_whole(batch, mesh)),
    (rows.tokens[present], rows.mask[present]),
    config.batch_size,
  )
  return scores, dropped


def run(config, workdir: epath.Path):
  """Centres a reward model; writes `model/` and results.json.

  Returns:
    The content of results.json: `reward_shift`, the demonstrations' mean score
    before the shift, and their `standard_deviation`; `score_range`, of all
    scores after the shift; and counts.

  Raises:
    ValueError: no demonstration fits, or the model has a different tokenizer.
  """
  validate(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  tokenizer_lib.check_published(tokenizer, config.reward_model)
  demonstrations = [
    records.Comparison(d.prompt, (d.response,), (1,), turns=d.turns)
    for d in records.read_jsonl(config.demonstrations, records.Demonstration)
  ]
  ranked = []
  if config.comparisons:
    ranked = records.read_jsonl(config.comparisons, records.Comparison)
  mesh = model_folder.make_mesh(
    config.mesh, [config.reward_model], [config.batch_size]
  )
  with sharding.use_mesh(mesh):
    model = model_folder.load(
      config.reward_model,
      'scalar',
      mesh,
      tokenizer,
      compute_dtype=config.compute_dtype,
    )
    model_fns.check_context(model, config.row_length, 'row_length')
    scores, dropped = scores_of(config, model, demonstrations, tokenizer, mesh)
    run_lib.tell_dropped(
      config.name, dropped.describe('demonstrations', 'row_length')
    )
    params, shift = rankings.centred(model.params, scores)
    seen, num_left_out = scores, 0
    if ranked:
      others, left_out = scores_of(config, model, ranked, tokenizer, mesh)
      seen, num_left_out = np.concatenate([scores, others]), left_out.total
    seen = seen - shift
    results = {
      'reward_shift': shift,
      'standard_deviation': float(np.std(scores, dtype=np.float64)),
      'score_range': [float(seen.min()), float(seen.max())],
      'num_demonstrations': len(scores),
      'num_dropped': dropped.total,
      'num_answers': len(seen) - len(scores),
      'num_comparisons_dropped': num_left_out,
    }
    model_folder.save(
      workdir / 'model',
      dataclasses.replace(model, params=params),
      tokenizer,
      {'stage': config.name, 'from': config.reward_model, **results},
    )
  run_lib.write_json(workdir / 'results.json', results)
  run_lib.say(
    f'{config.name}: {len(scores)} demonstrations scored {shift:.3f} on '
    f'average, and now 0; scores seen from {seen.min():.3f} to {seen.max():.3f}'
  )
  return results
