"""Proposes the lengths of prompts, responses and rows, measured in tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib

_MULTIPLE = 8  # Prompt and response lengths are multiples of this.
_MIN_COLUMNS = 8
_NUM_MEASURED = 20_000  # The most records whose tokens are counted.


def propose_lengths(
  config: ConfigDict,
  tokenizer: tokenizer_lib.Tokenizer,
  rows: Sequence[records.Record],
  context_length: int,
) -> dict[str, Any]:
  """Lengths of prompts, responses and rows, and the shares that they drop.

  Each length is enough for `kept_fraction` of the records, up to the configured
  maximum and the room in the model's context.

  Args:
    config: of the stage; lengths set there are used.
    tokenizer: counts the tokens.
    rows: rankings, demonstrations and prompts, to be measured.
    context_length: of the model, in tokens.

  Raises:
    ValueError: no prompt can be read, or nothing fits.
  """
  rng = np.random.default_rng([config.seed, 1])

  def drawn(rows):
    return [rows[i] for i in rng.permutation(len(rows))[:_NUM_MEASURED]]

  answered = drawn([row for row in rows if records.answers_of(row)])
  rows = answered + drawn([row for row in rows if not records.answers_of(row)])
  encoded, refusals = loader.encode_prompts(rows, tokenizer)
  answers, refused = loader.encode_answers(answered, tokenizer)
  if all(ids is None for ids in encoded):
    raise ValueError(
      f'preferences: the chat template refuses every prompt: {refusals[0]}; '
      'leave out what it refuses, such as system turns, or give another one '
      "(--config.template='User: {prompt} Assistant:')"
    )
  prompts = np.array([len(ids) for ids in encoded if ids is not None])
  both = np.array(
    [
      (len(ids), max(map(len, found)))
      for found, ids in zip(answers, encoded, strict=False)
      if ids is not None and found is not None
    ]
  ).reshape(-1, 2)
  if not len(both):
    raise ValueError(
      'preferences: the chat template refuses every prompt that has an answer: '
      f'{refusals[0]}'
    )
  answers, whole = both[:, 1], both.sum(axis=1)

  def propose(key, lengths, room):
    if config[key] is not None:
      return config[key]
    wanted = np.quantile(lengths, config.kept_fraction)
    wanted = int(-(-wanted // _MULTIPLE) * _MULTIPLE)
    return min(wanted, config[f'max_{key}'], room - room % _MULTIPLE)

  response = propose('response_length', answers, context_length // 2)
  prompt = propose('prompt_length', prompts, context_length - response)
  if min(prompt, response) < _MIN_COLUMNS or prompt + response > context_length:
    raise ValueError(
      f'prompt_length {prompt} + response_length {response} do not fit the '
      f"model's context of {context_length} tokens"
    )
  fits = whole <= prompt + response
  if not fits.any():
    raise ValueError(
      f'none of {len(whole)} answers fits prompt_length {prompt} + '
      f'response_length {response} tokens: the shortest has '
      f'{whole.min()}; raise max_prompt_length or '
      'max_response_length, or take a model with a longer context'
    )
  return {
    'prompt_length': int(prompt),
    'response_length': int(response),
    'row_length': int(prompt + response),
    'ptx_row_length': int(prompt + response),
    'dropped': {
      'prompts': float(np.mean(prompts > prompt)),
      'rankings and demonstrations': float(1 - np.mean(fits)),
      'answers longer than response_length': float(np.mean(answers > response)),
    },
  }


def describe_lengths(name: str, lengths: Mapping[str, Any]) -> str:
  """One line for users about `propose_lengths`."""
  shares = ', '.join(f'{v:.1%} of {k}' for k, v in lengths['dropped'].items())
  return (
    f'{name}: prompt_length {lengths["prompt_length"]}, response_length '
    f'{lengths["response_length"]}, row_length {lengths["row_length"]} tokens; '
    f'beyond them: {shares}'
  )
