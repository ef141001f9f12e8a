"""What a report says, section by section, as plain data.

`report.py` writes sections down as Markdown and `html_report.py` as a page to
look at; neither decides what is said.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from instruct_jax.evals import preference_accuracy, run_figures, win_rate

# Control characters and the marks that reorder text on the screen.
_INVISIBLE = re.compile(
  '[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]'
)


@dataclasses.dataclass(frozen=True)
class Shown:
  """A cell whose digits are chosen already.

  Attributes:
    text: the figure.
    rest: its interval, or ''.
    best: it is told apart from all others of its row, and better.
  """

  text: str
  rest: str = ''
  best: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
  """Cells hold numbers, intervals, `Shown`, text or None; heads are text."""

  head: Sequence[str]
  rows: Sequence[Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Picture:
  """A plot by its file's name."""

  name: str
  title: str


@dataclasses.dataclass(frozen=True)
class Bullets:
  """A list of sentences, or of warnings."""

  items: Sequence[str]
  alarming: bool = False


@dataclasses.dataclass(frozen=True)
class LeftOut:
  """Why something has no figures; `what`, where it is not the section."""

  reason: str
  what: str = ''


@dataclasses.dataclass(frozen=True)
class Code:
  """Text as it was typed."""

  text: str


# A paragraph is a string.
Part = str | Table | Picture | Bullets | LeftOut | Code


@dataclasses.dataclass(frozen=True)
class Section:
  """A heading of level 2 or 3 and what stands below it."""

  title: str
  parts: Sequence[Part]
  level: int = 2


def visible(text: str) -> str:
  """Text in which U+FFFD stands for every invisible control character."""
  return _INVISIBLE.sub('\ufffd', text)


def number(value: Any) -> str:
  """A number as text, '–' for None and for what is not finite."""
  if hasattr(value, 'tolist'):
    value = value.tolist()
  if value is None or (isinstance(value, float) and not math.isfinite(value)):
    return '–'
  if isinstance(value, int):
    return f'{value:,}'
  if abs(value) < 1e-12:  # What rounding leaves of 0.
    value = 0.0
  if value and not 1e-3 <= abs(value) < 1e5:
    return f'{value:.2e}'
  return f'{value:.3f}' if abs(value) < 100 else f'{value:.1f}'


def shown(value: Any) -> Shown:
  """A cell's figure and its interval, or its text, as they are written."""
  if isinstance(value, Shown):
    return value
  if isinstance(value, preference_accuracy.Spread):
    rest = '' if value.error is None else f'± {number(value.error)}'
    return Shown(number(value.mean), rest)
  if dataclasses.is_dataclass(value):
    mean, low, high = list(dataclasses.asdict(value).values())[:3]
    return Shown(number(mean), f'[{number(low)}, {number(high)}]')
  if isinstance(value, bool | str):
    return Shown(str(value))
  return Shown(number(value))


def verdict(rate: win_rate.WinRate) -> str:
  """'better', 'worse' or 'not told apart', by the interval."""
  if rate.low > 0.5:
    return 'better'
  return 'worse' if rate.high < 0.5 else 'not told apart'


def left_out(
  figures: run_figures.Figures, section: str, what: str = ''
) -> LeftOut:
  """Why a section (of `run_figures.SECTIONS`) has no figures."""
  return LeftOut(figures.reasons.get(section, 'not measured in this run'), what)


def _pairs(head: Sequence[str], values: Mapping[str, Any]) -> Table:
  return Table(
    head, [(run_figures.label(key), value) for key, value in values.items()]
  )


def by_model(
  first: str, values: Mapping[str, Mapping[str, Any]], prompts: bool = False
) -> Table:
  """A row for each inner key, a column for each model.

  Args:
    first: head of the first column.
    values: model -> row -> figure.
    prompts: add a last column with the number of prompts, of `WinRate`s or
      `Interval`s that redraw prompts.
  """
  columns = run_figures.ordered(values)
  rows = []
  for name in run_figures.row_names(values):
    cells = [column.get(name) for _, column in columns]
    row = [run_figures.label(name) or '–', *cells]
    if prompts:
      counts = {
        getattr(cell, 'num_prompts', getattr(cell, 'num_clusters', None))
        for cell in cells
        if cell is not None
      }
      row.append(max(counts, default=None))
    rows.append(row)
  head = [first, *(run_figures.label(model) for model, _ in columns)]
  return Table([*head, 'prompts'] if prompts else head, rows)


def results(figures: run_figures.Figures, drawn: set[str]) -> list[Section]:
  """All that was measured; parts without data say why.

  Args:
    figures: of the run.
    drawn: names of the plots that exist; others are not pointed at.
  """
  alarms = Bullets(figures.alarms, alarming=True) if figures.alarms else 'None.'
  if not figures.alarms and 'alarms' in figures.reasons:
    alarms = left_out(figures, 'alarms')

  def pictures(*several):
    return [Picture(name, title) for name, title in several if name in drawn]

  found = [
    Section('Alarms', [alarms]),
    Section(
      'Win rate against SFT',
      [
        f'Judge: {figures.judge}. Ties count one half.',
        *pictures(('win_rate.png', 'Win rate by model')),
        Table(
          ['model', 'win rate', '95 % interval', 'prompts'],
          [
            (
              run_figures.label(model),
              rate.rate,
              Shown(f'{number(rate.low)} – {number(rate.high)}'),
              rate.num_prompts,
            )
            for model, rate in run_figures.ordered(figures.win_rate)
          ],
        ),
      ],
    ),
    Section(
      'By use case',
      [
        by_model('use case', figures.win_rate_by_category, prompts=True)
        if figures.win_rate_by_category
        else left_out(figures, 'categories')
      ],
      level=3,
    ),
  ]
  if figures.likert:
    overall = {model: {'all': v} for model, v in figures.likert.items()}
    quality = [by_model('', overall)]
    if figures.likert_by_category:
      quality.append(
        by_model('use case', figures.likert_by_category, prompts=True)
      )
    found.append(Section('Overall quality, 1 to 7', quality))
  labels = [left_out(figures, 'metadata')]
  if figures.metadata:
    labels = [
      'Share of the answers that have the label, of those to which it applies.',
      *pictures(('metadata.png', 'Labels by model')),
      by_model('label', figures.metadata),
    ]
  found.append(Section('Labels of single answers (paper, Table 3)', labels))
  along = pictures(
    ('reward_kl.png', 'Reward against KL'), ('rl.png', 'Along RL')
  )
  kl = left_out(figures, 'kl', 'KL at the end')
  if figures.kl:
    kl = _pairs(['model', 'KL at the end, nats per response'], figures.kl)
  found.append(
    Section('PPO and PPO-ptx', [*(along or [left_out(figures, 'rl')]), kl])
  )
  found.append(
    Section(
      'Pretraining loss',
      [
        *pictures(
          ('pretraining_loss.png', 'Pretraining loss along RL'),
          ('probes.png', 'Public tasks along RL'),
        ),
        _pretraining_loss(figures),
      ],
      level=3,
    )
  )
  found.append(
    Section(
      'Reward model',
      [
        *pictures(('reward_model.png', 'Reward-model accuracy')),
        _reward_model(figures),
      ],
    )
  )
  return [*found, _sft(figures, pictures), *_extra(figures)]


def _pretraining_loss(figures: run_figures.Figures) -> Part:
  loss = figures.pretraining_loss
  if loss is None:
    return left_out(figures, 'pretraining_loss')
  rows = [
    ('RL initialisation', loss.init),
    ('PPO', loss.ppo),
    ('PPO-ptx', loss.ppo_ptx),
    ('PPO-ptx minus PPO, paired by document', loss.difference),
  ]
  return Table(
    ['', 'nats per token', 'documents'],
    [
      (label, value, value.num_clusters)
      for label, value in rows
      if value is not None
    ],
  )


def _reward_model(figures: run_figures.Figures) -> Part:
  reward = figures.reward_model
  if reward is None:
    return left_out(figures, 'reward_model')
  rows = []
  for label, value in run_figures.reward_rows(reward):
    if isinstance(value, preference_accuracy.Spread):
      basis = f'{value.num_runs:,} runs, ± standard error'
    else:
      basis = f'{value.num_pairs:,} pairs'
    rows.append((label, value, basis))
  if reward.ceiling is not None:
    rows.insert(
      1, ('the gold utility on the same pairs', reward.ceiling, 'ceiling')
    )
  return Table(['share of pairs ordered alike', '', 'over'], rows)


def _sft(figures: run_figures.Figures, pictures) -> Section:
  title = 'Supervised fine-tuning by epoch'
  if not figures.sft_epochs:
    return Section(title, [left_out(figures, 'sft')])
  parts = []
  if figures.sft_selected_epoch is not None:
    by = f', by {figures.sft_selected_by}' if figures.sft_selected_by else ''
    parts.append(f'Selected: epoch {figures.sft_selected_epoch}{by}.')
  parts += pictures(('sft.png', 'SFT by epoch'))
  columns = {
    'validation loss': 'valid_loss',
    'reward-model score': 'score_reward',
    'judge': 'score_gold',
  }
  # A column that was never measured says nothing.
  columns = {
    head: field
    for head, field in columns.items()
    if any(getattr(epoch, field) is not None for epoch in figures.sft_epochs)
  }
  rows = [
    [str(epoch.epoch), *(getattr(epoch, field) for field in columns.values())]
    for epoch in figures.sft_epochs
  ]
  return Section(title, [*parts, Table(['epoch', *columns], rows)])


def _extra(figures: run_figures.Figures) -> list[Section]:
  found = []
  for title, rows in figures.extra.items():
    if rows and all(isinstance(row, Mapping) for row in rows.values()):
      columns = dict.fromkeys(name for row in rows.values() for name in row)
      table = Table(
        ['', *map(run_figures.label, columns)],
        [
          [run_figures.label(name), *(row.get(c) for c in columns)]
          for name, row in rows.items()
        ],
      )
    else:
      table = _pairs(['', 'figure'], rows)
    found.append(Section(run_figures.label(title), [table], level=3))
  return [Section('Further figures', []), *found] if found else []


def background(figures: run_figures.Figures) -> list[Section]:
  """On what data and with what software."""
  parts = (
    ('Records', 'data_sizes', ['data set', 'records'], figures.data_sizes),
    ('Hygiene (paper, A.1 and A.2)', 'hygiene', ['', 'count'], figures.hygiene),
    ('Labelers', 'labelers', ['', 'figure'], figures.labelers),
  )
  seconds = dict(figures.seconds)
  return [
    Section('Data', []),
    *(
      Section(
        title,
        [_pairs(head, values) if values else left_out(figures, name)],
        level=3,
      )
      for title, name, head, values in parts
    ),
    Section(
      'Run',
      [
        _pairs(
          ['stage', 'seconds'], {**seconds, 'all stages': sum(seconds.values())}
        ),
        _pairs(['package', 'version'], figures.versions),
      ],
    ),
  ]
