"""The smoke pipeline on 8 fake devices: it finishes, resumes, and complains.

One run is shared by all tests here; each works on a copy of its directory.
"""

import dataclasses
import json
import pathlib
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import dpo as dpo_config
from configs import ppo_ptx as config_file
from configs import rloo as rloo_config
from experiments import dpo, ppo_ptx, pretrain, reward, rloo, sft
from instruct_jax import model_fns, model_folder
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import (
  checkpoint,
  metrics,
  pipeline,
  run,
  sharding,
  train_state,
)

SUMMARY_KEYS = {
  'win_rate',
  'reward_model',
  'pretraining_loss',
  'kl',
  'metadata',
  'seconds',
  'seed',
  'commit',
  'versions',
}


PROBE_FILE = pathlib.Path(__file__).parent / 'probe_winogender.tsv'


def make_config(workdir):
  config = config_file.get_config('smoke')
  ppo = config.stages.ppo
  ppo.snapshot_every = ppo.probe_every = 2
  ppo.probes = f'winogender={PROBE_FILE}'
  config.stages.nlp_suite.data.winogender = str(PROBE_FILE)
  described = config.copy_and_resolve_references()
  with config.unlocked():
    config.workdir = str(workdir)
  return config, described


@pytest.fixture(scope='module')
def finished(tmp_path_factory, quick_compile):
  workdir = epath.Path(tmp_path_factory.mktemp('smoke'))
  config, described = make_config(workdir)
  pipeline.run_all(config, workdir, described)
  return workdir


@pytest.fixture
def copied(finished, tmp_path):
  shutil.copytree(finished, tmp_path / 'run')
  return epath.Path(tmp_path / 'run')


def lines(folder):
  return metrics.read_lines(folder / metrics.METRICS_FILE)


def test_the_report_is_complete(finished):
  summary = json.loads((finished / 'summary.json').read_text())
  assert set(summary) >= SUMMARY_KEYS
  models = {'pretrained', 'prompted', 'sft', 'ppo', 'ppo_ptx'}
  assert set(summary['win_rate']) == models
  for rate in summary['win_rate'].values():
    assert 0 <= rate['low'] <= rate['rate'] <= rate['high'] <= 1
  assert summary['win_rate']['sft']['rate'] == 0.5
  for name in ('accuracy', 'ceiling', 'intra', 'inter', 'agreement'):
    assert 0 < summary['reward_model'][name] < 1
  assert set(summary['seconds']) >= {'pretrain', 'sft', 'reward', 'ppo_ptx'}
  for plot in ('win_rate', 'reward_kl', 'pretraining_loss', 'sft'):
    assert (finished / f'{plot}.png').stat().length > 1000
  assert 'win rate' in (finished / 'report.md').read_text().lower()


def test_card_and_page_are_written(finished):
  card = (finished / 'model_card.md').read_text()
  assert 'not people' in card
  summary = json.loads((finished / 'summary.json').read_text())
  assert f'{summary["win_rate"]["ppo_ptx"]["rate"]:.3f}' in card
  for stage in ('pretrain', 'sft', 'rl_init', 'reward', 'ppo', 'ppo_ptx'):
    assert f'**{stage}**' in card
  suite = json.loads((finished / 'nlp_suite' / 'suite.json').read_text())
  for cell in suite['cells']:
    assert f'{cell["score"]:.3f} [{cell["low"]:.3f}' in card
  assert 'winogender, basic prompt' in card
  assert 'NLP suite (TruthfulQA' not in card  # It was not left out.
  likert = summary['likert']['ppo_ptx']
  assert 1 <= likert['low'] <= likert['mean'] <= likert['high'] <= 7
  assert f'{likert["mean"]:.3f}' in card
  page = (finished / 'report.html').read_text()
  assert 'Overall quality, 1 to 7' in page
  assert page.count('data-number=') == 48  # Every held-out prompt.
  assert (finished / 'probes.png').stat().length > 1000


def test_probes_and_snapshots_along_rl(finished):
  rows = lines(finished / 'ppo')
  key = 'winogender_basic_prompt_entropy'
  assert [f'probe/{key}' in row for row in rows] == [False, True, True]
  assert 0 <= rows[0][f'probe_before/{key}'] <= 1
  assert f'probe_before/{key}' not in rows[1]
  # PPO moved the policy between the two askings.
  assert rows[1][f'probe/{key}'] != rows[2][f'probe/{key}']
  snapshots = finished / 'ppo' / 'snapshots'
  assert [path.name for path in snapshots.iterdir()] == ['2']
  assert not (finished / 'ppo_ptx' / 'snapshots').exists()


def test_the_first_update_starts_at_the_reference(finished):
  for name in ('ppo', 'ppo_ptx'):
    first = lines(finished / name)[0]
    assert abs(first['objective/kl']) < 1e-4
    assert abs(first['first/ppo/policy/ratio'] - 1) < 1e-5
    assert first['first/ppo/policy/clipfrac'] == 0
    assert first['objective/sampler_difference'] < 1e-4


def test_rankings_say_which_answers_were_cut(finished):
  """An answer that ended has a place left for its end token; a cut one none."""
  config = config_file.get_config('smoke').stages.compare
  tokenizer = tokenizer_lib.Tokenizer.load(finished / 'data' / 'tokenizer')
  for name in ('train', 'valid', 'heldout'):
    rankings = records.read_jsonl(
      finished / 'compare' / f'comparisons_{name}.jsonl', records.Comparison
    )
    ended = [end for each in rankings for end in each.ended]
    texts = [text for each in rankings for text in each.completions]
    sizes = np.array([*map(len, tokenizer.encode_responses(texts))])
    assert len(ended) == len(texts) and {True, False} == set(ended)
    np.testing.assert_array_equal(ended, sizes < config.response_length)
    # So the reward model reads what was sampled, and nothing after it.
    _, answers, _ = loader.comparison_ids(rankings, tokenizer)
    longest = max(len(ids) for each in answers for ids in each)
    assert longest == config.response_length


def test_the_report_judges_the_reward_model_as_its_training_did(finished):
  """On the same rankings, with the ends that were sampled."""
  told = json.loads((finished / 'reward' / 'results.json').read_text())
  found = json.loads((finished / 'summary.json').read_text())['reward_model']
  # Equal scores in other batches may round apart.
  assert found['accuracy'] == pytest.approx(told['accuracy'], abs=2e-3)


def test_demonstrations_score_zero_after_save_and_load(finished):
  from instruct_jax.data import loader, records, tokenizer
  from instruct_jax.infra import sharding

  config, _ = make_config(finished)
  config = config.stages.reward
  tokens = tokenizer.Tokenizer.load(config.tokenizer)
  rows, _ = loader.demonstration_rows(
    records.read_jsonl(config.demonstrations, records.Demonstration),
    tokens,
    config.row_length,
    loss_on='response',
    pack=False,
  )
  mesh = sharding.make_mesh((1, -1, 1))
  model = model_folder.load(
    config.workdir + '/reward/model', 'scalar', mesh, tokens
  )
  scalars = jax.jit(model_fns.scalars_fn(model.module))(
    model.params, rows.tokens, rows.segments
  )
  last = rows.mask.sum(axis=1) - 1
  scores = np.asarray(scalars)[np.arange(len(last)), last]
  assert abs(scores.mean()) < 1e-5


def test_a_finished_run_does_nothing(finished):
  config, described = make_config(finished)
  before = (finished / 'ppo_ptx' / 'metrics.jsonl').stat().mtime
  pipeline.run_all(config, finished, described)
  assert (finished / 'ppo_ptx' / 'metrics.jsonl').stat().mtime == before


def stop_after(looks):
  """A `StopSignal` to which SIGTERM comes after a number of looks."""

  class StopAfter(run.StopSignal):
    @property
    def requested(self):
      nonlocal looks
      looks -= 1
      return looks < 0

  return StopAfter


@pytest.mark.parametrize(
  'name,experiment,looks,outputs',
  [
    ('ppo_ptx', ppo_ptx, 1, ('policy', 'ema')),
    ('sft', sft, 0, ('model', 'epochs/2')),
    ('reward', reward, 0, ('model',)),
  ],
)
def test_stopped_and_resumed_equals_uninterrupted(
  finished, copied, monkeypatch, name, experiment, looks, outputs
):
  config, _ = make_config(copied)
  stage = config.stages[name]
  folder = copied / name
  shutil.rmtree(folder)
  if name != 'ppo_ptx':
    stage.log_every = stage.checkpoint_every = 4
    reference = copied / 'uninterrupted'
    reference.mkdir()
    experiment.run(stage, reference)
  else:
    reference = finished / name
    # Where weights wait changes nothing but the memory.
    stage.offload = ('ema', 'reference', 'reward')
    stage.snapshot_every = 1
  folder.mkdir()
  with monkeypatch.context() as patch:
    patch.setattr(run, 'StopSignal', stop_after(looks))
    with pytest.raises(run.Stopped) as stopped:
      experiment.run(stage, folder)
  assert stopped.value.code == 75
  assert len(lines(folder)) < len(lines(reference))
  experiment.run(stage, folder)
  assert lines(folder) == lines(reference)
  if name == 'ppo_ptx':  # The iteration at which it was stopped has one, too.
    assert sorted(path.name for path in (folder / 'snapshots').iterdir()) == [
      str(done) for done in range(1, len(lines(folder)))
    ]
  for output in outputs:
    resumed, _ = checkpoint.load_model(folder / output)
    expected, _ = checkpoint.load_model(reference / output)
    jax.tree.map(np.testing.assert_array_equal, resumed, expected)


@pytest.mark.parametrize(
  'name, experiment, looks, output',
  [
    pytest.param('rloo', rloo, 1, 'policy', marks=pytest.mark.slow),
    ('dpo', dpo, 1, 'model'),
  ],
)
def test_forks_resume_bit_for_bit(
  finished, copied, monkeypatch, name, experiment, looks, output
):
  """RLOO and DPO on what the pipeline made."""
  config = {'rloo': rloo_config, 'dpo': dpo_config}[name].get_config('smoke')
  config.workdir = str(copied)
  stage = config.copy_and_resolve_references().stages[name]
  stage.checkpoint_every = 1
  if name == 'dpo':
    stage.log_every = 1
  folders = [copied / f'{name}{number}' for number in range(2)]
  for folder in folders:
    folder.mkdir()
  experiment.run(stage, folders[0])
  with monkeypatch.context() as patch:
    patch.setattr(run, 'StopSignal', stop_after(looks))
    with pytest.raises(run.Stopped):
      experiment.run(stage, folders[1])
  assert 0 < len(lines(folders[1])) < len(lines(folders[0]))
  experiment.run(stage, folders[1])
  assert lines(folders[0]) == lines(folders[1])
  whole, resumed = (
    checkpoint.load_model(folder / output)[0] for folder in folders
  )
  jax.tree.map(np.testing.assert_array_equal, whole, resumed)
  started, _ = checkpoint.load_model(copied / 'rl_init' / 'model')
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole, started)
  assert min(jax.tree.leaves(moved)) > 0


def experiment_stage(name, workdir):
  """A stage of PPO-ptx's pipeline, or of a fork's, on what it made."""
  makers = {'rloo': rloo_config, 'dpo': dpo_config}
  config = makers.get(name, config_file).get_config('smoke')
  config.workdir = str(workdir)
  config.lora.rank = 2
  return config.copy_and_resolve_references().stages[name]


@pytest.mark.parametrize(
  'name, experiment, outputs',
  [
    pytest.param('sft', sft, ('model', 'epochs/2'), marks=pytest.mark.slow),
    ('reward', reward, ('model',)),
    pytest.param('ppo_ptx', ppo_ptx, ('policy', 'ema'), marks=pytest.mark.slow),
    pytest.param('rloo', rloo, ('policy', 'ema'), marks=pytest.mark.slow),
    pytest.param('dpo', dpo, ('model',), marks=pytest.mark.slow),
  ],
)
def test_adapters_resume_bit_for_bit(
  finished, tmp_path, monkeypatch, name, experiment, outputs
):
  """By the one section of the pipeline; what is on disk are adapters alone."""
  stage = experiment_stage(name, finished)
  stage.checkpoint_every = 1
  if 'log_every' in stage:
    stage.log_every = 1
  folders = [epath.Path(tmp_path) / part for part in ('whole', 'stopped')]
  for folder in folders:
    folder.mkdir()
  experiment.run(stage, folders[0])
  with monkeypatch.context() as patch:
    patch.setattr(run, 'StopSignal', stop_after(1))
    with pytest.raises(run.Stopped):
      experiment.run(stage, folders[1])
  assert 0 < len(lines(folders[1])) < len(lines(folders[0]))
  experiment.run(stage, folders[1])
  assert lines(folders[0]) == lines(folders[1])
  for output in outputs:
    whole, resumed = (
      checkpoint.load_model(folder / output)[0] for folder in folders
    )
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert all(np.any(x) for x in jax.tree.leaves(whole))

  first = lines(folders[0])[0]
  if name in ('ppo_ptx', 'rloo'):
    assert abs(first['objective/kl']) < 1e-4
    assert first['objective/sampler_difference'] < 1e-4
  if name == 'dpo':
    assert first['dpo/loss'] == pytest.approx(np.log(2), abs=1e-4)
  checkpoints = sorted((folders[0] / 'checkpoints').iterdir())
  records = [checkpoints[-1] / 'record' / 'metadata'] if checkpoints else []
  for path in (*records, *(folders[0] / o / 'model.json' for o in outputs)):
    for array, described in json.loads(path.read_text())['arrays'].items():
      is_head = array.rpartition('/')[2] in ('head_kernel', 'head_bias')
      assert is_head or not described['shape'] or '_lora_' in array, array


@pytest.mark.parametrize(
  'name, experiment',
  [('reward', reward), pytest.param('dpo', dpo, marks=pytest.mark.slow)],
)
def test_rankings_do_not_depend_on_microbatches(copied, name, experiment):
  """Rows and prompts of a microbatch differ in number; both are cut."""
  config = dpo_config if name == 'dpo' else config_file
  config = config.get_config('smoke')
  config.workdir = str(copied)
  stage = config.copy_and_resolve_references().stages[name]
  stage.max_comparisons = 60  # Of a dozen prompts, five labelers each.
  stage.log_every = stage.checkpoint_every = 1
  first = []
  for number in (1, 2):
    stage.num_microbatches = number
    folder = copied / f'{name}_in_{number}'
    folder.mkdir()
    experiment.run(stage, folder)
    first.append(lines(folder)[0])
  one, two = first
  # DPO starts with equal scores, so its first accuracy is that of noise.
  for key in (f'{name}/loss', 'optimizer/gradient_norm'):
    assert two[key] == pytest.approx(one[key], rel=1e-4)


def test_what_a_reward_model_reads_is_refused_before_it_trains(copied):
  config, _ = make_config(copied)
  stage = config.copy_and_resolve_references().stages.reward
  valid = records.read_jsonl(stage.valid_comparisons, records.Comparison)
  many = tuple(map(str, range(stage.max_candidates + 1)))
  valid.append(records.Comparison('p', many, tuple(range(1, len(many) + 1))))
  for key, rows, message in (
    ('valid_comparisons', valid, 'max_candidates is 9; raise it'),
    ('demonstrations', [records.Demonstration('p', 'a ' * 200)], 'row_length'),
  ):
    other = stage.copy_and_resolve_references()
    other[key] = str(copied / f'{key}.jsonl')
    records.write_jsonl(other[key], rows)
    folder = copied / f'reward_{key}'
    folder.mkdir()
    with pytest.raises(ValueError, match=message):
      reward.run(other, folder)
    assert not list(folder.iterdir())


def test_forks_start_at_the_reference(copied):
  """RLOO: no divergence. DPO: implied rewards of 0, log 2 a pair."""
  for name, experiment in (('rloo', rloo), ('dpo', dpo)):
    config = {'rloo': rloo_config, 'dpo': dpo_config}[name].get_config('smoke')
    config.workdir = str(copied)
    stage = config.copy_and_resolve_references().stages[name]
    if name == 'rloo':
      stage.num_episodes = stage.batch_size
    else:
      # With so small a beta, implied rewards stay 0.
      stage.update(max_comparisons=40, beta=1e-6)
      stage.log_every = stage.checkpoint_every = 1
    folder = copied / f'start_{name}'
    folder.mkdir()
    experiment.run(stage, folder)
    first = lines(folder)[0]
    if name == 'rloo':
      assert abs(first['objective/kl']) < 1e-4
      assert first['first/ppo/policy/ratio'] == pytest.approx(1, abs=1e-3)
      assert 'ppo/val/value' not in first
    else:
      assert first['dpo/loss'] == pytest.approx(np.log(2), abs=1e-3)
      assert first['dpo/reward'] == pytest.approx(0, abs=1e-3)
      found = run.read_json(folder / 'results.json')
      assert found['log_loss'] == pytest.approx(np.log(2), abs=1e-3)


def test_a_function_scores_in_the_place_of_a_reward_model(copied):
  """The value model starts from the policy; alarms know no range of scores."""
  config, _ = make_config(copied)
  stage = config.stages.ppo_ptx
  stage.reward_model = ''
  stage.reward_fn = 'tests.test_score_fns.brevity=100'
  stage.num_episodes = 2 * stage.batch_size
  folder = copied / 'brevity'
  folder.mkdir()
  ppo_ptx.run(stage, folder)
  first = lines(folder)[0]
  # A response has about a word a token, and a stop token.
  words = -first['objective/score'] / 100
  assert words == pytest.approx(first['objective/length'], abs=1.5)
  assert not run.read_json(folder / 'alarms.json')


@pytest.mark.slow
def test_the_value_model_may_start_from_the_policy(copied):
  config, _ = make_config(copied)
  stage = config.stages.ppo_ptx
  stage.num_episodes = stage.batch_size
  first = {}
  for start in ('reward_model', 'policy'):
    stage.value_from = start
    folder = copied / f'value_from_{start}'
    folder.mkdir()
    ppo_ptx.run(stage, folder)
    (first[start],) = lines(folder)
  same = 'objective/score'
  assert first['policy'][same] == pytest.approx(first['reward_model'][same])
  values = [first[start]['ppo/val/value'] for start in first]
  assert abs(values[0] - values[1]) > 1e-3


@pytest.mark.slow
def test_a_value_model_from_the_policy_beside_a_wider_reward_model(copied):
  config, _ = make_config(copied)
  stage = config.stages.ppo_ptx
  tokenizer = tokenizer_lib.Tokenizer.load(stage.tokenizer)
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  shape = model_folder.shape_of(stage.reward_model)
  wide = dataclasses.replace(shape, width=2 * shape.width)
  model = model_fns.init('scalar', wide, mesh, jax.random.key(4))
  about = {'score_range': [-1.0, 1.0]}
  model_folder.save(copied / 'wide', model, tokenizer, about)
  stage.update(reward_model=str(copied / 'wide'), value_from='policy')
  stage.num_episodes = stage.batch_size
  (copied / 'run').mkdir()
  ppo_ptx.run(stage, copied / 'run')
  (first,) = lines(copied / 'run')
  policy = copied / 'run' / 'policy'
  assert model_folder.shape_of(policy).width == shape.width
  assert np.isfinite(first['objective/score'])


def test_a_bad_record_is_named_by_file_and_line(copied):
  config, _ = make_config(copied)
  path = copied / 'data' / 'ppo_prompts_train.jsonl'
  rows = path.read_text().splitlines()
  rows[2] = '{"text": 3}'
  path.write_text('\n'.join(rows) + '\n')
  with pytest.raises(ValueError, match=r'ppo_prompts_train\.jsonl:3'):
    ppo_ptx.run(config.stages.ppo_ptx, copied / 'again')


def test_an_empty_data_set_is_refused(copied):
  config, _ = make_config(copied)
  (copied / 'data' / 'ppo_prompts_train.jsonl').write_text('')
  with pytest.raises(ValueError, match='ppo_prompts_train'):
    ppo_ptx.run(config.stages.ppo_ptx, copied / 'again')


def test_another_tokenizer_is_refused(copied):
  from instruct_jax.data import tokenizer

  tokenizer.train_word_level(['other', 'words']).save(copied / 'other')
  config, _ = make_config(copied)
  stage = config.stages.ppo_ptx
  stage.tokenizer = str(copied / 'other')
  with pytest.raises(
    (ValueError, checkpoint.CheckpointError), match='tokenizer'
  ):
    ppo_ptx.run(stage, copied / 'again')


def test_a_missing_or_truncated_model_is_named(copied):
  config, _ = make_config(copied)
  stage = config.stages.ppo_ptx
  (copied / 'reward' / 'model' / 'model.json').write_text('{"half')
  with pytest.raises(checkpoint.CheckpointError, match='reward/model'):
    ppo_ptx.run(stage, copied / 'again')
  shutil.rmtree(copied / 'reward' / 'model')
  with pytest.raises(checkpoint.CheckpointError, match='reward/model'):
    ppo_ptx.run(stage, copied / 'again')
  # The work directory stays usable: nothing of the failed run is there.
  assert not (copied / 'again' / 'done.json').exists()


def test_a_mesh_that_does_not_divide_is_refused(copied):
  config, described = make_config(copied)
  (copied / 'ppo_ptx' / 'done.json').unlink()
  config.mesh = (3, 1, 1)
  with pytest.raises(ValueError, match='8 devices'):
    pipeline.run_all(config, copied, described)


# --- Numbers that are not finite, and another mesh ----------------------------


def poison(monkeypatch, every):
  """NaN in the gradients, or in the loss alone, wherever a step's key says."""
  real = train_state.accumulate_gradients

  def poisoned(loss_fn, params, frozen, batch, key, num_microbatches=1):
    grads, loss, more = real(
      loss_fn, params, frozen, batch, key, num_microbatches
    )
    word = jax.random.key_data(key)[-1]
    is_hit = word % every == 0
    in_loss = (word // every) % 2 == 0
    grads = jax.tree.map(
      lambda g: jnp.where(is_hit & ~in_loss, jnp.nan, g), grads
    )
    return grads, jnp.where(is_hit & in_loss, jnp.nan, loss), more

  monkeypatch.setattr(train_state, 'accumulate_gradients', poisoned)


POISONED = {
  'pretrain': (pretrain, 'model', ('optimizer/skipped',)),
  'sft': (sft, 'model', ('optimizer/skipped',)),
  'rl_init': (sft, 'model', ('optimizer/skipped',)),
  'reward': (reward, 'model', ('optimizer/skipped',)),
  'ppo_ptx': (
    ppo_ptx,
    'policy',
    ('policy/optimizer/skipped', 'value/optimizer/skipped'),
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', POISONED)
def test_steps_that_are_not_finite_are_skipped_and_counted(
  copied, monkeypatch, name
):
  experiment, output, skipped = POISONED[name]
  config, _ = make_config(copied)
  stage = config.stages[name]
  poison(monkeypatch, every=3)
  folder = copied / 'poisoned'
  folder.mkdir()
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', UserWarning)
    experiment.run(stage, folder)
  rows = lines(folder)
  for metric in skipped:
    shares = [row[metric] for row in rows]
    assert 0 < np.mean(shares) < 1, metric
  # Nothing of it got into the weights.
  params, _ = checkpoint.load_model(folder / output)
  before, _ = checkpoint.load_model(copied / name / output)
  for leaf in jax.tree.leaves(params):
    assert np.all(np.isfinite(leaf))
  assert any(
    np.any(a != b)
    for a, b in zip(
      jax.tree.leaves(params), jax.tree.leaves(before), strict=True
    )
  )


@pytest.mark.slow
@pytest.mark.parametrize('name', POISONED)
def test_a_stage_that_meets_only_nan_stops_by_name(copied, monkeypatch, name):
  experiment, _, _ = POISONED[name]
  config, _ = make_config(copied)
  stage = config.stages[name]
  stage.loop.max_skips = 2
  if name != 'ppo_ptx':
    stage.log_every = stage.checkpoint_every = 1
  poison(monkeypatch, every=1)
  folder = copied / 'poisoned'
  folder.mkdir()
  with (
    warnings.catch_warnings(),
    pytest.raises(
      train_state.NonFiniteError, match=rf'{name}.* in a row up to step \d'
    ),
  ):
    warnings.simplefilter('ignore', UserWarning)
    experiment.run(stage, folder)
  assert not (folder / 'model').exists() and not (folder / 'policy').exists()


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(8, 1, 1), (2, 4, 1)])
def test_continued_on_another_mesh(finished, copied, monkeypatch, shape):
  config, _ = make_config(copied)
  stage = config.stages.ppo_ptx
  folder = copied / 'ppo_ptx'
  shutil.rmtree(folder)
  folder.mkdir()
  seen = []
  put_batch = sharding.put_batch

  def noted(batch, mesh):
    seen.append((dict(mesh.shape), jax.tree.map(np.asarray, batch)))
    return put_batch(batch, mesh)

  with monkeypatch.context() as patch:
    patch.setattr(run, 'StopSignal', stop_after(0))
    with pytest.raises(run.Stopped):
      ppo_ptx.run(stage, folder)
  config.mesh = shape
  with monkeypatch.context() as patch:
    patch.setattr(sharding, 'put_batch', noted)
    ppo_ptx.run(stage, folder)
  assert seen
  for mesh, _ in seen:
    assert tuple(mesh.values()) == shape
  # The lines hold scores, KL and losses of the same prompts in the same order.
  expected = lines(finished / 'ppo_ptx')
  found = lines(folder)
  assert [row['step'] for row in found] == [row['step'] for row in expected]
  for row, wanted in zip(found, expected, strict=True):
    for name, value in wanted.items():
      np.testing.assert_allclose(
        row[name], value, rtol=2e-3, atol=2e-4, err_msg=name
      )
