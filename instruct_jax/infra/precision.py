"""`compute_dtype='auto'`: what this device multiplies fastest.

TPUs have units for bfloat16. Some GPUs and CPUs have instructions for it (CPUs
AMX or AVX512-BF16); on others it is slower than float32, so one product is
timed. Several CPU devices compute in float32: only products of one are written
for the fast kernels (`models/products.py`).
"""

from collections.abc import Iterator

import jax
from etils import epath
from ml_collections import ConfigDict

from instruct_jax.infra import measure
from instruct_jax.infra import run as run_lib

KEY = 'compute_dtype'
AUTO = 'auto'
# Times faster than float32 that bfloat16 has to be.
MIN_GAIN = 1.2
# Rows and columns of the timed product.
_SIZES = {'cpu': 1_024, 'gpu': 4_096}


def bfloat16_gain(size: int) -> float:
  """Times that a bfloat16 product is faster than a float32 one, here."""
  peaks = (measure.matmul_peak(d, size) for d in ('bfloat16', 'float32'))
  return next(peaks) / next(peaks)


def choose() -> tuple[str, str]:
  """(dtype of matrix products for this device, why)."""
  platform = jax.devices()[0].platform
  if platform not in _SIZES:
    return 'bfloat16', f'the device is a {platform}'
  if platform == 'cpu' and jax.device_count() > 1:
    return 'float32', f'{jax.device_count()} CPU devices share the work'
  gain = bfloat16_gain(_SIZES[platform])
  is_faster = run_lib.agreed(gain >= MIN_GAIN)
  why = f'a bfloat16 product is {gain:.1f} x as fast as a float32 one'
  return 'bfloat16' if is_faster else 'float32', why


def resolve(config: ConfigDict, workdir: epath.Path) -> None:
  """Writes the choice wherever a config says 'auto', and tells it in one line.

  A run that goes on keeps the dtypes that it began with.

  Args:
    config: of a run, in place; keys that refer to one another follow.
    workdir: of the run.
  """
  if not any(_places(config, {})):
    return
  file = workdir / 'config.json'
  # All processes choose, or none.
  before = run_lib.read_json(file) if run_lib.agreed(file.exists()) else {}
  found = list(_places(config, before))
  chosen, why = choose() if '' in dict(found).values() else ('', '')
  kept = ', '.join(sorted({dtype for _, dtype in found} - {''}))
  run_lib.say(f'{KEY}: {chosen or kept}: {why or "as the run began"}')
  with config.unlocked():
    for path, dtype in found:
      section = config
      for name in path:
        section = section[name]
      if section[KEY] == AUTO:
        section[KEY] = dtype or chosen


def _places(
  section: ConfigDict, recorded: dict, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str]]:
  """(path of a section that says 'auto', what config.json has there or '')."""
  if section.get(KEY) == AUTO:
    yield path, recorded.get(KEY, '')
  for name, value in section.items():
    if isinstance(value, ConfigDict):
      yield from _places(value, recorded.get(name) or {}, (*path, name))
