"""Scores of responses: from a reward model, from Python functions, or both.

A `ScoreFn` is called on the host, once per iteration, with what was sampled. It
may be a reward model, any Python function of the texts, or a weighted sum.

A Python function is given by its dotted name, such as
`mypackage.rewards.brevity`:

  def brevity(prompts, responses, metadata):
    return [-len(response.split()) / 100 for response in responses]

`prompts` and `responses` are lists of texts. `metadata` is a list of dicts: the
prompt's own `metadata`, updated with its `id`, `user`, `category` and `turns`,
and with `ended` and `num_tokens` of the response. The function returns one
finite number for each response. Each process calls it for its own responses.
"""

import functools
import importlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from instruct_jax import packing, rollout
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import sharding, slices
from instruct_jax.types import Params, Rollout, ScalarsFn


class Sampled(NamedTuple):
  """What an iteration sampled.

  Attributes:
    rollout, layout: on the mesh.
    indices: index in the data set of the prompt of each of this process's rows.
  """

  rollout: Rollout
  layout: packing.Layout
  indices: np.ndarray


# Returns one score per response [B], on the mesh, in the order of the rollout.
ScoreFn = Callable[[Sampled], jax.Array]
# (prompts, responses, metadata) -> one number per response.
TextScoreFn = Callable[
  [list[str], list[str], list[dict[str, Any]]], Sequence[float]
]


def reward_program(
  scalars_fn: ScalarsFn,
  read_fn: Callable[..., jax.Array],
  num_slices: int,
  ends_fn: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
  | None = None,
) -> Callable[[Params, Rollout, packing.Layout], jax.Array]:
  """Makes (parameters, rollout, layout) -> a reward model's scores [B].

  Args:
    read_fn: (scalars, tokens, segments, ends [B] or None) -> scores [B]; see
      `heads.read_scores`.
    num_slices: parts in which rows are read.
    ends_fn: (tokens, mask) -> both, with the ids added that the model expects
      at the end of an answer; see `heads.with_ends`. If given, each episode has
      its own row.
  """

  def score(params: Params, sampled: Rollout, layout: packing.Layout):
    if ends_fn is not None:
      rows, ends = ends_fn(sampled.tokens, sampled.mask), None
    else:
      packed = packing.pack_episodes(sampled, layout)
      packed = packing.first_epoch(packed, layout)
      rows, ends = (packed.tokens, packed.segments), layout.ends
    scalars = slices.in_slices(
      lambda rows: scalars_fn(params, *rows),
      rows,
      math.gcd(num_slices, len(rows[0])),
    )
    return read_fn(scalars, *rows, ends)

  return score


def find(name: str, key: str = 'reward_fn') -> Any:
  """Imports the function, class or value of a dotted name.

  Args:
    name: such as 'mypackage.rewards.brevity', optionally followed by '@' and a
      path, which the function gets as its argument `file`.
    key: config key, for the message.

  Raises:
    ValueError: with key, name and why it cannot be imported.
  """
  dotted, _, file = name.partition('@')
  module_name, _, own_name = dotted.rpartition('.')
  if not module_name:
    raise ValueError(
      f'{key} {name!r} is not a dotted name such as package.module.f'
    )
  try:
    found = getattr(importlib.import_module(module_name), own_name)
  except (ImportError, AttributeError) as error:
    raise ValueError(f'{key} {name!r}: {error}') from error
  return functools.partial(found, file=file) if file else found


def find_function(name: str) -> TextScoreFn:
  """The Python function of a dotted name; raises the errors of `find`."""
  function = find(name)
  if not callable(function):
    raise ValueError(
      f'reward_fn {name!r} is of type {type(function).__name__}; name a '
      'function of (prompts, responses, metadata)'
    )
  return function


def source_of(name: str, key: str = 'reward_fn') -> dict[str, str]:
  """Label -> the Python file that defines a name, and the file after its '@'.

  The files are inputs of their stage: they are compared when the stage resumes.
  A builtin function has no Python file.

  Args:
    name: dotted, with or without `=WEIGHT`. The weight is part of the label, so
      that a changed weight is told from a moved function.

  Raises:
    ValueError: see `find`.
  """
  dotted, _, read = name.partition('=')[0].partition('@')
  found, module = find(dotted, key), dotted.rpartition('.')[0]
  files = {f'{key}.{name}/file': read} if read else {}
  if inspect.isroutine(found) or inspect.isclass(found):
    module = found.__module__
  file = getattr(sys.modules.get(module), '__file__', None) or ''
  return files | ({f'{key}.{name}': file} if file.endswith('.py') else {})


def parse_weights(text: str) -> dict[str, float]:
  """Parses 'NAME' or 'NAME=WEIGHT', separated by commas: name -> weight.

  Raises:
    ValueError: a part of another form, a weight that is not a finite number, or
      a repeated name.
  """
  weights = {}
  for part in filter(None, text.split(',')):
    name, _, weight = part.partition('=')
    try:
      value = float(weight) if weight else 1.0
    except ValueError:
      value = math.nan
    if not name or not math.isfinite(value) or name in weights:
      raise ValueError(
        'reward_fn must be NAME or NAME=WEIGHT, separated by commas, with '
        f'distinct names: {text!r}'
      )
    weights[name] = value
  return weights


def of_function(
  name: str,
  function: TextScoreFn,
  prompts: Sequence[records.Prompt],
  tokenizer: tokenizer_lib.Tokenizer,
  mesh: jax.sharding.Mesh,
) -> ScoreFn:
  """Turns a Python function into a `ScoreFn`.

  Args:
    name: for error messages.
    function: see the top of this file.
    prompts: the data set that `Sampled.indices` refers to.

  Raises:
    RuntimeError: when the `ScoreFn` is called; see `score_texts`.
  """

  def score(sampled: Sampled) -> jax.Array:
    whole = sharding.fetch(sampled.rollout)
    own = loader.own(
      np.arange(len(whole.tokens)), jax.process_index(), jax.process_count()
    )
    rows = jax.tree.map(lambda x: np.asarray(x)[own], whole)
    ids = rollout.response_ids(rows)
    scores = score_texts(
      f'reward_fn {name}',
      function,
      [prompts[index] for index in sampled.indices],
      tokenizer.decode_responses(ids),
      rows.ended,
      [len(answer) for answer in ids],
    )
    return sharding.put_batch(scores, mesh)

  return score


def score_texts(
  name: str,
  function: TextScoreFn,
  prompts: Sequence[records.Prompt],
  texts: Sequence[str],
  ended: Sequence[bool] | np.ndarray,
  num_tokens: Sequence[int],
) -> np.ndarray:
  """The scores of a Python function, one per response, float32.

  Args:
    name: key and function, for error messages.
    function: see the top of this file.
    prompts: the prompt of each response.
    texts: the responses.
    ended: whether the policy itself ended each response.
    num_tokens: tokens of each response.

  Raises:
    RuntimeError: the function raises, or does not return one finite number per
      response.
  """
  metadata = [
    {
      **prompt.metadata,
      'id': prompt.id,
      'user': prompt.user,
      'category': prompt.category,
      'turns': prompt.turns,
      'ended': bool(end),
      'num_tokens': number,
    }
    for prompt, end, number in zip(prompts, ended, num_tokens, strict=True)
  ]
  try:
    found = function([prompt.text for prompt in prompts], texts, metadata)
  except Exception as error:
    place = traceback.extract_tb(error.__traceback__)[-1]
    raise RuntimeError(
      f'{name}: {type(error).__name__}: {error} ({place.filename}:'
      f'{place.lineno})'
    ) from error
  return _checked(name, found, prompts)


def _checked(name, found, asked) -> np.ndarray:
  try:
    scores = np.asarray(found, np.float32)
  except (TypeError, ValueError) as error:
    raise RuntimeError(
      f'{name} must return one number per response: {error}'
    ) from error
  if scores.shape != (len(asked),):
    what = type(found).__name__ if found is None else f'shape {scores.shape}'
    raise RuntimeError(
      f'{name} returned {what}, not one number for each of {len(asked)} '
      'responses'
    )
  bad = np.flatnonzero(~np.isfinite(scores))
  if bad.size:
    raise RuntimeError(
      f'{name} returned {scores[bad[0]]} for the response to prompt '
      f'{asked[bad[0]].id!r} ({bad.size} of {len(asked)} are not finite)'
    )
  return scores


def weighted(parts: Mapping[str, tuple[ScoreFn, float]]) -> ScoreFn:
  """The weighted sum of scores, given name -> (score function, weight)."""
  if len(parts) == 1:
    ((score_fn, weight),) = parts.values()
    if weight == 1.0:
      return score_fn

  def score(sampled: Sampled) -> jax.Array:
    return sum(
      weight * score_fn(sampled) for score_fn, weight in parts.values()
    )

  return score
