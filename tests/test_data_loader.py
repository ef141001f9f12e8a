import collections
import dataclasses
import itertools
import time

import numpy as np
import pytest

from instruct_jax import types
from instruct_jax.data import importers, loader, records, sources, tokenizer

EOS, PAD = 1, 0


@pytest.fixture(scope='module')
def words() -> tokenizer.Tokenizer:
  return tokenizer.train_word_level(list('abcdefgh'))  # a is 3, b is 4, ...


def _segments(rows: types.TextBatch) -> list[list[int]]:
  found = []
  for tokens, segments in zip(rows.tokens, rows.segments, strict=True):
    for number in range(1, segments.max() + 1):
      found.append(tokens[segments == number].tolist())
  return found


def test_packing_by_hand():
  rows = loader.pack_documents([[3, 4], [5, 6, 7], [8]], 6, EOS, PAD)
  # 3 + 4 + 2 tokens with their EOS. The second does not fit behind the first;
  # the third fits in both rows and fills the second, which is fuller.
  np.testing.assert_array_equal(
    rows.tokens, [[3, 4, 1, 0, 0, 0], [5, 6, 7, 1, 8, 1]]
  )
  np.testing.assert_array_equal(
    rows.segments, [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 2, 2]]
  )
  np.testing.assert_array_equal(rows.mask, rows.segments > 0)
  # Nothing precedes the first token of a segment.
  np.testing.assert_array_equal(
    rows.loss_mask.astype(int), [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 1]]
  )
  assert rows.mask.mean() == 9 / 12
  assert rows.tokens.dtype == np.int32 and rows.mask.dtype == bool


@pytest.mark.parametrize('row_length', [512, 2048])
def test_rows_of_real_lengths_are_full(data_root, row_length):
  """97 % of all positions hold tokens, dialogues and pages alike."""
  gpt2 = tokenizer.Tokenizer.load(data_root / 'gpt2_bpe')
  dialogues = importers.read_hh(data_root / 'hh_helpful/train_gt.jsonl.gz')
  rows, dropped = loader.demonstration_rows(
    dialogues.demonstrations, gpt2, row_length, loss_on='response', pack=True
  )
  assert dropped.total < 40
  assert rows.mask.mean() >= 0.97
  pages = sources.read_documents(
    data_root / 'wikitext2', words_per_document=300
  )
  ids = gpt2.encode_documents([page.text for page in pages])
  rows = loader.pack_documents(
    ids, row_length, gpt2.eos_id, gpt2.pad_id, cut=True
  )
  assert rows.mask.mean() >= 0.97


def test_a_long_document_is_cut_into_segments():
  rows = loader.pack_documents([[3, 4, 5, 6, 7], [], [8, 9, 2]], 4, EOS, PAD)
  # 5 + EOS = 4 + 2 tokens; 3 + EOS = 4 fill a row; the empty one is left out.
  np.testing.assert_array_equal(
    rows.tokens, [[3, 4, 5, 6], [7, 1, 0, 0], [8, 9, 2, 1]]
  )
  with pytest.raises(ValueError, match='no documents'):
    loader.pack_documents([[]], 4, EOS, PAD)


def test_documents_cut_where_rows_end():
  documents = [[3, 4, 5, 6, 7], [], [8, 9, 2], [3, 4], [5]]
  rows = loader.pack_documents(documents, 4, EOS, PAD, cut=True)
  np.testing.assert_array_equal(
    rows.tokens,
    [[3, 4, 5, 6], [7, 1, 8, 9], [2, 1, 3, 4], [1, 5, 1, 0]],
  )
  np.testing.assert_array_equal(
    rows.segments,
    [[1, 1, 1, 1], [1, 1, 2, 2], [1, 1, 2, 2], [1, 2, 2, 0]],
  )
  # What begins a row has nothing before it in that row.
  np.testing.assert_array_equal(
    rows.loss_mask.astype(int),
    [[0, 1, 1, 1], [0, 1, 0, 1], [0, 1, 0, 1], [0, 0, 1, 0]],
  )


def test_packing_loses_and_doubles_no_token(rng):
  documents = [
    rng.integers(2, 99, rng.integers(1, 40)).tolist() for _ in range(500)
  ]
  rows = loader.pack_documents(documents, 16, EOS, PAD)
  expected = collections.Counter()
  for document in documents:
    whole = [*document, EOS]
    for start in range(0, len(whole), 16):
      expected[tuple(whole[start : start + 16])] += 1
  assert collections.Counter(map(tuple, _segments(rows))) == expected
  assert rows.mask.mean() > 0.95
  # A segment is one run of columns, and rows are filled from the left.
  assert (np.diff(rows.mask.astype(int), axis=1) <= 0).all()
  first = np.diff(rows.segments, axis=1, prepend=0) > 0
  np.testing.assert_array_equal(rows.loss_mask, rows.mask & ~first)


def _demonstrations():
  return [
    records.Demonstration('a b', 'c'),
    records.Demonstration('a', 'b c d e f'),  # 7 tokens with EOS.
    records.Demonstration('d', 'e'),
  ]


def test_demonstration_rows_by_hand(words):
  rows, dropped = loader.demonstration_rows(
    _demonstrations(), words, 6, loss_on='response', pack=False
  )
  assert dropped == loader.Dropped(1, 6)
  np.testing.assert_array_equal(
    rows.tokens, [[3, 4, 5, 1, 0, 0], [6, 7, 1, 0, 0, 0]]
  )
  # Response and its EOS; the prompt is read, not learned.
  np.testing.assert_array_equal(
    rows.loss_mask.astype(int), [[0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]]
  )
  assert rows.segments.max() == 1
  everything, _ = loader.demonstration_rows(
    _demonstrations(), words, 6, loss_on='all', pack=False
  )
  np.testing.assert_array_equal(
    everything.loss_mask.astype(int), [[0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]]
  )


def test_demonstrations_packed(words):
  rows, dropped = loader.demonstration_rows(
    _demonstrations(), words, 7, loss_on='response', pack=True
  )
  assert dropped.total == 0
  np.testing.assert_array_equal(
    rows.tokens, [[3, 4, 5, 1, 6, 7, 1], [3, 4, 5, 6, 7, 8, 1]]
  )
  np.testing.assert_array_equal(rows.segments[0], [1, 1, 1, 1, 2, 2, 2])
  np.testing.assert_array_equal(
    rows.loss_mask[0].astype(int), [0, 0, 1, 1, 0, 1, 1]
  )


def test_comparison_rows_by_hand(words):
  comparisons = [
    records.Comparison('a', ('b', '', 'c d'), (1, 3, 1)),
    records.Comparison('a', ('b', 'b c d e'), (1, 2)),
    records.Comparison('a', ('b', 'c'), (2, 1)),
  ]
  rows, dropped = loader.comparison_rows(comparisons, words, 3, 4)
  # a b c d e EOS is 6 tokens; the pair goes as a whole.
  assert dropped == loader.Dropped(1, 4)
  np.testing.assert_array_equal(
    rows.tokens,
    [
      [[3, 4, 1, 0], [3, 1, 0, 0], [3, 5, 6, 1]],
      [[3, 4, 1, 0], [3, 5, 1, 0], [0, 0, 0, 0]],
    ],
  )
  np.testing.assert_array_equal(rows.mask.sum(axis=-1), [[3, 2, 4], [3, 3, 0]])
  np.testing.assert_array_equal(rows.ranks, [[[1, 3, 1]], [[2, 1, 0]]])
  assert rows.prompt_mask.tolist() == [True, True]
  with pytest.raises(ValueError, match='comparison 1 .* has 3 completions'):
    loader.comparison_rows(comparisons, words, 2, 4)


def test_cut_completions_have_no_end(words):
  cut = records.Comparison(
    'a', ('b', 'c d', 'c'), (1, 3, 2), ended=(True, False, False)
  )
  rows, _ = loader.comparison_rows([cut], words, 3, 4)
  np.testing.assert_array_equal(
    rows.tokens, [[[3, 4, 1, 0], [3, 5, 6, 0], [3, 5, 0, 0]]]
  )
  np.testing.assert_array_equal(rows.mask.sum(axis=-1), [[3, 3, 2]])
  assert loader.fitting_comparisons([cut], words, 3) == [cut]
  # The same texts, all ended, are other candidates.
  ended = dataclasses.replace(cut, completions=('b', 'c', 'c d'), ended=())
  rows, _ = loader.comparison_rows([cut, ended], words, 3, 4, merge=True)
  assert rows.ranks.shape == (2, 1, 3)


def test_rankings_of_the_same_answers_become_one_element(words):
  turns = (records.Turn('user', 'x'), records.Turn('user', 'a'))
  comparisons = [
    records.Comparison('a', ('b', 'c'), (1, 2), labeler='x'),
    records.Comparison('b', ('b', 'c'), (2, 1), labeler='x'),
    records.Comparison('a', ('b', 'c'), (2, 1), labeler='y'),
    # In another order, as where the chosen answer comes first.
    records.Comparison('a', ('c', 'b'), (1, 2), labeler='z'),
    records.Comparison('a', ('b', 'c'), (1, 1), turns=turns),
    records.Comparison('a', ('b', 'b c d e'), (1, 2), labeler='x'),
    records.Comparison('a', ('b', 'b c d e'), (1, 1), labeler='y'),
    records.Comparison('c', ('b', 'c', 'b'), (1, 2, 3), labeler='x'),
    records.Comparison('c', ('c', 'b', 'b'), (3, 1, 2), labeler='y'),
  ]
  apart, dropped = loader.comparison_rows(comparisons, words, 3, 4)
  assert (apart.ranks.shape, dropped.too_long) == ((7, 1, 3), 2)
  rows, dropped = loader.comparison_rows(comparisons, words, 3, 4, merge=True)
  assert dropped.too_long == 2  # Comparisons, not elements.
  np.testing.assert_array_equal(
    rows.ranks,
    [
      [[1, 2, 0], [2, 1, 0], [2, 1, 0]],
      [[2, 1, 0], [0, 0, 0], [0, 0, 0]],
      [[1, 1, 0], [0, 0, 0], [0, 0, 0]],  # Another conversation.
      [[1, 2, 3], [1, 3, 2], [0, 0, 0]],
    ],
  )
  np.testing.assert_array_equal(rows.tokens, apart.tokens[[0, 1, 4, 5]])
  packed = loader.pack_comparisons(rows)
  assert packed.ends.shape == (4, 3)
  np.testing.assert_array_equal(packed.ranks, rows.ranks)


def test_prompt_rows_by_hand(words):
  prompts = ['a b', 'a b c d', records.Prompt('x', 'c d e')]
  rows, dropped = loader.prompt_rows(prompts, words, 3)
  assert dropped == loader.Dropped(1, 3)
  np.testing.assert_array_equal(rows.tokens, [[0, 3, 4], [5, 6, 7]])
  np.testing.assert_array_equal(
    rows.mask, [[False, True, True], [True, True, True]]
  )
  assert rows.indices.tolist() == [0, 2]  # Numbers in the data set, not here.


def test_nothing_left_is_an_error(words):
  with pytest.raises(
    ValueError, match='left: 1 longer than prompt_length .2 tok'
  ):
    loader.prompt_rows(['a b c'], words, 2)
  with pytest.raises(ValueError, match='there are no demonstrations'):
    loader.demonstration_rows([], words, 9, loss_on='all', pack=True)
  with pytest.raises(ValueError, match='left: 2 longer than row_length .1 tok'):
    loader.comparison_rows(
      [records.Comparison('a', ('b', 'c'), (1, 2))] * 2, words, 2, 1
    )


def test_take(words):
  rows, _ = loader.prompt_rows(['a', 'b', 'c'], words, 2)
  some = loader.take(rows, [2, 0, 2])
  assert isinstance(some, types.PromptBatch)
  assert some.indices.tolist() == [2, 0, 2]
  assert some.tokens[:, 1].tolist() == [5, 3, 5]
  assert loader.take(['x', 'y'], np.asarray([1, 1])) == ['y', 'y']


def _epochs(batches, steps_per_epoch, num_epochs):
  return [
    list(
      itertools.chain.from_iterable(
        batches[epoch * steps_per_epoch + i] for i in range(steps_per_epoch)
      )
    )
    for epoch in range(num_epochs)
  ]


def test_epochs_are_permutations_in_changing_order():
  batches = loader.make_batches(
    list(range(12)), batch_size=4, seed=7, num_epochs=5
  )
  assert len(batches) == 15
  epochs = _epochs(batches, 3, 5)
  assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 5


def test_batches_are_a_function_of_seed_and_step():
  examples = [f'example {i}' for i in range(50)]
  first = loader.make_batches(examples, batch_size=8, seed=1)
  again = loader.make_batches(examples, batch_size=8, seed=1)
  # A resumed run asks for step 1000 first, and gets what it would have got.
  assert again[1000] == first[1000] and again[3] == first[3]
  assert first[0] != loader.make_batches(examples, batch_size=8, seed=2)[0]


def test_batches_are_made_ahead_in_order():
  batches = loader.make_batches(list(range(50)), batch_size=8, seed=1)
  found = list(loader.ahead(batches.__getitem__)(3, 9))
  assert found == [batches[step] for step in range(3, 9)]
  made = []

  def slowly_used(step):
    made.append(step)
    if step == 5:
      raise ValueError('no batch 5')
    return step

  waiting = loader.ahead(slowly_used, 2)(0, 10**9)
  assert next(waiting) == 0
  deadline = time.monotonic() + 10
  while len(made) < 3 and time.monotonic() < deadline:
    time.sleep(0.01)
  # Two lie ready that nobody asked for; not many more.
  assert made[:3] == [0, 1, 2] and len(made) < 5
  with pytest.raises(ValueError, match='no batch 5'):
    list(waiting)


def test_remainder():
  dropped = loader.make_batches(
    list(range(5)), batch_size=2, seed=0, num_epochs=40
  )
  assert len(dropped) == 80
  assert all(len(batch) == 2 for batch in dropped)
  # Two batches an epoch; which example is left out changes.
  left_out = [set(range(5)) - set(e) for e in _epochs(dropped, 2, 40)]
  assert set.union(*left_out) == set(range(5))


def test_batches_of_rows(words):
  rows, _ = loader.prompt_rows(list('abcdefgh'), words, 2)
  batch = loader.make_batches(rows, batch_size=4, seed=0)[1]
  assert isinstance(batch, types.PromptBatch) and batch.tokens.shape == (4, 2)
  np.testing.assert_array_equal(batch.tokens[:, 1], batch.indices + 3)


@pytest.mark.parametrize('count', [2, 4])
def test_process_shards_are_disjoint_and_make_up_the_batch(count):
  settings = dict(batch_size=8, seed=5)
  whole = loader.make_batches(list(range(40)), **settings)
  shards = [
    loader.make_batches(
      list(range(40)), **settings, process_index=i, process_count=count
    )
    for i in range(count)
  ]
  seen = [set() for _ in shards]
  for step in range(5):  # One epoch.
    parts = [shard[step] for shard in shards]
    assert list(itertools.chain(*parts)) == list(whole[step])
    for part, examples in zip(parts, seen, strict=True):
      assert len(part) == 8 // count
      examples.update(part)
  assert sum(map(len, seen)) == len(set.union(*seen)) == 40


def test_batches_refuse_what_cannot_work():
  for kwargs, expected in (
    (dict(batch_size=3), '2 examples do not fill a batch of 3'),
    (dict(batch_size=0), 'batch_size is 0'),
    (dict(batch_size=1, process_count=2), 'cannot be shared by 2'),
    (dict(batch_size=2, process_index=2, process_count=2), 'process 2'),
  ):
    with pytest.raises(ValueError, match=expected):
      loader.make_batches(['x', 'y'], seed=0, **kwargs)
  with pytest.raises(ValueError, match='no examples'):
    loader.make_batches([], batch_size=1, seed=0)


def _two_sets():
  # The first token tells which set and row a row is: 100 + i or 900 + i.
  main = loader.pack_documents([[100 + i] * 3 for i in range(27)], 4, EOS, PAD)
  other = loader.pack_documents([[900 + i] * 3 for i in range(5)], 4, EOS, PAD)
  return main, other


def test_mixture_share_order_and_epochs():
  main, other = _two_sets()
  settings = dict(fraction=0.1, batch_size=6, seed=3)
  batches = loader.mixture(main, other, num_epochs=2, **settings)
  # 54 main rows at 5.4 a step are exactly 10 steps, with 6 rows mixed in.
  assert len(batches) == 10
  first = [batches[step].tokens[:, 0] for step in range(10)]
  assert all(len(tokens) == 6 for tokens in first)
  mixed_in = [int((tokens >= 900).sum()) for tokens in first]
  # floor(0.6 (s + 1)) - floor(0.6 s): 0 1 0 1 1, and again.
  assert mixed_in == [0, 1, 0, 1, 1, 0, 1, 0, 1, 1]
  count = collections.Counter(np.concatenate(first).tolist())
  assert all(count[100 + i] == 2 for i in range(27))
  # 6 rows out of 5: each once, one of them twice.
  assert sorted(count[900 + i] for i in range(5)) == [1, 1, 1, 1, 2]
  again = loader.mixture(main, other, **settings)
  for step in (9, 0, 4):
    np.testing.assert_array_equal(again[step].tokens, batches[step].tokens)
  assert isinstance(again[12345], types.TextBatch)
  shards = [
    loader.mixture(main, other, process_index=i, process_count=2, **settings)[
      4
    ].tokens[:, 0]
    for i in range(2)
  ]
  np.testing.assert_array_equal(np.concatenate(shards), first[4])


def test_mixture_of_nothing_and_bad_settings():
  main, other = _two_sets()
  plain = loader.mixture(
    main, other, fraction=0.0, batch_size=9, seed=0, num_epochs=1
  )
  assert len(plain) == 3
  assert all((plain[i].tokens < 900).all() for i in range(3))
  with pytest.raises(ValueError, match='fraction is 1.0'):
    loader.mixture(main, other, fraction=1.0, batch_size=2, seed=0)
  with pytest.raises(ValueError, match='do not fill a batch of 90'):
    loader.mixture(
      main, other, fraction=0.1, batch_size=90, seed=0, num_epochs=1
    )
  wide = loader.pack_documents([[3]], 5, EOS, PAD)
  with pytest.raises(ValueError, match='rows of 4 and 5 tokens'):
    loader.mixture(main, wide, fraction=0.1, batch_size=2, seed=0)


def test_balanced_batches_are_whole_epochs_of_even_size():
  rng = np.random.default_rng(0)
  sizes = rng.geometric(0.02, 1003)
  batches = loader.balanced_batches(sizes, batch_size=8, seed=3, num_epochs=2)
  assert batches.shape == (2 * 125, 8)
  for epoch in np.split(batches, 2):
    # Nothing twice; three examples of 1003 fill no batch.
    assert len(set(epoch.ravel())) == 1000
  assert not np.array_equal(batches[:125], batches[125:])
  # Sums of strata vary far less than sums of random draws.
  even = sizes[batches].sum(axis=1)
  random = rng.permutation(sizes)[:1000].reshape(125, 8).sum(axis=1)
  assert even.std() < 0.5 * random.std()
  # A batch's slots hold no order of size: any slot may have the longest.
  longest = sizes[batches].argmax(axis=1)
  assert len(set(longest)) == 8


def test_balanced_batches_vary_with_the_seed_only():
  sizes = np.arange(40)
  first = loader.balanced_batches(sizes, batch_size=4, seed=1)
  np.testing.assert_array_equal(
    first, loader.balanced_batches(sizes, batch_size=4, seed=1)
  )
  other = loader.balanced_batches(sizes, batch_size=4, seed=2)
  assert not np.array_equal(first, other)
  with pytest.raises(ValueError, match='do not fill a batch of 64'):
    loader.balanced_batches(sizes, batch_size=64, seed=1)


def test_packed_comparisons_say_where_completions_are(words):
  """Each completion token once, by the candidate that it belongs to."""
  rows, _ = loader.comparison_rows(
    [
      records.Comparison('a b c', ('d', 'e f', 'g h a'), (1, 2, 3)),
      records.Comparison('b', ('c c', 'd'), (2, 1)),
    ],
    words,
    3,
    8,
  )
  assert rows.prompt_lengths.tolist() == [3, 1]
  packed = loader.pack_comparisons(rows, reads_responses=True)
  assert packed.where.shape == packed.owner.shape
  assert packed.where.shape[1] % 8 == 0
  found = collections.defaultdict(list)
  for row, (columns, owners) in enumerate(
    zip(packed.where, packed.owner, strict=True)
  ):
    for column, owner in zip(columns, owners, strict=True):
      if owner < 6:
        # The token stands one column after the position that predicts it.
        found[int(owner)].append(packed.tokens[row, column + 1])
        assert packed.segments[row, column] == packed.segments[row, column + 1]
  expected = words.encode_responses(
    ['d', 'e f', 'g h a', 'c c', 'd'], ended=True
  )
  assert dict(found) == dict(enumerate(expected))
  again = loader.pack_comparisons(rows, 6, 16)
  assert again.where.shape == (6, 16) and again.tokens.shape == (6, 8)
  assert (again.owner < 6).sum() == (packed.owner < 6).sum()
  with pytest.raises(
    ValueError, match='completion tokens in one row of 1 places'
  ):
    loader.pack_comparisons(rows, 6, 1)
  assert loader.pack_comparisons(rows).where is None
