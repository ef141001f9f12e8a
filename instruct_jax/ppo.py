"""PPO and PPO-ptx (paper 3.5, C.4): from a scored rollout to new weights.

  rollout, scores -> penalise -> train

`penalise` fixes all that the update holds fixed: log-probabilities of the old
policy and of the reference, the KL penalty, advantages. `train` takes minibatch
steps on a dict of losses. A value model is optional: without one there are no
values, no value loss, and the advantage function needs none.

The models arrive as functions. `ptx_coef = 0` is PPO: the pretraining branch
is then not part of the program at all.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from instruct_jax import advantages, lora, losses, masked, packing, rewards
from instruct_jax.infra import sharding, slices, train_state
from instruct_jax.types import (
  Key,
  LogprobsFn,
  LossFn,
  Metrics,
  Params,
  PyTree,
  RLBatch,
  Rollout,
  ScalarsFn,
  TextBatch,
)

# (token rewards [B, R], mask [B, R], values [B, R] or None) -> advantages and
# returns [B, R]; returns are None where there are no values. One that carries a
# state over (a running mean) adds fields to `RLState` and is made from them
# inside the jitted `penalise` of its experiment.
AdvantageFn = Callable[
  [jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array | None]
]


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
    kl_in: 'reward' subtracts the KL penalty from rewards (equation 2); 'loss'
      adds it to the policy's loss.
    kl_estimator: of the penalty; see `rewards.kl_estimator`.
    kl_target: wanted KL, nats a response; None keeps beta fixed.
    kl_horizon: episodes; see `rewards.update_kl_coef`.
    ptx_coef: gamma of equation 2; 0 is PPO without pretraining gradients.
    num_minibatches, num_epochs: 8 and 1 (C.4).
    num_microbatches: gradient accumulation within a minibatch.
    num_slices: parts in which a rollout is read.
    sampler_tolerance: nats; the sampler's log-probabilities are the old ones
      where those of a minibatch agree with the training graph's to this. 0
      always takes the graph's.
    ema_decay: of the policy weights (C.4).
    ema_every: 'update' or 'iteration'; the paper does not say which.
  """

  discount: float = 1.0
  gae_lambda: float = 0.95
  clip: float = 0.2
  value_clip: float = 0.2
  whiten_advantages: bool = True
  missing_end_score: float | None = None
  kl_in: str = 'reward'
  kl_estimator: str = 'k1'
  kl_target: float | None = None
  kl_horizon: int = 10_000
  ptx_coef: float = 27.8
  num_minibatches: int = 8
  num_epochs: int = 1
  num_microbatches: int = 1
  num_slices: int = 1
  sampler_tolerance: float = 1e-3
  ema_decay: float = 0.992
  ema_every: str = 'update'

  def __post_init__(self):
    for name, known in (
      ('ema_every', ('update', 'iteration')),
      ('kl_in', ('reward', 'loss')),
      ('kl_estimator', rewards.KL_ESTIMATORS),
    ):
      if getattr(self, name) not in known:
        raise ValueError(
          f'{name} must be one of {", ".join(map(repr, known))}: '
          f'{getattr(self, name)!r}'
        )
    for name in (
      'num_minibatches',
      'num_epochs',
      'num_microbatches',
      'num_slices',
    ):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be at least 1: {getattr(self, name)}')
    for name in ('clip', 'value_clip'):
      if not getattr(self, name) > 0:
        raise ValueError(f'{name} must be positive: {getattr(self, name)}')
    if self.kl_target is not None and not self.kl_target > 0:
      raise ValueError(
        f'kl_target must be positive, or None for a fixed kl_coef: '
        f'{self.kl_target}'
      )
    if self.kl_horizon < 1:
      raise ValueError(f'kl_horizon must be at least 1: {self.kl_horizon}')
    if not 0 <= self.ema_decay < 1:
      raise ValueError(f'ema_decay must be in [0, 1): {self.ema_decay}')
    for name in ('ptx_coef', 'sampler_tolerance'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name} must not be negative: {getattr(self, name)}')


@flax.struct.dataclass
class RLState:
  """All that an RL run carries from one iteration to the next.

  Attributes:
    policy: under training.
    value: its critic, or None.
    ema: moving average of the policy's weights.
    kl: the KL coefficient.
  """

  policy: train_state.TrainState
  value: train_state.TrainState | None
  ema: Params
  kl: rewards.KLState


# --- Penalise -----------------------------------------------------------------


def gae_advantages(config: PPOConfig) -> AdvantageFn:
  """`advantages.gae` on a value model, whitened if so configured."""

  def advantage_fn(token_rewards, mask, values):
    found, returns = advantages.gae(
      token_rewards, values, mask, config.discount, config.gae_lambda
    )
    if config.whiten_advantages:
      found = masked.whiten(found, mask)
    return found, returns

  return advantage_fn


def group_advantages(
  baseline_fn: Callable[[jax.Array, int], jax.Array], num_samples: int
) -> AdvantageFn:
  """One advantage a response, for all of its tokens; no value model.

  The return of a response is the sum of its rewards. The loss averages over
  tokens, so a response weighs as much as it has tokens, which is what the
  gradient of its log-probability asks for.

  Args:
    baseline_fn: (returns [B], n) -> advantages [B], say
      `advantages.leave_one_out`.
    num_samples: n responses a prompt, neighbours in the rollout.
  """

  def advantage_fn(token_rewards, mask, values):
    del values
    found = baseline_fn(jnp.sum(token_rewards, axis=1), num_samples)
    return jnp.where(mask, found[:, None], 0.0), None

  return advantage_fn


def make_penalise(
  logprobs_fn: LogprobsFn,
  values_fn: ScalarsFn | None,
  advantage_fn: AdvantageFn,
  config: PPOConfig,
) -> Callable[..., tuple[RLBatch, rewards.KLState, Metrics]]:
  """Makes what turns a scored rollout into a batch to learn from.

  Args:
    logprobs_fn: of the policy and of the reference, at the sampling
      temperature.
    values_fn: of the value model; None without one.
    advantage_fn: from KL-penalised rewards to advantages.
    config: the method's numbers.

  Returns:
    (state, frozen, rollout, layout, scores [B]) -> (batch, the KL coefficient
    of the next iteration, metrics over response tokens or responses). Frozen
    holds the parameters of the 'reference'; scores have mean 0 on
    demonstrations.
  """

  def penalise(
    state: RLState,
    frozen: Mapping[str, PyTree],
    rollout: Rollout,
    layout: packing.Layout,
    scores: Float[Array, 'B'],
  ):
    episodes = packing.pack_episodes(rollout, layout)
    rows = packing.first_epoch(episodes, layout)
    policy = lora.join(state.policy.params, frozen.get('policy'))
    # Rows come in multiples of minibatches, and not always of slices.
    num_slices = math.gcd(config.num_slices, rows.tokens.shape[0])

    def read(rows):
      where = rows.tokens, rows.segments, rows.where
      found = [logprobs_fn(frozen['reference'], *where)[0]]
      if values_fn is not None:
        value = lora.join(state.value.params, frozen.get('value'))
        values = values_fn(value, rows.tokens, rows.segments)
        found.append(jnp.take_along_axis(values, rows.where, axis=1))
      return found

    ref_logprobs, *values = slices.in_slices(read, rows, num_slices)
    old_logprobs, metrics = _old_logprobs(
      lambda rows: logprobs_fn(policy, rows.tokens, rows.segments, rows.where)[
        0
      ],
      rows,
      packing.first_epoch(
        packing.pack_responses(rollout.logprobs, layout), layout
      ),
      num_slices,
      config,
    )

    def unpack(x):
      return packing.unpack_responses(x, layout, rollout.response_mask)

    old_logprobs, ref_logprobs, *values = map(
      unpack, (old_logprobs, ref_logprobs, *values)
    )
    found, more = penalised(
      rollout,
      scores,
      old_logprobs,
      ref_logprobs,
      values[0] if values else None,
      state.kl.coef,
      advantage_fn,
      config,
    )
    kl_sum, kl_count = more['objective/kl']
    kl = rewards.update_kl_coef(
      state.kl,
      kl_sum / kl_count,
      rollout.tokens.shape[0],
      config.kl_target,
      config.kl_horizon,
    )
    real = layout.segments > 0
    metrics |= more | {
      'packing/fill': masked.metric(real.astype(jnp.float32), real | True),
      'packing/row_length': masked.scalar(jnp.asarray(real.shape[1])),
      'packing/row_responses': masked.scalar(
        jnp.asarray(layout.where.shape[1])
      ),
    }
    batch = RLBatch(
      episodes=episodes,
      **{name: packing.pack_responses(x, layout) for name, x in found.items()},
    )
    return batch, kl, metrics

  return penalise


def _old_logprobs(read, rows, sampler, num_slices, config):
  """The sampler's log-probabilities, where those of every so many rows agree
  with the training graph's; else the graph's of all rows. And how far they
  agree."""
  compares = config.sampler_tolerance > 0

  def read_all():
    return slices.in_slices(read, rows, num_slices)

  def sample_of(x):
    return x[:: config.num_minibatches] if compares else x

  graph = read(jax.tree.map(sample_of, rows)) if compares else read_all()
  mask = sample_of(rows.response_mask)
  difference = jnp.abs(graph - sample_of(sampler))
  largest = jnp.max(jnp.where(mask, difference, 0.0))
  agrees = compares & (largest <= config.sampler_tolerance)
  if compares:
    graph = jax.lax.cond(agrees, lambda: sampler, read_all)
  return graph, {
    'objective/sampler_difference': masked.metric(difference, mask),
    'objective/sampler_difference_max': masked.scalar(largest),
    'objective/sampler_trusted': masked.scalar(agrees.astype(jnp.float32)),
  }


def penalised(
  rollout: Rollout,
  scores: Float[Array, 'B'],
  old_logprobs: Float[Array, 'B R'],
  ref_logprobs: Float[Array, 'B R'],
  old_values: Float[Array, 'B R'] | None,
  kl_coef: Float[Array, ''],
  advantage_fn: AdvantageFn,
  config: PPOConfig,
) -> tuple[dict[str, Float[Array, 'B R']], Metrics]:
  """Rewards, advantages and returns; the arithmetic of `make_penalise`.

  Args:
    rollout: as sampled.
    scores: of each response, mean 0 on demonstrations.
    old_logprobs: of the policy that sampled.
    ref_logprobs: of the KL reference, the RL-initialisation model.
    old_values: value model at the positions that predict each response token.
    kl_coef: beta.
    advantage_fn: see `AdvantageFn`.
    config: the method's numbers.

  Returns:
    Fields of `RLBatch`, 0 where masked, and metrics (`objective/*`).
  """
  mask = rollout.response_mask
  scores = scores.astype(jnp.float32)
  paid_scores = rewards.penalise_missing_end(
    scores, rollout.ended, config.missing_end_score
  )
  token_rewards = rewards.token_rewards(
    paid_scores,
    old_logprobs,
    ref_logprobs,
    mask,
    kl_coef if config.kl_in == 'reward' else jnp.zeros_like(kl_coef),
    config.kl_estimator,
  )
  found, returns = advantage_fn(token_rewards, mask, old_values)
  for name, each in (('advantages', found), ('returns', returns)):
    # Another shape would be read as other tokens' numbers.
    if each is not None and each.shape != mask.shape:
      raise ValueError(
        f'the advantage function gave {name} of shape {each.shape}; one number '
        f'for each response token is needed, {mask.shape}'
      )
  kl, kl_k3 = rewards.kl_estimates(old_logprobs, ref_logprobs, mask)
  responses = jnp.any(mask, axis=1)
  lengths = jnp.sum(mask, axis=1, dtype=jnp.float32)
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
  }
  fields = {
    'old_logprobs': jnp.where(mask, old_logprobs, 0.0),
    'ref_logprobs': jnp.where(mask, ref_logprobs, 0.0),
    'advantages': found,
  }
  if old_values is None:
    metrics['ppo/advantage'] = masked.metric(found, mask)
  else:
    # As they were before they were whitened.
    metrics['ppo/advantage'] = masked.metric(returns - old_values, mask)
    residual = masked.variance(returns - old_values, mask)
    explained = 1.0 - residual / (masked.variance(returns, mask) + 1e-8)
    metrics['ppo/return'] = masked.metric(returns, mask)
    metrics['ppo/val/var_explained'] = masked.scalar(explained)
    fields |= {
      'old_values': jnp.where(mask, old_values, 0.0),
      'returns': returns,
    }
  return fields, metrics


# --- Losses -------------------------------------------------------------------


def make_policy_loss(logprobs_fn: LogprobsFn, config: PPOConfig) -> LossFn:
  """Clipped policy loss summed over response tokens, as a `LossFn`.

  With `kl_in` 'loss' the KL penalty is added, times `frozen['kl_coef']`. On
  tokens of the policy itself the mean gradient of k2 is that of KL(pi || ref),
  and that of k3 is the gradient of KL(ref || pi). That of k1 would be 0, so k1
  is weighted by pi / pi_old, which gives it the gradient of KL(pi || ref), too.
  """

  def loss_fn(params, frozen, batch: RLBatch, key):
    del key  # No dropout in PPO.
    rows, mask = batch.episodes, batch.episodes.response_mask
    params = lora.join(params, frozen.get('policy'))
    logprobs, entropy = logprobs_fn(
      params, rows.tokens, rows.segments, rows.where
    )
    # Padding must not reach exp(): its old log-probability is 0.
    logprobs = jnp.where(mask, logprobs, batch.old_logprobs)
    loss, ratio, clipped = losses.clipped_policy_loss(
      logprobs, batch.old_logprobs, batch.advantages, config.clip
    )
    if config.kl_in == 'loss':
      penalty = rewards.kl_estimator(
        logprobs - batch.ref_logprobs, config.kl_estimator
      )
      if config.kl_estimator == 'k1':
        penalty = ratio * penalty
      loss = loss + frozen['kl_coef'] * penalty
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

  return loss_fn


def make_value_loss(values_fn: ScalarsFn, config: PPOConfig) -> LossFn:
  """Clipped value loss summed over response tokens, as a `LossFn`."""

  def loss_fn(params, frozen, batch: RLBatch, key):
    del key
    rows, mask = batch.episodes, batch.episodes.response_mask
    params = lora.join(params, frozen.get('value'))
    values = values_fn(params, rows.tokens, rows.segments)
    # V(prompt, y_<t) stands where token t is predicted.
    values = jnp.take_along_axis(values, rows.where, axis=1)
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

  return loss_fn


# --- Train --------------------------------------------------------------------


def make_train(
  loss_fns: Mapping[str, LossFn],
  optimizers: Mapping[str, optax.GradientTransformation],
  config: PPOConfig,
) -> Callable[..., tuple[RLState, Metrics]]:
  """Makes the update of one iteration.

  Inner epochs over minibatches; policy, value model and moving average after
  each. Every minibatch makes ONE policy gradient,

    g = grad(policy loss) + gamma grad(mean pretraining NLL),

  before clipping and Adam (C.4). A second Adam step for the pretraining part
  would cancel gamma, Adam being blind to scale.

  Args:
    loss_fns: of the 'policy'; of the 'value' model where there is one; of the
      pretraining text, 'ptx', where `ptx_coef` is not 0.
    optimizers: of the 'policy' and the 'value' model, with schedules of their
      own.
    config: the method's numbers.

  Returns:
    (state, frozen, batch, pretraining rows or None, KL coefficient of the next
    iteration, key) -> (new state, metrics summed over minibatches). `first/*`
    are those of the very first minibatch, where the ratio must be 1.
    Pretraining rows are 8 an episode and inner epoch in the paper; any number
    that divides into the steps.

  Raises:
    ValueError: a loss is missing; in the update, sizes that do not divide, or
      missing pretraining rows.
  """
  use_ptx = config.ptx_coef > 0
  missing = {'policy', *(('ptx',) if use_ptx else ())} - set(loss_fns)
  if missing:
    raise ValueError(f'no loss is given for {sorted(missing)}')
  unknown = set(loss_fns) - {'policy', 'value', 'ptx'}
  if unknown:
    raise ValueError(
      f'losses of {sorted(unknown)} belong to no model here; losses are of '
      "'policy', 'value' and 'ptx'; a further term is added within one of them"
    )

  def train(
    state: RLState,
    frozen: Mapping[str, PyTree],
    batch: RLBatch,
    ptx_batch: TextBatch | None,
    kl: rewards.KLState,
    key: Key,
  ):
    frozen = {**frozen, 'kl_coef': state.kl.coef}
    num_steps = config.num_epochs * config.num_minibatches
    inputs: dict[str, Any] = {
      'key': jax.random.split(key, num_steps),
      'rows': _by_step(batch, num_steps, 'rows of episodes'),
    }
    if use_ptx:
      if ptx_batch is None:
        raise ValueError('ptx_coef > 0 needs pretraining rows')
      inputs['ptx'] = _consecutive(ptx_batch, num_steps)

    def step(state: RLState, inputs):
      state, metrics = _step(
        state, frozen, inputs, loss_fns, optimizers, config
      )
      if config.ema_every == 'update':
        state = _averaged(state, config)
      return state, metrics

    state, stacked = jax.lax.scan(step, state, inputs)
    if config.ema_every == 'iteration':
      state = _averaged(state, config)
    metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), stacked)
    for name in FIRST_METRICS:
      if name in stacked:
        metrics[f'first/{name}'] = jax.tree.map(lambda x: x[0], stacked[name])
    return state.replace(kl=kl), metrics

  return train


# Of the very first minibatch: the policy is then the old one.
FIRST_METRICS = tuple(
  f'ppo/policy/{name}' for name in ('ratio', 'clipfrac', 'approxkl')
)


def _by_step(batch, num_steps, what):
  """Row i * num_steps + s is row i of step s: rows that are cut over devices
  stay where they are."""
  num_rows = jax.tree.leaves(batch)[0].shape[0]
  if num_rows % num_steps:
    raise ValueError(f'{num_rows} {what} do not divide into {num_steps} steps')
  return jax.tree.map(
    lambda x: jnp.swapaxes(x.reshape(-1, num_steps, *x.shape[1:]), 0, 1), batch
  )


def _consecutive(ptx_batch, num_steps):
  num_rows = ptx_batch.tokens.shape[0]
  if num_rows % num_steps:
    raise ValueError(
      f'{num_rows} pretraining rows do not divide into {num_steps} minibatches'
    )
  return sharding.constrain_rows(
    jax.tree.map(
      lambda x: x.reshape(num_steps, num_rows // num_steps, *x.shape[1:]),
      ptx_batch,
    ),
    axis=1,
  )


def _averaged(state, config):
  ema = train_state.ema_update(state.ema, state.policy.params, config.ema_decay)
  return state.replace(ema=ema)


def _step(state, frozen, inputs, loss_fns, optimizers, config):
  """One minibatch: a step of the policy, and one of the value model."""
  keys = dict(
    zip(
      ('policy', 'value', 'ptx'),
      jax.random.split(inputs['key'], 3),
      strict=True,
    )
  )

  def gradients(name, params, rows):
    return train_state.accumulate_gradients(
      loss_fns[name],
      params,
      frozen,
      rows,
      keys[name],
      config.num_microbatches,
    )

  grads, loss, metrics = gradients(
    'policy', state.policy.params, inputs['rows']
  )
  metrics = dict(metrics)
  if config.ptx_coef > 0:
    ptx_grads, ptx_loss, ptx_metrics = gradients(
      'ptx', state.policy.params, inputs['ptx']
    )
    metrics['ptx/loss'] = ptx_metrics['nll']
    metrics['ppo/policy/ppo_gradient_norm'] = masked.scalar(
      optax.tree.norm(grads)
    )
    metrics['ptx/gradient_norm'] = masked.scalar(
      config.ptx_coef * optax.tree.norm(ptx_grads)
    )
    grads = jax.tree.map(lambda g, p: g + config.ptx_coef * p, grads, ptx_grads)
    loss = loss + config.ptx_coef * ptx_loss
  policy, policy_metrics = train_state.apply_gradients(
    state.policy, grads, optimizers['policy'], loss
  )
  metrics |= {f'policy/{name}': x for name, x in policy_metrics.items()}
  state = state.replace(policy=policy)
  if 'value' in loss_fns:
    grads, loss, more = gradients('value', state.value.params, inputs['rows'])
    value, value_metrics = train_state.apply_gradients(
      state.value, grads, optimizers['value'], loss
    )
    metrics |= more
    metrics |= {f'value/{name}': x for name, x in value_metrics.items()}
    state = state.replace(value=value)
  return state, metrics
