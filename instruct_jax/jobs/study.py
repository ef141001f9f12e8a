"""Tests the paper's claims over several seeds.

Each seed is a separate run of main.py below the work directory, with only the
stages that the chosen claims read. Claims share stages. An interrupted study
resumes where it stopped, and seeds can be added later. A seed that fails does
not stop the others. A seed that finished leaves a record of all that claims
read; with records, seeds that ran on other machines are judged together.
`evals/claims.py` has the claims and their rules.
"""

import concurrent.futures
import itertools
import json
import pathlib
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from instruct_jax import files
from instruct_jax.evals import claims, plots, report
from instruct_jax.infra import run as run_lib

PROCESSES = 'one'
RUNS_AGAIN = True  # With more seeds, or other rules on the same runs.

ROOT = pathlib.Path(__file__).parents[2]


def seeds_of(config) -> list[int]:
  """The seeds, ascending.

  Raises:
    ValueError: they are not distinct, nonnegative integers.
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


def recorded(config) -> dict[int, list[dict[str, Any]]]:
  """Seed -> its records, for each seed that has any in `config.records`.

  A seed may have several, from studies of different claims, in that folder and
  in the folders there.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: a record is damaged, is of another seed, or has the smallest
      stages where this study has not or the reverse; or no record of a seed has
      the stages of a claim.
  """
  if not config.records:
    return {}
  folder, found = files.absolute(config.records), {}
  if not folder.is_dir():
    raise FileNotFoundError(f'records: there is no folder {folder}')
  for seed in seeds_of(config):
    name = f'seed_{seed}.json'
    paths = sorted([*folder.glob(name), *folder.glob(f'*/{name}')])
    if paths:
      found[seed] = [_checked(path, seed, config.smoke) for path in paths]
    for name in claims.chosen(config.claims) if paths else ():
      if not _of_claim(found[seed], name):
        raise ValueError(
          f'{", ".join(map(str, paths))}: no stages of {name}. Leave {name} '
          'out of the claims, or move the file away to run the seed here'
        )
  return found


def _checked(path: epath.Path, seed: int, smoke: bool) -> dict[str, Any]:
  """A record, if it is of this seed; raises ValueError if not."""
  try:
    value = json.loads(path.read_text())
    of, read = (value['seed'], value['is_smoke']), claims.Seed(value)
    for stage in (*read.stages, *itertools.chain(*read.stages_of.values())):
      read.seconds(stage)
  except (ValueError, TypeError, LookupError, AttributeError) as error:
    raise ValueError(f'{path} is no record of a seed: {error}') from error
  if of != (seed, smoke):
    raise ValueError(
      f'{path} is of seed {of[0]} with smoke={of[1]}, not of {seed} with '
      f'smoke={smoke}'
    )
  return value


def _of_claim(records, name: str) -> claims.Seed | None:
  """The first of a seed's records that has the stages of a claim."""
  for value in records:
    seed = claims.Seed(value)
    if set(claims.needs([name])) <= set(seed.stages_of):
      return seed
  return None


def validate(config):
  """Checks claims, seeds, records and the number of processes."""
  claims.chosen(config.claims)
  recorded(config)
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
  """The main.py command that runs one seed."""
  variant = f'{config.claims},seed' + ',smoke' * config.smoke
  return [
    *(sys.executable, '-m', 'instruct_jax.main'),
    f'--config={ROOT / "configs" / "study.py"}:{variant}',
    f'--workdir={folder / f"seed_{seed}"}',
    f'--config.seed={seed}',
    f'--config.compilation_cache={config.compilation_cache}',
  ]


class Runs:
  """Runs the seeds, several at a time.

  Args:
    config: the config of the study.
    folder: the folder of the runs.
    keep: called with each seed that finished.
  """

  def __init__(self, config, folder: epath.Path, keep: Callable[[int], None]):
    self._config, self._folder, self._keep = config, folder, keep
    self._running: list[subprocess.Popen] = []
    self._lock = threading.Lock()
    self._ends = False

  def one(self, seed: int) -> None:
    """Runs a seed to its end; its output goes to seed_N.log.

    Raises:
      RuntimeError: the run failed; gives its last line of output.
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

  def all(self, seeds: list[int]) -> dict[int, str]:
    """Runs the seeds; one that fails does not stop the others.

    Returns:
      Seed -> the error, for each seed that failed.
    """
    number, failed = self._config.num_processes, {}
    with concurrent.futures.ThreadPoolExecutor(number) as pool:
      waiting = {pool.submit(self.one, seed): seed for seed in seeds}
      try:
        with run_lib.Progress('study', len(seeds), unit='seeds') as progress:
          while waiting:
            done, _ = concurrent.futures.wait(
              waiting, 1.0, concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
              seed = waiting.pop(future)
              try:
                future.result()
                self._keep(seed)
              except RuntimeError as error:
                failed[seed] = str(error)
                run_lib.say(f'study: {error}')
            progress.update(len(done))
      except BaseException:
        self._end()
        raise
    return failed

  def _end(self):
    """Asks the runs to save and stop."""
    with self._lock:
      self._ends = True
      for process in self._running:
        if process.poll() is None:
          process.terminate()


def run(config, workdir: epath.Path):
  """Runs the seeds, applies the rules, and writes the study.

  Writes study.md, study.json and a figure for each claim, from the seeds that
  finished, and their records.

  Raises:
    RuntimeError: a seed failed; raised after the study was written.
  """
  validate(config)
  names, seeds = claims.chosen(config.claims), seeds_of(config)
  folder = epath.Path(config.runs or workdir)
  folder.mkdir(parents=True, exist_ok=True)
  records = recorded(config)

  def keep(seed):
    record = claims.record(folder / f'seed_{seed}', seed)
    record = report.plain_json(record | {'is_smoke': config.smoke})
    text = json.dumps(record, sort_keys=True) + '\n'
    files.write_bytes(workdir / 'records' / f'seed_{seed}.json', text.encode())
    records[seed] = [record]

  failed = Runs(config, folder, keep).all(
    [seed for seed in seeds if seed not in records]
  )
  seeds = sorted(records)
  if seeds:
    write(config, workdir, names, records)
  if failed:
    raise RuntimeError(
      f'{"; ".join(failed.values())}. The same command goes on from where '
      f'{"it" if len(failed) == 1 else "they"} stopped'
    )
  return {'seeds': seeds}


def write(config, workdir, names, records: Mapping[int, Any]) -> None:
  """Judges the claims on the finished seeds, and writes the study.

  Args:
    config: the config of the study.
    workdir: where study.md, study.json and the figures go.
    names: the claims.
    records: seed -> its records.
  """
  seeds = sorted(records)
  verdicts, points, hours = {}, {}, {}
  for name in names:
    claim = claims.CLAIMS[name]
    read = [_of_claim(records[seed], name) for seed in seeds]
    verdicts[name] = claims.verdict(claim, read)
    points[name] = points_of(claim, read)
    panels = [panel for panel in points[name] if panel['points']]
    if panels:
      figure = plots.over_seeds(panels, f'{name}: {claim.text}')
      files.write_bytes(workdir / f'{name}.png', figure)
    hours[name] = cost(name, read) / 3600
  seconds = {
    str(seed): {
      stage: part.seconds(stage)
      for part in map(claims.Seed, records[seed])
      for stage in part.stages
    }
    for seed in seeds
  }
  shared = shared_cost([claims.Seed(records[seed][0]) for seed in seeds]) / 3600
  text = table(verdicts, seeds, hours, shared, config.smoke)
  files.write_bytes(workdir / 'study.md', text.encode())
  summary = {
    name: {
      'verdict': found.text,
      'hours': hours[name],
      'margins': dict(found.margins),
      'panels': points[name],
    }
    for name, found in verdicts.items()
  }
  run_lib.write_json(
    workdir / 'study.json',
    report.plain_json(
      {
        'seeds': seeds,
        # Of each seed's records.
        'commits': {
          str(seed): [part['commit'] for part in records[seed]]
          for seed in seeds
        },
        'shared_hours': shared,
        'seconds': seconds,
        'claims': summary,
      }
    ),
  )
  print(text, flush=True)


def points_of(claim: claims.Claim, seeds) -> list[dict]:
  """The panels of a claim's figure, with the points of seeds that have any."""
  panels = []
  for panel in claim.panels:
    found = [claims.measured(panel.points, seed)[0] for seed in seeds]
    panels.append(
      {
        'x': panel.x,
        'y': panel.y,
        'kind': panel.kind,
        'points': [points for points in found if points is not None],
      }
    )
  return panels


def _stages(name: str, seed: claims.Seed) -> set[str]:
  """The stages that a claim needs beyond the recipe."""
  needs = claims.CLAIMS[name].needs
  return {stage for need in needs for stage in seed.stages_of[need]}


def cost(name: str, seeds) -> float:
  """Seconds of the stages that a claim needs, mean over seeds.

  Excludes the shared stages: the recipe up to PPO-ptx, and the judging of all
  models.
  """
  totals = [sum(map(seed.seconds, _stages(name, seed))) for seed in seeds]
  return sum(totals) / len(totals)


def shared_cost(seeds) -> float:
  """Seconds of the stages that all claims share, mean over seeds."""
  totals = []
  for seed in seeds:
    own = set().union(*seed.stages_of.values())
    totals.append(sum(map(seed.seconds, set(seed.stages) - own)))
  return sum(totals) / len(totals)


# --- The report ---------------------------------------------------------------


def table(verdicts, seeds, hours, shared: float, is_smoke: bool) -> str:
  """The text of study.md."""
  listed = ', '.join(map(str, seeds))
  lines = [
    "# The paper's claims on the miniature",
    '',
    f'Seeds {listed}. A margin is positive where the claim is so; in brackets '
    "Student's 95 % interval over seeds. A claim holds if all its margins lie "
    'above zero, does not hold if one lies below, and is not told apart '
    'otherwise. Rules and tolerances were fixed beforehand '
    '(`instruct_jax/evals/claims.py`), and each claim is judged by itself, '
    'without a correction for their number. Hours are of one seed, beside the '
    f'{shared:.2f} of what all claims share; a stage of several claims counts '
    'in each. Policies are judged with averaged weights, along RL with those '
    'of the snapshot. Where a margin cannot be read on some seed, those that '
    'have it are counted in brackets, and the claim cannot hold. '
    'Judged by the gold utility of the miniature, a program: nothing here is a '
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
      f'{what} {_interval(margin, len(seeds))}'
      for what, margin in found.margins.items()
    )
    cells = (name, claim.text, claim.source, claim.rule, margins, found.text)
    rows.append([*map(report.escape, cells), f'{hours[name]:.2f}'])
  titles = ['', 'claim', 'source', 'rule', 'margins', 'verdict', 'hours']
  lines += report.table(titles, rows)
  for name, found in verdicts.items():
    lines += ['', f'## {name}', '', f'![{name}]({name}.png)']
    lines += [
      f'\n{report.escape(what)} cannot be read: {report.escape(reason)}'
      for what, margin in found.margins.items()
      for reason in margin.missing
    ]
  return '\n'.join(lines) + '\n'


def _interval(margin: claims.Margin, num_seeds: int) -> str:
  found = margin.interval
  if found is None:
    return f'cannot be read: {margin.missing[0]}'
  of = f' (seeds: {len(margin.values)})' if margin.missing else ''
  if found.num_clusters == 1:
    return (
      f'{found.mean:.3g} (one seed)'
      if num_seeds == 1
      else f'{found.mean:.3g}{of}'
    )
  return f'{found.mean:.3g} [{found.low:.3g}, {found.high:.3g}]{of}'
