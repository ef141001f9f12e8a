"""Real human data: the E2E restaurant descriptions and their crowd ratings.

A meaning representation is a list of facts about a restaurant, as in
`name[Alimentum], area[city centre], familyFriendly[no]`; the response states
them in one or two sentences. People wrote the sentences (E2E NLG data set,
Novikova et al. 2017); for other representations, crowd workers scored the
quality or the naturalness of five systems' outputs (E2E NLG Challenge, Dusek et
al. 2018).

  root/e2e_nlg/devset.csv.gz            mr, ref
  root/e2e_rankings/quality.csv.gz      worker, mr, ref1-5, quality1-5, ...
  root/e2e_rankings/naturalness.csv.gz  worker, mr, ref1-5, natur1-5, ...
  root/books/*.txt.gz                   pretraining text
  root/gpt2_bpe/                        only if vocab_size is None

Workers are numbered separately in each file: `quality:w0003` and
`naturalness:w0003` may or may not be the same person.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from etils import epath

from instruct_jax.data import folders, hygiene, records, sources
from instruct_jax.data import tokenizer as tokenizer_lib

Criterion = Literal['quality', 'naturalness']
Facts = tuple[tuple[str, str], ...]
SCORE_COLUMNS = {'quality': 'quality', 'naturalness': 'natur'}
NUM_SYSTEMS = 5
# Shares of the meaning representations.
FRACTIONS = {'train': 0.8, 'valid': 0.1, 'test': 0.1}
_SLOT = re.compile(r'([A-Za-z][A-Za-z ]*)\[([^\[\]]+)\](?:, |$)')


@dataclasses.dataclass
class RankingCounts:
  """Counts of the rows of a rating file.

  Attributes:
    rows: all rows.
    tainted: dropped; marked by the collectors: the worker failed check items.
    too_few: dropped; fewer than two different texts.
    merged: kept; some of the five texts are the same.
    all_tied: kept, although every completion has the same rank.
  """

  rows: int = 0
  tainted: int = 0
  too_few: int = 0
  merged: int = 0
  all_tied: int = 0


def parse_meaning(mr: str) -> list[tuple[str, str]]:
  """Parses `name[Aromi], area[riverside]` into [('name', 'Aromi'), ...]."""
  slots, position = [], 0
  while match := _SLOT.match(mr, position):
    slots.append((match[1], match[2]))
    position = match.end()
  if not slots or position != len(mr) or mr.endswith(', '):
    raise ValueError(
      f'not a meaning representation: {mr!r} at column {position + 1}; '
      'expected slot[value], slot[value]'
    )
  return slots


def prompt_text(mr: str) -> str:
  """A meaning representation as a prompt for the model.

  The form is `name: Aromi, area: riverside` and a line feed, because the
  pretraining books have hardly any brackets. Neither facts nor sentences have a
  line feed, so this last token of every prompt marks the end of the facts.
  """
  return ', '.join(': '.join(slot) for slot in parse_meaning(mr)) + '\n'


def _about(mr: str) -> dict[str, Any]:
  slots = [list(slot) for slot in parse_meaning(mr)]
  return {'prompt': prompt_text(mr), 'metadata': {'mr': mr, 'slots': slots}}


def read_demonstrations(
  path: epath.PathLike,
) -> tuple[list[records.Demonstration], int]:
  """Reads `mr,ref` rows (.csv or .csv.gz) as demonstrations.

  Runs of white space in a reference become one space. `metadata` has the
  meaning representation (`mr`) and its `slots`; `id` is `e2e_nlg:LINE`.

  Returns:
    The demonstrations, and how many rows repeated an earlier one.

  Raises:
    RecordError: there are bad rows; it lists them by line.
  """
  found, bad_lines, repeated = {}, [], 0
  for line, row in sources.read_csv(path, ('mr', 'ref')):
    response = ' '.join(row['ref'].split())
    try:
      about = _about(row['mr'])
    except ValueError as error:
      bad_lines.append((line, f"'mr': {error}"))
      continue
    if not response:
      bad_lines.append((line, "'ref' is empty; drop the row"))
      continue
    key = (row['mr'], records.composed(response))
    repeated += key in found
    found.setdefault(
      key,
      records.Demonstration(
        response=response,
        id=f'e2e_nlg:{line}',
        category='e2e_nlg',
        **about,
      ),
    )
  records.raise_problems(path, bad_lines)
  return list(found.values()), repeated


def read_rankings(
  path: epath.PathLike, criterion: Criterion = 'quality'
) -> tuple[list[records.Comparison], RankingCounts]:
  """Reads each row, one worker's five scores, as a ranking with ties.

  The scores are magnitude estimates against a reference of 100, and each worker
  has a different scale, so only their order within a row is used; equal scores
  tie. Texts that differ only in white space become one completion with the mean
  of their scores, because no model could tell them apart. (The `dupl_ref`
  columns also mark texts that differ in case or punctuation; workers often
  scored those differently, so they stay separate.) Tainted rows and rows with
  fewer than two different texts are dropped.

  Returns:
    Comparisons of K = 2 to 5, and counts of the rows. `labeler` is
    `criterion:worker`; `metadata` has `mr` and `slots`; `id` is
    `criterion:LINE`.

  Raises:
    RecordError: bad rows, listed by line; or no usable ranking.
  """
  if criterion not in SCORE_COLUMNS:
    raise ValueError(
      f'criterion is {criterion!r}; use one of {", ".join(SCORE_COLUMNS)}'
    )
  numbers = range(1, NUM_SYSTEMS + 1)
  texts = [f'ref{i}' for i in numbers]
  scores = [f'{SCORE_COLUMNS[criterion]}{i}' for i in numbers]
  pairs = list(zip(texts, scores, strict=True))
  comparisons, bad_lines, counts = [], [], RankingCounts()
  columns = ('worker', '_tainted', 'mr', *scores, *texts)
  for line, row in sources.read_csv(path, columns):
    counts.rows += 1
    if row['_tainted'] == 'True':
      counts.tainted += 1
      continue
    try:
      comparison = _comparison(row, pairs, criterion, line)
    except ValueError as error:
      bad_lines.append((line, str(error)))
      continue
    if comparison is None:
      counts.too_few += 1
      continue
    counts.merged += len(comparison.completions) < NUM_SYSTEMS
    counts.all_tied += len(set(comparison.ranks)) == 1
    comparisons.append(comparison)
  records.raise_problems(path, bad_lines)
  if not comparisons:
    raise records.RecordError(f'{path}: holds no usable rankings')
  return comparisons, counts


def _comparison(
  row: dict[str, str],
  pairs: Sequence[tuple[str, str]],
  criterion: Criterion,
  line: int,
) -> records.Comparison | None:
  """A row as a comparison; None if it has fewer than two different texts.

  `pairs` are the columns of texts and scores. Raises ValueError for a bad row.
  """
  if row['_tainted'] != 'False':
    raise ValueError(
      f"'_tainted' is {row['_tainted']!r}; expected True or False"
    )
  if not row['worker']:
    raise ValueError("'worker' is empty; a ranking needs its worker")
  try:
    about = _about(row['mr'])
  except ValueError as error:
    raise ValueError(f"'mr': {error}") from error
  scores_by_text = collections.defaultdict(list)
  spelling: dict[str, str] = {}
  for text_column, score_column in pairs:
    text = ' '.join(row[text_column].split())
    if not text:
      raise ValueError(f'{text_column!r} is empty; drop the row')
    try:
      score = float(row[score_column])
    except ValueError:
      score = math.nan
    if not math.isfinite(score):
      raise ValueError(
        f'{score_column!r} is {row[score_column]!r}, not a number'
      )
    # Texts that differ only in how accents are encoded are the same.
    text = spelling.setdefault(records.composed(text), text)
    scores_by_text[text].append(score)
  if len(scores_by_text) < 2:
    return None
  return records.Comparison(
    completions=tuple(scores_by_text),
    ranks=records.ranks_of_scores(map(np.mean, scores_by_text.values())),
    id=f'{criterion}:{line}',
    labeler=f'{criterion}:{row["worker"]}',
    category='e2e_rankings',
    **about,
  )


def split_workers(
  comparisons: Sequence[records.Comparison], seed: int
) -> tuple[set[str], set[str]]:
  """Two halves of the labelers, with about the same number of comparisons.

  In an order drawn from the seed, each labeler goes to the half with fewer
  comparisons so far, so that the few who did most of the work are spread over
  both halves.
  """
  counts = collections.Counter(c.labeler for c in comparisons)
  labelers = sorted(counts)
  np.random.default_rng(seed).shuffle(labelers)
  halves = (set(), set())
  totals = [0, 0]
  for labeler in labelers:
    half = int(totals[1] < totals[0])
    halves[half].add(labeler)
    totals[half] += counts[labeler]
  return halves


def write(
  root: epath.PathLike,
  directory: epath.PathLike,
  *,
  seed: int,
  vocab_size: int | None,
  criteria: Sequence[Criterion],
  words_per_document: int,
  valid_documents: float,
) -> dict[str, int | dict[str, int]]:
  """Writes everything that the stages after `data` read.

  Meaning representations are split 80/10/10 in each of the two sources. All
  rows of a representation, from either source and with facts in any order, go
  to one split. Workers are split into two halves: the rankings of the first,
  `comparisons_*`, train the reward model, and those of the second,
  `judge_comparisons_*`, train the judge. (With both criteria a person may be in
  both halves, under two numbers.) PPO trains on the training representations of
  both sources and is evaluated on the others; those of e2e_nlg have human
  references.

  Files in `directory`, all or none: tokenizer/, documents_{train,valid},
  demonstrations_{train,valid,test}, comparisons_{train,valid,test},
  judge_comparisons_{train,valid,test}, ppo_prompts_train, prompts_{valid,test}
  (.jsonl) and hygiene.json. Prompts have `metadata`: mr, slots, references
  (possibly none).

  Args:
    root: the folder with e2e_nlg, e2e_rankings and books.
    directory: the output folder.
    seed: of all splits.
    vocab_size: vocabulary size of a BPE trained on the training text (4,000 to
      8,000 suit a model of a few million parameters); None uses GPT-2's BPE.
    criteria: 'quality', 'naturalness' or both.
    words_per_document: see `sources.read_documents`.
    valid_documents: share of the documents held out; they are drawn
      individually, so training reads other parts of the same books.

  Returns:
    The counts in hygiene.json.

  Raises:
    RecordError: a file is missing or malformed.
  """
  root, directory = epath.Path(root), epath.Path(directory)
  if not criteria or len(set(criteria)) != len(criteria):
    raise ValueError(f'criteria are {list(criteria)}; name each once')
  if not 0 < valid_documents < 1:
    raise ValueError(
      f'valid_documents is {valid_documents}; it must be in (0, 1)'
    )
  demonstrations, repeated = read_demonstrations(
    _find(root / 'e2e_nlg', 'devset.csv')
  )
  comparisons: list[records.Comparison] = []
  report: dict[str, int | dict[str, int]] = {}
  for criterion in criteria:
    path = _find(root / 'e2e_rankings', f'{criterion}.csv')
    read, counts = read_rankings(path, criterion)
    comparisons.extend(read)
    report[f'{criterion}_rows'] = dataclasses.asdict(counts)

  prompts, split_of, personal_data = _split(demonstrations, comparisons, seed)
  documents = sources.read_documents(
    root / 'books', words_per_document=words_per_document
  )
  held_out = (
    np.random.default_rng(seed).random(len(documents)) < valid_documents
  )
  documents_of = {'train': [], 'valid': []}
  for document, is_out in zip(documents, held_out, strict=True):
    documents_of['valid' if is_out else 'train'].append(document)
  rater_half, judge_half = split_workers(comparisons, seed)

  def split_of_row(row):
    return split_of[row.metadata['mr']]

  files: dict[str, list] = {
    'documents_train': documents_of['train'],
    'documents_valid': documents_of['valid'],
    'ppo_prompts_train': prompts['train'],
    'prompts_valid': prompts['valid'],
    'prompts_test': prompts['test'],
  }
  for split in FRACTIONS:
    files[f'demonstrations_{split}'] = [
      d for d in demonstrations if split_of_row(d) == split
    ]
    for name, half in (('', rater_half), ('judge_', judge_half)):
      files[f'{name}comparisons_{split}'] = [
        c for c in comparisons if c.labeler in half and split_of_row(c) == split
      ]

  if vocab_size is None:
    tokenizer = tokenizer_lib.load_gpt2_bpe(
      *(_find(root / 'gpt2_bpe', n) for n in ('encoder.json', 'vocab.bpe'))
    )
  else:
    tokenizer = tokenizer_lib.train_bpe(_training_texts(files), vocab_size)
  report |= {
    'meaning_representations': {s: len(p) for s, p in prompts.items()},
    'repeated_sentences': repeated,
    'duplicates': len(split_of) - len({*map(facts, split_of)}),
    'personal_data': personal_data,
    'rows_of_personal_data': sum(
      split_of_row(row) is None for row in (*demonstrations, *comparisons)
    ),
    'workers': {'reward_model': len(rater_half), 'judge': len(judge_half)},
    'vocab_size': tokenizer.vocab_size,
    'records': {name: len(rows) for name, rows in files.items()},
  }
  content = json.dumps(report, indent=2) + '\n'
  names = [*(f'{name}.jsonl' for name in files), 'hygiene.json', 'tokenizer/*']
  with folders.writing(
    directory, names, command='restaurant', replace=True
  ) as unfinished:
    tokenizer.save(unfinished / 'tokenizer')
    for name, rows in files.items():
      records.write_jsonl(unfinished / f'{name}.jsonl', rows)
    records.write_bytes(unfinished / 'hygiene.json', content.encode())
  return report


def _training_texts(files: dict[str, list]) -> Iterator[str]:
  for kind in ('documents', 'demonstrations', 'comparisons'):
    for row in files[f'{kind}_train']:
      yield row.text if kind == 'documents' else row.prompt
      if kind == 'demonstrations':
        yield row.response
      yield from getattr(row, 'completions', ())


def facts(mr: str) -> Facts:
  """The key for finding duplicates of a meaning representation.

  Order, case and the encoding of accents do not count.
  """
  return tuple(
    sorted(
      (records.comparable(slot), records.comparable(value))
      for slot, value in parse_meaning(mr)
    )
  )


def _split(
  demonstrations: Sequence[records.Demonstration],
  comparisons: Sequence[records.Comparison],
  seed: int,
) -> tuple[dict[str, list[records.Prompt]], dict[str, str | None], int]:
  """Splits meaning representations, each treated as a user of the paper.

  Returns:
    The prompts of each split; the split of each representation, or None if it
    is dropped for personal data; and the number of prompts dropped for that.
  """
  split_of: dict[Facts, str | None] = {}
  prompts = {split: [] for split in FRACTIONS}
  for rows in (demonstrations, comparisons):
    groups = collections.defaultdict(list)
    for row in rows:
      groups[facts(row.metadata['mr'])].append(row)
    new = [_prompt_of(g) for f, g in groups.items() if f not in split_of]
    for split, part in hygiene.split_by_user(new, FRACTIONS, seed)[0].items():
      split_of |= {facts(prompt.id): split for prompt in part}
      prompts[split] += [dataclasses.replace(p, user='') for p in part]
  train, personal_data = hygiene.drop_personal_data(prompts['train'])
  dropped = {p.id for p in prompts['train']} - {p.id for p in train}
  split_of |= dict.fromkeys(map(facts, dropped))
  prompts['train'] = train
  names = {row.metadata['mr'] for row in (*demonstrations, *comparisons)}
  return prompts, {mr: split_of[facts(mr)] for mr in names}, personal_data


def _prompt_of(group: Sequence[Any]) -> records.Prompt:
  """The prompt for a meaning representation, with its human references."""
  mr = group[0].metadata['mr']
  references = [
    row.response for row in group if isinstance(row, records.Demonstration)
  ]
  return records.Prompt(
    id=mr,
    text=group[0].prompt,
    user=mr,
    category=group[0].category,
    metadata={**group[0].metadata, 'references': references},
  )


def _find(folder: epath.Path, name: str) -> epath.Path:
  for candidate in (folder / name, folder / f'{name}.gz'):
    if candidate.exists():
      return candidate
  raise records.RecordError(
    f'{folder / name}: no such file, nor {name}.gz; point the data root at the '
    'folder that holds e2e_nlg, e2e_rankings and books'
  )
