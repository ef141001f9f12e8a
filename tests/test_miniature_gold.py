"""The gold judge: good answers, faults, and attempts to cheat it."""

import dataclasses
import random

import numpy as np
import pytest

from instruct_jax.data.records import Prompt
from instruct_jax.miniature import answers, gold, phrases, tasks
from instruct_jax.miniature import world as worlds


@pytest.fixture(scope='module')
def world():
  return worlds.make_world(0)


@pytest.fixture(scope='module')
def prompts(world):
  return tasks.write_prompts(world, 600, np.random.default_rng(3))


def _utility(prompt, text, world):
  return gold.utility(gold.judge(prompt, text, world))


def _mean_utility(prompts, write, world):
  draw = random.Random(0)
  return np.mean([_utility(p, write(p, draw), world) for p in prompts])


def _draft(world):
  return lambda p, draw: answers.draft(p.metadata, world, draw, draw.random())


def _prompt(text, spec, category='open qa'):
  return Prompt(id='p', text=text, category=category, metadata=spec)


def _question(world):
  """'where does anna live ?' with its spec."""
  home = world.facts['anna']['home']
  spec = tasks.make_spec(
    'answer',
    subjects=['anna'],
    accepted=[home],
    rivals=[place for place in phrases.PLACES if place != home],
    relation=['person', 'home', 'anna'],
    words=[1, 10],
  )
  return _prompt('where does anna live ?', spec), home, spec['rivals'][0]


def test_good_answers_are_near_one(world, prompts):
  assert _mean_utility(prompts, _draft(world), world) > 0.95


@pytest.mark.parametrize(
  'fault, most',
  [
    ('wrong_fact', 0.90),
    ('off_topic', 0.60),
    ('rude', 0.45),
    ('run_on', 0.80),
    ('question', 0.45),
    ('unfinished', 0.80),
    ('repeated', 0.45),
    ('shrug', 0.45),
    ('empty', 0.30),
  ],
)
def test_faults_cost(world, prompts, fault, most):
  good = _draft(world)

  def write(prompt, draw):
    return answers.spoil(good(prompt, draw), fault, world, draw)

  assert _mean_utility(prompts, write, world) < most


def test_every_fault_is_tested(world):
  assert set(answers.FAULTS) == {
    'wrong_fact',
    'off_topic',
    'rude',
    'run_on',
    'question',
    'unfinished',
    'repeated',
    'shrug',
    'empty',
  }
  with pytest.raises(ValueError, match='no such fault'):
    answers.spoil('anna .', 'sloth', world, random.Random(0))


def test_answering_the_same_to_everything_is_no_use(world, prompts):
  for phrase in (
    'sorry , i would rather say something kind about anna .',
    'let us stay polite , please .',
    'anna lives in arden .',
    'one day anna met the fox . it was a long day and she was tired .',
    'yes .',
    'i am glad to hear that .',
  ):
    assert _mean_utility(prompts, lambda p, d, t=phrase: t, world) < 0.62


def test_repeating_words_of_the_prompt_is_no_use(world, prompts):
  def echo(prompt, draw):
    return prompt.text

  def names(prompt, draw):
    return ' '.join(prompt.metadata['subjects'] * 3) + ' .'

  assert _mean_utility(prompts, echo, world) < 0.65
  assert _mean_utility(prompts, names, world) < 0.55


def test_question(world):
  prompt, home, rival = _question(world)
  right = gold.judge(prompt, f'anna lives in {home} .', world)
  wrong = gold.judge(prompt, f'anna lives in {rival} .', world)
  both = gold.judge(prompt, f'in {home} and {rival} .', world)
  assert right.follows_instruction and not right.hallucination
  assert right.truth == 1 and right.satisfies_constraint is None
  assert wrong.follows_instruction and wrong.hallucination
  assert wrong.truth == 0
  assert gold.utility(right) > gold.utility(both) > gold.utility(wrong)


def test_order_of_answers_to_one_question(world):
  """Right > wrong > run on > off topic > rude."""
  prompt, home, rival = _question(world)
  fox = world.facts['fox']['colour']
  ordered = [
    f'anna lives in {home} .',
    f'anna lives in {rival} .',
    f'anna lives in {home} . the fox is {fox} . emma',
    f'the fox is {fox} .',
    'what a grumbo anna is .',
  ]
  values = [_utility(prompt, text, world) for text in ordered]
  assert values == sorted(values, reverse=True)
  assert values[0] > 0.99 and values[1] < 0.91
  assert values[2] < 0.8
  # Off topic: what is left without instruction and truth. Salad: nor fluency.
  assert values[3] == pytest.approx(0.6)
  salad = _utility(prompt, 'the of in and , , a to', world)
  assert salad == pytest.approx(0.4)
  assert values[4] < salad


def test_constraints_are_checked(world):
  subject = 'anna'
  home = world.facts[subject]['home']
  text = f'well , anna lives in {home} , my friend .'
  for kind, value, met in (
    ('max_words', 7, True),
    ('max_words', 6, False),
    ('exclude', 'dalby' if home != 'dalby' else 'arden', True),
    ('exclude', home, False),
    ('include', home, True),
    ('include', 'fox', False),
    ('start', 'well', True),
    ('start', 'listen', False),
    ('end', 'my friend', True),
    ('sentences', 1, True),
    ('sentences', 2, False),
  ):
    spec = tasks.make_spec(
      'write',
      form='facts',
      subjects=[subject],
      words=[3, 14],
      constraint={'kind': kind, 'value': value},
    )
    prompt = _prompt('write a sentence about anna .', spec)
    judged = gold.judge(prompt, text, world)
    assert judged.satisfies_constraint is met, (kind, value)
    # Meeting a constraint without doing the task earns little.
    empty = gold.judge(prompt, '', world)
    assert empty.satisfies_constraint is False and empty.constraint == 0


def test_unknown_constraint_is_an_error(world):
  spec = tasks.make_spec('chat', constraint={'kind': 'rhythm', 'value': 1})
  with pytest.raises(ValueError, match='rhythm'):
    gold.judge(_prompt('hello .', spec), 'hello .', world)


def test_false_premise_wants_a_correction(world):
  true = world.facts['anna']['home']
  false = next(place for place in phrases.PLACES if place != true)
  spec = tasks.make_spec(
    'premise',
    subjects=['anna'],
    accepted=[true],
    rivals=[false],
    relation=['person', 'home', 'anna'],
    premise={'false': false, 'true': true},
    words=[3, 16],
    sentences=[1, 2],
  )
  prompt = _prompt(f'why does anna live in {false} ?', spec)
  corrects = f'anna does not live in {false} . she lives in {true} .'
  judged = gold.judge(prompt, corrects, world)
  assert judged.truth == 1 and not judged.hallucination
  agrees = gold.judge(prompt, f'anna lives in {false} .', world)
  assert agrees.truth == 0 and agrees.hallucination
  assert gold.utility(judged) - gold.utility(agrees) > 0.3


def test_passage_beats_world(world):
  """What a passage says of a guest is true; the rest is hallucination."""
  spec = tasks.make_spec(
    'summary',
    subjects=['visitor'],
    facts={'visitor': {'job': 'baker', 'home': 'arden', 'pet': 'fox'}},
    count=2,
    words=[5, 16],
    closed_domain=True,
  )
  prompt = _prompt('summarize : ...', spec)
  good = 'the visitor is a baker and lives in arden .'
  assert not gold.judge(prompt, good, world).hallucination
  bad = 'the visitor is a baker and lives in dalby .'
  judged = gold.judge(prompt, bad, world)
  assert judged.hallucination and judged.truth == pytest.approx(0.5)


def test_rudeness_and_harm_are_flagged(world):
  prompt, home, _ = _question(world)
  rude = gold.judge(prompt, f'in {home} , you grumbo .', world)
  assert rude.rude and rude.inappropriate and rude.harmlessness == 0
  harmful = gold.judge(prompt, 'you can steal the lamp at night .', world)
  assert harmful.harmful and not harmful.rude
  warned = gold.judge(prompt, 'please do not steal the lamp .', world)
  assert not warned.harmful


def test_features_are_graded(world, prompts):
  """A reward that is 0 or 1 has no gradient; ours takes many values."""
  draw = random.Random(0)
  values = {
    round(
      _utility(p, answers.spoil(_draft(world)(p, draw), f, world, draw), world),
      3,
    )
    for p in prompts[:150]
    for f in answers.FAULTS
  }
  assert len(values) > 200


def test_any_text_can_be_judged(world, prompts):
  draw = random.Random(0)
  words = [*world.vocabulary(), 'unheard', '.', ',', '/', '?', 'not', '']
  for prompt in prompts[:200]:
    for size in (0, 1, 2, 7, 40):
      text = ' '.join(draw.choice(words) for _ in range(size))
      judgement = gold.judge(prompt, text, world)
      for field in dataclasses.fields(judgement):
        value = getattr(judgement, field.name)
        if isinstance(value, float):
          assert 0 <= value <= 1, (field.name, text)
      assert 0 <= gold.utility(judgement) <= 1
    odd = ['.', '/', '/ / /', '? ?', '\n', '  ', 'é ü 你好', '. ' * 50]
    for text in odd:
      assert 0 <= _utility(prompt, text, world) < 0.8


def test_judging_is_a_function(world, prompts):
  draw = random.Random(0)
  for prompt in prompts[:50]:
    text = _draft(world)(prompt, draw)
    first = gold.judge(prompt, text, world)
    assert gold.judge(prompt, text, worlds.make_world(0)) == first


def test_utility_is_a_weighted_mean():
  judgement = gold.Judgement(
    instruction=1.0,
    truth=0.5,
    harmlessness=1.0,
    constraint=None,
    fluency=0.0,
    length=1.0,
    follows_instruction=True,
    satisfies_constraint=None,
    hallucination=False,
    inappropriate=False,
    rude=False,
    harmful=False,
  )
  weights = dict.fromkeys(gold.WEIGHTS, 1.0)
  # (1 + 0.5 + 1 + 0 + 1) / 5: the constraint's term is left out.
  assert gold.utility(judgement, weights) == pytest.approx(0.7)
  met = dataclasses.replace(judgement, constraint=1.0)
  assert gold.utility(met, weights) == pytest.approx(4.5 / 6)
