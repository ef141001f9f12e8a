"""The interface of judges, and a judge made of people's rankings.

A judge is a class that the config names by its dotted name. It scores single
answers, or compares two in the order in which they are shown. It may also rate
single answers: Likert 1 to 7, and the labels of the paper's Table 3.
`ask_both_orders` shows every pair in both orders.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from etils import epath

from instruct_jax.data import invisible, labels, records
from instruct_jax.evals import preferences
from instruct_jax.evals.samples import Sample

# The name of this rating among labels.
LIKERT = 'overall quality, 1 to 7'


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two answers to one prompt, in the order in which they are shown."""

  prompt: records.Prompt
  first: Sample
  second: Sample

  def swapped(self) -> 'Pair':
    """The same two in the other order."""
    return Pair(self.prompt, self.second, self.first)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """One judge's verdict on a pair."""

  # For the answer shown first: 1, 0, or one half for a tie; None if the verdict
  # could not be parsed.
  preference: float | None
  labeler: str = ''  # Verdicts without a name may be different people's.
  # The judge's words, scores or ranks.
  raw: str = dataclasses.field(default='', compare=False)


@dataclasses.dataclass(frozen=True)
class Rating:
  """One judge's rating of one answer; None and absence mean not rated."""

  likert: float | None  # Overall quality, 1 (worst) to 7 (best).
  labels: Mapping[str, bool]
  labeler: str = ''


# An answer with its prompt.
Answer = tuple[records.Prompt, Sample]
# One number per answer, higher is better.
ScoreFn = Callable[[Sequence[Answer]], Sequence[float]]


class Judge:
  """Decides which of two answers is better.

  A judge overrides `score` or `compare`, and `rate` if it can. Every process
  calls `score`; only the first calls the others. The constructor's `config` and
  `workdir` are those of the stage that asks; `mesh` is for judges that are
  models.
  """

  needs: ClassVar[tuple[str, ...]] = ()  # Config keys that must not be empty.
  reads: ClassVar[tuple[str, ...]] = ()  # Those of `needs` that are paths.
  name: str  # Who judges; says so if that is not a person.
  unit: ClassVar[str] = 'judge'  # Unit of its scores, for headings.
  # Whether labelers agree with its scores except for noise, so that no reward
  # model can order more of their pairs correctly.
  is_ceiling: ClassVar[bool] = False
  # Whether it sees both answers at once, so that their order may matter.
  has_places: ClassVar[bool] = False

  def __init__(self, config: Any, workdir: epath.Path, mesh: Any):
    del config, workdir, mesh
    # Called with the number of further pairs or answers that were judged.
    self.progress: Callable[[int], None] = lambda number: None

  @classmethod
  def validate(cls, config: Any) -> None:
    """Raises ValueError, naming the key, if a key in `needs` is empty."""
    for key in cls.needs:
      value = config
      for part in key.split('.'):
        value = value[part]
      if not value:
        raise ValueError(f'{key} is empty; the judge {config.judge} needs it')

  def knows(self, prompt: records.Prompt) -> bool:
    """Whether it can judge answers to this prompt."""
    del prompt
    return True

  @classmethod
  def gives_scores(cls) -> bool:
    """Whether it scores single answers; otherwise it compares two."""
    return cls.score is not Judge.score

  def score(self, answers: Sequence[Answer]) -> Sequence[float]:
    """One finite number per answer, higher is better."""
    raise NotImplementedError

  def compare(self, pairs: Sequence[Pair]) -> list[list[Verdict]]:
    """The verdicts on each pair: none without an opinion, several from people.

    The default compares the answers' `score_judge`.
    """
    verdicts = []
    for pair in pairs:
      first, second = pair.first.score_judge, pair.second.score_judge
      raw = f'scores {first:.6g} and {second:.6g}'
      verdicts.append([Verdict(_preference(first, second), raw=raw)])
    self.progress(len(pairs))
    return verdicts

  def rate(self, answers: Sequence[Answer]) -> list[list[Rating]]:
    """The ratings of each answer; none by default."""
    self.progress(len(answers))
    return [[] for _ in answers]

  def account(self) -> dict[str, Any]:
    """Requests, tokens, cost and settings, for the report."""
    return {}

  def alarms(self) -> list[str]:
    """Reasons not to trust it, from the requests so far; a sentence each."""
    return []


def _preference(first: float, second: float) -> float:
  """1 if the first is higher, 0 if the second is, one half for a tie."""
  return (1 + (first > second) - (first < second)) / 2


@dataclasses.dataclass
class Account:
  """Counts of the pairs and their verdicts; nothing is dropped uncounted."""

  pairs: int = 0
  unjudged: int = 0  # Pairs without a verdict in both orders by one judge.
  # Verdicts on the other pairs without the same judge's in the other order.
  one_order: int = 0
  unparsed: int = 0  # Judgements with an order that could not be parsed.
  contradictions: int = 0  # Judgements whose two orders contradict.
  empty: int = 0  # Blank answers of the pairs, each counted once.
  judgements: int = 0  # Those with an outcome.


def ask_both_orders(
  judge: Judge, pairs: Sequence[Pair]
) -> tuple[list[preferences.Judgement], Account]:
  """All judgements of each pair, in both orders.

  Verdicts of the two orders are matched by labeler. Several verdicts of one
  labeler, or of several without a name, are matched by position; if their
  number differs between the orders, none of them is matched. A judgement has no
  outcome if an order is missing or could not be parsed.
  """
  account = Account(pairs=len(pairs))
  # By identity: several answers of a model to a prompt may be equal.
  answers = {
    id(answer): answer for pair in pairs for answer in (pair.first, pair.second)
  }
  account.empty = sum(
    invisible.is_blank(answer.response) for answer in answers.values()
  )
  straight = judge.compare(pairs)
  swapped = judge.compare([pair.swapped() for pair in pairs])
  judgements = []
  for pair, *verdicts in zip(pairs, straight, swapped, strict=True):
    matched = _match(*verdicts)
    num_complete = sum(None not in both for both in matched)
    if num_complete:
      account.one_order += len(matched) - num_complete
    else:
      account.unjudged += 1
    for both in matched:
      judgement = _judgement(pair, *both)
      account.unparsed += None not in both and judgement.outcome is None
      account.contradictions += judgement.contradicts
      account.judgements += judgement.outcome is not None
      judgements.append(judgement)
  return judgements, account


def _match(
  straight: Sequence[Verdict], swapped: Sequence[Verdict]
) -> list[tuple[Verdict | None, Verdict | None]]:
  """Verdicts of the two orders, matched; None for one that is missing."""
  by_labeler = collections.defaultdict(lambda: ([], []))
  for order, verdicts in enumerate((straight, swapped)):
    for verdict in verdicts:
      by_labeler[verdict.labeler][order].append(verdict)
  matched = []
  for first, second in by_labeler.values():
    if len(first) == len(second):
      matched += zip(first, second, strict=True)
    else:
      matched += [(verdict, None) for verdict in first]
      matched += [(None, verdict) for verdict in second]
  return matched


def _judgement(
  pair: Pair, first: Verdict | None, swapped: Verdict | None
) -> preferences.Judgement:
  """One judge's view of a pair; at least one of the orders was judged."""
  outcome, contradicts = None, False
  both = [verdict.preference for verdict in (first, swapped) if verdict]
  if len(both) == 2 and None not in both:
    outcome, contradicts = preferences.both_orders(*both)
  shown = ((pair.first, first), (pair.second, swapped))
  return preferences.Judgement(
    prompt_id=pair.prompt.id,
    category=pair.prompt.category,
    model=pair.first.model,
    other=pair.second.model,
    outcome=outcome,
    log_length_ratio=preferences.length_ratio(
      pair.first.num_tokens, pair.second.num_tokens
    ),
    labeler=(first or swapped).labeler,
    contradicts=contradicts,
    orders=tuple(
      preferences.Order(answer.model, verdict.preference, verdict.raw)
      for answer, verdict in shown
      if verdict is not None
    ),
  )


# --- People -------------------------------------------------------------------


class People(Judge):
  """Rankings by people: `records.Comparison` lines of a JSONL file.

  Prompts and answers are found by their text. Every ranking is a separate
  judgement, because unnamed rankings of one prompt may be by different people.
  `metadata` may hold, with one entry per completion: `likert`, numbers 1 to 7
  or null; `labels`, objects of label -> true or false. The constructor raises
  `records.RecordError`, with the number, for a malformed line.
  """

  needs = reads = ('rankings',)

  def __init__(self, config: Any, workdir: epath.Path, mesh: Any):
    super().__init__(config, workdir, mesh)
    path = config.rankings
    comparisons = records.read_jsonl(path, records.Comparison)
    self._by_prompt = collections.defaultdict(list)
    # This is the line number, unless there are blank lines.
    for number, comparison in enumerate(comparisons, start=1):
      _check_metadata(f'{path}: record {number}', comparison)
      self._by_prompt[comparison.prompt].append(comparison)
    names = {c.labeler for c in comparisons if c.labeler}
    self.name = f'people ({len(names)} by name), {path}'

  def compare(self, pairs: Sequence[Pair]) -> list[list[Verdict]]:
    """The verdict of each ranking that holds both answers of a pair."""
    self.progress(len(pairs))
    return [
      [
        verdict
        for ranking in self._by_prompt.get(pair.prompt.text, ())
        if (verdict := _ranked(ranking, pair)) is not None
      ]
      for pair in pairs
    ]

  def rate(self, answers: Sequence[Answer]) -> list[list[Rating]]:
    """The ratings of each answer in the rankings that hold it."""
    self.progress(len(answers))
    return [
      [
        rating
        for ranking in self._by_prompt.get(prompt.text, ())
        for rating in _ratings_of(ranking, answer.response)
      ]
      for prompt, answer in answers
    ]


def is_likert(value: Any) -> bool:
  """Whether it is a number from 1 to 7, or None: not rated."""
  return value is None or (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and 1 <= value <= 7
  )


def are_labels(value: Any) -> bool:
  """Whether it is label -> true or false."""
  return isinstance(value, dict) and all(
    isinstance(flag, bool) for flag in value.values()
  )


def _check_metadata(place, comparison):
  number = len(comparison.completions)
  for name, is_valid_fn, expected in (
    ('likert', is_likert, '1 to 7 or null'),
    ('labels', are_labels, 'an object of true and false'),
  ):
    if name not in comparison.metadata:
      continue
    values = comparison.metadata[name]
    if not isinstance(values, list) or len(values) != number:
      raise records.RecordError(
        f'{place}: metadata {name!r} must be a list of {number} entries, one '
        'for each completion'
      )
    for value in values:
      if not is_valid_fn(value):
        raise records.RecordError(
          f'{place}: metadata {name!r} holds {value!r}; expected {expected}'
        )


def _ranked(ranking, pair):
  """The labeler's verdict, or None if either answer was not ranked."""
  ranks = labels.rank_by_text(ranking)
  both = (pair.first.response, pair.second.response)
  if any(text not in ranks for text in both):
    return None
  first, second = (ranks[text] for text in both)
  raw = f'ranks {first:g} and {second:g}'
  return Verdict(_preference(second, first), ranking.labeler, raw)


def _ratings_of(ranking, response):
  """One rating for each time that the labeler saw this answer and rated it."""
  number = len(ranking.completions)
  rows = zip(
    ranking.completions,
    ranking.metadata.get('likert', [None] * number),
    ranking.metadata.get('labels', [{}] * number),
    strict=True,
  )
  return [
    Rating(None if likert is None else float(likert), given, ranking.labeler)
    for text, likert, given in rows
    if text == response and (likert is not None or given)
  ]
