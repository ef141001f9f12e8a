"""Every loss of the method, per token or per prompt, before averaging.

The caller averages under a mask, so that sums and weights add up over
microbatches and devices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def ranking_loss(
  scores: Float[Array, '*#B C'],
  ranks: Int[Array, '*B C'],
  divisor: str = 'surviving',
) -> tuple[Float[Array, '*B'], Float[Array, '*B'], Float[Array, '*B']]:
  """K-way comparison loss, one number per ranking (equation 1).

    loss(x) = -1/Z sum over (w, l) log sigmoid(r(x, y_w) - r(x, y_l))

  over all ordered pairs where the labeler ranked w above l. Ties form no
  pair (C.2). All pairs of a ranking share its C forward passes, and all
  rankings have the same weight.

  Args:
    scores: r(x, y) of each candidate; [B, 1, C] against ranks of [B, R, C]
      where several labelers ranked the same answers.
    ranks: 1 is best, equal numbers tie, 0 marks an absent candidate.
    divisor: Z. 'surviving' is the number of pairs that are not ties, 'all' is
      C(K, 2) for the K present candidates. The paper does not say which.

  Returns:
    (loss, pairs, correct), each [*B]: the loss, the number of surviving pairs,
    and how many of them the scores order as the labeler did (a tied score
    counts half). A ranking without pairs has loss 0 and 0 pairs.

  Raises:
    ValueError: unknown divisor.
  """
  present = ranks > 0
  better = ranks[..., :, None] < ranks[..., None, :]
  better &= present[..., :, None] & present[..., None, :]
  # Masked before the logarithm: the score of an absent candidate, which may be
  # NaN, must not reach the gradient of the others.
  margins = jnp.where(better, scores[..., :, None] - scores[..., None, :], 0.0)
  pair_losses = jnp.where(better, -jax.nn.log_sigmoid(margins), 0.0)
  pairs = jnp.sum(better, axis=(-2, -1), dtype=jnp.float32)
  if divisor == 'surviving':
    divisors = pairs
  elif divisor == 'all':
    K = jnp.sum(present, axis=-1, dtype=jnp.float32)
    divisors = K * (K - 1) / 2
  else:
    raise ValueError(f"divisor must be 'surviving' or 'all': {divisor!r}")
  loss = jnp.sum(pair_losses, axis=(-2, -1)) / jnp.maximum(divisors, 1)
  won = jnp.where(better, (margins > 0) + 0.5 * (margins == 0), 0.0)
  return loss, pairs, jnp.sum(won, axis=(-2, -1))


def plackett_luce_loss(
  scores: Float[Array, '*#B C'], ranks: Int[Array, '*B C']
) -> tuple[Float[Array, '*B'], Float[Array, '*B']]:
  """Negative log-likelihood of a ranking as repeated choices (Plackett 1975).

    loss(x) = -1/Z sum over i of log(e^r_i / (e^r_i + sum of e^r_j))

  j runs over the candidates ranked below i, and i over those with a candidate
  below them. Z is the number of i, so that all rankings have the same weight
  (Rafailov et al. 2023, appendix A.3, takes the sum). Without ties, the labeler
  chooses the best, then the second best, and so on; tied candidates are not
  compared. For two candidates the loss equals `ranking_loss`.

  Args:
    scores, ranks: see `ranking_loss`.

  Returns:
    (loss, choices), each [*B]; both are 0 if all candidates are tied.
  """
  present = ranks > 0
  worse = ranks[..., :, None] < ranks[..., None, :]
  worse &= present[..., :, None] & present[..., None, :]
  margins = jnp.where(worse, scores[..., None, :] - scores[..., :, None], 0.0)
  # log(1 + sum of e^(r_j - r_i)), with the 1 as another candidate.
  terms = jnp.where(worse, margins, -jnp.inf)
  terms = jnp.concatenate([terms, jnp.zeros_like(terms[..., :1])], axis=-1)
  chosen = jnp.any(worse, axis=-1)
  nll = jnp.where(chosen, jax.nn.logsumexp(terms, axis=-1), 0.0)
  choices = jnp.sum(chosen, axis=-1, dtype=jnp.float32)
  return jnp.sum(nll, axis=-1) / jnp.maximum(choices, 1), choices


def mean_over_rankings(
  loss: Float[Array, 'B R'], weights: Float[Array, 'B R']
) -> Float[Array, 'B']:
  """Averages a prompt's losses over the labelers who ranked it.

  All prompts then have the same weight.

  Args:
    loss: of each labeler's ranking.
    weights: 0 for labelers who are absent or tied all candidates.
  """
  count = jnp.sum(weights > 0, axis=1, dtype=jnp.float32)
  return jnp.sum(loss, axis=1) / jnp.maximum(count, 1)


def clipped_policy_loss(
  logprobs: Float[Array, 'B R'],
  old_logprobs: Float[Array, 'B R'],
  advantages: Float[Array, 'B R'],
  clip: float = 0.2,
) -> tuple[Float[Array, 'B R'], Float[Array, 'B R'], Bool[Array, 'B R']]:
  """PPO's policy loss per token (Schulman et al. 2017, equation 7).

    ratio = pi_new / pi_old
    loss  = max(-A ratio, -A clip(ratio, 1 - c, 1 + c))

  Args:
    logprobs: log pi_new, nats; the only argument that carries gradients.
    old_logprobs: log pi_old, fixed when the rollout was scored.
    advantages: A, whitened.
    clip: c; 0.2 in the paper.

  Returns:
    (loss, ratio, clipped): clipped is True where the clipped branch is larger,
    so that the token has no gradient.
  """
  ratio = jnp.exp(logprobs - old_logprobs)
  plain = -advantages * ratio
  limited = -advantages * jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
  return jnp.maximum(plain, limited), ratio, limited > plain


def clipped_value_loss(
  values: Float[Array, 'B R'],
  old_values: Float[Array, 'B R'],
  returns: Float[Array, 'B R'],
  clip: float = 0.2,
) -> tuple[Float[Array, 'B R'], Bool[Array, 'B R']]:
  """PPO's clipped value loss per token (Ziegler et al.'s code).

    loss = 1/2 max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2)

  Args:
    values: V_new; the only argument that carries gradients.
    old_values: V_old, fixed when the rollout was scored.
    returns: G, advantages before whitening plus V_old.
    clip: c, reward units; 0.2 from Ziegler et al. (the paper is silent).

  Returns:
    (loss, clipped): clipped is True where the clipped branch is larger.
  """
  limited = jnp.clip(values, old_values - clip, old_values + clip)
  plain_error = jnp.square(values - returns)
  limited_error = jnp.square(limited - returns)
  loss = 0.5 * jnp.maximum(plain_error, limited_error)
  return loss, limited_error > plain_error
