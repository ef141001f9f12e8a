"""The notebook runs from top to bottom, on a copy of the repository."""

import json
import os
import pathlib
import re
import shutil
import sys

import pytest

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
