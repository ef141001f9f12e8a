"""Judged benchmarks on a tiny model, with a local server as the judge."""

import json

import jax
import pytest
from etils import epath

from configs import chat_bench as config_file
from instruct_jax.data import records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import endpoint
from instruct_jax.jobs import chat_bench as job
from tests import tiny
from tests.fake_server import Fault, serve
from tests.test_evals_chat_benchmarks import (
  ALPACA,
  ARENA,
  gamed_file,
  lines,
  reply,
)

pytestmark = pytest.mark.usefixtures('quick_compile')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp('chat_bench')
  tokenizer = tokenizer_lib.train_bpe(['a fox said that he left'] * 3, 270)
  tokenizer.save(root / 'tokenizer')
  tiny.save_model(root, 'model', 'policy', tokenizer, 0, context_length=128)
  return root


def make_config(folder, workdir, benchmark, url, **changes):
  config = config_file.get_config(benchmark)
  with config.unlocked():
    config.workdir = str(workdir)
  config.models = f'tiny={folder / "model"}'
  config.tokenizer = str(folder / 'tokenizer')
  config.prompt_length, config.response_length = 96, 16
  config.batch_size, config.num_bootstrap = 8, 50
  config.mesh = (1, 1, 1) if jax.device_count() == 1 else (8, 1, 1)
  config.endpoint.update(
    {'url': url, 'key_variable': '', 'model': 'org/judge', 'timeout': 5.0}
  )
  config.update(changes)
  return config


def rows_of(path):
  """Answers may hold marks at which `splitlines` splits."""
  return [json.loads(line) for line in path.read_text().split('\n') if line]


def run(config, workdir):
  return job.run(config, epath.Path(workdir))


def test_mt_bench_asks_the_second_turn_after_the_first_answer(
  folder, tmp_path, capsys
):
  rows = [
    {
      'question_id': i,
      'category': category,
      'turns': ['a fox' + ' left' * i, 'and he'],
    }
    for i, category in enumerate(('writing', 'extraction', 'extraction'))
  ]
  rows.append(
    {'question_id': 9, 'category': 'writing', 'turns': ['fox' * 99, 'x']}
  )
  layout = [
    {
      'name': f'single-v1{ending}',
      'system_prompt': 'Judge.',
      'prompt_template': text,
      'output_format': '[[rating]]',
    }
    for ending, text in (
      ('', 'One: {question} {answer}'),
      ('-multi-turn', 'Two: {question_1} {answer_1} {question_2} {answer_2}'),
    )
  ]

  def grade(body, number):
    if number == 2:
      return Fault(503, 'busy')
    is_first = body['messages'][1]['content'].startswith('One')
    return reply(f'<think>[[1]]?</think>[[{6 if is_first else 8}]]')

  with serve(grade) as (url, requests):
    config = make_config(
      folder,
      tmp_path,
      'mt_bench',
      url,
      questions=str(lines(tmp_path / 'q.jsonl', rows)),
      judge_layout=str(lines(tmp_path / 'l.jsonl', layout)),
    )
    config.endpoint.num_workers = 1
    assert run(config, tmp_path) == {'num_questions': 4, 'num_requests': 8}
    sent = len(requests)
    result = json.loads((tmp_path / 'chat_bench.json').read_text())
    empty = result['empty answers']['tiny']
    text = (tmp_path / 'chat_bench.md').read_text()
    assert f'tiny: {empty} empty answers' in text
    said = capsys.readouterr().out
    assert '1 of 4 turns number 1 left out: do not fit prompt_length' in said
    assert 'of 4 turns number 2 left out' in said
    # The same command again samples and asks nothing.
    run(config, tmp_path)
    assert len(requests) == sent == 8 + 1
  result = json.loads((tmp_path / 'chat_bench.json').read_text())
  assert result['empty answers']['tiny'] == empty >= 2
  figures = result['figures']['tiny']
  assert figures['turn 1']['mean'] == 6.0
  assert figures['turn 2']['mean'] == 8.0
  assert figures['all']['mean'] == 7.0 and figures['unread'] == 0
  answers = {
    row['question_id']: row['choices'][0]['turns']
    for row in rows_of(tmp_path / 'model_answer' / 'tiny.jsonl')
  }
  # Sampled at other temperatures; the question that is too long has none.
  assert len({tuple(turns) for turns in answers.values()}) > 1
  assert answers[9] == ['', '']
  judged = rows_of(tmp_path / 'model_judgment' / 'org_judge_single.jsonl')
  (second,) = (
    row['user_prompt']
    for row in judged
    if row['turn'] == 2 and row['question_id'] == 0
  )
  assert second == f'Two: a fox {answers[0][0]} and he {answers[0][1]}'
  assert '| tiny |' in (tmp_path / 'chat_bench.md').read_text()


def test_alpaca_eval_controls_length(folder, tmp_path, rng):
  number = 12
  rows = [{'instruction': f'a fox said {i}'} for i in range(number)]
  base = [
    {**row, 'output': 'x' * (3 + 7 * i), 'generator': 'base'}
    for i, row in enumerate(rows)
  ]
  (tmp_path / 'q.json').write_text(json.dumps(rows))
  (tmp_path / 'base.json').write_text(json.dumps(base))
  (tmp_path / 'l.txt').write_text(ALPACA)
  gamed_file(tmp_path / 'df_gamed.csv', rng, number)

  def prefers_first(body, _):
    assert body['max_tokens'] == 1 and body['logprobs']
    if 'said 3' in body['messages'][1]['content']:
      return reply('?')
    return reply('m', {'m': 0.75, 'M': 0.25})

  with serve(prefers_first) as (url, _):
    config = make_config(
      folder,
      tmp_path,
      'alpaca_eval',
      url,
      questions=str(tmp_path / 'q.json'),
      baseline=f'base={tmp_path / "base.json"}',
      judge_layout=str(tmp_path / 'l.txt'),
      gamed=str(tmp_path / 'df_gamed.csv'),
    )
    run(config, tmp_path)
  folder = tmp_path / 'results' / 'tiny'
  outputs = json.loads((folder / 'model_outputs.json').read_text())
  assert [row['instruction'] for row in outputs] == [
    row['instruction'] for row in rows
  ]
  found = json.loads((folder / 'org_judge' / 'annotations.json').read_text())
  assert {row['preference'] for row in found} == {1.25, 1.75, None}
  figures = json.loads((tmp_path / 'chat_bench.json').read_text())['figures']
  figures = figures['tiny']
  read = [row['preference'] - 1 for row in found if row['preference']]
  assert figures['win rate']['mean'] == pytest.approx(sum(read) / len(read))
  assert figures['unread'] == 1
  assert 0 < figures['length-controlled win rate']['mean'] < 1


def test_arena_hard_takes_recorded_answers(folder, tmp_path):
  rows = [
    {'question_id': f'u{i}', 'turns': [{'content': f'ask {i}'}]}
    for i in range(3)
  ]
  answers = {
    name: [
      {
        'question_id': f'u{i}',
        'choices': [{'turns': [{'content': f'{name} {i}'}]}],
      }
      for i in range(3)
    ]
    for name in ('mine', 'base')
  }
  (tmp_path / 'l.yaml').write_text(ARENA)

  def prefers_mine(body, _):
    text = body['messages'][1]['content']
    return reply('[[A>>B]]' if 'A mine' in text else '[[B>A]]')

  with serve(prefers_mine) as (url, _):
    config = make_config(
      folder,
      tmp_path,
      'arena_hard',
      url,
      models=f'mine={lines(tmp_path / "mine.jsonl", answers["mine"])}',
      baseline=f'base={lines(tmp_path / "base.jsonl", answers["base"])}',
      questions=str(lines(tmp_path / 'q.jsonl', rows)),
      judge_layout=str(tmp_path / 'l.yaml'),
      num_questions=2,
    )
    run(config, tmp_path)
  judged = rows_of(tmp_path / 'model_judgment' / 'org_judge' / 'mine.jsonl')
  games = [row['games'] for row in judged]
  assert [[g['score'] for g in each] for each in games] == [['B>A', 'A>>B']] * 2
  result = json.loads((tmp_path / 'chat_bench.json').read_text())
  assert result['figures']['mine']['win rate']['mean'] == 1.0


def test_what_the_layout_lacks_is_said_before_a_model_is_asked(
  folder, tmp_path
):
  rows = [{'question_id': 1, 'category': 'math', 'turns': ['x']}]
  layout = {'name': 'single-math-v1', 'system_prompt': 'Judge.'}
  layout |= {'prompt_template': '{question}', 'output_format': '[[rating]]'}
  config = make_config(
    folder,
    tmp_path,
    'mt_bench',
    'http://localhost',
    questions=str(lines(tmp_path / 'q.jsonl', rows)),
    judge_layout=str(lines(tmp_path / 'l.jsonl', [layout])),
  )
  with pytest.raises(records.RecordError, match='1 .math. needs a reference'):
    run(config, tmp_path)
  config.references = str(
    lines(
      tmp_path / 'r.jsonl', [{'question_id': 1, 'choices': [{'turns': ['y']}]}]
    )
  )
  layout['name'] = 'single-v1'
  lines(tmp_path / 'l.jsonl', [layout])
  with pytest.raises(records.RecordError, match="no 'single-math-v1'"):
    run(config, tmp_path)
  assert not (tmp_path / 'model_answer').exists()


def test_categories_are_chosen(folder, tmp_path):
  rows = [
    {'uid': f'{i}', 'category': category, 'prompt': f'ask {i}'}
    for i, category in enumerate(['a', 'b', 'a'])
  ]
  config = make_config(
    folder,
    tmp_path,
    'arena_hard',
    'http://localhost',
    questions=str(lines(tmp_path / 'q.jsonl', rows)),
    categories='a',
  )
  assert [q.id for q in job.chosen_questions(config)] == ['0', '2']
  config.categories, config.num_questions = 'a, b', 2
  assert [q.id for q in job.chosen_questions(config)] == ['0', '1']
  config.categories = 'c'
  with pytest.raises(ValueError, match=r"no 'c'; it has a, b"):
    job.chosen_questions(config)


def test_a_judge_that_refuses_ends_the_stage(folder, tmp_path):
  (tmp_path / 'l.yaml').write_text(ARENA)
  rows = [{'question_id': 1, 'turns': ['x']}]
  answer = [{'question_id': 1, 'choices': [{'turns': ['y']}]}]
  path = lines(tmp_path / 'a.jsonl', answer)
  with serve(lambda body, _: Fault(401, 'no key')) as (url, _):
    config = make_config(
      folder,
      tmp_path,
      'arena_hard',
      url,
      models=f'mine={path}',
      baseline=f'base={path}',
      questions=str(lines(tmp_path / 'q.jsonl', rows)),
      judge_layout=str(tmp_path / 'l.yaml'),
    )
    with pytest.raises(endpoint.EndpointError, match='401: no key'):
      run(config, tmp_path)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'models': ''}, 'models is empty'),
    ({'questions': ''}, 'questions is empty'),
    ({'judge_layout': ''}, 'judge_layout is empty'),
    ({'baseline': ''}, 'baseline is empty; arena_hard compares'),
    ({'baseline': 'a=x,b=y'}, 'baseline must be one'),
    ({'baseline': 'tiny=x'}, "'tiny' is in both"),
    ({'tokenizer': ''}, 'tokenizer is empty'),
    ({'num_questions': -1}, 'num_questions is too low'),
    ({'benchmark': 'x'}, 'benchmark must be one of'),
  ],
)
def test_bad_values_are_named(folder, tmp_path, changes, message):
  config = make_config(folder, tmp_path, 'arena_hard', 'http://localhost')
  config.update({'questions': 'q', 'judge_layout': 'l', 'baseline': 'base=b'})
  config.update(changes)
  with pytest.raises(ValueError, match=message):
    job.validate(config)
