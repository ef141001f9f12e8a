"""The plots of a report, as PNG bytes. What each shows: see report.py.

Matplotlib is loaded only here, when a plot is drawn, and draws into memory:
without a display and without the global state of pyplot.
"""

import dataclasses
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from instruct_jax.evals import (
  overoptimization,
  preference_accuracy,
  run_figures,
  win_rate,
)

# Okabe and Ito's palette: distinct under all common colour blindnesses.
COLOURS = {
  'pretrained': '#8C8C8C',
  'prompted': '#E69F00',
  'sft': '#009E73',
  'ppo': '#0072B2',
  'ppo_ptx': '#D55E00',
}
_OTHER_COLOUR = '#CC79A7'
# Panels along RL: metric of metrics.jsonl, title, unit.
_RL_PANELS = (
  ('objective/score', 'Reward-model score', 'reward units'),
  ('objective/kl', 'KL from the RL initialisation', 'nats per response'),
  ('ppo/policy/entropy', 'Entropy of the policy', 'nats per token'),
  ('objective/length', 'Response length', 'tokens'),
  ('objective/ended', 'Responses ended by the policy', 'share'),
  ('ppo/policy/clipfrac', 'Clipped policy ratios', 'share of tokens'),
)
_STYLE = {
  'font.size': 10,
  'axes.titlesize': 11,
  'axes.titlelocation': 'left',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.axisbelow': True,
  'axes.grid': True,
  'grid.color': '#E3E3E3',
  'grid.linewidth': 0.8,
  'legend.frameon': False,
  'lines.linewidth': 1.8,
}


def make_plots(figures: run_figures.Figures) -> dict[str, bytes]:
  """File name -> PNG, for every plot that has data."""
  import matplotlib

  makers = {
    'win_rate.png': _plot_win_rate,
    'metadata.png': _plot_metadata,
    'reward_kl.png': _plot_reward_kl,
    'pretraining_loss.png': _plot_pretraining_loss,
    'probes.png': _plot_probes,
    'rl.png': _plot_rl,
    'reward_model.png': _plot_reward_model,
    'sft.png': _plot_sft,
  }
  plots = {}
  with matplotlib.rc_context(_STYLE):
    for name, maker in makers.items():
      content = maker(figures)
      if content is not None:
        plots[name] = content
  return plots


def _canvas(
  rows: int,
  columns: int,
  width: float,
  height: float,
  width_ratios: Sequence[float] | None = None,
):
  """A figure and its axes [rows, columns], sizes in inches."""
  from matplotlib.backends import backend_agg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), layout='constrained')
  backend_agg.FigureCanvasAgg(figure)
  return figure, figure.subplots(
    rows, columns, squeeze=False, width_ratios=width_ratios
  )


def _png(figure: Any) -> bytes:
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=140)
  return buffer.getvalue()


def _plain_label(text: str) -> str:
  """A label that matplotlib does not take for mathematics."""
  return text.replace('$', r'\$')


def _label(model: str) -> str:
  return _plain_label(run_figures.label(model))


def _colour(model: str) -> str:
  return COLOURS[model] if model in COLOURS else _OTHER_COLOUR  # noqa: SIM401


def _is_number(row: Mapping[str, Any], key: str) -> bool:
  # metrics.jsonl holds null where a figure was not finite.
  return key in row and row[key] is not None and math.isfinite(row[key])


def _series(
  rows: Sequence[run_figures.MetricsRow], *keys: str
) -> list[list[float]]:
  """Columns of the rows that have all keys, with finite numbers."""
  kept = [
    [float(row[key]) for key in keys]
    for row in rows
    if all(_is_number(row, key) for key in keys)
  ]
  columns = [list(column) for column in zip(*kept, strict=True)]
  return columns or [[] for _ in keys]


def _running_mean(values: win_rate.Numbers, window: int) -> list[float]:
  """Centred mean over `window` neighbours, fewer at the ends."""
  half = window // 2
  means = []
  for i in range(len(values)):
    near = values[max(0, i - half) : i + half + 1]
    means.append(sum(near) / len(near))
  return means


def _window(num_values: int) -> int:
  return max(1, num_values // 8) | 1  # Odd, so that it is centred.


def _error_bars(axis: Any, positions: Sequence[int], values: Sequence) -> None:
  """(mean, low, high) as whiskers, with the mean written above."""
  means, _, highs = zip(*values, strict=True)
  below = [max(0.0, mean - low) for mean, low, _ in values]
  above = [max(0.0, high - mean) for mean, _, high in values]
  axis.errorbar(
    positions,
    means,
    yerr=[below, above],
    fmt='none',
    ecolor='#222222',
    elinewidth=1.3,
    capsize=4,
  )
  for position, mean, high in zip(positions, means, highs, strict=True):
    axis.annotate(
      f'{mean:.2f}',
      (position, max(mean, high)),
      xytext=(0, 4),
      textcoords='offset points',
      ha='center',
      fontsize=9,
      # A line across the plot must not cross out the number.
      bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.8},
      zorder=5,
    )


def _count_axis(axis: Any, counts: win_rate.Numbers) -> None:
  """Whole numbers under the axis, and some width for a single one."""
  from matplotlib.ticker import MaxNLocator

  axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
  if min(counts) == max(counts):
    axis.set_xlim(counts[0] - 0.5, counts[0] + 0.5)


def _plot_win_rate(figures: run_figures.Figures) -> bytes | None:
  rates = run_figures.ordered(figures.win_rate)
  if not rates:
    return None
  prompts = sorted({rate.num_prompts for _, rate in rates})
  count = f'{prompts[0]:,}' if len(prompts) == 1 else 'up to '
  count += '' if len(prompts) == 1 else f'{prompts[-1]:,}'
  return _win_rate_bars(
    {model: (rate.rate, rate.low, rate.high) for model, rate in rates},
    'SFT',
    f'{count} prompts',
    figures.judge,
  )


def win_rate_bars(
  rates: Mapping[str, tuple[float, float, float]],
  baseline: str,
  count: str,
  judge: str,
) -> bytes:
  """The paper's Figure 1 for any models, as PNG.

  Args:
    rates: model -> (rate, low, high).
    baseline: what they are compared with.
    count: what the intervals rest on, say '1,000 prompts'.
    judge: who compared.
  """
  import matplotlib

  with matplotlib.rc_context(_STYLE):
    return _win_rate_bars(rates, baseline, count, judge)


def _win_rate_bars(rates, baseline, count, judge):
  figure, ((axis,),) = _canvas(1, 1, max(6.4, 1.1 * len(rates) + 1), 4.0)
  positions = range(len(rates))
  axis.bar(
    positions,
    [rate for rate, _, _ in rates.values()],
    width=0.62,
    color=[_colour(model) for model in rates],
  )
  axis.axhline(0.5, color='#222222', linestyle='--', linewidth=1)
  _error_bars(axis, positions, list(rates.values()))
  axis.set_xticks(positions, [_label(model) for model in rates])
  # Room above 1 for the number over a full bar.
  axis.set_ylim(0, 1.08)
  axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
  axis.grid(axis='x', visible=False)
  axis.set_ylabel(f'win rate against {_plain_label(baseline)} (ties one half)')
  judge = textwrap.fill(_plain_label(judge), 76, max_lines=2)
  axis.set_title(f'{count}, 95 % intervals; judged by\n{judge}')
  return _png(figure)


def _plot_metadata(figures: run_figures.Figures) -> bytes | None:
  if not figures.metadata:
    return None
  models = [model for model, _ in run_figures.ordered(figures.metadata)]
  names = run_figures.row_names(figures.metadata)
  if not names:
    return None
  columns = min(4, len(names))
  rows = -(-len(names) // columns)
  figure, axes = _canvas(rows, columns, 2.5 * columns + 0.6, 2.3 * rows + 0.6)
  for axis, name in zip(axes.flat, names, strict=False):
    present = [
      model for model in models if _is_number(figures.metadata[model], name)
    ]
    shares = [figures.metadata[model][name] for model in present]
    axis.bar(
      range(len(present)),
      shares,
      width=0.7,
      color=[_colour(model) for model in present],
    )
    for position, share in enumerate(shares):
      axis.annotate(
        f'{share:.2f}',
        (position, share),
        xytext=(0, 2),
        textcoords='offset points',
        ha='center',
        fontsize=8,
      )
    axis.set_xticks([])
    axis.grid(axis='x', visible=False)
    top = max(shares, default=0)
    axis.set_ylim(0, 1.15 * top if top > 0 else 1)
    axis.set_title(_wrapped(_label(name)), fontsize=9.5)
  for axis in list(axes.flat)[len(names) :]:
    axis.set_axis_off()
  _shared_legend(figure, models)
  figure.supylabel('share of answers', fontsize=10)
  return _png(figure)


def _wrapped(text: str) -> str:
  return textwrap.fill(text, 28, max_lines=3)


def _shared_legend(figure: Any, models: Sequence[str]) -> None:
  from matplotlib.patches import Patch

  figure.legend(
    handles=[
      Patch(color=_colour(model), label=_label(model)) for model in models
    ],
    loc='outside upper center',
    ncols=len(models),
  )


def _plot_reward_kl(figures: run_figures.Figures) -> bytes | None:
  panels = [
    ('objective/score', 'reward-model score (reward units)'),
    ('eval/gold', "judge's score"),
  ]
  data = {}
  for key, label in panels:
    by_model = {
      model: _series(rows, 'objective/kl', key)
      for model, rows in run_figures.ordered(figures.rl_metrics)
    }
    by_model = {model: pair for model, pair in by_model.items() if pair[0]}
    if by_model:
      data[label] = by_model
  if not data:
    return None
  figure, axes = _canvas(1, len(data), 5.6 * len(data), 4.0)
  for axis, (label, by_model) in zip(axes[0], data.items(), strict=True):
    for model, (kl, score) in by_model.items():
      window = _window(len(kl))
      # Few dots must be seen, many must not hide the line.
      axis.scatter(
        kl,
        score,
        s=12,
        color=_colour(model),
        alpha=0.3 if len(kl) > 30 else 0.9,
        linewidth=0,
      )
      # In the order of the iterations: the path that the run took.
      axis.plot(
        _running_mean(kl, window),
        _running_mean(score, window),
        color=_colour(model),
        label=_label(model),
      )
    axis.set_xlabel('KL from the RL initialisation (nats per response)')
    axis.set_ylabel(label)
    axis.legend()
  figure.suptitle(
    'Reward against KL: one dot an iteration, line = running mean',
    x=0.01,
    ha='left',
    fontsize=11,
  )
  return _png(figure)


def _plot_pretraining_loss(figures: run_figures.Figures) -> bytes | None:
  curves = {
    model: _series(rows, 'step', 'eval/pretraining_loss')
    for model, rows in run_figures.ordered(figures.rl_metrics)
  }
  curves = {model: curve for model, curve in curves.items() if curve[0]}
  if not curves:
    return None
  figure, ((axis,),) = _canvas(1, 1, 6.4, 4.0)
  for model, (steps, losses) in curves.items():
    axis.plot(
      steps,
      losses,
      marker='o',
      markersize=3.5,
      color=_colour(model),
      label=_label(model),
    )
  if figures.pretraining_loss is not None:
    axis.axhline(
      figures.pretraining_loss.init.mean,
      color='#222222',
      linestyle='--',
      linewidth=1,
      label='RL initialisation',
    )
  _count_axis(axis, [step for curve in curves.values() for step in curve[0]])
  axis.set_xlabel('RL iteration')
  axis.set_ylabel('loss on held-out pretraining text\n(nats per token)')
  axis.set_title('Pretraining loss along RL')
  axis.legend()
  return _png(figure)


def probe_names(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
  """Names of the public tasks that were asked along RL, in any of the runs."""
  return sorted(
    {
      key.removeprefix('probe/')
      for rows in runs.values()
      for row in rows
      for key in row
      if key.startswith('probe/')
    }
  )


def _plot_probes(figures: run_figures.Figures) -> bytes | None:
  runs = dict(run_figures.ordered(figures.rl_metrics))
  return _tax_along(runs, _probe_panels(runs), _colour)


def _probe_panels(runs):
  return {
    name: (f'probe/{name}', f'probe_before/{name}')
    for name in probe_names(runs)
  }


def _tax_along(runs, panels, colour_of) -> bytes | None:
  """Figures against iteration, one panel each, a line a run (Fig 35).

  Args:
    runs: name -> rows of metrics.jsonl.
    panels: title -> (metric, metric before RL).
    colour_of: run -> colour.
  """
  names = {
    title: keys
    for title, keys in panels.items()
    if any(keys[0] in row for rows in runs.values() for row in rows)
  }
  if not names:
    return None
  columns = min(3, len(names))
  rows = -(-len(names) // columns)
  figure, axes = _canvas(rows, columns, 4.2 * columns, 3.0 * rows + 0.4)
  for axis, (name, keys) in zip(axes.flat, names.items(), strict=False):
    steps = []
    for run, lines in runs.items():
      x, y = _series(lines, 'step', keys[0])
      _, before = _series(lines, 'step', keys[1])
      # RL starts from what was measured before the first iteration.
      x, y = [0.0] * len(before) + x, before + y
      steps += x
      axis.plot(
        x,
        y,
        marker='o',
        markersize=3.5,
        color=colour_of(run),
        label=_label(run),
      )
      if before:
        axis.axhline(before[0], color='#222222', linestyle='--', linewidth=0.8)
    if steps:
      _count_axis(axis, steps)
    axis.set_title(_wrapped(_label(name)))
    axis.set_xlabel('RL iteration')
    axis.legend(fontsize=8)
  for axis in list(axes.flat)[len(names) :]:
    axis.set_axis_off()
  return _png(figure)


def tax_along(
  runs: Mapping[str, Sequence[Mapping[str, Any]]],
) -> bytes | None:
  """Figure 35 for any runs: name -> rows of metrics.jsonl; None without data.

  The dashed line is the model that RL started from.
  """
  import matplotlib

  palette = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9']
  colours = dict(zip(runs, palette * len(runs), strict=False))
  with matplotlib.rc_context(_STYLE):
    return _tax_along(
      runs,
      _probe_panels(runs)
      | {
        'pretraining loss, nats a token': (
          'eval/pretraining_loss',
          'eval/pretraining_loss_before',
        ),
        'reward-model score': ('objective/score', 'objective/score_before'),
      },
      colours.get,
    )


def tax_against(
  values: Sequence[float],
  figures: Mapping[str, Sequence[float | None]],
  before: Mapping[str, float],
  label: str,
) -> bytes:
  """Figures 33 and 34: what runs ended with, against one of their numbers.

  Args:
    values: of each run, say gamma; shown on a scale with room for 0.
    figures: panel title -> the figure of each run, None where not measured.
    before: panel title -> the figure before RL, where it was measured.
    label: of the axis.
  """
  import matplotlib

  with matplotlib.rc_context(_STYLE):
    columns = min(3, len(figures))
    rows = -(-len(figures) // columns)
    canvas, axes = _canvas(rows, columns, 4.2 * columns, 3.0 * rows + 0.4)
    for axis, (name, numbers) in zip(axes.flat, figures.items(), strict=False):
      points = sorted(
        (x, y) for x, y in zip(values, numbers, strict=True) if y is not None
      )
      # Before anything is drawn: margins are those of the scale at that time.
      positive = [x for x in values if x > 0]
      if len(positive) == len(values):
        axis.set_xscale('log')
      elif positive:
        axis.set_xscale('symlog', linthresh=min(positive))
      if points:
        axis.plot(
          *zip(*points, strict=True), marker='o', markersize=4, color='#0072B2'
        )
      if name in before:
        axis.axhline(
          before[name],
          color='#222222',
          linestyle='--',
          linewidth=0.8,
          label='before RL',
        )
        axis.legend(fontsize=8)
      axis.set_title(_wrapped(_label(name)))
      axis.set_xlabel(_plain_label(label))
    for axis in list(axes.flat)[len(figures) :]:
      axis.set_axis_off()
    return _png(canvas)


def _plot_rl(figures: run_figures.Figures) -> bytes | None:
  panels = []
  for key, title, unit in _RL_PANELS:
    curves = {
      model: _series(rows, 'step', key)
      for model, rows in run_figures.ordered(figures.rl_metrics)
    }
    curves = {model: curve for model, curve in curves.items() if curve[0]}
    if curves:
      panels.append((title, unit, curves))
  if not panels:
    return None
  columns = min(3, len(panels))
  rows = -(-len(panels) // columns)
  figure, axes = _canvas(rows, columns, 3.7 * columns, 2.7 * rows + 0.5)
  for axis, (title, unit, curves) in zip(axes.flat, panels, strict=False):
    for model, (steps, values) in curves.items():
      axis.plot(steps, values, color=_colour(model), alpha=0.25, linewidth=1)
      axis.plot(
        steps,
        _running_mean(values, _window(len(values))),
        color=_colour(model),
      )
    _count_axis(axis, [step for curve in curves.values() for step in curve[0]])
    axis.set_title(title)
    axis.set_xlabel('RL iteration')
    axis.set_ylabel(unit)
  for axis in list(axes.flat)[len(panels) :]:
    axis.set_axis_off()
  _shared_legend(
    figure,
    [model for model in run_figures.RL_MODELS if model in figures.rl_metrics],
  )
  return _png(figure)


def _plot_reward_model(figures: run_figures.Figures) -> bytes | None:
  reward = figures.reward_model
  if reward is None:
    return None
  curves = [
    ('reward/loss', 'training loss\n(nats per pair)'),
    ('reward/accuracy', 'training accuracy\n(share of pairs)'),
  ]
  curves = [
    (label, _series(reward.curve, 'step', key)) for key, label in curves
  ]
  curves = [(label, series) for label, series in curves if series[0]]
  figure, axes = _canvas(
    1,
    1 + len(curves),
    6.4 + 3.3 * len(curves),
    3.9,
    [2.0, *(1.0 for _ in curves)],
  )
  axis = axes[0][0]
  rows = run_figures.reward_rows(reward)
  values = []
  for _, _, value in rows:
    if isinstance(value, preference_accuracy.Spread):
      error = 0.0 if value.error is None else value.error
      values.append((value.mean, value.mean - error, value.mean + error))
    else:
      mean = list(dataclasses.asdict(value).values())[0]
      values.append((mean, value.low, value.high))
  positions = range(len(rows))
  colours = [
    '#56B4E9' if label.startswith('agreement') else '#0072B2'
    for _, label, _ in rows
  ]
  axis.bar(positions, [mean for mean, _, _ in values], width=0.6, color=colours)
  _error_bars(axis, positions, values)
  axis.axhline(0.5, color='#222222', linestyle=':', linewidth=1, label='chance')
  if reward.ceiling is not None:
    axis.axhline(
      reward.ceiling,
      color='#D55E00',
      linestyle='--',
      linewidth=1.3,
      label=f'gold utility on the same pairs, {reward.ceiling:.2f}',
    )
  axis.set_xticks(positions, [label for _, label, _ in rows])
  # Room for the legend above the bars.
  axis.set_ylim(0, 1.25)
  axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
  axis.grid(axis='x', visible=False)
  axis.set_ylabel('share of pairs ordered alike')
  axis.set_title('Reward model and labelers')
  axis.legend(loc='upper left', fontsize=9)
  for axis, (label, (steps, numbers)) in zip(axes[0][1:], curves, strict=True):
    axis.plot(steps, numbers, color='#0072B2', alpha=0.3, linewidth=1)
    axis.plot(
      steps, _running_mean(numbers, _window(len(numbers))), color='#0072B2'
    )
    axis.set_xlabel('step')
    axis.set_ylabel(label)
  return _png(figure)


def _plot_sft(figures: run_figures.Figures) -> bytes | None:
  if not figures.sft_epochs:
    return None
  epochs = figures.sft_epochs
  panels = [
    ('Validation loss', 'nats per response token', 'valid_loss'),
    ('Reward-model score', 'reward units', 'score_reward'),
    ("Judge's score", _plain_label(figures.score_name), 'score_gold'),
  ]
  drawn = []
  for title, unit, field in panels:
    points = [
      (epoch.epoch, getattr(epoch, field))
      for epoch in epochs
      if getattr(epoch, field) is not None
    ]
    if points:
      drawn.append((title, unit, points))
  figure, axes = _canvas(1, len(drawn), 3.9 * len(drawn), 3.4)
  for axis, (title, unit, points) in zip(axes[0], drawn, strict=True):
    axis.plot(
      *zip(*points, strict=True), marker='o', markersize=4, color=COLOURS['sft']
    )
    chosen = [p for p in points if p[0] == figures.sft_selected_epoch]
    if chosen:
      axis.axvline(chosen[0][0], color='#222222', linestyle=':', linewidth=1)
      axis.plot(
        *chosen[0],
        marker='*',
        markersize=14,
        color='#D55E00',
        linestyle='none',
        label=f'selected: epoch {chosen[0][0]}',
      )
      axis.legend(fontsize=9)
    axis.set_title(title)
    axis.set_xlabel('epoch')
    axis.set_ylabel(unit)
    _count_axis(axis, [epoch for epoch, _ in points])
  return _png(figure)


def frontier(
  points: Mapping[str, Sequence[Mapping[str, Any]]],
  fits: Mapping[str, overoptimization.Fit],
  judge: str,
) -> bytes:
  """Scores gained against √KL, of best-of-n and RL, with fitted curves, as PNG.

  Args:
    points: curve -> rows with intervals 'kl', 'proxy' and 'gold'.
    fits: curve -> fit of 'gold'.
    judge: who gave 'gold'.
  """
  import matplotlib
  import numpy as np

  colours = dict(
    zip(
      points,
      ['#009E73', '#0072B2', '#D55E00', '#CC79A7', '#E69F00'] * len(points),
      strict=False,
    )
  )
  judge = textwrap.fill(_plain_label(judge), 60, max_lines=2)
  panels = (('gold', f'judge: {judge}'), ('proxy', 'reward model'))
  with matplotlib.rc_context(_STYLE):
    figure, axes = _canvas(1, 2, 11.2, 4.4)
    for axis, (key, title) in zip(axes[0], panels, strict=True):
      for name, rows in points.items():
        x = [math.sqrt(max(row['kl'].mean, 0.0)) for row in rows]
        y = [row[key].mean for row in rows]
        axis.errorbar(
          x,
          y,
          yerr=[
            [max(0.0, row[key].mean - row[key].low) for row in rows],
            [max(0.0, row[key].high - row[key].mean) for row in rows],
          ],
          fmt='o',
          markersize=4,
          capsize=2,
          elinewidth=1,
          color=colours[name],
          label=_plain_label(name),
        )
        if key == 'gold' and name in fits and max(x) > 0:
          fit = fits[name]
          d = np.linspace(max(x) / 200, max(x), 200)
          axis.plot(
            d,
            overoptimization.curve(
              fit.kind, fit.alpha.mean, fit.beta.mean, d**2
            ),
            color=colours[name],
            label=f'{_plain_label(name)}, fitted',
          )
      axis.axhline(0, color='#222222', linestyle=':', linewidth=1)
      axis.set_xlabel('√KL from the initial policy (√nats)')
      axis.set_ylabel('score gained')
      axis.set_title(title)
      axis.legend(fontsize=9)
    return _png(figure)
