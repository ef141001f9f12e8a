"""Work directories, data and models in an object store: a bucket on this
machine, through the libraries that reach a real one."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from instruct_jax import export, files, model_fns, model_folder
from instruct_jax.data import records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import endpoint
from instruct_jax.infra import checkpoint, metrics, run, sharding
from tests import fake_server, published
from tests.fake_bucket import FakeBucket
from tests.test_loop import KilledError, lines_of, run_loop
from tests.test_published_stages import GPT2

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec('gcsfs') is None,
  reason='requirements-gcs.txt is not installed',
)
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def store():
  """A bucket, for this process too."""
  with FakeBucket() as bucket, pytest.MonkeyPatch.context() as patch:
    for name, value in bucket.environment.items():
      patch.setenv(name, value)
    yield bucket


@pytest.fixture
def bucket(store):
  """The bucket, empty and without faults."""
  store.clear()
  yield store
  assert not store.unknown


@pytest.fixture
def here(bucket):
  """A folder in it."""
  return epath.Path('gs://bucket/folder')


# --- Files --------------------------------------------------------------------


def test_paths_stay_in_the_store(bucket, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  path = files.absolute('gs://bucket/run')
  assert str(path) == 'gs://bucket/run' and files.is_remote(path)
  run.write_json(path / 'x.json', {'a': 1})
  assert bucket.names() == ['run/x.json']
  assert run.read_json(path / 'x.json') == {'a': 1}
  assert not list(tmp_path.iterdir())


def test_what_another_process_writes_is_seen(bucket, here):
  (here / 'a').write_text('1')
  assert [path.name for path in here.iterdir()] == ['a']
  bucket.put('folder/b', b'2')
  assert sorted(path.name for path in here.iterdir()) == ['a', 'b']
  assert (here / 'b').exists() and (here / 'b').read_text() == '2'


@pytest.mark.parametrize('name', ['x.jsonl', 'x.jsonl.gz'])
def test_records(bucket, here, name):
  found = [records.Document(text=f'{i} ' * 5_000) for i in range(400)]
  records.write_jsonl(here / name, found)
  assert bucket.names() == [f'folder/{name}']
  assert records.read_jsonl(here / name, records.Document) == found
  bucket.put('folder/bad.jsonl', b'{"text": "a"}\nnonsense\n')
  with pytest.raises(records.RecordError, match=r'gs://.*/bad.jsonl:2: not J'):
    records.read_jsonl(here / 'bad.jsonl', records.Document)
  with pytest.raises(records.RecordError, match='gs://.*none: no such file'):
    records.read_jsonl(here / 'none', records.Document)


def test_what_is_appended_is_kept_and_seldom_written(bucket, here):
  """Appending there means writing the object again."""
  path = here / 'journal.jsonl'
  for part in range(2):
    with files.Appended(path) as file:
      for line in range(1_000):
        file.write(f'{part} {line}\n')
  lines = [f'{part} {line}' for part in range(2) for line in range(1_000)]
  assert path.read_text().splitlines() == lines
  assert len(bucket.writes) <= 4


def test_answers_of_a_service_are_all_kept(bucket, here):
  path = here / 'answers.jsonl'
  with fake_server.serve(lambda body, number: {'text': body}) as (url, asked):
    for bodies in (['a', 'b'], ['b', 'c', 'd']):
      service = endpoint.Endpoint(
        endpoint.Settings(url=url, key_variable=''), path
      )
      assert service.ask(bodies, lambda reply: reply['text']) == bodies
  assert len(asked) == 4 == len(path.read_text().splitlines())


def test_passing_refusals_are_waited_out(bucket, here):
  bucket.refuse = 0.3
  for number in range(6):
    run.write_json(here / f'{number}.json', number)
    assert run.read_json(here / f'{number}.json') == number
  assert bucket.refused


# --- Checkpoints and models ---------------------------------------------------


def state_of(step):
  return {'w': jnp.full((64, 64), float(step)), 'key': jax.random.key(step)}


def test_checkpoints(bucket, here):
  checkpointer = checkpoint.Checkpointer(here, keep=2)
  for step in (3, 7, 12):
    checkpointer.save(step, state_of(step), {'position': step})
  checkpointer.close()
  assert {name.split('/')[1] for name in bucket.names()} == {'7', '12'}
  # Killed while the next one was written: its last file is missing.
  for name in bucket.names('folder/12/'):
    if not name.endswith('12/commit_success.txt'):
      bucket.put(name.replace('/12/', '/13/', 1), bucket.objects[name])
  checkpointer = checkpoint.Checkpointer(here, keep=2)
  assert not bucket.names('folder/13/')
  step, state, extra = checkpointer.restore_latest(state_of(0))
  assert (step, extra) == (12, {'position': 12})
  np.testing.assert_array_equal(state['w'], 12.0)
  # Damaged: the one before, and the step can be saved again.
  for name in bucket.names('folder/12/arrays/'):
    bucket.put(name, bucket.objects[name][:9])
  with pytest.warns(UserWarning, match='gs://bucket/folder/12.*is damaged'):
    assert checkpointer.restore_latest(state_of(0))[0] == 7
  checkpointer.save(12, state_of(12), {})
  checkpointer.close()
  assert checkpoint.Checkpointer(here).restore_latest(state_of(0))[0] == 12


def test_a_model_counts_once_its_description_is_there(bucket, here):
  for kind in ('old', 'new'):
    checkpoint.save_model(here / 'm', {'w': jnp.ones((9, 9))}, {'kind': kind})
  assert checkpoint.load_metadata(here / 'm') == {'kind': 'new'}
  written = [name for _, name in bucket.writes]
  assert written[-1] == 'folder/m/model.json'
  # Cut before the end: what was there is none, whatever files it has.
  bucket.remove('folder/m/model.json')
  with pytest.raises(
    checkpoint.CheckpointError, match='gs://.*the folder exists without it'
  ):
    checkpoint.load_model(here / 'm')
  checkpoint.save_model(here / 'm', {'w': jnp.zeros((9, 9))}, {'kind': 'last'})
  assert (checkpoint.load_model(here / 'm')[0]['w'] == 0).all()


def test_a_killed_loop_goes_on(bucket, here, tmp_path):
  whole = run_loop(tmp_path)
  for kill_at in (5, 9):
    with pytest.raises(KilledError):
      run_loop(here, kill_at=kill_at)
    # Lines of the last seconds may be missing, or all of them.
    bucket.remove(f'folder/{metrics.METRICS_FILE}')
  state = run_loop(here)
  assert lines_of(here) == lines_of(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, state, whole)


def test_a_trace(bucket, here):
  run_loop(here, profile_steps='3-4')
  assert any(
    name.endswith('perfetto_trace.json.gz')
    for name in bucket.names('folder/profile/')
  )


def test_published_models_and_tokenizers(
  bucket, here, tmp_path, monkeypatch, quick_compile
):
  monkeypatch.setattr(files, 'COPIES', str(tmp_path / 'copies'))
  published.save_byte_tokenizer(tmp_path / 'tokenizer')
  for path in (tmp_path / 'tokenizer').iterdir():
    (here / 'tokenizer' / path.name).write_bytes(path.read_bytes())
  tokenizer = tokenizer_lib.Tokenizer.load(str(here / 'tokenizer'))
  local = tokenizer_lib.Tokenizer.load(tmp_path / 'tokenizer')
  assert tokenizer.fingerprint == local.fingerprint

  # A model of ours goes out to the store, and comes back as a published one.
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  config = dataclasses.replace(GPT2, vocab_size=tokenizer.vocab_size)
  model = model_fns.init('policy', config, mesh, jax.random.key(0))
  model_folder.save(here / 'ours', model, tokenizer, {})
  for place in (here, tmp_path):
    export.export(here / 'ours', here / 'tokenizer', place / 'out')
  wanted = model_folder.load(tmp_path / 'out', 'policy', mesh, tokenizer)
  for _ in range(2):
    loaded = model_folder.load(str(here / 'out'), 'policy', mesh, tokenizer)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, wanted.params)
  # Copied once, and again when it has changed.
  assert len(list((tmp_path / 'copies').iterdir())) == 1
  time.sleep(1.1)
  bucket.put('folder/out/README.txt', b'new')
  model_folder.load(str(here / 'out'), 'policy', mesh, tokenizer)
  assert len(list((tmp_path / 'copies').iterdir())) == 2
  with pytest.raises(checkpoint.CheckpointError, match='gs://bucket/none'):
    model_folder.load('gs://bucket/none', 'policy', mesh, tokenizer)


# --- Whole pipelines, from the command line -----------------------------------


def command(bucket, *arguments, **more):
  """A start of the program beside the bucket."""
  return subprocess.Popen(
    [sys.executable, '-m', 'instruct_jax.main', *arguments],
    cwd=ROOT,
    env={
      **os.environ,
      **(bucket.environment if bucket is not None else {}),
      'XLA_FLAGS': '',
      'JAX_PLATFORMS': 'cpu',
      **more,
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def end(process, codes=(0,)):
  output, _ = process.communicate(timeout=1800)
  assert process.returncode in codes, output[-4000:]
  return output


def content_of(read_fn, names):
  """What two runs must agree on: lines, alarms and models."""
  found = {}
  for name in names:
    if name.endswith(('metrics.jsonl', 'alarms.json', 'epochs.json')):
      found[name] = read_fn(name)
    elif name.endswith('/model.json'):
      arrays = json.loads(read_fn(name))['arrays']
      found[name] = {key: row['checksum'] for key, row in arrays.items()}
  return found


SMOKE = '--config=configs/ppo_ptx.py:smoke'
# The first object that begins so is being written when the kill comes.
KILLS = (
  'run/data/',
  'run/pretrain/checkpoints/20/',
  'run/sft/epochs/2/',
  'run/reward/checkpoints/5/',
  'run/ppo/checkpoints/1/',
  'run/ppo/checkpoints/2/arrays/',
  'run/ppo_ptx/policy/',
  'run/evaluate/samples.jsonl',
)


@pytest.mark.slow
def test_a_killed_pipeline_equals_one_on_a_disk(bucket, tmp_path):
  """In a store that refuses one request in fifty, for now."""
  cache = f'--config.compilation_cache={tmp_path / "cache"}'
  end(command(None, SMOKE, cache, f'--workdir={tmp_path / "run"}'))
  arguments = (SMOKE, cache, '--workdir=gs://bucket/run')
  bucket.refuse = 0.02
  for prefix in KILLS:
    process = command(bucket, *arguments)
    deadline = time.monotonic() + 900
    while not bucket.names(prefix):
      assert process.poll() is None, end(process)
      assert time.monotonic() < deadline, prefix
      time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    end(process, [-signal.SIGKILL])
  output = end(command(bucket, *arguments))
  assert 'continues after step' in output
  assert output.splitlines()[-1] == 'work directory: gs://bucket/run'
  found = content_of(
    lambda name: bucket.objects[name].decode(), bucket.names('run/')
  )
  on_disk = sorted(
    str(path.relative_to(tmp_path))
    for path in (tmp_path / 'run').rglob('*')
    if path.is_file()
  )
  expected = content_of(lambda name: (tmp_path / name).read_text(), on_disk)
  assert found == expected and len(found) > 20
  # All files but those that only a disk has.
  assert set(bucket.names('run/')) >= {
    name
    for name in on_disk
    if not any(
      part in name for part in ('/checkpoints/', '/params/', 'tensorboard')
    )
    and not pathlib.Path(name).name.startswith('.')
  }
  # Nothing went to a folder of this machine by mistake.
  assert not list(ROOT.glob('gs:*'))
  # Once more: everything is done.
  assert 'evaluate: already done' in end(command(bucket, *arguments))


@pytest.mark.slow
def test_two_processes_share_a_bucket(bucket, tmp_path):
  """Each sees at once what the other has written."""
  stages = "('data','pretrain','sft')"
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
  processes = [
    command(
      bucket,
      SMOKE,
      '--workdir=gs://bucket/run',
      f'--config.stage_order={stages}',
      f'--coordinator=localhost:{port}',
      '--num_processes=2',
      f'--process_id={index}',
      XLA_FLAGS='--xla_force_host_platform_device_count=2',
    )
    for index in range(2)
  ]
  for process in processes:
    end(process)
  assert bucket.names('run/sft/done.json')


@pytest.mark.slow
def test_another_fake_that_refuses_some_writes(tmp_path):
  """An emulator by others; where it fails, the same command continues."""
  server = pytest.importorskip('gcp_storage_emulator.server')
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
  emulator = server.create_server(
    'localhost', port, in_memory=True, default_bucket='bucket'
  )
  emulator.start()
  try:
    url = f'http://localhost:{port}'
    fake = types.SimpleNamespace(
      environment={
        'STORAGE_EMULATOR_HOST': url,
        'TENSORSTORE_GCS_HTTP_URL': url,
        'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
      }
    )
    cache = f'--config.compilation_cache={tmp_path / "cache"}'
    for _ in range(30):
      process = command(fake, SMOKE, cache, '--workdir=gs://bucket/run')
      output = end(process, [0, 1])
      if process.returncode == 0:
        break
      assert 'error: ' in output and 'Traceback' not in output, output[-4000:]
    assert process.returncode == 0, output[-4000:]
  finally:
    emulator.stop()
