"""Published data in its own formats, as records.

A format is a function that reads a file (JSON, JSONL, CSV, Parquet or Excel;
text plain or `.gz`) and returns an `Imported`. `FORMATS` has them by name.
`formats.jsonl` says what each one is, gives its licence, and shows entries as
upstream writes them; `python -m instruct_jax.data formats` prints that.

  pairs.py            two answers, of which people or models prefer one
  rankings.py         K answers with ranks, scores or preference strengths
  demonstrations.py   answers to learn from
  test_sets.py        small sets of preferences that test reward models
  entries.py          what readers share: fields, turns, ties, scores to ranks

Unusable entries are counted by reason. A missing field, or a file of another
format, is an error that names the line (or the number of the entry) and the
key. Fields that no reader asks for are ignored. Null, and the NaN of tables,
is read as the empty text, except in answers that are ranked: a missing answer
makes its entry unusable, an empty one does not.

A source that ranks more than two answers gives one ranking of all of them.
Prompts that are conversations have `turns`, and `records.text_of_turns` gives
their text; completions then begin with the space that follows "Assistant:" in
HH files. Prompts that are instructions end in a blank line. Demonstrations that
a model wrote (`sources.model_of`) are kept separate.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from instruct_jax.data.importers import (
  demonstrations,
  pairs,
  rankings,
  test_sets,
)
from instruct_jax.data.importers.entries import Imported, names_of
from instruct_jax.data.importers.pairs import read_hh

__all__ = ['FORMATS', 'Format', 'Imported', 'names_of', 'read_hh']


@dataclasses.dataclass(frozen=True)
class Format:
  """A published format: how it is read, and what its user should know.

  Attributes:
    read: a function that reads a file.
    kind: what it gives, such as 'comparisons, K = 4'.
    about: whose data it is, and where it is from.
    licence: as its publisher states it.
    example: entries of a file, each a JSON object or a line of text.
    note: printed when its demonstrations are converted.
  """

  read: Callable[[epath.PathLike], Imported]
  kind: str
  about: str
  licence: str
  example: Sequence[Mapping[str, Any] | str]
  note: str = ''

  def __call__(self, path: epath.PathLike) -> Imported:
    return self.read(path)

  def lines(self) -> list[str]:
    """The lines of the example as they are in a file."""
    return [
      line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)
      for line in self.example
    ]


def _formats() -> dict[str, Format]:
  readers = {
    **pairs.READERS,
    **rankings.READERS,
    **demonstrations.READERS,
    **test_sets.READERS,
  }
  text = pathlib.Path(__file__).with_name('formats.jsonl').read_text('utf-8')
  facts = {row.pop('format'): row for row in map(json.loads, text.splitlines())}
  return {name: Format(readers[name], **about) for name, about in facts.items()}


FORMATS = _formats()
