"""The benchmark's own arithmetic, and one tiny run of it."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from etils import epath
from ml_collections import config_flags

from configs import speed as config_file
from instruct_jax import model_fns
from instruct_jax.infra import cost, measure
from instruct_jax.jobs import speed
from instruct_jax.models import product_forms
from instruct_jax.models.config import TransformerConfig
from tests.tiny import one_device

SHAPE = TransformerConfig.from_dict(
  {**config_file.SHAPES['tiny'], 'gated_mlp': True, 'vocab_multiple': 64}
)


def tiny(variant, **changes):
  config = config_file.get_config(f'tiny,{variant}')
  with config.unlocked():
    for name, value in changes.items():
      config[name] = value
  return config


def test_useful_work_is_the_programs_own():
  B, T = 3, 20
  module = model_fns.make_module('policy', SHAPE)
  params = jax.eval_shape(
    lambda: module.init(jax.random.key(0), *[jnp.ones((1, 2), jnp.int32)] * 2)
  )
  tokens = jnp.zeros((B, T), jnp.int32)
  traced = jax.jit(module.apply).trace(params, tokens, tokens + 1)
  # The program multiplies every pair of tokens, the mask leaves T (T + 1) / 2.
  unseen = B * (T * T - T * (T + 1) // 2)
  unseen *= 4 * SHAPE.num_layers * SHAPE.num_heads * SHAPE.head_dim
  useful = speed.forward_flops(SHAPE, np.full(B, T), B * T)
  assert useful + unseen == cost.flops(traced.jaxpr)


def test_work_of_decoding_is_summed_token_by_token():
  prompts, responses, slots = [5, 2, 7], [1, 4, 3], 2
  flops = entries = steps = 0.0
  for p, r in zip(prompts, responses, strict=True):
    for t in range(1, r):  # The first token comes of the prompt's pass.
      entries += p + t
      steps += 1 / slots
      flops += 2 * speed.matmul_weights(SHAPE)
      flops += 2 * SHAPE.width * SHAPE.vocab_size
      flops += 4 * SHAPE.num_layers * SHAPE.num_heads * SHAPE.head_dim * (p + t)
  weights = speed.matmul_weights(SHAPE) + SHAPE.width * SHAPE.vocab_size
  entry = 2 * SHAPE.num_layers * SHAPE.kv_heads * SHAPE.head_dim
  got = speed.decode_work(SHAPE, prompts, responses, slots)
  np.testing.assert_allclose(
    got, (flops, 4 * (steps * weights + entries * entry)), rtol=1e-12
  )


@pytest.mark.usefixtures('quick_compile')
@pytest.mark.parametrize(
  'ptx_coef', [0.0, pytest.param(1.0, marks=pytest.mark.slow)]
)
def test_an_iteration_is_taken_apart(ptx_coef, workdir, monkeypatch):
  # Eight devices would only be eight times as long to compile for.
  mesh = one_device()
  monkeypatch.setattr(speed.sharding, 'make_mesh', lambda _: mesh)
  config = tiny('iteration_ragged')
  with config.unlocked():
    config.ppo.ptx_coef = ptx_coef
    # So few episodes change the shape of packed rows with every batch.
    config.ppo.pack = ptx_coef > 0
    config.stop_fraction = 0.3
    config.reward = 'model'
  speed.run(config, epath.Path(workdir))
  result = json.loads((workdir / 'speed.json').read_text())
  phases = result['phases']
  assert set(phases) == {
    'prefill',
    'decode',
    'score',
    'update',
    'ptx',
    'ema',
    'host',
    'checkpoint',
  }
  if not config.ppo.pack:
    assert result['recompilations'] == 0
    assert result['padding'] == result['padding_without_packing']
  assert result['programs_compiled'] >= 3
  assert len(result['seconds']['runs']) == 5
  assert 0 < result['padding'] < 0.6
  assert 0 < result['occupancy'] <= 1
  assert 1 <= result['mean_response'] < 8
  assert 0 < result['host_share'] < 1
  # 8 episodes of 6 prompt tokens and the mean response.
  tokens = 8 * (6 + result['mean_response'])
  assert phases['score']['tokens'] == pytest.approx(tokens)
  assert phases['ptx']['tokens'] == (8 * 16 if ptx_coef else 0)
  ceiling = result['ceilings']['matmul']
  score = phases['score']
  assert score['matmul_share'] == pytest.approx(
    score['flops'] / score['seconds'] / ceiling
  )
  text = (workdir / 'speed.md').read_text()
  assert all(f'| {name} |' in text for name in phases)
  assert not (workdir / 'checkpoints').exists()


@pytest.mark.slow
@pytest.mark.usefixtures('quick_compile')
def test_a_rollout_is_measured(workdir, monkeypatch):
  mesh = one_device()
  monkeypatch.setattr(speed.sharding, 'make_mesh', lambda _: mesh)
  config = tiny('rollout')
  speed.run(config, epath.Path(workdir))
  result = json.loads((workdir / 'speed.json').read_text())
  # Without raggedness every response has the full length.
  assert (result['mean_response'], result['occupancy']) == (8, 1)
  assert result['phases']['rollout']['tokens'] == 8 * 8
  assert result['recompilations'] == 0


def test_a_time_limit_leaves_what_was_measured(workdir, monkeypatch):
  mesh = one_device()
  monkeypatch.setattr(speed.sharding, 'make_mesh', lambda _: mesh)
  mask = np.ones((8, 4), bool)
  sampled = types.SimpleNamespace(response_mask=mask)
  work = types.SimpleNamespace(num_params=7, run=lambda _: (0, sampled))
  monkeypatch.setattr(speed, 'Iteration', lambda *_: work)

  def ends(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(speed, 'phase_seconds', ends)
  with pytest.raises(KeyboardInterrupt):
    speed.run(tiny('iteration'), epath.Path(workdir))
  saved = json.loads((workdir / 'speed.json').read_text())
  assert saved['unfinished'] == ['phases'] and saved['num_params'] == 7
  assert saved['value'] == saved['seconds']['median'] > 0
  assert 'phases' not in saved
  text = (workdir / 'speed.md').read_text()
  assert 'Not finished: phases.' in text and 's/iteration' in text


@pytest.fixture
def peers(tmp_path):
  """Scripts that answer as the peers' do, and one that fails."""
  folder = tmp_path / 'peers'
  folder.mkdir()
  (folder / 'hf_bench.py').write_text(
    textwrap.dedent("""
      import json, os, sys
      assert sys.argv[1:] == ['W2', 'S']
      assert os.environ['OMP_NUM_THREADS'] == '2'
      print('noise')
      print('RESULT ' + json.dumps({'median': 50.0, 'peak_rss_mib': 3.0}))
      """)
  )
  (folder / 'trl_sft.py').write_text('raise SystemExit("no such trainer")')
  (folder / 'torch_peer.py').write_text(
    textwrap.dedent("""
      import json, pathlib, sys
      spec = json.loads(pathlib.Path(sys.argv[1]).read_text())
      assert spec['work'] == 'sft' and spec['width'] == 16
      median = {'float32': 100.0, 'bfloat16': 400.0}[spec['precision']]
      found = {'median': median, 'peak_rss_mib': 5.0, 'peak_device_mib': 7.0}
      print('RESULT ' + json.dumps(found))
      """)
  )
  return folder


def test_ours_and_peers_are_set_side_by_side(
  peers, workdir, monkeypatch, capsys
):
  config = tiny(
    'sft', peers=str(peers), hf_python=sys.executable, num_rounds=2, cores=2
  )
  config.variant = 's,sft'  # The size of the peers' scripts.
  monkeypatch.setattr(speed, 'TORCH', peers / 'torch_peer.py')
  ours = iter([100.0, 300.0])
  monkeypatch.setattr(
    speed,
    'run_ours',
    lambda *_: {
      'value': next(ours),
      'unit': 'tokens/s',
      'peak_host_bytes': 2**20,
      'peak_device_bytes': None,
    },
  )
  speed.run(config, epath.Path(workdir))
  rows = json.loads((workdir / 'speed.json').read_text())['comparison']
  # Tunix has no python, and TRL's script fails: both are left out.
  assert [row['who'] for row in rows] == [
    *('ours', 'torch loop', 'torch, float32', 'torch, bfloat16')
  ]
  assert rows[3]['ours_is_faster_by'] == 0.5
  assert rows[0]['value'] == 200.0
  assert rows[1]['ours_is_faster_by'] == 4.0
  assert rows[1]['runs'] == [50.0, 50.0]
  assert rows[1]['peak_host_bytes'] == 3 * 2**20
  on_device = [row['peak_device_bytes'] for row in rows]
  assert on_device == [0, 0, 7 * 2**20, 7 * 2**20]
  assert 'unfinished' not in (workdir / 'speed.json').read_text()
  printed = capsys.readouterr().out
  assert 'TRL SFTTrainer: ' in printed
  assert 'no such trainer' in printed
  assert '| sft | torch loop | 50 | tokens/s | 3 | 0 | 4.00 |' in printed


def test_a_comparison_that_ends_early_keeps_its_rounds(workdir, monkeypatch):
  config = tiny('all', hf_python=sys.executable, num_rounds=2)
  ours = {'value': 2.0, 'unit': 's', 'peak_host_bytes': 1}
  runs = iter([ours | {'peak_device_bytes': None}] * 3)  # Of ten.
  monkeypatch.setattr(speed, 'run_ours', lambda *_: next(runs))
  peer = {'median': 6.0, 'peak_rss_mib': 5.0}
  monkeypatch.setattr(speed, 'run_peer', lambda *_: peer)
  with pytest.raises(RuntimeError):
    speed.run(config, epath.Path(workdir))
  saved = json.loads((workdir / 'speed.json').read_text())
  first, second, *others = speed.PEERS
  counts = {name: [] for name in speed.PEERS}
  for row in saved['comparison']:
    counts[row['work']].append(len(row['runs']))
  # Three rows each: ours, and torch in two precisions.
  assert counts == {first: [2] * 3, second: [1] * 3} | {x: [] for x in others}
  assert saved['unfinished'] == [second, *others]
  assert f'Not finished: {second}' in (workdir / 'speed.md').read_text()


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
@pytest.mark.parametrize('variant', ['sft', 'rollout_ragged', 'iteration'])
def test_the_same_work_in_torch(variant, precision, tmp_path):
  if importlib.util.find_spec('torch') is None:
    pytest.skip('pip install torch==2.13.0')
  config = tiny(variant, num_warmups=0)
  config.stop_fraction = 0.3
  path = tmp_path / 'spec.json'
  path.write_text(json.dumps(speed.spec_of(config, variant, precision)))
  result = speed.run_peer(
    config, sys.executable, f'{speed.TORCH} {path}', tmp_path / 'log.txt'
  )
  assert len(result['runs']) == config.num_iterations
  assert result['median'] > 0 and result['peak_rss_mib'] > 50


def test_a_process_of_its_own_gets_the_same_config(workdir):
  config = tiny('rollout', num_iterations=6)
  with config.unlocked():
    config.ppo.response_length = 16
    config.growth = 'batch'
    config.hf_python, config.num_rounds = 'python', 3
  command = speed.command_of(config, 'rollout', workdir)
  arguments = [x for x in command[2:] if not x.startswith('--workdir')]
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file(
    'config', flag_values=values, sys_argv=arguments
  )
  values(arguments)
  with config.unlocked():
    # The child measures one work, and no peer.
    config.growth = config.hf_python = ''
    config.num_rounds = 1
  theirs = holder.value.to_dict()
  assert theirs == config.to_dict()


@pytest.mark.parametrize('kind', speed.GROWTHS)
@pytest.mark.parametrize('factor', [2, 4])
def test_growth_multiplies_the_work(kind, factor):
  config = config_file.get_config('s,sft')
  with config.unlocked():
    config.policy.compute_dtype = config.scalar.compute_dtype = 'float32'
    for key, value in speed.grown(config, kind, factor).items():
      part, _, name = key.rpartition('.')
      config[part][name] = value
  speed.validate(config)
  if kind == 'model':
    base = config_file.get_config('s,sft').policy.to_dict()
    base['compute_dtype'] = 'float32'
    before = speed.matmul_weights(TransformerConfig.from_dict(base))
    shape = TransformerConfig.from_dict(config.policy.to_dict())
    assert speed.matmul_weights(shape) == factor * before


@pytest.mark.parametrize(
  'key,value,text',
  [
    ('num_iterations', 4, 'at least 5'),
    ('growth', 'width', "growth must be .*'width'"),
    ('peers', '/no/such/folder', '/no/such/folder'),
    ('reward', 'me', "'me'"),
    ('stop_fraction', 0.0, 'stop_fraction'),
    ('work', 'rest', "'rest'"),
  ],
)
def test_bad_values_are_named(key, value, text):
  config = tiny('sft', **{key: value})
  with pytest.raises(ValueError, match=text):
    speed.validate(config)


@pytest.mark.slow
@pytest.mark.usefixtures('quick_compile')
def test_a_device_agrees_with_itself(workdir):
  summary = speed.run(tiny('check'), epath.Path(workdir))
  assert summary == {'variant': 'tiny,check'}
  saved = json.loads((workdir / 'speed.json').read_text())['differences']
  assert saved == {
    dtype: dict.fromkeys(speed.TOLERANCES[dtype], 0.0)
    for dtype in ('float32', 'bfloat16')
  }


@pytest.mark.slow
@pytest.mark.usefixtures('quick_compile')
def test_weights_that_differ_by_a_hundredth_are_found(workdir, monkeypatch):
  class Other(speed.Iteration):
    number = 0

    def __init__(self, config, mesh):
      super().__init__(config, mesh)
      policy = self.state.policy
      factor = 1 + 0.01 * Other.number
      params = jax.tree.map(lambda x: factor * x, policy.params)
      self.state = self.state.replace(policy=policy.replace(params=params))
      Other.number += 1

  monkeypatch.setattr(speed, 'Iteration', Other)
  monkeypatch.setattr(
    speed, 'TOLERANCES', {'float32': speed.TOLERANCES['float32']}
  )
  with pytest.raises(RuntimeError) as error:
    speed.run(tiny('check'), epath.Path(workdir))
  for name in ('logprobs', 'sampler', 'metrics'):
    assert f'float32: {name} differ by' in str(error.value)


def test_a_device_that_does_not_agree_is_told(workdir, monkeypatch):
  found = {'flips': 0.2, 'logprobs': 0.3, 'sampler': 0.0}
  found |= {'metrics': math.nan, 'changes': 0.0}
  monkeypatch.setattr(speed, 'check_device', lambda *_: found)
  with pytest.raises(RuntimeError) as error:
    speed.run(tiny('check'), epath.Path(workdir))
  text = str(error.value)
  assert 'float32: logprobs differ by 0.3, at most 0.0001' in text
  assert 'bfloat16: metrics differ by nan' in text
  assert 'float32: flips differ by 0.2, at most 0.005' in text
  assert 'bfloat16: flips' not in text
  assert not (workdir / 'speed.json').exists()


def test_flips_are_of_the_tokens_sampled_up_to_them():
  tokens = np.array([[9, 1, 2, 3], [9, 1, 2, 3], [9, 1, 2, 0]])
  mask = np.array([[True] * 3, [True] * 3, [True, True, False]])
  logprobs = np.full((3, 3), -1.0)

  def sampled(tokens, logprobs):
    return types.SimpleNamespace(
      tokens=tokens, response_mask=mask, logprobs=logprobs
    )

  # The second row differs from its second token on: 3 and 1 and 2 tokens are
  # equal, and one flipped. What follows a flip does not count.
  other = tokens + [[0, 0, 0, 0], [0, 0, 7, 7], [0, 0, 0, 7]]
  gaps = np.array([[0.0, 0, 0], [0, 5, 5], [0.6, 0, 5]])
  found = speed._samples_differ(
    sampled(tokens, logprobs), sampled(other, logprobs + gaps)
  )
  assert found == {'flips': 1 / 7, 'sampler': pytest.approx(0.1)}


def test_every_way_to_multiply_gives_the_product(rng):
  for form in product_forms.forms_of(SHAPE, 2, 16, 3):
    x, y = (
      jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in form.shapes
    )
    expected = np.einsum(form.spec, x, y)
    for way in (product_forms.as_model, product_forms.as_einsum):
      ours = np.asarray(way(form, 'float32', x, y))
      np.testing.assert_allclose(ours, expected, atol=1e-4, err_msg=form.name)
      rough = np.asarray(way(form, 'bfloat16', x, y), np.float32)
      error = np.abs(rough - expected).mean() / np.abs(expected).mean()
      assert 1e-4 < error < 0.02, form.name


def test_products_are_measured(workdir, monkeypatch):
  forms = product_forms.forms_of(SHAPE, 4, 16, 8)
  kept = [forms[0], forms[11], forms[13]]
  monkeypatch.setattr(product_forms, 'forms_of', lambda *_: kept)
  speed.run(tiny('products'), epath.Path(workdir))
  rows = json.loads((workdir / 'speed.json').read_text())['products']
  assert all(row[way] > 0 for row in rows for way in ('float32', 'model'))
  # 4 rows of 16 tokens, width 16, 32 inside; 8 slots, 16 more outputs thrice;
  # 2 heads of 8 over 16 columns.
  flops = [row['flops'] for row in rows]
  assert flops == [2 * 64 * 16 * 32, 3 * 2 * 8 * 16 * 16, 2 * 8 * 2 * 16 * 8]
  text = (workdir / 'speed.md').read_text()
  assert '| step, three of a third each | 1.23e-05 |' in text


def test_adapters_are_not_measured():
  config = tiny('sft')
  config.sft.lora.rank = 4
  with pytest.raises(ValueError, match='sft.lora.rank must be 0'):
    speed.validate(config)


def test_unknown_variants_are_refused():
  with pytest.raises(ValueError, match="'s,dance'"):
    config_file.get_config('s,dance')


def test_all_works_are_run_one_by_one(workdir, monkeypatch):
  config = tiny('all')
  result = {
    'value': 1.0,
    'unit': 's/iteration',
    'seconds': measure.Repeats((1.0,) * 5, (0.0,) * 5).summary(),
    'phases': {},
    'ceilings': {'matmul': 1e9, 'bandwidth': 1e9},
    'compile_seconds': 0.0,
    'programs_compiled': 1,
    'programs_from_disk': 0,
    'recompilations': 0,
    'peak_host_bytes': 2**20,
    'peak_device_bytes': 2**30,
  }
  monkeypatch.setattr(speed, 'run_ours', lambda *_: result)
  speed.run(config, epath.Path(workdir))
  saved = json.loads((workdir / 'speed.json').read_text())
  about = {'variant', 'compute_dtype', 'processor'}
  assert set(saved) == {*speed.PEERS, *about}
  text = (workdir / 'speed.md').read_text()
  assert text.count('1.0 GiB on a device') == len(speed.PEERS)


@pytest.mark.slow
def test_growth_in_processes_of_their_own(workdir):
  config = tiny('sft', growth='batch', mesh=(1, -1, 1))
  with config.unlocked():
    config.sft.batch_size = 8
  speed.run(config, epath.Path(workdir))
  saved = json.loads((workdir / 'speed.json').read_text())
  rows = saved['growth']
  assert [row['work_ratio'] for row in rows] == pytest.approx([2, 4])
  assert all(row['peak_host_bytes'] > 2**25 for row in rows)
  assert '| batch x4 |' in (workdir / 'speed.md').read_text()


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_a_cpu(tmp_path):
  has_torch = importlib.util.find_spec('torch') is not None
  ours = str(pathlib.Path(sys.executable).parent)
  environment = {
    **os.environ,
    'PATH': f'{ours}{os.pathsep}{os.environ["PATH"]}',
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '',
    # The first fails, and leaves the others alone.
    'WORKS': 'tiny,nothing:300 tiny,check:300 tiny,iteration:300 '
    'tiny,sft:300 tiny,sft+torch:300',
  }
  ended = subprocess.run(
    ['bash', 'instruct_jax/infra/gpu.sh', tmp_path]
    + [sys.executable] * has_torch,
    cwd=speed.ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert ended.returncode == 1
  assert 'tiny_nothing: ended with 1' in ended.stdout
  assert 'float32: flips 0, sampler 0, logprobs 0' in ended.stdout
  for name in ('tiny_check', 'tiny_iteration', 'tiny_sft'):
    assert (tmp_path / name / 'speed.md').exists(), ended.stderr
  if has_torch:
    text = (tmp_path / 'beside_torch_tiny_sft' / 'speed.md').read_text()
    assert '| torch, bfloat16 |' in text and '| ours |' in text
