"""Talk to a policy in the terminal, or to several side by side.

  python -m instruct_jax.chat --checkpoint=RUN/ppo_ptx/policy \
    --tokenizer=RUN/data/tokenizer [--compare=RUN/select/model] \
    [--reward=RUN/reward/model] [--transcript=FILE.jsonl]

Answers appear as they are sampled. Each prompt goes to all models, and a reward
model scores each answer.

A model whose tokenizer uses a chat template reads the whole conversation with
its own answers; /new starts another one. Without a template it reads each
prompt alone, as in training. The transcript is a file of recorded answers,
which every evaluation can read. /quit or the end of the input ends the chat.
"""

import dataclasses
import datetime
import functools
import itertools
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from instruct_jax import (
  command,
  files,
  model_fns,
  model_folder,
  queries,
  rollout,
  sampling,
)
from instruct_jax.data import records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import samples
from instruct_jax.infra import checkpoint, sharding


@functools.cache
def _programs(module, temperature):
  """Returns the decoder's functions, jitted for one row.

  Returns:
    prepare: parameters -> weights.
    read: (weights, tokens, length, columns) -> cache with the prompt in it.
    step: (weights, token, length, cache, key, t) -> (token t of the answer,
      cache).
  """
  decoder = model_fns.decoder(module)

  @functools.partial(jax.jit, static_argnums=3)
  def read(weights, tokens, length, num_columns):
    return rollout.put_first(
      decoder.make_cache(1, num_columns), decoder.read(weights, tokens, length)
    )

  @functools.partial(jax.jit, donate_argnums=3)
  def step(weights, token, length, cache, key, t):
    logits, cache = decoder.step(weights, token, length, cache)
    noise = sampling.uniform_noise(jax.random.fold_in(key, 0)[None], t[None])
    token, _ = sampling.sample_tokens(logits, noise[:, 0], temperature)
    return token, cache

  return jax.jit(decoder.prepare), read, step


def stream(
  model: model_fns.Model,
  ids: Sequence[int],
  tokenizer: tokenizer_lib.Tokenizer,
  max_tokens: int,
  temperature: float,
  key: jax.Array,
) -> Iterator[int]:
  """Yields the sampled ids of an answer one by one, including the stop token.

  They are the ids that `rollout.generate` samples for prompt number 0.

  Raises:
    ValueError: prompt and answer do not fit the model.
  """
  room = check_room(model, ids, max_tokens)
  columns = queries.rounded_up(len(ids), 32, room)
  tokens, _ = queries.padded([ids], columns, tokenizer.pad_id, left=False)
  prepare, read, step = _programs(model.module, temperature)
  weights = prepare(model.params)
  length = jnp.asarray([len(ids)], jnp.int32)
  cache = read(weights, tokens, length, columns + max_tokens)
  # The step that samples the first token reads the prompt's last token again.
  token, length = jnp.asarray(ids[-1:], jnp.int32), length - 1
  for t in range(max_tokens):
    token, cache = step(weights, token, length, cache, key, jnp.int32(t))
    length += 1
    number = int(token[0])
    yield number
    if number in tokenizer.stop_ids:
      return


def check_room(
  model: model_fns.Model, ids: Sequence[int], max_tokens: int
) -> int:
  """Returns the most tokens that a prompt may have.

  Raises:
    ValueError: this prompt has more, or none.
  """
  room = model.config.context_length - max_tokens
  if not 0 < len(ids) <= room:
    raise ValueError(
      f'the prompt has {len(ids)} tokens; with {max_tokens} for the answer the '
      f'model reads 1 to {room}'
    )
  return room


def pieces(
  tokenizer: tokenizer_lib.Tokenizer, ids: Iterator[int], into: list[int]
) -> Iterator[str]:
  """Yields the new text of each id of `stream`; `into` collects the ids.

  A character of several tokens is held back until it is complete.
  """
  shown = ''
  for number in itertools.chain(ids, [None]):
    if number is not None:
      into.append(number)
    text = tokenizer.decode_response(into)
    if number is not None:
      text = text.rstrip('\ufffd')  # An unfinished character at the end.
    if text.startswith(shown) and len(text) > len(shown):
      yield text[len(shown) :]
      shown = text


def side_by_side(columns: Sequence[tuple[str, str]], width: int) -> str:
  """Lays out (title, text) pairs in columns that share `width` characters."""
  each = max(12, (width - 3 * (len(columns) - 1)) // len(columns))
  cells = [
    [title[:each], '-' * min(each, len(title))]
    + [
      line
      for paragraph in text.split('\n')
      for line in textwrap.wrap(paragraph, each) or ['']
    ]
    for title, text in columns
  ]
  return '\n'.join(
    ' | '.join(f'{part:<{each}}' for part in row).rstrip()
    for row in itertools.zip_longest(*cells, fillvalue='')
  )


def plain(text: str) -> str:
  """Replaces control characters, which could control the terminal."""
  return ''.join(
    c if c in '\n\t' or c.isprintable() else '\ufffd' for c in text
  )


_write = functools.partial(print, end='', flush=True)


class Chat:
  """Models that answer the same prompts.

  Args:
    models: name -> (policy, its tokenizer).
    reward: (scalar model, its tokenizer), or None.
    mesh: the mesh of the parameters.
    max_tokens: most tokens of an answer.
    temperature: 0 is greedy.
    seed: seeds the sampling; each turn has its own key.
    width: width of the terminal, in characters.
  """

  def __init__(
    self,
    models: dict,
    reward: tuple | None,
    mesh: jax.sharding.Mesh,
    max_tokens: int,
    temperature: float,
    seed: int,
    width: int = 80,
  ):
    self._models, self._reward, self._mesh = models, reward, mesh
    self._max_tokens, self._temperature = max_tokens, temperature
    self._key = jax.random.key(seed)
    self._width = width
    self.transcript: list[samples.Sample] = []
    self._turns = 0
    self.start_anew()

  def start_anew(self) -> None:
    """Forgets the conversation; the transcript keeps it."""
    self._past = {name: () for name in self._models}

  def turn(self, text: str) -> None:
    """Answers one prompt with every model, and adds it to the conversation.

    Raises:
      ValueError: the prompt does not fit a model; then no model answers.
    """
    prompts, asked = {}, {}
    for name, (model, tokenizer) in self._models.items():
      prompts[name] = self._prompt(text, name, tokenizer)
      (asked[name],) = tokenizer.encode_prompts([prompts[name]])
      try:
        check_room(model, asked[name], self._max_tokens)
      except ValueError as error:
        hint = ' (/new begins another conversation)' * bool(self._past[name])
        raise ValueError(f'{name}: {error}{hint}') from error
    settings = self._max_tokens, self._temperature
    key = jax.random.fold_in(self._key, self._turns)
    self._turns += 1
    columns = []
    for name, (model, tokenizer) in self._models.items():
      ids, prompt = [], prompts[name]
      source = stream(model, asked[name], tokenizer, *settings, key)
      _write(f'{name}> ')
      for piece in pieces(tokenizer, source, ids):
        _write(plain(piece))
      sample = samples.Sample(
        model=name,
        prompt_id=f'turn{self._turns}',
        prompt=prompt.text,
        response=tokenizer.decode_response(ids),
        num_tokens=len(ids),
        ended=ids[-1] in tokenizer.stop_ids,
        metadata={'ids': ids, 'tokenizer': tokenizer.fingerprint},
      )
      sample = self._scored(prompt, sample)
      score = sample.score_reward
      notes = '' if sample.ended else ' (cut)'
      notes += '' if score is None else f' [reward {score:+.3f}]'
      _write(f'{notes}\n')
      columns.append((f'{name}{notes}', plain(sample.response)))
      self.transcript.append(sample)
      if prompt.turns:
        answer = records.Turn('assistant', sample.response)
        self._past[name] = (*prompt.turns, answer)
    if len(columns) > 1:
      _write('\n' + side_by_side(columns, self._width) + '\n')

  def _prompt(self, text, name, tokenizer):
    """One model's prompt, with its past turns if it has a chat template."""
    number = f'turn{self._turns + 1}'
    turns = (*self._past[name], records.Turn('user', text))
    if tokenizer.template != tokenizer_lib.CHAT:
      return records.Prompt(number, text)
    if len(turns) > 1:
      text = records.text_of_turns(turns)
    return records.Prompt(number, text, turns=turns)

  def _scored(self, prompt, sample):
    if self._reward is None:
      return sample
    model, own = self._reward
    scores = queries.score_answers(
      model,
      own.encode_prompts([prompt]),
      [queries.answer_ids(own, sample)],
      own.pad_id,
      1,
      self._mesh,
    )
    return dataclasses.replace(sample, score_reward=float(scores[0]))


def read_models(
  checkpoint_folder: str,
  compare: Sequence[str],
  reward_folder: str,
  tokenizer_folder: str,
  mesh: jax.sharding.Mesh,
) -> tuple[dict, tuple | None]:
  """(name -> (policy, tokenizer), (reward model, tokenizer) or None).

  A model's name is the last two parts of its folder's path.

  Raises:
    ValueError: two models have the same name.
  """
  tokenizer_of = functools.partial(
    queries.tokenizer_of,
    given_folder=tokenizer_folder,
    chat=True,
    date=datetime.date.today(),
  )
  models = {}
  for source in (checkpoint_folder, *compare):
    name = '/'.join(source.rstrip('/').split('/')[-2:])
    if name in models:
      raise ValueError(f'two models are called {name}; rename a folder')
    tokenizer = tokenizer_of(source)
    models[name] = (queries.load_policy(source, tokenizer, mesh), tokenizer)
  if not reward_folder:
    return models, None
  tokenizer = tokenizer_of(reward_folder)
  reward = model_folder.load(reward_folder, 'scalar', mesh, tokenizer)
  return models, (reward, tokenizer)


def _talk(chat: Chat) -> None:
  """Reads prompts until /quit or the end of the input."""
  while True:
    try:
      prompt = input('you> ').strip()
    except EOFError:
      return
    if prompt == '/quit':
      return
    if prompt == '/new':
      chat.start_anew()
    elif prompt:
      try:
        chat.turn(prompt)
      except ValueError as error:
        print(f'error: {error}')


def main(arguments: Sequence[str] | None = None) -> int:
  """Chats until the input ends; returns the exit status."""
  parser = command.Parser(description='Talk to a policy.')
  parser.add_argument('--checkpoint', required=True, help='policy folder')
  parser.add_argument('--compare', action='append', default=[])
  parser.add_argument('--reward', default='', help='reward model folder')
  parser.add_argument(
    '--tokenizer', default='', help='folder, for models trained here'
  )
  parser.add_argument('--temperature', type=float, default=1.0)
  parser.add_argument('--max_tokens', type=int, default=64)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--transcript', default='', help='JSONL to write')
  flags = parser.parse_args(arguments)
  if flags.max_tokens < 1 or not 0 <= flags.temperature < math.inf:
    parser.error('--max_tokens is at least 1, --temperature is 0 or more')
  if flags.transcript and not files.is_remote(flags.transcript):
    # Checked now, since the transcript is written only at the end.
    folder = os.path.dirname(os.path.abspath(flags.transcript))
    if not os.access(folder, os.W_OK):
      parser.error(f'--transcript: {folder} is not a writable folder')
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  with sharding.use_mesh(mesh):
    try:
      models, reward = read_models(
        flags.checkpoint, flags.compare, flags.reward, flags.tokenizer, mesh
      )
    except (ValueError, OSError, checkpoint.CheckpointError) as error:
      print(f'error: {error}', file=sys.stderr)
      return 1
    chat = Chat(
      models,
      reward,
      mesh,
      flags.max_tokens,
      flags.temperature,
      flags.seed,
      width=shutil.get_terminal_size().columns,
    )
    for name, (_, tokenizer) in models.items():
      print(f'{name}: {tokenizer.describe()}', file=sys.stderr)
    try:
      _talk(chat)
    except KeyboardInterrupt:
      print()
    finally:
      if flags.transcript and chat.transcript:
        samples.write_samples(flags.transcript, chat.transcript)
        print(f'transcript: {flags.transcript}')
  return 0


if __name__ == '__main__':
  command.end(main)
