"""A file imports only from lower floors; the table is data."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MATHS = ('masked', 'losses', 'advantages', 'rewards', 'packing', 'lora')
MODELS = ('model_fns', 'model_folder')
WORLDS = (
  'types',
  'files',
  'data',
  'miniature',
  'infra',
  'evals',
  'hub',
  *MODELS,
  'models.hf',
  'judge_fns',
)
PREFERENCES = (
  'worlds.preferences',
  'worlds.preference_lengths',
  'worlds.preference_sources',
  'worlds.preference_splits',
)

# What each file, or folder of files, may import of this repository. The entry
# with the longest matching name counts; a file without an entry is an error.
# Names are below `instruct_jax` unless they begin with another top folder.
FLOORS = {
  # 0
  'types': (),
  'files': (),
  'hub': ('files', 'command'),
  'command': (),
  # 1: columns; inside a folder files import each other, across columns never.
  'masked': ('types',),
  'losses': ('types', 'masked'),
  'advantages': ('types', 'masked'),
  'rewards': ('types', 'masked'),
  'packing': ('types', 'masked'),
  'lora': ('types',),
  'sampling': ('types',),
  'alarms': (),
  'models': ('types', 'models'),
  'models.hf': ('types', 'files', 'models'),
  'data': ('types', 'files', 'hub', 'command', 'data', 'miniature'),
  'miniature': ('types', 'data', 'miniature'),
  'infra': ('types', 'files', 'hub', 'command', 'infra'),
  # 2: models and infra meet in two files; elsewhere the model arrives as an
  # argument. Never each other.
  'model_fns': ('types', 'lora', 'models', 'infra'),
  'model_folder': (
    'types',
    'files',
    'hub',
    'lora',
    'models',
    'infra',
    'data.tokenizer',
    'model_fns',
  ),
  'export': (
    'command',
    'files',
    'hub',
    'lora',
    *MODELS,
    'data',
    'models',
    'infra',
  ),
  'rollout': ('types', *MATHS, 'sampling', 'infra.sharding'),
  'ppo': (
    'types',
    *MATHS,
    'infra.train_state',
    'infra.sharding',
    'infra.slices',
  ),
  'supervised': (
    'types',
    *MATHS,
    'infra.optimizer',
    'infra.train_state',
  ),
  # What puts the parts together: a rollout's scores, questions to a model, and
  # all that RL experiments share.
  'score_fns': ('types', *MATHS, 'rollout', 'data', 'infra'),
  'queries': (
    'types',
    'hub',
    *MATHS,
    *MODELS,
    'models',
    'data',
    'infra',
    'rollout',
    'evals',
  ),
  'rl': (
    'types',
    *MATHS,
    *MODELS,
    'models',
    'data',
    'infra',
    'alarms',
    'ppo',
    'queries',
    'rollout',
    'score_fns',
    'evals',
  ),
  'rankings': (
    'types',
    *MATHS,
    *MODELS,
    'models',
    'data',
    'infra',
    'evals.preference_accuracy',
  ),
  # Models that answer and judge, and the worlds they are asked about.
  'asking': (
    'types',
    *MODELS,
    'data',
    'infra',
    'rollout',
    'queries',
    'evals',
  ),
  'judge_fns': ('types', *MODELS, 'data', 'queries', 'score_fns', 'evals'),
  'run_figures': ('model_folder', 'asking', 'infra', 'evals'),
  'worlds': WORLDS,
  # The preferences' data stage in parts.
  **dict.fromkeys(
    PREFERENCES,
    (*WORLDS, *PREFERENCES[1:]),
  ),
  # 3: predictions and samples arrive as functions.
  'evals': (
    'types',
    'files',
    'command',
    *MATHS,
    'data',
    'miniature',
    'rollout',
    'ppo',
    'supervised',
    'evals',
  ),
  # The labeling site: people in the place of `experiments.compare`.
  'labeling': ('command', 'data', 'miniature', 'evals', 'labeling'),
  # Only where a reward model orders its tasks.
  'labeling.active': (
    'model_folder',
    'judge_fns',
    'models.config',
    'data',
    'infra',
    'evals',
    'labeling',
  ),
  # 4: anything below, never each other.
  **dict.fromkeys(
    ('experiments', 'jobs'),
    (
      'types',
      'files',
      *MATHS,
      *MODELS,
      'models',
      'data',
      'miniature',
      'infra',
      'alarms',
      'score_fns',
      'queries',
      'rankings',
      'asking',
      'run_figures',
      'judge_fns',
      'rl',
      'rollout',
      'ppo',
      'supervised',
      'evals',
    ),
  ),
  # These train, compile or time what an experiment builds.
  'jobs.crossval': (
    'types',
    *MATHS,
    *MODELS,
    'models.config',
    'data.tokenizer',
    'infra',
    'rankings',
    'evals.preference_accuracy',
    'experiments.reward',
  ),
  'jobs.plan': (
    'types',
    *MATHS,
    *MODELS,
    'models',
    'infra',
    'ppo',
    'rl',
    'rollout',
    'sampling',
    'experiments',
  ),
  'recipe': (
    'types',
    *MODELS,
    'models.config',
    'data.tokenizer',
    'infra',
    'judge_fns',
    'queries',
    *PREFERENCES,
    'jobs.plan',
  ),
  'jobs.export_models': ('export', 'files', 'hub', 'model_folder', 'infra'),
  'jobs.speed': (
    'types',
    *MATHS,
    *MODELS,
    'models',
    'data',
    'infra',
    'rl',
    'experiments',
  ),
  # Commands of their own.
  **dict.fromkeys(
    ('chat', 'lm_eval_adapter'),
    (
      'types',
      'files',
      'command',
      'data',
      'infra',
      *MODELS,
      'queries',
      'rollout',
      'sampling',
      'evals.samples',
    ),
  ),
  # 5: runs experiments and jobs by name.
  'main': ('types', 'files', 'command', 'infra', 'score_fns'),
  # Names and numbers only; the shapes of published models are such numbers.
  'configs': ('configs', 'models.config'),
  # The claims say which stages they read.
  'configs.study': ('configs', 'evals.claims'),
}
TOP_FOLDERS = ('instruct_jax', 'experiments', 'configs')


def module_name(path: pathlib.PurePath) -> str:
  """`instruct_jax/infra/run.py` -> `infra.run`; other top folders stay."""
  parts = list(path.with_suffix('').parts)
  if parts[0] == 'instruct_jax':
    parts = parts[1:]
  if parts[-1] == '__init__':
    parts = parts[:-1]
  return '.'.join(parts)


def imported_names(source: str) -> list[tuple[int, str]]:
  """Line and name of each import of this repository, wherever it stands."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      if node.level:
        names = ['.' * node.level + (node.module or '')]
      else:
        names = [f'{node.module}.{alias.name}' for alias in node.names]
    else:
      continue
    for name in names:
      top, _, rest = name.partition('.')
      if top == '':
        found.append((node.lineno, name))
      elif top in TOP_FOLDERS:
        found.append((node.lineno, rest if top == 'instruct_jax' else name))
  return found


def is_within(name: str, entry: str) -> bool:
  return name == entry or name.startswith(f'{entry}.')


def offending_edges(sources: dict[str, str]) -> list[str]:
  """`file:line: a imports b` for each import that the table does not allow."""
  edges = []
  for file, source in sorted(sources.items()):
    module = module_name(pathlib.PurePosixPath(file))
    imports = imported_names(source)
    if not module or module in ('experiments', 'jobs'):
      # The package's own __init__ is empty: importing a part loads no more.
      edges += [f'{file}:{line}: imports {name}' for line, name in imports]
      continue
    entries = [entry for entry in FLOORS if is_within(module, entry)]
    if not entries:
      edges.append(f'{file}: {module} is not in the floor table')
      continue
    allowed = FLOORS[max(entries, key=len)]
    edges += [
      f'{file}:{line}: {module} imports {name}'
      for line, name in imports
      if not any(is_within(name, entry) for entry in allowed)
    ]
  return edges


def test_floors():
  sources = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in TOP_FOLDERS
    for path in (ROOT / folder).rglob('*.py')
  }
  assert sources
  edges = offending_edges(sources)
  assert not edges, '\n' + '\n'.join(edges)


def undocumented(node, prefix=''):
  for part in node.body:
    if (
      isinstance(part, ast.FunctionDef | ast.ClassDef)
      and not part.name.startswith('_')
      and part.name not in ('setup', 'upgrade')  # Called by others' names.
    ):  # fmt: skip
      if not ast.get_docstring(part):
        yield prefix + part.name
      if isinstance(part, ast.ClassDef):
        yield from undocumented(part, f'{part.name}.')


@pytest.mark.parametrize('folder', ['experiments', 'instruct_jax', 'configs'])
def test_public_functions_have_docstrings(folder):
  found = {
    str(path.relative_to(ROOT)): names
    for path in sorted((ROOT / folder).rglob('*.py'))
    if (names := list(undocumented(ast.parse(path.read_text()))))
  }
  assert not found


def test_files_are_opened_to_be_closed():
  """In a `with`, but for what closes them elsewhere."""
  found = []
  for folder in TOP_FOLDERS:
    for path in sorted((ROOT / folder).rglob('*.py')):
      tree = ast.parse(path.read_text())
      closed = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        for item in node.items
        for part in ast.walk(item.context_expr)
      }
      found += [
        (path.name, ast.unparse(node))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split('.')[-1] == 'open'
        and id(node) not in closed
      ]
  assert sorted(found) == [
    ('files.py', 'os.open(folder, os.O_RDONLY)'),
    ('files.py', "path.open('a')"),
  ]


def test_imports_print_nothing():
  """Of other libraries either, whichever of our files comes first."""
  names = [
    '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    for folder in TOP_FOLDERS
    for path in sorted((ROOT / folder).rglob('*.py'))
    # Programs, and a file that needs an optional package.
    if path.stem not in ('__main__', 'env', 'lm_eval_adapter')
  ]
  imports = '\n'.join(f'importlib.import_module({name!r})' for name in names)
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  # What silences them is for the package to set, as it has done here.
  environment.pop('TRANSFORMERS_NO_ADVISORY_WARNINGS', None)
  ended = subprocess.run(
    [
      *(sys.executable, '-c'),
      f'import importlib\n{imports}\nimport transformers',
    ],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert (ended.returncode, ended.stdout, ended.stderr) == (0, '', '')


@pytest.mark.parametrize(
  ('file', 'source', 'edge'),
  [
    (
      'instruct_jax/ppo.py',
      'from instruct_jax import masked, rollout',
      ':1: ppo imports rollout',
    ),
    (
      'instruct_jax/rollout.py',
      'def f():\n  import instruct_jax.models.heads',
      ':2: rollout imports models.heads',
    ),
    (
      'instruct_jax/ppo.py',
      'from instruct_jax.infra import run, train_state',
      ':1: ppo imports infra.run',
    ),
    (
      'instruct_jax/ppo.py',
      'from instruct_jax import model_fns',
      ':1: ppo imports model_fns',
    ),
    (
      'instruct_jax/model_folder.py',
      'from instruct_jax.data import loader',
      ':1: model_folder imports data.loader',
    ),
    (
      'instruct_jax/alarms.py',
      'from instruct_jax import types',
      ':1: alarms imports types',
    ),
    (
      'instruct_jax/masked.py',
      'from instruct_jax.losses import x',
      ':1: masked imports losses.x',
    ),
    (
      'instruct_jax/infra/run.py',
      'from instruct_jax.data.records import Prompt',
      ':1: infra.run imports data.records.Prompt',
    ),
    (
      'instruct_jax/evals/report.py',
      'from instruct_jax.infra import metrics',
      ':1: evals.report imports infra.metrics',
    ),
    (
      'experiments/sft.py',
      'from experiments import reward',
      ':1: experiments.sft imports experiments.reward',
    ),
    (
      'instruct_jax/main.py',
      'from configs import sft',
      ':1: main imports configs.sft',
    ),
    (
      'instruct_jax/data/loader.py',
      'from . import records',
      ':1: data.loader imports .',
    ),
    (
      'instruct_jax/__init__.py',
      'from instruct_jax import losses',
      ':1: imports losses',
    ),
    (
      'instruct_jax/jobs/evaluate.py',
      'from experiments import sft',
      ':1: jobs.evaluate imports experiments.sft',
    ),
    ('instruct_jax/utils.py', '', ': utils is not in the floor table'),
  ],
)
def test_offending_edge_is_named(file, source, edge):
  assert offending_edges({file: source}) == [file + edge]


def test_allowed_edges():
  assert not offending_edges(
    {
      'instruct_jax/losses.py': 'import jax\nfrom instruct_jax import masked',
      'instruct_jax/ppo.py': 'from instruct_jax.infra import train_state',
      'instruct_jax/evals/report.py': 'from instruct_jax.evals import win_rate',
      'experiments/ppo.py': 'from instruct_jax import ppo\nimport typesetting',
      'configs/ppo.py': 'from configs import common',
    }
  )
