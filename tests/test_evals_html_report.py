"""report.html: its content, and how a browser shows it, also on a phone."""

import dataclasses
import html.parser
import os
import re
import shutil

import pytest

from instruct_jax.evals import html_report, plots, samples, sections
from tests import made_figures, test_evals_plots

_HOSTILE = (
  '<script>document.title="owned"</script>'
  '<img src=x onerror="document.title=\'owned\'">"\'&</td></table>{{ 7 * 7 }}'
)
PHONE = {
  'viewport': {'width': 375, 'height': 812},
  'device_scale_factor': 2,
  'is_mobile': True,
  'has_touch': True,
}
DESKTOP = {'viewport': {'width': 1280, 'height': 900}}


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
        'my_fork': answer('my_fork', f'p{i}', text, i / 10, category),
      },
    )
    for i, category, text in found
  ]


def make(shown):
  return html_report.make_html(shown, plots.make_plots(shown))


@pytest.fixture(scope='module')
def page():
  return make(made_figures.full(more_samples=rows()))


@pytest.fixture(scope='module')
def crowded_page():
  """Ten models with long names, many use cases, long texts, a long commit."""
  names = test_evals_plots.LONG_NAMES
  shown = test_evals_plots.many_models()
  texts = ['word ' * 800, 'x' * 390, _HOSTILE, 'plain', '']
  return make(
    dataclasses.replace(
      shown,
      title='A run whose title is a whole sentence about what was done with it',
      commit='0123456789abcdef' * 4,
      command='python -m instruct_jax.main ' + '--config.key=/a/path' * 20,
      outcomes=made_figures.outcomes(
        shown.outcomes.rates,
        {
          name: {
            category: shown.outcomes.rates[name]
            for category in ('brainstorming', 'classification', 'y' * 60)
          }
          for name in names
        },
      ),
      rl_metrics={},
      alarms=['an alarm ' * 40],
      tables={'Words': {'z' * 90: {'one': 'word ' * 40, 'two': 'w' * 90}}},
      more_samples=[
        samples.Row(
          f'p{i}',
          texts[i % 2] + str(i),
          'chat',
          {
            name: answer(name, f'p{i}', texts[(i + j) % 5], 0.5, 'chat')
            for j, name in enumerate(names)
          },
        )
        for i in range(40)
      ],
    )
  )


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


def test_text_from_anywhere_stays_text():
  """All text of a page: heads, cells, titles, plots, models, use cases."""
  found = Elements(
    html_report.make_page(
      f'a {_HOSTILE}',
      [f'b {_HOSTILE}'],
      [
        sections.Section(
          f'c {_HOSTILE}',
          [
            f'd {_HOSTILE}',
            sections.Table(
              [f'e {_HOSTILE}', 'x'],
              [[f'f {_HOSTILE}', sections.Shown(f'g {_HOSTILE}', '\u202eh')]],
            ),
            sections.Bullets([f'i {_HOSTILE}']),
            sections.Code(f'l {_HOSTILE}\x1b[31m'),
          ],
        )
      ],
      tiles=[sections.Claim('', '1', f'm {_HOSTILE}', f'n {_HOSTILE}')],
    )
  )
  assert [tag for tag, _ in found.tags].count('script') == 1
  assert not any('onerror' in attributes for _, attributes in found.tags)
  for letter in 'abcdefgilmn':
    assert f'{letter} {_HOSTILE}' in found.text
  # Marks that reorder or control text become visible.
  assert '\u202e' not in found.text and '\x1b' not in found.text
  assert '\ufffdh' in found.text


def test_models_and_use_cases_stay_text():
  row = rows()[0]
  hostile = dataclasses.replace(
    row,
    category=f'case {_HOSTILE}',
    prompt=f'prompt {_HOSTILE}',
    answers={'sft': row.answers['sft'], _HOSTILE: row.answers['my_fork']},
  )
  shown = made_figures.minimal(
    title=f'title {_HOSTILE}',
    judge=f'judge {_HOSTILE}',
    unit=f'unit {_HOSTILE}',
    commit=f'commit {_HOSTILE}',
    alarms=[f'alarm {_HOSTILE}'],
    tables={f'table {_HOSTILE}': {f'row {_HOSTILE}': {'a': 1}}},
    more_samples=[hostile],
  )
  found = Elements(html_report.make_html(shown, {}))
  assert [tag for tag, _ in found.tags].count('script') == 1
  assert not any('onerror' in attributes for _, attributes in found.tags)
  for name in (
    'case',
    'prompt',
    'title',
    'judge',
    'unit',
    'alarm',
    'table',
    'row',
  ):
    assert f'{name} {_HOSTILE}' in found.text
  assert ('article', f'case {_HOSTILE}') in [
    (tag, attributes.get('data-category')) for tag, attributes in found.tags
  ]


def test_a_conversation_is_shown_by_turns():
  prompt = (
    f'Rule.\n\nHuman: {_HOSTILE}\n\nAssistant: C.\n\nHuman: \n\nAssistant:'
  )
  row = dataclasses.replace(rows()[0], prompt=prompt)
  page = html_report.make_html(made_figures.minimal(more_samples=[row]), {})
  assert 'Human' not in page
  found = Elements(page)
  assert [
    attributes['class'].removeprefix('turn ')
    for _, attributes in found.tags
    if attributes.get('class', '').startswith('turn ')
  ] == ['system', 'user', 'assistant', 'user']
  for text in ('Rule.', _HOSTILE, 'C.', '(empty)'):
    assert text in found.text
  # A question alone needs no speaker.
  row = dataclasses.replace(row, prompt='\n\nHuman: D?\n\nAssistant:')
  page = html_report.make_html(made_figures.minimal(more_samples=[row]), {})
  assert 'class="turn' not in page and '>D?<' in page


def test_nothing_points_outside(page):
  found = Elements(page)
  for _, attributes in found.tags:
    for name in ('src', 'href'):
      if name in attributes:
        assert attributes[name].startswith(('data:', '#'))
  assert 'http://' not in page and 'https://' not in page
  (policy,) = [
    attributes['content']
    for _, attributes in found.tags
    if attributes.get('http-equiv') == 'Content-Security-Policy'
  ]
  assert "default-src 'none'" in policy and 'unsafe-inline' not in policy
  assert '@import' not in page and 'url(' not in page


def test_links_lead_to_something(page, crowded_page):
  twice = html_report.make_page(
    'title', [], [sections.Section('Run', ['a']), sections.Section('Run', [])]
  )
  for text in (page, crowded_page, twice):
    found = Elements(text)
    ids = [
      attributes['id'] for _, attributes in found.tags if 'id' in attributes
    ]
    assert len(ids) == len(set(ids))
    links = [
      attributes['href'][1:] for tag, attributes in found.tags if tag == 'a'
    ]
    assert links and set(links) <= set(ids)


def test_figures_and_intervals_are_there(page):
  text = Elements(page).text
  shown = made_figures.full()
  for name, rate in shown.outcomes.rates.items():
    if name != 'sft':
      assert f'{100 * rate.rate:.0f}\u00a0%' in text
      assert f'to {100 * rate.high:.1f}\u00a0%' in text
  assert shown.judge in text
  assert page.count('data:image/png;base64,') == len(made_figures.PLOTS)
  # The page has what report.md has.
  assert 'Slots and BLEU' in text and 'realised' in text
  for row in shown.labels().values():
    for share in row.values():
      assert f'[{share.low:.3f}, {share.high:.3f}]' in text


def test_plots_have_their_size_so_that_nothing_jumps(page):
  for tag, attributes in Elements(page).tags:
    if tag == 'img':
      assert attributes['alt'] and int(attributes['width']) == 560
      assert int(attributes['height']) > 150


# --- In a browser -------------------------------------------------------------


@pytest.fixture(scope='module')
def browser():
  sync_api = pytest.importorskip('playwright.sync_api')
  path = shutil.which('chromium') or '/usr/bin/chromium'
  if not os.path.exists(path):
    pytest.skip('no chromium: apt install chromium')
  with sync_api.sync_playwright() as playwright:
    found = playwright.chromium.launch(
      executable_path=path, args=['--no-sandbox']
    )
    yield found
    found.close()


@pytest.fixture
def open_page(browser, tmp_path):
  """(page's text, fragment, options of the context) -> page, with `complaints`
  and `requests` as they come."""
  contexts = []

  def open_it(text, fragment='', **options):
    (tmp_path / 'report.html').write_text(text)
    contexts.append(browser.new_context(**options))
    found = contexts[-1].new_page()
    found.complaints, found.requests = [], []
    found.on('console', lambda line: found.complaints.append(line.text))
    found.on('pageerror', lambda error: found.complaints.append(str(error)))
    found.on('request', lambda request: found.requests.append(request.url))
    found.goto(f'file://{tmp_path}/report.html#{fragment}')
    return found

  yield open_it
  for context in contexts:
    context.close()


def visible(opened):
  """Numbers of the prompts that are shown, in their order."""
  return [
    int(row.get_attribute('data-number'))
    for row in opened.locator('#samples article').all()
    if row.is_visible()
  ]


def asked_outside(opened):
  return [
    url for url in opened.requests if not url.startswith(('file:', 'data:'))
  ]


def test_a_browser_shows_it_without_errors_or_requests(page, open_page):
  opened = open_page(page)
  assert visible(opened) == [0, 1, 2, 3, 4, 5, 6]
  assert '7 of 7 prompts' in opened.locator('#shown').inner_text()
  assert opened.complaints == []
  assert opened.title() == 'A run'
  assert not asked_outside(opened)


def test_requests_and_complaints_of_a_page_are_seen(open_page):
  """The check above must be able to fail."""
  opened = open_page(
    '<img src="http://example.invalid/a.png"><script>throw 1</script>'
  )
  assert asked_outside(opened) == ['http://example.invalid/a.png']
  assert opened.complaints


def test_filters_and_order_come_from_the_address(page, open_page):
  # By falling gain of the last model over the baseline: scores are i / 10.
  opened = open_page(page, 'category=chat&order=gain')
  assert visible(opened) == [6, 5, 3, 1]
  assert '4 of 7 prompts' in opened.locator('#shown').inner_text()
  assert visible(open_page(page, 'search=ANSWER%204')) == [4]


def test_models_can_be_hidden_and_more_prompts_shown(crowded_page, open_page):
  opened = open_page(crowded_page)
  assert len(visible(opened)) == 30
  opened.get_by_role('button', name='Show more').click()
  assert len(visible(opened)) == 40
  opened.get_by_text('models', exact=True).click()
  # A name may have quotes and marks.
  name = '"quoted" <b>name</b>'
  shown = opened.locator('#samples article').first.locator('.answer:visible')
  assert shown.count() == 10
  opened.get_by_label(name).uncheck()
  assert shown.count() == 9
  assert name not in opened.locator('#samples').inner_text()


@pytest.mark.parametrize('options', [PHONE, DESKTOP], ids=['phone', 'desktop'])
@pytest.mark.parametrize('which', ['page', 'crowded_page'])
def test_nothing_is_wider_than_the_screen(which, options, request, open_page):
  opened = open_page(request.getfixturevalue(which), **options)
  assert opened.evaluate(
    'document.documentElement.scrollWidth <='
    ' document.documentElement.clientWidth'
  )
  # And nothing is cut except tables, which scroll in their own box.
  beyond = opened.evaluate(
    """() => Array.from(document.querySelectorAll(
      'h1, h2, h3, p, li, img, figure, figcaption, pre, select, .tile, .scroll,'
      + ' .answer, .text'))
      .filter(e => e.getBoundingClientRect().right
        > document.documentElement.clientWidth + 0.5)
      .map(e => e.outerHTML.slice(0, 100))"""
  )
  assert beyond == []


def test_words_in_tables_are_not_broken(page, crowded_page, open_page):
  """No head of a row or column breaks within a word that would fit."""
  for text in (page, crowded_page):
    opened = open_page(text, **PHONE)
    broken = opened.evaluate(
      """() => {
        const found = [];
        document.querySelectorAll('th').forEach(cell => {
          const text = cell.firstChild;
          if (!text || text.nodeType !== 3) { return; }
          for (const match of text.data.matchAll(/[^\\s\\/-]+/g)) {
            if (match[0].length > 15) { continue; }
            const range = document.createRange();
            range.setStart(text, match.index);
            range.setEnd(text, match.index + match[0].length);
            const tops = new Set(Array.from(range.getClientRects(),
              box => Math.round(box.top)));
            if (tops.size > 1) { found.push(match[0]); }
          }
        });
        return found;
      }"""
    )
    assert broken == []


def test_a_wide_table_scrolls_in_its_box_and_says_so(crowded_page, open_page):
  opened = open_page(crowded_page, **PHONE)
  box = opened.get_by_role('region', name='By use case, table')
  assert box.evaluate('e => e.scrollWidth > e.clientWidth')
  hint = box.locator('xpath=preceding-sibling::p')
  assert hint.is_visible() and 'scrolls sideways' in hint.inner_text()
  # It also scrolls with the keys; the use cases stay in place.
  head = box.get_by_role('rowheader', name='brainstorming')
  before = head.bounding_box()['x']
  box.focus()
  opened.keyboard.press('ArrowRight')
  opened.wait_for_function('e => e.scrollLeft > 0', arg=box.element_handle())
  assert head.bounding_box()['x'] == before
  # What fits gives no hint.
  for narrow in opened.locator('.hint').all():
    fits = narrow.locator('xpath=following-sibling::div').evaluate(
      'e => e.scrollWidth <= e.clientWidth'
    )
    assert narrow.is_visible() != fits


@pytest.mark.parametrize('options', [PHONE, DESKTOP], ids=['phone', 'desktop'])
@pytest.mark.parametrize('script', [True, False], ids=['script', 'no script'])
def test_a_plot_can_be_enlarged(page, options, script, open_page):
  opened = open_page(page, java_script_enabled=script, **options)
  figure = opened.locator('#plot-metadata')
  picture = figure.get_by_role('img')
  small = picture.bounding_box()
  assert small['x'] >= 0
  assert small['x'] + small['width'] <= options['viewport']['width']
  figure.get_by_role('link', name='Enlarge: ').click()
  large = picture.bounding_box()
  assert large['width'] >= 1.5 * small['width']
  close = figure.get_by_role('link', name='Close')
  assert close.is_visible()
  if script:
    opened.keyboard.press('Escape')
  else:
    close.click()
  assert picture.bounding_box()['width'] == small['width']
  assert not close.is_visible()


def test_a_plot_can_be_enlarged_with_the_keys(page, open_page):
  opened = open_page(page)
  opened.locator('#plot-rl .open').focus()
  opened.keyboard.press('Enter')
  assert opened.locator('#plot-rl .close').is_visible()
  opened.keyboard.press('Tab')
  opened.keyboard.press('Enter')
  assert not opened.locator('#plot-rl .close').is_visible()


def test_without_the_script_all_prompts_are_there(page, open_page):
  opened = open_page(page, java_script_enabled=False)
  assert len(visible(opened)) == 7
  assert not opened.locator('.filters').is_visible()


def test_long_texts_begin_folded_and_can_be_read(crowded_page, open_page):
  opened = open_page(crowded_page, **PHONE)
  long = opened.locator('.answer details.long').first
  folded = long.bounding_box()['height']
  long.locator('summary').click()
  assert long.bounding_box()['height'] > 2 * folded
  assert long.locator('div.text').inner_text().count('word') == 800


def contrast(colours):
  """Ratio of two '(r, g, b)' by WCAG 2."""

  def luminance(colour):
    parts = [int(x) / 255 for x in re.findall(r'\d+', colour)[:3]]
    parts = [
      x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts
    ]
    return sum(
      a * b for a, b in zip((0.2126, 0.7152, 0.0722), parts, strict=True)
    )

  a, b = sorted(map(luminance, colours), reverse=True)
  return (a + 0.05) / (b + 0.05)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_has_contrast(scheme, page, open_page):
  opened = open_page(page, color_scheme=scheme)
  for selector, paper in (
    ('h1', 'body'),
    ('p.small', 'body'),
    ('.good b', '.tile'),
    ('.bad b', '.tile'),
    ('.tile .small', '.tile'),
    ('.contents a', 'body'),
    ('td .small', 'body'),
    ('.answer h3 span', '.answer'),
  ):
    ink = opened.locator(selector).first.evaluate(
      'e => getComputedStyle(e).color'
    )
    ground = opened.locator(paper).first.evaluate(
      'e => getComputedStyle(e).backgroundColor'
    )
    assert contrast((ink, ground)) >= 4.5, (selector, ink, ground)


def test_paper_has_no_controls_and_all_texts(crowded_page, open_page):
  opened = open_page(crowded_page, color_scheme='dark')
  opened.emulate_media(media='print', color_scheme='dark')
  opened.evaluate("window.dispatchEvent(new Event('beforeprint'))")
  for selector in ('.contents', '#search', '.hint', 'figcaption a', '#more'):
    assert not opened.locator(selector).first.is_visible()
  assert opened.locator('details.long div.text').first.is_visible()
  ground = opened.evaluate('getComputedStyle(document.body).backgroundColor')
  assert ground == 'rgb(255, 255, 255)'
  # The printed page states which prompts it has.
  assert 'the first 30 shown' in opened.locator('#shown').inner_text()
