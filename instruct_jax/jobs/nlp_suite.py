"""Runs the public NLP suite (appendix D) on one or more policies.

Every finished batch is kept, so the same command goes on after a cut. Output:
`samples/TASK_samples.csv` in OpenAI's layout; `suite.md`, `suite.html` and
`suite.json` with scores and intervals, and what was left out, shortened or
empty.
"""

import dataclasses
import sys

from etils import epath

from instruct_jax import files, model_folder
from instruct_jax import queries as queries_lib
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import (
  endpoint,
  html_report,
  released_samples,
  report,
  sections,
)
from instruct_jax.evals.benchmarks import (
  released_csv,
  runner,
  tasks,
  text_judges,
)
from instruct_jax.infra import run as run_lib
from instruct_jax.infra import sharding
from instruct_jax.models.config import check_stage

PROCESSES = 'one'


def is_idle(config) -> bool:
  """Whether no task is asked, so that any number of processes may do it."""
  return not any(config.data.values())


def validate(config):
  """Checks the config: models, sizes, and what judges need.

  Raises:
    ValueError: the key, what it is, and what it should be.
  """
  check_stage(config)
  if is_idle(config):
    if config.may_be_empty:
      return
    raise ValueError('data names no file; give one for at least one task')
  if not model_folder.named_folders(config.models):
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
  if config.data.real_toxicity and config.toxicity_endpoint.url:
    endpoint.check(config.toxicity_endpoint, 'toxicity_endpoint')
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
  for name, folder in model_folder.named_folders(config.models).items():
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
    toxicity = text_judges.perspective(
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
    toxicity = text_judges.train_toxicity(config.toxicity_labels.split(','))
  if config.data.truthful_qa:
    truth = text_judges.train_truth(
      config.truth_labels, config.info_labels, config.data.truthful_qa
    )
  return toxicity, truth


def run(config, workdir: epath.Path):
  """Asks every model every task; writes the report and suite.json.

  Reads the models and the files of `data`. Writes a journal of the answers as
  they come, which a run that was cut continues.

  Returns:
    Score by model, task, prompt and metric.

  Raises:
    ValueError: a file or a model that cannot be used, by name.
    run.Stopped: SIGTERM came; what was answered is in the journal.
  """
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
  models = model_folder.named_folders(config.models)
  num_items = sum(
    len(content[name][1]) * len(tasks.TASKS[name].prompts) for name in names
  )
  num_tasks = sum(len(tasks.TASKS[name].prompts) for name in names)
  with (
    sharding.use_mesh(mesh),
    run_lib.StopSignal() as stop,
    run_lib.Progress(
      config.name, len(models) * num_items, unit='items'
    ) as progress,
  ):
    for model_name, folder in models.items():
      model = model_folder.load(
        folder,
        'policy',
        mesh,
        tokenizer,
        remat=config.remat,
        compute_dtype=config.compute_dtype,
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
          counts[label] = {
            'model': model_name,
            'task': name,
            'prompt': prompt_type,
            'context_length': model.config.context_length,
          }
          where = f'task {len(counts)} of {len(models) * num_tasks}: {label}'
          progress.skip(len(asked) - len(queries))
          if not queries:
            reason = none_fits(dataclasses.asdict(count) | counts[label])
            print(f'{label}: {reason}', file=sys.stderr, flush=True)
          results = runner.run_queries(
            name,
            queries,
            workdir
            / 'journal'
            / model_name
            / f'{name}.{prompt_type}.jsonl'.replace(' ', '_'),
            tokenizer=asking,
            generate_fn=generate_fn,
            choice_fn=choice_fn,
            batch_size=config.batch_size,
            progress=Advance(progress, stop, where),
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
          counts[label] |= dataclasses.asdict(count)
  judged_by = judge_names(config, toxicity, truth)
  return write_results(
    config, workdir, rows, counts, content, sums, judged_by, asking.describe()
  )


class Advance:
  """Counts the items of one task towards the whole suite."""

  def __init__(self, progress, stop, where):
    self._progress, self._stop, self._where = progress, stop, where
    self._is_first = True

  def __call__(self, number):
    if self._is_first:  # What a run that was cut has asked.
      self._progress.skip(number)
    else:
      self._progress.update(number, self._where)
    self._is_first = False
    if self._stop.requested:
      raise run_lib.Stopped(f'{self._where}: stopped')


def none_fits(count):
  """Why a task has no score."""
  return (
    f'none of {count["too_long"]:,} items fits a context of '
    f'{count["context_length"]} tokens'
  )


def judge_names(config, toxicity, truth):
  """Task -> who judges its answers, and how well, where no rule can judge."""
  names = {}
  if config.data.real_toxicity:
    url = config.toxicity_endpoint.url
    names['real_toxicity'] = (
      f'the endpoint {url}' if url else toxicity.described()
    )
  if config.data.truthful_qa:
    names['truthful_qa'] = truth.described()
  return names


def write_results(
  config, workdir, rows, counts, content, sums, judged_by, read
):
  """Sample files, scores, and an account of what was asked."""
  written = [name for name in rows if rows[name]]
  for name in written:
    released_csv.write(
      workdir / 'samples' / released_csv.file_name(name), name, rows[name]
    )
  without = {}
  for count in counts.values():
    if not count['asked']:
      reason = f'{count["task"]}, {count["prompt"]}: {none_fits(count)}'
      without.setdefault(reason, []).append(count['model'])
  without = [f'{why} ({", ".join(names)})' for why, names in without.items()]
  if not written:
    raise ValueError(f'no item of any task fits; {"; ".join(without)}')
  result = released_samples.score_folder(workdir / 'samples', config.seed)
  result['counts'], result['sha256'] = counts, sums
  result['judges'] = judged_by
  result['read'] = read
  title = 'Public NLP suite'
  found = to_sections(result, without, content)
  lines = [f'# {title}', '', *report.section_lines(found)]
  files.write_bytes(workdir / 'suite.md', ('\n'.join(lines) + '\n').encode())
  files.write_bytes(
    workdir / 'suite.html', html_report.make_page(title, [], found).encode()
  )
  run_lib.write_json(workdir / 'suite.json', result)
  return {
    'scores': {
      f'{c["model"]} {c["task"]} {c["prompt"]} {c["metric"]}': c['score']
      for c in result['cells']
    }
  }


def to_sections(result, without, content):
  """Scores of all models, and what was asked of each."""
  scores, *others = released_samples.to_sections(result)
  judged = [
    f'{name} is judged by {judge}.' for name, judge in result['judges'].items()
  ]
  parts = [*scores.parts, *judged]
  parts.append(f'The models read {result["read"]}.')
  if without:
    parts += ['Without a score:', sections.Bullets(without)]
  columns = {
    'asked': 'asked',
    'repeated': 'repeated',
    'too_long': 'too long',
    'fewer_shots': 'fewer examples',
    'empty': 'empty',
    'examples': 'examples',
  }
  return [
    dataclasses.replace(scores, parts=parts),
    *others,
    sections.Section(
      'What was asked',
      [
        'Of each model, task and prompt: items asked, repeated (asked once), '
        'too long for the model, with fewer examples than wanted, empty '
        'answers.',
        sections.Table(
          ['run', *columns.values()],
          [
            [label, *(count[key] for key in columns)]
            for label, count in result['counts'].items()
          ],
        ),
        'Items in the files given, and in the paper:',
        sections.Bullets(
          [
            f'{name}: {size} given, {tasks.TASKS[name].official_size} in the '
            'paper'
            for name, (_, _, size) in content.items()
          ]
        ),
      ],
    ),
  ]
