"""README.md and the dependency table, against what is there."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def test_tree_lists_what_is_on_disk():
  block = README.split('Where everything is')[1].split('```')[1]
  listed, folder = set(), ''
  for line in block.strip().splitlines():
    indent = len(line) - len(line.lstrip())
    name = line.split()[0]
    if indent == 0:
      folder = name if name.endswith('/') else ''
      listed.add(name)
    else:
      listed.add(folder + name)
  missing = [name for name in listed if not [*ROOT.glob(name)]]
  assert not missing, f'README lists what is not there: {missing}'
  for folder in ('configs', 'experiments', 'instruct_jax'):
    there = {
      f'{folder}/{path.name}{"/" if path.is_dir() else ""}'
      for path in (ROOT / folder).iterdir()
      if not path.name.startswith(('_', '.'))
    }
    unlisted = sorted(there - listed)
    assert not unlisted, f'the README tree lacks {unlisted}'


def test_every_runtime_dependency_is_in_the_table():
  pins = (ROOT / 'requirements.txt').read_text().splitlines()
  table = (ROOT / 'CONTRIBUTING.md').read_text().split('## Dependencies')[1]
  for pin in pins:
    name, separator, version = pin.partition('==')
    assert separator and version, f'{pin} is not pinned exactly'
    assert re.search(rf'\b{re.escape(name)}\b', table), f'{name}: say why'


def test_ci_runs_the_readme_test_command():
  command = 'pip install -r tests/requirements.txt && python -m pytest'
  assert command in README
  assert (
    command.replace('pip install', 'pip install -q')
    in (ROOT / '.ci' / 'run').read_text()
  )


def test_the_readme_is_read_in_one_go():
  assert len(README.splitlines()) <= 200


def test_links_lead_somewhere():
  for page in ROOT.glob('**/*.md'):
    for target in re.findall(r'\]\(([^)#:]+)\)', page.read_text()):
      assert (page.parent / target).exists(), f'{page}: {target}'
