"""Starts the labeling site, or runs one command on its database.

python -m instruct_jax.labeling --config=configs/labeling.py --workdir=DIR
... --demo                 with prompts and answers of the miniature world
... --admin_link           prints a new link for the first admin
... --import_file=FILE --batch=NAME --kind=ranking --phase=training
... --export=FOLDER        writes the files that the experiments read
... --format=argilla       with either: the JSON of another program
... --active=reward:MODEL  puts first the tasks a reward model is unsure of
... --backup=FILE.gz       writes one consistent copy, even of a running site
... --restore=FILE.gz      fills an empty database
"""

import contextlib
import importlib
import os
import pathlib
import socket
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from instruct_jax import command
from instruct_jax.data import records

try:
  import sqlalchemy as sa
  import uvicorn

  from instruct_jax.labeling import (
    demo,
    exporting,
    formats,
    importing,
    schema,
    store,
    web,
  )
except ModuleNotFoundError as error:
  if __name__ != '__main__':
    raise
  sys.exit(f'error: {error}; pip install -r requirements-labeling.txt')

_DATABASE = 'labeling.sqlite'
_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config file, such as configs/labeling.py.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the site; by default config.default_workdir.'
)
_DEMO = flags.DEFINE_bool('demo', False, 'Fill an empty site with tasks.')
_ADMIN_LINK = flags.DEFINE_bool('admin_link', False, 'Print a link and exit.')
_BACKUP = flags.DEFINE_string('backup', None, 'Write a back-up and exit.')
_RESTORE = flags.DEFINE_string('restore', None, 'Read a back-up and exit.')
_EXPORT = flags.DEFINE_string('export', None, 'Export to a folder and exit.')
_IMPORT = flags.DEFINE_string('import_file', None, 'Import a file and exit.')
_BATCH = flags.DEFINE_string('batch', None, 'Name of the imported batch.')
_KIND = flags.DEFINE_string('kind', 'ranking', 'Kind of the imported tasks.')
_PHASE = flags.DEFINE_string('phase', 'training', 'Instructions of the import.')
_ACTIVE = flags.DEFINE_string(
  'active', None, 'Order the free tasks by a reward model and exit.'
)
_FORMAT = flags.DEFINE_enum(
  'format', 'jsonl', list(formats.FORMATS), 'Of the import or the export.'
)
_CALIBRATION = flags.DEFINE_bool(
  'calibration', False, 'Import tasks with known answers.'
)
_SUGGESTIONS = flags.DEFINE_bool(
  'suggestions', False, 'Let labelers see the suggestions of the import.'
)
_SCREENING = flags.DEFINE_bool('screening', False, 'Import for screening.')


def _check_flags(config, workdir) -> None:
  """Raises `StoreError` for bad flags, before anything is created."""
  actions = (
    _BACKUP, _RESTORE, _EXPORT, _IMPORT, _ACTIVE, _ADMIN_LINK, _DEMO,
  )  # fmt: skip
  given = [f'--{flag.name}' for flag in actions if flag.value]
  if len(given) > 1:
    raise store.StoreError(
      f'{" and ".join(given)}: give only one of them at a time'
    )
  for flag in (
    _BATCH, _KIND, _PHASE, _CALIBRATION, _SUGGESTIONS, _SCREENING,
  ):  # fmt: skip
    if flag.present and not _IMPORT.value:
      raise store.StoreError(f'--{flag.name} goes with --import_file')
  if _FORMAT.present and not (_IMPORT.value or _EXPORT.value):
    raise store.StoreError('--format goes with --import_file or --export')
  path = workdir / _DATABASE
  if _ACTIVE.value:
    _active().check(_ACTIVE.value, config.active)
  reads = _BACKUP.value or _EXPORT.value or _ACTIVE.value
  if reads and not config.database and not path.exists():
    raise store.StoreError(
      f'{path}: no such file; give the --workdir of a labeling site'
    )


def _active():
  """Imports the module that needs JAX, which the site itself does not."""
  return importlib.import_module('instruct_jax.labeling.active')


def _once(the_store) -> bool:
  """Does what a flag asks for; returns whether there was such a flag."""
  if _BACKUP.value:
    count = store.backup(the_store.engine, _BACKUP.value)
    print(f'{count} rows written to {store.backup_name(_BACKUP.value)}')
  elif _EXPORT.value:
    if _FORMAT.value == 'jsonl':
      counts = exporting.export(the_store, _EXPORT.value)
      told = {f'{name}.jsonl': f'{n} lines' for name, n in counts.items()}
    else:
      counts = exporting.export_as(the_store, _EXPORT.value, _FORMAT.value)
      told = {name: f'{n} tasks' for name, n in counts.items()}
    for name, what in told.items():
      print(f'{_EXPORT.value}/{name}: {what}')
  elif _ACTIVE.value:
    config = the_store.config.active
    counts = _active().order(the_store, _ACTIVE.value, config)
    for what, count in counts.items():
      print(f'{what}: {count} tasks')
  elif _IMPORT.value:
    counts = importing.import_tasks(
      the_store,
      records.read_bytes(_IMPORT.value),
      source=_IMPORT.value,
      name=_BATCH.value or pathlib.Path(_IMPORT.value).name,
      kind=_KIND.value,
      phase=_PHASE.value,
      overlap=the_store.config.overlap,
      screening=_SCREENING.value,
      calibration=_CALIBRATION.value,
      suggestions=_SUGGESTIONS.value,
      file_format=_FORMAT.value,
    )
    print(f'{counts.pop("tasks")} tasks imported')
    for what, count in counts.items():
      print(f'{what}: {count}')
  else:
    return False
  return True


def _listen(config):
  """A listening socket, so that the links can name the port."""
  found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
  found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    found.bind((config.host, config.port))
    found.listen(128)  # Connections wait until the server runs.
  except OSError as error:
    raise store.StoreError(
      f'cannot listen on {config.host}:{config.port} ({error.strerror}); '
      'choose another --config.port, 0 for any'
    ) from error
  return found


def _account(the_store, name, role, condition):
  """(id, is new) of the first account that meets a condition, or a new one."""
  key = schema.accounts.c.id
  with the_store.read() as c:
    found = c.scalar(sa.select(key).where(condition).order_by(key))
  if found is not None:
    return found, False
  return the_store.add_account(name, role, 'active'), True


def run(config, workdir: pathlib.Path) -> None:
  """Prepares the database and serves until stopped."""
  store.validate(config)
  _check_flags(config, workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  os.chmod(workdir, 0o700)  # Other users must not read the database.
  engine = store.make_engine(
    config.database or f'sqlite:///{workdir / _DATABASE}'
  )
  if _RESTORE.value:
    print(f'{store.restore(engine, _RESTORE.value)} rows restored')
    return
  the_store = store.Store(engine, config)
  the_store.prepare()
  if _once(the_store):
    return
  listener = None if _ADMIN_LINK.value else _listen(config)
  port = listener.getsockname()[1] if listener else config.port
  url = config.public_url or f'http://{config.host}:{port}'
  accounts = schema.accounts.c
  admin, is_new = _account(
    the_store, 'admin', 'admin', accounts.role == 'admin'
  )
  if is_new or _ADMIN_LINK.value:
    link = f'{url}/join/{the_store.invite(admin)}'
    print(f'admin link (works once): {link}', flush=True)
  if _ADMIN_LINK.value:
    return
  if _DEMO.value:
    demo.fill(the_store)
    name = 'newcomer'
    guest, _ = _account(the_store, name, 'labeler', accounts.name == name)
    print(
      'labeler link (works once; use another browser or a private window): '
      f'{url}/join/{the_store.invite(guest)}',
      flush=True,
    )
  print(f'labeling site on {url}, data in {workdir}', flush=True)
  server_config = uvicorn.Config(
    web.make_app(the_store, url, str(workdir / 'exports')),
    access_log=False,  # Paths contain invitation tokens.
    log_level='warning',
    # Only a proxy on this machine may name the visitor's address.
    forwarded_allow_ips='127.0.0.1',
    server_header=False,
  )
  with contextlib.suppress(KeyboardInterrupt):
    uvicorn.Server(server_config).run(sockets=[listener])


def main(argv) -> None:
  """Runs what the flags ask for."""
  if len(argv) > 1:
    raise ValueError(f'unexpected arguments: {argv[1:]}')
  if '--verbosity' not in ' '.join(sys.argv):
    logging.set_verbosity(logging.WARNING)  # Libraries log much at INFO.
  config = _CONFIG.value
  workdir = pathlib.Path(_WORKDIR.value or config.default_workdir).absolute()
  try:
    run(config, workdir)
  except sa.exc.SQLAlchemyError as error:
    text = command.one_line(getattr(error, 'orig', None) or error)
    raise store.StoreError(f'the database: {text}') from error


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  command.end(
    lambda: app.run(
      main, flags_parser=lambda argv: command.parse_flags(argv, _CONFIG)
    )
  )
