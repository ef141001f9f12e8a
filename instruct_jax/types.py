"""Pytrees and function types shared by modules.

Shape letters, used in every annotation and einsum of the package:

  B  sequences in a batch         V  vocabulary entries
  P  prompt positions (padded)    D  model width
  R  response positions (padded)  N  attention heads
  T  positions of a row           K  key/value heads
  C  candidates of one prompt     H  width of one head
  M  rows of several sequences    F  width of the MLP
  Q  response tokens of a row     L  layers
  S  cache slots

Masks are boolean, True on real tokens, and are made where text is tokenised:
nothing downstream looks for a pad id. Prompts are padded on the left and
responses on the right, so that a prompt's last token and its response's first
are adjacent (columns P-1 and P).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
from jaxtyping import Array, Bool, Float, Int, Num

PyTree = Any
Params = PyTree
Key = jax.Array  # A typed key, `jax.random.key(seed)`.

# Most segments of a row. cuDNN's grid and the sums that it saves have a place
# for each possible segment (`models/cudnn.py`).
MAX_SEGMENTS = 64

# A metric leaves the device as (sum, count). The host divides once, after
# summing over microbatches, minibatches and processes, so that there are no
# averages of averages. A plain scalar has a count of 1.
Metric = tuple[Num[Array, ''], Num[Array, '']]
Metrics = Mapping[str, Metric]


@flax.struct.dataclass
class TextBatch:
  """Token rows for language-model losses (pretraining, ptx, demonstrations).

  Attributes:
    tokens: token ids.
    mask: True on real tokens; False on padding.
    loss_mask: True on tokens that count in the loss. False in column 0, which
      nothing predicts.
    segments: 0 on padding; 1, 2, ... number the documents of a row, at most
      `MAX_SEGMENTS`. Attention and positions do not cross segments.
  """

  tokens: Int[Array, 'B T']
  mask: Bool[Array, 'B T']
  loss_mask: Bool[Array, 'B T']
  segments: Int[Array, 'B T']


@flax.struct.dataclass
class ComparisonBatch:
  """Ranked completions; one row is one prompt with its C candidates.

  Attributes:
    tokens: prompt and completion, padded on the right.
    mask: True on real tokens; all False for an absent candidate.
    ranks: ranks by R labelers; 1 is best; equal numbers are ties; 0 for an
      absent candidate or labeler.
    prompt_lengths: tokens of the prompt, with which all candidates begin.
    prompt_mask: False on rows that pad the last batch.
    ref_logprobs: log pi_ref(completion | prompt), nats; None if not needed.
  """

  tokens: Int[Array, 'B C T']
  mask: Bool[Array, 'B C T']
  ranks: Int[Array, 'B R C']
  prompt_lengths: Int[Array, 'B']
  prompt_mask: Bool[Array, 'B']
  ref_logprobs: Float[Array, 'B C'] | None = None


@flax.struct.dataclass
class PackedComparisons:
  """The candidates of B prompts, several per row, one segment each.

  A prompt's candidates may be in different rows. Its pairs are formed after the
  scores are gathered, so that it remains one batch element.

  Attributes:
    tokens: prompt and completion of each candidate, in M rows.
    segments: 0 on padding; 1, 2, ... number the candidates of a row.
    ends: index of each candidate's last token in the flattened [M * T] rows;
      0 for an absent candidate.
    ranks, prompt_mask, ref_logprobs: as in `ComparisonBatch`.
    where: column of the position that predicts each completion token, or None.
    owner: which of the B * C candidates that token belongs to; B * C if none.
  """

  tokens: Int[Array, 'M T']
  segments: Int[Array, 'M T']
  ends: Int[Array, 'B C']
  ranks: Int[Array, 'B R C']
  prompt_mask: Bool[Array, 'B']
  ref_logprobs: Float[Array, 'B C'] | None = None
  where: Int[Array, 'M Q'] | None = None
  owner: Int[Array, 'M Q'] | None = None


@flax.struct.dataclass
class PromptBatch:
  """Prompts for generation, padded on the left.

  Attributes:
    tokens: token ids.
    mask: True on real tokens.
    indices: each prompt's index in its data set. Sampling noise is derived
      from it, so that a sample does not depend on the rest of its batch.
  """

  tokens: Int[Array, 'B P']
  mask: Bool[Array, 'B P']
  indices: Int[Array, 'B']


@flax.struct.dataclass
class Rollout:
  """Responses exactly as sampled: nothing is decoded or re-encoded.

  Attributes:
    tokens: prompt (columns 0..P-1, left-padded) and response (P..T-1).
    mask: True on real tokens; the sampled end-of-text token is real.
    response_mask: the response columns of `mask`.
    logprobs: log pi(token) in nats under the sampler; 0 where masked.
    ended: True where the policy itself sampled an end-of-text token.
  """

  tokens: Int[Array, 'B T']
  mask: Bool[Array, 'B T']
  response_mask: Bool[Array, 'B R']
  logprobs: Float[Array, 'B R']
  ended: Bool[Array, 'B']


@flax.struct.dataclass
class Episodes:
  """Prompts and responses in rows of one or more episodes (`packing.py`).

  Attributes:
    tokens: prompt and response of each episode.
    segments: 0 on padding; 1, 2, ... number the episodes of a row.
    where: column of the position that predicts each response token.
    response_mask: True where there is a response token; at most Q per row.
  """

  tokens: Int[Array, 'M T']
  segments: Int[Array, 'M T']
  where: Int[Array, 'M Q']
  response_mask: Bool[Array, 'M Q']


@flax.struct.dataclass
class RLBatch:
  """The data of one update, constant during the update.

  Attributes:
    episodes: the rows of all inner epochs, by step (`packing.Layout`).
    old_logprobs, ref_logprobs: log pi_old and log pi_ref of each response
      token, nats.
    advantages: of each response token.
    old_values: V_old at the position that predicts each response token, reward
      units; None without a value model.
    returns: advantages before whitening plus old values, reward units; or None.
  """

  episodes: Episodes
  old_logprobs: Float[Array, 'M Q']
  ref_logprobs: Float[Array, 'M Q']
  advantages: Float[Array, 'M Q']
  old_values: Float[Array, 'M Q'] | None = None
  returns: Float[Array, 'M Q'] | None = None


# (params, frozen, batch, key) -> (summed loss, (weight, metrics)). The
# objective is summed loss / weight, each summed over microbatches. `frozen`
# holds constant inputs of the loss, such as the base of adapters.
LossFn = Callable[
  [Params, Mapping[str, PyTree], PyTree, Key],
  tuple[Float[Array, ''], tuple[Float[Array, ''], Metrics]],
]
# (params, tokens [M, T], segments [M, T], where [M, Q] or None, dropout key or
# None) -> logprobs and entropies, float32, nats: of the tokens that the
# positions in `where` predict [M, Q], or of all tokens [M, T].
LogprobsFn = Callable[..., tuple[jax.Array, jax.Array]]
# (params, tokens [M, T], segments [M, T]) -> one float32 scalar per position.
ScalarsFn = Callable[[Params, jax.Array, jax.Array], jax.Array]


class Decoder(NamedTuple):
  """A policy as functions for `rollout.generate`.

  A cache is a pytree of arrays with slots as the first axis. A row's token at
  position c is in column c; only the decoder knows which axis columns are.

  Attributes:
    prepare: params -> the weights that the other functions take.
    make_cache: (slots, columns) -> empty cache.
    read: (weights, tokens [S, P], lengths [S]) -> cache of S right-padded
      prompts, P columns.
    step: (weights, tokens [S], lengths [S], cache) -> (logits [S, V] after
      these tokens, cache with each token in column `lengths`).
  """

  prepare: Callable[[Params], PyTree]
  make_cache: Callable[[int, int], PyTree]
  read: Callable[[PyTree, jax.Array, jax.Array], PyTree]
  step: Callable[
    [PyTree, jax.Array, jax.Array, PyTree], tuple[jax.Array, PyTree]
  ]
