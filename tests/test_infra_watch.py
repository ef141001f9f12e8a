"""Programs that hang or are slow are named."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from instruct_jax.infra import watch


class Output:
  """An array that is there when the test says so."""

  def __init__(self):
    self.done = threading.Event()

  def is_ready(self):
    return self.done.is_set()

  def is_deleted(self):
    return False


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch):
  monkeypatch.setattr(watch.Watch, '_TICK', 0.01)


def wait_for(capsys, text, seconds=20):
  said = ''
  deadline = time.monotonic() + seconds
  while text not in said:
    assert time.monotonic() < deadline, said
    time.sleep(0.02)
    said += capsys.readouterr().err
  return said


def test_the_oldest_unfinished_program_is_named(capsys, monkeypatch):
  outputs = {'generate': Output(), 'update': Output()}
  monkeypatch.setattr(watch.Watch, '_FIRST_SECONDS', 0.3)
  with watch.Watch('ppo') as watched:
    programs = watched.programs(
      {
        'generate': lambda: outputs['generate'],
        'update': lambda: (jnp.zeros(2), outputs['update']),
        'optimizer': (1, 2),  # Not a program.
      }
    )
    assert programs['optimizer'] == (1, 2)
    assert programs['generate']() is outputs['generate']
    programs['update']()
    outputs['generate'].done.set()
    said = wait_for(capsys, 'update has not finished')
    assert 'ppo: no progress for ' in said
    assert 'since step 0' in said
    # Said again, later and later.
    wait_for(capsys, 'update has not finished')
    outputs['update'].done.set()
    wait_for(capsys, 'no program is running')


def test_a_program_that_does_not_return_is_named(capsys, monkeypatch):
  returned = threading.Event()

  def compile_for_ever(x):
    returned.wait(20)
    return x

  monkeypatch.setattr(watch.Watch, '_FIRST_SECONDS', 0.2)
  with watch.Watch('sft') as watched:
    program = watched.programs({'update': compile_for_ever})['update']
    thread = threading.Thread(target=program, args=(1,))
    thread.start()
    wait_for(capsys, 'update is being compiled or has not returned')
    returned.set()
    thread.join()


def test_a_slow_step_names_the_slowest_program(capsys, monkeypatch):
  outputs = [Output() for _ in range(6)]
  monkeypatch.setattr(watch.Watch, '_MIN_SECONDS', 0.3)
  monkeypatch.setattr(watch.Watch, '_FACTOR', 2.0)
  with watch.Watch('ppo') as watched:
    program = watched.programs({'score': lambda i: outputs[i]})['score']
    for step in range(6):
      program(step)
      if step == 5:
        time.sleep(0.6)
      outputs[step].done.set()
      watched.lap(step + 1, 1)
  said = capsys.readouterr().err
  # No news while it lasts, and a word about it afterwards; nothing before.
  assert 'no progress' in said and 'score has not finished' in said
  assert 'ppo: step 6 took 1 s, usually' in said
  assert 'most of it in score' in said
  assert 'step 5' not in said.replace('since step 5', '')


def test_usual_steps_are_silent_and_errors_pass(capsys):
  def fails():
    raise ValueError('told by the program')

  with watch.Watch('sft') as watched:
    programs = watched.programs(
      {'update': jax.jit(lambda x: x + 1), 'f': fails}
    )
    x = jnp.zeros(3)
    for step in range(1, 6):
      x = programs['update'](x)
      watched.lap(step, 1)
    with pytest.raises(ValueError, match='told by the program'):
      programs['f']()
  assert x[0] == 5
  # Outside it is the program itself.
  assert programs['update'](x)[0] == 6
  assert capsys.readouterr().err == ''
