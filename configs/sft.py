"""Fine-tuning (C.1) and, as `:1p3b,init`, the RL initialisation (C.3).

  python -m instruct_jax.main --config=configs/sft.py:1p3b \
    --config.init=PRETRAINED --config.tokenizer=DIR \
    --config.demonstrations=train.jsonl \
    --config.valid_demonstrations=valid.jsonl

Sizes: 1p3b (default), 6b, 175b; with `,init` after the size for C.3.

  python -m instruct_jax.data.tokenizer hf:gpt2 --output=TOKENIZER
  python -m instruct_jax.data.convert hh train.jsonl.gz --output=DATA
  python -m instruct_jax.main --config=configs/sft.py:gpt2 \\
    --config.init=hf:gpt2 --config.tokenizer=TOKENIZER \\
    --config.demonstrations=DATA/demonstrations_train.jsonl \\
    --config.valid_demonstrations=DATA/demonstrations_valid.jsonl

fine-tunes the published GPT-2 (any size; set row_length for other families).
The smallest has 124 M parameters, 2 GB with Adam in float32: it fits a GPU of
16 GB or a v4-8.
"""

from configs import common

# C.1: peak learning rate and batch.
SFT_LEARNING_RATES = {'1p3b': 9.65e-6, '6b': 9.65e-6, '175b': 5.03e-6}
BATCH_SIZES = {'1p3b': 32, '6b': 32, '175b': 8}
# C.3: peak learning rate of the initialisation.
INIT_LEARNING_RATES = {'1p3b': 5e-6, '6b': 1.04e-5, '175b': 2.45e-6}


def stage(seed, workdir, name='sft'):
  """SFT baseline of C.1."""
  config = common.tuning(name, 'sft', seed, workdir)
  config.init = ''  # Model folder: the pretrained policy.
  config.demonstrations = ''  # JSONL to train on.
  config.valid_demonstrations = ''  # JSONL for the loss of every epoch.
  config.documents = ''  # JSONL of pretraining text, for ptx_fraction.
  config.cut_documents = True  # At row ends; False pads rows instead.
  config.ptx_fraction = 0.0  # Share of pretraining rows in a batch (C.3).
  config.max_demonstrations = 0  # Use only the first N; 0 is all.
  config.loss_on = 'response'  # Or 'all'. Not printed; a choice.
  config.pack = False  # Several demonstrations per row.
  config.row_length = 2048  # Tokens (C: 2k context).
  config.batch_size = 32  # Rows (C.1).
  config.num_epochs = 16  # C.1.
  config.learning_rate = 9.65e-6  # Peak; cosine to 10 %, no warm-up (C.1).
  config.dropout = 0.2  # On residual branches (C.1).
  config.logprob_chunk = 0  # Columns of float32 logits at a time; 0 is all.
  config.select_by = 'valid_loss'  # Or 'last'; see select_sft.py.
  config.log_every = 10
  config.eval_batch_size = 64  # Rows.
  config.checkpoint_every = 100  # Steps.
  return config


def init_stage(seed, workdir, name='rl_init'):
  """SFT with pretraining mix (C.3): PPO's initial policy and KL reference."""
  config = stage(seed, workdir, name)
  config.ptx_fraction = 0.1  # C.3: 10 % pretraining data.
  config.num_epochs = 2  # C.3.
  config.dropout = 0.0  # Not printed for C.3; a choice.
  config.select_by = 'last'
  return config


def gpt2(kind: str):
  """A published model; none of these numbers is the paper's."""
  config = init_stage(0, '') if kind else stage(0, '')
  config.row_length = 1024  # GPT-2's context.
  config.pack = True  # Dialogues have about 100 tokens, rows a thousand.
  config.batch_size = 16  # Rows: about a hundred dialogues.
  config.learning_rate = 2e-5
  config.num_epochs = 2 if kind else 3
  config.remat = 'dots'
  return common.single(config, 'gpt2')


def get_config(argument: str = '1p3b'):
  """A paper size or gpt2; with ',init' the RL initialisation."""
  size, _, kind = argument.partition(',')
  if kind not in ('', 'init'):
    raise ValueError(f'after the size only ",init" is known: {argument!r}')
  if size == 'gpt2':
    return gpt2(kind)
  common.check_size(size)
  config = init_stage(0, '') if kind else stage(0, '')
  rates = INIT_LEARNING_RATES if kind else SFT_LEARNING_RATES
  config.learning_rate = rates[size]
  config.batch_size = BATCH_SIZES[size]
  config.remat = 'full'
  config.logprob_chunk = 128
  return common.single(config, size)
