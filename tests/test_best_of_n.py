"""Best-of-n beside RL on tiny models, by a judge that is a reward model."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from configs import best_of_n as config_file
from configs.evaluate import JUDGES
from instruct_jax.data import records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.jobs import best_of_n as experiment
from tests import tiny

pytestmark = pytest.mark.usefixtures('quick_compile')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp('best_of_n')
  tokenizer = tokenizer_lib.train_bpe(['a fox said that he left'] * 3, 270)
  tokenizer.save(root / 'tokenizer')
  for seed, (name, kind) in enumerate(
    (
      ('start', 'policy'),
      ('ppo/snapshots/2', 'policy'),
      ('ppo/snapshots/10', 'policy'),
      ('ppo/policy', 'policy'),
      ('proxy', 'scalar'),
      ('judge', 'scalar'),
    )
  ):
    tiny.save_model(root, name, kind, tokenizer, seed)
  records.write_jsonl(
    root / 'prompts.jsonl',
    [records.Prompt(f'p{i}', f'fox {i}') for i in range(6)],
  )
  return root


def make_config(folder, workdir):
  config = config_file.get_config('reward')
  with config.unlocked():
    config.workdir = str(workdir)
  config.policy = f'{folder}/start'
  config.reward_model = f'{folder}/proxy'
  config.judge_model = f'{folder}/judge'
  config.rl = f'ppo={folder}/ppo,same={folder}/same'
  config.prompts = f'{folder}/prompts.jsonl'
  config.tokenizer = f'{folder}/tokenizer'
  config.num_samples = 12
  config.prompt_length = 8
  config.response_length = 8
  config.batch_size = 24
  config.num_bootstrap = 50
  config.mesh = (1, 1, 1) if jax.device_count() == 1 else (8, 1, 1)
  return config


@pytest.fixture(scope='module')
def result(folder, tmp_path_factory):
  tokenizer = tokenizer_lib.Tokenizer.load(folder / 'tokenizer')
  # RL that did not move: the initial policy itself.
  tiny.save_model(folder, 'same/policy', 'policy', tokenizer, 0)
  workdir = epath.Path(tmp_path_factory.mktemp('run'))
  experiment.run(make_config(folder, workdir), workdir)
  assert (workdir / 'frontier.png').stat().length > 1000
  assert 'α − β log d' in (workdir / 'best_of_n.md').read_text()
  return json.loads((workdir / 'best_of_n.json').read_text())


def test_best_of_n_rises_by_the_proxy_from_zero(result):
  rows = result['points']['best of n']
  assert [row['label'] for row in rows] == [
    f'n = {n}' for n in (1, 2, 4, 8, 12)
  ]
  proxy = [row['proxy']['mean'] for row in rows]
  assert proxy[0] == pytest.approx(0, abs=1e-9)
  assert np.all(np.diff(proxy) > 0)
  assert rows[0]['kl']['mean'] == 0
  assert rows[1]['kl']['mean'] == pytest.approx(np.log(2) - 0.5)
  assert result['fits']['best of n']['num_points'] == 4


def test_snapshots_come_in_order_with_positive_kl(result):
  rows = result['points']['ppo']
  assert [row['label'] for row in rows] == ['2', '10', 'policy']
  assert all(row['kl']['mean'] > 1 for row in rows)
  assert result['fits']['ppo']['kind'] == 'rl'


def test_rl_that_did_not_move_has_no_kl_and_no_fit(result):
  (row,) = result['points']['same']
  assert row['kl']['mean'] == pytest.approx(0, abs=1e-4)
  assert 'at least three' in result['not fitted']['same']


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'policy': ''}, 'policy is empty'),
    ({'judge': 'x'}, "judge 'x' is not a dotted name"),
    ({'judge': JUDGES['people']}, 'People gives no scores'),
    ({'judge_model': ''}, 'judge_model is empty'),
    ({'num_samples': 4}, 'at least 8.*4'),
    ({'temperature': 0.0}, 'temperature'),
    ({'rl': 'ppo'}, 'NAME=FOLDER'),
  ],
)
def test_bad_values_are_named(folder, tmp_path, changes, message):
  config = make_config(folder, tmp_path)
  config.update(changes)
  with pytest.raises(ValueError, match=message):
    experiment.validate(config)


def test_a_folder_without_policies_is_named(tmp_path):
  with pytest.raises(ValueError, match='no snapshots/ and no policy/'):
    experiment.rl_policies(str(tmp_path))


def test_sizes_double_up_to_all():
  assert experiment.sizes_up_to(64) == [1, 2, 4, 8, 16, 32, 64]
  assert experiment.sizes_up_to(12) == [1, 2, 4, 8, 12]
