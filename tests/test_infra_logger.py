"""Services that show a run: what they got, read from what they wrote.

TensorBoard's files are always read. Those of W&B and Trackio need the extras:

  pip install -e '.[wandb,trackio]'
"""

import contextlib
import importlib.util
import io
import json
import math
import re
import signal
import sqlite3
import time

import jax
import matplotlib.figure
import pytest
from tensorboardX.proto import event_pb2

from instruct_jax.infra import logger, metrics, run
from instruct_jax.infra.logger import Logger
from tests.tiny_run import MAIN

CONFIG = {'learning_rate': 0.5, 'loop.keep': 2, 'commit': 'abc'}
ROWS = [
  {'prompt': 'Say "hi".', 'sft': 'hi', 'ppo': 'Hi!\n| there |'},
  {'prompt': 'Größe?', 'sft': '', 'ppo': '3 m'},
]
ALARM = 'iteration 2: mean KL -0.100 nats'
OPTIONAL = ('wandb', 'trackio')
OFFLINE = {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'}


@pytest.fixture(scope='module')
def plot():
  """A PNG of 40 x 20 pixels."""
  figure = matplotlib.figure.Figure(figsize=(0.4, 0.2), dpi=100)
  file = io.BytesIO()
  figure.savefig(file, format='png')
  return file.getvalue()


def make(loggers, folder, stage='ppo'):
  return Logger(loggers, folder, 'run1', stage, CONFIG)


def tell_all(log, plot):
  """Two steps with times, a plot, a table, an alarm twice."""
  with log, contextlib.closing(metrics.MetricsWriter(log.folder)) as writer:
    for step in (1, 2):
      writer.write(step, {'b/loss': 1 / step, 'a': 0.25 * step})
      writer.write_timing(step, {'timing/seconds': 3.0})
    found = logger.current()
    found.plots(2, {'win_rate': plot})
    found.table(2, 'samples', ROWS)
    found.alarm(2, ALARM)
    found.alarm(2, ALARM)


# --- Which services -----------------------------------------------------------


@pytest.mark.parametrize(
  'text', ['wandbb', 'tensorboard,mlflow', 'tensorboard,tensorboard']
)
def test_an_unknown_service_is_refused(text):
  with pytest.raises(ValueError, match='loggers must be some of tensorboard'):
    logger.check(text)


def needs(name):
  """Skips a test without the extra, which is not imported yet."""
  if importlib.util.find_spec(name) is None:
    pytest.skip(f"pip install -e '.[{name}]'")


@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_a_missing_extra_is_named(name, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  wanted = f"{name} is not installed; pip install -e '.[{name}]'"
  with pytest.raises(ValueError, match=re.escape(wanted)):
    logger.check(name)


def test_a_missing_extra_is_one_line_before_any_stage(
  start, tiny_run, tmp_path
):
  absent = [x for x in OPTIONAL if importlib.util.find_spec(x) is None]
  if not absent:
    pytest.skip('all extras are installed')
  ended = start(
    *(MAIN, f'--config={tiny_run}/config.py', f'--workdir={tmp_path}/run'),
    f'--config.loggers=tensorboard,{absent[0]}',
  )
  assert ended.returncode == 1
  (line,) = ended.stderr.strip().splitlines()
  assert f'loggers: {absent[0]} is not installed' in line
  assert not (tmp_path / 'run').exists()


def test_a_folder_is_no_package(workdir, monkeypatch):
  """W&B itself makes ./wandb, which Python would import as a namespace."""
  (workdir / 'no_such_service').mkdir()
  monkeypatch.syspath_prepend(workdir)
  monkeypatch.setattr(logger._SERVICES['wandb'], 'package', 'no_such_service')
  with pytest.raises(ValueError, match='no_such_service is not installed'):
    logger.check('wandb')


def test_a_service_is_asked_before_a_run_but_not_when_it_goes_on(monkeypatch):
  class Refusing:
    package, help = 'jax', 'log in'

    @staticmethod
    def check():
      raise RuntimeError('no\nkey')

  monkeypatch.setitem(logger._SERVICES, 'wandb', Refusing)
  with pytest.raises(ValueError) as error:
    logger.check('tensorboard,wandb')
  assert str(error.value) == 'loggers: wandb: RuntimeError: no key; log in'
  logger.check('tensorboard,wandb', is_new=False)


@pytest.mark.parametrize(
  ('name', 'env', 'wanted'),
  [
    ('wandb', {}, 'ValueError: there is no API key; log in by `wandb login`'),
    ('wandb', {'WANDB_API_KEY': 40 * 'a'}, 'AuthenticationError: Failed to'),
    ('trackio', {'TRACKIO_SPACE_ID': 'a/b'}, 'log in by `hf auth login`'),
  ],
)
def test_without_a_key_or_network_no_stage_begins(
  name, env, wanted, start, tiny_run, tmp_path
):
  needs(name)
  nowhere = 'http://127.0.0.1:9'
  home = {'HOME': str(tmp_path), 'NETRC': str(tmp_path / 'netrc')}
  home |= {'WANDB_BASE_URL': nowhere, 'HF_ENDPOINT': nowhere, 'HF_TOKEN': ''}
  ended = start(
    *(MAIN, f'--config={tiny_run}/config.py', f'--workdir={tmp_path}/run'),
    f'--config.loggers={name}',
    env=home | env,
  )
  assert ended.returncode == 1
  (line,) = (x for x in ended.stderr.splitlines() if x.startswith('error: '))
  assert line.startswith(f'error: loggers: {name}: ') and wanted in line
  assert not (tmp_path / 'run').exists()


def test_there_is_none_outside_of_a_run(workdir):
  log = logger.current()
  log.numbers(1, {'a': 1.0})
  log.alarm(1, 'text')
  assert not list(workdir.iterdir())
  with make('tensorboard', workdir) as log:
    assert logger.current() is log
  assert logger.current() is not log


def test_other_processes_tell_nothing(workdir, monkeypatch, plot):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  tell_all(make('tensorboard,wandb,trackio', workdir / 'stage'), plot)
  assert not (workdir / 'stage').exists()


# --- A run that resumes, a service that fails ---------------------------------


def told(monkeypatch, name='wandb'):
  """Replaces a service by one that collects what it gets."""
  calls = []

  class Collected:
    package, help = 'jax', 'try again'

    def __init__(self, log, resume_step):
      calls.append(('begin', log.id, resume_step))

    def next_step(self):
      return 2

    def __getattr__(self, method):
      return lambda *arguments: calls.append((method, *arguments))

  monkeypatch.setitem(logger._SERVICES, name, Collected)
  return calls


def test_a_stage_that_resumes_keeps_its_id(workdir, monkeypatch):
  calls = told(monkeypatch)
  for resume_step in (None, 2, None):
    with make('wandb', workdir) as log:
      log.begin(resume_step)
      log.alarm(3, ALARM)
  first, _, _, again, _, anew, *_ = calls
  assert first == ('begin', first[1], None)
  assert re.fullmatch('[0-9a-f]{8}', first[1])
  assert again == ('begin', first[1], 2)
  # From its start it is another run, with alarms of its own.
  assert anew[1] != first[1]
  assert [call for call in calls if call[0] == 'alarm'] == [
    ('alarm', 3, ALARM)
  ] * 2


def test_what_a_kill_kept_from_a_service_is_told_again(workdir, monkeypatch):
  """Up to the checkpoint; what follows it is computed again."""
  calls = told(monkeypatch)
  (workdir / metrics.TIMING_FILE).write_text(
    ''.join(f'{{"step": {step}, "t": {step}.5}}\n' for step in (1, 2, 3, 4))
  )
  lines = [{'step': step, 'a': step, 'b': None} for step in (1, 2, 3)]
  with make('wandb', workdir):
    metrics.MetricsWriter(workdir, lines, 3).close()
  _, *numbers, _ = calls
  assert [call[:2] for call in numbers] == [('numbers', 2), ('numbers', 3)]
  last = numbers[-1][2]
  assert (last['a'], last['t']) == (3, 3.5) and math.isnan(last['b'])
  # A stage that begins has nothing behind it.
  calls.clear()
  with make('wandb', workdir):
    metrics.MetricsWriter(workdir).close()
  assert [call[0] for call in calls] == ['begin', 'close']


def test_parts_of_a_stage_are_runs_of_their_own(workdir, monkeypatch):
  calls = told(monkeypatch)
  with make('wandb', workdir):
    for fold in ('fold0', 'fold1'):
      writer = metrics.MetricsWriter(workdir / fold)
      writer.write(1, {'a': 1.0})
      writer.close()
  names = [call[0] for call in calls]
  assert names == ['begin', 'numbers', 'close'] * 2
  assert len({call[1] for call in calls if call[0] == 'begin'}) == 2
  assert not (workdir / logger.FILE).exists()


def test_a_service_that_fails_later_is_left_out(workdir, monkeypatch, capsys):
  calls = told(monkeypatch)

  class Broken:
    package, help = 'jax', ''

    def __init__(self, log, resume_step):
      pass

    def numbers(self, step, values):
      raise RuntimeError('no\nnetwork')

  monkeypatch.setitem(logger._SERVICES, 'trackio', Broken)
  with make('trackio,wandb', workdir) as log:
    log.numbers(1, {'a': 1.0})
    log.numbers(2, {'a': 2.0})
  said = capsys.readouterr().out.splitlines()
  assert said == [
    'ppo: nothing more is sent to trackio: RuntimeError: no network'
  ]
  assert [c[0] for c in calls] == ['begin', 'numbers', 'numbers', 'close']


def test_a_service_that_refuses_ends_no_run(workdir, monkeypatch, capsys):
  calls = told(monkeypatch)

  class Refusing:
    package, help = 'jax', 'log in'

    def __init__(self, log, resume_step):
      raise RuntimeError('no\nkey')

  monkeypatch.setitem(logger._SERVICES, 'trackio', Refusing)
  with make('trackio,wandb', workdir) as log:
    log.numbers(1, {'a': 1.0})
  assert capsys.readouterr().out == (
    'ppo: not sent to trackio: RuntimeError: no key; log in\n'
  )
  assert [call[0] for call in calls] == ['begin', 'numbers', 'close']


@pytest.mark.parametrize(
  ('error', 'code'),
  [(None, 0), (ValueError(), 1), (run.Stopped('stopped'), 75)],
)
def test_services_learn_how_a_stage_ended(workdir, monkeypatch, error, code):
  calls = told(monkeypatch)
  with (
    contextlib.suppress(ValueError, run.Stopped),
    make('wandb', workdir) as x,
  ):
    x.begin()
    if error is not None:
      raise error
  assert calls[-1] == ('close', code)


def test_rows_get_the_same_columns(workdir, monkeypatch):
  calls = told(monkeypatch)
  with make('wandb', workdir) as log:
    log.table(1, 'samples', [{'a': 1}, {'b': 'x', 'a': 2}])
  rows = [{'a': 1, 'b': None}, {'a': 2, 'b': 'x'}]
  assert calls[1] == ('table', 1, 'samples', rows)


@pytest.mark.parametrize('text', ['{"id": "0', '7'])
def test_a_damaged_id_is_named(workdir, text):
  (workdir / logger.FILE).write_text(text)
  with pytest.raises(ValueError, match=r'logger\.json is damaged; delete it'):
    make('tensorboard', workdir).begin(3)
  # Following the advice.
  (workdir / logger.FILE).unlink()
  with make('tensorboard', workdir) as shown:
    shown.begin(3)
  assert json.loads((workdir / logger.FILE).read_text())['id']


# --- TensorBoard --------------------------------------------------------------


def events_of(folder):
  """(step, value) of each summary in the event files, in order."""
  found = []
  for file in sorted((folder / 'tensorboard').iterdir()):
    data, position = file.read_bytes(), 0
    while position < len(data):
      # TFRecord: length (8 bytes), its checksum (4), the event, checksum (4).
      length = int.from_bytes(data[position : position + 8], 'little')
      event = event_pb2.Event.FromString(data[position + 12 :][:length])
      found += [(event.step, value) for value in event.summary.value]
      position += 16 + length
  return found


def test_tensorboard_gets_everything(workdir, plot):
  tell_all(make('tensorboard', workdir), plot)
  events = events_of(workdir)
  numbers = {
    (step, value.tag): value.simple_value
    for step, value in events
    if value.HasField('simple_value')
  }
  assert numbers == {
    (1, 'a'): 0.25,
    (1, 'b/loss'): 1.0,
    (1, 'timing/seconds'): 3.0,
    (2, 'a'): 0.5,
    (2, 'b/loss'): 0.5,
    (2, 'timing/seconds'): 3.0,
  }
  others = {
    value.tag.removesuffix('/text_summary'): (step, value)
    for step, value in events
    if not value.HasField('simple_value')
  }
  assert set(others) == {'config', 'win_rate', 'samples', 'alarm'}
  step, value = others['win_rate']
  assert (step, value.image.width, value.image.height) == (2, 40, 20)
  assert value.image.encoded_image_string == plot

  def text(name):
    return others[name][1].tensor.string_val[0].decode()

  assert 'learning_rate: 0.5' in text('config')
  assert [json.loads(line) for line in text('samples').splitlines()] == ROWS
  assert text('alarm') == ALARM
  # One alarm, though it was told twice.
  assert len([v for _, v in events if v.tag.startswith('alarm')]) == 1


def test_starts_within_a_second_keep_their_files(workdir):
  for step in (None, 1, 2):
    with make('tensorboard', workdir) as log:
      log.begin(step)
      log.numbers(1 if step is None else step + 1, {'a': 1.0})
  steps = [v[0] for v in events_of(workdir) if v[1].tag == 'a']
  assert steps == [1, 2, 3]


# --- Weights & Biases, offline ------------------------------------------------


def records_of(folder, num_ends=None):
  """Number of the run folders below `folder`, and what they hold, in order.

  The file is LevelDB's log format with a header of seven bytes: blocks of
  32 KiB of records, each with a checksum (4 bytes), a length (2) and a type (1
  whole; 2 first, 3 middle, 4 last part).

  Args:
    folder: of a stage.
    num_ends: how many runs at least came to their end; all if None.
  """
  runs = sorted((folder / 'wandb').glob('offline-run-*/run-*.wandb'))
  num_ends = len(runs) if num_ends is None else num_ends
  # Another process writes them, and the end last.
  deadline = time.monotonic() + 60
  while True:
    found = [x for file in runs for x in _records(file.read_bytes())]
    if sum(record.HasField('exit') for record in found) >= num_ends:
      return len(runs), found
    assert time.monotonic() < deadline, f'{runs}: not {num_ends} ends'
    time.sleep(0.1)


def _records(data):
  pb2 = importlib.import_module('wandb.proto.wandb_internal_pb2')
  found, position, parts = [], 7, b''
  while position < len(data):
    if 32768 - position % 32768 < 7:
      position += 32768 - position % 32768
      continue
    length = int.from_bytes(data[position + 4 : position + 6], 'little')
    kind = data[position + 6]
    parts += data[position + 7 : position + 7 + length]
    position += 7 + length
    if kind in (1, 4):
      found.append(pb2.Record.FromString(parts))
      parts = b''
  return found


def history_of(records):
  """(step, name) -> value of each logged line."""
  found = {}
  for record in records:
    if not record.HasField('history'):
      continue
    items = {
      tuple(item.nested_key) or (item.key,): json.loads(item.value_json)
      for item in record.history.item
    }
    step = items.pop(('_step',), record.history.step.num)
    for (name, *inner), value in items.items():
      if inner:
        found.setdefault((step, name), {})['/'.join(inner)] = value
      elif not name.startswith('_'):
        found[step, name] = value
  return found


def test_wandb_offline_gets_everything(workdir, plot, monkeypatch):
  needs('wandb')
  for name, value in OFFLINE.items():
    monkeypatch.setenv(name, value)
  tell_all(make('wandb', workdir), plot)
  num_runs, records = records_of(workdir)
  assert num_runs == 1
  (found,) = [r.run for r in records if r.HasField('run')][:1]
  kept = json.loads((workdir / logger.FILE).read_text())
  assert found.run_id == kept['id']
  assert (found.display_name, found.run_group) == ('run1/ppo', 'run1')
  assert (found.project, found.job_type) == ('instruct_jax', 'ppo')
  config = {u.key: json.loads(u.value_json) for u in found.config.update}
  assert CONFIG.items() <= config.items()
  history = history_of(records)
  assert history[1, 'a'] == 0.25 and history[2, 'b/loss'] == 0.5
  assert history[1, 'timing/seconds'] == 3.0
  image = history[2, 'win_rate']
  assert image['_type'] == 'image-file'
  assert (image['width'], image['height']) == (40, 20)
  (folder,) = (workdir / 'wandb').glob('offline-run-*')
  table = history[2, 'samples']
  assert table['_type'] == 'table-file'
  content = json.loads((folder / 'files' / table['path']).read_text())
  assert content['columns'] == ['prompt', 'sft', 'ppo']
  assert content['data'] == [list(row.values()) for row in ROWS]
  (alert,) = [r.alert for r in records if r.HasField('alert')]
  assert (alert.title, alert.text) == ('ppo: alarm', ALARM)


def test_a_part_is_a_run_of_wandb_beside_the_stage(workdir, monkeypatch):
  needs('wandb')
  for name, value in OFFLINE.items():
    monkeypatch.setenv(name, value)
  with make('wandb', workdir) as log:
    log.numbers(1, {'a': 1.0})
    with contextlib.closing(metrics.MetricsWriter(workdir / 'fold0')) as writer:
      writer.write(1, {'a': 2.0})
    log.numbers(2, {'a': 3.0})
  for folder, wanted in (
    (workdir, {(1, 'a'): 1.0, (2, 'a'): 3.0}),
    (workdir / 'fold0', {(1, 'a'): 2.0}),
  ):
    num_runs, records = records_of(folder)
    assert (num_runs, history_of(records)) == (1, wanted)


# --- Trackio's local store ----------------------------------------------------


@pytest.fixture(scope='module')
def trackio_store(tmp_path_factory):
  """The folder of the store, which Trackio reads as it is imported."""
  with pytest.MonkeyPatch.context() as patch:
    folder = tmp_path_factory.mktemp('trackio')
    patch.setenv('TRACKIO_DIR', str(folder))
    needs('trackio')
    yield folder


def rows_of(folder, table):
  with contextlib.closing(
    sqlite3.connect(folder / 'instruct_jax.db')
  ) as database:
    database.row_factory = sqlite3.Row
    found = database.execute(f'SELECT * FROM {table} ORDER BY id')
    return [dict(row) for row in found]


def numbers_of(folder, run):
  """(step, name) -> value in the order of arrival, of runs that begin so."""
  return [
    ((row['step'], name), value)
    for row in rows_of(folder, 'metrics')
    if row['run_name'].startswith(run)
    for name, value in json.loads(row['metrics']).items()
  ]


def test_trackio_gets_everything(workdir, plot, trackio_store):
  tell_all(make('trackio', workdir), plot)
  kept = json.loads((workdir / logger.FILE).read_text())
  name = f'run1-ppo-{kept["id"]}'
  found = dict(numbers_of(trackio_store, name))
  assert found[1, 'a'] == 0.25 and found[2, 'b/loss'] == 0.5
  assert found[1, 'timing/seconds'] == 3.0
  image = found[2, 'win_rate']
  assert image['_type'] == 'trackio.image'
  assert (trackio_store / 'media' / image['file_path']).exists()
  assert found[2, 'samples'] == {'_type': 'trackio.table', '_value': ROWS}
  (config,) = rows_of(trackio_store, 'configs')
  values = json.loads(config['config'])
  assert CONFIG.items() <= values.items() and values['_Group'] == 'run1'
  (alert,) = rows_of(trackio_store, 'alerts')
  assert (alert['title'], alert['text']) == ('ppo: alarm', ALARM)


# --- A whole run, stopped and resumed -----------------------------------------


@pytest.mark.parametrize(
  ('number', 'code'), [(signal.SIGTERM, 75), (signal.SIGKILL, -9)]
)
def test_a_run_that_was_stopped_goes_on_in_all_services(
  start, tiny_run, tmp_path, number, code
):
  """From the command line, offline: one run of each service with all steps."""
  for name in OPTIONAL:
    needs(name)
  workdir, store = tmp_path / 'run', tmp_path / 'store'
  command = (
    *(MAIN, f'--config={tiny_run}/config.py', f'--workdir={workdir}'),
    *('--config.log_every=1', '--config.checkpoint_every=1'),
    *('--config.num_steps=60', '--config.loggers=tensorboard,wandb,trackio'),
  )
  timing = workdir / metrics.TIMING_FILE
  env = {**OFFLINE, 'TRACKIO_DIR': str(store)}

  def is_time():
    # More than Trackio keeps to itself, and steps with a checkpoint.
    saved = [*workdir.glob('checkpoints/[1-9]*')]
    return saved and timing.read_text().count('\n') >= 5

  ended = start(*command, env=env, until=is_time, number=number)
  assert ended.returncode == code, ended.stderr
  before = len(metrics.read_lines(workdir / metrics.METRICS_FILE))
  assert 0 < before < 60
  ended = start(*command, env=env)
  assert ended.returncode == 0, ended.stderr

  lines = metrics.read_lines(workdir / metrics.METRICS_FILE)
  wanted = {
    (line['step'], name): value
    for line in lines
    for name, value in line.items()
    if name != 'step'
  }
  assert len(lines) == 60
  kept = json.loads((workdir / logger.FILE).read_text())
  numbers = {
    (step, value.tag): value.simple_value
    for step, value in events_of(workdir)
    if value.HasField('simple_value') and not value.tag.startswith('timing/')
  }
  assert numbers == pytest.approx(wanted)
  num_runs, records = records_of(workdir, num_ends=1 + (code == 75))
  assert num_runs == 2  # A folder for each start, of one run.
  runs = {r.run.run_id for r in records if r.HasField('run')}
  assert runs == {kept['id']}
  # A start that was asked to stop is shown as preempted, not as failed.
  preempted = sum(r.HasField('preempting') for r in records)
  exits = [r.exit.exit_code for r in records if r.HasField('exit')]
  assert preempted == (code == 75)
  assert exits == [75, 0] if code == 75 else exits[-1] == 0
  history = history_of(records)
  assert {key: history[key] for key in wanted} == wanted
  assert set(history) >= {(step, 'timing/seconds') for step in (1, 60)}
  stored = numbers_of(store, f'run-pretrain-{kept["id"]}')
  found = [x for x in stored if not x[0][1].startswith('timing/')]
  assert dict(found) == wanted
  # Steps after the last checkpoint arrive again where there was no notice.
  assert len(found) == len(wanted) or code != 75
