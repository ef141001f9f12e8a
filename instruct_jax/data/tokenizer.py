"""Text to ids and back: a thin, strict wrapper over a Hugging Face tokenizer.

Prompt and response are tokenised apart and their ids concatenated, so that the
ids of a prompt never depend on what follows it. No text can spell a special
token: `<eos>` typed by a user is text, and the EOS and PAD ids come from the
code that lays out the rows, never from `encode`.

How a prompt is put into words for the model belongs to the tokenizer and is
saved with it, so that no stage can differ from another:

  ''            the prompt's text as it is (the paper's raw prompts)
  'chat'        the tokenizer's own chat template, over the prompt's turns
  other text    a format string with one slot, {prompt}

  python -m instruct_jax.data.tokenizer hf:NAME --output=DIR \\
    --template=chat --stop='<|im_end|>'

prepares a published tokenizer: a PAD of its own, the template, stop tokens.
"""

import functools
import hashlib
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Collection, Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np
import tokenizers
from etils import epath

from instruct_jax import command, hub
from instruct_jax.data import records

PAD, EOS, UNK = '<pad>', '<eos>', '<unk>'
CHAT, SLOT = 'chat', '{prompt}'
_FILE = 'tokenizer.json'
_FORMAT_FILE = 'prompt_format.json'
_HUB_PATTERNS = ('*.json', '*.jinja', '*.txt', '*.bpe')
# OpenAI's two files under its own names and under Hugging Face's.
_BPE_FILES = (
  ('encoder.json', 'vocab.bpe'),
  ('encoder.json.gz', 'vocab.bpe.gz'),
  ('vocab.json', 'merges.txt'),
)


class Tokenizer:
  """Encodes and decodes; knows its PAD and EOS ids, which always differ.

  Attributes:
    vocab_size: number of ids, specials included.
    pad_id: fills rows up; never a real token.
    eos_id: ends every response and document.
    stop_ids: tokens that end a response when sampled; EOS is the first.
    prefix_ids: what stands before every text (a BOS token, or nothing).
    template: how prompts are rendered; see the top of this file.
    fingerprint: SHA-256 of vocabulary, merges, special ids, template and stop
      tokens. A checkpoint stores it; two tokenizers with equal fingerprints
      give equal ids.
    vocabulary_fingerprint: the same without template and stop tokens.
  """

  def __init__(
    self,
    fast_tokenizer: Any,
    *,
    template: str = '',
    stop_ids: Sequence[int] = (),
  ):
    """Wraps a `transformers.PreTrainedTokenizerFast`.

    Args:
      fast_tokenizer: with a PAD and an EOS token.
      template: see the top of this file.
      stop_ids: further tokens that end a response.

    Raises:
      ValueError: it has no PAD or EOS token, one token serves as both, a stop
        token is the PAD or no token, or the template cannot be used.
    """
    pad_id, eos_id = fast_tokenizer.pad_token_id, fast_tokenizer.eos_token_id
    if pad_id is None or eos_id is None or pad_id == eos_id:
      raise ValueError(
        'the tokenizer needs a PAD and an EOS token that differ, found '
        f'pad_token={fast_tokenizer.pad_token!r} (id {pad_id}), '
        f'eos_token={fast_tokenizer.eos_token!r} (id {eos_id}); add one with '
        "add_special_tokens({'pad_token': '<pad>'}) and save it again"
      )
    for stop_id in stop_ids:
      if not 0 <= stop_id < len(fast_tokenizer) or stop_id == pad_id:
        raise ValueError(
          f'stop token {stop_id} is the PAD ({pad_id}) or not among the '
          f'{len(fast_tokenizer)} ids'
        )
    if template == CHAT:
      if not fast_tokenizer.chat_template:
        raise ValueError(
          'the tokenizer has no chat template; use a format string with '
          f'{SLOT}, or no template'
        )
    elif template and template.count(SLOT) != 1:
      raise ValueError(
        f"template {template!r} must be '{CHAT}' or hold {SLOT} once"
      )
    self.template = template
    self._fast_tokenizer = fast_tokenizer
    self._backend = fast_tokenizer.backend_tokenizer
    # Off, `<eos>` inside a user's text would become the real EOS id.
    self._backend.encode_special_tokens = True
    self._backend.no_padding()
    self._backend.no_truncation()
    self.pad_id: int = pad_id
    self.eos_id: int = eos_id
    self._unk_id: int | None = fast_tokenizer.unk_token_id
    self.vocab_size: int = len(fast_tokenizer)
    others = sorted(set(stop_ids) - {eos_id})
    self.stop_ids: tuple[int, ...] = (eos_id, *others)
    self.prefix_ids: tuple[int, ...] = tuple(
      token
      for token in self._backend.encode('', add_special_tokens=True).ids
      if token != eos_id
    )

  @functools.cached_property
  def fingerprint(self) -> str:
    if not self.template and self.stop_ids == (self.eos_id,):
      return self.vocabulary_fingerprint
    chat = self._fast_tokenizer.chat_template if self.template == CHAT else ''
    content = [self.vocabulary_fingerprint, self.template, chat, self.stop_ids]
    return hashlib.sha256(json.dumps(content).encode('utf-8')).hexdigest()

  @functools.cached_property
  def vocabulary_fingerprint(self) -> str:
    model = json.loads(self._backend.to_str())['model']
    merges = [
      merge if isinstance(merge, str) else ' '.join(merge)
      for merge in model.get('merges', ())
    ]
    content = json.dumps(
      [
        sorted(self._backend.get_vocab(with_added_tokens=True).items()),
        merges,
        [self.pad_id, self.eos_id, *self.prefix_ids],
      ]
    )
    return hashlib.sha256(content.encode('utf-8')).hexdigest()

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without any special token before, inside or after."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of many texts at once, on all cores."""
    encodings = self._backend.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [self._without_specials(encoding.ids) for encoding in encodings]

  def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids of whole texts, with what this tokenizer puts before each."""
    return [[*self.prefix_ids, *ids] for ids in self.encode_batch(texts)]

  def encode_prompts(
    self,
    prompts: Sequence[
      str | records.Prompt | records.Demonstration | records.Comparison
    ],
  ) -> list[list[int]]:
    """Ids of prompts as the template renders them, up to the response's first.

    With a chat template the tokens that the template spells are special, and
    whatever a message spells is text. A prompt without turns is one turn of
    the user's.
    """
    texts = [_text_of(prompt) for prompt in prompts]
    if self.template == CHAT:
      return [
        self._encode_chat(() if isinstance(prompt, str) else prompt.turns, text)
        for prompt, text in zip(prompts, texts, strict=True)
      ]
    if self.template:
      texts = [self.template.replace(SLOT, text) for text in texts]
    return self.encode_documents(texts)

  def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids of responses. A chat template ends in a separator of its own, so the
    white space that begins a response goes."""
    if self.template == CHAT:
      texts = [text.lstrip() for text in texts]
    return self.encode_batch(texts)

  def _encode_chat(self, turns: Sequence[records.Turn], text: str) -> list[int]:
    if not turns:
      turns = [records.Turn('user', text)]

    def render(contents):
      return self._fast_tokenizer.apply_chat_template(
        [
          {'role': turn.role, 'content': content}
          for turn, content in zip(turns, contents, strict=True)
        ],
        tokenize=False,
        add_generation_prompt=True,
      )

    contents = [turn.content for turn in turns]
    specials = self._backend.get_added_tokens_decoder().values()
    spelled = any(
      token.content in content for token in specials for content in contents
    )
    if not spelled:
      return self._encode_with_specials(render(contents))
    # Someone typed a special token. The template's own pieces and the messages
    # are encoded apart, which is the same text but for merges at the seams.
    marks = [f'\ue000{number}\ue001' for number in range(len(contents))]
    rest, ids = render(marks), []
    for mark, content in zip(marks, contents, strict=True):
      piece, found, rest = rest.partition(mark)
      if not found:
        raise ValueError(
          'the chat template leaves out or reorders turns, and a message '
          f'spells a special token: {content[:60]!r}; drop this prompt'
        )
      ids += self._encode_with_specials(piece) + self.encode(content)
    return ids + self._encode_with_specials(rest)

  def _encode_with_specials(self, text: str) -> list[int]:
    self._backend.encode_special_tokens = False
    try:
      return self._backend.encode(text, add_special_tokens=False).ids
    finally:
      self._backend.encode_special_tokens = True

  def _without_specials(self, ids: list[int]) -> list[int]:
    # A word-level vocabulary holds `<eos>` as a word; as text it is unknown.
    if self.pad_id not in ids and self.eos_id not in ids:
      return ids
    if self._unk_id is None:
      raise ValueError(
        'a text spells a special token and the tokenizer has no <unk> to put '
        f'in its place: {self._backend.decode(ids)[:60]!r}'
      )
    return [
      self._unk_id if token in (self.pad_id, self.eos_id) else token
      for token in ids
    ]

  def decode(self, ids: Collection[SupportsIndex]) -> str:
    """The text of some ids, without PAD, BOS and stop tokens wherever they are.

    Raises:
      ValueError: an id lies outside the vocabulary (a model with more logits
        than its tokenizer has tokens, or the wrong tokenizer).
    """
    dropped = {self.pad_id, *self.prefix_ids, *self.stop_ids}
    kept = []
    for token in np.asarray(ids).tolist():
      if not 0 <= token < self.vocab_size:
        raise ValueError(
          f'id {token} is not among the {self.vocab_size} of this tokenizer'
        )
      if token not in dropped:
        kept.append(token)
    return self._backend.decode(kept, skip_special_tokens=False)

  def decode_batch(
    self, rows: Iterable[Collection[SupportsIndex]]
  ) -> list[str]:
    """`decode` of each row."""
    return [self.decode(row) for row in rows]

  def save(self, folder: epath.PathLike) -> None:
    """Writes the folder in Hugging Face format (`from_pretrained` reads it)."""
    with tempfile.TemporaryDirectory() as temporary:
      self._fast_tokenizer.save_pretrained(temporary)
      for path in sorted(pathlib.Path(temporary).iterdir()):
        records.write_bytes(epath.Path(folder) / path.name, path.read_bytes())
    stops = [
      self._fast_tokenizer.convert_ids_to_tokens(i) for i in self.stop_ids[1:]
    ]
    if self.template or stops:
      described = {'template': self.template, 'stop_tokens': stops}
      records.write_bytes(
        epath.Path(folder) / _FORMAT_FILE,
        json.dumps(described, indent=2).encode('utf-8'),
      )

  def with_format(
    self, template: str, stop_tokens: Sequence[str]
  ) -> 'Tokenizer':
    """The same tokenizer with another template and further stop tokens.

    Raises:
      ValueError: see `__init__`; or a stop token is not in the vocabulary.
    """
    stop_ids = _ids_of(self._fast_tokenizer, stop_tokens)
    return Tokenizer(
      self._fast_tokenizer,
      template=template,
      stop_ids=(*self.stop_ids, *stop_ids),
    )

  @classmethod
  def load(cls, folder: epath.PathLike) -> 'Tokenizer':
    """Reads a folder that `save` or `save_pretrained` wrote, or `hf:NAME`.

    Also GPT-2's encoder.json and vocab.bpe. The stop tokens are those of
    generation_config.json, if there is one, and of `save`. A PAD is added
    where there is none or where it also ends responses. Only `hf:` ever
    downloads.

    Raises:
      ValueError: names the folder and what is missing or wrong in it.
    """
    if str(folder).startswith('hf:'):
      folder = hub.locate(str(folder), _HUB_PATTERNS)
    folder = epath.Path(folder)
    if not folder.is_dir():
      raise ValueError(
        f'{folder}: no tokenizer folder here; run the data stage first or '
        'correct the path'
      )
    names = sorted(path.name for path in folder.iterdir())
    if _FILE not in names:
      for encoder_json, vocab_bpe in _BPE_FILES:
        if encoder_json in names and vocab_bpe in names:
          return load_gpt2_bpe(folder / encoder_json, folder / vocab_bpe)
      raise ValueError(
        f'{folder}: {_FILE} is missing (found {", ".join(names) or "nothing"})'
        '; save the tokenizer in Hugging Face format there'
      )
    transformers = _import_transformers()
    with tempfile.TemporaryDirectory() as temporary:
      for name in names:
        if (folder / name).is_file():
          content = (folder / name).read_bytes()
          (pathlib.Path(temporary) / name).write_bytes(content)
      try:
        fast_tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
          temporary, local_files_only=True
        )
        template, stop_tokens = '', []
        if _FORMAT_FILE in names:
          described = json.loads((folder / _FORMAT_FILE).read_text())
          template = described['template']
          stop_tokens = described['stop_tokens']
        stop_ids = _ids_of(fast_tokenizer, stop_tokens)
        if 'generation_config.json' in names:
          content = (folder / 'generation_config.json').read_text()
          found = json.loads(content).get('eos_token_id') or []
          stop_ids += [found] if isinstance(found, int) else found
        ends = (None, fast_tokenizer.eos_token_id, *stop_ids)
        if fast_tokenizer.pad_token_id in ends:
          # Published tokenizers pad with EOS or not at all.
          fast_tokenizer.add_special_tokens({'pad_token': PAD})
        return cls(fast_tokenizer, template=template, stop_ids=stop_ids)
      # The Rust side raises bare `Exception` on a damaged file.
      except Exception as error:
        raise ValueError(
          f'{folder}: the tokenizer does not load: {error}'
        ) from error


def _text_of(prompt: Any) -> str:
  if isinstance(prompt, str):
    return prompt
  return prompt.text if isinstance(prompt, records.Prompt) else prompt.prompt


def _ids_of(fast_tokenizer: Any, tokens: Sequence[str]) -> list[int]:
  vocabulary = fast_tokenizer.get_vocab()
  unknown = [token for token in tokens if token not in vocabulary]
  if unknown:
    raise ValueError(f'stop tokens {unknown} are not in the vocabulary')
  return [vocabulary[token] for token in tokens]


def check_published(tokenizer: Tokenizer, folder: str) -> None:
  """Refuses a published model whose folder holds another tokenizer.

  Policy, reward model and trainer pass ids to each other, never text. A folder
  without a tokenizer, or a model of our own (which carries a fingerprint),
  passes.

  Raises:
    ValueError: the two give different ids; both are named.
  """
  path = hub.locate(folder) if folder.startswith('hf:') else epath.Path(folder)
  path = epath.Path(path)
  if not (path / 'config.json').exists() or not (path / _FILE).exists():
    return
  theirs = Tokenizer.load(path)
  if theirs.vocabulary_fingerprint != tokenizer.vocabulary_fingerprint:
    raise ValueError(
      f'{folder} has a tokenizer of {theirs.vocab_size} tokens '
      f'({theirs.vocabulary_fingerprint[:12]}), this run uses one of '
      f'{tokenizer.vocab_size} ({tokenizer.vocabulary_fingerprint[:12]}). '
      'Policy, reference, reward and value models must share one tokenizer.'
    )


def train_word_level(vocabulary: Sequence[str]) -> Tokenizer:
  """A tokenizer with one id per word: ids 0, 1, 2 are <pad>, <eos>, <unk>.

  Text is split at white space; `decode` joins with single spaces, so texts
  whose words are separated by single spaces come back exactly.

  Args:
    vocabulary: distinct words, in the order of their ids (from 3).

  Raises:
    ValueError: a word is empty, holds white space or comes twice.
  """
  ids = {PAD: 0, EOS: 1, UNK: 2}
  for word in vocabulary:
    if word in ids or word.split() != [word]:
      raise ValueError(
        f'{word!r} cannot be a vocabulary entry: words are distinct, not '
        'empty, without white space, and not <pad>, <eos> or <unk>'
      )
    ids[word] = len(ids)
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(ids, unk_token=UNK)
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return _wrap(backend, pad=PAD, eos=EOS, unk=UNK)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Trains a byte-level BPE tokenizer (GPT-2's kind) on some texts.

  Every text can be encoded and comes back byte for byte. <pad> is 0, <eos> 1.

  Args:
    texts: the training split only.
    vocab_size: at most this many ids (fewer if the texts run out of pairs); at
      least 258, the 256 bytes and two specials.
  """
  if vocab_size < 258:
    raise ValueError(
      f'vocab_size is {vocab_size}; 256 bytes and 2 specials need 258'
    )
  backend = _byte_level(tokenizers.models.BPE())
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[PAD, EOS],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer)
  return _wrap(backend, pad=PAD, eos=EOS)


def load_gpt2_bpe(
  encoder_json: epath.PathLike, vocab_bpe: epath.PathLike
) -> Tokenizer:
  """The tokenizer of GPT-2 and GPT-3 from OpenAI's own two files.

  50,257 ids as published (<|endoftext|>, the EOS, is 50256), and a PAD of our
  own as id 50257: the paper's models share one id for both uses, which
  `types.TextBatch` forbids.

  Args:
    encoder_json: `encoder.json`, plain or `.gz`: token to id.
    vocab_bpe: `vocab.bpe`, plain or `.gz`: one merge a line, best first.

  Raises:
    RecordError: a file is missing or not what its name says.
  """
  try:
    vocabulary = json.loads(records.read_bytes(encoder_json).decode('utf-8'))
  except ValueError as error:
    if isinstance(error, records.RecordError):
      raise
    raise records.RecordError(
      f'{encoder_json}: not a JSON object of tokens ({error})'
    ) from error
  merges = []
  lines = records.read_bytes(vocab_bpe).decode('utf-8').split('\n')
  for number, line in enumerate(lines, start=1):
    if not line or line.startswith('#version'):
      continue
    pair = tuple(line.split(' '))
    if len(pair) != 2 or not all(pair):
      raise records.RecordError(
        f'{vocab_bpe}:{number}: expected two tokens, found {line[:60]!r}'
      )
    merges.append(pair)
  end_of_text = '<|endoftext|>'
  if end_of_text not in vocabulary:
    raise records.RecordError(f'{encoder_json}: {end_of_text} is missing')
  backend = _byte_level(tokenizers.models.BPE(vocabulary, merges))
  return _wrap(backend, pad=PAD, eos=end_of_text)


def _byte_level(model: Any) -> tokenizers.Tokenizer:
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  return backend


def _wrap(
  backend: tokenizers.Tokenizer, *, pad: str, eos: str, unk: str | None = None
) -> Tokenizer:
  specials = {'pad_token': pad, 'eos_token': eos}
  if unk is not None:
    specials['unk_token'] = unk
  transformers = _import_transformers()
  return Tokenizer(
    transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, clean_up_tokenization_spaces=False, **specials
    )
  )


def _import_transformers() -> Any:
  # Two seconds, so only when needed; and it would advise installing PyTorch.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  import transformers

  return transformers


def main(arguments: Sequence[str] | None = None) -> int:
  """Prepares a published tokenizer; returns the exit code."""
  parser = command.Parser(
    prog='python -m instruct_jax.data.tokenizer',
    description='Prepares a published tokenizer.',
  )
  parser.add_argument('source', help='a folder or hf:NAME')
  parser.add_argument('--output', required=True, metavar='DIR')
  parser.add_argument(
    '--template', default='', help=f"'{CHAT}', or text with {SLOT}"
  )
  parser.add_argument('--stop', action='append', default=[], metavar='TOKEN')
  options = parser.parse_args(arguments)
  try:
    tokenizer = Tokenizer.load(options.source)
    tokenizer = tokenizer.with_format(options.template, options.stop)
  except ValueError as error:
    print(error, file=sys.stderr)
    return 1
  tokenizer.save(options.output)
  print(
    f'{options.output}: {tokenizer.vocab_size} tokens, PAD {tokenizer.pad_id}, '
    f'stops {list(tokenizer.stop_ids)}, before each text '
    f'{list(tokenizer.prefix_ids)}, template {tokenizer.template!r}'
  )
  return 0


if __name__ == '__main__':
  command.end(main)
