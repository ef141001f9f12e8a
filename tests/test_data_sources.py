import gzip
import subprocess
import sys

import pytest

from instruct_jax.data import records, sources

TEXT = 'one two\nthree\n\n\n  four five\n \nsix\n\n'


def test_split_text_by_hand():
  # Paragraphs of 3, 2 and 1 words; pieces close at 4 words or more.
  assert sources.split_text(TEXT, 4) == ['one two three\n\nfour five', 'six']
  assert sources.split_text(TEXT, 1) == ['one two three', 'four five', 'six']
  assert sources.split_text(TEXT, 99) == ['one two three\n\nfour five\n\nsix']
  assert sources.split_text(' \n\n ', 4) == []


def test_files_and_folders(tmp_path):
  (tmp_path / 'b.txt').write_text(TEXT)
  (tmp_path / 'a.txt.gz').write_bytes(gzip.compress(b'alpha'))
  (tmp_path / 'notes.md').write_text('not read')
  records.write_jsonl(
    tmp_path / 'c.jsonl', [records.Document('as it\nis', source='own')]
  )
  found = sources.read_documents(tmp_path, words_per_document=4)
  assert [(d.text, d.source) for d in found] == [
    ('alpha', 'a'),
    ('one two three\n\nfour five', 'b'),
    ('six', 'b'),
    ('as it\nis', 'own'),
  ]
  one = sources.read_documents(tmp_path / 'c.jsonl', words_per_document=4)
  assert one == found[3:]


def test_bad_sources(tmp_path):
  def error(spec):
    with pytest.raises(records.RecordError) as info:
      sources.read_documents(spec, words_per_document=4)
    return str(info.value)

  assert 'no files that end in .txt' in error(tmp_path)
  assert 'gone.txt: no such file' in error(tmp_path / 'gone.txt')
  (tmp_path / 'bad.txt').write_bytes(b'fine\nfine\n\xff')
  assert 'bad.txt:3: byte 10 of the file is not UTF-8' in error(
    tmp_path / 'bad.txt'
  )
  (tmp_path / 'empty.txt').write_text(' \n')
  assert 'empty.txt: holds no text' in error(tmp_path / 'empty.txt')
  assert 'expected tfds:NAME/SPLIT' in error('tfds:lm1b')
  assert 'tfds:no_such_set/train: cannot be opened' in error(
    'tfds:no_such_set/train'
  )


def test_tfds_without_tensorflow():
  # In a process of its own: the test is that TensorFlow is not imported.
  program = """
import sys
import tensorflow_datasets as tfds
from instruct_jax.data import records, sources
with tfds.testing.mock_data(num_examples=3):
  found = sources.read_documents('tfds:lm1b/train', words_per_document=9999)
  try:
    sources.read_documents('tfds:ag_news_subset/train', words_per_document=9)
  except records.RecordError as error:
    print(error)
assert len(found) == 3 and all(d.source == 'lm1b/train' for d in found), found
assert 'tensorflow' not in sys.modules
"""
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert 'examples have description, label, title and no text' in done.stdout
