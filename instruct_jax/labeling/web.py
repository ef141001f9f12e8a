"""The pages of the labeling site.

`ROUTES` is the whole site as data: method, path, who may enter, handler.
`_Site.dispatch` does the checks that every route needs: size limit, rate limit,
session, role, CSRF. A handler takes a `Visit` and returns a reply.
"""

import collections
import dataclasses
import datetime
import hmac
import http
import pathlib
import re
import secrets
import string
import threading
import traceback
import unicodedata
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import markupsafe
import sqlalchemy as sa
from starlette import applications, concurrency, requests, responses, routing

from instruct_jax.data import invisible, records
from instruct_jax.labeling import (
  answers,
  exporting,
  formats,
  importing,
  research,
  schema,
  store,
)

_HERE = pathlib.Path(__file__).parent
COOKIE = 'labeling'
HEADERS = {
  'Content-Security-Policy': (
    "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
  ),
  'X-Content-Type-Options': 'nosniff',
  'Referrer-Policy': 'same-origin',
  'Cache-Control': 'no-store',
  'Cross-Origin-Opener-Policy': 'same-origin',
  'Cross-Origin-Resource-Policy': 'same-origin',
}
# Name of the form field with the sign-in token, and of the cookie that must
# have the same value.
JOINING = 'joining'
SIGNED_OUT = (
  'You are signed out here: the session is over, or you have signed in on '
  'another browser since. Please ask for a new link.'
)
_STATIC = {
  'style.css': 'text/css; charset=utf-8',
  'labeling.js': 'text/javascript; charset=utf-8',
  'icon.svg': 'image/svg+xml',
}
_ALLOWED = {
  'anyone': ('labeler', 'researcher', 'admin'),
  'labeler': ('labeler', 'researcher', 'admin'),
  'researcher': ('researcher', 'admin'),
  'admin': ('admin',),
}


class RefusedError(Exception):
  """A request that gets an error page, by default "no such page"."""

  def __init__(self, status=404, message='There is no such page.'):
    super().__init__(message)
    self.status = status


@dataclasses.dataclass
class Visit:
  """One request, after all checks.

  Attributes:
    site: store, templates and configuration.
    request: Starlette's.
    account: the account that asks, with its session's `csrf`; None if signed
      out.
    form: posted fields; of fields with the same name, the last.
  """

  site: '_Site'
  request: requests.Request
  account: Any
  form: Mapping[str, str]

  @property
  def store(self) -> store.Store:
    """The site's store."""
    return self.site.store

  def field(self, name: str) -> str:
    """A posted field; '' if it is missing."""
    return self.form.get(name, '')

  def number(self, name: str) -> int:
    """An id in the path."""
    value = self.request.path_params[name]
    if value >= 2**31:  # No database id is this large.
      raise RefusedError
    return value

  def work(self) -> dict[str, Any]:
    """The visitor's own assignment that the path names."""
    work = self.store.work(self.number('assignment'), self.account.id)
    if work is None:
      raise RefusedError
    return work

  def page(self, template: str, status: int = 200, **values):
    """An HTML reply."""
    return self.site.page(template, self.account, status, **values)


def shown(text: str) -> markupsafe.Markup:
  """Untrusted text as HTML: escaped, with invisible characters made visible."""

  def mark(match):
    if _is_emoji_style(match):
      return match.group()
    code = f'U+{ord(match.group()):04X}'
    return f'<span class="hidden-character">{code}</span>'

  escaped = str(markupsafe.escape(text))
  return markupsafe.Markup(invisible.HIDDEN.sub(mark, escaped))


def _is_emoji_style(match):
  """Whether a match only selects the emoji style of the symbol before it."""
  before = match.string[: match.start()][-1:]
  return (
    match.group() == '\ufe0f'
    and before != ''
    and (before in '#*0123456789' or unicodedata.category(before) == 'So')
  )


def instruction_html(text: str) -> markupsafe.Markup:
  """HTML of headings (`# `), lists (`- `) and paragraphs; no other markup."""

  def tag(name, inner):
    return markupsafe.Markup(f'<{name}>{{}}</{name}>').format(inner)

  parts = []
  for block in re.split(r'\n\s*\n', text.strip()):
    lines = block.strip().split('\n')
    if block.startswith('# ') and len(lines) == 1:
      parts.append(tag('h2', block[2:]))
    elif all(line.startswith('- ') for line in lines):
      items = [tag('li', line[2:]) for line in lines]
      parts.append(tag('ul', markupsafe.Markup('').join(items)))
    else:
      parts.append(tag('p', block))
  return markupsafe.Markup('\n').join(parts)


def _when(seconds):
  if seconds is None:
    return '–'
  moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
  return moment.strftime('%Y-%m-%d %H:%M UTC')


def _duration(seconds):
  if seconds is None:
    return '–'
  minutes, seconds = divmod(round(seconds), 60)
  return f'{minutes} min {seconds} s' if minutes else f'{seconds} s'


def _percent(value):
  return '–' if value is None else f'{100 * value:.0f} %'


def _estimate(value):
  if value is None:
    return 'nothing to compare yet'
  return (
    f'{100 * value.rate:.1f} % (95 %: {100 * value.low:.1f} – '
    f'{100 * value.high:.1f}; n = {value.num_pairs})'
  )


class RateLimit:
  """At most `per_minute` requests per key in any minute, in memory.

  Refused requests count, too: whoever keeps asking stays refused.
  """

  def __init__(self, clock: Callable[[], float]):
    self._clock = clock
    self._lock = threading.Lock()
    self._times = {}  # Key -> times of its newest `per_minute` requests.

  def allows(self, key: str, per_minute: int) -> bool:
    """Counts a request; returns whether it is within the limit."""
    now = self._clock()
    with self._lock:
      if len(self._times) > 10_000:  # Drop keys without recent requests.
        self._times = {k: v for k, v in self._times.items() if v[-1] > now - 60}
      times = self._times.setdefault(key, collections.deque(maxlen=per_minute))
      allowed = len(times) < per_minute or times[0] <= now - 60
      times.append(now)
      return allowed


# --- Everybody --------------------------------------------------------------


def welcome(visit):
  """The start page: how to sign in, own progress, or the admin's pages."""
  if visit.account is None:
    signed_out = COOKIE in visit.request.cookies
    return visit.page('welcome.html', message=SIGNED_OUT if signed_out else '')
  is_admin = visit.account.role == 'admin'
  if is_admin and 'label' not in visit.request.query_params:
    return _to('/admin')
  return _home(visit)


def _home(visit, message=''):
  progress = visit.store.own_progress(visit.account)
  return visit.page('home.html', progress=progress, message=message)


def show_invitation(visit):
  """The page that an invitation link opens, with a button that signs in."""
  if not visit.store.invitation_is_good(visit.request.path_params['token']):
    raise RefusedError(410, store.USED_LINK)
  # Links that are open at the same time share this token.
  joining = visit.request.cookies.get(JOINING) or secrets.token_urlsafe(24)
  reply = visit.page('join.html', joining=joining)
  # No other site can read this cookie or make the browser send it.
  _set_cookie(visit, reply, JOINING, joining, 3600, 'strict')
  return reply


def join(visit):
  """Signs in, but only from the page that the link opens.

  Otherwise another site could sign a visitor in as somebody else, under whose
  name the visitor would then label.
  """
  sent = visit.request.cookies.get(JOINING, '')
  if not sent or not _same(visit.field(JOINING), sent):
    raise RefusedError(
      403, 'Please open your invitation link again and press the button there.'
    )
  try:
    session = visit.store.join(
      visit.request.path_params['token'], visit.request.cookies.get(COOKIE, '')
    )
  except store.StoreError as error:
    raise RefusedError(410, str(error)) from error
  reply = _to('/')
  lifetime = int(visit.store.config.session_days * 86400)
  _set_cookie(visit, reply, COOKIE, session, lifetime, 'lax')
  reply.delete_cookie(JOINING)
  return reply


def _set_cookie(visit, reply, name, value, seconds, samesite):
  reply.set_cookie(
    name,
    value,
    max_age=seconds,
    httponly=True,
    samesite=samesite,
    secure=visit.store.config.public_url.startswith('https://'),
  )


def _same(a, b):
  """Whether two texts are equal, compared in constant time."""
  return hmac.compare_digest(
    a.encode('utf-8', 'replace'), b.encode('utf-8', 'replace')
  )


def leave(visit):
  """Signs out."""
  visit.store.leave(visit.request.cookies[COOKIE])
  reply = _to('/')
  reply.delete_cookie(COOKIE)
  return reply


def static(visit):
  """Serves a file from a fixed list, so that no path can leave the folder."""
  name = visit.request.path_params['name']
  if name not in _STATIC:
    raise RefusedError
  return responses.Response(
    (_HERE / 'static' / name).read_bytes(), media_type=_STATIC[name]
  )


# --- Labelers ---------------------------------------------------------------


def read_instructions(visit):
  """The newest instructions of a phase."""
  phase = visit.request.path_params['phase']
  if phase not in answers.PHASES:
    raise RefusedError
  page = visit.store.instructions(phase)
  return visit.page(
    'instructions.html', page=page, html=instruction_html(page.text)
  )


def next_task(visit):
  """Claims a task for a labeler, or continues the labeler's open one."""
  found = visit.store.claim(visit.account)
  if found is None:
    return _home(visit, 'There is no task for you at the moment. Thank you!')
  return _to(_first_page(visit, found))


def _first_page(visit, assignment_id):
  """Where the labeler stopped: the first page that is not complete."""
  work = visit.store.work(assignment_id, visit.account.id)
  names = answers.pages(work)
  number = 0
  if work['state'] != 'submitted':
    complete = [answers.is_complete(work, name) for name in names]
    number = [*complete[:-1], False].index(False)
  return f'/task/{assignment_id}/{number}'


def _step(visit, names):
  """The page number in the path."""
  number = visit.number('step')
  if number >= len(names):
    raise RefusedError
  return number


def show_task(visit):
  """One page of a claimed task."""
  work = visit.work()
  return _task_page(visit, work, _step(visit, answers.pages(work)))


def _task_page(visit, work, number, message='', posted=None, status=200):
  names = answers.pages(work)
  name = names[number]
  if posted is None:
    posted = work['draft'].get(name, {})
    if name == 'ranks':  # Stored by position, posted in the order shown.
      posted = {
        f'rank{place}': posted.get(f'rank{position}', '')
        for place, position in enumerate(work['order'])
      }
  suggestion = _suggestion(work) if name == 'ranks' else None
  if suggestion and work['suggested'] is None:
    visit.store.suggestion_shown(work['id'])
  return visit.page(
    f'task_{"output" if name.startswith("output") else name}.html',
    status,
    work=work,
    number=number,
    names=names,
    posted=posted,
    message=message,
    suggestion=suggestion,
    submission=secrets.token_hex(16),
  )


def _suggestion(work):
  """The suggested ranks by position, or None if the labeler may not see them.

  Never includes the source, which may be the name of a model.
  """
  if not work['suggestions']:
    return None
  return work['record'].get('suggestion', {}).get('ranks')


def answer_task(visit):
  """Saves one page of a task: `action` is next, draft, autosave or submit.

  The page's script sends `autosave` and needs no page in reply.
  """
  work = visit.work()
  names = answers.pages(work)
  number = _step(visit, names)
  name, is_last = names[number], number == len(names) - 1
  action = visit.field('action')
  posted = {
    key: value
    for key, value in visit.form.items()
    if key not in ('csrf', 'action', 'submission')
  }
  if name == 'ranks':
    posted = _by_position(visit, work['order'])
  place = (work['id'], visit.account.id, name)
  try:
    posted = {
      answers.clean(key, 'A field'): answers.clean(value, 'A text')
      for key, value in posted.items()
    }
    if action == 'submit' and is_last:
      revision = visit.store.submit(*place, posted, visit.field('submission'))
      return _to(f'/?label=1&saved={work["id"]}-{revision}')
    saved = visit.store.save_draft(*place, posted)
    if action == 'autosave' and saved['state'] == 'expired':
      return responses.PlainTextResponse(
        'Draft saved, but the time for this task is over', 202
      )
    if action == 'autosave':
      return responses.Response(status_code=204)
    if action == 'draft':
      return _to('/?label=1&draft=1')
    answers.page_content(saved, name)
    if is_last:
      raise answers.AnswerError('Please use the Submit button')
  except (answers.AnswerError, store.StoreError) as error:
    return _task_page(
      visit, visit.work(), number, str(error), visit.form, _status(error)
    )
  return _to(f'/task/{work["id"]}/{number + 1}')


def _by_position(visit, order):
  """Renames the posted ranks from the order shown to imported positions."""
  return {
    f'rank{position}': visit.field(f'rank{place}')
    for place, position in enumerate(order)
  }


def skip_task(visit):
  """Gives up a task, with a reason."""
  visit.store.skip(visit.work()['id'], visit.account.id, visit.field('reason'))
  return _to('/?label=1&skipped=1')


def flag_task(visit):
  """Flags a task for the researchers."""
  work = visit.work()
  visit.store.flag(work['id'], visit.account.id, visit.field('text'))
  return _to(_first_page(visit, work['id']))


# --- Researchers ------------------------------------------------------------


def show_grading(visit):
  """Newcomers' demonstrations, for researchers to grade."""
  rows = [
    row
    for row in research.labeled(visit.store)
    if row.screening and row.kind == 'demonstration' and not row.is_researcher
  ]
  table = schema.grades
  with visit.store.read() as c:
    mine = c.execute(
      sa.select(table.c['assignment_id', 'grade']).filter_by(
        account_id=visit.account.id
      )
    ).all()
  # B.1 selected on anonymous data, so the page shows no names.
  return visit.page(
    'grading.html', rows=rows, grades={row[0]: row[1] for row in mine}
  )


def grade(visit):
  """Stores a researcher's grade of a demonstration."""
  value = _integer(visit.field('grade'), 'The grade')
  assignment_id = visit.number('assignment')
  research.grade(visit.store, assignment_id, visit.account.id, value)
  return _to('/grading')


def show_queue(visit):
  """The queue of tasks to decide, those with the most disagreement first."""
  return visit.page('queue.html', tasks=research.queue(visit.store)[:200])


def show_adjudication(visit, status=200, message=''):
  """A task with its labelers' ranks, without names, and a form to decide."""
  task = _deciding(visit)
  posted = visit.form
  if not posted and task['ranks']:
    posted = {
      f'rank{place}': str(task['ranks'][position])
      for place, position in enumerate(task['order'])
    }
  return visit.page(
    'adjudication.html', status, task=task, posted=posted, message=message
  )


def _deciding(visit):
  task = research.deciding(visit.store, visit.number('task'), visit.account.id)
  if task is None:
    raise RefusedError
  return task


def adjudicate(visit):
  """Stores a decision and goes on to the next task."""
  task = _deciding(visit)
  posted = _by_position(visit, task['order'])
  try:
    ranks = answers.ranks_of(posted, len(task['order']))
    note = answers.clean(visit.field('note'), 'The note')
  except answers.AnswerError as error:
    return show_adjudication(visit, 422, str(error))
  research.decide(visit.store, task['task_id'], visit.account.id, ranks, note)
  left = research.queue(visit.store)
  following = f'/{left[0]["task_id"]}' if left else ''
  return _to(f'/adjudication{following}')


# --- Admin ------------------------------------------------------------------


def _integer(text, what):
  if not re.fullmatch(r'-?\d{1,9}', text):
    raise store.StoreError(f'{what} must be a whole number')
  return int(text)


def show_admin(visit):
  """Progress by batch, reasons for skips, and flags."""
  flags, assignments = schema.flags, schema.assignments
  with visit.store.read() as c:
    newest = c.execute(
      sa.select(flags, schema.tasks.c.prompt, schema.accounts.c.name)
      .select_from(flags.join(schema.work).join(schema.accounts))
      .order_by(flags.c.id.desc())
      .limit(20)
    ).all()
    skips = c.execute(
      sa.select(assignments.c.reason, sa.func.count())
      .where(assignments.c.state == 'skipped')
      .group_by(assignments.c.reason)
    ).all()
    imported = ''
    if 'imported' in visit.request.query_params:
      audit = schema.audit
      last = sa.select(audit.c.detail).filter_by(action='import')
      imported = c.scalar(last.order_by(audit.c.id.desc()).limit(1))
  return visit.page(
    'admin.html',
    batches=research.progress(visit.store),
    flags=newest,
    skips=skips,
    message=f'Imported: {imported}' if imported else '',
  )


def show_accounts(visit, link=''):
  """Who labels, how fast and how much."""
  people = research.people(visit.store, research.labeled(visit.store))
  return visit.page('accounts.html', people=people, link=link)


def _show_link(visit, account_id):
  token = visit.store.invite(account_id, visit.account.id)
  return show_accounts(visit, f'{visit.site.public_url}/join/{token}')


def add_account(visit):
  """Adds an account and shows its link, once."""
  fields = [visit.field(name) for name in ('name', 'role', 'status')]
  return _show_link(visit, visit.store.add_account(*fields, visit.account.id))


def invite_again(visit):
  """Makes a new link; the account's old one stops working."""
  return _show_link(visit, visit.number('account'))


def set_status(visit):
  """Changes what an account may do."""
  visit.store.set_status(
    visit.number('account'), visit.field('status'), visit.account.id
  )
  return _to('/admin/accounts')


def show_import(visit, status=200, message=''):
  """The form that imports tasks, filled in as it was posted."""
  return visit.page('import.html', status, form=visit.form, message=message)


_BATCH_OPTIONS = ('screening', 'calibration', 'suggestions')


def import_tasks(visit):
  """Makes a batch of the posted lines, or shows what is wrong with them."""
  try:
    importing.import_tasks(
      visit.store,
      visit.field('lines').encode('utf-8', 'surrogatepass'),
      source='import',
      name=visit.field('name'),
      kind=visit.field('kind'),
      phase=visit.field('phase'),
      overlap=_integer(visit.field('overlap'), 'The overlap'),
      file_format=visit.field('format') or 'jsonl',
      **{name: name in visit.form for name in _BATCH_OPTIONS},
      by=visit.account.id,
    )
  except (records.RecordError, store.StoreError) as error:
    return show_import(visit, 422, str(error))
  return _to('/admin?imported')


def close_batch(visit):
  """Closes a batch to new claims, or reopens it."""
  closed, batch_id = visit.field('closed') == '1', visit.number('batch')
  with visit.store.write() as c:
    if not schema.update(c, schema.batches, batch_id, closed=closed):
      raise RefusedError
    action = 'close' if closed else 'open'
    visit.store.audit(c, visit.account.id, action, f'batch {batch_id}')
  return _to('/admin')


def show_agreement(visit):
  """How much labelers agree, and the tasks on which they do not."""
  everything = research.labeled(visit.store)
  rows = [row for row in everything if row.is_data]
  seed = visit.store.config.seed
  return visit.page(
    'agreement.html',
    agreement=research.agreement(rows, seed),
    versions=research.agreement_by_version(rows, seed),
    calibration=research.calibration(everything, seed),
    people=research.people(visit.store, rows, *research.IN_DATA),
    tasks=[t for t in research.disagreements(rows) if t['differs']][:200],
    decided=research.decided(visit.store),
  )


def show_answers(visit):
  """All answers to a task."""
  rows = research.labeled(visit.store, visit.number('task'))
  if not rows:
    raise RefusedError
  return visit.page('answers.html', rows=rows)


def show_screening(visit):
  """Newcomers' agreement with researchers (B.1)."""
  people = research.screening(visit.store, research.labeled(visit.store))
  return visit.page('screening.html', people=people, config=visit.store.config)


def show_publishing(visit):
  """The form that publishes instructions."""
  pages = [visit.store.instructions(phase) for phase in answers.PHASES]
  return visit.page('publishing.html', pages=pages)


def publish(visit):
  """Publishes a new version of the instructions of a phase."""
  visit.store.publish_instructions(
    visit.field('phase'), visit.field('text'), visit.account.id
  )
  return _to('/admin/instructions')


def show_export(visit):
  """The button that exports."""
  return visit.page('export.html', files={})


def export(visit):
  """Writes an export folder and lists its files."""
  moment = datetime.datetime.fromtimestamp(visit.store.clock(), datetime.UTC)
  folder = visit.site.exports / moment.strftime('%Y%m%d-%H%M%S')
  chosen = visit.field('format') or 'jsonl'
  if chosen not in formats.FORMATS:
    raise store.StoreError(f'No such format: {chosen!r:.40}')
  if chosen == 'jsonl':
    counts = exporting.export(visit.store, folder)
    files = {f'{name}.jsonl': f'{n} lines' for name, n in counts.items()}
    files['statistics.json'] = 'about the labelers'
  else:
    counts = exporting.export_as(visit.store, folder, chosen)
    files = {name: f'{n} tasks' for name, n in counts.items()}
    if chosen == 'label_studio':
      files['label_studio.xml'] = 'its labeling interface'
  with visit.store.write() as c:
    visit.store.audit(c, visit.account.id, 'export', folder.name)
  return visit.page('export.html', files=files, folder=str(folder))


def download(visit):
  """A file of an export."""
  folder, name = (visit.request.path_params[k] for k in ('folder', 'name'))
  path = visit.site.exports / folder / name
  is_export = re.fullmatch(
    r'\d{8}-\d{6}/[a-z_]+\d*\.(jsonl?|xml)', f'{folder}/{name}'
  )
  if not is_export or not path.is_file():
    raise RefusedError
  return responses.FileResponse(path, filename=name)


def show_audit(visit):
  """The last 300 entries of the log."""
  audit, accounts = schema.audit, schema.accounts
  with visit.store.read() as c:
    rows = c.execute(
      sa.select(audit, accounts.c.name)
      .select_from(audit.outerjoin(accounts))
      .order_by(audit.c.id.desc())
      .limit(300)
    ).all()
  return visit.page('audit.html', rows=rows)


def missing(visit):
  """Refuses any other address."""
  raise RefusedError


ROUTES = (
  ('GET', '/', 'anyone', welcome),
  ('GET', '/static/{name}', 'anyone', static),
  ('GET', '/join/{token}', 'anyone', show_invitation),
  ('POST', '/join/{token}', 'anyone', join),
  ('POST', '/leave', 'labeler', leave),
  ('GET', '/instructions/{phase}', 'labeler', read_instructions),
  ('POST', '/next', 'labeler', next_task),
  ('GET', '/task/{assignment:int}/{step:int}', 'labeler', show_task),
  ('POST', '/task/{assignment:int}/{step:int}', 'labeler', answer_task),
  ('POST', '/task/{assignment:int}/skip', 'labeler', skip_task),
  ('POST', '/task/{assignment:int}/flag', 'labeler', flag_task),
  ('GET', '/grading', 'researcher', show_grading),
  ('POST', '/grading/{assignment:int}', 'researcher', grade),
  ('GET', '/adjudication', 'researcher', show_queue),
  ('GET', '/adjudication/{task:int}', 'researcher', show_adjudication),
  ('POST', '/adjudication/{task:int}', 'researcher', adjudicate),
  ('GET', '/admin', 'admin', show_admin),
  ('GET', '/admin/accounts', 'admin', show_accounts),
  ('POST', '/admin/accounts', 'admin', add_account),
  ('POST', '/admin/accounts/{account:int}/invite', 'admin', invite_again),
  ('POST', '/admin/accounts/{account:int}/status', 'admin', set_status),
  ('GET', '/admin/import', 'admin', show_import),
  ('POST', '/admin/import', 'admin', import_tasks),
  ('POST', '/admin/batches/{batch:int}', 'admin', close_batch),
  ('GET', '/admin/agreement', 'admin', show_agreement),
  ('GET', '/admin/tasks/{task:int}', 'admin', show_answers),
  ('GET', '/admin/screening', 'admin', show_screening),
  ('GET', '/admin/instructions', 'admin', show_publishing),
  ('POST', '/admin/instructions', 'admin', publish),
  ('GET', '/admin/export', 'admin', show_export),
  ('POST', '/admin/export', 'admin', export),
  ('GET', '/admin/export/{folder}/{name}', 'admin', download),
  ('GET', '/admin/audit', 'admin', show_audit),
)


def _to(path):
  return responses.RedirectResponse(path, 303)


def _status(error):
  if isinstance(error, RefusedError):
    return error.status
  return 422 if isinstance(error, answers.AnswerError) else 409


def _address(text):
  """The parts of a URL in a request's header."""
  try:
    return urllib.parse.urlsplit(text)
  except ValueError as error:
    raise RefusedError(400, 'The request could not be read.') from error


class _Site:
  """What all requests share."""

  def __init__(self, the_store, public_url, exports):
    self.store = the_store
    self.public_url = public_url.rstrip('/')
    self.host = urllib.parse.urlsplit(public_url).hostname
    self.exports = pathlib.Path(exports)
    self.limit = RateLimit(the_store.clock)
    self.templates = jinja2.Environment(
      loader=jinja2.FileSystemLoader(_HERE / 'templates'),
      autoescape=True,
      undefined=jinja2.StrictUndefined,
      trim_blocks=True,
      lstrip_blocks=True,
    )
    self.templates.tests['blank'] = invisible.is_blank
    for function in (shown, _when, _duration, _percent, _estimate):
      self.templates.filters[function.__name__.strip('_')] = function
    self.templates.globals.update(
      answers=answers,
      formats=formats.FORMATS,
      letters=string.ascii_uppercase,
    )

  def page(self, template, account, status, **values):
    text = self.templates.get_template(template).render(
      account=account, **values
    )
    return responses.HTMLResponse(text, status)

  async def _body(self, request, limit):
    """Reads the posted fields; refuses once they exceed `limit` bytes."""
    parts, size = [], 0
    async for part in request.stream():
      size += len(part)
      if size > limit:
        raise RefusedError(413, f'At most {limit:,} bytes can be sent at once.')
      parts.append(part)
    try:
      fields = urllib.parse.parse_qsl(
        b''.join(parts).decode('ascii'),
        keep_blank_values=True,
        errors='strict',
        max_num_fields=500,
      )
    except ValueError as error:
      raise RefusedError(400, 'The form could not be read.') from error
    return dict(fields)

  def _count(self, request, account):
    """Enforces the rate limit; requests that are refused later count, too."""
    config = self.store.config
    address = request.client.host if request.client else ''
    key, limit = f'address {address}', config.requests_per_minute
    if account is not None:
      key = f'account {account.id}'
    elif request.url.path.startswith('/join/'):
      key, limit = f'joins {address}', config.joins_per_minute
    if not self.limit.allows(key, limit):
      raise RefusedError(429, 'Too many requests. Please wait a minute.')

  def _check_origin(self, request):
    """Refuses other host names, and forms from pages of other sites.

    Browsers send the origin of a form; other programs need not.
    """
    host = request.headers.get('host', '')
    if _address(f'//{host}').hostname != self.host:
      raise RefusedError(400, 'This is not the address of this site.')
    if request.method in ('GET', 'HEAD'):
      return
    # 'none': the visitor's own action, such as reloading a page.
    fetch = request.headers.get('sec-fetch-site', 'none')
    origin = _address(request.headers.get('origin', f'//{host}')).netloc
    own = (host, _address(self.public_url).netloc)
    if fetch not in ('same-origin', 'none') or origin not in own:
      raise RefusedError(
        403, 'This form was on a page of another site. Please use ours.'
      )

  async def _form(self, request, account, handler):
    """The posted fields, after the check of their CSRF token."""
    config = self.store.config
    is_admin = account is not None and account.role == 'admin'
    form = await self._body(
      request, config.max_import_bytes if is_admin else config.max_body_bytes
    )
    # `join` checks a token of its own, for visitors who are signed out.
    own_token = account is None or handler is join
    if not own_token and not _same(form.get('csrf', ''), account.csrf):
      raise RefusedError(
        403, 'This page is too old. Please go back and load it again.'
      )
    return form

  async def dispatch(self, request, access, handler):
    """Runs a handler if access is allowed; adds the headers to every reply."""
    account = None
    try:
      token = request.cookies.get(COOKIE, '')
      if token:
        account = await concurrency.run_in_threadpool(self.store.session, token)
      self._count(request, account)
      self._check_origin(request)
      if account is None and access != 'anyone':
        sign_in = 'Please use your invitation link to sign in.'
        raise RefusedError(401, SIGNED_OUT if token else sign_in)
      if account is not None and account.role not in _ALLOWED[access]:
        raise RefusedError  # Does not reveal that the page exists.
      form = {}
      if request.method == 'POST':
        form = await self._form(request, account, handler)
      visit = Visit(self, request, account, form)
      reply = await concurrency.run_in_threadpool(handler, visit)
    except (RefusedError, store.StoreError, answers.AnswerError) as error:
      reply = self._error(account, _status(error), str(error))
    except Exception:
      traceback.print_exc()  # For the operator; the visitor sees no details.
      reply = self._error(
        account, 500, 'Something went wrong. Please try again.'
      )
    reply.headers.update(HEADERS)
    return reply

  def _error(self, account, status, text):
    title = http.HTTPStatus(status).phrase
    return self.page('error.html', account, status, title=title, text=text)


def make_app(
  the_store: store.Store, public_url: str, exports: str
) -> applications.Starlette:
  """The site as an ASGI application.

  Args:
    the_store: a prepared store.
    public_url: how browsers reach the site; other Host headers are refused.
    exports: folder for exports.
  """
  site = _Site(the_store, public_url, exports)

  def endpoint(access, handler):
    async def respond(request):
      return await site.dispatch(request, access, handler)

    return respond

  routes = [
    routing.Route(path, endpoint(access, handler), methods=[method])
    for method, path, access, handler in ROUTES
  ]
  # Unknown pages pass the same checks, such as the rate limit.
  nothing = routing.Route('/{path:path}', endpoint('anyone', missing))
  nothing.methods = None  # All of them.
  return applications.Starlette(routes=[*routes, nothing])
