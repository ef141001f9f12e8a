"""SIGTERM from the command line, and what it leaves: a run on real stages."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from instruct_jax.infra import metrics

ROOT = pathlib.Path(__file__).parents[1]
MAIN = 'instruct_jax.main'
NUM_STEPS = 400

CONFIG = """
from configs import common, pipeline, pretrain

def get_config():
  config = pretrain.stage(0, '')
  config.tokenizer = FOLDER + '/data/tokenizer'
  config.documents = FOLDER + '/documents.jsonl'
  config.valid = FOLDER + '/data/documents_valid.jsonl'
  config.model = pipeline.tiny_model(32, 1, 64, 1)
  config.row_length, config.batch_size, config.num_steps = 32, 4, NUM_STEPS
  config.num_warmup, config.learning_rate = 2, 1e-3
  # A line, and a checkpoint, only at the end.
  config.log_every = config.checkpoint_every = config.eval_every = NUM_STEPS
  config = common.single(config, 'tiny')
  with config.unlocked():
    config.compilation_cache = CACHE
    config.xla_flags = '--xla_backend_optimization_level=0'
  return config
"""


@pytest.fixture(scope='module')
def folder(start, tmp_path_factory):
  """Data of the embedded world, and a config that pretrains on it."""
  folder = tmp_path_factory.mktemp('stop')
  ended = start(
    MAIN,
    '--config=configs/ppo_ptx.py:smoke',
    f'--workdir={folder}',
    "--config.stage_order=('data',)",
    '--config.stages.data.num_prompts=400',
    '--config.compilation_cache=',
  )
  assert ended.returncode == 0, ended.stderr
  shutil.copy(
    folder / 'data' / 'documents_train.jsonl', folder / 'documents.jsonl'
  )
  values = {'FOLDER': folder, 'NUM_STEPS': NUM_STEPS, 'CACHE': folder / 'cache'}
  source = CONFIG
  for name, value in values.items():
    source = source.replace(
      name, repr(value if name == 'NUM_STEPS' else str(value))
    )
  (folder / 'config.py').write_text(source)
  return folder


@pytest.fixture(scope='module')
def whole(start, folder):
  """A run that nobody stopped."""
  ended = start(
    MAIN, f'--config={folder}/config.py', f'--workdir={folder}/whole'
  )
  assert ended.returncode == 0, ended.stderr
  return folder / 'whole'


def stopped(start, folder, workdir):
  """A run that gets SIGTERM once its first step has been printed."""
  timing = workdir / metrics.TIMING_FILE
  ended = start(
    MAIN,
    f'--config={folder}/config.py',
    f'--workdir={workdir}',
    until=lambda: timing.exists() and time.sleep(1.5) is None,
  )
  assert ended.returncode == 75, ended.stderr
  return ended


def test_a_stop_saves_at_the_next_step_and_resumes(
  start, folder, whole, tmp_path
):
  workdir = tmp_path / 'run'
  ended = stopped(start, folder, workdir)
  assert 'stopped after step' in ended.stderr
  (step,) = map(int, (p.name for p in (workdir / 'checkpoints').iterdir()))
  # Long before its first line.
  assert 0 < step < NUM_STEPS
  assert (workdir / metrics.METRICS_FILE).read_text() == ''
  ended = start(MAIN, f'--config={folder}/config.py', f'--workdir={workdir}')
  assert ended.returncode == 0, ended.stderr
  assert f'continues after step {step}' in ended.stdout
  for name in (metrics.METRICS_FILE, 'model/model.json'):
    assert (workdir / name).read_bytes() == (whole / name).read_bytes()


def test_inputs_replaced_in_between_are_refused(start, folder, whole, tmp_path):
  workdir, documents = tmp_path / 'run', folder / 'documents.jsonl'
  flags = (MAIN, f'--config={folder}/config.py', f'--workdir={workdir}')
  stopped(start, folder, workdir)
  before = documents.read_text()
  try:
    lines = before.splitlines()
    documents.write_text('\n'.join(lines[::-1]) + '\n')
    ended = start(*flags)
    assert ended.returncode == 1
    assert f'under way; documents: {documents} had SHA-256' in ended.stderr
    ended = start(*flags, '--config.learning_rate=0.5')
    assert 'learning_rate: 0.001 there, 0.5 now' in ended.stderr
    ended = start(*flags, '--accept_new_inputs')
    assert ended.returncode == 0, ended.stderr
    rows = json.loads((workdir / 'accepted_inputs.json').read_text())
    assert [row['label'] for row in rows] == ['documents']
  finally:
    documents.write_text(before)
  name = metrics.METRICS_FILE
  assert (workdir / name).read_bytes() != (whole / name).read_bytes()


def test_memory_may_change_on_resume(start, folder, whole, tmp_path):
  workdir = tmp_path / 'run'
  stopped(start, folder, workdir)
  ended = start(
    MAIN,
    f'--config={folder}/config.py',
    f'--workdir={workdir}',
    '--config.num_microbatches=2',
    '--config.model.remat=full',
    '--config.eval_batch_size=32',
  )
  assert ended.returncode == 0, ended.stderr
  found, expected = (
    metrics.read_lines(run / metrics.METRICS_FILE)[-1]
    for run in (workdir, whole)
  )
  # The same but for rounding, which a few hundred steps amplify.
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=2e-2, err_msg=name)


@pytest.mark.parametrize('seconds', [0.0, 0.3, 1.0])
def test_a_signal_while_it_imports_ends_with_75(tmp_path, seconds):
  """Not from the server of `start`, which has imported everything before."""
  workdir = tmp_path / 'run'
  process = subprocess.Popen(
    [
      *(sys.executable, '-X', 'importtime', '-m', MAIN),
      *('--config=configs/ppo_ptx.py:smoke', f'--workdir={workdir}'),
    ],
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    stderr=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  # Its first import of another library.
  for line in process.stderr:
    if 'absl' in line:
      break
  time.sleep(seconds)
  process.send_signal(signal.SIGTERM)
  _, error = process.communicate(timeout=120)
  assert process.returncode == 75, error[-2000:]
  assert 'Traceback' not in error
  assert 'the same command' in error.splitlines()[-1]
