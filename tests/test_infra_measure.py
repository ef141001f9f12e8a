"""Clocks, compilations and ceilings."""

import pathlib
import platform
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.infra import measure


def test_compilations_are_counted_once_per_shape():
  double = jax.jit(lambda x: 2 * x)
  inputs = [jnp.ones(3), jnp.ones(5)]
  before = measure.compilations()
  double(inputs[0])
  double(inputs[0])
  once = measure.compilations() - before
  assert once.programs == 1
  assert once.seconds > 0
  double(inputs[1])
  assert (measure.compilations() - before).programs == 2


def test_repeats_tell_the_clock():
  calls = []

  def work():
    calls.append(None)
    time.sleep(0.02 if len(calls) < 5 else 0.06)

  times = measure.repeat(work, 3, 2)
  assert len(calls) == 5
  assert times.median >= 0.02
  summary = times.summary()
  assert summary['least'] >= 0.02
  assert summary['most'] >= 0.06
  assert summary['runs'] == list(times.seconds)
  quiet = measure.Repeats((1.0, 2.0, 4.0), (0.0, float('nan'), 0.5))
  assert (quiet.median, quiet.summary()['disturbed']) == (2.0, 1)


def test_ceilings_are_of_the_order_of_numpy():
  x = np.ones((512, 512), np.float32)
  seconds = []
  for _ in range(5):
    begin = time.perf_counter()
    x @ x
    seconds.append(time.perf_counter() - begin)
  theirs = 2 * 512**3 / min(seconds)
  ours = measure.matmul_peak('float32', 512)
  assert theirs / 30 < ours < theirs * 30
  # More than a disk, less than a cache of registers.
  assert 1e8 < measure.read_bandwidth(2**22) < 1e13


def test_peak_memory_grows_with_what_is_held():
  before = measure.peak_host_bytes()
  held = np.ones(before + 2**26, np.uint8)
  assert measure.peak_host_bytes() >= before + 2**25
  del held
  assert measure.peak_device_bytes() is None


def test_the_peak_begins_anew():
  if not pathlib.Path('/proc/self/clear_refs').exists():
    pytest.skip('Linux alone resets the peak')
  np.ones(200 << 20, np.uint8)
  before = measure.peak_host_bytes()
  measure.reset_peak()
  after = measure.peak_host_bytes()
  assert before - after > 100 << 20
  kept = np.ones(200 << 20, np.uint8)
  assert measure.peak_host_bytes() - after > 150 << 20
  del kept


def test_freed_memory_goes_back_to_the_system():
  if not sys.platform.startswith('linux') or platform.libc_ver()[0] != 'glibc':
    pytest.skip('only glibc keeps freed memory that it can give back')
  # Small pieces, and one after them that keeps the heap's end.
  script = """if True:
    import ctypes
    from instruct_jax.infra import measure
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    pieces = [libc.malloc(8_000) for _ in range(20_000)]
    for piece in pieces:
      libc.memset(piece, 1, 8_000)
    last = libc.malloc(8_000)
    for piece in pieces:
      libc.free(piece)
    measure.free_memory()
    held = [x for x in open('/proc/self/status') if x.startswith('VmRSS')]
    peak = [x for x in open('/proc/self/status') if x.startswith('VmHWM')]
    print(int(held[0].split()[1]), int(peak[0].split()[1]))
  """
  printed = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, check=True
  ).stdout
  held, peak = map(int, printed.split())
  assert peak - held > 130_000
