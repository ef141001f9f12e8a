"""Model folders: what is passed from stage to stage."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from instruct_jax import model_fns, model_folder
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import sharding
from instruct_jax.infra.checkpoint import CheckpointError
from tests import tiny

WORDS = [f'w{number}' for number in range(27)]
TOKENIZER = tokenizer_lib.train_word_level(WORDS)


@pytest.fixture
def folder(tmp_path):
  """A saved reward model whose scores were shifted by 1.25."""
  params = tiny.params('scalar')
  model = model_fns.Model(
    'scalar',
    tiny.SCALAR,
    {**params, 'head_bias': params['head_bias'] - jnp.float32(1.25)},
    {},
  )
  model_folder.save(
    tmp_path / 'model', model, TOKENIZER, {'reward_shift': 1.25}
  )
  return tmp_path / 'model'


def test_a_model_comes_back_as_it_was_on_another_mesh(folder):
  mesh = sharding.make_mesh((2, 2, 2))
  model = model_folder.load(folder, 'scalar', mesh, TOKENIZER)
  expected = tiny.params('scalar')
  tiny.assert_trees_equal(model.params['trunk'], expected['trunk'])
  assert model.config == tiny.CONFIG
  assert model.metadata == {'reward_shift': 1.25}
  embedding = model.params['trunk']['token_embedding']
  assert embedding.sharding.spec == PartitionSpec('tensor', 'fsdp')


def test_the_reward_shift_travels_with_the_parameters(folder):
  """Demonstrations score 0 on average wherever the model is used."""
  model = model_folder.load(folder, 'scalar', tiny.one_device(), TOKENIZER)
  text = tiny.text()
  arguments = jnp.asarray(text.tokens), jnp.asarray(text.segments)
  before = tiny.forward(
    tiny.params('policy'), tiny.params('scalar'), *arguments
  )
  after = tiny.forward(tiny.params('policy'), model.params, *arguments)
  np.testing.assert_allclose(
    after['scalars'], before['scalars'] - 1.25, atol=1e-5
  )


def test_switches_change_on_loading_and_shapes_do_not(folder):
  mesh = tiny.one_device()
  model = model_folder.load(
    folder, 'scalar', mesh, TOKENIZER, remat='full', dropout=0.2
  )
  assert model.config == dataclasses.replace(
    tiny.CONFIG, remat='full', dropout=0.2
  )
  with pytest.raises(CheckpointError, match='position_embedding'):
    model_folder.load(folder, 'scalar', mesh, TOKENIZER, context_length=48)


def test_what_does_not_fit_is_refused_with_both_names(folder):
  mesh = tiny.one_device()
  ours = TOKENIZER.fingerprint[:12]
  other = tokenizer_lib.train_word_level(WORDS[::-1])
  with pytest.raises(CheckpointError, match='scalar model where a policy'):
    model_folder.load(folder, 'policy', mesh, TOKENIZER)
  with pytest.raises(
    CheckpointError, match=f'{ours}.* uses {other.fingerprint[:12]}'
  ):
    model_folder.load(folder, 'scalar', mesh, other)
  with pytest.raises(CheckpointError, match='no model in'):
    model_folder.check(folder.parent / 'nowhere', 'scalar', TOKENIZER)


def test_a_mesh_is_chosen_for_the_models_of_a_stage(folder):
  """Four heads; eight devices."""

  def shape(given, rows):
    mesh = model_folder.make_mesh(given, [folder, folder], rows)
    return tuple(mesh.shape.values())

  assert shape((), [16, 64]) == (1, 8, 1)
  assert shape((), [12, 64]) == (1, 4, 2)
  # Two rows would want four parts of the heads, one row eight.
  assert shape((), [2]) == (1, 2, 4)
  assert shape((), [1]) == (1, 8, 1)
  assert shape((2, 2, 2), [1]) == (2, 2, 2)
  with pytest.raises(CheckpointError, match='nowhere'):
    model_folder.make_mesh((), [f'{folder}/nowhere'], [16])
