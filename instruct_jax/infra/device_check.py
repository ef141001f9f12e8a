"""Checks that all chips compute and all links between them work.

  python -m instruct_jax.infra.device_check --backend=tpu

On a pod, all workers run it at the same time (`tpu_setup.sh` does). Each device
holds a number, and they sum, gather and shift these with the collectives that
training uses.
"""

import socket
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from instruct_jax import command


def check(backend: str) -> str:
  """Runs the collectives over all devices; returns their number and kind.

  Raises:
    RuntimeError: the platform is not `backend`, or a result is wrong.
  """
  if jax.default_backend() != backend:
    raise RuntimeError(
      f'jax found {jax.default_backend()}, not {backend}. Is another process '
      'holding the chips (sudo lsof /dev/accel* /dev/vfio/*)? Is this the '
      'right machine?'
    )
  devices = jax.devices()
  count = len(devices)
  mesh = jax.make_mesh((count,), ('all',), (AxisType.Auto,), devices=devices)
  numbers = np.arange(count, dtype=np.float32) + 1
  x = jax.make_array_from_callback(
    (count,), NamedSharding(mesh, P('all')), lambda index: numbers[index]
  )

  def collectives(x):
    total = jax.lax.psum(x, 'all')
    gathered = jax.lax.all_gather(x, 'all', tiled=True)
    shift = [(i, (i + 1) % count) for i in range(count)]
    passed = jax.lax.ppermute(x, 'all', shift)
    return total, jnp.sum(gathered)[None], passed

  found = jax.jit(
    jax.shard_map(
      collectives, mesh=mesh, in_specs=P('all'), out_specs=(P('all'),) * 3
    )
  )(x)
  total = np.full(count, numbers.sum())
  wanted = {'sum': total, 'gather': total, 'shift': np.roll(numbers, 1)}
  for array, (name, expected) in zip(found, wanted.items(), strict=True):
    for shard in array.addressable_shards:
      value = float(np.asarray(shard.data)[0])
      right = expected[shard.index[0]][0]
      if value != right:
        raise RuntimeError(
          f'{name} over {count} devices: {shard.device} has {value} instead of '
          f'{right}'
        )
  return (
    f'{jax.local_device_count()} of {count} x {devices[0].device_kind} here, '
    f'{jax.process_count()} processes'
  )


def main(arguments=None) -> None:
  """Checks all devices; prints an error as one line."""
  parser = command.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--backend', required=True)
  parser.add_argument('--wait', type=int, default=600, help='seconds')
  given = parser.parse_args(arguments)
  host = socket.gethostname()
  try:
    if given.backend == 'tpu':
      # Finds the other workers of a pod.
      jax.distributed.initialize(initialization_timeout=given.wait)
    print(f'ok: {host}: {check(given.backend)}', flush=True)
  except (RuntimeError, ValueError) as error:
    print(f'error: {host}: {error}', file=sys.stderr, flush=True)
    sys.exit(1)


if __name__ == '__main__':
  command.end(main)
