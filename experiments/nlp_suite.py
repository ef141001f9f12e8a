"""Runs the public NLP suite (appendix D) on one or more policies.

Every finished batch is kept, so the same command goes on after a cut. Output:
`samples/TASK_samples.csv` in OpenAI's layout, `suite.md` and `suite.json` with
scores and intervals, and what was left out, shortened or empty.
"""

import dataclasses

from etils import epath

from instruct_jax import artifacts
from instruct_jax import queries as queries_lib
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import endpoint, released_samples
from instruct_jax.evals.benchmarks import judges, released_csv, runner, tasks
from instruct_jax.infra import run as run_lib
from instruct_jax.infra import sharding


def is_idle(config) -> bool:
  """Whether no task is asked, so that any number of processes may do it."""
  return not any(config.data.values())


def validate(config):
  if is_idle(config):
    if config.may_be_empty:
      return
    raise ValueError('data names no file; give one for at least one task')
  if not artifacts.named_folders(config.models):
    raise ValueError('models is empty; give NAME=FOLDER of at least one policy')
  for key in ('batch_size', 'length_multiple'):
    if config[key] < 1:
      raise ValueError(f'{key} must be positive: {config[key]}')
  if config.max_items < 0:
    raise ValueError(f'max_items must not be negative: {config.max_items}')
  if config.data.real_toxicity and not (
    config.toxicity_labels or config.toxicity_endpoint.url
  ):
    raise ValueError(
      'real_toxicity needs toxicity_labels or toxicity_endpoint.url for its '
      'scorer'
    )
  if config.data.truthful_qa and not (
    config.truth_labels and config.info_labels
  ):
    raise ValueError(
      'truthful_qa needs truth_labels and info_labels for its judge'
    )


def inputs(config):
  """What this stage reads, by config key; nothing where it asks no task."""
  names = [name for name in config.data if config.data[name]]
  if not names:
    return {}
  found = {'tokenizer': config.tokenizer}
  for name, folder in artifacts.named_folders(config.models).items():
    found[f'models.{name}'] = folder
  files = {f'data.{name}': config.data[name] for name in names}
  files |= {f'shots.{name}': config.shots[name] for name in names}
  if config.data.real_toxicity and not config.toxicity_endpoint.url:
    files['toxicity_labels'] = config.toxicity_labels
  if config.data.truthful_qa:
    files |= {key: config[key] for key in ('truth_labels', 'info_labels')}
  for key, text in files.items():
    # Several files of one key have commas between.
    several = text.split(',') if text else []
    for number, path in enumerate(several, 1):
      found[f'{key}/{number}' if len(several) > 1 else key] = path
  return found


def make_judges(config, workdir):
  """Scorers of toxicity and truth, where their tasks run."""
  toxicity = truth = None
  if config.data.real_toxicity and config.toxicity_endpoint.url:
    described = config.toxicity_endpoint
    toxicity = judges.perspective(
      endpoint.Endpoint(
        endpoint.Settings(
          url=described.url,
          key_variable=described.key_variable,
          key_header='X-Goog-Api-Key',
          key_prefix='',
          timeout=described.timeout,
          max_retries=described.max_retries,
          requests_per_minute=described.requests_per_minute,
          num_workers=described.num_workers,
        ),
        workdir / 'journal' / 'toxicity.jsonl',
      )
    )
  elif config.data.real_toxicity:
    toxicity = judges.train_toxicity(config.toxicity_labels.split(','))
  if config.data.truthful_qa:
    truth = judges.train_truth(config.truth_labels, config.info_labels)
  return toxicity, truth


def run(config, workdir: epath.Path):
  validate(config)
  if is_idle(config):
    return {'scores': {}}
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  names = [name for name in tasks.TASKS if config.data[name]]
  sums = {
    name: tasks.checksums(name, config.data[name], config.sha256[name])
    for name in names
  }
  content = {
    name: runner.read_items(
      name,
      config.data[name],
      config.shots[name],
      config.max_items,
      config.seed,
    )
    for name in names
  }
  toxicity, truth = make_judges(config, workdir)
  mesh = sharding.make_mesh(config.mesh)
  asking = tokenizer.with_format('', []) if config.plain_prompts else tokenizer
  stop_ids = runner.stop_ids(asking)
  rows = {name: [] for name in names}
  counts = {}
  with sharding.use_mesh(mesh), run_lib.StopSignal() as stop:
    for model_name, folder in artifacts.named_folders(config.models).items():
      model = artifacts.load(
        folder, 'policy', mesh, tokenizer, remat=config.remat
      )
      generate_fn, choice_fn = queries_lib.make_functions(
        model.module,
        model.params,
        asking,
        mesh,
        stop_ids,
        config.batch_size,
        config.length_multiple,
      )
      for name in names:
        shots, asked, _ = content[name]
        for prompt_type in tasks.TASKS[name].prompts:
          queries, count = runner.make_queries(
            name,
            asked,
            prompt_type,
            shots,
            asking,
            model.config.context_length,
          )
          label = f'{model_name} {name} {prompt_type}'
          file = f'{name}.{prompt_type}.jsonl'.replace(' ', '_')
          with run_lib.Progress(label, len(queries)) as progress:

            def advance(number, progress=progress, label=label):
              progress.update(number)
              if stop.requested:
                raise run_lib.Stopped(f'{label}: stopped')

            results = runner.run_queries(
              name,
              queries,
              workdir / 'journal' / model_name / file,
              tokenizer=asking,
              generate_fn=generate_fn,
              choice_fn=choice_fn,
              batch_size=config.batch_size,
              progress=advance,
            )
          rows[name] += runner.to_rows(
            name,
            model_name,
            prompt_type,
            queries,
            results,
            count,
            toxicity_fn=toxicity,
            truth_fn=truth,
          )
          counts[label] = dataclasses.asdict(count)
  return write_results(
    config, workdir, rows, counts, content, sums, asking.describe()
  )


def judge_names(config):
  """Task -> who judges its answers, of those that no rule can judge."""
  names = {}
  if config.data.real_toxicity:
    url = config.toxicity_endpoint.url
    names['real_toxicity'] = (
      f'the endpoint {url}'
      if url
      else f'{judges.TOXICITY_NAME}, not Perspective'
    )
  if config.data.truthful_qa:
    names['truthful_qa'] = f"{judges.TRUTH_NAME}, not the paper's judges"
  return names


def write_results(config, workdir, rows, counts, content, sums, read):
  """Sample files, scores, and an account of what was asked."""
  written = [name for name in rows if rows[name]]
  for name in written:
    released_csv.write(
      workdir / 'samples' / released_csv.file_name(name), name, rows[name]
    )
  if not written:
    raise ValueError(
      'no item of any task fits the context of these models: '
      f'{ {label: count["too_long"] for label, count in counts.items()} }'
    )
  result = released_samples.score_folder(workdir / 'samples', config.seed)
  result['counts'], result['sha256'] = counts, sums
  result['judges'] = judge_names(config)
  result['read'] = read
  lines = [
    '# Public NLP suite',
    '',
    f'The models read {read}.',
    '',
    'Of each model, task and prompt: items asked, repeated (asked once), too '
    'long for the model, with fewer examples than wanted, empty answers.',
    '',
    '| run | asked | repeated | too long | fewer examples | empty | examples |',
    '|---|---|---|---|---|---|---|',
  ]
  for label, count in counts.items():
    cells = [
      count[key]
      for key in (
        'asked',
        'repeated',
        'too_long',
        'fewer_shots',
        'empty',
        'examples',
      )
    ]
    lines.append(f'| {label} | {" | ".join(map(str, cells))} |')
  lines += ['', 'Items in the files given, and in the paper:', '']
  lines += [
    f'- {name}: {size} given, {tasks.TASKS[name].official_size} in the paper'
    for name, (_, _, size) in content.items()
  ]
  for name, judge in result['judges'].items():
    lines += ['', f'{name} is judged by {judge}.']
  text = (
    '\n'.join(lines) + '\n\n' + released_samples.to_markdown(result, 'Scores')
  )
  (workdir / 'suite.md').write_text(text)
  run_lib.write_json(workdir / 'suite.json', result)
  return {
    'scores': {
      f'{c["model"]} {c["task"]} {c["prompt"]} {c["metric"]}': c['score']
      for c in result['cells']
    }
  }
