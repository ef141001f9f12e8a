"""What Ouyang et al. 2022 print, and what the configs and tasks have.

One table: where it is printed, the config, the key, the value. Values that the
paper does not print are choices, and not here.
"""

import importlib

import pytest

from experiments import ppo_ptx
from instruct_jax.evals.benchmarks import tasks
from instruct_jax.models.config import PRESETS

SIZES = ('1p3b', '6b', '175b')
# (section, config file, its argument with {} for the size, key, value or one
# for each size).
FACTS = (
  ('C', 'sft', '{}', 'adam_b1', 0.9),
  ('C', 'sft', '{}', 'adam_b2', 0.95),
  ('C', 'reward', '{}', 'adam_b1', 0.9),
  ('C', 'reward', '{}', 'adam_b2', 0.95),
  ('C', 'ppo_ptx', '{}', 'adam_b1', 0.9),
  ('C', 'ppo_ptx', '{}', 'adam_b2', 0.95),
  ('C', 'sft', '{}', 'row_length', 2048),
  ('C', 'reward', '{}', 'row_length', 2048),
  ('C', 'ppo_ptx', '{}', 'prompt_length', 1024),
  ('C', 'ppo_ptx', '{}', 'response_length', 1024),
  ('C.1', 'sft', '{}', 'num_epochs', 16),
  ('C.1', 'sft', '{}', 'dropout', 0.2),
  ('C.1', 'sft', '{}', 'learning_rate', (9.65e-6, 9.65e-6, 5.03e-6)),
  ('C.1', 'sft', '{}', 'batch_size', (32, 32, 8)),
  ('C.2', 'reward', '{}', 'num_epochs', 1),
  ('C.2', 'reward', '{}', 'learning_rate', 9e-6),
  ('C.2', 'reward', '{}', 'batch_size', 64),
  ('3.5', 'reward', '{}', 'max_candidates', 9),
  ('3.5', 'reward', '{}', 'split_pairs', False),
  ('E.2', 'reward', '{},folds', 'num_folds', 5),
  ('E.2', 'reward', '{},folds', 'num_fold_seeds', 3),
  ('E.2', 'reward', '{},folds', 'learning_rate', 9e-6),
  ('C.3', 'sft', '{},init', 'num_epochs', 2),
  ('C.3', 'sft', '{},init', 'ptx_fraction', 0.1),
  ('C.3', 'sft', '{},init', 'learning_rate', (5e-6, 1.04e-5, 2.45e-6)),
  ('C.3', 'sft', '{},init', 'batch_size', (32, 32, 8)),
  ('C.4', 'ppo_ptx', '{}', 'num_episodes', 256_000),
  ('C.4', 'ppo_ptx', '{}', 'batch_size', 512),
  ('C.4', 'ppo_ptx', '{}', 'num_minibatches', 8),
  ('C.4', 'ppo_ptx', '{}', 'num_epochs', 1),
  ('C.4', 'ppo_ptx', '{}', 'num_warmup_iterations', 10),
  ('C.4', 'ppo_ptx', '{}', 'ema_decay', 0.992),
  ('C.4', 'ppo_ptx', '{}', 'clip', 0.2),
  ('C.4', 'ppo_ptx', '{}', 'discount', 1.0),
  ('C.4', 'ppo_ptx', '{}', 'temperature', 1.0),
  ('C.4', 'ppo_ptx', '{}', 'kl_coef', 0.02),
  ('C.4', 'ppo_ptx', '{}', 'ptx_coef', 27.8),
  ('C.4, E.11', 'ppo_ptx', '{}', 'ptx_per_episode', 8),
  ('C.4', 'ppo_ptx', '{}', 'value_learning_rate', (9e-6, 9e-6, 5e-6)),
  ('2, 3.5', 'ppo_ptx', '{}', 'kl_estimator', 'k1'),
  ('2, 3.5', 'ppo_ptx', '{}', 'kl_in', 'reward'),
  # Shapes and rates of pretraining: Brown et al. 2020, Stiennon et al. 2020.
  ('B.1 of Stiennon', 'pretrain', '{}', 'learning_rate', (2e-4, 1.2e-4, 6e-5)),
)
# Appendix D: few-shot examples of a task.
SHOTS = {
  'drop': 4,
  'quac': 2,
  'squadv2': 4,
  'hellaswag': 15,
  'rte': 15,
  'sst': 15,
  'wsc': 15,
  'fr_to_en': 15,
}


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize(
  'fact', FACTS, ids=lambda fact: f'{fact[0]}-{fact[1]}-{fact[3]}'
)
def test_a_config_has_the_printed_value(fact, size):
  section, file, argument, key, value = fact
  config = importlib.import_module(f'configs.{file}').get_config(
    argument.format(size)
  )
  if isinstance(value, tuple):
    value = value[SIZES.index(size)]
  assert config[key] == value, f'{section}: {file}:{argument}'


@pytest.mark.parametrize('size', SIZES)
def test_rates_that_were_scanned(size):
  # E.9 does not print the choices.
  config = importlib.import_module('configs.ppo_ptx').get_config(size)
  assert 2.55e-6 <= config.learning_rate <= 2.55e-5
  ppo_ptx.validate(config)


@pytest.mark.parametrize(
  'size,shape',
  [
    ('1p3b', (24, 2048, 16, 128)),
    ('6b', (32, 4096, 32, 128)),
    ('175b', (96, 12288, 96, 128)),
  ],
)
def test_the_shape_of_a_model(size, shape):
  config = importlib.import_module('configs.pretrain').get_config(size)
  keys = ('num_layers', 'width', 'num_heads', 'head_dim')
  assert tuple(config.model[key] for key in keys) == shape
  assert {k: config.model[k] for k in PRESETS[size]} == dict(PRESETS[size])
  # 300 billion tokens.
  tokens = config.num_steps * config.batch_size * config.row_length
  assert abs(tokens - 300e9) < config.batch_size * config.row_length


@pytest.mark.parametrize('name,number', SHOTS.items())
def test_a_task_has_the_printed_number_of_examples(name, number):
  assert tasks.TASKS[name].num_shots == number
