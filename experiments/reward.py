"""Trains a reward model on K-way rankings.

Paper 3.5, C.2: all pairs of a prompt form one batch element (K forward passes,
not C(K, 2), nor K for each labeler who ranked the same answers); one epoch,
since more would overfit; cosine schedule to 10 %; ties are dropped. The head's
bias is then set so that the labelers' demonstrations score 0 on average.
"""

import dataclasses

import jax
import jax.numpy as jnp
from etils import epath

from instruct_jax import (
  lora,
  losses,
  masked,
  model_fns,
  model_folder,
  rankings,
  supervised,
)
from instruct_jax.data import loader
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import loop, sharding, train_state
from instruct_jax.infra import run as run_lib
from instruct_jax.models.config import check_stage, lora_of

PROCESSES = 'all'


def validate(config):
  """Checks choices and sizes; errors name the key."""
  check_stage(config)
  run_lib.check_choice(config, 'divisor', ('surviving', 'all'))
  supervised.check_microbatches(config)


def inputs(config):
  """The inputs of this stage: config key -> path."""
  keys = ['tokenizer', 'init', 'comparisons', 'valid_comparisons']
  keys += ['demonstrations'] * bool(config.demonstrations)
  return {key: config[key] for key in keys}


def build_programs(config, module, num_steps):
  """The jitted programs of this stage."""
  tx = supervised.make_adam(config, num_steps)
  scores_fn = model_fns.scores_fn(module)

  def loss_fn(params, frozen, batch, key):
    del key  # Reward models train without dropout.
    params = lora.join(params, frozen.get('reward'))
    scores = scores_fn(params, batch.tokens, batch.segments, batch.ends)
    loss, pairs, correct = losses.ranking_loss(
      scores[:, None], batch.ranks, config.divisor
    )
    loss = losses.mean_over_rankings(loss, pairs)
    summed, weight, metrics = rankings.summed(loss, pairs, correct, batch)
    metrics['score'] = masked.metric(scores, jnp.any(batch.ranks > 0, axis=1))
    return summed, (weight, {f'reward/{k}': x for k, x in metrics.items()})

  update = supervised.make_update(loss_fn, tx, config.num_microbatches)
  return {
    'optimizer': tx,
    'update': jax.jit(update, donate_argnums=0),
    'scalars': jax.jit(model_fns.scalars_fn(module)),
  }


def train(config, workdir, name, rows, model, seed):
  """Trains one reward model; returns its parameters and the programs.

  Args:
    rows: `ComparisonBatch` to train on.
    model: model to start from; its parameters are donated.
  """
  mesh = jax.sharding.get_mesh()
  batches = rankings.Batches(config, rows, seed)
  programs = build_programs(config, model.module, len(batches))
  state = train_state.create(model.params, programs['optimizer'])
  root = jax.random.key(seed)
  with loop.Loop(
    workdir,
    name,
    len(batches),
    log_every=config.log_every,
    checkpoint_every=config.checkpoint_every,
    **config.loop,
  ) as steps:
    programs = steps.watched(programs)
    state = steps.restore(sharding.place(state, mesh))
    data = loader.ahead(batches.__getitem__)
    for step, host_batch in steps.steps_with(data):
      # Every process packs the whole batch, since `ends` points across rows.
      batch = sharding.put_whole(host_batch, mesh)
      state, metrics = programs['update'](
        state,
        {'reward': model.base},
        batch,
        jax.random.fold_in(root, step),
      )
      steps.end_step(
        step,
        state,
        metrics,
        states={name: state},
        num_items=config.batch_size,
      )
  return state.params, programs


def run(config, workdir: epath.Path):
  """Trains, centres and evaluates a reward model.

  Reads the initial policy, rankings and demonstrations; writes `model` and
  results.json.
  """
  validate(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  comparisons, valid = rankings.read(config)
  policy, mesh = rankings.load_policy(config, tokenizer)
  with sharding.use_mesh(mesh):
    rows, dropped = rankings.training_rows(config, comparisons, tokenizer)
    encoded = rankings.encode(config, valid, tokenizer)
    # Demonstrations score 0 on average; without any, the ranked answers do.
    shown = rows
    if config.demonstrations:
      shown = rankings.demonstration_rows(config, tokenizer)
    # fold_in: the head's noise must differ from the batches' keys.
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    model = model_fns.scalar_from_policy(policy, mesh, key)
    del policy
    model = model_fns.adapted(model, lora_of(config), mesh, config.seed)
    params, programs = train(
      config, workdir, config.name, rows, model, config.seed
    )
    score_with = rankings.scorer(config, programs['scalars'], model.base)
    scores = score_with(params)(shown)[shown.mask.any(axis=2)]
    params, shift = rankings.centred(params, scores)
    score = score_with(params)
    (accuracy,) = rankings.accuracy(score, encoded)
    results = rankings.results(accuracy, rows, len(comparisons), dropped)
    results['reward_shift'] = shift
    results['score_range'] = rankings.score_range(score, rows)
    model_folder.save(
      workdir / 'model',
      dataclasses.replace(model, params=params),
      tokenizer,
      {'stage': config.name, 'seed': config.seed, **results},
    )
  run_lib.write_json(workdir / 'results.json', results)
  run_lib.say(
    f'{config.name}: accuracy {accuracy.accuracy:.3f} '
    f'[{accuracy.low:.3f}, {accuracy.high:.3f}] on {accuracy.num_pairs} pairs'
  )
  return results
