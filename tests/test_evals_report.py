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

from instruct_jax.evals import figures, judges, plots, report, sections
from instruct_jax.evals import win_rate as win_rate_lib
from tests import made_figures
from tests.made_figures import HOSTILE, PLOTS, full, minimal


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  directory = tmp_path_factory.mktemp('report') / 'new'
  report.write_report(directory, full())
  return directory


def test_every_file_and_no_other(written):
  names = {path.name for path in written.iterdir()}
  assert names == PLOTS | {'report.html', 'report.md', 'summary.json'}
  for name in PLOTS:
    content = (written / name).read_bytes()
    assert content.startswith(b'\x89PNG')
    assert len(content) > 5000
  text = (written / 'report.md').read_text()
  assert {m for m in re.findall(r'\]\(([^)]*\.png)\)', text)} == PLOTS


def test_matplotlib_needs_no_display_and_no_pyplot(written):
  del written
  # Another test may have loaded pyplot; this module must not hold it.
  assert 'matplotlib' in sys.modules
  assert 'pyplot' not in vars(plots)


def test_summary_has_what_other_programs_read(written):
  def no_constants(name):
    raise AssertionError(f'{name} is not JSON')

  text = (written / 'summary.json').read_text()
  summary = json.loads(text, parse_constant=no_constants)
  assert list(summary['win_rate']) == list(made_figures.MODELS)
  assert summary['win_rate']['other fork'] == {
    'rate': pytest.approx(0.7),
    'low': pytest.approx(0.68),
    'high': pytest.approx(0.72),
    'num_prompts': 100,
    'by_labeler': None,
    'num_judgements': 100,
  }
  assert list(summary['pairs'])[-1] == 'other fork – sft'
  assert summary['reward_model'] == {
    'accuracy': 0.7,
    'ceiling': 0.73,
    'intra': 0.71,
    'inter': 0.69,
    'agreement': 0.72,
  }
  assert summary['pretraining_loss'] == {
    'start': 3.0,
    'my_fork': 4.0,
    'other fork': 3.1,
  }
  assert summary['kl'] == {'my_fork': 5.5, 'other fork': 4.5}
  assert summary['metadata']['sft']['costs $5 and $6'] == 0.5
  assert summary['likert']['sft']['mean'] == 3.0
  intervals = summary['intervals']
  assert intervals['metadata']['sft']['hallucination']['high'] == 0.12
  differences = intervals['pretraining_loss_difference']
  assert differences['other fork – my_fork']['high'] == -0.8
  assert summary['seconds'] == {'sft': 1.5}
  assert (summary['seed'], summary['commit']) == (3, 'abc')
  assert summary['extra']['Slots and BLEU']['sft']['BLEU']['mean'] == 50.0
  assert summary['extra']['selected_epoch'] == {'sft': 2}
  nothing = report.make_summary(minimal())
  assert set(nothing) == set(summary)
  assert nothing['reward_model'] is None and nothing['kl'] == {}


def test_report_has_the_claims_with_their_intervals(written):
  text = (written / 'report.md').read_text()
  assert '**70 %** other fork against sft (better: 68.0 to' in text.replace(
    '\u00a0', ' '
  )
  assert (
    '-0.900** nats per token: pretraining loss, other fork – my_fork' in text
  )
  assert '+1.000** nats per token: pretraining loss, my_fork – start' in text
  assert 'accuracy, 0.730, is the most that label noise allows' in text
  assert 'simulated, not people' in text
  assert 'sft: epoch 2 was selected, by reward-model score.' in text
  assert '0.710 ± 0.010' in text
  assert '| other fork – sft | 0.700 [0.680, 0.720] | 97 | 197 |' in text


@pytest.mark.parametrize(
  'number, words', [(9, 'too few to tell'), (10, 'better')]
)
def test_a_bootstrap_of_few_prompts_or_rows_gives_no_verdict(number, words):
  rates = {
    'sft': made_figures.rates(0.5, 0.0, number),
    'my_fork': made_figures.rates(1.0, 0.0, number),
  }
  loss = win_rate_lib.Interval(-0.1, -0.1, -0.1, number)
  shown = minimal(
    outcomes=made_figures.outcomes(rates),
    text_loss_difference={'my_fork – sft': loss},
  )
  win, lost = sections.claims(shown)
  kind = 'good' if number == 10 else ''
  assert (win.kind, lost.kind) == (kind, kind)
  assert win.doubt.startswith(words)
  assert lost.doubt.startswith('too few to tell') == (number == 9)
  assert lost.doubt.endswith(f'{number} rows')


def test_the_reward_model_is_compared_on_the_same_pairs(written):
  text = (written / 'report.md').read_text()
  assert '| reward model – judge | -0.030 [-0.050, -0.010] |' in text
  assert 'reward model is not told apart from: length only.' in text
  assert 'not told apart from: judge' not in text


def test_a_report_lists_what_was_not_measured(tmp_path):
  report.write_report(tmp_path, minimal())
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {
    'report.html',
    'report.md',
    'summary.json',
    'win_rate.png',
  }
  text = (tmp_path / 'report.md').read_text()
  assert re.findall(r'\]\(([^)]*\.png)\)', text) == ['win_rate.png']
  for missing in (
    'KL to a reference: it takes reference',
    'reward-model accuracy: it takes reward_model and test_comparisons',
    'overall quality, 1 to 7: it takes a judge that rates',
  ):
    assert f'- {report.escape(missing)}' in text
  everything = [what for what, _ in sections.not_measured(full())]
  assert len(everything) == 1 and everything[0].startswith('the public NLP')


def test_a_second_report_replaces_the_first(tmp_path):
  report.write_report(tmp_path, minimal(title='First'))
  report.write_report(tmp_path, minimal(title='Second'))
  assert '# Second' in (tmp_path / 'report.md').read_text()
  assert not list(tmp_path.glob('*.tmp'))


def test_figures_that_are_not_finite_are_null(tmp_path):
  report.write_report(
    tmp_path,
    minimal(
      kl={'my_fork': {'signed mean': float('nan')}},
      ratings={'sft': {'rude': win_rate_lib.Interval(math.inf, 0.0, 1.0, 9)}},
    ),
  )
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert summary['kl']['my_fork'] is None
  assert summary['metadata']['sft']['rude'] is None
  assert 'nan' not in (tmp_path / 'report.md').read_text()


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
  # The sample stays in one cell: prompt and four models, so six bars.
  (row,) = [line for line in text.split('\n') if 'prompt 0' in line]
  assert row.count('|') == 6
  assert '*(empty)*' in row
  assert '*(cut)*' in row


def test_escape_shows_what_was_written():
  escaped = report.escape(HOSTILE)
  assert not set('|<>[]`*_\\~$@\n') & set(escaped.replace('<br>', ''))
  shown = html.unescape(escaped.replace('<br>', '\n'))
  expected = HOSTILE.replace('\r\n', '\n')
  expected = expected.replace('\x1b', '\ufffd').replace('\u202e', '\ufffd')
  assert shown == expected
  assert report.escape('plain words, (brackets) and 50 %') == (
    'plain words, (brackets) and 50 %'
  )
  assert report.escape('person : ppo_ptx: 1') == 'person : ppo_ptx: 1'
  assert '_' not in report.escape('_it_ and __bold__ (_here_)')


def test_brackets_without_a_meaning_in_markdown_stay():
  kept = 'a share of 12.0% [11.0%, 13.0%] (1 [2] 3)'
  assert report.escape(kept) == kept
  assert report.escape('[a_b *c*]') == '[a_b &#42;c&#42;]'
  assert report.escape('[[a]](b)') == '&#91;[a]&#93;(b)'
  for meant in ('[a](b)', '![a]', '[a]: b', '[ ] a', '[x]', '[^1]', '[]', '[a'):
    assert not set('[]') & set(report.escape(meant))
  assert report.escape('[a][b]') == '&#91;a&#93;[b]'


def test_cells_become_text():
  interval = win_rate_lib.Interval(-0.5, -1e-15, 123.45, 9)
  assert report.cell(interval) == '-0.500 [0.000, 123.5]'
  small = [report.cell(x) for x in (-8.27e-07, 0.0007, -0.0004, 1.5e5)]
  assert small == ['0.000', '0.001', '0.000', '1.50e+05']
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
  shown = minimal(command='run\n```\n# heading')
  text = report.make_markdown(shown, set())
  assert '````\nrun\n```\n# heading\n````' in text


def test_long_samples_are_cut_visibly():
  row = full().samples[0]
  answers = {
    model: dataclasses.replace(sample, response='word ' * 500)
    for model, sample in row.answers.items()
  }
  shown = full(samples=[dataclasses.replace(row, answers=answers)])
  text = report.make_markdown(shown, set())
  assert 'word  …' in text
  assert max(len(line) for line in text.split('\n')) < 6 * 600


def test_a_conversation_is_shown_by_turns():
  row = full().samples[0]
  prompt = 'Be kind.\n\nHuman: A|b?\n\nAssistant: C.\n\nHuman: D?\n\nAssistant:'
  shown = full(samples=[dataclasses.replace(row, prompt=prompt, category='')])
  text = report.make_markdown(shown, set())
  cell = (
    '| *earlier turns: 1*<br>**user:** A&#124;b?<br>**assistant:** C.<br>'
    '**user:** D? |'
  )
  assert cell in text and 'Human' not in text and 'Be kind' not in text
  # A question alone needs no speaker.
  prompt = '\n\nHuman: D?\n\nAssistant:'
  shown = full(samples=[dataclasses.replace(row, prompt=prompt, category='')])
  assert '| D? |' in report.make_markdown(shown, set())


def test_plots_survive_short_and_odd_runs():
  # One iteration, one epoch, full and empty bars, long names, all zero.
  shown = full(
    outcomes=made_figures.outcomes({'my_fork': made_figures.rates(1.0, 0.0)}),
    judge='a judge with a very long name $x$ ' * 12,
    ratings={
      'my_fork': {
        judges.LIKERT: win_rate_lib.Interval(1.0, 1.0, 1.0, 2),
        'a label that is long ' * 6: win_rate_lib.Interval(0.0, 0.0, 0.0, 2),
      }
    },
    rl_metrics={'my_fork': made_figures.rl_rows(0.1)[:1], 'other fork': []},
    epochs={'sft': figures.Epochs([{'epoch': 1, 'valid_loss': 2.0}], 1)},
  )
  assert set(plots.make_plots(shown)) == PLOTS
