"""Reward models on benchmarks and on any preference test set.

  python -m instruct_jax.main --config=configs/reward_bench.py --workdir=DIR \
    --config.models='ours=RUN/reward/model,theirs=hf:NAME' \
    --config.sets='rewardbench:FILE,rewardbench2:FILE,rm_bench:FILE' \
    --config.tokenizer=RUN/data/tokenizer

A model is a reward model of ours or a published sequence classifier, which
brings its own tokenizer and chat template. A set is FORMAT:PATH or
NAME=FORMAT:PATH, and a path is a file or a folder. The top of
`instruct_jax/evals/reward_bench.py` lists the formats of benchmarks, and
`python -m instruct_jax.data formats` those of other preferences; `comparisons`
is our own JSONL. `prior_sets:FOLDER` also enters RewardBench's score.

Output: reward_bench.md, reward_bench.json, reward_bench.png, and scores/, where
each scorer has a JSONL file of its scores.
"""

from configs import common


def get_config(argument: str = ''):
  """The stage; it has no variants."""
  common.check_none(argument, 'reward_bench')
  config = common.stage('reward_bench', 'reward_bench', 0, '')
  common.models(config)
  config.models = ''  # NAME=FOLDER,NAME=FOLDER: reward models.
  config.tokenizer = ''  # For models without their own.
  config.sets = ''  # FORMAT:PATH or NAME=FORMAT:PATH, comma-separated.
  # How models without a chat template read a single question of a benchmark:
  # followed by a blank line, or, if True, as a dialogue of Anthropic's HH.
  config.dialogue = False
  # Tokens of a prompt with an answer; items with a longer one are left out of
  # all models' figures and counted. 0: the shortest context of the models.
  config.max_length = 0
  # JSONL of the rankings from which the length and word-count baselines learn,
  # such as those of the reward model. '': five folds of the set itself.
  config.comparisons = ''
  config.batch_size = 32  # Rows per call.
  config.num_bootstrap = 2000
  return common.single(config, 'all')
