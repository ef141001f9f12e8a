"""One gradient step for any supervised loss: pretraining, SFT, reward model."""

import optax

from instruct_jax import masked
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
    del frozen
    logprobs, _ = logprobs_fn(
      params, batch.tokens, batch.segments, None, key if dropout else None
    )
    summed, count = masked.metric(-logprobs, batch.loss_mask)
    return summed, (count, {'nll': (summed, count)})

  return loss_fn


def update(
  state: train_state.TrainState,
  batch: PyTree,
  key: Key,
  *,
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  num_microbatches: int = 1,
  frozen: PyTree = None,
) -> tuple[train_state.TrainState, Metrics]:
  """One optimizer step; skipped in full when it would not be finite."""
  grads, loss, metrics = train_state.accumulate_gradients(
    loss_fn, state.params, batch, key, num_microbatches, frozen
  )
  state, grad_metrics = train_state.apply_gradients(
    state, grads, optimizer, loss
  )
  return state, {**metrics, **grad_metrics, 'loss': masked.scalar(loss)}
