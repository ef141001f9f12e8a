"""Sampling responses: read the prompts once, then one token at a time.

One jitted program per batch, without a host round trip per token. The loop
leaves early once every response has ended; that changes the time taken and
nothing else, because the noise of a token depends only on the key, on the
prompt's number and on the token's position.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from instruct_jax.types import Key, Params, PromptBatch, PyTree, Rollout

# (params, tokens [B, t], mask [B, t], cache) -> (logits [B, V] after the last
# token, cache).
ExtendFn = Callable[
  [Params, jax.Array, jax.Array, PyTree], tuple[jax.Array, PyTree]
]


def sample_tokens(
  logits: Float[Array, 'B V'],
  keys: Key,
  temperature: float,
) -> tuple[Int[Array, 'B'], Float[Array, 'B']]:
  """One token a row and its log-probability, nats, float32.

  Inverts the cumulative distribution at one uniform number a row, which costs
  one random number where Gumbel noise costs V of them. No top-k, no top-p.

  Args:
    logits: any float dtype.
    keys: one key a row.
    temperature: divides the logits; 0 takes the most probable token and
      reports its log-probability at temperature 1.
  """
  logits = logits.astype(jnp.float32)
  if temperature > 0:
    logits = logits / temperature
  logprobs = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  if temperature > 0:
    probs = jnp.exp(logprobs)
    cumulative = jnp.cumsum(probs, axis=-1)
    uniform = jax.vmap(jax.random.uniform)(keys)
    threshold = uniform * cumulative[:, -1]
    # The first token whose cumulative probability exceeds the threshold. A
    # token of probability 0 is never first, save where a parallel sum rounds
    # down and up again; hence the second condition.
    eligible = (cumulative > threshold[:, None]) & (probs > 0)
    tokens = jnp.argmax(eligible, axis=-1)
    tokens = jnp.where(
      jnp.any(eligible, axis=-1), tokens, jnp.argmax(logprobs, axis=-1)
    )
  else:
    tokens = jnp.argmax(logprobs, axis=-1)
  chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
  return tokens.astype(jnp.int32), chosen


def generate(
  params: Params,
  prompts: PromptBatch,
  key: Key,
  *,
  extend_fn: ExtendFn,
  make_cache_fn: Callable[[int, int], PyTree],
  num_response: int,
  stop_ids: tuple[int, ...],
  temperature: float = 1.0,
  early_exit: bool = True,
) -> Rollout:
  """Samples one response of at most `num_response` tokens for each prompt.

  Args:
    params: of the policy.
    prompts: left-padded, so that every response starts in column P.
    key: of this rollout. The noise of token t of prompt i comes from
      fold_in(fold_in(key, i), t): independent of batch and neighbours.
    extend_fn: reads tokens into a cache, returns the last position's logits.
    make_cache_fn: (batch, slots) -> empty cache.
    num_response: R, the longest response, the stop token counted.
    stop_ids: sampling one of these ends the response; it stays in it.
    temperature: 1 in the paper's rollouts; 0 is greedy.
    early_exit: leave the loop when every response has ended.
  """
  B, P = prompts.tokens.shape
  row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, prompts.indices)
  stops = jnp.asarray(stop_ids, jnp.int32)

  def sample(logits, t):
    keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, t)
    return sample_tokens(logits, keys, temperature)

  def is_stop(tokens):
    return jnp.any(tokens[:, None] == stops[None, :], axis=1)

  cache = make_cache_fn(B, P + num_response)
  logits, cache = extend_fn(params, prompts.tokens, prompts.mask, cache)
  token, logprob = sample(logits, 0)
  column = jnp.arange(num_response)[None, :] == 0
  state = {
    't': jnp.ones((), jnp.int32),
    'token': token,
    'ended': is_stop(token),
    'cache': cache,
    'tokens': jnp.where(column, token[:, None], 0),
    'mask': jnp.broadcast_to(column, (B, num_response)),
    'logprobs': jnp.where(column, logprob[:, None], 0.0),
  }

  def unfinished(state):
    more = state['t'] < num_response
    return more & ~jnp.all(state['ended']) if early_exit else more

  def step(state):
    t, going = state['t'], ~state['ended']
    logits, cache = extend_fn(
      params, state['token'][:, None], going[:, None], state['cache']
    )
    token, logprob = sample(logits, t)
    column = (jnp.arange(num_response)[None, :] == t) & going[:, None]
    return {
      't': t + 1,
      'token': token,
      'ended': state['ended'] | is_stop(token),
      'cache': cache,
      'tokens': jnp.where(column, token[:, None], state['tokens']),
      'mask': state['mask'] | column,
      'logprobs': jnp.where(column, logprob[:, None], state['logprobs']),
    }

  state = jax.lax.while_loop(unfinished, step, state)
  # A stop sampled after the response had ended is not the response's own.
  ended = jnp.any(
    state['mask']
    & jnp.any(state['tokens'][:, :, None] == stops[None, None, :], axis=2),
    axis=1,
  )
  return Rollout(
    tokens=jnp.concatenate([prompts.tokens, state['tokens']], axis=1),
    mask=jnp.concatenate([prompts.mask, state['mask']], axis=1),
    response_mask=state['mask'],
    logprobs=state['logprobs'],
    ended=ended,
  )


def in_slices(
  fn: Callable[[PyTree], PyTree], rows: PyTree, num_slices: int
) -> PyTree:
  """Applies a function of rows, inside a program, to one slice after another.

  Only one slice's temporaries exist at a time. Slice j holds rows j, j + n,
  j + 2 n, ...: where rows are cut over devices, each keeps its own.

  Args:
    fn: rows to arrays with as many rows, each row for itself.
    rows: pytree of arrays with B rows.
    num_slices: n, which divides B; 1 calls fn on all rows.
  """
  if num_slices == 1:
    return fn(rows)

  def cut(x):
    return jnp.swapaxes(x.reshape(-1, num_slices, *x.shape[1:]), 0, 1)

  def join(x):
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])

  return jax.tree.map(join, jax.lax.map(fn, jax.tree.map(cut, rows)))


def in_batches(
  fn: Callable[[PyTree], PyTree],
  rows: PyTree,
  batch_size: int,
  progress: Callable[[int], None] | None = None,
) -> PyTree:
  """Applies a jitted function to any number of rows, in equal batches.

  The last batch is filled up by repeating the first rows, and what comes of
  the copies is thrown away.

  Args:
    fn: one batch of rows to arrays with as many rows; one compilation.
    rows: pytree of numpy arrays with N rows each.
    batch_size: rows per call.
    progress: told the number of rows done after every batch.

  Returns:
    What fn returns, as numpy arrays of N rows, in order.

  Raises:
    ValueError: no rows.
  """
  num_rows = jax.tree.leaves(rows)[0].shape[0]
  if num_rows == 0:
    raise ValueError('no rows to run a model on')
  parts = []
  for start in range(0, num_rows, batch_size):
    wanted = np.arange(start, start + batch_size) % num_rows
    batch = jax.tree.map(lambda x, w=wanted: np.asarray(x)[w], rows)
    result = jax.device_get(fn(batch))
    kept = min(batch_size, num_rows - start)
    parts.append(jax.tree.map(lambda x, k=kept: x[:k], result))
    if progress is not None:
      progress(kept)
  return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def response_ids(rollout: Rollout) -> list[list[int]]:
  """Each response's token ids, without padding, the stop token included."""
  tokens = np.asarray(rollout.tokens)
  mask = np.asarray(rollout.response_mask)
  tokens = tokens[:, tokens.shape[1] - mask.shape[1] :]
  return [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]
