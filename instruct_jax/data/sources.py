"""Records from plain text, JSONL, TensorFlow Datasets and saved `datasets`."""

import fractions
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from instruct_jax import command
from instruct_jax.data import records

_TFDS = 'tfds:'
_DATASETS = 'datasets:'
_SUFFIXES = ('.txt', '.txt.gz', '.jsonl', '.jsonl.gz')


def read_documents(
  spec: epath.PathLike,
  *,
  words_per_document: int,
  data_dir: epath.PathLike | None = None,
) -> list[records.Document]:
  """Reads the documents that `spec` names.

  Args:
    spec: one of
      a `.txt` or `.txt.gz` file, split by `split_text`;
      a `.jsonl` or `.jsonl.gz` file of `Document` records, taken as they are;
      a folder: all such files in it (not below it), by name;
      `tfds:NAME/SPLIT`, such as `tfds:lm1b/train` or
      `tfds:wikipedia/20230601.en/train[:1%]`: the `text` feature of a data set
      that has been prepared in `data_dir`; read without TensorFlow;
      `datasets:FOLDER`: the `text` column, see `read_examples`.
    words_per_document: about how long the pieces of plain text are.
    data_dir: where TensorFlow Datasets keeps its data; None is its default.

  Returns:
    The documents in file order; `source` names the file or data set.

  Raises:
    RecordError: nothing to read there, or a file that is not text.
  """
  if words_per_document < 1:
    raise ValueError(
      f'words_per_document is {words_per_document}; use 1 or more'
    )
  if str(spec).startswith((_TFDS, _DATASETS)):
    source = str(spec).partition(':')[2]
    documents = [
      records.Document(text=piece, source=source)
      for record in from_fields(
        read_examples(str(spec), data_dir),
        records.Document,
        {'text': '{text}'},
        str(spec),
      )
      for piece in split_text(record.text, words_per_document)
    ]
    if not documents:
      raise records.RecordError(f'{spec}: holds no text')
    return documents
  path = epath.Path(spec)
  if not path.is_dir():
    return _read_file(path, words_per_document)
  files = sorted(
    (file for file in path.iterdir() if file.name.endswith(_SUFFIXES)),
    key=lambda file: file.name,
  )
  if not files:
    raise records.RecordError(
      f'{path}: no files that end in {", ".join(_SUFFIXES)}'
    )
  return [
    document
    for file in files
    for document in _read_file(file, words_per_document)
  ]


def split_text(text: str, words_per_document: int) -> list[str]:
  """Splits a text at blank lines into pieces of about so many words.

  Paragraphs are gathered until a piece has `words_per_document` words; none is
  cut, so a long one makes a long piece. Line breaks inside a paragraph become
  spaces: they stem from the width of a printed page, and half of any corpus of
  books has them while the other half has not.
  """
  pieces: list[str] = []
  gathered: list[str] = []
  num_words = 0
  for paragraph in re.split(r'\n\s*\n', text):
    words = paragraph.split()
    if not words:
      continue
    gathered.append(' '.join(words))
    num_words += len(words)
    if num_words >= words_per_document:
      pieces.append('\n\n'.join(gathered))
      gathered, num_words = [], 0
  if gathered:
    pieces.append('\n\n'.join(gathered))
  return pieces


def _read_file(
  path: epath.Path, words_per_document: int
) -> list[records.Document]:
  if path.name.endswith(('.jsonl', '.jsonl.gz')):
    return records.read_jsonl(path, records.Document)
  content = records.read_bytes(path)
  try:
    text = content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = content.count(b'\n', 0, error.start) + 1
    raise records.RecordError(
      f'{path}:{line}: byte {error.start} of the file is not UTF-8; convert it'
    ) from error
  name = path.name.removesuffix('.gz').removesuffix('.txt')
  documents = [
    records.Document(text=piece, source=name)
    for piece in split_text(text, words_per_document)
  ]
  if not documents:
    raise records.RecordError(f'{path}: holds no text')
  return documents


def read_examples(
  spec: str, data_dir: epath.PathLike | None = None
) -> Iterator[Mapping[str, Any]]:
  """Examples of a table, one mapping from feature to value each.

  Args:
    spec: one of
      `tfds:NAME/SPLIT`, see `read_documents`;
      `datasets:FOLDER`, what `save_to_disk` of Hugging Face `datasets` wrote
      (for several splits, the folder of one of them).
    data_dir: of TensorFlow Datasets.

  Raises:
    RecordError: it cannot be opened.
  """
  if spec.startswith(_DATASETS):
    return _read_saved(epath.Path(spec.removeprefix(_DATASETS)))
  if not spec.startswith(_TFDS):
    raise records.RecordError(
      f'{spec}: expected tfds:NAME/SPLIT or datasets:FOLDER'
    )
  return _read_tfds(spec, data_dir)


def from_fields(
  examples: Iterable[Mapping[str, Any]],
  record_type: type[records.Record],
  fields: Mapping[str, str],
  source: str,
) -> list[records.Record]:
  """Records whose fields are format strings over an example's features.

  {'prompt': '{question}\\n', 'response': '{answer}'} makes demonstrations of
  questions and answers. `source` is named in errors.

  Raises:
    RecordError: a feature that the examples lack, or values that make no
      record; up to 10 examples are reported together.
  """
  wanted = {
    name
    for template in fields.values()
    for _, name, _, _ in string.Formatter().parse(template)
    if name is not None
  }
  found, bad = [], []
  for number, example in enumerate(examples, start=1):
    missing = sorted(wanted - set(example))
    if missing:
      raise records.RecordError(
        f'{source}: examples have {", ".join(sorted(example))} and no '
        f'{", ".join(missing)}'
      )
    texts = {name: _as_text(example[name]) for name in wanted}
    values = {
      name: template.format(**texts) for name, template in fields.items()
    }
    problems = records.problems(values, record_type)
    if problems:
      bad.append((number, '; '.join(problems)))
    else:
      found.append(records.from_values(values, record_type))
  records.raise_problems(source, bad)
  return found


def _as_text(value: Any) -> str:
  return value.decode('utf-8') if isinstance(value, bytes) else str(value)


def mix(
  parts: Sequence[Sequence[records.Record]],
  weights: Sequence[int | float],
  seed: int,
) -> list[records.Record]:
  """As many records as there are in the proportions of `weights`, shuffled.

  Each part is drawn from without repeats, so the part that runs out first, for
  its weight, bounds the mixture; the others give what fits it.

  Args:
    parts: records of one type.
    weights: one positive number each; only their proportions count.
    seed: of the draws and the order.
  """
  if len(parts) != len(weights) or not parts:
    raise ValueError(f'{len(parts)} parts with {len(weights)} weights')
  if min(weights) <= 0 or not all(map(len, parts)):
    raise ValueError(
      f'weights {list(weights)} must be positive and parts of '
      f'{[len(part) for part in parts]} records not empty'
    )
  shares = [fractions.Fraction(w).limit_denominator(10**6) for w in weights]
  total = min(
    len(part) / share for part, share in zip(parts, shares, strict=True)
  )
  rng = np.random.default_rng(seed)
  mixed = []
  for part, share in zip(parts, shares, strict=True):
    chosen = rng.permutation(len(part))[: int(total * share)]
    mixed += [part[i] for i in chosen]
  return [mixed[i] for i in rng.permutation(len(mixed))]


def _read_saved(folder: epath.Path) -> Iterator[Mapping[str, Any]]:
  splits = folder / 'dataset_dict.json'
  if splits.exists():
    names = json.loads(splits.read_text())['splits']
    raise records.RecordError(
      f'{folder}: has splits; name the folder of one of {", ".join(names)}'
    )
  state = folder / 'state.json'
  if not state.exists():
    raise records.RecordError(
      f'{folder}: no state.json, so no folder that `save_to_disk` of Hugging '
      'Face datasets wrote'
    )
  described = json.loads(state.read_text())
  if described.get('_indices_data_files'):
    raise records.RecordError(
      f'{folder}: an index over its rows was saved beside them; write it again '
      'with flatten_indices()'
    )
  import pyarrow
  import pyarrow.ipc

  for entry in described['_data_files']:
    path = folder / entry['filename']
    if not path.exists():
      raise records.RecordError(f'{path}: no such file')
    with path.open('rb') as file:
      try:
        for batch in pyarrow.ipc.open_stream(file):
          yield from batch.to_pylist()
      except pyarrow.ArrowException as error:
        raise records.RecordError(f'{path}: damaged ({error})') from error


def _read_tfds(
  spec: str, data_dir: epath.PathLike | None
) -> Iterator[Mapping[str, Any]]:
  name, _, split = spec.removeprefix(_TFDS).rpartition('/')
  if not name or not split:
    raise records.RecordError(
      f'{spec}: expected tfds:NAME/SPLIT, such as tfds:lm1b/train'
    )
  # Imported here: two seconds, for the few runs that read from it.
  import tensorflow_datasets as tfds

  try:
    source: Sequence = tfds.data_source(
      name, split=split, data_dir=data_dir, download=False
    )
  # Not found, not prepared and unknown split are unrelated exception types.
  except Exception as error:
    raise records.RecordError(
      f'{spec}: cannot be opened ({command.one_line(error)}); prepare it with '
      'tfds build, in the array_record format, and set TFDS_DATA_DIR to its '
      'folder'
    ) from error
  yield from source
