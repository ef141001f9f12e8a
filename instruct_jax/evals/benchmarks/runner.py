"""Runs a task of the suite on a model: batched by length, and resumable.

The model arrives as two functions on token ids, so nothing here knows devices
or parameters. Every finished batch is appended to a journal, one JSON line an
item under a hash of what the model was given; a run that was cut reads it and
goes on. Nothing is dropped silently: what does not fit the model's context,
what was there twice and what came back empty is counted.
"""

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from instruct_jax import files
from instruct_jax.data import records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals.benchmarks import released_csv, tasks

Ids = list[int]
# (prompts, largest number of tokens) -> sampled ids of each, temperature 0.
GenerateFn = Callable[[Sequence[Ids], int], list[Ids]]
# (contexts, choices of each context) -> summed log-probability of each choice
# given its context, nats.
ChoiceFn = Callable[[Sequence[Ids], Sequence[Sequence[Ids]]], list[list[float]]]
# (continuations) -> toxicity of each, 0 to 1.
ToxicityFn = Callable[[Sequence[str]], Sequence[float]]
# (questions, answers) -> probabilities that each is true, that it informs.
TruthFn = Callable[
  [Sequence[str], Sequence[str]], tuple[Sequence[float], Sequence[float]]
]


@dataclasses.dataclass(frozen=True)
class Query:
  """One item under one prompt type, in the model's tokens.

  Attributes:
    key: hash of ids and cap.
    ids: what is read first.
    choices: to be scored after it; nothing where an answer is sampled.
  """

  key: str
  item: tasks.Item
  ids: Ids
  choices: tuple[Ids, ...]


@dataclasses.dataclass
class Counts:
  """What happened to the items of one task and prompt type."""

  asked: int = 0
  repeated: int = 0
  too_long: int = 0
  fewer_shots: int = 0
  empty: int = 0
  examples: int = 0


def stop_ids(tokenizer: tokenizer_lib.Tokenizer) -> tuple[int, ...]:
  """Tokens that end an answer: the tokenizer's, and every one with a newline
  in it (D)."""
  texts = tokenizer.decode_batch([[i] for i in range(tokenizer.vocab_size)])
  newlines = [i for i, text in enumerate(texts) if '\n' in text]
  return tuple(sorted({*tokenizer.stop_ids, *newlines}))


def answer_text(tokenizer: tokenizer_lib.Tokenizer, ids: Ids) -> str:
  """A sampled answer up to its first newline, without spaces around it."""
  return tokenizer.decode_response(ids).split('\n')[0].strip()


def _key(*parts: Any) -> str:
  content = json.dumps(parts, sort_keys=True).encode('utf-8')
  return hashlib.sha256(content).hexdigest()[:32]


def read_items(
  name: str,
  path: str,
  shots_path: str,
  max_items: int,
  seed: int,
) -> tuple[list[tasks.Item], list[tasks.Item], int]:
  """(examples, items to ask, size of the file) of a task.

  Args:
    name: of the task.
    path: its official file.
    shots_path: another file to draw the examples from; '' draws them from
      `path`, whose other items are asked.
    max_items: asked at most, drawn at random; 0 asks all.
    seed: of both draws.
  """
  items = tasks.load(name, path)
  if shots_path:
    shots, _ = tasks.draw_shots(name, tasks.load(name, shots_path), seed)
    asked = items
  else:
    shots, asked = tasks.draw_shots(name, items, seed)
  if max_items and len(asked) > max_items:
    chosen = random.Random(seed).sample(range(len(asked)), max_items)
    asked = [asked[i] for i in sorted(chosen)]
  return shots, asked, len(items)


def make_queries(
  name: str,
  items: Sequence[tasks.Item],
  prompt_type: str,
  shots: Sequence[tasks.Item],
  tokenizer: tokenizer_lib.Tokenizer,
  context_length: int,
) -> tuple[list[Query], Counts]:
  """The queries of one task and prompt type that fit the model.

  Prompts and choices are read as training and rollouts read prompts and
  responses: with BOS, and through the tokenizer's template. A few-shot prompt
  that is too long loses examples from its front, and is counted; a query that
  does not fit even alone is left out, and counted. A sentence of a bias task
  without prefix is a document: it is read after BOS or EOS, where texts begin.

  Args:
    name: of the task.
    items: to ask.
    prompt_type: one of the task's.
    shots: examples for `fewshot`.
    tokenizer: the model's.
    context_length: positions that the model has, prompt and answer together.
  """
  task, layout = tasks.TASKS[name], released_csv.LAYOUTS[name]
  counts, queries = Counts(), []
  distinct = {
    tuple(_columns(item)[column] for column in layout.item): item
    for item in reversed(items)
  }
  asked = list(reversed(distinct.values()))
  counts.repeated = len(items) - len(asked)
  if prompt_type == 'fewshot':
    counts.examples = len(shots)

  start = list(tokenizer.prefix_ids) or [tokenizer.eos_id]

  def encode(texts):
    prompts = iter(tokenizer.encode_prompts([text for text in texts if text]))
    return [next(prompts) if text else start for text in texts]

  # All at once: the tokenizer then works on every core.
  texts = [tasks.prompt(name, x, prompt_type, shots) for x in asked]
  whole = encode(texts)
  after_prompt = iter(
    tokenizer.encode_responses(
      [
        c
        for x, text in zip(asked, texts, strict=True)
        if text
        for c in x.choices
      ]
    )
  )
  alone = iter(
    tokenizer.encode_batch(
      [
        c
        for x, text in zip(asked, texts, strict=True)
        if not text
        for c in x.choices
      ]
    )
  )
  for item, text, ids in zip(asked, texts, whole, strict=True):
    encoded = after_prompt if text else alone
    choices = tuple(next(encoded) for _ in item.choices)
    room = context_length - max([task.max_tokens, *map(len, choices)])
    dropped = 0
    while len(ids) > room and dropped < counts.examples:
      dropped += 1
      (ids,) = encode([tasks.prompt(name, item, prompt_type, shots[dropped:])])
    if len(ids) > room:
      counts.too_long += 1
      continue
    counts.asked += 1
    counts.fewer_shots += dropped > 0
    queries.append(
      Query(_key(ids, choices, task.max_tokens), item, ids, choices)
    )
  return queries, counts


def _columns(item: tasks.Item) -> dict[str, str]:
  """An item's cells of the released layout."""
  cells = {
    'context': item.context,
    'question': item.context,
    'ref_text': released_csv.join_references(item.references),
    'choices': released_csv.SEPARATOR.join(
      choice.replace(released_csv.SEPARATOR, ' ') for choice in item.choices
    ),
  }
  return {**cells, **item.fields}


def read_journal(path: epath.PathLike) -> dict[str, Any]:
  """Results by key; a last line that was cut while written is left out."""
  path = epath.Path(path)
  if not path.exists():
    return {}
  results = {}
  lines = path.read_text().split('\n')
  for number, line in enumerate(lines, start=1):
    if not line:
      continue
    try:
      entry = json.loads(line)
      results[entry['key']] = entry['result']
    except (ValueError, KeyError, TypeError) as error:
      if number == len(lines):
        break
      raise records.RecordError(
        f'{path}:{number}: not a line of a journal; delete the file to start '
        'this task again'
      ) from error
  return results


def run_queries(
  name: str,
  queries: Sequence[Query],
  journal: epath.PathLike,
  *,
  tokenizer: tokenizer_lib.Tokenizer,
  generate_fn: GenerateFn,
  choice_fn: ChoiceFn,
  batch_size: int,
  progress: Callable[[int], None],
) -> dict[str, Any]:
  """Results by key: a text, or the log-probabilities of the choices.

  Queries run in order of length, so that a batch pads little; the longest come
  first, so that a model that does not fit the device fails at once.

  Args:
    name: of the task.
    queries: from `make_queries`.
    journal: JSONL that is read first and appended to.
    tokenizer: the model's.
    generate_fn: see `GenerateFn`.
    choice_fn: see `ChoiceFn`.
    batch_size: queries per call.
    progress: told the number of queries done after each batch.

  Raises:
    RecordError: the journal is damaged before its last line.
  """
  journal = epath.Path(journal)
  results = read_journal(journal)
  done = [query for query in queries if query.key in results]
  progress(len(done))
  # Items may differ and still put the same to the model: once is enough.
  open_queries = {
    query.key: query for query in queries if query.key not in results
  }
  progress(len(queries) - len(done) - len(open_queries))
  todo = sorted(open_queries.values(), key=lambda query: -len(query.ids))
  if not todo:
    return results
  if journal.exists():  # Without a line that was cut.
    files.write_bytes(journal, _to_lines(results).encode())
  cap = tasks.TASKS[name].max_tokens
  with files.Appended(journal) as file:
    for start in range(0, len(todo), batch_size):
      batch = todo[start : start + batch_size]
      ids = [query.ids for query in batch]
      if batch[0].choices:
        found = choice_fn(ids, [query.choices for query in batch])
      else:
        found = [answer_text(tokenizer, x) for x in generate_fn(ids, cap)]
      fresh = dict(zip((query.key for query in batch), found, strict=True))
      file.write(_to_lines(fresh))
      results |= fresh
      progress(len(batch))
  return results


def _to_lines(results: Mapping[str, Any]) -> str:
  return ''.join(
    json.dumps({'key': key, 'result': result}) + '\n'
    for key, result in results.items()
  )


def to_rows(
  name: str,
  model: str,
  prompt_type: str,
  queries: Sequence[Query],
  results: Mapping[str, Any],
  counts: Counts,
  *,
  toxicity_fn: ToxicityFn | None,
  truth_fn: TruthFn | None,
) -> list[dict[str, str]]:
  """Rows of the released layout; `counts.empty` is filled in.

  Args:
    name: of the task.
    model: goes into `model_type`.
    prompt_type: goes into its column.
    queries: that were run.
    results: from `run_queries`.
    counts: of these queries.
    toxicity_fn: needed by real_toxicity.
    truth_fn: needed by truthful_qa.

  Raises:
    ValueError: a scorer is needed and missing.
  """
  layout = released_csv.LAYOUTS[name]
  rows = []
  for query in queries:
    result = results[query.key]
    row = {
      **_columns(query.item),
      'model_type': model,
      'prompt_type': prompt_type,
      'sample': '',
    }
    if query.choices:
      row['logprobs'] = released_csv.SEPARATOR.join(map(repr, result))
      row['num_tokens'] = released_csv.SEPARATOR.join(
        str(len(ids)) for ids in query.choices
      )
      means = [
        total / len(ids)
        for total, ids in zip(result, query.choices, strict=True)
      ]
      best = query.item.choices[means.index(max(means))]
      row['sample'] = best.replace(released_csv.SEPARATOR, ' ')
    else:
      row['sample'] = row['answer'] = result
      counts.empty += not result
    rows.append(row)
  if rows and 'toxicity' in layout.columns:
    if toxicity_fn is None:
      raise ValueError(f'{name} needs a toxicity scorer')
    values = toxicity_fn([row['sample'] for row in rows])
    for row, value in zip(rows, values, strict=True):
      row['toxicity'] = repr(float(value))
  if rows and 'true' in layout.columns:
    if truth_fn is None:
      raise ValueError(f'{name} needs a truth scorer')
    true, informative = truth_fn(
      [row['question'] for row in rows], [row['answer'] for row in rows]
    )
    for row, a, b in zip(rows, true, informative, strict=True):
      row['true'], row['info'] = repr(float(a)), repr(float(b))
  return [{column: row[column] for column in layout.columns} for row in rows]
