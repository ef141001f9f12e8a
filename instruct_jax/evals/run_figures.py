"""What a report shows, as plain data: what a run hands to its report.

The evaluation stage fills in `Figures`; `report.py` writes it down and
`plots.py` draws it. Parts of a run that did not happen stay at their defaults.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

# Aliases: `Figures` has fields named after these two.
from instruct_jax.evals import preference_accuracy
from instruct_jax.evals import samples as samples_lib
from instruct_jax.evals import win_rate as win_rate_lib

# A line of metrics.jsonl; null where a figure was not finite.
MetricsRow = Mapping[str, Any]
# What a two-column table of the report may hold.
Cell = win_rate_lib.Number | str

MODELS = ('pretrained', 'prompted', 'sft', 'ppo', 'ppo_ptx')
LABELS = {
  'pretrained': 'GPT',
  'prompted': 'GPT (prompted)',
  'sft': 'SFT',
  'ppo': 'PPO',
  'ppo_ptx': 'PPO-ptx',
  'rl_init': 'RL initialisation',
  'ppo_policy': 'PPO, last weights',
  'ppo_ptx_policy': 'PPO-ptx, last weights',
  'ppo_ema': 'PPO, averaged weights',
  'ppo_ptx_ema': 'PPO-ptx, averaged weights',
}
RL_MODELS = ('ppo', 'ppo_ptx')
SECTIONS = (
  'alarms',
  'categories',
  'metadata',
  'kl',
  'pretraining_loss',
  'rl',
  'reward_model',
  'sft',
  'samples',
  'hygiene',
  'labelers',
  'data_sizes',
)


@dataclasses.dataclass(frozen=True)
class SftEpoch:
  """Validation figures after one SFT epoch; None where not measured.

  Attributes:
    epoch: from 1.
    valid_loss: nats per response token.
    score_reward: mean reward-model score of samples, reward units.
    score_gold: mean score by the judge.
  """

  epoch: int
  valid_loss: float
  score_reward: float | None = None
  score_gold: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardFigures:
  """How well the reward model orders pairs (paper 3.4, 4.1, E.2).

  Attributes:
    accuracy: on held-out comparisons.
    ceiling: accuracy of the gold utility on the same pairs; None for people.
    intra: cross-validation, validation data of labelers trained on.
    inter: cross-validation, labelers of the group left out.
    agreement: between training labelers.
    agreement_heldout: between held-out labelers.
    curve: rows of the stage's metrics.jsonl with 'step' and any of
      'reward/loss' (nats) and 'reward/accuracy'.
  """

  accuracy: preference_accuracy.Accuracy
  ceiling: float | None = None
  intra: preference_accuracy.Spread | None = None
  inter: preference_accuracy.Spread | None = None
  agreement: preference_accuracy.Agreement | None = None
  agreement_heldout: preference_accuracy.Agreement | None = None
  curve: Sequence[MetricsRow] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainingLoss:
  """Loss on held-out pretraining text, nats per token (paper 4.2).

  Attributes:
    init: the model that starts RL and is the KL reference.
    ppo, ppo_ptx: after RL.
    difference: PPO-ptx minus PPO, paired by document; negative when the
      pretraining gradients helped.
  """

  init: win_rate_lib.Interval
  ppo: win_rate_lib.Interval | None = None
  ppo_ptx: win_rate_lib.Interval | None = None
  difference: win_rate_lib.Interval | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
  """All that a report shows. Parts left at their default are left out.

  Attributes:
    title: heading of the report.
    command: what was typed.
    config_name: name of the config, say 'ppo_ptx:smoke'.
    seed: root seed of the run.
    commit: git commit of the code, or 'unknown'.
    versions: package -> version.
    seconds: stage -> wall-clock seconds, in running order.
    judge: who compared the answers, and that it is no person where it is not.
    win_rate: model (of `MODELS`) -> win rate against SFT.
    win_rate_by_category: model -> use case -> win rate against SFT.
    metadata: model -> Table 3 label -> share of answers in [0, 1], clustered by
      prompt.
    likert: model -> mean overall quality, 1 to 7, clustered by prompt.
    likert_by_category: model -> use case -> the same.
    rl_metrics: 'ppo', 'ppo_ptx' -> rows of metrics.jsonl, one an iteration,
      with 'step' and any of 'objective/score', 'objective/kl' (nats per
      response), 'eval/pretraining_loss' (nats per token), 'eval/gold', ...
    kl: 'ppo', 'ppo_ptx' -> mean KL to the RL initialisation at the end, nats
      per response.
    pretraining_loss: before and after RL.
    reward_model: accuracies and agreement.
    sft_epochs: one per epoch.
    sft_selected_epoch: the epoch that later stages use.
    sft_selected_by: why that one, say 'reward-model score'.
    samples: prompts with each model's answer, from `samples.side_by_side`.
    more_samples: the same, more of them, for report.html's filters.
    score_name: the unit of the samples' gold scores, for the table's heading.
    hygiene: what data hygiene dropped -> count (paper A.1, A.2).
    labelers: statement about the labelers -> figure or text.
    data_sizes: data set -> number of records.
    alarms: what went wrong or looks wrong, one sentence each.
    extra: further tables: title -> row -> value, or -> column -> value.
    reasons: section (of `SECTIONS`) -> why it has no data.
  """

  title: str
  command: str
  config_name: str
  seed: int
  commit: str
  versions: Mapping[str, str]
  seconds: Mapping[str, win_rate_lib.Number]
  judge: str
  win_rate: Mapping[str, win_rate_lib.WinRate]
  win_rate_by_category: Mapping[str, Mapping[str, win_rate_lib.WinRate]] = (
    dataclasses.field(default_factory=dict)
  )
  metadata: Mapping[str, Mapping[str, win_rate_lib.Interval]] = (
    dataclasses.field(default_factory=dict)
  )
  likert: Mapping[str, win_rate_lib.Interval] = dataclasses.field(
    default_factory=dict
  )
  likert_by_category: Mapping[str, Mapping[str, win_rate_lib.Interval]] = (
    dataclasses.field(default_factory=dict)
  )
  rl_metrics: Mapping[str, Sequence[MetricsRow]] = dataclasses.field(
    default_factory=dict
  )
  kl: Mapping[str, win_rate_lib.Number] = dataclasses.field(
    default_factory=dict
  )
  pretraining_loss: PretrainingLoss | None = None
  reward_model: RewardFigures | None = None
  sft_epochs: Sequence[SftEpoch] = ()
  sft_selected_epoch: int | None = None
  sft_selected_by: str = ''
  samples: Sequence[samples_lib.Row] = ()
  more_samples: Sequence[samples_lib.Row] = ()
  score_name: str = 'gold'
  hygiene: Mapping[str, Cell] = dataclasses.field(default_factory=dict)
  labelers: Mapping[str, Cell] = dataclasses.field(default_factory=dict)
  data_sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  alarms: Sequence[str] = ()
  extra: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)


def label(name: str) -> str:
  """A model as the paper names it, or any other key as words."""
  return LABELS[name] if name in LABELS else name.replace('_', ' ')


def ordered(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
  """(model, value) in the order of `MODELS`; other keys follow as they came."""
  names = [model for model in MODELS if model in values]
  names += [name for name in values if name not in MODELS]
  return [(name, values[name]) for name in names]


def row_names(values: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """The inner keys of all models, each once, in the order of first sight."""
  return list(dict.fromkeys(name for _, row in ordered(values) for name in row))


def reward_rows(reward: RewardFigures) -> list[tuple[str, Any]]:
  """(what was measured, figure) of all that was measured."""
  rows = [
    ('accuracy on held-out comparisons', reward.accuracy),
    ('cross-validation, labelers trained on (intra)', reward.intra),
    ('cross-validation, labelers left out (inter)', reward.inter),
    ('agreement between training labelers', reward.agreement),
    ('agreement between held-out labelers', reward.agreement_heldout),
  ]
  return [row for row in rows if row[1] is not None]
