"""A small pretraining run from the command line, and its data."""

import pathlib
import shutil

from tests.starts import Starts

MAIN = 'instruct_jax.main'
NUM_STEPS = 400

CONFIG = """
from configs import common, pipeline, pretrain

def get_config():
  config = pretrain.stage(0, '')
  config.tokenizer = FOLDER + '/data/tokenizer'
  config.documents = FOLDER + '/documents.jsonl'
  config.valid = FOLDER + '/data/documents_valid.jsonl'
  config.model = common.tiny_model(32, 1, 64, 1)
  config.row_length, config.batch_size, config.num_steps = 32, 4, NUM_STEPS
  config.num_warmup, config.learning_rate = 2, 1e-3
  # A line, and a checkpoint, only at the end.
  config.log_every = config.checkpoint_every = config.eval_every = NUM_STEPS
  config = common.single(config, 'tiny')
  with config.unlocked():
    config.compilation_cache = CACHE
    config.xla_flags = '--xla_backend_optimization_level=0'
  return config
"""


def write(start: Starts, folder: pathlib.Path) -> pathlib.Path:
  """Fills a folder with data of the embedded world, and a config.

  The data stage is a run of its own, in the folder itself.
  """
  ended = start(
    MAIN,
    '--config=configs/ppo_ptx.py:smoke',
    f'--workdir={folder}',
    "--config.stage_order=('data',)",
    '--config.stages.data.num_prompts=400',
    '--config.compilation_cache=',
  )
  assert ended.returncode == 0, ended.stderr
  documents = folder / 'documents.jsonl'
  shutil.copy(folder / 'data' / 'documents_train.jsonl', documents)
  source = CONFIG.replace('NUM_STEPS', str(NUM_STEPS))
  for name, value in (('FOLDER', folder), ('CACHE', folder / 'cache')):
    source = source.replace(name, repr(str(value)))
  (folder / 'config.py').write_text(source)
  return folder
