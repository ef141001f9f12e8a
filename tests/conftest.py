"""Settings that every test runs under, and shared fixtures."""

import contextlib
import os
import pathlib
import shutil
import tempfile

# Before anything imports jax: eight devices on the CPU, always, so that every
# test could meet a mesh and no result depends on what the machine has.
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

import flax.struct
import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

import instruct_jax  # noqa: F401  It tells gcsfs how to read, before others.
from tests import starts
from tests import tiny_run as tiny_run_lib

# Compiled programs that the processes of one test run share: a run that is
# resumed, or forked, compiles the same ones again. The first process makes and
# removes the folder; the others inherit the variable.
_CACHE = 'TEST_COMPILATION_CACHE'
_makes_cache = _CACHE not in os.environ
if _makes_cache:
  os.environ[_CACHE] = tempfile.mkdtemp(prefix='instruct_jax_tests_')

jax.config.update('jax_numpy_rank_promotion', 'raise')
# As `machine.prepare` has it for several CPU devices.
jax.config.update('jax_cpu_enable_async_dispatch', False)
jax.config.update('jax_compilation_cache_dir', os.environ[_CACHE])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
# Tests outlive no power cut, and a busy disk takes its time for each of
# thousands of small files.
os.fsync = lambda descriptor: None


# A pytree is rebuilt by every `jax.tree.map`, with whatever the function
# returned in the place of arrays: shardings, shapes, booleans, None. Its
# annotations document the arrays; checking them at construction would forbid
# that (and NumPy arrays on the host), so the hook is told to leave classes made
# by `flax.struct.dataclass` alone. Functions and plain dataclasses are checked.
_struct_dataclass = flax.struct.dataclass


def _unchecked_dataclass(cls=None, **kwargs):
  if cls is None:
    return lambda cls: _unchecked_dataclass(cls, **kwargs)
  cls = _struct_dataclass(cls, **kwargs)
  cls.__no_type_check__ = True
  return cls


flax.struct.dataclass = _unchecked_dataclass

# The annotations of the package become assertions: an array of the wrong shape
# or dtype fails at the call that passes it.
install_import_hook('instruct_jax', 'beartype.beartype')

# A warning that points at our own code is a bug of ours.
_WARNINGS = r'error:::instruct_jax(\.|$)'


def pytest_configure(config):
  config.addinivalue_line('filterwarnings', _WARNINGS)


def pytest_unconfigure():
  if _makes_cache:
    shutil.rmtree(os.environ.pop(_CACHE), ignore_errors=True)


@pytest.fixture
def rng() -> np.random.Generator:
  """Seeded the same in every test."""
  return np.random.default_rng(0)


@pytest.fixture(scope='module')
def quick_compile():
  """XLA without its slower passes, for files that compile more than they
  compute: `pytestmark = pytest.mark.usefixtures('quick_compile')`."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='session')
def start():
  """`start('instruct_jax.main', '--config=...')`; see `starts.py`."""
  with contextlib.closing(starts.Starts()) as found:
    yield found


@pytest.fixture(scope='session')
def tiny_run(start, tmp_path_factory):
  """Folder with data and config.py of a small pretraining run."""
  return tiny_run_lib.write(start, tmp_path_factory.mktemp('tiny_run'))


@pytest.fixture
def workdir(tmp_path) -> pathlib.Path:
  """An empty work directory."""
  path = tmp_path / 'workdir'
  path.mkdir()
  return path


@pytest.fixture
def data_root() -> pathlib.Path:
  """The folder with the real data sets; a test that needs it is skipped where
  it is absent."""
  default = pathlib.Path(__file__).parents[2] / 'shared' / 'data'
  root = pathlib.Path(os.environ.get('INSTRUCT_JAX_DATA', default))
  if not root.is_dir():
    pytest.skip(f'no data in {root}; set INSTRUCT_JAX_DATA to its folder')
  return root


@pytest.fixture(scope='session')
def models_root() -> pathlib.Path:
  """The folder of published models; a test that needs it is skipped without."""
  root = os.environ.get('INSTRUCT_JAX_MODELS', '')
  if not root or not pathlib.Path(root).is_dir():
    pytest.skip(
      f'no published models in {root!r}; set INSTRUCT_JAX_MODELS to a folder '
      'that holds SmolLM2-135M-Instruct'
    )
  return pathlib.Path(root)
