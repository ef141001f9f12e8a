"""The table of published formats: each by hand, as upstream writes it."""

import collections
import copy
import csv
import json
import pathlib
import re
import sys

import ml_collections
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from instruct_jax.data import __main__ as data_main
from instruct_jax.data import convert, importers, records, sources
from instruct_jax.worlds import preference_sources

FORMATS = importers.FORMATS
# Upstream's names of files, where they are part of the format.
NAMES = {
  'ukp': 'tv-is-better-than-books_tv.csv',
  'ukp_ranking': 'tv-is-better-than-books_tv.csv',
  'natural_instructions': 'task.json',
}
OF_LINES = [
  name
  for name, form in FORMATS.items()
  if not isinstance(form.example[0], str) and name not in NAMES
]


def example(name, **changes):
  """The first entry of a format's example, with other values."""
  return copy.deepcopy({**FORMATS[name].example[0], **changes})


def read(tmp_path, name, *rows):
  path = tmp_path / 'file.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return FORMATS[name](path)


def conversation(*texts):
  roles = ('user', 'assistant')
  return [
    {'role': roles[number % 2], 'content': text}
    for number, text in enumerate(texts)
  ]


def ranked(found):
  """(prompt, completions, ranks) of the only comparison."""
  (row,) = found.comparisons
  assert not records.problems(records.to_values(row), records.Comparison)
  return row.prompt, row.completions, row.ranks


BIRD = '\n\nHuman: Name a bird.\n\nAssistant:'


def write_example(tmp_path, name):
  lines = FORMATS[name].lines()
  suffix = 'csv' if isinstance(FORMATS[name].example[0], str) else 'jsonl'
  path = tmp_path / NAMES.get(name, f'file.{suffix}')
  path.write_text('\n'.join(lines) + '\n')
  return path


# --- The table ----------------------------------------------------------------


@pytest.mark.parametrize('name', FORMATS)
def test_a_format_reads_its_example(name, tmp_path):
  form = FORMATS[name]
  found = form(write_example(tmp_path, name))
  assert bool(found.comparisons) == ('comparisons' in form.kind)
  assert bool(found.demonstrations) == ('demonstrations' in form.kind)
  for row in found.rows():
    assert not records.problems(records.to_values(row), type(row))
    assert len(row.prompt.split()) > 1
  expected = {'K = 2': 2, 'K = 4': 4, 'K = 7': 7}
  for kind, size in expected.items():
    if form.kind.partition(';')[0].endswith(kind):
      assert {len(row.ranks) for row in found.comparisons} == {size}
  # Whoever wrote the examples put the best answer first, or said so.
  for row in found.comparisons:
    assert min(row.ranks) == 1 and len(set(row.ranks)) > 1


def test_the_command_lists_every_format(capsys):
  assert data_main.main(['formats']) == 0
  paragraphs = capsys.readouterr().out.strip().split('\n\n')
  assert len(paragraphs) == len(FORMATS) >= 25
  for name, paragraph in zip(FORMATS, paragraphs, strict=True):
    head, about, licence, *rest = paragraph.split('\n')
    assert head.startswith(f'{name}: ') and about.strip()
    assert licence.startswith('  licence: ')
    shown = [line[4:] for line in rest if line.startswith('  | ')]
    assert shown == FORMATS[name].lines()
  assert data_main.main(['formats', 'nectar', 'hh']) == 0
  said = capsys.readouterr().out
  assert said.startswith('nectar: comparisons, K = 7\n')
  assert 'note: the demonstrations are the chosen' in said
  assert data_main.main(['formats', 'nectars']) == 1
  assert "format 'nectars'; known: hh, oasst" in capsys.readouterr().err


REQUIRED = {
  'hh': ('chosen', 'rejected'),
  'summarize_axis': ('info', 'summary', 'worker'),
  'shp': (
    *('post_id', 'history', 'human_ref_A', 'human_ref_B'),
    *('score_A', 'score_B', 'labels', 'score_ratio'),
  ),
  'ultrafeedback': ('instruction', 'completions'),
  'ultrafeedback_binarized': (
    *('chosen', 'rejected', 'score_chosen', 'score_rejected'),
  ),
  'helpsteer': (
    *('prompt', 'response', 'helpfulness', 'correctness', 'coherence'),
    *('complexity', 'verbosity'),
  ),
  'helpsteer2_preference': (
    *('prompt', 'response_1', 'response_2', 'preference_strength'),
  ),
  'helpsteer3': (
    *('domain', 'context', 'response1', 'response2', 'overall_preference'),
    'individual_preference',
  ),
  'webgpt': ('question', 'answer_0', 'answer_1', 'score_0', 'score_1'),
  'safe_rlhf_helpful': (
    *('prompt', 'response_0', 'response_1', 'better_response_id'),
  ),
  'safe_rlhf_harmless': ('safer_response_id',),
  'nectar': ('prompt', 'answers'),
  'argilla': ('chosen', 'rejected', 'chosen_rating', 'rejected_rating'),
  'argilla_orca': ('system', 'input', 'chosen', 'rejected', 'status'),
  'arena': ('model_a', 'model_b', 'winner', 'conversation_b'),
  'chosen_rejected': ('chosen', 'rejected'),
  'dsp': ('text', 'score'),
  'tldr_sft': ('prompt', 'label'),
  'prompt_completion': ('prompt', 'completion'),
  'messages': ('messages',),
  'hhh': ('input', 'targets'),
  'llmbar': ('input', 'output_1', 'output_2', 'label'),
  'pandalm': (
    *('instruction', 'input', 'response1', 'response2'),
    *('annotator1', 'annotator2', 'annotator3'),
  ),
  'autoj': ('scenario', 'label', 'prompt', 'response 1', 'response 2'),
  'tulu_human': (
    *('instance_id', 'prompt', 'completion_a', 'completion_b'),
    *('preference', 'model_a', 'model_b', 'evaluator'),
  ),
}


@pytest.mark.parametrize(
  ('name', 'key'),
  [(name, key) for name, keys in REQUIRED.items() for key in keys],
)
def test_a_missing_field_is_named_with_file_and_line(name, key, tmp_path):
  bad = example(name)
  del bad[key]
  with pytest.raises(records.RecordError) as caught:
    read(tmp_path, name, example(name), bad)
  assert f'{tmp_path}/file.jsonl:2: ' in str(caught.value)
  assert f'field {key!r} is missing (found ' in str(caught.value)


def test_a_file_of_another_format_is_one_line(tmp_path):
  with pytest.raises(records.RecordError) as caught:
    read(tmp_path, 'hh', *[example('helpsteer')] * 30)
  message = str(caught.value)
  assert message.startswith(
    f"{tmp_path}/file.jsonl:1: field 'chosen' is missing (found prompt, resp"
  )
  assert message.endswith('(the first 10 entries are all like this)')
  # A file with good entries names the bad ones.
  rows = [example('hh'), *[example('helpsteer')] * 12]
  with pytest.raises(records.RecordError) as caught:
    read(tmp_path, 'hh', *rows)
  assert str(caught.value).count('\n') == 10


@pytest.mark.parametrize('name', OF_LINES)
def test_other_fields_are_ignored(name, tmp_path):
  rows = FORMATS[name].example
  more = [{**row, 'embedding': [0.5, None], 'note': {'a': 1}} for row in rows]
  assert read(tmp_path, name, *more) == read(tmp_path, name, *rows)


@pytest.mark.parametrize('name', OF_LINES)
def test_parquet_is_read_as_lines_are(name, tmp_path):
  rows = list(FORMATS[name].example)
  table = pyarrow.Table.from_pylist(rows)
  pyarrow.parquet.write_table(table, tmp_path / 'file.parquet')
  found = FORMATS[name](tmp_path / 'file.parquet')
  assert found == read(tmp_path, name, *rows)


def test_the_readme_lists_every_format():
  page = pathlib.Path(importers.__file__).parents[1] / 'README.md'
  table = page.read_text().split('| what it is |')[1].split('\n\n')[0]
  assert set(re.findall(r'`(\w+)`', table)) == set(FORMATS)


# --- Scores, ties and strengths -----------------------------------------------


def test_shp_has_scores_and_a_ratio(tmp_path):
  pair = example('shp')
  other = example('shp', score_A=6, score_B=9, labels=0, score_ratio=1.5)
  found = read(tmp_path, 'shp', pair, other)
  first, second = found.comparisons
  assert first.prompt == ('\n\nHuman: How long does an egg boil?\n\nAssistant:')
  assert first.completions == (' Seven minutes.', ' It depends.')
  assert (first.ranks, first.scores) == ((1, 2), (30.0, 6.0))
  assert (second.ranks, second.scores) == ((2, 1), (6.0, 9.0))
  assert first.id == 'shp:p1:c1:c2' and first.category == 'askculinary_train'
  assert first.metadata['score_ratio'] == 5.0
  found = read(tmp_path, 'shp_ratio_2', pair, other)
  assert [row.scores for row in found.comparisons] == [(30.0, 6.0)]
  assert found.skipped == {'the ratio of the scores is below 2': 1}
  # Ids of StackExchange are numbers.
  found = read(tmp_path, 'shp', example('shp', post_id=7, c_root_id_A=8))
  assert found.comparisons[0].id == 'shp:7:8:c2'
  for score in (10**400, float('inf'), 'many', True):
    with pytest.raises(records.RecordError, match=r"jsonl:1: 'score_B' is"):
      read(tmp_path, 'shp', example('shp', score_B=score))
  found = read(tmp_path, 'shp', example('shp', labels=0))
  assert found.skipped == {'the label and the scores disagree': 1}
  with pytest.raises(records.RecordError, match="'labels' is 2, expected 1, 0"):
    read(tmp_path, 'shp', example('shp', labels=2))


def test_ultrafeedback_ranks_four_answers_by_four_ratings(tmp_path):
  row = example('ultrafeedback')
  for number, ratings in enumerate(('5555', '4435', '44N4', '1211')):
    aspects = row['completions'][number]['annotations']
    for aspect, rating in zip(aspects.values(), ratings, strict=True):
      aspect['Rating'] = {'N': 'N/A'}.get(rating, rating)
  found = read(tmp_path, 'ultrafeedback', row)
  # 20/4 = 5; 16/4 = 4; 12/3 = 4, one rating is missing; 5/4 = 1.25.
  (ranking,) = found.comparisons
  assert ranking.scores == (5.0, 4.0, 4.0, 1.25)
  assert ranking.ranks == (1, 2, 2, 3)
  assert ranking.completions[3] == ' No.'
  assert ranking.category == 'evol_instruct'
  assert ranking.metadata['models'][3] == 'llama-2-7b-chat'
  assert ranking.metadata['overall_scores'] == ['10.0', '8.0', '4.0', '2.0']
  for aspect in row['completions'][0]['annotations'].values():
    aspect['Rating'] = 'N/A'
  row['completions'][1]['response'] = ' No. '
  found = read(tmp_path, 'ultrafeedback', row)
  # The second and the last answer are one text, 'No.', of (4 + 1.25) / 2.
  assert found.comparisons[0].scores == (2.625, 4.0)
  assert found.comparisons[0].metadata['models'] == ['gpt-4', 'alpaca-7b']
  assert found.skipped == {
    'an answer without a rating': 1,
    'an answer that repeats another, merged': 1,
  }
  row['completions'][2]['annotations']['honesty'] = []  # It was not read.
  found = read(tmp_path, 'ultrafeedback', row)
  # (4 + 4) / 2 and 4 are the ratings that are left, the mean is still 4.
  assert found.comparisons[0].scores == (2.625, 4.0)
  del row['completions'][1]['annotations']['honesty']
  with pytest.raises(records.RecordError) as caught:
    read(tmp_path, 'ultrafeedback', row)
  assert (
    "file.jsonl:1: completions[1]: annotations: field 'honesty' is missing"
    in str(caught.value)
  )


def test_pairs_with_scores_may_tie(tmp_path):
  name = 'ultrafeedback_binarized'
  rows = [
    example(name),
    example(name, score_rejected=9.0),
    example(name, score_rejected=9.5),
  ]
  found = read(tmp_path, name, *rows)
  assert [row.ranks for row in found.comparisons] == [(1, 2), (1, 1)]
  assert found.comparisons[0].prompt == BIRD
  assert found.comparisons[0].scores == (9.0, 3.0)
  assert found.skipped == {'the rejected answer is rated higher': 1}


@pytest.mark.parametrize(
  'keys',
  [
    ('chosen_rating', 'rejected_rating'),
    ('chosen-rating', 'rejected-rating'),
    ('rating_chosen', 'rating_rejected'),
  ],
)
def test_argilla_names_its_ratings_in_several_ways(keys, tmp_path):
  row = {
    'source': 'flan_v2',
    'prompt': 'Name a bird.',
    'chosen': conversation('Name a bird.', 'The owl.'),
    'rejected': conversation('Name a bird.', 'No.'),
    **dict(zip(keys, (5, 2.5), strict=True)),
  }
  found = read(tmp_path, 'argilla', row)
  assert ranked(found) == (BIRD, (' The owl.', ' No.'), (1, 2))
  assert found.comparisons[0].scores == (5.0, 2.5)
  assert found.comparisons[0].category == 'flan_v2'


def test_argilla_of_texts_and_of_orca(tmp_path):
  row = {
    'source': 'evol_instruct',
    'instruction': 'Name a bird.',
    'chosen_response': 'The owl.',
    'rejected_response': 'No.',
    'chosen_avg_rating': 4.25,
    'rejected_avg_rating': None,
    'chosen_model': 'gpt-4',
  }
  found = read(tmp_path, 'argilla', row)
  # Without both ratings, the order is all there is.
  assert ranked(found) == (BIRD, (' The owl.', ' No.'), (1, 2))
  assert found.comparisons[0].scores == ()

  tie = example('argilla_orca', status='tie', system='')
  found = read(tmp_path, 'argilla_orca', example('argilla_orca'), tie)
  first, second = found.comparisons
  assert [turn.role for turn in first.turns] == ['system', 'user']
  assert first.prompt == f'Be brief.{BIRD}' and second.prompt == BIRD
  assert (first.ranks, second.ranks) == ((1, 2), (1, 1))


def test_helpsteer_gathers_the_answers_to_a_prompt(tmp_path):
  asked = (
    'Name a bird.\n<extra_id_1>Assistant\nThe owl.\n<extra_id_1>User\nAnother!'
  )
  rows = [
    example('helpsteer', prompt=asked, response=text, helpfulness=score)
    for text, score in (('Wren', 4), ('No', 0), ('Dog', 1), ('Crow', 4))
  ]
  alone = example('helpsteer', prompt='Name a fish.')
  found = read(tmp_path, 'helpsteer', *rows[:2], alone, *rows[2:])
  (ranking,) = found.comparisons
  assert ranking.completions == (' Wren', ' No', ' Dog', ' Crow')
  assert ranking.ranks == (1, 3, 2, 1)
  assert ranking.scores == (4.0, 0.0, 1.0, 4.0)
  assert ranking.turns == (
    records.Turn('user', 'Name a bird.'),
    records.Turn('assistant', 'The owl.'),
    records.Turn('user', 'Another!'),
  )
  assert ranking.metadata['coherence'] == [4, 4, 4, 4]
  assert found.skipped == {'an answer that is rated alone': 1}


@pytest.mark.parametrize(
  ('name', 'key', 'better_first'),
  [
    ('helpsteer2_preference', 'preference_strength', (' No.', ' The owl.')),
    ('helpsteer3', 'overall_preference', (' The owl.', ' No.')),
  ],
)
def test_strength_goes_from_the_first_to_the_second(
  name, key, better_first, tmp_path
):
  rows = [example(name, **{key: strength}) for strength in (-3, 0, 1)]
  found = read(tmp_path, name, *rows)
  assert [row.ranks for row in found.comparisons] == [(1, 2), (1, 1), (2, 1)]
  assert [row.metadata['strength'] for row in found.comparisons] == [-3, 0, 1]
  assert {row.completions for row in found.comparisons} == {better_first}
  assert found.comparisons[0].prompt == BIRD
  for strength in (4, None):
    with pytest.raises(records.RecordError, match=f"'{key}' is {strength}, ex"):
      read(tmp_path, name, example(name, **{key: strength}))


def test_helpsteer_3_keeps_conversations_and_votes(tmp_path):
  row = example('helpsteer3', context=conversation('A', 'b', 'C'))
  found = read(tmp_path, 'helpsteer3', row)
  assert found.comparisons[0].prompt == (
    '\n\nHuman: A\n\nAssistant: b\n\nHuman: C\n\nAssistant:'
  )
  assert found.comparisons[0].metadata == {
    'strength': -2,
    'votes': [-2],
    'language': 'english',
  }
  row = example('helpsteer3', context=conversation('A', 'b'))
  found = read(tmp_path, 'helpsteer3', row)
  assert found.skipped == {'the prompt does not end with a question': 1}


def test_webgpt_as_openai_and_as_the_hub_have_it(tmp_path):
  row = example('webgpt')
  tie = example('webgpt', score_0=0.0, score_1=0.0)
  found = read(tmp_path, 'webgpt', row, tie)
  assert [r.scores for r in found.comparisons] == [(0.5, -0.5), (0.0, 0.0)]
  assert [r.ranks for r in found.comparisons] == [(1, 2), (1, 1)]
  assert found.comparisons[0].prompt == (
    '\n\nHuman: Do owls sleep?\n\nAssistant:'
  )
  assert found.comparisons[0].id == 'webgpt:q1'

  def raw(row):
    """OpenAI's line: a list of both answers."""
    keys = ('quotes', 'answer', 'tokens', 'score')
    return [
      {'question': row['question'], **{k: row[f'{k}_{n}'] for k in keys}}
      for n in (0, 1)
    ]

  for rows in ([row, tie], [row]):
    path = tmp_path / 'file.jsonl'
    path.write_text('\n'.join(json.dumps(raw(r)) for r in rows))
    assert FORMATS['webgpt'](path) == read(tmp_path, 'webgpt', *rows)
  # The Hub's rows as one list.
  path.write_text(json.dumps([row, tie]))
  assert FORMATS['webgpt'](path).comparisons == found.comparisons
  path.write_text(f'{json.dumps(raw(row))}\n[{{"answer": "x"}}]\n')
  with pytest.raises(records.RecordError, match='jsonl:2: expected a list of'):
    FORMATS['webgpt'](path)
  bad = raw(row)
  del bad[1]['score']
  path.write_text(f'{json.dumps(raw(row))}\n{json.dumps(bad)}\n')
  with pytest.raises(records.RecordError, match=r"jsonl:2: field 'score_1'"):
    FORMATS['webgpt'](path)


def test_safe_rlhf_has_two_labels(tmp_path):
  row = example('safe_rlhf_helpful', better_response_id=0, safer_response_id=1)
  answers = (' Eat it and see.', ' Ask an expert first.')
  prompt = '\n\nHuman: Is this mushroom safe?\n\nAssistant:'
  found = read(tmp_path, 'safe_rlhf_helpful', row)
  assert ranked(found) == (prompt, answers, (1, 2))
  assert found.comparisons[0].metadata['is_response_1_safe'] is True
  found = read(tmp_path, 'safe_rlhf_harmless', row)
  assert ranked(found) == (prompt, answers, (2, 1))


def test_files_of_one_name_have_ids_of_their_own(tmp_path):
  """PKU-SafeRLHF has a folder for each model that answered."""
  folder = tmp_path / 'hub'
  name, row = 'safe_rlhf_helpful', example('safe_rlhf_helpful')

  def ids(*places):
    for place in places:
      path = folder / place
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(json.dumps({**row, 'prompt': f'Why {place}?'}))
    out = tmp_path / 'out'
    convert.convert(name, [folder], out, valid=0.0001, seed=0, replace=True)
    rows = records.read_jsonl(
      out / 'comparisons_train.jsonl', records.Comparison
    )
    return [row.id for row in rows]

  assert ids('data/Alpaca-7B/train.jsonl') == ['safe_rlhf:train:1']
  places = 'data/Alpaca2-7B/train.jsonl', 'data/Alpaca2-7B/test.jsonl'
  assert ids(*places) == [
    'safe_rlhf:Alpaca-7B/train:1', 'safe_rlhf:test:1',
    'safe_rlhf:Alpaca2-7B/train:1',
  ]  # fmt: skip
  assert ids('data/Alpaca2-7B/train.b.jsonl')[-2:] == [
    'safe_rlhf:Alpaca2-7B/train.b.jsonl:1',
    'safe_rlhf:Alpaca2-7B/train.jsonl:1',
  ]


def test_nectar_is_one_ranking_of_seven(tmp_path):
  row = example('nectar')
  row['answers'].reverse()
  found = read(tmp_path, 'nectar', row)
  prompt, completions, ranks = ranked(found)
  assert prompt == BIRD and ranks == (7, 6, 5, 4, 3, 2, 1)
  assert completions[-1] == ' The owl, which hunts at night.'
  assert found.comparisons[0].metadata['models'][0] == 'anthropic'
  assert found.comparisons[0].scores == ()
  row['prompt'] = 'Human: Name a bird.\n\nAssistant:'
  assert ranked(read(tmp_path, 'nectar', row))[0] == BIRD
  row['prompt'] = 'Name a bird.'
  found = read(tmp_path, 'nectar', row)
  assert found.skipped == {'not a dialogue that asks for an answer': 1}


def test_an_axis_ranks_what_a_worker_rated(tmp_path):
  first, second = FORMATS['summarize_axis'].example
  third = copy.deepcopy(second)
  third['summary'] |= {'text': ' Cats meow.', 'policy': 'sup2'}
  third['summary']['axes']['overall'] = '7'
  other = {**first, 'worker': 'w2'}
  unrated = copy.deepcopy(first)
  unrated['summary']['axes']['overall'] = None
  found = read(tmp_path, 'summarize_axis', first, second, other, unrated, third)
  (ranking,) = found.comparisons
  assert ranking.prompt == (
    'SUBREDDIT: r/pets\n\nTITLE: Cat\n\nPOST: My cat meows.\n\nTL;DR:'
  )
  assert ranking.completions == (' It meows.', ' Dogs.', ' Cats meow.')
  assert (ranking.ranks, ranking.scores) == ((2, 3, 1), (6.0, 2.0, 7.0))
  assert (ranking.labeler, ranking.id) == ('w1', 't3_1')
  assert ranking.metadata['policies'] == ['ref', 'sup1', 'sup2']
  assert ranking.metadata['axes'][0]['coverage'] == 4
  assert found.skipped == {
    "the summary has no rating of 'overall'": 1,
    'an answer that is rated alone': 1,
  }


# --- Chosen and rejected ------------------------------------------------------


ANSWERS = [{'role': 'assistant', 'content': text} for text in ('Owl', 'No')]


@pytest.mark.parametrize(
  ('row', 'expected'),
  [
    (  # Explicit prompt.
      {
        'prompt': conversation('A', 'b', 'C'),
        'chosen': ANSWERS[:1],
        'rejected': ANSWERS[1:],
      },
      (
        '\n\nHuman: A\n\nAssistant: b\n\nHuman: C\n\nAssistant:',
        (' Owl', ' No'),
      ),
    ),
    (  # Implicit prompt.
      {
        'chosen': conversation('Name a bird.', 'Owl'),
        'rejected': conversation('Name a bird.', 'No'),
      },
      (BIRD, (' Owl', ' No')),
    ),
    (  # Both, as in UltraFeedback's binary form; null is no prompt.
      {
        'prompt': None,
        'chosen': conversation('Name a bird.', 'Owl'),
        'rejected': conversation('Name a bird.', 'No'),
      },
      (BIRD, (' Owl', ' No')),
    ),
    (  # A text asks, messages answer.
      {
        'prompt': 'Name a bird.',
        'chosen': ANSWERS[:1],
        'rejected': ANSWERS[1:],
      },
      (BIRD, (' Owl', ' No')),
    ),
    (  # Messages ask, texts answer.
      {
        'prompt': conversation('Name a bird.'),
        'chosen': 'Owl',
        'rejected': 'No',
      },
      (BIRD, (' Owl', ' No')),
    ),
    (  # Standard: prompt and answer are one text, spaces as they are.
      {'prompt': 'The sky is', 'chosen': ' blue.', 'rejected': ' green.'},
      ('The sky is', (' blue.', ' green.')),
    ),
  ],
)
def test_trl_preferences(row, expected, tmp_path):
  found = read(tmp_path, 'chosen_rejected', row)
  assert ranked(found) == (*expected, (1, 2))


BRIEF = {'role': 'system', 'content': 'Be brief.'}
OTHERS = 'the prompt is not that of the conversations of the answers'


@pytest.mark.parametrize(
  ('prompt', 'begin', 'expected'),
  [
    # What the system says comes before the conversation, once.
    ([BRIEF], ['A'], ['Be brief.', 'A']),
    ([BRIEF], [BRIEF, 'A'], ['Be brief.', 'A']),
    ([{**BRIEF, 'content': 'Be kind.'}], [BRIEF, 'A'], OTHERS),
    # The messages repeat the prompt, or its end, or add to it.
    (['A'], ['A'], ['A']),
    (['A', 'b', 'C'], ['A', 'b', 'C'], ['A', 'b', 'C']),
    (['A'], ['A', 'b', 'C'], ['A', 'b', 'C']),
    ([BRIEF, 'A'], ['A'], ['Be brief.', 'A']),
    (['A', 'b', 'C'], ['C'], ['A', 'b', 'C']),
    (['A'], [BRIEF, 'A'], ['Be brief.', 'A']),
    # UltraFeedback's binary form has the first question as text.
    ('A', ['A'], ['A']),
    (' A\n', ['A', 'b', 'C'], ['A', 'b', 'C']),
    ('C', ['A', 'b', 'C'], ['A', 'b', 'C']),
    ('', ['A'], ['A']),
    ([], ['A'], ['A']),
    # Another question would be lost.
    ('B', ['A'], OTHERS),
    (['B'], ['A'], OTHERS),
    ([BRIEF, 'B'], ['A'], OTHERS),
    (['A', 'x', 'C'], ['A', 'b', 'C'], OTHERS),
  ],
)
def test_a_prompt_beside_whole_conversations(prompt, begin, expected, tmp_path):
  def messages(parts):
    """Capitals ask, others answer."""
    return [
      part
      if isinstance(part, dict)
      else {'role': 'user' if part.isupper() else 'assistant', 'content': part}
      for part in parts
    ]

  row = {
    'prompt': prompt if isinstance(prompt, str) else messages(prompt),
    'chosen': messages([*begin, 'good']),
    'rejected': messages([*begin, 'bad']),
  }
  found = read(tmp_path, 'chosen_rejected', row)
  if expected == OTHERS:
    assert (found.comparisons, found.skipped) == ([], {OTHERS: 1})
    return
  (pair,) = found.comparisons
  assert [turn.content for turn in pair.turns] == expected
  assert pair.completions == (' good', ' bad')


@pytest.mark.parametrize(
  ('row', 'reason'),
  [
    (
      {
        'chosen': conversation('Name a bird.', 'Owl'),
        'rejected': conversation('Name a fish.', 'No'),
      },
      'the answers belong to different prompts',
    ),
    (
      {
        'chosen': conversation('Name a bird.'),
        'rejected': conversation('Name a bird.'),
      },
      'a conversation does not end with a question and its answer',
    ),
    (
      {
        'chosen': conversation('Name a bird.', 'Owl'),
        'rejected': conversation('Name a bird.', 'Owl '),
      },
      'all answers are the same',
    ),
    (
      {
        'prompt': [{'role': 'tool', 'content': '{}'}],
        'chosen': ANSWERS[:1],
        'rejected': ANSWERS[1:],
      },
      'a message is neither system, user nor assistant',
    ),
    (
      {'prompt': ' ', 'chosen': 'Owl', 'rejected': 'No'},
      'the prompt is empty',
    ),
    (
      {
        'prompt': 'Name a bird.',
        'chosen': [ANSWERS[0] | {'reasoning_content': 'hm'}],
        'rejected': ANSWERS[1:],
      },
      'a message holds reasoning beside its text',
    ),
  ],
)
def test_pairs_that_are_no_comparison_are_counted(row, reason, tmp_path):
  found = read(tmp_path, 'chosen_rejected', row)
  assert (found.comparisons, found.skipped) == ([], {reason: 1})


@pytest.mark.parametrize('null', [None, float('nan')])
@pytest.mark.parametrize(
  ('name', 'place'),
  [
    ('argilla_orca', ('chosen',)),
    ('safe_rlhf_helpful', ('response_0',)),
    ('summarize_axis', ('summary', 'text')),
    ('shp', ('human_ref_A',)),
    ('ultrafeedback', ('completions', 0, 'response')),
    ('helpsteer', ('response',)),
    ('helpsteer2_preference', ('response_1',)),
    ('helpsteer3', ('response1',)),
    ('webgpt', ('answer_0',)),
    ('nectar', ('answers', 0, 'answer')),
    ('hhh', ('targets', 'choices', 0)),
    ('llmbar', ('output_1',)),
    ('pandalm', ('response1',)),
    ('autoj', ('response 1',)),
    ('tulu_human', ('completion_a',)),
  ],
)
def test_an_answer_that_is_null_is_not_ranked(name, place, null, tmp_path):
  row = example(name)
  parent = row
  for key in place[:-1]:
    parent = parent[key]
  parent[place[-1]] = null
  found = read(tmp_path, name, row)
  missing = 'is missing (null)'
  assert [n for why, n in found.skipped.items() if missing in why] == [1]
  assert found.comparisons == []
  # An empty answer is one.
  parent[place[-1]] = ''
  found = read(tmp_path, name, row)
  assert not any(missing in why for why in found.skipped)


@pytest.mark.parametrize(
  'row',
  [
    {'prompt': 'Q?', 'chosen': None, 'rejected': 'b'},
    {'prompt': 'Q?', 'chosen': 'a', 'rejected': None},
    {'chosen': None, 'rejected': 'b'},
    {
      'prompt': 'Q?',
      'chosen': [{'role': 'assistant', 'content': None}],
      'rejected': ANSWERS[1:],
    },
  ],
)
def test_a_side_that_is_null_is_not_ranked(row, tmp_path):
  found = read(tmp_path, 'chosen_rejected', row)
  assert found.comparisons == [] and found.skipped.total() == 1
  assert '(null)' in str(found.skipped)


def test_texts_without_a_prompt(tmp_path):
  """The texts of TRL begin alike; those of HH have a format of their own."""
  rows = [
    {'chosen': 'The sky is blue.', 'rejected': 'The sky is black.'},
    {'chosen': 'Why?\nSo.', 'rejected': 'Why?\nNo.'},
    {'chosen': 'Yes.', 'rejected': 'No.'},
    {'chosen': 'The sky.', 'rejected': 'The sky.'},
  ]
  found = read(tmp_path, 'chosen_rejected', *rows)
  assert [(row.prompt, row.completions) for row in found.comparisons] == [
    ('The sky is', (' blue.', ' black.')),
    ('Why?', ('\nSo.', '\nNo.')),
  ]
  assert found.skipped == {
    'the prompt is empty': 1,
    'all answers are the same': 1,
  }
  with pytest.raises(records.RecordError, match='jsonl:1: .* are the format h'):
    read(tmp_path, 'chosen_rejected', example('hh'))
  row = example('argilla', chosen='Owl', rejected='No')
  with pytest.raises(records.RecordError) as caught:
    read(tmp_path, 'argilla', row)
  assert "file.jsonl:1: 'chosen' is a text and there is no 'prompt'" in str(
    caught.value
  )


@pytest.mark.parametrize(
  'asked',
  [
    '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n',
    '[INST] Hi [/INST] ',
    '<|start_header_id|>user<|end_header_id|>\n\nHi',
    '### Human: Hi\n### Assistant: ',
  ],
)
def test_texts_in_a_chat_template_are_refused(asked, tmp_path):
  """What both begin with would cut the answer's first words off."""
  row = {'chosen': f'{asked}I am well.', 'rejected': f'{asked}I am bad.'}
  with pytest.raises(records.RecordError, match='jsonl:1: .* a chat template'):
    read(tmp_path, 'chosen_rejected', row)


def test_headings_and_lists_in_texts_are_texts(tmp_path):
  told = 'Write.\n### Response format\nA list. '
  listed = '[{"role": "user", "content": "x"}]'
  rows = [
    {'chosen': f'{told}Owl', 'rejected': f'{told}No'},
    {'prompt': f'{listed} What is it?', 'chosen': 'JSON', 'rejected': 'No'},
  ]
  found = read(tmp_path, 'chosen_rejected', *rows)
  assert [row.prompt for row in found.comparisons] == [
    told.rstrip(), rows[1]['prompt']
  ]  # fmt: skip


def test_answers_with_weight_0_are_context_alone(tmp_path):
  messages = conversation('A', 'b', 'C', 'd')
  messages[1]['weight'], messages[3]['weight'] = 0, 1
  found = read(tmp_path, 'messages', {'messages': messages})
  (row,) = found.demonstrations
  assert row.response == ' d' and [t.content for t in row.turns] == [*'AbC']
  assert sum(found.skipped.values()) == 1


def test_dialogues_without_their_first_line_breaks(tmp_path):
  row = example('hh')
  row = {key: row[key].lstrip() for key in ('chosen', 'rejected')}
  assert read(tmp_path, 'hh', row).comparisons == (
    read(tmp_path, 'hh', example('hh')).comparisons
  )
  with pytest.raises(records.RecordError, match='are the format hh'):
    read(tmp_path, 'chosen_rejected', row)


@pytest.mark.parametrize('write', [json.dumps, repr])
def test_cells_with_the_text_of_messages(write, tmp_path):
  """As tables have them that pandas wrote."""
  row = {
    'prompt': conversation('Name a bird.'),
    'chosen': ANSWERS[:1],
    'rejected': ANSWERS[1:],
  }
  expected = ranked(read(tmp_path, 'chosen_rejected', row))
  path = tmp_path / 'file.csv'
  with path.open('w', newline='') as file:
    writer = csv.writer(file)
    writer.writerows([row, [write(cell) for cell in row.values()]])
  assert ranked(FORMATS['chosen_rejected'](path)) == expected
  path.write_text(path.read_text().replace('}]', '} {}]'))
  with pytest.raises(records.RecordError, match='csv:2: .*JSONL or Parquet'):
    FORMATS['chosen_rejected'](path)


def test_dsp_scores_whole_dialogues(tmp_path):
  headings = '## Human:\nWhy?\n\nSay it.\n\n## Assistant:\n'
  rows = [
    {
      'text': [f'{BIRD} Owl', f'{BIRD} No', f'{BIRD} Wren'],
      'score': [2.0, 0.0, 2.0],
    },
    {
      'text': [f'{headings}Because [1].', f'{headings}No.'],
      'score': [0.5, 1.5],
    },
    {'text': [f'{BIRD} Owl', f'{headings}No.'], 'score': [1.0, 0.0]},
  ]
  path = tmp_path / 'harmless.test.json'
  path.write_text(json.dumps(rows))
  found = FORMATS['dsp'](path)
  first, second = found.comparisons
  assert (first.prompt, first.ranks) == (BIRD, (1, 2, 1))
  assert first.completions == (' Owl', ' No', ' Wren')
  assert second.prompt == '\n\nHuman: Why?\n\nSay it.\n\nAssistant:'
  assert (second.completions, second.ranks) == (
    (' Because [1].', ' No.'),
    (2, 1),
  )
  assert found.skipped == {'the answers belong to different prompts': 1}
  for scores in ([1.0], [1.0, '0'], [1.0, None], [1.0, True], [1, 10**400]):
    path.write_text(json.dumps([{**rows[1], 'score': scores}]))
    with pytest.raises(records.RecordError, match="test.json:1: 'score' must"):
      FORMATS['dsp'](path)


def test_dsp_reads_hh_as_hh_does(data_root, tmp_path):
  path = data_root / 'hh_helpful' / 'train_gt.jsonl.gz'
  rows = [values for _, values in records.iterate_lines(path)]
  texts = [
    {'text': [row['chosen'], row['rejected']], 'score': [1.0, 0.0]}
    for row in rows
  ]
  path = tmp_path / 'helpful.json'
  path.write_text(json.dumps(texts))
  found = FORMATS['dsp'](path).comparisons
  expected = FORMATS['hh'](data_root / 'hh_helpful' / 'train_gt.jsonl.gz')
  assert len(found) == len(expected.comparisons) == 3999
  for one, other in zip(found, expected.comparisons, strict=True):
    assert one.prompt == other.prompt and one.turns == other.turns
    assert one.completions == other.completions and one.ranks == other.ranks


# --- Arena --------------------------------------------------------------------


@pytest.mark.parametrize(
  ('winner', 'ranks'),
  [
    ('model_a', (1, 2)),
    ('model_b', (2, 1)),
    ('tie', (1, 1)),
    ('tie (bothbad)', (1, 1)),
    ('both_bad', (1, 1)),
    ('tie (inconsistent)', (1, 1)),
  ],
)
def test_arena_votes(winner, ranks, tmp_path):
  found = read(tmp_path, 'arena', example('arena', winner=winner))
  assert ranked(found) == (BIRD, (' The owl.', ' No.'), ranks)
  (row,) = found.comparisons
  assert (row.labeler, row.id) == ('arena_user_7', 'arena:q1')
  assert (row.category, row.time) == ('English', '1682351591.1')
  assert row.metadata['winner'] == winner
  assert row.metadata['models'] == ['vicuna-13b', 'koala-13b']
  with pytest.raises(records.RecordError, match="'winner' is 'model_c', expec"):
    read(tmp_path, 'arena', example('arena', winner='model_c'))


def test_votes_of_people_and_of_gpt_4_are_told_apart(tmp_path):
  """MT-bench has a split of each, and a folder holds both."""
  votes = {
    'human': [('expert_0', 'model_a'), ('author_2', 'tie')],
    'gpt4_pair': [('gpt4_pair', 'tie (inconsistent)')],
  }
  folder = tmp_path / 'data'
  folder.mkdir()
  for split, found in votes.items():
    rows = [example('arena', judge=j, winner=w) for j, w in found]
    lines = '\n'.join(map(json.dumps, rows))
    (folder / f'{split}.jsonl').write_text(lines)
  out = tmp_path / 'out'
  counts = convert.convert('arena', [folder], out, valid=0.0001, seed=0)
  assert counts['comparisons_train'] == 3
  rows = records.read_jsonl(out / 'comparisons_train.jsonl', records.Comparison)
  assert {row.labeler: row.metadata['winner'] for row in rows} == dict(
    sum(votes.values(), [])
  )


def test_arena_of_several_turns(tmp_path):
  same = {
    'conversation_a': conversation('A', 'b', 'C', 'good'),
    'conversation_b': conversation('A', 'b', 'C', 'bad'),
  }
  differing = {**same, 'conversation_b': conversation('A', 'x', 'C', 'bad')}
  found = read(
    tmp_path,
    'arena',
    example('arena', **same, turn=2),
    example('arena', **differing, turn=2),
    # MT-bench has both turns although the vote was after the first one.
    example('arena', **differing, turn=1),
  )
  first, second = found.comparisons
  assert first.completions == (' good', ' bad') and len(first.turns) == 3
  assert second.completions == (' b', ' x') and len(second.turns) == 1
  assert found.skipped == {'the answers belong to different prompts': 1}


def test_arena_140k_has_parts(tmp_path):
  def message(role, text, kind='text'):
    part = {'type': kind, 'text': text, 'image': None, 'mimeType': None}
    return {'role': role, 'content': [part]}

  row = {
    'id': 'b5',
    'model_a': 'x',
    'model_b': 'y',
    'winner': 'both_bad',
    'evaluation_session_id': 's',
    'evaluation_order': 1,
    'conversation_a': [message('user', 'Hi'), message('assistant', 'a')],
    'conversation_b': [message('user', 'Hi'), message('assistant', 'b')],
    'language': 'en',
    'is_code': False,
    'timestamp': '2025-07-01 10:00:00',
  }
  seen = copy.deepcopy(row)
  seen['conversation_a'][0] = message('user', None, 'image')
  found = read(tmp_path, 'arena', row, seen)
  assert ranked(found)[1:] == ((' a', ' b'), (1, 1))
  assert found.comparisons[0].id == 'arena:b5'
  assert found.skipped == {'a message holds more than text': 1}


def later_vote(turns, rounds, **changes):
  """A vote of 140k after another one; `turns` and `rounds` are (a, b) texts."""
  sides = {
    f'conversation_{side}': conversation('More?', text)
    for side, text in zip('ab', turns, strict=True)
  }
  whole = [
    {
      'user': {'role': 'user', 'content': asked},
      'model_side_a': {'role': 'assistant', 'content': a},
      'model_side_b': {'role': 'assistant', 'content': b},
    }
    for asked, a, b in rounds
  ]
  about = {'evaluation_order': 2, 'full_conversation': whole}
  return example('arena', **sides, **{**about, 'turn': None, **changes})


def test_a_later_vote_of_140k_has_its_history(tmp_path):
  after = ('Thanks', 'x', 'y')
  same = [('Hi', 'Yes?', 'Yes?'), ('More?', 'a', 'b'), after]
  found = read(tmp_path, 'arena', later_vote('ab', same))
  prompt = '\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: More?\n\nAssistant:'
  assert ranked(found) == (prompt, (' a', ' b'), (1, 2))
  # A first vote has no history, whatever came after it.
  first = later_vote('ab', [('More?', 'a', 'b'), after], evaluation_order=1)
  found = read(tmp_path, 'arena', first)
  assert ranked(found)[0] == '\n\nHuman: More?\n\nAssistant:'
  differing = [('Hi', 'Yes?', 'No.'), ('More?', 'a', 'b')]
  missing = [('Hi', 'Yes?', 'Yes?')]
  failed = later_vote('ab', same)
  failed['full_conversation'][0]['model_side_b'] = None
  found = read(
    tmp_path,
    'arena',
    later_vote('ab', differing),
    later_vote('ab', missing),
    failed,
  )
  assert not found.comparisons
  assert found.skipped == {
    'the answers belong to different prompts': 1,
    'full_conversation does not hold the conversation of the vote': 2,
  }


def test_arena_55k_is_a_csv_file_of_json_lists(tmp_path):
  header = 'id,model_a,model_b,prompt,response_a,response_b,'
  header += 'winner_model_a,winner_model_b,winner_tie'
  prompt = '"[""Say """"hi"""", please""]"'.replace('""""', '\\""')
  path = tmp_path / 'train.csv'
  path.write_text(
    f'{header}\n'
    f'1,x,y,{prompt},"[""hi""]","[""no""]",0,1,0\n'
    '2,x,y,"[""A"",""C""]","[""b"",""d""]","[""b"",""""]",0,0,1\n'
    '4,x,y,"[""A""]","[""b""]","[null]",0,1,0\n'
    '3,x,y,"[""A\\ud83d""]","[""b""]","[""c""]",1,0,0\n'
  )
  found = FORMATS['arena'](path)
  first, second = found.comparisons
  assert first.turns == (records.Turn('user', 'Say "hi", please'),)
  assert (first.completions, first.ranks) == ((' hi', ' no'), (2, 1))
  assert (second.completions, second.ranks) == ((' d', ''), (1, 1))
  assert [turn.content for turn in second.turns] == ['A', 'b', 'C']
  assert found.skipped == {
    'a text holds a lone surrogate': 1,
    'a text is missing (null)': 1,
  }
  path.write_text(f'{header}\n1,x,y,"[""A""]","[""b""]","[""c""]",1,1,0\n')
  with pytest.raises(records.RecordError, match=r'train.csv:2: winner_model_a'):
    FORMATS['arena'](path)
  path.write_text(f'{header}\n1,x,y,A,"[""b""]","[""c""]",1,0,0\n')
  with pytest.raises(records.RecordError, match=r"csv:2: 'prompt' is not a li"):
    FORMATS['arena'](path)


# --- Demonstrations -----------------------------------------------------------


def test_each_answer_of_messages_is_a_demonstration(tmp_path):
  system = {'role': 'system', 'content': 'Be brief.'}
  row = {
    'id': 'm7',
    'source': 'tulu',
    'messages': [system, *conversation('A', 'b', 'C', ' d\n')],
  }
  found = read(tmp_path, 'messages', row)
  assert [(d.prompt, d.response, d.id) for d in found.demonstrations] == [
    ('Be brief.\n\nHuman: A\n\nAssistant:', ' b', 'm7:2'),
    (
      'Be brief.\n\nHuman: A\n\nAssistant: b\n\nHuman: C\n\nAssistant:',
      ' d',
      'm7:4',
    ),
  ]
  assert found.demonstrations[0].category == 'tulu'
  rows = [
    {'messages': conversation('A')},
    {'messages': conversation('A', ' ')},
    {'messages': [{'role': 'function', 'content': 'x'}]},
    {'messages': conversation('A', 'b'), 'model': 'gpt-4'},
  ]
  found = read(tmp_path, 'messages', *rows)
  assert found.demonstrations == []
  assert [d.labeler for d in found.model_demonstrations] == ['model:gpt-4']
  assert found.skipped == {
    'a conversation without an answer': 1,
    'a question or an answer is empty': 1,
    'a message is neither system, user nor assistant': 1,
  }
  # An answer is learned from once, and one that follows no question is counted.
  begins = {'role': 'assistant', 'content': 'Hello.'}
  rows = [
    {'messages': [begins, *conversation('A', 'b'), begins]},
    {'messages': [begins]},
  ]
  found = read(tmp_path, 'messages', *rows)
  assert [d.response for d in found.demonstrations] == [' b']
  assert found.skipped == {'an answer that follows no question': 3}
  bad = {'messages': [{'role': 'user'}]}
  with pytest.raises(records.RecordError) as caught:
    read(tmp_path, 'messages', bad)
  assert "file.jsonl:1: messages[0]: field 'content' is missing" in str(
    caught.value
  )


@pytest.mark.parametrize(
  'message',
  [
    {'role': 'assistant', 'tool_calls': [{'function': {'name': 'add'}}]},
    {'role': 'assistant', 'content': 'Wait.', 'function_calls': 'add(1, 2)'},
  ],
)
def test_a_call_of_a_tool_is_no_text(message, tmp_path):
  calling = {'messages': [*conversation('Add.'), message]}
  plain = [*conversation('A', 'b'), *conversation('C')]
  plain.append({'role': 'assistant', 'content': 'd', 'tool_calls': None})
  found = read(tmp_path, 'messages', calling, {'messages': plain})
  assert [d.response for d in found.demonstrations] == [' b', ' d']
  assert found.skipped == {'a message holds more than text': 1}


def test_prompts_and_completions(tmp_path):
  found = read(tmp_path, 'tldr_sft', example('tldr_sft'))
  (row,) = found.demonstrations
  assert row.prompt.endswith('POST: My cat meows.\nTL;DR:')
  assert row.response == ' My cat meows a lot.'
  rows = [
    {'prompt': 'The sky is', 'completion': ' blue.'},
    {'prompt': conversation('Name a bird.'), 'completion': ANSWERS[:1]},
    {'prompt': 'The sky is', 'completion': ''},
  ]
  found = read(tmp_path, 'prompt_completion', *rows)
  assert [(d.prompt, d.response) for d in found.demonstrations] == [
    ('The sky is', ' blue.'),
    (BIRD, ' Owl'),
  ]
  assert found.skipped == {'the prompt or the completion is empty': 1}


def test_a_rejected_completion_is_no_demonstration(tmp_path):
  """TRL's format of unpaired preferences; a table may hold texts."""
  accepted = [True, 'True', ' true', 1, 1.0, '1', '1.0']
  rejected = [False, 'False', 'FALSE', 0, 0.0, '0', '0.0']
  rows = [
    {'prompt': 'The sky is', 'completion': f' {label!r}.', 'label': label}
    for label in (*accepted, *rejected, None, '')
  ]
  rows.append({
    'prompt': conversation('Name a bird.'), 'completion': ANSWERS[1:],
    'label': False,
  })  # fmt: skip
  found = read(tmp_path, 'prompt_completion', *rows)
  assert [row.response for row in found.demonstrations] == [
    f' {label!r}.' for label in accepted
  ]
  assert found.skipped == {
    'a completion that is labeled as rejected': len(rejected) + 1,
    'a completion without a label': 2,
  }


@pytest.mark.parametrize('label', ['no', 'rejected', -1, 2, 0.5, 'nan', [0]])
def test_a_label_that_is_neither_true_nor_false_is_named(label, tmp_path):
  rows = [
    {'prompt': 'The sky is', 'completion': ' blue.', 'label': each}
    for each in (True, label)
  ]
  with pytest.raises(records.RecordError, match=r"file.jsonl:2: 'label' is "):
    read(tmp_path, 'prompt_completion', *rows)


# --- Test sets ----------------------------------------------------------------


def test_arguments_of_a_debate(tmp_path):
  folder = tmp_path / 'UKPConvArg1Strict-CSV'
  folder.mkdir()
  path = folder / 'is-porn-wrong-_no-is-is-not.csv'
  path.write_text(
    '#id\tlabel\ta1\ta2\n'
    'arg1_arg2\ta2\tIt "is".\tIt supplies "needs. <br/> So &amp; so.\n'
    'arg1_arg3\tequal\tIt "is".\tNo.\r\n'
  )
  found = FORMATS['ukp'](path)
  first, second = found.comparisons
  assert first.turns[0].content == (
    'Debate: is porn wrong\nStance: no is is not\n\n'
    'Give an argument for this stance.'
  )
  assert first.completions == (' It "is".', ' It supplies "needs.\nSo & so.')
  assert (first.ranks, second.ranks) == ((2, 1), (1, 1))
  assert second.completions[1] == ' No.'
  assert first.id == 'ukp:arg1_arg2'
  path.write_text('#id\tlabel\ta1\ta2\nx\ta1\tone\n')
  with pytest.raises(
    records.RecordError, match='csv:2: 3 fields for 4 columns'
  ):
    FORMATS['ukp'](path)
  path.write_text('#id\tlabel\ta1\nx\ta1\tone\n')
  with pytest.raises(records.RecordError, match="csv:2: field 'a2' is missing"):
    FORMATS['ukp'](path)
  with pytest.raises(records.RecordError, match="called 'args'; upstream"):
    FORMATS['ukp'](path.rename(folder / 'args.csv'))


@pytest.mark.parametrize('name', ['ukp', 'ukp_ranking'])
def test_a_long_first_line_is_cut(name, tmp_path):
  """A file without tabs has one column, whose name is its first line."""
  path = tmp_path / 'topic_pro.csv'
  path.write_text('A text without tabs. ' * 500 + '\nAnother line.\n')
  with pytest.raises(records.RecordError) as caught:
    FORMATS[name](path)
  said = str(caught.value)
  assert 'is missing (found A text without tabs. A text' in said
  assert said.endswith('...); is this the format of this file?')
  assert len(said) < 500 + len(str(path))


def test_a_ranking_of_all_arguments(tmp_path):
  path = tmp_path / 'tv-is-better-than-books_tv.csv'
  rows = [('7', '0.22'), ('8', '0.005'), ('9', '0.01'), ('10', '0.22')]
  path.write_text(
    '#id\trank\targument\n'
    + ''.join(f'{name}\t{rank}\tText {name}\n' for name, rank in rows)
  )
  found = FORMATS['ukp_ranking'](path)
  (ranking,) = found.comparisons
  # The higher upstream's rank, the less convincing.
  assert ranking.ranks == (3, 1, 2, 3)
  assert ranking.metadata['ids'] == ['7', '8', '9', '10']
  assert ranking.category == 'tv-is-better-than-books_tv'


def test_hhh_as_big_bench_and_as_the_hub_have_it(tmp_path):
  row = example('hhh')
  folder = tmp_path / 'hhh_alignment' / 'harmless'
  folder.mkdir(parents=True)
  prompt = '\n\nHuman: Is the earth flat?\n\nAssistant:'
  path = folder / 'task.json'
  dialogue = 'Hi\n\nAssistant: Hello\n\nHuman: Is it flat?'
  examples = [
    {'input': row['input'], 'target_scores': {'Yes.': 0, 'No.': 1}},
    {'input': dialogue, 'target_scores': {'No.': 1, 'Yes.': 0}},
  ]
  path.write_text(json.dumps({'name': 'hhh', 'examples': examples}, indent=2))
  first, second = FORMATS['hhh'](path).comparisons
  assert (first.prompt, first.completions) == (prompt, (' Yes.', ' No.'))
  assert (first.ranks, first.category) == ((2, 1), 'harmless')
  assert [turn.content for turn in second.turns] == [
    'Hi',
    'Hello',
    'Is it flat?',
  ]
  path = folder / 'hhh_alignment-test.parquet'
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
  found = FORMATS['hhh'](path)
  assert ranked(found) == (prompt, (' No.', ' Yes.'), (1, 2))
  assert found.comparisons[0].category == 'harmless'
  path = folder / 'task.json'
  path.write_text(json.dumps({'examples': [examples[0], {'input': 'x'}]}))
  with pytest.raises(records.RecordError, match=r"json:2: field 'targets' is"):
    FORMATS['hhh'](path)


def test_judges_test_sets(tmp_path):
  folder = tmp_path / 'Neighbor'
  folder.mkdir()
  path = folder / 'dataset.json'
  path.write_text(json.dumps([example('llmbar'), example('llmbar', label=2)]))
  first, second = FORMATS['llmbar'](path).comparisons
  assert (first.ranks, second.ranks) == ((1, 2), (2, 1))
  assert (first.prompt, first.category) == (BIRD, 'Neighbor')

  votes = [(1, 1, 0), (2, 0, 2), (0, 0, 1), (0, 1, 2)]
  rows = [
    example('pandalm', annotator1=a, annotator2=b, annotator3=c)
    for a, b, c in votes
  ]
  rows[1]['input'] = float('nan')  # As upstream spells "no input".
  found = read(tmp_path, 'pandalm', *rows)
  assert [r.ranks for r in found.comparisons] == [(1, 2), (2, 1), (1, 1)]
  assert found.comparisons[0].turns[0].content == (
    'Summarize it.\n\nOwls hunt at night.'
  )
  assert found.comparisons[1].turns[0].content == 'Summarize it.'
  assert found.skipped == {'all three annotators differ': 1}
  # Upstream's tables read the answer "True" as a truth value.
  row = example('pandalm', response1=True, response2=7.0)
  found = read(tmp_path, 'pandalm', row)
  assert ranked(found)[1] == (' True', ' 7')
  with pytest.raises(records.RecordError, match="'annotator2' is 3, expected"):
    read(tmp_path, 'pandalm', example('pandalm', annotator2=3))

  rows = [example('autoj', label=label) for label in (0, 1, 2)]
  found = read(tmp_path, 'autoj', *rows)
  assert [r.ranks for r in found.comparisons] == [(1, 2), (2, 1), (1, 1)]
  assert found.comparisons[0].category == 'seeking_advice'


def tulu_rows():
  return [
    example('tulu_human', preference='b-is-slightly-better'),
    example('tulu_human', timestamp='2023-05-01 09:00:00'),  # Earlier.
    example('tulu_human', evaluator='e2', preference='tie'),
    example('tulu_human', preference='', instance_quality='bad prompt'),
  ]


def check_tulu(found):
  first, second = found.comparisons
  assert (first.labeler, first.ranks) == ('e1', (2, 1))
  assert (second.labeler, second.ranks) == ('e2', (1, 1))
  assert first.metadata['preference'] == 'b-is-slightly-better'
  assert first.metadata['models'] == ['tulu-65b', 'chatgpt']
  assert found.skipped == {
    'judged again by the same person': 1,
    'remarks on an instance instead of a preference': 1,
  }


def test_tulu_keeps_the_last_judgment_of_a_person(tmp_path):
  check_tulu(read(tmp_path, 'tulu_human', *tulu_rows()))


def test_tulu_is_an_excel_file(tmp_path):
  openpyxl = pytest.importorskip('openpyxl')
  path = tmp_path / 'eval_annotations_tulu_1.xlsx'
  book, rows = openpyxl.Workbook(), tulu_rows()
  book.active.append(list(rows[0]))
  for row in rows:
    book.active.append([value or None for value in row.values()])
  book.save(path)
  check_tulu(FORMATS['tulu_human'](path))
  book.active['G2'].value = 12  # completion_a
  book.active.cell(1, 16, 'comment')
  book.save(path)
  with pytest.raises(records.RecordError, match="xlsx:1: column 'comment' com"):
    FORMATS['tulu_human'](path)
  book.active.cell(1, 16, 'remarks')
  book.save(path)
  found = FORMATS['tulu_human'](path)
  assert found.comparisons[0].completions == (' 12', ' No.')
  path.write_bytes(b'PK')
  with pytest.raises(records.RecordError, match='xlsx: not an Excel file'):
    FORMATS['tulu_human'](path)


def test_without_the_extra_one_line_says_what_to_install(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setitem(sys.modules, 'openpyxl', None)
  path = tmp_path / 'a.xlsx'
  path.write_bytes(b'PK')
  command = ['tulu_human', str(path), f'--output={tmp_path / "out"}']
  assert convert.main(command) == 1
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and "pip install -e '.[xlsx]'" in error


# --- Folders ------------------------------------------------------------------


def test_a_folder_of_parquet_files(tmp_path, capsys):
  folder = tmp_path / 'data'
  folder.mkdir()
  for part in range(2):
    rows = [
      example('ultrafeedback_binarized', prompt_id=f'{part}{number}')
      for number in range(3)
    ]
    for number, row in enumerate(rows):
      row['prompt'] = f'Question {part}{number}?'
      for side in ('chosen', 'rejected'):
        row[side][0]['content'] = row['prompt']
    pyarrow.parquet.write_table(
      pyarrow.Table.from_pylist(rows),
      folder / f'train_prefs-0000{part}-of-00002.parquet',
    )
  (folder / 'README.md').write_text('Not read.')
  out = tmp_path / 'out'
  options = [f'--output={out}', '--valid=0.0001']
  command = ['ultrafeedback_binarized', str(folder), *options]
  assert convert.main(command) == 0
  assert 'comparisons_train: 6\n' in capsys.readouterr().out
  found = records.read_jsonl(
    out / 'comparisons_train.jsonl', records.Comparison
  )
  assert [row.turns[0].content for row in found] == [
    f'Question {part}{number}?' for part in range(2) for number in range(3)
  ]
  # The same files as a table with format strings.
  command = ['prompts', str(folder), *options, '--replace']
  command += ['--field=text={chosen[0][content]}', '--field=id={prompt_id}']
  assert convert.main(command) == 0
  found = records.read_jsonl(out / 'prompts_train.jsonl', records.Prompt)
  assert [prompt.id for prompt in found] == ['00', '01', '02', '10', '11', '12']
  (folder / 'train_prefs-00001-of-00002.parquet').write_bytes(b'PAR1 cut')
  capsys.readouterr()
  command = ['ultrafeedback_binarized', str(folder), *options, '--replace']
  assert convert.main(command) == 1
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and '-00001-of-00002.parquet: damaged' in error
  empty = tmp_path / 'empty'
  empty.mkdir()
  assert convert.main(['argilla', str(empty), *options]) == 1
  assert f'{empty}: no file in it ends in .jsonl' in capsys.readouterr().err


def test_a_folder_of_folders_is_a_repository_of_the_hub(tmp_path, capsys):
  root = tmp_path / 'PKU'
  (root / '.cache').mkdir(parents=True)
  (root / '.cache' / 'x.json').write_text('{}')
  (root / 'README.md').write_text('Not read.')
  (root / 'dataset_infos.json').write_text('{}')
  files = []
  for model in ('Alpaca-7B', 'Alpaca3-8B'):
    folder = root / 'data' / model
    folder.mkdir(parents=True)
    for split in ('test', 'train'):
      files.append(folder / f'{split}.jsonl')
      row = example('safe_rlhf_helpful', prompt=f'{model} {split}?')
      files[-1].write_text(json.dumps(row))
  assert sources.files_of(root) == sorted(map(str, files))
  out = [f'--output={tmp_path / "out"}', '--valid=0.0001']
  assert convert.main(['safe_rlhf_helpful', str(root), *out]) == 0
  said = capsys.readouterr()
  assert 'comparisons_train: 4\n' in said.out
  assert f'split like the others (2, first {files[0]}); give' in said.err
  # A folder with files of its own is those.
  assert sources.files_of(folder) == sorted(map(str, files[2:]))
  again = ['safe_rlhf_helpful', str(root), str(files[0]), *out]
  assert convert.main(again) == 1
  assert f'{files[0]} is given 2 times' in capsys.readouterr().err

  # The Hub's own conversion has the split as a folder.
  for split in ('test', 'train'):
    folder = tmp_path / 'parquet' / 'default' / split
    folder.mkdir(parents=True)
    rows = [example('argilla')] * len(split)
    pyarrow.parquet.write_table(
      pyarrow.Table.from_pylist(rows), folder / '0000.parquet'
    )
  spec = f'argilla:{tmp_path / "parquet"}'
  config = ml_collections.ConfigDict({'preferences': spec})
  split, held_out = preference_sources.read(
    config, 'preferences', collections.Counter()
  )
  assert (len(split), len(held_out)) == (5, 4)


def test_the_recipe_names_a_source_that_gives_nothing(tmp_path):
  path = tmp_path / 'a.jsonl'
  config = ml_collections.ConfigDict(
    {
      'preferences': f'messages:{path}',
      'demonstrations': f'messages:{path}',
    }
  )
  row = {'messages': conversation('A', 'b'), 'model': 'gpt-4'}
  path.write_text(f'{json.dumps(row)}\n')
  for key, reason in (
    ('preferences', 'messages is demonstrations; left out: nothing'),
    ('demonstrations', 'left out: 1 demonstrations that models wrote, accord'),
  ):
    with pytest.raises(records.RecordError) as caught:
      preference_sources.read(config, key, collections.Counter())
    assert str(caught.value).startswith(f'{path}: gives no {key}; messages is ')
    assert reason in str(caught.value)
  row = {'messages': conversation('A', 'b')}
  with path.open('a') as file:
    file.write(json.dumps(row))
  skipped = collections.Counter()
  rows, _ = preference_sources.read(config, 'demonstrations', skipped)
  assert [row.response for row in rows] == [' b']
  assert list(skipped.values()) == [1]


def test_the_recipe_reads_a_folder_and_holds_out_its_test_files(tmp_path):
  row = example('argilla')
  for split, number in (('train', 3), ('test', 2)):
    path = tmp_path / f'{split}-00000-of-00001.parquet'
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * number), path)
  config = ml_collections.ConfigDict({'preferences': f'argilla:{tmp_path}'})
  skipped = collections.Counter()
  split, held_out = preference_sources.read(config, 'preferences', skipped)
  assert (len(split), len(held_out), sum(skipped.values())) == (3, 2, 0)
  config.preferences = f'argilla:{tmp_path}/nothing'
  with pytest.raises(records.RecordError, match='nothing: no such file; sourc'):
    preference_sources.read(config, 'preferences', skipped)


def test_a_saved_data_set_is_a_folder_too(tmp_path):
  for split in ('test', 'train'):
    rows = [example('argilla')] * len(split)
    folder = tmp_path / 'saved' / split
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(folder / 'data-0.arrow', table.schema) as out:
      out.write_table(table)
    state = {'_data_files': [{'filename': 'data-0.arrow'}]}
    (folder / 'state.json').write_text(json.dumps(state))
    (folder / 'dataset_info.json').write_text('{}')
  (file,) = sources.files_of(folder)
  assert file == f'datasets:{folder}'
  assert len(FORMATS['argilla'](file).comparisons) == 5
  # Of one with splits, each is a file.
  splits = tmp_path / 'saved' / 'dataset_dict.json'
  splits.write_text('{"splits": ["train", "test"]}')
  assert len(sources.files_of(tmp_path / 'saved')) == 2

  def sizes(spec):
    config = ml_collections.ConfigDict({'preferences': f'argilla:{spec}'})
    found = preference_sources.read(
      config, 'preferences', collections.Counter()
    )
    return tuple(map(len, found))

  assert sizes(tmp_path / 'saved') == (5, 4)
  for spec in (folder, f'datasets:{folder}'):
    assert sizes(spec) == (5, 0)


def test_a_time_in_nanoseconds_is_read(tmp_path):
  path = tmp_path / 'a.parquet'
  rows = pyarrow.Table.from_pylist([example('arena')])
  when = pyarrow.array([1751328000123456789], pyarrow.timestamp('ns', 'UTC'))
  rows = rows.drop_columns('tstamp').append_column('timestamp', when)
  pyarrow.parquet.write_table(rows, path)
  (row,) = FORMATS['arena'](path).comparisons
  assert row.time == '2025-07-01 00:00:00.123456+00:00'


def test_damaged_parquet_is_named(tmp_path):
  path = tmp_path / 'a.parquet'
  with pytest.raises(records.RecordError, match='a.parquet: no such file'):
    list(sources.read_objects(path))
  pointer = b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n'
  for name in ('a.parquet', 'a.jsonl'):
    (tmp_path / name).write_bytes(pointer)
    with pytest.raises(records.RecordError, match=f'{name}: is a pointer of G'):
      list(sources.read_objects(tmp_path / name))
  path.write_bytes(b'PAR1 and then nothing')
  with pytest.raises(records.RecordError, match='a.parquet: damaged after row'):
    list(sources.read_objects(path))
  rows = [{'chosen': 'x', 'rejected': 'y'}] * 2
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  with pytest.raises(records.RecordError, match=r"parquet:1: field 'prompt'"):
    FORMATS['nectar'](path)
