"""Several processes of one run: how they join, and how they end together.

A process that fails writes the reason to the coordination service through which
they joined; the others then end within seconds, each printing one line. When a
process is killed, its connection to the first process breaks, and the first
process writes the reason.
"""

import contextlib
import functools
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

import jax
from jax._src import distributed

from instruct_jax import files
from instruct_jax.infra import run

# Seconds without a heartbeat after which the service counts a process as lost.
HEARTBEAT_SECONDS = 30
# Seconds that processes wait for each other at an orderly end.
SHUTDOWN_SECONDS = 30
# Seconds in which all processes have to join.
JOIN_SECONDS = 300
# Seconds between checks for a failure elsewhere.
_TICK = 0.5
# Seconds that the first process, which hosts the service, waits for the others
# to read why it ends.
_READ_SECONDS = 15

_ENDED = 'instruct_jax/ended'
_READ = 'instruct_jax/read/'
_LIFELINE = 'instruct_jax/lifeline'
_BYE = b'bye\n'
# Seconds that a process whose collective broke waits for the reason.
_WHY_SECONDS = 5
# Words in the error message of a collective that has lost its peer.
_LOST_PEER = (
  'gloo',
  'unavailable',
  'connection closed',
  'connection reset',
  'socket closed',
  'broken pipe',
  'another task',
)

_together: '_Together | None' = None


def join(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
  """Joins the other processes of a run, before the first use of a device.

  Args:
    coordinator: HOST:PORT of process 0, 'auto' on a TPU pod, None for a single
      process.
    num_processes, process_id: how many there are, and this one's number.

  Raises:
    ValueError: an address without numbers, numbers without an address, or a
      number out of range.
  """
  global _together
  if coordinator is None:
    if num_processes is not None or process_id is not None:
      raise ValueError('--num_processes and --process_id need --coordinator')
    return
  address = coordinator
  if coordinator == 'auto':
    address = num_processes = process_id = None
  else:
    if num_processes is None or process_id is None:
      raise ValueError(
        f'--coordinator={coordinator} needs --num_processes and --process_id '
        '(on a TPU pod: --coordinator=auto alone)'
      )
    if not 0 <= process_id < num_processes:
      raise ValueError(
        f'--process_id={process_id} must be from 0 to {num_processes - 1}, '
        f'one less than --num_processes={num_processes}'
      )
  # This service would catch SIGTERM.
  jax.config.update('jax_enable_preemption_service', False)
  # On CPU, programs in flight may start in different orders on two devices; if
  # they use collectives, they deadlock.
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  # The coordination service aborts a process that has lost the others, and
  # Python's fault handler would then list every loaded extension module.
  signal.signal(signal.SIGABRT, signal.SIG_DFL)
  # The service would abort a process that waits too long.
  patience = threading.Timer(JOIN_SECONDS, _give_up, [coordinator])
  patience.daemon = True
  patience.start()
  jax.distributed.initialize(
    address,
    num_processes,
    process_id,
    initialization_timeout=2 * JOIN_SECONDS,
    heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    shutdown_timeout_seconds=SHUTDOWN_SECONDS,
  )
  patience.cancel()
  _together = _Together(distributed.global_state)
  _agree_on_programs()


def _give_up(coordinator: str) -> None:
  _say(
    'error: the processes of this run did not all connect at '
    f'--coordinator={coordinator} within {JOIN_SECONDS} s. Each prints its own '
    'error; start all of them with the same --coordinator and --num_processes.'
  )
  os._exit(1)


def _agree_on_programs() -> None:
  """Turns the compilation cache off unless all processes can load from it.

  A loaded program and a compiled one may differ in the order of their
  collectives. Only the first process writes to the cache, so other hosts do not
  find programs in a local folder; on CPU the keys differ between processes.
  """
  folder = jax.config.jax_compilation_cache_dir or ''
  if jax.default_backend() == 'cpu' or not files.is_remote(folder):
    jax.config.update('jax_compilation_cache_dir', None)


def fail(
  message: str, error: BaseException | None = None, code: int = 1
) -> NoReturn:
  """Ends this process and all others of the run; callable from any thread.

  Args:
    message: printed to standard error, unless another process ended first; ''
      if already printed.
    error: the exception behind it.
    code: exit code of all processes.
  """
  if _together is not None:
    _together.fail(message, error, code)
  _say(message)
  sys.exit(code)


def are_joined() -> bool:
  """Whether this process is one of several that watch each other."""
  return _together is not None


def leave() -> None:
  """Waits for the orderly end of all processes, and stops watching them."""
  global _together
  if _together is not None:
    together, _together = _together, None
    together.leave()


class _Together:
  """One process's watch over the others."""

  def __init__(self, state):
    self._client = state.client
    self._index, self._count = state.process_id, state.num_processes
    self._is_over = threading.Event()
    self._end = threading.Lock()  # Held by the thread that ends the process.
    self._line = None  # Connection to the first process.
    jobs = [self._look]
    if self._index == 0:
      family = {}
      if socket.has_dualstack_ipv6():
        family = {'family': socket.AF_INET6, 'dualstack_ipv6': True}
      server = socket.create_server(('', 0), **family)
      self._client.key_value_set(_LIFELINE, str(server.getsockname()[1]))
      jobs.append(functools.partial(self._accept, server))
    else:
      host = state.coordinator_address.rpartition(':')[0].strip('[]')
      # Without a connection, the service's heartbeat notices a lost process.
      with contextlib.suppress(OSError):
        port = self._client.blocking_key_value_get(_LIFELINE, 60_000)
        self._line = socket.create_connection((host, int(port)), timeout=10)
        self._line.sendall(f'{self._index}\n'.encode())
        jobs.append(self._cling)
    self._threads = [threading.Thread(target=j, daemon=True) for j in jobs]
    for thread in self._threads:
      thread.start()

  # --- Noticing ---------------------------------------------------------------

  def _look(self):
    while not self._is_over.wait(_TICK):
      if (note := self._note()) is not None:
        self._follow(note)

  def _note(self):
    """Why another process has ended, or None."""
    return json.loads(self._value(_ENDED) or 'null')

  def _value(self, key):
    try:
      return self._client.key_value_try_get(key)
    except jax.errors.JaxRuntimeError:  # There is no such key yet.
      return None

  def _accept(self, server):
    """Accepts the connections of the others, in the first process."""
    server.settimeout(_TICK)
    with server:
      while not self._is_over.is_set():
        with contextlib.suppress(TimeoutError):
          line, _ = server.accept()
          threading.Thread(
            target=self._listen, args=(line,), daemon=True
          ).start()

  def _listen(self, line):
    """Reports a process as lost if its connection breaks without a goodbye."""
    text = b''
    with line, contextlib.suppress(OSError):
      while received := line.recv(64):
        text += received
    number, _, goodbye = text.partition(b'\n')
    # Unrelated programs may connect to the port, too.
    if number.isdigit() and not goodbye and not self._is_over.is_set():
      self._lost(int(number))

  def _cling(self):
    """Notices, in the other processes, that the first process is gone."""
    self._line.settimeout(None)
    with contextlib.suppress(OSError):
      self._line.recv(1)
    if not self._is_over.is_set():
      self._lost(0)

  def _lost(self, number):
    self._end.acquire()
    note = None if number == 0 else self._note()
    if note is None:
      # The machine may have been preempted: the same command continues.
      code = run.STOPPED_EXIT_CODE
      error = 'it was killed or crashed'
      note = {'process': number, 'code': code, 'error': error}
      if number:
        self._publish(note)
    self._say_and_exit(note)

  # --- Ending -----------------------------------------------------------------

  def fail(self, message, error, code) -> NoReturn:
    self._end.acquire()
    deadline = time.monotonic() + _WHY_SECONDS * _is_lost_peer(error)
    while (note := self._note()) is None and time.monotonic() < deadline:
      time.sleep(_TICK)
    if note is None:
      mine = {'process': self._index, 'code': code, 'error': message}
      # Another process may have been quicker.
      note = None if self._publish(mine) else self._note()
    if note is not None:
      self._say_and_exit(note)
    _say(message)
    self._exit(code)

  def _follow(self, note):
    if note['process'] == self._index:
      return
    self._end.acquire()
    self._say_and_exit(note)

  def _say_and_exit(self, note) -> NoReturn:
    if not note['error']:
      _say(
        f'process {note["process"]} was stopped, and so is this one; the same '
        'command continues'
      )
    else:
      _say(
        f'error: another process failed first (process '
        f'{note["process"]}: {_first_line(note["error"])})'
      )
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._client.key_value_set(f'{_READ}{self._index}', '')
    self._exit(note['code'], note['process'])

  def _publish(self, note) -> bool:
    """Writes the note; False if there is one already or the service is gone."""
    try:
      self._client.key_value_set(_ENDED, json.dumps(note))
    except jax.errors.JaxRuntimeError:
      return False
    return True

  def _exit(self, code, ended=None) -> NoReturn:
    if self._index == 0:
      # The service ends with this process, and would abort the others.
      deadline = time.monotonic() + _READ_SECONDS
      waiting = {*range(1, self._count)} - {ended}
      while waiting and time.monotonic() < deadline:
        waiting = {n for n in waiting if self._value(f'{_READ}{n}') is None}
        time.sleep(0.1)
    sys.stdout.flush()
    sys.stderr.flush()
    # An orderly exit would wait for processes that are gone.
    os._exit(code)

  def leave(self):
    try:
      self._client.wait_at_barrier('instruct_jax/end', SHUTDOWN_SECONDS * 1_000)
    except jax.errors.JaxRuntimeError:
      if (note := self._note()) is not None:
        self._follow(note)
    self._is_over.set()
    if self._line is not None:
      with contextlib.suppress(OSError):
        self._line.sendall(_BYE)
        self._line.shutdown(socket.SHUT_RDWR)
    for thread in self._threads:
      thread.join()
    jax.distributed.shutdown()


def _is_lost_peer(error: BaseException | None) -> bool:
  """Whether another process that ended may have caused the error."""
  if not isinstance(error, jax.errors.JaxRuntimeError):
    return False
  text = str(error).lower()
  return any(word in text for word in _LOST_PEER)


def _first_line(error: object) -> str:
  lines = str(error).strip().splitlines()
  return lines[0].removeprefix('error: ') if lines else ''


def _say(message: str) -> None:
  if message:
    print(message, file=sys.stderr, flush=True)
