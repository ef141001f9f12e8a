"""A user's own preferences: the data stage, and the judge trained on them.

Rankings and, if given, demonstrations, prompts and documents become the JSONL
files that the other stages read. The split is by conversation, after data
hygiene. A share of the training and validation conversations is reserved for a
second reward model, the judge; where rankings have labeler ids, its labelers
are different, too. Lengths of rows are measured in tokens of the model and
written to lengths.json.
"""

import collections
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from instruct_jax import hub, judge_fns, model_folder
from instruct_jax.data import folders, hygiene, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import figures, samples
from instruct_jax.infra import run as run_lib
from instruct_jax.models import hf
from instruct_jax.worlds import preference_sources, preference_splits
from instruct_jax.worlds.preference_lengths import (
  describe_lengths,
  propose_lengths,
)
from instruct_jax.worlds.preference_sources import (
  KINDS,
  other_documents,
  sources_of,
  words_of,
)

PROCESSES = 'first'

LENGTHS_FILE = 'lengths.json'


class OtherConversations(judge_fns.RewardModel):
  """A reward model trained on other conversations, by other labelers."""

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
  """Published results for TL;DR with Pythia 1B, for the report.

  From Huang et al. 2024 (arXiv 2403.17031); two of the four PPO seeds fail.
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
    ValueError: a value is bad; names the key, its value and what is allowed.
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


def load_tokenizer(config: ConfigDict) -> tokenizer_lib.Tokenizer:
  """The tokenizer of all stages: the model's with `template`, or a given one.

  Raises:
    ValueError: there is none, its template cannot be used, or `date` is bad.
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
      f'{config.name}: the chat template reads the clock; its date is '
      f'fixed at {date} (date)'
    )
  # On a command line a line break is written as a backslash and an n.
  found = found.with_format(template.replace('\\n', '\n'), (), date)
  if found.only_asked.strip():
    run_lib.say(
      f'{config.name}: the chat template puts {found.only_asked!r} before an '
      'answer when it asks for one, and not in a conversation: it '
      'stands before answers in training, as in sampling'
    )
  return found


def check_model(
  config: ConfigDict,
  tokenizer: tokenizer_lib.Tokenizer,
  reads_weights: bool = False,
) -> int:
  """Checks that the model loads; returns its context length in tokens.

  Args:
    config: of the stage.
    tokenizer: of all stages.
    reads_weights: whether to check every weight, too.

  Raises:
    ValueError: a family, config field, weights or tokenizer that does not fit.
  """
  model_folder.check(config.model, 'policy', tokenizer)
  if reads_weights:  # Weights are downloaded only here.
    model_folder.check_weights(config.model, 'policy')
  elif model_folder.is_published(config.model):
    hf.open_tensors(hub.locate(config.model))
  length = model_folder.shape_of(config.model).context_length
  return min(length, config.context_length or length)


def run(config: ConfigDict, workdir: epath.Path) -> dict[str, Any]:
  """Reads the sources and writes the files that the other stages read.

  Writes tokenizer/, demonstrations_*, comparisons_*, judge_comparisons_*,
  prompts_*, references_test and documents_* (.jsonl), lengths.json and
  hygiene.json.

  Returns:
    The number of records in each file, the counts of hygiene and of records
    that were left out, and the lengths.

  Raises:
    ValueError: a source cannot be used, or has too few usable records.
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
  given = preference_sources.read_all(config, skipped)
  refuse_templates(given.comparisons + given.demonstrations, tokenizer)
  lengths = propose_lengths(config, tokenizer, given.learned(), context_length)
  split = given.without_test(config.duplicate_prefix_words)
  skipped['records that begin like one of the test set'] = len(
    given.learned()
  ) - len(split.learned())
  prompts, report = preference_splits.split_prompts(
    config, split, tokenizer, lengths['prompt_length']
  )
  skipped.update(_of_hygiene(report))
  files = preference_splits.split_records(
    config, split, prompts, tokenizer, lengths['row_length'], skipped
  )
  files |= {f'prompts_{name}': rows for name, rows in prompts.items()}
  files |= preference_splits.documents_by_split(config, skipped)
  check_files(config, files, skipped)
  check_candidates(config, files)
  left_out = {reason: number for reason, number in skipped.items() if number}
  left_out |= unused(config, given, files, prompts, left_out)
  return files, lengths, {**report.to_json(), 'left_out': left_out}


def _listed(counts: Mapping[str, int]) -> str:
  return ', '.join(f'{n} {why}' for why, n in counts.items() if n) or 'nothing'


def _of_hygiene(report: hygiene.HygieneReport) -> dict[str, int]:
  """Readable reason -> number of prompts that hygiene dropped."""
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


def unused(
  config: ConfigDict,
  given: preference_sources.Given,
  files: Mapping[str, Sequence[Any]],
  splits: Mapping[str, Sequence[records.Prompt]],
  left_out: Mapping[str, int],
) -> dict[str, int]:
  """Counts the given prompts and demonstrations that are not used.

  A prompt counts as used if any source's copy of it was kept.

  Raises:
    ValueError: nothing of a source is used; names it and what was left out.
  """
  prompts = given.prompts + given.test_prompts
  demonstrations = given.demonstrations + given.test_demonstrations
  left = {words_of(prompt) for part in splits.values() for prompt in part}
  learned = files['demonstrations_train'] + files['demonstrations_valid']
  used = {
    'prompts': (len(prompts), sum(words_of(p) in left for p in prompts)),
    'demonstrations': (
      len(demonstrations),
      len(learned) if config.demonstrations else 0,
    ),
  }
  found = {}
  for key, (number, kept) in used.items():
    if number and not kept:
      raise ValueError(
        f'{key}: none of {number} records is used: {_listed(left_out)}. If '
        'they begin alike, raise duplicate_prefix_words'
      )
    if kept < number:
      found[f'of {number} given {key}'] = number - kept
  return found


def check_files(
  config: ConfigDict,
  files: Mapping[str, Sequence[Any]],
  skipped: Mapping[str, int],
) -> None:
  """Refuses files that are empty, too small for a batch, or only have ties.

  Raises:
    ValueError: names the files and what to change and, if some are empty, what
      was left out, largest counts first.
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
        'more data, allow longer records (kept_fraction, max_prompt_length, '
        'max_response_length), or lower batch_size of the stage'
      )


def check_candidates(config: ConfigDict, files: Mapping[str, Any]) -> None:
  """Raises ValueError for rankings of more answers than their stage takes."""
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
  """Refuses sources whose texts are already in the model's chat template.

  The template would be applied a second time, and the marks in the texts would
  be learned as plain text. A few texts may quote a mark.

  Raises:
    ValueError: most of the records have a mark; names it and the first record.
  """
  marks = tokenizer.template_marks
  found = [
    (row, mark)
    for row in rows
    for mark in marks
    if mark in row.prompt
    or any(mark in text for text in records.answers_of(row))
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
      'chat template in their text; it is treated as plain text'
    )
