"""Rates, length control, ratings and power against hand-made numbers."""

import dataclasses
import math

import numpy as np
import pytest

from instruct_jax.evals import preferences, win_rate


def judgement(prompt, model, other, outcome, ratio=0.0, labeler='', cat=''):
  return preferences.Judgement(
    prompt, cat, model, other, outcome, ratio, labeler
  )


@pytest.mark.parametrize(
  ('first', 'swapped', 'outcome', 'contradicts'),
  [
    (1.0, 0.0, 1.0, False),  # Both orders prefer the same answer.
    (0.0, 1.0, 0.0, False),
    (1.0, 1.0, 0.5, True),  # Always the one shown first.
    (0.0, 0.0, 0.5, True),
    (0.5, 0.5, 0.5, False),
    (1.0, 0.5, 0.75, False),
    (0.5, 0.0, 0.75, False),
  ],
)
def test_both_orders(first, swapped, outcome, contradicts):
  assert preferences.both_orders(first, swapped) == (outcome, contradicts)


def test_prompts_have_equal_weight_however_many_people_judged():
  # Prompt a: three of three for x. Prompt b: one of one against it.
  rows = [
    judgement('a', 'x', 'sft', 1.0, labeler=name) for name in ('u', 'v', 'w')
  ] + [judgement('b', 'x', 'sft', 0.0, labeler='u')]
  found = preferences.rates(rows)
  assert found.rate == pytest.approx(0.5)
  assert found.by_labeler.mean == pytest.approx(0.5)
  assert found.num_prompts == 2
  assert found.by_labeler.num_clusters == 3
  assert found.num_judgements == 4


def test_one_labeler_has_no_interval_by_labeler():
  assert preferences.rates([judgement('a', 'x', 'y', 1.0)]).by_labeler is None


def test_ties_count_one_half_and_samples_of_a_prompt_share_its_weight():
  # Prompt a: 1, 0 and a tie: 0.5. Prompt b: one win. (0.5 + 1) / 2 = 0.75.
  rows = [judgement('a', 'x', 'y', each) for each in (1.0, 0.0, 0.5)]
  found = preferences.rates([*rows, judgement('b', 'x', 'y', 1.0)])
  assert (found.rate, found.num_prompts) == (0.75, 2)
  assert found.low == 0.5 and found.high == 1.0


def test_rates_redraw_prompts(rng):
  outcomes = rng.integers(0, 3, 200) / 2
  found = preferences.rates(
    [judgement(str(i), 'x', 'y', y) for i, y in enumerate(outcomes)]
  )
  plain = win_rate.mean_interval(outcomes, range(200))
  assert (found.rate, found.low, found.high) == pytest.approx(
    (plain.mean, plain.low, plain.high)
  )


def test_labelers_who_differ_widen_the_interval():
  # Each of two labelers always answers the same: 100 prompts hide it.
  rows = [
    judgement(str(i), 'x', 'y', float(i % 2), labeler=str(i % 2))
    for i in range(100)
  ]
  found = preferences.rates(rows)
  assert found.high - found.low < 0.25
  assert (found.by_labeler.low, found.by_labeler.high) == (0.0, 1.0)


def test_nameless_judgements_have_no_interval_by_labeler():
  rows = [judgement('a', 'x', 'y', 1.0, labeler=n) for n in ('u', 'v', '')]
  assert preferences.rates(rows).by_labeler is None
  assert preferences.rates(rows[:2]).by_labeler is not None


def shown_twice(prompt, first, swapped):
  outcome, contradicts = preferences.both_orders(first, swapped)
  return preferences.Judgement(
    prompt, '', 'x', 'y', outcome, 0.0, contradicts=contradicts,
    orders=(preferences.Order('x', first), preferences.Order('y', swapped)),
  )  # fmt: skip


def test_the_first_place_by_hand():
  # Verdicts for the first place: 1 and 1; 1 and 0; 1 and a tie; 0 and 1.
  rows = [
    shown_twice('a', 1.0, 1.0),
    shown_twice('b', 1.0, 0.0),
    shown_twice('c', 1.0, 0.5),
    shown_twice('d', 0.0, 1.0),
  ]
  found = preferences.first_place(rows)
  assert found.rate.mean == (1 + 0.5 + 0.75 + 0.5) / 4
  assert (found.ties, found.contradictions) == (1 / 8, 1 / 4)
  assert found.num_verdicts == 8
  # A judge that ignores the order has one half, whoever is better.
  fair = preferences.first_place(
    [shown_twice(str(i), 1.0, 0.0) for i in range(9)]
  )
  assert (fair.rate.low, fair.rate.high) == (0.5, 0.5)
  assert not fair.is_biased
  blind = [shown_twice(str(i), 1.0, 1.0) for i in range(9)]
  assert preferences.first_place(blind).is_biased
  assert preferences.first_place([judgement('a', 'x', 'y', 1.0)]) is None
  half = dataclasses.replace(rows[0], outcome=None, orders=rows[0].orders[:1])
  assert preferences.first_place([half]) is None


def test_against_turns_judgements():
  rows = [
    judgement('a', 'sft', 'x', 1.0, 0.7),
    judgement('b', 'x', 'sft', 1.0, 0.2),
    judgement('c', 'x', 'y', 1.0),
  ]
  found = preferences.against(rows, 'sft')
  assert set(found) == {'x'}
  assert [row.outcome for row in found['x']] == [0.0, 1.0]
  assert [row.log_length_ratio for row in found['x']] == [-0.7, 0.2]
  with pytest.raises(ValueError, match="baseline 'z'.*'sft', 'x', 'y'"):
    preferences.against(rows, 'z')


def test_categories():
  rows = [
    judgement('a', 'x', 'y', 1.0, cat='chat'),
    judgement('b', 'x', 'y', 0.0, cat='open qa'),
  ]
  found = preferences.rates_by_category(rows)
  assert {name: rate.rate for name, rate in found.items()} == {
    'chat': 1.0,
    'open qa': 0.0,
  }


def test_length_control_finds_the_rate_at_equal_length(rng):
  # The judge's log-odds are 0.4 + 1.5 x, and the model writes much longer.
  ratios = rng.normal(0.8, 0.5, 6000)
  probs = 1 / (1 + np.exp(-(0.4 + 1.5 * ratios)))
  wins = (rng.random(6000) < probs).astype(float)
  rows = [
    judgement(str(i), 'x', 'sft', w, r)
    for i, (w, r) in enumerate(zip(wins, ratios, strict=True))
  ]
  found = preferences.length_controlled({'x': rows}, num_bootstrap=100)
  rate = found.rates['x']
  truth = 1 / (1 + math.exp(-0.4))
  assert wins.mean() > truth + 0.1
  assert rate.low < truth < rate.high and rate.high - rate.low < 0.1
  assert found.slope.low < 1.5 < found.slope.high


def test_length_control_without_difference_is_the_plain_rate():
  # Equal lengths: σ(θ) is the mean, 3 of 4, up to the ridge.
  rows = [judgement(str(i), 'x', 'y', float(i % 4 > 0)) for i in range(400)]
  found = preferences.length_controlled({'x': rows}, num_bootstrap=20)
  assert found.rates['x'].mean == pytest.approx(0.75, abs=1e-4)
  assert found.slope.mean == pytest.approx(0, abs=1e-9)


def test_bradley_terry_recovers_odds():
  # x beats y 3 of 4 times: ln 3 apart; y beats z 2 of 3 times: ln 2.
  rows = [judgement(f'a{i}', 'x', 'y', float(i % 4 > 0)) for i in range(800)]
  rows += [judgement(f'b{i}', 'y', 'z', float(i % 3 > 0)) for i in range(900)]
  found = preferences.bradley_terry(rows, 'y', num_bootstrap=50)
  assert list(found) == ['x', 'y', 'z']
  assert found['y'].mean == found['y'].low == 0
  assert found['x'].mean == pytest.approx(math.log(3), abs=2e-3)
  assert found['z'].mean == pytest.approx(-math.log(2), abs=2e-3)
  assert found['x'].low < math.log(3) < found['x'].high


def test_bradley_terry_of_a_model_that_always_wins_is_finite():
  rows = [judgement(str(i), 'x', 'y', 1.0) for i in range(50)]
  rating = preferences.bradley_terry(rows, 'y', num_bootstrap=20)['x']
  assert 2 < rating.mean < 20


def test_bradley_terry_names_what_is_not_linked():
  rows = [judgement('a', 'x', 'y', 1.0), judgement('b', 'u', 'v', 1.0)]
  with pytest.raises(ValueError, match=r"\['u', 'v'\] with 'x'"):
    preferences.bradley_terry(rows, 'x')


def test_power_by_hand():
  # 6 wins of 10: s² = 10/9 · 0.24 = 0.26667, distance 0.1.
  # (1.959964)² · 0.26667 / 0.01 = 102.4; (2.801585)² · 26.667 = 209.3.
  rows = [judgement(str(i), 'x', 'y', float(i < 6)) for i in range(10)]
  found = preferences.power(rows)
  assert found.rate == pytest.approx(0.6)
  assert found.deviation == pytest.approx(math.sqrt(0.24 * 10 / 9))
  assert (found.to_separate, found.for_power) == (103, 210)


def test_power_of_a_tie_is_not_a_number():
  rows = [judgement(str(i), 'x', 'y', float(i % 2)) for i in range(10)]
  assert preferences.power(rows).to_separate is None
  with pytest.raises(ValueError, match='1 prompts'):
    preferences.power(rows[:1])


def test_an_interval_of_the_size_asked_for_just_separates():
  rows = [judgement(str(i), 'x', 'y', float(i % 5 < 3)) for i in range(100)]
  needed = preferences.power(rows).to_separate
  more = [judgement(str(i), 'x', 'y', float(i % 5 < 3)) for i in range(needed)]
  low = preferences.rates(more).low
  assert abs(low - 0.5) < 0.03


def test_empty_answers_have_a_length_ratio():
  assert preferences.length_ratio(0, 10) == pytest.approx(-math.log(10))


def test_outcomes_of_several_models():
  # On 4 prompts each: x beats the baseline on 3, y on none; x beats y always.
  rows = [judgement(str(i), 'x', 'sft', float(i > 0)) for i in range(4)]
  rows += [judgement(str(i), 'sft', 'y', 1.0) for i in range(4)]
  rows += [judgement(str(i), 'x', 'y', 1.0, cat='chat') for i in range(4)]
  rows += [judgement('0', 'x', 'a stranger', 0.0)]  # Left out.
  found = preferences.outcomes(rows, ['y', 'sft', 'x'], 'sft', 50)
  assert {name: rate.rate for name, rate in found.rates.items()} == {
    'y': 0.0,
    'sft': 0.5,
    'x': 0.75,
  }
  assert list(found.rates) == ['y', 'sft', 'x']
  assert set(found.by_category) == {'x', 'y'}
  assert set(found.by_category['x']) == {''}
  assert found.pairs['x', 'y'].rates.rate == 1.0
  assert list(found.bradley_terry) == ['x', 'sft', 'y']
  assert found.bradley_terry['sft'].mean == 0
  assert set(found.length_controlled.rates) == {'x', 'y'}
