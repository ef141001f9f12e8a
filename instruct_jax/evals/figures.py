"""The content of a report, as plain data.

`jobs/evaluate.py` fills in `Figures`; `sections.py`, `plots.py`, `report.py`
and `model_card.py` show it. Models have the names and the order of the config.
Fields that were not measured keep their defaults.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from instruct_jax.data import records

# Aliases: `Figures` has fields named after these.
from instruct_jax.evals import (
  judges,
  preference_accuracy,
  preferences,
  win_rate,
)
from instruct_jax.evals import samples as samples_lib

# A line of metrics.jsonl; null if a figure was not finite.
MetricsRow = Mapping[str, Any]
# A number, interval, `sections.Shown`, text or None.
Cell = Any
# Row -> column -> cell.
Rows = Mapping[str, Mapping[str, Cell]]
# Model -> name -> interval.
_Intervals = Mapping[str, Mapping[str, win_rate.Interval]]
_LabelFn = Callable[[records.Prompt, str], Mapping[str, bool]]
_TablesFn = Callable[
  [Sequence[records.Prompt], Mapping[str, Sequence[str]]], Mapping[str, Rows]
]


def _none() -> Any:
  """The default of a mapping that may be empty."""
  return dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class World:
  """The data that the models learned from."""

  about: str  # A sentence or two for the model card.
  has_people: bool  # Whether people labeled it; otherwise programs did.
  # (Prompt, answer) -> label -> whether it holds.
  label_fn: _LabelFn | None = None
  # (Prompts, model -> answer to each) -> title -> rows of a further table.
  tables_fn: _TablesFn | None = None


@dataclasses.dataclass(frozen=True)
class Epochs:
  """Supervised training of one model, by epoch."""

  # Each with `epoch` from 1, `valid_loss` (nats per response token) and perhaps
  # `score_reward` (mean reward-model score of samples).
  rows: Sequence[Mapping[str, Any]]
  selected: int | None = None  # The epoch of the model.
  selected_by: str = ''  # The criterion.


@dataclasses.dataclass(frozen=True)
class Rankings:
  """How well scorers and labelers order the pairs of one set of rankings."""

  # Share of the pairs ordered as by the labelers (paper 4.1), by scorer: the
  # reward model, the judge and trivial judges.
  accuracies: Mapping[str, preference_accuracy.Accuracy]
  # Accuracy of the reward model minus that of each other scorer, paired.
  gaps: Mapping[str, win_rate.Interval] = _none()
  # Agreement of its labelers with one another (3.4).
  agreement: preference_accuracy.Agreement | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardFigures:
  """How well the reward model orders pairs (paper 3.4, 4.1, E.2)."""

  rankings: Mapping[str, Rankings]  # By set; `accuracy` is of the first.
  scorer: str = 'reward model'  # Its name among the scorers.
  # The largest share of the first set's pairs that label noise allows, or None.
  ceiling: float | None = None
  # Cross-validation: on the labelers trained on, and on the group left out.
  intra: preference_accuracy.Spread | None = None
  inter: preference_accuracy.Spread | None = None
  # Rows of the stage's metrics.jsonl with 'step' and any of 'reward/loss'
  # (nats) and 'reward/accuracy'.
  curve: Sequence[MetricsRow] = ()

  @property
  def accuracy(self) -> preference_accuracy.Accuracy:
    """Accuracy on the first set."""
    return next(iter(self.rankings.values())).accuracies[self.scorer]

  @property
  def agreement(self) -> preference_accuracy.Agreement | None:
    """Agreement of the people who ranked the first set, if several did."""
    return next(iter(self.rankings.values())).agreement

  def rows(self) -> list[tuple[str, Any]]:
    """(name, figure) of everything that was measured."""
    rows = [
      *(
        (f'accuracy, {name}', found.accuracies[self.scorer])
        for name, found in self.rankings.items()
      ),
      ('cross-validation, labelers trained on (intra)', self.intra),
      ('cross-validation, labelers left out (inter)', self.inter),
      *(
        (f'agreement of labelers, {name}', found.agreement)
        for name, found in self.rankings.items()
      ),
    ]
    return [row for row in rows if row[1] is not None]


@dataclasses.dataclass(frozen=True)
class Training:
  """How a stage trained, for the model card."""

  settings: Mapping[str, Any]  # Keys of its config.
  operations: float | None  # Floating-point operations by formula.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
  """The whole content of a report."""

  title: str
  command: str
  seed: int  # Of the evaluation.
  commit: str  # Of the code, or 'unknown'.
  versions: Mapping[str, str]  # By package.
  models: Sequence[str]  # Those with columns, in order.
  baseline: str  # One of them; the others are compared with it.
  judge: str  # Who compared the answers; says so if that is not a person.
  unit: str = 'judge'  # Unit of the judge's scores, for headings.
  has_places: bool = False  # Whether the judge saw both answers at once.
  outcomes: preferences.Outcomes
  alarms: Sequence[str] = ()  # One sentence each.
  everyone: Rows = _none()  # Any model that was asked -> column -> figure.
  # Model -> `judges.LIKERT` or label (Table 3) -> mean, clustered by prompt.
  ratings: _Intervals = _none()
  ratings_by_category: Mapping[str, _Intervals] = _none()  # By use case.
  # Model -> rows of the metrics.jsonl of its RL stage, one per iteration, with
  # 'step' and any of 'objective/score', 'objective/kl' (nats per response),
  # 'eval/pretraining_loss' (nats per token), ...
  rl_metrics: Mapping[str, Sequence[MetricsRow]] = _none()
  reference: str = ''  # The model that KL and losses are relative to.
  # Model -> 'signed mean', 'k3': KL to the reference, nats per response.
  kl: Mapping[str, Mapping[str, win_rate.Number]] = _none()
  # Model -> loss on held-out pretraining text, nats per token.
  text_loss: Mapping[str, win_rate.Interval] = _none()
  # Model -> its loss minus the reference's, or 'a – b' -> the difference of
  # two, paired by row.
  text_loss_difference: Mapping[str, win_rate.Interval] = _none()
  # The same on other held-out text: its kind -> model -> loss.
  other_text_loss: _Intervals = _none()
  other_text_loss_difference: _Intervals = _none()
  reward_model: RewardFigures | None = None
  epochs: Mapping[str, Epochs] = _none()  # By model.
  # Prompted model -> few-shot prefix -> score, and whether it was chosen.
  prefixes: Mapping[str, Rows] = _none()
  suite: _Intervals = _none()  # Public task, prompt and metric -> model.
  suite_judges: Mapping[str, str] = _none()  # For tasks that no rule can judge.
  tables: Mapping[str, Rows] = _none()  # Further tables, by title.
  prompts: Mapping[str, int] = _none()  # Counts: given, dropped, asked.
  settings: Mapping[str, Cell] = _none()  # Of sampling.
  asked: Rows = _none()  # Model -> how it was asked -> figure or text.
  asking: Mapping[str, Cell] = _none()  # Counts of verdicts, and their cost.
  # Prompts with each model's answer, from `samples.side_by_side`;
  # `more_samples` has a larger number of them, for report.html's filters.
  samples: Sequence[samples_lib.Row] = ()
  more_samples: Sequence[samples_lib.Row] = ()
  world: World | None = None
  parameters: Mapping[str, int] = _none()  # Number of parameters, by model.
  trained: Mapping[str, Training] = _none()  # By stage.
  seconds: Mapping[str, win_rate.Number] = _none()  # By stage, in run order.
  data_sizes: Mapping[str, int] = _none()  # Records by data set.
  # Reason of data hygiene -> records dropped (paper A.1, A.2).
  hygiene: Mapping[str, Cell] = _none()
  # statistics.json of the labeling site, beside the reward model's rankings.
  labeling: Mapping[str, Any] = _none()

  def labels(self) -> dict[str, dict[str, win_rate.Interval]]:
    """Model -> label -> share, of `ratings`, in the order of the models."""
    found = {
      model: {k: v for k, v in ratings.items() if k != judges.LIKERT}
      for model in self.models
      if (ratings := self.ratings.get(model, {}))
    }
    return {model: shares for model, shares in found.items() if shares}

  def likert(self) -> dict[str, win_rate.Interval]:
    """Model -> mean overall quality, of `ratings`."""
    return {
      model: self.ratings[model][judges.LIKERT]
      for model in self.models
      if judges.LIKERT in self.ratings.get(model, ())
    }


def row_names(values: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """The inner keys, each once, in the order of first appearance."""
  return list(dict.fromkeys(name for row in values.values() for name in row))
