"""Trivial judges of preferences, which a reward model must beat to matter.

A reward model that orders held-out pairs no better than answer length or word
counts has learned nothing about answering. Both baselines learn from the reward
model's own comparisons, and `preference_accuracy.pairwise_accuracy` scores
them. Not in the paper.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np
import scipy.sparse

from instruct_jax.data import records

# Words and single punctuation marks: "Cocum's pub." -> cocum's, pub, "."
_WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
# How many of the most frequent words are kept, and how often each must occur.
_MAX_WORDS, _MIN_COUNT = 1000, 2
# About ten steps usually suffice.
_MAX_NEWTON_STEPS = 50
# Share of the prompts on which `choose_l2` measures the loss.
_HELD_OUT = 0.2


def words(text: str) -> list[str]:
  """Lower-case words and punctuation marks of a text."""
  return _WORD.findall(text.lower())


def _labeled_pairs(comparisons: Sequence[records.Comparison]) -> np.ndarray:
  """[pairs, 2] positions (better, worse) in the flat list of completions."""
  pairs = []
  start = 0
  for comparison in comparisons:
    ranks = comparison.ranks
    pairs += [
      (start + i, start + j)
      for i, j in itertools.permutations(range(len(ranks)), 2)
      if ranks[i] < ranks[j]
    ]
    start += len(ranks)
  if not pairs:
    why = f'{len(comparisons)} comparisons, every pair tied'
    raise ValueError(
      f'no pair to learn from: {why if len(comparisons) else "no comparisons"}'
    )
  return np.array(pairs)


def _scores(comparisons, score_fn) -> list[np.ndarray]:
  return [
    np.array([score_fn(text) for text in comparison.completions], float)
    for comparison in comparisons
  ]


@dataclasses.dataclass(frozen=True)
class LengthJudge:
  """Prefers long answers (sign 1) or short ones (sign -1)."""

  sign: int

  def scores(
    self, comparisons: Sequence[records.Comparison]
  ) -> list[np.ndarray]:
    """Per comparison, plus or minus each completion's number of words [C]."""
    return _scores(comparisons, lambda text: self.sign * len(words(text)))


def fit_length(comparisons: Sequence[records.Comparison]) -> LengthJudge:
  """The direction of length that orders more training pairs correctly.

  Raises:
    ValueError: every pair is tied.
  """
  lengths = np.concatenate(LengthJudge(1).scores(comparisons) or [[]])
  better, worse = _labeled_pairs(comparisons).T
  return LengthJudge(
    1 if np.sign(lengths[better] - lengths[worse]).sum() >= 0 else -1
  )


@dataclasses.dataclass(frozen=True)
class BagOfWordsJudge:
  """A Bradley-Terry model whose reward is a weighted sum of word counts."""

  vocabulary: tuple[str, ...]  # Words that have a weight; others count nothing.
  weights: np.ndarray  # [len(vocabulary)], nats of log-odds per occurrence.

  def scores(
    self, comparisons: Sequence[records.Comparison]
  ) -> list[np.ndarray]:
    """Per comparison, the reward of each completion [C], in log-odds."""
    weight = dict(zip(self.vocabulary, self.weights, strict=True))
    return _scores(
      comparisons,
      lambda text: sum(weight[word] for word in words(text) if word in weight),
    )


Judge = LengthJudge | BagOfWordsJudge


def _word_counts(
  texts: Sequence[str], vocabulary: Sequence[str]
) -> scipy.sparse.csr_array:
  """[texts, words]: how often each word of the vocabulary is in each text."""
  column = {word: i for i, word in enumerate(vocabulary)}
  found = [
    [column[word] for word in words(text) if word in column] for text in texts
  ]
  places = np.array(list(itertools.chain.from_iterable(found)), int)
  counts = scipy.sparse.csr_array(
    (np.ones(len(places)), places, np.cumsum([0, *map(len, found)])),
    shape=(len(texts), len(vocabulary)),
  )
  counts.sum_duplicates()
  return counts


def fit_bag_of_words(
  comparisons: Sequence[records.Comparison], *, l2: float = 1.0
) -> BagOfWordsJudge:
  """Bradley-Terry on differences of word counts, by Newton's method.

  Minimises Σ_pairs -log σ(θ·(x_better - x_worse)) + l2/2 |θ|², which is
  strictly convex, so the result depends on the data alone. Words that all
  completions of a prompt share cancel. Steps are halved until the objective
  falls.

  Args:
    comparisons: rankings to learn from; ties are dropped.
    l2: strength of the ridge, per squared nat.

  Raises:
    ValueError: every pair is tied, or l2 is not positive.
  """
  if not l2 > 0:
    raise ValueError(f'l2 must be positive, got {l2}')
  texts = [text for record in comparisons for text in record.completions]
  frequencies = collections.Counter(
    itertools.chain.from_iterable(map(words, texts))
  )
  vocabulary = sorted(
    (word for word, count in frequencies.items() if count >= _MIN_COUNT),
    key=lambda word: (-frequencies[word], word),
  )[:_MAX_WORDS]
  # If several labelers ranked the same answers, a pair of texts is kept once,
  # with how often its first text won and how often it lost.
  numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
  labeled = np.array([numbers[text] for text in texts])[
    _labeled_pairs(comparisons)
  ]
  pairs, which = np.unique(
    np.sort(labeled, axis=1), axis=0, return_inverse=True
  )
  first_won = labeled[:, 0] == pairs[which, 0]
  won, lost = (
    np.bincount(which, outcome, len(pairs))
    for outcome in (first_won, ~first_won)
  )
  counts = _word_counts(list(numbers), vocabulary)
  # [pairs, words], sparse: few words of a pair differ.
  differences = counts[pairs[:, 0]] - counts[pairs[:, 1]]

  def objective(weights: np.ndarray) -> float:
    # -log σ(z) = log(1 + e^-z), without overflow.
    margins = differences @ weights
    losses = won * np.logaddexp(0, -margins) + lost * np.logaddexp(0, margins)
    return losses.sum() + l2 / 2 * weights @ weights

  weights = np.zeros(len(vocabulary))
  value = objective(weights)
  for _ in range(_MAX_NEWTON_STEPS):
    # σ(-z) = (1 - tanh(z/2)) / 2 never overflows.
    wrong = (1 - np.tanh(differences @ weights / 2)) / 2
    gradient = l2 * weights
    gradient -= differences.T @ (won * wrong - lost * (1 - wrong))
    curvature = scipy.sparse.diags_array((won + lost) * wrong * (1 - wrong))
    hessian = (differences.T @ curvature @ differences).toarray()
    hessian += l2 * np.eye(len(vocabulary))
    step = np.linalg.solve(hessian, gradient)
    # A Newton step gains half of gradient·step, to second order.
    if gradient @ step < 1e-12 * (1 + value):
      break
    size = 1.0
    while size > 1e-6 and objective(weights - size * step) >= value:
      size /= 2
    weights = weights - size * step
    value = objective(weights)
  return BagOfWordsJudge(tuple(vocabulary), weights)


def fit_chosen_bag_of_words(
  comparisons: Sequence[records.Comparison],
) -> BagOfWordsJudge:
  """`fit_bag_of_words` with the ridge of `choose_l2`."""
  return fit_bag_of_words(comparisons, l2=choose_l2(comparisons))


def cross_fitted(
  fit_fn: Callable[[Sequence[records.Comparison]], Judge],
  comparisons: Sequence[records.Comparison],
  num_folds: int = 5,
) -> list[np.ndarray]:
  """Scores of each comparison by a judge that learned from the others.

  Prompts are dealt to folds at random; a fold is scored by what was fitted to
  all other folds. Unlike some reward models, these judges have thus learned
  from the same data set: they show what its answers give away.

  Args:
    fit_fn: say `fit_length`.
    comparisons: to score.
    num_folds: at most; each fold has at least one prompt.

  Returns:
    Per comparison, the scores of its completions [C].

  Raises:
    ValueError: fewer than two prompts, or nothing to learn in some fold.
  """
  prompts = sorted({comparison.prompt for comparison in comparisons})
  if len(prompts) < 2:
    raise ValueError(f'{len(prompts)} prompt; folds need at least two')
  order = np.random.default_rng(0).permutation(len(prompts))
  num_folds = min(num_folds, len(prompts))
  fold_of = {
    prompts[i]: place % num_folds for place, i in enumerate(order.tolist())
  }
  folds = np.array([fold_of[comparison.prompt] for comparison in comparisons])
  scores = [None] * len(comparisons)
  for fold in range(num_folds):
    judge = fit_fn([comparisons[i] for i in np.flatnonzero(folds != fold)])
    places = np.flatnonzero(folds == fold)
    found = judge.scores([comparisons[i] for i in places])
    for place, row in zip(places, found, strict=True):
      scores[place] = row
  return scores


def choose_l2(
  comparisons: Sequence[records.Comparison],
  candidates: Sequence[float] = (1.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
) -> float:
  """The ridge with which word counts predict held-out prompts best.

  It matters when labels are noisy: on Anthropic's HH pairs, l2 = 1 loses five
  points of accuracy against l2 = 300.

  Args:
    comparisons: what `fit_bag_of_words` will learn from.
    candidates: strengths to try.

  Returns:
    The candidate with the lowest mean of -log σ(margin) over held-out pairs.

  Raises:
    ValueError: either part has no untied pair, as with fewer than 3 prompts.
  """
  prompts = sorted({comparison.prompt for comparison in comparisons})
  order = np.random.default_rng(0).permutation(len(prompts))
  left_out = {prompts[i] for i in order[: round(_HELD_OUT * len(prompts))]}
  seen = [c for c in comparisons if c.prompt not in left_out]
  unseen = [c for c in comparisons if c.prompt in left_out]
  better, worse = _labeled_pairs(unseen).T

  def loss(l2: float) -> float:
    judge = fit_bag_of_words(seen, l2=l2)
    scores = np.concatenate(judge.scores(unseen))
    return float(np.logaddexp(0, scores[worse] - scores[better]).mean())

  return min(candidates, key=loss)
