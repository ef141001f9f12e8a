"""EleutherAI's lm-evaluation-harness on our checkpoints (an optional extra).

  pip install -e '.[lm-eval]'
  python -m instruct_jax.lm_eval_adapter --checkpoint=DIR --tokenizer=DIR \
    --tasks=lambada_openai,hellaswag --num_fewshot=0 --output=results.json

Any task of the harness runs: it asks for log-likelihoods of continuations, of
whole texts, and for answers up to a stop text. Conventions are those of its own
`hf` backend (BOS, or EOS, where there is no context; windows of the model's
length; answers cut at the first stop text), so that numbers can be compared.

A tokenizer with a template (`data.tokenizer`) asks each context as one prompt
of a user, as in training, and reads a continuation as the answer's beginning;
`--plain` asks the bare texts. `--apply_chat_template` leaves the rendering to
the harness, which then gives few-shot examples as turns of their own.
"""

import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

try:
  from lm_eval import evaluator
  from lm_eval.api.instance import Instance
  from lm_eval.api.model import TemplateLM
  from lm_eval.models.utils import normalize_gen_kwargs
  from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
  if __name__ != '__main__':
    raise
  sys.exit(f"error: {error}; pip install -e '.[lm-eval]'")

from instruct_jax import command, model_fns, queries, rollout
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import run as run_lib
from instruct_jax.infra import sharding
from instruct_jax.types import PromptBatch

# Tokens of an answer where a task does not say; the harness's own default.
_MAX_ANSWER = 256


@functools.cache
def _next_tokens_program(module):
  """(params, tokens, mask, targets) -> logprobs, is it the likeliest [B, T]."""

  def next_tokens(params, tokens, mask, targets):
    logits = module.apply({'params': params}, tokens, mask.astype(jnp.int32))
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return chosen, jnp.argmax(logprobs, axis=-1) == targets

  return jax.jit(next_tokens)


class InstructJaxLM(TemplateLM):
  """A policy as the harness sees it.

  Args:
    model: of kind 'policy'.
    tokenizer: its own.
    mesh: where its parameters are.
    batch_size: rows a call.
    length_multiple: rows are padded to a multiple of this (compiles).
    seed: of answers that a task wants sampled.
    plain: ask bare texts, whatever the tokenizer's template.
  """

  def __init__(
    self,
    model: model_fns.Model,
    tokenizer: tokenizer_lib.Tokenizer,
    mesh: jax.sharding.Mesh,
    batch_size: int = 16,
    length_multiple: int = 64,
    seed: int = 0,
    plain: bool = False,
  ):
    super().__init__()
    self._model, self._ids, self._mesh = model, tokenizer, mesh
    self._asks_prompts = bool(tokenizer.template) and not plain
    self._gets_rendered = False
    self._batch_size, self._multiple = batch_size, length_multiple
    self._seed = seed
    self.max_length = model.config.context_length

  @property
  def eot_token_id(self) -> int:
    """The token that ends a text."""
    return self._ids.eos_id

  @property
  def prefix_token_id(self) -> int:
    """What stands where there is no context."""
    bos_id = self._ids.bos_id
    return self._ids.eos_id if bos_id is None else bos_id

  @property
  def tokenizer_name(self) -> str:
    """Of the tokenizer, for the harness's cache."""
    return self._ids.fingerprint

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """The template's text, which the harness keeps with its results."""
    return self._ids.chat_template if chat_template else None

  def apply_chat_template(
    self,
    chat_history: list[dict[str, str]],
    add_generation_prompt: bool = True,
  ) -> str:
    """The harness renders: texts that follow spell special tokens."""
    self._gets_rendered = True
    return self._ids.render_chat(
      chat_history, add_generation_prompt=add_generation_prompt
    )

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """Ids of a text, with what the tokenizer puts before each (BOS) unless
    `add_special_tokens` is False."""
    del kwargs
    if self._gets_rendered:
      return self._ids.encode_rendered(string)
    if add_special_tokens is False:
      return self._ids.encode(string)
    return self._ids.encode_documents([string])[0]

  def _encode_pair(
    self, context: str, continuation: str
  ) -> tuple[list[int], list[int]]:
    if not self._asks_prompts or self._gets_rendered:
      return super()._encode_pair(context, continuation)
    (prompt,) = self._ids.encode_prompts([context])
    (answer,) = self._ids.encode_responses([continuation])
    return prompt, answer

  def _bucket(self, length):
    multiple = self._multiple
    return min(-(-length // multiple) * multiple, self.max_length)

  def _batches(self, rows, length_of):
    """Indices by falling length, so that rows of a call are alike."""
    order = sorted(range(len(rows)), key=lambda i: -length_of(rows[i]))
    for start in range(0, len(order), self._batch_size):
      yield order[start : start + self._batch_size]

  def _loglikelihood_tokens(
    self,
    requests: Sequence[tuple[Any, list[int], list[int]]],
    disable_tqdm: bool = False,
    **kwargs: Any,
  ) -> list[tuple[float, bool]]:
    """Summed log-probability of each continuation, and whether it is greedy."""
    rows = []
    for _, context, continuation in requests:
      if not continuation or len(continuation) > self.max_length:
        raise ValueError(
          f'a continuation of {len(continuation)} tokens; the model reads 1 to '
          f'{self.max_length}'
        )
      # The last token is predicted, not read; what is too long loses its front.
      whole = [*context, *continuation][-(self.max_length + 1) :]
      rows.append((whole, len(continuation)))
    results = [None] * len(rows)
    with run_lib.Progress('log-likelihoods', len(rows)) as progress:
      for indices in self._batches(rows, lambda row: len(row[0])):
        filled = [rows[i] for i in indices]
        filled += [filled[0]] * (self._batch_size - len(filled))
        length = self._bucket(max(len(ids) - 1 for ids, _ in filled))
        tokens, mask = queries.padded(
          [ids[:-1] for ids, _ in filled], length, self._ids.pad_id, left=False
        )
        targets, _ = queries.padded(
          [ids[1:] for ids, _ in filled], length, self._ids.pad_id, left=False
        )
        with sharding.use_mesh(self._mesh):
          logprobs, greedy = jax.device_get(
            _next_tokens_program(self._model.module)(
              self._model.params,
              *sharding.put_batch((tokens, mask, targets), self._mesh),
            )
          )
        for row, index in enumerate(indices):
          ids, count = rows[index]
          where = slice(len(ids) - 1 - count, len(ids) - 1)
          results[index] = (
            float(np.sum(logprobs[row, where], dtype=np.float64)),
            bool(greedy[row, where].all()),
          )
        progress.update(len(indices))
    return results

  def loglikelihood_rolling(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Log-probability of whole texts, each token predicted once.

    As in the `hf` backend, a BOS that the tokenizer puts before a text counts
    as its first token, predicted from another one.
    """
    windows, owners = [], []
    for owner, request in enumerate(requests):
      for window in get_rolling_token_windows(
        token_list=self.tok_encode(request.args[0]),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.max_length,
        context_len=1,
      ):
        windows.append((None, *make_disjoint_window(window)))
        owners.append(owner)
    sums = [0.0] * len(requests)
    for owner, (value, _) in zip(
      owners, self._loglikelihood_tokens(windows), strict=True
    ):
      sums[owner] += value
    return sums

  def generate_until(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[str]:
    """Answers up to the first stop text, which is cut off."""
    rows = []
    for request in requests:
      context, asked = request.args
      options = normalize_gen_kwargs(asked, _MAX_ANSWER)
      until = options.get('until', [])
      most = options['max_gen_toks']
      room = self.max_length - most
      if room < 1:
        raise ValueError(
          f'a task wants answers of {most} tokens, the model reads '
          f'{self.max_length}; set max_gen_toks lower'
        )
      if self._asks_prompts and not self._gets_rendered:
        (ids,) = self._ids.encode_prompts([context])
      else:
        ids = self.tok_encode(context)
      ids = ids[-room:] or [self.prefix_token_id]
      temperature = float(options.get('temperature', 0.0))  # Not set: greedy.
      rows.append((ids, most, temperature, tuple(until)))
    texts = [''] * len(rows)
    kinds = dict.fromkeys((most, heat) for _, most, heat, _ in rows)
    with run_lib.Progress('answers', len(rows)) as progress:
      for most, heat in kinds:
        chosen = [i for i, row in enumerate(rows) if row[1:3] == (most, heat)]
        prompts = [rows[i][0] for i in chosen]
        for indices in self._batches(prompts, len):
          answers = self._answer(
            [prompts[i] for i in indices],
            most,
            heat,
            [chosen[i] for i in indices],
          )
          for i, ids in zip(indices, answers, strict=True):
            text = self._ids.decode(ids)
            for stop in rows[chosen[i]][3]:
              text = text.split(stop)[0] if stop else text
            texts[chosen[i]] = text
          progress.update(len(indices))
    return texts

  def _answer(self, prompts, most, temperature, numbers):
    filled = [*prompts, *[prompts[0]] * (self._batch_size - len(prompts))]
    numbers = [*numbers, *[0] * (self._batch_size - len(prompts))]
    length = min(self._bucket(max(map(len, filled))), self.max_length - most)
    tokens, mask = queries.padded(filled, length, self._ids.pad_id, left=True)
    program = queries.generate_program(
      self._model.module, most, self._ids.stop_ids, temperature
    )
    batch = PromptBatch(tokens, mask, np.asarray(numbers, np.int32))
    with sharding.use_mesh(self._mesh):
      sampled = program(
        self._model.params,
        sharding.put_batch(batch, self._mesh),
        jax.random.key(self._seed),
      )
    return rollout.response_ids(jax.device_get(sampled))[: len(prompts)]


def load(
  checkpoint: str,
  tokenizer_folder: str,
  batch_size: int,
  mesh_shape: Sequence[int] = (1, -1, 1),
  plain: bool = False,
) -> InstructJaxLM:
  """A model folder of ours, or in the Hugging Face format, for the harness."""
  tokenizer = queries.tokenizer_of(checkpoint, tokenizer_folder)
  mesh = sharding.make_mesh(tuple(mesh_shape))
  with sharding.use_mesh(mesh):
    model = queries.load_policy(checkpoint, tokenizer, mesh)
  return InstructJaxLM(model, tokenizer, mesh, batch_size, plain=plain)


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the tasks named on the command line and prints a table."""
  parser = command.Parser(
    description='lm-evaluation-harness tasks on a model folder.'
  )
  parser.add_argument('--checkpoint', required=True)
  parser.add_argument('--tokenizer', default='')
  parser.add_argument('--tasks', required=True, help='comma between')
  parser.add_argument('--num_fewshot', type=int, default=None)
  parser.add_argument('--limit', type=float, default=None)
  parser.add_argument('--batch_size', type=int, default=16)
  parser.add_argument('--output', default='')
  parser.add_argument('--plain', action='store_true')
  parser.add_argument('--apply_chat_template', action='store_true')
  parser.add_argument('--fewshot_as_multiturn', action='store_true')
  flags = parser.parse_args(arguments)
  model = load(
    flags.checkpoint, flags.tokenizer, flags.batch_size, plain=flags.plain
  )
  found = evaluator.simple_evaluate(
    model=model,
    tasks=flags.tasks.split(','),
    num_fewshot=flags.num_fewshot,
    limit=flags.limit,
    apply_chat_template=flags.apply_chat_template,
    fewshot_as_multiturn=flags.fewshot_as_multiturn,
  )
  text = json.dumps(found['results'], indent=2, default=str)
  if flags.output:
    epath.Path(flags.output).write_text(text + '\n')
  print(text)


if __name__ == '__main__':
  command.end(main)
