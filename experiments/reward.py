"""Trains a reward model on K-way rankings, or cross-validates one.

Paper 3.5, C.2: all pairs of a prompt form one batch element (K forwards, not
C(K, 2), nor K for each labeler who ranked the same answers); one epoch, since
more overfits; cosine to 10 %; ties dropped. Then a bias is set so that the
labelers' demonstrations score 0 on average; it lives in the head's bias and
travels with the parameters.

With `num_folds` > 0 (E.2): the labelers are split into groups; each group in
turn is left out of training. `intra` is the accuracy on validation rankings by
the labelers trained on, `inter` by the group left out, over several seeds.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int

from instruct_jax import (
  losses,
  masked,
  model_fns,
  model_folder,
  supervised,
  types,
)
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import preference_accuracy
from instruct_jax.infra import loop, optimizer, sharding, slices, train_state
from instruct_jax.infra import run as run_lib
from instruct_jax.models.config import check_stage

PROCESSES = 'all'


def validate(config):
  check_stage(config)
  if config.num_folds == 1 or config.num_folds < 0:
    raise ValueError(f'num_folds must be 0 or at least 2: {config.num_folds}')
  run_lib.check_choice(config, 'divisor', ('surviving', 'all'))
  if config.batch_size % config.num_microbatches:
    raise ValueError(
      f'num_microbatches {config.num_microbatches} does not divide '
      f'batch_size {config.batch_size}'
    )


def inputs(config):
  """What this stage reads, by config key."""
  keys = ['tokenizer', 'init', 'comparisons', 'valid_comparisons']
  if not config.num_folds:
    keys.append('demonstrations')
  return {key: config[key] for key in keys}


def prompt_losses(
  scores: Float[Array, 'B C'], ranks: Int[Array, 'B R C'], divisor: str
) -> tuple[Float[Array, 'B'], Float[Array, 'B'], Float[Array, 'B']]:
  """`losses.ranking_loss` of each prompt: the mean over its labelers.

  So a prompt weighs as much as any other, however many ranked it. Labelers who
  tied everything do not count. Pairs and correct ones are summed.
  """
  loss, pairs, correct = losses.ranking_loss(scores[:, None], ranks, divisor)
  num_labelers = jnp.sum(pairs > 0, axis=1, dtype=jnp.float32)
  loss = jnp.sum(loss, axis=1) / jnp.maximum(num_labelers, 1)
  return loss, jnp.sum(pairs, axis=1), jnp.sum(correct, axis=1)


def build_programs(config, module, num_steps):
  """The jitted programs of this stage."""
  tx = optimizer.make_adam(
    optimizer.cosine_to_fraction(config.learning_rate, num_steps, 0.1),
    b1=config.adam_b1,
    b2=config.adam_b2,
    eps=config.adam_eps,
    max_grad_norm=config.max_grad_norm,
  )
  scores_fn = model_fns.scores_fn(module)

  def loss_fn(params, frozen, batch, key):
    del frozen, key  # Reward models train without dropout.
    scores = scores_fn(params, batch.tokens, batch.segments, batch.ends)
    loss, pairs, correct = prompt_losses(scores, batch.ranks, config.divisor)
    # A prompt that is all ties has nothing to teach and does not count.
    counted = batch.prompt_mask & (pairs > 0)
    summed, weight = masked.metric(loss, counted)
    metrics = {
      'reward/loss': (summed, weight),
      'reward/accuracy': (
        masked.total(correct, counted),
        masked.total(pairs, counted),
      ),
      'reward/score': masked.metric(scores, jnp.any(batch.ranks > 0, axis=1)),
    }
    return summed, (weight, metrics)

  update = supervised.make_update(loss_fn, tx, config.num_microbatches)

  return {
    'optimizer': tx,
    'update': jax.jit(update, donate_argnums=0),
    'scalars': jax.jit(model_fns.scalars_fn(module)),
  }


def train(config, workdir, name, rows, model, seed):
  """One reward model on `rows`; returns its parameters and the programs."""
  batches = loader.balanced_batches(
    rows.mask.sum(axis=(1, 2)),
    batch_size=config.batch_size,
    seed=seed,
    num_epochs=config.num_epochs,
  )
  mesh = jax.sharding.get_mesh()
  # One shape for all batches: as many packed rows as the fullest one needs.
  # Each microbatch is packed by itself, so that it is whole.
  num_parts = config.num_microbatches

  def parts_of(step):
    return [
      loader.take(rows, part) for part in np.split(batches[step], num_parts)
    ]

  needed = max(
    len(loader.pack_comparisons(part).tokens)
    for step in range(len(batches))
    for part in parts_of(step)
  )
  num_devices = jax.device_count()
  num_rows = -(-needed // num_devices) * num_devices

  def pack(step):
    packed = [
      loader.pack_comparisons(part, num_rows) for part in parts_of(step)
    ]
    return jax.tree.map(lambda *xs: np.concatenate(xs), *packed)

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
    for step, host_batch in steps.steps_with(loader.ahead(pack)):
      # Every process packs the whole batch, for `ends` points across rows.
      batch = sharding.put_whole(host_batch, mesh)
      state, metrics = programs['update'](
        state, {}, batch, jax.random.fold_in(root, step)
      )
      steps.end_step(
        step,
        state,
        metrics,
        states={name: state},
        num_items=config.batch_size,
      )
  return state.params, programs


def training_rows(config, comparisons, tokenizer):
  """`loader.comparison_rows` as this stage learns from them."""
  rows, dropped = loader.comparison_rows(
    comparisons,
    tokenizer,
    config.max_candidates,
    config.row_length,
    merge=config.merge_rankings,
  )
  run_lib.tell_dropped(
    config.name, dropped.describe('comparisons', 'row_length')
  )
  return rows, dropped


def score_comparisons(config, programs, params, rows):
  """r(x, y) of every candidate of a data set: [N, C] on the host."""
  mesh = jax.sharding.get_mesh()
  packed = loader.pack_comparisons(rows)
  scalars = slices.in_batches(
    lambda batch: sharding.fetch(
      programs['scalars'](params, *sharding.put_whole(batch, mesh))
    ),
    (packed.tokens, packed.segments),
    config.eval_batch_size,
  )
  # A head made here reads the score at the last token, whatever that is.
  return scalars.reshape(-1)[packed.ends]


def answers_of(comparison):
  """What is scored: all of a comparison but who ranked it, and how."""
  return comparison.prompt, comparison.turns, comparison.completions


@dataclasses.dataclass(frozen=True)
class Rankings:
  """Encoded rankings, for any number of reward models.

  Attributes:
    fitting: those that fit into a row.
    distinct: `answers_of` them -> one of them; it is scored once, however many
      labelers ranked it.
    rows: of `distinct`, in its order.
  """

  fitting: list[records.Comparison]
  distinct: dict[tuple, records.Comparison]
  rows: types.ComparisonBatch


def encode_rankings(config, comparisons, tokenizer) -> Rankings:
  """Tokens of what is to be scored; what is too long is left out."""
  fitting = loader.fitting_comparisons(
    comparisons, tokenizer, config.row_length
  )
  run_lib.say_left_out(
    config.name,
    len(comparisons) - len(fitting),
    len(comparisons),
    'valid_comparisons',
    f'row_length ({config.row_length} tokens)',
  )
  distinct = {answers_of(comparison): comparison for comparison in fitting}
  rows, _ = loader.comparison_rows(
    list(distinct.values()), tokenizer, config.max_candidates, config.row_length
  )
  return Rankings(fitting, distinct, rows)


def scores_of(config, programs, params, rankings: Rankings):
  """{`answers_of`: one score a completion}."""
  scores = score_comparisons(config, programs, params, rankings.rows)
  return {
    key: row[: len(comparison.completions)]
    for (key, comparison), row in zip(
      rankings.distinct.items(), scores, strict=True
    )
  }


def accuracy_from(scores, comparisons):
  """Pairwise accuracy of the scores on rankings, with its interval."""
  return preference_accuracy.pairwise_accuracy(
    [scores[answers_of(c)] for c in comparisons],
    [c.ranks for c in comparisons],
    [c.prompt for c in comparisons],
  )


def run(config, workdir: epath.Path):
  validate(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  model_folder.check(config.init, 'policy', tokenizer)
  comparisons = records.read_jsonl(config.comparisons, records.Comparison)
  valid = records.read_jsonl(config.valid_comparisons, records.Comparison)
  comparisons = comparisons[: config.max_comparisons or None]
  valid = valid[: config.max_valid_comparisons or None]
  records.check_labels(comparisons, config.comparisons)
  records.check_labels(valid, config.valid_comparisons)
  mesh = model_folder.make_mesh(
    config.mesh, [config.init], [config.batch_size, config.eval_batch_size]
  )
  with sharding.use_mesh(mesh):
    policy = model_folder.load(
      config.init,
      'policy',
      mesh,
      tokenizer,
      remat=config.remat,
      attention=config.attention,
      compute_dtype=config.compute_dtype,
    )
    model_fns.check_context(policy, config.row_length, 'row_length')
    if config.num_folds:
      return cross_validate(
        config, workdir, tokenizer, policy, comparisons, valid
      )
    return fit(config, workdir, tokenizer, policy, comparisons, valid)


def fit(config, workdir, tokenizer, policy, comparisons, valid):
  mesh = jax.sharding.get_mesh()
  rows, dropped = training_rows(config, comparisons, tokenizer)
  # fold_in: the head must not share its noise with the batches' keys.
  init_key = jax.random.fold_in(jax.random.key(config.seed), 1)
  model = model_fns.scalar_from_policy(policy, mesh, init_key)
  params, programs = train(
    config, workdir, config.name, rows, model, config.seed
  )

  demonstrations = records.read_jsonl(
    config.demonstrations, records.Demonstration
  )
  alone, dropped_demonstrations = loader.comparison_rows(
    [
      records.Comparison(d.prompt, (d.response,), (1,), d.id, turns=d.turns)
      for d in demonstrations
    ],
    tokenizer,
    1,
    config.row_length,
  )
  run_lib.tell_dropped(
    config.name,
    dropped_demonstrations.describe('demonstrations', 'row_length'),
  )
  raw_scores = score_comparisons(config, programs, params, alone)
  shift = float(np.mean(raw_scores, dtype=np.float64))
  params = {**params, 'head_bias': params['head_bias'] - jnp.float32(shift)}

  rankings = encode_rankings(config, valid, tokenizer)
  scores = scores_of(config, programs, params, rankings)
  accuracy = accuracy_from(scores, rankings.fitting)
  train_scores = score_comparisons(
    config,
    programs,
    params,
    loader.take(rows, np.arange(min(512, loader.num_rows(rows)))),
  )
  present = rows.mask[: len(train_scores)].any(axis=2)
  results = {
    'accuracy': accuracy.accuracy,
    'low': accuracy.low,
    'high': accuracy.high,
    'num_pairs': accuracy.num_pairs,
    'reward_shift': shift,
    'score_range': [
      float(train_scores[present].min()),
      float(train_scores[present].max()),
    ],
    'num_comparisons': len(comparisons) - dropped.total,
    'num_prompts': loader.num_rows(rows),
    'num_forwards': int(rows.mask.any(axis=2).sum()),  # An epoch.
    'num_dropped': dropped.total,
  }
  model_folder.save(
    workdir / 'model',
    model_fns.Model('scalar', model.module, params, {}),
    tokenizer,
    {'stage': config.name, 'seed': config.seed, **results},
  )
  run_lib.write_json(workdir / 'results.json', results)
  run_lib.say(
    f'{config.name}: accuracy {accuracy.accuracy:.3f} '
    f'[{accuracy.low:.3f}, {accuracy.high:.3f}] on {accuracy.num_pairs} pairs'
  )
  return results


def cross_validate(config, workdir, tokenizer, policy, comparisons, valid):
  mesh = jax.sharding.get_mesh()
  groups = preference_accuracy.label_folds(
    [c.labeler for c in comparisons], config.num_folds, config.seed
  )
  rankings = encode_rankings(config, valid, tokenizer)
  scoring = None  # The first fold's program scores for all.
  runs = []
  for number in range(config.num_fold_seeds):
    seed = config.seed + number
    init_key = jax.random.fold_in(jax.random.key(seed), 1)
    model = model_fns.scalar_from_policy(policy, mesh, init_key)
    for fold, left_out in enumerate(groups):
      folder = workdir / f'seed{seed}-fold{fold}'
      result_file = folder / 'results.json'
      if not result_file.exists():
        rows, _ = training_rows(
          config,
          [c for c in comparisons if c.labeler not in left_out],
          tokenizer,
        )
        # A copy: training writes over what it starts from.
        start = jax.tree.map(jnp.copy, model.params)
        params, programs = train(
          config,
          folder,
          f'{config.name} seed {seed} fold {fold + 1}/{len(groups)}',
          rows,
          dataclasses.replace(model, params=start),
          seed,
        )
        scoring = scoring or programs
        trained_on = {name for group in groups for name in group}
        trained_on -= set(left_out)
        result = {'seed': seed, 'fold': fold}
        scores = scores_of(config, scoring, params, rankings)
        for name, wanted in (('intra', trained_on), ('inter', left_out)):
          result[name] = accuracy_from(
            scores, [c for c in rankings.fitting if c.labeler in wanted]
          ).accuracy
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
