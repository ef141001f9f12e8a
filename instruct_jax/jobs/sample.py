"""Samples prompts from one or more policies into one file for labelers.

A line holds a prompt, its K completions and the models that wrote them: what
the labeling site imports as ranking tasks (paper 3.1, 3.4).
"""

import json

import jax
import numpy as np
from etils import epath

from instruct_jax import model_folder, queries, rollout
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import origin, sharding
from instruct_jax.infra import run as run_lib
from instruct_jax.models.config import check_stage

PROCESSES = 'one'


def validate(config):
  check_stage(config)
  num_models = len(model_folder.named_folders(config.models))
  if num_models * config.samples_per_model < 2:
    raise ValueError(
      f'{num_models} models x {config.samples_per_model} samples_per_model '
      'leave nothing to rank; 2 completions at least'
    )
  for key in ('tokenizer', 'prompts'):
    if not config[key]:
      raise ValueError(f'{key} is empty; give its path')


def inputs(config):
  """What this stage reads, by config key."""
  found = {'tokenizer': config.tokenizer, 'prompts': config.prompts}
  for name, folder in model_folder.named_folders(config.models).items():
    found[f'models.{name}'] = folder
  return found


def run(config, workdir: epath.Path):
  validate(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  models = model_folder.named_folders(config.models)
  config = origin.filled(config, origin.LENGTHS, models, config.prompts)
  model_folder.check_contexts(
    models,
    config.prompt_length + config.response_length,
    'prompt_length + response_length',
  )
  prompts = records.read_jsonl(config.prompts, records.Prompt)
  rows, dropped = loader.prompt_rows(prompts, tokenizer, config.prompt_length)
  run_lib.tell_dropped(
    config.name, dropped.describe('prompts', 'prompt_length')
  )
  num_rows = len(rows.indices) * config.samples_per_model
  mesh = sharding.make_mesh(config.mesh)
  completions = [[] for _ in prompts]
  models = [[] for _ in prompts]
  with sharding.use_mesh(mesh):
    for number, (name, folder) in enumerate(
      model_folder.named_folders(config.models).items()
    ):
      policy = model_folder.load(
        folder,
        'policy',
        mesh,
        tokenizer,
        compute_dtype=config.compute_dtype,
      )
      generate = queries.generate_program(
        policy.module,
        config.response_length,
        tokenizer.stop_ids,
        config.temperature,
        num_slots=config.batch_size,
        num_samples=config.samples_per_model,
      )
      key = jax.random.fold_in(jax.random.key(config.seed), number)
      with run_lib.Progress(f'sample {name}', num_rows) as progress:
        sampled = rollout.in_queues(
          lambda batch, p=policy, g=generate, k=key: g(
            p.params, sharding.put_batch(batch, mesh), k
          ),
          rows,
          config.batch_size,
          config.samples_per_model,
          progress.update,
        )
      texts = tokenizer.decode_responses(rollout.response_ids(sampled))
      owners = np.repeat(rows.indices, config.samples_per_model)
      for prompt, text in zip(owners, texts, strict=True):
        completions[prompt].append(text)
        models[prompt].append(name)
  lines = [
    json.dumps(
      {
        **records.to_values(prompt),
        'completions': completions[i],
        'models': models[i],
      },
      ensure_ascii=False,
    )
    for i, prompt in enumerate(prompts)
    if completions[i]
  ]
  path = workdir / 'samples.jsonl'
  records.write_bytes(path, '\n'.join([*lines, '']).encode())
  print(f'{config.name}: {len(lines)} prompts in {path}', flush=True)
  return {'prompts': len(lines), 'dropped': dropped.total}
