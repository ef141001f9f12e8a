"""A real PPO and PPO-ptx run, killed at 25 random points, ends as if it had not
been: the same parameters, optimizer states, lines and batches, bit for bit."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NUM_KILLS = 25
POINTS = (
  'respond',
  'score',
  'penalise',
  'train',
  'checkpoint',
  'model',
  'stage',
)
STAGES = ('ppo', 'ppo_ptx')
NUM_ITERATIONS = 16

CONFIG = f"""
from configs import ppo_ptx

def get_config():
  config = ppo_ptx.get_config('smoke')
  config.unlock()
  config.compilation_cache = {{cache!r}}
  for name in {STAGES!r}:
    stage = config.stages[name]
    stage.num_episodes, stage.batch_size = 8 * {NUM_ITERATIONS}, 8
    stage.num_minibatches, stage.eval_every = 2, 8
    stage.checkpoint_every = 1
  keep = {{keep!r}}
  config.stage_order = tuple(
    name for name in config.stage_order if name in keep
  )
  config.lock()
  return config
"""


def live(config, workdir, diary, point='none', number=0, delay=0.0):
  """One life of the run."""
  return subprocess.run(
    [
      *(sys.executable, ROOT / 'tests' / 'killed_run.py'),
      *(point, str(number), str(delay), diary, '--'),
      *(f'--config={config}', f'--workdir={workdir}'),
    ],
    cwd=ROOT,
    env={
      **os.environ,
      'XLA_FLAGS': '',
      'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path]),
    },
    capture_output=True,
    text=True,
    timeout=1800,
  )


def read_diary(path):
  """{(stage, step, batch): digest}; what was done twice was done alike."""
  lines = {}
  text = path.read_text()
  for line in text[: text.rfind('\n') + 1].splitlines():
    row = json.loads(line)
    key = (row['stage'], row['step'], row['batch'])
    assert lines.setdefault(key, row['sha256']) == row['sha256'], key
  return lines


def last_step(path, stage):
  steps = [
    step
    for name, step, _ in read_diary(path)
    if name == stage and step != 'last'
  ]
  return max(steps, default=-1)


def model_digest(folder):
  record = json.loads((folder / 'model.json').read_text())
  return {name: row['checksum'] for name, row in record['arrays'].items()}


@pytest.mark.slow
def test_killed_at_25_points_equals_uninterrupted(tmp_path):
  rng = np.random.default_rng(int(os.environ.get('KILL_SEED', '0')))
  cache = str(tmp_path / 'cache')
  everything = (
    ('data', 'pretrain', 'sft', 'rl_init', 'compare', 'reward'),
    ('data', 'pretrain', 'sft', 'rl_init', 'compare', 'reward', *STAGES),
  )
  configs = []
  for number, keep in enumerate(everything):
    configs.append(tmp_path / f'config{number}.py')
    configs[-1].write_text(CONFIG.format(cache=cache, keep=keep))
  # What comes before RL is the same in both runs, and done once.
  before = tmp_path / 'before'
  ended = live(configs[0], before, tmp_path / 'before.jsonl')
  assert ended.returncode == 0, ended.stderr[-3000:]
  (before / 'config.json').unlink()
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  for workdir in (whole, killed):
    # A model knows no path; the stages' own records are not compared.
    shutil.copytree(before, workdir)
  ended = live(configs[1], whole, tmp_path / 'whole.jsonl')
  assert ended.returncode == 0, ended.stderr[-3000:]

  diary = tmp_path / 'killed.jsonl'
  diary.touch()
  kills = []
  while len(kills) < NUM_KILLS:
    # By turns, so that each kind of point comes up: three times or more.
    point = POINTS[len(kills) % len(POINTS)]
    number = int(rng.integers(1, 3))
    current = STAGES[last_step(diary, STAGES[1]) >= 0]
    if point == 'stage':  # Each stage once: six before ppo.
      number = 7 + STAGES.index(current)
    elif point == 'model' and last_step(diary, current) < NUM_ITERATIONS - 3:
      point = 'train'  # No model is near.
    delay = float(rng.uniform(0, 0.15))
    reached = {stage: last_step(diary, stage) for stage in STAGES}
    ended = live(configs[1], killed, diary, point, number, delay)
    if ended.returncode == 0:
      break
    assert ended.returncode == -9, ended.stderr[-3000:]
    kills.append(point)
    # At most the interval was lost: the step that ran, and the one whose
    # checkpoint was being written.
    for line in ended.stdout.splitlines():
      stage, _, rest = line.partition(': continues after step ')
      if rest:
        assert int(rest) >= reached[stage] - 1, (line, reached)
  print(f'{len(kills)} kills: { {name: kills.count(name) for name in POINTS} }')
  assert len(kills) == NUM_KILLS, f'{kills}: too few iterations for 25 kills'
  if ended.returncode:
    ended = live(configs[1], killed, diary)
    assert ended.returncode == 0, ended.stderr[-3000:]

  # Every batch, and the last states: parameters, both optimizers, EMA, KL.
  expected = read_diary(tmp_path / 'whole.jsonl')
  assert read_diary(diary) == expected
  assert {(stage, 'last', 0) for stage in STAGES} <= set(expected)
  for stage in STAGES:
    for name in ('metrics.jsonl', 'alarms.json'):
      assert (killed / stage / name).read_bytes() == (
        whole / stage / name
      ).read_bytes()
    for model in ('policy', 'ema'):
      assert model_digest(killed / stage / model) == model_digest(
        whole / stage / model
      )
