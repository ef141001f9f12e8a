"""The report of a run: report.md, its plots and summary.json.

Everything arrives as plain data in `run_figures.Figures`; nothing is computed
here beyond what a reader would otherwise do by eye. A part without data is left
out, and the report says so and why. Text that came out of a model is shown as
text: no sample can become a link, an image, HTML or a column of its own.

Files of `write_report`, each written whole or not at all:
  report.md             all of it
  report.html           the same to look at: one file, with samples to filter
  summary.json          the figures that other programs read
  win_rate.png          the paper's Figure 1, for one model size
  metadata.png          the paper's Figure 4
  reward_kl.png         score against KL of PPO and PPO-ptx
  pretraining_loss.png  the alignment tax along RL (paper 4.2)
  probes.png            the same on public NLP tasks (Figure 35)
  rl.png                score, KL, entropy, length, ... along RL
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
from instruct_jax.evals import html_report, plots, run_figures, sections

_MAX_SAMPLE_CHARACTERS = 500


def draw(figures: run_figures.Figures) -> dict[str, bytes]:
  """The plots that have data, as PNG by file name.

  Raises:
    ValueError: a model, or a key of `reasons`, that no part of it knows.
  """
  _check(figures)
  return plots.make_plots(figures)


def write_report(
  directory: epath.PathLike,
  figures: run_figures.Figures,
  drawn: Mapping[str, bytes] | None = None,
) -> None:
  """Writes report.md, summary.json and the plots that have data.

  Args:
    directory: created if need be; files of the same names are replaced, each
      by a rename, so a reader never sees half of one.
    figures: what to show.
    drawn: from `draw`, where one drawing serves several folders.

  Raises:
    ValueError: a model, or a key of `reasons`, that no part of it knows.
  """
  _check(figures)
  directory = epath.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  drawn = draw(figures) if drawn is None else drawn
  for name, content in drawn.items():
    files.write_bytes(directory / name, content)
  summary = json.dumps(
    make_summary(figures), indent=2, ensure_ascii=False, allow_nan=False
  )
  files.write_bytes(directory / 'summary.json', (summary + '\n').encode())
  page = html_report.make_html(figures, drawn)
  files.write_bytes(directory / 'report.html', page.encode())
  # Last: whoever finds report.md finds all that it points at.
  text = make_markdown(figures, set(drawn))
  files.write_bytes(directory / 'report.md', text.encode())


def _check(figures: run_figures.Figures) -> None:
  known = (
    ('win_rate', figures.win_rate, run_figures.MODELS),
    ('win_rate_by_category', figures.win_rate_by_category, run_figures.MODELS),
    ('rl_metrics', figures.rl_metrics, run_figures.RL_MODELS),
    ('kl', figures.kl, run_figures.RL_MODELS),
    ('reasons', figures.reasons, run_figures.SECTIONS),
  )
  for name, given, allowed in known:
    unknown = sorted(set(given) - set(allowed))
    if unknown:
      raise ValueError(f'{name} has unknown keys {unknown}; known: {allowed}')


# summary.json


def plain_json(value: Any) -> Any:
  """Plain JSON: dataclasses as dicts, NumPy scalars as numbers, NaN as null."""
  if dataclasses.is_dataclass(value):
    value = dataclasses.asdict(value)
  if isinstance(value, Mapping):
    return {str(key): plain_json(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [plain_json(item) for item in value]
  if hasattr(value, 'tolist'):  # NumPy scalars and arrays.
    return plain_json(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def make_summary(figures: run_figures.Figures) -> dict[str, Any]:
  """The content of summary.json; a figure that was not measured is null.

  `reward_model`, `pretraining_loss`, `metadata` and `kl` hold means; their
  intervals, the alarms and `Figures.extra` are under `extra`.
  """
  reward, loss = figures.reward_model, figures.pretraining_loss

  def part(owner: Any, name: str, field: str) -> float | None:
    value = None if owner is None else getattr(owner, name)
    return None if value is None else getattr(value, field)

  return plain_json(
    {
      'win_rate': {
        model: figures.win_rate.get(model) for model in run_figures.MODELS
      },
      'reward_model': {
        'accuracy': part(reward, 'accuracy', 'accuracy'),
        'ceiling': None if reward is None else reward.ceiling,
        'intra': part(reward, 'intra', 'mean'),
        'inter': part(reward, 'inter', 'mean'),
        'agreement': part(reward, 'agreement', 'rate'),
      },
      'pretraining_loss': {
        name: part(loss, name, 'mean') for name in ('init', 'ppo', 'ppo_ptx')
      },
      'kl': {model: figures.kl.get(model) for model in run_figures.RL_MODELS},
      'metadata': {
        model: {label: share.mean for label, share in row.items()}
        for model, row in figures.metadata.items()
      },
      'likert': figures.likert,
      'seconds': figures.seconds,
      'seed': figures.seed,
      'commit': figures.commit,
      'versions': figures.versions,
      'extra': {
        **figures.extra,
        'judge': figures.judge,
        'alarms': list(figures.alarms),
        'intervals': {
          'metadata': figures.metadata,
          'pretraining_loss': loss,
          'reward_model': reward
          and {
            field.name: getattr(reward, field.name)
            for field in dataclasses.fields(reward)
            if field.name != 'curve'
          },
        },
        'sft_selected_epoch': figures.sft_selected_epoch,
      },
    }
  )


# report.md

# Marks that Markdown, its GitHub dialect or HTML give a meaning: an underscore
# outside of a word; "://", at and "www." because bare addresses become links.
_MARKS = re.compile(
  r'[\\`*\[\]<>#|~&$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.',
  re.IGNORECASE,
)


def escape(text: str) -> str:
  """Text that Markdown shows as it is, on one line of a table or paragraph.

  Marks become character references, line breaks `<br>`, invisible control
  characters U+FFFD, so text of a model cannot act on the report around it.
  """
  text = sections.visible(text.replace('\r\n', '\n').replace('\r', '\n'))
  text = _MARKS.sub(lambda match: f'&#{ord(match.group())};', text)
  return text.replace('\t', ' ').replace('\n', '<br>')


def _shorten(text: str) -> str:
  if len(text) <= _MAX_SAMPLE_CHARACTERS:
    return text
  return text[:_MAX_SAMPLE_CHARACTERS] + ' …'


def cell(value: Any) -> str:
  """A table cell: a number, `mean [low, high]`, `mean ± error` or text."""
  found = sections.shown(value)
  text = f'{escape(found.text)} {found.rest}'.strip()
  return f'**{text}**' if found.best else text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  """Lines of a Markdown table; cells are escaped already."""
  lines = ['| ' + ' | '.join(head) + ' |']
  lines.append('|' + ' --- |' * len(head))
  lines += ['| ' + ' | '.join(row) + ' |' for row in rows]
  return [*lines, '']


def section_lines(found: Iterable[sections.Section]) -> list[str]:
  """Lines of Markdown."""
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
  if isinstance(part, sections.LeftOut):
    what = f'{escape(part.what)}: ' if part.what else ''
    return [f'{what}*Left out: {escape(part.reason)}.*', '']
  if isinstance(part, sections.Code):
    return _fence(part.text)
  return [escape(part), '']


def _fence(text: str) -> list[str]:
  # Longer than any run of backticks inside, so that the block ends at its end.
  runs = [len(run) for run in re.findall('`+', text)]
  fence = '`' * max(3, 1 + max(runs, default=0))
  return [fence, text, fence, '']


def _short_result(figures: run_figures.Figures) -> list[str]:
  """The claims of the run, each with its number and its doubt."""
  lines = []
  for model, rate in run_figures.ordered(figures.win_rate):
    if model == 'sft':
      continue
    verdict = sections.verdict(rate)
    lines.append(
      f'- {escape(run_figures.label(model))} is {verdict} '
      f'{"from" if verdict == "not told apart" else "than"} SFT: win rate '
      f'{cell(rate)}, {rate.num_prompts:,} prompts.'
    )
  reward = figures.reward_model
  if reward is not None:
    line = f'- The reward model orders {cell(reward.accuracy)} of the pairs'
    if reward.ceiling is not None:
      gap = 100 * (reward.ceiling - reward.accuracy.accuracy)
      line += f'; the ceiling is {cell(reward.ceiling)} ({gap:.1f} points up)'
    lines.append(line + '.')
  loss = figures.pretraining_loss
  if loss is not None and loss.difference is not None:
    apart = loss.difference.low > 0 or loss.difference.high < 0
    lines.append(
      '- Pretraining loss of PPO-ptx minus PPO: '
      f'{cell(loss.difference)} nats per token; the interval '
      f'{"excludes" if apart else "includes"} 0.'
    )
  return [*lines, ''] if lines else []


def _samples_lines(figures: run_figures.Figures) -> list[str]:
  lines = ['## Answers side by side', '']
  if not figures.samples:
    return lines + _part_lines(sections.left_out(figures, 'samples'))
  models = [
    model for model, _ in run_figures.ordered(figures.samples[0].answers)
  ]
  lines += [
    'The prompts take turns by use case and are not picked by hand. In '
    f'brackets: {escape(figures.score_name)} score.',
    '',
  ]
  rows = []
  for row in figures.samples:
    cells = [escape(_shorten(row.prompt))]
    if row.category:
      cells[0] = f'**{escape(row.category)}**<br>{cells[0]}'
    for model in models:
      answer = row.answers[model]
      text = escape(_shorten(answer.response)) or '*(empty)*'
      if not answer.ended:
        text += ' *(cut)*'
      if answer.score_gold is not None:
        text += f' **[{cell(answer.score_gold)}]**'
      cells.append(text)
    rows.append(cells)
  head = ['prompt', *(escape(run_figures.label(model)) for model in models)]
  return lines + table(head, rows)


def make_markdown(figures: run_figures.Figures, drawn: set[str]) -> str:
  """The text of report.md.

  Args:
    figures: what to show.
    drawn: names of the plots that exist; others are not pointed at.
  """
  lines = [f'# {escape(figures.title)}', '']
  lines += _part_lines(sections.Code(figures.command))
  lines += [
    f'Config {escape(figures.config_name)}, seed {figures.seed}, commit '
    f'{escape(figures.commit)}. Intervals in brackets are 95 %, by bootstrap '
    'clustered on prompts (losses: on documents).',
    '',
  ]
  lines += _short_result(figures)
  lines += section_lines(sections.results(figures, drawn))
  lines += _samples_lines(figures)
  lines += section_lines(sections.background(figures))
  return '\n'.join(lines).rstrip() + '\n'
