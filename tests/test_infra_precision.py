"""compute_dtype='auto': chosen once for a device, and kept by a run."""

import types

import pytest
from etils import epath

from configs import recipe, sentiment, sft
from instruct_jax.infra import precision, run


@pytest.fixture(params=[3.0, 0.5])
def gain(request, monkeypatch):
  monkeypatch.setattr(precision, 'bfloat16_gain', lambda _: request.param)
  monkeypatch.setattr(precision.jax, 'device_count', lambda: 1)
  return request.param


def resolved(config, workdir):
  precision.resolve(config, epath.Path(workdir))
  return config


def test_the_faster_dtype_is_written_wherever_auto_stands(
  gain, tmp_path, capsys
):
  want = 'bfloat16' if gain > 1 else 'float32'
  config = resolved(recipe.get_config('cpu'), tmp_path)
  stages = [s for s in config.stages.values() if 'compute_dtype' in s]
  assert len(stages) > 6
  assert {s.compute_dtype for s in (config, *stages)} == {want}
  said = capsys.readouterr().out
  assert said == (
    f'compute_dtype: {want}: a bfloat16 product is {gain:.1f} x as fast as a '
    'float32 one\n'
  )


def test_other_values_stay_and_nothing_is_timed(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(precision, 'bfloat16_gain', lambda _: 1 / 0)
  config = sentiment.get_config()
  config.compute_dtype = 'bfloat16'
  assert resolved(config, tmp_path).stages.ppo.compute_dtype == 'bfloat16'
  one = sft.get_config()
  before = run.plain(one.copy_and_resolve_references())
  after = resolved(one, tmp_path).copy_and_resolve_references()
  assert run.plain(after) == before
  assert capsys.readouterr().out == ''


def test_one_stage_of_a_pipeline_may_say_auto(gain, tmp_path):
  config = sentiment.get_config()
  config.compute_dtype = 'float32'
  config.stages.rank.compute_dtype = 'auto'
  resolved(config, tmp_path)
  want = 'bfloat16' if gain > 1 else 'float32'
  assert config.stages.rank.compute_dtype == want
  assert config.stages.ppo.compute_dtype == 'float32'


def test_a_run_keeps_the_dtype_that_it_began_with(
  gain, tmp_path, monkeypatch, capsys
):
  first = resolved(sentiment.get_config(), tmp_path)
  began = first.compute_dtype
  run.write_json(
    tmp_path / 'config.json', run.plain(first.copy_and_resolve_references())
  )
  capsys.readouterr()
  monkeypatch.setattr(precision, 'bfloat16_gain', lambda _: 1 / gain)
  again = resolved(sentiment.get_config(), tmp_path)
  assert again.stages.ppo.compute_dtype == began
  assert (
    capsys.readouterr().out == f'compute_dtype: {began}: as the run began\n'
  )
  new = resolved(sentiment.get_config(), tmp_path / 'new')
  assert new.stages.ppo.compute_dtype != began


def test_a_given_dtype_is_not_taken_for_a_chosen_one(tmp_path, monkeypatch):
  monkeypatch.setattr(precision, 'bfloat16_gain', lambda _: 3.0)
  monkeypatch.setattr(precision.jax, 'device_count', lambda: 1)

  def begin():
    config = sentiment.get_config()
    config.compute_dtype = 'float32'
    config.stages.rank.compute_dtype = 'auto'
    return resolved(config, tmp_path)

  first = run.plain(begin().copy_and_resolve_references())
  run.write_json(tmp_path / 'config.json', first)
  monkeypatch.setattr(precision, 'bfloat16_gain', lambda _: 1 / 0)
  again = begin()
  assert again.stages.rank.compute_dtype == 'bfloat16'
  assert again.stages.ppo.compute_dtype == 'float32'


def test_the_gain_is_that_of_two_products(monkeypatch):
  peaks = {'bfloat16': 30.0, 'float32': 10.0}
  monkeypatch.setattr(
    precision.measure, 'matmul_peak', lambda dtype, size: peaks[dtype]
  )
  assert precision.bfloat16_gain(1_024) == 3.0


def test_several_cpu_devices_compute_in_float32(monkeypatch):
  monkeypatch.setattr(precision, 'bfloat16_gain', lambda _: 3.0)
  assert precision.choose() == ('float32', '8 CPU devices share the work')


@pytest.mark.parametrize(
  'platform,gain,want',
  [('gpu', 1.0, 'float32'), ('gpu', 2.0, 'bfloat16'), ('tpu', 0, 'bfloat16')],
)
def test_a_gpu_is_measured_and_a_tpu_is_not(platform, gain, want, monkeypatch):
  devices = [types.SimpleNamespace(platform=platform)]
  monkeypatch.setattr(precision.jax, 'devices', lambda: devices)
  measured = []
  monkeypatch.setattr(
    precision, 'bfloat16_gain', lambda size: measured.append(size) or gain
  )
  assert precision.choose()[0] == want
  assert measured == [4_096] * (platform == 'gpu')
