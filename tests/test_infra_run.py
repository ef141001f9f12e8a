"""Locks, configs, JSON files, progress and signals."""

import io
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from instruct_jax.infra import run
from instruct_jax.infra.run import (
  Progress,
  Stopped,
  StopSignal,
  WorkdirError,
  lock_workdir,
)

ROOT = pathlib.Path(__file__).parents[1]

_HOLD = """
import sys, time
from instruct_jax.infra.run import lock_workdir
with lock_workdir(sys.argv[1]):
  print('held', flush=True)
  time.sleep(60)
"""


def test_lock_names_its_holder_and_dies_with_it(workdir):
  process = subprocess.Popen(
    [sys.executable, '-c', _HOLD, workdir], stdout=subprocess.PIPE, cwd=ROOT
  )
  try:
    assert process.stdout.readline() == b'held\n'
    with pytest.raises(WorkdirError) as error, lock_workdir(workdir):
      pass
    assert f'pid {process.pid} on {socket.gethostname()} since 20' in str(
      error.value
    )
    assert str(workdir) in str(error.value)
  finally:
    process.kill()
    process.wait()
  with lock_workdir(workdir):
    text = (workdir / '.lock').read_text()
    assert text.startswith(f'pid {os.getpid()} ')
    # Even in one process: two runs are two runs.
    with pytest.raises(WorkdirError), lock_workdir(workdir):
      pass
  with lock_workdir(workdir):
    pass


def test_write_json_replaces_at_once(workdir):
  path = workdir / 'sub' / 'a.json'
  run.write_json(path, {'b': [1, 2], 'a': None})
  run.write_json(path, {'b': 3})
  assert run.read_json(path) == {'b': 3}
  with pytest.raises(TypeError):
    run.write_json(path, {'b': object()})
  assert run.read_json(path) == {'b': 3}
  assert [p.name for p in path.parent.iterdir()] == ['a.json']
  path.write_text('{"b":')
  with pytest.raises(ValueError, match='a.json is not JSON'):
    run.read_json(path)


def test_done(workdir):
  assert not run.is_done(workdir / 'sft')
  run.mark_done(workdir / 'sft', {'seconds': 2.5})
  assert run.is_done(workdir / 'sft')
  assert run.read_json(workdir / 'sft' / run.DONE_FILE) == {'seconds': 2.5}


def test_provenance():
  record = run.provenance(seed=7)
  assert record['seed'] == 7
  assert record['versions']['jax'] == jax.__version__
  assert record['devices'] == {'cpu': 8}
  assert record['num_processes'] == 1
  assert record['python'].startswith('3.')


def test_git_state(workdir):
  def git(*arguments):
    identity = ('-c', 'user.name=t', '-c', 'user.email=t@example.org')
    subprocess.run(
      ('git', *identity, '-C', workdir, *arguments),
      check=True,
      capture_output=True,
    )

  assert run._git_state(workdir) == (None, None)
  git('init')
  (workdir / 'file').write_text('1')
  (workdir / 'package').mkdir()
  git('add', '.')
  git('commit', '-m', 'one')
  commit, dirty = run._git_state(workdir)
  assert len(commit) == 40
  assert dirty is False
  (workdir / 'file').write_text('2')
  assert run._git_state(workdir) == (commit, True)
  # A fork's code, in no commit yet; a log is no code.
  (workdir / 'file').write_text('1')
  (workdir / 'log').write_text('1')
  assert run._git_state(workdir) == (commit, False)
  (workdir / 'package' / 'fork.py').write_text('1')
  assert run._git_state(workdir) == (commit, True)
  # A folder inside another repository is not that repository.
  assert run._git_state(workdir / 'package') == (None, None)


def test_stop_signal():
  before = signal.getsignal(signal.SIGTERM)
  with StopSignal() as stop:
    assert not stop.requested
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
  assert signal.getsignal(signal.SIGTERM) is before


def test_stopped_is_exit_code_75(capsys):
  with pytest.raises(SystemExit) as error:
    raise Stopped('sft: stopped at step 3')
  assert error.value.code == 75
  assert 'sft: stopped at step 3; the same command' in capsys.readouterr().err


class Clock:
  """A clock that the test turns."""

  now = 0.0

  def monotonic(self):
    return self.now


def test_progress_prints_plain_lines(monkeypatch, capsys):
  clock = Clock()
  monkeypatch.setattr(run, 'time', clock)
  with Progress('sft', total=100, initial=20) as progress:
    for _ in range(80):
      clock.now += 0.5
      progress.update(text='loss 2.1')
  lines = capsys.readouterr().err.splitlines()
  # 80 steps in 40 s: lines at 10, 20 and 30 s, and one at the end. At 10 s
  # 20 of the 80 are done at 2 a second; 60 are left, 30 s.
  assert lines[0] == 'sft: 40/100 (40 %), 2 steps/s, 0:30 left, loss 2.1'
  assert lines[-1] == 'sft: 100/100 (100 %), 2 steps/s, took 0:40, loss 2.1'
  assert len(lines) == 4


def test_progress_leaves_what_was_skipped_out_of_its_rate(monkeypatch, capsys):
  clock = Clock()
  monkeypatch.setattr(run, 'time', clock)
  with Progress('suite', total=100, unit='items') as progress:
    progress.skip(60)
    clock.now += 10
    progress.update(20)
  first = capsys.readouterr().err.splitlines()[0]
  # 20 in 10 s, not 80; the other 20 take as long.
  assert first == 'suite: 80/100 (80 %), 2 items/s, 0:10 left'


def test_progress_of_nothing(capsys):
  Progress('sft', total=5).close()
  assert 'sft: 0/5 (0 %)' in capsys.readouterr().err


def test_progress_bar_on_a_terminal(monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  terminal = Terminal()
  monkeypatch.setattr(sys, 'stderr', terminal)
  with Progress('ppo', total=4, unit='items') as progress:
    progress.skip(1)
    for _ in range(3):
      progress.update(text='kl 0.1')
  assert 'ppo: 100%' in terminal.getvalue()
  assert 'kl 0.1' in terminal.getvalue()


def test_plain_configs_accept_what_json_accepts():
  assert run.plain({'a': (1, 2)}) == {'a': [1, 2]}
  with pytest.raises(TypeError):
    run.plain({'a': np.zeros(2)})
  assert run.flat({'a': {'b': 1, 'c': {}}, 'd': [2]}) == {
    'a.b': 1,
    'a.c': {},
    'd': [2],
  }
