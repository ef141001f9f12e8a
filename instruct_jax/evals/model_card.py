"""model_card.md: what a person should know before using a run's policy.

The sections follow the card that OpenAI published with InstructGPT: details,
use, data, performance, limitations. Every figure comes from the run; what was
not measured is listed as such, never left out silently.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from instruct_jax.evals import preference_accuracy, report, run_figures

_SECONDS_PER_DAY = 86_400
_PAPER_COMPUTE = 'SFT 4.9, PPO-ptx 60, GPT-3 pretraining 3,640 (paper 5.1)'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
  """What the card needs beside the report's figures.

  Attributes:
    name: of the run.
    date: ISO.
    policy_parameters, reward_parameters: without padding of the vocabulary.
    world: what the data are, in a sentence or two.
    people: True where people labeled, False where programs did.
    labeling: content of the statistics.json of a labeling site's export that
      the reward model learned from; empty without one.
    hyper_parameters: stage -> name -> value.
    compute: stage -> floating-point operations.
    suite: public task, prompt and metric -> model -> figure, where the suite
      was run.
    suite_judges: task -> who judged its answers, where no rule can.
  """

  name: str
  date: str
  policy_parameters: int
  reward_parameters: int
  world: str
  people: bool
  hyper_parameters: Mapping[str, Mapping[str, Any]]
  compute: Mapping[str, float]
  labeling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  suite: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  suite_judges: Mapping[str, str] = dataclasses.field(default_factory=dict)


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


def ppo_operations(
  policy_parameters: int | float,
  reward_parameters: int | float,
  num_episodes: int,
  tokens_per_episode: int,
  num_epochs: int,
  ptx_tokens: int | float,
) -> float:
  """Operations of an RL stage.

  An episode is sampled, scored by the old and the reference policy, by the
  value and the reward model (each one forward pass), and trained on by policy
  and value model; `ptx_tokens` of text train the policy beside it.
  """
  tokens = num_episodes * tokens_per_episode
  return (
    forward_operations(3 * policy_parameters + 2 * reward_parameters, tokens)
    + training_operations(
      policy_parameters + reward_parameters, tokens * num_epochs
    )
    + training_operations(policy_parameters, ptx_tokens)
  )


def petaflop_days(operations: float) -> float:
  """10^15 operations a second for a day, the paper's unit (5.1)."""
  return operations / (1e15 * _SECONDS_PER_DAY)


def not_evaluated(figures: run_figures.Figures, facts: Facts) -> list[str]:
  """What a reader of the paper would look for and not find here."""
  missing = []
  if not facts.people:
    made = (
      'all judgements are'
      if facts.labeling
      else 'all labels and all judgements are'
    )
    missing.append(f'preferences of people: {made} by programs')
  if not figures.likert:
    missing.append('Likert ratings of overall quality')
  if not facts.suite:
    missing.append(
      'the public NLP suite (TruthfulQA, RealToxicityPrompts, Winogender, '
      'CrowS-Pairs, DROP, QuAC, SQuADv2, HellaSwag, RTE, SST, WSC, '
      'translation, summarization); `configs/nlp_suite.py` runs it'
    )
  parts = {
    'win rates by use case': figures.win_rate_by_category,
    'labels of single answers': figures.metadata,
    'pretraining loss along RL': figures.pretraining_loss,
    'reward-model accuracy': figures.reward_model,
  }
  missing += [name for name, value in parts.items() if not value]
  reward = figures.reward_model
  if reward is not None and reward.inter is None:
    missing.append('generalisation to labelers left out of training')
  return [*missing, 'misuse, dual use and attacks on the model']


def make_card(figures: run_figures.Figures, facts: Facts) -> str:
  """The text of model_card.md."""
  cell, escape, table = report.cell, report.escape, report.table
  lines = [
    f'# Model card: {escape(facts.name)}',
    '',
    'Policies trained from demonstrations and rankings as InstructGPT was '
    '(Ouyang et al. 2022). Sections follow OpenAI’s card of that model.',
    '',
    '## Details',
    '',
  ]
  lines += table(
    ['', 'this run'],
    [
      ['date', escape(facts.date)],
      ['policy', f'{facts.policy_parameters:,} parameters'],
      [
        'reward and value model',
        f'{facts.reward_parameters:,} parameters each',
      ],
      ['config', escape(figures.config_name)],
      ['seed', str(figures.seed)],
      ['commit', escape(figures.commit[:12])],
      [
        'versions',
        escape(', '.join(f'{k} {v}' for k, v in figures.versions.items())),
      ],
    ],
  )
  lines += [
    '## Use',
    '',
    'Meant for research on the method: how demonstrations, rankings and RL '
    'change a language model, at a size that a laptop trains. Not meant for '
    'advice, for decisions about people, or as anybody’s assistant: nothing '
    'here was tested for that.',
    '',
    '## Data',
    '',
    escape(facts.world),
    '',
  ]
  if figures.data_sizes:
    lines += table(
      ['data set', 'records'],
      [[escape(k), cell(v)] for k, v in figures.data_sizes.items()],
    )
  if figures.hygiene:
    lines += ['What hygiene dropped and kept (paper 3.2, A.1, A.2):', '']
    lines += table(
      ['', 'count'], [[escape(k), cell(v)] for k, v in figures.hygiene.items()]
    )
  lines += ['### Labelers', '']
  lines += _labelers(figures, facts)
  lines += ['## Training', '']
  for stage, values in facts.hyper_parameters.items():
    listed = ', '.join(f'{k} {v}' for k, v in values.items())
    lines.append(f'- **{escape(stage)}**: {escape(listed)}.')
  lines += ['', '### Compute', '']
  lines += table(
    ['stage', 'operations', 'petaflop/s-days', 'seconds'],
    [
      [
        escape(stage),
        f'{operations:.2e}',
        f'{petaflop_days(operations):.2e}',
        cell(figures.seconds[stage]) if stage in figures.seconds else '–',
      ]
      for stage, operations in facts.compute.items()
    ],
  )
  lines += [
    'By formula, padding counted: 2 operations a parameter and token forward, '
    f'6 with the backward pass. For comparison, in petaflop/s-days: '
    f'{_PAPER_COMPUTE}.',
    '',
    '## Performance',
    '',
    f'Judge: {escape(figures.judge)}. Win rates are against SFT on held-out '
    'prompts, ties one half, 95 % intervals.',
    '',
  ]
  lines += table(
    ['model', 'win rate', 'overall quality, 1 to 7', 'prompts'],
    [
      [
        escape(run_figures.label(m)),
        cell(rate),
        cell(figures.likert[m]) if m in figures.likert else '–',
        f'{rate.num_prompts:,}',
      ]
      for m, rate in run_figures.ordered(figures.win_rate)
    ],
  )
  lines += _reward_model(figures)
  lines += _tax(figures)
  lines += _suite(facts)
  lines += _limitations(figures, facts)
  lines += ['## Not evaluated', '']
  lines += [f'- {escape(text)}' for text in not_evaluated(figures, facts)]
  return '\n'.join(lines).rstrip() + '\n'


def _labelers(figures, facts) -> Sequence[str]:
  cell, escape = report.cell, report.escape
  lines = []
  if facts.labeling:
    return _labeling(facts.labeling)
  if not facts.people:
    lines += [
      'The labelers are programs with tastes and noise of their own, not '
      'people: their agreement and biases were written, not found.',
      '',
    ]
  rows = [[escape(k), cell(v)] for k, v in figures.labelers.items()]
  reward = figures.reward_model
  if reward is not None:
    for name, value in (
      ('agreement between training labelers', reward.agreement),
      ('agreement between held-out labelers', reward.agreement_heldout),
    ):
      if value is not None:
        rows.append([name, cell(value)])
    rows.append(['in the paper', '72.6 ± 1.5 % and 77.3 ± 1.3 %'])
  return lines + (report.table(['', ''], rows) if rows else [])


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


def _suite(facts) -> Sequence[str]:
  if not facts.suite:
    return []
  models = list(dict.fromkeys(m for row in facts.suite.values() for m in row))
  lines = [
    'Public NLP suite (paper, Table 14), 95 % intervals by item:',
    '',
    *report.table(
      ['task', *(report.escape(run_figures.label(m)) for m in models)],
      [
        [
          report.escape(task),
          *(report.cell(row[m]) if m in row else '–' for m in models),
        ]
        for task, row in facts.suite.items()
      ],
    ),
  ]
  for task, judge in facts.suite_judges.items():
    lines += [f'{report.escape(task)} is judged by {report.escape(judge)}.', '']
  return lines


def _reward_model(figures) -> Sequence[str]:
  reward = figures.reward_model
  if reward is None:
    return []
  rows = [
    [label, report.cell(value)]
    for label, value in run_figures.reward_rows(reward)
  ]
  if reward.ceiling is not None:
    rows.append(
      ['the best achievable on the same pairs', report.cell(reward.ceiling)]
    )
  return ['Reward model:', '', *report.table(['share of pairs', ''], rows)]


def _tax(figures) -> Sequence[str]:
  loss = figures.pretraining_loss
  if loss is None:
    return []
  rows = [
    [label, report.cell(value)]
    for label, value in (
      ('RL initialisation', loss.init),
      ('PPO', loss.ppo),
      ('PPO-ptx', loss.ppo_ptx),
    )
    if value is not None
  ]
  return [
    'Loss on held-out pretraining text, nats a token (the alignment tax):',
    '',
    *report.table(['', ''], rows),
  ]


def _limitations(figures, facts) -> Sequence[str]:
  """Of the model, from its own figures; of the method, from the paper."""
  lines = ['## Limitations', '', '### Of this model', '']
  for model, rates in run_figures.ordered(figures.metadata):
    if model in run_figures.RL_MODELS and rates:
      listed = ', '.join(
        f'{name.replace("_", " ")} {100 * share.mean:.1f} % '
        f'({100 * share.low:.1f} to {100 * share.high:.1f})'
        for name, share in rates.items()
      )
      lines.append(
        f'- Share of {report.escape(run_figures.label(model))} answers by '
        f'label: {report.escape(listed)}.'
      )
  lines += [
    f'- Alarm in training: {report.escape(alarm)}' for alarm in figures.alarms
  ]
  reward = figures.reward_model
  if reward is not None and reward.ceiling is not None:
    gap = 100 * (reward.ceiling - reward.accuracy.accuracy)
    lines.append(
      f'- The reward model orders {gap:.1f} points fewer pairs correctly than '
      'the labels allow; RL optimises its errors too.'
    )
  worst = [
    (rate.rate, model, category, rate)
    for model, by_category in figures.win_rate_by_category.items()
    if model in run_figures.RL_MODELS
    for category, rate in by_category.items()
    if rate.high < 0.5
  ]
  for _, model, category, rate in sorted(worst)[:5]:
    lines.append(
      f'- {report.escape(run_figures.label(model))} is worse than SFT at '
      f'{report.escape(category)}: {report.cell(rate)}.'
    )
  lines += ['', '### Of the method', '']
  if not facts.people:
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
