"""From clicks on the labeling site to a trained reward model."""

import json

import jax
import pytest

pytest.importorskip('starlette', reason='pip install -r requirements-labeling')
pytest.importorskip('sqlalchemy')

from etils import epath

from configs import reward as config_file
from configs import sample as sample_config_file
from experiments import reward
from instruct_jax import model_fns, model_folder, run_figures
from instruct_jax.data import records, tokenizer
from instruct_jax.evals import model_card, sections
from instruct_jax.infra import sharding
from instruct_jax.jobs import crossval, sample
from instruct_jax.labeling import exporting, importing
from instruct_jax.models.config import TransformerConfig
from tests import labeling_people as people
from tests import made_figures

pytestmark = pytest.mark.usefixtures('quick_compile')
WORDS = ['Prompt', 'number', 'text']


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  """Five labelers rank; returns the folder of the export."""
  folder = epath.Path(tmp_path_factory.mktemp('labels'))
  site = people.Site(
    f'sqlite:///{folder}/site.sqlite',
    folder,
    valid_fraction=0.4,
    requests_per_minute=100_000,
  )
  site.load(people.ranking_items(16, 3), overlap=5)
  site.load(
    [{'prompt': f'Prompt number {i}'} for i in range(4)], 'demonstration'
  )
  for i in range(5):
    person = site.person(f'labeler{i}')
    while (task := person.claim()) is not None:
      if person.num_pages(task) == 1:
        person.fill(task, 0, response='text 0')
      else:
        person.rank(task, people.rank_of)
  exporting.export(site.store, folder / 'out')
  return folder / 'out'


def make_config(exported, workdir, folds):
  config = config_file.get_config('6b,folds' if folds else '6b')
  tokens = tokenizer.train_word_level([*WORDS, *map(str, range(16))])
  tokens.save(workdir / 'tokenizer')
  shape = TransformerConfig(
    vocab_size=tokens.vocab_size,
    context_length=32,
    num_layers=1,
    width=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    compute_dtype='float32',
  )
  mesh = sharding.make_mesh((1, -1, 1))
  with sharding.use_mesh(mesh):
    model = model_fns.init('policy', shape, mesh, jax.random.key(0))
    model_folder.save(workdir / 'sft', model, tokens, {})
  config.tokenizer = str(workdir / 'tokenizer')
  config.init = str(workdir / 'sft')
  config.data.comparisons = str(exported)
  config.row_length = 32
  config.batch_size = 8  # Of eight fake devices.
  config.num_microbatches = 1
  config.learning_rate = 1e-2
  config.num_epochs = 3
  config.remat = 'none'
  if folds:
    config.num_fold_seeds = 1
    config.num_epochs = 1
  return config


def test_a_reward_model_trains_on_the_export(exported, workdir):
  config = make_config(exported, epath.Path(workdir), folds=False)
  results = reward.run(config, epath.Path(workdir) / 'reward')
  # Everybody ranks the three texts the same, so there is something to learn.
  assert results['accuracy'] > 0.9
  assert results['num_dropped'] == 0
  train = records.read_jsonl(config.comparisons, records.Comparison)
  assert results['num_comparisons'] == len(train)
  assert results['num_forwards'] == 3 * results['num_prompts']
  assert results['num_prompts'] == len(train) / 5  # Everybody ranked each.


@pytest.mark.parametrize(
  'num_folds', [pytest.param(n, marks=pytest.mark.slow) for n in (2, 5)]
)
def test_labeler_cross_validation_runs_on_the_export(
  exported, workdir, num_folds
):
  config = make_config(exported, epath.Path(workdir), folds=True)
  assert config.num_folds == 5  # E.2, unless changed here.
  config.num_folds = num_folds
  results = crossval.run(config, epath.Path(workdir) / 'folds')
  assert sorted(sum(results['folds'], [])) == [f'labeler{i}' for i in range(5)]
  assert len(results['runs']) == num_folds


def test_labelers_without_held_out_rankings_are_named(
  exported, workdir, tmp_path
):
  """Before any fold is trained."""
  config = make_config(exported, epath.Path(workdir), folds=True)
  rows = records.read_jsonl(config.valid_comparisons, records.Comparison)
  records.write_jsonl(
    tmp_path / 'fewer.jsonl', [c for c in rows if c.labeler != 'labeler3']
  )
  config.valid_comparisons = str(tmp_path / 'fewer.jsonl')
  with pytest.raises(ValueError, match='valid_comparisons: .* labeler3, who'):
    crossval.run(config, epath.Path(tmp_path) / 'folds')
  assert not (tmp_path / 'folds').exists()


def test_no_user_is_in_both_splits(exported):
  users = {
    name: {
      row.user
      for row in records.read_jsonl(
        exported / f'comparisons_{name}.jsonl', records.Comparison
      )
    }
    for name in ('train', 'valid')
  }
  assert users['train'] and users['valid']
  assert not users['train'] & users['valid']


def test_statistics_reach_the_model_card(exported):
  found = json.loads((exported / 'statistics.json').read_text())
  assert found['num_labelers'] == 5
  assert found['agreement']['labelers']['rate'] == 1.0
  assert found['by_kind'] == {'ranking': 80, 'demonstration': 4}
  assert {p['name'] for p in found['labelers']} >= {'labeler0', 'labeler4'}
  # In a pipeline, the statistics are in the same folder as the rankings.
  assert (
    run_figures.of_labeling([str(exported / 'comparisons_train.jsonl')])
    == found
  )
  shown = made_figures.full(labeling=found)
  card = model_card.make_card(shown)
  assert '| labelers | 5 |' in card
  assert '| answers of kind ranking | 80 |' in card
  assert '| agreement, labelers | 1.000 [1.000, 1.000]' in card
  assert '| labeler3 | labeler | 16 |' in card
  assert sections.labelers(shown)['agreement of labelers'].rate == 1.0
  assert run_figures.of_labeling([str(exported / 'none' / 'x.jsonl')]) == {}


def test_samples_of_checkpoints_become_tasks(exported, tmp_path):
  folder = epath.Path(tmp_path)
  model = make_config(exported, folder, folds=False)
  turns = (records.Turn('user', 'Prompt number 2'),)
  records.write_jsonl(
    folder / 'prompts.jsonl',
    [
      records.Prompt(id='a', text='Prompt number 1', user='u'),
      records.Prompt(id='b', text='Prompt ' * 9),
      records.Prompt(id='c', text='Prompt number 2', turns=turns),
    ],
  )
  config = sample_config_file.get_config()
  config.models = f'first={model.init},second={model.init}'
  config.tokenizer = model.tokenizer
  config.prompts = str(folder / 'prompts.jsonl')
  config.prompt_length = config.response_length = 4
  assert sample.run(config, folder / 'sample') == {'prompts': 2, 'dropped': 1}
  content = (folder / 'sample' / 'samples.jsonl').read_bytes()
  line, conversation = map(json.loads, content.splitlines())
  assert conversation['turns'] == [
    {'role': 'user', 'content': 'Prompt number 2'}
  ]
  assert line['models'] == ['first', 'first', 'second', 'second']
  assert [type(value) for value in line['ended']] == [bool] * 4
  # Every completion is sampled independently.
  assert len(set(line['completions'])) > 1
  site = people.Site(f'sqlite:///{tmp_path}/site.sqlite', tmp_path)
  counts = importing.import_tasks(
    site.store,
    content,
    source='samples.jsonl',
    name='samples',
    kind='ranking',
    phase='training',
    overlap=1,
  )
  assert counts == {'tasks': 2}
  config.samples_per_model = 0
  with pytest.raises(ValueError, match='nothing to rank'):
    sample.validate(config)
  assert sample._MOST_COMPLETIONS == importing.MAX_OUTPUTS
  config.samples_per_model = importing.MAX_OUTPUTS + 1
  with pytest.raises(ValueError, match=r'completions; a ranking task has at m'):
    sample.validate(config)
