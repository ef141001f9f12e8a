"""Planning for TPUs that are not there; needs libtpu, no TPU."""

import dataclasses
import json

import jax
import pytest
from etils import epath

from configs import plan as config_file
from instruct_jax.evals import model_card
from instruct_jax.infra import cost, sharding
from instruct_jax.jobs import plan
from instruct_jax.models import decoding


@pytest.fixture
def config():
  pytest.importorskip('libtpu', reason='pip install -r requirements-plan.txt')
  config = config_file.get_config('miniature,v5e-4')
  with config.unlocked():
    config.programs = ('sft',)
    config.stop_at_first = True
    # Long enough rows and wide enough heads for the attention kernel.
    for shape in (config.policy, config.scalar):
      shape.head_dim, shape.context_length = 64, 128
      shape.scan_unroll = 1
    config.sft.row_length = 128
    config.sft.dropout = 0.0
  return config


def test_a_program_is_compiled_and_priced(config, workdir):
  summary = plan.run(config, epath.Path(workdir))
  row = summary['programs']['sft']
  # Forward, and both gradients, by splash attention.
  assert row['kernels'] >= 3
  assert row['missing'] < 0
  shape, _ = plan.models(config, 'none')
  # Parameters in float32 and Adam's two moments, a quarter on each chip.
  assert row['resident']['parameters'] == pytest.approx(
    shape.num_params, rel=0.05
  )
  assert row['resident']['optimizer'] == pytest.approx(
    2 * shape.num_params, rel=0.05
  )
  # 2 a weight and token forwards, twice that backwards; attention besides.
  tokens = config.sft.batch_size * config.sft.row_length
  assert row['flops'] * 4 > 6 * tokens * shape.num_params * 0.9
  assert row['flops'] * 4 < 6 * tokens * shape.num_params * 2
  assert row['collectives'].get('all-gather', 0) > 0
  assert json.loads((workdir / 'plan.json').read_text()) == summary
  assert '| sft | 1x4x1, none, 1 |' in (workdir / 'plan.md').read_text()


def test_what_cannot_fit_says_by_how_much(config, workdir, monkeypatch, capsys):
  small = dataclasses.replace(cost.CHIPS['v5e'], memory=100_000.0)
  monkeypatch.setitem(cost.CHIPS, 'v5e', small)
  with config.unlocked():
    config.meshes = ((1, -1, 1),)
  with pytest.raises(RuntimeError, match='sft fit on v5e:2x2 in none of 1 '):
    plan.run(config, epath.Path(workdir))
  assert 'GiB too much' in capsys.readouterr().out
  tried = json.loads((workdir / 'tried.json').read_text())
  assert tried[0]['missing'] == tried[0]['needed'] - 100_000.0


def test_the_compiler_own_refusal_is_read():
  message = 'Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm.'
  assert plan._needed_bytes(message) == 21.5 * 2**30
  message = (
    'Ran out of memory on HBM, the total memory required for HLO temporaries '
    '(26.20G) exceeds available HBM (15.75G).'
  )
  assert plan._needed_bytes(message) == pytest.approx(26.2 * 2**30)
  assert plan._needed_bytes('something else') is None


def test_weights_that_cannot_be_put_together_do_not_fit(monkeypatch):
  def build(*_):
    raise jax.errors.JaxRuntimeError(
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
      'for HLO temporaries (21.98G) exceeds available HBM (15.75G).'
    )

  monkeypatch.setattr(plan, 'build', build)
  config = config_file.get_config('6b,v5e-64')
  mesh = sharding.make_mesh((1, 8, 1))
  row = plan.measure('decode', config, mesh, 'full', 1)
  assert row['missing'] == pytest.approx((21.98 - 15.75) * 2**30)

  class Nothing:
    def find(self, *_):
      return row

  # Smaller pieces would not help.
  assert plan.fit('decode', config, mesh, 'full', 1, Nothing()) is None


def test_an_iteration_by_hand():
  config = config_file.get_config('1p3b,v5e-8')
  rows = {name: {'least_seconds': 6.0} for name in plan.EPISODES}
  found = plan.iteration(config, rows, 8)
  # 512 episodes of 2,048 tokens in 30 seconds on 8 chips; 500 iterations.
  assert found['seconds'] == 30.0
  assert found['tokens_per_second_per_chip'] == 512 * 2048 / 30 / 8
  assert found['chip_hours'] == pytest.approx(500 * 30 * 8 / 3600)


@pytest.mark.parametrize('argument', ['1p3b', '1p3b,v5e-7', '2t,v5e-8'])
def test_unknown_arguments_are_named(argument):
  with pytest.raises(ValueError, match='v5e-8|2t'):
    config_file.get_config(argument)


def test_bad_values_are_named():
  config = config_file.get_config('miniature,v5e-1')
  with config.unlocked():
    config.programs = ('sft', 'dance')
  with pytest.raises(ValueError, match='dance'):
    plan.validate(config)
  config = config_file.get_config('miniature,v5e-1')
  config.reward.lora.rank = -4
  with pytest.raises(ValueError, match='lora.rank must be a positive'):
    plan.validate(config)


@pytest.mark.parametrize('name', ['sft', 'reward', *plan.EPISODES])
def test_with_adapters_only_they_have_moments(name):
  config = config_file.get_config('miniature,v5e-1')
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  all_weights = {}
  for rank in (0, 4):
    for stage in (config.sft, config.reward, config.ppo):
      stage.lora.rank = rank
    with sharding.use_mesh(mesh):
      program, arguments, resident = plan.build(name, config, mesh, 'none', 1)
      program.trace(*arguments)
    found = {k: cost.bytes_per_chip(tree) for k, tree in resident.items()}
    if not rank:
      all_weights = found
  assert all_weights['optimizer'] > 0.9 * all_weights['parameters']
  assert found['optimizer'] < 0.2 * all_weights['optimizer']
  # All weights are there nonetheless, once.
  assert found['parameters'] > all_weights['parameters']
  assert found.get('ema', 0.0) < 0.2 * all_weights['parameters']
  assert not {'reference', 'reward'} & set(found)


# --- The search, on a compiler that is a formula ------------------------------


@pytest.fixture
def made_up(workdir, monkeypatch):
  """A planner whose `measure` is arithmetic; returns what it measured."""
  config = config_file.get_config('1p3b,v5e-8')
  config.programs = plan.EPISODES
  config.remats = ('full', 'none')
  measured = []
  gib = 2.0**30

  def measure(name, config, mesh, remat, parts, too_slow=float('inf')):
    tensor = mesh.shape['tensor']
    row = {
      'program': name,
      'mesh': list(mesh.shape.values()),
      'remat': remat,
      'parts': parts,
      'resident': {'parameters': 4 * gib, 'optimizer': 4 * gib},
    }
    # Without remat a quarter less arithmetic, and four times the memory.
    seconds = 8.0 if name == 'train' else 1.0
    if name == 'train' and remat == 'none':
      seconds *= 0.75
    if seconds / 2 >= too_slow:
      return row | {'slower': seconds / 2}
    measured.append((name, tuple(row['mesh']), remat, parts))
    if mesh.shape['fsdp'] == 8 and name == 'score':
      raise ValueError('12 rows do not divide over 8 shards')
    rest = 5.0 if name != 'train' else 24.0 * (4 if remat == 'none' else 1)
    needed = 8 * gib + rest * gib / parts
    row |= {'needed': needed, 'missing': needed - 15.75 * gib}
    row['compile_seconds'] = 1.0
    if row['missing'] <= 0:
      row |= {'flops': 1e12, 'memory_traffic': 1e9, 'kernels': 2}
      row['collectives'] = {'all-reduce': 1e9}
      row['seconds'] = {'arithmetic': seconds * tensor}
      row['calls'] = 1
      row['least_seconds'] = seconds * tensor
    return row

  monkeypatch.setattr(plan, 'measure', measure)
  monkeypatch.setattr(
    plan, 'topology_devices', lambda config: plan.jax.devices()
  )

  def run(meshes=((1, 8, 1), (1, 4, 2), (1, 2, 4))):
    config.meshes = meshes
    return plan.run(config, epath.Path(workdir)), measured

  return run


def test_the_fastest_that_fits_is_found_and_the_rest_left_out(made_up):
  summary, measured = made_up()
  rows = summary['programs']
  # 24 GiB in 4 microbatches are 6; in one remat, 96 in 16 are 6: room is 7.75.
  assert rows['train']['mesh'] == [1, 4, 2]
  assert (rows['train']['remat'], rows['train']['parts']) == ('none', 16)
  assert rows['train']['least_seconds'] == 0.75 * 8 * 2
  assert rows['decode']['parts'] == rows['score']['parts'] == 1
  # From 1 to 4 at once: 2 could not have been enough. With 13 times too
  # much, 16.
  updates = [m for m in measured if m[0] == 'train']
  assert updates == [
    ('train', (1, 4, 2), 'full', 1),
    ('train', (1, 4, 2), 'full', 4),
    ('train', (1, 2, 4), 'full', 1),
    ('train', (1, 2, 4), 'full', 4),
    ('train', (1, 4, 2), 'none', 1),
    ('train', (1, 4, 2), 'none', 16),
    ('train', (1, 2, 4), 'none', 1),
    ('train', (1, 2, 4), 'none', 16),
  ]
  # Sampling and scoring have no backward pass: measured once a mesh.
  assert measured.count(('decode', (1, 4, 2), 'full', 1)) == 1
  assert ('decode', (1, 4, 2), 'none', 1) not in measured
  # (1 + 1 + 1 + 1 + 6) x 2 s, 500 iterations on 8 chips.
  assert summary['iteration']['seconds'] == 20.0
  assert summary['iteration']['chip_hours'] == pytest.approx(
    500 * 20 * 8 / 3600
  )


def test_meshes_that_do_not_divide_the_devices_are_left_out(
  made_up, monkeypatch
):
  four = plan.jax.devices()[:4]
  monkeypatch.setattr(plan, 'topology_devices', lambda config: four)
  config = config_file.get_config('1p3b,v4-8')
  _, measured = made_up(config.meshes)
  meshes = {mesh for _, mesh, _, _ in measured}
  assert meshes == {(1, 4, 1), (1, 2, 2), (1, 1, 4)}
  with pytest.raises(ValueError, match=r'\(\(1, -1, 8\),\).* 4 devices'):
    made_up(((1, -1, 8),))


def test_what_did_not_fit_is_told_with_the_knob(made_up, workdir):
  summary, _ = made_up()
  assert summary['knobs'][0] == (
    'train on 1x4x2, remat full, 1 microbatches: 32.0 GiB, 16.2 GiB too much '
    '(compiled in 1 s); fits with num_microbatches 4: 14.0 GiB'
  )
  assert any('fits with num_microbatches 16' in k for k in summary['knobs'])
  text = (workdir / 'plan.md').read_text()
  assert '12 rows' not in text and summary['knobs'][0] in text
  tried = json.loads((workdir / 'tried.json').read_text())
  assert [row['problem'] for row in tried if 'problem' in row] == [
    '12 rows do not divide over 8 shards'
  ]


def test_a_plan_that_was_cut_goes_on(made_up, workdir):
  summary, measured = made_up()
  tried = workdir / 'tried.json'
  rows = json.loads(tried.read_text())
  tried.write_text(json.dumps(rows[:-3]))
  done = len(measured)
  again, measured = made_up()
  assert again['programs'] == summary['programs']
  assert len(measured) - done <= 3


@pytest.fixture
def described_weights(monkeypatch):
  """Without a TPU compiler nobody knows where sampling keeps its weights."""

  def weights(module, gather, mesh):
    params = plan.model_fns.abstract_params('policy', module.config, mesh)
    return decoding.Weights(params['trunk'], {}, ())

  monkeypatch.setattr(plan, 'sampling_weights', weights)


def test_what_the_cache_alone_forbids_is_not_compiled(
  monkeypatch, described_weights
):
  config = config_file.get_config('1p3b,v5e-8')
  mesh = plan.sharding.make_mesh((1, 8, 1))
  monkeypatch.setattr(cost, 'flops', None)  # Nothing is traced.
  row = plan.measure('decode', config, mesh, 'full', 1)
  # 24 layers x keys and values x 2,048 x 2 bytes, for 512 slots of 2,048
  # columns and a quarter as many prompts of 1,024; a chip has an eighth.
  size = 24 * 2 * 2048 * 2 * (512 * 2048 + 128 * 1024) / 8
  assert row['resident']['cache'] == size
  assert row['needed'] == sum(row['resident'].values())
  # The embeddings; the layers are the policy's own, counted there.
  shape, _ = plan.models(config, 'none')
  embeddings = (shape.vocab_rows + shape.context_length) * shape.width
  weights = row['resident']['sampling weights']
  assert weights == pytest.approx(4 * embeddings / 8, rel=0.001)
  assert row['missing'] == row['needed'] - 15.75 * 2**30
  # No more pieces than leave a row to every shard.
  assert plan.largest_parts('decode', config, mesh) == 64
  assert plan.largest_parts('train', config, mesh) == 8
  assert plan.largest_parts('sft', config, mesh) == 4


def test_calls_of_an_iteration_by_hand():
  config = config_file.get_config('1p3b,v5e-8')
  mesh = plan.sharding.make_mesh((1, 8, 1))
  # 512 responses of 1,024 tokens in 128 slots; a fourth as many read at once.
  assert plan.num_calls('decode', config, mesh, 4) == 4 * 1024
  assert plan.num_calls('prefill', config, mesh, 4) == 512 // 32
  assert plan.num_calls('train', config, mesh, 4) == 1


def test_what_waits_on_the_host_takes_no_memory(described_weights):
  config = config_file.get_config('1p3b,v5e-8')
  mesh = plan.sharding.make_mesh((1, 8, 1))
  with config.unlocked():
    config.ppo.offload = ('ema', 'reference')
  kinds = {'parameters', 'optimizer', 'reward'}
  for name, more in (
    ('decode', {'sampling weights', 'cache'}),
    ('score', set()),
    ('penalise', {'reference'}),
    ('train', {'ema'}),
  ):
    _, _, resident = plan.build(name, config, mesh, 'full', 1)
    assert set(resident) == kinds | more


# --- Compute by formula (5.1) -------------------------------------------------


def traced_operations(name, config):
  """Operations of one call of a program, on one device and without remat."""
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  program, arguments, _ = plan.build(name, config, mesh, 'none', 1)
  with sharding.use_mesh(mesh):
    return cost.flops(program.trace(*arguments).jaxpr)


def test_the_card_counts_by_formula_what_programs_compute():
  config = config_file.get_config('1p3b,v5e-8')
  for shape in (config.policy, config.scalar):
    shape.attention = 'xla'
  policy, scalar = (shape.num_params for shape in plan.models(config, 'none'))
  # The formula leaves attention out: 12 L D T of 6 N at T tokens, here 15 %.
  sft, ppo = config.sft, config.ppo
  formula = model_card.training_operations(
    policy, sft.batch_size * sft.row_length
  )
  assert 1.0 < traced_operations('sft', config) / formula < 1.2
  formula = model_card.rl_operations(
    policy,
    scalar,
    scalar,
    ppo.batch_size,
    ppo.prompt_length + ppo.response_length,
    1,
    ppo.batch_size * ppo.ptx_per_episode * ppo.ptx_row_length,
  )
  # Sampling is one forward pass, token by token.
  tokens = ppo.batch_size * (ppo.prompt_length + ppo.response_length)
  counted = 2 * policy * tokens + sum(
    traced_operations(name, config) for name in ('score', 'penalise', 'train')
  )
  assert 1.0 < counted / formula < 1.25


def test_with_adapters_as_well():
  config = config_file.get_config('1p3b,v5e-8')
  config.policy.attention = 'xla'
  with config.unlocked():
    config.sft.lora.rank = 8
  shape, _ = plan.models(config, 'none')
  tokens = config.sft.batch_size * config.sft.row_length
  formula = model_card.training_operations(shape.num_params, tokens, True)
  # Attention is as much as without: 12 L D T of 4 N, 23 %.
  assert 1.0 < traced_operations('sft', config) / formula < 1.3
