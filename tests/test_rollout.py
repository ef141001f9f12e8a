"""Sampling responses."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax import model_fns, rollout, sampling
from instruct_jax.infra import sharding, slices
from instruct_jax.types import Decoder, PromptBatch, Rollout
from tests import simple_rollout, tiny
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
  uniform = jax.random.uniform(jax.random.key(11), (count,))
  rows = jnp.broadcast_to(jnp.asarray(logits), (count, len(logits)))
  tokens, logprobs = jax.jit(sampling.sample_tokens, static_argnums=2)(
    rows, uniform, temperature
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


def test_sampler_and_training_graph_agree_in_bfloat16():
  """To some units in the last place of logits of 4 to 8: 1/32 each."""
  config = dataclasses.replace(tiny.CONFIG, compute_dtype='bfloat16')
  module = model_fns.make_module('policy', config)

  @jax.jit
  def run(params, prompts):
    out = rollout.generate(
      params,
      prompts,
      KEY,
      decoder=model_fns.decoder(module),
      num_response=R,
      stop_ids=tiny.STOPS,
    )
    rows = tiny.as_rows(out)
    logprobs, _ = model_fns.logprobs_fn(module)(
      params, rows.tokens, rows.segments, rows.where
    )
    return out, logprobs

  prompts = jax.tree.map(jnp.asarray, tiny.prompts())
  out, logprobs = jax.device_get(run(tiny.params('policy'), prompts))
  difference = np.abs(out.logprobs - logprobs)[out.response_mask]
  assert 0 < difference.max() < 0.125
  assert difference.mean() < 0.03


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


# --- Slots, queues and drains -------------------------------------------------


def engine(num_slots, num_samples=1):
  """The tiny Transformer's rollout with its counts, jitted."""
  return jax.jit(
    functools.partial(
      rollout.generate_counted,
      decoder=model_fns.decoder(tiny.POLICY),
      num_response=R,
      stop_ids=tiny.STOPS,
      temperature=tiny.TEMPERATURE,
      num_slots=num_slots,
      num_samples=num_samples,
    )
  )


@jax.jit
def looped(params, prompts, key):
  """The same by the obvious loop."""
  return simple_rollout.generate(
    params,
    prompts,
    key,
    extend_fn=tiny.extend,
    make_cache_fn=tiny.make_extend_cache,
    num_response=R,
    stop_ids=tiny.STOPS,
    temperature=tiny.TEMPERATURE,
  )


def assert_same_rollout(ours, theirs, atol=1e-5):
  """Equal tokens by programs that round differently: a token changes only
  where its draw lies within rounding, 1e-6, of the border between two, which
  none of the hundred of these tests does."""
  for name in ('tokens', 'mask', 'response_mask', 'ended'):
    np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
  np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=atol)


def test_the_obvious_loop_gives_the_same(sampled):
  prompts = jax.tree.map(jnp.asarray, tiny.prompts())
  assert_same_rollout(sampled, looped(tiny.params('policy'), prompts, KEY))


def test_refilled_slots_give_the_same(sampled):
  """5 slots for 16 prompts: every slot is used several times."""
  prompts = jax.tree.map(jnp.asarray, tiny.prompts())
  out, counts = engine(5)(tiny.params('policy'), prompts, KEY)
  assert_same_rollout(out, sampled)
  # Nothing idled as long as there were prompts, and each was read once.
  assert counts['queued_slot_steps'] > 0 == counts['queued_idle']
  assert counts['reads'] == B
  assert counts['slot_steps'] - counts['idle'] == sampled.response_mask.sum()


def test_samples_of_one_prompt_share_its_reading():
  prompts = jax.tree.map(lambda x: jnp.asarray(x[:8]), tiny.prompts())
  out, counts = engine(4, 2)(tiny.params('policy'), prompts, KEY)
  assert counts['reads'] == 8
  twice = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), prompts)
  numbers = 2 * prompts.indices[:, None] + jnp.arange(2)[None, :]
  twice = twice.replace(indices=numbers.reshape(-1))
  expected = looped(tiny.params('policy'), twice, KEY)
  assert_same_rollout(out, expected)
  assert (np.asarray(out.tokens[0::2]) != out.tokens[1::2]).any()


def test_slots_on_a_mesh_keep_to_their_shard(sampled):
  mesh = sharding.make_mesh((2, 2, 2))
  layout = model_fns.abstract_params('policy', tiny.CONFIG, mesh)
  params = jax.device_put(tiny.params('policy'), sharding.shardings_of(layout))
  with sharding.use_mesh(mesh):
    prompts = sharding.put_batch(tiny.prompts(), mesh)
    program = engine(8).lower(params, prompts, KEY).compile()
    out, counts = program(params, prompts, KEY)
  assert_same_rollout(out, sampled)
  assert counts['queued_slot_steps'] > 0
  # Of the two slots and two heads of a shard, [2, 2, 16, 4] in each layer, or
  # of the one prompt read, nothing goes to another device.
  sent = [
    shape
    for line in program.as_text().splitlines()
    if re.search(r' = .* (all-\w+|collective-\w+|reduce-scatter)\(', line)
    for shape in re.findall(r'f32\[([\d,]+)\]', line.split(' = ')[1])
  ]
  assert sent
  caches = [s for s in sent if re.fullmatch(r'\d+,\d+,(6|16),4', s)]
  assert not caches


def test_weights_are_put_together_before_the_loop_not_in_it():
  """Over fsdp alone, no parameter is gathered for every token, unless the
  weights are to stay cut."""
  mesh = sharding.make_mesh((1, 8, 1))
  layout = model_fns.abstract_params('policy', tiny.CONFIG, mesh)
  params = jax.device_put(tiny.params('policy'), sharding.shardings_of(layout))

  def gathers(gather_weights):
    decoder = model_fns.decoder(tiny.POLICY, gather_weights)

    def step(params, tokens, lengths):
      cache = decoder.make_cache(16, 16)
      weights = decoder.prepare(params)

      def body(state):
        t, lengths, cache = state
        logits, cache = decoder.step(weights, tokens, lengths, cache)
        return t + jnp.argmax(logits[0]) + 1, lengths + 1, cache

      return jax.lax.while_loop(
        lambda state: state[0] < 3, body, (0, lengths, cache)
      )

    with sharding.use_mesh(mesh):
      rows = sharding.put_batch(np.ones(16, np.int32), mesh)
      text = jax.jit(step).lower(params, rows, rows).compile().as_text()
    blocks = re.split(r'\n(?=\S)', text)
    loop = re.search(r' while\(.*body=%([\w.\-]+)', text)[1]
    (body,) = [b for b in blocks if b.startswith(f'%{loop} ')]
    return [x for x in body.splitlines() if ' all-gather(' in x]

  assert not [x for x in gathers(True) if 'f32[1' in x and ',16]' in x]
  assert gathers(False)


def fake_decoder(chance):
  """A model without weights: a response ends with this probability at every
  token; the others depend on the sum of all columns read so far."""

  def step(weights, tokens, lengths, cache):
    columns = jnp.arange(cache.shape[2])[None, :]
    lengths = lengths[:, None]
    cache = jnp.where(
      (columns == lengths)[:, None, :, None],
      tokens[:, None, None, None],
      cache,
    )
    total = jnp.sum(jnp.where(columns <= lengths, cache[:, 0, :, 0], 0), axis=1)
    return fake_logits(total, chance), cache

  def read(weights, tokens, lengths):
    return tokens[:, None, :, None]

  return Decoder(
    prepare=lambda params: params,
    # What is not overwritten must not count.
    make_cache=lambda slots, columns: jnp.full(
      (slots, 1, columns, 1), 999, jnp.int32
    ),
    read=read,
    step=step,
  )


def fake_logits(total, chance):
  rest = jnp.sin(0.7 * jnp.arange(1, 4)[None] * total[:, None])
  rest = jax.nn.log_softmax(rest, axis=1) + jnp.log1p(-chance)
  end = jnp.full((total.shape[0], 1), jnp.log(chance))
  return jnp.concatenate([end, rest], axis=1)


def fake_prompts(num_rows):
  rng = np.random.default_rng(2)
  mask = np.arange(5)[None] >= rng.integers(0, 5, num_rows)[:, None]
  tokens = np.where(mask, rng.integers(1, 4, (num_rows, 5)), 0)
  return jax.tree.map(
    jnp.asarray,
    PromptBatch(tokens.astype(np.int32), mask, np.arange(num_rows)),
  )


def fake_rollout(num_rows, num_slots, num_response, chance):
  program = jax.jit(
    functools.partial(
      rollout.generate_counted,
      decoder=fake_decoder(chance),
      num_response=num_response,
      stop_ids=(0,),
      temperature=1.0,
      num_slots=num_slots,
      num_samples=1,
    )
  )
  out, counts = jax.device_get(program(None, fake_prompts(num_rows), KEY))
  return out, {name: int(count) for name, count in counts.items()}


def fake_looped(num_rows, num_response, chance):
  def extend(params, tokens, mask, total):
    total = total + jnp.sum(jnp.where(mask, tokens, 0), axis=1)
    return fake_logits(total, chance), total

  return jax.jit(
    functools.partial(
      simple_rollout.generate,
      extend_fn=extend,
      make_cache_fn=lambda batch, slots: jnp.zeros(batch, jnp.int32),
      num_response=num_response,
      stop_ids=(0,),
    )
  )(None, fake_prompts(num_rows), KEY)


@pytest.mark.parametrize(
  'num_rows,num_slots,num_response,chance,least,most',
  [(512, 32, 64, 0.038, 20, 28), (96, 16, 1024, 1 / 200, 150, 250)],
)
def test_slots_are_busy_until_the_queue_is_empty(
  num_rows, num_slots, num_response, chance, least, most
):
  """Geometric lengths of mean 24 (at most 64) and 200 (at most 1024)."""
  out, counts = fake_rollout(num_rows, num_slots, num_response, chance)
  assert_same_rollout(out, fake_looped(num_rows, num_response, chance))
  lengths = out.response_mask.sum(axis=1)
  assert least < lengths.mean() < most
  assert counts['slot_steps'] - counts['idle'] == lengths.sum()
  occupancy = 1 - counts['queued_idle'] / counts['queued_slot_steps']
  assert occupancy >= 0.9
  # The drains: as slots are given up, steps cost less.
  assert counts['slot_steps'] < num_slots * counts['steps']
  # Each batch of prompts that was read was needed.
  assert counts['reads'] == num_rows / (num_slots // 4)


@pytest.mark.parametrize('chance', [1e-4, 0.02])
def test_a_cache_that_grows_gives_the_same(chance):
  """Without refill: 512 columns in four steps, all of them used, or few."""
  out, counts = fake_rollout(32, 0, 512, chance)
  assert_same_rollout(out, fake_looped(32, 512, chance))
  sizes = rollout.make_sizes(32, 5, 512, 0, 1, 1)
  assert sizes.widths == (144, 272, 400, 528)
  assert counts['steps'] == out.response_mask.sum(axis=1).max()
  assert (counts['slot_steps'] == 32 * 512) == (chance == 1e-4)


def test_slots_are_rounded_up_and_prompts_that_do_not_divide_are_named():
  assert rollout.make_sizes(16, 5, 8, 6, 1, 4).slots == 2
  assert rollout.make_sizes(16, 5, 8, 50, 1, 4).slots == 4
  with pytest.raises(ValueError, match='10 prompts do not divide over 4'):
    rollout.make_sizes(10, 5, 8, 8, 1, 4)


# --- Queues of any length -----------------------------------------------------


@pytest.mark.parametrize('mesh_shape', [None, (4, 2, 1)])
def test_queues_restore_the_order(mesh_shape):
  """11 prompts in queues of 16 or 4; the engine is replaced by its contract."""
  rows = PromptBatch(
    tokens=np.arange(33, dtype=np.int32).reshape(11, 3),
    mask=np.ones((11, 3), bool),
    indices=np.arange(11),
  )
  seen, told = [], []

  def fake(batch):
    seen.append(batch)
    twice = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), batch)
    return Rollout(
      tokens=2 * twice.tokens,
      mask=twice.mask,
      response_mask=twice.mask,
      logprobs=np.zeros(twice.mask.shape, np.float32),
      ended=twice.mask[:, 0],
    )

  def run(num_slots):
    seen.clear()
    told.clear()
    out = rollout.in_queues(fake, rows, num_slots, 2, told.append)
    np.testing.assert_array_equal(
      out.tokens, np.repeat(2 * rows.tokens, 2, axis=0)
    )
    assert out.mask.all()

  if mesh_shape is None:
    run(16)
    assert [b.tokens.shape for b in seen] == [(16, 3)] and told == [22]
    # What fills a queue up has no tokens.
    assert not seen[0].mask[11:].any()
    run(1)
    assert [b.tokens.shape[0] for b in seen] == [8, 8] and told == [16, 6]
  else:
    with sharding.use_mesh(sharding.make_mesh(mesh_shape)):
      run(16)
    # Two prompts for each of eight shards; three shards have one only.
    parts = seen[0].mask.any(axis=1).reshape(8, 2).sum(axis=1)
    assert parts.tolist() == [2, 2, 2, 1, 1, 1, 1, 1]


def test_prompts_without_tokens_get_no_response(sampled):
  """As many as fill up a queue, wherever they stand."""
  params, prompts = tiny.params('policy'), tiny.prompts()
  absent = np.isin(np.arange(B), (2, 3, B - 1))
  prompts = prompts.replace(
    tokens=np.where(absent[:, None], 0, prompts.tokens),
    mask=prompts.mask & ~absent[:, None],
  )
  out = tiny.generate(params, jax.tree.map(jnp.asarray, prompts), KEY)
  assert not out.mask[absent].any() and not out.ended[absent].any()
  np.testing.assert_array_equal(out.tokens[~absent], sampled.tokens[~absent])
  rows = jax.tree.map(lambda x: x[:11], tiny.prompts())
  out = rollout.in_queues(
    lambda batch: tiny.generate(params, batch, KEY), rows, B
  )
  assert_same_rollout(out, jax.tree.map(lambda x: x[:11], sampled))


def test_queues_without_prompts():
  rows = jax.tree.map(lambda x: x[:0], tiny.prompts())
  with pytest.raises(ValueError, match='no prompts'):
    rollout.in_queues(lambda x: x, rows, 4)


# --- Any number of rows -------------------------------------------------------


def test_in_batches_fills_up_and_restores_the_order():
  rows = {'x': np.arange(7), 'y': np.arange(14).reshape(7, 2)}
  shapes, told = [], []

  def double(batch):
    shapes.append(batch['x'].shape)
    return {'x': jnp.asarray(2 * batch['x']), 'y': jnp.asarray(batch['y'])}

  out = slices.in_batches(double, rows, 3, told.append)
  np.testing.assert_array_equal(out['x'], 2 * rows['x'])
  np.testing.assert_array_equal(out['y'], rows['y'])
  assert (shapes, told) == ([(3,)] * 3, [3, 3, 1])
  # More slots than rows.
  out = slices.in_batches(double, rows, 16)
  np.testing.assert_array_equal(out['x'], 2 * rows['x'])
  assert shapes[-1] == (16,)


def test_batches_are_rounded_up_to_the_shards_of_the_mesh():
  rows = np.arange(21, dtype=np.int32)
  mesh = sharding.make_mesh((4, 2, 1))
  with sharding.use_mesh(mesh):
    double = jax.jit(lambda x: 2 * x)
    out = slices.in_batches(
      lambda batch: double(sharding.put_whole(batch, mesh)), rows, 5
    )
  np.testing.assert_array_equal(out, 2 * rows)


def test_in_batches_without_rows():
  with pytest.raises(ValueError, match='no rows'):
    slices.in_batches(lambda x: x, np.zeros((0, 3)), 4)


# --- Slices -------------------------------------------------------------------


def test_slices_keep_the_order_of_rows():
  rows = np.arange(12.0).reshape(6, 2)
  seen = []

  def double(x):
    seen.append(x.shape)
    return {'twice': 2 * x, 'first': x[:, 0]}

  result = slices.in_slices(double, jnp.asarray(rows), 3)
  np.testing.assert_array_equal(result['twice'], 2 * rows)
  np.testing.assert_array_equal(result['first'], rows[:, 0])
  # Only ever two rows at a time.
  assert set(seen) == {(2, 2)}
