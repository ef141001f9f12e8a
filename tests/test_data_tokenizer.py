import gzip
import json

import numpy as np
import pytest

from instruct_jax.data import records, tokenizer


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
  with pytest.raises(ValueError, match='no_eos: .*PAD and an EOS token'):
    tokenizer.Tokenizer.load(tmp_path / 'no_eos')


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
    with pytest.raises(ValueError, match=f'id {bad} is not among the 7'):
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
  with pytest.raises(records.RecordError, match='encoder.json.gz: not a JSON'):
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
