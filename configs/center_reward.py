"""Centres a published reward model on demonstrations (3.5).

  python -m instruct_jax.main --config=configs/center_reward.py --workdir=DIR \
    --config.reward_model=hf:NAME --config.tokenizer=TOKENIZER \
    --config.demonstrations=DATA/demonstrations_train.jsonl

DIR/model is a reward model of ours, for every key called `reward_model`;
DIR/results.json holds the shift and the range of the scores that were seen,
beyond which PPO's alarm says that the model extrapolates.
"""

from configs import common


def get_config(argument: str = ''):
  if argument:
    raise ValueError(f'center_reward has no variants: {argument!r}')
  config = common.stage('center_reward', 'center_reward', 0, '')
  common.models(config)
  config.reward_model = ''  # Folder: a sequence classifier, or one of ours.
  config.tokenizer = ''
  config.demonstrations = ''  # JSONL; they score 0 on average afterwards.
  config.comparisons = (
    ''  # JSONL whose answers widen the range of scores, or ''.
  )
  config.row_length = 1024  # Tokens; what is longer is left out, counted.
  config.batch_size = 16  # Rows.
  return common.single(config, 'all')
