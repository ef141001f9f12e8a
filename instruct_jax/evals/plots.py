"""The plots of a report, as PNG bytes. What each shows: see report.py.

All are as wide as a phone can show with a text that can be read; what is
compared stands in rows, so that names may be long and many. Each says in its
heading what is shown and under the plot what its bars and lines mean.

Matplotlib is loaded only here, when a plot is drawn, and draws into memory:
without a display and without the global state of pyplot.
"""

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from instruct_jax.evals import (
  figures,
  overoptimization,
  preference_accuracy,
  win_rate,
)

# Of models, or of runs, in their order: Okabe and Ito's palette, distinct under
# all common colour blindnesses; the last four are Tol's.
_COLOURS = (
  '#0072B2',
  '#D55E00',
  '#009E73',
  '#CC79A7',
  '#E69F00',
  '#56B4E9',
  '#332288',
  '#882255',
  '#999933',
  '#44AA99',
)
# A second sign beside the colour.
_MARKERS = 'osD^vP<>X*'
_INK, _SOFT = '#222222', '#555555'
# Inches, and pixels an inch: html_report shows 100 of these an inch.
_WIDTH, DPI = 5.6, 160
# Characters of a line across the whole width, in a heading and in a note.
_HEADING_CHARACTERS, _NOTE_CHARACTERS = 54, 84
# Panels along RL: metric of metrics.jsonl, title, unit.
_RL_PANELS = (
  ('objective/score', 'Score', 'reward units'),
  ('objective/kl', 'KL from the RL initialisation', 'nats per response'),
  ('ppo/policy/entropy', 'Entropy of the policy', 'nats per token'),
  ('objective/length', 'Response length', 'tokens'),
  ('objective/ended', 'Ended by the policy', 'share of responses'),
  ('ppo/policy/clipfrac', 'Clipped policy ratios', 'share of tokens'),
)
_LOSS = ('eval/pretraining_loss', 'eval/pretraining_loss_before')
# Metric, as a probe's key ends with it -> unit of its axis.
_UNITS = {
  'F1': 'F1 (0 to 100)',
  'BLEU': 'BLEU (0 to 100)',
  'ROUGE-L': 'ROUGE-L (0 to 1)',
  'accuracy': 'share right',
  'P@1': 'share right',
  'entropy': 'entropy (bits)',
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
  return {name: _png(drawn) for name, drawn in draw(shown).items()}


def draw(shown: figures.Figures) -> dict[str, Any]:
  """File name -> matplotlib Figure, for every plot that has data."""
  import matplotlib

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
  with matplotlib.rc_context(_STYLE):
    drawn = {name: maker(shown) for name, maker in makers.items()}
  return {name: figure for name, figure in drawn.items() if figure is not None}


# --- One visual language ------------------------------------------------------


def _canvas(rows: int, columns: int, height: float, **options: Any):
  """A figure of this height in inches, and its axes [rows, columns]."""
  from matplotlib.backends import backend_agg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(_WIDTH, height), layout='constrained')
  figure.get_layout_engine().set(h_pad=0.06, w_pad=0.06)
  backend_agg.FigureCanvasAgg(figure)
  return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _grid(number: int, panel: float, margin: float, **options: Any):
  """A figure of panels, two in a row.

  Args:
    number: of panels.
    panel: height of each, in inches.
    margin: height of what is above and below them.
    **options: of `subplots`.

  Returns:
    The figure, its axes in order, and those without a panel below.
  """
  columns = min(2, number)
  rows = -(-number // columns)
  figure, axes = _canvas(rows, columns, margin + rows * panel, **options)
  axes = list(axes.flat)
  for axis in axes[number:]:
    axis.set_axis_off()
  return figure, axes[:number], axes[number - columns : number]


def _upper_and_lower(top: float, bottom: float, num_lower: int):
  """A figure with an axis, and below it `num_lower` of their own margins."""
  from matplotlib.backends import backend_agg
  from matplotlib.figure import Figure

  heights = [top, bottom] if num_lower else [top]
  figure = Figure(figsize=(_WIDTH, sum(heights)), layout='constrained')
  backend_agg.FigureCanvasAgg(figure)
  parts = figure.subfigures(len(heights), 1, height_ratios=heights)
  if not num_lower:
    return figure, parts.subplots(), ()
  lower = parts[1].subplots(1, num_lower, squeeze=False)
  return figure, parts[0].subplots(), list(lower[0])


def _png(figure: Any) -> bytes:
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=DPI)
  return buffer.getvalue()


def _plain(text: str) -> str:
  """Text that matplotlib does not take for mathematics."""
  return text.replace('$', r'\$')


def _wrapped(text: str, width: int, max_lines: int = 3) -> str:
  """Plain text on lines of so many characters, the rest left out with '…'."""
  text = text.replace(' %', '\u00a0%')
  return _plain(
    textwrap.fill(text, width, max_lines=max_lines, placeholder=' …')
  )


def _height(labels: Sequence[str], least: float) -> float:
  """Inches of rows with these labels, each as high as the highest needs."""
  lines = max(label.count('\n') + 1 for label in labels)
  return len(labels) * max(least, 0.17 * lines + 0.06)


def _heading(
  figure: Any, title: str, note: str = '', legend: Sequence[Any] = ()
) -> None:
  """What is shown, which line is whose, and below what bars and lines mean.

  Args:
    figure: of `_canvas`; it grows by what is written here.
    title: of the whole.
    note: below the plots.
    legend: handles with labels, between title and plots.
  """
  title = _wrapped(title, _HEADING_CHARACTERS)
  inches = 0.22 * (title.count('\n') + 1)
  style = {'size': 12, 'weight': 'bold'}
  if legend:
    labels = [handle.get_label() for handle in legend]
    longest = max(len(line) for label in labels for line in label.split('\n'))
    # A character is half as wide as the type is high, a handle seven of them.
    columns = max(1, int(_WIDTH * 72 / (9.5 * 0.56 * (longest + 7))))
    columns = min(columns, len(legend))
    inches += 0.05 + _height(labels, 0.2) / columns
    figure.legend(
      handles=legend,
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
    figure.supxlabel(note, x=0.012, ha='left', fontsize=8, color=_SOFT)
  figure.set_figheight(figure.get_figheight() + inches)


def _looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
  """Name -> (colour, marker); where colours come again, other marks do."""
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


def _handles(looks: Mapping[str, tuple[str, str]]):
  """A legend's lines."""
  from matplotlib.lines import Line2D

  return [
    Line2D(
      [],
      [],
      color=colour,
      marker=marker,
      markersize=4.5,
      label=_wrapped(name, 40),
    )
    for name, (colour, marker) in looks.items()
  ]


def _is_number(row: Mapping[str, Any], key: str) -> bool:
  # metrics.jsonl holds null where a figure was not finite.
  return key in row and row[key] is not None and math.isfinite(row[key])


def _series(
  rows: Sequence[figures.MetricsRow], *keys: str
) -> list[list[float]]:
  """Columns of the rows that have all keys, with finite numbers."""
  kept = [
    [float(row[key]) for key in keys]
    for row in rows
    if all(_is_number(row, key) for key in keys)
  ]
  columns = [list(column) for column in zip(*kept, strict=True)]
  return columns or [[] for _ in keys]


def _from_start(
  rows: Sequence[figures.MetricsRow], key: str, before: str
) -> list[list[float]]:
  """[iterations, figures], with what was measured before RL at 0."""
  steps, values = _series(rows, 'step', key)
  first = _series(rows, before)[0][:1]
  return [[0.0] * len(first) + steps, first + values]


def _curves(
  runs: Mapping[str, Sequence[figures.MetricsRow]],
  read_fn: Callable[..., list[list[float]]],
  *keys: str,
) -> dict[str, list[list[float]]]:
  """Name -> what `_series` or `_from_start` reads, where it has a point."""
  found = {name: read_fn(rows, *keys) for name, rows in runs.items()}
  return {name: curve for name, curve in found.items() if curve[0]}


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


def _line(axis: Any, x: win_rate.Numbers, y: win_rate.Numbers, look) -> None:
  """A line; with a mark at each point while they are few."""
  colour, marker = look
  axis.plot(
    x, y, color=colour, marker=marker if len(x) <= 20 else '', markersize=4
  )


def _smooth_line(axis: Any, x, y, look) -> None:
  """A faint line, and its running mean."""
  window = _window(len(y))
  if window > 1:
    axis.plot(x, y, color=look[0], alpha=0.25, linewidth=1)
  _line(axis, x, _running_mean(y, window), look)


def _reference_line(axis: Any, value: float, horizontal: bool = True) -> None:
  line = axis.axhline if horizontal else axis.axvline
  line(value, color=_INK, linestyle='--', linewidth=1)


def _steps_axis(axis: Any, steps: win_rate.Numbers, most: int = 5) -> None:
  """Whole numbers under the axis, and some width for a single one."""
  from matplotlib.ticker import MaxNLocator

  axis.xaxis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))
  if steps and min(steps) == max(steps):
    axis.set_xlim(steps[0] - 0.5, steps[0] + 0.5)


def _values_axis(axis: Any, values: win_rate.Numbers, unit: str) -> None:
  """The unit, some height for equal figures, no room for what cannot be."""
  axis.set_ylabel(_wrapped(unit, 30))
  if not len(values):
    return
  low, high = min(values), max(values)
  if low == high:
    room = abs(low) / 10 or 0.5
    axis.set_ylim(low - room, high + room)
  if low >= 0 > axis.get_ylim()[0]:
    axis.set_ylim(bottom=0)


def _decimals(bounds: Sequence[tuple[float, float]], most: int) -> int:
  """Decimals at which the narrower half of these intervals has two digits."""
  halves = sorted((high - low) / 2 for low, high in bounds if high > low)
  if not halves:
    return most
  return min(most, max(0, 1 - math.floor(math.log10(halves[len(halves) // 2]))))


def _interval_rows(
  axis: Any,
  labels: Sequence[str],
  values: Sequence[tuple[float, float, float]],
  colours: Sequence[str],
  texts: Sequence[str],
) -> None:
  """Bars with their intervals as whiskers, and beside them the numbers.

  Args:
    axis: where.
    labels: of the rows, the first on top.
    values: (mean, low, high) of each.
    colours: of the bars.
    texts: written in a column right of the plot, where no line crosses them.
  """
  positions = range(len(values))
  means = [mean for mean, _, _ in values]
  axis.barh(positions, means, height=0.66, color=colours)
  axis.errorbar(
    means,
    positions,
    xerr=[
      [max(0.0, mean - low) for mean, low, _ in values],
      [max(0.0, high - mean) for mean, _, high in values],
    ],
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
  _interval_rows(
    axis,
    labels,
    values,
    [looks[model][0] for model in rates],
    [
      '0.5 by definition'
      if model == shown.baseline
      else _with_bounds(value, decimals)
      for model, value in zip(rates, values, strict=True)
    ],
  )
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
  names, models = figures.row_names(by_model), list(by_model)
  found = {}
  for name in names:
    row = {}
    for model in models:
      share = by_model[model].get(name)
      if share is not None and math.isfinite(share.mean):
        row[model] = tuple(100 * x for x in (share.mean, share.low, share.high))
    if row:
      found[name] = row
  if not found:
    return None
  labels = [_wrapped(model, 18, 2) for model in models]
  titles = [_wrapped(name.replace('_', ' '), 30) for name in found]
  panel = 0.6 + _height(labels, 0.2)
  panel += 0.17 * max(title.count('\n') for title in titles)
  figure, axes, lowest = _grid(len(found), panel, 0.3, sharey=True)
  looks = _looks(models)
  for axis, title, row in zip(axes, titles, found.values(), strict=True):
    nothing = (math.nan,) * 3
    decimals = _decimals([bounds[1:] for bounds in row.values()], 2)
    _interval_rows(
      axis,
      labels,
      [row.get(model, nothing) for model in models],
      [looks[model][0] for model in models],
      [
        f'{row[model][0]:.{decimals}f} %' if model in row else '–'
        for model in models
      ],
    )
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
    window = _window(len(kl))
    # Few dots must be seen, many must not hide the line.
    axis.scatter(
      kl,
      score,
      s=12,
      color=looks[model][0],
      marker=looks[model][1],
      alpha=0.3 if len(kl) > 30 else 0.9,
      linewidth=0,
    )
    # In the order of the iterations: the path that the run took.
    axis.plot(
      _running_mean(kl, window),
      _running_mean(score, window),
      color=looks[model][0],
    )
  axis.set_ylabel('score\n(reward units)')
  axis.set_xlabel('KL from the RL initialisation (nats per response)')
  _heading(
    figure,
    'Reward against KL',
    'One dot an iteration, of its batch alone; line: running mean, in the '
    'order of the iterations.',
    _handles({model: looks[model] for model in curves}),
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
  _steps_axis(axis, [step for curve in curves.values() for step in curve[0]], 8)
  axis.set_xlabel('RL iteration')
  axis.set_ylabel('nats per token')
  _heading(
    figure,
    'The alignment tax: loss on held-out pretraining text',
    f'{note} Lower is better.',
    _handles({model: looks[model] for model in curves}),
  )
  return figure


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


def _draw_probes(shown: figures.Figures) -> Any:
  runs = shown.rl_metrics
  return _draw_along(
    runs, _probe_panels(runs), 'Public NLP tasks along RL', _of_models(shown)
  )


def _probe_panels(runs):
  return {
    name: (f'probe/{name}', f'probe_before/{name}', _unit(name))
    for name in probe_names(runs)
  }


def _unit(title: str) -> str:
  """Of a probe's name or of a title that `tax` gives."""
  for metric, unit in _UNITS.items():
    if title.endswith(metric):
      return unit
  if title.endswith('score'):
    return 'reward units'
  return 'nats per token' if 'loss' in title else 'score'


def _draw_along(runs, panels, title, looks) -> Any:
  """Figures against iteration, one panel each, a line a run (Fig 35).

  Args:
    runs: name -> rows of metrics.jsonl.
    panels: title -> (metric, metric before RL, unit).
    title: of the whole.
    looks: of the runs.
  """
  found = {}
  for name, (key, before, unit) in panels.items():
    curves = _curves(runs, _from_start, key, before)
    if curves:
      found[name] = curves, unit
  if not found:
    return None
  figure, axes, _ = _grid(len(found), 2.3, 0.1)
  for axis, (name, (curves, unit)) in zip(axes, found.items(), strict=True):
    for run, curve in curves.items():
      _line(axis, *curve, looks[run])
      if curve[0][0] == 0:
        _reference_line(axis, curve[1][0])
    _steps_axis(axis, [x for curve in curves.values() for x in curve[0]])
    _values_axis(axis, [y for curve in curves.values() for y in curve[1]], unit)
    axis.set_title(_wrapped(name.replace('_', ' '), 30))
    axis.set_xlabel('RL iteration')
  _heading(
    figure,
    title,
    'Point at 0 and dashed: before RL.',
    _handles({run: looks[run] for run in runs}),
  )
  return figure


def tax_along(
  runs: Mapping[str, Sequence[Mapping[str, Any]]],
) -> bytes | None:
  """Figure 35 for any runs: name -> rows of metrics.jsonl; None without data.

  The dashed line is the model that RL started from.
  """
  import matplotlib

  panels = _probe_panels(runs) | {
    'pretraining loss': (*_LOSS, 'nats per token'),
    'reward-model score': (
      'objective/score',
      'objective/score_before',
      'reward units',
    ),
  }
  with matplotlib.rc_context(_STYLE):
    figure = _draw_along(
      runs, panels, 'The alignment tax along RL', _looks(list(runs))
    )
    return None if figure is None else _png(figure)


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
    return _png(_draw_against(values, figures, before, label))


def _apart(axis: Any, values: Sequence[float]) -> list[float]:
  """Of ascending values on the x axis those whose labels have room."""
  places = [axis.transScale.transform((x, 0))[0] for x in values]
  room = 0.24 * (places[-1] - places[0])
  kept = [0]
  for i, place in enumerate(places):
    if place - places[kept[-1]] > room:
      kept.append(i)
  return [values[i] for i in kept]


def _draw_against(values, figures, before, label):
  from matplotlib.ticker import NullLocator

  found = {
    name: sorted(
      (x, y) for x, y in zip(values, numbers, strict=True) if y is not None
    )
    for name, numbers in figures.items()
  }
  found = {name: points for name, points in found.items() if points}
  figure, axes, _ = _grid(len(found), 2.4, 0.1)
  look = _looks(['run'])['run']
  for axis, (name, points) in zip(axes, found.items(), strict=True):
    # Before anything is drawn: margins are those of the scale at that time.
    positive = [x for x in values if x > 0]
    if len(positive) == len(values):
      axis.set_xscale('log')
    elif positive:
      axis.set_xscale('symlog', linthresh=min(positive))
    _line(axis, *zip(*points, strict=True), look)
    shown = [y for _, y in points]
    if name in before:
      _reference_line(axis, before[name])
      shown.append(before[name])
    ticks = _apart(axis, sorted(set(values)))
    axis.set_xticks(ticks, [f'{x:.3g}' for x in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    _values_axis(axis, shown, _unit(name))
    axis.set_title(_wrapped(name.replace('_', ' '), 30))
    axis.set_xlabel(_wrapped(label, 26))
  _heading(
    figure,
    f'The alignment tax against {label}',
    'One run a point, at its end; dashed: before RL. One run has no interval.',
  )
  return figure


def _draw_rl(shown: figures.Figures) -> Any:
  panels = []
  for key, title, unit in _RL_PANELS:
    curves = _curves(shown.rl_metrics, _series, 'step', key)
    if curves:
      panels.append((title, unit, curves))
  if not panels:
    return None
  looks = _of_models(shown)
  models = dict.fromkeys(model for _, _, curves in panels for model in curves)
  figure, axes, lowest = _grid(len(panels), 2.1, 0.2)
  for axis, (title, unit, curves) in zip(axes, panels, strict=True):
    for model, curve in curves.items():
      _smooth_line(axis, *curve, looks[model])
    _steps_axis(axis, [step for curve in curves.values() for step in curve[0]])
    _values_axis(axis, [y for curve in curves.values() for y in curve[1]], unit)
    axis.set_title(title)
    if axis in lowest:
      axis.set_xlabel('RL iteration')
  _heading(
    figure,
    'Along RL',
    'Faint: each iteration; line: running mean.',
    _handles({model: looks[model] for model in models}),
  )
  return figure


def _draw_reward_model(shown: figures.Figures) -> Any:
  reward = shown.reward_model
  if reward is None:
    return None
  curves = [
    ('Training loss', 'nats per pair', 'reward/loss'),
    ('Training accuracy', 'share of pairs', 'reward/accuracy'),
  ]
  curves = [
    (title, unit, _series(reward.curve, 'step', key))
    for title, unit, key in curves
  ]
  curves = [curve for curve in curves if curve[2][0]]
  found = reward.rows()
  labels = [_wrapped(name, 26) for name, _ in found]
  top = 0.5 + _height(labels, 0.4)
  figure, axis, lower = _upper_and_lower(top, 2.1, len(curves))
  values, texts, runs = [], [], set()
  for _, value in found:
    if isinstance(value, preference_accuracy.Spread):
      error = 0.0 if value.error is None else value.error
      values.append((value.mean, value.mean - error, value.mean + error))
      runs.add(value.num_runs)
      texts.append(
        f'{value.mean:.3f}' + (f' ± {error:.3f}' if value.error else '')
      )
    else:
      mean = getattr(value, 'accuracy', getattr(value, 'rate', None))
      values.append((mean, value.low, value.high))
      texts.append(_with_bounds(values[-1], 3))
  _interval_rows(
    axis,
    labels,
    values,
    [
      '#56B4E9' if name.startswith('agreement') else '#0072B2'
      for name, _ in found
    ],
    texts,
  )
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
  for axis, (title, unit, (steps, numbers)) in zip(lower, curves, strict=True):
    _smooth_line(axis, steps, numbers, ('#0072B2', 'o'))
    _steps_axis(axis, steps)
    _values_axis(axis, numbers, unit)
    axis.set_title(title)
    axis.set_xlabel('step')
  _heading(figure, 'Reward model and labelers', note)
  return figure


def _draw_sft(shown: figures.Figures) -> Any:
  panels = [
    ('Validation loss', 'nats per\nresponse token', 'valid_loss'),
    ('Reward-model score of samples', 'reward units', 'score_reward'),
  ]
  drawn = []
  rows = {model: epochs.rows for model, epochs in shown.epochs.items()}
  for title, unit, field in panels:
    curves = _curves(rows, _series, 'epoch', field)
    if curves:
      drawn.append((title, unit, curves))
  if not drawn:
    return None
  figure, axes = _canvas(len(drawn), 1, 0.3 + 2.0 * len(drawn), sharex=True)
  looks, has_star = _of_models(shown), False
  for axis, (title, unit, curves) in zip(axes[:, 0], drawn, strict=True):
    for model, curve in curves.items():
      _line(axis, *curve, looks[model])
      selected = shown.epochs[model].selected
      if selected in curve[0]:
        has_star = True
        value = curve[1][curve[0].index(selected)]
        axis.plot(selected, value, '*', markersize=14, color=looks[model][0])
    axis.set_title(title)
    axis.margins(y=0.15)  # Room for the star.
    _values_axis(axis, [y for curve in curves.values() for y in curve[1]], unit)
    steps = [int(x) for curve in curves.values() for x in curve[0]]
    _steps_axis(axis, steps, 10)
  axes[-1, 0].set_xlabel('epoch')
  _heading(
    figure,
    'Supervised fine-tuning by epoch',
    'Star: the epoch that was selected.' if has_star else '',
    _handles({model: looks[model] for model in shown.epochs}),
  )
  return figure


# --- Best of n ----------------------------------------------------------------


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

  with matplotlib.rc_context(_STYLE):
    return _png(_draw_frontier(points, fits, judge))


def _draw_frontier(points, fits, judge):
  import numpy as np

  looks = _looks(list(points))
  figure, axes = _canvas(2, 1, 6.0, sharex=True)
  panels = (('gold', 'By the judge'), ('proxy', 'By the reward model'))
  for axis, (key, title) in zip(axes[:, 0], panels, strict=True):
    for name, rows in points.items():
      x = [math.sqrt(max(row['kl'].mean, 0.0)) for row in rows]
      y = [row[key].mean for row in rows]
      colour, marker = looks[name]
      axis.errorbar(
        x,
        y,
        yerr=[
          [max(0.0, row[key].mean - row[key].low) for row in rows],
          [max(0.0, row[key].high - row[key].mean) for row in rows],
        ],
        fmt=marker,
        markersize=4.5,
        capsize=2,
        elinewidth=1,
        color=colour,
      )
      if key == 'gold' and name in fits and max(x) > 0:
        fit = fits[name]
        d = np.linspace(max(x) / 200, max(x), 200)
        axis.plot(
          d,
          overoptimization.curve(fit.kind, fit.alpha.mean, fit.beta.mean, d**2),
          color=colour,
        )
    axis.axhline(0, color=_INK, linestyle=':', linewidth=1)
    axis.set_ylabel(
      'score gained' if key == 'gold' else 'score gained\n(reward units)'
    )
    axis.set_title(title)
  axes[-1, 0].set_xlabel('√KL from the initial policy (√nats)')
  _heading(
    figure,
    'Best of n and RL: what KL buys',
    'Whiskers: 95 % intervals, redrawing prompts. Lines: fitted curves (Gao et '
    f'al. 2022). Dotted: the initial policy. Judge: {judge}',
    _handles(looks),
  )
  return figure
