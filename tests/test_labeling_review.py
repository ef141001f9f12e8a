"""Calibration, suggestions, adjudication, agreement by version."""

import json
import re

import pytest

pytest.importorskip('starlette', reason='pip install -r requirements-labeling')
pytest.importorskip('sqlalchemy')

import sqlalchemy as sa

from instruct_jax.data import records
from instruct_jax.labeling import exporting, research, schema, store
from tests import labeling_people as people


@pytest.fixture
def site(tmp_path):
  return make_site(tmp_path)


def make_site(tmp_path, **changes):
  return people.Site(
    f'sqlite:///{tmp_path}/site.sqlite',
    tmp_path,
    requests_per_minute=100_000,
    **changes,
  )


def reversed_rank(text):
  return 5 - people.rank_of(text)


def exported(site, folder, name):
  exporting.export(site.store, folder)
  return records.read_jsonl(folder / f'{name}.jsonl', records.Comparison)


# --- Calibration --------------------------------------------------------------


def known_items(number, ranks=(1, 2, 3, 4)):
  return [
    {**item, 'prompt': f'Known {i}', 'known_ranks': list(ranks)}
    for i, item in enumerate(people.ranking_items(number))
  ]


def test_tasks_with_known_answers_are_mixed_in(tmp_path):
  site = make_site(tmp_path, calibration_every=3)
  site.load(people.ranking_items(24, 4), overlap=2)
  site.load(known_items(30), name='known', calibration=True)
  shares = []
  for name in ('anna', 'ben'):
    person = site.person(name)
    kinds = []
    while (task := person.claim()) is not None:
      page = person.get(f'/task/{task}/0').text
      # Neither the name of the batch nor the answer is on the page.
      assert 'known' not in page and 'calibration' not in page.lower()
      kinds.append('Known' in page)
      person.post(f'/task/{task}/skip', reason='Other')
    # The regular tasks are all given, to both of the two.
    assert kinds.count(False) == 24
    shares.append(kinds)
  assert shares[0] != shares[1]  # Each at places of their own.
  # One of three is drawn, until no regular task is left.
  assert all(4 <= kinds.count(True) <= 24 for kinds in shares)


def test_calibration_is_scored_and_only_researchers_see_it(tmp_path):
  site = make_site(tmp_path, calibration_every=1)
  site.load(known_items(2, (1, 2, 2, 3)), name='known', calibration=True)
  site.load(people.ranking_items(2))
  anna, ben = site.person('anna'), site.person('ben')
  for person, orders in (
    (anna, (people.rank_of, people.rank_of, people.rank_of)),
    (ben, (people.rank_of, reversed_rank)),
  ):
    for order in orders:
      person.rank(person.claim(), order)
  found = research.calibration(site.rows(), 0)
  # Each task has 6 pairs, one of them a known tie; Ben reverses one task.
  assert (found[anna.id].rate, found[anna.id].num_pairs) == (1.0, 10)
  assert (found[ben.id].rate, found[ben.id].num_pairs) == (0.5, 10)
  page = site.admin.get('/admin/agreement').text
  assert '50.0 %' in page and 'With known answers' in page
  for path in ('/', '/admin/agreement', '/adjudication'):
    assert '50.0 %' not in ben.get(path).text
  # A known answer is no label: it is not exported, and nobody adjudicates it.
  (found,) = exported(site, tmp_path / 'out', 'comparisons')
  assert found.prompt == 'Prompt number 0'
  assert research.queue(site.store) == []
  said = json.loads((tmp_path / 'out/statistics.json').read_text())
  (labeler,) = said['labelers']  # Ben has only calibrated.
  assert labeler['name'] == 'anna'
  assert labeler['calibration']['num_pairs'] == 10


def test_skips_of_calibration_tasks_are_not_counted_among_the_data(tmp_path):
  site = make_site(tmp_path, calibration_every=1)
  site.load(known_items(1), name='known', calibration=True)
  site.load(people.ranking_items(1), overlap=2)
  anna = site.person('anna')
  anna.post(f'/task/{anna.claim()}/skip', reason='Other')
  anna.rank(anna.claim(), people.rank_of)
  exporting.export(site.store, tmp_path / 'out')
  said = json.loads((tmp_path / 'out/statistics.json').read_text())
  assert said['labelers'][0]['skip_rate'] == 0.0
  everything = research.people(site.store, site.rows())
  assert [row['skip_rate'] for row in everything] == [None, 0.5]


def test_a_calibration_task_left_open_is_kept(tmp_path):
  site = make_site(tmp_path, calibration_every=1)
  site.load(known_items(1), name='known', calibration=True)
  anna, ben = site.person('anna'), site.person('ben')
  task = anna.claim()
  site.clock.now += 120 * 60 + 1
  assert ben.claim() is not None  # Everybody gets it; nobody takes it away.
  assert anna.rank(task, people.rank_of)[0].status_code == 303
  assert [row.labeler for row in site.rows()] == ['anna']


def test_researchers_and_newcomers_do_not_calibrate(tmp_path):
  site = make_site(tmp_path, calibration_every=1)
  site.load(known_items(1), name='known', calibration=True)
  assert site.person('judge', 'researcher').claim() is None
  assert site.person('newcomer', status='screening').claim() is None


@pytest.mark.parametrize(
  ('line', 'settings', 'words'),
  [
    ({}, {'calibration': True}, "'known_ranks' is missing"),
    ({'known_ranks': [1, 2]}, {}, 'are for calibration batches'),
    ({'known_ranks': [1]}, {'calibration': True}, 'a list of 2 ranks, one per'),
    ({'known_ranks': [0, 1]}, {'calibration': True}, 'integers from 1'),
    ({'known_ranks': [True, 1]}, {'calibration': True}, 'integers from 1'),
    ({'known_ranks': [2, 2]}, {'calibration': True}, 'are all equal'),
    (
      {'completions': ['a', 'b', 'a'], 'known_ranks': [1, 2, 3]},
      {'calibration': True},
      "completions 1 and 3 are the same text, and 'known_ranks' gives them 1",
    ),
    ({'suggestion': {}}, {}, "'ranks' and a name as"),
    ({'suggestion': {'ranks': [1, 2]}}, {}, "'ranks' and a name as"),
    ({'suggestion': {'ranks': [1, 2], 'source': 3}}, {}, 'must be a string'),
    ({'suggestion': {'ranks': '12', 'source': 'm'}}, {}, 'a list of 2 ranks'),
    (
      {'suggestion': {'ranks': [1, 3], 'source': 'm'}},
      {},
      'from 1 (best) to 2',
    ),
  ],
)
def test_bad_ranks_are_named(site, line, settings, words):
  (item,) = people.ranking_items(1, 2)
  with pytest.raises(records.RecordError, match='test.jsonl:1: ') as caught:
    site.load([{**item, **line}], **settings)
  assert words in str(caught.value)
  assert research.progress(site.store) == []


@pytest.mark.parametrize(
  ('kind', 'settings', 'words'),
  [
    ('demonstration', {'calibration': True}, 'for batches of rankings'),
    ('ranking', {'calibration': True, 'screening': True}, 'outside the screen'),
    ('ranking', {'suggestions': True}, 'it has none'),
  ],
)
def test_settings_that_do_not_fit_are_named(site, kind, settings, words):
  with pytest.raises(store.StoreError, match=words):
    site.load(people.ranking_items(1), kind, **settings)
  assert research.progress(site.store) == []


# --- Suggestions --------------------------------------------------------------


def suggested_items(number):
  suggestion = {'ranks': [3, 1, 2, 2], 'source': 'secretjudge'}
  return [
    {**item, 'suggestion': suggestion} for item in people.ranking_items(number)
  ]


def test_suggestions_are_off_by_default(site, tmp_path):
  site.load(suggested_items(1))
  anna = site.person('anna')
  task = anna.claim()
  anna.rank(task, people.rank_of)
  for step in range(6):
    assert 'suggest' not in anna.get(f'/task/{task}/{step}').text
  (found,) = exported(site, tmp_path / 'out', 'comparisons')
  assert 'suggestion' not in found.metadata['labeling']
  said = json.loads((tmp_path / 'out/statistics.json').read_text())
  assert said['suggestions_shown'] == 0


def test_suggestions_that_were_shown_are_recorded(site, tmp_path):
  site.load(suggested_items(1), suggestions=True, overlap=2)
  anna, ben = site.person('anna'), site.person('ben')
  task = anna.claim()
  for step in range(5):
    assert 'suggest' not in anna.get(f'/task/{task}/{step}').text
  page = anna.get(f'/task/{task}/5').text
  texts = anna.texts(task)
  suggested = re.findall(r'suggested rank (\d)', page)
  by_text = dict(zip(map(texts.get, sorted(texts)), suggested, strict=True))
  assert by_text == {
    'text 0': '3', 'text 1': '1', 'text 2': '2', 'text 3': '2',
  }  # fmt: skip
  assert 'secretjudge' not in page and 'selected' not in page
  site.clock.now += 60
  anna.rank(task, people.rank_of)
  # Ben sends his ranks without a look at the last page.
  task = ben.claim()
  for step in range(5):
    ben.fill(task, step)
  ranks = {f'rank{i}': '1' for i in range(4)}
  site.store.submit(task, ben.id, 'ranks', ranks, 'a' * 32)
  by_anna, by_ben = exported(site, tmp_path / 'out', 'comparisons')
  assert by_anna.metadata['labeling']['suggestion'] == {
    'ranks': [3, 1, 2, 2],
    'source': 'secretjudge',
    'shown': '2027-01-15T08:00:00+00:00',  # The first time.
  }
  assert 'suggestion' not in by_ben.metadata['labeling']
  said = json.loads((tmp_path / 'out/statistics.json').read_text())
  assert said['suggestions_shown'] == 1


# --- Adjudication -------------------------------------------------------------


def disagreeing(site):
  """Three tasks on which two labelers agree on all, half and no pairs."""
  site.load(people.ranking_items(3), overlap=2)
  anna, ben = site.person('anna'), site.person('ben')
  half = {'text 0': 4, 'text 1': 1, 'text 2': 2, 'text 3': 3}
  for order in (people.rank_of, half.get, reversed_rank):
    anna.rank(anna.claim(), people.rank_of)
    ben.rank(ben.claim(), order)
  return anna, ben


def decide(person, task, order_of, **fields):
  """Decides through the page; returns the reply."""
  page = person.get(f'/adjudication/{task}').text
  texts = re.findall(r'aria-label="Text of output \w">(.*?)</div>', page)
  ranks = {f'rank{i}': order_of(text) for i, text in enumerate(texts)}
  return person.post(f'/adjudication/{task}', **{**ranks, **fields})


def test_the_least_agreed_task_is_decided_first(site, tmp_path):
  anna, _ = disagreeing(site)
  judge = site.person('judge', 'researcher')
  page = judge.get('/adjudication').text
  # Half: text 0 is put last, so 3 of 6 pairs are turned round.
  assert re.findall(r'href="/adjudication/(\d)"', page) == ['3', '2']
  assert '0 % of 6 pairs' in page and '50 % of 6 pairs' in page
  page = judge.get('/adjudication/3').text
  assert 'secretmodel' not in page and 'anna' not in page
  assert page.count('labelers: 1, 4') == 2 and page.count('labelers: 2, 3') == 2
  order = {'text 0': 2, 'text 1': 1, 'text 2': 2, 'text 3': 4}
  reply = decide(judge, 3, order.get, note='Text 1 answers.')
  assert reply.headers['location'] == '/adjudication/2'
  assert re.findall(
    r'href="/adjudication/(\d)"', judge.get('/adjudication').text
  ) == ['2']
  (found,) = exported(site, tmp_path / 'out', 'comparisons_adjudicated')
  assert found.completions == ('text 0', 'text 1', 'text 2', 'text 3')
  assert (found.ranks, found.labeler) == ((2, 1, 2, 3), 'judge')
  assert (found.id, found.user) == ('p2', 'u2')
  labeling = found.metadata['labeling']
  assert labeling['adjudication'] == {
    'decided_by': 'judge',
    'note': 'Text 1 answers.',
  }
  assert labeling['instructions'] == 'training/1'
  assert labeling['models'] == [f'secretmodel{i}' for i in range(4)]
  # The labelers' own rankings stay, and say that there is a decision.
  rows = records.read_jsonl(
    tmp_path / 'out/comparisons.jsonl', records.Comparison
  )
  assert len(rows) == 6
  assert {
    row.id for row in rows if row.metadata['labeling'].get('adjudicated')
  } == {'p2'}


def test_what_one_tied_and_another_ordered_is_decided_last(site):
  """The figures of agreement leave such pairs out."""
  site.load(people.ranking_items(4, 3), overlap=2)
  anna, ben = site.person('anna'), site.person('ben')
  one, two = ({'text 0': 1, 'text 1': x, 'text 2': x} for x in (1, 2))
  for orders in (
    (one.get, two.get),  # All tied against the first of all.
    (people.rank_of, two.get),  # No contradiction, one tie.
    (one.get, one.get),  # Alike.
    (people.rank_of, {'text 0': 2, 'text 1': 1, 'text 2': 3}.get),
  ):
    for person, order in zip((anna, ben), orders, strict=True):
      person.rank(person.claim(), order)
  found = research.queue(site.store)
  assert [
    (item['task_id'], item['rate'], item['num_pairs'], item['num_tied'])
    for item in found
  ] == [(4, 2 / 3, 3, 0), (1, None, 0, 2), (2, 1.0, 2, 1)]
  # Two pairs of task 2 and three of task 4 were ordered by both.
  counted = research.agreement(site.rows(), 0)['labelers']
  assert (counted.rate, counted.num_pairs) == (4 / 5, 5)
  judge = site.person('judge', 'researcher')
  page = judge.get('/adjudication').text
  assert re.findall(r'href="/adjudication/(\d)"', page) == ['4', '1', '2']
  assert 'Task 1</a>: 2 pairs tied by one of two people, 2 people' in page
  assert '100 % of 2 pairs, 1 pair tied' in page
  assert decide(judge, 1, two.get).headers['location'] == '/adjudication/4'
  assert judge.get('/adjudication/3').status_code == 404
  # The page of agreement says which are decided, in the part that is renewed.
  page = site.admin.get('/admin/agreement').text
  live = page.partition('data-live>')[2].rpartition('</div>')[0]
  listed = dict(re.findall(r'Task (\d)</a>: ([^<]*)', live))
  assert {task: 'decided' in said for task, said in listed.items()} == {
    '4': False, '1': True, '2': False,
  }  # fmt: skip


def test_decisions_under_other_criteria_are_in_other_files(site, tmp_path):
  """Nobody may train on them by mistake."""
  site.load(people.ranking_items(1, 2), phase='evaluation', overlap=2)
  site.load(people.ranking_items(1, 2), 'toxicity', phase='toxicity', overlap=2)
  site.load(people.ranking_items(1, 2), name='training', overlap=2)
  anna, ben = site.person('anna'), site.person('ben')
  judge = site.person('judge', 'researcher')
  for task in (1, 2, 3):
    anna.rank(anna.claim(), people.rank_of)
    ben.rank(ben.claim(), lambda text: 3 - people.rank_of(text))
    decide(judge, task, people.rank_of)
  counts = exporting.export(site.store, tmp_path / 'out')
  assert [name for name in counts if 'adjudicated' in name] == [
    'comparisons_adjudicated',
    'comparisons_evaluation_adjudicated',
    'comparisons_toxicity_adjudicated',
  ]
  (found,) = records.read_jsonl(
    tmp_path / 'out/comparisons_adjudicated.jsonl', records.Comparison
  )
  assert found.metadata['labeling']['batch'] == 'training'
  (found,) = records.read_jsonl(
    tmp_path / 'out/comparisons_toxicity_adjudicated.jsonl', records.Comparison
  )
  assert found.metadata['labeling']['instructions'] == 'toxicity/1'


def test_a_decision_can_be_changed(site, tmp_path):
  disagreeing(site)
  judge = site.person('judge', 'researcher')
  decide(judge, 2, people.rank_of)
  page = judge.get('/adjudication/2').text
  assert 'this task is decided' in page and page.count(' selected') == 4
  decide(judge, 2, reversed_rank)
  (found,) = exported(site, tmp_path / 'out', 'comparisons_adjudicated')
  assert found.ranks == (4, 3, 2, 1)
  assert site.admin.get('/admin/audit').text.count('<td>decide</td>') == 2


def test_bad_decisions_are_refused(site):
  anna, _ = disagreeing(site)
  judge = site.person('judge', 'researcher')
  reply = decide(judge, 3, lambda text: '', note='kept <b>')
  assert reply.status_code == 422
  assert 'kept &lt;b&gt;</textarea>' in reply.text
  assert decide(judge, 3, lambda text: 5).status_code == 422
  # There is nothing to decide where all agree, and labelers decide nothing.
  assert judge.get('/adjudication/1').status_code == 404
  assert judge.post('/adjudication/1', rank0=1).status_code == 404
  assert judge.get('/adjudication/99').status_code == 404
  for path in ('/adjudication', '/adjudication/3'):
    assert anna.get(path).status_code == 404
  assert anna.post('/adjudication/3', rank0=1).status_code == 404
  assert research.decisions(site.store) == []
  with pytest.raises(store.StoreError, match='do not disagree'):
    research.decide(site.store, 1, judge.id, [1, 2, 3, 4], '')


def test_adjudicators_see_an_order_of_their_own(site):
  site.load(people.ranking_items(1, 8), overlap=2)
  anna, ben = site.person('anna'), site.person('ben')
  anna.rank(anna.claim(), people.rank_of)
  ben.rank(ben.claim(), lambda text: 9 - people.rank_of(text))
  orders = [
    tuple(research.deciding(site.store, 1, account)['order'])
    for account in range(6)
  ]
  assert all(sorted(order) == list(range(8)) for order in orders)
  assert len(set(orders)) > 3  # Of 40,320.


def test_decisions_are_in_a_back_up(site, tmp_path):
  disagreeing(site)
  decide(site.person('judge', 'researcher'), 3, people.rank_of, note='ja')
  store.backup(site.engine, str(tmp_path / 'b.gz'))
  engine = store.make_engine(f'sqlite:///{tmp_path}/other.sqlite')
  store.restore(engine, str(tmp_path / 'b.gz'))
  with engine.connect() as c:
    (row,) = c.execute(sa.select(schema.decisions)).all()
  assert (row.task_id, row.ranks, row.note) == (3, [1, 2, 3, 4], 'ja')
  engine.dispose()


# --- Agreement by version -----------------------------------------------------


def test_agreement_is_counted_by_version(site, tmp_path):
  site.load(people.ranking_items(3), overlap=2)
  anna, ben = site.person('anna'), site.person('ben')
  anna.rank(anna.claim(), people.rank_of)
  anna.rank(anna.claim(), people.rank_of)
  ben.rank(ben.claim(), people.rank_of)
  site.admin.post('/admin/instructions', phase='training', text='New')
  ben.rank(ben.claim(), reversed_rank)
  anna.rank(anna.claim(), people.rank_of)
  half = {'text 0': 4, 'text 1': 1, 'text 2': 2, 'text 3': 3}
  ben.rank(ben.claim(), half.get)
  first, second, mixed = research.agreement_by_version(site.rows(), 0)
  assert (first['version'], first['rankings'], first['pairs']) == (
    'training/1', 3, 6,
  )  # fmt: skip
  assert first['agreement']['labelers'].rate == 1.0
  assert (second['version'], second['rankings'], second['pairs']) == (
    'training/2', 3, 6,
  )  # fmt: skip
  assert second['agreement']['labelers'].rate == 0.5
  assert (mixed['version'], mixed['pairs']) == ('different versions', 6)
  assert mixed['agreement']['labelers'].rate == 0.0
  page = site.admin.get('/admin/agreement').text
  assert 'data-live' in page
  for words in ('training/1', 'training/2', 'different versions'):
    assert f'<th scope="row">{words}</th>' in page
  exporting.export(site.store, tmp_path / 'out')
  said = json.loads((tmp_path / 'out/statistics.json').read_text())
  assert [row['pairs'] for row in said['agreement_by_version']] == [6, 6, 6]


def test_an_answer_counts_under_what_its_labeler_had_read(site):
  site.load(people.ranking_items(3))
  anna = site.person('anna')
  answered = anna.claim()
  anna.rank(answered, people.rank_of)
  opened = anna.claim()
  site.clock.now += 1
  site.store.publish_instructions('training', 'New')
  site.clock.now += 1
  for task in (opened, answered):
    anna.rank(task, people.rank_of)
  anna.rank(anna.claim(), people.rank_of)
  found = {row.assignment_id: row for row in site.rows()}
  assert [found[task].instructions for task in sorted(found)] == [
    'training/1', 'training/1', 'training/2',
  ]  # fmt: skip
  assert found[answered].revision == 2


def test_the_tenth_version_comes_after_the_ninth(site):
  site.load(people.ranking_items(3))
  anna = site.person('anna')
  for version in (9, 10):
    for _ in range(version - site.store.instructions('training').version):
      site.store.publish_instructions('training', 'text')
    anna.rank(anna.claim(), people.rank_of)
  found = research.agreement_by_version(site.rows(), 0)
  assert [row['version'] for row in found] == ['training/9', 'training/10']
