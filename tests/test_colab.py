"""The notebook runs from top to bottom, on a copy of the repository."""

import json
import os
import pathlib
import re
import shutil
import sys

import pytest

from tests import test_recipe

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / 'experiments' / 'colab.ipynb'


def sources():
  return [
    ''.join(cell['source'])
    for cell in json.loads(NOTEBOOK.read_text())['cells']
  ]


def test_the_notebook_is_stored_without_output():
  cells = json.loads(NOTEBOOK.read_text())['cells']
  for cell in cells:
    if cell['cell_type'] == 'code':
      assert not cell['outputs'] and cell['execution_count'] is None
  text = '\n'.join(sources())
  assert "CONFIG = 'configs/ppo_ptx.py'  # @param" in text
  assert "MESSAGE = ''  # @param {type: 'string'}" in text


@pytest.mark.slow
def test_the_notebook_runs_with_the_smoke_config(tmp_path):
  nbclient = pytest.importorskip('nbclient')
  import nbformat

  for folder in ('configs', 'experiments', 'instruct_jax'):
    shutil.copytree(ROOT / folder, tmp_path / folder)
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  settings = notebook.cells[1]
  assert "CONFIG = 'configs/ppo_ptx.py'  #" in settings.source
  settings.source = settings.source.replace(
    "CONFIG = 'configs/ppo_ptx.py'  #", "CONFIG = 'configs/ppo_ptx.py:smoke'  #"
  )
  # A published model and preferences of one's own.
  given = tmp_path / 'given'
  test_recipe.write_model(given / 'model')
  (given / 'hh').mkdir()
  lines = [test_recipe.hh_line(number) for number in range(300)]
  (given / 'hh' / 'train.jsonl').write_text('\n'.join(lines))
  text = '\n\n'.join(f'The number {i} is a number.' for i in range(400))
  (given / 'text.txt').write_text(text)
  last = notebook.cells[-1]
  for key, value in {
    'MODEL': f'hf:{given / "model"}',
    'PREFERENCES': f'hh:{given / "hh"}',
    'DOCUMENTS': given / 'text.txt',
  }.items():
    last.source, number = re.subn(
      f"^{key} = '.*'  # @param", f"{key} = '{value}'  # @param", last.source,
      flags=re.MULTILINE,
    )  # fmt: skip
    assert number == 1
  client = nbclient.NotebookClient(
    notebook,
    timeout=3600,
    kernel_name='python3',
    resources={'metadata': {'path': str(tmp_path)}},
  )
  client.execute(
    env={
      **os.environ,
      'PATH': f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}',
    }
  )
  outputs = [
    output
    for cell in notebook.cells
    if cell.cell_type == 'code'
    for output in cell.outputs
  ]
  plots = [
    output
    for output in outputs
    if output.output_type == 'display_data' and 'image/png' in output.data
  ]
  assert len(plots) >= 5
  text = ''.join(
    output.text for output in outputs if output.output_type == 'stream'
  )
  assert 'ppo_ptx: done in' in text
  assert 'KL without a penalty:' in text
  # Two models answered the message.
  talk = notebook.cells[7].outputs
  talked = ''.join(output.get('text', '') for output in talk)
  for name in ('ppo_ptx', 'select'):
    assert re.search(rf'{name}.*> .*\[reward [+-]\d', talked), talked
  assert (tmp_path / 'experiments' / 'my_ppo.py').exists()
  (shown,) = (
    output.data['text/markdown']
    for output in last.outputs
    if output.output_type == 'display_data'
  )
  assert '# Evaluation of' in shown and 'ppo_ptx' in shown
