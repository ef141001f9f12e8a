"""Our adapter of lm-evaluation-harness against its own `hf` backend."""

import jax
import numpy as np
import pytest

pytest.importorskip('lm_eval', reason='the optional extra is not installed')
torch = pytest.importorskip('torch', reason='the hf backend needs PyTorch')
transformers = pytest.importorskip('transformers')

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from instruct_jax import export, lm_eval_adapter  # noqa: E402
from instruct_jax.data import tokenizer as tokenizer_lib  # noqa: E402
from tests import test_preferences  # noqa: E402

pytestmark = pytest.mark.usefixtures('quick_compile')

TEXT = 'the fox said that he left, and that he said it left a fox. '


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  """(ours, theirs) on one tiny model, exported for theirs."""
  root = tmp_path_factory.mktemp('lm_eval')
  tokenizer = tokenizer_lib.train_bpe([TEXT] * 3, 290)
  tokenizer.save(root / 'tokenizer')
  test_preferences.save_model(root, 'model', 'policy', tokenizer, 3)
  export.export(f'{root}/model', f'{root}/tokenizer', f'{root}/hf')
  ours = lm_eval_adapter.load(
    f'{root}/model', f'{root}/tokenizer', 8, (jax.device_count(), 1, 1)
  )
  loaded = transformers.AutoTokenizer.from_pretrained(f'{root}/hf')
  model = transformers.AutoModelForCausalLM.from_pretrained(
    f'{root}/hf', torch_dtype=torch.float32
  )
  theirs = HFLM(pretrained=model, tokenizer=loaded, batch_size=1, device='cpu')
  return ours, theirs


def requests(kind, arguments):
  return [
    Instance(request_type=kind, doc={}, arguments=args, idx=i)
    for i, args in enumerate(arguments)
  ]


def test_loglikelihoods_are_equal(pair):
  ours, theirs = pair
  asked = requests(
    'loglikelihood',
    [
      ('the fox', ' said'),
      ('the fox ', 'left a fox'),  # The space moves to the continuation.
      ('', 'the fox said'),
      (TEXT * 6, ' said'),  # Longer than the context.
      ('a', ' ' + TEXT),
    ],
  )
  mine, his = ours.loglikelihood(asked), theirs.loglikelihood(asked)
  np.testing.assert_allclose(
    [a for a, _ in mine], [a for a, _ in his], rtol=1e-4, atol=1e-4
  )
  assert [b for _, b in mine] == [b for _, b in his]


def test_a_greedy_continuation_is_known(pair):
  ours, theirs = pair
  (text,) = ours.generate_until(
    requests('generate_until', [('the fox', {'max_gen_toks': 4})])
  )
  asked = requests('loglikelihood', [('the fox', text)])
  assert ours.loglikelihood(asked)[0][1] == theirs.loglikelihood(asked)[0][1]


def test_rolling_loglikelihoods_are_equal(pair):
  ours, theirs = pair
  asked = requests(
    'loglikelihood_rolling', [('the fox',), (TEXT,), (TEXT * 7,)]
  )
  np.testing.assert_allclose(
    ours.loglikelihood_rolling(asked),
    theirs.loglikelihood_rolling(asked),
    rtol=1e-4,
  )


def test_answers_are_equal(pair):
  ours, theirs = pair
  asked = [
    ('the fox', {'until': ['\n'], 'max_gen_toks': 12}),
    ('he said that', {'until': ['\n', ' '], 'max_gen_toks': 12}),
    (TEXT * 6, {'until': [], 'max_gen_toks': 12}),
    ('a', {'until': ['o'], 'max_gen_toks': 5}),
  ]
  mine = ours.generate_until(requests('generate_until', asked))
  his = theirs.generate_until(requests('generate_until', asked))
  assert mine == his


def test_answers_that_leave_no_room_are_an_error(pair):
  ours, _ = pair
  asked = requests('generate_until', [('a', {'max_gen_toks': 64})])
  with pytest.raises(ValueError, match='64 tokens, the model reads 64'):
    ours.generate_until(asked)
