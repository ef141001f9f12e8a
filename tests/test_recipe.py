"""A published folder and preferences, by one command, to a report."""

import collections
import dataclasses
import json
import pathlib
import shutil
from unittest import mock

import jax
import ml_collections
import numpy as np
import pytest
from etils import epath

from configs import recipe as recipe_config
from configs import sentiment as sentiment_config
from instruct_jax import asking, model_fns, recipe, score_fns
from instruct_jax.data import records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import pipeline, sharding
from instruct_jax.jobs import rank
from instruct_jax.models import hf
from instruct_jax.worlds import (
  preference_lengths,
  preference_sources,
  preference_splits,
  preferences,
  sentiment,
)
from tests import published, test_published_stages

LLAMA = dataclasses.replace(test_published_stages.LLAMA, context_length=128)


def brief(prompts, responses, metadata):
  """A judge who likes short answers."""
  del prompts, metadata
  return [-len(response) for response in responses]


def long_winded(prompts, responses, metadata):
  """One who likes long ones."""
  return [-score for score in brief(prompts, responses, metadata)]


def write_model(folder: pathlib.Path) -> None:
  """A random model with a chat template and two tokens that end answers."""
  mesh = sharding.make_mesh((1, -1, 1))
  model = model_fns.init('policy', LLAMA, mesh, jax.random.key(1))
  folder.mkdir(parents=True)
  hf.save(folder, LLAMA, model.params)
  published.save_byte_tokenizer(folder, template=published.TEMPLATE)


def edit(folder, **changes):
  values = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(values | changes))


def write_scorer(folder: pathlib.Path) -> None:
  """A random reward model in the same format."""
  mesh = sharding.make_mesh((1, -1, 1))
  model = model_fns.init('scalar', LLAMA, mesh, jax.random.key(2))
  folder.mkdir(parents=True)
  hf.save(folder, LLAMA, model.params)
  backend = published.save_byte_tokenizer(folder, template=published.TEMPLATE)
  edit(folder, pad_token_id=backend.token_to_id('</s>'))


def hh_line(number: int, answer: str = '') -> str:
  """A dialogue of two turns, or of four, in the format of the HH files."""
  asked = f'\n\nHuman: What is {number}?\n\nAssistant: '
  if number % 3 == 0:
    asked = f'\n\nHuman: Hi {number}\n\nAssistant: Yes?{asked}'
  better = answer or f'It is {number}.'
  return json.dumps({'chosen': f'{asked}{better}', 'rejected': f'{asked}No.'})


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> pathlib.Path:
  """Preferences with a publisher's test split, documents, and a model."""
  folder = tmp_path_factory.mktemp('given')
  write_model(folder / 'model')
  write_scorer(folder / 'scorer')
  (folder / 'hh').mkdir()
  lines = [hh_line(number) for number in range(150)]
  (folder / 'hh' / 'train.jsonl').write_text('\n'.join(lines))
  # One of them is in the training file, too.
  lines = [hh_line(number) for number in range(149, 170)]
  (folder / 'hh' / 'test.jsonl').write_text('\n'.join(lines))
  texts = [records.Document(f'The number {i} is a number.') for i in range(90)]
  records.write_jsonl(folder / 'documents.jsonl', texts)
  return folder


def make_config(data, preset='smoke', **changes):
  config = recipe_config.get_config(preset)
  with config.unlocked():
    config.model = str(data / 'model')
    config.preferences = f'hh:{data / "hh"}'
    config.documents = str(data / 'documents.jsonl')
    config.other_documents = f'same={config.documents}'
    config.compute_dtype = 'float32'
    config.stages.data.max_prompt_length = 72
    config.stages.evaluate.batch_size = 5  # Does not divide over the devices.
    for key, value in changes.items():
      config[key] = value
  return config


def prepared(config, workdir):
  """The config after `prepare`; its stages know the work directory."""
  is_dry = config.dry_run
  assert recipe.prepare(config, epath.Path(workdir)) != is_dry
  with config.unlocked():
    config.workdir = str(workdir)
  return config


def go(config, workdir):
  assert recipe.prepare(config, epath.Path(workdir))
  described = config.copy_and_resolve_references()
  with config.unlocked():
    config.workdir = str(workdir)
  pipeline.run_all(config, epath.Path(workdir), described)


# --- The data stage -----------------------------------------------------------


def make_records(config):
  tokenizer = preferences.load_tokenizer(config.stages.data)
  return preferences.make_records(config.stages.data, tokenizer, 128)


def test_no_conversation_is_on_two_sides(data):
  files, lengths, report = make_records(make_config(data))
  sides = {
    name: set(map(records.opening, files[name]))
    for name in files
    if not name.startswith('documents')
  }
  train = ('comparisons_train', 'demonstrations_train', 'prompts_train')
  for name in train:
    for other in ('prompts_valid', 'prompts_test', 'comparisons_test'):
      assert not sides[name] & sides[other], (name, other)
  # The judge's conversations are its own.
  for split in ('train', 'valid'):
    assert sides[f'comparisons_{split}']
    both = sides[f'comparisons_{split}'] & sides[f'judge_comparisons_{split}']
    assert not both
  assert len(files['comparisons_test']) == 21  # The publisher's split.
  reason = 'records that begin like one of the test set'
  assert report['left_out'][reason] == 1
  assert lengths['row_length'] == (
    lengths['prompt_length'] + lengths['response_length']
  )


def test_personal_data_behind_a_clean_opening_is_not_learned_from(
  data, tmp_path
):
  asked = '\n\nHuman: Hi {}\n\nAssistant: Yes?\n\nHuman: {}\n\nAssistant: '
  lines = []
  for number in range(120):
    for text in (f'What is {number}?', f'Write to jo{number}@mail.org'):
      begin = asked.format(number, text)
      row = {'chosen': f'{begin}It is.', 'rejected': f'{begin}No.'}
      lines.append(json.dumps(row))
  (tmp_path / 'train.jsonl').write_text('\n'.join(lines))
  config = make_config(data, preferences=f'hh:{tmp_path / "train.jsonl"}')
  with config.unlocked():
    config.stages.data.prompt_length = 100
    config.stages.data.response_length = 16
  files, _, report = make_records(config)
  for name in ('comparisons_train', 'judge_comparisons_train'):
    assert files[name]
    assert not [row for row in files[name] if '@' in row.prompt]
  assert not [r for r in files['demonstrations_train'] if '@' in r.prompt]
  assert report['left_out']['train records with personal data'] > 10


def test_the_chat_template_and_the_best_answer_are_taken(data):
  config = make_config(data)
  tokenizer = preferences.load_tokenizer(config.stages.data)
  assert tokenizer.template == tokenizer_lib.CHAT
  files, _, _ = make_records(config)
  for row in files['demonstrations_train']:
    assert row.response.startswith(' It is ')
    assert row.turns[-1].role == 'user'


def test_lengths_hold_the_share_and_say_what_they_drop(data):
  config = make_config(data)
  stage = config.stages.data
  tokenizer = preferences.load_tokenizer(stage)
  rows = preference_sources.read(stage, 'preferences', collections.Counter())[0]
  prompts = np.array([len(ids) for ids in tokenizer.encode_prompts(rows)])
  answers = np.array(
    [
      max(map(len, tokenizer.encode_responses(row.completions, ended=True)))
      for row in rows
    ]
  )
  found = preference_lengths.propose_lengths(stage, tokenizer, rows, 128)
  share = np.mean(prompts <= found['prompt_length'])
  assert found['dropped']['prompts'] == pytest.approx(1 - share)
  assert found['prompt_length'] % 8 == 0
  total = found['prompt_length'] + found['response_length']
  too_long = np.mean(prompts + answers > total)
  assert found['dropped']['rankings and demonstrations'] == pytest.approx(
    too_long
  )
  stage.prompt_length = 40
  assert (
    preference_lengths.propose_lengths(stage, tokenizer, rows, 128)[
      'prompt_length'
    ]
    == 40
  )
  with pytest.raises(ValueError, match='context of 32 tokens'):
    preference_lengths.propose_lengths(stage, tokenizer, rows, 32)


def comparison(number: int, labeler: str) -> records.Comparison:
  return records.Comparison(
    f'prompt {number}', ('a', 'b'), (1, 2), labeler=labeler
  )


def test_no_labeler_is_on_two_sides():
  rows = [comparison(i, f'l{i % 7}') for i in range(140)]
  rows += [comparison(i, f'l{(i + 1) % 7}') for i in range(140)]
  reward, judge, crossed = preference_splits.judge_side(rows, 0.4, 0)
  assert {r.labeler for r in reward} & {r.labeler for r in judge} == set()
  assert {r.prompt for r in reward} & {r.prompt for r in judge} == set()
  assert len(reward) + len(judge) + crossed == len(rows)
  assert min(len(reward), len(judge)) > 30
  # One labeler a prompt: nothing is lost.
  rows = [comparison(i, f'l{i % 7}') for i in range(140)]
  assert preference_splits.judge_side(rows, 0.4, 0)[2] == 0


def test_one_labeler_does_not_leave_the_judge_without_rankings():
  rows = [comparison(i, 'only') for i in range(140)]
  reward, judge, crossed = preference_splits.judge_side(rows, 0.4, 0)
  assert {r.prompt for r in reward} & {r.prompt for r in judge} == set()
  assert min(len(reward), len(judge)) > 30 and crossed == 0


def test_held_out_text_has_about_so_many_words(data):
  config = make_config(data)
  stage = config.stages.data
  whole = make_records(config)[0]
  assert [len(whole[f'documents_{name}']) for name in ('valid', 'same')] == [
    *(8, 8),  # At most `max_valid`; a tenth of 90 documents are 9.
  ]
  stage.max_valid_words = 13  # Six words a document.
  files = make_records(config)[0]
  assert files['documents_valid'] == whole['documents_valid'][:3]
  assert files['documents_same'] == whole['documents_same'][:3]
  # Both are of one source, and what is held out is not learned.
  held = {*files['documents_valid'], *files['documents_same']}
  assert len(files['documents_train']) == 90 - len(held)
  assert not held & set(files['documents_train'])
  stage.max_valid = 0
  assert len(make_records(config)[0]['documents_same']) == 3
  stage.max_valid_words = 0
  with pytest.raises(ValueError, match='left for documents_train: .* held out'):
    make_records(config)
  stage.max_valid_words = -1
  with pytest.raises(ValueError, match='max_valid_words must be 0 or more: -1'):
    preferences.validate(stage)


def test_best_answers_leave_ties_out():
  rows = [
    records.Comparison('p', ('a', 'b', 'c'), (2, 1, 3)),
    records.Comparison('q', ('a', 'b'), (1, 1)),
    records.Comparison('r', (' ', 'b'), (1, 2)),
  ]
  found = preference_sources.best_answers(rows)
  assert [(d.prompt, d.response) for d in found] == [('p', 'b')]
  # A demonstration ends where it ends; this one was cut there.
  cut = records.Comparison('p', ('a', 'b'), (2, 1), ended=(True, False))
  assert not preference_sources.best_answers([cut])


# --- What is given, and the device --------------------------------------------


def test_stages_of_given_models_are_left_out(data, tmp_path):
  model, scorer = str(data / 'model'), str(data / 'scorer')
  config = prepared(make_config(data, sft_model=model), tmp_path)
  assert not {'sft', 'rl_init', 'select'} & set(config.stage_order)
  assert config.stages.reward.init == config.stages.ppo.init == model
  assert f'sft={model}' in config.stages.evaluate.models
  assert config.stages.evaluate.reference == 'sft'
  config = prepared(make_config(data, reward_model=scorer), tmp_path)
  assert 'reward' not in config.stage_order
  assert config.stages.ppo.reward_model == scorer
  assert config.stages.data.judge_fraction == 0.4
  config = prepared(make_config(data, judge_model=scorer), tmp_path)
  assert 'judge' not in config.stage_order
  assert config.stages.evaluate.judge_model == scorer
  # What it learned from is not known, and no rankings are kept for it.
  assert config.stages.evaluate.judge == 'instruct_jax.judge_fns.RewardModel'
  assert config.stages.data.judge_fraction == 0
  files, *_ = make_records(config)
  assert not [name for name in files if name.startswith('judge')]
  other = prepared(make_config(data, judge='tests.test_recipe.brief'), tmp_path)
  assert 'judge' not in other.stage_order
  assert len(make_records(other)[0]['comparisons_train']) == len(
    files['comparisons_train']
  )
  assert '_last' not in config.stages.evaluate.other_models
  config = prepared(make_config(data, last_weights=True), tmp_path)
  assert 'ppo_last=' in config.stages.evaluate.other_models
  texts = config.stages.evaluate.documents
  assert texts.endswith('/documents_same.jsonl')
  assert 'pretraining=' in texts
  bad = make_config(data, other_documents='train=x')
  with pytest.raises(ValueError, match='other_documents: choose another name'):
    prepared(bad, tmp_path)
  config = prepared(make_config(data, documents=''), tmp_path)
  assert 'ppo_ptx' not in config.stage_order
  assert config.stages.evaluate.pairs == ''
  assert 'ppo_ptx' not in config.stages.evaluate.models


def test_adapters_where_all_weights_do_not_fit(data, tmp_path, monkeypatch):
  all_bytes = float(LLAMA.num_params * recipe.ALL_BYTES)
  monkeypatch.setattr(recipe, 'memory_bytes', lambda: all_bytes)
  before = make_config(data).stages.ppo.learning_rate
  config = prepared(make_config(data), tmp_path)
  for name in ('sft', 'reward', 'judge', 'ppo', 'ppo_ptx'):
    assert config.stages[name].lora.rank == recipe.LORA_RANK, name
  assert config.stages.ppo.learning_rate == pytest.approx(10 * before)
  # The rates of a preset's own adapters are meant for them.
  before = make_config(data, 'cpu').stages
  after = prepared(make_config(data, 'cpu'), tmp_path).stages
  assert after.ppo.learning_rate == before.ppo.learning_rate
  assert after.ppo.lora.targets == ('query', 'value')
  assert after.sft.lora.rank == recipe.LORA_RANK
  assert after.sft.learning_rate == pytest.approx(10 * before.sft.learning_rate)
  monkeypatch.setattr(recipe, 'memory_bytes', lambda: LLAMA.num_params)
  with pytest.raises(ValueError, match='take more devices or a smaller model'):
    prepared(make_config(data), tmp_path)


def test_activations_that_do_not_fit_are_computed_again(
  data, tmp_path, monkeypatch
):
  """On a CPU; rows are as long as the config lets them become."""
  shape = LLAMA
  config = make_config(data)
  # Of 8 episodes, 8; of 8 rankings, 16 answers.
  assert recipe.largest_batch(config, 1024) == (16, 72 + 128)
  assert recipe.largest_batch(config, 128) == (16, 128)
  config.stages.reward.num_microbatches = 4
  config.stages.judge.num_microbatches = 2
  assert recipe.largest_batch(config, 128) == (8, 128)
  config.stages.data.prompt_length, config.stages.data.response_length = 20, 8
  assert recipe.largest_batch(config, 128) == (8, 28)
  short = recipe.kept_bytes(shape, 16, 28)
  for factor, remat in ((0.9, 'full'), (1.1, 'none')):
    memory = factor * short / recipe.KEPT_SHARE
    monkeypatch.setattr(recipe, 'memory_bytes', lambda memory=memory: memory)
    config = make_config(data)
    config.lora.rank = 4
    stages = config.stages
    stages.data.prompt_length, stages.data.response_length = 20, 8
    stages = prepared(config, tmp_path).stages
    for name in ('sft', 'reward', 'judge', 'ppo', 'ppo_ptx'):
      assert stages[name].remat == remat, name


def test_what_a_user_or_the_run_has_chosen_stays(data, tmp_path):
  config = make_config(data)
  config.stages.sft.remat, config.stages.ppo.logprob_chunk = 'dots', 0
  stages = prepared(config, tmp_path).stages
  assert stages.sft.remat == 'dots' and stages.ppo.logprob_chunk == 0
  assert stages.reward.remat == 'none'
  # A run that goes on, where another rank would be chosen now.
  (tmp_path / 'config.json').write_text(json.dumps({'lora': {'rank': 4}}))
  config = prepared(make_config(data), tmp_path)
  assert config.lora.rank == config.stages.judge.lora.rank == 4


def test_one_line_tells_what_was_chosen(data, tmp_path, capsys):
  prepared(make_config(data), tmp_path)
  (line,) = (
    line
    for line in capsys.readouterr().out.splitlines()
    if line.startswith('recipe: ')
  )
  for word in (
    'GiB',
    'mesh of RL',
    'float32',
    'all weights',
    'remat',
    'logits',
  ):
    assert word in line, line


def test_a_disk_that_is_too_full_is_refused_before_compute(
  data, tmp_path, monkeypatch
):
  usage = collections.namedtuple('Usage', 'free')
  (tmp_path / 'full').mkdir()
  free = {tmp_path / 'full': 10_000, tmp_path: 10**12}
  monkeypatch.setattr(
    shutil, 'disk_usage', lambda place: usage(free[pathlib.Path(place)])
  )
  said = refused(make_config(data), tmp_path / 'full' / 'run')
  assert '0.0 GB are free' in said and '--workdir elsewhere' in said
  assert not (tmp_path / 'full' / 'run').exists()
  prepared(make_config(data), tmp_path / 'elsewhere')


# --- Whole --------------------------------------------------------------------


@pytest.mark.usefixtures('quick_compile')
def test_from_a_folder_to_a_report(data, tmp_path, capsys):
  workdir = tmp_path / 'run'
  go(make_config(data), workdir)
  summary = json.loads((workdir / 'summary.json').read_text())
  assert set(summary['win_rate']) == {'pretrained', 'sft', 'ppo', 'ppo_ptx'}
  assert summary['baseline'] == 'sft'
  report = (workdir / 'report.md').read_text()
  for text in (
    'length only',
    'bag of words',
    'at equal length',
    '## Answers side by side',
  ):
    assert text in report, text
  for name in ('report.html', 'model_card.md', 'win_rate.png'):
    assert (workdir / name).stat().st_size > 1000
  for name in ('sft', 'ppo', 'ppo_ptx', 'reward'):
    exported = json.loads(
      (workdir / 'export' / name / 'config.json').read_text()
    )
    assert exported['hidden_act'] == 'silu'  # vLLM knows it by no other name.
  # What a user types next: the lengths are found.
  assert tokenizer_lib.Tokenizer.load(workdir / 'export' / 'ppo').template == (
    tokenizer_lib.CHAT
  )
  capsys.readouterr()
  # Again: nothing runs twice.
  go(make_config(data), workdir)
  assert capsys.readouterr().out.count('already done') == 11


@pytest.mark.usefixtures('quick_compile')
def test_from_given_models_to_a_report(data, tmp_path):
  """No SFT, reward model, judge or pretraining text of its own; test answers
  of people are compared, too."""
  rows = [
    records.Demonstration(f'What is {i}?', f'{i} it is.') for i in range(200)
  ]
  records.write_jsonl(tmp_path / 'demonstrations.jsonl', rows)
  config = make_config(
    data,
    sft_model=str(data / 'model'),
    reward_model=str(data / 'scorer'),
    judge='tests.test_recipe.brief',
    other_judges='tests.test_recipe.long_winded',
    demonstrations=str(tmp_path / 'demonstrations.jsonl'),
    documents='',
    other_documents='',
  )
  config.stages.data.references = True
  config.stages.evaluate.world = 'instruct_jax.worlds.preferences.TLDR'
  go(config, tmp_path / 'run')
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert set(summary['win_rate']) == {'pretrained', 'sft', 'ppo', 'references'}
  report = (tmp_path / 'run' / 'report.md').read_text()
  assert 'tests.test_recipe.brief (a function of the texts)' in report
  assert 'Published figures (Huang et al. 2024' in report
  # The other judge, who is of the opposite opinion, has a table.
  (rows,) = (
    rows for title, rows in summary['extra'].items() if 'other judges' in title
  )
  for model, rate in summary['win_rate'].items():
    if model != 'sft':
      (other,) = rows[model].values()
      assert other['rate'] == pytest.approx(1 - rate['rate'])
  assert not (tmp_path / 'run' / 'judge').exists()


@pytest.mark.usefixtures('quick_compile')
def test_a_dry_run_writes_nothing(data, tmp_path, capsys):
  config = make_config(data, dry_run=True)
  prepared(config, tmp_path / 'run')
  said = capsys.readouterr().out
  for name in config.stage_order:
    assert f'\n{name}: ' in said, name
  assert 'all stages: about' in said
  assert not (tmp_path / 'run').exists()


def test_a_dry_run_checks_the_stages_first(data, tmp_path):
  config = make_config(data, dry_run=True)
  config.stages.ppo.num_minibatches = 5
  with pytest.raises(ValueError, match='num_minibatches'):
    prepared(config, tmp_path / 'run')


# --- Bad moves ----------------------------------------------------------------


def refused(config, workdir) -> str:
  with pytest.raises((ValueError, OSError)) as error:
    go(config, workdir)
  assert '\n' not in str(error.value)
  return str(error.value)


def test_models_that_cannot_be_used(data, tmp_path):
  def of(name, **changes):
    folder = shutil.copytree(data / 'model', tmp_path / name)
    edit(folder, **changes)
    return refused(make_config(data, model=str(folder)), tmp_path / 'run')

  assert 'mamba' in of('family', model_type='mamba')
  assert 'quant' in of('quantised', quantization_config={'bits': 4})
  shutil.copytree(data / 'model', tmp_path / 'pickle')
  (tmp_path / 'pickle' / 'model.safetensors').rename(
    tmp_path / 'pickle' / 'pytorch_model.bin'
  )
  config = make_config(data, model=str(tmp_path / 'pickle'))
  assert 'are pickles' in refused(config, tmp_path / 'run')
  config = make_config(data, model=str(tmp_path / 'nowhere'))
  assert str(tmp_path / 'nowhere') in refused(config, tmp_path / 'run')
  config = make_config(data, model='')
  assert '--config.model=' in refused(config, tmp_path / 'run')
  published.save_byte_tokenizer(tmp_path / 'other', merges=(('a', 'b'),))
  config = make_config(data, tokenizer=str(tmp_path / 'other'))
  assert 'must share one tokenizer' in refused(config, tmp_path / 'run')
  # So do models that are given.
  for key, source in (('sft_model', 'model'), ('reward_model', 'scorer')):
    folder = shutil.copytree(data / source, tmp_path / key)
    published.save_byte_tokenizer(folder, merges=(('a', 'b'),))
    config = make_config(data, **{key: str(folder)})
    assert 'must share one tokenizer' in refused(config, tmp_path / 'run')
  config = make_config(data, judge_model=str(data / 'model'))
  assert str(data / 'model') in refused(config, tmp_path / 'run')
  config = make_config(data)
  config.stages.data.references = True
  assert '--config.demonstrations=' in refused(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_preferences_that_cannot_be_used(data, tmp_path):
  def of(lines):
    path = tmp_path / 'rows.jsonl'
    path.write_text('\n'.join(map(json.dumps, lines)))
    return refused(make_config(data, preferences=str(path)), tmp_path / 'run')

  row = {'prompt': 'p', 'completions': ['a', 'b'], 'ranks': [1, 1]}
  ties = [row | {'prompt': f'p {i}'} for i in range(30)]
  assert 'ties teach a reward model nothing' in of(ties)
  assert ':1' in of([row | {'completions': ['a'], 'ranks': [1]}])
  long = [row | {'prompt': f'{i} ' * 200, 'ranks': [1, 2]} for i in range(30)]
  assert 'raise max_prompt_length' in of(long)
  (tmp_path / 'held').mkdir()
  (tmp_path / 'held' / 'test.jsonl').write_text(hh_line(1))
  config = make_config(data, preferences=f'hh:{tmp_path / "held"}')
  assert 'all files are a test split' in refused(config, tmp_path / 'run')
  config = make_config(data)
  config.stages.judge.batch_size = 400
  said = refused(config, tmp_path / 'batch')
  assert 'judge_comparisons_train: ' in said and 'a batch takes 400' in said
  assert not (tmp_path / 'batch' / 'sft').exists()
  config = make_config(data, preferences='hh:/no/such')
  assert '/no/such' in refused(config, tmp_path / 'run')
  config = make_config(data, preferences='')
  assert '--config.preferences=' in refused(config, tmp_path / 'run')


def of_rows(data, tmp_path, rows, **changes):
  """`make_records` of rankings in our own format."""
  path = tmp_path / 'rows.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  return make_records(make_config(data, preferences=str(path), **changes))


def ranked(number, **changes):
  row = {'prompt': f'What is {number}?', 'completions': ['It is.', 'No.']}
  return row | {'ranks': [1, 2]} | changes


def test_what_is_given_and_not_used_is_told(data, tmp_path):
  rows = [ranked(i) for i in range(60)]
  same = ' '.join('abcdefghijkl')  # Twelve words.
  prompts = [{'id': f'{i}', 'text': f'{same} {i}'} for i in range(30)]
  path = tmp_path / 'prompts.jsonl'
  path.write_text('\n'.join(map(json.dumps, prompts)))
  changes = {'prompts': str(path)}
  left = of_rows(data, tmp_path, rows, **changes)[2]['left_out']
  assert left['of 30 given prompts'] == 29
  alike = [
    number for why, number in left.items() if 'begin with the same' in why
  ]
  assert alike == [29]
  # None at all is refused: here they are too long.
  long = [{'id': f'{i}', 'text': f'{i} ' * 99} for i in range(30)]
  path.write_text('\n'.join(map(json.dumps, long)))
  with pytest.raises(ValueError, match='prompts: none of 30 .*prompt_length'):
    config = make_config(data, preferences=str(tmp_path / 'rows.jsonl'))
    with config.unlocked():
      config.prompts = str(path)
      config.stages.data.prompt_length = 40
      config.stages.data.response_length = 16
    make_records(config)


def test_prompts_of_the_rankings_may_be_given_again(data, tmp_path):
  rows = [ranked(i) for i in range(60)]
  path = tmp_path / 'prompts.jsonl'
  prompts = [{'id': f'{i}', 'text': f'what IS {i}?'} for i in range(60)]
  path.write_text('\n'.join(map(json.dumps, prompts)))
  _, _, report = of_rows(data, tmp_path, rows, prompts=str(path))
  assert not [why for why in report['left_out'] if 'given prompts' in why]


def test_system_turns_that_a_template_refuses_are_told(data, tmp_path):
  folder = shutil.copytree(data / 'model', tmp_path / 'model')
  published.save_byte_tokenizer(folder, template=published.STRICT_TEMPLATE)
  system = {'role': 'system', 'content': 'Be brief.'}
  rows = []
  for i in range(120):
    turns = [{'role': 'user', 'content': f'What is {i}?'}]
    rows.append({**ranked(i), 'turns': [system] * (i % 2) + turns})
    del rows[-1]['prompt']
  left = of_rows(data, tmp_path, rows, model=str(folder))[2]['left_out']
  (told,) = (why for why in left if 'refuses: no system turns here' in why)
  assert left[told] == 60


def test_texts_in_a_template_are_refused(data, tmp_path):
  mark = preferences.load_tokenizer(make_config(data).stages.data)
  mark = mark.template_marks[0]
  rows = [ranked(i, prompt=f'{mark}What is {i}?') for i in range(60)]
  with pytest.raises(ValueError, match='60 of 60 records hold .*turns'):
    of_rows(data, tmp_path, rows)
  rows[2:] = [ranked(i) for i in range(2, 60)]  # Two that quote it.
  assert of_rows(data, tmp_path, rows)[0]['comparisons_train']


def test_ties_are_counted_by_file(data, tmp_path):
  path = tmp_path / 'test_set.jsonl'
  ties = [ranked(i, ranks=[1, 1]) for i in range(60, 80)]
  path.write_text('\n'.join(map(json.dumps, ties)))
  rows = [ranked(i) for i in range(60)]
  with pytest.raises(
    ValueError, match='comparisons_test: all of its 20 .*ties'
  ):
    of_rows(data, tmp_path, rows, test_preferences=str(path))


def test_long_rankings_and_wild_ranks_are_refused_at_once(data, tmp_path):
  texts = [f'It is {i}.' for i in range(12)]
  long = {'completions': texts, 'ranks': list(range(1, 13))}
  rows = [ranked(i, **long) for i in range(60)]
  config = make_config(data, preferences=str(tmp_path / 'rows.jsonl'))
  of_rows(data, tmp_path, rows)  # Writes the file.
  said = refused(config, tmp_path / 'run')
  assert '--config.stages.reward.max_candidates=12' in said
  # A test set teaches no reward model.
  path = tmp_path / 'long.jsonl'
  (tmp_path / 'rows.jsonl').rename(path)
  short = [ranked(i) for i in range(60, 120)]
  changes = {'test_preferences': str(path)}
  files, _, _ = of_rows(data, tmp_path, short, **changes)
  assert {len(row.completions) for row in files['comparisons_test']} == {12}
  with pytest.raises(ValueError, match=r"rows.jsonl:1: 'ranks' must be from 1"):
    of_rows(data, tmp_path, [ranked(0, ranks=[1, 17 * 10**11])])


def test_one_user_or_crossed_labelers_are_named(data, tmp_path):
  rows = [ranked(i, user='me') for i in range(120)]
  with pytest.raises(ValueError, match='one user or one opening'):
    of_rows(data, tmp_path, rows)
  rows = [ranked(i, labeler=x) for i in range(120) for x in 'ab']
  with pytest.raises(ValueError, match='--config.judge_model='):
    of_rows(data, tmp_path, rows)


def test_a_test_set_shares_no_beginning_with_training(data, tmp_path):
  same = ' '.join(map(str, range(12)))
  rows = [ranked(i, prompt=f'{same} {i}?') for i in range(40)]
  rows += [ranked(i) for i in range(60)]
  path = tmp_path / 'held.jsonl'
  path.write_text(json.dumps(ranked(0, prompt=f'{same} 99?')))
  files, _, report = of_rows(data, tmp_path, rows, test_preferences=str(path))
  assert report['left_out']['records that begin like one of the test set'] == 40
  assert not [
    r for r in files['comparisons_train'] if r.prompt.startswith(same)
  ]


def test_given_models_are_opened_before_any_compute(data, tmp_path):
  def of(key, source, change):
    folder = shutil.copytree(
      data / source, tmp_path / f'{key}{change.__name__}'
    )
    change(folder)
    config = make_config(data, **{key: str(folder)})
    said = refused(config, tmp_path / 'run')
    assert str(folder) in said and not (tmp_path / 'run').exists()
    return said

  def cut(folder):
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-100])

  def spoil(folder):
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-4] + b'\0\0\xc0\x7f')

  def other_size(folder):
    edit(folder, intermediate_size=48)

  def quantise(folder):
    edit(folder, quantization_config={'quant_method': 'gptq'})

  for key, source in (
    ('sft_model', 'model'),
    ('reward_model', 'scorer'),
    ('judge_model', 'scorer'),
  ):
    assert 'truncated' in of(key, source, cut)
    assert 'holds NaN' in of(key, source, spoil)
    assert 'config.json asks for' in of(key, source, other_size)
    assert 'quantised (gptq)' in of(key, source, quantise)
  # Rows fit the shortest context.
  folder = shutil.copytree(data / 'scorer', tmp_path / 'short')
  edit(folder, max_position_embeddings=64)
  config = prepared(
    make_config(data, reward_model=str(folder)), tmp_path / 'fits'
  )
  assert config.stages.data.context_length == 64


def test_files_beside_documents_are_named(tmp_path, capsys):
  (tmp_path / 'a.txt').write_text('\n\n'.join(f'Owl {i}.' for i in range(20)))
  (tmp_path / 'b.md').write_text('x')
  config = ml_collections.ConfigDict({
    'name': 'mine', 'documents': str(tmp_path), 'words_per_document': 1,
    'other_documents': f'more={tmp_path}', 'max_documents': 20, 'seed': 0,
    'max_valid': 2, 'max_valid_words': 0, 'num_prompt_tokens': 4,
    'num_train_prompts': 0, 'num_valid_prompts': 0, 'num_test_prompts': 0,
  })  # fmt: skip
  preference_splits.split_documents(config)
  preference_splits.other_texts(config)
  tokenizer = mock.Mock(spec=tokenizer_lib.Tokenizer, prefix_ids=())
  sentiment.make_prompts(config, tokenizer)
  asking.read_texts(config)
  line = f': {tmp_path}: not read: b.md'
  assert capsys.readouterr().out.splitlines() == [
    f'data: documents{line}',
    f'data: documents_more{line}',
    f'mine: documents{line}',
    f'mine: pretraining{line}',
  ]


def test_numbers_are_checked_before_they_divide(data, tmp_path):
  for key, value in (
    ('ppo.samples_per_prompt', 0), ('ppo.num_microbatches', 0),
    ('reward.max_candidates', -1), ('ppo.kl_coef', float('inf')),
    ('data.words_per_document', 0),
  ):  # fmt: skip
    config = make_config(data)
    stage, name = key.split('.')
    config.stages[stage][name] = value
    assert f'stages.{stage}: {name} must' in refused(config, tmp_path / 'run')


def test_files_of_a_folder_that_are_not_read_are_named(data, tmp_path, capsys):
  folder = tmp_path / 'mine'
  folder.mkdir()
  lines = '\n'.join(json.dumps(ranked(i)) for i in range(120))
  (folder / 'testimonials.jsonl').write_text(lines)  # No test split.
  (folder / 'more.jsonl.zst').write_text('x')
  make_records(make_config(data, preferences=str(folder)))
  assert 'not read: more.jsonl.zst' in capsys.readouterr().out
  (folder / 'testimonials.jsonl.gz').write_text('x')
  with pytest.raises(
    ValueError, match='testimonials.jsonl is there plain and as'
  ):
    make_records(make_config(data, preferences=str(folder)))
  both = ','.join([str(folder / 'testimonials.jsonl')] * 2)
  with pytest.raises(ValueError, match='is given twice'):
    make_records(make_config(data, preferences=both))


def test_a_template_that_refuses_every_prompt(data, tmp_path):
  folder = shutil.copytree(data / 'model', tmp_path / 'model')
  published.save_byte_tokenizer(folder, template=published.STRICT_TEMPLATE)
  turns = [{'role': 'system', 'content': 's'}, {'role': 'user', 'content': 'u'}]
  rows = [
    {'turns': turns, 'completions': ['a', 'b'], 'ranks': [1, 2]}
    for _ in range(30)
  ]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  config = make_config(
    data,
    model=str(tmp_path / 'model'),
    preferences=str(tmp_path / 'rows.jsonl'),
  )
  said = refused(config, tmp_path / 'run')
  assert 'no system turns here' in said


# --- Sentiment ----------------------------------------------------------------

REVIEWS = [
  ('a fine and lovely film', 1),
  ('lovely , warm and wise', 1),
  ('a dull and stupid film', 0),
  ('stupid , cold and long', 0),
] * 5


@pytest.fixture(scope='module')
def labels(tmp_path_factory):
  path = tmp_path_factory.mktemp('labels') / 'train.tsv'
  path.write_text('\n'.join(f'{text}\t{label}' for text, label in REVIEWS))
  return path


def test_a_classifier_comes_back_and_scores_texts(labels, tmp_path):
  path = tmp_path / 'classifier.json'
  classifier = sentiment.train_classifier(labels)
  sentiment.save_classifier(path, classifier)
  name = f'instruct_jax.worlds.sentiment.positive@{path}'
  scores = score_fns.find_function(name)(
    ['', ''], ['what a lovely film', 'so stupid'], [{}, {}]
  )
  assert scores[0] > 0.7 and scores[1] < 0.3
  features = list(map(sentiment.text_judges.text_features, ['dull', 'warm x']))
  np.testing.assert_allclose(
    sentiment.load_classifier(str(path)).logits(features),
    classifier.logits(features),
  )
  assert path.as_posix() in score_fns.source_of(name).values()


def test_noisy_labelers_agree_with_the_score_more_often_than_not():
  config = sentiment_config.get_config().stages.rank
  prompts = [records.Prompt(f'p{i}', f'p{i}') for i in range(400)]
  rng = np.random.default_rng(0)
  scores = rng.uniform(size=(400, 4))
  arguments = (prompts, [list('abcd')] * 400, [[True] * 4] * 400, scores, rng)
  rows = rank.rank(config, *arguments)
  best = [row.ranks.index(1) for row in rows]
  share = np.mean(best == scores.argmax(axis=1))
  assert 0.5 < share < 1.0
  config.labeler_noise = 0.0
  rows = rank.rank(config, *arguments)
  best = [row.ranks.index(1) for row in rows]
  np.testing.assert_array_equal(best, scores.argmax(axis=1))


@pytest.mark.slow
@pytest.mark.usefixtures('quick_compile')
def test_sentiment_from_a_folder_to_a_report(data, labels, tmp_path):
  text = '\n\n'.join(f'word{i} and then word{i + 7} came' for i in range(900))
  (tmp_path / 'book.txt').write_text(text)
  config = sentiment_config.get_config('smoke')
  with config.unlocked():
    config.model = str(data / 'model')
    config.documents = str(tmp_path / 'book.txt')
    config.labels = config.valid_labels = str(labels)
    config.compute_dtype = 'float32'
    config.stages.data.words_per_document = 5
    config.stages.data.num_prompt_tokens = 12
    for name in ('rank', 'ppo', 'ppo_learned'):
      config.stages[name].prompt_length = 12
    config.stages.reward.row_length = 64
  described = config.copy_and_resolve_references()
  with config.unlocked():
    config.workdir = str(tmp_path / 'run')
  pipeline.run_all(config, epath.Path(tmp_path / 'run'), described)
  path = tmp_path / 'run' / 'rank' / 'comparisons_train.jsonl'
  ends = [row.ended for row in records.read_jsonl(path, records.Comparison)]
  assert False in np.array(ends)  # Cut where RL's answers are.
  report = (tmp_path / 'run' / 'report.md').read_text()
  assert 'Variety of the answers' in report and 'distinct-2' in report
  assert (tmp_path / 'run' / 'best_of_n' / 'frontier.png').exists()
  with (tmp_path / 'run' / 'ppo' / 'metrics.jsonl').open() as lines:
    before = json.loads(lines.readline())
  assert before['objective/kl'] == pytest.approx(0, abs=1e-4)
  assert before['ppo/policy/ratio'] == pytest.approx(1, abs=1e-3)
