"""Our adapter of lm-evaluation-harness against its own `hf` backend."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip('lm_eval', reason='the optional extra is not installed')
torch = pytest.importorskip('torch', reason='the hf backend needs PyTorch')
transformers = pytest.importorskip('transformers')

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.models.utils import normalize_gen_kwargs  # noqa: E402

from instruct_jax import export, lm_eval_adapter  # noqa: E402
from instruct_jax.data import tokenizer as tokenizer_lib  # noqa: E402
from tests import published, tiny  # noqa: E402

pytestmark = pytest.mark.usefixtures('quick_compile')

TEXT = 'the fox said that he left, and that he said it left a fox. '


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  """(ours, theirs) on one tiny model, exported for theirs."""
  root = tmp_path_factory.mktemp('lm_eval')
  tokenizer = tokenizer_lib.train_bpe([TEXT] * 3, 290)
  tokenizer.save(root / 'tokenizer')
  tiny.save_model(root, 'model', 'policy', tokenizer, 3)
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


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'num_beams': 4}, 'num_beams=4; .* set num_beams=1'),
    ({'do_sample': True, 'temperature': 0.5, 'top_p': 0.9}, 'set top_p=1'),
    ({'do_sample': True, 'temperature': 0.5, 'top_k': 9}, 'set top_k=-1'),
    ({'do_sample': False, 'top_p': 0.9}, ''),
    ({'do_sample': True, 'temperature': 0.5, 'top_p': 1.0}, ''),
  ],
)
def test_options_that_answers_cannot_follow_are_named(options, message):
  options = normalize_gen_kwargs(options)
  if not message:
    lm_eval_adapter._check_options(options)
    return
  with pytest.raises(ValueError, match=message):
    lm_eval_adapter._check_options(options)


# --- A published model with a BOS, a template and two stop tokens -------------


@pytest.fixture(scope='module')
def chains(tmp_path_factory):
  """(ours, theirs, its tokenizer, its folder)."""
  folder = tmp_path_factory.mktemp('published') / 'model'
  published.save_byte_tokenizer(folder, template=published.TEMPLATE)
  tokenizer = tokenizer_lib.Tokenizer.load(folder)
  four, two, x, a = (tokenizer.encode(letter)[0] for letter in '42xA')
  (colon,), (bracket,) = tokenizer.encode(':'), tokenizer.encode(']')
  (end,) = set(tokenizer.stop_ids) - {tokenizer.eos_id}
  following = {
    **{tokenizer.bos_id: a, colon: four, bracket: two, four: two, two: end},
    **{end: x, x: x, tokenizer.eos_id: x},
  }
  published.save_chain(folder, tokenizer.vocab_size, following, attention=0.2)
  ours = lm_eval_adapter.load(str(folder), '', 8, (jax.device_count(), 1, 1))
  theirs = HFLM(
    pretrained=transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32
    ),
    tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
    batch_size=1,
    device='cpu',
  )
  return ours, theirs, tokenizer, folder


def test_texts_begin_with_the_bos(chains):
  ours, theirs, tokenizer, _ = chains
  assert ours.prefix_token_id == theirs.prefix_token_id == tokenizer.bos_id
  for text in ('A bird', '', ' a'):
    assert ours.tok_encode(text) == theirs.tok_encode(text)
  asked = requests(
    'loglikelihood', [('', 'A'), ('', 'A bird'), ('Answer:', ' 42'), ('x', 'y')]
  )
  mine, his = ours.loglikelihood(asked), theirs.loglikelihood(asked)
  np.testing.assert_allclose(
    [a for a, _ in mine], [a for a, _ in his], rtol=1e-4, atol=1e-4
  )
  assert [b for _, b in mine] == [b for _, b in his]
  assert mine[0][1]  # "A" follows the BOS, and x an EOS.
  rolling = requests('loglikelihood_rolling', [('A bird',), ('xxx' * 200,)])
  np.testing.assert_allclose(
    ours.loglikelihood_rolling(rolling),
    theirs.loglikelihood_rolling(rolling),
    rtol=1e-4,
  )


def test_answers_end_at_every_stop_token(chains):
  ours, theirs, _, _ = chains
  asked = requests(
    'generate_until', [('Answer:', {'until': ['\n\n'], 'max_gen_toks': 12})]
  )
  assert ours.generate_until(asked) == ['42']
  # Theirs stops there, too, and writes the token out.
  assert theirs.generate_until(asked)[0].startswith('42')


def test_a_prepared_tokenizer_asks_turns(chains, tmp_path):
  _, _, tokenizer, folder = chains
  tokenizer.with_format('chat', []).save(tmp_path)
  mesh = (jax.device_count(), 1, 1)
  asked = requests(
    'generate_until', [('Answer:', {'until': ['\n\n'], 'max_gen_toks': 12})]
  )
  turns = lm_eval_adapter.load(str(folder), str(tmp_path), 8, mesh)
  assert turns.generate_until(asked) == ['2']  # After the template's "]".
  plain = lm_eval_adapter.load(str(folder), str(tmp_path), 8, mesh, plain=True)
  assert plain.generate_until(asked) == ['42']
  pair = turns._encode_pair('Answer:', ' 42')
  prepared = tokenizer.with_format('chat', [])
  assert pair == (
    prepared.encode_prompts(['Answer:'])[0],
    prepared.encode_responses([' 42'])[0],
  )


def test_tasks_samples_and_sampling_are_those_of_the_command(chains, tmp_path):
  """A task of the user's own, from a folder; all of it offline."""
  _, _, _, folder = chains
  (tmp_path / 'tasks').mkdir()
  rows = tmp_path / 'rows.jsonl'
  rows.write_text('{"q": "Answer:", "a": "42"}\n{"q": "x", "a": "xx"}\n')
  (tmp_path / 'tasks' / 'own.yaml').write_text(
    f"""task: own_answers
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 12}}
metric_list:
  - metric: exact_match
"""
  )
  output = tmp_path / 'out' / 'results.json'
  lm_eval_adapter.main(
    [
      f'--checkpoint={folder}',
      '--tasks=own_answers',
      f'--include_path={tmp_path / "tasks"}',
      '--gen_kwargs=max_gen_toks=2',
      '--log_samples',
      f'--output={output}',
    ]
  )
  results = json.loads(output.read_text())['own_answers']
  # After the x comes an x, twice: as far as max_gen_toks lets it.
  assert results['exact_match,none'] == 1.0
  (samples,) = output.parent.glob('samples_own_answers_*.jsonl')
  found = [json.loads(line) for line in samples.read_text().splitlines()]
  assert [row['resps'] for row in found] == [[['42']], [['xx']]]
  (whole,) = output.parent.glob('results_*.json')
  assert 'own_answers' in json.loads(whole.read_text())['results']


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--log_samples'], 'needs --output=FILE.json'),
    (['--include_path=/nowhere'], 'no folder /nowhere'),
    (['--batch_size=0'], 'batch_size must be at least 1: 0'),
    (['--gen_kwargs=temprature=0.9'], "'temprature=0.9' is not KEY=VALUE with"),
    (
      ['--gen_kwargs=foo'],
      "'foo' is not KEY=VALUE with a KEY among until, temp",
    ),
    ([], "the harness has no 'y'; give --include_path=DIR"),
  ],
)
def test_flags_without_their_files_are_named(flags, message, capsys):
  with pytest.raises(SystemExit):
    lm_eval_adapter.main(['--checkpoint=x', '--tasks=y', *flags])
  assert message in capsys.readouterr().err


def test_the_harness_renders_where_it_is_told_to(chains):
  _, theirs, _, folder = chains
  ours = lm_eval_adapter.load(str(folder), '', 8, (jax.device_count(), 1, 1))
  history = [{'role': 'user', 'content': 'What?'}]
  text = ours.apply_chat_template(history)
  assert text == theirs.apply_chat_template(history)
  assert ours.tok_encode(text) == theirs.tok_encode(text)
  asked = requests(
    'generate_until', [(text, {'until': ['\n\n'], 'max_gen_toks': 12})]
  )
  assert ours.generate_until(asked) == ['2']
