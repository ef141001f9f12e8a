"""DPO on K-way rankings (Rafailov et al. 2023) in the place of RL.

  python -m instruct_jax.main --config=configs/dpo.py

Variants after a colon: miniature (default), smoke. The stages before are those
of `configs/ppo_ptx.py`; the reward model is there to judge, not to learn from.
"""

from configs import miniature, pipeline, reward


def stage(seed, workdir, name='dpo'):
  config = reward.stage(seed, workdir, name)
  config.experiment = 'dpo'
  del config.demonstrations
  config.beta = 0.1  # Rafailov et al., appendix B.
  # Or 'plackett_luce', which counts no pairs: `divisor` has no effect on it.
  config.ranking_loss = 'pairwise'
  config.learning_rate = 1e-6  # Theirs.
  return config


def get_config(variant: str = 'miniature'):
  makers = {'miniature': miniature.miniature, 'smoke': miniature.smoke}
  if variant not in makers:
    raise ValueError(f'unknown variant {variant!r}; known: miniature, smoke')
  config = makers[variant](f'dpo_{variant}')
  seed, workdir = config.get_ref('seed'), config.get_ref('workdir')
  stages = config.stages
  dpo = stages.dpo = stage(seed, workdir)
  for key in ('tokenizer', 'mesh', 'comparisons', 'valid_comparisons'):
    dpo[key] = stages.reward.get_ref(key)
  for key in (
    'batch_size',
    'eval_batch_size',
    'row_length',
    'checkpoint_every',
  ):
    dpo[key] = stages.reward[key]
  pipeline.share_lora(config, dpo)
  dpo.init = workdir + '/rl_init/model'
  dpo.learning_rate = 2e-4  # The policy's of PPO on this world.
  pipeline.replace_rl(config, 'dpo', folder='model')
  config.lock()
  return config
