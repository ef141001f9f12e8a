"""Packs episodes into rows for scores, log-probabilities and losses.

A rollout has one episode per row, prompts padded on the left and responses on
the right. Dense rows hold several episodes in sequence, with little padding.
The host decides which episode goes where, from the lengths alone (`lay_out`);
the device moves the tokens. If dense rows would save little, every episode gets
its own row, in the same kind of layout.

The rows of a group (a microbatch of a minibatch) hold exactly its episodes.
Episodes are sorted by length and cut into strata of one episode per group. In
every fourth stratum they are dealt to the groups at random; in the others, so
that they even out the groups' lengths. So all groups have nearly the same
number of tokens and fit one shape. Each inner epoch is dealt anew.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from instruct_jax.types import MAX_SEGMENTS, Episodes, PyTree, Rollout


@flax.struct.dataclass
class Layout:
  """Where the tokens of a rollout go; made by `lay_out`.

  Row i * num_steps + s is row i of optimizer step s, so that sharded rows stay
  on their devices when the steps are separated. Q is the number of response
  tokens that fit in a row.

  Attributes:
    source: index of each token in the flattened [B * T] rollout.
    segments: 0 on padding, 1, 2, ... number the episodes of a row.
    where: column of the position that predicts each response token.
    response: index of that response token in the flattened [B * R] responses.
    response_mask: True where there is a response token.
    places: index of each response token in the flattened [M1 * Q] rows of the
      first inner epoch, M1 = M / num_epochs; 0 where masked.
    ends: index of each episode's last token in the flattened [M1 * L] rows.
    num_steps: static; optimizer steps of all inner epochs.
    num_epochs: static; inner epochs.
  """

  source: Int[Array, 'M L']
  segments: Int[Array, 'M L']
  where: Int[Array, 'M Q']
  response: Int[Array, 'M Q']
  response_mask: Bool[Array, 'M Q']
  places: Int[Array, 'B R']
  ends: Int[Array, 'B']
  num_steps: int = flax.struct.field(pytree_node=False)
  num_epochs: int = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What determines the shapes of a run's rows, besides the lengths.

  Attributes:
    prompt_columns: P of the rollout.
    response_columns: R of the rollout.
    num_minibatches, num_microbatches: their product is the number of groups of
      an epoch.
    num_epochs: inner epochs.
    num_shards: devices that rows are sharded over.
    row_episodes: approximate number of episodes in a dense row. More fill rows
      better; fewer cost less in attention kernels that read whole rows. 0 gives
      every episode its own row.
    multiple: lengths of dense rows are multiples of this.
    spare: largest ratio of a dense row's length to the length needed, before
      rounding up to `multiple`.
  """

  prompt_columns: int
  response_columns: int
  num_minibatches: int
  num_microbatches: int
  num_epochs: int
  num_shards: int
  row_episodes: int
  multiple: int
  spare: float

  @property
  def longest(self) -> int:
    """Tokens of the longest possible episode, P + R."""
    return self.prompt_columns + self.response_columns


@dataclasses.dataclass(frozen=True)
class Shape:
  """The shape of the rows of one group of episodes.

  Attributes:
    num_rows: rows of a group.
    length: L, columns of a row.
    num_responses: Q, response tokens that fit in a row.
  """

  num_rows: int
  length: int
  num_responses: int


def ladder(sizes: Sizes, group_size: int) -> tuple[Shape, ...]:
  """The shapes that the rows of a run may have, least work first.

  Each is compiled once, when first needed. They depend on the config alone, so
  that a resumed run, or another process, takes the same shape for the same
  lengths.

  The longest dense row is one that saves a twentieth of the columns; each next
  length is smaller by a factor of `spare`, down to half an episode. Responses
  may take a third of a row, two thirds, or all of it. The last shape has one
  row for each episode.
  """
  alone = Shape(group_size, sizes.longest, sizes.response_columns)
  if not sizes.row_episodes:
    return (alone,)
  num_rows = sizes.num_shards * max(
    1, round(group_size / (sizes.num_shards * sizes.row_episodes))
  )
  multiple, lengths = sizes.multiple, []
  size = int(0.95 * sizes.longest * group_size / num_rows)
  size = size // multiple * multiple
  while size > 0 and (not lengths or lengths[-1] > sizes.longest / 2):
    lengths.append(math.ceil(size / multiple) * multiple)
    size = min(size / sizes.spare, size - multiple)
  dense = {
    (length, min(length, -(-length * thirds // 24) * 8))
    for length in lengths
    for thirds in (1, 2, 3)
  }
  return (*(Shape(num_rows, *shape) for shape in sorted(dense)), alone)


def deal(
  lengths: Int[np.ndarray, 'B'], num_groups: int, rng: np.random.Generator
) -> Int[np.ndarray, 'G E']:
  """Deals episodes into random groups of equal size and nearly equal length.

  Args:
    lengths: tokens of each episode.
    num_groups: G, which divides B.
    rng: decides which episode of a stratum goes to which group.

  Returns:
    Indices of the episodes of each group.

  Raises:
    ValueError: the number of groups does not divide that of the episodes.
  """
  if len(lengths) % num_groups:
    raise ValueError(
      f'{num_groups} groups do not divide {len(lengths)} episodes'
    )
  shuffled = rng.permutation(len(lengths))  # Breaks ties at random.
  order = shuffled[np.argsort(lengths[shuffled], kind='stable')]
  strata = order.reshape(-1, num_groups)[::-1]  # The longest first.
  totals = np.zeros(num_groups, np.int64)
  dealt = []
  for number, stratum in enumerate(strata):
    groups = rng.permutation(num_groups)
    if number % 4:
      # The stratum's shortest episode goes to the longest group so far.
      groups = groups[np.argsort(-totals[groups], kind='stable')]
    row = np.empty_like(stratum)
    row[groups] = stratum
    totals += lengths[row]
    dealt.append(row)
  return np.stack(dealt, axis=1)


def deal_epochs(
  lengths: Int[np.ndarray, 'B'], sizes: Sizes, seed: tuple[int, ...]
) -> Int[np.ndarray, 'G E']:
  """The groups of all inner epochs, by one `deal` for each.

  Args:
    seed: seeds the deal; it includes the iteration.
  """
  num_groups = sizes.num_minibatches * sizes.num_microbatches
  rngs = [np.random.default_rng([*seed, i]) for i in range(sizes.num_epochs)]
  return np.concatenate([deal(lengths, num_groups, rng) for rng in rngs])


class _Placed(NamedTuple):
  """The place of every episode of every group [G, E].

  Attributes:
    row: its row in the group.
    number: its number in the row, from 1.
    offset, response_offset: tokens and response tokens before it in the row.
    most, most_responses, most_episodes: the most tokens, response tokens and
      episodes of any row.
  """

  row: np.ndarray
  number: np.ndarray
  offset: np.ndarray
  response_offset: np.ndarray
  most: int
  most_responses: int
  most_episodes: int


def _place(groups, lengths, response_lengths, num_rows) -> _Placed:
  """Puts the longest remaining episode into the row with the most room."""
  places = np.zeros((4, *groups.shape), np.int64)
  # Episodes, tokens and response tokens of each row so far.
  used = np.zeros((3, len(groups), num_rows), np.int64)
  for g, members in enumerate(groups):
    for e in np.argsort(-lengths[members], kind='stable'):
      row, episode = int(np.argmin(used[1, g])), members[e]
      number, offset, response_offset = used[:, g, row]
      places[:, g, e] = row, number + 1, offset, response_offset
      used[:, g, row] += 1, lengths[episode], response_lengths[episode]
  episodes, tokens, responses = used.max(axis=(1, 2)).tolist()
  return _Placed(*places, tokens, responses, episodes)


def _fit(groups, lengths, response_lengths, sizes) -> tuple[Shape, _Placed]:
  """The first shape with room for the fullest row, and the places in it."""
  placed_in = functools.cache(
    lambda num_rows: _place(groups, lengths, response_lengths, num_rows)
  )
  for shape in ladder(sizes, groups.shape[1]):
    placed = placed_in(shape.num_rows)
    if (
      placed.most <= shape.length
      and placed.most_responses <= shape.num_responses
      and placed.most_episodes <= MAX_SEGMENTS
    ):
      break
  return shape, placed


def lay_out(
  prompt_lengths: Int[np.ndarray, 'B'],
  response_lengths: Int[np.ndarray, 'B'],
  groups: Int[np.ndarray, 'G E'],
  sizes: Sizes,
) -> Layout:
  """Lays a rollout's episodes out in rows, as NumPy arrays.

  Takes the first shape of the `ladder` that has room for the fullest row.

  Args:
    prompt_lengths, response_lengths: real tokens of each episode.
    groups: from `deal_epochs`; group g is microbatch g % num_microbatches of
      step g // num_microbatches.

  Raises:
    ValueError: an episode without tokens.
  """
  prompt_lengths = np.asarray(prompt_lengths)
  lengths = prompt_lengths + np.asarray(response_lengths)
  if lengths.min() < 1:
    raise ValueError(f'episode {lengths.argmin()} has no tokens')
  B, T = len(lengths), sizes.longest
  shape, placed = _fit(groups, lengths, response_lengths, sizes)
  num_rows, L, Q = dataclasses.astuple(shape)
  num_steps = sizes.num_epochs * sizes.num_minibatches
  group = np.broadcast_to(np.arange(len(groups))[:, None], groups.shape)
  step, micro = np.divmod(group, sizes.num_microbatches)
  row_in_step = micro * num_rows + placed.row
  final_row = (row_in_step * num_steps + step).ravel()
  M = num_steps * sizes.num_microbatches * num_rows
  source, segments = np.zeros((2, M * L), np.int32)
  where, response = np.zeros((2, M * Q), np.int32)
  response_mask = np.zeros(M * Q, bool)

  episodes, offset = groups.ravel(), placed.offset.ravel()
  response_offset = placed.response_offset.ravel()
  p, n = prompt_lengths[episodes], lengths[episodes]
  r = n - p
  within = _ranges(n)
  to = np.repeat(final_row * L + offset, n) + within
  start = episodes * T + sizes.prompt_columns - p
  source[to] = np.repeat(start, n) + within
  segments[to] = np.repeat(placed.number.ravel(), n)
  within = _ranges(r)
  to = np.repeat(final_row * Q + response_offset, r) + within
  # The first response token is predicted from the prompt's last position.
  where[to] = np.repeat(offset + p - 1, r) + within
  response[to] = np.repeat(episodes * sizes.response_columns, r) + within
  response_mask[to] = True

  # The rows of the first epoch, in their own order.
  first = slice(0, B)
  epoch_row = (row_in_step * sizes.num_minibatches + step).ravel()[first]
  places = np.zeros(B * sizes.response_columns, np.int32)
  size, within = r[first], _ranges(r[first])
  places[np.repeat(episodes[first] * sizes.response_columns, size) + within] = (
    np.repeat(epoch_row * Q + response_offset[first], size) + within
  )
  ends = np.zeros(B, np.int32)
  ends[episodes[first]] = epoch_row * L + offset[first] + n[first] - 1
  return Layout(
    source=source.reshape(M, L),
    segments=segments.reshape(M, L),
    where=where.reshape(M, Q),
    response=response.reshape(M, Q),
    response_mask=response_mask.reshape(M, Q),
    places=places.reshape(B, sizes.response_columns),
    ends=ends,
    num_steps=num_steps,
    num_epochs=sizes.num_epochs,
  )


def _ranges(sizes: np.ndarray) -> np.ndarray:
  """0 .. size - 1 for each size, concatenated."""
  ends = np.cumsum(sizes)
  return np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)


def fill_fraction(layout: Layout) -> float:
  """The share of row positions that hold real tokens."""
  return float(np.mean(np.asarray(layout.segments) > 0))


# --- On the device ------------------------------------------------------------


def pack_episodes(rollout: Rollout, layout: Layout) -> Episodes:
  """Packs a rollout into the rows of all inner epochs."""
  flat = rollout.tokens.reshape(-1)
  return Episodes(
    tokens=jnp.where(layout.segments > 0, flat[layout.source], 0),
    segments=layout.segments,
    where=layout.where,
    response_mask=layout.response_mask,
  )


def first_epoch(rows: PyTree, layout: Layout) -> PyTree:
  """The first inner epoch's rows of each array; they hold each episode once."""
  if layout.num_epochs == 1:
    return rows

  def first(x):
    by_step = x.reshape(-1, layout.num_steps, *x.shape[1:])
    by_step = by_step[:, : layout.num_steps // layout.num_epochs]
    return by_step.reshape(-1, *x.shape[1:])

  return jax.tree.map(first, rows)


def pack_responses(
  values: Float[Array, 'B R'], layout: Layout
) -> Float[Array, 'M Q']:
  """Packs one number per response token into rows; 0 where masked."""
  return jnp.where(
    layout.response_mask, values.reshape(-1)[layout.response], 0.0
  )


def unpack_responses(
  values: Float[Array, 'M1 Q'], layout: Layout, mask: Bool[Array, 'B R']
) -> Float[Array, 'B R']:
  """Inverse of `pack_responses` for rows of the first epoch; 0 where masked."""
  return jnp.where(mask, values.reshape(-1)[layout.places], 0.0)
