"""From our checkpoint to the Hugging Face format, and back into a stage."""

import dataclasses
import json
import resource

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import pytest
import transformers

from instruct_jax import export, files, lora, model_fns, model_folder, queries
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import sharding
from instruct_jax.models import hf
from instruct_jax.models.config import Lora, TransformerConfig
from tests import published, test_models_hf, tiny

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
  with pytest.raises(ValueError, match='is not an empty folder'):
    export.export(tmp_path / 'model', tmp_path / 'tokenizer', out)
  larger = tokenizer_lib.train_word_level(list('abcdef'))
  with pytest.raises(ValueError, match='tokenizer of 7 tokens .* one of 9 '):
    model_folder.load(out, kind, mesh, larger)
  (out / 'tokenizer.json').unlink()
  with pytest.raises(
    ValueError, match='tokenizer has 9 tokens, the embedding 7'
  ):
    model_folder.load(out, kind, mesh, larger)


# --- What servers read --------------------------------------------------------


def written(folder, kind='policy', **options):
  """An export with a byte tokenizer, and the tokenizer of the training."""
  published.save_byte_tokenizer(folder / 'given', **options.pop('given', {}))
  tokenizer = tokenizer_lib.Tokenizer.load(folder / 'given')
  tokenizer = tokenizer.with_format(options.get('template', ''), ())
  tokenizer.save(folder / 'tokenizer')
  config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
  mesh = sharding.make_mesh((1, -1, 1))
  model = model_fns.init(kind, config, mesh, jax.random.key(0))
  model_folder.save(folder / 'model', model, tokenizer, {})
  export.export(folder / 'model', folder / 'tokenizer', folder / 'out')
  return folder / 'out', tokenizer


@pytest.mark.parametrize(
  ('template', 'given'),
  [
    (tokenizer_lib.CHAT, {'template': published.TEMPLATE}),
    ('Q: "{prompt}"\n\\ Ä 😀:', {}),
    ('Q: {prompt}', {'template': published.TEMPLATE}),
  ],
)
def test_servers_put_prompts_as_training_did(template, given, tmp_path):
  """The template file gives transformers, and so vLLM, the same ids."""
  out, tokenizer = written(tmp_path, template=template, given=given)
  theirs = transformers.AutoTokenizer.from_pretrained(out)
  assert (out / 'chat_template.jinja').read_text() == theirs.chat_template
  for text in ('What is 2 + 2?', ' Größe\n"x" '):
    asked = [{'role': 'user', 'content': text}]
    rendered = theirs.apply_chat_template(
      asked, tokenize=False, add_generation_prompt=True
    )
    ids = theirs(rendered, add_special_tokens=False)['input_ids']
    assert [ids] == tokenizer.encode_prompts([text])
  if template != tokenizer_lib.CHAT:
    with pytest.raises(jinja2.TemplateError, match='reads one question'):
      theirs.apply_chat_template([*asked, *asked], tokenize=False)
  again = tokenizer_lib.Tokenizer.load(out)
  assert again.fingerprint == tokenizer.fingerprint


def test_the_template_of_a_reward_model_ends_where_it_reads(tmp_path):
  """At the end of the turn, where it was trained; not at the line break."""
  out, tokenizer = written(
    tmp_path,
    kind='scalar',
    template=tokenizer_lib.CHAT,
    given={'template': published.TEMPLATE},
  )
  theirs = transformers.AutoTokenizer.from_pretrained(out)
  for text in ('42', 'Two.\n', '<a>'):
    turns = [
      {'role': 'user', 'content': 'What?'},
      {'role': 'assistant', 'content': text},
    ]
    (prompt,) = tokenizer.encode_prompts(['What?'])
    (answer,) = tokenizer.encode_responses([text], ended=True)
    rendered = theirs.apply_chat_template(turns, tokenize=False)
    ids = theirs(rendered, add_special_tokens=False)['input_ids']
    assert ids == [*prompt, *answer]
    asked = theirs.apply_chat_template(
      turns[:1], tokenize=False, add_generation_prompt=True
    )
    assert theirs(asked, add_special_tokens=False)['input_ids'] == prompt
  # Our programs read it there, too, whatever template is in use.
  assert len(tokenizer.end_ids) == 2
  again = model_folder.load(
    out, 'scalar', sharding.make_mesh((1, -1, 1)), tokenizer
  )
  assert again.module.end_ids == ()


def test_a_template_that_was_not_trained_is_not_served(tmp_path):
  given = {'template': published.TEMPLATE}
  out, tokenizer = written(tmp_path, given=given)
  assert tokenizer.chat_template
  assert not (out / 'chat_template.jinja').exists()
  assert transformers.AutoTokenizer.from_pretrained(out).chat_template is None
  # Text that spells a special token is no special token in training.
  tokenizer = tokenizer.with_format('<end>{prompt}', ())
  assert tokenizer.serving_template() == ''


def test_generation_ends_and_samples_as_training_did(tmp_path):
  out, tokenizer = written(tmp_path)
  found = transformers.GenerationConfig.from_pretrained(out)
  assert found.eos_token_id == list(tokenizer.stop_ids)
  assert len(tokenizer.stop_ids) == 2
  assert found.pad_token_id == tokenizer.pad_id
  assert found.do_sample
  assert (found.temperature, found.top_k, found.top_p) == (1.0, 0, 1.0)


def test_two_exports_to_one_folder_do_not_mix(tmp_path, monkeypatch):
  tokenizer = tokenizer_lib.train_word_level(['a', 'b', 'c', 'd'])
  tokenizer.save(tmp_path / 'tokenizer')
  tiny.save_model(tmp_path, 'model', 'policy', tokenizer, 0)
  arguments = tmp_path / 'model', tmp_path / 'tokenizer', tmp_path / 'out'
  unfinished = tmp_path / '.out.unfinished'
  with files.locked(unfinished):
    (unfinished / 'config.json').write_text('theirs')
    with pytest.raises(
      files.InUseError, match='.out.unfinished: another process'
    ) as error:
      export.export(*arguments)
    assert '\n' not in str(error.value)
    assert [path.name for path in unfinished.iterdir()] == ['config.json']
  # A killed process has left the folder.
  (unfinished / 'old').mkdir(parents=True)
  (unfinished / 'old' / 'x').write_text('left')
  export.export(*arguments)
  assert not unfinished.exists() and not (tmp_path / 'out/old').exists()

  # The other process ends while this one loads the model.
  load = model_folder.load

  def slow(*given, **fields):
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'config.json').write_text('theirs')
    return load(*given, **fields)

  monkeypatch.setattr(model_folder, 'load', slow)
  with pytest.raises(ValueError, match='other is not an empty folder'):
    export.export(*arguments[:2], tmp_path / 'other')
  assert (tmp_path / 'other' / 'config.json').read_text() == 'theirs'
  assert not (tmp_path / '.other.unfinished').exists()


def test_a_full_disk_names_the_exported_folder(tmp_path):
  tokenizer = tokenizer_lib.train_word_level(['a', 'b', 'c', 'd'])
  tokenizer.save(tmp_path / 'tokenizer')
  tiny.save_model(tmp_path, 'model', 'policy', tokenizer, 0)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
  try:
    with pytest.raises(OSError, match='File too large') as error:
      export.export(
        tmp_path / 'model', tmp_path / 'tokenizer', tmp_path / 'out'
      )
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert str(error.value.filename).startswith(str(tmp_path / 'out'))
  assert not list(tmp_path.glob('*out*'))


def test_a_reward_model_is_a_classifier_of_one_label(tmp_path):
  out, _ = written(tmp_path, kind='scalar')
  config = transformers.AutoConfig.from_pretrained(out)
  assert config.num_labels == 1
  assert config.problem_type == 'regression'  # No sigmoid in vLLM.
  (name,) = config.architectures
  assert name == 'GPT2ForSequenceClassification'


# --- Adapters -----------------------------------------------------------------


def tensors_of(folder):
  return {name: np.asarray(x) for name, x in hf.open_tensors(folder).items()}


def random_adapters(kind, config, seed=0):
  """Adapters, and the head of a scalar model, far from zero."""
  abstract, _ = lora.split(
    model_fns.abstract_params(kind, config, sharding.make_mesh((8, 1, 1)))
  )
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), abstract
  )


@pytest.mark.parametrize('name', test_models_hf.FAMILIES)
@pytest.mark.parametrize('targets', [(), ('value', 'out')])
def test_the_product_is_what_merging_adds(name, targets, tmp_path):
  """In each published matrix, alpha / r B A or, of GPT-2, its transpose."""
  test_models_hf.write_folder(tmp_path / 'base', name)
  module, params = test_models_hf.load(tmp_path / 'base')
  adapters = Lora(rank=2, alpha=3.0, targets=targets)
  config = dataclasses.replace(module.config, lora=adapters)
  trained = random_adapters('policy', config)
  hf.save_adapters(tmp_path / 'out', config, trained, 'BASE')
  merged = lora.merge(lora.join(trained, params), adapters.scale)
  hf.save(tmp_path / 'merged', module.config, merged)

  described = json.loads((tmp_path / 'out' / 'adapter_config.json').read_text())
  assert described['base_model_name_or_path'] == 'BASE'
  assert described['fan_in_fan_out'] == (name == 'gpt2')
  written = tensors_of(tmp_path / 'out')
  base, changed = map(tensors_of, (tmp_path / 'base', tmp_path / 'merged'))
  for key, before in base.items():
    stem = 'base_model.model.' + key.removesuffix('.weight')
    added = changed[key] - before
    if f'{stem}.lora_A.weight' not in written:
      assert not added.any(), key
      continue
    (module_name,) = (
      m for m in described['target_modules'] if stem.endswith(f'.{m}')
    )
    a, b = (written.pop(f'{stem}.lora_{x}.weight') for x in 'AB')
    rank = described['rank_pattern'].get(module_name, described['r'])
    alpha = described['alpha_pattern'].get(module_name, described['lora_alpha'])
    assert (a.shape[0], b.shape[1], alpha / rank) == (rank, rank, 1.5)
    product = 1.5 * b @ a
    if described['fan_in_fan_out']:
      product = product.T
    assert np.abs(added).max() > 0.1
    np.testing.assert_allclose(added, product, rtol=1e-4, atol=1e-5)
  assert not written  # All of them belong to a matrix of the base.


@pytest.fixture(scope='module')
def adapted_models(tmp_path_factory):
  """A base, and folders of adapters on it: 'policy' and 'scalar'."""
  tmp_path = tmp_path_factory.mktemp('adapted')
  tokenizer = tokenizer_lib.train_word_level(['a', 'b', 'c', 'd'])
  tokenizer.save(tmp_path / 'tokenizer')
  mesh = sharding.make_mesh((1, -1, 1))
  base = model_fns.init('policy', CONFIG, mesh, jax.random.key(0))
  model_folder.save(tmp_path / 'base', base, tokenizer, {})
  base = model_folder.load(tmp_path / 'base', 'policy', mesh, tokenizer)
  scalar = model_fns.scalar_from_policy(base, mesh, jax.random.key(1))
  for model in (base, scalar):
    adapted = model_fns.adapted(model, Lora(2, 4.0, ('query', 'up')), mesh, 0)
    trained = random_adapters(model.kind, adapted.config)
    model_folder.save(
      tmp_path / model.kind,
      dataclasses.replace(adapted, params=trained),
      tokenizer,
      {'seed': 0},
    )
  return tmp_path


def assert_layers_equal(*models):
  layers = (model.params['trunk']['layers'] for model in models)
  jax.tree.map(np.testing.assert_array_equal, *layers)


@pytest.mark.parametrize('kind', ['policy', 'scalar'])
def test_adapters_beside_their_base(kind, adapted_models, tmp_path):
  folder = adapted_models
  tokenizer = tokenizer_lib.Tokenizer.load(folder / 'tokenizer')
  out = tmp_path / 'out'
  assert (
    export.main(
      [
        f'--checkpoint={folder / kind}',
        f'--tokenizer={folder / "tokenizer"}',
        f'--output={out}',
        '--adapters',
      ]
    )
    == 0
  )
  described = json.loads((out / 'adapter_config.json').read_text())
  assert described['base_model_name_or_path'] == str(out / 'base')
  assert described['task_type'] == {'policy': 'CAUSAL_LM'}.get(kind, 'SEQ_CLS')
  assert described['target_modules'] == ['attn.c_attn', 'mlp.c_fc']
  # A and B of two matrices in two layers; and the head.
  written = tensors_of(out)
  assert len(written) == 8 + (kind == 'scalar')
  assert tokenizer_lib.Tokenizer.load(out).fingerprint == tokenizer.fingerprint
  card = (out / 'README.md').read_text()
  assert 'to be loaded by `peft` on top of their base' in card
  mesh = sharding.make_mesh((1, -1, 1))
  expected = model_folder.load(folder / 'base', 'policy', mesh, tokenizer)
  base = model_folder.load(out / 'base', 'policy', mesh, tokenizer)
  assert_layers_equal(base, expected)
  if kind == 'scalar':
    read = model_folder.read(folder / kind, kind, mesh, tokenizer)
    head = read.params['head_kernel'][None]
    key = 'base_model.model.score.weight'
    np.testing.assert_array_equal(written[key], head)
    assert f'`score_shift` = {float(read.params["head_bias"])}' in card


def test_a_published_base_is_named_and_not_written_again(
  adapted_models, tmp_path
):
  folder, tokens = tmp_path, adapted_models / 'tokenizer'
  export.export(adapted_models / 'base', tokens, folder / 'published')
  tokenizer = tokenizer_lib.Tokenizer.load(folder / 'published')
  mesh = sharding.make_mesh((1, -1, 1))
  base = model_folder.load(
    f'hf:{folder / "published"}', 'policy', mesh, tokenizer
  )
  adapted = model_fns.adapted(base, Lora(2, 4.0, ('up',)), mesh, 0)
  model_folder.save(folder / 'adapters', adapted, tokenizer, {})
  export.export(folder / 'adapters', tokens, folder / 'out', adapters=True)
  described = json.loads((folder / 'out' / 'adapter_config.json').read_text())
  assert described['base_model_name_or_path'] == str(folder / 'published')
  assert not (folder / 'out' / 'base').exists()


def test_adapters_that_cannot_be_written(adapted_models, tmp_path):
  folder = adapted_models
  out, tokens = tmp_path / 'out', folder / 'tokenizer'
  with pytest.raises(ValueError, match='base holds no adapters; leave --adapt'):
    export.export(folder / 'base', tokens, out, adapters=True)
  with pytest.raises(ValueError, match='give fold_shift or adapters, not both'):
    export.export(
      folder / 'scalar', tokens, out, fold_shift=True, adapters=True
    )
  assert not out.exists()


def test_adapters_are_merged_by_default(adapted_models, tmp_path):
  folder, out = adapted_models, tmp_path / 'out'
  export.export(folder / 'policy', folder / 'tokenizer', out)
  assert not (out / 'adapter_config.json').exists()
  tokenizer = tokenizer_lib.Tokenizer.load(folder / 'tokenizer')
  mesh = sharding.make_mesh((1, -1, 1))
  first, second = (
    model_folder.load(place, 'policy', mesh, tokenizer)
    for place in (folder / 'policy', out)
  )
  assert_layers_equal(first, second)
