"""Text to ids and back: the one place where a text becomes what a model reads.

Training rows, rollouts, reward models, judges, benchmarks, the chat and length
tables all come through here: `encode_prompts` gives the ids up to a response's
first, `encode_responses` the response with the token that ends it, and
`encode_documents` text that is no conversation.

Prompt and response are tokenised apart and their ids concatenated, so that the
ids of a prompt never depend on what follows it. No text can spell a special
token: `<eos>` typed by a user is text.

How a prompt is put into words for the model, and which token ends an answer,
belong to the tokenizer and are saved with it:

  ''            the prompt's text as it is (the paper's raw prompts); EOS ends
  'chat'        the tokenizer's own chat template, over the prompt's turns; the
                token with which the template ends the assistant's turn ends
  other text    a format string with one slot, {prompt}; EOS ends

  python -m instruct_jax.data.tokenizer hf:NAME --output=DIR --template=chat

prepares a published tokenizer: a PAD of its own, the template, stop tokens. A
template that reads the clock is pinned to a date (`--date`), in the folder.
"""

import codecs
import copy
import datetime
import functools
import hashlib
import json
import pathlib
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import tokenizers
from etils import epath

from instruct_jax import command, hub
from instruct_jax.data import folders, records

PAD, EOS, UNK = '<pad>', '<eos>', '<unk>'
CHAT, SLOT = 'chat', '{prompt}'
_FILE = 'tokenizer.json'
_FORMAT_FILE = 'prompt_format.json'
_HUB_PATTERNS = ('*.json', '*.jinja', '*.txt', '*.bpe')
# What a tokenizer is made of; the rest of its folder, weights say, is not read.
_FILES = (
  _FILE,
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
  'chat_template.json',
)
# Folder of templates besides the first.
_TEMPLATES = 'additional_chat_templates'
# Texts that end in one of these can be continued without a mark before the
# continuation; the first that leaves a text's ids alone is taken.
_ANCHORS = ('\n', 'a', '.', '0', ':')
# Stands for the assistant's words where the template is looked at.
_MARK = '\ue000answer\ue001'
# OpenAI's two files under its own names and under Hugging Face's.
_BPE_FILES = (
  ('encoder.json', 'vocab.bpe'),
  ('encoder.json.gz', 'vocab.bpe.gz'),
  ('vocab.json', 'merges.txt'),
)


class TemplateError(ValueError):
  """A chat template cannot render a prompt; the text names the prompt."""


class Tokenizer:
  """Encodes and decodes; knows its PAD and EOS ids, which always differ.

  Attributes:
    vocab_size: number of ids, specials included.
    pad_id: fills rows up; never a real token.
    eos_id: ends every document.
    end_id: ends every response of a training row: the chat template's end of
      a turn, or EOS.
    stop_ids: tokens that end a response when sampled; EOS is the first, and
      `end_id` is among them.
    prefix_ids: what stands before every text (a BOS token, or nothing).
    bos_id: the BOS token, whether or not texts begin with it; or None.
    template: how prompts are rendered; see the top of this file.
    fingerprint: SHA-256 of all that decides a text's ids: vocabulary, merges,
      normalizer, pre-tokenizer, special ids, template and stop tokens. A
      checkpoint stores it; two tokenizers with equal fingerprints give equal
      ids.
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
    if template and template != CHAT and template.count(SLOT) != 1:
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
    self.bos_id: int | None = fast_tokenizer.bos_token_id
    self._unk_id: int | None = fast_tokenizer.unk_token_id
    self.vocab_size: int = len(fast_tokenizer)
    self.prefix_ids: tuple[int, ...] = tuple(
      token
      for token in self._backend.encode('', add_special_tokens=True).ids
      if token != eos_id
    )
    self._marks_starts = _marks_starts(json.loads(self._backend.to_str()))
    self.end_id: int = eos_id
    # Text of the template around an answer, up to its end; None where answers
    # are not rendered by it.
    self._around_answer: tuple[str, str] | None = None
    if template == CHAT:
      self._chat_template = _checked_chat_template(fast_tokenizer.chat_template)
      self._read_template(set(stop_ids))
    others = sorted({*stop_ids, self.end_id} - {eos_id})
    self.stop_ids: tuple[int, ...] = (eos_id, *others)

  @functools.cached_property
  def fingerprint(self) -> str:
    if not self.template and self.stop_ids == (self.eos_id,):
      return self.vocabulary_fingerprint
    chat = self._chat_template if self.template == CHAT else ''
    content = [self.vocabulary_fingerprint, self.template, chat, self.stop_ids]
    return _sha256([*content, self.end_id])

  @functools.cached_property
  def vocabulary_fingerprint(self) -> str:
    described = json.loads(self._backend.to_str())
    model = described['model']
    if 'merges' in model:  # Written as pairs or as joined texts.
      model['merges'] = [
        merge if isinstance(merge, str) else ' '.join(merge)
        for merge in model['merges']
      ]
    return _sha256(
      [
        *(
          described[k] for k in ('normalizer', 'pre_tokenizer', 'added_tokens')
        ),
        model,
        # What the post-processor does to a text alone.
        self._backend.encode('', add_special_tokens=True).ids,
        [self.pad_id, self.eos_id],
      ]
    )

  def describe(self) -> str:
    """One line for reports: how this tokenizer reads prompts and ends them."""
    name = self._fast_tokenizer.convert_ids_to_tokens
    before = ' '.join(map(name, self.prefix_ids))
    if self.template == CHAT:
      prompts = 'prompts in its chat template'
    else:
      prompts = 'prompts as plain text'
      prompts = f'prompts as {self.template!r}' if self.template else prompts
      prompts += f' after {before}' if before else ''
    return (
      f'{self.vocab_size:,} tokens ({self.fingerprint[:12]}), {prompts}, '
      f'answers end with {name(self.end_id)}, sampling stops at '
      f'{" ".join(map(name, self.stop_ids))}'
    )

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

    Raises:
      TemplateError: the chat template refuses a prompt.
    """
    if self.template == CHAT:
      return self._encode_chats(
        [(_turns_of(prompt), _name_of(prompt)) for prompt in prompts]
      )
    texts = [_text_of(prompt) for prompt in prompts]
    if self.template:
      texts = [self.template.replace(SLOT, text) for text in texts]
    return self.encode_documents(texts)

  def encode_responses(
    self, texts: Sequence[str], *, ended: bool = False
  ) -> list[list[int]]:
    """Ids of responses, as they stand behind the ids of their prompts.

    A chat template ends in a separator of its own, so the white space that
    begins a response goes; what the template puts around an answer (a space,
    say) is put around this one.

    Args:
      texts: of the responses.
      ended: with `end_id` behind each, as in training rows.
    """
    if self.template == CHAT:
      found = self._encode_answers([text.lstrip() for text in texts])
    else:
      found = self._encode_continuations(texts)
    return [[*ids, self.end_id] for ids in found] if ended else found

  def render_chat(
    self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool
  ) -> str:
    """The chat template's text of messages with `role` and `content`.

    Raises:
      ValueError: the tokenizer has no chat template, or a TemplateError where
        the template refuses the messages.
    """
    if self.template != CHAT:
      _checked_chat_template(self._fast_tokenizer.chat_template)
    return self._render(
      messages, 'the conversation', add_generation_prompt=add_generation_prompt
    )

  def encode_rendered(self, text: str) -> list[int]:
    """Ids of text that a template has rendered: the special tokens that it
    spells are special, and nothing is put before it."""
    return self._encode_with_specials([text])[0]

  # --- Chat templates ---------------------------------------------------------

  def _render(self, messages, name, add_generation_prompt=True):
    try:
      return self._fast_tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
      )
    # A template is a program of its author's: it can raise anything.
    except Exception as error:
      words = ' '.join(str(error).split()) or type(error).__name__
      raise TemplateError(
        f'{name}: the chat template refuses it: {words}'
      ) from error

  def _read_template(self, stop_ids):
    """Finds what the template puts around an answer, and what ends it."""
    question = [{'role': 'user', 'content': '?'}]
    answered = [*question, {'role': 'assistant', 'content': _MARK}]
    name = 'a conversation of one question'
    self._question = self._render(question, name)
    (self._question_ids,) = self._encode_with_specials([self._question])
    try:
      whole = self._render(answered, name, add_generation_prompt=False)
    except TemplateError:
      return
    before, found, after = whole.partition(_MARK)
    if not found:
      return
    specials = {
      number
      for number, token in self._backend.get_added_tokens_decoder().items()
      if token.special
    }
    specials |= {self.eos_id, *stop_ids}
    specials -= {self.pad_id}
    (after_ids,) = self._encode_with_specials([after])
    ends = [token for token in after_ids if token in specials]
    if not ends:
      return
    self.end_id = ends[0]
    end = self._fast_tokenizer.convert_ids_to_tokens(self.end_id)
    if before.startswith(self._question):
      lead = before[len(self._question) :]
      self._around_answer = (lead, after.partition(end)[0])

  def _encode_chats(self, chats):
    specials = [
      token.content
      for token in self._backend.get_added_tokens_decoder().values()
    ]
    found, plain = [None] * len(chats), []
    for number, (turns, name) in enumerate(chats):
      contents = [turn.content for turn in turns]
      if any(token in content for token in specials for content in contents):
        found[number] = self._encode_spelled_chat(turns, name)
      else:
        messages = [{'role': t.role, 'content': t.content} for t in turns]
        plain.append((number, self._render(messages, name)))
    encoded = self._encode_with_specials([text for _, text in plain])
    for (number, _), ids in zip(plain, encoded, strict=True):
      found[number] = ids
    return found

  def _encode_spelled_chat(self, turns, name):
    """A message spells a special token. The template's own pieces and the
    messages are encoded apart, which is the same text but for merges at the
    seams."""
    marks = [f'\ue000{number}\ue001' for number in range(len(turns))]
    rest = self._render(
      [
        {'role': turn.role, 'content': mark}
        for turn, mark in zip(turns, marks, strict=True)
      ],
      name,
    )
    ids = []
    for turn, mark in zip(turns, marks, strict=True):
      piece, found, rest = rest.partition(mark)
      if not found:
        raise TemplateError(
          f'{name}: the chat template leaves out or reorders turns, and a '
          f'message spells a special token: {turn.content[:60]!r}; drop it'
        )
      ids += self._encode_template_piece(piece, first=not ids)
      ids += self._encode_continuations([turn.content])[0]
    return ids + self._encode_template_piece(rest, first=not ids)

  def _encode_template_piece(self, piece, first):
    if first:
      return self._encode_with_specials([piece])[0]
    return self._encode_continuations([piece], self._encode_with_specials)[0]

  def _encode_answers(self, texts):
    """Answers as the template renders them after a question, up to its end."""
    if self._around_answer is None:
      return self._encode_continuations(texts)
    specials = [
      token.content
      for token in self._backend.get_added_tokens_decoder().values()
    ]
    question = {'role': 'user', 'content': '?'}
    rendered = [
      self._render(
        [question, {'role': 'assistant', 'content': text}],
        f'the response {text[:60]!r}',
        add_generation_prompt=False,
      )
      for text in texts
    ]
    whole = self._encode_with_specials(rendered)
    start = len(self._question_ids)
    found = []
    for text, ids in zip(texts, whole, strict=True):
      spelled = any(token in text for token in specials)
      answer = ids[start:]
      if (
        spelled
        or ids[:start] != self._question_ids
        or self.end_id not in answer
      ):
        found.append(self._encode_answer_apart(text))
      else:
        found.append(answer[: answer.index(self.end_id)])
    return found

  def _encode_answer_apart(self, text):
    lead, tail = self._around_answer
    # White space belongs to the words beside it.
    if not lead.strip():
      text, lead = lead + text, ''
    if not tail.strip():
      text, tail = text + tail, ''
    (ids,) = self._encode_continuations([text])
    for piece, place in ((lead, 0), (tail, len(ids))):
      if piece:
        ids[place:place] = self._encode_template_piece(piece, first=False)
    return ids

  # --- Ids --------------------------------------------------------------------

  def _encode_continuations(self, texts, encode=None):
    """Ids of texts that continue another text.

    A tokenizer that puts a mark or a space before each text it encodes (Llama
    2's, Mistral's) would put one at the seam, too. There a text is encoded
    behind an anchor, whose ids are cut off again.
    """
    encode = self.encode_batch if encode is None else encode
    if not self._marks_starts:
      return encode(texts)
    found = [None if text else [] for text in texts]
    for anchor in _ANCHORS:
      todo = [i for i, ids in enumerate(found) if ids is None]
      if not todo:
        break
      (anchor_ids,) = encode([anchor])
      whole = encode([anchor + texts[i] for i in todo])
      for i, ids in zip(todo, whole, strict=True):
        if ids[: len(anchor_ids)] == anchor_ids:
          found[i] = ids[len(anchor_ids) :]
    # Every anchor merges with the text: as an encoder would begin it.
    left = [i for i, ids in enumerate(found) if ids is None]
    for i, ids in zip(left, encode([texts[i] for i in left]), strict=True):
      found[i] = ids
    return found

  def _encode_with_specials(self, texts):
    self._backend.encode_special_tokens = False
    try:
      encodings = self._backend.encode_batch_fast(
        list(texts), add_special_tokens=False
      )
      return [encoding.ids for encoding in encodings]
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
    return self._backend.decode(self._kept(ids), skip_special_tokens=False)

  def decode_response(self, ids: Collection[SupportsIndex]) -> str:
    """`decode` of a response: its text as it stands behind its prompt.

    Some tokenizers take one space off the text they decode; of a response that
    would be its own.
    """
    kept = self._kept(ids)
    if not self._marks_starts or not kept:
      return self._backend.decode(kept, skip_special_tokens=False)
    anchor = _ANCHORS[0]
    anchor_ids = self.encode(anchor)
    whole, alone = (
      self._backend.decode(part, skip_special_tokens=False)
      for part in ([*anchor_ids, *kept], anchor_ids)
    )
    return whole.removeprefix(alone)

  def decode_responses(
    self, rows: Iterable[Collection[SupportsIndex]]
  ) -> list[str]:
    """`decode_response` of each row."""
    return [self.decode_response(row) for row in rows]

  def _kept(self, ids):
    dropped = {self.pad_id, *self.prefix_ids, *self.stop_ids}
    kept = []
    for token in np.asarray(ids).tolist():
      if not 0 <= token < self.vocab_size:
        raise ValueError(
          f'id {token} is not among the {self.vocab_size} of this tokenizer'
        )
      if token not in dropped:
        kept.append(token)
    return kept

  def decode_batch(
    self, rows: Iterable[Collection[SupportsIndex]]
  ) -> list[str]:
    """`decode` of each row."""
    return [self.decode(row) for row in rows]

  # --- Folders ----------------------------------------------------------------

  def save(self, folder: epath.PathLike) -> None:
    """Writes the folder in Hugging Face format (`from_pretrained` reads it).

    Of a tokenizer that was there before, nothing stays.
    """
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
      self._fast_tokenizer.save_pretrained(temporary)
      for path in sorted(pathlib.Path(temporary).rglob('*')):
        if path.is_file():
          name = path.relative_to(temporary).as_posix()
          found[name] = path.read_bytes()
    stops = [
      self._fast_tokenizer.convert_ids_to_tokens(i) for i in self.stop_ids[1:]
    ]
    if self.template or stops or self._fast_tokenizer.chat_template:
      described = {'template': self.template, 'stop_tokens': stops}
      found[_FORMAT_FILE] = json.dumps(described, indent=2).encode('utf-8')
    folder = epath.Path(folder)
    if (folder / _TEMPLATES).exists():
      (folder / _TEMPLATES).rmtree()
    for name in {*_FILES, _FORMAT_FILE, 'generation_config.json'} - {*found}:
      (folder / name).unlink(missing_ok=True)
    for name, content in found.items():
      records.write_bytes(folder / name, content)

  def with_format(
    self,
    template: str,
    stop_tokens: Sequence[str],
    date: datetime.date | None = None,
  ) -> 'Tokenizer':
    """The same tokenizer with another template and further stop tokens.

    Args:
      template: see the top of this file.
      stop_tokens: besides those that it has.
      date: what a chat template that reads the clock is told from now on.

    Raises:
      ValueError: see `__init__`; or a stop token is not in the vocabulary.
    """
    fast_tokenizer = self._fast_tokenizer
    if template == CHAT:
      fast_tokenizer = copy.deepcopy(fast_tokenizer)
      chosen = _one_template(fast_tokenizer.chat_template)
      if date is not None and reads_clock(chosen):
        chosen = _pinned(chosen, date)
      fast_tokenizer.chat_template = chosen
    stop_ids = _ids_of(fast_tokenizer, stop_tokens)
    return Tokenizer(
      fast_tokenizer,
      template=template,
      stop_ids=(*self.stop_ids, *stop_ids),
    )

  @property
  def chat_template(self) -> str:
    """The chat template that comes with the tokenizer; '' where none does."""
    found = self._fast_tokenizer.chat_template
    return _one_template(found) if found else ''

  @classmethod
  def load(cls, folder: epath.PathLike) -> 'Tokenizer':
    """Reads a folder that `save` or `save_pretrained` wrote, or `hf:NAME`.

    Also GPT-2's encoder.json and vocab.bpe. The stop tokens are those of
    generation_config.json (config.json's where there is none) and of `save`. A
    PAD is added where there is none or where it also ends responses. Only `hf:`
    ever downloads, and no file but the tokenizer's own is read.

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
    import transformers  # Two seconds, so only when needed.

    with tempfile.TemporaryDirectory() as temporary:
      _copy_files(folder, names, pathlib.Path(temporary))
      try:
        fast_tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
          temporary, local_files_only=True
        )
        template, stop_tokens = '', []
        if _FORMAT_FILE in names:
          described = _read_object(folder / _FORMAT_FILE)
          template = described['template']
          stop_tokens = described['stop_tokens']
        stop_ids = _ids_of(fast_tokenizer, stop_tokens)
        for name in ('generation_config.json', 'config.json'):
          if name in names:
            found = _read_object(folder / name).get('eos_token_id')
            found = [] if found is None else found
            stop_ids += [found] if isinstance(found, int) else found
            break
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


def is_folder(folder: epath.Path) -> bool:
  """Whether a folder holds a tokenizer in the Hugging Face format."""
  return (folder / _FILE).exists()


def is_prepared(folder: epath.Path) -> bool:
  """Whether somebody said how prompts are read with a folder's tokenizer."""
  return (folder / _FORMAT_FILE).exists()


def _sha256(content: Any) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode('utf-8')).hexdigest()


def _copy_files(folder, names, target) -> None:
  for name in names:
    if name in _FILES:
      (target / name).write_bytes(_without_mark(folder / name))
  templates = folder / _TEMPLATES
  if templates.name in names:
    (target / templates.name).mkdir()
    for path in templates.iterdir():
      if path.name.endswith('.jinja'):
        copied = target / templates.name / path.name
        copied.write_bytes(_without_mark(path))


def _without_mark(path: epath.Path) -> bytes:
  """A file without a byte order mark, which its readers would stumble over."""
  return path.read_bytes().removeprefix(codecs.BOM_UTF8)


def _read_object(path: epath.Path) -> dict[str, Any]:
  found = json.loads(path.read_bytes().decode('utf-8-sig'))
  if not isinstance(found, dict):
    raise ValueError(f'{path.name} is no JSON object')
  return found


def _marks_starts(described: Any) -> bool:
  """Whether a tokenizer.json puts a mark or a space before each text."""
  if isinstance(described, list):
    return any(map(_marks_starts, described))
  if not isinstance(described, dict):
    return False
  kind = described.get('type', '')
  if kind == 'Metaspace':
    return described.get('prepend_scheme', 'always') != 'never'
  if kind == 'ByteLevel':
    return bool(described.get('add_prefix_space', True))
  return kind == 'Prepend' or any(
    _marks_starts(described[name])
    for name in (
      'normalizer',
      'pre_tokenizer',
      'normalizers',
      'pretokenizers',
    )
    if name in described
  )


# --- Chat templates -----------------------------------------------------------


def _one_template(found: Any) -> str:
  """The one chat template that is used, of one or of several by name.

  Raises:
    ValueError: there is none, or several and none is called 'default'.
  """
  if not found:
    raise ValueError(
      'the tokenizer has no chat template; use a format string with '
      f'{SLOT}, or no template'
    )
  if isinstance(found, str):
    return found
  if 'default' not in found:
    raise ValueError(
      f'the tokenizer has chat templates called {", ".join(sorted(found))} and '
      "none called 'default'; save the wanted one as chat_template.jinja"
    )
  return found['default']


def _checked_chat_template(found: Any) -> str:
  template = _one_template(found)
  if reads_clock(template):
    raise ValueError(
      'the chat template reads the clock (strftime_now), so the same prompt '
      'would have other ids tomorrow; pin it: python -m '
      'instruct_jax.data.tokenizer FOLDER --output=DIR --template=chat '
      '--date=YYYY-MM-DD'
    )
  return template


def reads_clock(template: str) -> bool:
  """Whether a chat template asks for the time of the day it is used on.

  Raises:
    ValueError: it is no template, or draws random texts.
  """
  import jinja2
  import jinja2.ext
  import jinja2.meta
  import jinja2.nodes

  class Generation(jinja2.ext.Extension):
    """The tag by which templates mark the assistant's words."""

    tags = frozenset({'generation'})

    def parse(self, parser):
      next(parser.stream)
      return parser.parse_statements(('name:endgeneration',), drop_needle=True)

  environment = jinja2.Environment(
    extensions=[jinja2.ext.loopcontrols, Generation]
  )
  try:
    parsed = environment.parse(template)
  except jinja2.TemplateError as error:
    raise ValueError(f'the chat template is no template: {error}') from error
  names = jinja2.meta.find_undeclared_variables(parsed)
  filters = {node.name for node in parsed.find_all(jinja2.nodes.Filter)}
  if 'lipsum' in names or 'random' in filters:
    raise ValueError(
      'the chat template draws random texts (lipsum, random); no two readings '
      'of a prompt would agree: remove that from it'
    )
  return 'strftime_now' in names


# What `strftime` knows; glibc's variants without leading zeros too.
_DIRECTIVES = 'aAwdbBmyYHIMSpfjUWcxXzZ'


def _pinned(template: str, date: datetime.date) -> str:
  """The template with a clock of its own that stands at a date's midnight."""
  then = datetime.datetime.combine(date, datetime.time())
  known = [f'%{letter}' for letter in (*_DIRECTIVES, *'eDFTRGuV')]
  known += [f'%-{letter}' for letter in 'dmyHIMSj']
  replaced = ''.join(
    f'|replace({directive!r}, {then.strftime(directive)!r})'
    for directive in known
  )
  return (
    '{%- macro strftime_now(format) -%}{{- format' + replaced + ' -}}'
    # Without the plus, a line break that begins the template would go.
    '{%- endmacro +%}' + template
  )


def _text_of(prompt: Any) -> str:
  if isinstance(prompt, str):
    return prompt
  return prompt.text if isinstance(prompt, records.Prompt) else prompt.prompt


def _turns_of(prompt: Any) -> tuple[records.Turn, ...]:
  turns = () if isinstance(prompt, str) else prompt.turns
  return turns or (records.Turn('user', _text_of(prompt)),)


def _name_of(prompt: Any) -> str:
  """What a message calls a prompt."""
  if not isinstance(prompt, str) and prompt.id:
    return f'prompt {prompt.id!r}'
  text = _text_of(prompt)
  return f'the prompt {text[:60]!r}' + '...' * (len(text) > 60)


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
    vocabulary = json.loads(records.read_text(encoder_json))
  except ValueError as error:
    if isinstance(error, records.RecordError):
      raise
    raise records.RecordError(
      f'{encoder_json}: not a JSON object of tokens ({error})'
    ) from error
  merges = []
  lines = records.read_text(vocab_bpe).split('\n')
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
  import transformers  # Two seconds, so only when needed.

  return Tokenizer(
    transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, clean_up_tokenization_spaces=False, **specials
    )
  )


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
  parser.add_argument(
    '--date',
    type=datetime.date.fromisoformat,
    metavar='YYYY-MM-DD',
    help='what a chat template that reads the clock is told; today by default',
  )
  parser.add_argument(
    '--replace',
    action='store_true',
    help='remove files of an earlier run that this one does not write',
  )
  options = parser.parse_args(arguments)
  try:
    tokenizer = Tokenizer.load(options.source)
    clock = options.template == CHAT and reads_clock(tokenizer.chat_template)
    date = (options.date or datetime.date.today()) if clock else None
    tokenizer = tokenizer.with_format(options.template, options.stop, date)
    with folders.writing(
      options.output,
      ('*',),
      command='tokenizer',
      inputs=[options.source],
      replace=options.replace,
    ) as folder:
      tokenizer.save(folder)
  except (ValueError, OSError) as error:
    print(error, file=sys.stderr)
    return 1
  print(f'{options.output}: {tokenizer.describe()}, PAD {tokenizer.pad_id}')
  if clock:
    print(
      f'the chat template reads the clock; it is told {date} from now on '
      '(--date=YYYY-MM-DD)'
    )
  elif options.date:
    print('--date has no effect: no chat template here reads the clock')
  if tokenizer.chat_template and not options.template:
    print(
      'this tokenizer has a chat template and --template was not given: '
      'prompts are read as plain text; --template=chat uses it'
    )
  return 0


if __name__ == '__main__':
  command.end(main)
