"""The book-keeping around a training loop: resume, log, checkpoint, stop.

  with Loop(workdir, 'sft', num_steps, log_every=10, checkpoint_every=100) as l:
    state = l.restore(state)
    for step in l.steps():
      state, metrics = update(state, batches[step], key_of(step))
      l.end_step(step, state, metrics)

What the loop computes stays in the experiment. Resume order: the stage's own
newest checkpoint, else the state handed to `restore`.
"""

import time
from collections.abc import Iterator, Mapping
from typing import SupportsFloat

import jax
from etils import epath

from instruct_jax.infra import checkpoint, measure, metrics, run, train_state
from instruct_jax.types import Metrics, PyTree


class Loop:
  """One stage's steps, from wherever they were left off.

  Args:
    workdir: of the stage.
    name: for progress, errors and the stop message.
    num_steps: in all.
    log_every: steps between lines of metrics.jsonl. A stop is honoured there.
    checkpoint_every: steps between checkpoints, a multiple of `log_every`, so
      that a resumed run's lines equal an uninterrupted one's.
    max_skips: consecutive non-finite updates at which the run stops.
    keep: checkpoints kept.

  Raises:
    ValueError: cadences that do not fit together.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    name: str,
    num_steps: int,
    *,
    log_every: int,
    checkpoint_every: int,
    max_skips: int = 10,
    keep: int = 2,
  ):
    if log_every < 1 or checkpoint_every < 1 or checkpoint_every % log_every:
      raise ValueError(
        f'{name}: checkpoint_every ({checkpoint_every}) must be a positive '
        f'multiple of log_every ({log_every})'
      )
    if num_steps < 1:
      raise ValueError(f'{name}: num_steps must be positive: {num_steps}')
    self._workdir = epath.Path(workdir)
    self._name = name
    self._num_steps = num_steps
    self._log_every = log_every
    self._checkpoint_every = checkpoint_every
    self._max_skips = max_skips
    self._keep = keep
    self._start = 0
    self._pending: Metrics = {}
    self._pending_items = 0
    self._last_log = time.monotonic()
    self._compiled = measure.compilations()

  def __enter__(self) -> 'Loop':
    self._checkpointer = checkpoint.Checkpointer(
      self._workdir / 'checkpoints', keep=self._keep
    )
    self._stop = run.StopSignal()
    self._stop.__enter__()
    self._writer = self._progress = None
    return self

  def __exit__(self, *exception) -> None:
    self._stop.__exit__(*exception)
    if self._progress is not None:
      self._progress.close()
    if self._writer is not None:
      self._writer.close()
    self._checkpointer.close()

  def restore(self, state: PyTree) -> PyTree:
    """The newest checkpoint's state, or `state` when there is none.

    Args:
      state: arrays with the wanted shardings, at step 0.

    Raises:
      checkpoint.CheckpointError: the checkpoint does not fit, or is damaged
        beyond the ones kept.
    """
    restored = self._checkpointer.restore_latest(state)
    if restored is not None:
      self._start, state, _ = restored
      print(f'{self._name}: continues after step {self._start}', flush=True)
    resume_step = self._start if restored is not None else None
    self._writer = metrics.MetricsWriter(self._workdir, resume_step)
    self._progress = run.Progress(self._name, self._num_steps, self._start)
    self._last_log = time.monotonic()
    return state

  def steps(self) -> Iterator[int]:
    """Step numbers still to run, from 0."""
    yield from range(self._start, self._num_steps)

  def end_step(
    self,
    step: int,
    state: PyTree,
    step_metrics: Metrics,
    *,
    states: Mapping[str, train_state.TrainState],
    values: Mapping[str, SupportsFloat] | None = None,
    num_items: int = 0,
    text: str = '',
  ) -> dict[str, float] | None:
    """Logs, checkpoints and honours a stop, each when its turn has come.

    Args:
      step: the step just run.
      state: what a checkpoint holds.
      step_metrics: this step's (sum, count) pairs, summed until the next line.
      states: train states to watch for skipped updates, by name.
      values: host numbers for this very step's line (evaluations); they force
        a line.
      num_items: tokens or episodes of this step, for the rate in timing.jsonl,
        which also counts the programs compiled since the line before: none,
        in a run that has seen all of its shapes.
      text: shown behind the progress bar.

    Returns:
      The line written, or None when none was due.

    Raises:
      run.Stopped: SIGTERM came, and everything is saved.
      train_state.NonFiniteError: too many skipped updates in a row.
    """
    done = step + 1
    self._pending = metrics.merge(self._pending, step_metrics)
    self._pending_items += num_items
    is_last = done == self._num_steps
    line = None
    if done % self._log_every == 0 or is_last or values:
      line = {**metrics.to_host(self._pending), **(values or {})}
      self._pending = {}
      self._writer.write(done, line)
      now = time.monotonic()
      seconds = now - self._last_log
      self._last_log = now
      compiled = measure.compilations()
      since = compiled - self._compiled
      self._compiled = compiled
      self._writer.write_timing(
        done,
        {
          'timing/seconds': seconds,
          'timing/items_per_second': self._pending_items / seconds,
          'timing/programs_compiled': since.programs,
          'timing/programs_from_disk': since.from_disk,
          'timing/compile_seconds': since.seconds,
        },
      )
      self._pending_items = 0
      for name, watched in states.items():
        train_state.check_skips(watched, self._max_skips, name)
    self._progress.update(1, text)
    due = done % self._checkpoint_every == 0 and not is_last
    at_line = done % self._log_every == 0
    stop = at_line and not is_last and self._stop.requested
    if due or stop:
      jax.block_until_ready(state)
      self._checkpointer.save(done, state, {})
    if stop:
      self._checkpointer.wait()
      raise run.Stopped(f'{self._name}: stopped after step {done}')
    return line
