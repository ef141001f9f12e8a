"""The reward model (3.5, C.2), and its cross-validation (E.2) as `:SIZE,folds`.

  python -m instruct_jax.main --config=configs/reward.py:6b \
    --config.init=SFT_MODEL --config.tokenizer=DIR \
    --config.comparisons=train.jsonl --config.valid_comparisons=valid.jsonl \
    --config.demonstrations=demonstrations.jsonl

Sizes: 1p3b, 6b (default: the paper's one reward model), 175b. The size only
decides memory settings here; the shape comes with `init`.
"""

from configs import common


def stage(seed, workdir, name='reward'):
  config = common.adam(common.stage(name, 'reward', seed, workdir))
  config.tokenizer = ''
  config.init = ''  # Policy folder whose trunk the reward model starts from.
  config.comparisons = ''  # JSONL of rankings.
  config.valid_comparisons = ''
  config.demonstrations = ''  # Their mean score becomes 0 (3.5).
  config.max_comparisons = 0  # Use only the first N; 0 is all.
  config.max_candidates = 9  # C: K is 4 to 9 (3.5).
  config.row_length = 2048
  config.batch_size = 64  # Prompts, each with all of its pairs (C.2).
  config.num_microbatches = 1
  config.num_epochs = 1  # C.2: more overfits.
  config.learning_rate = 9e-6  # C.2; cosine to 10 %.
  config.divisor = 'surviving'  # Pairs left without ties, or 'all' (13.4).
  config.remat = 'none'
  config.attention = 'auto'  # The platform's flash kernel; or 'xla', 'flash'.
  config.num_folds = 0  # Labeler groups of the cross-validation; 0 is none.
  config.num_fold_seeds = 1
  config.log_every = 5
  config.eval_batch_size = 16  # Prompts.
  config.checkpoint_every = 50
  return config


def crossval_stage(seed, workdir, name='crossval'):
  """E.2: five groups of labelers, three seeds, hyper-parameters of C.2."""
  config = stage(seed, workdir, name)
  config.num_folds = 5
  config.num_fold_seeds = 3
  return config


def get_config(argument: str = '6b'):
  size, _, kind = argument.partition(',')
  if size not in ('1p3b', '6b', '175b') or kind not in ('', 'folds'):
    raise ValueError(f'unknown reward config: {argument!r}')
  config = crossval_stage(0, '') if kind else stage(0, '')
  config.remat = 'full'
  config.num_microbatches = 8
  return common.single(config, size)
