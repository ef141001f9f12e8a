"""PPO and PPO-ptx (paper 3.5, C.4): from a scored rollout to new weights.

  rollout, scores -> penalise -> train

`penalise` computes everything that stays fixed during the update:
log-probabilities of the old policy and of the reference, the KL penalty and
advantages. `train` takes minibatch steps on a dict of losses. Without a value
model there are no values and no value loss.

Models are passed in as functions. `ptx_coef = 0` is PPO: the program then has
no pretraining branch.
"""

import dataclasses
import functools
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
# returns [B, R]; returns are None without values. To keep state between
# iterations, such as a running mean, add fields to `RLState` and build the
# function from them inside the jitted `penalise` of an experiment.
AdvantageFn = Callable[
  [jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array | None]
]


# Fields of `PPOConfig` that are used only with a value model.
OF_VALUES = {'discount', 'gae_lambda', 'value_clip', 'whiten_advantages'}


@dataclasses.dataclass(frozen=True)
class PPOConfig:
  """Hyperparameters; defaults are the paper's where it gives them.

  Attributes:
    discount: gamma of the returns; the paper does not discount.
    gae_lambda: lambda of GAE (Stiennon et al. B.1).
    clip: policy ratio clip (C.4).
    value_clip: value clip, reward units (Ziegler et al.'s code).
    whiten_advantages: whether to whiten over the batch's response tokens.
    missing_end_score: score of a response that never ended; None keeps its own.
    kl_in: 'reward' subtracts the KL penalty from rewards (equation 2); 'loss'
      adds it to the policy's loss.
    kl_estimator: estimator of the penalty; see `rewards.kl_estimator`.
    kl_target: KL to reach, nats per response; None keeps beta fixed.
    kl_horizon: episodes; see `rewards.update_kl_coef`.
    ptx_coef: gamma of equation 2; 0 is PPO without pretraining gradients.
    num_minibatches, num_epochs: 8 and 1 (C.4).
    num_microbatches: gradient accumulation within a minibatch.
    num_slices: parts in which a rollout is read, to save memory.
    sampler_tolerance: nats. The sampler's log-probabilities are used as the old
      ones if, on a sample as large as a minibatch or a slice, whichever is
      smaller, they agree with those of the training graph to within this; 0
      always uses the graph's.
    ema_decay: decay of the average of the policy's weights (C.4).
    ema_every: average after each 'update' or 'iteration'; the paper does not
      say which.
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
    def check(is_good, names, what):
      for name in names.split():
        value = getattr(self, name)
        if not is_good(value):
          raise ValueError(f'{name} must {what}: {value!r}')

    for name, known in (
      ('ema_every', ('update', 'iteration')),
      ('kl_in', ('reward', 'loss')),
      ('kl_estimator', rewards.KL_ESTIMATORS),
    ):
      check(
        known.__contains__, name, f'be one of {", ".join(map(repr, known))}'
      )
    counts = 'num_minibatches num_epochs num_microbatches num_slices kl_horizon'
    check(lambda x: x >= 1, counts, 'be at least 1')
    check(lambda x: x > 0, 'clip value_clip', 'be positive')
    check(lambda x: x >= 0, 'sampler_tolerance', 'not be negative')
    check(
      lambda x: 0 <= x < math.inf, 'ptx_coef', 'be finite, and not negative'
    )
    check(lambda x: 0 <= x < 1, 'ema_decay', 'be in [0, 1)')
    check(lambda x: 0 <= x <= 1, 'discount gae_lambda', 'be in [0, 1]')
    check(
      lambda x: x is None or 0 < x < math.inf,
      'kl_target',
      'be positive, or None for a fixed kl_coef',
    )
    check(
      lambda x: x is None or math.isfinite(x),
      'missing_end_score',
      "be finite, or None for a response's own score",
    )


@flax.struct.dataclass
class RLState:
  """What an RL run carries from one iteration to the next.

  Attributes:
    policy: the policy in training.
    value: the value model in training, or None.
    ema: moving average of the policy's weights.
    kl: the KL coefficient.
  """

  policy: train_state.TrainState
  value: train_state.TrainState | None
  ema: Params
  kl: rewards.KLState


# --- Penalise -----------------------------------------------------------------


def gae_advantages(config: PPOConfig) -> AdvantageFn:
  """Returns `advantages.gae` as an `AdvantageFn`, whitened if configured."""

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
  """Returns an `AdvantageFn` with one advantage per response, without values.

  All tokens of a response share its advantage. The return of a response is the
  sum of its rewards. The loss averages over tokens, so that a response's weight
  is proportional to its length, as is the gradient of its log-probability.

  Args:
    baseline_fn: (returns [B], n) -> advantages [B], for example
      `advantages.leave_one_out`.
    num_samples: n, responses per prompt, adjacent in the rollout.
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
  """Makes the program that turns a scored rollout into a training batch.

  Args:
    logprobs_fn: for the policy and the reference, at the sampling temperature.
    values_fn: for the value model, or None.
    advantage_fn: maps KL-penalised rewards to advantages.

  Returns:
    (state, frozen, rollout, layout, scores [B]) -> (batch, the next iteration's
    KL coefficient, metrics over response tokens or responses). `frozen` holds
    the parameters of the 'reference' and the bases of adapters; scores have
    mean 0 on demonstrations.
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
    # The number of rows may not be a multiple of `num_slices`.
    num_slices = math.gcd(config.num_slices, rows.tokens.shape[0])

    def logprobs(params, rows):
      return logprobs_fn(params, rows.tokens, rows.segments, rows.where)[0]

    def read(rows):
      ref_logprobs = logprobs(frozen['reference'], rows)
      if values_fn is None:
        return ref_logprobs, None
      value = lora.join(state.value.params, frozen.get('value'))
      values = values_fn(value, rows.tokens, rows.segments)
      return ref_logprobs, jnp.take_along_axis(values, rows.where, axis=1)

    ref_logprobs, values = slices.in_slices(read, rows, num_slices)
    sampler = packing.pack_responses(rollout.logprobs, layout)
    old_logprobs, metrics = _old_logprobs(
      functools.partial(logprobs, policy),
      rows,
      packing.first_epoch(sampler, layout),
      num_slices,
      config,
    )

    by_token = jax.tree.map(
      lambda x: packing.unpack_responses(x, layout, rollout.response_mask),
      (old_logprobs, ref_logprobs, values),
    )
    fields, objective = penalised(
      rollout, scores, *by_token, state.kl.coef, advantage_fn, config
    )
    kl_sum, kl_count = objective['objective/kl']
    kl = rewards.update_kl_coef(
      state.kl,
      kl_sum / kl_count,
      rollout.tokens.shape[0],
      config.kl_target,
      config.kl_horizon,
    )
    real = layout.segments > 0
    metrics |= objective | {
      'packing/fill': masked.metric(real.astype(jnp.float32), real | True),
      'packing/row_length': masked.scalar(jnp.asarray(real.shape[1])),
      'packing/row_responses': masked.scalar(
        jnp.asarray(layout.where.shape[1])
      ),
    }
    packed = {n: packing.pack_responses(x, layout) for n, x in fields.items()}
    return RLBatch(episodes=episodes, **packed), kl, metrics

  return penalise


def _old_logprobs(read, rows, sampler, num_slices, config):
  """The log-probabilities of the old policy, and metrics.

  They are the sampler's if these agree with the training graph's on a sample
  of rows, otherwise the graph's.
  """
  compares = config.sampler_tolerance > 0
  stride = max(config.num_minibatches, num_slices)

  def read_all():
    return slices.in_slices(read, rows, num_slices)

  def sample_of(x):
    return x[::stride] if compares else x

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
  """Computes advantages and returns; the arithmetic of `make_penalise`.

  Args:
    scores: of each response, mean 0 on demonstrations.
    ref_logprobs: of the KL reference, the RL-initialisation model.
    old_values: the value model's values at the positions that predict each
      response token, or None.
    kl_coef: beta.
    advantage_fn: see `AdvantageFn`.

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
    # Broadcasting would give tokens the advantages of other tokens.
    if each is not None and each.shape != mask.shape:
      raise ValueError(
        f'the advantage function returned {name} of shape {each.shape}, not '
        f'{mask.shape}: one number for each response token'
      )
  kl, kl_k3 = rewards.kl_estimates(old_logprobs, ref_logprobs, mask)
  responses = jnp.any(mask, axis=1)
  lengths = jnp.sum(mask, axis=1, dtype=jnp.float32)
  metrics = {
    f'objective/{name}': masked.metric(values, responses)
    for name, values in (
      ('score', scores),
      ('score_squared', jnp.square(scores)),
      ('reward', jnp.sum(token_rewards, axis=1)),
      ('kl', kl),
      ('kl_k3', kl_k3),
      ('length', lengths),
      ('ended', rollout.ended.astype(jnp.float32)),
    )
  } | {'objective/kl_coef': masked.scalar(kl_coef)}
  fields = {
    'old_logprobs': jnp.where(mask, old_logprobs, 0.0),
    'ref_logprobs': jnp.where(mask, ref_logprobs, 0.0),
    'advantages': found,
  }
  if old_values is None:
    metrics['ppo/advantage'] = masked.metric(found, mask)
  else:
    # Advantages before whitening.
    metrics['ppo/advantage'] = masked.metric(returns - old_values, mask)
    residual = masked.variance(returns - old_values, mask)
    explained = 1.0 - residual / (masked.variance(returns, mask) + 1e-8)
    metrics['ppo/return'] = masked.metric(returns, mask)
    metrics['ppo/val/var_explained'] = masked.scalar(explained)
    old_values = jnp.where(mask, old_values, 0.0)
    fields |= {'old_values': old_values, 'returns': returns}
  return fields, metrics


# --- Losses -------------------------------------------------------------------


def make_policy_loss(logprobs_fn: LogprobsFn, config: PPOConfig) -> LossFn:
  """Makes the clipped policy loss, summed over response tokens: a `LossFn`.

  If `kl_in` is 'loss', the KL penalty is added, times `frozen['kl_coef']`. On
  tokens sampled from the policy itself, the mean gradient of k2 is that of
  KL(pi || ref), and the mean gradient of k3 is that of KL(ref || pi). The mean
  gradient of k1 would be 0, so k1 is multiplied by pi / pi_old, which gives it
  the gradient of KL(pi || ref).
  """

  def loss_fn(params, frozen, batch: RLBatch, key):
    del key  # No dropout in PPO.
    rows, mask = batch.episodes, batch.episodes.response_mask
    params = lora.join(params, frozen.get('policy'))
    logprobs, entropy = logprobs_fn(
      params, rows.tokens, rows.segments, rows.where
    )
    # Keeps padding out of exp(): its old log-probability is 0.
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
  """Makes the clipped value loss, summed over response tokens: a `LossFn`."""

  def loss_fn(params, frozen, batch: RLBatch, key):
    del key
    rows, mask = batch.episodes, batch.episodes.response_mask
    params = lora.join(params, frozen.get('value'))
    values = values_fn(params, rows.tokens, rows.segments)
    # V(prompt, y_<t) is at the position that predicts token t.
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

  Each minibatch of each inner epoch updates policy, value model and moving
  average (see `ema_every`). Every minibatch makes ONE policy gradient,

    g = grad(policy loss) + gamma grad(mean pretraining NLL),

  before clipping and Adam (C.4). A second Adam step for the pretraining part
  would cancel gamma, since Adam ignores the scale of gradients.

  Args:
    loss_fns: the loss of the 'policy', of the 'value' model if there is one,
      and of the pretraining text, 'ptx', if `ptx_coef` is not 0.
    optimizers: of the 'policy', and of the 'value' model if there is one.

  Returns:
    (state, frozen, batch, pretraining rows or None, the next iteration's KL
    coefficient, key) -> (new state, metrics summed over minibatches). `first/*`
    are metrics of the first minibatch, where the ratio must be 1. The paper has
    8 pretraining rows per episode and inner epoch; their number may be any
    multiple of the number of steps.

  Raises:
    ValueError: a loss is missing or unknown; when traced, sizes that do not
      divide, or missing pretraining rows.
  """
  use_ptx = config.ptx_coef > 0
  missing = {'policy', *(('ptx',) if use_ptx else ())} - set(loss_fns)
  if missing:
    raise ValueError(f'no loss is given for {sorted(missing)}')
  unknown = set(loss_fns) - {'policy', 'value', 'ptx'}
  if unknown:
    raise ValueError(
      f'losses {sorted(unknown)} belong to no model; the losses are those of '
      "'policy', 'value' and 'ptx': add other terms within one of them"
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
      'rows': _by_step(batch, num_steps),
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


# Metrics of the first minibatch, where the policy still equals the old one.
FIRST_METRICS = tuple(
  f'ppo/policy/{name}' for name in ('ratio', 'clipfrac', 'approxkl')
)


def _by_step(batch, num_steps):
  """Splits rows by step: row i * num_steps + s is row i of step s.

  Sharded rows stay on their devices.
  """
  num_rows = batch.episodes.tokens.shape[0]
  if num_rows % num_steps:
    raise ValueError(
      f'{num_rows} rows of episodes do not divide into {num_steps} steps'
    )
  return jax.tree.map(
    lambda x: jnp.swapaxes(x.reshape(-1, num_steps, *x.shape[1:]), 0, 1), batch
  )


def _consecutive(ptx_batch, num_steps):
  """Splits pretraining rows by step: each step takes consecutive rows."""
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
  """Takes a step of the policy, and one of the value model, on a minibatch."""
  names = ('policy', 'value', 'ptx')
  keys = dict(zip(names, jax.random.split(inputs['key'], 3), strict=True))
  coef, metrics = config.ptx_coef, {}

  def gradients(name, params, rows):
    return train_state.accumulate_gradients(
      loss_fns[name], params, frozen, rows, keys[name], config.num_microbatches
    )

  def update(name, grads, loss):
    old = getattr(state, name)
    new, found = train_state.apply_gradients(old, grads, optimizers[name], loss)
    metrics.update({f'{name}/{key}': x for key, x in found.items()})
    return state.replace(**{name: new})

  params = state.policy.params
  grads, loss, found = gradients('policy', params, inputs['rows'])
  metrics |= found
  if coef > 0:
    ptx_grads, ptx_loss, found = gradients('ptx', params, inputs['ptx'])
    metrics |= {
      'ptx/loss': found['nll'],
      'ppo/policy/ppo_gradient_norm': masked.scalar(optax.tree.norm(grads)),
      'ptx/gradient_norm': masked.scalar(coef * optax.tree.norm(ptx_grads)),
    }
    grads = jax.tree.map(lambda g, p: g + coef * p, grads, ptx_grads)
    loss = loss + coef * ptx_loss
  state = update('policy', grads, loss)
  if 'value' in loss_fns:
    params = state.value.params
    grads, loss, found = gradients('value', params, inputs['rows'])
    metrics |= found
    state = update('value', grads, loss)
  return state, metrics
