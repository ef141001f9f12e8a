"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = '0001'
down_revision = None

INT, TEXT, TIME = sa.Integer, sa.Text, sa.Double
JSON, BOOL = sa.JSON, sa.Boolean


def _create(table, /, *unique, nullable='', **columns):
  """Creates a table whose first column is its key.

  Args:
    table: its name.
    *unique: groups of columns, each with a unique constraint.
    nullable: name of the one column that may be NULL.
    **columns: types; a string names the table whose id the column holds.
  """
  foreign = {k: v for k, v in sorted(columns.items()) if isinstance(v, str)}
  op.create_table(
    table,
    *(
      sa.Column(k, INT if k in foreign else v, nullable=k == nullable)
      for k, v in columns.items()
    ),
    *(
      sa.ForeignKeyConstraint([k], [f'{v}.id'], name=op.f(f'fk_{table}_{k}'))
      for k, v in foreign.items()
    ),
    sa.PrimaryKeyConstraint(next(iter(columns)), name=op.f(f'pk_{table}')),
    *(
      sa.UniqueConstraint(*group, name=op.f('_'.join(['uq', table, *group])))
      for group in unique
    ),
  )


def upgrade():
  _create(
    'accounts', ['name'],
    id=INT, name=TEXT, role=TEXT, status=TEXT, created=TIME,
  )  # fmt: skip
  _create(
    'batches', ['name'],
    id=INT, name=TEXT, kind=TEXT, phase=TEXT, overlap=INT, screening=BOOL,
    closed=BOOL, created=TIME,
  )  # fmt: skip
  _create(
    'instructions', ['phase', 'version'],
    id=INT, phase=TEXT, version=INT, text=TEXT, created=TIME,
  )  # fmt: skip
  _create(
    'audit', nullable='account_id',
    id=INT, time=TIME, account_id='accounts', action=TEXT, detail=TEXT,
  )  # fmt: skip
  _create(
    'invitations', nullable='used',
    token_hash=TEXT, account_id='accounts', expires=TIME, used=TIME,
  )  # fmt: skip
  _create(
    'sessions',
    token_hash=TEXT, account_id='accounts', csrf=TEXT, created=TIME,
    expires=TIME,
  )  # fmt: skip
  _create('tasks', id=INT, batch_id='batches', prompt=TEXT, record=JSON)
  _create(
    'assignments', ['task_id', 'account_id'],
    id=INT, task_id='tasks', account_id='accounts', state=TEXT, claimed=TIME,
    expires=TIME, touched=TIME, seconds=TIME, order=JSON, draft=JSON,
    reason=TEXT,
  )  # fmt: skip
  _create(
    'outputs', ['task_id', 'position'],
    id=INT, task_id='tasks', position=INT, text=TEXT, model=TEXT,
  )  # fmt: skip
  _create(
    'slots', ['task_id', 'holder'], ['task_id', 'number'], nullable='holder',
    id=INT, task_id='tasks', number=INT, holder='accounts',
  )  # fmt: skip
  _create(
    'answers', ['assignment_id', 'revision'], ['submission'],
    id=INT, assignment_id='assignments', revision=INT, submission=TEXT,
    content=JSON, instruction_id='instructions', time=TIME, seconds=TIME,
  )  # fmt: skip
  _create('flags', id=INT, assignment_id='assignments', text=TEXT, time=TIME)
  _create(
    'grades', ['assignment_id', 'account_id'],
    id=INT, assignment_id='assignments', account_id='accounts', grade=INT,
  )  # fmt: skip
  for table, columns in (
    ('sessions', ['account_id']),
    ('tasks', ['batch_id']),
    ('assignments', ['account_id']),
    ('assignments', ['state', 'expires']),
  ):
    op.create_index(op.f('_'.join(['ix', table, *columns])), table, columns)
  free = sa.text('holder IS NULL')
  op.create_index(
    'free_slots',
    'slots',
    ['task_id'],
    sqlite_where=free,
    postgresql_where=free,
  )
