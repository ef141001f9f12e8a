"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = '0001'
down_revision = None


def upgrade():
  op.create_table(
    'accounts',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('role', sa.Text(), nullable=False),
    sa.Column('status', sa.Text(), nullable=False),
    sa.Column('created', sa.Double(), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_accounts')),
    sa.UniqueConstraint('name', name=op.f('uq_accounts_name')),
  )
  op.create_table(
    'batches',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('kind', sa.Text(), nullable=False),
    sa.Column('phase', sa.Text(), nullable=False),
    sa.Column('overlap', sa.Integer(), nullable=False),
    sa.Column('screening', sa.Boolean(), nullable=False),
    sa.Column('closed', sa.Boolean(), nullable=False),
    sa.Column('created', sa.Double(), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_batches')),
    sa.UniqueConstraint('name', name=op.f('uq_batches_name')),
  )
  op.create_table(
    'instructions',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('phase', sa.Text(), nullable=False),
    sa.Column('version', sa.Integer(), nullable=False),
    sa.Column('text', sa.Text(), nullable=False),
    sa.Column('created', sa.Double(), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_instructions')),
    sa.UniqueConstraint(
      'phase', 'version', name=op.f('uq_instructions_phase_version')
    ),
  )
  op.create_table(
    'audit',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('time', sa.Double(), nullable=False),
    sa.Column('account_id', sa.Integer(), nullable=True),
    sa.Column('action', sa.Text(), nullable=False),
    sa.Column('detail', sa.Text(), nullable=False),
    sa.ForeignKeyConstraint(
      ['account_id'], ['accounts.id'], name=op.f('fk_audit_account_id')
    ),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_audit')),
  )
  op.create_table(
    'invitations',
    sa.Column('token_hash', sa.Text(), nullable=False),
    sa.Column('account_id', sa.Integer(), nullable=False),
    sa.Column('expires', sa.Double(), nullable=False),
    sa.Column('used', sa.Double(), nullable=True),
    sa.ForeignKeyConstraint(
      ['account_id'], ['accounts.id'], name=op.f('fk_invitations_account_id')
    ),
    sa.PrimaryKeyConstraint('token_hash', name=op.f('pk_invitations')),
  )
  op.create_table(
    'sessions',
    sa.Column('token_hash', sa.Text(), nullable=False),
    sa.Column('account_id', sa.Integer(), nullable=False),
    sa.Column('csrf', sa.Text(), nullable=False),
    sa.Column('created', sa.Double(), nullable=False),
    sa.Column('expires', sa.Double(), nullable=False),
    sa.ForeignKeyConstraint(
      ['account_id'], ['accounts.id'], name=op.f('fk_sessions_account_id')
    ),
    sa.PrimaryKeyConstraint('token_hash', name=op.f('pk_sessions')),
  )
  op.create_index(
    op.f('ix_sessions_account_id'), 'sessions', ['account_id'], unique=False
  )
  op.create_table(
    'tasks',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('batch_id', sa.Integer(), nullable=False),
    sa.Column('prompt', sa.Text(), nullable=False),
    sa.Column('record', sa.JSON(), nullable=False),
    sa.ForeignKeyConstraint(
      ['batch_id'], ['batches.id'], name=op.f('fk_tasks_batch_id')
    ),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_tasks')),
  )
  op.create_index(
    op.f('ix_tasks_batch_id'), 'tasks', ['batch_id'], unique=False
  )
  op.create_table(
    'assignments',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('task_id', sa.Integer(), nullable=False),
    sa.Column('account_id', sa.Integer(), nullable=False),
    sa.Column('state', sa.Text(), nullable=False),
    sa.Column('claimed', sa.Double(), nullable=False),
    sa.Column('expires', sa.Double(), nullable=False),
    sa.Column('touched', sa.Double(), nullable=False),
    sa.Column('seconds', sa.Double(), nullable=False),
    sa.Column('order', sa.JSON(), nullable=False),
    sa.Column('draft', sa.JSON(), nullable=False),
    sa.Column('reason', sa.Text(), nullable=False),
    sa.ForeignKeyConstraint(
      ['account_id'], ['accounts.id'], name=op.f('fk_assignments_account_id')
    ),
    sa.ForeignKeyConstraint(
      ['task_id'], ['tasks.id'], name=op.f('fk_assignments_task_id')
    ),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_assignments')),
    sa.UniqueConstraint(
      'task_id', 'account_id', name=op.f('uq_assignments_task_id_account_id')
    ),
  )
  op.create_index(
    op.f('ix_assignments_account_id'),
    'assignments',
    ['account_id'],
    unique=False,
  )
  op.create_index(
    'ix_assignments_state_expires',
    'assignments',
    ['state', 'expires'],
    unique=False,
  )
  op.create_table(
    'outputs',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('task_id', sa.Integer(), nullable=False),
    sa.Column('position', sa.Integer(), nullable=False),
    sa.Column('text', sa.Text(), nullable=False),
    sa.Column('model', sa.Text(), nullable=False),
    sa.ForeignKeyConstraint(
      ['task_id'], ['tasks.id'], name=op.f('fk_outputs_task_id')
    ),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_outputs')),
    sa.UniqueConstraint(
      'task_id', 'position', name=op.f('uq_outputs_task_id_position')
    ),
  )
  op.create_table(
    'slots',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('task_id', sa.Integer(), nullable=False),
    sa.Column('number', sa.Integer(), nullable=False),
    sa.Column('holder', sa.Integer(), nullable=True),
    sa.ForeignKeyConstraint(
      ['holder'], ['accounts.id'], name=op.f('fk_slots_holder')
    ),
    sa.ForeignKeyConstraint(
      ['task_id'], ['tasks.id'], name=op.f('fk_slots_task_id')
    ),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_slots')),
    sa.UniqueConstraint(
      'task_id', 'holder', name=op.f('uq_slots_task_id_holder')
    ),
    sa.UniqueConstraint(
      'task_id', 'number', name=op.f('uq_slots_task_id_number')
    ),
  )
  op.create_index(
    'free_slots',
    'slots',
    ['task_id'],
    unique=False,
    sqlite_where=sa.text('holder IS NULL'),
    postgresql_where=sa.text('holder IS NULL'),
  )
  op.create_table(
    'answers',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('assignment_id', sa.Integer(), nullable=False),
    sa.Column('revision', sa.Integer(), nullable=False),
    sa.Column('submission', sa.Text(), nullable=False),
    sa.Column('content', sa.JSON(), nullable=False),
    sa.Column('instruction_id', sa.Integer(), nullable=False),
    sa.Column('time', sa.Double(), nullable=False),
    sa.Column('seconds', sa.Double(), nullable=False),
    sa.ForeignKeyConstraint(
      ['assignment_id'],
      ['assignments.id'],
      name=op.f('fk_answers_assignment_id'),
    ),
    sa.ForeignKeyConstraint(
      ['instruction_id'],
      ['instructions.id'],
      name=op.f('fk_answers_instruction_id'),
    ),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_answers')),
    sa.UniqueConstraint(
      'assignment_id',
      'revision',
      name=op.f('uq_answers_assignment_id_revision'),
    ),
    sa.UniqueConstraint('submission', name=op.f('uq_answers_submission')),
  )
  op.create_table(
    'flags',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('assignment_id', sa.Integer(), nullable=False),
    sa.Column('text', sa.Text(), nullable=False),
    sa.Column('time', sa.Double(), nullable=False),
    sa.ForeignKeyConstraint(
      ['assignment_id'], ['assignments.id'], name=op.f('fk_flags_assignment_id')
    ),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_flags')),
  )
  op.create_table(
    'grades',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('assignment_id', sa.Integer(), nullable=False),
    sa.Column('account_id', sa.Integer(), nullable=False),
    sa.Column('grade', sa.Integer(), nullable=False),
    sa.ForeignKeyConstraint(
      ['account_id'], ['accounts.id'], name=op.f('fk_grades_account_id')
    ),
    sa.ForeignKeyConstraint(
      ['assignment_id'],
      ['assignments.id'],
      name=op.f('fk_grades_assignment_id'),
    ),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_grades')),
    sa.UniqueConstraint(
      'assignment_id',
      'account_id',
      name=op.f('uq_grades_assignment_id_account_id'),
    ),
  )
