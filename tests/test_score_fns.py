"""Scores from Python functions: what they get, what they may return."""

import jax
import numpy as np
import pytest
from etils import epath

from configs import best_of_n as best_of_n_config
from configs import evaluate as evaluate_config
from configs import rl as rl_config
from instruct_jax import rl, score_fns
from instruct_jax.data import records
from instruct_jax.infra import inputs, run, stages
from instruct_jax.jobs import best_of_n, evaluate
from instruct_jax.models import config as models_config

PROMPTS = [
  records.Prompt('a', 'name a fox', metadata={'reference': 'red'}, user='u'),
  records.Prompt('b', 'name a pig', category='chat'),
]
TEXTS = ['red fox', 'pig']
NUMBER = 3


def score(function):
  return score_fns.score_texts(
    'reward_fn f', function, PROMPTS, TEXTS, [True, False], [3, 20]
  )


def brevity(prompts, responses, metadata):
  del prompts, metadata
  return [-len(response.split()) for response in responses]


def test_a_function_gets_texts_and_metadata():
  seen = []

  def function(*arguments):
    seen.extend(arguments)
    return [1, 2.5]

  scores = score(function)
  assert scores.dtype == np.float32
  assert scores.tolist() == [1, 2.5]
  prompts, responses, metadata = seen
  assert prompts == ['name a fox', 'name a pig']
  assert responses == TEXTS
  assert metadata[0] == {
    'id': 'a',
    'user': 'u',
    'category': '',
    'turns': (),
    'ended': True,
    'num_tokens': 3,
    'reference': 'red',
  }
  assert (metadata[1]['ended'], metadata[1]['num_tokens']) == (False, 20)


def test_a_prompts_metadata_does_not_override_what_is_so():
  claims = {'id': 'x', 'num_tokens': 0, 'ended': False, 'turns': 5, 'own': 1}
  prompt = records.Prompt('a', 'name a fox', metadata=claims)
  seen = []
  score_fns.score_texts(
    'f', lambda *all: seen.extend(all[2]) or [0], [prompt], ['red'], [True], [3]
  )
  true = {'id': 'a', 'num_tokens': 3, 'ended': True, 'turns': (), 'own': 1}
  assert seen == [{'user': '', 'category': ''} | true]


def raises(prompts, responses, metadata):
  return metadata[1]['reference']


@pytest.mark.parametrize(
  ('function', 'message'),
  [
    (raises, r"KeyError: 'reference' \(.*test_score_fns\.py:\d+\)"),
    (lambda *_: None, 'returned NoneType, not one number for each of 2 resp'),
    (lambda *_: [1.0], r'shape \(1,\), not one number for each of 2'),
    (lambda *_: ['good', 'bad'], 'must return one number per response'),
    (lambda *_: [[1.0], [2.0]], r'shape \(2, 1\)'),
    (lambda *_: [1.0, float('nan')], "returned nan for .* prompt 'b'.*1 of 2"),
  ],
)
def test_what_is_no_score_is_named(function, message):
  with pytest.raises(RuntimeError, match=f'reward_fn f.*{message}'):
    score(function)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('brevity', 'not a dotted name'),
    ('nowhere.brevity', "'nowhere.brevity': No module"),
    ('tests.test_score_fns.nothing', 'has no attribute'),
    ('tests.test_score_fns.NUMBER', 'is of type int; name a function'),
  ],
)
def test_names_of_nothing_are_refused(name, message):
  with pytest.raises(ValueError, match=f'reward_fn .*{message}'):
    score_fns.find_function(name)


def test_the_file_of_a_function_is_an_input():
  """Of what a module imports, the file that defines it; a builtin has none."""
  name = 'tests.test_score_fns.brevity'
  assert score_fns.source_of(name) == {f'reward_fn.{name}': __file__}
  imported = 'tests.tiny.TransformerConfig'
  assert score_fns.source_of(imported) == {
    f'reward_fn.{imported}': models_config.__file__
  }
  assert score_fns.source_of('math.sqrt') == {}
  config = rl_config.stage(0, '')
  config.reward_fn = f'{name}=2.5,math.sqrt'
  # With its weight: else another weight would pass for a file that has moved.
  label = f'reward_fn.{name}=2.5'
  found = rl.inputs(config)
  assert [key for key in found if key.startswith('reward_fn')] == [label]
  assert found[label] == __file__
  assert inputs.key_of(label, {'reward_fn': ''}) == 'reward_fn'


def test_a_run_goes_on_with_the_function_it_began_with(tmp_path, monkeypatch):
  """Neither its code nor its weight may change under way."""
  monkeypatch.syspath_prepend(tmp_path)
  file = tmp_path / 'my_rewards.py'
  file.write_text('def f(prompts, responses, metadata):\n  return [1.0]\n')
  folder = epath.Path(tmp_path / 'run')

  def start(weight):
    config = rl_config.stage(0, str(folder))
    config.reward_fn = f'my_rewards.f={weight}'
    stage = stages.Stage(config, run.flat(run.plain(config)), folder, '', rl)
    stages.check_unchanged([stage], config, folder, False)
    stages.record_inputs(stage)

  start(1)
  (folder / 'checkpoints' / '5').mkdir(parents=True)
  start(1)
  with pytest.raises(
    run.WorkdirError, match='reward_fn: was .*f=1.*, is now .*f=2'
  ):
    start(2)
  file.write_text('def f(prompts, responses, metadata):\n  return [2.0]\n')
  with pytest.raises(run.WorkdirError, match=r'my_rewards\.py had SHA-256'):
    start(1)


def test_a_judge_of_this_package_is_no_input():
  first = evaluate_config.get_config()
  first.models = 'sft=folder'
  second = best_of_n_config.get_config()
  for config, job in ((first, evaluate), (second, best_of_n)):
    assert not any(key.startswith('judge.') for key in job.inputs(config))
    config.judge = 'tests.test_score_fns.brevity'
    assert job.inputs(config)[f'judge.{config.judge}'] == __file__


def test_weights():
  assert score_fns.parse_weights('') == {}
  assert score_fns.parse_weights('a.f,b.g=-0.5') == {'a.f': 1.0, 'b.g': -0.5}
  for bad in ('a.f=x', '=2', 'a.f,a.f=2', 'a.f=inf'):
    with pytest.raises(ValueError, match='NAME or NAME=WEIGHT'):
      score_fns.parse_weights(bad)


def test_several_scores_are_summed_with_their_weights():
  def constant(value):
    return lambda sampled: jax.numpy.full(2, value)

  sampled = score_fns.Sampled(None, None, np.arange(2))
  one = score_fns.weighted({'a': (constant(2.0), 1.0)})
  assert one(sampled).tolist() == [2, 2]
  both = score_fns.weighted(
    {'a': (constant(2.0), 0.5), 'b': (constant(3.0), -1.0)}
  )
  assert both(sampled).tolist() == [-2, -2]  # 0.5 x 2 - 3.
  scaled = score_fns.weighted({'a': (constant(2.0), 3.0)})
  assert scaled(sampled).tolist() == [6, 6]
