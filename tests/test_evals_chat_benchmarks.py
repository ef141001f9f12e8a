"""Judged benchmarks: upstream's files, replies, and figures by hand."""

import json
import math
import re

import numpy as np
import pytest
import scipy.optimize

from instruct_jax.data import records
from instruct_jax.evals import chat_benchmarks as bench

ALPACA = """<|im_start|>system
You compare.
<|im_end|>
<|im_start|>user
Asked: {instruction}
m: {output_1}
M: {output_2} as {"json": 1}
<|im_end|>
"""


def lines(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def reply(text, tops=None):
  choice = {'message': {'role': 'assistant', 'content': text}}
  if tops is not None:
    top = [{'token': k, 'logprob': math.log(p)} for k, p in tops.items()]
    choice['logprobs'] = {'content': [{'top_logprobs': top}]}
  return {'choices': [choice]}


# --- AlpacaEval ---------------------------------------------------------------


def alpaca_files(folder, number=3):
  rows = [
    {'instruction': f'Do {i}.', 'output': 'x' * (i + 1), 'generator': 'gpt4'}
    for i in range(number)
  ]
  path = folder / 'questions.json'
  path.write_text(json.dumps(rows))
  (folder / 'layout.txt').write_text(ALPACA)
  questions = bench.read_questions('alpaca_eval', path)
  layout = bench.read_layout('alpaca_eval', folder / 'layout.txt')
  return path, questions, layout


def test_alpaca_answers_go_round_and_either_place_is_undone(tmp_path):
  path, questions, layout = alpaca_files(tmp_path, 40)
  baseline = bench.read_answers('alpaca_eval', path, questions)
  assert baseline[2] == ('xxx',)
  answers = {q.id: (f'mine {{output_1}} {q.id}',) for q in questions}
  rows = bench.answer_rows('alpaca_eval', 'mine', questions, answers)
  (tmp_path / 'mine.json').write_text(json.dumps(rows))
  assert rows[0]['generator'] == 'mine'
  again = bench.read_answers('alpaca_eval', tmp_path / 'mine.json', questions)
  assert again == answers
  requests = bench.alpaca_requests(
    layout, 'mine', questions, answers, baseline, 0
  )
  swapped = [request.is_swapped for request in requests]
  assert 8 < sum(swapped) < 32
  for request in requests:
    system, user = request.messages
    assert system == {'role': 'system', 'content': 'You compare.'}
    first, second = user['content'].split('m: ')[1].split('\nM: ')
    ours = first if request.is_swapped else second
    # What an answer spells is not filled in.
    assert ours.startswith('mine {output_1}')
    assert user['content'].endswith('as {"json": 1}')
  # A judge that always takes the first output.
  values = [1.0] * len(requests)
  rows = bench.alpaca_rows(requests, values, ['m'] * 40, 'gpt4', 'judge')
  assert [row['preference'] for row in rows] == [
    2.0 if each else 1.0 for each in swapped
  ]
  assert set(rows[0]) == {
    *('instruction', 'output_1', 'output_2', 'generator_1', 'generator_2'),
    *('dataset', 'annotator', 'preference', 'raw_completion'),
  }
  found = bench.measure_alpaca(requests, rows, None, 100)
  assert found['win rate'].mean == pytest.approx(np.mean(swapped))
  assert found['unread'] == 0


@pytest.mark.parametrize(
  ('given', 'preference'),
  [
    # P(m) of the two is 0.2 / 0.8: 2 - 0.25.
    (reply('M', {'m': 0.2, 'M': 0.6, 'x': 0.2}), 1.75),
    (reply('M', {'M': 0.9}), 2.0),
    (reply('m', {'x': 0.9}), 1.0),  # Neither is among the likeliest.
    (reply('m'), 1.0),
    (reply('<think>m or M? m</think>I take M.'), 2.0),
    # The first token is one of the reasoning.
    (reply('<think>m?</think>M', {'<think>': 0.9, 'm': 0.09, 'M': 0.01}), 2.0),
  ],
)
def test_alpaca_preferences(given, preference):
  assert bench.read_alpaca(given) == pytest.approx(preference)


def test_an_instruction_that_is_asked_twice_has_two_answers(tmp_path):
  rows = [
    {'instruction': text, 'output': output, 'generator': 'g'}
    for text, output in (('Do.', 'a'), ('Else.', 'b'), ('Do.', 'c'))
  ]
  path = tmp_path / 'x.json'
  path.write_text(json.dumps(rows))
  questions = bench.read_questions('alpaca_eval', path)
  found = bench.read_answers('alpaca_eval', path, questions)
  assert found == {0: ('a',), 1: ('b',), 2: ('c',)}
  path.write_text(json.dumps(rows[:0:-1]))  # In another order.
  found = bench.read_answers('alpaca_eval', path, questions[1:])
  assert found == {1: ('b',), 2: ('c',)}


def test_an_unread_preference_counts_nowhere(tmp_path):
  _, questions, layout = alpaca_files(tmp_path, 2)
  answers = {q.id: ('a',) for q in questions}
  requests = bench.alpaca_requests(layout, 'a', questions, answers, answers, 0)
  rows = bench.alpaca_rows(requests, [None, 1.0], ['', 'm'], 'b', 'j')
  found = bench.measure_alpaca(requests, rows, None, 10)
  assert found['unread'] == 1 and found['win rate'].mean in (0.0, 1.0)
  with pytest.raises(ValueError, match='neither m nor M'):
    bench.read_alpaca(reply('both'))


def loss_of(theta, design, y, weights, strength):
  """|θ|₁ + C Σ w log loss, row by row."""
  total = sum(map(abs, theta))
  for row, target, weight in zip(design, y, weights, strict=True):
    p = 1 / (1 + math.exp(-sum(a * b for a, b in zip(row, theta, strict=True))))
    total -= (
      strength
      * weight
      * (target * math.log(p) + (1 - target) * math.log(1 - p))
    )
  return total


@pytest.mark.parametrize('strength', [0.05, 1.0, 100.0])
def test_the_lasso_is_the_minimum(rng, strength):
  design = rng.normal(size=(40, 3))
  y, weights = rng.uniform(size=40), rng.uniform(size=40)
  found = bench.fit_lasso(design, y, weights, strength)
  expected = scipy.optimize.minimize(
    loss_of,
    np.full(3, 0.1),
    args=(design, y, weights, strength),
    method='Nelder-Mead',
    options={'xatol': 1e-8, 'fatol': 1e-10, 'maxiter': 4000},
  )
  np.testing.assert_allclose(found, expected.x, atol=2e-4)
  if strength == 0.05:
    assert (np.abs(found) < 1e-6).any()  # The penalty sets some to 0.


def gamed_file(path, rng, number=60):
  rows = ['index,preference,std_delta_len,instruction_difficulty,model']
  difficulty = rng.normal(size=number)
  for sign in (-1, 1):  # Terse, then verbose; judges like length.
    for i in range(number):
      length = sign * rng.uniform(0.5, 2)
      p = 1 / (1 + math.exp(2 * math.tanh(length)))
      rows.append(f'{i},{p},{length},{difficulty[i]},gamed')
  path.write_text('\n'.join(rows) + '\n')
  return bench.read_gamed(path)


def test_length_alone_does_not_win_at_equal_length(tmp_path, rng):
  gamed = gamed_file(tmp_path / 'df_gamed.csv', rng)
  lengths = np.column_stack(
    [rng.integers(50, 150, 60), rng.integers(150, 450, 60)]
  )
  difference = lengths[:, 0] - lengths[:, 1]
  # Nothing but the length decides, as for the gamed baselines.
  std = difference / difference.std(ddof=1)
  preference = 1 / (1 + np.exp(2 * np.tanh(std)))
  assert preference.mean() > 0.75
  found = bench.length_controlled(range(60), preference, lengths, gamed)
  assert found.mean == pytest.approx(0.5, abs=0.05)
  assert found.low <= found.mean <= found.high
  # By its definition, at the strength that it chose.
  design = np.concatenate(
    [
      np.column_stack([np.tanh(gamed.length), gamed.difficulty, np.zeros(120)]),
      np.column_stack([np.tanh(std), gamed.difficulty[:60], np.ones(60)]),
    ]
  )
  y = np.concatenate([gamed.preference, preference])
  weights = np.array([0.1] * 120 + [1.0] * 60)
  strength = bench.choose_strength(design, y, weights)
  theta = bench.fit_lasso(design, y, weights, strength)
  rates = [
    1 / (1 + math.exp(-theta[1] * d - theta[2])) for d in gamed.difficulty[:60]
  ]
  assert found.mean == pytest.approx(np.mean(rates))


def test_unread_preferences_are_predicted_but_not_learned_from(tmp_path, rng):
  gamed = gamed_file(tmp_path / 'df_gamed.csv', rng, 20)
  lengths, preference = rng.integers(9, 99, (20, 2)), rng.uniform(size=20)
  preference[3] = math.nan
  found = bench.length_controlled(range(20), preference, lengths, gamed)
  std = lengths[:, 0] - lengths[:, 1]
  std = std / std.std(ddof=1)  # Of all answers.
  ours = np.column_stack([np.tanh(std), gamed.difficulty[:20], np.ones(20)])
  theirs = np.column_stack(
    [np.tanh(gamed.length), gamed.difficulty, np.zeros(40)]
  )
  kept = np.arange(60) != 40 + 3
  design = np.concatenate([theirs, ours])[kept]
  y = np.concatenate([gamed.preference, preference])[kept]
  weights = np.array([0.1] * 40 + [1.0] * 20)[kept]
  strength = bench.choose_strength(design, y, weights)
  theta = bench.fit_lasso(design, y, weights, strength)
  z = theta[1] * gamed.difficulty[:20] + theta[2]
  assert found.mean == pytest.approx(np.mean(1 / (1 + np.exp(-z))))


def test_a_gamed_row_without_a_preference_has_a_difficulty(tmp_path):
  path = tmp_path / 'df_gamed.csv'
  head = 'index,preference,std_delta_len,instruction_difficulty\n'
  path.write_text(f'{head}0,,1,0.5\n1,0.25,1,-0.5\n')
  gamed = bench.read_gamed(path)
  assert math.isnan(gamed.preference[0]) and gamed.difficulty[0] == 0.5
  for cells, message in (
    ('0,x,1,1', ':2: preference'),
    ('0,1,nan,1', 'finite'),
  ):
    path.write_text(f'{head}{cells}\n')
    with pytest.raises(records.RecordError, match=message):
      bench.read_gamed(path)


def test_the_strength_is_the_best_over_folds(rng):
  design = rng.normal(size=(30, 2))
  y, weights = rng.uniform(size=30), np.ones(30)
  losses = {}
  for strength in np.logspace(-4, 4, 10):
    total = []
    for fold in range(5):
      out = [i for i in range(30) if i % 5 == fold]
      kept = [i for i in range(30) if i % 5 != fold]
      theta = bench.fit_lasso(design[kept], y[kept], weights[kept], strength)
      without = loss_of(theta, design[out], y[out], weights[out], 1.0)
      total.append((without - abs(theta).sum()) / len(out))
    losses[strength] = sum(total)
  best = min(losses, key=losses.get)
  assert bench.choose_strength(design, y, weights) == pytest.approx(best)


def test_instructions_that_the_difficulties_lack_are_named(tmp_path, rng):
  gamed = gamed_file(tmp_path / 'df_gamed.csv', rng, 3)
  with pytest.raises(ValueError, match='1 instructions .* first number 3'):
    bench.length_controlled(range(4), [0.5] * 4, np.ones((4, 2)), gamed)
  with pytest.raises(ValueError, match='do not vary'):
    bench.length_controlled(range(3), [0.5] * 3, np.ones((3, 2)), gamed)


# --- MT-Bench -----------------------------------------------------------------


def mt_files(folder):
  rows = [
    {'question_id': 81, 'category': 'writing', 'turns': ['Write.', 'Again.']},
    {'question_id': 111, 'category': 'math', 'turns': ['1 + 1?', 'And + 1?']},
  ]
  layouts = []
  for form, fields in (
    ('single', '{answer}|{answer_1}{answer_2}'),
    ('pair', '{answer_a},{answer_b}|{answer_a_1}{answer_a_2},'
     '{answer_b_1}{answer_b_2}'),
  ):  # fmt: skip
    first, second = fields.split('|')
    version = {'single': 'v1', 'pair': 'v2'}[form]
    for name, reference in ((version, ''), ('math-v1', 'R{ref_answer_1}')):
      for ending, asked, shown in (
        ('', '{question}', first),
        ('-multi-turn', '{question_1}{question_2}', second),
      ):
        layouts.append(
          {
            'name': f'{form}-{name}{ending}',
            'type': form,
            'system_prompt': 'Judge.',
            'prompt_template': f'{asked}|{reference}|{shown}',
            'output_format': '[[rating]]' if form == 'single' else '[[A]]',
          }
        )
  questions = bench.read_questions('mt_bench', lines(folder / 'q.jsonl', rows))
  layout = bench.read_layout('mt_bench', lines(folder / 'l.jsonl', layouts))
  return questions, layout


def test_mt_bench_grades_both_turns(tmp_path):
  questions, layout = mt_files(tmp_path)
  answers = {81: ('a1', 'a2'), 111: ('2', '3')}
  rows = bench.answer_rows('mt_bench', 'mine', questions, answers)
  assert rows[0]['choices'] == [{'index': 0, 'turns': ['a1', 'a2']}]
  path = lines(tmp_path / 'mine.jsonl', rows)
  assert bench.read_answers('mt_bench', path, questions) == answers
  requests = bench.mt_requests(
    layout, 'mine', questions, answers, {111: ('two', 'three')}
  )
  assert [request.messages[1]['content'] for request in requests] == [
    'Write.||a1',
    'Write.Again.||a1a2',
    '1 + 1?|Rtwo|2',
    '1 + 1?And + 1?|Rtwo|23',
  ]
  grades = [bench.read_grade(reply(x)) for x in ('[[8]]', 'So [7.5]', '[[3]]')]
  rows = bench.mt_rows(requests, [*grades, None], ['t'] * 4, 'gpt-4')
  assert [row['score'] for row in rows] == [8.0, 7.5, 3.0, -1]
  assert rows[1]['judge'] == ['gpt-4', 'single-v1-multi-turn']
  assert {'question_id', 'model', 'user_prompt', 'judgment', 'turn'} <= {
    *rows[0]
  }
  found = bench.measure_mt(requests, rows, 50)
  assert found['all'].mean == pytest.approx((8 + 7.5 + 3) / 3)
  assert found['turn 1'].mean == pytest.approx(5.5)
  assert found['turn 2'].mean == 7.5
  assert found['math'].mean == 3.0
  assert found['unread'] == 1
  with pytest.raises(records.RecordError, match='111 .math. needs a reference'):
    bench.mt_requests(layout, 'mine', questions, answers, {})


def test_mt_bench_pairs_are_won_in_both_orders(tmp_path):
  questions, layout = mt_files(tmp_path)
  ours, theirs = {81: ('a', 'b'), 111: ('c', 'd')}, {81: ('v', 'w')}
  theirs[111] = ('x', 'y')
  requests = bench.mt_requests(
    layout, 'mine', questions, ours, {111: ('two', '')}, theirs
  )
  shown = [r.messages[1]['content'].split('|')[2] for r in requests]
  assert shown[:4] == ['a,v', 'v,a', 'ab,vw', 'vw,ab']
  said = ['[[A]]', '[[B]]', '[[A]]', '[[A]]', '[[B]]', '[[A]]', '[[C]]', '']
  values = [bench.read_winner(reply(x)) if x else None for x in said]
  rows = bench.mt_rows(requests, values, said, 'gpt-4', 'base')
  assert [(row['g1_winner'], row['g2_winner']) for row in rows] == [
    ('model_1', 'model_1'),
    ('model_1', 'model_2'),
    ('model_2', 'model_2'),
    ('tie', 'error'),
  ]
  found = bench.measure_mt(requests, rows, 50)
  # Won, contradicted, lost; the last is unread.
  assert found['all'].mean == pytest.approx((1 + 0.5 + 0) / 3)
  assert found['unread'] == 1
  with pytest.raises(ValueError, match='no verdict'):
    bench.read_winner(reply('neither'))


# --- Arena-Hard ---------------------------------------------------------------

ARENA = """
judge_model: gpt-4
system_prompt: "Decide."
regex_pattern: \\[\\[([AB<>=]+)\\]\\]
prompt_template: ["Q {question_1} A {answer_1} B {answer_2}"]
"""


@pytest.mark.parametrize('is_v2', [False, True])
def test_arena_hard_weighs_clear_verdicts(tmp_path, is_v2):
  rows = [
    {'uid': f'u{i}', 'category': 'hard', 'prompt': f'ask {i}'}
    if is_v2
    else {'question_id': f'u{i}', 'turns': [{'content': f'ask {i}'}]}
    for i in range(3)
  ]
  (tmp_path / 'l.yaml').write_text(ARENA)
  questions = bench.read_questions(
    'arena_hard', lines(tmp_path / 'q.jsonl', rows)
  )
  layout = bench.read_layout('arena_hard', tmp_path / 'l.yaml')
  ours = {f'u{i}': (f'mine {i}',) for i in range(3)}
  theirs = {f'u{i}': (f'base {i}',) for i in range(3)}
  written = bench.answer_rows('arena_hard', 'mine', questions, ours)
  path = lines(tmp_path / 'mine.jsonl', written)
  assert bench.read_answers('arena_hard', path, questions) == ours
  requests = bench.arena_requests(layout, 'mine', questions, ours, theirs)
  assert requests[0].messages[1]['content'] == 'Q ask 0 A base 0 B mine 0'
  assert requests[1].messages[1]['content'] == 'Q ask 0 A mine 0 B base 0'
  said = ['[[B>>A]]', 'so [[A>B]]', '[[A=B]]', '[[B>A]]', '[[A>B]]', 'none']
  values = []
  for text in said:
    try:
      values.append(bench.read_label(reply(text), layout))
    except ValueError:
      values.append(None)
  assert values == ['B>>A', 'A>B', 'A=B', 'B>A', 'A>B', None]
  rows = bench.arena_rows(requests, values, said, 'gpt-4', 'base')
  key = 'uid' if is_v2 else 'question_id'
  assert [row[key] for row in rows] == ['u0', 'u1', 'u2']
  assert [game['score'] for game in rows[0]['games']] == ['B>>A', 'A>B']
  found = bench.measure_arena(requests, rows, 50)
  # First: three wins and one; second: a half and a loss; third: unread.
  assert found['win rate'].mean == pytest.approx((3 + 1 + 0.5 + 0) / 6)
  assert found['unread'] == 1


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('a: 1\nb: [c\n', r'l.yaml:3: not YAML \(expected .*\)'),
    ('a: b: c', r'l.yaml:1: not YAML \(mapping values are not allowed here\)'),
    ('a: \0', r'l.yaml: not YAML \(unacceptable character #x0000.*\)'),
  ],
)
def test_bad_yaml_is_one_line(tmp_path, content, message):
  (tmp_path / 'l.yaml').write_text(content)
  with pytest.raises(records.RecordError, match=message) as error:
    bench.read_layout('arena_hard', tmp_path / 'l.yaml')
  assert '\n' not in str(error.value)


ARENA2 = """
judge_model: gpt-4.1
regex_patterns: ['\\[\\[([AB<>=]+)\\]\\]', '\\[([AB<>=]+)\\]']
prompt_template: "Q {QUESTION} A {ANSWER_A} B {ANSWER_B}"
system_prompt:
  hard_prompt: Decide.
  creative_writing: Feel.
"""


def test_version_2_of_arena_hard_has_categories(tmp_path):
  rows = [
    {'uid': f'u{i}', 'category': category, 'prompt': f'ask {i}'}
    for i, category in enumerate(['hard_prompt', 'creative_writing'] * 2)
  ]
  (tmp_path / 'l.yaml').write_text(ARENA2)
  layout = bench.read_layout('arena_hard', tmp_path / 'l.yaml')
  questions = bench.read_questions(
    'arena_hard', lines(tmp_path / 'q.jsonl', rows)
  )
  answers = {question.id: ('text',) for question in questions}
  requests = bench.arena_requests(layout, 'm', questions, answers, answers)
  assert [r.messages[0]['content'] for r in requests[:4]] == [
    *['Decide.'] * 2,
    *['Feel.'] * 2,
  ]
  # Of several verdicts the last counts, in lower case, too.
  said = ['[[A>>B]]? No: [[b>a]]', '[A=B]', '[[B>A]]', '[[A>B]]'] * 2
  values = [bench.read_label(reply(text), layout) for text in said]
  assert values == ['B>A', 'A=B', 'B>A', 'A>B'] * 2
  judged = bench.arena_rows(requests, values, said, 'gpt-4.1', 'base')
  found = bench.measure_arena(requests, judged, 50)
  assert found['win rate'].mean == pytest.approx((1 + 0.5 + 1 + 1) / 4)
  assert found['hard_prompt'].mean == pytest.approx((1 + 0.5) / 2)
  assert found['creative_writing'].mean == 1.0
  del layout['system_prompt']['hard_prompt']
  with pytest.raises(records.RecordError, match="no system_prompt for .*'hard"):
    bench.arena_requests(layout, 'm', questions, answers, answers)


@pytest.mark.parametrize(
  'read',
  [
    bench.read_alpaca,
    bench.read_winner,
    bench.read_grade,
    lambda given: bench.read_label(
      given, {'patterns': [re.compile(r'\[\[(A>B)\]\]')], 'takes_last': True}
    ),
  ],
)
def test_reasoning_that_was_cut_has_no_verdict(read):
  """It names the verdicts between which the judge has to choose."""
  with pytest.raises(ValueError):
    read(reply('<think>m, [[A]], [[8]] or [[A>B]]?'))


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('[[A>B]] or [[B>A]]', 'several verdicts'),
    ('[[A>A]]', 'no verdict'),
    ('', 'no verdict'),
  ],
)
def test_unclear_labels_are_refused(tmp_path, text, message):
  (tmp_path / 'l.yaml').write_text(ARENA)
  layout = bench.read_layout('arena_hard', tmp_path / 'l.yaml')
  with pytest.raises(ValueError, match=message):
    bench.read_label(reply(text), layout)


# --- Bad files ----------------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('alpaca_eval', 'no marks {instruction}', 'im_start'),
    ('mt_bench', '{"name": "single-v1"}\n', "'system_prompt' is missing"),
    ('arena_hard', 'prompt_template: x', 'needs regex_pattern, a text'),
    ('arena_hard', 'regex_patterns: x', 'needs prompt_template, a text'),
    (
      'arena_hard',
      '{prompt_template: x, regex_patterns: x, system_prompt: x}',
      'needs regex_patterns, a text',
    ),
    (
      'arena_hard',
      '{prompt_template: x, regex_patterns: ["("], system_prompt: x}',
      'not a regular expression',
    ),
    (
      'arena_hard',
      '{prompt_template: x, regex_pattern: x}',
      'system_prompt.*judge_utils.py',
    ),
    ('arena_hard', '- x', 'expected keys and values'),
    ('arena_hard', 'a: [', 'not YAML'),
  ],
)
def test_bad_layouts_are_named(tmp_path, name, content, message):
  path = tmp_path / 'layout'
  path.write_text(content)
  with pytest.raises(records.RecordError, match=message):
    bench.read_layout(name, path)


def test_bad_questions_and_answers_are_named(tmp_path):
  path = lines(tmp_path / 'q.jsonl', [{'turns': ['x']}])
  with pytest.raises(records.RecordError, match=":1: field 'question_id'"):
    bench.read_questions('mt_bench', path)
  rows = [{'question_id': 1, 'turns': ['x', 'y']}] * 2
  with pytest.raises(records.RecordError, match='1 questions repeat an id'):
    bench.read_questions('mt_bench', lines(path, rows))
  questions = bench.read_questions('mt_bench', lines(path, rows[:1]))
  short = {'question_id': 1, 'choices': [{'turns': ['only one']}]}
  with pytest.raises(records.RecordError, match='no answer to question 1'):
    bench.read_answers('mt_bench', lines(path, [short]), questions)
  for row in ({}, {'choices': []}, {'choices': [{}]}, {'choices': [1]}):
    with pytest.raises(records.RecordError, match=':1: .*choices'):
      bench.read_answers('mt_bench', lines(path, [row]), questions)
  row = {'question_id': 1, 'turns': ['x', 'y', 'z']}
  with pytest.raises(records.RecordError, match=':1: 3 turns'):
    bench.read_questions('mt_bench', lines(path, [row]))
  for category in (None, ['math'], 3):
    for name, row in (
      ('mt_bench', {'question_id': 1, 'turns': ['x'], 'category': category}),
      ('arena_hard', {'uid': 1, 'prompt': 'x', 'category': category}),
      ('alpaca_eval', {'instruction': 'x', 'dataset': category}),
    ):
      key = 'dataset' if name == 'alpaca_eval' else 'category'
      with pytest.raises(records.RecordError, match=f":1: field '{key}' is"):
        bench.read_questions(name, lines(path, [row]))
  for messages in ([], [1], [{'content': {}}]):
    row = {'uid': 1, 'messages': messages}
    with pytest.raises(records.RecordError, match=':1: turns must be texts'):
      bench.read_answers('arena_hard', lines(path, [row]), questions)
  layout = {'system_prompt': '', 'prompt_template': '{other}', 'patterns': []}
  with pytest.raises(records.RecordError, match="asks for 'other'"):
    bench.arena_requests(layout, 'm', questions, {1: ('a',)}, {1: ('b',)})
