"""Signs that an RL run is going wrong."""

import re

import pytest

from instruct_jax import alarms

GOOD = {
  'first/ppo/policy/ratio': 1.0,
  'objective/sampler_difference': 1e-6,
  'objective/kl': 0.5,
  'objective/ended': 0.98,
  'objective/length': 20.0,
  'objective/score': 0.3,
}


def run_of(*parts):
  """Rows from (number of iterations, changes) pairs."""
  rows = []
  for count, changes in parts:
    for _ in range(count):
      rows.append(GOOD | changes | {'step': len(rows) + 1})
  return rows


def find(*parts):
  return alarms.find(run_of(*parts), (-2.0, 2.0), 24)


def test_a_good_run_raises_none():
  noise = {'objective/kl': -0.2, 'objective/score': 3.0}
  assert find((20, {})) == {}
  # Single batches are noisy.
  assert find((12, {}), (1, noise), (10, {})) == {}
  assert alarms.find([]) == {}


@pytest.mark.parametrize(
  ('name', 'changes', 'words'),
  [
    ('negative_kl', {'objective/kl': -0.2}, 'mean KL -0.200'),
    ('end_of_text', {'objective/ended': 0.4}, 'fell from 0.98 to 0.40'),
    ('length', {'objective/length': 40.0}, 'from 20.0 to 40.0 .*most 24'),
    ('length', {'objective/length': 5.0}, 'from 20.0 to 5.0'),
    ('score_range', {'objective/score': 9.0}, r'9.00 .*\[-2.00, 2.00\]'),
    ('score_range', {'objective/score': -9.0}, '-9.00 is outside'),
  ],
)
def test_what_persists_is_raised_once_with_its_cause(name, changes, words):
  # The first five iterations are what later windows are compared with; 6 to 10
  # are the first such window.
  found = find((5, {}), (30, changes))
  assert set(found) == {name}
  assert re.search(f'^iteration 10: .*{words}', found[name])
  # And where it begins later.
  assert set(find((30, {}), (5, changes))) == {name}


@pytest.mark.parametrize(
  ('name', 'changes', 'words'),
  [
    ('ratio', {'first/ppo/policy/ratio': 1.01}, 'ratio 1.01000 at the first'),
    ('ratio', {'first/ppo/policy/approxkl': 0.02}, 'policy is 0.02 nats'),
    ('sampler', {'objective/sampler_difference': 0.2}, '0.200 nats per token'),
  ],
)
def test_what_must_hold_exactly_is_raised_at_once(name, changes, words):
  found = find((2, {}), (1, changes))
  assert set(found) == {name}
  assert found[name].startswith('iteration 3: ')
  assert words in found[name]


@pytest.mark.parametrize(
  ('dtype', 'ratio', 'difference'),
  [('float32', 1.0005, 0.04), ('bfloat16', 1.01, 0.1)],
)
def test_what_must_hold_holds_to_the_rounding_of_the_dtype(
  dtype, ratio, difference
):
  def found(ratio, difference):
    return alarms.find(
      run_of(
        (
          1,
          {
            'first/ppo/policy/ratio': ratio,
            'objective/sampler_difference': difference,
          },
        )
      ),
      compute_dtype=dtype,
    )

  assert found(ratio, difference) == {}
  assert found(2 - ratio, difference) == {}
  wrong = found(1 + 5 * (ratio - 1), 5 * difference)
  assert set(wrong) == {'ratio', 'sampler'}
  assert all(f'in {dtype}' in text for text in wrong.values())


@pytest.mark.parametrize(
  ('ppo', 'ptx', 'words'),
  [
    (0.5, 10.0, r'20 times .*\(10, 0.5\).*lower ptx_coef'),
    (2.0, 0.01, r'0.005 times .*raise ptx_coef'),
  ],
)
def test_a_gradient_that_drowns_the_other_is_raised(ppo, ptx, words):
  norms = {'ppo/policy/ppo_gradient_norm': ppo, 'ptx/gradient_norm': ptx}
  found = find((20, norms))
  assert set(found) == {'gradients'}
  assert re.search(f'^iteration 5: .*{words}', found['gradients'])
  # One iteration is noise; near each other is well; without ptx nothing is.
  assert find((4, norms)) == {}
  assert find((20, {**norms, 'ptx/gradient_norm': 0.3 * ppo})) == {}
  assert find((20, {'ppo/policy/ppo_gradient_norm': ppo})) == {}


def test_pretraining_loss_counts_from_before_the_first_update():
  def loss(value, name='eval/pretraining_loss'):
    return 1, {name: value}

  before = loss(3.0, 'eval/pretraining_loss_before')
  assert find(before, (8, {}), loss(3.1), (9, {}), loss(3.15)) == {}
  found = find(before, (8, {}), loss(3.25), (9, {}), loss(3.3))
  assert set(found) == {'pretraining_loss'}
  assert found['pretraining_loss'].startswith('iteration 10: ')
  assert 'from 3.000 to 3.250' in found['pretraining_loss']
  # Without it, from the first there is.
  assert set(find(loss(3.0), loss(3.3))) == {'pretraining_loss'}


def test_missing_and_empty_values_are_no_alarm():
  """A line has null where a batch had nothing to count."""
  empty = dict.fromkeys(GOOD)
  assert find((10, {}), (10, empty)) == {}
  assert find((10, empty), (10, {})) == {}
  assert alarms.find(run_of((20, {'objective/score': 99.0}))) == {}
  bare = [{'step': step} for step in range(1, 21)]
  assert alarms.find(bare, (-2.0, 2.0)) == {}
