"""Anthropic's HH comparisons as files for pretraining and a reward model.

The split is by conversation: no dialogue of the validation rankings begins like
one of any other file. Each set has comparisons and demonstrations of its own,
in a folder of its name. The dialogues of the training split of all sets, both
sides of each, are also the text to pretrain on, so that nothing else is needed.
"""

from etils import epath

from instruct_jax.data import convert, folders, importers, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import run as run_lib

PROCESSES = 'first'


def validate(config):
  """Checks the config.

  Raises:
    ValueError: the key, what it is, and what it should be.
  """
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
  """The JSONL files of one set, by name."""
  folder = epath.Path(config.root) / name
  files = (
    sorted(
      (p for p in folder.iterdir() if '.jsonl' in p.suffixes),
      key=lambda path: path.name,
    )
    if folder.is_dir()
    else []
  )
  if not files:
    raise ValueError(f'{folder} has no .jsonl or .jsonl.gz files')
  return files


def run(config, workdir: epath.Path):
  """Reads HH dialogues, writes the records of the stages that follow.

  Reads ROOT/SET/*.jsonl, plain or .gz. Writes the tokenizer, documents_*, a
  folder of comparisons and demonstrations for each set, and counts.json.

  Returns:
    The number of records in each file, what was skipped, and the vocabulary.

  Raises:
    ValueError: a set has no file, or a record is none of HH's.
  """
  validate(config)
  files = {
    f'{folder}{kind}_{split}': []
    for folder, kinds in (
      ('', ('documents',)),
      *(
        (f'{name}/', ('comparisons', 'demonstrations')) for name in config.sets
      ),
    )
    for kind in kinds
    for split in ('train', 'valid')
  }
  skipped = {}
  for name in config.sets:
    for path in files_of(config, name):
      imported = importers.read_hh(path)
      for reason, number in imported.skipped.items():
        skipped[reason] = skipped.get(reason, 0) + number
      for row in imported.comparisons:
        split = convert.split_of(row, config.valid_fraction, config.seed)
        files[f'{name}/comparisons_{split}'].append(row)
        files[f'documents_{split}'] += [
          records.Document(text=row.prompt + text, source=name)
          for text in row.completions
        ]
      for row in imported.demonstrations:
        split = convert.split_of(row, config.valid_fraction, config.seed)
        files[f'{name}/demonstrations_{split}'].append(row)
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
  run_lib.write_json(workdir / 'counts.json', {**counts, 'skipped': skipped})
  return {**counts, 'skipped': skipped, 'vocabulary': tokenizer.vocab_size}
