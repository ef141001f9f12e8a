"""Meshes, the table of axis names, and where arrays really end up."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from instruct_jax.infra import sharding, train_state


class Layer(nn.Module):
  """One layer of weights with a name for each axis."""

  width: int = 8
  mlp: int = 16

  @nn.compact
  def __call__(self, x, _):
    def init(names):
      return nn.with_logical_partitioning(nn.initializers.normal(0.02), names)

    up = self.param('up', init(('embed', 'mlp')), (self.width, self.mlp))
    bias = self.param('bias', init(('mlp',)), (self.mlp,))
    hidden = nn.with_logical_constraint(
      jnp.tanh(jnp.einsum('BTD,DF->BTF', x, up) + bias[None, None]),
      ('batch', 'length', 'mlp'),
    )
    hidden = sharding.constrain(hidden, 'batch', 'length', 'mlp')
    down = self.param('down', init(('mlp', 'embed')), (self.mlp, self.width))
    return x + jnp.einsum('BTF,FD->BTD', hidden, down), None


class Model(nn.Module):
  """Two scanned layers."""

  width: int = 8
  mlp: int = 16

  @nn.compact
  def __call__(self, x):
    stack = nn.scan(
      Layer,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=2,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    return stack(self.width, self.mlp, name='layers')(x, None)[0]


def init_params(key, model=None):
  return (model or Model()).init(key, jnp.zeros((1, 3, 8)))['params']


@pytest.mark.parametrize(
  ('shape', 'expected'),
  [
    ((-1, 1, 1), (8, 1, 1)),
    ((2, -1, 2), (2, 2, 2)),
    ((1, 4, 2), (1, 4, 2)),
    ((8, 1, -1), (8, 1, 1)),
  ],
)
def test_make_mesh_fills_the_open_axis(shape, expected):
  mesh = sharding.make_mesh(shape)
  assert tuple(mesh.shape.values()) == expected
  assert mesh.axis_names == ('data', 'fsdp', 'tensor')
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
  ('shape', 'message'),
  [
    ((-1, 3, 1), 'multiply to 3, and there are 8 devices'),
    ((2, 2, 1), 'multiply to 4, and there are 8 devices'),
    ((16, 1, -1), 'multiply to 16, and there are 8 devices'),
    ((-1, -1, 1), 'at most one of them is -1'),
    ((0, 1, -1), 'sizes are positive'),
  ],
)
def test_make_mesh_names_the_numbers(shape, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(shape)


@pytest.mark.parametrize(
  ('rows', 'heads', 'expected'),
  [
    ((), (), (1, 8, 1)),
    ((64, 16), (4,), (1, 8, 1)),
    # Twelve rows divide by four, the other batch's 32 by more.
    ((12, 32), (4, 2), (1, 4, 2)),
    ((6,), (8, 4), (1, 2, 4)),
    ((3,), (16, 8), (1, 1, 8)),
    # Three heads cannot be halved: uneven rows are the lesser evil.
    ((12,), (3,), (1, 8, 1)),
    ((12,), (), (1, 8, 1)),
  ],
)
def test_a_mesh_that_is_not_given_is_chosen(rows, heads, expected):
  mesh = sharding.make_mesh((), rows=rows, heads=heads)
  assert tuple(mesh.shape.values()) == expected
  # A given one is taken as it is.
  given = sharding.make_mesh((2, -1, 1), rows=rows, heads=heads)
  assert tuple(given.shape.values()) == (2, 4, 1)


def test_what_grew_large_is_cut_though_the_table_leaves_it_whole():
  def boxed(size, names=('layers', 'norm')):
    shape = jax.ShapeDtypeStruct((3, size), jnp.float32)
    return {'scale': nn.Partitioned(shape, names)}

  def spec(tree, mesh_shape):
    mesh = sharding.make_mesh(mesh_shape)
    return sharding.param_shardings(tree, mesh)['scale'].spec

  # 3 x 87,384 floats are just above a megabyte.
  large, small = boxed(87_384), boxed(87_376)
  assert spec(large, (1, 8, 1)) == P(None, 'fsdp')
  assert spec(large, (2, 2, 2)) == P(None, ('fsdp', 'tensor'))
  assert spec(large, (1, 1, 8)) == P(None, 'tensor')
  assert spec(small, (1, 8, 1)) == P(None, None)
  # Replicas are whole; so is what nothing divides.
  assert spec(large, (8, 1, 1)) == P(None, None)
  assert spec(boxed(87_385), (1, 8, 1)) == P(None, None)
  # What the table cuts stays as the table says.
  matrix = boxed(87_384, ('layers', 'mlp'))
  assert spec(matrix, (2, 2, 2)) == P(None, 'tensor')


def test_rows_picked_inside_a_program_are_cut_again():
  mesh = sharding.make_mesh((2, 2, 2))

  def pick(batch):
    picked = jax.tree.map(lambda x: x[::-1].reshape(2, 8, -1), batch)
    return sharding.constrain_rows(picked, axis=1)

  batch = {'tokens': np.arange(48).reshape(16, 3), 'one': np.arange(16)}
  with sharding.use_mesh(mesh):
    picked = jax.jit(pick)(sharding.put_batch(batch, mesh))
  # Both microbatches of eight rows on all four shards of rows.
  assert picked['tokens'].addressable_shards[0].data.shape[:2] == (2, 2)
  np.testing.assert_array_equal(
    picked['tokens'], batch['tokens'][::-1].reshape(2, 8, 3)
  )
  assert sharding.constrain_rows(batch) is batch


def test_make_mesh_on_some_devices():
  mesh = sharding.make_mesh((-1, 1, 1), jax.devices()[:2])
  assert mesh.size == 2


def test_partition_spec():
  assert sharding.partition_spec(('batch', 'length', None)) == P(
    ('data', 'fsdp'), None, None
  )
  assert sharding.partition_spec(('layers', 'embed', 'heads', 'head_dim')) == P(
    None, 'fsdp', 'tensor', None
  )
  # An array of activations cannot cut its width where its rows are cut.
  with pytest.raises(ValueError, match="'batch' and 'embed'.*'fsdp'"):
    sharding.partition_spec(('batch', 'length', 'embed'))
  with pytest.raises(ValueError, match="unknown axis name 'width'"):
    sharding.partition_spec(('batch', 'width'))


def test_state_is_laid_out_by_the_table():
  mesh = sharding.make_mesh((2, 2, 2))
  optimizer = optax.adam(1e-3)
  abstract = train_state.abstract_state(init_params, optimizer, mesh)
  shardings = sharding.shardings_of(abstract)

  def init(key):
    return train_state.create(nn.unbox(init_params(key)), optimizer)

  with sharding.use_mesh(mesh):
    state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
  layers = state.params['layers']
  assert layers['up'].sharding.spec == P(None, 'fsdp', 'tensor')
  assert layers['bias'].sharding.spec == P(None, 'tensor')
  assert layers['down'].sharding.spec == P(None, 'tensor', 'fsdp')
  # [2, 8, 16] over fsdp 2 and tensor 2: a device holds [2, 4, 8].
  assert layers['up'].addressable_shards[0].data.shape == (2, 4, 8)
  # The moments lie where their parameters lie; counters are whole.
  moments = state.opt_state[0]
  assert moments.mu['layers']['up'].sharding.spec == P(None, 'fsdp', 'tensor')
  assert moments.nu['layers']['down'].sharding.spec == P(None, 'tensor', 'fsdp')
  assert moments.count.sharding.is_fully_replicated
  assert state.step.sharding.is_fully_replicated
  shapes = jax.tree.map(lambda a, b: a.shape == b.shape, abstract, state)
  assert all(jax.tree.leaves(shapes))

  # The same numbers as on one device, in parameters and in outputs. The draws
  # are the same bits; the function that makes them normal is compiled for other
  # shapes, and with other neighbours, and may round its last bits otherwise.
  alone = init(jax.random.key(0))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7),
    alone.params,
    state.params,
  )
  x = np.random.default_rng(0).normal(size=(8, 3, 8)).astype(np.float32)
  expected = Model().apply({'params': alone.params}, jnp.asarray(x))
  with sharding.use_mesh(mesh):
    y = jax.jit(Model().apply)(
      {'params': state.params}, sharding.put_batch(x, mesh)
    )
  np.testing.assert_allclose(y, expected, atol=1e-6)


def test_param_shardings_name_what_does_not_divide():
  def boxed(model):
    return jax.eval_shape(
      lambda: model.init(jax.random.key(0), jnp.zeros((1, 3, 8)))['params']
    )

  with pytest.raises(ValueError) as error:
    sharding.param_shardings(
      boxed(Model(mlp=10)), sharding.make_mesh((1, 2, 4))
    )
  for part in ('layers/', "'mlp' of size 10", '4 parts', "'tensor'"):
    assert part in str(error.value)
  # An axis of size 1 takes anything.
  sharding.param_shardings(boxed(Model(mlp=9)), sharding.make_mesh((4, 2, 1)))


def test_constrain_takes_effect_under_use_mesh():
  mesh = sharding.make_mesh((2, 2, 2))

  def double(x):
    return sharding.constrain(2 * x, 'batch', 'heads')

  x = jnp.arange(32.0).reshape(8, 4)
  assert sharding.constrain(x, 'batch', 'heads') is x
  with sharding.use_mesh(mesh):
    y = jax.jit(double)(x)
    # Seven rows do not divide by four, so only the heads are cut.
    z = jax.jit(double)(x[:7])
  assert y.sharding.spec == P(('data', 'fsdp'), 'tensor')
  assert z.addressable_shards[0].data.shape[1] == 2
  np.testing.assert_array_equal(y, 2 * x)
  np.testing.assert_array_equal(z, 2 * x[:7])
  with pytest.raises(ValueError, match='has axis names'):
    sharding.constrain(x, 'batch')


def test_linen_constraint_takes_effect_under_use_mesh():
  mesh = sharding.make_mesh((2, 2, 2))

  def double(x):
    return nn.with_logical_constraint(2 * x, ('batch', 'heads'))

  with sharding.use_mesh(mesh):
    y = jax.jit(double)(jnp.ones((8, 4)))
  assert y.sharding.spec == P(('data', 'fsdp'), 'tensor')


def test_put_batch():
  mesh = sharding.make_mesh((2, 2, 2))
  batch = {'tokens': np.arange(24).reshape(8, 3), 'weight': np.float32(2.0)}
  placed = sharding.put_batch(batch, mesh)
  assert placed['tokens'].sharding == sharding.batch_sharding(mesh)
  # 8 rows over data 2 x fsdp 2.
  assert placed['tokens'].addressable_shards[0].data.shape == (2, 3)
  np.testing.assert_array_equal(placed['tokens'], batch['tokens'])
  assert placed['weight'].sharding.is_fully_replicated
  with pytest.raises(ValueError, match='tokens.*6 rows.*4 devices'):
    sharding.put_batch({'tokens': np.zeros((6, 3))}, mesh)


def test_what_waits_on_the_host_comes_back_as_it_was():
  mesh = sharding.make_mesh((2, 2, 2))
  place = NamedSharding(mesh, P('fsdp', 'tensor'))
  x = jax.device_put(np.arange(32.0, dtype=np.float32).reshape(8, 4), place)
  waiting = sharding.to_host({'x': x})['x']
  assert waiting.sharding == place.with_memory_kind('pinned_host')
  back = sharding.to_device({'x': waiting})['x']
  assert back.sharding.is_equivalent_to(place, 2)
  assert back.sharding.memory_kind == x.sharding.memory_kind == 'device'
  np.testing.assert_array_equal(back, x)
