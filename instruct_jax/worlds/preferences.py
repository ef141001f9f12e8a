"""Preferences of the user's own: their data stage, and the judge they teach.

Rankings, and where they are given demonstrations, prompts and documents, become
the JSONL files that the other stages read. The split is by conversation, after
data hygiene. A share of the training conversations, ranked by labelers of their
own where labelers have ids, teaches a second reward model, the judge. Lengths
of rows are measured in tokens of the model and written to lengths.json.
"""

import collections
import datetime
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from instruct_jax import hub, judge_fns, model_folder
from instruct_jax.data import (
  convert,
  folders,
  hygiene,
  importers,
  loader,
  records,
  sources,
)
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import figures, samples
from instruct_jax.infra import run as run_lib
from instruct_jax.models import hf

PROCESSES = 'first'

LENGTHS_FILE = 'lengths.json'
REFERENCES = 'references'  # In the evaluation, the demonstrations' name.
# Config keys of sources -> what they hold.
KINDS = {
  'preferences': records.Comparison,
  'test_preferences': records.Comparison,
  'demonstrations': records.Demonstration,
  'prompts': records.Prompt,
}
_BY_MODELS = (
  'demonstrations that models wrote, according to the file (convert keeps them '
  'with --model_outputs)'
)
_MULTIPLE = 8  # Of columns of a prompt, and of a response.
_MIN_COLUMNS = 8
# Prompts that a split should hold at least, up to this share of all.
_MIN_HELD_OUT = 40
_MAX_SHARE = 0.2
_NUM_MEASURED = 20_000  # Records whose tokens are counted.


class OtherConversations(judge_fns.RewardModel):
  """A reward model that other conversations taught, and other labelers."""

  def __init__(self, *args):
    super().__init__(*args)
    self.name = (
      'a second reward model (no person), trained on rankings of other '
      'conversations, by other labelers where labelers have ids'
    )


WORLD = figures.World(
  about='Preferences that the user brought; config.json names their files.',
  has_people=True,
)


def published_tldr(prompts, texts) -> dict[str, dict[str, dict[str, Any]]]:
  """Published figures of TL;DR with Pythia 1B, for the report.

  Huang et al. 2024 (arXiv 2403.17031); two of the four seeds of PPO fail.
  """
  del prompts, texts
  against = 'win rate against the references'
  rows = {'SFT': {against: 0.33}}
  for number, rate in enumerate((0.20, 0.22, 0.54, 0.62), 1):
    rows[f'PPO, run {number} of four, by rate'] = {against: rate}
  rows['reward model'] = {'accuracy': 0.63}
  return {'Published figures (Huang et al. 2024, Pythia 1B, a GPT judge)': rows}


TLDR = figures.World(
  about='Summaries of Reddit posts and rankings of them by people (TL;DR; '
  'Stiennon et al. 2020).',
  has_people=True,
  tables_fn=published_tldr,
)


def validate(config: ConfigDict) -> None:
  """Checks the config.

  Raises:
    ValueError: the key, what it is, and what it should be.
  """
  for key in ('valid_fraction', 'test_fraction', 'judge_fraction'):
    is_optional = key == 'judge_fraction'
    if not (0 < config[key] < 0.9 or (is_optional and config[key] == 0)):
      bounds = '[0, 0.9)' if is_optional else '(0, 0.9)'
      raise ValueError(f'{key} must be in {bounds}: {config[key]}')
  if config.valid_fraction + config.test_fraction >= 0.9:
    raise ValueError(
      'valid_fraction + test_fraction must leave training data: '
      f'{config.valid_fraction} + {config.test_fraction}'
    )
  for key in config:
    is_number = not isinstance(config[key], ConfigDict)
    if key.startswith('max_') and is_number and config[key] < 0:
      raise ValueError(f'{key} must be 0 or more: {config[key]}')
  if not 0 < config.kept_fraction <= 1:
    raise ValueError(f'kept_fraction must be in (0, 1]: {config.kept_fraction}')
  if config.references and not config.demonstrations:
    raise ValueError(
      'references compares the demonstrations of test prompts, and there are '
      'none; give --config.demonstrations=FORMAT:PATH'
    )
  other_documents(config)


def inputs(config: ConfigDict) -> dict[str, str]:
  """What this stage reads, by config key."""
  found = {'model': config.model, 'preferences': config.preferences}
  if config.tokenizer:
    found['tokenizer'] = config.tokenizer
  for key in KINDS:
    for number, (_, path) in enumerate(sources_of(config[key])):
      found.pop(key, None)
      found[f'{key}/{number}'] = path.removeprefix('datasets:')
  for number, path in enumerate(filter(None, config.documents.split(','))):
    found[f'documents/{number}'] = path.removeprefix('datasets:')
  for name, path in other_documents(config).items():
    found[f'other_documents/{name}'] = path.removeprefix('datasets:')
  return found


def other_documents(config: ConfigDict) -> dict[str, str]:
  """Name -> source of text on which the alignment tax is measured, too."""
  key = 'other_documents'
  found = model_folder.named_folders(config[key], key)
  if bad := {'pretraining', 'train', 'valid'} & set(found):
    raise ValueError(f'{key}: choose another name than {", ".join(bad)}')
  return found


# --- Sources ------------------------------------------------------------------


def sources_of(spec: str) -> list[tuple[str, str]]:
  """(format, path) of each part of 'FORMAT:PATH,FORMAT:PATH'.

  The format is one of `importers.FORMATS`, or '' for JSONL of our own.

  Raises:
    ValueError: a path comes twice.
  """
  found = []
  for part in filter(None, spec.split(',')):
    name, _, path = part.partition(':')
    found.append((name, path) if name in importers.FORMATS else ('', part))
  paths = [path for _, path in found]
  if twice := {path for path in paths if paths.count(path) > 1}:
    raise ValueError(f'{spec}: {min(twice)} is given twice')
  return found


def files_of(path: str, name: str) -> list[str]:
  """A file, or the files of a folder by name; `name` is that of the format.

  Raises:
    RecordError: nothing is there.
  """
  if not epath.Path(path.removeprefix('datasets:')).exists():
    raise records.RecordError(
      f'{path}: no such file; sources are FORMAT:PATH with one of '
      f'{", ".join(importers.FORMATS)}, or JSONL of our own'
    )
  if name:
    return sources.files_of(path)
  return sources.files_of(path, sources.JSON_SUFFIXES)


def read(
  config: ConfigDict, key: str, skipped: collections.Counter
) -> tuple[list[records.Record], list[records.Record]]:
  """Records of the sources of a key: (to be split, of a test split).

  Files of a folder whose names, or whose folders' in it, begin with the word
  'test' are its test split.

  Args:
    config: of the stage.
    key: one of `KINDS`.
    skipped: reason -> entries that a format cannot use; added to.

  Raises:
    RecordError: a file is missing, or not of its format, or gives no record.
  """
  kind, found = KINDS[key], ([], [])
  for name, path in sources_of(config[key]):
    own, before = collections.Counter(), sum(map(len, found))
    files = files_of(path, name)
    if unread := sources.unread(files, path):
      run_lib.say(f'data: {key}: {path}: not read: {", ".join(unread[:20])}')
    for file, own_name in importers.names_of(files).items():
      if name:
        imported = importers.FORMATS[name](file).named(file, own_name)
        own.update(imported.skipped)
        if kind is records.Demonstration:
          number = len(imported.model_demonstrations)
          own[_BY_MODELS] += number
        rows = {
          records.Comparison: imported.comparisons,
          records.Demonstration: imported.demonstrations,
          records.Prompt: imported.prompts(),
        }[kind]
      else:
        rows = records.read_jsonl(file, kind)
      found[sources.is_test_split(file, path)].extend(rows)
    if sum(map(len, found)) == before:
      raise records.RecordError(_nothing_for(key, name, path, +own))
    skipped.update(own)
  return found


def _nothing_for(key, name, path, skipped) -> str:
  """The message about a source without records."""
  left_out = ', '.join(f'{number} {why}' for why, number in skipped.items())
  return (
    f'{path}: gives no {key}; {name} is {importers.FORMATS[name].kind}; left '
    f'out: {left_out or "nothing"}'
  )


def best_answers(
  comparisons: Iterable[records.Comparison],
) -> list[records.Demonstration]:
  """The answer that each ranking puts first, as a demonstration.

  Rankings that put no answer first, or an empty one, or one that was cut, give
  none: a demonstration teaches where to end, too.
  """
  found = {}
  for row in comparisons:
    if row.ranks.count(min(row.ranks)) > 1:
      continue
    best = row.ranks.index(min(row.ranks))
    response = row.completions[best]
    was_cut = bool(row.ended) and not row.ended[best]
    if response.strip() and not was_cut:
      about = {'id': row.id, 'user': row.user, 'turns': row.turns}
      demonstration = records.Demonstration(row.prompt, response, **about)
      found.setdefault((row.prompt, response), demonstration)
  return list(found.values())


def distinct_prompts(
  rows: Iterable[records.Record],
) -> list[records.Prompt]:
  """The prompt of each record, each once, numbered in order."""
  found = {}
  for row in rows:
    text = row.text if isinstance(row, records.Prompt) else row.prompt
    found.setdefault(
      (records.composed(text), row.turns),
      records.Prompt(
        id=f'p{len(found)}',
        text=text,
        user=row.user,
        category=row.category,
        metadata=row.metadata,
        turns=row.turns,
      ),
    )
  return list(found.values())


# --- Lengths ------------------------------------------------------------------


def propose_lengths(
  config: ConfigDict,
  tokenizer: tokenizer_lib.Tokenizer,
  rows: Sequence[records.Record],
  context_length: int,
) -> dict[str, Any]:
  """Columns of prompts, responses and rows, with the shares that they keep.

  Each length holds `kept_fraction` of the records, up to a given maximum and
  what the model's context has room for.

  Args:
    config: of the stage; lengths that it gives are taken.
    tokenizer: counts the tokens.
    rows: rankings, demonstrations and prompts, to be measured.
    context_length: of the model, in tokens.

  Raises:
    ValueError: no prompt can be read, or nothing fits.
  """
  rng = np.random.default_rng([config.seed, 1])

  def drawn(rows):
    return [rows[i] for i in rng.permutation(len(rows))[:_NUM_MEASURED]]

  answered = drawn([row for row in rows if _answers(row)])
  rows = answered + drawn([row for row in rows if not _answers(row)])
  encoded, refusals = loader.encode_prompts(rows, tokenizer)
  if all(ids is None for ids in encoded):
    raise ValueError(
      f'preferences: the chat template refuses every prompt: {refusals[0]}; '
      'leave out what it refuses, such as system turns, or give another one '
      "(--config.template='User: {prompt} Assistant:')"
    )
  prompts = np.array([len(ids) for ids in encoded if ids is not None])
  both = np.array(
    [
      (
        len(ids),
        max(map(len, tokenizer.encode_responses(_answers(row), ended=True))),
      )
      for row, ids in zip(answered, encoded, strict=False)
      if ids is not None
    ]
  ).reshape(-1, 2)
  if not len(both):
    raise ValueError(
      'preferences: the chat template refuses every prompt that has an answer: '
      f'{refusals[0]}'
    )
  answers, whole = both[:, 1], both.sum(axis=1)

  def propose(key, lengths, room):
    if config[key] is not None:
      return config[key]
    wanted = np.quantile(lengths, config.kept_fraction)
    wanted = int(-(-wanted // _MULTIPLE) * _MULTIPLE)
    return min(wanted, config[f'max_{key}'], room - room % _MULTIPLE)

  response = propose('response_length', answers, context_length // 2)
  prompt = propose('prompt_length', prompts, context_length - response)
  if min(prompt, response) < _MIN_COLUMNS or prompt + response > context_length:
    raise ValueError(
      f'prompt_length {prompt} + response_length {response} do not fit the '
      f"model's context of {context_length} tokens"
    )
  fits = whole <= prompt + response
  if not fits.any():
    raise ValueError(
      f'none of {len(whole)} answers fits prompt_length {prompt} + '
      f'response_length {response} tokens: the shortest has '
      f'{whole.min()}; raise max_prompt_length or '
      'max_response_length, or take a model with a longer context'
    )
  return {
    'prompt_length': int(prompt),
    'response_length': int(response),
    'row_length': int(prompt + response),
    'ptx_row_length': int(prompt + response),
    'dropped': {
      'prompts': float(np.mean(prompts > prompt)),
      'rankings and demonstrations': float(1 - np.mean(fits)),
      'answers longer than response_length': float(np.mean(answers > response)),
    },
  }


def _answers(row: records.Record) -> tuple[str, ...]:
  if isinstance(row, records.Demonstration):
    return (row.response,)
  return row.completions if isinstance(row, records.Comparison) else ()


def describe_lengths(name: str, lengths: Mapping[str, Any]) -> str:
  """One line for users about `propose_lengths`."""
  shares = ', '.join(f'{v:.1%} of {k}' for k, v in lengths['dropped'].items())
  return (
    f'{name}: prompt_length {lengths["prompt_length"]}, response_length '
    f'{lengths["response_length"]}, row_length {lengths["row_length"]} tokens; '
    f'beyond them: {shares}'
  )


# --- Splits -------------------------------------------------------------------


def split_fractions(
  config: ConfigDict, num_prompts: int, has_test: bool
) -> dict[str, float]:
  """Split -> its share of the prompts; small sets hold out larger shares.

  Args:
    config: of the stage.
    num_prompts: of all splits.
    has_test: whether the test set is given, so that none is split off.
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


def judge_side(
  comparisons: Sequence[records.Comparison], judge_fraction: float, seed: int
) -> tuple[list[records.Comparison], list[records.Comparison], int]:
  """Rankings for the reward model and for the judge, of other conversations.

  Where two labelers or more have ids, no labeler is on both sides either:
  labelers are dealt out first, a conversation goes where most of its rankings
  are from, and rankings by labelers of the other side are left out.

  Args:
    comparisons: of one split.
    judge_fraction: share of the conversations, or else of the rankings of
      labelers, that goes to the judge; 0 leaves all to the reward model.
    seed: of the deal.

  Returns:
    (the reward model's, the judge's, how many were left out).
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
  """Labeler -> whether the judge learns from them.

  In an order drawn from the seed, each goes to the side that is furthest below
  its share of the rankings.
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
  """The demonstration of each prompt that has one, as an answer to compare."""

  found = {}
  for row in rows:
    found.setdefault(_words(row), row.response)
  kept = [
    (prompt, found[_words(prompt)])
    for prompt in prompts
    if _words(prompt) in found
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
  """The records whose prompts hold no personal data (A.1)."""

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
  """The rankings or demonstrations that fit a row, in the order given; and how
  many others have a prompt that the chat template refuses."""
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
  """At most `number` of the rows (0: all), drawn by seed, in their order."""
  if not number or len(rows) <= number:
    return rows
  chosen = np.random.default_rng([seed, 3]).permutation(len(rows))[:number]
  return [rows[i] for i in sorted(chosen)]


def held_out(
  config: ConfigDict, documents: Sequence[records.Document]
) -> Sequence[records.Document]:
  """The first `max_valid` of them, with about `max_valid_words`; 0 is all."""
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


def other_texts(config: ConfigDict) -> dict[str, list[records.Document]]:
  """`held_out` of each of `other_documents`, drawn by seed."""
  found = {}
  for name, source in other_documents(config).items():
    documents = sources.read_documents(
      source, words_per_document=config.words_per_document
    )
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
    for document in sources.read_documents(
      spec, words_per_document=config.words_per_document
    )
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


def load_tokenizer(config: ConfigDict) -> tokenizer_lib.Tokenizer:
  """The tokenizer of all stages: the model's with `template`, or a given one.

  Raises:
    ValueError: there is none, or it is another model's.
  """
  if config.tokenizer:
    return tokenizer_lib.Tokenizer.load(config.tokenizer)
  found = tokenizer_lib.Tokenizer.load(config.model)
  template = config.template
  if template == 'auto':
    template = tokenizer_lib.CHAT if found.chat_template else ''
  date = None
  if template == tokenizer_lib.CHAT and tokenizer_lib.reads_clock(
    found.chat_template
  ):
    try:
      date = datetime.date.fromisoformat(config.date)
    except ValueError as error:
      raise ValueError(
        f'date must be YYYY-MM-DD, such as 2026-01-31: {config.date!r}'
      ) from error
    run_lib.say(
      f'{config.name}: the chat template reads the clock; it is told {date} '
      'from now on (date)'
    )
  # On a command line a line break is written as in a string.
  found = found.with_format(template.replace('\\n', '\n'), (), date)
  if found.only_asked.strip():
    run_lib.say(
      f'{config.name}: the chat template puts {found.only_asked!r} before an '
      'answer when it asks for one, and not in a conversation: answers are '
      'learned behind it, as they are sampled'
    )
  return found


def check_model(
  config: ConfigDict,
  tokenizer: tokenizer_lib.Tokenizer,
  reads_weights: bool = False,
) -> int:
  """The model's context length in tokens, once it is known that it loads.

  Args:
    config: of the stage.
    tokenizer: of all stages.
    reads_weights: whether to look at every number, too.

  Raises:
    ValueError: a family, config field, weights or tokenizer that does not fit.
  """
  model_folder.check(config.model, 'policy', tokenizer)
  if reads_weights:  # Only now are they downloaded.
    model_folder.check_weights(config.model, 'policy')
  elif model_folder.is_published(config.model):
    hf.open_tensors(hub.locate(config.model))
  length = model_folder.shape_of(config.model).context_length
  return min(length, config.context_length or length)


def run(config: ConfigDict, workdir: epath.Path) -> dict[str, Any]:
  """Reads the sources, writes what the other stages read.

  Writes tokenizer/, demonstrations_*, comparisons_*, judge_comparisons_*,
  prompts_*, references_test and documents_* (.jsonl), lengths.json and
  hygiene.json.

  Returns:
    The number of records in each file, and of those that were left out.

  Raises:
    ValueError: a source that cannot be used, or too little of it.
  """
  validate(config)
  tokenizer = load_tokenizer(config)
  context_length = check_model(config, tokenizer)
  files, lengths, report = make_records(config, tokenizer, context_length)
  owned = ('*.jsonl', 'tokenizer/*')
  with folders.writing(
    workdir, owned, command='preferences', replace=True
  ) as unfinished:
    for name, rows in files.items():
      write_fn = records.write_jsonl
      if name == 'references_test':
        write_fn = samples.write_samples
      write_fn(unfinished / f'{name}.jsonl', rows)
    tokenizer.save(unfinished / 'tokenizer')
  run_lib.write_json(workdir / LENGTHS_FILE, lengths)
  run_lib.write_json(workdir / 'hygiene.json', report)
  counts = {name: len(rows) for name, rows in files.items()}
  run_lib.say(describe_lengths(config.name, lengths))
  run_lib.say(
    f'{config.name}: '
    + ', '.join(f'{number} {name}' for name, number in counts.items())
  )
  for reason, number in report['left_out'].items():
    run_lib.say(f'{config.name}: left out: {number} {reason}')
  return {**counts, 'hygiene': report, 'lengths': lengths}


def make_records(
  config: ConfigDict,
  tokenizer: tokenizer_lib.Tokenizer,
  context_length: int,
) -> tuple[dict[str, list], dict[str, Any], dict[str, Any]]:
  """(file -> its records, `propose_lengths`, counts of what was left out)."""
  skipped = collections.Counter()
  given = {key: read(config, key, skipped) for key in KINDS}
  comparisons, test = given['preferences']
  # A set that is given for testing is used instead of a publisher's split.
  test = sum(given['test_preferences'], []) or test
  if not comparisons:
    raise ValueError(
      f'{config.preferences}: all files are a test split, by their names; give '
      'others to train on'
    )
  records.check_labels(comparisons, config.preferences)
  demonstrations = given['demonstrations'][0]
  for key in ('demonstrations', 'prompts'):
    unused = f'{key} in files of a test split, by their names'
    skipped[unused] += len(given[key][1])
  refuse_templates(comparisons + demonstrations, tokenizer)
  measured = (*comparisons, *demonstrations, *given['prompts'][0])
  lengths = propose_lengths(config, tokenizer, measured, context_length)

  if test:
    words = config.duplicate_prefix_words
    reserved = set(map(records.opening, test))
    begun = {hygiene.beginning(row, words) for row in test}
    rows = (comparisons, demonstrations, given['prompts'][0])
    before = sum(map(len, rows))
    comparisons, demonstrations, prompts = (
      [
        row
        for row in part
        if records.opening(row) not in reserved
        and hygiene.beginning(row, words) not in begun
      ]
      for part in rows
    )
    after = len(comparisons) + len(demonstrations) + len(prompts)
    skipped['records that begin like one of the test set'] = before - after
  else:
    prompts = given['prompts'][0]
  distinct = distinct_prompts((*comparisons, *demonstrations, *prompts))
  fractions = split_fractions(config, len(distinct), bool(test))
  splits, report = hygiene.clean(
    distinct,
    tokenizer=tokenizer,
    max_tokens=lengths['prompt_length'],
    prefix_words=config.duplicate_prefix_words,
    cap=config.prompts_per_user,
    fractions=fractions,
    seed=config.seed,
  )
  if test:
    asked, _ = hygiene.drop_duplicates(
      distinct_prompts(test), config.duplicate_prefix_words
    )
    readable, tokens, _ = hygiene.drop_refused(asked, tokenizer)
    splits['test'] = [
      prompt
      for prompt, number in zip(readable, tokens, strict=True)
      if number <= lengths['prompt_length']
    ]
  split_of = {
    records.opening(prompt): name
    for name, part in splits.items()
    for prompt in part
  }

  def part(rows, name):
    own = [row for row in rows if split_of.get(records.opening(row)) == name]
    if name == 'train':  # A prompt that is clean may begin the same way.
      given, own = own, without_personal_data(own)
      skipped['train records with personal data'] += len(given) - len(own)
    fitting, refused = fitting_rows(own, tokenizer, lengths['row_length'])
    skipped[f'{name} records whose prompt the chat template refuses'] += refused
    longer = len(own) - len(fitting) - refused
    skipped[f'{name} records longer than row_length'] += longer
    return fitting

  skipped.update(_of_hygiene(report))
  files, drawn = {}, 'records beyond max_comparisons, _demonstrations or _valid'

  def draw(rows, number):
    found = draw_rows(rows, number, config.seed)
    skipped[drawn] += len(rows) - len(found)
    return found

  for split in ('train', 'valid'):
    number = {'train': config.max_comparisons, 'valid': config.max_valid}[split]
    reward, judge, crossed = judge_side(
      part(comparisons, split), config.judge_fraction, config.seed
    )
    skipped[f'{split} rankings of a conversation of the other reward model'] = (
      crossed
    )
    own = part(demonstrations, split)
    if not config.demonstrations:
      own = best_answers(reward)
    most = {'train': config.max_demonstrations, 'valid': config.max_valid}
    files |= {
      f'demonstrations_{split}': draw(own, most[split]),
      f'comparisons_{split}': draw(reward, number),
    }
    if config.judge_fraction:
      files[f'judge_comparisons_{split}'] = draw(judge, number)
  # Of a set that is given, no prompt is left out.
  of_test = dict.fromkeys(map(records.opening, test), 'test')
  split_of = of_test | split_of
  files['comparisons_test'] = part(test or comparisons, 'test')
  if config.references:
    own = sum(given['demonstrations'], [])
    files['references_test'] = references(splits['test'], own, tokenizer)
  files |= {f'prompts_{name}': rows for name, rows in splits.items()}
  documents = split_documents(config) | other_texts(config)
  if learned := documents.get('documents_train'):
    held = {
      records.opening(document)
      for name, part in documents.items()
      if name != 'documents_train'
      for document in part
    }
    kept = [row for row in learned if records.opening(row) not in held]
    skipped['pieces of documents that are held out as well'] = len(
      learned
    ) - len(kept)
    documents['documents_train'] = kept
  files |= documents
  check_files(config, files, skipped)
  check_candidates(config, files)
  skipped['rankings whose prompt data hygiene left out'] = sum(
    records.opening(row) not in split_of for row in comparisons
  )
  counts = {reason: number for reason, number in skipped.items() if number}
  used = kept_of(config, given, files, splits)
  for key, (number, kept) in used.items():
    if not kept:
      raise ValueError(
        f'{key}: none of {number} records is used: {_listed(counts)}. If they '
        'begin alike, raise duplicate_prefix_words'
      )
  counts |= {
    f'of {number} given {key}': number - kept
    for key, (number, kept) in used.items()
    if kept < number
  }
  return files, lengths, {**report.to_json(), 'left_out': counts}


def _listed(counts: Mapping[str, int]) -> str:
  return ', '.join(f'{n} {why}' for why, n in counts.items() if n) or 'nothing'


def _of_hygiene(report: hygiene.HygieneReport) -> dict[str, int]:
  """Reason -> prompts that hygiene dropped, for people."""
  limits = report.limits
  return {
    f'prompts that begin with the same {limits["prefix_words"]} words as '
    'another one (duplicate_prefix_words)': report.duplicates,
    **{
      f'prompts that the chat template refuses: {reason}': number
      for reason, number in report.refused.items()
    },
    f'prompts longer than prompt_length ({limits["max_tokens"]} tokens)': (
      report.over_long
    ),
    f'prompts beyond {limits["cap"]} of one user (prompts_per_user)': (
      report.over_cap
    ),
    'training prompts with personal data': report.personal_data,
  }


def kept_of(
  config: ConfigDict, given, files, splits
) -> dict[str, tuple[int, int]]:
  """Source that was given beside the rankings -> records, and those used.

  A prompt that another source has as well is used, whoever's copy was kept.
  """
  prompts = sum(given['prompts'], [])
  demonstrations = sum(given['demonstrations'], [])
  left = {_words(prompt) for part in splits.values() for prompt in part}
  learned = files['demonstrations_train'] + files['demonstrations_valid']
  found = {
    'prompts': (len(prompts), sum(_words(p) in left for p in prompts)),
    'demonstrations': (
      len(demonstrations),
      len(learned) if config.demonstrations else 0,
    ),
  }
  return {key: counts for key, counts in found.items() if counts[0]}


def _words(row: records.Prompt | records.Demonstration) -> tuple:
  """What two copies of a prompt have in common, as turns or as text."""
  turns = records.conversation(row)
  return tuple((turn.role, records.comparable(turn.content)) for turn in turns)


def check_files(
  config: ConfigDict,
  files: Mapping[str, Sequence[Any]],
  skipped: Mapping[str, int],
) -> None:
  """Refuses files that are empty, too small for a batch, or of ties alone.

  Raises:
    ValueError: names them, what was left out most, and the keys to change.
  """
  empty = [name for name, rows in files.items() if not rows]
  if empty:
    told = sorted(skipped.items(), key=lambda item: -item[1])
    advice = 'Give more data, or change the keys named here'
    if all(name.startswith('judge_') for name in empty):
      advice = (
        'The judge takes rankings of labelers and conversations of its own; '
        'where each labeler ranked every prompt nothing is left: give '
        '--config.judge_model=FOLDER, or --config.stages.data.judge_fraction=0 '
        'with another judge'
      )
    elif any(name.endswith(('_valid', '_test')) for name in empty):
      advice += (
        '; prompts of one user, and prompts that open alike, go to one split '
        'together, so one user or one opening alone cannot be split'
      )
    raise ValueError(
      f'nothing is left for {", ".join(empty)}: left out: '
      f'{_listed(dict(told))}. {advice}; raise max_prompt_length and '
      'max_response_length, or valid_fraction and test_fraction'
    )
  rankings = {
    name: sum(len(set(row.ranks)) > 1 for row in rows)
    for name, rows in files.items()
    if 'comparisons' in name
  }
  for name, number in rankings.items():
    if not number:
      raise ValueError(
        f'{name}: all of its {len(files[name])} rankings are ties, which '
        'prefer no answer; give others (--config.test_preferences for the '
        'test set)'
      )
  for name, least in config.least.items():
    if name in files and len(files[name]) < least:
      raise ValueError(
        f'{name}: {len(files[name])} are left, and a batch takes {least}; give '
        'more data, hold longer records (kept_fraction, max_prompt_length, '
        'max_response_length), or lower batch_size of the stage'
      )


def check_candidates(config: ConfigDict, files: Mapping[str, Any]) -> None:
  """Refuses rankings of more answers than the model that they teach takes."""
  for name, rows in files.items():
    stage = 'judge' if name.startswith('judge_') else 'reward'
    most = config.max_answers[stage]
    if 'comparisons' not in name or name == 'comparisons_test' or not most:
      continue
    longest = max(rows, key=lambda row: len(row.completions))
    number = len(longest.completions)
    if number > most:
      raise ValueError(
        f'preferences: ranking {longest.id!r} has {number} answers, and stage '
        f'{stage} takes {most}; give '
        f'--config.stages.{stage}.max_candidates={number}'
      )


def refuse_templates(
  rows: Sequence[records.Record], tokenizer: tokenizer_lib.Tokenizer
) -> None:
  """Refuses sources whose texts are in the model's chat template already.

  It would be put around them a second time, and its marks would be learned as
  letters. A few texts may quote a mark.

  Raises:
    ValueError: most of the records hold one; names it and the first record.
  """
  marks = tokenizer.template_marks
  found = [
    (row, mark)
    for row in rows
    for mark in marks
    if mark in row.prompt or any(mark in text for text in _answers(row))
  ]
  number = len({id(row) for row, _ in found})
  if 2 * number > len(rows):
    row, mark = found[0]
    raise ValueError(
      f'{number} of {len(rows)} records hold {mark!r} of the chat template in '
      f'their text, the first as {row.prompt[:60]!r} (id {row.id!r}); give '
      'prompts and answers without it, or as lists of turns'
    )
  if number:
    run_lib.say(
      f'data: {number} of {len(rows)} records spell {found[0][1]!r} of the '
      'chat template in their text; it is read as letters'
    )
