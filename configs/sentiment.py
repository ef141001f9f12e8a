"""Positive continuations (Ziegler et al. 2019, section 3.1), from any model.

  python -m instruct_jax.main --config=configs/sentiment.py \\
    --config.model=hf:HuggingFaceTB/SmolLM2-135M-Instruct \\
    --config.documents=BOOKS --config.labels=SST2/train.tsv \\
    --config.valid_labels=SST2/dev.tsv

Runs PPO twice from the model itself: `ppo` against a sentiment classifier, a
Python function, and `ppo_learned` against a reward model trained on rankings of
K = 4 answers by simulated labelers, who see the classifier's score with noise.
Report, samples and `best_of_n/frontier.png` show what each gains, and what it
costs in KL.

`:smoke` runs every stage at the smallest size that runs.
"""

from configs import best_of_n, common, evaluate, reward, rl

SCORE = 'instruct_jax.worlds.sentiment.positive@'


def data_stage(seed, workdir):
  """Keys of `instruct_jax/worlds/sentiment.py`."""
  config = common.stage('data', 'instruct_jax.worlds.sentiment', seed, workdir)
  config.model = ''
  config.documents = ''  # Text whose openings are the prompts.
  config.labels = ''  # sentence<TAB>label, as SST-2's train.tsv.
  config.valid_labels = ''  # Its dev.tsv, to measure the classifier on.
  config.words_per_document = 60
  config.num_prompt_tokens = 8
  config.num_train_prompts = 4_000
  config.num_valid_prompts = 100
  config.num_test_prompts = 300
  return config


def rank_stage(seed, workdir):
  """Keys of `instruct_jax/jobs/rank.py`."""
  config = common.stage('rank', 'rank', seed, workdir)
  common.models(config)
  config.tokenizer = ''
  config.model = ''  # Whose answers are ranked.
  config.prompts = ''
  config.num_prompts = 2_000  # At most; drawn by seed.
  config.valid_prompts = ''
  config.num_valid_prompts = 100
  config.num_candidates = 4  # K (Ziegler et al.).
  config.score_fn = ''  # The labelers' score: NAME or NAME@FILE.
  config.num_labelers = 20
  config.labeler_noise = 0.1  # Standard deviation, in units of the score.
  config.prompt_length = 8
  config.response_length = 16
  config.temperature = 1.0
  config.batch_size = 96  # Answers sampled at a time.
  return config


def numbers(config) -> None:
  """Settings for models of about 100 M parameters; none is the paper's."""
  stages = config.stages
  stages.reward.max_candidates = 4
  stages.reward.row_length = 128  # Five answers of 24 tokens.
  stages.reward.batch_size = 8
  stages.reward.eval_batch_size = 32
  # With all weights trained, Adam's steps on small batches spend KL on noise.
  for each in (stages.reward, stages.ppo, stages.ppo_learned):
    each.lora.rank = 16
    each.lora.targets = ('query', 'value')
  stages.reward.learning_rate = 1.5e-3
  for each in (stages.ppo, stages.ppo_learned):
    each.learning_rate = each.value_learning_rate = 1.2e-3
    each.prompt_length = 8
    each.response_length = 16
    each.batch_size = 64
    each.num_minibatches = 2
    each.num_warmup_iterations = 4
    each.kl_coef = 0.007
    each.checkpoint_every = 10
    each.snapshot_every = 10
    # There are 144 and 96 updates; longer averages lag behind.
    each.ema_decay = 0.9
  stages.ppo.num_episodes, stages.ppo_learned.num_episodes = 4_608, 3_072
  # A nat of KL gains about ten times as much reward-model score.
  stages.ppo_learned.kl_coef = 0.1
  stages.evaluate.num_prompts = 300
  stages.evaluate.batch_size = 96
  stages.best_of_n.num_prompts = 64
  stages.best_of_n.num_samples = 8
  stages.best_of_n.batch_size = 96


def smoke(config) -> None:
  """Every stage, at the smallest size that runs."""
  stages = config.stages
  for split, number in (('train', 40), ('valid', 8), ('test', 16)):
    stages.data[f'num_{split}_prompts'] = number
  stages.rank.num_prompts, stages.rank.num_valid_prompts = 24, 8
  stages.reward.batch_size = stages.reward.eval_batch_size = 8
  for each in (stages.ppo, stages.ppo_learned):
    each.num_episodes, each.batch_size = 32, 16
    each.num_minibatches = 2
    each.snapshot_every = 1
  for each in (stages.best_of_n, stages.evaluate):
    each.num_prompts = each.batch_size = 16
    each.num_bootstrap = 200


def get_config(variant: str = ''):
  """The whole pipeline."""
  common.check(variant, ('', 'smoke'), 'variant')
  config = common.root('sentiment')
  seed, workdir = config.get_ref('seed'), config.get_ref('workdir')
  data, stages = workdir + '/data', config.stages
  stages.data = data_stage(seed, workdir)
  for key in ('model', 'documents', 'labels', 'valid_labels'):
    config[key] = ''
    stages.data[key] = config.get_ref(key)
  config.prepare = 'instruct_jax.recipe.prepare_sentiment'  # After the flags.
  # Of all stages; 'auto' is bfloat16 if the device multiplies it faster.
  config.compute_dtype = 'auto'
  score = SCORE + data + '/classifier.json'
  model = config.get_ref('model')
  stages.rank = rank_stage(seed, workdir)
  stages.rank.model = model
  stages.rank.score_fn = score
  stages.rank.prompts = data + '/prompts_train.jsonl'
  stages.rank.valid_prompts = data + '/prompts_valid.jsonl'
  stages.reward = reward.stage(seed, workdir)
  stages.reward.init = model
  stages.reward.comparisons = workdir + '/rank/comparisons_train.jsonl'
  stages.reward.valid_comparisons = workdir + '/rank/comparisons_valid.jsonl'
  stages.reward.demonstrations = ''  # The mean score does not matter.
  for name in ('ppo', 'ppo_learned'):
    each = stages[name] = rl.stage(seed, workdir, name)
    each.init = model
    each.prompts = data + '/prompts_train.jsonl'
    each.ptx_coef = 0.0
  stages.ppo.reward_fn = score
  stages.ppo_learned.reward_model = workdir + '/reward/model'
  stages.best_of_n = best_of_n.stage(seed, workdir)
  stages.best_of_n.policy = model
  stages.best_of_n.rl = (
    'ppo=' + workdir + '/ppo,ppo_learned=' + workdir + '/ppo_learned'
  )
  stages.evaluate = evaluate.stage(seed, workdir)
  stages.evaluate.models = (  # Averaged weights, as in C.4.
    'before=' + model + ',ppo=' + workdir + '/ppo/ema,ppo_learned='
    + workdir + '/ppo_learned/ema'
  )  # fmt: skip
  stages.evaluate.other_models = (
    'ppo_last=' + workdir + '/ppo/policy,ppo_learned_last='
    + workdir + '/ppo_learned/policy'
  )  # fmt: skip
  stages.evaluate.baseline = stages.evaluate.reference = 'before'
  stages.evaluate.pairs = 'ppo_learned=ppo'
  stages.evaluate.world = 'instruct_jax.worlds.sentiment.WORLD'
  for each in (stages.best_of_n, stages.evaluate):
    each.judge = score
    each.reward_model = workdir + '/reward/model'
    each.prompts = data + '/prompts_test.jsonl'
  config.stage_order = (
    'data', 'rank', 'reward', 'ppo', 'ppo_learned', 'best_of_n', 'evaluate',
  )  # fmt: skip
  for name in config.stage_order[1:]:
    stages[name].tokenizer = data + '/tokenizer'
    stages[name].compute_dtype = config.get_oneway_ref('compute_dtype')
    stages[name].mesh = config.get_ref('mesh')
  numbers(config)
  if variant == 'smoke':
    smoke(config)
  config.lock()
  return config
