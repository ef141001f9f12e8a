"""Services that show a stage besides its files: TensorBoard, W&B, Trackio.

`config.loggers` names them for all stages. `metrics.jsonl` does not depend on
them, and is what figures and alarms read. In a service, each stage is one run,
grouped with the other stages of its work directory; `logger.json` in the
stage's folder keeps the id of that run, so that a resumed stage continues it.
Only the first process talks to services.

Each service reads its own environment variables: WANDB_MODE=offline,
WANDB_PROJECT, TRACKIO_DIR, TRACKIO_SPACE_ID, TRACKIO_PROJECT.

A failing service never ends a run. What it needs is checked before a run
begins; if it fails later, that is reported and the service is dropped.
"""

import importlib.util
import io
import json
import math
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, SupportsFloat

import jax
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from instruct_jax import command, files
from instruct_jax.infra import run

FILE = 'logger.json'
PROJECT = 'instruct_jax'


def check(loggers: str, is_new: bool = True) -> None:
  """Checks `config.loggers` before compute is spent.

  Args:
    loggers: comma-separated names of services.
    is_new: whether the run is new. Only then is each service asked whether it
      accepts the user's key; a resumed run does not depend on the answer.

  Raises:
    ValueError: an unknown or repeated name; a service that is not installed,
      has no key or does not answer.
  """
  names = _split(loggers)
  if set(names) - set(_SERVICES) or len(set(names)) < len(names):
    raise ValueError(
      f'loggers must be some of {", ".join(_SERVICES)}, separated by commas '
      f'and without repeats: {loggers!r}'
    )
  for name in names:
    package = _SERVICES[name].package
    found = importlib.util.find_spec(package)
    # A mere folder of that name, such as W&B's ./wandb, has no origin.
    if found is None or found.origin is None:
      raise ValueError(
        f'loggers: {package} is not installed; pip install -e '
        f"'.[{package}]', or take {name} out of --config.loggers"
      )
    if is_new:
      try:
        _SERVICES[name].check()
      except Exception as error:  # Each library has its own errors.
        raise ValueError(f'loggers: {_problem(name, error)}') from error


def _split(loggers):
  return [name.strip() for name in loggers.split(',') if name.strip()]


def _problem(name, error):
  help = _SERVICES[name].help
  return f'{name}: {command.one_line(error)}; {help}'


class Logger:
  """Sends what a stage measures to its services.

  While entered, it is what `current` returns. Services open at the first use. A
  service that fails is reported and dropped, and the run goes on. An OSError of
  TensorBoard is raised instead: only the disk can be its cause.

  Args:
    loggers: comma-separated names of services, as for `check`.
    folder: of the stage.
    group: name of the run that the stage is part of.
    stage: its name.
    config: dotted key -> value, and whatever else tells what ran.
  """

  _entered: ClassVar[list['Logger']] = []

  def __init__(
    self,
    loggers: str,
    folder: epath.PathLike,
    group: str,
    stage: str,
    config: Mapping[str, Any],
  ):
    self.folder = epath.Path(folder)
    self.group, self.stage, self.config = group, stage, dict(config)
    self._loggers = loggers
    self._open: dict[str, Any] | None = None
    self._alarms: list[str] = []
    self.id = ''

  def __enter__(self) -> 'Logger':
    self._entered.append(self)
    return self

  def __exit__(self, kind, *exception) -> None:
    self._entered.remove(self)
    stopped = kind is not None and issubclass(kind, run.Stopped)
    self.close(run.STOPPED_EXIT_CODE if stopped else int(kind is not None))

  def of(self, folder: epath.PathLike) -> 'Logger':
    """The logger of a part of the stage that trains in its own folder."""
    folder = epath.Path(folder)
    if folder == self.folder:
      return self
    stage = f'{self.stage}-{folder.name}'
    return Logger(self._loggers, folder, self.group, stage, self.config)

  def begin(
    self,
    resume_step: int | None = None,
    before: Mapping[int, Mapping[str, float]] = MappingProxyType({}),
  ) -> None:
    """Opens the services.

    Args:
      resume_step: step of the checkpoint from which the stage and its run in
        each service continue; None begins new runs.
      before: step -> metrics, up to that checkpoint. After a kill, a service
        may lack the last of them.

    Raises:
      ValueError: the file with the id is damaged.
    """
    if self._open is not None:
      return
    self._open = {}
    names = _split(self._loggers) if jax.process_index() == 0 else []
    if not names:
      return
    kept = {} if resume_step is None else self._kept()
    self.id = kept.get('id', '') or secrets.token_hex(4)
    self._alarms = list(kept.get('alarms', ()))
    self._keep()
    for name in names:
      try:
        service = _SERVICES[name](self, resume_step)
        first = service.next_step() if before else 0
        for step, values in before.items():
          if step >= first:
            service.numbers(step, values)
        self._open[name] = service
      except Exception as error:  # Each library has its own errors.
        if _is_disk(name, error):
          raise
        run.say(f'{self.stage}: not sent to {_problem(name, error)}')

  def _kept(self):
    file = self.folder / FILE
    try:
      return dict(run.read_json(file)) if file.exists() else {}
    except (TypeError, ValueError) as error:
      raise ValueError(
        f'{file} is damaged; delete it, and the services show the rest as a '
        'new run'
      ) from error

  def _keep(self):
    run.write_json(self.folder / FILE, {'id': self.id, 'alarms': self._alarms})

  def numbers(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
    """Sends the metrics of a step, by name."""
    self._tell('numbers', step, {k: float(values[k]) for k in sorted(values)})

  def plots(self, step: int, plots: Mapping[str, bytes]) -> None:
    """Sends PNG images, by name."""
    self._tell('plots', step, plots)

  def table(
    self, step: int, name: str, rows: Sequence[Mapping[str, Any]]
  ) -> None:
    """Sends rows of text and numbers; None where a row lacks a column."""
    columns = dict.fromkeys(column for row in rows for column in row)
    whole = [{column: row.get(column) for column in columns} for row in rows]
    if whole:
      self._tell('table', step, name, whole)

  def alarm(self, step: int, text: str) -> None:
    """Sends a warning; the same text is sent only once, even after a resume."""
    self.begin()
    if self._open and text not in self._alarms:
      self._alarms.append(text)
      self._keep()
      self._tell('alarm', step, text)

  def _tell(self, method, *arguments):
    self.begin()
    for name, service in list(self._open.items()):
      try:
        getattr(service, method)(*arguments)
      except Exception as error:
        if _is_disk(name, error):
          raise
        run.say(
          f'{self.stage}: nothing more is sent to {name}: '
          f'{command.one_line(error)}'
        )
        del self._open[name]

  def close(self, code: int = 0) -> None:
    """Closes the services, which may take a minute to send what is left.

    Args:
      code: exit code of the stage: 0, 1 or `run.STOPPED_EXIT_CODE`.
    """
    for name, service in list((self._open or {}).items()):
      try:
        service.close(code)
      except Exception as error:
        if not code:  # Otherwise the stage's own error matters.
          run.say(f'{self.stage}: {name}: {command.one_line(error)}')
    self._open = {}


def current() -> Logger:
  """The logger of the running stage; without one, a logger of no services."""
  return Logger._entered[-1] if Logger._entered else Logger('', '', '', '', {})


def _is_disk(name: str, error: Exception) -> bool:
  """Whether the disk failed, not a service: then the run cannot go on."""
  return name == 'tensorboard' and isinstance(error, OSError)


# --- Services -----------------------------------------------------------------


class _TensorBoard:
  """Event files in the stage's folder, unless it is in an object store."""

  package = 'tensorboardX'
  help = 'take it out of --config.loggers'

  @staticmethod
  def check():
    pass

  def __init__(self, logger, resume_step):
    self._events = None
    self._folder = logger.folder / 'tensorboard'
    if files.is_remote(logger.folder):
      return
    self._folder.mkdir(parents=True, exist_ok=True)
    # Not tensorboardX's SummaryWriter: its thread dies on a full disk, and the
    # next line would wait forever. The suffix makes the file name unique: it
    # has a resolution of one second, in which a run may begin twice.
    self._events = EventsWriter(
      str(self._folder / 'events'), f'.{time.time_ns()}'
    )
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(
      0 if resume_step is None else resume_step + 1, session_log=start
    )
    if resume_step is None:
      text = '\n'.join(f'    {k}: {v}' for k, v in logger.config.items())
      self._write(0, summary=summary.text('config', text))

  def next_step(self):
    return math.inf  # Each event was flushed.

  def _write(self, step, **content):
    if self._events is None:
      return
    event = event_pb2.Event(wall_time=time.time(), step=step, **content)
    try:
      self._events.write_event(event)
      self._events.flush()
    except OSError as error:
      # Python names the file only where opening it fails.
      raise OSError(error.errno, error.strerror, str(self._folder)) from error

  def numbers(self, step, values):
    scalars = [
      value
      for name, number in values.items()
      for value in summary.scalar(name, number).value
    ]
    self._write(step, summary=summary_pb2.Summary(value=scalars))

  def plots(self, step, plots):
    for name, png in plots.items():
      image = summary_pb2.Summary.Image(
        width=int.from_bytes(png[16:20]),
        height=int.from_bytes(png[20:24]),
        colorspace=4,  # RGBA.
        encoded_image_string=png,
      )
      value = summary_pb2.Summary.Value(tag=name, image=image)
      self._write(step, summary=summary_pb2.Summary(value=[value]))

  def table(self, step, name, rows):
    # Indented, so that TensorBoard's Markdown shows the text as it is.
    lines = (json.dumps(dict(row), ensure_ascii=False) for row in rows)
    text = '\n'.join(f'    {line}' for line in lines)
    self._write(step, summary=summary.text(name, text))

  def alarm(self, step, text):
    self._write(step, summary=summary.text('alarm', text))

  def close(self, code):
    if self._events is not None:
      self._events.close()


class _Wandb:
  """A run on Weights & Biases, or with WANDB_MODE=offline in a folder."""

  package = 'wandb'
  help = 'log in by `wandb login`, or set WANDB_MODE=offline'

  @staticmethod
  def check():
    import wandb

    mode = wandb.setup().settings.mode
    if mode in ('online', 'run', 'shared') and not wandb.login(prompt=False):
      raise ValueError('there is no API key')

  def __init__(self, logger, resume_step):
    import wandb

    self._wandb, self._stage = wandb, logger.stage
    is_remote = files.is_remote(logger.folder)
    self._run = wandb.init(
      project=os.environ.get('WANDB_PROJECT', PROJECT),
      dir=None if is_remote else str(logger.folder),
      id=logger.id,
      resume=None if resume_step is None else 'allow',
      name=f'{logger.group}/{logger.stage}',
      group=logger.group,
      job_type=logger.stage,
      config=logger.config,
      settings=wandb.Settings(
        # Our own output is on the terminal and in files.
        console='off',
        disable_code=True,
        # A part of a stage is a separate run beside the stage's own.
        reinit='create_new',
        # Otherwise the end of a stage waits for a lost network. What is not
        # sent stays in the run's folder.
        finish_timeout=60,
      ),
    )

  def next_step(self):
    return self._run.step  # Offline, it does not know of earlier starts.

  def numbers(self, step, values):
    self._run.log(values, step=step)

  def plots(self, step, plots):
    images = {k: self._wandb.Image(_image(v)) for k, v in plots.items()}
    self._run.log(images, step=step)

  def table(self, step, name, rows):
    table = self._wandb.Table(
      columns=list(rows[0]),
      data=[list(row.values()) for row in rows],
      allow_mixed_types=True,
    )
    self._run.log({name: table}, step=step)

  def alarm(self, step, text):
    self._run.alert(title=f'{self._stage}: alarm', text=text, level='WARN')

  def close(self, code):
    if code == run.STOPPED_EXIT_CODE:
      self._run.mark_preempting()
    self._run.finish(exit_code=code)


class _Trackio:
  """A run in Trackio's local store, or in a private Space."""

  package = 'trackio'
  help = 'log in by `hf auth login`, or unset TRACKIO_SPACE_ID'

  @staticmethod
  def check():
    import huggingface_hub

    if os.environ.get('TRACKIO_SPACE_ID'):
      huggingface_hub.whoami()

  def __init__(self, logger, resume_step):
    import trackio

    self._trackio, self._stage = trackio, logger.stage
    # A resumed run is found by its name.
    self._run = trackio.init(
      project=os.environ.get('TRACKIO_PROJECT', PROJECT),
      name=f'{logger.group}-{logger.stage}-{logger.id}',
      group=logger.group,
      config=logger.config,
      resume='never' if resume_step is None else 'allow',
      private=True,
      embed=False,
    )

  def next_step(self):
    # The attribute is private; without it, steps would arrive twice.
    return getattr(self._run, '_next_step', 0)

  def numbers(self, step, values):
    self._run.log(values, step=step)

  def plots(self, step, plots):
    images = {k: self._trackio.Image(_image(v)) for k, v in plots.items()}
    self._run.log(images, step=step)

  def table(self, step, name, rows):
    data = [dict(row) for row in rows]
    self._run.log({name: self._trackio.Table(data=data)}, step=step)

  def alarm(self, step, text):
    self._run.alert(
      title=f'{self._stage}: alarm',
      text=text,
      level=self._trackio.AlertLevel.WARN,
    )

  def close(self, code):
    self._run.finish()


def _image(png: bytes):
  import PIL.Image  # Matplotlib, which drew it, needs it anyway.

  with PIL.Image.open(io.BytesIO(png)) as image:
    return image.copy()


_SERVICES = {
  'tensorboard': _TensorBoard,
  'wandb': _Wandb,
  'trackio': _Trackio,
}
