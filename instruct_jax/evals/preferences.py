"""Preferences between models: rates, length control, ratings, power.

All figures come from `Judgement`s: a judge's view of two models' answers to one
prompt, shown in both orders. The paper says neither how its intervals are made
nor how ties count (3.6). Here ties count one half, every prompt has weight 1
however many people judged it, and intervals resample whole clusters: prompts,
or labelers if there are several.

Runs on the host in NumPy, float64.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from instruct_jax.evals import win_rate

# Weak ridge on logistic coefficients, per squared nat: it keeps the rating of a
# model that wins or loses everything finite, and is negligible from about 100
# judgements on.
_RIDGE = 0.01
_MAX_NEWTON_STEPS = 60
# Standard normal quantile of 0.8, for the power note.
_Z_POWER = 0.841621
# Bootstrap refits of the logistic models.
_NUM_REFITS = 300


@dataclasses.dataclass(frozen=True)
class Order:
  """A judge's verdict on a pair in one order; see `judges.Verdict`."""

  first: str  # The model whose answer was shown first.
  preference: float | None
  raw: str = ''


@dataclasses.dataclass(frozen=True)
class Judgement:
  """One judge's view of two models' answers to one prompt."""

  prompt_id: str
  category: str  # Use case of the prompt, or ''.
  model: str
  other: str
  # 1 if `model` is preferred, 0 if `other` is, one half for ties; None if an
  # order is missing or could not be parsed. Rates and ratings take only
  # judgements with an outcome.
  outcome: float | None
  log_length_ratio: float  # log(tokens of model / tokens of other).
  labeler: str = ''
  contradicts: bool = False  # The two orders prefer different answers.
  orders: tuple[Order, ...] = ()  # The verdicts as asked, then swapped.


@dataclasses.dataclass(frozen=True)
class Rates:
  """How often a model is preferred to another, ties one half.

  The interval resamples prompts; that of `by_labeler` resamples labelers.
  `by_labeler` is None with fewer than two labelers or if some judgement names
  none.
  """

  rate: float
  low: float
  high: float
  num_prompts: int
  by_labeler: win_rate.Interval | None = None
  num_judgements: int = 0


@dataclasses.dataclass(frozen=True)
class Power:
  """How many prompts it takes to distinguish a rate from one half."""

  rate: float  # Mean outcome over prompts.
  deviation: float  # Standard deviation of a prompt's outcome.
  num_prompts: int  # Behind both.
  # Prompts at which a 95 % interval would just exclude one half at the same
  # rate; None if the rate is exactly one half.
  to_separate: int | None
  # Prompts at which it would do so in 80 % of the repetitions.
  for_power: int | None


def both_orders(first: float, swapped: float) -> tuple[float, bool]:
  """(outcome for the first answer, whether the orders contradict).

  Both arguments are preferences for the answer shown first, so the outcome is
  the mean of `first` and 1 - `swapped`. A judge that always takes what it sees
  first yields one half and a contradiction.
  """
  return (first + 1 - swapped) / 2, (first - 0.5) * (0.5 - swapped) < 0


def length_ratio(num_tokens: int, num_other: int) -> float:
  """log(tokens / tokens of the other); an empty answer counts as one token."""
  return math.log(max(num_tokens, 1) / max(num_other, 1))


def against(
  judgements: Sequence[Judgement], baseline: str
) -> dict[str, list[Judgement]]:
  """Judgements against the baseline, by model, with it as `other`.

  Raises:
    ValueError: the baseline was never judged.
  """
  found = collections.defaultdict(list)
  for judgement in judgements:
    if judgement.other == baseline:
      found[judgement.model].append(judgement)
    elif judgement.model == baseline:
      turned = dataclasses.replace(
        judgement,
        model=judgement.other,
        other=baseline,
        outcome=1 - judgement.outcome,
        log_length_ratio=-judgement.log_length_ratio,
      )
      found[turned.model].append(turned)
  if not found:
    raise ValueError(
      f'no judgement of the baseline {baseline!r}; judged were '
      f'{sorted({n for j in judgements for n in (j.model, j.other)})}'
    )
  return dict(found)


def rates(judgements: Sequence[Judgement], num_bootstrap: int = 2000) -> Rates:
  """Mean outcome of one model against one other; every prompt has weight 1.

  Raises:
    ValueError: no judgement.
  """
  if not judgements:
    raise ValueError('no judgement to average')
  weights = _prompt_weights(judgements)
  outcomes = [judgement.outcome for judgement in judgements]
  labelers = [judgement.labeler for judgement in judgements]

  def interval(clusters):
    return win_rate.mean_interval(
      outcomes, clusters, weights=weights, num_bootstrap=num_bootstrap
    )

  by_prompt = interval([judgement.prompt_id for judgement in judgements])
  # A nameless judgement may be one person's or many people's.
  has_labelers = len(set(labelers)) > 1 and all(labelers)
  return Rates(
    by_prompt.mean,
    by_prompt.low,
    by_prompt.high,
    by_prompt.num_clusters,
    by_labeler=interval(labelers) if has_labelers else None,
    num_judgements=len(judgements),
  )


@dataclasses.dataclass(frozen=True)
class FirstPlace:
  """How often a judge prefers what it sees first; one half without bias."""

  # Share of the verdicts for the answer shown first, ties one half, over both
  # orders of each pair; resampled by prompt.
  rate: win_rate.Interval
  ties: float  # Share of the verdicts.
  contradictions: float  # Share of the judgements.
  num_verdicts: int  # Two for each judgement.

  @property
  def is_biased(self) -> bool:
    """Whether the interval excludes one half."""
    return not self.rate.low <= 0.5 <= self.rate.high


def first_place(
  judgements: Sequence[Judgement], num_bootstrap: int = 2000
) -> FirstPlace | None:
  """How often the answer shown first wins, over both orders of each pair.

  Each answer is shown first once, so their quality does not matter. None if no
  judgement keeps its two verdicts.
  """
  kept = [j for j in judgements if j.outcome is not None and len(j.orders) == 2]
  if not kept:
    return None
  verdicts = np.array([[o.preference for o in j.orders] for j in kept])
  return FirstPlace(
    rate=win_rate.mean_interval(
      verdicts.mean(axis=1),
      [j.prompt_id for j in kept],
      weights=_prompt_weights(kept),
      num_bootstrap=num_bootstrap,
    ),
    ties=float(np.mean(verdicts == 0.5)),
    contradictions=float(np.mean([j.contradicts for j in kept])),
    num_verdicts=verdicts.size,
  )


def rates_by_category(
  judgements: Sequence[Judgement], num_bootstrap: int = 2000
) -> dict[str, Rates]:
  """`rates` of each use case, by name."""
  found = collections.defaultdict(list)
  for judgement in judgements:
    found[judgement.category].append(judgement)
  return {
    category: rates(rows, num_bootstrap)
    for category, rows in sorted(found.items())
  }


def _prompt_weights(judgements: Sequence[Judgement]) -> np.ndarray:
  """1 over the number of judgements of the prompt between the same models."""
  keys = [(j.prompt_id, *sorted((j.model, j.other))) for j in judgements]
  counts = collections.Counter(keys)
  return np.array([1 / counts[key] for key in keys])


# --- Logistic models ----------------------------------------------------------


def _sigmoid(x):
  return (1 + np.tanh(x / 2)) / 2  # Never overflows.


def _fit(
  design: np.ndarray,
  outcomes: np.ndarray,
  weights: np.ndarray,
  start: np.ndarray,
) -> np.ndarray:
  """Coefficients of a weighted logistic regression, by Newton's method.

  Minimises Σ w [log(1 + e^z) - y z] + ridge/2 |θ|², z = design θ, for y in
  [0, 1]; strictly convex. Steps are halved until the objective falls.
  """

  def objective(theta):
    z = design @ theta
    loss = weights @ (np.logaddexp(0, z) - outcomes * z)
    return loss + _RIDGE / 2 * theta @ theta

  theta, value = start, objective(start)
  for _ in range(_MAX_NEWTON_STEPS):
    probs = _sigmoid(design @ theta)
    gradient = design.T @ (weights * (probs - outcomes)) + _RIDGE * theta
    curvature = weights * probs * (1 - probs)
    hessian = (design.T * curvature) @ design + _RIDGE * np.eye(len(theta))
    step = np.linalg.solve(hessian, gradient)
    if gradient @ step < 1e-10:
      break
    size = 1.0
    while size > 1e-8 and objective(theta - size * step) > value:
      size /= 2
    theta = theta - size * step
    value = objective(theta)
  return theta


def _bootstrap_fit(design, judgements, num_bootstrap):
  """(coefficients [K], their redraws [num_bootstrap, K], number of prompts)."""
  outcomes = np.array([judgement.outcome for judgement in judgements])
  weights = _prompt_weights(judgements)
  codes, num_prompts = win_rate.cluster_codes(
    [judgement.prompt_id for judgement in judgements]
  )
  estimate = _fit(design, outcomes, weights, np.zeros(design.shape[1]))
  redraws = [
    _fit(design, outcomes, weights * count[codes], estimate)
    for counts in win_rate.redraw_counts(num_prompts, num_bootstrap, 0)
    for count in counts
  ]
  return estimate, np.array(redraws), num_prompts


@dataclasses.dataclass(frozen=True)
class LengthControlled:
  """Win rates at equal length."""

  rates: Mapping[str, win_rate.Interval]  # By model.
  # Change of the log-odds when an answer is e times as long as the baseline's;
  # positive if the judge prefers length.
  slope: win_rate.Interval


def length_controlled(
  by_model: Mapping[str, Sequence[Judgement]], num_bootstrap: int = _NUM_REFITS
) -> LengthControlled:
  """Win rates with the effect of length removed (Stiennon et al. 2020, F).

  One logistic regression over all models of `against`: log-odds of a win =
  θ_model + γ log(length / length of the baseline's answer), ties one half. The
  rate is σ(θ_model). Intervals resample prompts.
  """
  models = list(by_model)
  rows = [row for model in models for row in by_model[model]]
  is_model = [[float(row.model == model) for model in models] for row in rows]
  ratios = [row.log_length_ratio for row in rows]
  estimate, redraws, num_prompts = _bootstrap_fit(
    np.column_stack([is_model, ratios]), rows, num_bootstrap
  )
  estimate[:-1], redraws[:, :-1] = (
    _sigmoid(estimate[:-1]),
    _sigmoid(redraws[:, :-1]),
  )
  *found, slope = win_rate.intervals(estimate, redraws, num_prompts)
  return LengthControlled(dict(zip(models, found, strict=True)), slope)


def bradley_terry(
  judgements: Sequence[Judgement], anchor: str, num_bootstrap: int = _NUM_REFITS
) -> dict[str, win_rate.Interval]:
  """Ratings in nats: P(a preferred to b) = σ(rating_a - rating_b), ties half.

  The anchor's rating is 0; one nat is 400 / ln 10 = 173.7 Elo points. Intervals
  resample prompts.

  Raises:
    ValueError: no chain of judgements links some model with the anchor.
  """
  pairs = {frozenset((j.model, j.other)) for j in judgements}
  models = sorted(set().union(*pairs))
  linked = {anchor}
  for _ in models:  # A chain has fewer links than there are models.
    linked = linked.union(*(pair for pair in pairs if pair & linked))
  unlinked = [model for model in models if model not in linked]
  if unlinked:
    raise ValueError(
      f'no chain of judgements links {unlinked} with {anchor!r}; judge more '
      'pairs'
    )
  rated = [model for model in models if model != anchor]
  design = [
    [float(j.model == name) - float(j.other == name) for name in rated]
    for j in judgements
  ]
  estimate, redraws, num_prompts = _bootstrap_fit(
    np.array(design), judgements, num_bootstrap
  )
  found = win_rate.intervals(estimate, redraws, num_prompts)
  ratings = dict(zip(rated, found, strict=True))
  ratings[anchor] = win_rate.Interval(0.0, 0.0, 0.0, num_prompts)
  return dict(sorted(ratings.items(), key=lambda item: -item[1].mean))


# --- Power --------------------------------------------------------------------


def power(judgements: Sequence[Judgement]) -> Power:
  """How many prompts would separate the two models of these judgements.

  A rate p over n prompts with standard deviation s has the interval
  p ± 1.96 s/√n, which excludes one half from n = (1.96 s / |p - ½|)² on; 80 %
  power takes (1.96 + 0.84)² instead of 1.96².

  Raises:
    ValueError: fewer than two prompts.
  """
  by_prompt = collections.defaultdict(list)
  for judgement in judgements:
    by_prompt[judgement.prompt_id].append(judgement.outcome)
  if len(by_prompt) < 2:
    raise ValueError(
      f'the spread over prompts takes at least 2, got {len(by_prompt)} prompts'
    )
  outcomes = np.array([np.mean(values) for values in by_prompt.values()])
  rate, deviation = float(outcomes.mean()), float(outcomes.std(ddof=1))
  distance = abs(rate - 0.5)

  def needed(z):
    if distance < 1e-12:
      return None
    # Two prompts are the smallest sample that has a spread.
    return max(2, math.ceil((z * deviation / distance) ** 2))

  return Power(
    rate=rate,
    deviation=deviation,
    num_prompts=len(outcomes),
    to_separate=needed(win_rate.Z95),
    for_power=needed(win_rate.Z95 + _Z_POWER),
  )


# --- All of it ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Versus:
  """A pair that was judged: the first model against the second.

  `power` is None with fewer than two prompts, `first_place` if no judgement
  keeps its two verdicts.
  """

  rates: Rates
  power: Power | None
  first_place: FirstPlace | None


@dataclasses.dataclass(frozen=True)
class Outcomes:
  """All figures of the judgements of several models."""

  # Against the baseline, which has one half against itself.
  rates: Mapping[str, Rates]
  by_category: Mapping[str, Mapping[str, Rates]]  # The same by use case.
  length_controlled: LengthControlled  # The same at equal length.
  bradley_terry: Mapping[str, win_rate.Interval]  # Nats, the baseline at 0.
  pairs: Mapping[tuple[str, str], Versus]  # Of each pair that was judged.
  first_place: FirstPlace | None  # Over all pairs.


def outcomes(
  judgements: Sequence[Judgement],
  models: Sequence[str],
  baseline: str,
  num_bootstrap: int = 2000,
) -> Outcomes:
  """All figures of judgements that have an outcome.

  Judgements of models not in `models` are left out. `num_bootstrap` is the
  number of redraws for rates.

  Raises:
    ValueError: the baseline was never judged, or no chain of judgements links
      some model with it.
  """
  judgements = [j for j in judgements if {j.model, j.other} <= set(models)]
  against_it = against(judgements, baseline)
  by_model = {m: against_it[m] for m in models if m in against_it}
  by_pair = collections.defaultdict(list)
  for judgement in judgements:
    by_pair[judgement.model, judgement.other].append(judgement)
  found = {
    model: rates(rows, num_bootstrap) for model, rows in by_model.items()
  }
  most = max(found.values(), key=lambda each: each.num_prompts)
  itself = Rates(
    0.5, 0.5, 0.5, most.num_prompts, num_judgements=most.num_judgements
  )
  return Outcomes(
    rates={m: found.get(m, itself) for m in models if m in {baseline, *found}},
    by_category={
      model: rates_by_category(rows, num_bootstrap)
      for model, rows in by_model.items()
    },
    length_controlled=length_controlled(by_model),
    bradley_terry=bradley_terry(judgements, baseline),
    pairs={
      pair: Versus(
        rates(rows, num_bootstrap),
        power(rows) if len({row.prompt_id for row in rows}) > 1 else None,
        first_place(rows, num_bootstrap),
      )
      for pair, rows in by_pair.items()
    },
    first_place=first_place(judgements, num_bootstrap),
  )
