"""RLOO (Ahmadian et al. 2024) instead of PPO and PPO-ptx.

  python -m instruct_jax.main --config=configs/rloo.py

Variants after a colon: miniature (default), smoke. The earlier stages are those
of `configs/ppo_ptx.py`. For GRPO, add

  --config.stages.rloo.advantage=group_normalised \
  --config.stages.rloo.kl_in=loss --config.stages.rloo.kl_estimator=k3
"""

from configs import miniature, pipeline

# Keys of PPO that a method without a value model lacks.
_OF_VALUES = (
  *('value_learning_rate', 'value_from', 'value_clip', 'gae_lambda'),
  *('discount', 'whiten_advantages'),
)


def from_ppo(config):
  """Turns a PPO stage into an RLOO stage, which keeps its other numbers."""
  config.name = config.experiment = 'rloo'
  for key in _OF_VALUES:
    del config[key]
  config.samples_per_prompt = 4
  config.advantage = 'leave_one_out'  # Or 'group_normalised' (GRPO).
  return config


def get_config(variant: str = 'miniature'):
  """The miniature's pipeline with RLOO instead of PPO and PPO-ptx."""
  config = miniature.variant('rloo', variant)
  config.stages.rloo = from_ppo(config.stages.ppo)
  pipeline.replace_rl(config, 'rloo')
  config.lock()
  return config
