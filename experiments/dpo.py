"""DPO on K-way rankings (Rafailov et al. 2023): no reward model, no sampling.

A fork of `reward.py`: the score of a completion is the implied reward

  r(x, y) = beta (log pi(y | x) - log pi_ref(y | x))

and the loss (`ranking_loss`) is either that of the reward model, over all pairs
of a ranking, or the Plackett-Luce likelihood of its order. The reference is the
initial policy; its log-probabilities are computed once.
"""

import dataclasses
import functools

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
  run_lib.check_choice(config, 'ranking_loss', ('pairwise', 'plackett_luce'))
  run_lib.check_choice(config, 'divisor', ('surviving', 'all'))
  if not config.beta > 0:
    raise ValueError(f'beta must be positive: {config.beta}')
  supervised.check_microbatches(config)


def inputs(config):
  """The inputs of this stage: config key -> path."""
  keys = ('tokenizer', 'init', 'comparisons', 'valid_comparisons')
  return {key: config[key] for key in keys}


def build_programs(config, module, num_steps):
  """The jitted programs of this stage."""
  tx = supervised.make_adam(config, num_steps)
  logprobs_fn = model_fns.logprobs_fn(module)

  def loss_fn(params, frozen, batch, key):
    del key  # No dropout, as for the reference.
    params = lora.join(params, frozen.get('policy'))
    logprobs, _ = logprobs_fn(params, batch.tokens, batch.segments, batch.where)
    logprobs = rankings.sums_by_owner(logprobs, batch)
    scores = config.beta * (logprobs - batch.ref_logprobs)
    loss, pairs, correct = losses.ranking_loss(
      scores[:, None], batch.ranks, config.divisor
    )
    if config.ranking_loss == 'plackett_luce':
      loss, _ = losses.plackett_luce_loss(scores[:, None], batch.ranks)
    loss = losses.mean_over_rankings(loss, pairs)
    summed, weight, metrics = rankings.summed(loss, pairs, correct, batch)
    metrics['reward'] = masked.metric(scores, jnp.any(batch.ranks > 0, axis=1))
    best = jnp.any(batch.ranks == 1, axis=1)
    metrics['reward_of_best'] = masked.metric(scores, best)
    metrics['logprob_of_best'] = masked.metric(logprobs, best)
    return summed, (weight, {f'dpo/{k}': x for k, x in metrics.items()})

  update = supervised.make_update(loss_fn, tx, config.num_microbatches)
  return {'optimizer': tx, 'update': jax.jit(update, donate_argnums=0)}


def train(config, workdir, name, rows, model, seed):
  """Trains one policy and returns its parameters.

  Args:
    rows: `ComparisonBatch` to train on.
    model: model to start from; its parameters are donated.
  """
  mesh = jax.sharding.get_mesh()
  batches = rankings.Batches(config, rows, seed, reads_responses=True)
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
        {'policy': model.base},
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
  return state.params


def run(config, workdir: epath.Path):
  """Trains a policy and evaluates its implied rewards.

  Reads the initial policy and rankings; writes `model` and results.json.
  """
  validate(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  comparisons, valid = rankings.read(config)
  policy, mesh = rankings.load_policy(config, tokenizer)
  with sharding.use_mesh(mesh):
    rows, dropped = rankings.training_rows(config, comparisons, tokenizer)
    encoded = rankings.encode(config, valid, tokenizer)
    model = model_fns.adapted(policy, lora_of(config), mesh, config.seed)
    logprobs = functools.partial(
      rankings.response_logprobs,
      rankings.logprobs_program(model.module),
      batch_size=config.eval_batch_size,
    )
    # Computed once, before training overwrites the reference's weights.
    rows = rows.replace(ref_logprobs=logprobs(policy.params, rows))
    valid_reference = logprobs(policy.params, encoded.rows)
    del policy
    params = train(config, workdir, config.name, rows, model, config.seed)
    whole = lora.join(params, model.base)
    (accuracy,) = rankings.accuracy(
      lambda rows: config.beta * (logprobs(whole, rows) - valid_reference),
      encoded,
    )
    results = rankings.results(accuracy, rows, len(comparisons), dropped)
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
