"""Samples models, has a judge compare their answers, and writes the report.

Paper 3.6 and 4.1: prompts -> answers of each model -> judge -> pairwise
outcomes with intervals -> sections. The config names the models and the judge.
"""

import collections
import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from instruct_jax import (
  asking,
  files,
  judge_fns,
  model_folder,
  queries,
  run_figures,
  score_fns,
)
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
  report,
  variety,
  win_rate,
)
from instruct_jax.evals import samples as samples_lib
from instruct_jax.infra import logger, origin, sharding
from instruct_jax.infra import run as run_lib
from instruct_jax.models.config import check_stage

PROCESSES = 'all'


def named_pairs(config) -> list[tuple[str, str]]:
  """The distinct pairs to compare in addition to those with the baseline.

  Raises:
    ValueError: `pairs` has something that is not a pair of the other models.
  """
  names = model_folder.named_folders(config.models)
  others = [name for name in names if name != config.baseline]
  known = list(itertools.combinations(others, 2))
  if config.pairs == 'all':
    return known
  found = {}
  for text in filter(None, config.pairs.split(',')):
    pair = tuple(text.split('='))
    if pair not in known and pair[::-1] not in known:
      raise ValueError(
        f'pairs must be all, or NAME=NAME of {", ".join(others)}: {text!r}'
      )
    found.setdefault(frozenset(pair), pair)
  return [*found.values()]


def of_each_judge(config) -> list[Any]:
  """The config, then a copy per entry of `other_judges` with that judge."""
  found = [config]
  for name in filter(None, config.other_judges.split(',')):
    other = config.copy_and_resolve_references()
    with other.unlocked():
      other.judge = name
    found.append(other)
  return found


def validate(config):
  """Checks the config and the judges' keys. ValueError names the key."""
  check_stage(config)
  models = asking.read_models(config)
  columns = [model.name for model in models.values() if model.has_columns]
  if config.baseline not in columns or len(columns) < 2:
    raise ValueError(
      f'models must include the baseline {config.baseline!r} and at least one '
      f'other model: {columns}'
    )
  if not config.prompts:
    raise ValueError('prompts is empty; give a JSONL file of prompts')
  for each in of_each_judge(config):
    judge_fns.find(each.judge).validate(each)
  world_of(config)
  named_pairs(config)
  asking.texts_of(config)
  if config.test_comparisons and not config.reward_model:
    raise ValueError('test_comparisons needs reward_model to order them')
  for key in ('num_prompts', 'samples_per_prompt', 'num_bootstrap'):
    if config[key] < 1:
      raise ValueError(f'{key} must be positive: {config[key]}')
  if config.prompted and not (config.prefixes and config.reward_model):
    raise ValueError(
      'prompted models need prefixes, and reward_model to choose one of them'
    )
  prompted = [model for model in models.values() if model.is_prompted]
  if prompted and not config.prefix_prompts:
    raise ValueError(
      'prefix_prompts is empty; their answers decide which prefix is used'
    )
  loaded = [m.source for m in models.values() if not m.is_recorded]
  loaded += [config[key] for key in ('reward_model', 'judge_model')]
  ours = [x for x in loaded if x and not model_folder.is_published(x)]
  if ours and not config.tokenizer:
    raise ValueError(f'tokenizer is empty; give the folder for {ours[0]}')


def world_of(config) -> figures.World | None:
  """The world of `config.world`, or None; ValueError if it is not a World."""
  if not config.world:
    return None
  world = score_fns.find(config.world, 'world')
  if not isinstance(world, figures.World):
    raise ValueError(f'world {config.world!r} is not a figures.World')
  return world


def inputs(config) -> dict[str, str]:
  """What this stage reads, by config key, with files next to the models."""
  found = {'prompts': config.prompts}
  for name, model in asking.read_models(config).items():
    key = f'{"models" if model.has_columns else "other_models"}.{name}'
    found[key] = model.source.partition('#')[0]
    if not model.is_recorded:
      for part, path in origin.paths_beside(model.source).items():
        found[f'{key}/{part}'] = path
  keys = ('tokenizer', 'reward_model', 'crossval')
  keys += ('prefixes', 'prefix_prompts') if config.prompted else ()
  for each in of_each_judge(config):
    keys += judge_fns.find(each.judge).reads
    found |= judge_fns.source_of(each.judge)
  found |= {key: config[key] for key in keys if config[key]}
  for key in ('comparisons', 'test_comparisons'):
    for name, path in _rankings(config, key).items():
      found[f'{key}.{name}'] = path
  for name, path in asking.texts_of(config).items():
    found[f'documents.{name}'] = path
  # A suite that ran no task writes no scores.
  if config.suite and epath.Path(config.suite).exists():
    found['suite'] = config.suite
  return found


def _rankings(config, key: str) -> dict[str, str]:
  """Name of a set of rankings -> file."""
  return model_folder.named_files(config[key], key, 'held-out comparisons')


def scored(prompts, answers, field: str, score_fn: judges.ScoreFn):
  """The answers of all models, with their `score_fn` score in `field`."""
  found = iter(score_fn(_with_prompts(prompts, answers, answers)))
  return {
    name: [
      dataclasses.replace(answer, **{field: float(next(found))})
      for answer in several
    ]
    for name, several in answers.items()
  }


def _with_prompts(prompts, answers, names):
  """The (prompt, answer) pairs of some models, one model after the other."""
  return [
    pair for name in names for pair in zip(prompts, answers[name], strict=True)
  ]


def readers_of(config) -> dict[str, str]:
  """Config key -> folder of each scalar model that reads the answers."""
  keys = ['reward_model'] * bool(config.reward_model)
  kinds = [judge_fns.find(each.judge) for each in of_each_judge(config)]
  if any(issubclass(kind, judge_fns.RewardModel) for kind in kinds):
    keys.append('judge_model')
  return {key: config[key] for key in keys}


def _readers(config):
  """Config key, context length and tokenizer of each scalar model."""
  for key, folder in readers_of(config).items():
    tokenizer = queries.tokenizer_of(folder, config.tokenizer, chat=True)
    yield key, model_folder.shape_of(folder).context_length, tokenizer


def _say_unread(config, number, total, what, key, context_length):
  limit = f'the context of {key} ({context_length} tokens)'
  run_lib.say_left_out(config.name, number, total, what, limit)


def readable(config, prompts, answers):
  """Drops prompts with an answer that is too long for a scalar model.

  This happens to answers that are recorded or from another tokenizer.

  Returns:
    The prompts and answers kept, and the number of prompts dropped.

  Raises:
    ValueError: no prompt is left.
  """
  left_out, num_prompts = set(), len({prompt.id for prompt in prompts})
  for key, context_length, tokenizer in _readers(config):
    lengths = list(map(len, tokenizer.encode_prompts(prompts)))
    found = {
      answer.prompt_id
      for length, answer in _with_prompts(lengths, answers, answers)
      if length + len(queries.answer_ids(tokenizer, answer)) > context_length
    }
    what = 'prompts with their answers'
    _say_unread(config, len(found), num_prompts, what, key, context_length)
    left_out |= found
  if len(left_out) == num_prompts:
    raise ValueError(
      f'all {num_prompts} prompts have an answer that is longer than the '
      f'context of {" or ".join(readers_of(config))}'
    )
  kept = [prompt.id not in left_out for prompt in prompts]
  answers = {
    name: [*itertools.compress(several, kept)]
    for name, several in answers.items()
  }
  return [*itertools.compress(prompts, kept)], answers, len(left_out)


# --- Judging ------------------------------------------------------------------


def judge_pairs(config, models, prompts, answers, judge):
  """Judges all pairs; returns (all judgements, counts of the verdicts)."""
  baseline = config.baseline
  sides = [(name, baseline) for name in models if name != baseline]
  pairs = [
    judges.Pair(*three)
    for model, other in sides + named_pairs(config)
    for three in zip(prompts, answers[model], answers[other], strict=True)
  ]
  with run_lib.Progress('judge', 2 * len(pairs), unit='pairs') as progress:
    judge.progress = progress.update
    return judges.ask_both_orders(judge, pairs)


def rate(config, models, prompts, answers, judge, world):
  """(answer, rating) pairs: the judge's ratings, then the world's labels."""
  names = [name for name, model in models.items() if model.has_columns]
  pairs = _with_prompts(prompts, answers, names)
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


def order_rankings(config, learned, score_fn, judge):
  """Set of rankings -> accuracy of each scorer on its pairs (3.4, 4.1).

  Rankings too long for a scalar model are left out. The judge is included if it
  gives scores and knows all prompts. The length and bag-of-words baselines
  train on the rankings of the same name in `learned`, if there are any.
  """
  counter = queries.tokenizer_of(
    config.reward_model, config.tokenizer, chat=True
  )
  tests, found = {}, {}
  for name, path in _rankings(config, 'test_comparisons').items():
    test = records.read_jsonl(path, records.Comparison)
    what = f'test_comparisons ({name})'
    for key, context_length, tokenizer in _readers(config):
      given = len(test)
      test = loader.fitting_comparisons(test, tokenizer, context_length)
      _say_unread(config, given - len(test), given, what, key, context_length)
    if not test:
      raise ValueError(f'{what}: no ranking is short enough')
    tests[name] = test

  def scored_together(fn, names):
    """Set -> scores; sets often rank the same answers, scored here once."""
    rows = [*itertools.chain(*map(tests.__getitem__, names))]
    rows = rows and judge_fns.comparison_scores(fn, rows, counter)
    several = iter(rows)
    return {n: [*itertools.islice(several, len(tests[n]))] for n in names}

  by_reward, by_judge = scored_together(score_fn, tests), {}
  if judge.gives_scores():
    prompts = {name: map(judge_fns.prompt_of, tests[name]) for name in tests}
    known = [name for name in tests if all(map(judge.knows, prompts[name]))]
    by_judge = scored_together(judge.score, known)
  for name, test in tests.items():
    by = {'reward model': by_reward[name]}
    if name in by_judge:
      by['judge'] = by_judge[name]
    if name in learned:
      by['length only'] = baselines.fit_length(learned[name]).scores(test)
      words = baselines.fit_bag_of_words(learned[name])
      by['bag of words (Bradley-Terry)'] = words.scores(test)
    labeled = [c.ranks for c in test], [c.prompt for c in test]
    own, *others = by
    found[name] = figures.Rankings(
      accuracies={
        scorer: preference_accuracy.pairwise_accuracy(scores, *labeled)
        for scorer, scores in by.items()
      },
      gaps={
        scorer: preference_accuracy.accuracy_gap(by[own], by[scorer], *labeled)
        for scorer in others
      },
      agreement=preference_accuracy.agreement(test),
    )
  return found


def other_rates(config, models, prompts, others):
  """{title: model -> judge -> win rate against the baseline}, or {}.

  `others` are pairs of a judge and the answers, with its scores if any.
  """
  found = collections.defaultdict(dict)
  for judge, answers in others:
    verdicts, _ = judge_pairs(config, models, prompts, answers, judge)
    judged = [j for j in verdicts if j.outcome is not None]
    for model, rows in preferences.against(judged, config.baseline).items():
      rates = preferences.rates(rows, config.num_bootstrap)
      found[model][judge.name] = rates
  title = f'Win rate against {config.baseline} by other judges'
  return {title: dict(found)} if found else {}


# --- Figures ------------------------------------------------------------------


def texts_by(answers) -> dict[str, list[str]]:
  """Model -> its answers as text."""
  return {
    name: [answer.response for answer in several]
    for name, several in answers.items()
  }


def varieties(learned, texts) -> dict[str, figures.Rows]:
  """How varied each model's answers are, compared with the ranked texts."""
  ranked = {
    text
    for rows in learned.values()
    for row in rows
    for text in row.completions
  }
  rows = {name: variety.describe(each, ranked) for name, each in texts.items()}
  return {'Variety of the answers': rows}


def mean_ratings(rated, num_bootstrap: int):
  """Model -> `judges.LIKERT` or label -> mean, bootstrapped over prompts."""
  columns = collections.defaultdict(list)
  for answer, rating in rated:
    values = dict(rating.labels)
    if rating.likert is not None:
      values[judges.LIKERT] = rating.likert
    for name, value in values.items():
      columns[answer.model, name].append((float(value), answer.prompt_id))
  found = {}
  for (model, name), column in columns.items():
    is_likert = name == judges.LIKERT
    interval = win_rate.mean_interval if is_likert else win_rate.share_interval
    found.setdefault(model, {})[name] = interval(
      *zip(*column, strict=True), num_bootstrap=num_bootstrap
    )
  return found


def judge_alarms(judgements, account, outcomes, max_contradictions: float):
  """Reasons not to trust the verdicts, one line each."""
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
      f'{account.one_order} verdicts have no counterpart: the same judge gave '
      'none in the other order'
    )
  nameless = sum(not judgement.labeler for judgement in judgements)
  if 0 < nameless < len(judgements):
    alarms.append(
      f'{nameless} of {len(judgements)} judgements name no labeler, so there '
      'are no intervals by labeler'
    )
  place = outcomes.first_place
  if place and place.is_biased:
    alarms.append(
      f'the answer in the first place wins {place.rate.mean:.1%} '
      f'[{place.rate.low:.1%}, {place.rate.high:.1%}] of the verdicts, so the '
      'judge prefers a place; the average over both orders cancels that in the '
      'rates, but draws them towards one half'
    )
  return alarms


def everyone_rows(config, judged, rates, answers):
  """Each model that was sampled -> column -> figure."""
  against = preferences.against(judged, config.baseline)
  rates = {
    name: preferences.rates(several, config.num_bootstrap)
    for name, several in against.items()
    if name not in rates
  } | rates
  columns = {
    'judge': 'score_judge',
    'reward model': 'score_reward',
    'tokens': 'num_tokens',
    'ended': 'ended',
  }
  return {
    name: {'win rate': rates.get(name)}
    | {
      title: float(np.mean([getattr(answer, field) for answer in several]))
      for title, field in columns.items()
      if getattr(several[0], field) is not None
    }
    for name, several in answers.items()
  }


def judged_figures(
  config, models, prompts, answers, judge, others, learned, workdir
):
  """The fields of `figures.Figures` that come from the judges.

  Writes judgements.jsonl and ratings.jsonl.
  """
  verdicts, account = judge_pairs(config, models, prompts, answers, judge)
  _write_lines(workdir / 'judgements.jsonl', map(dataclasses.asdict, verdicts))
  judged = [j for j in verdicts if j.outcome is not None]
  if not judged:
    raise ValueError(
      f'the judge judged none of {account.pairs} pairs: {account.unjudged} '
      f'without a verdict in both orders, {account.unparsed} verdicts not '
      'understood; judgements.jsonl has its replies'
    )
  columns = [name for name, model in models.items() if model.has_columns]
  num_bootstrap = config.num_bootstrap
  outcomes = preferences.outcomes(
    judged, columns, config.baseline, num_bootstrap
  )
  world = world_of(config)
  rated = rate(config, models, prompts, answers, judge, world)
  lines, by_category = [], collections.defaultdict(list)
  for answer, rating in rated:
    about = {'model': answer.model, 'prompt_id': answer.prompt_id}
    lines.append(about | dataclasses.asdict(rating))
    by_category[answer.category].append((answer, rating))
  _write_lines(workdir / 'ratings.jsonl', lines)
  texts = texts_by(answers)
  shown = {name: texts[name] for name in columns}
  has_tables = world and world.tables_fn
  return {
    'models': columns,
    'baseline': config.baseline,
    'judge': judge.name,
    'unit': judge.unit,
    'has_places': judge.has_places,
    'outcomes': outcomes,
    'alarms': [
      *judge_alarms(judged, account, outcomes, config.max_contradictions),
      *judge.alarms(),
    ],
    'everyone': everyone_rows(config, judged, outcomes.rates, answers),
    'ratings': mean_ratings(rated, num_bootstrap),
    'ratings_by_category': {
      category: mean_ratings(rows, num_bootstrap)
      for category, rows in sorted(by_category.items())
    },
    'asking': dataclasses.asdict(account) | judge.account(),
    'world': world,
    'tables': varieties(learned, texts)
    | other_rates(config, models, prompts, others)
    | (world.tables_fn(prompts, shown) if has_tables else {}),
  }


def _write_lines(path, rows):
  lines = [json.dumps(row, ensure_ascii=False) + '\n' for row in rows]
  records.write_bytes(path, ''.join(lines).encode())


def text_figures(config, losses):
  """The fields about the loss on held-out texts (4.2)."""
  found = {kind: _tax(config, of) for kind, of in losses.items()}
  loss, difference = found.pop(asking.PRETRAINING, ({}, {}))
  return {
    'text_loss': loss,
    'text_loss_difference': difference,
    'other_text_loss': {kind: of for kind, (of, _) in found.items()},
    'other_text_loss_difference': {kind: of for kind, (_, of) in found.items()},
  }


def _tax(config, losses):
  """(model -> loss, model or pair -> loss difference, paired by row)."""
  differences = {}
  pairs = [(name, config.reference) for name in losses]
  for model, other in pairs + named_pairs(config):
    if model == other or not {model, other} <= set(losses):
      continue
    (loss, tokens), (base, other_tokens) = losses[model], losses[other]
    if tokens == other_tokens:  # Losses of different tokenizers do not compare.
      name = model if other == config.reference else f'{model} – {other}'
      differences[name] = heldout_loss.difference(loss, base)
  means = {name: heldout_loss.interval(x) for name, (x, _) in losses.items()}
  return means, differences


# --- The evaluation -----------------------------------------------------------


def run(config, workdir: epath.Path):
  """Runs the models and judges, measures, and writes the report.

  Writes answers/, samples.jsonl, judgements.jsonl and ratings.jsonl into the
  stage's folder; and the report with its plots, the model card and summary.json
  into both the stage's and the run's folder.

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
      loaded | readers_of(config),
      config.prompt_length + config.response_length,
      'prompt_length + response_length',
    )
  drawn, num_given = asking.draw(config, 'prompts', config.num_prompts)
  mesh = sharding.make_mesh(config.mesh)
  with sharding.use_mesh(mesh):
    # Created before sampling, so that wrong keys of a judge fail early.
    judge, *others = (
      judge_fns.find(each.judge)(
        each, workdir / f'judge_{number}' if number else workdir, mesh
      )
      for number, each in enumerate(of_each_judge(config))
    )
    learned = {
      name: records.read_jsonl(path, records.Comparison)
      for name, path in _rankings(config, 'comparisons').items()
    }
    score_fn, rankings = None, {}
    if config.reward_model:
      score_fn, _ = judge_fns.reward_score(config, config.reward_model, mesh)
    asked = asking.ask(config, models, drawn, score_fn, mesh)
    prompts, answers = asking.aligned(drawn, asked.answers)
    prompts, answers, num_too_long = readable(config, prompts, answers)
    by_other = [
      scored(prompts, answers, 'score_judge', other.score)
      if other.gives_scores()
      else answers
      for other in others
    ]
    if judge.gives_scores():
      answers = scored(prompts, answers, 'score_judge', judge.score)
    if score_fn:
      answers = scored(prompts, answers, 'score_reward', score_fn)
      rankings = order_rankings(config, learned, score_fn, judge)
  if jax.process_index() != 0:
    return {}
  recorded = [answer for several in answers.values() for answer in several]
  samples_lib.write_samples(workdir / 'samples.jsonl', recorded)
  others = list(zip(others, by_other, strict=True))
  judged = judged_figures(
    config, models, prompts, answers, judge, others, learned, workdir
  )
  trained = run_figures.of_models(config, models)
  texts = texts_by(answers)
  repeated = variety.alarms(
    {name: texts[name] for name in trained['rl_metrics']},
    texts[config.baseline],
  )
  root = epath.Path(config.workdir)
  side_by_side = functools.partial(
    samples_lib.side_by_side, recorded, judged['models']
  )
  shown = figures.Figures(
    **judged
    | trained
    | text_figures(config, asked.text_loss)
    | run_figures.of_suite(config.suite)
    | provenance_figures(root)
    | {'alarms': [*judged['alarms'], *trained['alarms'], *repeated]},
    seed=config.seed,
    prompts={
      'in the file': num_given,
      'asked': len(drawn),
      **({'too long to score': num_too_long} if num_too_long else {}),
      'answered by every model': len(prompts) // config.samples_per_prompt,
    },
    settings={key: config[key] for key in (*origin.LENGTHS, 'temperature')},
    asked=asked.account,
    reference=config.reference,
    kl=asked.kl,
    prefixes=asked.prefixes,
    reward_model=run_figures.of_reward_model(config, rankings, judge),
    labeling=run_figures.of_labeling(_rankings(config, 'comparisons').values()),
    samples=side_by_side(config.num_samples_shown),
    more_samples=side_by_side(config.num_samples_in_html),
  )
  drawn_plots, card = plots.make_plots(shown), model_card.make_card(shown)
  for directory in dict.fromkeys((workdir, root)):
    files.write_bytes(directory / 'model_card.md', card.encode())
    report.write_report(directory, shown, drawn_plots)
  show(shown, drawn_plots)
  print((root / 'report.md').as_posix(), flush=True)
  pairs = shown.outcomes.pairs.values()
  return {
    'num_prompts': shown.prompts['answered by every model'],
    'num_judgements': sum(pair.rates.num_judgements for pair in pairs),
  }


def show(shown: figures.Figures, drawn: Mapping[str, bytes]) -> None:
  """Logs figures, plots, samples and alarms to the run's logging services."""
  log = logger.current()
  log.numbers(
    0,
    {
      f'evaluate/{model}/{column}'.replace(' ', '_'): getattr(x, 'rate', x)
      for model, row in shown.everyone.items()
      for column, x in row.items()
      if x is not None
    },
  )
  log.plots(0, {name.removesuffix('.png'): png for name, png in drawn.items()})
  rows = [
    {'prompt': row.prompt}
    | {model: answer.response for model, answer in row.answers.items()}
    for row in shown.more_samples
  ]
  log.table(0, 'samples', rows)
  for text in shown.alarms:
    log.alarm(0, text)


def provenance_figures(root: epath.Path) -> dict[str, Any]:
  """The fields about the command and the code that ran."""
  found = run_lib.read_json(root / 'provenance.json')
  return {
    'title': f'Evaluation of {root.name}',
    'command': found['command'],
    'commit': found['commit'] or 'unknown',
    'versions': {k: v for k, v in found['versions'].items() if v},
  }
