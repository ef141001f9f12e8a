"""Settings of the process that are made before the first use of a device."""

import ctypes
import os
import pathlib
import sys

from etils import epath
from ml_collections import ConfigDict

_DEVICES_FLAG = 'xla_force_host_platform_device_count'
_HUGE_PAGES = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')


def ask_for_huge_pages() -> None:
  """Restarts `python -m MODULE` with an allocator that asks for huge pages.

  Where Linux gives huge pages only on request ("madvise", the usual setting),
  glibc requests them only if GLIBC_TUNABLES says so when a program starts. With
  pages of 4 KiB, a step of a 135 M model on a CPU spends a quarter of its time
  in the kernel. Nothing is done if GLIBC_TUNABLES is set already, even to an
  empty string, or if the program is traced by a debugger or run inside another
  program.
  """
  if 'GLIBC_TUNABLES' in os.environ or sys.gettrace() is not None:
    return
  if not _HUGE_PAGES.exists() or '[madvise]' not in _HUGE_PAGES.read_text():
    return
  spec = sys.modules['__main__'].__spec__
  command = ['-m', spec.name if spec else '', *sys.argv[1:]]
  if sys.orig_argv[-len(command) :] != command:
    return
  os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def prepare(config: ConfigDict) -> None:
  """Sets compiler flags, compilation cache and allocator.

  To be called before the first use of a device.
  """
  os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'
  given = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{given} {config.xla_flags}'.strip()
  # On accelerators it would only make compiler threads wait for each other.
  has_gpu = pathlib.Path('/dev/nvidiactl').exists()
  platforms = os.environ.get('JAX_PLATFORMS') or ('cuda' if has_gpu else 'cpu')
  if sys.platform == 'linux' and platforms == 'cpu':
    _prepare_allocator()
  import jax

  if _DEVICES_FLAG in os.environ['XLA_FLAGS']:
    # Two programs in flight may start in different orders on two CPU devices;
    # if they use collectives, they wait for each other until XLA aborts.
    jax.config.update('jax_cpu_enable_async_dispatch', False)
  if config.compilation_cache:
    folder = epath.Path(config.compilation_cache).expanduser()
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


def _prepare_allocator() -> None:
  """Makes glibc keep memory freed by steps, but not memory of the compiler."""
  libc = ctypes.CDLL(None)
  if not hasattr(libc, 'mallopt'):  # Not glibc.
    return
  # glibc returns large freed buffers to the system, and every step faults them
  # in again: an eighth of a small model's training step on CPU. Keep them: no
  # mmap (-4), no trimming (-1), one arena (-8) for all compiler threads.
  libc.mallopt(-8, 1)
  libc.mallopt(-4, 0)
  libc.mallopt(-1, 2**31 - 1)

  import jax

  def trim(event, seconds, **_):
    if event.endswith('backend_compile_duration') and seconds > 0.3:
      libc.malloc_trim(0)

  jax.monitoring.register_event_duration_secs_listener(trim)
