"""The paper's claims on the miniature, each a rule over seeds.

  python -m instruct_jax.main --config=configs/study.py:R10+R12 \\
    --config.seeds=11,12,13,14,15

After the colon are claims of `instruct_jax/evals/claims.py`, joined by +, or
`all`. `:quick` is all of them on one seed with the smallest stages that run,
for CI; its figures mean nothing. Output: study.md with a row for each claim,
study.json, a figure for each claim, and a work directory for each seed. A
seed's run uses this file with `CLAIMS,seed`: the miniature's recipe, and what
the claims vary (`sweeps.py`, `chains.py`).
"""

import hashlib

from ml_collections import ConfigDict

from configs import best_of_n, common, miniature, sweeps
from instruct_jax.evals import claims


def judge(study: sweeps.Study) -> str:
  """Adds the last stage, which judges all policies and their starts.

  Returns:
    Its name, with a hash of its models: other claims judge other models.
  """
  folders = {'rl_init': 'rl_init/model'}
  weights = {'ppo_ptx': 'ema', 'rloo': 'ema', 'dpo': 'model'}
  for name in study.order:
    if (experiment := study.stages[name].experiment) in weights:
      folders[name] = f'{name}/{weights[experiment]}'
  # Averaged weights hide late divergence.
  for sweep in ('rate', 'rate_ptx'):
    for name in study.config.sweeps.get(sweep, ()):
      folders[f'{name}_policy'] = f'{name}/policy'
      if name in study.order:
        del folders[name]
  if 'pretrain_large' in study.order:
    folders['large'] = 'pretrain_large/model'
  text = ''
  for name, folder in folders.items():
    text = text + f'{"," * (name != "rl_init")}{name}=' + study.workdir
    text = text + f'/{folder}'
  digest = hashlib.sha256(','.join(folders).encode()).hexdigest()
  changes = {
    'cache': study.workdir + '/answers',
    'other_models': text,
    'num_prompts': 1_000,
    'rate_answers': False,
  }
  changes |= dict.fromkeys(
    ('crossval', 'suite', 'test_comparisons', 'comparisons'), ''
  )
  return study.derive('evaluate', f'judged_{digest[:8]}', **changes)


def of_seed(names, is_smoke: bool) -> ConfigDict:
  """The run of one seed."""
  maker = miniature.smoke if is_smoke else miniature.miniature
  config = maker('study_seed')
  stages, workdir = config.stages, config.get_ref('workdir')
  stages.best_of_n = best_of_n.stage(config.get_ref('seed'), workdir)
  stages.best_of_n.update(
    policy=workdir + '/rl_init/model',
    tokenizer=workdir + '/data/tokenizer',
    prompts=workdir + '/data/prompts_test.jsonl',
  )
  # Ten policies along RL, each judged on many prompts.
  stages.best_of_n.update(num_prompts=1_000, num_samples=8)
  ppo = stages.ppo
  ppo.snapshot_every = max(1, ppo.num_episodes // ppo.batch_size // 10)
  if is_smoke:
    # So that the smallest share of the rankings has a batch of prompts.
    stages.data.num_reward_prompts = 256
    stages.best_of_n.update(num_prompts=16, num_samples=8, num_bootstrap=50)
  study = sweeps.Study(config)
  for name in claims.needs(names):
    study.need(name)
  last = judge(study)
  if is_smoke:
    stages[last].num_prompts = 48
  config.stage_order = (
    *('data', 'pretrain', 'sft', 'rl_init', 'compare', 'reward', 'select'),
    *('ppo', 'ppo_ptx', *study.order),
  )
  config.lock()
  return config


def get_config(argument: str = 'quick'):
  """The study of 'CLAIMS', or one seed of it, 'CLAIMS,seed[,smoke]'."""
  text, *parts = argument.split(',')
  is_smoke = text == 'quick' or 'smoke' in parts
  text = 'all' if text == 'quick' else text
  names = claims.chosen(text)
  if parts:
    for part in parts:
      common.check(part, ('seed', 'smoke'), 'part')
    return of_seed(names, is_smoke)
  config = common.stage('study', 'study', 0, '')
  config.claims = text
  config.seeds = '0'  # Separated by commas.
  config.smoke = is_smoke  # The smallest stages that run.
  config.num_processes = 1  # Seeds that run at the same time.
  # Folder of the seeds' runs, which several studies may share; '' is the
  # workdir.
  config.runs = ''
  # Folder of records, seed_N.json, that studies elsewhere wrote; seeds that
  # have one there are read, not run.
  config.records = ''
  return common.single(config, argument.replace('+', '_'))
