"""Best-of-n from a policy, beside RL, by a judge that neither trained on.

  python -m instruct_jax.main --config=configs/best_of_n.py --workdir=DIR \
    --config.policy=RUN/rl_init/model --config.reward_model=RUN/reward/model \
    --config.prompts=RUN/data/prompts_test.jsonl \
    --config.tokenizer=RUN/data/tokenizer --config.rl=ppo=RUN/ppo

Gao et al. 2022. RL points are the snapshots of a run (`snapshot_every` of the
PPO stage) and its final policy. Output: best_of_n.md, .json, frontier.png.
"""

from configs import common


def get_config(argument: str = ''):
  if argument:
    raise ValueError(f'best_of_n has no variants: {argument!r}')
  config = common.stage('best_of_n', 'best_of_n', 0, '')
  common.models(config)
  config.policy = ''  # Whose answers the best is taken of, and KL's reference.
  config.reward_model = ''  # The proxy: scalar folder that chooses.
  config.judge = 'gold'  # Or 'reward': judge_model, another scalar folder.
  config.judge_model = ''
  config.world_seed = 0  # gold: seed of the run whose world is judged.
  config.rl = ''  # NAME=FOLDER of PPO stages, comma between.
  config.prompts = ''  # JSONL of held-out prompts.
  config.num_prompts = 200  # At the most.
  config.num_samples = 64  # N, of each prompt; n goes up to it by doubling.
  config.tokenizer = ''
  config.prompt_length = 64  # Tokens; longer prompts are left out, counted.
  config.response_length = 64  # Tokens.
  config.temperature = 1.0  # As in RL's rollouts.
  config.batch_size = 256  # Answers sampled at a time.
  config.num_bootstrap = 1000
  return common.single(config, 'all')
