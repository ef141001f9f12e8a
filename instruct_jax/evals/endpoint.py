"""JSON over HTTP for judges and scorers: retried, paced, remembered, counted.

Every answer is appended to a journal under a hash of what was asked, so the
same question is never paid for twice and a run that was cut goes on. Only the
question enters the hash and the journal; the key comes from the environment
and is written nowhere.
"""

import concurrent.futures
import dataclasses
import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from etils import epath

from instruct_jax import files

Value = TypeVar('Value')
# Reply -> value; ValueError, KeyError, ... where it does not say one.
Parse = Callable[[Any], Value]

_TRY_AGAIN = frozenset((408, 409, 425, 429))
_LONGEST_WAIT = 60.0  # Seconds between two tries.
_NOT_AN_ANSWER = (ValueError, KeyError, IndexError, TypeError)


class EndpointError(RuntimeError):
  """The endpoint refuses, or does not answer however often it is asked."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """Where and how to ask.

  Attributes:
    url: of POST requests with a JSON body.
    key_variable: environment variable that holds the key; '' sends none.
    key_header: 'Authorization' or what the service wants.
    key_prefix: before the key, say 'Bearer '.
    timeout: seconds to wait for an answer.
    max_retries: further tries after a timeout, a lost connection, status 408,
      409, 425, 429 or 5xx, or an answer that is not JSON.
    first_wait: seconds before the first retry; doubled each time, at most 60.
      A Retry-After header of the server goes before it.
    max_malformed: further tries where the answer is JSON but cannot be read.
    requests_per_minute: at most; 0 for no limit.
    num_workers: questions asked at the same time.
  """

  url: str
  key_variable: str = ''
  key_header: str = 'Authorization'
  key_prefix: str = 'Bearer '
  timeout: float = 60.0
  max_retries: int = 6
  first_wait: float = 1.0
  max_malformed: int = 1
  requests_per_minute: float = 0.0
  num_workers: int = 4

  @classmethod
  def of(cls, described: Any, **others: Any) -> 'Settings':
    """The settings that a config has keys of, and others."""
    keys = ('url', 'key_variable', 'timeout', 'max_retries')
    keys += ('requests_per_minute', 'num_workers')
    return cls(**{key: described[key] for key in keys}, **others)


def check(described: Any, key: str) -> None:
  """Refuses a service that cannot be asked, before anything is computed.

  Args:
    described: config with `url` and `key_variable`.
    key: of that config, for the error.

  Raises:
    ValueError: the URL is none, or the environment lacks the key.
  """
  if not described.url.startswith(('http://', 'https://')):
    raise ValueError(
      f'{key}.url must begin with http:// or https://: {described.url!r}'
    )
  variable = described.key_variable
  if variable and not os.environ.get(variable):
    raise ValueError(
      f'the environment variable {variable} is not set; put the key for '
      f'{described.url} there, or set --config.{key}.key_variable= to send none'
    )


@dataclasses.dataclass
class Counts:
  """What asking took.

  Attributes:
    asked: questions, those of the journal included.
    remembered: answered by the journal.
    requests: sent.
    retried: sent again after a failure.
    malformed: answers that could not be read.
    unanswered: questions without a readable answer in the end.
  """

  asked: int = 0
  remembered: int = 0
  requests: int = 0
  retried: int = 0
  malformed: int = 0
  unanswered: int = 0


class Endpoint:
  """Asks one URL; see the module docstring.

  Args:
    settings: where and how.
    journal: JSONL file of all answers, created as needed. Lines that are cut
      short, as by a killed run, are skipped.
    sleep, clock: of the machine; tests bring their own.

  Raises:
    EndpointError: the environment lacks the key.
  """

  def __init__(
    self,
    settings: Settings,
    journal: epath.PathLike,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
  ):
    self.counts = Counts()
    self._settings, self._sleep, self._clock = settings, sleep, clock
    self._headers = {'Content-Type': 'application/json'}
    if settings.key_variable:
      if not os.environ.get(settings.key_variable):
        raise EndpointError(
          f'the environment variable {settings.key_variable} is not set; put '
          f'the key for {settings.url} there'
        )
      key = settings.key_prefix + os.environ[settings.key_variable]
      self._headers[settings.key_header] = key
    self._lock = threading.Lock()
    self._next_time = 0.0
    self._journal, self._file = epath.Path(journal), None
    self._answers = _read_journal(self._journal)

  def ask(
    self,
    bodies: Sequence[Any],
    parse: Parse[Value],
    progress: Callable[[int], None] | None = None,
  ) -> list[Value | None]:
    """Sends each body and reads its answer.

    Args:
      bodies: JSON values; equal ones are asked once.
      parse: reads the reply; what raises ValueError, KeyError, IndexError or
        TypeError is malformed.
      progress: called with 1 for each answer.

    Returns:
      What `parse` returned, or None where the answer stayed malformed.

    Raises:
      EndpointError: the endpoint refused, or retries ran out. Answers so far
        are in the journal: the same call goes on.
    """
    distinct = {self._key(body): body for body in bodies}
    values = {}
    with (
      files.Appended(self._journal) as self._file,
      concurrent.futures.ThreadPoolExecutor(self._settings.num_workers) as pool,
    ):
      futures = {
        pool.submit(self._ask, key, body, parse): key
        for key, body in distinct.items()
      }
      try:
        for future in concurrent.futures.as_completed(futures):
          values[futures[future]] = future.result()
          if progress is not None:
            progress(1)
      except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    return [values[self._key(body)] for body in bodies]

  def replies(self, bodies: Sequence[Any]) -> list[list[Any]]:
    """All replies on record to each of these bodies, malformed ones too."""
    return [
      list(self._answers[key]) if key in self._answers else []
      for key in map(self._key, bodies)
    ]

  def _key(self, body: Any) -> str:
    content = json.dumps([self._settings.url, body], sort_keys=True)
    return hashlib.sha256(content.encode('utf-8')).hexdigest()[:32]

  def _ask(self, key: str, body: Any, parse: Parse[Value]) -> Value | None:
    with self._lock:
      self.counts.asked += 1
      known = list(self._answers[key]) if key in self._answers else []
      self.counts.remembered += bool(known)
    for number in range(self._settings.max_malformed + 1):
      if number < len(known):
        reply = known[number]
      else:
        reply = self._send(body)
        self._record(key, reply)
      try:
        return parse(reply)
      except _NOT_AN_ANSWER:
        with self._lock:
          self.counts.malformed += 1
    with self._lock:
      self.counts.unanswered += 1
    return None

  def _record(self, key: str, reply: Any) -> None:
    # ASCII: a reply may hold half of a surrogate pair, which no file takes.
    line = json.dumps({'key': key, 'reply': reply})
    with self._lock:
      self._answers.setdefault(key, []).append(reply)
      self._file.write(line + '\n')

  def _send(self, body: Any) -> Any:
    settings, wait, problem = self._settings, self._settings.first_wait, ''
    for number in range(settings.max_retries + 1):
      self._pace()
      with self._lock:
        self.counts.requests += 1
        self.counts.retried += number > 0
      pause = None
      request = urllib.request.Request(
        settings.url, json.dumps(body).encode('utf-8'), self._headers
      )
      try:
        with urllib.request.urlopen(request, timeout=settings.timeout) as file:
          return json.loads(file.read().decode('utf-8'))
      except urllib.error.HTTPError as error:
        text = error.read()[:200].decode('utf-8', 'replace')
        problem = f'status {error.code}: {text}'
        if error.code not in _TRY_AGAIN and error.code < 500:
          raise EndpointError(
            f'{settings.url} refuses the request, {problem}'
          ) from error
        pause = _seconds(error.headers.get('Retry-After'))
      except (
        OSError, http.client.HTTPException, ValueError, RecursionError
      ) as error:  # fmt: skip
        # Timeouts and lost connections are OSErrors.
        problem = f'{type(error).__name__}: {error}'
      if number < settings.max_retries:
        self._sleep(min(_LONGEST_WAIT, wait if pause is None else pause))
        wait *= 2
    raise EndpointError(
      f'{settings.url} did not answer in {settings.max_retries + 1} tries; the '
      f'last said {problem}. Answers so far are in {self._journal}: the same '
      'command goes on'
    )

  def _pace(self) -> None:
    """Waits until the next request may start."""
    if not self._settings.requests_per_minute:
      return
    with self._lock:
      now = self._clock()
      start = max(now, self._next_time)
      self._next_time = start + 60 / self._settings.requests_per_minute
    if start > now:
      self._sleep(start - now)


def _seconds(text: str | None) -> float | None:
  # The header may hold a date as well; then the own back-off serves.
  return float(text) if text and text.strip().isdigit() else None


def _read_journal(path: epath.Path) -> dict[str, list[Any]]:
  answers: dict[str, list[Any]] = {}
  if not path.exists():
    return answers
  # A line may have been cut within a character.
  text = path.read_bytes().decode('utf-8', 'replace')
  for line in text.split('\n'):
    try:
      values = json.loads(line)
      answers.setdefault(values['key'], []).append(values['reply'])
    except (ValueError, KeyError, TypeError, RecursionError):
      continue
  if text and not text.endswith('\n'):
    # A line was cut; what comes next must not be glued to it.
    with files.Appended(path) as file:
      file.write('\n')
  return answers
