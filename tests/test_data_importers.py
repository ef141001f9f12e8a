"""Published formats: by hand, as upstream writes them, and the real files."""

import gzip
import json

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
  found = importers.read_hh(path)
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
  found = importers.read_oasst(path)
  (ranked,) = found.comparisons
  assert ranked.prompt == dialogue('hello', 'hi', 'more') + '\n\nAssistant:'
  assert ranked.completions == (' m0', ' m0b', ' m1')
  assert (ranked.ranks, ranked.id) == ((1, 1, 2), 'oasst:id-more')
  assert [d.response for d in found.demonstrations] == [' hi', ' m0']
  assert found.demonstrations[0].user == 'u1'
  assert found.skipped == {
    'fewer than two ranked replies': 1,
    'deleted or failed review': 2,
  }
  write(path, [{'prompt': {'role': 'prompter'}}])
  with pytest.raises(records.RecordError, match=r'trees.jsonl:1: tree 1 is no'):
    importers.read_oasst(path)


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
  first, second = importers.read_summarize_feedback(path).comparisons
  prompt = 'SUBREDDIT: r/pets\n\nTITLE: Cat\n\nPOST: Meow.\n\nTL;DR:'
  assert (first.prompt, first.completions) == (prompt, (' a', ' b'))
  assert (first.ranks, first.labeler) == ((2, 1), 'w7')
  assert first.metadata['extra'] == {'confidence': 8}
  assert second.prompt == 'Article: T\n\nNews.\n\nTL;DR:'
  rated = {k: pair[k] for k in ('info', 'worker')} | {'summary': {'text': 'a'}}
  with pytest.raises(records.RecordError, match="axis.json:1: .*'summaries'"):
    importers.read_summarize_feedback(write(tmp_path / 'axis.json', [rated]))

  path = write(tmp_path / 'train.jsonl', [{**post, 'summary': 'A cat.'}])
  (demonstration,) = importers.read_tldr(path).demonstrations
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
  found = importers.read_qa_feedback(path)
  (ranked,) = found.comparisons
  # 1 beats 2, 3 and ties 4: 2.5. 2 beats 3, loses to 4: 1. 3 loses all: 0.
  # 4 ties 1, beats 2 and 3: 2.5.
  assert ranked.scores == (2.5, 1.0, 0.0, 2.5)
  assert ranked.ranks == (1, 2, 3, 1)
  assert ranked.prompt == 'First. Second.\n\nWho?\n\n'
  assert found.demonstrations[0].response == 'Me.'
  write(path, [{**entry, 'preference': [1]}], as_list=True)
  with pytest.raises(records.RecordError, match=r'dev.json:1: preference \[1'):
    importers.read_qa_feedback(path)


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
  found = importers.read_dolly(path)
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
    assert pairs(importers.read_alpaca(path)) == [
      ('Add.\n\n1 2\n\n', '3'),
      ('Sing.\n\n', 'La'),
    ]

  task = {
    'id': 'seed_task_1',
    'instruction': 'Add.',
    'instances': [{'input': '1 2', 'output': '3'}],
    'is_classification': True,
  }
  found = importers.read_self_instruct(write(tmp_path / 's.jsonl', [task]))
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
  found = importers.read_natural_instructions(path)
  assert pairs(found) == [('Add.\n\n1 2\n\n', '3')]
  path.write_text(json.dumps(second))
  found = importers.read_natural_instructions(path)
  assert pairs(found) == [('Add.\nThen stop.\n\n1 2\n\n', '3')]
  assert found.demonstrations[0].category == 'Mathematics'
  assert found.demonstrations[0].id == 'task1-0'


def test_another_format_is_named_with_its_line(tmp_path):
  path = write(tmp_path / 'a.jsonl', [{'instruction': 'x', 'output': 'y'}])
  with pytest.raises(records.RecordError, match=r"a.jsonl:1: field 'chosen' i"):
    importers.read_hh(path)
  path = write(tmp_path / 'b.json', [{'instruction': 1, 'output': ''}], True)
  with pytest.raises(
    records.RecordError, match=r"b.json:1: 'instruction' is a"
  ):
    importers.read_alpaca(path)
  path.write_text('[')
  with pytest.raises(records.RecordError, match=r'b.json: not JSON'):
    importers.read_alpaca(path)
  path.write_text('[]')
  with pytest.raises(records.RecordError, match=r'b.json: holds no entries'):
    importers.read_alpaca(path)


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
    # 63 trees with 132 ranked prompts.
    ('oasst', 'oasst_trees/en_trees.jsonl.gz', 132, 158),
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
