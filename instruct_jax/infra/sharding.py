"""Where arrays live: one mesh, and one table from axis names to mesh axes.

Every parameter names its axes on the line that creates it (`nn.with_logical_
partitioning`); `LOGICAL_RULES` says which mesh axes split each name. The mesh
axes are `data` (replicas), `fsdp` (replicas that also split the weights) and
`tensor` (heads, MLP and vocabulary split), all of type Auto: the compiler
inserts the collectives.

A mesh takes effect inside `use_mesh(mesh)`. Under `with mesh:`, constraints do
nothing (jax 0.10.2, flax 0.12.8), so tests check real `.sharding.spec`s.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instruct_jax.types import PyTree

MESH_AXES = ('data', 'fsdp', 'tensor')
BATCH_AXES = ('data', 'fsdp')
# Bytes above which a parameter is split wherever one of its axes divides.
LARGE = 2**20

# Logical axis name -> mesh axes; () leaves the axis unsplit. In activations,
# `batch` already uses fsdp, so their width is `None`, never `embed`.
LOGICAL_RULES = {
  'batch': BATCH_AXES,
  'candidates': (),
  'length': (),
  'slots': (),
  'vocab': ('tensor',),
  'heads': ('tensor',),
  'kv_heads': ('tensor',),
  'mlp': ('tensor',),
  'embed': ('fsdp',),
  'head_dim': (),
  'norm': (),
  'rank': (),
  'layers': (),
}


def make_mesh(
  shape: Sequence[int],
  devices: Sequence[jax.Device] | None = None,
  *,
  rows: Sequence[int] = (),
  heads: Sequence[int] = (),
) -> Mesh:
  """Builds the `data, fsdp, tensor` mesh.

  Args:
    shape: devices along each of the three axes; one entry may be -1, which
      takes what the other two leave. () chooses the largest `fsdp` that divides
      the rows and leaves a `tensor` that divides the heads; if there is none,
      all devices go along `fsdp`.
    devices: the devices to use; all by default.
    rows: row counts of the programs' batches and microbatches.
    heads: sizes of axes that `tensor` would split; without any it stays 1.

  Raises:
    ValueError: the shape does not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = shape or _choose(len(devices), rows, heads)
  wanted = dict(zip(MESH_AXES, sizes, strict=True))
  sizes = list(wanted.values())
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(
      f'mesh {wanted}: sizes are positive, and at most one of them is -1'
    )
  fixed = math.prod(size for size in sizes if size != -1)
  filled = [len(devices) // fixed if size == -1 else size for size in sizes]
  if math.prod(filled) != len(devices) or 0 in filled:
    raise ValueError(
      f'mesh {wanted} does not fit the machine: the given sizes multiply to '
      f'{fixed}, and there are {len(devices)} devices'
    )
  return jax.make_mesh(
    tuple(filled), MESH_AXES, (AxisType.Auto,) * 3, devices=devices
  )


def _choose(num_devices, rows, heads) -> tuple[int, int, int]:
  for fsdp in range(num_devices, 0, -1):
    tensor, left_over = divmod(num_devices, fsdp)
    cuts_heads = tensor == 1 or (
      heads and all(num % tensor == 0 for num in heads)
    )
    if not left_over and cuts_heads and all(num % fsdp == 0 for num in rows):
      return 1, fsdp, tensor
  # Uneven microbatches only cost time; `put_batch` refuses uneven batches.
  return 1, num_devices, 1


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[Mesh]:
  """Makes `mesh` and the table current for `constrain` and for Linen's
  `nn.with_logical_constraint`; needed around tracing and around calls."""
  rules = [(name, axes or None) for name, axes in LOGICAL_RULES.items()]
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
    yield mesh


def partition_spec(names: Sequence[str | None]) -> P:
  """Returns the mesh axes of an array from the logical names of its axes.

  Raises:
    ValueError: a name is unknown, or one mesh axis would split two names.
  """
  rules = {None: (), **LOGICAL_RULES}
  owner = {}
  spec = []
  for name in names:
    if name not in rules:
      raise ValueError(
        f'unknown axis name {name!r} in {tuple(names)}; known names: '
        f'{", ".join(LOGICAL_RULES)}'
      )
    axes = rules[name]
    for axis in axes:
      if axis in owner:
        raise ValueError(
          f'axis names {owner[axis]!r} and {name!r} of one array '
          f'{tuple(names)} are both cut along mesh axis {axis!r}'
        )
      owner[axis] = name
    spec.append(_entry(axes))
  return P(*spec)


def _entry(axes):
  """Mesh axes as jax prints them: a single one without its tuple."""
  return axes[0] if len(axes) == 1 else axes or None


def param_shardings(boxed: PyTree, mesh: Mesh) -> PyTree:
  """Shardings of a tree whose arrays carry Linen's axis names.

  Arrays above `LARGE` bytes that the table leaves whole (the norms of 96
  layers, positions without fsdp) are split along their last axis that `fsdp`
  and `tensor` together divide. Leaves without a box are replicated.

  Args:
    boxed: arrays or `ShapeDtypeStruct`s in the boxes of `nn.with_logical_
      partitioning`, or an optimizer state of these.
    mesh: where they will live.

  Raises:
    ValueError: the mesh does not divide an axis, or the names do not fit.
  """

  def leaf_sharding(path, leaf):
    if not _is_boxed(leaf):
      return NamedSharding(mesh, P())
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    shape = leaf.value.shape
    if len(leaf.names) != len(shape):
      raise ValueError(f'{name} {shape} has axis names {leaf.names}')
    spec = partition_spec(leaf.names)
    for size, logical, entry in zip(shape, leaf.names, spec, strict=True):
      parts = _num_parts(entry, mesh.shape)
      if size % parts:
        raise ValueError(
          f'{name} {shape}: axis {logical!r} of size {size} does not divide '
          f'into the {parts} parts of mesh axis {entry!r} '
          f'(mesh {dict(mesh.shape)})'
        )
    is_whole = all(_num_parts(entry, mesh.shape) == 1 for entry in spec)
    if is_whole and math.prod(shape) * leaf.value.dtype.itemsize > LARGE:
      spec = _cut_somewhere(shape, mesh.shape) or spec
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(
    leaf_sharding, boxed, is_leaf=_is_boxed
  )


def _cut_somewhere(shape, sizes) -> P | None:
  """Splits the last axis that divides; None if there is none.

  The first axis, that of the layers, is tried last: all devices need whole
  layers, one at a time.
  """
  axes = tuple(axis for axis in ('fsdp', 'tensor') if sizes[axis] > 1)
  for axis in reversed(range(len(shape))):
    if axes and shape[axis] % _num_parts(axes, sizes) == 0:
      return P(
        *(None,) * axis, _entry(axes), *(None,) * (len(shape) - axis - 1)
      )
  return None


def unbox(boxed: PyTree) -> PyTree:
  """The bare arrays of a boxed tree.

  `nn.unbox` would also constrain them, which fails on abstract arrays.
  """
  return jax.tree.map(
    lambda x: x.value if _is_boxed(x) else x, boxed, is_leaf=_is_boxed
  )


def _is_boxed(x) -> bool:
  return isinstance(x, nn.Partitioned)


def _num_parts(entry, sizes) -> int:
  axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
  return math.prod(sizes[axis] for axis in axes)


def with_shardings(abstract: PyTree, shardings: PyTree) -> PyTree:
  """`abstract` as `ShapeDtypeStruct`s that carry `shardings`."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract,
    shardings,
  )


def shardings_of(tree: PyTree) -> PyTree:
  """The sharding of each array or `ShapeDtypeStruct`, for `jax.jit`."""
  return jax.tree.map(lambda x: x.sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows split over `data` and `fsdp`, all other axes whole."""
  return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, P())


def to_host(tree: PyTree) -> PyTree:
  """Moves each shard into its host's memory, where no program may read it."""
  return _moved(tree, 'pinned_host')


def to_device(tree: PyTree) -> PyTree:
  """Moves the shards back to their devices."""
  return _moved(tree, 'device')


class Offload:
  """Keeps trees, chosen by name, in host memory while no program reads them."""

  def __init__(self, names: Sequence[str]):
    self._names = frozenset(names)

  def store(self, name: str, tree: PyTree) -> PyTree:
    """Moves the tree to the host, if its name is one of those chosen."""
    return to_host(tree) if name in self._names else tree

  def load(self, name: str, tree: PyTree) -> PyTree:
    """Moves the tree back, if its name is one of those chosen."""
    return to_device(tree) if name in self._names else tree


def _moved(tree, kind):
  return jax.tree.map(
    lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), tree
  )


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Asks the compiler to lay `x` out by the logical names of its axes.

  Without a current mesh, returns `x` unchanged. Axes that the mesh does not
  divide are left to the compiler, such as the single row with which a model is
  initialised.

  Raises:
    ValueError: the number of names is wrong, or they do not fit the table.
  """
  if len(names) != x.ndim:
    raise ValueError(f'array of shape {x.shape} has axis names {names}')
  spec = partition_spec(names)
  sizes = jax.sharding.get_abstract_mesh().shape
  if not sizes:
    return x
  entries = [
    P.UNCONSTRAINED if size % _num_parts(entry, sizes) else entry
    for size, entry in zip(x.shape, spec, strict=True)
  ]
  return jax.lax.with_sharding_constraint(x, P(*entries))


def constrain_rows(batch: PyTree, axis: int = 0) -> PyTree:
  """Asks the compiler to split the rows of each array over `data` and `fsdp`.

  For rows picked or reshaped inside a program: left to the compiler, a
  microbatch may end up on one device, or whole on all of them.

  Arrays whose row axis, `axis`, does not divide are still left to the compiler.
  Axes before it are kept whole.
  """
  sizes = jax.sharding.get_abstract_mesh().shape
  if not sizes:
    return batch

  def cut(x):
    if x.ndim <= axis or x.shape[axis] % _num_parts(BATCH_AXES, sizes):
      return x
    after = (P.UNCONSTRAINED,) * (x.ndim - axis - 1)
    spec = P(*(None,) * axis, BATCH_AXES, *after)
    return jax.lax.with_sharding_constraint(x, spec)

  return jax.tree.map(cut, batch)


def num_batch_shards() -> int:
  """Number of parts into which the current mesh splits the rows of a batch."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return _num_parts(BATCH_AXES, sizes) if sizes else 1


def whole_rows(num_rows: int) -> int:
  """The least multiple of the current mesh's shards that is not below it."""
  num_shards = num_batch_shards()
  return -(-num_rows // num_shards) * num_shards


def per_shard(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
  """Makes a function of rows run on each shard of rows separately.

  Indexing rows then stays on the device; otherwise the compiler might gather
  the rows of all devices first. Heads that are split over `tensor` stay split.
  Rows are the first axis of all arguments and results.
  """
  if num_batch_shards() == 1:
    return fn
  return jax.shard_map(
    fn,
    in_specs=P(BATCH_AXES),
    out_specs=P(BATCH_AXES),
    axis_names=set(BATCH_AXES),
    check_vma=False,
  )


def put_batch(batch: PyTree, mesh: Mesh) -> PyTree:
  """Moves a process's own rows of a batch onto the mesh; replicates scalars.

  Returns:
    Global arrays: the rows of all processes, split over `data` and `fsdp`.

  Raises:
    ValueError: `data` and `fsdp` do not divide the global number of rows, or
      the mesh does not give each process its own block of rows.
  """
  count = jax.process_count()
  if count > 1:
    _check_own_rows(mesh)
  return _put(batch, mesh, count, jax.make_array_from_process_local_data)


def put_whole(batch: PyTree, mesh: Mesh) -> PyTree:
  """Like `put_batch`, for a batch of which every process has all rows."""
  if jax.process_count() == 1:
    return put_batch(batch, mesh)
  return _put(batch, mesh, 1, _from_whole)


def _put(batch, mesh, num_blocks, make_fn):
  parts = _num_parts(BATCH_AXES, mesh.shape)

  def put(path, x):
    x = np.asarray(x)
    if x.ndim == 0:
      return make_fn(replicated(mesh), x)
    num_rows = x.shape[0] * num_blocks
    if num_rows % parts:
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise ValueError(
        f'batch array {name or "(unnamed)"} {x.shape}: {num_rows} rows do not '
        f'divide over the {parts} devices of mesh axes {BATCH_AXES} '
        f'(mesh {dict(mesh.shape)})'
      )
    return make_fn(batch_sharding(mesh), x)

  return jax.tree_util.tree_map_with_path(put, batch)


def _from_whole(place, x):
  return jax.make_array_from_callback(x.shape, place, lambda i: x[i])


def _check_own_rows(mesh) -> None:
  """Raises unless each process holds an equal block of the rows, in order."""
  parts = _num_parts(BATCH_AXES, mesh.shape)
  rows = batch_sharding(mesh).devices_indices_map((parts,))
  count = jax.process_count()
  for device, (index,) in rows.items():
    if index.start * count // parts != device.process_index or parts % count:
      raise ValueError(
        f'mesh {dict(mesh.shape)}: the {parts} shards of the rows do not lie '
        f'on {count} processes in equal blocks. Keep the tensor axis within a '
        f'process ({jax.local_device_count()} devices).'
      )


def place(tree: PyTree, mesh: Mesh) -> PyTree:
  """Turns arrays of one process, such as counters, into global arrays."""
  if jax.process_count() == 1:
    return tree

  def put(x):
    if isinstance(x.sharding, NamedSharding):
      return x
    return _from_whole(replicated(mesh), np.asarray(x))

  return jax.tree.map(put, tree)


def fetch(tree: PyTree) -> PyTree:
  """Returns whole NumPy arrays in every process; all processes must call it."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(
    lambda x: (
      np.asarray(x)
      if x.is_fully_replicated
      else multihost_utils.process_allgather(x, tiled=True)
    ),
    tree,
  )


def fetched(program: Callable[..., PyTree]) -> Callable[..., PyTree]:
  """Wraps a program so that its result is `fetch`ed."""
  return lambda *args: fetch(program(*args))
