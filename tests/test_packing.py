"""Dense rows of episodes: the same numbers as from the padded rectangle."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import ppo_ptx as config_file
from experiments import ppo_ptx
from instruct_jax import artifacts, packing, ppo
from instruct_jax.infra import sharding, train_state
from instruct_jax.models.heads import token_logprobs
from instruct_jax.types import PPOBatch, Rollout
from tests import tiny

pytestmark = pytest.mark.usefixtures('quick_compile')

B, P, R, T = tiny.B, tiny.P, tiny.R, tiny.T


def sampled(seed=0, lengths=None) -> Rollout:
  """Ragged prompts and responses, full and one-token ones among them."""
  rng = np.random.default_rng(seed)
  prompts = tiny.prompts(seed)
  if lengths is None:
    lengths = rng.integers(1, R + 1, B)
    lengths[:2] = 1, R
  response_mask = np.arange(R)[None] < lengths[:, None]
  responses = rng.integers(2, 30, (B, R)) * response_mask
  return Rollout(
    tokens=np.concatenate([prompts.tokens, responses], 1).astype(np.int32),
    mask=np.concatenate([prompts.mask, response_mask], 1),
    response_mask=response_mask,
    logprobs=rng.normal(-2, 1, (B, R)).astype(np.float32) * response_mask,
    ended=lengths < R,
  )


def plan(rows: Rollout, **changes) -> packing.Layout:
  arguments = {
    'prompt_columns': P,
    'response_columns': R,
    'num_minibatches': 2,
    'num_microbatches': 2,
    'num_epochs': 2,
    'num_shards': 1,
    'row_episodes': 3,
    'multiple': 8,
    'spare': 1.1,
    'seed': (0, 5),
  } | changes
  response_lengths = np.asarray(rows.response_mask).sum(1)
  lengths = np.asarray(rows.mask).sum(1)
  return packing.plan(lengths - response_lengths, response_lengths, **arguments)


def step_rows(x, layout):
  """[steps, rows of a step, ...], by hand."""
  return [x[step :: layout.num_steps] for step in range(layout.num_steps)]


# --- The layout ---------------------------------------------------------------


@pytest.mark.parametrize('num_shards', [1, 2])
def test_every_step_holds_its_episodes_once(num_shards):
  rows = sampled()
  layout = plan(rows, num_shards=num_shards)
  assert layout.num_steps == 4
  flat_mask = rows.mask.ravel()
  groups = []
  for source, segments, where, response, mask in zip(
    *(
      step_rows(x, layout)
      for x in (
        layout.source,
        layout.segments,
        layout.where,
        layout.response,
        layout.response_mask,
      )
    ),
    strict=True,
  ):
    assert len(source) % num_shards == 0
    episodes = []
    for row in range(len(source)):
      for number in range(1, segments[row].max() + 1):
        columns = np.flatnonzero(segments[row] == number)
        # Contiguous, and a whole episode in its own order.
        np.testing.assert_array_equal(np.diff(columns), 1)
        places = source[row, columns]
        (episode,) = np.unique(places // T)
        np.testing.assert_array_equal(
          places, np.flatnonzero(rows.mask[episode]) + episode * T
        )
        assert flat_mask[places].all()
        episodes.append(episode)
        # Its response tokens, each predicted from one column earlier.
        mine = mask[row] & (response[row] // R == episode)
        np.testing.assert_array_equal(
          response[row, mine] % R, np.flatnonzero(rows.response_mask[episode])
        )
        predicted = source[row, where[row, mine] + 1]
        np.testing.assert_array_equal(
          predicted, episode * T + P + response[row, mine] % R
        )
    groups.append(sorted(episodes))
  # Two inner epochs of two minibatches of eight, each epoch every episode once.
  assert [len(group) for group in groups] == [B // 2] * 4
  assert sorted(groups[0] + groups[1]) == list(range(B))
  assert sorted(groups[2] + groups[3]) == list(range(B))
  assert groups[:2] != groups[2:]


def test_the_deal_is_random_balanced_and_repeatable():
  lengths = 32 + np.random.default_rng(1).geometric(1 / 24, 512)
  deal = functools.partial(packing.deal, lengths, 8)
  first = deal(np.random.default_rng(0))
  assert first.shape == (8, 64)
  assert sorted(first.ravel()) == list(range(512))
  totals = lengths[first].sum(axis=1)
  assert totals.max() < 1.02 * totals.mean()
  np.testing.assert_array_equal(first, deal(np.random.default_rng(0)))
  # Any episode may meet any minibatch: over many deals equally often.
  counts = np.zeros((8, 512))
  for seed in range(400):
    groups = deal(np.random.default_rng(seed))
    for number, group in enumerate(groups):
      counts[number, group] += 1
  assert np.abs(counts / 400 - 1 / 8).max() < 0.1
  with pytest.raises(ValueError, match='7 groups do not divide 512'):
    packing.deal(lengths, 7, np.random.default_rng(0))


@pytest.mark.parametrize(
  'batch,prompt,longest,mean', [(512, 128, 1024, 200), (512, 64, 64, 24)]
)
def test_padding_of_ragged_work_is_below_a_twentieth(
  batch, prompt, longest, mean
):
  """Beside what the ladder leaves: the fullest row is hardly fuller than the
  others."""
  shares = []
  for seed in range(8):
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(1 / mean, batch), longest)
    layout = packing.plan(
      rng.integers(prompt // 2, prompt + 1, batch),
      lengths,
      prompt_columns=prompt,
      response_columns=longest,
      num_minibatches=8,
      num_microbatches=1,
      num_epochs=1,
      num_shards=1,
      row_episodes=8,
      multiple=8,
      spare=1.0,
      seed=(0, seed),
    )
    shares.append(1 - packing.fill_fraction(layout))
  assert np.mean(shares) < 0.05, shares


@pytest.mark.parametrize('spare', [1.1, 1.25])
@pytest.mark.parametrize(
  'longest, group_size, num_rows, multiple',
  [(52, 16, 2, 8), (2048, 64, 8, 128), (96, 16, 16, 8), (512, 16, 3, 1)],
)
def test_shapes_are_a_short_ladder(
  longest, group_size, num_rows, multiple, spare
):
  shapes = packing.ladder(longest, group_size, num_rows, multiple, spare)
  lengths = sorted({length for length, _ in shapes})
  assert list(shapes) == sorted(set(shapes))
  # From half an episode to what saves a twentieth, by factors of `spare`.
  most = 0.95 * longest * group_size / num_rows
  assert most - multiple < lengths[-1] <= most
  assert lengths[0] <= longest / 2
  assert all(length % multiple == 0 for length in lengths)
  rungs = math.log(most / (longest / 2)) / math.log(spare)
  assert len(lengths) <= rungs + 2 and len(shapes) <= 3 * len(lengths)
  for short, long in zip(lengths, lengths[1:], strict=False):
    assert short < long <= spare * short + multiple
  # All of a row may be responses.
  for length in lengths:
    widths = [width for other, width in shapes if other == length]
    assert max(widths) == length and min(widths) < length / 2 + 8


def test_a_layout_takes_the_least_shape_that_holds_it():
  for seed in range(20):
    lengths = np.random.default_rng(seed).integers(1, R + 1, B)
    layout = plan(sampled(seed, lengths))
    row_tokens = (layout.segments > 0).sum(1).max()
    row_responses = layout.response_mask.sum(1).max()
    fitting = [
      shape
      for shape in packing.ladder(T, B // 4, 1, 8, 1.1)
      if row_tokens <= shape[0] and row_responses <= shape[1]
    ]
    shape = (layout.segments.shape[1], layout.where.shape[1])
    assert shape == min(fitting)


def test_what_would_save_little_is_not_packed():
  assert plan(sampled(lengths=np.full(B, R)), row_episodes=1) is None
  full = np.full(B, P)
  arguments = {'prompt_columns': P, 'response_columns': R, 'num_epochs': 1}
  arguments |= {'num_minibatches': 2, 'num_microbatches': 1, 'num_shards': 1}
  arguments |= {'row_episodes': 4, 'multiple': 8, 'spare': 1.1, 'seed': (0,)}
  assert packing.plan(full, np.full(B, R), **arguments) is None
  assert packing.plan(full, np.ones(B, int), **arguments) is not None


def test_bad_batches_are_named():
  with pytest.raises(ValueError, match='6 groups do not divide 16'):
    plan(sampled(), num_minibatches=3)
  rows = sampled()
  rows.mask[3] = rows.response_mask[3] = False
  with pytest.raises(ValueError, match='episode 3 has no tokens'):
    plan(rows)


# --- Models on packed rows ----------------------------------------------------


@jax.jit
def packed_forward(policy, scalar, tokens, layout):
  rows, targets = packing.pack_tokens(tokens, layout)
  logprobs, entropies = artifacts.packed_logprobs_fn(
    tiny.POLICY, tiny.TEMPERATURE, T
  )(policy, rows, layout.segments, layout.where, targets)
  scalars = artifacts.scalars_fn(tiny.SCALAR, T)(scalar, rows, layout.segments)
  return logprobs, entropies, scalars


def test_models_say_the_same_of_packed_rows():
  rows = on_device(sampled())
  layout = plan(rows)
  policy, scalar = tiny.params('policy'), tiny.params('scalar')
  padded = tiny.forward(
    policy, scalar, rows.tokens, rows.mask.astype(jnp.int32)
  )
  logprobs, entropies, scalars = packed_forward(
    policy, scalar, rows.tokens, layout
  )
  # Long enough that attention goes block by block.
  assert layout.segments.shape[1] > 1.5 * T
  mask = rows.response_mask
  for ours, theirs in (
    (logprobs, padded['logprobs']),
    (entropies, padded['entropies']),
  ):
    ours = packing.unpack_responses(
      packing.first_epoch(ours, layout), layout, mask
    )
    np.testing.assert_allclose(
      ours, np.where(mask, theirs, 0), rtol=1e-5, atol=2e-5
    )
  first = packing.first_epoch(scalars, layout)
  ends = np.array([np.flatnonzero(row)[-1] for row in np.asarray(rows.mask)])
  np.testing.assert_allclose(
    first.reshape(-1)[layout.ends],
    np.take_along_axis(np.asarray(padded['scalars']), ends[:, None], 1)[:, 0],
    rtol=1e-5,
    atol=2e-5,
  )


# --- Scores and updates -------------------------------------------------------


def build(scalar=tiny.SCALAR, **changes):
  config = config_file.ppo_stage(0, '')
  values = {
    'prompt_length': P,
    'response_length': R,
    'batch_size': B,
    'num_episodes': B,
    'num_minibatches': 2,
    'num_microbatches': 2,
    'temperature': tiny.TEMPERATURE,
    'ptx_coef': 0.0,
    'learning_rate': 1e-2,
    'value_learning_rate': 1e-2,
    'num_warmup_iterations': 0,
    'pack_episodes': 8,
  } | changes
  for name, value in values.items():
    config[name] = value
  ppo_ptx.validate(config)
  tokenizer = type('Tokenizer', (), {'stop_ids': tiny.STOPS})
  return config, ppo_ptx.build_programs(config, tiny.POLICY, scalar, tokenizer)


@pytest.fixture(scope='module')
def programs():
  return build()


def on_device(tree):
  return jax.tree.map(jnp.asarray, tree)


def score(programs, rows, layout):
  return programs['score'](
    tiny.params('policy'),
    tiny.params('policy', 5),
    tiny.params('scalar', 2),
    tiny.params('scalar', 1),
    tiny.ppo_state().kl,
    on_device(rows),
    layout,
  )


def test_scores_do_not_depend_on_packing(programs):
  _, built = programs
  rows = on_device(sampled())
  padded, padded_metrics = score(built, rows, None)
  layout = on_device(plan(rows, num_epochs=1))
  packed, packed_metrics = score(built, rows, layout)
  for name in ('old_logprobs', 'old_values', 'advantages', 'returns'):
    back = packing.unpack_responses(
      getattr(packed, name), layout, rows.response_mask
    )
    np.testing.assert_allclose(
      back, getattr(padded, name), rtol=1e-4, atol=1e-4, err_msg=name
    )
  extra = {'packing/fill', 'packing/row_length', 'packing/row_responses'}
  assert set(packed_metrics) == set(padded_metrics) | extra
  row = {name: total for name, (total, _) in packed_metrics.items()}
  assert row['packing/row_length'] == layout.segments.shape[1]
  assert row['packing/row_responses'] == layout.where.shape[1]
  total, count = packed_metrics['packing/fill']
  assert total / count == pytest.approx(packing.fill_fraction(layout))
  for name, (total, count) in padded_metrics.items():
    if name.startswith('objective/sampler'):
      continue  # Of some rows, and not of the same ones.
    np.testing.assert_allclose(
      packed_metrics[name][0], total, rtol=1e-4, atol=1e-4, err_msg=name
    )
    assert packed_metrics[name][1] == count


def test_an_end_that_the_reward_model_skips_is_not_read(programs):
  """Padded or packed: at the last token of another kind, as by hand."""
  rows = on_device(sampled())
  skipped = int(rows.tokens[0][rows.mask[0]][-1])  # What ends the first row.
  _, built = build(tiny.SCALAR.clone(skipped_id=skipped))
  layout = on_device(plan(rows, num_epochs=1))
  expected = []
  for tokens, mask in zip(
    *jax.device_get((rows.tokens, rows.mask)), strict=True
  ):
    ids = tokens[mask]
    scalars = artifacts.scalars_fn(tiny.SCALAR)(
      tiny.params('scalar', 1), jnp.array([ids]), jnp.ones((1, len(ids)), bool)
    )
    expected.append(float(scalars[0, np.flatnonzero(ids != skipped)[-1]]))
  responses = np.asarray(rows.response_mask).any(axis=1)
  expected = np.array(expected)[responses].mean()
  means = []
  for each in (built, programs[1]):
    for where in (None, layout):
      _, metrics = score(each, rows, where)
      total, count = metrics['objective/score']
      means.append(total / count)
  np.testing.assert_allclose(means[:2], expected, rtol=1e-4, atol=1e-4)
  assert (np.abs(np.array(means[2:]) - expected) > 1e-2).all()


def test_gradients_do_not_depend_on_packing(programs):
  """One minibatch of eight episodes: losses, metrics and gradients."""
  config, built = programs
  method = ppo_ptx.ppo_config(config)
  rows = on_device(sampled())
  layout = plan(rows, num_epochs=1, num_microbatches=1)
  padded, _ = score(built, rows, None)
  packed, _ = score(built, rows, on_device(layout))
  # Far from the old policy, so that ratios and clipping take part.
  policy, value = tiny.params('policy', 7), tiny.params('scalar', 8)
  for kind, params, padded_loss, packed_loss in (
    (
      'policy',
      policy,
      ppo.make_policy_loss(
        artifacts.logprobs_fn(tiny.POLICY, tiny.TEMPERATURE), method
      ),
      ppo.make_packed_policy_loss(
        artifacts.packed_logprobs_fn(tiny.POLICY, tiny.TEMPERATURE, T), method
      ),
    ),
    (
      'value',
      value,
      ppo.make_value_loss(artifacts.scalars_fn(tiny.SCALAR), method),
      ppo.make_packed_value_loss(artifacts.scalars_fn(tiny.SCALAR, T), method),
    ),
  ):
    for step in range(layout.num_steps):
      episodes = np.unique(
        layout.source[step :: layout.num_steps][
          layout.segments[step :: layout.num_steps] > 0
        ]
        // T
      )
      assert len(episodes) == B // 2
      theirs = gradients(padded_loss)(
        params, jax.tree.map(lambda x, e=episodes: x[e], padded)
      )
      ours = gradients(packed_loss)(
        params, jax.tree.map(lambda x, s=step: x[s :: layout.num_steps], packed)
      )
      tiny.assert_trees_close(ours, theirs, rtol=2e-3, atol=2e-4)
      assert float(ours[1]) != 0, kind


@functools.cache
def gradients(loss_fn):
  return jax.jit(
    lambda params, batch: train_state.accumulate_gradients(
      loss_fn, params, batch, jax.random.key(0)
    )
  )


def table_logprobs(params, tokens, segments, where, targets):
  del segments
  rows = jnp.take_along_axis(tokens, where, axis=1)
  return token_logprobs(params['table'][rows], targets)


def test_updates_are_those_of_the_same_minibatches_padded():
  """Two epochs of two minibatches, one by one, on a table for a model."""
  config = ppo.PPOConfig(
    ptx_coef=0.0, num_minibatches=2, num_epochs=2, num_microbatches=2
  )
  one = dataclasses.replace(
    config, num_minibatches=1, num_epochs=1, num_microbatches=1
  )
  rng = np.random.default_rng(3)
  rows = on_device(sampled())
  normal = [jnp.asarray(rng.normal(size=(B, R)), jnp.float32) for _ in range(4)]
  batch = PPOBatch(rows.tokens, rows.mask, rows.response_mask, *normal)
  layout = plan(rows)
  sgd = optax.sgd(0.5)
  state = ppo.PPOState(
    policy=train_state.create(
      {'table': jnp.asarray(rng.normal(size=(30, 30)), jnp.float32)}, sgd
    ),
    value=train_state.create(
      {'values': jnp.asarray(rng.normal(size=30), jnp.float32)}, sgd
    ),
    ema={'table': jnp.zeros((30, 30))},
    kl=tiny.ppo_state().kl,
  )

  def values_fn(params, tokens, mask):
    return params['values'][tokens]

  def padded_logprobs(params, tokens, mask, num_response):
    logits = params['table'][tokens[:, -num_response - 1 : -1]]
    return token_logprobs(logits, tokens[:, -num_response:])

  def make(policy_loss_fn, value_loss_fn, config):
    return jax.jit(
      functools.partial(
        ppo.ppo_update,
        policy_loss_fn=policy_loss_fn,
        value_loss_fn=value_loss_fn,
        ptx_loss_fn=None,
        policy_optimizer=sgd,
        value_optimizer=sgd,
        config=config,
      )
    )

  packed = make(
    ppo.make_packed_policy_loss(table_logprobs, config),
    ppo.make_packed_value_loss(values_fn, config),
    config,
  )
  padded = make(
    ppo.make_policy_loss(padded_logprobs, one),
    ppo.make_value_loss(values_fn, one),
    one,
  )
  key = jax.random.key(0)
  ours, metrics = packed(state, packing.pack_batch(batch, layout), None, key)
  theirs, total = state, 0.0
  for source, segments in zip(
    step_rows(layout.source, layout),
    step_rows(layout.segments, layout),
    strict=True,
  ):
    episodes = np.unique(source[segments > 0] // T)
    minibatch = jax.tree.map(lambda x, e=episodes: x[e], batch)
    theirs, step_metrics = padded(theirs, minibatch, None, key)
    total += step_metrics['ppo/loss/policy'][0]
  assert int(ours.policy.step) == int(theirs.policy.step) == 4
  tiny.assert_trees_close(ours, theirs, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(metrics['ppo/loss/policy'][0], total, rtol=1e-4)


def test_full_responses_are_left_as_they_are(programs):
  config, built = programs
  mesh = tiny.one_device()
  rows = on_device(sampled())
  with sharding.use_mesh(mesh):
    assert ppo_ptx.plan_rows(config, built, rows, mesh, 0) is not None
    config = config.copy_and_resolve_references()
    config.pack = False
    assert ppo_ptx.plan_rows(config, built, rows, mesh, 0) is None
    config.pack = True
    full = rows.replace(
      mask=jnp.ones((B, T), bool), response_mask=jnp.ones((B, R), bool)
    )
    assert ppo_ptx.plan_rows(config, built, full, mesh, 0) is None


@pytest.mark.parametrize('pack', [False, True])
def test_the_sampler_is_believed_as_far_as_it_agrees(pack, programs):
  _, built = programs
  rows = on_device(sampled())
  layout = on_device(plan(rows, num_epochs=1)) if pack else None

  def trusting(logprobs):
    batch, metrics = score(built, rows.replace(logprobs=logprobs), layout)
    return batch, {name: float(x[0]) for name, x in metrics.items()}

  # Noise in place of the sampler's: the training graph's are taken.
  exact, metrics = trusting(rows.logprobs)
  assert metrics['objective/sampler_trusted'] == 0
  assert metrics['objective/sampler_difference_max'] > 0.1
  old, mask = exact.old_logprobs, np.asarray(exact.response_mask)
  padded = old
  if pack:
    padded = packing.unpack_responses(old, layout, rows.response_mask)
  batch, metrics = trusting(padded + 1e-4)
  assert metrics['objective/sampler_trusted'] == 1
  assert 5e-5 < metrics['objective/sampler_difference_max'] < 2e-4
  np.testing.assert_allclose(
    np.asarray(batch.old_logprobs - old)[mask], 1e-4, atol=2e-5
  )
  # 0.01 nats off: too far; the difference is told.
  batch, metrics = trusting(padded + 1e-2)
  assert metrics['objective/sampler_trusted'] == 0
  assert 9e-3 < metrics['objective/sampler_difference_max'] < 1.1e-2
  tiny.assert_trees_close(batch.old_logprobs, old, atol=2e-5)


def test_without_a_tolerance_all_rows_say_how_far_the_sampler_is():
  _, built = build(sampler_tolerance=0.0)
  rows = on_device(sampled())
  batch, metrics = score(built, rows, None)
  mask = np.asarray(rows.response_mask)
  difference = np.abs(np.asarray(batch.old_logprobs - rows.logprobs))[mask]
  total, count = metrics['objective/sampler_difference']
  assert count == mask.sum()
  np.testing.assert_allclose(total / count, difference.mean(), rtol=1e-5)
  largest, _ = metrics['objective/sampler_difference_max']
  np.testing.assert_allclose(largest, difference.max(), rtol=1e-5)
  assert metrics['objective/sampler_trusted'][0] == 0
