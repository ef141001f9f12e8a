"""One gradient step for any supervised loss: pretraining, SFT, reward model."""

from collections.abc import Callable

import jax
import optax

from instruct_jax import masked
from instruct_jax.infra import train_state
from instruct_jax.types import (
  Key,
  LossFn,
  Metrics,
  Params,
  PyTree,
  TextBatch,
)


def make_text_loss(
  text_logprobs_fn: Callable[[Params, jax.Array, jax.Array, Key], jax.Array],
) -> LossFn:
  """Negative log-likelihood of `loss_mask` tokens, nats, as a `LossFn`.

  Pretraining, demonstrations and the ptx part of PPO-ptx all use this one.

  Args:
    text_logprobs_fn: (params, tokens, segments, key) -> logprobs [B, T].
  """

  def loss_fn(params, batch: TextBatch, key):
    logprobs = text_logprobs_fn(params, batch.tokens, batch.segments, key)
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
) -> tuple[train_state.TrainState, Metrics]:
  """One optimizer step; skipped in full when it would not be finite."""
  grads, loss, metrics = train_state.accumulate_gradients(
    loss_fn, state.params, batch, key, num_microbatches
  )
  state, grad_metrics = train_state.apply_gradients(
    state, grads, optimizer, loss
  )
  return state, {**metrics, **grad_metrics, 'loss': masked.scalar(loss)}
