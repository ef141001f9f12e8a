"""Chooses the SFT epoch whose samples have the best reward-model score.

Paper 3.5: validation loss overfits after one epoch, yet more epochs raise both
reward-model score and human preference, so the score decides.
"""

import functools

import jax
import numpy as np
from etils import epath

from instruct_jax import model_fns, model_folder, rollout
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals.samples import draw_prompts
from instruct_jax.infra import run as run_lib
from instruct_jax.infra import sharding, slices
from instruct_jax.models.config import check_stage

PROCESSES = 'all'


def validate(config):
  """Checks the config. ValueError names the key."""
  check_stage(config)
  if config.num_prompts < 1:
    raise ValueError(f'num_prompts must be positive: {config.num_prompts}')


def inputs(config):
  """What this stage reads, by config key, including each epoch SFT kept."""
  found = {key: config[key] for key in ('tokenizer', 'reward_model', 'prompts')}
  if not config.sft:
    return {**found, 'sft': ''}
  record = epath.Path(config.sft) / 'epochs.json'
  parts = ['epochs.json']
  if record.exists():
    parts += [f'epochs/{row["epoch"]}' for row in run_lib.read_json(record)]
  return {**found, **{f'sft/{part}': f'{config.sft}/{part}' for part in parts}}


def build_programs(config, policy_module, reward_module, tokenizer):
  """The jitted program (policy, reward model, prompts, key) -> scores [B].

  It samples one answer per prompt.
  """
  generate = functools.partial(
    rollout.generate,
    decoder=model_fns.decoder(policy_module),
    num_response=config.response_length,
    stop_ids=tokenizer.stop_ids,
    temperature=config.temperature,
  )
  scores_fn = model_fns.scores_fn(reward_module)

  def sample_and_score(policy_params, reward_params, prompts, key):
    sampled = generate(policy_params, prompts, key)
    return scores_fn(reward_params, sampled.tokens, sampled.mask)

  return {'sample_and_score': jax.jit(sample_and_score)}


def run(config, workdir: epath.Path):
  """Scores the samples of every epoch and keeps the best epoch's model.

  Reads epochs.json and the models of the SFT stage, the reward model and
  `prompts`. Writes `model/`, and epochs.json with the scores.

  Returns:
    The selected epoch, the criterion, and the number of prompts.

  Raises:
    ValueError: the context of a model is too short; gives the numbers.
  """
  validate(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  prompts = records.read_jsonl(config.prompts, records.Prompt)
  chosen = draw_prompts(prompts, config.num_prompts, config.seed)
  run_lib.say_drawn(config.name, len(chosen), len(prompts), 'prompts')
  rows, dropped = loader.prompt_rows(chosen, tokenizer, config.prompt_length)
  run_lib.tell_dropped(
    config.name, dropped.describe('prompts', 'prompt_length')
  )
  epochs = run_lib.read_json(epath.Path(config.sft) / 'epochs.json')
  mesh = sharding.make_mesh(config.mesh)
  key = jax.random.key(config.seed)

  load = functools.partial(
    model_folder.load,
    mesh=mesh,
    tokenizer=tokenizer,
    compute_dtype=config.compute_dtype,
  )
  folders = [f'{config.sft}/epochs/{row["epoch"]}' for row in epochs]
  with sharding.use_mesh(mesh):
    reward = load(config.reward_model, 'scalar')
    first = load(f'{config.sft}/epochs/1', 'policy')
    for model in (reward, first):
      model_fns.check_context(
        model,
        config.prompt_length + config.response_length,
        'prompt_length + response_length',
      )
    programs = build_programs(config, first.module, reward.module, tokenizer)

    sample_and_score = sharding.fetched(programs['sample_and_score'])

    def mean_score(policy):
      scores = slices.in_batches(
        lambda batch: sample_and_score(
          policy.params, reward.params, sharding.put_whole(batch, mesh), key
        ),
        rows,
        config.batch_size,
      )
      return float(np.mean(scores, dtype=np.float64))

    with run_lib.Progress(config.name, len(epochs)) as progress:
      for row, folder in zip(epochs, folders, strict=True):
        row['score_reward'] = mean_score(load(folder, 'policy'))
        progress.update(1, f'score {row["score_reward"]:.3f}')
    selected, folder = max(
      zip(epochs, folders, strict=True), key=lambda x: x[0]['score_reward']
    )
    # Read unmerged, so that adapters stay adapters.
    best = model_folder.read(folder, 'policy', mesh, tokenizer)
    model_folder.save(
      workdir / 'model',
      best,
      tokenizer,
      {**best.metadata, 'selected_by': 'reward-model score'},
    )
  run_lib.write_json(workdir / 'epochs.json', epochs)
  return {
    'selected_epoch': selected['epoch'],
    'selected_by': 'reward-model score',
    'num_prompts': loader.num_rows(rows),
    'num_prompts_given': len(prompts),
  }
