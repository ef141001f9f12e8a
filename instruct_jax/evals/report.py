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

from instruct_jax.evals import (
  html_report,
  plots,
  preference_accuracy,
  run_figures,
)

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
    write_file(directory / name, content)
  summary = json.dumps(
    make_summary(figures), indent=2, ensure_ascii=False, allow_nan=False
  )
  write_file(directory / 'summary.json', (summary + '\n').encode())
  page = html_report.make_html(figures, drawn)
  write_file(directory / 'report.html', page.encode())
  # Last: whoever finds report.md finds all that it points at.
  text = make_markdown(figures, set(drawn))
  write_file(directory / 'report.md', text.encode())


def write_file(path: epath.Path, content: bytes) -> None:
  """Writes a file whole or not at all."""
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_bytes(content)
  temporary.replace(path)


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

  `reward_model`, `pretraining_loss` and `kl` hold means; their intervals, the
  alarms and `Figures.extra` are under `extra`.
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
      'metadata': figures.metadata,
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
# Control characters and the marks that reorder text on the screen.
_INVISIBLE = re.compile(
  '[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]'
)


def escape(text: str) -> str:
  """Text that Markdown shows as it is, on one line of a table or paragraph.

  Marks become character references, line breaks `<br>`, invisible control
  characters U+FFFD, so text of a model cannot act on the report around it.
  """
  text = text.replace('\r\n', '\n').replace('\r', '\n')
  text = _INVISIBLE.sub('\ufffd', text)
  text = _MARKS.sub(lambda match: f'&#{ord(match.group())};', text)
  return text.replace('\t', ' ').replace('\n', '<br>')


def _shorten(text: str) -> str:
  if len(text) <= _MAX_SAMPLE_CHARACTERS:
    return text
  return text[:_MAX_SAMPLE_CHARACTERS] + ' …'


def _name(name: str) -> str:
  """A model's label, or any other key as words."""
  return escape(
    run_figures.LABELS[name]
    if name in run_figures.LABELS
    else name.replace('_', ' ')
  )


def cell(value: Any) -> str:
  """A table cell: a number, `mean [low, high]`, `mean ± error` or text."""
  if hasattr(value, 'tolist'):
    value = value.tolist()
  if value is None or (isinstance(value, float) and not math.isfinite(value)):
    return '–'
  if dataclasses.is_dataclass(value):
    numbers = list(dataclasses.asdict(value).values())
    if isinstance(value, preference_accuracy.Spread):
      tail = '' if value.error is None else f' ± {cell(value.error)}'
      return cell(value.mean) + tail
    mean, low, high = (cell(number) for number in numbers[:3])
    return f'{mean} [{low}, {high}]'
  if isinstance(value, bool) or not isinstance(value, int | float):
    return escape(str(value))
  if isinstance(value, int):
    return f'{value:,}'
  if value and not 1e-3 <= abs(value) < 1e5:
    return f'{value:.2e}'
  return f'{value:.3f}' if abs(value) < 100 else f'{value:.1f}'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  """Lines of a Markdown table; cells are escaped already."""
  lines = ['| ' + ' | '.join(head) + ' |']
  lines.append('|' + ' --- |' * len(head))
  lines += ['| ' + ' | '.join(row) + ' |' for row in rows]
  return [*lines, '']


def _pairs(head: Sequence[str], values: Mapping[str, Any]) -> list[str]:
  return table(
    head, [(_name(key), cell(value)) for key, value in values.items()]
  )


def _image(name: str, alt: str, drawn: set[str]) -> list[str]:
  return [f'![{alt}]({name})', ''] if name in drawn else []


def _fence(text: str) -> list[str]:
  # Longer than any run of backticks inside, so that the block ends at its end.
  runs = [len(run) for run in re.findall('`+', text)]
  fence = '`' * max(3, 1 + max(runs, default=0))
  return [fence, text, fence, '']


def _left_out(figures: run_figures.Figures, section: str) -> list[str]:
  reason = 'not measured in this run'
  if section in figures.reasons:
    reason = figures.reasons[section]
  return [f'*Left out: {escape(reason)}.*', '']


def _short_result(figures: run_figures.Figures) -> list[str]:
  """The claims of the run, each with its number and its doubt."""
  lines = []
  for model in run_figures.MODELS:
    if model == 'sft' or model not in figures.win_rate:
      continue
    rate = figures.win_rate[model]
    if rate.low > 0.5:
      verdict = 'better than SFT'
    elif rate.high < 0.5:
      verdict = 'worse than SFT'
    else:
      verdict = 'not told apart from SFT'
    lines.append(
      f'- {_name(model)} is {verdict}: win rate {cell(rate)}, '
      f'{rate.num_prompts:,} prompts.'
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


def _by_model(first: str, values: Mapping[str, Mapping[str, Any]]) -> list[str]:
  columns = run_figures.ordered(values)
  return table(
    [first, *(_name(model) for model, _ in columns)],
    [
      [
        _name(name),
        *(
          cell(column[name]) if name in column else '–' for _, column in columns
        ),
      ]
      for name in run_figures.row_names(values)
    ],
  )


def _win_rate_section(
  figures: run_figures.Figures, drawn: set[str]
) -> list[str]:
  lines = ['## Win rate against SFT', '']
  lines += [f'Judge: {escape(figures.judge)}. Ties count one half.', '']
  lines += _image('win_rate.png', 'Win rate by model', drawn)
  lines += table(
    ['model', 'win rate', '95 % interval', 'prompts'],
    [
      (
        _name(model),
        cell(rate.rate),
        f'{cell(rate.low)} – {cell(rate.high)}',
        f'{rate.num_prompts:,}',
      )
      for model, rate in run_figures.ordered(figures.win_rate)
    ],
  )
  lines += ['### By use case', '']
  if figures.win_rate_by_category:
    lines += _by_model('use case', figures.win_rate_by_category)
  else:
    lines += _left_out(figures, 'categories')
  return lines


def _metadata_section(
  figures: run_figures.Figures, drawn: set[str]
) -> list[str]:
  lines = []
  if figures.likert:
    lines += ['## Overall quality, 1 to 7', '']
    lines += _by_model('', {m: {'all': v} for m, v in figures.likert.items()})
    lines += _by_model('use case', figures.likert_by_category)
  lines += ['## Labels of single answers (paper, Table 3)', '']
  if not figures.metadata:
    return lines + _left_out(figures, 'metadata')
  lines += _image('metadata.png', 'Labels by model', drawn)
  lines += ['Share of the answers that have the label.', '']
  return lines + _by_model('label', figures.metadata)


def _rl_section(figures: run_figures.Figures, drawn: set[str]) -> list[str]:
  lines = ['## PPO and PPO-ptx', '']
  if figures.kl:
    lines += _pairs(['model', 'KL at the end, nats per response'], figures.kl)
  else:
    lines += ['KL at the end: ', *_left_out(figures, 'kl')]
  if drawn & {'reward_kl.png', 'rl.png'}:
    lines += _image('reward_kl.png', 'Reward against KL', drawn)
    lines += _image('rl.png', 'Along RL', drawn)
  else:
    lines += _left_out(figures, 'rl')
  lines += ['### Pretraining loss', '']
  lines += _image('pretraining_loss.png', 'Pretraining loss along RL', drawn)
  lines += _image('probes.png', 'Public tasks along RL', drawn)
  loss = figures.pretraining_loss
  if loss is None:
    return lines + _left_out(figures, 'pretraining_loss')
  rows = [
    ('RL initialisation', loss.init),
    ('PPO', loss.ppo),
    ('PPO-ptx', loss.ppo_ptx),
    ('PPO-ptx minus PPO, paired by document', loss.difference),
  ]
  return lines + table(
    ['', 'nats per token', 'documents'],
    [
      (label, cell(value), f'{value.num_clusters:,}')
      for label, value in rows
      if value is not None
    ],
  )


def _reward_section(figures: run_figures.Figures, drawn: set[str]) -> list[str]:
  lines = ['## Reward model', '']
  reward = figures.reward_model
  if reward is None:
    return lines + _left_out(figures, 'reward_model')
  lines += _image('reward_model.png', 'Reward-model accuracy', drawn)
  rows = []
  for label, _, value in run_figures.reward_rows(reward):
    if isinstance(value, preference_accuracy.Spread):
      basis = f'{value.num_runs:,} runs, ± standard error'
    else:
      basis = f'{value.num_pairs:,} pairs'
    rows.append((label, cell(value), basis))
  if reward.ceiling is not None:
    rows.insert(
      1,
      (
        'the gold utility on the same pairs',
        cell(reward.ceiling),
        'ceiling',
      ),
    )
  return lines + table(['share of pairs ordered alike', '', 'over'], rows)


def _sft_section(figures: run_figures.Figures, drawn: set[str]) -> list[str]:
  lines = ['## Supervised fine-tuning by epoch', '']
  if not figures.sft_epochs:
    return lines + _left_out(figures, 'sft')
  if figures.sft_selected_epoch is not None:
    by = f', by {escape(figures.sft_selected_by)}'
    lines += [
      f'Selected: epoch {figures.sft_selected_epoch}'
      f'{by if figures.sft_selected_by else ""}.',
      '',
    ]
  lines += _image('sft.png', 'SFT by epoch', drawn)
  return lines + table(
    ['epoch', 'validation loss', 'reward-model score', 'judge'],
    [
      [
        str(epoch.epoch),
        cell(epoch.valid_loss),
        cell(epoch.score_reward),
        cell(epoch.score_gold),
      ]
      for epoch in figures.sft_epochs
    ],
  )


def _samples_section(figures: run_figures.Figures) -> list[str]:
  lines = ['## Answers side by side', '']
  if not figures.samples:
    return lines + _left_out(figures, 'samples')
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
  return lines + table(['prompt', *(_name(model) for model in models)], rows)


def _data_section(figures: run_figures.Figures) -> list[str]:
  lines = ['## Data', '']
  parts = (
    ('Records', 'data_sizes', ['data set', 'records'], figures.data_sizes),
    ('Hygiene (paper, A.1 and A.2)', 'hygiene', ['', 'count'], figures.hygiene),
    ('Labelers', 'labelers', ['', 'figure'], figures.labelers),
  )
  for title, section, head, values in parts:
    lines += [f'### {title}', '']
    if values:
      lines += _pairs(head, values)
    else:
      lines += _left_out(figures, section)
  return lines


def _extra_section(figures: run_figures.Figures) -> list[str]:
  lines = []
  for title, rows in figures.extra.items():
    lines += [f'## {_name(title)}', '']
    if rows and all(isinstance(row, Mapping) for row in rows.values()):
      columns = dict.fromkeys(name for row in rows.values() for name in row)
      lines += table(
        ['', *(_name(column) for column in columns)],
        [
          [
            _name(name),
            *(cell(row[c]) if c in row else '–' for c in columns),
          ]
          for name, row in rows.items()
        ],
      )
    else:
      lines += _pairs(['', 'figure'], rows)
  return lines


def make_markdown(figures: run_figures.Figures, drawn: set[str]) -> str:
  """The text of report.md.

  Args:
    figures: what to show.
    drawn: names of the plots that exist; others are not pointed at.
  """
  lines = [f'# {escape(figures.title)}', '']
  lines += _fence(figures.command)
  lines += [
    f'Config {escape(figures.config_name)}, seed {figures.seed}, commit '
    f'{escape(figures.commit)}. Intervals in brackets are 95 %, by bootstrap '
    'clustered on prompts (losses: on documents).',
    '',
  ]
  lines += _short_result(figures)
  lines += ['## Alarms', '']
  if figures.alarms:
    lines += [*(f'- {escape(alarm)}' for alarm in figures.alarms), '']
  elif 'alarms' in figures.reasons:
    lines += _left_out(figures, 'alarms')
  else:
    lines += ['None.', '']
  lines += _win_rate_section(figures, drawn)
  lines += _metadata_section(figures, drawn)
  lines += _rl_section(figures, drawn)
  lines += _reward_section(figures, drawn)
  lines += _sft_section(figures, drawn)
  lines += _extra_section(figures)
  lines += _samples_section(figures)
  lines += _data_section(figures)
  lines += ['## Run', '']
  seconds = dict(figures.seconds)
  lines += _pairs(
    ['stage', 'seconds'], {**seconds, 'all stages': sum(seconds.values())}
  )
  lines += _pairs(['package', 'version'], figures.versions)
  return '\n'.join(lines).rstrip() + '\n'
