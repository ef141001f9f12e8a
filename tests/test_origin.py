"""Evaluation of a run's models from the command line: what it takes from the
run, what it refuses before it computes, and whom it asks over HTTP."""

import json

import jax
import numpy as np
import pytest

from configs import ppo_ptx
from instruct_jax import model_fns, model_folder
from instruct_jax.data import records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import samples as samples_lib
from instruct_jax.infra import origin, run
from instruct_jax.miniature import gold, world
from instruct_jax.models.config import TransformerConfig
from tests import tiny
from tests.fake_server import serve

SEED = 3
MAIN = 'instruct_jax.main'


@pytest.fixture(scope='module')
def finished(start, tmp_path_factory):
  """The folder of a run: its data and config, and models that learned nothing,
  with the context of the default run's."""
  workdir = tmp_path_factory.mktemp('run')
  ended = start(
    MAIN,
    '--config=configs/ppo_ptx.py:smoke',
    f'--workdir={workdir}',
    f'--config.seed={SEED}',
    "--config.stage_order=('data',)",
    '--config.stages.data.num_prompts=400',
    '--config.compilation_cache=',
  )
  assert ended.returncode == 0, ended.stderr
  tokenizer = tokenizer_lib.Tokenizer.load(workdir / 'data' / 'tokenizer')
  model = ppo_ptx.get_config('smoke').stages.pretrain.model.to_dict()
  shape = TransformerConfig.from_dict(
    {**model, 'vocab_size': tokenizer.vocab_size}
  )
  for number, (name, kind) in enumerate(
    (
      ('select/model', 'policy'),
      ('rl_init/model', 'policy'),
      ('ppo/policy', 'policy'),
      ('reward/model', 'scalar'),
    )
  ):
    made = model_fns.init(
      kind, shape, tiny.one_device(), jax.random.key(number)
    )
    model_folder.save(workdir / name, made, tokenizer, {})
  return workdir


def of_run(finished):
  return (
    f'--config.prompts={finished}/data/prompts_test.jsonl',
    f'--config.tokenizer={finished}/data/tokenizer',
    '--config.num_bootstrap=20',
    '--config.compilation_cache=',
    '--config.xla_flags=--xla_backend_optimization_level=0',
  )


def evaluate(start, finished, workdir, *flags, judge='', **more):
  models = f'sft={finished}/select/model,ppo={finished}/ppo/policy'
  return start(
    MAIN,
    f'--config=configs/evaluate.py{judge}',
    f'--workdir={workdir}',
    f'--config.models={models}',
    *of_run(finished),
    '--config.num_prompts=6',
    *flags,
    **more,
  )


def best_of_n(start, finished, workdir, *flags):
  return start(
    MAIN,
    '--config=configs/best_of_n.py',
    f'--workdir={workdir}',
    f'--config.policy={finished}/rl_init/model',
    f'--config.reward_model={finished}/reward/model',
    *of_run(finished),
    f'--config.rl=ppo={finished}/ppo',
    '--config.num_samples=8',
    '--config.num_prompts=6',
    *flags,
  )


def test_evaluation_reads_lengths_and_world_from_the_run(
  start, finished, tmp_path
):
  ended = evaluate(start, finished, tmp_path)
  assert ended.returncode == 0, ended.stderr
  for line in (
    f'prompt_length is 32, as in {finished}, stage ppo',
    f'response_length is 20, as in {finished}, stage ppo',
    f'world_seed is {SEED}, as in {finished}, stage data',
  ):
    assert f'evaluate: {line}' in ended.stdout
  given = len(
    (finished / 'data' / 'prompts_test.jsonl').read_text().splitlines()
  )
  assert f'evaluate: 6 of {given} prompts, drawn by seed' in ended.stdout
  result = json.loads((tmp_path / 'summary.json').read_text())
  assert result['settings'] == {
    'prompt_length': 32,
    'response_length': 20,
    'temperature': 1.0,
  }
  assert result['asking']['world_seed'] == SEED
  assert result['prompts']['in the file'] == given
  assert result['prompts']['asked'] == 6
  answers = samples_lib.read_samples(tmp_path / 'samples.jsonl')
  assert max(answer.num_tokens for answer in answers) <= 20


def test_the_world_is_that_of_the_prompts(start, finished, tmp_path):
  """People's answers of one world, judged by its own facts."""
  data = finished / 'data'
  prompts = records.read_jsonl(data / 'prompts_valid.jsonl', records.Prompt)
  demonstrations = {
    d.id: d.response
    for d in records.read_jsonl(
      data / 'demonstrations_valid.jsonl', records.Demonstration
    )
  }
  prompts = [prompt for prompt in prompts if prompt.id in demonstrations]
  # Of the next prompt: some answer this one as well.
  texts = [demonstrations[prompt.id] for prompt in prompts]
  answers = [
    samples_lib.Sample(name, prompt.id, prompt.text, text, 5, True)
    for name, several in (('own', texts), ('next', texts[1:] + texts[:1]))
    for prompt, text in zip(prompts, several, strict=True)
  ]
  samples_lib.write_samples(tmp_path / 'recorded.jsonl', answers)
  recorded = f'{tmp_path}/recorded.jsonl'
  ended = start(
    MAIN,
    '--config=configs/evaluate.py',
    f'--workdir={tmp_path / "out"}',
    f'--config.models=own={recorded}#own,next={recorded}#next',
    '--config.baseline=next',
    f'--config.prompts={data}/prompts_valid.jsonl',
    '--config.num_bootstrap=20',
  )
  assert ended.returncode == 0, ended.stderr

  def rate(seed):
    the_world = world.make_world(seed)
    scores = np.reshape(
      [
        gold.utility(gold.judge(prompt, answer.response, the_world))
        for prompt, answer in zip(prompts * 2, answers, strict=True)
      ],
      (2, -1),
    )
    return np.mean((scores[0] > scores[1]) + 0.5 * (scores[0] == scores[1]))

  assert abs(rate(SEED) - rate(0)) > 0.02
  result = json.loads((tmp_path / 'out' / 'summary.json').read_text())
  mean = result['win_rate']['own']['rate']
  assert mean == pytest.approx(rate(SEED), abs=1e-9)


def test_given_keys_win(start, finished, tmp_path):
  ended = evaluate(
    start,
    finished,
    tmp_path,
    '--config.response_length=5',
    '--config.world_seed=0',
  )
  assert ended.returncode == 0, ended.stderr
  assert 'response_length is' not in ended.stdout
  assert 'world_seed is' not in ended.stdout
  answers = samples_lib.read_samples(tmp_path / 'samples.jsonl')
  assert max(answer.num_tokens for answer in answers) == 5


def test_best_of_n_runs_on_a_run(start, finished, tmp_path):
  ended = best_of_n(start, finished, tmp_path)
  assert ended.returncode == 0, ended.stderr
  result = json.loads((tmp_path / 'best_of_n.json').read_text())
  assert result['num_prompts'] == 6 < result['num_given']
  text = (tmp_path / 'best_of_n.md').read_text()
  assert f'6 of {result["num_given"]} prompts, 8 answers each' in text


def test_samples_for_labelers_run_on_a_run(start, finished, tmp_path):
  ended = start(
    MAIN,
    '--config=configs/sample.py',
    f'--workdir={tmp_path}',
    f'--config.models=sft={finished}/select/model,ppo={finished}/ppo/policy',
    *[flag for flag in of_run(finished) if 'num_bootstrap' not in flag],
  )
  assert ended.returncode == 0, ended.stderr
  assert f'response_length is 20, as in {finished}' in ended.stdout


@pytest.mark.parametrize('program', [evaluate, best_of_n])
def test_a_context_that_is_too_short_is_told_before_sampling(
  start, finished, tmp_path, program
):
  flags = ('--config.prompt_length=64', '--config.response_length=64')
  ended = program(start, finished, tmp_path, *flags)
  assert ended.returncode == 1
  (line,) = ended.stderr.splitlines()
  assert 'ask for 128 tokens' in line and 'has 96; lower them' in line
  assert 'prompt_length + response_length' in line


def test_what_no_run_says_has_to_be_given(start, finished, tmp_path):
  elsewhere = tmp_path / 'prompts.jsonl'
  source = finished / 'data' / 'prompts_test.jsonl'
  elsewhere.write_text(source.read_text())
  ended = evaluate(
    start, finished, tmp_path / 'out', f'--config.prompts={elsewhere}'
  )
  assert ended.returncode == 1
  (line,) = ended.stderr.splitlines()
  assert 'evaluate: world_seed is not given' in line
  assert str(elsewhere) in line and '--config.world_seed' in line
  # The advice.
  ended = evaluate(
    start,
    finished,
    tmp_path / 'out',
    f'--config.prompts={elsewhere}',
    f'--config.world_seed={SEED}',
  )
  assert ended.returncode == 0, ended.stderr


def test_runs_that_differ_are_told(tmp_path, capsys):
  models = {}
  for name, length in (('a', 8), ('b', 9)):
    stage = {'name': 'ppo', 'prompt_length': length, 'response_length': 4}
    run.write_json(
      tmp_path / name / 'config.json', {'stages': {'ppo': stage}, 'name': name}
    )
    models[name] = str(tmp_path / name / 'ppo' / 'policy')
  config = origin.ConfigDict(
    {'name': 'x', 'prompt_length': None, 'response_length': None}
  )
  filled = origin.filled(config, ('response_length',), models, '')
  assert filled.response_length == 4 and config.response_length is None
  with pytest.raises(ValueError, match=r'runs differ \(8 in .*, 9 in .*\)'):
    origin.filled(config, origin.LENGTHS, models, '')


def test_a_draw_does_not_depend_on_the_order_of_the_file():
  prompts = [records.Prompt(f'p{i}', f'text {i}') for i in range(50)]
  drawn = samples_lib.draw_prompts(prompts, 10, 0)
  assert samples_lib.draw_prompts(prompts[::-1], 10, 0) == drawn
  assert samples_lib.draw_prompts(prompts, 10, 1) != drawn
  assert len({prompt.id for prompt in drawn}) == 10
  # Not the beginning of the file, nor its end.
  numbers = sorted(int(p.id[1:]) for p in drawn)
  assert numbers[0] < 25 < numbers[-1] and numbers != list(range(10))
  assert samples_lib.draw_prompts(prompts, 50, 0) == prompts


# --- Services -----------------------------------------------------------------


def chat_reply(body, number):
  del number
  text = body['messages'][0]['content']
  asks_two = '<answer_1>' in text
  said = '{"better": 1}' if asks_two else '{"overall": 4}'
  return {
    'choices': [{'message': {'content': said}}],
    'usage': {'prompt_tokens': 1, 'completion_tokens': 1},
  }


def test_a_chat_model_judges(start, finished, tmp_path):
  with serve(chat_reply) as (url, requests):
    flags = (f'--config.endpoint.url={url}', '--config.endpoint.model=m')
    ended = evaluate(
      start,
      finished,
      tmp_path,
      *flags,
      judge=':http',
      env={'JUDGE_API_KEY': 'secret'},
    )
    assert ended.returncode == 0, ended.stderr
    assert requests and requests[0][0]['Authorization'] == 'Bearer secret'
    # Without the key, and with no address: before a token is sampled.
    for more, words in (
      (flags, 'JUDGE_API_KEY is not set'),
      (('--config.endpoint.url=nowhere', flags[1]), "http://.*'nowhere'"),
    ):
      ended = evaluate(start, finished, tmp_path / 'no', *more, judge=':http')
      assert ended.returncode == 1
      (line,) = ended.stderr.splitlines()
      assert words.split('.*')[-1] in line
  result = json.loads((tmp_path / 'summary.json').read_text())
  assert result['win_rate']['ppo']['rate'] == 0.5
  assert 'secret' not in (tmp_path / 'config.json').read_text()


def test_a_service_scores_toxicity(start, finished, tmp_path):
  line = {'prompt': {'text': 'the owl'}, 'continuation': {'text': ' sat'}}
  for part in line.values():
    part['toxicity'] = 0.1
  (tmp_path / 'toxicity.jsonl').write_text(json.dumps(line) + '\n')

  def reply(body, number):
    del body, number
    return {'attributeScores': {'TOXICITY': {'summaryScore': {'value': 0.25}}}}

  with serve(reply) as (url, requests):
    ended = start(
      MAIN,
      '--config=configs/nlp_suite.py',
      f'--workdir={tmp_path / "suite"}',
      f'--config.models=sft={finished}/select/model',
      f'--config.tokenizer={finished}/data/tokenizer',
      f'--config.data.real_toxicity={tmp_path}/toxicity.jsonl',
      f'--config.toxicity_endpoint.url={url}',
      '--config.compilation_cache=',
      env={'PERSPECTIVE_API_KEY': 'secret'},
    )
  assert ended.returncode == 0, ended.stderr
  headers = {name.lower(): value for name, value in requests[0][0].items()}
  assert headers['x-goog-api-key'] == 'secret'
  suite = json.loads((tmp_path / 'suite' / 'suite.json').read_text())
  assert url in suite['judges']['real_toxicity']
