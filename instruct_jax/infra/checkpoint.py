"""Checkpoints of a running stage, and the model folders that stages pass on.

Orbax writes both, and both appear by one rename: a process killed while writing
leaves nothing that looks finished. Both keep the shape, dtype and a checksum
over the bits of every array, so that reading detects damage, on any number of
devices or processes.
"""

import contextlib
import functools
import json
import logging
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from instruct_jax import files
from instruct_jax.command import one_line
from instruct_jax.infra import processes, run
from instruct_jax.types import Params, PyTree

_MODEL_FILE = 'model.json'
_PARAMS_FOLDER = 'params'
# Orbax writes it last in object stores, which cannot rename a folder.
_COMMITTED_FILE = 'commit_success.txt'


# Drops the tracebacks that Orbax logs for each failure before it raises it.
logging.getLogger('absl').addFilter(
  lambda record: '/orbax/' not in record.pathname or not record.exc_info
)
_unraisable = sys.unraisablehook


def _report_unraisable(problem) -> None:
  # After one failure, Orbax's other reads and writes find a closed event loop.
  if 'Event loop is closed' not in str(problem.exc_value):
    _unraisable(problem)


sys.unraisablehook = _report_unraisable


class CheckpointError(RuntimeError):
  """A checkpoint or model folder is missing, damaged or does not fit."""


class _DamagedError(Exception):
  """A checkpoint cannot be read; the one before it may be intact."""


class Checkpointer:
  """The checkpoints of one stage, written in the background.

  Args:
    directory: created if absent; it must hold nothing else.
    keep: how many of the newest are kept. With fewer than 2 there is none to
      fall back on when the newest is damaged.
    keep_every: checkpoints at multiples of this step are kept too; 0 for none.
  """

  def __init__(
    self, directory: epath.PathLike, keep: int = 2, keep_every: int = 0
  ):
    self._directory = files.absolute(directory)
    self._keep, self._keep_every = keep, keep_every
    if jax.process_index() == 0:
      self._directory.mkdir(parents=True, exist_ok=True)
      # Left by a process that was killed while writing.
      for unfinished in ocp.utils.tmp_checkpoints(self._directory):
        unfinished.get().rmtree()
    run.wait_for_all('instruct_jax_checkpoints')
    # Not Orbax's manager: after an error in one process, the others would wait
    # for it until a timeout.
    self._handler = ocp.CompositeCheckpointHandler()
    self._writer = ocp.AsyncCheckpointer(self._handler)
    self._finisher = None
    self._error = None
    self._steps = self._find_steps()

  def _find_steps(self):
    """Returns, in every process, the steps that the first one sees on disk."""
    found = np.array([], np.int64)
    if jax.process_index() == 0:
      steps = ocp.utils.checkpoint_steps(self._directory)
      found = np.array(sorted(steps), np.int64)
    if jax.process_count() > 1:
      size = multihost_utils.broadcast_one_to_all(np.array(len(found)))
      found = multihost_utils.broadcast_one_to_all(np.resize(found, int(size)))
    return found.tolist()

  def save(self, step: int, state: PyTree, extra: dict[str, Any]) -> None:
    """Starts to write a checkpoint, unless the step is on disk.

    Returns once the arrays are copied and may be donated. The next `save`,
    `check`, `wait` or `close` raises any error of the background write.

    Args:
      step: names the checkpoint.
      state: pytree of jax arrays, typed PRNG keys included; TypeError for other
        leaves.
      extra: JSON values of the host that belong to the state.
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
    """Waits for a background write, then deletes checkpoints past `keep`."""
    try:
      with self._naming_errors():
        self._writer.wait_until_finished()
        self._steps.append(step)
        for old in self._steps[: -self._keep]:
          if self._keep_every and old % self._keep_every == 0:
            continue
          self._steps.remove(old)
          if jax.process_index() == 0:
            _delete(self._directory / str(old))
    except CheckpointError as error:
      self._error = error
      if processes.are_joined():
        # The other processes would wait forever for this one's part.
        processes.fail(f'error: {error}', error)

  def check(self) -> None:
    """Raises CheckpointError if the last write failed; does not wait."""
    error, self._error = self._error, None
    if error is not None:
      raise error

  def restore_latest(
    self, abstract_state: PyTree
  ) -> tuple[int, PyTree, dict[str, Any]] | None:
    """Step, state and extra of the newest intact checkpoint; None without any.

    Warns about each damaged one, and moves it aside once an older one is read.

    Args:
      abstract_state: arrays or `ShapeDtypeStruct`s, whose shardings the state
        gets; an array without a sharding is put on the first local device.

    Raises:
      CheckpointError: the checkpoint holds other arrays (they are named), or no
        checkpoint is readable.
    """
    self.wait()
    damaged = {}
    for step in sorted(self._steps, reverse=True):
      path = self._directory / str(step)
      try:
        record, arrays = self._read(path, abstract_state)
      except _DamagedError as error:
        damaged[step] = f'{path}: {error}'
        warnings.warn(
          f'checkpoint {damaged[step]}. It is damaged; trying the one before.',
          stacklevel=1,
        )
        continue
      self._set_aside(list(damaged))
      state = _rebuild(abstract_state, arrays, record['arrays'])
      return step, state, record['extra']
    if damaged:
      reasons = '\n  '.join(damaged.values())
      raise CheckpointError(
        f'no checkpoint in {self._directory} is readable:\n  {reasons}\n'
        f'Bring one back from a copy, or delete {self._directory.parent} to '
        'run this stage again from its start.'
      )
    return None

  def _read(self, path, abstract_state):
    # Not through the checkpointer: if one process cannot read, the others would
    # wait for it there.
    record = _in_all(
      lambda: _checked(
        self._handler.restore(
          path, args=ocp.args.Composite(record=ocp.args.JsonRestore())
        )['record']
      )
    )
    _check_fit(record['arrays'], abstract_state, path)
    structs = _named_leaves(_without_keys(abstract_state))
    arrays = _in_all(
      lambda: self._handler.restore(
        path, args=ocp.args.Composite(arrays=_restore_args(structs))
      )['arrays']
    )
    _in_all(lambda: _check_sums(record['arrays'], arrays))
    return record, arrays

  def _set_aside(self, steps):
    """Renames damaged checkpoints: the run will save their steps again."""
    if not steps:
      return
    if jax.process_index() == 0:
      for step in steps:
        target = self._directory / f'damaged-{step}'
        if target.exists():
          target.rmtree()
        (self._directory / str(step)).rename(target)
    run.wait_for_all('instruct_jax_set_aside')
    self._steps = self._find_steps()

  def wait(self) -> None:
    """Waits until everything is on disk; CheckpointError if that fails."""
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
    # A full disk may raise an error of Python, of TensorStore or of Orbax.
    try:
      yield
    except Exception as error:
      whole = [p.name for p in self._directory.glob('*') if p.name.isdigit()]
      last = 'there is none yet'
      if whole:
        last = f'the last one is of step {max(map(int, whole))}'
      raise CheckpointError(
        f'no checkpoint could be written to {self._directory}; {last}. Make '
        'room, or make the directory writable again; the same command then '
        f'continues. {one_line(error)}'
      ) from error


def save_model(
  directory: epath.PathLike, params: Params, metadata: dict[str, Any]
) -> None:
  """Writes or replaces a model folder, which appears only when complete.

  Args:
    directory: the folder; CheckpointError if it cannot be written.
    params: nested dicts of jax arrays.
    metadata: JSON values that a reader needs: model config, kind, reward bias,
      tokenizer fingerprint, provenance.
  """
  final = files.absolute(directory)
  record = _sealed_record(params, metadata)
  arrays = _named_leaves(params)
  unfinished = final.parent / f'.{final.name}.unfinished'
  replaced = final.parent / f'.{final.name}.replaced'
  if files.is_remote(final):
    # An object store cannot rename folders. A folder without model.json is no
    # model, so that file is deleted first and written last.
    unfinished = final
  try:
    if jax.process_index() == 0:
      for leftover in (unfinished, replaced):
        if leftover.exists():
          (leftover / _MODEL_FILE).unlink(missing_ok=True)
          leftover.rmtree()
      unfinished.mkdir(parents=True)
    run.wait_for_all('instruct_jax_model_begin')
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
    run.wait_for_all('instruct_jax_model_end')
  except Exception as error:
    raise CheckpointError(
      f'the model folder {final} could not be written. Make room, or make its '
      'place writable again; the same command then continues. '
      f'{one_line(error)}'
    ) from error


def load_metadata(directory: epath.PathLike) -> dict[str, Any]:
  """The `metadata` of a model folder, or CheckpointError; reads no arrays."""
  return _read_record(files.absolute(directory))['extra']


def load_model(
  directory: epath.PathLike, abstract_params: Params | None = None
) -> tuple[Params, dict[str, Any]]:
  """Parameters and metadata of a model folder.

  Args:
    directory: the folder written by `save_model`.
    abstract_params: arrays or `ShapeDtypeStruct`s that give the expected shapes
      and the shardings; None gives nested dicts of NumPy arrays.

  Raises:
    CheckpointError: the folder is missing, damaged, or holds other parameters.
  """
  path = files.absolute(directory)
  record = _read_record(path)
  saved = record['arrays']
  if abstract_params is None:
    restore_args = ocp.args.PyTreeRestore(
      item=dict.fromkeys(saved, 0),
      restore_args={
        name: ocp.RestoreArgs(restore_type=np.ndarray) for name in saved
      },
    )
  else:
    _check_fit(saved, abstract_params, path)
    restore_args = _restore_args(_named_leaves(abstract_params))
  # Orbax, TensorStore and JSON raise many kinds of errors for damaged files.
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      arrays = reader.restore(path / _PARAMS_FOLDER, args=restore_args)
    _check_sums(saved, arrays)
  except Exception as error:
    raise CheckpointError(
      f'model folder {path} is damaged: {one_line(error)}. {_advice(path)}'
    ) from error
  if abstract_params is None:
    params = flax.traverse_util.unflatten_dict(arrays, sep='/')
  else:
    params = _rebuild(abstract_params, arrays, saved)
  return params, record['extra']


def _read_record(path):
  file = path / _MODEL_FILE
  if not file.exists():
    found = 'the folder exists without it' if path.exists() else 'no folder'
    raise CheckpointError(
      f'no model in {path} ({_MODEL_FILE}: {found}). {_advice(path)}'
    )
  try:
    return _checked(json.loads(file.read_text()))
  except (ValueError, KeyError, TypeError) as error:
    raise CheckpointError(
      f'{file} is damaged: {one_line(error)}. {_advice(path)}'
    ) from error


def _advice(path) -> str:
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
  """Replaces typed PRNG keys, abstract ones too, by their integers."""

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
  """Builds the tree of `abstract` from arrays by name, with typed PRNG keys."""
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
  """Describes the arrays, with a checksum over the description itself."""
  leaves = _named_leaves(tree)
  for name, leaf in leaves.items():
    if not isinstance(leaf, jax.Array):
      raise TypeError(
        f'{name} is a {type(leaf).__name__}, not a jax array; values of the '
        'host belong in the JSON part'
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
  # JSON turns tuples into lists: the checksum is over what will be read.
  record = json.loads(json.dumps({'arrays': described, 'extra': extra}))
  return record | {'checksum': _text_checksum(record)}


def _checked(record) -> dict[str, Any]:
  """Returns the record; raises if it is damaged."""
  content = {name: record[name] for name in ('arrays', 'extra')}
  if _text_checksum(content) != record['checksum']:
    raise ValueError('checksum of the description does not match its text')
  return record


def _text_checksum(content) -> int:
  return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _checksums(arrays: dict[str, Any]) -> dict[str, int]:
  """sum over i of (2 i + 1) * bits(x_i), modulo 2^32, of each array.

  The sum does not depend on the layout of the array; odd weights detect every
  single flipped bit and most swaps. Each process sums its own shards: one
  program over all devices for each array would be slower, and can deadlock on
  CPU.
  """
  parts = {name: list(_shard_sums(x)) for name, x in arrays.items()}
  # Converted only now, so that an accelerator computes all of them meanwhile.
  sums = np.array(
    [sum(int(part) for part in row) % 2**32 for row in parts.values()],
    np.uint32,
  )
  if jax.process_count() > 1:
    everywhere = multihost_utils.process_allgather(sums)
    sums = everywhere.sum(axis=0, dtype=np.uint32)
  return {name: int(value) for name, value in zip(parts, sums, strict=True)}


def _shard_sums(x):
  """Yields the sum over each shard of this process."""
  if isinstance(x, np.ndarray):
    yield _host_sum(x, (0,) * x.ndim, x.shape)
    return
  for shard in x.addressable_shards:
    if shard.replica_id:
      continue  # Another device or process counts this part.
    starts = tuple(axis.start or 0 for axis in shard.index)
    # On CPU, compiling a sum costs more than saving a small model.
    is_host = shard.device.platform == 'cpu'
    yield (_host_sum if is_host else _device_sum)(shard.data, starts, x.shape)


def _host_sum(x, starts, shape):
  x = np.ascontiguousarray(x)
  return _bit_sum(np, x.view(_bits_dtype(x)), starts, shape)


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
  index = xp.zeros((), xp.uint32)
  for axis, (size, start) in enumerate(zip(shape, starts, strict=True)):
    along = xp.arange(bits.shape[axis], dtype=xp.uint32)
    along = along + xp.asarray(start, xp.uint32)
    along = along.reshape(*(1,) * axis, -1)
    index = index[..., None] * xp.uint32(size) + along
  weights = xp.uint32(2) * index + xp.uint32(1)
  return xp.sum(bits.astype(xp.uint32) * weights, dtype=xp.uint32)


def _check_fit(saved, abstract, path) -> None:
  """Raises unless `abstract` has the arrays that were saved."""
  ours = {
    name: (list(x.shape), str(x.dtype))
    for name, x in _named_leaves(abstract).items()
  }
  theirs = {name: (x['shape'], x['dtype']) for name, x in saved.items()}
  wrong = []
  for name in sorted(ours | theirs):
    if name not in theirs:
      wrong.append(f'{name}: not in the file')
    elif name not in ours:
      wrong.append(f'{name}: only in the file')
    elif ours[name] != theirs[name]:
      wrong.append(f'{name}: {theirs[name]} in the file, {ours[name]} wanted')
  if wrong:
    others = f'\n  and {len(wrong) - 10} more' if len(wrong) > 10 else ''
    raise CheckpointError(
      f'{path} holds other arrays than the configured model and optimizer:\n  '
      + '\n  '.join(wrong[:10])
      + f'{others}\nUse the config it was made with, or another directory.'
    )


def _check_sums(saved, arrays) -> None:
  for name, checksum in _checksums(arrays).items():
    if checksum != saved[name]['checksum']:
      raise ValueError(f'array {name} does not match its checksum')


# --- Several processes --------------------------------------------------------


def _in_all(function: Callable[[], Any]) -> Any:
  """Returns a function's result; _DamagedError in all processes if any fails.

  Orbax, TensorStore and JSON raise many kinds of errors for damaged files.
  """
  result = problem = None
  try:
    result = function()
  except Exception as error:
    problem = error
  if jax.process_count() > 1:
    failed = multihost_utils.process_allgather(np.array(problem is not None))
    if problem is None and failed.any():
      problem = OSError('another process could not read it')
  if problem is not None:
    raise _DamagedError(one_line(problem)) from problem
  return result


def _delete(path: epath.Path) -> None:
  if files.is_remote(path):
    # Deleting takes time there; without this file it counts as unfinished.
    (path / _COMMITTED_FILE).unlink(missing_ok=True)
  path.rmtree()
