"""Reward models on test sets, from the command line."""

import json

import numpy as np
import pytest
from etils import epath

from configs import reward_bench as config_file
from instruct_jax.data import records
from instruct_jax.data import tokenizer as tokenizer_lib
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
  rows, tokenizer = job.encode(config, long, items)
  with sharding.use_mesh(mesh):
    together = job.model_scores(config, long, rows, tokenizer, mesh)
    (alone,) = zip(
      *(job.model_scores(config, long, [x], tokenizer, mesh) for x in rows),
      strict=True,
    )
  assert len({float(row[0]) for row in together}) == 3
  np.testing.assert_allclose(together, alone, atol=1e-5)


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


def test_a_set_of_which_nothing_fits_is_named(folder, tmp_path):
  config = make_config(folder, max_length=3)
  with pytest.raises(ValueError, match='none of 8 items.*ours: 8 longer'):
    job.run(config, epath.Path(tmp_path))
