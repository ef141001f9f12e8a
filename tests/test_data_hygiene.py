import json
import sys
import time

import numpy as np
import pytest

from instruct_jax.data import hygiene, records, tokenizer


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


def test_long_prompts_are_dropped_not_cut():
  words = tokenizer.train_word_level(['a'])
  kept, dropped = hygiene.drop_long(_prompts('a a', 'a a a'), words, 2)
  assert _texts(kept) == ['a a'] and dropped == 1


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
  splits = hygiene.split_by_user(prompts, shares, seed=3)
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
  backwards = hygiene.split_by_user(prompts[::-1], shares, seed=3)
  assert {p.id for p in backwards['test']} == {p.id for p in splits['test']}
  other = hygiene.split_by_user(prompts, shares, seed=4)
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
    'split', lambda rows: hygiene.split_by_user(rows, shares, 0), kept
  )
  _, personal = seconds(
    'personal data', hygiene.drop_personal_data, splits['train']
  )
  assert long + cap + split + personal < 600
