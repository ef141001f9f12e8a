"""Published families: parity, strict reading, and the way back.

The goldens were computed by `transformers` (tests/golden/make_families.py).
"""

import dataclasses
import gc
import json
import math
import pathlib
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax import model_fns, rollout
from instruct_jax.infra import sharding
from instruct_jax.models import families, hf
from instruct_jax.models.config import PRESETS, TransformerConfig

pytestmark = pytest.mark.usefixtures('quick_compile')

GOLDEN = pathlib.Path(__file__).parent / 'golden'
FAMILIES = sorted(
  path.stem.removeprefix('family_') for path in GOLDEN.glob('family_*.npz')
)
CLOSE = {'rtol': 0, 'atol': 1e-4}


def write_folder(folder, name):
  """The golden as a folder in the Hugging Face format."""
  golden = np.load(GOLDEN / f'family_{name}.npz')
  weights = {
    key.removeprefix('weight:'): golden[key].astype(np.float32)
    for key in golden
    if key.startswith('weight:')
  }
  folder.mkdir()
  hf.write_tensors(
    folder, {k: v.shape for k, v in weights.items()}, weights.__getitem__
  )
  (folder / 'config.json').write_text(str(golden['config']))
  return golden


def load(folder, kind='policy', **changes):
  config = TransformerConfig.from_hf(hf.read_config(folder))
  config = dataclasses.replace(config, vocab_multiple=8, **changes)
  mesh = sharding.make_mesh((8, 1, 1))
  abstract = model_fns.abstract_params(kind, config, mesh)
  params = hf.load_params(folder, config, abstract)
  return model_fns.make_module(kind, config), params


def test_all_families_are_here():
  assert len(FAMILIES) == 14


@pytest.mark.parametrize('name', FAMILIES)
def test_parity_and_the_way_back(name, tmp_path):
  golden = write_folder(tmp_path / 'in', name)
  module, params = load(tmp_path / 'in')
  config = module.config
  tokens, logits = golden['tokens'].astype(np.int32), golden['logits']
  num = tokens.shape[1]
  V = logits.shape[-1]
  padded = np.full((5, 2 * num), 1, np.int32)
  segments = np.zeros((5, 2 * num), np.int32)
  padded[0, :num], segments[0, :num] = tokens[0], 1  # Right-padded.
  padded[1, -num:], segments[1, -num:] = tokens[0], 1  # Left-padded.
  padded[2, 5 : 5 + num], segments[2, 5 : 5 + num] = tokens[1], 1
  padded[3], segments[3] = tokens.reshape(-1), np.repeat([1, 2], num)  # Packed.
  padded[4, :num], segments[4, :num] = tokens[1], 1

  @jax.jit
  def forward(params, tokens, segments):
    return module.apply({'params': params}, tokens, segments)

  got = np.asarray(forward(params, padded, segments))[..., :V]
  np.testing.assert_allclose(got[0, :num], logits[0], **CLOSE)
  np.testing.assert_allclose(got[1, -num:], logits[0], **CLOSE)
  np.testing.assert_allclose(got[2, 5 : 5 + num], logits[1], **CLOSE)
  np.testing.assert_allclose(got[3], logits.reshape(-1, V), **CLOSE)
  np.testing.assert_allclose(got[4, :num], logits[1], **CLOSE)

  hf.save(tmp_path / 'out', config, params)
  before = hf.open_tensors(tmp_path / 'in')
  written = hf.open_tensors(tmp_path / 'out')
  assert set(before) == set(written)
  for key, tensor in before.items():
    np.testing.assert_array_equal(tensor, written[key], err_msg=key)
  again, params_again = load(tmp_path / 'out')
  assert jax.tree.all(
    jax.tree.map(lambda a, b: bool((a == b).all()), params, params_again)
  )
  assert again.config.num_params == config.num_params
  leaves = jax.tree.leaves(params)
  assert config.num_params == sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize('name', FAMILIES)
def test_token_by_token_as_the_sampler_does(name, tmp_path):
  """Prompts of 3 and 6 tokens, padded on the right, in one cache."""
  golden = write_folder(tmp_path / 'in', name)
  module, params = load(tmp_path / 'in')
  tokens, logits = golden['tokens'].astype(np.int32), golden['logits']
  decoder = model_fns.decoder(module)
  lengths = np.array([3, 6])

  @jax.jit
  def begin(params, tokens):
    weights = decoder.prepare(params)
    bank = decoder.read(weights, tokens[:, :6], jnp.asarray(lengths))
    cache = rollout.put_first(
      decoder.make_cache(2, tokens.shape[1]),
      bank,
    )
    return weights, cache

  weights, cache = begin(params, tokens)
  take = jax.jit(decoder.step)
  # From each prompt's last token on, which is read a second time.
  for added in range(tokens.shape[1] - 5):
    place = lengths - 1 + added
    token = tokens[np.arange(2), place]
    step, cache = take(weights, token, place, cache)
    for row, length in enumerate(lengths):
      np.testing.assert_allclose(
        np.asarray(step)[row, : logits.shape[-1]],
        logits[row, length - 1 + added],
        **CLOSE,
      )


@pytest.mark.parametrize('name', ['gpt2', 'gptj', 'qwen3'])
def test_a_reward_model_goes_out_and_comes_back(name, tmp_path):
  write_folder(tmp_path / 'in', name)
  module, params = load(tmp_path / 'in')
  mesh = sharding.make_mesh((8, 1, 1))
  policy = model_fns.Model('policy', module, params, {})
  reward = model_fns.scalar_from_policy(policy, mesh, jax.random.key(0))
  ours = {**reward.params, 'head_bias': jnp.float32(-0.7)}
  hf.save(tmp_path / 'out', module.config, ours)
  _, again = load(tmp_path / 'out', 'scalar')
  assert jax.tree.structure(ours) == jax.tree.structure(again)
  for mine, theirs in zip(
    jax.tree.leaves(ours), jax.tree.leaves(again), strict=True
  ):
    np.testing.assert_array_equal(mine, theirs)


def test_a_pad_row_is_the_mean_and_unused_rows_are_zero(tmp_path):
  golden = write_folder(tmp_path / 'in', 'gpt2')
  _, params = load(tmp_path / 'in', vocab_size=38)
  rows = np.asarray(params['trunk']['token_embedding'])
  published = golden['weight:transformer.wte.weight'].astype(np.float32)
  assert rows.shape[0] == 40
  np.testing.assert_array_equal(rows[:37], published)
  np.testing.assert_allclose(rows[37], published.mean(axis=0), atol=1e-6)
  assert not rows[38:].any()


def test_how_a_model_computes_is_not_published():
  values = json.loads(str(np.load(GOLDEN / 'family_gpt2.npz')['config']))
  config = TransformerConfig.from_hf(values)
  changed = dataclasses.replace(config, attention='xla', logprob_chunk=8)
  assert families.write_config(changed) == families.write_config(config)


def test_what_is_not_handled_is_named():
  described = json.loads(str(np.load(GOLDEN / 'family_llama3.npz')['config']))
  with pytest.raises(ValueError, match="model_type 'mamba' is not handled"):
    TransformerConfig.from_hf({**described, 'model_type': 'mamba'})
  with pytest.raises(ValueError, match='num_experts = 8 is not handled'):
    TransformerConfig.from_hf({**described, 'num_experts': 8})
  with pytest.raises(ValueError, match="rope_type 'longrope' is not handled"):
    TransformerConfig.from_hf(
      {**described, 'rope_parameters': {'rope_type': 'longrope'}}
    )
  with pytest.raises(ValueError, match='rope_parameters.mscale = 2 is not'):
    TransformerConfig.from_hf(
      {
        **described,
        'rope_parameters': {**described['rope_parameters'], 'mscale': 2},
      }
    )
  del described['hidden_size']
  with pytest.raises(ValueError, match='hidden_size is missing'):
    TransformerConfig.from_hf(described)


@pytest.mark.parametrize(
  'fields',
  [
    *(
      {'rope_type': kind, 'factor': factor}
      for kind in ('linear', 'dynamic')
      for factor in (0, -2.0, math.nan, math.inf, '2', 10**400)
    ),
    {'rope_theta': 0},
    {'rope_theta': -1e4},
    {'rope_type': 'yarn', 'factor': 2, 'original_max_position_embeddings': -1},
    {'rope_type': 'yarn', 'factor': 2.0, 'attention_factor': 0.0},
    {'rope_type': 'yarn', 'factor': 2.0, 'beta_fast': -1},
    {'rope_type': 'linear', 'factor': 2.0, 'partial_rotary_factor': math.nan},
  ],
)
def test_rotary_fields_are_numbers_that_scale(tmp_path, fields):
  described = json.loads(str(np.load(GOLDEN / 'family_llama3.npz')['config']))
  described['rope_parameters'] = {
    'rope_type': 'default',
    'rope_theta': 10_000.0,
    **fields,
  }
  (tmp_path / 'config.json').write_text(json.dumps(described))
  *_, name = fields
  with pytest.raises(ValueError) as error:
    hf.shape_of(tmp_path)
  said = str(error.value)
  assert f'{tmp_path}: config.json: rope_parameters.{name} must be' in said
  assert '\n' not in said


# What the files of published models hold beside the shape, as far as it is not
# in the goldens' newer spelling.
PUBLISHED = {
  'gpt2': {
    'model_type': 'gpt2',
    'n_ctx': 1024,
    'n_embd': 768,
    'n_head': 12,
    'n_layer': 12,
    'n_positions': 1024,
    'summary_type': 'cls_index',
    'task_specific_params': {'text-generation': {'max_length': 50}},
    'vocab_size': 50257,
  },
  'gptj': {
    'model_type': 'gptj',
    'n_embd': 4096,
    'n_head': 16,
    'n_inner': None,
    'n_layer': 28,
    'n_positions': 2048,
    'rotary': True,
    'rotary_dim': 64,
    'scale_attn_weights': True,
    'tie_word_embeddings': False,
    'tokenizer_class': 'GPT2Tokenizer',
    'vocab_size': 50400,
  },
  'gpt_neox': {
    'model_type': 'gpt_neox',
    'attention_probs_dropout_prob': 0,
    'hidden_act': 'gelu_fast',
    'hidden_dropout_prob': 0,
    'hidden_size': 6144,
    'intermediate_size': 24576,
    'max_position_embeddings': 2048,
    'num_attention_heads': 64,
    'num_hidden_layers': 44,
    'rotary_emb_base': 10000,
    'rotary_pct': 0.25,
    'tie_word_embeddings': False,
    'torch_dtype': 'float16',
    'vocab_size': 50432,
  },
  'llama3.1': {
    'model_type': 'llama',
    'eos_token_id': [128001, 128008, 128009],
    'hidden_size': 4096,
    'intermediate_size': 14336,
    'max_position_embeddings': 131072,
    'mlp_bias': False,
    'num_attention_heads': 32,
    'num_hidden_layers': 32,
    'num_key_value_heads': 8,
    'pretraining_tp': 1,
    'rope_scaling': {
      'factor': 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 8192,
      'rope_type': 'llama3',
    },
    'rope_theta': 500000.0,
    'vocab_size': 128256,
  },
  'qwen2.5': {
    'model_type': 'qwen2',
    'hidden_size': 3584,
    'intermediate_size': 18944,
    'max_position_embeddings': 131072,
    'max_window_layers': 28,
    'num_attention_heads': 28,
    'num_hidden_layers': 28,
    'num_key_value_heads': 4,
    'rope_theta': 1000000.0,
    'sliding_window': 131072,
    'tie_word_embeddings': False,
    'use_mrope': False,
    'use_sliding_window': False,
    'vocab_size': 152064,
  },
  'gemma': {
    'model_type': 'gemma',
    'head_dim': 256,
    'hidden_act': 'gelu',
    'hidden_size': 2048,
    'intermediate_size': 16384,
    'max_position_embeddings': 8192,
    'num_attention_heads': 8,
    'num_hidden_layers': 18,
    'num_key_value_heads': 1,
    'rope_scaling': None,
    'vocab_size': 256000,
  },
  'gemma3': {
    'model_type': 'gemma3_text',
    'attn_logit_softcapping': None,
    'cache_implementation': 'hybrid',
    'head_dim': 256,
    'hidden_activation': 'gelu_pytorch_tanh',
    'hidden_size': 1152,
    'intermediate_size': 6912,
    'max_position_embeddings': 32768,
    'num_attention_heads': 4,
    'num_hidden_layers': 26,
    'num_key_value_heads': 1,
    'query_pre_attn_scalar': 256,
    'rope_local_base_freq': 10000,
    'rope_scaling': None,
    'rope_theta': 1000000,
    'sliding_window': 512,
    'sliding_window_pattern': 6,
    'vocab_size': 262144,
  },
}


@pytest.mark.parametrize(
  ('name', 'millions'),
  [
    ('gpt2', 124),
    ('gptj', 6051),
    ('gpt_neox', 20555),
    ('llama3.1', 8030),
    ('qwen2.5', 7616),
    ('gemma', 2506),
    ('gemma3', 1000),
  ],
)
def test_older_spellings(name, millions):
  """Parameters as the models' cards count them."""
  config = TransformerConfig.from_hf(PUBLISHED[name])
  assert abs(config.num_params / 1e6 - millions) < 1
  if name.startswith('gemma'):
    # The first Gemma's files say 'gelu' and mean the approximation.
    assert config.activation == 'gelu_tanh'
  if name == 'gemma3':
    assert (config.rotary.theta, config.window_rotary.theta) == (1e6, 1e4)
    assert [i for i, near in enumerate(config.window_layers) if not near] == [
      5,
      11,
      17,
      23,
    ]
  if name == 'qwen2.5':
    assert not config.window_layers


def test_magnitude_of_yarn():
  described = json.loads(str(np.load(GOLDEN / 'family_llama3.npz')['config']))
  del described['rope_parameters']
  yarn = {
    'rope_type': 'yarn',
    'rope_theta': 10_000.0,
    'factor': 4.0,
    'original_max_position_embeddings': 32,
  }

  def magnitude(**fields):
    described['rope_parameters'] = {**yarn, **fields}
    return TransformerConfig.from_hf(described).rotary.magnitude

  # 0.1 ln 4 = 0.138629.
  assert magnitude() == pytest.approx(1.138629, abs=1e-6)
  both = magnitude(mscale=0.707, mscale_all_dim=0.5)
  assert both == pytest.approx(1.098011 / 1.069315, abs=1e-5)
  assert magnitude(mscale=0.707) == magnitude()  # One alone is not used.
  assert magnitude(mscale=2, mscale_all_dim=2) == 1
  assert magnitude(mscale=2, mscale_all_dim=1, attention_factor=1.5) == 1.5


def test_blocks_and_shards_give_the_same_tensor(tmp_path, monkeypatch):
  """Whatever the block size, and however the devices share it."""
  golden = write_folder(tmp_path / 'in', 'gpt_neox')
  _, whole = load(tmp_path / 'in')
  monkeypatch.setattr(hf, '_BLOCK_BYTES', 200)
  config = TransformerConfig.from_hf(hf.read_config(tmp_path / 'in'))
  config = dataclasses.replace(config, vocab_multiple=8)
  mesh = sharding.make_mesh((2, 4, 1))
  abstract = model_fns.abstract_params('policy', config, mesh)
  shared = hf.load_params(tmp_path / 'in', config, abstract)
  assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(shared))
  jax.tree.map(np.testing.assert_array_equal, whole, shared)
  kernel = golden['weight:gpt_neox.layers.1.attention.dense.weight']
  N, H = config.num_heads, config.head_dim
  np.testing.assert_array_equal(
    shared['trunk']['layers']['out_kernel'][1],
    kernel.astype(np.float32).T.reshape(N, H, -1),
  )


def test_the_host_never_holds_the_model(tmp_path, monkeypatch):
  """At most 1.3 times the largest tensor, beside what a CPU device itself
  holds: unstacked parameters are the very arrays that were read."""
  config = TransformerConfig(
    vocab_size=64,
    context_length=64,
    num_layers=12,
    width=128,
    num_heads=2,
    head_dim=64,
    mlp_dim=1024,
    vocab_multiple=8,
  )
  monkeypatch.setattr(hf, '_BLOCK_BYTES', 2**15)
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  abstract = model_fns.abstract_params('policy', config, mesh)
  params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract)
  hf.save(tmp_path, config, params)
  hf.load_params(tmp_path, config, abstract)  # Compiles.
  peaks = []
  for _ in range(3):  # Threads of other tests may allocate meanwhile.
    tracemalloc.start()
    hf.load_params(tmp_path, config, abstract)
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  largest = 4 * config.width * config.mlp_dim  # 0.5 MiB; a stack is 6 MiB.
  rows = config.vocab_rows + config.context_length + 2
  unstacked = 4 * config.width * rows
  # Python's own objects: names, indices, closures.
  assert min(peaks) < 1.3 * largest + unstacked + 200_000


@pytest.mark.slow
def test_memory_of_importing_1p3b(tmp_path):
  """GPT-3's 1.3B with random weights, 5 GB of files; what the host holds beside
  the parameter that is being made, by the kernel's own count (`-s` shows it).

  Parameters are dropped once they are there, so 2 GB of memory do.
  """
  counts = pathlib.Path('/proc/self/status')
  if not counts.exists():
    pytest.skip('counts memory by Linux')

  def count(name):
    (line,) = (x for x in counts.read_text().splitlines() if x.startswith(name))
    return 1024 * int(line.split()[1])

  config = TransformerConfig(**PRESETS['1p3b'])
  described = families.write_config(config)
  published = TransformerConfig.from_hf(described)
  entries = families.entries('gpt2', published)
  shapes = {
    name: entry.shape for entry in entries for name in hf._names(entry, config)
  }
  pool = np.random.default_rng(0).normal(0, 0.02, 2**20).astype('f4')
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  abstract = model_fns.abstract_params('policy', config, mesh)
  try:
    hf.write_tensors(tmp_path, shapes, lambda n: np.resize(pool, shapes[n]))
    tensors = hf.open_tensors(tmp_path)
    largest = max(tensor.nbytes for tensor in tensors.values())
    worst = 0
    for entry in entries:
      struct = abstract
      for part in entry.path:
        struct = struct[part]
      if entry.stacked:  # Compiles.
        hf._make_stack(struct.shape, struct.sharding)().block_until_ready()
      gc.collect()
      pathlib.Path('/proc/self/clear_refs').write_text('5')  # Resets the peak.
      before = count('VmRSS')
      placed = hf._place(entry, tensors, struct, tmp_path, config.vocab_size)
      placed.block_until_ready()
      beside = count('VmHWM') - before - placed.nbytes
      worst = max(worst, beside)
      del placed
  finally:
    shutil.rmtree(tmp_path)
  print(
    f'{config.num_params:,} parameters, largest tensor {largest / 2**20:.0f} '
    f'MiB, most beside a parameter {worst / 2**20:.0f} MiB, '
    f'{worst / largest:.2f} times'
  )
  assert worst <= 1.3 * largest


def rewrite(folder, change):
  tensors = {k: np.array(v) for k, v in hf.open_tensors(folder).items()}
  change(tensors)
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  hf.write_tensors(folder, shapes, tensors.__getitem__)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda t: t.pop('model.norm.weight'), 'are missing: model.norm.weight'),
    (lambda t: t.update(x=np.zeros(2, 'f4')), 'are left over: x'),
    (
      lambda t: t.update({'model.norm.weight': np.zeros(5, 'f4')}),
      r'model.norm.weight has shape \(5,\); config.json asks for \(24,\)',
    ),
    (
      lambda t: t['model.norm.weight'].fill(np.nan),
      'tensor model.norm.weight holds NaN',
    ),
    (
      lambda t: t.update(
        {'model.embed_tokens.weight': np.zeros((30, 24), 'f4')}
      ),
      r'embed_tokens.weight has shape \(30, 24\)',
    ),
  ],
)
def test_strict_reading(change, message, tmp_path):
  write_folder(tmp_path / 'in', 'llama3')
  rewrite(tmp_path / 'in', change)
  with pytest.raises(ValueError, match=message):
    load(tmp_path / 'in')


def test_damaged_pickled_and_empty_folders(tmp_path):
  write_folder(tmp_path / 'in', 'llama3')
  path = tmp_path / 'in' / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-7])
  with pytest.raises(ValueError, match='model.safetensors: truncated: tensor'):
    load(tmp_path / 'in')
  path.write_bytes(path.read_bytes()[:50])
  with pytest.raises(ValueError, match='truncated or not safetensors: 50'):
    load(tmp_path / 'in')
  path.rename(tmp_path / 'in' / 'pytorch_model.bin')
  with pytest.raises(ValueError, match='pytorch_model.bin are pickles'):
    load(tmp_path / 'in')
  with pytest.raises(ValueError, match='no config.json here'):
    hf.read_config(tmp_path)
  # A byte order mark is read over.
  (tmp_path / 'config.json').write_text('\ufeff{"model_type": "llama"}')
  assert hf.read_config(tmp_path) == {'model_type': 'llama'}


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('{', 'index.json: not JSON'),
    ('[]', 'index.json: not a JSON object'),
    ('{"metadata": {}}', "index.json: no 'weight_map' from tensors"),
    ('{"weight_map": ["a"]}', "index.json: no 'weight_map' from tensors"),
    ('{"weight_map": {"x": 3}}', "'weight_map' gives tensor x the file 3, wh"),
    (
      '{"weight_map": {"x": ["a"]}}',
      r"tensor x the file \['a'\], which is not",
    ),
  ],
)
def test_a_damaged_index_is_named(tmp_path, content, message):
  write_folder(tmp_path / 'in', 'llama3')
  (tmp_path / 'in' / 'model.safetensors.index.json').write_text(content)
  with pytest.raises(ValueError, match=message):
    load(tmp_path / 'in')


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
  write_folder(tmp_path / 'in', 'llama3')
  path = tmp_path / 'in' / name
  path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\n')
  with pytest.raises(ValueError, match=f'{path}: is a pointer of Git LFS'):
    load(tmp_path / 'in')


def test_two_sets_of_weights_are_refused(tmp_path):
  """`transformers` reads the single file, whatever the index says."""
  tensors = {str(i): np.full((3, i), i, 'f4') for i in range(1, 5)}
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  hf.write_tensors(tmp_path, shapes, tensors.__getitem__, shard_bytes=50)
  index = tmp_path / 'model.safetensors.index.json'
  content = index.read_text()
  index.unlink()
  hf.write_tensors(tmp_path, {'1': (3, 1)}, tensors.__getitem__)
  index.write_text(content)
  with pytest.raises(ValueError, match='model.safetensors .*index.json; move'):
    hf.open_tensors(tmp_path)
  index.write_text('{"weight_map": {"1": "model.safetensors"}}')
  assert set(hf.open_tensors(tmp_path)) == {'1'}


def test_the_index_says_which_files_count(tmp_path):
  """Mistral's folders hold the weights once more, under other names."""
  tensors = {str(i): np.full((3, i), i, 'f4') for i in range(1, 5)}
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  extra = np.zeros((2, 2), 'f4')
  for shard_bytes in (50, 10**6):
    folder = tmp_path / str(shard_bytes)
    hf.write_tensors(tmp_path, {'x': (2, 2)}, lambda _: extra)
    folder.mkdir()
    hf.write_tensors(folder, shapes, tensors.__getitem__, shard_bytes)
    (tmp_path / 'model.safetensors').rename(folder / 'consolidated.safetensors')
    assert set(hf.open_tensors(folder)) == set(tensors)


def test_shards_of_files(tmp_path):
  tensors = {str(i): np.full((3, i), i, 'f4') for i in range(1, 5)}
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  hf.write_tensors(tmp_path, shapes, tensors.__getitem__, shard_bytes=50)
  assert len(list(tmp_path.glob('*.safetensors'))) == 3
  for name, tensor in hf.open_tensors(tmp_path).items():
    np.testing.assert_array_equal(tensor, tensors[name])
  next(tmp_path.glob('*1-of*.safetensors')).unlink()
  with pytest.raises(ValueError, match='files are missing: model-00001'):
    hf.open_tensors(tmp_path)
