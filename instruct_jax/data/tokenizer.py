"""Text to ids and back: a thin, strict wrapper over a Hugging Face tokenizer.

Prompt and response are tokenised apart and their ids concatenated, so that the
ids of a prompt never depend on what follows it. No text can spell a special
token: `<eos>` typed by a user is text, and the EOS and PAD ids come from the
code that lays out the rows, never from `encode`.
"""

import functools
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Collection, Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np
import tokenizers
from etils import epath

from instruct_jax.data import records

PAD, EOS, UNK = '<pad>', '<eos>', '<unk>'
_FILE = 'tokenizer.json'


class Tokenizer:
  """Encodes and decodes; knows its PAD and EOS ids, which always differ.

  Attributes:
    vocab_size: number of ids, specials included.
    pad_id: fills rows up; never a real token.
    eos_id: ends every response and document.
    fingerprint: SHA-256 of vocabulary, merges and special ids. A checkpoint
      stores it; two tokenizers with equal fingerprints give equal ids.
  """

  def __init__(self, fast_tokenizer: Any):
    """Wraps a `transformers.PreTrainedTokenizerFast`.

    Raises:
      ValueError: it has no PAD or EOS token, or one token serves as both.
    """
    pad_id, eos_id = fast_tokenizer.pad_token_id, fast_tokenizer.eos_token_id
    if pad_id is None or eos_id is None or pad_id == eos_id:
      raise ValueError(
        'the tokenizer needs a PAD and an EOS token that differ, found '
        f'pad_token={fast_tokenizer.pad_token!r} (id {pad_id}), '
        f'eos_token={fast_tokenizer.eos_token!r} (id {eos_id}); add one with '
        "add_special_tokens({'pad_token': '<pad>'}) and save it again"
      )
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

  @functools.cached_property
  def fingerprint(self) -> str:
    model = json.loads(self._backend.to_str())['model']
    merges = [
      merge if isinstance(merge, str) else ' '.join(merge)
      for merge in model.get('merges', ())
    ]
    content = json.dumps(
      [
        sorted(self._backend.get_vocab(with_added_tokens=True).items()),
        merges,
        [self.pad_id, self.eos_id],
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
    """The text of some ids; PAD and EOS are dropped wherever they stand.

    Raises:
      ValueError: an id lies outside the vocabulary (a model with more logits
        than its tokenizer has tokens, or the wrong tokenizer).
    """
    kept = []
    for token in np.asarray(ids).tolist():
      if not 0 <= token < self.vocab_size:
        raise ValueError(
          f'id {token} is not among the {self.vocab_size} of this tokenizer'
        )
      if token not in (self.pad_id, self.eos_id):
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

  @classmethod
  def load(cls, folder: epath.PathLike) -> 'Tokenizer':
    """Reads a folder that `save` or `save_pretrained` wrote.

    Nothing is ever downloaded.

    Raises:
      ValueError: names the folder and what is missing or wrong in it.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
      raise ValueError(
        f'{folder}: no tokenizer folder here; run the data stage first or '
        'correct the path'
      )
    names = sorted(path.name for path in folder.iterdir())
    if _FILE not in names:
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
        if fast_tokenizer.pad_token_id in (None, fast_tokenizer.eos_token_id):
          # Published tokenizers pad with EOS or not at all.
          fast_tokenizer.add_special_tokens({'pad_token': PAD})
        return cls(fast_tokenizer)
      # The Rust side raises bare `Exception` on a damaged file.
      except Exception as error:
        raise ValueError(
          f'{folder}: the tokenizer does not load: {error}'
        ) from error


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
