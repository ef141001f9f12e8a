"""report.html: what it says, and that a browser shows it without complaint."""

import dataclasses
import functools
import html.parser
import json
import os
import re
import shutil
import subprocess

import pytest

from instruct_jax.evals import html_report, plots, samples
from tests import test_evals_report

_HOSTILE = (
  '<script>document.title="owned"</script>'
  '<img src=x onerror="document.title=\'owned\'">"\'&</td></table>'
)


def answer(model, prompt_id, text, score, category):
  return samples.Sample(
    model, prompt_id, f'prompt {prompt_id}', text, 3, True, category, score
  )


def rows():
  found = [(i, 'chat' if i % 2 else 'open qa', f'answer {i}') for i in range(6)]
  found.append((6, 'chat', _HOSTILE))
  return [
    samples.Row(
      f'p{i}',
      f'prompt p{i}',
      category,
      {
        'sft': answer('sft', f'p{i}', 'plain', 0.5, category),
        'ppo_ptx': answer('ppo_ptx', f'p{i}', text, i / 10, category),
      },
    )
    for i, category, text in found
  ]


@pytest.fixture(scope='module')
def page():
  figures = dataclasses.replace(test_evals_report._full(), more_samples=rows())
  return html_report.make_html(figures, plots.make_plots(figures))


class Elements(html.parser.HTMLParser):
  """Tags with their attributes, and the text outside of script and style."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.text, self._skipping = [], '', False
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    self._skipping = tag in ('script', 'style')

  def handle_endtag(self, tag):
    self._skipping = False

  def handle_data(self, data):
    if not self._skipping:
      self.text += data


def test_samples_stay_text(page):
  found = Elements(page)
  assert [tag for tag, _ in found.tags].count('script') == 1
  assert not any('onerror' in attributes for _, attributes in found.tags)
  assert _HOSTILE in found.text


def test_nothing_points_outside(page):
  found = Elements(page)
  for _, attributes in found.tags:
    for name in ('src', 'href'):
      if name in attributes:
        assert attributes[name].startswith('data:')
  assert 'http://' not in page and 'https://' not in page
  assert "default-src 'none'" in page
  assert '@import' not in page and 'url(' not in page


def test_figures_and_doubts_are_there(page):
  text = Elements(page).text
  figures = test_evals_report._full()
  for name, rate in figures.win_rate.items():
    if name != 'sft':
      assert f'{rate.rate:.0%}' in text
  assert figures.judge in text
  assert page.count('data:image/png;base64,') >= 5


# --- In a browser -------------------------------------------------------------


@pytest.fixture(scope='module')
def browser():
  names = ('chromium', 'chromium-browser', 'google-chrome')
  found = [path for path in map(shutil.which, names) if path]
  if not found and os.path.exists('/usr/bin/chromium'):
    found = ['/usr/bin/chromium']
  if not found:
    pytest.skip('no Chromium on this machine')
  return found[0]


def open_in(browser, page, folder, fragment):
  """Opens a page at a hash; gives (document after scripts, log, net log)."""
  (folder / 'report.html').write_text(page)
  done = subprocess.run(
    [
      browser,
      '--headless',
      '--no-sandbox',
      '--disable-gpu',
      '--disable-background-networking',
      '--disable-component-update',
      '--no-first-run',
      f'--user-data-dir={folder}/profile',
      f'--log-net-log={folder}/net.json',
      '--enable-logging=stderr',
      '--virtual-time-budget=2000',
      '--dump-dom',
      f'file://{folder}/report.html#{fragment}',
    ],
    capture_output=True,
    text=True,
    timeout=180,
  )
  return done.stdout, done.stderr, (folder / 'net.json').read_text()


def requests_of_page(net):
  """Addresses asked for by the page; the browser's own have no origin."""
  found = set()
  for line in net.splitlines():
    if '"initiator":' in line:  # One event a line.
      event = json.loads(line.rstrip(',]}') + '}')['params']
      found.add((event['initiator'], event['url']))
  return {
    url
    for origin, url in found
    if origin != 'not an origin' and url.startswith('http')
  }


@pytest.fixture
def open_page(browser, page, tmp_path):
  return functools.partial(open_in, browser, page, tmp_path)


def visible(document):
  """Numbers of the sample rows in the order and with the filters shown."""
  body = document.split('id="samples"')[1].split('</table>')[0]
  found = []
  for attributes in re.findall(r'<tr ([^>]*data-number[^>]*)>', body):
    if 'hidden' not in attributes:
      found.append(int(re.search(r'data-number="(\d+)"', attributes)[1]))
  return found


def test_a_browser_shows_it_without_errors_or_requests(open_page):
  document, log, net = open_page('')
  assert visible(document) == [0, 1, 2, 3, 4, 5, 6]
  assert '7 of 7 prompts' in document
  assert 'CONSOLE' not in log, log[-2000:]
  assert 'owned' not in document.split('</title>')[0]
  assert not requests_of_page(net)


def test_requests_of_a_page_are_seen(browser, tmp_path):
  """The check above must be able to fail."""
  asking = '<img src="http://example.invalid/a.png">'
  _, _, net = open_in(browser, asking, tmp_path, '')
  assert requests_of_page(net) == {'http://example.invalid/a.png'}


def test_filters_and_order_come_from_the_address(open_page):
  document, _, _ = open_page('category=chat&order=gain')
  # By falling gain of the last model over SFT: scores are i / 10.
  assert visible(document) == [6, 5, 3, 1]
  assert '4 of 7 prompts' in document
  document, _, _ = open_page('search=ANSWER%204')
  assert visible(document) == [4]
