"""The labeling site in a real browser: mouse, touch, keyboard, accessibility.

Needs `playwright` and Debian's `chromium`. With LABELING_SCREENSHOTS=DIR every
page is also photographed at desktop and phone width. axe-core is used where
AXE_CORE names its axe.min.js, or the axe-core-python package holds one.
"""

import importlib.util
import json
import os
import pathlib
import shutil
import threading
import time

import pytest

pytest.importorskip('starlette', reason='pip install -r requirements-labeling')
pytest.importorskip('playwright')

import uvicorn
from etils import epath
from playwright import sync_api

from experiments import reward
from instruct_jax.data import records
from instruct_jax.labeling import (
  answers,
  demo,
  exporting,
  importing,
  research,
  schema,
  store,
  web,
)
from tests import labeling_people as people
from tests import test_labeling_reward

CHROMIUM = shutil.which('chromium')
pytestmark = pytest.mark.skipif(
  CHROMIUM is None, reason='no chromium: apt install chromium'
)
DESKTOP = {'width': 1280, 'height': 900}
PHONE = {'width': 375, 'height': 812}


class LiveSite:
  """The site on a real port, in a thread."""

  def __init__(self, folder):
    self.store = store.Store(
      store.make_engine(f'sqlite:///{folder}/site.sqlite'),
      people.make_config(requests_per_minute=10_000, demo_tasks=4),
    )
    self.store.prepare()
    server_config = uvicorn.Config(None, port=0, log_level='warning')
    listener = server_config.bind_socket()
    self.url = f'http://127.0.0.1:{listener.getsockname()[1]}'
    self.exports = folder / 'exports'
    self.app = web.make_app(self.store, self.url, str(self.exports))
    server_config.app = self.app
    self.server = uvicorn.Server(server_config)
    self.thread = threading.Thread(
      target=self.server.run, kwargs={'sockets': [listener]}
    )
    self.thread.start()
    while not self.server.started:
      time.sleep(0.02)

  def close(self):
    self.server.should_exit = True
    self.thread.join()

  def link(self, name, role='labeler', status='active'):
    account_id = self.store.add_account(name, role, status)
    return f'{self.url}/join/{self.store.invite(account_id)}'


@pytest.fixture(scope='module')
def browser():
  with sync_api.sync_playwright() as playwright:
    found = playwright.chromium.launch(
      executable_path=CHROMIUM, args=['--no-sandbox']
    )
    yield found
    found.close()


@pytest.fixture
def live(tmp_path):
  site = LiveSite(tmp_path)
  yield site
  site.close()


def enter(browser, live, link, **settings):
  """A signed-in page; tests can check its script errors and CSP reports."""
  context = browser.new_context(viewport=DESKTOP, **settings)
  page = context.new_page()
  page.set_default_timeout(30_000)
  page.problems = []
  page.on('pageerror', lambda error: page.problems.append(str(error)))
  page.on(
    'console',
    lambda m: page.problems.append(m.text) if m.type == 'error' else None,
  )
  page.on('dialog', lambda dialog: dialog.accept())
  page.goto(link)
  page.get_by_role('button', name='Sign in').click()
  return page


def rate_all(page, outputs):
  page.get_by_role('button', name='Next task').click()
  page.get_by_role('button', name='Save and continue').click()
  for _ in range(outputs):
    page.get_by_label('5', exact=True).check()
    page.get_by_role('button', name='Save and continue').click()
  page.get_by_role('heading', name='Rank the outputs').wait_for()


def letter_of(page, text):
  card = page.locator('.card', has_text=text)
  return card.get_attribute('data-letter')


def handle(page, letter):
  return page.get_by_role('button', name=f'Move output {letter}', exact=True)


def column(page, rank):
  return page.locator(f'.rank-column[data-rank="{rank}"]')


def drag_by_mouse(page, letter, rank):
  grip = handle(page, letter)
  grip.scroll_into_view_if_needed()
  box = grip.bounding_box()
  page.mouse.move(box['x'] + 5, box['y'] + 5)
  page.mouse.down()
  target = column(page, rank).locator('h3').first
  for _ in range(60):  # The page scrolls while the card is near its edge.
    found = target.bounding_box()
    y = min(max(found['y'] + 5, 30), 870)
    page.mouse.move(found['x'] + 20, y, steps=3)
    if abs(y - found['y'] - 5) < 1:
      break
  page.mouse.up()


def test_from_clicks_in_a_browser_to_an_export(browser, live, tmp_path):
  load(live, people.ranking_items(1, 3))
  page = enter(browser, live, live.link('anna'))
  rate_all(page, 3)
  ranks = {'text 0': 2, 'text 1': 1, 'text 2': 2}
  for text, rank in ranks.items():
    drag_by_mouse(page, letter_of(page, text), rank)
    assert column(page, rank).get_by_text(text).is_visible()
  page.get_by_role('button', name='Submit').click()
  page.get_by_role('heading', name='Your work').wait_for()
  exporting.export(live.store, tmp_path / 'out')
  (found,) = records.read_jsonl(
    tmp_path / 'out/comparisons.jsonl', records.Comparison
  )
  assert found.ranks == (2, 1, 2)
  assert page.problems == []


@pytest.mark.slow
def test_from_clicks_in_a_browser_to_a_reward_model(
  browser, live, tmp_path, quick_compile
):
  load(live, people.ranking_items(8, 2))
  page = enter(browser, live, live.link('anna'))
  for _ in range(8):
    rate_all(page, 2)
    for text, rank in (('text 0', 1), ('text 1', 2)):
      drag_by_mouse(page, letter_of(page, text), rank)
    page.get_by_role('button', name='Submit').click()
    page.get_by_role('heading', name='Your work').wait_for()
  load(live, [{'prompt': 'Prompt number 1'}], 'demonstration')
  page.get_by_role('button', name='Next task').click()
  page.get_by_label('The response').fill('text 0')
  page.get_by_role('button', name='Submit').click()
  page.get_by_role('heading', name='Your work').wait_for()
  folder = epath.Path(tmp_path)
  exporting.export(live.store, folder / 'out')
  for split in ('train', 'valid'):  # So few may all fall on one side.
    shutil.copy(
      folder / 'out/comparisons.jsonl',
      folder / f'out/comparisons_{split}.jsonl',
    )
  config = test_labeling_reward.make_config(folder / 'out', folder, folds=False)
  results = reward.run(config, folder / 'reward')
  assert results['accuracy'] == 1.0
  assert results['num_comparisons'] == 8


def load(live, items, kind='ranking', phase='training', **settings):
  importing.import_tasks(
    live.store,
    '\n'.join(json.dumps(item) for item in items).encode(),
    source='test',
    name=settings.pop('name', kind),
    kind=kind,
    phase=phase,
    overlap=settings.pop('overlap', 3),
    **settings,
  )


def test_ranking_by_keyboard_alone(browser, live):
  load(live, people.ranking_items(1, 3))
  page = enter(browser, live, live.link('anna'))

  def tab_to(name):
    for _ in range(120):
      page.keyboard.press('Tab')
      focused = page.evaluate(
        'document.activeElement.innerText || document.activeElement.name'
      )
      if focused.strip() == name:
        return
    raise AssertionError(f'{name} is not reached by Tab')

  tab_to('Next task')
  page.keyboard.press('Enter')
  page.wait_for_url('**/task/**')
  tab_to('Save and continue')
  page.keyboard.press('Enter')
  for _ in range(3):
    page.get_by_role('heading', name='Output', level=2).wait_for()
    tab_to('overall')
    page.keyboard.press('Space')
    for _ in range(4):
      page.keyboard.press('ArrowRight')
    tab_to('Save and continue')
    with page.expect_navigation():
      page.keyboard.press('Enter')
  texts = {letter_of(page, f'text {i}'): i for i in range(3)}
  for letter, number in texts.items():
    handle(page, letter).focus()
    for _ in range(number + 1):  # The first press gives rank 1.
      page.keyboard.press('ArrowDown')
    assert page.evaluate('document.activeElement.innerText').endswith(letter)
    announced = page.locator('#announcement').inner_text()
    assert announced == f'Output {letter} is now at rank {number + 1}'
  tab_to('Submit')
  page.keyboard.press('Enter')
  page.get_by_role('heading', name='Your work').wait_for()
  (row,) = research.labeled(live.store)
  assert row.content['ranks'] == [1, 2, 3]
  assert {r['overall'] for r in row.content['ratings']} == {5}
  assert page.problems == []


def test_the_keys_of_the_list_work(browser, live):
  load(live, people.ranking_items(1, 3))
  page = enter(browser, live, live.link('anna'))
  page.get_by_role('button', name='Next task').click()
  keys = page.get_by_role('region', name='Keys')
  assert 'save and continue' in keys.inner_text()
  page.keyboard.press('Control+Enter')
  for number in range(3):
    page.get_by_role('heading', name='Output', level=2).wait_for()
    assert 'Overall quality' in keys.inner_text()
    # Keys are text while somebody writes, and do nothing when turned off.
    page.get_by_label('Notes').fill('')
    page.get_by_label('Notes').press('7')
    assert page.get_by_label('Notes').input_value() == '7'
    if number == 0:
      page.get_by_label('Use the keys without Ctrl').uncheck()
      page.get_by_role('heading', name='Output', level=2).click()
      page.keyboard.press('3')
      assert page.locator('input[name=overall]:checked').count() == 0
      page.get_by_label('Use the keys without Ctrl').check()
    page.get_by_role('heading', name='Output', level=2).click()
    page.keyboard.press(str(number + 2))
    with page.expect_navigation():
      page.keyboard.press('Control+Enter')
  page.get_by_role('heading', name='Rank the outputs').wait_for()
  with page.expect_navigation():
    page.keyboard.press('[')
  with page.expect_navigation():
    page.keyboard.press('Control+Enter')
  for number in range(3):
    page.keyboard.press(letter_of(page, f'text {number}').lower())
    page.keyboard.press(str(number + 1))
  page.keyboard.press('Control+Enter')
  page.get_by_role('heading', name='Your work').wait_for()
  (row,) = research.labeled(live.store)
  assert row.content['ranks'] == [1, 2, 3]
  found = sorted(rating['overall'] for rating in row.content['ratings'])
  assert found == [2, 3, 4]
  assert page.problems == []


def test_ranking_by_touch(browser, live):
  load(live, people.ranking_items(1, 2))
  page = enter(browser, live, live.link('anna'), has_touch=True)
  page.set_viewport_size(PHONE)
  rate_all(page, 2)
  cdp = page.context.new_cdp_session(page)

  def touch(kind, x=0, y=0):
    points = [] if kind == 'touchEnd' else [{'x': x, 'y': y}]
    cdp.send('Input.dispatchTouchEvent', {'type': kind, 'touchPoints': points})

  for text, rank in (('text 0', 2), ('text 1', 1)):
    letter = letter_of(page, text)
    # Both ends are in view, so nothing scrolls during the drag.
    handle(page, letter).scroll_into_view_if_needed()
    page.evaluate('window.scrollTo(0, document.body.scrollHeight)')
    start = handle(page, letter).bounding_box()
    end = column(page, rank).bounding_box()
    touch('touchStart', start['x'] + 15, start['y'] + 15)
    for part in range(1, 6):
      y = start['y'] + 15 + (end['y'] + 20 - start['y'] - 15) * part / 5
      touch('touchMove', start['x'] + 15, y)
    touch('touchEnd')
    assert column(page, rank).get_by_text(text).is_visible()
  page.get_by_role('button', name='Submit').click()
  page.get_by_role('heading', name='Your work').wait_for()
  assert research.labeled(live.store)[0].content['ranks'] == [2, 1]


def test_a_file_is_read_as_utf_8_or_refused(browser, live, tmp_path):
  page = enter(browser, live, live.link('boss', 'admin'))
  page.goto(live.url + '/admin/import')
  page.get_by_label('Name of the batch').fill('new')
  line = '{"prompt": "größe", "completions": ["a", "b"]}'
  for encoding in ('latin-1', 'utf-8'):
    path = tmp_path / encoding
    path.write_bytes(line.encode(encoding))
    chosen = page.get_by_label('File')
    chosen.set_input_files(str(path))
    words = 'e => e.validationMessage'
    expected = 'not UTF-8' if encoding == 'latin-1' else ''
    deadline = time.monotonic() + 30
    while (
      not page.locator('#lines').input_value()
      and not (expected and expected in chosen.evaluate(words))
    ):  # fmt: skip
      assert time.monotonic() < deadline
      page.wait_for_timeout(20)
    page.get_by_role('button', name='Import', exact=True).click()
    assert ('imported' in page.url) == (encoding == 'utf-8')
  page.get_by_text('Imported: new: ranking, 1 tasks').wait_for()
  with live.store.read() as c:
    (prompt,) = c.execute(schema.tasks.select()).all()
  assert prompt.prompt == 'größe'


def test_drafts_are_saved_without_a_button(browser, live):
  load(live, [{'prompt': 'W'}], 'demonstration')
  page = enter(browser, live, live.link('anna'))
  page.clock.install()
  page.get_by_role('button', name='Next task').click()
  response = page.get_by_label('The response')
  response.fill('one and a ha')
  page.get_by_text('Draft saved').wait_for()
  page.reload()
  assert response.input_value() == 'one and a ha'
  # While offline, the page says so; it saves when the site answers again.
  page.route('**/task/**', lambda route: route.abort())
  response.fill('one and a half')
  page.get_by_text('The draft is not saved yet').wait_for()
  page.unroute('**/task/**')
  page.clock.fast_forward(10_000)
  page.get_by_text('Draft saved').wait_for()
  assert not research.labeled(live.store)
  # A submit waits for a draft that is being saved.
  page.route(
    '**/task/**',
    lambda route: (
      (time.sleep(0.5), route.continue_())
      if 'autosave' in (route.request.post_data or '')
      else route.continue_()
    ),
  )
  with page.expect_request(
    lambda request: 'autosave' in (request.post_data or '')
  ):
    response.fill('one and a half.')
  response.fill('All of it.')
  page.get_by_role('button', name='Submit').click()
  page.get_by_role('heading', name='Your work').wait_for()
  (row,) = research.labeled(live.store)
  assert row.content['response'] == 'All of it.'
  work = live.store.work(row.assignment_id, row.account_id)
  assert work['draft']['write']['response'] == 'All of it.'


def test_text_typed_before_the_script_loads_is_saved(browser, live):
  load(live, [{'prompt': 'W'}], 'demonstration')
  page = enter(browser, live, live.link('anna'))
  # The earlier page has the same script, which must have loaded.
  page.wait_for_load_state()
  held = []
  page.route('**/labeling.js', lambda route: held.append(route))
  page.get_by_role('button', name='Next task').click(no_wait_after=True)
  page.get_by_label('The response').fill('early words')
  deadline = time.monotonic() + 30
  while not held and time.monotonic() < deadline:
    page.wait_for_timeout(20)
  (script,) = held
  script.continue_()
  page.get_by_text('Draft saved').wait_for()
  page.unroute('**/labeling.js')
  page.reload()
  assert page.get_by_label('The response').input_value() == 'early words'


def test_another_site_cannot_sign_a_visitor_in(browser, live):
  """A real cross-site form, as on an attacker's page."""
  link = live.link('mallory')
  page = browser.new_context(viewport=DESKTOP).new_page()
  page.set_default_timeout(30_000)

  def attack(fields=''):
    form = f'<form method="post" action="{link}">{fields}<button>Win</button>'
    page.route(
      'http://elsewhere.example/',
      lambda route: route.fulfill(body=form, content_type='text/html'),
    )
    page.goto('http://elsewhere.example/')
    page.get_by_role('button', name='Win').click()
    page.get_by_role('heading', name='Forbidden').wait_for()
    names = [cookie['name'] for cookie in page.context.cookies(live.url)]
    assert 'labeling' not in names

  attack()
  # Not even after the visitor has opened the page of the link.
  page.goto(link)
  token = page.locator('input[name=joining]').get_attribute('value')
  attack(f'<input name="joining" value="{token}">')
  # The link was not used up: it works from its own page.
  page.goto(link)
  page.get_by_role('button', name='Sign in').click()
  page.get_by_role('heading', name='Your work').wait_for()


def test_a_second_sign_in_is_announced_and_ends_the_first(browser, live):
  load(live, [{'prompt': 'W'}], 'demonstration')
  first = enter(browser, live, live.link('anna'))
  first.get_by_role('button', name='Next task').click()
  first.get_by_label('The response').fill('half of')
  first.get_by_text('Draft saved').wait_for()
  with live.store.read() as c:
    anna = c.execute(
      schema.accounts.select().where(schema.accounts.c.name == 'anna')
    ).one()
  page = browser.new_context(viewport=DESKTOP).new_page()
  page.goto(f'{live.url}/join/{live.store.invite(anna.id)}')
  page.get_by_text('ends your session on any other browser').wait_for()
  page.get_by_role('button', name='Sign in').click()
  page.get_by_role('button', name='Continue your open task').click()
  assert page.get_by_label('The response').input_value() == 'half of'
  first.get_by_label('The response').fill('half of it')
  first.get_by_text('You are signed out here').wait_for()
  assert any('401' in problem for problem in first.problems)


def test_an_expired_task_says_so(browser, live):
  load(live, [{'prompt': 'W'}], 'demonstration', overlap=1)
  page = enter(browser, live, live.link('anna'))
  page.get_by_role('button', name='Next task').click()
  response = page.get_by_label('The response')
  response.fill('half of')
  page.get_by_text('Draft saved').wait_for()
  live.store.clock = lambda: time.time() + 3 * 3600
  assert people.enter(live, 'ben').claim() is not None
  response.fill('half of it')
  page.get_by_text('the time for this task is over').wait_for()
  page.reload()
  page.get_by_text('The time for this task is over').wait_for()
  assert response.input_value() == 'half of it'
  page.get_by_role('link', name='Labeling', exact=True).click()
  page.get_by_role('heading', name='not finished in time').wait_for()
  assert page.get_by_role('link', name='demonstration').count() == 1
  assert page.problems == []


def test_everything_works_without_scripts(browser, live):
  load(live, people.ranking_items(1, 2))
  page = enter(browser, live, live.link('anna'), java_script_enabled=False)
  rate_all(page, 2)
  for i in range(2):
    page.locator(f'select[name=rank{i}]').select_option(str(i + 1))
  page.get_by_role('button', name='Submit').click()
  page.get_by_role('heading', name='Your work').wait_for()
  assert len(research.labeled(live.store)) == 1


def test_hostile_texts_stay_texts(browser, live):
  hostile = [
    '<script>document.title = "owned"</script><img src=x onerror=alert(1)>',
    '\u202etxet desrever\u200b',
    'a' * 1_000_000,
  ]
  load(live, [{'prompt': hostile[0], 'completions': hostile}])
  page = enter(browser, live, live.link('anna'))
  begin = time.monotonic()
  rate_all(page, 3)
  assert time.monotonic() - begin < 60
  assert 'owned' not in page.title()
  assert page.locator('main img').count() == 0
  assert page.get_by_text('U+202E').count() == 1
  width = page.evaluate('document.documentElement.scrollWidth')
  assert width <= DESKTOP['width']  # A megabyte without a space is wrapped.
  assert page.problems == []


def _axe_source():
  if 'AXE_CORE' in os.environ:
    return pathlib.Path(os.environ['AXE_CORE']).read_text()
  package = importlib.util.find_spec('axe_core_python')
  if package is None:
    return None
  return next(pathlib.Path(package.origin).parent.rglob('axe*.js')).read_text()


def _fill_demo(live, browser):
  """Fills every page of a site; returns labeler and admin pages."""
  demo.fill(live.store)
  judge = enter(browser, live, live.link('judge', 'researcher'))
  rookie = enter(browser, live, live.link('rookie', status='screening'))
  for page in (judge, rookie):
    for rank in (1, 2):
      rate_all(page, 4)
      for i in range(4):
        choice = page.locator(f'select[name=rank{i}]')
        choice.select_option(str(1 + (i + rank) % 4))
      page.get_by_role('button', name='Submit').click()
      page.get_by_text('Your last answers').wait_for()
  # Two labelers on the same answers, and demonstrations to grade.
  for number, name in enumerate(('anna', 'ben')):
    person = people.enter(live, name)
    for _ in range(3):
      person.rank(
        person.claim(), lambda text, n=number: 1 + (len(text) + n) % 4
      )
  scribe = people.enter(live, 'scribe', status='screening')
  for _ in range(4):
    scribe.rank(scribe.claim(), lambda text: 1 + len(text) % 4)
  for _ in range(2):
    scribe.fill(scribe.claim(), 0, response='i would rather not say that .')
  admin = enter(browser, live, live.link('boss', 'admin'))
  labeler = enter(browser, live, live.link('newcomer'))
  return rookie, labeler, admin


def test_every_page_is_accessible_and_fits(browser, live):
  """axe-core finds nothing; no page is wider than its window."""
  axe = _axe_source()
  pictures = os.environ.get('LABELING_SCREENSHOTS', '')
  rookie, labeler, admin = _fill_demo(live, browser)
  found = []

  def visit(page, path, name):
    if path is not None:
      page.goto(live.url + path)
    for label, size in (('desktop', DESKTOP), ('phone', PHONE)):
      page.set_viewport_size(size)
      width = page.evaluate('document.documentElement.scrollWidth')
      assert width <= size['width'], f'{name} is {width} px wide on a {label}'
      if pictures:
        page.screenshot(path=f'{pictures}/{name}-{label}.png', full_page=True)
      if axe is not None:
        page.evaluate(axe)
        for item in page.evaluate('axe.run().then(r => r.violations)'):
          nodes = [node['html'][:120] for node in item['nodes'][:2]]
          found.append(f'{name} {label}: {item["id"]}: {nodes}')
    page.set_viewport_size(DESKTOP)

  visit(labeler, '/', 'home')
  visit(rookie, '/', 'home-screening')
  for phase in ('training', 'evaluation', 'toxicity'):
    visit(labeler, f'/instructions/{phase}', f'instructions-{phase}')
  with live.store.read() as c:
    batches = c.execute(schema.batches.select()).all()
  mine = live.store.session(labeler.context.cookies()[0]['value'])
  for batch in batches:
    if batch.screening:
      continue
    # With one open batch, the next task is of its kind.
    with live.store.write() as c:
      c.execute(schema.batches.update().values(closed=True))
      c.execute(
        schema.batches.update()
        .where(schema.batches.c.id == batch.id)
        .values(closed=False)
      )
    for number in range(3 if batch.kind == 'prompt' else 1):
      task = live.store.claim(mine)
      work = live.store.work(task, mine.id)
      pages = answers.pages(work)
      for step, page_name in enumerate(pages):
        if page_name.startswith('output') and step > 1:
          continue
        kind = page_name if not page_name.startswith('output') else 'output'
        visit(
          labeler, f'/task/{task}/{step}', f'task-{batch.kind}-{kind}{number}'
        )
      live.store.skip(task, mine.id, 'Other')
  task = research.queue(live.store)[0]['task_id']
  for method, path, access, _ in web.ROUTES:
    if method == 'GET' and access in ('admin', 'researcher'):
      if '{' in path and '{task' not in path:
        continue
      name = path.replace('/', '-').strip('-').replace('{task:int}', 'x')
      visit(admin, path.replace('{task:int}', str(task)), name)
  admin.goto(live.url + '/admin/accounts')
  admin.get_by_label('Pseudonym').fill('zoe')
  admin.get_by_role('button', name='Invite').click()
  admin.get_by_label('Invitation link').wait_for()
  visit(admin, None, 'admin-invited')
  admin.goto(live.url + '/admin/export')
  visit(admin, '/nothing', 'error')
  assert found == [], '\n' + '\n'.join(found)
  if axe is None:
    pytest.skip('fits everywhere; axe-core is not installed')
