"""Alembic's entry: runs the migrations on the connection it is given."""

from alembic import context

from instruct_jax.labeling import schema

context.configure(
  connection=context.config.attributes['connection'],
  target_metadata=schema.metadata,
  render_as_batch=True,  # SQLite alters a table by recreating it.
)
with context.begin_transaction():
  context.run_migrations()
