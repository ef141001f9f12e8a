"""Writes a model folder in the Hugging Face format.

  python -m instruct_jax.export --checkpoint=MODEL --tokenizer=FOLDER \\
    --output=DIR

DIR gets config.json, safetensors, the tokenizer, generation_config.json and a
model card. A policy becomes a causal language model; a reward model becomes a
sequence classifier with one label, whose logit plus `score_shift` of
config.json is the score.
"""

import json
import pathlib

from absl import app, flags
from etils import epath

from instruct_jax import artifacts
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import checkpoint, sharding
from instruct_jax.models import hf

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'Model folder of a stage.', required=True
)
_TOKENIZER = flags.DEFINE_string(
  'tokenizer',
  None,
  'Folder of the tokenizer it was trained with.',
  required=True,
)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to write.', required=True)


def export(
  checkpoint_folder: epath.PathLike,
  tokenizer_folder: epath.PathLike,
  output: epath.PathLike,
) -> None:
  """Writes `output`; see the top of this file.

  Raises:
    checkpoint.CheckpointError: damaged, or made with another tokenizer.
    ValueError: `output` is not empty, or no published family has this model.
  """
  output = pathlib.Path(output)
  if output.exists() and any(output.iterdir()):
    raise ValueError(f'{output} is not empty; name a new folder')
  tokenizer = tokenizer_lib.Tokenizer.load(tokenizer_folder)
  described = checkpoint.load_metadata(checkpoint_folder)
  model = artifacts.load(
    checkpoint_folder,
    described['kind'],
    sharding.make_mesh((1, -1, 1)),
    tokenizer.fingerprint,
  )
  hf.save(output, model.config, model.params)
  tokenizer.save(output)
  path = output / 'config.json'
  values = json.loads(path.read_text('utf-8'))
  ids = {'eos_token_id': tokenizer.eos_id, 'pad_token_id': tokenizer.pad_id}
  path.write_text(json.dumps({**values, **ids}, indent=2) + '\n', 'utf-8')
  (output / 'generation_config.json').write_text(
    json.dumps({'do_sample': True, **ids}, indent=2) + '\n', 'utf-8'
  )
  use = (
    'Language model: sample with temperature 1 and stop at the EOS token.'
    if model.kind == 'policy'
    else 'Reward model: the score of a prompt with its answer and EOS is the '
    f'logit plus `score_shift` = {values["score_shift"]}.'
  )
  about = json.dumps(model.metadata, indent=2)
  (output / 'README.md').write_text(
    f'# {output.name}\n\n{use} {model.config.num_params:,} parameters in '
    f'float32, written by instruct_jax.\n\n```json\n{about}\n```\n',
    'utf-8',
  )


def main(argv: list[str]) -> None:
  del argv
  export(_CHECKPOINT.value, _TOKENIZER.value, _OUTPUT.value)
  print(_OUTPUT.value)


if __name__ == '__main__':
  app.run(main)
