"""Advantages of masked responses: GAE, and baselines without a value model.

The environment is a bandit (paper 3.5): the episode ends with the response, so
the value after its last token is 0 and nothing is bootstrapped from padding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def gae(
  rewards: Float[Array, 'B R'],
  values: Float[Array, 'B R'],
  mask: Bool[Array, 'B R'],
  discount: float = 1.0,
  gae_lambda: float = 0.95,
) -> tuple[Float[Array, 'B R'], Float[Array, 'B R']]:
  """GAE advantages and the returns.

    delta_t = r_t + gamma V_{t+1} - V_t
    A_t     = delta_t + gamma lambda A_{t+1}
    return  = A_t + V_t

  with V and A equal to 0 after the last real token.

  Args:
    rewards: reward for emitting token t (score and KL penalty), fp32.
    values: V(prompt, y_<t), the value before token t, reward units.
    mask: True on response tokens; right-padded.
    discount: gamma. The paper does not discount, which is gamma = 1.
    gae_lambda: lambda; 0.95 from Stiennon et al. B.1 (the paper is silent).
      1 makes the returns the discounted sums of rewards.

  Returns:
    (advantages, returns), both [B, R], 0 where masked. Not whitened.
  """
  rewards = jnp.where(mask, rewards, 0.0)
  values = jnp.where(mask, values, 0.0)
  next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
  deltas = rewards + discount * next_values - values

  def step(advantage, inputs):
    delta, real = inputs
    advantage = jnp.where(real, delta + discount * gae_lambda * advantage, 0.0)
    return advantage, advantage

  start = jnp.zeros_like(values[:, 0])
  _, advantages = jax.lax.scan(step, start, (deltas.T, mask.T), reverse=True)
  advantages = advantages.T
  return advantages, jnp.where(mask, advantages + values, 0.0)


def leave_one_out(
  returns: Float[Array, 'B'], num_samples: int
) -> Float[Array, 'B']:
  """Each return minus the mean of the others in its group.

    A_i = G_i - 1 / (n - 1) sum over j != i of G_j

  Kool et al. 2019, equation 8; RLOO (Ahmadian et al. 2024, section 3.2). The
  baseline does not depend on the response, so the gradient stays unbiased.

  Args:
    returns: G, one per response; the n responses to a prompt are adjacent.
    num_samples: n, at least 2.
  """
  groups = returns.reshape(-1, num_samples)
  others = jnp.sum(groups, axis=1, keepdims=True) - groups
  return (groups - others / (num_samples - 1)).reshape(-1)


def group_normalised(
  returns: Float[Array, 'B'], num_samples: int
) -> Float[Array, 'B']:
  """Returns normalised within their group (GRPO).

    A_i = (G_i - mean(G)) / (std(G) + 1e-4)

  Shao et al. 2024, section 4.1.2; population standard deviation. The advantages
  are 0 in a group whose returns are all equal.

  Args:
    returns: G, one per response; the n responses to a prompt are adjacent.
    num_samples: n, at least 2.
  """
  groups = returns.reshape(-1, num_samples)
  centred = groups - jnp.mean(groups, axis=1, keepdims=True)
  deviation = jnp.sqrt(jnp.mean(jnp.square(centred), axis=1, keepdims=True))
  return (centred / (deviation + 1e-4)).reshape(-1)


# Value of a stage's key `advantage` -> function (returns [B], n) -> advantages
# [B].
GROUP_ADVANTAGES = {
  'leave_one_out': leave_one_out,
  'group_normalised': group_normalised,
}
