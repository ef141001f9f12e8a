"""Variety of answers, by hand."""

import pytest

from instruct_jax.evals import variety


def test_distinct_by_hand():
  # Words a b a b: 2 of 4; pairs ab ba ab: 2 of 3.
  assert variety.distinct(['a b a b'], 1) == 2 / 4
  assert variety.distinct(['a b a b'], 2) == 2 / 3
  assert variety.distinct(['a b', 'a b'], 2) == 1 / 2
  assert variety.distinct(['a'], 2) == 0  # No pair at all.


def test_a_row_has_the_commonest_answer_and_what_labelers_ranked():
  row = variety.describe(['yes', 'no', ' yes', 'yes'], [' yes ', 'maybe'])
  assert row['commonest answer'] == 1 / 2 and row['which is'] == 'yes'
  assert row['ranked by labelers'] == 3 / 4
  assert 'ranked by labelers' not in variety.describe(['yes'], [])


@pytest.mark.parametrize(
  ('usual', 'alarming'),
  [(1, True), (2, True), (3, False)],  # Three times 3 % is 9 %.
)
def test_an_alarm_names_the_answer_that_took_over(usual, alarming):
  texts = {
    'sft': ['yes'] * usual + [str(i) for i in range(100 - usual)],
    'ppo': ['love'] * 8 + [str(i) for i in range(92)],
  }
  found = variety.alarms({'ppo': texts['ppo']}, texts['sft'])
  assert len(found) == alarming
  if alarming:
    assert "8.0% of the answers of ppo are the same, 'love'" in found[0]


def test_four_in_a_hundred_are_not_common():
  texts = {
    'sft': [str(i) for i in range(100)],
    'ppo': list('abcdefghijklmnopqrstuvwxy') * 4,
  }
  assert not variety.alarms({'ppo': texts['ppo']}, texts['sft'])
