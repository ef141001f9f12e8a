"""The state that gradient steps update, and the guard for non-finite steps."""

import warnings
from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import optax
from etils import epath
from jaxtyping import Array, Float, Int

from instruct_jax.infra import sharding
from instruct_jax.types import Key, LossFn, Metrics, Params, PyTree


class NonFiniteError(RuntimeError):
  """Too many updates in a row had a non-finite loss or gradient."""


@flax.struct.dataclass
class TrainState:
  """Parameters under training.

  Attributes:
    step: updates attempted, which determines PRNG keys and data positions. The
      learning rate depends on the optimizer's count of applied updates,
      `step - num_skipped`.
    params: float32 master weights.
    opt_state: state of the optimizer.
    num_skipped: updates skipped since the start.
    num_consecutive_skipped: updates skipped since the last applied one.
  """

  step: Int[Array, '']
  params: Params
  opt_state: PyTree
  num_skipped: Int[Array, '']
  num_consecutive_skipped: Int[Array, '']


def create(
  params: Params, optimizer: optax.GradientTransformation
) -> TrainState:
  """A state at step 0."""
  # Three separate arrays: a buffer that appears twice cannot be donated.
  step, skipped, consecutive = (jnp.zeros((), jnp.int32) for _ in range(3))
  opt_state = optimizer.init(params)
  return TrainState(step, params, opt_state, skipped, consecutive)


def abstract_state(
  init_fn: Callable[[Key], Params],
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> TrainState:
  """Returns a state of unboxed `ShapeDtypeStruct`s with shardings.

  Args:
    init_fn: key -> params, boxed with their axis names.
    optimizer: its moments are laid out like their parameters.
    mesh: where the state will live.
  """
  boxed = jax.eval_shape(
    lambda key: create(init_fn(key), optimizer), jax.random.key(0)
  )
  shardings = sharding.param_shardings(boxed, mesh)
  return sharding.with_shardings(sharding.unbox(boxed), shardings)


def accumulate_gradients(
  loss_fn: LossFn,
  params: Params,
  frozen: Mapping[str, PyTree],
  batch: PyTree,
  key: Key,
  num_microbatches: int = 1,
) -> tuple[Params, jax.Array, Metrics]:
  """Gradient of (summed loss / summed weight) over the whole batch.

  Losses and weights are summed over microbatches before the division, so the
  gradient does not depend on the number of microbatches.

  Args:
    loss_fn: (params, frozen, batch, key) -> (summed loss, (weight, metrics)).
    params: differentiated.
    frozen: other trees that the loss reads.
    batch: pytree of arrays, each cut into microbatches along its first axis.
    key: split into one key per microbatch (dropout).
    num_microbatches: must divide the batch.

  Returns:
    (gradients, mean loss, metrics as (sum, count)).

  Raises:
    ValueError: `num_microbatches` does not divide the batch.
  """
  for size in {x.shape[0] for x in jax.tree.leaves(batch)}:
    if size % num_microbatches:
      raise ValueError(
        f'{num_microbatches} microbatches do not divide a batch of {size}'
      )
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

  def sums(batch, key):
    (loss, (weight, metrics)), grads = grad_fn(params, frozen, batch, key)
    return grads, loss, weight, metrics

  batch = sharding.constrain_rows(batch)
  if num_microbatches == 1:
    total = sums(batch, key)
  else:
    micro = jax.tree.map(
      lambda x: x.reshape(num_microbatches, -1, *x.shape[1:]), batch
    )
    # So that every microbatch uses all devices.
    micro = sharding.constrain_rows(micro, axis=1)
    keys = jax.random.split(key, num_microbatches)

    def add(total, inputs):
      return jax.tree.map(jnp.add, total, sums(*inputs)), None

    shapes = jax.eval_shape(sums, jax.tree.map(lambda x: x[0], micro), keys[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (micro, keys))
  grads, loss, weight, metrics = total
  weight = jnp.maximum(weight, 1.0)
  grads = jax.tree.map(lambda g: g / weight, grads)
  return grads, loss / weight, metrics


def apply_gradients(
  state: TrainState,
  grads: Params,
  optimizer: optax.GradientTransformation,
  loss: Float[Array, ''],
) -> tuple[TrainState, Metrics]:
  """One optimizer step, unless the loss or a gradient is not finite.

  A skipped step is counted and leaves params and optimizer state unchanged. A
  gradient whose squared norm overflows float32 counts as not finite.

  Returns:
    The new state, and the metrics `optimizer/gradient_norm` (before clipping;
    count 0 when skipped) and `optimizer/skipped`.
  """
  grad_norm = optax.tree.norm(grads)
  is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)

  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)

  def keep_if_finite(new, old):
    return jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), new, old)

  skipped = 1 - is_finite.astype(jnp.int32)
  state = TrainState(
    step=state.step + 1,
    params=keep_if_finite(params, state.params),
    opt_state=keep_if_finite(opt_state, state.opt_state),
    num_skipped=state.num_skipped + skipped,
    num_consecutive_skipped=(state.num_consecutive_skipped + 1) * skipped,
  )
  skipped = skipped.astype(jnp.float32)
  return state, {
    'optimizer/gradient_norm': (
      jnp.where(is_finite, grad_norm, 0.0),
      1.0 - skipped,
    ),
    'optimizer/skipped': (skipped, jnp.ones((), jnp.float32)),
  }


def check_skips(
  state: TrainState, limit: int, name: str, workdir: epath.PathLike
) -> None:
  """Warns about skipped updates; waits until the state is computed.

  Raises:
    NonFiniteError: there were `limit` or more in a row.
  """
  counts = jax.device_get(
    (state.step, state.num_skipped, state.num_consecutive_skipped)
  )
  step, num_skipped, consecutive = (int(count) for count in counts)
  if consecutive >= limit:
    raise NonFiniteError(
      f'{name}: loss or gradients were not finite in {consecutive} updates in '
      f'a row up to step {step} (limit {limit}; {num_skipped} skipped in all). '
      'Lower the learning rate or max_grad_norm, or look at the batches there. '
      f'To start the stage again with another config, delete {workdir}.'
    )
  if consecutive:
    warnings.warn(
      f'{name}: update skipped at step {step}, {consecutive} in a row '
      f'({num_skipped} in all): loss or gradients were not finite',
      stacklevel=1,
    )


def ema_update(ema: Params, params: Params, decay: float) -> Params:
  """ema <- decay * ema + (1 - decay) * params, in float32 (paper C.4)."""
  return jax.tree.map(
    lambda e, p: (
      decay * e.astype(jnp.float32) + (1.0 - decay) * p.astype(jnp.float32)
    ),
    ema,
    params,
  )
