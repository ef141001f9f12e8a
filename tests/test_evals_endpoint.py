"""Requests over HTTP to a faulty local server."""

import pytest

from instruct_jax.evals import endpoint
from tests.fake_server import Fault, serve


def make(url, tmp_path, sleeps=None, **changes):
  settings = endpoint.Settings(
    url=url, **{'timeout': 2.0, 'num_workers': 1, **changes}
  )
  sleeps = [] if sleeps is None else sleeps
  return endpoint.Endpoint(
    settings, tmp_path / 'cache' / 'journal.jsonl', sleep=sleeps.append
  )


def echo(body, number):
  return {'said': body['say']}


def said(reply):
  return reply['said']


def test_answers_are_in_order_and_equal_requests_are_sent_once(tmp_path):
  with serve(echo) as (url, requests):
    asking = make(url, tmp_path, num_workers=3)
    bodies = [{'say': i % 4} for i in range(12)]
    assert asking.ask(bodies, said) == [i % 4 for i in range(12)]
  assert len(requests) == 4
  assert asking.counts == endpoint.Counts(asked=4, requests=4)


def test_the_key_is_sent_and_never_written(tmp_path, monkeypatch):
  monkeypatch.setenv('JUDGE_KEY', 'secret-7')
  with serve(echo) as (url, requests):
    make(url, tmp_path, key_variable='JUDGE_KEY').ask([{'say': 1}], said)
    make(
      url,
      tmp_path / 'b',
      key_variable='JUDGE_KEY',
      key_header='X-Goog-Api-Key',
      key_prefix='',
    ).ask([{'say': 1}], said)
  assert requests[0][0]['Authorization'] == 'Bearer secret-7'
  assert requests[1][0]['X-Goog-Api-Key'] == 'secret-7'
  journal = (tmp_path / 'cache' / 'journal.jsonl').read_text()
  assert 'secret' not in journal


def test_a_missing_key_is_named(tmp_path, monkeypatch):
  monkeypatch.delenv('JUDGE_KEY', raising=False)
  with pytest.raises(endpoint.EndpointError, match='JUDGE_KEY is not set'):
    make('http://127.0.0.1:9', tmp_path, key_variable='JUDGE_KEY')


@pytest.mark.parametrize(
  'fault',
  [
    Fault(503, 'busy'),
    Fault(429, 'slow down'),
    Fault(200, 'not json {'),
    Fault(drop=True),
    Fault(delay=1.0, text='{}'),
  ],
  ids=['503', '429', 'not json', 'dropped', 'timeout'],
)
def test_faults_are_retried_with_back_off(tmp_path, fault):
  sleeps = []
  with serve(lambda b, n: fault if n < 3 else echo(b, n)) as (url, requests):
    asking = make(url, tmp_path, sleeps, timeout=0.3)
    assert asking.ask([{'say': 'x'}], said) == ['x']
  assert len(requests) == 3
  assert sleeps == [1.0, 2.0]
  assert asking.counts.retried == 2


def test_retry_after_overrides_the_back_off(tmp_path):
  fault = Fault(429, '', [('Retry-After', '7')])
  sleeps = []
  with serve(lambda b, n: fault if n < 2 else echo(b, n)) as (url, _):
    make(url, tmp_path, sleeps).ask([{'say': 'x'}], said)
  assert sleeps == [7.0]


def test_waits_are_bounded_and_the_last_error_is_reported(tmp_path):
  sleeps = []
  with serve(lambda b, n: Fault(500, 'broken')) as (url, requests):
    asking = make(url, tmp_path, sleeps, max_retries=8)
    with pytest.raises(endpoint.EndpointError, match='9 tries.*500: broken'):
      asking.ask([{'say': 'x'}], said)
  assert sleeps == [1, 2, 4, 8, 16, 32, 60, 60]
  assert len(requests) == 9


def test_a_refusal_is_not_retried(tmp_path):
  with (
    serve(lambda b, n: Fault(401, 'bad key')) as (url, requests),
    pytest.raises(endpoint.EndpointError, match='status 401: bad key'),
  ):
    make(url, tmp_path).ask([{'say': 'x'}], said)
  assert len(requests) == 1


def test_malformed_answers_are_asked_again_then_counted(tmp_path):
  def answer(body, number):
    if body['say'] == 'never':
      return {'shrug': True}
    return {'shrug': True} if number == 1 else echo(body, number)

  with serve(answer) as (url, requests):
    asking = make(url, tmp_path)
    assert asking.ask([{'say': 'late'}, {'say': 'never'}], said) == [
      'late',
      None,
    ]
    assert asking.counts.malformed == 3
    assert asking.counts.unanswered == 1
    # The journal holds them, so a second run sends nothing.
    again = make(url, tmp_path)
    assert again.ask([{'say': 'late'}, {'say': 'never'}], said) == [
      'late',
      None,
    ]
  assert len(requests) == 4
  assert again.counts.requests == 0
  assert again.counts.remembered == 2


def test_an_interrupted_run_resumes(tmp_path):
  def fails_at_five(body, number):
    return Fault(401, 'out of credit') if number == 5 else echo(body, number)

  bodies = [{'say': i} for i in range(8)]
  with serve(fails_at_five) as (url, requests):
    with pytest.raises(endpoint.EndpointError):
      make(url, tmp_path).ask(bodies, said)
    before = len(requests)
    journal = tmp_path / 'cache' / 'journal.jsonl'
    kept = len(journal.read_text().splitlines())
    # The process died while it wrote.
    with journal.open('a') as file:
      file.write('{"key": "0')
    again = make(url, tmp_path)
    assert again.ask(bodies, said) == list(range(8))
    assert len(requests) - before == 8 - kept
    assert make(url, tmp_path).ask(bodies, said) == list(range(8))
  assert kept >= 4


def test_odd_replies_are_kept_and_a_partial_character_is_skipped(tmp_path):
  """Half a surrogate pair is JSON; unbounded nesting is no reply."""

  def answer(body, number):
    if number == 1:
      return Fault(200, '[' * 100_000)
    return Fault(200, '{"said": "\\ud800"}')

  with serve(answer) as (url, requests):
    asking = make(url, tmp_path)
    assert asking.ask([{'say': 1}], said) == ['\ud800']
    journal = tmp_path / 'cache' / 'journal.jsonl'
    with journal.open('ab') as file:
      file.write('{"key": "0", "reply": "ä'.encode()[:-1])
    assert make(url, tmp_path).ask([{'say': 1}], said) == ['\ud800']
  assert len(requests) == 2


def test_requests_are_paced(tmp_path):
  now, sleeps = [100.0], []

  def sleep(seconds):
    sleeps.append(seconds)
    now[0] += seconds

  with serve(echo) as (url, _):
    settings = endpoint.Settings(
      url=url, requests_per_minute=30.0, num_workers=1
    )
    endpoint.Endpoint(
      settings, tmp_path / 'j.jsonl', sleep=sleep, clock=lambda: now[0]
    ).ask([{'say': i} for i in range(4)], said)
  assert sleeps == [2.0, 2.0, 2.0]
