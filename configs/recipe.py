"""From a published model and preferences to a report, in one command.

  python -m instruct_jax.main --config=configs/recipe.py \\
    --config.model=hf:HuggingFaceTB/SmolLM2-135M-Instruct \\
    --config.preferences=hh:DIR --workdir=RUN

Presets, after a colon, by the available compute:

  smoke    any model, a few steps; for CI and a first look, figures mean nothing
  cpu      a model of 135 M parameters on two cores, some hours (default)
  gpu      one card of 80 GB, a model of up to about 1.5 B parameters
  v4-8     the same on four TPU v4 chips
  tldr_1b  TL;DR with Pythia 1B as in Huang et al. 2024 (arXiv 2403.17031)

`--config.dry_run=True` prints stages, sizes, memory and time, and stops.
`instruct_jax/models/README.md` has more.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import budgets, common, pipeline, reward

LEAST = ('comparisons_train', 'judge_comparisons_train', 'prompts_train')


def data_stage(seed, workdir):
  """Keys of `instruct_jax/worlds/preferences.py`."""
  config = common.stage(
    'data', 'instruct_jax.worlds.preferences', seed, workdir
  )
  config.model = ''
  config.tokenizer = ''  # '' is the model's own.
  # Prompt format: 'chat' is the tokenizer's chat template, '' the bare text,
  # other text a format string with {prompt}; 'auto' is chat, if any, or ''.
  config.template = 'auto'
  config.date = '2026-01-01'  # For templates that print today's date.
  # FORMAT:PATH of `data.importers`, or JSONL of ours; several with commas.
  # Files of a folder whose names begin with the word 'test' are held out.
  config.preferences = ''
  config.test_preferences = ''  # '' holds out a share of `preferences`.
  config.demonstrations = ''  # '' takes the best answers of the rankings.
  config.prompts = ''  # For RL, in addition to those of the rankings.
  config.documents = ''  # Pretraining text (`sources.read_documents`), or ''.
  # NAME=SOURCE,NAME=SOURCE: other kinds of text, only to measure the tax.
  config.other_documents = ''
  config.context_length = 0  # Tokens; 0 is the model's. The recipe fills it in.
  config.words_per_document = 100
  config.valid_fraction = 0.05  # Of the prompts.
  config.test_fraction = 0.1
  config.judge_fraction = 0.4  # Of the conversations, for the judge alone.
  config.references = False  # Also compare with test prompts' demonstrations.
  config.duplicate_prefix_words = 12  # Not printed (A.2); a choice.
  config.prompts_per_user = 200  # 3.2, A.2.
  # Tokens; None: so that `kept_fraction` of the records fit, up to the maximum.
  config.prompt_length = placeholder(int)
  config.response_length = placeholder(int)
  config.kept_fraction = 0.95
  config.max_prompt_length = 1024
  config.max_response_length = 512
  config.max_demonstrations = 0  # Records, drawn by seed; 0 is all.
  config.max_comparisons = 0  # For each of the two reward models.
  config.max_valid = 1_000  # Of each validation file.
  config.max_documents = 0
  config.max_valid_words = 0  # Of each kind of held-out text; 0 is all.
  # File -> records in a batch of its stage; the recipe fills it in.
  config.least = ConfigDict(dict.fromkeys(LEAST, 0))
  # Stage -> most answers of a ranking; the recipe fills it in.
  config.max_answers = ConfigDict({'reward': 0, 'judge': 0})
  return config


def export_stage(seed, workdir):
  """Keys of `instruct_jax/jobs/export_models.py`."""
  config = common.stage('export', 'export_models', seed, workdir)
  config.models = ''  # NAME=FOLDER,NAME=FOLDER.
  config.tokenizer = ''
  # hf:NAME or hf:OWNER/NAME: each model goes to the Hub as NAME-MODEL. With ''
  # nothing is uploaded. Repositories are private unless `public` is True.
  config.push_to = ''
  config.public = False
  # For the cards: names on the Hub, separated by commas, and the Hub's word for
  # the models' licence. '' for base_model: `model`, if that is on the Hub.
  config.base_model = ''
  config.datasets = ''
  config.license = ''
  return config


def wire(config) -> None:
  """Adapts the stages of `pipeline.recipe` to a published model."""
  seed, workdir = config.get_ref('seed'), config.get_ref('workdir')
  data, stages = workdir + '/data', config.stages
  for name in ('pretrain', 'crossval'):
    del stages[name]
  stages.data = data_stage(seed, workdir)
  for key in ('model', 'tokenizer', 'template'):
    config[key] = stages.data[key]
    stages.data[key] = config.get_ref(key)
  for key in (
    *('preferences', 'test_preferences', 'demonstrations', 'prompts'),
    *('documents', 'other_documents'),
  ):
    config[key] = ''
    stages.data[key] = config.get_ref(key)
  stages.judge = reward.stage(seed + 1, workdir, 'judge')
  stages.judge.init = workdir + '/sft/model'
  stages.judge.demonstrations = data + '/demonstrations_train.jsonl'
  stages.judge.mesh = config.get_ref('mesh')
  pipeline.share_lora(config, stages.judge)
  for name, prefix in (('reward', ''), ('judge', 'judge_')):
    for key, split in (
      ('comparisons', 'train'),
      ('valid_comparisons', 'valid'),
    ):
      stages[name][key] = data + f'/{prefix}comparisons_{split}.jsonl'
  for name in ('sft', 'rl_init'):
    stages[name].init = config.get_ref('model')
  for name in ('ppo', 'ppo_ptx'):
    stages[name].prompts = data + '/prompts_train.jsonl'
  stages.evaluate.world = 'instruct_jax.worlds.preferences.WORLD'
  stages.ppo_ptx.ptx_coef = 0.3  # See configs/ppo_ptx.py:gpt2.
  config.judge = 'instruct_jax.worlds.preferences.OtherConversations'
  config.other_judges = ''
  stages.evaluate.judge = config.get_ref('judge')
  stages.evaluate.other_judges = config.get_ref('other_judges')
  stages.evaluate.judge_model = workdir + '/judge/model'
  stages.evaluate.comparisons = 'given=' + stages.reward.get_ref('comparisons')
  stages.evaluate.test_comparisons = 'given=' + data + '/comparisons_test.jsonl'
  stages.export = export_stage(seed, workdir)
  for key in ('push_to', 'public', 'base_model', 'datasets', 'license'):
    config[key] = stages.export[key]
    stages.export[key] = config.get_ref(key)


def get_config(preset: str = 'cpu'):
  """The recipe with the sizes of a preset."""
  common.check(preset, tuple(budgets.PRESETS), 'preset')
  config = pipeline.recipe(f'recipe_{preset}')
  config.prepare = 'instruct_jax.recipe.prepare'  # After the flags are read.
  config.xla_flags = common.LEAN_ON_CPU
  config.dry_run = False  # Print stages, sizes, memory and time, and stop.
  # Existing models; their stages are left out.
  config.sft_model = ''
  config.reward_model = ''
  config.judge_model = ''
  config.last_weights = False  # Also RL's last weights, beside averages (C.4).
  # Of all stages; 'auto' is bfloat16 if the device multiplies it faster.
  config.compute_dtype = 'auto'
  # None: adapters only if training all weights does not fit the memory.
  config.lora.rank = placeholder(int)
  config.lora_rate = 10.0  # Factor for the learning rates, with adapters.
  wire(config)
  stages = config.stages
  config.stage_order = (
    'data', 'sft', 'rl_init', 'reward', 'judge', 'select', 'ppo', 'ppo_ptx',
    'nlp_suite', 'evaluate', 'export',
  )  # fmt: skip
  for name in config.stage_order[1:]:
    each = stages[name]
    each.tokenizer = config.get_ref('workdir') + '/data/tokenizer'
    each.lengths = config.get_ref('workdir') + '/data/lengths.json'
    if 'compute_dtype' in each:
      each.compute_dtype = config.get_oneway_ref('compute_dtype')
    for key in ('prompt_length', 'response_length', 'row_length'):
      if key in each and name != 'nlp_suite':
        each[key] = None  # As measured by the data stage.
    for key, kind in {'remat': str, 'logprob_chunk': int}.items():
      if key in each:
        del each[key]
        each[key] = placeholder(kind)  # Chosen for the device.
  config.update(budgets.PRESETS[preset].get('', {}))
  for group, names in (
    ('data', ('data',)),
    ('train', ('sft', 'rl_init')),
    ('sft', ('sft',)),
    ('rl_init', ('rl_init',)),
    ('reward', ('reward', 'judge')),
    ('select', ('select',)),
    ('rl', ('ppo', 'ppo_ptx')),
    ('evaluate', ('evaluate',)),
  ):
    for name in names:
      for changes in (budgets.BASE, budgets.PRESETS[preset]):
        stages[name].update(changes.get(group, {}))
  config.lock()
  return config
