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
  """The data that the models learned from.

  Attributes:
    about: a sentence or two for the model card.
    has_people: whether people labeled them; otherwise programs did.
    label_fn: (prompt, answer) -> label -> whether it holds; or None.
    tables_fn: (prompts, model -> answer to each of them) -> title -> rows of a
      further table; or None.
  """

  about: str
  has_people: bool
  label_fn: _LabelFn | None = None
  tables_fn: _TablesFn | None = None


@dataclasses.dataclass(frozen=True)
class Epochs:
  """Supervised training of one model, by epoch.

  Attributes:
    rows: each with `epoch` from 1, `valid_loss` (nats per response token) and
      perhaps `score_reward` (mean reward-model score of samples).
    selected: the epoch of the model, or None.
    selected_by: the criterion, or ''.
  """

  rows: Sequence[Mapping[str, Any]]
  selected: int | None = None
  selected_by: str = ''


@dataclasses.dataclass(frozen=True)
class Rankings:
  """How several scorers order the pairs of one set of rankings.

  Attributes:
    accuracies: the reward model, the judge and trivial judges -> share of the
      pairs ordered as by the labelers (paper 4.1).
    agreement: of its labelers with one another (3.4), or None.
  """

  accuracies: Mapping[str, preference_accuracy.Accuracy]
  agreement: preference_accuracy.Agreement | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardFigures:
  """How well the reward model orders pairs (paper 3.4, 4.1, E.2).

  Attributes:
    rankings: set of rankings -> its accuracies; `accuracy` is of the first.
    scorer: name of the reward model among the scorers.
    ceiling: the largest share of the first set's pairs that label noise
      allows, or None if it is not known.
    intra: cross-validation, validation data of labelers trained on.
    inter: cross-validation, labelers of the group left out.
    curve: rows of the stage's metrics.jsonl with 'step' and any of
      'reward/loss' (nats) and 'reward/accuracy'.
  """

  rankings: Mapping[str, Rankings]
  scorer: str = 'reward model'
  ceiling: float | None = None
  intra: preference_accuracy.Spread | None = None
  inter: preference_accuracy.Spread | None = None
  curve: Sequence[MetricsRow] = ()

  @property
  def accuracy(self) -> preference_accuracy.Accuracy:
    return next(iter(self.rankings.values())).accuracies[self.scorer]

  @property
  def agreement(self) -> preference_accuracy.Agreement | None:
    return next(iter(self.rankings.values())).agreement

  def rows(self) -> list[tuple[str, Any]]:
    """(what was measured, figure) of all that was measured."""
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
  """How a stage trained, for the model card.

  Attributes:
    settings: key of its config -> value.
    operations: floating-point operations by formula, or None.
  """

  settings: Mapping[str, Any]
  operations: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
  """The whole content of a report.

  Attributes:
    commit: git commit of the code, or 'unknown'.
    models: those with columns, in order; the baseline is one of them.
    baseline: the model that the others are compared with.
    judge: who compared the answers, and that it is no person if it is none.
    unit: of the judge's scores, a word for headings.
    has_places: whether the judge saw both answers at once.
    outcomes: of the judge's verdicts.
    alarms: what went wrong or is suspicious, one sentence each.
    everyone: any model that was asked -> column -> figure.
    ratings: model -> `judges.LIKERT` or label (Table 3) -> mean, clustered by
      prompt.
    ratings_by_category: use case -> the same.
    rl_metrics: model -> rows of the metrics.jsonl of its RL stage, one an
      iteration, with 'step' and any of 'objective/score', 'objective/kl'
      (nats per response), 'eval/pretraining_loss' (nats per token), ...
    reference: the model that KL and losses are measured from, or ''.
    kl: model -> 'signed mean', 'k3': KL to the reference, nats per response.
    text_loss: model -> loss on held-out pretraining text, nats per token.
    text_loss_difference: model -> its loss minus the reference's, or 'a – b' ->
      the difference of two, paired by row.
    reward_model: accuracies and agreement.
    epochs: model -> its supervised training by epoch.
    prefixes: prompted model -> few-shot prefix -> score, and if it was chosen.
    suite: public task, prompt and metric -> model -> figure.
    suite_judges: task -> who judged its answers, if no rule can.
    tables: further tables, title -> rows.
    prompts: counts of the prompts that were given, dropped, asked.
    settings: key of sampling -> value.
    asked: model -> how it was asked -> figure or text.
    asking: counts of the judge's verdicts, and their cost.
    samples: prompts with each model's answer, from `samples.side_by_side`.
    more_samples: the same, but a larger number, for report.html's filters.
    world: of the data, or None.
    trained: stage -> how it trained.
    seconds: stage -> wall-clock seconds, in running order.
    hygiene: reason of data hygiene -> records dropped (paper A.1, A.2).
    labeling: content of the labeling site's statistics.json beside the reward
      model's rankings; {} without one.
  """

  title: str
  command: str
  seed: int
  commit: str
  versions: Mapping[str, str]
  models: Sequence[str]
  baseline: str
  judge: str
  unit: str = 'judge'
  has_places: bool = False
  outcomes: preferences.Outcomes
  alarms: Sequence[str] = ()
  everyone: Rows = _none()
  ratings: _Intervals = _none()
  ratings_by_category: Mapping[str, _Intervals] = _none()
  rl_metrics: Mapping[str, Sequence[MetricsRow]] = _none()
  reference: str = ''
  kl: Mapping[str, Mapping[str, win_rate.Number]] = _none()
  text_loss: Mapping[str, win_rate.Interval] = _none()
  text_loss_difference: Mapping[str, win_rate.Interval] = _none()
  reward_model: RewardFigures | None = None
  epochs: Mapping[str, Epochs] = _none()
  prefixes: Mapping[str, Rows] = _none()
  suite: _Intervals = _none()
  suite_judges: Mapping[str, str] = _none()
  tables: Mapping[str, Rows] = _none()
  prompts: Mapping[str, int] = _none()
  settings: Mapping[str, Cell] = _none()
  asked: Rows = _none()
  asking: Mapping[str, Cell] = _none()
  samples: Sequence[samples_lib.Row] = ()
  more_samples: Sequence[samples_lib.Row] = ()
  world: World | None = None
  parameters: Mapping[str, int] = _none()
  trained: Mapping[str, Training] = _none()
  seconds: Mapping[str, win_rate.Number] = _none()
  data_sizes: Mapping[str, int] = _none()
  hygiene: Mapping[str, Cell] = _none()
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
