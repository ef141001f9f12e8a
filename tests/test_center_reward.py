"""Published reward models, centred on demonstrations and used in PPO."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax import model_fns, model_folder
from instruct_jax.data import records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import checkpoint, sharding
from instruct_jax.models import hf
from tests import published as published_lib
from tests import test_published_stages as stages

pytestmark = pytest.mark.usefixtures('quick_compile')

LENGTH = 96


@pytest.fixture(scope='module')
def published(start, tmp_path_factory):
  """A classifier whose PAD is its EOS, its prepared tokenizer, records."""
  root = tmp_path_factory.mktemp('published')
  folder = root / 'classifier'
  folder.mkdir()
  backend = published_lib.save_byte_tokenizer(
    folder,
    # An answer ends in the EOS, which is the PAD as well.
    template=published_lib.TEMPLATE.replace('<end>', '</s>'),
    pad_token='</s>',
  )
  eos = backend.token_to_id('</s>')
  config = dataclasses.replace(
    stages.LLAMA, vocab_size=backend.get_vocab_size()
  )
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  model = model_fns.init('scalar', config, mesh, jax.random.key(1))
  # Weights far from a fresh model's, so that every position differs.
  params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, model.params)
  params['head_bias'] = jnp.zeros(())
  hf.save(folder, config, params)
  values = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(
    json.dumps({**values, 'pad_token_id': eos})
  )
  ended = start(
    'instruct_jax.data.tokenizer',
    f'hf:{folder}',
    f'--output={root / "tokenizer"}',
    '--template=chat',
    '--stop=<end>',
  )
  assert ended.returncode == 0, ended.stderr
  conversation = tuple(
    records.Turn(role, text)
    for role, text in (
      ('user', 'Hi'),
      ('assistant', 'Yes?'),
      ('user', 'And 2?'),
    )
  )
  demonstrations = [
    records.Demonstration('Name 1.', 'An owl.'),
    records.Demonstration(
      records.text_of_turns(conversation),
      'A tit, and more.',
      turns=conversation,
    ),
    records.Demonstration('Name 3.', 'x' * 200),  # Longer than a row.
  ]
  records.write_jsonl(root / 'demonstrations.jsonl', demonstrations)
  return root, demonstrations[:2], eos


def test_demonstrations_score_0_as_the_classifier_reads_them(
  start, published, tmp_path
):
  root, demonstrations, eos = published
  ended = start(
    'instruct_jax.main',
    '--config=configs/center_reward.py',
    f'--workdir={tmp_path}',
    f'--config.reward_model=hf:{root / "classifier"}',
    f'--config.tokenizer={root / "tokenizer"}',
    f'--config.demonstrations={root / "demonstrations.jsonl"}',
    f'--config.row_length={LENGTH - 1}',  # A line break follows an answer.
    '--config.compilation_cache=',
  )
  assert ended.returncode == 0, ended.stderr
  assert '2 demonstrations scored' in ended.stdout
  assert '1 longer than row_length (95 tokens)' in ended.stdout
  results = json.loads((tmp_path / 'results.json').read_text())
  assert results['num_demonstrations'] == 2 and results['num_dropped'] == 1

  # By hand: each row alone, read behind the line break that the template puts
  # after an answer.
  tokenizer = tokenizer_lib.Tokenizer.load(root / 'tokenizer')
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  theirs, ours = (
    model_folder.load(
      path,
      'scalar',
      mesh,
      tokenizer,
    )
    for path in (f'hf:{root / "classifier"}', tmp_path / 'model')
  )
  prompts = tokenizer.encode_prompts(demonstrations)
  answers = tokenizer.encode_responses([d.response for d in demonstrations])
  before, after, wrong = [], [], []
  for prompt, answer in zip(prompts, answers, strict=True):
    ids = [*prompt, *answer]
    while ids[-1] == eos:
      ids = ids[:-1]
    ids.append(eos)  # As a policy's answer ends.
    tokens, mask = jnp.array([ids]), jnp.ones((1, len(ids)), bool)
    whole = jnp.array([[*ids, *tokenizer.encode('\n')]])
    for model, found in ((theirs, before), (ours, after)):
      scalars = model_fns.scalars_fn(model.module)(
        model.params, whole, jnp.ones(whole.shape, bool)
      )
      assert whole.shape[1] == len(ids) + 1
      found.append(float(scalars[0, -1]))
    wrong.append(float(scalars[0, -2]))
    scores = model_fns.scores_fn(ours.module)(ours.params, tokens, mask)
    assert float(scores[0]) == pytest.approx(after[-1], abs=1e-5)
  assert results['reward_shift'] == pytest.approx(np.mean(before), abs=1e-4)
  np.testing.assert_allclose(np.mean(after), 0, atol=1e-4)
  assert abs(np.mean(wrong)) > 1e-2  # At the end of the turn it is another.
  low, high = results['score_range']
  assert low == pytest.approx(min(after), abs=1e-4)
  assert high == pytest.approx(max(after), abs=1e-4)
  described = checkpoint.load_metadata(tmp_path / 'model')
  assert described['skipped_id'] == eos
  assert described['about']['score_range'] == results['score_range']


@pytest.mark.parametrize(
  ('key', 'message'),
  [
    ('reward_model', 'reward_model is empty'),
    ('row_length', 'row_length must'),
  ],
)
def test_what_is_missing_is_named(key, message):
  from configs import center_reward as config_file
  from instruct_jax.jobs import center_reward

  config = config_file.get_config()
  for name in ('reward_model', 'tokenizer', 'demonstrations'):
    config[name] = 'x'
  config[key] = type(config[key])()
  with pytest.raises(ValueError, match=message):
    center_reward.validate(config)
