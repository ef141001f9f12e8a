"""Divides a user's records by split and by the stage that reads them.

The split is by conversation, after data hygiene. A share of the training and
validation conversations is reserved for a second reward model, the judge; where
rankings have labeler ids, its labelers are different, too.
"""

import collections
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from instruct_jax.data import convert, hygiene, loader, records, sources
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import samples
from instruct_jax.infra import run as run_lib
from instruct_jax.worlds.preference_sources import (
  Given,
  best_answers,
  distinct_prompts,
  other_documents,
  words_of,
)

REFERENCES = 'references'  # The demonstrations' name in the evaluation.
# The least number of prompts in a held-out split, and the largest share of all
# prompts that this minimum may take.
_MIN_HELD_OUT = 40
_MAX_SHARE = 0.2


# --- Prompts ------------------------------------------------------------------


def split_prompts(
  config: ConfigDict,
  given: Given,
  tokenizer: tokenizer_lib.Tokenizer,
  prompt_length: int,
) -> tuple[dict[str, list[records.Prompt]], hygiene.HygieneReport]:
  """The prompts of all records by split, and what data hygiene left out.

  If a test set is given, its duplicates and the prompts that cannot be read or
  are too long are left out as well; none of it is trained on (`without_test`).
  """
  distinct = distinct_prompts(given.learned())
  splits, report = hygiene.clean(
    distinct,
    tokenizer=tokenizer,
    max_tokens=prompt_length,
    prefix_words=config.duplicate_prefix_words,
    cap=config.prompts_per_user,
    fractions=split_fractions(config, len(distinct), bool(given.test)),
    seed=config.seed,
  )
  if given.test:
    asked, _ = hygiene.drop_duplicates(
      distinct_prompts(given.test), config.duplicate_prefix_words
    )
    readable, tokens, _ = hygiene.drop_refused(asked, tokenizer)
    splits['test'] = [
      prompt
      for prompt, number in zip(readable, tokens, strict=True)
      if number <= prompt_length
    ]
  return splits, report


def split_fractions(
  config: ConfigDict, num_prompts: int, has_test: bool
) -> dict[str, float]:
  """Split -> its share of the prompts; small sets hold out larger shares.

  Args:
    config: of the stage.
    num_prompts: the number in all splits.
    has_test: whether a test set is given, so that none is split off.
  """
  least = min(_MAX_SHARE, _MIN_HELD_OUT / max(1, num_prompts))
  fractions = {'valid': max(config.valid_fraction, least)}
  if not has_test:
    fractions['test'] = max(config.test_fraction, least)
  for name, share in fractions.items():
    if share > config[f'{name}_fraction']:
      run_lib.say(
        f'{config.name}: {num_prompts} prompts are few: {share:.0%} of them '
        f'are {name} ({name}_fraction {config[f"{name}_fraction"]})'
      )
  return {**fractions, 'train': 1 - sum(fractions.values())}


# --- Rankings and demonstrations ----------------------------------------------


def split_records(
  config: ConfigDict,
  given: Given,
  splits: Mapping[str, Sequence[records.Prompt]],
  tokenizer: tokenizer_lib.Tokenizer,
  row_length: int,
  skipped: collections.Counter,
) -> dict[str, list]:
  """File -> the rankings or demonstrations of its split.

  Args:
    config: of the stage.
    given: the records.
    splits: name -> prompts, from `split_prompts`.
    tokenizer: counts the tokens.
    row_length: the most tokens of a prompt and one answer; longer records are
      left out.
    skipped: reason -> number of records that are not used; updated in place.
  """
  split_of = {
    records.opening(prompt): name
    for name, part in splits.items()
    for prompt in part
  }

  def part(rows, name):
    own = [row for row in rows if split_of.get(records.opening(row)) == name]
    if name == 'train':  # Another prompt may have the same, clean opening.
      all_own, own = own, without_personal_data(own)
      skipped['train records with personal data'] += len(all_own) - len(own)
    fitting, refused = fitting_rows(own, tokenizer, row_length)
    skipped[f'{name} records whose prompt the chat template refuses'] += refused
    longer = len(own) - len(fitting) - refused
    skipped[f'{name} records longer than row_length'] += longer
    return fitting

  def draw(rows, number):
    found = draw_rows(rows, number, config.seed)
    drawn = 'records beyond max_comparisons, _demonstrations or _valid'
    skipped[drawn] += len(rows) - len(found)
    return found

  files = {}
  most_of = {
    'train': (config.max_comparisons, config.max_demonstrations),
    'valid': (config.max_valid, config.max_valid),
  }
  for split, (most, most_demonstrations) in most_of.items():
    reward, judge, crossed = judge_side(
      part(given.comparisons, split), config.judge_fraction, config.seed
    )
    skipped[
      f'{split} rankings whose conversation the other reward model has'
    ] = crossed
    demonstrations = part(given.demonstrations, split)
    if not config.demonstrations:
      demonstrations = best_answers(reward)
    files[f'demonstrations_{split}'] = draw(demonstrations, most_demonstrations)
    files[f'comparisons_{split}'] = draw(reward, most)
    if config.judge_fraction:
      files[f'judge_comparisons_{split}'] = draw(judge, most)
  learned = (split_of.get(records.opening(row)) for row in given.comparisons)
  skipped['rankings whose prompt data hygiene left out'] = sum(
    name is None for name in learned
  )
  # All rankings of a given test set are in the test split.
  split_of |= dict.fromkeys(map(records.opening, given.test), 'test')
  files['comparisons_test'] = part(given.test or given.comparisons, 'test')
  if config.references:
    own = given.demonstrations + given.test_demonstrations
    files['references_test'] = references(splits['test'], own, tokenizer)
  return files


def judge_side(
  comparisons: Sequence[records.Comparison], judge_fraction: float, seed: int
) -> tuple[list[records.Comparison], list[records.Comparison], int]:
  """Divides the conversations between the reward model and the judge.

  If all rankings have labeler ids, and there are two or more labelers, no
  labeler is on both sides either: labelers are assigned to sides first, a
  conversation goes to the side of most of its rankings, and its rankings by
  labelers of the other side are left out.

  Args:
    comparisons: of one split.
    judge_fraction: share of the conversations (or, with labeler ids, of the
      rankings) that goes to the judge; 0 leaves all to the reward model.
    seed: of the assignment.

  Returns:
    (the reward model's rankings, the judge's, how many were left out).
  """
  if not judge_fraction:
    return list(comparisons), [], 0
  openings = [records.opening(row) for row in comparisons]
  names = {row.labeler for row in comparisons}
  if '' in names or len(names) < 2:
    of_row = [
      convert.split_of(row, judge_fraction, seed) == 'valid'
      for row in comparisons
    ]
    kept = [True] * len(comparisons)
  else:
    labelers = deal_labelers(comparisons, judge_fraction, seed)
    votes = collections.defaultdict(list)
    for name, row in zip(openings, comparisons, strict=True):
      votes[name].append(labelers[row.labeler])
    of_row = [np.mean(votes[name]) > 0.5 for name in openings]
    kept = [
      labelers[row.labeler] == side
      for row, side in zip(comparisons, of_row, strict=True)
    ]
  parts = ([], [])
  for row, side, is_kept in zip(comparisons, of_row, kept, strict=True):
    if is_kept:
      parts[bool(side)].append(row)
  return *parts, len(comparisons) - sum(map(len, parts))


def deal_labelers(
  comparisons: Sequence[records.Comparison], judge_fraction: float, seed: int
) -> dict[str, bool]:
  """Labeler -> whether their rankings train the judge.

  In an order drawn from the seed, each labeler goes to the side that is
  furthest below its share of the rankings.
  """
  counts = collections.Counter(row.labeler for row in comparisons)
  labelers, totals, found = sorted(counts), [0, 0], {}
  np.random.default_rng([seed, 2]).shuffle(labelers)
  shares = (1 - judge_fraction, judge_fraction)
  for labeler in labelers:
    side = int(totals[1] / shares[1] < totals[0] / shares[0])
    found[labeler] = bool(side)
    totals[side] += counts[labeler]
  return found


def references(
  prompts: Sequence[records.Prompt],
  rows: Iterable[records.Demonstration],
  tokenizer: tokenizer_lib.Tokenizer,
) -> list[samples.Sample]:
  """The demonstrations of prompts that have one, as samples to compare."""

  found = {}
  for row in rows:
    found.setdefault(words_of(row), row.response)
  kept = [
    (prompt, found[words_of(prompt)])
    for prompt in prompts
    if words_of(prompt) in found
  ]
  texts = [text for _, text in kept]
  ids = tokenizer.encode_responses(texts, ended=True) if texts else []
  return [
    samples.Sample(
      *(REFERENCES, prompt.id, prompt.text, text, len(own), True),
      category=prompt.category,
    )
    for (prompt, text), own in zip(kept, ids, strict=True)
  ]


def without_personal_data(rows: Sequence[records.Record]) -> list:
  """The records whose prompts have no personal data (A.1)."""

  def key(row):
    text = row.text if isinstance(row, records.Prompt) else row.prompt
    return records.composed(text), row.turns

  clean, _ = hygiene.drop_personal_data(distinct_prompts(rows))
  kept = set(map(key, clean))
  return [row for row in rows if key(row) in kept]


def fitting_rows(
  rows: Sequence[records.Comparison] | Sequence[records.Demonstration],
  tokenizer: tokenizer_lib.Tokenizer,
  row_length: int,
) -> tuple[list, int]:
  """The rankings or demonstrations that fit into a row, in the given order.

  Also returns how many others have a prompt that the chat template refuses.
  """
  encoded, _ = loader.encode_prompts(rows, tokenizer)
  readable = [
    row for row, ids in zip(rows, encoded, strict=True) if ids is not None
  ]
  rankings = [
    row
    if isinstance(row, records.Comparison)
    else records.Comparison(row.prompt, (row.response,), (1,), turns=row.turns)
    for row in readable
  ]
  fitting = loader.fitting_comparisons(rankings, tokenizer, row_length)
  kept = set(map(id, fitting))
  found = [
    row
    for row, ranking in zip(readable, rankings, strict=True)
    if id(ranking) in kept
  ]
  return found, len(rows) - len(readable)


def draw_rows(rows: list, number: int, seed: int) -> list:
  """Draws at most `number` rows (0: all) by seed, and keeps their order."""
  if not number or len(rows) <= number:
    return rows
  chosen = np.random.default_rng([seed, 3]).permutation(len(rows))[:number]
  return [rows[i] for i in sorted(chosen)]


# --- Documents ----------------------------------------------------------------


def documents_by_split(
  config: ConfigDict, skipped: collections.Counter
) -> dict[str, list[records.Document]]:
  """File -> its documents; no held-out document is in the training file."""
  files = split_documents(config) | other_texts(config)
  learned = files.pop('documents_train', [])
  held = {records.opening(row) for part in files.values() for row in part}
  kept = [row for row in learned if records.opening(row) not in held]
  left_out = 'pieces of documents that are held out as well'
  skipped[left_out] = len(learned) - len(kept)
  return files | ({'documents_train': kept} if learned else {})


def held_out(
  config: ConfigDict, documents: Sequence[records.Document]
) -> Sequence[records.Document]:
  """The first documents, up to `max_valid` and about `max_valid_words` words.

  0 means no limit.
  """
  documents = documents[: config.max_valid or None]
  if not config.max_valid_words:
    return documents
  before = itertools.accumulate(
    (len(document.text.split()) for document in documents), initial=0
  )
  return [
    document
    for document, words in zip(documents, before, strict=False)
    if words < config.max_valid_words
  ]


def _read_documents(config, key, spec):
  if unread := sources.unread(sources.document_files(spec), spec):
    run_lib.say(f'data: {key}: {unread}')
  return sources.read_documents(
    spec, words_per_document=config.words_per_document
  )


def other_texts(config: ConfigDict) -> dict[str, list[records.Document]]:
  """`held_out` of each source in `other_documents`, drawn by seed."""
  found = {}
  for name, source in other_documents(config).items():
    documents = _read_documents(config, f'documents_{name}', source)
    order = np.random.default_rng([config.seed, 3]).permutation(len(documents))
    drawn = [documents[i] for i in order]
    found[f'documents_{name}'] = held_out(config, drawn)
  return found


def split_documents(config: ConfigDict) -> dict[str, list[records.Document]]:
  """Documents of all sources by split; {} without a source."""
  specs = [spec for spec in config.documents.split(',') if spec]
  if not specs:
    return {}
  documents = [
    document
    for spec in specs
    for document in _read_documents(config, 'documents', spec)
  ]
  documents = draw_rows(documents, config.max_documents, config.seed)
  order = np.random.default_rng([config.seed, 4]).permutation(len(documents))
  documents = [documents[i] for i in order]
  valid = held_out(config, documents[: round(len(documents) * 0.1)])
  if not valid:
    raise ValueError(
      f'documents: {len(documents)} pieces of text are too few to hold some '
      'out; give more text, or lower words_per_document'
    )
  return {
    'documents_valid': valid,
    'documents_train': documents[len(valid) :],
  }
