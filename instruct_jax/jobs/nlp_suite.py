"""Runs the public NLP suite (appendix D) on one or more policies.

Every finished batch is kept, so the same command resumes an interrupted run.
Output: `samples/TASK_samples.csv` in OpenAI's layout; `suite.md`, `suite.html`
and `suite.json` with scores, intervals, and counts of items that were left out,
had fewer examples, or got an empty answer.
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
  """Whether no task has a file, which lets any number of processes run it."""
  return not any(config.data.values())


def chosen_types(config) -> list[str]:
  """The `prompt_types` of the config; empty means all.

  Raises:
    ValueError: one of them exists in no task.
  """
  chosen = [x.strip() for x in config.prompt_types.split(',') if x.strip()]
  known = dict.fromkeys(
    x for task in tasks.TASKS.values() for x in task.prompts
  )
  unknown = [each for each in chosen if each not in known]
  if unknown:
    raise ValueError(
      f'prompt_types: no task has {unknown[0]!r}; known: {", ".join(known)}'
    )
  return chosen


def prompts_of(config, name: str) -> list[str]:
  """The prompt types under which a task is asked, in the task's order.

  Raises:
    ValueError: `prompt_types` has none of this task's, or an unknown one.
  """
  chosen = chosen_types(config)
  there = tasks.TASKS[name].prompts
  found = [each for each in there if not chosen or each in chosen]
  if not found:
    raise ValueError(
      f'prompt_types has none of {name}: give one of {", ".join(there)}, or '
      f'leave out data.{name}'
    )
  return found


def validate(config):
  """Checks the config: models, sizes, and what judges need.

  Raises:
    ValueError: a wrong value; names the key and what it should be.
  """
  check_stage(config)
  chosen_types(config)
  if is_idle(config):
    if config.may_be_empty:
      return
    raise ValueError('data names no file; give one for at least one task')
  if not model_folder.named_folders(config.models):
    raise ValueError('models is empty; give NAME=FOLDER of at least one policy')
  for key in ('batch_size', 'length_multiple'):
    if config[key] < 1:
      raise ValueError(f'{key} must be positive: {config[key]}')
  for name in tasks.TASKS:
    if config.data[name]:
      prompts_of(config, name)
  if config.max_items < 0:
    raise ValueError(f'max_items must not be negative: {config.max_items}')
  if config.data.real_toxicity:
    if config.toxicity_endpoint.url:
      endpoint.check(config.toxicity_endpoint, 'toxicity_endpoint')
    elif not config.toxicity_labels:
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
  """Config key -> path of what this stage reads; {} if no task runs."""
  names = [name for name in config.data if config.data[name]]
  if not names:
    return {}
  found = {'tokenizer': config.tokenizer}
  for name, folder in model_folder.named_folders(config.models).items():
    found[f'models.{name}'] = folder
  lists = {f'data.{name}': config.data[name] for name in names}
  lists |= {f'shots.{name}': config.shots[name] for name in names}
  if config.data.real_toxicity and not config.toxicity_endpoint.url:
    lists['toxicity_labels'] = config.toxicity_labels
  if config.data.truthful_qa:
    lists |= {key: config[key] for key in ('truth_labels', 'info_labels')}
  for key, text in lists.items():
    # A key may hold several files, separated by commas.
    several = text.split(',') if text else []
    for number, path in enumerate(several, 1):
      found[f'{key}/{number}' if len(several) > 1 else key] = path
  return found


def make_judges(config, workdir):
  """(toxicity scorer, truth scorer, task -> description of its scorer).

  A scorer is None if its task does not run.
  """
  toxicity, truth, names = None, None, {}
  if config.data.real_toxicity and config.toxicity_endpoint.url:
    settings = endpoint.Settings.of(
      config.toxicity_endpoint, key_header='X-Goog-Api-Key', key_prefix=''
    )
    journal = workdir / 'journal' / 'toxicity.jsonl'
    toxicity = text_judges.perspective(endpoint.Endpoint(settings, journal))
    names['real_toxicity'] = f'the endpoint {settings.url}'
  elif config.data.real_toxicity:
    toxicity = text_judges.train_toxicity(config.toxicity_labels.split(','))
    names['real_toxicity'] = toxicity.described()
  if config.data.truthful_qa:
    truth = text_judges.train_truth(
      config.truth_labels, config.info_labels, config.data.truthful_qa
    )
    names['truthful_qa'] = truth.described()
  return toxicity, truth, names


def run(config, workdir: epath.Path):
  """Runs every task on every model; writes the report and suite.json.

  Reads the models and the files of `data`. Appends answers to a journal as they
  come, from which an interrupted run resumes.

  Returns:
    Score by model, task, prompt and metric.

  Raises:
    ValueError: a file or a model cannot be used; names it.
    run.Stopped: on SIGTERM; the journal holds the answers so far.
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
  data, shots = config.data, config.shots
  content = {
    name: runner.read_items(
      name, data[name], shots[name], config.max_items, config.seed
    )
    for name in names
  }
  toxicity, truth, judged_by = make_judges(config, workdir)
  mesh = sharding.make_mesh(config.mesh)
  asking = tokenizer.with_format('', []) if config.plain_prompts else tokenizer
  stop_ids = runner.stop_ids(asking)
  rows, counts = {name: [] for name in names}, {}
  models = model_folder.named_folders(config.models)
  todo = [(name, each) for name in names for each in prompts_of(config, name)]
  total = len(models) * sum(len(content[name][1]) for name, _ in todo)
  with (
    sharding.use_mesh(mesh),
    run_lib.StopSignal() as stop,
    run_lib.Progress(config.name, total, unit='items') as progress,
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
      for name, prompt_type in todo:
        examples, asked, _ = content[name]
        about = {
          'model': model_name,
          'task': name,
          'prompt': prompt_type,
          'context_length': model.config.context_length,
        }
        queries, count = runner.make_queries(
          name, asked, prompt_type, examples, asking, about['context_length']
        )
        label = f'{model_name} {name} {prompt_type}'
        number = f'{len(counts) + 1} of {len(models) * len(todo)}'
        progress.skip(len(asked) - len(queries))
        if not queries:
          reason = _none_fits(dataclasses.asdict(count) | about)
          print(f'{label}: {reason}', file=sys.stderr, flush=True)
        journal = f'{name}.{prompt_type}.jsonl'.replace(' ', '_')
        results = runner.run_queries(
          name,
          queries,
          workdir / 'journal' / model_name / journal,
          tokenizer=asking,
          generate_fn=generate_fn,
          choice_fn=choice_fn,
          batch_size=config.batch_size,
          progress=_advance(progress, stop, f'task {number}: {label}'),
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
        counts[label] = about | dataclasses.asdict(count)
  about = {
    'counts': counts,
    'sha256': sums,
    'judges': judged_by,
    'read': asking.describe(),
  }
  return _write_results(config, workdir, rows, about, content)


def _advance(progress, stop, where):
  """The progress callback of one task, which adds to that of the suite."""
  is_first = True

  def advance(number):
    nonlocal is_first
    if is_first:  # These items are from the journal.
      progress.skip(number)
    else:
      progress.update(number, where)
    is_first = False
    if stop.requested:
      raise run_lib.Stopped(f'{where}: stopped')

  return advance


def _none_fits(count):
  return (
    f'none of {count["too_long"]:,} items fits a context of '
    f'{count["context_length"]} tokens'
  )


def _write_results(config, workdir, rows, about, content):
  """Writes sample files, scores, and a summary of what was asked."""
  written = [name for name in rows if rows[name]]
  for name in written:
    released_csv.write(
      workdir / 'samples' / released_csv.file_name(name), name, rows[name]
    )
  without = {}
  for count in about['counts'].values():
    if not count['asked']:
      reason = f'{count["task"]}, {count["prompt"]}: {_none_fits(count)}'
      without.setdefault(reason, []).append(count['model'])
  without = [f'{why} ({", ".join(names)})' for why, names in without.items()]
  if not written:
    raise ValueError(f'no item of any task fits; {"; ".join(without)}')
  result = released_samples.score_folder(workdir / 'samples', config.seed)
  result |= about
  title = 'Public NLP suite'
  found = _to_sections(result, without, content)
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


def _to_sections(result, without, content):
  """Report sections: scores of all models, and what was asked of each."""
  scores, *others = released_samples.to_sections(result)
  parts = [
    *scores.parts,
    *(f'{name} is judged by {who}.' for name, who in result['judges'].items()),
    f'The models read {result["read"]}.',
  ]
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
  table = sections.Table(
    ['run', *columns.values()],
    [
      [label, *(count[key] for key in columns)]
      for label, count in result['counts'].items()
    ],
  )
  sizes = [
    f'{name}: {size} given, {tasks.TASKS[name].official_size} in the paper'
    for name, (_, _, size) in content.items()
  ]
  asked = [
    'Of each model, task and prompt: items asked, repeated (asked once), too '
    'long for the model, with fewer examples than wanted, empty answers.',
    table,
    'Items in the files given, and in the paper:',
    sections.Bullets(sizes),
  ]
  return [
    dataclasses.replace(scores, parts=parts),
    *others,
    sections.Section('What was asked', asked),
  ]
