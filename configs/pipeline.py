"""The stages of the whole recipe, wired to each other."""

from ml_collections import ConfigDict

from configs import common, nlp_suite, pretrain, reward, rl, sft


def tiny_model(width: int, num_layers: int, context: int, unroll: int):
  return ConfigDict(
    {
      'vocab_size': 0,  # The tokenizer's.
      'context_length': context,
      'num_layers': num_layers,
      'width': width,
      'num_heads': max(1, width // 32),
      'head_dim': 32,
      'mlp_dim': 4 * width,
      'dropout': 0.0,
      'compute_dtype': 'float32',
      'remat': 'none',
      'vocab_multiple': 64,
      'scan_unroll': unroll,
    }
  )


def recipe(name: str):
  """All stages of the recipe; sizes come after."""
  config = common.root(name)
  seed, workdir = config.get_ref('seed'), config.get_ref('workdir')
  data = workdir + '/data'
  stages = config.stages
  stages.pretrain = pretrain.stage(seed, workdir)
  stages.sft = sft.stage(seed, workdir)
  stages.rl_init = sft.init_stage(seed, workdir)
  stages.reward = reward.stage(seed, workdir)
  stages.select = select_stage(seed, workdir)
  stages.crossval = reward.crossval_stage(seed, workdir)
  stages.ppo = rl.stage(seed, workdir, 'ppo')
  stages.ppo_ptx = rl.stage(seed, workdir, 'ppo_ptx')
  # Asks nothing unless told of files: --config.stages.nlp_suite.data.drop=FILE.
  stages.nlp_suite = nlp_suite.stage(seed, workdir)
  stages.nlp_suite.may_be_empty = True
  stages.nlp_suite.models = (
    'pretrained=' + workdir + '/pretrain/model,sft=' + workdir
    + '/select/model,ppo=' + workdir + '/ppo/ema,ppo_ptx=' + workdir
    + '/ppo_ptx/ema'
  )  # fmt: skip
  stages.evaluate = evaluate_stage(seed, workdir)
  for each in stages.values():
    each.tokenizer = data + '/tokenizer'
    each.mesh = config.get_ref('mesh')
  for each in (stages.pretrain, stages.rl_init, stages.ppo, stages.ppo_ptx):
    each.documents = data + '/documents_train.jsonl'
    each.cut_documents = False  # The logged runs had whole ones.
  stages.pretrain.valid = data + '/documents_valid.jsonl'
  for each in (stages.sft, stages.rl_init):
    each.init = workdir + '/pretrain/model'
    each.demonstrations = data + '/demonstrations_train.jsonl'
    each.valid_demonstrations = data + '/demonstrations_valid.jsonl'
  for each in (stages.reward, stages.crossval):
    each.init = workdir + '/sft/model'
  stages.reward.demonstrations = data + '/demonstrations_train.jsonl'
  stages.select.sft = workdir + '/sft'
  stages.select.prompts = data + '/prompts_valid.jsonl'
  for each in (stages.ppo, stages.ppo_ptx):
    each.init = workdir + '/rl_init/model'
    each.prompts = data + '/ppo_prompts_train.jsonl'
    each.valid_documents = data + '/documents_valid.jsonl'
  for each in (stages.select, stages.ppo, stages.ppo_ptx, stages.evaluate):
    each.reward_model = workdir + '/reward/model'
  stages.ppo.ptx_coef = 0.0
  # Of all stages that have adapters; each may still have its own.
  common.lora(config)
  for each in stages.values():
    if 'lora' in each:
      share_lora(config, each)
  stages.evaluate.suite = workdir + '/nlp_suite/suite.json'
  return config


def share_lora(config, stage) -> None:
  """Lets a stage's adapters follow the section of the whole recipe."""
  for key in config.lora:
    stage.lora[key] = config.lora.get_oneway_ref(key)


def show_rankings(stages):
  """Tells the evaluation which rankings the reward model learned from."""
  for key in ('comparisons', 'valid_comparisons'):
    stages.evaluate[key] = stages.reward.get_ref(key)


def select_stage(seed, workdir):
  config = common.stage('select', 'select_sft', seed, workdir)
  common.models(config)
  config.tokenizer = ''
  config.sft = ''  # Folder of the SFT stage with all of its epochs.
  config.reward_model = ''
  config.prompts = ''  # Validation prompts.
  config.num_prompts = 256  # At the most, drawn by seed.
  config.prompt_length = 32
  config.response_length = 20
  config.temperature = 1.0
  config.batch_size = 128  # Prompts sampled at a time.
  return config


def evaluate_stage(seed, workdir):
  config = common.stage('evaluate', 'evaluate', seed, workdir)
  common.models(config)
  config.tokenizer = ''
  config.judge = 'gold'  # Or 'restaurant': human data, a second reward model.
  config.reward_model = ''
  config.suite = ''  # suite.json for the model card, where there is one.
  # What the reward model learned from. Beside rankings of the labeling site
  # lies statistics.json, which the model card reads.
  config.comparisons = ''
  config.valid_comparisons = ''
  config.judge_model = ''  # Scalar model folder; judge 'restaurant' only.
  config.num_prompts = 1000  # Held-out prompts at the most, drawn by seed.
  config.samples_per_prompt = 1  # Intervals redraw prompts, not samples.
  # Validation prompts that choose a prefix, at the most; drawn by seed.
  config.num_prefix_prompts = 64
  config.prompt_length = 32
  config.prefix_length = 48  # Tokens that a few-shot prefix may add.
  config.response_length = 20
  config.row_length = 64  # Tokens; rows of comparisons and held-out text.
  config.temperature = 1.0  # Appendix F samples InstructGPT at 1.
  config.batch_size = 256  # Prompts sampled at a time.
  config.max_candidates = 9
  # C.4 averages the weights; 'policy' takes the last ones. What is not chosen
  # here is in a table of its own.
  config.rl_weights = 'ema'
  config.num_samples_shown = 12
  config.num_samples_in_html = 300  # Prompts that report.html can filter.
  return config


def replace_rl(config, name: str):
  """Runs another method in the place of PPO and PPO-ptx.

  Args:
    config: of a pipeline; `stages` has the method's stage.
    name: of that stage.
  """
  for each in ('ppo', 'ppo_ptx'):
    del config.stages[each]
  order = [each for each in config.stage_order if each != 'ppo']
  order[order.index('ppo_ptx')] = name
  config.stage_order = tuple(order)
