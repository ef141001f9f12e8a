"""Writes a model folder in the Hugging Face format.

  python -m instruct_jax.export --checkpoint=MODEL --tokenizer=FOLDER \\
    --output=DIR

DIR gets config.json, safetensors, the tokenizer, generation_config.json and a
model card. A policy becomes a causal language model; a reward model becomes a
sequence classifier with one label, whose logit plus `score_shift` of
config.json is the score. --fold_shift adds the shift to the final norm's bias,
if the family has one: the logit itself is then the score, to rounding, and
loading the folder no longer gives the same weights bit for bit.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence

from etils import epath

from instruct_jax import command, files, lora, model_folder
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import checkpoint, sharding
from instruct_jax.models import hf


def export(
  checkpoint_folder: epath.PathLike,
  tokenizer_folder: epath.PathLike,
  output: epath.PathLike,
  *,
  fold_shift: bool = False,
  adapters: bool = False,
) -> None:
  """Writes `output`; see the top of this file.

  Raises:
    checkpoint.CheckpointError: damaged, or made with another tokenizer.
    ValueError: `output` is not empty, no published family has this model,
      there is no shift to fold or no bias to fold it into, or the model has no
      adapters.
  """
  output = epath.Path(output)
  if output.exists() and not (output.is_dir() and not any(output.iterdir())):
    raise ValueError(f'{output} is not an empty folder; give a new one')
  if adapters and fold_shift:
    raise ValueError(
      'fold_shift changes a norm of the base, which adapters do not own; leave '
      'one of fold_shift and adapters out'
    )
  tokenizer = tokenizer_lib.Tokenizer.load(tokenizer_folder)
  described = checkpoint.load_metadata(checkpoint_folder)
  load = model_folder.read if adapters else model_folder.load
  model = load(
    checkpoint_folder,
    described['kind'],
    sharding.make_mesh((1, -1, 1)),
    tokenizer,
  )
  if adapters and model.config.lora is None:
    raise ValueError(
      f'{checkpoint_folder} holds no adapters; leave --adapters out'
    )
  if fold_shift:
    model = dataclasses.replace(model, params=hf.fold_shift(model.params))
  with _whole(files.absolute(output)) as folder:
    tokenizer.save(folder)
    if adapters:
      base = model.source
      if not model_folder.is_published(base):
        export(base, tokenizer_folder, folder / 'base')
        base = files.absolute(output) / 'base'
      name = str(base).removeprefix('hf:')
      hf.save_adapters(folder, model.config, model.params, name)
    else:
      hf.save(folder, model.config, model.params)
      _describe_tokens(folder, model, tokenizer)
    card = _card(output.name, model, tokenizer)
    (folder / 'README.md').write_text(card, 'utf-8')


@contextlib.contextmanager
def _whole(output: epath.Path) -> Iterator[epath.Path]:
  """A folder whose content appears at `output` once it is complete."""
  unfinished = output.parent / f'.{output.name}.unfinished'
  if files.is_remote(output):  # Object stores cannot rename.
    unfinished = output
  if unfinished.exists():
    unfinished.rmtree()
  unfinished.mkdir(parents=True)
  try:
    yield unfinished
  except BaseException:
    unfinished.rmtree()
    raise
  if unfinished != output:
    if output.exists():  # An empty folder.
      output.rmdir()
    unfinished.rename(output)


def _skipped_id(model, tokenizer):
  """The token that `transformers` skips when it looks for a row's last one."""
  skipped_id = model.module.skipped_id if model.kind == 'scalar' else -1
  return tokenizer.pad_id if skipped_id < 0 else skipped_id


def _describe_tokens(output, model, tokenizer):
  """Adds token ids to config.json and generation_config.json."""
  path = output / 'config.json'
  values = json.loads(path.read_text('utf-8'))
  stop_ids = list(tokenizer.stop_ids)
  ids = {
    'eos_token_id': stop_ids if len(stop_ids) > 1 else tokenizer.eos_id,
    'pad_token_id': _skipped_id(model, tokenizer),
  }
  path.write_text(json.dumps({**values, **ids}, indent=2) + '\n', 'utf-8')
  (output / 'generation_config.json').write_text(
    json.dumps({'do_sample': True, **ids}, indent=2) + '\n', 'utf-8'
  )


def _card(name, model, tokenizer):
  """The model card, README.md."""
  use = 'Language model: sample with temperature 1 and stop at an EOS token.'
  if model.kind == 'scalar':
    use = (
      'Reward model: the score of a prompt with its answer and EOS is the '
      f'logit plus `score_shift` = {float(model.params["head_bias"])}.'
    )
  skipped_id = _skipped_id(model, tokenizer)
  if skipped_id != tokenizer.pad_id:
    use += (
      f' It is read at the last token that is not {skipped_id}: pad rows with '
      'it.'
    )
  what = f'{model.config.num_params:,} parameters'
  if model.config.lora is not None:
    what = (
      f'{lora.num_params(model.params):,} parameters of adapters, to be loaded '
      f'by `peft` on top of their base,'
    )
  about = json.dumps(model.metadata, indent=2)
  return (
    f'# {name}\n\n{use} {what} in float32, written by instruct_jax.\n\n'
    f'```json\n{about}\n```\n'
  )


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the export; returns the exit code."""
  parser = command.Parser(
    prog='python -m instruct_jax.export',
    description='Writes a model folder in the Hugging Face format.',
  )
  required = functools.partial(parser.add_argument, required=True)
  switch = functools.partial(parser.add_argument, action='store_true')
  required('--checkpoint', metavar='MODEL', help='model folder')
  required('--tokenizer', metavar='FOLDER', help='that it was trained with')
  required('--output', metavar='DIR', help='to write')
  switch('--fold_shift', help="make a reward model's logit its score")
  switch('--adapters', help='write adapters apart from their base, for peft')
  flags = parser.parse_args(arguments)
  export(
    flags.checkpoint,
    flags.tokenizer,
    flags.output,
    fold_shift=flags.fold_shift,
    adapters=flags.adapters,
  )
  print(flags.output)
  return 0


if __name__ == '__main__':
  command.end(main)
