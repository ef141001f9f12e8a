"""The published families: fields of their config.json, names of their tensors.

Only names, numbers and layouts: nothing here depends on a device. A field of
config.json means what `transformers` (the reference) makes of it: its
configuration classes fill in missing fields and read older spellings, and a
field that its code does not read is not read here either.
"""

import copy
import dataclasses
import math
import sys
import warnings
from collections.abc import Mapping
from typing import Any

# Fields that do not affect the logits of a forward pass without dropout.
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
# Fields that are handled only at their usual value.
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
# Older spellings that the reference's configuration classes read and rewrite.
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
# These families have two fields for the activation; this one is not read.
_OTHER_ACTIVATION = {
  'gemma': 'hidden_activation',
  'gemma2': 'hidden_act',
  'gemma3_text': 'hidden_act',
}
# Fields without a usable default: the reference's is the size of one model.
_SIZES = (
  'vocab_size',
  'hidden_size',
  'num_hidden_layers',
  'num_attention_heads',
  'max_position_embeddings',
)


def _field_names(family: str) -> dict[str, str]:
  """Fields of `TransformerConfig` -> equivalent fields of config.json."""
  if family in ('gpt2', 'gptj'):
    return {
      'context_length': 'n_positions',
      'num_layers': 'n_layer',
      'width': 'n_embd',
      'num_heads': 'n_head',
      'mlp_dim': 'n_inner',
      'norm_epsilon': 'layer_norm_epsilon',
      'activation': 'activation_function',
    }
  names = {
    'context_length': 'max_position_embeddings',
    'num_layers': 'num_hidden_layers',
    'width': 'hidden_size',
    'num_heads': 'num_attention_heads',
    'mlp_dim': 'intermediate_size',
    'norm_epsilon': 'layer_norm_eps',
    'activation': 'hidden_act',
  }
  if family != 'gpt_neox':
    names |= {
      'norm_epsilon': 'rms_norm_eps',
      'num_kv_heads': 'num_key_value_heads',
    }
  if family in ('gemma2', 'gemma3_text'):
    names['activation'] = 'hidden_activation'
  return names


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
    ours = ('num_tokens', 'score_shift', 'score_end_ids')
    self.read = {*ours, *_OLDER.get(family, ())}
    self.read |= {_OTHER_ACTIVATION.get(family)}

  def take(self, name: str, *default: Any) -> Any:
    """The reference's value; the default is for fields its class may lack."""
    self.read |= {name, self.aliases.get(name)}
    return getattr(self.resolved, name, *default)

  def finish(self) -> None:
    """Refuses fields of the file that were not read."""
    import transformers

    # Sampling settings, which the reference keeps out of the model.
    generation = set(transformers.GenerationConfig().to_dict())
    ignored = self.read | _WITHOUT_EFFECT | generation
    _refuse_unread(self.values, ignored, self.family)


def _check_rope_types(values):
  for name in ('rope_parameters', 'rope_scaling'):
    parameters = values.get(name) or {}
    if not isinstance(parameters, Mapping):
      raise ValueError(
        f'config.json: {name} = {parameters!r} is not a JSON object'
      )
    for each in (parameters, *parameters.values()):
      if not isinstance(each, Mapping):
        continue
      kind = each.get('rope_type', each.get('type', 'default'))
      if kind not in _ROPE_TYPES:
        raise ValueError(f'config.json: rope_type {kind!r} is not handled')


def _refuse_unread(values, ignored, family, where=''):
  for name, value in values.items():
    if name in ignored or value is None:
      continue
    if name in _ONLY and value == _ONLY[name]:
      continue
    raise ValueError(
      f'config.json: {where}{name} = {value!r} is not handled for '
      f'{family}; remove the field only if it changes nothing'
    )


def _as_reference(family, values):
  """The configuration object that `transformers` makes of a config.json."""
  # The import takes a second, and presets do not need it.
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
      # The reference's rotary functions repeat this, and then see all fields.
      resolved.standardize_rope_params()
  # Validation errors of several kinds, and whatever errors odd values cause.
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
  """Values for `TransformerConfig.from_dict` from a folder's config.json.

  Raises:
    ValueError: names the architecture, field or value that is not handled.
  """
  if 'model_type' not in config_json:
    raise ValueError('config.json: model_type is missing')
  family = config_json['model_type']
  if given := config_json.get('quantization_config'):
    method = given.get('quant_method', '') if isinstance(given, dict) else given
    raise ValueError(
      f'config.json: its weights are quantised ({method or "no method"}); '
      'give the model before quantisation, in float32, bfloat16 or float16'
    )
  if not isinstance(family, str) or family not in FAMILIES:
    raise ValueError(
      f'config.json: model_type {family!r} is not handled; known: '
      f'{", ".join(FAMILIES)}'
    )
  fields = _Fields(family, config_json)
  values = {
    ours: fields.take(name) for ours, name in _field_names(family).items()
  }
  if values['activation'] not in _ACTIVATIONS:
    raise ValueError(
      f'config.json: activation {values["activation"]!r} is not handled'
    )
  values['activation'] = _ACTIVATIONS[values['activation']]
  if family in ('gpt2', 'gptj', 'gpt_neox'):
    values['head_dim'] = values['width'] // values['num_heads']
    values |= _gpt(family, fields, values)
  else:
    values |= _llama_like(family, fields, values)
  rows = fields.take('vocab_size')
  values |= {
    'embedding_rows': rows,
    # Our own exports say how many of the rows are tokens.
    'vocab_size': config_json.get('num_tokens', rows),
    'vocab_multiple': 1,
    'tied': fields.take('tie_word_embeddings'),
  }
  fields.finish()
  return values


def score_pad_id(config_json: Mapping[str, Any]) -> int:
  """Returns the token that a published sequence classifier skips at row ends.

  It reads its score at a row's last token that is not `pad_token_id`, which is
  often the EOS. -1 means that it has none and reads at the last token.

  Raises:
    ValueError: the number of labels is not one.
  """
  resolved = _as_reference(config_json['model_type'], config_json)
  for name in config_json.get('architectures') or ():
    if name.endswith(('ForCausalLM', 'LMHeadModel')):
      raise ValueError(
        f'config.json: {name} is a language model; a reward model is a '
        'sequence classifier with one label'
      )
  if resolved.num_labels != 1:
    raise ValueError(
      f'config.json: {resolved.num_labels} labels (id2label, num_labels; two '
      'where neither is given); a reward model has one'
    )
  return -1 if resolved.pad_token_id is None else resolved.pad_token_id


def _gpt(family, fields, values):
  """Config values of GPT-2, GPT-J and GPT-NeoX beyond `_field_names`."""
  if family == 'gpt_neox':
    parameters = fields.take('rope_parameters')
    parallel = fields.take('use_parallel_residual')
    bias = fields.take('attention_bias')
    return {
      'rotary': _rotary(
        parameters, values['head_dim'], values['context_length'], partial=True
      ),
      'residual': 'parallel' if parallel else 'sequential',
      'qkv_bias': bias,
      'out_bias': bias,
    }
  found = {}
  if values['mlp_dim'] is None:
    found['mlp_dim'] = 4 * values['width']
  if family == 'gptj':
    fields.take('scale_attn_weights', True)  # GPT-J's code does not read it.
    found |= {
      'rotary': {'dim': fields.take('rotary_dim'), 'interleaved': True},
      'residual': 'parallel_one_norm',
      'qkv_bias': False,
      'out_bias': False,
      'unembed_bias': True,
    }
  return found


def _llama_like(family, fields, values):
  """Config values of the other families beyond `_field_names`."""
  gemma = family.startswith('gemma')
  head_dim = fields.take('head_dim', values['width'] // values['num_heads'])
  if head_dim is None:
    raise ValueError(
      f'config.json: head_dim is null or missing, which transformers does not '
      f'read for {family} with these fields; give it'
    )
  # The others have no such field or ignore it; `_ONLY` refuses True there.
  biased = family in ('llama', 'qwen3') or gemma
  bias = biased and fields.take('attention_bias')
  window, window_layers = _windows(family, fields, values['num_layers'])
  rotary, window_rotary = _rotaries(
    family, fields, head_dim, values['context_length'], window_layers
  )
  found = {
    'head_dim': head_dim,
    'norm': 'rms_plus_one' if gemma else 'rms',
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
    found['embedding_scale'] = math.sqrt(values['width'])
  if family in ('gemma2', 'gemma3_text'):
    attention_softcap = _softcap(fields, 'attn_logit_softcapping')
    found |= {
      'post_norms': True,
      'query_scale': fields.take('query_pre_attn_scalar') ** -0.5,
      # Gemma 3 has the field, but the reference's attention ignores it.
      'attention_softcap': attention_softcap if family == 'gemma2' else 0.0,
      'logit_softcap': _softcap(fields, 'final_logit_softcapping'),
    }
  return found


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


def _rotaries(family, fields, head_dim, context, window_layers):
  """Rotary positions of plain and of windowed layers (None: the same)."""
  parameters = fields.take('rope_parameters')
  if family != 'gemma3_text':
    return _rotary(parameters, head_dim, context), None
  kinds = ('full_attention', 'sliding_attention')
  _refuse_unread(
    parameters,
    {*kinds, 'rope_type', 'rope_theta'},
    family,
    'rope_parameters.',
  )
  plain, near = (
    _rotary(parameters[kind], head_dim, context, nested=True) for kind in kinds
  )
  if window_layers and all(window_layers):
    return near, None
  return plain, near if window_layers else None


# YaRN's are 0 where they are not used; a share of 0 is refused as too few.
_MAY_BE_0 = (
  *('mscale', 'mscale_all_dim', 'beta_slow', 'beta_fast'),
  'partial_rotary_factor',
)


def _rotary(values, head_dim, context, partial=False, nested=False):
  """Rotary positions of one kind of layer.

  Args:
    values: `rope_parameters` of the reference.
    partial: whether the family's code can rotate a part of a head.
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
    least = 0 if name in _MAY_BE_0 else sys.float_info.min
    if not least <= value <= sys.float_info.max:
      raise ValueError(
        f'config.json: rope_parameters.{name} must be finite and '
        f'{"not negative" if least == 0 else "above 0"}: {value!r:.40}'
      )
    return value

  kind = values.get('rope_type')
  if kind is None:
    raise ValueError(
      'config.json: rope_parameters for each kind of layer are not handled for '
      'this family; it has one rotary position for all layers'
    )
  part = number('partial_rotary_factor', 1.0)
  if not partial and kind == 'default':
    part = 1.0  # The reference's code for this family never reads it.
  elif not partial and int(head_dim * part) != head_dim:
    raise ValueError(
      f'config.json: partial_rotary_factor = {part!r} with rope_type {kind!r} '
      "is not handled; the reference's code rotates whole heads"
    )
  dim = int(head_dim * part)
  rotary = {'dim': dim, 'theta': float(number('rope_theta'))}
  if dim < 2 or dim % 2:
    raise ValueError(
      f'config.json: {part!r} of a head of {head_dim} rotates {dim} '
      'components; only an even number, 2 or more, is handled'
    )
  if kind in ('linear', 'llama3', 'yarn'):
    rotary['scaling'] = kind
  else:
    # Dynamic scaling stretches only sequences longer than the context, which
    # are an error here; the default type ignores these fields.
    read |= {'factor', 'original_max_position_embeddings'}
  if kind == 'yarn':
    rotary |= _yarn(number, context)
    # The reference looks for `truncate` beside the kinds of layers, not inside.
    rotary['truncate'] = nested or bool(values.get('truncate', True))
    read.add('truncate')
  elif kind in ('linear', 'llama3'):
    rotary['factor'] = number('factor')
  elif kind == 'dynamic':
    number('factor')
  if kind == 'llama3':
    rotary |= {
      'original_context': number('original_max_position_embeddings'),
      'low': number('low_freq_factor'),
      'high': number('high_freq_factor'),
    }
    if rotary['low'] >= rotary['high']:
      raise ValueError(
        f'config.json: rope_parameters.low_freq_factor {rotary["low"]} must be '
        f'below high_freq_factor {rotary["high"]}'
      )
  _refuse_unread(values, read, kind, 'rope_parameters.')
  return rotary


def _yarn(number, context):
  """YaRN (Peng et al. 2023), section 3.4: sqrt(1/t) = 0.1 ln(s) + 1."""
  original = number('original_max_position_embeddings')
  factor = number('factor', context / original)

  def magnitude(scale):
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

  # DeepSeek's spelling: a ratio of two, where both are given and not 0.
  whole, each = number('mscale', 0), number('mscale_all_dim', 0)
  both = whole and each
  default = magnitude(whole) / magnitude(each) if both else magnitude(1)
  return {
    'factor': factor,
    'original_context': original,
    'low': number('beta_slow', 1) or 1,
    'high': number('beta_fast', 32) or 32,
    'magnitude': number('attention_factor', default),
  }


# --- Weights ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
  """One parameter of ours in a published tensor (of one layer, if stacked).

  Ours is `tensor.reshape(view)`, indexed by `part` = (axis, index) if the
  tensor holds several of ours, with its axes then permuted by `order`.

  Attributes:
    path: in our tree of parameters.
    name: of the published tensor, with `{}` for the layer.
    shape: of the published tensor.
    view: `shape` with the joined axes split.
    order: permutation of the axes of the part.
    part: None if the tensor holds only one of ours.
  """

  path: tuple[str, ...]
  name: str
  shape: tuple[int, ...]
  view: tuple[int, ...]
  order: tuple[int, ...]
  part: tuple[int, int] | None = None

  @property
  def stacked(self) -> bool:
    """Whether our parameter is one array of all layers."""
    return 'layers' in self.path


# Published modules of each family by our names; 'layer' is the prefix of those
# within a layer.
_LLAMA = {
  'token_embedding': 'model.embed_tokens',
  'layer': 'model.layers.{}.',
  'query': 'self_attn.q_proj',
  'key': 'self_attn.k_proj',
  'value': 'self_attn.v_proj',
  'out': 'self_attn.o_proj',
  'query_norm': 'self_attn.q_norm',
  'key_norm': 'self_attn.k_norm',
  'gate': 'mlp.gate_proj',
  'up': 'mlp.up_proj',
  'down': 'mlp.down_proj',
  'attention_norm': 'input_layernorm',
  'mlp_norm': 'post_attention_layernorm',
  'final_norm': 'model.norm',
  'unembedding': 'lm_head',
}
_GEMMA2 = _LLAMA | {
  'attention_post_norm': 'post_attention_layernorm',
  'mlp_norm': 'pre_feedforward_layernorm',
  'mlp_post_norm': 'post_feedforward_layernorm',
}
_MODULES = {
  'gpt2': {
    'token_embedding': 'transformer.wte',
    'position_embedding': 'transformer.wpe',
    'layer': 'transformer.h.{}.',
    **dict.fromkeys(('query', 'key', 'value'), 'attn.c_attn'),
    'out': 'attn.c_proj',
    'up': 'mlp.c_fc',
    'down': 'mlp.c_proj',
    'attention_norm': 'ln_1',
    'mlp_norm': 'ln_2',
    'final_norm': 'transformer.ln_f',
    'unembedding': 'lm_head',
  },
  'gptj': {
    'token_embedding': 'transformer.wte',
    'layer': 'transformer.h.{}.',
    'query': 'attn.q_proj',
    'key': 'attn.k_proj',
    'value': 'attn.v_proj',
    'out': 'attn.out_proj',
    'up': 'mlp.fc_in',
    'down': 'mlp.fc_out',
    'attention_norm': 'ln_1',
    'final_norm': 'transformer.ln_f',
    'unembedding': 'lm_head',
  },
  'gpt_neox': {
    'token_embedding': 'gpt_neox.embed_in',
    'layer': 'gpt_neox.layers.{}.',
    **dict.fromkeys(('query', 'key', 'value'), 'attention.query_key_value'),
    'out': 'attention.dense',
    'up': 'mlp.dense_h_to_4h',
    'down': 'mlp.dense_4h_to_h',
    'attention_norm': 'input_layernorm',
    'mlp_norm': 'post_attention_layernorm',
    'final_norm': 'gpt_neox.final_layer_norm',
    'unembedding': 'embed_out',
  },
  'gemma2': _GEMMA2,
  'gemma3_text': _GEMMA2,
}
# Output axes of a tensor that holds queries, keys and values.
_FUSED = {'gpt2': '3NH', 'gpt_neox': 'N3H'}


def embedding_names(family: str) -> tuple[str, str]:
  """Names of the published tensors of the embedding and the unembedding."""
  modules = _MODULES.get(family, _LLAMA)
  return tuple(
    f'{modules[name]}.weight' for name in ('token_embedding', 'unembedding')
  )


def entries(family: str, config: Any, scalar: bool = False) -> list[Entry]:
  """Returns where each parameter is in the family's published tensors.

  Args:
    family: `model_type` of the config.json.
    config: the `TransformerConfig`.
    scalar: for a sequence classifier with one label, not a language model.
  """
  modules, found = _MODULES.get(family, _LLAMA), []
  # Axes by their letters; C is the context, V the embedding rows, 3 the number
  # of fused parts.
  sizes = {
    'C': config.context_length,
    'D': config.width,
    'F': config.mlp_dim,
    'H': config.head_dim,
    'K': config.kv_heads,
    'N': config.num_heads,
    'V': max(config.vocab_size, config.embedding_rows),
    '3': 3,
  }

  def add(path, name, axes, ours='', number=0):
    """Adds an entry: ours, with axes `ours`, is part `number` of a tensor.

    `axes` are those of the tensor; ones without a space between are joined.
    """
    view = axes.replace(' ', '')
    kept = view.replace('3', '')
    found.append(
      Entry(
        path=('trunk', *path),
        name=name,
        shape=tuple(
          math.prod(sizes[axis] for axis in joined) for joined in axes.split()
        ),
        view=tuple(sizes[axis] for axis in view),
        order=tuple(kept.index(axis) for axis in ours or kept),
        part=(view.index('3'), number) if '3' in view else None,
      )
    )

  def linear(name, inner, outer, has_bias, number=0):
    module, view = modules['layer'] + modules[name], outer
    if name in ('query', 'key', 'value'):
      view = _FUSED.get(family, outer)  # With the axis of the parts.
    # Our kernels, as GPT-2's, have the inputs first; PyTorch's the outputs.
    axes = f'{inner} {view}' if family == 'gpt2' else f'{view} {inner}'
    path = ('layers', f'{name}_kernel')
    add(path, f'{module}.weight', axes, inner + outer, number)
    if has_bias:
      add(('layers', f'{name}_bias'), f'{module}.bias', view, outer, number)

  def norm(name, axis='D'):
    in_layer = name != 'final_norm'
    path = ('layers', name) if in_layer else (name,)
    module = modules['layer'] * in_layer + modules[name]
    add((*path, 'scale'), f'{module}.weight', axis)
    if config.norm == 'layer':
      add((*path, 'bias'), f'{module}.bias', axis)

  for name, axes in (('token_embedding', 'V D'), ('position_embedding', 'C D')):
    if name in modules:
      add((name,), f'{modules[name]}.weight', axes)
  kv_heads = 'NH' if family in _FUSED else 'KH'
  linear('query', 'D', 'NH', config.qkv_bias)
  linear('key', 'D', kv_heads, config.qkv_bias, 1)
  linear('value', 'D', kv_heads, config.qkv_bias, 2)
  linear('out', 'NH', 'D', config.out_bias)
  if config.qk_norm:
    norm('query_norm', 'H')
    norm('key_norm', 'H')
  for name, inner, outer in (
    ('gate', 'D', 'F'),
    ('up', 'D', 'F'),
    ('down', 'F', 'D'),
  ):
    if name in modules:
      linear(name, inner, outer, config.mlp_bias)
  for name in (
    'attention_norm',
    'attention_post_norm',
    'mlp_norm',
    'mlp_post_norm',
    'final_norm',
  ):
    if name in modules:
      norm(name)
  if scalar:
    shape = (1, config.width)
    head = Entry(('head_kernel',), 'score.weight', shape, shape, (0,), (0, 0))
    return [*found, head]
  if not config.tied:
    add(('unembedding',), f'{modules["unembedding"]}.weight', 'V D')
  if config.unembed_bias:
    add(('unembedding_bias',), f'{modules["unembedding"]}.bias', 'V')
  return found


# --- Writing ------------------------------------------------------------------


def _family_of(config: Any) -> str:
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
  family = _family_of(config)
  # The name in the families' own folders: other programs, such as vLLM, know no
  # other.
  activation = config.activation
  if activation == 'gelu_tanh':
    is_old = family in ('gpt2', 'gptj')
    activation = 'gelu_new' if is_old else 'gelu_pytorch_tanh'
  ours = config.to_dict() | {
    'num_kv_heads': config.kv_heads,
    'activation': activation,
  }
  values = {
    'model_type': family,
    'architectures': [FAMILIES[family]],
    'vocab_size': max(config.vocab_size, config.embedding_rows),
    'num_tokens': config.vocab_size,
    'tie_word_embeddings': config.tied,
    'dtype': 'float32',
    **{name: ours[own] for own, name in _field_names(family).items()},
  }
  if family == 'gptj':
    values['rotary_dim'] = config.rotary.dim
  elif family != 'gpt2':
    values['rope_parameters'] = _rope_parameters(config.rotary, config)
  if family == 'gpt_neox':
    values['use_parallel_residual'] = config.residual == 'parallel'
  if family not in ('gpt2', 'gptj', 'gpt_neox', 'qwen2'):
    values['head_dim'] = config.head_dim
  if family not in ('gpt2', 'gptj', 'mistral', 'qwen2'):
    values['attention_bias'] = config.out_bias
  if family == 'llama':
    values['mlp_bias'] = config.mlp_bias
  if family in ('gemma2', 'gemma3_text'):
    scalar = config.query_scale**-2
    values |= {
      'query_pre_attn_scalar': int(scalar) if scalar.is_integer() else scalar,
      'attn_logit_softcapping': config.attention_softcap or None,
      'final_logit_softcapping': config.logit_softcap or None,
    }
  if family in ('mistral', 'qwen2', 'qwen3', 'gemma2', 'gemma3_text'):
    values['sliding_window'] = config.window or None
  if family in ('qwen2', 'qwen3', 'gemma2', 'gemma3_text'):
    values['layer_types'] = [
      'sliding_attention' if windowed else 'full_attention'
      for windowed in config.is_windowed
    ]
  if family.startswith('qwen'):
    values['use_sliding_window'] = bool(config.window)
  if family == 'gemma3_text':
    near = config.window_rotary or config.rotary
    values['rope_parameters'] = {
      'full_attention': values['rope_parameters'],
      'sliding_attention': _rope_parameters(near, config),
    }
  _check_same(config, type(config).from_dict(read_config(values)), family)
  return values


def _check_same(config, again, family):
  """Raises if the published config does not reproduce `config`."""
  # Fields that are not in a published config, or differ without effect.
  ignored = (
    *('dropout', 'compute_dtype', 'remat', 'vocab_multiple', 'scan_unroll'),
    *('attention', 'logprob_chunk', 'embedding_rows', 'window_rotary'),
  )

  def essence(each):
    scale = each.query_scale or config.head_dim**-0.5
    values = each.to_dict() | {
      'num_kv_heads': each.kv_heads,
      # Square roots of published integers come back up to rounding.
      'query_scale': round(scale, 12),
    }
    return {name: x for name, x in values.items() if name not in ignored}

  ours, theirs = essence(config), essence(again)
  different = [
    f'{name} ({ours[name]!r}, {theirs[name]!r})'
    for name in ours
    if ours[name] != theirs[name]
  ]
  if different:
    raise ValueError(
      f'no published family has this model: exported as {family}, these '
      f'would differ: {", ".join(different)}'
    )


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
