"""The published families: what their config.json says and how weights are laid.

Only names, numbers and layouts: nothing here knows a device. Arithmetic is
`transformers` 5's; older spellings of the same fields are read too.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

# Fields that change no logit of a forward pass without dropout.
_WITHOUT_EFFECT = frozenset(
  """
  _name_or_path architectures attention_dropout attn_pdrop bos_token_id
  chunk_size_feed_forward classifier_dropout dtype embd_pdrop eos_token_id
  gradient_checkpointing hidden_dropout id2label initializer_range is_decoder
  label2id max_window_layers model_type n_ctx num_labels output_attentions
  output_hidden_states output_past pad_token_id pretraining_tp problem_type
  resid_pdrop return_dict summary_activation summary_first_dropout
  summary_proj_to_labels summary_type summary_use_proj task_specific_params
  tokenizer_class torch_dtype transformers_version unsloth_version use_cache
  cache_implementation _attn_implementation attention_probs_dropout_prob
  hidden_dropout_prob
  """.split()  # noqa: SIM905
)
# Fields that are handled at one value only, which is the usual one.
_ONLY = {
  'add_cross_attention': False,
  'is_encoder_decoder': False,
  'reorder_and_upcast_attn': False,
  'scale_attn_by_inverse_layer_idx': False,
  'scale_attn_weights': True,
  'use_bidirectional_attention': False,
  'use_mrope': False,
}
_ACTIVATIONS = {
  'gelu_new': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
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
# What transformers assumes where config.json is silent.
_TIED = ('gpt2', 'gemma', 'gemma2', 'gemma3_text')


class _Fields:
  """A config.json that notices which of its fields were read."""

  def __init__(self, values: Mapping[str, Any], where: str = ''):
    self.values, self.where = values, where
    self.read = set()

  def take(self, name: str, *default: Any) -> Any:
    self.read.add(name)
    if name in self.values and (self.values[name] is not None or not default):
      return self.values[name]
    if not default:
      raise ValueError(f'config.json: {self.where}{name} is missing')
    return default[0]

  def finish(self, family: str, ignored: frozenset[str] = frozenset()) -> None:
    for name, value in self.values.items():
      if name in self.read or name in ignored or value is None:
        continue
      if name in _ONLY and value == _ONLY[name]:
        continue
      raise ValueError(
        f'config.json: {self.where}{name} = {value!r} is not handled for '
        f'{family}; remove the field only if it changes nothing'
      )


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
  fields = _Fields(config_json)
  if family in ('gpt2', 'gptj'):
    values = _gpt(family, fields)
  elif family == 'gpt_neox':
    values = _gpt_neox(fields)
  else:
    values = _llama_like(family, fields)
  values['embedding_rows'] = values['vocab_size'] = fields.take('vocab_size')
  values['tied'] = fields.take('tie_word_embeddings', family in _TIED)
  # Of our own exports: how many of the rows are tokens, and the score's shift.
  values['vocab_size'] = fields.take('num_tokens', values['vocab_size'])
  fields.take('score_shift', None)
  values['vocab_multiple'] = 1
  fields.finish(family, _WITHOUT_EFFECT)
  return values


def _activation(name: str) -> str:
  if name not in _ACTIVATIONS:
    raise ValueError(f'config.json: activation {name!r} is not handled')
  return _ACTIVATIONS[name]


def _gpt(family, fields):
  width, num_heads = fields.take('n_embd'), fields.take('n_head')
  values = {
    'context_length': fields.take('n_positions'),
    'num_layers': fields.take('n_layer'),
    'width': width,
    'num_heads': num_heads,
    'head_dim': width // num_heads,
    'mlp_dim': fields.take('n_inner', 4 * width),
    'norm_epsilon': fields.take('layer_norm_epsilon', 1e-5),
    'activation': _activation(fields.take('activation_function', 'gelu_new')),
  }
  if family == 'gptj':
    values |= {
      'rotary': {
        'dim': fields.take('rotary_dim', width // num_heads),
        'interleaved': True,
      },
      'residual': 'parallel_one_norm',
      'qkv_bias': False,
      'out_bias': False,
      'unembed_bias': True,
    }
    # A field that original GPT-J files carry and no code reads.
    fields.take('rotary', None)
    fields.take('scale_attn_weights', True)
  return values


def _gpt_neox(fields):
  width, num_heads = (
    fields.take('hidden_size'),
    fields.take('num_attention_heads'),
  )
  context = fields.take('max_position_embeddings')
  parallel = fields.take('use_parallel_residual', True)
  bias = fields.take('attention_bias', True)
  return {
    'context_length': context,
    'num_layers': fields.take('num_hidden_layers'),
    'width': width,
    'num_heads': num_heads,
    'head_dim': width // num_heads,
    'mlp_dim': fields.take('intermediate_size'),
    'norm_epsilon': fields.take('layer_norm_eps', 1e-5),
    'activation': _activation(fields.take('hidden_act', 'gelu')),
    'rotary': _rotaries(fields, width // num_heads, context, 0.25)[0],
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
  # Qwen 3 and Gemma: 128 and 256 where the file is silent.
  usual = 256 if gemma else 128 if family == 'qwen3' else width // num_heads
  head_dim = fields.take('head_dim', usual)
  context = fields.take('max_position_embeddings')
  activation = fields.take('hidden_act', 'gelu_pytorch_tanh')
  activation = fields.take('hidden_activation', activation)
  if family == 'gemma' and activation == 'gelu':
    # The first Gemma's files say so and mean the other one; so do its authors'
    # and the reference's code.
    activation = 'gelu_pytorch_tanh'
  rotary, window_rotary = _rotaries(fields, head_dim, context, 1.0)
  if not gemma and family in ('llama', 'qwen3'):
    bias = fields.take('attention_bias', False)
  else:
    bias = gemma and fields.take('attention_bias', False)
  window, window_layers = _windows(family, fields, num_layers)
  values = {
    'context_length': context,
    'num_layers': num_layers,
    'width': width,
    'num_heads': num_heads,
    'num_kv_heads': fields.take('num_key_value_heads', num_heads),
    'head_dim': head_dim,
    'mlp_dim': fields.take('intermediate_size'),
    'norm': 'rms_plus_one' if gemma else 'rms',
    'norm_epsilon': fields.take('rms_norm_eps', 1e-6),
    'activation': _activation(activation),
    'rotary': rotary,
    'window_rotary': window_rotary,
    'window': window,
    'window_layers': window_layers,
    'gated_mlp': True,
    'qkv_bias': bias or family == 'qwen2',
    'out_bias': bias,
    'mlp_bias': family == 'llama' and fields.take('mlp_bias', False),
    'qk_norm': family in ('qwen3', 'gemma3_text'),
  }
  if gemma:
    values['embedding_scale'] = math.sqrt(width)
  if family in ('gemma2', 'gemma3_text'):
    values |= {
      'post_norms': True,
      'query_scale': fields.take('query_pre_attn_scalar', 256) ** -0.5,
      'attention_softcap': fields.take('attn_logit_softcapping', 0.0),
      'logit_softcap': fields.take('final_logit_softcapping', 0.0),
    }
  return values


def _windows(family, fields, num_layers):
  """The window and the layers that have it."""
  if family in ('llama', 'gemma'):
    return 0, ()
  window = fields.take('sliding_window', 0)
  pattern = fields.take('_sliding_window_pattern', 6)
  pattern = fields.take('sliding_window_pattern', pattern)
  first = fields.take('max_window_layers', 0)
  if family.startswith('qwen') and not fields.take('use_sliding_window', False):
    window = 0
  if family == 'mistral':
    usual = [True] * num_layers
  elif family == 'gemma2':
    usual = [layer % 2 == 0 for layer in range(num_layers)]
  elif family == 'gemma3_text':
    usual = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
  else:
    usual = [layer >= first for layer in range(num_layers)]
  kinds = fields.take('layer_types', None)
  if kinds is not None:
    unknown = set(kinds) - {'sliding_attention', 'full_attention'}
    if unknown or len(kinds) != num_layers:
      raise ValueError(
        f'config.json: layer_types has {len(kinds)} entries for {num_layers} '
        f'layers, kinds not handled: {sorted(unknown)}'
      )
    usual = [kind == 'sliding_attention' for kind in kinds]
  if not window or not any(usual):
    return 0, ()
  return window, usual


def _rotaries(fields, head_dim, context, usual_part):
  """Rotary positions of plain and of windowed layers (None: the same)."""
  parameters = fields.take('rope_parameters', None)
  theta = fields.take('rope_theta', 10_000.0)
  theta = fields.take('rotary_emb_base', theta)
  local_theta = fields.take('rope_local_base_freq', None)
  part = fields.take('partial_rotary_factor', usual_part)
  part = fields.take('rotary_pct', part)
  older = fields.take('rope_scaling', None)
  original = fields.take('original_max_position_embeddings', None)
  if parameters is None:
    parameters = {'rope_theta': theta, **(older or {})}
    if local_theta is not None:
      parameters = {
        'full_attention': parameters,
        'sliding_attention': {'rope_theta': local_theta},
      }

  def one(values):
    values = {'rope_theta': theta, 'partial_rotary_factor': part, **values}
    if original is not None:
      values.setdefault('original_max_position_embeddings', original)
    return _rotary(values, head_dim, context)

  if 'full_attention' in parameters:
    return (
      one(parameters['full_attention']),
      one(parameters['sliding_attention']),
    )
  return one(parameters), None


def _rotary(values, head_dim, context):
  fields = _Fields(values, 'rope_parameters.')
  kind = fields.take('type', 'default')
  kind = fields.take('rope_type', kind)
  rotary = {
    'dim': int(head_dim * fields.take('partial_rotary_factor')),
    'theta': float(fields.take('rope_theta')),
  }
  if kind == 'linear':
    rotary |= {'scaling': kind, 'factor': fields.take('factor')}
  elif kind == 'dynamic':
    # Stretches only what is longer than the context, which is an error here.
    fields.take('factor')
    fields.take('original_max_position_embeddings', context)
  elif kind == 'llama3':
    rotary |= {
      'scaling': kind,
      'factor': fields.take('factor'),
      'original_context': fields.take('original_max_position_embeddings'),
      'low': fields.take('low_freq_factor'),
      'high': fields.take('high_freq_factor'),
    }
  elif kind == 'yarn':
    factor = fields.take('factor')
    # DeepSeek's spelling: two factors, where both are given and not 0.
    whole, each = fields.take('mscale', 0), fields.take('mscale_all_dim', 0)
    magnitude = _yarn_magnitude(factor)
    if whole and each:
      magnitude = _yarn_magnitude(factor, whole) / _yarn_magnitude(factor, each)
    rotary |= {
      'scaling': kind,
      'factor': factor,
      'original_context': fields.take(
        'original_max_position_embeddings', context
      ),
      'low': fields.take('beta_slow', 1),
      'high': fields.take('beta_fast', 32),
      'truncate': fields.take('truncate', True),
      'magnitude': fields.take('attention_factor', magnitude),
    }
  elif kind != 'default':
    raise ValueError(f'config.json: rope_type {kind!r} is not handled')
  fields.finish(kind)
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

  if family == 'gpt2':
    top, block = 'transformer.', 'transformer.h.{}.'
    plain(('token_embedding',), top + 'wte.weight', rows, D)
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
    unembedding = 'lm_head'
  elif family == 'gptj':
    top, block = 'transformer.', 'transformer.h.{}.'
    plain(('token_embedding',), top + 'wte.weight', rows, D)
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
    unembedding = 'lm_head'
  elif family == 'gpt_neox':
    top, block = 'gpt_neox.', 'gpt_neox.layers.{}.'
    plain(('token_embedding',), top + 'embed_in.weight', rows, D)
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
    unembedding = 'embed_out'
  else:
    top, block = 'model.', 'model.layers.{}.'
    plain(('token_embedding',), top + 'embed_tokens.weight', rows, D)
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
    unembedding = 'lm_head'
  if scalar:
    found.append(Entry(('head_kernel',), 'score.weight', (1, D), (0,), (0, 0)))
    return found
  if not config.tied:
    plain(('unembedding',), f'{unembedding}.weight', rows, D)
  if config.unembed_bias:
    plain(('unembedding_bias',), f'{unembedding}.bias', rows)
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
