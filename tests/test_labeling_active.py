"""Tasks in the order of a reward model's uncertainty."""

import json
import math

import jax
import numpy as np
import pytest

pytest.importorskip('starlette', reason='pip install -r requirements-labeling')
pytest.importorskip('sqlalchemy')

import sqlalchemy as sa
from etils import epath
from ml_collections import ConfigDict

from instruct_jax import judge_fns, model_fns, model_folder
from instruct_jax.data import records, tokenizer
from instruct_jax.infra import sharding
from instruct_jax.labeling import active, exporting, schema, store
from instruct_jax.models.config import TransformerConfig
from tests import labeling_people as people

pytestmark = pytest.mark.usefixtures('quick_compile')
ROOT = epath.Path(__file__).parents[1]


@pytest.fixture
def site(tmp_path):
  return people.Site(f'sqlite:///{tmp_path}/labeling.sqlite', tmp_path)


def test_uncertainty_by_hand():
  assert active.uncertainty([2.0, 2.0]) == 1.0
  # p = 1 / (1 + exp(-ln 3)) = 3/4:
  # H = -3/4 log2 3/4 - 1/4 log2 1/4 = 0.3113 + 0.5 = 0.8113.
  low, high = 0.0, math.log(3)
  assert math.isclose(active.uncertainty([low, high]), 0.8113, rel_tol=1e-4)
  assert active.uncertainty([low, high]) == active.uncertainty([high, low])
  # Three pairs: two of them as above, one of equal scores.
  expected = (0.8112781 + 0.8112781 + 1) / 3
  found = active.uncertainty([low, high, low])
  assert math.isclose(found, expected, rel_tol=1e-6)
  # So far apart that the other order has probability 0 in float64.
  assert active.uncertainty([0.0, 2000.0]) == 0.0


def test_equal_texts_say_nothing(site, scored):
  """Only pairs of different texts count; without any, a task comes last."""
  low, high = 0.0, math.log(3)
  # One pair of the three is of equal texts: the others as above.
  found = active.uncertainty([low, high, low], ['a', 'b', ' a '])
  assert math.isclose(found, 0.8113, rel_tol=1e-4)
  assert active.uncertainty([low, low], ['a', 'a']) == 0.0
  site.load([item('equal', 1, 1), item('sure', 0, 9), item('unsure', 1, 1.5)])
  active.order(site.store, 'reward:MODEL', SETTINGS)
  assert claimed(site.person('anna')) == ['unsure', 'sure', 'equal']


def test_uncertainty_falls_with_the_gap():
  values = [active.uncertainty([0.0, gap]) for gap in np.linspace(0, 20, 30)]
  assert values == sorted(values, reverse=True)
  assert len(set(values)) == 30


# --- The order ----------------------------------------------------------------


SETTINGS = ConfigDict(
  {'tokenizer': 'given', 'compute_dtype': '', 'batch_size': 8}
)


@pytest.fixture
def scored(monkeypatch):
  """Texts are numbers, which are their scores; a word is a token."""

  class Words:
    def encode_prompts(self, prompts):
      return [prompt.text.split() for prompt in prompts]

    def encode_responses(self, texts, ended):
      assert ended
      return [[*text.split(), 'end'] for text in texts]

  asked = []

  def score(pairs):
    asked.extend(pairs)
    return [float(answer.response) for _, answer in pairs]

  class Shape:
    context_length = 6

  monkeypatch.setattr(
    judge_fns, 'reward_score', lambda *arguments: (score, Words())
  )
  monkeypatch.setattr(model_folder, 'shape_of', lambda folder: Shape)
  return asked


def item(prompt, *scores, **more):
  return {'prompt': prompt, 'completions': list(map(str, scores)), **more}


def claimed(person):
  """Prompts in the order in which a person gets them."""
  found = []
  while (task := person.claim()) is not None:
    found.append(person.site.store.work(task, person.id)['prompt'])
    person.post(f'/task/{task}/skip', reason='Other')
  return found


def test_labelers_get_the_least_certain_task_first(site, scored, tmp_path):
  site.load(
    [item('sure', 0, 9), item('unsure', 1, 1.5, 1), item('so so', 0, 2)],
    overlap=2,
  )
  site.load([item('other batch', 0, 0)], name='two')
  site.load([item('long ' * 5, 0, 0), item('long', 0, 3)], name='three')
  counts = active.order(site.store, 'reward:MODEL', SETTINGS)
  assert counts == {'ordered': 5, 'too long': 1}
  # Batches keep their order; what has no priority comes last in its own.
  assert claimed(site.person('anna')) == [
    'unsure', 'so so', 'sure', 'other batch', 'long', 'long ' * 5,
  ]  # fmt: skip
  ben = site.person('ben')
  ben.rank(ben.claim(), lambda text: 1)
  exporting.export(site.store, tmp_path / 'out')
  (found,) = records.read_jsonl(
    tmp_path / 'out/comparisons.jsonl', records.Comparison
  )
  assert found.metadata['labeling']['active'] == {
    'by': 'reward:MODEL',
    'uncertainty': active.uncertainty([1.0, 1.5]),  # Two pairs alike.
  }
  said = json.loads((tmp_path / 'out/statistics.json').read_text())
  assert said['ordered_by'] == ['reward:MODEL']
  # Other programs' files say so, too.
  exporting.export_as(site.store, tmp_path / 'out', 'label_studio')
  tasks = json.loads((tmp_path / 'out/label_studio.json').read_text())
  first = tasks[0]['meta']['instruct_jax']['task']['metadata']
  assert first['labeling']['active']['by'] == 'reward:MODEL'


def test_without_an_order_nothing_is_said(site, tmp_path):
  site.load(people.ranking_items(1))
  anna = site.person('anna')
  anna.rank(anna.claim(), people.rank_of)
  exporting.export(site.store, tmp_path / 'out')
  (found,) = records.read_jsonl(
    tmp_path / 'out/comparisons.jsonl', records.Comparison
  )
  assert 'active' not in found.metadata['labeling']
  said = json.loads((tmp_path / 'out/statistics.json').read_text())
  assert said['ordered_by'] == []


def test_another_model_replaces_the_order(site, scored):
  site.load([item('a', 0, 9), item('b', 0, 1)])
  active.order(site.store, 'reward:ONE', SETTINGS)
  active.order(site.store, 'reward:TWO', SETTINGS)
  with site.store.read() as c:
    rows = c.execute(sa.select(schema.tasks)).all()
  assert {row.record['active']['by'] for row in rows} == {'reward:TWO'}
  assert [row.priority for row in rows] == [
    row.record['active']['uncertainty'] for row in rows
  ]
  log = site.admin.get('/admin/audit').text
  assert '2 tasks by reward:TWO' in log


def test_only_free_tasks_to_rank_are_scored(site, scored):
  site.load([item('done', 0, 1), item('free', 0, 1)])
  site.load([item('rated', 0, 1)], 'rating', phase='evaluation')
  site.load([item('closed', 0, 1)], name='closed')
  site.load([item('screened', 0, 1)], name='screen', screening=True)
  site.admin.post('/admin/batches/3', closed='1')
  anna = site.person('anna')
  anna.rank(anna.claim(), lambda text: 1)
  site.load(
    [item('known', 0, 1, known_ranks=[1, 2])], name='known', calibration=True
  )
  counts = active.order(site.store, 'reward:MODEL', SETTINGS)
  assert counts == {'ordered': 1, 'too long': 0}
  assert {prompt.text for prompt, _ in scored} == {'free'}


def test_cut_completions_and_turns_reach_the_model(site, scored):
  turns = [{'role': 'user', 'content': 'hi'}]
  site.load(
    [item('hi', 1, 2, turns=turns, ended=[False, True])],
  )
  active.order(site.store, 'reward:MODEL', SETTINGS)
  assert [answer.ended for _, answer in scored] == [False, True]
  assert scored[0][0].turns == (records.Turn('user', 'hi'),)


def test_scores_that_are_no_numbers_change_nothing(site, scored):
  site.load([item('a', 0, 'nan')])
  with pytest.raises(store.StoreError, match='MODEL: 1 of 2 scores are not'):
    active.order(site.store, 'reward:MODEL', SETTINGS)
  with site.store.read() as c:
    (row,) = c.execute(sa.select(schema.tasks)).all()
  assert (row.record, row.priority) == ({}, None)


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('MODEL', 'must be reward:MODEL'),
    ('reward:', 'must be reward:MODEL'),
    ('judge:MODEL', 'must be reward:MODEL'),
    ('reward:MODEL', 'no free tasks'),
  ],
)
def test_impossible_orders_are_named(site, scored, name, words):
  with pytest.raises(store.StoreError, match=words):
    active.order(site.store, name, SETTINGS)


def test_our_models_need_their_tokenizer(tmp_path):
  settings = ConfigDict({'tokenizer': ''})
  with pytest.raises(store.StoreError, match='give --config.active.tokenizer'):
    active.check(f'reward:{tmp_path}', settings)
  with pytest.raises(store.StoreError, match='nosuch: no such folder'):
    active.check(f'reward:{tmp_path}/nosuch', settings)
  (tmp_path / 'config.json').write_text('{}')  # A published model brings one.
  assert active.check(f'reward:{tmp_path}', settings) == str(tmp_path)


# --- A model ------------------------------------------------------------------


def save_model(folder):
  """A reward model with random weights, and its tokenizer."""
  words = ['Prompt', 'number', 'text', *map(str, range(8))]
  tokens = tokenizer.train_word_level(words)
  tokens.save(folder / 'tokenizer')
  shape = TransformerConfig(
    vocab_size=tokens.vocab_size,
    context_length=32,
    num_layers=1,
    width=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    compute_dtype='float32',
  )
  mesh = sharding.make_mesh((1, -1, 1))
  with sharding.use_mesh(mesh):
    model = model_fns.init('scalar', shape, mesh, jax.random.key(0))
    about = {'score_range': (-10.0, 10.0)}
    model_folder.save(folder / 'reward', model, tokens, about)
  return ConfigDict(
    {
      'tokenizer': str(folder / 'tokenizer'),
      'compute_dtype': '',
      'batch_size': 8,
    }
  )


def test_a_reward_model_orders_a_site_from_the_command_line(
  start, site, workdir
):
  """Its scores give the priorities; the running site needs no restart."""
  folder = epath.Path(workdir)
  settings = save_model(folder)
  items = people.ranking_items(4, 3)
  items[3]['prompt'] = 'Prompt ' * 40
  site.load(items)
  name = f'reward:{folder / "reward"}'
  done = start(
    'instruct_jax.labeling',
    f'--config={ROOT}/configs/labeling.py',
    f'--active={name}',
    f'--workdir={site.engine.url.database.rpartition("/")[0]}',
    f'--config.active.tokenizer={settings.tokenizer}',
  )
  assert done.returncode == 0, done.stderr
  assert 'ordered: 3 tasks\ntoo long: 1 tasks' in done.stdout
  mesh = sharding.make_mesh(())
  comparisons = [
    records.Comparison(row['prompt'], tuple(row['completions']), (1, 2, 3))
    for row in items[:3]
  ]
  with sharding.use_mesh(mesh):
    folder_name = str(folder / 'reward')
    score_fn, tokens = judge_fns.reward_score(settings, folder_name, mesh)
    scores = judge_fns.comparison_scores(score_fn, comparisons, tokens)
  with site.store.read() as c:
    rows = c.execute(sa.select(schema.tasks).order_by(schema.tasks.c.id)).all()
  found = [row.priority for row in rows]
  assert found[3] is None
  np.testing.assert_allclose(
    found[:3], [active.uncertainty(own) for own in scores], rtol=1e-5
  )
  assert len(set(found[:3])) == 3
  best = int(np.argmax(found[:3]))
  anna = site.person('anna')
  task = anna.claim()
  assert site.store.work(task, anna.id)['prompt'] == items[best]['prompt']


def test_impossible_orders_create_nothing(start, tmp_path):
  place = f'--config={ROOT}/configs/labeling.py', f'--workdir={tmp_path}/typo'
  for flags, words in (
    (['--active=MODEL'], 'must be reward:MODEL'),
    (['--active=reward:MODEL'], 'MODEL: no such folder; active must be'),
    (['--active=reward:MODEL', '--config.active.tokenizer=T'],
     'no such file; give the --workdir'),
  ):  # fmt: skip
    found = start('instruct_jax.labeling', *place, *flags)
    assert found.returncode == 1 and words in found.stderr, found.stderr
    assert found.stderr.count('\n') == 1
  assert not (tmp_path / 'typo').exists()
