"""`instruct_jax.main`, which kills itself at a named point, and keeps a diary.

  python tests/killed_run.py POINT NUMBER DELAY DIARY -- flags of main

POINT is where: respond, score, penalise, train (in that
program), checkpoint, model (in
the writing of one), stage (between two) or none. At its NUMBERth occurrence,
from 1, and DELAY seconds later, comes SIGKILL. DIARY gets a JSON line for each
batch that reached the devices, and for each stage's last state.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time

import jax
import numpy as np

from experiments import ppo_ptx
from instruct_jax import main
from instruct_jax.infra import checkpoint, loop, pipeline, sharding

PROGRAMS = ('respond', 'score', 'penalise', 'train')


def patch(point: str, number: int, delay: float, diary) -> None:
  """Puts the killer and the diarist in place."""
  seen = 0

  def kill():
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)

  def pass_by(name):
    nonlocal seen
    if name == point:
      seen += 1
      if seen == number:
        threading.Thread(target=kill, daemon=True).start()

  def passing(name, function):
    def call(*args, **kwargs):
      pass_by(name)
      result = function(*args, **kwargs)
      if name in PROGRAMS:
        jax.block_until_ready(result)
      return result

    return call

  def write(**line):
    diary.write(json.dumps(line) + '\n')
    diary.flush()

  build_programs = ppo_ptx.build_programs

  def build_watched(*args):
    programs = build_programs(*args)
    for name in PROGRAMS:
      programs[name] = passing(name, programs[name])
    return programs

  ppo_ptx.build_programs = build_watched
  checkpoint.Checkpointer.save = passing(
    'checkpoint', checkpoint.Checkpointer.save
  )
  checkpoint.save_model = passing('model', checkpoint.save_model)
  pipeline.run_stage = passing('stage', pipeline.run_stage)

  now = {'stage': None, 'step': None, 'batch': 0}
  steps, end_step = loop.Loop.steps, loop.Loop.end_step
  put_batch = sharding.put_batch

  def counted_steps(self):
    for step in steps(self):
      now.update(stage=self._name, step=step, batch=0)
      yield step
    now.update(stage=None)

  def noted_batch(batch, mesh):
    if now['stage'] is not None:
      write(**now, sha256=digest(batch))
      now['batch'] += 1
    return put_batch(batch, mesh)

  def noted_end(self, step, state, *args, **kwargs):
    if step + 1 == self._num_steps:
      write(stage=self._name, step='last', batch=0, sha256=digest(state))
    return end_step(self, step, state, *args, **kwargs)

  loop.Loop.steps, loop.Loop.end_step = counted_steps, noted_end
  sharding.put_batch = noted_batch


def digest(tree) -> str:
  """SHA-256 of every bit of a tree, its paths included."""
  total = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    total.update(jax.tree_util.keystr(path).encode())
    total.update(np.asarray(leaf).tobytes())
  return total.hexdigest()


if __name__ == '__main__':
  point, number, delay, path, separator, *rest = sys.argv[1:]
  assert separator == '--'
  with open(path, 'a') as diary:
    patch(point, int(number), float(delay), diary)
    sys.argv = ['instruct_jax.main', *rest]
    main.app.run(main.main, flags_parser=main.parse_flags)
