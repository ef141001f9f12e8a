"""Resolves `compute_dtype='auto'` to the dtype that multiplies fastest here.

TPUs have bfloat16 units. Some GPUs and CPUs have bfloat16 instructions (CPUs:
AMX or AVX512-BF16); on others it is slower than float32, so one product is
timed. Several CPU devices always compute in float32: only products on a single
one are written for the fast bfloat16 kernels (`models/products.py`).
"""

from collections.abc import Iterator

import jax
from etils import epath
from ml_collections import ConfigDict

from instruct_jax.infra import measure
from instruct_jax.infra import run as run_lib

KEY = 'compute_dtype'
AUTO = 'auto'
# Speed relative to float32 from which bfloat16 is chosen.
MIN_GAIN = 1.2
# Rows and columns of the timed product.
_SIZES = {'cpu': 1_024, 'gpu': 4_096}


def bfloat16_gain(size: int) -> float:
  """How many times faster this device computes a product in bfloat16."""
  peaks = (measure.matmul_peak(d, size) for d in ('bfloat16', 'float32'))
  return next(peaks) / next(peaks)


def choose() -> tuple[str, str]:
  """Returns (dtype of matrix products for this device, reason)."""
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
  """Replaces 'auto' in a config by the chosen dtype, and prints the choice.

  A resumed run keeps the dtypes that it began with.

  Args:
    config: of a run, changed in place; keys that refer to a changed key follow.
    workdir: of the run.
  """
  if not any(_places(config, {})):
    return
  file = workdir / 'config.json'
  # Either all processes choose, or none.
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
  """Yields (path of a section with 'auto', its dtype in config.json or '')."""
  if section.get(KEY) == AUTO:
    yield path, recorded.get(KEY, '')
  for name, value in section.items():
    if isinstance(value, ConfigDict):
      yield from _places(value, recorded.get(name) or {}, (*path, name))
