"""The database of the labeling site: connections, people, and their work.

Every public method is one transaction. SQLite writes begin with BEGIN
IMMEDIATE and are on disk before they return (WAL, synchronous=FULL), so an
acknowledged write survives SIGKILL.
"""

import gzip
import hashlib
import json
import pathlib
import secrets
import statistics
import time
import unicodedata
import zlib
from collections.abc import Callable
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
USED_LINK = (
  'This link was used before or has expired. Please ask for a new one.'
)
_OLD_PAGE = 'This page is too old. Please open the task again.'
_PRAGMAS = (
  'journal_mode=WAL', 'synchronous=FULL', 'foreign_keys=ON',
  'busy_timeout=60000',
)  # fmt: skip

accounts, sessions = schema.accounts, schema.sessions
batches, tasks, slots = schema.batches, schema.tasks, schema.slots
assignments, invitations = schema.assignments, schema.invitations


class StoreError(ValueError):
  """A request that cannot be granted; whoever asked may see the message."""


def validate(config) -> None:
  """Checks the settings before anything is opened.

  Raises:
    StoreError: a bad value; says the key, the value and what to do.
  """
  for key in (
    'session_days', 'invitation_days', 'task_minutes', 'idle_minutes',
    'requests_per_minute', 'joins_per_minute', 'max_body_bytes',
    'max_import_bytes', 'overlap', 'calibration_every', 'demo_tasks',
  ):  # fmt: skip
    if config[key] <= 0:
      raise StoreError(f'{key} must be positive: {config[key]}')
  if config.active.batch_size <= 0:
    raise StoreError(
      f'active.batch_size must be positive: {config.active.batch_size}'
    )
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
  """Another account took the slot first."""


def _hash(token: str) -> str:
  return hashlib.sha256(token.encode()).hexdigest()


def given(text: str, what: str, missing: str) -> str:
  """A posted text, cleaned; raises `StoreError(missing)` if it is blank."""
  text = answers.clean(text, what).strip()
  if invisible.is_blank(text):
    raise StoreError(missing)
  return text


def pseudonym(name: str) -> str:
  """The name of an account as it is stored.

  Raises:
    StoreError: it is unusable, say because it is an e-mail address.
  """
  name = unicodedata.normalize('NFC', name).strip()
  if (
    not 1 <= len(name) <= 40
    or not name.replace('-', '').isalnum()
    or invisible.HIDDEN.search(name)  # Some of these count as letters.
  ):
    raise StoreError(
      f'A name has 1 to 40 letters, digits and hyphens: {name[:60]!r}'
    )
  return name


def make_engine(url: str) -> sa.Engine:
  """An engine with real transactions, also on SQLite."""
  if not url.startswith('sqlite'):
    return sa.create_engine(url, pool_pre_ping=True, pool_size=20)
  driver = {'timeout': 60, 'check_same_thread': False}
  engine = sa.create_engine(
    url, connect_args=driver, poolclass=sa.pool.QueuePool, pool_size=20
  )

  @sa.event.listens_for(engine, 'connect')
  def _connected(connection, record):
    del record
    connection.isolation_level = None  # `_begin` sends BEGIN, not the driver.
    for pragma in _PRAGMAS:
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
  """Raises `StoreError` if this program has no migration of that name."""
  known = ScriptDirectory.from_config(_migrations())
  try:
    known.get_revision(name)
  except CommandError as error:
    raise StoreError(
      f'{place} has tables of version {name}; this program knows versions up '
      f'to {known.get_current_head()}: use a newer program'
    ) from error


def migrate(engine: sa.Engine, target: str = 'head') -> None:
  """Brings the tables to a revision, the newest by default (Alembic).

  Raises:
    StoreError: the tables are of a newer version than this program's.
  """
  with engine.begin() as connection:
    found = revision(connection)
    if found is not None:
      _check_revision(found, 'the database')
    command.upgrade(_migrations(connection), target)


def revision(connection: sa.Connection) -> str | None:
  """The revision of the tables; None for an empty database."""
  return MigrationContext.configure(connection).get_current_revision()


class Store:
  """Reads and writes people and their tasks.

  Attributes:
    config: as in configs/labeling.py.
    engine: the database's engine.
    clock: seconds since 1970.
    read: opens a connection for reading, in a `with` statement.
    write: begins a writing transaction, in a `with` statement.
  """

  def __init__(
    self, engine: sa.Engine, config, clock: Callable[[], float] = time.time
  ):
    self.engine = engine
    self.config = config
    self.clock = clock
    self.read = engine.connect
    self.write = engine.execution_options(immediate=True).begin

  # --- People -------------------------------------------------------------

  def audit(self, connection, account_id, action: str, detail: str = ''):
    """Logs what an account did, or the site itself (None)."""
    schema.insert(
      connection,
      schema.audit,
      time=self.clock(),
      account_id=account_id,
      action=action,
      detail=detail,
    )

  def add_account(self, name, role, status, by=None) -> int:
    """Adds a pseudonymous account; returns its id.

    Raises:
      StoreError: the name is taken or unusable, or there is no such role.
    """
    name = pseudonym(name)
    if role not in ('labeler', 'researcher', 'admin'):
      raise StoreError(f'No such role: {role!r}')
    if status not in ('screening', 'active'):
      raise StoreError(f'No such status: {status!r}')
    with self.write() as c:
      if c.scalar(sa.select(accounts.c.id).filter_by(name=name)):
        raise StoreError(f'The name {name} is taken')
      values = {'name': name, 'role': role, 'status': status}
      account_id = schema.insert(c, accounts, created=self.clock(), **values)
      self.audit(c, by, 'account', f'{name}: {role}, {status}')
    return account_id

  def set_status(self, account_id: int, status: str, by: int) -> None:
    """Admits or suspends an account.

    Suspension ends its sessions and frees its open tasks.
    """
    if status not in ('screening', 'active', 'suspended'):
      raise StoreError(f'No such status: {status!r}')
    if account_id == by:
      raise StoreError('You cannot change your own status')
    with self.write() as c:
      if not schema.update(c, accounts, account_id, status=status):
        raise StoreError('No such account')
      if status == 'suspended':
        for table in (sessions, invitations):
          c.execute(table.delete().filter_by(account_id=account_id))
        # Waits for an answer that is being submitted.
        self._expire(c, assignments.c.account_id == account_id)
      self.audit(c, by, 'status', f'account {account_id}: {status}')

  def invite(self, account_id: int, by: int | None = None) -> str:
    """Returns a token for one sign-in; earlier unused ones stop working."""
    token = secrets.token_urlsafe(32)
    with self.write() as c:
      account = self._account(c, account_id)
      if account.status == 'suspended':
        raise StoreError(f'{account.name} is suspended')
      c.execute(
        invitations.delete().filter_by(account_id=account_id, used=None)
      )
      schema.insert(
        c,
        invitations,
        token_hash=_hash(token),
        account_id=account_id,
        expires=self.clock() + self.config.invitation_days * 86400,
      )
      self.audit(c, by, 'invite', account.name)
    return token

  def _account(self, connection, account_id, lock=False):
    query = sa.select(accounts).filter_by(id=account_id)
    if lock:
      # Others may still insert rows that refer to this one.
      query = query.with_for_update(key_share=True)
    account = connection.execute(query).first()
    if account is None:
      raise StoreError('No such account')
    return account

  def invitation_is_good(self, token: str) -> bool:
    """Whether `join` would accept a token now."""
    with self.read() as c:
      return self._invited(c, token) is not None

  def _invited(self, connection, token):
    """Id of the account that an unused invitation is for, or None."""
    return connection.scalar(
      sa.select(invitations.c.account_id)
      .filter_by(token_hash=_hash(token), used=None)
      .where(invitations.c.expires > self.clock())
    )

  def join(self, token: str, leaving: str = '') -> str:
    """Uses up an invitation; returns the token of a new session.

    The account's earlier sessions end in all browsers. So does the session with
    the token `leaving`, this browser's own, even if it is another account's.

    Raises:
      StoreError: the link was used, has expired or never existed.
    """
    session = secrets.token_urlsafe(32)
    now = self.clock()
    with self.write() as c:
      account_id = self._invited(c, token)
      # `used=None` decides between two simultaneous clicks.
      unused = invitations.update().filter_by(
        token_hash=_hash(token), used=None
      )
      if account_id is None or not c.execute(unused.values(used=now)).rowcount:
        raise StoreError(USED_LINK)
      c.execute(
        sessions.delete().where(
          (sessions.c.account_id == account_id)
          | (sessions.c.token_hash == _hash(leaving))
          | (sessions.c.expires < now)
        )
      )
      schema.insert(
        c,
        sessions,
        token_hash=_hash(session),
        account_id=account_id,
        csrf=secrets.token_urlsafe(24),
        created=now,
        expires=now + self.config.session_days * 86400,
      )
      self.audit(c, account_id, 'join')
    return session

  def session(self, token: str):
    """The account of a live session with its `csrf`, or None."""
    with self.read() as c:
      return c.execute(
        sa.select(accounts, sessions.c.csrf)
        .join(sessions)
        .where(
          sessions.c.token_hash == _hash(token),
          sessions.c.expires > self.clock(),
          accounts.c.status != 'suspended',
        )
      ).first()

  def leave(self, token: str) -> None:
    """Ends a session."""
    with self.write() as c:
      c.execute(sessions.delete().filter_by(token_hash=_hash(token)))

  # --- Instructions -------------------------------------------------------

  def publish_instructions(self, phase: str, text: str, by=None) -> int:
    """Adds a version of a phase's instructions; returns its number."""
    missing = 'Instructions need a phase and a text'
    text = given(text, 'The page', missing)
    if phase not in answers.PHASES:
      raise StoreError(missing)
    with self.write() as c:
      last = self.newest_instructions(c, phase)
      version = last.version + 1 if last else 1
      schema.insert(
        c,
        schema.instructions,
        phase=phase,
        version=version,
        text=text,
        created=self.clock(),
      )
      self.audit(c, by, 'instructions', f'{phase} {version}')
    return version

  def instructions(self, phase: str):
    """The newest version of a phase's instructions, or None."""
    with self.read() as c:
      return self.newest_instructions(c, phase)

  def newest_instructions(self, connection, phase: str, *where):
    """As `instructions`, on an open connection, under more conditions."""
    table = schema.instructions
    return connection.execute(
      sa.select(table)
      .filter_by(phase=phase)
      .where(*where)
      .order_by(table.c.version.desc())
      .limit(1)
    ).first()

  def prepare(self) -> None:
    """Creates missing tables and version 1 of missing instructions."""
    migrate(self.engine)
    for phase in answers.PHASES:
      if self.instructions(phase) is None:
        path = _HERE / 'instructions' / f'{phase}.txt'
        self.publish_instructions(phase, path.read_text('utf-8'))

  # --- Work ---------------------------------------------------------------

  def _release(self, connection, work, state, reason=''):
    """Ends an assignment and returns its slot to the pool."""
    values = {'state': state, 'reason': reason}
    schema.update(connection, assignments, work['id'], **values)
    held = slots.update().filter_by(
      task_id=work['task_id'], holder=work['account_id']
    )
    connection.execute(held.values(holder=None))

  def _expire(self, connection, condition, skip_locked=False):
    """Expires the open assignments that meet a condition; returns their ids."""
    found = connection.execute(
      sa.select(assignments.c['id', 'task_id', 'account_id'])
      .where(assignments.c.state == 'open', condition)
      .order_by(assignments.c.id)
      .with_for_update(skip_locked=skip_locked)
    )
    found = found.mappings().all()
    for work in found:
      self._release(connection, work, 'expired')
    return [work['id'] for work in found]

  def release_expired(self) -> int:
    """Returns tasks left open too long to the pool; returns how many."""
    late = assignments.c.expires < self.clock()
    is_open = assignments.c.state == 'open'
    with self.read() as c:
      query = sa.select(assignments.c.id).where(is_open, late).limit(1)
      if c.scalar(query) is None:
        return 0
    with self.write() as c:
      # A locked assignment is being saved, so it is not abandoned.
      ids = self._expire(c, late, skip_locked=True)
      for assignment_id in ids:
        self.audit(c, None, 'expired', f'assignment {assignment_id}')
    return len(ids)

  def claim(self, account) -> int | None:
    """Claims an account's next task; returns its assignment's id, or None.

    An account with an open task in an open batch gets that one. Labelers get
    free slots of open batches: tasks that they had started come first, then
    earlier batches, then higher priorities. Labelers in screening get all
    screening tasks. About one in `calibration_every` of the other labelers'
    tasks has a known answer, as long as there are any. Researchers get all
    tasks but calibration, screening first, and do not count in the overlap.

    Raises:
      StoreError: the account was suspended, or the site is too busy.
    """
    self.release_expired()
    for _ in range(_CLAIM_TRIES):
      try:
        with self.write() as c:
          return self._claim(c, account)
      # On PostgreSQL two may see the same free slot; the constraint stops one.
      except (_TakenError, sa.exc.IntegrityError):
        continue
    raise StoreError('The site is very busy. Please try again.')

  def _claim(self, connection, account):
    # Reads the account again, and serializes the claims of one account.
    account = self._account(connection, account.id, lock=True)
    if account.status == 'suspended':
      raise StoreError('This account is suspended')
    opened = self._opened(connection, account.id)
    if opened is not None:
      return opened
    own = sa.select(assignments.c.id).where(
      assignments.c.task_id == tasks.c.id,
      assignments.c.account_id == account.id,
    )
    done = own.where(assignments.c.state != 'expired')
    query = (
      sa.select(tasks.c.id.label('task_id'))
      .join(batches)
      .where(~done.exists(), ~batches.c.closed)
      .order_by(
        batches.c.screening.desc(),
        sa.case((own.exists(), 0), else_=1),
        batches.c.id,
        sa.func.coalesce(tasks.c.priority, 0.0).desc(),
        tasks.c.id,
      )
      .limit(1)
    )
    in_screening = account.status == 'screening'
    if account.role == 'labeler':
      query = query.where(batches.c.screening == in_screening)
    counts = account.role == 'labeler' and not in_screening
    if counts and self._calibrates(connection, account.id):
      found = connection.execute(query.where(batches.c.calibration)).first()
      if found is not None:
        self._hold_uncounted(connection, found.task_id, account.id)
        return self._assign(connection, found.task_id, account.id)
    query = query.where(~batches.c.calibration)
    if counts:
      query = (
        query.join(slots)
        .where(slots.c.holder.is_(None), slots.c.number > 0)
        .add_columns(slots.c.id.label('slot_id'))
        .with_for_update(skip_locked=True, of=slots)
      )
    found = connection.execute(query).first()
    if found is None:
      return None
    if counts:
      self._hold(connection, found.slot_id, account.id)
    else:
      self._hold_uncounted(connection, found.task_id, account.id)
    return self._assign(connection, found.task_id, account.id)

  def _calibrates(self, connection, account_id):
    """Whether an account's next task has a known answer, if any are left.

    Labelers cannot predict it: the draw is pseudo-random, keyed by account and
    number of assignments.
    """
    number = connection.scalar(
      sa.select(sa.func.count())
      .select_from(assignments)
      .filter_by(account_id=account_id)
    )
    parts = ('calibration', str(account_id), str(number))
    drawn = int.from_bytes(records.draw(self.config.seed, *parts), 'big')
    return drawn % self.config.calibration_every == 0

  def _opened(self, connection, account_id):
    """The assignment that an account works on, or None."""
    return connection.scalar(
      sa.select(assignments.c.id)
      .select_from(schema.work)
      .where(
        assignments.c.account_id == account_id,
        assignments.c.state == 'open',
        ~batches.c.closed,
      )
      .order_by(assignments.c.id)
      .limit(1)
    )

  def _hold(self, connection, slot_id, account_id):
    free = slots.update().filter_by(id=slot_id, holder=None)
    if not connection.execute(free.values(holder=account_id)).rowcount:
      raise _TakenError

  def _hold_uncounted(self, connection, task_id, account_id):
    """Takes the account's slot outside the overlap, and adds it if missing."""
    key = {'task_id': task_id, 'number': -account_id}
    slot = connection.scalar(sa.select(slots.c.id).filter_by(**key))
    if slot is None:
      schema.insert(connection, slots, holder=account_id, **key)
    else:
      self._hold(connection, slot, account_id)

  def take_slot(self, connection, task_id: int, account_id: int) -> None:
    """Gives a task's first free slot to an account.

    Without a free slot, the account gets one outside the overlap.
    """
    slot = connection.scalar(
      sa.select(slots.c.id)
      .filter_by(task_id=task_id, holder=None)
      .where(slots.c.number > 0)
      .order_by(slots.c.number)
      .limit(1)
    )
    if slot is None:
      self._hold_uncounted(connection, task_id, account_id)
    else:
      self._hold(connection, slot, account_id)

  def _assign(self, connection, task_id, account_id):
    now = self.clock()
    values = {
      'state': 'open',
      'claimed': now,
      'touched': now,
      'expires': now + self.config.task_minutes * 60,
    }
    key = {'task_id': task_id, 'account_id': account_id}
    again = connection.scalar(sa.select(assignments.c.id).filter_by(**key))
    if again is not None:  # It had expired; order and draft are still there.
      schema.update(connection, assignments, again, **values)
      return again
    order = list(range(len(self._texts(connection, task_id))))
    secrets.SystemRandom().shuffle(order)
    values |= {'seconds': 0.0, 'order': order, 'draft': {}, 'reason': ''}
    return schema.insert(connection, assignments, **key, **values)

  def _texts(self, connection, task_id):
    return connection.scalars(
      sa.select(schema.outputs.c.text)
      .filter_by(task_id=task_id)
      .order_by(schema.outputs.c.position)
    ).all()

  def work(self, assignment_id: int, account_id: int) -> dict[str, Any] | None:
    """An account's own assignment with its task, or None.

    Returns:
      Columns of the assignment; the batch's kind, phase, screening, closed,
      calibration and suggestions; the task's prompt and record; and `texts`:
      outputs by position.
    """
    with self.read() as c:
      return self._work(c, assignment_id, account_id)

  def _work(self, connection, assignment_id, account_id, lock=False):
    query = (
      sa.select(
        assignments,
        tasks.c['prompt', 'record'],
        batches.c['kind', 'phase', 'screening', 'closed'],
        batches.c['calibration', 'suggestions'],
      )
      .select_from(schema.work)
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
    return {**row._mapping, 'texts': self._texts(connection, row.task_id)}

  def _own(self, connection, assignment_id, account_id):
    work = self._work(connection, assignment_id, account_id, lock=True)
    if work is None:
      raise StoreError('No such task')
    return work

  def _touched(self, work):
    """The columns that change when a labeler works on an assignment."""
    now = self.clock()
    pause = min(now - work['touched'], self.config.idle_minutes * 60)
    found = {'touched': now, 'seconds': work['seconds'] + max(0.0, pause)}
    if work['state'] == 'open':
      found['expires'] = now + self.config.task_minutes * 60
    return found

  def save_draft(
    self, assignment_id: int, account_id: int, page: str, posted: dict
  ) -> dict[str, Any]:
    """Saves one page as posted, complete or not; returns the new `work`.

    An expired task is reopened if it is still free and its labeler has no other
    open task. Otherwise the draft is saved, but the task stays expired.

    Raises:
      StoreError: not this account's task, or skipped.
    """
    with self.write() as c:
      work = self._reopen(c, self._own(c, assignment_id, account_id))
      return self._save(c, work, page, posted)

  def _reopen(self, connection, work):
    """Returns the work, reopened if it had expired and is still free."""
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
    schema.update(connection, assignments, work['id'], state='open')
    return {**work, 'state': 'open'}

  def _save(self, connection, work, page, posted):
    if work['state'] == 'skipped':
      raise StoreError('You skipped this task')
    changes = {'draft': {**work['draft'], page: posted}, **self._touched(work)}
    schema.update(connection, assignments, work['id'], **changes)
    return {**work, **changes}

  def submit(
    self,
    assignment_id: int,
    account_id: int,
    page: str,
    posted: dict,
    submission: str,
  ) -> int:
    """Stores an answer; returns its revision.

    The same `submission` sent again, say because the reply was lost, changes
    nothing. An expired task is accepted while it has a free slot.

    Raises:
      AnswerError: the answer is incomplete; the posted page is saved as draft.
      StoreError: not this account's task, skipped, closed, or no free slot.
    """
    if not 16 <= len(submission) <= 64 or not submission.isalnum():
      raise StoreError(_OLD_PAGE)
    table = schema.answers
    with self.write() as c:
      work = self._own(c, assignment_id, account_id)
      earlier = c.execute(
        sa.select(table).filter_by(submission=submission)
      ).first()
      if earlier is not None:
        if earlier.assignment_id != assignment_id:
          raise StoreError(_OLD_PAGE)
        return earlier.revision
      work = self._save(c, self._reopen(c, work), page, posted)
      try:
        # The draft stays if this savepoint is rolled back.
        with c.begin_nested():
          return self._store_answer(c, work, submission)
      except (answers.AnswerError, StoreError) as error:
        failure = error
    raise failure

  def _store_answer(self, connection, work, submission):
    if work['closed']:
      raise StoreError('This batch is closed. Your text was saved as a draft.')
    content = answers.content(work)
    if work['state'] == 'expired':
      self._regain(connection, work)
    table = schema.answers
    newest = sa.select(sa.func.max(table.c.revision))
    last = connection.scalar(newest.filter_by(assignment_id=work['id']))
    number = (last or 0) + 1
    schema.insert(
      connection,
      table,
      assignment_id=work['id'],
      revision=number,
      submission=submission,
      content=content,
      instruction_id=self._instructions_of(connection, work),
      time=self.clock(),
      seconds=work['seconds'],
    )
    schema.update(connection, assignments, work['id'], state='submitted')
    return number

  def _instructions_of(self, connection, work):
    """The id of the instructions that an answer counts under.

    A revision counts under the version of the first answer. A first answer
    counts under the version that was the newest when its labeler opened the
    task. If the task was opened elsewhere, before this site had instructions,
    it counts under the newest version.
    """
    table, phase = schema.answers, work['phase']
    first = connection.scalar(
      sa.select(table.c.instruction_id).filter_by(
        assignment_id=work['id'], revision=1
      )
    )
    if first is not None:
      return first
    opened = schema.instructions.c.created <= work['claimed']
    found = self.newest_instructions(connection, phase, opened)
    return (found or self.newest_instructions(connection, phase)).id

  def _regain(self, connection, work):
    """Takes a slot for an expired assignment, or raises `StoreError`."""
    account = self._account(connection, work['account_id'])
    try:
      is_counted = not (work['screening'] or work['calibration'])
      if account.role != 'labeler' or not is_counted:
        return self._hold_uncounted(connection, work['task_id'], account.id)
      slot = connection.scalar(
        sa.select(slots.c.id)
        .filter_by(task_id=work['task_id'], holder=None)
        .where(slots.c.number > 0)
        .limit(1)
        .with_for_update(skip_locked=True)
      )
      if slot is None:
        raise _TakenError
      self._hold(connection, slot, account.id)
    except _TakenError as error:
      raise StoreError(
        'This task was open for too long and went to somebody else. Your '
        'answer was saved as a draft but does not count.'
      ) from error

  def skip(self, assignment_id: int, account_id: int, reason: str) -> None:
    """Gives up a task for good, with the reason; even after it expired.

    The same skip again changes nothing; another reason replaces the first.

    Raises:
      StoreError: not this account's task, already answered, or no reason.
    """
    with self.write() as c:
      work = self._own(c, assignment_id, account_id)
      if work['state'] == 'submitted':
        raise StoreError('You have answered this task already')
      missing = 'Please say why you skip this task'
      reason = given(reason, 'The reason', missing)
      if (work['state'], work['reason']) == ('skipped', reason):
        return
      # If the task expired and somebody else holds its slot, they keep it.
      self._release(c, work, 'skipped', reason)
      self.audit(c, account_id, 'skip', f'assignment {assignment_id}')

  def flag(self, assignment_id: int, account_id: int, text: str) -> None:
    """Tells the researchers that something is wrong with a task."""
    with self.write() as c:
      work = self._own(c, assignment_id, account_id)
      text = given(text, 'The note', 'Please say what is wrong')
      schema.update(c, assignments, assignment_id, **self._touched(work))
      schema.insert(
        c,
        schema.flags,
        assignment_id=assignment_id,
        text=text,
        time=self.clock(),
      )
      self.audit(c, account_id, 'flag', f'assignment {assignment_id}')

  def suggestion_shown(self, assignment_id: int) -> None:
    """Records the time when a labeler first sees a task's suggestion."""
    with self.write() as c:
      unseen = assignments.update().filter_by(id=assignment_id, suggested=None)
      c.execute(unseen.values(suggested=self.clock()))

  def own_progress(self, account) -> dict[str, Any]:
    """What a labeler sees of their own work: counts, pace, tasks."""
    table = schema.answers
    mine = assignments.c.account_id == account.id
    with self.read() as c:
      done = c.execute(
        sa.select(table.c.seconds, table.c.time)
        .join(assignments)
        .where(mine, table.c.revision == 1)
      ).all()
      rows = c.execute(
        sa.select(assignments, tasks.c.prompt, batches.c.kind, batches.c.closed)
        .select_from(schema.work)
        .where(mine)
        .order_by(assignments.c.touched.desc())
      ).all()
    return {
      'done': len(done),
      'today': sum(row.time > self.clock() - 86400 for row in done),
      'median': median([row.seconds for row in done]),
      'skipped': sum(row.state == 'skipped' for row in rows),
      'tasks': rows,
    }


def median(values: list[float]) -> float | None:
  """The median, the upper of two middle values; None for an empty list."""
  return statistics.median_high(values) if values else None


# --- Back-up ----------------------------------------------------------------


def backup_name(path: str) -> str:
  """The file that `backup` writes: the path, with .gz at its end."""
  return path if path.endswith('.gz') else f'{path}.gz'


def backup(engine: sa.Engine, path: str) -> int:
  """Writes every row to a gzipped JSONL file; returns how many.

  `restore` reads this consistent snapshot into SQLite or PostgreSQL.

  Raises:
    StoreError: the file exists, or cannot be written.
  """
  name = epath.Path(backup_name(path))
  if name.exists():
    raise StoreError(f'{name} exists; give another name, or move it away')
  if engine.dialect.name != 'sqlite':
    engine = engine.execution_options(isolation_level='REPEATABLE READ')
  with engine.connect() as connection:
    version = revision(connection)
    lines = [
      json.dumps([table.name, dict(row)])
      for table in schema.metadata.sorted_tables
      for row in connection.execute(sa.select(table)).mappings()
    ]
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
  """Why values cannot be a row of a table; '' if they can."""
  if table is None:
    return 'no such table'
  different = set(values) ^ set(table.c.keys())
  if different:
    names = ', '.join(sorted(different))
    return f'missing or unknown columns of {table.name}: {names}'
  for name, column in table.c.items():
    if isinstance(column.type, sa.JSON):
      continue
    wanted = column.type.python_type
    wanted = (int, float) if wanted is float else (wanted,)
    value = values[name]
    # Exact types: Python counts a bool as int, and SQLite takes anything.
    if type(value) not in wanted and not (value is None and column.nullable):
      return f'{table.name}.{name} is {value!r:.40}'
  return ''


def restore(engine: sa.Engine, path: str) -> int:
  """Fills an empty database from `backup`'s file; returns the row count.

  One transaction: if anything goes wrong, the database is still empty.

  Raises:
    StoreError: the database is not empty; the file is not a back-up, is
      damaged, or was written by a newer program.
  """
  version, rows = _read_backup(path)
  with engine.execution_options(immediate=True).begin() as connection:
    if sa.inspect(connection).get_table_names():
      raise StoreError('the database is not empty; restore into a new one')
    command.upgrade(_migrations(connection), version)
    tables = sa.MetaData()  # The tables of the back-up's version.
    tables.reflect(connection)
    for number, name, values in rows:
      table = tables.tables.get(name)
      problem = _problem(table, values)
      try:
        if not problem:
          connection.execute(table.insert().values(**values))
      except sa.exc.OperationalError:
        raise  # A failure of the database, not of the row.
      # The driver raises OverflowError for numbers and ValueError for texts.
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
