"""Prompts of the embedded world: shares, users, constraints, dirt, prefixes."""

import collections
import json
import random

import numpy as np
import pytest

from instruct_jax.data import records
from instruct_jax.miniature import phrases, tasks
from instruct_jax.miniature import world as worlds

NUM_PROMPTS = 8000


@pytest.fixture(scope='module')
def world():
  return worlds.make_world(0)


@pytest.fixture(scope='module')
def prompts(world):
  return tasks.write_prompts(world, NUM_PROMPTS, np.random.default_rng(0))


def test_prompts_are_deterministic_and_have_ids_of_their_own(world, prompts):
  again = tasks.write_prompts(world, NUM_PROMPTS, np.random.default_rng(0))
  assert again == prompts
  assert len({prompt.id for prompt in prompts}) == NUM_PROMPTS
  assert len({prompt.text for prompt in prompts}) > 0.99 * NUM_PROMPTS


def test_prompts_use_known_words_only(world, prompts):
  known = set(world.vocabulary())
  for prompt in prompts:
    words = prompt.text.split(' ')
    assert known.issuperset(words), prompt.text
    assert '{' not in prompt.text


def test_categories_have_the_shares_of_table_1(prompts):
  counts = collections.Counter(prompt.category for prompt in prompts)
  assert sum(tasks.SHARES.values()) == pytest.approx(99.9)
  for category, share in tasks.SHARES.items():
    # 8000 draws: the largest standard deviation is 0.56 points.
    assert 100 * counts[category] / NUM_PROMPTS == pytest.approx(share, abs=2)


def test_about_a_quarter_has_a_constraint(prompts):
  kinds = collections.Counter(
    prompt.metadata['constraint']['kind']
    for prompt in prompts
    if prompt.metadata['constraint']
  )
  assert 0.21 < sum(kinds.values()) / NUM_PROMPTS < 0.30
  assert set(kinds) == set(phrases.CONSTRAINTS)
  assert min(kinds.values()) > 30


def test_the_world_has_every_kind_of_trap(prompts):
  specs = [prompt.metadata for prompt in prompts]
  for test in (
    lambda spec: spec['premise'] is not None,
    lambda spec: spec['invites_rudeness'],
    lambda spec: spec['asks_harm'],
    lambda spec: spec['closed_domain'],
  ):
    assert sum(map(test, specs)) > 50


def test_users_have_heavy_tails(prompts):
  counts = collections.Counter(prompt.user for prompt in prompts)
  sizes = sorted(counts.values(), reverse=True)
  assert sizes[0] > 200 and sizes[1] > 200
  assert np.median(sizes) < 10


def test_lengths(prompts):
  sizes = np.array([len(p.text.split()) for p in prompts])
  assert np.mean((sizes >= 4) & (sizes <= 40)) > 0.93
  assert 0.005 < np.mean(sizes > tasks.PROMPT_BUDGET) < 0.04


def test_dirt_is_marked_and_found(prompts):
  dirt = collections.Counter(prompt.metadata['dirt'] for prompt in prompts)
  for name in ('near_duplicate', 'personal_data', 'over_long'):
    assert 0.01 < dirt[name] / NUM_PROMPTS < 0.05
  seen = set()
  for prompt in prompts:
    words = prompt.text.split()
    personal = any(word in phrases.PERSONAL for word in words)
    assert personal == (prompt.metadata['dirt'] == 'personal_data')
    over_long = len(words) > tasks.PROMPT_BUDGET
    assert not over_long or prompt.metadata['dirt'] == 'over_long' or personal
    if prompt.metadata['dirt'] == 'near_duplicate':
      assert tuple(words[:12]) in seen
    seen.add(tuple(words[:12]))


def test_metadata_survives_json(prompts):
  for prompt in prompts[:500]:
    assert json.loads(json.dumps(prompt.metadata)) == prompt.metadata


def test_prompts_survive_a_file(prompts, tmp_path):
  path = tmp_path / 'prompts.jsonl'
  records.write_jsonl(path, prompts[:200])
  assert records.read_jsonl(path, records.Prompt) == prompts[:200]


def test_make_spec_rejects_unknown_fields():
  with pytest.raises(KeyError, match='colour'):
    tasks.make_spec('answer', colour='red')


def test_passages_hold_what_is_asked(world):
  draw = random.Random(0)
  for _ in range(200):
    text, spec = tasks.write_task(world, draw, 'closed qa')
    assert spec['accepted'][0] in text.split()
    (guest,) = spec['facts']
    assert guest in phrases.GUESTS and guest in text.split()


def test_false_premises_are_false(world, prompts):
  for prompt in prompts:
    premise = prompt.metadata['premise']
    if premise:
      kind, name, subject = prompt.metadata['relation']
      assert world.facts[subject][name] == premise['true'] != premise['false']
      assert premise['false'] in prompt.text.split()


def test_prefixes_have_a_slot_and_known_words(world):
  found = tasks.prefixes(world)
  assert len(set(found)) == 8
  known = set(world.vocabulary())
  for prefix in found:
    words = prefix.split(' ')
    assert words.count('{prompt}') == 1 and len(words) <= 45
    assert known.issuperset(w for w in words if w != '{prompt}')
    assert prefix.endswith('question : {prompt} answer :')
    assert 2 <= prefix.count('question :') - 1 <= 3
  assert tasks.prefixes(world) == found
