"""Calibration, suggestions, priorities and decisions."""

import sqlalchemy as sa
from alembic import op

revision = '0002'
down_revision = '0001'


def upgrade():
  for name in ('calibration', 'suggestions'):
    op.add_column(
      'batches',
      sa.Column(name, sa.Boolean, nullable=False, server_default=sa.false()),
    )
  op.add_column('tasks', sa.Column('priority', sa.Double))
  op.add_column('assignments', sa.Column('suggested', sa.Double))
  foreign = {'task_id': 'tasks', 'account_id': 'accounts'}
  foreign |= {'instruction_id': 'instructions'}
  op.create_table(
    'decisions',
    sa.Column('id', sa.Integer, nullable=False),
    *(sa.Column(name, sa.Integer, nullable=False) for name in foreign),
    sa.Column('ranks', sa.JSON, nullable=False),
    sa.Column('note', sa.Text, nullable=False),
    sa.Column('time', sa.Double, nullable=False),
    *(
      sa.ForeignKeyConstraint(
        [name], [f'{table}.id'], name=op.f(f'fk_decisions_{name}')
      )
      for name, table in foreign.items()
    ),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_decisions')),
    sa.UniqueConstraint('task_id', name=op.f('uq_decisions_task_id')),
  )
