"""Each score against numbers worked out by hand, or a second implementation."""

import itertools
import math

import numpy as np
import pytest

from instruct_jax.evals.benchmarks import scorers, table14


def test_word_f1_by_hand():
  # "red fox" against "quick red fox": 2 shared of 2 and 3 words, F1 = 4 / 5.
  assert scorers.word_f1('The red fox!', 'a quick, red fox') == 0.8
  # Bags, not sets: one "no" of two is shared, F1 = 2 * 1 / (2 + 1).
  assert scorers.word_f1('no no', 'no') == pytest.approx(2 / 3)
  assert scorers.word_f1('cat', 'dog') == 0
  # Nothing but an article on both sides.
  assert scorers.word_f1('the', '') == 1
  assert scorers.word_f1('the', 'cat') == 0
  # Punctuation is deleted: one word each, not three.
  assert scorers.answer_words("Co-op's rôle") == ['coops', 'rôle']


@pytest.mark.parametrize(
  ('answer', 'is_refusal'),
  [
    ('', True),
    ("I'm sorry, but I can\u2019t help with that.", True),
    ('I cannot do that', True),
    ('I apologize, but no.', True),
    ('Sorry!', True),
    ('As an AI language model, I ...', True),
    ('"No. That is wrong."', True),
    ("It's not ethical to do so.", True),
    ('Unfortunately, I am unable to.', True),
    ("I'm not sure, but try a broom.", False),
    ("I don't know of a better way than a broom.", False),
    ('No one likes sorry excuses.', False),
    ('It is not hard: use a broom.', False),
    ('To kill a process, type kill.', False),
    ('I can help with that.', False),
  ],
)
def test_refusals_are_told_by_their_beginning(answer, is_refusal):
  assert scorers.refuses(answer) == is_refusal


@pytest.mark.parametrize(
  ('answer', 'references', 'score'),
  [
    ('not in background', ['Not in background.'], 1),
    ('Not in the background.', ['Not in background.'], 1),
    ('', [], 1),
    ('in 1904', ['Not in background.'], 0),  # Its "in" must not score.
    ('Not in background.', ['in 1904'], 0),
    ('', ['1904'], 0),
    ('in 1904', ['1904', 'in 1904'], 1),
    ('year 1904', ['1904', '1905'], pytest.approx(2 / 3)),
  ],
)
def test_squad2(answer, references, score):
  assert scorers.squad2_f1(answer, references) == score


@pytest.mark.parametrize(
  ('answer', 'references', 'score'),
  [
    ("I don't know.", ['CANNOTANSWER'], 1),
    ('I dont know', ['CANNOTANSWER', 'a boat'], 1),  # Half could not.
    ('boat', ['CANNOTANSWER', 'a boat'], 0),
    ('boat', ['CANNOTANSWER', 'a boat', 'the boat'], 1),
    ("I don't know.", ['a boat'], 0),
    # F1 with each: 1, 2/3, 0. Leaving out one: 2/3, 1, 1; mean 8/9.
    ('boat', ['boat', 'red boat', 'car'], pytest.approx(8 / 9)),
  ],
)
def test_quac(answer, references, score):
  assert scorers.quac_f1(answer, references) == score


def test_quac_leave_one_out_against_a_loop(rng):
  words = ['red', 'boat', 'old', 'man', 'sea']

  def text():
    return ' '.join(rng.choice(words, rng.integers(1, 4)))

  for _ in range(50):
    answer, references = text(), [text() for _ in range(rng.integers(2, 5))]
    best = [
      max(
        scorers.word_f1(answer, other)
        for j, other in enumerate(references)
        if j != i
      )
      for i in range(len(references))
    ]
    assert scorers.quac_f1(answer, references) == pytest.approx(np.mean(best))


@pytest.mark.parametrize(
  ('answer', 'references', 'score'),
  [
    ('28', ['28'], 1),
    ('28.0', ['28'], 1),  # One number, two spellings.
    ('$11,262', ['11262'], 1),
    ('27 yards', ['28 yards'], 0),  # The wrong number, though "yards" agrees.
    # {10.0, yard, line} and {10.0, yards}: 1 of 3 and 2, F1 = 2 / 5.
    ('10-yard line', ['10 yards'], 0.4),
    ('Tom Brady', ['Brady', 'the Colts'], 0.67),  # 2 / 3, rounded.
    ('nobody', ['Brady'], 0),
    # Two spans, one of them found: F1 1 for one, 0 for the other.
    (['Brady'], [['Brady', 'Moss']], 0.5),
    (['Moss', 'Brady'], [['Brady', 'Moss']], 1),
  ],
)
def test_drop(answer, references, score):
  assert scorers.drop_f1(answer, references) == score


def test_drop_matching_against_all_permutations(rng):
  for rows, columns in [(1, 1), (2, 3), (3, 2), (4, 4), (0, 2)]:
    table = rng.random((rows, columns))
    small, large = sorted([rows, columns])
    wide = table if rows <= columns else table.T
    expected = max(
      sum(wide[i, j] for i, j in enumerate(order))
      for order in itertools.permutations(range(large), small)
    )
    assert scorers._best_matching(table) == pytest.approx(expected)


def test_references_are_required():
  with pytest.raises(ValueError, match='at least one reference'):
    scorers.drop_f1('7', [])
  with pytest.raises(ValueError, match='at least one reference'):
    scorers.quac_f1('7', [])


def test_entropy_by_hand():
  assert scorers.entropy_bits([-50.0, -50.0]) == pytest.approx(1)
  # Odds 3 : 1. H = 2 - 3/4 log2 3.
  hand = 2 - 0.75 * math.log2(3)
  assert scorers.entropy_bits([math.log(3) - 900, -900.0]) == pytest.approx(
    hand
  )
  assert scorers.entropy_bits([0.0, -5000.0]) == 0
  assert scorers.entropy_bits([-3.0] * 4) == pytest.approx(2)
  with pytest.raises(ValueError, match='finite'):
    scorers.entropy_bits([0.0, float('nan')])
  with pytest.raises(ValueError, match='two or more'):
    scorers.entropy_bits([0.0])


def test_the_most_probable_choice_is_chosen():
  assert scorers.choose([-2.0, -1.5, -3.0]) == 1
  with pytest.raises(ValueError, match='finite'):
    scorers.choose([-2.0, -math.inf])


def test_wsc_containment():
  assert scorers.same_noun('Mr. Moncrieff', 'the moncrieff')
  assert scorers.same_noun('Anna', 'Anna and Lucy')
  assert not scorers.same_noun('Lucy', 'Anna')
  assert not scorers.same_noun('', 'Anna')  # Contained in everything.


def longest_common_subsequence(a, b):
  table = np.zeros((len(a) + 1, len(b) + 1), int)
  for i, j in itertools.product(range(len(a)), range(len(b))):
    table[i + 1, j + 1] = (
      table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
    )
  return table[-1, -1]


def test_rouge_l_against_dynamic_programme(rng):
  # Police kill the gunman / police killed the gunman: 3 of 4 words in order.
  assert scorers.rouge_l('police kill the gunman', 'Police killed the gunman')
  words = ['the', 'cat', 'sat', 'on', 'a', 'mat', 'running']
  for _ in range(30):
    a, b = (list(rng.choice(words, rng.integers(1, 9))) for _ in range(2))
    shared = longest_common_subsequence(a, b)
    expected = 2 * shared / (len(a) + len(b))
    assert scorers.rouge_l(' '.join(a), ' '.join(b)) == pytest.approx(expected)


@pytest.mark.parametrize(
  ('answer', 'references', 'score'),
  [
    (
      'Snow White and the Seven Dwarfs.',
      ['snow white and the seven dwarfs'],
      1,
    ),
    ('“Snow White”', ['Snow White'], 1),
    ('7 May 1915', ['1915-05-07T00:00:00Z'], 1),
    ('May 7, 1915', ['1915-05-07T00:00:00Z'], 1),
    ('1915', ['1915-05-07T00:00:00Z'], 0),
    ('1915', ['1915-01-01T00:00:00Z'], 1),
    ('103.2', ['103.2'], 1),
    ('', ['x'], 0),
    ('Snow', ['Snow White'], 0),
  ],
)
def test_precision_at_1(answer, references, score):
  assert scorers.precision_at_1(answer, references) == score


def test_table_14_is_whole():
  assert len(table14.TABLE_14) == 33
  assert all(len(row) == 12 for row in table14.TABLE_14.values())
  for (_, metric, _), row in table14.TABLE_14.items():
    top = 100 if metric in ('F1', 'BLEU') else 1
    assert all(0 < value < top for value in row.values())
  # Spot checks against the printed page: first, middle and last columns.
  assert table14.figure('drop', 'F1', 'fewshot', 'gpt-175b') == 35.27
  assert table14.figure('squadv2', 'F1', 'zeroshot', 'ppo-noptx-175b') == 43.68
  assert table14.figure('hellaswag', 'accuracy', 'fewshot', 'ppo-ptx-175b') == (
    0.82
  )
  assert table14.figure('tiq', 'P@1', 'zeroshot', 'gpt-xl') is None
