"""Converts Anthropic's HH comparisons for pretraining and reward models.

The split is by conversation: no validation dialogue begins like a training one.
Each set has a folder of comparisons and demonstrations. The training dialogues
of all sets, with both answers of each pair, are also the pretraining text.
"""

import collections

from etils import epath

from instruct_jax.data import convert, folders, importers, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import run as run_lib

PROCESSES = 'first'


def validate(config):
  """Checks the config. ValueError names the key."""
  if not config.root:
    raise ValueError(
      'the data root is not given; set --config.data.root=DIR with '
      f'{", ".join(config.sets)}'
    )
  if not 0 < config.valid_fraction < 1:
    raise ValueError(
      f'valid_fraction must be in (0, 1): {config.valid_fraction}'
    )


def inputs(config):
  """What this stage reads, by config key."""
  return {f'root/{name}': f'{config.root}/{name}' for name in config.sets}


def files_of(config, name: str) -> list[epath.Path]:
  """The JSONL files of a set, sorted by name; ValueError if there are none."""
  folder = epath.Path(config.root) / name
  paths = folder.iterdir() if folder.is_dir() else ()
  files = [path for path in paths if '.jsonl' in path.suffixes]
  if not files:
    raise ValueError(f'{folder} has no .jsonl or .jsonl.gz files')
  return sorted(files, key=lambda path: path.name)


def run(config, workdir: epath.Path):
  """Reads HH dialogues; writes the records that later stages read.

  Reads ROOT/SET/*.jsonl, plain or .gz. Writes the tokenizer, documents_*, a
  folder of comparisons and demonstrations for each set, and counts.json.

  Returns:
    The numbers of records by file, of skipped records, and the vocabulary size.

  Raises:
    ValueError: a set has no file, or a record is not in HH's format.
  """
  validate(config)
  kinds = ['documents']
  for name in config.sets:
    kinds += [f'{name}/comparisons', f'{name}/demonstrations']
  files = {f'{x}_{split}': [] for x in kinds for split in ('train', 'valid')}
  skipped = collections.Counter()

  def add(kind, row):
    split = convert.split_of(row, config.valid_fraction, config.seed)
    files[f'{kind}_{split}'].append(row)
    return split

  for name in config.sets:
    for path in files_of(config, name):
      imported = importers.read_hh(path)
      skipped.update(imported.skipped)
      for row in imported.comparisons:
        split = add(f'{name}/comparisons', row)
        files[f'documents_{split}'] += [
          records.Document(text=row.prompt + text, source=name)
          for text in row.completions
        ]
      for row in imported.demonstrations:
        add(f'{name}/demonstrations', row)
  tokenizer = tokenizer_lib.train_bpe(
    [document.text for document in files['documents_train']], config.vocab_size
  )
  with folders.writing(
    workdir,
    ('documents_*', 'tokenizer/*', *(f'{name}/*' for name in config.sets)),
    command='hh_data',
    replace=True,
  ) as unfinished:
    for name, rows in files.items():
      records.write_jsonl(unfinished / f'{name}.jsonl', rows)
    tokenizer.save(unfinished / 'tokenizer')
  counts = {name: len(rows) for name, rows in files.items()}
  counts['skipped'] = dict(skipped)
  run_lib.write_json(workdir / 'counts.json', counts)
  return {**counts, 'vocabulary': tokenizer.vocab_size}
