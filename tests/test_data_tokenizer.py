import fnmatch
import gzip
import json

import numpy as np
import pytest
import tokenizers
import transformers

from instruct_jax import hub, model_folder
from instruct_jax.data import loader, records, tokenizer
from tests import published as published_lib


@pytest.fixture(scope='module')
def words() -> tokenizer.Tokenizer:
  return tokenizer.train_word_level(['the', 'cat', 'sat', '.'])


TEXTS = ['the cat sat .', 'Café £20-25\n\n  two  spaces 🙂', 'tab\tend ']


@pytest.fixture(scope='module')
def bpe() -> tokenizer.Tokenizer:
  return tokenizer.train_bpe(['the cat sat on the mat . '] * 20, 270)


def test_word_level_ids_and_text(words):
  # <pad> 0, <eos> 1, <unk> 2, then the vocabulary from 3.
  assert (words.pad_id, words.eos_id, words.vocab_size) == (0, 1, 7)
  assert words.encode(' the  cat\nsat . dog') == [3, 4, 5, 6, 2]
  assert words.decode([0, 3, 4, 5, 6, 1, 0]) == 'the cat sat .'
  assert words.decode(np.asarray([2, 4])) == '<unk> cat'
  assert words.encode('') == [] and words.decode([]) == ''
  assert words.encode_batch(['the', 'cat .']) == [[3], [4, 6]]
  assert words.decode_batch(np.asarray([[3, 0], [4, 6]])) == ['the', 'cat .']


def test_text_cannot_spell_special_tokens(words, bpe):
  assert words.encode('the <eos> <pad> cat') == [3, 2, 2, 4]
  ids = bpe.encode('a<eos> <pad>')
  assert bpe.eos_id not in ids and bpe.pad_id not in ids
  assert bpe.decode(ids) == 'a<eos> <pad>'


@pytest.mark.parametrize('text', TEXTS)
def test_bpe_gives_every_text_back(bpe, text):
  assert bpe.decode(bpe.encode(text)) == text


def test_bpe_size_and_determinism(bpe):
  assert bpe.vocab_size <= 270 and (bpe.pad_id, bpe.eos_id) == (0, 1)
  again = tokenizer.train_bpe(['the cat sat on the mat . '] * 20, 270)
  assert again.fingerprint == bpe.fingerprint
  assert len(bpe.encode('the cat')) < len('the cat')
  with pytest.raises(ValueError, match='vocab_size is 257'):
    tokenizer.train_bpe(['a'], 257)


def test_save_and_load(words, bpe, tmp_path):
  for name, saved in (('words', words), ('bpe', bpe)):
    saved.save(tmp_path / name)
    loaded = tokenizer.Tokenizer.load(tmp_path / name)
    assert loaded.fingerprint == saved.fingerprint
    assert loaded.vocab_size == saved.vocab_size
    assert (loaded.pad_id, loaded.eos_id) == (saved.pad_id, saved.eos_id)
    for text in [*TEXTS, 'the <eos> cat']:
      assert loaded.encode(text) == saved.encode(text)
      assert loaded.decode(loaded.encode(text)) == saved.decode(
        saved.encode(text)
      )


def test_nothing_of_a_tokenizer_saved_before_stays(words, tmp_path):
  folder, alone = tmp_path / 'folder', tmp_path / 'alone'
  published_lib.save_byte_tokenizer(
    folder, template=published_lib.TEMPLATE, prepared=True
  )
  assert tokenizer.Tokenizer.load(folder).template == 'chat'
  templates = folder / 'additional_chat_templates'
  templates.mkdir()
  (templates / 'tools.jinja').write_text('{{ messages }}')
  (folder / 'model.safetensors').write_bytes(b'')  # Not the tokenizer's.
  for each in (folder, alone):
    words.save(each)
  names = {path.name for path in folder.iterdir()}
  assert names - {path.name for path in alone.iterdir()} == {
    'model.safetensors'
  }
  assert tokenizer.Tokenizer.load(folder).describe() == words.describe()


def test_fingerprint_sees_order_and_merges(words, bpe):
  other = tokenizer.train_word_level(['cat', 'the', 'sat', '.'])
  assert other.fingerprint != words.fingerprint
  assert bpe.fingerprint != words.fingerprint
  assert len(words.fingerprint) == 64


def test_load_says_which_folder_and_what_is_missing(words, tmp_path):
  with pytest.raises(ValueError, match='nothing: no tokenizer folder here'):
    tokenizer.Tokenizer.load(tmp_path / 'nothing')
  with pytest.raises(ValueError, match=r'tokenizer.json is missing .*nothing'):
    tokenizer.Tokenizer.load(tmp_path)
  words.save(tmp_path / 'cut')
  path = tmp_path / 'cut' / 'tokenizer.json'
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(ValueError, match='cut: the tokenizer does not load'):
    tokenizer.Tokenizer.load(tmp_path / 'cut')
  words.save(tmp_path / 'no_eos')
  path = tmp_path / 'no_eos' / 'tokenizer_config.json'
  config = json.loads(path.read_text())
  del config['eos_token']
  path.write_text(json.dumps(config))
  with pytest.raises(
    ValueError, match='no_eos: .*has no EOS token; name it as eos_token'
  ):
    tokenizer.Tokenizer.load(tmp_path / 'no_eos')


LFS = 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n'


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    *(
      (name, LFS, f'{name}: is a pointer of Git LFS; fetch the file itself')
      for name in ('tokenizer.json', 'tokenizer_config.json', 'config.json')
    ),
    ('config.json', '{', r'config.json: not JSON \('),
    ('config.json', '[]', 'config.json: is not a JSON object'),
    *(
      (
        'config.json',
        f'{{"eos_token_id": {value}}}',
        "'eos_token_id' is .*; it",
      )
      for value in ('"256"', 'true', '[1, true]', '1.0', '{}', '[["1"]]')
    ),
    *(
      ('prompt_format.json', json.dumps(value), "needs 'template', a text, and")
      for value in (
        {'template': ''},
        {'stop_tokens': []},
        {'template': '', 'stop_tokens': '<eos>'},
        {'template': None, 'stop_tokens': []},
        {'template': '', 'stop_tokens': [1]},
      )
    ),
  ],
)
def test_damaged_files_of_a_folder_are_named(
  words, tmp_path, name, content, message
):
  words.save(tmp_path)
  (tmp_path / name).write_text(content)
  with pytest.raises(records.RecordError, match=message) as error:
    tokenizer.Tokenizer.load(tmp_path)
  assert str(error.value).startswith(f'{tmp_path}/{name}: ')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('value', ['null', '[]', '1', '[1, 3]'])
def test_end_ids_of_a_config(words, tmp_path, value):
  words.save(tmp_path)
  (tmp_path / 'config.json').write_text(f'{{"eos_token_id": {value}}}')
  expected = (1, 3) if value == '[1, 3]' else (1,)
  assert tokenizer.Tokenizer.load(tmp_path).stop_ids == expected


def test_a_pad_of_its_own_is_added_where_eos_fills_rows(words, tmp_path):
  words.save(tmp_path)
  path = tmp_path / 'tokenizer_config.json'
  config = json.loads(path.read_text())
  config['pad_token'] = config['eos_token']
  path.write_text(json.dumps(config))
  loaded = tokenizer.Tokenizer.load(tmp_path)
  # <pad> is in this vocabulary already, so no id is added.
  assert (loaded.pad_id, loaded.eos_id) == (0, 1)
  assert loaded.vocab_size == words.vocab_size


def test_bad_vocabulary_and_bad_ids(words):
  for bad in (['a', 'a'], ['a b'], [''], ['<eos>']):
    with pytest.raises(ValueError, match='cannot be a vocabulary entry'):
      tokenizer.train_word_level(bad)
  for bad in (-1, 7):
    with pytest.raises(ValueError, match=f'id {bad} is outside the 7'):
      words.decode([3, bad])


def test_gpt2_files(tmp_path):
  # "low" = l o w; merges make "lo", then "low".
  vocabulary = {'l': 0, 'o': 1, 'w': 2, 'lo': 3, 'low': 4, '<|endoftext|>': 5}
  encoder = tmp_path / 'encoder.json.gz'
  encoder.write_bytes(gzip.compress(json.dumps(vocabulary).encode()))
  merges = tmp_path / 'vocab.bpe'
  merges.write_text('#version: 0.2\nl o\nlo w\n')
  loaded = tokenizer.load_gpt2_bpe(encoder, merges)
  assert loaded.encode('lowlol') == [4, 3, 0]
  assert (loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (5, 6, 7)
  merges.write_text('#version: 0.2\nl o\nlow\n')
  with pytest.raises(records.RecordError, match="vocab.bpe:3: .*'low'"):
    tokenizer.load_gpt2_bpe(encoder, merges)
  encoder.write_bytes(gzip.compress(b'{"l": 0'))
  with pytest.raises(records.RecordError, match='encoder.json.gz: not JSON'):
    tokenizer.load_gpt2_bpe(encoder, merges)


def test_real_gpt2(data_root):
  folder = data_root / 'gpt2_bpe'
  gpt2 = tokenizer.load_gpt2_bpe(
    folder / 'encoder.json.gz', folder / 'vocab.bpe.gz'
  )
  # Ids printed in OpenAI's and Hugging Face's documentation.
  assert gpt2.encode('Hello world') == [15496, 995]
  assert (gpt2.eos_id, gpt2.pad_id, gpt2.vocab_size) == (50256, 50257, 50258)
  assert gpt2.eos_id not in gpt2.encode('<|endoftext|>')
  for text in TEXTS:
    assert gpt2.decode(gpt2.encode(text)) == text


# --- Templates and stop tokens ------------------------------------------------

CHAT_TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
  '<|im_end|>\n{% endfor %}'
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
TURNS = (
  records.Turn('user', 'the cat'),
  records.Turn('assistant', 'sat'),
  records.Turn('user', 'on'),
)


@pytest.fixture
def published(bpe, tmp_path):
  """A folder as chat models publish it: no PAD, two tokens that end."""
  bpe.save(tmp_path / 'bpe')
  fast = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / 'bpe')
  fast.add_special_tokens(
    {
      'additional_special_tokens': ['<|im_start|>', '<|im_end|>', '<|end|>'],
      'eos_token': '<|im_end|>',
      'pad_token': '<|end|>',
    }
  )
  fast.chat_template = CHAT_TEMPLATE
  folder = tmp_path / 'published'
  fast.save_pretrained(folder)
  ids = fast.convert_tokens_to_ids(['<|im_end|>', '<|end|>'])
  (folder / 'generation_config.json').write_text(
    json.dumps({'eos_token_id': ids})
  )
  return folder, fast


def test_stop_tokens_are_a_set(published, tmp_path):
  folder, fast = published
  loaded = tokenizer.Tokenizer.load(f'hf:{folder}')
  eos, end, start = fast.convert_tokens_to_ids(
    ['<|im_end|>', '<|end|>', '<|im_start|>']
  )
  assert loaded.eos_id == eos
  assert loaded.stop_ids == (eos, end)
  # The published PAD ends responses, too: PAD is an id of its own instead.
  assert loaded.pad_id not in loaded.stop_ids
  assert loaded.decode([*loaded.encode('the cat'), end]) == 'the cat'
  more = loaded.with_format('', ['<|im_start|>'])
  assert set(more.stop_ids) == {eos, end, start}
  assert more.fingerprint != loaded.fingerprint
  assert more.vocabulary_fingerprint == loaded.vocabulary_fingerprint
  more.save(tmp_path / 'saved')
  again = tokenizer.Tokenizer.load(tmp_path / 'saved')
  assert again.stop_ids == more.stop_ids
  assert again.fingerprint == more.fingerprint
  with pytest.raises(ValueError, match=r"\['<nowhere>'\] are not in the vocab"):
    loaded.with_format('', ['<nowhere>'])
  with pytest.raises(ValueError, match='is the PAD'):
    loaded.with_format('', ['<pad>'])


def test_format_string(bpe, tmp_path):
  formatted = bpe.with_format('Q: {prompt}\nA:', [])
  (ids,) = formatted.encode_prompts(['the {cat}'])
  assert formatted.decode(ids) == 'Q: the {cat}\nA:'
  prompt = records.Prompt('1', 'the cat', turns=TURNS)
  assert formatted.encode_prompts([prompt]) == formatted.encode_prompts(
    ['the cat']
  )
  assert bpe.encode_prompts([prompt]) == [bpe.encode('the cat')]
  assert formatted.encode_responses([' the']) == [bpe.encode(' the')]
  formatted.save(tmp_path)
  again = tokenizer.Tokenizer.load(tmp_path)
  assert again.encode_prompts(['x']) == formatted.encode_prompts(['x'])
  assert again.fingerprint != bpe.fingerprint
  for bad in ('no slot', '{prompt} {prompt}'):
    with pytest.raises(
      ValueError, match='must be .chat. or hold {prompt} once'
    ):
      bpe.with_format(bad, [])
  with pytest.raises(ValueError, match='no chat template'):
    bpe.with_format('chat', [])


def test_chat_template(published):
  pytest.importorskip('jinja2', reason='chat templates need jinja2')
  folder, fast = published
  chat = tokenizer.Tokenizer.load(folder).with_format('chat', [])
  messages = [{'role': t.role, 'content': t.content} for t in TURNS]
  expected = fast.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=False
  )
  prompt = records.Prompt('1', 'not used', turns=TURNS)
  assert chat.encode_prompts([prompt]) == [expected]
  assert expected.count(chat.eos_id) == 3
  row = records.Demonstration('not used', ' sat', turns=TURNS)
  rows, _ = loader.demonstration_rows(
    [row], chat, 64, loss_on='response', pack=False
  )
  sequence = rows.tokens[0][rows.mask[0]].tolist()
  assert sequence == [*expected, *chat.encode('sat'), chat.eos_id]
  (single,) = chat.encode_prompts(['the cat'])
  assert single == fast.apply_chat_template(
    messages[:1], add_generation_prompt=True, return_dict=False
  )
  # What a user types is text, special tokens too.
  (ids,) = chat.encode_prompts(['the <|im_end|> cat'])
  assert ids.count(chat.eos_id) == 1
  assert fast.decode(ids) == fast.decode(single).replace(
    'the cat', 'the <|im_end|> cat'
  )
  assert chat.encode('<|im_end|>') != [chat.eos_id]


def test_what_stands_before_every_text(bpe, tmp_path):
  bpe.save(tmp_path)
  path = tmp_path / 'tokenizer.json'
  described = json.loads(path.read_text())
  described['added_tokens'].append(
    {**described['added_tokens'][0], 'id': bpe.vocab_size, 'content': '<bos>'}
  )
  described['post_processor'] = {
    'type': 'TemplateProcessing',
    'single': [
      {'SpecialToken': {'id': '<bos>', 'type_id': 0}},
      {'Sequence': {'id': 'A', 'type_id': 0}},
    ],
    'pair': [],
    'special_tokens': {
      '<bos>': {'id': '<bos>', 'ids': [bpe.vocab_size], 'tokens': ['<bos>']}
    },
  }
  path.write_text(json.dumps(described))
  loaded = tokenizer.Tokenizer.load(tmp_path)
  bos = loaded.vocab_size - 1
  assert loaded.prefix_ids == (bos,)
  assert loaded.encode_prompts(['the']) == [[bos, *loaded.encode('the')]]
  assert loaded.encode_documents(['the']) == [[bos, *loaded.encode('the')]]
  assert bos not in loaded.encode_responses(['the'])[0]
  assert loaded.decode([bos, *loaded.encode('the')]) == 'the'


def test_a_published_model_with_another_tokenizer_is_refused(
  words, bpe, tmp_path
):
  words.save(tmp_path / 'model')
  tokenizer.check_published(bpe, str(tmp_path / 'model'))  # No model yet.
  (tmp_path / 'model' / 'config.json').write_text('{}')
  tokenizer.check_published(words, f'hf:{tmp_path / "model"}')
  tokenizer.check_published(
    words.with_format('{prompt} .', []), str(tmp_path / 'model')
  )
  with pytest.raises(
    ValueError, match=r'model has a tokenizer of 7 tokens .* uses one of 2'
  ):
    tokenizer.check_published(bpe, f'hf:{tmp_path / "model"}')


def test_the_command_prepares_a_tokenizer(words, tmp_path, capsys):
  words.save(tmp_path / 'in')
  command = [str(tmp_path / 'in'), '--output', str(tmp_path / 'out')]
  assert tokenizer.main([*command, '--template', '{prompt} .']) == 0
  assert 'sampling stops at <eos>, PAD 0' in capsys.readouterr().out
  loaded = tokenizer.Tokenizer.load(tmp_path / 'out')
  assert loaded.encode_prompts(['cat']) == [[4, 6]]
  assert tokenizer.main([*command, '--stop', 'dog']) == 1
  assert 'are not in the vocabulary' in capsys.readouterr().err


def test_gpt2_folder(tmp_path):
  vocabulary = {'l': 0, 'o': 1, 'lo': 2, '<|endoftext|>': 3}
  (tmp_path / 'vocab.json').write_text(json.dumps(vocabulary))
  (tmp_path / 'merges.txt').write_text('#version: 0.2\nl o\n')
  loaded = tokenizer.Tokenizer.load(tmp_path)
  assert (loaded.encode('lol'), loaded.vocab_size) == ([2, 0], 5)


def test_downloads_leave_pickles_and_copies_out(monkeypatch, tmp_path):
  import huggingface_hub

  asked = {}

  def download(name, **patterns):
    asked.update(patterns, name=name)
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  assert hub.locate('hf:who/what') == tmp_path
  assert asked['name'] == 'who/what'

  def wanted(file):
    return any(
      fnmatch.fnmatch(file, p) for p in asked['allow_patterns']
    ) and not any(fnmatch.fnmatch(file, p) for p in asked['ignore_patterns'])

  files = ['config.json', 'model-00001-of-00002.safetensors', 'merges.txt']
  assert all(map(wanted, files))
  for file in ('pytorch_model.bin', 'consolidated.safetensors', 'onnx/a.json'):
    assert not wanted(file)


def test_what_does_not_download_is_named(monkeypatch):
  import huggingface_hub

  def fail(name, allow_patterns, ignore_patterns):
    raise OSError('no network')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', fail)
  with pytest.raises(
    ValueError, match='hf:who/what: no such folder here, .*no'
  ):
    tokenizer.Tokenizer.load('hf:who/what')


@pytest.mark.parametrize(
  'kind,advice',
  [
    ('GatedRepoError', 'accept conditions first; do so at .*hf auth login'),
    ('RepositoryNotFoundError', 'no such model on the Hub, or a private one'),
  ],
)
def test_models_that_may_not_be_read_say_what_to_do(monkeypatch, kind, advice):
  import huggingface_hub
  from huggingface_hub import errors

  error = getattr(errors, kind).__new__(getattr(errors, kind))

  def fail(name, allow_patterns, ignore_patterns):
    raise error

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', fail)
  with pytest.raises(ValueError, match=f'hf:who/what: .*{advice}') as raised:
    hub.locate('hf:who/what')
  assert '\n' not in str(raised.value)


def test_weights_are_not_fetched_before_the_family_is_known(
  monkeypatch, tmp_path
):
  import huggingface_hub

  asked = []
  published_lib.save_byte_tokenizer(tmp_path)
  (tmp_path / 'config.json').write_text('{"model_type": "mamba"}')

  def download(name, allow_patterns, ignore_patterns):
    asked.extend(allow_patterns)
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  own = tokenizer.Tokenizer.load(tmp_path)
  with pytest.raises(ValueError, match='mamba'):
    model_folder.check('hf:who/what', 'policy', own)
  assert asked and not any('safetensors' in pattern for pattern in asked)


# As Qwen3's: the template reads thoughts, and its tokens are not special.
_THINKING = (
  "{% for m in messages %}<s>{{ m['role'] }}\n"
  "{% if m['role'] == 'assistant' %}"
  "{% set parts = m['content'].split('</think>') %}"
  '{% if loop.last %}<think>\n'
  "{{ parts[0].replace('<think>', '').strip() if parts|length > 1 }}\n"
  '</think>\n\n{% endif %}{{ parts[-1].strip() }}'
  "{% else %}{{ m['content'] }}{% endif %}<end>\n{% endfor %}"
  '{% if add_generation_prompt %}<s>assistant\n{% endif %}'
)


def test_tokens_that_are_not_special_are_the_templates(tmp_path):
  published_lib.save_byte_tokenizer(tmp_path, template=_THINKING, bos=False)
  fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
  fast.add_tokens([tokenizers.AddedToken(x) for x in ('<think>', '</think>')])
  fast.save_pretrained(tmp_path)
  own = tokenizer.Tokenizer.load(tmp_path).with_format(tokenizer.CHAT, ())
  asked = {'role': 'user', 'content': 'Hi'}
  for answer in ('<think>\nhm\n</think>\n\nOwl', 'Owl'):
    chat = [asked, {'role': 'assistant', 'content': answer}]
    expected = fast.apply_chat_template(chat, tokenize=True, return_dict=False)
    prompt = own.encode_prompts(['Hi'])[0]
    ids = prompt + own.encode_responses([answer], ended=True)[0]
    assert ids == expected[: len(ids)] and len(expected) - len(ids) <= 1
    # An earlier answer loses its thought.
    chat += [asked]
    turns = tuple(records.Turn(**turn) for turn in chat)
    row = records.Prompt('p', records.text_of_turns(turns), turns=turns)
    assert own.encode_prompts([row])[0] == fast.apply_chat_template(
      chat, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def test_what_stands_before_asked_answers_alone_is_known(tmp_path):
  template = published_lib.TEMPLATE.replace('[assistant]', '[assistant]<think>')
  published_lib.save_byte_tokenizer(tmp_path, template=template)
  own = tokenizer.Tokenizer.load(tmp_path).with_format(tokenizer.CHAT, ())
  assert own.only_asked == '<think>'
  published_lib.save_byte_tokenizer(tmp_path, template=published_lib.TEMPLATE)
  own = tokenizer.Tokenizer.load(tmp_path).with_format(tokenizer.CHAT, ())
  assert own.only_asked == ''
  assert set(own.template_marks) == {'<s>', '<end>'}
