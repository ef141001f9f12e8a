"""The pages of the labeling site.

`ROUTES` is the whole site as data: method, path, who may come in, handler.
`_Site.dispatch` does for every route what must not be forgotten: size limit,
rate limit, session, role, CSRF. A handler sees a `Visit` and returns a reply.
"""

import collections
import dataclasses
import datetime
import hmac
import http
import pathlib
import re
import secrets
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
from instruct_jax.labeling import answers, research, schema, store

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
# What a form's token is called, and the cookie that must hold it, too.
JOINING = 'joining'
SIGNED_OUT = (
  'You are signed out here: the session is over, or you have signed in on '
  'another browser since. Please ask for a new link.'
)
_LETTERS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'
_ALLOWED = {
  'anyone': ('labeler', 'researcher', 'admin'),
  'labeler': ('labeler', 'researcher', 'admin'),
  'researcher': ('researcher', 'admin'),
  'admin': ('admin',),
}


class RefusedError(Exception):
  """A request that is answered with an error page."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


@dataclasses.dataclass
class Visit:
  """One request, after all checks.

  Attributes:
    site: store, templates and configuration.
    request: Starlette's.
    account: who asks, with its session's `csrf`; None if nobody signed in.
    form: posted fields, the last of each name.
  """

  site: '_Site'
  request: requests.Request
  account: Any
  form: Mapping[str, str]

  @property
  def store(self) -> store.Store:
    return self.site.store

  def number(self, name: str) -> int:
    value = self.request.path_params[name]
    if value >= 2**31:  # No database id.
      raise RefusedError(404, 'There is no such page.')
    return value

  def page(self, template: str, status: int = 200, **values):
    text = self.site.templates.get_template(template).render(
      account=self.account,
      **values,
    )
    return responses.HTMLResponse(text, status)


def shown(text: str) -> markupsafe.Markup:
  """Hostile text as HTML: escaped, and what cannot be seen made visible."""
  parts, last = [], 0
  for match in invisible.HIDDEN.finditer(text):
    if _is_emoji_style(text, match.start()):
      continue
    parts.append(markupsafe.escape(text[last : match.start()]))
    parts.append(
      markupsafe.Markup('<span class="hidden-character">{}</span>').format(
        f'U+{ord(match.group()):04X}'
      )
    )
    last = match.end()
  parts.append(markupsafe.escape(text[last:]))
  return markupsafe.Markup('').join(parts)


def _is_emoji_style(text, place):
  """A selector that only chooses the picture of the symbol before it."""
  if text[place] != '\ufe0f' or not place:
    return False
  before = text[place - 1]
  return before in '#*0123456789' or unicodedata.category(before) == 'So'


def instruction_html(text: str) -> markupsafe.Markup:
  """Headings (`# `), lists (`- `) and paragraphs; everything else is text."""
  parts = []
  for block in re.split(r'\n\s*\n', text.strip()):
    lines = block.strip().split('\n')
    if block.startswith('# ') and len(lines) == 1:
      parts.append(markupsafe.Markup('<h2>{}</h2>').format(block[2:]))
    elif all(line.startswith('- ') for line in lines):
      items = markupsafe.Markup('').join(
        markupsafe.Markup('<li>{}</li>').format(line[2:]) for line in lines
      )
      parts.append(markupsafe.Markup('<ul>{}</ul>').format(items))
    else:
      parts.append(markupsafe.Markup('<p>{}</p>').format(block))
  return markupsafe.Markup('\n').join(parts)


def _when(seconds):
  if seconds is None:
    return '–'
  moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
  return moment.strftime('%Y-%m-%d %H:%M UTC')


def _duration(seconds):
  if seconds is None:
    return '–'
  minutes, rest = divmod(round(seconds), 60)
  return f'{minutes} min {rest} s' if minutes else f'{rest} s'


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
  """At most `per_minute` requests a key in any minute, in memory.

  Refused requests count as well: who goes on asking stays refused.
  """

  def __init__(self, clock: Callable[[], float]):
    self._clock = clock
    self._lock = threading.Lock()
    self._times = collections.defaultdict(collections.deque)

  def allows(self, key: str, per_minute: int) -> bool:
    now = self._clock()
    with self._lock:
      if len(self._times) > 10_000:  # Forget who has been quiet.
        self._times = collections.defaultdict(
          collections.deque,
          {k: v for k, v in self._times.items() if v and v[-1] > now - 60},
        )
      times = self._times[key]
      while times and times[0] <= now - 60:
        times.popleft()
      allowed = len(times) < per_minute
      times.append(now)
      if not allowed:
        times.popleft()  # The newest `per_minute` are enough to know.
      return allowed


# --- Everybody --------------------------------------------------------------


def welcome(visit):
  """The start: sign-in hints, a labeler's progress, or the admin's pages."""
  if visit.account is None:
    signed_out = COOKIE in visit.request.cookies
    return visit.page('welcome.html', message=SIGNED_OUT if signed_out else '')
  if (
    visit.account.role == 'admin' and 'label' not in visit.request.query_params
  ):
    return _to('/admin')
  return visit.page(
    'home.html', progress=visit.store.own_progress(visit.account)
  )


def show_invitation(visit):
  """The page behind a link, which signs in once its button is pressed."""
  token = visit.request.path_params['token']
  if not visit.store.invitation_is_good(token):
    raise RefusedError(
      410,
      'This link was used before or has expired. Please ask for a new one.',
    )
  # The same for several links open at a time.
  joining = visit.request.cookies.get(JOINING) or secrets.token_urlsafe(24)
  reply = visit.page('join.html', joining=joining)
  # No other site can read it, and none can send it along.
  _set_cookie(visit, reply, JOINING, joining, 3600, 'strict')
  return reply


def join(visit):
  """Signs in; only from the page that the link opens.

  Another site could otherwise sign a visitor in as somebody else, who would
  then label under that name.
  """
  sent = visit.request.cookies.get(JOINING, '')
  if not sent or not _same(visit.form.get(JOINING, ''), sent):
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
  """Whether two texts are equal, in a time that says nothing about them."""
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
  """Our own style sheet and script; a fixed list, so no path can leave it."""
  name = visit.request.path_params['name']
  types = {
    'style.css': 'text/css; charset=utf-8',
    'labeling.js': 'text/javascript; charset=utf-8',
    'icon.svg': 'image/svg+xml',
  }
  if name not in types:
    raise RefusedError(404, 'There is no such page.')
  return responses.Response(
    (_HERE / 'static' / name).read_bytes(), media_type=types[name]
  )


# --- Labelers ---------------------------------------------------------------


def read_instructions(visit):
  """The instructions of a phase, as published last."""
  phase = visit.request.path_params['phase']
  if phase not in answers.PHASES:
    raise RefusedError(404, 'There is no such page.')
  page = visit.store.instructions(phase)
  return visit.page(
    'instructions.html', page=page, html=instruction_html(page.text)
  )


def next_task(visit):
  """Claims a task for a labeler, or goes on with the labeler's own."""
  found = visit.store.claim(visit.account)
  if found is None:
    return visit.page(
      'home.html',
      progress=visit.store.own_progress(visit.account),
      message='There is no task for you at the moment. Thank you!',
    )
  return _to(_first_page(visit, found))


def _first_page(visit, assignment_id):
  """Where the labeler stopped: the first page that is not complete."""
  work = visit.store.work(assignment_id, visit.account.id)
  names = _ordered_pages(work)
  if work['state'] == 'submitted':
    return f'/task/{assignment_id}/0'
  complete = _complete_pages(work)
  for number, name in enumerate(names):
    if name not in complete:
      return f'/task/{assignment_id}/{number}'
  return f'/task/{assignment_id}/{len(names) - 1}'


def _ordered_pages(work):
  """Page names in the order in which this labeler sees the outputs."""
  names = answers.pages(work['kind'], len(work['texts']))
  shown_order = [f'output{position}' for position in work['order']]
  if shown_order and names[0] == 'prompt':
    names[1 : 1 + len(shown_order)] = shown_order
  return names


def _complete_pages(work):
  """Names of the pages whose drafts are complete."""
  return {
    name
    for name in work['draft']
    if answers.is_complete(
      work['kind'], name, work['draft'], len(work['texts']), _style(work)
    )
  }


def _style(work):
  return work['record'].get('style', 'plain')


def _own_work(visit):
  work = visit.store.work(visit.number('assignment'), visit.account.id)
  if work is None:
    raise RefusedError(404, 'There is no such page.')
  return work


def show_task(visit):
  """One page of a claimed task."""
  work = _own_work(visit)
  names = _ordered_pages(work)
  number = visit.number('step')
  if number >= len(names):
    raise RefusedError(404, 'There is no such page.')
  return _task_page(visit, work, number)


def _task_page(visit, work, number, message='', posted=None, status=200):
  names = _ordered_pages(work)
  name = names[number]
  kind = work['kind']
  shown_outputs = [
    {'letter': _LETTERS[place], 'place': place, 'text': work['texts'][position]}
    for place, position in enumerate(work['order'])
  ]
  # An output is known to the page by its letter alone: positions in the file
  # could give a model away. Ranks are stored by position.
  if posted is None:
    posted = work['draft'].get(name, {})
    if name == 'ranks':
      posted = {
        f'rank{place}': posted.get(f'rank{position}', '')
        for place, position in enumerate(work['order'])
      }
  values = {
    'work': work,
    'number': number,
    'names': names,
    'last': number == len(names) - 1,
    'posted': posted,
    'message': message,
    'kind_title': answers.KINDS[kind],
    'reasons': answers.SKIP_REASONS,
    'submission': secrets.token_hex(16),
    'style': _style(work),
    'complete': _complete_pages(work),
    'status': status,
  }
  about = work['draft'].get('prompt', {})
  if name == 'write':
    values['questions'] = (
      answers.prompt_questions(kind) if kind == 'demonstration' else ()
    )
    values['num_pairs'] = answers.NUM_PAIRS
    return visit.page('task_write.html', **values)
  if name == 'prompt':
    return visit.page(
      'task_prompt.html', questions=answers.prompt_questions(kind), **values
    )
  if name == 'ranks':
    ratings = [
      work['draft'].get(f'output{position}', {}) for position in work['order']
    ]
    key = 'overall' if kind == 'ranking' else 'toxicity'
    for output, rating in zip(shown_outputs, ratings, strict=True):
      output['rating'] = rating.get(key, '–')
    return visit.page(
      'task_rank.html',
      outputs=shown_outputs,
      rating_name=key.replace('overall', 'quality'),
      **values,
    )
  return visit.page(
    'task_output.html',
    questions=answers.output_questions(kind, about),
    output=shown_outputs[number - 1],
    **values,
  )


def answer_task(visit):
  """One page of a task: `action` is next, draft, autosave or submit.

  `autosave` is the page's script, which wants no page back.
  """
  work = _own_work(visit)
  names = _ordered_pages(work)
  number = visit.number('step')
  if number >= len(names):
    raise RefusedError(404, 'There is no such page.')
  name = names[number]
  form = visit.form
  action = form.get('action', '')
  control = ('csrf', 'action', 'submission')
  posted = {key: form[key] for key in form if key not in control}
  if name == 'ranks':
    posted = {
      f'rank{position}': form.get(f'rank{place}', '')
      for place, position in enumerate(work['order'])
    }
  try:
    posted = {
      answers.clean(key, 'A field'): answers.clean(value, 'A text')
      for key, value in posted.items()
    }
    if action == 'submit' and number == len(names) - 1:
      revision = visit.store.submit(
        work['id'], visit.account.id, name, posted, form.get('submission', '')
      )
      return _to(f'/?label=1&saved={work["id"]}-{revision}')
    state = visit.store.save_draft(work['id'], visit.account.id, name, posted)
    if action == 'autosave':
      if state == 'expired':
        return responses.PlainTextResponse(
          'Draft saved, but the time of this task is over', 202
        )
      return responses.Response(status_code=204)
    if action == 'draft':
      return _to('/?label=1&draft=1')
    answers.check_page(
      work['kind'],
      name,
      posted,
      work['draft'],
      len(work['texts']),
      _style(work),
    )
    if number == len(names) - 1:
      raise answers.AnswerError('Please use the Submit button')
  except (answers.AnswerError, store.StoreError) as error:
    status = 422 if isinstance(error, answers.AnswerError) else 409
    return _task_page(
      visit, _own_work(visit), number, str(error), dict(form), status
    )
  return _to(f'/task/{work["id"]}/{number + 1}')


def skip_task(visit):
  """Gives a task up, with a reason."""
  work = _own_work(visit)
  visit.store.skip(work['id'], visit.account.id, visit.form.get('reason', ''))
  return _to('/?label=1&skipped=1')


def flag_task(visit):
  """Tells the researchers about a task."""
  work = _own_work(visit)
  visit.store.flag(work['id'], visit.account.id, visit.form.get('text', ''))
  return _to(_first_page(visit, work['id']))


# --- Researchers ------------------------------------------------------------


def show_grading(visit):
  """Newcomers' demonstrations, for researchers to grade."""
  rows = [
    row
    for row in research.labeled(visit.store)
    if row.screening and row.kind == 'demonstration' and not row.is_researcher
  ]
  with visit.store.read() as c:
    mine = dict(
      c.execute(
        sa.select(schema.grades.c.assignment_id, schema.grades.c.grade).where(
          schema.grades.c.account_id == visit.account.id
        )
      ).all()
    )
  # B.1 chose on anonymous data: no names here.
  return visit.page('grading.html', rows=rows, grades=mine)


def grade(visit):
  """Stores a researcher's grade of a demonstration."""
  research.grade(
    visit.store,
    visit.number('assignment'),
    visit.account.id,
    _integer(visit.form.get('grade', ''), 'The grade'),
  )
  return _to('/grading')


# --- Admin ------------------------------------------------------------------


def _integer(text, what):
  if not re.fullmatch(r'-?\d{1,9}', text):
    raise store.StoreError(f'{what} must be a whole number')
  return int(text)


def show_admin(visit):
  """Progress by batch, and flags."""
  with visit.store.read() as c:
    flags = c.execute(
      sa.select(schema.flags, schema.tasks.c.prompt, schema.accounts.c.name)
      .join(
        schema.assignments,
        schema.assignments.c.id == schema.flags.c.assignment_id,
      )
      .join(schema.tasks, schema.tasks.c.id == schema.assignments.c.task_id)
      .join(
        schema.accounts, schema.accounts.c.id == schema.assignments.c.account_id
      )
      .order_by(schema.flags.c.id.desc())
      .limit(20)
    ).all()
    skips = c.execute(
      sa.select(schema.assignments.c.reason, sa.func.count())
      .where(schema.assignments.c.state == 'skipped')
      .group_by(schema.assignments.c.reason)
    ).all()
  return visit.page(
    'admin.html',
    batches=research.progress(visit.store),
    flags=flags,
    skips=skips,
  )


def show_accounts(visit):
  """Who labels, how fast and how much."""
  rows = research.labeled(visit.store)
  return visit.page(
    'accounts.html', people=research.people(visit.store, rows), link=''
  )


def _link_page(visit, account_id):
  token = visit.store.invite(account_id, visit.account.id)
  rows = research.labeled(visit.store)
  return visit.page(
    'accounts.html',
    people=research.people(visit.store, rows),
    link=f'{visit.site.public_url}/join/{token}',
  )


def add_account(visit):
  """Makes an account and shows its link, once."""
  form = visit.form
  account_id = visit.store.add_account(
    form.get('name', ''),
    form.get('role', ''),
    form.get('status', ''),
    visit.account.id,
  )
  return _link_page(visit, account_id)


def invite_again(visit):
  """Makes a new link; the account's old one ends."""
  return _link_page(visit, visit.number('account'))


def set_status(visit):
  """Changes what an account may do."""
  visit.store.set_status(
    visit.number('account'), visit.form.get('status', ''), visit.account.id
  )
  return _to('/admin/accounts')


def show_import(visit):
  """The form that imports tasks."""
  return visit.page(
    'import.html', kinds=answers.KINDS, phases=answers.PHASES, form={}
  )


def import_tasks(visit):
  """Makes a batch of the lines given, or shows what is wrong with them."""
  form = visit.form
  try:
    research.import_tasks(
      visit.store,
      form.get('lines', '').encode('utf-8', 'surrogatepass'),
      source='import',
      name=form.get('name', ''),
      kind=form.get('kind', ''),
      phase=form.get('phase', ''),
      overlap=_integer(form.get('overlap', ''), 'The overlap'),
      screening='screening' in form,
      by=visit.account.id,
    )
  except (records.RecordError, store.StoreError) as error:
    return visit.page(
      'import.html',
      422,
      kinds=answers.KINDS,
      phases=answers.PHASES,
      form=form,
      message=str(error),
    )
  return _to('/admin')


def close_batch(visit):
  """Closes a batch to new claims, or opens it."""
  closed = visit.form.get('closed', '') == '1'
  with visit.store.write() as c:
    changed = c.execute(
      schema.batches.update()
      .where(schema.batches.c.id == visit.number('batch'))
      .values(closed=closed)
    ).rowcount
    if not changed:
      raise RefusedError(404, 'There is no such page.')
    visit.store.audit(
      c,
      visit.account.id,
      'close' if closed else 'open',
      f'batch {visit.number("batch")}',
    )
  return _to('/admin')


def show_agreement(visit):
  """How much labelers agree, and the tasks on which they do not."""
  rows = [row for row in research.labeled(visit.store) if not row.screening]
  return visit.page(
    'agreement.html',
    agreement=research.agreement(rows, visit.store.config.seed),
    people=research.people(visit.store, rows),
    tasks=research.disagreements(rows)[:200],
  )


def show_answers(visit):
  """All answers to a task."""
  rows = research.labeled(visit.store, visit.number('task'))
  if not rows:
    raise RefusedError(404, 'There is no such page.')
  return visit.page('answers.html', rows=rows)


def show_screening(visit):
  """Newcomers' agreement with researchers (B.1)."""
  rows = research.labeled(visit.store)
  return visit.page(
    'screening.html',
    people=research.screening(visit.store, rows),
    config=visit.store.config,
  )


def show_publishing(visit):
  """The form that publishes instructions."""
  pages = [visit.store.instructions(phase) for phase in answers.PHASES]
  return visit.page('publishing.html', pages=pages)


def publish(visit):
  """Publishes a new version of the instructions of a phase."""
  visit.store.publish_instructions(
    visit.form.get('phase', ''), visit.form.get('text', ''), visit.account.id
  )
  return _to('/admin/instructions')


def show_export(visit):
  """The button that exports."""
  return visit.page('export.html', files={})


def export(visit):
  """Writes an export folder and lists its files."""
  moment = datetime.datetime.fromtimestamp(visit.store.clock(), datetime.UTC)
  folder = visit.site.exports / moment.strftime('%Y%m%d-%H%M%S')
  counts = research.export(visit.store, folder)
  with visit.store.write() as c:
    visit.store.audit(c, visit.account.id, 'export', folder.name)
  return visit.page('export.html', files=counts, folder=str(folder))


def download(visit):
  """A file of an export."""
  folder, name = (visit.request.path_params[k] for k in ('folder', 'name'))
  path = visit.site.exports / folder / name
  if (
    not re.fullmatch(r'\d{8}-\d{6}', folder)
    or not re.fullmatch(r'[a-z_]+\.jsonl?', name)
    or not path.is_file()
  ):
    raise RefusedError(404, 'There is no such page.')
  return responses.FileResponse(path, filename=name)


def show_audit(visit):
  """The last 300 things done by an account."""
  with visit.store.read() as c:
    rows = c.execute(
      sa.select(schema.audit, schema.accounts.c.name)
      .outerjoin(
        schema.accounts, schema.accounts.c.id == schema.audit.c.account_id
      )
      .order_by(schema.audit.c.id.desc())
      .limit(300)
    ).all()
  return visit.page('audit.html', rows=rows)


def missing(visit):
  """Any other address."""
  raise RefusedError(404, 'There is no such page.')


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


def _address(text):
  """The parts of a URL that a request's header holds."""
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
    self.templates.filters.update(
      shown=shown,
      when=_when,
      duration=_duration,
      percent=_percent,
      estimate=_estimate,
    )
    self.templates.globals['letters'] = _LETTERS

  async def body(self, request, most):
    """The posted fields; refuses more than `most` bytes while they come."""
    parts, size = [], 0
    async for part in request.stream():
      size += len(part)
      if size > most:
        raise RefusedError(413, f'At most {most:,} bytes can be sent at once.')
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
    """Refuses what comes too often, whatever else is wrong with it."""
    config = self.store.config
    key = f'account {account.id}' if account else None
    most = config.requests_per_minute
    if key is None:
      joins = request.url.path.startswith('/join/')
      address = request.client.host if request.client else ''
      key = f'{"joins" if joins else "address"} {address}'
      most = config.joins_per_minute if joins else most
    if not self.limit.allows(key, most):
      raise RefusedError(429, 'Too many requests. Please wait a minute.')

  def _check_place(self, request):
    """Refuses other hosts' names, and forms that are on another site's page.

    Browsers say where a form comes from; programs that are none need not.
    """
    host = request.headers.get('host', '')
    if _address(f'//{host}').hostname != self.host:
      raise RefusedError(400, 'This site has another address.')
    if request.method in ('GET', 'HEAD'):
      return
    # 'none': the visitor's own doing, as when a page is loaded again.
    fetch = request.headers.get('sec-fetch-site', 'none')
    origin = request.headers.get('origin', f'//{host}')
    own = (host, _address(self.public_url).netloc)
    place = _address(origin).netloc
    if fetch not in ('same-origin', 'none') or place not in own:
      raise RefusedError(
        403, 'This form was on a page of another site. Please use ours.'
      )

  async def dispatch(self, request, access, handler):
    """Runs a handler for those who may; every reply has the same headers."""
    account, reply = None, None
    try:
      token = request.cookies.get(COOKIE, '')
      if token:
        account = await concurrency.run_in_threadpool(self.store.session, token)
      config = self.store.config
      self._count(request, account)
      self._check_place(request)
      if account is None and access != 'anyone':
        raise RefusedError(
          401,
          SIGNED_OUT
          if token
          else 'Please use your invitation link to sign in.',
        )
      if account is not None and account.role not in _ALLOWED[access]:
        # As for a page that does not exist: the site says nothing about it.
        raise RefusedError(404, 'There is no such page.')
      form = {}
      if request.method == 'POST':
        is_admin = account is not None and account.role == 'admin'
        form = await self.body(
          request,
          config.max_import_bytes if is_admin else config.max_body_bytes,
        )
        # Signing in has a token of its own, for who is signed out.
        own_token = account is None or handler is join
        if not own_token and not _same(form.get('csrf', ''), account.csrf):
          raise RefusedError(
            403, 'This page is too old. Please go back and load it again.'
          )
      visit = Visit(self, request, account, form)
      reply = await concurrency.run_in_threadpool(handler, visit)
    except RefusedError as error:
      reply = self.error(account, error.status, str(error))
    except store.StoreError as error:
      reply = self.error(account, 409, str(error))
    except answers.AnswerError as error:
      reply = self.error(account, 422, str(error))
    except Exception:
      traceback.print_exc()  # For who runs the site; the visitor sees nothing.
      reply = self.error(
        account, 500, 'Something went wrong. Please try again.'
      )
    reply.headers.update(HEADERS)
    return reply

  def error(self, account, status, message):
    text = self.templates.get_template('error.html').render(
      account=account,
      status=status,
      title=http.HTTPStatus(status).phrase,
      text=message,
    )
    return responses.HTMLResponse(text, status)


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
  # What does not exist is counted and refused like everything else.
  nothing = routing.Route('/{path:path}', endpoint('anyone', missing))
  nothing.methods = None  # All of them.
  return applications.Starlette(routes=[*routes, nothing])
