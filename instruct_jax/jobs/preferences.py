"""Preference evaluation of any models, by any judge (paper 3.6, 4.1).

Every model answers the same prompts once; answers are kept under a hash of all
that they depend on, so a second judge or another model costs no sampling. The
judge sees each pair in both orders. Ties count one half.
"""

import dataclasses
import hashlib
import itertools
import json

import jax
import numpy as np
from etils import epath

from instruct_jax import files, model_folder, queries, rollout
from instruct_jax.data import loader, records
from instruct_jax.evals import (
  endpoint,
  judges,
  plots,
  preferences,
  report,
  win_rate,
)
from instruct_jax.evals import samples as samples_lib
from instruct_jax.infra import origin, sharding
from instruct_jax.infra import run as run_lib
from instruct_jax.models.config import check_stage

PROCESSES = 'one'

_RECORDED = ('.jsonl', '.jsonl.gz')


def is_recorded(source: str) -> bool:
  return source.partition('#')[0].endswith(_RECORDED)


def validate(config):
  check_stage(config)
  models = model_folder.named_folders(config.models)
  if config.baseline not in models or len(models) < 2:
    raise ValueError(
      f'models must hold the baseline {config.baseline!r} and one more: '
      f'{sorted(models)}'
    )
  needed = {
    'gold': {},
    'reward': {'reward_model': config.reward_model},
    'people': {'rankings': config.rankings},
    'http': {
      'endpoint.url': config.endpoint.url,
      'endpoint.model': config.endpoint.model,
    },
  }
  run_lib.check_choice(config, 'judge', tuple(needed))
  for key, value in {'prompts': config.prompts, **needed[config.judge]}.items():
    if not value:
      raise ValueError(f'{key} is empty; the {config.judge} judge needs it')
  if config.judge == 'http':
    endpoint.check(config.endpoint, 'endpoint')
  run_lib.check_choice(config, 'pairs', ('baseline', 'all'))
  for key in ('num_prompts', 'batch_size', 'num_bootstrap'):
    if config[key] < 1:
      raise ValueError(f'{key} must be positive: {config[key]}')
  sampled = [name for name, source in models.items() if not is_recorded(source)]
  needs_ours = config.judge == 'reward' or any(
    not model_folder.is_published(models[name]) for name in sampled
  )
  if needs_ours and not config.tokenizer:
    raise ValueError('tokenizer is empty; models of ours need its folder')


def inputs(config):
  """What this stage reads, by config key."""
  found = {'prompts': config.prompts}
  if config.tokenizer:
    found['tokenizer'] = config.tokenizer
  for name, source in model_folder.named_folders(config.models).items():
    found[f'models.{name}'] = source.partition('#')[0]
  key = {'reward': 'reward_model', 'people': 'rankings'}.get(config.judge)
  if key:
    found[key] = config[key]
  return found


# --- Answers ------------------------------------------------------------------


def read_recorded(name, source, prompts):
  """Recorded answers of one model to these prompts, the first of each.

  Raises:
    ValueError: the file holds several models and the source names none, or no
      answer to any of the prompts.
  """
  path, _, wanted = source.partition('#')
  found = samples_lib.read_samples(path)
  models = sorted({sample.model for sample in found})
  if not wanted:
    wanted = models[0] if len(models) == 1 else name
  if wanted not in models:
    raise ValueError(
      f'{path} holds answers of {", ".join(models)}; choose one as '
      f'{name}={path}#MODEL'
    )
  answers = {}
  for sample in found:
    if sample.model == wanted:
      answers.setdefault(sample.prompt_id, sample)
  texts = {prompt.id: prompt.text for prompt in prompts}
  chosen = [
    dataclasses.replace(answers[key], model=name)
    for key in texts
    if key in answers
  ]
  other = [s.prompt_id for s in chosen if s.prompt != texts[s.prompt_id]]
  if other:
    raise ValueError(
      f'{path}: {len(other)} prompts have the ids of other texts than in the '
      f'prompt file, first {other[0]!r}; give the file they were sampled from'
    )
  if not chosen:
    raise ValueError(
      f'{path}: {wanted} answers none of the {len(texts)} prompts'
    )
  return chosen


def sample_answers(config, name, source, tokenizer, prompts, cache, mesh):
  """A model's answers, from the cache or sampled now; one line a prompt."""
  settings = {
    'model': model_folder.content_hash(source),
    'tokenizer': tokenizer.fingerprint,
    'prompts': [records.to_values(prompt) for prompt in prompts],
    'prompt_length': config.prompt_length,
    'response_length': config.response_length,
    'temperature': config.temperature,
    'seed': config.seed,
  }
  if config.compute_dtype:  # Of other numbers come other answers.
    settings['compute_dtype'] = config.compute_dtype
  content = json.dumps(settings, sort_keys=True).encode()
  path = cache / f'{hashlib.sha256(content).hexdigest()[:32]}.jsonl'
  if path.exists():
    # The same weights may have had another name then.
    return [
      dataclasses.replace(sample, model=name)
      for sample in samples_lib.read_samples(path)
    ], True
  rows, dropped = loader.prompt_rows(prompts, tokenizer, config.prompt_length)
  run_lib.tell_dropped(
    f'{config.name}, {name}', dropped.describe('prompts', 'prompt_length')
  )
  model = queries.load_policy(
    source, tokenizer, mesh, compute_dtype=config.compute_dtype
  )
  program = queries.generate_program(
    model.module,
    config.response_length,
    tokenizer.stop_ids,
    config.temperature,
    config.batch_size,
  )
  key = jax.random.key(config.seed)
  with run_lib.Progress(f'sample {name}', loader.num_rows(rows)) as progress:
    sampled = rollout.in_queues(
      lambda batch: program(model.params, sharding.put_batch(batch, mesh), key),
      rows,
      config.batch_size,
      progress=progress.update,
    )
  ids = rollout.response_ids(sampled)
  samples = [
    samples_lib.Sample(
      model=name,
      prompt_id=prompts[index].id,
      prompt=prompts[index].text,
      response=text,
      num_tokens=len(answer),
      ended=bool(ended),
      category=prompts[index].category,
      # Scored as sampled: decoding and encoding again may change the ids.
      metadata={'ids': answer, 'tokenizer': tokenizer.fingerprint},
    )
    for index, text, answer, ended in zip(
      rows.indices,
      tokenizer.decode_responses(ids),
      ids,
      sampled.ended,
      strict=True,
    )
  ]
  samples_lib.write_samples(path, samples)
  return samples, False


def collect_answers(config, prompts, cache, mesh):
  """(model -> prompt id -> answer, model -> how its answers came about)."""
  answers, account = {}, {}
  for name, source in model_folder.named_folders(config.models).items():
    if is_recorded(source):
      found, how = read_recorded(name, source, prompts), 'recorded'
      read = 'recorded; how it was asked is not known'
    else:
      tokenizer = queries.tokenizer_of(source, config.tokenizer, chat=True)
      read = tokenizer.describe()
      found, cached = sample_answers(
        config, name, source, tokenizer, prompts, cache, mesh
      )
      how = 'from the cache' if cached else 'sampled'
    answers[name] = {sample.prompt_id: sample for sample in found}
    account[name] = {
      'from': how,
      'asked with': read,
      'answers': len(found),
      'prompts without': len(prompts) - len(found),
      'empty': sum(not sample.response.strip() for sample in found),
      'not ended': sum(not sample.ended for sample in found),
      'mean tokens': float(np.mean([sample.num_tokens for sample in found])),
    }
  return answers, account


# --- Judges -------------------------------------------------------------------


def reward_score(config, mesh):
  """(a `judges.ScoreFn` of the reward model, its tokenizer)."""
  tokenizer = queries.tokenizer_of(
    config.reward_model, config.tokenizer, chat=True
  )
  model = model_folder.load(
    config.reward_model,
    'scalar',
    mesh,
    tokenizer,
    compute_dtype=config.compute_dtype,
  )

  def score(answers):
    prompts = tokenizer.encode_prompts([prompt for prompt, _ in answers])
    ids = [queries.answer_ids(tokenizer, answer) for _, answer in answers]
    return queries.score_answers(
      model, prompts, ids, tokenizer.pad_id, config.batch_size, mesh
    )

  return score, tokenizer


def make_judge(config, workdir, mesh):
  """(name, CompareFn, RateFn or None, function that says what it cost)."""
  if config.judge == 'gold':
    name = 'gold utility of the miniature (a program)'
    compare = judges.by_score(judges.gold_score(config.world_seed))
    return name, compare, judges.gold_rating(config.world_seed), dict
  if config.judge == 'reward':
    score, tokenizer = reward_score(config, mesh)
    name = f'a reward model (no person): {config.reward_model}'
    name += f'; it reads {tokenizer.describe()}'
    return name, judges.by_score(score), None, dict
  if config.judge == 'people':
    compare, rate, labelers = judges.read_rankings(config.rankings)
    name = f'people ({len(labelers)} by name), {config.rankings}'
    return name, compare, rate, dict
  described = config.endpoint
  asking = endpoint.Endpoint(
    endpoint.Settings(
      url=described.url,
      key_variable=described.key_variable,
      timeout=described.timeout,
      max_retries=described.max_retries,
      requests_per_minute=described.requests_per_minute,
      num_workers=described.num_workers,
    ),
    workdir / 'journal.jsonl',
  )
  judge = judges.ChatJudge(
    asking,
    described.model,
    judges.Prices(described.prompt_price, described.completion_price),
    described.max_tokens,
  )

  def cost():
    return {**dataclasses.asdict(asking.counts), **judge.cost()}

  def shown(label, ask):
    def asked(items):
      with run_lib.Progress(label, len(items)) as progress:
        judge.progress = progress.update
        return ask(items)

    return asked

  name = f'{described.model} (a model, no person) at {described.url}'
  return name, shown('judge', judge.compare), shown('rate', judge.rate), cost


# --- The evaluation -----------------------------------------------------------


def run(config, workdir: epath.Path):
  validate(config)
  sources = model_folder.named_folders(config.models)
  models = list(sources)
  sampled = {n: path for n, path in sources.items() if not is_recorded(path)}
  keys = [*origin.LENGTHS] if sampled else []
  keys += [origin.WORLD] * (config.judge == 'gold')
  config = origin.filled(config, keys, sampled, config.prompts)
  if sampled:
    model_folder.check_contexts(
      sampled,
      config.prompt_length + config.response_length,
      'prompt_length + response_length',
    )
  given = records.read_jsonl(config.prompts, records.Prompt)
  prompts = samples_lib.draw_prompts(given, config.num_prompts, config.seed)
  run_lib.say_drawn(config.name, len(prompts), len(given), 'prompts')
  mesh = sharding.make_mesh(config.mesh)
  cache = epath.Path(config.cache or workdir / 'answers')
  with sharding.use_mesh(mesh):
    answers, sources = collect_answers(config, prompts, cache, mesh)
    common = [
      prompt
      for prompt in prompts
      if all(prompt.id in answers[model] for model in models)
    ]
    if not common:
      raise ValueError('no prompt has an answer of every model')
    samples_lib.write_samples(
      workdir / 'samples.jsonl',
      [answers[model][p.id] for model in models for p in common],
    )
    judge_name, compare, rate, cost = make_judge(config, workdir, mesh)
    others = [model for model in models if model != config.baseline]
    sides = (
      [(model, config.baseline) for model in others]
      if config.pairs == 'baseline'
      else list(itertools.combinations(models, 2))
    )
    pairs = [
      judges.Pair(prompt, answers[a][prompt.id], answers[b][prompt.id])
      for a, b in sides
      for prompt in common
    ]
    everything, account = judges.ask_both_orders(compare, pairs)
    judgements = [j for j in everything if j.outcome is not None]
    rated = []
    if rate is not None and config.rate_answers:
      flat = [(p, answers[model][p.id]) for model in models for p in common]
      rated = [
        (answer, rating)
        for (_, answer), several in zip(flat, rate(flat), strict=True)
        for rating in several
      ]
  lines = [json.dumps(dataclasses.asdict(j)) + '\n' for j in everything]
  files.write_bytes(workdir / 'judgements.jsonl', ''.join(lines).encode())
  result = figures_of(config, judgements, account, rated)
  result |= {
    'judge': judge_name,
    'baseline': config.baseline,
    'models': sources,
    'prompts': {
      'in the file': len(given),
      'asked': len(prompts),
      'answered by every model': len(common),
    },
    'asking': cost(),
    'settings': {key: config[key] for key in (*origin.LENGTHS, origin.WORLD)},
  }
  write_results(config, workdir, result)
  return {'num_prompts': len(common), 'num_judgements': len(judgements)}


def figures_of(config, judgements, account, rated):
  """All figures of a finished judging, as dataclasses and numbers."""
  if not judgements:
    raise ValueError(
      f'the judge judged none of {account.pairs} pairs: {account.unjudged} '
      f'without an opinion in both orders, {account.unparsed} verdicts not '
      'understood; judgements.jsonl has what it said'
    )
  by_model = preferences.against(judgements, config.baseline)
  share = account.contradictions / account.judgements
  alarms = []
  if share > config.max_contradictions:
    alarms.append(
      f'the judge contradicts itself in {share:.1%} of the pairs when the '
      f'answers change places, more than {config.max_contradictions:.1%}; its '
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
  sides = {}
  for judgement in judgements:
    sides.setdefault((judgement.model, judgement.other), []).append(judgement)
  places = {
    name: preferences.first_place(rows, config.num_bootstrap, config.seed)
    for name, rows in (
      ('all pairs', judgements),
      *((f'{model} – {other}', rows) for (model, other), rows in sides.items()),
    )
  }
  if places['all pairs'].is_biased:
    found = places['all pairs'].rate
    alarms.append(
      f'the answer in the first place wins {found.mean:.1%} '
      f'[{found.low:.1%}, {found.high:.1%}] of the verdicts: the judge looks '
      'at the place; both orders are averaged, which cancels it in the rates '
      'and draws them towards one half'
    )
  return {
    'account': dataclasses.asdict(account),
    'alarms': alarms,
    'win_rate': {
      model: preferences.rates(rows, config.num_bootstrap, config.seed)
      for model, rows in by_model.items()
    },
    'length_controlled': preferences.length_controlled(
      by_model, seed=config.seed
    ),
    'by_category': {
      model: preferences.rates_by_category(
        rows, config.num_bootstrap, config.seed
      )
      for model, rows in by_model.items()
    },
    'bradley_terry': preferences.bradley_terry(
      judgements, config.baseline, seed=config.seed
    ),
    'first_place': places,
    'power': {
      f'{model} – {other}': preferences.power(rows)
      for (model, other), rows in sides.items()
      if len({row.prompt_id for row in rows}) > 1
    },
    'ratings': rating_figures(config, rated),
    'ratings_by_category': {
      category: rating_figures(
        config, [row for row in rated if row[0].category == category]
      )
      for category in sorted({answer.category for answer, _ in rated})
    },
  }


LIKERT = 'overall quality, 1 to 7'


def rating_figures(config, rated):
  """Model -> 'overall (1 to 7)' and each label -> mean with its interval."""
  columns = {}
  for answer, rating in rated:
    values = dict(rating.labels)
    if rating.likert is not None:
      values[LIKERT] = rating.likert
    for name, value in values.items():
      column = columns.setdefault(answer.model, {}).setdefault(name, ([], []))
      column[0].append(float(value))
      column[1].append(answer.prompt_id)
  return {
    model: {
      name: (
        win_rate.mean_interval if name == LIKERT else win_rate.share_interval
      )(values, ids, num_bootstrap=config.num_bootstrap, seed=config.seed)
      for name, (values, ids) in by_name.items()
    }
    for model, by_name in columns.items()
  }


def write_results(config, workdir, result):
  text = json.dumps(
    report.plain_json(result), indent=2, ensure_ascii=False, allow_nan=False
  )
  files.write_bytes(workdir / 'preferences.json', (text + '\n').encode())
  counts = result['prompts']
  count, given = counts['answered by every model'], counts['in the file']
  files.write_bytes(
    workdir / 'win_rate.png',
    plots.win_rate_bars(
      {
        model: (r.by_prompt.mean, r.by_prompt.low, r.by_prompt.high)
        for model, r in result['win_rate'].items()
      },
      config.baseline,
      f'{count:,} of {given:,} prompts',
      result['judge'],
    ),
  )
  files.write_bytes(
    workdir / 'preferences.md', markdown(config, result).encode()
  )


def ratings_table(first, columns):
  """Markdown lines; columns: model -> row name -> figure."""
  names = dict.fromkeys(name for column in columns.values() for name in column)
  return report.table(
    [first, *map(report.escape, columns)],
    [
      [
        report.escape(name),
        *(
          report.cell(column[name]) if name in column else '–'
          for column in columns.values()
        ),
      ]
      for name in names
    ],
  )


def markdown(config, result):
  """preferences.md."""
  cell, table, escape = report.cell, report.table, report.escape
  baseline = escape(config.baseline)
  lines = ['# Preferences', '', f'Judge: {escape(result["judge"])}.', '']
  lines += [f'- Alarm: {escape(text)}.' for text in result['alarms']]
  lines += [
    '',
    f'Win rate against {baseline}, ties one half, each pair judged in both '
    'orders. Intervals are 95 %, redrawing prompts, and labelers where there '
    'are several. At equal length: a logistic regression on the logarithm of '
    'the length ratio takes out what length alone wins.',
    '',
  ]
  controlled = result['length_controlled']
  lines += table(
    ['model', 'win rate', 'by labeler', 'at equal length', 'judgements'],
    [
      [
        escape(model),
        cell(rate.by_prompt),
        cell(rate.by_labeler) if rate.by_labeler else '–',
        cell(controlled.rates[model]),
        cell(rate.num_judgements),
      ]
      for model, rate in result['win_rate'].items()
    ],
  )
  lines += [
    f'Log-odds of a win for each e-fold of length: {cell(controlled.slope)}.',
    '',
    '![Win rates](win_rate.png)',
    '',
    '## By use case',
    '',
  ]
  categories = sorted(
    {name for rates in result['by_category'].values() for name in rates}
  )
  lines += table(
    ['use case', *map(escape, result['by_category'])],
    [
      [
        escape(category) or '–',
        *(
          cell(rates[category].by_prompt) if category in rates else '–'
          for rates in result['by_category'].values()
        ),
      ]
      for category in categories
    ],
  )
  lines += [
    '## Bradley-Terry ratings',
    '',
    f'In nats, {baseline} at 0; one nat is 173.7 Elo points.',
    '',
  ]
  lines += table(
    ['model', 'rating'],
    [[escape(m), cell(r)] for m, r in result['bradley_terry'].items()],
  )
  lines += [
    '## Does the place of an answer decide?',
    '',
    'How often the answer shown first wins, ties one half. Each pair was '
    'judged in both orders, so a judge that reads the answers alone has '
    'exactly one half, whichever is better. Every verdict is in '
    'judgements.jsonl.',
    '',
  ]
  lines += table(
    ['pair', 'first place wins', 'ties', 'contradictions', 'verdicts'],
    [
      [
        escape(name),
        cell(found.rate),
        cell(found.ties),
        cell(found.contradictions),
        cell(found.num_verdicts),
      ]
      for name, found in result['first_place'].items()
    ],
  )
  lines += [
    '## How many prompts would separate two models',
    '',
    'At the rates seen: so many that a 95 % interval just excludes one half, '
    'and that it does so in 80 % of the repetitions.',
    '',
  ]
  lines += table(
    ['pair', 'rate', 'prompts now', 'to separate', 'for 80 % power'],
    [
      [
        escape(name),
        cell(power.rate),
        cell(power.num_prompts),
        cell(power.to_separate),
        cell(power.for_power),
      ]
      for name, power in result['power'].items()
    ],
  )
  lines += ['## Ratings of single answers (Table 3)', '']
  if result['ratings']:
    lines += ratings_table('', result['ratings'])
    lines += [
      'Overall quality by use case; preferences.json has every label by use '
      'case.',
      '',
    ]
    by_case = {model: {} for model in result['ratings']}
    for category, ratings in result['ratings_by_category'].items():
      for model, row in ratings.items():
        if LIKERT in row:
          by_case[model][category or '–'] = row[LIKERT]
    lines += ratings_table('use case', by_case)
  else:
    lines += ['*Left out: this judge gives none.*', '']
  lines += ['## What was asked', '']
  for values in (result['prompts'], result['account'], result['asking']):
    if values:
      lines += table(
        ['', 'count'], [[escape(k), cell(v)] for k, v in values.items()]
      )
  columns = list(next(iter(result['models'].values())))
  lines += table(
    ['model', *columns],
    [
      [escape(model), *(cell(row[c]) for c in columns)]
      for model, row in result['models'].items()
    ],
  )
  return '\n'.join(lines).rstrip() + '\n'
