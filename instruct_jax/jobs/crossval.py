"""Cross-validates a reward model over groups of labelers (paper E.2).

The labelers are split into groups; each group in turn is left out of training.
`intra` is the accuracy on validation rankings by the labelers trained on, and
`inter` on those by the group left out. Both are averaged over several seeds.
"""

import dataclasses

import jax
import jax.numpy as jnp
from etils import epath

from experiments import reward
from instruct_jax import model_fns, rankings
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import preference_accuracy
from instruct_jax.infra import run as run_lib
from instruct_jax.infra import sharding
from instruct_jax.models.config import lora_of

PROCESSES = 'all'


def validate(config):
  """Checks the config; see `reward.validate`."""
  reward.validate(config)
  if config.num_folds < 2:
    raise ValueError(f'num_folds must be at least 2: {config.num_folds}')


def inputs(config):
  """What this stage reads, by config key."""
  keys = ('tokenizer', 'init', 'comparisons', 'valid_comparisons')
  return {key: config[key] for key in keys}


def run(config, workdir: epath.Path):
  """Trains a reward model for each group and seed; writes results.json.

  Skips those that already have results.

  Raises:
    ValueError: a group ordered no validation pair (all ties, or no rankings).
  """
  validate(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  comparisons, valid = rankings.read(config)
  groups = preference_accuracy.label_folds(
    [c.labeler for c in comparisons], config.num_folds, config.seed
  )
  policy, mesh = rankings.load_policy(config, tokenizer)
  with sharding.use_mesh(mesh):
    encoded = rankings.encode(config, valid, tokenizer)
    for left_out in groups:
      theirs = [c for c in encoded.fitting if c.labeler in left_out]
      if not any(len(set(c.ranks)) > 1 for c in theirs):
        raise ValueError(
          f'valid_comparisons: no pair was ordered by {", ".join(left_out)}, '
          'who are left out together; add rankings of theirs, or use fewer '
          f'folds (num_folds {config.num_folds})'
        )
    scoring = None  # The first fold's programs score all folds.
    runs = []
    for seed in range(config.seed, config.seed + config.num_fold_seeds):
      key = jax.random.fold_in(jax.random.key(seed), 1)
      model = model_fns.scalar_from_policy(policy, mesh, key)
      model = model_fns.adapted(model, lora_of(config), mesh, seed)
      for fold, left_out in enumerate(groups):
        folder = workdir / f'seed{seed}-fold{fold}'
        result_file = folder / 'results.json'
        if not result_file.exists():
          rows, _ = rankings.training_rows(
            config,
            [c for c in comparisons if c.labeler not in left_out],
            tokenizer,
          )
          # A copy, since training donates the buffers of its starting weights.
          start = jax.tree.map(jnp.copy, model.params)
          params, programs = reward.train(
            config,
            folder,
            f'{config.name} seed {seed} fold {fold + 1}/{len(groups)}',
            rows,
            dataclasses.replace(model, params=start),
            seed,
          )
          scoring = scoring or programs
          trained_on = {name for group in groups for name in group}
          intra, inter = rankings.accuracy(
            rankings.scorer(config, scoring['scalars'], model.base)(params),
            encoded,
            (trained_on - set(left_out), set(left_out)),
          )
          result = {'seed': seed, 'fold': fold}
          result |= {'intra': intra.accuracy, 'inter': inter.accuracy}
          run_lib.write_json(result_file, result)
          run_lib.wait_for_all(str(result_file))
        runs.append(run_lib.read_json(result_file))
  results = {'folds': groups, 'runs': runs}
  for name in ('intra', 'inter'):
    spread = preference_accuracy.spread([row[name] for row in runs])
    results[name] = {'mean': spread.mean, 'error': spread.error}
    run_lib.say(
      f'{config.name}: {name} accuracy {spread.mean:.3f} +- '
      f'{spread.error:.3f} over {spread.num_runs} runs'
    )
  run_lib.write_json(workdir / 'results.json', results)
  return results
