"""Signs that an RL run is going wrong, with the likely cause.

Alarms are a pure function of the metrics so far. The experiment prints new
ones; the report lists all.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, int | float | None]  # A line of metrics.jsonl.

# Iterations to average over, since single batches are noisy.
WINDOW = 5
# Limits, by the policy's compute dtype. The first two are for the first
# minibatch: the distance of the mean ratio from 1, and the divergence from the
# old policy, nats per token. (The mean ratio of samples is near 1 for any two
# policies; the divergence is not near 0.) The third is the mean difference
# between the log-probabilities of the sampler and of the training graph, nats
# per token. Measured on a published model of 135 M parameters and 30 layers,
# with 300 tokens: 1e-6, 3e-9 and 1e-5 in float32; 0.003, 0.001 and 0.034 in
# bfloat16, where rounding depends on the batch's shape.
RATIO_TOLERANCE = {'float32': 1e-3, 'bfloat16': 0.02}
KL_TOLERANCE = {'float32': 1e-4, 'bfloat16': 0.01}
SAMPLER_TOLERANCE = {'float32': 0.05, 'bfloat16': 0.15}
# Range of the ratio gamma x (norm of the pretraining gradient) / (norm of PPO's
# gradient). Outside it, one of the two hardly counts. On the miniature, a ratio
# of 0.3 undoes the alignment tax, 0.03 does not, and 3 costs reward.
GRADIENT_RATIOS = (0.05, 5.0)


def find(
  rows: Sequence[Row],
  score_range: tuple[float, float] | None = None,
  response_length: int | None = None,
  compute_dtype: str = 'float32',
) -> dict[str, str]:
  """Returns the alarms raised by the metrics of an RL run.

  Args:
    rows: lines of metrics.jsonl in order, as written by `ppo_ptx`; None is a
      metric without a value.
    score_range: lowest and highest score on the reward model's training data.
    response_length: R, the longest response, tokens.
    compute_dtype: the policy's compute dtype, which selects the tolerances.

  Returns:
    Alarm name -> one sentence with the iteration where it first occurred, the
    numbers and the likely cause.
  """
  found: dict[str, str] = {}

  def add(step: int | float, signs: Iterable[tuple[str, str]]):
    for name, text in signs:
      found.setdefault(name, f'iteration {step:.0f}: {text}')

  for end, row in enumerate(rows, 1):
    add(row['step'], _first_minibatch(row, compute_dtype))
    if end >= WINDOW:
      add(row['step'], _gradients(rows[end - WINDOW : end]))
    if end >= 2 * WINDOW:
      window = rows[end - WINDOW : end]
      add(row['step'], _samples(rows[:WINDOW], window, response_length))
      add(row['step'], _score(window, score_range))
  # Held-out losses are measured rarely and are not noisy. Each is compared with
  # the loss before the first update or, without that, with the first measured.
  before = None
  for row in rows:
    for name in ('eval/pretraining_loss_before', 'eval/pretraining_loss'):
      loss = row.get(name)
      before = loss if before is None else before
      if loss is not None and loss > before + 0.2:
        text = (
          f'pretraining loss rose from {before:.3f} to {loss:.3f} nats a '
          'token: the alignment tax; raise ptx_coef or kl_coef, or lower the '
          'learning rate'
        )
        add(row['step'], [('pretraining_loss', text)])
  return found


def _mean(window: Sequence[Row], name: str) -> float | None:
  values = [row[name] for row in window if row.get(name) is not None]
  return sum(values) / len(values) if values else None


def _first_minibatch(row: Row, dtype: str) -> Iterator[tuple[str, str]]:
  """Checks the first minibatch, where policy and old policy must be equal."""
  differ = (
    'old log-probabilities and training graph differ (positions, temperature, '
    'dropout or precision)'
  )
  ratio = row.get('first/ppo/policy/ratio')
  tolerance = RATIO_TOLERANCE[dtype]
  if ratio is not None and abs(ratio - 1) > tolerance:
    yield (
      'ratio',
      f'ratio {ratio:.5f} at the first minibatch, where it must be 1 to within '
      f'{tolerance:g} in {dtype}; {differ}',
    )
  divergence = row.get('first/ppo/policy/approxkl')
  tolerance = KL_TOLERANCE[dtype]
  if divergence is not None and divergence > tolerance:
    yield (
      'ratio',
      f'the policy is {divergence:.2g} nats per token from the old one at the '
      f'first minibatch, where they are equal ({tolerance:g} allowed in '
      f'{dtype}); {differ}',
    )
  difference = row.get('objective/sampler_difference')
  tolerance = SAMPLER_TOLERANCE[dtype]
  if difference is not None and difference > tolerance:
    yield (
      'sampler',
      f'sampler and training graph differ by {difference:.3f} nats per token '
      f'({tolerance:g} allowed in {dtype}); check positions, padding and the '
      'cache',
    )


def _gradients(window: Sequence[Row]) -> Iterator[tuple[str, str]]:
  ppo_norm = _mean(window, 'ppo/policy/ppo_gradient_norm')
  ptx_norm = _mean(window, 'ptx/gradient_norm')
  if not ppo_norm or ptx_norm is None:
    return
  low, high = GRADIENT_RATIOS
  ratio = ptx_norm / ppo_norm
  if not low <= ratio <= high:
    yield (
      'gradients',
      f'the pretraining gradient times ptx_coef is {ratio:.3g} times '
      f"PPO's ({ptx_norm:.3g}, {ppo_norm:.3g}), outside [{low:g}, {high:g}]: "
      'one of the two hardly counts; '
      f'{"lower" if ratio > high else "raise"} ptx_coef',
    )


def _samples(
  first: Sequence[Row], window: Sequence[Row], response_length: int | None
) -> Iterator[tuple[str, str]]:
  """Compares the latest samples with the first ones."""
  kl = _mean(window, 'objective/kl')
  if kl is not None and kl < -0.05:
    yield (
      'negative_kl',
      f'mean KL {kl:.3f} nats over {WINDOW} iterations; a KL divergence '
      'cannot be negative: samples are not from the policy that is scored '
      '(top-k, top-p, temperature, or padding in the sum)',
    )
  started, ended = (_mean(each, 'objective/ended') for each in (first, window))
  if None not in (started, ended) and ended < started - 0.2:
    yield (
      'end_of_text',
      f'responses that end fell from {started:.2f} to {ended:.2f}; raise '
      'response_length or set missing_end_score',
    )
  before, now = (_mean(each, 'objective/length') for each in (first, window))
  if None not in (before, now) and not 0.5 * before <= now <= 1.5 * before:
    yield (
      'length',
      f'length went from {before:.1f} to {now:.1f} tokens (of at most '
      f'{response_length}); the reward model may reward length itself',
    )


def _score(
  window: Sequence[Row], score_range: tuple[float, float] | None
) -> Iterator[tuple[str, str]]:
  score = _mean(window, 'objective/score')
  if score_range is None or score is None:
    return
  low, high = score_range
  if not low <= score <= high:
    yield (
      'score_range',
      f"mean score {score:.2f} is outside the reward model's training range "
      f'[{low:.2f}, {high:.2f}]: it is extrapolating',
    )


class Reporter:
  """Returns each alarm once, when it is first raised.

  Args:
    limits: the arguments of `find` that follow `rows`.
  """

  def __init__(self, *limits: Any):
    self._limits = limits
    self._reported: set[str] = set()

  def new(self, rows: Sequence[Row]) -> list[str]:
    """Returns the alarms that no earlier call has returned."""
    found = self.find(rows)
    new = [text for name, text in found.items() if name not in self._reported]
    self._reported |= set(found)
    return new

  def find(self, rows: Sequence[Row]) -> dict[str, str]:
    """Returns all alarms; see the function `find`."""
    return find(rows, *self._limits)
