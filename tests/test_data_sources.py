import gzip
import json
import subprocess
import sys

import pyarrow
import pyarrow.ipc
import pytest

from instruct_jax.data import convert, records, sources

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
from instruct_jax.data import convert, records, sources
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


def write_saved(folder, rows, batches=2):
  """A folder as `Dataset.save_to_disk` leaves it."""
  folder.mkdir()
  table = pyarrow.Table.from_pylist(rows)
  with pyarrow.ipc.new_stream(folder / 'data-0.arrow', table.schema) as out:
    for batch in table.to_batches(max_chunksize=-(-len(rows) // batches)):
      out.write_batch(batch)
  state = {'_data_files': [{'filename': 'data-0.arrow'}]}
  (folder / 'state.json').write_text(json.dumps(state))


def test_saved_datasets(tmp_path):
  rows = [{'question': f'q{i}?', 'answer': f'a{i}', 'n': i} for i in range(5)]
  write_saved(tmp_path / 'set', rows)
  spec = f'datasets:{tmp_path / "set"}'
  assert list(sources.read_examples(spec)) == rows
  found = sources.from_fields(
    sources.read_examples(spec),
    records.Demonstration,
    {'prompt': '{question} ({n})\n', 'response': '{answer}'},
    spec,
  )
  assert found[3] == records.Demonstration('q3? (3)\n', 'a3')
  with pytest.raises(records.RecordError, match='answer, n, question and no t'):
    sources.read_documents(spec, words_per_document=9)
  write_saved(tmp_path / 'texts', [{'text': 'one\n\ntwo'}, {'text': 'three'}])
  spec = f'datasets:{tmp_path / "texts"}'
  found = sources.read_documents(spec, words_per_document=1)
  assert [d.text for d in found] == ['one', 'two', 'three']

  path = tmp_path / 'texts' / 'data-0.arrow'
  path.write_bytes(path.read_bytes()[:150])
  with pytest.raises(records.RecordError, match='data-0.arrow: damaged'):
    list(sources.read_examples(spec))
  (tmp_path / 'dataset_dict.json').write_text('{"splits": ["train", "test"]}')
  with pytest.raises(records.RecordError, match='one of train, test'):
    list(sources.read_examples(f'datasets:{tmp_path}'))
  with pytest.raises(records.RecordError, match=r'no state\.json'):
    list(sources.read_examples(f'datasets:{tmp_path / "nowhere"}'))


def test_bad_values_of_fields_are_reported_together():
  examples = [{'a': '', 'b': 'x'}, {'a': 'y', 'b': 'x'}, {'a': 'z', 'b': ' '}]
  with pytest.raises(records.RecordError) as info:
    sources.from_fields(
      examples, records.Demonstration, {'prompt': '{a}', 'response': '{b}'}, 'S'
    )
  message = str(info.value)
  assert "S:1: 'prompt' is empty" in message
  assert "S:3: 'response' is empty" in message


def test_mix_by_hand():
  a = [records.Document(f'a{i}') for i in range(10)]
  b = [records.Document(f'b{i}') for i in range(100)]
  mixed = sources.mix([a, b], [0.2, 0.8], seed=0)
  # a has 10 for a fifth: 50 in all, 40 of them from b; none twice.
  texts = [d.text for d in mixed]
  assert len(texts) == len(set(texts)) == 50
  assert sum(t.startswith('a') for t in texts) == 10
  assert mixed == sources.mix([a, b], [1, 4], seed=0)
  assert mixed != sources.mix([a, b], [1, 4], seed=1)
  with pytest.raises(ValueError, match='must be positive'):
    sources.mix([a, b], [1, 0], seed=0)
  with pytest.raises(ValueError, match='not empty'):
    sources.mix([a, []], [1, 1], seed=0)


def test_the_command_reads_tables_and_mixes(tmp_path, capsys):
  rows = [{'question': f'q{i}?', 'answer': f'a{i}'} for i in range(60)]
  write_saved(tmp_path / 'set', rows)
  out = tmp_path / 'out'
  command = [
    'demonstrations',
    f'datasets:{tmp_path / "set"}',
    '--field=prompt={question}\\n',
    '--field=response={answer}',
    f'--output={out}',
    '--valid=0.2',
  ]
  assert convert.main(command) == 0
  train, valid = (
    records.read_jsonl(
      out / f'demonstrations_{split}.jsonl', records.Demonstration
    )
    for split in ('train', 'valid')
  )
  assert len(train) + len(valid) == 60
  assert train[0] == records.Demonstration('q0?\n', 'a0')

  other = [records.Demonstration(f'x{i}', 'y') for i in range(60)]
  records.write_jsonl(tmp_path / 'other.jsonl', other)
  command = [
    'demonstrations',
    str(out / 'demonstrations_train.jsonl'),
    str(tmp_path / 'other.jsonl'),
    f'--output={tmp_path / "mix"}',
    '--weights=1,0.5',
  ]
  assert convert.main(command) == 0
  mixed = [
    row
    for split in ('train', 'valid')
    for row in records.read_jsonl(
      tmp_path / f'mix/demonstrations_{split}.jsonl', records.Demonstration
    )
  ]
  own = sum(row.prompt.startswith('q') for row in mixed)
  assert own == len(train) and len(mixed) - own == len(train) // 2
  assert convert.main([*command[:-1], '--weights=1']) == 1
  assert '2 parts with 1 weights' in capsys.readouterr().err
  assert convert.main(['hh', *command[1:]]) == 1
  assert 'go with documents, prompts' in capsys.readouterr().err

  (tmp_path / 'a.txt').write_text('\n\n'.join(f'page {i}' for i in range(40)))
  command = ['documents', str(tmp_path / 'a.txt'), '--words=2']
  assert convert.main([*command, f'--output={tmp_path / "docs"}']) == 0
  assert 'documents_train: ' in capsys.readouterr().out
