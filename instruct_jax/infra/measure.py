"""What a machine can do, and what a piece of work took of it.

Ceilings are measured by the process that is judged by them, in the same
minutes: processors, clocks and neighbours differ from run to run.
"""

import dataclasses
import os
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# A repeat is disturbed when other processes, or the host below this machine,
# took more than this share of its processors.
DISTURBED = 0.05


# --- Compilations -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Compilations:
  """Programs that XLA was asked for.

  Attributes:
    programs: asked for, however small.
    from_disk: of these, found in the compilation cache.
    seconds: spent on them, reading included; tracing is not.
  """

  programs: int
  from_disk: int
  seconds: float

  def __sub__(self, earlier: 'Compilations') -> 'Compilations':
    return Compilations(
      self.programs - earlier.programs,
      self.from_disk - earlier.from_disk,
      self.seconds - earlier.seconds,
    )


_compiled = {'programs': 0, 'from_disk': 0, 'seconds': 0.0}


def _on_duration(event: str, seconds: float, **_: Any) -> None:
  if event == '/jax/core/compile/backend_compile_duration':
    _compiled['programs'] += 1
    _compiled['seconds'] += seconds


def _on_event(event: str, **_: Any) -> None:
  if event == '/jax/compilation_cache/cache_hits':
    _compiled['from_disk'] += 1


# JAX tells listeners for as long as the process lives, so there is one count a
# process and users take differences.
jax.monitoring.register_event_duration_secs_listener(_on_duration)
jax.monitoring.register_event_listener(_on_event)


def compilations() -> Compilations:
  """Since this module was imported."""
  return Compilations(**_compiled)


# --- Repeats ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Repeats:
  """Seconds of equal pieces of work.

  Attributes:
    seconds: of each, in order.
    others: share of the machine's processors that others had meanwhile; NaN
      where the system does not tell.
  """

  seconds: tuple[float, ...]
  others: tuple[float, ...]

  @property
  def median(self) -> float:
    """Seconds."""
    return statistics.median(self.seconds)

  def summary(self) -> dict[str, Any]:
    """Median, spread and how many were disturbed; JSON."""
    return {
      'median': self.median,
      'least': min(self.seconds),
      'most': max(self.seconds),
      'runs': list(self.seconds),
      'disturbed': sum(share > DISTURBED for share in self.others),
    }


class Stopwatch:
  """Laps of one clock, for repeats and their parts.

  lap = watch.lap()  # Seconds since the one before, and the others' share.
  """

  def __init__(self):
    self._mark = self._now()

  @staticmethod
  def _now() -> tuple[float, float]:
    return time.perf_counter(), _seconds_of_others()

  def lap(self) -> tuple[float, float]:
    """Seconds since the lap before, and the others' share of processors."""
    now, before = self._now(), self._mark
    self._mark = now
    seconds = now[0] - before[0]
    processors = (os.cpu_count() or 1) * max(seconds, 1e-9)
    return seconds, max(0.0, now[1] - before[1]) / processors


def _seconds_of_others() -> float:
  """Processor seconds of all but this process so far; NaN if not known."""
  path = pathlib.Path('/proc/stat')
  if not path.exists():
    return float('nan')
  with path.open() as file:
    # user nice system idle iowait irq softirq steal, in ticks.
    ticks = [int(x) for x in file.readline().split()[1:9]]
  used = sum(ticks) - ticks[3] - ticks[4]
  own = resource.getrusage(resource.RUSAGE_SELF)
  return used / os.sysconf('SC_CLK_TCK') - own.ru_utime - own.ru_stime


def repeat(fn: Callable[[], Any], num_repeats: int, num_warmups: int = 1):
  """Calls `fn`, waits for what it returns, and times that.

  Args:
    fn: returns arrays, or nothing when it has waited itself.
    num_repeats: how many are timed.
    num_warmups: how many go before them (compilation).

  Returns:
    `Repeats`.
  """
  for _ in range(num_warmups):
    jax.block_until_ready(fn())
  seconds, others = [], []
  watch = Stopwatch()
  for _ in range(num_repeats):
    watch.lap()
    jax.block_until_ready(fn())
    lap, share = watch.lap()
    seconds.append(lap)
    others.append(share)
  return Repeats(tuple(seconds), tuple(others))


# --- Ceilings -----------------------------------------------------------------


def matmul_peak(dtype: str, size: int, num_repeats: int = 7) -> float:
  """Floating-point operations a second of one square matrix product.

  The best of several: a ceiling is what the machine can do, not what it does
  when disturbed.
  """
  key = jax.random.key(0)
  x = jax.random.normal(key, (size, size), jnp.dtype(dtype))
  multiply = jax.jit(lambda x, y: x @ y)
  seconds = repeat(lambda: multiply(x, x), num_repeats, 2).seconds
  return 2 * size**3 / min(seconds)


def read_bandwidth(num_bytes: int, num_repeats: int = 7) -> float:
  """Bytes a second that a matrix-vector product reads, at best.

  Args:
    num_bytes: of the float32 matrix; several times any cache.
    num_repeats: of which the best counts.
  """
  columns = 1_024
  rows = max(1, num_bytes // (4 * columns))
  matrix, vector = jnp.ones((rows, columns)), jnp.ones(columns)
  multiply = jax.jit(lambda m, v: m @ v)
  seconds = repeat(lambda: multiply(matrix, vector), num_repeats, 2).seconds
  return matrix.nbytes / min(seconds)


# --- Memory -------------------------------------------------------------------


def peak_host_bytes() -> int:
  """The most memory this process has held so far."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else peak * 1_024


def peak_device_bytes() -> int | None:
  """The most that any local device has held; None on CPU, which is the
  host's memory."""
  peaks = []
  for device in jax.local_devices():
    stats = device.memory_stats()
    if stats and 'peak_bytes_in_use' in stats:
      peaks.append(stats['peak_bytes_in_use'])
  return max(peaks, default=None)
