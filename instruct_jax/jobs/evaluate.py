"""Judges the models of a finished pipeline and writes its report.

Paper 3.6 and 4.1: every model answers the same held-out prompts, the judge
compares each answer with the SFT model's, and the win rate carries a 95 %
interval. On the embedded world the judge is the gold utility; on human data it
is a reward model trained on the other half of the workers. Neither is a person,
and the report says so.
"""

import dataclasses
import datetime
import functools

import jax
import numpy as np
from etils import epath

from instruct_jax import files, model_fns, model_folder, queries, rollout
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import (
  baselines,
  judges,
  model_card,
  preference_accuracy,
  released_samples,
  report,
  restaurant,
  run_figures,
  win_rate,
)
from instruct_jax.evals import samples as samples_lib
from instruct_jax.infra import metrics as metrics_lib
from instruct_jax.infra import run as run_lib
from instruct_jax.infra import sharding, slices
from instruct_jax.miniature import gold, world
from instruct_jax.models.config import check_stage

PROCESSES = 'all'

JUDGES = ('gold', 'restaurant')
RL_MODELS = ('ppo', 'ppo_ptx')
# Human data: whose rankings, and how their files' names begin.
HALVES = {'reward model': '', 'judge': 'judge_'}


def validate(config):
  check_stage(config)
  run_lib.check_choice(config, 'judge', JUDGES)
  run_lib.check_choice(config, 'rl_weights', ('policy', 'ema'))
  if config.samples_per_prompt < 1:
    raise ValueError(
      f'samples_per_prompt must be positive: {config.samples_per_prompt}'
    )


# What earlier stages of the run wrote, below the work directory.
_OF_RUN = (
  'data/prompts_test.jsonl',
  'data/prompts_valid.jsonl',
  'data/prefixes.json',
  'data/documents_valid.jsonl',
  'data/hygiene.json',
  'pretrain/model',
  'select/model',
  'select/epochs.json',
  'rl_init/model',
  'reward/results.json',
  'crossval/results.json',
  *(
    f'{name}/{part}'
    for name in RL_MODELS
    for part in ('policy', 'ema', 'alarms.json')
  ),
)
_OF_JUDGE = {
  'gold': ('compare/comparisons_heldout.jsonl',),
  'restaurant': tuple(
    f'data/{start}comparisons_{split}.jsonl'
    for start in HALVES.values()
    for split in ('train', 'valid', 'test')
  ),
}


def inputs(config):
  """What this stage reads, by config key, or by its place in the run."""
  keys = ['tokenizer', 'reward_model']
  if config.judge == 'gold':
    keys += ['comparisons', 'valid_comparisons']
  else:
    keys.append('judge_model')
  found = {key: config[key] for key in keys}
  if config.suite and epath.Path(config.suite).exists():
    found['suite'] = config.suite
  for part in (*_OF_RUN, *_OF_JUDGE[config.judge]):
    found[f'run/{part}'] = f'{config.workdir}/{part}'
  return found


def read_prefixes(path: epath.Path, tokenizer):
  """Few-shot prefixes, and the tokens that end an answer to one.

  Raises:
    ValueError: the stop text is not one token, so sampling cannot meet it.
  """
  content = run_lib.read_json(path)
  stop = tokenizer.encode(content['stop'])
  if len(stop) != 1:
    raise ValueError(
      f'{path}: the stop {content["stop"]!r} has {len(stop)} tokens; choose a '
      'text of one'
    )
  return content['prefixes'], (*tokenizer.stop_ids, *stop)


def build_programs(config, policy_module, tokenizer, stop_ids):
  """The jitted programs of this stage; all policies share one shape."""
  generate = functools.partial(
    rollout.generate,
    decoder=model_fns.decoder(policy_module),
    num_response=config.response_length,
    temperature=config.temperature,
    num_slots=config.batch_size,
  )
  return {
    'generate': jax.jit(
      functools.partial(
        generate,
        stop_ids=tokenizer.stop_ids,
        num_samples=config.samples_per_prompt,
      )
    ),
    'generate_prompted': jax.jit(
      functools.partial(generate, stop_ids=stop_ids)
    ),
    'kl': queries.kl_program(policy_module, config.temperature),
  }


def run(config, workdir: epath.Path):
  validate(config)
  root = epath.Path(config.workdir)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)

  def draw(name, number):
    """(the prompts drawn, their rows, counts for the report)."""
    given = records.read_jsonl(root / 'data' / f'{name}.jsonl', records.Prompt)
    drawn = samples_lib.draw_prompts(given, number, config.seed)
    run_lib.say_drawn(config.name, len(drawn), len(given), name)
    rows, dropped = loader.prompt_rows(drawn, tokenizer, config.prompt_length)
    run_lib.tell_dropped(config.name, dropped.describe(name, 'prompt_length'))
    return (
      [drawn[i] for i in rows.indices],
      rows,
      {
        'used': len(rows.indices),
        'drawn': len(drawn),
        'in the file': len(given),
        'dropped': dropped.total,
      },
    )

  prompts, rows, counts = draw('prompts_test', config.num_prompts)
  # One entry for each answer.
  prompts = [p for p in prompts for _ in range(config.samples_per_prompt)]
  prefixes, stop_ids = read_prefixes(root / 'data' / 'prefixes.json', tokenizer)
  folders = {
    'pretrained': root / 'pretrain' / 'model',
    'sft': root / 'select' / 'model',
    'rl_init': root / 'rl_init' / 'model',
    **{
      f'{name}{suffix}': root / name / weights
      for name in RL_MODELS
      for suffix, weights in (('', 'policy'), ('_ema', 'ema'))
    },
  }
  if config.rl_weights == 'ema':
    for name in RL_MODELS:
      folders[name], folders[f'{name}_policy'] = (
        folders.pop(f'{name}_ema'),
        folders[name],
      )
  key = jax.random.key(config.seed)
  mesh = sharding.make_mesh(config.mesh)
  put = functools.partial(sharding.put_whole, mesh=mesh)

  with sharding.use_mesh(mesh):
    load = functools.partial(
      model_folder.load,
      mesh=mesh,
      tokenizer=tokenizer,
      compute_dtype=config.compute_dtype,
    )
    reward = load(config.reward_model, 'scalar')
    models = {name: load(path, 'policy') for name, path in folders.items()}
    lengths = 'prompt_length + response_length'
    num_tokens = config.prompt_length + config.response_length
    for model in (reward, *models.values()):
      model_fns.check_context(model, num_tokens, lengths)
      model_fns.check_context(model, config.row_length, 'row_length')
    programs = build_programs(
      config,
      models['sft'].module,
      tokenizer,
      stop_ids,
    )
    programs = {name: sharding.fetched(p) for name, p in programs.items()}

    def sample(params, rows, program, number, num_samples=1):
      return rollout.in_queues(
        lambda batch: programs[program](
          params, put(batch), jax.random.fold_in(key, number)
        ),
        rows,
        config.batch_size,
        num_samples,
      )

    def score(model, asked, answer_ids):
      """Scores of (prompt, sampled ids): never decoded and encoded again."""
      scored = loader.answer_rows(
        tokenizer.encode_prompts(asked),
        answer_ids,
        tokenizer.pad_id,
        config.prompt_length + config.response_length,
      )
      program = sharding.fetched(queries.score_program(model.module))
      return slices.in_batches(
        lambda batch: program(model.params, *put(batch)),
        scored,
        config.batch_size,
      )

    def score_comparisons(model, comparisons):
      """Per comparison, the score of each completion."""
      scores = score(
        model,
        [c for c in comparisons for _ in c.completions],
        tokenizer.encode_responses(
          [text for c in comparisons for text in c.completions], ended=True
        ),
      )
      ends = np.cumsum([len(c.completions) for c in comparisons])
      return np.split(scores, ends[:-1])

    def prompted_rows(prefix, some_prompts):
      length = config.prompt_length + config.prefix_length
      prompted, dropped = loader.prompt_rows(
        [prefix.replace('{prompt}', p.text) for p in some_prompts],
        tokenizer,
        length,
      )
      if dropped.total:
        raise ValueError(
          f'a prefix and a prompt exceed {length} tokens together; raise '
          f'prefix_length ({config.prefix_length}): {prefix!r}'
        )
      # Of those there are: padding takes no position.
      model_fns.check_context(
        models['pretrained'],
        int(prompted.mask.sum(axis=1).max()) + config.response_length,
        f'the prefix {prefix!r}, prompt_length and response_length',
      )
      return prompted

    def prompted_ids(sampled):
      """Answers of the few-shot model, ended where the next example starts.

      The cut is the harness's, as a stop sequence is; the end put in its place
      tells the reward model that the answer is complete.
      """
      return [
        [*ids[:-1], tokenizer.end_id] if ids[-1] in stop_ids else ids
        for ids in rollout.response_ids(sampled)
      ]

    # 1. The prompted baseline's prefix: best by reward-model score (3.5).
    valid_prompts, _, valid_counts = draw(
      'prompts_valid', config.num_prefix_prompts
    )
    pretrained = models['pretrained'].params
    prefix_scores = []
    with run_lib.Progress('evaluate prefixes', len(prefixes)) as progress:
      for prefix in prefixes:
        sampled = sample(
          pretrained,
          prompted_rows(prefix, valid_prompts),
          'generate_prompted',
          1,
        )
        scores = score(
          reward,
          valid_prompts,
          prompted_ids(sampled),
        )
        prefix_scores.append(float(np.mean(scores)))
        progress.update()
    prefix = prefixes[int(np.argmax(prefix_scores))]

    # 2. Every model's answers to the same prompts.
    answers, ended, kl = {}, {}, {}
    with run_lib.Progress('evaluate models', len(models) + 1) as progress:
      for number, (name, model) in enumerate(models.items(), 2):
        sampled = sample(
          model.params, rows, 'generate', number, config.samples_per_prompt
        )
        answers[name] = rollout.response_ids(sampled)
        ended[name] = sampled.ended
        if name.startswith(RL_MODELS):
          reference = models['rl_init'].params
          kl[name] = slices.in_batches(
            lambda batch, p=model.params, r=reference: programs['kl'](
              p, r, put(batch)
            ),
            sampled,
            config.batch_size,
          )
        progress.update()
      sampled = sample(
        pretrained, prompted_rows(prefix, prompts), 'generate_prompted', 1
      )
      answers['prompted'] = prompted_ids(sampled)
      ended['prompted'] = sampled.ended
      progress.update()

    # 3. Loss on held-out pretraining text, per packed row.
    text_rows = loader.document_rows(
      root / 'data' / 'documents_valid.jsonl', tokenizer, config.row_length
    )
    text_loss = queries.make_heldout_loss(
      models['sft'].module, text_rows, 64, mesh
    )
    text_losses = {
      name: text_loss(models[name].params)
      for name in ('pretrained', 'sft', 'rl_init', *RL_MODELS)
    }
    reward_scores = {
      name: score(reward, prompts, ids) for name, ids in answers.items()
    }
    if config.judge == 'restaurant':
      judge_model = load(config.judge_model, 'scalar')
      judge_scores = {
        name: score(judge_model, prompts, ids) for name, ids in answers.items()
      }
      accuracies = human_accuracies(
        root,
        tokenizer,
        config.prompt_length + config.response_length,
        {
          'reward model': functools.partial(score_comparisons, reward),
          'judge': functools.partial(score_comparisons, judge_model),
        },
      )

  # 4. Judgements: everything from here on is host work on recorded samples.
  if jax.process_index() != 0:
    return {}
  texts_by_model = {
    name: tokenizer.decode_responses(ids) for name, ids in answers.items()
  }
  if config.judge == 'gold':
    judged = judge_by_gold(config, prompts, texts_by_model)
    reward_model, reward_tables = gold_reward_figures(config, root, tokenizer)
  else:
    judged = judge_restaurants(prompts, texts_by_model, judge_scores)
    reward_model, reward_tables = human_reward_figures(root, accuracies)
  gold_scores, flags, likert, judge_name, extra = judged
  recorded = [
    samples_lib.Sample(
      model=name,
      prompt_id=prompt.id,
      prompt=prompt.text,
      response=text,
      num_tokens=len(ids),
      ended=bool(end),
      category=prompt.category,
      score_gold=float(gold_score),
      score_reward=float(reward_score),
      metadata=flag,
    )
    for name in answers
    for prompt, text, ids, end, gold_score, reward_score, flag in zip(
      prompts,
      texts_by_model[name],
      answers[name],
      ended[name],
      gold_scores[name],
      reward_scores[name],
      flags[name],
      strict=True,
    )
  ]
  samples_lib.write_samples(workdir / 'samples.jsonl', recorded)

  # 5. The report.
  ids = [prompt.id for prompt in prompts]
  categories = [prompt.category for prompt in prompts]
  baseline = gold_scores['sft']
  rates = {
    name: win_rate.win_rate(scores, baseline, ids)
    for name, scores in gold_scores.items()
  }
  extra['Held-out prompts'] = {
    'judged': counts,
    'to choose a prefix': valid_counts,
  }
  extra['All policies'] = {
    name: {
      'win rate against SFT': rates[name],
      'judge': float(np.mean(gold_scores[name])),
      'reward model': float(np.mean(reward_scores[name])),
      'tokens': float(np.mean([len(a) for a in answers[name]])),
      'ended': float(np.mean(ended[name])),
    }
    for name in answers
  }
  extra['KL to the RL initialisation on held-out prompts, nats'] = {
    name: {'signed mean': float(np.mean(d)), 'k3': float(np.mean(k3))}
    for name, (d, k3) in kl.items()
  }
  extra['Few-shot prefixes'] = {
    text: {'reward model': value, 'chosen': 'yes' if text == prefix else ''}
    for text, value in zip(prefixes, prefix_scores, strict=True)
  }
  extra["Loss on pretraining text minus the RL initialisation's"] = {
    name: paired_difference(text_losses[name], text_losses['rl_init'])
    for name in ('pretrained', 'sft', *RL_MODELS)
  }
  extra |= reward_tables
  suite, _ = suite_table(config.suite)
  if suite:
    extra['Public NLP suite (paper, appendix D)'] = suite
  done = {
    folder.name: run_lib.read_json(folder / run_lib.DONE_FILE)
    for folder in sorted(root.iterdir())
    if run_lib.is_done(folder)
  }
  provenance = run_lib.read_json(root / 'provenance.json')
  hygiene = run_lib.read_json(root / 'data' / 'hygiene.json')
  epochs = run_lib.read_json(root / 'select' / 'epochs.json')
  figures = run_figures.Figures(
    title=f'{epath.Path(root).name}: InstructGPT end to end',
    command=provenance['command'],
    config_name=epath.Path(root).name,
    seed=config.seed,
    commit=provenance['commit'] or 'unknown',
    versions={k: v for k, v in provenance['versions'].items() if v},
    seconds={name: float(info['seconds']) for name, info in done.items()},
    judge=judge_name,
    win_rate={name: rates[name] for name in run_figures.MODELS},
    win_rate_by_category={
      name: win_rate.win_rate_by_category(
        gold_scores[name], baseline, ids, categories
      )
      for name in ('prompted', *RL_MODELS)
    },
    metadata=metadata_rates(flags, ids),
    likert={
      name: win_rate.mean_interval(likert[name], ids)
      for name in run_figures.MODELS
      if name in likert
    },
    likert_by_category={
      name: mean_by_category(likert[name], ids, categories)
      for name in run_figures.MODELS
      if name in likert
    },
    rl_metrics={
      name: metrics_lib.read_lines(root / name / metrics_lib.METRICS_FILE)
      for name in RL_MODELS
    },
    kl={name: float(np.mean(kl[name][0])) for name in RL_MODELS},
    pretraining_loss=pretraining_figures(text_losses),
    reward_model=reward_model,
    sft_epochs=[
      run_figures.SftEpoch(
        epoch=row['epoch'],
        valid_loss=row['valid_loss'],
        score_reward=row['score_reward'],
      )
      for row in epochs
    ],
    sft_selected_epoch=done['select']['info']['selected_epoch'],
    sft_selected_by=done['select']['info']['selected_by'],
    samples=samples_lib.side_by_side(
      recorded, run_figures.MODELS, config.num_samples_shown
    ),
    more_samples=samples_lib.side_by_side(
      recorded, run_figures.MODELS, config.num_samples_in_html
    ),
    score_name='gold' if config.judge == 'gold' else 'judge',
    hygiene=flatten(hygiene),
    labelers=hygiene['workers']
    if config.judge == 'restaurant'
    else labeling_summary(config),
    data_sizes={
      path.stem: sum(1 for _ in path.open('rb'))
      for folder in ('data', 'compare')
      if (root / folder).exists()
      for path in sorted((root / folder).glob('*.jsonl'))
    },
    alarms=[
      f'{name}: {text}'
      for name in RL_MODELS
      for text in run_lib.read_json(root / name / 'alarms.json').values()
    ],
    extra=extra,
    reasons={}
    if config.judge == 'restaurant'
    else {'labelers': 'the labelers are described in the README'},
  )
  card = model_card.make_card(
    figures,
    card_facts(config, root, models['sft'].config, reward.module.config),
  )
  plots = report.draw(figures)
  for directory in (workdir, root):
    files.write_bytes(directory / 'model_card.md', card.encode())
    report.write_report(directory, figures, plots)
  print((root / 'report.md').as_posix(), flush=True)
  return {
    'num_prompts': counts['used'],
    'num_given': counts['in the file'],
    'num_dropped': counts['dropped'],
  }


def judge_by_gold(config, prompts, texts_by_model):
  """Scores, Table 3 flags and Likert by the world's gold utility."""
  the_world = world.make_world(config.seed)
  scores, flags, likert = {}, {}, {}
  for name, texts in texts_by_model.items():
    judgements = [
      gold.judge(prompt, text, the_world)
      for prompt, text in zip(prompts, texts, strict=True)
    ]
    scores[name] = np.array([gold.utility(j) for j in judgements])
    flags[name] = [judges.gold_labels(j) for j in judgements]
    likert[name] = [judges.gold_likert(j) for j in judgements]
  judge = 'gold utility of the miniature (a program)'
  return scores, flags, likert, judge, {}


def mean_by_category(values, ids, categories):
  """Use case -> mean with its interval, clustered by prompt."""
  found = {}
  for category in sorted(set(categories)):
    chosen = [i for i, name in enumerate(categories) if name == category]
    found[category] = win_rate.mean_interval(
      [values[i] for i in chosen], [ids[i] for i in chosen]
    )
  return found


def judge_restaurants(prompts, texts_by_model, judge_scores):
  """Human data: a second reward model judges; slots and BLEU beside it."""
  slots = [prompt.metadata['slots'] for prompt in prompts]
  ids = [prompt.id for prompt in prompts]
  with_references = [
    i for i, prompt in enumerate(prompts) if prompt.metadata['references']
  ]
  references = [prompts[i].metadata['references'] for i in with_references]
  reference_ids = [ids[i] for i in with_references]
  flags, table = {}, {}
  for name, texts in texts_by_model.items():
    flags[name] = []
    for facts, text in zip(slots, texts, strict=True):
      found = restaurant.slot_report(facts, text)
      flags[name].append(
        {
          'says every slot': not found.missing,
          'invents a value (hallucination)': bool(found.invented),
        }
      )
    table[name] = {
      'BLEU': restaurant.bleu(
        [texts[i] for i in with_references], references, reference_ids
      ),
      **slot_columns(slots, texts, ids),
    }
  # What people wrote for the same facts, as the measure of the measure.
  pairs = [
    (slots[i], text, ids[i])
    for i, several in zip(with_references, references, strict=True)
    for text in several
  ]
  table['people'] = slot_columns(*zip(*pairs, strict=True))
  judge = 'a second reward model, trained on the other half of the workers'
  return judge_scores, flags, {}, judge, {'Slots and BLEU': table}


def slot_columns(slots, texts, ids):
  rates = restaurant.slot_rates(slots, texts, ids)
  return {
    'slots realised': rates.realised,
    'values invented': rates.invented,
    'answers with an invention': rates.invented_answers,
    'answers without any slot error': rates.faithful,
  }


def metadata_rates(flags, ids):
  """Model -> Table 3 label -> share of the answers it applies to, by prompt."""
  rates = {}
  for name in run_figures.MODELS:
    labels = dict.fromkeys(label for row in flags[name] for label in row)
    rates[name] = {}
    for label in labels:
      chosen = [i for i, row in enumerate(flags[name]) if label in row]
      rates[name][label] = win_rate.share_interval(
        [flags[name][i][label] for i in chosen], [ids[i] for i in chosen]
      )
  return rates


def pretraining_figures(losses):
  """Held-out loss with intervals, by packed row."""

  def interval(name):
    loss = losses[name]
    return win_rate.ratio_interval(
      loss.row_sums, loss.row_counts, range(len(loss.row_sums))
    )

  return run_figures.PretrainingLoss(
    init=interval('rl_init'),
    ppo=interval('ppo'),
    ppo_ptx=interval('ppo_ptx'),
    difference=paired_difference(losses['ppo_ptx'], losses['ppo']),
  )


def paired_difference(loss, other):
  """Nats per token by which `loss` is higher, paired by packed row."""
  return win_rate.ratio_interval(
    loss.row_sums - other.row_sums,
    loss.row_counts,
    range(len(loss.row_sums)),
  )


def gold_reward_figures(config, root, tokenizer):
  """The embedded world: accuracy, its ceiling, and two groups of labelers."""
  results = run_lib.read_json(root / 'reward' / 'results.json')
  heldout = root / 'compare' / 'comparisons_heldout.jsonl'
  train, valid, heldout = (
    records.read_jsonl(path, records.Comparison)
    for path in (config.comparisons, config.valid_comparisons, heldout)
  )
  valid = fitting(
    valid, tokenizer, 'valid_comparisons', 'row_length', config.row_length
  )
  accuracy = preference_accuracy.Accuracy(
    results['accuracy'], results['low'], results['high'], results['num_pairs']
  )
  # The gold utility judges what its world asks, and no prompt of other people.
  ceiling, tables = None, {}
  if all('kind' in comparison.metadata for comparison in valid):
    the_world = world.make_world(config.seed)
    # What several labelers ranked is judged once.
    distinct = {(c.id, c.completions): c for c in valid}
    scores = {k: gold_scores_of(c, the_world) for k, c in distinct.items()}
    ceiling = accuracy_of([scores[c.id, c.completions] for c in valid], valid)
    tables['Best achievable accuracy given label noise'] = {
      'gold utility on the same pairs': ceiling
    }
  tables |= {
    'Reward model against trivial baselines': {
      'reward model': accuracy,
      **{
        name: accuracy_of(judge.scores(valid), valid)
        for name, judge in trivial_judges(train).items()
      },
    },
  }
  figures = run_figures.RewardFigures(
    accuracy=accuracy,
    ceiling=ceiling and ceiling.accuracy,
    agreement=preference_accuracy.agreement(valid),
    # Simulated ones have nothing to say about people's rankings.
    agreement_heldout=None
    if labeling_statistics(config)
    else preference_accuracy.agreement(heldout),
    **fold_figures(root),
  )
  return figures, tables


def fitting(comparisons, tokenizer, what, key, limit):
  """The comparisons that fit; says how many do not."""
  kept = loader.fitting_comparisons(comparisons, tokenizer, limit)
  run_lib.say_left_out(
    'evaluate',
    len(comparisons) - len(kept),
    len(comparisons),
    what,
    f'{key} ({limit} tokens)',
  )
  return kept


def labeling_statistics(config):
  """statistics.json beside the rankings, of the labeling site; {} without."""
  path = epath.Path(config.comparisons).parent / 'statistics.json'
  return run_lib.read_json(path) if path.exists() else {}


def labeling_summary(config):
  """Statement about the people who ranked -> figure, for the report."""
  found = labeling_statistics(config)
  if not found:
    return {}
  rates = {
    f'agreement of {who}': preference_accuracy.Agreement(**value)
    for who, value in found['agreement'].items()
    if value is not None
  }
  counts = {'labelers': found['num_labelers'], 'answers': found['num_answers']}
  return counts | rates


def suite_table(path):
  """(task, prompt and metric -> model -> figure, task -> judge) of a suite."""
  if not epath.Path(path).exists():
    return {}, {}
  result = run_lib.read_json(path)
  found = {}
  for cell in result['cells']:
    row = found.setdefault(released_samples.line_name(cell), {})
    row[cell['model']] = win_rate.Interval(
      cell['score'], cell['low'], cell['high'], cell['num_items']
    )
  return found, result['judges']


def human_accuracies(root, tokenizer, row_length, models):
  """Accuracies on rankings of representations that no training has seen.

  Args:
    root: of the run.
    tokenizer: counts the tokens.
    row_length: rankings with longer texts are left out.
    models: name -> function from comparisons to their scores.

  Returns:
    Judge -> whose rankings -> accuracy. The trivial judges of each column
    learned from the training rankings of that column's workers.
  """
  table = {}
  for half, start in HALVES.items():
    train, test = (
      fitting(
        records.read_jsonl(
          root / 'data' / f'{start}comparisons_{split}.jsonl',
          records.Comparison,
        ),
        tokenizer,
        f'{start}comparisons_{split}',
        'prompt_length + response_length',
        row_length,
      )
      for split in ('train', 'test')
    )
    scorers = dict(models)
    for name, judge in trivial_judges(train).items():
      scorers[name] = judge.scores
    for name, scores in scorers.items():
      row = table.setdefault(name, {})
      row[f"{half}'s workers"] = accuracy_of(scores(test), test)
  return table


def human_reward_figures(root, accuracies):
  """Human data: accuracies, and how far workers agree with one another."""
  rankings = [
    # Each criterion is a question of its own: no agreement across them.
    dataclasses.replace(c, prompt=f'{c.labeler.split(":")[0]}\n{c.prompt}')
    for start in HALVES.values()
    for split in ('train', 'valid', 'test')
    for c in records.read_jsonl(
      root / 'data' / f'{start}comparisons_{split}.jsonl', records.Comparison
    )
  ]
  figures = run_figures.RewardFigures(
    accuracy=accuracies['reward model']["reward model's workers"],
    agreement=preference_accuracy.agreement(rankings),
    **fold_figures(root),
  )
  return figures, {'Accuracy on held-out representations': accuracies}


def trivial_judges(train):
  """What a reward model must beat, fitted to the same rankings."""
  return {
    'length only': baselines.fit_length(train),
    'bag of words (Bradley-Terry)': baselines.fit_bag_of_words(train),
  }


def accuracy_of(scores, comparisons):
  return preference_accuracy.pairwise_accuracy(
    scores,
    [c.ranks for c in comparisons],
    [c.prompt for c in comparisons],
  )


def fold_figures(root):
  """Cross-validation over labelers, and the training curve."""
  folds = run_lib.read_json(root / 'crossval' / 'results.json')
  return {
    'curve': metrics_lib.read_lines(root / 'reward' / metrics_lib.METRICS_FILE),
    **{
      name: preference_accuracy.Spread(
        folds[name]['mean'], folds[name]['error'], len(folds['runs'])
      )
      for name in ('intra', 'inter')
    },
  }


def gold_scores_of(comparison, the_world):
  prompt = records.Prompt(
    id=comparison.id,
    text=comparison.prompt,
    category=comparison.category,
    metadata=comparison.metadata,
  )
  return [
    gold.utility(gold.judge(prompt, text, the_world))
    for text in comparison.completions
  ]


# Keys of the stages' configs that the model card names.
CARD_KEYS = (
  'num_steps',
  'num_epochs',
  'num_episodes',
  'batch_size',
  'learning_rate',
  'value_learning_rate',
  'dropout',
  'ptx_fraction',
  'max_candidates',
  'kl_coef',
  'ptx_coef',
  'ptx_per_episode',
  'clip',
  'gae_lambda',
  'temperature',
  'ema_decay',
)
TRAINING_STAGES = ('pretrain', 'sft', 'rl_init', 'reward', 'ppo', 'ppo_ptx')


def card_facts(config, root, policy, scalar):
  """What the model card says beside the figures, from the run's own files."""
  stages = run_lib.read_json(root / 'config.json')['stages']
  people = config.judge == 'restaurant'
  suite, suite_judges = suite_table(config.suite)
  return model_card.Facts(
    name=root.name,
    date=datetime.date.today().isoformat(),
    policy_parameters=policy.num_params,
    reward_parameters=scalar.num_params,
    world=(
      'Restaurant facts with sentences written by crowd workers (E2E), and '
      'their rankings of system outputs; books as pretraining text.'
      if people
      else 'An embedded world of plain English: documents, prompts, '
      'demonstrations and rankings are all written by programs '
      '(instruct_jax/miniature). Nothing in it is about real persons.'
    ),
    people=people,
    hyper_parameters={
      name: {key: stages[name][key] for key in CARD_KEYS if key in stages[name]}
      for name in TRAINING_STAGES
    },
    compute=compute_of(
      config, root, stages, policy.num_params, scalar.num_params
    ),
    labeling=labeling_statistics(config),
    suite=suite,
    suite_judges=suite_judges,
  )


def compute_of(config, root, stages, num_policy, num_scalar):
  """Stage -> floating-point operations of its training, by formula."""
  operations = {}
  for name in ('pretrain', 'sft', 'rl_init'):
    stage = stages[name]
    steps = metrics_lib.read_lines(root / name / metrics_lib.METRICS_FILE)[-1]
    operations[name] = model_card.training_operations(
      num_policy, steps['step'] * stage['batch_size'] * stage['row_length']
    )
  answers = run_lib.read_json(root / 'reward' / 'results.json')['num_forwards']
  # Each prompt with each of its answers, as long as RL has them at the most.
  length = stages['ppo']['prompt_length'] + stages['ppo']['response_length']
  operations['reward'] = model_card.training_operations(
    num_scalar, stages['reward']['num_epochs'] * answers * length
  )
  for name in ('ppo', 'ppo_ptx'):
    stage = stages[name]
    text = (
      stage['num_episodes'] * stage['num_epochs'] * stage['ptx_per_episode']
      if stage['ptx_coef'] > 0
      else 0
    )
    operations[name] = model_card.ppo_operations(
      num_policy,
      num_scalar,
      stage['num_episodes'],
      stage['prompt_length'] + stage['response_length'],
      stage['num_epochs'],
      text * stage['ptx_row_length'],
    )
  return operations


def flatten(tree, prefix=''):
  """{'kept': {'train': 1}} to {'kept train': 1}."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f'{prefix}{name} ')
    else:
      flat[f'{prefix}{name}'] = value
  return flat
