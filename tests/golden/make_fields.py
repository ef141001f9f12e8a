"""Records how `transformers` reads odd fields of config.json.

Needs torch (2.13.0, CPU) besides transformers; the tests need neither:

  python tests/golden/make_fields.py

Each case is a change to the config.json of one golden of `make_families.py`,
with that golden's weights. Writes fields.npz: the logits of each row's last
tokens, or nothing where the reference does not load the folder or computes
numbers that are not finite.
"""

import json
import pathlib
import tempfile
import warnings

import numpy as np
import safetensors.torch
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent
LAST = 1  # Tokens of each row whose logits are kept.
LINEAR = {'rope_type': 'linear', 'factor': 2.0}
YARN = {'rope_type': 'yarn', 'factor': 4.0}
LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
}
FULL, NEAR = 'full_attention', 'sliding_attention'
NO_ROPE = ('rope_parameters',)


def case(base, name, without=(), **changes):
  """`base/name`: (base, fields that go, fields that come)."""
  return f'{base}/{name}', (base, tuple(without), changes)


def shared(base):
  """Fields that the families with rotary positions and RMS norms share."""
  return [
    case(base, 'partial', partial_rotary_factor=0.5),
    case(base, 'partial_old', NO_ROPE, partial_rotary_factor=0.5),
    case(base, 'theta', NO_ROPE, rope_theta=50.0),
    case(base, 'theta_null', NO_ROPE, rope_theta=None),
    case(base, 'no_rope', NO_ROPE),
    case(base, 'rope_null', rope_parameters=None),
    case(base, 'scaling', NO_ROPE, rope_theta=50.0, rope_scaling=LINEAR),
    case(
      base,
      'scaling_type',
      NO_ROPE,
      rope_theta=50.0,
      rope_scaling={'type': 'linear', 'factor': 2.0},
    ),
    case(
      base,
      'scaling_and_parameters',
      rope_scaling={**LINEAR, 'rope_theta': 70.0},
      rope_parameters={'rope_type': 'default', 'rope_theta': 20.0},
    ),
    case(
      base,
      'theta_and_parameters',
      rope_theta=70.0,
      rope_parameters={'rope_type': 'default', 'rope_theta': 20.0},
    ),
    case(
      base,
      'parameters_without_theta',
      rope_theta=70.0,
      rope_parameters={'rope_type': 'default'},
    ),
    case(base, 'parameters_empty', rope_parameters={}),
    case(
      base,
      'nested_rope',
      rope_parameters={
        FULL: {'rope_type': 'default', 'rope_theta': 20.0},
        NEAR: {'rope_type': 'default', 'rope_theta': 70.0},
      },
    ),
    case(
      base, 'linear_partial', rope_parameters=LINEAR, partial_rotary_factor=0.5
    ),
    case(base, 'no_tied', ('tie_word_embeddings',)),
    case(base, 'tied_null', tie_word_embeddings=None),
    case(base, 'no_epsilon', ('rms_norm_eps',)),
    case(base, 'no_kv_heads', ('num_key_value_heads',)),
    case(base, 'kv_heads_null', num_key_value_heads=None),
    case(base, 'no_head_dim', ('head_dim',)),
    case(base, 'head_dim_null', head_dim=None),
    case(base, 'attention_bias', attention_bias=True),
    case(base, 'attention_bias_off', attention_bias=False),
    case(base, 'attention_bias_null', attention_bias=None),
    case(base, 'no_attention_bias', ('attention_bias',)),
    case(base, 'mlp_bias_off', mlp_bias=False),
    case(base, 'silu', hidden_act='silu', hidden_activation='silu'),
    case(base, 'hidden_act', ('hidden_activation',), hidden_act='gelu'),
    case(base, 'hidden_activation', ('hidden_act',), hidden_activation='relu'),
    case(base, 'hidden_act_null', hidden_act=None),
    case(base, 'hidden_activation_null', hidden_activation=None),
    case(base, 'window', sliding_window=3),
    case(base, 'window_null', sliding_window=None),
    case(base, 'window_zero', sliding_window=0),
    case(base, 'no_window', ('sliding_window',)),
    case(base, 'layers_full', layer_types=[FULL] * 3),
    case(base, 'layers_near', layer_types=[NEAR] * 3, sliding_window=3),
    case(base, 'layers_null', layer_types=None, sliding_window=3),
    case(base, 'layers_short', layer_types=[FULL] * 2),
    case(base, 'layers_old', layer_types=['attention'] * 3),
    case(base, 'layers_chunked', layer_types=['chunked_attention'] * 3),
    case(base, 'softcaps', final_logit_softcapping=2.0),
    case(base, 'attention_softcap', attn_logit_softcapping=2.0),
    case(base, 'softcap_zero', final_logit_softcapping=0.0),
    case(base, 'scalar', query_pre_attn_scalar=3),
    case(base, 'top_p', top_p=0.5, temperature=0.1, max_length=3),
    case(base, 'pretraining_tp', pretraining_tp=2),
    case(base, 'context', max_position_embeddings=16),
    case(
      base,
      'yarn_two_originals',
      rope_parameters={**YARN, 'original_max_position_embeddings': 8},
      original_max_position_embeddings=32,
    ),
    case(
      base,
      'llama3_two_originals',
      rope_parameters={**LLAMA3, 'original_max_position_embeddings': 8},
      original_max_position_embeddings=32,
    ),
    case(
      base,
      'llama3_old',
      NO_ROPE,
      rope_theta=30.0,
      rope_scaling={**LLAMA3, 'original_max_position_embeddings': 16},
    ),
    case(base, 'llama3_no_original', rope_parameters=LLAMA3),
    case(base, 'yarn_no_original', rope_parameters=YARN),
    case(
      base,
      'yarn_nulls',
      rope_parameters={
        **YARN,
        'original_max_position_embeddings': 16,
        'beta_fast': None,
        'beta_slow': None,
        'attention_factor': None,
        'mscale': None,
        'rope_theta': 100.0,
      },
    ),
    case(
      base,
      'yarn_zero_betas',
      rope_parameters={
        **YARN,
        'original_max_position_embeddings': 16,
        'beta_fast': 0,
        'beta_slow': 0,
        'rope_theta': 100.0,
      },
    ),
    case(
      base,
      'yarn_no_factor',
      rope_parameters={
        'rope_type': 'yarn',
        'factor': None,
        'original_max_position_embeddings': 16,
        'rope_theta': 100.0,
      },
    ),
    case(
      base,
      'yarn_no_truncation',
      rope_parameters={
        **YARN,
        'original_max_position_embeddings': 16,
        'truncate': False,
        'rope_theta': 100.0,
      },
    ),
    case(
      base,
      'llama3_reversed',
      rope_parameters={
        **LLAMA3,
        'original_max_position_embeddings': 16,
        'rope_theta': 30.0,
        'low_freq_factor': 4.0,
        'high_freq_factor': 1.0,
      },
    ),
    case(base, 'dynamic', rope_parameters={**LINEAR, 'rope_type': 'dynamic'}),
    case(
      base,
      'dynamic_original',
      rope_parameters={
        **LINEAR,
        'rope_type': 'dynamic',
        'original_max_position_embeddings': 4,
      },
    ),
    case(
      base,
      'longrope',
      rope_parameters={
        'rope_type': 'longrope',
        'factor': 2.0,
        'short_factor': [1.0, 2.0, 3.0, 4.0],
        'long_factor': [2.0, 3.0, 4.0, 5.0],
      },
    ),
    case(base, 'rope_unknown', rope_parameters={'rope_type': 'spiral'}),
    case(base, 'bidirectional', use_bidirectional_attention=True),
    case(base, 'bidirectional_off', use_bidirectional_attention=False),
  ]


def qwen(base):
  return [
    case(base, 'window_off', use_sliding_window=False),
    case(base, 'no_use_window', ('use_sliding_window',)),
    case(
      base, 'window_off_layers_null', use_sliding_window=False, layer_types=None
    ),
    case(base, 'first_layers', layer_types=None, max_window_layers=1),
    case(base, 'no_max_layers', ('max_window_layers',), layer_types=None),
    case(base, 'mrope', use_mrope=False),
  ]


GEMMA3_OLD = ('rope_parameters', 'layer_types')
CASES = dict(
  [
    *shared('llama3'),
    *shared('mistral'),
    *shared('qwen2'),
    *shared('qwen3'),
    *shared('gemma'),
    *shared('gemma2'),
    *shared('gemma3'),
    *qwen('qwen2'),
    *qwen('qwen3'),
    case('llama2', 'no_bias', ('attention_bias',)),
    case('llama2', 'no_mlp_bias', ('mlp_bias',)),
    case(
      'gemma2',
      'no_softcaps',
      ('final_logit_softcapping', 'attn_logit_softcapping'),
    ),
    case(
      'gemma2',
      'null_softcaps',
      final_logit_softcapping=None,
      attn_logit_softcapping=None,
    ),
    case('gemma2', 'no_scalar', ('query_pre_attn_scalar',)),
    case('gemma2', 'scalar_null', query_pre_attn_scalar=None),
    case('gemma3', 'no_scalar', ('query_pre_attn_scalar',)),
    case(
      'gemma3',
      'old',
      GEMMA3_OLD,
      rope_theta=500.0,
      rope_local_base_freq=20.0,
      sliding_window_pattern=2,
    ),
    case(
      'gemma3',
      'old_scaling',
      GEMMA3_OLD,
      rope_theta=500.0,
      rope_local_base_freq=20.0,
      sliding_window_pattern=3,
      rope_scaling=LINEAR,
    ),
    case('gemma3', 'old_defaults', GEMMA3_OLD),
    case('gemma3', 'old_pattern', GEMMA3_OLD, _sliding_window_pattern=2),
    case('gemma3', 'old_pattern_null', GEMMA3_OLD, sliding_window_pattern=None),
    case('gemma3', 'local_alone', NO_ROPE, rope_local_base_freq=20.0),
    case(
      'gemma3',
      'nested_half',
      rope_parameters={FULL: {'rope_type': 'linear', 'factor': 8.0}},
    ),
    case(
      'gemma3',
      'nested_null',
      rope_parameters={
        FULL: None,
        NEAR: {'rope_type': 'default', 'rope_theta': 20.0},
      },
    ),
    case(
      'gemma3',
      'nested_yarn',
      rope_parameters={
        FULL: {
          **YARN,
          'rope_theta': 100.0,
          'original_max_position_embeddings': 16,
          'truncate': False,
        }
      },
    ),
    case(
      'gemma3', 'nested_and_theta', rope_theta=3.0, rope_local_base_freq=5.0
    ),
    case('gptj', 'no_rotary_dim', ('rotary_dim',)),
    case('gptj', 'rotary_dim_null', rotary_dim=None),
    case('gptj', 'rotary_dim_zero', rotary_dim=0),
    case('gptj', 'rotary_dim_all', rotary_dim=8),
    case('gptj', 'rotary', rotary=True),
    case('gptj', 'no_tied', ('tie_word_embeddings',)),
    case('gptj', 'theta', rope_theta=50.0),
    case('gptj', 'scaling', rope_scaling=LINEAR),
    case('gptj', 'inner_null', n_inner=None),
    case('gptj', 'no_epsilon', ('layer_norm_epsilon',)),
    case('gptj', 'gelu', activation_function='gelu'),
    case('gptj', 'no_activation', ('activation_function',)),
    case('gptj', 'scale_off', scale_attn_weights=False),
    case('gptj', 'embedding_bias', tie_word_embeddings=True),
    case('llama3', 'tied', tie_word_embeddings=True),
    case('mistral', 'tied', tie_word_embeddings=True),
    case('gpt_neox', 'tied', tie_word_embeddings=True),
    case('gemma', 'untied', tie_word_embeddings=False),
    case('gpt2', 'inner_null', n_inner=None),
    case('gpt2', 'no_inner', ('n_inner',)),
    case('gpt2', 'no_tied', ('tie_word_embeddings',)),
    case('gpt2', 'tied_null', tie_word_embeddings=None),
    case('gpt2', 'untied', tie_word_embeddings=False),
    case('gpt2', 'no_epsilon', ('layer_norm_epsilon',)),
    case('gpt2', 'no_activation', ('activation_function',)),
    case('gpt2', 'activation_null', activation_function=None),
    case('gpt2', 'hidden_act', hidden_act='relu'),
    case('gpt2', 'scale_off', scale_attn_weights=False),
    case('gpt2', 'scale_null', scale_attn_weights=None),
    case('gpt2', 'inverse_layer', scale_attn_by_inverse_layer_idx=True),
    case('gpt2', 'upcast', reorder_and_upcast_attn=True),
    case('gpt2', 'cross', add_cross_attention=True),
    case(
      'gpt2',
      'aliases',
      ('n_embd', 'n_head', 'n_layer', 'n_positions'),
      hidden_size=24,
      num_attention_heads=3,
      num_hidden_layers=2,
      max_position_embeddings=32,
    ),
    case('gpt2', 'context', n_positions=32, n_ctx=16),
    case('gpt2', 'head_dim', head_dim=4),
    case('gpt2', 'rotary', rotary_dim=4, rope_theta=10.0),
    *[
      case('gpt2', name, activation_function=name)
      for name in (
        'gelu',
        'gelu_fast',
        'gelu_pytorch_tanh',
        'gelu_python',
        'gelu_python_tanh',
        'gelu_accurate',
        'silu',
        'swish',
        'relu',
        'quick_gelu',
        'gelu_10',
        'relu2',
        'tanh',
        'nonsense',
      )
    ],
    case('gpt_neox', 'old', NO_ROPE, rotary_pct=0.75, rotary_emb_base=50),
    case('gpt_neox', 'old_defaults', NO_ROPE),
    case('gpt_neox', 'theta', NO_ROPE, rope_theta=50.0),
    case('gpt_neox', 'partial', NO_ROPE, partial_rotary_factor=0.75),
    case(
      'gpt_neox',
      'both',
      NO_ROPE,
      rope_theta=50.0,
      rotary_emb_base=70,
      partial_rotary_factor=0.75,
      rotary_pct=0.5,
    ),
    case('gpt_neox', 'pct_and_parameters', rotary_pct=0.25, rotary_emb_base=50),
    case(
      'gpt_neox',
      'parameters_without',
      rope_parameters={'rope_type': 'default'},
      rotary_pct=0.5,
    ),
    case('gpt_neox', 'pct_one', NO_ROPE, rotary_pct=1.0),
    case('gpt_neox', 'pct_odd', NO_ROPE, rotary_pct=0.4),
    case('gpt_neox', 'pct_zero', NO_ROPE, rotary_pct=0.0),
    case('gpt_neox', 'scaling', NO_ROPE, rope_scaling=LINEAR, rotary_pct=0.5),
    case('gpt_neox', 'parallel_off', use_parallel_residual=False),
    case('gpt_neox', 'no_parallel', ('use_parallel_residual',)),
    case('gpt_neox', 'parallel_null', use_parallel_residual=None),
    case('gpt_neox', 'no_bias_field', ('attention_bias',)),
    case('gpt_neox', 'no_act', ('hidden_act',)),
    case('gpt_neox', 'gelu_fast', hidden_act='gelu_fast'),
    case('gpt_neox', 'head_dim', head_dim=4),
    case('gpt_neox', 'no_tied', ('tie_word_embeddings',)),
    case('gpt_neox', 'kv_heads', num_key_value_heads=1),
  ]
)


def write_folder(folder, base, without, changes):
  golden = np.load(FOLDER / f'family_{base}.npz')
  config = json.loads(str(golden['config']))
  for name in without:
    config.pop(name, None)
  (folder / 'config.json').write_text(json.dumps({**config, **changes}))
  tensors = {
    name.removeprefix('weight:'): torch.tensor(golden[name].astype(np.float32))
    for name in golden
    if name.startswith('weight:')
  }
  safetensors.torch.save_file(
    tensors, folder / 'model.safetensors', {'format': 'pt'}
  )
  return torch.tensor(golden['tokens'].astype(np.int64))


def logits_of(folder, tokens):
  """What the reference computes, or why it does not."""
  try:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
      folder,
      attn_implementation='eager',
      dtype=torch.float32,
      output_loading_info=True,
    )
    if info['missing_keys'] or info['mismatched_keys']:
      return None, f'missing {sorted(info["missing_keys"])[:2]}'
    with torch.no_grad():
      logits = model.eval()(tokens).logits.numpy()
  except Exception as error:
    lines = str(error).strip().splitlines() or ['']
    return None, f'{type(error).__name__}: {lines[-1].strip()[:80]}'
  if not np.isfinite(logits).all():
    return None, 'not finite'
  unread = sorted(info['unexpected_keys'])
  return logits[:, -LAST:], f'unread: {unread[:3]}' if unread else ''


# End of text, as the classifiers below understand `pad_token_id`.
END = 5
ROWS = [
  [7, 8, 9, 10, END],
  [11, END, 12, END, END],  # Twice at the end, once before.
  [13, 14, 15],  # Never ended.
  [END, END],  # Nothing else.
]
CLASSIFIERS = {
  'end': ('llama3', END),
  'other': ('llama3', 15),
  'none': ('llama3', None),
  'unused': ('llama3', 0),
  'gpt2_end': ('gpt2', END),
}


def record_classifiers():
  """Scores of rows alone, padded on the right and on the left."""
  arrays = {}
  for name, (base, pad) in CLASSIFIERS.items():
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder)
      write_folder(
        folder, base, (), {'pad_token_id': pad, 'id2label': {0: 'score'}}
      )
      path = folder / 'model.safetensors'
      tensors = safetensors.torch.load_file(path)
      tensors.pop('lm_head.weight', None)
      generator = np.random.default_rng(len(name))
      head = generator.normal(size=(1, 24)).astype(np.float16)
      tensors['score.weight'] = torch.tensor(head.astype(np.float32))
      safetensors.torch.save_file(tensors, path, {'format': 'pt'})
      model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation='eager', dtype=torch.float32
      ).eval()

    def scores(rows, mask, model=model):
      mask = torch.tensor(mask)
      with torch.no_grad():
        return model(
          torch.tensor(rows),
          attention_mask=mask,
          position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        ).logits.numpy()[:, 0]

    found = {'alone': [scores([r], [[1] * len(r)])[0] for r in ROWS]}
    if pad is not None:
      longest = max(map(len, ROWS))
      room = [longest - len(row) for row in ROWS]
      found['right'] = scores(
        [row + n * [pad] for row, n in zip(ROWS, room, strict=True)],
        [len(row) * [1] + n * [0] for row, n in zip(ROWS, room, strict=True)],
      )
      found['left'] = scores(
        [n * [pad] + row for row, n in zip(ROWS, room, strict=True)],
        [n * [0] + len(row) * [1] for row, n in zip(ROWS, room, strict=True)],
      )
    print(name, {kind: np.round(s, 3).tolist() for kind, s in found.items()})
    arrays[f'classifier:{name}'] = json.dumps([base, pad, ROWS])
    arrays[f'head:{name}'] = head
    arrays |= {f'{kind}:{name}': np.array(s) for kind, s in found.items()}
  return arrays


def main() -> None:
  transformers.logging.set_verbosity_error()
  warnings.simplefilter('ignore')
  cases, arrays = {}, {}
  for name, (base, without, changes) in CASES.items():
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder)
      tokens = write_folder(folder, base, without, changes)
      logits, note = logits_of(folder, tokens)
    golden = np.load(FOLDER / f'family_{base}.npz')
    same = logits is not None and np.allclose(
      logits, golden['logits'][:, -LAST:], atol=5e-5
    )
    cases[name] = [base, without, changes, '' if logits is not None else note]
    if logits is not None and not same:
      arrays[f'logits:{name}'] = logits.astype(np.float32)
    kind = 'none' if logits is None else 'as before' if same else 'other'
    print(f'{name:34} {kind:9} {note}')
  arrays |= record_classifiers()
  np.savez_compressed(FOLDER / 'fields.npz', cases=json.dumps(cases), **arrays)


if __name__ == '__main__':
  main()
