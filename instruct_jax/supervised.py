"""Optimizer steps of pretraining, SFT, reward models and DPO."""

from collections.abc import Callable, Mapping

import optax
from ml_collections import ConfigDict

from instruct_jax import lora, masked
from instruct_jax.infra import optimizer, train_state
from instruct_jax.types import (
  Key,
  LogprobsFn,
  LossFn,
  Metrics,
  PyTree,
  TextBatch,
)


def check_microbatches(config: ConfigDict) -> None:
  """Raises ValueError if `num_microbatches` does not divide `batch_size`."""
  if config.batch_size % config.num_microbatches:
    raise ValueError(
      f'num_microbatches {config.num_microbatches} does not divide batch_size '
      f'{config.batch_size}'
    )


def make_adam(
  config: ConfigDict, num_steps: int, num_warmup: int = 0
) -> optax.GradientTransformation:
  """Adam with a cosine schedule to 10 % of `learning_rate` (C.1, C.2)."""
  return optimizer.make_adam(
    optimizer.cosine_to_fraction(
      config.learning_rate, num_steps, 0.1, num_warmup
    ),
    b1=config.adam_b1,
    b2=config.adam_b2,
    eps=config.adam_eps,
    max_grad_norm=config.max_grad_norm,
  )


def make_text_loss(logprobs_fn: LogprobsFn, dropout: bool = False) -> LossFn:
  """Makes the negative log-likelihood of `loss_mask` tokens, nats: a `LossFn`.

  Args:
    dropout: whether to use dropout, at the rate of the policy's config.
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
  tx: optax.GradientTransformation,
  num_microbatches: int = 1,
) -> Callable[..., tuple[train_state.TrainState, Metrics]]:
  """Makes one optimizer step: (state, frozen, batch, key) -> (state, metrics).

  A step with non-finite gradients changes nothing.

  Args:
    num_microbatches: gradient-accumulation steps per batch.
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
    state, grad_metrics = train_state.apply_gradients(state, grads, tx, loss)
    return state, {**metrics, **grad_metrics, 'loss': masked.scalar(loss)}

  return update
