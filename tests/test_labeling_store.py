"""The labeling site's database: migrations, back-ups, PostgreSQL, SIGKILL.

Simulated labelers speak HTTP to a server in a separate process, which is killed
while they submit.
"""

import gzip
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import pytest

pytest.importorskip('starlette', reason='pip install -r requirements-labeling')
pytest.importorskip('sqlalchemy')

import httpx2
import sqlalchemy as sa
from alembic import autogenerate
from alembic.runtime.migration import MigrationContext

from instruct_jax.data import records
from instruct_jax.labeling import (
  answers,
  exporting,
  importing,
  research,
  schema,
  store,
)
from tests import labeling_people as people

ROOT = pathlib.Path(__file__).parents[1]


def free_port():
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


@pytest.fixture(scope='module')
def postgres():
  """Makes URLs of new databases on a temporary PostgreSQL server."""
  pytest.importorskip('psycopg', reason='pip install -r requirements-labeling')
  programs = sorted(pathlib.Path('/usr/lib/postgresql').glob('*/bin'))
  if not programs:
    pytest.skip('no PostgreSQL server: apt install postgresql')
  # Not pytest's folder, which other users cannot enter.
  folder = pathlib.Path(tempfile.mkdtemp(prefix='labeling-postgres'))
  prefix = []
  # The server refuses to run as root; Debian's package adds a user for it.
  if os.getuid() == 0:
    if shutil.which('runuser') is None:
      pytest.skip('PostgreSQL does not run as root, and there is no runuser')
    shutil.chown(folder, 'postgres')
    prefix = ['runuser', '-u', 'postgres', '--']
  data, port = folder / 'data', free_port()
  run = {'check': True, 'capture_output': True}
  subprocess.run(
    [*prefix, programs[-1] / 'initdb', '-D', data, '-A', 'trust',
     '-U', 'postgres', '-E', 'UTF8', '--no-sync'], **run)  # fmt: skip
  control = [*prefix, str(programs[-1] / 'pg_ctl'), '-D', str(data), '-w']
  options = f'-p {port} -c listen_addresses=127.0.0.1 -k {folder}'
  subprocess.run(
    [*control, '-o', options, '-l', str(data / 'log'), 'start'],
    check=True,
    stdout=subprocess.DEVNULL,
  )
  number = iter(range(1000))

  def new_database():
    name = f'labeling{next(number)}'
    base = f'postgresql+psycopg://postgres@127.0.0.1:{port}'
    engine = sa.create_engine(f'{base}/postgres', isolation_level='AUTOCOMMIT')
    with engine.connect() as connection:
      connection.exec_driver_sql(f'CREATE DATABASE {name}')
    engine.dispose()
    return f'{base}/{name}'

  yield new_database
  subprocess.run([*control, '-m', 'immediate', 'stop'], **run)
  shutil.rmtree(folder)


@pytest.fixture(params=['sqlite', 'postgresql'])
def new_url(request, tmp_path):
  """Makes URLs of new databases, on both servers."""
  if request.param == 'postgresql':
    return request.getfixturevalue('postgres')
  number = iter(range(100))
  return lambda: f'sqlite:///{tmp_path}/site{next(number)}.sqlite'


def everything(engine):
  with engine.connect() as connection:
    return {
      table.name: connection.execute(
        sa.select(table).order_by(*table.primary_key)
      ).all()
      for table in schema.metadata.sorted_tables
    }


def worked_site(url, folder):
  """A site with an account of each role, open, skipped and answered tasks."""
  site = people.Site(url, folder)
  site.load(people.ranking_items(4), overlap=2)
  anna, ben = site.person('anna'), site.person('ben')
  anna.rank(anna.claim(), people.rank_of, notes='ein „Wort“ \u202e😀')
  task = ben.claim()
  ben.post(f'/task/{task}/skip', reason='Other')
  ben.post(f'/task/{ben.claim()}/flag', text='odd')
  return site


def test_migrations_make_exactly_the_tables_of_the_schema(new_url):
  engine = store.make_engine(new_url())
  with engine.connect() as connection:
    assert store.revision(connection) is None
  store.migrate(engine)
  with engine.connect() as connection:
    assert store.revision(connection) == '0002'
    context = MigrationContext.configure(
      connection, opts={'target_metadata': schema.metadata}
    )
    assert autogenerate.compare_metadata(context, schema.metadata) == []
  store.migrate(engine)  # Again: nothing to do.
  engine.dispose()


def test_a_database_of_the_first_revision_keeps_its_rows(new_url):
  """A row in each table; what came later has its default."""
  engine = store.make_engine(new_url())
  store.migrate(engine, '0001')
  values = {sa.Text: 'old', sa.Integer: 1, sa.Double: 1.5, sa.Boolean: True}
  values[sa.JSON] = {'old': [1.5]}
  before = sa.MetaData()
  with engine.begin() as connection:
    before.reflect(connection)
    names = [table.name for table in before.sorted_tables]
    assert sorted([*names, 'decisions']) == sorted(
      [*schema.metadata.tables, 'alembic_version']
    )
    first = {}
    for table in before.sorted_tables:
      if table.name == 'alembic_version':
        continue
      columns = schema.metadata.tables[table.name].c
      first[table.name] = {
        column.name: values[type(columns[column.name].type)]
        for column in table.columns
      }
      connection.execute(sa.insert(table).values(first[table.name]))
  store.migrate(engine)
  later = {
    'batches': {'calibration': False, 'suggestions': False},
    'tasks': {'priority': None},
    'assignments': {'suggested': None},
  }
  found = everything(engine)
  assert found.pop('decisions') == []
  for name, (row,) in found.items():
    assert row._asdict() == first[name] | later.get(name, {})
  engine.dispose()


def test_a_back_up_of_the_first_revision_is_restored(new_url, tmp_path):
  rows = [
    ('batches', {'id': 3, 'name': 'old', 'kind': 'ranking', 'overlap': 1,
                 'phase': 'training', 'screening': False, 'closed': False,
                 'created': 1.5}),
    ('tasks', {'id': 5, 'batch_id': 3, 'prompt': 'P', 'record': {}}),
  ]  # fmt: skip
  header = {'format': 'instruct_jax labeling backup', 'revision': '0001'}
  lines = [json.dumps(line) for line in (header | {'rows': 2}, *rows)]
  path = tmp_path / 'old.gz'
  path.write_bytes(gzip.compress('\n'.join([*lines, '']).encode()))
  engine = store.make_engine(new_url())
  assert store.restore(engine, str(path)) == 2
  found = everything(engine)
  (batch,), (task,) = found['batches'], found['tasks']
  assert (batch.calibration, batch.suggestions) == (False, False)
  assert (task.id, task.priority) == (5, None)
  engine.dispose()


def test_restore_gives_every_row_back(new_url, tmp_path):
  site = worked_site(new_url(), tmp_path)
  before = everything(site.engine)
  path = str(tmp_path / 'copy.jsonl.gz')
  count = store.backup(site.engine, path)
  assert count == sum(map(len, before.values()))
  engine = store.make_engine(new_url())
  assert store.restore(engine, path) == count
  assert everything(engine) == before
  with pytest.raises(store.StoreError, match='not empty'):
    store.restore(engine, path)
  # New rows get new ids.
  again = store.Store(engine, site.store.config, site.clock)
  assert again.add_account('new', 'labeler', 'active') > max(
    row.id for row in before['accounts']
  )
  engine.dispose()
  site.engine.dispose()


def test_a_sqlite_site_moves_to_postgresql(postgres, tmp_path):
  site = worked_site(f'sqlite:///{tmp_path}/small.sqlite', tmp_path)
  path = str(tmp_path / 'copy.jsonl.gz')
  store.backup(site.engine, path)
  engine = store.make_engine(postgres())
  store.restore(engine, path)
  assert everything(engine) == everything(site.engine)
  engine.dispose()


def damaged(good):
  """Name -> (bytes of a bad back-up, part of the error message)."""
  lines = gzip.decompress(good).split(b'\n')
  rows = [i for i, line in enumerate(lines) if line.startswith(b'["accounts"')]

  def changed(number, **values):
    name, row = json.loads(lines[number])
    line = json.dumps([name, {**row, **values}]).encode()
    return pack([*lines[:number], line, *lines[number + 1 :]])

  def pack(packed):
    return gzip.compress(b'\n'.join(packed))

  def header(**values):
    found = {**json.loads(lines[0]), **values}
    return pack([json.dumps(found).encode(), *lines[1:]])

  last = rows[-1]
  without = json.dumps(['accounts', {'id': 9, 'name': 'x'}]).encode()
  unknown = json.dumps(['nothing', {'id': 9}]).encode()
  middle = len(good) // 2
  flipped = good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :]
  return {
    'no gzip': (b'junk', 'not a back-up of this site'),
    'empty': (b'', 'not a back-up of this site'),
    'cut': (good[:-200], 'damaged'),
    'a changed byte': (flipped, 'damaged'),
    'another format': (header(format='x'), "its format is 'x'"),
    'no object': (pack([b'[]']), 'not a back-up of this site'),
    'rows missing': (pack([*lines[:-3], b'']), 'damaged: holds'),
    'half a line': (pack([*lines[:-2], lines[-2][:20], b'']), 'is damaged'),
    'no UTF-8': (pack([*lines[:-2], b'\xff', b'']), 'is damaged'),
    'no pair': (pack([*lines[:-2], b'7', b'']), 'is damaged'),
    'no such table': (
      pack([*lines[:-2], unknown, b'']),
      f'line {len(lines) - 1} is damaged (no such table)',
    ),
    'missing columns': (
      pack([*lines[:last], without, *lines[last + 1 :]]),
      f'line {last + 1} is damaged (missing or unknown columns of accounts',
    ),
    'a foreign column': (changed(last, more=1), 'accounts: more'),
    'another type': (changed(last, name=5), 'accounts.name is 5'),
    'a truth value': (changed(last, id=True), 'accounts.id is True'),
    'a huge number': (changed(last, id=10**30), f'line {last + 1} is damaged'),
    'the same twice': (
      changed(last, id=json.loads(lines[rows[0]])[1]['id']),
      'is damaged',
    ),
    'nobody of that id': (changed(last, id=999), 'is damaged'),
    'half a character': (changed(last, name='\ud800'), 'is damaged'),
    'newer': (header(revision='0999'), 'version 0999; this program knows '
              'versions up to 0002'),
  }  # fmt: skip


def test_a_bad_back_up_leaves_the_database_empty(new_url, tmp_path):
  """Each kind of damage gives one line; the good file then restores."""
  site = worked_site(new_url(), tmp_path)
  good = tmp_path / 'good.gz'
  count = store.backup(site.engine, str(good))
  before = everything(site.engine)
  site.engine.dispose()
  engine = store.make_engine(new_url())
  path = tmp_path / 'bad.gz'
  for name, (content, words) in damaged(good.read_bytes()).items():
    path.write_bytes(content)
    with pytest.raises(store.StoreError) as caught:
      store.restore(engine, str(path))
    said = str(caught.value)
    assert words in said and '\n' not in said and str(path) in said, name
    with engine.connect() as connection:
      assert sa.inspect(connection).get_table_names() == [], name
  path.unlink()
  with pytest.raises(store.StoreError, match='no such file'):
    store.restore(engine, str(path))
  assert store.restore(engine, str(good)) == count
  assert everything(engine) == before
  engine.dispose()


def test_a_database_with_foreign_tables_is_not_empty(new_url, tmp_path):
  site = worked_site(new_url(), tmp_path)
  store.backup(site.engine, str(tmp_path / 'good.gz'))
  site.engine.dispose()
  engine = store.make_engine(new_url())
  with engine.begin() as connection:
    connection.exec_driver_sql('CREATE TABLE theirs (id INTEGER)')
  with pytest.raises(store.StoreError, match='not empty'):
    store.restore(engine, str(tmp_path / 'good.gz'))
  with engine.connect() as connection:
    assert sa.inspect(connection).get_table_names() == ['theirs']
  engine.dispose()


def test_a_back_up_without_a_row_count_is_read(tmp_path):
  site = worked_site(f'sqlite:///{tmp_path}/a.sqlite', tmp_path)
  path = tmp_path / 'old.gz'
  count = store.backup(site.engine, str(path))
  lines = gzip.decompress(path.read_bytes()).split(b'\n')
  header = json.loads(lines[0])
  assert header.pop('rows') == count
  lines[0] = json.dumps(header).encode()
  path.write_bytes(gzip.compress(b'\n'.join(lines)))
  engine = store.make_engine(f'sqlite:///{tmp_path}/b.sqlite')
  assert store.restore(engine, str(path)) == count


def test_a_back_up_never_overwrites(tmp_path):
  site = worked_site(f'sqlite:///{tmp_path}/a.sqlite', tmp_path)
  assert store.backup_name('x') == store.backup_name('x.gz') == 'x.gz'
  store.backup(site.engine, str(tmp_path / 'x'))
  content = (tmp_path / 'x.gz').read_bytes()
  site.store.add_account('more', 'labeler', 'active')
  for name in ('x', 'x.gz'):
    with pytest.raises(store.StoreError, match='x.gz exists'):
      store.backup(site.engine, str(tmp_path / name))
  assert (tmp_path / 'x.gz').read_bytes() == content
  with pytest.raises(store.StoreError, match='cannot be written'):
    store.backup(site.engine, str(tmp_path / 'x.gz' / 'below'))


def test_a_newer_database_is_refused(new_url, tmp_path):
  engine = store.make_engine(new_url())
  store.migrate(engine)
  with engine.begin() as connection:
    connection.exec_driver_sql("UPDATE alembic_version SET version_num='0999'")
  with pytest.raises(
    store.StoreError, match='the database has tables of version 0999'
  ):
    store.Store(engine, people.make_config()).prepare()
  engine.dispose()


def test_one_account_has_one_task_open_however_often_it_asks(new_url, tmp_path):
  site = people.Site(new_url(), tmp_path)
  site.load(people.ranking_items(8, 2))
  account_id = site.store.add_account('anna', 'labeler', 'active')
  with site.store.read() as c:
    account = c.execute(
      sa.select(schema.accounts).where(schema.accounts.c.id == account_id)
    ).one()
  got = in_threads([lambda: site.store.claim(account)] * 8)
  assert len(set(got)) == 1 and None not in got
  site.engine.dispose()


def test_a_skip_and_a_submit_at_the_same_time(new_url, tmp_path):
  """Either the answer or the skip counts, whichever comes first."""
  site = people.Site(new_url(), tmp_path, requests_per_minute=100_000)
  number = 6
  site.load(people.ranking_items(number, 2))
  anna = site.person('anna')
  for _ in range(number):
    task = anna.claim()
    for step in range(3):
      anna.fill(task, step)
    site.clock.now += 121 * 60
    site.store.release_expired()
    ranks = {'rank0': '1', 'rank1': '2'}

    def submit(task=task, ranks=ranks):
      return site.store.submit(task, anna.id, 'ranks', ranks, f'{task:032d}')

    def skip(task=task):
      return site.store.skip(task, anna.id, 'Other')

    def draft(task=task):
      return site.store.save_draft(task, anna.id, 'prompt', {'x': 'y'})

    for failure in in_threads(
      [submit, skip, draft, site.store.release_expired]
    ):
      assert not isinstance(failure, Exception) or isinstance(
        failure, store.StoreError | answers.AnswerError
      ), failure
  with site.store.read() as c:
    for row in c.execute(sa.select(schema.assignments)).all():
      has_answer = c.scalar(
        sa.select(sa.func.count())
        .select_from(schema.answers)
        .where(schema.answers.c.assignment_id == row.id)
      )
      assert row.state in ('submitted', 'skipped')
      assert has_answer == (row.state == 'submitted')
      holder = c.scalar(
        sa.select(schema.slots.c.holder).where(
          schema.slots.c.task_id == row.task_id
        )
      )
      assert holder == (anna.id if has_answer else None)
  site.engine.dispose()


def test_suspension_does_not_undo_an_answer(new_url, tmp_path):
  site = people.Site(new_url(), tmp_path, requests_per_minute=100_000)
  site.load(people.ranking_items(6, 2))
  for i in range(6):
    person = site.person(f'labeler{i}')
    task = person.claim()
    for step in range(3):
      person.fill(task, step)

    def submit(task=task, person=person):
      ranks = {'rank0': '1', 'rank1': '2'}
      return site.store.submit(task, person.id, 'ranks', ranks, f'{task:032d}')

    def suspend(person=person):
      return site.store.set_status(person.id, 'suspended', site.admin.id)

    in_threads([submit, suspend])
  with site.store.read() as c:
    answered = set(c.scalars(sa.select(schema.answers.c.assignment_id)))
    for row in c.execute(sa.select(schema.assignments)).all():
      wanted = 'submitted' if row.id in answered else 'expired'
      assert row.state == wanted
  site.engine.dispose()


def in_threads(functions):
  """Calls all at once; returns what each returned or raised."""
  found, barrier = [None] * len(functions), threading.Barrier(len(functions))

  def call(place, function):
    barrier.wait()
    try:
      found[place] = function()
    except Exception as error:
      found[place] = error

  threads = [
    threading.Thread(target=call, args=item) for item in enumerate(functions)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return found


def test_all_work_on_postgresql(postgres, tmp_path):
  site = worked_site(postgres(), tmp_path)
  cleo = site.person('cleo')
  while (task := cleo.claim()) is not None:
    cleo.rank(task, people.rank_of)
  site.clock.now += 130 * 60
  assert site.store.release_expired() == 1
  anna = site.person('anna2')
  while (task := anna.claim()) is not None:
    anna.rank(task, people.rank_of)
  assert len(site.rows()) == 8
  for page in ('/admin', '/admin/accounts', '/admin/agreement', '/admin/audit'):
    assert site.admin.get(page).status_code == 200
  assert exporting.export(site.store, tmp_path / 'out')['comparisons'] == 8
  site.engine.dispose()


def test_many_claim_at_once_and_no_slot_is_given_twice(new_url, tmp_path):
  site = people.Site(new_url(), tmp_path)
  site.load(people.ranking_items(5, 2), overlap=3)
  ids = [
    site.store.add_account(f'labeler{i}', 'labeler', 'active')
    for i in range(25)
  ]
  with site.store.read() as c:
    accounts = c.execute(
      sa.select(schema.accounts).where(schema.accounts.c.id.in_(ids))
    ).all()
  got = in_threads([lambda a=a: site.store.claim(a) for a in accounts])
  assert len(got) == 25
  assert len([task for task in got if task is not None]) == 15
  with site.store.read() as c:
    holders = c.execute(
      sa.select(schema.slots.c.task_id, schema.slots.c.holder)
    ).all()
  assert len(set(holders)) == 15
  assert all(holder is not None for _, holder in holders)
  site.engine.dispose()


# --- SIGKILL ------------------------------------------------------------------


class Server:
  """The site in a separate process, on one port."""

  def __init__(self, workdir, url=''):
    self.port = free_port()
    self.url = f'http://127.0.0.1:{self.port}'
    self.command = [
      sys.executable, '-m', 'instruct_jax.labeling',
      f'--config={ROOT}/configs/labeling.py', f'--workdir={workdir}',
      f'--config.port={self.port}', f'--config.database={url}',
      '--config.requests_per_minute=100000',
      '--config.joins_per_minute=100000',
    ]  # fmt: skip
    self.process = None

  def start(self):
    self.process = subprocess.Popen(
      self.command,
      cwd=ROOT,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
    )
    for _ in range(1200):
      try:
        httpx2.get(f'{self.url}/', timeout=5)
        return
      except httpx2.TransportError:
        if self.process.poll() is not None:
          raise AssertionError(self.process.stderr.read().decode()) from None
        time.sleep(0.05)
    raise AssertionError('the site does not start')

  def kill(self):
    self.process.send_signal(signal.SIGKILL)
    self.process.wait()


class Labeler(threading.Thread):
  """Answers tasks until there are none; resends what was not acknowledged.

  Attributes:
    acknowledged: notes of the answers that the site confirmed.
    seconds: per loaded page.
  """

  def __init__(self, url, name, token):
    super().__init__(daemon=True)
    self.url, self.label, self.token = url, name, token
    self.acknowledged, self.seconds = [], []
    self.failure = None

  def ask(self, method, path, **fields):
    for _ in range(600):
      begin = time.monotonic()
      try:
        reply = self.client.request(
          method, self.url + path, data=fields or None, timeout=60
        )
      except httpx2.TransportError:
        time.sleep(0.1)  # It was killed and restarts.
        continue
      self.seconds.append(time.monotonic() - begin)
      assert reply.status_code in (200, 303), reply.text
      return reply
    raise AssertionError('the site stays away')

  def run(self):
    try:
      with httpx2.Client() as self.client:
        self.client.cookies.set('labeling', self.token)
        self.work()
    except Exception as error:
      self.failure = error

  def work(self):
    csrf = re.search(r'name="csrf" value="([^"]+)"', self.ask('GET', '/').text)
    csrf = csrf.group(1)
    number = 0
    while True:
      reply = self.ask('POST', '/next', csrf=csrf)
      if reply.status_code == 200:
        return
      task = reply.headers['location'].split('/')[2]
      step = int(reply.headers['location'].split('/')[3])
      while True:
        page = self.ask('GET', f'/task/{task}/{step}').text
        fields = dict(
          re.findall(r'type="radio" name="(\w+)" value="([^"]+)"', page)
        )
        last = 'value="submit"' in page
        note = f'{self.label}-{number}-{task}'
        if last:
          fields = {f'rank{i}': i + 1 for i in range(2)}
        else:
          fields['notes'] = note
        fields['submission'] = re.search(
          r'name="submission" value="(\w+)"', page
        ).group(1)
        fields['action'] = 'submit' if last else 'next'
        self.ask('POST', f'/task/{task}/{step}', csrf=csrf, **fields)
        if last:
          break
        step += 1
      self.acknowledged.append(int(task))
      number += 1


def crash_test(tmp_path, num_labelers, num_tasks, num_kills, url=''):
  """Kills the site while labelers work; returns the median page time in s."""
  workdir = tmp_path / 'site'
  workdir.mkdir()
  engine = store.make_engine(url or f'sqlite:///{workdir}/labeling.sqlite')
  the_store = store.Store(engine, people.make_config())
  the_store.prepare()
  overlap = 2
  importing.import_tasks(
    the_store,
    '\n'.join(map(json.dumps, people.ranking_items(num_tasks, 2))).encode(),
    source='test',
    name='load',
    kind='ranking',
    phase='training',
    overlap=overlap,
  )
  labelers = []
  server = Server(workdir, url)
  for i in range(num_labelers):
    account_id = the_store.add_account(f'labeler{i}', 'labeler', 'active')
    token = the_store.join(the_store.invite(account_id))
    labelers.append(Labeler(server.url, f'labeler{i}', token))
  server.start()
  for labeler in labelers:
    labeler.start()

  def acknowledged():
    return sum(len(labeler.acknowledged) for labeler in labelers)

  wanted = num_tasks * overlap
  try:
    for kill in range(num_kills):
      # Spread over the work, always during submits.
      goal = wanted * (kill + 1) // (num_kills + 2)
      while acknowledged() < goal and any(x.is_alive() for x in labelers):
        time.sleep(0.01)
      assert any(labeler.is_alive() for labeler in labelers), [
        labeler.failure for labeler in labelers
      ]
      server.kill()
      server.start()
    for labeler in labelers:
      labeler.join(300)
      assert not labeler.is_alive()
      assert labeler.failure is None, labeler.failure
  finally:
    server.kill()
  exporting.export(the_store, tmp_path / 'out')
  found = records.read_jsonl(
    tmp_path / 'out/comparisons.jsonl', records.Comparison
  )
  keys = [(row.labeler, row.metadata['labeling']['task']) for row in found]
  assert len(keys) == len(set(keys)) == wanted
  assert acknowledged() == wanted
  tasks = [task for _, task in keys]
  assert max(tasks.count(task) for task in set(tasks)) == overlap
  assignments = {row.assignment_id for row in research.labeled(the_store)}
  assert assignments == {t for x in labelers for t in x.acknowledged}
  engine.dispose()
  return statistics.median(
    second for labeler in labelers for second in labeler.seconds
  )


def test_no_acknowledged_answer_is_lost_to_a_kill(tmp_path):
  crash_test(tmp_path, num_labelers=6, num_tasks=12, num_kills=2)


@pytest.mark.slow
def test_twenty_kills_under_fifty_labelers(tmp_path):
  median = crash_test(tmp_path, num_labelers=50, num_tasks=150, num_kills=20)
  print(f'median page time under the load of 50 labelers: {median:.3f} s')


@pytest.mark.slow
def test_kills_on_postgresql(postgres, tmp_path):
  crash_test(tmp_path, 20, 40, 5, postgres())
