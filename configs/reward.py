"""The reward model (3.5, C.2), and its cross-validation (E.2) as `:SIZE,folds`.

  python -m instruct_jax.main --config=configs/reward.py:6b \
    --config.init=SFT_MODEL --config.tokenizer=DIR \
    --config.comparisons=train.jsonl --config.valid_comparisons=valid.jsonl \
    --config.demonstrations=demonstrations.jsonl

or, for an export of the labeling site, `--config.data.comparisons=EXPORT`
instead of the three files.

Sizes: 1p3b, 6b (default: the paper's one reward model), 175b. The size only
decides memory settings here; `init` brings the shape. `:gpt2` has settings for
published models of that size and context (`--config.init=hf:gpt2`, or the model
of `configs/sft.py:gpt2`).

  python -m instruct_jax.main --config=configs/reward.py:hh \
    --config.data.root=DIR

pretrains a small GPT on Anthropic's HH dialogues, trains two reward models from
it, one for helpfulness and one for harmlessness, and compares them with
baselines. DIR has hh_helpful/ and hh_harmless/.
"""

from ml_collections import ConfigDict

from configs import common, pretrain


def stage(seed, workdir, name='reward'):
  """The reward model of C.2."""
  config = common.tuning(name, 'reward', seed, workdir)
  config.init = ''  # Policy folder whose trunk the reward model starts from.
  config.comparisons = ''  # JSONL of rankings.
  config.valid_comparisons = ''
  # Their mean score becomes 0 (3.5); '' takes the ranked answers instead.
  config.demonstrations = ''
  config.max_comparisons = 0  # Use only the first N; 0 is all.
  config.max_valid_comparisons = 0  # Likewise.
  config.max_candidates = 9  # C: K is 4 to 9 (3.5).
  # Whether several labelers' rankings of the same answers are one element of a
  # batch: they share K forward passes, and every prompt has the same weight.
  config.merge_rankings = True
  # Whether each pair is a separate, shuffled element; the paper tried this
  # first, and it overfits (3.5). A batch then has as many pairs as `batch_size`
  # prompts have on average.
  config.split_pairs = False
  config.row_length = 2048
  config.batch_size = 64  # Prompts, each with all of its pairs (C.2).
  config.num_epochs = 1  # C.2: more overfits.
  config.learning_rate = 9e-6  # C.2; cosine to 10 %.
  config.divisor = 'surviving'  # Pairs that are not ties; or 'all'.
  config.log_every = 5
  config.eval_batch_size = 16  # Packed rows.
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


# Folder of the data root -> its reward model. Each set has its own, as in Llama
# 2 (Touvron et al. 2023, 3.2.2): one prefers long answers and the other short
# ones, and a small model trained on both orders neither.
HH_SETS = {'hh_helpful': 'reward_helpful', 'hh_harmless': 'reward_harmless'}


def hh():
  """Real human preferences, single turn, on a laptop's CPU."""
  config = common.root('reward_hh')
  seed, workdir = config.get_ref('seed'), config.get_ref('workdir')
  data, stages = workdir + '/data', config.stages
  stages.data = common.stage('data', 'hh_data', seed, workdir)
  # One value under two names: the short one is for the command line.
  config.data = ConfigDict({'root': ''})
  stages.data.root = config.data.get_ref('root')
  stages.data.sets = tuple(HH_SETS)
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
  for set_name, name in HH_SETS.items():
    folder = data + f'/{set_name}'
    reward = stages[name] = stage(seed, workdir, name)
    reward.init = workdir + '/pretrain/model'
    reward.demonstrations = folder + '/demonstrations_train.jsonl'
    files = stages.baselines.sets[set_name] = ConfigDict()
    files.reward_model = workdir + f'/{name}/model'
    for each in (reward, files):
      each.comparisons = folder + '/comparisons_train.jsonl'
      each.valid_comparisons = folder + '/comparisons_valid.jsonl'
    reward.update(max_candidates=2, row_length=256, learning_rate=5e-4)
    reward.update(batch_size=32, eval_batch_size=32, checkpoint_every=100)
  for name in ('pretrain', *HH_SETS.values(), 'baselines'):
    stages[name].tokenizer = data + '/tokenizer'
    stages[name].mesh = config.get_ref('mesh')
  config.stage_order = ('data', 'pretrain', *HH_SETS.values(), 'baselines')

  # Learning rates grow as models shrink; none of these is the paper's.
  stages.pretrain.model = common.tiny_model(
    width=128, num_layers=2, context=256, unroll=2
  )
  stages.pretrain.update(row_length=256, batch_size=16, learning_rate=3e-3)
  stages.pretrain.update(num_steps=1200, num_warmup=50)
  stages.pretrain.update(eval_every=200, checkpoint_every=200)
  config.lock()
  return config


def from_export(config):
  """Takes the three files from an export of the labeling site."""
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
  """A paper size, also with ',folds', or 'gpt2' or 'hh'."""
  if argument in ('hh', 'gpt2'):
    return hh() if argument == 'hh' else gpt2()
  size, _, kind = argument.partition(',')
  if size not in ('1p3b', '6b', '175b') or kind not in ('', 'folds'):
    raise ValueError(f'unknown reward config: {argument!r}')
  config = from_export(crossval_stage(0, '') if kind else stage(0, ''))
  config.remat = 'full'
  config.num_microbatches = 8
  return common.single(config, size)
