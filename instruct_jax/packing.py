"""Episodes as dense rows of segments: no position is spent on padding.

A rollout is a rectangle, prompts padded on the left and responses on the right.
Scoring and updating read rows in which episodes follow one another, each a
segment of its own. Which episode goes where is decided on the host, from the
lengths alone; the tokens are moved on the device.

The rows of a minibatch hold exactly its episodes, so a minibatch means what it
did. Episodes are dealt out by length: sorted, cut into strata as large as there
are minibatches, one of each stratum to each: at random in every fourth stratum,
so as to even out in the others. So all minibatches have nearly the same number
of tokens, and one shape fits them; and each inner epoch has a deal of its own.
"""

import math

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from instruct_jax.types import PackedPPOBatch, PPOBatch


@flax.struct.dataclass
class Layout:
  """Where the tokens of a rollout go; made by `plan`.

  Row i * num_steps + s is row i of optimizer step s, so that rows cut over
  devices stay where they are when the steps are taken apart. Q is the most
  response tokens that a row holds.

  Attributes:
    source: place of each token in the flattened [B * T] rollout.
    segments: 0 on padding, 1, 2, ... number the episodes of a row.
    where: column of the position that predicts each response token.
    response: place of that response token in the flattened [B * R].
    response_mask: True where there is one.
    places: for each response token its place in the flattened [M1 * Q] of the
      rows of the first inner epoch, M1 = M / num_epochs; 0 where masked.
    ends: place of each episode's last token in the flattened [M1 * L].
    num_steps: static; optimizer steps, all inner epochs together.
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


def rows_per_group(group_size: int, num_shards: int, row_episodes: int) -> int:
  """Rows that hold a group of so many episodes, whatever their lengths.

  Args:
    group_size: episodes of a microbatch.
    num_shards: devices that rows are cut over.
    row_episodes: of a row, about.
  """
  return num_shards * max(1, round(group_size / (num_shards * row_episodes)))


def ladder(
  longest: int,
  group_size: int,
  num_rows: int,
  multiple: int,
  spare: float,
) -> tuple[tuple[int, int], ...]:
  """The shapes (L, Q) that rows may have in a run, in ascending order.

  Each is compiled once, when first needed, so this is how many there can be.
  They follow from the config: no shape depends on what a run has seen, and a
  resumed run, or another process, takes the same one for the same lengths.

  Lengths descend from the longest that saves a twentieth of the padded batch to
  half an episode, by a factor of `spare` each. Response tokens have a third of
  a row, two thirds, or all of it.

  Args:
    longest: tokens of the longest episode, P + R.
    group_size: episodes of a group.
    num_rows: that hold it.
    multiple: lengths are multiples of this.
    spare: rows are at the most so many times longer than needed, but for
      `multiple`.
  """
  size = int(0.95 * longest * group_size / num_rows) // multiple * multiple
  lengths = []
  while size > 0 and (not lengths or lengths[-1] > longest / 2):
    lengths.append(math.ceil(size / multiple) * multiple)
    size = min(size / spare, size - multiple)
  return tuple(
    sorted(
      {
        (length, min(length, -(-length * thirds // 24) * 8))
        for length in lengths
        for thirds in (1, 2, 3)
      }
    )
  )


def deal(
  lengths: Int[np.ndarray, 'B'], num_groups: int, rng: np.random.Generator
) -> Int[np.ndarray, 'G E']:
  """Random groups of equal number and nearly equal length, as indices.

  Args:
    lengths: tokens of each episode.
    num_groups: G, which divides B.
    rng: decides which episode of a stratum goes to which group.

  Raises:
    ValueError: the groups do not divide the episodes.
  """
  if len(lengths) % num_groups:
    raise ValueError(
      f'{num_groups} groups do not divide {len(lengths)} episodes'
    )
  shuffled = rng.permutation(len(lengths))  # Ties are broken at random.
  order = shuffled[np.argsort(lengths[shuffled], kind='stable')]
  strata = order.reshape(-1, num_groups)[::-1]  # The longest first.
  totals = np.zeros(num_groups, np.int64)
  dealt = []
  for number, stratum in enumerate(strata):
    groups = rng.permutation(num_groups)
    if number % 4:
      # The shortest of the stratum to the group that has the most so far.
      groups = groups[np.argsort(-totals[groups], kind='stable')]
    row = np.empty_like(stratum)
    row[groups] = stratum
    totals += lengths[row]
    dealt.append(row)
  return np.stack(dealt, axis=1)


def plan(
  prompt_lengths: Int[np.ndarray, 'B'],
  response_lengths: Int[np.ndarray, 'B'],
  *,
  prompt_columns: int,
  response_columns: int,
  num_minibatches: int,
  num_microbatches: int,
  num_epochs: int,
  num_shards: int,
  row_episodes: int,
  multiple: int,
  spare: float,
  seed: tuple[int, ...],
) -> Layout | None:
  """Lays a rollout's episodes out in rows; NumPy arrays.

  None where that would save less than a twentieth of the padded batch.

  Within a group (a microbatch of a minibatch) the longest episode that is left
  goes to the row with the most room; the number of rows does not depend on the
  lengths.

  Args:
    prompt_lengths, response_lengths: real tokens of each episode.
    prompt_columns: P of the rollout, prompts right-aligned.
    response_columns: R of the rollout.
    num_minibatches, num_microbatches: groups an inner epoch.
    num_epochs: inner epochs, each dealt anew.
    num_shards: devices that rows are cut over.
    row_episodes: episodes of a row, about: rows fill up better with many, and
      attention kernels that read whole rows cost less with few.
    multiple, spare: see `ladder`, from which the shape is taken.
    seed: of the deal; the iteration is part of it.

  Raises:
    ValueError: groups that do not divide the episodes; an empty episode.
  """
  lengths = np.asarray(prompt_lengths) + np.asarray(response_lengths)
  if lengths.min() < 1:
    raise ValueError(f'episode {lengths.argmin()} has no tokens at all')
  num_groups = num_minibatches * num_microbatches
  B, T = len(lengths), prompt_columns + response_columns
  groups = np.concatenate(
    [
      deal(lengths, num_groups, np.random.default_rng([*seed, epoch]))
      for epoch in range(num_epochs)
    ]
  )
  group_size = groups.shape[1]
  num_rows = rows_per_group(group_size, num_shards, row_episodes)
  num_steps = num_epochs * num_minibatches
  # Row and offset of every episode, in every epoch: [epochs * groups, E].
  row = np.zeros_like(groups)
  offset, number = np.zeros_like(groups), np.zeros_like(groups)
  response_offset = np.zeros_like(groups)
  used = np.zeros((len(groups), num_rows), np.int64)
  responses = np.zeros_like(used)
  counts = np.zeros_like(used)
  for g, members in enumerate(groups):
    for e in np.argsort(-lengths[members], kind='stable'):
      episode, place = members[e], int(np.argmin(used[g]))
      row[g, e], offset[g, e] = place, used[g, place]
      response_offset[g, e] = responses[g, place]
      counts[g, place] += 1
      number[g, e] = counts[g, place]
      used[g, place] += lengths[episode]
      responses[g, place] += response_lengths[episode]
  # Group g is microbatch g % num_microbatches of step g // num_microbatches.
  group = np.broadcast_to(np.arange(len(groups))[:, None], groups.shape)
  step, micro = np.divmod(group, num_microbatches)
  row_in_step = micro * num_rows + row
  final_row = row_in_step * num_steps + step

  # The fullest row decides.
  fitting = (
    (L, Q)
    for L, Q in ladder(T, group_size, num_rows, multiple, spare)
    if used.max() <= L and responses.max() <= Q
  )
  if (shape := next(fitting, None)) is None:
    return None
  L, Q = shape
  M = num_steps * num_microbatches * num_rows
  source, segments = np.zeros((2, M * L), np.int32)
  where, response = np.zeros((2, M * Q), np.int32)
  response_mask = np.zeros(M * Q, bool)

  episodes, final_row = groups.ravel(), final_row.ravel()
  offset, response_offset = offset.ravel(), response_offset.ravel()
  p, n = np.asarray(prompt_lengths)[episodes], lengths[episodes]
  r = n - p
  within = _ranges(n)
  to = np.repeat(final_row * L + offset, n) + within
  start = episodes * T + prompt_columns - p
  source[to] = np.repeat(start, n) + within
  segments[to] = np.repeat(number.ravel(), n)
  within = _ranges(r)
  to = np.repeat(final_row * Q + response_offset, r) + within
  # The first response token is predicted from the prompt's last position.
  where[to] = np.repeat(offset + p - 1, r) + within
  response[to] = np.repeat(episodes * response_columns, r) + within
  response_mask[to] = True

  # The rows of the first epoch alone, in their own order.
  first = slice(0, B)
  epoch_row = (row_in_step * num_minibatches + step).ravel()[first]
  places = np.zeros(B * response_columns, np.int32)
  size, within = r[first], _ranges(r[first])
  places[np.repeat(episodes[first] * response_columns, size) + within] = (
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
    places=places.reshape(B, response_columns),
    ends=ends,
    num_steps=num_steps,
    num_epochs=num_epochs,
  )


def _ranges(sizes: np.ndarray) -> np.ndarray:
  """0 .. size - 1 for each size, one after the other."""
  ends = np.cumsum(sizes)
  return np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)


def fill_fraction(layout: Layout) -> float:
  """The share of row positions that hold real tokens."""
  return float(np.mean(np.asarray(layout.segments) > 0))


# --- On the device ------------------------------------------------------------


def first_epoch(x: Array, layout: Layout) -> Array:
  """The rows of the first inner epoch, which holds every episode once."""
  if layout.num_epochs == 1:
    return x
  by_step = x.reshape(-1, layout.num_steps, *x.shape[1:])
  by_step = by_step[:, : layout.num_steps // layout.num_epochs]
  return by_step.reshape(-1, *x.shape[1:])


def pack_tokens(
  tokens: Int[Array, 'B T'], layout: Layout
) -> tuple[Int[Array, 'M L'], Int[Array, 'M Q']]:
  """The rows, and the response tokens that `layout.where` predicts."""
  flat = tokens.reshape(-1)
  rows = jnp.where(layout.segments > 0, flat[layout.source], 0)
  # A response token stands one column after the position that predicts it.
  columns = jnp.minimum(layout.where + 1, rows.shape[1] - 1)
  return rows, jnp.take_along_axis(rows, columns, axis=1)


def pack_responses(
  values: Float[Array, 'B R'], layout: Layout
) -> Float[Array, 'M Q']:
  """One number a response token, beside its row; 0 where masked."""
  return jnp.where(
    layout.response_mask, values.reshape(-1)[layout.response], 0.0
  )


def unpack_responses(
  values: Float[Array, 'M1 Q'], layout: Layout, mask: Bool[Array, 'B R']
) -> Float[Array, 'B R']:
  """Back from the rows of the first epoch; 0 where masked."""
  return jnp.where(mask, values.reshape(-1)[layout.places], 0.0)


def pack_batch(batch: PPOBatch, layout: Layout) -> PackedPPOBatch:
  """A PPO batch in the rows of all inner epochs, step by step."""
  tokens, targets = pack_tokens(batch.tokens, layout)

  def pack(values):
    return pack_responses(values, layout)

  return PackedPPOBatch(
    tokens=tokens,
    segments=layout.segments,
    where=layout.where,
    targets=targets,
    response_mask=layout.response_mask,
    old_logprobs=pack(batch.old_logprobs),
    old_values=pack(batch.old_values),
    advantages=pack(batch.advantages),
    returns=pack(batch.returns),
  )
