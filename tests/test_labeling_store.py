"""The labeling site's database: migrations, back-ups, PostgreSQL, SIGKILL.

Every simulated labeler here speaks HTTP to a server in a process of its own,
which is killed while they submit.
"""

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
from instruct_jax.labeling import research, schema, store
from tests import labeling_people as people

ROOT = pathlib.Path(__file__).parents[1]


def free_port():
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


@pytest.fixture(scope='module')
def postgres():
  """URL of a throw-away PostgreSQL server without any database of ours."""
  pytest.importorskip('psycopg', reason='pip install -r requirements-labeling')
  programs = sorted(pathlib.Path('/usr/lib/postgresql').glob('*/bin'))
  if not programs:
    pytest.skip('no PostgreSQL server: apt install postgresql')
  # Not pytest's own folder, which other users may not enter.
  folder = pathlib.Path(tempfile.mkdtemp(prefix='labeling-postgres'))
  prefix = []
  # The server refuses to run as root; Debian's package brings its own user.
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
  assert store.revision(engine) is None
  store.migrate(engine)
  assert store.revision(engine) == '0001'
  with engine.connect() as connection:
    context = MigrationContext.configure(
      connection, opts={'target_metadata': schema.metadata}
    )
    assert autogenerate.compare_metadata(context, schema.metadata) == []
  store.migrate(engine)  # Again: nothing to do.
  engine.dispose()


def test_a_database_of_the_first_revision_keeps_its_rows(new_url, tmp_path):
  url = new_url()
  engine = store.make_engine(url)
  store.migrate(engine, '0001')
  with engine.begin() as connection:
    connection.exec_driver_sql(
      'INSERT INTO accounts (name, role, status, created) '
      "VALUES ('old', 'labeler', 'active', 1.5)"
    )
  store.migrate(engine)
  assert [tuple(row)[1:] for row in everything(engine)['accounts']] == [
    ('old', 'labeler', 'active', 1.5)
  ]
  engine.dispose()


def test_backup_and_restore_give_every_row_back(new_url, tmp_path):
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


def test_restore_refuses_other_files(tmp_path):
  for name, content in (('a', b'junk'), ('b', b'')):
    (tmp_path / name).write_bytes(content)
    engine = store.make_engine(f'sqlite:///{tmp_path}/{name}.sqlite')
    with pytest.raises(store.StoreError, match='not a back-up'):
      store.restore(engine, str(tmp_path / name))
    assert store.revision(engine) is None


def test_the_whole_work_on_postgresql(postgres, tmp_path):
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
  assert research.export(site.store, tmp_path / 'out')['comparisons'] == 8
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
  got, barrier = [], threading.Barrier(len(accounts))

  def claim(account):
    barrier.wait()
    got.append(site.store.claim(account))

  threads = [threading.Thread(target=claim, args=(a,)) for a in accounts]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
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
  """The site as a process of its own, on one port."""

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
  """Answers tasks until there are none; sends again what was not acknowledged.

  Attributes:
    acknowledged: notes of the answers that the site confirmed.
    seconds: of every page that came.
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
        time.sleep(0.1)  # It was killed; it comes back.
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
  research.import_tasks(
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
      # Spread over the work, always in the middle of submits.
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
  research.export(the_store, tmp_path / 'out')
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
