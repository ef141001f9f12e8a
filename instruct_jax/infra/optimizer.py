"""Learning-rate schedules and Adam.

A schedule is a function of the number of updates already applied: the first
update sees step 0.
"""

import math

import jax.numpy as jnp
import optax


def cosine_to_fraction(
  peak: float, num_steps: int, final_fraction: float = 0.1, num_warmup: int = 0
) -> optax.Schedule:
  """Cosine decay from `peak` to a fraction of it (paper C.1: to 10 %).

    rate(t) = peak * (f + (1 - f) * (1 + cos(pi * u)) / 2)
    u = (t - num_warmup) / (num_steps - num_warmup), within 0..1

  Args:
    peak: the highest learning rate.
    num_steps: number of updates, after which the rate stays at f * peak.
    final_fraction: f.
    num_warmup: how many of these are warm-up, at peak * (t + 1) / num_warmup;
      the SFT models have none.

  Raises:
    ValueError: the warm-up leaves no steps to decay.
  """
  if not 0 <= num_warmup < num_steps:
    raise ValueError(
      f'{num_warmup} warm-up steps do not fit before the end of {num_steps}'
    )

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    u = jnp.clip((step - num_warmup) / (num_steps - num_warmup), 0.0, 1.0)
    cosine = (1.0 + jnp.cos(math.pi * u)) / 2
    decayed = peak * (final_fraction + (1 - final_fraction) * cosine)
    if not num_warmup:
      return decayed
    return jnp.where(step < num_warmup, peak * (step + 1) / num_warmup, decayed)

  return schedule


def constant_with_warmup(
  peak: float,
  num_warmup_iterations: int,
  start_fraction: float = 0.1,
  updates_per_iteration: int = 1,
) -> optax.Schedule:
  """The schedule of PPO (paper C.4): warm-up over 10 iterations, then flat.

    rate(i) = peak * (s + (1 - s) * min(i / num_warmup_iterations, 1))

  Args:
    peak: the learning rate after the warm-up.
    num_warmup_iterations: PPO iterations until the peak; 0 for none.
    start_fraction: s.
    updates_per_iteration: gradient steps in an iteration (minibatches times
      inner epochs), which share its rate.

  Raises:
    ValueError: either number is out of range.
  """
  if updates_per_iteration < 1 or num_warmup_iterations < 0:
    raise ValueError(
      f'updates_per_iteration={updates_per_iteration} is below 1 or '
      f'num_warmup_iterations={num_warmup_iterations} below 0'
    )

  def schedule(step):
    if not num_warmup_iterations:
      return jnp.asarray(peak, jnp.float32)
    iteration = jnp.asarray(step) // updates_per_iteration
    progress = jnp.minimum(iteration / num_warmup_iterations, 1.0)
    return peak * (start_fraction + (1 - start_fraction) * progress)

  return schedule


def make_adam(
  schedule: optax.Schedule,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  max_grad_norm: float = 0.0,
) -> optax.GradientTransformation:
  """Adam after global-norm clipping (paper C: beta 0.9 and 0.95).

  Args:
    schedule: learning rate by number of applied updates.
    b1, b2, eps: Adam's constants.
    max_grad_norm: L2 norm to clip at; 0 or less for no clipping.
  """
  steps = []
  if max_grad_norm > 0:
    steps.append(optax.clip_by_global_norm(max_grad_norm))
  steps.append(optax.scale_by_adam(b1=b1, b2=b2, eps=eps))
  steps.append(optax.scale_by_learning_rate(schedule))
  return optax.chain(*steps)
