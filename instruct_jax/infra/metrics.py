"""Writes metrics from the device to files.

`metrics.jsonl` depends only on config and seed: its lines are part of the
checkpoint, so a resumed run's file equals an uninterrupted one's. No run reads
it to make decisions. Values that depend on the clock go to `timing.jsonl`.
The stage's logger receives both.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, SupportsFloat

import jax
from etils import epath

from instruct_jax import files
from instruct_jax.infra import logger
from instruct_jax.types import Metrics

METRICS_FILE = 'metrics.jsonl'
TIMING_FILE = 'timing.jsonl'


def merge(a: Metrics, b: Metrics) -> Metrics:
  """Adds sums and counts name by name; a name in only one of them is kept."""
  merged = {**a, **b}
  for name in sorted(a.keys() & b.keys()):
    merged[name] = (a[name][0] + b[name][0], a[name][1] + b[name][1])
  return dict(sorted(merged.items()))


def to_host(metrics: Metrics) -> dict[str, float]:
  """Fetches (sum, count) pairs and divides; NaN where nothing was counted."""
  return {
    name: float(total) / float(count) if count else math.nan
    for name, (total, count) in jax.device_get(dict(metrics)).items()
  }


class MetricsWriter:
  """Appends metrics to JSON-lines files, and passes them to the stage's logger.

  `write` flushes each line; an object store gets it within ten seconds. Only
  the first process writes.

  Args:
    directory: the stage's folder; created if absent.
    lines: the lines of `metrics.jsonl` so far, from the checkpoint; they
      replace what the file holds.
    resume_step: the restored checkpoint's step, which may be past the last
      line; None for a fresh start.

  Attributes:
    lines: all lines so far, in all processes; see `write`.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    lines: Iterable[Mapping[str, Any]] = (),
    resume_step: int | None = None,
  ):
    self.lines = [dict(line) for line in lines]
    self._metrics = self._timing = None
    stage = logger.current()
    self._logger = stage.of(directory)
    self._is_part = self._logger is not stage
    if jax.process_index() != 0:
      return
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    self._metrics = _open(directory / METRICS_FILE, self.lines)
    # Times are kept, even those of steps that are run again.
    timing = directory / TIMING_FILE
    times = _times(timing)
    self._timing = _open(timing, times)
    self._logger.begin(
      resume_step, _by_step([*self.lines, *times], resume_step)
    )

  def write(
    self, step: int, values: Mapping[str, SupportsFloat]
  ) -> dict[str, Any]:
    """Records values that depend only on config and seed.

    Returns:
      The line as it will be read back, with None for NaN and infinity.
    """
    line = _line(step, values)
    self.lines.append(line)
    self._append(self._metrics, line, values)
    return line

  def write_timing(
    self, step: int, values: Mapping[str, SupportsFloat]
  ) -> None:
    """Records values that depend on the clock."""
    self._append(self._timing, _line(step, values), values)

  def _append(self, file, line, values):
    if file is None:
      return
    try:
      file.write(json.dumps(line) + '\n')
    except OSError as error:
      # Python names the file only where opening it fails.
      raise OSError(error.errno, error.strerror, file.name) from error
    self._logger.numbers(line['step'], values)

  def close(self) -> None:
    """Closes the files; the stage closes its logger."""
    for file in (self._metrics, self._timing):
      if file is not None:
        file.close()
    if self._is_part:
      self._logger.close()


def read_lines(path: epath.PathLike) -> list[dict[str, Any]]:
  """Returns the complete lines of a file; ValueError if one is not JSON."""
  # An incomplete line may follow the last line break.
  lines = epath.Path(path).read_text().split('\n')[:-1]
  parsed = []
  for number, line in enumerate(lines, 1):
    try:
      parsed.append(json.loads(line))
    except json.JSONDecodeError as error:
      raise ValueError(f'{path}:{number} is not JSON: {error}') from error
  return parsed


def _line(step: int, values: Mapping[str, SupportsFloat]) -> dict[str, Any]:
  numbers = {name: float(values[name]) for name in sorted(values)}
  return {'step': step} | {
    name: x if math.isfinite(x) else None for name, x in numbers.items()
  }


def _by_step(lines, last):
  """Merges lines into step -> numbers by name, sorted, up to step `last`."""
  found = {}
  for line in lines if last is not None else ():
    if line['step'] <= last:
      found.setdefault(line['step'], {}).update(line)
  return {
    step: {
      name: math.nan if x is None else float(x)
      for name, x in found[step].items()
      if name != 'step'
    }
    for step in sorted(found)
  }


def _times(path):
  try:
    return read_lines(path) if path.exists() else []
  except ValueError as error:
    raise ValueError(
      f'{error}. It holds only times: delete it, and the same command continues'
    ) from error


def _open(path, lines):
  """The file, open for appending, with only these lines."""
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  files.write_bytes(path, text.encode())
  return files.Appended(path)
