"""JSON over HTTP for judges and scorers: retried, paced, journaled, counted.

Every reply is appended to a journal under a hash of the request, so no request
is paid for twice and an interrupted run can resume. The hash and the journal
never hold the key, which comes from the environment.
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
# Reply -> value; raises one of `MALFORMED` if the reply holds none.
Parse = Callable[[Any], Value]

MALFORMED = (ValueError, KeyError, IndexError, TypeError, AttributeError)
_RETRIED_STATUS = frozenset((408, 409, 425, 429))
_LONGEST_WAIT = 60.0  # Seconds between two tries.


class EndpointError(RuntimeError):
  """The endpoint refuses the request, or all retries failed."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to send requests: POST with a JSON body.

  Retries follow a timeout, a lost connection, status 408, 409, 425, 429 or 5xx,
  or a reply that is not JSON. The wait doubles with each try, unless the
  server's Retry-After header sets it; either way it is at most 60 seconds.
  """

  url: str
  key_variable: str = ''  # Of the environment; '' sends no key.
  key_header: str = 'Authorization'
  key_prefix: str = 'Bearer '
  timeout: float = 60.0  # Seconds to wait for a reply.
  max_retries: int = 6
  first_wait: float = 1.0  # Seconds before the first retry.
  max_malformed: int = 1  # Further tries if a JSON reply cannot be parsed.
  requests_per_minute: float = 0.0  # At most; 0 for no limit.
  num_workers: int = 4  # Requests in flight at the same time.

  @classmethod
  def of(cls, config: Any, **others: Any) -> 'Settings':
    """Settings from the keys of a config; `others` sets further fields."""
    keys = ('url', 'key_variable', 'timeout', 'max_retries')
    keys += ('requests_per_minute', 'num_workers')
    return cls(**{key: config[key] for key in keys}, **others)


def check(config: Any, key: str) -> None:
  """Raises ValueError if the URL is not HTTP or the environment lacks the key.

  `config` has `url` and `key_variable`; `key` is its name in the error.
  """
  if not config.url.startswith(('http://', 'https://')):
    raise ValueError(
      f'{key}.url must begin with http:// or https://: {config.url!r}'
    )
  variable = config.key_variable
  if variable and not os.environ.get(variable):
    raise ValueError(
      f'the environment variable {variable} is not set; put the key for '
      f'{config.url} there, or set --config.{key}.key_variable= to send none'
    )


@dataclasses.dataclass
class Counts:
  """Numbers of requests and replies."""

  asked: int = 0  # Distinct requests, including those in the journal.
  remembered: int = 0  # Had a reply in the journal.
  requests: int = 0  # Sent.
  retried: int = 0  # Sent again after a failure.
  malformed: int = 0  # Replies that could not be parsed.
  unanswered: int = 0  # Requests without a reply that could be parsed.


class Endpoint:
  """Sends requests to one URL; see the module docstring.

  Args:
    settings: how to send.
    journal: JSONL file of all replies, created as needed. Incomplete lines,
      such as a killed run leaves, are skipped.
    sleep, clock: replaced in tests.

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
      key = os.environ.get(settings.key_variable)
      if not key:
        raise EndpointError(
          f'the environment variable {settings.key_variable} is not set; put '
          f'the key for {settings.url} there'
        )
      self._headers[settings.key_header] = settings.key_prefix + key
    self._lock = threading.Lock()
    self._next_time = 0.0
    self._journal, self._file = epath.Path(journal), None
    self._replies = _read_journal(self._journal)

  def ask(
    self,
    bodies: Sequence[Any],
    parse: Parse[Value],
    progress: Callable[[int], None] | None = None,
  ) -> list[Value | None]:
    """Sends each distinct body and parses its reply; None if malformed.

    `progress` is called with 1 for each distinct body.

    Raises:
      EndpointError: the endpoint refused, or retries ran out. Replies so far
        are in the journal; the same call resumes.
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
    """All journaled replies to each of these bodies, malformed ones too."""
    return [list(self._replies.get(self._key(body), ())) for body in bodies]

  def _key(self, body: Any) -> str:
    content = json.dumps([self._settings.url, body], sort_keys=True)
    return hashlib.sha256(content.encode('utf-8')).hexdigest()[:32]

  def _count(self, **counts: int) -> None:
    with self._lock:
      for name, number in counts.items():
        setattr(self.counts, name, getattr(self.counts, name) + number)

  def _ask(self, key: str, body: Any, parse: Parse[Value]) -> Value | None:
    known = list(self._replies.get(key, ()))
    self._count(asked=1, remembered=bool(known))
    for number in range(self._settings.max_malformed + 1):
      if number < len(known):
        reply = known[number]
      else:
        reply = self._send(body)
        self._record(key, reply)
      try:
        return parse(reply)
      except MALFORMED:
        self._count(malformed=1)
    self._count(unanswered=1)
    return None

  def _record(self, key: str, reply: Any) -> None:
    # ASCII, because a reply may hold half a surrogate pair.
    line = json.dumps({'key': key, 'reply': reply})
    with self._lock:
      self._replies.setdefault(key, []).append(reply)
      self._file.write(line + '\n')

  def _send(self, body: Any) -> Any:
    settings, wait, problem = self._settings, self._settings.first_wait, ''
    for number in range(settings.max_retries + 1):
      self._pace()
      self._count(requests=1, retried=number > 0)
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
        if error.code not in _RETRIED_STATUS and error.code < 500:
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
      f'last error was {problem}. Replies so far are in {self._journal}: the '
      'same command resumes'
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
  # The header may also hold a date; then the back-off decides.
  return float(text) if text and text.strip().isdigit() else None


def _read_journal(path: epath.Path) -> dict[str, list[Any]]:
  replies: dict[str, list[Any]] = {}
  if not path.exists():
    return replies
  # A line may be cut off within a character.
  text = path.read_bytes().decode('utf-8', 'replace')
  for line in text.split('\n'):
    try:
      values = json.loads(line)
      replies.setdefault(values['key'], []).append(values['reply'])
    except (ValueError, KeyError, TypeError, RecursionError):
      continue
  if text and not text.endswith('\n'):
    # The next line must not continue an incomplete one.
    with files.Appended(path) as file:
      file.write('\n')
  return replies
