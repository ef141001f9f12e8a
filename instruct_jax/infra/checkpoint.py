"""Checkpoints of a running stage, and the model folders that stages pass on.

Both are written by Orbax and become visible by one rename, so that a process
killed while writing leaves nothing that looks finished. Both carry, for every
array, its shape, dtype and a checksum over its bits: a damaged file is found
on reading even where the storage format would not notice, and independently of
how many devices or processes wrote it.
"""

import contextlib
import functools
import json
import logging
import sys
import threading
import warnings
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from instruct_jax import files
from instruct_jax.infra import processes, run
from instruct_jax.types import Params, PyTree

_MODEL_FILE = 'model.json'
_PARAMS_FOLDER = 'params'
# Orbax writes it last, where folders cannot be renamed at once.
_COMMITTED_FILE = 'commit_success.txt'


# Orbax logs each failure with its traceback, and then raises it.
logging.getLogger('absl').addFilter(
  lambda record: '/orbax/' not in record.pathname or not record.exc_info
)
_unraisable = sys.unraisablehook


def _report_unraisable(problem) -> None:
  # When one of its reads or writes fails, Orbax abandons the others, which come
  # back to a loop that is closed.
  if 'Event loop is closed' not in str(problem.exc_value):
    _unraisable(problem)


sys.unraisablehook = _report_unraisable


class CheckpointError(RuntimeError):
  """A checkpoint or model folder is missing, damaged or does not fit."""


class Checkpointer:
  """The checkpoints of one stage: asynchronous, the last few kept.

  Args:
    directory: created if absent; nothing else belongs in it.
    keep: how many checkpoints stay. With less than 2 there is nothing to fall
      back on when the newest is damaged.
    keep_every: those of steps that it divides stay, too; 0 for none.
  """

  def __init__(
    self, directory: epath.PathLike, keep: int = 2, keep_every: int = 0
  ):
    self._directory = files.absolute(directory)
    self._keep, self._keep_every = keep, keep_every
    if jax.process_index() == 0:
      self._directory.mkdir(parents=True, exist_ok=True)
      # What was being written when the process was killed.
      for unfinished in ocp.utils.tmp_checkpoints(self._directory):
        unfinished.get().rmtree()
    _barrier('instruct_jax_checkpoints')
    # Orbax's manager keeps an error of one process from the others until they
    # have waited for it in vain, so what is kept is decided here.
    self._handler = ocp.CompositeCheckpointHandler()
    self._writer = ocp.AsyncCheckpointer(self._handler)
    self._finisher = None
    self._error = None
    self._steps = self._find_steps()

  def _find_steps(self):
    """Steps on disk, as the first process sees them."""
    found = []
    if jax.process_index() == 0:
      found = ocp.utils.checkpoint_steps(self._directory)
    return _of_first(sorted(found))

  def save(self, step: int, state: PyTree, extra: dict[str, Any]) -> None:
    """Starts to write a checkpoint; returns once the arrays are copied.

    The arrays may be donated right afterwards. Errors of the background write
    are raised by the next `save`, `wait` or `close`.

    Args:
      step: names the checkpoint; a step that is on disk is not written again.
      state: pytree of jax arrays, typed PRNG keys included.
      extra: what belongs to the state and lives on the host (data position,
        KL coefficient, ...); anything JSON holds.

    Raises:
      TypeError: a leaf is not a jax array, or `extra` is not JSON.
      CheckpointError: it, or the one before, could not be written.
    """
    if step in self._steps:
      return
    record = _sealed_record(state, extra)
    self.wait()
    with self._naming_errors():
      self._writer.save(
        self._directory / str(step),
        args=ocp.args.Composite(
          arrays=ocp.args.PyTreeSave(_named_leaves(_without_keys(state))),
          record=ocp.args.JsonSave(record),
        ),
      )
    self._finisher = threading.Thread(
      target=self._finish, args=(step,), daemon=True
    )
    self._finisher.start()

  def _finish(self, step):
    """Waits for a write in the background, and deletes what is too old."""
    try:
      with self._naming_errors():
        self._writer.wait_until_finished()
        self._steps.append(step)
        old = self._steps[: -self._keep]
        for number in old:
          if self._keep_every and number % self._keep_every == 0:
            continue
          self._steps.remove(number)
          if jax.process_index() == 0:
            _delete(self._directory / str(number))
    except CheckpointError as error:
      self._error = error
      if processes.are_joined():
        # The others wait for this one's part, and would for ever.
        processes.fail(f'error: {error}', error)

  def check(self) -> None:
    """Raises what went wrong in the background so far; does not wait.

    Raises:
      CheckpointError: the last checkpoint could not be written.
    """
    error, self._error = self._error, None
    if error is not None:
      raise error

  def restore_latest(
    self, abstract_state: PyTree
  ) -> tuple[int, PyTree, dict[str, Any]] | None:
    """Reads the newest checkpoint that is whole.

    A damaged one is reported by a warning that names it, and moved aside once
    an older one has been read.

    Args:
      abstract_state: what to restore into: arrays or `ShapeDtypeStruct`s; each
        array is laid out by the leaf's sharding (first device where it has
        none), whatever it was when saved.

    Returns:
      Step, state and extra; None if this directory never got a checkpoint.

    Raises:
      CheckpointError: the checkpoint belongs to another state (the arrays are
        named), or there are checkpoints and none is readable.
    """
    self.wait()
    damaged = {}
    for step in sorted(self._steps, reverse=True):
      path = self._directory / str(step)
      # Whatever is wrong with the files, in Orbax, TensorStore or JSON, must
      # lead to the older checkpoint, so every exception is caught here.
      try:
        # Not by the checkpointer: where one process cannot read, the others
        # would wait for it there.
        record = self._handler.restore(
          path, args=ocp.args.Composite(record=ocp.args.JsonRestore())
        )['record']
        extra = _unsealed(record)
        problem = None
      except Exception as error:
        problem = error
      problem = _problem_of_all(problem)
      if problem is None:
        _check_fit(record['arrays'], abstract_state, path)
        try:
          arrays = self._read_arrays(path, abstract_state)
        except Exception as error:
          problem = error
        problem = _problem_of_all(problem)
      if problem is None:
        # The sums are over all processes: it fails in all of them or in none.
        try:
          _check_sums(record['arrays'], arrays)
        except ValueError as error:
          problem = error
      if problem is None:
        self._set_aside(list(damaged))
        state = _rebuild(abstract_state, arrays, record['arrays'])
        return step, state, extra
      damaged[step] = f'{path}: {_one_line(problem)}'
      warnings.warn(
        f'checkpoint {damaged[step]}. It is damaged; trying the one before.',
        stacklevel=1,
      )
    if damaged:
      reasons = '\n  '.join(damaged.values())
      raise CheckpointError(
        f'no checkpoint in {self._directory} is readable:\n  {reasons}\n'
        f'Bring one back from a copy, or delete {self._directory.parent} to '
        'run this stage again from its start.'
      )
    return None

  def _read_arrays(self, path, abstract_state):
    structs = _named_leaves(_without_keys(abstract_state))
    return self._handler.restore(
      path, args=ocp.args.Composite(arrays=_restore_args(structs))
    )['arrays']

  def _set_aside(self, steps):
    """Frees the steps of damaged checkpoints, for the run will save them."""
    if not steps:
      return
    if jax.process_index() == 0:
      for step in steps:
        target = self._directory / f'damaged-{step}'
        if target.exists():
          target.rmtree()
        (self._directory / str(step)).rename(target)
    _barrier('instruct_jax_set_aside')
    self._steps = self._find_steps()

  def wait(self) -> None:
    """Returns once everything saved is on disk.

    Raises:
      CheckpointError: something could not be written.
    """
    if self._finisher is not None:
      self._finisher.join()
      self._finisher = None
    self.check()

  def close(self) -> None:
    """Waits, and releases the background threads."""
    try:
      self.wait()
    finally:
      with self._naming_errors():
        self._writer.close()

  @contextlib.contextmanager
  def _naming_errors(self):
    # A full disk is an error of Python, of TensorStore or of Orbax.
    try:
      yield
    except Exception as error:
      whole = [p.name for p in self._directory.glob('*') if p.name.isdigit()]
      last = (
        f'the last one is of step {max(map(int, whole))}'
        if whole
        else ('there is none yet')
      )
      raise CheckpointError(
        f'no checkpoint could be written to {self._directory}; {last}. Make '
        'room, or make the directory writable again; the same command then '
        f'continues. {_one_line(error)}'
      ) from error


def save_model(
  directory: epath.PathLike, params: Params, metadata: dict[str, Any]
) -> None:
  """Writes a model folder; one that exists is replaced.

  Args:
    directory: the folder; it appears under this name only when complete.
    params: nested dicts of jax arrays.
    metadata: what a reader needs to rebuild and to trust the model (its config,
      kind, reward bias, tokenizer fingerprint, provenance); must be JSON.

  Raises:
    CheckpointError: it could not be written.
  """
  final = files.absolute(directory)
  record = _sealed_record(params, metadata)
  arrays = _named_leaves(params)
  unfinished = final.parent / f'.{final.name}.unfinished'
  replaced = final.parent / f'.{final.name}.replaced'
  if files.is_remote(final):
    # Directories cannot be renamed at once there. A model without its
    # description is none, so that one goes first and comes last.
    unfinished = final
  # A full disk is an error of Python, of TensorStore or of Orbax.
  try:
    if jax.process_index() == 0:
      for leftover in (unfinished, replaced):
        if leftover.exists():
          (leftover / _MODEL_FILE).unlink(missing_ok=True)
          leftover.rmtree()
      unfinished.mkdir(parents=True)
    _barrier('instruct_jax_model_begin')
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
      writer.save(unfinished / _PARAMS_FOLDER, args=ocp.args.PyTreeSave(arrays))
    if jax.process_index() == 0:
      (unfinished / _MODEL_FILE).write_text(
        json.dumps(record, indent=1, sort_keys=True)
      )
      if unfinished != final:
        if final.exists():
          final.rename(replaced)
        unfinished.rename(final)
        if replaced.exists():
          replaced.rmtree()
    _barrier('instruct_jax_model_end')
  except Exception as error:
    raise CheckpointError(
      f'the model folder {final} could not be written. Make room, or make its '
      'place writable again; the same command then continues. '
      f'{_one_line(error)}'
    ) from error


def load_metadata(directory: epath.PathLike) -> dict[str, Any]:
  """Reads only what `save_model` got as `metadata`.

  Raises:
    CheckpointError: no model folder there, or its description is damaged.
  """
  return _unsealed(_read_record(files.absolute(directory)))


def load_model(
  directory: epath.PathLike, abstract_params: Params | None = None
) -> tuple[Params, dict[str, Any]]:
  """Reads a model folder.

  Args:
    directory: the folder written by `save_model`.
    abstract_params: arrays or `ShapeDtypeStruct`s to check against and to lay
      the parameters out by; None gives nested dicts of NumPy arrays.

  Returns:
    Parameters and metadata. The metadata is for the caller to check.

  Raises:
    CheckpointError: the folder is missing, damaged, or holds other parameters.
  """
  path = files.absolute(directory)
  record = _read_record(path)
  saved = record['arrays']
  if abstract_params is None:
    restore_args = ocp.args.PyTreeRestore(
      item={name: 0 for name in saved},
      restore_args={
        name: ocp.RestoreArgs(restore_type=np.ndarray) for name in saved
      },
    )
  else:
    _check_fit(saved, abstract_params, path)
    restore_args = _restore_args(_named_leaves(abstract_params))
  # As above: any failure to read means one thing to the user.
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      arrays = reader.restore(path / _PARAMS_FOLDER, args=restore_args)
    _check_sums(saved, arrays)
  except Exception as error:
    raise CheckpointError(
      f'model folder {path} is damaged: {_one_line(error)}. {_again(path)}'
    ) from error
  metadata = _unsealed(record)
  if abstract_params is not None:
    return _rebuild(abstract_params, arrays, saved), metadata
  params = {}
  for name, array in arrays.items():
    *parents, last = name.split('/')
    node = params
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = array
  return params, metadata


def _read_record(path):
  file = path / _MODEL_FILE
  if not file.exists():
    found = 'the folder exists without it' if path.exists() else 'no folder'
    raise CheckpointError(
      f'no model in {path} ({_MODEL_FILE}: {found}). {_again(path)}'
    )
  try:
    record = json.loads(file.read_text())
    _unsealed(record)
  except (ValueError, KeyError, TypeError) as error:
    raise CheckpointError(
      f'{file} is damaged: {_one_line(error)}. {_again(path)}'
    ) from error
  return record


def _again(path) -> str:
  """What to do about a model folder that cannot be used."""
  for folder in (path.parent, path.parent.parent):
    done = folder / run.DONE_FILE
    if done.exists():
      return (
        f'Delete it and {done}, and the command of that run makes it again; or '
        'name another folder.'
      )
  return 'Run the stage that writes it, copy it again, or name another folder.'


# --- Arrays by name -----------------------------------------------------------


def _is_key(x) -> bool:
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _without_keys(tree):
  """Typed PRNG keys as the integers behind them; abstract leaves too."""

  def convert(x):
    if not _is_key(x):
      return x
    if isinstance(x, jax.Array):
      return jax.random.key_data(x)
    data = jax.eval_shape(jax.random.key_data, x)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)

  return jax.tree.map(convert, tree)


def _named_leaves(tree) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  named = {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in leaves
  }
  if len(named) != len(leaves):
    raise ValueError(f'two leaves of one name among {sorted(named)}')
  return named


def _rebuild(abstract, arrays, saved):
  """`arrays`, by name, in the tree of `abstract`, keys made keys again."""
  leaves = []
  for name in _named_leaves(abstract):
    impl = saved[name]['key_impl']
    array = arrays[name]
    leaves.append(jax.random.wrap_key_data(array, impl=impl) if impl else array)
  return jax.tree.structure(abstract).unflatten(leaves)


def _restore_args(structs):
  first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return ocp.args.PyTreeRestore(
    item=structs,
    restore_args={
      name: ocp.ArrayRestoreArgs(
        sharding=first if x.sharding is None else x.sharding,
        global_shape=x.shape,
        dtype=x.dtype,
      )
      for name, x in structs.items()
    },
  )


# --- Descriptions and checksums -----------------------------------------------


def _sealed_record(tree, extra):
  """What lies beside the arrays, with a checksum over its own text."""
  leaves = _named_leaves(tree)
  for name, leaf in leaves.items():
    if not isinstance(leaf, jax.Array):
      raise TypeError(
        f'{name} is a {type(leaf).__name__}, not a jax array; values of the '
        'host belong into the JSON part'
      )
  sums = _checksums(_named_leaves(_without_keys(tree)))
  described = {
    name: {
      'shape': list(leaf.shape),
      'dtype': str(leaf.dtype),
      'key_impl': str(jax.random.key_impl(leaf)) if _is_key(leaf) else None,
      'checksum': sums[name],
    }
    for name, leaf in leaves.items()
  }
  # Through JSON once: what was saved is what will be read (tuples are lists).
  record = json.loads(json.dumps({'arrays': described, 'extra': extra}))
  return record | {'checksum': _text_checksum(record)}


def _unsealed(record) -> dict[str, Any]:
  content = {name: record[name] for name in ('arrays', 'extra')}
  if _text_checksum(content) != record['checksum']:
    raise ValueError('checksum of the description does not match its text')
  return content['extra']


def _text_checksum(content) -> int:
  return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _checksums(arrays: dict[str, Any]) -> dict[str, int]:
  """sum over i of (2 i + 1) * bits(x_i), modulo 2^32, of each array.

  Integer sums are exact in any order, so the value does not depend on how the
  array is laid out; odd weights let no flipped bit and few swaps pass. Every
  shard is summed where it is, and the sums of all processes are exchanged at
  once: a program of all devices for each array would be slower, and on CPU
  several of those in flight can wait for each other for ever.
  """
  parts = {name: list(_shard_sums(x)) for name, x in arrays.items()}
  # Only now: on an accelerator all of them have been computed meanwhile.
  sums = np.array(
    [sum(int(part) for part in row) % 2**32 for row in parts.values()],
    np.uint32,
  )
  if jax.process_count() > 1:
    everywhere = multihost_utils.process_allgather(sums)
    sums = everywhere.sum(axis=0, dtype=np.uint32)
  return {name: int(value) for name, value in zip(parts, sums, strict=True)}


def _shard_sums(x):
  """The part of the sum of each of this process's own shards."""
  if isinstance(x, np.ndarray):
    yield _bit_sum(np, _host_bits(x), (0,) * x.ndim, x.shape)
    return
  for shard in x.addressable_shards:
    if shard.replica_id:
      continue  # Another device, or process, counts this part.
    starts = tuple(axis.start or 0 for axis in shard.index)
    if shard.device.platform == 'cpu':
      # Compiling it costs more than a small model's save.
      bits = _host_bits(np.asarray(shard.data))
      yield _bit_sum(np, bits, starts, x.shape)
    else:
      yield _device_sum(shard.data, starts, x.shape)


def _host_bits(x):
  x = np.ascontiguousarray(x)
  return x.view(_bits_dtype(x))


@functools.partial(jax.jit, static_argnums=2)
def _device_sum(x, starts, shape):
  dtype = _bits_dtype(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  return _bit_sum(jnp, jax.lax.bitcast_convert_type(x, dtype), starts, shape)


def _bits_dtype(x):
  return {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]


def _bit_sum(xp, bits, starts, shape):
  # Row-major positions in the whole array, built axis by axis.
  index = xp.zeros(bits.shape, xp.uint32)
  for axis, (size, start) in enumerate(zip(shape, starts, strict=True)):
    along_shape = [1] * bits.ndim
    along_shape[axis] = bits.shape[axis]
    along = xp.arange(bits.shape[axis], dtype=xp.uint32).reshape(along_shape)
    index = index * xp.uint32(size) + (along + xp.asarray(start, xp.uint32))
  weights = xp.uint32(2) * index + xp.uint32(1)
  return xp.sum(bits.astype(xp.uint32) * weights, dtype=xp.uint32)


def _check_fit(saved, abstract, path) -> None:
  """Raises unless `abstract` has the arrays that were saved."""
  structs = _named_leaves(abstract)
  wrong = [f'{name}: not in the file' for name in structs if name not in saved]
  wrong += [
    f'{name}: only in the file' for name in saved if name not in structs
  ]
  for name in structs.keys() & saved.keys():
    ours = (list(structs[name].shape), str(structs[name].dtype))
    theirs = (saved[name]['shape'], saved[name]['dtype'])
    if ours != theirs:
      wrong.append(f'{name}: {theirs} in the file, {ours} wanted')
  if wrong:
    wrong.sort()
    more = f'\n  and {len(wrong) - 10} more' if len(wrong) > 10 else ''
    raise CheckpointError(
      f'{path} holds other arrays than the configured model and optimizer:\n  '
      + '\n  '.join(wrong[:10])
      + f'{more}\nUse the config it was made with, or another directory.'
    )


def _check_sums(saved, arrays) -> None:
  for name, checksum in _checksums(arrays).items():
    if checksum != saved[name]['checksum']:
      raise ValueError(f'array {name} does not match its checksum')


def _one_line(error) -> str:
  text = ' '.join(str(error).split())
  return f'{type(error).__name__}: {text[:300]}'


# --- Several processes --------------------------------------------------------


def _problem_of_all(problem: Exception | None) -> Exception | None:
  """This process's problem, or a word about another's; None if there is none.

  All processes go on alike: each of them has to take part in what follows.
  """
  if jax.process_count() == 1:
    return problem
  found = multihost_utils.process_allgather(np.array(problem is not None))
  if problem is None and found.any():
    return OSError('another process could not read it')
  return problem


def _of_first(numbers: list[int]) -> list[int]:
  """The first process's numbers, in every process."""
  if jax.process_count() == 1:
    return numbers
  size = multihost_utils.broadcast_one_to_all(np.array(len(numbers)))
  padded = np.zeros(int(size), np.int64)
  padded[: len(numbers)] = numbers[: int(size)]
  return multihost_utils.broadcast_one_to_all(padded).tolist()


def _delete(path: epath.Path) -> None:
  if files.is_remote(path):
    # A folder goes file by file there; without this one it counts as unwritten.
    (path / _COMMITTED_FILE).unlink(missing_ok=True)
  path.rmtree()


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
