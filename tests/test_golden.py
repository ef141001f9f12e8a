"""Three iterations of PPO-ptx, number by number.

Any change to the arithmetic of sampling, scoring, rewards, advantages, losses,
accumulation, optimizer or moving average moves these numbers. After a change
that is meant to, look at the difference and write them anew:

  JAX_PLATFORMS=cpu python -m tests.test_golden
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import tiny

pytestmark = pytest.mark.usefixtures('quick_compile')

FILE = pathlib.Path(__file__).parent / 'golden' / 'ppo_three_steps.json'
NAMES = (
  'objective/score',
  'objective/reward',
  'objective/kl',
  'objective/kl_k3',
  'objective/length',
  'objective/ended',
  'ppo/loss/policy',
  'ppo/loss/value',
  'ppo/policy/approxkl',
  'ppo/policy/entropy',
  'ppo/return',
  'ptx/loss',
  'ptx/gradient_norm',
  'policy/optimizer/gradient_norm',
  'value/optimizer/gradient_norm',
)


def three_steps() -> list[dict[str, float]]:
  """Runs three iterations on synthetic prompts and text; policy, reference,
  value and reward model are random. Returns one line an iteration."""
  state = tiny.ppo_state()
  reference, reward = state.policy.params, tiny.params('scalar', 1)
  root = jax.random.key(0)
  lines = []
  for iteration in range(3):
    key = jax.random.fold_in(root, iteration)
    prompts = jax.tree.map(jnp.asarray, tiny.prompts(iteration))
    text = jax.tree.map(jnp.asarray, tiny.text(iteration))
    sampled = tiny.generate(state.policy.params, prompts, key)
    # The order in which these numbers were first recorded.
    order = jax.random.split(jax.random.fold_in(key, 1))[0]
    order = jax.random.permutation(jax.random.split(order, 1)[0], tiny.B)
    layout = tiny.lay_out(sampled, np.asarray(order).reshape(2, -1))
    scores = tiny.score(reward, sampled, layout)
    batch, kl, metrics = tiny.penalise(
      state, {'reference': reference}, sampled, layout, scores
    )
    state, more = tiny.train(
      state, {}, batch, text, kl, jax.random.fold_in(key, 1)
    )
    metrics = jax.device_get({**metrics, **more})
    line = {name: metrics[name][0] / metrics[name][1] for name in NAMES}
    line['sum of token ids'] = np.sum(sampled.tokens)
    line['kl coefficient'] = state.kl.coef
    line['norm of policy'] = optax.tree.norm(state.policy.params)
    line['norm of value'] = optax.tree.norm(state.value.params)
    line['norm of ema'] = optax.tree.norm(state.ema)
    line['distance of ema'] = optax.tree.norm(
      jax.tree.map(jnp.subtract, state.ema, reference)
    )
    lines.append({name: float(value) for name, value in line.items()})
  return lines


def test_three_steps_are_as_recorded():
  """To 1e-4: other processors add float32 numbers in another order, 1e-6 of a
  sum; Adam divides gradients near 0 by their own size, and three iterations
  pass the difference on. Sampled tokens are discrete, and equal."""
  expected = json.loads(FILE.read_text())
  got = three_steps()
  for step, (ours, theirs) in enumerate(zip(got, expected, strict=True), 1):
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
      np.testing.assert_allclose(
        ours[name],
        value,
        rtol=1e-4,
        atol=1e-5,
        err_msg=f'{name} in iteration {step}',
      )
  # The reference is where the policy started.
  assert expected[0]['objective/kl'] == 0.0
  assert abs(expected[2]['objective/kl']) > 1e-3


def write() -> None:
  """Records the numbers as they are now."""
  FILE.write_text(json.dumps(three_steps(), indent=2) + '\n')


if __name__ == '__main__':
  write()
