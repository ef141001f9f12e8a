"""The suite on a tiny random policy: numbers against the plain forward pass."""

import csv
import html
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import nlp_suite as config_file
from instruct_jax import model_fns, model_folder
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals.benchmarks import runner, tasks
from instruct_jax.jobs import nlp_suite
from instruct_jax.models.config import TransformerConfig
from tests import tiny
from tests.test_evals_benchmarks_text_judges import truth_files

pytestmark = pytest.mark.usefixtures('quick_compile')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A tokenizer, a policy with large weights, and files of four tasks."""
  root = tmp_path_factory.mktemp('suite')
  tokenizer = tokenizer_lib.train_bpe(['a fox said that he left'] * 3, 270)
  tokenizer.save(root / 'tokenizer')
  config = TransformerConfig(
    vocab_size=tokenizer.vocab_size,
    context_length=256,
    num_layers=2,
    width=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    vocab_multiple=8,
  )
  model = model_fns.init('policy', config, tiny.one_device(), jax.random.key(0))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(x + rng.normal(0, 0.3, x.shape), jnp.float32),
    model.params,
  )
  model = model_fns.Model('policy', model.module, params, {})
  model_folder.save(root / 'model', model, tokenizer, {})
  drop = [
    {'context': f'{"fox " * i}left.', 'question': 'who?', 'answer': f'fox {i}'}
    for i in range(9)
  ]
  (root / 'drop.json').write_text(json.dumps(drop))
  lines = ['sentid\tsentence']
  for i, noun in enumerate(('fox', 'hen')):
    for gender, word in (('male', 'he'), ('female', 'she')):
      lines.append(f'{noun}.hen.{i}.{gender}.txt\tThe {noun} said {word} left.')
  (root / 'winogender.tsv').write_text('\n'.join(lines) + '\n')
  rows = [
    {'premise': 'A fox. ' * (i + 1), 'hypothesis': 'It left.', 'label': label}
    for i, label in enumerate(['entailment', 'not_entailment'] * 9)
  ]
  (root / 'rte.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (root / 'toxicity.jsonl').write_text(
    '\n'.join(
      json.dumps({'prompt': {'text': f'The fox said {i}'}}) for i in range(3)
    )
  )
  (root / 'labels.csv').write_text('vile,1\nnice,0\n' * 5)
  truth_files(root, num_questions=10)
  return root


def suite_config(folder, workdir):
  config = config_file.get_config()
  with config.unlocked():
    config.workdir = str(workdir)
    config.models = f'tiny={folder}/model'
    config.tokenizer = f'{folder}/tokenizer'
    config.data.drop = f'{folder}/drop.json'
    config.data.winogender = f'{folder}/winogender.tsv'
    config.data.rte = f'{folder}/rte.jsonl'
    config.data.real_toxicity = f'{folder}/toxicity.jsonl'
    config.toxicity_labels = f'{folder}/labels.csv'
    config.data.truthful_qa = f'{folder}/TruthfulQA.csv'
    config.truth_labels = config.info_labels = f'{folder}/truth.jsonl'
    config.batch_size = 8  # Divides among the eight devices of the tests.
    config.length_multiple = 128  # Few programs to compile.
    config.mesh = (1, 1, 1) if jax.device_count() == 1 else (8, 1, 1)
  return config


def read_rows(path):
  with open(path, newline='') as file:
    return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def finished(folder, tmp_path_factory):
  workdir = epath.Path(tmp_path_factory.mktemp('run'))
  info = nlp_suite.run(suite_config(folder, workdir), workdir)
  return workdir, info


@pytest.fixture(scope='module')
def plain(folder):
  """The tokenizer, and ids -> logits [T, V] by one pass without a cache."""
  tokenizer = tokenizer_lib.Tokenizer.load(folder / 'tokenizer')
  model = model_folder.load(
    folder / 'model', 'policy', tiny.one_device(), tokenizer
  )

  @jax.jit
  def forward(tokens, length):
    segments = (jnp.arange(256) < length)[None].astype(jnp.int32)
    return model.module.apply({'params': model.params}, tokens, segments)[0]

  def logits(ids):
    tokens = np.zeros((1, 256), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(forward(tokens, len(ids)), np.float64)[: len(ids)]

  return tokenizer, logits


def sum_by_forward(plain, context, choice):
  """Summed log-probability of `choice` after `context`, and its tokens."""
  tokenizer, logits = plain
  before = tokenizer.encode(context) if context else [tokenizer.eos_id]
  ids = before + tokenizer.encode(choice)
  rows = logits(ids)
  log_z = np.log(np.exp(rows).sum(axis=1))
  picked = [
    rows[i - 1, ids[i]] - log_z[i - 1] for i in range(len(before), len(ids))
  ]
  return sum(picked), len(picked)


def test_choices_equal_the_plain_forward_pass(plain, finished):
  workdir, _ = finished
  rows = read_rows(workdir / 'samples' / 'rte_samples.csv')
  zero = [row for row in rows if row['prompt_type'] == 'zeroshot']
  assert len(zero) == 3  # 18 items less 15 examples.
  for row in zero:
    for i, choice in enumerate((' Yes', ' No')):
      total, count = sum_by_forward(plain, row['context'], choice)
      assert float(row['logprobs'].split('|')[i]) == pytest.approx(
        total, abs=2e-3
      )
      assert int(row['num_tokens'].split('|')[i]) == count
    means = [
      float(a) / int(b)
      for a, b in zip(
        row['logprobs'].split('|'), row['num_tokens'].split('|'), strict=True
      )
    ]
    assert row['sample'] == (' Yes', ' No')[int(np.argmax(means))]


def test_sentences_are_summed_with_and_without_prefix(plain, finished):
  workdir, info = finished
  rows = read_rows(workdir / 'samples' / 'winogender_samples.csv')
  assert len(rows) == 6
  for row in rows:
    prefix = {
      'basic prompt': '',
      'respectful prompt': f'{tasks.RESPECTFUL}\n\n',
      'biased prompt': f'{tasks.BIASED}\n\n',
    }[row['prompt_type']]
    for i, sentence in enumerate(row['choices'].split('|')):
      total, _ = sum_by_forward(plain, prefix, sentence)
      assert float(row['logprobs'].split('|')[i]) == pytest.approx(
        total, abs=5e-3
      )
  score = info['scores']['tiny winogender basic prompt entropy']
  assert 0 <= score <= 1


def test_answers_are_greedy_to_the_newline(plain, finished):
  workdir, _ = finished
  tokenizer, logits = plain
  stops = runner.stop_ids(tokenizer)
  rows = read_rows(workdir / 'samples' / 'drop_samples.csv')
  assert len(rows) == 10  # 9 items less 4 examples, two prompts.
  row = rows[0]
  item = tasks.Item(row['context'])
  ids = tokenizer.encode(tasks.prompt('drop', item, 'zeroshot'))
  start = len(ids)
  for _ in range(25):
    ids.append(int(logits(ids)[-1].argmax()))
    if ids[-1] in stops:
      break
  assert row['sample'] == runner.answer_text(tokenizer, ids[start:])


def test_cut_and_resumed_equals_uninterrupted(
  folder, finished, tmp_path, monkeypatch
):
  workdir, info = finished
  again = epath.Path(tmp_path)
  config = suite_config(folder, again)
  calls = []
  original = runner.run_queries

  def cut(name, *args, **kwargs):
    calls.append(name)
    if len(calls) == 4:
      raise KeyboardInterrupt
    return original(name, *args, **kwargs)

  monkeypatch.setattr(runner, 'run_queries', cut)
  with pytest.raises(KeyboardInterrupt):
    nlp_suite.run(config, again)
  monkeypatch.setattr(runner, 'run_queries', original)
  assert nlp_suite.run(config, again) == info
  for path in (workdir / 'samples').iterdir():
    assert path.read_text() == (again / 'samples' / path.name).read_text()


def test_report_says_what_was_asked_and_by_whom_judged(finished):
  workdir, _ = finished
  text = (workdir / 'suite.md').read_text()
  assert '| tiny rte zeroshot | 3 | 0 | 0 | 0 | 0 | 0 |' in text
  assert '- drop: 9 given, 9536 in the paper' in text
  # Who judges, and how well: in the page and in the figures alike.
  found = json.loads((workdir / 'suite.json').read_text())['judges']
  assert found['real_toxicity'].startswith(
    'the local n-gram scorer, not Perspective (labels of labels.csv); too few '
    'labels to hold some out; elsewhere, once: area under curve'
  )
  assert found['truthful_qa'].startswith(
    "the local n-gram judge, not the paper's judges (TruthfulQA judgments and "
    'references); on labels held out: truth: accuracy '
  )
  for name, judge in found.items():
    assert f'{name} is judged by {judge}.' in html.unescape(text)
  rows = read_rows(workdir / 'samples' / 'real_toxicity_samples.csv')
  assert len(rows) == 9
  # Fifteen examples do not fit 256 positions.
  counts = json.loads((workdir / 'suite.json').read_text())['counts']
  assert counts['tiny rte fewshot']['fewer_shots'] > 0


def test_scores_are_a_table_of_models(finished):
  workdir, info = finished
  text = (workdir / 'suite.md').read_text()
  assert '| task | tiny | items |' in text
  score = info['scores']['tiny rte zeroshot accuracy']
  assert f'| rte, zeroshot, accuracy | {score:.3f} [' in text
  # Models of one's own have nothing beside Table 14.
  assert 'Table 14' not in text
  page = (workdir / 'suite.html').read_text()
  assert 'rte, zeroshot, accuracy' in page and f'{score:.3f}' in page


def test_progress_is_of_the_whole_suite(folder, finished, tmp_path, capsys):
  """Five tasks have thirteen prompts; a journal's items take no time."""
  workdir, _ = finished
  config = suite_config(folder, tmp_path)
  config.models = f'tiny={folder}/model,again={folder}/model'
  shutil.copytree(workdir / 'journal', tmp_path / 'journal')
  capsys.readouterr()
  nlp_suite.run(config, epath.Path(tmp_path))
  lines = capsys.readouterr().err.splitlines()
  (last,) = [line for line in lines if '(100 %)' in line]
  total = 2 * sum(
    len(content) * len(tasks.TASKS[name].prompts)
    for name, content in {
      'drop': range(5),
      'winogender': range(2),
      'rte': range(3),
      'real_toxicity': range(3),
      'truthful_qa': range(10),
    }.items()
  )
  assert last.startswith(f'nlp_suite: {total}/{total} (100 %)')
  assert last.endswith('task 26 of 26: again rte fewshot')
  # Both models are one: nothing tells them apart.
  assert '**' not in (tmp_path / 'suite.md').read_text()


def test_tasks_that_do_not_fit_say_so(folder, tmp_path, capsys):
  config = suite_config(folder, tmp_path)
  for name in ('winogender', 'rte', 'real_toxicity'):
    config.data[name] = ''
  long = [
    {'context': f'{i} ' * 300, 'question': 'who?', 'answer': f'fox {i}'}
    for i in range(9)
  ]
  (tmp_path / 'long.json').write_text(json.dumps(long))
  config.data.drop = f'{tmp_path}/long.json'
  with pytest.raises(
    ValueError,
    match='drop, zeroshot: none of 5 items fits a context of 256 tokens',
  ):
    nlp_suite.run(config, epath.Path(tmp_path))
  err = capsys.readouterr().err
  assert '0/0' not in err
  config.data.rte = f'{folder}/rte.jsonl'
  nlp_suite.run(config, epath.Path(tmp_path))
  text = (tmp_path / 'suite.md').read_text()
  for prompt in ('zeroshot', 'fewshot'):
    said = f'drop, {prompt}: none of 5 items fits a context of 256 tokens'
    assert f'- {said} (tiny)' in text


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('models', '', 'models is empty'),
    ('models', 'folder', 'NAME=FOLDER'),
    ('models', 'a=x,a=y', 'distinct names'),
    ('batch_size', 0, 'batch_size must be positive'),
    ('max_items', -1, 'max_items'),
    ('toxicity_labels', '', 'real_toxicity needs toxicity_labels'),
  ],
)
def test_bad_values_are_named(folder, tmp_path, key, value, message):
  config = suite_config(folder, tmp_path)
  config[key] = value
  with pytest.raises(ValueError, match=message):
    nlp_suite.validate(config)


def test_only_the_prompt_types_asked_for_are_run(folder, tmp_path):
  tokenizer = tokenizer_lib.Tokenizer.load(folder / 'tokenizer')
  # TruthfulQA's examples are long.
  tiny.save_model(folder, 'long', 'policy', tokenizer, 0, context_length=1024)
  (folder / 'lambada.jsonl').write_text('{"text": "a fox said that"}\n')
  (folder / 'xstest.csv').write_text(
    'prompt,type\na fox,homonyms\nthe fox,contrast_homonyms\n'
  )
  config = suite_config(folder, tmp_path)
  for name in ('real_toxicity', 'truthful_qa', 'drop'):
    config.data[name] = ''
  config.models = f'tiny={folder}/long'
  for name in ('truthful_mc1', 'truthful_mc2'):
    config.data[name] = f'{folder}/TruthfulQA.csv'
  config.data.lambada = f'{folder}/lambada.jsonl'
  config.data.xstest = f'{folder}/xstest.csv'
  config.prompt_types = 'zeroshot, basic prompt,QA prompt'
  info = nlp_suite.run(config, epath.Path(tmp_path))
  assert set(info['scores']) == {
    'tiny winogender basic prompt entropy',
    'tiny rte zeroshot accuracy',
    'tiny truthful_mc1 QA prompt MC1',
    'tiny truthful_mc2 QA prompt MC2',
    'tiny lambada zeroshot accuracy',
    'tiny xstest zeroshot refused, safe prompts',
    'tiny xstest zeroshot refused, unsafe prompts',
  }
  assert 0 < info['scores']['tiny truthful_mc2 QA prompt MC2'] < 1
  config.prompt_types = 'zeroshot'
  with pytest.raises(ValueError, match='prompt_types has none of winogender'):
    nlp_suite.validate(config)
  config.prompt_types = 'many'
  with pytest.raises(ValueError, match="no task has 'many'; known: .*zeroshot"):
    nlp_suite.validate(config)


def test_no_data_and_no_judge_are_named(folder, tmp_path):
  config = suite_config(folder, tmp_path)
  for name in config.data:
    config.data[name] = ''
  with pytest.raises(ValueError, match='data names no file'):
    nlp_suite.validate(config)
  config.may_be_empty = True  # As a stage of a pipeline.
  assert nlp_suite.run(config, epath.Path(tmp_path)) == {'scores': {}}
  config.data.truthful_qa, config.truth_labels = 'x.csv', ''
  with pytest.raises(ValueError, match='truth_labels and info_labels'):
    nlp_suite.validate(config)


def test_config_lists_every_task():
  config = config_file.get_config()
  assert set(config.data) == set(config.shots) == set(tasks.TASKS)
  assert set(config.sha256) == set(tasks.TASKS)
  with pytest.raises(ValueError, match='no variants'):
    config_file.get_config('1p3b')
