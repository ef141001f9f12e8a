"""report.html: the report of a run as one file to look at.

Pictures are inside the file, nothing is loaded from anywhere, and a content
security policy forbids it: only the file's own style and script count, by their
hashes, so no sample can run one. Text of models and labelers is escaped by the
template. A plot is enlarged by its own address, `report.html#plot-win_rate`,
and filters of the samples can be in the address too:
`report.html#category=chat&search=fox`.
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

from instruct_jax.evals import plots, run_figures, samples, sections

_FOLDER = pathlib.Path(__file__).parent / 'templates'
# Longer texts begin folded.
_LONG = 400


@functools.cache
def _environment() -> jinja2.Environment:
  return jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda value: (
      sections.visible(value) if type(value) is str else value
    ),
  )


def make_page(
  title: str,
  facts: Sequence[str],
  found: Sequence[sections.Section],
  drawn: Mapping[str, bytes] | None = None,
  tiles: Sequence[Mapping[str, str]] = (),
  answers: Mapping[str, Any] | None = None,
) -> str:
  """A page of sections in one file.

  Args:
    title: its heading.
    facts: sentences below the heading.
    found: what it says.
    drawn: file name -> PNG of every plot that the sections point at.
    tiles: figures to see first: `kind` ('good', 'bad' or ''), `figure`, `what`
      and `doubt`.
    answers: of models, side by side; see `_answers`.
  """
  style = (_FOLDER / 'report.css').read_text('utf-8')
  script = (_FOLDER / 'report.js').read_text('utf-8')
  policy = (
    f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
    f"script-src '{_digest(script)}'"
  )
  return (
    _environment()
    .get_template('report.html')
    .render(
      title=title,
      facts=facts,
      policy=policy,
      style=style,
      script=script,
      # Titles may come twice, addresses may not.
      sections=[
        (f'{_slug(section.title)}-{number}', section)
        for number, section in enumerate(found, start=1)
      ],
      pictures={
        name: _picture(name, content) for name, content in (drawn or {}).items()
      },
      tiles=tiles,
      samples=answers,
      shown=sections.shown,
      long=_LONG,
    )
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
    # 100 pixels of the page an inch, whatever the screen makes of them.
    'width': round(100 * width / plots.DPI),
    'height': round(100 * height / plots.DPI),
    'content': base64.b64encode(content).decode('ascii'),
  }


def _percent(share: float, decimals: int = 1) -> str:
  return f'{100 * share:.{decimals}f}\u00a0%'


def _tiles(figures: run_figures.Figures) -> list[dict[str, str]]:
  tiles = []
  for model, rate in run_figures.ordered(figures.win_rate):
    if model == 'sft':
      continue
    verdict = sections.verdict(rate)
    tiles.append(
      {
        'kind': {'better': 'good', 'worse': 'bad'}.get(verdict, ''),
        'figure': _percent(rate.rate, 0),
        'what': f'{run_figures.label(model)} against SFT',
        'doubt': f'{verdict}: {100 * rate.low:.1f} to {_percent(rate.high)}, '
        f'{rate.num_prompts:,} prompts',
      }
    )
  reward = figures.reward_model
  if reward is not None:
    ceiling = ''
    if reward.ceiling is not None:
      ceiling = f'at most {_percent(reward.ceiling)}, '
    tiles.append(
      {
        'kind': '',
        'figure': _percent(reward.accuracy.accuracy, 0),
        'what': 'of the pairs ordered by the reward model as by labelers',
        'doubt': f'{ceiling}{reward.accuracy.num_pairs:,} pairs',
      }
    )
  loss = figures.pretraining_loss
  if loss is not None and loss.difference is not None:
    difference = loss.difference
    kind = (
      'good' if difference.high < 0 else 'bad' if difference.low > 0 else ''
    )
    tiles.append(
      {
        'kind': kind,
        'figure': f'{difference.mean:+.3f}',
        'what': 'nats a token: pretraining loss of PPO-ptx minus PPO',
        'doubt': f'{difference.low:+.3f} to {difference.high:+.3f}',
      }
    )
  return tiles


def _gain(row: samples.Row, models: Sequence[str]) -> float:
  """Judge's score of the last model minus the SFT model's, 0 where unknown."""
  if 'sft' not in row.answers:
    return 0.0
  last, first = row.answers[models[-1]], row.answers['sft']
  if last.score_gold is None or first.score_gold is None:
    return 0.0
  return last.score_gold - first.score_gold


def _answers(
  rows: Sequence[samples.Row], score_name: str
) -> dict[str, Any] | None:
  """Prompts with each model's answer, for the template."""
  if not rows:
    return None
  models = [model for model, _ in run_figures.ordered(rows[0].answers)]
  labels = [run_figures.label(model) for model in models]
  return {
    'labels': labels,
    'score_name': score_name,
    'categories': sorted({row.category for row in rows if row.category}),
    'baseline': run_figures.label('sft'),
    'last': labels[-1] if 'sft' in models[:-1] else '',
    'rows': [
      {
        'category': row.category,
        'gain': f'{_gain(row, models):.6f}',
        'prompt': row.prompt,
        'answers': [_answer(row.answers[model]) for model in models],
      }
      for row in rows
    ],
  }


def _answer(answer: samples.Sample) -> dict[str, str]:
  notes = [] if answer.ended else ['cut off']
  if answer.score_gold is not None:
    notes.append(f'{answer.score_gold:.3f}')
  return {'text': answer.response, 'notes': ', '.join(notes)}


def make_html(figures: run_figures.Figures, drawn: Mapping[str, bytes]) -> str:
  """The whole of report.html.

  Args:
    figures: what to show; all of `more_samples` can be filtered in the page.
    drawn: file name -> PNG, from `plots.make_plots`.
  """
  minutes = sum(figures.seconds.values()) / 60
  found = [
    *sections.results(figures, set(drawn)),
    *sections.background(figures),
    sections.Section(
      'Command', [f'Commit {figures.commit}.', sections.Code(figures.command)]
    ),
  ]
  answers = _answers(
    figures.more_samples or figures.samples, figures.score_name
  )
  if answers is None:
    found.append(
      sections.Section(
        'Answers side by side', [sections.left_out(figures, 'samples')]
      )
    )
  return make_page(
    figures.title,
    [
      f'Judge: {figures.judge}. Intervals are 95 %, redrawing prompts (losses: '
      'documents).',
      f'Config {figures.config_name}, seed {figures.seed}, commit '
      f'{figures.commit[:12]}, {minutes:.1f} minutes.',
    ],
    # No alarm needs no heading.
    found if figures.alarms else found[1:],
    drawn,
    _tiles(figures),
    answers,
  )
