"""Every config loads and validates; paper sizes carry the paper's numbers."""

import importlib

import jax
import pytest
from etils import epath

from configs import ppo_ptx as ppo_config_file
from configs import tax as tax_config_file
from instruct_jax import model_fns, rl
from instruct_jax.infra import pipeline, sharding, train_state
from instruct_jax.infra import stages as stages_lib
from instruct_jax.jobs import tax as tax_experiment
from instruct_jax.models.config import PRESETS, TransformerConfig

SIZES = ('1p3b', '6b', '175b')


@pytest.mark.parametrize('variant', ['miniature', 'smoke', 'e2e'])
def test_every_stage_of_a_pipeline_validates(variant, tmp_path):
  config = ppo_config_file.get_config(variant)
  if variant == 'e2e':
    for name in ('e2e_nlg', 'e2e_rankings', 'books'):
      (tmp_path / name).mkdir()
    config.data.root = str(tmp_path)
  assert set(config.stage_order) == set(config.stages)
  for name in config.stage_order:
    stage = config.stages[name]
    assert stage.name == name
    pipeline.find_experiment(stage.experiment).validate(stage)


def test_rankings_of_people_reach_the_model_card():
  config = ppo_config_file.get_config('smoke')
  config.stages.reward.comparisons = '/export/comparisons_train.jsonl'
  assert config.stages.evaluate.comparisons == (
    'training labelers=/export/comparisons_train.jsonl'
  )


def test_workdir_and_seed_reach_every_stage():
  config = ppo_config_file.get_config('smoke')
  config.seed = 7
  with config.unlocked():
    config.workdir = '/somewhere'
  assert {stage.seed for stage in config.stages.values()} == {7}
  assert config.stages.ppo.init == '/somewhere/rl_init/model'
  assert config.stages.ppo.ptx_coef == 0
  assert config.stages.ppo_ptx.ptx_coef > 0


def test_the_tax_is_swept_on_the_models_of_a_finished_run(tmp_path):
  config = tax_config_file.get_config('smoke')
  (*names, last) = config.stage_order
  assert last == 'tax' and set(config.stage_order) == set(config.stages)
  for name in names:
    stage = config.stages[name]
    assert stage.name == name
    pipeline.find_experiment(stage.experiment).validate(stage)
  plot = config.stages.tax
  with pytest.raises(ValueError, match='source is empty'):
    tax_experiment.validate(plot)
  config.source = str(tmp_path)
  tax_experiment.validate(plot)
  stages = stages_lib.of_run(
    config, config, epath.Path(tmp_path / 'run'), pipeline.find_experiment
  )
  with pytest.raises(ValueError, match='rl_init/model: no such file') as error:
    stages_lib.find_missing(stages)
  # One line an input, though each of eleven stages wants it.
  assert len(str(error.value).splitlines()) == 6
  for part in ('rl_init/model', 'reward/model', 'data/tokenizer'):
    (tmp_path / part).mkdir(parents=True)
  for part in ('ppo_prompts_train', 'documents_train', 'documents_valid'):
    (tmp_path / f'data/{part}.jsonl').touch()
  assert stages_lib.find_missing(stages) == {}
  run = ppo_config_file.get_config('smoke').stages.ppo_ptx
  gamma, beta, long = (
    [config.stages[name] for name in plot.figures[f'figure{number}']]
    for number in (33, 34, 35)
  )
  assert [s.ptx_coef / run.ptx_coef for s in gamma] == [0, 0.1, 1, 10]
  assert {s.kl_coef for s in gamma} == {run.kl_coef}
  assert [s.kl_coef / run.kl_coef for s in beta] == pytest.approx(
    [0.3, 1, 10, 100]
  )
  assert {s.ptx_coef for s in beta} == {0}
  assert {s.num_episodes for s in long} == {2 * run.num_episodes}
  assert [s.seed for s in long] == [0, 1, 2]
  config.num_episodes = 64
  assert (beta[0].num_episodes, long[0].num_episodes) == (64, 128)
  assert long[0].init == f'{tmp_path}/rl_init/model'
  assert long[0].documents == f'{tmp_path}/data/documents_train.jsonl'


@pytest.mark.parametrize('size', SIZES)
def test_paper_sizes_build_their_abstract_ppo_state(size):
  mesh = sharding.make_mesh((1, -1, 1))
  shape = TransformerConfig.from_dict(PRESETS[size])
  value_shape = TransformerConfig.from_dict(PRESETS['6b'])
  optimizers = rl.make_optimizers(ppo_config_file.get_config(size))
  for kind, config, tx in (
    ('policy', shape, optimizers['policy']),
    ('scalar', value_shape, optimizers['value']),
  ):
    params = model_fns.abstract_params(kind, config, mesh)
    state = jax.eval_shape(
      lambda params, tx=tx: train_state.create(params, tx), params
    )
    count = sum(x.size for x in jax.tree.leaves(state.params))
    head = config.width + 1 if kind == 'scalar' else 0
    assert count == config.num_params + head
    # Adam holds two more copies.
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state))
    assert 2 * count <= moments <= 2 * count + 10


@pytest.mark.parametrize(
  'name,key,value,text',
  [
    ('ppo_ptx', 'num_minibatches', 7, 'num_minibatches 7'),
    ('ppo_ptx', 'num_episodes', 1000, 'num_episodes 1000'),
    ('ppo_ptx', 'temperature', 0.0, 'temperature'),
    ('ppo_ptx', 'num_slices', 3, 'num_slices 3'),
    ('ppo_ptx', 'num_slots', 10**6, 'num_slots'),
    ('ppo_ptx', 'frozen_dtype', 'int8', "frozen_dtype.*'int8'"),
    ('ppo_ptx', 'pack_episodes', 0, 'pack_episodes'),
    ('ppo_ptx', 'sampler_tolerance', -1.0, 'sampler_tolerance'),
    ('ppo_ptx', 'ema_every', 'often', 'ema_every'),
    ('ppo_ptx', 'gae_lambda', 1.5, r'gae_lambda must be in \[0, 1\]: 1.5'),
    ('ppo_ptx', 'discount', float('nan'), 'discount must be in .*: nan'),
    ('pretrain', 'num_warmup', 2000, 'num_warmup must be from 0 to below'),
    ('sft', 'ptx_fraction', 1.5, 'ptx_fraction'),
    ('sft', 'num_microbatches', 5, 'num_microbatches 5'),
    ('reward', 'divisor', 'some', 'divisor'),
    ('crossval', 'num_folds', 1, 'num_folds'),
    ('pretrain', 'row_length', 4096, 'row_length 4096'),
    ('compare', 'min_candidates', 1, 'min_candidates'),
    ('compare', 'policies.sft.share', 0.0, "share must be above 0.*'sft': 0"),
    ('compare', 'policies.sft.temperature', -1.0, 'sft.temperature'),
    ('compare', 'rankers_per_prompt', 31, 'from 1 to 30.* among 40, got 31'),
    ('compare', 'rankers_per_valid', 0, 'rankers_per_valid'),
    ('evaluate', 'judge', 'me', 'judge'),
    ('select', 'num_prompts', 0, 'num_prompts'),
    ('data', 'num_reward_prompts', 10**6, 'num_reward_prompts'),
  ],
)
def test_bad_values_are_named(name, key, value, text):
  config = ppo_config_file.get_config('miniature').stages[name]
  with config.unlocked():
    config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=text):
    pipeline.find_experiment(config.experiment).validate(config)


@pytest.mark.parametrize(
  ('changes', 'text'),
  [
    ({'kl_coef': 0.0}, 'kl_coef must be positive if kl_target is set.*: 0.0'),
    ({'kl_horizon': 127}, 'kl_horizon counts .* the batch_size 128: 127'),
  ],
)
def test_a_kl_coefficient_that_cannot_adapt_is_refused(changes, text):
  config = ppo_config_file.get_config('miniature').stages.ppo
  with config.unlocked():
    config.update(kl_target=6.0, kl_horizon=128)
  rl.validate(config)
  config.update(changes)
  with pytest.raises(ValueError, match=text):
    rl.validate(config)


def test_adapters_may_offload_a_reward_model_that_is_no_base():
  config = ppo_config_file.get_config('miniature').stages.ppo
  with config.unlocked():
    config.lora.rank = 2
    config.update(offload=('reward',), value_from='policy')
  rl.validate(config)
  config.value_from = 'reward_model'
  with pytest.raises(ValueError, match="'reward' are also the base of the val"):
    rl.validate(config)


def test_numbers_of_the_method_have_no_defaults():
  config = ppo_config_file.get_config('miniature').stages.ppo
  with config.unlocked():
    del config.clip, config.value_clip
  with pytest.raises(ValueError, match='ppo: keys are missing: clip, value_'):
    rl.method_of(config)
  # Without a value model it has none of these.
  rloo = importlib.import_module('configs.rloo').get_config().stages.rloo
  assert rl.method_of(rloo).clip == rloo.clip


@pytest.mark.parametrize(
  'name',
  ['sft', 'reward', 'ppo_ptx', 'nlp_suite', 'evaluate', 'sample', 'best_of_n']
  + ['center_reward', 'select', 'compare', 'crossval', 'rloo', 'dpo']
  + ['reward_bench', 'chat_bench'],
)
def test_every_stage_that_loads_a_model_takes_a_compute_dtype(name):
  if name in (
    'sample',
    'best_of_n',
    'center_reward',
    'reward_bench',
    'chat_bench',
  ):
    config = importlib.import_module(f'configs.{name}').get_config()
  elif name in ('rloo', 'dpo'):
    whole = importlib.import_module(f'configs.{name}').get_config()
    config = whole.stages[name]
  else:
    config = ppo_config_file.get_config('miniature').stages[name]
  assert config.compute_dtype == ''
  config.compute_dtype = 'float16'
  with pytest.raises(ValueError, match="compute_dtype must be .*'float16'"):
    pipeline.find_experiment(config.experiment).validate(config)


@pytest.mark.parametrize(
  'name', ['pretrain', 'sft', 'reward', 'ppo_ptx', 'rloo', 'dpo']
)
def test_unknown_variants_are_refused(name):
  with pytest.raises(ValueError, match='2t'):
    importlib.import_module(f'configs.{name}').get_config('2t')
