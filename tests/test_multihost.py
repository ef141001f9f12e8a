"""Several processes on this machine, joined as the hosts of a pod would be."""

import functools
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from experiments import pretrain
from instruct_jax import model_fns, model_folder
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import checkpoint, metrics, sharding
from instruct_jax.models.config import TransformerConfig

ROOT = pathlib.Path(__file__).parents[1]
WORDS = [f'w{i}' for i in range(24)]

CONFIG = """
from configs import common, pipeline, pretrain, reward, rl

def get_config(argument):
  if argument in ('pretrain', 'endless'):
    config = pretrain.stage(0, '')
    config.documents = config.valid = {inputs!r} + '/documents.jsonl'
    config.model = common.tiny_model(32, 1, 16, 1)
    config.batch_size, config.row_length = 8, 12
    config.num_steps = 4 if argument == 'pretrain' else 100_000
    config.num_warmup, config.eval_every, config.eval_batch_size = 1, 4, 8
    config.log_every, config.checkpoint_every = 1, 2
  elif argument == 'reward':
    config = reward.stage(0, '')
    config.comparisons = config.valid_comparisons = {inputs!r} + '/ranked.jsonl'
    config.demonstrations = {inputs!r} + '/demonstrations.jsonl'
    config.batch_size, config.row_length, config.max_candidates = 8, 16, 3
    config.eval_batch_size, config.log_every = 8, 1
    config.checkpoint_every, config.learning_rate = 2, 1e-3
  else:
    config = rl.stage(0, '')
    config.reward_model = {inputs!r} + '/reward'
    config.prompts = {inputs!r} + '/prompts.jsonl'
    config.documents = config.valid_documents = {inputs!r} + '/documents.jsonl'
    config.prompt_length, config.response_length = 4, 6
    config.ptx_row_length, config.ptx_per_episode = 12, 1
    config.batch_size = 16
    if argument.startswith('ragged'):
      # Rows of several episodes, which now need more room and now less.
      argument = argument.removeprefix('ragged')
      config.prompt_length, config.response_length = 8, 24
    config.num_episodes = 16 * int(argument)
    config.num_minibatches, config.eval_batch_size = 2, 8
    config.learning_rate, config.value_learning_rate = 1e-3, 1e-3
    config.checkpoint_every, config.eval_every, config.ptx_coef = 1, 100, 1.0
  if argument not in ('pretrain', 'endless'):
    config.init = {inputs!r} + '/policy'
  config.tokenizer = {inputs!r} + '/tokenizer'
  # At Adam's usual 1e-8, gradients of zero up to rounding make full steps.
  config.adam_eps = 1e-4
  config = common.single(config, 'tiny')
  with config.unlocked():
    config.compilation_cache = ''
    config.xla_flags = '--xla_backend_optimization_level=0'
  return config
"""


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  """A few lines of each kind of data, and a config file that names them."""
  folder = tmp_path_factory.mktemp('inputs')
  tokenizer = tokenizer_lib.train_word_level(WORDS)
  tokenizer.save(epath.Path(folder / 'tokenizer'))
  rng = np.random.default_rng(0)

  def text(low, high):
    return ' '.join(rng.choice(WORDS, rng.integers(low, high + 1)))

  def write(name, lines):
    (folder / f'{name}.jsonl').write_text(
      ''.join(json.dumps(line) + '\n' for line in lines)
    )

  write('prompts', [{'id': f'p{i}', 'text': text(1, 4)} for i in range(40)])
  write('documents', [{'text': text(11, 11)} for _ in range(40)])
  write(
    'demonstrations',
    [{'prompt': text(1, 4), 'response': text(1, 6)} for _ in range(8)],
  )
  write(
    'ranked',
    [
      {
        'prompt': text(1, 4),
        'completions': [text(1, 6) for _ in range(3)],
        'ranks': [1, 2, 3],
      }
      for _ in range(32)
    ],
  )
  (folder / 'config.py').write_text(CONFIG.format(inputs=str(folder)))
  return folder


@pytest.fixture(scope='module')
def models(inputs):
  """A policy and a reward model that have learnt nothing, beside the data."""
  tokenizer = tokenizer_lib.Tokenizer.load(inputs / 'tokenizer')
  config = TransformerConfig(
    vocab_size=tokenizer.vocab_size,
    context_length=32,
    num_layers=1,
    width=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    vocab_multiple=8,
  )
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  for number, (kind, name) in enumerate(
    (('policy', 'policy'), ('scalar', 'reward'))
  ):
    with sharding.use_mesh(mesh):
      model = model_fns.init(kind, config, mesh, jax.random.key(number))
      model_folder.save(
        inputs / name,
        model,
        tokenizer,
        {'score_range': [-9.0, 9.0]},
      )


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    return probe.getsockname()[1]


def start(inputs, argument, workdir, count, devices=8, limits=()):
  """`count` processes that share the devices; one needs no coordinator.

  A process whose number is in `limits` may not write larger files than that,
  in bytes: what a disk does when it is full.
  """
  address = f'localhost:{free_port()}'
  environment = {
    **os.environ,
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices // count}',
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path]),
  }
  processes = []
  for index in range(count):
    command = [sys.executable, '-m', 'instruct_jax.main']
    command += [f'--config={inputs / "config.py"}:{argument}']
    command += [f'--workdir={workdir}']
    if count > 1:
      command += [f'--coordinator={address}', f'--num_processes={count}']
      command += [f'--process_id={index}']
    processes.append(
      subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=functools.partial(limit, dict(limits).get(index)),
      )
    )
  return processes


def limit(num_bytes):
  if num_bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def finish(processes, seconds=1500):
  """Exit codes and outputs; what still runs in the end is killed."""
  try:
    outputs = [p.communicate(timeout=seconds)[0] for p in processes]
  finally:
    for process in processes:
      process.kill()
  return [p.returncode for p in processes], outputs


def run(inputs, argument, workdir, count, devices=8):
  codes, outputs = finish(start(inputs, argument, workdir, count, devices))
  assert codes == [0] * count, '\n'.join(outputs)[-4000:]


def assert_same_run(one, other, models):
  found, expected = (
    metrics.read_lines(epath.Path(folder) / metrics.METRICS_FILE)
    for folder in (one, other)
  )
  assert len(found) == len(expected) > 0
  for line, wanted in zip(found, expected, strict=True):
    assert set(line) == set(wanted)
    for name, value in wanted.items():
      np.testing.assert_allclose(
        line[name], value, rtol=2e-4, atol=2e-5, err_msg=name
      )
  for model in models:
    found, _ = checkpoint.load_model(one / model)
    expected, _ = checkpoint.load_model(other / model)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      found,
      expected,
    )


def pretrain_here(inputs, folder):
  """One process of eight devices: this one."""
  source = {}
  exec((inputs / 'config.py').read_text(), source)
  folder.mkdir(exist_ok=True)
  pretrain.run(source['get_config']('pretrain'), epath.Path(folder))


def test_pretraining_over_two_processes_equals_one(
  inputs, tmp_path, quick_compile
):
  """The cheapest stage, so that something of this runs every time."""
  run(inputs, 'pretrain', tmp_path / 'two', 2, devices=2)
  pretrain_here(inputs, tmp_path / 'alone')
  assert_same_run(tmp_path / 'two', tmp_path / 'alone', ('model',))
  # One of the two told the services.
  assert len(list((tmp_path / 'two' / 'tensorboard').iterdir())) == 1


@pytest.mark.slow
def test_one_process_continues_what_two_saved(inputs, tmp_path):
  workdir = tmp_path / 'two'
  run(inputs, 'pretrain', workdir, 2, devices=2)
  before = tmp_path / 'before'
  shutil.copytree(workdir, before)
  shutil.rmtree(workdir / 'model')
  pretrain_here(inputs, workdir)
  assert_same_run(workdir, before, ('model',))
  timing = metrics.read_lines(epath.Path(workdir) / metrics.TIMING_FILE)
  assert [line['step'] for line in timing] == [1, 2, 3, 4, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize('who', [0, 1])
def test_a_write_that_fails_in_one_process_ends_both(inputs, tmp_path, who):
  """Of the checkpoint in the background, while both go on training."""
  workdir = tmp_path / 'two'
  limits = {who: 6_000}
  processes = start(inputs, 'endless', workdir, 2, devices=2, limits=limits)
  deadline = time.monotonic() + 600
  while all(p.poll() is None for p in processes):
    assert time.monotonic() < deadline, finish(processes, 1)
    time.sleep(0.1)
  ended = time.monotonic()
  codes, outputs = finish(processes, 60)
  assert codes == [1, 1] and time.monotonic() - ended < 60
  errors = [
    [line for line in output.splitlines() if line.startswith('error: ')]
    for output in outputs
  ]
  message = f'no checkpoint could be written to {workdir}/checkpoints'
  assert len(errors[who]) == 1 and message in errors[who][0], outputs
  assert errors[1 - who][0].startswith(
    'error: another process failed first (process '
    f'{who}: no checkpoint could be written to {workdir}/checkpoints'
  )
  assert len(errors[1 - who]) == 1
  for output in outputs:
    assert 'Traceback' not in output and 'Extension modules' not in output
  # Room has been made: the same command continues.
  run(inputs, 'pretrain', workdir, 2, devices=2)


@pytest.fixture(scope='module')
def alone(inputs, models, tmp_path_factory):
  """Two iterations in a single process."""
  workdir = tmp_path_factory.mktemp('alone')
  run(inputs, '2', workdir, 1)
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 4])
def test_several_processes_equal_one(inputs, alone, workdir, count):
  run(inputs, '2', workdir, count)
  assert_same_run(workdir, alone, ('policy', 'ema'))


@pytest.mark.slow
def test_reward_training_over_two_processes_equals_one(
  inputs, models, tmp_path
):
  run(inputs, 'reward', tmp_path / 'two', 2)
  run(inputs, 'reward', tmp_path / 'one', 1)
  assert_same_run(tmp_path / 'two', tmp_path / 'one', ('model',))


def wait_for_lines(path, number, processes):
  """Until there are so many lines of metrics."""
  deadline = time.monotonic() + 1500
  while not path.exists() or path.read_text().count('\n') < number:
    assert time.monotonic() < deadline, f'not {number} lines of metrics'
    assert all(p.poll() is None for p in processes), finish(processes)
    time.sleep(0.05)


@pytest.mark.slow
def test_ragged_rows_of_two_processes_resume_bit_for_bit(
  inputs, models, tmp_path
):
  """Killed twice; each time the shapes that were met must be met again."""
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  run(inputs, 'ragged5', whole, 2, devices=2)
  lines = metrics.read_lines(epath.Path(whole) / metrics.METRICS_FILE)
  shapes = [
    (line.get('packing/row_length'), line.get('packing/row_responses'))
    for line in lines
  ]
  assert None not in shapes[0] and len(set(shapes)) >= 3, shapes
  for victim, number in ((1, 2), (0, 3)):
    processes = start(inputs, 'ragged5', killed, 2, devices=2)
    try:
      wait_for_lines(killed / metrics.METRICS_FILE, number, processes)
      processes[victim].send_signal(signal.SIGKILL)
      for process in processes:
        process.wait(60)
    finally:
      codes, outputs = finish(processes)
    # The service that joins them ends with the first, and may abort the other.
    assert codes[1 - victim] in ((75, -6) if victim == 0 else (75,)), outputs
  run(inputs, 'ragged5', killed, 2, devices=2)
  assert (killed / metrics.METRICS_FILE).read_bytes() == (
    whole / metrics.METRICS_FILE
  ).read_bytes()
  for model in ('policy', 'ema'):
    found, _ = checkpoint.load_model(killed / model)
    expected, _ = checkpoint.load_model(whole / model)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_a_restart_resumes(
  inputs, models, tmp_path
):
  workdir = tmp_path / 'killed'
  processes = start(inputs, '400', workdir, 2)
  lines = workdir / metrics.METRICS_FILE
  try:
    wait_for_lines(lines, 3, processes)
    processes[1].send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    processes[0].wait(60)
    assert time.monotonic() - killed_at < 60
  finally:
    codes, outputs = finish(processes)
  assert codes[0] == 75  # What restarts preempted runs starts this one, too.
  assert (
    'error: another process failed first (process 1: it was killed or crashed)'
  ) in outputs[0], outputs[0][-2000:]
  before = len(metrics.read_lines(epath.Path(lines)))

  processes = start(inputs, '400', workdir, 2)
  try:
    wait_for_lines(lines, before + 1, processes)
    for process in processes:
      process.send_signal(signal.SIGTERM)
  finally:
    codes, outputs = finish(processes)
  # A clean stop of both, told by its code.
  assert codes == [75, 75], outputs
  assert 'continues after step' in outputs[0]
