"""PPO and PPO-ptx (paper 3.5, C.4): from a scored rollout to new weights.

  rollout + scores + log-probabilities -> make_ppo_batch -> ppo_update

The models arrive as functions. `ptx_coef = 0` is PPO: the pretraining branch
is then not part of the program at all.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from instruct_jax import advantages, losses, masked, rewards
from instruct_jax.infra import sharding, train_state
from instruct_jax.types import (
  Key,
  LogprobsFn,
  LossFn,
  Metrics,
  PackedLogprobsFn,
  PackedPPOBatch,
  Params,
  PPOBatch,
  Rollout,
  ScalarsFn,
  TextBatch,
)


@dataclasses.dataclass(frozen=True)
class PPOConfig:
  """Numbers of the method; defaults are the paper's, or 13.4's gap-fillers.

  Attributes:
    discount: gamma of the returns; the paper does not discount.
    gae_lambda: Stiennon et al. B.1.
    clip: policy ratio clip (C.4).
    value_clip: Ziegler et al.'s code; reward units.
    whiten_advantages: over the whole batch's response tokens.
    missing_end_score: score of a response that never ended, or None.
    ptx_coef: gamma of equation 2; 0 is PPO without pretraining gradients.
    num_minibatches, num_epochs: 8 and 1 (C.4).
    num_microbatches: gradient accumulation within a minibatch.
    ema_decay: of the policy weights (C.4).
    ema_every: 'update' or 'iteration'; the paper does not say which.
  """

  discount: float = 1.0
  gae_lambda: float = 0.95
  clip: float = 0.2
  value_clip: float = 0.2
  whiten_advantages: bool = True
  missing_end_score: float | None = None
  ptx_coef: float = 27.8
  num_minibatches: int = 8
  num_epochs: int = 1
  num_microbatches: int = 1
  ema_decay: float = 0.992
  ema_every: str = 'update'

  def __post_init__(self):
    if self.ema_every not in ('update', 'iteration'):
      raise ValueError(
        f"ema_every must be 'update' or 'iteration': {self.ema_every!r}"
      )
    for name in ('num_minibatches', 'num_epochs', 'num_microbatches'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be at least 1: {getattr(self, name)}')
    for name in ('clip', 'value_clip'):
      if not getattr(self, name) > 0:
        raise ValueError(f'{name} must be positive: {getattr(self, name)}')
    if self.ptx_coef < 0:
      raise ValueError(f'ptx_coef must not be negative: {self.ptx_coef}')


@flax.struct.dataclass
class PPOState:
  """All that a PPO run carries from one iteration to the next."""

  policy: train_state.TrainState
  value: train_state.TrainState
  ema: Params
  kl: rewards.KLState


def make_ppo_batch(
  rollout: Rollout,
  scores: Float[Array, 'B'],
  old_logprobs: Float[Array, 'B R'],
  ref_logprobs: Float[Array, 'B R'],
  old_values: Float[Array, 'B R'],
  kl_coef: Float[Array, ''],
  config: PPOConfig,
) -> tuple[PPOBatch, Metrics]:
  """Rewards, advantages and returns; everything the update holds fixed.

  Args:
    rollout: as sampled.
    scores: reward model at the last real token, mean 0 on demonstrations.
    old_logprobs: of the policy that sampled, from the training graph.
    ref_logprobs: of the KL reference, the RL-initialisation model.
    old_values: value model at the positions that predict each response token.
    kl_coef: beta.
    config: the method's numbers.

  Returns:
    The batch, and metrics over response tokens or responses (`objective/*`).
  """
  mask = rollout.response_mask
  scores = scores.astype(jnp.float32)
  paid_scores = rewards.penalise_missing_end(
    scores, rollout.ended, config.missing_end_score
  )
  token_rewards = rewards.token_rewards(
    paid_scores, old_logprobs, ref_logprobs, mask, kl_coef
  )
  raw_advantages, returns = advantages.gae(
    token_rewards, old_values, mask, config.discount, config.gae_lambda
  )
  if config.whiten_advantages:
    final_advantages = masked.whiten(raw_advantages, mask)
  else:
    final_advantages = raw_advantages
  kl, kl_k3 = rewards.kl_estimates(old_logprobs, ref_logprobs, mask)
  responses = jnp.any(mask, axis=1)
  lengths = jnp.sum(mask, axis=1, dtype=jnp.float32)
  residual = masked.variance(returns - old_values, mask)
  explained = 1.0 - residual / (masked.variance(returns, mask) + 1e-8)
  metrics = {
    'objective/score': masked.metric(scores, responses),
    'objective/score_squared': masked.metric(jnp.square(scores), responses),
    'objective/reward': masked.metric(
      jnp.sum(token_rewards, axis=1), responses
    ),
    'objective/kl': masked.metric(kl, responses),
    'objective/kl_k3': masked.metric(kl_k3, responses),
    'objective/kl_coef': masked.scalar(kl_coef),
    'objective/length': masked.metric(lengths, responses),
    'objective/ended': masked.metric(
      rollout.ended.astype(jnp.float32), responses
    ),
    'ppo/advantage': masked.metric(raw_advantages, mask),
    'ppo/return': masked.metric(returns, mask),
    'ppo/val/var_explained': masked.scalar(explained),
  }
  batch = PPOBatch(
    tokens=rollout.tokens,
    mask=rollout.mask,
    response_mask=mask,
    old_logprobs=jnp.where(mask, old_logprobs, 0.0),
    old_values=jnp.where(mask, old_values, 0.0),
    advantages=final_advantages,
    returns=returns,
  )
  return batch, metrics


def response_values(scalars: Array, num_response: int) -> Array:
  """V(prompt, y_<t) for every response token t: columns P-1 .. T-2."""
  return scalars[:, -num_response - 1 : -1]


def make_policy_loss(logprobs_fn: LogprobsFn, config: PPOConfig) -> LossFn:
  """Clipped policy loss summed over response tokens, as a `LossFn`."""

  def loss_fn(params, batch: PPOBatch, key):
    del key  # No dropout in PPO.
    mask = batch.response_mask
    return _policy_loss(
      *logprobs_fn(params, batch.tokens, batch.mask, mask.shape[1]),
      batch,
      config,
    )

  return loss_fn


def make_packed_policy_loss(
  logprobs_fn: PackedLogprobsFn, config: PPOConfig
) -> LossFn:
  """The same loss of a `PackedPPOBatch`."""

  def loss_fn(params, batch: PackedPPOBatch, key):
    del key
    return _policy_loss(
      *logprobs_fn(
        params, batch.tokens, batch.segments, batch.where, batch.targets
      ),
      batch,
      config,
    )

  return loss_fn


def _policy_loss(logprobs, entropy, batch, config):
  mask = batch.response_mask
  # Padding must not reach exp(): its old log-probability is 0.
  logprobs = jnp.where(mask, logprobs, batch.old_logprobs)
  loss, ratio, clipped = losses.clipped_policy_loss(
    logprobs, batch.old_logprobs, batch.advantages, config.clip
  )
  log_ratio = logprobs - batch.old_logprobs
  metrics = {
    'ppo/loss/policy': masked.metric(loss, mask),
    'ppo/policy/clipfrac': masked.metric(clipped.astype(jnp.float32), mask),
    'ppo/policy/ratio': masked.metric(ratio, mask),
    'ppo/policy/approxkl': masked.metric(ratio - 1.0 - log_ratio, mask),
    'ppo/policy/entropy': masked.metric(entropy, mask),
  }
  weight = jnp.sum(mask, dtype=jnp.float32)
  return masked.total(loss, mask), (weight, metrics)


def make_value_loss(values_fn: ScalarsFn, config: PPOConfig) -> LossFn:
  """Clipped value loss summed over response tokens, as a `LossFn`."""

  def loss_fn(params, batch: PPOBatch, key):
    del key
    values = response_values(
      values_fn(params, batch.tokens, batch.mask), batch.response_mask.shape[1]
    )
    return _value_loss(values, batch, config)

  return loss_fn


def make_packed_value_loss(values_fn: ScalarsFn, config: PPOConfig) -> LossFn:
  """The same loss of a `PackedPPOBatch`.

  Args:
    values_fn: takes segments in the place of the mask.
    config: the method's numbers.
  """

  def loss_fn(params, batch: PackedPPOBatch, key):
    del key
    scalars = values_fn(params, batch.tokens, batch.segments)
    values = jnp.take_along_axis(scalars, batch.where, axis=1)
    return _value_loss(values, batch, config)

  return loss_fn


def _value_loss(values, batch, config):
  mask = batch.response_mask
  values = jnp.where(mask, values, batch.old_values)
  loss, clipped = losses.clipped_value_loss(
    values, batch.old_values, batch.returns, config.value_clip
  )
  metrics = {
    'ppo/loss/value': masked.metric(loss, mask),
    'ppo/val/clipfrac': masked.metric(clipped.astype(jnp.float32), mask),
    'ppo/val/value': masked.metric(values, mask),
  }
  weight = jnp.sum(mask, dtype=jnp.float32)
  return masked.total(loss, mask), (weight, metrics)


def ppo_update(
  state: PPOState,
  batch: PPOBatch | PackedPPOBatch,
  ptx_batch: TextBatch | None,
  key: Key,
  *,
  policy_loss_fn: LossFn,
  value_loss_fn: LossFn,
  ptx_loss_fn: LossFn | None,
  policy_optimizer: optax.GradientTransformation,
  value_optimizer: optax.GradientTransformation,
  config: PPOConfig,
) -> tuple[PPOState, Metrics]:
  """Inner epochs over minibatches; policy, value and EMA after each.

  Every minibatch makes ONE policy gradient,

    g = grad(PPO loss) + gamma grad(mean pretraining NLL),

  before clipping and Adam (C.4). A second Adam step for the pretraining part
  would cancel gamma, Adam being blind to scale.

  Args:
    state: policy, value, EMA, KL coefficient.
    batch: B episodes; every inner epoch takes them in a fresh order. A packed
      batch has that order already: row i * num_steps + s is of step s.
    ptx_batch: num_epochs * 8 * B pretraining rows in the paper; any number
      that divides into num_epochs * num_minibatches. None when ptx_coef is 0.
    key: of this iteration.
    policy_loss_fn, value_loss_fn, ptx_loss_fn: see the makers above.
    policy_optimizer, value_optimizer: separate, with separate schedules.
    config: the method's numbers.

  Returns:
    The new state and metrics summed over minibatches. `first/*` are those of
    the very first minibatch, where the ratio must be 1.

  Raises:
    ValueError: sizes that do not divide, or a missing ptx batch.
  """
  keys = dict(zip(('order', 'loss'), jax.random.split(key), strict=True))
  num_rows = batch.tokens.shape[0]
  num_steps = config.num_epochs * config.num_minibatches
  is_packed = isinstance(batch, PackedPPOBatch)
  if num_rows % (num_steps if is_packed else config.num_minibatches):
    raise ValueError(
      f'{config.num_minibatches} minibatches do not divide a batch of '
      f'{num_rows}'
    )
  use_ptx = config.ptx_coef > 0
  if use_ptx and (ptx_batch is None or ptx_loss_fn is None):
    raise ValueError('ptx_coef > 0 needs pretraining rows and their loss')
  inputs = {'key': jax.random.split(keys['loss'], num_steps)}
  if is_packed:
    inputs['packed'] = jax.tree.map(
      lambda x: jnp.swapaxes(x.reshape(-1, num_steps, x.shape[1]), 0, 1), batch
    )
  else:
    inputs['rows'] = jax.vmap(lambda k: jax.random.permutation(k, num_rows))(
      jax.random.split(keys['order'], config.num_epochs)
    ).reshape(num_steps, num_rows // config.num_minibatches)
  if use_ptx:
    num_ptx = ptx_batch.tokens.shape[0]
    if num_ptx % num_steps:
      raise ValueError(
        f'{num_ptx} pretraining rows do not divide into {num_steps} minibatches'
      )
    inputs['ptx'] = sharding.constrain_rows(
      jax.tree.map(
        lambda x: x.reshape(num_steps, num_ptx // num_steps, *x.shape[1:]),
        ptx_batch,
      ),
      axis=1,
    )

  def step(state: PPOState, inputs):
    if is_packed:
      minibatch = inputs['packed']
    else:
      minibatch = jax.tree.map(lambda x: x[inputs['rows']], batch)
    policy_key, value_key, ptx_key = jax.random.split(inputs['key'], 3)
    grads, loss, metrics = train_state.accumulate_gradients(
      policy_loss_fn,
      state.policy.params,
      minibatch,
      policy_key,
      config.num_microbatches,
    )
    metrics = dict(metrics)
    if use_ptx:
      ptx_grads, ptx_loss, ptx_metrics = train_state.accumulate_gradients(
        ptx_loss_fn,
        state.policy.params,
        inputs['ptx'],
        ptx_key,
        config.num_microbatches,
      )
      metrics['ptx/loss'] = ptx_metrics['nll']
      metrics['ppo/policy/ppo_gradient_norm'] = masked.scalar(
        optax.tree.norm(grads)
      )
      metrics['ptx/gradient_norm'] = masked.scalar(
        config.ptx_coef * optax.tree.norm(ptx_grads)
      )
      grads = jax.tree.map(
        lambda g, p: g + config.ptx_coef * p, grads, ptx_grads
      )
      loss = loss + config.ptx_coef * ptx_loss
    policy, policy_metrics = train_state.apply_gradients(
      state.policy, grads, policy_optimizer, loss
    )
    value_grads, value_loss, value_metrics = train_state.accumulate_gradients(
      value_loss_fn,
      state.value.params,
      minibatch,
      value_key,
      config.num_microbatches,
    )
    value, value_step_metrics = train_state.apply_gradients(
      state.value, value_grads, value_optimizer, value_loss
    )
    ema = state.ema
    if config.ema_every == 'update':
      ema = train_state.ema_update(ema, policy.params, config.ema_decay)
    metrics.update(value_metrics)
    for name, value_of in policy_metrics.items():
      metrics[f'policy/{name}'] = value_of
    for name, value_of in value_step_metrics.items():
      metrics[f'value/{name}'] = value_of
    state = state.replace(policy=policy, value=value, ema=ema)
    return state, metrics

  state, stacked = jax.lax.scan(step, state, inputs)
  if config.ema_every == 'iteration':
    state = state.replace(
      ema=train_state.ema_update(
        state.ema, state.policy.params, config.ema_decay
      )
    )
  metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), stacked)
  for name in ('ppo/policy/ratio', 'ppo/policy/clipfrac'):
    metrics[f'first/{name}'] = jax.tree.map(lambda x: x[0], stacked[name])
  return state, metrics
