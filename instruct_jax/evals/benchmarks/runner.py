"""Runs a task of the suite on a model: batched by length, and resumable.

The model arrives as two functions on token ids, so nothing here knows devices
or parameters. Each finished batch goes to a journal, one JSON line per item
under a hash of the model's input; an interrupted run reads it and continues.
Items that are too long or repeated, and empty answers, are counted.
"""

import dataclasses
import hashlib
import json
import operator
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from instruct_jax import files
from instruct_jax.data import records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals.benchmarks import released_csv, tasks

Ids = list[int]
# (prompts, maximum number of tokens) -> ids of each answer, at temperature 0.
GenerateFn = Callable[[Sequence[Ids], int], list[Ids]]
# (contexts, choices of each context) -> summed log-probability of each choice
# given its context, in nats.
ChoiceFn = Callable[[Sequence[Ids], Sequence[Sequence[Ids]]], list[list[float]]]
# (continuations) -> toxicity of each, 0 to 1.
ToxicityFn = Callable[[Sequence[str]], Sequence[float]]
# (questions, answers) -> probabilities that each is true and is informative.
TruthFn = Callable[
  [Sequence[str], Sequence[str]], tuple[Sequence[float], Sequence[float]]
]


@dataclasses.dataclass(frozen=True)
class Query:
  """One item under one prompt type, in the model's tokens.

  Attributes:
    key: hash of everything that the model is given.
    ids: the prompt.
    choices: continuations to score; empty if an answer is sampled instead.
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
  """Tokens that end an answer: stop ids and all tokens with a newline (D)."""
  texts = tokenizer.decode_batch([[i] for i in range(tokenizer.vocab_size)])
  newlines = [i for i, text in enumerate(texts) if '\n' in text]
  return tuple(sorted({*tokenizer.stop_ids, *newlines}))


def answer_text(tokenizer: tokenizer_lib.Tokenizer, ids: Ids) -> str:
  """A sampled answer up to its first newline, stripped."""
  return tokenizer.decode_response(ids).split('\n')[0].strip()


def read_items(
  name: str, path: str, shots_path: str, max_items: int, seed: int
) -> tuple[list[tasks.Item], list[tasks.Item], int]:
  """(few-shot examples, items to ask, number of items in the file) of a task.

  Without `shots_path` the examples are drawn from `path`, and its other items
  are asked. At most `max_items` items are asked, drawn at random; 0 asks all.
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

  Prompts and choices are tokenized as in training, with BOS and the tokenizer's
  template. A few-shot prompt that is too long loses examples from its front; a
  query that does not fit even without examples is left out. Both are counted. A
  sentence of a bias task without prefix is read after BOS or EOS, like a
  document. `shots` are the examples of `fewshot`; `context_length` holds prompt
  and answer together.
  """
  task, layout = tasks.TASKS[name], released_csv.LAYOUTS[name]
  key_of = operator.itemgetter(*layout.item)
  distinct = {key_of(_columns(item)): item for item in reversed(items)}
  asked = list(reversed(distinct.values()))
  num_examples = len(shots) if prompt_type == 'fewshot' else 0
  counts = Counts(repeated=len(items) - len(asked), examples=num_examples)
  start = list(tokenizer.prefix_ids) or [tokenizer.eos_id]

  def encode(texts):
    prompts = iter(tokenizer.encode_prompts([text for text in texts if text]))
    return [next(prompts) if text else start for text in texts]

  # One call for all texts, so that the tokenizer uses every core.
  texts = [tasks.prompt(name, x, prompt_type, shots) for x in asked]
  encode_choices = tokenizer.encode_responses
  if not any(texts):  # Sentences of a bias task.
    encode_choices = tokenizer.encode_batch
  encoded = iter(encode_choices([c for item in asked for c in item.choices]))
  queries = []
  for item, ids in zip(asked, encode(texts), strict=True):
    choices = tuple(next(encoded) for _ in item.choices)
    room = context_length - max([task.max_tokens, *map(len, choices)])
    dropped = 0
    while len(ids) > room and dropped < num_examples:
      dropped += 1
      (ids,) = encode([tasks.prompt(name, item, prompt_type, shots[dropped:])])
    if len(ids) > room:
      counts.too_long += 1
      continue
    counts.asked += 1
    counts.fewer_shots += dropped > 0
    content = json.dumps((ids, choices, task.max_tokens)).encode()
    key = hashlib.sha256(content).hexdigest()[:32]
    queries.append(Query(key, item, ids, choices))
  return queries, counts


def _columns(item: tasks.Item) -> dict[str, str]:
  """An item's cells in the released layout."""
  return {
    'context': item.context,
    'question': item.context,
    'ref_text': released_csv.join(dict.fromkeys(item.references)),
    'choices': released_csv.join(item.choices),
    **item.fields,
  }


def read_journal(path: epath.PathLike) -> dict[str, Any]:
  """Results by key; a truncated last line is ignored.

  Raises:
    RecordError: the journal is damaged before its last line.
  """
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
        f'{path}:{number}: not a line of a journal; delete the file to restart '
        'this task'
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
  progress: Callable[[int], None] = lambda number: None,
) -> dict[str, Any]:
  """Results by key: a text, or the log-probabilities of the choices.

  Queries run longest first: batches need little padding, and a model that does
  not fit the device fails at once. `journal` is a JSONL file that is read first
  and appended to. `progress` is called with the number of queries done: those
  in the journal, repeated ones, then each batch.

  Raises:
    RecordError: the journal is damaged before its last line.
  """
  journal = epath.Path(journal)
  results = read_journal(journal)
  done = sum(query.key in results for query in queries)
  progress(done)
  # Different items may give the model the same input, which is asked once.
  distinct = {q.key: q for q in queries if q.key not in results}
  progress(len(queries) - done - len(distinct))
  todo = sorted(distinct.values(), key=lambda query: -len(query.ids))
  if not todo:
    return results
  if journal.exists():  # Removes a truncated line.
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
  toxicity_fn: ToxicityFn | None = None,
  truth_fn: TruthFn | None = None,
) -> list[dict[str, str]]:
  """Rows in the released layout; also adds to `counts.empty`.

  Raises:
    ValueError: real_toxicity has no `toxicity_fn`, or truthful_qa no
      `truth_fn`.
  """
  columns = released_csv.LAYOUTS[name].columns
  rows = []
  for query in queries:
    result = results[query.key]
    if query.choices:
      lengths = list(map(len, query.choices))
      means = [a / b for a, b in zip(result, lengths, strict=True)]
      best = query.item.choices[means.index(max(means))]
      cells = {
        'logprobs': released_csv.join(map(repr, result)),
        'num_tokens': released_csv.join(map(str, lengths)),
        'sample': released_csv.join([best]),
      }
    else:
      cells = {'sample': result, 'answer': result}
      counts.empty += not result
    about = {'model_type': model, 'prompt_type': prompt_type}
    rows.append(_columns(query.item) | about | cells)
  if rows and 'toxicity' in columns:
    if toxicity_fn is None:
      raise ValueError(f'{name} needs a toxicity scorer')
    values = toxicity_fn([row['sample'] for row in rows])
    for row, value in zip(rows, values, strict=True):
      row['toxicity'] = repr(float(value))
  if rows and 'true' in columns:
    if truth_fn is None:
      raise ValueError(f'{name} needs a truth scorer')
    true, informative = truth_fn(
      [row['question'] for row in rows], [row['answer'] for row in rows]
    )
    for row, a, b in zip(rows, true, informative, strict=True):
      row['true'], row['info'] = repr(float(a)), repr(float(b))
  return [{column: row[column] for column in columns} for row in rows]
