import codecs
import dataclasses
import gzip
import json
import os
import resource
import unicodedata

import pytest

from instruct_jax import files
from instruct_jax.data import __main__ as check
from instruct_jax.data import labels, records, tokenizer

COMPARISON = records.Comparison(
  prompt='Name a bird.',
  completions=('Owl.', '', 'No.'),
  ranks=(1, 2, 2),
  labeler='w1',
  metadata={'slots': [['a', 1]]},
)
EXAMPLES = [
  records.Document('The owl lives in a barn.', source='animals'),
  records.Prompt('p7', 'Name a bird.', user='u3', metadata={'answer': 'ö'}),
  records.Demonstration('Name a bird.', 'An owl.\n', labeler='w1'),
  COMPARISON,
  dataclasses.replace(COMPARISON, scores=(2.5, 1.0, 1.0), time='2022-01-31'),
  records.Prompt(
    'p8', 'Name a bird.', turns=(records.Turn('user', 'Name a bird.'),)
  ),
]


@pytest.mark.parametrize('record', EXAMPLES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize('name', ['a.jsonl', 'new/folder/a.jsonl.gz'])
def test_round_trip(record, name, tmp_path):
  path = tmp_path / name
  both = [record, record]
  if isinstance(record, records.Prompt):  # Whose ids are distinct.
    both[1] = dataclasses.replace(record, id='another')
  records.write_jsonl(path, both)
  assert records.read_jsonl(path, type(record)) == both
  before = path.read_bytes()
  records.write_jsonl(path, both)
  assert path.read_bytes() == before
  assert [p.name for p in path.parent.iterdir()] == [path.name]  # No .tmp.


def test_examples_of_the_module_docstring_are_valid():
  text = ' '.join(records.__doc__.split())
  for record_type in records.RECORD_TYPES:
    start = text.index('{', text.index(record_type.__name__))
    values, _ = json.JSONDecoder().raw_decode(text[start:])
    assert records.problems(values, record_type) == []


def _error(path, content, record_type=records.Comparison):
  path.write_bytes(content)
  with pytest.raises(records.RecordError) as info:
    records.read_jsonl(path, record_type)
  return str(info.value)


@pytest.mark.parametrize(
  ('change', 'expected'),
  [
    ({'prompt': ' \n'}, "'prompt' is empty"),
    ({'prompt': ' \u2800\u200b'}, "'prompt' is empty"),
    (
      {'turns': [{'role': 'user', 'content': '\u3164'}]},
      "'turns' ends with an empty message",
    ),
    ({'prompt': 3}, "'prompt' must be a string, found 3"),
    ({'prompt': None}, "'prompt' must be a string, found null"),
    ({'completions': ['a']}, "'completions' has 1 texts"),
    ({'completions': 'ab'}, "'completions' must be a list of strings"),
    ({'completions': ['a', 1, 'c']}, "'completions' must be a list of strings"),
    ({'ranks': [1, 2]}, "'ranks' has 2 numbers for 3 completions"),
    ({'ranks': [0, 1, 2]}, "'ranks' must be from 1 (best) to 1000000"),
    ({'ranks': [1, True, 2]}, "'ranks' must be a list of integers"),
    ({'ranks': [1, 2.0, 2]}, "'ranks' must be a list of integers"),
    ({'metadata': []}, "'metadata' must be an object"),
    ({'labeller': 'w'}, "unknown field 'labeller'; Comparison has prompt"),
    ({'prompt': '\ud800'}, "'prompt' holds a lone surrogate"),
  ],
)
def test_a_bad_field_is_named_with_file_and_line(change, expected, tmp_path):
  good = dataclasses.asdict(COMPARISON)
  lines = [json.dumps(good), '', json.dumps({**good, **change})]
  path = tmp_path / 'a.jsonl'
  message = _error(path, '\n'.join(lines).encode())
  assert message.startswith(f'{path}:3: ') and expected in message
  assert '\n' not in message


def test_a_missing_field_is_named(tmp_path):
  message = _error(
    tmp_path / 'a.jsonl', b'{"text": "x"}', record_type=records.Prompt
  )
  assert "a.jsonl:1: field 'id' is missing" in message


def test_files_that_cannot_be_read(tmp_path):
  path = tmp_path / 'a.jsonl'
  with pytest.raises(records.RecordError, match='a.jsonl: no such file'):
    records.read_jsonl(path, records.Document)
  with pytest.raises(records.RecordError, match='is a folder'):
    records.read_jsonl(tmp_path, records.Document)
  assert 'holds no records' in _error(path, b'\n \n')
  assert 'a.jsonl:2: byte 9 is not UTF-8' in _error(
    path, b'\n{"text": \xff"x"}', records.Document
  )
  assert 'a.jsonl:1: not JSON' in _error(path, b'{"text": "cut')
  twice = b'{"text": "a", "metadata": {"b": 1, "b": 1}}'
  assert "not JSON (key 'b' more than once)" in _error(path, twice)
  assert 'a.jsonl:1: expected a JSON object, found [1]' in _error(path, b'[1]')
  assert 'not JSON' in _error(path, b'{"text": ' + b'9' * 5000 + b'}')
  whole = gzip.compress(b'{"text": "x"}\n' * 100)
  assert 'not a whole gzip' in _error(tmp_path / 'b.jsonl.gz', whole[:-9])
  assert 'not a whole gzip' in _error(tmp_path / 'b.jsonl.gz', b'{"text": ""}')
  damaged = whole[:12] + bytes([whole[12] ^ 255]) + whole[13:]
  assert 'not a whole gzip' in _error(tmp_path / 'b.jsonl.gz', damaged)


def test_ten_bad_lines_are_shown_and_the_rest_counted(tmp_path):
  message = _error(tmp_path / 'a.jsonl', b'{}\n' * 13, records.Document)
  lines = message.split('\n')
  assert len(lines) == 11 and 'a.jsonl:10: ' in lines[9]
  assert lines[10] == '... and 3 more bad lines in this file'


def test_what_could_not_be_read_is_not_written(tmp_path):
  path = tmp_path / 'a.jsonl'
  records.write_jsonl(path, [records.Document('kept')])
  with pytest.raises(records.RecordError, match=r'a.jsonl:2: .*empty'):
    records.write_jsonl(path, [records.Document('x'), records.Document('')])
  with pytest.raises(records.RecordError, match='without records'):
    records.write_jsonl(path, [])
  for value in (float('nan'), {1}, '\ud800'):
    with pytest.raises(records.RecordError, match="a.jsonl:1: 'metadata' is"):
      records.write_jsonl(
        path, [records.Prompt('1', 'x', metadata={'a': value})]
      )
  assert records.read_jsonl(path, records.Document)[0].text == 'kept'


def test_check_describes_every_type_and_fails_on_bad_files(tmp_path, capsys):
  paths = []
  for record in EXAMPLES:
    paths.append(str(tmp_path / f'{type(record).__name__}.jsonl'))
    records.write_jsonl(paths[-1], [record])
    assert check.read_any(paths[-1]) == [record]
  assert check.main(paths) == 0
  out = capsys.readouterr().out
  assert 'Comparison.jsonl: 1 Comparison records' in out
  assert 'K=3 1' in out
  # Ranks (1, 2, 2): of 3 pairs one is a tie.
  assert 'pairs: 3, tied 1 (33.3%)' in out
  bad = tmp_path / 'bad.jsonl'
  bad.write_text('{"completions": ["a", "b"], "ranks": [1, 2]}\n')
  other = tmp_path / 'other.jsonl'
  other.write_text('{"question": "?"}\n')
  assert check.main([paths[0], str(bad), str(other)]) == 1
  captured = capsys.readouterr()
  assert '1 Document records' in captured.out
  assert "bad.jsonl:1: field 'prompt' is missing" in captured.err
  assert 'other.jsonl:1: fields question fit no record type' in captured.err


TURNS = [
  {'role': 'system', 'content': 'Be brief.'},
  {'role': 'user', 'content': 'A bird?'},
  {'role': 'assistant', 'content': 'Owl.'},
  {'role': 'user', 'content': 'More!'},
]


def test_turns_stand_for_the_text(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text(json.dumps({'id': 'p', 'turns': TURNS}))
  (prompt,) = records.read_jsonl(path, records.Prompt)
  assert prompt.text == (
    'Be brief.\n\nHuman: A bird?\n\nAssistant: Owl.\n\nHuman: More!'
    '\n\nAssistant:'
  )
  assert prompt.turns[2] == records.Turn('assistant', 'Owl.')
  records.write_jsonl(path, [prompt])
  assert records.read_jsonl(path, records.Prompt) == [prompt]
  path.write_text(json.dumps({'turns': TURNS, 'response': 'Wren.'}))
  (row,) = records.read_jsonl(path, records.Demonstration)
  assert row.prompt == prompt.text


@pytest.mark.parametrize(
  ('turns', 'expected'),
  [
    ('hi', '\'turns\' must be a list of turns, found "hi"'),
    ([{'role': 'user'}], "'turns': turn 1 must have a role and a content"),
    ([TURNS[1], {'role': 'bot', 'content': ''}], 'turn 2 must have a role of'),
    (TURNS[:3], "'turns' must end with the user's turn"),
    ([{'role': 'user', 'content': '\ud800'}], 'turn 1 holds a lone surrogate'),
  ],
)
def test_bad_turns(turns, expected, tmp_path):
  line = json.dumps({'id': 'p', 'text': 'x', 'turns': turns}).encode()
  assert expected in _error(tmp_path / 'a.jsonl', line, records.Prompt)


def test_scores_stand_for_ranks(tmp_path):
  path = tmp_path / 'a.jsonl'
  values = {'prompt': 'x', 'completions': ['a', 'b', 'c'], 'scores': [1, 7, 1]}
  path.write_text(json.dumps(values))
  (row,) = records.read_jsonl(path, records.Comparison)
  assert (row.ranks, row.scores) == ((2, 1, 2), (1, 7, 1))
  for change, expected in (
    ({'ranks': [1, 2, 1]}, 'the scores have ranks [2, 1, 2]'),
    ({'scores': [1, 2]}, "'ranks' has 2 numbers for 3 completions"),
    ({'scores': [1, 'x', 1]}, "'scores' must be a list of finite numbers"),
    ({'scores': [1, float('nan'), 1]}, "'scores' must be a list of finite"),
    ({'scores': [1, 10**400, 1]}, "'scores' must be a list of finite"),
  ):
    line = json.dumps({**values, **change}).encode()
    assert expected in _error(path, line)


def test_cut_completions_are_marked(tmp_path):
  path = tmp_path / 'a.jsonl'
  values = {'prompt': 'x', 'completions': ['a', 'b'], 'ranks': [1, 2]}
  path.write_text(json.dumps({**values, 'ended': [True, False]}))
  (row,) = records.read_jsonl(path, records.Comparison)
  assert row.ended == (True, False)
  assert records.to_values(row)['ended'] == [True, False]
  for ended, expected in (
    ([True], "'ended' has 1 values for 2 completions"),
    ([1, 0], "'ended' must be a list of true and false, found [1, 0]"),
    (True, "'ended' must be a list of true and false, found true"),
  ):
    line = json.dumps({**values, 'ended': ended}).encode()
    assert expected in _error(path, line)


def test_bad_input_has_its_message(tmp_path):
  path = tmp_path / 'a.jsonl'
  good = {'prompt': 'x', 'completions': ['a', 'b'], 'ranks': [1, 2]}
  # K = 1.
  line = {**good, 'completions': ['a'], 'ranks': [1]}
  assert (
    "a.jsonl:1: 'completions' has 1 texts; a comparison needs at least 2"
    in _error(path, json.dumps(line).encode())
  )
  # Empty completions are texts like any other: a policy may end at once.
  path.write_text(json.dumps({**good, 'completions': ['', '']}))
  assert records.read_jsonl(path, records.Comparison)[0].completions == ('', '')
  # Duplicate ids.
  prompt = json.dumps({'id': 'p', 'text': 'x'}).encode()
  assert (
    'a.jsonl:3: \'id\' "p" is already that of line 1; ids must be distinct'
    in _error(path, b'\n'.join([prompt, b'', prompt]), records.Prompt)
  )
  # Lines of 10 MB, one of them the last; what follows is read again.
  long = json.dumps({'text': 'x' * 10_000_000}).encode()
  message = _error(path, b'\n'.join([long, b'{}', long]), records.Document)
  first, second, third = message.split('\n')
  assert 'a.jsonl:1: 10,000,013 bytes on one line, at most 8,388,608' in first
  assert "a.jsonl:2: field 'text' is missing" in second
  assert 'a.jsonl:3: 10,000,012 bytes' in third
  # All ties.
  ties = [records.Comparison('x', ('a', 'b'), (1, 1))] * 2
  with pytest.raises(
    records.RecordError, match='all 2 comparisons every compl'
  ):
    records.check_labels(ties, path)
  records.check_labels([*ties, COMPARISON], path)


def test_the_check_tells_label_statistics(tmp_path, capsys):
  rows = [
    records.Comparison('x', ('a', 'b', 'c c'), (1, 2, 3), labeler='w1'),
    # The same texts in another order: a < c, b; c and b tied.
    records.Comparison('x', ('c c', 'b', 'a'), (2, 2, 1), labeler='w2'),
    records.Comparison('y', ('a', ''), (2, 1), labeler='w1'),
  ]
  path = tmp_path / 'a.jsonl'
  records.write_jsonl(path, rows)

  def agreement(rows):
    found = labels.agreement(rows)
    return sum(found.agreed), sum(found.counted)

  # Pairs (a, b) and (a, c) were ordered by both, alike.
  assert agreement(rows) == (2, 2)
  swapped = dataclasses.replace(rows[1], ranks=(1, 2, 3))
  # w2 now has c < b < a: none of three pairs alike.
  assert agreement([rows[0], swapped]) == (0, 3)
  # Nobody knows whether two nameless rankings are one person's.
  nameless = [dataclasses.replace(row, labeler='') for row in rows]
  assert agreement([*rows, *nameless]) == (2, 2)
  assert "without a labeler's name" not in check.describe('a', rows)
  assert (
    "without a labeler's name, so left out of the agreement: 3 records"
    in check.describe('a', [*rows, *nameless])
  )
  assert check.main([str(path), '--limit', '2']) == 0
  out = capsys.readouterr().out
  assert 'labelers agree on 2 of 2 pairs' in out
  assert 'K=2 1, K=3 2' in out
  assert 'empty completions: 1' in out
  unseen = dataclasses.replace(rows[2], completions=('\u2800', 'b'))
  assert 'empty completions: 1' in check.describe('a', [unseen])
  assert 'longer than 2 words: 2 records' in out
  records.write_jsonl(path, [dataclasses.replace(rows[2], ranks=(1, 1))])
  assert check.main([str(path)]) == 1
  assert 'ties teach a reward model nothing' in capsys.readouterr().err
  tokenizer.train_bpe(['a'], 258).save(tmp_path / 'tokenizer')
  folder = str(tmp_path / 'tokenizer')
  records.write_jsonl(path, rows)
  assert check.main([str(path), '--tokenizer', folder, '--limit', '3']) == 0
  out = capsys.readouterr().out
  # One token a byte: x and c, space, c are 4.
  assert 'longer than 3 tokens: 2 records' in out


# --- Text and turns -----------------------------------------------------------

ONE = [{'role': 'user', 'content': 'Schreib über das Café.'}]
SPOKEN = records.text_of_turns(records.Turn(**turn) for turn in TURNS)
OTHERS = {
  'text': {'id': 'p'},
  'prompt': {'response': 'Owl.'},
  'prompt of a comparison': {'completions': ['a', 'b'], 'ranks': [1, 2]},
}


@pytest.mark.parametrize('others', OTHERS)
@pytest.mark.parametrize(
  ('text', 'turns', 'agree'),
  [
    # As our importers write them, and as people do.
    (SPOKEN, TURNS, True),
    ('Schreib über das Café.', ONE, True),
    (unicodedata.normalize('NFD', ' Schreib  über das Café.\n'), ONE, True),
    (SPOKEN.replace('\n\n', '\n'), TURNS, True),
    ('Schreib über das Haus.', ONE, False),
    ('schreib über das café.', ONE, False),
    ('More!', TURNS, False),  # The last turn is not all of it.
    (SPOKEN.replace('Be brief.', ''), TURNS, False),
    (SPOKEN + ' Mail jo@mail.example.org.', TURNS, False),
  ],
)
def test_text_and_turns_say_the_same(
  others, text, turns, agree, tmp_path, capsys
):
  name = others.split()[0]
  path = tmp_path / 'a.jsonl'
  path.write_text(json.dumps({**OTHERS[others], name: text, 'turns': turns}))
  assert check.main([str(path)]) == (0 if agree else 1)
  error = capsys.readouterr().err
  if not agree:
    assert f"a.jsonl:1: '{name}' and 'turns' say different things" in error
    assert error.count('\n') == 1


def test_dialogues_and_their_turns():
  turns = tuple(records.Turn(**turn) for turn in TURNS)
  row = records.Prompt('p', SPOKEN)
  assert records.conversation(row) == turns
  assert records.conversation(records.Prompt('p', 'x', turns=turns)) == turns
  for text in ('Name a bird.', 'say\n\nHuman: hi', SPOKEN + ' Wren.'):
    alone = (records.Turn('user', text),)
    assert records.conversation(records.Prompt('p', text)) == alone
  text = '\n\nHuman: Q\n\nAssistant: he said\n\nAssistant: hi\n\nHuman: R'
  assert [t.content for t in records.dialogue_turns(text)] == [
    'Q',
    'he said\n\nAssistant: hi',
    'R',
  ]
  assert records.dialogue_turns('Q' + text) == ()


@pytest.mark.parametrize(
  'change',
  [
    lambda text: text.lstrip(),
    lambda text: '\n' + text.lstrip(),
    lambda text: text.replace('\n', '\r\n'),
    lambda text: text.lstrip().replace('\n', '\r\n'),
  ],
)
def test_dialogues_with_other_line_breaks(change):
  turns = tuple(
    records.Turn(*turn)
    for turn in (('user', 'Q'), ('assistant', 'A'), ('user', 'R'))
  )
  row = records.Prompt('p', change(records.text_of_turns(turns)))
  assert records.conversation(row) == turns
  # So that they are in one split with their beginning.
  first = records.Prompt('q', change(records.text_of_turns(turns[:1])))
  assert records.opening(row) == records.opening(first) == 'q'


def test_later_system_turns_begin_a_paragraph():
  turns = (('user', 'Q'), ('assistant', 'Yes.'), ('system', 'Be brief.'))
  text = records.text_of_turns(records.Turn(*turn) for turn in turns)
  assert text.startswith('\n\nHuman: Q')
  assert 'Assistant: Yes.\n\nBe brief.\n\nAssistant:' in text


def test_openings_are_the_first_question_however_it_is_spelt():
  def opening(text='', *turns):
    turns = tuple(records.Turn(*turn) for turn in turns)
    return records.opening(records.Prompt('p', text, turns=turns))

  hello = ('user', 'Über  das\nCafé?')
  assert opening('über das café?') == opening('', hello) == 'über das café?'
  assert (
    opening(unicodedata.normalize('NFD', 'ÜBER DAS CAFÉ?')) == 'über das café?'
  )
  assert opening('', ('system', 'Be brief.'), hello) == 'über das café?'
  later = (hello, ('assistant', 'Ja.'), ('user', 'Mehr!'))
  assert opening('', *later) == 'über das café?'
  whole = records.text_of_turns(records.Turn(*turn) for turn in later)
  assert opening(whole) == opening(f'Be brief.{whole}') == 'über das café?'
  assert (
    opening('', ('user', ' '), ('assistant', ''), hello) == 'über das café?'
  )
  assert opening('über\u200b das\ufeff café?') == 'über das café?'
  assert records.opening(records.Document('A  page.')) == 'a page.'


# --- Marks, encodings, null ---------------------------------------------------


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz'])
def test_a_byte_order_mark_is_read(name, tmp_path, capsys):
  line = json.dumps({'id': '1', 'text': 'Ein Café.'}, ensure_ascii=False)
  other = line.replace('"1"', '"2"')
  # Also where two files that had one each were joined.
  content = b'\r\n'.join(
    codecs.BOM_UTF8 + text.encode() for text in (line, other)
  )
  path = tmp_path / name
  path.write_bytes(gzip.compress(content) if name.endswith('gz') else content)
  assert check.main([str(path)]) == 0
  assert '2 Prompt records' in capsys.readouterr().out
  assert records.read_jsonl(path, records.Prompt)[1].text == 'Ein Café.'


@pytest.mark.parametrize(
  ('name', 'encode', 'expected'),
  [
    ('a.jsonl', lambda text: text.encode('utf-16'), 'is UTF-16; convert'),
    ('a.jsonl', lambda text: text.encode('latin-1'), '1: byte 24 is not UTF-8'),
    ('a.jsonl', lambda text: gzip.compress(text.encode()), 'end in .gz'),
    ('a.jsonl', lambda text: f'[\n{text}\n]'.encode(), 'several lines'),
    ('a.jsonl', lambda text: b'[' * 100_000, 'not JSON'),
  ],
)
def test_other_encodings_are_one_line(name, encode, expected, tmp_path, capsys):
  path = tmp_path / name
  path.write_bytes(encode('{"id": "1", "text": "Caf\xe9"}'))
  assert check.main([str(path)]) == 1
  error = capsys.readouterr().err
  assert error.startswith(f'{path}:') and expected in error
  assert error.count('\n') == 1


def test_null_is_what_is_not_given(tmp_path):
  path = tmp_path / 'a.jsonl'
  values = {'prompt': 'x', 'response': 'y', 'user': None, 'metadata': None}
  path.write_text(json.dumps({**values, 'turns': None, 'labeler': 'w'}))
  (row,) = records.read_jsonl(path, records.Demonstration)
  assert row == records.Demonstration('x', 'y', labeler='w')
  values = {'completions': ['a', 'b'], 'scores': [1, 2], 'ranks': None}
  path.write_text(json.dumps({**values, 'prompt': None, 'turns': TURNS}))
  (row,) = records.read_jsonl(path, records.Comparison)
  assert (row.ranks, row.prompt) == ((2, 1), SPOKEN)
  for name in ('prompt', 'response'):
    line = json.dumps({'prompt': 'x', 'response': 'y', name: None}).encode()
    message = _error(path, line, records.Demonstration)
    assert f"a.jsonl:1: '{name}' must be a string, found null" in message


@pytest.mark.parametrize('value', ['NaN', '[1, {"a": "\\ud800"}]', '-Infinity'])
def test_metadata_that_is_no_json_is_refused_where_it_is_read(value, tmp_path):
  line = f'{{"id": "1", "text": "x", "metadata": {{"a": {value}}}}}'.encode()
  message = _error(tmp_path / 'a.jsonl', line, records.Prompt)
  assert "a.jsonl:1: 'metadata' is not JSON" in message


# --- Writing ------------------------------------------------------------------


@pytest.fixture
def small_disk():
  """Files of at most 1,000 bytes, as on a disk that is almost full."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_old_file_and_names_it(tmp_path, small_disk):
  path = tmp_path / 'big.json'
  path.write_bytes(b'old')
  with pytest.raises(OSError, match='File too large') as error:
    files.write_bytes(path, bytes(2000))
  assert error.value.filename == str(path)
  assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
    'big.json': b'old'
  }
  path = tmp_path / 'log.jsonl'
  log = files.Appended(path)
  with pytest.raises(OSError, match='File too large') as error:
    log.write('x' * 2000)
  assert error.value.filename == str(path)
  with pytest.raises(OSError, match='File too large') as error:
    log.close()
  assert error.value.filename == str(path)


def test_what_cannot_be_replaced_is_named(tmp_path):
  (tmp_path / 'a').mkdir()
  with pytest.raises(OSError, match=f'{tmp_path}/a is a directory'):
    files.write_bytes(tmp_path / 'a', b'')
  assert [path.name for path in tmp_path.iterdir()] == ['a']


def test_a_locked_folder_is_in_use_until_its_process_ends(tmp_path):
  folder = tmp_path / 'deep' / 'a'
  folder.mkdir(parents=True)
  (folder / 'left').write_text('by a killed process')
  with files.locked(folder):
    assert os.listdir(folder) == []
    with (
      pytest.raises(files.InUseError, match=f'{folder}: another process'),
      files.locked(folder),
    ):
      pass
    folder.rename(tmp_path / 'b')  # The lock follows it.
    with files.locked(folder):
      pass
    with pytest.raises(files.InUseError), files.locked(tmp_path / 'b'):
      pass
  assert (tmp_path / 'b').exists() and not folder.exists()
  with files.locked(tmp_path / 'b'):
    pass
