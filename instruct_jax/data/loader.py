"""Records to rows of token ids, and rows to batches by step number.

The row functions turn a data set into one batch type of `types.py` that holds
NumPy arrays of N rows, and set all masks as they encode the text.
`make_batches` and `mixture` then give batch number `step` of a seeded,
reshuffled stream by random access, so a run's position in its data is its step
number, and there is nothing else to save. `ahead` makes the next batches while
the device is busy.

Records that are too long, or that a chat template refuses, are dropped and
counted, never cut: a cut response would teach the model to stop in
mid-sentence. Pretraining documents are cut into rows, because the loss at a cut
is still that of real text.
"""

import bisect
import collections
import dataclasses
import fractions
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import grain
import numpy as np
from etils import epath

from instruct_jax import types
from instruct_jax.data import records
from instruct_jax.data import tokenizer as tokenizer_lib

Rows = TypeVar('Rows')


# --- rows ------------------------------------------------------------------


def num_rows(rows: Any) -> int:
  """The number of rows in a batch type or list."""
  if dataclasses.is_dataclass(rows):
    return len(getattr(rows, dataclasses.fields(rows)[0].name))
  return len(rows)


def take(rows: Rows, indices: Sequence[int] | np.ndarray) -> Rows:
  """The rows at `indices`, which may repeat, as the same type.

  `rows` is a batch type of NumPy arrays, or a list of examples.
  """
  indices = np.asarray(indices, np.int64)  # The dtype matters if it is empty.
  if dataclasses.is_dataclass(rows):
    fields = {
      name: np.asarray(array)[indices]
      for name, array in vars(rows).items()
      if array is not None
    }
    return dataclasses.replace(rows, **fields)
  return [rows[int(i)] for i in indices]


@dataclasses.dataclass(frozen=True)
class Dropped:
  """Counts of records that were left out of the rows, by reason.

  Attributes:
    too_long: longer than `limit` (row or prompt length) in tokens.
    refused: by the chat template; `reason` is that of the first.
    empty: prompts without tokens.
  """

  too_long: int
  limit: int
  refused: int = 0
  reason: str = ''
  empty: int = 0

  @property
  def total(self) -> int:
    """The number of records left out."""
    return self.too_long + self.refused + self.empty

  def describe(self, what: str, key: str) -> str:
    """One line for users about `what` (a plural); '' if none was dropped."""
    return f'{what} dropped: {self.reasons(key)}' if self.total else ''

  def reasons(self, key: str) -> str:
    """The counts in words; `key` is the config key of the limit."""
    parts = [
      (self.too_long, f'longer than {key} ({self.limit} tokens)'),
      (self.refused, f'refused, first {self.reason}'),
      (self.empty, 'empty'),
    ]
    return '; '.join(f'{count} {text}' for count, text in parts if count)


def encode_prompts(
  prompts: Sequence[Any], tokenizer: tokenizer_lib.Tokenizer
) -> tuple[list[list[int] | None], list[str]]:
  """(ids of each prompt or None if it is refused, messages of the refusals)."""
  try:
    return tokenizer.encode_prompts(prompts), []
  except tokenizer_lib.TemplateError:
    pass
  found, refusals = [], []
  for prompt in prompts:
    try:
      found += tokenizer.encode_prompts([prompt])
    except tokenizer_lib.TemplateError as error:
      found.append(None)
      refusals.append(str(error))
  return found, refusals


def encode_answers(
  rows: Sequence[records.Record], tokenizer: tokenizer_lib.Tokenizer
) -> tuple[list[list[list[int]] | None], list[str]]:
  """The ids of each record's answers, with the token that ends an answer.

  Returns:
    (for each record, the ids of each answer, or None if one is refused;
    messages of the refusals).
  """
  answers = list(map(records.answers_of, rows))
  try:
    ids = tokenizer.encode_responses(
      [text for texts in answers for text in texts], ended=True
    )
    flat = iter(ids)
    return [[next(flat) for _ in texts] for texts in answers], []
  except tokenizer_lib.TemplateError:
    pass
  found, refusals = [], []
  for row, texts in zip(rows, answers, strict=True):
    try:
      found.append(tokenizer.encode_responses(texts, ended=True))
    except tokenizer_lib.TemplateError as error:
      found.append(None)
      refusals.append(f'id {row.id!r}: {error}' if row.id else str(error))
  return found, refusals


def pack_documents(
  token_lists: Sequence[Sequence[int] | np.ndarray],
  row_length: int,
  eos_id: int,
  pad_id: int,
  *,
  cut: bool = False,
) -> types.TextBatch:
  """Packs token ids of documents, each with EOS, into rows (pretraining).

  A document longer than a row (EOS included) is first cut into pieces. Each
  piece goes into the open row that it fills best, or starts a new one. With
  `cut`, documents follow each other and are cut where a row ends, so that only
  the last row has room left; without it, documents of about half a row leave a
  tenth to a fifth of the space in the rows empty. Every piece is a separate
  segment. No token is lost or duplicated. Documents without tokens are left
  out.

  Returns:
    All rows [N, T], where T is `row_length`; the loss is on every token except
    the first of each segment, which has nothing before it.

  Raises:
    ValueError: there are no tokens.
  """
  pieces = []
  used = 0  # Tokens in the last row.
  for tokens in token_lists:
    if not len(tokens):
      continue
    tokens = np.append(np.asarray(tokens, np.int32), np.int32(eos_id))
    first = row_length - used if cut else row_length
    pieces += np.split(tokens, range(first, len(tokens), row_length))
    used = (used + len(tokens)) % row_length
  if not pieces:
    raise ValueError('there are no documents with tokens in them')
  return _text_rows(pieces, [1] * len(pieces), row_length, pad_id, pack=True)


def document_rows(
  path: epath.PathLike,
  tokenizer: tokenizer_lib.Tokenizer,
  row_length: int,
  *,
  cut: bool = False,
) -> types.TextBatch:
  """`pack_documents` for a JSONL file of documents."""
  documents = records.read_jsonl(path, records.Document)
  return pack_documents(
    tokenizer.encode_documents([document.text for document in documents]),
    row_length,
    tokenizer.eos_id,
    tokenizer.pad_id,
    cut=cut,
  )


def demonstration_rows(
  demonstrations: Sequence[records.Demonstration],
  tokenizer: tokenizer_lib.Tokenizer,
  row_length: int,
  *,
  loss_on: Literal['response', 'all'],
  pack: bool,
) -> tuple[types.TextBatch, Dropped]:
  """Rows of prompt, response and end token, for supervised fine-tuning (C.1).

  With `loss_on` 'response' the loss is on the response and its end token; with
  'all' on the prompt, too. `pack` puts several demonstrations in a row, as
  segments; otherwise there is one per row, in order.

  Returns:
    (rows [N, T], what was dropped); T is `row_length`.

  Raises:
    ValueError: none is left.
  """
  if loss_on not in ('response', 'all'):
    raise ValueError(f"loss_on is {loss_on!r}; use 'response' or 'all'")
  prompts, responses, refusals = _encode(demonstrations, tokenizer)
  num_refused = sum(prompt is None for prompt in prompts)
  pieces, loss_starts = [], []
  for prompt, answers in zip(prompts, responses, strict=True):
    if not _fits(prompt, answers, row_length):
      continue
    (response,) = answers
    pieces.append(np.asarray([*prompt, *response], np.int32))
    loss_starts.append(len(prompt) if loss_on == 'response' else 1)
  counts = len(pieces), len(demonstrations)
  dropped = _dropped(
    'demonstrations', *counts, row_length, refusals, num_refused
  )
  rows = _text_rows(
    pieces, loss_starts, row_length, tokenizer.pad_id, pack=pack
  )
  return rows, dropped


def _ranks_in(order: Sequence[str], ranking: records.Comparison) -> list[int]:
  """A ranking's ranks, rearranged to match `order`, the same texts."""
  by_text = collections.defaultdict(list)
  for text, rank in zip(ranking.completions, ranking.ranks, strict=True):
    by_text[text].append(rank)
  return [by_text[text].pop(0) for text in order]


def comparison_rows(
  comparisons: Sequence[records.Comparison],
  tokenizer: tokenizer_lib.Tokenizer,
  max_candidates: int,
  row_length: int,
  *,
  merge: bool = False,
) -> tuple[types.ComparisonBatch, Dropped]:
  """All completions of one prompt in one element, for the reward model (3.5).

  With `merge`, rankings of the same answers to the same prompt, in any order,
  become one element, at the position of the first; without it, R is 1.

  Returns:
    (rows [N, C, T], what was dropped). C is `max_candidates` (absent ones are
    masked and have rank 0), T is `row_length`. If one candidate is longer than
    a row, the whole comparison is dropped, so that no ranking loses some of its
    K completions.

  Raises:
    ValueError: none is left, or one has more than `max_candidates` completions.
  """
  for number, comparison in enumerate(comparisons, start=1):
    if len(comparison.completions) > max_candidates:
      raise ValueError(
        f'comparison {number} (id {comparison.id!r}) has '
        f'{len(comparison.completions)} completions, max_candidates is '
        f'{max_candidates}; raise it'
      )
  elements = {}
  for number, each in enumerate(comparisons):
    key = number
    if merge:
      answers = zip(each.completions, records.ends_of(each), strict=True)
      key = (each.prompt, each.turns, tuple(sorted(answers)))
    elements.setdefault(key, []).append(each)
  elements = list(elements.values())
  prompts, answers, refusals = comparison_ids(
    [e[0] for e in elements], tokenizer
  )
  num_refused = sum(
    len(e) for e, ids in zip(elements, prompts, strict=True) if ids is None
  )
  kept = [
    i for i in range(len(elements)) if _fits(prompts[i], answers[i], row_length)
  ]
  counts = sum(len(elements[i]) for i in kept), len(comparisons)
  dropped = _dropped('comparisons', *counts, row_length, refusals, num_refused)
  num_labelers = max(len(elements[i]) for i in kept)
  ranks = np.zeros((len(kept), num_labelers, max_candidates), np.int32)
  sequences = []
  for row, i in enumerate(kept):
    order = elements[i][0].completions
    ranks[row, : len(elements[i]), : len(order)] = [
      _ranks_in(order, each) for each in elements[i]
    ]
    sequences += [[*prompts[i], *answer] for answer in answers[i]]
    sequences += [[]] * (max_candidates - len(order))
  shape = (len(kept), max_candidates, row_length)
  tokens, mask = _padded(sequences, row_length, tokenizer.pad_id)
  batch = types.ComparisonBatch(
    tokens=tokens.reshape(shape),
    mask=mask.reshape(shape),
    ranks=ranks,
    prompt_lengths=np.array([len(prompts[i]) for i in kept], np.int32),
    prompt_mask=np.ones(len(kept), bool),
  )
  return batch, dropped


def fitting_comparisons(
  comparisons: Sequence[records.Comparison],
  tokenizer: tokenizer_lib.Tokenizer,
  row_length: int,
) -> list[records.Comparison]:
  """The comparisons that `comparison_rows` keeps, in the order given."""
  prompts, answers, _ = comparison_ids(comparisons, tokenizer)
  return [
    comparison
    for comparison, *ids in zip(comparisons, prompts, answers, strict=True)
    if _fits(*ids, row_length)
  ]


def comparison_ids(
  comparisons: Sequence[records.Comparison], tokenizer: tokenizer_lib.Tokenizer
) -> tuple[list[list[int] | None], list[list[list[int]]], list[str]]:
  """The ids of prompts and completions, for the reward model.

  Completions end with the token that ends an answer, unless they were cut.

  Returns:
    (ids of each prompt, or None if it or a completion is refused; ids of its
    completions; messages of the refusals).
  """
  prompts, answers, refusals = _encode(comparisons, tokenizer)
  answers = [
    [
      ids if ended else ids[:-1]
      for ids, ended in zip(found, records.ends_of(each), strict=True)
    ]
    if found
    else []
    for each, found in zip(comparisons, answers, strict=True)
  ]
  return prompts, answers, refusals


def _encode(rows, tokenizer):
  """(ids of each prompt, of its answers, refusals); None and [] if refused."""
  prompts, refusals = encode_prompts(rows, tokenizer)
  answers, others = encode_answers(rows, tokenizer)
  for i, found in enumerate(zip(prompts, answers, strict=True)):
    if None in found:
      prompts[i], answers[i] = None, []
  return prompts, answers, refusals + others


def _fits(prompt, answers, row_length) -> bool:
  return (
    prompt is not None and len(prompt) + max(map(len, answers)) <= row_length
  )


def _padded(
  sequences: Sequence[Sequence[int]],
  length: int,
  pad_id: int,
  *,
  on_the_left: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Pads sequences; returns (tokens [N, T], mask [N, T])."""
  tokens = np.full((len(sequences), length), pad_id, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for row, ids in enumerate(sequences):
    start = length - len(ids) if on_the_left else 0
    tokens[row, start : start + len(ids)] = ids
    mask[row, start : start + len(ids)] = True
  return tokens, mask


def pack_comparisons(
  batch: types.ComparisonBatch,
  num_rows: int | None = None,
  num_responses: int | None = None,
  *,
  reads_responses: bool = False,
) -> types.PackedComparisons:
  """Packs the candidates of a batch, several per row.

  With candidates of 24 tokens in rows of 64 this is a third of the work.

  Args:
    batch: one row per prompt, in NumPy arrays.
    num_rows: M, fixed so that all batches have one shape; None uses as many as
      needed.
    num_responses: Q, the same for the completion tokens of a row.
    reads_responses: whether to fill `where` and `owner`; implied by
      `num_responses`.

  Raises:
    ValueError: M or Q is too small.
  """
  row_length = batch.tokens.shape[2]
  sizes = batch.mask.sum(axis=2)
  prompt, candidate = np.nonzero(sizes)
  lengths = sizes[prompt, candidate]
  row, offset, segment = _best_fit(lengths.tolist(), row_length)
  needed = int(row.max()) + 1
  num_rows = needed if num_rows is None else num_rows
  if needed > num_rows:
    raise ValueError(f'{needed} rows are needed, num_rows is {num_rows}')
  starts = row * row_length + offset
  within = _ranges(lengths)
  positions = np.repeat(starts, lengths) + within
  tokens = np.zeros(num_rows * row_length, np.int32)
  segments = np.zeros(num_rows * row_length, np.int32)
  tokens[positions] = batch.tokens[
    np.repeat(prompt, lengths), np.repeat(candidate, lengths), within
  ]
  segments[positions] = np.repeat(segment, lengths)
  ends = np.zeros(sizes.shape, np.int32)
  ends[prompt, candidate] = starts + lengths - 1
  packed = types.PackedComparisons(
    tokens=tokens.reshape(num_rows, row_length),
    segments=segments.reshape(num_rows, row_length),
    ends=ends,
    ranks=np.asarray(batch.ranks),
    prompt_mask=np.asarray(batch.prompt_mask),
    ref_logprobs=batch.ref_logprobs,
  )
  if not reads_responses and num_responses is None:
    return packed
  # Completion tokens row by row, each with the column that predicts it.
  prompt_lengths = batch.prompt_lengths[prompt]
  responses = lengths - prompt_lengths
  owner = np.repeat(prompt * sizes.shape[1] + candidate, responses)
  rows = np.repeat(row, responses)
  firsts = np.repeat(offset + prompt_lengths - 1, responses)
  columns = firsts + _ranges(responses)
  order = np.argsort(rows, kind='stable')
  counts = np.bincount(rows, minlength=num_rows)
  if num_responses is None:
    num_responses = -(-int(counts.max()) // 8) * 8
  elif counts.max() > num_responses:
    raise ValueError(
      f'{counts.max()} completion tokens in one row of {num_responses} places'
    )
  places = rows[order], _ranges(counts)
  where = np.zeros((num_rows, num_responses), np.int32)
  owners = np.full((num_rows, num_responses), sizes.size, np.int32)
  where[places], owners[places] = columns[order], owner[order]
  return packed.replace(where=where, owner=owners)


def _ranges(sizes: np.ndarray) -> np.ndarray:
  """0, ..., size - 1 for each size, concatenated."""
  ends = np.cumsum(sizes)
  return np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)


def prompt_rows(
  prompts: Sequence[records.Prompt | str],
  tokenizer: tokenizer_lib.Tokenizer,
  prompt_length: int,
) -> tuple[types.PromptBatch, Dropped]:
  """Rows of prompts, or of their texts, for generation, padded on the left.

  Returns:
    (rows [N, P], what was dropped); P is `prompt_length`. `indices` are
    positions in `prompts`.

  Raises:
    ValueError: none is left.
  """
  encoded, refusals = encode_prompts(prompts, tokenizer)
  # An empty prompt has no last token to predict from.
  indices = [
    i
    for i, ids in enumerate(encoded)
    if ids is not None and 0 < len(ids) <= prompt_length
  ]
  counts, num_empty = (len(indices), len(encoded)), encoded.count([])
  dropped = _dropped(
    'prompts', *counts, prompt_length, refusals, num_empty=num_empty
  )
  tokens, mask = _padded(
    [encoded[i] for i in indices],
    prompt_length,
    tokenizer.pad_id,
    on_the_left=True,
  )
  batch = types.PromptBatch(
    tokens=tokens, mask=mask, indices=np.asarray(indices, np.int32)
  )
  return batch, dropped


def answer_rows(
  prompts: Sequence[Sequence[int]],
  answers: Sequence[Sequence[int]],
  pad_id: int,
  length: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Rows of the ids of a prompt and its sampled answer, padded on the right.

  Returns:
    (tokens [N, T], mask [N, T]); T is `length`.

  Raises:
    ValueError: a row is longer than T.
  """
  rows = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
  longest = max(map(len, rows), default=0)
  if longest > length:
    raise ValueError(
      f'a prompt with its answer has {longest} tokens, but rows have only '
      f'{length}'
    )
  return _padded(rows, length, pad_id)


def _dropped(
  what: str,
  kept: int,
  total: int,
  limit: int,
  refusals: Sequence[str],
  num_refused: int | None = None,
  num_empty: int = 0,
) -> Dropped:
  """Counts what was dropped; raises ValueError if no `what` is left."""
  num_refused = len(refusals) if num_refused is None else num_refused
  dropped = Dropped(
    too_long=total - kept - num_refused - num_empty,
    limit=limit,
    refused=num_refused,
    reason=refusals[0] if refusals else '',
    empty=num_empty,
  )
  if not total:
    raise ValueError(f'there are no {what}')
  if not kept:
    key = 'prompt_length' if what == 'prompts' else 'row_length'
    raise ValueError(f'no {what} left: {dropped.reasons(key)}')
  return dropped


def _text_rows(
  pieces: Sequence[np.ndarray],
  loss_starts: Sequence[int],
  row_length: int,
  pad_id: int,
  *,
  pack: bool,
) -> types.TextBatch:
  """Lays out pieces (each at most a row long) in rows.

  `loss_starts` is the index of each piece's first token in the loss; a piece's
  own first token is never in it.
  """
  lengths = np.asarray([len(piece) for piece in pieces], np.int64)
  if pack:
    row, offset, segment = _best_fit(lengths.tolist(), row_length)
  else:
    row = np.arange(len(pieces))
    offset, segment = np.zeros_like(row), np.ones_like(row)
  # The place of each token in the flattened [N * T] arrays.
  within = _ranges(lengths)
  positions = np.repeat(row * row_length + offset, lengths) + within

  shape = (int(row.max()) + 1, row_length)
  tokens = np.full(shape, pad_id, np.int32)
  segments = np.zeros(shape, np.int32)
  loss_mask = np.zeros(shape, bool)
  tokens.flat[positions] = np.concatenate(pieces)
  segments.flat[positions] = np.repeat(segment, lengths)
  starts = np.maximum(np.asarray(loss_starts), 1)
  loss_mask.flat[positions] = within >= np.repeat(starts, lengths)
  return types.TextBatch(
    tokens=tokens, mask=segments > 0, loss_mask=loss_mask, segments=segments
  )


def _best_fit(
  lengths: Sequence[int], row_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Row, offset and segment number of each piece, by best fit.

  A piece goes into the fullest row that still has room. A row has at most
  `types.MAX_SEGMENTS` pieces. Rows are indexed by free space, which has at most
  `row_length` values, so a piece costs one binary search.
  """
  rows_by_space: dict[int, list[int]] = {}
  spaces: list[int] = []  # Sorted keys of `rows_by_space`.
  used: list[int] = []
  counts: list[int] = []
  placed = np.zeros((3, len(lengths)), np.int64)
  for i, length in enumerate(lengths):
    place = bisect.bisect_left(spaces, length)
    if place < len(spaces):
      row = rows_by_space[spaces[place]].pop()
      if not rows_by_space[spaces[place]]:
        del rows_by_space[spaces.pop(place)]
    else:
      row = len(used)
      used.append(0)
      counts.append(0)
    counts[row] += 1
    placed[:, i] = row, used[row], counts[row]
    used[row] += length
    left = row_length - used[row]
    if left and counts[row] < types.MAX_SEGMENTS:
      if left not in rows_by_space:
        bisect.insort(spaces, left)
        rows_by_space[left] = []
      rows_by_space[left].append(row)
  return placed[0], placed[1], placed[2]


# --- batches ---------------------------------------------------------------


def make_batches(
  examples: Any,
  *,
  batch_size: int,
  seed: int,
  num_epochs: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.MapDataset:
  """Batches by step number: `batches[step]` is a function of (seed, step).

  Each epoch has a different order. A batch never spans two epochs; the few
  examples left over at the end of an epoch (different ones each time) are not
  used in it. Every process draws the same global batch and takes its own block
  of rows, so the global batch is the same on any number of hosts.

  Args:
    examples: a batch type of NumPy arrays, or a list.
    batch_size: rows of the global batch.
    seed: 0 to 2^32 - 1.
    num_epochs: how many epochs `len(batches)` covers; None means endless.
    process_index, process_count: `jax.process_index()`, `jax.process_count()`.

  Returns:
    A `grain.MapDataset`; an element is what `take` returns for `examples`.

  Raises:
    ValueError: there are too few examples for one batch, or the batch cannot be
      divided evenly among the processes.
  """
  total = num_rows(examples)
  _check_batches(total, batch_size, process_index, process_count)
  _check_filled(total, batch_size)
  # `repeat` gives the shuffle a new seed each epoch. It comes after `batch`, so
  # that no batch spans two epochs.
  indices = (
    grain.MapDataset.range(total)
    .shuffle(seed=seed)
    .batch(batch_size, drop_remainder=True, batch_fn=np.asarray)
    .repeat(num_epochs)
  )
  return indices.map(
    lambda rows: take(examples, own(rows, process_index, process_count))
  )


def own(rows: np.ndarray, process_index: int, process_count: int) -> np.ndarray:
  """This process's block of the rows of a batch."""
  size = len(rows) // process_count
  return rows[process_index * size : (process_index + 1) * size]


def balanced_batches(
  sizes: Sequence[int] | np.ndarray,
  *,
  batch_size: int,
  seed: int,
  num_epochs: int = 1,
) -> np.ndarray:
  """Random batches of nearly equal total size, as indices [steps, batch_size].

  Examples are divided into `batch_size` strata by `sizes` (tokens), and every
  batch gets a random example of each stratum, so all batches pack into nearly
  the same number of rows. Each epoch is drawn anew; the few examples that do
  not fill a batch are not used in it.

  Raises:
    ValueError: too few examples for one batch.
  """
  sizes = np.asarray(sizes)
  _check_batches(len(sizes), batch_size, 0, 1)
  _check_filled(len(sizes), batch_size)
  steps = len(sizes) // batch_size
  epochs = []
  for epoch in range(num_epochs):
    rng = np.random.default_rng([seed, epoch])
    kept = rng.permutation(len(sizes))[: steps * batch_size]
    strata = kept[np.argsort(sizes[kept], kind='stable')]
    strata = rng.permuted(strata.reshape(batch_size, steps), axis=1)
    epochs.append(rng.permuted(strata.T, axis=1))
  return np.concatenate(epochs)


def mixture(
  rows: types.TextBatch,
  other_rows: types.TextBatch,
  *,
  fraction: float,
  batch_size: int,
  seed: int,
  num_epochs: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.MapDataset:
  """Batches in which a share of the rows comes from another row set (C.3).

  This is for the RL initialisation: demonstrations with 10 % pretraining rows.
  Before step s, floor(s * batch_size * fraction) rows come from `other_rows`:
  each batch has the share to within one row, and so have all batches together.
  Both sets are reshuffled after each pass, and the rows of a batch are in
  random order.

  Args:
    rows, other_rows: the sets [N, T] and [M, T].
    fraction: share of `other_rows` among the rows of a batch, in [0, 1).
    num_epochs: epochs over `rows`, in whole batches; None means endless.
    batch_size, seed, process_index, process_count: see `make_batches`.

  Returns:
    A `grain.MapDataset` whose element [step] is a `TextBatch`.
  """
  if not 0 <= fraction < 1:
    raise ValueError(f'fraction is {fraction}; it must be in [0, 1)')
  if rows.tokens.shape[1] != other_rows.tokens.shape[1]:
    raise ValueError(
      f'rows of {rows.tokens.shape[1]} and {other_rows.tokens.shape[1]} '
      'tokens cannot share a batch; use one row_length'
    )
  totals = num_rows(rows), num_rows(other_rows)
  for total in totals:
    _check_batches(total, batch_size, process_index, process_count)
  # Exact arithmetic: 100 * 0.29 is 28.999999999999996 in floats.
  share = fractions.Fraction(fraction).limit_denominator(10**6)

  def num_other(step: int) -> int:
    return int(step * batch_size * share)

  order, other_order = (
    grain.MapDataset.range(total).shuffle(seed=each).repeat()
    for total, each in zip(totals, (seed, (seed + 1) % 2**32), strict=True)
  )

  def make_batch(step: int) -> types.TextBatch:
    start, stop = num_other(step), num_other(step + 1)
    main_start = step * batch_size - start
    main_stop = (step + 1) * batch_size - stop
    main = take(rows, [order[i] for i in range(main_start, main_stop)])
    other = take(other_rows, [other_order[i] for i in range(start, stop)])
    place = np.random.default_rng((seed, step)).permutation(batch_size)
    place = own(place, process_index, process_count)
    return types.TextBatch(
      **{
        name: np.concatenate([array, getattr(other, name)])[place]
        for name, array in vars(main).items()
      }
    )

  num_steps = sys.maxsize
  if num_epochs is not None:
    # The most steps s whose s * batch_size - num_other(s) main rows are there.
    available = num_epochs * totals[0]
    num_steps = int(available / (batch_size * (1 - share)))
    while num_steps * batch_size - num_other(num_steps) > available:
      num_steps -= 1
    if num_steps < 1:
      raise ValueError(
        f'{num_epochs} epochs of {totals[0]} rows do not fill a batch of '
        f'{batch_size} with a share of {fraction} mixed in'
      )
  return grain.MapDataset.range(num_steps).map(make_batch)


def ahead(
  batch_fn: Callable[[int], Any], num_ahead: int = 2
) -> Callable[[int, int], Iterator[Any]]:
  """Makes batches of consecutive steps in a thread, before they are needed.

  Order and content are those of `batch_fn(step)`; `num_ahead` batches are kept
  ready.

  Returns:
    A function (first step, one past the last) -> iterator over their batches.
  """
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=num_ahead)

  def open_at(first: int, last: int) -> Iterator[Any]:
    steps = grain.MapDataset.range(first, last).map(batch_fn)
    return iter(steps.to_iter_dataset(options))

  return open_at


def _check_batches(
  total: int, batch_size: int, process_index: int, process_count: int
) -> None:
  if not total:
    raise ValueError('there are no examples to batch')
  if batch_size < 1:
    raise ValueError(f'batch_size is {batch_size}; it must be 1 or more')
  if not 0 <= process_index < process_count:
    raise ValueError(f'process {process_index} is not one of {process_count}')
  if batch_size % process_count:
    raise ValueError(
      f'a batch of {batch_size} rows cannot be shared by {process_count} '
      'processes; use a multiple'
    )


def _check_filled(total: int, batch_size: int) -> None:
  if total < batch_size:
    raise ValueError(
      f'{total} examples do not fill a batch of {batch_size}; use a smaller '
      'batch or more data'
    )
