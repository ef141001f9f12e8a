"""Best-of-n sampling compared with RL, by a judge that neither trained on.

  python -m instruct_jax.main --config=configs/best_of_n.py --workdir=DIR \
    --config.policy=RUN/rl_init/model --config.reward_model=RUN/reward/model \
    --config.prompts=RUN/data/prompts_test.jsonl \
    --config.tokenizer=RUN/data/tokenizer --config.rl=ppo=RUN/ppo

Gao et al. 2022. The judge is the miniature's gold utility; `:reward` uses
another reward model (--config.judge_model=FOLDER), and --config.judge any other
by its dotted name, as in `evaluate.py`. RL points are the snapshots of a run
(`snapshot_every` of the PPO stage) and its final policy. Output: best_of_n.md,
.json, frontier.png.
"""

from ml_collections.config_dict import placeholder

from configs import common, evaluate


def stage(seed, workdir):
  """Keys of `instruct_jax/jobs/best_of_n.py`."""
  config = common.stage('best_of_n', 'best_of_n', seed, workdir)
  common.models(config)
  config.policy = ''  # Samples the answers; also the reference of the KL.
  config.reward_model = ''  # The proxy that chooses; scalar folder.
  config.judge = evaluate.JUDGES['gold']  # Dotted name.
  config.judge_model = ''  # reward: scalar folder.
  # gold: seed of the judged world. None: that of the run whose folder has the
  # prompts.
  config.world_seed = placeholder(int)
  config.rl = ''  # NAME=FOLDER of PPO stages, comma-separated.
  config.prompts = ''  # JSONL of held-out prompts.
  config.num_prompts = 200  # At most; drawn by seed.
  config.num_samples = 64  # N, per prompt; n doubles up to N.
  config.tokenizer = ''
  # Tokens; longer prompts are left out and counted. None: as in the run whose
  # folder has the models or, failing that, the prompts.
  config.prompt_length = placeholder(int)
  config.response_length = placeholder(int)
  config.temperature = 1.0  # As in RL's rollouts.
  config.batch_size = 256  # Answers sampled at a time.
  config.num_bootstrap = 1000
  return config


def get_config(argument: str = 'gold'):
  """The stage alone, with one of two judges."""
  common.check(argument, ('gold', 'reward'), 'judge')
  config = stage(0, '')
  config.judge = evaluate.JUDGES[argument]
  return common.single(config, argument)
