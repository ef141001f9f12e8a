"""Who judges answers, and how a judge is asked.

A judge is a class that the config names by its dotted name. It scores single
answers, or compares two in the order in which they are shown; it may also rate
single answers, Likert 1 to 7 and the labels of the paper's Table 3.
`ask_both_orders` asks every pair twice, with the answers in either place.
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
    return Pair(self.prompt, self.second, self.first)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What one judge says of a pair.

  Attributes:
    preference: for the answer shown first: 1, 0, or one half for a tie; None
      where the judge spoke and could not be understood.
    labeler: who judged, or ''. Nameless verdicts may be different people's.
    raw: the judge's own words, scores or ranks.
  """

  preference: float | None
  labeler: str = ''
  raw: str = dataclasses.field(default='', compare=False)


@dataclasses.dataclass(frozen=True)
class Rating:
  """One judge's rating of one answer; None and absence mean not said.

  Attributes:
    likert: overall quality, 1 (worst) to 7 (best).
    labels: label -> whether it holds.
    labeler: who rated, or ''.
  """

  likert: float | None
  labels: Mapping[str, bool]
  labeler: str = ''


# An answer with the prompt that it answers.
Answer = tuple[records.Prompt, Sample]
# One number an answer, higher is better.
ScoreFn = Callable[[Sequence[Answer]], Sequence[float]]


class Judge:
  """Who says which of two answers is better.

  A judge overrides `score` or `compare`, and `rate` where it can. `score` is
  called in every process, the others in the first alone.

  Attributes:
    needs: dotted keys of the config without which it cannot judge.
    reads: those of them that are paths.
    name: who it is, and that it is no person where it is none.
    unit: of its scores, a word for headings.
    is_ceiling: whether labelers agree with its scores save for noise, so that
      no reward model can order more of their pairs.
    has_places: whether it sees both answers at a time, so that their places
      may count.
    progress: called with how many more pairs or answers are judged.
  """

  needs: ClassVar[tuple[str, ...]] = ()
  reads: ClassVar[tuple[str, ...]] = ()
  name: str
  unit: ClassVar[str] = 'judge'
  is_ceiling: ClassVar[bool] = False
  has_places: ClassVar[bool] = False

  def __init__(self, config: Any, workdir: epath.Path, mesh: Any):
    """Makes the judge.

    Args:
      config: of the stage that asks it.
      workdir: of that stage.
      mesh: for judges that are models.
    """
    del config, workdir, mesh
    self.progress: Callable[[int], None] = lambda number: None

  @classmethod
  def validate(cls, config: Any) -> None:
    """Refuses a config with which it cannot judge.

    Raises:
      ValueError: a key, and what it must hold.
    """
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
    """Whether it scores single answers; else it compares two."""
    return cls.score is not Judge.score

  def score(self, answers: Sequence[Answer]) -> Sequence[float]:
    """One finite number an answer, higher is better."""
    raise NotImplementedError

  def compare(self, pairs: Sequence[Pair]) -> list[list[Verdict]]:
    """The verdicts on each pair: none without an opinion, several of people.

    A judge that scores compares `Sample.score_gold`, which its scores are.
    """
    verdicts = []
    for pair in pairs:
      first, second = pair.first.score_gold, pair.second.score_gold
      preference = (1 + (first > second) - (first < second)) / 2
      raw = f'scores {first:.6g} and {second:.6g}'
      verdicts.append([Verdict(preference, raw=raw)])
    self.progress(len(pairs))
    return verdicts

  def rate(self, answers: Sequence[Answer]) -> list[list[Rating]]:
    """The ratings of each answer; none by default."""
    self.progress(len(answers))
    return [[] for _ in answers]

  def account(self) -> dict[str, Any]:
    """What asking took and cost."""
    return {}


@dataclasses.dataclass
class Account:
  """What became of the pairs; nothing is dropped without a count.

  Attributes:
    pairs: asked for.
    unjudged: pairs without a verdict in both orders by one judge.
    one_order: verdicts on the other pairs that stand alone: the same judge
      said nothing in the other order.
    unparsed: verdicts whose words could not be understood, in at least one
      order.
    contradictions: judgements that changed sides when the answers changed
      places.
    empty: answers of the pairs without a character, each counted once.
    judgements: what is left.
  """

  pairs: int = 0
  unjudged: int = 0
  one_order: int = 0
  unparsed: int = 0
  contradictions: int = 0
  empty: int = 0
  judgements: int = 0


def ask_both_orders(
  judge: Judge, pairs: Sequence[Pair]
) -> tuple[list[preferences.Judgement], Account]:
  """All that was said of each pair, in both orders.

  The verdicts of the two orders are matched by labeler and, where one labeler
  (or several without a name) gave several, by their place among these. Where
  their number differs between the orders, none of them can be matched.

  Returns:
    One judgement for each judge of each pair, without an outcome where an
    order is missing or could not be understood; and the counts.
  """
  account = Account(pairs=len(pairs))
  # Each object once: several answers of a model to a prompt may be equal.
  answers = {
    id(answer): answer for pair in pairs for answer in (pair.first, pair.second)
  }
  account.empty = sum(
    invisible.is_blank(answer.response) for answer in answers.values()
  )
  straight = judge.compare(pairs)
  turned = judge.compare([pair.swapped() for pair in pairs])
  judgements = []
  for pair, ours, theirs in zip(pairs, straight, turned, strict=True):
    matched = _match(ours, theirs)
    complete = [both for both in matched if None not in both]
    if complete:
      account.one_order += len(matched) - len(complete)
    else:
      account.unjudged += 1
    for first, swapped in matched:
      judgement = _judgement(pair, first, swapped)
      account.unparsed += (
        None not in (first, swapped) and judgement.outcome is None
      )
      account.contradictions += judgement.contradicts
      account.judgements += judgement.outcome is not None
      judgements.append(judgement)
  return judgements, account


def _match(
  ours: Sequence[Verdict], theirs: Sequence[Verdict]
) -> list[tuple[Verdict | None, Verdict | None]]:
  """Verdicts of the two orders, matched; None for one that is missing."""
  sides = (collections.defaultdict(list), collections.defaultdict(list))
  for side, verdicts in zip(sides, (ours, theirs), strict=True):
    for verdict in verdicts:
      side[verdict.labeler].append(verdict)
  matched = []
  for labeler in dict.fromkeys([*sides[0], *sides[1]]):
    first, swapped = sides[0][labeler], sides[1][labeler]
    if len(first) == len(swapped):
      matched += zip(first, swapped, strict=True)
    else:
      matched += [(verdict, None) for verdict in first]
      matched += [(None, verdict) for verdict in swapped]
  return matched


def _judgement(
  pair: Pair, first: Verdict | None, swapped: Verdict | None
) -> preferences.Judgement:
  """One judge's view of a pair; at least one of the orders was judged."""
  outcome, contradicts = None, False
  said = [verdict.preference for verdict in (first, swapped) if verdict]
  if len(said) == 2 and None not in said:
    outcome, contradicts = preferences.both_orders(*said)
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
  """Rankings that people made: `records.Comparison` lines of a JSONL file.

  Prompts and answers are found by their text. Every ranking is a judgement of
  its own: several of one prompt without a labeler's name may be several
  people's. `metadata` may hold, one entry a completion: `likert`, numbers 1 to
  7 or null; `labels`, objects of label -> true or false.

  Args:
    config: with `rankings`, the file.

  Raises:
    records.RecordError: a malformed line, by number.
  """

  needs = reads = ('rankings',)

  def __init__(self, config: Any, workdir: epath.Path, mesh: Any):
    super().__init__(config, workdir, mesh)
    path = config.rankings
    comparisons = records.read_jsonl(path, records.Comparison)
    self._by_prompt = collections.defaultdict(list)
    # Position among the good records is the line, save for blank lines.
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
    """What the rankings that hold an answer say of it alone."""
    self.progress(len(answers))
    return [
      [
        rating
        for ranking in self._by_prompt.get(prompt.text, ())
        for rating in _ratings_of(ranking, answer.response)
      ]
      for prompt, answer in answers
    ]


def _check_metadata(place, comparison):
  expected = len(comparison.completions)
  for name in ('likert', 'labels'):
    if name not in comparison.metadata:
      continue
    values = comparison.metadata[name]
    if not isinstance(values, list) or len(values) != expected:
      raise records.RecordError(
        f'{place}: metadata {name!r} must be a list of {expected} entries, one '
        'for each completion'
      )
    for value in values:
      if name == 'likert' and not is_likert(value):
        raise records.RecordError(
          f"{place}: metadata 'likert' holds {value!r}; expected 1 to 7 or null"
        )
      if name == 'labels' and not are_labels(value):
        raise records.RecordError(
          f"{place}: metadata 'labels' holds {value!r}; expected an object of "
          'true and false'
        )


def is_likert(value: Any) -> bool:
  """Whether it is a number from 1 to 7, or None: not said."""
  if value is None:
    return True
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and 1 <= value <= 7
  )


def are_labels(value: Any) -> bool:
  """Whether it is label -> true or false."""
  return isinstance(value, dict) and all(
    isinstance(flag, bool) for flag in value.values()
  )


def _ranked(ranking, pair):
  """The labeler's verdict, or None where either answer was not ranked."""
  ranks = labels.rank_by_text(ranking)
  both = (pair.first.response, pair.second.response)
  if any(text not in ranks for text in both):
    return None
  first, second = (ranks[text] for text in both)
  preference = (1 + (first < second) - (first > second)) / 2
  return Verdict(preference, ranking.labeler, f'ranks {first:g} and {second:g}')


def _ratings_of(ranking, response):
  """One rating for each time that the labeler saw this answer and rated it."""
  found = []
  for index, text in enumerate(ranking.completions):
    if text != response:
      continue
    likert, given = None, {}
    if 'likert' in ranking.metadata:
      likert = ranking.metadata['likert'][index]
      likert = None if likert is None else float(likert)
    if 'labels' in ranking.metadata:
      given = ranking.metadata['labels'][index]
    if likert is not None or given:
      found.append(Rating(likert, given, ranking.labeler))
  return found
