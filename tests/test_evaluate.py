"""Evaluation of models that the config names, by judges that it names."""

import dataclasses
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import evaluate as config_file
from instruct_jax import asking, judge_fns, model_folder, queries, run_figures
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import figures, judges, model_card, report
from instruct_jax.evals import samples as samples_lib
from instruct_jax.infra import origin
from instruct_jax.infra import run as run_lib
from instruct_jax.jobs import evaluate
from instruct_jax.miniature import gold, tasks, world
from tests import made_figures, tiny
from tests.fake_server import serve

pytestmark = pytest.mark.usefixtures('quick_compile')


def save_prompts(root):
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


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp('evaluate')
  tokenizer = tokenizer_lib.train_bpe(['a fox said that he left'] * 3, 270)
  tokenizer.save(root / 'tokenizer')
  for seed, name in enumerate(('one', 'my_run/policy')):
    tiny.save_model(root, name, 'policy', tokenizer, seed)
  tiny.save_model(root, 'reward', 'scalar', tokenizer, 5)
  # What RL of whatever kind leaves beside its policy.
  (root / 'my_run' / 'metrics.jsonl').write_text(
    ''.join(
      json.dumps({'step': i, 'objective/kl': i, 'objective/score': -i}) + '\n'
      for i in range(1, 4)
    )
  )
  save_prompts(root)
  records.write_jsonl(
    root / 'documents.jsonl',
    [records.Document('a fox said that he left ' * 3) for _ in range(8)],
  )
  (root / 'verses.txt').write_text('left he said\n\n' * 8)
  records.write_jsonl(
    root / 'rankings.jsonl',
    [
      records.Comparison(f'fox {i}', ('a fox', 'he left', 'he'), (1, 2, 3))
      for i in range(4)
    ],
  )
  (root / 'prefixes.json').write_text(
    json.dumps({'prefixes': ['a fox: {prompt}', '{prompt}'], 'stop': 'f'})
  )
  return root


def make_config(folder, workdir, judge='reward'):
  """Two policies and a recorded file, judged by a reward model."""
  config = config_file.get_config(judge)
  with config.unlocked():
    config.workdir = str(workdir)
  config.models = (
    f'one={folder}/one,my_fork={folder}/my_run/policy,'
    f'people={folder}/recorded.jsonl'
  )
  config.baseline = 'one'
  config.prompts = f'{folder}/prompts.jsonl'
  config.tokenizer = f'{folder}/tokenizer'
  config.prompt_length = 16
  config.response_length = 8
  config.batch_size = 8
  config.cache = f'{folder}/cache'
  config.judge_model = f'{folder}/reward'
  config.num_bootstrap = 50
  config.mesh = (1, 1, 1) if jax.device_count() == 1 else (8, 1, 1)
  return config


def read(workdir):
  return json.loads((epath.Path(workdir) / 'summary.json').read_text())


def lines(workdir, name='judgements.jsonl'):
  return [*map(json.loads, (workdir / name).read_text().splitlines())]


@pytest.fixture(scope='module')
def finished(folder, tmp_path_factory):
  """Everything that can be measured without a miniature or a suite."""
  workdir = tmp_path_factory.mktemp('run')
  config = make_config(folder, workdir)
  config.models += f',prompted={folder}/one'
  config.other_models = f'start={folder}/one'
  config.pairs = 'all'
  config.reference = 'start'
  config.documents = (
    f'pretraining={folder}/documents.jsonl,verses={folder}/verses.txt'
  )
  config.row_length = 32
  config.reward_model = f'{folder}/reward'
  config.test_comparisons = f'{folder}/rankings.jsonl'
  config.comparisons = f'{folder}/rankings.jsonl'
  config.prompted = 'prompted'
  config.prefixes = f'{folder}/prefixes.json'
  config.prefix_prompts = config.prompts
  config.num_prefix_prompts = 4
  config.prefix_length = 16
  return workdir, tiny.run_evaluation(config)


def test_every_model_is_judged_on_the_same_prompts(finished):
  workdir, info = finished
  # 13 prompts: one too long for the models, two without a recorded answer.
  # Three pairs with the baseline, and three of the others.
  assert info == {'num_prompts': 10, 'num_judgements': 60}
  result = read(workdir)
  assert result['prompts'] == {
    'in the file': 13,
    'asked': 13,
    'answered by every model': 10,
  }
  assert result['models']['one']['prompts without'] == 1
  assert result['models']['people']['from'] == 'recorded'
  assert list(result['win_rate']) == ['one', 'my_fork', 'people', 'prompted']
  assert list(result['everyone'])[-1] == 'start'
  assert result['win_rate']['one']['rate'] == 0.5
  assert set(result['win_rate_by_category']['my_fork']) == {'chat', 'open qa'}
  assert set(result['bradley_terry']) == set(result['win_rate'])
  assert 'people – prompted' in result['pairs']
  assert result['likert'] == {}
  assert 'a reward model (no person)' in (workdir / 'report.md').read_text()


def test_a_forks_policy_is_in_report_plots_and_card(finished):
  """Nothing but the config names it: what lies beside it is shown."""
  workdir, _ = finished
  text = (workdir / 'report.md').read_text()
  assert '| my_fork | ' in text and 'Reward against KL' in text
  for name in ('win_rate', 'reward_kl', 'rl', 'reward_model'):
    assert (workdir / f'{name}.png').stat().st_size > 5000
    assert f'({name}.png)' in text
  # Of a method without a clip or an entropy there is no panel.
  card = (workdir / 'model_card.md').read_text()
  assert '| my_fork | ' in card
  assert 'my_fork' in (workdir / 'report.html').read_text()


def test_kl_and_loss_are_measured_from_the_reference(finished):
  workdir, _ = finished
  result = read(workdir)
  kl = result['extra']['kl']
  # Recorded answers have no log-probabilities, prompted ones other prompts.
  assert set(kl) == {'one', 'my_fork'}
  assert kl['my_fork']['k3'] > 0.1
  # The same weights, whatever their name.
  assert kl['one'] == pytest.approx({'signed mean': 0, 'k3': 0}, abs=1e-4)
  assert set(result['pretraining_loss']) == {'one', 'my_fork', 'start'}
  differences = result['intervals']['pretraining_loss_difference']
  assert differences['one']['mean'] == pytest.approx(0, abs=1e-6)
  loss = result['pretraining_loss']
  assert differences['my_fork']['mean'] == pytest.approx(
    loss['my_fork'] - loss['start'], abs=1e-5
  )
  verses = result['intervals']['other_text_loss']['verses']
  assert set(verses) == set(loss)
  assert verses['start']['mean'] != loss['start']
  assert 'On verses:' in (workdir / 'report.md').read_text()


def test_rankings_are_ordered_by_reward_model_judge_and_trivial_judges(
  finished,
):
  workdir, _ = finished
  reward = read(workdir)['intervals']['reward_model']
  accuracies = reward['rankings']['held-out comparisons']['accuracies']
  assert list(accuracies) == [
    'reward model',
    'judge',
    'length only',
    'bag of words (Bradley-Terry)',
  ]
  assert {row['num_pairs'] for row in accuracies.values()} == {12}
  # Judge and reward model are one model here.
  assert accuracies['judge'] == accuracies['reward model']
  # Every ranking is alike: words tell all of it.
  assert accuracies['bag of words (Bradley-Terry)']['accuracy'] == 1


def test_completions_of_rankings_have_their_number_of_tokens(folder):
  """Else a judge that looks at the length finds them all alike."""
  tokenizer = tokenizer_lib.Tokenizer.load(folder / 'tokenizer')
  given = records.Comparison('fox', ('a b c', 'a', ''), (1, 2, 3))

  def length(answers):
    return [answer.num_tokens for _, answer in answers]

  first, again = judge_fns.comparison_scores(length, [given] * 2, tokenizer)
  # "a", " ", "b", " ", "c" and the end.
  assert first.tolist() == again.tolist() == [6, 2, 1]


def test_completions_that_were_cut_are_scored_without_an_end_token(folder):
  """As the reward model was trained on them; else it is judged by others."""
  tokenizer = tokenizer_lib.Tokenizer.load(folder / 'tokenizer')
  texts, ranks = ('a b c', 'a'), (1, 2)
  cut = records.Comparison('fox', texts, ranks, ended=(False, True))
  whole = records.Comparison('fox', texts, ranks)
  seen = []

  def last_ids(answers):
    seen.extend((answer.num_tokens, answer.ended) for _, answer in answers)
    return [queries.answer_ids(tokenizer, a)[-1] for _, a in answers]

  found = judge_fns.comparison_scores(last_ids, [cut, whole, cut], tokenizer)
  (c,) = tokenizer.encode('c')
  end = tokenizer.end_id
  assert [each.tolist() for each in found] == [[c, end], [end, end], [c, end]]
  assert seen == [(5, False), (2, True), (6, True), (2, True)]
  # The same ids as in training.
  _, trained, _ = loader.comparison_ids([cut, whole], tokenizer)
  assert [[ids[-1] for ids in row] for row in trained] == [[c, end], [end, end]]


def test_answers_in_several_sets_of_rankings_are_scored_once(folder, tmp_path):
  rankings = {
    'one': [records.Comparison('fox', ('a b', 'b'), (1, 2), id='1')] * 2,
    'two': [
      records.Comparison('fox', ('a b', 'b'), (2, 1), id='1'),
      records.Comparison('hen', ('c', 'a b c'), (2, 1), id='2'),
    ],
  }
  for name, rows in rankings.items():
    records.write_jsonl(tmp_path / f'{name}.jsonl', rows)
  config = make_config(folder, tmp_path)
  config.reward_model = f'{folder}/reward'
  config.test_comparisons = ','.join(
    f'{n}={tmp_path}/{n}.jsonl' for n in rankings
  )
  seen = []

  def length(answers):
    seen.extend(answer.response for _, answer in answers)
    return [len(answer.response) for _, answer in answers]

  judge = types.SimpleNamespace(
    score=lambda answers: [-x for x in length(answers)],
    gives_scores=lambda: True,
    knows=lambda prompt: prompt.text == 'fox',  # All of the first set.
  )
  found = evaluate.order_rankings(config, {}, length, judge)
  shares = {
    name: {who: each.accuracy for who, each in rankings.accuracies.items()}
    for name, rankings in found.items()
  }
  assert shares == {
    'one': {'reward model': 1, 'judge': 0}, 'two': {'reward model': 0.5},
  }  # fmt: skip
  assert seen == ['a b', 'b', 'c', 'a b c', 'a b', 'b']


def test_the_prefix_that_the_reward_model_likes_best_is_taken(folder, finished):
  workdir, _ = finished
  found = read(workdir)['extra']['prefixes']['prompted']
  assert list(found) == ['a fox: {prompt}', '{prompt}']
  scores = [row['reward model'] for row in found.values()]
  chosen = [row['chosen'] for row in found.values()]
  assert chosen[int(np.argmax(scores))] == 'yes' and '' in chosen
  (stop,) = tokenizer_lib.Tokenizer.load(folder / 'tokenizer').encode('f')
  ids = [
    answer.metadata['ids']
    for answer in samples_lib.read_samples(workdir / 'samples.jsonl')
    if answer.model == 'prompted'
  ]
  # The cut is ours, the end put in its place.
  assert not any(stop in answer for answer in ids)


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
    score = float(scalars[0, len(ids) - 1])
    scores[sample.model, sample.prompt_id] = score
    assert sample.score_judge == pytest.approx(score, abs=1e-4)
  wins = [
    (np.sign(score - scores['one', prompt]) + 1) / 2
    for (name, prompt), score in scores.items()
    if name == 'people'
  ]
  rate = read(workdir)['win_rate']['people']['rate']
  assert rate == pytest.approx(np.mean(wins))


def test_answers_come_from_the_cache_and_follow_the_weights(
  folder, finished, tmp_path, monkeypatch
):
  workdir, _ = finished
  config = make_config(folder, tmp_path)
  config.models = f'renamed={folder}/one,two={folder}/my_run/policy'
  config.baseline = 'renamed'
  with monkeypatch.context() as patch:
    patch.setattr(
      queries, 'generate_program', lambda *a: pytest.fail('sampled')
    )
    tiny.run_evaluation(config)
    sources = read(tmp_path)['models']
    assert {s['from'] for s in sources.values()} == {'from the cache'}
  before = {
    (s.model, s.prompt_id): s.response
    for s in samples_lib.read_samples(workdir / 'samples.jsonl')
  }
  names = {'renamed': 'one', 'two': 'my_fork'}
  for sample in samples_lib.read_samples(tmp_path / 'samples.jsonl'):
    key = names[sample.model], sample.prompt_id
    if key in before:
      assert sample.response == before[key]
  # Another seed is not in the cache.
  config.seed = 7
  config.cache = f'{tmp_path}/cache'
  tiny.run_evaluation(config)
  sources = read(tmp_path)['models']
  assert {s['from'] for s in sources.values()} == {'sampled'}


# --- Judges -------------------------------------------------------------------


def likes_people(prompts, responses, metadata):
  """A user's judge: a function of the texts."""
  assert prompts[0] == 'fox 2' and metadata[0]['id'] == 'p2'
  return [float('said p' in response) for response in responses]


WORLD = figures.World(
  about='Foxes.',
  has_people=True,
  label_fn=lambda prompt, text: {'says its id': prompt.id in text},
  tables_fn=lambda prompts, texts: {
    'Lengths': {
      name: {'characters': float(np.mean([len(text) for text in several]))}
      for name, several in texts.items()
    }
  },
)


def test_a_users_function_judges_in_a_users_world(folder, finished, tmp_path):
  config = make_config(folder, tmp_path)
  config.judge = 'tests.test_evaluate.likes_people'
  config.judge_model = ''
  config.world = 'tests.test_evaluate.WORLD'
  tiny.run_evaluation(config)
  result = read(tmp_path)
  assert 'tests.test_evaluate.likes_people' in result['judge']
  assert result['win_rate']['people']['rate'] == 1
  assert result['win_rate']['my_fork']['rate'] == 0.5
  assert result['metadata']['people'] == {'says its id': 1}
  assert result['metadata']['one'] == {'says its id': 0}
  # "said p2" has seven characters, "said p10" and "said p11" one more.
  assert result['extra']['Lengths']['people']['characters'] == 7.2
  text = (tmp_path / 'report.md').read_text()
  assert '## Lengths' in text and 'first place wins' not in text
  assert 'Foxes.' in (tmp_path / 'model_card.md').read_text()


def test_recorded_files_and_the_gold_judge_need_no_model(tmp_path, rng):
  the_world = world.make_world(3)
  prompts = tasks.write_prompts(the_world, 30, rng)
  records.write_jsonl(tmp_path / 'prompts.jsonl', prompts)
  texts = {'sft': 'the wolf is red .', 'silent': ''}
  samples_lib.write_samples(
    tmp_path / 'recorded.jsonl',
    [
      samples_lib.Sample(name, prompt.id, prompt.text, text, 5, True)
      for name, text in texts.items()
      for prompt in prompts
    ],
  )
  config = config_file.get_config()
  with config.unlocked():
    config.workdir = str(tmp_path)
  config.models = ','.join(
    f'{name}={tmp_path}/recorded.jsonl' for name in texts
  )
  config.prompts = f'{tmp_path}/prompts.jsonl'
  config.world = 'instruct_jax.worlds.miniature.WORLD'
  config.num_bootstrap = 20
  with pytest.raises(ValueError, match='world_seed is not given'):
    tiny.run_evaluation(config)
  config.world_seed = 3
  tiny.run_evaluation(config)
  result = read(tmp_path)
  assert result['asking']['world_seed'] == 3
  wins = [
    float(gold.utility(gold.judge(p, '', the_world)))
    - gold.utility(gold.judge(p, texts['sft'], the_world))
    for p in prompts
  ]
  assert result['win_rate']['silent']['rate'] == pytest.approx(
    np.mean((np.sign(wins) + 1) / 2)
  )
  assert 1 <= result['likert']['silent']['mean'] <= 7
  assert 'hallucination' in result['metadata']['sft']
  assert result['asking']['empty'] == 30
  card = (tmp_path / 'model_card.md').read_text()
  assert 'labels and judgements are by programs' in card


def test_what_a_reward_model_cannot_read_is_not_asked_or_left_out(
  folder, tmp_path, capsys
):
  tokenizer = tokenizer_lib.Tokenizer.load(folder / 'tokenizer')
  tiny.save_model(tmp_path, 'short', 'scalar', tokenizer, 5, 20)
  config = make_config(folder, tmp_path / 'run')
  config.judge_model = f'{tmp_path}/short'
  message = 'judge_model: prompt_length .* ask for 24 .* has 20; lower them'
  with pytest.raises(ValueError, match=message):
    tiny.run_evaluation(config)
  # Of recorded answers the lengths are not known before they are read.
  prompts = records.read_jsonl(folder / 'prompts.jsonl', records.Prompt)[:6]
  texts = {'people': 'he', 'wordy': 'a fox'}
  answers = [
    samples_lib.Sample(
      name, p.id, p.text, text * (9 if p.id == 'p3' else 1), 4, True
    )
    for name, text in texts.items()
    for p in prompts
  ]
  path = tmp_path / 'recorded.jsonl'
  samples_lib.write_samples(path, answers)
  config.models = ','.join(f'{name}={path}#{name}' for name in texts)
  config.baseline = 'people'
  config.prompt_length = config.response_length = None
  config.reward_model = config.judge_model
  info = tiny.run_evaluation(config)
  assert info == {'num_prompts': 5, 'num_judgements': 5}
  said = capsys.readouterr().out
  for key in ('reward_model', 'judge_model'):
    assert (
      'evaluate: 1 of 6 prompts with their answers left out: do not fit the '
      f'context of {key} (20 tokens)\n'
    ) in said
  assert read(tmp_path / 'run')['prompts'] == {
    'in the file': 13,
    'asked': 13,
    'too long to score': 1,
    'answered by every model': 5,
  }


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
  config.models = f'one={folder}/one,my_fork={folder}/my_run/policy'
  with serve(answer) as (url, requests):
    config.endpoint.url = url
    config.endpoint.model = 'm'
    config.endpoint.prompt_price = 2.0
    config.endpoint.completion_price = 10.0
    tiny.run_evaluation(config)
    sent = len(requests)
    (tmp_path / 'summary.json').unlink()
    tiny.run_evaluation(config)
    assert len(requests) == sent
  result = read(tmp_path)
  assert result['win_rate']['my_fork']['rate'] == 0.5
  assert any('contradicts itself in 100.0%' in a for a in result['alarms'])
  # The table of the places, its alarm, and every verdict as it was given.
  place = result['first_place']
  assert (place['rate']['mean'], place['ties']) == (1.0, 0.0)
  assert place['num_verdicts'] == 2 * result['asking']['judgements']
  assert any('first place wins 100.0% [100.0%' in a for a in result['alarms'])
  text = (tmp_path / 'report.md').read_text()
  assert '| my_fork – one | 0.500 [0.500, 0.500] | 1.000 [1.000, 1.0' in text
  for line in lines(tmp_path):
    assert line['outcome'] == 0.5
    assert line['orders'] == [
      {'first': name, 'preference': 1.0, 'raw': '{"better": 1}'}
      for name in ('my_fork', 'one')
    ]
  assert result['likert']['my_fork']['mean'] == 4
  assert result['metadata']['one'] == {'hallucination': 1}
  rating = lines(tmp_path, 'ratings.jsonl')[0]
  assert (rating['model'], rating['prompt_id'], rating['likert']) == (
    'one', 'p0', 4.0,
  )  # fmt: skip
  # 300 tokens' worth of money a reply: 100 at 2 and 10 at 10 a million.
  replies = result['asking']['replies']
  assert result['asking']['cost'] == pytest.approx(replies * 300e-6)


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
    tiny.run_evaluation(config)
  result = read(tmp_path)
  assert result['alarms'] == ['1 verdicts could not be understood']
  place = result['first_place']['rate']
  assert (place['low'], place['high']) == (0.5, 0.5)
  (unread,) = (line for line in lines(tmp_path) if line['outcome'] is None)
  assert unread['prompt_id'] == 'p3'
  assert [o['raw'] for o in unread['orders']][0] == 'Neither.'
  assert unread['orders'][0]['preference'] is None
  assert len(lines(tmp_path)) == 10
  assert result['asking']['judgements'] == 9


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
  tiny.run_evaluation(config)
  result = read(tmp_path)
  assert result['judge'].startswith('people (0 by name)')
  rate = result['win_rate']['people']
  assert rate['rate'] == pytest.approx(2 / 3)
  assert (rate['by_labeler'], rate['num_judgements']) == (None, 3)
  assert result['asking']['contradictions'] == 0
  outcomes = sorted(line['outcome'] for line in lines(tmp_path))
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
  tiny.run_evaluation(config)
  result = read(tmp_path)
  rate = result['win_rate']['people']
  assert rate['rate'] == 0.75  # Ann prefers it, Bob ties.
  assert (rate['by_labeler']['low'], rate['by_labeler']['high']) == (0.5, 1.0)
  assert result['asking']['unjudged'] == 4
  assert '4 of 10 pairs have no verdict' in result['alarms']
  assert result['likert']['people']['mean'] == 5


# --- What is refused ----------------------------------------------------------


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'models': 'one=a'}, "the baseline 'one' and at least one other"),
    ({'models': 'one'}, 'models must be NAME=FOLDER'),
    ({'baseline': 'three'}, "baseline names ['three']; models are"),
    ({'reference': 'three'}, "reference names ['three']"),
    ({'other_models': 'one=a'}, "'one' is in both models and other_models"),
    ({'prompts': ''}, 'prompts is empty'),
    ({'judge_model': ''}, 'judge_model is empty; the judge'),
    ({'judge': 'oracle'}, "judge 'oracle' is not a dotted name"),
    ({'judge': 'instruct_jax.nowhere.f'}, "judge 'instruct_jax.nowhere.f'"),
    ({'world': 'instruct_jax.nowhere.W'}, "world 'instruct_jax.nowhere.W'"),
    ({'world': 'instruct_jax.worlds.miniature.Gold'}, 'is not a figures.World'),
    ({'pairs': 'some'}, "of my_fork, people: 'some'"),
    ({'pairs': 'people=four'}, 'pairs must be all, or NAME=NAME of my_fork'),
    ({'pairs': 'one=people'}, "people: 'one=people'"),
    ({'tokenizer': ''}, 'tokenizer is empty'),
    ({'num_prompts': 0}, 'num_prompts must be positive: 0'),
    ({'test_comparisons': 'a'}, 'test_comparisons needs reward_model'),
    ({'reference': 'people'}, "reference names ['people'], recorded answers"),
    ({'prompted': 'people'}, "prompted names ['people'], recorded answers"),
    ({'prompted': 'one'}, 'prompted models need prefixes, and reward_model'),
  ],
)
def test_bad_values_are_named(folder, tmp_path, changes, message):
  config = make_config(folder, tmp_path)
  config.update(changes)
  with pytest.raises(ValueError) as error:
    evaluate.validate(config)
  assert message in str(error.value) and '\n' not in str(error.value)


def test_each_pair_is_judged_once_in_either_order(folder, tmp_path):
  config = make_config(folder, tmp_path)
  config.models += ',other=b'
  config.pairs = 'my_fork=people,people=other,people=my_fork,people=other'
  assert evaluate.named_pairs(config) == [
    ('my_fork', 'people'),
    ('people', 'other'),
  ]


def test_recorded_files_that_do_not_fit_are_named(folder):
  prompts = records.read_jsonl(folder / 'prompts.jsonl', records.Prompt)
  path = f'{folder}/recorded.jsonl'

  def recorded(name, source, prompts, number=1):
    model = asking.Model(name, source, True, False)
    return asking.read_recorded(model, prompts, number)

  with pytest.raises(ValueError, match=r'others, people; choose one as x=.*#'):
    recorded('x', path, prompts)
  found = recorded('x', f'{path}#people', prompts)
  assert len(found) == 11 and {s.model for s in found} == {'x'}
  wrong = [dataclasses.replace(p, text='other') for p in prompts]
  with pytest.raises(ValueError, match='11 prompts have ids of other'):
    recorded('people', path, wrong)
  with pytest.raises(ValueError, match='answers none of the 1 prompts'):
    recorded('people', path, prompts[:1])
  with pytest.raises(ValueError, match=r'none of .*\(2 answers each\)'):
    recorded('people', path, prompts, 2)


def test_a_stop_that_sampling_cannot_meet_is_an_error(tmp_path):
  tokens = tokenizer_lib.train_bpe(['abc'], 258)
  path = tmp_path / 'prefixes.json'
  run_lib.write_json(path, {'prefixes': ['{prompt}'], 'stop': '\n'})
  (newline,) = tokens.encode('\n')
  found = asking.read_prefixes(str(path), tokens)
  assert found == [asking.Prefix('{prompt}', newline)]
  run_lib.write_json(path, {'prefixes': ['{prompt}'], 'stop': 'the end'})
  with pytest.raises(ValueError, match='has 7 tokens'):
    asking.read_prefixes(str(path), tokens)


@pytest.mark.parametrize(
  'content',
  [
    {'prefixes': ['{prompt}']},
    {'prefixes': [], 'stop': 'a'},
    {'prefixes': ['no slot'], 'stop': 'a'},
    {'prefixes': '{prompt}', 'stop': 'a'},
    {'prefixes': ['{prompt}'], 'stop': 3},
    ['{prompt}'],
  ],
)
def test_prefixes_of_another_form_are_refused(tmp_path, content):
  path = tmp_path / 'prefixes.json'
  run_lib.write_json(path, content)
  with pytest.raises(ValueError, match=r'prefixes.json: expected .*stop'):
    asking.read_prefixes(str(path), tokenizer_lib.train_bpe(['abc'], 258))


def test_ids_without_a_tokenizer_are_not_used():
  tokens = tokenizer_lib.train_bpe(['abc'], 258)
  answer = samples_lib.Sample('people', 'p', 'a', 'c', 1, True)
  expected = [*tokens.encode('c'), tokens.end_id]
  fingerprint = {'tokenizer': tokens.fingerprint}
  for known, ids in (
    ({'ids': [5]} | fingerprint, [5]),
    ({'ids': [5]}, expected),
    ({'ids': []} | fingerprint, expected),
  ):
    found = dataclasses.replace(answer, metadata=known)
    assert queries.answer_ids(tokens, found) == ids


def test_config_knows_the_judges():
  for name, judge in config_file.JUDGES.items():
    assert config_file.get_config(name).judge == judge
    assert issubclass(judge_fns.find(judge), judges.Judge)
  with pytest.raises(ValueError, match="unknown judge 'oracle'"):
    config_file.get_config('oracle')


def test_the_card_shows_what_a_method_is_configured_with():
  """Keys of a fork that nobody here knows are among them."""
  stage = {
    'name': 'my_fork',
    'init': '/sft/model',
    'checkpoint_every': 5,
    'num_slots': 64,
    'my_decay': 0.9,
    'lora': {'rank': 0, 'alpha': 16.0},
  }
  assert run_figures.settings_of(stage) == {'my_decay': 0.9}
  adapted = run_figures.settings_of(
    stage | {'lora': {'rank': 4, 'alpha': 16.0}}
  )
  assert adapted == {'my_decay': 0.9, 'lora.rank': 4, 'lora.alpha': 16.0}


def save_run(root, model, name, **changes):
  """A finished run of one stage that made a model; returns its folder."""
  place = root / name
  shutil.copytree(model, place)
  stage = {
    'experiment': name,
    'learning_rate': 1e-3,
    'my_decay': 0.9,
    'num_episodes': 10,
    'num_epochs': 1,
    'prompt_length': 4,
    'response_length': 6,
    'ptx_coef': 0.0,
    'ptx_per_episode': 1,
    'ptx_row_length': 8,
    'reward_model': '',
  } | changes
  run_lib.write_json(
    root / 'config.json', {'stages': {name: stage}, 'stage_order': [name]}
  )
  run_lib.write_json(place / 'done.json', {'info': {}, 'seconds': 2.5})
  return place


def test_what_the_run_of_a_fork_says(folder, tmp_path):
  """A method of a name that nobody here knows, without a value model."""
  place = save_run(tmp_path / 'run', folder / 'my_run', 'my_fork')
  run_lib.write_json(place / 'alarms.json', {'length': 'too long'})
  found = run_figures.of_models(
    make_config(folder, tmp_path),
    {'mine': asking.Model('mine', f'{place}/policy', True, False)},
  )
  assert [row['step'] for row in found['rl_metrics']['mine']] == [1, 2, 3]
  assert found['alarms'] == ['mine: too long']
  assert found['seconds'] == {'my_fork': 2.5}
  trained = found['trained']['my_fork']
  assert trained.settings['my_decay'] == 0.9
  assert 'experiment' not in trained.settings
  # 100 tokens: sampled and scored by old and reference policy, 3 x 2 P; one
  # update, 6 P.
  assert trained.operations == 100 * 12 * found['parameters']['mine']


def test_two_runs_of_one_pipeline_are_told_apart(folder, tmp_path):
  """Stages, data sets and hygiene of the same names, with other contents."""
  models = {}
  for number, run in enumerate(('left', 'right'), start=1):
    model = folder / 'my_run'
    place = save_run(tmp_path / run, model, 'fork', my_decay=number)
    done = {'info': {'selected_epoch': number}, 'seconds': float(number)}
    run_lib.write_json(place / 'done.json', done)
    run_lib.write_json(place / 'epochs.json', [{'epoch': 1, 'valid_loss': 1}])
    run_lib.write_json(place / 'hygiene.json', {'prompts': {'twice': number}})
    (place / 'prompts.jsonl').write_text('{}\n' * number)
    source = f'{place}/policy'
    models[run] = asking.Model(run, source, True, False)
  found = run_figures.of_models(make_config(folder, tmp_path), models)
  assert found['seconds'] == {'fork (left)': 1, 'fork (right)': 2}
  trained = {k: v.settings['my_decay'] for k, v in found['trained'].items()}
  assert trained == found['seconds']
  assert found['data_sizes'] == {'prompts (left)': 1, 'prompts (right)': 2}
  assert found['hygiene'] == {
    'prompts twice (left)': 1,
    'prompts twice (right)': 2,
  }
  selected = {name: epochs.selected for name, epochs in found['epochs'].items()}
  assert selected == {'left': 1, 'right': 2}
  shown = dataclasses.replace(made_figures.full(), **found)
  card, text = model_card.make_card(shown), report.make_markdown(shown, set())
  for number, name in enumerate(('left', 'right'), start=1):
    assert f'- **fork ({name})**: ' in card and f'my_decay {number}' in card
    for shown_text in (card, text):
      assert f'| prompts ({name}) | {number} |' in shown_text


def test_operations_are_not_known_without_lengths_or_reward_model(
  folder, tmp_path
):
  """Recorded answers have no lengths, and a copied run no reward model."""
  config = make_config(folder, tmp_path)
  config.prompt_length = config.response_length = None
  place = save_run(tmp_path / 'run', folder / 'my_run', 'reward')
  stage = next(iter(origin.stages_behind([f'{place}/policy']).values()))

  def operations(**changes):
    own = {**stage.config, **changes}
    return run_figures.operations_of(
      config, dataclasses.replace(stage, config=own)
    )

  assert operations() > 0
  assert operations(reward_model='/elsewhere/reward/model') is None
  assert operations(reward_model='hf:nobody/nothing') is None
  run_lib.write_json(place / 'results.json', {'num_forwards': 3})
  rankings = {'experiment': 'reward', 'comparisons': 'x', 'num_epochs': 1}
  stage = dataclasses.replace(stage, config=rankings)
  assert operations() is None
  config.prompt_length, config.response_length = 6, 4
  # 3 answers of 10 tokens, forward and backward.
  size = model_folder.shape_of(place / 'policy').num_params
  assert operations() == 30 * 6 * size
