"""Chooses the SFT checkpoint by reward-model score of every epoch's samples.

Paper 3.5: validation loss overfits after one epoch, yet more epochs raise both
reward-model score and human preference, so the score selects.
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
  """Checks the config.

  Raises:
    ValueError: the key, what it is, and what it should be.
  """
  check_stage(config)
  if config.num_prompts < 1:
    raise ValueError(f'num_prompts must be positive: {config.num_prompts}')


def inputs(config):
  """What this stage reads, by config key; every epoch that SFT kept."""
  found = {key: config[key] for key in ('tokenizer', 'reward_model', 'prompts')}
  if not config.sft:
    return {**found, 'sft': ''}
  record = epath.Path(config.sft) / 'epochs.json'
  parts = ['epochs.json']
  if record.exists():
    parts += [f'epochs/{row["epoch"]}' for row in run_lib.read_json(record)]
  return {**found, **{f'sft/{part}': f'{config.sft}/{part}' for part in parts}}


def build_programs(config, policy_module, reward_module, tokenizer):
  """The jitted program of this stage: (policy, reward model, prompts, key) ->
  score of one sample for each prompt [B]."""
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
  """Scores samples of every epoch and keeps the best one's model.

  Reads epochs.json and the models of the SFT stage, the reward model and
  `prompts`. Writes `model/` and epochs.json with the scores.

  Returns:
    The selected epoch, by what it was selected, and on how many prompts.

  Raises:
    ValueError: the context of a model is too short, with the numbers.
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

  def folder(epoch):
    return epath.Path(config.sft) / 'epochs' / str(epoch)

  def load(epoch):
    return model_folder.load(
      folder(epoch),
      'policy',
      mesh,
      tokenizer,
      compute_dtype=config.compute_dtype,
    )

  with sharding.use_mesh(mesh):
    reward = model_folder.load(
      config.reward_model,
      'scalar',
      mesh,
      tokenizer,
      compute_dtype=config.compute_dtype,
    )
    first = load(1)
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
      for row in epochs:
        row['score_reward'] = mean_score(load(row['epoch']))
        progress.update(1, f'score {row["score_reward"]:.3f}')
    selected = max(epochs, key=lambda row: row['score_reward'])
    # Chosen, not changed: adapters stay adapters.
    best = model_folder.read(
      folder(selected['epoch']), 'policy', mesh, tokenizer
    )
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
