"""Pretraining documents from plain text, JSONL or TensorFlow Datasets."""

import re
from collections.abc import Sequence

from etils import epath

from instruct_jax.data import records

_TFDS = 'tfds:'
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
      that has been prepared in `data_dir`; read without TensorFlow.
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
  if str(spec).startswith(_TFDS):
    return _read_tfds(str(spec), words_per_document, data_dir)
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


def _read_tfds(
  spec: str, words_per_document: int, data_dir: epath.PathLike | None
) -> list[records.Document]:
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
      f'{spec}: cannot be opened ({error}); prepare it with tfds build, in the '
      'array_record format, and give its data_dir'
    ) from error
  documents = []
  for example in source:
    if 'text' not in example:
      raise records.RecordError(
        f'{spec}: examples have {", ".join(sorted(example))} and no text'
      )
    text = example['text']
    text = text.decode('utf-8') if isinstance(text, bytes) else str(text)
    documents.extend(
      records.Document(text=piece, source=spec.removeprefix(_TFDS))
      for piece in split_text(text, words_per_document)
    )
  if not documents:
    raise records.RecordError(f'{spec}: holds no text')
  return documents
