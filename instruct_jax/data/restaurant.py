"""Real human data: the E2E restaurant descriptions and their crowd ratings.

A meaning representation is a list of facts about a restaurant, as in
`name[Alimentum], area[city centre], familyFriendly[no]`; the response is one
or two sentences that say them. People wrote sentences (E2E NLG data set,
Novikova et al. 2017) and, for other representations, crowd workers scored the
outputs of five systems, for quality or for naturalness (E2E NLG Challenge,
Dusek et al. 2018). Demonstrations, rankings with K = 5, ties and worker ids:
the three inputs of the recipe, from people, small enough for a CPU.

  root/e2e_nlg/devset.csv.gz            mr, ref
  root/e2e_rankings/quality.csv.gz      worker, mr, ref1-5, quality1-5, ...
  root/e2e_rankings/naturalness.csv.gz  worker, mr, ref1-5, natur1-5, ...
  root/books/*.txt.gz                   pretraining text
  root/gpt2_bpe/                        only if vocab_size is None

Worker numbers are serial per file: `quality:w0003` and `naturalness:w0003` are
not known to be one person, nor known to be two.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Literal

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


@dataclasses.dataclass(frozen=True)
class RankingCounts:
  """What became of the rows of a rating file.

  Attributes:
    rows: rows in the file.
    tainted: dropped; the collectors marked the worker's check items failed.
    too_few: dropped; fewer than two different texts.
    merged: rows in which some of the five texts were the same.
    all_tied: kept, though every completion has the same rank.
  """

  rows: int
  tainted: int
  too_few: int
  merged: int
  all_tied: int


def parse_meaning(mr: str) -> list[tuple[str, str]]:
  """`name[Aromi], area[riverside]` to [('name', 'Aromi'), ...], in order.

  Raises:
    ValueError: anything else.
  """
  slots, position = [], 0
  while position < len(mr):
    match = _SLOT.match(mr, position)
    if match is None:
      break
    slots.append((match[1], match[2]))
    position = match.end()
  if not slots or position != len(mr) or mr.endswith(', '):
    raise ValueError(
      f'not a meaning representation: {mr!r} at column {position + 1}; '
      'expected slot[value], slot[value]'
    )
  return slots


def prompt_text(mr: str) -> str:
  """A meaning representation as the model is given it.

  `name: Aromi, area: riverside` and a line feed. The brackets go because the
  pretraining books have hardly any; the line feed stays because facts and
  sentence have none, so this one token, always the last of a prompt, says that
  the facts are over.
  """
  return (
    ', '.join(f'{slot}: {value}' for slot, value in parse_meaning(mr)) + '\n'
  )


def read_demonstrations(
  path: epath.PathLike,
) -> list[records.Demonstration]:
  """Reads `mr,ref` rows (.csv or .csv.gz) as demonstrations.

  Runs of white space in a reference become one space; the same reference for
  the same representation counts once. `metadata` has the representation
  (`mr`) and its `slots`; `id` is `e2e_nlg:LINE`.

  Raises:
    RecordError: as in `records.read_jsonl`, with file and line.
  """
  return read_demonstrations_and_count(path)[0]


def read_demonstrations_and_count(
  path: epath.PathLike,
) -> tuple[list[records.Demonstration], int]:
  """`read_demonstrations`, and how many rows repeated an earlier one."""
  demonstrations, bad_lines, seen, repeated = [], [], set(), 0
  for line, row in sources.read_csv(path, ('mr', 'ref')):
    try:
      slots = parse_meaning(row['mr'])
    except ValueError as error:
      bad_lines.append((line, f"'mr': {error}"))
      continue
    response = ' '.join(row['ref'].split())
    if not response:
      bad_lines.append((line, "'ref' is empty; drop the row"))
      continue
    if (row['mr'], records.composed(response)) in seen:
      repeated += 1
      continue
    seen.add((row['mr'], records.composed(response)))
    demonstrations.append(
      records.Demonstration(
        prompt=prompt_text(row['mr']),
        response=response,
        id=f'e2e_nlg:{line}',
        category='e2e_nlg',
        metadata={'mr': row['mr'], 'slots': [list(slot) for slot in slots]},
      )
    )
  records.raise_problems(path, bad_lines)
  return demonstrations, repeated


def read_rankings(
  path: epath.PathLike, criterion: Criterion = 'quality'
) -> list[records.Comparison]:
  """Reads one worker's five scores a row as a ranking with ties.

  The scores are magnitude estimates against a reference of 100, on a scale of
  each worker's own, so only their order within a row is used; equal scores
  tie. Texts that are the same but for white space become one completion with
  the mean of their scores: no model could tell them apart. (The `dupl_ref`
  columns also mark texts that differ in case or punctuation. Those were scored
  apart, often differently, and stay apart.) Rows marked as tainted and rows
  with fewer than two different texts are dropped.

  Args:
    path: quality.csv or naturalness.csv, or the same with .gz.
    criterion: which of the two it is.

  Returns:
    Comparisons of K = 2 to 5; `labeler` is `criterion:worker`; `metadata` has
    `mr` and `slots`; `id` is `criterion:LINE`.

  Raises:
    RecordError: as in `records.read_jsonl`, with file and line.
  """
  return read_rankings_and_counts(path, criterion)[0]


def read_rankings_and_counts(
  path: epath.PathLike, criterion: Criterion
) -> tuple[list[records.Comparison], RankingCounts]:
  """`read_rankings`, and what became of the rows."""
  if criterion not in SCORE_COLUMNS:
    raise ValueError(
      f'criterion is {criterion!r}; use one of {", ".join(SCORE_COLUMNS)}'
    )
  numbers = range(1, NUM_SYSTEMS + 1)
  score_columns = [f'{SCORE_COLUMNS[criterion]}{i}' for i in numbers]
  text_columns = [f'ref{i}' for i in numbers]
  comparisons, bad_lines = [], []
  count = collections.Counter()
  columns = ('worker', '_tainted', 'mr', *score_columns, *text_columns)
  for line, row in sources.read_csv(path, columns):
    count['rows'] += 1
    if row['_tainted'] not in ('True', 'False'):
      bad_lines.append(
        (line, f"'_tainted' is {row['_tainted']!r}; expected True or False")
      )
      continue
    if row['_tainted'] == 'True':
      count['tainted'] += 1
      continue
    scores_by_text, problem = _scores_by_text(row, text_columns, score_columns)
    try:
      slots = parse_meaning(row['mr'])
    except ValueError as error:
      problem = f"'mr': {error}"
    if not row['worker']:
      problem = "'worker' is empty; rankings need to know who ranked"
    if problem:
      bad_lines.append((line, problem))
      continue
    if len(scores_by_text) < 2:
      count['too_few'] += 1
      continue
    count['merged'] += len(scores_by_text) < NUM_SYSTEMS
    scores = [float(np.mean(values)) for values in scores_by_text.values()]
    ranks = records.ranks_of_scores(scores)
    count['all_tied'] += len(set(ranks)) == 1
    comparisons.append(
      records.Comparison(
        prompt=prompt_text(row['mr']),
        completions=tuple(scores_by_text),
        ranks=ranks,
        id=f'{criterion}:{line}',
        labeler=f'{criterion}:{row["worker"]}',
        category='e2e_rankings',
        metadata={'mr': row['mr'], 'slots': [list(slot) for slot in slots]},
      )
    )
  records.raise_problems(path, bad_lines)
  if not comparisons:
    raise records.RecordError(f'{path}: holds no usable rankings')
  fields = dataclasses.fields(RankingCounts)
  return comparisons, RankingCounts(**{f.name: count[f.name] for f in fields})


def split_workers(
  comparisons: Sequence[records.Comparison], seed: int
) -> tuple[frozenset[str], frozenset[str]]:
  """Two halves of the labelers, of about the same number of comparisons.

  In an order drawn from the seed, each labeler goes to the half that has fewer
  comparisons so far; so the few who did most of the work do not end up on one
  side.
  """
  counts = collections.Counter(c.labeler for c in comparisons)
  labelers = sorted(counts)
  np.random.default_rng(seed).shuffle(labelers)
  halves: tuple[set[str], set[str]] = (set(), set())
  totals = [0, 0]
  for labeler in labelers:
    half = int(totals[1] < totals[0])
    halves[half].add(labeler)
    totals[half] += counts[labeler]
  return frozenset(halves[0]), frozenset(halves[1])


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

  Meaning representations are split 80/10/10 in each of the two sources, and all
  that belongs to one goes to one split, whichever source it is from and however
  its facts are ordered. The workers are
  split in two halves: the first half's rankings are `comparisons_*` and train
  the reward model, the second half's are `judge_comparisons_*` and train the
  judge. (With both criteria a person may be in both halves, under the two
  numbers that the two files gave them.) Policies are trained with PPO on the
  training representations of both sources and evaluated on the others; those
  of e2e_nlg have human references.

  Files in `directory`, all or none: tokenizer/, documents_{train,valid},
  demonstrations_{train,valid,test}, comparisons_{train,valid,test},
  judge_comparisons_{train,valid,test}, ppo_prompts_train, prompts_{valid,test}
  (.jsonl) and hygiene.json. Prompts carry `metadata`: mr, slots, references
  (possibly none).

  Args:
    root: the folder that holds e2e_nlg, e2e_rankings and books.
    directory: where to write.
    seed: of all splits.
    vocab_size: entries of a BPE trained on the training text (4,000 to 8,000
      suit a model of a few million parameters); None takes GPT-2's.
    criteria: which ratings to use: 'quality', 'naturalness' or both.
    words_per_document: see `sources.read_documents`.
    valid_documents: share of the documents held out; they are drawn one by
      one, so training has seen other parts of the same books.

  Returns:
    The counts that are in hygiene.json.

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
  demonstrations, repeated = read_demonstrations_and_count(
    _find(root / 'e2e_nlg', 'devset.csv')
  )
  comparisons: list[records.Comparison] = []
  report: dict[str, int | dict[str, int]] = {}
  for criterion in criteria:
    path = _find(root / 'e2e_rankings', f'{criterion}.csv')
    read, counts = read_rankings_and_counts(path, criterion)
    comparisons.extend(read)
    report[f'{criterion}_rows'] = dataclasses.asdict(counts)

  # A representation plays the part that a user has in the paper: none in two
  # splits.
  split_of: dict[Facts, str] = {}
  prompts_by_split: dict[str, list[records.Prompt]] = {s: [] for s in FRACTIONS}
  for groups in (_by_facts(demonstrations), _by_facts(comparisons)):
    new = {f: group for f, group in groups.items() if f not in split_of}
    facts_of = {group[0].metadata['mr']: f for f, group in new.items()}
    prompts = [_prompt_of(group) for group in new.values()]
    splits, _ = hygiene.split_by_user(prompts, FRACTIONS, seed)
    for split, part in splits.items():
      split_of |= {facts_of[prompt.user]: split for prompt in part}
      prompts_by_split[split].extend(
        dataclasses.replace(prompt, user='') for prompt in part
      )
  named = {row.metadata['mr'] for row in (*demonstrations, *comparisons)}
  duplicates = len(named) - len(split_of)
  train, personal_data = hygiene.drop_personal_data(prompts_by_split['train'])
  kept = {prompt.id for prompt in train}
  for prompt in prompts_by_split['train']:
    if prompt.id not in kept:
      del split_of[facts(prompt.id)]
  prompts_by_split['train'] = train

  documents = sources.read_documents(
    root / 'books', words_per_document=words_per_document
  )
  held_out = (
    np.random.default_rng(seed).random(len(documents)) < valid_documents
  )
  train_documents = [
    d for d, out in zip(documents, held_out, strict=True) if not out
  ]
  rater_half, judge_half = split_workers(comparisons, seed)

  def split_of_row(row):
    return split_of.get(facts(row.metadata['mr']))

  files: dict[str, list] = {
    'documents_train': train_documents,
    'documents_valid': [
      d for d, out in zip(documents, held_out, strict=True) if out
    ],
    'ppo_prompts_train': prompts_by_split['train'],
    'prompts_valid': prompts_by_split['valid'],
    'prompts_test': prompts_by_split['test'],
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
      _find(root / 'gpt2_bpe', 'encoder.json'),
      _find(root / 'gpt2_bpe', 'vocab.bpe'),
    )
  else:
    tokenizer = tokenizer_lib.train_bpe(_training_texts(files), vocab_size)
  report |= {
    'meaning_representations': {s: len(p) for s, p in prompts_by_split.items()},
    'repeated_sentences': repeated,
    'duplicates': duplicates,
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
    records.write_bytes(unfinished / 'hygiene.json', content.encode('utf-8'))
  return report


def _training_texts(files: dict[str, list]) -> Iterator[str]:
  for document in files['documents_train']:
    yield document.text
  for demonstration in files['demonstrations_train']:
    yield demonstration.prompt
    yield demonstration.response
  for comparison in files['comparisons_train']:
    yield comparison.prompt
    yield from comparison.completions


def facts(mr: str) -> Facts:
  """A representation by which copies are told: whatever order, case and
  spelling of accents."""
  return tuple(
    sorted(
      (records.comparable(slot), records.comparable(value))
      for slot, value in parse_meaning(mr)
    )
  )


def _by_facts(
  examples: Sequence[records.Demonstration] | Sequence[records.Comparison],
) -> dict[Facts, list]:
  groups = collections.defaultdict(list)
  for example in examples:
    groups[facts(example.metadata['mr'])].append(example)
  return groups


def _prompt_of(
  group: Sequence[records.Demonstration] | Sequence[records.Comparison],
) -> records.Prompt:
  """One prompt for a representation, with its human references."""
  mr = group[0].metadata['mr']
  references = [
    example.response
    for example in group
    if isinstance(example, records.Demonstration)
  ]
  return records.Prompt(
    id=mr,
    text=group[0].prompt,
    user=mr,
    category=group[0].category,
    metadata={**group[0].metadata, 'references': references},
  )


def _scores_by_text(
  row: dict[str, str], text_columns: list[str], score_columns: list[str]
) -> tuple[dict[str, list[float]], str]:
  """The scores of each distinct text, and what is wrong with the row or ''."""
  scores_by_text = collections.defaultdict(list)
  spelt: dict[str, str] = {}
  for text_column, score_column in zip(
    text_columns, score_columns, strict=True
  ):
    text = ' '.join(row[text_column].split())
    if not text:
      return {}, f'{text_column!r} is empty; drop the row'
    try:
      score = float(row[score_column])
    except ValueError:
      score = math.nan
    if not math.isfinite(score):
      return {}, f'{score_column!r} is {row[score_column]!r}, not a number'
    # Copies in composed and in decomposed letters are one text.
    text = spelt.setdefault(records.composed(text), text)
    scores_by_text[text].append(score)
  return dict(scores_by_text), ''


def _find(folder: epath.Path, name: str) -> epath.Path:
  for candidate in (folder / name, folder / f'{name}.gz'):
    if candidate.exists():
      return candidate
  raise records.RecordError(
    f'{folder / name}: no such file, nor {name}.gz; point the data root at the '
    'folder that holds e2e_nlg, e2e_rankings and books'
  )
