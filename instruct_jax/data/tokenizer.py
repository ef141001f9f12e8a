"""Text to ids and back: the one place where text becomes what a model reads.

Training rows, rollouts, reward models, judges, benchmarks, the chat and length
tables all use it: `encode_prompts` gives the ids before a response,
`encode_responses` the response, with the token that ends it if asked, and
`encode_documents` other text. Prompt and response are encoded separately, so
that a prompt's ids never depend on what follows. No text can spell a special
token: `<eos>` typed by a user is plain text.

The template renders prompts. It is saved with the tokenizer, as are the tokens
that end an answer:

  ''            the prompt's text unchanged (the paper's raw prompts); answers
                end with EOS
  'chat'        the tokenizer's own chat template, applied to the prompt's
                turns; answers end with the template's end-of-turn token
  other text    a format string with one slot, {prompt}; answers end with EOS

  python -m instruct_jax.data.tokenizer hf:NAME --output=DIR --template=chat

prepares a published tokenizer: a separate PAD, the template, stop tokens. A
template that reads the clock gets a fixed date (`--date`).
"""

import codecs
import contextlib
import copy
import datetime
import functools
import hashlib
import json
import os
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
# A tokenizer's files; others in the folder, such as weights, are not read.
_FILES = (
  _FILE,
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
  'chat_template.json',
)
# Folder of additional templates.
TEMPLATES = 'additional_chat_templates'
# Texts after which a text may keep its ids; the first that works is used.
_ANCHORS = ('\n', 'a', '.', '0', ':')
# Stands in for an answer when the template around it is examined.
_MARK = '\ue000answer\ue001'
# OpenAI's two files, under OpenAI's names and under Hugging Face's.
_BPE_FILES = (
  ('encoder.json', 'vocab.bpe'),
  ('encoder.json.gz', 'vocab.bpe.gz'),
  ('vocab.json', 'merges.txt'),
)


class TemplateError(ValueError):
  """A chat template cannot render a prompt; the message names the prompt."""


class Tokenizer:
  """Encodes and decodes text.

  Attributes:
    vocab_size: number of ids, special tokens included.
    pad_id: pads rows; never a real token, so not EOS.
    eos_id: ends every document.
    end_id: ends every response of a training row: the chat template's end of
      a turn, or EOS.
    end_ids: everything that the chat template puts after an answer, from
      `end_id` on; empty if unknown.
    stop_ids: tokens that end a sampled response: EOS, then the others,
      including `end_id`.
    prefix_ids: precede every text (a BOS token, or nothing).
    bos_id: the BOS token, whether or not texts begin with it; or None.
    template: see the top of this file.
    fingerprint: SHA-256 of everything that determines a text's ids: vocabulary,
      merges, normalizer, pre-tokenizer, special ids, template and stop tokens.
      Checkpoints store it.
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

    `stop_ids` are additional tokens that end a response.

    Raises:
      ValueError: PAD or EOS is missing or they are the same, a stop token is
        PAD or not in the vocabulary, or the template cannot be used.
    """
    pad_id, eos_id = fast_tokenizer.pad_token_id, fast_tokenizer.eos_token_id
    if eos_id is None:
      raise ValueError(
        'the tokenizer has no EOS token; name it as eos_token in '
        'tokenizer_config.json (config.json has its number)'
      )
    if pad_id is None or pad_id == eos_id:
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
    # Without this, `<eos>` in a user's text would become the real EOS id.
    self._backend.encode_special_tokens = True
    self._backend.no_padding()
    self._backend.no_truncation()
    self.pad_id: int = pad_id
    self.eos_id: int = eos_id
    self.bos_id: int | None = fast_tokenizer.bos_token_id
    self._unk_id: int | None = fast_tokenizer.unk_token_id
    self.vocab_size: int = len(fast_tokenizer)
    self.prefix_ids: tuple[int, ...] = self._read_prefix()
    self._marks_starts = _marks_starts(json.loads(self._backend.to_str()))
    self.end_id: int = eos_id
    self.end_ids: tuple[int, ...] = ()
    # The template's text before and after an answer, if it is known.
    self._around_answer: tuple[str, str] | None = None
    self._trims_answers = False
    # What the template puts before an answer only in a generation prompt.
    self.only_asked = ''
    if template == CHAT:
      self._chat_template = _checked_chat_template(fast_tokenizer.chat_template)
    self._protect(stop_ids)
    if template == CHAT:
      self._read_template(set(stop_ids))
    others = sorted({*stop_ids, self.end_id} - {eos_id})
    self.stop_ids: tuple[int, ...] = (eos_id, *others)

  def _read_prefix(self):
    """The ids that the tokenizer puts before a text, without EOS."""
    plain, whole = (
      self._backend.encode('a', add_special_tokens=adds).ids
      for adds in (False, True)
    )
    starts = range(len(whole) - len(plain) + 1)
    found = [i for i in starts if whole[i : i + len(plain)] == plain]
    # A text without ids, for a vocabulary that lacks its letter.
    start = found[0] if plain and found else len(whole)
    after = [i for i in whole[start + len(plain) :] if i != self.eos_id]
    if after:
      names = self._fast_tokenizer.convert_ids_to_tokens(after)
      raise ValueError(
        f'the tokenizer puts {" ".join(names)} after each text, and a response '
        'could not follow; leave it out of post_processor in tokenizer.json'
      )
    return tuple(i for i in whole[:start] if i != self.eos_id)

  def _protect(self, stop_ids):
    """Makes stop tokens and the template's marks special, if they are added.

    Otherwise a text that spells one would become one.
    """
    self._added = self._backend.get_added_tokens_decoder()
    texts = ''
    if self.template == CHAT:
      roles = ('system', 'user', 'assistant', 'user')
      for start in (0, 1):
        turns = [{'role': role, 'content': '?'} for role in roles[start:]]
        with contextlib.suppress(TemplateError):
          texts += self._render(turns, '', add_generation_prompt=False)
    wanted = {
      number
      for number, token in self._added.items()
      if not token.special and (number in stop_ids or token.content in texts)
    }
    if not wanted:
      return
    described = json.loads(self._backend.to_str())
    for token in described['added_tokens']:
      token['special'] |= token['id'] in wanted
    self._backend = tokenizers.Tokenizer.from_str(json.dumps(described))
    self._backend.encode_special_tokens = True
    self._fast_tokenizer._tokenizer = self._backend
    self._added = self._backend.get_added_tokens_decoder()

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of all that determines ids: vocabulary, template, stop tokens."""
    if not self.template and self.stop_ids == (self.eos_id,):
      return self.vocabulary_fingerprint
    content = [self.vocabulary_fingerprint, self.template]
    if self.template == CHAT:
      given = self._fast_tokenizer.special_tokens_map
      # The special tokens that the template asks for by name.
      read = {k: v for k, v in given.items() if k in self._chat_template}
      content += [self._chat_template, {k: str(v) for k, v in read.items()}]
    else:
      content += ['']
    return _sha256([*content, self.stop_ids, self.end_id])

  @functools.cached_property
  def vocabulary_fingerprint(self) -> str:
    """SHA-256 of what turns plain text into ids."""
    described = json.loads(self._backend.to_str())
    model = described['model']
    if 'merges' in model:  # Stored as pairs or as joined texts.
      model['merges'] = [
        merge if isinstance(merge, str) else ' '.join(merge)
        for merge in model['merges']
      ]
    names = ('normalizer', 'pre_tokenizer', 'added_tokens')
    # The empty text shows what the post-processor adds.
    empty = self._backend.encode('', add_special_tokens=True).ids
    specials = [self.pad_id, self.eos_id]
    return _sha256([*(described[k] for k in names), model, empty, specials])

  def describe(self) -> str:
    """One line for reports: how this tokenizer reads prompts and ends them."""
    name = self._fast_tokenizer.convert_ids_to_tokens
    prompts = 'prompts in its chat template'
    if self.template != CHAT:
      shown = repr(self.template) if self.template else 'plain text'
      prompts = f'prompts as {shown}'
      if self.prefix_ids:
        prompts += f' after {" ".join(map(name, self.prefix_ids))}'
    return (
      f'{self.vocab_size:,} tokens ({self.fingerprint[:12]}), {prompts}, '
      f'answers end with {name(self.end_id)}, sampling stops at '
      f'{" ".join(map(name, self.stop_ids))}'
    )

  def encode(self, text: str) -> list[int]:
    """Ids of a text, with no special token before, inside or after it."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` for many texts at once, on all cores."""
    return list(map(self._without_specials, self._ids(texts)))

  def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids of whole texts, each after `prefix_ids`."""
    return [[*self.prefix_ids, *ids] for ids in self.encode_batch(texts)]

  def encode_prompts(
    self,
    prompts: Sequence[
      str | records.Prompt | records.Demonstration | records.Comparison
    ],
  ) -> list[list[int]]:
    """Ids of prompts as the template renders them, up to the response.

    The special tokens of a chat template are special; those that a message
    spells are text. A prompt without turns is a single user turn.

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

  def encode_answered(
    self,
    answered: Sequence[
      tuple[
        str | records.Prompt | records.Demonstration | records.Comparison, str
      ]
    ],
  ) -> list[list[int]]:
    """Ids of each (prompt, answer) as the chat template renders the two.

    What the template puts after the answer is included, so these are the ids
    of transformers' `apply_chat_template`, except that special tokens spelled
    in a message stay text. The answer is passed unchanged.

    Raises:
      ValueError: there is no chat template, or (TemplateError) it refuses a
        conversation.
    """
    if self.template != CHAT:
      _checked_chat_template(self._fast_tokenizer.chat_template)
    chats = [
      ((*_turns_of(prompt), records.Turn('assistant', text)), _name_of(prompt))
      for prompt, text in answered
    ]
    return self._encode_chats(chats, add_generation_prompt=False)

  def encode_responses(
    self, texts: Sequence[str], *, ended: bool = False
  ) -> list[list[int]]:
    """Ids of responses, to follow the ids of their prompts.

    With a chat template, white space at the start of a response is dropped,
    because the template ends in its own separator; what the template puts
    around an answer (a space, say) is added. `ended` appends `end_id` to each,
    as in training rows.
    """
    if self.template == CHAT:
      found = self._encode_answers([text.lstrip() for text in texts])
    else:
      found = self._encode_continuations(texts)
    return [[*ids, self.end_id] for ids in found] if ended else found

  def render_chat(
    self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool
  ) -> str:
    """The chat template's text for messages with `role` and `content`.

    Raises:
      ValueError: there is no chat template, or (TemplateError) it refuses them.
    """
    if self.template != CHAT:
      _checked_chat_template(self._fast_tokenizer.chat_template)
    return self._render(
      messages, 'the conversation', add_generation_prompt=add_generation_prompt
    )

  def encode_rendered(self, text: str) -> list[int]:
    """Ids of a rendered template.

    The special tokens that it spells are special; `prefix_ids` are not added.
    """
    return self._special_ids([text])[0]

  # --- Chat templates ---------------------------------------------------------

  @property
  def template_marks(self) -> tuple[str, ...]:
    """Special tokens that the chat template puts around turns; () if none."""
    if self.template != CHAT:
      return ()
    turns = [{'role': 'user', 'content': '?'}]
    text = self._render(turns, 'a question')
    special = (token for token in self._added.values() if token.special)
    return tuple(token.content for token in special if token.content in text)

  def _render(self, messages, name, add_generation_prompt=True):
    try:
      return self._fast_tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
      )
    # A template is a program, which can raise anything.
    except Exception as error:
      words = ' '.join(str(error).split()) or type(error).__name__
      raise TemplateError(
        f'{name}: the chat template refuses it: {words}'
      ) from error

  def _read_template(self, stop_ids):
    """Finds what the template puts around an answer, and how an answer ends."""
    question = [{'role': 'user', 'content': '?'}]
    # White space that no template writes shows whether it trims an answer.
    spaced = f'\u2003{_MARK}\u2003'
    answered = [*question, {'role': 'assistant', 'content': spaced}]
    name = 'a conversation of one question'
    asked = self._render(question, name)
    (self._question_ids,) = self._special_ids([asked])
    try:
      whole = self._render(answered, name, add_generation_prompt=False)
    except TemplateError:
      return
    self._trims_answers = spaced not in whole
    mark = _MARK if self._trims_answers else spaced
    before, found, after = whole.partition(mark)
    if not found:
      return
    ends = {number for number, token in self._added.items() if token.special}
    ends = (ends | {self.eos_id, *stop_ids}) - {self.pad_id}
    (after_ids,) = self._special_ids([after])
    found_ends = [token for token in after_ids if token in ends]
    if not found_ends:
      return
    self.end_id = found_ends[0]
    self.end_ids = tuple(after_ids[after_ids.index(self.end_id) :])
    if not before.startswith(asked):
      shared = len(os.path.commonprefix([before, asked]))
      self.only_asked = asked[shared:]
    else:
      end = self._fast_tokenizer.convert_ids_to_tokens(self.end_id)
      lead = before.removeprefix(asked)
      self._around_answer = (lead, after.partition(end)[0])

  def _spells_special(self, text):
    # Other added tokens, such as Qwen3's <think>, are text to templates.
    return any(
      token.special and token.content in text for token in self._added.values()
    )

  def _encode_chats(self, chats, add_generation_prompt=True):
    found, plain = [None] * len(chats), []
    for number, (turns, name) in enumerate(chats):
      if any(self._spells_special(turn.content) for turn in turns):
        found[number] = self._encode_spelled_chat(
          turns, name, add_generation_prompt
        )
      else:
        text = self._render([*map(vars, turns)], name, add_generation_prompt)
        _check_rendered(turns, text, name)
        plain.append((number, text))
    encoded = self._special_ids([text for _, text in plain])
    for (number, _), ids in zip(plain, encoded, strict=True):
      found[number] = ids
    return found

  def _encode_spelled_chat(self, turns, name, add_generation_prompt):
    """Ids of a chat whose messages spell a special token.

    Messages and pieces of the template are encoded separately, so only merges
    at the seams differ.
    """
    marks = [f'\ue000{number}\ue001' for number in range(len(turns))]
    pairs = list(zip(turns, marks, strict=True))
    messages = [{'role': turn.role, 'content': mark} for turn, mark in pairs]
    left = self._render(messages, name, add_generation_prompt)
    ids = []
    for turn, mark in pairs:
      piece, found, left = left.partition(mark)
      if not found:
        raise TemplateError(
          f'{name}: the chat template leaves out or reorders turns, and a '
          f'message spells a special token: {turn.content[:60]!r}; drop it'
        )
      ids += self._encode_template_piece(piece, first=not ids)
      ids += self._encode_continuations([turn.content])[0]
    return ids + self._encode_template_piece(left, first=not ids)

  def _encode_template_piece(self, piece, first):
    if first:
      return self._special_ids([piece])[0]
    return self._encode_continuations([piece], self._special_ids)[0]

  def _encode_answers(self, texts):
    """Answers as the template renders them after a question."""
    if self._around_answer is None:
      return self._encode_continuations(texts)
    question = {'role': 'user', 'content': '?'}
    rendered = [
      self._render(
        [question, {'role': 'assistant', 'content': text}],
        f'the response {text[:60]!r}',
        add_generation_prompt=False,
      )
      for text in texts
    ]
    start = len(self._question_ids)
    found = []
    for text, ids in zip(texts, self._special_ids(rendered), strict=True):
      answer = ids[start:]
      if (
        self._spells_special(text)
        or ids[:start] != self._question_ids
        or self.end_id not in answer
      ):
        found.append(self._encode_answer_apart(text))
      else:
        found.append(answer[: answer.index(self.end_id)])
    return found

  def _encode_answer_apart(self, text):
    lead, tail = self._around_answer
    if self._trims_answers:
      text = text.strip()
    # White space is encoded together with the adjacent words.
    if not lead.strip():
      text, lead = lead + text, ''
    if not tail.strip():
      text, tail = text + tail, ''
    pieces = [
      self._encode_template_piece(piece, first=False) if piece else []
      for piece in (lead, tail)
    ]
    (ids,) = self._encode_continuations([text])
    return [*pieces[0], *ids, *pieces[1]]

  # --- Ids --------------------------------------------------------------------

  def _encode_continuations(self, texts, encode=None):
    """Ids of texts that continue another text.

    Some tokenizers (Llama 2's, Mistral's) put a mark or a space before each
    text. For these, a text is encoded after an anchor, whose ids are removed.
    """
    encode = encode or self.encode_batch
    if not self._marks_starts:
      return encode(texts)
    found = [None if text else [] for text in texts]
    # The empty anchor is for texts that merge with every other anchor.
    for anchor in (*_ANCHORS, ''):
      missing = [i for i, ids in enumerate(found) if ids is None]
      if not missing:
        break
      (anchor_ids,) = encode([anchor]) if anchor else ([],)
      whole = encode([anchor + texts[i] for i in missing])
      for i, ids in zip(missing, whole, strict=True):
        if ids[: len(anchor_ids)] == anchor_ids:
          found[i] = ids[len(anchor_ids) :]
    return found

  def _ids(self, texts):
    encodings = self._backend.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [encoding.ids for encoding in encodings]

  def _special_ids(self, texts):
    """Ids of texts in which special tokens are special."""
    self._backend.encode_special_tokens = False
    try:
      return self._ids(texts)
    finally:
      self._backend.encode_special_tokens = True

  def _without_specials(self, ids: list[int]) -> list[int]:
    # A word-level vocabulary has `<eos>` as a word; in a text it becomes <unk>.
    specials = (self.pad_id, self.eos_id)
    if not any(token in ids for token in specials):
      return ids
    if self._unk_id is None:
      raise ValueError(
        'a text spells a special token and the tokenizer has no <unk> to put '
        f'in its place: {self._backend.decode(ids)[:60]!r}'
      )
    return [self._unk_id if token in specials else token for token in ids]

  def decode(self, ids: Collection[SupportsIndex]) -> str:
    """The text of some ids, without PAD, `prefix_ids` and stop tokens.

    Raises ValueError if an id is outside the vocabulary (the wrong tokenizer,
    or a model with more logits than its tokenizer has tokens).
    """
    return self._backend.decode(self._kept(ids), skip_special_tokens=False)

  def decode_response(self, ids: Collection[SupportsIndex]) -> str:
    """`decode` of a response that follows its prompt; keeps a first space."""
    kept = self._kept(ids)
    anchor = self.encode(_ANCHORS[0]) if self._marks_starts and kept else []
    whole, alone = (
      self._backend.decode(part, skip_special_tokens=False)
      for part in ([*anchor, *kept], anchor)
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
          f'id {token} is outside the {self.vocab_size} ids of this tokenizer'
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
    """Writes a folder in Hugging Face format, for `from_pretrained`.

    Files left over from an earlier tokenizer are removed.
    """
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
      self._fast_tokenizer.save_pretrained(temporary)
      for path in sorted(pathlib.Path(temporary).rglob('*')):
        if path.is_file():
          name = path.relative_to(temporary).as_posix()
          found[name] = path.read_bytes()
    name = self._fast_tokenizer.convert_ids_to_tokens
    stops = list(map(name, self.stop_ids[1:]))
    if self.template or stops or self._fast_tokenizer.chat_template:
      described = {'template': self.template, 'stop_tokens': stops}
      found[_FORMAT_FILE] = json.dumps(described, indent=2).encode()
    folder = epath.Path(folder)
    if (folder / TEMPLATES).exists():
      (folder / TEMPLATES).rmtree()
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
    """The same tokenizer with another template and additional stop tokens.

    `date` fixes the date of a chat template that reads the clock.

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
    stop_ids = (*self.stop_ids, *_ids_of(fast_tokenizer, stop_tokens))
    return Tokenizer(fast_tokenizer, template=template, stop_ids=stop_ids)

  @property
  def chat_template(self) -> str:
    """The tokenizer's own chat template; '' if there is none."""
    found = self._fast_tokenizer.chat_template
    return _one_template(found) if found else ''

  def scoring_template(self) -> str:
    """The chat template without what it puts after the last `end_id`.

    For reward models that read their score at that token.
    """
    text = self._fast_tokenizer.decode(self.end_ids[1:])
    if not text:
      return self.chat_template
    return (
      f'{{% set whole %}}{self.chat_template}{{% endset %}}'
      f'{{{{ whole[:-{len(text)}] if whole.endswith({json.dumps(text)}) '
      'else whole }}'
    )

  def serving_template(self) -> str:
    """A chat template, for servers, that gives the ids of `encode_prompts`.

    It is the tokenizer's own if prompts are rendered with that. A format string
    becomes a template for one question. '' for plain text, and if no template
    gives the same ids.
    """
    if self.template == CHAT:
      return self.chat_template
    if not self.template:
      return ''
    start = ''.join(
      self._fast_tokenizer.convert_ids_to_tokens(list(self.prefix_ids))
    )
    before, after = (
      json.dumps(text, ensure_ascii=False)  # As Jinja quotes.
      for text in self.template.split(SLOT)
    )
    question = 'How many are 3 of them?'
    rendered = start + self.template.replace(SLOT, question)
    if self._special_ids([rendered]) != self.encode_prompts([question]):
      return ''
    return (
      "{% if messages | length != 1 or messages[0]['role'] != 'user' %}"
      "{{ raise_exception('this model reads one question of a user') }}"
      f'{{% endif %}}{{{{ {json.dumps(start)} + {before} }}}}'
      f"{{{{ messages[0]['content'] }}}}{{{{ {after} }}}}"
    )

  @classmethod
  def load(cls, folder: epath.PathLike) -> 'Tokenizer':
    """Reads a folder that `save` or `save_pretrained` wrote, or `hf:NAME`.

    It also reads GPT-2's encoder.json and vocab.bpe. Stop tokens are those of
    generation_config.json (or else config.json) and those saved by `save`. A
    PAD is added if there is none or if it also ends responses or is part of the
    chat template. Only `hf:` ever downloads, and only the tokenizer's own files
    are read. Raises ValueError with the folder and what is missing or wrong in
    it.
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
      for pair in _BPE_FILES:
        if set(pair) <= set(names):
          return load_gpt2_bpe(*(folder / name for name in pair))
      raise ValueError(
        f'{folder}: {_FILE} is missing (found {", ".join(names) or "nothing"})'
        '; save the tokenizer in Hugging Face format there'
      )
    try:
      fast_tokenizer = _load_fast(folder, names)
      _check_added(
        fast_tokenizer,
        *(_read_object(folder / n) if n in names else {} for n in _FILES[:2]),
      )
      described = {'template': '', 'stop_tokens': []}
      if _FORMAT_FILE in names:
        described = _read_format(folder / _FORMAT_FILE)
      stop_ids = _ids_of(fast_tokenizer, described['stop_tokens'])
      for name in ('generation_config.json', 'config.json'):
        if name in names:
          stop_ids += _read_end_ids(folder / name)
          break
      ends = (None, fast_tokenizer.eos_token_id, *stop_ids)
      if fast_tokenizer.pad_token_id in ends or _is_in_template(
        fast_tokenizer, 'pad_token'
      ):
        # Published tokenizers pad with EOS or not at all.
        fast_tokenizer.add_special_tokens({'pad_token': PAD})
      return cls(
        fast_tokenizer, template=described['template'], stop_ids=stop_ids
      )
    except records.RecordError:
      raise
    # The Rust side raises bare `Exception` on a damaged file.
    except Exception as error:
      raise ValueError(
        f'{folder}: the tokenizer does not load: {error}'
      ) from error


def is_folder(folder: epath.Path) -> bool:
  """Whether a folder holds a tokenizer in the Hugging Face format."""
  return (folder / _FILE).exists()


def is_prepared(folder: epath.Path) -> bool:
  """Whether `save` wrote a prompt format with the folder's tokenizer."""
  return (folder / _FORMAT_FILE).exists()


def _sha256(content: Any) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _load_fast(folder: epath.Path, names: Sequence[str]) -> Any:
  import transformers  # Takes two seconds.

  wanted = [name for name in _FILES if name in names]
  if TEMPLATES in names:
    templates = [path.name for path in (folder / TEMPLATES).iterdir()]
    wanted += [f'{TEMPLATES}/{n}' for n in templates if n.endswith('.jinja')]
  with tempfile.TemporaryDirectory() as temporary:
    for name in wanted:
      target = pathlib.Path(temporary) / name
      target.parent.mkdir(exist_ok=True)
      # The libraries' readers cannot read a byte order mark.
      content = (folder / name).read_bytes().removeprefix(codecs.BOM_UTF8)
      records.check_start(folder / name, content)
      target.write_bytes(content)
    return transformers.PreTrainedTokenizerFast.from_pretrained(
      temporary, local_files_only=True
    )


def _read_object(path: epath.Path) -> dict[str, Any]:
  content = path.read_bytes()
  records.check_start(path, content)
  try:
    found = json.loads(content.decode('utf-8-sig'))
  except ValueError as error:
    raise records.RecordError(f'{path}: not JSON ({error})') from error
  if not isinstance(found, dict):
    raise records.RecordError(f'{path}: is not a JSON object')
  return found


def _read_format(path: epath.Path) -> dict[str, Any]:
  """The `template` and `stop_tokens` that `save` wrote."""
  found = _read_object(path)
  tokens = found.get('stop_tokens')
  if (
    not isinstance(found.get('template'), str)
    or not isinstance(tokens, list)
    or not all(isinstance(token, str) for token in tokens)
  ):
    raise records.RecordError(
      f"{path}: needs 'template', a text, and 'stop_tokens', a list of texts"
    )
  return found


def _read_end_ids(path: epath.Path) -> list[int]:
  """The ids in `eos_token_id` of a model's config."""
  found = _read_object(path).get('eos_token_id')
  ids = found if isinstance(found, list) else [found]
  if found is not None and not all(type(number) is int for number in ids):
    raise records.RecordError(
      f"{path}: 'eos_token_id' is {found!r:.60}; it must be an id or a list of "
      'ids'
    )
  return [] if found is None else ids


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
  names = ('normalizer', 'pre_tokenizer', 'normalizers', 'pretokenizers')
  return kind == 'Prepend' or any(
    _marks_starts(described.get(name)) for name in names
  )


# --- Chat templates -----------------------------------------------------------


def _one_template(found: Any) -> str:
  """The chat template; of several named ones, the one called 'default'.

  Raises ValueError if there is none, or none of several is called 'default'.
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
  """Whether a chat template uses the current time.

  Raises ValueError if it does not parse, or generates random text.
  """
  import jinja2
  import jinja2.ext
  import jinja2.meta

  class Generation(jinja2.ext.Extension):
    """The tag around the assistant's words."""

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
    raise ValueError(f'the chat template does not parse: {error}') from error
  names = jinja2.meta.find_undeclared_variables(parsed)
  filters = {node.name for node in parsed.find_all(jinja2.nodes.Filter)}
  if 'lipsum' in names or 'random' in filters:
    raise ValueError(
      'the chat template generates random text (lipsum, random), so a prompt '
      'would have other ids each time; remove them'
    )
  return 'strftime_now' in names


def _pinned(template: str, date: datetime.date) -> str:
  """The template with its clock fixed at midnight of a date."""
  then = datetime.datetime.combine(date, datetime.time())
  known = [f'%{letter}' for letter in 'aAwdbBmyYHIMSpfjUWcxXzZeDFTRGuV']
  # glibc's variants without leading zeros.
  known += [f'%-{letter}' for letter in 'dmyHIMSj']
  replaced = ''.join(
    f'|replace({directive!r}, {then.strftime(directive)!r})'
    for directive in known
  )
  return (
    '{%- macro strftime_now(format) -%}{{- format' + replaced + ' -}}'
    # The plus keeps a line break at the start of the template.
    '{%- endmacro +%}' + template
  )


def _check_rendered(turns, text: str, name: str) -> None:
  """Raises TemplateError if a template left out what someone asked."""
  for turn in turns:
    # Of answers, templates leave out thoughts.
    if turn.role != 'assistant' and turn.content.strip() not in text:
      raise TemplateError(
        f'{name}: the chat template leaves out or changes the {turn.role} turn '
        f'{turn.content[:60]!r}'
      )


def _is_in_template(fast_tokenizer: Any, name: str) -> bool:
  """Whether a chat template puts a special token ('pad_token') somewhere."""
  found, token = (
    fast_tokenizer.chat_template or '',
    getattr(fast_tokenizer, name),
  )
  texts = [found] if isinstance(found, str) else found.values()
  return any(name in text or token in text for text in texts)


def _check_added(
  fast_tokenizer: Any, described: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
  """Checks that special and added tokens have the ids that the files give.

  Args:
    described, settings: tokenizer.json and tokenizer_config.json.

  Raises:
    ValueError: a token was made up, or got another id, as it was loaded.
  """
  added = {t['content']: t['id'] for t in described.get('added_tokens') or ()}
  for number, token in (settings.get('added_tokens_decoder') or {}).items():
    added.setdefault(token['content'], int(number))
  ids = fast_tokenizer.get_vocab()
  for token, number in added.items():
    if ids.get(token) != number:
      raise ValueError(
        f'{_FILE} gives {token!r} the id {number}, which it cannot have: ids '
        'must go on from the last without a gap'
      )
  vocabulary = (described.get('model') or {}).get('vocab') or {}
  if not isinstance(vocabulary, dict):  # Unigram: pieces with scores.
    vocabulary = {piece[0] for piece in vocabulary}
  for name, token in fast_tokenizer.special_tokens_map.items():
    if name != 'pad_token' and token not in added and token not in vocabulary:
      raise ValueError(
        f'{name} {token!r} of tokenizer_config.json is not in {_FILE}, so the '
        'model has never seen it; name one of its tokens'
      )


def _text_of(prompt: Any) -> str:
  if isinstance(prompt, str):
    return prompt
  return prompt.text if isinstance(prompt, records.Prompt) else prompt.prompt


def _turns_of(prompt: Any) -> tuple[records.Turn, ...]:
  turns = () if isinstance(prompt, str) else prompt.turns
  return turns or (records.Turn('user', _text_of(prompt)),)


def _name_of(prompt: Any) -> str:
  """What error messages call a prompt."""
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
  """Raises ValueError if a published model's folder has a different tokenizer.

  Policy, reward model and trainer pass ids to each other, never text. Folders
  without a tokenizer are accepted, as are this project's own models, which
  carry a fingerprint.
  """
  if folder.startswith('hf:'):
    folder = str(hub.locate(folder, _HUB_PATTERNS))
  path = epath.Path(folder)
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
  """A tokenizer with one id per word.

  Ids 0, 1, 2 are <pad>, <eos>, <unk>; those of the vocabulary follow in order.
  Text is split at white space, and `decode` joins with single spaces.

  Raises:
    ValueError: a word is empty, contains white space or is repeated.
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
  return _wrap(backend, pad_token=PAD, eos_token=EOS, unk_token=UNK)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Trains a byte-level BPE tokenizer (GPT-2's kind).

  It can encode any text, and decoding restores it byte for byte. <pad> is 0,
  <eos> is 1. There are at most `vocab_size` ids (fewer if the texts run out of
  pairs), and at least 258: 256 bytes and two special tokens.
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
  return _wrap(backend, pad_token=PAD, eos_token=EOS)


def load_gpt2_bpe(
  encoder_json: epath.PathLike, vocab_bpe: epath.PathLike
) -> Tokenizer:
  """The tokenizer of GPT-2 and GPT-3 from OpenAI's two files, plain or `.gz`.

  `encoder.json` maps token to id; `vocab.bpe` has one merge per line, best
  first. The ids are the 50,257 as published (<|endoftext|>, the EOS, is 50256)
  and a PAD as id 50257: the paper's models share one id for both uses, which
  `types.TextBatch` forbids.

  Raises:
    RecordError: a file is missing or not what its name says.
  """
  vocabulary = records.read_json(encoder_json)
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
  return _wrap(backend, pad_token=PAD, eos_token=end_of_text)


def _byte_level(model: Any) -> tokenizers.Tokenizer:
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  return backend


def _wrap(backend: tokenizers.Tokenizer, **specials: str) -> Tokenizer:
  import transformers  # Takes two seconds.

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
    help='for a chat template that reads the clock; today by default',
  )
  folders.add_replace(parser)
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
      f'the chat template reads the clock; its date is {date} from now on '
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
