"""Reward models on test sets, from the command line."""

import json
import shutil

import numpy as np
import pytest
import transformers
from etils import epath

from configs import reward_bench as config_file
from instruct_jax import judge_fns, queries
from instruct_jax.data import records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import reward_bench
from instruct_jax.infra import sharding
from instruct_jax.jobs import reward_bench as job
from tests import published, tiny

pytestmark = pytest.mark.usefixtures('quick_compile')

SUBSETS = ('alpacaeval-easy', 'mt-bench-hard', 'donotanswer', 'hep-go')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Two published scorers, a reward model of ours, and test sets."""
  root = tmp_path_factory.mktemp('reward_bench')
  for name, worth in (('likes_z', 1.0), ('hates_z', -1.0)):
    place = root / name
    backend = published.save_byte_tokenizer(place, template=published.TEMPLATE)
    # Scores are shares of the row, so that only the sign of z counts.
    published.save_scorer(
      place, backend.get_vocab_size(), {backend.token_to_id('z'): worth}
    )
  tokenizer = tokenizer_lib.train_bpe(['a fox said that he left'] * 3, 270)
  tokenizer.save(root / 'tokenizer')
  tiny.save_model(root, 'ours', 'scalar', tokenizer, 0)
  rows = [
    {
      'prompt': f'fox {i}?',
      'chosen': 'zzz' if i % 4 else 'a',  # Three of four have the z.
      'rejected': 'a' if i % 4 else 'zzz',
      'subset': SUBSETS[i % 2],
      'id': i,
    }
    for i in range(16)
  ]
  rows.append(rows[0] | {'id': 16, 'rejected': 'fox' * 90})  # Too long.
  lines = ''.join(json.dumps(row) + '\n' for row in rows)
  (root / 'filtered.jsonl').write_text(lines)
  records.write_jsonl(
    root / 'own.jsonl',
    [
      records.Comparison(f'fox {i}\n', ('a z', 'a', 'zz z'), (2, 3, 1))
      for i in range(8)
    ],
  )
  return root


def arguments(folder, workdir):
  models = ('likes_z', 'hates_z', 'ours')
  return [
    '--config=configs/reward_bench.py',
    f'--workdir={workdir}',
    '--config.models=' + ','.join(f'{m}={folder / m}' for m in models),
    f'--config.tokenizer={folder / "tokenizer"}',
    f'--config.sets=rewardbench:{folder / "filtered.jsonl"},'
    f'own=comparisons:{folder / "own.jsonl"}',
    '--config.num_bootstrap=50',
    '--config.batch_size=8',
    '--config.compilation_cache=',
  ]


@pytest.fixture(scope='module')
def finished(start, folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  ended = start('instruct_jax.main', *arguments(folder, workdir))
  assert ended.returncode == 0, ended.stderr
  return workdir, ended.stdout


def test_all_models_and_baselines_are_measured(folder, finished):
  workdir, output = finished
  result = json.loads((workdir / 'reward_bench.json').read_text())
  bench, own = (result['accuracy'][name] for name in ('rewardbench', 'own'))
  # i % 4 is 0 in half of the even rows and never in the odd ones.
  for scorer, easy, hard in (('likes_z', 0.5, 1.0), ('hates_z', 0.5, 0.0)):
    subsets = bench[scorer]['subsets']
    assert subsets['alpacaeval-easy']['mean'] == easy
    assert subsets['mt-bench-hard']['mean'] == hard
    assert bench[scorer]['summary']['Chat']['mean'] == easy
    assert bench[scorer]['summary']['Chat Hard']['mean'] == hard
    assert bench[scorer]['summary']['score']['mean'] == (easy + hard) / 2
  # (2, 3, 1) by the number of z.
  assert own['likes_z']['summary']['all pairs']['mean'] == 1.0
  assert own['hates_z']['summary']['all pairs']['mean'] == 0.0
  # "zz z" has as many words as "a z": one of three pairs is tied.
  longer = own['longer is better']['summary']['all pairs']['mean']
  assert longer == pytest.approx(2.5 / 3)
  assert own['bag of words']['summary']['all pairs']['mean'] > 0.5
  assert set(bench) == {'likes_z', 'hates_z', 'ours', *job.BASELINES}
  about = result['sets']['rewardbench']
  assert (about['items'], about['given']) == (16, 17)
  assert about['left out, by model'] == {
    'likes_z': {job.TOO_LONG: 1},
    'hates_z': {job.TOO_LONG: 1},
    'ours': {job.TOO_LONG: 1},
  }
  assert about['files'] == [str(folder / 'filtered.jsonl')]
  assert about['not read'] == ''
  assert 'hep-go' in about['missing subsets']
  assert 'chat template' in result['reads']['likes_z']
  assert '1 of 17 items of rewardbench left out' in output


def test_scores_are_written_and_give_the_figures(finished):
  workdir, _ = finished
  result = json.loads((workdir / 'reward_bench.json').read_text())
  lines = (workdir / 'scores' / 'ours.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  scores = [r['scores'] for r in rows if r['set'] == 'rewardbench']
  assert len(scores) == 16 and len(rows) == 24
  assert len({tuple(row) for row in scores}) > 2
  for subset in SUBSETS[:2]:
    right = [
      r['scores'][0] > r['scores'][1] for r in rows if r['subset'] == subset
    ]
    found = result['accuracy']['rewardbench']['ours']['subsets'][subset]
    assert found['mean'] == pytest.approx(np.mean(right))


def test_the_report_has_every_figure(finished):
  workdir, output = finished
  text = (workdir / 'reward_bench.md').read_text()
  assert str(workdir / 'reward_bench.md') in output
  for part in ('## rewardbench', '## own', 'Chat Hard', 'alpacaeval-easy'):
    assert part in text
  assert '16 of 17 items' in text and 'ours: 1 longer than max' in text
  assert '![Accuracies](reward_bench.png)' in text
  assert (workdir / 'reward_bench.png').stat().st_size > 1000
  # Every row of a table has as many cells as its head.
  for block in text.split('\n\n'):
    if block.startswith('|'):
      assert len({line.count(' | ') for line in block.splitlines()[2:]}) == 1


def test_length_of_other_rows_changes_no_score(folder):
  """Rows are scored with others of about their length."""
  tokenizer = tokenizer_lib.Tokenizer.load(folder / 'tokenizer')
  tiny.save_model(folder, 'long', 'scalar', tokenizer, 1, context_length=256)
  config = make_config(folder)
  items = [
    records.Comparison(f'fox {i}', ('he left' * (1 + 29 * i), 'a'), (1, 2))
    for i in range(3)
  ]
  assert len(tokenizer.encode(items[-1].completions[0])) > 2 * job.SHORTEST
  mesh, long = tiny.one_device(), str(folder / 'long')
  rows, tokenizer = encode(config, long, items)
  with sharding.use_mesh(mesh):
    together = job.model_scores(config, long, rows, tokenizer, mesh)
    (alone,) = zip(
      *(job.model_scores(config, long, [x], tokenizer, mesh) for x in rows),
      strict=True,
    )
  assert len({float(row[0]) for row in together}) == 3
  np.testing.assert_allclose(together, alone, atol=1e-5)


CONVERSATIONS = [
  (
    [{'role': 'user', 'content': 'Indent.'}],
    ['    return 1\n', ' \n', '', 'two\n\nlines  '],
  ),
  (
    [
      {'role': 'user', 'content': 'Hi'},
      {'role': 'assistant', 'content': ' Yes? '},
      {'role': 'user', 'content': 'z\n'},
    ],
    [' space first', 'z'],
  ),
  (
    [{'role': 'system', 'content': 'S'}, {'role': 'user', 'content': 'q'}],
    'ab',
  ),
]


def encode(config, folder, items):
  """(rows of ids, tokenizer), as the stage encodes them."""
  tokenizer, is_whole = queries.classifier_tokenizer_of(
    folder, config.tokenizer
  )
  return job.encode(tokenizer, is_whole, items), tokenizer


def published_items(path):
  """`CONVERSATIONS` as RewardBench 2 would have them, read again."""
  rows = [
    {'prompt': turns, 'chosen': list(texts[:1]), 'rejected': list(texts[1:])}
    | {'subset': 'Math', 'id': number}
    for number, (turns, texts) in enumerate(CONVERSATIONS)
  ]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return reward_bench.read('rewardbench2', path).comparisons


@pytest.mark.parametrize('given', ['', 'tokenizer', 'likes_z'])
def test_a_published_classifier_reads_all_that_its_template_renders(
  folder, tmp_path, given
):
  """Line breaks after the turn's end, too, and an answer's own white space."""
  config = make_config(folder, tokenizer=given and str(folder / given))
  items = published_items(tmp_path / 'x.jsonl')
  rows, _ = encode(config, str(folder / 'likes_z'), items)
  theirs = transformers.AutoTokenizer.from_pretrained(folder / 'likes_z')
  for ids, (turns, texts) in zip(rows, CONVERSATIONS, strict=True):
    for found, text in zip(ids, texts, strict=True):
      turns_and_answer = [*turns, {'role': 'assistant', 'content': text}]
      expected = theirs.apply_chat_template(
        turns_and_answer, tokenize=True, return_dict=False
      )
      assert found.tolist() == expected
      assert theirs.decode(expected[-5:]).endswith('<end>\n')


def test_what_an_answer_spells_is_no_special_token(folder):
  config = make_config(folder)
  item = records.Comparison('q', ('a<end>', 'b'), (1, 2))
  (rows,), tokenizer = encode(config, str(folder / 'likes_z'), [item])
  assert rows[0].tolist().count(tokenizer.end_id) == 2
  assert rows[1].tolist().count(tokenizer.end_id) == 2
  assert len(rows[0]) == len(rows[1]) + len('<end>')


def test_an_answer_that_was_cut_has_no_end(folder):
  item = records.Comparison('q', ('ab', 'b'), (1, 2), ended=(False, True))
  (rows,), tokenizer = encode(
    make_config(folder), str(folder / 'likes_z'), [item]
  )
  assert rows[0][-2:].tolist() == tokenizer.encode('ab')
  assert rows[1][-1] == tokenizer.end_id


def test_a_prepared_tokenizer_ends_an_answer_as_in_training(folder, tmp_path):
  for name in ('tokenizer.json', 'tokenizer_config.json', 'config.json'):
    shutil.copy(folder / 'likes_z' / name, tmp_path)
  tokenizer = tokenizer_lib.Tokenizer.load(folder / 'likes_z')
  tokenizer.with_format('chat', []).save(tmp_path)
  item = records.Comparison('q', ('a', 'b'), (1, 2))
  (rows,), found = encode(make_config(folder), str(tmp_path), [item])
  assert rows[0][-1] == found.end_id


def test_scores_are_those_of_transformers(folder, tmp_path):
  """A Llama with random weights, padded on the right and on the left."""
  torch = pytest.importorskip('torch', reason='scores of transformers')
  torch.manual_seed(0)
  place = tmp_path / 'model'
  backend = published.save_byte_tokenizer(place, template=published.TEMPLATE)
  theirs = transformers.LlamaForSequenceClassification(
    transformers.LlamaConfig(
      vocab_size=backend.get_vocab_size(),
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      max_position_embeddings=256,
      num_labels=1,
      initializer_range=0.5,
      # It ends turns, so that only what follows it can be read.
      pad_token_id=backend.token_to_id('<end>'),
      bos_token_id=None,
      eos_token_id=backend.token_to_id('</s>'),
    )
  )
  theirs.eval().save_pretrained(place)
  items = published_items(tmp_path / 'x.jsonl')
  config, mesh = make_config(folder), tiny.one_device()
  rows, tokenizer = encode(config, str(place), items)
  with sharding.use_mesh(mesh):
    ours = job.model_scores(config, str(place), rows, tokenizer, mesh)
  fast = transformers.AutoTokenizer.from_pretrained(place)
  expected = []
  for turns, texts in CONVERSATIONS:
    for text in texts:
      answered = [*turns, {'role': 'assistant', 'content': text}]
      ids = fast.apply_chat_template(
        answered, return_tensors='pt', return_dict=False
      )
      with torch.no_grad():
        expected.append(theirs(ids).logits.item())
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(np.concatenate(ours), expected, atol=1e-4)
  # As judges and RL read it: their answers end with the end of a turn, and
  # never begin with white space.
  with sharding.use_mesh(mesh):
    score_fn, _ = judge_fns.reward_score(config, str(place), mesh)
    scores = judge_fns.comparison_scores(score_fn, items, tokenizer)
  texts = [text for _, answers in CONVERSATIONS for text in answers]
  same = [not text[:1].isspace() for text in texts]
  assert sum(same) == 5
  np.testing.assert_allclose(
    np.concatenate(scores)[same], np.array(expected)[same], atol=1e-4
  )


def test_items_that_a_template_refuses_are_told_apart(folder, tmp_path, capsys):
  published.save_byte_tokenizer(
    tmp_path / 'strict', template=published.STRICT_TEMPLATE
  )
  shutil.copy(folder / 'likes_z' / 'config.json', tmp_path / 'strict')
  items = published_items(tmp_path / 'x.jsonl')
  config = make_config(folder)
  rows, _ = encode(config, str(tmp_path / 'strict'), items)
  assert [each is None for each in rows] == [False, False, True]
  benchmark = reward_bench.Benchmark('rewardbench2', items)
  job.keep(
    config, 'x', benchmark, np.array([1, 1, 0], bool), {'m': {job.REFUSED: 1}}
  )
  assert len(benchmark.comparisons) == 2
  said = capsys.readouterr().out
  assert '1 of 3 items of x left out: m: 1 refused by its chat template' in said


def test_a_set_that_is_not_whole_any_more_is_named_before_it_is_scored(folder):
  items = [
    records.Comparison('q', ('a', 'b', 'c')[: 4 - n], (1, 1, 2)[n - 1 :],
                       id=f'{kind}:1', category='Ties')
    for kind, n in (('tied', 1), ('ref', 2))
  ]  # fmt: skip
  benchmark = reward_bench.Benchmark('rewardbench2', items)
  benchmark.check()
  with pytest.raises(ValueError, match=r'1 of 2 items of x.*m: 1 long.*Ties'):
    job.keep(
      make_config(folder), 'x', benchmark, np.array([True, False]),
      {'m': {'long': 1}},
    )  # fmt: skip


def test_baselines_may_learn_from_other_rankings(folder):
  items = [records.Comparison('p', ('a', 'a good one'), (2, 1))] * 3
  train = [
    records.Comparison(f'{i}', ('bad one', 'z'), (2, 1)) for i in range(9)
  ]
  found, problems = job.baseline_scores(items, train)
  assert problems == []
  # Shorter is better there.
  assert found[job.LENGTH][0][0] > found[job.LENGTH][0][1]
  found, problems = job.baseline_scores(items, None)
  assert list(found) == [job.LONGER]
  assert 'folds need at least two' in problems[0]


def make_config(folder, **changes):
  config = config_file.get_config()
  config.models = f'ours={folder / "ours"}'
  config.tokenizer = str(folder / 'tokenizer')
  config.sets = f'comparisons:{folder / "own.jsonl"}'
  config.update(changes)
  return config


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'models': ''}, 'models is empty'),
    ({'models': 'length=x'}, "'length' is, in the name of a file, also a base"),
    ({'models': 'bag_of_words=x'}, "'bag_of_words' is, in the name of a file"),
    ({'sets': ''}, 'sets is empty'),
    ({'sets': 'x.jsonl'}, "FORMAT:PATH or NAME=FORMAT:PATH.*'x.jsonl'"),
    ({'sets': 'rewardbench9:x'}, "format 'rewardbench9'"),
    ({'sets': 'hh:x,hh:y'}, "distinct names: 'hh:y'"),
    ({'tokenizer': ''}, 'tokenizer is empty'),
    ({'max_length': -1}, 'max_length must not be negative.*-1'),
    ({'num_bootstrap': 0}, 'num_bootstrap'),
  ],
)
def test_bad_values_are_named(folder, changes, message):
  with pytest.raises(ValueError, match=message):
    job.validate(make_config(folder, **changes))


def test_sets_may_lie_in_a_bucket_and_have_names():
  assert job.named_sets('hh:gs://b/x=1,mine=rm_bench:/y') == {
    'hh': ('hh', 'gs://b/x=1'),
    'mine': ('rm_bench', '/y'),
  }


def test_a_model_that_is_no_reward_model_is_named_first(folder, tmp_path):
  place = tmp_path / 'two'
  shutil.copytree(folder / 'likes_z', place)
  described = json.loads((place / 'config.json').read_text())
  (place / 'config.json').write_text(json.dumps(described | {'num_labels': 2}))
  (place / 'model.safetensors').unlink()
  config = make_config(folder, models=f'two={place}')
  with pytest.raises(ValueError, match=f'{place}: config.json: 2 labels'):
    job.run(config, epath.Path(tmp_path))


def test_a_set_of_which_nothing_fits_is_named(folder, tmp_path):
  config = make_config(folder, max_length=3)
  with pytest.raises(ValueError, match='none of 8 items.*ours: 8 longer'):
    job.run(config, epath.Path(tmp_path))


def test_a_stage_that_was_cut_keeps_the_models_that_have_scored(tmp_path):
  items = [[np.array([1, 2]), np.array([3])]]
  calls = []

  def score():
    calls.append(1)
    return [np.array([0.1, float(len(calls))])]

  path = epath.Path(tmp_path / job.KEPT / '0.json')
  first = job.kept_scores(path, items, score)
  again = job.kept_scores(path, items, score)
  np.testing.assert_array_equal(first, again)
  assert len(calls) == 1
  # Other items, other scores; the same ids in other answers are other items.
  other = [[np.array([1]), np.array([2, 3])]]
  assert job.kept_scores(path, other, score)[0][1] == 2.0
