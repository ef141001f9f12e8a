"""Runs AlpacaEval 2, MT-Bench or Arena-Hard (`evals.chat_benchmarks`).

Questions -> answers of each model -> a judge behind an OpenAI-compatible URL ->
figures. A stopped stage resumes: a model's answers are kept once all are
sampled, and the judge's replies one by one.
"""

import json

from etils import epath
from ml_collections import ConfigDict

from instruct_jax import asking, files, model_fns, model_folder, queries
from instruct_jax.data import loader, records
from instruct_jax.evals import chat_benchmarks, chat_judge, endpoint, report
from instruct_jax.infra import run as run_lib
from instruct_jax.infra import sharding
from instruct_jax.models.config import check_stage

PROCESSES = 'one'

_WITHOUT = 'without length control'
_RECORDED = ('.json', '.jsonl', '.json.gz', '.jsonl.gz')


def is_recorded(source: str) -> bool:
  """Whether `source` is a file of answers rather than a model."""
  return source.endswith(_RECORDED)


def baseline_of(config: ConfigDict) -> tuple[str, str]:
  """(name, file) of the baseline; ('', '') without one."""
  found = model_folder.named_folders(config.baseline, 'baseline')
  if len(found) > 1:
    raise ValueError(f'baseline must be one NAME=FILE: {config.baseline!r}')
  return next(iter(found.items()), ('', ''))


def validate(config: ConfigDict) -> None:
  """Checks the config. ValueError names the key."""
  check_stage(config)
  if config.benchmark not in chat_benchmarks.BENCHMARKS:
    raise ValueError(
      f'benchmark must be one of {", ".join(chat_benchmarks.BENCHMARKS)}: '
      f'{config.benchmark!r}'
    )
  models = model_folder.named_folders(config.models)
  if not models:
    raise ValueError('models is empty; give NAME=FOLDER of at least one policy')
  for key in ('questions', 'judge_layout'):
    if not config[key]:
      raise ValueError(f'{key} is empty; give the file of {config.benchmark}')
  name, _ = baseline_of(config)
  if not name and config.benchmark != 'mt_bench':
    raise ValueError(f'baseline is empty; {config.benchmark} compares with one')
  if name in models:
    raise ValueError(f'{name!r} is in both models and baseline')
  if config.categories and config.benchmark == 'alpaca_eval':
    raise ValueError("categories: AlpacaEval's questions have none")
  for key in ('num_questions', 'num_bootstrap'):
    if config[key] < (key == 'num_bootstrap'):
      raise ValueError(f'{key} is too low: {config[key]}')
  if not config.endpoint.model:
    raise ValueError('endpoint.model is empty; name the judge')
  endpoint.check(config.endpoint, 'endpoint')
  chat_judge.read_body(config.endpoint.body)
  ours = [
    source
    for source in models.values()
    if not is_recorded(source) and not model_folder.is_published(source)
  ]
  if ours and not config.tokenizer:
    raise ValueError(f'tokenizer is empty; give the folder for {ours[0]}')


def inputs(config: ConfigDict) -> dict[str, str]:
  """What this stage reads, by config key."""
  keys = ('tokenizer', 'questions', 'judge_layout', 'references', 'gamed')
  found = {key: config[key] for key in keys if config[key]}
  for name, source in model_folder.named_folders(config.models).items():
    found[f'models.{name}'] = source
  name, path = baseline_of(config)
  return found | ({f'baseline.{name}': path} if name else {})


# --- Answers ------------------------------------------------------------------


def sample_answers(config: ConfigDict, name: str, source: str, questions, mesh):
  """Question id -> answers by turn; empty where the prompt is too long.

  Later turns see the earlier turns with the model's answers.

  Raises:
    ValueError: no first turn fits.
  """
  tokenizer = queries.tokenizer_of(source, config.tokenizer, chat=True)
  policy = queries.load_policy(
    source, tokenizer, mesh, compute_dtype=config.compute_dtype
  )
  model_fns.check_context(
    policy,
    config.prompt_length + config.response_length,
    'prompt_length + response_length',
  )
  settings = ConfigDict(config.to_dict())
  answers = {question.id: () for question in questions}
  for turn in range(max(len(question.turns) for question in questions)):
    groups, num_asked, num_missing = {}, 0, 0
    for place, question in enumerate(questions):
      if turn < len(question.turns):
        heat = config.temperature
        if heat is None:
          heat = chat_benchmarks.temperature(
            config.benchmark, question.category
          )
        prompt = _prompt(str(place), question, answers[question.id])
        groups.setdefault(heat, []).append((question.id, prompt))
        num_asked += 1
    for heat, several in groups.items():
      settings.temperature = heat
      prompts = [prompt for _, prompt in several]
      ids, _ = loader.encode_prompts(prompts, tokenizer)
      fits = [x is not None and len(x) <= config.prompt_length for x in ids]
      found = {}
      if any(fits):
        label = f'{name}, turn {turn + 1}, temperature {heat}'
        sampled = asking.sample(
          settings, label, policy, prompts, tokenizer, mesh, 1
        )
        found = {answer.prompt_id: answer.response for answer in sampled}
      for key, prompt in several:
        num_missing += prompt.id not in found
        text = found.get(prompt.id, '').strip()
        answers[key] = (*answers[key], text)
    limit = f'prompt_length ({config.prompt_length} tokens)'
    if not turn and num_missing == num_asked:
      raise ValueError(
        f'{name}: none of {num_asked} questions fits {limit}; raise it'
      )
    run_lib.say_left_out(
      f'{config.name}, {name}', num_missing, num_asked,
      f'turns number {turn + 1}', limit,
    )  # fmt: skip
  return answers


def _prompt(place, question, answered) -> records.Prompt:
  """The prompt for the question's next turn, with the answered ones before."""
  turns = []
  for asked, answer in zip(question.turns, answered, strict=False):
    turns.append(records.Turn('user', asked))
    turns.append(records.Turn('assistant', answer))
  turns.append(records.Turn('user', question.turns[len(answered)]))
  text = f'{question.turns[0]}\n\n'
  if answered:
    text = records.text_of_turns(turns)
  return records.Prompt(place, text, '', question.category, {}, tuple(turns))


def _folder(config, workdir: epath.Path, model: str) -> epath.Path:
  """The path of the file of a model's answers."""
  if config.benchmark == 'alpaca_eval':
    return workdir / 'results' / model / 'model_outputs.json'
  return workdir / 'model_answer' / f'{model}.jsonl'


def _write(path: epath.Path, rows) -> None:
  """Writes a JSON list or JSONL, depending on the file name."""
  if path.name.endswith('.json'):
    text = json.dumps(rows, indent=2, ensure_ascii=False) + '\n'
    files.write_bytes(path, text.encode())
  else:
    files.write_bytes(path, chat_benchmarks.to_lines(rows))


def answers_of(config: ConfigDict, workdir: epath.Path, questions):
  """Reads or samples the answers, and writes them; returns model -> answers."""
  found, mesh = {}, None
  for name, source in model_folder.named_folders(config.models).items():
    path = _folder(config, workdir, name)
    if is_recorded(source) or path.exists():
      given = source if is_recorded(source) else path
      found[name] = chat_benchmarks.read_answers(
        config.benchmark, given, questions
      )
    else:
      mesh = mesh or sharding.make_mesh(config.mesh)
      with sharding.use_mesh(mesh):
        found[name] = sample_answers(config, name, source, questions, mesh)
    rows = chat_benchmarks.answer_rows(
      config.benchmark, name, questions, found[name]
    )
    _write(path, rows)
  return found


# --- The judge ----------------------------------------------------------------


def body_of(config: ConfigDict, request: chat_benchmarks.Request):
  """The JSON body of a request to the judge."""
  body = {
    'model': config.endpoint.model,
    'messages': request.messages,
    'temperature': 0,
    'max_tokens': config.endpoint.max_tokens,
  }
  if config.benchmark == 'alpaca_eval':
    body |= {'logprobs': True, 'top_logprobs': 5}
  body |= chat_judge.read_body(config.endpoint.body)
  return {key: value for key, value in body.items() if value is not None}


def make_requests(config, layout, model, questions, answers, baseline, given):
  """The judge's requests about one model."""
  if config.benchmark == 'alpaca_eval':
    return chat_benchmarks.alpaca_requests(
      layout, model, questions, answers, baseline, config.seed
    )
  if config.benchmark == 'mt_bench':
    return chat_benchmarks.mt_requests(
      layout, model, questions, answers, given, baseline
    )
  return chat_benchmarks.arena_requests(
    layout, model, questions, answers, baseline
  )


def judge(config, service, layout, requests, baseline: str, progress):
  """Sends the requests about one model; returns rows of upstream's file."""
  name = config.endpoint.model
  read = {
    'alpaca_eval': chat_benchmarks.read_alpaca,
    'mt_bench': (
      chat_benchmarks.read_winner if baseline else chat_benchmarks.read_grade
    ),
    'arena_hard': lambda reply: chat_benchmarks.read_label(reply, layout),
  }[config.benchmark]
  bodies = [body_of(config, request) for request in requests]
  values = service.ask(bodies, read, progress)
  texts = [
    chat_judge.shown_content(several[-1]) for several in service.replies(bodies)
  ]
  if config.benchmark == 'alpaca_eval':
    return chat_benchmarks.alpaca_rows(requests, values, texts, baseline, name)
  make = chat_benchmarks.arena_rows
  if config.benchmark == 'mt_bench':
    make = chat_benchmarks.mt_rows
  return make(requests, values, texts, name, baseline or None)


def measure(config, requests, rows, gamed):
  """The figures of one model."""
  if config.benchmark == 'alpaca_eval':
    return chat_benchmarks.measure_alpaca(
      requests, rows, gamed, config.num_bootstrap
    )
  if config.benchmark == 'mt_bench':
    return chat_benchmarks.measure_mt(requests, rows, config.num_bootstrap)
  return chat_benchmarks.measure_arena(requests, rows, config.num_bootstrap)


def run(config: ConfigDict, workdir: epath.Path) -> dict[str, int]:
  """Samples, judges and measures; writes the files that the config lists.

  Returns:
    The numbers of questions and of requests to the judge.

  Raises:
    ValueError: a file is bad, or does not match the questions.
    endpoint.EndpointError: the judge does not answer.
  """
  validate(config)
  name = config.benchmark
  questions = chosen_questions(config)
  layout = chat_benchmarks.read_layout(name, config.judge_layout)
  gamed = chat_benchmarks.read_gamed(config.gamed) if config.gamed else None
  if gamed is not None:
    chat_benchmarks.check_difficulties([q.id for q in questions], gamed)
  baseline, path = baseline_of(config)
  theirs = None
  if baseline:
    theirs = chat_benchmarks.read_answers(name, path, questions)
  given = {}
  if config.references:
    # Only some questions have a reference.
    given = chat_benchmarks.read_answers(
      name,
      config.references,
      [q for q in questions if chat_benchmarks.needs_reference(q)],
    )
  # Dry run, so that errors in the layout show before sampling begins.
  blank = {q.id: ('',) * len(q.turns) for q in questions}
  make_requests(config, layout, '', questions, blank, theirs, given)
  answers = answers_of(config, workdir, questions)
  asked = {
    model: make_requests(config, layout, model, questions, found, theirs, given)
    for model, found in answers.items()
  }
  service = endpoint.Endpoint(
    endpoint.Settings.of(config.endpoint), workdir / 'journal.jsonl'
  )
  judged, total = {}, sum(map(len, asked.values()))
  with run_lib.Progress('judge', total, unit='requests') as progress:
    for model, requests in asked.items():
      judged[model] = judge(
        config, service, layout, requests, baseline, progress.update
      )
  _write_judgements(config, workdir, judged)
  figures = {
    model: measure(config, asked[model], rows, gamed)
    for model, rows in judged.items()
  }
  empty = {
    model: sum(not text.strip() for turns in found.values() for text in turns)
    for model, found in answers.items()
  }
  _write_results(config, workdir, questions, figures, empty, service)
  return {'num_questions': len(questions), 'num_requests': total}


def chosen_questions(config) -> list[chat_benchmarks.Question]:
  """The first `num_questions` questions of `categories`; 0 or empty mean all.

  Raises:
    ValueError: a category has no question.
  """
  found = chat_benchmarks.read_questions(config.benchmark, config.questions)
  wanted = [x.strip() for x in config.categories.split(',') if x.strip()]
  known = dict.fromkeys(question.category for question in found)
  unknown = [each for each in wanted if each not in known]
  if unknown:
    raise ValueError(
      f'categories: {config.questions} has no {unknown[0]!r}; it has '
      f'{", ".join(known)}'
    )
  found = [q for q in found if not wanted or q.category in wanted]
  return found[: config.num_questions or None]


def _write_judgements(config, workdir, judged) -> None:
  """Writes the judgements where upstream's tools look for them."""
  judge_name = config.endpoint.model.replace('/', '_')
  if config.benchmark == 'mt_bench':
    form = 'pair' if config.baseline else 'single'
    rows = [row for rows in judged.values() for row in rows]
    path = workdir / 'model_judgment' / f'{judge_name}_{form}.jsonl'
    _write(path, rows)
    return
  for model, rows in judged.items():
    if config.benchmark == 'alpaca_eval':
      folder = workdir / 'results' / model / judge_name
      _write(folder / 'annotations.json', rows)
    else:
      folder = workdir / 'model_judgment' / judge_name
      _write(folder / f'{model}.jsonl', rows)


def _write_results(config, workdir, questions, figures, empty, service):
  """Writes chat_bench.json and chat_bench.md."""
  baseline, path = baseline_of(config)
  result = {
    'benchmark': config.benchmark,
    'questions': len(questions),
    'judge': f'{config.endpoint.model} at {config.endpoint.url}',
    'baseline': {'name': baseline, 'file': path} if baseline else None,
    'models': model_folder.named_folders(config.models),
    'figures': figures,
    'empty answers': empty,
    'requests': vars(service.counts),
  }
  text = json.dumps(report.plain_json(result), indent=2, allow_nan=False)
  files.write_bytes(workdir / 'chat_bench.json', (text + '\n').encode())
  notes = [
    f'- {report.escape(model)} is without a length-controlled win rate: '
    f'{report.escape(row.pop(_WITHOUT))}.'
    for model, row in figures.items()
    if _WITHOUT in row
  ]
  columns = list(dict.fromkeys(key for row in figures.values() for key in row))
  lines = [
    f'# {config.benchmark}',
    '',
    f'{len(questions):,} questions. The judge is a model, no person: '
    f'{report.escape(config.endpoint.model)}. '
    + (f'Baseline: {report.escape(baseline)}. ' if baseline else '')
    + 'Intervals are 95 %, redrawing questions. Unread: judgements of which no '
    'verdict could be read; they count nowhere.',
    '',
    *report.table(
      ['', *map(report.escape, columns)],
      [
        [
          report.escape(model),
          *(report.cell(row[key]) if key in row else '–' for key in columns),
        ]
        for model, row in figures.items()
      ],
    ),
  ]
  if config.benchmark == 'alpaca_eval' and not config.gamed:
    lines.append(
      'The length-controlled win rate needs `gamed`, the file df_gamed.csv.'
    )
  lines += notes
  lines += [
    f'- {report.escape(model)}: {number:,} empty answers.'
    for model, number in empty.items()
    if number
  ]
  text = '\n'.join(lines).rstrip() + '\n'
  files.write_bytes(workdir / 'chat_bench.md', text.encode())
  print((workdir / 'chat_bench.md').as_posix(), flush=True)
