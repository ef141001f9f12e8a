"""Samples tokens from logits, for rollouts, best-of-n, evaluations and chat.

There is no top-k, top-p or minimum length (paper C.4: temperature 1).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from instruct_jax.types import Key

# Probabilities are summed in pieces of about this many tokens.
_PIECE = 128


def uniform_noise(keys: Key, t: Int[Array, 'R']) -> Float[Array, 'B R']:
  """One uniform number for token t of each row, from fold_in(row's key, t).

  It depends on the row's key and t only.
  """

  def one(key, t):
    return jax.random.uniform(jax.random.fold_in(key, t))

  return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(keys, t)


def sample_tokens(
  logits: Float[Array, 'B V'],
  uniform: Float[Array, 'B'],
  temperature: float,
) -> tuple[Int[Array, 'B'], Float[Array, 'B']]:
  """Samples one token per row, with its log-probability, nats, float32.

  Inverts the cumulative distribution at one uniform number per row (Gumbel
  noise would need V of them): first over the sums of pieces of the vocabulary,
  then within one piece, which avoids a cumulative sum over the vocabulary.

  Args:
    logits: any float dtype.
    uniform: in [0, 1).
    temperature: divides the logits; 0 takes the most probable token and
      reports its log-probability at temperature 1.
  """
  logits = logits.astype(jnp.float32)
  if temperature > 0:
    logits = logits / temperature
  highest = jnp.max(logits, axis=-1, keepdims=True)
  weights = jnp.exp(logits - highest)
  B, V = logits.shape
  pieces = -(-V // _PIECE)
  size = -(-V // pieces)
  filled = jnp.pad(weights, ((0, 0), (0, pieces * size - V)))
  filled = filled.reshape(B, pieces, size)
  upto = jnp.cumsum(jnp.sum(filled, axis=2), axis=1)
  total = upto[:, -1]
  if temperature > 0:
    piece, below = _first_above(upto, uniform * total)
    inside = jnp.take_along_axis(filled, piece[:, None, None], axis=1)[:, 0]
    remainder = uniform * total - below
    place, _ = _first_above(jnp.cumsum(inside, axis=1), remainder)
    tokens = piece * size + place
  else:
    tokens = jnp.argmax(logits, axis=-1)
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
  logprobs = (chosen - highest)[:, 0] - jnp.log(total)
  return tokens.astype(jnp.int32), logprobs


def _first_above(upto, threshold):
  """Index where cumulative sums first exceed a threshold; the sum before it.

  Terms of 0 are never chosen. If no sum exceeds the threshold because of
  rounding, the last term above 0 is chosen.
  """
  before = jnp.pad(upto, ((0, 0), (1, 0)))[:, :-1]
  adds = upto > before
  found = adds & (upto > threshold[:, None])
  last = upto.shape[1] - 1 - jnp.argmax(adds[:, ::-1], axis=1)
  place = jnp.where(jnp.any(found, axis=1), jnp.argmax(found, axis=1), last)
  return place, jnp.take_along_axis(before, place[:, None], axis=1)[:, 0]
