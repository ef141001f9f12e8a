"""RLOO (Ahmadian et al. 2024) in the place of PPO and PPO-ptx.

  python -m instruct_jax.main --config=configs/rloo.py

Variants after a colon: miniature (default), smoke. The stages before are those
of `configs/ppo_ptx.py`. GRPO is

  --config.stages.rloo.advantage=group_normalised \
  --config.stages.rloo.kl_in=loss --config.stages.rloo.kl_estimator=k3
"""

from configs import miniature, pipeline

# Keys of PPO that a method without a value model lacks.
OF_VALUES = (
  'value_learning_rate',
  'value_clip',
  'gae_lambda',
  'discount',
  'whiten_advantages',
)


def from_ppo(config):
  """Makes an RLOO stage of a PPO stage, whose other numbers it keeps."""
  config.name = config.experiment = 'rloo'
  for key in OF_VALUES:
    del config[key]
  config.samples_per_prompt = 4
  config.advantage = 'leave_one_out'  # Or 'group_normalised', GRPO's.
  return config


def get_config(variant: str = 'miniature'):
  makers = {'miniature': miniature.miniature, 'smoke': miniature.smoke}
  if variant not in makers:
    raise ValueError(f'unknown variant {variant!r}; known: miniature, smoke')
  config = makers[variant](f'rloo_{variant}')
  stages = config.stages
  stages.rloo = from_ppo(stages.ppo)
  pipeline.replace_rl(config, 'rloo')
  config.lock()
  return config
