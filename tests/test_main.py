"""The command: configs, stages, work directories."""

import hashlib
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import types

import pytest
from etils import epath
from ml_collections import ConfigDict

from configs import common
from instruct_jax.infra import inputs as inputs_lib
from instruct_jax.infra import machine, pipeline
from instruct_jax.infra import run as run_lib

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def toys(tmp_path, monkeypatch):
  """A package of trivial experiments, importable as `toys.NAME`."""
  folder = tmp_path / 'modules' / 'toys'
  folder.mkdir(parents=True)
  files = {
    '__init__': '',
    'write': """
      PROCESSES = 'all'

      def validate(config):
        if config.size < 1:
          raise ValueError(f'size must be positive: {config.size}')

      def run(config, workdir):
        if config.fails:
          raise RuntimeError('toy failure')
        with (workdir / 'runs').open('a') as file:
          file.write('run\\n')
        return {'size': config.size}
      """,
    'half': """
      def run(config, workdir):
        pass
      """,
  }
  for name, source in files.items():
    (folder / f'{name}.py').write_text(textwrap.dedent(source))
  monkeypatch.syspath_prepend(folder.parent)
  yield folder
  for name in [n for n in sys.modules if n.split('.')[0] == 'toys']:
    del sys.modules[name]


def stage(name, experiment='toys.write', **changes):
  values = {'name': name, 'experiment': experiment, 'size': 1, 'fails': False}
  return values | {'mesh': (1, -1, 1)} | changes


def stages_of(*stages):
  return ConfigDict(
    {
      'name': 'toy',
      'seed': 0,
      'mesh': (1, -1, 1),
      'xla_flags': '',
      'compilation_cache': '',
      'loggers': '',
      'stage_order': tuple(s['name'] for s in stages),
      'stages': {s['name']: s for s in stages},
    }
  )


def run(config, workdir):
  workdir = epath.Path(workdir)
  pipeline.run_all(config, workdir, config.copy_and_resolve_references())


def num_runs(folder):
  file = pathlib.Path(folder) / 'runs'
  return len(file.read_text().split()) if file.exists() else 0


# --- Experiments --------------------------------------------------------------


def test_unknown_experiments_are_named(toys, workdir):
  for name, message in [
    (
      'nope',
      "no experiment 'nope': .* experiments.nope or instruct_jax.jobs.nope",
    ),
    ('toys.nope', "no experiment 'toys.nope'"),
    ('toys.half', r'toys.half has no function validate\(config, ...\)'),
  ]:
    with pytest.raises(ValueError, match=message):
      run(stages_of(stage('a'), stage('b', name)), workdir)
  # Found out before anything ran, or was written.
  assert not list(workdir.iterdir())


def test_every_stage_is_validated_before_the_first_runs(toys, workdir):
  with pytest.raises(ValueError, match='size must be positive: 0'):
    run(stages_of(stage('a'), stage('b', size=0)), workdir)
  assert not list(workdir.iterdir())


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('batch_size', 0, 'b: batch_size must be at least 1, got 0'),
    ('learning_rate', 0.0, 'b: learning_rate must be positive .*, got 0.0'),
    ('value_learning_rate', math.nan, 'b: value_learning_rate .*, got nan'),
    ('temperature', -1.0, 'b: temperature must be .* not negative .*-1.0'),
    ('temperature', math.inf, 'b: temperature must be finite .*, got inf'),
    ('max_comparisons', -5, 'b: max_comparisons must not be .*for all.*-5'),
    ('adam_b1', 1.5, r'b: adam_b1 must be in \[0, 1\), got 1.5'),
    ('max_grad_norm', math.nan, 'b: max_grad_norm must not .*, got nan'),
    ('snapshot_every', -3, 'b: snapshot_every must not be negative .*-3'),
    ('reward_weight', math.nan, 'b: reward_weight must be finite, got nan'),
  ],
)
def test_numbers_without_sense_are_named(toys, workdir, key, value, message):
  second = stage('b')
  second[key] = value
  with pytest.raises(ValueError, match=message):
    run(stages_of(stage('a'), second), workdir)
  assert not list(workdir.iterdir())


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'checkpoint_every': 15}, r'b: checkpoint_every \(15\) .* \(10\)'),
    ({'loop.max_skips': 0}, r'b: .*max_skips \(0\) must be at least 1'),
    ({'loop.keep_every': 15}, r'b: keep_every \(15\) must be 0 or a multiple'),
    ({'loop.profile_steps': 'all'}, "b: profile_steps must be .*: 'all'"),
  ],
)
def test_intervals_are_checked_before_any_stage(
  toys, workdir, changes, message
):
  second = common.loop(ConfigDict(stage('b')))
  second.update(log_every=10, checkpoint_every=10)
  second.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    run(stages_of(stage('a'), second), workdir)
  assert not list(workdir.iterdir())


def test_all_experiments_of_the_repository_are_found():
  for folder in ('experiments', 'instruct_jax/jobs'):
    for file in (ROOT / folder).glob('*.py'):
      if file.stem != '__init__':
        assert pipeline.find_experiment(file.stem).__name__ == (
          f'{folder.replace("/", ".")}.{file.stem}'
        )


def test_an_experiment_says_which_processes_run_it(toys, workdir, monkeypatch):
  module = pipeline.find_experiment('toys.write')
  for value in ('both', None):
    monkeypatch.setattr(module, 'PROCESSES', value)
    with pytest.raises(
      ValueError, match='toys.write must set PROCESSES to one'
    ):
      run(stages_of(stage('a')), workdir)
  monkeypatch.delattr(module, 'PROCESSES')
  with pytest.raises(ValueError, match='must set PROCESSES'):
    run(stages_of(stage('a')), workdir)


# --- Stages -------------------------------------------------------------------


def test_a_pipeline_leaves_its_records(toys, workdir, capsys):
  run(stages_of(stage('a', size=3), stage('b')), workdir)
  assert [num_runs(workdir / name) for name in 'ab'] == [1, 1]
  done = json.loads((workdir / 'a' / 'done.json').read_text())
  assert done['info'] == {'size': 3} and done['seconds'] >= 0
  config = json.loads((workdir / 'config.json').read_text())
  assert config['stages']['a']['size'] == 3
  provenance = json.loads((workdir / 'provenance.json').read_text())
  assert provenance['seed'] == 0
  assert provenance['command'].startswith('python -m instruct_jax.main')
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(':')[0] for line in lines] == ['a', 'a', 'b', 'b']


def test_a_single_experiment_runs_in_the_work_directory_itself(toys, workdir):
  config = ConfigDict(stage('a') | {'seed': 0, 'loggers': ''})
  run(config, workdir)
  assert num_runs(workdir) == 1
  assert (workdir / 'done.json').exists()


def test_what_is_done_is_not_run_again(toys, workdir, capsys):
  config = stages_of(stage('a'), stage('b'))
  run(config, workdir)
  (workdir / 'b' / 'done.json').unlink()
  capsys.readouterr()
  run(config, workdir)
  assert [num_runs(workdir / name) for name in 'ab'] == [1, 2]
  assert 'a: already done' in capsys.readouterr().out


def test_a_failed_stage_runs_again_and_its_time_adds_up(
  toys, workdir, monkeypatch
):
  config = stages_of(stage('a'), stage('b'))
  module = pipeline.find_experiment('toys.write')
  good = module.run

  def fail(config, workdir):
    if config.name == 'b':
      raise RuntimeError('toy failure')
    return good(config, workdir)

  monkeypatch.setattr(module, 'run', fail)
  with pytest.raises(RuntimeError, match='toy failure'):
    run(config, workdir)
  assert run_lib.is_done(workdir / 'a') and not run_lib.is_done(workdir / 'b')
  seconds_file = workdir / 'b' / 'seconds.json'
  assert run_lib.read_json(seconds_file) >= 0
  run_lib.write_json(seconds_file, 100.0)
  monkeypatch.setattr(module, 'run', good)
  run(config, workdir)
  assert [num_runs(workdir / name) for name in 'ab'] == [1, 1]
  assert run_lib.read_json(workdir / 'b' / 'done.json')['seconds'] >= 100


# --- Work directories ---------------------------------------------------------


def test_another_config_in_an_old_directory_names_the_key(toys, workdir):
  run(stages_of(stage('a')), workdir)
  with pytest.raises(
    run_lib.WorkdirError, match=r'stages\.a\.size: was 1, is now 2'
  ) as error:
    run(stages_of(stage('a', size=2)), workdir)
  assert 'mesh' not in str(error.value)
  assert num_runs(workdir / 'a') == 1


def test_another_machine_may_continue_a_run(toys, workdir):
  run(stages_of(stage('a')), workdir)
  config = stages_of(stage('a', mesh=(2, 2, 2)))
  config.mesh, config.xla_flags = (8, 1, 1), '--xla_something'
  config.compilation_cache = '/elsewhere'
  run(config, workdir)
  assert num_runs(workdir / 'a') == 1


def test_a_directory_in_use_is_refused(toys, workdir):
  with (
    run_lib.lock_workdir(workdir),
    pytest.raises(run_lib.WorkdirError, match='in use by another run: pid'),
  ):
    run(stages_of(stage('a')), workdir)
  assert not (workdir / 'config.json').exists()
  run(stages_of(stage('a')), workdir)
  assert num_runs(workdir / 'a') == 1


def test_a_place_that_cannot_be_written_is_named(toys, tmp_path):
  file = tmp_path / 'file'
  file.write_text('')
  with pytest.raises(OSError, match=r'file/run'):
    run(stages_of(stage('a')), file / 'run')


def test_what_a_stage_reads_is_recorded(toys, workdir, tmp_path):
  data = tmp_path / 'data'
  data.mkdir()
  (data / 'a.jsonl').write_text('{}')
  folder = tmp_path / 'model'
  (folder / 'params').mkdir(parents=True)
  (folder / 'params' / 'x').write_text('12')
  paths = {'data': str(data / 'a.jsonl'), 'policies': f'm={folder},n=/nowhere'}
  run(stages_of(stage('a', **paths)), workdir)
  inputs = json.loads((workdir / 'a' / 'inputs.json').read_text())
  assert set(inputs) == {'data', 'policies.m'}
  assert inputs['data'] == {
    'path': str(data / 'a.jsonl'),
    'sha256': hashlib.sha256(b'{}').hexdigest(),
  }
  before = inputs['policies.m']['sha256']
  (folder / 'params' / 'x').write_text('13')
  found = inputs_lib.hashes(inputs_lib.read_by(None, ConfigDict(paths)))
  assert found['data'] == inputs['data']
  assert found['policies.m']['sha256'] != before


def test_a_signal_between_stages_stops_the_pipeline(
  toys, workdir, monkeypatch, capsys
):
  module = pipeline.find_experiment('toys.write')
  good = module.run

  def signalled(config, workdir):
    # As a loop does that gets it in its last step: the stage finishes.
    with run_lib.StopSignal():
      os.kill(os.getpid(), signal.SIGTERM)
    return good(config, workdir)

  monkeypatch.setattr(module, 'run', signalled)
  with pytest.raises(run_lib.Stopped):
    run(stages_of(stage('a'), stage('b')), workdir)
  assert run_lib.is_done(workdir / 'a') and not (workdir / 'b').exists()
  assert 'stopped before b' in capsys.readouterr().err
  # Anywhere else there is nothing to save.
  monkeypatch.setattr(
    module, 'run', lambda *_: os.kill(os.getpid(), signal.SIGTERM)
  )
  with pytest.raises(run_lib.Stopped):
    run(stages_of(stage('a'), stage('b')), workdir)
  assert 'outside of a training loop' in capsys.readouterr().err
  monkeypatch.setattr(module, 'run', good)
  run(stages_of(stage('a'), stage('b')), workdir)
  assert [num_runs(workdir / name) for name in 'ab'] == [1, 1]


# --- The command line ---------------------------------------------------------


def command(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'instruct_jax.main', *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )


SMOKE = '--config=configs/ppo_ptx.py:smoke'


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ((), ['--config', 'must have a value']),
    (('--config=configs/ppo_ptx.py:nope',), ['nope', 'smoke']),
    (('--config=configs/nope.py',), ['configs/nope.py', 'No such file']),
    (
      (SMOKE, '--config.stages.ppo_ptx.batchsize=8'),
      ["no such config key: 'batchsize'", 'Did you mean "batch_size"'],
    ),
    (
      (SMOKE, '--config.stages.ppo_ptz.batch_size=8'),
      ["no such config key: 'ppo_ptz'", 'Did you mean "ppo_ptx"'],
    ),
    (
      ('--config=configs/rloo.py:smoke', '--config.stages.ppo_ptx.seed=1'),
      ["no such config key: 'ppo_ptx'"],
    ),
    (
      (SMOKE, '--config.stages.ppo_ptx.experiment=rloo'),
      ["experiments.rloo reads the key 'advantage'", 'configs/'],
    ),
    (
      (SMOKE, '--config.stages.ppo_ptx.batch_size=many'),
      ['batch_size', "'many'"],
    ),
    (
      (SMOKE, '--config.stages.ppo_ptx.batch_size=7'),
      ['batch_size 7 does not divide num_episodes'],
    ),
    (
      (SMOKE, '--config.stages.ppo_ptx.experiment=nope'),
      ["no experiment 'nope'", 'experiments.nope or instruct_jax.jobs.nope'],
    ),
    (
      (SMOKE, '--num_processes=2'),
      ['--num_processes and --process_id need --coordinator'],
    ),
    ((SMOKE, 'word'), ["unexpected arguments: ['word']"]),
  ],
  ids=lambda x: ' '.join(x)[-40:] if isinstance(x, tuple) else '',
)
def test_mistakes_end_with_1_and_a_message(arguments, words, tmp_path):
  ended = command(*arguments, f'--workdir={tmp_path / "never"}')
  assert ended.returncode == 1
  for word in words:
    assert word in ended.stderr
  assert 'Traceback' not in ended.stderr
  assert not (tmp_path / 'never').exists()


def test_the_work_directory_may_be_given_in_the_config_too(tmp_path):
  place = f'--config.workdir={tmp_path / "there"}'
  ended = command(SMOKE, place, '--config.stages.ppo_ptx.batch_size=7')
  assert ended.returncode == 1
  assert f'work directory: {tmp_path / "there"}' in ended.stdout


@pytest.fixture
def starts(tmp_path, monkeypatch):
  """A system whose huge pages a program must ask for, and its restarts."""
  setting = tmp_path / 'enabled'
  setting.write_text('always [madvise] never\n')
  monkeypatch.setattr(machine, '_HUGE_PAGES', setting)
  # Set and deleted, so that whatever a test sets is undone.
  monkeypatch.setenv('GLIBC_TUNABLES', '')
  monkeypatch.delenv('GLIBC_TUNABLES')
  monkeypatch.setattr(sys, 'gettrace', lambda: None)
  monkeypatch.setattr(sys, 'argv', ['main.py', '--a=b c'])
  monkeypatch.setattr(sys, 'orig_argv', ['python', '-m', 'x.main', '--a=b c'])
  main = types.SimpleNamespace(__spec__=types.SimpleNamespace(name='x.main'))
  monkeypatch.setitem(sys.modules, '__main__', main)
  begun = []
  monkeypatch.setattr(os, 'execv', lambda *arguments: begun.append(arguments))
  return begun


def test_huge_pages_are_asked_for_once_with_the_same_command_line(starts):
  machine.ask_for_huge_pages()
  command = [sys.executable, '-m', 'x.main', '--a=b c']
  assert starts == [(sys.executable, command)]
  assert os.environ['GLIBC_TUNABLES'] == 'glibc.malloc.hugetlb=1'
  machine.ask_for_huge_pages()
  assert len(starts) == 1


@pytest.mark.parametrize('text', ['[always] madvise never', None])
def test_huge_pages_are_not_asked_for_in_vain(starts, text):
  machine._HUGE_PAGES.unlink()
  if text:
    machine._HUGE_PAGES.write_text(text)
  machine.ask_for_huge_pages()
  assert not starts and 'GLIBC_TUNABLES' not in os.environ


def test_a_program_inside_another_one_does_not_start_that_again(
  starts, monkeypatch
):
  monkeypatch.setattr(sys, 'orig_argv', ['python', 'server.py'])
  for arguments in (['--a=b c'], []):
    monkeypatch.setattr(sys, 'argv', ['main.py', *arguments])
    machine.ask_for_huge_pages()
  assert not starts and 'GLIBC_TUNABLES' not in os.environ


def test_a_traced_program_and_a_users_own_setting_stay(starts, monkeypatch):
  monkeypatch.setattr(sys, 'gettrace', lambda: print)
  machine.ask_for_huge_pages()
  monkeypatch.setattr(sys, 'gettrace', lambda: None)
  monkeypatch.setenv('GLIBC_TUNABLES', '')
  machine.ask_for_huge_pages()
  assert not starts and os.environ['GLIBC_TUNABLES'] == ''


@pytest.mark.skipif(sys.platform != 'linux', reason='Linux has huge pages')
def test_a_program_that_starts_again_keeps_arguments_and_exit_code(tmp_path):
  setting = tmp_path / 'enabled'
  setting.write_text('[madvise]')
  (tmp_path / 'again.py').write_text(
    textwrap.dedent(f"""
      import os, pathlib, sys
      from instruct_jax.infra import machine
      machine._HUGE_PAGES = pathlib.Path({str(setting)!r})
      print(os.getpid(), flush=True)
      machine.ask_for_huge_pages()
      print(os.environ['GLIBC_TUNABLES'], sys.argv[1:], flush=True)
      sys.exit(7)
      """)
  )
  environment = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'}
  environment['PYTHONPATH'] = f'{ROOT}:{tmp_path}'
  done = subprocess.run(
    [sys.executable, '-m', 'again', '--a=b c', 'd'],
    env=environment,
    capture_output=True,
    text=True,
  )
  first, second, told = done.stdout.splitlines()
  assert first == second and done.returncode == 7
  assert told == "glibc.malloc.hugetlb=1 ['--a=b c', 'd']"


@pytest.mark.parametrize('count', [1, 2])
def test_several_cpu_devices_run_one_program_at_a_time(count):
  code = textwrap.dedent("""
    from ml_collections import ConfigDict
    from instruct_jax.infra import machine
    machine.prepare(ConfigDict({'xla_flags': '', 'compilation_cache': ''}))
    import jax
    print(jax.config.values['jax_cpu_enable_async_dispatch'])
    """)
  flag = '--xla_force_host_platform_device_count=2' if count == 2 else ''
  done = subprocess.run(
    [sys.executable, '-c', code],
    env={**os.environ, 'XLA_FLAGS': flag},
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.split()[-1] == str(count == 1)
