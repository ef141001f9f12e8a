"""Runs EleutherAI's lm-evaluation-harness on our models (an optional extra).

  pip install -e '.[lm-eval]'
  python -m instruct_jax.lm_eval_adapter --checkpoint=DIR --tokenizer=DIR \
    --tasks=lambada_openai,hellaswag --num_fewshot=0 --output=results.json

All tasks of the harness run. Conventions are those of its own `hf` backend (an
empty context becomes BOS, or EOS; windows have the model's length; answers are
cut at the first stop text), so that numbers can be compared.

If the tokenizer has a template (`data.tokenizer`), each context is one prompt
of a user, as in training, and a continuation is the beginning of the answer;
`--plain` uses the bare texts. `--apply_chat_template` leaves the rendering to
the harness, which can then give few-shot examples as separate turns.
`--include_path=DIR` adds tasks of your own, `--gen_kwargs=KEY=VALUE,...`
changes how answers are sampled, and `--log_samples` writes requests and answers
beside the results, in the harness's own format.
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
  from lm_eval.loggers import EvaluationTracker
  from lm_eval.models.utils import normalize_gen_kwargs
  from lm_eval.tasks import TaskManager
  from lm_eval.utils import (
    get_rolling_token_windows,
    handle_non_serializable,
    make_disjoint_window,
  )
except ModuleNotFoundError as error:
  if __name__ != '__main__':
    raise
  sys.exit(f"error: {error}; pip install -e '.[lm-eval]'")

from instruct_jax import command, files, model_fns, queries
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import run as run_lib
from instruct_jax.infra import sharding

# Default for the most tokens of an answer, as in the harness.
_MAX_ANSWER = 256
# Sampling options that are not supported -> values that have no effect.
_NEUTRAL = {
  **dict.fromkeys(('num_beams', 'repetition_penalty'), (None, 1)),
  **dict.fromkeys(('top_p', 'typical_p'), (None, 1)),
  **{'top_k': (None, 0, -1), 'min_p': (None, 0)},
}
# Those of them that have no effect at temperature 0, whatever their value.
_OF_SAMPLING = ('top_p', 'typical_p', 'top_k', 'min_p')
# All options that `--gen_kwargs` accepts.
_OPTIONS = (
  *('until', 'temperature', 'do_sample', 'max_gen_toks', 'max_new_tokens'),
  *('max_tokens', 'max_completion_tokens', *_NEUTRAL),
)
# Rows are padded to a multiple of this many tokens, to limit compilations.
_MULTIPLE = 64


@functools.cache
def _next_tokens_program(module):
  """Jitted (params, tokens, mask, targets) -> (logprobs, is_greedy) [B, T]."""

  def next_tokens(params, tokens, mask, targets):
    logits = module.apply({'params': params}, tokens, mask.astype(jnp.int32))
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return chosen, jnp.argmax(logprobs, axis=-1) == targets

  return jax.jit(next_tokens)


class InstructJaxLM(TemplateLM):
  """A policy with the harness's interface.

  `plain` uses bare texts, without the tokenizer's template.
  """

  def __init__(
    self,
    model: model_fns.Model,
    tokenizer: tokenizer_lib.Tokenizer,
    mesh: jax.sharding.Mesh,
    batch_size: int = 16,
    plain: bool = False,
  ):
    super().__init__()
    self._model, self._ids, self._mesh = model, tokenizer, mesh
    self._asks_prompts = bool(tokenizer.template) and not plain
    self._gets_rendered = False
    self._batch_size = batch_size
    self.max_length = model.config.context_length

  @property
  def eot_token_id(self) -> int:
    """The token that ends a text."""
    return self._ids.eos_id

  @property
  def prefix_token_id(self) -> int:
    """The token that stands for an empty context."""
    bos_id = self._ids.bos_id
    return self._ids.eos_id if bos_id is None else bos_id

  @property
  def tokenizer_name(self) -> str:
    """The tokenizer's name in the harness's cache."""
    return self._ids.fingerprint

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """The template's text, which the harness records in its results."""
    return self._ids.chat_template if chat_template else None

  def apply_chat_template(
    self,
    chat_history: list[dict[str, str]],
    add_generation_prompt: bool = True,
  ) -> str:
    """Renders turns; later texts are then taken to contain special tokens."""
    self._gets_rendered = True
    return self._ids.render_chat(
      chat_history, add_generation_prompt=add_generation_prompt
    )

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """Ids of a text, with BOS first unless `add_special_tokens` is False."""
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

  def _batches(self, rows, indices):
    """Yields indices of rows (ids, ...) by descending length, to pad little."""
    order = sorted(indices, key=lambda i: -len(rows[i][0]))
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
      # The last token is predicted, not read. Long contexts lose their start.
      whole = [*context, *continuation][-(self.max_length + 1) :]
      rows.append((whole, len(continuation)))
    results = [None] * len(rows)
    with run_lib.Progress('log-likelihoods', len(rows)) as progress:
      for indices in self._batches(rows, range(len(rows))):
        filled = [rows[i][0] for i in indices]
        filled += [filled[0]] * (self._batch_size - len(filled))
        longest = max(map(len, filled)) - 1
        length = queries.rounded_up(longest, _MULTIPLE, self.max_length)
        tokens, mask = queries.padded(
          filled, length + 1, self._ids.pad_id, left=False
        )
        batch = tokens[:, :-1], mask[:, 1:], tokens[:, 1:]
        with sharding.use_mesh(self._mesh):
          logprobs, greedy = jax.device_get(
            _next_tokens_program(self._model.module)(
              self._model.params,
              *sharding.put_batch(batch, self._mesh),
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

    As in the `hf` backend, the tokenizer's BOS counts as the first token of a
    text, and is predicted from another BOS.
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
    """Samples answers, and cuts each before its first stop text."""
    rows, kinds = [], {}
    for number, request in enumerate(requests):
      context, asked = request.args
      options = normalize_gen_kwargs(asked, _MAX_ANSWER)
      max_tokens = options['max_gen_toks']
      room = self.max_length - max_tokens
      if room < 1:
        raise ValueError(
          f'a task wants answers of {max_tokens} tokens, the model reads '
          f'{self.max_length}; set max_gen_toks lower'
        )
      if self._asks_prompts and not self._gets_rendered:
        (ids,) = self._ids.encode_prompts([context])
      else:
        ids = self.tok_encode(context)
      temperature = float(options.get('temperature', 0.0))
      _check_options(options)
      rows.append((ids[-room:] or [self.prefix_token_id], options['until']))
      kinds.setdefault((max_tokens, temperature), []).append(number)
    texts = [''] * len(rows)
    with run_lib.Progress('answers', len(rows)) as progress:
      for (max_tokens, temperature), chosen in kinds.items():
        generate_fn = self._generate_fn(temperature)
        for numbers in self._batches(rows, chosen):
          prompts = [rows[i][0] for i in numbers]
          with sharding.use_mesh(self._mesh):
            answers = generate_fn(prompts, max_tokens, numbers)
          for i, ids in zip(numbers, answers, strict=True):
            texts[i] = self._ids.decode(ids)
            for stop in filter(None, rows[i][1]):
              texts[i] = texts[i].split(stop)[0]
          progress.update(len(numbers))
    return texts

  def _generate_fn(self, temperature):
    return queries.make_functions(
      self._model.module,
      self._model.params,
      self._ids,
      self._mesh,
      self._ids.stop_ids,
      self._batch_size,
      _MULTIPLE,
      temperature,
    )[0]


def _check_options(options) -> None:
  """Raises ValueError for a sampling option that is not supported."""
  is_greedy = float(options.get('temperature', 0.0)) == 0
  for key, values in _NEUTRAL.items():
    is_idle = key in _OF_SAMPLING and is_greedy
    if not is_idle and options.get(key) not in values:
      raise ValueError(
        f'a task or gen_kwargs asks for {key}={options[key]}; answers are '
        f'sampled with a temperature alone: set {key}={values[-1]}'
      )


def load(
  checkpoint: str,
  tokenizer_folder: str,
  batch_size: int,
  mesh_shape: Sequence[int] = (1, -1, 1),
  plain: bool = False,
) -> InstructJaxLM:
  """Loads a model folder, ours or in the Hugging Face format."""
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
  parser.add_argument('--tasks', required=True, help='separated by commas')
  parser.add_argument('--num_fewshot', type=int, default=None)
  parser.add_argument('--limit', type=float, default=None)
  parser.add_argument('--batch_size', type=int, default=16)
  parser.add_argument('--output', default='', metavar='FILE.json')
  parser.add_argument('--include_path', default=None, metavar='DIR')
  parser.add_argument('--gen_kwargs', default=None, metavar='KEY=VALUE,...')
  parser.add_argument('--system_instruction', default=None)
  for name in (
    *('plain', 'apply_chat_template', 'fewshot_as_multiturn'),
    'log_samples',
  ):
    parser.add_argument(f'--{name}', action='store_true')
  flags = parser.parse_args(arguments)
  if flags.batch_size < 1:
    parser.error(f'--batch_size must be at least 1: {flags.batch_size}')
  if flags.log_samples and not flags.output.endswith('.json'):
    parser.error('--log_samples needs --output=FILE.json, to write beside it')
  if flags.include_path and not epath.Path(flags.include_path).is_dir():
    parser.error(f'--include_path: no folder {flags.include_path}')
  for each in filter(None, (flags.gen_kwargs or '').split(',')):
    key, equals, _ = each.partition('=')
    if not equals or key.strip() not in _OPTIONS:
      parser.error(
        f'--gen_kwargs: {each!r} is not KEY=VALUE with a KEY among '
        f'{", ".join(_OPTIONS)}'
      )
  manager = TaskManager(include_path=flags.include_path)
  tasks = flags.tasks.split(',')
  unknown = [name for name in tasks if not manager.match_tasks([name])]
  if unknown:
    parser.error(
      f'--tasks: the harness has no {", ".join(map(repr, unknown))}; give '
      '--include_path=DIR for tasks of your own'
    )
  model = load(
    flags.checkpoint, flags.tokenizer, flags.batch_size, plain=flags.plain
  )
  found = evaluator.simple_evaluate(
    model=model,
    tasks=tasks,
    num_fewshot=flags.num_fewshot,
    limit=flags.limit,
    apply_chat_template=flags.apply_chat_template,
    fewshot_as_multiturn=flags.fewshot_as_multiturn,
    system_instruction=flags.system_instruction,
    gen_kwargs=flags.gen_kwargs,
    log_samples=flags.log_samples,
    task_manager=manager,
  )
  text = json.dumps(found['results'], indent=2, default=handle_non_serializable)
  if flags.output:
    files.write_bytes(flags.output, (text + '\n').encode())
  if flags.log_samples:
    # results_TIME.json and samples_TASK_TIME.jsonl, as the harness's command.
    tracker = EvaluationTracker(output_path=flags.output)
    samples = found.pop('samples')
    tracker.save_results_aggregated(results=found, samples=samples)
    for task, rows in samples.items():
      tracker.save_results_samples(task_name=task, samples=rows)
  print(text)


if __name__ == '__main__':
  command.end(main)
