"""The labeling site's command line, in separate processes."""

import gzip
import json
import pathlib
import re
import subprocess
import sys
import threading

import pytest

pytest.importorskip('starlette', reason='pip install -r requirements-labeling')
pytest.importorskip('sqlalchemy')

import httpx2

from instruct_jax.data import records
from instruct_jax.labeling import store
from tests import labeling_people as people

ROOT = pathlib.Path(__file__).parents[1]


def command(workdir, *arguments):
  return [
    'instruct_jax.labeling',
    f'--config={ROOT}/configs/labeling.py',
    f'--workdir={workdir}',
    '--config.port=0',
    '--config.demo_tasks=2',
    *arguments,
  ]


@pytest.fixture
def once(start):
  """Runs the program to its end."""
  return lambda *arguments: start(*command(*arguments))


def started(workdir, *arguments):
  """The process of a site, and its output until it was ready."""
  process = subprocess.Popen(
    [sys.executable, '-m', *command(workdir, *arguments)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  timer = threading.Timer(300, process.kill)
  timer.start()
  lines = []
  for line in process.stdout:
    lines.append(line)
    if line.startswith('labeling site on'):
      break
  timer.cancel()
  return process, ''.join(lines)


def test_a_newcomer_ranks_within_a_few_clicks(once, tmp_path):
  workdir = tmp_path / 'site'
  process, printed = started(workdir, '--demo')
  try:
    admin, labeler = re.findall(r'http://\S+/join/\S+', printed)
    with httpx2.Client(follow_redirects=True) as browser:
      page = browser.get(labeler).text
      assert 'Sign in' in page
      page = browser.post(labeler, data=people.joining_fields(page)).text
      csrf = re.search(r'name="csrf" value="([^"]+)"', page).group(1)
      page = browser.post(
        admin.split('/join')[0] + '/next', data={'csrf': csrf}
      ).text
      assert 'Rank outputs' in page
    with httpx2.Client(follow_redirects=True) as browser:
      fields = people.joining_fields(browser.get(admin).text)
      assert 'Progress' in browser.post(admin, data=fields).text
    # The database does not hold the tokens that were printed.
    assert once(workdir, f'--backup={tmp_path}/b.gz').returncode == 0
  finally:
    process.terminate()
    process.wait()
  content = records.read_bytes(tmp_path / 'b.gz').decode()
  assert admin.rsplit('/', 1)[1] not in content

  process, printed = started(workdir)
  process.terminate()
  process.wait()
  assert '/join/' not in printed  # Only the first start prints a link.
  assert '/join/' in once(workdir, '--admin_link').stdout

  again = once(workdir, f'--backup={tmp_path}/b')
  assert again.returncode == 1 and 'b.gz exists' in again.stderr
  assert (
    f'written to {tmp_path}/c.gz'
    in once(workdir, f'--backup={tmp_path}/c').stdout
  )
  assert (tmp_path / 'c.gz').exists() and not (tmp_path / 'c').exists()

  other = tmp_path / 'other'
  # A damaged or newer back-up gives one line and changes nothing.
  header, body = gzip.decompress((tmp_path / 'b.gz').read_bytes()).split(
    b'\n', 1
  )
  newer = header.replace(b'"0002"', b'"0099"')
  (tmp_path / 'newer.gz').write_bytes(gzip.compress(newer + b'\n' + body))
  (tmp_path / 'cut.gz').write_bytes((tmp_path / 'b.gz').read_bytes()[:-50])
  for name, words in (('cut', 'damaged'), ('newer', 'up to 0002')):
    bad = once(other, f'--restore={tmp_path}/{name}.gz')
    assert bad.returncode == 1 and words in bad.stderr
    assert bad.stderr.startswith('error: ') and bad.stderr.count('\n') == 1
  assert 'rows restored' in once(other, f'--restore={tmp_path}/b.gz').stdout
  again = once(other, f'--restore={tmp_path}/b.gz')
  assert again.returncode == 1 and 'not empty' in again.stderr
  lines = tmp_path / 'more.jsonl'
  lines.write_text('{"prompt": "a", "completions": ["b", "c"]}\n{"prompt": 3}')
  bad = once(other, f'--import_file={lines}')
  assert bad.returncode == 1 and 'more.jsonl:2:' in bad.stderr
  assert 'Traceback' not in bad.stderr
  lines.write_text('{"prompt": "a", "completions": ["b", "c"]}')
  assert '1 tasks imported' in once(other, f'--import_file={lines}').stdout
  theirs = tmp_path / 'theirs.json'
  items = [{'id': i, 'body': text} for i, text in enumerate('bc')]
  task = {'data': {'prompt': 'a', 'items': items}}
  task['annotations'] = [
    {'completed_by': 7, 'result': [
      {'type': 'ranker', 'value': {'ranker': {'rank': [1, 0]}}},
    ]},
  ]  # fmt: skip
  theirs.write_text(json.dumps([task]))
  flags = (f'--import_file={theirs}', '--format=label_studio')
  told = once(other, *flags, '--batch=theirs').stdout
  assert told == '1 tasks imported\nsubmitted: 1\n'
  theirs.write_text('[{"data": {}}]')
  bad = once(other, *flags, '--batch=bad')
  assert bad.returncode == 1 and 'theirs.json: record 1: ' in bad.stderr
  assert bad.stderr.count('\n') == 1
  told = once(other, f'--export={tmp_path}/ls', '--format=label_studio').stdout
  assert re.fullmatch(r'.*/ls/label_studio.json: \d+ tasks\n', told)
  assert once(other, f'--export={tmp_path}/out').returncode == 0
  assert (tmp_path / 'out/statistics.json').exists()


def test_impossible_requests_create_nothing(once, tmp_path):
  missing = tmp_path / 'typo'
  for flags, words in (
    ([f'--backup={tmp_path}/b.gz'], 'no such file; give the --workdir'),
    ([f'--export={tmp_path}/out'], 'no such file; give the --workdir'),
    (
      ['--demo', f'--backup={tmp_path}/b.gz'],
      'give only one of them at a time',
    ),
    (['--config.database=odd://x'], 'error: the database'),
    (['--suggestions'], '--suggestions goes with --import_file'),
    (['--format=argilla'], '--format goes with --import_file or --export'),
  ):
    found = once(missing, *flags)
    assert found.returncode == 1 and words in found.stderr, found.stderr
    assert found.stderr.count('\n') == 1
  assert not (tmp_path / 'b.gz').exists() and not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  ('key', 'value', 'words'),
  [
    ('overlap', 0, 'overlap must be positive: 0'),
    ('cut_flags', 75.0, 'cut_flags must be from 0 to 1: 75.0'),
    ('host', '0.0.0.0', 'set public_url'),
    ('public_url', 'labels.example.org', 'must begin with https://'),
  ],
)
def test_bad_settings_are_named(key, value, words):
  with pytest.raises(store.StoreError, match=re.escape(words)):
    store.validate(people.make_config(**{key: value}))


def test_the_default_config_is_valid():
  store.validate(people.make_config())
