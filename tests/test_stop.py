"""SIGTERM from the command line, and what it leaves: a run on real stages."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from instruct_jax.infra import metrics
from tests.tiny_run import NUM_STEPS

ROOT = pathlib.Path(__file__).parents[1]
MAIN = 'instruct_jax.main'


@pytest.fixture(scope='module')
def whole(start, tiny_run):
  """A run that nobody stopped."""
  ended = start(
    MAIN, f'--config={tiny_run}/config.py', f'--workdir={tiny_run}/whole'
  )
  assert ended.returncode == 0, ended.stderr
  return tiny_run / 'whole'


def stopped(start, tiny_run, workdir):
  """A run that gets SIGTERM once its first step has been printed."""
  timing = workdir / metrics.TIMING_FILE
  ended = start(
    MAIN,
    f'--config={tiny_run}/config.py',
    f'--workdir={workdir}',
    until=lambda: timing.exists() and time.sleep(0.1) is None,
  )
  assert ended.returncode == 75, ended.stderr
  return ended


def test_a_stop_saves_at_the_next_step_and_resumes(
  start, tiny_run, whole, tmp_path
):
  workdir = tmp_path / 'run'
  ended = stopped(start, tiny_run, workdir)
  assert 'stopped after step' in ended.stderr
  (step,) = map(int, (p.name for p in (workdir / 'checkpoints').iterdir()))
  # Long before its first line.
  assert 0 < step < NUM_STEPS
  assert (workdir / metrics.METRICS_FILE).read_text() == ''
  ended = start(MAIN, f'--config={tiny_run}/config.py', f'--workdir={workdir}')
  assert ended.returncode == 0, ended.stderr
  assert f'continues after step {step}' in ended.stdout
  for name in (metrics.METRICS_FILE, 'model/model.json'):
    assert (workdir / name).read_bytes() == (whole / name).read_bytes()


def test_inputs_replaced_in_between_are_refused(
  start, tiny_run, whole, tmp_path
):
  workdir, documents = tmp_path / 'run', tiny_run / 'documents.jsonl'
  flags = (MAIN, f'--config={tiny_run}/config.py', f'--workdir={workdir}')
  stopped(start, tiny_run, workdir)
  before = documents.read_text()
  try:
    lines = before.splitlines()
    documents.write_text('\n'.join(lines[::-1]) + '\n')
    ended = start(*flags)
    assert ended.returncode == 1
    assert f'under way; documents: {documents} had SHA-256' in ended.stderr
    ended = start(*flags, '--config.learning_rate=0.5')
    assert 'learning_rate: was 0.001, is now 0.5' in ended.stderr
    ended = start(*flags, '--accept_new_inputs')
    assert ended.returncode == 0, ended.stderr
    rows = json.loads((workdir / 'accepted_inputs.json').read_text())
    assert [row['label'] for row in rows] == ['documents']
  finally:
    documents.write_text(before)
  name = metrics.METRICS_FILE
  assert (workdir / name).read_bytes() != (whole / name).read_bytes()


def test_memory_may_change_on_resume(start, tiny_run, whole, tmp_path):
  workdir = tmp_path / 'run'
  stopped(start, tiny_run, workdir)
  ended = start(
    MAIN,
    f'--config={tiny_run}/config.py',
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
