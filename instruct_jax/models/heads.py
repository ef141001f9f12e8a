"""The three models of the method: a policy, and scalar models for reward/value.

A scalar model has one linear head instead of the unembedding (paper C). Both
kinds keep their trunk under `params['trunk']`, so that a reward model starts
from a policy, and a value model from a reward model, by copying sub-trees.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from instruct_jax.models.config import TransformerConfig
from instruct_jax.models.transformer import (
  Transformer,
  make_param,
  positions_of,
)


def token_logprobs(
  logits: Float[Array, '*b V'],
  tokens: Int[Array, '*b'],
  temperature: float = 1.0,
) -> tuple[Float[Array, '*b'], Float[Array, '*b']]:
  """log softmax(logits / temperature)[token] and entropy, in float32 nats.

  All log-probabilities and text losses are computed here. As in the sampler, a
  temperature of 0 (greedy) leaves the logits unchanged.
  """
  logits = logits.astype(jnp.float32)
  if temperature > 0:
    logits = logits / temperature
  log_z = jax.nn.logsumexp(logits, axis=-1)
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  probs = jnp.exp(logits - log_z[..., None])
  entropy = log_z - jnp.sum(probs * logits, axis=-1)
  return chosen - log_z, entropy


class Policy(nn.Module):
  """A causal language model."""

  config: TransformerConfig

  def setup(self):
    self.trunk = Transformer(self.config)

  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    segments: Int[Array, 'B T'],
    deterministic: bool = True,
  ) -> Float[Array, 'B T V']:
    """Logits of the token after each position."""
    hidden, _ = self.trunk(tokens, segments, deterministic=deterministic)
    return self.trunk.unembed(hidden)

  def logprobs(
    self,
    tokens: Int[Array, 'M T'],
    segments: Int[Array, 'M T'],
    where: Int[Array, 'M Q'] | None = None,
    *,
    temperature: float = 1.0,
    longest: int = 0,
    deterministic: bool = True,
  ) -> tuple[Float[Array, 'M _'], Float[Array, 'M _']]:
    """log p(token | earlier tokens of its segment) and entropies, in nats.

    Args:
      tokens, segments, longest: see `Transformer.__call__`.
      where: columns whose next tokens are predicted; only these are unembedded.
        None is all of them.
      deterministic: True switches dropout off.

    Returns:
      Both for the tokens after the columns `where` [M, Q]; or for all tokens
      [M, T], with 0 in column 0, which nothing precedes.
    """
    hidden, _ = self.trunk(
      tokens, segments, deterministic=deterministic, longest=longest
    )
    if where is None:
      found = self._logprobs(hidden[:, :-1], tokens[:, 1:], temperature)
      return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (1, 0))), found)
    hidden = jnp.take_along_axis(hidden, where[:, :, None], axis=1)
    # A token is one column after the position that predicts it.
    columns = jnp.minimum(where + 1, tokens.shape[1] - 1)
    targets = jnp.take_along_axis(tokens, columns, axis=1)
    # A packed row holds several episodes, so its chunks are that much longer.
    num_episodes = max(1, tokens.shape[1] // longest) if longest else 1
    return self._logprobs(hidden, targets, temperature, num_episodes)

  def _logprobs(
    self,
    hidden: Float[Array, 'B t D'],
    tokens: Int[Array, 'B t'],
    temperature: float,
    num_episodes: int = 1,
  ) -> tuple[Float[Array, 'B t'], Float[Array, 'B t']]:
    """`token_logprobs` of the unembedded hidden states, chunk by chunk."""
    chunk = self.config.logprob_chunk * num_episodes

    def logprobs_of(model, hidden, tokens):
      logits = nn.with_logical_constraint(
        model.trunk.unembed(hidden), ('batch', 'length', 'vocab')
      )
      return token_logprobs(logits, tokens, temperature)

    num_tokens = tokens.shape[1]
    if not 0 < chunk < num_tokens:
      return logprobs_of(self, hidden, tokens)
    # Padding fills the last chunk and is cut off again below.
    num_chunks = -(-num_tokens // chunk)
    filler = num_chunks * chunk - num_tokens
    hidden = jnp.pad(hidden, ((0, 0), (0, filler), (0, 0)))
    tokens = jnp.pad(tokens, ((0, 0), (0, filler)))
    batch, width = hidden.shape[0], hidden.shape[2]
    chunks = (
      jnp.swapaxes(hidden.reshape(batch, num_chunks, chunk, width), 0, 1),
      jnp.swapaxes(tokens.reshape(batch, num_chunks, chunk), 0, 1),
    )

    def step(model, carry, inputs):
      # Without remat the backward pass would keep every chunk's logits.
      return carry, nn.remat(logprobs_of, prevent_cse=False)(model, *inputs)

    scan = nn.scan(step, variable_broadcast='params', split_rngs={})
    _, results = scan(self, (), chunks)
    return jax.tree.map(
      lambda x: jnp.swapaxes(x, 0, 1).reshape(batch, -1)[:, :num_tokens],
      results,
    )


class ScalarModel(nn.Module):
  """A trunk with one scalar per position: reward models and value models.

  The head starts at N(0, 1/(d_model + 1)) with bias 0 (Stiennon et al. B.1).
  The bias also holds the reward model's shift to mean 0.

  Attributes:
    config: of the trunk.
    skipped_id: a reward model's score is read at the last token that is not
      this one; -1 is the last token. For published classifiers it is their
      `pad_token_id`, often the EOS; the score is then one token earlier.
    end_ids: tokens that a published classifier's template puts at the end of an
      answer, the end of the turn first. It has learned to read its score after
      all of them, while a sampled answer ends with the first; see `with_ends`.
  """

  config: TransformerConfig
  skipped_id: int = -1
  end_ids: tuple[int, ...] = ()

  def setup(self):
    self.trunk = Transformer(self.config, unembeds=False)
    width, zeros = self.config.width, nn.initializers.zeros
    normal = nn.initializers.normal((width + 1) ** -0.5)
    self.head_kernel = make_param(
      self, 'head_kernel', normal, (width,), ('norm',)
    )
    self.head_bias = make_param(self, 'head_bias', zeros, (), ())

  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    segments: Int[Array, 'B T'] | Bool[Array, 'B T'],
    longest: int = 0,
  ) -> Float[Array, 'B T']:
    """float32 scalars, without dropout; arguments as for `Transformer`."""
    hidden, _ = self.trunk(tokens, segments.astype(jnp.int32), longest=longest)
    scalars = jnp.einsum(
      'btd,d->bt', hidden.astype(jnp.float32), self.head_kernel
    )
    return scalars + self.head_bias


def with_ends(
  module: ScalarModel,
  tokens: Int[Array, 'B T'],
  mask: Bool[Array, 'B T'],
) -> tuple[Int[Array, 'B U'], Bool[Array, 'B U']]:
  """Completes `end_ids` in sequences that end with the first of them.

  Rows hold one sequence each, with padding on either side. U is T plus the
  number of the other ids.
  """
  if len(module.end_ids) < 2:
    return tokens, mask
  first, *others = module.end_ids
  num_tokens, num_others = tokens.shape[1], len(others)
  columns = jnp.arange(num_tokens + num_others)[None, :]
  last = jnp.max(jnp.where(mask, columns[:, :num_tokens], 0), axis=1)
  last = last[:, None]
  has_ended = jnp.take_along_axis(tokens, last, axis=1) == first
  place = columns - last - 1
  is_new = has_ended & (place >= 0) & (place < num_others)
  wider = ((0, 0), (0, num_others))
  new = jnp.asarray(others, tokens.dtype)[jnp.clip(place, 0, num_others - 1)]
  return (
    jnp.where(is_new, new, jnp.pad(tokens, wider)),
    jnp.pad(mask, wider) | is_new,
  )


def read_scores(
  module: ScalarModel,
  scalars: Float[Array, 'B T'],
  tokens: Int[Array, 'B T'],
  segments: Int[Array, 'B T'] | Bool[Array, 'B T'],
  ends: Int[Array, '*b'] | None = None,
) -> Float[Array, '*b']:
  """Returns the score of each sequence.

  That is the scalar at its last token that is not `skipped_id`, or at its first
  token if there is none.

  Args:
    module: a reward model.
    scalars: its output at each position.
    tokens, segments: its input; where each row holds one sequence, padded on
      either side, a mask will do as segments.
    ends: index of each sequence's last token in the flattened rows; None is one
      sequence per row.
  """
  num_tokens = tokens.shape[1]
  columns = jnp.arange(num_tokens)[None, :]
  if ends is None:
    last = jnp.max(jnp.where(segments > 0, columns, 0), axis=1)
  else:
    last = ends % num_tokens

  def at(values, column):
    if ends is None:  # Within each row, so without communication.
      return jnp.take_along_axis(values, column[:, None], axis=1)[:, 0]
    return values.reshape(-1)[ends - ends % num_tokens + column]

  if module.skipped_id >= 0:
    first = columns - positions_of(segments.astype(jnp.int32))
    kept = jnp.where(tokens != module.skipped_id, columns, 0)
    last = at(jnp.maximum(jax.lax.cummax(kept, axis=1), first), last)
  return at(scalars, last)
