"""Simulated labelers: they write demonstrations and rank completions.

There are thirty training labelers in five groups and ten held-out ones (paper
3.4). Each has individual weights on the gold judge's features, a preferred
length, and noise. Training sees their demonstrations and ranks, never the gold
judge.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence

import numpy as np

from instruct_jax.data.records import Prompt
from instruct_jax.miniature import answers, gold
from instruct_jax.miniature.world import World

GROUPS = ('red', 'blue', 'green', 'white', 'black')
HELDOUT = 'heldout'
# Standard deviation of a labeler's opinion of one completion, in units of
# utility. At this noise two training labelers agree on 73 % of the pairs of
# `realistic_completions` (paper 3.4: 72.6 +- 1.5 %), as a test measures.
# Samples of models differ from those; the config has the noise for them.
NOISE = 0.25
# Utilities closer than this get the same rank: one step of the seven-point
# scale on which labelers grade a completion (paper, Figure 12).
TIE_MARGIN = 0.15
# How much labelers differ: standard deviations of the log weights.
LABELER_SPREAD = 0.3
GROUP_SPREAD = 0.4
HELDOUT_SPREAD = 0.45
# Number of words in a response that each group prefers.
GROUP_LENGTHS = (5.0, 8.0, 10.0, 12.0, 15.0)
HELDOUT_LENGTH = 7.0
# People judge better than they write (in Stiennon et al. 2020, reference
# summaries rank below a tuned model's): this share of demonstrations has a
# lapse, which SFT also learns and RL can unlearn.
LAPSE_SHARE = 0.4
LAPSES = {
  'rude': 33,
  'run_on': 18,
  'shrug': 18,
  'unfinished': 15,
  'question': 8,
  'wrong_fact': 5,
  'off_topic': 3,
}
_TRIES = 8


@dataclasses.dataclass(frozen=True)
class Labeler:
  """One labeler's preferences.

  Attributes:
    name: unique.
    group: one of `GROUPS`, or 'heldout'.
    weights: on the features of `gold.Judgement`.
    preferred_length: the number of words that a response should have.
    length_weight: utility lost per word of distance from it, at most 8 words.
    noise: standard deviation of one judgement, in utility.
    wordy: from 0 to 1, how often the labeler writes full sentences.
  """

  name: str
  group: str
  weights: Mapping[str, float]
  preferred_length: float
  length_weight: float
  noise: float
  wordy: float


def num_training(num_labelers: int) -> int:
  """How many labelers of `make_labelers` are not held out."""
  return num_labelers * 3 // 4


def make_labelers(
  seed: int, num_labelers: int = 40, noise: float = NOISE
) -> list[Labeler]:
  """Makes labelers: three quarters in five training groups, the rest held out.

  Raises:
    ValueError: too few labelers for one per group and one held out.
  """
  if num_labelers < 2 * len(GROUPS):
    raise ValueError(
      f'{num_labelers} labelers do not fill {len(GROUPS)} groups and a '
      'held-out one'
    )
  rng = np.random.default_rng([seed, 40])
  names = tuple(gold.WEIGHTS)
  tastes = [
    dict(zip(names, rng.normal(0, GROUP_SPREAD, len(names)), strict=True))
    for _ in GROUPS
  ]
  # Held-out labelers care less about constraints, more about harm and length.
  tastes.append(
    dict.fromkeys(names, 0.0)
    | {'constraint': -0.3, 'harmlessness': 0.3, 'length': 0.3}
  )
  groups, lengths = (*GROUPS, HELDOUT), (*GROUP_LENGTHS, HELDOUT_LENGTH)
  last = num_training(num_labelers)
  labelers = []
  for i in range(num_labelers):
    index = i * len(GROUPS) // last if i < last else len(GROUPS)
    spread = LABELER_SPREAD if i < last else HELDOUT_SPREAD
    labelers.append(
      Labeler(
        name=f'labeler{i:02d}',
        group=groups[index],
        weights={
          name: weight
          * float(np.exp(tastes[index][name] + rng.normal(0, spread)))
          for name, weight in gold.WEIGHTS.items()
        },
        preferred_length=lengths[index] + float(rng.normal(0, 1.5)),
        length_weight=float(rng.uniform(0.004, 0.014)),
        noise=noise * float(np.exp(rng.normal(0, 0.15))),
        wordy=float(rng.uniform(0.35, 0.95)),
      )
    )
  return labelers


def write_demonstration(
  labeler: Labeler, prompt: Prompt, world: World, rng: np.random.Generator
) -> str:
  """A labeler's own good answer, or one of the `LAPSES`.

  Drafts until the gold judge approves, at most eight times, and takes the best
  draft: a labeler reads the task again before sending.
  """
  draw = random.Random(int(rng.integers(2**63)))
  best, best_utility = '', -1.0
  for _ in range(_TRIES):
    text = answers.draft(prompt.metadata, world, draw, labeler.wordy)
    judgement = gold.judge(prompt, text, world)
    # Writers notice finer differences than readers.
    value = gold.utility(judgement, shades=(0.0, 1.0))
    if value > best_utility:
      best, best_utility = text, value
    if value >= 0.97:
      break
  if draw.random() < LAPSE_SHARE:
    fault = draw.choices(tuple(LAPSES), tuple(LAPSES.values()))[0]
    return answers.spoil(best, fault, world, draw) or best
  return best


def taste(labeler: Labeler, judgement: gold.Judgement, response: str) -> float:
  """Utility by the labeler's weights and preferred length, without noise."""
  size = sum(word.isalnum() for word in response.split())
  distance = min(8.0, abs(size - labeler.preferred_length))
  value = gold.utility(judgement, labeler.weights)
  return value - labeler.length_weight * distance


def judge_each(
  prompt: Prompt, completions: Sequence[str], world: World
) -> dict[str, gold.Judgement]:
  """The judgement of each distinct text, to be shared by all labelers."""
  return {
    text: gold.judge(prompt, text, world) for text in dict.fromkeys(completions)
  }


def rank(
  labeler: Labeler,
  completions: Sequence[str],
  judgements: Mapping[str, gold.Judgement],
  rng: np.random.Generator,
) -> tuple[int, ...]:
  """Dense ranks: 1 is best; completions that seem equally good tie.

  Noise is drawn once per distinct text, so equal texts tie. `judgements` are
  from `judge_each`.
  """
  opinions = {}
  for text in dict.fromkeys(completions):
    noise = labeler.noise * float(rng.normal())
    opinions[text] = taste(labeler, judgements[text], text) + noise
  ranks, current, head = {}, 0, float('inf')
  for text in sorted(opinions, key=opinions.get, reverse=True):
    # Ties are with the best text of a rank, so they do not chain downwards.
    if head - opinions[text] > TIE_MARGIN:
      current, head = current + 1, opinions[text]
    ranks[text] = current
  return tuple(ranks[text] for text in completions)


def realistic_completions(
  prompt: Prompt, world: World, rng: np.random.Generator, num_completions: int
) -> list[str]:
  """Answers like those of a fine-tuned model: less than half are good."""
  draw = random.Random(int(rng.integers(2**63)))
  completions = []
  for _ in range(num_completions):
    spec = prompt.metadata
    if spec['constraint'] and draw.random() < 0.5:
      spec = spec | {'constraint': None}
    text = answers.draft(spec, world, draw, draw.random())
    fault = draw.choices(
      ('', 'wrong_fact', 'off_topic', 'rude', 'run_on', 'unfinished', 'shrug'),
      (38, 20, 12, 12, 7, 6, 5),
    )[0]
    completions.append(
      answers.spoil(text, fault, world, draw) if fault else text
    )
  return completions
