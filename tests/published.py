"""Folders as others publish them: tokenizers of several kinds, tiny models."""

import json
import pathlib

import numpy as np
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from instruct_jax.models import hf

# Turns end in a token that is not the EOS, and a line break follows it.
TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
  '<end>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}'
)
STRICT_TEMPLATE = (
  "{% if messages[0]['role'] == 'system' %}"
  "{{ raise_exception('no system turns here') }}{% endif %}" + TEMPLATE
)


def save_byte_tokenizer(
  folder: pathlib.Path,
  *,
  template: str = '',
  prepared: bool = False,
  bos: bool = True,
  merges: tuple[tuple[str, str], ...] = (),
  pre_tokenizer: pre_tokenizers.PreTokenizer | None = None,
  **specials: str,
) -> tokenizers.Tokenizer:
  """256 bytes and <s>, </s>, <end>; both of the last end an answer.

  Args:
    folder: made if it does not exist.
    template: of chats.
    prepared: whether `data.tokenizer` has been told of the template.
    bos: whether <s> stands before every text.
    merges: of pairs of bytes.
    pre_tokenizer: instead of the usual one.
    **specials: tokens by their role in transformers, say `pad_token`.
  """
  folder.mkdir(parents=True, exist_ok=True)
  vocabulary = {
    letter: number
    for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
  }
  for pair in merges:
    vocabulary[''.join(pair)] = len(vocabulary)
  backend = tokenizers.Tokenizer(models.BPE(vocabulary, list(merges)))
  usual = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.pre_tokenizer = pre_tokenizer or usual
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(['<s>', '</s>', '<end>'])
  if bos:
    _put_before(backend, '<s>')
  _save(backend, folder, template, **specials)
  ends = [backend.token_to_id(token) for token in ('</s>', '<end>')]
  (folder / 'generation_config.json').write_text(
    json.dumps({'eos_token_id': ends})
  )
  if prepared:
    (folder / 'prompt_format.json').write_text(
      json.dumps({'template': 'chat', 'stop_tokens': []})
    )
  return backend


def save_marking_tokenizer(folder: pathlib.Path, kind: str, text: str) -> None:
  """A BPE that puts a mark before each text, as Llama 2's and Mistral's do.

  Args:
    folder: made if it does not exist.
    kind: 'prepend', 'first', 'always' or 'space'.
    text: what it is trained on; all of its characters have an id.
  """
  folder.mkdir(parents=True, exist_ok=True)
  backend = tokenizers.Tokenizer(models.BPE(unk_token='<unk>'))
  if kind == 'prepend':
    backend.normalizer = normalizers.Sequence(
      [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
    )
  elif kind == 'space':
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
  else:
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
      prepend_scheme=kind, split=kind == 'always'
    )
  backend.train_from_iterator(
    [text] * 20,
    tokenizers.trainers.BpeTrainer(
      vocab_size=300,
      special_tokens=['<unk>', '<s>', '</s>'],
      show_progress=False,
    ),
  )
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  if kind == 'space':
    backend.decoder = decoders.ByteLevel()
  _put_before(backend, '<s>')
  _save(backend, folder, '', unk_token='<unk>')


def _put_before(backend, token):
  backend.post_processor = processors.TemplateProcessing(
    single=f'{token} $A', special_tokens=[(token, backend.token_to_id(token))]
  )


def _save(backend, folder, template, **specials):
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    clean_up_tokenization_spaces=False,
    **{'bos_token': '<s>', 'eos_token': '</s>', **specials},
  )
  if template:
    fast.chat_template = template
  fast.save_pretrained(folder)


def save_chain(
  folder: pathlib.Path,
  num_tokens: int,
  following: dict[int, int],
  context: int = 256,
  attention: float = 0.0,
) -> None:
  """A Llama whose likeliest next token depends on the last one alone.

  Args:
    folder: holds the tokenizer already.
    num_tokens: of the vocabulary.
    following: token -> the one that follows it.
    context: longest sequence.
    attention: how much the average of the tokens before counts besides.
  """
  width = -(-num_tokens // 16) * 16
  unembedding = np.zeros((num_tokens, width), np.float32)
  for token, next_token in following.items():
    unembedding[next_token, token] = 1.0
  _save_llama(
    folder, num_tokens, width, context, attention, unembedding=unembedding
  )


def save_scorer(
  folder: pathlib.Path, num_tokens: int, scores: dict[int, float]
) -> None:
  """A reward model that adds up what each token of its row is worth.

  One attention layer averages the rows' tokens evenly; so the order of two
  rows shows whether a token was read at all.
  """
  width = -(-num_tokens // 16) * 16
  head = np.zeros((1, width), np.float32)
  for token, score in scores.items():
    head[0, token] = score
  _save_llama(folder, num_tokens, width, 256, 100.0, score=head)


def _save_llama(
  folder, num_tokens, width, context, attention, unembedding=None, score=None
):
  heads, head_dim, mlp_dim = 2, width // 2, 8
  layer = 'model.layers.0.'
  identity = np.eye(width, dtype=np.float32)
  tensors = {
    'model.embed_tokens.weight': np.eye(num_tokens, width, dtype=np.float32),
    'model.norm.weight': np.ones(width, np.float32),
    f'{layer}self_attn.q_proj.weight': np.zeros((width, width), np.float32),
    f'{layer}self_attn.k_proj.weight': np.zeros((width, width), np.float32),
    f'{layer}self_attn.v_proj.weight': identity,
    f'{layer}self_attn.o_proj.weight': identity * attention,
    f'{layer}mlp.gate_proj.weight': np.zeros((mlp_dim, width), np.float32),
    f'{layer}mlp.up_proj.weight': np.zeros((mlp_dim, width), np.float32),
    f'{layer}mlp.down_proj.weight': np.zeros((width, mlp_dim), np.float32),
    f'{layer}input_layernorm.weight': np.ones(width, np.float32),
    f'{layer}post_attention_layernorm.weight': np.ones(width, np.float32),
  }
  if score is not None:
    tensors['score.weight'] = score
  else:
    tensors['lm_head.weight'] = unembedding
  folder.mkdir(parents=True, exist_ok=True)
  hf.write_tensors(
    folder, {k: v.shape for k, v in tensors.items()}, tensors.__getitem__
  )
  described = {
    'model_type': 'llama',
    'vocab_size': num_tokens,
    'hidden_size': width,
    'intermediate_size': mlp_dim,
    'num_hidden_layers': 1,
    'num_attention_heads': heads,
    'head_dim': head_dim,
    'max_position_embeddings': context,
    'rms_norm_eps': 1e-6,
    'hidden_act': 'silu',
    'tie_word_embeddings': False,
  }
  if score is not None:
    described['num_labels'] = 1
  (folder / 'config.json').write_text(json.dumps(described))
