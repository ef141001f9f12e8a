"""Pretrains a GPT, the first of all stages (paper 3.5 starts from GPT-3).

  python -m instruct_jax.main --config=configs/pretrain.py:1p3b \
    --config.documents=docs.jsonl --config.valid=docs_valid.jsonl \
    --config.tokenizer=TOKENIZER_DIR

Sizes: 1p3b (default), 6b, 175b.
"""

from configs import common

# GPT-3 Table 2.1; Stiennon et al. Table 3 prints the first two again.
LEARNING_RATES = {'1p3b': 2e-4, '6b': 1.2e-4, '175b': 0.6e-4}
# GPT-3 Table 2.1 gives tokens: 1M, 2M and 3.2M, in rows of 2,048.
BATCH_SIZES = {'1p3b': 512, '6b': 1024, '175b': 1536}
NUM_TOKENS = 300e9


def stage(seed, workdir, name='pretrain'):
  """Pretraining; the caller adds `model`, the shape."""
  config = common.stage(name, 'pretrain', seed, workdir)
  common.loop(common.adam(config))
  config.tokenizer = ''  # Folder of the tokenizer.
  config.documents = ''  # JSONL of documents to train on.
  config.valid = ''  # JSONL of held-out documents.
  config.row_length = 2048  # Tokens in a packed row (C: 2k context).
  config.cut_documents = True  # At row ends; False pads rows instead.
  config.batch_size = 512  # Rows.
  config.num_microbatches = 1  # Gradient accumulation.
  config.num_steps = 1
  config.num_warmup = 0  # Updates of linear warm-up.
  config.learning_rate = 2e-4  # Peak; cosine to 10 %.
  config.log_every = 10  # Steps between lines of metrics.jsonl.
  config.eval_every = 1000  # Steps between held-out losses.
  config.eval_batch_size = 64  # Rows.
  config.checkpoint_every = 1000  # Steps.
  return config


def get_config(size: str = '1p3b'):
  """GPT-3's numbers at one of the paper's sizes."""
  config = stage(seed=0, workdir='')
  config.model = common.model(size)
  config.learning_rate = LEARNING_RATES[size]
  config.batch_size = BATCH_SIZES[size]
  config.num_steps = int(NUM_TOKENS / (config.batch_size * config.row_length))
  # GPT-3 warms up over 375M tokens.
  config.num_warmup = int(375e6 / (config.batch_size * config.row_length))
  return common.single(config, size)
