"""How far rankings of the same texts agree (paper 3.4).

Completions are matched by their text, so two rankings of a prompt may have
different completions and any order.
"""

import collections
import dataclasses
import itertools
from collections.abc import Sequence

from instruct_jax.data import records


@dataclasses.dataclass(frozen=True)
class Agreement:
  """Counts, per prompt, of pairs of completions that two labelers ordered.

  For each of `prompts`, `agreed` counts the pairs that two labelers ordered the
  same way, and `counted` those that both ordered at all.
  """

  prompts: tuple[str, ...]
  agreed: tuple[int, ...]
  counted: tuple[int, ...]


def rank_by_text(comparison: records.Comparison) -> dict[str, float]:
  """Mean rank of each distinct completion."""
  ranks = collections.defaultdict(list)
  for text, rank in zip(comparison.completions, comparison.ranks, strict=True):
    ranks[text].append(rank)
  return {text: sum(values) / len(values) for text, values in ranks.items()}


def pair_counts(
  a: Sequence[int | float], b: Sequence[int | float]
) -> tuple[int, int]:
  """(pairs ordered the same way, pairs that both ordered) of two rankings."""
  pairs = itertools.combinations(range(len(a)), 2)
  signs = [(a[i] - a[j]) * (b[i] - b[j]) for i, j in pairs]
  return sum(sign > 0 for sign in signs), sum(sign != 0 for sign in signs)


def agreement(comparisons: Sequence[records.Comparison]) -> Agreement:
  """Compares every two rankings of a prompt by different named labelers.

  Only completions in both rankings count; a text that is twice in a ranking has
  its mean rank. Pairs that either labeler tied are left out, because the paper
  does not say how it treats ties. Rankings without a labeler's name are left
  out, because two of them may be by the same person.
  """
  by_prompt = collections.defaultdict(list)
  for comparison in comparisons:
    if comparison.labeler:
      ranked = (comparison.labeler, rank_by_text(comparison))
      by_prompt[comparison.prompt].append(ranked)
  agreed = dict.fromkeys(by_prompt, 0)
  counted = dict.fromkeys(by_prompt, 0)
  for prompt, rankings in by_prompt.items():
    for (one, a), (other, b) in itertools.combinations(rankings, 2):
      if one != other:
        shared = [text for text in a if text in b]
        counts = pair_counts([a[t] for t in shared], [b[t] for t in shared])
        agreed[prompt] += counts[0]
        counted[prompt] += counts[1]
  return Agreement(
    tuple(by_prompt), tuple(agreed.values()), tuple(counted.values())
  )
