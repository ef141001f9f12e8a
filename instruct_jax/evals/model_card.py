"""model_card.md: what a person should know before using a run's policy.

The sections follow the card that OpenAI published with InstructGPT: details,
use, data, performance, limitations. Every figure comes from the run; what was
not measured is listed as such, never left out silently.
"""

import datetime
from collections.abc import Sequence

from instruct_jax.evals import figures, preference_accuracy, report, sections

_SECONDS_PER_DAY = 86_400
_MAX_WORSE = 8
_PAPER_COMPUTE = 'SFT 4.9, PPO-ptx 60, GPT-3 pretraining 3,640 (paper 5.1)'


def training_operations(
  num_parameters: int | float, num_tokens: int | float
) -> float:
  """6 N D: forward and backward pass over D tokens (Kaplan et al. 2020)."""
  return 6.0 * num_parameters * num_tokens


def forward_operations(
  num_parameters: int | float, num_tokens: int | float
) -> float:
  """2 N D."""
  return 2.0 * num_parameters * num_tokens


def rl_operations(
  policy_parameters: int | float,
  reward_parameters: int | float,
  value_parameters: int | float,
  num_episodes: int,
  tokens_per_episode: int,
  num_epochs: int,
  ptx_tokens: int | float,
) -> float:
  """Operations of an RL stage; 0 parameters of a model that it does not have.

  An episode is sampled, scored by the old and the reference policy, by the
  value and the reward model (each one forward pass), and trained on by policy
  and value model; `ptx_tokens` of text train the policy beside it.
  """
  tokens = num_episodes * tokens_per_episode
  return (
    forward_operations(
      3 * policy_parameters + reward_parameters + value_parameters, tokens
    )
    + training_operations(
      policy_parameters + value_parameters, tokens * num_epochs
    )
    + training_operations(policy_parameters, ptx_tokens)
  )


def petaflop_days(operations: float) -> float:
  """10^15 operations a second for a day, the paper's unit (5.1)."""
  return operations / (1e15 * _SECONDS_PER_DAY)


def make_card(shown: figures.Figures) -> str:
  """The text of model_card.md."""
  cell, escape, table = report.cell, report.escape, report.table
  lines = [
    f'# Model card: {escape(shown.title)}',
    '',
    'Policies trained from demonstrations and rankings as InstructGPT was '
    '(Ouyang et al. 2022). Sections follow OpenAI’s card of that model.',
    '',
    '## Details',
    '',
  ]
  rows = [['date', datetime.date.today().isoformat()]]
  rows += [
    [escape(model), f'{count:,} parameters']
    for model, count in shown.parameters.items()
  ]
  versions = ', '.join(f'{k} {v}' for k, v in shown.versions.items())
  rows += [
    ['seed', str(shown.seed)],
    ['commit', escape(shown.commit[:12])],
    ['versions', escape(versions)],
  ]
  lines += table(['', ''], rows)
  lines += [
    '## Use',
    '',
    'Meant for research on the method: how demonstrations, rankings and RL '
    'change a language model. Not meant for advice, for decisions about '
    'people, or as anybody’s assistant: nothing here was tested for that.',
    '',
    '## Data',
    '',
  ]
  if shown.world:
    lines += [escape(shown.world.about), '']
  for head, values in (
    (['data set', 'records'], shown.data_sizes),
    (['hygiene (paper 3.2, A.1, A.2)', 'count'], shown.hygiene),
  ):
    if values:
      rows = [[escape(key), cell(value)] for key, value in values.items()]
      lines += table(head, rows)
  lines += ['### Labelers', '', *_labelers(shown)]
  lines += ['## Training', '']
  for stage, training in shown.trained.items():
    listed = ', '.join(f'{k} {v}' for k, v in training.settings.items())
    lines.append(f'- **{escape(stage)}**: {escape(listed)}.')
  lines += ['', '### Compute', '']
  lines += table(
    ['stage', 'operations', 'petaflop/s-days', 'seconds'],
    [
      [
        escape(stage),
        *(
          f'{number:.2e}' if training.operations else '–'
          for number in (
            training.operations or 0,
            petaflop_days(training.operations or 0),
          )
        ),
        cell(shown.seconds.get(stage)),
      ]
      for stage, training in shown.trained.items()
    ],
  )
  lines += [
    'By formula, padding counted: 2 operations a parameter and token forward, '
    f'6 with the backward pass. For comparison, in petaflop/s-days: '
    f'{_PAPER_COMPUTE}.',
    '',
    *_performance(shown),
    *_limitations(shown),
    '## Not evaluated',
    '',
  ]
  missing = [f'{what}; {how}' for what, how in sections.not_measured(shown)]
  if shown.world and not shown.world.has_people:
    made = 'judgements' if shown.labeling else 'labels and judgements'
    missing.insert(0, f'preferences of people: all {made} are by programs')
  missing.append('misuse, dual use and attacks on the model')
  lines += [f'- {escape(text)}' for text in missing]
  return '\n'.join(lines).rstrip() + '\n'


def _performance(shown) -> Sequence[str]:
  cell, escape = report.cell, report.escape
  likert = shown.likert()
  lines = [
    '## Performance',
    '',
    f'Judge: {escape(shown.judge)}. Win rates are against '
    f'{escape(shown.baseline)} on held-out prompts, ties one half, 95 % '
    'intervals.',
    '',
    *report.table(
      ['model', 'win rate', 'overall quality, 1 to 7', 'prompts'],
      [
        [
          escape(model),
          cell(rates),
          cell(likert.get(model)),
          f'{rates.num_prompts:,}',
        ]
        for model, rates in shown.outcomes.rates.items()
      ],
    ),
  ]
  reward = shown.reward_model
  if reward is not None:
    rows = [[escape(name), cell(value)] for name, value in reward.rows()]
    if reward.ceiling is not None:
      rows.append(['the best achievable', cell(reward.ceiling)])
    lines += ['Reward model:', '', *report.table(['share of pairs', ''], rows)]
  if shown.text_loss:
    lines += [
      'Loss on held-out pretraining text, nats a token (the alignment tax):',
      '',
      *report.table(
        ['', ''], [[escape(k), cell(v)] for k, v in shown.text_loss.items()]
      ),
    ]
  if shown.suite:
    models = figures.row_names(shown.suite)
    lines += [
      'Public NLP suite (paper, Table 14), 95 % intervals by item:',
      '',
      *report.table(
        ['task', *map(escape, models)],
        [
          [escape(task), *(cell(row.get(model)) for model in models)]
          for task, row in shown.suite.items()
        ],
      ),
    ]
  for task, judge in shown.suite_judges.items():
    lines += [f'{escape(task)} is judged by {escape(judge)}.', '']
  return lines


def _labelers(shown) -> Sequence[str]:
  if shown.labeling:
    return _labeling(shown.labeling)
  lines = []
  if shown.world and not shown.world.has_people:
    lines += [
      'The labelers are programs with tastes and noise of their own, not '
      'people: their agreement and biases were written, not found.',
      '',
    ]
  rows = []
  if shown.reward_model is not None:
    rows = [
      [f'agreement, {report.escape(name)}', report.cell(found.agreement)]
      for name, found in shown.reward_model.rankings.items()
      if found.agreement is not None
    ]
  if rows:
    rows.append(['in the paper', '72.6 ± 1.5 % and 77.3 ± 1.3 %'])
    return lines + report.table(['', ''], rows)
  return lines or ['Nothing is known of them.', '']


def _labeling(statistics) -> Sequence[str]:
  """What the labeling site's export says about who labeled."""
  cell, escape = report.cell, report.escape

  def agreement(value):
    return '–' if value is None else _agreement(value)

  rows = [
    ['labelers', cell(statistics['num_labelers'])],
    ['answers', cell(statistics['num_answers'])],
    *(
      [f'answers of kind {escape(kind)}', cell(count)]
      for kind, count in statistics['by_kind'].items()
    ),
    ['instructions', escape(', '.join(statistics['instructions']))],
    *(
      [f'agreement, {escape(who)}', agreement(value)]
      for who, value in statistics['agreement'].items()
    ),
    ['agreement in the paper', '72.6 ± 1.5 % and 77.3 ± 1.3 %'],
  ]
  return [
    'The rankings that the reward model learned from were made by people on '
    'the labeling site; names are pseudonyms, and the site asks for no '
    'personal data. Agreement is the share of pairs ordered alike.',
    '',
    *report.table(['', ''], rows),
    *report.table(
      [
        'labeler',
        'role',
        'answers',
        'median seconds',
        'ties',
        'skipped',
        'agreement with labelers',
        'with researchers',
      ],
      [
        [
          escape(person['name']),
          escape(person['role']),
          cell(person['answers']),
          cell(person['median_seconds']),
          cell(person['tie_rate']),
          cell(person['skip_rate']),
          agreement(person['agreement']),
          agreement(person['with_researchers']),
        ]
        for person in statistics['labelers']
      ],
    ),
  ]


def _agreement(value) -> str:
  found = preference_accuracy.Agreement(**value)
  return f'{report.cell(found)}, {found.num_pairs:,} pairs'


def _limitations(shown) -> Sequence[str]:
  """Of the models, from their own figures; of the method, from the paper."""
  escape = report.escape
  lines = ['## Limitations', '', '### Of these models', '']
  for model, rates in shown.labels().items():
    if model == shown.baseline:
      continue
    listed = ', '.join(
      f'{sections.plain(name)} {100 * share.mean:.1f} % '
      f'({100 * share.low:.1f} to {100 * share.high:.1f})'
      for name, share in rates.items()
    )
    lines.append(
      f'- Share of the answers of {escape(model)} by label: {escape(listed)}.'
    )
  lines += [f'- Alarm: {escape(alarm)}' for alarm in shown.alarms]
  reward = shown.reward_model
  if reward is not None and reward.ceiling is not None:
    gap = 100 * (reward.ceiling - reward.accuracy.accuracy)
    lines.append(
      f'- The reward model orders {gap:.1f} points fewer pairs correctly than '
      'the labels allow; RL optimises its errors too.'
    )
  worse = [('on the whole', *row) for row in shown.outcomes.rates.items()]
  whole = {model for _, model, rates in worse if rates.high < 0.5}
  worse += sorted(
    (
      (category or 'prompts without a use case', model, rates)
      for model, by_category in shown.outcomes.by_category.items()
      for category, rates in by_category.items()
      if model not in whole
    ),
    key=lambda row: row[2].rate,
  )
  lines += [
    f'- {escape(model)} is worse than {escape(shown.baseline)}, '
    f'{escape(where)}: {report.cell(rates)}.'
    for where, model, rates in worse
    if rates.high < 0.5
  ][:_MAX_WORSE]
  lines += ['', '### Of the method', '']
  if shown.world and not shown.world.has_people:
    lines.append(
      '- The judge is a program written with the data; that a policy pleases '
      'it says nothing about people.'
    )
  lines += [
    '- The policy is aligned to its labelers’ stated preferences under their '
    'instructions, not to human values; whoever disagrees with them is not '
    'represented (paper 5.2, 5.3).',
    '- It follows instructions, harmful ones too, wherever the labels reward '
    'that; nothing in the method makes it refuse.',
    '- The reward model is an imperfect stand-in, and the longer RL goes on, '
    'the more its errors are exploited (Gao et al. 2022).',
    '- RL costs abilities that the pretrained model had; pretraining gradients '
    'give back a part.',
    '',
  ]
  return lines
