"""Plots: their text and lines, and that nothing overlaps."""

import itertools
import math
import re

import pytest

from instruct_jax.evals import figures, overoptimization, plots, win_rate
from tests import made_figures

LONG_NAMES = [
  'sft',
  'ppo',
  'meta-llama/Llama-3.2-1B-Instruct-with-a-very-long-suffix-and-more',
  'mistralai/Mistral-7B-v0.3',
  'a $x$ b',
  'run_2026_11_26_beta_0.02_gamma_27.8_lr_9.65e-6_seed_3',
  'gpt2-xl',
  'EleutherAI/pythia-160m-deduped-step143000',
  'x' * 80,
  '"quoted" <b>name</b>',
]


def interval(mean, half=0.02):
  return win_rate.Interval(mean, mean - half, mean + half, 100)


def full(**changes):
  before = {'step': 1, 'eval/pretraining_loss_before': 2.875}
  runs = {
    model: [before | {'probe_before/drop_zeroshot_F1': 21.0}]
    + [
      row
      | {'probe/drop_zeroshot_F1': 20.0 - row['step']}
      | (
        {'eval/pretraining_loss_ema': 2.9}
        if 'eval/pretraining_loss' in row
        else {}
      )
      for row in made_figures.rl_rows(slope)
    ]
    for model, slope in (('my_fork', 0.1), ('other fork', 0.01))
  }
  return made_figures.full(**({'rl_metrics': runs} | changes))


def many_models():
  """Ten models with names that do not fit on a line."""
  rates = [0.1 * (i + 0.5) for i in range(len(LONG_NAMES))]
  return made_figures.minimal(
    models=LONG_NAMES,
    outcomes=made_figures.outcomes(
      {
        name: made_figures.rates(rate, 0.03, 500)
        for name, rate in zip(LONG_NAMES, rates, strict=True)
      }
    ),
    ratings={
      name: {
        'a label that is long ' * 4: interval(rate),
        'rude': interval(rate / 100, 0.0003),
      }
      for name, rate in zip(LONG_NAMES, rates, strict=True)
    },
    rl_metrics={
      name: made_figures.rl_rows(0.1 * i) for i, name in enumerate(LONG_NAMES)
    },
    judge='a judge whose name is a sentence ' * 12,
  )


def frontier(names=('best of n', 'ppo')):
  rows = [
    {key: interval(x - 1.0) for key in ('proxy', 'gold')}
    | {'kl': interval(x, 0.0)}
    for x in (0.0, 1.0, 2.0, 4.0)
  ]
  fit = overoptimization.Fit('rl', interval(1.0), interval(0.1), None, 0.9, 3)
  return plots._draw_frontier({n: rows for n in names}, {'ppo': fit}, 'judge')


def against(values=(0.018, 0.06, 0.6, 6.0)):
  return plots._draw_against(
    values,
    {'drop_zeroshot_F1': [20.0, 19.0, None, -3.0], 'a loss': [None] * 4},
    {'drop_zeroshot_F1': 21.0},
    'beta, the KL coefficient',
  )


@pytest.fixture(scope='module')
def drawn():
  """Every plot, of a full run and of ten models, laid out."""
  found = {f'full {k}': v for k, v in plots.draw(full()).items()}
  found |= {f'many {k}': v for k, v in plots.draw(many_models()).items()}
  found |= {
    'frontier': frontier(),
    'frontier of many': frontier(LONG_NAMES),
    'against': against(),
  }
  for figure in found.values():
    figure.canvas.draw()
  return found


def shown_axes(figure):
  return [axis for axis in figure.axes if axis.axison]


def text_of(figure):
  """All text of a figure on one line, as it is read."""
  texts = [
    text.get_text() for text in figure.findobj(lambda a: hasattr(a, 'get_text'))
  ]
  return re.sub(r'\s+', ' ', ' '.join(texts)).replace('\\$', '$')


def overlap(a, b):
  """Whether two boxes share more than a pixel."""
  return (
    min(a.x1, b.x1) - max(a.x0, b.x0) > 1
    and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
  )


def whiskers(axis):
  """(low, high) of each interval that is drawn along x."""
  found = []
  for container in axis.containers:
    for lines in getattr(container, 'lines', (0, 0, ()))[2]:
      found += [tuple(sorted(line[:, 0])) for line in lines.get_segments()]
  return found


def test_every_kind_of_plot_is_covered(drawn):
  names = {name.split(' ')[1] for name in drawn if name.startswith('full')}
  assert names == made_figures.PLOTS | {'probes.png'}


def test_labels_of_answers_have_their_intervals():
  """In percent, as the bars are, for every model and label."""
  shown = made_figures.minimal(
    ratings={
      'sft': {'rude': win_rate.Interval(0.013, 0.007, 0.02, 1000)},
      'my_fork': {'rude': win_rate.Interval(0.014, 0.008, 0.021, 1000)},
    }
  )
  (axis,) = plots.draw(shown)['metadata.png'].axes
  assert whiskers(axis) == [
    pytest.approx((0.7, 2.0)),
    pytest.approx((0.8, 2.1)),
  ]
  # A step of the axis is larger than their difference.
  assert [text.get_text() for text in axis.texts] == ['1.30 %', '1.40 %']
  assert axis.get_xlabel() == '% of answers'


def test_figures_are_as_fine_as_their_axis(drawn):
  for name in ('full metadata.png', 'many metadata.png'):
    for axis in shown_axes(drawn[name]):
      ticks = [text.get_text() for text in axis.get_xticklabels()]
      decimals = [len(t.partition('.')[2]) for t in ticks if t]
      for text in axis.texts:
        digits = text.get_text().split(' ')[0]
        assert len(digits.partition('.')[2]) >= max(decimals)


@pytest.mark.parametrize('plot', ['win_rate', 'metadata', 'reward_model'])
def test_no_line_or_bar_crosses_a_figure(drawn, plot):
  """Numbers have their own column, right of the axes."""
  for name in (f'full {plot}.png', f'many {plot}.png'):
    if name not in drawn:
      continue
    axes = [axis for axis in shown_axes(drawn[name]) if axis.texts]
    assert axes
    for axis in axes:
      for text in axis.texts:
        box = text.get_window_extent()
        assert box.x0 >= axis.bbox.x1
        assert box.x1 <= drawn[name].bbox.x1 + 1


def test_names_do_not_overlap(drawn):
  for name, figure in drawn.items():
    for axis in shown_axes(figure):
      for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        boxes = [x.get_window_extent() for x in labels if x.get_text()]
        for a, b in itertools.pairwise(boxes):
          assert not overlap(a, b), (name, [x.get_text() for x in labels])


def test_legends_and_notes_are_beside_the_data(drawn):
  for name, figure in drawn.items():
    boxes = [legend.get_window_extent() for legend in figure.legends]
    boxes += [
      text.get_window_extent() for text in figure.texts if text.get_text()
    ]
    assert boxes, name
    for box in boxes:
      for axis in shown_axes(figure):
        assert not overlap(box, axis.bbox), name
      assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1, name
    for a, b in itertools.combinations(boxes, 2):
      assert not overlap(a, b), name
    assert not any(axis.get_legend() for axis in figure.axes)


def test_axes_say_what_and_in_which_unit(drawn):
  for name, figure in drawn.items():
    axes = shown_axes(figure)
    for axis in axes:
      rows = [text.get_text() for text in axis.get_yticklabels()]
      has_names = any(re.search('[A-Za-z]{2}', row) for row in rows)
      # The right half of labels' panels has the names of the left half.
      assert axis.get_ylabel() or has_names or 'metadata' in name, name
      # The lowest axis of a column has the label for all above it.
      column = [a for a in axes if abs(a.bbox.x0 - axis.bbox.x0) < 5]
      assert min(column, key=lambda a: a.bbox.y0).get_xlabel(), name


def test_text_can_be_read_on_a_phone(drawn):
  """A figure is shown 345 pixels wide at least, its text never below 6."""
  for name, figure in drawn.items():
    for text in figure.findobj(lambda a: hasattr(a, 'get_fontsize')):
      if text.get_text():
        pixels = text.get_fontsize() * 345 / (72 * figure.get_figwidth())
        assert pixels > 6.5, (name, text.get_text())


def test_intervals_are_named(drawn):
  for name in ('full win_rate.png', 'full metadata.png', 'frontier'):
    assert '95 % intervals, redrawing prompts' in text_of(drawn[name])
  text = text_of(drawn['full reward_model.png'])
  assert '95 % intervals, redrawing prompts' in text
  assert 'standard error over 5 runs' in text


def test_labelers_of_the_reward_model_are_explained(drawn):
  text = text_of(drawn['full reward_model.png'])
  assert 'labelers trained on (intra)' in text
  assert 'labelers left out (inter)' in text
  assert 'Dashed: 0.730' in text


def test_pretraining_loss_begins_before_rl(drawn):
  (axis,) = drawn['full pretraining_loss.png'].axes
  curves = [line for line in axis.lines if len(line.get_xdata()) > 2]
  assert [line.get_linestyle() for line in curves] == ['-', ':', '-', ':']
  for line in curves:
    assert (line.get_xdata()[0], line.get_ydata()[0]) == (0, 2.875)
    assert line.get_xdata()[-1] == 8
  assert axis.get_xlim()[0] < 0 <= axis.get_xticks()[1]


def test_public_tasks_begin_before_rl_and_name_their_unit(drawn):
  (axis,) = drawn['full probes.png'].axes
  assert axis.get_ylabel() == 'F1 (0 to 100)'
  assert axis.lines[0].get_ydata()[0] == 21.0
  assert axis.lines[0].get_xdata()[0] == 0


def test_models_keep_their_names_and_colours(drawn):
  text = text_of(drawn['full win_rate.png'])
  assert 'my_fork' in text and 'against sft' in text
  colours = {
    line.get_color()
    for line in drawn['full rl.png'].axes[0].lines
    if line.get_alpha() is None
  }
  looks = plots._of_models(full())
  assert colours == {looks['my_fork'][0], looks['other fork'][0]}


def test_ten_models_look_different():
  looks = plots._looks(LONG_NAMES)
  assert len({colour for colour, _ in looks.values()}) == len(LONG_NAMES)
  assert len(set(looks.values())) == len(LONG_NAMES)
  # With more models than colours, markers differ.
  assert len(set(plots._looks([str(i) for i in range(15)]).values())) == 15


def test_runs_with_little_data_are_drawn(recwarn):
  """One point, equal figures, negative ones, none: no warning."""
  del recwarn
  flat = [
    {'step': 1, 'objective/kl': 0.0, 'objective/score': -2.0}
    | {'objective/length': 5.0, 'ppo/policy/clipfrac': 0.0}
  ]
  shown = made_figures.minimal(
    rl_metrics={'my_fork': flat, 'other': []},
    epochs={'sft': figures.Epochs([{'epoch': 1, 'valid_loss': math.nan}])},
    ratings={'sft': {}, 'my_fork': {'rude': interval(0.0, 0.0)}},
  )
  found = plots.draw(shown)
  assert set(found) == {
    'win_rate.png',
    'metadata.png',
    'reward_kl.png',
    'rl.png',
  }
  for figure in found.values():
    figure.canvas.draw()
    for axis in shown_axes(figure):
      low, high = axis.get_ylim()
      assert low != high
  # A share has no room below 0, one point is a mark.
  clipped = found['rl.png'].axes[3]
  assert clipped.get_ylim()[0] == 0
  assert all(line.get_marker() for line in clipped.lines)
  score = found['rl.png'].axes[0]
  assert score.get_ylim()[0] < -2 < score.get_ylim()[1]


def test_running_mean_is_centred():
  # Window 3: ends average two, (0 + 3)/2; the middle three, (0 + 3 + 6)/3.
  assert plots._running_mean([0, 3, 6], 3) == [1.5, 3.0, 4.5]


def test_decimals_follow_the_intervals():
  # Half a width of 0.025 has two digits at three decimals, of 12 at none.
  assert plots._decimals([(0.475, 0.525)], 3) == 3
  assert plots._decimals([(30.0, 54.0)], 2) == 0
  assert plots._decimals([(0.5, 0.5)], 2) == 2
