"""Odd fields of config.json mean what `transformers` makes of them.

The goldens were computed by `transformers` (tests/golden/make_fields.py).
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax import export, model_fns, model_folder, queries
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import sharding
from instruct_jax.models import hf
from instruct_jax.models.config import TransformerConfig
from tests import test_models_hf, tiny

pytestmark = pytest.mark.usefixtures('quick_compile')

FIELDS = np.load(test_models_hf.GOLDEN / 'fields.npz')
CASES = json.loads(str(FIELDS['cases']))
BASES = sorted({base for base, *_ in CASES.values()})
CLOSE = {'rtol': 0, 'atol': 1e-4}
# What the reference computes and we refuse by name. The first of them it
# ignores; the file says something else than what is computed.
REFUSED = {
  'hidden_activation': 'silu hidden_activation',
  'sliding_window': 'window layers_null window_zero',
  'layer_types': 'layers_full layers_near layers_old',
  'final_logit_softcapping': 'softcaps softcap_zero',
  'attn_logit_softcapping': 'attention_softcap',
  'query_pre_attn_scalar': 'scalar',
  'use_bidirectional_attention': 'bidirectional',
  'attention_bias': 'attention_bias',
  'scale_attn_by_inverse_layer_idx': 'inverse_layer',
  'scale_attn_weights': 'scale_off',
  'reorder_and_upcast_attn': 'upcast',
  'num_key_value_heads': 'kv_heads',
  'hidden_act': 'hidden_act',
  'head_dim': 'head_dim',
  'rotary_dim': 'rotary',
  'rope_theta': 'theta',
  'rope_scaling': 'scaling',
  "rope_type 'longrope'": 'longrope',
  'low_freq_factor': 'llama3_reversed',
  'of a head of 8 rotates': 'pct_odd pct_zero',
  'activation ': 'quick_gelu gelu_10 relu2 tanh',
  'rope_parameters': 'nested_rope',
  # Tensors that the reference leaves unread.
  'left over': 'attention_bias_off no_attention_bias no_bias no_mlp_bias',
}
# Gemma 3 with one rotary position for all layers: the reference passes it over.
FLAT = {'rope_parameters', 'rope_type'}


def one_device():
  return sharding.make_mesh((1, 1, 1), jax.devices()[:1])


def write_case(folder, base, without=(), changes=()):
  golden = test_models_hf.write_folder(folder, base)
  values = json.loads((folder / 'config.json').read_text())
  values = {name: x for name, x in values.items() if name not in without}
  (folder / 'config.json').write_text(json.dumps({**values, **dict(changes)}))
  return golden


def load(folder, kind='policy'):
  changes = {'vocab_multiple': 1}
  return model_folder._load_published(folder, kind, one_device(), (), changes)


def logits_of(model, tokens):
  with jax.disable_jit():  # Runs once: compiling is what would take long.
    return np.asarray(
      model.module.apply(
        {'params': model.params},
        jnp.asarray(tokens, jnp.int32),
        jnp.ones(tokens.shape, jnp.int32),
      )
    )


@pytest.mark.parametrize('base', BASES)
def test_a_field_is_followed_or_refused_by_name(base, tmp_path):
  seen, num_equal = {}, 0
  for name, (of, without, changes, refusal) in CASES.items():
    if of != base:
      continue
    folder = tmp_path / name.replace('/', '_')
    golden = write_case(folder, base, without, changes)
    try:
      config = TransformerConfig.from_hf(hf.read_config(folder))
      if config not in seen:
        seen[config] = logits_of(load(folder), golden['tokens'])
    except ValueError as error:
      if not refusal:
        short = name.split('/')[1]
        allowed = {word for word, of in REFUSED.items() if short in of.split()}
        if base == 'gemma3':
          allowed |= FLAT
        assert any(word in str(error) for word in allowed), (name, error)
      assert len(str(error).splitlines()) == 1
      continue
    assert not refusal, f'{name}: the reference refuses it: {refusal}'
    wanted = golden['logits'][:, -1:]
    if f'logits:{name}' in FIELDS:
      wanted = FIELDS[f'logits:{name}']
    got = seen[config][:, -1:]
    np.testing.assert_allclose(got, wanted, **CLOSE, err_msg=name)
    num_equal += 1
  assert num_equal or base == 'llama2'  # Its biases are left over.


# --- Tied or not --------------------------------------------------------------


def change_tensors(folder, change):
  tensors = {k: np.array(v) for k, v in hf.open_tensors(folder).items()}
  change(tensors)
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  hf.write_tensors(folder, shapes, tensors.__getitem__)


def test_another_unembedding_is_used_and_told(tmp_path, capsys):
  """As the reference does, whatever tie_word_embeddings says."""
  golden = write_case(
    tmp_path / 'in', 'llama3', (), {'tie_word_embeddings': True}
  )
  model = load(tmp_path / 'in')
  assert not model.config.tied
  line = capsys.readouterr().out
  assert 'its files hold another one, which is used' in line
  got = logits_of(model, golden['tokens'])
  np.testing.assert_allclose(got, golden['logits'], **CLOSE)
  # A caller that insists on one matrix is refused.
  config = TransformerConfig.from_hf(hf.read_config(tmp_path / 'in'))
  abstract = model_fns.abstract_params('policy', config, one_device())
  with pytest.raises(ValueError, match='lm_head.weight holds another one'):
    hf.load_params(tmp_path / 'in', config, abstract)


def test_a_copy_of_the_embedding_is_the_embedding(tmp_path, capsys):
  golden = write_case(tmp_path / 'in', 'gpt2')
  change_tensors(
    tmp_path / 'in',
    lambda t: t.update({'lm_head.weight': t['transformer.wte.weight']}),
  )
  model = load(tmp_path / 'in')
  assert model.config.tied
  assert not capsys.readouterr().out
  got = logits_of(model, golden['tokens'])
  np.testing.assert_allclose(got, golden['logits'], **CLOSE)


def test_one_matrix_may_have_either_name(tmp_path):
  golden = write_case(tmp_path / 'in', 'gpt2')
  change_tensors(
    tmp_path / 'in',
    lambda t: t.update({'lm_head.weight': t.pop('transformer.wte.weight')}),
  )
  got = logits_of(load(tmp_path / 'in'), golden['tokens'])
  np.testing.assert_allclose(got, golden['logits'], **CLOSE)


def test_an_absent_unembedding_is_named(tmp_path):
  write_case(tmp_path / 'in', 'gpt2', (), {'tie_word_embeddings': False})
  with pytest.raises(ValueError, match=r'missing: lm_head\.weight'):
    load(tmp_path / 'in')


# --- Where a score is read ----------------------------------------------------

CLASSIFIERS = sorted(
  name.removeprefix('classifier:')
  for name in FIELDS
  if name.startswith('classifier:')
)


def write_classifier(folder, name, **changes):
  base, pad_id, rows = json.loads(str(FIELDS[f'classifier:{name}']))
  labels = {'pad_token_id': pad_id, 'id2label': {'0': 'score'}}
  write_case(folder, base, (), {**labels, **changes})

  def change(tensors):
    tensors.pop('lm_head.weight', None)
    tensors['score.weight'] = FIELDS[f'head:{name}'].astype(np.float32)

  change_tensors(folder, change)
  return rows


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_scores_are_read_where_the_reference_reads_them(name, tmp_path):
  rows = write_classifier(tmp_path / 'in', name)
  model = load(tmp_path / 'in', 'scalar')
  # Pads of ours, never its own: what is real is what the mask says.
  own = 20
  room = [max(map(len, rows)) - len(row) for row in rows]
  read = jax.jit(model_fns.scores_fn(model.module))
  for side in ('right', 'left'):
    before = [n * (side == 'left') for n in room]
    after = [n * (side == 'right') for n in room]
    parts = list(zip(before, rows, after, strict=True))
    tokens = jnp.array([b * [own] + row + a * [own] for b, row, a in parts])
    mask = jnp.array(
      [b * [False] + len(row) * [True] + a * [False] for b, row, a in parts]
    )
    got = np.asarray(read(model.params, tokens, mask))
    np.testing.assert_allclose(got, FIELDS[f'alone:{name}'], **CLOSE)
    if f'{side}:{name}' in FIELDS:
      # The last row is nothing but the reference's pads: padded on the left,
      # it reads at one of those that it masks.
      np.testing.assert_allclose(got[:3], FIELDS[f'{side}:{name}'][:3], **CLOSE)

  # All of them in one row, as PPO packs episodes.
  tokens = jnp.array([sum(rows, [])])
  lengths = [len(row) for row in rows]
  segments = jnp.array([np.repeat(np.arange(len(rows)) + 1, lengths)])
  got = read(model.params, tokens, segments, jnp.cumsum(jnp.array(lengths)) - 1)
  np.testing.assert_allclose(got, FIELDS[f'alone:{name}'], **CLOSE)


def test_what_is_skipped_stays_with_the_model(tmp_path):
  """In a folder of ours, and in what is exported of it again."""
  rows = write_classifier(tmp_path / 'in', 'end')
  model = load(tmp_path / 'in', 'scalar')
  tokenizer = tokenizer_lib.train_bpe(['some text'], 258)
  tokenizer.save(tmp_path / 'tokenizer')
  model_folder.save(tmp_path / 'ours', model, tokenizer, {})
  ours = model_folder.load(tmp_path / 'ours', 'scalar', one_device(), tokenizer)
  export.export(tmp_path / 'ours', tmp_path / 'tokenizer', tmp_path / 'out')
  again = load(tmp_path / 'out', 'scalar')
  for copy in (ours, again):
    assert copy.module.skipped_id == 5
    scores = queries.score_answers(
      copy, [row[:2] for row in rows], [row[2:] for row in rows[:3]] + [[]],
      0, 4, one_device(),
    )  # fmt: skip
    np.testing.assert_allclose(scores, FIELDS['alone:end'], **CLOSE)
  # A head of our own, on whatever trunk, reads at the last token.
  policy = model_fns.init(
    'policy', model.config, one_device(), jax.random.key(0)
  )
  fresh = model_fns.scalar_from_policy(policy, one_device(), jax.random.key(0))
  assert fresh.module.skipped_id == -1


def test_scores_of_many_lengths_are_those_of_each_alone(monkeypatch, capsys):
  shape = dataclasses.replace(tiny.CONFIG, context_length=96)
  keys = jax.random.split(jax.random.key(0))
  policy = model_fns.init('policy', shape, one_device(), keys[0])
  model = model_fns.scalar_from_policy(policy, one_device(), keys[1])
  rng = np.random.default_rng(0)
  # The shortest is not first, and the last batch is not full.
  prompts, answers = (
    [rng.integers(1, 30, n).tolist() for n in lengths]
    for lengths in ((40, 3, 70, 9, 1), (9, 2, 26, 20, 1))
  )
  read = []
  rows_of = queries.loader.answer_rows

  def spy(*args):
    read.append(args[-1])
    return rows_of(*args)

  monkeypatch.setattr(queries.loader, 'answer_rows', spy)
  together = queries.score_answers(
    model, prompts, answers, 0, 2, one_device(), 'mine'
  )
  assert read == [32, 64, 96]
  assert 'score by mine: 5/5 (100 %)' in capsys.readouterr().err
  alone = [
    queries.score_answers(model, [p], [a], 0, 1, one_device())[0]
    for p, a in zip(prompts, answers, strict=True)
  ]
  assert np.ptp(alone) > 1e-3
  np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'id2label': {'0': 'bad', '1': 'good'}}, 'config.json: 2 labels'),
    ({'id2label': None}, 'config.json: 2 labels .* two where neither'),
    ({'id2label': None, 'num_labels': 3}, 'config.json: 3 labels'),
  ],
)
def test_a_classifier_of_several_labels_is_no_reward_model(
  changes, message, tmp_path
):
  write_classifier(tmp_path / 'in', 'end', **changes)
  tokenizer = tokenizer_lib.train_bpe(['some text'], 258)
  for read in (
    lambda: model_folder.check(tmp_path / 'in', 'scalar', tokenizer),
    lambda: load(tmp_path / 'in', 'scalar'),
  ):
    with pytest.raises(ValueError, match=message):
      read()


@pytest.mark.parametrize(
  ('name', 'kind', 'message'),
  [
    ('LlamaForCausalLM', 'scalar', 'is a language model; a reward model is'),
    ('GPT2LMHeadModel', 'scalar', 'is a language model; a reward model is'),
    ('LlamaForSequenceClassification', 'policy', 'is a reward model; a policy'),
  ],
)
def test_a_model_of_the_other_kind_is_named(name, kind, message, tmp_path):
  write_classifier(tmp_path / 'in', 'end', architectures=[name])
  tokenizer = tokenizer_lib.train_bpe(['some text'], 258)
  with pytest.raises(ValueError, match=f'config.json: {name} {message}'):
    model_folder.check(tmp_path / 'in', kind, tokenizer)


def test_a_bias_of_the_score_is_named(tmp_path):
  """The reference's classifiers have none and would not read it."""
  write_classifier(tmp_path / 'in', 'end')
  change_tensors(
    tmp_path / 'in', lambda t: t.update({'score.bias': np.ones(1, 'f4')})
  )
  with pytest.raises(ValueError, match=r'left over: score\.bias'):
    load(tmp_path / 'in', 'scalar')


def test_num_labels_alone_is_enough(tmp_path):
  write_classifier(tmp_path / 'in', 'end', id2label=None, num_labels=1)
  assert load(tmp_path / 'in', 'scalar').module.skipped_id == 5
