"""The plots of a report, as PNG bytes; `report.py` lists them.

All are narrow enough to read on a phone. Compared models are rows, so there may
be many with long names. Each plot has a heading and a note that explains its
bars and lines.

Matplotlib is imported only when a plot is drawn. It needs no display, and the
global state of pyplot is not used.
"""

import collections
import functools
import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from instruct_jax.evals import (
  figures,
  overoptimization,
  preference_accuracy,
  win_rate,
)

Runs = Mapping[str, Sequence[figures.MetricsRow]]
Looks = Mapping[str, tuple[str, str]]

# Colours of models or runs, in order: Okabe and Ito's palette, distinguishable
# with all common forms of colour blindness; the last four are Tol's.
_COLOURS = (
  *('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9'),
  *('#332288', '#882255', '#999933', '#44AA99'),
)
_MARKERS = 'osD^vP<>X*'
_INK, _GREY = '#222222', '#555555'
# Width in inches, and pixels per inch. html_report shows an inch as 100 pixels.
_WIDTH, DPI = 5.6, 160
# Characters per full-width line, in a heading and in a note.
_HEADING_CHARACTERS, _NOTE_CHARACTERS = 54, 84
# Panels of rl.png: title, metric in metrics.jsonl, unit.
_RL_PANELS = (
  ('Score', 'objective/score', 'reward units'),
  ('KL from the RL initialisation', 'objective/kl', 'nats per response'),
  ('Entropy of the policy', 'ppo/policy/entropy', 'nats per token'),
  ('Response length', 'objective/length', 'tokens'),
  ('Ended by the policy', 'objective/ended', 'share of responses'),
  ('Clipped policy ratios', 'ppo/policy/clipfrac', 'share of tokens'),
)
_REWARD_PANELS = (
  ('Training loss', 'reward/loss', 'nats per pair'),
  ('Training accuracy', 'reward/accuracy', 'share of pairs'),
)
_SFT_PANELS = (
  ('Validation loss', 'valid_loss', 'nats per\nresponse token'),
  ('Reward-model score of samples', 'score_reward', 'reward units'),
)
_LOSS = ('eval/pretraining_loss', 'eval/pretraining_loss_before')
# Metric, which ends a probe's key -> unit of its axis.
_UNITS = {
  'F1': 'F1 (0 to 100)',
  'BLEU': 'BLEU (0 to 100)',
  'ROUGE-L': 'ROUGE-L (0 to 1)',
  'accuracy': 'share right',
  'P@1': 'share right',
  'entropy': 'entropy (bits)',
  'score': 'reward units',
}
_STYLE = {
  'font.size': 10,
  'axes.titlesize': 10,
  'axes.titlelocation': 'left',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.axisbelow': True,
  'axes.grid': True,
  'axes.formatter.useoffset': False,
  'grid.color': '#E3E3E3',
  'grid.linewidth': 0.8,
  'legend.frameon': False,
  'legend.fontsize': 9.5,
  'lines.linewidth': 1.8,
}


def make_plots(shown: figures.Figures) -> dict[str, bytes]:
  """File name -> PNG, for every plot that has data."""
  return {name: _png(figure) for name, figure in draw(shown).items()}


def draw(shown: figures.Figures) -> dict[str, Any]:
  """File name -> matplotlib Figure, for every plot that has data."""
  makers = {
    'win_rate.png': _draw_win_rate,
    'metadata.png': _draw_metadata,
    'reward_kl.png': _draw_reward_kl,
    'pretraining_loss.png': _draw_pretraining_loss,
    'probes.png': _draw_probes,
    'rl.png': _draw_rl,
    'reward_model.png': _draw_reward_model,
    'sft.png': _draw_sft,
  }
  drawn = {name: _styled(maker, shown) for name, maker in makers.items()}
  return {name: figure for name, figure in drawn.items() if figure is not None}


# --- Figures, text and axes ---------------------------------------------------


def _styled(maker: Callable[..., Any], *arguments: Any) -> Any:
  """The figure that `maker` draws, in the style of all plots."""
  import matplotlib

  with matplotlib.rc_context(_STYLE):
    return maker(*arguments)


def _png(figure: Any) -> bytes:
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=DPI)
  return buffer.getvalue()


def _figure(height: float) -> Any:
  """An empty figure of this height in inches."""
  from matplotlib.backends import backend_agg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(_WIDTH, height), layout='constrained')
  backend_agg.FigureCanvasAgg(figure)
  return figure


def _canvas(rows: int, columns: int, height: float, **options: Any):
  """A figure of this height in inches, and its axes [rows, columns]."""
  figure = _figure(height)
  figure.get_layout_engine().set(h_pad=0.06, w_pad=0.06)
  return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _grid(number: int, panel: float, margin: float, **options: Any):
  """A figure of panels, two per row, each `panel` inches high.

  Returns the figure, its axes in order, and the axes with no panel below them.
  """
  columns = min(2, number)
  rows = -(-number // columns)
  figure, axes = _canvas(rows, columns, margin + rows * panel, **options)
  axes = list(axes.flat)
  for axis in axes[number:]:
    axis.set_axis_off()
  return figure, axes[:number], axes[number - columns : number]


def _wrapped(text: str, width: int, max_lines: int = 3) -> str:
  """Text on lines of at most `width` characters, cut with '…' if too long."""
  lines = textwrap.fill(
    text.replace(' %', '\u00a0%'), width, max_lines=max_lines, placeholder=' …'
  )
  return lines.replace('$', r'\$')  # Not math mode.


def _title(name: str) -> str:
  return _wrapped(name.replace('_', ' '), 30)


def _height(labels: Sequence[str], least: float) -> float:
  """Inches for rows with these labels, each as high as the tallest needs."""
  lines = max(label.count('\n') + 1 for label in labels)
  return len(labels) * max(least, 0.17 * lines + 0.06)


def _heading(
  figure: Any, title: str, note: str = '', looks: Looks | None = None
) -> None:
  """Writes title and legend above the plots, and the note below.

  The figure grows by the height of the text.
  """
  title = _wrapped(title, _HEADING_CHARACTERS)
  inches = 0.22 * (title.count('\n') + 1)
  style = {'size': 12, 'weight': 'bold'}
  if looks:
    handles = _handles(looks)
    labels = [handle.get_label() for handle in handles]
    longest = max(len(line) for label in labels for line in label.split('\n'))
    # A character is about half the font size wide, a handle seven characters.
    columns = max(1, int(_WIDTH * 72 / (9.5 * 0.56 * (longest + 7))))
    columns = min(columns, len(handles))
    inches += 0.05 + _height(labels, 0.2) / columns
    figure.legend(
      handles=handles,
      loc='outside upper left',
      ncols=columns,
      title=title,
      title_fontproperties=style,
      alignment='left',
      borderaxespad=0.2,
    )
  else:
    figure.suptitle(title, x=0.012, ha='left', **style)
  if note:
    note = _wrapped(note, _NOTE_CHARACTERS, 5)
    inches += 0.13 * (note.count('\n') + 1) + 0.05
    figure.supxlabel(note, x=0.012, ha='left', fontsize=8, color=_GREY)
  figure.set_figheight(figure.get_figheight() + inches)


def _looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
  """Name -> (colour, marker); markers shift when colours repeat."""
  return {
    name: (
      _COLOURS[i % len(_COLOURS)],
      _MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)],
    )
    for i, name in enumerate(names)
  }


def _of_models(shown: figures.Figures) -> dict[str, tuple[str, str]]:
  """The looks of all models, the same in every plot of a report."""
  return _looks(list(dict.fromkeys([*shown.models, *shown.rl_metrics])))


def _handles(looks: Looks):
  """The lines of a legend."""
  from matplotlib.lines import Line2D

  style = {'markersize': 4.5}
  return [
    Line2D([], [], color=look[0], marker=look[1], label=label, **style)
    for label, look in ((_wrapped(name, 40), looks[name]) for name in looks)
  ]


def _series(
  rows: Sequence[figures.MetricsRow], *keys: str
) -> list[list[float]]:
  """A column per key, over the rows that have finite numbers for all keys."""
  # metrics.jsonl holds null for a figure that was not finite.
  found = [[row.get(key) for key in keys] for row in rows]
  kept = [
    [float(value) for value in values]
    for values in found
    if None not in values and all(map(math.isfinite, values))
  ]
  columns = [list(column) for column in zip(*kept, strict=True)]
  return columns or [[] for _ in keys]


def _from_start(
  rows: Sequence[figures.MetricsRow], key: str, before: str
) -> list[list[float]]:
  """[iterations, values], with the value before RL at iteration 0."""
  steps, values = _series(rows, 'step', key)
  first = _series(rows, before)[0][:1]
  return [[0.0] * len(first) + steps, first + values]


def _curves(
  runs: Runs, read_fn: Callable[..., list[list[float]]], *keys: str
) -> dict[str, list[list[float]]]:
  """Name -> `_series` or `_from_start` of the runs that have a point."""
  found = {name: read_fn(rows, *keys) for name, rows in runs.items()}
  return {name: curve for name, curve in found.items() if curve[0]}


def _pooled(curves: Mapping[str, Sequence[Sequence[float]]], column: int):
  return [x for curve in curves.values() for x in curve[column]]


def _running_mean(values: win_rate.Numbers, window: int) -> list[float]:
  """Centred mean over `window` neighbours, fewer at the ends."""
  half = window // 2
  near = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
  return [sum(several) / len(several) for several in near]


def _window(num_values: int) -> int:
  return max(1, num_values // 8) | 1  # Odd, so that it is centred.


def _line(axis: Any, x: win_rate.Numbers, y: win_rate.Numbers, look) -> None:
  """Draws a line, with a marker at each point if there are few."""
  colour, marker = look
  axis.plot(
    x, y, color=colour, marker=marker if len(x) <= 20 else '', markersize=4
  )


def _smooth_line(axis: Any, x, y, look) -> None:
  """Draws a faint line and its running mean."""
  window = _window(len(y))
  if window > 1:
    axis.plot(x, y, color=look[0], alpha=0.25, linewidth=1)
  _line(axis, x, _running_mean(y, window), look)


def _reference_line(axis: Any, value: float, horizontal: bool = True) -> None:
  line = axis.axhline if horizontal else axis.axvline
  line(value, color=_INK, linestyle='--', linewidth=1)


def _steps_axis(axis: Any, steps: win_rate.Numbers, most: int = 5) -> None:
  """Sets integer ticks, and gives a single step some width."""
  from matplotlib.ticker import MaxNLocator

  axis.xaxis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))
  if steps and min(steps) == max(steps):
    axis.set_xlim(steps[0] - 0.5, steps[0] + 0.5)


def _values_axis(axis: Any, values: win_rate.Numbers, unit: str) -> None:
  """Labels a value axis with its unit and sets its range.

  Equal values get some height; the axis goes below 0 only if a value does.
  """
  axis.set_ylabel(_wrapped(unit, 30))
  low, high = min(values), max(values)
  if low == high:
    room = abs(low) / 10 or 0.5
    axis.set_ylim(low - room, high + room)
  if low >= 0 > axis.get_ylim()[0]:
    axis.set_ylim(bottom=0)


def _panel(axis: Any, title: str, unit: str, curves, draw_fn, looks) -> None:
  """Draws one line per run against its steps."""
  for name, curve in curves.items():
    draw_fn(axis, *curve, looks[name])
  _steps_axis(axis, _pooled(curves, 0))
  _values_axis(axis, _pooled(curves, 1), unit)
  axis.set_title(title)


def _decimals(bounds: Sequence[tuple[float, float]], most: int) -> int:
  """Decimals that give the median half-width of these intervals two digits."""
  halves = sorted((high - low) / 2 for low, high in bounds if high > low)
  if not halves:
    return most
  return min(most, max(0, 1 - math.floor(math.log10(halves[len(halves) // 2]))))


def _whiskers(values: Sequence[tuple[float, float, float]]) -> list:
  """Lengths below and above of (mean, low, high), for `errorbar`."""
  return [
    [max(0.0, mean - low) for mean, low, _ in values],
    [max(0.0, high - mean) for mean, _, high in values],
  ]


def _interval_rows(
  axis: Any,
  labels: Sequence[str],
  values: Sequence[tuple[float, float, float]],
  colours: Sequence[str],
  texts: Sequence[str],
) -> None:
  """Draws bars of (mean, low, high) with whiskers, the first on top.

  `texts` form a column right of the plot, where no line crosses them.
  """
  positions = range(len(values))
  means = [mean for mean, _, _ in values]
  axis.barh(positions, means, height=0.66, color=colours)
  axis.errorbar(
    means,
    positions,
    xerr=_whiskers(values),
    fmt='none',
    ecolor=_INK,
    elinewidth=1.3,
    capsize=3,
  )
  for position, text in zip(positions, texts, strict=True):
    axis.annotate(
      text,
      (1, position),
      xycoords=axis.get_yaxis_transform(),
      xytext=(6, 0),
      textcoords='offset points',
      va='center',
      fontsize=9,
      annotation_clip=False,
    )
  axis.set_yticks(positions, labels)
  axis.tick_params(axis='y', length=0)
  axis.set_ylim(len(values) - 0.4, -0.6)
  axis.grid(axis='y', visible=False)


def _shares_axis(axis: Any, title: str) -> None:
  axis.set_xlim(0, 1)
  axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ['0', '0.25', '0.5', '0.75', '1'])
  axis.set_xlabel(title)


def _with_bounds(value: tuple[float, float, float], decimals: int) -> str:
  mean, low, high = (f'{number:.{decimals}f}' for number in value)
  return f'{mean} [{low}, {high}]'


# --- The plots of a report ----------------------------------------------------


def _draw_win_rate(shown: figures.Figures) -> Any:
  rates = shown.outcomes.rates
  labels = [_wrapped(model, 24) for model in rates]
  figure, ((axis,),) = _canvas(1, 1, 0.7 + _height(labels, 0.38))
  values = [(rate.rate, rate.low, rate.high) for rate in rates.values()]
  decimals = _decimals([value[1:] for value in values], 3)
  looks = _of_models(shown)
  texts = [
    '0.5 by definition'
    if model == shown.baseline
    else _with_bounds(value, decimals)
    for model, value in zip(rates, values, strict=True)
  ]
  colours = [looks[model][0] for model in rates]
  _interval_rows(axis, labels, values, colours, texts)
  _reference_line(axis, 0.5, horizontal=False)
  name = _wrapped(shown.baseline, 40)
  _shares_axis(axis, 'share of prompts won, ties one half')
  prompts = [rate.num_prompts for rate in rates.values()]
  count = ' to '.join(
    f'{number:,}' for number in sorted({min(prompts), max(prompts)})
  )
  _heading(
    figure,
    f'Win rate against {name}',
    f'{count} prompts; whiskers and brackets: 95 % intervals, redrawing '
    f'prompts. Dashed: as good as {name}. Judge: {shown.judge}',
  )
  return figure


def _draw_metadata(shown: figures.Figures) -> Any:
  by_model = shown.labels()
  models = list(by_model)
  found = {}
  for name in figures.row_names(by_model):
    shares = {m: by_model[m][name] for m in models if name in by_model[m]}
    row = {
      model: tuple(100 * x for x in (share.mean, share.low, share.high))
      for model, share in shares.items()
      if math.isfinite(share.mean)
    }
    if row:
      found[name] = row
  if not found:
    return None
  labels = [_wrapped(model, 18, 2) for model in models]
  titles = [_title(name) for name in found]
  panel = 0.6 + _height(labels, 0.2)
  panel += 0.17 * max(title.count('\n') for title in titles)
  figure, axes, lowest = _grid(len(found), panel, 0.3, sharey=True)
  colours = [colour for colour, _ in _looks(models).values()]
  for axis, title, row in zip(axes, titles, found.values(), strict=True):
    decimals = _decimals([bounds[1:] for bounds in row.values()], 2)
    values = [row.get(model, (math.nan,) * 3) for model in models]
    texts = [
      f'{row[model][0]:.{decimals}f} %' if model in row else '–'
      for model in models
    ]
    _interval_rows(axis, labels, values, colours, texts)
    top = max(high for _, _, high in row.values())
    axis.set_xlim(0, min(1.05 * top, 100) if top > 0 else 1)
    axis.locator_params(axis='x', nbins=4)
    axis.set_title(title)
    if axis in lowest:
      axis.set_xlabel('% of answers')
  _heading(
    figure,
    'Labels of single answers',
    'Share of the answers that have the label, each panel on its own scale. '
    'Whiskers: 95 % intervals, redrawing prompts.',
  )
  return figure


def _draw_reward_kl(shown: figures.Figures) -> Any:
  curves = _curves(shown.rl_metrics, _series, 'objective/kl', 'objective/score')
  if not curves:
    return None
  looks = _of_models(shown)
  figure, ((axis,),) = _canvas(1, 1, 3.0)
  for model, (kl, score) in curves.items():
    colour, marker = looks[model]
    # Few dots must be visible, many must not hide the line.
    alpha = 0.3 if len(kl) > 30 else 0.9
    axis.scatter(
      kl, score, s=12, color=colour, marker=marker, alpha=alpha, linewidth=0
    )
    # In the order of the iterations: the run's path.
    smooth = (_running_mean(each, _window(len(kl))) for each in (kl, score))
    axis.plot(*smooth, color=colour)
  axis.set_ylabel('score\n(reward units)')
  axis.set_xlabel('KL from the RL initialisation (nats per response)')
  _heading(
    figure,
    'Reward against KL',
    'Dots: the batch of one iteration. Line: running mean, in the order of the '
    'iterations.',
    {model: looks[model] for model in curves},
  )
  return figure


def _draw_pretraining_loss(shown: figures.Figures) -> Any:
  curves = _curves(shown.rl_metrics, _from_start, *_LOSS)
  if not curves:
    return None
  looks = _of_models(shown)
  figure, ((axis,),) = _canvas(1, 1, 3.0)
  averaged = False
  for model, curve in curves.items():
    _line(axis, *curve, looks[model])
    steps, losses = _from_start(
      shown.rl_metrics[model], f'{_LOSS[0]}_ema', _LOSS[1]
    )
    averaged = averaged or len(steps) > 1
    axis.plot(steps, losses, color=looks[model][0], linestyle=':')
  note = 'The point at 0 is the RL initialisation, before the first iteration.'
  if shown.reference in shown.text_loss:
    _reference_line(axis, shown.text_loss[shown.reference].mean)
    note += f' Dashed: {shown.reference}.'
  if averaged:
    note += ' Dotted: averaged weights.'
  _steps_axis(axis, _pooled(curves, 0), 8)
  axis.set_xlabel('RL iteration')
  axis.set_ylabel('nats per token')
  _heading(
    figure,
    'The alignment tax: loss on held-out pretraining text',
    f'{note} Lower is better.',
    {model: looks[model] for model in curves},
  )
  return figure


def probe_names(runs: Runs) -> list[str]:
  """Names of the public tasks that any of the runs was asked during RL."""
  keys = {key for rows in runs.values() for row in rows for key in row}
  return sorted(
    key.removeprefix('probe/') for key in keys if key.startswith('probe/')
  )


def _draw_probes(shown: figures.Figures) -> Any:
  runs = shown.rl_metrics
  title = 'Public NLP tasks along RL'
  return _draw_along(runs, _probe_panels(runs), title, _of_models(shown))


def _probe_panels(runs):
  return {
    name: (f'probe/{name}', f'probe_before/{name}', _unit(name))
    for name in probe_names(runs)
  }


def _unit(title: str) -> str:
  """The unit for a probe's name or for a panel title of `tax`."""
  for ending, unit in _UNITS.items():
    if title.endswith(ending):
      return unit
  return 'nats per token' if 'loss' in title else 'score'


def _draw_along(runs, panels, title, looks) -> Any:
  """Draws metrics against iteration: a panel each, a line per run (Fig 35).

  `panels` is title -> (metric, metric before RL, unit).
  """
  found = {
    name: (unit, curves)
    for name, (key, before, unit) in panels.items()
    if (curves := _curves(runs, _from_start, key, before))
  }
  if not found:
    return None
  figure, axes, _ = _grid(len(found), 2.3, 0.1)

  def line(axis, steps, values, look):
    _line(axis, steps, values, look)
    if steps[0] == 0:
      _reference_line(axis, values[0])

  for axis, (name, panel) in zip(axes, found.items(), strict=True):
    _panel(axis, _title(name), *panel, line, looks)
    axis.set_xlabel('RL iteration')
  note = 'Point at 0 and dashed: before RL.'
  _heading(figure, title, note, {run: looks[run] for run in runs})
  return figure


def tax_along(runs: Runs) -> bytes | None:
  """Figure 35 from run -> rows of metrics.jsonl, as PNG; None without data."""
  score = ('objective/score', 'objective/score_before', 'reward units')
  panels = _probe_panels(runs) | {
    'pretraining loss': (*_LOSS, 'nats per token'),
    'reward-model score': score,
  }
  title = 'The alignment tax along RL'
  figure = _styled(_draw_along, runs, panels, title, _looks(list(runs)))
  return None if figure is None else _png(figure)


def tax_against(
  values: Sequence[float],
  figures: Mapping[str, Sequence[float | None]],
  before: Mapping[str, float],
  label: str,
) -> bytes:
  """Figures 33 and 34: final figures of runs against one of their settings.

  Args:
    values: the setting of each run, say gamma; the scale has room for 0.
    figures: panel title -> the figure of each run, None if not measured.
    before: panel title -> the figure before RL, if it was measured.
    label: of the x axis.
  """
  return _png(_styled(_draw_against, values, figures, before, label))


def _spaced(axis: Any, values: Sequence[float]) -> list[float]:
  """Those of the ascending x values whose tick labels have room."""
  places = [axis.transScale.transform((x, 0))[0] for x in values]
  room = 0.24 * (places[-1] - places[0])
  kept = [0]
  for i, place in enumerate(places):
    if place - places[kept[-1]] > room:
      kept.append(i)
  return [values[i] for i in kept]


def _draw_against(values, figures, before, label):
  from matplotlib.ticker import NullLocator

  found = {}
  for name, numbers in figures.items():
    pairs = zip(values, numbers, strict=True)
    points = sorted((x, y) for x, y in pairs if y is not None)
    if points:
      found[name] = points
  figure, axes, _ = _grid(len(found), 2.4, 0.1)
  (look,) = _looks(['run']).values()
  for axis, (name, points) in zip(axes, found.items(), strict=True):
    # Set before drawing, because margins are computed in the current scale.
    positive = [x for x in values if x > 0]
    if len(positive) == len(values):
      axis.set_xscale('log')
    elif positive:
      axis.set_xscale('symlog', linthresh=min(positive))
    _line(axis, *zip(*points, strict=True), look)
    heights = [y for _, y in points]
    if name in before:
      _reference_line(axis, before[name])
      heights.append(before[name])
    ticks = _spaced(axis, sorted(set(values)))
    axis.set_xticks(ticks, [f'{x:.3g}' for x in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    _values_axis(axis, heights, _unit(name))
    axis.set_title(_title(name))
    axis.set_xlabel(_wrapped(label, 26))
  _heading(
    figure,
    f'The alignment tax against {label}',
    'One run a point, at its end; dashed: before RL. One run has no interval.',
  )
  return figure


def _measured(runs: Runs, panels, step: str) -> list[tuple]:
  """(title, unit, curves) of the panels that have data."""
  return [
    (title, unit, curves)
    for title, key, unit in panels
    if (curves := _curves(runs, _series, step, key))
  ]


def _draw_rl(shown: figures.Figures) -> Any:
  panels = _measured(shown.rl_metrics, _RL_PANELS, 'step')
  if not panels:
    return None
  looks = _of_models(shown)
  figure, axes, lowest = _grid(len(panels), 2.1, 0.2)
  for axis, panel in zip(axes, panels, strict=True):
    _panel(axis, *panel, _smooth_line, looks)
    if axis in lowest:
      axis.set_xlabel('RL iteration')
  models = dict.fromkeys(model for *_, curves in panels for model in curves)
  _heading(
    figure,
    'Along RL',
    'Faint: each iteration; line: running mean.',
    {model: looks[model] for model in models},
  )
  return figure


def _draw_reward_model(shown: figures.Figures) -> Any:
  reward = shown.reward_model
  if reward is None:
    return None
  panels = _measured({'': reward.curve}, _REWARD_PANELS, 'step')
  found = reward.rows()
  labels = [_wrapped(name, 26) for name, _ in found]
  # The bars, and below them the panels, each with its own margins.
  heights = [0.5 + _height(labels, 0.4), 2.1][: 1 + bool(panels)]
  figure = _figure(sum(heights))
  parts = figure.subfigures(len(heights), 1, height_ratios=heights)
  parts = parts if panels else [parts]
  axis = parts[0].subplots()
  values, texts, runs = [], [], set()
  for _, value in found:
    if isinstance(value, preference_accuracy.Spread):
      error = value.error or 0.0
      values.append((value.mean, value.mean - error, value.mean + error))
      texts.append(f'{value.mean:.3f}' + (f' ± {error:.3f}' if error else ''))
      runs.add(value.num_runs)
    else:
      mean = getattr(value, 'accuracy', getattr(value, 'rate', None))
      values.append((mean, value.low, value.high))
      texts.append(_with_bounds(values[-1], 3))
  colours = [
    '#56B4E9' if name.startswith('agreement') else '#0072B2'
    for name, _ in found
  ]
  _interval_rows(axis, labels, values, colours, texts)
  axis.axvline(0.5, color=_INK, linestyle=':', linewidth=1)
  note = 'Brackets and whiskers: 95 % intervals, redrawing prompts'
  if runs:
    note += f'; ±: standard error over {max(runs)} runs of cross-validation'
  note += '. Dotted: chance.'
  if reward.ceiling is not None:
    _reference_line(axis, reward.ceiling, horizontal=False)
    note += (
      f' Dashed: {reward.ceiling:.3f}, the most that label noise allows, '
      'reached by the judge.'
    )
  _shares_axis(axis, 'share of pairs ordered alike')
  if panels:
    lower = parts[1].subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(lower, panels, strict=True):
      _panel(axis, *panel, _smooth_line, {'': ('#0072B2', 'o')})
      axis.set_xlabel('step')
  _heading(figure, 'Reward model and labelers', note)
  return figure


def _draw_sft(shown: figures.Figures) -> Any:
  rows = {model: epochs.rows for model, epochs in shown.epochs.items()}
  panels = _measured(rows, _SFT_PANELS, 'epoch')
  if not panels:
    return None
  figure, axes = _canvas(len(panels), 1, 0.3 + 2.0 * len(panels), sharex=True)
  looks, has_star = _of_models(shown), False
  for axis, (title, unit, curves) in zip(axes[:, 0], panels, strict=True):
    axis.margins(y=0.15)  # Room for the star.
    _panel(axis, title, unit, curves, _line, looks)
    _steps_axis(axis, _pooled(curves, 0), 10)
    for model, (epochs, values) in curves.items():
      selected = shown.epochs[model].selected
      if selected in epochs:
        has_star = True
        value = values[epochs.index(selected)]
        axis.plot(selected, value, '*', markersize=14, color=looks[model][0])
  axes[-1, 0].set_xlabel('epoch')
  _heading(
    figure,
    'Supervised fine-tuning by epoch',
    'Star: the epoch that was selected.' if has_star else '',
    {model: looks[model] for model in shown.epochs},
  )
  return figure


# --- Best of n ----------------------------------------------------------------


def frontier(
  points: Mapping[str, Sequence[Mapping[str, Any]]],
  fits: Mapping[str, overoptimization.Fit],
  judge: str,
) -> bytes:
  """Scores gained against √KL by best-of-n and RL, with fitted curves, as PNG.

  `points` maps each curve to rows with the intervals 'kl', 'proxy' and 'gold'.
  `fits` are fits to 'gold', the scores by `judge`.
  """
  return _png(_styled(_draw_frontier, points, fits, judge))


def _draw_frontier(points, fits, judge):
  import numpy as np

  looks = _looks(list(points))
  figure, axes = _canvas(2, 1, 6.0, sharex=True)
  panels = (
    ('gold', 'By the judge', 'score gained'),
    ('proxy', 'By the reward model', 'score gained\n(reward units)'),
  )
  for axis, (key, title, label) in zip(axes[:, 0], panels, strict=True):
    for name, rows in points.items():
      x = [math.sqrt(max(row['kl'].mean, 0.0)) for row in rows]
      y = [(row[key].mean, row[key].low, row[key].high) for row in rows]
      colour, marker = looks[name]
      axis.errorbar(
        x,
        [mean for mean, _, _ in y],
        yerr=_whiskers(y),
        fmt=marker,
        markersize=4.5,
        capsize=2,
        elinewidth=1,
        color=colour,
      )
      if key == 'gold' and name in fits and max(x) > 0:
        fit = fits[name]
        d = np.linspace(max(x) / 200, max(x), 200)
        fitted = overoptimization.curve(
          fit.kind, fit.alpha.mean, fit.beta.mean, d**2
        )
        axis.plot(d, fitted, color=colour)
    axis.axhline(0, color=_INK, linestyle=':', linewidth=1)
    axis.set_ylabel(label)
    axis.set_title(title)
  axes[-1, 0].set_xlabel('√KL from the initial policy (√nats)')
  _heading(
    figure,
    'Best of n and RL: what KL buys',
    'Whiskers: 95 % intervals, redrawing prompts. Lines: fitted curves (Gao et '
    f'al. 2022). Dotted: the initial policy. Judge: {judge}',
    looks,
  )
  return figure


def over_seeds(panels: Sequence[Mapping[str, Any]], title: str) -> bytes:
  """Figures of several seeds, as PNG.

  Args:
    panels: each has the axis labels `x` and `y`; `points`, for each seed series
      -> (x, y), where x is a number or a name; and `kind`. 'values' have the
      same x on every seed. 'curves' run along KL and are interpolated; their
      mean covers the range that all seeds share. 'pairs' are x and y of the
      same things on every seed.
    title: of the figure.
  """
  return _png(_styled(_draw_over_seeds, panels, title))


def _draw_over_seeds(panels, title):
  names = dict.fromkeys(name for p in panels for name in p['points'][0])
  looks = _looks([name for name in names if name])
  unnamed = {'': (_INK, _MARKERS[0])}  # The only series of its panel.
  figure, axes, _ = _grid(len(panels), 2.9, 0.1)
  for axis, panel in zip(axes, panels, strict=True):
    _draw_panel(axis, panel, looks | unnamed, len(axes))
  _heading(
    figure,
    title,
    'Dots: single seeds. Marks with whiskers, lines with bands: mean and '
    "Student's 95 % interval over seeds.",
    looks or None,
  )
  return figure


def _draw_panel(axis, panel, looks, num_panels):
  points = panel['points']
  names = [name for name in points[0] if all(name in seed for seed in points)]
  xs = [x for seed in points for name in names for x, _ in seed[name]]
  room = 56 if num_panels == 1 else 26  # Characters per line.
  if all(isinstance(x, str) for x in xs):
    places = {x: i for i, x in enumerate(dict.fromkeys(xs))}
    width = room // len(places)
    axis.set_xticks(
      list(places.values()),
      [_wrapped(_title(x), max(8, width)) for x in places],
    )
    axis.set_xlim(-0.5, len(places) - 0.5)
  else:
    places = {x: x for x in xs}
    if panel['kind'] == 'values':
      _scale_axis(axis, sorted(set(xs)), room // 2)
  draw = {
    'values': functools.partial(
      _draw_values, joined=not isinstance(xs[0], str)
    ),
    'curves': _draw_curves,
    'pairs': _draw_pairs,
  }[panel['kind']]
  heights = []
  for name in names:
    series = [
      [(places[x], math.nan if y is None else y) for x, y in seed[name]]
      for seed in points
    ]
    for seed in series:
      axis.plot(*zip(*seed, strict=True), **_DOT, color=looks[name][0])
    draw(axis, series, looks[name])
    heights += [y for seed in series for _, y in seed if math.isfinite(y)]
  _values_axis(axis, heights or [0.0], panel['y'])
  axis.set_xlabel(_wrapped(panel['x'], room))


_DOT = {'marker': 'o', 'linestyle': '', 'alpha': 0.35, 'markersize': 3}
_WHISKER = {'markersize': 5, 'capsize': 2, 'elinewidth': 1}


def _mean(values: Sequence[float]) -> win_rate.Interval | None:
  """Mean and interval of the finite values, or None."""
  found = [x for x in values if math.isfinite(x)]
  return win_rate.student_interval(found) if found else None


def _error(interval: win_rate.Interval) -> tuple[float, float]:
  """Lengths of the whiskers; 0 for a single seed."""
  if not math.isfinite(interval.high):
    return 0.0, 0.0
  return interval.mean - interval.low, interval.high - interval.mean


def _scale_axis(axis: Any, values: Sequence[float], room: int) -> None:
  """Makes the x axis logarithmic if values span several magnitudes.

  The axis has room for 0 and a tick for each value. Labels are rotated if they
  have more than `room` characters together.
  """
  from matplotlib.ticker import NullFormatter

  positive = [x for x in values if x > 0]
  if values[0] < 0 or not positive or max(positive) < 20 * min(positive):
    return
  if len(positive) == len(values):
    axis.set_xscale('log')
  else:
    axis.set_xscale('symlog', linthresh=min(positive))
  labels = [f'{x:,g}' for x in values]
  axis.set_xticks(values, labels, rotation=45 * (len(''.join(labels)) > room))
  axis.xaxis.set_minor_formatter(NullFormatter())


def _draw_values(axis, series, look, joined: bool) -> None:
  """Draws the mean with whiskers at each x, over the seeds that have it."""
  colour, marker = look
  at = collections.defaultdict(list)
  for seed in series:
    for x, y in seed:
      at[x].append(y)
  found = [(x, mean) for x, ys in sorted(at.items()) if (mean := _mean(ys))]
  if found:
    xs, means = zip(*found, strict=True)
    axis.errorbar(
      xs,
      [mean.mean for mean in means],
      yerr=np.array([_error(mean) for mean in means]).T,
      fmt=f'{marker}-' if joined else marker,
      color=colour,
      **_WHISKER,
    )


def _draw_curves(axis, series, look) -> None:
  """Draws the mean curve and its band, interpolated linearly in √x."""
  colour, _ = look
  curves = []
  for seed in series:
    points = sorted((math.sqrt(max(0.0, x)), y) for x, y in seed)
    curves.append(np.array([p for p in points if math.isfinite(p[1])]).T)
  curves = [curve for curve in curves if curve.size]
  if not curves:
    return
  grid = np.linspace(
    max(curve[0].min() for curve in curves),
    min(curve[0].max() for curve in curves),
    41,
  )
  if grid[0] >= grid[-1]:
    return
  columns = np.array([np.interp(grid, *curve) for curve in curves]).T
  means = [win_rate.student_interval(column) for column in columns]
  axis.plot(grid**2, [mean.mean for mean in means], color=colour)
  if len(curves) > 1:
    axis.fill_between(
      grid**2,
      [mean.low for mean in means],
      [mean.high for mean in means],
      color=colour,
      alpha=0.15,
      linewidth=0,
    )


def _draw_pairs(axis, series, look) -> None:
  """Draws the mean over seeds of each pair, with whiskers in x and y."""
  colour, marker = look
  for pairs in zip(*series, strict=True):
    x, y = (_mean(values) for values in zip(*pairs, strict=True))
    if x and y:
      axis.errorbar(
        x.mean,
        y.mean,
        xerr=np.array([_error(x)]).T,
        yerr=np.array([_error(y)]).T,
        fmt=marker,
        color=colour,
        **_WHISKER,
      )


# --- Benchmarks of reward models ----------------------------------------------


def reward_bench(
  panels: Mapping[str, Mapping[str, Mapping[str, win_rate.Interval]]],
  chances: Mapping[str, float],
) -> bytes:
  """Accuracies of scorers, as PNG: a panel per test set, a row per subset.

  Args:
    panels: test set -> subset -> scorer -> its accuracy.
    chances: test set -> accuracy of random guessing.
  """
  return _png(_styled(_draw_reward_bench, panels, chances))


def _draw_reward_bench(panels, chances):
  scorers = dict.fromkeys(
    name for rows in panels.values() for row in rows.values() for name in row
  )
  looks = _looks(list(scorers))
  # Inches per row, which has a line of points per scorer.
  row_height = max(0.2, 0.05 + 0.075 * len(scorers))
  heights = [0.5 + row_height * len(rows) for rows in panels.values()]
  figure, axes = _canvas(
    len(panels), 1, sum(heights) + 0.3, height_ratios=heights, sharex=True
  )
  step = 0.7 / len(scorers)
  for axis, (title, rows) in zip(axes[:, 0], panels.items(), strict=True):
    for number, name in enumerate(scorers):
      found = [
        (place + step * (number - (len(scorers) - 1) / 2), row[name])
        for place, row in enumerate(rows.values())
        if name in row
      ]
      values = [(x.mean, x.low, x.high) for _, x in found]
      colour, marker = looks[name]
      axis.errorbar(
        [mean for mean, _, _ in values],
        [place for place, _ in found],
        xerr=_whiskers(values),
        fmt=marker,
        markersize=4,
        elinewidth=1,
        color=colour,
      )
    _reference_line(axis, chances[title], horizontal=False)
    axis.set_yticks(range(len(rows)), [_wrapped(row, 30) for row in rows])
    axis.tick_params(axis='y', length=0)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_title(_wrapped(title, 60))
  _shares_axis(axes[-1, 0], 'accuracy')
  _heading(
    figure,
    'Reward models on test sets',
    'Whiskers: 95 % intervals, redrawing prompts. Dashed: chance.',
    looks,
  )
  return figure
