"""A labeling site in this process, and people who use its pages by HTTP."""

import functools
import html
import json
import pathlib
import re
import tempfile

import sqlalchemy
from starlette import testclient

from configs import labeling as config_file
from instruct_jax.labeling import importing, research, store, web

URL = 'http://site.example'


def make_config(**changes):
  config = config_file.get_config()
  with config.unlocked():
    for key, value in changes.items():
      if key not in config:
        raise KeyError(key)
      config[key] = value
  return config


class Clock:
  """A clock that a test sets."""

  def __init__(self):
    self.now = 1_800_000_000.0

  def __call__(self):
    return self.now


@functools.cache
def prepared_database():
  """The SQLite file of an empty site; to migrate for each test takes longer."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'site.sqlite'
    engine = store.make_engine(f'sqlite:///{path}')
    store.Store(engine, make_config(), Clock()).prepare()
    engine.dispose()
    return path.read_bytes()


class Site:
  """A store with its application and an admin.

  Attributes:
    admin: a `Person` with the admin's session.
  """

  def __init__(self, url, folder, **changes):
    self.url = changes.get('public_url', URL)
    self.clock = Clock()
    self.engine = store.make_engine(url)
    self.store = store.Store(self.engine, make_config(**changes), self.clock)
    if self.engine.dialect.name == 'sqlite':
      path = pathlib.Path(self.engine.url.database)
      if not path.exists():
        path.write_bytes(prepared_database())

      # Only the tests that kill processes wait for the disk.
      @sqlalchemy.event.listens_for(self.engine, 'connect')
      def _hurry(connection, record):
        del record
        connection.execute('PRAGMA synchronous=OFF')

    else:
      self.store.prepare()
    self.app = web.make_app(self.store, self.url, str(folder / 'exports'))
    self.admin = self.person('admin', 'admin')

  def person(self, name, role='labeler', status='active'):
    return enter(self, name, role, status)

  def load(self, items, kind='ranking', name=None, **settings):
    settings = {'phase': 'training', 'overlap': 1, **settings}
    return importing.import_tasks(
      self.store,
      '\n'.join(json.dumps(item) for item in items).encode(),
      source='test.jsonl',
      name=name or f'{kind} batch',
      kind=kind,
      **settings,
    )

  def rows(self):
    return research.labeled(self.store)


def enter(site, name, role='labeler', status='active'):
  """A new account's person, signed in by the invitation link."""
  account_id = site.store.add_account(name, role, status)
  person = Person(site, account_id)
  person.join(site.store.invite(account_id))
  return person


def joining_fields(page):
  """The hidden fields of a page that signs in."""
  return dict(re.findall(r'name="(joining)" value="([^"]+)"', page))


class Person:
  """A person with their own browser."""

  def __init__(self, site, account_id):
    self.site = site
    self.id = account_id
    self.client = testclient.TestClient(
      site.app, base_url=site.url, raise_server_exceptions=True
    )

  def join(self, token):
    reply = self.press_sign_in(token)
    assert reply.status_code == 303, reply.text

  def press_sign_in(self, token):
    """Opens a link and presses the button of its page, if there is one."""
    page = self.client.get(f'/join/{token}').text
    return self.client.post(
      f'/join/{token}', data=joining_fields(page), follow_redirects=False
    )

  def get(self, path):
    return self.client.get(path, follow_redirects=False)

  @functools.cached_property
  def csrf(self):
    page = self.client.get('/?label=1').text
    return re.search(r'name="csrf" value="([^"]+)"', page).group(1)

  def post(self, path, **fields):
    return self.client.post(
      path, data={'csrf': self.csrf, **fields}, follow_redirects=False
    )

  def claim(self):
    """Takes the next task; its assignment's id, or None."""
    reply = self.post('/next')
    if reply.status_code == 200:
      return None
    return int(re.match(r'/task/(\d+)/', reply.headers['location']).group(1))

  def texts(self, assignment, page=None):
    """Output texts by letter, from the ranking page."""
    if page is None:
      number = self.num_pages(assignment) - 1
      page = self.get(f'/task/{assignment}/{number}').text
    return {
      letter: html.unescape(text)
      for letter, text in re.findall(
        r'aria-label="Text of output (\w)">(.*?)</div>', page, re.S
      )
    }

  def num_pages(self, assignment):
    page = self.get(f'/task/{assignment}/0').text
    numbers = re.findall(rf'href="/task/{assignment}/(\d+)"', page)
    return max([0, *map(int, numbers)]) + 1

  def fill(self, assignment, step, page=None, **wanted):
    """Answers a page with `wanted`, else the first choice of each question.

    Returns the reply and the fields used; `page` is the page if it was read.
    """
    if page is None:
      page = self.get(f'/task/{assignment}/{step}').text
    fields = {
      name: value
      for name, value in re.findall(
        r'<input type="radio" name="(\w+)" value="([^"]+)"', page
      )
    }
    fields |= dict(
      re.findall(r'type="hidden" name="(submission)" value="(\w+)"', page)
    )
    last = 'value="submit"' in page
    fields['action'] = 'submit' if last else 'next'
    fields |= {k: str(v) for k, v in wanted.items()}
    return self.post(f'/task/{assignment}/{step}', **fields), fields

  def rank(self, assignment, order_of, about_prompt=None, **ratings):
    """Answers a whole ranking task; `order_of` gives a text's rank."""
    pages = self.num_pages(assignment)
    reply, _ = self.fill(assignment, 0, **(about_prompt or {}))
    assert reply.status_code == 303, reply.text
    # The outputs have the same questions.
    page = self.get(f'/task/{assignment}/1').text
    for step in range(1, pages - 1):
      reply, _ = self.fill(assignment, step, page, **ratings)
      assert reply.status_code == 303, reply.text
    page = self.get(f'/task/{assignment}/{pages - 1}').text
    texts = self.texts(assignment, page)
    ranks = {
      f'rank{place}': order_of(texts[letter])
      for place, letter in enumerate(sorted(texts))
    }
    return self.fill(assignment, pages - 1, page, **ranks)


def ranking_items(number, outputs=4):
  return [
    {
      'id': f'p{i}',
      'user': f'u{i}',
      'prompt': f'Prompt number {i}',
      'completions': [f'text {j}' for j in range(outputs)],
      'models': [f'secretmodel{j}' for j in range(outputs)],
    }
    for i in range(number)
  ]


def rank_of(text):
  """`text 0` is best."""
  return int(text.split()[1]) + 1
