"""Records what `transformers` computes for a tiny random model of each family.

Needs torch (2.13.0, CPU) besides transformers; the tests need neither:

  python tests/golden/make_families.py [NAME...]

Writes one compressed file a family, or those named: its config.json, weights
and logits.
Weights are float16 numbers, computed with in float32.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent
V, D, T = 37, 24, 14
LLAMA = {
  'vocab_size': V,
  'hidden_size': D,
  'intermediate_size': 20,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
  'head_dim': 8,
  'initializer_range': 0.3,
  'pad_token_id': 0,
}
GPT = {
  'vocab_size': V,
  'n_embd': D,
  'n_head': 3,
  'n_layer': 2,
  'n_positions': 32,
  'initializer_range': 0.3,
}
QWEN2 = {name: value for name, value in LLAMA.items() if name != 'head_dim'}
YARN = {
  'rope_type': 'yarn',
  'factor': 4.0,
  'rope_theta': 100.0,
  'original_max_position_embeddings': 16,
}
LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'rope_theta': 50.0,
  'original_max_position_embeddings': 16,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
}
KINDS = ['sliding_attention', 'full_attention', 'sliding_attention']
WINDOW = {'sliding_window': 4, 'layer_types': KINDS}
QWEN_WINDOW = {'use_sliding_window': True, 'max_window_layers': 0, **WINDOW}
MODELS = {
  'gpt2': ('gpt2', GPT),
  'gptj': ('gptj', {**GPT, 'rotary_dim': 4}),
  'gpt_neox': (
    'gpt_neox',
    {
      'vocab_size': V,
      'hidden_size': D,
      'num_attention_heads': 3,
      'num_hidden_layers': 2,
      'intermediate_size': 20,
      'max_position_embeddings': 32,
      'initializer_range': 0.3,
      'rope_parameters': {
        'rope_type': 'default',
        'rope_theta': 100.0,
        'partial_rotary_factor': 0.5,
      },
    },
  ),
  'llama2': (
    'llama',
    {
      **LLAMA,
      'attention_bias': True,
      'mlp_bias': True,
      'rope_parameters': {
        'rope_type': 'linear',
        'factor': 2.0,
        'rope_theta': 100.0,
      },
    },
  ),
  'llama3': ('llama', {**LLAMA, 'rope_parameters': LLAMA3}),
  'llama_dynamic': (
    'llama',
    {
      **LLAMA,
      'rope_parameters': {
        'rope_type': 'dynamic',
        'factor': 2.0,
        'rope_theta': 100.0,
      },
    },
  ),
  'mistral': ('mistral', {**LLAMA, 'sliding_window': 4}),
  'qwen2': ('qwen2', {**QWEN2, **QWEN_WINDOW, 'rope_parameters': YARN}),
  'qwen3': ('qwen3', {**LLAMA, **QWEN_WINDOW, 'attention_bias': True}),
  'gemma': ('gemma', LLAMA),
  'gemma2': (
    'gemma2',
    {
      **LLAMA,
      **WINDOW,
      'query_pre_attn_scalar': 6,
      'attn_logit_softcapping': 2.0,
      'final_logit_softcapping': 3.0,
    },
  ),
  'gemma3': (
    'gemma3_text',
    {
      **LLAMA,
      **WINDOW,
      'query_pre_attn_scalar': 6,
      'rope_parameters': {
        'full_attention': {
          'rope_type': 'linear',
          'factor': 8.0,
          'rope_theta': 1000.0,
        },
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 10.0},
      },
    },
  ),
  # Two factors on the magnitude, as DeepSeek spells them.
  'llama_yarn': (
    'llama',
    {
      **LLAMA,
      'rope_parameters': {**YARN, 'mscale': 2.0, 'mscale_all_dim': 0.5},
    },
  ),
  'gpt_neox_sequential': (
    'gpt_neox',
    {
      'vocab_size': V,
      'hidden_size': D,
      'num_attention_heads': 3,
      'num_hidden_layers': 2,
      'intermediate_size': 20,
      'max_position_embeddings': 32,
      'initializer_range': 0.3,
      'use_parallel_residual': False,
      'attention_bias': False,
      'hidden_act': 'gelu_fast',
    },
  ),
}


def main() -> None:
  for seed, (name, (kind, values)) in enumerate(MODELS.items()):
    if sys.argv[1:] and name not in sys.argv[1:]:
      continue
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **values)
    config._attn_implementation = 'eager'
    model = transformers.AutoModelForCausalLM.from_config(config)
    model = model.float().eval()
    with torch.no_grad():
      for parameter in model.parameters():
        # Biases and norms begin at 0 or 1, which would hide mistakes.
        parameter.add_(0.2 * torch.randn_like(parameter))
        parameter.copy_(parameter.half().float())
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, V, (2, T))
    with torch.no_grad():
      logits = model(torch.tensor(tokens)).logits.numpy()
    tied = config.tie_word_embeddings
    # GPT-NeoX files keep the name that memory gave up.
    state = {
      key.replace('lm_head', 'embed_out') if kind == 'gpt_neox' else key: value
      for key, value in model.state_dict().items()
    }
    weights = {
      f'weight:{key}': value.numpy().astype(np.float16)
      for key, value in state.items()
      if not (tied and key == 'lm_head.weight')
    }
    np.savez_compressed(
      FOLDER / f'family_{name}.npz',
      config=json.dumps(json.loads(config.to_json_string(use_diff=False))),
      tokens=tokens.astype(np.uint8),
      logits=logits.astype(np.float32),
      **weights,
    )
    print(name, float(np.abs(logits).max()))


if __name__ == '__main__':
  main()
