"""SFT, reward model and PPO-ptx from published folders, on HH-shaped files."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from etils import epath

from configs import ppo_ptx, reward, sft
from instruct_jax import (
  alarms,
  export,
  model_fns,
  model_folder,
  queries,
  rollout,
)
from instruct_jax.data import convert, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import checkpoint, pipeline, sharding
from instruct_jax.models import hf
from instruct_jax.models.config import Rotary, TransformerConfig
from instruct_jax.types import PromptBatch
from tests import tiny

pytestmark = pytest.mark.usefixtures('quick_compile')

# 259 ids: 256 bytes, two merges, EOS. There is no PAD, as in GPT-2.
NUM_TOKENS = 259
GPT2 = TransformerConfig(
  vocab_size=NUM_TOKENS,
  context_length=96,
  num_layers=2,
  width=16,
  num_heads=2,
  head_dim=8,
  mlp_dim=32,
  vocab_multiple=1,
)
LLAMA = TransformerConfig(
  vocab_size=NUM_TOKENS,
  context_length=96,
  num_layers=1,
  width=24,
  num_heads=4,
  head_dim=6,
  mlp_dim=16,
  vocab_multiple=1,
  num_kv_heads=2,
  norm='rms',
  rotary=Rotary(dim=6),
  gated_mlp=True,
  activation='silu',
  qkv_bias=False,
  out_bias=False,
  mlp_bias=False,
  tied=False,
)


def write_model(folder, config, kind='policy'):
  """A random model with its tokenizer, as published."""
  mesh = sharding.make_mesh((1, -1, 1))
  model = model_fns.init(kind, config, mesh, jax.random.key(1))
  hf.save(folder, config, model.params)
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.pre_tokenizer = byte_level
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=NUM_TOKENS,
    special_tokens=['<|endoftext|>'],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator(['Human Assistant'] * 9, trainer)
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    eos_token='<|endoftext|>',
    clean_up_tokenization_spaces=False,
  ).save_pretrained(folder)
  return f'hf:{folder}'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """HH files as upstream writes them, and what `convert` makes of them."""
  folder = tmp_path_factory.mktemp('data')
  lines = []
  for i in range(60):
    asked = f'\n\nHuman: Name {i}?\n\nAssistant: '
    if i % 3 == 0:
      asked = f'\n\nHuman: Hi\n\nAssistant: Yes?{asked}'
    lines.append(
      json.dumps({'chosen': f'{asked}It is {i}.', 'rejected': f'{asked}No.'})
    )
  (folder / 'train.jsonl').write_text('\n'.join(lines))
  convert.convert('hh', [folder / 'train.jsonl'], folder, valid=0.2, seed=0)
  texts = [records.Document(f'The number {i} is a number.') for i in range(60)]
  records.write_jsonl(folder / 'documents.jsonl', texts)
  return folder


def run(config, workdir, **changes):
  config = config.unlock() or config
  for name, value in changes.items():
    config[name] = value
  config.workdir = str(workdir)
  pipeline.run_all(
    config, epath.Path(workdir), config.copy_and_resolve_references()
  )


def small(config):
  with config.unlocked():
    config.num_microbatches = 1
    config.remat = 'none'
    config.eval_batch_size = 8
  return config


def run_sft(data, workdir, init, **changes):
  values = {'row_length': 96, 'batch_size': 8, 'num_epochs': 1}
  run(
    small(sft.get_config('gpt2')),
    workdir,
    init=init,
    tokenizer=init,
    demonstrations=str(data / 'demonstrations_train.jsonl'),
    valid_demonstrations=str(data / 'demonstrations_valid.jsonl'),
    **{**values, **changes},
  )


def run_reward(data, workdir, init, tokenizer, **changes):
  values = {'max_candidates': 2, 'row_length': 96, 'batch_size': 16}
  run(
    small(reward.get_config('gpt2')),
    workdir,
    init=init,
    tokenizer=tokenizer,
    comparisons=str(data / 'comparisons_train.jsonl'),
    valid_comparisons=str(data / 'comparisons_valid.jsonl'),
    demonstrations=str(data / 'demonstrations_train.jsonl'),
    **{**values, **changes},
  )


def run_ppo(data, workdir, init, reward_model, tokenizer, **changes):
  values = {
    'prompt_length': 80,
    'response_length': 8,
    'ptx_row_length': 40,
    'num_episodes': 16,
    'batch_size': 8,
    'num_minibatches': 2,
  }
  run(
    small(ppo_ptx.get_config('gpt2')),
    workdir,
    init=init,
    reward_model=reward_model,
    tokenizer=tokenizer,
    prompts=str(data / 'prompts_train.jsonl'),
    documents=str(data / 'documents.jsonl'),
    valid_documents=str(data / 'documents.jsonl'),
    **{**values, **changes},
  )


@pytest.mark.slow
def test_all_stages_from_a_published_folder(data, tmp_path):
  init = write_model(tmp_path / 'gpt2', GPT2)
  run_sft(data, tmp_path / 'sft', init)
  run_reward(data, tmp_path / 'reward', str(tmp_path / 'sft' / 'model'), init)
  run_ppo(
    data,
    tmp_path / 'ppo',
    str(tmp_path / 'sft' / 'model'),
    str(tmp_path / 'reward' / 'model'),
    init,
  )
  tokenizer = tokenizer_lib.Tokenizer.load(init)
  assert tokenizer.vocab_size == NUM_TOKENS + 1  # A PAD of its own.

  # Out again: policy and moving average, each on its own, and they differ.
  mesh = sharding.make_mesh((1, -1, 1))
  weights = []
  for name in ('policy', 'ema'):
    export.export(tmp_path / 'ppo' / name, init, tmp_path / f'out_{name}')
    again = model_folder.load(
      f'hf:{tmp_path / f"out_{name}"}',
      'policy',
      mesh,
      tokenizer,
    )
    ours = model_folder.load(tmp_path / 'ppo' / name, 'policy', mesh, tokenizer)
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
    weights.append(np.asarray(ours.params['trunk']['layers']['up_kernel']))
    tokenizer_lib.check_published(tokenizer, f'hf:{tmp_path / f"out_{name}"}')
  assert not np.array_equal(*weights)


@pytest.mark.slow
def test_policy_and_reward_model_of_two_families(data, tmp_path):
  policy = write_model(tmp_path / 'gpt2', GPT2)
  other = write_model(tmp_path / 'llama', LLAMA, 'scalar')
  run_ppo(data, tmp_path / 'ppo', policy, other, policy, num_episodes=8)
  described = [
    checkpoint.load_metadata(tmp_path / 'ppo' / 'policy')['model'],
    hf.read_config(tmp_path / 'llama'),
  ]
  assert described[0]['norm'] == 'layer'
  assert described[1]['model_type'] == 'llama'

  # Rows that the models cannot read, prompts that fit none.
  with pytest.raises(ValueError, match='ask for 112 tokens, .* of 96; lower'):
    run_ppo(data, tmp_path / 'a', policy, other, policy, response_length=32)
  with pytest.raises(ValueError, match='no prompts left: .* prompt_length .4 '):
    run_ppo(data, tmp_path / 'b', policy, other, policy, prompt_length=4)
  # Another tokenizer in the reward model's folder.
  tokenizer_lib.train_bpe(['x'], 258).save(tmp_path / 'llama')
  with pytest.raises(ValueError, match='llama has a tokenizer of 258 tokens'):
    run_ppo(data, tmp_path / 'c', policy, other, policy)


@pytest.mark.parametrize(
  'dtype', [pytest.param('float32', marks=pytest.mark.slow), 'bfloat16']
)
def test_ppo_in_either_dtype_raises_no_alarm(dtype, data, tmp_path, capsys):
  init = write_model(tmp_path / 'gpt2', GPT2)
  reward_model = write_model(tmp_path / 'reward', LLAMA, 'scalar')
  run_ppo(
    data,
    tmp_path / 'ppo',
    init,
    reward_model,
    init,
    compute_dtype=dtype,
    num_episodes=8,
    ptx_coef=0.1,
  )
  changed = f'gpt2: computes in {dtype} (compute_dtype), not in float32 as its'
  assert (changed in capsys.readouterr().out) == (dtype != 'float32')
  (line,) = (tmp_path / 'ppo' / 'metrics.jsonl').read_text().splitlines()
  row = json.loads(line)
  ratio = abs(row['first/ppo/policy/ratio'] - 1)
  difference = row['objective/sampler_difference']
  assert ratio <= alarms.RATIO_TOLERANCE[dtype]
  assert row['first/ppo/policy/approxkl'] <= alarms.KL_TOLERANCE[dtype]
  assert 0 < difference <= alarms.SAMPLER_TOLERANCE[dtype]
  # One default for both: what is trusted agrees to it.
  within = row['objective/sampler_difference_max'] <= 1e-3
  assert row['objective/sampler_trusted'] == within
  assert within or dtype == 'bfloat16'
  assert json.loads((tmp_path / 'ppo' / 'alarms.json').read_text()) == {}
  # What is written computes as it was trained, and weighs float32.
  described = checkpoint.load_metadata(tmp_path / 'ppo' / 'policy')
  assert described['model']['compute_dtype'] == dtype
  policy = model_folder.load(
    tmp_path / 'ppo' / 'policy',
    'policy',
    sharding.make_mesh((1, -1, 1)),
    tokenizer_lib.Tokenizer.load(init),
  )
  assert policy.config.compute_dtype == dtype
  dtypes = {str(x.dtype) for x in jax.tree.leaves(policy.params)}
  assert dtypes == {'float32'}


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_tolerances_on_a_published_model(dtype, models_root):
  """SmolLM2, four prompts of 16 tokens: the figures in alarms.py."""
  folder = models_root / 'SmolLM2-135M-Instruct'
  if not folder.is_dir():
    pytest.skip(f'{folder} is not there')
  tokenizer = tokenizer_lib.Tokenizer.load(folder)
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  model = queries.load_policy(str(folder), tokenizer, mesh, compute_dtype=dtype)
  prompts = tokenizer.encode_batch(['Name a bird.', 'The sea is', 'A', '2 + 2'])
  tokens, mask = queries.padded(prompts, 8, tokenizer.pad_id, left=True)
  sampled = jax.jit(
    functools.partial(
      rollout.generate,
      decoder=model_fns.decoder(model.module),
      num_response=16,
      stop_ids=tokenizer.stop_ids,
    )
  )(
    model.params,
    PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(4)),
    jax.random.key(0),
  )
  rows = tiny.as_rows(sampled)
  graph, _ = jax.jit(model_fns.logprobs_fn(model.module))(
    model.params, rows.tokens, rows.segments, rows.where
  )
  real = np.asarray(sampled.response_mask)
  difference = np.asarray(sampled.logprobs - graph)[real]
  assert np.abs(difference).mean() <= alarms.SAMPLER_TOLERANCE[dtype] / 3
  assert (np.abs(difference).max() <= 1e-3) == (dtype == 'float32')


def test_folded_shift_gives_the_same_score(tmp_path):
  """A classifier of transformers adds no bias: the final norm's can."""
  tokenizer = tokenizer_lib.train_bpe(['some text'], 258)
  tokenizer.save(tmp_path / 'tokenizer')
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])

  def write(config, name):
    config = dataclasses.replace(config, vocab_size=258)
    model = model_fns.init('scalar', config, mesh, jax.random.key(0))
    params = {**model.params, 'head_bias': jnp.float32(-1.25)}
    model = dataclasses.replace(model, params=params)
    model_folder.save(tmp_path / name, model, tokenizer, {})
    return model

  ours = write(GPT2, 'gpt2')
  arguments = tmp_path / 'tokenizer', tmp_path / 'out'
  export.export(tmp_path / 'gpt2', *arguments, fold_shift=True)
  described = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert described['score_shift'] == 0
  theirs = model_folder.load(tmp_path / 'out', 'scalar', mesh, tokenizer)
  assert float(theirs.params['head_bias']) == 0
  tokens = jnp.array([tokenizer.encode('some text, and more')], jnp.int32)
  scores = [
    model.module.apply({'params': model.params}, tokens, jnp.ones_like(tokens))
    for model in (ours, theirs)
  ]
  np.testing.assert_allclose(*scores, rtol=0, atol=1e-5)
  assert np.abs(np.asarray(scores[0])).max() > 0.5  # The shift is in there.
  write(LLAMA, 'llama')  # RMS norms have no bias.
  with pytest.raises(ValueError, match='no bias to fold the shift'):
    export.export(
      tmp_path / 'llama',
      tmp_path / 'tokenizer',
      tmp_path / 'llama_out',
      fold_shift=True,
    )


@pytest.mark.slow
def test_all_stages_on_real_dialogues(data_root, tmp_path):
  """HH's own files and GPT-2's own vocabulary, with a tiny random GPT-2."""
  for name, file in (
    ('helpful', 'hh_helpful/train_gt.jsonl.gz'),
    ('harmless', 'hh_harmless/harmless_train_gt.jsonl.gz'),
  ):
    lines = records.read_bytes(data_root / file).split(b'\n')[:60]
    (tmp_path / f'{name}.jsonl').write_bytes(b'\n'.join(lines))
  paths = [tmp_path / 'helpful.jsonl', tmp_path / 'harmless.jsonl']
  counts = convert.convert('hh', paths, tmp_path, valid=0.2, seed=0)
  assert counts['comparisons_train'] + counts['comparisons_valid'] > 110
  texts = records.read_jsonl(
    tmp_path / 'demonstrations_train.jsonl', records.Demonstration
  )
  records.write_jsonl(
    tmp_path / 'documents.jsonl',
    [records.Document(d.prompt + d.response) for d in texts],
  )
  shape = dataclasses.replace(GPT2, vocab_size=50257, context_length=128)
  model = model_fns.init(
    'policy', shape, sharding.make_mesh((1, -1, 1)), jax.random.key(1)
  )
  hf.save(tmp_path / 'gpt2', shape, model.params)
  for ours, theirs in (
    ('encoder.json.gz', 'vocab.json'),
    ('vocab.bpe.gz', 'merges.txt'),
  ):
    content = records.read_bytes(data_root / 'gpt2_bpe' / ours)
    (tmp_path / 'gpt2' / theirs).write_bytes(content)
  init = f'hf:{tmp_path / "gpt2"}'
  rows = {'row_length': 128, 'batch_size': 8, 'eval_batch_size': 8}
  run_sft(tmp_path, tmp_path / 'sft', init, **rows)
  folders = [str(tmp_path / name / 'model') for name in ('sft', 'reward')]
  run_reward(tmp_path, tmp_path / 'reward', folders[0], init, **rows)
  run_ppo(tmp_path, tmp_path / 'ppo', *folders, init, prompt_length=100)
  results = json.loads((tmp_path / 'reward' / 'results.json').read_text())
  # Some are longer than a row; most are not.
  assert 0 < results['num_dropped'] < 60 < results['num_comparisons']
  lines = (tmp_path / 'ppo' / 'metrics.jsonl').read_text().splitlines()
  assert len(lines) == 2
  assert all(json.loads(line)['objective/kl'] is not None for line in lines)
