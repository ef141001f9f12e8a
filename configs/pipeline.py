"""The stages of the whole recipe, connected to each other."""

from configs import common, evaluate, nlp_suite, pretrain, reward, rl, sft


def recipe(name: str):
  """All stages of the recipe but the data's; the caller sets the sizes."""
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
  # Does nothing without files: --config.stages.nlp_suite.data.drop=FILE.
  stages.nlp_suite = nlp_suite.stage(seed, workdir)
  stages.nlp_suite.may_be_empty = True
  stages.evaluate = evaluate.stage(seed, workdir)
  compare_models(config, ['ppo', 'ppo_ptx'])
  ppos = (stages.ppo, stages.ppo_ptx)
  for each in stages.values():
    each.tokenizer = data + '/tokenizer'
    each.mesh = config.get_ref('mesh')
  for each in (stages.pretrain, stages.rl_init, *ppos):
    each.documents = data + '/documents_train.jsonl'
    each.cut_documents = False  # As in the logged runs.
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
  for each in ppos:
    each.init = workdir + '/rl_init/model'
    each.prompts = data + '/ppo_prompts_train.jsonl'
    each.valid_documents = data + '/documents_valid.jsonl'
  for each in (stages.select, *ppos, stages.evaluate):
    each.reward_model = workdir + '/reward/model'
  stages.ppo.ptx_coef = 0.0
  # For all stages that have adapters; each may override them.
  common.lora(config)
  for each in stages.values():
    if 'lora' in each:
      share_lora(config, each)
  stages.evaluate.update(
    prompts=data + '/prompts_test.jsonl',
    prompted='prompted',
    prefixes=data + '/prefixes.json',
    prefix_prompts=data + '/prompts_valid.jsonl',
    reference='rl_init',
    documents=data + '/documents_valid.jsonl',
    crossval=workdir + '/crossval/results.json',
    suite=workdir + '/nlp_suite/suite.json',
  )
  return config


def share_lora(config, stage) -> None:
  """Links a stage's adapter keys to those of the whole recipe."""
  for key in config.lora:
    stage.lora[key] = config.lora.get_oneway_ref(key)


def select_stage(seed, workdir):
  """Choice of the SFT epoch by reward-model score (3.5)."""
  config = common.stage('select', 'select_sft', seed, workdir)
  common.models(config)
  config.tokenizer = ''
  config.sft = ''  # Folder of the SFT stage with all of its epochs.
  config.reward_model = ''
  config.prompts = ''  # Validation prompts.
  config.num_prompts = 256  # At most; drawn by seed.
  config.prompt_length = 32
  config.response_length = 20
  config.temperature = 1.0
  config.batch_size = 128  # Prompts sampled at a time.
  return config


def compare_models(config, rl_stages, folder='ema'):
  """Sets the models of the evaluation and the NLP suite, in order.

  Args:
    config: of a pipeline.
    rl_stages: names of the RL stages, or of their replacement.
    folder: folder of the weights to compare. For 'ema', the averages (C.4), the
      table of all models also has the last weights.
  """
  workdir, evaluate = config.get_ref('workdir'), config.stages.evaluate

  def named(folders):
    text = ''
    for name, path in folders.items():
      text = text + f'{"," * (text != "")}{name}=' + workdir + f'/{path}'
    return text

  pretrained, sft = 'pretrain/model', 'select/model'
  compared = {name: f'{name}/{folder}' for name in rl_stages}
  others = {'rl_init': 'rl_init/model'}
  if folder == 'ema':
    others |= {f'{name}_policy': f'{name}/policy' for name in rl_stages}
  own = {'pretrained': pretrained, 'sft': sft, **compared}
  config.stages.nlp_suite.models = named(own)
  evaluate.models = named(
    {'pretrained': pretrained, 'prompted': pretrained, **own}
  )
  evaluate.other_models = named(others)
  evaluate.pairs = '='.join(reversed(rl_stages)) * (len(rl_stages) == 2)


def replace_rl(config, name: str, folder: str = 'ema'):
  """Replaces PPO and PPO-ptx with another method.

  Args:
    config: of a pipeline; `stages` has the stage of the method.
    name: of that stage.
    folder: see `compare_models`.
  """
  for each in ('ppo', 'ppo_ptx'):
    del config.stages[each]
  order = [each for each in config.stage_order if each != 'ppo']
  order[order.index('ppo_ptx')] = name
  config.stage_order = tuple(order)
  compare_models(config, [name], folder)
