"""Models answer the same prompts, a judge compares them, a report says it.

Paper 3.6 and 4.1: prompts -> answers of each model -> judge -> outcomes of
pairs with intervals -> sections. Models, judge and probes come from the config;
nothing here knows one by name.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from instruct_jax import asking, files, judge_fns, model_folder, score_fns
from instruct_jax.data import loader, records
from instruct_jax.evals import (
  baselines,
  figures,
  heldout_loss,
  judges,
  model_card,
  plots,
  preference_accuracy,
  preferences,
  released_samples,
  report,
  win_rate,
)
from instruct_jax.evals import samples as samples_lib
from instruct_jax.infra import metrics as metrics_lib
from instruct_jax.infra import origin, sharding
from instruct_jax.infra import run as run_lib
from instruct_jax.models.config import check_stage

PROCESSES = 'all'

# Keys of a stage's config that say how it ran, not what it learned from what;
# the model card leaves out those that begin so, and paths.
_MACHINERY = (
  *('attention', 'checkpoint_', 'compute_dtype', 'eval_', 'experiment', 'log'),
  *('frozen_dtype', 'gather_', 'loop', 'max_valid_', 'mesh', 'name', 'offload'),
  *('num_microbatches', 'num_slices', 'num_slots', 'pack', 'probe', 'remat'),
  *('sampler_', 'scan_', 'seed', 'snapshot_', 'vocab_multiple', 'workdir'),
)


def named_pairs(config) -> list[tuple[str, str]]:
  """Pairs that are compared beside those with the baseline."""
  if config.pairs != 'all':
    return list(model_folder.named_folders(config.pairs, 'pairs').items())
  names = [
    name
    for name in model_folder.named_folders(config.models)
    if name != config.baseline
  ]
  return list(itertools.combinations(names, 2))


def validate(config):
  """Checks the config; the judge checks its own keys."""
  check_stage(config)
  models = asking.read_models(config)
  columns = [model.name for model in models.values() if model.has_columns]
  if config.baseline not in columns or len(columns) < 2:
    raise ValueError(
      f'models must hold the baseline {config.baseline!r} and one more: '
      f'{columns}'
    )
  if not config.prompts:
    raise ValueError('prompts is empty; give a JSONL file of prompts')
  judge_fns.find(config.judge).validate(config)
  world_of(config)
  unknown = {name for pair in named_pairs(config) for name in pair} - {*columns}
  if unknown:
    raise ValueError(
      f'pairs names {sorted(unknown)}; models are {", ".join(columns)}'
    )
  if config.test_comparisons and not config.reward_model:
    raise ValueError('test_comparisons needs reward_model, which orders them')
  for key in ('num_prompts', 'samples_per_prompt', 'num_bootstrap'):
    if config[key] < 1:
      raise ValueError(f'{key} must be positive: {config[key]}')
  if config.prompted and not (config.prefixes and config.reward_model):
    raise ValueError(
      'prompted models need prefixes, and reward_model to choose one of them'
    )
  prompted = [model for model in models.values() if model.is_prompted]
  if prompted and not config.prefix_prompts:
    raise ValueError('prefix_prompts is empty; the prefix is chosen on them')
  loaded = [m.source for m in models.values() if not m.is_recorded]
  loaded += [config[key] for key in ('reward_model', 'judge_model')]
  ours = [x for x in loaded if x and not model_folder.is_published(x)]
  if ours and not config.tokenizer:
    raise ValueError(f'tokenizer is empty; {ours[0]} needs its folder')


def world_of(config) -> figures.World | None:
  """The world of `config.world`, or None.

  Raises:
    ValueError: the dotted name has none.
  """
  if not config.world:
    return None
  found = score_fns.find(config.world, 'world')
  if not isinstance(found, figures.World):
    raise ValueError(f'world {config.world!r} is no figures.World')
  return found


def inputs(config) -> dict[str, str]:
  """What this stage reads, by config key; for models, what lies beside them."""
  found = {'prompts': config.prompts}
  for name, model in asking.read_models(config).items():
    key = f'{"models" if model.has_columns else "other_models"}.{name}'
    found[key] = model.source.partition('#')[0]
    if not model.is_recorded:
      for part, path in origin.paths_beside(model.source).items():
        found[f'{key}/{part}'] = path
  keys = ('tokenizer', 'reward_model', 'documents', 'crossval')
  keys += ('prefixes', 'prefix_prompts') if config.prompted else ()
  keys += judge_fns.find(config.judge).reads
  found |= {key: config[key] for key in keys if config[key]}
  for key in ('comparisons', 'test_comparisons'):
    for name, path in _rankings(config, key).items():
      found[f'{key}.{name}'] = path
  # A suite that asked nothing writes no scores.
  if config.suite and epath.Path(config.suite).exists():
    found['suite'] = config.suite
  return found


def _rankings(config, key: str) -> dict[str, str]:
  """Set of rankings -> file, of 'FILE' or 'NAME=FILE,NAME=FILE'."""
  if config[key] and '=' not in config[key]:
    return {'held-out comparisons': config[key]}
  return model_folder.named_folders(config[key], key)


def scored(prompts, answers, field: str, score_fn):
  """The answers of all models with the scores of `score_fn` in a field."""
  pairs = [
    (prompt, answer)
    for several in answers.values()
    for prompt, answer in zip(prompts, several, strict=True)
  ]
  scores = score_fn(pairs)
  if scores is None:
    return answers
  found = iter(scores)
  return {
    name: [
      dataclasses.replace(answer, **{field: float(next(found))})
      for answer in several
    ]
    for name, several in answers.items()
  }


# --- Judging ------------------------------------------------------------------


def judge_pairs(config, models, prompts, answers, judge):
  """(all judgements, what became of the pairs)."""
  sides = [
    (name, config.baseline) for name in models if name != config.baseline
  ]
  sides += named_pairs(config)
  pairs = [
    judges.Pair(prompt, first, second)
    for model, other in sides
    for prompt, first, second in zip(
      prompts, answers[model], answers[other], strict=True
    )
  ]
  with run_lib.Progress('judge', 2 * len(pairs), unit='pairs') as progress:
    judge.progress = progress.update
    return judges.ask_both_orders(judge, pairs)


def rate(config, models, prompts, answers, judge, world):
  """(answer, rating) of what the judge rates, and the world's labels."""
  pairs = [
    (prompt, answer)
    for name, model in models.items()
    if model.has_columns
    for prompt, answer in zip(prompts, answers[name], strict=True)
  ]
  rated = []
  if config.rate_answers:
    with run_lib.Progress('rate', len(pairs), unit='answers') as progress:
      judge.progress = progress.update
      rated += [
        (answer, rating)
        for (_, answer), several in zip(pairs, judge.rate(pairs), strict=True)
        for rating in several
      ]
  if world and world.label_fn:
    rated += [
      (answer, judges.Rating(None, world.label_fn(prompt, answer.response)))
      for prompt, answer in pairs
    ]
  return rated


def order_rankings(config, scorers, tokenizer, context_length):
  """Set of rankings -> who orders its pairs how well (3.4, 4.1).

  Trivial judges learn from the rankings of the same name that the reward model
  learned from.

  Args:
    config: with `comparisons` and `test_comparisons`.
    scorers: name -> (scores of answers, whether it can judge a prompt).
    tokenizer: of the reward model.
    context_length: rankings with longer texts are left out.
  """
  learned, found = _rankings(config, 'comparisons'), {}
  for name, path in _rankings(config, 'test_comparisons').items():
    given = records.read_jsonl(path, records.Comparison)
    test = loader.fitting_comparisons(given, tokenizer, context_length)
    run_lib.say_left_out(
      config.name,
      len(given) - len(test),
      len(given),
      f'test_comparisons ({name})',
      f"the reward model's context ({context_length} tokens)",
    )
    by = {
      scorer: comparison_scores(score_fn, test)
      for scorer, (score_fn, knows) in scorers.items()
      if all(knows(prompt_of(comparison)) for comparison in test)
    }
    if name in learned:
      train = records.read_jsonl(learned[name], records.Comparison)
      by['length only'] = baselines.fit_length(train).scores(test)
      words = baselines.fit_bag_of_words(train)
      by['bag of words (Bradley-Terry)'] = words.scores(test)
    found[name] = figures.Rankings(
      accuracies={
        scorer: preference_accuracy.pairwise_accuracy(
          scores, [c.ranks for c in test], [c.prompt for c in test]
        )
        for scorer, scores in by.items()
      },
      agreement=preference_accuracy.agreement(test),
    )
  return found


def prompt_of(comparison: records.Comparison) -> records.Prompt:
  """The prompt whose completions were ranked."""
  return records.Prompt(
    id=comparison.id,
    text=comparison.prompt,
    category=comparison.category,
    metadata=comparison.metadata,
    turns=comparison.turns,
  )


def comparison_scores(score_fn: judges.ScoreFn, comparisons):
  """The scores of each comparison's completions; what several labelers ranked
  is scored once."""

  def key(comparison):
    return comparison.prompt, comparison.turns, comparison.completions

  distinct = {key(comparison): comparison for comparison in comparisons}
  pairs = [
    (prompt_of(c), samples_lib.Sample('', c.id, c.prompt, text, 0, True))
    for c in distinct.values()
    for text in c.completions
  ]
  ends = np.cumsum([len(c.completions) for c in distinct.values()])
  scores = np.split(np.asarray(score_fn(pairs), float), ends[:-1])
  by_key = dict(zip(distinct, scores, strict=True))
  return [by_key[key(comparison)] for comparison in comparisons]


# --- What the verdicts come to ------------------------------------------------


def mean_ratings(rated, num_bootstrap: int):
  """Model -> `judges.LIKERT` and each label -> mean, redrawn by prompt."""
  columns = {}
  for answer, rating in rated:
    values = dict(rating.labels)
    if rating.likert is not None:
      values[judges.LIKERT] = rating.likert
    for name, value in values.items():
      column = columns.setdefault(answer.model, {}).setdefault(name, ([], []))
      column[0].append(float(value))
      column[1].append(answer.prompt_id)
  return {
    model: {
      name: (
        win_rate.mean_interval
        if name == judges.LIKERT
        else win_rate.share_interval
      )(values, ids, num_bootstrap=num_bootstrap)
      for name, (values, ids) in by_name.items()
    }
    for model, by_name in columns.items()
  }


def judge_alarms(judgements, account, outcomes, max_contradictions: float):
  """What in the verdicts should not be trusted, one sentence each."""
  alarms = []
  share = account.contradictions / account.judgements
  if share > max_contradictions:
    alarms.append(
      f'the judge contradicts itself in {share:.1%} of the pairs when the '
      f'answers change places, more than {max_contradictions:.1%}; its '
      'preferences are mostly about the place'
    )
  if account.unparsed:
    alarms.append(f'{account.unparsed} verdicts could not be understood')
  if account.unjudged:
    alarms.append(
      f'{account.unjudged} of {account.pairs} pairs have no verdict'
    )
  if account.one_order:
    alarms.append(
      f'{account.one_order} verdicts stand alone: the same judge said nothing '
      'in the other order'
    )
  nameless = sum(not judgement.labeler for judgement in judgements)
  if 0 < nameless < len(judgements):
    alarms.append(
      f'{nameless} of {len(judgements)} judgements name no labeler, so no '
      'interval goes by labeler'
    )
  place = outcomes.first_place
  if place and place.is_biased:
    alarms.append(
      f'the answer in the first place wins {place.rate.mean:.1%} '
      f'[{place.rate.low:.1%}, {place.rate.high:.1%}] of the verdicts: the '
      'judge looks at the place; both orders are averaged, which cancels it in '
      'the rates and draws them towards one half'
    )
  return alarms


def judged_figures(config, models, prompts, answers, judge, workdir):
  """The fields of `figures.Figures` that come from the judge.

  Writes judgements.jsonl and ratings.jsonl.
  """
  everything, account = judge_pairs(config, models, prompts, answers, judge)
  _write_lines(
    workdir / 'judgements.jsonl', map(dataclasses.asdict, everything)
  )
  judged = [j for j in everything if j.outcome is not None]
  if not judged:
    raise ValueError(
      f'the judge judged none of {account.pairs} pairs: {account.unjudged} '
      f'without an opinion in both orders, {account.unparsed} verdicts not '
      'understood; judgements.jsonl has what it said'
    )
  columns = [name for name, model in models.items() if model.has_columns]
  outcomes = preferences.outcomes(
    judged, columns, config.baseline, config.num_bootstrap
  )
  world = world_of(config)
  rated = rate(config, models, prompts, answers, judge, world)
  _write_lines(
    workdir / 'ratings.jsonl',
    (
      {'model': answer.model, 'prompt_id': answer.prompt_id}
      | dataclasses.asdict(rating)
      for answer, rating in rated
    ),
  )
  against = preferences.against(judged, config.baseline)
  everyone = {}
  for name, several in answers.items():
    row = {'win rate': outcomes.rates.get(name)}
    if name in against:
      row = {'win rate': preferences.rates(against[name], config.num_bootstrap)}
    for title, field in (
      ('judge', 'score_gold'),
      ('reward model', 'score_reward'),
      ('tokens', 'num_tokens'),
      ('ended', 'ended'),
    ):
      if getattr(several[0], field) is not None:
        row[title] = float(np.mean([getattr(each, field) for each in several]))
    everyone[name] = row
  texts = {n: [a.response for a in answers[n]] for n in columns}
  return {
    'models': columns,
    'baseline': config.baseline,
    'judge': judge.name,
    'unit': judge.unit,
    'has_places': judge.has_places,
    'outcomes': outcomes,
    'alarms': judge_alarms(
      judged, account, outcomes, config.max_contradictions
    ),
    'everyone': everyone,
    'ratings': mean_ratings(rated, config.num_bootstrap),
    'ratings_by_category': {
      category: mean_ratings(
        [row for row in rated if row[0].category == category],
        config.num_bootstrap,
      )
      for category in sorted({answer.category for answer, _ in rated})
    },
    'asking': dataclasses.asdict(account) | judge.account(),
    'world': world,
    'tables': world.tables_fn(prompts, texts)
    if world and world.tables_fn
    else {},
  }


def _write_lines(path, rows):
  lines = [json.dumps(row, ensure_ascii=False) + '\n' for row in rows]
  records.write_bytes(path, ''.join(lines).encode())


# --- Probes, and the runs that the models come from ---------------------------


def text_figures(config, losses):
  """Fields about the loss on held-out text, paired by row (4.2)."""
  differences = {}
  pairs = [(name, config.reference) for name in losses]
  for model, other in pairs + named_pairs(config):
    if model == other or not {model, other} <= set(losses):
      continue
    (loss, tokens), (base, other_tokens) = losses[model], losses[other]
    if tokens == other_tokens:  # Else they count other tokens.
      name = model if other == config.reference else f'{model} – {other}'
      differences[name] = heldout_loss.difference(loss, base)
  return {
    'text_loss': {
      name: heldout_loss.interval(loss) for name, (loss, _) in losses.items()
    },
    'text_loss_difference': differences,
  }


def reward_figures(config, rankings, judge):
  """What is known of the reward model, or None."""
  if not rankings:
    return None
  folds = {}
  if config.crossval:
    results = run_lib.read_json(config.crossval)
    folds = {
      name: preference_accuracy.Spread(
        results[name]['mean'], results[name]['error'], len(results['runs'])
      )
      for name in ('intra', 'inter')
    }
  ceiling = None
  if judge.is_ceiling:
    first = next(iter(rankings.values())).accuracies
    ceiling = first['judge'].accuracy if 'judge' in first else None
  curve = origin.beside(config.reward_model).get(metrics_lib.METRICS_FILE, ())
  return figures.RewardFigures(
    rankings=rankings, ceiling=ceiling, curve=curve, **folds
  )


def suite_figures(path: str):
  """(task, prompt and metric -> model -> figure, task -> judge) of a suite."""
  if not path or not epath.Path(path).exists():
    return {}, {}
  result = run_lib.read_json(path)
  found = {}
  for cell in result['cells']:
    row = found.setdefault(released_samples.line_name(cell), {})
    row[cell['model']] = win_rate.Interval(
      cell['score'], cell['low'], cell['high'], cell['num_items']
    )
  return found, result['judges']


def run_figures(config, models):
  """The fields that the runs of the models say: training, alarms, data."""
  loaded = {n: m.source for n, m in models.items() if not m.is_recorded}
  stages = origin.stages_behind([*loaded.values(), config.reward_model])
  rl, alarms, epochs, seen = {}, [], {}, set()
  for name, source in loaded.items():
    beside = origin.beside(source)
    if epath.Path(source).parent in seen:
      continue
    seen.add(epath.Path(source).parent)
    rows = beside.get(metrics_lib.METRICS_FILE, ())
    if any('objective/kl' in row for row in rows):
      rl[name] = rows
    alarms += [
      f'{name}: {text}' for text in beside.get('alarms.json', {}).values()
    ]
    if 'epochs.json' in beside and models[name].has_columns:
      folder = epath.Path(source).parent
      info = next((s.info for s in stages.values() if s.folder == folder), {})
      epochs[name] = figures.Epochs(
        beside['epochs.json'],
        info.get('selected_epoch'),
        info.get('selected_by', ''),
      )
  hygiene = {}
  for stage in stages.values():
    if (stage.folder / 'hygiene.json').exists():
      hygiene |= run_lib.read_json(stage.folder / 'hygiene.json')
  return {
    'rl_metrics': rl,
    'alarms': alarms,
    'epochs': epochs,
    'parameters': {
      name: model_folder.shape_of(source).num_params
      for name, source in loaded.items()
    },
    'trained': {
      name: figures.Training(
        settings_of(stage.config),
        operations_of(config, stage),
      )
      for name, stage in stages.items()
      if _made(stage) is not None and 'learning_rate' in stage.config
    },
    'seconds': {name: stage.seconds for name, stage in stages.items()},
    'data_sizes': {k: v for s in stages.values() for k, v in s.records.items()},
    'hygiene': {
      key.replace('.', ' '): count
      for key, count in run_lib.flat(hygiene).items()
      if count != {}
    },
  }


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
  """What a stage's config says of the method: dotted key -> value."""
  return {
    key: value
    for key, value in run_lib.flat(config).items()
    if value not in ('', None, [])
    and '/' not in str(value)
    and not any(part.startswith(_MACHINERY) for part in key.split('.'))
    and (not key.startswith('lora.') or config['lora']['rank'])
  }


def _made(stage: origin.Stage):
  """The model that a stage made, or None."""
  paths = [stage.folder / name for name in ('policy', 'model')]
  return next((path for path in paths if path.exists()), None)


def operations_of(config, stage: origin.Stage) -> float | None:
  """Floating-point operations of a stage's training, by formula.

  RL has episodes; a reward model, rankings; other stages have rows of text.
  None for a stage that is none of these.
  """
  own, size = stage.config, model_folder.shape_of(_made(stage)).num_params
  results = stage.folder / 'results.json'
  if 'num_episodes' in own:
    scored_by = f'{stage.folder.parent}{own["reward_model"]}'
    scalar = 0
    if own['reward_model']:
      place = epath.Path(scored_by)
      if not place.exists():
        place = own['reward_model']
      scalar = model_folder.shape_of(place).num_params
    text = own['num_episodes'] * own['num_epochs'] * own['ptx_per_episode']
    return model_card.rl_operations(
      size,
      scalar,
      scalar or size if 'value_learning_rate' in own else 0,
      own['num_episodes'],
      own['prompt_length'] + own['response_length'],
      own['num_epochs'],
      text * own['ptx_row_length'] if own['ptx_coef'] > 0 else 0,
    )
  if 'comparisons' in own and results.exists():
    # Each prompt with each of its answers, as long as they are here.
    answers = run_lib.read_json(results)['num_forwards'] * own['num_epochs']
    length = config.prompt_length + config.response_length
    return model_card.training_operations(size, answers * length)
  if 'row_length' in own and (stage.folder / metrics_lib.METRICS_FILE).exists():
    lines = metrics_lib.read_lines(stage.folder / metrics_lib.METRICS_FILE)
    rows = lines[-1]['step'] * own['batch_size']
    return model_card.training_operations(size, rows * own['row_length'])
  return None


def labeling_statistics(config) -> dict[str, Any]:
  """statistics.json beside the rankings, of the labeling site; {} without."""
  for path in _rankings(config, 'comparisons').values():
    found = epath.Path(path).parent / 'statistics.json'
    if found.exists():
      return run_lib.read_json(found)
  return {}


# --- The evaluation -----------------------------------------------------------


def run(config, workdir: epath.Path):
  """Asks models and judge, measures, and writes the report.

  Reads what `inputs` names. Writes answers/, samples.jsonl, judgements.jsonl
  and ratings.jsonl into the stage's folder, and the report with its plots, the
  model card and summary.json into that of the run as well.

  Returns:
    Counts of prompts and judgements; {} in all processes but the first.
  """
  validate(config)
  models = asking.read_models(config)
  loaded = {n: m.source for n, m in models.items() if not m.is_recorded}
  config = origin.filled(
    config, origin.LENGTHS if loaded else (), loaded, config.prompts
  )
  config.cache = config.cache or str(workdir / 'answers')
  if loaded:
    model_folder.check_contexts(
      loaded,
      config.prompt_length + config.response_length,
      'prompt_length + response_length',
    )
  drawn, num_given = asking.draw(config, 'prompts', config.num_prompts)
  mesh = sharding.make_mesh(config.mesh)
  with sharding.use_mesh(mesh):
    score_fn, rankings = None, {}
    if config.reward_model:
      score_fn, tokenizer = judge_fns.reward_score(
        config, config.reward_model, mesh
      )
    # Before anything is sampled: a judge may lack something.
    judge = judge_fns.find(config.judge)(config, workdir, mesh)
    asked = asking.ask(config, models, drawn, score_fn, mesh)
    prompts, answers = asking.aligned(drawn, asked.answers)
    answers = scored(prompts, answers, 'score_gold', judge.score)
    if score_fn:
      answers = scored(prompts, answers, 'score_reward', score_fn)
      scorers = {'reward model': (score_fn, lambda prompt: True)}
      if answers[config.baseline][0].score_gold is not None:
        scorers['judge'] = judge.score, judge.knows
      rankings = order_rankings(
        config,
        scorers,
        tokenizer,
        model_folder.shape_of(config.reward_model).context_length,
      )
  if jax.process_index() != 0:
    return {}
  recorded = [answer for several in answers.values() for answer in several]
  samples_lib.write_samples(workdir / 'samples.jsonl', recorded)
  judged = judged_figures(config, models, prompts, answers, judge, workdir)
  runs = run_figures(config, models)
  suite, suite_judges = suite_figures(config.suite)
  root = epath.Path(config.workdir)
  provenance = run_lib.read_json(root / 'provenance.json')
  counts = {
    'in the file': num_given,
    'asked': len(drawn),
    'answered by every model': len(prompts) // config.samples_per_prompt,
  }

  def side_by_side(number):
    return samples_lib.side_by_side(recorded, judged['models'], number)

  shown = figures.Figures(
    title=f'Evaluation of {root.name}',
    command=provenance['command'],
    seed=config.seed,
    commit=provenance['commit'] or 'unknown',
    versions={k: v for k, v in provenance['versions'].items() if v},
    prompts=counts,
    settings={key: config[key] for key in (*origin.LENGTHS, 'temperature')},
    asked=asked.account,
    reference=config.reference,
    kl=asked.kl,
    prefixes=asked.prefixes,
    reward_model=reward_figures(config, rankings, judge),
    suite=suite,
    suite_judges=suite_judges,
    samples=side_by_side(config.num_samples_shown),
    more_samples=side_by_side(config.num_samples_in_html),
    labeling=labeling_statistics(config),
    **text_figures(config, asked.text_loss),
    **{**judged, **runs, 'alarms': [*judged['alarms'], *runs['alarms']]},
  )
  drawn_plots = plots.make_plots(shown)
  card = model_card.make_card(shown)
  for directory in dict.fromkeys((workdir, root)):
    files.write_bytes(directory / 'model_card.md', card.encode())
    report.write_report(directory, shown, drawn_plots)
  print((root / 'report.md').as_posix(), flush=True)
  return {
    'num_prompts': counts['answered by every model'],
    'num_judgements': sum(
      versus.rates.num_judgements for versus in shown.outcomes.pairs.values()
    ),
  }
