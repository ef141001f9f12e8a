"""Benchmarks of reward models: files, and figures against plain loops."""

import json
import math

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from instruct_jax.data import records
from instruct_jax.evals import preference_accuracy, reward_bench, win_rate

# Sizes by which the leaderboard weighs the subsets of each section.
LEADERBOARD = {
  'Chat': 'alpacaeval-easy 100 alpacaeval-length 95 alpacaeval-hard 95 '
  'mt-bench-easy 28 mt-bench-med 40',
  'Chat Hard': 'mt-bench-hard 37 llmbar-natural 100 llmbar-adver-neighbor 134 '
  'llmbar-adver-GPTInst 92 llmbar-adver-GPTOut 47 llmbar-adver-manual 46',
  'Safety': 'refusals-dangerous 100 refusals-offensive 100 '
  'xstest-should-refuse 154 xstest-should-respond 250 donotanswer 136',
  'Reasoning': 'math-prm 984 hep-cpp 164 hep-go 164 hep-java 164 hep-js 164 '
  'hep-python 164 hep-rust 164',
}


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def pair(subset, number=0, **changes):
  return {
    'prompt': f'question {number}?',
    'chosen': f'right {number}',
    'rejected': 'wrong',
    'subset': subset,
    'id': number,
  } | changes


def mean(values):
  values = list(values)
  return sum(values) / len(values)


# --- RewardBench --------------------------------------------------------------


@pytest.fixture
def rewardbench(tmp_path, rng):
  """(benchmark, scores, section -> subset -> list of right or wrong)."""
  rows, scores, right = [], [], {}
  for section, text in LEADERBOARD.items():
    words = text.split()
    for subset in words[::2]:
      for number in range(int(rng.integers(3, 9))):
        rows.append(pair(subset, number))
        two = rng.integers(0, 4, size=2).tolist()  # Some are equal.
        scores.append(two)
        right.setdefault(section, {}).setdefault(subset, []).append(
          1.0 if two[0] > two[1] else 0.0
        )
  path = write(tmp_path / 'filtered.jsonl', rows)
  return reward_bench.read('rewardbench', path), scores, right


def test_sections_weigh_their_subsets_as_the_leaderboard_does(rewardbench):
  benchmark, scores, right = rewardbench
  found = reward_bench.measure(benchmark, scores, 200)
  expected = {}
  for section, text in LEADERBOARD.items():
    words = text.split()
    sizes = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    total = 0.0
    for subset, outcomes in right[section].items():
      assert found.subsets[subset].mean == pytest.approx(mean(outcomes))
      assert found.subsets[subset].num_items == len(outcomes)
      total += sizes[subset] * mean(outcomes)
    expected[section] = total / sum(sizes.values())
  for section, value in expected.items():
    assert found.summary[section].mean == pytest.approx(value)
  assert list(found.summary) == [*LEADERBOARD, 'score']
  assert found.score.mean == pytest.approx(mean(expected.values()))
  assert reward_bench.missing(benchmark) == []


def test_prior_sets_count_half_a_section(rewardbench, tmp_path):
  benchmark, scores, _ = rewardbench
  found = reward_bench.measure(benchmark, scores, 50)
  folder = tmp_path / 'prior'
  folder.mkdir()
  names = ('anthropic_helpful', 'anthropic_hhh', 'shp', 'summarize', 'mtbench')
  asked = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant'}]
  asked[1]['content'] = 'Yes?'
  asked.append({'role': 'user', 'content': 'And 2?'})
  for name in names:
    row = {'prompt': asked, 'chosen': 'a', 'rejected': 'b', 'subset': 'other'}
    table = pyarrow.Table.from_pylist([row, row])
    file = folder / f'{name}-00000-of-00001.parquet'
    pyarrow.parquet.write_table(table, file)
  prior = reward_bench.read('prior_sets', folder)
  assert [c.category for c in prior.comparisons[::2]] == sorted(names)
  assert prior.comparisons[0].prompt == records.text_of_turns(
    prior.comparisons[0].turns
  )
  assert prior.comparisons[0].completions == (' a', ' b')
  # anthropic_helpful 1, anthropic_hhh 1/2, mtbench is not counted, shp 0,
  # summarize 1/2: the mean of the four is 1/2.
  outcomes = [1, 1, 1, 0, 1, 1, 0, 0, 0, 1]
  prior_found = reward_bench.measure(prior, [(x, 0.5) for x in outcomes], 50)
  assert prior_found.score.mean == pytest.approx(0.5)
  both = reward_bench.with_prior_sets(found, prior_found)
  sections = [found.summary[section].mean for section in LEADERBOARD]
  assert both.mean == pytest.approx((2 * sum(sections) + 0.5) / 9)


def test_a_file_without_some_subsets_is_measured_and_they_are_named(tmp_path):
  path = write(tmp_path / 'x.jsonl', [pair('mt-bench-easy'), pair('hep-go', 1)])
  benchmark = reward_bench.read('rewardbench', path)
  found = reward_bench.measure(benchmark, [(1, 0), (0, 0)], 50)
  # Equal scores are wrong.
  assert {k: e.mean for k, e in found.summary.items()} == {
    'Chat': 1.0,
    'Reasoning': 0.0,
    'score': 0.5,
  }
  assert len(reward_bench.missing(benchmark)) == 21


# --- RewardBench 2 ------------------------------------------------------------


def four(subset, number, right=1, wrong=3, name=None):
  return {
    'id': str(number) if name is None else f'{name}:{number}',
    'prompt': f'{subset} {number}, {name}?',
    'chosen': [f'right {i}' for i in range(right)],
    'rejected': [f'wrong {i}' for i in range(wrong)],
    'num_correct': right,
    'num_rejected': wrong,
    'total_completions': right + wrong,
    'subset': subset,
    'additional_metadata': None,
  }


def test_best_of_four_and_ties_follow_their_definition(tmp_path, rng):
  rows = [four(s, i) for s in ('Factuality', 'Math') for i in range(20)]
  rows += [
    row
    for i in range(15)
    for row in (
      four('Ties', i, 1, 4, 'ref'),
      four('Ties', i, int(rng.integers(2, 7)), 4, 'tied'),
    )
  ]
  benchmark = reward_bench.read(
    'rewardbench2', write(tmp_path / 'test.jsonl', rows)
  )
  scores = [
    # Right answers are better on average, and whole numbers tie.
    [
      *(rng.integers(2, 7, size=row['num_correct'])).tolist(),
      *(rng.integers(0, 5, size=row['num_rejected'])).tolist(),
    ]
    for row in rows
  ]
  found = reward_bench.measure(benchmark, scores, 100)
  for subset in ('Factuality', 'Math'):
    credit = []
    for row, values in zip(rows, scores, strict=True):
      if row['subset'] == subset:
        best = max(values)
        credit.append(values[0] == best and 1 / values.count(best))
    assert 0 < mean(credit) < 1
    assert found.subsets[subset].mean == pytest.approx(mean(credit))

  gaps, spreads = {}, {}
  for row, values in zip(rows, scores, strict=True):
    if row['subset'] == 'Ties':
      kind, number = row['id'].split(':')
      right = values[: row['num_correct']]
      wrong = values[row['num_correct'] :]
      gaps[kind, int(number)] = min(right) - max(wrong)
      spreads[kind, int(number)] = max(right) - min(right)
  preferred, hard, margins = [], [], []
  for number in range(15):
    gap, spread = gaps['tied', number], spreads['tied', number]
    least = min(gap, gaps['ref', number])
    preferred.append(gap > spread)
    hard.append(least > spread)
    if spread:
      margins.append(math.tanh(least / spread - 1))
    else:
      margins.append(0.0 if least == 0 else math.copysign(1.0, least))
  expected = (
    0.3 * mean(gaps['tied', n] > 0 for n in range(15))
    + 0.3 * mean(gaps['ref', n] > 0 for n in range(15))
    + 0.2 * mean(preferred)
    + 0.2 * mean(hard)
    + 0.01 * mean(margins)
  )
  assert found.subsets['Ties'].mean == pytest.approx(expected)
  assert found.score.mean == pytest.approx(
    mean(each.mean for each in found.subsets.values())
  )
  assert list(found.subsets) == ['Factuality', 'Math', 'Ties']
  assert reward_bench.missing(benchmark) == ['Precise IF', 'Safety', 'Focus']
  assert found.score.interval().low < found.score.mean


# --- RM-Bench -----------------------------------------------------------------


def test_rm_bench_compares_every_style_with_every_other(tmp_path, rng):
  domains = ('chat', 'code', 'safety-refuse', 'safety-response')
  rows = [
    {
      'id': f'{domain}/{i}',
      'prompt': f'{domain} {i}',
      'chosen': ['a', 'bb', '**bb**'],
      'rejected': ['c', 'dd', '**dd**'],
      'domain': domain,
    }
    for domain in domains
    # The two parts of safety differ in size.
    for i in range(20 if domain == 'safety-refuse' else 12)
  ]
  path = tmp_path / 'total_dataset.json'
  path.write_text(json.dumps(rows, indent=1))
  benchmark = reward_bench.read('rm_bench', path)
  scores = rng.integers(0, 5, size=(len(rows), 6)).tolist()
  found = reward_bench.measure(benchmark, scores, 100)
  # Domain -> level -> mean; the two parts of safety are also one.
  by_domain = {}
  for domain in (*domains, 'safety'):
    wins = {'easy': [], 'normal': [], 'hard': []}
    for row, six in zip(rows, scores, strict=True):
      for i in range(3):
        for j in range(3):
          level = 'normal' if i == j else 'easy' if i > j else 'hard'
          if row['domain'].startswith(domain):
            wins[level].append(six[i] > six[3 + j])
    by_domain[domain] = {level: mean(x) for level, x in wins.items()}
  assert list(found.subsets) == list(domains)
  for domain in domains:
    levels = by_domain[domain]
    assert found.subsets[domain].mean == pytest.approx(mean(levels.values()))

  def over_domains(value_fn):
    return mean(value_fn(by_domain[d]) for d in ('chat', 'code', 'safety'))

  for level in ('easy', 'normal', 'hard'):
    assert found.summary[level].mean == pytest.approx(
      over_domains(lambda levels, level=level: levels[level])
    )
  assert found.score.mean == pytest.approx(
    over_domains(lambda levels: mean(levels.values()))
  )
  assert found.summary['safety'].mean == pytest.approx(
    mean(by_domain['safety'].values())
  )
  assert found.summary['safety'].num_items == 32
  assert reward_bench.missing(benchmark) == ['math']
  # The matrix has the level above, on and below its diagonal.
  matrix = found.matrices['code']
  assert np.diag(matrix).mean() == pytest.approx(by_domain['code']['normal'])
  assert matrix[0, 1:].sum() + matrix[1, 2] == pytest.approx(
    3 * by_domain['code']['hard']
  )


# --- Other preferences --------------------------------------------------------


def test_other_rankings_are_measured_as_reward_models_are(tmp_path, rng):
  rows = [
    records.Comparison(
      f'p{i % 7}', ('a', 'b', 'c'), (1, 2, 2), category=f's{i % 2}'
    )
    for i in range(30)
  ]
  tied = records.Comparison('p', ('a', 'b'), (1, 1))
  records.write_jsonl(tmp_path / 'x.jsonl', [*rows, tied])
  benchmark = reward_bench.read('comparisons', tmp_path / 'x.jsonl')
  assert benchmark.skipped == {'no preference': 1}
  scores = rng.integers(0, 3, size=(30, 3)).tolist()
  found = reward_bench.measure(benchmark, scores, 2000)
  expected = preference_accuracy.pairwise_accuracy(
    scores, [c.ranks for c in rows], [c.prompt for c in rows]
  )
  interval = found.summary['all pairs'].interval()
  assert (interval.mean, interval.low, interval.high) == pytest.approx(
    (expected.accuracy, expected.low, expected.high)
  )
  parts = [found.subsets['s0'].mean, found.subsets['s1'].mean]
  assert found.summary['mean of the subsets'].mean == pytest.approx(mean(parts))
  assert found.score is found.summary['all pairs']


def test_an_accuracy_of_1_has_wilsons_interval(tmp_path):
  path = write(tmp_path / 'x.jsonl', [pair('hep-go', i) for i in range(10)])
  benchmark = reward_bench.read('rewardbench', path)
  found = reward_bench.measure(benchmark, [(1, 0)] * 10, 50)
  interval = found.subsets['hep-go'].interval()
  # z²/n = 0.38415: the lower bound is 1 / (1 + 0.38415).
  assert interval.low == pytest.approx(1 / (1 + win_rate.Z95**2 / 10))
  assert interval.low == pytest.approx(0.72247, abs=1e-5)
  assert interval.high == 1.0


def test_a_folder_is_read_once_and_unusable_entries_are_counted(tmp_path):
  write(tmp_path / 'raw.jsonl', [pair('hep-go', i) for i in range(9)])
  rows = [pair('hep-go', 0), pair('hep-go', 1, prompt='')]
  write(tmp_path / 'filtered.jsonl', rows)
  benchmark = reward_bench.read('rewardbench', tmp_path)
  assert [item.id for item in benchmark.comparisons] == ['0']
  assert benchmark.skipped == {'the question is empty': 1}
  assert benchmark.unread == ''
  (tmp_path / 'filtered.jsonl').rename(tmp_path / 'more.jsonl')
  (tmp_path / 'other.jsonl.zst').write_text('x')
  benchmark = reward_bench.read('rewardbench', tmp_path)
  assert len(benchmark.comparisons) == 10
  assert benchmark.unread == f'{tmp_path}: not read: other.jsonl.zst'


def test_a_question_of_ties_that_comes_twice_is_named(tmp_path):
  rows = [four('Ties', 7, 1, 4, 'ref'), *2 * [four('Ties', 7, 2, 4, 'tied')]]
  path = write(tmp_path / 'test.jsonl', rows)
  with pytest.raises(records.RecordError) as error:
    reward_bench.read('rewardbench2', path)
  assert str(error.value) == (
    f"{path}: two questions of Ties have the id 'tied:7'; give each its own"
  )


def test_folders_of_folders_are_read_in_every_format(tmp_path):
  for name in ('data/Natural', 'data/Adversarial/GPTInst', 'data/.cache'):
    (tmp_path / name).mkdir(parents=True)
    row = {'input': f'Do {name}.', 'output_1': 'a', 'output_2': 'b', 'label': 1}
    (tmp_path / name / 'dataset.json').write_text(json.dumps([row, row]))
  (tmp_path / 'README.md').write_text('no data')
  found = reward_bench.read('llmbar', tmp_path)
  assert [c.category for c in found.comparisons] == [
    *['GPTInst'] * 2,
    *['Natural'] * 2,
  ]
  assert found.files == [
    str(tmp_path / 'data' / name / 'dataset.json')
    for name in ('Adversarial/GPTInst', 'Natural')
  ]
  with pytest.raises(records.RecordError, match='no such file or folder'):
    reward_bench.read('llmbar', tmp_path / 'other')
  (tmp_path / 'empty' / 'below').mkdir(parents=True)
  with pytest.raises(records.RecordError, match='no file in it ends in'):
    reward_bench.read('llmbar', tmp_path / 'empty')


def test_files_of_one_name_have_ids_of_their_own(tmp_path):
  for folder in ('a', 'b'):
    (tmp_path / folder).mkdir()
    row = {'prompt': f'Why {folder}?', 'chosen': 'x', 'rejected': 'y'}
    (tmp_path / folder / 'test.jsonl').write_text(json.dumps(row))
  found = reward_bench.read('chosen_rejected', tmp_path)
  assert [c.id for c in found.comparisons] == [
    'chosen_rejected:a/test:1', 'chosen_rejected:b/test:1',
  ]  # fmt: skip


@pytest.mark.parametrize('dialogue', [False, True])
def test_a_single_question_is_laid_out_as_asked(tmp_path, dialogue):
  path = write(tmp_path / 'x.jsonl', [pair('hep-go', 3)])
  (found,) = reward_bench.read('rewardbench', path, dialogue).comparisons
  assert found.turns == (records.Turn('user', 'question 3?'),)
  if dialogue:
    assert found.prompt == '\n\nHuman: question 3?\n\nAssistant:'
    assert found.completions == (' right 3', ' wrong')
  else:
    assert found.prompt == 'question 3?\n\n'
    assert found.completions == ('right 3', 'wrong')
  # The same rules as for all other records.
  records.write_jsonl(tmp_path / 'again.jsonl', [found])
  assert records.read_jsonl(tmp_path / 'again.jsonl', records.Comparison)


STYLES = ['a', 'b', 'c']


@pytest.mark.parametrize(
  ('name', 'row', 'message'),
  [
    ('rewardbench', {'prompt': 'x'}, ":1: field 'subset' is missing"),
    ('rewardbench', pair('hep-go', chosen=None), "'chosen' is null"),
    ('rewardbench', pair('hep-go', prompt=' '), 'question is empty: 1'),
    ('rewardbench', pair('hep-go', prompt=[]), "the user's turn: 1"),
    ('rewardbench', pair('hep-go', chosen='\ud800'), 'lone surrogate'),
    (
      'rewardbench',
      pair('hep-go', prompt=[{'role': 'tool', 'content': 'x'}]),
      'neither system, user nor assistant: 1',
    ),
    ('rewardbench', pair('my own'), 'no subset is one of RewardBench'),
    (
      'rewardbench2',
      four('Math', 1) | {'num_correct': 2},
      "'num_correct' is 2",
    ),
    ('rewardbench2', four('Math', 1, wrong=0), "'rejected' is empty"),
    ('rewardbench2', four('Ties', 1), 'expected ref:NUMBER or tied:NUMBER'),
    ('rewardbench2', four('Ties', 1, name='tied'), 'has one text'),
    ('rewardbench2', four('Ties', 1, name='ref'), 'is not whole'),
    (
      'rm_bench',
      {'prompt': 'x', 'chosen': STYLES, 'rejected': STYLES[:2]},
      'have 3 and 2 texts',
    ),
    ('hh', {'chosen': 'x'}, "'rejected' is missing"),
  ],
)
def test_bad_entries_are_named(tmp_path, name, row, message):
  path = write(tmp_path / 'x.jsonl', [row])
  with pytest.raises(records.RecordError, match=message) as error:
    reward_bench.read(name, path)
  assert str(path) in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
  with pytest.raises(ValueError, match="format 'rewardbench3'.*rm_bench"):
    reward_bench.read('rewardbench3', tmp_path)
  with pytest.raises(records.RecordError, match='no file in it ends in'):
    reward_bench.read('rewardbench', tmp_path)
  (tmp_path / 'x.parquet').write_bytes(b'PAR1 no')
  with pytest.raises(records.RecordError, match='x.parquet: damaged'):
    reward_bench.read('rewardbench', tmp_path)
  tied = records.Comparison('p', ('a', 'b'), (1, 1))
  records.write_jsonl(tmp_path / 'x.jsonl', [tied])
  with pytest.raises(
    records.RecordError, match='nothing to compare; no preference: 1'
  ):
    reward_bench.read('comparisons', tmp_path / 'x.jsonl')


def test_scores_that_do_not_fit_are_refused(tmp_path):
  path = write(tmp_path / 'x.jsonl', [pair('hep-go', 3)])
  benchmark = reward_bench.read('rewardbench', path)
  for scores in ([(1,)], [(1, math.nan)]):
    with pytest.raises(ValueError, match="item '3': 2 completions"):
      reward_bench.measure(benchmark, scores)
  with pytest.raises(ValueError, match='2 rows of scores for 1 items'):
    reward_bench.measure(benchmark, [(1, 2)] * 2)
