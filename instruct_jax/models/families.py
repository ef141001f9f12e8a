"""The published families: what their config.json says and how weights are laid.

Only names, numbers and layouts: nothing here knows a device. What a field of
config.json means is what `transformers` makes of it: its own configuration
classes fill in what is absent and read older spellings, and a field that its
code does not read is not read here either.
"""

import copy
import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

# Fields that change no logit of a forward pass without dropout.
_WITHOUT_EFFECT = frozenset(
  """
  _name_or_path architectures attention_dropout attn_pdrop bos_token_id
  chunk_size_feed_forward classifier_dropout dtype embd_pdrop eos_token_id
  gradient_checkpointing hidden_dropout id2label initializer_range is_decoder
  is_llama_config label2id max_window_layers model_type n_ctx num_labels
  output_attentions output_hidden_states output_past pad_token_id
  pretraining_tp problem_type resid_pdrop return_dict summary_activation
  summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
  task_specific_params tokenizer_class torch_dtype transformers.js_config
  transformers_version unsloth_version use_cache cache_implementation
  _attn_implementation attention_probs_dropout_prob hidden_dropout_prob rotary
  """.split()  # noqa: SIM905
)
# Fields that are handled at one value only, which is the usual one.
_ONLY = {
  'add_cross_attention': False,
  'attention_bias': False,
  'is_encoder_decoder': False,
  'mlp_bias': False,
  'reorder_and_upcast_attn': False,
  'rope_interleaved': False,
  'scale_attn_by_inverse_layer_idx': False,
  'scale_attn_weights': True,
  'use_bidirectional_attention': False,
  'use_mrope': False,
}
_ACTIVATIONS = {
  'gelu_new': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'gelu_accurate': 'gelu_tanh',
  'gelu_python_tanh': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_python': 'gelu',
  'gelu': 'gelu',
  'silu': 'silu',
  'swish': 'silu',
  'relu': 'relu',
}
FAMILIES = {
  'gpt2': 'GPT2LMHeadModel',
  'gptj': 'GPTJForCausalLM',
  'gpt_neox': 'GPTNeoXForCausalLM',
  'llama': 'LlamaForCausalLM',
  'mistral': 'MistralForCausalLM',
  'qwen2': 'Qwen2ForCausalLM',
  'qwen3': 'Qwen3ForCausalLM',
  'gemma': 'GemmaForCausalLM',
  'gemma2': 'Gemma2ForCausalLM',
  'gemma3_text': 'Gemma3ForCausalLM',
}
# Spellings that the reference's configuration classes read and rewrite.
_ROTARY = ('partial_rotary_factor', 'rope_parameters', 'rope_scaling')
_OLDER = {
  'gpt_neox': (*_ROTARY, 'rope_theta', 'rotary_emb_base', 'rotary_pct'),
  'gemma3_text': (
    *_ROTARY,
    'rope_theta',
    'rope_local_base_freq',
    'sliding_window_pattern',
    '_sliding_window_pattern',
  ),
  **dict.fromkeys(
    ('llama', 'mistral', 'qwen2', 'qwen3', 'gemma', 'gemma2'),
    (*_ROTARY, 'rope_theta', 'original_max_position_embeddings'),
  ),
}
_ROPE_TYPES = ('default', 'linear', 'dynamic', 'llama3', 'yarn')
# In these the name of the activation has two fields, of which one is read.
_OTHER_ACTIVATION = {
  'gemma': 'hidden_activation',
  'gemma2': 'hidden_act',
  'gemma3_text': 'hidden_act',
}
# Defaults of the reference that are a certain model's size and no convention.
_SIZES = (
  'vocab_size',
  'hidden_size',
  'num_hidden_layers',
  'num_attention_heads',
  'max_position_embeddings',
)


class _Fields:
  """A config.json as the reference reads it, and which fields were read."""

  def __init__(self, family: str, values: Mapping[str, Any]):
    self.family, self.values = family, values
    if family in _OLDER:
      _check_rope_types(values)
    self.resolved = _as_reference(family, values)
    aliases = getattr(self.resolved, 'attribute_map', {})
    for name in _SIZES:
      if name not in values and aliases.get(name) not in values:
        raise ValueError(f'config.json: {aliases.get(name, name)} is missing')
    self.aliases = {own: name for name, own in aliases.items()}
    self.read = {'num_tokens', 'score_shift', *_OLDER.get(family, ())}
    self.read |= {_OTHER_ACTIVATION.get(family)}

  def take(self, name: str, *default: Any) -> Any:
    """The reference's value; a default is for what its class may not have."""
    self.read |= {name, self.aliases.get(name)}
    return getattr(self.resolved, name, *default)

  def finish(self) -> None:
    """Refuses what the file says and nothing here has read."""
    ignored = self.read | _WITHOUT_EFFECT | _generation_fields()
    _refuse_rest(self.values, ignored, self.family)


def _check_rope_types(values):
  for name in ('rope_parameters', 'rope_scaling'):
    parameters = values.get(name) or {}
    for each in (parameters, *parameters.values()):
      if not isinstance(each, Mapping):
        continue
      kind = each.get('rope_type', each.get('type', 'default'))
      if kind not in _ROPE_TYPES:
        raise ValueError(f'config.json: rope_type {kind!r} is not handled')


def _refuse_rest(values, ignored, family, where=''):
  for name, value in values.items():
    if name in ignored or value is None:
      continue
    if name in _ONLY and value == _ONLY[name]:
      continue
    raise ValueError(
      f'config.json: {where}{name} = {value!r} is not handled for '
      f'{family}; remove the field only if it changes nothing'
    )


def _generation_fields() -> set[str]:
  """Of how to sample: the reference keeps them out of the model."""
  import transformers

  return set(transformers.GenerationConfig().to_dict())


def _as_reference(family, values):
  """The configuration object that `transformers` makes of a config.json."""
  # A second to import; presets do not need it.
  import transformers

  model_type = family
  if family == 'mistral' and 'layer_types' in values:
    model_type = 'ministral'  # As its AutoConfig does.
  values = copy.deepcopy({**values, 'model_type': model_type})
  level = transformers.logging.get_verbosity()
  transformers.logging.set_verbosity_error()
  try:
    with warnings.catch_warnings(action='ignore'):  # Of older spellings.
      resolved = transformers.CONFIG_MAPPING[model_type].from_dict(values)
    if getattr(resolved, 'rope_parameters', None):
      # Its rotary functions do so once more, and then see all fields.
      resolved.standardize_rope_params()
  # Validation errors of several kinds, and whatever odd values lead to.
  except Exception as error:
    reason = str(error).strip().splitlines() or ['']
    raise ValueError(
      f'config.json: transformers {transformers.__version__} refuses it for '
      f'{family}: {reason[-1].strip()}'
    ) from error
  finally:
    transformers.logging.set_verbosity(level)
  return resolved


def read_config(config_json: Mapping[str, Any]) -> dict[str, Any]:
  """`TransformerConfig` fields, as `TransformerConfig.from_dict` takes them.

  Args:
    config_json: the content of a model folder's config.json.

  Raises:
    ValueError: an architecture, field or value that is not handled, by name.
  """
  if 'model_type' not in config_json:
    raise ValueError('config.json: model_type is missing')
  family = config_json['model_type']
  if family not in FAMILIES:
    raise ValueError(
      f'config.json: model_type {family!r} is not handled; known: '
      f'{", ".join(FAMILIES)}'
    )
  fields = _Fields(family, config_json)
  if family in ('gpt2', 'gptj'):
    values = _gpt(family, fields)
  elif family == 'gpt_neox':
    values = _gpt_neox(fields)
  else:
    values = _llama_like(family, fields)
  values['embedding_rows'] = values['vocab_size'] = fields.take('vocab_size')
  values['tied'] = fields.take('tie_word_embeddings')
  # Of our own exports: how many of the rows are tokens.
  values['vocab_size'] = config_json.get('num_tokens', values['vocab_size'])
  values['vocab_multiple'] = 1
  fields.finish()
  return values


def score_pad_id(config_json: Mapping[str, Any]) -> int:
  """The token that a published sequence classifier skips at a row's end.

  It reads its score at a row's last token that is not `pad_token_id`, which is
  often the EOS. -1: it has none and reads at the last token.

  Raises:
    ValueError: it has another number of labels than one.
  """
  resolved = _as_reference(config_json['model_type'], config_json)
  if resolved.num_labels != 1:
    raise ValueError(
      f'config.json: {resolved.num_labels} labels (id2label, num_labels; two '
      'where neither is given); a reward model has one'
    )
  return -1 if resolved.pad_token_id is None else resolved.pad_token_id


def _activation(name: str) -> str:
  if name not in _ACTIVATIONS:
    raise ValueError(f'config.json: activation {name!r} is not handled')
  return _ACTIVATIONS[name]


def _gpt(family, fields):
  width, num_heads = fields.take('n_embd'), fields.take('n_head')
  inner = fields.take('n_inner')
  values = {
    'context_length': fields.take('n_positions'),
    'num_layers': fields.take('n_layer'),
    'width': width,
    'num_heads': num_heads,
    'head_dim': width // num_heads,
    'mlp_dim': 4 * width if inner is None else inner,
    'norm_epsilon': fields.take('layer_norm_epsilon'),
    'activation': _activation(fields.take('activation_function')),
  }
  if family == 'gptj':
    values |= {
      'rotary': {'dim': fields.take('rotary_dim'), 'interleaved': True},
      'residual': 'parallel_one_norm',
      'qkv_bias': False,
      'out_bias': False,
      'unembed_bias': True,
    }
    fields.take('scale_attn_weights', True)  # GPT-J's code does not read it.
  return values


def _gpt_neox(fields):
  width, num_heads = (
    fields.take('hidden_size'),
    fields.take('num_attention_heads'),
  )
  context = fields.take('max_position_embeddings')
  parallel = fields.take('use_parallel_residual')
  bias = fields.take('attention_bias')
  parameters = fields.take('rope_parameters')
  return {
    'context_length': context,
    'num_layers': fields.take('num_hidden_layers'),
    'width': width,
    'num_heads': num_heads,
    'head_dim': width // num_heads,
    'mlp_dim': fields.take('intermediate_size'),
    'norm_epsilon': fields.take('layer_norm_eps'),
    'activation': _activation(fields.take('hidden_act')),
    'rotary': _rotary(parameters, width // num_heads, context, partial=True),
    'residual': 'parallel' if parallel else 'sequential',
    'qkv_bias': bias,
    'out_bias': bias,
  }


def _llama_like(family, fields):
  gemma = family.startswith('gemma')
  width, num_heads = (
    fields.take('hidden_size'),
    fields.take('num_attention_heads'),
  )
  num_layers = fields.take('num_hidden_layers')
  head_dim = fields.take('head_dim', width // num_heads)
  if head_dim is None:
    raise ValueError(
      f'config.json: head_dim is null or missing, which transformers does not '
      f'read for {family} with these fields; give it'
    )
  activation = fields.take(
    'hidden_activation' if family in ('gemma2', 'gemma3_text') else 'hidden_act'
  )
  # The others have no such field, or ignore it; `_ONLY` refuses it there.
  biased = family in ('llama', 'qwen3') or gemma
  bias = biased and fields.take('attention_bias')
  window, window_layers = _windows(family, fields, num_layers)
  rotary, window_rotary = _rotaries(family, fields, head_dim, window_layers)
  values = {
    'context_length': fields.take('max_position_embeddings'),
    'num_layers': num_layers,
    'width': width,
    'num_heads': num_heads,
    'num_kv_heads': fields.take('num_key_value_heads'),
    'head_dim': head_dim,
    'mlp_dim': fields.take('intermediate_size'),
    'norm': 'rms_plus_one' if gemma else 'rms',
    'norm_epsilon': fields.take('rms_norm_eps'),
    'activation': _activation(activation),
    'rotary': rotary,
    'window_rotary': window_rotary,
    'window': window,
    'window_layers': window_layers,
    'gated_mlp': True,
    'qkv_bias': bias or family == 'qwen2',
    'out_bias': bias,
    'mlp_bias': family == 'llama' and fields.take('mlp_bias'),
    'qk_norm': family in ('qwen3', 'gemma3_text'),
  }
  if gemma:
    values['embedding_scale'] = math.sqrt(width)
  if family in ('gemma2', 'gemma3_text'):
    values |= {
      'post_norms': True,
      'query_scale': fields.take('query_pre_attn_scalar') ** -0.5,
      'attention_softcap': _softcap(fields, 'attn_logit_softcapping'),
      'logit_softcap': _softcap(fields, 'final_logit_softcapping'),
    }
  if family == 'gemma3_text':
    # The field is there, and the reference's attention never gets it.
    values['attention_softcap'] = 0.0
  return values


def _softcap(fields, name):
  cap = fields.take(name)
  if cap is not None and not cap > 0:
    raise ValueError(f'config.json: {name} must be positive or null: {cap!r}')
  return cap or 0.0


def _windows(family, fields, num_layers):
  """The window and the layers that have it."""
  if family in ('llama', 'gemma'):
    return 0, ()
  window = fields.take('sliding_window')
  if family.startswith('qwen'):
    fields.take('use_sliding_window')
  kinds = fields.take('layer_types', None)
  if kinds is None:  # Mistral: all layers, or none.
    kinds = ['full_attention' if window is None else 'sliding_attention']
    kinds *= num_layers
  unknown = set(kinds) - {'sliding_attention', 'full_attention'}
  if unknown:
    raise ValueError(
      f'config.json: layer_types has kinds that are not handled: '
      f'{sorted(unknown)}'
    )
  near = [kind == 'sliding_attention' for kind in kinds]
  if not any(near):
    return 0, ()
  if window is None or window < 1:
    raise ValueError(
      f'config.json: {sum(near)} layers of layer_types have a sliding window, '
      f'and sliding_window is {window!r}'
      + (', or use_sliding_window off' if family.startswith('qwen') else '')
    )
  return window, near


def _rotaries(family, fields, head_dim, window_layers):
  """Rotary positions of plain and of windowed layers (None: the same)."""
  context = fields.take('max_position_embeddings')
  parameters = fields.take('rope_parameters')
  if family != 'gemma3_text':
    return _rotary(parameters, head_dim, context), None
  _refuse_rest(
    parameters,
    {'full_attention', 'sliding_attention', 'rope_type', 'rope_theta'},
    family,
    'rope_parameters.',
  )
  plain, near = (
    _rotary(parameters[kind], head_dim, context, nested=True)
    for kind in ('full_attention', 'sliding_attention')
  )
  if window_layers and all(window_layers):
    return near, None
  return plain, near if window_layers else None


def _rotary(values, head_dim, context, partial=False, nested=False):
  """One layer kind's rotary positions.

  Args:
    values: `rope_parameters` of the reference.
    head_dim: components of a head.
    context: `max_position_embeddings`.
    partial: whether the family's code can turn a part of a head.
    nested: whether the model has parameters for each kind of layer.
  """
  read = {'rope_type', 'type', 'partial_rotary_factor'}

  def number(name, *default):
    read.add(name)
    value = values.get(name)
    if value is None and default:
      return default[0]
    if not isinstance(value, int | float) or isinstance(value, bool):
      raise ValueError(
        f'config.json: rope_parameters.{name} must be a number: {value!r}'
      )
    return value

  kind = values.get('rope_type')
  if kind is None:
    raise ValueError(
      'config.json: rope_parameters for each kind of layer are not handled for '
      'this family; it has one rotary position for all layers'
    )
  part = values.get('partial_rotary_factor', 1.0)
  if not partial and kind == 'default':
    part = 1.0  # The reference's code for this family never reads it.
  elif not partial and int(head_dim * part) != head_dim:
    raise ValueError(
      f'config.json: partial_rotary_factor = {part!r} with rope_type {kind!r} '
      "is not handled; the reference's code turns whole heads"
    )
  rotary = {
    'dim': int(head_dim * part),
    'theta': float(number('rope_theta')),
  }
  if rotary['dim'] < 2 or rotary['dim'] % 2:
    raise ValueError(
      f'config.json: {part!r} of a head of {head_dim} turns {rotary["dim"]} '
      'components; only an even number, 2 or more, is handled'
    )
  if kind == 'linear':
    rotary |= {'scaling': kind, 'factor': number('factor')}
  elif kind == 'dynamic':
    # Stretches only what is longer than the context, which is an error here.
    number('factor')
    read.add('original_max_position_embeddings')
  elif kind == 'llama3':
    rotary |= {
      'scaling': kind,
      'factor': number('factor'),
      'original_context': number('original_max_position_embeddings'),
      'low': number('low_freq_factor'),
      'high': number('high_freq_factor'),
    }
    if rotary['low'] >= rotary['high']:
      raise ValueError(
        f'config.json: rope_parameters.low_freq_factor {rotary["low"]} must be '
        f'below high_freq_factor {rotary["high"]}'
      )
  elif kind == 'yarn':
    original = number('original_max_position_embeddings')
    factor = number('factor', context / original)
    # DeepSeek's spelling: two factors, where both are given and not 0.
    whole, each = number('mscale', 0), number('mscale_all_dim', 0)
    magnitude = _yarn_magnitude(factor)
    if whole and each:
      magnitude = _yarn_magnitude(factor, whole) / _yarn_magnitude(factor, each)
    rotary |= {
      'scaling': kind,
      'factor': factor,
      'original_context': original,
      'low': number('beta_slow', 1) or 1,
      'high': number('beta_fast', 32) or 32,
      # The reference looks for it beside the kinds of layers, not in them.
      'truncate': nested or bool(values.get('truncate', True)),
      'magnitude': number('attention_factor', magnitude),
    }
    read.add('truncate')
  else:
    # Of another type's fields the reference's default reads none.
    read |= {'factor', 'original_max_position_embeddings'}
  _refuse_rest(values, read, kind, 'rope_parameters.')
  return rotary


def _yarn_magnitude(factor: int | float, scale: int | float = 1) -> float:
  """Peng et al. 2023 (YaRN), section 3.4: sqrt(1/t) = 0.1 ln(s) + 1."""
  return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


# --- Weights ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
  """One parameter of ours inside one published tensor (a layer's, if stacked).

  Ours is `tensor.reshape(view)`, of it `part` = (axis, index) if several are
  fused, with its axes permuted.

  Attributes:
    path: below `trunk`, or the name of a head's parameter.
    name: of the published tensor; `{}` stands for the layer.
    view: its shape with the fused axes split.
    part: where ours lies if the tensor holds several of ours.
    order: permutation of the remaining axes.
  """

  path: tuple[str, ...]
  name: str
  view: tuple[int, ...]
  order: tuple[int, ...]
  part: tuple[int, int] | None = None

  @property
  def stacked(self) -> bool:
    return self.path[0] == 'layers'


def embedding_names(family: str) -> tuple[str, str]:
  """The published tensors of a language model's embedding and unembedding."""
  return {
    'gpt2': ('transformer.wte.weight', 'lm_head.weight'),
    'gptj': ('transformer.wte.weight', 'lm_head.weight'),
    'gpt_neox': ('gpt_neox.embed_in.weight', 'embed_out.weight'),
  }.get(family, ('model.embed_tokens.weight', 'lm_head.weight'))


def entries(family: str, config: Any, scalar: bool = False) -> list[Entry]:
  """Where each parameter of a model lies in the family's published tensors.

  Args:
    family: `model_type` of the config.json.
    config: the `TransformerConfig`.
    scalar: a sequence classifier with one label instead of a language model.
  """
  D, N, K = config.width, config.num_heads, config.kv_heads
  H, F = config.head_dim, config.mlp_dim
  rows = max(config.vocab_size, config.embedding_rows)
  found = []

  def plain(path, name, *shape):
    found.append(Entry(path, name, shape, tuple(range(len(shape)))))

  def linear(path, name, inner, outer):
    """[out, in] as in PyTorch; ours has the inputs first."""
    shape = (*outer, *inner)
    order = (*range(len(outer), len(shape)), *range(len(outer)))
    found.append(Entry(path, name, shape, order))

  def norm(path, name):
    plain((*path, 'scale'), f'{name}.weight', D)
    if config.norm == 'layer':
      plain((*path, 'bias'), f'{name}.bias', D)

  def layer(name):
    return ('layers', name)

  embedding, unembedding = embedding_names(family)
  plain(('token_embedding',), embedding, rows, D)
  if family == 'gpt2':
    top, block = 'transformer.', 'transformer.h.{}.'
    plain(('position_embedding',), top + 'wpe.weight', config.context_length, D)
    for index, name in enumerate(('query', 'key', 'value')):
      found.append(
        Entry(
          layer(f'{name}_kernel'),
          block + 'attn.c_attn.weight',
          (D, 3, N, H),
          (0, 1, 2),
          (1, index),
        )
      )
      found.append(
        Entry(
          layer(f'{name}_bias'),
          block + 'attn.c_attn.bias',
          (3, N, H),
          (0, 1),
          (0, index),
        )
      )
    plain(layer('out_kernel'), block + 'attn.c_proj.weight', N, H, D)
    plain(layer('out_bias'), block + 'attn.c_proj.bias', D)
    plain(layer('up_kernel'), block + 'mlp.c_fc.weight', D, F)
    plain(layer('up_bias'), block + 'mlp.c_fc.bias', F)
    plain(layer('down_kernel'), block + 'mlp.c_proj.weight', F, D)
    plain(layer('down_bias'), block + 'mlp.c_proj.bias', D)
    norm(layer('attention_norm'), block + 'ln_1')
    norm(layer('mlp_norm'), block + 'ln_2')
    norm(('final_norm',), top + 'ln_f')
  elif family == 'gptj':
    top, block = 'transformer.', 'transformer.h.{}.'
    for name, short in (('query', 'q'), ('key', 'k'), ('value', 'v')):
      linear(
        layer(f'{name}_kernel'),
        f'{block}attn.{short}_proj.weight',
        (D,),
        (N, H),
      )
    linear(layer('out_kernel'), block + 'attn.out_proj.weight', (N, H), (D,))
    linear(layer('up_kernel'), block + 'mlp.fc_in.weight', (D,), (F,))
    plain(layer('up_bias'), block + 'mlp.fc_in.bias', F)
    linear(layer('down_kernel'), block + 'mlp.fc_out.weight', (F,), (D,))
    plain(layer('down_bias'), block + 'mlp.fc_out.bias', D)
    norm(layer('attention_norm'), block + 'ln_1')
    norm(('final_norm',), top + 'ln_f')
  elif family == 'gpt_neox':
    top, block = 'gpt_neox.', 'gpt_neox.layers.{}.'
    for index, name in enumerate(('query', 'key', 'value')):
      found.append(
        Entry(
          layer(f'{name}_kernel'),
          block + 'attention.query_key_value.weight',
          (N, 3, H, D),
          (2, 0, 1),
          (1, index),
        )
      )
      if config.qkv_bias:
        found.append(
          Entry(
            layer(f'{name}_bias'),
            block + 'attention.query_key_value.bias',
            (N, 3, H),
            (0, 1),
            (1, index),
          )
        )
    linear(layer('out_kernel'), block + 'attention.dense.weight', (N, H), (D,))
    if config.out_bias:
      plain(layer('out_bias'), block + 'attention.dense.bias', D)
    linear(layer('up_kernel'), block + 'mlp.dense_h_to_4h.weight', (D,), (F,))
    plain(layer('up_bias'), block + 'mlp.dense_h_to_4h.bias', F)
    linear(layer('down_kernel'), block + 'mlp.dense_4h_to_h.weight', (F,), (D,))
    plain(layer('down_bias'), block + 'mlp.dense_4h_to_h.bias', D)
    norm(layer('attention_norm'), block + 'input_layernorm')
    norm(layer('mlp_norm'), block + 'post_attention_layernorm')
    norm(('final_norm',), top + 'final_layer_norm')
  else:
    top, block = 'model.', 'model.layers.{}.'
    for name, num in (('query', N), ('key', K), ('value', K)):
      published = f'{block}self_attn.{name[0]}_proj.'
      linear(layer(f'{name}_kernel'), published + 'weight', (D,), (num, H))
      if config.qkv_bias:
        plain(layer(f'{name}_bias'), published + 'bias', num, H)
    published = block + 'self_attn.o_proj.'
    linear(layer('out_kernel'), published + 'weight', (N, H), (D,))
    if config.out_bias:
      plain(layer('out_bias'), published + 'bias', D)
    if config.qk_norm:
      for name in ('query', 'key'):
        published = f'{block}self_attn.{name[0]}_norm.weight'
        plain(('layers', f'{name}_norm', 'scale'), published, H)
    for name, inner, outer in (('gate', D, F), ('up', D, F), ('down', F, D)):
      published = f'{block}mlp.{name}_proj.'
      linear(layer(f'{name}_kernel'), published + 'weight', (inner,), (outer,))
      if config.mlp_bias:
        plain(layer(f'{name}_bias'), published + 'bias', outer)
    norm(layer('attention_norm'), block + 'input_layernorm')
    if config.post_norms:
      norm(layer('attention_post_norm'), block + 'post_attention_layernorm')
      norm(layer('mlp_norm'), block + 'pre_feedforward_layernorm')
      norm(layer('mlp_post_norm'), block + 'post_feedforward_layernorm')
    else:
      norm(layer('mlp_norm'), block + 'post_attention_layernorm')
    norm(('final_norm',), top + 'norm')
  if scalar:
    found.append(Entry(('head_kernel',), 'score.weight', (1, D), (0,), (0, 0)))
    return found
  if not config.tied:
    plain(('unembedding',), unembedding, rows, D)
  if config.unembed_bias:
    name = unembedding.removesuffix('weight') + 'bias'
    plain(('unembedding_bias',), name, rows)
  return found


# --- And back -----------------------------------------------------------------


def family_of(config: Any) -> str:
  """The family whose published code computes what this config does."""
  if config.norm == 'layer':
    if config.rotary is None:
      return 'gpt2'
    return 'gptj' if config.rotary.interleaved else 'gpt_neox'
  if config.norm == 'rms_plus_one':
    if config.post_norms:
      return 'gemma3_text' if config.qk_norm else 'gemma2'
    return 'gemma'
  if config.qk_norm:
    return 'qwen3'
  if config.qkv_bias and not config.out_bias:
    return 'qwen2'
  return 'mistral' if config.window_layers else 'llama'


def write_config(config: Any) -> dict[str, Any]:
  """A config.json for a `TransformerConfig`; `read_config` is its inverse.

  Raises:
    ValueError: no published family has this combination of switches.
  """
  family = family_of(config)
  rows = max(config.vocab_size, config.embedding_rows)
  names = {name: published for published, name in _ACTIVATIONS.items()}
  names['gelu_tanh'] = (
    'gelu_new' if family in ('gpt2', 'gptj') else ('gelu_pytorch_tanh')
  )
  activation = names[config.activation]
  values = {
    'model_type': family,
    'architectures': [FAMILIES[family]],
    'vocab_size': rows,
    'num_tokens': config.vocab_size,
    'tie_word_embeddings': config.tied,
    'dtype': 'float32',
  }
  if family in ('gpt2', 'gptj'):
    values |= {
      'n_positions': config.context_length,
      'n_layer': config.num_layers,
      'n_embd': config.width,
      'n_head': config.num_heads,
      'n_inner': config.mlp_dim,
      'layer_norm_epsilon': config.norm_epsilon,
      'activation_function': activation,
    }
    if config.rotary is not None:
      values['rotary_dim'] = config.rotary.dim
  else:
    values |= {
      'max_position_embeddings': config.context_length,
      'num_hidden_layers': config.num_layers,
      'hidden_size': config.width,
      'num_attention_heads': config.num_heads,
      'intermediate_size': config.mlp_dim,
      'hidden_act': activation,
      'rope_parameters': _rope_parameters(config.rotary, config),
    }
    if family == 'gpt_neox':
      values |= {
        'layer_norm_eps': config.norm_epsilon,
        'use_parallel_residual': config.residual == 'parallel',
        'attention_bias': config.out_bias,
      }
    else:
      values['num_key_value_heads'] = config.kv_heads
      values['rms_norm_eps'] = config.norm_epsilon
    if family not in ('gpt_neox', 'qwen2'):
      values['head_dim'] = config.head_dim
    if family in ('llama', 'qwen3', 'gemma', 'gemma2', 'gemma3_text'):
      values['attention_bias'] = config.out_bias
    if family == 'llama':
      values['mlp_bias'] = config.mlp_bias
    if family in ('gemma2', 'gemma3_text'):
      values['hidden_activation'] = values.pop('hidden_act')
      values |= {
        'query_pre_attn_scalar': config.query_scale**-2,
        'attn_logit_softcapping': config.attention_softcap or None,
        'final_logit_softcapping': config.logit_softcap or None,
      }
      if float(values['query_pre_attn_scalar']).is_integer():
        values['query_pre_attn_scalar'] = int(values['query_pre_attn_scalar'])
    if family not in ('gpt_neox', 'llama', 'gemma'):
      values['sliding_window'] = config.window or None
    if family in ('qwen2', 'qwen3', 'gemma2', 'gemma3_text'):
      windowed = config.window_layers or (False,) * config.num_layers
      values['layer_types'] = [
        'sliding_attention' if near else 'full_attention' for near in windowed
      ]
    if family.startswith('qwen'):
      values['use_sliding_window'] = bool(config.window)
    if family == 'gemma3_text':
      values['rope_parameters'] = {
        'full_attention': values['rope_parameters'],
        'sliding_attention': _rope_parameters(
          config.window_rotary or config.rotary, config
        ),
      }
  again = type(config).from_dict(read_config(values)).to_dict()
  mine = config.to_dict() | {'num_kv_heads': config.kv_heads}
  again['num_kv_heads'] = again['num_kv_heads'] or again['num_heads']
  # Not of the published shape, or equal in effect.
  for name in (
    'dropout',
    'compute_dtype',
    'remat',
    'vocab_multiple',
    'scan_unroll',
    'embedding_rows',
    'window_rotary',
  ):
    del mine[name], again[name]
  for values_of in (mine, again):
    # Square roots of published integers come back up to rounding.
    values_of['query_scale'] = round(
      values_of['query_scale'] or config.head_dim**-0.5, 12
    )
  different = [name for name in mine if mine[name] != again[name]]
  if different:
    raise ValueError(
      f'no published family has this model: as {family} these would differ: '
      + ', '.join(f'{n} ({mine[n]!r}, {again[n]!r})' for n in different)
    )
  return values


def _rope_parameters(rotary, config):
  values = {'rope_theta': rotary.theta, 'rope_type': rotary.scaling}
  if rotary.scaling == 'none':
    values['rope_type'] = 'default'
  else:
    values['factor'] = rotary.factor
  if rotary.dim != config.head_dim:
    values['partial_rotary_factor'] = rotary.dim / config.head_dim
  elif config.norm == 'layer':
    values['partial_rotary_factor'] = 1.0
  if rotary.scaling in ('llama3', 'yarn'):
    values['original_max_position_embeddings'] = rotary.original_context
  if rotary.scaling == 'llama3':
    values['low_freq_factor'] = rotary.low
    values['high_freq_factor'] = rotary.high
  elif rotary.scaling == 'yarn':
    values['beta_slow'], values['beta_fast'] = rotary.low, rotary.high
    values['truncate'] = rotary.truncate
    values['attention_factor'] = rotary.magnitude
  return values
