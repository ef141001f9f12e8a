"""Samples answers from one or more policies into one file for labelers.

Each line has a prompt, its K completions, whether each ended by itself, and
the models that wrote them. The labeling site imports each line as a ranking
task (paper 3.1, 3.4).
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
# Equals `labeling.importing.MAX_OUTPUTS`; importing that needs a database.
_MOST_COMPLETIONS = 12


def validate(config):
  """Checks the config. ValueError names the key."""
  check_stage(config)
  num_models = len(model_folder.named_folders(config.models))
  num_completions = num_models * config.samples_per_model
  asked = f'{num_models} models x {config.samples_per_model} samples_per_model'
  if num_completions < 2:
    raise ValueError(
      f'{asked} leave nothing to rank; at least 2 completions are needed'
    )
  if num_completions > _MOST_COMPLETIONS:
    raise ValueError(
      f'{asked} are {num_completions} completions; a ranking task has at most '
      f'{_MOST_COMPLETIONS}'
    )
  for key in ('tokenizer', 'prompts'):
    if not config[key]:
      raise ValueError(f'{key} is empty; give its path')


def inputs(config):
  """What this stage reads, by config key."""
  found = {'tokenizer': config.tokenizer, 'prompts': config.prompts}
  models = model_folder.named_folders(config.models)
  return found | {f'models.{name}': folder for name, folder in models.items()}


def run(config, workdir: epath.Path):
  """Samples every model on every prompt that fits; writes samples.jsonl.

  Returns:
    The numbers of sampled and of dropped prompts.

  Raises:
    ValueError: the context of a model is too short; gives the numbers.
  """
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
  num_samples = config.samples_per_model
  owners = np.repeat(rows.indices, num_samples)
  mesh = sharding.make_mesh(config.mesh)
  answers = {i: [] for i in sorted(rows.indices.tolist())}
  with sharding.use_mesh(mesh):
    for number, (name, folder) in enumerate(models.items()):
      dtype = config.compute_dtype
      policy = model_folder.load(
        folder, 'policy', mesh, tokenizer, compute_dtype=dtype
      )
      sampled = queries.sample(
        policy,
        rows,
        jax.random.fold_in(jax.random.key(config.seed), number),
        mesh,
        name=name,
        stop_ids=tokenizer.stop_ids,
        response_length=config.response_length,
        temperature=config.temperature,
        batch_size=config.batch_size,
        num_samples=num_samples,
      )
      texts = tokenizer.decode_responses(rollout.response_ids(sampled))
      ended = sampled.ended.tolist()
      for owner, *answer in zip(owners.tolist(), texts, ended, strict=True):
        answers[owner].append((*answer, name))
  lines = []
  for i, own in answers.items():
    completions, ended, names = zip(*own, strict=True)
    line = records.to_values(prompts[i])
    line |= {'completions': completions, 'ended': ended, 'models': names}
    lines.append(json.dumps(line, ensure_ascii=False) + '\n')
  path = workdir / 'samples.jsonl'
  records.write_bytes(path, ''.join(lines).encode())
  run_lib.say(f'{config.name}: {len(lines)} prompts in {path}')
  return {'prompts': len(lines), 'dropped': dropped.total}
