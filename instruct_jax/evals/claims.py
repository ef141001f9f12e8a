"""The paper's claims, as rules that were fixed before any run.

A claim has one or more margins: numbers read from the stages of a seed's run
(`configs/study.py`) that are positive if the claim is true there. Each margin
has Student's 95 % interval over seeds. The claim holds if every interval lies
above zero, does not hold if one lies below, and is otherwise undecided ("not
told apart"). If a margin cannot be read on some seed, for example because its
run diverged, the seed is named, and the claim cannot hold.

Section numbers without a source are those of Ouyang et al. 2022.
"""

import collections
import dataclasses
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
SMALL_DROP = 0.05  # R5: of accuracy, on labelers who were left out.
ROUNDING = 1e-5  # R6: of log-loss (nats per pair) and of accuracy.
KEPT_GAIN = 0.8  # R10: share of PPO's gain that PPO-ptx keeps.
DIVERGED = 0.05  # R14: drop of the judge's score below that before RL.
A_POINT = 0.011  # R19: accuracy gained per doubling of the rankings.
SAME_GAIN = 0.25  # R20: share of the judge's mean gain, at equal KL.
NO_WORSE = 0.2  # M1: share of PPO's gain by the judge.


def _number(value: float | None) -> float:
  """NaN for JSON's null, which stands for a number that was not finite."""
  return math.nan if value is None else float(value)


# File of a stage -> its keys that claims read; () is all of it.
_READ = {
  'results.json': ('accuracy', 'log_loss', 'num_comparisons')
  + ('intra', 'inter'),
  'epochs.json': (),
  'best_of_n.json': ('points',),
  'summary.json': ('everyone', 'pretraining_loss', 'kl'),
  'seconds.json': (),
}
_PAIRS = 'minimal_pairs/done.json'


def record(folder: epath.PathLike, seed: int) -> dict[str, Any]:
  """What the claims read of the finished run of one seed, as JSON values.

  A record says all that a study needs, so that seeds may run on different
  machines.

  Args:
    folder: the work directory of the run.
    seed: its seed.

  Returns:
    'seed'; 'commit', of the run; 'config', the keys of it that are read; and
    'files', contents by path below the folder. Files that the run lacks are
    left out.
  """
  folder = epath.Path(folder)

  def read(name):
    path = folder / name
    return json.loads(path.read_text()) if path.exists() else None

  config, files = read('config.json'), {}
  paths = itertools.product(config['stage_order'], _READ)
  for path in (*map('/'.join, paths), _PAIRS):
    found, keys = read(path), _READ.get(path.split('/')[1], ('info',))
    if keys and found is not None:
      found = {key: found[key] for key in keys if key in found}
    if found not in (None, {}):
      files[path] = found
  kept = ('stage_order', 'sweeps', 'stages_of')
  return {
    'seed': seed,
    'commit': (read('provenance.json') or {}).get('commit'),
    'config': {key: config[key] for key in kept},
    'files': files,
  }


class Seed:
  """The finished run of one seed, as the claims read it.

  Args:
    values: what `record` gives.
  """

  def __init__(self, values: Mapping[str, Any]):
    self.name = f'seed {values["seed"]}'
    self.config, self.files = values['config'], values['files']

  def _read(self, name: str) -> Any:
    if name not in self.files:
      raise LookupError(f'the run left no {name}')
    return self.files[name]

  @property
  def summary(self) -> dict[str, Any]:
    """summary.json of the last stage, which judges all policies."""
    return self._read(f'{self.stages[-1]}/summary.json')

  def sweep(self, name: str) -> dict[float, str]:
    """Value of the swept key -> stage, ascending."""
    found = self.config['sweeps'][name]
    return dict(sorted((value, stage) for stage, value in found.items()))

  def judge(self, model: str) -> float:
    """The judge's mean score of a model's answers, in [0, 1]."""
    return _number(self.summary['everyone'][model]['judge'])

  def score(self, model: str) -> float:
    """The reward model's mean score of a model's answers."""
    return _number(self.summary['everyone'][model]['reward model'])

  def rate(self, model: str) -> float:
    """Win rate against SFT."""
    return self.summary['everyone'][model]['win rate']['rate']

  def loss(self, model: str) -> float:
    """Held-out pretraining loss, nats per token."""
    return _number(self.summary['pretraining_loss'][model])

  def kl(self, model: str) -> float:
    """KL from the RL initialisation, nats per response."""
    return _number(self.summary['kl'][model])

  def entropy(self, model: str) -> float:
    """Entropy over a minimal pair's two sentences, bits; mean over pairs."""
    scores = self._read(_PAIRS)['info']['scores']
    return scores[f'{model} winogender basic prompt entropy']

  def results(self, stage: str) -> dict[str, Any]:
    """results.json of a stage."""
    return self._read(f'{stage}/results.json')

  def epochs(self, stage: str) -> list[dict[str, Any]]:
    """Loss and score after each epoch, from a `select` stage."""
    return self._read(f'{stage}/epochs.json')

  def frontier(self, stage: str) -> dict[str, list[dict[str, Any]]]:
    """Points of a stage of `configs/best_of_n.py`, by curve."""
    return self._read(f'{stage}/best_of_n.json')['points']

  @property
  def stages(self) -> list[str]:
    """All stages of its run, in order."""
    return list(self.config['stage_order'])

  @property
  def stages_of(self) -> dict[str, list[str]]:
    """Sweep or chain -> its stages."""
    return self.config['stages_of']

  def seconds(self, stage: str) -> float:
    """How long a stage took."""
    return float(self._read(f'{stage}/seconds.json'))


@dataclasses.dataclass(frozen=True)
class Panel:
  """A panel of a claim's figure.

  Attributes:
    x, y: labels of the axes.
    points: reads the points of a seed.
    kind: 'values' have the same x on every seed; 'curves' are interpolated
      between points; 'pairs' are x and y of the same things on every seed.
  """

  x: str
  y: str
  points: Callable[[Seed], Points]
  kind: str = 'values'


@dataclasses.dataclass(frozen=True)
class Claim:
  """One claim.

  Attributes:
    text: what is claimed.
    source: where it is claimed.
    rule: what counts as true here, in words.
    needs: sweeps and chains of `configs/study.py` that it reads.
    margins: name -> function that reads the margin of a seed.
    panels: panels of its figure.
  """

  text: str
  source: str
  rule: str
  needs: tuple[str, ...]
  margins: Mapping[str, Callable[[Seed], float]]
  panels: tuple[Panel, ...]


@dataclasses.dataclass(frozen=True)
class Margin:
  """A margin on each seed where it could be read, with mean and interval.

  `missing` has the reason for each of the other seeds.
  """

  values: tuple[float, ...]
  interval: win_rate.Interval | None  # None without a value.
  missing: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Verdict:
  """A claim's margins, and the verdict from them."""

  margins: Mapping[str, Margin]
  text: str


def measured(fn: Callable[[Seed], Any], seed: Seed) -> tuple[Any, str]:
  """(what a function reads from a seed, ''), or (None, why it cannot).

  A run that diverged has nulls for numbers, too few points, or no figure.
  """
  try:
    found = fn(seed)
    if isinstance(found, float) and not math.isfinite(found):
      raise ValueError('not finite')
    return found, ''
  except (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    OSError,
  ) as error:
    return None, f'{seed.name}: {type(error).__name__}: {error}'


def verdict(claim: Claim, seeds: Sequence[Seed]) -> Verdict:
  """Applies a claim's rule to the runs of some seeds."""
  margins = {}
  for name, margin in claim.margins.items():
    found = [measured(lambda s, m=margin: float(m(s)), seed) for seed in seeds]
    values = tuple(value for value, _ in found if value is not None)
    interval = win_rate.student_interval(values) if values else None
    missing = tuple(reason for _, reason in found if reason)
    margins[name] = Margin(values, interval, missing)
  intervals = [margin.interval for margin in margins.values()]
  if None in intervals:
    return Verdict(margins, NOT_MEASURED)
  are_whole = not any(margin.missing for margin in margins.values())
  if are_whole and all(interval.low > 0 for interval in intervals):
    return Verdict(margins, HOLDS)
  fails = any(interval.high < 0 for interval in intervals)
  return Verdict(margins, FAILS if fails else OPEN)


# --- What several claims read -------------------------------------------------


def _ends(seed, sweep) -> tuple[str, str]:
  """The stages of a sweep's smallest and largest values."""
  stages = list(seed.sweep(sweep).values())
  return stages[0], stages[-1]


def _against(sweep: str, read: Callable[[Seed, str], float]):
  """Points: what `read` gives for each stage of a sweep, against its value."""
  return lambda seed: {
    '': [(x, read(seed, stage)) for x, stage in seed.sweep(sweep).items()]
  }


def _of(names: Sequence[str], read: Callable[[Seed, str], float]):
  """Points: what `read` gives for each of these models or stages."""
  return lambda seed: {'': [(name, read(seed, name)) for name in names]}


def _accuracy(seed: Seed, stage: str) -> float:
  return seed.results(stage)['accuracy']


def _log_loss(seed: Seed, stage: str) -> float:
  return seed.results(stage)['log_loss']


def _best_epoch(seed: Seed) -> tuple[dict[str, Any], dict[str, Any]]:
  """The epoch of lowest validation loss and the last epoch, in long SFT."""
  rows = seed.epochs('select_long')
  return min(rows, key=lambda row: row['valid_loss']), rows[-1]


def _epoch_points(key: str) -> Callable[[Seed], Points]:
  return lambda seed: {
    '': [(float(row['epoch']), row[key]) for row in seed.epochs('select_long')]
  }


def _undominated(seed: Seed) -> float:
  """How far the best KL coefficient falls short of PPO-ptx.

  This is the worse of two shortfalls: in tax, in units of PPO's tax, and in
  reward, in units of PPO's gain. PPO-ptx gets no credit for a loss below that
  before RL, which comes from further training on such text.
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


def _at_rate(seed: Seed, sweep: str) -> dict[float, float]:
  """Multiple of the learning rate -> the judge's score of the last weights."""
  stages = seed.sweep(sweep).items()
  return {factor: seed.judge(f'{stage}_policy') for factor, stage in stages}


def _threshold(seed: Seed, sweep: str) -> float:
  """log of twice the largest multiple of the learning rate that still works.

  No run diverges up to it; 0 if even the smallest multiple diverges.
  """
  least, reached = seed.judge('rl_init') - DIVERGED, 0.0
  for factor, score in _at_rate(seed, sweep).items():
    if not score >= least:  # NaN as well.
      break
    reached = math.log(2 * factor)
  return reached


def _tolerance(seed: Seed) -> float:
  """log of the ratio of the learning rates that PPO-ptx and PPO tolerate.

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
    name: list(_at_rate(seed, key).items())
    for name, key in (('PPO', 'rate'), ('PPO-ptx', 'rate_ptx'))
  }


def _drop(seed: Seed) -> float:
  found = seed.results('crossval')
  return found['intra']['mean'] - found['inter']['mean']


def _along(seed: Seed, sweep: str) -> dict[float, list[tuple[float, ...]]]:
  """Value of a sweep -> (KL, reward model's gain, judge's gain) during RL."""
  found = {}
  for value, stage in seed.sweep(sweep).items():
    (name,) = set(seed.frontier(stage)) - {'best of n'}
    found[value] = sorted(
      tuple(row[x]['mean'] for x in ('kl', 'proxy', 'gold'))
      for row in seed.frontier(stage)[name]
    )
  return found


def _thirds(seed: Seed, column: int) -> list[float]:
  """Mean gain over each third of the snapshots, with the fewest rankings.

  `column` is 1 for the reward model's gain, 2 for the judge's.
  """
  points = next(iter(_along(seed, 'overopt').values()))
  third = len(points) // 3
  if not third:
    raise ValueError(f'{len(points)} points along RL make no thirds')
  gains = [point[column] for point in points[len(points) - 3 * third :]]
  return [float(np.mean(gains[i * third :][:third])) for i in range(3)]


def _fallen(seed: Seed) -> float:
  """Drop of the judge's gain from the better earlier third to the last."""
  first, middle, last = _thirds(seed, 2)
  return max(first, middle) - last


def _proxy_risen(seed: Seed) -> float:
  """Rise of the reward model's gain from the middle third to the last."""
  _, middle, last = _thirds(seed, 1)
  return last - middle


def _peak_points(sweep: str) -> Callable[[Seed], Points]:
  """Points: the judge's highest gain during RL against the sweep's value.

  The highest gain is the highest mean of three neighbouring snapshots.
  """

  def peak(points):
    gains = np.array([gold for _, _, gold in points])
    return float(np.convolve(gains, np.ones(3) / 3, 'valid').max())

  return lambda seed: {
    '': [(x, peak(points)) for x, points in _along(seed, sweep).items()]
  }


def _higher_peak(seed: Seed, sweep: str) -> float:
  """The judge's highest gain at a sweep's largest value minus its smallest."""
  (_, first), *_, (_, last) = _peak_points(sweep)(seed)['']
  return last - first


def _errors(seed: Seed) -> dict[str, float]:
  """Mean squared errors of predictions of the judge's gain at higher KL.

  Functions fitted to the half of the snapshots with lower KL predict the other
  half: 'curve' is Gao et al.'s for RL, 'line' and 'quadratic' are in √KL.
  """
  errors, number = collections.Counter(), 0
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
    number += len(gold[high])
    for name, guess in guesses.items():
      errors[name] += float(((guess - gold[high]) ** 2).sum())
  return {name: error / number for name, error in errors.items()}


def _extrapolated(seed: Seed, other: str) -> float:
  """log of another function's error divided by the curve's error."""
  errors = _errors(seed)
  return math.log(errors[other] / errors['curve'])


def _curve(points: Sequence[tuple[float, ...]]) -> tuple[np.ndarray, ...]:
  """(√KL, the judge's gain) during RL from the start, ascending.

  Gains grow roughly as √KL, so interpolation between snapshots is linear in it.
  """
  found = sorted((math.sqrt(p[0]), p[-1]) for p in points if p[0] > 0)
  return tuple(np.array([(0.0, 0.0), *found]).T)


def _along_points(
  sweep: str, name_fn: Callable[[float], str], column: int = 2
) -> Callable[[Seed], Points]:
  """Points: gain against KL, a series for each value of a sweep.

  `column` is 1 for the reward model's gain, 2 for the judge's.
  """
  return lambda seed: {
    name_fn(value): [(point[0], point[column]) for point in points]
    for value, points in _along(seed, sweep).items()
  }


def _frontier_distance(seed: Seed) -> float:
  """SAME_GAIN minus the widest gap between runs with different beta.

  A gap is the mean difference of the judge's gains at equal KL, as a share of
  their mean.
  """
  curves = [_curve(p) for p in _along(seed, 'frontier').values()]
  gaps = [0.0]
  for first, second in itertools.combinations(curves, 2):
    at = np.linspace(0, min(first[0].max(), second[0].max()), 21)
    gains = np.interp(at, *first), np.interp(at, *second)
    gap = np.abs(gains[0] - gains[1]).mean()
    gaps.append(float(gap / np.abs(np.mean(gains))))
  return SAME_GAIN - max(gaps)


def _behind(seed: Seed, number: float) -> float:
  """Shortfall of a method's mean gain at equal KL, as a share of PPO's gain."""
  curves = [_curve(_along(seed, 'methods')[x]) for x in (1.0, number)]
  at = np.linspace(0, min(curve[0].max() for curve in curves), 21)
  gains = [np.interp(at, *curve).mean() for curve in curves]
  return float((gains[0] - gains[1]) / abs(gains[0]))


def _dpo_points(seed: Seed) -> list[tuple[float, float]]:
  """(KL, the judge's gain) of DPO for each beta."""
  start = seed.judge('rl_init')
  return sorted(
    (seed.kl(stage), seed.judge(stage) - start)
    for stage in seed.stages_of['methods']
    if stage.startswith('dpo')
  )


def _over_dpo(seed: Seed) -> float:
  """PPO's gain minus DPO's at equal KL, mean over DPO's betas.

  PPO runs with a tenth of its KL coefficient; betas whose KL it does not reach
  are left out.

  Raises:
    ValueError: PPO reaches the KL of none.
  """
  ppo = _curve(_along(seed, 'methods')[4.0])
  points = [(math.sqrt(max(0.0, kl)), gold) for kl, gold in _dpo_points(seed)]
  gaps = [np.interp(d, *ppo) - gold for d, gold in points if d <= ppo[0].max()]
  if not gaps:
    raise ValueError("PPO's KL reaches that of no run of DPO")
  return float(np.mean(gaps))


def _room_by_operations(seed: Seed, method: str) -> float:
  """NO_WORSE minus a method's shortfall after as many operations as PPO.

  The shortfall is a share of PPO's gain.
  """
  ppo = seed.judge('ppo')
  behind = ppo - seed.judge(f'{method}_compute')
  return NO_WORSE - behind / abs(ppo - seed.judge('rl_init'))


def _best_of_n(seed: Seed) -> list[tuple[float, float]]:
  """(KL, the judge's gain) of best of n, for each n."""
  rows = seed.frontier('frontier_ppo')['best of n']
  return [(row['kl']['mean'], row['gold']['mean']) for row in rows]


def _best_of_n_over_ppo(seed: Seed) -> float:
  """Best of n's gain minus PPO's at equal KL, mean over the n PPO reaches.

  Raises:
    ValueError: PPO reaches the KL of none.
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


def _detail(
  text: str, source: str, need: str, other: str, own: str = 'ppo'
) -> Claim:
  """The claim that a detail of PPO improves on `other`, which lacks it."""
  return Claim(
    text,
    source,
    "the judge's score higher with it than without",
    (need,),
    {'score gained': lambda seed: seed.judge(own) - seed.judge(other)},
    (Panel('', JUDGE, _of((other, own), Seed.judge)),),
  )


def _data_points(read: Callable[[Seed, str], float]):
  """Points: a reward model's figure against the number of its rankings."""
  return lambda seed: {
    '': sorted(
      (float(seed.results(stage)['num_comparisons']), read(seed, stage))
      for stage in seed.config['sweeps']['data_reward']
    )
  }


def _doubling(seed: Seed) -> float:
  """Accuracy gained per doubling of the rankings, by least squares."""
  points = _data_points(_accuracy)(seed)['']
  numbers, accuracies = zip(*points, strict=True)
  return float(np.polyfit(np.log2(numbers), accuracies, 1)[0])


def _mixed(seed: Seed, value: float) -> str:
  """The stage of PPO-ptx whose start has this share of pretraining data."""
  return seed.sweep('mix')[value]


# --- The claims ---------------------------------------------------------------

RATE = 'win rate against SFT'
LOSS = 'pretraining loss, nats per token'
JUDGE = "judge's mean score"
SCORE = "reward model's mean score"
LOG_LOSS = 'validation log-loss, nats per pair'
ACCURACY = 'accuracy on validation pairs'
KL = 'KL, nats per response'
GAIN = "judge's gain"
RATE_LABEL = 'learning rate, x the default'

_HUANG = 'Huang et al. 2024'
_METHODS = (Panel(KL, GAIN, _method_points, 'curves'),)

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
    (
      Panel(
        'epoch', 'validation loss, nats per token', _epoch_points('valid_loss')
      ),
      Panel('epoch', SCORE, _epoch_points('score_reward')),
    ),
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
    (
      Panel('epochs', LOG_LOSS, _against('epochs_reward', _log_loss)),
      Panel('epochs', ACCURACY, _against('epochs_reward', _accuracy)),
    ),
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
    (
      Panel('', LOG_LOSS, _of(('reward', 'reward_pairs'), _log_loss)),
      Panel('', ACCURACY, _of(('reward', 'reward_pairs'), _accuracy)),
      Panel('', 'seconds', _of(('reward', 'reward_pairs'), Seed.seconds)),
    ),
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
    (Panel(RATE_LABEL, ACCURACY, _against('rate_reward', _accuracy)),),
  ),
  'R5': Claim(
    'reward models generalise to labelers who were left out, nearly as well',
    '4.1, E.2 (72.4 and 69.6 %)',
    f'accuracy on their rankings falls by less than {SMALL_DROP}, five groups '
    'left out in turn',
    ('crossval',),
    {'room left': lambda s: SMALL_DROP - _drop(s)},
    (
      Panel(
        'labelers',
        'accuracy',
        _of(('intra', 'inter'), lambda s, x: s.results('crossval')[x]['mean']),
      ),
    ),
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
    (Panel('', LOG_LOSS, _of(('reward', 'reward_ranked'), _log_loss)),),
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
    (
      Panel(
        '',
        RATE,
        _of(('pretrained', 'prompted', 'sft', 'ppo', 'ppo_ptx'), Seed.rate),
      ),
    ),
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
    (
      Panel(
        '', JUDGE, _of(('pretrained', 'large', 'sft', 'ppo_ptx'), Seed.judge)
      ),
      Panel('', LOSS, _of(('pretrained', 'large'), Seed.loss)),
    ),
  ),
  'R9': Claim(
    'RL costs performance elsewhere: the alignment tax',
    '4.2',
    "PPO's pretraining loss above that of its start",
    (),
    {'tax': lambda s: s.loss('ppo') - s.loss('rl_init')},
    (
      Panel(
        '', LOSS, _of(('pretrained', 'rl_init', 'ppo', 'ppo_ptx'), Seed.loss)
      ),
    ),
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
    (
      Panel('', LOSS, _of(('rl_init', 'sft', 'ppo', 'ppo_ptx'), Seed.loss)),
      Panel('', JUDGE, _of(('rl_init', 'sft', 'ppo', 'ppo_ptx'), Seed.judge)),
    ),
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
    (
      Panel('gamma, x the default', LOSS, _against('gamma', Seed.loss)),
      Panel('gamma, x the default', SCORE, _against('gamma', Seed.score)),
    ),
  ),
  'R12': Claim(
    'a larger KL coefficient alone does not do what pretraining gradients do',
    'E.6, Figure 34',
    "no beta up to 100 times its own has PPO-ptx's loss, or that before RL if "
    "it is higher, at PPO-ptx's score",
    ('beta', 'gamma'),
    {'distance of the best beta': _undominated},
    (
      Panel('beta of PPO, x the default', LOSS, _against('beta', Seed.loss)),
      Panel('beta of PPO, x the default', SCORE, _against('beta', Seed.score)),
      Panel(SCORE, LOSS, _pareto_points, 'pairs'),
    ),
  ),
  'R13': Claim(
    'the KL coefficient has an optimum for preferences between 0 and 2',
    'E.7, Figure 36 (PPO-ptx)',
    "the judge's score of PPO-ptx higher at its own value than at 0 and at 100 "
    'times that',
    ('beta_ptx', 'beta'),
    {
      'over 0': lambda s: s.judge('ppo_ptx') - s.judge(_ends(s, 'beta_ptx')[0]),
      'over 100 times': lambda s: (
        s.judge('ppo_ptx') - s.judge(_ends(s, 'beta_ptx')[1])
      ),
    },
    (
      Panel(
        'beta, x the default',
        JUDGE,
        lambda s: {
          'PPO-ptx': _against('beta_ptx', Seed.judge)(s)[''],
          'PPO': _against('beta', Seed.judge)(s)[''],
        },
      ),
    ),
  ),
  'R14': Claim(
    'PPO without pretraining gradients diverges at learning rates that PPO-ptx '
    'bears',
    'E.9',
    f"diverged: the judge's score of the last weights {DIVERGED} below that "
    'before RL; the largest rate without it higher for PPO-ptx',
    ('rate', 'rate_ptx'),
    {'log of the ratio': _tolerance},
    (Panel(RATE_LABEL, JUDGE, _rate_points),),
  ),
  'R15': Claim(
    'few pretraining examples an episode let the pretraining loss rise, more '
    'contain it',
    'E.11 (4, 8 and 32)',
    'loss higher with 1 an episode than with 8',
    ('ratio',),
    {
      'loss saved by 8': lambda s: (
        s.loss(_ends(s, 'ratio')[0]) - s.loss(_ends(s, 'ratio')[1])
      ),
    },
    (
      Panel('examples an episode', LOSS, _against('ratio', Seed.loss)),
      Panel('examples an episode', 'seconds', _against('ratio', Seed.seconds)),
    ),
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
    (Panel('episodes, x the default', LOSS, _against('length', Seed.loss)),),
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
    (
      Panel('share of pretraining data', JUDGE, _against('mix', Seed.judge)),
      Panel('share of pretraining data', LOSS, _against('mix', Seed.loss)),
    ),
  ),
  'R18': Claim(
    "the true score peaks and falls while the reward model's rises",
    'Gao et al. 2022, 3',
    "with the fewest rankings the judge's mean gain over the last third of RL "
    'lower than over the first or the second, whichever is higher; the reward '
    "model's higher than over the second",
    ('overopt', 'sizes'),
    {"judge's fall": _fallen, "reward model's rise": _proxy_risen},
    (
      Panel(
        KL,
        GAIN,
        _along_points('overopt', lambda x: f'1/{1 / x:g} of the rankings'),
        'curves',
      ),
      Panel(
        KL,
        "reward model's gain",
        _along_points('overopt', lambda x: f'1/{1 / x:g} of the rankings', 1),
        'curves',
      ),
      Panel(
        KL,
        GAIN,
        _along_points('sizes', lambda x: f'{x:g} x the weights'),
        'curves',
      ),
    ),
  ),
  'R18b': Claim(
    'the true score peaks higher against reward models of more data or weights',
    'Gao et al. 2022, 3.2, 3.4',
    "the judge's highest gain higher with half of the rankings than with 1/32, "
    'and with 8 times the weights than with a quarter',
    ('overopt', 'sizes'),
    {
      'peak with more rankings': lambda s: _higher_peak(s, 'overopt'),
      'peak with a larger model': lambda s: _higher_peak(s, 'sizes'),
    },
    (
      Panel('share of the rankings', 'highest gain', _peak_points('overopt')),
      Panel('weights, x the default', 'highest gain', _peak_points('sizes')),
    ),
  ),
  'R18c': Claim(
    'd (alpha - beta log d), d = √KL, foretells the true score at higher KL',
    'Gao et al. 2022, 3.1',
    'fitted to the first half of the snapshots, by KL, it errs less in the '
    'second than a line or a quadratic in d',
    ('overopt', 'sizes'),
    {
      'log of the errors of a line': lambda s: _extrapolated(s, 'line'),
      'of a quadratic': lambda s: _extrapolated(s, 'quadratic'),
    },
    (
      Panel(
        'fitted by',
        'root of the mean squared error',
        lambda s: {
          '': [(name, error**0.5) for name, error in _errors(s).items()]
        },
      ),
    ),
  ),
  'R19': Claim(
    'reward models gain about a point with each doubling of the data',
    'Stiennon et al. 2020, 4.3 (1.1 points); Gao et al. 2022',
    'accuracy rises with each doubling of the rankings, by at most '
    f'{2 * A_POINT}',
    ('data_reward', 'reward_sizes'),
    {'room left': lambda s: A_POINT - abs(_doubling(s) - A_POINT)},
    (
      Panel('rankings', ACCURACY, _data_points(_accuracy)),
      Panel('rankings', LOG_LOSS, _data_points(_log_loss)),
      Panel(
        'weights, x the default, 1/8 of the rankings',
        ACCURACY,
        _against('reward_sizes', _accuracy),
      ),
    ),
  ),
  'R20': Claim(
    'a KL penalty does not move the frontier of true score and KL',
    'Gao et al. 2022, 4.1',
    f"at equal KL the judge's gains differ by less than {SAME_GAIN} of their "
    'mean',
    ('frontier',),
    {'room left': _frontier_distance},
    (
      Panel(
        KL, GAIN, _along_points('frontier', lambda x: f'beta x {x:g}'), 'curves'
      ),
    ),
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
    (
      Panel(
        '',
        'entropy of a minimal pair, bits',
        _of(('pretrained', 'sft', 'ppo', 'ppo_ptx'), Seed.entropy),
      ),
    ),
  ),
  'M1': Claim(
    'RLOO and GRPO, without a value model, do as well as PPO',
    'Ahmadian et al. 2024; Shao et al. 2024',
    f"at equal KL the judge's gain at most {NO_WORSE} of PPO's behind it; with "
    'as many operations as PPO no further behind either',
    ('methods',),
    {
      'room left, RLOO': lambda s: NO_WORSE - _behind(s, 2.0),
      'room left, GRPO': lambda s: NO_WORSE - _behind(s, 3.0),
      'RLOO, equal operations': lambda s: _room_by_operations(s, 'rloo'),
      'GRPO, equal operations': lambda s: _room_by_operations(s, 'grpo'),
    },
    (
      *_METHODS,
      Panel(
        'as many operations',
        JUDGE,
        _of(('rl_init', 'ppo', 'rloo_compute', 'grpo_compute'), Seed.judge),
      ),
    ),
  ),
  'M2': Claim(
    'PPO beats DPO at equal KL',
    'Xu et al. 2024 (arXiv 2404.10719)',
    "the judge's gain higher, mean over DPO's betas whose KL PPO reaches with "
    'a tenth of its own',
    ('methods',),
    {'gain over DPO': _over_dpo},
    (
      *_METHODS,
      Panel(
        '', 'seconds', _of(('dpo_0p1', 'ppo', 'rloo_compute'), Seed.seconds)
      ),
    ),
  ),
  'M3': Claim(
    'best of n spends less KL than RL for the same gain',
    'Gao et al. 2022, 3.2',
    "the judge's gain higher than PPO's at the KL of best of n",
    ('methods',),
    {'gain over PPO': _best_of_n_over_ppo},
    _METHODS,
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
  'D3': _detail(
    'a fixed low score for responses that do not end',
    _HUANG,
    'ending',
    'ppo',
    'ppo_ending',
  ),
  # With a value model that starts from the reward model, a shift would cancel.
  'D4': _detail(
    'a reward model with mean 0 on demonstrations, not on ranked answers, with '
    'a new head of the value model',
    f'3.5; {_HUANG}',
    'shift',
    'ppo_reward_ranked',
    'ppo_value_from_policy',
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
  """Names of claims from 'all' or a list like 'R1+R10'.

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
  """Sweeps and chains that these claims read, each once."""
  return list(dict.fromkeys(x for name in names for x in CLAIMS[name].needs))
