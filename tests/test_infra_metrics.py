"""Sums and counts, and files that survive being cut."""

import contextlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.infra import metrics
from instruct_jax.infra.metrics import MetricsWriter


def pair(total, count):
  return jnp.asarray(total, jnp.float32), jnp.asarray(count, jnp.float32)


def test_averages_are_formed_once():
  # Microbatch one: 3 tokens, sum 6. Two: 1 token, sum 10. Mean 16 / 4 = 4;
  # the average of the averages would be (2 + 10) / 2 = 6.
  merged = metrics.merge(
    {'loss': pair(6, 3), 'ptx': pair(1, 2)},
    {'loss': pair(10, 1), 'kl': pair(0, 0)},
  )
  host = metrics.to_host(merged)
  assert host['loss'] == 4.0
  assert host['ptx'] == 0.5
  assert math.isnan(host['kl'])
  assert all(type(value) is float for value in host.values())


def test_merge_traces():
  total = jax.jit(metrics.merge)({'a': pair(1, 1)}, {'a': pair(2, 1)})
  assert metrics.to_host(total) == {'a': 1.5}


def values(step):
  return {'b/loss': np.float32(1) / np.float32(step + 3), 'a': 0.1 * step}


def write_all(directory, steps, lines=()):
  resume_step = len(lines) - 1 if lines else None
  with contextlib.closing(MetricsWriter(directory, lines, resume_step)) as w:
    for step in steps:
      w.write(step, values(step))
      w.write_timing(step, {'seconds': 1.0})
    return w.lines


# What may become of a file between a stop and a restart.
FATES = {
  'torn': lambda file: file.write_bytes(file.read_bytes()[:-7]),
  'cut': lambda file: file.write_bytes(file.read_bytes()[:60]),
  'deleted': lambda file: file.unlink(),
  'nonsense': lambda file: file.write_text('nonsense\n{}\n'),
  'whole': lambda file: None,
}


@pytest.mark.parametrize('fate', FATES)
def test_resumed_file_equals_uninterrupted(workdir, fate):
  write_all(workdir / 'whole', range(6))
  lines = write_all(workdir / 'cut', range(5))
  file = workdir / 'cut' / metrics.METRICS_FILE
  FATES[fate](file)
  # The checkpoint is of step 2, and its lines have been JSON in between.
  lines = json.loads(json.dumps(lines[:3]))
  assert write_all(workdir / 'cut', range(3, 6), lines) == (
    metrics.read_lines(file)
  )
  whole = (workdir / 'whole' / metrics.METRICS_FILE).read_bytes()
  assert file.read_bytes() == whole
  # A fresh start forgets what was there.
  write_all(workdir / 'cut', range(6))
  assert file.read_bytes() == whole
  # Timing keeps the lines of every attempt: 5, 3 and 6.
  timing = metrics.read_lines(workdir / 'cut' / metrics.TIMING_FILE)
  assert [line['step'] for line in timing] == [*range(5), 3, 4, 5, *range(6)]


def test_lines_are_strict_json(workdir):
  with contextlib.closing(MetricsWriter(workdir)) as writer:
    line = writer.write(1, {'z': math.nan, 'a': 0.5, 'i': jnp.inf})
    text = (workdir / metrics.METRICS_FILE).read_text()
  assert text == '{"step": 1, "a": 0.5, "i": null, "z": null}\n'
  # Who goes on computes with what a resumed run would read.
  assert json.loads(text) == line == writer.lines[0]


def test_lines_on_disk_before_close(workdir):
  writer = MetricsWriter(workdir)
  writer.write(1, {'a': 1.0})
  assert metrics.read_lines(workdir / metrics.METRICS_FILE) == [
    {'step': 1, 'a': 1.0}
  ]
  writer.close()


def test_broken_timing_is_named_and_may_be_deleted(workdir):
  path = workdir / metrics.TIMING_FILE
  path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
  with pytest.raises(
    ValueError, match=r'timing.jsonl:2 is not JSON.*delete it, and the same'
  ):
    MetricsWriter(workdir)
  path.unlink()
  write_all(workdir, range(2))


def test_other_processes_write_nothing(workdir, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  write_all(workdir / 'second', range(2))
  assert not (workdir / 'second').exists()
