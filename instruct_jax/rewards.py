"""Rewards: a score at the last token, a KL penalty at every token.

Equation 2 of the paper, per token:

  R_t = -beta (log pi_old(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t))
        + [t is the last response token] r(x, y)

The penalty is the signed log-ratio of the sampled tokens, not clamped. Its
expectation is the KL divergence, but it may be negative for single tokens and
small batches. `kl_estimator` has other estimators of the same divergence.
"""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from instruct_jax import masked

KL_ESTIMATORS = ('k1', 'k2', 'k3')


def kl_estimator(
  log_ratio: Float[Array, '*b'], name: str
) -> Float[Array, '*b']:
  """A one-sample estimate of KL(pi || ref), nats (Schulman 2020).

    k1 = d            unbiased, of either sign
    k2 = d^2 / 2      biased, never negative; its mean gradient is the KL's
    k3 = e^-d - 1 + d unbiased, never negative

  Args:
    log_ratio: d = log pi - log ref of a token drawn from pi.
    name: 'k1', 'k2' or 'k3'.

  Raises:
    ValueError: another name.
  """
  if name == 'k1':
    return log_ratio
  if name == 'k2':
    return 0.5 * jnp.square(log_ratio)
  if name == 'k3':
    return jnp.expm1(-log_ratio) + log_ratio
  raise ValueError(f'kl_estimator must be one of {KL_ESTIMATORS}: {name!r}')


def token_rewards(
  scores: Float[Array, 'B'],
  old_logprobs: Float[Array, 'B R'],
  ref_logprobs: Float[Array, 'B R'],
  response_mask: Bool[Array, 'B R'],
  kl_coef: Float[Array, ''],
  estimator: str = 'k1',
) -> Float[Array, 'B R']:
  """KL-penalised rewards, float32; 0 where masked (equation 2).

  Args:
    scores: reward-model score of each response, mean 0 on demonstrations.
    old_logprobs, ref_logprobs: of each response token, nats.
    response_mask: True on response tokens. A row without any gets no reward.
    kl_coef: beta; 0.02 in the paper.
    estimator: estimator of the divergence; 'k1' in the paper.
  """
  penalty = -kl_coef * kl_estimator(old_logprobs - ref_logprobs, estimator)
  columns = jnp.arange(response_mask.shape[1])[None, :]
  is_last = columns == masked.last_index(response_mask)[:, None]
  rewards = penalty + jnp.where(is_last, scores[:, None], 0.0)
  return jnp.where(response_mask, rewards, 0.0).astype(jnp.float32)


def penalise_missing_end(
  scores: Float[Array, 'B'],
  ended: Bool[Array, 'B'],
  missing_end_score: float | None,
) -> Float[Array, 'B']:
  """Gives responses that never ended a fixed score (Ziegler et al.: -1).

  None keeps the score of the truncated text.
  """
  if missing_end_score is None:
    return scores
  return jnp.where(ended, scores, jnp.float32(missing_end_score))


def kl_estimates(
  old_logprobs: Float[Array, 'B R'],
  ref_logprobs: Float[Array, 'B R'],
  response_mask: Bool[Array, 'B R'],
) -> tuple[Float[Array, 'B'], Float[Array, 'B']]:
  """k1 and k3 estimates of each response's KL(pi || ref), nats.

  Both are summed over tokens and have the same mean; only k1 may be negative.
  """
  ratio = jnp.where(response_mask, old_logprobs - ref_logprobs, 0.0)
  k1, k3 = (jnp.sum(kl_estimator(ratio, name), axis=1) for name in ('k1', 'k3'))
  return k1, k3


@flax.struct.dataclass
class KLState:
  """The current KL coefficient; part of every PPO checkpoint."""

  coef: Float[Array, '']


def update_kl_coef(
  state: KLState,
  measured_kl: Float[Array, ''],
  num_episodes: int,
  target: float | None,
  horizon: int = 10_000,
) -> KLState:
  """Ziegler et al.'s controller; a target of None keeps the paper's fixed beta.

    e = clip(KL / target - 1, -0.2, 0.2);  beta <- beta (1 + e n / horizon)

  Args:
    state: current coefficient.
    measured_kl: mean KL per response over the last batch, nats; if it is not
      finite, the coefficient does not change.
    num_episodes: n, responses in that batch.
    target: KL per response to reach, nats, or None.
    horizon: number of episodes for which an unclipped error of 1 would double
      beta in one update.
  """
  if target is None:
    return state
  error = jnp.clip(measured_kl / target - 1.0, -0.2, 0.2)
  error = jnp.where(jnp.isfinite(measured_kl), error, 0.0)
  return KLState(coef=state.coef * (1.0 + error * num_episodes / horizon))
