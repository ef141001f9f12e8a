"""Reports programs that hang or make a step slow.

Programs return before their results are computed. A thread checks the oldest
output that is not ready, so that a message is printed even while the main
thread waits, for example in a collective that has lost its peer.
"""

import collections
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


class Watch:
  """Context manager that watches the programs of one loop.

  Args:
    name: the stage's name, for the messages.
  """

  _TICK = 0.5  # Seconds between checks.
  _NUM_USUAL = 50  # Latest durations, whose median is the usual one.
  # Limit until there are steps to compare with; compilation counts too.
  _FIRST_SECONDS = 900.0
  # A step is slow at this multiple of the usual duration, and not before this
  # many seconds.
  _FACTOR = 10.0
  _MIN_SECONDS = 60.0

  def __init__(self, name: str):
    self._name = name
    self._durations = collections.deque(maxlen=self._NUM_USUAL)  # Per step.
    # [program, one of its outputs], oldest first; the output is None until the
    # call returns.
    self._running = collections.deque()
    self._waited = collections.Counter()  # Seconds by program since `lap`.
    self._lock = threading.Lock()
    self._ended = threading.Event()
    self._has_compiled = False  # The first lap is not a usual duration.
    self._begin = time.monotonic()
    self._reported_at = 0.0
    self._step = 0
    self._thread = threading.Thread(target=self._look_on, daemon=True)

  def programs(self, programs: Mapping[str, Any]) -> dict[str, Any]:
    """Wraps the callables among the values."""
    return {
      name: self._watched(name, program) if callable(program) else program
      for name, program in programs.items()
    }

  def _watched(self, name: str, program: Callable) -> Callable:
    def call(*args):
      if self._ended.is_set():
        return program(*args)
      entry = [name, None]
      with self._lock:
        self._running.append(entry)
      try:
        result = program(*args)
      except BaseException:
        with self._lock:
          self._running.remove(entry)
        raise
      # The last output is never the state, which the next program may donate.
      leaves = jax.tree.leaves(result)
      with self._lock:
        if leaves:
          entry[1] = leaves[-1]
        else:
          self._running.remove(entry)
      return result

    return call

  def lap(self, step: int, num_steps: int) -> None:
    """Records that the steps up to `step` are computed.

    Prints a message if the `num_steps` steps since the last call were slow.
    """
    now = time.monotonic()
    with self._lock:
      seconds = now - self._begin
      usual = self._usual(num_steps)
      slowest = self._waited.most_common(1)
      self._begin, self._step, self._reported_at = now, step, 0.0
      self._waited.clear()
      self._running.clear()
    if self._has_compiled:
      self._durations.append(seconds / num_steps)
    self._has_compiled = True
    if usual is not None and seconds > self._limit(usual):
      where = f', most of it in {slowest[0][0]}' if slowest else ''
      steps = f'steps {step - num_steps + 1} to {step}'
      if num_steps == 1:
        steps = f'step {step}'
      self._say(f'{steps} took {seconds:.0f} s, usually {usual:.2g} s{where}')

  def _usual(self, num_steps=1):
    if len(self._durations) < 3:
      return None
    return statistics.median(self._durations) * num_steps

  def _limit(self, usual):
    if usual is None:
      return self._FIRST_SECONDS
    return max(self._FACTOR * usual, self._MIN_SECONDS)

  def _look_on(self):
    while not self._ended.wait(self._TICK):
      with self._lock:
        while self._running and _is_over(self._running[0][1]):
          self._running.popleft()
        current = self._running[0] if self._running else None
        if current is not None:
          self._waited[current[0]] += self._TICK
        seconds = time.monotonic() - self._begin
        usual, step = self._usual(), self._step
        # The message is repeated whenever the time has doubled.
        limit = max(self._limit(usual), 2 * self._reported_at)
        if seconds <= limit:
          continue
        self._reported_at = seconds
      if current is None:
        doing = 'no program is running'
      elif current[1] is None:
        doing = f'{current[0]} is being compiled or has not returned'
      else:
        doing = f'{current[0]} has not finished'
      compared = '' if usual is None else f' (usually {usual:.2g} s per step)'
      self._say(
        f'no progress for {seconds:.0f} s since step {step}{compared}: {doing}'
      )

  def _say(self, text):
    process = f' (process {jax.process_index()})' * (jax.process_count() > 1)
    print(f'{self._name}{process}: {text}', file=sys.stderr, flush=True)

  def __enter__(self) -> 'Watch':
    self._begin = time.monotonic()
    self._thread.start()
    return self

  def __exit__(self, *exception) -> None:
    self._ended.set()
    self._thread.join()


def _is_over(output):
  return output is not None and (output.is_deleted() or output.is_ready())
