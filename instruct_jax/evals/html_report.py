"""report.html: the report of a run as one file to look at.

Pictures are inside the file, nothing is loaded from anywhere, and a content
security policy forbids it: only the file's own script runs, by its hash, so no
sample can run one. Text of models and labelers is escaped. Filters of the
samples can be in the address: `report.html#category=chat&search=fox`.
"""

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence

from instruct_jax.evals import run_figures, samples, win_rate

_PICTURES = {
  'win_rate.png': 'Win rates',
  'metadata.png': 'Labels of single answers',
  'reward_kl.png': 'Reward against KL',
  'pretraining_loss.png': 'The alignment tax: loss on pretraining text',
  'probes.png': 'The alignment tax: public NLP tasks along RL',
  'rl.png': 'Along RL',
  'reward_model.png': 'Reward model and labelers',
  'sft.png': 'Supervised fine-tuning by epoch',
}

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff;
  --soft: #f3f3f1; --line: #d9d9d4; --good: #00795a; --bad: #b8400e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e4; --paper: #171716;
  --soft: #242422; --line: #3d3d3a; --good: #3fc79a; --bad: #ff9561; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 76rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; }
.small { opacity: .75; font-size: .9rem; }
.tiles { display: grid; gap: 1rem; margin: 1.5rem 0;
  grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); }
.tile { background: var(--soft); border-radius: .6rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.9rem; line-height: 1.2; }
.good b { color: var(--good); } .bad b { color: var(--bad); }
.pictures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); }
figure { margin: 0; background: #fff; border: 1px solid var(--line);
  border-radius: .6rem; padding: .6rem; color: #1c1c1c; }
figure img { width: 100%; } figcaption { font-size: .85rem; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem;
  text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
.filters { display: flex; flex-wrap: wrap; gap: .8rem; align-items: center;
  position: sticky; top: 0; background: var(--paper); padding: .6rem 0; }
.filters input, .filters select { font: inherit; padding: .25rem .5rem; }
.text { white-space: pre-wrap; }
.alarm { border-left: .3rem solid var(--bad); padding-left: .8rem; }
[hidden] { display: none; }
"""

_SCRIPT = """
(function () {
  var rows = Array.prototype.slice.call(
    document.querySelectorAll('#samples tbody tr'));
  var category = document.getElementById('category');
  var search = document.getElementById('search');
  var order = document.getElementById('order');
  var shown = document.getElementById('shown');
  var boxes = Array.prototype.slice.call(
    document.querySelectorAll('.filters input[type=checkbox]'));
  if (!category) { return; }
  function apply() {
    var wanted = search.value.toLowerCase(), count = 0;
    rows.forEach(function (row) {
      var ok = (!category.value || row.dataset.category === category.value) &&
        row.textContent.toLowerCase().indexOf(wanted) >= 0;
      row.hidden = !ok;
      if (ok) { count += 1; }
    });
    shown.textContent = count + ' of ' + rows.length + ' prompts';
    boxes.forEach(function (box) {
      document.querySelectorAll('[data-model="' + box.value + '"]').forEach(
        function (cell) { cell.hidden = !box.checked; });
    });
  }
  function sort() {
    var key = order.value, body = document.querySelector('#samples tbody');
    rows.sort(function (a, b) {
      return key === 'first' ? a.dataset.number - b.dataset.number :
        (key === 'gain' ? -1 : 1) * (a.dataset.gain - b.dataset.gain);
    });
    rows.forEach(function (row) { body.appendChild(row); });
  }
  location.hash.slice(1).split('&').forEach(function (part) {
    var pair = part.split('=').map(decodeURIComponent);
    var field = { category: category, search: search, order: order }[pair[0]];
    if (field && pair.length === 2) { field.value = pair[1]; }
  });
  category.addEventListener('change', apply);
  search.addEventListener('input', apply);
  order.addEventListener('change', sort);
  boxes.forEach(function (box) { box.addEventListener('change', apply); });
  sort();
  apply();
})();
"""


def _text(value: object) -> str:
  return html.escape(str(value), quote=True)


def _number(value: float | None) -> str:
  return '–' if value is None else f'{value:.3f}'


def _range(value: win_rate.WinRate | win_rate.Interval) -> str:
  mean = value.rate if isinstance(value, win_rate.WinRate) else value.mean
  return (
    f'{mean:.3f} <span class="small">{value.low:.3f}–{value.high:.3f}</span>'
  )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table; cells are HTML already."""
  lines = ['<div class="scroll"><table><thead><tr>']
  lines += [f'<th>{cell}</th>' for cell in head]
  lines.append('</tr></thead><tbody>')
  for row in rows:
    cells = [
      f'<th>{row[0]}</th>',
      *(f'<td class="n">{c}</td>' for c in row[1:]),
    ]
    lines.append(f'<tr>{"".join(cells)}</tr>')
  lines.append('</tbody></table></div>')
  return ''.join(lines)


def _tiles(figures: run_figures.Figures) -> str:
  tiles = []
  for model, rate in run_figures.ordered(figures.win_rate):
    if model == 'sft':
      continue
    kind = 'good' if rate.low > 0.5 else 'bad' if rate.high < 0.5 else ''
    tiles.append(
      f'<div class="tile {kind}"><b>{rate.rate:.0%}</b>'
      f'{_text(run_figures.label(model))} against SFT'
      f'<div class="small">{rate.low:.1%} – {rate.high:.1%}, '
      f'{rate.num_prompts:,} prompts</div></div>'
    )
  reward = figures.reward_model
  if reward is not None:
    ceiling = (
      f'the ceiling is {reward.ceiling:.1%}, '
      if reward.ceiling is not None
      else ''
    )
    tiles.append(
      f'<div class="tile"><b>{reward.accuracy.accuracy:.0%}</b>'
      'of the pairs ordered by the reward model as by labelers'
      f'<div class="small">{ceiling}{reward.accuracy.num_pairs:,} pairs</div>'
      '</div>'
    )
  loss = figures.pretraining_loss
  if loss is not None and loss.difference is not None:
    difference = loss.difference
    kind = (
      'good' if difference.high < 0 else 'bad' if difference.low > 0 else ''
    )
    tiles.append(
      f'<div class="tile {kind}"><b>{difference.mean:+.3f}</b>'
      'nats a token: pretraining loss of PPO-ptx minus PPO'
      f'<div class="small">{difference.low:+.3f} – {difference.high:+.3f}</div>'
      '</div>'
    )
  return f'<div class="tiles">{"".join(tiles)}</div>'


def _pictures(drawn: Mapping[str, bytes]) -> str:
  parts = []
  for name, title in _PICTURES.items():
    if name in drawn:
      content = base64.b64encode(drawn[name]).decode('ascii')
      parts.append(
        f'<figure><img alt="{_text(title)}" '
        f'src="data:image/png;base64,{content}">'
        f'<figcaption>{_text(title)}</figcaption></figure>'
      )
  return f'<div class="pictures">{"".join(parts)}</div>'


def _categories(figures: run_figures.Figures) -> str:
  by_model = run_figures.ordered(figures.win_rate_by_category)
  if not by_model:
    return ''
  names = run_figures.row_names(figures.win_rate_by_category)
  return '<h2>By use case</h2>' + _table(
    ['', *(_text(run_figures.label(model)) for model, _ in by_model)],
    [
      [
        _text(name) or '–',
        *(_range(row[name]) if name in row else '–' for _, row in by_model),
      ]
      for name in names
    ],
  )


def _gain(row: samples.Row, models: Sequence[str]) -> float:
  """Judge's score of the last model minus the SFT model's, 0 where unknown."""
  if 'sft' not in row.answers:
    return 0.0
  last, first = row.answers[models[-1]], row.answers['sft']
  if last.score_gold is None or first.score_gold is None:
    return 0.0
  return last.score_gold - first.score_gold


def _samples(rows: Sequence[samples.Row], score_name: str) -> str:
  if not rows:
    return ''
  models = [model for model, _ in run_figures.ordered(rows[0].answers)]
  categories = sorted({row.category for row in rows if row.category})
  options = ''.join(f'<option>{_text(name)}</option>' for name in categories)
  boxes = ''.join(
    f'<label><input type="checkbox" value="{_text(model)}" checked> '
    f'{_text(run_figures.label(model))}</label>'
    for model in models
  )
  last = _text(run_figures.label(models[-1]))
  lines = [
    '<h2 id="answers">Answers side by side</h2><p class="small">Prompts take '
    f'turns by use case. In brackets: {_text(score_name)} score.</p>',
    '<div class="filters"><select id="category" aria-label="use case">'
    f'<option value="">all use cases</option>{options}</select>'
    '<input id="search" type="search" placeholder="search" '
    'aria-label="search">'
    '<select id="order" aria-label="order">'
    '<option value="first">as drawn</option>'
    f'<option value="gain">{last} best against SFT</option>'
    f'<option value="loss">{last} worst against SFT</option></select>'
    f'{boxes}<span id="shown" class="small"></span></div>',
    '<div class="scroll"><table id="samples"><thead><tr><th>prompt</th>',
    *(
      f'<th data-model="{_text(m)}">{_text(run_figures.label(m))}</th>'
      for m in models
    ),
    '</tr></thead><tbody>',
  ]
  for number, row in enumerate(rows):
    lines.append(
      f'<tr data-category="{_text(row.category)}" data-number="{number}" '
      f'data-gain="{_gain(row, models):.6f}"><td><span class="small">'
      f'{_text(row.category)}</span><div class="text">{_text(row.prompt)}</div>'
      '</td>'
    )
    for model in models:
      answer = row.answers[model]
      body = _text(answer.response) if answer.response else '<i>(empty)</i>'
      notes = '' if answer.ended else ' (cut)'
      if answer.score_gold is not None:
        notes += f' [{_number(answer.score_gold)}]'
      lines.append(
        f'<td data-model="{_text(model)}"><div class="text">{body}</div>'
        f'<span class="small">{notes}</span></td>'
      )
    lines.append('</tr>')
  lines.append('</tbody></table></div>')
  return ''.join(lines)


def make_html(figures: run_figures.Figures, drawn: Mapping[str, bytes]) -> str:
  """The whole of report.html.

  Args:
    figures: what to show; all of `more_samples` can be filtered in the page.
    drawn: file name -> PNG, from `plots.make_plots`.
  """
  digest = hashlib.sha256(_SCRIPT.encode('utf-8')).digest()
  script_hash = base64.b64encode(digest).decode('ascii')
  policy = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{script_hash}'"
  )
  title = _text(figures.title)
  alarms = ''.join(
    f'<p class="alarm">{_text(alarm)}</p>' for alarm in figures.alarms
  )
  metadata = run_figures.ordered(figures.metadata)
  labels = ''
  if figures.likert:
    likert = run_figures.ordered(figures.likert)
    cases = run_figures.ordered(figures.likert_by_category)
    labels += '<h2>Overall quality, 1 to 7</h2>' + _table(
      ['', *(_text(run_figures.label(model)) for model, _ in likert)],
      [
        ['all', *(_range(value) for _, value in likert)],
        *(
          [
            _text(name) or '–',
            *(_range(row[name]) if name in row else '–' for _, row in cases),
          ]
          for name in run_figures.row_names(figures.likert_by_category)
        ),
      ],
    )
  if metadata:
    labels += '<h2>Labels of single answers</h2>' + _table(
      ['', *(_text(run_figures.label(model)) for model, _ in metadata)],
      [
        [
          _text(name.replace('_', ' ')),
          *(f'{row[name]:.1%}' if name in row else '–' for _, row in metadata),
        ]
        for name in run_figures.row_names(figures.metadata)
      ],
    )
  shown = figures.more_samples or figures.samples
  seconds = sum(figures.seconds.values())
  return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<p class="small">Judge: {_text(figures.judge)}. Ties count one half. Intervals
are 95 %. Seed {figures.seed}, commit {_text(figures.commit)},
{seconds / 60:.1f} minutes.</p>
{_tiles(figures)}
{alarms}
{_pictures(drawn)}
{_categories(figures)}
{labels}
{_samples(shown, figures.score_name)}
<h2>Run</h2><pre class="text">{_text(figures.command)}</pre>
<script>{_SCRIPT}</script>
</body></html>
"""
