"""One gradient step for any supervised loss: pretraining, SFT, reward model."""

from collections.abc import Callable, Mapping

import optax

from instruct_jax import lora, masked
from instruct_jax.infra import train_state
from instruct_jax.types import (
  Key,
  LogprobsFn,
  LossFn,
  Metrics,
  PyTree,
  TextBatch,
)


def make_text_loss(logprobs_fn: LogprobsFn, dropout: bool = False) -> LossFn:
  """Negative log-likelihood of `loss_mask` tokens, nats, as a `LossFn`.

  Pretraining, demonstrations and the ptx part of PPO-ptx all use this one.

  Args:
    logprobs_fn: of the policy.
    dropout: whether the policy drops, at the rate of its config.
  """

  def loss_fn(params, frozen, batch: TextBatch, key):
    params = lora.join(params, frozen.get('policy'))
    logprobs, _ = logprobs_fn(
      params, batch.tokens, batch.segments, None, key if dropout else None
    )
    summed, count = masked.metric(-logprobs, batch.loss_mask)
    return summed, (count, {'nll': (summed, count)})

  return loss_fn


def make_update(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  num_microbatches: int = 1,
) -> Callable[..., tuple[train_state.TrainState, Metrics]]:
  """Makes one optimizer step: (state, frozen, batch, key) -> (state, metrics).

  It is skipped in full when it would not be finite.

  Args:
    loss_fn: what is optimised.
    optimizer: of the state.
    num_microbatches: gradient accumulation within a batch.
  """

  def update(
    state: train_state.TrainState,
    frozen: Mapping[str, PyTree],
    batch: PyTree,
    key: Key,
  ):
    grads, loss, metrics = train_state.accumulate_gradients(
      loss_fn, state.params, frozen, batch, key, num_microbatches
    )
    state, grad_metrics = train_state.apply_gradients(
      state, grads, optimizer, loss
    )
    return state, {**metrics, **grad_metrics, 'loss': masked.scalar(loss)}

  return update
