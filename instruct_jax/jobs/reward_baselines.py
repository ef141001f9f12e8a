"""Compares reward models to baselines without a language model, set by set.

Baselines: the longer completion wins; the longer or the shorter wins, whichever
was better in training; and Bradley-Terry on bags of words, with a ridge penalty
chosen on the training rankings. The reward model and the baselines of a set
train on the same rankings.
"""

from etils import epath

from instruct_jax import judge_fns
from instruct_jax.data import loader, records
from instruct_jax.evals import baselines, preference_accuracy
from instruct_jax.infra import run as run_lib
from instruct_jax.infra import sharding
from instruct_jax.models.config import check_stage

PROCESSES = 'one'


def validate(config):
  """Checks the config. ValueError names the key."""
  check_stage(config)
  if config.batch_size < 1:
    raise ValueError(f'batch_size must be positive: {config.batch_size}')


def inputs(config):
  """What this stage reads, by config key."""
  found = {'tokenizer': config.tokenizer}
  for name, files in config.sets.items():
    found |= {f'sets.{name}.{key}': path for key, path in files.items()}
  return found


def score_of(config, model_dir, comparisons, mesh):
  """(comparisons that are short enough, r(x, y) of their completions)."""
  score_fn, tokenizer = judge_fns.reward_score(config, model_dir, mesh)
  kept = loader.fitting_comparisons(comparisons, tokenizer, config.row_length)
  run_lib.say_left_out(
    config.name,
    len(comparisons) - len(kept),
    len(comparisons),
    'valid_comparisons',
    f'row_length ({config.row_length} tokens)',
  )
  return kept, judge_fns.comparison_scores(score_fn, kept, tokenizer)


def run(config, workdir: epath.Path):
  """Reads rankings and reward models of `config.sets`; writes results.json."""
  validate(config)
  mesh = sharding.make_mesh(config.mesh)
  results = {}
  for name, files in config.sets.items():
    train = records.read_jsonl(files.comparisons, records.Comparison)
    valid = records.read_jsonl(files.valid_comparisons, records.Comparison)
    with sharding.use_mesh(mesh):
      kept, scores = score_of(config, files.reward_model, valid, mesh)
    l2 = baselines.choose_l2(train)
    words = baselines.fit_bag_of_words(train, l2=l2)
    judged = {
      'reward model': scores,
      'length': baselines.fit_length(train).scores(kept),
      'bag of words': words.scores(kept),
      'longer is better': baselines.LengthJudge(1).scores(kept),
    }
    ranks, prompts = [c.ranks for c in kept], [c.prompt for c in kept]
    accuracies = {
      judge: preference_accuracy.pairwise_accuracy(found, ranks, prompts)
      for judge, found in judged.items()
    }
    results[name] = {
      'num_comparisons': len(kept),
      'num_left_out': len(valid) - len(kept),
      'l2': l2,
    } | {
      judge: {'accuracy': x.accuracy, 'low': x.low, 'high': x.high}
      for judge, x in accuracies.items()
    }
    shown = ', '.join(f'{k} {x.accuracy:.3f}' for k, x in accuracies.items())
    run_lib.say(f'{config.name}: {name}: {shown} on {len(kept)} comparisons')
  run_lib.write_json(workdir / 'results.json', results)
  return results
