"""Preference evaluation of two tiny policies and a recorded file."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import evaluate as config_file
from instruct_jax import model_fns, model_folder
from instruct_jax.data import records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import samples as samples_lib
from instruct_jax.jobs import preferences as experiment
from instruct_jax.models.config import TransformerConfig
from tests import tiny
from tests.fake_server import serve

pytestmark = pytest.mark.usefixtures('quick_compile')


def save_model(root, name, kind, tokenizer, seed):
  config = TransformerConfig(
    vocab_size=tokenizer.vocab_size,
    context_length=64,
    num_layers=1,
    width=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    vocab_multiple=8,
  )
  model = model_fns.init(kind, config, tiny.one_device(), jax.random.key(seed))
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda x: jnp.asarray(x + rng.normal(0, 0.3, x.shape), jnp.float32),
    model.params,
  )
  model_folder.save(
    root / name,
    model_fns.Model(kind, model.module, params, {}),
    tokenizer,
    {},
  )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp('preferences')
  tokenizer = tokenizer_lib.train_bpe(['a fox said that he left'] * 3, 270)
  tokenizer.save(root / 'tokenizer')
  for seed, name in enumerate(('one', 'two')):
    save_model(root, name, 'policy', tokenizer, seed)
  save_model(root, 'reward', 'scalar', tokenizer, 5)
  prompts = [
    records.Prompt(f'p{i}', f'fox {i}', category='chat' if i % 2 else 'open qa')
    for i in range(12)
  ]
  prompts.append(records.Prompt('long', 'fox ' * 40))
  records.write_jsonl(root / 'prompts.jsonl', prompts)
  recorded = [
    samples_lib.Sample('people', p.id, p.text, f'said {p.id}', 4, True)
    for p in prompts[2:]
  ]
  samples_lib.write_samples(
    root / 'recorded.jsonl',
    recorded + [dataclasses.replace(recorded[0], model='others')],
  )
  return root


def make_config(folder, workdir, judge='reward'):
  config = config_file.get_config(judge)
  with config.unlocked():
    config.workdir = str(workdir)
  config.models = (
    f'one={folder}/one,two={folder}/two,people={folder}/recorded.jsonl'
  )
  config.baseline = 'one'
  config.prompts = f'{folder}/prompts.jsonl'
  config.tokenizer = f'{folder}/tokenizer'
  config.prompt_length = 16
  config.response_length = 8
  config.batch_size = 8
  config.cache = f'{folder}/cache'
  config.reward_model = f'{folder}/reward'
  config.num_bootstrap = 50
  config.mesh = (1, 1, 1) if jax.device_count() == 1 else (8, 1, 1)
  return config


def read(path):
  return json.loads((path / 'preferences.json').read_text())


@pytest.fixture(scope='module')
def finished(folder, tmp_path_factory):
  workdir = epath.Path(tmp_path_factory.mktemp('run'))
  config = make_config(folder, workdir)
  config.pairs = 'all'
  return workdir, experiment.run(config, workdir)


def test_every_model_is_judged_on_the_same_prompts(finished):
  workdir, info = finished
  # 13 prompts: one too long for the models, two without a recorded answer.
  assert info == {'num_prompts': 10, 'num_judgements': 30}
  result = read(workdir)
  assert result['prompts'] == {
    'in the file': 13,
    'asked': 13,
    'answered by every model': 10,
  }
  assert result['models']['one']['prompts without'] == 1
  assert result['models']['people']['from'] == 'recorded'
  assert set(result['win_rate']) == {'two', 'people'}
  assert set(result['by_category']['two']) == {'chat', 'open qa'}
  assert set(result['bradley_terry']) == {'one', 'two', 'people'}
  assert result['ratings'] == {}
  text = (workdir / 'preferences.md').read_text()
  assert 'a reward model (no person)' in text
  assert 'this judge gives none' in text


def test_win_rates_follow_the_reward_models_scores(folder, finished):
  workdir, _ = finished
  tokenizer = tokenizer_lib.Tokenizer.load(folder / 'tokenizer')
  model = model_folder.load(
    folder / 'reward', 'scalar', tiny.one_device(), tokenizer
  )
  apply = jax.jit(
    lambda tokens, mask: model.module.apply(
      {'params': model.params}, tokens, mask
    )
  )
  scores = {}
  for sample in samples_lib.read_samples(workdir / 'samples.jsonl'):
    ids = tokenizer.encode(sample.prompt)
    ids += (
      sample.metadata['ids']
      if sample.metadata
      else [*tokenizer.encode(sample.response), tokenizer.eos_id]
    )
    tokens = jnp.array([ids + [0] * (40 - len(ids))], jnp.int32)
    scalars = apply(tokens, jnp.arange(40)[None] < len(ids))
    scores[sample.model, sample.prompt_id] = float(scalars[0, len(ids) - 1])
  wins = [
    (np.sign(score - scores['one', prompt]) + 1) / 2
    for (name, prompt), score in scores.items()
    if name == 'people'
  ]
  rate = read(workdir)['win_rate']['people']['by_prompt']['mean']
  assert rate == pytest.approx(np.mean(wins))


def test_answers_come_from_the_cache_and_follow_the_weights(
  folder, finished, tmp_path, monkeypatch
):
  workdir, _ = finished
  config = make_config(folder, tmp_path)
  config.models = f'renamed={folder}/one,two={folder}/two'
  config.baseline = 'renamed'
  monkeypatch.setattr(
    experiment.queries, 'generate_program', lambda *a: pytest.fail('sampled')
  )
  experiment.run(config, epath.Path(tmp_path))
  sources = read(epath.Path(tmp_path))['models']
  assert {s['from'] for s in sources.values()} == {'from the cache'}
  before = {
    (s.model, s.prompt_id): s.response
    for s in samples_lib.read_samples(workdir / 'samples.jsonl')
  }
  for sample in samples_lib.read_samples(epath.Path(tmp_path, 'samples.jsonl')):
    name = 'one' if sample.model == 'renamed' else sample.model
    if (name, sample.prompt_id) in before:
      assert sample.response == before[name, sample.prompt_id]


def test_another_seed_is_not_in_the_cache(folder, finished, tmp_path):
  config = make_config(folder, tmp_path)
  config.models = f'one={folder}/one,two={folder}/two'
  config.seed = 7
  config.cache = f'{tmp_path}/cache'
  experiment.run(config, epath.Path(tmp_path))
  sources = read(epath.Path(tmp_path))['models']
  assert {s['from'] for s in sources.values()} == {'sampled'}


def test_an_endpoint_judges_and_rates(folder, tmp_path, monkeypatch):
  monkeypatch.setenv('JUDGE_API_KEY', 'k')

  def answer(body, number):
    text = body['messages'][0]['content']
    if '<answer_1>' in text:
      said = '{"better": 1}'  # Whatever it sees first.
    else:
      said = '{"overall": 4, "hallucination": true}'
    return {
      'choices': [{'message': {'content': said}}],
      'usage': {'prompt_tokens': 100, 'completion_tokens': 10},
    }

  config = make_config(folder, tmp_path, 'http')
  config.models = f'one={folder}/one,two={folder}/two'
  with serve(answer) as (url, requests):
    config.endpoint.url = url
    config.endpoint.model = 'm'
    config.endpoint.prompt_price = 2.0
    config.endpoint.completion_price = 10.0
    experiment.run(config, epath.Path(tmp_path))
    sent = len(requests)
    (tmp_path / 'preferences.json').unlink()
    experiment.run(config, epath.Path(tmp_path))
    assert len(requests) == sent
  result = read(epath.Path(tmp_path))
  assert result['win_rate']['two']['by_prompt']['mean'] == 0.5
  assert any('contradicts itself in 100.0%' in a for a in result['alarms'])
  # The table of the places, its alarm, and every verdict as it was given.
  place = result['first_place']['two – one']
  assert (place['rate']['mean'], place['ties']) == (1.0, 0.0)
  assert place['num_verdicts'] == 2 * result['account']['judgements']
  assert any('first place wins 100.0% [100.0%' in a for a in result['alarms'])
  assert (
    '| all pairs | 1.000 [1.000, 1.000]'
    in (tmp_path / 'preferences.md').read_text()
  )
  lines = (tmp_path / 'judgements.jsonl').read_text().splitlines()
  for line in map(json.loads, lines):
    assert line['outcome'] == 0.5
    assert line['orders'] == [
      {'first': name, 'preference': 1.0, 'raw': '{"better": 1}'}
      for name in ('two', 'one')
    ]
  assert result['ratings']['two']['overall quality, 1 to 7']['mean'] == 4
  assert result['ratings']['one']['hallucination']['mean'] == 1
  # 300 tokens' worth of money a reply: 100 at 2 and 10 at 10 a million.
  replies = result['asking']['replies']
  assert result['asking']['cost'] == pytest.approx(replies * 300e-6)
  assert 'Alarm' in (tmp_path / 'preferences.md').read_text()


def test_a_judge_that_reads_answers_raises_no_alarm(folder, tmp_path):
  """One reply cannot be read: its verdict is kept, and counted, not used."""

  def answer(body, number):
    text = body['messages'][0]['content']
    first, second = (
      text.split(f'<answer_{i}>\n')[1].split(f'\n</answer_{i}>')[0]
      for i in (1, 2)
    )
    better = 1 if first > second else 2 if first < second else 0
    said = f'Mind {{this}}: {{"better": {better}}}'
    if 'fox 3\n' in text and 'said p3' in first:
      said = 'Neither.'
    return {'choices': [{'message': {'content': said}}]}

  config = make_config(folder, tmp_path, 'http')
  config.models = f'one={folder}/one,people={folder}/recorded.jsonl'
  config.rate_answers = False
  config.endpoint.key_variable = ''
  with serve(answer) as (url, _):
    config.endpoint.url = url
    config.endpoint.model = 'm'
    experiment.run(config, epath.Path(tmp_path))
  result = read(epath.Path(tmp_path))
  assert result['alarms'] == ['1 verdicts could not be understood']
  place = result['first_place']['people – one']
  assert (place['rate']['low'], place['rate']['high']) == (0.5, 0.5)
  lines = [
    json.loads(line)
    for line in (tmp_path / 'judgements.jsonl').read_text().splitlines()
  ]
  (unread,) = (line for line in lines if line['outcome'] is None)
  assert unread['prompt_id'] == 'p3'
  assert [o['raw'] for o in unread['orders']][0] == 'Neither.'
  assert unread['orders'][0]['preference'] is None
  assert len(lines) == 10
  assert result['account']['judgements'] == 9


def test_anonymous_people_judge(folder, finished, tmp_path):
  workdir, _ = finished
  found = samples_lib.read_samples(workdir / 'samples.jsonl')
  prompt = found[0].prompt
  texts = {s.model: s.response for s in found if s.prompt == prompt}
  records.write_jsonl(
    tmp_path / 'rankings.jsonl',
    [
      records.Comparison(prompt, (texts['one'], texts['people']), ranks)
      for ranks in ((2, 1), (1, 2), (2, 1))
    ],
  )
  config = make_config(folder, tmp_path, 'people')
  config.models = f'one={folder}/one,people={folder}/recorded.jsonl'
  config.rankings = f'{tmp_path}/rankings.jsonl'
  experiment.run(config, epath.Path(tmp_path))
  result = read(epath.Path(tmp_path))
  assert result['judge'].startswith('people (0 by name)')
  rate = result['win_rate']['people']
  assert rate['by_prompt']['mean'] == pytest.approx(2 / 3)
  assert (rate['by_labeler'], rate['num_judgements']) == (None, 3)
  assert result['account']['contradictions'] == 0
  lines = (tmp_path / 'judgements.jsonl').read_text().splitlines()
  outcomes = sorted(json.loads(line)['outcome'] for line in lines)
  assert outcomes == [0.0, 1.0, 1.0]


def test_people_judge(folder, finished, tmp_path):
  workdir, _ = finished
  answers = {}
  for sample in samples_lib.read_samples(workdir / 'samples.jsonl'):
    answers.setdefault(sample.prompt, {})[sample.model] = sample.response
  records.write_jsonl(
    tmp_path / 'rankings.jsonl',
    [
      records.Comparison(
        prompt,
        (texts['one'], texts['people']),
        ranks,
        labeler=labeler,
        metadata={'likert': [2, 5]},
      )
      for prompt, texts in list(answers.items())[:6]
      for labeler, ranks in (('ann', (2, 1)), ('bob', (1, 1)))
    ],
  )
  config = make_config(folder, tmp_path, 'people')
  config.models = f'one={folder}/one,people={folder}/recorded.jsonl'
  config.rankings = f'{tmp_path}/rankings.jsonl'
  experiment.run(config, epath.Path(tmp_path))
  result = read(epath.Path(tmp_path))
  rate = result['win_rate']['people']
  assert rate['by_prompt']['mean'] == 0.75  # Ann prefers it, Bob ties.
  assert (rate['by_labeler']['low'], rate['by_labeler']['high']) == (0.5, 1.0)
  assert result['account']['unjudged'] == 4
  assert '4 of 10 pairs have no verdict' in result['alarms']
  assert result['ratings']['people']['overall quality, 1 to 7']['mean'] == 5


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'models': 'one=a'}, 'must hold the baseline'),
    ({'baseline': 'three'}, "the baseline 'three' and one more"),
    ({'prompts': ''}, 'prompts is empty'),
    ({'reward_model': ''}, 'reward_model is empty; the reward judge'),
    ({'judge': 'oracle'}, "judge must be one of.*'oracle'"),
    ({'judge': 'http'}, 'endpoint.url is empty'),
    ({'pairs': 'some'}, "'some'"),
    ({'tokenizer': ''}, 'tokenizer is empty'),
    ({'num_prompts': 0}, 'num_prompts must be positive: 0'),
  ],
)
def test_bad_values_are_named(folder, tmp_path, changes, message):
  config = make_config(folder, tmp_path)
  config.update(changes)
  with pytest.raises(ValueError, match=message):
    experiment.validate(config)


def test_recorded_files_that_do_not_fit_are_named(folder, tmp_path):
  prompts = records.read_jsonl(folder / 'prompts.jsonl', records.Prompt)
  path = f'{folder}/recorded.jsonl'
  with pytest.raises(ValueError, match=r'others, people; choose one as x=.*#'):
    experiment.read_recorded('x', path, prompts)
  found = experiment.read_recorded('x', f'{path}#people', prompts)
  assert len(found) == 11 and {s.model for s in found} == {'x'}
  wrong = [dataclasses.replace(p, text='other') for p in prompts]
  with pytest.raises(ValueError, match='11 prompts have the ids of other'):
    experiment.read_recorded('people', path, wrong)
  with pytest.raises(ValueError, match='answers none of the 1 prompts'):
    experiment.read_recorded('people', path, prompts[:1])


def test_config_knows_the_judges():
  assert {config_file.get_config(j).judge for j in config_file.JUDGES} == set(
    config_file.JUDGES
  )
  with pytest.raises(ValueError, match="unknown judge 'oracle'"):
    config_file.get_config('oracle')
