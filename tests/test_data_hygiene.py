import dataclasses
import json
import sys
import time
import unicodedata

import numpy as np
import pytest
import tokenizers
import transformers

from instruct_jax.data import hygiene, records, tokenizer
from instruct_jax.miniature import tasks, world
from tests import published


def _prompts(*texts, user='u'):
  return [
    records.Prompt(id=f'{user}-{i}', text=text, user=user)
    for i, text in enumerate(texts)
  ]


def _texts(prompts):
  return [prompt.text for prompt in prompts]


def test_duplicates_share_the_first_words_or_are_the_same():
  prompts = _prompts(
    'a b c d',
    'A  b c e',  # The first 3 words are those of the first prompt.
    'a b',  # Shorter than 3 words, and no other is the same as a whole.
    'a b x',
    'A b',
    'c a b c d',
  )
  kept, dropped = hygiene.drop_duplicates(prompts, prefix_words=3)
  assert _texts(kept) == ['a b c d', 'a b', 'a b x', 'c a b c d']
  assert dropped == 2
  assert hygiene.drop_duplicates(prompts, prefix_words=4)[1] == 1


def test_cap_per_user():
  prompts = _prompts(*'abcdefgh', user='u') + _prompts('x', 'y', user='v')
  prompts += _prompts(*'pqr', user='')  # Unknown: never capped.
  kept, dropped = hygiene.cap_per_user(prompts, 2, seed=0)
  assert dropped == 6
  assert [p.user for p in kept] == ['u', 'u', 'v', 'v', '', '', '']
  assert kept == hygiene.cap_per_user(prompts, 2, seed=0)[0]
  drawn = {
    tuple(_texts(hygiene.cap_per_user(prompts, 2, seed=s)[0][:2]))
    for s in range(20)
  }
  assert len(drawn) > 3
  # Another user's prompts do not change which of mine are kept.
  assert hygiene.cap_per_user(prompts[:8], 2, seed=0)[0] == kept[:2]


def test_split_by_user():
  prompts = [
    records.Prompt(id=str(i), text=str(i), user=f'u{i % 50}')
    for i in range(1000)
  ]
  shares = {'train': 0.8, 'valid': 0.1, 'test': 0.1}
  splits, _ = hygiene.split_by_user(prompts, shares, seed=3)
  # 50 users of 20 prompts: 40, 5 and 5 users.
  assert {k: len(v) for k, v in splits.items()} == {
    'train': 800,
    'valid': 100,
    'test': 100,
  }
  users = [{p.user for p in split} for split in splits.values()]
  assert sum(map(len, users)) == len(set.union(*users)) == 50
  for split in splits.values():
    assert split == sorted(split, key=lambda p: int(p.id))
  backwards, _ = hygiene.split_by_user(prompts[::-1], shares, seed=3)
  assert {p.id for p in backwards['test']} == {p.id for p in splits['test']}
  other, _ = hygiene.split_by_user(prompts, shares, seed=4)
  assert other['test'] != splits['test']
  with pytest.raises(ValueError, match=r'sum to 0.9'):
    hygiene.split_by_user(prompts, {'train': 0.8, 'valid': 0.1}, seed=0)


@pytest.mark.parametrize(
  ('text', 'kinds'),
  [
    ('write to jo.b@mail.example.org now', ['e-mail']),
    ('call +44 20 7946 0958 today', ['phone']),
    ('call (555) 123-4567', ['phone']),
    ('ring +442079460958', ['phone']),
    ('card 4111 1111 1111 1111', ['card number']),
    ('card 4111 1111 1111 1112', []),  # Fails the Luhn check.
    ('ssn 078-05-1120', ['phone', 'id number']),
    ('server 192.168.0.1 is down', ['IP address']),
    ('fe80:0:0:0:1:2:3:4', ['IP address']),
    ('I live at 221b Baker Street.', ['street address']),
    ('1600 Old Mill Rd', ['street address']),
    ('on 2020-01-02 at 10:20:30', []),
    ('list 1, 2, 3, 4, 5, 6, 7, 8, 9, 10', []),
    ('version 1.2.3 costs 10 000 000', []),
    ('name 3 ways to drive @ night', []),
    ('name: The Eagle, priceRange: £20-25, rating: 5 out of 5', []),
  ],
)
def test_personal_data(text, kinds):
  assert hygiene.personal_data_kinds(text) == kinds
  kept, dropped = hygiene.drop_personal_data(_prompts('fine', text))
  assert dropped == bool(kinds) and len(kept) == 2 - dropped


@pytest.fixture(scope='module')
def presidio():
  reason = 'needs requirements-personal-data.txt'
  pytest.importorskip('presidio_analyzer', reason=reason)
  return hygiene.presidio_kinds()


@pytest.mark.parametrize(
  ('text', 'kinds'),
  [
    ('write to jo.b@mail.example.org now', ['e-mail']),
    # No number of any country, and one that is.
    ('about +44 20 7946 0958 today', ['phone']),
    ('my number is 2125550187', ['phone']),
    ('my order is 9125550000123', []),
    ('transfer to DE89370400440532013000', ['id number']),
    ('card 4111111111111111', ['card number']),
    ('server 192.168.0.1 is down', ['IP address']),
    ('I live at 221b Baker Street.', ['street address']),
    ('John Smith wrote a poem', []),  # Names need a model.
  ],
)
def test_personal_data_with_the_library(presidio, text, kinds):
  assert presidio(text) == kinds


def test_a_missing_library_or_model_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'presidio_analyzer', None)
  with pytest.raises(ValueError, match='install -r requirements-personal'):
    hygiene.presidio_kinds()


def test_the_command_writes_splits_and_counts(tmp_path, capsys):
  tokenizer.train_word_level(['a']).save(tmp_path / 'tokenizer')
  prompts = []
  for user in range(10):
    texts = [f'u{user} q{i}' for i in range(4)] + [f'u{user} b@c.org']
    prompts += _prompts(*texts, user=f'user{user}')
  records.write_jsonl(tmp_path / 'prompts.jsonl', prompts)
  command = [
    str(tmp_path / 'prompts.jsonl'),
    f'--output={tmp_path / "out"}',
    f'--tokenizer={tmp_path / "tokenizer"}',
    '--valid=0.2',
    '--test=0',
  ]
  assert hygiene.main([*command[:-1], '--test=-1']) == 1
  assert 'must be positive' in capsys.readouterr().err
  assert hygiene.main(command) == 0
  counts = json.loads((tmp_path / 'out' / 'hygiene.json').read_text())
  assert counts['kept'] == {'train': 32, 'valid': 10}
  assert counts['personal_data'] == 8
  train = records.read_jsonl(
    tmp_path / 'out' / 'prompts_train.jsonl', records.Prompt
  )
  assert len(train) == 32 and not any('@' in p.text for p in train)
  assert hygiene.main([*command[:-1], '--presidio=no_such_model']) == 1
  error = capsys.readouterr().err
  assert 'no_such_model' in error or 'pip install' in error


def test_clean_counts_every_drop():
  words = tokenizer.train_word_level(['a'])
  prompts = []
  for user in range(10):
    # Per user: 6 given; 1 duplicate of its first; 1 of 9 words; 4 left, of
    # which 3 are kept, one of them with an address half of the time or so.
    texts = [f'u{user} q{i}' for i in range(3)]
    texts += [f'U{user} q0', f'u{user}' + ' a' * 8, f'u{user} b@c.org']
    prompts += _prompts(*texts, user=f'user{user}')
  splits, report = hygiene.clean(
    prompts,
    tokenizer=words,
    max_tokens=8,
    prefix_words=5,
    cap=3,
    fractions={'train': 0.8, 'test': 0.2},
    seed=0,
  )
  assert (report.given, report.duplicates, report.over_long) == (60, 10, 10)
  assert report.over_cap == 10
  # 10 users x 3 prompts: 8 users train, 2 test; addresses go from train only.
  assert report.kept == {'train': 24 - report.personal_data, 'test': 6}
  assert report.users == {'train': 8, 'test': 2}
  assert 0 < report.personal_data < 24
  assert not any('@' in p.text for p in splits['train'])
  assert {k: len(v) for k, v in splits.items()} == report.kept
  assert json.loads(json.dumps(report.to_json())) == report.to_json()
  with pytest.raises(ValueError, match="such as 'user0-0'"):
    hygiene.clean(
      prompts + prompts[:1],
      tokenizer=words,
      max_tokens=8,
      prefix_words=5,
      cap=3,
      fractions={'train': 1.0},
      seed=0,
    )


@pytest.mark.slow
def test_a_million_prompts():
  """Minutes at most, and the time grows with the number (`-s` shows it)."""
  generator = np.random.default_rng(0)
  words = np.array([f'word{i}' for i in range(20_000)])
  prompts = []
  for number in range(1_000_000):
    # Of 1,000 openings 20 words long, some alone and some with an own first
    # word, so that about a tenth are duplicates.
    text = ' '.join(words[(number % 1000 + np.arange(14)) % 20_000])
    if generator.random() < 0.9:
      text = f'{number} {text}'
    user = f'u{generator.integers(100_000)}'
    prompts.append(records.Prompt(id=str(number), text=text, user=user))

  def seconds(what, function, rows):
    start = time.process_time()
    found = function(rows)
    taken = time.process_time() - start
    print(f'{what}, {len(rows):,} prompts: {taken:.2f} s of one core')
    return found, taken

  def duplicates(rows):
    return hygiene.drop_duplicates(rows, 20)

  _, short = seconds('duplicates', duplicates, prompts[:100_000])
  (kept, dropped), long = seconds('duplicates', duplicates, prompts)
  assert dropped > 90_000 and len(kept) + dropped == 1_000_000
  assert long < 20 * short < 600
  _, cap = seconds(
    'cap', lambda rows: hygiene.cap_per_user(rows, 200, seed=0), kept
  )
  shares = {'train': 0.8, 'valid': 0.1, 'test': 0.1}
  splits, split = seconds(
    'split', lambda rows: hygiene.split_by_user(rows, shares, 0)[0], kept
  )
  _, personal = seconds(
    'personal data', hygiene.drop_personal_data, splits['train']
  )
  assert long + cap + split + personal < 600


# --- Personal data in the spellings that people use ---------------------------

FOUND = {
  'phone': """
    call (555)123-4567
    call 555/123-4567
    OFFICE-1(555)123-4567 today
    ring 5551234567
    +1(555)123-4567
    my cell is 555.123.4567.
    (555)1234567
    fax(555) 123 - 4567
    001 555 123 4567
    1-800-555-0199
    555–123–4567 or 555-123-4567x89
    （５５５）１２３－４５６７
    555\u200b123\u00ad4567
    +49\u00a0171\u202f1234567
    call me at 555-1234
    it is 555-0119 .
    phone: 5551234
    +44 (0)20 7946 0958
    (020) 7946 0958
    0044 20 7946 0958
    07946095812
    07700 900123
    06 12 34 56 78
    06.12.34.56.78
    06-12-34-56-78
    +49 171 1234567
    0171/1234567
    030/1234567
    9876543210
    98765-43210
    138-1234-5678
    +86 138 1234 5678
    090-1234-5678
    (11) 91234-5678
    8 (912) 345-67-89
    +34 612 345 678
    call 612 345 678
    tel:+1-201-555-0123
    who does the number 555-555-0100 belong to?
    at 10:30 call 555-123-4567 on 2020-01-02
  """,
  'IP address': """
    my address is 2001:db8::8a2e:370:7334 here
    fe80::1ff:fe23:4567:890a
    fe80::1%eth0
    [2001:DB8::1]:8080
    address 2001:db8::1: hello
    host 2001:db8::1.
    ::ffff:192.168.0.1
    fd12:3456:789a:1::1
    2001:0db8:85a3:0000:0000:8a2e:0370:7334
    ip=10.0.0.12
    203.0.113.7:8080
  """,
  'e-mail': """
    jörg@müller.de
    JO+X@X.CO.UK
    jo [at] example [dot] org
    jo(at)example.com
    jo AT example DOT com
    jo @ example.com
    jo＠example．com
    jo\u200b@\u2060example.com
    jo&#64;example.org
    <jo@x.org>.
    jo@xn--mller-kva.de
  """,
  'card number': """
    4111-1111-1111-1111
    378282246310005
    3782 822463 10005
  """,
  'id number': """
    DE89 3704 0044 0532 0130 00 is my account
    gb29nwbk60161331926819
    078-05-1120
  """,
  'street address': """
    350 5th Avenue
    33 West 54th Street, New York
    12 N. Elm St.
  """,
}
NOT_FOUND = """
  host ::1 and ::
  127.0.0.1:8080, 0.0.0.0, mask 255.255.255.0
  std::vector and a::b and dead::beef and x[::2]
  Foo::bar(a::b::c)
  at 10:20:30
  from 10:20:30 to 11:22:33.456 on 12:34:56:78
  00:1A:2B:3C:4D:5E
  2020-01-02 10:20:30
  2020-01-02T10:20:30.123456Z
  01/02/2003 - 04/05/2006
  31.12.2019 23:59
  1914-1918 1939-1945
  2019-2020-2021
  1990 1991 1992
  version 1.2.3.4, v10.2.3.4
  Chrome 120.0.6099.109
  ISBN 978-3-16-148410-0
  ISBN 0-306-40615-7
  ISBN: 0306406157
  978-0-306-40615-7
  $1,234,567.89 or € 1 234 567 890
  costs 10 000 000, not 1 000 000 000
  1.000.000.000 of 7800000000 people
  1234567 + 7654321 = 8888888
  What is 9876543210 / 3?
  divide 5551234567 by 7
  add 9876543210 and 1
  3.14159265358979, 2147483647, 4294967296
  1612345678 seconds
  order number 5551234567
  #5551234567
  sort 34 12 56 78 90 21
  2 3 5 7 11 13 17 19 23 29
  512 128 1024 64
  16 32 64 128 256 512 1024
  10-20-30-40-50
  binary 0101 1010 1100
  arXiv:2203.02155, doi:10.1016/j.cell.2020.01.001
  40.712776, -74.005974
  550e8400-e29b-41d4-a716-446655440000
  https://example.com/questions/5767325555/how
  npm install react@18.2.0
  git clone git@github.com:someone/something.git
  x.T@w.T
  meet me at google.com, look at polka dot dresses
  Nature 555 (2018) 123-456, pp. 456-789
  (2003) 345-352
  the 2010 Supreme Court
  AB12 CDEF GHIJ KLMN
  1234567890123456
"""


def lines(text):
  return [line.strip() for line in text.strip().splitlines()]


@pytest.mark.parametrize(
  ('kind', 'text'), [(k, t) for k, texts in FOUND.items() for t in lines(texts)]
)
def test_personal_data_as_people_spell_it(kind, text):
  assert kind in hygiene.personal_data_kinds(text)
  assert kind in hygiene.personal_data_kinds(f'Dear Jo,\n\n{text}\n\nbye')


@pytest.mark.parametrize('text', lines(NOT_FOUND))
def test_numbers_and_names_of_code_are_no_personal_data(text):
  assert hygiene.personal_data_kinds(text) == []


def test_the_world_s_personal_data_is_found_exactly():
  the_world = world.make_world(0)
  for prompt in tasks.write_prompts(the_world, 4000, np.random.default_rng(1)):
    found = bool(hygiene.personal_data_kinds(prompt.text))
    assert found == (prompt.metadata['dirt'] == 'personal_data'), prompt.text


@pytest.mark.parametrize(
  'piece',
  ['1', '1 ', 'a@', 'a.', ' ', '(', 'Aa. ', ':', '+1', '12-', 'f:', '.'],
)
def test_long_rows_of_one_thing_take_no_time(piece):
  start = time.process_time()
  hygiene.personal_data_kinds(piece * (200_000 // len(piece)))
  assert time.process_time() - start < 2


def save_turns(path, *conversations):
  """Prompts `p0`, `p1`, ... of conversations, each (role, content)...; the
  text is left out, as in files of chats."""
  rows = [
    {
      'id': f'p{number}',
      'turns': [{'role': role, 'content': text} for role, text in turns],
    }
    for number, turns in enumerate(conversations)
  ]
  path.write_text('\n'.join(map(json.dumps, rows)))
  return str(path)


def run_hygiene(tmp_path, file, tokenizer_folder, *flags):
  """(exit code, counts, ids by split)."""
  out = tmp_path / 'out'
  command = [file, f'--output={out}', f'--tokenizer={tokenizer_folder}', *flags]
  code = hygiene.main(command)
  if code:
    return code, None, None
  counts = json.loads((out / 'hygiene.json').read_text())
  ids = {
    path.stem.removeprefix('prompts_'): [
      p.id for p in records.read_jsonl(path, records.Prompt)
    ]
    for path in out.glob('prompts_*.jsonl')
  }
  return code, counts, ids


@pytest.fixture
def byte_tokenizer(tmp_path):
  tokenizer.train_bpe(['a'], 258).save(tmp_path / 'bytes')
  return tmp_path / 'bytes'


def test_personal_data_is_found_in_every_turn(tmp_path, byte_tokenizer):
  mail = 'Write to jo@mail.example.org.'
  user, assistant, system = 'user', 'assistant', 'system'
  file = save_turns(
    tmp_path / 'p.jsonl',
    [(user, 'Name a bird.')],
    [(user, mail)],
    [(system, mail), (user, 'Name a tree.')],
    [(user, 'Name a fish.'), (assistant, mail), (user, 'More!')],
    [(user, mail + ' Now.'), (assistant, 'Yes.'), (user, 'More!')],
  )
  flags = ('--valid=0', '--test=0')
  _, counts, ids = run_hygiene(tmp_path, file, byte_tokenizer, *flags)
  assert ids == {'train': ['p0']} and counts['personal_data'] == 4
  # Turns that the text does not hold, which no file can have.
  turns = (records.Turn(user, mail),)
  prompt = records.Prompt('p', 'Name a bird.', turns=turns)
  assert hygiene.drop_personal_data([prompt]) == ([], 1)


# --- Copies, splits, refusals -------------------------------------------------


def test_copies_in_other_spellings_and_layouts():
  def turns(*contents, system=''):
    roles = ('user', 'assistant')
    found = [records.Turn('system', system)] if system else []
    found += [records.Turn(roles[i % 2], c) for i, c in enumerate(contents)]
    return records.Prompt('p', records.text_of_turns(found), turns=tuple(found))

  def dropped(*prompts, words=20):
    return hygiene.drop_duplicates(prompts, words)[1]

  text = records.Prompt('p', 'Schreib über das Café')
  for form in ('NFC', 'NFD'):
    spelt = unicodedata.normalize(form, 'SCHREIB  über das\nCAFÉ ')
    assert dropped(text, records.Prompt('q', spelt)) == 1
    assert dropped(text, turns(spelt)) == 1
  # One dialogue with turns, and as text; and what it begins with.
  several = turns('a b', 'c', 'd')
  assert dropped(several, records.Prompt('q', several.text)) == 1
  assert dropped(several, turns('a b'), turns('a b', 'c', 'e')) == 0
  long = ' '.join('abcdefghijklmnopqrstuv')
  assert dropped(turns(long), turns(long, 'c', 'd'), turns(long, 'x', 'y')) == 2
  # A system turn that many share makes no copies, and another makes none.
  system = ' '.join(['Be brief and kind.'] * 20)
  assert dropped(*(turns(f'{i}', system=system) for i in range(9))) == 0
  assert (
    dropped(turns('a', system='x'), turns('a', system='y'), turns('a')) == 0
  )
  assert dropped(turns('a', system='x y'), turns('A', system='X  Y')) == 1


def test_no_conversation_is_in_two_splits(tmp_path, byte_tokenizer):
  """Users 3 k and 3 k + 1 share an opening, 3 k + 1 and 3 k + 2 another."""
  rows = []
  for user in range(90):
    openings = {0: ['a'], 1: ['A ', 'b'], 2: ['b']}[user % 3]
    for name in openings:
      turns = [
        {'role': 'user', 'content': f'{name} {user // 3}'},
        {'role': 'assistant', 'content': f'Yes {user}.'},
        {'role': 'user', 'content': 'More!'},
      ]
      row = {'id': f'{user}{name}', 'turns': turns, 'user': f'u{user}'}
      if user % 9 == 0:
        del row['user']  # Unknown users have conversations, too.
      rows.append(row)
  path = tmp_path / 'p.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  _, counts, ids = run_hygiene(
    tmp_path, str(path), byte_tokenizer, '--valid=0.2', '--test=0.2'
  )
  groups = {}
  for split, found in ids.items():
    for name in found:
      groups.setdefault(int(name.strip('aAb ')) // 3, set()).add(split)
  assert len(groups) == 30
  assert all(len(splits) == 1 for splits in groups.values())
  assert {name: len(found) for name, found in ids.items()} == {
    'train': 72,
    'valid': 24,
    'test': 24,
  }
  assert counts['joined_users'] == 90
  assert counts['limits'] == {
    'max_tokens': 1024,
    'prefix_words': 20,
    'cap': 200,
  }


def test_users_without_a_common_opening_are_split_as_before():
  prompts = [
    records.Prompt(id=str(i), text=f'q {i}', user=f'u{i % 20}')
    for i in range(200)
  ]
  shares = {'train': 0.5, 'valid': 0.5}
  splits, _ = hygiene.split_by_user(prompts, shares, seed=0)
  changed = [
    # The same question as prompt 1, by another user of the same split.
    dataclasses.replace(prompt, text='Q  1') if prompt.id == other else prompt
    for prompt in prompts
    for other in [
      next(
        p.id
        for p in next(s for s in splits.values() if prompts[1] in s)
        if p.user != prompts[1].user
      )
    ]
  ]
  again, _ = hygiene.split_by_user(changed, shares, seed=0)
  together = [{p.user for p in split} for split in again.values()]
  assert not together[0] & together[1]


def test_what_a_template_refuses_is_dropped_and_counted(tmp_path, capsys):
  published.save_byte_tokenizer(
    tmp_path / 'chat', template=published.STRICT_TEMPLATE, prepared=True
  )
  user, system = ('user', 'Name a {}.'), ('system', 'Be brief.')
  file = save_turns(
    tmp_path / 'p.jsonl',
    *(
      [(user[0], user[1].format(i))] if i % 3 else [system, (user[0], f'{i}')]
      for i in range(30)
    ),
  )
  code, counts, ids = run_hygiene(
    tmp_path, file, tmp_path / 'chat', '--valid=0', '--test=0'
  )
  assert code == 0 and capsys.readouterr().err == ''
  assert counts['refused'] == {'no system turns here (first: p0)': 10}
  assert ids == {'train': [f'p{i}' for i in range(30) if i % 3]}
  # Nothing left is an error with the reasons, and no empty folder.
  file = save_turns(tmp_path / 'q.jsonl', [system, ('user', 'x')])
  out = f'--output={tmp_path / "none"}'
  command = [file, out, f'--tokenizer={tmp_path / "chat"}']
  assert hygiene.main(command) == 1
  error = capsys.readouterr().err
  assert error.startswith(f'{file}: no prompt is left')
  assert 'no system turns here (first: p0)' in error and error.count('\n') == 1
  assert not (tmp_path / 'none').exists()


def test_what_a_vocabulary_cannot_hold_is_refused_too(tmp_path, capsys):
  """Special tokens in texts, without an <unk> to put there."""
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({'<pad>': 0, '<eos>': 1, 'a': 2, 'b': 3})
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token='<pad>', eos_token='<eos>'
  ).save_pretrained(tmp_path / 'words')
  texts = ['a', 'a <eos> b', 'b', *(f'<eos>{" a" * i}' for i in range(30))]
  rows = [records.Prompt(f'p{i}', text) for i, text in enumerate(texts)]
  records.write_jsonl(tmp_path / 'p.jsonl', rows)
  code, counts, ids = run_hygiene(
    tmp_path,
    str(tmp_path / 'p.jsonl'),
    tmp_path / 'words',
    '--valid=0',
    '--test=0',
  )
  assert code == 0 and ids == {'train': ['p0', 'p2']}
  # What they spell differs, the reason does not.
  assert counts['refused'] == {
    'a text spells a special token and the tokenizer has no <unk> to put in '
    "its place: '...' (first: p1)": 31 - counts['duplicates']
  }


def test_ids_are_distinct_over_all_files(tmp_path, byte_tokenizer, capsys):
  files = [
    save_turns(tmp_path / f'{name}.jsonl', [('user', f'Name a {name}.')])
    for name in ('bird', 'tree')
  ]
  command = [*files, f'--output={tmp_path / "out"}']
  assert hygiene.main([*command, f'--tokenizer={byte_tokenizer}']) == 1
  error = capsys.readouterr().err
  assert error == (
    f"{files[1]}: the id 'p0' is also in {files[0]}; ids must be distinct\n"
  )
