"""How far rankings of the same texts agree (paper 3.4).

Texts are matched by what they say, so rankings of one prompt need neither the
same completions nor the same order of them.
"""

import collections
import dataclasses
import itertools
from collections.abc import Sequence

from instruct_jax.data import records


@dataclasses.dataclass(frozen=True)
class Agreement:
  """Pairs of completions that two labelers ordered, prompt by prompt.

  Attributes:
    prompts: with a named ranking.
    agreed: of each prompt, pairs that two labelers ordered alike.
    counted: of each prompt, pairs that two labelers ordered.
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
  """(pairs ordered alike, pairs that both ordered) of two rankings."""
  agreed = counted = 0
  for i, j in itertools.combinations(range(len(a)), 2):
    sign = (a[i] - a[j]) * (b[i] - b[j])
    agreed += sign > 0
    counted += sign != 0
  return agreed, counted


def agreement(comparisons: Sequence[records.Comparison]) -> Agreement:
  """Compares every two rankings of one prompt by different named labelers.

  They are compared on the completions that they share; a pair that either of
  them tied is left out. A text that one ranking holds twice has its mean rank.
  The paper does not say how it treats ties. Rankings without a labeler's name
  are left out, for two of them may be one person's or two people's.
  """
  by_prompt = collections.defaultdict(list)
  for comparison in comparisons:
    if comparison.labeler:
      ranked = (comparison.labeler, rank_by_text(comparison))
      by_prompt[comparison.prompt].append(ranked)
  agreed = dict.fromkeys(by_prompt, 0)
  counted = dict.fromkeys(by_prompt, 0)
  for prompt, rankings in by_prompt.items():
    for (who, a), (other, b) in itertools.combinations(rankings, 2):
      if who == other:
        continue
      shared = [text for text in a if text in b]
      alike, both = pair_counts([a[t] for t in shared], [b[t] for t in shared])
      agreed[prompt] += alike
      counted[prompt] += both
  return Agreement(
    tuple(by_prompt),
    tuple(agreed.values()),
    tuple(counted.values()),
  )
