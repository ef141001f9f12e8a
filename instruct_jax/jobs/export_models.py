"""Exports models of a run as folders for `transformers`; see `export.py`.

With `push_to`, each is pushed to its own repository on the Hugging Face Hub.
"""

import dataclasses

from etils import epath
from ml_collections import ConfigDict

from instruct_jax import export, files, hub, model_folder
from instruct_jax.infra import run as run_lib
from instruct_jax.infra import stages

PROCESSES = 'one'

PUSHED_FILE = 'pushed.json'


def validate(config: ConfigDict) -> None:
  """Checks that models are named, and that they can be pushed.

  Raises:
    ValueError: no model is named, or one is not given as NAME=FOLDER; or as in
      `hub.check_push`.
  """
  if not model_folder.named_folders(config.models):
    raise ValueError('models is empty; give NAME=FOLDER,NAME=FOLDER')
  if config.public and not config.push_to:
    raise ValueError('public is about an upload; give push_to=hf:NAME')
  workdir = epath.Path(config.workdir) / config.name
  if run_lib.is_done(workdir):
    return
  try:
    for target in targets(config).values():
      hub.check_push(target, not config.public, target in _pushed(workdir))
    if config.push_to:
      export.check_facts(_facts(config))
  except hub.NoAnswerError as error:
    if not (workdir.parent / stages.CONFIG_FILE).exists():
      raise
    # A resumed run may reach the Hub by the time it gets to this stage.
    run_lib.say(f'{config.name}: {error}')


def targets(config: ConfigDict) -> dict[str, str]:
  """Model name -> where it is pushed; {} without `push_to`."""
  if not config.push_to:
    return {}
  return {
    name: f'{config.push_to}-{name}'
    for name, folder in model_folder.named_folders(config.models).items()
    if not model_folder.is_published(folder)
  }


def _facts(config) -> export.Facts:
  return export.Facts(
    datasets=config.datasets,
    license=config.license,
    base_model=config.base_model,
  )


def _pushed(workdir) -> list[str]:
  file = workdir / PUSHED_FILE
  return run_lib.read_json(file) if file.exists() else []


def inputs(config: ConfigDict) -> dict[str, str]:
  """What this stage reads, by config key."""
  found = {
    f'models.{name}': folder
    for name, folder in model_folder.named_folders(config.models).items()
  }
  return {'tokenizer': config.tokenizer, **found}


def run(config: ConfigDict, workdir: epath.Path) -> dict[str, str]:
  """Writes WORKDIR/NAME for each trained model; skips published ones.

  A pushed model gets the model card of the run.

  Returns:
    Model name -> its folder, or its address on the Hub.
  """
  validate(config)
  facts = _facts(config)
  written, where = {}, targets(config)
  for name, folder in model_folder.named_folders(config.models).items():
    if model_folder.is_published(folder):
      continue
    output = workdir / name
    if output.exists():
      output.rmtree()
    pushed = where.get(name, '').removeprefix('hf:').rpartition('/')[2]
    own = dataclasses.replace(facts, name=pushed)
    export.export(folder, config.tokenizer, output, facts=own)
    written[name] = str(output)
    if name in where:
      written[name] = _push(config, workdir, output, where[name])
    run_lib.say(f'{config.name}: {written[name]}')
  return written


def _push(config, workdir, output, target) -> str:
  """Pushes a folder; a run interrupted in between pushes it again."""
  card = epath.Path(config.workdir) / 'model_card.md'
  if card.exists():
    files.write_bytes(output / card.name, card.read_bytes())
  pushed = _pushed(workdir)
  is_private = not config.public
  hub.check_push(target, is_private, target in pushed)
  run_lib.write_json(workdir / PUSHED_FILE, sorted({*pushed, target}))
  return hub.push(output, target, is_private, is_ours=True)
