"""Several processes that end: together, within seconds, with one line each."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]

EXPERIMENT = """
import os
import signal
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from instruct_jax.infra import measure

PROCESSES = 'all'


def validate(config):
  if config.how == 'refuse':
    raise ValueError('how must not be refuse')


def wait(config):
  if config.where == 'collective':
    multihost_utils.process_allgather(np.zeros(3))
  else:
    time.sleep(600)


def run(config, workdir):
  multihost_utils.process_allgather(np.zeros(2))
  if config.how == 'compile':
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    mesh = jax.make_mesh((jax.process_count(),), ('data',))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    x = jax.make_array_from_process_local_data(split, np.arange(2.0))
    before = measure.compilations()
    jax.jit(lambda x: jax.numpy.sum(x) + 1)(x)
    now = measure.compilations()
    (workdir / f'compiled{jax.process_index()}').write_text(
      f'{now.programs - before.programs} {now.from_disk - before.from_disk}'
    )
    return
  (workdir / f'began{jax.process_index()}').touch()
  if config.how == 'end':
    return
  if jax.process_index() != config.who:
    wait(config)
  time.sleep(1)
  if config.how == 'fail':
    raise OSError('the disk is full')
  if config.how == 'bug':
    raise TypeError('no such thing')
  if config.how == 'kill':
    os.kill(os.getpid(), signal.SIGKILL)
  time.sleep(600)
"""

CONFIG = """
from configs import common
from ml_collections import ConfigDict


def get_config():
  config = common.stage('toy', 'toys.ending', 0, '')
  config.how, config.who, config.where = '', 0, ''
  config = common.single(config, 'toy')
  with config.unlocked():
    config.compilation_cache = config.xla_flags = ''
  return config
"""


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    return probe.getsockname()[1]


def start(folder, how, who=0, where='host', count=2, cache=''):
  """Processes that meet, whereupon one of them ends in some way."""
  (folder / 'toys').mkdir(exist_ok=True)
  (folder / 'toys' / 'ending.py').write_text(EXPERIMENT)
  (folder / 'config.py').write_text(CONFIG)
  port = free_port()
  return [
    subprocess.Popen(
      [
        *(sys.executable, '-m', 'instruct_jax.main'),
        *(f'--config={folder / "config.py"}', f'--workdir={folder / "run"}'),
        *(f'--config.how={how}', f'--config.who={who}'),
        f'--config.where={where}',
        f'--config.compilation_cache={cache}',
        *(f'--coordinator=localhost:{port}', f'--num_processes={count}'),
        f'--process_id={index}',
      ],
      cwd=ROOT,
      env={
        **os.environ,
        'XLA_FLAGS': '',
        'JAX_PLATFORMS': 'cpu',
        'PYTHONPATH': os.pathsep.join([str(folder), str(ROOT), *sys.path]),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(count)
  ]


def finish(processes, seconds=120):
  """(exit code, standard error without what other libraries narrate) of each,
  and the seconds from the first end to the last."""
  ends = {}
  deadline = time.monotonic() + seconds
  try:
    while len(ends) < len(processes) and time.monotonic() < deadline:
      for index, process in enumerate(processes):
        if process.poll() is not None:
          ends.setdefault(index, time.monotonic())
      time.sleep(0.1)
  finally:
    for process in processes:
      process.kill()
  found = []
  for process in processes:
    lines = process.communicate()[1].splitlines()
    found.append(
      (process.returncode, [x for x in lines if not x.startswith('[Gloo]')])
    )
  assert len(ends) == len(processes), f'not ended after {seconds} s: {found}'
  return found, max(ends.values()) - min(ends.values())


OTHER = 'error: another process failed first'


def test_all_end_in_order(tmp_path):
  found, _ = finish(start(tmp_path, 'end'))
  assert found == [(0, [])] * 2
  assert (tmp_path / 'run' / 'done.json').exists()


@pytest.mark.parametrize('who', [0, 1])
def test_the_others_end_with_one_line_when_one_fails(tmp_path, who):
  found, seconds = finish(start(tmp_path, 'fail', who))
  message = 'toy: the disk is full'
  assert found[who] == (1, [f'error: {message}'])
  assert found[1 - who] == (1, [f'{OTHER} (process {who}: {message})'])
  assert seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize('where', ['host', 'collective'])
@pytest.mark.parametrize('how', ['fail', 'kill'])
@pytest.mark.parametrize('who', [0, 1, 2])
def test_three_end_together(tmp_path, where, how, who):
  found, seconds = finish(start(tmp_path, how, who, where, 3))
  assert seconds < 30
  for index, (code, lines) in enumerate(found):
    if index != who:
      # 75: what restarts preempted runs starts those that lost another one.
      wanted = {'kill': 75, 'fail': 1}[how]
      assert code == wanted or (how, who) == ('kill', 0)
      text = '\n'.join(lines)
      assert 'Extension modules' not in text
      if (how, who) != ('kill', 0):
        assert len(lines) == 1 and lines[0].startswith(OTHER), text
  code = -signal.SIGKILL if how == 'kill' else 1
  assert found[who][0] == code


@pytest.mark.slow
def test_no_process_alone_loads_a_program(tmp_path):
  """On CPU only the first one would find what the run before has compiled."""
  counts = []
  for number in range(2):
    folder = tmp_path / str(number)
    folder.mkdir()
    processes = start(folder, 'compile', cache=tmp_path / 'cache')
    assert [code for code, _ in finish(processes)[0]] == [0, 0]
    counts += [(folder / 'run' / f'compiled{i}').read_text() for i in range(2)]
  assert counts == ['1 0'] * 4


@pytest.mark.slow
def test_a_refusal_is_one_line_in_each(tmp_path):
  found, _ = finish(start(tmp_path, 'refuse'))
  for code, lines in found:
    assert code == 1 and len(lines) == 1, found
    assert 'toy: how must not be refuse' in lines[0]


@pytest.mark.slow
def test_a_fault_of_the_program_ends_all(tmp_path):
  found, seconds = finish(start(tmp_path, 'bug', 1))
  assert found[0] == (1, [f'{OTHER} (process 1: TypeError: no such thing)'])
  assert found[1][1][0].startswith('Traceback') and seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize('who', [0, 1])
def test_a_stop_of_one_stops_all(tmp_path, who):
  processes = start(tmp_path, 'wait')
  deadline = time.monotonic() + 120
  while len(list((tmp_path / 'run').glob('began*'))) < 2:
    assert time.monotonic() < deadline
    time.sleep(0.2)
  processes[who].send_signal(signal.SIGTERM)
  found, seconds = finish(processes)
  assert seconds < 30
  assert found[who][0] == found[1 - who][0] == 75
  assert found[1 - who][1] == [
    f'process {who} was stopped, and so is this one; the same command continues'
  ]


@pytest.mark.slow
@pytest.mark.parametrize('index', [0, 1])
def test_who_waits_in_vain_is_told(tmp_path, index):
  """The other one was never started."""
  ended = subprocess.run(
    [
      *(sys.executable, '-c'),
      'from instruct_jax.infra import processes\n'
      'processes.JOIN_SECONDS = 5\n'
      f'processes.join("localhost:{free_port()}", 2, {index})',
    ],
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'TF_CPP_MIN_LOG_LEVEL': '2'},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert ended.returncode == 1
  (line,) = ended.stderr.splitlines()
  assert line.startswith('error: the processes of this run did not all')
