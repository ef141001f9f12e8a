"""The sources of a user's preferences: rankings, demonstrations, prompts, text.

A config key names files or folders, each of a published format or JSONL of our
own. `read_all` gives their records, keeps those of a publisher's test split
separate, and counts what a format cannot use.
"""

import collections
import dataclasses
from collections.abc import Iterable

from etils import epath
from ml_collections import ConfigDict

from instruct_jax import model_folder
from instruct_jax.data import hygiene, importers, records, sources
from instruct_jax.infra import run as run_lib

# Config key of sources -> the type of their records.
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


@dataclasses.dataclass(frozen=True)
class Given:
  """Records of all sources.

  Attributes:
    comparisons, demonstrations, prompts: to be split.
    test: rankings of a set given for testing, or else of a publisher's test
      split; if there are none, a test set is split off.
    test_demonstrations, test_prompts: of a publisher's test split; not trained
      on.
  """

  comparisons: list[records.Comparison]
  demonstrations: list[records.Demonstration]
  prompts: list[records.Prompt]
  test: list[records.Comparison]
  test_demonstrations: list[records.Demonstration]
  test_prompts: list[records.Prompt]

  def learned(self) -> list[records.Record]:
    """The records to be split: rankings, demonstrations and prompts."""
    return [*self.comparisons, *self.demonstrations, *self.prompts]

  def without_test(self, prefix_words: int) -> 'Given':
    """Drops records that begin like a ranking of the test set.

    That is by `records.opening` and by `hygiene.beginning`, so that no
    conversation and no copy of a prompt is on both sides. Demonstrations that
    are dropped join those of the test split.
    """
    openings = set(map(records.opening, self.test))
    begun = {hygiene.beginning(row, prefix_words) for row in self.test}

    def kept(rows):
      return [
        row
        for row in rows
        if records.opening(row) not in openings
        and hygiene.beginning(row, prefix_words) not in begun
      ]

    demonstrations = kept(self.demonstrations)
    learned = set(map(id, demonstrations))
    dropped = [row for row in self.demonstrations if id(row) not in learned]
    return dataclasses.replace(
      self,
      comparisons=kept(self.comparisons),
      demonstrations=demonstrations,
      test_demonstrations=dropped + self.test_demonstrations,
      prompts=kept(self.prompts),
    )


def read_all(config: ConfigDict, skipped: collections.Counter) -> Given:
  """Reads all sources of the config.

  Args:
    config: of the stage.
    skipped: reason -> number of records that are not used; updated in place.

  Raises:
    RecordError: as in `read`; or all labels are ties.
    ValueError: no ranking is left to train on.
  """
  given = {key: read(config, key, skipped) for key in KINDS}
  comparisons, test = given['preferences']
  if not comparisons:
    raise ValueError(
      f'{config.preferences}: all files are a test split, by their names; give '
      'others to train on'
    )
  records.check_labels(comparisons, config.preferences)
  for key in ('demonstrations', 'prompts'):
    unused = f'{key} in files of a test split, by their names'
    skipped[unused] += len(given[key][1])
  return Given(
    comparisons=comparisons,
    demonstrations=given['demonstrations'][0],
    prompts=given['prompts'][0],
    # A set that is given for testing is used instead of a publisher's split.
    test=sum(given['test_preferences'], []) or test,
    test_demonstrations=given['demonstrations'][1],
    test_prompts=given['prompts'][1],
  )


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
  """A file itself, or the files of a folder in order of name.

  `name` is the name of the format, or ''.

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
  """Reads the sources of a key: (records to be split, those of a test split).

  In a folder, files whose name begins with the word 'test', or that are in a
  subfolder of such a name, are a test split.

  Args:
    config: of the stage.
    key: one of `KINDS`.
    skipped: reason -> number of entries that a format cannot use; updated in
      place.

  Raises:
    RecordError: a file is missing or not of its format, or a source gives no
      record.
  """
  kind, found = KINDS[key], ([], [])
  for name, path in sources_of(config[key]):
    own, before = collections.Counter(), sum(map(len, found))
    files = files_of(path, name)
    if unread := sources.unread(files, path):
      run_lib.say(f'data: {key}: {unread}')
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

  A ranking gives none if its first place is tied, or if its best answer is
  empty or was cut: a demonstration also teaches where to end.
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
  """The distinct prompts of the records, numbered in order."""
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


def words_of(row: records.Prompt | records.Demonstration) -> tuple:
  """A key that is the same for two copies of a prompt, as turns or as text."""
  turns = records.conversation(row)
  return tuple((turn.role, records.comparable(turn.content)) for turn in turns)


def other_documents(config: ConfigDict) -> dict[str, str]:
  """Name -> source of further text on which to measure the alignment tax."""
  key = 'other_documents'
  found = model_folder.named_folders(config[key], key)
  if bad := {'pretraining', 'train', 'valid'} & set(found):
    raise ValueError(f'{key}: choose another name than {", ".join(bad)}')
  return found
