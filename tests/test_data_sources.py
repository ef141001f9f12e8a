import codecs
import csv
import datetime
import gzip
import io
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.ipc
import pytest

from instruct_jax.data import convert, records, sources


def from_fields(examples, record_type, fields, source):
  parsed = sources.Fields(record_type, fields, source)
  return parsed.fill(enumerate(examples, start=1))


TEXT = 'one two\nthree\n\n\n  four five\n \nsix\n\n'


def test_split_text_by_hand():
  # Paragraphs of 3, 2 and 1 words; pieces close at 4 words or more.
  assert sources.split_text(TEXT, 4) == ['one two three\n\nfour five', 'six']
  assert sources.split_text(TEXT, 1) == ['one two three', 'four five', 'six']
  assert sources.split_text(TEXT, 99) == ['one two three\n\nfour five\n\nsix']
  assert sources.split_text(' \n\n ', 4) == []
  # Nor are paragraphs that nobody could see.
  assert sources.split_text('one\n\n\x00\x01\n\n\u200b', 1) == ['one']


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


def test_what_a_folder_holds_beside_its_files_is_named(tmp_path, capsys):
  folder, below = tmp_path / 'D', tmp_path / 'D' / 'sub'
  below.mkdir(parents=True)
  row = {'prompt': 'Q?', 'completions': ['a', 'b'], 'ranks': [1, 2]}
  for name in ('train.jsonl', 'sub/b.jsonl', 'x.JSONL'):
    (folder / name).write_text(json.dumps(row))
  for name in ('more.jsonl.zst', 'y.arrow', 'z.TXT', 'README.md', '.hidden'):
    (folder / name).write_text('x')
  out = [f'--output={tmp_path / "out"}', '--valid=0.0001']
  others = 'more.jsonl.zst, sub, x.JSONL, y.arrow, z.TXT'
  note = f'note: {folder}: not read: {others}\n'
  assert convert.main(['comparisons', str(folder), *out]) == 0
  assert capsys.readouterr().err.endswith(note)
  command = ['prompts', str(folder), *out, '--field=text={prompt}']
  assert convert.main(command) == 0
  assert capsys.readouterr().err.endswith(note)
  (folder / 'train.jsonl').write_text('{"text": "An owl."}')
  assert convert.main(['documents', str(folder), *out]) == 0
  assert capsys.readouterr().err.endswith(note)
  # Files of a subfolder that is read, and what is read as a whole.
  (folder / 'train.jsonl').unlink()
  (below / 'c.zst').write_text('x')
  files = sources.files_of(folder)
  others = others.replace('sub', 'sub/c.zst')
  assert sources.unread(files, folder) == f'{folder}: not read: {others}'
  assert sources.unread([f'datasets:{folder}'], folder) == ''
  for number in range(30):
    (below / f'{number:02}.zst').write_text('x')
  unread = sources.unread(files, folder)
  assert unread.endswith(', sub/18.zst, 15 more')


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
  (tmp_path / 'unseen.txt').write_bytes(b'\x00\x01\n\n\x02')
  assert 'unseen.txt: holds no text' in error(tmp_path / 'unseen.txt')
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
  assert list(sources.read_examples(spec)) == list(enumerate(rows, start=1))
  found = from_fields(
    rows,
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
    from_fields(
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


# --- Format strings over files ------------------------------------------------

QUESTIONS = [
  {'question': 'Name a bird.', 'answers': ['Owl.', 'No.'], 'scores': [2, 0.5]},
  {'question': 'Name a tree.', 'answers': ['Oak.', ''], 'scores': [1, 1]},
]


def write_table(folder, kind, rows):
  """The same rows as another kind of file; lists in CSV are spelt as JSON."""
  path = folder / f'table.{kind}'
  if kind == 'datasets':
    write_saved(path, rows)
    return f'datasets:{path}'
  if kind.startswith(('csv', 'tsv')):
    buffer = io.StringIO()
    delimiter = '\t' if kind.startswith('tsv') else ','
    writer = csv.DictWriter(buffer, rows[0], delimiter=delimiter)
    writer.writeheader()
    for row in rows:
      writer.writerow(
        {
          name: json.dumps(value) if isinstance(value, list) else value
          for name, value in row.items()
        }
      )
    text = buffer.getvalue()
  elif kind.startswith('json.') or kind == 'json':
    text = json.dumps(rows, indent=1)
  else:
    text = '\n'.join(map(json.dumps, rows))
  content = codecs.BOM_UTF8 + text.encode()
  path.write_bytes(gzip.compress(content) if kind.endswith('.gz') else content)
  return str(path)


KINDS = ('datasets', 'json', 'jsonl', 'csv', 'tsv', 'json.gz', 'csv.gz')


def gathered(out, kind, record_type):
  found = []
  for split in ('train', 'valid'):
    path = out / f'{kind}_{split}.jsonl'
    if path.exists():
      found += records.read_jsonl(path, record_type)
  return found


@pytest.mark.parametrize('kind', KINDS)
def test_tables_of_every_kind_make_comparisons(kind, tmp_path):
  spec = write_table(tmp_path, kind, QUESTIONS)
  command = [
    'comparisons',
    spec,
    '--field=prompt={question}\\n',
    '--field=completions={answers}',
    '--field=scores={scores}',
    '--field=labeler=w1',
    f'--output={tmp_path / "out"}',
    '--valid=0.0001',
  ]
  assert convert.main(command) == 0
  assert gathered(tmp_path / 'out', 'comparisons', records.Comparison) == [
    records.Comparison(
      prompt=f'{row["question"]}\n',
      completions=tuple(row['answers']),
      ranks=ranks,
      scores=tuple(map(float, row['scores'])),
      labeler='w1',
    )
    for row, ranks in zip(QUESTIONS, [(1, 2), (1, 1)], strict=True)
  ]


@pytest.mark.parametrize('kind', KINDS)
def test_columns_side_by_side_make_a_list(kind, tmp_path):
  rows = [
    {'q': 'Q?', 'a': 'yes', 'b': 'no', 'first': 1, 'second': 2, 'who': 7},
    {'q': 'R?', 'a': 'ja', 'b': 'nein', 'first': 2, 'second': 1, 'who': 8},
  ]
  spec = write_table(tmp_path, kind, rows)
  command = [
    'comparisons',
    spec,
    '--field=prompt={q}',
    '--field=completions={a}',
    '--field=completions=It is {b}.',
    '--field=ranks={first}',
    '--field=ranks={second}',
    '--field=labeler=w{who}',
    '--field=metadata={who}',
    f'--output={tmp_path / "out"}',
    '--valid=0.0001',
  ]
  assert convert.main(command) == 0
  first, second = gathered(tmp_path / 'out', 'comparisons', records.Comparison)
  assert first.completions == ('yes', 'It is no.')
  assert (first.ranks, second.ranks) == ((1, 2), (2, 1))
  assert second.labeler == 'w8'
  who = second.metadata['who']
  assert who == ('8' if 'sv' in kind else 8)


@pytest.mark.parametrize('kind', ['datasets', 'json', 'jsonl', 'csv'])
def test_null_columns_are_empty_texts(kind, tmp_path, capsys):
  rows = [
    {
      'question': 'Name a bird.',
      'context': None,
      'answer': 'An owl.',
      'n': 2.0,
    },
    {'question': 'Name it.', 'context': 'An owl.', 'answer': 'Owl.', 'n': None},
    {'question': 'Name a tree.', 'context': '', 'answer': None, 'n': math.nan},
  ]
  spec = write_table(tmp_path, kind, rows)
  command = [
    'demonstrations',
    spec,
    '--field=prompt={context}\\n{question}\\n',
    '--field=response={answer}',
    '--field=user=u{n}',
    f'--output={tmp_path / "out"}',
    '--valid=0.0001',
  ]
  assert convert.main(command) == 1
  error = capsys.readouterr().err
  # In a CSV file the rows begin behind the header.
  number = 4 if kind == 'csv' else 3
  assert error == (
    f"{spec}:{number}: 'response' is empty; fill it in or drop the record\n"
  )
  assert not (tmp_path / 'out').exists()
  rows[2]['answer'] = 'An oak.'
  for path in tmp_path.iterdir():
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  assert (
    convert.main([command[0], write_table(tmp_path, kind, rows), *command[2:]])
    == 0
  )
  found = gathered(tmp_path / 'out', 'demonstrations', records.Demonstration)
  assert [d.prompt for d in found] == [
    '\nName a bird.\n',
    'An owl.\nName it.\n',
    '\nName a tree.\n',
  ]
  # A user who is nobody is not the user `u` of all such rows.
  users = [d.user for d in found]
  assert users[0] == 'u2.0'
  if kind != 'csv':
    assert users[1:] == ['', '']


VALUES = {
  'a': ['x', None],
  'o': {'text': ['y'], 'n': 1},
  's': 'z',
  'n': 3.14159,
  'null': None,
  'bad': b'\xff',
  'turns': [{'role': 'user', 'content': 'hi'}],
}


@pytest.mark.parametrize(
  ('template', 'expected'),
  [
    ('{a[0]}', 'x'),
    ('{s}{a[1]}', 'z'),
    ('{o[text][0]} {o[n]}', 'y 1'),
    ('{n:.2f}', '3.14'),
    ('{s:>3}', '  z'),
    ('{{{s}}}', '{z}'),
    ('{null:.2f}{s}', 'z'),
    ('{null[0]}{s}', 'z'),
    (
      '{a}',
      ValueError(
        '{a} is a list, not a text; name an entry of it, such as {a[0]}'
      ),
    ),
    ('{o}', ValueError('{o} is an object, not a text')),
    ('{a[2]}', ValueError('{a[2]}: there is no entry 2')),
    ('{o[other]}', ValueError('{o[other]}: there is no entry other')),
    ('{s:.2f}', ValueError('{s:.2f}: Unknown format code')),
    ('{bad}', ValueError("byte 0 of b'\\xff' is not UTF-8")),
    ('{null}', ValueError("'text' is empty")),
    ('Q: {null}\nA:', ValueError("'text' is empty")),
    ('{s.upper}', ValueError('and no s.upper')),
    ('{a', ValueError("--field=text={a: expected '}' before end of string")),
    ('{}', ValueError('--field=text={}: {} must name a column')),
    ('{s!r}', ValueError('must name a column, without !')),
  ],
)
def test_a_format_string_by_hand(template, expected):
  def fill():
    return from_fields([VALUES], records.Prompt, {'text': template}, 'S')

  if isinstance(expected, str):
    assert fill() == [records.Prompt('S:1', expected)]
  else:
    with pytest.raises(records.RecordError) as info:
      fill()
    assert str(expected) in str(info.value)
    assert '\n' not in str(info.value)


def test_lists_by_hand():
  def fill(record_type, values, **fields):
    return from_fields([values], record_type, fields, 'S')[0]

  def comparison(values, **fields):
    fields = {'prompt': 'x', 'completions': '{c}', **fields}
    row = fill(records.Comparison, {'c': ['a', 'b'], **values}, **fields)
    return row.ranks, row.scores

  assert comparison({'r': [2.0, 1]}, ranks='{r}') == ((2, 1), ())
  assert comparison({'r': '[2, 1]'}, ranks='{r}') == ((2, 1), ())
  assert comparison({'r': ['2', '1.0']}, ranks='{r}') == ((2, 1), ())
  assert comparison({'r': np.array([2, 1])}, ranks='{r}') == ((2, 1), ())
  assert comparison({'s': [True, False]}, scores='{s}') == ((1, 2), (1, 0))
  assert comparison({'s': ['1.5', 2]}, scores='{s}') == ((2, 1), (1.5, 2))
  assert comparison({}, ranks=['1', '2']) == ((1, 2), ())
  # An answer may be empty; a missing one is an error, as is a missing rank.
  row = fill(
    records.Comparison,
    {'c': ['a', '', '']},
    prompt='x',
    completions='{c}',
    ranks=['1', '2', '2'],
  )
  assert row.completions == ('a', '', '')
  for null in (None, math.nan):
    for given in ('{c}', ['a', '{n}'], ['a', 'It is {n}.'], ['a', '{n}{n}']):
      with pytest.raises(
        records.RecordError,
        match=r"S:1: 'completions' must be a list of strings, found \[.*null",
      ):
        comparison(
          {'c': ['a', null], 'n': null}, completions=given, ranks=['1', '2']
        )
  for ranks in ([1, None], [1, 1.5], [1, 'x'], [1, True], [1]):
    with pytest.raises(records.RecordError, match=r"S:1: 'ranks'"):
      comparison({'r': ranks}, ranks='{r}')
  with pytest.raises(records.RecordError, match='is a list, not a text'):
    comparison({'c': [['a'], 'b']}, ranks=['1', '2'])
  # Each of several is a text, even one that could be a list.
  for text in ('["owl"]', '[5]', '[null]', '[1, 2]', '[a'):
    row = fill(
      records.Comparison,
      {'a': text, 'b': 7},
      prompt='x',
      completions=['{a}', '{b}'],
      ranks=['1', '2'],
    )
    assert row.completions == (text, '7')
  with pytest.raises(records.RecordError, match=r'\{a\} is a list, .* \{a\[0'):
    comparison({'a': ['owl']}, completions=['{a}', 'b'], ranks=['1', '2'])

  turns = [{'role': 'user', 'content': 'hi'}]
  row = fill(records.Prompt, {'t': turns, 'm': None}, turns='{t}', user='{m}')
  assert row.turns == (records.Turn('user', 'hi'),)
  assert row.text == '\n\nHuman: hi\n\nAssistant:'
  row = fill(records.Prompt, {'t': None, 'x': 'y'}, turns='{t}', text='{x}')
  assert row == records.Prompt('S:1', 'y')
  values = {'d': datetime.date(2020, 1, 2), 'n': math.nan, 'o': {'k': [b'v']}}
  row = fill(records.Prompt, values, text='x', metadata=['{d}', '{n}', '{o}'])
  assert row.metadata == {'d': '2020-01-02', 'n': None, 'k': ['v']}
  with pytest.raises(
    records.RecordError, match='given 2 times but is one text'
  ):
    fill(records.Prompt, {}, text=['a', 'b'])


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    (['prompt={q}'], 'Demonstration needs --field=response=...,'),
    (['response={q}'], 'Demonstration needs --field=prompt=...,'),
    (['text={q}'], '--field=text: Demonstration has prompt, response, id,'),
    (['prompt={q}', 'response={x}'], ':1: examples have q and no x'),
  ],
)
def test_fields_that_are_missing_or_unknown(fields, expected, tmp_path, capsys):
  spec = write_table(tmp_path, 'jsonl', [{'q': str(i)} for i in range(30)])
  command = ['demonstrations', spec, f'--output={tmp_path / "out"}']
  assert convert.main([*command, *(f'--field={f}' for f in fields)]) == 1
  error = capsys.readouterr().err
  assert expected in error and error.count('\n') == 1


def test_rows_without_a_column_are_named(tmp_path, capsys):
  rows = [{'q': 'a', 'r': 'b'}, {'q': 'a'}]
  for kind in ('jsonl', 'json'):
    spec = write_table(tmp_path, kind, rows)
    command = ['demonstrations', spec, '--field=prompt={q}']
    command += ['--field=response={r}', f'--output={tmp_path / "out"}']
    assert convert.main(command) == 1
    error = capsys.readouterr().err
    assert error == f'{spec}:2: examples have q and no r\n'


@pytest.mark.parametrize(
  ('name', 'content', 'expected'),
  [
    ('a.csv', b'{"q": "a", "r": "b"}\n', ':1: not CSV; it looks like JSON'),
    ('a.csv', b'[{"q": "a", "r": "b"}]', ':1: not CSV; it looks like JSON'),
    ('a.csv', b'q,other\na,b\n', ':1: columns r are missing; found q, other'),
    ('a.csv', b'q,r,q\na,b,c\n', ":1: column 'q' comes twice"),
    ('a.csv', b'q,r\na\n', ':2: 1 fields for 2 columns'),
    ('a.csv', b'q,r\n"a,b\n', ':2: not CSV (unexpected end of data)'),
    ('a.csv', 'q,r\né,b\n'.encode('latin-1'), ':2: byte 4 of the file is not'),
    ('a.csv', 'q,r\na,b\n'.encode('utf-16'), ': is UTF-16; convert'),
    ('a.csv', b'', ':1: columns q, r are missing; found nothing'),
    ('a.csv', b'q,r\n', ': has a header and no rows'),
    (
      'a.csv',
      b'q,r\na,' + b'x' * 9_000_000 + b'\n',
      ':2: not CSV (field larger',
    ),
    ('a.json', b'[{"q": "a", "r": "b"}', ': not JSON ('),
    ('a.json', b'{\n"data": []\n}', ':1: one JSON value over several lines'),
    ('a.json', b'["a"]', ':1: expected an object, found a str'),
    ('a.json', b'[' * 9999, ': not JSON (maximum recursion depth'),
    ('a.jsonl', b'{"q": "a"', ':1: not JSON ('),
    ('a.jsonl', b'\xfd7zXZ\0', ': is compressed with xz; unpack it'),
    ('a.jsonl', b'\x28\xb5\x2f\xfd', ': is compressed with zstd; unpack it'),
    ('a.csv', b'PK\x03\x04', ': is a zip archive or an Excel file; unpack'),
    ('a.json', b'PAR1', ': is a Parquet file; let its name end in .parquet'),
    ('a.orc', b'ORC', ': expected tfds:NAME/SPLIT, datasets:FOLDER, or a'),
    ('a.parquet', b'PAR1', ': damaged after row 0 ('),
    ('a.csv.gz', b'q,r\na,b\n', ': not a whole gzip file'),
  ],
)
def test_files_that_are_no_tables(name, content, expected, tmp_path, capsys):
  path = tmp_path / name
  path.write_bytes(content)
  command = ['demonstrations', str(path), '--field=prompt={q}']
  command += ['--field=response={r}', f'--output={tmp_path / "out"}']
  assert convert.main(command) == 1
  error = capsys.readouterr().err
  assert error.startswith(f'{path}{expected}'), error
  assert error.count('\n') == 1


@pytest.mark.parametrize('delimiter', [';', '\t', '|'])
def test_a_delimiter_is_told_by_the_columns(delimiter, tmp_path):
  # With a comma in a cell, and quotes that are none to a comma.
  lines = [['q', 'r'], ['"a;b\t|,"', 'c, d'], ['e', 'f']]
  path = tmp_path / 'a.csv'
  path.write_text('\n'.join(delimiter.join(line) for line in lines))
  found = list(sources.read_csv(path, ('r', 'q')))
  assert found == [
    (2, {'q': 'a;b\t|,', 'r': 'c, d'}),
    (3, {'q': 'e', 'r': 'f'}),
  ]


def test_tables_need_fields(tmp_path, capsys):
  write_table(tmp_path, 'csv', QUESTIONS)
  write_table(tmp_path, 'json', QUESTIONS)
  for name in ('table.csv', 'table.json'):
    # Not text to pretrain on, either.
    command = ['documents', str(tmp_path / name)]
    assert convert.main([*command, f'--output={tmp_path / "out"}']) == 1
    assert name in capsys.readouterr().err
  for name in ('table.csv', 'table.json', 'datasets:nowhere', 'tfds:a/b'):
    spec = name if ':' in name else str(tmp_path / name)
    assert convert.main(['prompts', spec, f'--output={tmp_path / "out"}']) == 1
    error = capsys.readouterr().err
    assert error.startswith(
      f'{spec}: is a table; give each field of prompts with'
    )


@pytest.mark.parametrize(
  ('state', 'expected'),
  [
    ('{', 'state.json: not JSON'),
    ('[]', "state.json: has no list '_data_files'"),
    ('{}', "state.json: has no list '_data_files'"),
    ('{"_data_files": [{}]}', "state.json: '_data_files' names no file"),
    ('{"_data_files": [{"filename": "x"}]}', '/x: no such file'),
    (
      '{"_data_files": [], "_indices_data_files": [1]}',
      'flatten_indices()',
    ),
  ],
)
def test_damaged_folders_of_tables(state, expected, tmp_path, capsys):
  write_saved(tmp_path / 'set', [{'q': 'a'}])
  (tmp_path / 'set' / 'state.json').write_text(state)
  command = ['prompts', f'datasets:{tmp_path / "set"}', '--field=text={q}']
  assert convert.main([*command, f'--output={tmp_path / "out"}']) == 1
  error = capsys.readouterr().err
  assert expected in error and error.count('\n') == 1
  (tmp_path / 'set' / 'state.json').unlink()
  (tmp_path / 'set' / 'dataset_dict.json').write_text('{}')
  assert convert.main([*command, f'--output={tmp_path / "out"}']) == 1
  assert "dataset_dict.json: has no list 'splits'" in capsys.readouterr().err


def test_tables_of_models_answers(tmp_path, capsys):
  rows = [
    {'instruction': 'A?', 'output': 'a', 'generator': 'gpt'},
    {'instruction': 'B?', 'output': 'b', 'generator': None},
    {'instruction': 'C?', 'output': 'c', 'generator': 'human'},
  ]
  spec = write_table(tmp_path, 'json', rows)
  command = ['demonstrations', spec, '--field=prompt={instruction}']
  command += ['--field=response={output}', f'--output={tmp_path / "out"}']
  command += ['--valid=0.0001']
  assert convert.main(command) == 0
  out = capsys.readouterr().out
  assert 'demonstrations_train: 2\n' in out
  assert (
    "a model wrote the answer, according to 'generator'; --model_out" in out
  )
  assert convert.main([*command, '--model_outputs']) == 0
  assert 'demonstrations_train: 3\n' in capsys.readouterr().out
  # The reference beside a prediction is a person's.
  rows = [{'q': 'A?', 'response': 'wrong', 'target': 'right'}]
  spec = write_table(tmp_path, 'csv', rows)
  command = ['demonstrations', spec, '--field=prompt={q}', *command[4:]]
  assert convert.main([*command, '--field=response={response}']) == 1
  assert 'nothing is left to write; skipped: a mod' in capsys.readouterr().err
  assert convert.main([*command, '--field=response={target}']) == 0


def test_prompts_of_several_files_have_ids_of_their_own(tmp_path, capsys):
  specs = []
  for name in ('a', 'b'):
    path = tmp_path / f'{name}.csv'
    path.write_text(f'q,i\n{name}?,p1\n')
    specs.append(str(path))
  command = ['prompts', *specs, '--field=text={q}', '--valid=0.0001']
  out = f'--output={tmp_path / "out"}'
  assert convert.main([*command, out]) == 0
  found = gathered(tmp_path / 'out', 'prompts', records.Prompt)
  assert [p.id for p in found] == ['a:2', 'b:2']
  assert convert.main([*command, '--field=id={i}', out]) == 1
  error = capsys.readouterr().err
  assert f"{specs[1]}: the id 'p1' is also in {specs[0]}" in error


def test_what_weights_leave_out_is_counted(tmp_path, capsys):
  for name, number in (('a', 10), ('b', 40)):
    rows = [records.Document(f'{name} {i}') for i in range(number)]
    records.write_jsonl(tmp_path / f'{name}.jsonl', rows)
  paths = [str(tmp_path / f'{name}.jsonl') for name in 'ab']
  command = ['documents', *paths, f'--output={tmp_path / "out"}']
  assert convert.main([*command, '--weights=1,1']) == 0
  out = capsys.readouterr().out
  assert 'skipped: beyond the weights of the mixture: 30\n' in out
  with pytest.raises(SystemExit):
    convert.main([*command, '--weights=1,nan'])
  assert "'1,nan' are not all finite numbers" in capsys.readouterr().err
