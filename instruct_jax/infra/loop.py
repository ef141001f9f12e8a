"""The bookkeeping around a training loop: resume, log, checkpoint, stop.

  with Loop(workdir, 'sft', num_steps, log_every=10, checkpoint_every=100) as l:
    state = l.restore(state)
    for step, batch in l.steps_with(loader.ahead(batch_fn)):
      state, metrics = update(state, batch, key_of(step))
      l.end_step(step, state, metrics, states={'sft': state})

What the loop computes stays in the experiment. `restore` returns the stage's
newest checkpoint, or else the state handed to it. `timing.jsonl` has the
fraction of time that the loop waited for batches.
"""

import collections
import contextlib
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, SupportsFloat, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from instruct_jax import files
from instruct_jax.infra import (
  checkpoint,
  measure,
  metrics,
  run,
  train_state,
  watch,
)
from instruct_jax.types import Metrics, PyTree

Batch = TypeVar('Batch')

# Several processes that write lines more often than this check for a stop only
# when they write one.
_SECONDS_WITHOUT_ASKING = 5.0
# This many steps keep a device busy while the host prepares the next one.
_STEPS_UNDER_WAY = 2


def check(
  *,
  checkpoint_every: int,
  checkpoint_minutes: float,
  keep: int,
  keep_every: int,
  max_skips: int,
  profile_steps: str,
  log_every: int = 1,
) -> None:
  """Checks arguments of `Loop` that do not depend on a run's length.

  RL has a line for each step, and no `log_every`.

  Raises:
    ValueError: one is out of range, or intervals do not fit together.
  """
  if log_every < 1 or checkpoint_every < 1 or checkpoint_every % log_every:
    raise ValueError(
      f'checkpoint_every ({checkpoint_every}) must be a positive multiple of '
      f'log_every ({log_every})'
    )
  if keep_every < 0 or keep_every % checkpoint_every:
    raise ValueError(
      f'keep_every ({keep_every}) must be 0 or a multiple of checkpoint_every '
      f'({checkpoint_every})'
    )
  if keep < 1 or max_skips < 1 or not checkpoint_minutes >= 0:
    raise ValueError(
      f'keep ({keep}) and max_skips ({max_skips}) must be at least 1, '
      f'checkpoint_minutes ({checkpoint_minutes}) not negative'
    )
  _profiled_steps(profile_steps)


class Loop:
  """The steps of one stage that are still to run.

  Args:
    workdir: the stage's folder.
    name: for progress, errors and the stop message.
    num_steps: total number of steps.
    log_every: steps between lines of metrics.jsonl. A stop takes effect at the
      next step, even between two lines; with several processes and frequent
      lines, at the next line.
    checkpoint_every: steps between checkpoints, a multiple of `log_every`, so
      that a resumed run writes the lines of an uninterrupted one.
    checkpoint_minutes: a checkpoint is also due at the first line after this
      time without one; 0 for never.
    keep: how many of the newest checkpoints are kept.
    keep_every: checkpoints at multiples of this step are kept too; 0 for none.
    max_skips: the run fails if a line of metrics.jsonl is written after this
      many non-finite updates in a row, or more.
    profile_steps: 'FIRST-LAST' or 'STEP', counted from 1: a trace of these is
      written to WORKDIR/profile. '' traces none.

  Attributes:
    start: steps done by earlier runs; known after `restore`.

  Raises:
    ValueError: intervals that do not fit together, or steps outside the run.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    name: str,
    num_steps: int,
    *,
    log_every: int,
    checkpoint_every: int,
    checkpoint_minutes: float = 0.0,
    keep: int = 2,
    keep_every: int = 0,
    max_skips: int = 10,
    profile_steps: str = '',
  ):
    try:
      check(
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        checkpoint_minutes=checkpoint_minutes,
        keep=keep,
        keep_every=keep_every,
        max_skips=max_skips,
        profile_steps=profile_steps,
      )
    except ValueError as error:
      raise ValueError(f'{name}: {error}') from error
    if num_steps < 1:
      raise ValueError(f'{name}: num_steps must be positive: {num_steps}')
    self._workdir = epath.Path(workdir)
    self._name = name
    self._num_steps = num_steps
    self._log_every = log_every
    self._checkpoint_every = checkpoint_every
    self._checkpoint_seconds = 60 * checkpoint_minutes
    self._max_skips = max_skips
    self._keep, self._keep_every = keep, keep_every
    self._profiled = _profiled_steps(profile_steps)
    if self._profiled and self._profiled[-1] > num_steps:
      raise ValueError(
        f'{name}: profile_steps must lie within 1 to {num_steps}: '
        f'{profile_steps!r}'
      )
    self._is_profiling = False
    self.start = 0
    self._text = ''
    # Whether to check for a stop at every step; see `_stop_is_due`.
    self._asks_often = True
    self._under_way = collections.deque()
    self._is_on_cpu = jax.default_backend() == 'cpu'
    self._pending: Metrics = {}
    self._pending_items = 0
    self._waited = 0.0
    self._last_line = 0
    self._last_log = self._last_checkpoint = time.monotonic()
    self._watch = watch.Watch(name)
    self._compiled = measure.compilations()

  def __enter__(self) -> 'Loop':
    self._checkpointer = checkpoint.Checkpointer(
      self._workdir / 'checkpoints', self._keep, self._keep_every
    )
    self._stop = run.StopSignal()
    self._stop.__enter__()
    self._watch.__enter__()
    self._writer = self._progress = None
    return self

  def __exit__(self, kind, *exception) -> None:
    self._watch.__exit__(kind, *exception)
    closes = [
      part.close
      for part in (self._checkpointer, self._writer, self._progress)
      if part is not None
    ]
    if self._is_profiling:
      closes.append(self._stop_trace)
    with contextlib.ExitStack() as stack:
      stack.callback(self._stop.__exit__, kind, *exception)
      for close in closes:
        if kind is not None:
          # If the disk is full or gone, closing fails too; the first error
          # counts.
          stack.enter_context(contextlib.suppress(Exception))
        stack.callback(close)

  def watched(self, programs: Mapping[str, Any]) -> dict[str, Any]:
    """Wraps programs so that a message names one that hangs or is slow."""
    return self._watch.programs(programs)

  def restore(self, state: PyTree) -> PyTree:
    """Returns the newest checkpoint's state; without one, the given state.

    The restored state gets the shardings of the given one.

    Raises:
      checkpoint.CheckpointError: the checkpoint does not fit, none is readable,
        or all have been deleted.
    """
    restored = self._checkpointer.restore_latest(state)
    lines, resume_step = [], None
    if restored is None:
      self._check_fresh_start()
    else:
      resume_step, state, extra = restored
      if 'lines' not in extra:
        raise checkpoint.CheckpointError(
          f'{self._name}: the checkpoints in {self._workdir / "checkpoints"} '
          'were written by a version that kept no lines of metrics in them. '
          f'Finish the run with that version, or delete {self._workdir} to run '
          'this stage again from its start.'
        )
      self.start = resume_step
      lines, self._pending = extra['lines'], _from_json(extra['pending'])
      run.say(f'{self._name}: continues after step {self.start}')
    self._last_line = self.start
    self._writer = metrics.MetricsWriter(self._workdir, lines, resume_step)
    self._progress = run.Progress(self._name, self._num_steps, self.start)
    self._last_log = self._last_checkpoint = time.monotonic()
    return state

  @property
  def lines(self) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl so far, the same in all processes."""
    return self._writer.lines

  def steps(self) -> Iterator[int]:
    """Step numbers still to run, counted from 0."""
    for step in range(self.start, self._num_steps):
      if step + 1 in self._profiled and not self._is_profiling:
        self._start_trace()
      if not self._is_profiling:
        yield step
        continue
      with jax.profiler.StepTraceAnnotation(self._name, step_num=step + 1):
        yield step
      if step + 1 == self._profiled[-1]:
        self._stop_trace()
        self._profiled = range(0)

  def _start_trace(self):
    self._trace = self._workdir / 'profile'
    if files.is_remote(self._trace):  # The profiler writes only to disks.
      self._trace = epath.Path(tempfile.mkdtemp())
    jax.profiler.start_trace(str(self._trace), create_perfetto_trace=True)
    self._is_profiling = True

  def _stop_trace(self):
    self._is_profiling = False
    jax.profiler.stop_trace()
    if files.is_remote(self._workdir):
      files.copy_folder(self._trace, self._workdir / 'profile')
      self._trace.rmtree()

  def steps_with(
    self, open_fn: Callable[[int, int], Iterator[Batch]]
  ) -> Iterator[tuple[int, Batch]]:
    """Step numbers still to run, each with its batch.

    `open_fn(first step, one past the last)` returns the batches in order.
    """
    batches = open_fn(self.start, self._num_steps)
    for step in self.steps():
      before = time.monotonic()
      batch = next(batches)
      self._waited += time.monotonic() - before
      yield step, batch

  def end_step(
    self,
    step: int,
    state: PyTree,
    step_metrics: Metrics,
    *,
    states: Mapping[str, train_state.TrainState],
    values: Mapping[str, SupportsFloat] | None = None,
    num_items: int = 0,
    text_fn: Callable[[dict[str, Any]], str] | None = None,
  ) -> dict[str, Any] | None:
    """Logs, checkpoints and stops, each when it is due.

    Args:
      step: the step just run.
      state: what a checkpoint holds.
      step_metrics: this step's (sum, count) pairs, summed until the next line.
      states: train states to watch for skipped updates, by name.
      values: host numbers for this step (evaluations); they force a line.
      num_items: tokens or episodes of this step, for the rate in timing.jsonl.
      text_fn: line -> text after the progress bar, until the next line.

    Returns:
      The line as read back (None for NaN and infinity); None if none was due.

    Raises:
      checkpoint.CheckpointError: the last checkpoint could not be written.
      run.Stopped: SIGTERM came, and everything is saved.
      train_state.NonFiniteError: too many skipped updates in a row.
    """
    done = step + 1
    self._checkpointer.check()
    self._pending = metrics.merge(self._pending, step_metrics)
    self._pending_items += num_items
    # Steps return before they are computed, and a stop waits for all of them.
    self._under_way.append(jax.tree.leaves(step_metrics)[:1])
    if len(self._under_way) > _STEPS_UNDER_WAY:
      jax.block_until_ready(self._under_way.popleft())
    if self._is_on_cpu:  # Steps in flight would hold their activations.
      jax.block_until_ready(state)
    is_last = done == self._num_steps
    is_logged = done % self._log_every == 0
    line = seconds = None
    if is_logged or is_last or values:
      line, seconds = self._write_line(done, values or {})
      if text_fn is not None:
        self._text = text_fn(line)
      for name, watched in states.items():
        train_state.check_skips(watched, self._max_skips, name, self._workdir)
    if self._is_profiling:
      jax.block_until_ready(state)  # The trace shows the work in its own step.
    self._progress.update(1, self._text)
    if is_last:
      return line
    stop = self._stop_is_due(seconds)
    due = done % self._checkpoint_every == 0
    if is_logged and self._checkpoint_seconds > 0:
      # The processes' clocks differ: the first one's counts.
      waited = time.monotonic() - self._last_checkpoint
      due |= run.agreed(waited > self._checkpoint_seconds)
    if due or stop:
      jax.block_until_ready(state)
      # Between two lines, the sums for the next one are part of the state.
      extra = {'lines': self.lines, 'pending': _to_json(self._pending)}
      self._checkpointer.save(done, state, extra)
      # On a CPU the write reads the state's own buffers, so a step begun
      # meanwhile could not donate them.
      if stop or self._is_on_cpu:
        self._checkpointer.wait()
      self._last_checkpoint = time.monotonic()
    if stop:
      run.wait_for_all(f'{self._name} stopped')
      raise run.Stopped(f'{self._name}: stopped after step {done}', True)
    return line

  def _write_line(self, done, values):
    """Writes metrics and times; returns the line and seconds since the last."""
    line = {**metrics.to_host(self._pending), **values}
    self._pending = {}
    self._check_workdir()
    line = self._writer.write(done, line)
    now = time.monotonic()
    seconds = now - self._last_log
    self._last_log = now
    compiled = measure.compilations()
    new = compiled - self._compiled
    self._compiled = compiled
    self._writer.write_timing(
      done,
      {
        'timing/seconds': seconds,
        'timing/items_per_second': self._pending_items / seconds,
        'timing/waiting_fraction': self._waited / seconds,
        'timing/programs_compiled': new.programs,
        'timing/programs_from_disk': new.from_disk,
        'timing/compile_seconds': new.seconds,
      },
    )
    self._pending_items, self._waited = 0, 0.0
    self._watch.lap(done, done - self._last_line)
    self._last_line = done
    return line, seconds

  def _stop_is_due(self, line_seconds: float | None) -> bool:
    """Whether any process has received SIGTERM.

    Several processes can ask each other only after waiting for the step, so
    where lines come often, they ask only when they write one. `line_seconds` is
    the time since the line before; None where no line was written.
    """
    if jax.process_count() == 1:
      return self._stop.requested
    if line_seconds is None and not self._asks_often:
      return False
    stop = self._stop.requested
    if line_seconds is not None:
      self._asks_often = run.agreed(line_seconds > _SECONDS_WITHOUT_ASKING)
    return stop

  def _check_fresh_start(self):
    """Raises if a run past its second save has no checkpoint.

    A save waits for the one before, so the first must then be on disk.
    """
    path = self._workdir / metrics.METRICS_FILE
    if jax.process_index() != 0 or not path.exists():
      return
    try:
      lines = metrics.read_lines(path)
      last = max((line['step'] for line in lines), default=0)
      problem = f'{path} goes to step {last}'
    except ValueError as error:
      last, problem = math.inf, str(error)
    if last > 2 * self._checkpoint_every:
      raise checkpoint.CheckpointError(
        f'{self._name}: {problem}, and there is no checkpoint in '
        f'{self._workdir / "checkpoints"}. Restore the checkpoints, or delete '
        f'{self._workdir} to run this stage again from its start.'
      )
    if last:
      run.say(f'{self._name}: had no checkpoint yet, starts again at step 0')

  def _check_workdir(self):
    """Raises if the work directory was deleted.

    Open files would still take lines, and a background write may have created
    the directory again.
    """
    if jax.process_index() != 0 or files.is_remote(self._workdir):
      return
    if not (self._workdir / metrics.METRICS_FILE).exists():
      raise run.WorkdirError(
        f'{self._name}: the work directory {self._workdir} is gone, or its '
        f'{metrics.METRICS_FILE} is. The same command continues from the last '
        'checkpoint that is there.'
      )


def _to_json(pending: Metrics) -> dict[str, list]:
  """(sum, count) pairs as numbers with their dtype: JSON keeps every bit."""
  host = jax.device_get(dict(pending))
  return {
    name: [[float(x), str(np.asarray(x).dtype)] for x in pair]
    for name, pair in host.items()
  }


def _from_json(saved: Mapping[str, list]) -> Metrics:
  return {
    name: tuple(jnp.asarray(value, dtype) for value, dtype in pair)
    for name, pair in saved.items()
  }


def _profiled_steps(text: str) -> range:
  """'3-5' -> 3, 4, 5."""
  if not text:
    return range(0)
  match = re.fullmatch(r'(\d+)(?:-(\d+))?', text)
  first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
  if not 1 <= first <= last:
    raise ValueError(
      f"profile_steps must be 'FIRST-LAST' or 'STEP', counted from 1: {text!r}"
    )
  return range(first, last + 1)
