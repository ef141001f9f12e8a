"""report.md, plots and summary.json from made-up figures."""

import dataclasses
import html
import html.parser
import json
import math
import re
import sys

import numpy as np
import pytest

from instruct_jax.evals import plots, report, run_figures, sections
from instruct_jax.evals import preference_accuracy as preference
from instruct_jax.evals import samples as samples_lib
from instruct_jax.evals import win_rate as win_rate_lib

_PLOTS = {
  'win_rate.png',
  'metadata.png',
  'reward_kl.png',
  'pretraining_loss.png',
  'rl.png',
  'reward_model.png',
  'sft.png',
}
_SUMMARY_KEYS = {
  'win_rate',
  'reward_model',
  'pretraining_loss',
  'kl',
  'metadata',
  'likert',
  'seconds',
  'seed',
  'commit',
  'versions',
  'extra',
}
_HOSTILE = (
  'a | b | c\n| --- | --- |\r\n<script>alert(1)</script> <img src=x> '
  '[click](http://evil.example) ![i](javascript:x) `code` **bold** _it_ ~~s~~ '
  '&lt; # head www.evil.example mail@evil.example $x$ \\| \x1b[31m \u202egnp'
)


def _minimal(**changes):
  values = {
    'title': 'A run',
    'command': 'python -m instruct_jax.main',
    'config_name': 'ppo_ptx',
    'seed': 3,
    'commit': 'abc',
    'versions': {'jax': '0.1'},
    'seconds': {'sft': 1.5},
    'judge': 'gold utility; simulated, not people',
    'win_rate': {'sft': win_rate_lib.WinRate(0.5, 0.5, 0.5, 10)},
  }
  return run_figures.Figures(**(values | changes))


def _rl_rows(slope):
  rows = []
  for step in range(12):
    row = {
      'step': step,
      'objective/kl': 0.5 * step,
      'objective/score': math.log1p(step),
      'objective/length': 12.0,
      'objective/ended': 0.9,
      'ppo/policy/entropy': 2 - 0.1 * step,
      'ppo/policy/clipfrac': None if step == 0 else 0.1,
      'eval/gold': float('nan') if step % 3 else 0.1 * step,
    }
    if step % 4 == 0:
      row['eval/pretraining_loss'] = 3 + slope * step
    rows.append(row)
  return rows


def _full(**changes):
  interval = win_rate_lib.Interval
  recorded = [
    samples_lib.Sample(
      model=model,
      prompt_id=str(i),
      prompt=f'prompt {i}',
      response=_HOSTILE if model == 'ppo' else '',
      num_tokens=3,
      ended=model != 'pretrained',
      category='chat',
      score_gold=0.5,
    )
    for i in range(3)
    for model in run_figures.MODELS
  ]
  values = {
    'win_rate': {
      model: win_rate_lib.WinRate(0.1 * i, 0.08 * i, 0.12 * i, 100)
      for i, model in enumerate(run_figures.MODELS)
    },
    'win_rate_by_category': {
      'ppo': {'chat': win_rate_lib.WinRate(0.6, 0.4, 0.8, 20)}
    },
    'metadata': {
      model: {
        'hallucination': interval(0.1, 0.08, 0.12, 100),
        'costs $5 and $6': interval(0.5, 0.4, 0.6, 100),
      }
      for model in run_figures.MODELS
    },
    'likert': {
      model: interval(2.0 + i, 1.5 + i, 2.5 + i, 100)
      for i, model in enumerate(run_figures.MODELS)
    },
    'likert_by_category': {'ppo': {'chat': interval(4.25, 4.0, 4.5, 20)}},
    'rl_metrics': {'ppo': _rl_rows(0.1), 'ppo_ptx': _rl_rows(0.01)},
    'kl': {'ppo': 5.5, 'ppo_ptx': np.float64(4.5)},
    'pretraining_loss': run_figures.PretrainingLoss(
      init=interval(3.0, 2.9, 3.1, 50),
      ppo=interval(4.0, 3.9, 4.1, 50),
      ppo_ptx=interval(3.1, 3.0, 3.2, 50),
      difference=interval(-0.9, -1.0, -0.8, 50),
    ),
    'reward_model': run_figures.RewardFigures(
      accuracy=preference.Accuracy(0.7, 0.65, 0.75, 300),
      ceiling=0.73,
      intra=preference.Spread(0.71, 0.01, 5),
      inter=preference.Spread(0.69, None, 1),
      agreement=preference.Agreement(0.72, 0.7, 0.74, 200),
      curve=[{'step': i, 'reward/loss': 0.7} for i in range(5)],
    ),
    'sft_epochs': [
      run_figures.SftEpoch(1, 2.0, 0.1),
      run_figures.SftEpoch(2, 2.1, 0.3),
    ],
    'sft_selected_epoch': 2,
    'sft_selected_by': 'reward-model score',
    'samples': samples_lib.side_by_side(recorded, run_figures.MODELS, 3),
    'hygiene': {'too long': 4},
    'labelers': {'training labelers': 30},
    'data_sizes': {'demonstrations_train': 1200},
    'alarms': ['length drift | 10 -> 30'],
    'extra': {
      'BLEU': {'sft': interval(50.0, 45.0, 55.0, 9)},
      'slots': {'sft': {'realised': 0.9}, 'ppo': {'invented': 0.1}},
    },
  }
  return _minimal(**(values | changes))


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  directory = tmp_path_factory.mktemp('report') / 'new'
  report.write_report(directory, _full())
  return directory


def test_every_file_and_no_other(written):
  names = {path.name for path in written.iterdir()}
  assert names == _PLOTS | {'report.html', 'report.md', 'summary.json'}
  for name in _PLOTS:
    content = (written / name).read_bytes()
    assert content.startswith(b'\x89PNG')
    assert len(content) > 5000
  text = (written / 'report.md').read_text()
  assert {m for m in re.findall(r'\]\(([^)]*\.png)\)', text)} == _PLOTS


def test_matplotlib_needs_no_display_and_no_pyplot(written):
  del written
  # Another test may have loaded pyplot; this module must not hold it.
  assert 'matplotlib' in sys.modules
  assert 'pyplot' not in vars(plots)


def test_summary_has_exactly_its_keys(written):
  def no_constants(name):
    raise AssertionError(f'{name} is not JSON')

  text = (written / 'summary.json').read_text()
  summary = json.loads(text, parse_constant=no_constants)
  assert set(summary) == _SUMMARY_KEYS
  assert list(summary['win_rate']) == list(run_figures.MODELS)
  assert summary['win_rate']['ppo'] == {
    'rate': pytest.approx(0.3),
    'low': pytest.approx(0.24),
    'high': pytest.approx(0.36),
    'num_prompts': 100,
  }
  assert summary['reward_model'] == {
    'accuracy': 0.7,
    'ceiling': 0.73,
    'intra': 0.71,
    'inter': 0.69,
    'agreement': 0.72,
  }
  assert summary['pretraining_loss'] == {
    'init': 3.0,
    'ppo': 4.0,
    'ppo_ptx': 3.1,
  }
  assert summary['kl'] == {'ppo': 5.5, 'ppo_ptx': 4.5}
  assert summary['metadata']['sft']['costs $5 and $6'] == 0.5
  labels = summary['extra']['intervals']['metadata']
  assert labels['sft']['hallucination']['high'] == 0.12
  assert summary['likert']['sft']['mean'] == 4.0
  assert summary['seconds'] == {'sft': 1.5}
  assert (summary['seed'], summary['commit']) == (3, 'abc')
  extra = summary['extra']
  assert extra['intervals']['pretraining_loss']['difference']['high'] == -0.8
  assert extra['BLEU']['sft']['mean'] == 50.0


def test_report_says_the_claims_with_their_doubt(written):
  text = (written / 'report.md').read_text()
  assert 'PPO-ptx minus PPO: -0.900 [-1.000, -0.800]' in text
  assert 'the interval excludes 0' in text
  assert 'PPO is worse than SFT: win rate 0.300 [0.240, 0.360]' in text
  assert 'the ceiling is 0.730' in text
  assert 'simulated, not people' in text
  assert 'Selected: epoch 2, by reward-model score.' in text
  assert '0.710 ± 0.010' in text
  assert 'Left out' not in text


def test_missing_parts_are_left_out_with_their_reason(tmp_path):
  figures = _minimal(reasons={'reward_model': 'the stage was not run'})
  report.write_report(tmp_path, figures)
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {
    'report.html',
    'report.md',
    'summary.json',
    'win_rate.png',
  }
  text = (tmp_path / 'report.md').read_text()
  assert '*Left out: the stage was not run.*' in text
  assert text.count('*Left out: not measured in this run.*') == 10
  assert re.findall(r'\]\(([^)]*\.png)\)', text) == ['win_rate.png']
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert set(summary) == _SUMMARY_KEYS
  assert summary['win_rate']['ppo'] is None
  assert summary['reward_model']['ceiling'] is None
  assert summary['kl'] == {'ppo': None, 'ppo_ptx': None}


def test_a_second_report_replaces_the_first(tmp_path):
  report.write_report(tmp_path, _minimal(title='First'))
  report.write_report(tmp_path, _minimal(title='Second'))
  assert '# Second' in (tmp_path / 'report.md').read_text()
  assert not list(tmp_path.glob('*.tmp'))


def test_figures_that_are_not_finite_are_null(tmp_path):
  figures = _minimal(
    kl={'ppo': float('nan')},
    metadata={'sft': {'rude': win_rate_lib.Interval(math.inf, 0.0, 1.0, 9)}},
  )
  report.write_report(tmp_path, figures)
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert summary['kl']['ppo'] is None
  assert summary['metadata']['sft']['rude'] is None
  assert 'nan' not in (tmp_path / 'report.md').read_text()


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'kl': {'sft': 0.0}}, r"kl has unknown keys \['sft'\]"),
    ({'rl_metrics': {'best_of_n': []}}, 'rl_metrics has unknown keys'),
    ({'reasons': {'weather': 'rain'}}, 'reasons has unknown keys'),
    (
      {'win_rate': {'ppo-ptx': win_rate_lib.WinRate(0.5, 0.4, 0.6, 9)}},
      'win_rate has unknown keys',
    ),
  ],
)
def test_unknown_keys_stop_before_anything_is_written(tmp_path, changes, said):
  with pytest.raises(ValueError, match=said):
    report.write_report(tmp_path / 'r', _minimal(**changes))
  assert not (tmp_path / 'r').exists()


class _Tags(html.parser.HTMLParser):
  """Collects the tags of a text."""

  def __init__(self):
    super().__init__()
    self.tags = set()

  def handle_starttag(self, tag, attrs):
    self.tags.add((tag, tuple(attrs)))


def test_hostile_samples_stay_text(written):
  text = (written / 'report.md').read_text()
  parser = _Tags()
  parser.feed(text)
  assert parser.tags == {('br', ())}
  assert 'http://evil' not in text
  assert 'www.evil' not in text
  assert 'mail@' not in text
  assert '\x1b' not in text
  assert '\u202e' not in text
  # The sample stays in one cell: prompt and five models, so seven bars.
  (row,) = [line for line in text.split('\n') if 'prompt 0' in line]
  assert row.count('|') == 7
  assert '*(empty)*' in row
  assert '*(cut)*' in row


def test_escape_shows_what_was_written():
  escaped = report.escape(_HOSTILE)
  assert not set('|<>[]`*_\\~$@\n') & set(escaped.replace('<br>', ''))
  shown = html.unescape(escaped.replace('<br>', '\n'))
  expected = _HOSTILE.replace('\r\n', '\n')
  expected = expected.replace('\x1b', '\ufffd').replace('\u202e', '\ufffd')
  assert shown == expected
  assert report.escape('plain words, (brackets) and 50 %') == (
    'plain words, (brackets) and 50 %'
  )
  assert report.escape('person : ppo_ptx: 1') == 'person : ppo_ptx: 1'
  assert '_' not in report.escape('_it_ and __bold__ (_here_)')


def test_cells_are_text_whatever_they_hold():
  interval = win_rate_lib.Interval(-0.5, -1e-15, 123.45, 9)
  assert report.cell(interval) == '-0.500 [0.000, 123.5]'
  assert report.cell('a|b') == report.cell(sections.Shown('a|b')) == 'a&#124;b'
  best = sections.Shown('1.0', '[0.5, 1.5]', best=True)
  assert report.cell(best) == '**1.0 [0.5, 1.5]**'
  assert [report.cell(x) for x in (None, math.nan, True, np.int64(1234))] == [
    '–',
    '–',
    'True',
    '1,234',
  ]


def test_a_command_cannot_leave_its_block():
  figures = _minimal(command='run\n```\n# heading')
  text = report.make_markdown(figures, set())
  assert '````\nrun\n```\n# heading\n````' in text


def test_long_samples_are_cut_and_say_so():
  row = _full().samples[0]
  answers = {
    model: dataclasses.replace(sample, response='word ' * 500)
    for model, sample in row.answers.items()
  }
  figures = _full(samples=[dataclasses.replace(row, answers=answers)])
  text = report.make_markdown(figures, set())
  assert 'word  …' in text
  assert max(len(line) for line in text.split('\n')) < 6 * 600


def test_plots_survive_short_and_odd_runs():
  # One iteration, one epoch, full and empty bars, long names, all zero.
  figures = _full(
    win_rate={'ppo': win_rate_lib.WinRate(1.0, 1.0, 1.0, 2)},
    judge='a judge with a very long name $x$ ' * 12,
    metadata={
      'ppo': {
        'a label that is long ' * 6: win_rate_lib.Interval(0.0, 0.0, 0.0, 2)
      }
    },
    rl_metrics={'ppo': _rl_rows(0.1)[:1], 'ppo_ptx': []},
    sft_epochs=[run_figures.SftEpoch(1, 2.0)],
    sft_selected_epoch=1,
  )
  assert set(plots.make_plots(figures)) == _PLOTS
