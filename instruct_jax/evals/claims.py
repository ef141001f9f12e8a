"""What the paper claims, as rules that were fixed before they were run.

A claim holds on a seed by one or more margins: numbers that are positive where
it is so, read off the stages of that seed's run (`configs/study.py`). Over
seeds, each margin has Student's 95 % interval. The claim holds if every
interval lies above zero, does not hold if one lies below, and is not told apart
otherwise.

Sections without a name are those of Ouyang et al. 2022.
"""

import collections
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from instruct_jax.evals import overoptimization, win_rate

HOLDS, FAILS, OPEN = 'holds', 'does not hold', 'not told apart'
NOT_MEASURED = 'not measured'
# Series -> points (x, y); x is a number, or a name.
Points = Mapping[str, Sequence[tuple[float | str, float]]]

# Tolerances, chosen beforehand; the paper prints none.
SAME_ACCURACY = 0.01  # R4: reward models as good as each other.
SMALL_DROP = 0.05  # R5: to labelers who were left out.
ROUNDING = 1e-5  # R6: nats a pair.
KEPT_GAIN = 0.5  # R10: of PPO's gain that PPO-ptx keeps.
SAME_GAIN = 0.25  # R20: of the judge's mean gain, at equal KL.
NO_WORSE = 0.2  # M1: of PPO's gain by the judge.


def _read(path: epath.Path) -> Any:
  return json.loads(path.read_text())


class Seed:
  """The finished run of one seed.

  Args:
    folder: its work directory.
  """

  def __init__(self, folder: epath.PathLike):
    self.folder = epath.Path(folder)
    self.config = _read(self.folder / 'config.json')

  @functools.cached_property
  def summary(self) -> dict[str, Any]:
    """Of the stage that judges all policies."""
    name = self.config['stages']['evaluate']['name']
    return _read(self.folder / name / 'summary.json')

  def sweep(self, name: str) -> dict[float, str]:
    """Value of the swept key -> stage, ascending."""
    found = self.config['sweeps'][name]
    return dict(sorted((value, stage) for stage, value in found.items()))

  def judge(self, model: str) -> float:
    """The judge's mean score of a model's answers, in [0, 1]."""
    return self.summary['everyone'][model]['judge']

  def score(self, model: str) -> float:
    """The reward model's mean score of a model's answers."""
    return self.summary['everyone'][model]['reward model']

  def rate(self, model: str) -> float:
    """Win rate against SFT."""
    return self.summary['everyone'][model]['win rate']['rate']

  def loss(self, model: str) -> float:
    """Held-out pretraining loss, nats a token."""
    return self.summary['pretraining_loss'][model]

  def kl(self, model: str) -> float:
    """From the RL initialisation, nats a response."""
    return self.summary['kl'][model]

  def entropy(self, model: str) -> float:
    """Of the two sentences of a minimal pair, bits; mean over pairs."""
    done = _read(self.folder / 'minimal_pairs' / 'done.json')
    scores = done['info']['scores']
    return scores[f'{model} winogender basic prompt entropy']

  def results(self, stage: str) -> dict[str, Any]:
    """results.json of a stage."""
    return _read(self.folder / stage / 'results.json')

  def epochs(self, stage: str) -> list[dict[str, Any]]:
    """Loss and score after each epoch, of a stage `select`."""
    return _read(self.folder / stage / 'epochs.json')

  def frontier(self, stage: str) -> dict[str, list[dict[str, Any]]]:
    """Points of a stage of `configs/best_of_n.py`, by curve."""
    path = self.folder / stage / 'best_of_n.json'
    return _read(path)['points']

  def seconds(self, stage: str) -> float:
    """That a stage took."""
    return float(_read(self.folder / stage / 'seconds.json'))


@dataclasses.dataclass(frozen=True)
class Claim:
  """One claim.

  Attributes:
    text: what is claimed.
    source: where.
    rule: what has to be so here, in words.
    needs: sweeps and chains of `configs/study.py` that it reads.
    margins: what the rule is about -> its margin on a seed.
    axes: of the figure, x and y.
    points: of the figure, on a seed.
  """

  text: str
  source: str
  rule: str
  needs: tuple[str, ...]
  margins: Mapping[str, Callable[[Seed], float]]
  axes: tuple[str, str]
  points: Callable[[Seed], Points]


@dataclasses.dataclass(frozen=True)
class Margin:
  """Of each seed, and their mean with its interval."""

  values: tuple[float, ...]
  interval: win_rate.Interval


@dataclasses.dataclass(frozen=True)
class Verdict:
  """A claim's margins, and what follows, with the reason if not measured."""

  margins: Mapping[str, Margin]
  text: str


def verdict(claim: Claim, seeds: Sequence[Seed]) -> Verdict:
  """Applies a claim's rule to the runs of some seeds."""
  margins = {}
  for name, margin in claim.margins.items():
    try:
      values = tuple(float(margin(seed)) for seed in seeds)
      margins[name] = Margin(values, win_rate.student_interval(values))
    except ValueError as error:  # A run that diverged, or too few points.
      return Verdict(margins, f'{NOT_MEASURED}: {name}: {error}')
  found = [margin.interval for margin in margins.values()]
  if all(interval.low > 0 for interval in found):
    return Verdict(margins, HOLDS)
  fails = any(interval.high <= 0 for interval in found)
  return Verdict(margins, FAILS if fails else OPEN)


# --- What several claims read -------------------------------------------------


def _ends(seed, sweep) -> tuple[str, str]:
  """The stages of the smallest and of the largest value."""
  stages = list(seed.sweep(sweep).values())
  return stages[0], stages[-1]


def _against(sweep: str, **columns: str) -> Callable[[Seed], Points]:
  """Columns (title -> method of `Seed`) against a sweep's values."""
  return lambda seed: {
    title: [
      (value, getattr(seed, method)(stage))
      for value, stage in seed.sweep(sweep).items()
    ]
    for title, method in columns.items()
  }


def _of_models(method: str, *models: str) -> Callable[[Seed], Points]:
  """One figure of each of some models."""
  return lambda seed: {'': [(m, getattr(seed, method)(m)) for m in models]}


def _accuracy(seed: Seed, stage: str) -> float:
  return seed.results(stage)['accuracy']


def _log_loss(seed: Seed, stage: str) -> float:
  return seed.results(stage)['log_loss']


def _reward_points(sweep: str, key: str) -> Callable[[Seed], Points]:
  return lambda seed: {
    '': [
      (value, seed.results(stage)[key])
      for value, stage in seed.sweep(sweep).items()
    ]
  }


def _best_epoch(seed: Seed) -> tuple[dict[str, Any], dict[str, Any]]:
  """The epoch of least validation loss, and the last, of long SFT."""
  rows = seed.epochs('select_long')
  return min(rows, key=lambda row: row['valid_loss']), rows[-1]


def _epoch_points(seed: Seed) -> Points:
  rows = seed.epochs('select_long')
  return {
    title: [(float(row['epoch']), row[key]) for row in rows]
    for title, key in (
      ('validation loss', 'valid_loss'),
      ('reward-model score', 'score_reward'),
    )
  }


def _undominated(seed: Seed) -> float:
  """How far the best KL coefficient stays behind PPO-ptx, in the worse of tax
  and reward; tax in units of PPO's own, reward in units of PPO's gain.

  A loss below that before RL is further training on such text, for which
  PPO-ptx gets no credit.
  """
  tax = seed.loss('ppo') - seed.loss('rl_init')
  reached = max(seed.loss('ppo_ptx'), seed.loss('rl_init'))
  gain = seed.score('ppo') - seed.score('rl_init')
  return min(
    max(
      (seed.loss(stage) - reached) / abs(tax),
      (seed.score('ppo_ptx') - seed.score(stage)) / abs(gain),
    )
    for stage in seed.sweep('beta').values()
  )


def _pareto_points(seed: Seed) -> Points:
  found = {}
  for name, key in (('beta, PPO', 'beta'), ('gamma, PPO-ptx', 'gamma')):
    stages = seed.sweep(key).values()
    found[name] = [(seed.score(stage), seed.loss(stage)) for stage in stages]
  return found | {'before RL': [(seed.score('rl_init'), seed.loss('rl_init'))]}


def _threshold(seed: Seed, sweep: str) -> float:
  """log of the largest learning rate, in units of the stage's own, up to which
  no run diverges; 0 is below all.

  A run that diverges is judged worse than its start.
  """
  start, reached = seed.judge('rl_init'), 0.0
  for factor, stage in seed.sweep(sweep).items():
    if not seed.judge(stage) >= start:  # NaN as well.
      break
    reached = math.log(2 * factor)
  return reached


def _tolerance(seed: Seed) -> float:
  """log of the ratio of the rates that PPO-ptx and PPO bear.

  Raises:
    ValueError: neither diverges on the grid.
  """
  rates, most = ('rate_ptx', 'rate'), math.log(2 * max(seed.sweep('rate')))
  bears = [_threshold(seed, sweep) for sweep in rates]
  if min(bears) == most:
    raise ValueError('no learning rate of the grid is too high for either')
  return bears[0] - bears[1]


def _rate_points(seed: Seed) -> Points:
  return {
    name: [(x, seed.judge(stage)) for x, stage in seed.sweep(key).items()]
    for name, key in (('PPO', 'rate'), ('PPO-ptx', 'rate_ptx'))
  }


def _drop(seed: Seed) -> float:
  found = seed.results('crossval')
  return found['intra']['mean'] - found['inter']['mean']


def _along(seed: Seed, sweep: str) -> dict[float, list[tuple[float, ...]]]:
  """Value of a sweep -> (KL, reward model's gain, judge's) along RL."""
  found = {}
  for value, stage in seed.sweep(sweep).items():
    (name,) = set(seed.frontier(stage)) - {'best of n'}
    found[value] = sorted(
      tuple(row[x]['mean'] for x in ('kl', 'proxy', 'gold'))
      for row in seed.frontier(stage)[name]
    )
  return found


def _risen(seed: Seed, column: int) -> float:
  """How much higher the reward model's (1) or the judge's (2) gain is in the
  last third of the snapshots than in the middle third, with the fewest
  rankings."""
  points = next(iter(_along(seed, 'overopt').values()))
  third = len(points) // 3
  gains = [point[column] for point in points]
  middle, last = gains[-2 * third : -third], gains[-third:]
  return float(np.mean(last) - np.mean(middle))


def _higher_peak(seed: Seed, sweep: str) -> float:
  """The judge's highest gain at the sweep's largest value over its smallest."""
  curves = _along(seed, sweep).values()
  peaks = [max(gold for _, _, gold in points) for points in curves]
  return peaks[-1] - peaks[0]


def _extrapolated(seed: Seed, other: str) -> float:
  """log of how many times smaller the mean squared error of Gao et al.'s curve
  is than that of another one, both fitted to the first half of the snapshots,
  by KL, in foretelling the judge's gain in the second half.

  `other` is 'line', in √KL, or 'quadratic', in it.
  """
  errors = collections.Counter()
  curves = [
    points
    for sweep in ('overopt', 'sizes')
    for points in _along(seed, sweep).values()
  ]
  for points in curves:
    kept = np.array([p for p in points if p[0] > 0])
    half = len(kept) // 2
    if half < 3:
      raise ValueError(f'{len(kept)} points along RL are too few to foretell')
    kl, gold = kept[:, 0], kept[:, 2]
    low, high = slice(None, half), slice(half, None)
    slope = (np.sqrt(kl[low]) @ gold[low]) / kl[low].sum()
    guesses = {'line': slope * np.sqrt(kl[high])}
    for name, kind in (('curve', 'rl'), ('quadratic', 'best_of_n')):
      found = overoptimization.fit(kind, kl[low], gold[None, low], 1)
      guesses[name] = overoptimization.curve(
        kind, found.alpha.mean, found.beta.mean, kl[high]
      )
    for name, guess in guesses.items():
      errors[name] += float(((guess - gold[high]) ** 2).sum())
  return math.log(errors[other] / errors['curve'])


def _curve(points: Sequence[tuple[float, ...]]) -> tuple[np.ndarray, ...]:
  """(√KL, the judge's gain) along RL from the start, ascending.

  Gains go about like √KL, so that lines between snapshots are straight in it.
  """
  found = sorted((math.sqrt(p[0]), p[-1]) for p in points if p[0] > 0)
  return tuple(np.array([(0.0, 0.0), *found]).T)


def _along_points(
  sweep: str, name_fn: Callable[[float], str]
) -> Callable[[Seed], Points]:
  """The judge's gain against KL, a series for each value of a sweep."""
  return lambda seed: {
    name_fn(value): [(kl, gold) for kl, _, gold in points]
    for value, points in _along(seed, sweep).items()
  }


def _frontier_distance(seed: Seed) -> float:
  """SAME_GAIN less the widest mean gap, at equal KL, between the judge's gains
  of runs with different beta, as a share of their mean."""
  curves = [_curve(p) for p in _along(seed, 'frontier').values()]
  gaps = [0.0]
  for first, second in itertools.combinations(curves, 2):
    at = np.linspace(0, min(first[0].max(), second[0].max()), 21)
    gains = np.interp(at, *first), np.interp(at, *second)
    gap = np.abs(gains[0] - gains[1]).mean()
    gaps.append(float(gap / np.abs(np.mean(gains))))
  return SAME_GAIN - max(gaps)


def _behind(seed: Seed, number: float) -> float:
  """How far a method's mean gain stays behind PPO's, at equal KL, as a share of
  that."""
  curves = [_curve(_along(seed, 'methods')[x]) for x in (1.0, number)]
  at = np.linspace(0, min(curve[0].max() for curve in curves), 21)
  gains = [np.interp(at, *curve).mean() for curve in curves]
  return float((gains[0] - gains[1]) / abs(gains[0]))


def _dpo_points(seed: Seed) -> list[tuple[float, float]]:
  """(KL, the judge's gain) of DPO with each beta."""
  start = seed.judge('rl_init')
  return sorted(
    (seed.kl(stage), seed.judge(stage) - start)
    for stage in seed.config['stages_of']['methods']
    if stage.startswith('dpo')
  )


def _over_dpo(seed: Seed) -> float:
  """PPO's gain over DPO's, mean over the betas whose KL PPO reaches with a
  tenth of its KL coefficient.

  Raises:
    ValueError: it reaches none.
  """
  ppo = _curve(_along(seed, 'methods')[4.0])
  points = [(math.sqrt(max(0.0, kl)), gold) for kl, gold in _dpo_points(seed)]
  gaps = [np.interp(d, *ppo) - gold for d, gold in points if d <= ppo[0].max()]
  if not gaps:
    raise ValueError("PPO's KL reaches that of no run of DPO")
  return float(np.mean(gaps))


def _best_of_n(seed: Seed) -> list[tuple[float, float]]:
  """(KL, the judge's gain) of best of n."""
  stage = next(iter(seed.sweep('methods').values()))
  rows = seed.frontier(stage)['best of n']
  return [(row['kl']['mean'], row['gold']['mean']) for row in rows]


def _best_of_n_over_ppo(seed: Seed) -> float:
  """Best of n's gain over PPO's, mean over the n whose KL PPO reaches.

  Raises:
    ValueError: it reaches none.
  """
  ppo = _curve(_along(seed, 'methods')[1.0])
  gaps = [
    gold - np.interp(math.sqrt(kl), *ppo)
    for kl, gold in _best_of_n(seed)
    if 0 < kl <= ppo[0].max() ** 2
  ]
  if not gaps:
    raise ValueError("PPO's KL reaches that of no best of n")
  return float(np.mean(gaps))


def _method_points(seed: Seed) -> Points:
  names = dict(enumerate(('PPO', 'RLOO', 'GRPO', 'PPO, beta x 0.1'), 1))
  return {
    **_along_points('methods', names.__getitem__)(seed),
    'DPO': _dpo_points(seed),
    'best of n': _best_of_n(seed),
  }


def _detail(text: str, source: str, need: str, other: str) -> Claim:
  """A detail of PPO that should make its answers better."""
  return Claim(
    text,
    source,
    "the judge's score higher with it than without",
    (need,),
    {'score gained': lambda seed: seed.judge('ppo') - seed.judge(other)},
    ('', JUDGE),
    _of_models('judge', other, 'ppo'),
  )


def _doubling(seed: Seed) -> float:
  """Accuracy gained with each doubling of the rankings."""
  points = [
    (math.log2(seed.results(stage)['num_comparisons']), _accuracy(seed, stage))
    for stage in seed.config['sweeps']['data_reward']
  ]
  return float(np.polyfit(*zip(*points, strict=True), 1)[0])


def _data_points(seed: Seed) -> Points:
  points = [
    (float(seed.results(stage)['num_comparisons']), _accuracy(seed, stage))
    for stage in seed.config['sweeps']['data_reward']
  ]
  return {'': sorted(points)}


def _mixed(seed: Seed, value: float) -> str:
  """PPO-ptx from the RL initialisation with this share of pretraining."""
  return seed.sweep('mix')[value]


# --- The claims ---------------------------------------------------------------

RATE = 'win rate against SFT'
LOSS = 'pretraining loss, nats a token'
JUDGE = "judge's mean score"

_HUANG = 'Huang et al. 2024'

CLAIMS = {
  'R1': Claim(
    'SFT overfits by loss within an epoch or so, yet more epochs raise the '
    'reward-model score',
    '3.5, C.1',
    'least validation loss by epoch 3; score higher after the last, the 16th',
    ('sft_long',),
    {
      'epochs to spare': lambda s: 3.5 - _best_epoch(s)[0]['epoch'],
      'score gained after it': lambda s: (
        _best_epoch(s)[1]['score_reward'] - _best_epoch(s)[0]['score_reward']
      ),
    },
    ('epoch', 'nats a token; reward units'),
    _epoch_points,
  ),
  'R2': Claim(
    'one epoch is right for the reward model; more overfits',
    'C.2',
    'validation log-loss higher after four epochs than after one, accuracy at '
    f'most {SAME_ACCURACY} higher',
    ('epochs_reward',),
    {
      'log-loss of 4 over 1': lambda s: (
        _log_loss(s, _ends(s, 'epochs_reward')[1])
        - _log_loss(s, _ends(s, 'epochs_reward')[0])
      ),
      'room left, accuracy': lambda s: (
        SAME_ACCURACY
        - _accuracy(s, _ends(s, 'epochs_reward')[1])
        + _accuracy(s, _ends(s, 'epochs_reward')[0])
      ),
    },
    ('epochs', 'validation log-loss, nats a pair'),
    _reward_points('epochs_reward', 'log_loss'),
  ),
  'R3': Claim(
    'all pairs of a prompt in one element beat shuffled pairs',
    '3.5',
    'lower validation log-loss and higher accuracy, one epoch each',
    ('pairs',),
    {
      'log-loss saved': lambda s: (
        _log_loss(s, 'reward_pairs') - _log_loss(s, 'reward')
      ),
      'accuracy gained': lambda s: (
        _accuracy(s, 'reward') - _accuracy(s, 'reward_pairs')
      ),
    },
    ('batches of', 'validation log-loss, nats a pair'),
    lambda s: {
      '': [
        ('prompts', _log_loss(s, 'reward')),
        ('pairs', _log_loss(s, 'reward_pairs')),
      ]
    },
  ),
  'R4': Claim(
    'the reward model is insensitive to half its learning rate more or less',
    'C.2',
    f'accuracy changes by less than {SAME_ACCURACY}',
    ('rate_reward',),
    {
      'room left': lambda s: (
        SAME_ACCURACY
        - max(
          abs(_accuracy(s, stage) - _accuracy(s, 'reward'))
          for stage in s.sweep('rate_reward').values()
        )
      )
    },
    ('learning rate, x the own', 'accuracy on validation pairs'),
    _reward_points('rate_reward', 'accuracy'),
  ),
  'R5': Claim(
    'reward models generalise to labelers who were left out, nearly as well',
    '4.1, E.2 (72.4 and 69.6 %)',
    f'a drop, but of less than {SMALL_DROP}',
    ('crossval',),
    {
      'drop': _drop,
      'room left': lambda s: SMALL_DROP - _drop(s),
    },
    ('labelers', 'accuracy'),
    lambda s: {
      '': [
        (name, s.results('crossval')[name]['mean'])
        for name in ('intra', 'inter')
      ]
    },
  ),
  'R6': Claim(
    'the bias that gives demonstrations mean score 0 leaves preferences as '
    'they are',
    '3.5',
    'the same log-loss and accuracy, but for rounding, with another bias',
    ('ranked',),
    {
      'room left, log-loss': lambda s: (
        ROUNDING - abs(_log_loss(s, 'reward') - _log_loss(s, 'reward_ranked'))
      ),
      'room left, accuracy': lambda s: (
        ROUNDING - abs(_accuracy(s, 'reward') - _accuracy(s, 'reward_ranked'))
      ),
    },
    ('mean 0 over', 'validation log-loss, nats a pair'),
    lambda s: {
      '': [
        ('demonstrations', _log_loss(s, 'reward')),
        ('ranked answers', _log_loss(s, 'reward_ranked')),
      ]
    },
  ),
  'R7': Claim(
    'labelers prefer PPO and PPO-ptx to SFT, SFT to prompted GPT, and that to '
    'GPT',
    '4.1, Figure 1',
    'each judged better than the one before; PPO and PPO-ptx above one half',
    (),
    {
      'PPO over SFT': lambda s: s.rate('ppo') - 0.5,
      'PPO-ptx over SFT': lambda s: s.rate('ppo_ptx') - 0.5,
      'SFT over prompted': lambda s: 0.5 - s.rate('prompted'),
      'prompted over GPT': lambda s: s.rate('prompted') - s.rate('pretrained'),
    },
    ('', RATE),
    _of_models('rate', 'pretrained', 'prompted', 'sft', 'ppo', 'ppo_ptx'),
  ),
  'R8': Claim(
    'a small aligned model is preferred to a large one that is not',
    '4.1 (100 times the size; here 8 times)',
    'PPO-ptx judged better than the larger pretrained model, whose loss is '
    "lower than the small one's",
    ('large',),
    {
      'score ahead': lambda s: s.judge('ppo_ptx') - s.judge('large'),
      'loss ahead of the small': lambda s: (
        s.loss('pretrained') - s.loss('large')
      ),
    },
    ('', JUDGE),
    _of_models('judge', 'pretrained', 'large', 'sft', 'ppo_ptx'),
  ),
  'R9': Claim(
    'RL costs performance elsewhere: the alignment tax',
    '4.2',
    "PPO's pretraining loss above that of its start",
    (),
    {'tax': lambda s: s.loss('ppo') - s.loss('rl_init')},
    ('', LOSS),
    _of_models('loss', 'pretrained', 'rl_init', 'ppo', 'ppo_ptx'),
  ),
  'R10': Claim(
    'mixing in pretraining gradients greatly reduces the tax without loss of '
    'preference',
    '4.2, 4.1',
    f"loss below PPO's, and at least {KEPT_GAIN} of PPO's gain by the judge",
    (),
    {
      'loss saved': lambda s: s.loss('ppo') - s.loss('ppo_ptx'),
      'gain kept': lambda s: (
        s.judge('ppo_ptx')
        - s.judge('rl_init')
        - KEPT_GAIN * (s.judge('ppo') - s.judge('rl_init'))
      ),
    },
    ('', JUDGE),
    _of_models('judge', 'rl_init', 'sft', 'ppo', 'ppo_ptx'),
  ),
  'R11': Claim(
    'the pretraining coefficient has a window: too small leaves the tax, too '
    'large costs reward',
    'E.6, Figure 33',
    'loss lower at its own value than at 0; score lower at 10 times that',
    ('gamma',),
    {
      'loss saved': lambda s: s.loss(_ends(s, 'gamma')[0]) - s.loss('ppo_ptx'),
      'score lost': lambda s: (
        s.score('ppo_ptx') - s.score(_ends(s, 'gamma')[1])
      ),
    },
    ('gamma, x the own', 'nats a token; reward units'),
    _against('gamma', **{LOSS: 'loss', 'reward-model score': 'score'}),
  ),
  'R12': Claim(
    'a larger KL coefficient alone does not do what pretraining gradients do',
    'E.6, Figure 34',
    "no beta up to 100 times its own has PPO-ptx's loss, or that before RL if "
    "it is higher, at PPO-ptx's score",
    ('beta', 'gamma'),
    {'distance of the best beta': _undominated},
    ('reward-model score', LOSS),
    _pareto_points,
  ),
  'R13': Claim(
    'the KL coefficient has an optimum for preferences between 0 and 2',
    'E.7, Figure 36',
    "the judge's score higher at its own value than at 0 and at 100 times that",
    ('beta',),
    {
      'over 0': lambda s: s.judge('ppo') - s.judge(_ends(s, 'beta')[0]),
      'over 100 times': lambda s: s.judge('ppo') - s.judge(_ends(s, 'beta')[1]),
    },
    ('beta, x the own', JUDGE),
    _against('beta', **{JUDGE: 'judge'}),
  ),
  'R14': Claim(
    'PPO without pretraining gradients diverges at learning rates that PPO-ptx '
    'bears',
    'E.9',
    'diverged: judged worse than before RL; the largest rate without it higher '
    'for PPO-ptx',
    ('rate', 'rate_ptx'),
    {'log of the ratio': _tolerance},
    ('learning rate, x the own', JUDGE),
    _rate_points,
  ),
  'R15': Claim(
    'few pretraining examples an episode let the pretraining loss rise, more '
    'contain it',
    'E.11',
    'loss above that before RL with 1 an episode, and not with 8',
    ('ratio',),
    {
      'loss added by 1': lambda s: (
        s.loss(_ends(s, 'ratio')[0]) - s.loss('rl_init')
      ),
      'loss saved by 8': lambda s: (
        s.loss('rl_init') - s.loss(_ends(s, 'ratio')[1])
      ),
    },
    ('examples an episode', LOSS),
    _against('ratio', **{LOSS: 'loss'}),
  ),
  'R16': Claim(
    'longer RL with pretraining gradients still erodes other abilities',
    'E.6, Figure 35',
    'pretraining loss higher after four times the episodes',
    ('length',),
    {
      'loss added': lambda s: (
        s.loss(_ends(s, 'length')[1]) - s.loss(_ends(s, 'length')[0])
      )
    },
    ('episodes, x the own', LOSS),
    _against('length', **{LOSS: 'loss'}),
  ),
  'R17': Claim(
    'a tenth of pretraining data in the RL initialisation helps most',
    'E.8',
    "PPO-ptx's score by the judge higher with a tenth than with none or half",
    ('mix',),
    {
      'over none': lambda s: s.judge(_mixed(s, 0.1)) - s.judge(_mixed(s, 0.0)),
      'over half': lambda s: s.judge(_mixed(s, 0.1)) - s.judge(_mixed(s, 0.5)),
    },
    ('share of pretraining data', JUDGE),
    _against('mix', **{JUDGE: 'judge'}),
  ),
  'R18': Claim(
    "the true score peaks and falls while the reward model's rises; better "
    'reward models peak higher; the form foretells higher KL',
    'Gao et al. 2022, 3',
    "the judge's gain lower in the last third of RL than in the middle third, "
    "the reward model's higher; highest gain higher with more rankings and "
    'with a larger reward model; d (alpha - beta log d) of the first half of '
    'RL errs less in the second than a line or a quadratic in d',
    ('overopt', 'sizes'),
    {
      "judge's fall": lambda s: -_risen(s, 2),
      "reward model's rise": lambda s: _risen(s, 1),
      'peak with more rankings': lambda s: _higher_peak(s, 'overopt'),
      'peak with a larger model': lambda s: _higher_peak(s, 'sizes'),
      'log of the errors of a line': lambda s: _extrapolated(s, 'line'),
      'of a quadratic': lambda s: _extrapolated(s, 'quadratic'),
    },
    ('KL, nats a response', "judge's gain"),
    lambda s: {
      **_along_points('overopt', lambda x: f'1/{1 / x:g} of the rankings')(s),
      **_along_points('sizes', lambda x: f'{x:g} x the weights')(s),
    },
  ),
  'R19': Claim(
    'reward models gain about a point with each doubling of the data',
    'Stiennon et al. 2020, 4.3 (1.1 %); Gao et al. 2022',
    'accuracy rises with the logarithm of the number of rankings',
    ('data_reward',),
    {'accuracy for a doubling': _doubling},
    ('rankings', 'accuracy on validation pairs'),
    _data_points,
  ),
  'R20': Claim(
    'a KL penalty does not move the frontier of true score and KL',
    'Gao et al. 2022, 4.1',
    f"at equal KL the judge's gains differ by less than {SAME_GAIN} of their "
    'mean',
    ('frontier',),
    {'room left': _frontier_distance},
    ('KL, nats a response', "judge's gain"),
    _along_points('frontier', lambda x: f'beta x {x:g}'),
  ),
  'R21': Claim(
    'tuned models are surer than GPT which of two sentences is likelier',
    'D.1, Table 14 (Winogender, basic: .735, .503 SFT, .618 PPO, .737 PPO-ptx)',
    'lower entropy of minimal pairs for SFT and for PPO than for GPT',
    ('minimal_pairs',),
    {
      'bits less, SFT': lambda s: s.entropy('pretrained') - s.entropy('sft'),
      'bits less, PPO': lambda s: s.entropy('pretrained') - s.entropy('ppo'),
    },
    ('', 'entropy of a minimal pair, bits'),
    _of_models('entropy', 'pretrained', 'sft', 'ppo', 'ppo_ptx'),
  ),
  'M1': Claim(
    'RLOO and GRPO, without a value model, do as well as PPO',
    'Ahmadian et al. 2024; Shao et al. 2024',
    f"at equal KL the judge's gain at most {NO_WORSE} of PPO's behind it; RLOO "
    'with as many operations as PPO no further behind either',
    ('methods',),
    {
      'room left, RLOO': lambda s: NO_WORSE - _behind(s, 2.0),
      'room left, GRPO': lambda s: NO_WORSE - _behind(s, 3.0),
      'room left, equal operations': lambda s: (
        NO_WORSE
        - (s.judge('ppo') - s.judge('rloo_compute'))
        / abs(s.judge('ppo') - s.judge('rl_init'))
      ),
    },
    ('KL, nats a response', "judge's gain"),
    _method_points,
  ),
  'M2': Claim(
    'PPO beats DPO at equal KL',
    'Xu et al. 2024 (arXiv 2404.10719)',
    "the judge's gain higher, mean over DPO's betas whose KL PPO reaches with "
    'a tenth of its own',
    ('methods',),
    {'gain over DPO': _over_dpo},
    ('KL, nats a response', "judge's gain"),
    _method_points,
  ),
  'M3': Claim(
    'best of n spends less KL than RL for the same gain',
    'Gao et al. 2022, 3.2',
    "the judge's gain higher than PPO's at the KL of best of n",
    ('methods',),
    {'gain over PPO': _best_of_n_over_ppo},
    ('KL, nats a response', "judge's gain"),
    _method_points,
  ),
  'D1': _detail(
    'a value model that starts from the reward model',
    f'C.4; {_HUANG}',
    'value_start',
    'ppo_value_from_policy',
  ),
  'D2': _detail(
    'whitened advantages', _HUANG, 'whitening', 'ppo_whiten_advantages_0'
  ),
  'D3': Claim(
    'a fixed low score for responses that do not end',
    _HUANG,
    "the judge's score higher with it than without",
    ('ending',),
    {'score gained': lambda s: s.judge('ppo_ending') - s.judge('ppo')},
    ('', JUDGE),
    _of_models('judge', 'ppo', 'ppo_ending'),
  ),
  'D4': _detail(
    'a reward model with mean 0 on demonstrations, not on ranked answers',
    f'3.5; {_HUANG}',
    'shift',
    'ppo_reward_ranked',
  ),
  'D5': _detail(
    "Adam's epsilon of 1e-5 instead of 1e-8",
    _HUANG,
    'epsilon',
    'ppo_adam_eps_1e-08',
  ),
  'D6': _detail(
    'a warm-up of the learning rate',
    f'C.4; {_HUANG}',
    'warmup',
    'ppo_num_warmup_iterations_0',
  ),
}


def chosen(text: str) -> list[str]:
  """Names of claims from 'all', or 'R1+R10'.

  Raises:
    ValueError: one is unknown.
  """
  names = list(CLAIMS) if text == 'all' else text.split('+')
  unknown = [name for name in names if name not in CLAIMS]
  if unknown:
    raise ValueError(
      f'claims must be all, or some of {", ".join(CLAIMS)} with + between: '
      f'{", ".join(map(repr, unknown))}'
    )
  return names


def needs(names: Sequence[str]) -> list[str]:
  """Sweeps and chains that some claims read, each once."""
  return list(dict.fromkeys(x for name in names for x in CLAIMS[name].needs))
