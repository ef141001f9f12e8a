"""Policies and reward models as functions of token ids, for evaluation.

Programs are compiled once for each shape of model and rows. Training uses only
the evaluations in this module.
"""

import contextlib
import datetime
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from instruct_jax import hub, model_fns, model_folder, rewards, rollout
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import heldout_loss, samples
from instruct_jax.evals.benchmarks import probe, runner
from instruct_jax.infra import run as run_lib
from instruct_jax.infra import sharding, slices
from instruct_jax.models import decoding, heads
from instruct_jax.types import (
  Episodes,
  Key,
  Params,
  PromptBatch,
  Rollout,
  TextBatch,
)

Ids = Sequence[int]
# Columns of float32 logits that are computed at a time.
_LOGPROB_CHUNK = 64


def tokenizer_of(
  source: str,
  given_folder: str,
  *,
  chat: bool = False,
  date: datetime.date | None = None,
) -> tokenizer_lib.Tokenizer:
  """The tokenizer to use for a model's prompts and answers.

  It is the given one, unless a published folder has another vocabulary. So all
  models with the same vocabulary get the same template and stop tokens.

  Args:
    source: a model folder, or hf:NAME.
    given_folder: folder of a tokenizer, or ''.
    chat: whether to use a published folder's own chat template if its tokenizer
      is not prepared (`data.tokenizer`).
    date: for a template that prints the current date.

  Raises:
    ValueError: there is no tokenizer.
  """
  given = tokenizer_lib.Tokenizer.load(given_folder) if given_folder else None
  folder = None
  if model_folder.is_published(source):
    folder = epath.Path(hub.locate(source))
  if folder is None or not tokenizer_lib.is_folder(folder):
    if given is None:
      raise ValueError(
        f'{source} has no tokenizer.json; give a tokenizer folder'
      )
    return given
  own = tokenizer_lib.Tokenizer.load(folder)
  if given and own.vocabulary_fingerprint == given.vocabulary_fingerprint:
    return given
  if chat and own.chat_template and not tokenizer_lib.is_prepared(folder):
    return own.with_format(tokenizer_lib.CHAT, [], date)
  return own


def classifier_tokenizer_of(
  source: str, given_folder: str
) -> tuple[tokenizer_lib.Tokenizer, bool]:
  """(tokenizer of a reward model, whether its template also renders answers).

  A published classifier with its own chat template has learned to give its
  score after everything that the template adds to an answer. So that template
  is used, whatever the given tokenizer is.
  """
  if model_folder.is_published(source):
    folder = epath.Path(hub.locate(source))
    if tokenizer_lib.is_folder(folder) and not tokenizer_lib.is_prepared(
      folder
    ):
      own = tokenizer_of(source, '', chat=True)
      if own.template == tokenizer_lib.CHAT:
        return own, True
  return tokenizer_of(source, given_folder, chat=True), False


def answer_ids(
  tokenizer: tokenizer_lib.Tokenizer, answer: samples.Sample
) -> list[int]:
  """A recorded answer's ids: the sampled ones, if they are of this tokenizer.

  Otherwise its text is encoded, with an end token only if the policy ended it.
  The list is never empty, since a score is read at the last id.
  """
  known = answer.metadata
  if known.get('ids') and known.get('tokenizer') == tokenizer.fingerprint:
    return known['ids']
  (ids,) = tokenizer.encode_responses([answer.response], ended=answer.ended)
  return ids or [tokenizer.end_id]


def load_policy(
  source: str,
  tokenizer: tokenizer_lib.Tokenizer,
  mesh: jax.sharding.Mesh,
  compute_dtype: str = '',
) -> model_fns.Model:
  """Loads a policy of ours or in the Hugging Face format, for this tokenizer.

  Attention and remat are reset, since the settings of the training may not suit
  this machine and these rows.
  """
  return model_folder.load(
    source,
    'policy',
    mesh,
    tokenizer,
    remat='none',
    attention='auto',
    compute_dtype=compute_dtype,
    logprob_chunk=_LOGPROB_CHUNK,
  )


@functools.cache
def generate_program(
  module: heads.Policy,
  num_response: int,
  stop_ids: tuple[int, ...],
  temperature: float,
  num_slots: int = 0,
  num_samples: int = 1,
) -> Callable:
  """Jitted `rollout.generate`, shared by models of the same shape."""
  return jax.jit(
    functools.partial(
      rollout.generate,
      decoder=model_fns.decoder(module),
      num_response=num_response,
      stop_ids=stop_ids,
      temperature=temperature,
      num_slots=num_slots,
      num_samples=num_samples,
    )
  )


def sample(
  model: model_fns.Model,
  rows: PromptBatch,
  key: Key,
  mesh: jax.sharding.Mesh,
  *,
  name: str,
  stop_ids: tuple[int, ...],
  response_length: int,
  temperature: float,
  batch_size: int,
  num_samples: int = 1,
) -> Rollout:
  """Samples answers to prompts, returned on the host; all processes must call.

  Args:
    model: of kind 'policy'.
    rows: NumPy, whole in every process.
    key: key of the noise; each prompt's number is folded in.
    mesh: of the model.
    name: for the progress bar.
    stop_ids: tokens that end an answer.
    response_length: most tokens of an answer.
    temperature: 0 is greedy.
    batch_size: rows sampled at a time.
    num_samples: answers to each prompt, in adjacent rows.
  """
  program = sharding.fetched(
    generate_program(
      model.module,
      response_length,
      stop_ids,
      temperature,
      batch_size,
      num_samples,
    )
  )
  total = num_samples * loader.num_rows(rows)
  with run_lib.Progress(f'sample {name}', total, unit='answers') as progress:
    return rollout.in_queues(
      lambda batch: program(model.params, sharding.put_whole(batch, mesh), key),
      rows,
      batch_size,
      num_samples,
      progress.update,
    )


@functools.cache
def _episode_program(module: heads.Policy, temperature: float) -> Callable:
  """Jitted (params, episodes) -> log-probabilities of their responses."""
  logprobs_fn = model_fns.logprobs_fn(module, temperature)
  return jax.jit(
    lambda params, rows: logprobs_fn(
      params, rows.tokens, rows.segments, rows.where
    )[0]
  )


def kl_of_answers(
  config: ConfigDict,
  model: model_fns.Model,
  reference: model_fns.Model,
  prompts: Sequence[records.Prompt],
  answers: Sequence[samples.Sample],
  tokenizer: tokenizer_lib.Tokenizer,
  mesh: jax.sharding.Mesh,
) -> tuple[np.ndarray, np.ndarray]:
  """KL of a policy to a reference with its tokenizer, on its own answers.

  `config` has `temperature` and `batch_size`; answers hold the sampled ids.

  Returns:
    log π / π_ref of each answer, and its k3 estimate, nats [N]; see
    `rewards.kl_estimates`.
  """
  by_id = {prompt.id: prompt for prompt in prompts}
  asked = tokenizer.encode_prompts([by_id[each.prompt_id] for each in answers])
  ids = [each.metadata['ids'] for each in answers]
  temperature = config.temperature or 1.0  # Greedy has no distribution.
  tokens, mask = loader.answer_rows(
    asked, ids, tokenizer.pad_id, _row_length(model, asked, ids)
  )
  starts, lengths = (np.array(list(map(len, x))) for x in (asked, ids))
  places = np.arange(max(lengths))[None]
  rows = Episodes(
    tokens=tokens,
    segments=mask.astype(np.int32),
    where=np.minimum(starts[:, None] - 1 + places, tokens.shape[1] - 1),
    response_mask=places < lengths[:, None],
  )
  total = 2 * len(answers)
  with run_lib.Progress(f'KL of {answers[0].model}', total, unit='rows') as bar:
    ours, theirs = (
      slices.in_batches(
        lambda batch, each=each: sharding.fetch(
          _episode_program(each.module, temperature)(
            each.params, sharding.put_whole(batch, mesh)
          )
        ),
        rows,
        config.batch_size,
        bar.update,
      )
      for each in (model, reference)
    )
  signed, k3 = rewards.kl_estimates(
    *map(jnp.asarray, (ours, theirs, rows.response_mask))
  )
  return np.asarray(signed), np.asarray(k3)


def rounded_up(length: int, multiple: int, limit: int) -> int:
  """Rounds up to a multiple, at most to the limit, to limit compilations."""
  return min(-(-length // multiple) * multiple, limit)


def _row_length(
  model: model_fns.Model, prompts: Sequence[Ids], answers: Sequence[Ids]
) -> int:
  longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
  return rounded_up(longest, 32, model.config.context_length)


_NUM_LENGTHS = 8  # Most distinct row lengths per call of `score_answers`.


@functools.cache
def score_program(module: heads.ScalarModel) -> Callable:
  """Jitted (params, tokens, mask) -> scores, shared by models of one shape."""
  return jax.jit(model_fns.scores_fn(module))


def score_answers(
  model: model_fns.Model,
  prompts: Sequence[Ids],
  answers: Sequence[Ids],
  pad_id: int,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  shown_as: str = '',
) -> np.ndarray:
  """A scalar model's scores of answers, reward units [N].

  Prompts and answers are ids, including an answer's end token. Rows of similar
  length are scored together, padded to one of at most `_NUM_LENGTHS` lengths,
  each of which is compiled. `batch_size` is rows per call. `shown_as` is the
  model's name in the progress bar; '' shows none.
  """
  program = sharding.fetched(score_program(model.module))
  lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
  multiple = 32 * -(-max(lengths) // (32 * _NUM_LENGTHS))
  order, scores = np.argsort(lengths, kind='stable'), np.zeros(len(lengths))
  progress = None
  with contextlib.ExitStack() as stack:
    if shown_as:
      bar = run_lib.Progress(f'score by {shown_as}', len(order), unit='answers')
      progress = stack.enter_context(bar).update
    for start in range(0, len(order), batch_size):
      chosen = order[start : start + batch_size]
      limit = model.config.context_length
      length = rounded_up(lengths[chosen[-1]], multiple, limit)
      scores[chosen] = slices.in_batches(
        lambda batch: program(model.params, *sharding.put_whole(batch, mesh)),
        loader.answer_rows(
          [prompts[i] for i in chosen],
          [answers[i] for i in chosen],
          pad_id,
          length,
        ),
        batch_size,
        progress,
      )
  return scores


def score_choices(
  module: heads.Policy,
  params: Params,
  tokens: jax.Array,
  lengths: jax.Array,
  choices: jax.Array,
  choice_mask: jax.Array,
) -> jax.Array:
  """Summed log-probability of each choice after its context, nats [B, C].

  Each context is read once; its cache is repeated for the C choices.

  Args:
    module: the policy.
    params: its parameters.
    tokens: contexts [B, P], padded on the right.
    lengths: of the contexts [B], at least 1.
    choices, choice_mask: [B, C, R], padded on the right.
  """
  B, C, R = choices.shape
  decoder = model_fns.decoder(module)
  weights = decoder.prepare(params)
  cache = rollout.put_first(
    decoder.make_cache(B * C, tokens.shape[1] + R),
    jax.tree.map(
      lambda x: jnp.repeat(x, C, axis=0), decoder.read(weights, tokens, lengths)
    ),
  )
  flat = choices.reshape(B * C, R)
  # A context's last token is read again, to predict a choice's first token.
  last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)
  read = jnp.concatenate([jnp.repeat(last, C, axis=0), flat[:, :-1]], axis=1)
  x, _ = decoding.extend(
    module,
    weights,
    read,
    jnp.repeat(lengths - 1, C),
    cache,
  )
  logits = decoding.logits_of(module, weights, x)
  logprobs, _ = heads.token_logprobs(logits, flat)
  sums = jnp.sum(logprobs * choice_mask.reshape(B * C, R), axis=1)
  return sums.reshape(B, C)


@functools.cache
def choices_program(module: heads.Policy) -> Callable:
  """Jitted `score_choices`."""
  return jax.jit(functools.partial(score_choices, module))


def padded(
  rows: Sequence[Ids], length: int, pad_id: int, left: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Pads ragged rows to (tokens, mask) [N, length]."""
  tokens = np.full((len(rows), length), pad_id, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for i, ids in enumerate(rows):
    where = slice(length - len(ids), None) if left else slice(0, len(ids))
    tokens[i, where], mask[i, where] = ids, True
  return tokens, mask


def make_functions(
  module: heads.Policy,
  params: Params,
  tokenizer: tokenizer_lib.Tokenizer,
  mesh: jax.sharding.Mesh,
  stop_ids: tuple[int, ...],
  batch_size: int,
  length_multiple: int,
  temperature: float = 0.0,
) -> tuple[Callable, runner.ChoiceFn]:
  """A policy as a `runner.GenerateFn` and a `runner.ChoiceFn`.

  To limit compilations, calls with fewer than `batch_size` prompts are filled
  up, to a multiple of the current mesh's shards, and prompts are padded to a
  multiple of `length_multiple`. The `GenerateFn` also takes a number for each
  prompt, which is folded into the sampling noise; by default, the prompts of a
  call are numbered from 0.
  Temperature 0 is greedy.
  """
  key, batch_size = jax.random.key(0), sharding.whole_rows(batch_size)

  def filled(rows, filler):
    return [*rows, *[filler] * (batch_size - len(rows))]

  def padded_prompts(rows, left):
    rows = filled(rows, rows[0])
    length = rounded_up(
      max(map(len, rows)), length_multiple, module.config.context_length
    )
    return padded(rows, length, tokenizer.pad_id, left)

  def generate_fn(prompts, max_tokens, numbers=None):
    numbers = range(batch_size) if numbers is None else filled(numbers, 0)
    batch = PromptBatch(
      *padded_prompts(prompts, left=True), np.asarray(numbers, np.int32)
    )
    program = generate_program(module, max_tokens, stop_ids, temperature)
    sampled = program(params, sharding.put_whole(batch, mesh), key)
    return rollout.response_ids(sharding.fetch(sampled))[: len(prompts)]

  def choice_fn(contexts, choices):
    tokens, mask = padded_prompts(contexts, left=False)
    lengths = mask.sum(axis=1, dtype=np.int32)
    sets = filled(choices, choices[0])
    num_choices = max(map(len, sets))
    # Sets may differ in size; an absent choice has no tokens and sum 0.
    flat = [
      ids
      for choice_set in sets
      for ids in [*choice_set, *[[]] * (num_choices - len(choice_set))]
    ]
    width = -(-max(map(len, flat)) // 16) * 16
    choice_arrays = [
      array.reshape(len(sets), num_choices, width)
      for array in padded(flat, width, tokenizer.pad_id, left=False)
    ]
    batch = (tokens, lengths, *choice_arrays)
    sums = choices_program(module)(params, *sharding.put_whole(batch, mesh))
    return [
      [float(x) for x in row[: len(choice_set)]]
      for row, choice_set in zip(sharding.fetch(sums), choices, strict=False)
    ]

  return generate_fn, choice_fn


@functools.cache
def _text_program(module: heads.Policy) -> Callable:
  logprobs_fn = model_fns.logprobs_fn(module)
  return jax.jit(
    lambda params, batch: logprobs_fn(params, batch.tokens, batch.segments)[0]
  )


def make_heldout_loss(
  module: heads.Policy,
  rows: TextBatch,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  progress: Callable[[int], None] | None = None,
) -> Callable[[Params], heldout_loss.HeldoutLoss]:
  """Makes a function: parameters of a policy -> its loss on held-out rows.

  `rows` are NumPy arrays, whole in every process; `batch_size` is rows per
  call, rounded up to a multiple of the current mesh's shards. `progress`: see
  `heldout_loss.heldout_loss`.
  """
  program = sharding.fetched(_text_program(module))
  return lambda params: heldout_loss.heldout_loss(
    lambda batch: program(params, sharding.put_whole(batch, mesh)),
    rows,
    sharding.whole_rows(batch_size),
    progress,
  )


def make_prober(
  config: ConfigDict,
  module: heads.Policy,
  tokenizer: tokenizer_lib.Tokenizer,
  mesh: jax.sharding.Mesh,
) -> Callable[..., dict[str, float]]:
  """Makes a function: (parameters, suffix of the names) -> scores of probes.

  `config` has the keys `probe*` of an RL stage.
  """
  probes = probe.make_probes(
    model_folder.named_folders(config.probes),
    tokenizer,
    module.config.context_length,
    config.probe_items,
    config.probe_few_shot,
    config.seed,
  )
  stop_ids = runner.stop_ids(tokenizer)

  def ask(params, ending=''):
    functions = make_functions(
      module, params, tokenizer, mesh, stop_ids, config.probe_batch_size, 64
    )
    scores = probe.ask(probes, tokenizer, *functions, config.probe_batch_size)
    return {f'probe{ending}/{name}': value for name, value in scores.items()}

  return ask
