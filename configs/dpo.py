"""DPO on K-way rankings (Rafailov et al. 2023) instead of RL.

  python -m instruct_jax.main --config=configs/dpo.py

Variants after a colon: miniature (default), smoke. The earlier stages are those
of `configs/ppo_ptx.py`; the reward model only judges: DPO does not learn from
it.
"""

from configs import miniature, pipeline, reward


def stage(seed, workdir, name='dpo'):
  """Keys of the reward stage, without demonstrations, and DPO's own."""
  config = reward.stage(seed, workdir, name)
  config.experiment = 'dpo'
  del config.demonstrations
  config.beta = 0.1  # Rafailov et al., appendix B.
  # Or 'plackett_luce', which counts no pairs: `divisor` has no effect on it.
  config.ranking_loss = 'pairwise'
  config.learning_rate = 1e-6  # Rafailov et al.
  return config


def from_reward(config):
  """The DPO stage of a pipeline, on the rankings of its reward model."""
  stages = config.stages
  dpo = stage(config.get_ref('seed'), config.get_ref('workdir'))
  for key in ('tokenizer', 'mesh', 'comparisons', 'valid_comparisons'):
    dpo[key] = stages.reward.get_ref(key)
  for key in (
    *('batch_size', 'eval_batch_size', 'row_length', 'checkpoint_every'),
  ):
    dpo[key] = stages.reward[key]
  pipeline.share_lora(config, dpo)
  dpo.init = config.get_ref('workdir') + '/rl_init/model'
  dpo.learning_rate = 2e-4  # That of PPO's policy on this world.
  return dpo


def get_config(variant: str = 'miniature'):
  """The miniature's pipeline with DPO instead of PPO and PPO-ptx."""
  config = miniature.variant('dpo', variant)
  config.stages.dpo = from_reward(config)
  pipeline.replace_rl(config, 'dpo', folder='model')
  config.lock()
  return config
