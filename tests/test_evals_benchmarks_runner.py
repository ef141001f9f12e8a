"""The runner with models that are plain functions."""

import json

import pytest

from instruct_jax.data import records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals.benchmarks import released_csv, runner, tasks


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizer_lib.train_bpe(['Passage: a fox.\nQuestion: who?'] * 3, 300)


def drop_items(number):
  return [
    tasks.Item(
      f'Passage: {"fox " * i}\nQuestion: how many?\nAnswer:',
      (str(i),),
      answer=str(i),
      group=str(i),
    )
    for i in range(number)
  ]


class Model:
  """Counts the calls; answers with the prompt's number of tokens."""

  def __init__(self, tokenizer, fail_after=10**9):
    self.tokenizer, self.left, self.lengths = tokenizer, fail_after, []

  def generate(self, prompts, max_tokens):
    if not self.left:
      raise RuntimeError('cut')
    self.left -= 1
    self.lengths.append([len(ids) for ids in prompts])
    return [self.tokenizer.encode(f' {len(ids)}\nnext line') for ids in prompts]

  def choices(self, contexts, choices):
    self.lengths.append([len(ids) for ids in contexts])
    return [[-float(len(ids)) for ids in group] for group in choices]


def run(queries, journal, model, tokenizer, progress=None):
  return runner.run_queries(
    'drop',
    queries,
    journal,
    tokenizer=tokenizer,
    generate_fn=model.generate,
    choice_fn=model.choices,
    batch_size=3,
    progress=progress or (lambda number: None),
  )


def queries_of(tokenizer, items, prompt_type='zeroshot', shots=(), length=2048):
  return runner.make_queries(
    'drop', items, prompt_type, shots, tokenizer, length
  )


def test_cut_and_resumed_equals_uninterrupted(tmp_path, tokenizer):
  queries, counts = queries_of(tokenizer, drop_items(8))
  assert counts.asked == 8
  whole = run(queries, tmp_path / 'a.jsonl', Model(tokenizer), tokenizer)
  cut = Model(tokenizer, fail_after=2)
  path = tmp_path / 'b.jsonl'
  with pytest.raises(RuntimeError, match='cut'):
    run(queries, path, cut, tokenizer)
  # Killed in the middle of a line.
  path.write_text(path.read_text() + '{"key": "ab')
  done, resumed = [], Model(tokenizer)
  again = run(queries, path, resumed, tokenizer, done.append)
  assert again == whole
  assert done[0] == 6 and sum(done) == 8
  assert resumed.lengths == [[len(q.ids) for q in queries[1::-1]]]
  # Nothing is asked a third time, and the journal is whole lines.
  third = Model(tokenizer)
  assert run(queries, path, third, tokenizer) == whole
  assert third.lengths == []
  assert len([json.loads(x) for x in path.read_text().splitlines()]) == 8


def test_batches_go_by_length_and_answers_to_their_items(tmp_path, tokenizer):
  queries, counts = queries_of(tokenizer, drop_items(8))
  model = Model(tokenizer)
  results = run(queries, tmp_path / 'a.jsonl', model, tokenizer)
  flat = [x for batch in model.lengths for x in batch]
  assert flat == sorted(flat, reverse=True)
  rows = runner.to_rows(
    'drop',
    'tiny',
    'zeroshot',
    queries,
    results,
    counts,
    toxicity_fn=None,
    truth_fn=None,
  )
  # Only up to the newline, without the space before.
  assert [row['sample'] for row in rows] == [str(len(q.ids)) for q in queries]
  path = tmp_path / 'drop_samples.csv'
  released_csv.write(path, 'drop', rows)
  assert len(released_csv.read(path, 'drop')) == 8


def test_damaged_journal_is_named(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('nonsense\n{"key": "a", "result": "b"}\n')
  with pytest.raises(records.RecordError, match=r'a\.jsonl:1: not a line'):
    runner.read_journal(path)


def test_what_does_not_fit_is_counted(tokenizer):
  items = drop_items(5)
  lengths = [
    len(tokenizer.encode(tasks.prompt('drop', item, 'zeroshot')))
    for item in items
  ]
  # Room for the third item and DROP's 25 tokens, not for the fourth.
  room = lengths[2] + 25
  queries, counts = queries_of(tokenizer, items, length=room)
  assert (counts.asked, counts.too_long) == (3, 2)
  assert [q.item for q in queries] == items[:3]
  queries, counts = queries_of(
    tokenizer, items[:3], 'fewshot', items[3:], length=room
  )
  assert counts.asked == 3
  # No example has room beside the third item, which is asked all the same.
  assert counts.fewer_shots >= 1
  assert queries[-1].ids == tokenizer.encode(
    tasks.prompt('drop', items[2], 'zeroshot')
  )
  full, counts = queries_of(tokenizer, items[:3], 'fewshot', items[3:])
  assert counts.fewer_shots == 0
  assert full[0].ids == tokenizer.encode(
    tasks.prompt('drop', items[0], 'fewshot', items[3:])
  )


def test_the_same_item_is_asked_once(tokenizer):
  queries, counts = queries_of(tokenizer, drop_items(2) * 3)
  assert (len(queries), counts.asked, counts.repeated) == (2, 2, 4)


def test_stop_ids_are_all_tokens_with_a_newline(tokenizer):
  stops = runner.stop_ids(tokenizer)
  assert tokenizer.eos_id in stops
  for i in range(tokenizer.vocab_size):
    assert (i in stops) == (
      i == tokenizer.eos_id or '\n' in tokenizer.decode([i])
    )
  assert len(stops) >= 2


def test_choices_become_means_and_entropies_need_no_prefix(tmp_path, tokenizer):
  item = tasks.Item('Text: fox\nLabel:', (' ox',), (' fox fox fox', ' ox'))
  queries, counts = runner.make_queries(
    'sst', [item], 'zeroshot', (), tokenizer, 512
  )
  # Sums favour the longer choice, means the shorter.
  sums = [-2.0 * len(queries[0].choices[0]), -1.5 * len(queries[0].choices[1])]
  rows = runner.to_rows(
    'sst',
    'tiny',
    'zeroshot',
    queries,
    {queries[0].key: sums},
    counts,
    toxicity_fn=None,
    truth_fn=None,
  )
  assert rows[0]['sample'] == ' ox'
  pair = tasks.Item('', choices=('he left', 'she left'))
  (query,), _ = runner.make_queries(
    'winogender', [pair], 'basic prompt', (), tokenizer, 512
  )
  assert query.ids == [tokenizer.eos_id]


def test_empty_answers_are_counted_and_scorers_are_required(tokenizer):
  items = [tasks.Item('So I said'), tasks.Item('And then')]
  queries, counts = runner.make_queries(
    'real_toxicity', items, 'basic prompt', (), tokenizer, 512
  )
  results = {queries[0].key: '', queries[1].key: 'bye'}
  arguments = ('real_toxicity', 'tiny', 'basic prompt', queries, results)
  rows = runner.to_rows(
    *arguments,
    counts,
    toxicity_fn=lambda texts: [len(text) / 10 for text in texts],
    truth_fn=None,
  )
  assert counts.empty == 1
  assert [row['toxicity'] for row in rows] == ['0.0', '0.3']
  with pytest.raises(ValueError, match='needs a toxicity scorer'):
    runner.to_rows(*arguments, counts, toxicity_fn=None, truth_fn=None)
