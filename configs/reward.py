"""The reward model (3.5, C.2), and its cross-validation (E.2) as `:SIZE,folds`.

  python -m instruct_jax.main --config=configs/reward.py:6b \
    --config.init=SFT_MODEL --config.tokenizer=DIR \
    --config.comparisons=train.jsonl --config.valid_comparisons=valid.jsonl \
    --config.demonstrations=demonstrations.jsonl

or, of an export of the labeling site, `--config.data.comparisons=EXPORT` for
all three files.

Sizes: 1p3b, 6b (default: the paper's one reward model), 175b. The size only
decides memory settings here; the shape comes with `init`. `:gpt2` has settings
for published models of that size and context (`--config.init=hf:gpt2`, or the
model of `configs/sft.py:gpt2`).

  python -m instruct_jax.main --config=configs/reward.py:hh \
    --config.data.root=DIR

pretrains a small GPT on Anthropic's HH dialogues, trains two reward models from
it, one for helpfulness and one for harmlessness, and sets them beside
baselines; DIR holds hh_helpful/ and hh_harmless/.
"""

from ml_collections import ConfigDict

from configs import common, pretrain


def stage(seed, workdir, name='reward'):
  config = common.stage(name, 'reward', seed, workdir)
  common.lora(common.models(common.loop(common.adam(config))))
  config.tokenizer = ''
  config.init = ''  # Policy folder whose trunk the reward model starts from.
  config.comparisons = ''  # JSONL of rankings.
  config.valid_comparisons = ''
  # Their mean score becomes 0 (3.5); '' takes the ranked answers instead.
  config.demonstrations = ''
  config.max_comparisons = 0  # Use only the first N; 0 is all.
  config.max_valid_comparisons = 0  # As well.
  config.max_candidates = 9  # C: K is 4 to 9 (3.5).
  # Whether several labelers' rankings of the same answers are one element of a
  # batch: they share the K forwards, and a prompt weighs as much as any other.
  config.merge_rankings = True
  config.row_length = 2048
  config.batch_size = 64  # Prompts, each with all of its pairs (C.2).
  config.num_microbatches = 1
  config.num_epochs = 1  # C.2: more overfits.
  config.learning_rate = 9e-6  # C.2; cosine to 10 %.
  config.divisor = 'surviving'  # Pairs left without ties, or 'all' (13.4).
  config.remat = 'none'
  config.attention = 'auto'  # The platform's flash kernel; or 'xla', 'flash'.
  config.log_every = 5
  config.eval_batch_size = 16  # Prompts.
  config.checkpoint_every = 50
  return config


def crossval_stage(seed, workdir, name='crossval'):
  """E.2: five groups of labelers, three seeds, hyper-parameters of C.2."""
  config = stage(seed, workdir, name)
  config.experiment = 'crossval'
  del config.demonstrations
  config.num_folds = 5  # Groups of labelers, each left out in turn.
  config.num_fold_seeds = 3
  return config


# Folders of the data root. Each has a reward model of its own, as in Llama 2
# (Touvron et al. 2023, 3.2.2): one set prefers long answers and the other short
# ones, and a small model of both orders neither.
HH_SETS = ('hh_helpful', 'hh_harmless')


def hh():
  """Real human preferences, single turn, on a laptop's processor."""
  config = common.root('reward_hh')
  seed, workdir = config.get_ref('seed'), config.get_ref('workdir')
  data, stages = workdir + '/data', config.stages
  stages.data = common.stage('data', 'hh_data', seed, workdir)
  # One value under two names: the short one is for the command line.
  config.data = ConfigDict({'root': ''})
  stages.data.root = config.data.get_ref('root')
  stages.data.sets = HH_SETS
  stages.data.valid_fraction = 0.1  # Of the prompts.
  stages.data.vocab_size = 4096
  stages.pretrain = pretrain.stage(seed, workdir)
  stages.baselines = common.stage(
    'baselines', 'reward_baselines', seed, workdir
  )
  stages.pretrain.documents = data + '/documents_train.jsonl'
  stages.pretrain.valid = data + '/documents_valid.jsonl'
  common.models(stages.baselines)
  stages.baselines.batch_size = 64  # Completions.
  stages.baselines.row_length = 256
  stages.baselines.sets = ConfigDict()
  for name in HH_SETS:
    folder = data + f'/{name}'
    reward_name = name.replace('hh', 'reward')
    reward = stages[reward_name] = stage(seed, workdir, reward_name)
    reward.init = workdir + '/pretrain/model'
    reward.demonstrations = folder + '/demonstrations_train.jsonl'
    files = stages.baselines.sets[name] = ConfigDict()
    files.reward_model = workdir + f'/{reward_name}/model'
    for each in (reward, files):
      each.comparisons = folder + '/comparisons_train.jsonl'
      each.valid_comparisons = folder + '/comparisons_valid.jsonl'
    reward.max_candidates = 2
    reward.row_length = 256
    reward.batch_size = 32
    reward.learning_rate = 5e-4
    reward.eval_batch_size = 32
    reward.checkpoint_every = 100
  trained = [name.replace('hh', 'reward') for name in HH_SETS]
  for name in ('pretrain', *trained, 'baselines'):
    stages[name].tokenizer = data + '/tokenizer'
    stages[name].mesh = config.get_ref('mesh')
  config.stage_order = ('data', 'pretrain', *trained, 'baselines')

  # Learning rates grow as models shrink; none of these is the paper's.
  stages.pretrain.model = ConfigDict(
    {
      'vocab_size': 0,  # The tokenizer's.
      'context_length': 256,
      'num_layers': 2,
      'width': 128,
      'num_heads': 4,
      'head_dim': 32,
      'mlp_dim': 512,
      'dropout': 0.0,
      'compute_dtype': 'float32',
      'remat': 'none',
      'vocab_multiple': 64,
      'scan_unroll': 2,
    }
  )
  stages.pretrain.row_length = 256
  stages.pretrain.batch_size = 16
  stages.pretrain.num_steps = 1200
  stages.pretrain.num_warmup = 50
  stages.pretrain.learning_rate = 3e-3
  stages.pretrain.eval_every = 200
  stages.pretrain.checkpoint_every = 200
  config.lock()
  return config


def from_export(config):
  """The three files as the labeling site's export names them."""
  config.data = ConfigDict({'comparisons': '.'})  # Folder of the export.
  folder = config.data.get_ref('comparisons')
  config.comparisons = folder + '/comparisons_train.jsonl'
  config.valid_comparisons = folder + '/comparisons_valid.jsonl'
  if 'demonstrations' in config:
    config.demonstrations = folder + '/demonstrations.jsonl'
  return config


def gpt2():
  """A published model; none of these numbers is the paper's."""
  config = from_export(stage(0, ''))
  config.max_candidates = 9
  config.row_length = 1024  # GPT-2's context.
  config.learning_rate = 1e-5
  config.num_microbatches = 4
  config.remat = 'dots'
  return common.single(config, 'gpt2')


def get_config(argument: str = '6b'):
  if argument == 'hh':
    return hh()
  if argument == 'gpt2':
    return gpt2()
  size, _, kind = argument.partition(',')
  if size not in ('1p3b', '6b', '175b') or kind not in ('', 'folds'):
    raise ValueError(f'unknown reward config: {argument!r}')
  config = from_export(crossval_stage(0, '') if kind else stage(0, ''))
  config.remat = 'full'
  config.num_microbatches = 8
  return common.single(config, size)
