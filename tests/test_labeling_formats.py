"""Rankings of Argilla and Label Studio, into the site and out of it.

The records are written by us, with the fields and types of these programs'
exports.
"""

import json
import re
import uuid
import xml.etree.ElementTree

import pytest

pytest.importorskip('starlette', reason='pip install -r requirements-labeling')
pytest.importorskip('sqlalchemy')

import sqlalchemy as sa

from instruct_jax.data import records
from instruct_jax.labeling import (
  exporting,
  formats,
  importing,
  parts,
  research,
  schema,
)
from instruct_jax.labeling import store as store_lib
from tests import labeling_people as people

ANNA = '0d1f7a52-6a0b-4a6e-9d0e-5d0f0a3b7c11'
BEN = '7b0e5c9e-6f55-4a4b-8c8c-19d4b7f3a222'
CLEO = 'c3a0f1de-2b11-4f7e-9a77-0e6d5c4b3333'


@pytest.fixture
def site(tmp_path):
  return make_site(tmp_path)


def make_site(folder, name='site'):
  return people.Site(f'sqlite:///{folder}/{name}.sqlite', folder)


def load(site, found, file_format, name='batch', **settings):
  content = found if isinstance(found, bytes) else json.dumps(found).encode()
  return importing.import_tasks(
    site.store,
    content,
    source='theirs.json',
    name=name,
    **{'kind': 'ranking', 'phase': 'training', 'overlap': 2, **settings},
    file_format=file_format,
  )


def ranks_of(site):
  """Labeler -> ranks of each answer, by prompt."""
  found = {}
  for row in site.rows():
    found.setdefault(row.prompt, {})[row.labeler] = row.content['ranks']
  return found


def others(site):
  """(labeler, state, reason, draft) of what is not submitted."""
  query = (
    sa.select(
      schema.accounts.c.name, schema.assignments.c['state', 'reason', 'draft']
    )
    .select_from(schema.work.join(schema.accounts))
    .where(schema.assignments.c.state != 'submitted')
    .order_by(schema.assignments.c.id)
  )
  with site.store.read() as c:
    return [tuple(row) for row in c.execute(query)]


# --- Argilla ------------------------------------------------------------------


def argilla_records():
  """As `dataset.records.to_json` of version 2 writes them."""
  fields = {
    'instruction': 'Name a bird.',
    'response-1': 'Owl.',
    'response-2': 'Bat.',
    'response-3': '',
  }
  first = {
    'id': 'q1',
    'fields': fields,
    'metadata': {'source': 'birds', 'length': 3},
    'suggestions': {
      'preference': {
        'value': ['response-2', 'response-1', 'response-3'],
        'score': None,
        'agent': 'judge-7b',
      }
    },
    'responses': {
      'preference': [
        {
          'value': ['response-1', 'response-3', 'response-2'],
          'user_id': ANNA,
        },
        {'value': ['response-3', 'response-1'], 'user_id': BEN},
        {'value': ['response-1'], 'user_id': CLEO, 'status': 'discarded'},
      ],
      'why': [{'value': 'An owl is a bird.', 'user_id': ANNA}],
    },
    'vectors': {},
    '_server_id': 'd7a1',
  }
  second = {
    'id': 'q2',
    'fields': {**fields, 'instruction': 'Name a fish.'},
    'metadata': {},
    'suggestions': {},
    'responses': {
      'preference': [
        {
          'value': ['response-2', 'response-1', 'response-3'],
          'user_id': user,
        }
        for user in (ANNA, BEN, CLEO)
      ]
    },
    'vectors': {},
    '_server_id': None,
  }
  return [first, second]


def test_argilla_records_bring_tasks_and_answers(site, tmp_path):
  counts = load(site, argilla_records(), 'argilla')
  assert counts == {
    'tasks': 2,
    'submitted': 4,
    'unfinished': 1,
    'skipped': 1,
    'answers to why left out': 1,
    # As `to_json` leaves them; these lists were logged by a program, because
    # they differ in order.
    'answers without a status, taken as submitted': 5,
    'rankings without ranks, read as best first': 5,
  }
  assert ranks_of(site) == {
    'Name a bird.': {ANNA: [1, 3, 2]},
    'Name a fish.': dict.fromkeys((ANNA, BEN, CLEO), [2, 1, 3]),
  }
  # Ben's ranking was not complete: it waits as a draft.
  assert others(site) == [
    (BEN, 'expired', '', {'ranks': {'rank0': '2', 'rank2': '1'}}),
    (CLEO, 'skipped', '', {}),
  ]
  exporting.export(site.store, tmp_path / 'out')
  found = records.read_jsonl(
    tmp_path / 'out/comparisons.jsonl', records.Comparison
  )
  assert found[0].completions == ('Owl.', 'Bat.', '')
  assert (found[0].id, found[0].labeler) == ('q1', ANNA)
  assert found[0].metadata['source'] == 'birds'
  labeling = found[0].metadata['labeling']
  assert labeling['imported'] == 'argilla'
  assert labeling['instructions'] == 'imported/1'
  assert labeling['models'] == ['response-1', 'response-2', 'response-3']
  assert 'order_shown' not in labeling and 'ratings' not in labeling
  page = site.admin.get('/admin/tasks/1').text
  assert 'rank 3' in page and ANNA in page
  for path in (
    '/admin',
    '/admin/accounts',
    '/admin/agreement',
    '/adjudication',
  ):
    assert site.admin.get(path).status_code == 200
  # All three agree on the second task, under the instructions of the import.
  (version,) = research.agreement_by_version(site.rows(), 0)
  assert (version['version'], version['pairs']) == ('imported/1', 9)
  assert version['agreement']['labelers'].rate == 1.0


def test_annotators_cannot_sign_in_until_they_are_admitted(site):
  load(site, argilla_records(), 'argilla')
  with site.store.read() as c:
    accounts = c.execute(sa.select(schema.accounts).filter_by(name=ANNA)).all()
  ((_, _, role, status, _),) = accounts
  assert (role, status) == ('labeler', 'suspended')
  with pytest.raises(store_lib.StoreError, match='suspended'):
    site.store.invite(accounts[0].id)


def test_answers_fill_the_slots_and_others_get_the_rest(site):
  load(site, argilla_records(), 'argilla', overlap=2)
  # Task 1 has one answer of two; task 2 has three, one beyond its overlap.
  dora = site.person('dora')
  task = dora.claim()
  assert 'Name a bird.' in dora.get(f'/task/{task}/0').text
  dora.post(f'/task/{task}/skip', reason='Other')
  assert dora.claim() is None


def test_a_second_import_joins_the_same_people(site):
  load(site, argilla_records(), 'argilla', 'one')
  found = argilla_records()
  for record in found:
    record['fields']['instruction'] += ' Or two.'
  load(site, found, 'argilla', 'two')
  with site.store.read() as c:
    names = c.scalars(sa.select(schema.accounts.c.name)).all()
  assert sorted(names) == sorted(['admin', ANNA, BEN, CLEO])
  assert {row.instructions for row in site.rows()} == {
    'imported/1',
    'imported/2',
  }


def test_what_is_here_already_is_not_imported_again(site):
  (first, second) = argilla_records()
  # A page of the REST interface that was fetched twice.
  counts = load(site, [first, second, first], 'argilla', 'one')
  assert counts['records that the file repeats left out'] == 1
  rows = site.rows()
  with pytest.raises(store_lib.StoreError) as caught:
    load(site, [first, second], 'argilla', 'two')
  assert str(caught.value) == (
    "theirs.json: all 2 tasks and their answers are already in batch 'one'; "
    'to have the tasks labeled again, import them as JSONL, without answers'
  )
  assert len(research.progress(site.store)) == 1
  # Somebody who had discarded the first record ranks it now, and there is
  # another record.
  ranked = first['responses']['preference']
  ranked[2] = {**ranked[0], 'user_id': CLEO}
  third = {**second, 'fields': {**second['fields'], 'instruction': 'A cat?'}}
  counts = load(site, [first, second, third], 'argilla', 'three')
  number = len(second['responses']['preference'])
  assert (counts['tasks'], counts['submitted']) == (2, 1 + number)
  assert counts['answers that are here already left out'] == 2 + number
  assert counts['tasks without a new answer left out'] == 1
  new = site.rows()[len(rows) :]
  assert [(row.labeler, row.prompt) for row in new][0] == (
    CLEO,
    'Name a bird.',
  )
  # Another criterion is another question; and a second round has no answers.
  load(site, [first, second], 'argilla', 'four', phase='evaluation')
  for name in ('five', 'six'):
    site.load(people.ranking_items(2), name=name)


@pytest.mark.parametrize('file_format', ['argilla', 'label_studio'])
def test_an_export_is_not_imported_where_it_comes_from(
  filled, tmp_path, file_format
):
  before = filled.rows(), research.decisions(filled.store)
  counts = exporting.export_as(filled.store, tmp_path, file_format)
  for name in counts:
    content = (tmp_path / name).read_bytes()
    with pytest.raises(store_lib.StoreError, match="in batch 'ranking batch'"):
      load(filled, content, file_format, name)
  assert (filled.rows(), research.decisions(filled.store)) == before


def stripped(record):
  """The record without suggestions, which keep their order in any file."""
  return {**record, 'suggestions': {}}


def test_lists_in_the_order_of_the_question_are_no_rankings(site):
  """Argilla 2 drops the ranks of what people have ranked on its pages."""
  found = list(map(stripped, argilla_records()))
  for record in found:
    for response in record['responses']['preference']:
      response['value'] = ['response-1', 'response-2', 'response-3']
  # A draft is shorter if a program has logged it.
  found[0]['responses']['preference'][1]['value'] = ['response-2']
  with pytest.raises(records.RecordError) as caught:
    load(site, found, 'argilla')
  said = str(caught.value)
  assert 'answers to preference are lists without ranks' in said
  assert '/api/v1/datasets/ID/records?include=responses' in said
  assert research.progress(site.store) == []


def ranked(*pairs):
  return [{'rank': rank, 'value': f'response-{i}'} for i, rank in pairs]


def test_pages_of_the_rest_interface(tmp_path):
  """The question of a suggestion has an id there; a user may be deleted."""

  def page(number, **more):
    return {
      'items': [
        {
          'id': f'a0b{number}',
          'external_id': None,
          'status': 'completed',
          'fields': argilla_records()[0]['fields'],
          'metadata': {},
          'responses': [
            {
              'id': 'r1',
              'user_id': user,
              'status': 'submitted',
              'values': {
                'why': {'value': 'so'},
                'preference': {'value': ranked((1, 2), (2, 1), (3, 2))},
              },
            }
            for user in (ANNA, None)
          ],
          'suggestions': [
            {
              'id': 's1',
              'question_id': 'q7',
              'value': [
                {'value': f'response-{i}', 'rank': None} for i in (3, 1, 2)
              ],
              'agent': 'judge-7b',
            },
            {'id': 's2', 'question_id': 'q8', 'value': ['helpful']},
          ],
          'dataset_id': 'd1',
          **more,
        }
      ],
      'total': 2,
    }

  found = [page(1), page(2)]
  lines = '\n'.join(map(json.dumps, found)).encode()
  search = {'items': [{'record': page(3)['items'][0], 'query_score': 0.5}]}
  for name, content in (('one', found), ('two', lines), ('three', search)):
    number = 1 if name == 'three' else 2
    site = make_site(tmp_path, name)
    assert load(site, content, 'argilla', name) == {
      'tasks': number,
      'submitted': number,
      'answers of deleted users left out': number,
      'answers to why left out': 2 * number,
      'suggestions to other questions left out': number,
    }
    first = site.rows()[0]
    assert first.content['ranks'] == [2, 1, 2]
    assert first.record['suggestion'] == {
      'ranks': [2, 3, 1],
      'source': 'judge-7b',
    }


def test_ties_of_version_1_are_kept(tmp_path):
  """The REST interface and version 1 have a rank for each option."""
  record = {
    'id': 'a0b1',
    'external_id': 'q1',
    'fields': argilla_records()[0]['fields'],
    'metadata': None,
    'responses': [
      {
        'id': 'r1',
        'user_id': ANNA,
        'status': 'submitted',
        'values': {'preference': {'value': ranked((1, 1), (2, 3), (3, 1))}},
        'inserted_at': '2024-03-01T10:00:00.250000',
        'updated_at': '2024-03-01T10:05:00',
      },
      {
        'user_id': BEN,
        'status': 'draft',
        'values': {'preference': {'value': ranked((1, 2), (2, None), (3, 1))}},
      },
      {'user_id': CLEO, 'status': 'discarded', 'values': None},
    ],
    'suggestions': [
      {
        'question_name': 'preference',
        'value': ranked((1, 2), (2, 2), (3, 1)),
        'agent': 'judge-7b',
        'type': 'model',
        'score': 0.5,
      }
    ],
    'vectors': {},
  }
  for name, found in (('one', [record]), ('two', {'items': [record]})):
    site = make_site(tmp_path, name)
    counts = load(site, found, 'argilla', name, suggestions=True)
    assert counts == {
      'tasks': 1, 'submitted': 1, 'unfinished': 1, 'skipped': 1,
    }  # fmt: skip
  (first,) = site.rows()
  assert first.content['ranks'] == [1, 2, 1]
  assert exporting._clock_text(first.time) == '2024-03-01T10:05:00+00:00'
  assert first.record['suggestion'] == {
    'ranks': [2, 2, 1],
    'source': 'judge-7b',
  }
  assert first.record['id'] == 'q1'
  assert others(site)[0][3] == {'ranks': {'rank0': '2', 'rank2': '1'}}


HUB_ROWS = {
  'version 1': {
    'id': 'q1',
    'instruction': 'Name a bird.',
    'response-1': 'Owl.',
    'response-2': 'Bat.',
    'preference': [
      {
        'user_id': ANNA,
        'value': {'rank': [2, 1], 'value': ['response-1', 'response-2']},
        'status': 'submitted',
      },
      {
        'user_id': BEN,
        'value': {'rank': [1, 1], 'value': ['response-1', 'response-2']},
        'status': 'submitted',
      },
    ],
    'preference-suggestion': {
      'rank': [1, 2], 'value': ['response-2', 'response-1'],
    },
    'preference-suggestion-metadata': {
      'type': 'model', 'score': None, 'agent': 'judge-7b',
    },
    'why': [],
    'external_id': None,
    'metadata': '{"source": "birds"}',
  },
  'version 2': {
    'id': 'q1',
    'status': 'completed',
    '_server_id': 'd7a1',
    'instruction': 'Name a bird.',
    'response-1': 'Owl.',
    'response-2': 'Bat.',
    'preference.responses': [
      ['response-2', 'response-1'], ['response-1', 'response-2'],
    ],
    'preference.responses.users': [ANNA, BEN],
    'preference.responses.status': ['submitted', 'submitted'],
    'preference.suggestion': ['response-2', 'response-1'],
    'preference.suggestion.score': None,
    'preference.suggestion.agent': 'judge-7b',
    'length': 3,
  },
}  # fmt: skip


@pytest.mark.parametrize('version', HUB_ROWS)
def test_rows_of_a_data_set_on_the_hub(site, version):
  """One a line, as `datasets` writes JSON."""
  row = HUB_ROWS[version]
  other = {**row, 'id': 'q2'}
  lines = '\n'.join(json.dumps(each) for each in (row, other)) + '\n'
  counts = load(site, lines.encode(), 'argilla')
  bare = {'rankings without ranks, read as best first': 4}
  assert counts == {'tasks': 2, 'submitted': 4} | (
    bare if version == 'version 2' else {}
  )
  by_ben = [1, 1] if version == 'version 1' else [1, 2]
  assert ranks_of(site) == {'Name a bird.': {ANNA: [2, 1], BEN: by_ben}}
  found = site.rows()[0].record
  metadata = {'version 1': {'source': 'birds'}, 'version 2': {'length': 3}}
  assert found['metadata'] == metadata[version]
  assert found['id'] == 'q1'
  assert found['suggestion'] == {'ranks': [2, 1], 'source': 'judge-7b'}


def test_records_may_lack_an_option(site):
  """People rank all options of the question; a discard is of the record."""
  fields = argilla_records()[0]['fields']
  short = {k: v for k, v in fields.items() if k != 'response-1'}
  short |= {'instruction': 'Short.'}
  found = [
    {
      'fields': own,
      'responses': [
        {
          'user_id': ANNA,
          'status': 'submitted',
          'values': {'preference': {'value': ranked((1, 1), (2, 3), (3, 2))}},
        },
        {
          'user_id': BEN,
          'status': 'discarded',
          'values': {'why': {'value': 'Neither is a bird.'}},
        },
      ],
    }
    for own in (
      fields,
      short,
      {**short, 'instruction': 'Null.', 'response-1': None},
    )
  ]
  counts = load(site, found, 'argilla')
  assert counts == {'tasks': 3, 'submitted': 3, 'skipped': 3}
  assert [row.content['ranks'] for row in site.rows()] == [
    [1, 3, 2], [2, 1], [2, 1],
  ]  # fmt: skip


def test_columns_of_answers_in_old_data_sets(site):
  row = HUB_ROWS['version 1']
  names = ('user_id', 'value', 'status')
  column = {name: [one[name] for one in row['preference']] for name in names}
  old = {**row, 'preference': column}
  assert load(site, [old], 'argilla') == {'tasks': 1, 'submitted': 2}
  assert ranks_of(site) == {'Name a bird.': {ANNA: [2, 1], BEN: [1, 1]}}
  column['status'] = ['submitted']
  with pytest.raises(records.RecordError, match='record 1: .* in length'):
    load(site, [old], 'argilla', 'again')


def test_argilla_tasks_without_answers(site):
  record = argilla_records()[0]
  fields = {
    'prompt': [
      {'role': 'user', 'content': 'Name a bird.'},
      {'role': 'assistant', 'content': 'Owl.'},
      {'role': 'user', 'content': 'Another!'},
    ],
    'reply_1': 'Jay.',
    'reply_2': None,
    'reply_3': 'Bat.',
  }
  record |= {'fields': fields, 'responses': {}, 'suggestions': {}}
  assert load(site, [record], 'argilla') == {'tasks': 1}
  anna = site.person('anna')
  task = anna.claim()
  assert '<h3>Assistant</h3>' in anna.get(f'/task/{task}/0').text
  anna.rank(task, {'Jay.': 1, 'Bat.': 2}.get)
  (row,) = site.rows()
  assert row.texts == ('Jay.', 'Bat.')


def test_skips_and_drafts_alone_are_answers(site):
  (record, _) = argilla_records()
  skip = {'value': [], 'user_id': ANNA, 'status': 'discarded'}
  draft = {'value': ['response-2'], 'user_id': BEN, 'status': 'draft'}
  record['suggestions'] = {}
  for name, given in (('one', [skip]), ('two', [skip, draft])):
    record['responses'] = {'preference': given}
    counts = load(site, [record], 'argilla', name)
    assert counts['tasks'] == 1
    assert counts.get('skipped', 0) == (name == 'one')
    assert counts.get('unfinished', 0) == (name == 'two')
  # A field that nobody has ranked is a completion by its name.
  assert others(site)[-1][3] == {'ranks': {'rank1': '1'}}
  with site.store.read() as c:
    number = sa.select(sa.func.count()).select_from(schema.outputs)
    assert c.scalar(number) == 6


# --- Label Studio -------------------------------------------------------------


def annotation(number, person, ranker, **more):
  result = {
    'id': f'r{number}',
    'from_name': 'rank',
    'to_name': 'results',
    'type': 'ranker',
    'origin': 'manual',
    'value': {'ranker': ranker},
  }
  return {
    'id': number,
    'completed_by': person,
    'result': [result],
    'was_cancelled': False,
    'ground_truth': False,
    'created_at': '2024-03-01T10:00:00.250000Z',
    'updated_at': '2024-03-01T10:05:00.000000Z',
    'lead_time': 12.5,
    'draft_created_at': None,
    'parent_prediction': None,
    **more,
  }


def studio_task(number, annotations, **more):
  return {
    'id': number,
    'data': {
      'prompt': 'Name a bird.',
      'items': [
        {'id': 'llm_1', 'title': 'LLM 1', 'body': 'Owl.'},
        {'id': 'llm_2', 'title': 'LLM 2', 'body': 'Bat.'},
        {'id': 'llm_3', 'title': 'LLM 3', 'body': 'Jay.'},
      ],
      'source': 'birds',
    },
    'annotations': annotations,
    'drafts': [],
    'predictions': [],
    'meta': {},
    'inner_id': number,
    'total_annotations': len(annotations),
    'project': 4,
    **more,
  }


def studio_tasks():
  described = {'id': 8, 'email': 'ben@example.org', 'first_name': 'Ben'}
  first = studio_task(
    11,
    [
      annotation(1, 7, {'rank': ['llm_3', 'llm_1', 'llm_2']}),
      annotation(2, described, ['llm_1', 'llm_2', 'llm_3'], lead_time=None),
      annotation(3, 9, {}, was_cancelled=True, result=[]),
      annotation(4, 10, {'_': ['llm_2'], 'rank': ['llm_3', 'llm_1']}),
    ],
    predictions=[
      {
        'model_version': 'judge-7b',
        'score': 0.5,
        'result': annotation(0, 0, {'rank': ['llm_1', 'llm_3', 'llm_2']})[
          'result'
        ],
      }
    ],
    drafts=[annotation(5, 7, {}, user='cleo@example.org')],
  )
  buckets = {'rank1': ['llm_1', 'llm_3'], 'rank2': [], 'rank3': ['llm_2']}
  note = {'type': 'textarea', 'from_name': 'why', 'value': {'text': ['so']}}
  second = studio_task(
    12,
    [
      annotation(6, 7, {**buckets, '_': []}),
      annotation(7, 8, {'1': ['llm_2'], '2': ['llm_1', 'llm_3']}),
      annotation(
        8, 9, {'rank': ['llm_3', 'llm_1', 'llm_2']}, ground_truth=True
      ),
    ],
  )
  second['data'] |= {'prompt': 'Name two birds.'}
  second['annotations'][0]['result'].append(note)
  return [first, second]


def test_label_studio_tasks_bring_their_annotations(site, tmp_path):
  counts = load(site, studio_tasks(), 'label_studio')
  assert counts == {
    'tasks': 2,
    'submitted': 4,
    'skipped': 1,
    'unfinished': 1,
    'decided': 1,
    'results of type textarea left out': 1,
    'drafts of people without a number left out': 1,
  }
  names = {n: f'label-studio-{n}' for n in (7, 8, 9, 10)}
  assert ranks_of(site) == {
    'Name a bird.': {names[7]: [2, 3, 1], names[8]: [1, 2, 3]},
    'Name two birds.': {names[7]: [1, 2, 1], names[8]: [2, 1, 2]},
  }
  assert others(site) == [
    (names[9], 'skipped', '', {}),
    (names[10], 'expired', '', {'ranks': {'rank0': '2', 'rank2': '1'}}),
  ]
  first = site.rows()[0]
  assert first.seconds == 12.5
  assert exporting._clock_text(first.time) == '2024-03-01T10:00:00+00:00'
  assert first.models == ('llm_1', 'llm_2', 'llm_3')
  assert first.record['metadata'] == {'source': 'birds'}
  assert first.record['id'] == '11'
  assert first.record['suggestion'] == {
    'ranks': [1, 3, 2],
    'source': 'judge-7b',
  }
  # The reference annotation is a decision; addresses are stored nowhere.
  (decision,) = research.decisions(site.store)
  assert (decision.labeler, decision.ranks) == (names[9], [2, 3, 1])
  exporting.export(site.store, tmp_path / 'out')
  (found,) = records.read_jsonl(
    tmp_path / 'out/comparisons_adjudicated.jsonl', records.Comparison
  )
  assert found.metadata['labeling']['adjudication']['decided_by'] == names[9]
  store_lib.backup(site.engine, str(tmp_path / 'b.gz'))
  assert b'@example' not in records.read_bytes(tmp_path / 'b.gz')


@pytest.mark.parametrize(
  ('first', 'second'),
  [('answer1', 'answer2'), ('response_a', 'response_b'), ('text1', 'text2')],
)
def test_pairwise_annotations(site, first, second):
  def chosen(number, person, side):
    made = annotation(number, person, {})
    made['result'] = [
      {
        'id': 'p',
        'from_name': 'pw',
        'to_name': 'pw',
        'type': 'pairwise',
        'value': {'selected': side},
      }
    ]
    return made

  nothing = annotation(3, 9, {}, result=[])
  task = studio_task(1, [chosen(1, 7, 'left'), chosen(2, 8, 'right'), nothing])
  task['data'] = {'question': 'Name a bird.', first: 'Owl.', second: 'Bat.'}
  counts = load(site, [task], 'label_studio')
  assert counts == {'tasks': 1, 'submitted': 2, 'unfinished': 1}
  assert ranks_of(site) == {
    'Name a bird.': {'label-studio-7': [1, 2], 'label-studio-8': [2, 1]}
  }
  assert site.rows()[0].texts == ('Owl.', 'Bat.')


def test_label_studio_tasks_without_annotations(site):
  """As they are given to it: the data alone."""
  data = studio_task(1, [])['data']
  assert load(site, [data], 'label_studio') == {'tasks': 1}
  with site.store.read() as c:
    record = c.scalar(sa.select(schema.tasks.c.record))
  assert record == {'metadata': {'source': 'birds'}}


def test_the_flat_export_brings_its_annotations(site):
  """JSON_MIN has a record for each annotation that was not skipped."""
  data = studio_task(1, [])['data']

  def flat(number, person, **ranked):
    return {
      **data,
      'id': 11,
      'annotator': person,
      'annotation_id': number,
      'created_at': '2024-03-01T10:00:00.250000Z',
      'updated_at': '2024-03-01T10:05:00.000000Z',
      'lead_time': 12.5,
      **ranked,
    }

  def order(*numbers):
    return [{'ranker': {'rank': [f'llm_{n}' for n in numbers]}}]

  found = [
    flat(1, 7, rank=order(3, 1, 2), why='Better.'),
    flat(2, 8, rank=order(1, 2, 3), why='Worse.'),
    {**flat(None, None, id=12), 'prompt': 'Nobody ranked.'},
    flat(3, 9, why='So.'),
  ]
  assert load(site, found, 'label_studio') == {
    'tasks': 2,
    'submitted': 2,
    'unfinished': 1,
    'answers to why left out': 3,
  }
  names = [f'label-studio-{n}' for n in (7, 8)]
  assert ranks_of(site) == {
    'Name a bird.': dict(zip(names, ([2, 3, 1], [1, 2, 3]), strict=True))
  }
  first = site.rows()[0]
  assert (first.seconds, first.record['id']) == (12.5, '11')
  assert first.record['metadata'] == {'source': 'birds'}
  found[1]['rank'] = order(1, 9)
  with pytest.raises(
    records.RecordError, match="record 1: 'llm_9' is not an item"
  ):
    load(site, found, 'label_studio', 'again')


def test_numbers_in_the_place_of_predictions_and_drafts(site):
  """An export may give their ids alone."""
  made = annotation(1, 7, {'rank': ['llm_3', 'llm_1', 'llm_2']})
  gone = annotation(2, None, {'rank': ['llm_3', 'llm_1', 'llm_2']})
  task = studio_task(1, [made, gone], predictions=[3, 4], drafts=[5])
  assert load(site, [task], 'label_studio') == {
    'tasks': 1,
    'submitted': 1,
    'predictions left out': 2,
    'annotations of deleted users left out': 1,
    'drafts left out': 1,
  }


def test_a_question_may_be_named_like_a_bucket(site):
  """Without buckets, its only list is in order."""
  made = annotation(1, 7, {'rank1': ['llm_3', 'llm_1', 'llm_2']})
  made['result'][0]['from_name'] = 'rank1'
  load(site, [studio_task(1, [made])], 'label_studio')
  assert ranks_of(site) == {'Name a bird.': {'label-studio-7': [2, 3, 1]}}


def test_several_ground_truths_are_answers(site):
  """Imported annotations have the mark unless their file says otherwise."""
  task = studio_task(
    1,
    [
      annotation(n, n, {'rank': [f'llm_{n}', 'llm_3']}, ground_truth=True)
      for n in (1, 2)
    ],
  )
  task['data']['items'].pop(1)
  task['annotations'][1]['result'][0]['value']['ranker']['rank'] = [
    'llm_3', 'llm_1',
  ]  # fmt: skip
  assert load(site, [task], 'label_studio') == {
    'tasks': 1,
    'submitted': 2,
    'marks of ground truths ignored: several in one task': 2,
  }
  assert research.decisions(site.store) == []


def test_the_last_of_several_annotations_of_a_person_counts(site):
  task = studio_task(
    1,
    [
      annotation(1, 7, {'rank': ['llm_3', 'llm_1', 'llm_2']}),
      annotation(2, 7, {}, was_cancelled=True, result=[]),
      annotation(3, 7, {'rank': ['llm_1', 'llm_3', 'llm_2']}),
    ],
  )
  load(site, [task], 'label_studio')
  (row,) = site.rows()
  assert (row.content['ranks'], row.revision) == ([1, 3, 2], 2)


# --- Round trips --------------------------------------------------------------


@pytest.fixture(scope='module')
def filled(tmp_path_factory):
  """A site with ties, a skip, a draft, a decision, a suggestion and a cut
  completion, which tests only read."""
  site = make_site(tmp_path_factory.mktemp('filled'))
  items = people.ranking_items(3, 3)
  items[0] |= {
    'ended': [True, False, True],
    'suggestion': {'ranks': [1, 2, 2], 'source': 'a judge'},
    'metadata': {'origin': {'deep': [1, 'ä']}},
    'category': 'open qa',
  }
  turns = [
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': 'Name a bird.'},
  ]
  items[1] |= {'turns': turns}
  del items[1]['prompt'], items[1]['id']
  items.append({**items[2], 'prompt': 'The same id again'})
  items.append(people.ranking_items(1, 5)[0] | {'id': 'five'})
  site.load(items, overlap=3, suggestions=True)
  anna, ben, cleo = (site.person(name) for name in ('anna', 'ben', 'cleo'))
  tied = {'text 0': 2, 'text 1': 1, 'text 2': 2, 'text 3': 4, 'text 4': 4}
  while (task := anna.claim()) is not None:
    anna.rank(task, people.rank_of)
  while (task := ben.claim()) is not None:
    ben.rank(task, tied.get)
  cleo.post(f'/task/{cleo.claim()}/skip', reason='The task is unclear')
  task = cleo.claim()
  for step in range(4):
    cleo.fill(task, step)
  cleo.fill(task, 4, action='draft', rank0=2, rank1='', rank2=1)
  judge = site.person('judge', 'researcher')
  research.decide(site.store, 1, judge.id, [1, 2, 2], 'Text 0, „sure“.')
  return site


def compared(site, folder, name):
  """What a comparison says, without what only the first site knows."""
  exporting.export(site.store, folder)
  found = records.read_jsonl(folder / f'{name}.jsonl', records.Comparison)
  for row in found:
    labeling = row.metadata.pop('labeling')
    row.metadata['kept'] = {
      key: labeling[key]
      for key in ('models', 'adjudicated', 'adjudication', 'time', 'seconds')
      if key in labeling
    }
  rows = [records.to_values(row) for row in found]
  return sorted(rows, key=lambda row: (row['prompt'], row['labeler']))


@pytest.mark.parametrize('file_format', ['argilla', 'label_studio'])
def test_a_site_comes_back_from_the_other_format(filled, tmp_path, file_format):
  counts = exporting.export_as(filled.store, tmp_path / 'theirs', file_format)
  if file_format == 'argilla':
    assert counts == {'argilla_3.json': 4, 'argilla_5.json': 1}
  else:
    assert counts == {'label_studio.json': 5}
  again = make_site(tmp_path, 'again')
  for name in counts:
    content = (tmp_path / 'theirs' / name).read_bytes()
    load(again, content, file_format, name, overlap=3)
  for name in ('comparisons', 'comparisons_adjudicated'):
    first = compared(filled, tmp_path / 'first', name)
    second = compared(again, tmp_path / 'second', name)
    if name == 'comparisons':
      assert len(first) == 10
    for one, other in zip(first, second, strict=True):
      # A task without an id is named by its number on the site.
      if one['id'].startswith('task'):
        assert other.pop('id').startswith('task') and one.pop('id')
      assert one == other
  (skip,) = [row for row in others(again) if row[1] == 'skipped']
  assert skip[::2] == ('cleo', 'The task is unclear')
  (draft,) = [row for row in others(again) if row[1] == 'expired']
  (before,) = [row for row in others(filled) if row[1] == 'open']
  assert draft[0] == 'cleo'
  kept = {k: v for k, v in before[3]['ranks'].items() if v}
  assert draft[3] == {'ranks': kept} and len(kept) == 2


@pytest.mark.parametrize('shows', [False, True])
def test_suggestions_are_shown_elsewhere_only_if_here(site, tmp_path, shows):
  suggestion = {'ranks': [2, 1], 'source': 'a judge'}
  (item,) = people.ranking_items(1, 2)
  site.load([{**item, 'suggestion': suggestion}], suggestions=shows)
  for file_format, file in (
    ('argilla', 'argilla_2.json'),
    ('label_studio', 'label_studio.json'),
  ):
    exporting.export_as(site.store, tmp_path / 'out', file_format)
    content = (tmp_path / 'out' / file).read_bytes()
    (found,) = json.loads(content)
    theirs = 'suggestions' if file_format == 'argilla' else 'predictions'
    assert bool(found[theirs]) == shows
    again = make_site(tmp_path, file_format)
    load(again, content, file_format)
    with again.store.read() as c:
      record = c.scalar(sa.select(schema.tasks.c.record))
    assert record['suggestion'] == suggestion
    anna = again.person('anna')
    assert 'suggest' not in anna.get(f'/task/{anna.claim()}/3').text


def test_our_argilla_file_has_what_its_package_reads(filled, tmp_path):
  exporting.export_as(filled.store, tmp_path / 'out', 'argilla')
  found = json.loads((tmp_path / 'out/argilla_3.json').read_bytes())
  assert len({record['id'] for record in found}) == len(found)
  for record in found:
    assert set(record) == {
      'id', 'fields', 'metadata', 'suggestions', 'responses', 'vectors',
      '_server_id',
    }  # fmt: skip
    names = [name for name in record['fields'] if name != 'prompt']
    assert names == ['response_1', 'response_2', 'response_3']
    # Metadata of Argilla are texts and numbers.
    assert all(isinstance(v, str) for v in record['metadata'].values())
    for response in record['responses']['ranking']:
      assert set(response) == {'value', 'user_id', 'status'}
      assert str(uuid.UUID(response['user_id'])) == response['user_id']
      if response['status'] == 'discarded':
        assert response['value'] == []
        continue
      # It takes a submitted ranking only with all ranks, ties included.
      assert [one['value'] for one in response['value']] == names
      ranks = [one['rank'] for one in response['value']]
      allowed = {1, 2, 3} | ({None} if response['status'] == 'draft' else set())
      assert set(ranks) <= allowed
  statuses = [
    r['status'] for record in found for r in record['responses']['ranking']
  ]
  assert sorted(set(statuses)) == ['discarded', 'draft', 'submitted']


def test_our_label_studio_file_fits_its_interface(filled, tmp_path):
  exporting.export_as(filled.store, tmp_path / 'out', 'label_studio')
  view = xml.etree.ElementTree.parse(tmp_path / 'out/label_studio.xml')
  tags = {element.tag: element.attrib for element in view.iter()}
  buckets = [element.attrib['name'] for element in view.iter('Bucket')]
  assert buckets == [f'rank{i}' for i in range(1, 6)]
  for task in json.loads((tmp_path / 'out/label_studio.json').read_bytes()):
    ids = [item['id'] for item in task['data'][tags['List']['value'][1:]]]
    assert task['data'][tags['Text']['value'][1:]]
    for made in (
      *task['annotations'], *task['drafts'], *task['predictions']
    ):  # fmt: skip
      for part in made['result']:
        assert part['from_name'] == tags['Ranker']['name']
        assert (
          part['to_name'] == tags['List']['name'] == tags['Ranker']['toName']
        )
        ranker = part['value']['ranker']
        assert set(ranker) == {*buckets, '_'}
        assert sorted(sum(ranker.values(), [])) == sorted(ids)
  marks = [
    made['ground_truth']
    for task in json.loads((tmp_path / 'out/label_studio.json').read_bytes())
    for made in task['annotations']
  ]
  assert marks.count(True) == 1


def test_our_file_has_to_keep_its_ranks(filled, tmp_path):
  """`to_json` drops them; then nobody knows what was ranked on the pages."""
  exporting.export_as(filled.store, tmp_path / 'out', 'argilla')
  found = json.loads((tmp_path / 'out/argilla_3.json').read_bytes())
  for record in found:
    for response in record['responses']['ranking']:
      response['value'] = [one['value'] for one in response['value']]
  again = make_site(tmp_path, 'again')
  with pytest.raises(records.RecordError, match='drop the ranks'):
    load(again, found, 'argilla')


def test_our_file_comes_back_through_label_studio(filled, tmp_path):
  """It gives annotations to whoever imports them, and new numbers."""
  exporting.export_as(filled.store, tmp_path / 'out', 'label_studio')
  found = json.loads((tmp_path / 'out/label_studio.json').read_bytes())
  number = iter(range(1, 1000))
  for task in found:
    # It refuses people whom it does not know.
    assert not any('completed_by' in made for made in task['annotations'])
    task['id'] = next(number)
    for made in task['annotations']:
      made |= {'import_id': made['id'], 'id': next(number), 'completed_by': 1}
      made['created_at'] = '2029-03-01T10:00:00.250000Z'
    for made in task['drafts']:
      made |= {'import_id': made['id'], 'id': next(number)}
      made['user'] = 'admin@example.org'
  # Another person ranks there; the number is that of an account of ours.
  found[0]['annotations'].append(
    annotation(2, 3, {'rank1': ['output2'], 'rank2': ['output1', 'output3']})
  )
  again = make_site(tmp_path, 'again')
  counts = load(again, found, 'label_studio', overlap=3)
  assert counts == {
    'tasks': 5, 'submitted': 11, 'skipped': 1, 'unfinished': 1, 'decided': 1,
  }  # fmt: skip
  for name in ('comparisons', 'comparisons_adjudicated'):
    first = compared(filled, tmp_path / 'first', name)
    second = compared(again, tmp_path / 'second', name)
    new = [row for row in second if row['labeler'] == 'label-studio-3']
    assert [row['ranks'] for row in new] == [[2, 1, 2]] * (
      name == 'comparisons'
    )
    second = [row for row in second if row not in new]
    assert [row['time'] for row in first] == [row['time'] for row in second]
    assert [(row['labeler'], row['ranks']) for row in first] == [
      (row['labeler'], row['ranks']) for row in second
    ]


@pytest.mark.parametrize('file_format', ['argilla', 'label_studio'])
def test_a_person_who_decides_and_ranks_is_two_in_the_file(site, file_format):
  item = parts.Item(
    {'prompt': 'P', 'completions': ['a', 'b']},
    (
      parts.Answer('anna', 'submitted', (1, 2), 5.0, account=7),
      parts.Answer('anna', 'decided', (2, 1), 6.0, note='No.', account=7),
    ),
  )
  ((file, content), *_) = formats.written(file_format, [item]).items()
  assert load(site, content, file_format, file)['decided'] == 1
  assert [row.content['ranks'] for row in site.rows()] == [[1, 2]]
  (row,) = research.decisions(site.store)
  assert (row.labeler, row.ranks, row.note, row.time) == (
    'anna', [2, 1], 'No.', 6.0,
  )  # fmt: skip


@pytest.mark.parametrize('rank', ['99', '0', '\u0663', 'x'])
def test_a_draft_with_impossible_ranks_is_exported(site, tmp_path, rank):
  """Drafts are saved as they are posted."""
  site.load(people.ranking_items(1, 3))
  anna = site.person('anna')
  anna.fill(anna.claim(), 4, action='draft', rank0=rank, rank1=2)
  for file_format in ('argilla', 'label_studio'):
    exporting.export_as(site.store, tmp_path / 'out', file_format)
  (task,) = json.loads((tmp_path / 'out/label_studio.json').read_bytes())
  ranker = task['drafts'][0]['result'][0]['value']['ranker']
  assert [len(ranker[key]) for key in ('rank2', '_')] == [1, 2]


def test_tasks_of_several_kinds_say_so(site, tmp_path):
  site.load(people.ranking_items(1, 2))
  site.load(people.ranking_items(1, 2), 'toxicity', phase='toxicity')
  exporting.export_as(site.store, tmp_path / 'out', 'label_studio')
  found = json.loads((tmp_path / 'out/label_studio.json').read_bytes())
  assert [task['meta']['instruct_jax']['batch'] for task in found] == [
    {'name': f'{kind} batch', 'kind': kind, 'phase': phase}
    for kind, phase in (('ranking', 'training'), ('toxicity', 'toxicity'))
  ]


def test_what_ordered_the_tasks_is_said_after_a_round_trip(site, tmp_path):
  site.load(people.ranking_items(1, 2), overlap=2)
  anna = site.person('anna')
  anna.rank(anna.claim(), people.rank_of)
  ordered = {'by': 'reward:MODEL', 'uncertainty': 0.5}
  with site.store.write() as c:
    schema.update(c, schema.tasks, 1, record={'active': ordered})
  exporting.export_as(site.store, tmp_path / 'out', 'label_studio')
  again = make_site(tmp_path, 'again')
  content = (tmp_path / 'out/label_studio.json').read_bytes()
  load(again, content, 'label_studio')
  exporting.export(again.store, tmp_path / 'again')
  (found,) = records.read_jsonl(
    tmp_path / 'again/comparisons.jsonl', records.Comparison
  )
  assert found.metadata['labeling']['active'] == ordered


def test_the_pace_leaves_out_files_without_times(site):
  site.load(people.ranking_items(1, 3))
  load(site, argilla_records(), 'argilla')
  (row,) = [
    row
    for row in research.people(site.store, site.rows())
    if row['name'] == ANNA
  ]
  assert row['answers'] == 2
  assert (row['median_seconds'], row['per_hour']) == (None, None)
  load(site, studio_tasks(), 'label_studio', 'two')
  (row,) = [
    row
    for row in research.people(site.store, site.rows())
    if row['name'] == 'label-studio-7'
  ]
  assert (row['median_seconds'], row['per_hour']) == (12.5, 3600 / 12.5)


def test_researchers_rankings_and_other_rounds_stay_here(site, tmp_path):
  site.load(people.ranking_items(1, 2), name='screen', screening=True)
  with pytest.raises(store_lib.StoreError, match='no tasks to rank'):
    exporting.export_as(site.store, tmp_path / 'out', 'argilla')
  assert not (tmp_path / 'out').exists()
  site.load(people.ranking_items(1, 2), name='real')
  judge = site.person('judge', 'researcher')
  for _ in range(2):
    judge.rank(judge.claim(), people.rank_of)
  exporting.export_as(site.store, tmp_path / 'out', 'label_studio')
  (task,) = json.loads((tmp_path / 'out/label_studio.json').read_bytes())
  assert task['annotations'] == []


# --- Through the pages --------------------------------------------------------


def test_both_formats_pass_through_the_pages(site):
  fields = {
    'name': 'b', 'kind': 'ranking', 'phase': 'training', 'overlap': '2',
    'format': 'label_studio',
  }  # fmt: skip
  bad = studio_tasks()
  bad[1]['annotations'][2]['result'][0]['value'] = {
    'ranker': {'good': [], 'x': []}
  }
  reply = site.admin.post('/admin/import', lines=json.dumps(bad), **fields)
  assert reply.status_code == 422
  assert 'import: record 2: the buckets good, x are not ranks' in reply.text
  assert '<option value="label_studio" selected>' in reply.text
  lines = json.dumps(studio_tasks())
  reply = site.admin.post('/admin/import', lines=lines, **fields)
  assert reply.is_redirect
  page = site.admin.get(reply.headers['location']).text
  assert 'Imported: b: ranking, 2 tasks, 4 submitted' in page
  assert '1 drafts of people without a number left out' in page
  assert 'Imported' not in site.admin.get('/admin').text
  for file_format, names in (
    ('argilla', ['argilla_3.json']),
    ('label_studio', ['label_studio.json', 'label_studio.xml']),
  ):
    site.clock.now += 1  # A folder each.
    page = site.admin.post('/admin/export', format=file_format).text
    folder = re.search(r'/admin/export/(\d{8}-\d{6})/', page)[1]
    for name in names:
      assert f'/admin/export/{folder}/{name}"' in page
      reply = site.admin.get(f'/admin/export/{folder}/{name}')
      assert reply.status_code == 200
  assert site.admin.post('/admin/export', format='xls').status_code == 409


# --- Bad files ----------------------------------------------------------------


def changed(*path_and_value):
  """The Argilla records with one value changed: (key, key, ..., value)."""
  *path, last, value = path_and_value
  found = argilla_records()
  part = found
  for key in path:
    part = part[key]
  part[last] = value
  return found


def changed_task(*path_and_value):
  *path, last, value = path_and_value
  found = studio_tasks()
  part = found
  for key in path:
    part = part[key]
  part[last] = value
  return found


def beside(text):
  """A record of Argilla with what we might have written there."""
  (first, _) = argilla_records()
  more = {'metadata': {'instruct_jax': text}, 'responses': {}}
  return [{**first, **more, 'suggestions': {}}]


ORDER = (1, 'responses', 'preference', 0)
RESULT = (1, 'annotations', 0, 'result', 0)
BAD = {
  'no JSON': ('argilla', b'[{"id": 1},', 'theirs.json: not JSON ('),
  'bad line': ('argilla', b'{"fields": {}}\n{', 'theirs.json:2: not JSON'),
  'no UTF-8': ('label_studio', b'[\xff]', 'byte 1 is not UTF-8'),
  'empty': ('argilla', b'', 'theirs.json: not JSON'),
  'no list': ('label_studio', b'7', 'holds no records of Label Studio'),
  'no records': ('argilla', b'[]', 'holds no records of Argilla'),
  'NaN': ('argilla', b'[{"fields": NaN}]', 'NaN is not valid JSON'),
  'no object': ('argilla', [*argilla_records(), 7],
                'record 3: expected a JSON object'),
  'fields': ('argilla', changed(1, 'fields', 'x'),
             "record 2: 'fields' must be an object"),
  'unknown option': ('argilla', changed(*ORDER, 'value', ['response-9']),
                     "record 2: 'response-9' is ranked, but is not a field"),
  'twice': ('argilla', changed(*ORDER, 'value', ['response-1'] * 2),
            "record 2: 'response-1' is ranked twice"),
  'no ranking': ('argilla', changed(*ORDER, 'value', 5),
                 'record 2: 5 is not a ranking'),
  'rank': ('argilla', changed(*ORDER, 'value',
                              [{'rank': 0, 'value': 'response-1'}]),
           "record 2: the rank of 'response-1' is 0"),
  'nobody': ('argilla', changed(*ORDER, 'user_id', 7),
             "record 2: the 'user_id' of a response must be a text"),
  'an address': ('argilla', changed(*ORDER, 'user_id', 'a@b.example'),
                 "record 2: A name has 1 to 40 letters"),
  'status': ('argilla', changed(*ORDER, 'status', 'lost'),
             "record 2: unknown status of a response: 'lost'"),
  'odd status': ('argilla', changed(*ORDER, 'status', ['lost']),
                 'record 2: unknown status'),
  'more fields': ('argilla', changed(1, 'fields', 'context', 'Some text.'),
                  'record 2: the fields instruction, context are not'),
  'a number': ('argilla', changed(1, 'fields', 'response-2', 5),
               "record 2: 'completions' and 'models' must be lists of str"),
  'suggestion': ('argilla', changed(0, 'suggestions', 'preference', 'value',
                                    ['response-1']),
                 'record 1: the suggestion does not rank all'),
  'question': ('argilla', [{'fields': {'prompt': 'a', 'b1': 'c', 'b2': 'd'},
                            'responses': {'good': [{'value': 'yes',
                                                    'user_id': ANNA}]}}],
               'theirs.json: none of the questions good ranks the fields'),
  'two questions': ('argilla', changed(
    1, 'responses', {name: [{'value': ['response-1'], 'user_id': ANNA}]
                     for name in ('one', 'preference')}),
    'the questions one, preference all rank fields'),
  'beside': ('argilla', beside('{'), 'record 1: instruct_jax is not JSON'),
  'beside, type': ('argilla', beside('[]'),
                   'record 1: instruct_jax must be an object'),
  'beside, field': ('argilla', beside('{"task": {"colour": "red"}}'),
                    "record 1: unknown field 'colour'"),
  'NUL': ('argilla', changed(1, 'metadata', {'x': '\0'}), 'holds a NUL'),
  'surrogate': ('argilla', changed(1, 'metadata', {'x': '\ud800'}),
                "record 2: 'metadata' is not JSON"),
  'endless number': (
    'argilla',
    json.dumps(changed(1, 'metadata', {'score': 7})).replace(
      '"score": 7', '"score": 1e999').encode(),
    "record 2: 'metadata' is not JSON"),
  'key twice': ('argilla', b'[{"fields": {}, "fields": {}}]',
                "theirs.json: not JSON (key 'fields' more than once)"),
  'key twice in a line': ('argilla', b'{"fields": {}}\n{"id": 1, "id": 2}',
                          "theirs.json:2: not JSON (key 'id' more than once)"),
  'key twice in a page': ('argilla', b'{\n"items": [],\n"items": []\n}',
                          "theirs.json: not JSON (key 'items' more than once)"),
  'key twice beside': ('argilla', beside('{"task": {}, "task": {}}'),
                       "(key 'task' more than once)"),
  'line, surrogate': (
    'jsonl',
    b'{"prompt": "a", "completions": ["b", "c"], "metadata": {"\\ud800": 1}}',
    "theirs.json:1: 'metadata' is not JSON"),
  'line, endless number': (
    'jsonl',
    b'{"prompt": "a", "completions": ["b", "c"], "metadata": {"x": [1e999]}}',
    "theirs.json:1: 'metadata' is not JSON"),
  'line, key twice': (
    'jsonl', b'{"prompt": "a", "completions": ["b", "c"], "prompt": "d"}',
    "theirs.json:1: not JSON in UTF-8 (key 'prompt' more than once)"),
  'data': ('label_studio', changed_task(1, 'data', None),
           "record 2: 'data' is missing"),
  'no prompt': ('label_studio', changed_task(1, 'data', 'prompt', 5),
                "record 2: 'prompt' must be a text or a list"),
  'no items': ('label_studio', changed_task(1, 'data', 'items', []),
               "record 2: 'data' must have one list of items"),
  'no body': ('label_studio', changed_task(1, 'data', 'items', 0, 'body', 5),
              "record 2: an item of 'items' has no text"),
  'same id': ('label_studio', changed_task(1, 'data', 'items', 0, 'id',
                                           'llm_2'),
              "record 2: two items of 'items' have the same id"),
  'no person': ('label_studio', changed_task(1, 'annotations', 0,
                                             'completed_by', 'a@b.example'),
                "record 2: 'completed_by' of an annotation must be a number"),
  'no person here': ('label_studio', [
    {**studio_task(1, []), 'annotations': [{'id': 3, 'result': []}]}],
    "record 1: 'completed_by' of an annotation must be a number"),
  'lead time': ('label_studio', changed_task(1, 'annotations', 0, 'lead_time',
                                             10**400),
                "record 2: 'lead_time' is 1000"),
  'endless time': (
    'label_studio',
    json.dumps(changed_task(1, 'annotations', 0, 'lead_time', 5)).replace(
      '"lead_time": 5,', '"lead_time": 1e999,').encode(),
    "record 2: 'lead_time' is inf; it must be seconds, 0 or more"),
  'early': ('label_studio', changed_task(1, 'annotations', 0, 'created_at',
                                         '0001-01-01T00:00:00+14:00'),
            'record 2: a time is -62'),
  'beside, time': ('label_studio', [{**studio_task(1, [
    {'id': 3, 'result': []}]), 'meta': {'instruct_jax': {
      'answers': {'3': {'labeler': 'anna', 'time': 1e300}}}}}],
    'record 1: time of instruct_jax is 1e+300'),
  'time': ('label_studio', changed_task(1, 'annotations', 0, 'created_at',
                                        'today'),
           "record 2: 'today' is not an ISO 8601 time"),
  'no item': ('label_studio', changed_task(*RESULT, 'value',
                                           {'ranker': ['llm_9']}),
              "record 2: 'llm_9' is not an item"),
  'item twice': ('label_studio', changed_task(
    *RESULT, 'value', {'ranker': {'rank1': ['llm_1'], 'rank2': ['llm_1']}}),
    "record 2: 'llm_1' is ranked twice"),
  'categories': ('label_studio', changed_task(
    *RESULT, 'value', {'ranker': {'good': ['llm_1'], 'bad': ['llm_2']}}),
    'record 2: the buckets good, bad are not ranks'),
  'no lists': ('label_studio', changed_task(
    *RESULT, 'value', {'ranker': {'rank': 'llm_1'}}),
    "record 2: 'ranker' must have lists of ids"),
  'two rankings': ('label_studio', changed_task(
    1, 'annotations', 0, 'result',
    annotation(1, 1, [])['result'] * 2),
    'record 2: an annotation has several rankings'),
  'selected': ('label_studio', changed_task(
    1, 'annotations', 0, 'result',
    [{'type': 'pairwise', 'value': {'selected': ['left']}}]),
    "record 2: 'selected' must be left or right"),
  'prediction': ('label_studio', changed_task(
    1, 'predictions', [{'result': annotation(1, 1, ['llm_1'])['result']}]),
    'record 2: a prediction does not rank all items'),
}  # fmt: skip


@pytest.mark.parametrize('name', BAD)
def test_bad_files_give_one_line_and_import_nothing(site, name):
  file_format, found, words = BAD[name]
  with pytest.raises(records.RecordError) as caught:
    load(site, found, file_format)
  said = str(caught.value)
  assert words in said and said.startswith('theirs.json'), said
  assert '\n' not in said
  assert research.progress(site.store) == []
  with site.store.read() as c:
    assert c.scalars(sa.select(schema.accounts.c.name)).all() == ['admin']


def _lines_of(found):
  return '\n'.join(map(json.dumps, found)).encode()


def _flat():
  """JSON_MIN of Label Studio."""
  return [{'id': 1, 'prompt': 'P', 'annotator': 7, 'annotation_id': 2}]


@pytest.mark.parametrize(
  ('theirs', 'found'),
  [
    ('argilla', argilla_records()),
    ('argilla', json.dumps(argilla_records(), indent=1).encode()),
    ('argilla', _lines_of([{'items': argilla_records()}])),
    ('argilla', _lines_of([HUB_ROWS['version 1']])),
    ('argilla', _lines_of([HUB_ROWS['version 2']])),
    ('label_studio', studio_tasks()),
    ('label_studio', _lines_of(studio_tasks())),
    ('label_studio', _flat()),
    ('jsonl', _lines_of(people.ranking_items(2))),
    ('jsonl', people.ranking_items(2)),
  ],
)
def test_a_file_of_another_format_is_named(site, theirs, found):
  title = {
    'argilla': "Argilla's", 'label_studio': "Label Studio's",
    'jsonl': 'JSON lines',
  }[theirs]  # fmt: skip
  for file_format in formats.FORMATS:
    if file_format == theirs:
      continue
    with pytest.raises(records.RecordError) as caught:
      load(site, found, file_format)
    assert str(caught.value) == (
      f'theirs.json: this looks like {title}; give --format={theirs}'
    )
  assert research.progress(site.store) == []


def test_up_to_ten_bad_records_are_shown(site):
  found = [changed(1, 'fields', 'x')[1] for _ in range(12)]
  with pytest.raises(records.RecordError) as caught:
    load(site, found, 'argilla')
  lines = str(caught.value).splitlines()
  assert len(lines) == 11 and lines[9].startswith('theirs.json: record 10: ')
  assert lines[10] == '... and 2 more bad records in this file'


@pytest.mark.parametrize(
  ('settings', 'words'),
  [
    ({'kind': 'demonstration'}, 'Argilla files hold rankings; the kind must'),
    ({'screening': True}, 'cannot be part of screening'),
    ({'phase': 'odd'}, "phase 'odd' is not one of"),
  ],
)
def test_settings_that_do_not_fit_are_named(site, settings, words):
  with pytest.raises(store_lib.StoreError, match=words):
    load(site, argilla_records(), 'argilla', **settings)
  with pytest.raises(store_lib.StoreError, match="format 'xls' is not one of"):
    load(site, argilla_records(), 'xls')
  assert research.progress(site.store) == []


def test_formats_have_titles():
  assert list(formats.FORMATS) == ['jsonl', 'argilla', 'label_studio']
