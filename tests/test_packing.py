"""Rows of episodes: the same numbers in any layout, alone or dense."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import rl as config_file
from experiments import ppo_ptx
from instruct_jax import model_fns, packing, ppo, rewards, rl
from instruct_jax.infra import sharding, train_state
from instruct_jax.models.heads import token_logprobs
from instruct_jax.types import RLBatch, Rollout
from tests import tiny

pytestmark = pytest.mark.usefixtures('quick_compile')

B, P, R, T = tiny.B, tiny.P, tiny.R, tiny.T
DENSE = {'num_microbatches': 2, 'num_epochs': 2, 'row_episodes': 3}
ALONE = {**DENSE, 'row_episodes': 0}


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


def lay_out(rows: Rollout, **changes) -> packing.Layout:
  return tiny.lay_out(rows, seed=(0, 5), **(DENSE | changes))


def step_rows(x, layout):
  """[steps, rows of a step, ...], by hand."""
  return [x[step :: layout.num_steps] for step in range(layout.num_steps)]


# --- The layout ---------------------------------------------------------------


@pytest.mark.parametrize('num_shards', [1, 2])
@pytest.mark.parametrize('row_episodes', [0, 3])
def test_every_step_holds_its_episodes_once(row_episodes, num_shards):
  rows = sampled()
  layout = lay_out(rows, num_shards=num_shards, row_episodes=row_episodes)
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
    sizes = packing.Sizes(
      prompt_columns=prompt,
      response_columns=longest,
      num_minibatches=8,
      num_microbatches=1,
      num_epochs=1,
      num_shards=1,
      row_episodes=8,
      multiple=8,
      spare=1.0,
    )
    prompts = rng.integers(prompt // 2, prompt + 1, batch)
    groups = packing.deal_epochs(prompts + lengths, sizes, (0, seed))
    layout = packing.lay_out(prompts, lengths, groups, sizes)
    shares.append(1 - packing.fill_fraction(layout))
  assert np.mean(shares) < 0.05, shares


def sizes_of(longest, num_shards=1, **changes):
  return packing.Sizes(
    **{
      'prompt_columns': longest // 2,
      'response_columns': longest - longest // 2,
      'num_minibatches': 2,
      'num_microbatches': 1,
      'num_epochs': 1,
      'num_shards': num_shards,
      'row_episodes': 8,
      'multiple': 8,
      'spare': 1.1,
    }
    | changes
  )


@pytest.mark.parametrize('spare', [1.1, 1.25])
@pytest.mark.parametrize(
  'longest, group_size, num_rows, multiple',
  [(52, 16, 2, 8), (2048, 64, 8, 128), (96, 16, 16, 8), (512, 16, 3, 1)],
)
def test_shapes_are_a_short_ladder(
  longest, group_size, num_rows, multiple, spare
):
  sizes = sizes_of(
    longest,
    row_episodes=group_size // num_rows,
    multiple=multiple,
    spare=spare,
  )
  *shapes, alone = packing.ladder(sizes, group_size)
  assert alone == packing.Shape(group_size, longest, sizes.response_columns)
  assert {shape.num_rows for shape in shapes} == {num_rows}
  pairs = [(shape.length, shape.num_responses) for shape in shapes]
  lengths = sorted({length for length, _ in pairs})
  assert pairs == sorted(set(pairs))
  # From half an episode to what saves a twentieth, by factors of `spare`.
  most = 0.95 * longest * group_size / num_rows
  assert most - multiple < lengths[-1] <= most
  assert lengths[0] <= longest / 2
  assert all(length % multiple == 0 for length in lengths)
  rungs = math.log(most / (longest / 2)) / math.log(spare)
  assert len(lengths) <= rungs + 2 and len(pairs) <= 3 * len(lengths)
  for short, long in zip(lengths, lengths[1:], strict=False):
    assert short < long <= spare * short + multiple
  # All of a row may be responses.
  for length in lengths:
    widths = [width for other, width in pairs if other == length]
    assert max(widths) == length and min(widths) < length / 2 + 8


def test_rows_come_in_multiples_of_the_shards():
  for num_shards in (1, 2, 4):
    for shape in packing.ladder(sizes_of(64, num_shards), 16):
      assert shape.num_rows % num_shards == 0


def test_a_layout_takes_the_least_shape_that_holds_it():
  for seed in range(20):
    lengths = np.random.default_rng(seed).integers(1, R + 1, B)
    layout = lay_out(sampled(seed, lengths))
    row_tokens = (layout.segments > 0).sum(1).max()
    row_responses = layout.response_mask.sum(1).max()
    sizes = sizes_of(T, prompt_columns=P, response_columns=R, row_episodes=3)
    *dense, _ = packing.ladder(sizes, B // 4)
    fitting = [
      (shape.length, shape.num_responses)
      for shape in dense
      if row_tokens <= shape.length and row_responses <= shape.num_responses
    ]
    shape = (layout.segments.shape[1], layout.where.shape[1])
    assert shape == min(fitting)


def test_what_would_save_little_lies_alone():
  full = lay_out(sampled(lengths=np.full(B, R)), row_episodes=1)
  assert full.segments.shape[1] == T and full.where.shape[1] == R
  assert full.segments.max() == 1
  # Beside short prompts even responses of full length leave room.
  assert lay_out(sampled(lengths=np.full(B, 1))).segments.max() > 1
  assert lay_out(sampled(), row_episodes=0).segments.max() == 1


def test_bad_batches_are_named():
  with pytest.raises(ValueError, match='6 groups do not divide 16'):
    lay_out(sampled(), num_minibatches=3)
  rows = sampled()
  rows.mask[3] = rows.response_mask[3] = False
  with pytest.raises(ValueError, match='episode 3 has no tokens'):
    lay_out(rows)


# --- Models on rows -----------------------------------------------------------


def on_device(tree):
  return jax.tree.map(jnp.asarray, tree)


@jax.jit
def read(policy, scalar, rollout, layout):
  """Log-probabilities, entropies and values [B, R], and scores [B]."""
  rows = packing.first_epoch(packing.pack_episodes(rollout, layout), layout)
  where = rows.tokens, rows.segments, rows.where
  logprobs, entropies = model_fns.logprobs_fn(tiny.POLICY, tiny.TEMPERATURE, T)(
    policy, *where
  )
  scalars = model_fns.scalars_fn(tiny.SCALAR, T)(scalar, *where[:2])
  values = jnp.take_along_axis(scalars, rows.where, axis=1)
  return {
    name: packing.unpack_responses(x, layout, rollout.response_mask)
    for name, x in (
      ('logprobs', logprobs),
      ('entropies', entropies),
      ('values', values),
    )
  } | {'scores': scalars.reshape(-1)[layout.ends]}


@jax.jit
def scalars_of(params, ids):
  return tiny.SCALARS_FN(params, ids[None], jnp.ones((1, ids.size), int))[0]


@jax.jit
def logprobs_of(params, ids):
  return tiny.LOGPROBS_FN(params, ids[None], jnp.ones((1, ids.size), int))[0][0]


def one_by_one(policy, scalar, rollout):
  """The same of every episode by itself, without padding or neighbours."""
  found = {name: np.zeros((B, R)) for name in ('logprobs', 'values')}
  found['scalars'] = []
  for b in range(B):
    ids = jnp.asarray(rollout.tokens[b][rollout.mask[b]])
    size = int(rollout.response_mask[b].sum())
    found['logprobs'][b, :size] = logprobs_of(policy, ids)[-size:]
    scalars = scalars_of(scalar, ids)
    found['values'][b, :size] = scalars[-size - 1 : -1]
    found['scalars'].append(np.asarray(scalars))
  scores = np.array([scalars[-1] for scalars in found['scalars']])
  return found | {'scores': scores}


def test_models_say_the_same_in_any_layout():
  """Alone, dense, in other company: as of the episode by itself."""
  rollout = sampled()
  policy, scalar = tiny.params('policy'), tiny.params('scalar')
  expected = one_by_one(policy, scalar, rollout)
  del expected['scalars']
  found = []
  for seed, changes in ((0, ALONE), (0, DENSE), (1, DENSE), (2, DENSE)):
    layout = tiny.lay_out(rollout, seed=(seed,), **changes)
    found.append(read(policy, scalar, on_device(rollout), on_device(layout)))
    for name, values in expected.items():
      np.testing.assert_allclose(
        found[-1][name], values, rtol=1e-5, atol=3e-5, err_msg=name
      )
  # Attention went block by block in the dense ones.
  assert layout.segments.shape[1] > 1.5 * T
  for other in found[1:]:
    tiny.assert_trees_close(other, found[0], rtol=1e-5, atol=3e-5)
  # As it is, the rollout is one more layout.
  rows = tiny.as_rows(on_device(rollout))
  as_it_is = tiny.forward(policy, scalar, rows.tokens, rows.segments)
  np.testing.assert_allclose(
    np.where(rollout.response_mask, as_it_is['logprobs'], 0),
    expected['logprobs'],
    rtol=1e-5,
    atol=3e-5,
  )


def test_neighbours_do_not_matter():
  """Other tokens in the same row change nothing at all."""
  rollout = sampled()
  layout = on_device(lay_out(rollout, num_epochs=1, num_microbatches=1))
  policy, scalar = tiny.params('policy'), tiny.params('scalar')
  before = read(policy, scalar, on_device(rollout), layout)
  tokens = np.where(rollout.mask, (rollout.tokens + 3) % 30, rollout.tokens)
  tokens[4] = rollout.tokens[4]
  after = read(
    policy, scalar, on_device(rollout.replace(tokens=tokens)), layout
  )
  for name, values in before.items():
    np.testing.assert_array_equal(after[name][4], values[4], err_msg=name)
    assert np.abs(after[name] - values).max() > 0.01, name


# --- Scores and updates -------------------------------------------------------


def build(scalar=tiny.SCALAR, **changes):
  config = config_file.stage(0, '')
  values = {
    'reward_model': 'one',
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
  return config, ppo_ptx.build_programs(config, tiny.POLICY, scalar, tiny.STOPS)


@pytest.fixture(scope='module')
def programs():
  return build()


def state_and_frozen():
  """A value model, a reference and a reward model of their own each."""
  state = tiny.ppo_state()
  return state, {'reference': tiny.params('policy', 5)}


def penalise(programs, rollout, layout):
  """Batch and metrics of a rollout on the device."""
  state, frozen = state_and_frozen()
  rollout, layout = on_device(rollout), on_device(layout)
  scores = programs['score'](tiny.params('scalar', 1), rollout, layout)
  batch, _, metrics = programs['penalise'](
    state, frozen, rollout, layout, scores
  )
  return batch, metrics


FIELDS = ('old_logprobs', 'ref_logprobs', 'old_values', 'advantages', 'returns')


def unpacked(batch, rollout, layout):
  """The batch's fields [B, R]."""
  return {
    name: packing.unpack_responses(
      packing.first_epoch(getattr(batch, name), layout),
      on_device(layout),
      jnp.asarray(rollout.response_mask),
    )
    for name in FIELDS
  }


def test_batches_do_not_depend_on_the_layout(programs):
  _, built = programs
  rollout = sampled()
  alone_layout = lay_out(rollout, num_epochs=1, row_episodes=0)
  alone, alone_metrics = penalise(built, rollout, alone_layout)
  layout = lay_out(rollout, num_epochs=1)
  dense, dense_metrics = penalise(built, rollout, layout)
  expected = unpacked(alone, rollout, alone_layout)
  for name, values in unpacked(dense, rollout, layout).items():
    np.testing.assert_allclose(
      values, expected[name], rtol=1e-4, atol=1e-4, err_msg=name
    )
  assert set(dense_metrics) == set(alone_metrics)
  row = {name: total for name, (total, _) in dense_metrics.items()}
  assert row['packing/row_length'] == layout.segments.shape[1]
  assert row['packing/row_responses'] == layout.where.shape[1]
  total, count = dense_metrics['packing/fill']
  assert total / count == pytest.approx(packing.fill_fraction(layout))
  for name, (total, count) in alone_metrics.items():
    if name.startswith(('objective/sampler', 'packing/')):
      continue  # Of some rows, and not of the same ones.
    np.testing.assert_allclose(
      dense_metrics[name][0], total, rtol=1e-4, atol=1e-4, err_msg=name
    )
    assert dense_metrics[name][1] == count


def test_an_end_that_the_reward_model_skips_is_not_read(programs):
  """In any layout: at the last token of another kind, as by hand."""
  rollout = sampled()
  skipped = int(rollout.tokens[0][rollout.mask[0]][-1])  # Ends the first row.
  _, skipping = build(tiny.SCALAR.clone(skipped_id=skipped))
  params, expected = tiny.params('scalar', 1), []
  found = one_by_one(tiny.params('policy'), params, rollout)
  plain = found['scores']
  for b, scalars in enumerate(found['scalars']):
    ids = rollout.tokens[b][rollout.mask[b]]
    expected.append(scalars[np.flatnonzero(ids != skipped)[-1]])
  assert np.abs(plain - expected).max() > 0.1
  for changes in (ALONE, DENSE):
    layout = on_device(tiny.lay_out(rollout, **changes))
    for built, scores in ((skipping, expected), (programs[1], plain)):
      found = built['score'](params, on_device(rollout), layout)
      np.testing.assert_allclose(found, scores, rtol=1e-4, atol=1e-4)


def test_what_follows_an_end_is_read(programs):
  """In any layout: behind all that a template puts there, as by hand."""
  rollout = sampled()
  end = int(rollout.tokens[0][rollout.mask[0]][-1])  # Ends the first row.
  module = tiny.SCALAR.clone(skipped_id=end, end_ids=(end, 5, end, 7, end))
  _, reading = build(module)
  params, expected, has_ended = tiny.params('scalar', 1), [], []
  scores_fn = jax.jit(model_fns.scores_fn(tiny.SCALAR))
  for b in range(len(rollout.tokens)):
    ids = rollout.tokens[b][rollout.mask[b]].tolist()
    has_ended.append(ids[-1] == end)
    # The last end is skipped.
    ids += [5, end, 7] if has_ended[-1] else []
    while ids[-1] == end:
      ids = ids[:-1]
    tokens = np.array([ids])
    expected.append(scores_fn(params, tokens, np.ones_like(tokens, bool))[0])
  assert 0 < sum(has_ended) < len(has_ended)
  for changes in (ALONE, DENSE):
    layout = on_device(tiny.lay_out(rollout, **changes))
    found = reading['score'](params, on_device(rollout), layout)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@functools.cache
def gradients(loss_fn):
  return jax.jit(
    lambda params, batch: train_state.accumulate_gradients(
      loss_fn, params, {}, batch, jax.random.key(0)
    )
  )


def test_gradients_do_not_depend_on_the_layout(programs):
  """One minibatch of eight episodes: losses, metrics and gradients."""
  config, built = programs
  method = rl.method_of(config)
  rollout = sampled()
  layouts = [
    lay_out(rollout, num_epochs=1, num_microbatches=1, row_episodes=episodes)
    for episodes in (0, 3)
  ]
  batches = [penalise(built, rollout, layout)[0] for layout in layouts]
  # Far from the old policy, so that ratios and clipping take part.
  for params, loss_fn in (
    (
      tiny.params('policy', 7),
      ppo.make_policy_loss(
        model_fns.logprobs_fn(tiny.POLICY, tiny.TEMPERATURE, T), method
      ),
    ),
    (
      tiny.params('scalar', 8),
      ppo.make_value_loss(model_fns.scalars_fn(tiny.SCALAR, T), method),
    ),
  ):
    for step in range(2):
      alone, dense = (
        gradients(loss_fn)(
          params, jax.tree.map(lambda x, s=step: x[s::2], batch)
        )
        for batch in batches
      )
      assert (
        batches[0].episodes.tokens.shape != batches[1].episodes.tokens.shape
      )
      tiny.assert_trees_close(dense, alone, rtol=2e-3, atol=2e-4)
      assert float(alone[1]) != 0


def test_three_iterations_reach_the_same_parameters():
  """Alone and dense: the same minibatches, and so the same models, to the
  rounding of float32. Every iteration trains on what the one before left."""
  prompts = on_device(tiny.prompts())
  states = []
  for row_episodes in (0, 4):
    state, frozen = state_and_frozen()
    for iteration in range(3):
      # The rollouts of one fixed policy: sampled tokens are no function that
      # rounding leaves alone.
      rollout = tiny.generate(
        tiny.params('policy'), prompts, jax.random.key(iteration)
      )
      layout = tiny.lay_out(
        rollout, seed=(0, iteration), row_episodes=row_episodes
      )
      assert (layout.segments.max() > 1) == bool(row_episodes)
      scores = tiny.score(tiny.params('scalar', 1), rollout, on_device(layout))
      batch, kl, _ = tiny.penalise(
        state, frozen, rollout, on_device(layout), scores
      )
      text = on_device(tiny.text(iteration))
      state, _ = tiny.train(
        state, frozen, batch, text, kl, jax.random.key(iteration)
      )
    states.append(state)
  alone, dense = states
  assert int(alone.policy.step) == int(dense.policy.step) == 6
  tiny.assert_trees_close(dense.policy.params, alone.policy.params, atol=5e-5)
  tiny.assert_trees_close(dense.value.params, alone.value.params, atol=5e-5)
  tiny.assert_trees_close(dense.kl, alone.kl, rtol=1e-5)
  moved = jax.tree.map(
    lambda a, b: float(jnp.abs(a - b).max()),
    alone.policy.params,
    tiny.params('policy'),
  )
  # But for the keys' bias, which a softmax does not see.
  assert sorted(jax.tree.leaves(moved))[1] > 100 * 5e-5


def table_logprobs(params, tokens, segments, where, dropout_key=None):
  del segments, dropout_key
  here, after = (
    jnp.take_along_axis(tokens, x, axis=1) for x in (where, where + 1)
  )
  return token_logprobs(params['table'][here], after)


def table_values(params, tokens, segments):
  del segments
  return params['values'][tokens]


def test_updates_are_those_of_the_minibatches_one_by_one():
  """Two epochs of two minibatches of two microbatches, on a table."""
  method = ppo.PPOConfig(
    ptx_coef=0.0, num_minibatches=2, num_epochs=2, num_microbatches=2
  )
  one = ppo.PPOConfig(ptx_coef=0.0, num_minibatches=1)
  rng = np.random.default_rng(3)
  rollout = on_device(sampled())
  fields = {
    name: jnp.asarray(rng.normal(size=(B, R)), jnp.float32) for name in FIELDS
  }
  sgd = optax.sgd(0.5)
  state = ppo.RLState(
    policy=train_state.create(
      {'table': jnp.asarray(rng.normal(size=(30, 30)), jnp.float32)}, sgd
    ),
    value=train_state.create(
      {'values': jnp.asarray(rng.normal(size=30), jnp.float32)}, sgd
    ),
    ema={'table': jnp.zeros((30, 30))},
    kl=rewards.KLState(coef=jnp.float32(0.1)),
  )

  def make(config):
    return jax.jit(
      ppo.make_train(
        {
          'policy': ppo.make_policy_loss(table_logprobs, config),
          'value': ppo.make_value_loss(table_values, config),
        },
        {'policy': sgd, 'value': sgd},
        config,
      )
    )

  def batch_of(rollout, fields, layout):
    layout = on_device(layout)
    return RLBatch(
      packing.pack_episodes(rollout, layout),
      **{n: packing.pack_responses(x, layout) for n, x in fields.items()},
    )

  key = jax.random.key(0)
  layout = lay_out(rollout)
  ours, metrics = make(method)(
    state, {}, batch_of(rollout, fields, layout), None, state.kl, key
  )
  theirs, total = state, 0.0
  train_one = make(one)
  for source, segments in zip(
    step_rows(layout.source, layout),
    step_rows(layout.segments, layout),
    strict=True,
  ):
    episodes = np.unique(source[segments > 0] // T)
    minibatch, some = jax.tree.map(
      lambda x, e=episodes: x[e], (rollout, fields)
    )
    plain = tiny.lay_out(minibatch, num_minibatches=1)
    theirs, step_metrics = train_one(
      theirs, {}, batch_of(minibatch, some, plain), None, state.kl, key
    )
    total += step_metrics['ppo/loss/policy'][0]
  assert int(ours.policy.step) == int(theirs.policy.step) == 4
  tiny.assert_trees_close(ours, theirs, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(metrics['ppo/loss/policy'][0], total, rtol=1e-4)


def test_the_config_says_whether_rows_are_dense(programs):
  config, built = programs
  mesh = tiny.one_device()
  rollout = on_device(sampled())

  def longest(config, rollout):
    layout = rl.lay_out(config, built, rollout, mesh, 0)
    return int(layout.segments.max())

  with sharding.use_mesh(mesh):
    assert longest(config, rollout) > 1
    alone = config.copy_and_resolve_references()
    alone.pack = False
    assert longest(alone, rollout) == 1
    full = rollout.replace(
      mask=jnp.ones((B, T), bool), response_mask=jnp.ones((B, R), bool)
    )
    assert longest(config, full) == 1


@pytest.mark.parametrize('row_episodes', [0, 8])
def test_the_sampler_is_believed_as_far_as_it_agrees(row_episodes, programs):
  _, built = programs
  rollout = on_device(sampled())
  layout = lay_out(rollout, num_epochs=1, row_episodes=row_episodes)

  def trusting(logprobs):
    batch, metrics = penalise(built, rollout.replace(logprobs=logprobs), layout)
    old = unpacked(batch, rollout, layout)['old_logprobs']
    return np.asarray(old), {n: float(x[0]) for n, x in metrics.items()}

  # Noise in place of the sampler's: the training graph's are taken.
  exact, metrics = trusting(rollout.logprobs)
  assert metrics['objective/sampler_trusted'] == 0
  assert metrics['objective/sampler_difference_max'] > 0.1
  mask = np.asarray(rollout.response_mask)
  old, metrics = trusting(jnp.asarray(exact) + 1e-4)
  assert metrics['objective/sampler_trusted'] == 1
  assert 5e-5 < metrics['objective/sampler_difference_max'] < 2e-4
  np.testing.assert_allclose((old - exact)[mask], 1e-4, atol=2e-5)
  # 0.01 nats off: too far; the difference is told.
  old, metrics = trusting(jnp.asarray(exact) + 1e-2)
  assert metrics['objective/sampler_trusted'] == 0
  assert 9e-3 < metrics['objective/sampler_difference_max'] < 1.1e-2
  np.testing.assert_allclose(old, exact, atol=2e-5)


def test_without_a_tolerance_all_rows_say_how_far_the_sampler_is():
  _, built = build(sampler_tolerance=0.0)
  rollout = on_device(sampled())
  layout = lay_out(rollout, num_epochs=1)
  batch, metrics = penalise(built, rollout, layout)
  mask = np.asarray(rollout.response_mask)
  old = unpacked(batch, rollout, layout)['old_logprobs']
  difference = np.abs(np.asarray(old - rollout.logprobs))[mask]
  total, count = metrics['objective/sampler_difference']
  assert count == mask.sum()
  np.testing.assert_allclose(total / count, difference.mean(), rtol=1e-5)
  largest, _ = metrics['objective/sampler_difference_max']
  np.testing.assert_allclose(largest, difference.max(), rtol=1e-5)
  assert metrics['objective/sampler_trusted'][0] == 0
