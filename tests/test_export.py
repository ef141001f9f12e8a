"""From our checkpoint to the Hugging Face format, and back into a stage."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax import export, model_fns, model_folder, queries
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import sharding
from instruct_jax.models.config import TransformerConfig

pytestmark = pytest.mark.usefixtures('quick_compile')

CONFIG = TransformerConfig(
  vocab_size=7,
  context_length=16,
  num_layers=2,
  width=8,
  num_heads=2,
  head_dim=4,
  mlp_dim=16,
  vocab_multiple=8,
)


@pytest.mark.parametrize('kind', ['policy', 'scalar'])
def test_out_and_back(kind, tmp_path):
  tokenizer = tokenizer_lib.train_word_level(['a', 'b', 'c', 'd'])
  tokenizer.save(tmp_path / 'tokenizer')
  mesh = sharding.make_mesh((1, -1, 1))
  model = model_fns.init(kind, CONFIG, mesh, jax.random.key(0))
  model_folder.save(tmp_path / 'model', model, tokenizer, {'seed': 0})
  out = tmp_path / 'out'
  export.export(tmp_path / 'model', tmp_path / 'tokenizer', out)

  again = tokenizer_lib.Tokenizer.load(out)
  assert again.fingerprint == tokenizer.fingerprint
  assert model_folder.is_published(out)
  assert not model_folder.is_published(tmp_path / 'model')
  assert queries.tokenizer_of(f'hf:{out}', '').fingerprint == again.fingerprint
  assert model_folder.content_hash(f'hf:{out}') == model_folder.content_hash(
    out
  )
  for name in (str(out), f'hf:{out}'):
    loaded = model_folder.load(
      name,
      kind,
      mesh,
      again,
      dropout=0.1,
    )
    assert loaded.config.dropout == 0.1
    tokens = jnp.array([[3, 4, 5, 6, 1]], jnp.int32)
    mask = jnp.ones_like(tokens)
    outputs = [
      np.asarray(m.module.apply({'params': m.params}, tokens, mask))
      for m in (model, loaded)
    ]
    if kind == 'policy':
      outputs = [logits[..., : tokenizer.vocab_size] for logits in outputs]
    np.testing.assert_array_equal(*outputs)
  described = json.loads((out / 'config.json').read_text())
  assert (described['eos_token_id'], described['pad_token_id']) == (1, 0)
  assert '"seed": 0' in (out / 'README.md').read_text()
  with pytest.raises(ValueError, match='is no empty folder'):
    export.export(tmp_path / 'model', tmp_path / 'tokenizer', out)
  larger = tokenizer_lib.train_word_level(list('abcdef'))
  with pytest.raises(ValueError, match='tokenizer of 7 tokens .* one of 9 '):
    model_folder.load(out, kind, mesh, larger)
  (out / 'tokenizer.json').unlink()
  with pytest.raises(ValueError, match='7 embedding rows, .* 9 tokens'):
    model_folder.load(out, kind, mesh, larger)
