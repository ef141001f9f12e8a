"""The tables of the labeling site.

Times are seconds since 1970 in UTC. Tokens are kept as SHA-256 hashes: they are
random and long, so a slow hash would add nothing. What must never happen is
forbidden by constraints and not by code alone: a task has as many `slots` as
labelers are wanted, a slot has one holder, a labeler holds one slot of a task,
and a submission is stored once.
"""

import sqlalchemy as sa

metadata = sa.MetaData(
  naming_convention={
    'ix': 'ix_%(table_name)s_%(column_0_N_name)s',
    'uq': 'uq_%(table_name)s_%(column_0_N_name)s',
    'fk': 'fk_%(table_name)s_%(column_0_N_name)s',
    'pk': 'pk_%(table_name)s',
  }
)


def _id():
  return sa.Column('id', sa.Integer, primary_key=True)


def _to(name, nullable=False, index=False):
  target = {'account': 'accounts', 'holder': 'accounts', 'batch': 'batches'}
  table = target.get(name, f'{name}s')
  column = name if name == 'holder' else f'{name}_id'
  return sa.Column(
    column, sa.ForeignKey(f'{table}.id'), nullable=nullable, index=index
  )


def _text(name):
  return sa.Column(name, sa.Text, nullable=False)


def _time(name, nullable=False):
  return sa.Column(name, sa.Double, nullable=nullable)


def _integer(name):
  return sa.Column(name, sa.Integer, nullable=False)


accounts = sa.Table(
  'accounts',
  metadata,
  _id(),
  _text('name'),  # A pseudonym; nothing else is asked for.
  _text('role'),  # labeler, researcher or admin.
  _text('status'),  # screening, active or suspended.
  _time('created'),
  sa.UniqueConstraint('name'),
)

invitations = sa.Table(
  'invitations',
  metadata,
  sa.Column('token_hash', sa.Text, primary_key=True),
  _to('account'),
  _time('expires'),
  _time('used', nullable=True),
)

sessions = sa.Table(
  'sessions',
  metadata,
  sa.Column('token_hash', sa.Text, primary_key=True),
  _to('account', index=True),
  _text('csrf'),
  _time('created'),
  _time('expires'),
)

instructions = sa.Table(
  'instructions',
  metadata,
  _id(),
  _text('phase'),  # training, evaluation or toxicity.
  _integer('version'),
  _text('text'),
  _time('created'),
  sa.UniqueConstraint('phase', 'version'),
)

batches = sa.Table(
  'batches',
  metadata,
  _id(),
  _text('name'),
  _text('kind'),  # One of answers.KINDS.
  _text('phase'),  # Whose instructions apply.
  _integer('overlap'),  # Labelers a task; a screening batch has no limit.
  sa.Column('screening', sa.Boolean, nullable=False),
  sa.Column('closed', sa.Boolean, nullable=False),
  _time('created'),
  sa.UniqueConstraint('name'),
)

tasks = sa.Table(
  'tasks',
  metadata,
  _id(),
  _to('batch', index=True),
  _text('prompt'),
  # id, user, category, metadata and turns of the imported line; style of a
  # prompt task.
  sa.Column('record', sa.JSON, nullable=False),
)

outputs = sa.Table(
  'outputs',
  metadata,
  _id(),
  _to('task'),
  _integer('position'),  # 0 to K - 1, as imported.
  _text('text'),
  _text('model'),  # Never shown to labelers.
  sa.UniqueConstraint('task_id', 'position'),
)

slots = sa.Table(
  'slots',
  metadata,
  _id(),
  _to('task'),
  # 1 to overlap; minus the account's id where the overlap does not count: for
  # researchers, and in screening batches.
  _integer('number'),
  _to('holder', nullable=True),
  sa.UniqueConstraint('task_id', 'number'),
  sa.UniqueConstraint('task_id', 'holder'),
)
sa.Index(
  'free_slots',
  slots.c.task_id,
  sqlite_where=slots.c.holder.is_(None),
  postgresql_where=slots.c.holder.is_(None),
)

assignments = sa.Table(
  'assignments',
  metadata,
  _id(),
  _to('task'),
  _to('account', index=True),
  _text('state'),  # open, expired, skipped or submitted.
  _time('claimed'),
  _time('expires'),
  _time('touched'),  # Last sign of work, for the pace.
  _time('seconds'),  # Worked on so far.
  sa.Column('order', sa.JSON, nullable=False),  # Positions as shown.
  sa.Column('draft', sa.JSON, nullable=False),
  _text('reason'),  # Of a skip.
  sa.UniqueConstraint('task_id', 'account_id'),
  sa.Index('ix_assignments_state_expires', 'state', 'expires'),
)

answers = sa.Table(
  'answers',
  metadata,
  _id(),
  _to('assignment'),
  _integer('revision'),  # From 1; the last one counts, the others stay.
  _text('submission'),  # The page's own random number: a resend is not new.
  sa.Column('content', sa.JSON, nullable=False),
  _to('instruction'),
  _time('time'),
  _time('seconds'),
  sa.UniqueConstraint('assignment_id', 'revision'),
  sa.UniqueConstraint('submission'),
)

flags = sa.Table(
  'flags',
  metadata,
  _id(),
  _to('assignment'),
  _text('text'),
  _time('time'),
)

grades = sa.Table(  # Researchers' grades of screening demonstrations (B.1).
  'grades',
  metadata,
  _id(),
  _to('assignment'),
  _to('account'),
  _integer('grade'),
  sa.UniqueConstraint('assignment_id', 'account_id'),
)

audit = sa.Table(
  'audit',
  metadata,
  _id(),
  _time('time'),
  sa.Column('account_id', sa.ForeignKey('accounts.id'), nullable=True),
  _text('action'),
  _text('detail'),
)
