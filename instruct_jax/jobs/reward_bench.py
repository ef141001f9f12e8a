"""Tests reward models on benchmarks and preference sets (`evals.reward_bench`).

All models score the same items: an item that is too long for one model, or that
its chat template refuses, is left out for all, and counted. Baselines on answer
length and word counts score the same items.
"""

import hashlib
import json
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from instruct_jax import files, model_folder, queries
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import baselines, plots, report, reward_bench
from instruct_jax.infra import run as run_lib
from instruct_jax.infra import sharding
from instruct_jax.models.config import check_stage

PROCESSES = 'all'

LENGTH, WORDS, LONGER = 'length', 'bag of words', 'longer is better'
# The scorers that are not models.
BASELINES = (LONGER, LENGTH, WORDS)
# Why an item is left out.
TOO_LONG = 'longer than max_length or the context of the model'
REFUSED = 'refused by its chat template'
# Rows are padded to this many tokens or a doubling of it, so that few programs
# are compiled and little is padding.
SHORTEST = 64
KEPT = 'kept_scores'  # Folder of the scores of each finished model.


def named_sets(text: str) -> dict[str, tuple[str, str]]:
  """Parses 'FORMAT:PATH,NAME=FORMAT:PATH' into name -> (format, path).

  Raises:
    ValueError: a malformed part, an unknown format, or a repeated name.
  """
  found = {}
  for part in filter(None, text.split(',')):
    # A path may contain ':' and '='.
    head, colon, path = part.partition(':')
    name, _, kind = head.rpartition('=')
    name = name or kind
    if not (colon and kind and path) or name in found:
      raise ValueError(
        'sets must be FORMAT:PATH or NAME=FORMAT:PATH, separated by commas, '
        f'with distinct names: {part!r}'
      )
    reward_bench.check_format(kind)
    found[name] = kind, path
  return found


def validate(config: ConfigDict) -> None:
  """Checks the config. ValueError names the key."""
  check_stage(config)
  models = model_folder.named_folders(config.models)
  if not models:
    raise ValueError('models is empty; give NAME=FOLDER of a reward model')
  taken = set(map(scores_file, BASELINES))
  for name in models:
    if scores_file(name) in taken:
      raise ValueError(
        f'models: {name!r} is, in the name of a file, also a baseline or '
        'another model; choose another name'
      )
    taken.add(scores_file(name))
  if not named_sets(config.sets):
    raise ValueError('sets is empty; give FORMAT:PATH of at least one test set')
  if config.max_length < 0 or config.num_bootstrap < 1:
    raise ValueError(
      'max_length must not be negative and num_bootstrap at least 1: '
      f'{config.max_length}, {config.num_bootstrap}'
    )
  ours = [x for x in models.values() if not model_folder.is_published(x)]
  if ours and not config.tokenizer:
    raise ValueError(f'tokenizer is empty; give the folder for {ours[0]}')


def inputs(config: ConfigDict) -> dict[str, str]:
  """What this stage reads, by config key."""
  keys = ('tokenizer', 'comparisons')
  found = {key: config[key] for key in keys if config[key]}
  for name, folder in model_folder.named_folders(config.models).items():
    found[f'models.{name}'] = folder
  for name, (_, path) in named_sets(config.sets).items():
    found[f'sets.{name}'] = path.removeprefix('datasets:')
  return found


# --- Scores -------------------------------------------------------------------


def encode(
  tokenizer: tokenizer_lib.Tokenizer,
  is_whole: bool,
  comparisons: Sequence[records.Comparison],
) -> list[list[np.ndarray] | None]:
  """Encodes the items for one model.

  Args:
    tokenizer: the tokenizer of the model.
    is_whole: whether its chat template renders the answer, too.
    comparisons: the items.

  Returns:
    For each item, the ids of prompt and answer of each answer; None for an item
    that the chat template refuses.
  """
  if not is_whole:
    prompts, answers, _ = loader.comparison_ids(comparisons, tokenizer)
    return [
      None if prompt is None else [_array([*prompt, *ids]) for ids in found]
      for prompt, found in zip(prompts, answers, strict=True)
    ]
  rows = []
  for comparison in comparisons:
    if not all(comparison.ended):  # A template ends every answer.
      rows += encode(tokenizer, False, [comparison])
      continue
    texts = comparison.completions
    if comparison.prompt == records.text_of_turns(comparison.turns):
      # The space is between "Assistant:" and the answer.
      texts = [text.removeprefix(' ') for text in texts]
    try:
      found = tokenizer.encode_answered([(comparison, x) for x in texts])
    except tokenizer_lib.TemplateError:
      found = None
    rows.append(found and list(map(_array, found)))
  return rows


def _array(ids):
  return np.array(ids, np.int32)  # Takes a tenth of a list's memory.


def length_limit(config: ConfigDict, folder: str) -> int:
  """Most tokens of a prompt with its answer, without reading the weights."""
  limit = model_folder.shape_of(folder).context_length
  return min(limit, config.max_length or limit)


def model_scores(
  config: ConfigDict,
  folder: str,
  items: Sequence[Sequence[np.ndarray]],
  tokenizer: tokenizer_lib.Tokenizer,
  mesh: jax.sharding.Mesh,
) -> list[np.ndarray]:
  """A reward model's scores of the answers of each item, given as ids.

  Rows are scored in groups of similar length.
  """
  model = model_folder.load(
    folder, 'scalar', mesh, tokenizer, compute_dtype=config.compute_dtype
  )
  rows = [ids for answers in items for ids in answers]
  lengths = np.array(list(map(len, rows)))
  groups = np.ceil(np.log2(np.maximum(lengths, SHORTEST))).astype(int)
  scores = np.zeros(len(rows))
  with run_lib.Progress(
    f'score {folder}', len(rows), unit='answers'
  ) as progress:
    for group in np.unique(groups):
      places = np.flatnonzero(groups == group)
      scores[places] = queries.score_answers(
        model,
        [[]] * len(places),
        [rows[place].tolist() for place in places],
        tokenizer.pad_id,
        config.batch_size,
        mesh,
      )
      progress.update(len(places))
  return np.split(scores, np.cumsum(list(map(len, items)))[:-1])


def kept_scores(
  path: epath.Path,
  items: Sequence[Sequence[np.ndarray]],
  score_fn: Callable[[], list[np.ndarray]],
) -> list[np.ndarray]:
  """Scores kept by an earlier run of the stage, or else new ones, now kept.

  With several processes nothing is kept, since all must run the same programs.
  """
  if jax.process_count() > 1:
    return score_fn()
  digest = hashlib.sha256()
  for answers in items:
    for ids in answers:
      digest.update(np.asarray(ids, np.int64).tobytes() + b'|')
  items_key = digest.hexdigest()
  if path.exists():
    kept = run_lib.read_json(path)
    if kept['items'] == items_key:
      return [np.array(scores) for scores in kept['scores']]
  found = score_fn()
  path.parent.mkdir(parents=True, exist_ok=True)
  run_lib.write_json(
    path, {'items': items_key, 'scores': [each.tolist() for each in found]}
  )
  return found


def baseline_scores(
  comparisons: Sequence[records.Comparison],
  train: Sequence[records.Comparison] | None,
) -> tuple[dict[str, list[np.ndarray]], list[str]]:
  """Scores of the baselines, and why any of them is left out.

  Args:
    comparisons: the items to score.
    train: what the baselines train on; None cross-fits them on folds of the
      items themselves.
  """
  fits = {
    LENGTH: baselines.fit_length,
    WORDS: baselines.fit_chosen_bag_of_words,
  }
  found, problems = {LONGER: baselines.LengthJudge(1).scores(comparisons)}, []
  for name, fit_fn in fits.items():
    try:
      if train is None:
        found[name] = baselines.cross_fitted(fit_fn, comparisons)
      else:
        found[name] = fit_fn(train).scores(comparisons)
    except ValueError as error:
      problems.append(f'{name} is left out: {error}')
  return found, problems


# --- The stage ----------------------------------------------------------------


def run(config: ConfigDict, workdir: epath.Path) -> dict[str, float]:
  """Scores and measures; writes the files that the config lists.

  Returns:
    'SET SCORER' -> score, for models and baselines.

  Raises:
    ValueError: a file is bad, or no item of a set fits all models.
  """
  validate(config)
  models = model_folder.named_folders(config.models)
  sets = {
    name: reward_bench.read(kind, path, config.dialogue)
    for name, (kind, path) in named_sets(config.sets).items()
  }
  for name, benchmark in sets.items():
    if benchmark.unread:
      run_lib.say(f'{config.name}: {name}: {benchmark.unread}')
  train = None
  if config.comparisons:
    train = records.read_jsonl(config.comparisons, records.Comparison)
    records.check_labels(train, config.comparisons)
  encoded, left_out, reads = {}, {name: {} for name in sets}, {}
  given = {name: len(benchmark.comparisons) for name, benchmark in sets.items()}
  fits = {name: np.ones(given[name], bool) for name in sets}
  for model, folder in models.items():
    tokenizer, is_whole = queries.classifier_tokenizer_of(
      folder, config.tokenizer
    )
    model_folder.check(folder, 'scalar', tokenizer)
    limit = length_limit(config, folder)
    for name, benchmark in sets.items():
      rows = encode(tokenizer, is_whole, benchmark.comparisons)
      refused = np.array([each is None for each in rows])
      too_long = np.array(
        [max(map(len, each or [[]])) > limit for each in rows]
      )
      counts = {TOO_LONG: too_long.sum(), REFUSED: refused.sum()}
      left_out[name][model] = {k: int(n) for k, n in counts.items() if n}
      fits[name] &= ~refused & ~too_long
      encoded[model, name] = rows
    reads[model] = tokenizer
  for name, benchmark in sets.items():
    keep(config, name, benchmark, fits[name], left_out[name])

  mesh = sharding.make_mesh(config.mesh)
  scores = {name: {} for name in sets}
  for number, (model, folder) in enumerate(models.items()):
    items = [
      encoded[model, name][place]
      for name in sets
      for place in np.flatnonzero(fits[name])
    ]
    with sharding.use_mesh(mesh):
      found = iter(
        kept_scores(
          workdir / KEPT / f'{number}.json',
          items,
          lambda items=items, folder=folder, model=model: model_scores(
            config, folder, items, reads[model], mesh
          ),
        )
      )
    for name, benchmark in sets.items():
      scores[name][model] = [next(found) for _ in benchmark.comparisons]
  notes = {}
  for name, benchmark in sets.items():
    found, notes[name] = baseline_scores(benchmark.comparisons, train)
    scores[name] |= found

  measured = {
    name: {
      scorer: reward_bench.measure(
        benchmark, rows, config.num_bootstrap, config.seed + number
      )
      for scorer, rows in scores[name].items()
    }
    for number, (name, benchmark) in enumerate(sets.items())
  }
  about = {
    name: {
      'format': benchmark.format,
      'path': named_sets(config.sets)[name][1],
      'items': len(benchmark.comparisons),
      'given': given[name],
      'left out, by model': left_out[name],
      'skipped': dict(benchmark.skipped),
      'files': list(benchmark.files),
      'not read': benchmark.unread,
      'missing subsets': reward_bench.missing(benchmark),
      'notes': notes[name],
    }
    for name, benchmark in sets.items()
  }
  if jax.process_index() == 0:
    write_scores(workdir, sets, scores)
    reads = {model: each.describe() for model, each in reads.items()}
    write_results(config, workdir, measured, about, reads)
  return {
    f'{name} {scorer}': found.score.mean
    for name, by_scorer in measured.items()
    for scorer, found in by_scorer.items()
  }


def keep(config, name, benchmark, fits, left_out) -> None:
  """Drops the items of a set that some model cannot read; prints the counts.

  Raises:
    ValueError: no item is left, or the rest does not suffice for a score.
  """
  total = len(benchmark.comparisons)
  benchmark.comparisons = [
    benchmark.comparisons[place] for place in np.flatnonzero(fits)
  ]
  by_model = '; '.join(
    f'{model}: {number:,} {why}'
    for model, counts in left_out.items()
    for why, number in counts.items()
  )
  number = total - len(benchmark.comparisons)
  if number:
    run_lib.say(
      f'{config.name}: {number} of {total} items of {name} left out: {by_model}'
    )
  if not benchmark.comparisons:
    raise ValueError(
      f'sets: none of {total} items of {name} is left; {by_model}'
    )
  try:
    benchmark.check()
  except ValueError as error:
    raise ValueError(
      f'sets: {number} of {total} items of {name} are left out ({by_model}), '
      f'and of the others: {error}'
    ) from error


def scores_file(scorer: str) -> str:
  """The file name for a scorer's scores."""
  return f'{scorer.replace(" ", "_")}.jsonl'


def write_scores(workdir: epath.Path, sets, scores) -> None:
  """Writes one JSONL file per scorer: set, subset, id, ranks and scores."""
  lines = {}
  for name, benchmark in sets.items():
    for scorer, rows in scores[name].items():
      for item, row in zip(benchmark.comparisons, rows, strict=True):
        about = {'set': name, 'subset': item.category, 'id': item.id}
        about |= {'ranks': item.ranks, 'scores': np.asarray(row).tolist()}
        lines.setdefault(scorer, []).append(json.dumps(about))
  for scorer, found in lines.items():
    path = workdir / 'scores' / scores_file(scorer)
    files.write_bytes(path, ('\n'.join(found) + '\n').encode())


def combined_score(measured, about):
  """Scorer -> RewardBench's score with the prior sets, if both were run."""
  names = {about[name]['format']: name for name in measured}
  if not {'rewardbench', 'prior_sets'} <= set(names):
    return {}
  bench, prior = (measured[names[x]] for x in ('rewardbench', 'prior_sets'))
  return {
    scorer: reward_bench.with_prior_sets(bench[scorer], prior[scorer])
    for scorer in bench
    if scorer in prior
  }


def _intervals(estimates):
  return {name: each.interval() for name, each in estimates.items()}


def write_results(config, workdir, measured, about, reads) -> None:
  """Writes reward_bench.json, .png and .md."""
  combined = combined_score(measured, about)
  result = {
    'models': model_folder.named_folders(config.models),
    'reads': reads,
    'baselines learn from': config.comparisons or 'folds of each set',
    'sets': about,
    'accuracy': {
      name: {
        scorer: {
          'subsets': _intervals(found.subsets),
          'summary': _intervals(found.summary),
          'ties': _intervals(found.parts),
          'matrices': found.matrices,
          'items': {
            subset: each.num_items for subset, each in found.subsets.items()
          },
        }
        for scorer, found in by_scorer.items()
      }
      for name, by_scorer in measured.items()
    },
    'rewardbench with prior sets': _intervals(combined),
  }
  text = json.dumps(report.plain_json(result), indent=2, allow_nan=False)
  files.write_bytes(workdir / 'reward_bench.json', (text + '\n').encode())
  panels, chances = {}, {}
  for name, by_scorer in measured.items():
    rows = _rows_of(by_scorer)
    title = f'{name} ({about[name]["items"]:,} items)'
    panels[title] = {
      row: {scorer: each.interval() for scorer, each in cells.items()}
      for row, cells in rows.items()
    }
    chances[title] = 0.25 if about[name]['format'] == 'rewardbench2' else 0.5
  files.write_bytes(
    workdir / 'reward_bench.png', plots.reward_bench(panels, chances)
  )
  lines = [
    '# Reward models on test sets',
    '',
    'Accuracy with 95 % intervals that redraw prompts. Baselines: longer is '
    'better; length, whose direction was learned; word counts '
    '(Bradley–Terry). They learned from '
    + (
      report.escape(config.comparisons)
      if config.comparisons
      else 'the other four of five folds of each set'
    )
    + '. RewardBench and RM-Bench count equal scores as wrong.',
    '',
    *(
      f'- {report.escape(model)} reads {report.escape(found)}.'
      for model, found in reads.items()
    ),
    '',
    '![Accuracies](reward_bench.png)',
    '',
  ]
  scorers = list(
    dict.fromkeys(name for found in measured.values() for name in found)
  )
  head = ['', *map(report.escape, scorers)]
  rows = [
    _table_row(
      name, {s: found.score for s, found in by_scorer.items()}, scorers
    )
    for name, by_scorer in measured.items()
  ]
  if combined:
    rows.append(_table_row('RewardBench with prior sets', combined, scorers))
  lines += report.table(head, rows)
  for name, by_scorer in measured.items():
    lines += _set_lines(name, by_scorer, about[name])
  text = '\n'.join(lines).rstrip() + '\n'
  files.write_bytes(workdir / 'reward_bench.md', text.encode())
  print((workdir / 'reward_bench.md').as_posix(), flush=True)


def _rows_of(by_scorer):
  """Row -> scorer -> estimate: overall score, other summaries, subsets."""
  rows = {}
  for scorer, found in by_scorer.items():
    summary = dict(reversed(found.summary.items()))
    subsets = {
      name: each
      for name, each in found.subsets.items()
      # A set without subsets has a single one without a name.
      if name and len(found.subsets) > 1
    }
    for row, each in (summary | subsets).items():
      rows.setdefault(row, {})[scorer] = each
  return rows


def _table_row(title, estimates, scorers):
  cells = [
    report.cell(estimates[name].interval()) if name in estimates else '–'
    for name in scorers
  ]
  return [report.escape(title), *cells]


def _set_lines(name, by_scorer, about):
  """Lines of Markdown about one set."""
  counts = [f'{about["items"]:,} of {about["given"]:,} items']
  counts += [
    f'{model}: {number:,} {why}'
    for model, reasons in about['left out, by model'].items()
    for why, number in reasons.items()
  ]
  counts += [f'{number:,} {why}' for why, number in about['skipped'].items()]
  lines = [
    f'## {report.escape(name)}',
    '',
    report.escape(f'{about["format"]}: {about["path"]}. {"; ".join(counts)}.'),
    '',
  ]
  remarks = list(about['notes'])
  remarks += [about['not read']] * bool(about['not read'])
  if about['missing subsets']:
    remarks.append(
      'The file lacks subsets, so sections and score are those of the others: '
      f'{", ".join(about["missing subsets"])}'
    )
  lines += [f'- {report.escape(remark)}.' for remark in remarks]
  lines += [''] * bool(remarks)
  scorers = list(by_scorer)
  first = by_scorer[scorers[0]]
  rows = []
  for title, estimates in _rows_of(by_scorer).items():
    number = (first.summary | first.subsets)[title].num_items
    row = _table_row(title, estimates, scorers)
    rows.append([row[0], f'{number:,}', *row[1:]])
  lines += report.table(['', 'items', *map(report.escape, scorers)], rows)
  if first.parts:
    lines += ['The parts of the score of Ties:', '']
    lines += report.table(
      ['', *map(report.escape, scorers)],
      [
        _table_row(
          part, {s: by_scorer[s].parts[part] for s in scorers}, scorers
        )
        for part in first.parts
      ],
    )
  for scorer, found in by_scorer.items():
    if found.matrices:
      lines += _matrix_lines(scorer, found.matrices)
  return lines


def _matrix_lines(scorer, matrices):
  """Markdown of RM-Bench's style matrix, averaged over domains."""
  mean = np.mean([*matrices.values()], axis=0)
  styles = reward_bench.STYLES
  return [
    f'{report.escape(scorer)}: share in which the right answer (rows) scores '
    'higher than the wrong one (columns), by style, the mean over domains:',
    '',
    *report.table(
      ['', *styles],
      [
        [style, *map(report.cell, row)]
        for style, row in zip(styles, mean, strict=True)
      ],
    ),
  ]
