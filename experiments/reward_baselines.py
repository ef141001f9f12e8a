"""A reward model beside what needs no language model, by kind of prompt.

Baselines: the longer (or the shorter) completion is better, whichever holds in
training; and Bradley-Terry on bags of words, its ridge chosen within the
training rankings. Each is fit on the training rankings of one category, the
reward model has seen all of them.
"""

import jax
from etils import epath

from instruct_jax import artifacts, masked, rollout
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import baselines, preference_accuracy
from instruct_jax.infra import run as run_lib
from instruct_jax.infra import sharding


def validate(config):
  if config.batch_size < 1:
    raise ValueError(f'batch_size must be positive: {config.batch_size}')


def run(config, workdir: epath.Path):
  validate(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  train = records.read_jsonl(config.comparisons, records.Comparison)
  valid = records.read_jsonl(config.valid_comparisons, records.Comparison)
  kept = loader.fitting_comparisons(valid, tokenizer, config.row_length)
  num_candidates = max(len(c.completions) for c in kept)
  rows, _ = loader.comparison_rows(
    kept, tokenizer, num_candidates, config.row_length
  )
  mesh = sharding.make_mesh(config.mesh)
  with sharding.use_mesh(mesh):
    reward = artifacts.load(
      config.reward_model, 'scalar', mesh, tokenizer.fingerprint
    )
    scalars_fn = artifacts.scalars_fn(reward.module)
    score = jax.jit(
      lambda params, tokens, mask: masked.at_last(
        scalars_fn(params, tokens, mask), mask
      )
    )
    scores = rollout.in_batches(
      lambda batch: score(reward.params, *sharding.put_batch(batch, mesh)),
      tuple(x.reshape(-1, config.row_length) for x in (rows.tokens, rows.mask)),
      config.batch_size,
    ).reshape(len(kept), num_candidates)

  def accuracy(wanted, scores_of):
    found = preference_accuracy.pairwise_accuracy(
      [scores_of(i) for i in wanted],
      [kept[i].ranks for i in wanted],
      [kept[i].prompt for i in wanted],
    )
    return {'accuracy': found.accuracy, 'low': found.low, 'high': found.high}

  results = {'num_left_out': len(valid) - len(kept), 'categories': {}}
  for name in sorted({c.category for c in kept}):
    wanted = [i for i, c in enumerate(kept) if c.category == name]
    seen = [c for c in train if c.category == name]
    l2 = baselines.choose_l2(seen)
    judges = {
      'length': baselines.fit_length(seen),
      'bag of words': baselines.fit_bag_of_words(seen, l2=l2),
    }
    row = {
      'num_comparisons': len(wanted),
      'l2': l2,
      'reward model': accuracy(
        wanted, lambda i: scores[i][: len(kept[i].completions)]
      ),
    }
    for judge_name, judge in judges.items():
      judged = dict(
        zip(wanted, judge.scores([kept[i] for i in wanted]), strict=True)
      )
      row[judge_name] = accuracy(wanted, judged.__getitem__)
    row['longer is better'] = accuracy(
      wanted, lambda i: [len(text.split()) for text in kept[i].completions]
    )
    results['categories'][name] = row
    print(
      f'{config.name}: {name}: '
      + ', '.join(
        f'{key} {value["accuracy"]:.3f}'
        for key, value in row.items()
        if isinstance(value, dict)
      )
      + f' on {len(wanted)} comparisons',
      flush=True,
    )
  run_lib.write_json(workdir / 'results.json', results)
  return results
