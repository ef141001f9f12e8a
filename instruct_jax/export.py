"""Writes a model folder in the Hugging Face format.

  python -m instruct_jax.export --checkpoint=MODEL --tokenizer=FOLDER \\
    --output=DIR

DIR gets config.json, safetensors, the tokenizer, generation_config.json and a
model card. A policy becomes a causal language model; a reward model becomes a
sequence classifier with one label, whose logit plus `score_shift` of
config.json is the score. With --fold_shift the final norm's bias takes the
shift up, where the family has one: the logit itself is then the score, to
rounding, and the folder no longer comes back bit for bit.
"""

import json
from collections.abc import Sequence

from etils import epath

from instruct_jax import command, model_folder
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import checkpoint, sharding
from instruct_jax.models import hf


def export(
  checkpoint_folder: epath.PathLike,
  tokenizer_folder: epath.PathLike,
  output: epath.PathLike,
  *,
  fold_shift: bool = False,
) -> None:
  """Writes `output`; see the top of this file.

  Raises:
    checkpoint.CheckpointError: damaged, or made with another tokenizer.
    ValueError: `output` is not empty, no published family has this model, or
      there is no shift to fold or no bias to fold it into.
  """
  output = epath.Path(output)
  if output.exists() and not (output.is_dir() and not any(output.iterdir())):
    raise ValueError(f'{output} is no empty folder; name a new one')
  tokenizer = tokenizer_lib.Tokenizer.load(tokenizer_folder)
  described = checkpoint.load_metadata(checkpoint_folder)
  model = model_folder.load(
    checkpoint_folder,
    described['kind'],
    sharding.make_mesh((1, -1, 1)),
    tokenizer,
  )
  params = hf.fold_shift(model.params) if fold_shift else model.params
  hf.save(output, model.config, params)
  tokenizer.save(output)
  path = output / 'config.json'
  values = json.loads(path.read_text('utf-8'))
  stop_ids = list(tokenizer.stop_ids)
  ids = {
    'eos_token_id': stop_ids if len(stop_ids) > 1 else tokenizer.eos_id,
    'pad_token_id': tokenizer.pad_id,
  }
  if model.kind == 'scalar' and model.module.skipped_id >= 0:
    # Read in `transformers`, the score is then that of the model here.
    ids['pad_token_id'] = model.module.skipped_id
  path.write_text(json.dumps({**values, **ids}, indent=2) + '\n', 'utf-8')
  (output / 'generation_config.json').write_text(
    json.dumps({'do_sample': True, **ids}, indent=2) + '\n', 'utf-8'
  )
  use = (
    'Language model: sample with temperature 1 and stop at an EOS token.'
    if model.kind == 'policy'
    else 'Reward model: the score of a prompt with its answer and EOS is the '
    f'logit plus `score_shift` = {values["score_shift"]}.'
  )
  if ids['pad_token_id'] != tokenizer.pad_id:
    use += (
      f' It is read at the last token that is not {ids["pad_token_id"]}: pad '
      'rows with that one.'
    )
  about = json.dumps(model.metadata, indent=2)
  (output / 'README.md').write_text(
    f'# {output.name}\n\n{use} {model.config.num_params:,} parameters in '
    f'float32, written by instruct_jax.\n\n```json\n{about}\n```\n',
    'utf-8',
  )


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the export; returns the exit code."""
  parser = command.Parser(
    prog='python -m instruct_jax.export',
    description='Writes a model folder in the Hugging Face format.',
  )
  parser.add_argument(
    '--checkpoint', required=True, metavar='MODEL', help='folder of a model'
  )
  parser.add_argument(
    '--tokenizer',
    required=True,
    metavar='FOLDER',
    help='of the tokenizer it was trained with',
  )
  parser.add_argument('--output', required=True, metavar='DIR', help='to write')
  parser.add_argument(
    '--fold_shift',
    action='store_true',
    help="let a reward model's logit be its score",
  )
  flags = parser.parse_args(arguments)
  export(
    flags.checkpoint, flags.tokenizer, flags.output, fold_shift=flags.fold_shift
  )
  print(flags.output)
  return 0


if __name__ == '__main__':
  command.end(main)
