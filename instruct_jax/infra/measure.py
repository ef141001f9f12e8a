"""Measures the time and memory that work takes, and the machine's peak rates.

The process whose work is compared with the peaks measures them itself:
processors, clock rates and other load differ from run to run.
"""

import contextlib
import ctypes
import dataclasses
import functools
import os
import pathlib
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# A repeat counts as disturbed when other processes, or the host of a virtual
# machine, took more than this share of the processors.
DISTURBED = 0.05


# --- Compilations -------------------------------------------------------------


@dataclasses.dataclass
class Compilations:
  """Compilations so far.

  Attributes:
    programs: that XLA was asked for.
    from_disk: those of them found in the compilation cache.
    seconds: spent on both, without tracing.
  """

  programs: int = 0
  from_disk: int = 0
  seconds: float = 0.0

  def __sub__(self, earlier: 'Compilations') -> 'Compilations':
    return Compilations(
      self.programs - earlier.programs,
      self.from_disk - earlier.from_disk,
      self.seconds - earlier.seconds,
    )


_compiled = Compilations()


def _on_duration(event: str, seconds: float, **_: Any) -> None:
  if event == '/jax/core/compile/backend_compile_duration':
    _compiled.programs += 1
    _compiled.seconds += seconds
    if seconds > 0.1:
      free_memory()


def _on_event(event: str, **_: Any) -> None:
  if event == '/jax/compilation_cache/cache_hits':
    _compiled.from_disk += 1


# JAX has no way to remove a listener, so there is one count per process.
jax.monitoring.register_event_duration_secs_listener(_on_duration)
jax.monitoring.register_event_listener(_on_event)


def compilations() -> Compilations:
  """The counts since this module was imported; callers take differences."""
  return dataclasses.replace(_compiled)


# --- Repeats ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Repeats:
  """Times of equal pieces of work.

  Attributes:
    seconds: of each, in order.
    others: share of the processors that other processes used meanwhile; NaN
      where the system does not report it.
  """

  seconds: tuple[float, ...]
  others: tuple[float, ...]

  @property
  def median(self) -> float:
    """Median of the seconds."""
    return statistics.median(self.seconds)

  def summary(self) -> dict[str, Any]:
    """Median, spread and number of disturbed repeats, as JSON."""
    return {
      'median': self.median,
      'least': min(self.seconds),
      'most': max(self.seconds),
      'runs': list(self.seconds),
      'disturbed': sum(share > DISTURBED for share in self.others),
    }


class Stopwatch:
  """A clock with laps, for repeats and their parts."""

  def __init__(self):
    self._time, self._others = time.perf_counter(), _seconds_of_others()

  def lap(self) -> tuple[float, float]:
    """Seconds since the last lap, and other processes' share of processors."""
    time_before, others_before = self._time, self._others
    self._time, self._others = time.perf_counter(), _seconds_of_others()
    seconds = self._time - time_before
    processors = (os.cpu_count() or 1) * max(seconds, 1e-9)
    return seconds, max(0.0, self._others - others_before) / processors


def _seconds_of_others() -> float:
  """Processor seconds used by other processes so far; NaN if not known."""
  path = pathlib.Path('/proc/stat')
  if not path.exists():
    return float('nan')
  with path.open() as file:
    # user nice system idle iowait irq softirq steal, in ticks.
    ticks = [int(x) for x in file.readline().split()[1:9]]
  used = sum(ticks) - ticks[3] - ticks[4]
  own = resource.getrusage(resource.RUSAGE_SELF)
  return used / os.sysconf('SC_CLK_TCK') - own.ru_utime - own.ru_stime


def repeat(
  fn: Callable[[], Any], num_repeats: int, num_warmups: int = 1
) -> Repeats:
  """Times calls of `fn`, until its results are ready.

  Args:
    fn: returns arrays, or nothing if it waits for the results itself.
    num_repeats: calls to time.
    num_warmups: untimed calls before these (compilation).
  """
  for _ in range(num_warmups):
    jax.block_until_ready(fn())
  laps = []
  watch = Stopwatch()
  for _ in range(num_repeats):
    watch.lap()
    jax.block_until_ready(fn())
    laps.append(watch.lap())
  return Repeats(
    tuple(lap for lap, _ in laps), tuple(other for _, other in laps)
  )


# --- Peak rates ---------------------------------------------------------------


def matmul_peak(dtype: str, size: int) -> float:
  """Floating-point operations per second of square matrix products.

  Of several products, the fastest counts.
  """
  x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
  x /= size**0.5  # So that repeated products stay of the same magnitude.
  # On CPUs, XLA multiplies bfloat16 fast only where the result is float32.
  out = jnp.float32 if jax.default_backend() == 'cpu' else x.dtype

  def multiply(x, y):
    return jnp.matmul(x, y, preferred_element_type=out)

  return 2 * size**3 / _least_seconds(multiply, x, x)


def read_bandwidth(num_bytes: int) -> float:
  """Bytes per second read by the fastest of several matrix-vector products.

  The float32 matrix of `num_bytes` should be several times any cache.
  """
  columns = 1_024
  rows = max(1, num_bytes // (4 * columns))
  matrix, vector = jnp.ones((rows, columns)), jnp.ones(columns)

  def multiply(matrix, vector):  # Each product needs all of the one before.
    return vector / jnp.max(matrix @ vector)

  return matrix.nbytes / _least_seconds(multiply, matrix, vector)


def _least_seconds(fn, x, y) -> float:
  """Seconds of y = fn(x, y), the fastest of several calls.

  An accelerator runs several calls in one program, since starting a program
  takes longer than a small product.
  """
  number = 1 if jax.default_backend() == 'cpu' else 16

  def several(x, y):
    return jax.lax.fori_loop(0, number, lambda _, y: fn(x, y), y)

  call = jax.jit(fn if number == 1 else several)
  times = repeat(lambda: call(x, y), num_repeats=7, num_warmups=2)
  return min(times.seconds) / number


# --- The machine --------------------------------------------------------------

# Those that decide how fast matrices are multiplied.
_EXTENSIONS = ('amx_bf16', 'avx512_bf16', 'avx512f', 'avx2', 'bf16', 'sve')


def processor() -> str:
  """The processor's cores, model and extensions for matrix products."""
  path = pathlib.Path('/proc/cpuinfo')
  lines = path.read_text().splitlines() if path.exists() else []
  found = dict(line.split(':', 1) for line in lines if ':' in line)
  found = {key.strip(): value.strip() for key, value in found.items()}
  flags = (found.get('flags') or found.get('Features') or '').split()
  has = [name for name in _EXTENSIONS if name in flags]
  name = found.get('model name') or platform.processor() or platform.machine()
  return f'{os.cpu_count()} x {name}, {" ".join(has) or "no extensions known"}'


# --- Memory -------------------------------------------------------------------


_PROC = pathlib.Path('/proc/self')


@functools.cache
def _malloc_trim() -> Callable[[int], int]:
  try:
    return ctypes.CDLL(None).malloc_trim
  except (OSError, AttributeError, TypeError):
    return lambda _: 0


def free_memory() -> None:
  """Makes glibc return the freed memory that it keeps to the system.

  That is hundreds of MiB after a large program was compiled. Does nothing with
  other C libraries.
  """
  _malloc_trim()(0)


def reset_peak() -> None:
  """Frees memory and, on Linux, resets `peak_host_bytes`."""
  free_memory()
  with contextlib.suppress(OSError):
    (_PROC / 'clear_refs').write_text('5')


def peak_host_bytes() -> int:
  """Peak memory of this process, since `reset_peak` on Linux."""
  with contextlib.suppress(OSError):
    for line in (_PROC / 'status').read_text().splitlines():
      if line.startswith('VmHWM:'):
        return int(line.split()[1]) * 1_024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else peak * 1_024


def peak_device_bytes() -> int | None:
  """Peak memory of the fullest local device; None on CPU."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  key = 'peak_bytes_in_use'
  return max((found[key] for found in stats if key in found), default=None)
