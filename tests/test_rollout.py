"""Sampling responses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax import rollout
from instruct_jax.infra import sharding
from instruct_jax.types import PromptBatch
from tests import tiny
from tests.tiny import B, P, R

pytestmark = pytest.mark.usefixtures('quick_compile')

KEY = jax.random.key(5)


def sample(prompts, key=KEY):
  prompts = jax.tree.map(jnp.asarray, prompts)
  return jax.device_get(tiny.generate(tiny.params('policy'), prompts, key))


@pytest.fixture(scope='module')
def sampled():
  """Responses of the tiny Transformer; some end on their own, some do not."""
  out = sample(tiny.prompts())
  assert 0 < out.ended.sum() < B
  return out


# --- One token ----------------------------------------------------------------


def draw(logits, count, temperature=1.0):
  """`count` tokens from one row of logits."""
  keys = jax.random.split(jax.random.key(11), count)
  rows = jnp.broadcast_to(jnp.asarray(logits), (count, len(logits)))
  tokens, logprobs = jax.jit(rollout.sample_tokens, static_argnums=2)(
    rows, keys, temperature
  )
  return np.asarray(tokens), np.asarray(logprobs)


@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
  logits = np.array([1.0, -np.inf, 0.0, 2.5, -1e9, -1.0, 0.5, -3.0])
  count = 100_000
  tokens, logprobs = draw(logits, count, temperature)
  probs = np.exp(logits / temperature)
  probs /= probs.sum()
  expected = count * probs
  observed = np.bincount(tokens, minlength=8)
  possible = probs > 0
  # Tokens without probability never come; an infinite logit hurts nothing.
  assert not observed[~possible].any()
  chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
  # Five degrees of freedom: 20.5 is exceeded once in a thousand.
  assert chi_square < 20.5
  np.testing.assert_allclose(logprobs, np.log(probs[tokens]), rtol=1e-5)


def test_greedy():
  tokens, logprobs = draw([0.0, 3.0, 1.0], 4, 0.0)
  assert tokens.tolist() == [1] * 4
  # At temperature 1: 3 - log(1 + e^3 + e) = 3 - 3.169846.
  np.testing.assert_allclose(logprobs, -0.169846, rtol=1e-4)


def test_a_certain_token_is_always_drawn():
  tokens, logprobs = draw([-1e9, -1e9, 7.0], 1000)
  assert set(tokens.tolist()) == {2}
  assert not logprobs.any()


# --- Whole responses ----------------------------------------------------------


def test_against_a_slow_loop(sampled):
  """One row and one token at a time, without a cache, in float64."""
  prompts = tiny.prompts()
  tokens = np.concatenate([prompts.tokens, np.zeros((B, R), np.int32)], axis=1)
  mask = np.concatenate([prompts.mask, np.zeros((B, R), bool)], axis=1)
  logprobs, ended = np.zeros((B, R)), np.zeros(B, bool)
  for t in range(R):
    logits = np.asarray(
      tiny.forward(
        tiny.params('policy'),
        tiny.params('scalar'),
        jnp.asarray(tokens),
        jnp.asarray(mask, jnp.int32),
      )['logits'],
      np.float64,
    )[:, P + t - 1]
    for row in range(B):
      if ended[row]:
        continue
      key = jax.random.fold_in(
        jax.random.fold_in(KEY, int(prompts.indices[row])), t
      )
      probs = np.exp(logits[row] / tiny.TEMPERATURE)
      probs /= probs.sum()
      uniform = float(jax.random.uniform(key))
      token = int(np.searchsorted(np.cumsum(probs), uniform, side='right'))
      tokens[row, P + t], mask[row, P + t] = token, True
      logprobs[row, t] = np.log(probs[token])
      ended[row] = token in tiny.STOPS
  np.testing.assert_array_equal(sampled.tokens, tokens)
  np.testing.assert_array_equal(sampled.mask, mask)
  np.testing.assert_array_equal(sampled.response_mask, mask[:, P:])
  np.testing.assert_array_equal(sampled.ended, ended)
  np.testing.assert_allclose(sampled.logprobs, logprobs, atol=1e-5)


def test_the_sampled_stop_token_stays_and_all_after_it_is_out(sampled):
  for tokens, mask, logprobs, ended in zip(
    sampled.tokens[:, P:],
    sampled.response_mask,
    sampled.logprobs,
    sampled.ended,
    strict=True,
  ):
    length = int(mask.sum())
    assert mask[:length].all() and length >= 1
    is_stop = np.isin(tokens, tiny.STOPS)
    # Never a stop token that was not sampled, and none in the middle.
    assert not is_stop[: length - 1].any() and not is_stop[length:].any()
    assert is_stop[length - 1] == ended
    assert length == R or ended
    assert (logprobs[:length] < 0).all() and not logprobs[length:].any()
    assert not tokens[length:].any()
  np.testing.assert_array_equal(sampled.tokens[:, :P], tiny.prompts().tokens)
  np.testing.assert_array_equal(sampled.mask[:, :P], tiny.prompts().mask)
  responses = rollout.response_ids(sampled)
  assert [len(r) for r in responses] == sampled.response_mask.sum(1).tolist()
  assert (responses[0][-1] in tiny.STOPS) == sampled.ended[0]


def test_sampler_and_training_graph_agree(sampled):
  out = tiny.forward(
    tiny.params('policy'),
    tiny.params('scalar'),
    jnp.asarray(sampled.tokens),
    jnp.asarray(sampled.mask, jnp.int32),
  )
  mask = sampled.response_mask
  np.testing.assert_allclose(
    sampled.logprobs[mask], np.asarray(out['logprobs'])[mask], atol=1e-5
  )


def test_a_sample_depends_on_its_prompt_and_key_only(sampled, rng):
  # Other slots.
  order = rng.permutation(B)
  moved = sample(jax.tree.map(lambda x: x[order], tiny.prompts()))
  np.testing.assert_array_equal(moved.tokens, sampled.tokens[order])
  np.testing.assert_allclose(moved.logprobs, sampled.logprobs[order], atol=1e-6)
  # Other neighbours, other noise in the padding.
  ours, other = tiny.prompts(), tiny.prompts(1)
  tokens, mask = other.tokens.copy(), other.mask.copy()
  tokens[3], mask[3] = np.where(ours.mask[3], ours.tokens[3], 9), ours.mask[3]
  indices = np.arange(B, dtype=np.int32)
  indices[3] = ours.indices[3]
  mixed = sample(PromptBatch(tokens, mask, indices))
  np.testing.assert_array_equal(mixed.tokens[3, P:], sampled.tokens[3, P:])
  # Same key, same samples: a resumed run repeats them.
  np.testing.assert_array_equal(sample(ours).tokens, sampled.tokens)


def test_noise_differs_between_iterations_and_between_equal_prompts(sampled):
  again = sample(tiny.prompts(), jax.random.fold_in(KEY, 1))
  same = (again.tokens == sampled.tokens)[:, P:].all(axis=1)
  assert same.sum() <= 1
  ours = tiny.prompts()
  twins = jax.tree.map(lambda x: np.repeat(x[:1], B, axis=0), ours)
  out = sample(twins.replace(indices=ours.indices))
  assert len({tuple(row) for row in out.tokens.tolist()}) > B // 2


def test_a_mesh_gives_the_same_samples(sampled):
  mesh = sharding.make_mesh((2, 2, 2))
  with sharding.use_mesh(mesh):
    out = tiny.generate(
      tiny.params('policy'), sharding.put_batch(tiny.prompts(), mesh), KEY
    )
  np.testing.assert_array_equal(out.tokens, sampled.tokens)
  np.testing.assert_allclose(out.logprobs, sampled.logprobs, atol=1e-5)


# --- Leaving early ------------------------------------------------------------

STEPS = []


def counted_extend(params, tokens, mask, cache):
  """A model that ends with probability 1/2 whatever it has read."""
  jax.debug.callback(lambda: STEPS.append(1))
  total = cache + jnp.sum(jnp.where(mask, tokens, 0), axis=1)
  rest = jnp.sin(params * jnp.arange(1, 4)[None] * total[:, None])
  end = jax.nn.logsumexp(rest, axis=1, keepdims=True)
  return jnp.concatenate([end, rest], axis=1), total


@pytest.mark.parametrize('length', [40, 2])
def test_leaving_early_changes_nothing_but_the_time(length):
  """40 columns: all end long before; 2 columns: some never end."""
  prompts = PromptBatch(
    jnp.arange(12).reshape(6, 2), jnp.ones((6, 2), bool), jnp.arange(6)
  )
  outs, steps = [], []
  for early_exit in (True, False):
    STEPS.clear()
    outs.append(
      jax.jit(
        functools.partial(
          rollout.generate,
          extend_fn=counted_extend,
          make_cache_fn=lambda batch, slots: jnp.zeros(batch, jnp.int32),
          num_response=length,
          stop_ids=(0,),
          early_exit=early_exit,
        )
      )(jnp.float32(0.7), prompts, KEY)
    )
    jax.effects_barrier()
    steps.append(len(STEPS))
  tiny.assert_trees_equal(*outs)
  assert steps[1] == length
  assert steps[0] == outs[0].response_mask.sum(axis=1).max()
  assert steps[0] < length or not outs[0].ended.all()
  assert outs[0].ended.all() == (length == 40)


# --- Any number of rows -------------------------------------------------------


def test_in_batches_fills_up_and_restores_the_order():
  rows = {'x': np.arange(7), 'y': np.arange(14).reshape(7, 2)}
  shapes, told = [], []

  def double(batch):
    shapes.append(batch['x'].shape)
    return {'x': jnp.asarray(2 * batch['x']), 'y': jnp.asarray(batch['y'])}

  out = rollout.in_batches(double, rows, 3, told.append)
  np.testing.assert_array_equal(out['x'], 2 * rows['x'])
  np.testing.assert_array_equal(out['y'], rows['y'])
  assert (shapes, told) == ([(3,)] * 3, [3, 3, 1])
  # More slots than rows.
  out = rollout.in_batches(double, rows, 16)
  np.testing.assert_array_equal(out['x'], 2 * rows['x'])
  assert shapes[-1] == (16,)


def test_in_batches_without_rows():
  with pytest.raises(ValueError, match='no rows'):
    rollout.in_batches(lambda x: x, np.zeros((0, 3)), 4)


# --- Slices -------------------------------------------------------------------


@pytest.mark.parametrize('mesh_shape', [None, (2, 2, 2)])
def test_slices_sample_the_same(sampled, mesh_shape):
  def run(params, prompts):
    return rollout.in_slices(
      lambda rows: tiny.generate(params, rows, KEY), prompts, 4
    )

  params, prompts = tiny.params('policy'), tiny.prompts()
  if mesh_shape is None:
    sliced = jax.jit(run)(params, jax.tree.map(jnp.asarray, prompts))
  else:
    mesh = sharding.make_mesh(mesh_shape)
    with sharding.use_mesh(mesh):
      sliced = jax.jit(run)(params, sharding.put_batch(prompts, mesh))
  for name in ('tokens', 'mask', 'response_mask', 'ended'):
    np.testing.assert_array_equal(getattr(sliced, name), getattr(sampled, name))
  np.testing.assert_allclose(sliced.logprobs, sampled.logprobs, atol=1e-5)


def test_slices_keep_the_order_of_rows():
  rows = np.arange(12.0).reshape(6, 2)
  seen = []

  def double(x):
    seen.append(x.shape)
    return {'twice': 2 * x, 'first': x[:, 0]}

  result = rollout.in_slices(double, jnp.asarray(rows), 3)
  np.testing.assert_array_equal(result['twice'], 2 * rows)
  np.testing.assert_array_equal(result['first'], rows[:, 0])
  # Only ever two rows at a time.
  assert set(seen) == {(2, 2)}
