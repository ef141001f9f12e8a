"""Published formats: by hand, as upstream writes them, and the real files."""

import codecs
import copy
import gzip
import itertools
import json
import random
import unicodedata

import pytest

from instruct_jax.data import convert, importers, records


def write(path, rows, as_list=False):
  text = (
    json.dumps(rows)
    if as_list
    else ''.join(json.dumps(row) + '\n' for row in rows)
  )
  content = text.encode()
  path.write_bytes(
    gzip.compress(content) if path.name.endswith('.gz') else content
  )
  return path


def dialogue(*turns):
  names = ('Human', 'Assistant')
  return ''.join(f'\n\n{names[i % 2]}: {turn}' for i, turn in enumerate(turns))


def test_hh_of_one_and_of_several_turns(tmp_path):
  path = write(
    tmp_path / 'train.jsonl.gz',
    [
      {'chosen': dialogue('Q', 'yes'), 'rejected': dialogue('Q', 'no')},
      {
        'chosen': dialogue('A', 'b', 'C', 'good'),
        'rejected': dialogue('A', 'b', 'C', ''),
      },
      {'chosen': dialogue('Q', 'same'), 'rejected': dialogue('Q', 'same ')},
      {'chosen': dialogue('Q', 'x'), 'rejected': dialogue('other', 'y')},
      {'chosen': dialogue('Q'), 'rejected': dialogue('Q')},
      {  # An answer that quotes another assistant.
        'chosen': dialogue('Q', 'he said\n\nAssistant: hi'),
        'rejected': dialogue('Q', 'z'),
      },
    ],
  )
  found = importers.FORMATS['hh'](path)
  first, second, third = found.comparisons
  assert first.prompt == '\n\nHuman: Q\n\nAssistant:'
  assert (first.completions, first.ranks) == ((' yes', ' no'), (1, 2))
  assert first.id == 'hh:train:1'
  assert [t.role for t in second.turns] == ['user', 'assistant', 'user']
  assert second.prompt == dialogue('A', 'b', 'C') + '\n\nAssistant:'
  assert second.completions == (' good', '')
  assert third.completions[0] == ' he said\n\nAssistant: hi'
  # Prompt and completion together are upstream's text again.
  assert first.prompt + first.completions[1] == dialogue('Q', 'no')
  assert [d.response for d in found.demonstrations] == [
    ' yes',
    ' good',
    ' he said\n\nAssistant: hi',
  ]
  assert sorted(found.skipped.values()) == [1, 1, 1]
  assert [p.text for p in found.prompts()] == [first.prompt, second.prompt]


def message(role, text, *replies, **fields):
  return {
    'message_id': f'id-{text}',
    'text': text,
    'role': role,
    'lang': 'en',
    'review_result': True,
    'deleted': False,
    'rank': None,
    'replies': list(replies),
    **fields,
  }


def test_oasst_trees(tmp_path):
  follow_up = message(
    'prompter',
    'more',
    message('assistant', 'm1', rank=1),
    message('assistant', 'm0', rank=0),
    message('assistant', 'm0b', rank=0),
    message('assistant', 'bad', rank=2, review_result=False),
    message('assistant', 'unranked'),
  )
  tree = message(
    'prompter',
    'hello',
    message('assistant', 'hi', follow_up, rank=0),
    message('assistant', 'gone', follow_up, rank=1, deleted=True),
    user_id='u1',
    created_date='2023-01-02',
  )
  path = write(
    tmp_path / 'trees.jsonl', [{'message_tree_id': 't', 'prompt': tree}]
  )
  found = importers.FORMATS['oasst'](path)
  (ranked,) = found.comparisons
  assert ranked.prompt == dialogue('hello', 'hi', 'more') + '\n\nAssistant:'
  assert ranked.completions == (' m0', ' m0b', ' m1')
  assert (ranked.ranks, ranked.id) == ((1, 1, 2), 'oasst:id-more')
  assert [d.response for d in found.demonstrations] == [' hi', ' m0']
  assert found.demonstrations[0].user == 'u1'
  assert found.skipped == {
    'fewer than two ranked replies': 1,
    'deleted or failed review': 2,
    'an unranked reply among ranked ones': 1,
  }
  # A reply that repeats another one does not beat it.
  tree = message(
    'prompter',
    'Q?',
    message('assistant', 'a', rank=0),
    message('assistant', 'b', rank=1),
    message('assistant', 'a ', rank=2),
    message('prompter', 'R?', *2 * [message('assistant', 'c', rank=0)]),
  )
  write(path, [{'message_tree_id': 't', 'prompt': tree}])
  found = importers.FORMATS['oasst'](path)
  (ranked,) = found.comparisons
  assert (ranked.completions, ranked.ranks) == ((' a', ' b'), (1, 1))
  assert found.skipped == {
    'an answer that repeats another, merged': 1,
    'all answers are the same': 1,
  }
  assert [d.response for d in found.demonstrations] == [' a', ' c']
  write(path, [{'prompt': {'role': 'prompter'}}])
  with pytest.raises(records.RecordError, match=r'trees.jsonl:1: tree 1 is no'):
    importers.FORMATS['oasst'](path)


def test_a_long_conversation_is_no_recursion(tmp_path):
  node = message('assistant', 'end')
  for number in range(300):
    role = ('prompter', 'assistant')[number % 2]
    node = message(role, f't{number}', node)
  path = write(tmp_path / 'trees.jsonl', [{'prompt': node['replies'][0]}])
  found = importers.FORMATS['oasst'](path)
  assert max(len(d.turns) for d in found.demonstrations) == 299


def test_summaries(tmp_path):
  post = {'id': 't3_1', 'subreddit': 'pets', 'title': 'Cat', 'post': 'Meow.'}
  pair = {
    'info': post,
    'summaries': [
      {'text': ' a', 'policy': 'sup1', 'note': ''},
      {'text': ' b', 'policy': 'ref', 'note': ''},
    ],
    'choice': 1,
    'worker': 'w7',
    'batch': 'batch3',
    'split': 'train',
    'extra': {'confidence': 8},
  }
  article = {'id': 'c', 'article': 'News.', 'title': 'T'}
  path = write(tmp_path / 'batch3.json', [pair, {**pair, 'info': article}])
  first, second = importers.FORMATS['summarize_feedback'](path).comparisons
  prompt = 'SUBREDDIT: r/pets\n\nTITLE: Cat\n\nPOST: Meow.\n\nTL;DR:'
  assert (first.prompt, first.completions) == (prompt, (' a', ' b'))
  assert (first.ranks, first.labeler) == ((2, 1), 'w7')
  assert first.metadata['extra'] == {'confidence': 8}
  assert second.prompt == 'Article: T\n\nNews.\n\nTL;DR:'
  for extra in (None, {'confidence': float('nan'), 'note': ['x']}):
    path = write(tmp_path / 'batch4.json', [{**pair, 'extra': extra}])
    (row,) = importers.FORMATS['summarize_feedback'](path).comparisons
    assert row.metadata['extra'] == {}
  rated = {k: pair[k] for k in ('info', 'worker')} | {'summary': {'text': 'a'}}
  with pytest.raises(records.RecordError, match="axis.json:1: .*'summaries'"):
    importers.FORMATS['summarize_feedback'](
      write(tmp_path / 'axis.json', [rated])
    )

  path = write(tmp_path / 'train.jsonl', [{**post, 'summary': 'A cat.'}])
  (demonstration,) = importers.FORMATS['tldr'](path).demonstrations
  assert (demonstration.prompt, demonstration.response) == (prompt, ' A cat.')


def test_six_preferences_make_a_ranking(tmp_path):
  entry = {
    'question': 'Who?',
    'passages': [['Title', 'First.', 'Second.']],
    'gold': 'Me.',
    'preference': [1, 1, 0, 1, 2, 2],
    'feedback': {},
    **{f'prediction {i}': f'p{i}' for i in (1, 2, 3, 4)},
  }
  path = write(tmp_path / 'dev.json', [entry], as_list=True)
  found = importers.FORMATS['qa_feedback'](path)
  (ranked,) = found.comparisons
  # 1 beats 2, 3 and ties 4: 2.5. 2 beats 3, loses to 4: 1. 3 loses all: 0.
  # 4 ties 1, beats 2 and 3: 2.5.
  assert ranked.scores == (2.5, 1.0, 0.0, 2.5)
  assert ranked.ranks == (1, 2, 3, 1)
  assert ranked.prompt == 'First. Second.\n\nWho?\n\n'
  assert found.demonstrations[0].response == 'Me.'
  write(path, [{**entry, 'preference': [1]}], as_list=True)
  with pytest.raises(records.RecordError, match=r'dev.json:1: preference \[1'):
    importers.FORMATS['qa_feedback'](path)


def pairs(found):
  return [(d.prompt, d.response) for d in found.demonstrations]


def test_instructions(tmp_path):
  dolly = {
    'instruction': 'Name it.',
    'context': 'A bird.',
    'response': 'Owl.\n',
    'category': 'closed_qa',
  }
  path = write(
    tmp_path / 'dolly.jsonl',
    [
      dolly,
      {**dolly, 'context': ''},
      {'prompt': 'P:', 'response': 'r'},
      {**dolly, 'response': ' '},
    ],
  )
  found = importers.FORMATS['dolly'](path)
  assert pairs(found) == [
    ('Name it.\n\nA bird.\n\n', 'Owl.'),
    ('Name it.\n\n', 'Owl.'),
    ('P:', 'r'),
  ]
  assert found.demonstrations[0].category == 'closed_qa'
  assert found.skipped == {'instruction or answer is empty': 1}

  alpaca = [
    {'instruction': 'Add.', 'input': '1 2', 'output': '3'},
    {'instruction': 'Sing.', 'input': '', 'output': 'La'},
  ]
  for as_list in (True, False):
    path = write(tmp_path / 'alpaca.json', alpaca, as_list)
    assert pairs(importers.FORMATS['alpaca'](path)) == [
      ('Add.\n\n1 2\n\n', '3'),
      ('Sing.\n\n', 'La'),
    ]

  task = {
    'id': 'seed_task_1',
    'instruction': 'Add.',
    'instances': [{'input': '1 2', 'output': '3'}],
    'is_classification': True,
  }
  found = importers.FORMATS['self_instruct'](
    write(tmp_path / 's.jsonl', [task])
  )
  assert pairs(found) == [('Add.\n\n1 2\n\n', '3')]
  assert found.demonstrations[0].category == 'classification'

  first = {
    'Title': 'Sums',
    'Definition': 'Add.',
    'Instances': [{'input': '1 2', 'output': ['3', 'three']}],
  }
  second = {
    'Definition': ['Add.', 'Then stop.'],
    'Categories': ['Mathematics'],
    'Instances': [{'id': 'task1-0', 'input': '1 2', 'output': ['3']}],
  }
  path = tmp_path / 'task.json'
  path.write_text(json.dumps(first))
  found = importers.FORMATS['natural_instructions'](path)
  assert pairs(found) == [('Add.\n\n1 2\n\n', '3')]
  path.write_text(json.dumps(second))
  found = importers.FORMATS['natural_instructions'](path)
  assert pairs(found) == [('Add.\nThen stop.\n\n1 2\n\n', '3')]
  assert found.demonstrations[0].category == 'Mathematics'
  assert found.demonstrations[0].id == 'task1-0'


def test_another_format_is_named_with_its_line(tmp_path):
  path = write(tmp_path / 'a.jsonl', [{'instruction': 'x', 'output': 'y'}])
  with pytest.raises(records.RecordError, match=r"a.jsonl:1: field 'chosen' i"):
    importers.FORMATS['hh'](path)
  path = write(tmp_path / 'b.json', [{'instruction': 1, 'output': ''}], True)
  with pytest.raises(
    records.RecordError, match=r"b.json:1: 'instruction' is a"
  ):
    importers.FORMATS['alpaca'](path)
  path.write_text('[')
  with pytest.raises(records.RecordError, match=r'b.json: not JSON'):
    importers.FORMATS['alpaca'](path)
  path.write_text('[]')
  with pytest.raises(records.RecordError, match=r'b.json: holds no entries'):
    importers.FORMATS['alpaca'](path)


def test_the_command_splits_by_prompt(tmp_path, capsys):
  rows = [
    {
      'chosen': dialogue(f'Q{i // 2}', f'yes {i}'),
      'rejected': dialogue(f'Q{i // 2}', 'no'),
    }
    for i in range(400)
  ]
  path = write(tmp_path / 'a.jsonl', rows)
  out = tmp_path / 'out'
  command = ['hh', str(path), '--output', str(out), '--valid', '0.25']
  assert convert.main(command) == 0
  assert 'comparisons_valid: ' in capsys.readouterr().out
  splits = {
    split: records.read_jsonl(
      out / f'comparisons_{split}.jsonl', records.Comparison
    )
    for split in ('train', 'valid')
  }
  assert sum(map(len, splits.values())) == 400
  train, valid = ({c.prompt for c in rows} for rows in splits.values())
  assert not train & valid
  # 200 prompts: 50 expected, with a standard deviation of 6.
  assert 25 < len(valid) < 75
  prompts = records.read_jsonl(out / 'prompts_valid.jsonl', records.Prompt)
  assert {p.text for p in prompts} == valid
  assert prompts[0].turns[0].role == 'user'
  assert convert.main(['tsv', str(path), '--output', str(out)]) == 1
  assert "format 'tsv'; known: hh, oasst" in capsys.readouterr().err
  assert convert.main([*command[:-1], '1.5']) == 1
  assert 'valid is 1.5' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('name', 'file', 'num_comparisons', 'num_demonstrations'),
  [
    # 4,000 rows; SOURCE.md counts rows, and one pair is the same text twice.
    ('hh', 'hh_helpful/train_gt.jsonl.gz', 3999, 3999),
    ('hh', 'hh_harmless/harmless_train_gt.jsonl.gz', 4000, None),
    # 63 trees with 132 ranked prompts; 4 of 158 best answers are synthetic.
    ('oasst', 'oasst_trees/en_trees.jsonl.gz', 132, 154),
    ('qa_feedback', 'qa_feedback/qa_feedback.json.gz', 350, 350),
    ('dolly', 'dolly/dolly_6400.jsonl.gz', 0, 6400),
    ('dolly', 'dolly/dolly_hhrlhf_train_small.jsonl.gz', 0, 1000),
    ('self_instruct', 'self_instruct/seed_tasks.jsonl.gz', 0, 175),
    (
      'natural_instructions',
      'natural_instructions_v1/'
      'subtask047_misc_answering_science_questions.json.gz',
      0,
      251,
    ),
  ],
)
def test_real_files(data_root, name, file, num_comparisons, num_demonstrations):
  found = importers.FORMATS[name](data_root / file)
  assert len(found.comparisons) == num_comparisons
  if num_demonstrations is not None:
    assert len(found.demonstrations) == num_demonstrations
  for row in (*found.comparisons, *found.demonstrations):
    assert not records.problems(records.to_values(row), type(row))
  if name == 'oasst':
    assert {len(c.ranks) for c in found.comparisons} <= set(range(2, 10))


# --- What is no text, no key, no labeler --------------------------------------

ABOUT = {'id': 'c', 'subreddit': 'pets', 'title': 'Cat', 'post': 'Meow.'}
FORMATS = {
  'hh': {'chosen': dialogue('Q', 'yes'), 'rejected': dialogue('Q', 'no')},
  'oasst': {
    'message_tree_id': 't',
    'prompt': message(
      'prompter',
      'hello',
      message('assistant', 'hi', rank=0),
      message('assistant', 'no', rank=1),
    ),
  },
  'summarize_feedback': {
    'info': ABOUT,
    'summaries': [{'text': 'a', 'policy': 'p'}, {'text': 'b', 'policy': 'q'}],
    'choice': 1,
    'worker': 'w',
  },
  'tldr': {**ABOUT, 'summary': 'A cat.'},
  'qa_feedback': {
    'question': 'Who?',
    'passages': [['Title', 'First.']],
    'gold': 'Me.',
    'preference': [1, 1, 0, 1, 2, 2],
    **{f'prediction {i}': f'p{i}' for i in (1, 2, 3, 4)},
  },
  'dolly': {
    'instruction': 'Name it.',
    'context': 'A bird.',
    'response': 'Owl.',
  },
  'self_instruct': {
    'id': 's',
    'instruction': 'Add.',
    'instances': [{'input': '1 2', 'output': '3'}],
  },
  'alpaca': {'instruction': 'Add.', 'input': '1 2', 'output': '3'},
  'natural_instructions': {
    'Definition': ['Add.'],
    'Instances': [{'id': 'i', 'input': '1 2', 'output': ['3']}],
  },
}
# The others as the table shows them, if they are objects.
for _name, _form in importers.FORMATS.items():
  if not isinstance(_form.example[0], str):
    FORMATS.setdefault(_name, _form.example[0])


def at(values, place):
  for key in place:
    values = values[key]
  return values


def changed(name, place, *value):
  """A format's example with one value changed, or without it."""
  values = copy.deepcopy(FORMATS[name])
  if value:
    at(values, place[:-1])[place[-1]] = value[0]
  else:
    del at(values, place[:-1])[place[-1]]
  return values


def import_one(tmp_path, name, values, *flags):
  """(exit code, texts of what was written) of one example after a good one."""
  if name == 'natural_instructions':
    path = tmp_path / 'file.json'
    path.write_text(json.dumps(values))
  else:
    path = write(tmp_path / 'file.jsonl', [FORMATS[name], values])
  command = [name, str(path), f'--output={tmp_path / "out"}', *flags]
  code = convert.main([*command, '--valid=0.0001', '--replace'])
  rows = [
    json.loads(line)
    for path in sorted((tmp_path / 'out').glob('*.jsonl'))
    for line in path.read_text().splitlines()
  ]
  return code, rows


@pytest.mark.parametrize(
  ('name', 'place', 'expected'),
  [
    ('hh', ('chosen',), 'skipped: not a dialogue'),
    ('oasst', ('prompt', 'text'), 'skipped: unknown role or empty text'),
    ('oasst', ('prompt', 'replies', 1, 'text'), 'skipped: fewer than two ran'),
    ('oasst', ('prompt', 'replies', 0, 'rank'), 'skipped: fewer than two ran'),
    ('oasst', ('prompt', 'replies'), ''),
    ('summarize_feedback', ('info', 'title'), 'TITLE: \n\nPOST'),
    ('summarize_feedback', ('info', 'post'), 'skipped: the post is empty'),
    ('summarize_feedback', ('summaries', 0, 'policy'), ''),
    (
      'summarize_feedback',
      ('summaries', 0, 'text'),
      'skipped: an answer is mi',
    ),
    ('summarize_feedback', ('choice',), 'skipped: no choice was made'),
    ('summarize_feedback', ('worker',), ''),
    ('tldr', ('title',), 'TITLE: \n\nPOST'),
    ('tldr', ('summary',), 'skipped: the summary or the post is empty'),
    ('qa_feedback', ('passages', 0, 1), ''),
    ('qa_feedback', ('question',), 'skipped: the question is empty'),
    ('qa_feedback', ('gold',), 'skipped: no demonstration: the gold'),
    ('qa_feedback', ('prediction 2',), 'skipped: an answer is missing (null)'),
    ('dolly', ('context',), '"Name it.\\n\\n"'),
    ('dolly', ('response',), 'skipped: instruction or answer is empty'),
    ('self_instruct', ('instances', 0, 'input'), '"Add.\\n\\n"'),
    ('self_instruct', ('instances',), 'skipped: a task without instances'),
    ('alpaca', ('input',), '"Add.\\n\\n"'),
    ('alpaca', ('output',), 'skipped: instruction or answer is empty'),
    ('natural_instructions', ('Instances', 0, 'input'), '"Add.\\n\\n"'),
    ('natural_instructions', ('Definition', 0), '"1 2\\n\\n"'),
    ('natural_instructions', ('Instances', 0, 'output', 0), 'nothing is left'),
  ],
)
@pytest.mark.parametrize('null', [None, float('nan')])
def test_null_is_never_a_word(name, place, expected, null, tmp_path, capsys):
  code, rows = import_one(tmp_path, name, changed(name, place, null))
  captured = capsys.readouterr()
  said = captured.out + captured.err + json.dumps(rows)
  # JSON spells line breaks with a backslash.
  assert expected in said or json.dumps(expected)[1:-1] in said
  assert code == (1 if 'nothing is left' in expected else 0)
  for text in ('None', 'nan', 'NaN', 'null'):
    assert text not in json.dumps(rows)


@pytest.mark.parametrize(
  ('name', 'place', 'expected'),
  [
    ('oasst', ('prompt', 'text'), 'unknown role or empty text'),
    ('summarize_feedback', ('info', 'post'), 'the post is empty'),
    ('tldr', ('summary',), 'the summary or the post is empty'),
    ('qa_feedback', ('question',), 'the question is empty'),
    ('qa_feedback', ('gold',), 'no demonstration: the gold answer is empty'),
    ('dolly', ('response',), 'instruction or answer is empty'),
    ('alpaca', ('output',), 'instruction or answer is empty'),
  ],
)
def test_a_text_that_cannot_be_seen_is_empty(
  name, place, expected, tmp_path, capsys
):
  code, _ = import_one(tmp_path, name, changed(name, place, ' \u2800\u200b'))
  assert code == 0
  assert f'skipped: {expected}' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('name', 'place'),
  [
    ('hh', ('rejected',)),
    ('oasst', ('prompt', 'role')),
    ('oasst', ('prompt', 'replies', 0, 'text')),
    ('summarize_feedback', ('summaries', 1, 'text')),
    ('summarize_feedback', ('info', 'subreddit')),
    ('tldr', ('post',)),
    ('qa_feedback', ('prediction 3',)),
    ('dolly', ('response',)),
    ('self_instruct', ('instances', 0, 'input')),
    ('self_instruct', ('instances', 0, 'output')),
    ('alpaca', ('output',)),
    ('natural_instructions', ('Instances', 0, 'output')),
    ('natural_instructions', ('Instances', 0, 'input')),
    ('natural_instructions', ('Definition',)),
  ],
)
@pytest.mark.parametrize('value', [(), ({'a': 1},), ('\ud800',), (7,)])
def test_a_missing_or_wrong_key_is_named(name, place, value, tmp_path, capsys):
  code, rows = import_one(tmp_path, name, changed(name, place, *value))
  error = capsys.readouterr().err
  assert code == 1 and not rows
  assert error.count('\n') == 1 and place[-1] in error
  where = 'file.json' if name == 'natural_instructions' else 'file.jsonl:2'
  assert f'{where}: ' in error
  if len(place) > 2:
    # Which of the objects below it is, as well.
    assert any(part in error for part in (f'{place[-3]}[{place[-2]}]', 'id-'))
  if not value:
    assert 'is missing (found ' in error


@pytest.mark.parametrize('name', FORMATS)
def test_whatever_a_file_holds_the_answer_is_a_record_or_a_line(
  name, tmp_path, capsys
):
  """Values are replaced and keys removed at random."""
  draw = random.Random(name)
  junk = [None, float('nan'), 3, True, '', ' ', '\ud800', [], {}, [None], [[]]]

  def places_of(values):
    found, left = [], [()]
    while left:
      place = left.pop()
      value = at(values, place)
      if isinstance(value, dict | list):
        keys = value if isinstance(value, dict) else range(len(value))
        left += [(*place, key) for key in keys]
      found.append(place)
    return found[1:]

  for _ in range(40):
    values = copy.deepcopy(FORMATS[name])
    for _ in range(draw.choice((1, 2))):
      place = draw.choice(places_of(values))
      if draw.random() < 0.3:
        del at(values, place[:-1])[place[-1]]
      else:
        at(values, place[:-1])[place[-1]] = copy.deepcopy(draw.choice(junk))
    code, rows = import_one(tmp_path, name, values)
    error = capsys.readouterr().err
    assert code in (0, 1), values
    assert code == 0 or (error.count('\n') == 1 and 'file.json' in error), error
    assert 'None' not in json.dumps(rows), values


@pytest.mark.parametrize(
  'spelt',
  ['', '<noinput>', 'No input', 'N/A', None, 'None', 'no input required.']
  + ['<No Input>', 'n/a', 'NOINPUT', '(no input needed)', 'Not applicable']
  + ['"none"', 'No input is necessary', 'null', 'N.A.'],
)
def test_an_input_that_says_that_there_is_none(spelt, tmp_path, capsys):
  for name, place in (
    ('alpaca', ('input',)),
    ('dolly', ('context',)),
    ('self_instruct', ('instances', 0, 'input')),
  ):
    code, rows = import_one(tmp_path, name, changed(name, place, spelt))
    assert code == 0
    instruction = FORMATS[name]['instruction']
    assert f'{instruction}\n\n' in [row.get('prompt') for row in rows]


@pytest.mark.parametrize('given', ['Na', 'nancy', 'No inputs were lost', '-5'])
def test_an_input_is_kept(given, tmp_path):
  _, rows = import_one(tmp_path, 'alpaca', changed('alpaca', ('input',), given))
  assert f'Add.\n\n{given}\n\n' in [row.get('prompt') for row in rows]


PREDICTION = {
  'prompt': 'Add.\nInput: 1 2\nOutput:',
  'instruction': 'Add.',
  'input': '1 2',
  'response': ' 4',
  'target': '3',
}


@pytest.mark.parametrize(
  ('name', 'values', 'labeler'),
  [
    (
      'alpaca',
      {'instruction': 'Sing.', 'output': 'La', 'generator': 'text_davinci_003'},
      'model:text_davinci_003',
    ),
    ('dolly', PREDICTION, 'model:unnamed'),
    (
      'self_instruct',
      {**FORMATS['self_instruct'], 'instance_metadata': {'finish': 'stop'}},
      'model:unnamed',
    ),
    (
      'oasst',
      {
        'prompt': message(
          'prompter',
          'bye',
          message('assistant', 'hi', rank=0, synthetic=True, model_name='m'),
          message('assistant', 'no', rank=1, synthetic=False),
        )
      },
      'model:m',
    ),
  ],
)
def test_what_models_wrote_is_no_demonstration(
  name, values, labeler, tmp_path, capsys
):
  code, rows = import_one(tmp_path, name, values)
  assert code == 0
  assert [row['labeler'] for row in rows if row.get('labeler')] == []
  said = capsys.readouterr().out
  assert 'skipped: demonstrations that models wrote' in said
  assert '--model_outputs keeps them: 1\n' in said
  # The prompt is still somebody's, and comparisons are of models anyway.
  assert 'prompts_train: 2\n' in said or name == 'self_instruct'
  code, rows = import_one(tmp_path, name, values, '--model_outputs')
  assert code == 0
  assert [r['labeler'] for r in rows if r.get('labeler')] == [labeler]


def test_a_person_may_be_named_as_generator(tmp_path, capsys):
  values = {**FORMATS['alpaca'], 'output': 'three', 'generator': 'Human'}
  _, rows = import_one(tmp_path, 'alpaca', values)
  assert 'models' not in capsys.readouterr().out
  assert 'three' in [row.get('response') for row in rows]


def test_hh_says_who_wrote_its_demonstrations(tmp_path, capsys):
  import_one(tmp_path, 'hh', FORMATS['hh'])
  assert 'models wrote them, people chose' in capsys.readouterr().err


def test_a_comparison_of_an_answer_with_itself_is_counted(tmp_path, capsys):
  row = {'prompt': 'Q?', 'completions': ['a', 'a', 'b'], 'ranks': [1, 2, 2]}
  rows = [
    row,
    {**row, 'ranks': [1, 1, 2]},
    # The first ended, and the second was cut.
    {**row, 'ended': [True, False, True]},
  ]
  path = write(tmp_path / 'file.jsonl', rows)
  command = ['comparisons', str(path), f'--output={tmp_path / "out"}']
  assert convert.main([*command, '--valid=0.0001']) == 0
  out = capsys.readouterr().out
  assert 'comparisons_train: 3\n' in out
  assert 'kept: a comparison that prefers an answer to itself: 1\n' in out


def test_copies_are_counted(tmp_path, capsys):
  texts = [unicodedata.normalize(f, 'Café?') for f in ('NFC', 'NFD', 'NFC')]
  rows = [{**FORMATS['alpaca'], 'instruction': text} for text in texts]
  path = write(tmp_path / 'a.json', [*rows, {**rows[0], 'output': '4'}], True)
  out = [f'--output={tmp_path / "out"}', '--valid=0.0001']
  assert convert.main(['alpaca', str(path), *out]) == 0
  said = capsys.readouterr().out
  # Of four demonstrations two are the first again; all ask one question.
  assert 'demonstrations_train: 2\n' in said and 'prompts_train: 1\n' in said
  assert 'skipped: the same demonstration again: 2\n' in said
  assert 'skipped: the same prompt again, in prompts: 3\n' in said
  path = write(tmp_path / 'a.jsonl', [FORMATS['hh']] * 3)
  out[0] = f'--output={tmp_path / "hh"}'
  assert convert.main(['hh', str(path), *out]) == 0
  said = capsys.readouterr().out
  assert 'comparisons_train: 3\n' in said
  assert 'kept: the same comparison again: 2\n' in said
  assert convert.main(['hh', str(path), str(path), *out]) == 1
  assert 'a.jsonl is given 2 times' in capsys.readouterr().err


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('name', FORMATS)
def test_a_byte_order_mark_is_read_in_every_format(
  name, packed, tmp_path, capsys
):
  text = json.dumps(FORMATS[name])
  contents = [text] if name == 'natural_instructions' else [text, f'[{text}]']
  found = []
  for content, mark in itertools.product(contents, (b'', codecs.BOM_UTF8)):
    path = tmp_path / ('a.json.gz' if packed else 'a.json')
    content = mark + content.encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    found.append(importers.FORMATS[name](path))
  assert all(other == found[0] for other in found)
  path.write_bytes(text.encode('utf-16'))
  code = convert.main([name, str(path), f'--output={tmp_path / "out"}'])
  error = capsys.readouterr().err
  assert code == 1 and error.count('\n') == 1
  assert ('not a whole gzip' if packed else 'is UTF-16') in error


# --- Splits -------------------------------------------------------------------


def read_splits(folder):
  """(split, conversation, all texts) of every row in a folder."""
  types = {
    'comparisons': records.Comparison,
    'demonstrations': records.Demonstration,
    'prompts': records.Prompt,
  }
  for path in sorted(folder.glob('*.jsonl')):
    kind, _, split = path.stem.rpartition('_')
    for row in records.read_jsonl(path, types[kind]):
      yield split, row


def check_no_opening_is_in_two_splits(folder, least):
  splits = {}
  for split, row in read_splits(folder):
    splits.setdefault(records.opening(row), set()).add(split)
  assert all(len(found) == 1 for found in splits.values())
  sizes = [sum(s == {name} for s in splits.values()) for name in splits_names]
  assert min(sizes) >= least


splits_names = ('train', 'valid')


def tree(number, text=None, tree_id=None):
  again = message(
    'prompter',
    f'And bird {number} at night?',
    message('assistant', f'It sleeps {number}.', rank=0),
    message('assistant', f'It hunts {number}.', rank=1),
  )
  return {
    'message_tree_id': tree_id or f't{number}',
    'prompt': message(
      'prompter',
      text or f'Where does bird {number} live?',
      message('assistant', f'In oak {number}.', again, rank=0),
      message('assistant', f'Under roof {number}.', rank=1),
    ),
  }


def test_a_tree_is_in_one_split(tmp_path):
  trees = [tree(i) for i in range(60)]
  # Other trees with the same root: other accents, case, spaces.
  trees += [
    tree(i, f'WHERE  does bird {i} live?\n', f'u{i}') for i in range(60)
  ]
  path = write(tmp_path / 'trees.jsonl', trees)
  out = tmp_path / 'out'
  command = ['oasst', str(path), f'--output={out}', '--valid=0.2']
  assert convert.main(command) == 0
  check_no_opening_is_in_two_splits(out, 4)
  of_bird = {}
  for split, row in read_splits(out):
    text = row.text if isinstance(row, records.Prompt) else row.prompt
    bird = text.split('ird ')[1].split()[0]
    of_bird.setdefault(bird, set()).add(split)
  assert len(of_bird) == 60
  assert all(len(splits) == 1 for splits in of_bird.values())


def test_single_and_several_turns_of_one_opening(tmp_path):
  single = [
    {
      'chosen': dialogue(f'Why {i}?', f'yes {i}'),
      'rejected': dialogue(f'Why {i}?', 'no'),
    }
    for i in range(100)
  ]
  several = [
    {
      'chosen': dialogue(f'Why {i}?', 'What?', 'Tell me', f'yes {i}'),
      'rejected': dialogue(f'Why {i}?', 'What?', 'Tell me', 'no'),
    }
    for i in range(100)
  ]
  paths = [
    str(write(tmp_path / 'single.jsonl', single)),
    str(write(tmp_path / 'several.jsonl', several)),
  ]
  out = tmp_path / 'out'
  assert convert.main(['hh', *paths, f'--output={out}', '--valid=0.2']) == 0
  check_no_opening_is_in_two_splits(out, 8)
  # Nor in conversions of other formats with the same seed and share: the
  # instruction is the same question.
  rows = [{'instruction': f'why  {i}?', 'output': 'x'} for i in range(100)]
  path = write(tmp_path / 'alpaca.json', rows, True)
  other = tmp_path / 'other'
  command = ['alpaca', str(path), f'--output={other}', '--valid=0.2']
  assert convert.main(command) == 0
  split_of = {records.opening(row): split for split, row in read_splits(out)}
  for split, row in read_splits(other):
    assert split_of[records.opening(row)] == split


def test_our_own_files_are_split_by_opening_too(tmp_path):
  """Turns, the same dialogue as text, and the question alone."""
  rows = []
  for i in range(60):
    asked = (records.Turn('user', f'Über {i}?'),)
    more = (
      *asked,
      records.Turn('assistant', 'Ja.'),
      records.Turn('user', 'So?'),
    )
    for turns in (asked, more):
      text = records.text_of_turns(turns)
      rows.append(records.Demonstration(text, 'a', turns=turns))
      rows.append(records.Demonstration(f'Be brief.{text}', 'b'))
    text = unicodedata.normalize('NFD', f'ÜBER {i}?\n')
    rows.append(records.Demonstration(text, 'c'))
  records.write_jsonl(tmp_path / 'a.jsonl', rows)
  out = tmp_path / 'out'
  command = ['demonstrations', str(tmp_path / 'a.jsonl'), f'--output={out}']
  assert convert.main([*command, '--valid=0.2']) == 0
  check_no_opening_is_in_two_splits(out, 4)
  assert sum(1 for _ in read_splits(out)) == len(rows)


def test_real_trees_do_not_leak(data_root, tmp_path):
  path = data_root / 'oasst_trees' / 'en_trees.jsonl.gz'
  out = tmp_path / 'out'
  command = ['oasst', str(path), f'--output={out}', '--valid=0.2']
  assert convert.main(command) == 0
  check_no_opening_is_in_two_splits(out, 5)
  texts = {name: [] for name in splits_names}
  answers = {name: [] for name in splits_names}
  for split, row in read_splits(out):
    if isinstance(row, records.Comparison):
      texts[split].append(row.prompt)
      answers[split] += [row.prompt + text for text in row.completions]
  for one, other in (splits_names, splits_names[::-1]):
    assert not any(a in text for a in answers[one] for text in texts[other])
