"""The study: rules on made-up runs, its table, and its processes."""

import json
import math
import pathlib
import re
import shutil
import sys

import numpy as np
import pytest
from etils import epath
from PIL import Image

from configs import reward as reward_config
from configs import study as config_file
from instruct_jax import rankings
from instruct_jax.data import records, tokenizer
from instruct_jax.evals import claims, plots, preference_accuracy, win_rate
from instruct_jax.evals.benchmarks import tasks
from instruct_jax.infra import stages
from instruct_jax.jobs import study
from instruct_jax.miniature import phrases, world
from instruct_jax.worlds.miniature import minimal_pairs

SAME = ('reward', 'reward_ranked')
CLAIMS = pathlib.Path(__file__).parents[1] / 'experiments' / 'claims'


def write(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


@pytest.fixture(scope='module')
def config():
  """Of one seed, as main.py records it."""
  return config_file.get_config('all,seed')


def read(folder, seed=0):
  return claims.Seed(claims.record(folder, seed))


def made_up(folder, config, seed=0, better=0.0):
  """A finished run whose figures are drawn, some of them as asked.

  Args:
    better: added to PPO's and PPO-ptx's win rates of one half.
  """
  rng = np.random.default_rng(seed)
  stages = list(config.stage_order)
  write(
    folder / 'config.json',
    {
      'sweeps': config.sweeps.to_dict(),
      'stages_of': config.stages_of.to_dict(),
      'stage_order': stages,
    },
  )
  everyone, losses, kl = {}, {}, {}
  judged = config.stages[stages[-1]].copy_and_resolve_references()
  models = [
    part.partition('=')[0]
    for key in ('models', 'other_models')
    for part in judged[key].split(',')
  ]
  for number, name in enumerate(['prompted', *models]):
    rate = 0.5 + better if name.startswith('ppo') else 0.1 + 0.1 * number
    everyone[name] = {
      'judge': float(rng.uniform()),
      'reward model': float(rng.normal()),
      'win rate': {'rate': rate + float(rng.normal()) / 1000},
    }
    losses[name], kl[name] = float(rng.uniform(0.5, 0.9)), 1.0
  write(
    folder / stages[-1] / 'summary.json',
    {'everyone': everyone, 'pretraining_loss': losses, 'kl': kl},
  )
  for name in stages:
    write(folder / name / 'seconds.json', 36.0)
    if name.startswith('reward'):
      share = config.sweeps.get('data_reward', {}).get(name, 1.0)
      write(
        folder / name / 'results.json',
        {
          'accuracy': 0.7 + 0.01 * math.log2(share),
          # The same model with another bias.
          'log_loss': 0.5 if name in SAME else float(rng.uniform(0.4, 0.6)),
          'num_comparisons': round(25_000 * share),
        },
      )
    if name.startswith('frontier'):
      kls = np.linspace(0.2, 8 + rng.uniform(), 10)
      gold = np.sqrt(kls) * (0.3 - 0.1 * np.log(np.sqrt(kls)))
      write(
        folder / name / 'best_of_n.json',
        {
          'points': {
            'best of n': [
              {'kl': {'mean': kl}, 'proxy': {'mean': kl}, 'gold': {'mean': kl}}
              for kl in (0.0, 0.2, 0.6)
            ],
            'ppo': [
              {
                key: {'mean': float(x)}
                for key, x in zip(('kl', 'proxy', 'gold'), row, strict=True)
              }
              for row in zip(kls, kls, gold, strict=True)
            ],
          }
        },
      )
  write(
    folder / 'crossval' / 'results.json',
    {'intra': {'mean': 0.72}, 'inter': {'mean': 0.70}},
  )
  bits = {
    'pretrained': 0.9,
    'sft': 0.6,
    'ppo': 0.7 + seed / 100,
    'ppo_ptx': 1.0,
  }
  key = 'winogender basic prompt entropy'
  write(
    folder / 'minimal_pairs' / 'done.json',
    {'info': {'scores': {f'{name} {key}': x for name, x in bits.items()}}},
  )
  rows = [
    {'epoch': e, 'valid_loss': abs(e - 2.0), 'score_reward': 0.1 * e}
    for e in range(1, 17)
  ]
  write(folder / 'select_long' / 'epochs.json', rows)
  return read(folder, seed)


def test_student_by_hand():
  found = win_rate.student_interval([1.0, 2.0, 3.0])
  # s = 1, t = 4.3027 with two degrees of freedom.
  assert found.mean == 2.0
  assert found.high - 2.0 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
  assert win_rate.student_interval([1.0]).high == math.inf
  with pytest.raises(ValueError, match='finite'):
    win_rate.student_interval([1.0, math.nan])


@pytest.mark.parametrize(
  'values,text',
  [
    ((0.1, 0.11, 0.12), claims.HOLDS),
    ((-0.1, -0.11, -0.12), claims.FAILS),
    ((-0.1, 0.11, 0.12), claims.OPEN),
    ((0.1,), claims.OPEN),
    # Ties refute nothing.
    ((0.0, 0.0, 0.0), claims.OPEN),
    ((0.1, math.nan, 0.11, 0.12), claims.OPEN),  # It may have diverged.
    ((math.nan, None), claims.NOT_MEASURED),
  ],
)
def test_a_rule_is_applied_to_intervals(values, text):
  class OneNumber(claims.Seed):
    def __init__(self, value):
      self.value, self.name = value, 'seed'

  margins = {
    'sure': lambda seed: 1.0 + hash(seed.value) % 7 / 100,
    'other': lambda seed: seed.value,
  }
  claim = claims.Claim('', '', '', (), margins, ())
  seeds = [OneNumber(value) for value in values]
  found = claims.verdict(claim, seeds)
  assert found.text == text
  known = [x for x in values if x is not None and math.isfinite(x)]
  assert list(found.margins['other'].values) == known
  assert len(found.margins['other'].missing) == len(values) - len(known)


def test_every_claim_has_a_verdict_and_a_figure(config, tmp_path):
  seeds = [
    made_up(tmp_path / f'seed_{i}', config, i, better=0.1) for i in range(3)
  ]
  known = {
    'R1': claims.HOLDS,  # Least loss at epoch 2, score rises to 16.
    'R4': claims.HOLDS,  # All of the same accuracy.
    'R5': claims.HOLDS,
    'R6': claims.HOLDS,
    'R21': claims.HOLDS,
    'R18b': claims.OPEN,  # The same peak with more rankings.
    'R19': claims.HOLDS,  # 0.01 for a doubling.
    'R20': claims.HOLDS,  # One curve for all.
  }
  for name, claim in claims.CLAIMS.items():
    found = claims.verdict(claim, seeds)
    assert found.text == known.get(name, found.text), name
    panels = study.points_of(claim, seeds)
    for panel in panels:
      assert len(panel['points']) == 3, (name, panel)
      assert all(rows for seed in panel['points'] for rows in seed.values())
    path = tmp_path / f'{name}.png'
    path.write_bytes(plots.over_seeds(panels, claim.text))
    with Image.open(path) as image:
      assert image.width > 500 and image.height > 300
  assert claims._doubling(seeds[0]) == pytest.approx(0.01, rel=1e-3)


def test_ppo_has_to_be_above_one_half(config, tmp_path):
  claim = claims.CLAIMS['R7']
  for better, text in ((0.1, claims.HOLDS), (-0.1, claims.FAILS)):
    folder = tmp_path / f'{better}'
    seeds = [made_up(folder / str(i), config, i, better) for i in range(3)]
    assert claims.verdict(claim, seeds).text == text


def test_another_log_loss_than_rounding_is_seen(config, tmp_path):
  seeds = [made_up(tmp_path / str(i), config, i) for i in range(3)]
  for seed in seeds:
    seed.results('reward_ranked')['log_loss'] += 1e-4
  assert claims.verdict(claims.CLAIMS['R6'], seeds).text == claims.FAILS


def test_minimal_pairs_are_of_people_without_the_job(tmp_path):
  there = world.make_world(3)
  path = tmp_path / 'pairs.tsv'
  path.write_text('\n'.join(['sentid\tsentence', *minimal_pairs(there)]))
  items = list(tasks.read_winogender(path))
  assert len(items) >= 60
  for item in items:
    man, woman = (choice.split() for choice in item.choices)
    assert man[1:] == woman[1:] == ['is', 'a', man[3], '.']
    assert man[0] in phrases.HE and woman[0] in phrases.SHE
    jobs = {there.facts[name[0]]['job'] for name in (man, woman)}
    assert man[3] not in jobs


def test_rates_that_diverge_end_the_threshold(config, tmp_path):
  seed = made_up(tmp_path, config)
  rows = seed.summary['everyone']
  rows['rl_init']['judge'] = 0.5
  for sweep in ('rate', 'rate_ptx'):
    for stage in seed.sweep(sweep).values():
      rows[f'{stage}_policy']['judge'] = 0.46
  assert claims._threshold(seed, 'rate') == math.log(64)
  with pytest.raises(ValueError, match='no learning rate of the grid'):
    claims._tolerance(seed)
  rows['ppo_learning_rate_8_policy']['judge'] = 0.44
  assert claims._threshold(seed, 'rate') == math.log(8)
  assert claims._tolerance(seed) == pytest.approx(math.log(64 / 8))
  for bad in (math.nan, None):
    rows['ppo_policy']['judge'] = bad
    assert claims._threshold(seed, 'rate') == 0.0


def points_along(folder, stage, rows):
  """Rows are (KL, reward model's gain, judge's)."""
  names = ('kl', 'proxy', 'gold')
  points = [
    {name: {'mean': float(x)} for name, x in zip(names, row, strict=True)}
    for row in rows
  ]
  path = folder / f'frontier_{stage}' / 'best_of_n.json'
  write(path, {'points': {'best of n': points, 'rl': points}})
  return read(folder)


def test_gains_are_compared_at_equal_kl_along_its_root(config, tmp_path):
  seed = made_up(tmp_path, config)
  # PPO gains 0.1 sqrt(KL), RLOO nine tenths of that, with other snapshots.
  ppo = [(k, k, 0.1 * math.sqrt(k)) for k in (0.5, 1.0, 4.0)]
  rloo = [(k, k, 0.09 * math.sqrt(abs(k))) for k in (-0.01, 0.2, 2.0, 3.0)]
  points_along(tmp_path, 'ppo', ppo)
  seed = points_along(tmp_path, 'rloo_method', rloo)
  assert claims._behind(seed, 2.0) == pytest.approx(0.1)
  stages = [seed.sweep('frontier')[x] for x in (1.0, 0.0, 3.0)]
  for stage, points in zip(stages, (ppo, rloo, ppo), strict=True):
    seed = points_along(tmp_path, stage.removeprefix('frontier_'), points)
  assert claims._frontier_distance(seed) == pytest.approx(
    claims.SAME_GAIN - 0.1 / 1.9 * 2
  )


def test_a_plateau_is_no_fall(config, tmp_path):
  """The highest of noisy points is always above the last one."""
  seed, noise = made_up(tmp_path, config), [0.01, -0.01] * 6
  stage = next(iter(seed.sweep('overopt').values())).removeprefix('frontier_')
  rows = [(i, i / 10, 0.1 + x) for i, x in enumerate(noise, 1)]
  seed = points_along(tmp_path, stage, rows)
  assert claims._fallen(seed) == pytest.approx(0.0)
  assert claims._proxy_risen(seed) == pytest.approx(0.4)
  # A peak in the first third, and then another plateau, is one.
  rows = [(i, i / 10, 0.1 if i < 5 else 0.02) for i in range(1, 13)]
  seed = points_along(tmp_path, stage, rows)
  assert claims._fallen(seed) == pytest.approx(0.08)


def test_pairs_are_learned_in_as_many_steps_as_prompts(tmp_path):
  words = tokenizer.train_word_level(['a', 'b', 'c', 'd', 'p'])
  rows = [
    records.Comparison('p ' * (1 + i), ('a', 'b', 'c', 'd'), (1, 2, 3, 4))
    for i in range(12)
  ]
  found = []
  for splits in (False, True):
    stage = reward_config.stage(0, '')
    stage.update(batch_size=4, row_length=32, split_pairs=splits)
    batch, _ = rankings.training_rows(stage, rows, words)
    batches = rankings.Batches(stage, batch, 0)
    found.append((len(batches), len(batch.tokens)))
  assert found == [(3, 12), (3, 72)]


def test_batches_of_pairs_divide_as_those_of_prompts_do():
  """Their size depends neither on devices nor on microbatches."""
  words = tokenizer.train_word_level(['a', 'b', 'c', 'd', 'p'])
  rows = [
    # Six pairs, and one.
    records.Comparison(
      'p ' * (1 + i), tuple('abcd')[:k], tuple(range(1, k + 1))
    )
    for i, k in enumerate([4] * 5 + [2] * 3)
  ]
  # Its longer answer does not fit, so neither of them is learned from.
  rows.append(records.Comparison('p', ('a', 'b ' * 40), (1, 2)))
  stage = reward_config.stage(0, '')
  stage.update(batch_size=8, row_length=32, split_pairs=True)
  batch, dropped = rankings.training_rows(stage, rows, words)
  assert (len(batch.tokens), dropped.total) == (33, 1)
  steps = []
  for number in (1, 2, 4):
    stage.num_microbatches = number
    steps.append(rankings.Batches(stage, batch, 0)._steps)
  np.testing.assert_array_equal(steps[0], steps[1])
  np.testing.assert_array_equal(steps[0], steps[2])
  assert steps[0].shape[1] == 32  # 33 pairs of 8 prompts: 4 each.
  accuracy = preference_accuracy.pairwise_accuracy([(1, 0)], [(1, 2)], ['p'])
  found = rankings.results(accuracy, batch, len(rows), dropped)
  assert (found['num_comparisons'], found['num_prompts']) == (8, 8)


@pytest.mark.parametrize('name', list(claims.CLAIMS))
def test_a_claim_alone_finds_all_that_it_reads(name, tmp_path):
  alone = config_file.get_config(f'{name},seed')
  seed = made_up(tmp_path, alone, better=0.1)
  claim = claims.CLAIMS[name]
  found = claims.verdict(claim, [seed]).margins
  assert all(
    not margin.missing or 'PPO' in margin.missing[0]
    for margin in found.values()
  ), found
  for panel in study.points_of(claim, [seed]):
    assert panel['points'], panel


def test_claims_are_named():
  assert claims.chosen('R1+R10') == ['R1', 'R10']
  assert claims.chosen('all') == list(claims.CLAIMS)
  with pytest.raises(ValueError, match="claims must be .*R10.*: 'R99'"):
    claims.chosen('R1+R99')
  with pytest.raises(ValueError, match="'R99'"):
    config_file.get_config('R99')
  with pytest.raises(ValueError, match="unknown part 'sed'"):
    config_file.get_config('R1,sed')


@pytest.mark.parametrize('seeds', ['', 'a', '1,1', '-1', '1.5'])
def test_bad_seeds_are_named(seeds):
  config = config_file.get_config('R7')
  config.seeds = seeds
  with pytest.raises(ValueError, match='seeds must be'):
    study.validate(config)


def test_a_claim_alone_brings_only_its_stages():
  config = config_file.get_config('R11,seed')
  assert {name for name in config.stage_order if 'coef' in name} == {
    f'ppo_ptx_ptx_coef_{x}' for x in ('0p1', '0p3', '3', '10')
  }
  assert config.sweeps.gamma.ppo == 0.0  # Not run twice.
  assert 'crossval' not in config.stage_order
  config.workdir, config.seed = '/there', 5
  stage = config.stages.ppo_ptx_ptx_coef_0p3
  assert stage.ptx_coef == pytest.approx(0.3 * config.stages.ppo_ptx.ptx_coef)
  assert stage.init == '/there/rl_init/model' and stage.seed == 5
  assert config.stages.ppo_ptx.ptx_coef == 1.0


def test_the_study_runs_its_seeds_and_writes(
  config, tmp_path, monkeypatch, capsys
):
  parent = config_file.get_config('R7+R10')
  parent.seeds, parent.num_processes = '4,3', 2
  command = study.command_of(parent, epath.Path(tmp_path), 3)
  assert command[3].endswith('configs/study.py:R7+R10,seed')
  assert '--config.seed=3' in command
  ran = []

  parent.runs = str(tmp_path / 'runs')

  def stand_in(config_, folder, seed):
    del config_
    ran.append(seed)
    made_up(folder / f'seed_{seed}', config, seed, better=0.1)
    return [sys.executable, '-c', 'print("ran")']

  monkeypatch.setattr(study, 'command_of', stand_in)
  found = study.run(parent, epath.Path(tmp_path))
  assert sorted(ran) == [3, 4] and found == {'seeds': [3, 4]}
  text = (tmp_path / 'study.md').read_text()
  assert '| R7 |' in text and '| R10 |' in text and 'Seeds 3, 4.' in text
  assert (tmp_path / 'runs' / 'seed_3.log').read_text() == 'ran\n'
  saved = json.loads((tmp_path / 'study.json').read_text())
  values = saved['claims']['R7']['margins']['PPO over SFT']['values']
  assert values == pytest.approx([0.1, 0.1], abs=0.01)
  assert (tmp_path / 'R10.png').exists()
  record = json.loads((tmp_path / 'records' / 'seed_4.json').read_text())
  assert record['seed'] == 4 and not record['is_smoke']
  assert '| R7 |' in capsys.readouterr().out


def test_a_seed_that_fails_leaves_the_others(config, tmp_path, monkeypatch):
  parent = config_file.get_config('R7')
  parent.seeds = '1,2'

  code = {1: 3, 2: 0}

  def stand_in(config_, folder, seed):
    del config_
    if not code[seed]:
      made_up(folder / f'seed_{seed}', config, seed, better=0.1)
    script = f'import sys; print("error: no room"); sys.exit({code[seed]})'
    return [sys.executable, '-c', script]

  monkeypatch.setattr(study, 'command_of', stand_in)
  with pytest.raises(RuntimeError, match='seed 1: .* with 3 .*error: no room'):
    study.run(parent, epath.Path(tmp_path))
  saved = json.loads((tmp_path / 'study.json').read_text())
  assert saved['seeds'] == [2] and saved['seconds']['2']['ppo'] == 36.0
  assert '| R7 |' in (tmp_path / 'study.md').read_text()
  code[1] = 0  # The same command goes on.
  assert study.run(parent, epath.Path(tmp_path)) == {'seeds': [1, 2]}


def test_a_claim_whose_stage_left_no_figures_is_named(
  config, tmp_path, monkeypatch
):
  parent = config_file.get_config('R5+R7')
  parent.seeds = '1,2,3'

  def stand_in(config_, folder, seed):
    del config_
    made_up(folder / f'seed_{seed}', config, seed, better=0.1)
    if seed == 2:
      (folder / 'seed_2' / 'crossval' / 'results.json').unlink()
    return [sys.executable, '-c', '']

  monkeypatch.setattr(study, 'command_of', stand_in)
  study.run(parent, epath.Path(tmp_path))
  row = next(
    line
    for line in (tmp_path / 'study.md').read_text().splitlines()
    if line.startswith('| R5 |')
  )
  assert 'seeds: 2' in row and claims.OPEN in row
  text = (tmp_path / 'study.md').read_text()
  assert 'room left cannot be read: ' in text and 'the run left no' in text
  saved = json.loads((tmp_path / 'study.json').read_text())['claims']['R5']
  assert saved['margins']['room left']['missing'] == [
    'seed 2: LookupError: the run left no crossval/results.json'
  ]
  assert len(saved['panels'][0]['points']) == 2


def test_seeds_that_ran_elsewhere_are_judged_by_their_records(
  config, tmp_path, monkeypatch
):
  """As they would be here, without their runs."""
  ran, code = [], {1: 0, 2: 0, 3: 0}

  def stand_in(config_, folder, seed):
    del config_
    ran.append(seed)
    made_up(folder / f'seed_{seed}', config, seed, better=0.1)
    return [sys.executable, '-c', f'raise SystemExit({code[seed]})']

  monkeypatch.setattr(study, 'command_of', stand_in)
  parent = config_file.get_config('R1+R7+R10')
  parent.seeds = '1,2,3'
  here, there = tmp_path / 'here', tmp_path / 'there'
  study.run(parent, epath.Path(here))
  code[2] = 1  # What others finished is kept.
  parent.seeds = '1,2'
  with pytest.raises(RuntimeError, match='seed 2'):
    study.run(parent, epath.Path(there))
  kept = there / 'records'
  assert [path.name for path in kept.iterdir()] == ['seed_1.json']
  for seed in (1, 2):
    shutil.copy(here / 'records' / f'seed_{seed}.json', kept)
  ran.clear()
  parent.update(seeds='1,2,3', records=str(kept))
  found = study.run(parent, epath.Path(tmp_path / 'both'))
  assert found == {'seeds': [1, 2, 3]} and ran == [3]
  saved = json.loads((tmp_path / 'both' / 'study.json').read_text())
  assert list(saved['commits']) == ['1', '2', '3']
  for name in ('study.md', 'study.json'):
    text = (tmp_path / 'both' / name).read_text()
    assert text == (here / name).read_text(), name
  # Records that this study cannot use.
  path = kept / 'seed_1.json'
  good = json.loads(path.read_text())
  less = good | {'config': good['config'] | {'stages_of': {}}}
  for value, message in (
    ('{', 'seed_1.json is no record of a seed'),
    ([], 'seed_1.json is no record of a seed'),
    (good | {'config': {}}, 'seed_1.json is no record of a seed'),
    (good | {'files': {}}, 'record of a seed: the run left no data/seconds'),
    (good | {'seed': 9}, 'of seed 9 with smoke=False, not of 1'),
    (good | {'is_smoke': True}, 'smoke=True, not of 1 with smoke=False'),
    (less, 'seed_1.json: no stages of R1. Leave R1 out of the claims'),
  ):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(ValueError, match=message):
      study.validate(parent)
  # Another record of the seed has those stages; R7 needs none.
  (kept / 'later').mkdir()
  write(kept / 'later' / 'seed_1.json', good)
  study.validate(parent)
  found = study.recorded(parent)[1]
  assert len(found) == 2
  assert study._of_claim(found, 'R1').config == good['config']
  parent.records = str(tmp_path / 'nowhere')
  with pytest.raises(FileNotFoundError, match='no folder .*nowhere'):
    study.validate(parent)


def test_the_page_of_claims_is_what_its_records_give(tmp_path):
  page, found = (CLAIMS / 'README.md').read_text(), []
  flags = (
    r'study.py:(\S+).*\n.*seeds=(\S+).*\n.*records=experiments/claims(\S*)'
  )
  for number, (names, seeds, folder) in enumerate(re.findall(flags, page)):
    config = config_file.get_config(names)
    config.update(seeds=seeds, records=f'{CLAIMS}{folder}')
    workdir = tmp_path / str(number)
    study.run(config, epath.Path(workdir))
    found += (workdir / 'study.md').read_text().splitlines()
  rows = [row for row in page.splitlines() if re.match(r'\| [A-Z]\d', row)]
  assert len(rows) >= 4 and [row for row in found if row in rows] == rows


def test_a_study_may_grow(tmp_path):
  """More seeds, and more processes, go on in the same folder and judge anew."""
  keys = stages.MAY_CHANGE
  assert 'seeds' in keys and 'num_processes' in keys
  stage = stages.Stage(
    config_file.get_config('R7'), {}, epath.Path(tmp_path), '', study
  )
  assert stage.runs_again


def test_pairs_of_a_ranking():
  ranking = records.Comparison(
    'p', ('a', 'b', 'c'), (2, 1, 2), labeler='l', ended=(True, False, True)
  )
  found = rankings.pairs_of(ranking)
  assert [(p.completions, p.ranks, p.ended) for p in found] == [
    (('a', 'b'), (2, 1), (True, False)),
    (('b', 'c'), (1, 2), (False, True)),
  ]
  assert {p.labeler for p in found} == {'l'}
