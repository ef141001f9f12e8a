"""The obvious sampling loop, which the engine of `rollout.py` must equal.

One cache as long as prompt and longest response, one clock for all rows, all
rows until the last has ended, and a cumulative sum over the whole vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from instruct_jax.types import Key, Params, PromptBatch, PyTree, Rollout

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
