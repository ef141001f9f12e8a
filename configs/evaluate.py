"""Preference evaluation (3.6, 4.1) of any set of models.

  python -m instruct_jax.main --config=configs/evaluate.py --workdir=DIR \
    --config.models='sft=RUN/select/model,ppo_ptx=RUN/ppo_ptx/policy' \
    --config.prompts=RUN/data/prompts_test.jsonl \
    --config.tokenizer=RUN/data/tokenizer

A model is a folder of ours, a folder in the Hugging Face format, `hf:NAME`, or
a file of recorded answers (`samples.py`; FILE.jsonl#NAME where it holds several
models). The judge is the miniature's gold utility; `:reward`, `:people` and
`:http` choose others:

  reward  --config.reward_model=FOLDER
  people  --config.rankings=FILE.jsonl, see `judges.read_rankings`
  http    --config.endpoint.url=URL/chat/completions
          --config.endpoint.model=NAME, with the key in the environment,
          JUDGE_API_KEY unless told otherwise

Output: preferences.md, preferences.json, judgements.jsonl, samples.jsonl.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common

JUDGES = ('gold', 'reward', 'people', 'http')


def endpoint(key_variable: str) -> ConfigDict:
  """How to ask over HTTP; see `endpoint.Settings`."""
  config = ConfigDict()
  config.url = ''
  config.key_variable = key_variable  # Of the environment; '' sends no key.
  config.timeout = 60.0  # Seconds.
  config.max_retries = 6
  config.requests_per_minute = 0.0  # 0 for no limit.
  config.num_workers = 4  # Questions at the same time.
  return config


def get_config(argument: str = 'gold'):
  if argument not in JUDGES:
    raise ValueError(f'unknown judge {argument!r}; known: {", ".join(JUDGES)}')
  config = common.stage('preferences', 'preferences', 0, '')
  common.models(config)
  config.models = ''  # NAME=FOLDER or NAME=FILE.jsonl, comma between.
  config.baseline = 'sft'  # The paper's is the 175B SFT model (3.6).
  config.prompts = ''  # JSONL of held-out prompts.
  config.num_prompts = 1000  # At the most; drawn by seed.
  config.tokenizer = ''  # Of the models that do not bring their own.
  # Tokens; longer prompts are left out and counted. None: as in the run in
  # whose folder the models, or else the prompts, lie.
  config.prompt_length = placeholder(int)
  config.response_length = placeholder(int)
  config.temperature = 1.0  # Appendix F samples InstructGPT at 1.
  config.batch_size = 256  # Prompts sampled at a time.
  config.cache = ''  # Folder of sampled answers; '' keeps them in the workdir.
  config.judge = argument
  config.pairs = 'baseline'  # Each model against it; or 'all' pairs.
  config.rate_answers = True  # Likert and labels too, where the judge can.
  # gold: seed of the world that is judged. None: as in the run in whose folder
  # the prompts lie.
  config.world_seed = placeholder(int)
  config.reward_model = ''  # reward: scalar folder; its tokenizer is ours.
  config.rankings = ''  # people: JSONL of comparisons.
  config.endpoint = endpoint('JUDGE_API_KEY')  # http.
  config.endpoint.model = ''
  config.endpoint.max_tokens = 512  # Of a reply.
  config.endpoint.prompt_price = 0.0  # For a million tokens, any currency.
  config.endpoint.completion_price = 0.0
  # Share of pairs whose verdict changes with the order of the answers, above
  # which the judge is called unreliable.
  config.max_contradictions = 0.2
  config.num_bootstrap = 2000
  return common.single(config, argument)
