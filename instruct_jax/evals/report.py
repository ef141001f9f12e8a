"""The report of an evaluation: report.md, its plots and summary.json.

`figures.Figures` holds all figures; nothing is measured here. Model output is
escaped, so no sample can become a link, an image, HTML or a table column.

`write_report` writes these files, each atomically:
  report.md             everything
  report.html           the same as one page, with samples to filter
  summary.json          the figures, for other programs
  win_rate.png          the paper's Figure 1, for one model size
  metadata.png          the paper's Figure 4
  reward_kl.png         score against KL during RL
  pretraining_loss.png  the alignment tax during RL (paper 4.2)
  probes.png            the same on public NLP tasks (Figure 35)
  rl.png                score, KL, entropy, length, ... during RL
  reward_model.png      accuracies and agreement (paper E.2), training curve
  sft.png               validation loss and scores by epoch (paper C.1)
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from instruct_jax import files
from instruct_jax.data import invisible, records
from instruct_jax.evals import figures, html_report, plots, sections

_MAX_SAMPLE_CHARACTERS = 500
_MAX_TURNS = 3


def write_report(
  directory: epath.PathLike,
  shown: figures.Figures,
  drawn: Mapping[str, bytes] | None = None,
) -> None:
  """Writes report.md, report.html, summary.json and the plots that have data.

  Creates the folder if needed and replaces files of the same names, each by a
  rename. Pass `drawn`, from `plots.make_plots`, to draw the plots only once for
  several folders.
  """
  directory = epath.Path(directory)
  drawn = plots.make_plots(shown) if drawn is None else drawn
  summary = json.dumps(
    make_summary(shown), indent=2, ensure_ascii=False, allow_nan=False
  )
  for name, content in (
    *drawn.items(),
    ('summary.json', (summary + '\n').encode()),
    ('report.html', html_report.make_html(shown, drawn).encode()),
    # Last, because it links to the plots.
    ('report.md', make_markdown(shown, set(drawn)).encode()),
  ):
    files.write_bytes(directory / name, content)


# summary.json


def plain_json(value: Any) -> Any:
  """Plain JSON: dataclasses as dicts, NumPy scalars as numbers, NaN as null."""
  if dataclasses.is_dataclass(value):
    value = vars(value)
  if isinstance(value, Mapping):
    return {
      ' – '.join(key) if isinstance(key, tuple) else str(key): plain_json(item)
      for key, item in value.items()
    }
  if isinstance(value, list | tuple):
    return [plain_json(item) for item in value]
  if hasattr(value, 'tolist'):  # NumPy scalars and arrays.
    return plain_json(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def make_summary(shown: figures.Figures) -> dict[str, Any]:
  """The content of summary.json; models are in the order of the config.

  `reward_model`, `pretraining_loss`, `metadata` and `kl` hold means; their
  intervals are under `intervals`. Figures not measured are null or empty.
  """
  reward, outcomes, labels = shown.reward_model, shown.outcomes, shown.labels()
  accuracies = reward and {
    'accuracy': reward.accuracy.accuracy,
    'ceiling': reward.ceiling,
    'intra': reward.intra and reward.intra.mean,
    'inter': reward.inter and reward.inter.mean,
    'agreement': reward.agreement and reward.agreement.rate,
  }
  return plain_json(
    {
      'judge': shown.judge,
      'baseline': shown.baseline,
      'alarms': shown.alarms,
      'win_rate': outcomes.rates,
      'win_rate_by_category': outcomes.by_category,
      'length_controlled': outcomes.length_controlled,
      'bradley_terry': outcomes.bradley_terry,
      'pairs': outcomes.pairs,
      'first_place': outcomes.first_place if shown.has_places else None,
      'reward_model': accuracies,
      'pretraining_loss': {
        name: loss.mean for name, loss in shown.text_loss.items()
      },
      'kl': {name: row['signed mean'] for name, row in shown.kl.items()},
      'metadata': {
        model: {label: share.mean for label, share in row.items()}
        for model, row in labels.items()
      },
      'likert': shown.likert(),
      'ratings_by_category': shown.ratings_by_category,
      'intervals': {
        'metadata': labels,
        'pretraining_loss': shown.text_loss,
        'pretraining_loss_difference': shown.text_loss_difference,
        'other_text_loss': shown.other_text_loss,
        'other_text_loss_difference': shown.other_text_loss_difference,
        'reward_model': reward and dataclasses.replace(reward, curve=()),
      },
      'everyone': shown.everyone,
      'models': shown.asked,
      **{
        name: getattr(shown, name)
        for name in ('prompts', 'settings', 'asking', 'seconds', 'seed')
      },
      'commit': shown.commit,
      'versions': shown.versions,
      'extra': {
        **shown.tables,
        'prefixes': shown.prefixes,
        'suite': shown.suite,
        'kl': shown.kl,
        'selected_epoch': {
          model: epochs.selected for model, epochs in shown.epochs.items()
        },
      },
    }
  )


# report.md

# Characters with a meaning in Markdown, its GitHub dialect or HTML. Underscores
# count except inside a word. "://", "@" and "www." count because bare addresses
# become links.
_MARKS = re.compile(
  r'[\\`*\[\]<>#|~&$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.',
  re.IGNORECASE,
)
# Bracket pairs to keep: not a link, image, footnote, task or definition.
_BRACKETS = re.compile(r'(?<!!)\[(?!\^|[ xX]?\])[^\[\]]*\](?![(\[:])')


def escape(text: str) -> str:
  """Text that Markdown shows unchanged, on one line of a table or paragraph.

  Special characters become character references, line breaks become `<br>`, and
  invisible control characters become U+FFFD. Pairs of brackets without a
  meaning in Markdown stay.
  """
  text = sections.visible(text.replace('\r\n', '\n').replace('\r', '\n'))
  kept = {
    place
    for pair in _BRACKETS.finditer(text)
    for place in (pair.start(), pair.end() - 1)
  }
  text = _MARKS.sub(
    lambda mark: (
      mark.group() if mark.start() in kept else f'&#{ord(mark.group())};'
    ),
    text,
  )
  return text.replace('\t', ' ').replace('\n', '<br>')


def _shorten(text: str) -> str:
  if len(text) <= _MAX_SAMPLE_CHARACTERS:
    return text
  return text[:_MAX_SAMPLE_CHARACTERS] + ' …'


def cell(value: Any) -> str:
  """A table cell: a number, `mean [low, high]`, `mean ± error` or text."""
  found = sections.shown_cell(value)
  text = f'{escape(found.text)} {found.doubt}'.strip()
  return f'**{text}**' if found.best else text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  """Lines of a Markdown table; cells must already be escaped."""
  first, *others = ('| ' + ' | '.join(row) + ' |' for row in (head, *rows))
  return [first, '|' + ' --- |' * len(head), *others, '']


def section_lines(found: Iterable[sections.Section]) -> list[str]:
  """The sections as lines of Markdown."""
  lines = []
  for section in found:
    lines += [f'{"#" * section.level} {escape(section.title)}', '']
    for part in section.parts:
      lines += _part_lines(part)
  return lines


def _part_lines(part: sections.Part) -> list[str]:
  if isinstance(part, sections.Table):
    return table(
      [escape(name) for name in part.head],
      [[cell(value) for value in row] for row in part.rows],
    )
  if isinstance(part, sections.Picture):
    return [f'![{escape(part.title)}]({part.name})', '']
  if isinstance(part, sections.Bullets):
    return [*(f'- {escape(item)}' for item in part.items), '']
  if isinstance(part, sections.Code):
    return _fence(part.text)
  return [escape(part), '']


def _fence(text: str) -> list[str]:
  # Longer than any run of backticks inside, so that none closes the block.
  runs = [len(run) for run in re.findall('`+', text)]
  fence = '`' * max(3, 1 + max(runs, default=0))
  return [fence, text, fence, '']


def _prompt_cell(turns: Sequence[records.Turn]) -> str:
  *earlier, last = turns
  if not earlier and last.role == 'user':
    return escape(_shorten(last.content))
  hidden = max(0, len(turns) - _MAX_TURNS)
  lines = [f'*earlier turns: {hidden}*'] if hidden else []
  for turn in turns[hidden:]:
    lines.append(f'**{turn.role}:** {escape(_shorten(turn.content))}')
  return '<br>'.join(lines)


def _samples_lines(shown: figures.Figures) -> list[str]:
  if not shown.samples:
    return []
  lines = [
    '## Answers side by side',
    '',
    'The prompts alternate between use cases and are not picked by hand. In '
    f'brackets: {escape(shown.unit)} score.',
    '',
  ]
  rows = []
  for row in shown.samples:
    cells = [_prompt_cell(row.turns)]
    if row.category:
      cells[0] = f'**{escape(row.category)}**<br>{cells[0]}'
    for answer in row.answers.values():
      text = escape(_shorten(answer.response))
      if invisible.is_blank(answer.response):
        text += '*(empty)*'
      if not answer.ended:
        text += ' *(cut)*'
      if answer.score_judge is not None:
        text += f' **[{cell(answer.score_judge)}]**'
      cells.append(text)
    rows.append(cells)
  head = ['prompt', *map(escape, shown.samples[0].answers)]
  return lines + table(head, rows)


def make_markdown(shown: figures.Figures, drawn: set[str]) -> str:
  """The text of report.md; `drawn` names the plots that exist."""
  lines = [f'# {escape(shown.title)}', '']
  lines += _part_lines(sections.Code(shown.command))
  lines += [
    f'Seed {shown.seed}, commit {escape(shown.commit)}. Intervals in brackets '
    'are 95 %, by bootstrap clustered on prompts (losses: on rows).',
    '',
  ]
  lines += [
    f'- **{escape(claim.figure)}** {escape(claim.what)} ({escape(claim.doubt)})'
    for claim in sections.claims(shown)
  ]
  lines += ['', *section_lines(sections.results(shown, drawn))]
  lines += _samples_lines(shown)
  lines += section_lines(sections.background(shown))
  return '\n'.join(lines).rstrip() + '\n'
