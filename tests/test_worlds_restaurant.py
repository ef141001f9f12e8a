"""The restaurant variant: its config, and all its stages on real data."""

import csv
import gzip
import json
import os
import pathlib
import subprocess
import sys

import pytest
from etils import epath

from configs import ppo_ptx
from instruct_jax.data import records, tokenizer
from instruct_jax.infra import pipeline
from instruct_jax.infra import stages as stages_lib
from instruct_jax.worlds import restaurant

REPOSITORY = pathlib.Path(__file__).parents[1]

# As little of every stage as still runs.
SMOKE = {
  'xla_flags': '--xla_backend_optimization_level=0',
  'stages.data.vocab_size': 2_000,
  'stages.pretrain.model.width': 32,
  'stages.pretrain.model.num_layers': 2,
  'stages.pretrain.model.num_heads': 1,
  'stages.pretrain.model.mlp_dim': 64,
  'stages.pretrain.model.scan_unroll': 1,
  'stages.pretrain.num_steps': 20,
  'stages.pretrain.num_warmup': 5,
  'stages.sft.num_epochs': 2,
  'stages.rl_init.num_epochs': 1,
  'stages.reward.max_comparisons': 64,
  'stages.judge.max_comparisons': 64,
  'stages.crossval.max_comparisons': 64,
  'stages.crossval.num_folds': 2,
  'stages.select.num_prompts': 16,
  'stages.select.batch_size': 16,
  'stages.ppo.num_episodes': 32,
  'stages.ppo.batch_size': 16,
  'stages.ppo_ptx.num_episodes': 32,
  'stages.ppo_ptx.batch_size': 16,
  'stages.evaluate.num_prompts': 12,
  'stages.evaluate.samples_per_prompt': 2,
  'stages.evaluate.num_prefix_prompts': 4,
  'stages.evaluate.batch_size': 24,
}


def _demonstration(prompt, response):
  return records.Demonstration(prompt=f'{prompt}\n', response=response)


def test_root_reaches_the_data_stage_by_either_name(tmp_path):
  config = ppo_ptx.get_config('e2e')
  config.data.root = 'a'
  assert config.stages.data.root == 'a'
  config.stages.data.root = 'b'
  assert config.data.root == 'b'


def test_a_missing_root_is_told_before_any_compute(tmp_path):
  config = ppo_ptx.get_config('e2e')
  with pytest.raises(ValueError, match=r'set --config\.data\.root=DIR'):
    restaurant.validate(config.stages.data)
  (tmp_path / 'books').mkdir()
  config.data.root = str(tmp_path)
  config.workdir = str(tmp_path)
  found = stages_lib.of_run(
    config, config, epath.Path(tmp_path), pipeline.find_experiment
  )
  with pytest.raises(ValueError, match='e2e_nlg: no such') as error:
    stages_lib.find_missing(found)
  # Of all twelve stages nothing else is missing: the others make it.
  assert [line.split(': ')[1] for line in str(error.value).splitlines()] == [
    'root/e2e_nlg',
    'root/e2e_rankings',
  ], error.value


def test_every_stage_validates_and_lengths_fit_together(tmp_path):
  for name in restaurant.FOLDERS:
    (tmp_path / name).mkdir()
  config = ppo_ptx.get_config('e2e')
  config.data.root = str(tmp_path)
  stages = config.stages
  assert set(config.stage_order) == set(stages.keys())
  for name in config.stage_order:
    assert stages[name].name == name
    pipeline.find_experiment(stages[name].experiment).validate(stages[name])
  assert stages.judge.comparisons != stages.reward.comparisons
  assert stages.judge.seed != stages.reward.seed
  context = stages.pretrain.model.context_length
  longest = stages.evaluate.prompt_length + stages.evaluate.response_length
  assert longest + stages.evaluate.prefix_length <= context
  assert stages.data.prefix_length == stages.evaluate.prefix_length


def test_prefixes_are_training_examples_and_fit():
  demonstrations = [
    _demonstration('name: A', 'It is A.'),
    _demonstration('name: A', 'This is A.'),
    _demonstration('name: B', 'It is B.'),
    _demonstration('name: C', 'It is C.'),
    _demonstration('name: D, area: ' + 'long ' * 40, 'It is D.'),
  ]
  tokens = tokenizer.train_bpe(
    [d.prompt + d.response for d in demonstrations], 300
  )
  prefixes = restaurant.make_prefixes(demonstrations, tokens, 60, seed=0)
  assert len(prefixes) == restaurant.NUM_PREFIXES
  known = {d.prompt + d.response for d in demonstrations}
  for prefix in prefixes:
    *examples, slot = prefix.split('\n\n')
    assert slot == '{prompt}'
    assert len(examples) in (2, 3) and set(examples) <= known
    facts = [example.split('\n')[0] for example in examples]
    assert len(set(facts)) == len(facts)
    assert len(tokens.encode(prefix.replace('{prompt}', ''))) <= 60
  assert prefixes == restaurant.make_prefixes(
    demonstrations, tokens, 60, seed=0
  )
  assert prefixes != restaurant.make_prefixes(
    demonstrations, tokens, 60, seed=1
  )
  with pytest.raises(ValueError, match='raise prefix_length'):
    restaurant.make_prefixes(demonstrations, tokens, 5, seed=0)


@pytest.mark.slow
def test_all_stages_on_real_data(data_root, tmp_path):
  # One book instead of 28, 500 sentences instead of 4,672, one real ranking
  # file: what takes the time is their number.
  root = tmp_path / 'root'
  for name in restaurant.FOLDERS:
    if not (data_root / name).is_dir():
      pytest.skip(f'no {name} in {data_root}')
    (root / name).mkdir(parents=True)
  for path in (
    min((data_root / 'books').glob('*.txt.gz')),
    data_root / 'e2e_rankings' / 'quality.csv.gz',
  ):
    (root / path.parent.name / path.name).symlink_to(path)
  with gzip.open(data_root / 'e2e_nlg' / 'devset.csv.gz', 'rt') as file:
    rows = list(csv.reader(file))[:500]
  with open(root / 'e2e_nlg' / 'devset.csv', 'w', newline='') as file:
    csv.writer(file).writerows(rows)
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  workdir = tmp_path / 'run'
  command = [
    sys.executable,
    '-m',
    'instruct_jax.main',
    '--config=configs/ppo_ptx.py:e2e',
    f'--config.data.root={root}',
    f'--workdir={workdir}',
    *(f'--config.{key}={value}' for key, value in SMOKE.items()),
  ]

  def run():
    done = subprocess.run(
      command, cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

  run()
  summary = json.loads((workdir / 'summary.json').read_text())
  rates = summary['win_rate']
  assert rates['sft']['rate'] == 0.5
  # Samples of one prompt are one prompt.
  assert {rate['num_prompts'] for rate in rates.values()} == {12}
  assert 0 < summary['reward_model']['agreement'] < 1
  assert summary['reward_model']['ceiling'] is None
  rankings = summary['intervals']['reward_model']['rankings']
  assert list(rankings) == ["reward model's workers", "judge's workers"]
  for ranked in rankings.values():
    assert set(ranked['accuracies']) == {
      'reward model',
      'judge',
      'length only',
      'bag of words (Bradley-Terry)',
    }
  # It knows no model: it is the data's own.
  words = rankings["judge's workers"]['accuracies'][
    'bag of words (Bradley-Terry)'
  ]
  assert words['accuracy'] == pytest.approx(0.7, abs=0.1)
  slots = summary['extra']['Slots and BLEU']
  assert slots['people']['slots realised']['mean'] == pytest.approx(
    0.92, abs=0.05
  )
  assert 'BLEU' in slots['sft']
  assert (workdir / 'report.md').exists()
  # Finished stages are not run again.
  assert 'evaluate: already done' in run()
