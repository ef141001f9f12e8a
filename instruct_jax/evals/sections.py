"""The content of a report, section by section, as plain data.

`report.py` writes sections as Markdown and `html_report.py` as a web page.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from instruct_jax.evals import figures, judges, preference_accuracy, preferences

# Control characters and the marks that reorder text on the screen.
_INVISIBLE = re.compile(
  '[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]'
)


@dataclasses.dataclass(frozen=True)
class Shown:
  """A cell that is already formatted."""

  text: str
  doubt: str = ''  # Its interval.
  best: bool = False  # Better than all others in its row, by the intervals.


@dataclasses.dataclass(frozen=True)
class Table:
  """Heads are text; cells are numbers, intervals, `Shown`, text or None."""

  head: Sequence[str]
  rows: Sequence[Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Picture:
  """A plot, by file name."""

  name: str
  title: str


@dataclasses.dataclass(frozen=True)
class Bullets:
  """A list of sentences, or of warnings."""

  items: Sequence[str]
  alarming: bool = False


@dataclasses.dataclass(frozen=True)
class Code:
  """Text to show verbatim."""

  text: str


# A paragraph is a string.
Part = str | Table | Picture | Bullets | Code


@dataclasses.dataclass(frozen=True)
class Section:
  """A heading of some level, from 1 on, and the parts below it."""

  title: str
  parts: Sequence[Part]
  level: int = 2


def visible(text: str) -> str:
  """Text with U+FFFD for every invisible control character."""
  return _INVISIBLE.sub('\ufffd', text)


def number(value: Any) -> str:
  """A number as text; '–' for None and for a number that is not finite."""
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


def cell_text(value: Any) -> str:
  """A cell's figure and its interval on one line."""
  found = shown_cell(value)
  return f'{found.text} {found.doubt}'.strip()


def plain(name: str) -> str:
  """A key as words."""
  return name.replace('_', ' ')


def pairs_table(head: Sequence[str], values: Mapping[str, Any]) -> Table:
  """A table of two columns: names and figures."""
  return Table(head, list(values.items()))


def by_row(first: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
  """A row for each outer key, a column for each inner key."""
  columns = figures.row_names(rows)
  return Table(
    [first, *map(plain, columns)],
    [[name, *map(row.get, columns)] for name, row in rows.items()],
  )


def by_model(
  first: str, values: Mapping[str, Mapping[str, Any]], prompts: bool = False
) -> Table:
  """A row for each inner key, a column for each model.

  `prompts` adds a last column with the number of prompts; cells must then be
  `Rates`, or `Interval`s clustered by prompt.
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
  """One of the main figures of the report."""

  kind: str  # 'good', 'bad' or ''.
  figure: str
  what: str  # Its meaning.
  doubt: str  # Its interval, and the data behind it.


def _percent(share: float, decimals: int = 1) -> str:
  return f'{100 * share:.{decimals}f}\u00a0%'


# A bootstrap of fewer prompts or rows gives intervals that are too narrow.
MIN_CLUSTERS = 10


def _verdict(rates: preferences.Rates) -> tuple[str, str]:
  """The kind of claim and the comparison in words, from the interval."""
  if rates.num_prompts < MIN_CLUSTERS:
    return '', 'too few to tell'
  if rates.low > 0.5:
    return 'good', 'better'
  if rates.high < 0.5:
    return 'bad', 'worse'
  return '', 'no clear difference'


def claims(shown: figures.Figures) -> list[Claim]:
  """The main figures, for the top of the report."""
  found = []
  for model, rates in shown.outcomes.rates.items():
    if model != shown.baseline:
      kind, words = _verdict(rates)
      found.append(
        Claim(
          kind,
          _percent(rates.rate, 0),
          f'{model} against {shown.baseline}',
          f'{words}: {100 * rates.low:.1f} to {_percent(rates.high)}, '
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
      continue  # Neither an RL model nor a pair of models.
    other = f' – {shown.reference}' if name in shown.text_loss else ''
    kind, words = 'good' if loss.high < 0 else 'bad' if loss.low > 0 else '', ''
    if loss.num_clusters < MIN_CLUSTERS:
      kind, words = '', 'too few to tell: '
    found.append(
      Claim(
        kind,
        f'{loss.mean:+.3f}',
        f'nats per token: pretraining loss, {name}{other}',
        f'{words}{loss.low:+.3f} to {loss.high:+.3f}, '
        f'{loss.num_clusters:,} rows',
      )
    )
  return found


_TITLES = {
  'win_rate.png': 'Win rate by model',
  'metadata.png': 'Labels by model',
  'reward_kl.png': 'Reward against KL',
  'rl.png': 'Along RL',
  'pretraining_loss.png': 'Pretraining loss along RL',
  'probes.png': 'Public tasks along RL',
  'reward_model.png': 'Reward-model accuracy',
  'sft.png': 'Supervised fine-tuning by epoch',
}


def _pictures(drawn: set[str], *names: str) -> list[Part]:
  return [Picture(name, _TITLES[name]) for name in names if name in drawn]


def results(shown: figures.Figures, drawn: set[str]) -> list[Section]:
  """All that was measured, and a list of what was not.

  `drawn` names the plots that exist.
  """
  alarms = Bullets(shown.alarms, alarming=True) if shown.alarms else 'None.'
  everyone = (
    'Means over the answers: scores of judge and reward model, tokens, share '
    'ended by the model.'
  )
  suite = [f'{k} is judged by {v}.' for k, v in shown.suite_judges.items()]
  missing = [f'{what}: {how}' for what, how in not_measured(shown)]
  found = [
    Section('Alarms', [alarms]),
    *_preferences(shown, drawn),
    *_ratings(shown, drawn),
    Section('All models', [everyone, by_row('', shown.everyone)]),
    *_reinforcement(shown, drawn),
    Section('Reward model', _reward_model(shown.reward_model, drawn)),
    Section('Supervised fine-tuning by epoch', _epochs(shown.epochs, drawn)),
    Section(
      'Public NLP suite (paper, appendix D)',
      [by_row('', shown.suite), *suite] if shown.suite else [],
    ),
    *(Section(k, [by_row('', rows)]) for k, rows in shown.tables.items()),
    *(
      Section(f'Few-shot prefixes of {model}', [by_row('', rows)])
      for model, rows in shown.prefixes.items()
    ),
    Section('Not measured', [Bullets(missing)] if missing else []),
  ]
  return [section for section in found if section.parts]


def not_measured(shown: figures.Figures) -> list[tuple[str, str]]:
  """(figure that a reader expects but was not measured, what it takes)."""
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


# Field of `preferences.FirstPlace` -> column heading.
_PLACE = {
  'rate': 'first place wins',
  'ties': 'ties',
  'contradictions': 'contradictions',
  'num_verdicts': 'verdicts',
}


def _preferences(shown, drawn) -> list[Section]:
  outcomes, baseline = shown.outcomes, shown.baseline
  controlled = outcomes.length_controlled
  columns = {
    'win rate': outcomes.rates,
    'by labeler': {k: rates.by_labeler for k, rates in outcomes.rates.items()},
    'at equal length': controlled.rates,
    'rating': outcomes.bradley_terry,
    'prompts': {k: rates.num_prompts for k, rates in outcomes.rates.items()},
    'judgements': {
      k: rates.num_judgements for k, rates in outcomes.rates.items()
    },
  }
  if not any(columns['by labeler'].values()):
    del columns['by labeler']
  places = shown.has_places
  rows = []
  for pair, versus in outcomes.pairs.items():
    place, power = versus.first_place, versus.power
    row = [' – '.join(pair), versus.rates]
    if places:
      row += [place and getattr(place, key) for key in _PLACE]
    row += [power and power.to_separate, power and power.for_power]
    rows.append(row)
  head = ['pair', 'win rate', *list(_PLACE.values()) * places]
  head += ['prompts to separate', 'for 80 % power']
  text = (
    'Prompts to separate: the number at which, with the same rate, a 95 % '
    'interval would just exclude one half. For 80 % power: the number at which '
    'it would do so in 80 % of repetitions.'
  )
  if places:
    text += (
      ' First place wins: how often the answer shown first wins. Each pair was '
      'judged in both orders, so this is exactly one half for a judge that '
      'ignores the order.'
    )
  cases = set().union(*outcomes.by_category.values())
  by_case = Section(
    'By use case',
    [by_model('use case', outcomes.by_category, prompts=True)],
    level=3,
  )
  return [
    Section(
      f'Win rate against {baseline}',
      [
        f'Judge: {shown.judge}. Each pair is judged in both orders; ties count '
        'one half.',
        *_pictures(drawn, 'win_rate.png'),
        Table(
          ['model', *columns],
          [
            [model, *(column.get(model) for column in columns.values())]
            for model in outcomes.rates
          ],
        ),
        'At equal length: a logistic regression removes the effect of length; '
        'log-odds of a win for each e-fold of length: '
        f'{cell_text(controlled.slope)}. Ratings are Bradley-Terry, in nats, '
        f'{baseline} at 0; one nat is 173.7 Elo points.',
      ],
    ),
    *([by_case] if len(cases) > 1 else []),
    Section('Pairs', [text, Table(head, rows)], level=3),
  ]


def _ratings(shown, drawn) -> list[Section]:
  likert, labels = shown.likert(), shown.labels()
  overall = {model: {'all': value} for model, value in likert.items()}
  by_case = {
    model: {
      category: ratings[model][judges.LIKERT]
      for category, ratings in shown.ratings_by_category.items()
      if judges.LIKERT in ratings.get(model, {})
    }
    for model in likert
  }
  tables = [by_model('', overall), by_model('use case', by_case, prompts=True)]
  shares = [
    'Share of the answers that have the label, of those to which it applies.',
    *_pictures(drawn, 'metadata.png'),
    by_model('label', labels),
  ]
  return [
    Section('Overall quality, 1 to 7', tables if likert else []),
    Section(
      'Labels of single answers (paper, Table 3)', shares if labels else []
    ),
  ]


def _loss_table(shown, losses, differences) -> Table:
  rows = {
    name: {'nats per token': loss, 'rows': loss.num_clusters}
    for name, loss in losses.items()
  }
  for name, difference in differences.items():
    if name in rows:
      rows[name][f'minus {shown.reference}, paired'] = difference
    else:
      rows[name] = {'nats per token': difference}
  return by_row('', rows)


def _reinforcement(shown, drawn) -> list[Section]:
  learning = _pictures(drawn, 'reward_kl.png', 'rl.png')
  if shown.kl:
    learning += [
      f'KL to {shown.reference} over the answers to the prompts, nats per '
      'response.',
      by_row('model', shown.kl),
    ]
  losses = _pictures(drawn, 'pretraining_loss.png', 'probes.png')
  if shown.text_loss:
    losses.append(
      _loss_table(shown, shown.text_loss, shown.text_loss_difference)
    )
  for kind, loss in shown.other_text_loss.items():
    difference = shown.other_text_loss_difference[kind]
    losses += [f'On {kind}:', _loss_table(shown, loss, difference)]
  return [
    Section('Reinforcement learning', learning),
    Section('Pretraining loss', losses, level=3 if learning else 2),
  ]


def _reward_model(
  reward: figures.RewardFigures | None, drawn: set[str]
) -> list[Part]:
  if reward is None:
    return []
  rows, ties = {}, []
  for name, ranked in reward.rankings.items():
    column = dict(ranked.accuracies)
    for scorer, gap in ranked.gaps.items():
      column[f'{reward.scorer} – {scorer}'] = gap
      if gap.low <= 0 <= gap.high:
        ties.append(
          f'On {name} the {reward.scorer} is not told apart from: {scorer}.'
        )
    if ranked.agreement is not None:
      column['agreement of labelers'] = ranked.agreement
    column['pairs'] = next(iter(ranked.accuracies.values())).num_pairs
    for key, value in column.items():
      rows.setdefault(key, {})[name] = value
  parts = [
    *_pictures(drawn, 'reward_model.png'),
    'Share of pairs ordered as the labelers did, and differences on the same '
    'pairs.',
    by_row('', rows),
    *ties,
  ]
  if reward.ceiling is not None:
    parts.append(
      'Labelers agree with the judge except for noise: its accuracy, '
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


def _epochs(
  by_model: Mapping[str, figures.Epochs], drawn: set[str]
) -> list[Part]:
  columns = {
    'valid_loss': 'validation loss',
    'score_reward': 'reward-model score',
  }
  parts = _pictures(drawn, 'sft.png')
  for model, epochs in by_model.items():
    text = f'{model}.'
    if epochs.selected is not None:
      by = f', by {epochs.selected_by}' if epochs.selected_by else ''
      text = f'{model}: epoch {epochs.selected} was selected{by}.'
    measured = [
      key for key in columns if any(row.get(key) for row in epochs.rows)
    ]
    head = ['epoch', *(columns[key] for key in measured)]
    rows = [[str(row['epoch']), *map(row.get, measured)] for row in epochs.rows]
    parts += [text, Table(head, rows)]
  return parts


def background(shown: figures.Figures) -> list[Section]:
  """How the models were asked, on what data, with what software."""
  data = [
    Section(
      title,
      [pairs_table(head, {plain(k): v for k, v in values.items()})],
      level=3,
    )
    for title, head, values in (
      ('Records', ['data set', 'records'], shown.data_sizes),
      ('Hygiene (paper, A.1 and A.2)', ['', 'count'], shown.hygiene),
      ('Labelers', ['', 'figure'], labelers(shown)),
    )
    if values
  ]
  run = [pairs_table(['package', 'version'], shown.versions)]
  if shown.seconds:
    everything = {**shown.seconds, 'all stages': sum(shown.seconds.values())}
    run.insert(0, pairs_table(['stage', 'seconds'], everything))
  prompts = {**shown.prompts, **shown.settings}
  return [
    Section('What was asked', []),
    Section('Models', [by_row('model', shown.asked)], level=3),
    Section(
      'Prompts and verdicts',
      [pairs_table(['', 'figure'], each) for each in (prompts, shown.asking)],
      level=3,
    ),
    *([Section('Data', []), *data] if data else []),
    Section('Run', run),
  ]


def labelers(shown: figures.Figures) -> dict[str, Any]:
  """Figures on the labelers from the labeling site; {} without statistics."""
  found = shown.labeling
  if not found:
    return {}
  counts = {'labelers': found['num_labelers'], 'answers': found['num_answers']}
  return counts | {
    f'agreement of {who}': preference_accuracy.Agreement(**value)
    for who, value in found['agreement'].items()
    if value is not None
  }
