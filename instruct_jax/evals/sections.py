"""What a report says, section by section, as plain data.

`report.py` writes sections down as Markdown and `html_report.py` as a page to
look at; neither decides what is said.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from instruct_jax.evals import (
  figures,
  judges,
  preference_accuracy,
  preferences,
)

# Control characters and the marks that reorder text on the screen.
_INVISIBLE = re.compile(
  '[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]'
)


@dataclasses.dataclass(frozen=True)
class Shown:
  """A cell whose digits are chosen already.

  Attributes:
    text: the figure.
    doubt: its interval, or ''.
    best: it is better than all others of its row, by the intervals.
  """

  text: str
  doubt: str = ''
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
class Code:
  """Text as it was typed."""

  text: str


# A paragraph is a string.
Part = str | Table | Picture | Bullets | Code


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
  if abs(value) >= 1e5:
    return f'{value:.2e}'
  if abs(value) < 5e-4:  # Else -0.000.
    value = 0.0
  return f'{value:.3f}' if abs(value) < 100 else f'{value:.1f}'


def shown_cell(value: Any) -> Shown:
  """A cell's figure and its interval, or its text, as they are written."""
  if isinstance(value, Shown):
    return value
  if isinstance(value, preference_accuracy.Spread):
    doubt = '' if value.error is None else f'± {number(value.error)}'
    return Shown(number(value.mean), doubt)
  if dataclasses.is_dataclass(value):
    mean, low, high = list(dataclasses.asdict(value).values())[:3]
    return Shown(number(mean), f'[{number(low)}, {number(high)}]')
  if isinstance(value, bool | str):
    return Shown(str(value))
  return Shown(number(value))


def plain(name: str) -> str:
  """A key as words."""
  return name.replace('_', ' ')


def verdict(rates: preferences.Rates) -> str:
  """'better', 'worse' or 'no clear difference', by the interval."""
  if rates.low > 0.5:
    return 'better'
  return 'worse' if rates.high < 0.5 else 'no clear difference'


def pairs_table(head: Sequence[str], values: Mapping[str, Any]) -> Table:
  """Two columns: names and figures."""
  return Table(head, list(values.items()))


def by_row(
  first: str, rows: Mapping[str, Mapping[str, Any]], name_fn=str
) -> Table:
  """A row for each outer key, a column for each inner key."""
  columns = figures.row_names(rows)
  return Table(
    [first, *map(plain, columns)],
    [
      [name_fn(name), *(row.get(column) for column in columns)]
      for name, row in rows.items()
    ],
  )


def by_model(
  first: str, values: Mapping[str, Mapping[str, Any]], prompts: bool = False
) -> Table:
  """A row for each inner key, a column for each model.

  Args:
    first: head of the first column.
    values: model -> row -> figure.
    prompts: add a last column with the number of prompts, of `Rates` or
      `Interval`s that redraw prompts.
  """
  rows = []
  for name in figures.row_names(values):
    cells = [column.get(name) for column in values.values()]
    row = [plain(name) or '–', *cells]
    if prompts:
      counts = {
        getattr(cell, 'num_prompts', getattr(cell, 'num_clusters', None))
        for cell in cells
        if cell is not None
      }
      row.append(max(counts, default=None))
    rows.append(row)
  return Table([first, *values, *['prompts'] * prompts], rows)


# --- The report ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Claim:
  """What the report comes to, with its doubt.

  Attributes:
    kind: 'good', 'bad' or ''.
    figure: the number.
    what: it is.
    doubt: its interval, and what it rests on.
  """

  kind: str
  figure: str
  what: str
  doubt: str


def _percent(share: float, decimals: int = 1) -> str:
  return f'{100 * share:.{decimals}f}\u00a0%'


def claims(shown: figures.Figures) -> list[Claim]:
  """The figures to see first."""
  found = []
  for model, rates in shown.outcomes.rates.items():
    if model == shown.baseline:
      continue
    said = verdict(rates)
    found.append(
      Claim(
        {'better': 'good', 'worse': 'bad'}.get(said, ''),
        _percent(rates.rate, 0),
        f'{model} against {shown.baseline}',
        f'{said}: {100 * rates.low:.1f} to {_percent(rates.high)}, '
        f'{rates.num_prompts:,} prompts',
      )
    )
  reward = shown.reward_model
  if reward is not None:
    ceiling = ''
    if reward.ceiling is not None:
      ceiling = f'at most {_percent(reward.ceiling)}, '
    found.append(
      Claim(
        '',
        _percent(reward.accuracy.accuracy, 0),
        'of the pairs ordered by the reward model as by labelers',
        f'{ceiling}{reward.accuracy.num_pairs:,} pairs',
      )
    )
  for name, loss in shown.text_loss_difference.items():
    if name not in shown.rl_metrics and name in shown.text_loss:
      continue  # What RL changed, and what was asked for as a pair.
    other = f' – {shown.reference}' if name in shown.text_loss else ''
    found.append(
      Claim(
        'good' if loss.high < 0 else 'bad' if loss.low > 0 else '',
        f'{loss.mean:+.3f}',
        f'nats a token: pretraining loss, {name}{other}',
        f'{loss.low:+.3f} to {loss.high:+.3f}',
      )
    )
  return found


def results(shown: figures.Figures, drawn: set[str]) -> list[Section]:
  """All that was measured, and a list of what was not.

  Args:
    shown: what to show.
    drawn: names of the plots that exist; others are not pointed at.
  """

  def pictures(*several):
    return [Picture(name, title) for name, title in several if name in drawn]

  parts = [Bullets(shown.alarms, alarming=True) if shown.alarms else 'None.']
  found = [Section('Alarms', parts)]
  found += _preferences(shown, pictures)
  found += _ratings(shown, pictures)
  found.append(
    Section(
      'All models',
      [
        'Means over the answers: scores of judge and reward model, tokens, '
        'share ended by the model.',
        by_row('', shown.everyone),
      ],
    )
  )
  found += _reinforcement(shown, pictures)
  if shown.reward_model is not None:
    found.append(
      Section(
        'Reward model',
        [
          *pictures(('reward_model.png', 'Reward-model accuracy')),
          *_reward_model(shown.reward_model),
        ],
      )
    )
  if shown.epochs:
    found.append(_epochs(shown, pictures))
  if shown.suite:
    judged = [f'{k} is judged by {v}.' for k, v in shown.suite_judges.items()]
    found.append(
      Section(
        'Public NLP suite (paper, appendix D)',
        [by_row('', shown.suite), *judged],
      )
    )
  for title, rows in shown.tables.items():
    found.append(Section(title, [by_row('', rows)]))
  for model, rows in shown.prefixes.items():
    found.append(Section(f'Few-shot prefixes of {model}', [by_row('', rows)]))
  missing = [f'{what}: {how}' for what, how in not_measured(shown)]
  if missing:
    found.append(Section('Not measured', [Bullets(missing)]))
  return found


def not_measured(shown: figures.Figures) -> list[tuple[str, str]]:
  """(what a reader would look for and not find, what it takes)."""
  reward = shown.reward_model
  parts = (
    ('overall quality, 1 to 7', shown.likert(), 'a judge that rates answers'),
    (
      'labels of single answers (paper, Table 3)',
      shown.labels(),
      'a judge that rates answers, or a world that labels them',
    ),
    ('KL to a reference', shown.kl, 'reference, one of the models'),
    ('loss on pretraining text', shown.text_loss, 'documents, held out'),
    ('learning curves of RL', shown.rl_metrics, 'a model of an RL stage'),
    ('reward-model accuracy', reward, 'reward_model and test_comparisons'),
    (
      'generalisation to labelers left out of training',
      reward and reward.inter,
      'crossval, results of that stage',
    ),
    (
      'the public NLP suite (TruthfulQA, RealToxicityPrompts, Winogender, '
      'CrowS-Pairs, DROP, QuAC, SQuADv2, HellaSwag, RTE, SST, WSC, '
      'translation, summarization)',
      shown.suite,
      'suite, of configs/nlp_suite.py',
    ),
  )
  return [(what, f'it takes {how}') for what, value, how in parts if not value]


def _preferences(shown, pictures) -> list[Section]:
  outcomes, baseline = shown.outcomes, shown.baseline
  controlled = outcomes.length_controlled
  by_labeler = any(rates.by_labeler for rates in outcomes.rates.values())
  rows = [
    [
      model,
      rates,
      *[rates.by_labeler] * by_labeler,
      controlled.rates.get(model),
      outcomes.bradley_terry.get(model),
      rates.num_prompts,
      rates.num_judgements,
    ]
    for model, rates in outcomes.rates.items()
  ]
  found = [
    Section(
      f'Win rate against {baseline}',
      [
        f'Judge: {shown.judge}. Each pair is judged in both orders; ties count '
        'one half.',
        *pictures(('win_rate.png', 'Win rate by model')),
        Table(
          [
            *('model', 'win rate'),
            *['by labeler'] * by_labeler,
            *('at equal length', 'rating', 'prompts', 'judgements'),
          ],
          rows,
        ),
        'At equal length: a logistic regression takes out what length alone '
        'wins; log-odds of a win for each e-fold of length: '
        f'{_text(controlled.slope)}. Ratings are Bradley-Terry, in nats, '
        f'{baseline} at 0; one nat is 173.7 Elo points.',
      ],
    ),
    Section(
      'By use case',
      [by_model('use case', outcomes.by_category, prompts=True)],
      level=3,
    ),
  ]
  places = shown.has_places
  rows = []
  pairs = {' – '.join(pair): row for pair, row in outcomes.pairs.items()}
  for name, versus in pairs.items():
    place, power = versus.first_place, versus.power
    row = [name, versus.rates]
    if places:
      row += [place and getattr(place, key) for key in _PLACE]
    row += [power and power.to_separate, power and power.for_power]
    rows.append(row)
  head = ['pair', 'win rate', *list(_PLACE.values()) * places]
  head += ['prompts to separate', 'for 80 % power']
  text = (
    'At the rates seen, so many prompts make a 95 % interval that just '
    'excludes one half, and so many that it does so in 80 % of repetitions.'
  )
  if places:
    text += (
      ' How often the answer shown first wins: each pair was judged in both '
      'orders, so a judge that reads the answers alone has exactly one half.'
    )
  return [*found, Section('Pairs', [text, Table(head, rows)], level=3)]


# Field of `preferences.FirstPlace` -> head of its column.
_PLACE = {
  'rate': 'first place wins',
  'ties': 'ties',
  'contradictions': 'contradictions',
  'num_verdicts': 'verdicts',
}


def _text(value: Any) -> str:
  found = shown_cell(value)
  return f'{found.text} {found.doubt}'.strip()


def _ratings(shown, pictures) -> list[Section]:
  found, likert, labels = [], shown.likert(), shown.labels()
  if likert:
    by_case = {model: {} for model in likert}
    for category, ratings in shown.ratings_by_category.items():
      for model in by_case:
        if judges.LIKERT in ratings.get(model, {}):
          by_case[model][category] = ratings[model][judges.LIKERT]
    overall = {model: {'all': value} for model, value in likert.items()}
    found.append(
      Section(
        'Overall quality, 1 to 7',
        [by_model('', overall), by_model('use case', by_case, prompts=True)],
      )
    )
  if labels:
    found.append(
      Section(
        'Labels of single answers (paper, Table 3)',
        [
          'Share of the answers that have the label, of those to which it '
          'applies.',
          *pictures(('metadata.png', 'Labels by model')),
          by_model('label', labels),
        ],
      )
    )
  return found


def _reinforcement(shown, pictures) -> list[Section]:
  found = []
  parts = pictures(
    ('reward_kl.png', 'Reward against KL'), ('rl.png', 'Along RL')
  )
  if shown.kl:
    head = f'KL to {shown.reference}'
    parts += [
      f'{head} over the answers to the prompts, nats per response.',
      by_row('model', shown.kl),
    ]
  if parts:
    found.append(Section('Reinforcement learning', parts))
  parts = pictures(
    ('pretraining_loss.png', 'Pretraining loss along RL'),
    ('probes.png', 'Public tasks along RL'),
  )
  if shown.text_loss:
    rows = {
      name: {'nats per token': loss, 'rows': loss.num_clusters}
      for name, loss in shown.text_loss.items()
    }
    for name, difference in shown.text_loss_difference.items():
      if name in rows:
        rows[name][f'minus {shown.reference}, paired'] = difference
      else:
        rows[name] = {'nats per token': difference}
    parts.append(by_row('', rows))
  if parts:
    found.append(Section('Pretraining loss', parts, level=3 if found else 2))
  return found


def _reward_model(reward: figures.RewardFigures) -> list[Part]:
  rows = {}
  for name, ranked in reward.rankings.items():
    for scorer, accuracy in ranked.accuracies.items():
      rows.setdefault(scorer, {})[name] = accuracy
    if ranked.agreement is not None:
      key = 'agreement of labelers'
      rows.setdefault(key, {})[name] = ranked.agreement
    first = next(iter(ranked.accuracies.values()))
    rows.setdefault('pairs', {})[name] = first.num_pairs
  parts = ['Share of pairs ordered as the labelers did.', by_row('', rows)]
  if reward.ceiling is not None:
    parts.append(
      'The judge is what labelers agree on: its accuracy, '
      f'{number(reward.ceiling)}, is the most that label noise allows.'
    )
  folds = [
    (label, spread, spread.num_runs)
    for label, spread in reward.rows()
    if isinstance(spread, preference_accuracy.Spread)
  ]
  if folds:
    parts.append(Table(['', 'share, ± standard error', 'runs'], folds))
  return parts


def _epochs(shown, pictures) -> Section:
  parts = pictures(('sft.png', 'Supervised fine-tuning by epoch'))
  columns = {
    'valid_loss': 'validation loss',
    'score_reward': 'reward-model score',
  }
  for model, epochs in shown.epochs.items():
    text = f'{model}.'
    if epochs.selected is not None:
      by = f', by {epochs.selected_by}' if epochs.selected_by else ''
      text = f'{model}: epoch {epochs.selected} was selected{by}.'
    measured = [
      key for key in columns if any(row.get(key) for row in epochs.rows)
    ]
    rows = [
      [str(row['epoch']), *(row.get(key) for key in measured)]
      for row in epochs.rows
    ]
    head = ['epoch', *(columns[key] for key in measured)]
    parts += [text, Table(head, rows)]
  return Section('Supervised fine-tuning by epoch', parts)


def background(shown: figures.Figures) -> list[Section]:
  """How the models were asked, on what data, with what software."""
  found = [
    Section('What was asked', []),
    Section('Models', [by_row('model', shown.asked)], level=3),
    Section(
      'Prompts and verdicts',
      [
        pairs_table(['', 'figure'], {**shown.prompts, **shown.settings}),
        pairs_table(['', 'figure'], shown.asking),
      ],
      level=3,
    ),
  ]
  parts = (
    ('Records', ['data set', 'records'], shown.data_sizes),
    ('Hygiene (paper, A.1 and A.2)', ['', 'count'], shown.hygiene),
    ('Labelers', ['', 'figure'], labelers(shown)),
  )
  data = [
    Section(
      title,
      [pairs_table(head, {plain(k): v for k, v in values.items()})],
      level=3,
    )
    for title, head, values in parts
    if values
  ]
  if data:
    found += [Section('Data', []), *data]
  seconds = dict(shown.seconds)
  parts = [pairs_table(['package', 'version'], shown.versions)]
  if seconds:
    everything = {**seconds, 'all stages': sum(seconds.values())}
    parts.insert(0, pairs_table(['stage', 'seconds'], everything))
  return [*found, Section('Run', parts)]


def labelers(shown: figures.Figures) -> dict[str, Any]:
  """Who ranked, by the statistics of the labeling site; {} without them."""
  found = shown.labeling
  if not found:
    return {}
  rates = {
    f'agreement of {who}': preference_accuracy.Agreement(**value)
    for who, value in found['agreement'].items()
    if value is not None
  }
  counts = {'labelers': found['num_labelers'], 'answers': found['num_answers']}
  return counts | rates
