"""The tables of the labeling site.

Times are seconds since 1970 in UTC. Tokens are stored as SHA-256 hashes; they
are long and random, so a slow hash would add nothing. Constraints enforce what
must always hold: a task has as many `slots` as labelers are wanted, a slot has
one holder, a labeler holds at most one slot of a task, and a submission is
stored once.
"""

import functools

import sqlalchemy as sa

# The fields of an imported line that are kept as a task's `record`.
RECORD_FIELDS = (
  'id', 'user', 'category', 'metadata', 'style', 'turns', 'ended', 'suggestion',
  'known_ranks',
)  # fmt: skip

metadata = sa.MetaData(
  naming_convention={
    'ix': 'ix_%(table_name)s_%(column_0_N_name)s',
    'uq': 'uq_%(table_name)s_%(column_0_N_name)s',
    'fk': 'fk_%(table_name)s_%(column_0_N_name)s',
    'pk': 'pk_%(table_name)s',
  }
)


def _table(name, *columns):
  key = sa.Column('id', sa.Integer, primary_key=True)
  return sa.Table(name, metadata, key, *columns)


def _to(table, column=None, nullable=False, index=False):
  """A column with an id of a table; by default, the singular names it."""
  return sa.Column(
    column or f'{table.removesuffix("s")}_id',
    sa.ForeignKey(f'{table}.id'),
    nullable=nullable,
    index=index,
  )


def _column(kind, name, nullable=False):
  return sa.Column(name, kind, nullable=nullable)


_text, _integer, _time, _json, _bool = (
  functools.partial(_column, kind)
  for kind in (sa.Text, sa.Integer, sa.Double, sa.JSON, sa.Boolean)
)

accounts = _table(
  'accounts',
  _text('name'),  # A pseudonym; the site asks for nothing else.
  _text('role'),  # labeler, researcher or admin.
  _text('status'),  # screening, active or suspended.
  _time('created'),
  sa.UniqueConstraint('name'),
)

invitations = sa.Table(
  'invitations',
  metadata,
  sa.Column('token_hash', sa.Text, primary_key=True),
  _to('accounts'),
  _time('expires'),
  _time('used', nullable=True),
)

sessions = sa.Table(
  'sessions',
  metadata,
  sa.Column('token_hash', sa.Text, primary_key=True),
  _to('accounts', index=True),
  _text('csrf'),
  _time('created'),
  _time('expires'),
)

instructions = _table(
  'instructions',
  _text('phase'),  # training, evaluation, toxicity or imported.
  _integer('version'),
  _text('text'),
  _time('created'),
  sa.UniqueConstraint('phase', 'version'),
)

batches = _table(
  'batches',
  _text('name'),
  _text('kind'),  # One of answers.KINDS.
  _text('phase'),  # Whose instructions apply.
  _integer('overlap'),  # Labelers per task; not of screening, calibration.
  _bool('screening'),
  _bool('calibration'),  # Whether the tasks have known answers.
  _bool('suggestions'),  # Whether labelers see the tasks' suggestions.
  _bool('closed'),
  _time('created'),
  sa.UniqueConstraint('name'),
)

tasks = _table(
  'tasks',
  _to('batches', 'batch_id', index=True),
  _text('prompt'),
  # `RECORD_FIELDS` of the imported line, and `active`, the source of the
  # priority.
  _json('record'),
  _time('priority', nullable=True),  # Higher is earlier; NULL counts as 0.
)

outputs = _table(
  'outputs',
  _to('tasks'),
  _integer('position'),  # 0 to K - 1, as imported.
  _text('text'),
  _text('model'),  # Never shown to labelers.
  sa.UniqueConstraint('task_id', 'position'),
)

slots = _table(
  'slots',
  _to('tasks'),
  # 1 to overlap. Minus the account's id where the overlap does not apply: for
  # researchers, screening, calibration, and imported answers beyond it.
  _integer('number'),
  _to('accounts', 'holder', nullable=True),
  sa.UniqueConstraint('task_id', 'number'),
  sa.UniqueConstraint('task_id', 'holder'),
)
sa.Index(
  'free_slots',
  slots.c.task_id,
  sqlite_where=slots.c.holder.is_(None),
  postgresql_where=slots.c.holder.is_(None),
)

assignments = _table(
  'assignments',
  _to('tasks'),
  _to('accounts', index=True),
  _text('state'),  # open, expired, skipped or submitted.
  _time('claimed'),
  _time('expires'),
  _time('touched'),  # Last sign of work, for the pace.
  _time('seconds'),  # Worked so far.
  _json('order'),  # Positions in the order shown.
  _json('draft'),
  _text('reason'),  # For a skip.
  _time('suggested', nullable=True),  # When the suggestion was first shown.
  sa.UniqueConstraint('task_id', 'account_id'),
  sa.Index('ix_assignments_state_expires', 'state', 'expires'),
)

answers = _table(
  'answers',
  _to('assignments'),
  _integer('revision'),  # From 1; the last one counts, the others stay.
  _text('submission'),  # The page's own random number, to recognize a resend.
  _json('content'),
  _to('instructions'),
  _time('time'),
  _time('seconds'),
  sa.UniqueConstraint('assignment_id', 'revision'),
  sa.UniqueConstraint('submission'),
)

flags = _table('flags', _to('assignments'), _text('text'), _time('time'))

grades = _table(  # Researchers' grades of screening demonstrations (B.1).
  'grades',
  _to('assignments'),
  _to('accounts'),
  _integer('grade'),
  sa.UniqueConstraint('assignment_id', 'account_id'),
)

decisions = _table(  # Researchers' rankings where labelers disagree.
  'decisions',
  _to('tasks'),
  _to('accounts'),
  _json('ranks'),  # In imported order.
  _text('note'),
  _to('instructions'),
  _time('time'),
  sa.UniqueConstraint('task_id'),
)

audit = _table(
  'audit',
  _time('time'),
  _to('accounts', nullable=True),
  _text('action'),
  _text('detail'),
)

# Every assignment with its task and batch.
work = assignments.join(tasks).join(batches)


def insert(connection: sa.Connection, table: sa.Table, /, **values):
  """Adds a row; returns its key."""
  query = table.insert().values(**values)
  return connection.execute(query).inserted_primary_key[0]


def update(connection: sa.Connection, table: sa.Table, key: int, /, **values):
  """Changes the row with an id; returns the number of such rows, 0 or 1."""
  query = table.update().filter_by(id=key).values(**values)
  return connection.execute(query).rowcount
