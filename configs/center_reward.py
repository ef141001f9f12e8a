"""Centres a published reward model on demonstrations (3.5).

  python -m instruct_jax.main --config=configs/center_reward.py --workdir=DIR \
    --config.reward_model=hf:NAME --config.tokenizer=TOKENIZER \
    --config.demonstrations=DATA/demonstrations_train.jsonl

DIR/model is a reward model in our format, for any key called `reward_model`;
DIR/results.json has the shift and the range of scores seen. PPO raises an alarm
when scores leave that range, since the model then extrapolates.
"""

from configs import common


def get_config(argument: str = ''):
  """The stage; it has no variants."""
  common.check_none(argument, 'center_reward')
  config = common.stage('center_reward', 'center_reward', 0, '')
  common.models(config)
  config.reward_model = ''  # Folder: a sequence classifier, or one of ours.
  config.tokenizer = ''
  config.demonstrations = ''  # JSONL; they score 0 on average afterwards.
  # JSONL of rankings, whose answers widen the range of scores, or ''.
  config.comparisons = ''
  config.row_length = 1024  # Tokens; longer records are left out and counted.
  config.batch_size = 16  # Rows.
  return common.single(config, 'all')
