"""model_card.md: facts that a user of a run's policy needs.

The sections follow the card that OpenAI published with InstructGPT: details,
use, data, performance, limitations. Every figure comes from the run; what was
not measured is listed.
"""

import datetime
from collections.abc import Mapping
from typing import Any

from instruct_jax.evals import figures, preference_accuracy, report, sections
from instruct_jax.evals.sections import Bullets, Section, Table

_SECONDS_PER_DAY = 86_400
_MAX_WORSE = 8
_PAPER_COMPUTE = 'SFT 4.9, PPO-ptx 60, GPT-3 pretraining 3,640 (paper 5.1)'
_PAPER_AGREEMENT = '72.6 ± 1.5 % and 77.3 ± 1.3 %'
# Key of a labeler in the labeling site's statistics.json -> column heading.
_LABELER_COLUMNS = {
  'name': 'labeler',
  'role': 'role',
  'answers': 'answers',
  'median_seconds': 'median seconds',
  'tie_rate': 'ties',
  'skip_rate': 'skipped',
  'agreement': 'agreement with labelers',
  'with_researchers': 'with researchers',
}


def training_operations(
  num_parameters: int | float,
  num_tokens: int | float,
  has_adapters: bool = False,
) -> float:
  """6 N D: forward and backward pass over D tokens (Kaplan et al. 2020).

  With adapters it is 4 N D, because the frozen weights have no gradient.
  """
  return (4.0 if has_adapters else 6.0) * num_parameters * num_tokens


def rl_operations(
  policy_parameters: int | float,
  reward_parameters: int | float,
  value_parameters: int | float,
  num_episodes: int,
  tokens_per_episode: int,
  num_epochs: int,
  ptx_tokens: int | float,
  has_adapters: bool = False,
) -> float:
  """Operations of an RL stage; pass 0 parameters for a model that it lacks.

  Each episode is sampled and scored by the old policy, the reference policy,
  the value model and the reward model, each one forward pass (2 N D). Policy
  and value model train on it; the policy also trains on `ptx_tokens` of text.
  """
  tokens = num_episodes * tokens_per_episode
  forward = 3 * policy_parameters + reward_parameters + value_parameters
  return (
    2.0 * forward * tokens
    + training_operations(
      policy_parameters + value_parameters, tokens * num_epochs, has_adapters
    )
    + training_operations(policy_parameters, ptx_tokens, has_adapters)
  )


def petaflop_days(operations: float) -> float:
  """Converts to days at 10^15 operations per second, the paper's unit (5.1)."""
  return operations / (1e15 * _SECONDS_PER_DAY)


def _is_simulated(shown: figures.Figures) -> bool:
  return bool(shown.world and not shown.world.has_people)


def make_card(shown: figures.Figures) -> str:
  """The text of model_card.md."""
  versions = ', '.join(f'{k} {v}' for k, v in shown.versions.items())
  details = [
    ('date', datetime.date.today().isoformat()),
    *((k, f'{count:,} parameters') for k, count in shown.parameters.items()),
    ('seed', str(shown.seed)),
    ('commit', shown.commit[:12]),
    ('versions', versions),
  ]
  data = [
    sections.pairs_table(head, values)
    for head, values in (
      (['data set', 'records'], shown.data_sizes),
      (['hygiene (paper 3.2, A.1, A.2)', 'count'], shown.hygiene),
    )
    if values
  ]
  compute = [
    [
      stage,
      *(
        f'{figure:.2e}' if training.operations else '–'
        for figure in (
          training.operations or 0,
          petaflop_days(training.operations or 0),
        )
      ),
      shown.seconds.get(stage),
    ]
    for stage, training in shown.trained.items()
  ]
  missing = [f'{what}; {how}' for what, how in sections.not_measured(shown)]
  if _is_simulated(shown):
    made = 'judgements' if shown.labeling else 'labels and judgements'
    missing.insert(0, f'preferences of people: all {made} are by programs')
  missing.append('misuse, dual use and attacks on the model')
  before = [
    Section(
      f'Model card: {shown.title}',
      [
        'Policies trained from demonstrations and rankings as InstructGPT was '
        '(Ouyang et al. 2022). Sections follow OpenAI’s card of that model.'
      ],
      level=1,
    ),
    Section('Details', [Table(['', ''], details)]),
    Section(
      'Use',
      [
        'Meant for research on the method: how demonstrations, rankings and RL '
        'change a language model. Not meant for advice, for decisions about '
        'people, or as anybody’s assistant: it was not tested for that.'
      ],
    ),
    Section('Data', [shown.world.about, *data] if shown.world else data),
    Section('Labelers', _labelers(shown), level=3),
    Section('Training', []),
  ]
  after = [
    Section(
      'Compute',
      [
        Table(['stage', 'operations', 'petaflop/s-days', 'seconds'], compute),
        'By formula, padding counted: 2 operations a parameter and token '
        'forward, 6 with the backward pass. For comparison, in '
        f'petaflop/s-days: {_PAPER_COMPUTE}.',
      ],
      level=3,
    ),
    _performance(shown),
    Section('Limitations', []),
    Section('Of these models', [Bullets(_limitations(shown))], level=3),
    Section('Of the method', [Bullets(_method_limitations(shown))], level=3),
    Section('Not evaluated', [Bullets(missing)]),
  ]
  training = []
  for stage, trained in shown.trained.items():
    listed = ', '.join(f'{k} {v}' for k, v in trained.settings.items())
    training.append(f'- **{report.escape(stage)}**: {report.escape(listed)}.')
  lines = [
    *report.section_lines(before),
    *training,
    '',
    *report.section_lines(after),
  ]
  return '\n'.join(lines).rstrip() + '\n'


def _performance(shown) -> Section:
  likert = shown.likert()
  rows = [
    [model, rates, likert.get(model), rates.num_prompts]
    for model, rates in shown.outcomes.rates.items()
  ]
  parts = [
    f'Judge: {shown.judge}. Win rates are against {shown.baseline} on held-out '
    'prompts, ties one half, 95 % intervals.',
    Table(['model', 'win rate', 'overall quality, 1 to 7', 'prompts'], rows),
  ]
  reward = shown.reward_model
  if reward is not None:
    rows = reward.rows()
    if reward.ceiling is not None:
      rows.append(('the best achievable', reward.ceiling))
    parts += ['Reward model:', Table(['share of pairs', ''], rows)]
  if shown.text_loss:
    parts += [
      'Loss on held-out pretraining text, nats per token (the alignment tax):',
      sections.pairs_table(['', ''], shown.text_loss),
    ]
  if shown.suite:
    models = figures.row_names(shown.suite)
    rows = [[task, *map(row.get, models)] for task, row in shown.suite.items()]
    parts += [
      'Public NLP suite (paper, Table 14), 95 % intervals by item:',
      Table(['task', *models], rows),
    ]
  parts += [f'{k} is judged by {v}.' for k, v in shown.suite_judges.items()]
  return Section('Performance', parts)


def _labelers(shown) -> list[sections.Part]:
  if shown.labeling:
    return _labeling(shown.labeling)
  parts = []
  if _is_simulated(shown):
    parts.append(
      'The labelers are programs with tastes and noise of their own, not '
      'people: their agreement and biases were chosen, not measured.'
    )
  rows = []
  if shown.reward_model is not None:
    rows = [
      (f'agreement, {name}', found.agreement)
      for name, found in shown.reward_model.rankings.items()
      if found.agreement is not None
    ]
  if rows:
    parts.append(Table(['', ''], [*rows, ('in the paper', _PAPER_AGREEMENT)]))
  return parts or ['Nothing is known of them.']


def _labeling(statistics: Mapping[str, Any]) -> list[sections.Part]:
  """The labelers, from the labeling site's export."""
  rows = [
    ('labelers', statistics['num_labelers']),
    ('answers', statistics['num_answers']),
    *(
      (f'answers of kind {kind}', count)
      for kind, count in statistics['by_kind'].items()
    ),
    ('instructions', ', '.join(statistics['instructions'])),
    *(
      (f'agreement, {who}', _agreement(value))
      for who, value in statistics['agreement'].items()
    ),
    ('agreement in the paper', _PAPER_AGREEMENT),
  ]
  people = [
    [_agreement(person[key]) for key in _LABELER_COLUMNS]
    for person in statistics['labelers']
  ]
  return [
    'People made the rankings that the reward model learned from, on the '
    'labeling site; names are pseudonyms, and the site asks for no personal '
    'data. Agreement is the share of pairs ordered alike.',
    Table(['', ''], rows),
    Table(list(_LABELER_COLUMNS.values()), people),
  ]


def _agreement(value: Any) -> Any:
  """An agreement as text; other values unchanged."""
  if not isinstance(value, Mapping):
    return value
  found = preference_accuracy.Agreement(**value)
  return f'{sections.cell_text(found)}, {found.num_pairs:,} pairs'


def _limitations(shown) -> list[str]:
  """Limitations of the models, from their own figures."""
  found = []
  for model, rates in shown.labels().items():
    if model != shown.baseline:
      listed = ', '.join(
        f'{sections.plain(name)} {100 * share.mean:.1f} % '
        f'({100 * share.low:.1f} to {100 * share.high:.1f})'
        for name, share in rates.items()
      )
      found.append(f'Share of the answers of {model} by label: {listed}.')
  found += [f'Alarm: {alarm}' for alarm in shown.alarms]
  reward = shown.reward_model
  if reward is not None and reward.ceiling is not None:
    gap = 100 * (reward.ceiling - reward.accuracy.accuracy)
    found.append(
      f'The reward model orders {gap:.1f} points fewer pairs correctly than '
      'the labels allow; RL optimises its errors too.'
    )
  overall = shown.outcomes.rates
  by_category = [
    (category or 'prompts without a use case', model, rates)
    for model, by_category in shown.outcomes.by_category.items()
    for category, rates in by_category.items()
    if not (model in overall and overall[model].high < 0.5)
  ]
  worse = [
    f'{model} is worse than {shown.baseline}, {where}: '
    f'{sections.cell_text(rates)}.'
    for where, model, rates in (
      *(('overall', *row) for row in overall.items()),
      *sorted(by_category, key=lambda row: row[2].rate),
    )
    if rates.high < 0.5
  ]
  return found + worse[:_MAX_WORSE]


def _method_limitations(shown) -> list[str]:
  """Limitations of the method, from the paper."""
  program = (
    'The judge is a program written with the data; that a policy pleases it '
    'says nothing about people.'
  )
  return [
    *[program] * _is_simulated(shown),
    'The policy is aligned to its labelers’ stated preferences under their '
    'instructions, not to human values; people who disagree with them are not '
    'represented (paper 5.2, 5.3).',
    'It follows instructions, harmful ones too, wherever the labels reward '
    'that; nothing in the method makes it refuse.',
    'The reward model only approximates the labelers, and the longer RL '
    'runs, the more its errors are exploited (Gao et al. 2022).',
    'RL costs abilities that the pretrained model had; pretraining gradients '
    'restore a part.',
  ]
