"""Low-rank adapters (Hu et al. 2021): a parameter tree beside a frozen base."""

from instruct_jax.types import Params


def join(trained: Params, base: Params | None) -> Params:
  """Both trees as one, which a module reads; nothing is copied.

  Args:
    trained: leaves under training: adapters and a scalar model's head; all of
      them where there is no base.
    base: the other leaves, frozen; None where all are trained.

  Raises:
    ValueError: a leaf stands in both.
  """
  if base is None:
    return trained
  joined = dict(base)
  for name, value in trained.items():
    if name not in base:
      joined[name] = value
    elif isinstance(value, dict):
      joined[name] = join(value, base[name])
    else:
      raise ValueError(f'{name} is trained and in the frozen base')
  return joined
