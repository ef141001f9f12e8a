"""Figures of made-up models, for the tests of reports, plots and cards."""

import math

import numpy as np

from instruct_jax.evals import figures, judges, preferences
from instruct_jax.evals import preference_accuracy as preference
from instruct_jax.evals import samples as samples_lib
from instruct_jax.evals.win_rate import Interval

PLOTS = {
  'win_rate.png',
  'metadata.png',
  'reward_kl.png',
  'pretraining_loss.png',
  'rl.png',
  'reward_model.png',
  'sft.png',
}
MODELS = ('base', 'sft', 'my_fork', 'other fork')
# Of a model, in Markdown and in HTML.
HOSTILE = (
  'a | b | c\n| --- | --- |\r\n<script>alert(1)</script> <img src=x> '
  '[click](http://evil.example) ![i](javascript:x) `code` **bold** _it_ ~~s~~ '
  '&lt; # head www.evil.example mail@evil.example $x$ \\| \x1b[31m \u202egnp'
)


def rates(rate, half=0.02, prompts=100):
  return preferences.Rates(
    rate, rate - half, rate + half, prompts, num_judgements=prompts
  )


def outcomes(found, by_category=None, baseline='sft'):
  """`preferences.Outcomes` of model -> `rates`."""
  others = [name for name in found if name != baseline]
  even = Interval(0.0, -0.1, 0.1, 100)
  return preferences.Outcomes(
    rates=found,
    by_category=by_category or {},
    length_controlled=preferences.LengthControlled(
      {name: Interval(0.5, 0.4, 0.6, 100) for name in others}, even
    ),
    bradley_terry=dict.fromkeys(found, even),
    pairs={
      (name, baseline): preferences.Versus(
        found[name], preferences.Power(0.6, 0.5, 100, 97, 197), None
      )
      for name in others
    },
    first_place=None,
  )


def minimal(**changes):
  """A model against the baseline, and nothing else."""
  values = {
    'title': 'A run',
    'command': 'python -m instruct_jax.main',
    'seed': 3,
    'commit': 'abc',
    'versions': {'jax': '0.1'},
    'models': ('sft', 'my_fork'),
    'baseline': 'sft',
    'judge': 'gold utility; simulated, not people',
    'outcomes': outcomes({'sft': rates(0.5, 0.0), 'my_fork': rates(0.6)}),
  }
  return figures.Figures(**(values | changes))


def rl_rows(slope):
  """Twelve iterations of a metrics.jsonl."""
  rows = []
  for step in range(12):
    row = {
      'step': step,
      'objective/kl': 0.5 * step,
      'objective/score': math.log1p(step),
      'objective/length': 12.0,
      'objective/ended': 0.9,
      'ppo/policy/entropy': 2 - 0.1 * step,
      'ppo/policy/clipfrac': None if step == 0 else 0.1,
    }
    if step % 4 == 0:
      row['eval/pretraining_loss'] = 3 + slope * step
    rows.append(row)
  return rows


def samples():
  """Three prompts with an answer of each model."""
  recorded = [
    samples_lib.Sample(
      model=model,
      prompt_id=str(i),
      prompt=f'prompt {i}',
      response=HOSTILE if model == 'my_fork' else '',
      num_tokens=3,
      ended=model != 'base',
      category='chat',
      score_judge=0.5,
    )
    for i in range(3)
    for model in MODELS
  ]
  return samples_lib.side_by_side(recorded, MODELS, 3)


def full(**changes):
  """All that can be measured."""
  ranked = figures.Rankings(
    accuracies={
      'reward model': preference.Accuracy(0.7, 0.65, 0.75, 300, 0.6),
      'judge': preference.Accuracy(0.73, 0.7, 0.76, 300, 0.57),
    },
    gaps={
      'judge': Interval(-0.03, -0.05, -0.01, 100),
      'length only': Interval(0.01, -0.02, 0.04, 100),
    },
    agreement=preference.Agreement(0.72, 0.7, 0.74, 200),
  )
  values = {
    'models': MODELS,
    'outcomes': outcomes(
      {name: rates(0.1 + 0.2 * i) for i, name in enumerate(MODELS)}
      | {'sft': rates(0.5, 0.0)},
      {'my_fork': {'chat': rates(0.6, 0.2, 20)}},
    ),
    'ratings': {
      model: {
        judges.LIKERT: Interval(2.0 + i, 1.5 + i, 2.5 + i, 100),
        'hallucination': Interval(0.1, 0.08, 0.12, 100),
        'costs $5 and $6': Interval(0.5, 0.4, 0.6, 100),
      }
      for i, model in enumerate(MODELS)
    },
    'ratings_by_category': {
      'chat': {'my_fork': {judges.LIKERT: Interval(4.25, 4.0, 4.5, 20)}}
    },
    'everyone': {model: {'judge': 0.5} for model in (*MODELS, 'start')},
    'rl_metrics': {'my_fork': rl_rows(0.1), 'other fork': rl_rows(0.01)},
    'reference': 'start',
    'kl': {
      'my_fork': {'signed mean': 5.5, 'k3': 6.5},
      'other fork': {'signed mean': np.float64(4.5), 'k3': 5.0},
    },
    'text_loss': {
      'start': Interval(3.0, 2.9, 3.1, 50),
      'my_fork': Interval(4.0, 3.9, 4.1, 50),
      'other fork': Interval(3.1, 3.0, 3.2, 50),
    },
    'text_loss_difference': {
      'my_fork': Interval(1.0, 0.9, 1.1, 50),
      'other fork': Interval(0.1, -0.1, 0.3, 50),
      'other fork – my_fork': Interval(-0.9, -1.0, -0.8, 50),
    },
    'reward_model': figures.RewardFigures(
      rankings={'labelers': ranked},
      ceiling=0.73,
      intra=preference.Spread(0.71, 0.01, 5),
      inter=preference.Spread(0.69, None, 1),
      curve=[{'step': i, 'reward/loss': 0.7} for i in range(5)],
    ),
    'epochs': {
      'sft': figures.Epochs(
        [
          {'epoch': 1, 'valid_loss': 2.0, 'score_reward': 0.1},
          {'epoch': 2, 'valid_loss': 2.1, 'score_reward': 0.3},
        ],
        2,
        'reward-model score',
      )
    },
    'samples': samples(),
    'hygiene': {'too long': 4},
    'data_sizes': {'demonstrations_train': 1200},
    'seconds': {'sft': 1.5},
    'alarms': ['length drift | 10 -> 30'],
    'tables': {
      'Slots and BLEU': {
        'sft': {'BLEU': Interval(50.0, 45.0, 55.0, 9), 'realised': 0.9},
        'people': {'realised': 0.95},
      }
    },
    'world': figures.World('A made-up world.', has_people=False),
    'parameters': dict.fromkeys(MODELS, 1_000_000),
    'trained': {
      'my_fork': figures.Training(
        {'kl_coef': 0.02, 'num_episodes': 256}, 8.64e19
      )
    },
  }
  return minimal(**(values | changes))
