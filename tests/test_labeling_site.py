"""The labeling site by HTTP: work, blindness, overlap, access, export."""

import json
import re

import pytest

pytest.importorskip('starlette', reason='pip install -r requirements-labeling')
pytest.importorskip('sqlalchemy')

import sqlalchemy as sa

from instruct_jax.data import folders, labels, records
from instruct_jax.labeling import (
  answers,
  exporting,
  importing,
  research,
  schema,
  store,
  web,
)
from tests import labeling_people as people


@pytest.fixture
def site(tmp_path):
  return people.Site(f'sqlite:///{tmp_path}/site.sqlite', tmp_path)


def test_a_ranking_goes_from_page_to_export(site, tmp_path):
  site.load(people.ranking_items(1))
  anna = site.person('anna')
  task = anna.claim()
  reply, _ = anna.rank(task, people.rank_of, overall=5)
  assert reply.status_code == 303
  exporting.export(site.store, tmp_path / 'out')
  (found,) = records.read_jsonl(
    tmp_path / 'out/comparisons.jsonl', records.Comparison
  )
  assert found.prompt == 'Prompt number 0'
  # In imported order, not in the order shown.
  assert found.completions == ('text 0', 'text 1', 'text 2', 'text 3')
  assert found.ranks == (1, 2, 3, 4)
  assert (found.labeler, found.user, found.id) == ('anna', 'u0', 'p0')
  assert found.time.startswith('2027-01-15T')
  labeling = found.metadata['labeling']
  assert labeling['instructions'] == 'training/1'
  assert labeling['models'] == [f'secretmodel{i}' for i in range(4)]
  assert [rating['overall'] for rating in labeling['ratings']] == [5] * 4


def test_ties_are_made_dense(site):
  site.load(people.ranking_items(1))
  anna = site.person('anna')
  ranks = {'text 0': 4, 'text 1': 2, 'text 2': 2, 'text 3': 4}
  anna.rank(anna.claim(), ranks.get)
  assert site.rows()[0].content['ranks'] == [2, 1, 1, 2]


def test_ratings_follow_their_outputs_through_the_shuffle(site):
  site.load(people.ranking_items(1, 6))
  anna = site.person('anna')
  task = anna.claim()
  anna.fill(task, 0)
  for step in range(1, 7):
    page = anna.get(f'/task/{task}/{step}').text
    number = int(re.search(r'text (\d)', page).group(1))
    anna.fill(task, step, overall=number + 1, notes=f'note on {number}')
  texts = anna.texts(task)
  ranks = {
    f'rank{i}': people.rank_of(texts[letter])
    for i, letter in enumerate(sorted(texts))
  }
  anna.fill(task, 7, **ranks)
  ratings = site.rows()[0].content['ratings']
  assert [r['overall'] for r in ratings] == [1, 2, 3, 4, 5, 6]
  assert [r['notes'] for r in ratings] == [f'note on {i}' for i in range(6)]


def test_order_is_shuffled_by_labeler_and_recorded(site):
  site.load(people.ranking_items(1, 6), overlap=8)
  orders = set()
  for i in range(8):
    person = site.person(f'labeler{i}')
    task = person.claim()
    person.rank(task, people.rank_of)
    row = site.rows()[-1]
    orders.add(row.order)
    texts = person.texts(task)
    shown = [texts[letter] for letter in sorted(texts)]
    assert shown == [f'text {position}' for position in row.order]
    assert row.content['ranks'] == [1, 2, 3, 4, 5, 6]
  assert len(orders) > 4  # Of 720; eight alike are all but impossible.


def test_each_output_is_rated_before_the_ranking_counts(site):
  site.load(people.ranking_items(1))
  anna = site.person('anna')
  task = anna.claim()
  ranks = {f'rank{i}': 1 for i in range(4)}
  reply, _ = anna.fill(task, 5, **ranks)
  assert reply.status_code == 422
  assert site.rows() == []
  anna.fill(task, 0)
  for step in (1, 2, 3):
    anna.fill(task, step)
  assert anna.fill(task, 5, **ranks)[0].status_code == 422
  anna.fill(task, 4)
  assert anna.fill(task, 5, **ranks)[0].status_code == 303


def test_conditional_questions_appear_when_they_apply(site):
  site.load(people.ranking_items(1))
  anna = site.person('anna')
  task = anna.claim()
  conditional = {
    'hallucination': 'closed_domain',
    'satisfies_constraint': 'constraint',
    'expresses_opinion': 'opinion',
  }
  for wanted in ({}, *({c: 1} for c in conditional.values())):
    about = dict.fromkeys(conditional.values(), 0) | wanted
    anna.fill(task, 0, **about)
    page = anna.get(f'/task/{task}/1').text
    for name, condition in conditional.items():
      assert (f'name="{name}"' in page) == bool(about[condition])
  assert len(answers.RATING_QUESTIONS) == 12  # Table 3: one scale, 11 yes/no.


def test_all_kinds_of_tasks_are_exported(site, tmp_path):
  anna = site.person('anna')
  site.load([{'text': 'Name a bird.', 'id': 'b', 'user': 'u'}], 'demonstration')
  task = anna.claim()
  assert anna.fill(task, 0, response='')[0].status_code == 422
  assert anna.fill(task, 0, response='An owl.')[0].status_code == 303
  styles = ('plain', 'few-shot', 'user-based')
  site.load([{'prompt': 'Brief.', 'style': s} for s in styles], 'prompt')
  anna.fill(anna.claim(), 0, prompt='Write\r\na poem.', response='Roses.')
  task = anna.claim()
  pairs = {'query0': 'one', 'response0': '1', 'query1': 'two'}
  assert anna.fill(task, 0, prompt='Digits', **pairs)[0].status_code == 422
  anna.fill(task, 0, prompt='Digits', **pairs, response1='2')
  anna.fill(anna.claim(), 0, prompt='Plan my week.', response='')
  site.load(people.ranking_items(1, 2), 'rating', phase='evaluation')
  for _ in range(2):  # A task for each output.
    task = anna.claim()
    anna.fill(task, 0)
    anna.fill(task, 1, overall=6)
  site.load(people.ranking_items(1, 2), 'toxicity', phase='toxicity')
  task = anna.claim()
  anna.rank(task, people.rank_of, {'input_toxicity': 2}, relative_toxicity=-1)
  assert anna.claim() is None

  counts = exporting.export(site.store, tmp_path / 'out')
  assert counts == {
    'comparisons_toxicity': 1,
    'demonstrations': 4,
    'prompts': 2,
    'ratings': 4,
  }
  demonstrations = records.read_jsonl(
    tmp_path / 'out/demonstrations.jsonl', records.Demonstration
  )
  assert [(d.prompt, d.response) for d in demonstrations] == [
    ('Name a bird.', 'An owl.'),
    ('Write\na poem.', 'Roses.'),
    # Each example in turn, the others as context (A.3).
    ('Digits\n\ntwo\n2\n\none\n', '1'),
    ('Digits\n\none\n1\n\ntwo\n', '2'),
  ]
  assert {d.labeler for d in demonstrations} == {'anna'}
  prompts = records.read_jsonl(tmp_path / 'out/prompts.jsonl', records.Prompt)
  assert [p.text for p in prompts] == ['Write\na poem.', 'Plan my week.']
  lines = (tmp_path / 'out/ratings.jsonl').read_text().splitlines()
  ratings = [json.loads(line) for line in lines]
  assert [r['model'] for r in ratings] == ['secretmodel0', 'secretmodel1'] * 2
  assert ratings[0]['rating']['overall'] == 6
  assert ratings[0]['instructions'] == 'evaluation/1'
  assert ratings[2]['about_prompt'] == {'input_toxicity': 2}
  assert ratings[2]['rating']['relative_toxicity'] == -1


TURNS = (
  records.Turn('system', 'Be brief.'),
  records.Turn('user', 'Name a bird.'),
  records.Turn('assistant', 'Owl.'),
  records.Turn('user', 'Another one!'),
)


def test_a_conversation_goes_from_import_to_export(site, tmp_path):
  prompt = records.to_values(records.Prompt('p', '', turns=TURNS))
  del prompt['text']
  site.load([prompt], 'demonstration')
  outputs = {'completions': ['Jay.', 'Owl.'], 'models': ['a', 'b']}
  site.load([{**prompt, **outputs}])
  anna = site.person('anna')
  task = anna.claim()
  page = anna.get(f'/task/{task}/0').text
  shown = re.findall(r'<h3>(\w+)</h3>\s*<div[^>]*>([^<]+)</div>', page)
  assert shown == [(t.role.capitalize(), t.content) for t in TURNS]
  anna.fill(task, 0, response='Jay.')
  task = anna.claim()
  assert '<h3>Assistant</h3>' in anna.get(f'/task/{task}/0').text
  anna.rank(task, {'Jay.': 1, 'Owl.': 2}.get)
  exporting.export(site.store, tmp_path / 'out')
  for name, record_type in (
    ('demonstrations', records.Demonstration),
    ('comparisons', records.Comparison),
  ):
    (row,) = records.read_jsonl(tmp_path / f'out/{name}.jsonl', record_type)
    assert row.turns == TURNS
    assert row.prompt == records.text_of_turns(TURNS)
  rating = json.loads(
    (tmp_path / 'out/ratings.jsonl').read_text().splitlines()[0]
  )
  assert rating['turns'] == prompt['turns']


def test_cut_completions_are_marked_and_exported(site, tmp_path):
  (item,) = people.ranking_items(1, 2)
  item['ended'] = [True, False]
  site.load([item])
  site.load([item], 'rating', phase='evaluation')
  anna = site.person('anna')
  ranking = anna.claim()
  words = 'was cut at a limit of its length'
  pages = [anna.get(f'/task/{ranking}/{step}').text for step in range(4)]
  for page in pages[1:3]:  # One output each.
    assert (words in page) == ('text 1' in page)
  assert pages[0].count(words) == 0 and pages[3].count(words) == 1
  anna.rank(ranking, people.rank_of)
  for _ in range(2):
    task = anna.claim()
    for step in range(2):
      anna.fill(task, step)
  exporting.export(site.store, tmp_path / 'out')
  (found,) = records.read_jsonl(
    tmp_path / 'out/comparisons.jsonl', records.Comparison
  )
  assert found.ended == (True, False)
  lines = (tmp_path / 'out/ratings.jsonl').read_text().splitlines()
  assert [json.loads(line)['ended'] for line in lines] == [True, False] * 2


def test_labelers_never_see_models(site):
  site.load(people.ranking_items(2), overlap=2)
  anna = site.person('anna')
  task = anna.claim()
  paths = ['/', *(f'/task/{task}/{step}' for step in range(6))]
  for path in paths:
    reply = anna.get(path)
    assert 'secretmodel' not in reply.text + str(reply.headers)
  anna.rank(task, people.rank_of)
  for path in paths:
    assert 'secretmodel' not in anna.get(path).text
  # Nor the position in the file: rank0 is the first output shown.
  page = anna.get(f'/task/{task}/5').text
  assert re.findall(r'name="(rank\d)"', page) == [f'rank{i}' for i in range(4)]


def test_overlap_is_reached_and_never_exceeded(site):
  site.load(people.ranking_items(3), overlap=2)
  given = []
  persons = [site.person(f'labeler{i}') for i in range(4)]
  for person in persons:
    while (task := person.claim()) is not None:
      person.rank(task, people.rank_of)
      given.append((person.id, task))
  assert len(given) == 6
  done = [(row.task_id, row.account_id) for row in site.rows()]
  assert len(set(done)) == 6
  tasks = [task for task, _ in done]
  assert all(tasks.count(task) == 2 for task in tasks)


def test_a_task_left_open_returns_to_the_pool(site):
  site.load(people.ranking_items(1))
  anna, ben = site.person('anna'), site.person('ben')
  task = anna.claim()
  anna.fill(task, 0)
  assert ben.claim() is None
  site.clock.now += 120 * 60 + 1
  task_of_ben = ben.claim()
  assert task_of_ben is not None
  # While Ben holds the task, Anna's late answer is only a draft.
  reply, _ = anna.rank(task, people.rank_of)
  assert reply.status_code == 409
  assert 'draft' in reply.text
  assert site.rows() == []
  ben.post(f'/task/{task_of_ben}/skip', reason='The task is unclear')
  reply, _ = anna.rank(task, people.rank_of)
  assert reply.status_code == 303
  assert [row.labeler for row in site.rows()] == ['anna']
  assert ben.claim() is None


def test_a_task_does_not_expire_during_work(site):
  site.load(people.ranking_items(1))
  anna, ben = site.person('anna'), site.person('ben')
  task = anna.claim()
  for step in range(3):
    site.clock.now += 90 * 60
    anna.fill(task, step)
  assert ben.claim() is None


# --- After the time limit -----------------------------------------------------


def state_of(site, task):
  """(state, reason, holders of the task's counted slots)."""
  with site.store.read() as c:
    row = c.execute(
      sa.select(schema.assignments).where(schema.assignments.c.id == task)
    ).one()
    holders = c.scalars(
      sa.select(schema.slots.c.holder).where(
        schema.slots.c.task_id == row.task_id, schema.slots.c.number > 0
      )
    ).all()
  return row.state, row.reason, holders


def act(person, task, action):
  """Does one action on a task with complete pages; returns the reply."""
  if action == 'skip':
    return person.post(f'/task/{task}/skip', reason='The task is unclear')
  if action == 'flag':
    return person.post(f'/task/{task}/flag', text='odd')
  if action == 'submit':
    return person.fill(task, 5, **{f'rank{i}': i + 1 for i in range(4)})[0]
  return person.fill(task, 1, action=action, overall=3)[0]


@pytest.mark.parametrize('who', ['free', 'taken', 'released unseen'])
@pytest.mark.parametrize(
  'action', ['skip', 'flag', 'submit', 'next', 'draft', 'autosave']
)
def test_actions_after_the_time_limit_are_kept(site, who, action):
  site.load(people.ranking_items(2))
  anna, ben = site.person('anna'), site.person('ben')
  task = anna.claim()
  for step in range(5):
    anna.fill(task, step)
  site.clock.now += 120 * 60 + 1
  if who == 'free':
    assert site.store.release_expired() == 1
  elif who == 'taken':
    task_of_ben = ben.claim()
    assert state_of(site, task) == ('expired', '', [ben.id])
  reply = act(anna, task, action)
  state, reason, holders = state_of(site, task)
  taken = who == 'taken'
  # Anna's action does not change who holds the task now.
  if action == 'skip':
    assert (reply.status_code, state) == (303, 'skipped')
    assert reason == 'The task is unclear'
    assert holders == [ben.id if taken else None]
  elif action == 'flag':
    assert reply.status_code == 303
    assert state == ('open' if who == 'released unseen' else 'expired')
    assert 'odd' in site.admin.get('/admin').text
  elif action == 'submit':
    assert (reply.status_code, state) == (
      (409, 'expired') if taken else (303, 'submitted')
    )
    assert len(site.rows()) == (not taken)
    assert holders == [ben.id if taken else anna.id]
  else:
    assert state == ('expired' if taken else 'open')
    assert holders == [ben.id if taken else anna.id]
    wanted = {'next': 303, 'draft': 303, 'autosave': 202 if taken else 204}
    assert reply.status_code == wanted[action]
  work = site.store.work(task, anna.id)
  assert work['draft']['prompt']  # What was written before is there.
  if action in ('next', 'draft', 'autosave'):
    place = f'output{work["order"][0]}'
    assert work['draft'][place]['overall'] == '3'
  # After a skip, Anna gets another task; Ben's work counts.
  again = anna.claim()
  assert (again == task) == (
    action != 'skip' and not taken and action != 'submit'
  )
  if action == 'skip':
    assert state_of(site, task)[:2] == ('skipped', 'The task is unclear')
    page = anna.get('/?label=1').text
    assert '<dt>Skipped</dt><dd>1</dd>' in page
    assert 'The task is unclear: 1' in site.admin.get('/admin').text
  if taken:
    assert ben.rank(task_of_ben, people.rank_of)[0].status_code == 303


def test_a_skip_sent_again_changes_nothing_and_a_new_reason_counts(site):
  site.load(people.ranking_items(1))
  anna, ben = site.person('anna'), site.person('ben')
  task = anna.claim()
  for reason in ('Other', 'Other', 'The task is unclear'):
    reply = anna.post(f'/task/{task}/skip', reason=reason)
    assert reply.status_code == 303
  assert state_of(site, task)[:2] == ('skipped', 'The task is unclear')
  page = site.admin.get('/admin/audit').text
  assert page.count('<td>skip</td>') == 2
  # A skip is final: later pages are refused, but show the text again.
  reply, _ = anna.fill(task, 1, notes='late')
  assert reply.status_code == 409 and 'late</textarea>' in reply.text
  mine = ben.claim()
  assert ben.rank(mine, people.rank_of)[0].status_code == 303
  assert ben.post(f'/task/{mine}/skip', reason='Other').status_code == 409


def test_unfinished_tasks_are_listed_and_offered_first(site):
  """Started tasks come first while they are free."""
  site.load(people.ranking_items(3))
  anna, ben = site.person('anna'), site.person('ben')
  ben.rank(ben.claim(), people.rank_of)  # Anna's is not the first task.
  task = anna.claim()
  anna.fill(task, 0)
  ben.claim()
  site.clock.now += 120 * 60 + 1
  assert site.store.release_expired() == 2
  page = anna.get('/?label=1').text
  assert 'not finished in time' in page
  assert f'/task/{task}/0' in page
  assert 'The time for this task is over' in anna.get(f'/task/{task}/1').text
  assert ben.claim() not in (None, task)  # His own, which he had begun.
  assert anna.claim() == task
  assert 'The time for this task' not in anna.get(f'/task/{task}/1').text


def test_only_one_task_at_a_time_is_reopened(site):
  site.load(people.ranking_items(2))
  anna, ben = site.person('anna'), site.person('ben')
  first = anna.claim()
  anna.fill(first, 0)
  site.clock.now += 120 * 60 + 1
  first_of_ben = ben.claim()
  second = anna.claim()
  assert second not in (None, first)
  ben.post(f'/task/{first_of_ben}/skip', reason='Other')
  anna.fill(first, 1, notes='kept')
  # The draft is saved, and the task stays free for others.
  assert state_of(site, first) == ('expired', '', [None])
  assert anna.claim() == second
  anna.rank(second, people.rank_of)
  assert anna.claim() == first
  assert 'kept</textarea>' in anna.get(f'/task/{first}/1').text


def test_a_flag_counts_as_work(site):
  site.load(people.ranking_items(1))
  anna, ben = site.person('anna'), site.person('ben')
  task = anna.claim()
  site.clock.now += 110 * 60
  anna.post(f'/task/{task}/flag', text='odd')
  site.clock.now += 20 * 60
  assert ben.claim() is None


def test_an_open_task_of_a_closed_batch_does_not_block(site):
  site.load(people.ranking_items(1), name='one')
  site.load(people.ranking_items(1), name='two')
  anna = site.person('anna')
  first = anna.claim()
  anna.fill(first, 0)
  site.admin.post('/admin/batches/1', closed='1')
  assert 'Next task' in anna.get('/?label=1').text
  second = anna.claim()
  assert second not in (None, first)
  site.admin.post('/admin/batches/1', closed='0')
  for task in (first, second):
    assert anna.rank(task, people.rank_of)[0].status_code == 303


def test_suspended_accounts_get_no_task(site):
  """The account that the request began with may be out of date."""
  site.load(people.ranking_items(1))
  anna = site.person('anna')
  account = site.store.session(anna.client.cookies['labeling'])
  site.store.set_status(anna.id, 'suspended', by=site.admin.id)
  with pytest.raises(store.StoreError, match='suspended'):
    site.store.claim(account)


def test_drafts_and_answers_can_be_edited_again(site):
  site.load(people.ranking_items(1))
  anna = site.person('anna')
  task = anna.claim()
  anna.fill(task, 0)
  anna.fill(task, 1, action='draft', overall=3, notes='so far <b>')
  page = anna.get(f'/task/{task}/1').text
  assert 'so far &lt;b&gt;</textarea>' in page
  assert re.search(r'name="overall" value="3" checked', page)
  assert f'/task/{task}/2' in anna.post('/next').headers['location']
  anna.rank(task, people.rank_of)
  anna.rank(task, lambda text: 5 - people.rank_of(text))
  (row,) = site.rows()
  assert (row.content['ranks'], row.revision) == ([4, 3, 2, 1], 2)
  assert f'href="/task/{task}/0"' in anna.get('/').text


def test_a_page_is_saved_while_the_labeler_types(site):
  site.load(people.ranking_items(1))
  anna = site.person('anna')
  task = anna.claim()
  anna.fill(task, 0)
  path = f'/task/{task}/1'
  reply = anna.post(path, action='autosave', notes='half a <b>')
  assert (reply.status_code, reply.text) == (204, '')
  page = anna.get(path).text
  assert 'half a &lt;b&gt;</textarea>' in page
  # An incomplete page has no tick, and the task continues there.
  assert page.count('(saved)') == 1
  assert anna.post('/next').headers['location'] == path
  anna.fill(task, 1)
  assert anna.get(f'/task/{task}/2').text.count('(saved)') == 2
  assert site.rows() == []


def test_a_submit_sent_twice_counts_once(site):
  site.load(people.ranking_items(1))
  anna = site.person('anna')
  task = anna.claim()
  reply, fields = anna.rank(task, people.rank_of)
  again = anna.post(f'/task/{task}/5', **fields)
  assert again.status_code == 303
  assert again.headers['location'] == reply.headers['location']
  with site.store.read() as c:
    assert c.scalar(sa.select(sa.func.count()).select_from(schema.answers)) == 1


def test_skipped_tasks_go_to_others_and_not_back(site):
  site.load(people.ranking_items(1))
  anna, ben = site.person('anna'), site.person('ben')
  task = anna.claim()
  assert anna.post(f'/task/{task}/skip', reason=' ').status_code == 409
  anna.post(f'/task/{task}/skip', reason='The task is unclear')
  assert anna.claim() is None
  assert ben.claim() is not None
  admin = site.admin.get('/admin').text
  assert 'The task is unclear: 1' in admin


def test_flags_reach_the_researchers(site):
  site.load(people.ranking_items(1))
  anna = site.person('anna')
  anna.post(f'/task/{anna.claim()}/flag', text='<script>odd</script>')
  assert '&lt;script&gt;odd' in site.admin.get('/admin').text


def test_pace_counts_work_and_not_the_night(site):
  site.load(people.ranking_items(1))
  anna = site.person('anna')
  task = anna.claim()
  site.clock.now += 30
  anna.fill(task, 0)
  site.clock.now += 8 * 3600  # Counts as the ten minutes of `idle_minutes`.
  anna.rank(task, people.rank_of)
  assert site.rows()[0].seconds == 630


def test_answers_record_the_current_instructions(site):
  site.load(people.ranking_items(2))
  anna = site.person('anna')
  anna.rank(anna.claim(), people.rank_of)
  site.admin.post('/admin/instructions', phase='training', text='# New\n\nRead')
  anna.rank(anna.claim(), people.rank_of)
  assert [row.instructions for row in site.rows()] == [
    'training/1',
    'training/2',
  ]
  assert '<h2>New</h2>' in anna.get('/instructions/training').text


# --- Screening and agreement -------------------------------------------------


def test_screening_compares_with_researchers(site):
  site.load(people.ranking_items(4), name='screen', screening=True)
  site.load(
    [{'prompt': 'Say no.'}], 'demonstration', name='write', screening=True
  )
  site.load(people.ranking_items(1), name='real')
  judge = site.person('judge', 'researcher')
  anna = site.person('anna', status='screening')
  ben = site.person('ben', status='screening')
  flips = {judge: (), anna: (0,), ben: (0, 1, 2)}
  for person, flipped in flips.items():
    for i in range(4):

      def order(text, i=i, flipped=flipped):
        rank = people.rank_of(text)
        return 5 - rank if i in flipped else rank

      person.rank(
        person.claim(),
        order,
        {'sensitive': int(i in flipped)},
      )
    person.fill(person.claim(), 0, response=f'No. {person.id}')
  assert anna.claim() is None  # No real work yet.
  for row in site.rows():
    if row.kind == 'demonstration' and row.role == 'labeler':
      reply = judge.post(
        f'/grading/{row.assignment_id}', grade=7 if row.labeler == 'anna' else 5
      )
      assert reply.status_code == 303
  found = {p['name']: p for p in research.screening(site.store, site.rows())}
  assert set(found) == {'anna', 'ben'}
  # Anna reverses one of four rankings and one of five flags (the written task
  # has the first choice of every question, as the judge's).
  assert found['anna']['rankings'].rate == 18 / 24
  assert found['anna']['flags'].rate == 4 / 5
  assert found['anna']['demonstrations'] == 7
  assert found['anna']['passes'] is True
  assert found['ben']['rankings'].rate == 6 / 24
  assert found['ben']['flags'].rate == 2 / 5
  assert found['ben']['passes'] is False
  page = site.admin.get('/admin/screening').text
  assert 'reached' in page and 'missed' in page
  site.admin.post(f'/admin/accounts/{anna.id}/status', status='active')
  assert anna.claim() is not None
  assert ben.claim() is None


def test_screening_answers_are_not_exported(site, tmp_path):
  site.load(people.ranking_items(1), screening=True)
  anna = site.person('anna', status='screening')
  anna.rank(anna.claim(), people.rank_of)
  assert exporting.export(site.store, tmp_path / 'out') == {}


def test_pair_counts_by_hand():
  # Pairs: 01 alike, 02 alike, 12 tied by the second.
  assert labels.pair_counts([1, 2, 3], [1, 2, 2]) == (2, 2)
  # 01 reversed, 02 alike, 12 alike.
  assert labels.pair_counts([1, 2, 3], [2, 1, 3]) == (2, 3)


def test_agreement_and_disagreements(site):
  site.load(people.ranking_items(2, 3), overlap=2)
  judge = site.person('judge', 'researcher')
  anna, ben = site.person('anna'), site.person('ben')
  swap = {'text 0': 2, 'text 1': 1, 'text 2': 3}
  for person, orders in (
    (anna, (people.rank_of, people.rank_of)),
    (ben, (people.rank_of, swap.get)),
    (judge, (people.rank_of, people.rank_of)),
  ):
    for order in orders:
      person.rank(person.claim(), order)
  found = research.agreement(site.rows(), 0)
  assert found['labelers'].rate == 5 / 6
  assert found['labelers'].low <= 5 / 6 <= found['labelers'].high
  assert found['labelers and researchers'].rate == 11 / 12
  assert found['researchers'] is None
  worst = research.disagreements(site.rows())
  # Task 2: Anna and Ben 2 of 3, Ben and the judge 2 of 3, Anna and judge 3.
  assert worst[0]['rate'] == 7 / 9
  assert worst[0]['prompt'] == 'Prompt number 1'
  page = site.admin.get(f'/admin/tasks/{worst[0]["task_id"]}').text
  assert 'secretmodel0' in page and 'ben' in page
  assert '83.3 %' in site.admin.get('/admin/agreement').text


def test_researchers_do_not_use_up_the_overlap(site):
  site.load(people.ranking_items(1))
  judge = site.person('judge', 'researcher')
  judge.rank(judge.claim(), people.rank_of)
  anna = site.person('anna')
  assert anna.claim() is not None


def test_people_statistics_by_hand(site):
  site.load(people.ranking_items(3, 3))
  anna = site.person('anna')
  tie = {'text 0': 1, 'text 1': 1, 'text 2': 2}
  for order in (tie.get, people.rank_of):
    task = anna.claim()
    site.clock.now += 60
    anna.rank(task, order)
  anna.post(f'/task/{anna.claim()}/skip', reason='Other')
  (own,) = [
    p for p in research.people(site.store, site.rows()) if p['name'] == 'anna'
  ]
  assert own['answers'] == 2
  assert own['tie_rate'] == 1 / 6
  assert own['skip_rate'] == 1 / 3
  assert own['median_seconds'] == 60
  assert own['per_hour'] == 60


# --- Access -------------------------------------------------------------------


def _fill_path(path, values):
  for name, value in values.items():
    path = re.sub(rf'{{{name}(:int)?}}', str(value), path)
  return path


@pytest.mark.parametrize(
  ('method', 'path', 'access'), [route[:3] for route in web.ROUTES]
)
def test_every_route_checks_access(tmp_path, method, path, access):
  site = people.Site(f'sqlite:///{tmp_path}/site.sqlite', tmp_path)
  site.load(people.ranking_items(3), overlap=1)
  site.load([{'prompt': 'W'}], 'demonstration', name='s', screening=True)
  anna, ben = site.person('anna'), site.person('ben')
  judge = site.person('judge', 'researcher')
  task = anna.claim()
  anna.fill(task, 0, notes='private')
  path = _fill_path(
    path,
    {
      'assignment': task,
      'step': 0,
      'task': 1,
      'account': anna.id,
      'batch': 1,
      'phase': 'training',
      'token': 'x' * 40,
      'name': 'style.css',
      'folder': '20270115-080000',
    },
  )
  before = _everything(site)
  stranger = people.Person(site, 0)
  ways = {
    'stranger': stranger,
    'labeler': ben,
    'researcher': judge,
  }
  roles = {
    'anyone': (),
    'labeler': ('stranger',),
    'researcher': ('stranger', 'labeler'),
    'admin': ('stranger', 'labeler', 'researcher'),
  }[access]
  if '/task/' in path and not path.startswith('/admin'):
    roles = tuple(ways)  # Anna's alone, whoever asks.
  for role in roles:
    person = ways[role]
    if method == 'GET':
      reply = person.get(path)
    else:
      fields = {'status': 'active', 'action': 'draft', 'reason': 'x'}
      csrf = '' if role == 'stranger' else person.csrf
      reply = person.client.post(
        path, data={'csrf': csrf, 'text': 'x', 'phase': 'training'} | fields,
        follow_redirects=False,
      )  # fmt: skip
    assert reply.status_code == (401 if role == 'stranger' else 404), role
    assert 'Prompt number' not in reply.text
    assert 'private' not in reply.text
  if method == 'POST' and access != 'anyone':
    # Without the right token, the right person changes nothing either.
    for token in ('', ben.csrf):
      reply = site.admin.client.post(
        path, data={'csrf': token}, follow_redirects=False
      )
      assert reply.status_code == 403
  assert _everything(site) == before


def _everything(site):
  with site.store.read() as c:
    return {
      table.name: [tuple(row) for row in c.execute(sa.select(table))]
      for table in schema.metadata.sorted_tables
    }


def test_every_reply_has_the_headers(site):
  for path in ('/', '/nothing', '/admin', '/static/labeling.js', '/next'):
    reply = site.admin.get(path)
    policy = reply.headers['content-security-policy']
    assert "default-src 'none'" in policy
    assert 'unsafe' not in policy
    assert reply.headers['x-content-type-options'] == 'nosniff'


def test_an_internal_error_shows_no_details_and_keeps_the_headers(
  site, monkeypatch
):
  def broken(the_store):
    del the_store
    raise RuntimeError('secret detail')

  monkeypatch.setattr(research, 'progress', broken)
  reply = site.admin.get('/admin')
  assert reply.status_code == 500
  assert 'Something went wrong' in reply.text
  assert 'secret detail' not in reply.text
  assert "default-src 'none'" in reply.headers['content-security-policy']


def test_pages_hold_no_inline_script_or_style(site):
  site.load(people.ranking_items(1))
  anna = site.person('anna')
  task = anna.claim()
  pages = [anna.get(f'/task/{task}/{i}').text for i in (0, 1, 5)]
  pages += [
    site.admin.get(path).text
    for method, path, _, _ in web.ROUTES
    if method == 'GET' and '{' not in path
  ]
  for page in pages:
    assert not re.search(r'<script(?! src="/static/)|\sstyle=|\son\w+=', page)
    assert not re.search(r'(src|href)="(https?:)?//', page)


def test_invitation_links_work_once_and_expire(site):
  account_id = site.store.add_account('anna', 'labeler', 'active')
  token = site.store.invite(account_id)
  person = people.Person(site, account_id)
  # A mail program's preview does not use up the link.
  assert person.get(f'/join/{token}').status_code == 200
  person.join(token)
  other = people.Person(site, account_id)
  assert other.get(f'/join/{token}').status_code == 410
  older, newer = site.store.invite(account_id), site.store.invite(account_id)
  fields = people.joining_fields(other.get(f'/join/{newer}').text)
  for used in (token, older):
    reply = other.client.post(f'/join/{used}', data=fields)
    assert reply.status_code == 410
  site.clock.now += 7 * 86400 + 1
  reply = other.client.post(f'/join/{newer}', data=fields)
  assert reply.status_code == 410


CROSS_SITE = [
  {'origin': 'https://evil.example'},
  {'origin': 'null'},
  {'origin': 'http://['},
  {'origin': 'http://evil.site.example'},
  {'sec-fetch-site': 'cross-site'},
  {'sec-fetch-site': 'same-site'},
  {'origin': 'http://site.example', 'sec-fetch-site': 'cross-site'},
]


def test_another_site_cannot_post_a_form(site):
  """Neither to sign a visitor in, nor on behalf of a signed-in one."""
  site.load(people.ranking_items(1))
  account_id = site.store.add_account('anna', 'labeler', 'active')
  token = site.store.invite(account_id)
  anna = people.Person(site, account_id)
  fields = people.joining_fields(anna.get(f'/join/{token}').text)

  def post(path, fields, headers):
    return anna.client.post(
      path, data=fields, headers=headers, follow_redirects=False
    ).status_code

  for headers in CROSS_SITE:
    assert post(f'/join/{token}', fields, headers) in (400, 403), headers
    assert 'labeling' not in anna.client.cookies
  # The link was not used up; our own page sends these headers.
  own = {'origin': 'http://site.example', 'sec-fetch-site': 'same-origin'}
  assert post(f'/join/{token}', fields, own) == 303
  for headers in CROSS_SITE:
    assert post('/next', {'csrf': anna.csrf}, headers) in (400, 403), headers
  with site.store.read() as c:
    assert not c.execute(sa.select(schema.assignments)).all()
  assert post('/next', {'csrf': anna.csrf}, own) == 303


def test_signing_in_needs_the_page_of_the_link(site):
  """Posts without it, or with one from another browser, are refused."""
  account_id = site.store.add_account('anna', 'labeler', 'active')
  token = site.store.invite(account_id)
  visitor, attacker = people.Person(site, 0), people.Person(site, 0)
  foreign = people.joining_fields(attacker.get(f'/join/{token}').text)
  assert set(foreign) == {'joining'}
  for fields in ({}, foreign, {'joining': ''}):
    reply = visitor.client.post(f'/join/{token}', data=fields)
    assert reply.status_code == 403
    assert 'open your invitation link again' in reply.text
  visitor.get(f'/join/{token}')
  for fields in ({}, foreign, {'joining': ''}, {'joining': 'é'}):
    assert visitor.client.post(f'/join/{token}', data=fields).status_code == 403
  assert 'labeling' not in visitor.client.cookies
  # Previews by GET or HEAD do not use up the link.
  assert attacker.client.head(f'/join/{token}').status_code == 200
  visitor.join(token)
  assert visitor.get('/instructions/training').status_code == 200


def test_a_second_sign_in_ends_the_first(site):
  site.load(people.ranking_items(1))
  anna, ben = site.person('anna'), site.person('ben')
  task = anna.claim()
  anna.fill(task, 0)
  token = site.store.invite(anna.id)
  phone = people.Person(site, anna.id)
  assert (
    'ends your session on any other browser' in phone.get(f'/join/{token}').text
  )
  assert anna.get('/instructions/training').status_code == 200  # Only looked.
  phone.join(token)
  reply = anna.get('/instructions/training')
  assert reply.status_code == 401
  assert 'signed in on another browser since' in reply.text
  assert 'signed in on another browser since' in anna.get('/').text
  assert ben.get('/instructions/training').status_code == 200
  assert phone.claim() == task
  # Another person's sign-in on the same browser ends its session, too.
  old = phone.client.cookies['labeling']
  page = phone.get(f'/join/{site.store.invite(ben.id)}').text
  assert 'signed in as anna' in page
  phone.join(site.store.invite(ben.id))
  phone.client.cookies.clear()
  phone.client.cookies.set('labeling', old)
  assert phone.get('/instructions/training').status_code == 401


def test_tokens_are_not_in_the_database(site):
  account_id = site.store.add_account('anna', 'labeler', 'active')
  token = site.store.invite(account_id)
  session = site.store.join(token)
  everything = str(_everything(site))
  assert token not in everything
  assert session not in everything


def test_sessions_expire_and_end(site):
  anna = site.person('anna')
  assert anna.get('/instructions/training').status_code == 200
  site.clock.now += 14 * 86400 + 1
  assert anna.get('/instructions/training').status_code == 401
  ben = site.person('ben')
  cookie = ben.client.cookies['labeling']
  ben.post('/leave')
  ben.client.cookies.set('labeling', cookie)
  assert ben.get('/instructions/training').status_code == 401


def test_scripts_cannot_read_the_cookie(tmp_path):
  for url, secure in (('http://site.example', False), ('https://s.x', True)):
    site = people.Site(f'sqlite:///{tmp_path}/{secure}', tmp_path,
                       public_url=url)  # fmt: skip
    account_id = site.store.add_account('anna', 'labeler', 'active')
    person = people.Person(site, account_id)
    token = site.store.invite(account_id)
    opened = person.client.get(f'/join/{token}')
    reply = person.client.post(
      f'/join/{token}', data=people.joining_fields(opened.text),
      follow_redirects=False,
    )  # fmt: skip
    for answer, name, kind in ((opened, 'joining', 'strict'),
                               (reply, 'labeling', 'lax')):  # fmt: skip
      cookie = answer.headers.get_list('set-cookie')[0].lower()
      assert cookie.startswith(f'{name}=')
      assert 'httponly' in cookie and f'samesite={kind}' in cookie
      assert ('secure' in cookie) == secure


def test_suspension_takes_effect_at_once(site):
  site.load(people.ranking_items(1))
  anna, ben = site.person('anna'), site.person('ben')
  anna.claim()
  site.admin.post(f'/admin/accounts/{anna.id}/status', status='suspended')
  assert anna.get('/instructions/training').status_code == 401
  assert ben.claim() is not None  # Her open task is free again.
  reply = site.admin.post(f'/admin/accounts/{anna.id}/invite')
  assert reply.status_code == 409


def test_rate_limit(tmp_path):
  site = people.Site(
    f'sqlite:///{tmp_path}/s', tmp_path, requests_per_minute=10
  )
  anna, ben = site.person('anna'), site.person('ben')
  codes = [anna.get('/').status_code for _ in range(11)]
  assert codes.count(429) == 11 - 10 + 0
  assert ben.get('/').status_code == 200
  site.clock.now += 61
  assert anna.get('/').status_code == 200
  stranger = people.Person(site, 0)
  codes = [stranger.get('/join/x').status_code for _ in range(25)]
  assert 429 in codes


REFUSED = {
  'signed out': (401, 'GET', '/admin', {}),
  'no such page': (404, 'GET', '/nothing', {}),
  'no such method': (404, 'DELETE', '/', {}),
  'another host': (400, 'GET', '/', {'headers': {'host': 'evil'}}),
  'bad host': (400, 'GET', '/', {'headers': {'host': '['}}),
  'no file': (404, 'GET', '/static/x', {}),
  'too big': (413, 'POST', '/join/x', {'content': b'a' * 4_000_001}),
  'no invitation': (410, 'GET', '/join/x', {}),
  'cross-site': (403, 'POST', '/join/x', {'headers': CROSS_SITE[0]}),
}
REFUSED_IN = {
  'no token': (403, 'POST', '/next', {}),
  'not for labelers': (404, 'GET', '/admin', {}),
  'no such task': (404, 'GET', '/task/99/0', {}),
  'too big': (413, 'POST', '/next', {'content': b'a' * 4_000_001}),
}


def test_refused_requests_count_towards_the_limit(tmp_path):
  site = people.Site(
    f'sqlite:///{tmp_path}/s', tmp_path,
    requests_per_minute=10, joins_per_minute=10,
  )  # fmt: skip
  stranger, anna = people.Person(site, 0), site.person('anna')
  for person, cases in ((stranger, REFUSED), (anna, REFUSED_IN)):
    for name, (status, method, path, settings) in cases.items():
      site.clock.now += 61  # A minute of peace.

      def ask(call=(method, path), person=person, settings=settings):
        reply = person.client.request(*call, follow_redirects=False, **settings)
        policy = reply.headers['content-security-policy']
        assert "default-src 'none'" in policy
        return reply.status_code

      found = [ask() for _ in range(12)]
      assert found == [status] * 10 + [429] * 2, name
      # Whoever keeps asking stays refused.
      for _ in range(10):
        site.clock.now += 20
        for _ in range(5):
          ask()
      assert ask() == 429


def test_other_hosts_and_big_bodies_are_refused(site):
  anna = site.person('anna')
  assert anna.client.get('/', headers={'host': 'evil'}).status_code == 400
  reply = anna.client.post('/next', content=b'a' * 4_000_001)
  assert reply.status_code == 413


def test_what_admins_do_is_logged(site):
  site.admin.post(
    '/admin/accounts', name='anna', role='labeler', status='active'
  )
  site.admin.post('/admin/export')
  page = site.admin.get('/admin/audit').text
  for word in ('account', 'invite', 'export', 'join'):
    assert f'<td>{word}</td>' in page


# --- Hostile text -------------------------------------------------------------

HOSTILE = [
  '<script>alert(1)</script>',
  '"><img src=x onerror=alert(1)>',
  "{{ 7 * 7 }} {% raw %} ' onload='x",
  'abc\u202edef\u2066\u200b\ufeff\x07',
  'a' * 1_000_000,
  '',
  '</textarea></div><form action=//evil>',
  '\n\n  leading and trailing  \n',
]


def test_hostile_texts_are_shown_and_never_run(site, tmp_path):
  site.load(
    [{'prompt': HOSTILE[0] + HOSTILE[6], 'completions': HOSTILE,
      'category': HOSTILE[1], 'models': HOSTILE}],
    name=HOSTILE[1],
  )  # fmt: skip
  anna = site.person('anna')
  task = anna.claim()
  pages = [anna.get(f'/task/{task}/{i}').text for i in range(10)]
  anna.rank(task, lambda text: 1, notes=HOSTILE[0])
  pages += [site.admin.get(path).text for path in ('/admin', '/admin/tasks/1')]
  for page in pages:
    assert '<script>alert' not in page
    assert '<img' not in page
    assert '<form action=//evil' not in page
    assert '49' not in re.findall(r'>([^<]*7 \* 7[^<]*)<', page)
    assert '\u202e' not in page and '\u200b' not in page
  assert any('U+202E' in page and 'U+200B' in page for page in pages)
  exporting.export(site.store, tmp_path / 'out')
  (found,) = records.read_jsonl(
    tmp_path / 'out/comparisons.jsonl', records.Comparison
  )
  assert list(found.completions) == HOSTILE  # Untouched.


# One of each kind: joiner, Khmer vowel, braille blank, variation selectors,
# Hangul fillers, soft hyphen, tag, format, musical and hieroglyphic blanks, a
# lone accent, space, control.
INVISIBLE = [
  '\u034f', '\u17b4', '\u2800', '\ufe0f', '\U000e0100', '\u3164', '\uffa0',
  '\u115f', '\u00ad', '\U000e0041', '\u2062', '\u180e', '\U0001d159',
  '\U00013441', '\u0301', '\u00a0', '\u0085', '\u2029', '\ufff9',
]  # fmt: skip


def test_invisible_text_counts_as_blank(tmp_path):
  site = people.Site(
    f'sqlite:///{tmp_path}/s', tmp_path, requests_per_minute=100_000
  )
  fields = {'kind': 'demonstration', 'phase': 'training', 'overlap': '1'}
  line = json.dumps({'prompt': 'W'})
  for hidden in INVISIBLE:
    blank = f' {hidden}{hidden}\n'
    for name in (hidden, f'an{hidden}na'):
      reply = site.admin.post(
        '/admin/accounts', name=name, role='labeler', status='active'
      )
      # The accent combines with the letter into one valid character.
      assert reply.status_code == (200 if name == 'an\u0301na' else 409), name
    for name, lines in ((blank, line), ('b', json.dumps({'prompt': blank}))):
      reply = site.admin.post('/admin/import', name=name, lines=lines, **fields)
      assert reply.status_code in (409, 422), (name, lines)
    reply = site.admin.post('/admin/instructions', phase='training', text=blank)
    assert reply.status_code == 409, blank
  assert research.progress(site.store) == []
  number = len(INVISIBLE)
  site.load([{'prompt': 'W'}] * number, 'demonstration')
  site.load([{'prompt': 'W', 'style': 'plain'}] * number, 'prompt', 'plain')
  site.load([{'prompt': 'W', 'style': 'few-shot'}], 'prompt', 'few')
  anna = site.person('anna')
  for hidden in INVISIBLE:
    blank = f' {hidden}{hidden}\n'
    task = anna.claim()
    assert anna.post(f'/task/{task}/skip', reason=blank).status_code == 409
    assert anna.post(f'/task/{task}/flag', text=blank).status_code == 409
    assert anna.fill(task, 0, response=blank)[0].status_code == 422
    # The text itself is stored unchanged.
    assert anna.fill(task, 0, response=f'a{hidden}b')[0].status_code == 303
    assert site.rows()[-1].content['response'] == f'a{hidden}b'
  for hidden in INVISIBLE:
    blank = f' {hidden}{hidden}\n'
    task = anna.claim()
    assert anna.fill(task, 0, prompt=blank)[0].status_code == 422
    reply, _ = anna.fill(task, 0, prompt='Sing.', response=blank)
    assert reply.status_code == 303
  task = anna.claim()
  for hidden in INVISIBLE:
    pairs = {'query0': 'a', 'response0': 'b', 'query1': 'c'}
    reply, _ = anna.fill(task, 0, prompt='P', response1=hidden, **pairs)
    assert reply.status_code == 422, hidden


def test_invisible_characters_are_shown(site):
  marked = [c for c in INVISIBLE if c not in '\u0301\u00a0']
  site.load([{'prompt': 'a' + 'b'.join(marked), 'completions': ['x', '']}])
  anna = site.person('anna')
  task = anna.claim()
  page = anna.get(f'/task/{task}/0').text
  for hidden in marked:
    assert f'>U+{ord(hidden):04X}<' in page
    assert hidden not in page
  # A selector of emoji style is not marked.
  assert 'U+FE0F' not in web.shown('\u2764\ufe0f 1\ufe0f\u20e3')
  assert web.shown('x\ufe0f').count('U+FE0F') == 1
  assert web.shown('\u2764\ufe0f\ufe0f').count('U+FE0F') == 1


def test_invisible_responses_are_not_exported(site, tmp_path):
  site.load([{'prompt': 'W', 'style': 'plain'}], 'prompt')
  anna = site.person('anna')
  anna.fill(anna.claim(), 0, prompt='Sing.', response='\u2800\u034f')
  counts = exporting.export(site.store, tmp_path / 'out')
  assert counts == {'prompts': 1}


def test_forged_answers_are_refused(site):
  site.load(people.ranking_items(1))
  anna = site.person('anna')
  task = anna.claim()
  anna.fill(task, 0)
  bad = (
    ('overall', '8'), ('overall', ''), ('overall', '٣'), ('fails_task', '2'),
    ('notes', 'a' * 1_000_001), ('notes', '\x00'),
  )  # fmt: skip
  for name, value in bad:
    reply, _ = anna.fill(task, 1, **{name: value})
    assert reply.status_code == 422, name
  for step in range(1, 5):
    anna.fill(task, step)
  for value in ('0', '5', '1.5', '-1', 'x'):
    reply, _ = anna.fill(task, 5, rank0=value, rank1=1, rank2=1, rank3=1)
    assert reply.status_code == 422
  reply, _ = anna.fill(
    task, 5, **{f'rank{i}': 1 for i in range(4)}, submission="' OR 1=1 --"
  )
  assert reply.status_code == 409
  assert anna.get(f'/task/{task}/99').status_code == 404
  assert anna.get(f'/task/{10**30}/0').status_code == 404
  assert site.rows() == []


# --- Import -------------------------------------------------------------------


@pytest.mark.parametrize(
  ('line', 'kind', 'words'),
  [
    ('{', 'ranking', 'test.jsonl:2: not JSON'),
    ('[]', 'ranking', 'expected a JSON object'),
    ('{"prompt": "a", "completions": ["b"]}', 'ranking', 'has 2 to 12'),
    ('{"completions": ["b", "c"]}', 'ranking', "give either 'prompt'"),
    ('{"prompt": "a", "completion": []}', 'ranking', "unknown field"),
    ('{"prompt": "a", "completions": "bc"}', 'ranking', 'must be a list'),
    ('{"prompt": "a", "completions": ["b", 1]}', 'ranking', 'of strings'),
    ('{"prompt": "a", "completions": ["b", "c"], "models": ["m"]}', 'ranking',
     '1 names for 2'),
    ('{"prompt": "a", "completions": ["b", "c"], "ended": [true]}', 'ranking',
     "'ended' has 1 values for 2"),
    ('{"prompt": "a", "completions": ["b", "c"], "ended": [1, 0]}', 'ranking',
     'of true and false'),
    ('{"prompt": " "}', 'demonstration', 'is empty'),
    ('{"prompt": "a\\u0000"}', 'demonstration', 'cannot be stored'),
    ('{"prompt": "a\\ud800"}', 'demonstration', 'cannot be stored'),
    ('{"prompt": "a", "metadata": {"x": "\\u0000"}}', 'demonstration', 'NUL'),
    ('{"prompt": "a", "style": "odd"}', 'prompt', 'few-shot'),
    ('{"prompt": "\\u2800"}', 'demonstration', 'is empty'),
    ('{"turns": []}', 'demonstration', "give either 'prompt'"),
    ('{"turns": ["a"]}', 'demonstration', 'turn 1 must have a role'),
    ('{"turns": [{"role": "assistant", "content": "a"}]}', 'demonstration',
     "must end with the user's turn"),
    ('{"turns": [{"role": "user", "content": " "}]}', 'demonstration',
     'ends with an empty message'),
    ('{"prompt": "b", "turns": [{"role": "user", "content": "a"}]}',
     'demonstration', 'say different things'),
    ('{"turns": [{"role": "user", "content": "a\\u0000"}]}', 'demonstration',
     'NUL'),
  ],
)  # fmt: skip
def test_bad_lines_are_named_and_nothing_is_imported(site, line, kind, words):
  good = json.dumps(
    people.ranking_items(1)[0] if kind == 'ranking' else {'prompt': 'x'}
  )
  with pytest.raises(records.RecordError, match='test.jsonl:2') as caught:
    importing.import_tasks(
      site.store,
      f'{good}\n{line}'.encode(),
      source='test.jsonl',
      name='n',
      kind=kind,
      phase='training',
      overlap=1,
    )
  assert words in str(caught.value)
  assert research.progress(site.store) == []


def test_import_through_the_page(site):
  lines = '\r\n'.join(json.dumps(item) for item in people.ranking_items(2))
  fields = {'name': 'b', 'kind': 'ranking', 'phase': 'training', 'overlap': '3'}
  bad = site.admin.post('/admin/import', lines='{', **fields)
  assert bad.status_code == 422 and 'import:1' in bad.text
  # Files from Windows may begin with a byte order mark.
  lines = f'\ufeff{lines}'
  assert site.admin.post('/admin/import', lines=lines, **fields).is_redirect
  again = site.admin.post('/admin/import', lines=lines, **fields)
  assert again.status_code == 422 and 'already' in again.text
  (batch,) = research.progress(site.store)
  assert (batch['num_tasks'], batch['wanted']) == (2, 6)


def test_a_closed_batch_takes_no_answers(site):
  site.load(people.ranking_items(2))
  anna = site.person('anna')
  task = anna.claim()
  site.admin.post('/admin/batches/1', closed='1')
  reply, _ = anna.rank(task, people.rank_of)
  assert reply.status_code == 409
  site.admin.post('/admin/batches/1', closed='0')
  reply, _ = anna.rank(task, people.rank_of)
  assert reply.status_code == 303


def test_export_through_the_page(site):
  site.load(people.ranking_items(1))
  anna = site.person('anna')
  anna.rank(anna.claim(), people.rank_of)
  page = site.admin.post('/admin/export').text
  links = re.findall(r'href="(/admin/export/[^"]+)"', page)
  assert any(link.endswith('comparisons.jsonl') for link in links)
  for link in links:
    assert site.admin.get(link).status_code == 200
    assert anna.get(link).status_code == 404
  folder = links[0].split('/')[3]
  for name in ('..%2f..%2fsite.sqlite', '%2e%2e/site.sqlite', 'x.jsonl'):
    assert site.admin.get(f'/admin/export/{folder}/{name}').status_code == 404


def test_an_export_removes_the_files_of_an_earlier_one(site, tmp_path):
  out = tmp_path / 'out'
  site.load(people.ranking_items(4))
  anna = site.person('anna')
  anna.rank(anna.claim(), people.rank_of)
  counts = exporting.export(site.store, out)
  split = 'valid' if 'comparisons_valid' in counts else 'train'
  other = {'valid': 'train', 'train': 'valid'}[split]
  old = (f'comparisons_{other}.jsonl', 'demonstrations.jsonl')
  with folders.writing(out, old, command='labeling --export') as earlier:
    for name in old:
      (earlier / name).write_text('{"old": 1}\n')
  (out / 'notes.txt').write_text('mine')
  counts = exporting.export(site.store, out)
  left = {
    'notes.txt', 'statistics.json', *(f'{name}.jsonl' for name in counts),
  }  # fmt: skip
  assert {path.name for path in out.iterdir()} == left | {folders.MANIFEST}
  # An export does not remove files that no export wrote.
  (out / 'prompts.jsonl').write_text('mine')
  with pytest.raises(records.RecordError, match='holds prompts.jsonl, which'):
    exporting.export(site.store, out)
  assert (out / 'prompts.jsonl').read_text() == 'mine'


def test_no_prompt_and_no_user_is_in_two_splits(tmp_path):
  """Users share prompts here; everything linked stays in one split."""
  site = people.Site(
    f'sqlite:///{tmp_path}/s', tmp_path, valid_fraction=0.5,
    requests_per_minute=100_000,
  )  # fmt: skip
  items = []
  for i in range(12):
    texts = {'completions': ['text 0', 'text 1']}
    items += [
      {'prompt': f'alone {i}', **texts},
      {'prompt': f'shared {i}', 'user': f'a{i}', **texts},
      {'prompt': f'shared {i}', 'user': f'b{i}', **texts},
      {'prompt': f'other {i}', 'user': f'b{i}', **texts},
      {'prompt': f'other {i}', **texts},
      # The same question, continued as a conversation.
      {
        'prompt': f'\n\nHuman: Alone  {i}\n\nAssistant: Yes.'
        '\n\nHuman: More!\n\nAssistant:',
        **texts,
      },
    ]
  site.load(items)
  anna = site.person('anna')
  while (task := anna.claim()) is not None:
    anna.rank(task, people.rank_of)
  exporting.export(site.store, tmp_path / 'out')
  found = {
    name: records.read_jsonl(
      tmp_path / f'out/comparisons_{name}.jsonl', records.Comparison
    )
    for name in ('train', 'valid')
  }
  assert sum(map(len, found.values())) == 72
  for part in (records.opening, lambda comparison: comparison.user):
    train, valid = (set(map(part, rows)) for rows in found.values())
    assert train & valid - {''} == set()
  # About half: 24 units of either size.
  assert 12 < len(found['valid']) < 60


def test_account_names_are_checked(site):
  for name in ('', 'a b', '<b>', 'x' * 41, 'admin'):
    with pytest.raises(store.StoreError):
      site.store.add_account(name, 'labeler', 'active')
