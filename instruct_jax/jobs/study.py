"""The paper's claims over seeds: runs what they need, and judges them.

Each seed is a run of main.py of its own, below the work directory, with only
the stages that the chosen claims read; stages are shared between claims, and an
interrupted study goes on where it was. `evals/claims.py` has the claims and
their rules.
"""

import concurrent.futures
import pathlib
import shlex
import subprocess
import sys
import threading

from etils import epath

from instruct_jax import files
from instruct_jax.evals import claims, plots, report
from instruct_jax.infra import run as run_lib

PROCESSES = 'one'

ROOT = pathlib.Path(__file__).parents[2]


def seeds_of(config) -> list[int]:
  """The seeds, ascending.

  Raises:
    ValueError: they are no different whole numbers.
  """
  try:
    found = sorted(int(seed) for seed in config.seeds.split(','))
  except ValueError:
    found = []
  if not found or found[0] < 0 or len(set(found)) < len(found):
    raise ValueError(
      f'seeds must be different whole numbers with commas between, such as '
      f'11,12,13: {config.seeds!r}'
    )
  return found


def validate(config):
  """Checks claims, seeds and the number of processes."""
  claims.chosen(config.claims)
  seeds_of(config)
  if config.num_processes < 1:
    raise ValueError(
      f'num_processes must be at least 1: {config.num_processes}'
    )


def inputs(config):
  """None: each seed's run makes its own data."""
  del config
  return {}


def command_of(config, folder: epath.Path, seed: int) -> list[str]:
  """main.py for one seed."""
  variant = f'{config.claims},seed' + ',smoke' * config.smoke
  return [
    *(sys.executable, '-m', 'instruct_jax.main'),
    f'--config={ROOT / "configs" / "study.py"}:{variant}',
    f'--workdir={folder / f"seed_{seed}"}',
    f'--config.seed={seed}',
    f'--config.compilation_cache={config.compilation_cache}',
  ]


class Runs:
  """The runs of the seeds, several at a time.

  Args:
    config: of the study.
    folder: of the runs.
  """

  def __init__(self, config, folder: epath.Path):
    self._config, self._folder = config, folder
    self._running: list[subprocess.Popen] = []
    self._lock = threading.Lock()
    self._ends = False

  def one(self, seed: int) -> None:
    """Runs a seed to its end; what it prints goes to seed_N.log.

    Raises:
      RuntimeError: it failed; with its last line.
    """
    command = command_of(self._config, self._folder, seed)
    log = pathlib.Path(self._folder / f'seed_{seed}.log')
    with log.open('a') as file:
      with self._lock:
        if self._ends:
          return
        process = subprocess.Popen(
          command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )
        self._running.append(process)
      code = process.wait()
    if code and not self._ends:
      lines = log.read_text(errors='replace').strip().splitlines()
      raise RuntimeError(
        f'seed {seed}: {shlex.join(command[1:5])} ended with {code} ({log}): '
        f'{lines[-1] if lines else "it printed nothing"}'
      )

  def all(self, seeds: list[int]) -> None:
    """Runs the seeds; one that fails ends the others in an orderly way."""
    number = self._config.num_processes
    with concurrent.futures.ThreadPoolExecutor(number) as pool:
      waiting = {pool.submit(self.one, seed): seed for seed in seeds}
      try:
        with run_lib.Progress('study', len(seeds), unit='seeds') as progress:
          while waiting:
            done, _ = concurrent.futures.wait(
              waiting, 1.0, concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
              waiting.pop(future)
              future.result()
            progress.update(len(done))
      except BaseException:
        self._end()
        raise

  def _end(self):
    """Asks the runs to save and stop."""
    with self._lock:
      self._ends = True
      for process in self._running:
        if process.poll() is None:
          process.terminate()


def run(config, workdir: epath.Path):
  """Runs the seeds, applies the rules, and writes the study.

  Writes study.md, study.json and a figure for each claim.
  """
  validate(config)
  names, seeds = claims.chosen(config.claims), seeds_of(config)
  folder = epath.Path(config.runs or workdir)
  folder.mkdir(parents=True, exist_ok=True)
  Runs(config, folder).all(seeds)
  read = [claims.Seed(folder / f'seed_{seed}') for seed in seeds]
  verdicts = {}
  for name in names:
    claim = claims.CLAIMS[name]
    verdicts[name] = claims.verdict(claim, read)
    points = [claim.points(seed) for seed in read]
    files.write_bytes(
      workdir / f'{name}.png',
      plots.over_seeds(points, f'{name}: {claim.text}', *claim.axes),
    )
  hours = {name: cost(name, read) / 3600 for name in names}
  text = table(verdicts, seeds, hours, config.smoke)
  files.write_bytes(workdir / 'study.md', text.encode())
  summary = {
    name: {
      'verdict': found.text,
      'hours': hours[name],
      'margins': dict(found.margins),
    }
    for name, found in verdicts.items()
  }
  run_lib.write_json(
    workdir / 'study.json',
    {'seeds': seeds, 'claims': report.plain_json(summary)},
  )
  print(text, flush=True)
  return {name: found.text for name, found in verdicts.items()}


def cost(name: str, seeds) -> float:
  """Seconds of the stages that a claim needs, mean over seeds.

  Without the common ones of the recipe up to PPO-ptx, and the judging of all.
  """
  needs = claims.CLAIMS[name].needs
  totals = [
    sum(
      seed.seconds(stage)
      for stage in {
        stage for need in needs for stage in seed.config['stages_of'][need]
      }
    )
    for seed in seeds
  ]
  return sum(totals) / len(totals)


# --- The report ---------------------------------------------------------------


def table(verdicts, seeds, hours, is_smoke: bool) -> str:
  """study.md."""
  listed = ', '.join(map(str, seeds))
  lines = [
    "# The paper's claims on the miniature",
    '',
    f'Seeds {listed}. A margin is positive where the claim is so; in brackets '
    "Student's 95 % interval over seeds. A claim holds if all its margins lie "
    'above zero, does not hold if one lies below, and is not told apart '
    'otherwise. Rules and tolerances were fixed beforehand '
    '(`instruct_jax/evals/claims.py`), and each claim is judged by itself, '
    'without a correction for their number. Hours are of one seed, beside what '
    'all claims share; a stage of several claims counts in each. Policies are '
    'judged with averaged weights, along RL with those of the snapshot. Judged '
    'by the gold utility of the miniature, a program: nothing here is a '
    'preference of people.',
    '',
  ]
  if is_smoke:
    lines += [
      'Stages were as small as still run: the figures mean nothing.',
      '',
    ]
  rows = []
  for name, found in verdicts.items():
    claim = claims.CLAIMS[name]
    margins = '; '.join(
      f'{what} {_interval(margin)}' for what, margin in found.margins.items()
    )
    cells = (name, claim.text, claim.source, claim.rule, margins, found.text)
    rows.append([*map(report.escape, cells), f'{hours[name]:.2f}'])
  titles = ['', 'claim', 'source', 'rule', 'margins', 'verdict', 'hours']
  lines += report.table(titles, rows)
  for name in verdicts:
    lines += ['', f'## {name}', '', f'![{name}]({name}.png)']
  return '\n'.join(lines) + '\n'


def _interval(margin: claims.Margin) -> str:
  found = margin.interval
  if found.num_clusters == 1:
    return f'{found.mean:.3g} (one seed)'
  return f'{found.mean:.3g} [{found.low:.3g}, {found.high:.3g}]'
