"""The alignment tax of PPO runs, read from what they logged."""

import json

import pytest

from instruct_jax.evals import tax


def write_run(folder, name, gamma, beta, ends):
  stage = folder / name
  stage.mkdir(parents=True)
  rows = [
    {
      'step': step + 1,
      'objective/score': 0.1 * step,
      'probe/drop_zeroshot_F1': 20.0 - step * ends,
      'eval/pretraining_loss': 1.0 + 0.1 * step,
    }
    for step in range(3)
  ]
  rows[0]['probe_before/drop_zeroshot_F1'] = 21.0
  rows[0]['eval/pretraining_loss_before'] = 0.9
  rows[2]['objective/score'] = None  # Not finite.
  (stage / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
  return {'ptx_coef': gamma, 'kl_coef': beta}


@pytest.fixture
def runs(tmp_path):
  stages = {
    name: write_run(tmp_path / 'run', name, gamma, 0.02, ends)
    for name, gamma, ends in (('ppo', 0.0, 5.0), ('ppo_ptx', 27.8, 1.0))
  }
  (tmp_path / 'run' / 'config.json').write_text(json.dumps({'stages': stages}))
  return {name: tmp_path / 'run' / name for name in stages}


def test_figures_come_from_the_logs(runs, tmp_path):
  written = tax.write(runs, tmp_path / 'out')
  # Runs differ only in gamma, so there is no plot against beta.
  assert written == ['tax.json', 'tax_along_rl.png', 'tax_ptx_coef.png']
  for name in written[1:]:
    assert (tmp_path / 'out' / name).read_bytes().startswith(b'\x89PNG')
  summary = json.loads((tmp_path / 'out' / 'tax.json').read_text())
  assert summary['ppo']['end']['drop_zeroshot_F1'] == 10.0
  assert summary['ppo_ptx']['end']['drop_zeroshot_F1'] == 18.0
  assert summary['ppo']['end']['reward-model score'] == 0.1
  assert summary['ppo']['before'] == {
    'drop_zeroshot_F1': 21.0,
    'pretraining loss, nats per token': 0.9,
  }
  assert summary['ppo_ptx']['ptx_coef'] == 27.8


def test_a_single_stage_has_its_config_beside_it(tmp_path):
  stage = write_run(tmp_path, 'one', 1.0, 0.1, 1.0)
  (tmp_path / 'one' / 'config.json').write_text(json.dumps(stage))
  assert tax.write({'one': tmp_path / 'one'}, tmp_path / 'out') == [
    'tax.json',
    'tax_along_rl.png',
  ]


def test_missing_files_are_named(tmp_path, runs):
  with pytest.raises(ValueError, match='metrics.jsonl: no such file'):
    tax.read_run(tmp_path)
  write_run(tmp_path / 'run', 'other', 1.0, 0.1, 1.0)
  with pytest.raises(ValueError, match="has no stage 'other'"):
    tax.read_run(tmp_path / 'run' / 'other')
  write_run(tmp_path, 'alone/one', 1.0, 0.1, 1.0)
  with pytest.raises(ValueError, match='neither it nor its parent'):
    tax.read_run(tmp_path / 'alone' / 'one')
