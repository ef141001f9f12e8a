"""The model card: its figures come from the run, its gaps are named."""

import dataclasses

import pytest

from instruct_jax.evals import model_card, win_rate
from tests.made_figures import full, minimal


def test_sections_and_figures_are_there():
  shown = full(title='a <run>')
  card = model_card.make_card(shown)
  for section in (
    '## Details',
    '## Use',
    '## Data',
    '### Labelers',
    '## Training',
    '### Compute',
    '## Performance',
    '## Limitations',
    '### Of these models',
    '### Of the method',
    '## Not evaluated',
  ):
    assert f'\n{section}\n' in card
  assert '| my_fork | 1,000,000 parameters |' in card
  assert 'kl_coef 0.02' in card
  assert '1.00e+00' in card  # 8.64e19 operations are a petaflop/s-day.
  assert 'a &#60;run&#62;' in card
  for rate in shown.outcomes.rates.values():
    assert f'{rate.rate:.3f}' in card
  for likert in shown.likert().values():
    assert f'{likert.mean:.3f} [{likert.low:.3f}' in card


def test_programs_are_not_presented_as_people():
  shown = full()
  card = model_card.make_card(shown)
  assert 'programs with tastes' in card
  assert 'preferences of people' in card
  people = dataclasses.replace(shown.world, has_people=True)
  for world in (people, None):  # None: nothing is known of the data.
    card = model_card.make_card(dataclasses.replace(shown, world=world))
    assert 'programs with tastes' not in card
    assert 'preferences of people' not in card


def test_what_was_not_measured_is_named():
  def missing(shown):
    return model_card.make_card(shown).split('## Not evaluated')[1]

  nothing = missing(minimal())
  for text in (
    'reward-model accuracy',
    'loss on pretraining text',
    'public NLP suite',
    'overall quality, 1 to 7',
  ):
    assert text in nothing
    assert (text in missing(full())) == (text == 'public NLP suite')


def test_the_suite_is_a_table_of_models():
  interval = win_rate.Interval
  shown = full(
    suite={
      'drop, zeroshot, F1': {'sft': interval(12.0, 10.0, 14.0, 50)},
      'truthful_qa, qa, true': {
        'sft': interval(0.5, 0.4, 0.6, 30),
        'my_fork': interval(0.25, 0.2, 0.3, 30),
      },
    },
    suite_judges={'truthful_qa': 'a local | scorer'},
  )
  card = model_card.make_card(shown)
  assert '| task | sft | my_fork |' in card
  assert '| drop, zeroshot, F1 | 12.000 [10.000, 14.000] | – |' in card
  assert '| 0.250 [0.200, 0.300] |' in card
  assert 'truthful_qa is judged by a local &#124; scorer.' in card
  assert 'NLP suite' not in card.split('## Not evaluated')[1]


def test_labelers_of_the_labeling_site_are_described():
  rate = {'rate': 0.725, 'low': 0.7, 'high': 0.75, 'num_pairs': 1234}
  statistics = {
    'num_labelers': 2,
    'num_answers': 77,
    'by_kind': {'ranking': 70, 'demonstration': 7},
    'instructions': ['training/1', 'training/2'],
    'agreement': {'labelers': rate, 'researchers': None},
    'labelers': [
      {
        'name': 'anna',
        'role': 'labeler',
        'answers': 40,
        'median_seconds': 93.5,
        'tie_rate': 0.125,
        'skip_rate': None,
        'agreement': rate,
        'with_researchers': None,
      }
    ],
  }
  card = model_card.make_card(full(labeling=statistics))
  assert '| labelers | 2 |' in card
  assert '| answers of kind demonstration | 7 |' in card
  assert 'training/1, training/2' in card
  assert '0.725 [0.700, 0.750], 1,234 pairs' in card
  assert '| anna | labeler | 40 | 93.500 | 0.125 | – |' in card
  assert 'programs with tastes' not in card
  # The judge is still a program.
  assert 'all judgements are by programs' in card


def test_operations_by_hand():
  assert model_card.training_operations(10, 5) == 300
  assert model_card.training_operations(10, 5, has_adapters=True) == 200
  # 3 policy and 2 scalar forwards, 2 x 3 x 100 + 2 x 2 x 10 = 640 a token;
  # updates 6 x 110 = 660 an epoch; 4 tokens: (640 + 2 x 660) x 4 = 7,840;
  # and 6 x 100 x 7 = 4,200 for the text.
  operations = model_card.rl_operations(100, 10, 10, 2, 2, 2, 7)
  assert operations == 7_840 + 4_200
  # With adapters updates are 4 x 110 an epoch, and text 4 x 100 x 7.
  operations = model_card.rl_operations(100, 10, 10, 2, 2, 2, 7, True)
  assert operations == 6_080 + 2_800
  # Without reward and value model, 4 tokens: (2 x 300 + 2 x 600) x 4 = 7,200.
  assert model_card.rl_operations(100, 0, 0, 2, 2, 2, 0) == 7_200
  assert model_card.petaflop_days(8.64e19) == pytest.approx(1)


def test_the_papers_compute_comes_out():
  # 175B (paper 5.1): SFT 4.9 petaflop/s-days, PPO-ptx 60. Lengths are not
  # printed; full contexts of 2,048 give 5.1 for 16 epochs of 12,725
  # demonstrations. RL: 256,000 episodes of some 400 tokens, 6B reward and value
  # models, and eight full contexts of text for each.
  sft = model_card.training_operations(175e9, 16 * 12_725 * 2048)
  assert model_card.petaflop_days(sft) == pytest.approx(4.9, rel=0.05)
  rl = model_card.rl_operations(
    175e9, 6e9, 6e9, 256_000, 400, 1, 256_000 * 8 * 2048
  )
  assert model_card.petaflop_days(rl) == pytest.approx(60, rel=0.15)
