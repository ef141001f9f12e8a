"""The embedded world: facts, claims read back from text, documents."""

import collections

import numpy as np
import pytest

from instruct_jax.miniature import documents, phrases
from instruct_jax.miniature import world as worlds
from instruct_jax.miniature.world import Claim

# Pages that state nothing, and pages that are wrong on purpose. What an exam
# or an answered page quotes ('say the opposite of this : ...') is no statement.
QUOTING = ('exam', 'answered')


@pytest.fixture(scope='module')
def world():
  return worlds.make_world(0)


@pytest.fixture(scope='module')
def pages(world):
  return documents.write_documents(world, 3000, np.random.default_rng(0))


def test_world_has_every_fact_and_depends_on_the_seed_alone(world):
  num_facts = sum(map(len, world.facts.values()))
  assert num_facts == 10 * 3 + 6 * 2 + 6 * 2 + 8 * 2
  assert worlds.make_world(0).facts == world.facts
  assert worlds.make_world(1).facts != world.facts
  assert worlds.make_world(1).vocabulary() == world.vocabulary()
  for subject, relations in world.facts.items():
    for name, value in relations.items():
      relation = worlds.RELATIONS[worlds.KINDS[subject], name]
      assert value in relation.values
      key = (relation.kind, name, value)
      assert subject in world.holders[key]


def test_values_are_shared_out_evenly(world):
  # 10 people over 6 jobs: one or two each. 6 places over 4 weathers: the same.
  for subjects, name, number in (
    (phrases.PEOPLE, 'job', 6),
    (phrases.PLACES, 'weather', 4),
  ):
    counts = collections.Counter(world.facts[s][name] for s in subjects)
    assert len(counts) == number and set(counts.values()) == {1, 2}


def test_vocabulary_is_sorted_small_and_single_words(world):
  words = world.vocabulary()
  assert words == sorted(set(words))
  assert 500 <= len(words) <= 700
  for word in words:
    assert word == word.lower() and word.split() == [word]
    assert '{' not in word


@pytest.mark.parametrize(
  'text, topic, claims',
  [
    ('anna lives in arden .', None, [('anna', 'home', 'arden')]),
    ('she lives in arden .', 'anna', [('anna', 'home', 'arden')]),
    ('she lives in arden .', None, []),
    ('does anna live in arden ?', None, []),
    (
      'anna keeps a red fox and likes to eat soup .',
      None,
      [('anna', 'food', 'soup'), ('fox', 'colour', 'red')],
    ),
    # A cue speaks of one value only.
    (
      'anna lives in arden and thinks of dalby .',
      None,
      [('anna', 'home', 'arden')],
    ),
    ('the weather in dalby is foggy .', None, [('dalby', 'weather', 'foggy')]),
    ('it is often foggy in dalby .', 'arden', [('dalby', 'weather', 'foggy')]),
    ('emma is the owner of the lamp .', None, [('lamp', 'owner', 'emma')]),
    (
      'the fox lives in the cave . it has a red coat .',
      None,
      [('fox', 'habitat', 'cave'), ('fox', 'colour', 'red')],
    ),
    ('the old red fox', None, [('fox', 'colour', 'red')]),
    ('one day anna walked to arden alone .', None, []),
    ('lives in arden .', 'anna', [('anna', 'home', 'arden')]),
    ('', None, []),
    ('. . . is is red red', 'fox', [('fox', 'colour', 'red')]),
  ],
)
def test_claims_are_read_from_text(text, topic, claims):
  found = worlds.find_claims(text.split(), topic)
  expected = {Claim(*claim) for claim in claims}
  assert set(found) == expected


def test_negated_claims(world):
  home = world.facts['anna']['home']
  other = next(place for place in phrases.PLACES if place != home)
  for place, true in ((home, False), (other, True)):
    text = f'anna does not live in {place} .'
    (claim,) = worlds.find_claims(text.split())
    assert claim.negated
    assert worlds.is_true(claim, world.facts) == true


def test_every_phrasing_is_read_back_as_its_fact(world):
  for subject, relations in world.facts.items():
    for relation in worlds.RELATIONS_OF[worlds.KINDS[subject]]:
      value = relations[relation.name]
      texts = [f'{{s}} {state}' for state in relation.states]
      texts += [*relation.of, f'{{s}} {relation.past}']
      for text in texts:
        text = phrases.fill(text, s=worlds.noun(subject), v=value)
        found = worlds.find_claims(f'{text} .'.split())
        assert Claim(subject, relation.name, value) in found, text
        assert all(worlds.is_true(c, world.facts) for c in found), text


def test_documents_use_known_words_only_and_are_of_the_right_length(
  world, pages
):
  known = set(world.vocabulary())
  for page in pages:
    words = page.text.split(' ')
    assert known.issuperset(words), set(words) - known
    assert 11 <= len(words) <= 70
    assert ' '.join(words) == page.text


def test_documents_are_deterministic(world, pages):
  again = documents.write_documents(world, 3000, np.random.default_rng(0))
  assert again == pages
  other = documents.write_documents(world, 3000, np.random.default_rng(1))
  assert other != pages


def test_document_shares(pages):
  counts = collections.Counter(page.source for page in pages)
  assert set(counts) == set(documents.PAGES)
  total = sum(share for _, share in documents.PAGES.values())
  assert total == pytest.approx(100)
  for source, (_, share) in documents.PAGES.items():
    # 3000 pages: four standard deviations of a share p are 7.3 sqrt(p(1-p)) %.
    p = share / 100
    assert abs(counts[source] / 3000 - p) < 0.073 * np.sqrt(p * (1 - p)) + 1e-3


def test_documents_tell_the_truth_but_for_rumours(world, pages):
  wrong = collections.Counter()
  told = collections.Counter()
  for page in pages:
    if page.source in QUOTING:
      continue
    for claim in worlds.find_claims(page.text.split()):
      if worlds.is_true(claim, world.facts):
        told[claim.subject, claim.relation] += 1
      else:
        wrong[page.source] += 1
  assert set(wrong) == {'rumour'}
  # Every fact is told, and one statement in forty or so is wrong.
  assert len(told) == sum(map(len, world.facts.values()))
  share = sum(wrong.values()) / (sum(told.values()) + sum(wrong.values()))
  assert 0.01 < share < 0.05


def test_questions_are_answered_on_answered_pages_only(pages):
  for page in pages:
    answered = 'answer :' in page.text
    assert answered == (page.source == 'answered')
  rude = [set(phrases.RUDE) & set(page.text.split()) for page in pages]
  assert 0.02 < np.mean([bool(words) for words in rude]) < 0.12
