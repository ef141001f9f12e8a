"""Samples policies for the labeling site (3.1: mostly SFT, some PPO).

  python -m instruct_jax.main --config=configs/sample.py \
    --config.models='sft=RUN/select/model,ppo_ptx=RUN/ppo_ptx/policy' \
    --config.tokenizer=RUN/data/tokenizer --config.prompts=prompts.jsonl

`python -m instruct_jax.labeling --import_file` reads samples.jsonl.
"""

from ml_collections.config_dict import placeholder

from configs import common


def get_config(argument: str = ''):
  """The stage; it has no variants."""
  common.check_none(argument, 'sample')
  config = common.stage('sample', 'sample', 0, '')
  common.models(config)
  config.models = ''  # NAME=FOLDER,NAME=FOLDER: policies.
  config.tokenizer = ''
  config.prompts = ''  # JSONL of prompts.
  config.samples_per_model = 2  # K, over all models, is 4 to 9 (3.5).
  # Tokens; longer prompts are left out and counted. None: as in the run whose
  # folder has the models or, failing that, the prompts.
  config.prompt_length = placeholder(int)
  config.response_length = placeholder(int)
  config.temperature = 1.0  # Not printed for comparisons; as in rollouts (C.4).
  config.batch_size = 64
  return common.single(config, 'all')
