"""Numbers on their way from the device to files.

`metrics.jsonl` is a function of config and seed alone: a resumed run's file
equals an uninterrupted one's. Whatever depends on the clock goes to
`timing.jsonl`. TensorBoard shows both.
"""

import json
import math
import time
from collections.abc import Mapping
from typing import Any, SupportsFloat

import jax
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from instruct_jax.infra import run
from instruct_jax.types import Metrics

METRICS_FILE = 'metrics.jsonl'
TIMING_FILE = 'timing.jsonl'


def merge(a: Metrics, b: Metrics) -> Metrics:
  """Adds sums and counts name by name; a name in only one of them is kept."""
  return {
    name: (a[name][0] + b[name][0], a[name][1] + b[name][1])
    if name in a and name in b
    else (a[name] if name in a else b[name])
    for name in sorted({*a, *b})
  }


def to_host(metrics: Metrics) -> dict[str, float]:
  """Fetches (sum, count) pairs and divides, once.

  Returns:
    Plain floats; NaN where nothing was counted.
  """
  return {
    name: float(total) / float(count) if count else math.nan
    for name, (total, count) in jax.device_get(dict(metrics)).items()
  }


class MetricsWriter:
  """Appends metrics to JSON lines and TensorBoard event files.

  What belongs to step n is written before checkpoint n is saved; each line is
  on its way to the disk when `write` returns. Processes other than the first
  write nothing.

  Args:
    directory: of the stage; created if absent.
    resume_step: the restored checkpoint's step. Lines beyond it, and a last
      line torn by a kill, are removed. None starts an empty file.
  """

  def __init__(self, directory: epath.PathLike, resume_step: int | None):
    self._metrics = self._timing = self._events = None
    if jax.process_index() != 0:
      return
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    last = -1 if resume_step is None else resume_step
    _rewrite(directory / METRICS_FILE, lambda line: line['step'] <= last)
    # Time was spent, whether or not its steps are run again.
    _rewrite(directory / TIMING_FILE, lambda line: True)
    if run.is_remote(directory):
      self._metrics = _WholeFile(directory / METRICS_FILE)
      self._timing = _WholeFile(directory / TIMING_FILE)
      return
    self._metrics = (directory / METRICS_FILE).open('a')
    self._timing = (directory / TIMING_FILE).open('a')
    (directory / 'tensorboard').mkdir(exist_ok=True)
    # Not tensorboardX's SummaryWriter: its thread dies on a full disk, and the
    # next line would wait for it for ever.
    self._events = EventsWriter(str(directory / 'tensorboard' / 'events'))
    self._events.write_event(
      event_pb2.Event(
        wall_time=time.time(),
        step=last + 1,
        session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START),
      )
    )

  def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
    """Records values that config and seed determine; NaN and infinity become
    null in the file."""
    self._append(self._metrics, step, values)

  def write_timing(
    self, step: int, values: Mapping[str, SupportsFloat]
  ) -> None:
    """Records seconds, rates and other values that depend on the clock."""
    self._append(self._timing, step, values)

  def _append(self, file, step, values):
    if file is None:
      return
    line = {'step': step}
    for name in sorted(values):
      value = float(values[name])
      line[name] = value if math.isfinite(value) else None
    try:
      file.write(json.dumps(line) + '\n')
      file.flush()
      self._write_events(step, values)
    except OSError as error:
      # Python names the file only where opening it fails.
      raise OSError(error.errno, error.strerror, file.name) from error

  def _write_events(self, step, values):
    if self._events is None:
      return
    for name in sorted(values):
      self._events.write_event(
        event_pb2.Event(
          wall_time=time.time(),
          step=step,
          summary=summary.scalar(name, float(values[name])),
        )
      )
    self._events.flush()

  def close(self) -> None:
    """Closes the files."""
    for file in (self._metrics, self._timing, self._events):
      if file is not None:
        file.close()

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *exception) -> None:
    self.close()


def read_lines(path: epath.PathLike) -> list[dict[str, Any]]:
  """The lines of `metrics.jsonl` or `timing.jsonl`; a torn last one is left
  out.

  Raises:
    ValueError: another line is not JSON.
  """
  path = epath.Path(path)
  lines = path.read_text().split('\n')
  # A whole file ends in a line break: what follows the last one is torn.
  parsed = []
  for number, line in enumerate(lines[:-1], 1):
    try:
      parsed.append(json.loads(line))
    except json.JSONDecodeError as error:
      raise ValueError(f'{path}:{number} is not JSON: {error}') from error
  return parsed


def _rewrite(path, keep_fn):
  if not path.exists():
    return
  lines = [json.dumps(line) for line in read_lines(path) if keep_fn(line)]
  text = ''.join(line + '\n' for line in lines)
  if run.is_remote(path):
    path.write_text(text)
    return
  unfinished = path.with_name(f'.{path.name}.unfinished')
  unfinished.write_text(text)
  unfinished.replace(path)


class _WholeFile:
  """Where there is no appending: all lines, written at each flush."""

  def __init__(self, path):
    self.name = str(path)
    self._path = path
    self._text = path.read_text() if path.exists() else ''

  def write(self, text):
    self._text += text

  def flush(self):
    self._path.write_text(self._text)

  def close(self):
    pass
