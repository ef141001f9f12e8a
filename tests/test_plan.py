"""Planning for TPUs that are not there; needs libtpu, no TPU."""

import dataclasses
import json

import pytest
from etils import epath

from configs import plan as config_file
from experiments import plan
from instruct_jax.infra import programs


@pytest.fixture
def config():
  pytest.importorskip('libtpu', reason='pip install -r requirements-plan.txt')
  config = config_file.get_config('miniature,v5e-4')
  with config.unlocked():
    config.programs = ('sft',)
    config.stop_at_first = True
    # Long enough rows and wide enough heads for the attention kernel.
    for shape in (config.policy, config.scalar):
      shape.head_dim, shape.context_length = 64, 128
      shape.scan_unroll = 1
    config.sft.row_length = 128
    config.sft.dropout = 0.0
  return config


def test_a_program_is_compiled_and_priced(config, workdir):
  summary = plan.run(config, epath.Path(workdir))
  row = summary['programs']['sft']
  # Forward, and both gradients, by splash attention.
  assert row['kernels'] >= 3
  assert row['missing'] < 0
  shape, _ = plan.models(config, 'none')
  # Parameters in float32 and Adam's two moments, a quarter on each chip.
  assert row['resident']['parameters'] == pytest.approx(
    shape.num_params, rel=0.05
  )
  assert row['resident']['optimizer'] == pytest.approx(
    2 * shape.num_params, rel=0.05
  )
  # 2 a weight and token forwards, twice that backwards; attention besides.
  tokens = config.sft.batch_size * config.sft.row_length
  assert row['flops'] * 4 > 6 * tokens * shape.num_params * 0.9
  assert row['flops'] * 4 < 6 * tokens * shape.num_params * 2
  assert row['collectives'].get('all-gather', 0) > 0
  assert json.loads((workdir / 'plan.json').read_text()) == summary
  assert '| sft | 1x4x1, none, 1 |' in (workdir / 'plan.md').read_text()


def test_what_cannot_fit_says_by_how_much(config, workdir, monkeypatch, capsys):
  small = dataclasses.replace(programs.CHIPS['v5e'], memory=100_000.0)
  monkeypatch.setitem(programs.CHIPS, 'v5e', small)
  with config.unlocked():
    config.meshes = ((1, -1, 1),)
  with pytest.raises(RuntimeError, match='sft fit on v5e:2x2 in none of 1 '):
    plan.run(config, epath.Path(workdir))
  assert 'GiB too much' in capsys.readouterr().out
  tried = json.loads((workdir / 'tried.json').read_text())
  assert tried[0]['missing'] == tried[0]['needed'] - 100_000.0


def test_the_compiler_own_refusal_is_read():
  message = 'Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm.'
  assert plan._needed_bytes(message) == 21.5 * 2**30
  message = (
    'Ran out of memory on HBM, the total memory required for HLO temporaries '
    '(26.20G) exceeds available HBM (15.75G).'
  )
  assert plan._needed_bytes(message) == pytest.approx(26.2 * 2**30)
  assert plan._needed_bytes('something else') is None


def test_an_iteration_by_hand():
  config = config_file.get_config('1p3b,v5e-8')
  rows = {name: {'least_seconds': 8.0} for name in plan.EPISODES}
  found = plan.iteration(config, rows, 8)
  # 512 episodes of 2,048 tokens in 24 seconds on 8 chips; 500 iterations.
  assert found['seconds'] == 24.0
  assert found['tokens_per_second_per_chip'] == 512 * 2048 / 24 / 8
  assert found['chip_hours'] == pytest.approx(500 * 24 * 8 / 3600)


@pytest.mark.parametrize('argument', ['1p3b', '1p3b,v5e-7', '2t,v5e-8'])
def test_unknown_arguments_are_named(argument):
  with pytest.raises(ValueError, match='v5e-8|2t'):
    config_file.get_config(argument)


def test_bad_values_are_named():
  config = config_file.get_config('miniature,v5e-1')
  with config.unlocked():
    config.programs = ('sft', 'dance')
  with pytest.raises(ValueError, match='dance'):
    plan.validate(config)
