"""The database of the labeling site: connections, people, and their work.

Every public method is one transaction. SQLite writes begin with BEGIN
IMMEDIATE and are on the disk before they return (WAL, synchronous=FULL), so
what was acknowledged survives SIGKILL.
"""

import contextlib
import gzip
import hashlib
import json
import pathlib
import secrets
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from etils import epath

from instruct_jax.data import invisible, records
from instruct_jax.labeling import answers, schema

_HERE = pathlib.Path(__file__).parent
_CLAIM_TRIES = 20
_BACKUP_FORMAT = 'instruct_jax labeling backup'

accounts, invitations, sessions = (
  schema.accounts,
  schema.invitations,
  schema.sessions,
)
batches, tasks, outputs, slots = (
  schema.batches,
  schema.tasks,
  schema.outputs,
  schema.slots,
)
assignments, answers_table = schema.assignments, schema.answers


class StoreError(ValueError):
  """A request that cannot be granted; the text may be shown to who asked."""


def validate(config) -> None:
  """Refuses settings that cannot work, before anything is opened.

  Raises:
    StoreError: the key, what was found, what to do.
  """
  for key in (
    'session_days',
    'invitation_days',
    'task_minutes',
    'idle_minutes',
    'requests_per_minute',
    'joins_per_minute',
    'max_body_bytes',
    'max_import_bytes',
    'overlap',
    'demo_tasks',
  ):
    if config[key] <= 0:
      raise StoreError(f'{key} must be positive: {config[key]}')
  for key in ('cut_flags', 'cut_rankings', 'valid_fraction'):
    if not 0 <= config[key] <= 1:
      raise StoreError(f'{key} must be from 0 to 1: {config[key]}')
  if not config.public_url and config.host not in ('127.0.0.1', 'localhost'):
    raise StoreError(
      f'host {config.host} is open to others; set public_url to the address '
      'that their browsers use (https://..., with a proxy that adds TLS)'
    )
  if config.public_url and not config.public_url.startswith(
    ('http://', 'https://')
  ):
    raise StoreError(
      f'public_url must begin with https:// or http://: {config.public_url!r}'
    )


class _TakenError(Exception):
  """Somebody else was given the slot first."""


def _hash(token: str) -> str:
  return hashlib.sha256(token.encode()).hexdigest()


def make_engine(url: str) -> sa.Engine:
  """An engine whose transactions are real ones on SQLite, too."""
  if not url.startswith('sqlite'):
    return sa.create_engine(url, pool_pre_ping=True, pool_size=20)
  engine = sa.create_engine(
    url,
    connect_args={'timeout': 60, 'check_same_thread': False},
    poolclass=sa.pool.QueuePool,
    pool_size=20,
  )

  @sa.event.listens_for(engine, 'connect')
  def _connected(connection, record):
    del record
    connection.isolation_level = None  # We say BEGIN, not Python's module.
    for pragma in (
      'journal_mode=WAL',
      'synchronous=FULL',
      'foreign_keys=ON',
      'busy_timeout=60000',
    ):
      connection.execute(f'PRAGMA {pragma}')

  @sa.event.listens_for(engine, 'begin')
  def _begin(connection):
    immediate = connection.get_execution_options().get('immediate', False)
    connection.exec_driver_sql('BEGIN IMMEDIATE' if immediate else 'BEGIN')

  return engine


def _migrations(connection: sa.Connection | None = None) -> Config:
  config = Config()
  config.set_main_option('script_location', str(_HERE / 'migrations'))
  config.attributes['connection'] = connection
  return config


def _check_revision(name: str, place: str) -> None:
  """Raises `StoreError` for tables of a version that this program lacks."""
  known = ScriptDirectory.from_config(_migrations())
  try:
    known.get_revision(name)
  except CommandError as error:
    raise StoreError(
      f'{place} has tables of version {name}; this program knows versions up '
      f'to {known.get_current_head()}: use a newer program'
    ) from error


def migrate(engine: sa.Engine, revision: str = 'head') -> None:
  """Brings the tables to a revision, the newest by default (Alembic).

  Raises:
    StoreError: they are of a newer version than this program's.
  """
  with engine.begin() as connection:
    found = _revision(connection)
    if found is not None:
      _check_revision(found, 'the database')
    command.upgrade(_migrations(connection), revision)


def revision(engine: sa.Engine) -> str | None:
  """The revision that the tables have; None for an empty database."""
  with engine.connect() as connection:
    return _revision(connection)


def _revision(connection):
  return MigrationContext.configure(connection).get_current_revision()


class Store:
  """All that is read and written for people and their tasks.

  Attributes:
    config: as in configs/labeling.py.
    engine: for reading; `write()` begins a writing transaction.
    clock: seconds since 1970.
  """

  def __init__(
    self, engine: sa.Engine, config, clock: Callable[[], float] = time.time
  ):
    self.engine = engine
    self.config = config
    self.clock = clock
    self._writer = engine.execution_options(immediate=True)

  @contextlib.contextmanager
  def read(self) -> Iterator[sa.Connection]:
    with self.engine.connect() as connection:
      yield connection

  @contextlib.contextmanager
  def write(self) -> Iterator[sa.Connection]:
    with self._writer.begin() as connection:
      yield connection

  # --- People -------------------------------------------------------------

  def audit(self, connection, account_id, action: str, detail: str = ''):
    connection.execute(
      schema.audit.insert().values(
        time=self.clock(), account_id=account_id, action=action, detail=detail
      )
    )

  def add_account(self, name, role, status, by=None) -> int:
    """A new pseudonymous account.

    Raises:
      StoreError: the name is taken or unusable, or there is no such role.
    """
    name = unicodedata.normalize('NFC', name).strip()
    if (
      not 1 <= len(name) <= 40
      or not name.replace('-', '').isalnum()
      or invisible.HIDDEN.search(name)  # Some count as letters.
    ):
      raise StoreError(
        f'A name has 1 to 40 letters, digits and hyphens: {name[:60]!r}'
      )
    if role not in ('labeler', 'researcher', 'admin'):
      raise StoreError(f'No such role: {role!r}')
    if status not in ('screening', 'active'):
      raise StoreError(f'No such status: {status!r}')
    with self.write() as c:
      if c.scalar(sa.select(accounts.c.id).where(accounts.c.name == name)):
        raise StoreError(f'The name {name} is taken')
      account_id = c.execute(
        accounts.insert().values(
          name=name, role=role, status=status, created=self.clock()
        )
      ).inserted_primary_key[0]
      self.audit(c, by, 'account', f'{name}: {role}, {status}')
    return account_id

  def set_status(self, account_id: int, status: str, by: int) -> None:
    """Admits or suspends; who is suspended loses sessions and open tasks."""
    if status not in ('screening', 'active', 'suspended'):
      raise StoreError(f'No such status: {status!r}')
    if account_id == by:
      raise StoreError('You cannot change your own status')
    with self.write() as c:
      changed = c.execute(
        accounts.update()
        .where(accounts.c.id == account_id)
        .values(status=status)
      ).rowcount
      if not changed:
        raise StoreError('No such account')
      if status == 'suspended':
        for table in (sessions, invitations):
          c.execute(table.delete().where(table.c.account_id == account_id))
        open_ids = c.scalars(
          sa.select(assignments.c.id)
          .where(
            assignments.c.account_id == account_id,
            assignments.c.state == 'open',
          )
          .order_by(assignments.c.id)
          .with_for_update()  # An answer that is on its way comes first.
        ).all()
        for assignment_id in open_ids:
          self._release(c, assignment_id, 'expired')
      self.audit(c, by, 'status', f'account {account_id}: {status}')

  def invite(self, account_id: int, by: int | None = None) -> str:
    """A one-time token to sign in with; older unused ones stop working."""
    token = secrets.token_urlsafe(32)
    with self.write() as c:
      account = self._account(c, account_id)
      if account.status == 'suspended':
        raise StoreError(f'{account.name} is suspended')
      c.execute(
        invitations.delete().where(
          invitations.c.account_id == account_id, invitations.c.used.is_(None)
        )
      )
      c.execute(
        invitations.insert().values(
          token_hash=_hash(token),
          account_id=account_id,
          expires=self.clock() + self.config.invitation_days * 86400,
        )
      )
      self.audit(c, by, 'invite', account.name)
    return token

  def _account(self, connection, account_id, lock=False):
    query = sa.select(accounts).where(accounts.c.id == account_id)
    if lock:
      # Without keeping others from rows that refer to this one.
      query = query.with_for_update(key_share=True)
    account = connection.execute(query).first()
    if account is None:
      raise StoreError('No such account')
    return account

  def invitation_is_good(self, token: str) -> bool:
    with self.read() as c:
      return self._invitation(c, token) is not None

  def _invitation(self, connection, token):
    return connection.execute(
      sa.select(invitations).where(
        invitations.c.token_hash == _hash(token),
        invitations.c.used.is_(None),
        invitations.c.expires > self.clock(),
      )
    ).first()

  def join(self, token: str, leaving: str = '') -> str:
    """Uses an invitation up; returns the token of a new session.

    An account has one session: earlier ones, in whatever browser, end here.

    Args:
      token: of the invitation.
      leaving: token of the session that this browser had so far, which ends
        whosever it is; '' for none.

    Raises:
      StoreError: the link was used, has expired or never was.
    """
    session = secrets.token_urlsafe(32)
    now = self.clock()
    with self.write() as c:
      found = self._invitation(c, token)
      # The update's own condition decides between two clicks at once.
      if (
        found is None
        or not c.execute(
          invitations.update()
          .where(
            invitations.c.token_hash == _hash(token),
            invitations.c.used.is_(None),
          )
          .values(used=now)
        ).rowcount
      ):
        raise StoreError(
          'This link was used before or has expired. Please ask for a new one.'
        )
      c.execute(
        sessions.delete().where(
          (sessions.c.account_id == found.account_id)
          | (sessions.c.token_hash == _hash(leaving))
          | (sessions.c.expires < now)
        )
      )
      c.execute(
        sessions.insert().values(
          token_hash=_hash(session),
          account_id=found.account_id,
          csrf=secrets.token_urlsafe(24),
          created=now,
          expires=now + self.config.session_days * 86400,
        )
      )
      self.audit(c, found.account_id, 'join')
    return session

  def session(self, token: str):
    """The account of a live session with its `csrf`, or None."""
    with self.read() as c:
      return c.execute(
        sa.select(accounts, sessions.c.csrf)
        .join(sessions, sessions.c.account_id == accounts.c.id)
        .where(
          sessions.c.token_hash == _hash(token),
          sessions.c.expires > self.clock(),
          accounts.c.status != 'suspended',
        )
      ).first()

  def leave(self, token: str) -> None:
    with self.write() as c:
      c.execute(sessions.delete().where(sessions.c.token_hash == _hash(token)))

  # --- Instructions -------------------------------------------------------

  def publish_instructions(self, phase: str, text: str, by=None) -> int:
    """A new version of a phase's instructions; answers name theirs."""
    text = answers.clean(text, 'The page').strip()
    if phase not in answers.PHASES or invisible.is_blank(text):
      raise StoreError('Instructions need a phase and a text')
    table = schema.instructions
    with self.write() as c:
      last = c.scalar(
        sa.select(sa.func.max(table.c.version)).where(table.c.phase == phase)
      )
      version = (last or 0) + 1
      c.execute(
        table.insert().values(
          phase=phase, version=version, text=text, created=self.clock()
        )
      )
      self.audit(c, by, 'instructions', f'{phase} {version}')
    return version

  def instructions(self, phase: str):
    with self.read() as c:
      return self._instructions(c, phase)

  def _instructions(self, connection, phase):
    table = schema.instructions
    return connection.execute(
      sa.select(table)
      .where(table.c.phase == phase)
      .order_by(table.c.version.desc())
      .limit(1)
    ).first()

  def prepare(self) -> None:
    """Tables, and version 1 of the instructions, where they are missing."""
    migrate(self.engine)
    for phase in answers.PHASES:
      if self.instructions(phase) is None:
        path = _HERE / 'instructions' / f'{phase}.txt'
        self.publish_instructions(phase, path.read_text('utf-8'))

  # --- Work ---------------------------------------------------------------

  def _release(self, connection, assignment_id, state, reason=''):
    """Gives an assignment's slot back to the pool."""
    row = connection.execute(
      sa.select(assignments).where(assignments.c.id == assignment_id)
    ).one()
    connection.execute(
      assignments.update()
      .where(assignments.c.id == assignment_id)
      .values(state=state, reason=reason)
    )
    connection.execute(
      slots.update()
      .where(slots.c.task_id == row.task_id, slots.c.holder == row.account_id)
      .values(holder=None)
    )

  def release_expired(self) -> int:
    """Returns tasks left open for too long to the pool; says how many."""
    now = self.clock()
    condition = (assignments.c.state == 'open') & (assignments.c.expires < now)
    with self.read() as c:
      if not c.scalar(sa.select(assignments.c.id).where(condition).limit(1)):
        return 0
    with self.write() as c:
      # Whose labeler is saving at this moment is not abandoned.
      ids = c.scalars(
        sa.select(assignments.c.id)
        .where(condition)
        .order_by(assignments.c.id)
        .with_for_update(skip_locked=True)
      ).all()
      for assignment_id in ids:
        self._release(c, assignment_id, 'expired')
        self.audit(c, None, 'expired', f'assignment {assignment_id}')
    return len(ids)

  def claim(self, account) -> int | None:
    """The next task of an account: the id of its assignment, or None.

    Who has a task open gets that one, unless its batch was closed meanwhile.
    Labelers get free slots of open batches, first of tasks that they had begun;
    in screening, all screening tasks. Researchers get every task, screening
    first, outside the overlap.

    Raises:
      StoreError: the account was suspended, or the site is too busy.
    """
    self.release_expired()
    for _ in range(_CLAIM_TRIES):
      try:
        with self.write() as c:
          return self._claim(c, account)
      # On PostgreSQL two may see the same slot free; the constraint stops one.
      except (_TakenError, sa.exc.IntegrityError):
        continue
    raise StoreError('The site is very busy. Please try again.')

  def _claim(self, connection, account):
    # As it is now, and one claim of an account at a time.
    account = self._account(connection, account.id, lock=True)
    if account.status == 'suspended':
      raise StoreError('This account is suspended')
    opened = self._opened(connection, account.id)
    if opened is not None:
      return opened
    begun = (
      sa.select(assignments.c.id)
      .where(
        assignments.c.task_id == tasks.c.id,
        assignments.c.account_id == account.id,
      )
      .exists()
    )
    mine = (
      sa.select(assignments.c.id)
      .where(
        assignments.c.task_id == tasks.c.id,
        assignments.c.account_id == account.id,
        assignments.c.state != 'expired',
      )
      .exists()
    )
    uncounted = account.role != 'labeler' or account.status == 'screening'
    query = (
      sa.select(tasks.c.id.label('task_id'))
      .join(batches, batches.c.id == tasks.c.batch_id)
      .where(sa.not_(mine), sa.not_(batches.c.closed))
      .order_by(
        batches.c.screening.desc(),
        sa.case((begun, 0), else_=1),
        batches.c.id,
        tasks.c.id,
      )
      .limit(1)
    )
    if account.role == 'labeler':
      wanted = account.status == 'screening'
      query = query.where(batches.c.screening == wanted)
    if not uncounted:
      query = (
        query.join(slots, slots.c.task_id == tasks.c.id)
        .where(slots.c.holder.is_(None), slots.c.number > 0)
        .add_columns(slots.c.id.label('slot_id'))
        .with_for_update(skip_locked=True, of=slots)
      )
    found = connection.execute(query).first()
    if found is None:
      return None
    if uncounted:
      self._hold_uncounted(connection, found.task_id, account.id)
    else:
      self._hold(connection, found.slot_id, account.id)
    return self._assign(connection, found.task_id, account.id)

  def _opened(self, connection, account_id):
    """The assignment that an account works on, or None."""
    return connection.scalar(
      sa.select(assignments.c.id)
      .join(tasks, tasks.c.id == assignments.c.task_id)
      .join(batches, batches.c.id == tasks.c.batch_id)
      .where(
        assignments.c.account_id == account_id,
        assignments.c.state == 'open',
        sa.not_(batches.c.closed),
      )
      .order_by(assignments.c.id)
      .limit(1)
    )

  def _hold(self, connection, slot_id, account_id):
    changed = connection.execute(
      slots.update()
      .where(slots.c.id == slot_id, slots.c.holder.is_(None))
      .values(holder=account_id)
    ).rowcount
    if not changed:
      raise _TakenError

  def _hold_uncounted(self, connection, task_id, account_id):
    """The slot that does not count in the overlap, made when first needed."""
    slot = connection.scalar(
      sa.select(slots.c.id).where(
        slots.c.task_id == task_id, slots.c.number == -account_id
      )
    )
    if slot is not None:
      return self._hold(connection, slot, account_id)
    connection.execute(
      slots.insert().values(
        task_id=task_id, number=-account_id, holder=account_id
      )
    )

  def _assign(self, connection, task_id, account_id):
    now = self.clock()
    times = {
      'state': 'open',
      'claimed': now,
      'touched': now,
      'expires': now + self.config.task_minutes * 60,
    }
    again = connection.scalar(
      sa.select(assignments.c.id).where(
        assignments.c.task_id == task_id,
        assignments.c.account_id == account_id,
      )
    )
    if again is not None:  # It had expired; order and draft are still there.
      connection.execute(
        assignments.update().where(assignments.c.id == again).values(**times)
      )
      return again
    count = connection.scalar(
      sa.select(sa.func.count()).where(outputs.c.task_id == task_id)
    )
    order = list(range(count))
    secrets.SystemRandom().shuffle(order)
    return connection.execute(
      assignments.insert().values(
        task_id=task_id,
        account_id=account_id,
        seconds=0.0,
        order=order,
        draft={},
        reason='',
        **times,
      )
    ).inserted_primary_key[0]

  def work(self, assignment_id: int, account_id: int):
    """An account's own assignment with its task, or None.

    Returns:
      Row of the assignment, the batch's kind, phase, screening, closed and
      name, the task's prompt and record, and `texts`: outputs by position.
    """
    with self.read() as c:
      return self._work(c, assignment_id, account_id)

  def _work(self, connection, assignment_id, account_id, lock=False):
    query = (
      sa.select(
        assignments,
        tasks.c.prompt,
        tasks.c.record,
        batches.c.kind,
        batches.c.phase,
        batches.c.screening,
        batches.c.closed,
      )
      .join(tasks, tasks.c.id == assignments.c.task_id)
      .join(batches, batches.c.id == tasks.c.batch_id)
      .where(
        assignments.c.id == assignment_id,
        assignments.c.account_id == account_id,
      )
    )
    if lock:
      query = query.with_for_update(of=assignments)
    row = connection.execute(query).first()
    if row is None:
      return None
    texts = connection.scalars(
      sa.select(outputs.c.text)
      .where(outputs.c.task_id == row.task_id)
      .order_by(outputs.c.position)
    ).all()
    return {**row._mapping, 'texts': texts}

  def _own(self, connection, assignment_id, account_id):
    work = self._work(connection, assignment_id, account_id, lock=True)
    if work is None:
      raise StoreError('No such task')
    return work

  def _touched(self, work):
    """Columns of an assignment that its labeler is working on now."""
    now = self.clock()
    pause = min(now - work['touched'], self.config.idle_minutes * 60)
    found = {'touched': now, 'seconds': work['seconds'] + max(0.0, pause)}
    if work['state'] == 'open':
      found['expires'] = now + self.config.task_minutes * 60
    return found

  def save_draft(
    self, assignment_id: int, account_id: int, page: str, posted: dict
  ) -> str:
    """Keeps one page as posted, complete or not; returns the task's state.

    A task whose time was over is taken up again, if it is still free and its
    labeler has no other one open. Otherwise it stays `expired`: the draft is
    kept and does not count.

    Raises:
      StoreError: not this account's task, or skipped.
    """
    with self.write() as c:
      work = self._take_up(c, self._own(c, assignment_id, account_id))
      self._keep(c, work, page, posted)
    return work['state']

  def _take_up(self, connection, work):
    """The work, open again where its time was over and that can be."""
    if (
      work['state'] != 'expired'
      or work['closed']
      or self._opened(connection, work['account_id']) is not None
    ):
      return work
    try:
      with connection.begin_nested():
        self._regain(connection, work)
    except StoreError:
      return work
    connection.execute(
      assignments.update()
      .where(assignments.c.id == work['id'])
      .values(state='open')
    )
    return {**work, 'state': 'open'}

  def _keep(self, connection, work, page, posted):
    if work['state'] == 'skipped':
      raise StoreError('You skipped this task')
    draft = {**work['draft'], page: posted}
    connection.execute(
      assignments.update()
      .where(assignments.c.id == work['id'])
      .values(draft=draft, **self._touched(work))
    )
    return draft

  def submit(
    self,
    assignment_id: int,
    account_id: int,
    page: str,
    posted: dict,
    submission: str,
  ) -> int:
    """Stores an answer; returns its revision.

    The same `submission` again, say because the reply was lost, changes
    nothing and is acknowledged again. A task that has returned to the pool is
    accepted while a slot is free.

    Raises:
      AnswerError: the answer is incomplete; what was posted is kept as draft.
      StoreError: not this account's task, skipped, closed, or no slot is left.
    """
    if not 16 <= len(submission) <= 64 or not submission.isalnum():
      raise StoreError('This page is too old. Please open the task again.')
    with self.write() as c:
      work = self._own(c, assignment_id, account_id)
      earlier = c.execute(
        sa.select(answers_table).where(answers_table.c.submission == submission)
      ).first()
      if earlier is not None:
        if earlier.assignment_id != assignment_id:
          raise StoreError('This page is too old. Please open the task again.')
        return earlier.revision
      work = self._take_up(c, work)
      draft = self._keep(c, work, page, posted)
      failure = None
      try:
        # Within a savepoint of its own, so that the draft stays.
        with c.begin_nested():
          return self._store_answer(c, work, draft, submission)
      except (answers.AnswerError, StoreError) as error:
        failure = error
    raise failure

  def _store_answer(self, connection, work, draft, submission):
    if work['closed']:
      raise StoreError('This batch is closed. Your text was kept as a draft.')
    content = answers.content(
      work['kind'],
      draft,
      len(work['texts']),
      work['record'].get('style', 'plain'),
    )
    if work['state'] == 'expired':
      self._regain(connection, work)
    last = connection.scalar(
      sa.select(sa.func.max(answers_table.c.revision)).where(
        answers_table.c.assignment_id == work['id']
      )
    )
    times = self._touched(work)
    number = (last or 0) + 1
    connection.execute(
      answers_table.insert().values(
        assignment_id=work['id'],
        revision=number,
        submission=submission,
        content=content,
        instruction_id=self._instructions(connection, work['phase']).id,
        time=self.clock(),
        seconds=times['seconds'],
      )
    )
    connection.execute(
      assignments.update()
      .where(assignments.c.id == work['id'])
      .values(state='submitted', **times)
    )
    return number

  def _regain(self, connection, work):
    account = self._account(connection, work['account_id'])
    if account.role != 'labeler' or work['screening']:
      return self._hold_uncounted(connection, work['task_id'], account.id)
    slot = connection.scalar(
      sa.select(slots.c.id)
      .where(
        slots.c.task_id == work['task_id'],
        slots.c.holder.is_(None),
        slots.c.number > 0,
      )
      .limit(1)
      .with_for_update(skip_locked=True)
    )
    try:
      if slot is None:
        raise _TakenError
      self._hold(connection, slot, account.id)
    except _TakenError as error:
      raise StoreError(
        'This task was open for too long and went to somebody else. Your '
        'answer was kept as a draft but does not count.'
      ) from error

  def skip(self, assignment_id: int, account_id: int, reason: str) -> None:
    """Gives a task back for good, with the reason; also after its time.

    The same skip again changes nothing; another reason takes the place of the
    first.

    Raises:
      StoreError: not this account's task, answered, or no reason.
    """
    with self.write() as c:
      work = self._own(c, assignment_id, account_id)
      if work['state'] == 'submitted':
        raise StoreError('You have answered this task already')
      reason = answers.clean(reason, 'The reason').strip()
      if invisible.is_blank(reason):
        raise StoreError('Please say why you skip this task')
      if (work['state'], work['reason']) == ('skipped', reason):
        return
      # Who holds the slot of a task whose time was over keeps it.
      self._release(c, assignment_id, 'skipped', reason)
      self.audit(c, account_id, 'skip', f'assignment {assignment_id}')

  def flag(self, assignment_id: int, account_id: int, text: str) -> None:
    """Tells the researchers that something is wrong with a task."""
    with self.write() as c:
      work = self._own(c, assignment_id, account_id)
      text = answers.clean(text, 'The note').strip()
      if invisible.is_blank(text):
        raise StoreError('Please say what is wrong')
      c.execute(
        assignments.update()
        .where(assignments.c.id == assignment_id)
        .values(**self._touched(work))
      )
      c.execute(
        schema.flags.insert().values(
          assignment_id=assignment_id, text=text, time=self.clock()
        )
      )
      self.audit(c, account_id, 'flag', f'assignment {assignment_id}')

  def own_progress(self, account) -> dict[str, Any]:
    """What a labeler sees of the own work: counts, pace, last answers."""
    day = self.clock() - 86400
    mine = answers_table.join(
      assignments, answers_table.c.assignment_id == assignments.c.id
    )
    first = (assignments.c.account_id == account.id) & (
      answers_table.c.revision == 1
    )
    with self.read() as c:
      seconds = c.scalars(
        sa.select(answers_table.c.seconds).select_from(mine).where(first)
      ).all()
      today = c.scalar(
        sa.select(sa.func.count())
        .select_from(mine)
        .where(first, answers_table.c.time > day)
      )
      rows = c.execute(
        sa.select(assignments, tasks.c.prompt, batches.c.kind, batches.c.closed)
        .join(tasks, tasks.c.id == assignments.c.task_id)
        .join(batches, batches.c.id == tasks.c.batch_id)
        .where(assignments.c.account_id == account.id)
        .order_by(assignments.c.touched.desc())
      )
      listed = {'open': [], 'submitted': [], 'skipped': [], 'expired': []}
      for row in rows:
        listed[row.state].append(row)
    ordered = sorted(seconds)
    return {
      'done': len(ordered),
      'today': today,
      'median': ordered[len(ordered) // 2] if ordered else None,
      'open': listed['open'],
      # What was begun is not lost to sight.
      'late': [row for row in listed['expired'] if row.draft],
      'last': listed['submitted'][:20],
      'skipped': len(listed['skipped']),
    }


# --- Back-up ----------------------------------------------------------------


def backup_name(path: str) -> str:
  """The file that `backup` writes: the path, with .gz at its end."""
  return path if path.endswith('.gz') else f'{path}.gz'


def backup(engine: sa.Engine, path: str) -> int:
  """Writes every row to a gzipped JSONL file; returns how many.

  One consistent snapshot, readable into SQLite or PostgreSQL by `restore`.

  Raises:
    StoreError: the file exists, or cannot be written.
  """
  name = epath.Path(backup_name(path))
  if name.exists():
    raise StoreError(f'{name} exists; give another name, or move it away')
  options = (
    {}
    if engine.dialect.name == 'sqlite'
    else {'isolation_level': 'REPEATABLE READ'}
  )
  lines = []
  with engine.execution_options(**options).connect() as connection:
    version = _revision(connection)
    for table in schema.metadata.sorted_tables:
      for row in connection.execute(sa.select(table)):
        lines.append(json.dumps([table.name, dict(row._mapping)]))
  header = {'format': _BACKUP_FORMAT, 'revision': version, 'rows': len(lines)}
  content = '\n'.join([json.dumps(header), *lines, ''])
  try:
    records.write_bytes(name, content.encode())
  except OSError as error:
    raise StoreError(f'{name} cannot be written: {error.strerror}') from error
  return len(lines)


def _read_backup(path: str) -> tuple[str, list[tuple[int, str, dict]]]:
  """(revision, (line, table, values) of each row) of a whole back-up."""
  try:
    content = gzip.decompress(epath.Path(path).read_bytes())
  except FileNotFoundError as error:
    raise StoreError(f'{path}: no such file') from error
  except (OSError, EOFError, zlib.error) as error:
    raise StoreError(
      f'{path}: not a back-up of this site, or a damaged one ({error})'
    ) from error
  lines = content.split(b'\n')
  try:
    header = json.loads(lines[0])
    if header['format'] != _BACKUP_FORMAT:
      raise ValueError(f'its format is {header["format"]!r}')
    version = str(header['revision'])
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise StoreError(f'{path}: not a back-up of this site ({error})') from error
  _check_revision(version, path)
  rows = []
  for number, line in enumerate(lines[1:], start=2):
    if not line:
      continue
    try:
      name, values = json.loads(line)
      rows.append((number, str(name), dict(values)))
    except (ValueError, TypeError, RecursionError) as error:
      raise StoreError(f'{path}: line {number} is damaged ({error})') from error
  expected = header.get('rows', len(rows))
  if len(rows) != expected:
    raise StoreError(
      f'{path}: damaged: holds {len(rows)} of {expected} rows; take another '
      'copy'
    )
  return version, rows


def _problem(table: sa.Table | None, values: dict) -> str:
  """Why values cannot be a row of a table; '' if nothing speaks against it."""
  if table is None:
    return 'no such table'
  if set(values) != set(table.c.keys()):
    different = ', '.join(sorted(set(values) ^ set(table.c.keys())))
    return f'missing or unknown columns of {table.name}: {different}'
  for name, column in table.c.items():
    if isinstance(column.type, sa.JSON):
      continue
    wanted = column.type.python_type
    wanted = (int, float) if wanted is float else (wanted,)
    value = values[name]
    # A bool is an int to Python; SQLite takes anything.
    fits = type(value) in wanted or (value is None and column.nullable)
    if not fits:
      return f'{table.name}.{name} is {value!r:.40}'
  return ''


def restore(engine: sa.Engine, path: str) -> int:
  """Fills an empty database from `backup`'s file; returns the row count.

  One transaction: whatever goes wrong, the database is as empty as before.

  Raises:
    StoreError: the database is not empty; the file is no back-up, is damaged,
      or is a newer program's.
  """
  version, rows = _read_backup(path)
  with engine.execution_options(immediate=True).begin() as connection:
    if sa.inspect(connection).get_table_names():
      raise StoreError('the database is not empty; restore into a new one')
    command.upgrade(_migrations(connection), version)
    tables = sa.MetaData()  # As they were in the version of the back-up.
    tables.reflect(connection)
    for number, name, values in rows:
      table = tables.tables.get(name)
      problem = _problem(table, values)
      try:
        if not problem:
          connection.execute(table.insert().values(**values))
      except sa.exc.OperationalError:
        raise  # The database is at fault, not the row.
      # OverflowError and ValueError: the driver's, of numbers and texts.
      except (sa.exc.StatementError, OverflowError, ValueError) as error:
        problem = str(getattr(error, 'orig', error)).split('\n')[0]
      if problem:
        raise StoreError(
          f'{path}: line {number} is damaged ({problem}); nothing was restored'
        )
    command.upgrade(_migrations(connection), 'head')
    if engine.dialect.name == 'postgresql':
      for table in schema.metadata.sorted_tables:
        if 'id' in table.c:
          connection.exec_driver_sql(
            f"SELECT setval(pg_get_serial_sequence('{table.name}', 'id'), "
            f'(SELECT coalesce(max(id), 0) + 1 FROM {table.name}), false)'
          )
  return len(rows)
