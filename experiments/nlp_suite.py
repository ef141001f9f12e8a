"""Runs the public NLP suite (appendix D) on one or more policies.

Every finished batch is kept, so the same command goes on after a cut. Output:
`samples/TASK_samples.csv` in OpenAI's layout, `suite.md` and `suite.json` with
scores and intervals, and what was left out, shortened or empty.
"""

import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from instruct_jax import artifacts, rollout
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import released_samples
from instruct_jax.evals.benchmarks import judges, released_csv, runner, tasks
from instruct_jax.infra import run as run_lib
from instruct_jax.infra import sharding
from instruct_jax.models import heads
from instruct_jax.models.transformer import make_cache
from instruct_jax.types import PromptBatch


def validate(config):
  if not artifacts.named_folders(config.models):
    raise ValueError('models is empty; give NAME=FOLDER of at least one policy')
  if not any(config.data.values()):
    raise ValueError('data names no file; give one for at least one task')
  for key in ('batch_size', 'length_multiple'):
    if config[key] < 1:
      raise ValueError(f'{key} must be positive: {config[key]}')
  if config.max_items < 0:
    raise ValueError(f'max_items must not be negative: {config.max_items}')
  if config.data.real_toxicity and not config.toxicity_labels:
    raise ValueError('real_toxicity needs toxicity_labels for its scorer')
  if config.data.truthful_qa and not (
    config.truth_labels and config.info_labels
  ):
    raise ValueError(
      'truthful_qa needs truth_labels and info_labels for its judge'
    )


def score_choices(policy: heads.Policy, tokens, mask, choices, choice_mask):
  """Summed log-probability of each choice after its context, nats [B, C].

  The context is read once; its cache is repeated for the C choices.
  """
  B, C, R = choices.shape
  P = tokens.shape[1]
  cache = make_cache(policy.config, B, P + R)
  hidden, cache = policy.trunk(tokens, mask.astype(jnp.int32), cache=cache)
  cache = cache.replace(
    keys=jnp.repeat(cache.keys, C, axis=1),
    values=jnp.repeat(cache.values, C, axis=1),
    mask=jnp.repeat(cache.mask, C, axis=0),
  )
  flat, flat_mask = choices.reshape(B * C, R), choice_mask.reshape(B * C, R)
  after, _ = policy.trunk(flat, flat_mask.astype(jnp.int32), cache=cache)
  # The first token of a choice is predicted from the context's last.
  last = jnp.repeat(hidden[:, -1:], C, axis=0)
  logits = policy.trunk.unembed(jnp.concatenate([last, after[:, :-1]], axis=1))
  logprobs, _ = heads.token_logprobs(logits, flat)
  return jnp.sum(logprobs * flat_mask, axis=1).reshape(B, C)


def build_programs(module, stop_ids):
  """The jitted programs; they compile once per padded shape."""

  def choices(params, *arrays):
    return module.apply({'params': params}, *arrays, method=score_choices)

  @functools.cache
  def generate(num_response):
    return jax.jit(
      functools.partial(
        rollout.generate,
        extend_fn=artifacts.extend_fn(module),
        make_cache_fn=artifacts.make_cache_fn(module),
        num_response=num_response,
        stop_ids=stop_ids,
        temperature=0.0,
      )
    )

  return {'choices': jax.jit(choices), 'generate': generate}


def padded(rows, length, pad_id, left):
  """Tokens and mask [N, length] of ragged rows."""
  tokens = np.full((len(rows), length), pad_id, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for i, ids in enumerate(rows):
    where = slice(length - len(ids), None) if left else slice(0, len(ids))
    tokens[i, where], mask[i, where] = ids, True
  return tokens, mask


def make_functions(config, model, tokenizer, programs, put):
  """The runner's two functions for one policy."""
  context_length = model.config.context_length
  key = jax.random.key(config.seed)  # Greedy: drawn from and of no effect.

  def bucket(length):
    multiple = config.length_multiple
    return min(-(-length // multiple) * multiple, context_length)

  def filled(rows):
    """A whole batch: the last one repeats its first row."""
    return [*rows, *[rows[0]] * (config.batch_size - len(rows))]

  def generate_fn(prompts, max_tokens):
    rows = filled(prompts)
    tokens, mask = padded(
      rows, bucket(max(map(len, rows))), tokenizer.pad_id, left=True
    )
    batch = PromptBatch(tokens, mask, np.arange(len(rows), dtype=np.int32))
    sampled = programs['generate'](max_tokens)(model.params, put(batch), key)
    return rollout.response_ids(jax.device_get(sampled))[: len(prompts)]

  def choice_fn(contexts, choices):
    rows, sets = filled(contexts), filled(choices)
    tokens, mask = padded(
      rows, bucket(max(map(len, rows))), tokenizer.pad_id, left=True
    )
    num_choices = max(map(len, sets))
    longest = max(len(ids) for choice_set in sets for ids in choice_set)
    # Sets may differ in size: an absent choice has no token and sum 0.
    flat = [
      ids
      for choice_set in sets
      for ids in [*choice_set, *[[]] * (num_choices - len(choice_set))]
    ]
    width = -(-longest // 16) * 16
    choice_tokens, choice_mask = padded(flat, width, tokenizer.pad_id, False)
    shape = (len(rows), num_choices, width)
    sums = programs['choices'](
      model.params,
      *put(
        (tokens, mask, choice_tokens.reshape(shape), choice_mask.reshape(shape))
      ),
    )
    return [
      [float(x) for x in row[: len(choice_set)]]
      for row, choice_set in zip(jax.device_get(sums), choices, strict=False)
    ]

  return generate_fn, choice_fn


def read_items(config, name):
  """(examples, items to ask) of a task, and the size of its file."""
  items = tasks.load(name, config.data[name])
  if config.shots[name]:
    shots, _ = tasks.draw_shots(
      name, tasks.load(name, config.shots[name]), config.seed
    )
    asked = items
  else:
    shots, asked = tasks.draw_shots(name, items, config.seed)
  if config.max_items and len(asked) > config.max_items:
    chosen = random.Random(config.seed).sample(
      range(len(asked)), config.max_items
    )
    asked = [asked[i] for i in sorted(chosen)]
  return shots, asked, len(items)


def make_judges(config):
  """Local scorers of toxicity and truth, where their tasks run."""
  toxicity = truth = None
  if config.data.real_toxicity:
    toxicity = judges.train_toxicity(config.toxicity_labels.split(','))
  if config.data.truthful_qa:
    truth = judges.train_truth(config.truth_labels, config.info_labels)
  return toxicity, truth


def run(config, workdir: epath.Path):
  validate(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  names = [name for name in tasks.TASKS if config.data[name]]
  sums = {
    name: tasks.checksums(name, config.data[name], config.sha256[name])
    for name in names
  }
  content = {name: read_items(config, name) for name in names}
  toxicity, truth = make_judges(config)
  mesh = sharding.make_mesh(config.mesh)
  put = functools.partial(sharding.put_batch, mesh=mesh)
  stop_ids = runner.stop_ids(tokenizer)
  rows = {name: [] for name in names}
  counts = {}
  with sharding.use_mesh(mesh), run_lib.StopSignal() as stop:
    for model_name, folder in artifacts.named_folders(config.models).items():
      model = artifacts.load(
        folder, 'policy', mesh, tokenizer.fingerprint, remat=config.remat
      )
      programs = build_programs(model.module, stop_ids)
      generate_fn, choice_fn = make_functions(
        config, model, tokenizer, programs, put
      )
      for name in names:
        shots, asked, _ = content[name]
        for prompt_type in tasks.TASKS[name].prompts:
          queries, count = runner.make_queries(
            name,
            asked,
            prompt_type,
            shots,
            tokenizer,
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
              tokenizer=tokenizer,
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
  return write_results(config, workdir, rows, counts, content, sums)


def write_results(config, workdir, rows, counts, content, sums):
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
  lines = [
    '# Public NLP suite',
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
  if config.data.real_toxicity:
    lines += ['', f'Toxicity by {judges.TOXICITY_NAME}, not Perspective.']
  if config.data.truthful_qa:
    lines += ['', f"Truth by {judges.TRUTH_NAME}, not the paper's judges."]
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
