"""Settings of the machine, made before the first use of a device."""

import ctypes
import os
import sys

from etils import epath
from ml_collections import ConfigDict


def prepare(config: ConfigDict) -> None:
  """Compiler flags, cache and allocator, before the first use of a device."""
  os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'
  given = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{given} {config.xla_flags}'.strip()
  if sys.platform == 'linux':
    _prepare_allocator()
  if config.compilation_cache:
    import jax

    folder = epath.Path(config.compilation_cache).expanduser()
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


def _prepare_allocator() -> None:
  """Keeps memory that steps free, but not memory that the compiler frees."""
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
