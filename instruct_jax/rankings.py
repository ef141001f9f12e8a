"""K-way rankings, for training and evaluating reward models and DPO.

All candidates of a prompt are one batch element (3.5, C.2), packed into as few
rows as they need. A candidate is scored once, however many labelers ranked it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from instruct_jax import lora, masked, model_fns, model_folder
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import preference_accuracy
from instruct_jax.infra import run as run_lib
from instruct_jax.infra import sharding, slices
from instruct_jax.models import heads
from instruct_jax.types import (
  ComparisonBatch,
  Metrics,
  PackedComparisons,
  Params,
)

# Rows of rankings -> one score per candidate [N, C], on the host.
ScoreRowsFn = Callable[[ComparisonBatch], np.ndarray]


def read(
  config: ConfigDict,
) -> tuple[list[records.Comparison], list[records.Comparison]]:
  """Reads rankings to train on and to validate on.

  At most `max_comparisons` and `max_valid_comparisons` of them; 0 is all.

  Raises:
    ValueError: a bad record, or ranks without any preference.
  """
  found = []
  for key in ('comparisons', 'valid_comparisons'):
    given = records.read_jsonl(config[key], records.Comparison)
    rankings = given[: config[f'max_{key}'] or None]
    if len(rankings) < len(given):
      run_lib.say(
        f'{config.name}: the first {len(rankings)} of {len(given)} {key} '
        f'(max_{key})'
      )
    records.check_labels(rankings, config[key])
    found.append(rankings)
  return found[0], found[1]


def load_policy(
  config: ConfigDict, tokenizer: tokenizer_lib.Tokenizer
) -> tuple[model_fns.Model, jax.sharding.Mesh]:
  """Loads the initial policy, and makes its mesh.

  Raises:
    ValueError: no such model, or rows that do not fit the model or the mesh.
  """
  model_folder.check(config.init, 'policy', tokenizer)
  mesh = model_folder.make_mesh(
    config.mesh, [config.init], [config.batch_size, config.eval_batch_size]
  )
  policy = model_folder.load(
    config.init,
    'policy',
    mesh,
    tokenizer,
    remat=config.remat,
    attention=config.attention,
    compute_dtype=config.compute_dtype,
  )
  model_fns.check_context(policy, config.row_length, 'row_length')
  return policy, mesh


def _rows(config, name, rankings, tokenizer, max_candidates, merge=False):
  """`loader.comparison_rows` of a stage; prints what is dropped."""
  rows, dropped = loader.comparison_rows(
    rankings, tokenizer, max_candidates, config.row_length, merge=merge
  )
  run_lib.tell_dropped(config.name, dropped.describe(name, 'row_length'))
  return rows, dropped


def training_rows(
  config: ConfigDict,
  comparisons: Sequence[records.Comparison],
  tokenizer: tokenizer_lib.Tokenizer,
) -> tuple[ComparisonBatch, loader.Dropped]:
  """Rankings as rows, and the rankings that were dropped, also printed.

  With `split_pairs` the rows are of pairs, from the same rankings.
  """
  sizes = (tokenizer, config.max_candidates, config.merge_rankings)
  rows, dropped = _rows(config, 'comparisons', comparisons, *sizes)
  if config.split_pairs:
    fitting = loader.fitting_comparisons(
      comparisons, tokenizer, config.row_length
    )
    pairs = [pair for each in fitting for pair in pairs_of(each)]
    rows, _ = _rows(config, 'pairs of comparisons', pairs, *sizes)
  return rows, dropped


def pairs_of(comparison: records.Comparison) -> list[records.Comparison]:
  """Splits a ranking into its pairs; tied pairs are left out."""
  found = []
  for two in itertools.combinations(range(len(comparison.completions)), 2):
    ranks = [comparison.ranks[i] for i in two]
    if ranks[0] != ranks[1]:
      found.append(
        dataclasses.replace(
          comparison,
          completions=tuple(comparison.completions[i] for i in two),
          ranks=(1, 2) if ranks[0] < ranks[1] else (2, 1),
          scores=(),
          ended=tuple(comparison.ended[i] for i in two if comparison.ended),
        )
      )
  return found


def demonstration_rows(
  config: ConfigDict, tokenizer: tokenizer_lib.Tokenizer
) -> ComparisonBatch:
  """Demonstrations as rankings of one candidate; prints what is dropped."""
  demonstrations = records.read_jsonl(
    config.demonstrations, records.Demonstration
  )
  rankings = [
    records.Comparison(d.prompt, (d.response,), (1,), d.id, turns=d.turns)
    for d in demonstrations
  ]
  rows, _ = _rows(config, 'demonstrations', rankings, tokenizer, 1)
  return rows


class Batches:
  """Packed batches of a run, all with the shape of the fullest one.

  Each microbatch is packed by itself, so that no row belongs to two.

  Args:
    config: of the stage.
    rows: to train on.
    seed: decides the order.
    reads_responses: whether batches locate the response tokens.
  """

  def __init__(
    self,
    config: ConfigDict,
    rows: ComparisonBatch,
    seed: int,
    reads_responses: bool = False,
  ):
    self._rows, self._num_parts = rows, config.num_microbatches
    size = config.batch_size
    if config.split_pairs:
      # About as many steps as with whole prompts. A multiple of `batch_size`
      # divides over the same devices and microbatches.
      size *= max(1, loader.num_rows(rows) // _num_prompts(rows))
    self._steps = loader.balanced_batches(
      rows.mask.sum(axis=(1, 2)),
      batch_size=size,
      seed=seed,
      num_epochs=config.num_epochs,
    )
    packed = [
      loader.pack_comparisons(part, reads_responses=reads_responses)
      for step in range(len(self._steps))
      for part in self._parts(step)
    ]
    num_devices = jax.device_count()
    needed = max(len(part.tokens) for part in packed)
    self._shape = {'num_rows': -(-needed // num_devices) * num_devices}
    if reads_responses:
      self._shape['num_responses'] = max(p.where.shape[1] for p in packed)

  def _parts(self, step):
    for indices in np.split(self._steps[step], self._num_parts):
      yield loader.take(self._rows, indices)

  def __len__(self) -> int:
    return len(self._steps)

  def __getitem__(self, step: int) -> PackedComparisons:
    parts = [
      loader.pack_comparisons(part, **self._shape) for part in self._parts(step)
    ]
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def _num_prompts(rows: ComparisonBatch) -> int:
  """Number of distinct prompts."""
  return len(
    {
      tokens[0, :length].tobytes()
      for tokens, length in zip(rows.tokens, rows.prompt_lengths, strict=True)
    }
  )


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Encoded rankings, which any number of models can score.

  Attributes:
    fitting: the rankings that fit into a row.
    rows: their distinct sets of candidates, in order of first appearance.
  """

  fitting: list[records.Comparison]
  rows: ComparisonBatch


def _scored(comparison):
  """Key of a ranking's scores, which do not depend on labeler and ranks."""
  return (
    comparison.prompt,
    comparison.turns,
    comparison.completions,
    records.ends_of(comparison),
  )


def encode(
  config: ConfigDict,
  comparisons: Sequence[records.Comparison],
  tokenizer: tokenizer_lib.Tokenizer,
) -> Encoded:
  """Encodes the rankings to be scored; prints how many are too long."""
  fitting = loader.fitting_comparisons(
    comparisons, tokenizer, config.row_length
  )
  run_lib.say_left_out(
    config.name,
    len(comparisons) - len(fitting),
    len(comparisons),
    'valid_comparisons',
    f'row_length ({config.row_length} tokens)',
  )
  distinct = {_scored(comparison): comparison for comparison in fitting}
  rows, _ = loader.comparison_rows(
    list(distinct.values()), tokenizer, config.max_candidates, config.row_length
  )
  return Encoded(fitting, rows)


def accuracy(
  score_fn: ScoreRowsFn,
  encoded: Encoded,
  groups: Sequence[set[str] | None] = (None,),
) -> list[preference_accuracy.Accuracy]:
  """Pairwise accuracy of scores on rankings, with its interval.

  Args:
    score_fn: called once.
    encoded: the rankings.
    groups: sets of labelers, one accuracy for each; None is all labelers.
  """
  distinct = dict.fromkeys(map(_scored, encoded.fitting))
  scores = dict(zip(distinct, score_fn(encoded.rows), strict=True))

  def of(chosen):
    return preference_accuracy.pairwise_accuracy(
      [scores[_scored(c)][: len(c.completions)] for c in chosen],
      [c.ranks for c in chosen],
      [c.prompt for c in chosen],
    )

  return [
    of([c for c in encoded.fitting if group is None or c.labeler in group])
    for group in groups
  ]


def results(
  accuracy: preference_accuracy.Accuracy,
  rows: ComparisonBatch,
  num_comparisons: int,
  dropped: loader.Dropped,
) -> dict[str, float]:
  """The entries of results.json for a model trained on rankings.

  Args:
    accuracy: on validation rankings.
    rows: of the training rankings.
    num_comparisons: training rankings before any was dropped.
    dropped: how many of them were dropped.
  """
  return {
    'accuracy': accuracy.accuracy,
    'low': accuracy.low,
    'high': accuracy.high,
    'log_loss': accuracy.log_loss,  # Nats per pair.
    'num_pairs': accuracy.num_pairs,
    'num_comparisons': num_comparisons - dropped.total,
    'num_prompts': _num_prompts(rows),
    'num_forwards': int(rows.mask.any(axis=2).sum()),  # Per epoch.
    'num_dropped': dropped.total,
  }


def score_rows(
  program: Callable[..., jax.Array],
  params: Params,
  rows: ComparisonBatch,
  batch_size: int,
) -> np.ndarray:
  """A reward model's scores of every candidate: [N, C] on the host.

  The score is read at a candidate's last token, whichever token that is.

  Args:
    program: (params, tokens, segments) -> scalars, on the current mesh.
    params: of the reward model.
    rows: rows of any number of prompts.
    batch_size: packed rows per call.
  """
  packed = loader.pack_comparisons(rows)
  scalars = _in_batches(
    program, params, (packed.tokens, packed.segments), batch_size
  )
  return scalars.reshape(-1)[packed.ends]


def scorer(
  config: ConfigDict, program: Callable[..., jax.Array], base: Params | None
) -> Callable[[Params], ScoreRowsFn]:
  """Makes a function: trained parameters -> `ScoreRowsFn`; see `score_rows`.

  Args:
    config: of the stage.
    program: see `score_rows`.
    base: the base of adapters, or None.
  """

  def of(params):
    whole = lora.join(params, base)
    return lambda rows: score_rows(program, whole, rows, config.eval_batch_size)

  return of


def centred(params: Params, scores: np.ndarray) -> tuple[Params, float]:
  """Shifts a reward model's bias so that the mean of the scores is 0.

  Args:
    params: of a reward model.
    scores: [N] that it gives, such as to demonstrations (3.5).

  Returns:
    (new parameters, mean of the scores before).
  """
  shift = float(np.mean(scores, dtype=np.float64))
  bias = params['head_bias'] - jnp.float32(shift)
  return {**params, 'head_bias': bias}, shift


def score_range(score_fn: ScoreRowsFn, rows: ComparisonBatch) -> list[float]:
  """The lowest and highest score of the first 512 prompts' candidates."""
  first = loader.take(rows, np.arange(min(512, loader.num_rows(rows))))
  scores = score_fn(first)[first.mask.any(axis=2)]
  return [float(scores.min()), float(scores.max())]


def summed(
  loss: Float[Array, 'B'],
  pairs: Float[Array, 'B R'],
  correct: Float[Array, 'B R'],
  batch: PackedComparisons,
) -> tuple[Float[Array, ''], Float[Array, ''], Metrics]:
  """Sums a loss over prompts; returns the sum, their number, and metrics.

  A prompt whose candidates are all tied does not count.

  Args:
    loss: loss of each prompt.
    pairs, correct: of each of its rankings; see `losses.ranking_loss`.
    batch: the batch of these prompts.
  """
  pairs, correct = jnp.sum(pairs, axis=1), jnp.sum(correct, axis=1)
  counted = batch.prompt_mask & (pairs > 0)
  total, weight = masked.metric(loss, counted)
  accuracy = masked.total(correct, counted), masked.total(pairs, counted)
  return total, weight, {'loss': (total, weight), 'accuracy': accuracy}


def logprobs_program(module: heads.Policy) -> Callable[..., jax.Array]:
  """Jitted (params, tokens, segments, where) -> log-probabilities [M, Q]."""
  logprobs_fn = model_fns.logprobs_fn(module)
  return jax.jit(lambda *rows: logprobs_fn(*rows)[0])


def response_logprobs(
  program: Callable[..., jax.Array],
  params: Params,
  rows: ComparisonBatch,
  batch_size: int,
) -> np.ndarray:
  """log p(candidate | prompt) of every candidate, nats: [N, C] on the host.

  Args:
    program: from `logprobs_program`.
    params: of the policy.
    rows: rows of any number of prompts.
    batch_size: packed rows per call.
  """
  packed = loader.pack_comparisons(rows, reads_responses=True)
  logprobs = _in_batches(
    program, params, (packed.tokens, packed.segments, packed.where), batch_size
  )
  sums = np.bincount(
    packed.owner.reshape(-1),
    logprobs.reshape(-1).astype(np.float64),
    packed.ends.size + 1,
  )
  return sums[:-1].reshape(packed.ends.shape).astype(np.float32)


def sums_by_owner(
  values: Float[Array, 'M Q'], batch: PackedComparisons
) -> Float[Array, 'B C']:
  """Sums token values over each candidate's completion, on the device."""
  B, C = batch.ends.shape
  sums = jax.ops.segment_sum(
    values.reshape(-1), batch.owner.reshape(-1), B * C + 1
  )
  return sums[:-1].reshape(B, C)


def _in_batches(program, params, arrays, batch_size):
  mesh = jax.sharding.get_mesh()
  return slices.in_batches(
    lambda batch: sharding.fetch(
      program(params, *sharding.put_whole(batch, mesh))
    ),
    arrays,
    batch_size,
  )
