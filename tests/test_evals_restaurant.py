"""Slots realised, missing, invented; BLEU. We wrote all sentences."""

import pytest
import sacrebleu

from instruct_jax.data import restaurant as data
from instruct_jax.evals import restaurant

_FACTS = (
  'name[The Mill], eatType[coffee shop], food[English], '
  'priceRange[less than £20], customer rating[5 out of 5], area[riverside], '
  'familyFriendly[no], near[Raja Indian Cuisine]'
)


@pytest.mark.parametrize(
  'text',
  [
    'The Mill is a cheap English coffee shop with a customer rating of 5 out '
    'of 5, by the river near Raja Indian Cuisine and not family-friendly.',
    'mill, a highly rated café near RAJA INDIAN CUISINE on the riverside, '
    'serves British food for less than £20 to adults only.',
    'Near Raja Indian Cuisine, the five star coffee shop The Mill offers fish '
    'and chips at low prices. It’s in the riverside area; no children.',
  ],
)
def test_every_slot_is_realised(text):
  slots = dict(data.parse_meaning(_FACTS))
  report = restaurant.slot_report(slots, text)
  assert report == restaurant.SlotReport(tuple(slots), (), ())
  # The same from pairs, as read from JSON.
  pairs = [list(pair) for pair in slots.items()]
  assert restaurant.slot_report(pairs, text) == report


def test_missing_and_invented():
  slots = {
    'name': 'Zizzi',
    'food': 'Chinese',
    'area': 'riverside',
    'familyFriendly': 'yes',
  }
  text = 'Zizzi is an expensive Italian pub in the city centre near Café Rouge.'
  report = restaurant.slot_report(slots, text)
  assert report.realised == ('name',)
  assert report.missing == ('food', 'area', 'familyFriendly')
  assert sorted(report.invented) == [
    'area[city centre]',
    'eatType[pub]',
    'food[italian]',
    'near[cafe rouge]',
    'priceRange[high]',
  ]


@pytest.mark.parametrize(
  ('text', 'invented'),
  [
    # A neighbour's name is no food, no pub and no café.
    ('Zizzi is near Raja Indian Cuisine.', ('near[raja indian cuisine]',)),
    ('Zizzi is near All Bar One.', ('near[all bar one]',)),
    ('Zizzi is near Café Sicilia.', ('near[cafe sicilia]',)),
    # Any place may be called a restaurant.
    ('Zizzi is a restaurant.', ()),
    ('Zizzi is not expensive in stars: 1 out of 5.', ...),
    ('', ()),
  ],
)
def test_what_counts_as_invented(text, invented):
  report = restaurant.slot_report({'name': 'Zizzi'}, text)
  if invented is ...:
    assert 'customer rating[low]' in report.invented
  else:
    assert report.invented == invented


@pytest.mark.parametrize(
  ('slot', 'value', 'text', 'expected'),
  [
    ('priceRange', 'cheap', 'prices are low and the rating is high', True),
    ('priceRange', 'high', 'prices are low and the rating is high', False),
    ('customer rating', 'high', 'prices are low and the rating is high', True),
    (
      'customer rating',
      'low',
      'low price range and a rating of 5 out of 5',
      False,
    ),
    ('customer rating', '3 out of 5', 'an average customer rating', True),
    ('priceRange', '£20-25', 'a moderate price range', True),
    ('priceRange', 'more than £30', 'costs more than £30', True),
    ('priceRange', 'more than £30', 'costs less than £20', False),
    ('familyFriendly', 'yes', 'It is family friendly.', True),
    ('familyFriendly', 'yes', 'It is not far, and family friendly.', True),
    ('familyFriendly', 'no', 'It is not family-friendly.', True),
    ('familyFriendly', 'yes', 'It is not family-friendly.', False),
    ('familyFriendly', 'no', 'Children are not welcome.', True),
    ('familyFriendly', 'yes', 'It is not cheap. Bring the kids.', True),
    ('food', 'Fast food', 'They sell fast food.', True),
    ('eatType', 'restaurant', 'A place to eat.', True),
    ('eatType', 'pub', 'A place to eat.', False),
    ('near', 'Crowne Plaza Hotel', 'by the Crowne Plaza Hotel', True),
    ('near', 'The Sorrento', 'close to Sorrento', True),
    ('name', 'The Eagle', 'Eagles fly over the river', False),
  ],
)
def test_synonyms(slot, value, text, expected):
  report = restaurant.slot_report({slot: value}, text)
  assert (report.realised == (slot,)) == expected
  assert (report.missing == ()) == expected


def test_values_outside_the_data():
  with pytest.raises(ValueError, match="unknown slots \\['colour'\\]"):
    restaurant.slot_report({'colour': 'red'}, 'red')
  with pytest.raises(ValueError, match='outside the data'):
    restaurant.slot_report({'priceRange': 'free'}, 'free')


def test_rates():
  slots = [{'name': 'Zizzi', 'food': 'French'}] * 3
  texts = [
    'Zizzi serves French food.',  # 2 of 2, nothing invented.
    'Zizzi is a pub.',  # 1 of 2, one invented of two stated.
    'A French place in the city centre.',  # 1 of 2, one of two.
  ]
  rates = restaurant.slot_rates(slots, texts, ['a', 'b', 'c'])
  assert rates.realised.mean == pytest.approx(4 / 6)
  assert rates.invented.mean == pytest.approx(2 / 6)
  assert rates.invented_answers.mean == pytest.approx(2 / 3)
  assert rates.faithful.mean == pytest.approx(1 / 3)
  assert rates.realised.low <= 4 / 6 <= rates.realised.high
  nothing = restaurant.slot_rates(slots, ['', '', ''], ['a', 'b', 'c'])
  assert (nothing.realised.mean, nothing.invented.mean) == (0.0, 0.0)


def test_bleu_of_a_reference_is_100():
  references = [
    ['Zizzi is a pub near the river.', 'There is a pub called Zizzi.'],
    ['The Mill serves cheap Italian food.'],
  ]
  texts = [several[0] for several in references]
  result = restaurant.bleu(texts, references, ['a', 'b'])
  assert result.mean == pytest.approx(100)
  assert result.low == pytest.approx(100)
  assert restaurant.bleu(['', ''], references, ['a', 'b']).mean == 0


def test_bleu_is_sacrebleu_with_several_references():
  references = [
    ['Zizzi is a cheap pub near the river.', 'The pub Zizzi is cheap.'],
    ['The Mill serves cheap Italian food by the water.', 'Eat at The Mill.'],
    ['Cocum is a coffee shop with a low rating.', 'Cocum, a café, is bad.'],
  ]
  texts = [
    'Zizzi is a cheap pub by the river.',
    'The Mill serves Italian food and is cheap.',
    'Cocum is a coffee shop rated low.',
  ]
  expected = sacrebleu.corpus_bleu(
    texts, [list(column) for column in zip(*references, strict=True)]
  ).score
  result = restaurant.bleu(texts, references, ['a', 'b', 'c'])
  assert result.mean == pytest.approx(expected)
  assert result.low < result.mean < result.high < 100
  with pytest.raises(ValueError, match='text 0 has no reference'):
    restaurant.bleu(['a'], [[]], ['x'])
  with pytest.raises(ValueError, match='0 texts'):
    restaurant.bleu([], [], [])
