"""Resume, log, checkpoint, stop."""

import gc
import gzip
import json
import os
import pathlib
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instruct_jax.infra import checkpoint, loop, metrics, run, train_state

pytestmark = pytest.mark.usefixtures('quick_compile')

OPTIMIZER = optax.adam(0.1)
ROOT = jax.random.key(4)
NUM_STEPS = 10
# Lines at 2, 4, ..., 10 and, for the evaluation, at 5; checkpoints at 4 and 8.
EVALUATED = 5


@jax.jit
def update(state, key):
  """A step that depends on everything that has to be restored."""
  grads = {'w': state.params['w'] + jax.random.normal(key, (3,))}
  loss = jnp.sum(jnp.square(grads['w']))
  state, more = train_state.apply_gradients(state, grads, OPTIMIZER, loss)
  return state, {'loss': (loss, jnp.float32(1.0)), **more}


class KilledError(Exception):
  """In the place of a kill: nothing of the loop runs after it."""


def numbers(first, last):
  """The batch of a step is its number; the fourth takes a while."""
  for step in range(first, last):
    time.sleep(0.2 if step == 3 else 0)
    yield step


def run_loop(
  workdir, kill_at=None, stop_at=None, update_fn=update, text_fn=None, **changes
):
  state = train_state.create({'w': jnp.ones(3)}, OPTIMIZER)
  arguments = {'log_every': 2, 'checkpoint_every': 4} | changes
  with loop.Loop(workdir, 'toy', NUM_STEPS, **arguments) as steps:
    state = steps.restore(state)
    for step, batch in steps.steps_with(numbers):
      assert batch == step
      if step == kill_at:
        raise KilledError
      if step == stop_at:
        os.kill(os.getpid(), signal.SIGTERM)
      state, step_metrics = update_fn(state, jax.random.fold_in(ROOT, step))
      values = {'eval/norm': float(jnp.sum(state.params['w']))}
      steps.end_step(
        step,
        state,
        step_metrics,
        states={'toy': state},
        values=values if step + 1 == EVALUATED else None,
        num_items=7,
        text_fn=text_fn,
      )
  return state


def lines_of(workdir):
  return (workdir / metrics.METRICS_FILE).read_text()


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('uninterrupted')
  return workdir, run_loop(workdir)


def assert_same(workdir, state, uninterrupted):
  assert lines_of(workdir) == lines_of(uninterrupted[0])
  jax.tree.map(np.testing.assert_array_equal, state, uninterrupted[1])


def test_lines(uninterrupted):
  workdir, state = uninterrupted
  lines = metrics.read_lines(workdir / metrics.METRICS_FILE)
  assert [line['step'] for line in lines] == [2, 4, 5, 6, 8, 10]
  # The evaluation is on the line of its own step only.
  assert [line['step'] for line in lines if 'eval/norm' in line] == [5]
  # A line is the mean over the steps since the one before it.
  state = train_state.create({'w': jnp.ones(3)}, OPTIMIZER)
  losses = []
  for step in range(NUM_STEPS):
    state, step_metrics = update(state, jax.random.fold_in(ROOT, step))
    losses.append(float(step_metrics['loss'][0]))
  for line, (start, end) in zip(
    lines, [(0, 2), (2, 4), (4, 5), (5, 6), (6, 8), (8, 10)], strict=True
  ):
    np.testing.assert_allclose(
      line['loss'], np.mean(losses[start:end]), rtol=1e-5
    )


def test_rates_count_the_items_of_the_line(uninterrupted):
  for line in metrics.read_lines(uninterrupted[0] / metrics.TIMING_FILE):
    steps = 1 if line['step'] in (5, 6) else 2
    np.testing.assert_allclose(
      line['timing/items_per_second'] * line['timing/seconds'], 7 * steps
    )


def test_time_spent_waiting_for_batches_is_told(uninterrupted):
  lines = metrics.read_lines(uninterrupted[0] / metrics.TIMING_FILE)
  waited = {
    line['step']: line['timing/waiting_fraction'] * line['timing/seconds']
    for line in lines
  }
  # The batch of step 3 took 0.2 s, and is on the line after it.
  assert 0.2 <= waited[4] == max(waited.values())


def test_lines_tell_what_was_compiled(uninterrupted):
  lines = metrics.read_lines(uninterrupted[0] / metrics.TIMING_FILE)
  assert lines[0]['timing/programs_compiled'] > 0
  assert lines[0]['timing/compile_seconds'] > 0
  # All shapes have been seen.
  assert lines[-1]['timing/programs_compiled'] == 0


# Before the first checkpoint, right after one, between, and after the last.
@pytest.mark.parametrize('kill_at', [3, 4, 7, 9])
def test_killed_and_resumed_equals_uninterrupted(
  workdir, uninterrupted, kill_at
):
  with pytest.raises(KilledError):
    run_loop(workdir, kill_at=kill_at)
  assert_same(workdir, run_loop(workdir), uninterrupted)


@pytest.mark.parametrize('fate', ['cut', 'deleted', 'older'])
def test_lost_lines_come_back_from_the_checkpoint(workdir, uninterrupted, fate):
  path = workdir / metrics.METRICS_FILE
  with pytest.raises(KilledError):
    run_loop(workdir, kill_at=5)
  first = path.read_text().splitlines(keepends=True)[0]
  with pytest.raises(KilledError):
    run_loop(workdir, kill_at=9)
  if fate == 'deleted':
    path.unlink()
  else:
    path.write_text(first if fate == 'older' else first[:-20])
  assert_same(workdir, run_loop(workdir), uninterrupted)


def test_a_run_goes_on_after_lines_of_nan(workdir):
  """Also between two lines, where the sums are NaN."""

  def broken(state, key):
    state, told = update(state, key)
    return state, {**told, 'loss': (jnp.float32(jnp.nan), jnp.float32(1))}

  whole = run_loop(workdir / 'whole', update_fn=broken)
  with pytest.raises(run.Stopped):
    run_loop(workdir / 'cut', update_fn=broken, stop_at=4)
  told = []

  def tell(line):
    told.append(line['loss'])
    return 'a line'

  state = run_loop(workdir / 'cut', update_fn=broken, text_fn=tell)
  assert_same(workdir / 'cut', state, (workdir / 'whole', whole))
  assert told == [None, None, None]


def test_killed_twice(workdir, uninterrupted):
  for kill_at in (5, 9):
    with pytest.raises(KilledError):
      run_loop(workdir, kill_at=kill_at)
  assert_same(workdir, run_loop(workdir), uninterrupted)


def test_sigterm_saves_and_exits_with_75(workdir, uninterrupted, capsys):
  before = signal.getsignal(signal.SIGTERM)
  # At step 2, with a line due after step 4: it does not wait for that.
  with pytest.raises(SystemExit) as stopped:
    run_loop(workdir, stop_at=2)
  assert stopped.value.code == run.STOPPED_EXIT_CODE == 75
  assert 'toy: stopped after step 3' in capsys.readouterr().err
  assert signal.getsignal(signal.SIGTERM) == before
  assert [p.name for p in (workdir / 'checkpoints').iterdir()] == ['3']
  state = run_loop(workdir)
  assert 'continues after step 3' in capsys.readouterr().out
  assert_same(workdir, state, uninterrupted)


# Between two lines, at one, and before the first and the last.
@pytest.mark.parametrize('stop_at', [0, 1, 5, 6, 8])
def test_a_stop_at_any_step_leaves_the_same_lines(
  workdir, uninterrupted, stop_at
):
  with pytest.raises(run.Stopped, match='75'):
    run_loop(workdir, stop_at=stop_at)
  assert kept(workdir)[-1] == stop_at + 1
  assert_same(workdir, run_loop(workdir), uninterrupted)


def test_stopped_at_every_step(workdir, uninterrupted):
  for step in range(NUM_STEPS - 1):
    with pytest.raises(run.Stopped):
      run_loop(workdir, stop_at=step)
  assert_same(workdir, run_loop(workdir), uninterrupted)


def test_few_steps_are_under_way(workdir, monkeypatch):
  """Or a stop would have to wait for all that were dispatched."""
  waited = []
  block = jax.block_until_ready
  monkeypatch.setattr(
    jax, 'block_until_ready', lambda x: waited.append(x) or block(x)
  )
  run_loop(workdir, log_every=10, checkpoint_every=10)
  # All but the last two, in order; each is a list of one metric.
  assert len([x for x in waited if isinstance(x, list)]) == NUM_STEPS - 2


def test_a_checkpoint_does_not_keep_the_old_state(workdir):
  """On a CPU, the next step writes its state over the one that was saved."""
  state = {str(i): jnp.zeros(2**20) for i in range(8)}
  step_fn = jax.jit(
    lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0
  )
  places = set()
  with loop.Loop(
    workdir, 'toy', NUM_STEPS, log_every=2, checkpoint_every=2
  ) as steps:
    state = steps.restore(state)
    for step in steps.steps():
      state = step_fn(state)
      places.add(tuple(x.unsafe_buffer_pointer() for x in state.values()))
      norm = jnp.sum(state['0']), jnp.float32(1)
      steps.end_step(step, state, {'norm': norm}, states={})
  assert kept(workdir) == [6, 8]
  assert len(places) == 1


def test_the_text_behind_the_bar_is_of_the_newest_line(workdir, capsys):
  state = train_state.create({'w': jnp.ones(3)}, OPTIMIZER)
  shown = []
  with loop.Loop(workdir, 'toy', 4, log_every=2, checkpoint_every=2) as steps:
    state = steps.restore(state)
    for step in steps.steps():
      state, step_metrics = update(state, jax.random.fold_in(ROOT, step))
      line = steps.end_step(
        step,
        state,
        step_metrics,
        states={},
        text_fn=lambda line: f'loss {line["loss"]:.6f}',
      )
      if line is not None:
        shown.append(f'loss {line["loss"]:.6f}')
      assert steps._progress._text == (shown[-1] if shown else '')
  assert capsys.readouterr().err.splitlines()[-1].endswith(shown[-1])


def test_sigterm_in_the_last_step_finishes(workdir, uninterrupted):
  assert_same(workdir, run_loop(workdir, stop_at=9), uninterrupted)


def test_a_run_that_meets_only_nan_stops(workdir):
  def broken(state, key):
    grads = {'w': jnp.full(3, jnp.nan)}
    return train_state.apply_gradients(state, grads, OPTIMIZER, jnp.array(0.0))

  with (
    pytest.warns(UserWarning, match='toy: update skipped'),
    pytest.raises(train_state.NonFiniteError, match='toy: .* 4 updates'),
  ):
    # Looked at where lines are written: 2 in a row are few, 4 too many.
    run_loop(workdir, update_fn=broken, max_skips=3)


@pytest.mark.parametrize(
  ('log_every', 'checkpoint_every'), [(2, 3), (0, 4), (2, 0), (4, 2)]
)
def test_cadences_that_do_not_fit(workdir, log_every, checkpoint_every):
  with pytest.raises(
    ValueError,
    match=rf'toy: checkpoint_every \({checkpoint_every}\) .* \({log_every}\)',
  ):
    run_loop(workdir, log_every=log_every, checkpoint_every=checkpoint_every)


def test_no_steps(workdir):
  with pytest.raises(ValueError, match='toy: num_steps must be positive: 0'):
    loop.Loop(workdir, 'toy', 0, log_every=1, checkpoint_every=1)


# --- Cadences, traces, and a disk that fails ---------------------------------


def kept(workdir):
  return sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir())


def test_checkpoints_kept_for_good(workdir):
  run_loop(workdir, checkpoint_every=2, keep=1, keep_every=4)
  assert kept(workdir) == [4, 8]
  with pytest.raises(ValueError, match=r'keep_every \(3\) must be 0 or a mul'):
    run_loop(workdir, checkpoint_every=2, keep_every=3)


def test_checkpoints_by_time(workdir, monkeypatch, uninterrupted):
  class Clock:
    now = 0.0

    def monotonic(self):
      return self.now

  clock = Clock()
  monkeypatch.setattr(loop, 'time', clock)

  def timed_update(state, key):
    clock.now += 50.0
    return update(state, key)

  # Lines at 2, 4, 6, ...; two minutes are over at 150 s, seen at 200 (step 4),
  # and again at 400 (step 8). Steps alone would save at 10, which is the last.
  state = run_loop(
    workdir,
    update_fn=timed_update,
    checkpoint_every=10,
    checkpoint_minutes=2.0,
  )
  assert kept(workdir) == [4, 8]
  assert_same(workdir, state, uninterrupted)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    *((text, 'counted from 1') for text in ('0', '3-2', 'all', '-2')),
    ('9-11', 'within 1 to 10'),
  ],
)
def test_steps_to_profile_that_there_are_not(workdir, text, message):
  with pytest.raises(ValueError, match=f'toy: profile_steps .* {message}'):
    run_loop(workdir, profile_steps=text)


def test_a_trace_for_perfetto_and_xprof(workdir, uninterrupted):
  state = run_loop(workdir, profile_steps='3-4')
  assert_same(workdir, state, uninterrupted)
  (trace,) = (workdir / 'profile').rglob('perfetto_trace.json.gz')
  events = json.loads(gzip.decompress(trace.read_bytes()))['traceEvents']
  steps = [e['args']['step_num'] for e in events if e.get('name') == 'toy']
  assert [int(step) for step in steps] == [3, 4]
  assert list((workdir / 'profile').rglob('*.xplane.pb'))


def test_a_directory_that_is_gone(workdir):
  def removing(state, key):
    if int(state.step) == 5:
      os.rename(workdir, f'{workdir}.moved')
    return update(state, key)

  with pytest.raises(run.WorkdirError, match=f'toy: .* {workdir} is gone'):
    run_loop(workdir, update_fn=removing)
  assert not (workdir / metrics.METRICS_FILE).exists()


def test_a_full_disk_under_the_lines(workdir, uninterrupted):
  """/dev/full is a disk without room."""
  with pytest.MonkeyPatch.context() as patch:
    full = pathlib.Path('/dev/full')
    patch.setattr(metrics, '_open', lambda path, lines: full.open('a'))
    patch.setattr(loop.Loop, '_check_workdir', lambda self: None)
    with pytest.raises(OSError, match='No space left'):
      run_loop(workdir)
  assert_same(workdir, run_loop(workdir), uninterrupted)


def test_lost_checkpoints_are_no_fresh_start(workdir, capsys):
  with pytest.raises(KilledError):
    run_loop(workdir, kill_at=7, checkpoint_every=2)
  shutil.rmtree(workdir / 'checkpoints')
  before = lines_of(workdir)
  with pytest.raises(
    checkpoint.CheckpointError, match=r'toy: .* goes to step 6, and there is no'
  ):
    run_loop(workdir, checkpoint_every=2)
  assert lines_of(workdir) == before


def test_a_run_killed_before_its_first_checkpoint_says_so(
  workdir, uninterrupted, capsys
):
  with pytest.raises(KilledError):
    run_loop(workdir, kill_at=3)
  assert_same(workdir, run_loop(workdir), uninterrupted)
  assert 'toy: had no checkpoint yet, starts again' in capsys.readouterr().out


def test_sigterm_not_acted_on_goes_to_the_outer_signal(workdir):
  with run.StopSignal() as outer:
    run_loop(workdir, stop_at=9)
    assert outer.requested


def test_sigterm_between_loops_stops_at_once():
  with pytest.raises(run.Stopped), run.StopSignal(at_once=True):
    os.kill(os.getpid(), signal.SIGTERM)
    pytest.fail('went on')


@pytest.mark.parametrize('where', ['callback', 'finalizer'])
def test_sigterm_is_not_lost_where_exceptions_are(workdir, where):
  class Dying:
    def __del__(self):
      os.kill(os.getpid(), signal.SIGTERM)

  def collecting(phase, info):
    if phase == 'start':
      os.kill(os.getpid(), signal.SIGTERM)

  def meet():
    if where == 'finalizer':
      Dying()
      return
    gc.callbacks.append(collecting)
    try:
      gc.collect()
    finally:
      gc.callbacks.remove(collecting)

  with run.StopSignal(at_once=True):
    meet()
    # A loop ends at its next step.
    with pytest.raises(run.Stopped) as stopped:
      run_loop(workdir)
    assert 'after step 1' in stopped.value.message
  with run.StopSignal(at_once=True), run.Progress('toy', 2) as progress:
    progress.update()
    meet()
    with pytest.raises(run.Stopped):
      progress.update()
