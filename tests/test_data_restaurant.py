import collections
import itertools
import json
import unicodedata

import pytest

from instruct_jax.data import convert, folders, records, restaurant, tokenizer

MR = 'name[Blue Spice], eatType[coffee shop], area[city centre]'


def test_parse_meaning_by_hand():
  assert restaurant.parse_meaning(MR) == [
    ('name', 'Blue Spice'),
    ('eatType', 'coffee shop'),
    ('area', 'city centre'),
  ]
  assert restaurant.parse_meaning('customer rating[5 out of 5]') == [
    ('customer rating', '5 out of 5')
  ]
  assert restaurant.prompt_text(MR) == (
    'name: Blue Spice, eatType: coffee shop, area: city centre\n'
  )
  for bad in ('', 'name', 'name[]', 'name[a] area[b]', 'name[a], ', 'name[a]]'):
    with pytest.raises(ValueError, match='not a meaning representation'):
      restaurant.parse_meaning(bad)


def test_ranks_of_scores():
  assert records.ranks_of_scores([80.0, 100.0, 100.0, 60.0]) == (2, 1, 1, 3)
  assert records.ranks_of_scores([5.0, 5.0]) == (1, 1)


def test_demonstrations_by_hand(tmp_path):
  path = tmp_path / 'devset.csv'
  path.write_text(
    f'mr,ref\n"{MR}",Blue  Spice is a cafe.\n"{MR}",Blue Spice is a cafe. \n'
    f'"{MR}","In the centre,\nit is."\n"{MR}",Last.\n'
  )
  found, repeated = restaurant.read_demonstrations(path)
  assert repeated == 1
  # The second is the first again; the third spans lines 4 and 5.
  assert [(d.response, d.id) for d in found] == [
    ('Blue Spice is a cafe.', 'e2e_nlg:2'),
    ('In the centre, it is.', 'e2e_nlg:4'),
    ('Last.', 'e2e_nlg:6'),
  ]
  assert found[0].metadata['slots'][0] == ['name', 'Blue Spice']


HEADER = (
  'worker,_tainted,quality1,quality2,quality3,quality4,quality5,mr,'
  'ref1,ref2,ref3,ref4,ref5\n'
)


def _row(
  worker='w1', tainted='False', scores='90,100,100,70,60', texts='abcde'
):
  return f'{worker},{tainted},{scores},"{MR}",{",".join(texts)}\n'


def test_rankings_by_hand(tmp_path):
  path = tmp_path / 'quality.csv'
  path.write_text(
    HEADER
    + _row()
    + _row(worker='w2', texts=['a', 'b', 'c ', 'a', 'C'])
    + _row(tainted='True')
    + _row(texts='aaaaa')
    + _row(worker='w3', scores='1,1,1,1,1')
  )
  found, counts = restaurant.read_rankings(path, 'quality')
  assert [c.labeler for c in found] == [
    'quality:w1',
    'quality:w2',
    'quality:w3',
  ]
  assert found[0].completions == tuple('abcde')
  assert found[0].ranks == (2, 1, 1, 3, 4)
  # `a` twice, scores 90 and 70: one completion with 80. `C` is not `c`.
  assert found[1].completions == ('a', 'b', 'c', 'C')
  assert found[1].ranks == (2, 1, 1, 3)
  assert found[2].ranks == (1, 1, 1, 1, 1)
  assert counts == restaurant.RankingCounts(
    rows=5, tainted=1, too_few=1, merged=1, all_tied=1
  )
  assert restaurant.read_rankings(path) == (found, counts)


@pytest.mark.parametrize(
  ('row', 'expected'),
  [
    (_row(scores='90,x,1,1,1'), "quality.csv:3: 'quality2' is 'x', not a num"),
    (_row(scores='90,,1,1,1'), "quality.csv:3: 'quality2' is ''"),
    (_row(scores='90,nan,1,1,1'), "quality.csv:3: 'quality2' is 'nan'"),
    (_row(texts=['a', '', 'c', 'd', 'e']), "quality.csv:3: 'ref2' is empty"),
    (_row(tainted='maybe'), "quality.csv:3: '_tainted' is 'maybe'"),
    (_row(worker=''), "quality.csv:3: 'worker' is empty"),
    (_row().replace('name[', 'name('), "quality.csv:3: 'mr': not a meaning"),
    ('w1,False,1\n', 'quality.csv:3: 3 fields for 13 columns'),
    ('w1,False,"1\n', 'quality.csv:3: not CSV'),
  ],
)
def test_bad_ranking_rows_are_named(row, expected, tmp_path):
  path = tmp_path / 'quality.csv'
  path.write_text(HEADER + _row() + row)
  with pytest.raises(records.RecordError) as info:
    restaurant.read_rankings(path)
  assert expected in str(info.value)


def test_bad_ranking_files(tmp_path):
  path = tmp_path / 'quality.csv'
  path.write_text(HEADER.replace('ref4', 'text4'))
  with pytest.raises(records.RecordError, match='csv:1: columns ref4 are miss'):
    restaurant.read_rankings(path)
  path.write_text(HEADER)
  with pytest.raises(records.RecordError, match='a header and no rows'):
    restaurant.read_rankings(path)
  path.write_bytes(HEADER.encode() + b'\xff')
  with pytest.raises(records.RecordError, match='csv:2: byte'):
    restaurant.read_rankings(path)
  with pytest.raises(records.RecordError, match=r'devset.csv: no such file'):
    _write(tmp_path, tmp_path / 'out')


def test_workers_are_split_by_load():
  comparisons = [
    records.Comparison('p', ('a', 'b'), (1, 2), labeler=f'w{i}')
    for i in range(20)
    for _ in range(i + 1)
  ]
  first, second = restaurant.split_workers(comparisons, seed=1)
  assert not first & second and len(first | second) == 20
  loads = [
    sum(c.labeler in half for c in comparisons) for half in (first, second)
  ]
  # 210 comparisons; the halves differ by less than the busiest worker's 20.
  assert sum(loads) == 210 and abs(loads[0] - loads[1]) < 20
  assert restaurant.split_workers(comparisons[::-1], seed=1) == (first, second)
  assert restaurant.split_workers(comparisons, seed=2) != (first, second)


def _write(root, directory, **changes):
  settings = dict(
    seed=0,
    vocab_size=400,
    criteria=('quality',),
    words_per_document=50,
    valid_documents=0.2,
  )
  return restaurant.write(root, directory, **(settings | changes))


@pytest.fixture
def small_root(tmp_path):
  """20 representations of each kind, 4 workers, two books."""
  root = tmp_path / 'root'
  for name in ('e2e_nlg', 'e2e_rankings', 'books'):
    (root / name).mkdir(parents=True)
  lines = ['mr,ref\n']
  for i, k in itertools.product(range(20), range(3)):
    lines.append(f'"name[Cafe {i}], area[riverside]",Go to Cafe {i} {k}.\n')
  (root / 'e2e_nlg' / 'devset.csv').write_text(''.join(lines))
  lines = [HEADER]
  for i, worker in itertools.product(range(20), range(4)):
    row = _row(worker=f'w{worker}').replace('Blue Spice', f'Pub {i}')
    lines.append(row)
  (root / 'e2e_rankings' / 'quality.csv').write_text(''.join(lines))
  for book in ('x', 'y'):
    text = '\n\n'.join(f'{book} says {i} ' * 20 for i in range(30))
    (root / 'books' / f'{book}.txt').write_text(text)
  return root


def _read_all(directory):
  types = {
    'documents': records.Document,
    'demonstrations': records.Demonstration,
    'comparisons': records.Comparison,
    'judge_comparisons': records.Comparison,
    'ppo_prompts': records.Prompt,
    'prompts': records.Prompt,
  }
  return {
    path.stem: records.read_jsonl(path, types[path.stem.rpartition('_')[0]])
    for path in sorted(directory.glob('*.jsonl'))
  }


def _check_splits(files):
  prompts = collections.defaultdict(set)
  for name, rows in files.items():
    kind, _, split = name.rpartition('_')
    if kind != 'documents':
      prompts[split] |= {
        r.text if isinstance(r, records.Prompt) else r.prompt for r in rows
      }
  for one, two in itertools.combinations(('train', 'valid', 'test'), 2):
    assert prompts[one] and not prompts[one] & prompts[two]
  workers = [
    {c.labeler for s in ('train', 'valid', 'test') for c in files[f'{n}_{s}']}
    for n in ('comparisons', 'judge_comparisons')
  ]
  assert workers[0] and workers[1] and not workers[0] & workers[1]
  for split in ('valid', 'test'):
    assert {p.text for p in files[f'prompts_{split}']} == prompts[split]


def test_write(small_root, tmp_path):
  report = _write(small_root, tmp_path / 'one')
  files = _read_all(tmp_path / 'one')
  assert len(files) == 14
  _check_splits(files)
  assert report['records'] == {name: len(rows) for name, rows in files.items()}
  assert json.loads((tmp_path / 'one/hygiene.json').read_text()) == report
  # 20 + 20 representations, each kind split 16, 2, 2.
  assert report['meaning_representations'] == {
    'train': 32,
    'valid': 4,
    'test': 4,
  }
  assert report['records']['demonstrations_train'] == 16 * 3
  # 4 workers with as much work each: 2 and 2.
  assert report['workers'] == {'reward_model': 2, 'judge': 2}
  assert report['records']['comparisons_test'] == 2 * 2
  references = [len(p.metadata['references']) for p in files['prompts_test']]
  assert sorted(references) == [0, 0, 3, 3]

  bpe = tokenizer.Tokenizer.load(tmp_path / 'one/tokenizer')
  assert bpe.vocab_size == report['vocab_size'] <= 400
  newline = bpe.encode('\n')
  assert len(newline) == 1
  for prompt in files['ppo_prompts_train']:
    ids = bpe.encode(prompt.text)
    assert ids[-1:] == newline and bpe.decode(ids) == prompt.text

  assert _write(small_root, tmp_path / 'two') == report
  assert _read_all(tmp_path / 'two') == files
  _write(small_root, tmp_path / 'three', seed=1)
  assert _read_all(tmp_path / 'three')['prompts_test'] != files['prompts_test']
  with pytest.raises(ValueError, match='criteria are'):
    _write(small_root, tmp_path / 'four', criteria=())


def test_real_files(data_root):
  demonstrations, _ = restaurant.read_demonstrations(
    data_root / 'e2e_nlg' / 'devset.csv.gz'
  )
  # 4,672 rows, 547 representations; 151 rows repeat another exactly or but for
  # white space.
  assert len({d.prompt for d in demonstrations}) == 547
  assert 4500 <= len(demonstrations) <= 4521
  rated = set()
  for criterion, rows, workers in (
    ('quality', 2094, 106),
    ('naturalness', 2982, 107),
  ):
    path = data_root / 'e2e_rankings' / f'{criterion}.csv.gz'
    found, counts = restaurant.read_rankings(path, criterion)
    assert counts.rows == rows and counts.tainted == 0
    assert len(found) == rows - counts.too_few
    assert len({c.labeler for c in found}) == workers
    assert {len(c.ranks) for c in found} <= {2, 3, 4, 5}
    assert all(min(c.ranks) == 1 for c in found)
    rated |= {c.prompt for c in found}
  assert len(rated) == 444
  assert not rated & {d.prompt for d in demonstrations}


def test_real_pipeline_without_the_long_books(data_root, tmp_path):
  root = tmp_path / 'root'
  root.mkdir()
  for name in ('e2e_nlg', 'e2e_rankings', 'gpt2_bpe'):
    (root / name).symlink_to(data_root / name)
  (root / 'books').mkdir()
  book = '11_alices_adventures_in_wonderland.txt.gz'
  (root / 'books' / book).symlink_to(data_root / 'books' / book)
  report = _write(
    root, tmp_path / 'out', vocab_size=None, criteria=('quality', 'naturalness')
  )
  files = _read_all(tmp_path / 'out')
  _check_splits(files)
  assert report['vocab_size'] == 50258
  assert sum(report['meaning_representations'].values()) == 547 + 444
  assert report['personal_data'] == 0


def test_the_same_facts_are_in_one_split(tmp_path):
  """In another order, case and spelling, and in the other source."""
  root = tmp_path / 'root'
  for name in ('e2e_nlg', 'e2e_rankings', 'books'):
    (root / name).mkdir(parents=True)
  lines, ratings = ['mr,ref\n'], [HEADER]
  for i in range(40):
    name = f'name[Café {i}]'
    for k, mr in enumerate(
      (
        f'{name}, area[riverside]',
        f'area[Riverside], {unicodedata.normalize("NFD", name)}',
      )
    ):
      lines.append(f'"{mr}",Go to café {i} {k}.\n')
    for worker in range(4):
      row = _row(worker=f'w{worker}').replace(
        MR, f'area[riverside], {name if i < 20 else name.upper()}'
      )
      ratings.append(row.replace('NAME', 'name'))
  (root / 'e2e_nlg' / 'devset.csv').write_text(''.join(lines))
  (root / 'e2e_rankings' / 'quality.csv').write_text(''.join(ratings))
  text = '\n\n'.join(f'page {i} ' * 20 for i in range(30))
  (root / 'books' / 'x.txt').write_text(text)
  report = _write(root, tmp_path / 'out')
  splits = collections.defaultdict(set)
  for name, rows in _read_all(tmp_path / 'out').items():
    kind, _, split = name.rpartition('_')
    if kind != 'documents':
      for row in rows:
        splits[restaurant.facts(row.metadata['mr'])].add(split)
  assert len(splits) == 40
  assert all(len(found) == 1 for found in splits.values())
  # Each is one prompt, and none of its rows is lost.
  assert report['meaning_representations'] == {
    'train': 32,
    'valid': 4,
    'test': 4,
  }
  assert report['duplicates'] == 80
  sizes = report['records']
  rows = {k: sum(n for s, n in sizes.items() if s.startswith(k)) for k in 'djc'}
  assert rows['c'] + rows['j'] == 160 and sizes['demonstrations_train'] == 64


def test_repeated_sentences_are_counted(tmp_path, capsys):
  path = tmp_path / 'devset.csv'
  texts = [unicodedata.normalize(f, 'Go to the café.') for f in ('NFC', 'NFD')]
  path.write_text('mr,ref\n' + ''.join(f'"{MR}",{t}\n' for t in texts * 2))
  out = ['--valid=0.0001', f'--output={tmp_path / "out"}']
  assert convert.main(['e2e_demonstrations', str(path), *out]) == 0
  said = capsys.readouterr().out
  assert 'demonstrations_train: 1\n' in said
  assert 'skipped: the same sentence for the same facts again: 3\n' in said
  path = tmp_path / 'quality.csv'
  path.write_text(HEADER + _row(texts=[*texts, 'c', 'd', 'e']))
  out[1] = f'--output={tmp_path / "ranked"}'
  assert convert.main(['e2e_quality', str(path), *out]) == 0
  said = capsys.readouterr().out
  assert 'rows with repeated texts, merged: 1\n' in said
  (row,) = records.read_jsonl(
    tmp_path / 'ranked' / 'comparisons_train.jsonl', records.Comparison
  )
  assert len(row.completions) == 4
  # JSON is no CSV.
  path.write_text('{"mr": "a", "ref": "b"}')
  assert convert.main(['e2e_demonstrations', str(path), *out]) == 1
  error = capsys.readouterr().err
  assert error == f'{path}:1: not CSV; it looks like JSON\n'


def test_an_unfinished_attempt_leaves_nothing(small_root, tmp_path):
  """What an earlier attempt wrote, with other names, goes with the next."""
  out = tmp_path / 'out'
  with folders.writing(out, ('*',), command='restaurant') as unfinished:
    for name in ('prompts_test', 'documents_train', 'other'):
      (unfinished / f'{name}.jsonl').write_text('old')
  (out / '.unfinished').mkdir()
  (out / '.unfinished' / 'prompts_valid.jsonl').write_text('half')
  _write(small_root, out)
  found = {path.name for path in out.iterdir()}
  assert '.unfinished' not in found
  assert not any(p.read_text() == 'old' for p in out.glob('prompts_*.jsonl'))
