"""Folders written by us, opened by `transformers`; needs torch.

Everything else is tested without torch. With it (2.13.0, CPU):

  python -m pytest tests/test_export_transformers.py
"""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from instruct_jax import export, lora, model_fns, model_folder
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import sharding
from instruct_jax.models import hf
from instruct_jax.models.config import Lora
from tests import test_export, test_models_hf

torch = pytest.importorskip('torch', reason='opens our folders with torch')

pytestmark = pytest.mark.usefixtures('quick_compile')

CLOSE = {'rtol': 0, 'atol': 1e-4}
PAD = 0


def open_with_transformers(auto_class, folder):
  """The model, with every weight from the file and none left over."""
  model, found = auto_class.from_pretrained(
    folder, output_loading_info=True, attn_implementation='eager'
  )
  for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'):
    assert not found[kind], (kind, found[kind])
  return model.eval()


def with_padding(tokens):
  """Right-padded rows of different lengths, [B, T], and their lengths."""
  lengths = tokens.shape[1] - 3 * np.arange(len(tokens))
  mask = np.arange(tokens.shape[1])[None] < lengths[:, None]
  return np.where(mask, tokens, PAD), mask


def our_scores(module, params, tokens, mask):
  scalars = jax.jit(model_fns.scalars_fn(module))(
    params, jnp.asarray(tokens), jnp.asarray(mask)
  )
  last = mask.sum(axis=1) - 1
  return np.asarray(scalars)[np.arange(len(tokens)), last]


def their_scores(folder, tokens, mask):
  model = open_with_transformers(
    transformers.AutoModelForSequenceClassification, folder
  )
  with torch.no_grad():
    logits = model(
      torch.tensor(tokens), attention_mask=torch.tensor(mask)
    ).logits
  described = json.loads((folder / 'config.json').read_text())
  assert described['architectures'] == [type(model).__name__]
  assert logits.shape == (len(tokens), 1)
  return logits.numpy()[:, 0]


@pytest.mark.parametrize('name', test_models_hf.FAMILIES)
def test_policies_and_reward_models_open_with_equal_numbers(name, tmp_path):
  golden = test_models_hf.write_folder(tmp_path / 'in', name)
  module, params = test_models_hf.load(tmp_path / 'in')
  hf.save(tmp_path / 'policy', module.config, params)
  model = open_with_transformers(
    transformers.AutoModelForCausalLM, tmp_path / 'policy'
  )
  tokens = golden['tokens'].astype(np.int64)
  with torch.no_grad():
    logits = model(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(logits, golden['logits'], **CLOSE)
  described = json.loads((tmp_path / 'policy' / 'config.json').read_text())
  assert described['architectures'] == [type(model).__name__]

  policy = model_fns.Model('policy', module, params, {})
  mesh = sharding.make_mesh((8, 1, 1))
  reward = model_fns.scalar_from_policy(policy, mesh, jax.random.key(0))
  ours = {**reward.params, 'head_bias': jnp.float32(-0.7)}
  hf.save(tmp_path / 'reward', module.config, ours)
  path = tmp_path / 'reward' / 'config.json'
  described = json.loads(path.read_text())
  path.write_text(json.dumps({**described, 'pad_token_id': PAD}))
  padded, mask = with_padding(tokens)
  theirs = their_scores(tmp_path / 'reward', padded, mask)
  wanted = our_scores(reward.module, ours, padded, mask)
  np.testing.assert_allclose(theirs + described['score_shift'], wanted, **CLOSE)


def test_folded_reward_model_and_tokenizer_open(tmp_path):
  """The whole command: the logit is the score, and ids are the same."""
  tokenizer = tokenizer_lib.train_bpe(['some text, and more'] * 3, 262)
  tokenizer.save(tmp_path / 'tokenizer')
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  golden = np.load(test_models_hf.GOLDEN / 'family_gpt2.npz')
  config = test_models_hf.TransformerConfig.from_hf(
    json.loads(str(golden['config']))
  )
  config = dataclasses.replace(
    config, vocab_size=tokenizer.vocab_size, embedding_rows=0
  )
  model = model_fns.init('scalar', config, mesh, jax.random.key(0))
  params = {**model.params, 'head_bias': jnp.float32(-1.25)}
  model = dataclasses.replace(model, params=params)
  model_folder.save(tmp_path / 'model', model, tokenizer, {})
  out = tmp_path / 'out'
  export.export(
    tmp_path / 'model', tmp_path / 'tokenizer', out, fold_shift=True
  )
  theirs = transformers.AutoTokenizer.from_pretrained(out)
  texts = ['some text', 'and more text']
  batch = theirs(texts, padding=True, return_tensors='np')
  ids = [row[row != tokenizer.pad_id].tolist() for row in batch['input_ids']]
  assert ids == tokenizer.encode_batch(texts)
  tokens, mask = batch['input_ids'], batch['attention_mask'].astype(bool)
  scores = their_scores(out, tokens, mask)
  np.testing.assert_allclose(
    scores, our_scores(model.module, params, tokens, mask), **CLOSE
  )
  assert np.abs(scores).max() > 0.5  # The shift is in there.


def test_the_folder_generates_and_stops(tmp_path):
  """As it is: by its own template, end tokens and sampling settings."""
  out, tokenizer = test_export.written(
    tmp_path, template='Q: {prompt}', given={}
  )
  model = open_with_transformers(transformers.AutoModelForCausalLM, out)
  theirs = transformers.AutoTokenizer.from_pretrained(out)
  asked = [{'role': 'user', 'content': 'hi'}]
  text = theirs.apply_chat_template(asked, tokenize=False)
  ids = theirs(text, add_special_tokens=False, return_tensors='pt')['input_ids']
  # A model that says one token: each end token ends, and nothing else does.
  (other, *_) = {*range(9)} - {*tokenizer.stop_ids, tokenizer.pad_id}
  for end in (*tokenizer.stop_ids, other):
    scores = torch.full((1, 1, model.config.vocab_size), -1e9)
    scores[..., end] = 0.0
    model.lm_head.register_forward_hook(
      lambda module, inputs, output, scores=scores: scores.expand_as(output)
    )
    with torch.no_grad():
      found = model.generate(ids, max_new_tokens=4)
    new = found[0, ids.shape[1] :].tolist()
    assert new == [end] * (1 if end in tokenizer.stop_ids else 4)


# --- Adapters -----------------------------------------------------------------


def random_adapters(module, params, seed, targets=()):
  """The module with adapters, and base and random adapters as one tree."""
  adapters = Lora(rank=2, alpha=3.0, targets=targets)
  config = dataclasses.replace(module.config, lora=adapters)
  module = module.clone(config=config)
  kind = 'scalar' if 'head_kernel' in params else 'policy'
  abstract, _ = lora.split(
    model_fns.abstract_params(kind, config, sharding.make_mesh((8, 1, 1)))
  )
  rng = np.random.default_rng(seed)
  trained = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), abstract
  )
  _, base = lora.split(params)
  return module, lora.join(trained, base), trained


def open_with_peft(auto_class, base, folder, **changes):
  peft = pytest.importorskip('peft', reason='opens our adapters with peft')
  with warnings.catch_warnings():
    warnings.simplefilter('error', UserWarning)  # Keys it does not know.
    warnings.filterwarnings('ignore', message='.*Some weights.*')
    model = auto_class.from_pretrained(
      base, attn_implementation='eager', **changes
    )
    return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize('name', test_models_hf.FAMILIES)
@pytest.mark.parametrize('targets', [(), ('query', 'value', 'down')])
def test_peft_opens_adapters_of_every_family(name, targets, tmp_path):
  """On the published base; fused matrices with all of theirs or a part."""
  golden = test_models_hf.write_folder(tmp_path / 'in', name)
  module, params = test_models_hf.load(tmp_path / 'in')
  module, whole, trained = random_adapters(module, params, 0, targets)
  hf.save_adapters(tmp_path / 'out', module.config, trained, 'BASE')
  tokens = jnp.asarray(golden['tokens'], jnp.int32)
  plain = module.clone(config=dataclasses.replace(module.config, lora=None))
  expected, before = (
    np.asarray(m.apply({'params': p}, tokens, jnp.ones_like(tokens)))
    for m, p in ((module, whole), (plain, params))
  )
  model = open_with_peft(
    transformers.AutoModelForCausalLM, tmp_path / 'in', tmp_path / 'out'
  )
  with torch.no_grad():
    logits = model(
      torch.tensor(golden['tokens'].astype(np.int64))
    ).logits.numpy()
  num = logits.shape[-1]
  np.testing.assert_allclose(logits, expected[..., :num], rtol=1e-4, atol=1e-4)
  assert np.abs(logits - before[..., :num]).max() > 0.05


def test_peft_opens_what_the_command_writes(tmp_path):
  """A policy on a base of ours, written beside it; a reward model, whose head
  goes with the adapters and whose shift is in the card."""
  tokenizer = tokenizer_lib.train_word_level(['a', 'b', 'c', 'd'])
  tokenizer.save(tmp_path / 'tokenizer')
  mesh = sharding.make_mesh((8, 1, 1))
  config = test_export.CONFIG
  base = model_fns.init('policy', config, mesh, jax.random.key(0))
  model_folder.save(tmp_path / 'base', base, tokenizer, {})
  base = model_folder.load(tmp_path / 'base', 'policy', mesh, tokenizer)
  reward = model_fns.scalar_from_policy(base, mesh, jax.random.key(1))
  tokens, mask = with_padding(np.full((3, 8), 3) + np.arange(8) % 4)
  for model, auto_class in (
    (base, transformers.AutoModelForCausalLM),
    (reward, transformers.AutoModelForSequenceClassification),
  ):
    module, whole, trained = random_adapters(model.module, model.params, 1)
    adapted = dataclasses.replace(model, module=module, params=trained)
    folder, out = tmp_path / model.kind, tmp_path / f'{model.kind}_out'
    model_folder.save(folder, adapted, tokenizer, {})
    export.export(folder, tmp_path / 'tokenizer', out, adapters=True)
    described = json.loads((out / 'adapter_config.json').read_text())
    changes = {'num_labels': 1} if model.kind == 'scalar' else {}
    opened = open_with_peft(
      auto_class, described['base_model_name_or_path'], out, **changes
    )
    with torch.no_grad():
      logits = opened(
        torch.tensor(tokens), attention_mask=torch.tensor(mask)
      ).logits.numpy()
    if model.kind == 'scalar':
      expected = our_scores(module, whole, tokens, mask)
      shift = float(whole['head_bias'])
      assert abs(shift) > 0.01
      np.testing.assert_allclose(logits[:, 0] + shift, expected, **CLOSE)
    else:
      expected = module.apply(
        {'params': whole},
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(mask, jnp.int32),
      )
      num = logits.shape[-1]
      np.testing.assert_allclose(
        logits[mask], np.asarray(expected)[mask][:, :num], **CLOSE
      )
