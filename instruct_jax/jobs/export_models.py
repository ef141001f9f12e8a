"""Models of a run as folders that `transformers` opens; see `export.py`."""

from etils import epath
from ml_collections import ConfigDict

from instruct_jax import export, model_folder
from instruct_jax.infra import run as run_lib

PROCESSES = 'one'


def validate(config: ConfigDict) -> None:
  """Checks that models are named.

  Raises:
    ValueError: none is, or not as NAME=FOLDER.
  """
  if not model_folder.named_folders(config.models):
    raise ValueError('models is empty; give NAME=FOLDER,NAME=FOLDER')


def inputs(config: ConfigDict) -> dict[str, str]:
  """What this stage reads, by config key."""
  found = {
    f'models.{name}': folder
    for name, folder in model_folder.named_folders(config.models).items()
  }
  return {'tokenizer': config.tokenizer, **found}


def run(config: ConfigDict, workdir: epath.Path) -> dict[str, str]:
  """Writes WORKDIR/NAME for each model of ours; published ones are there."""
  validate(config)
  written = {}
  for name, folder in model_folder.named_folders(config.models).items():
    if model_folder.is_published(folder):
      continue
    output = workdir / name
    if output.exists():
      output.rmtree()
    export.export(folder, config.tokenizer, output)
    written[name] = str(output)
    run_lib.say(f'{config.name}: {output}')
  return written
