"""Checkpoints: bit-exact, on any mesh, and never a damaged one in silence."""

import contextlib
import gc
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from instruct_jax.infra import checkpoint, sharding, train_state
from instruct_jax.infra.checkpoint import (
  Checkpointer,
  CheckpointError,
  load_metadata,
  load_model,
  save_model,
)

# Orbax abandons its other reads when one fails, and Python remarks on it.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


@pytest.fixture(autouse=True)
def collect_abandoned_reads():
  """Within the test that caused them, where they are expected."""
  yield
  gc.collect()


def make_state(seed=0):
  params = {
    'layers': {'w': jax.random.normal(jax.random.key(seed), (2, 8, 16))},
    'head': jnp.arange(5, dtype=jnp.bfloat16) + seed,
  }
  return {
    'train': train_state.create(params, optax.adam(1e-3)),
    'key': jax.random.key(seed + 1),
    'keys': jax.random.split(jax.random.key(seed + 2), 3),
    'done': jnp.array([True, False]),
  }


def abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def assert_same(a, b):
  def check(x, y):
    assert x.dtype == y.dtype
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_array_equal(x, y)

  jax.tree.map(check, a, b)


def save_steps(directory, steps, keep=2):
  checkpointer = Checkpointer(directory, keep)
  for step in steps:
    checkpointer.save(step, make_state(step), {'position': step, 'beta': 0.02})
  checkpointer.close()


def damage(file, how):
  content = bytearray(file.read_bytes())
  if how == 'truncate':
    file.write_bytes(content[: len(content) // 2])
  elif how == 'delete':
    file.unlink()
  else:
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def array_files(path):
  return sorted(f for f in (path / 'arrays').rglob('*') if f.is_file())


def test_round_trip_with_keys_and_extra(workdir):
  with_nothing = Checkpointer(workdir / 'empty')
  assert with_nothing.restore_latest(make_state()) is None
  with_nothing.close()

  save_steps(workdir, [3, 7, 12])
  # Two are kept.
  assert sorted(p.name for p in workdir.iterdir() if p.name.isdigit()) == [
    '12',
    '7',
  ]
  checkpointer = Checkpointer(workdir)
  step, state, extra = checkpointer.restore_latest(abstract(make_state()))
  assert step == 12
  assert extra == {'position': 12, 'beta': 0.02}
  assert_same(state, make_state(12))
  assert isinstance(state['train'], train_state.TrainState)
  # A restored key draws what the saved key would have drawn.
  np.testing.assert_array_equal(
    jax.random.uniform(state['key'], (4,)),
    jax.random.uniform(make_state(12)['key'], (4,)),
  )
  # Saving goes on from there, and a step that exists is left alone.
  checkpointer.save(12, make_state(0), {})
  checkpointer.save(13, make_state(13), {})
  checkpointer.wait()
  assert checkpointer.restore_latest(make_state())[0] == 13
  checkpointer.close()


def test_arrays_may_be_donated_after_save(workdir):
  state = {'w': jnp.zeros((512, 512))}
  step_fn = jax.jit(
    lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0
  )
  checkpointer = Checkpointer(workdir)
  for step in range(1, 5):
    state = step_fn(state)
    checkpointer.save(step, state, {})
    for _ in range(3):
      state = step_fn(state)
  checkpointer.close()
  checkpointer = Checkpointer(workdir)
  step, restored, _ = checkpointer.restore_latest(state)
  # Three steps ran after each of the first three saves, then one more.
  assert step == 4
  assert (np.asarray(restored['w']) == 13).all()
  checkpointer.close()


def test_restores_onto_another_mesh(workdir):
  def layout(mesh):
    return {
      'w': jax.device_put(
        jnp.arange(64.0).reshape(8, 8), NamedSharding(mesh, P('fsdp', 'tensor'))
      ),
      'key': jax.device_put(jax.random.key(3), sharding.replicated(mesh)),
    }

  saved = layout(sharding.make_mesh((1, 4, 2)))
  checkpointer = Checkpointer(workdir)
  checkpointer.save(1, saved, {})
  checkpointer.wait()
  for mesh in (
    sharding.make_mesh((2, 2, 2)),
    sharding.make_mesh((1, 1, 1), jax.devices()[3:4]),
  ):
    wanted = layout(mesh)
    _, state, _ = checkpointer.restore_latest(abstract(wanted))
    assert state['w'].sharding == wanted['w'].sharding
    assert state['key'].sharding.device_set == set(mesh.devices.flat)
    assert_same(state, wanted)
  checkpointer.close()


@pytest.mark.parametrize('how', ['truncate', 'delete', 'flip'])
def test_damaged_checkpoint_falls_back_to_the_one_before(workdir, how):
  """Damage to any file is harmless or found: never other numbers."""
  save_steps(workdir / 'whole', [5, 6])
  num_found = 0
  for number, file in enumerate(array_files(workdir / 'whole' / '6')):
    directory = workdir / str(number)
    shutil.copytree(workdir / 'whole', directory)
    damage(directory / file.relative_to(workdir / 'whole'), how)
    checkpointer = Checkpointer(directory)
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always')
      step, state, extra = checkpointer.restore_latest(make_state())
    assert extra['position'] == step
    assert_same(state, make_state(step))
    caught = [str(w.message) for w in caught if w.category is UserWarning]
    if step == 5:
      num_found += 1
      assert str(directory / '6') in caught[0]
      assert 'damaged' in caught[0]
      # The run comes past step 6 again and can save it.
      checkpointer.save(6, make_state(6), {'position': 6})
      checkpointer.wait()
      assert checkpointer.restore_latest(make_state())[0] == 6
    checkpointer.close()
  assert num_found


def test_damaged_record_is_found(workdir):
  save_steps(workdir, [5, 6])
  file = workdir / '6' / 'record' / 'metadata'
  text = file.read_text()
  assert '"position": 6' in text
  file.write_text(text.replace('"position": 6', '"position": 9'))
  checkpointer = Checkpointer(workdir)
  with pytest.warns(UserWarning, match='checksum of the description'):
    assert checkpointer.restore_latest(make_state())[0] == 5
  checkpointer.close()


def test_wrong_bits_are_found_without_the_help_of_the_format(workdir):
  """The array file of another step: valid to its last byte, but not ours."""
  save_steps(workdir, [1, 2])
  os.rename(workdir / '2' / 'arrays', workdir / 'moved')
  shutil.copytree(workdir / '1' / 'arrays', workdir / '2' / 'arrays')
  checkpointer = Checkpointer(workdir)
  with pytest.warns(UserWarning, match='does not match its checksum'):
    assert checkpointer.restore_latest(make_state())[0] == 1
  checkpointer.close()


def test_no_readable_checkpoint_is_an_error(workdir):
  save_steps(workdir, [5, 6])
  for step in ('5', '6'):
    for file in array_files(workdir / step):
      damage(file, 'truncate')
  checkpointer = Checkpointer(workdir)
  with (
    pytest.warns(UserWarning, match='damaged'),
    pytest.raises(CheckpointError) as error,
  ):
    checkpointer.restore_latest(make_state())
  assert str(workdir / '5') in str(error.value)
  assert str(workdir / '6') in str(error.value)
  checkpointer.close()


def test_other_shapes_are_an_error_not_damage(workdir):
  save_steps(workdir, [1])
  other = make_state() | {'done': jnp.zeros(3, bool), 'more': jnp.zeros(())}
  checkpointer = Checkpointer(workdir)
  with pytest.raises(CheckpointError) as error:
    checkpointer.restore_latest(other)
  assert "done: ([2], 'bool') in the file, ([3], 'bool') wanted" in str(
    error.value
  )
  assert 'more: not in the file' in str(error.value)
  checkpointer.close()


def test_a_write_that_fails_in_the_middle(workdir, rng):
  """No file may grow beyond 64 KiB: what a disk does when it is full."""
  state = {'w': jnp.asarray(rng.normal(size=(400, 400)), jnp.float32)}
  checkpointer = Checkpointer(workdir)
  checkpointer.save(1, state, {})
  checkpointer.wait()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
  try:
    with pytest.raises(
      CheckpointError, match=f'written to {workdir}; the last one is of step 1'
    ):
      checkpointer.save(2, state, {})
      checkpointer.wait()
    with contextlib.suppress(CheckpointError):
      checkpointer.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert len(list(workdir.iterdir())) == 2  # One of them half.
  checkpointer = Checkpointer(workdir)
  step, restored, _ = checkpointer.restore_latest(state)
  assert step == 1
  assert_same(restored, state)
  checkpointer.save(2, state, {})
  checkpointer.close()
  # What was half written is gone, too.
  assert sorted(path.name for path in workdir.iterdir()) == ['1', '2']


def test_host_values_are_refused(workdir):
  checkpointer = Checkpointer(workdir)
  with pytest.raises(TypeError, match='w is a ndarray'):
    checkpointer.save(1, {'w': np.zeros(3)}, {})
  with pytest.raises(TypeError, match='JSON'):
    checkpointer.save(1, {'w': jnp.zeros(3)}, {'set': {1}})
  checkpointer.close()


def checksum(x):
  return checkpoint._checksums({'x': x})['x']


def test_checksum_by_hand():
  # 1 * 5 + 3 * 7 + 5 * 2.
  assert checksum(np.array([5, 7, 2], np.uint32)) == 36
  # A sign bit is 2^31; times the odd weight 3 it is 2^31 again, modulo 2^32.
  assert checksum(np.array([0.0, -0.0], np.float32)) == 2**31


@pytest.mark.parametrize(
  'dtype', [np.float32, ml_dtypes.bfloat16, np.int32, np.uint8, np.bool_]
)
def test_checksum_does_not_depend_on_the_layout(rng, dtype):
  x = (rng.normal(size=(4, 6, 8)) * 3).astype(dtype)
  mesh = sharding.make_mesh((2, 2, 2))
  host = checksum(x)
  # Some devices hold the same part here; it counts once.
  for spec in (P('data', None, 'tensor'), P(None, 'fsdp'), P(), P('data')):
    assert checksum(jax.device_put(x, NamedSharding(mesh, spec))) == host
  assert checksum(jnp.asarray(x)) == host
  # Two halves, as an accelerator would sum them.
  halves = [
    int(
      checkpoint._device_sum(jnp.asarray(x[:, i : i + 3]), (0, i, 0), x.shape)
    )
    for i in (0, 3)
  ]
  assert sum(halves) % 2**32 == host
  scalar = jnp.asarray(x[0, 0, 0])
  assert checksum(scalar) == int(checkpoint._device_sum(scalar, (), ()))


_KILLED = """
import sys
import jax.numpy as jnp
from instruct_jax.infra.checkpoint import Checkpointer, save_model
checkpointer = Checkpointer(sys.argv[1])
step = 0
while True:
  step += 1
  w = jnp.full((300, 300), float(step))
  checkpointer.save(step, {'w': w}, {'step': step})
  save_model(sys.argv[2], {'w': w}, {'step': step})
  print(step, flush=True)
"""


@pytest.mark.parametrize('num_saves', [2, 3])
def test_killed_while_writing(workdir, num_saves):
  process = subprocess.Popen(
    [sys.executable, '-c', _KILLED, workdir / 'steps', workdir / 'model'],
    stdout=subprocess.PIPE,
    cwd=pathlib.Path(__file__).parents[1],
  )
  for _ in range(num_saves):
    process.stdout.readline()
  time.sleep(0.05 * num_saves)
  process.send_signal(signal.SIGKILL)
  process.wait()
  target = {'w': jnp.zeros((300, 300))}
  checkpointer = Checkpointer(workdir / 'steps')
  step, state, extra = checkpointer.restore_latest(target)
  assert step >= num_saves - 1
  assert extra == {'step': step}
  assert (np.asarray(state['w']) == step).all()
  checkpointer.close()
  # Between two renames there can be no model; otherwise it is a whole one.
  if (workdir / 'model').exists():
    params, metadata = load_model(workdir / 'model')
    assert (params['w'] == metadata['step']).all()


def make_params():
  return {
    'embed': {'w': jnp.arange(12.0).reshape(3, 4)},
    'head': {'bias': jnp.array(0.5, jnp.bfloat16)},
  }


def test_model_folder_round_trip(workdir):
  metadata = {'kind': 'reward', 'reward_bias': -1.25, 'config': {'width': 4}}
  path = workdir / 'stage' / 'model'
  save_model(path, make_params(), {'kind': 'old'})
  save_model(path, make_params(), metadata)
  assert load_metadata(path) == metadata
  params, read = load_model(path)
  assert read == metadata
  assert isinstance(params['embed']['w'], np.ndarray)
  assert_same(params, make_params())

  mesh = sharding.make_mesh((1, 2, 4))
  wanted = {
    'embed': {
      'w': jax.ShapeDtypeStruct(
        (3, 4), jnp.float32, sharding=NamedSharding(mesh, P(None, 'tensor'))
      )
    },
    'head': {'bias': jax.ShapeDtypeStruct((), jnp.bfloat16)},
  }
  params, _ = load_model(path, wanted)
  assert params['embed']['w'].sharding.spec == P(None, 'tensor')
  assert_same(params, make_params())
  # Nothing but the model is left behind.
  assert [p.name for p in path.parent.iterdir()] == ['model']


def test_bad_model_folders_name_the_path(workdir):
  path = workdir / 'model'
  with pytest.raises(CheckpointError, match=f'no model in {path} .*no folder'):
    load_model(path)
  save_model(path, make_params(), {})
  with pytest.raises(CheckpointError, match=r'embed/w: \(\[3, 4\]'):
    load_model(path, make_params() | {'embed': {'w': jnp.zeros((3, 5))}})
  shutil.copytree(path / 'params', workdir / 'params')
  for file in path.glob('params/**/d/*'):
    damage(file, 'truncate')
  with pytest.raises(CheckpointError, match=f'{path} is damaged'):
    load_model(path)
  shutil.rmtree(path / 'params')
  with pytest.raises(CheckpointError, match=f'{path} is damaged'):
    load_model(path, make_params())
  (workdir / 'params').rename(path / 'params')
  load_model(path)
  record = json.loads((path / 'model.json').read_text())
  record['extra'] = {'reward_bias': 3}
  (path / 'model.json').write_text(json.dumps(record))
  with pytest.raises(CheckpointError, match='model.json is damaged'):
    load_metadata(path)
  (path / 'model.json').write_text('{"arrays":')
  with pytest.raises(CheckpointError, match='model.json is damaged'):
    load_model(path)
  (path / 'model.json').unlink()
  with pytest.raises(CheckpointError, match='the folder exists without it'):
    load_model(path)
