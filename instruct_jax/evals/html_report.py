"""report.html: the report of a run as one file.

Pictures are embedded in the file, and a content security policy forbids loading
anything. It allows only the file's own style and script, by their hashes, so
no sample can run a script. The template escapes text of models and labelers.
Each enlarged plot has an address, `report.html#plot-win_rate`, and the address
can also hold filters of the samples: `report.html#category=chat&search=fox`.
"""

import base64
import functools
import hashlib
import pathlib
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from instruct_jax.evals import figures, plots, samples, sections

_FOLDER = pathlib.Path(__file__).parent / 'templates'
# Longer texts are collapsed at first.
_LONG = 400


@functools.cache
def _template() -> jinja2.Template:
  return jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda value: (
      sections.visible(value) if type(value) is str else value
    ),
  ).get_template('report.html')


def make_page(
  title: str,
  facts: Sequence[str],
  found: Sequence[sections.Section],
  drawn: Mapping[str, bytes] | None = None,
  tiles: Sequence[sections.Claim] = (),
  answers: Mapping[str, Any] | None = None,
) -> str:
  """A page of sections in one file.

  Args:
    title: its heading.
    facts: sentences below the heading.
    found: the sections.
    drawn: file name -> PNG of every plot that the sections show.
    tiles: figures at the top.
    answers: of models, side by side; see `_answers`.
  """
  style = (_FOLDER / 'report.css').read_text('utf-8')
  script = (_FOLDER / 'report.js').read_text('utf-8')
  policy = (
    f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
    f"script-src '{_digest(script)}'"
  )
  return _template().render(
    title=title,
    facts=facts,
    policy=policy,
    style=style,
    script=script,
    # Titles may repeat, addresses must not.
    sections=[
      (f'{_slug(section.title)}-{number}', section)
      for number, section in enumerate(found, start=1)
    ],
    pictures={
      name: _picture(name, content) for name, content in (drawn or {}).items()
    },
    tiles=tiles,
    samples=answers,
    shown=sections.shown_cell,
    long=_LONG,
  )


def _digest(text: str) -> str:
  found = hashlib.sha256(text.encode('utf-8')).digest()
  return f'sha256-{base64.b64encode(found).decode("ascii")}'


def _slug(text: str) -> str:
  return re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-') or 'part'


def _picture(name: str, content: bytes) -> dict[str, Any]:
  # A PNG's width and height are bytes 16 to 24.
  width, height = struct.unpack('>II', content[16:24])
  return {
    'id': f'plot-{pathlib.PurePath(name).stem}',
    # 100 pixels of the page per inch, independent of the resolution.
    'width': round(100 * width / plots.DPI),
    'height': round(100 * height / plots.DPI),
    'content': base64.b64encode(content).decode('ascii'),
  }


def _gain(row: samples.Row, baseline: str) -> float:
  """Judge's score of the last model minus the baseline's, 0 if unknown."""
  last = list(row.answers.values())[-1].score_judge
  first = row.answers[baseline].score_judge
  return 0.0 if last is None or first is None else last - first


def _answers(shown: figures.Figures) -> dict[str, Any] | None:
  """Prompts with each model's answer, for the template."""
  rows = shown.more_samples or shown.samples
  if not rows:
    return None
  names = list(rows[0].answers)
  return {
    'labels': names,
    'score_name': shown.unit,
    'categories': sorted({row.category for row in rows if row.category}),
    'baseline': shown.baseline,
    'last': names[-1] if names[-1] != shown.baseline else '',
    'rows': [
      {
        'category': row.category,
        'gain': f'{_gain(row, shown.baseline):.6f}',
        'turns': row.turns,
        'answers': [_answer(answer) for answer in row.answers.values()],
      }
      for row in rows
    ],
  }


def _answer(answer: samples.Sample) -> dict[str, str]:
  notes = [] if answer.ended else ['cut off']
  if answer.score_judge is not None:
    notes.append(f'{answer.score_judge:.3f}')
  return {'text': answer.response, 'notes': ', '.join(notes)}


def make_html(shown: figures.Figures, drawn: Mapping[str, bytes]) -> str:
  """The text of report.html; `drawn` is from `plots.make_plots`."""
  found = sections.results(shown, set(drawn))
  command = [f'Commit {shown.commit}.', sections.Code(shown.command)]
  return make_page(
    shown.title,
    [
      f'Judge: {shown.judge}. Intervals are 95 %, redrawing prompts (losses: '
      'rows).',
      f'Seed {shown.seed}, commit {shown.commit[:12]}.',
    ],
    [
      # The first section is the alarms'.
      *(found if shown.alarms else found[1:]),
      *sections.background(shown),
      sections.Section('Command', command),
    ],
    drawn,
    sections.claims(shown),
    _answers(shown),
  )
