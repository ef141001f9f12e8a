"""Samples responses by continuous batching: slots take prompts from a queue.

This is one jitted program. Prompts are read into a bank of caches, several at a
time. Every slot samples one token per step, and a slot whose response has ended
takes the next prompt at once. When the queue is empty, the number of slots
shrinks with the number of unfinished responses.

A token depends on the weights, the key, the prompt's number and the token's
position in the response. It does not depend on the slot, its neighbours or the
order of the queue, except for rounding in matrix products of different sizes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from instruct_jax import sampling
from instruct_jax.infra import sharding
from instruct_jax.types import (
  Decoder,
  Key,
  Params,
  PromptBatch,
  PyTree,
  Rollout,
)

# Columns of a cache are a multiple of this.
_COLUMNS = 16
# Least slots of a shard; fewer are not worth a separate loop.
_LEAST_SLOTS = 4
# Tokens. For shorter responses, reducing the slots would not save much.
_LEAST_RESPONSE = 64
# How many times a queue's size may double before prompts are split into queues.
_DOUBLINGS = 3
# If slots are not refilled, the cache grows by at least this many columns.
_GROWTH = 32
# Counts of `generate_counted`.
_COUNTS = (
  *('steps', 'slot_steps', 'queued_slot_steps'),
  *('idle', 'queued_idle', 'reads'),
)


@dataclasses.dataclass(frozen=True)
class _Sizes:
  """Sizes of one shard's part of a rollout.

  Attributes:
    prompts, rows: prompts and rows in the queue; rows = prompts * samples.
    samples: samples per prompt.
    bank: prompts read at a time.
    slots: slots at first.
    response: R.
    widths: numbers of columns of the cache, ascending.
  """

  prompts: int
  rows: int
  samples: int
  bank: int
  slots: int
  response: int
  widths: tuple[int, ...]

  @property
  def refills(self) -> bool:
    return self.slots < self.rows

  @property
  def drains(self) -> tuple[int, ...]:
    """Numbers of slots after the queue is empty, descending.

    Each is one more loop to compile, which is not worth it for short responses.
    """
    if self.response < _LEAST_RESPONSE:
      return ()
    sizes = (self.slots * eighths // 8 for eighths in (6, 4, 2, 1))
    return tuple(size for size in sizes if size >= _LEAST_SLOTS)


def make_sizes(
  num_prompts: int,
  num_columns: int,
  num_response: int,
  num_slots: int,
  num_samples: int,
  num_shards: int,
) -> _Sizes:
  """Computes the sizes of one shard's part.

  Raises:
    ValueError: the number of shards does not divide the prompts.
  """
  rows = num_prompts * num_samples
  if num_prompts % num_shards:
    raise ValueError(
      f'{num_prompts} prompts do not divide over {num_shards} shards of the '
      'mesh; choose a multiple'
    )
  prompts = num_prompts // num_shards
  slots = -(-min(num_slots or rows, rows) // num_shards)
  # The last token of a response is never read.
  longest = num_columns + num_response - 1
  refills = slots < prompts * num_samples
  growths = 1 if refills else max(1, min(4, num_response // _GROWTH))
  widths = (
    num_columns + -(-num_response * (i + 1) // growths) for i in range(growths)
  )
  return _Sizes(
    prompts=prompts,
    rows=prompts * num_samples,
    samples=num_samples,
    bank=max(1, min(prompts, slots // 4)),
    slots=slots,
    response=num_response,
    widths=tuple(
      -(-min(width, longest) // _COLUMNS) * _COLUMNS for width in widths
    ),
  )


def generate(
  params: Params, prompts: PromptBatch, key: Key, **settings: Any
) -> Rollout:
  """`generate_counted` without the counts."""
  sampled, _ = generate_counted(params, prompts, key, **settings)
  return sampled


def generate_counted(
  params: Params,
  prompts: PromptBatch,
  key: Key,
  *,
  decoder: Decoder,
  num_response: int,
  stop_ids: tuple[int, ...],
  temperature: float = 1.0,
  num_slots: int = 0,
  num_samples: int = 1,
) -> tuple[Rollout, dict[str, jax.Array]]:
  """Samples responses of at most `num_response` tokens to each prompt.

  Args:
    prompts: left-padded, so that every response starts in column P. A prompt
      without tokens gets a response without tokens.
    key: key of this rollout. With n samples per prompt, the noise of token t of
      sample j of prompt i comes from fold_in(fold_in(key, n i + j), t), which
      does not depend on slot, neighbours and order.
    num_response: R, the longest response, including the stop token.
    stop_ids: sampling one of these ends the response; it is kept.
    temperature: 1 in the paper's rollouts; 0 is greedy.
    num_slots: rows sampled at a time, for which the cache has room, rounded up
      to a multiple of the shards; 0 is one for each response.
    num_samples: responses to each prompt, in adjacent rows; a prompt is read
      once for all of them.

  Returns:
    The rollout, and counts of how well slots were used: `steps`; `slot_steps`,
    the sum of slots over steps; `queued_slot_steps`, the part of it before the
    queue was empty; `idle` and `queued_idle`, the parts of these two that
    sampled nothing; `reads`, the batches of prompts that were read.

  Raises:
    ValueError: the number of shards does not divide the prompts.
  """
  B, P = prompts.tokens.shape
  num_shards = sharding.num_batch_shards()
  sizes = make_sizes(B, P, num_response, num_slots, num_samples, num_shards)
  weights = decoder.prepare(params)
  numbers = prompts.indices[:, None] * num_samples
  numbers = (numbers + jnp.arange(num_samples)[None, :]).reshape(-1)
  row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
  tokens, lengths = sharding.per_shard(_left_aligned)(
    prompts.tokens, prompts.mask
  )
  noise = sampling.uniform_noise(row_keys, jnp.arange(num_response))
  # Each shard's number of prompts, up to the last prompt that has a token.
  present = sharding.per_shard(
    lambda lengths: jnp.max(
      jnp.where(lengths > 0, jnp.arange(1, lengths.shape[0] + 1), 0),
      keepdims=True,
    )
  )(lengths)
  queue = {
    'tokens': tokens,
    'lengths': lengths,
    'noise': noise,
    'rows': present * num_samples,
  }
  stops = np.asarray(stop_ids, np.int32)
  state = _Engine(sizes, decoder, weights, queue, stops, temperature).run()
  out, counts = state['out'], state['counts']
  mask = jnp.arange(num_response)[None, :] < out['lengths'][:, None]

  def repeat(x):
    return jnp.repeat(x, num_samples, axis=0) if num_samples > 1 else x

  return Rollout(
    tokens=jnp.concatenate([repeat(prompts.tokens), out['tokens']], axis=1),
    mask=jnp.concatenate([repeat(prompts.mask), mask], axis=1),
    response_mask=mask,
    logprobs=out['logprobs'],
    ended=out['ended'],
  ), counts


def _left_aligned(tokens, mask):
  """Turns left padding into right padding; returns rows and their lengths."""
  lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)
  P = tokens.shape[1]
  columns = (jnp.arange(P)[None, :] + P - lengths[:, None]) % P
  return jnp.take_along_axis(tokens, columns, axis=1), lengths


@dataclasses.dataclass(frozen=True)
class _Engine:
  """The loops of one rollout; a state is a dict of arrays, shards on axis 0."""

  sizes: _Sizes
  decoder: Decoder
  weights: PyTree
  queue: dict[str, jax.Array]
  stops: np.ndarray
  temperature: float

  def start(self):
    """The first state: all slots are free, and no prompt has been read."""
    sizes = self.sizes
    num_prompts, num_columns = self.queue['tokens'].shape
    D = num_prompts // sizes.prompts  # Shards.
    S = D * sizes.slots
    zeros = jnp.zeros((S,), jnp.int32)
    noise = self.queue['noise']
    return {
      'slots': {
        'row': zeros,
        'length': zeros,
        'count': zeros,
        'token': zeros,
        'alive': jnp.zeros((S,), bool),
      },
      'cache': self.decoder.make_cache(S, sizes.widths[0]),
      'bank': self.decoder.make_cache(D * sizes.bank, num_columns),
      # For each shard: the next row, and the first prompt not read yet.
      'next': jnp.zeros((D,), jnp.int32),
      'end': jnp.zeros((D,), jnp.int32),
      'out': {
        'tokens': jnp.zeros(noise.shape, jnp.int32),
        'logprobs': jnp.zeros_like(noise),
        'lengths': jnp.zeros((noise.shape[0],), jnp.int32),
        'ended': jnp.zeros((noise.shape[0],), bool),
      },
      'counts': dict.fromkeys(_COUNTS, jnp.zeros((), jnp.int32)),
    }

  # --- Filling slots, in each shard separately --------------------------------

  def _wants(self, queue, slots, after, end):
    """Whether a slot is free and the next prompt is not in the bank [1]."""
    free = jnp.any(~slots['alive']) & (after < queue['rows'])
    return free & (after // self.sizes.samples >= end)

  def _next_prompts(self, queue, after):
    """Tokens and lengths of the prompts that the bank takes next."""
    first = after[0] // self.sizes.samples
    rows = jnp.minimum(
      first + jnp.arange(self.sizes.bank), self.sizes.prompts - 1
    )
    return (
      queue['tokens'][rows],
      queue['lengths'][rows],
      jnp.full((1,), first + self.sizes.bank),
    )

  def _admit(self, queue, slots, cache, bank, after, end):
    """Gives free slots the next rows whose prompts are in the bank."""
    sizes = self.sizes

    def can_take(carry):
      slots, _, after = carry
      return (
        jnp.any(~slots['alive'])
        & (after[0] < queue['rows'][0])
        & (after[0] // sizes.samples < end[0])
      )

    def take(carry):
      slots, cache, after = carry
      slot, row = jnp.argmin(slots['alive']), after[0]
      prompt = row // sizes.samples
      length = queue['lengths'][prompt]

      def copy(to, source):
        source = jax.lax.dynamic_slice_in_dim(
          source, prompt - end[0] + sizes.bank, 1
        )
        return jax.lax.dynamic_update_slice(
          to, source, (slot, *[0] * (to.ndim - 1))
        )

      # The first step reads the prompt's last token again, so that prompts need
      # no logits.
      new = {
        'row': row,
        'length': jnp.maximum(length - 1, 0),
        'count': 0,
        'token': queue['tokens'][prompt, jnp.maximum(length - 1, 0)],
        'alive': length > 0,
      }
      slots = {name: x.at[slot].set(new[name]) for name, x in slots.items()}
      return slots, jax.tree.map(copy, cache, bank), after + 1

    return jax.lax.while_loop(can_take, take, (slots, cache, after))

  def fill(self, state):
    """Gives every free slot a row, reading prompts as needed."""
    wants = sharding.per_shard(self._wants)

    def admitted(state):
      slots, cache, after = sharding.per_shard(self._admit)(
        self.queue,
        *(state[name] for name in ('slots', 'cache', 'bank', 'next', 'end')),
      )
      return {**state, 'slots': slots, 'cache': cache, 'next': after}

    def needs(state):
      return jnp.any(
        wants(self.queue, state['slots'], state['next'], state['end'])
      )

    def read(state):
      tokens, lengths, end = sharding.per_shard(self._next_prompts)(
        self.queue, state['next']
      )
      bank = self.decoder.read(self.weights, tokens, lengths)
      counts = state['counts']
      counts = {**counts, 'reads': counts['reads'] + 1}
      return admitted({**state, 'bank': bank, 'end': end, 'counts': counts})

    return jax.lax.while_loop(needs, read, admitted(state))

  # --- One token in every slot ------------------------------------------------

  def _record(self, queue, slots, out, token, logprob):
    """Records the tokens of live slots, and which responses have ended."""
    sizes = self.sizes
    alive, count = slots['alive'], slots['count']
    # Idle slots write nowhere.
    row = jnp.where(alive, slots['row'], sizes.rows)
    stopped = jnp.any(token[:, None] == self.stops[None, :], axis=1)
    out = {
      'tokens': out['tokens'].at[row, count].set(token, mode='drop'),
      'logprobs': out['logprobs'].at[row, count].set(logprob, mode='drop'),
      'lengths': out['lengths'].at[row].set(count + 1, mode='drop'),
      'ended': out['ended'].at[row].set(stopped, mode='drop'),
    }
    slots = {
      'row': slots['row'],
      'length': slots['length'] + alive,
      'count': count + alive,
      'token': token,
      'alive': alive & ~stopped & (count + 1 < sizes.response),
    }
    return slots, out

  def step(self, state):
    """Reads the last token of every slot and samples the next."""
    slots, counts = state['slots'], state['counts']
    logits, cache = self.decoder.step(
      self.weights, slots['token'], slots['length'], state['cache']
    )
    uniform = sharding.per_shard(
      lambda queue, slots: queue['noise'][slots['row'], slots['count']]
    )(self.queue, slots)
    token, logprob = sampling.sample_tokens(logits, uniform, self.temperature)
    after, out = sharding.per_shard(self._record)(
      self.queue, slots, state['out'], token, logprob
    )
    idle = jnp.sum(~slots['alive'], dtype=jnp.int32)
    queued = self._queue_left(state)
    num_slots = slots['alive'].shape[0]
    added = {
      'steps': 1,
      'slot_steps': num_slots,
      'queued_slot_steps': jnp.where(queued, num_slots, 0),
      'idle': idle,
      'queued_idle': jnp.where(queued, idle, 0),
      'reads': 0,
    }
    counts = {name: counts[name] + added[name] for name in counts}
    state = {**state, 'slots': after, 'cache': cache, 'out': out}
    return {**state, 'counts': counts}

  # --- The whole rollout ------------------------------------------------------

  def _queue_left(self, state):
    return jnp.any(state['next'] < self.queue['rows'])

  def _most_alive(self, state):
    """Number of live slots of the shard that has the most."""
    count = sharding.per_shard(
      lambda alive: jnp.sum(alive, dtype=jnp.int32)[None]
    )
    return jnp.max(count(state['slots']['alive']))

  def _steps(self, state, width, least, refills):
    """Steps until at most `least` slots are alive, or the cache must grow."""

    def condition(state):
      slots = state['slots']
      going = self._most_alive(state) > least
      if refills:
        going |= self._queue_left(state)
      if width < self.sizes.widths[-1]:
        longest = jnp.max(jnp.where(slots['alive'], slots['length'], 0))
        going &= longest < width
      return going

    def body(state):
      return self.step(self.fill(state) if refills else state)

    return jax.lax.while_loop(condition, body, state)

  def _compact(self, state, num_slots):
    """Keeps `num_slots` slots of each shard, the live ones first."""

    def keep(slots, cache):
      order = jnp.argsort(~slots['alive'], stable=True)[:num_slots]
      return jax.tree.map(lambda x: x[order], (slots, cache))

    slots, cache = sharding.per_shard(keep)(state['slots'], state['cache'])
    return {**state, 'slots': slots, 'cache': cache}

  def run(self):
    """Runs all loops; returns the last state."""
    sizes = self.sizes
    drains = [*sizes.drains, 0]
    state = self.start()
    if not sizes.refills:
      state = self.fill(state)
      del state['bank']
    for width in sizes.widths:
      if width > sizes.widths[0]:
        num_slots = state['slots']['row'].shape[0]
        state['cache'] = put_first(
          self.decoder.make_cache(num_slots, width), state['cache']
        )
      state = self._steps(state, width, drains[0], sizes.refills)
    state.pop('bank', None)
    for num_slots, least in zip(drains, drains[1:], strict=False):
      state = self._compact(state, num_slots)
      state = self._steps(state, sizes.widths[-1], least, refills=False)
    return state


def put_first(cache: PyTree, smaller: PyTree) -> PyTree:
  """Copies a cache into the first columns of one with more columns."""
  return jax.tree.map(
    lambda x, new: jax.lax.dynamic_update_slice(x, new, (0,) * x.ndim),
    cache,
    smaller,
  )


def in_queues(
  fn: Callable[[PromptBatch], Rollout],
  rows: PromptBatch,
  num_slots: int,
  num_samples: int = 1,
  progress: Callable[[int], None] | None = None,
) -> Rollout:
  """Samples any number of prompts in one or more queues.

  A queue holds 1, 2, 4 or 8 times the prompts that fill the slots. The last
  queue is filled up with prompts without tokens. Prompts are dealt to the
  shards of the current mesh in turn, so that each has equally many.

  Args:
    fn: a jitted `generate` for a queue of prompts, with `num_slots` slots and
      `num_samples` responses to each prompt.
    rows: NumPy arrays of N prompts.
    num_slots: rows sampled at a time.
    num_samples: responses to each prompt.
    progress: called with the number of responses of each finished queue.

  Returns:
    The responses as NumPy arrays of N * num_samples rows, in order.

  Raises:
    ValueError: no prompts.
  """
  num_rows = rows.indices.shape[0]
  if num_rows == 0:
    raise ValueError('no prompts to sample from')
  num_shards = sharding.num_batch_shards()
  size = -(-num_slots // (num_shards * num_samples)) * num_shards
  for _ in range(_DOUBLINGS):
    size = 2 * size if size < num_rows else size
  # Prompt i of a queue goes to shard i % num_shards.
  place = np.arange(size).reshape(num_shards, -1, order='F').reshape(-1)
  back = np.argsort(place)
  parts = []
  for start in range(0, num_rows, size):
    kept = min(size, num_rows - start)

    def queue(x, start=start, kept=kept):
      filled = np.zeros((size, *x.shape[1:]), x.dtype)
      filled[:kept] = x[start : start + kept]
      return filled[place]

    def ordered(x, kept=kept):
      x = x.reshape(size, num_samples, *x.shape[1:])[back][:kept]
      return x.reshape(kept * num_samples, *x.shape[2:])

    sampled = jax.device_get(fn(jax.tree.map(queue, rows)))
    parts.append(jax.tree.map(ordered, sampled))
    if progress is not None:
      progress(kept * num_samples)
  return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def episode_lengths(rollout: Rollout) -> Int[Array, '2 B']:
  """Number of tokens of each prompt and of each response, replicated."""
  responses = jnp.sum(rollout.response_mask, axis=1)
  prompts = jnp.sum(rollout.mask, axis=1) - responses
  return sharding.constrain(jnp.stack([prompts, responses]), None, None)


def response_ids(rollout: Rollout) -> list[list[int]]:
  """Each response's token ids without padding, including the stop token."""
  tokens = np.asarray(rollout.tokens)
  mask = np.asarray(rollout.response_mask)
  tokens = tokens[:, tokens.shape[1] - mask.shape[1] :]
  return [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]
