"""Samples of policies for the labeling site (3.1: mostly SFT, some PPO).

  python -m instruct_jax.main --config=configs/sample.py \
    --config.models='sft=RUN/select/model,ppo_ptx=RUN/ppo_ptx/policy' \
    --config.tokenizer=RUN/data/tokenizer --config.prompts=prompts.jsonl

Its samples.jsonl is what `python -m instruct_jax.labeling --import_file` reads.
"""

from configs import common


def get_config(argument: str = ''):
  if argument:
    raise ValueError(f'sample has no variants: {argument!r}')
  config = common.stage('sample', 'sample', 0, '')
  common.models(config)
  config.models = ''  # NAME=FOLDER,NAME=FOLDER: policies.
  config.tokenizer = ''
  config.prompts = ''  # JSONL of prompts.
  config.samples_per_model = 2  # K is this times the models; 4 to 9 (3.5).
  config.prompt_length = 1024  # Tokens; longer prompts are left out.
  config.response_length = 1024
  config.temperature = 1.0  # Not printed for comparisons; as in rollouts (C.4).
  config.batch_size = 64
  return common.single(config, 'all')
