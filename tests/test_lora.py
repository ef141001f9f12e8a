"""Adapters: their arithmetic, in the models, on meshes, in model folders."""

import dataclasses
import functools
import itertools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import sft
from instruct_jax import lora, model_fns, model_folder, rollout, supervised
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import checkpoint, optimizer, sharding, train_state
from instruct_jax.models.config import (
  LORA_TARGETS,
  Lora,
  TransformerConfig,
  lora_of,
)
from tests import tiny
from tests.tiny import B, P, R, T

pytestmark = pytest.mark.usefixtures('quick_compile')

CLOSE = {'rtol': 1e-5, 'atol': 1e-5}
# alpha / rank is no power of 2 and not 1.
ADAPTERS = Lora(rank=3, alpha=4.0, targets=())
CONFIG = dataclasses.replace(tiny.CONFIG, gated_mlp=True, num_kv_heads=2)


def whole_params(kind, adapters=ADAPTERS, config=CONFIG, seed=0):
  """Base and adapters, joined, all of them far from zero."""
  config = dataclasses.replace(config, lora=adapters)
  rng = np.random.default_rng(seed)

  def leaf(path, x):
    name = jax.tree_util.keystr(path)
    value = ('scale' in name) + rng.normal(0, 0.3, x.shape)
    return jnp.asarray(value, jnp.float32)

  abstract = model_fns.abstract_params(kind, config, tiny.one_device())
  return jax.tree_util.tree_map_with_path(leaf, abstract)


def make_model(kind, adapters=ADAPTERS, **changes):
  """Adapters on a base, as under training."""
  config = dataclasses.replace(CONFIG, lora=adapters)
  module = model_fns.make_module(kind, config)
  trained, base = lora.split(whole_params(kind, adapters))
  return model_fns.Model(kind, module, trained, {}, base=base, **changes)


def plain_module(kind):
  return model_fns.make_module(kind, CONFIG)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, tokens, segments):
  return module.apply({'params': params}, tokens, segments)


def tokens_of(rng):
  return jnp.asarray(rng.integers(2, 30, (B, T)), jnp.int32)


ONES = jnp.ones((B, T), jnp.int32)


# --- Arithmetic ---------------------------------------------------------------


def test_merge_by_hand():
  # One layer. W = [[1, 2], [3, 4]], A = (1, 2)', B = (10, 20), scale 1/2:
  # A B = [[10, 20], [20, 40]], so W + A B / 2 = [[6, 12], [13, 24]].
  params = {
    'up_kernel': jnp.array([[[1.0, 2], [3, 4]]]),
    'up_lora_a': jnp.array([[[1.0], [2]]]),
    'up_lora_b': jnp.array([[[10.0, 20]]]),
    'up_bias': jnp.array([[7.0, 8]]),
    'down_kernel': jnp.array([[[5.0], [6]]]),
  }
  merged = lora.merge({'layers': params}, 0.5)['layers']
  assert sorted(merged) == ['down_kernel', 'up_bias', 'up_kernel']
  np.testing.assert_array_equal(merged['up_kernel'], [[[6, 12], [13, 24]]])
  np.testing.assert_array_equal(merged['up_bias'], params['up_bias'])
  np.testing.assert_array_equal(merged['down_kernel'], params['down_kernel'])


def test_merge_against_a_loop(rng):
  """Matrices whose inputs or outputs are heads; two layers."""
  config = dataclasses.replace(CONFIG, lora=ADAPTERS)
  params = whole_params('policy')['trunk']['layers']
  merged = lora.merge(params, config.lora.scale)
  assert sorted(LORA_TARGETS) == sorted(
    name.removesuffix('_lora_a') for name in params if name.endswith('_lora_a')
  )
  for name in LORA_TARGETS:
    kernel, a, b = (
      np.asarray(params[f'{name}_{leaf}'], np.float64)
      for leaf in ('kernel', 'lora_a', 'lora_b')
    )
    num_in = a.ndim - 2
    for layer in range(2):
      for i in np.ndindex(kernel.shape[1 : 1 + num_in]):
        for o in np.ndindex(kernel.shape[1 + num_in :]):
          added = sum(a[(layer, *i, r)] * b[(layer, r, *o)] for r in range(3))
          np.testing.assert_allclose(
            merged[f'{name}_kernel'][(layer, *i, *o)],
            kernel[(layer, *i, *o)] + 4 / 3 * added,
            rtol=1e-5,
            atol=1e-6,
          )


def test_split_and_join_are_inverse():
  params = whole_params('scalar')
  trained, base = lora.split(params)
  assert sorted(trained) == ['head_bias', 'head_kernel', 'trunk']
  assert sorted(base) == ['trunk']
  assert sorted(trained['trunk']) == ['layers']
  assert all('_lora_' in name for name in trained['trunk']['layers'])
  assert not any('_lora_' in name for name in base['trunk']['layers'])
  joined = lora.join(trained, base)
  assert jax.tree.structure(joined) == jax.tree.structure(params)
  assert all(map(lambda a, b: a is b, *map(jax.tree.leaves, (joined, params))))
  assert lora.join(params, None) is params
  with pytest.raises(ValueError, match='head_bias is both trained and in'):
    lora.join(trained, {**base, 'head_bias': 0.0})
  assert lora.num_params(trained) + lora.num_params(base) == lora.num_params(
    params
  )


# --- In the models ------------------------------------------------------------


@pytest.mark.parametrize('kind', ['policy', 'scalar'])
def test_merged_computes_what_joined_computes(kind, rng):
  model, tokens = make_model(kind), tokens_of(rng)
  joined = lora.join(model.params, model.base)
  expected = apply(model.module, joined, tokens, ONES)
  head = {name: x for name, x in model.params.items() if name != 'trunk'}
  before = apply(plain_module(kind), {**model.base, **head}, tokens, ONES)
  assert np.abs(expected - before).max() > 0.1
  copied = dataclasses.replace(model, base=jax.tree.map(jnp.copy, model.base))
  merged = model_fns.merged(copied, tiny.one_device())
  assert (merged.config, merged.base) == (CONFIG, None)
  found = apply(merged.module, merged.params, tokens, ONES)
  np.testing.assert_allclose(found, expected, **CLOSE)


@functools.cache
def plain_model(kind):
  return model_fns.init(kind, CONFIG, tiny.one_device(), jax.random.key(1))


@functools.cache
def fresh_model(kind, seed=0):
  return model_fns.adapted(plain_model(kind), ADAPTERS, tiny.one_device(), seed)


@pytest.mark.parametrize('kind', ['policy', 'scalar'])
def test_fresh_adapters_change_nothing(kind, rng):
  plain, model = plain_model(kind), fresh_model(kind)
  assert model_fns.adapted(plain, None, tiny.one_device(), 0) is plain
  tokens = tokens_of(rng)
  np.testing.assert_array_equal(
    apply(plain.module, plain.params, tokens, ONES),
    apply(model.module, lora.join(model.params, model.base), tokens, ONES),
  )
  # Not copied, and the head is the trained one.
  pairs = zip(
    jax.tree.leaves(model.base['trunk']),
    jax.tree.leaves(plain.params['trunk']),
    strict=True,
  )
  assert all(a is b for a, b in pairs)
  if kind == 'scalar':
    assert model.params['head_kernel'] is plain.params['head_kernel']
  layers = model.params['trunk']['layers']
  for name, x in layers.items():
    assert np.any(x) == name.endswith('_lora_a')
  # Of 2 x 32 x 3 draws: A has variance 1 / (3 inputs).
  assert np.std(layers['down_lora_a']) == pytest.approx(96**-0.5, rel=0.2)


def test_every_model_and_seed_has_its_own_draw():
  draws = [
    fresh_model(*which).params['trunk']['layers']['query_lora_a']
    for which in (('policy', 0), ('policy', 1), ('scalar', 0))
  ]
  for one, other in itertools.combinations(draws, 2):
    assert np.abs(one - other).max() > 0.01


@functools.cache
def logits_with(adapters):
  """With factors that do not depend on alpha, and on targets by absence."""
  rng = np.random.default_rng(7)
  tokens = tokens_of(rng)
  config = dataclasses.replace(CONFIG, lora=adapters)
  params = whole_params('policy')
  layers = dict(params['trunk']['layers'])
  for name in LORA_TARGETS:
    for leaf, part in (('a', np.s_[..., :2]), ('b', np.s_[:, :2])):
      full = f'{name}_lora_{leaf}'
      if adapters.targets and name not in adapters.targets:
        del layers[full]
      elif adapters.rank == 2:
        layers[full] = layers[full][part]
  params = {'trunk': {**params['trunk'], 'layers': layers}}
  module = model_fns.make_module('policy', config)
  return np.asarray(apply(module, params, tokens, ONES))


@pytest.mark.parametrize(
  'changes',
  [
    {'rank': 2, 'alpha': 8 / 3},
    {'alpha': 5.0},
    *({'targets': (name,)} for name in LORA_TARGETS),
  ],
)
def test_every_switch_changes_the_output(changes):
  """Rank 2 with the same alpha / rank lacks the third column alone."""
  changed = logits_with(dataclasses.replace(ADAPTERS, **changes))
  assert np.abs(changed - logits_with(ADAPTERS)).max() > 1e-2
  if 'targets' in changes:
    without = apply(
      plain_module('policy'),
      lora.split(whole_params('policy'))[1],
      tokens_of(np.random.default_rng(7)),
      ONES,
    )
    assert np.abs(changed - without).max() > 1e-2


def test_all_targets_are_the_default():
  np.testing.assert_array_equal(
    logits_with(ADAPTERS),
    logits_with(dataclasses.replace(ADAPTERS, targets=LORA_TARGETS)),
  )


def test_cached_decoding_equals_the_full_forward(rng):
  """Prompts are read with adapters, and steps with merged weights."""
  model, tokens = make_model('policy'), tokens_of(rng)
  params = lora.join(model.params, model.base)
  lengths = np.asarray(rng.integers(1, P + 1, B), np.int32)

  @jax.jit
  def decoded(tokens, lengths):
    decoder = model_fns.decoder(model.module)
    weights = decoder.prepare(params)
    cache = rollout.put_first(
      decoder.make_cache(B, T),
      decoder.read(weights, tokens[:, :P], lengths),
    )
    found = []
    for place in (lengths - 1 + t for t in range(R)):
      logits, cache = decoder.step(
        weights, tokens[jnp.arange(B), place], place, cache
      )
      found.append(logits)
    return jnp.stack(found)

  full = np.asarray(apply(model.module, params, tokens, ONES))
  for t, logits in enumerate(decoded(tokens, jnp.asarray(lengths))):
    wanted = full[np.arange(B), lengths - 1 + t]
    np.testing.assert_allclose(logits, wanted, **CLOSE)


def test_rows_may_hold_any_neighbours(rng):
  """A sequence alone in its row, and behind another one."""
  model = make_model('policy')
  params = lora.join(model.params, model.base)
  logprobs = jax.jit(model_fns.logprobs_fn(model.module))
  tokens = np.asarray(tokens_of(rng))
  segments = np.repeat(np.where(np.arange(T) < 7, 1, 2)[None], B, axis=0)
  packed, _ = logprobs(params, tokens, segments)
  alone = np.zeros_like(tokens)
  alone[:, : T - 7] = tokens[:, 7:]
  mask = np.repeat((np.arange(T) < T - 7)[None], B, axis=0).astype(np.int32)
  single, _ = logprobs(params, alone, mask)
  np.testing.assert_allclose(packed[:, 8:], single[:, 1 : T - 7], **CLOSE)


# --- Training -----------------------------------------------------------------


def mean_loss(module):
  loss_fn = supervised.make_text_loss(model_fns.logprobs_fn(module))

  def loss(params, frozen, batch):
    summed, (count, _) = loss_fn(params, frozen, batch, jax.random.key(0))
    return summed / count

  return loss


def test_gradients_are_those_of_the_product():
  """With G the gradient at the merged weights W + s A B: s A' G is that of B,
  and s G B' that of A."""
  model, scale = make_model('policy'), ADAPTERS.scale
  found = jax.jit(jax.grad(mean_loss(model.module)))(
    model.params, {'policy': model.base}, tiny.text()
  )
  assert jax.tree.structure(found) == jax.tree.structure(model.params)
  merged = lora.merge(lora.join(model.params, model.base), scale)
  at_merged = jax.jit(jax.grad(mean_loss(plain_module('policy'))))(
    merged, {}, tiny.text()
  )
  for name in LORA_TARGETS:
    a, b, grad_a, grad_b = (
      np.asarray(tree['trunk']['layers'][f'{name}_lora_{leaf}'], np.float64)
      for tree in (model.params, found)
      for leaf in 'ab'
    )
    inputs, outputs = math.prod(a.shape[1:-1]), math.prod(b.shape[2:])
    a, b = a.reshape(2, inputs, 3), b.reshape(2, 3, outputs)
    grad = np.asarray(at_merged['trunk']['layers'][f'{name}_kernel'], 'f8')
    grad = grad.reshape(2, inputs, outputs)
    assert np.abs(grad).max() > 1e-3
    for got, wanted in (
      (grad_a, scale * np.einsum('lio,lro->lir', grad, b)),
      (grad_b, scale * np.einsum('lir,lio->lro', a, grad)),
    ):
      np.testing.assert_allclose(
        got.reshape(wanted.shape), wanted, rtol=1e-3, atol=1e-5
      )


def test_only_adapters_learn():
  """At B = 0 no gradient reaches A; after a step it does. Moments and step
  have the adapters' size, and the base is as it was."""
  model = fresh_model('policy')
  before = jax.device_get(model.base)
  adam = optimizer.make_adam(lambda step: 1e-2)
  loss_fn = supervised.make_text_loss(model_fns.logprobs_fn(model.module))
  update = jax.jit(supervised.make_update(loss_fn, adam))
  states = [train_state.create(model.params, adam)]
  losses = []
  for step in range(8):
    state, metrics = update(
      states[-1], {'policy': model.base}, tiny.text(), jax.random.key(step)
    )
    states.append(state)
    losses.append(float(metrics['loss'][0]))
  tiny.assert_trees_equal(model.base, before)
  assert losses[-1] < losses[0] - 0.01
  first, second = (
    jax.tree.map(
      lambda a, b: np.abs(a - b).max(), states[i].params, states[i + 1].params
    )['trunk']['layers']
    for i in (0, 1)
  )
  for name, moved in first.items():
    assert (moved > 0) == name.endswith('_lora_b'), name
  assert min(second.values()) > 0
  # Both of Adam's moments, and two counts.
  num = lora.num_params(model.params)
  assert lora.num_params(states[0].opt_state) == 2 * num + 2
  # (inputs + outputs) x 3: query, out 32; key, value 24; gate, up, down 48.
  assert num == 2 * 3 * (2 * 32 + 2 * 24 + 3 * 48)


@functools.cache
def sharded_gradients(shape):
  mesh = sharding.make_mesh(shape, jax.devices()[: math.prod(shape)])
  whole = whole_params('policy')
  config = dataclasses.replace(CONFIG, lora=ADAPTERS)
  abstract = model_fns.abstract_params('policy', config, mesh)
  placed = jax.device_put(whole, sharding.shardings_of(abstract))
  trained, base = lora.split(placed)
  module = model_fns.make_module('policy', config)
  with sharding.use_mesh(mesh):
    out = jax.jit(jax.value_and_grad(mean_loss(module)))(
      trained, {'policy': base}, sharding.put_batch(tiny.text(), mesh)
    )
    rollout = jax.jit(
      lambda params: model_fns.decoder(module).prepare(params).layers
    )(lora.join(trained, base))
  return trained, jax.device_get(out), jax.device_get(rollout)


@pytest.mark.parametrize('shape', [(8, 1, 1), (2, 2, 2)])
def test_every_mesh_gives_the_numbers_of_one_device(shape):
  _, *expected = sharded_gradients((1, 1, 1))
  trained, *found = sharded_gradients(shape)
  tiny.assert_trees_close(found, expected, **CLOSE)
  layers = trained['trunk']['layers']
  for name, spec in (
    ('query_lora_a', (None, 'fsdp', None)),
    ('query_lora_b', (None, None, 'tensor', None)),
    ('out_lora_a', (None, 'tensor', None, None)),
    ('out_lora_b', (None, None, 'fsdp')),
    ('down_lora_a', (None, 'tensor', None)),
  ):
    assert layers[name].sharding.spec == PartitionSpec(*spec)


def test_fresh_adapters_lie_on_the_mesh_of_their_base():
  mesh = sharding.make_mesh((2, 2, 2))
  plain = model_fns.init('policy', CONFIG, mesh, jax.random.key(1))
  model = model_fns.adapted(plain, ADAPTERS, mesh, 0)
  layers = model.params['trunk']['layers']
  assert layers['up_lora_b'].sharding.spec == PartitionSpec(
    None, None, 'tensor'
  )
  merged = model_fns.merged(
    dataclasses.replace(model, base=jax.tree.map(jnp.copy, model.base)), mesh
  )
  assert jax.tree.map(lambda x: x.sharding, merged.params) == jax.tree.map(
    lambda x: x.sharding, plain.params
  )


# --- Model folders ------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
  """A run: 'base', and a policy and a scalar model with adapters on it."""
  tokenizer = tokenizer_lib.train_word_level([f'w{i}' for i in range(27)])
  assert tokenizer.vocab_size == CONFIG.vocab_size
  run = tmp_path / 'run'
  (run / 'config.json').parent.mkdir()
  for kind in ('policy', 'scalar'):
    model = make_model(kind, source=str(run / 'base'))
    if kind == 'policy':
      base = model_fns.Model(kind, plain_module(kind), model.base, {})
      model_folder.save(run / 'base', base, tokenizer, {})
    else:
      # A scalar model starts from a policy's trunk.
      trunk = lora.split(whole_params('policy'))[1]['trunk']
      model = dataclasses.replace(model, base={'trunk': trunk})
    model_folder.save(run / kind, model, tokenizer, {'seed': 3})
  return run, tokenizer


@pytest.mark.parametrize('kind', ['policy', 'scalar'])
def test_a_folder_holds_adapters_alone(kind, folders, rng):
  run, tokenizer = folders
  described = json.loads((run / kind / 'model.json').read_text())
  names = [name.rpartition('/')[2] for name in described['arrays']]
  heads = {'head_kernel', 'head_bias'} if kind == 'scalar' else set()
  assert {n for n in names if '_lora_' not in n} == heads
  model = make_model(kind)
  mesh = sharding.make_mesh((2, 2, 2))
  read = model_folder.read(run / kind, kind, mesh, tokenizer)
  tiny.assert_trees_equal(read.params, model.params)
  assert (read.config.lora, read.source) == (ADAPTERS, str(run / 'base'))

  loaded = model_folder.load(run / kind, kind, mesh, tokenizer)
  assert (loaded.config, loaded.source) == (CONFIG, str(run / kind))
  assert loaded.metadata == {'seed': 3}
  trunk = lora.split(whole_params('policy'))[1]['trunk']
  expected = lora.merge(
    lora.join(model.params, {'trunk': trunk}), ADAPTERS.scale
  )
  tiny.assert_trees_close(loaded.params, expected, rtol=1e-6, atol=1e-6)
  assert model_folder.shape_of(run / kind) == CONFIG


def test_adapters_upon_adapters(folders):
  """The base of the second ones is the sum of the first."""
  run, tokenizer = folders
  mesh = tiny.one_device()
  first = model_folder.load(run / 'policy', 'policy', mesh, tokenizer)
  expected = jax.device_get(first.params)
  second = model_fns.adapted(first, Lora(2, 2.0, ('up',)), mesh, 0)
  model_folder.save(run / 'second', second, tokenizer, {})
  loaded = model_folder.load(run / 'second', 'policy', mesh, tokenizer)
  tiny.assert_trees_equal(loaded.params, expected)


def test_a_base_that_is_gone_or_changed_is_named(folders, tmp_path):
  run, tokenizer = folders
  (run / 'base').rename(run / 'elsewhere')
  with pytest.raises(
    checkpoint.CheckpointError, match='holds adapters of .*base, which is mis'
  ):
    model_folder.check(run / 'policy', 'policy', tokenizer)
  other = model_fns.init('policy', CONFIG, tiny.one_device(), jax.random.key(5))
  model_folder.save(run / 'base', other, tokenizer, {})
  with pytest.raises(
    checkpoint.CheckpointError, match='which has changed since'
  ):
    model_folder.check(run / 'policy', 'policy', tokenizer)
  # No row is sampled before it is found.
  with pytest.raises(checkpoint.CheckpointError, match='put the former one ba'):
    model_folder.check_contexts({'policy': run / 'policy'}, 1, 'row_length')
  shutil.rmtree(run / 'base')
  (run / 'elsewhere').rename(run / 'base')
  model_folder.check(run / 'policy', 'policy', tokenizer)


# --- Config -------------------------------------------------------------------


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('rank', -1, 'lora.rank must be a positive integer, or 0 .*: -1'),
    ('alpha', 0.0, 'lora.alpha must be positive: 0.0'),
    ('targets', ('queries',), 'lora.targets takes query, .*, not queries'),
    ('targets', ('up', 'up'), 'lora.targets has duplicates'),
  ],
)
def test_bad_values_are_refused(key, value, message):
  config = sft.get_config('gpt2')
  assert lora_of(config) is None
  config.lora.rank = 4
  assert lora_of(config) == Lora(4, 16.0, ())
  config.lora[key] = value
  with pytest.raises(ValueError, match=message):
    lora_of(config)


def test_gate_target_without_a_gate():
  with pytest.raises(ValueError, match='names gate, but the MLP has no gate'):
    dataclasses.replace(tiny.CONFIG, lora=Lora(1, 1.0, ('gate',)))


def test_parameters_of_other_targets_are_refused(rng):
  config = dataclasses.replace(CONFIG, lora=Lora(3, 4.0, ('query',)))
  module = model_fns.make_module('policy', config)
  with pytest.raises(ValueError, match='_lora_a, but the config has no such'):
    apply(module, whole_params('policy'), tokens_of(rng), ONES)


def test_config_round_trip():
  config = dataclasses.replace(CONFIG, lora=ADAPTERS)
  assert TransformerConfig.from_dict(config.to_dict()) == config
