"""Model folders, in which stages pass models to each other.

A model folder holds the parameters and `model.json`: kind, shape, tokenizer
fingerprint and provenance. Loading checks all of it before any compute.

A folder of adapters holds only the adapters and names the folder of their base.
`load` merges them into a plain model.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from instruct_jax import files, hub, lora, model_fns
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import checkpoint, inputs, origin, sharding
from instruct_jax.infra import run as run_lib
from instruct_jax.models import families, hf
from instruct_jax.models.config import TransformerConfig


def save(
  directory: epath.PathLike,
  model: model_fns.Model,
  tokenizer: tokenizer_lib.Tokenizer,
  metadata: dict[str, Any],
) -> None:
  """Writes a model folder, which appears only when it is complete.

  The base of adapters is recorded as the folder `model.source`.
  """
  description = {
    'kind': model.kind,
    'model': model.config.to_dict(),
    'tokenizer': tokenizer.fingerprint,
    'about': metadata,
  }
  if model.kind == 'scalar' and model.module.skipped_id >= 0:
    description['skipped_id'] = model.module.skipped_id
    description['end_ids'] = list(model.module.end_ids)
  if model.config.lora is not None:
    description['base'] = {
      'path': _path_from(directory, model.source),
      'sha256': _identity(model.source),
    }
  checkpoint.save_model(directory, model.params, description)


def check(
  directory: epath.PathLike, kind: str, tokenizer: tokenizer_lib.Tokenizer
) -> dict[str, Any]:
  """Reads and checks a folder's description.

  Raises:
    checkpoint.CheckpointError: missing, damaged, of another kind, or made with
      another tokenizer; or adapters whose base is missing or has changed.
    ValueError: a published folder with another tokenizer, or a model or format
      that is not supported.
  """
  if is_published(directory):
    folder = hub.locate_description(str(directory))
    values, shape = hf.read_config(folder), hf.shape_of(folder)
    tokenizer_lib.check_published(tokenizer, str(directory))
    if kind == 'scalar':
      try:
        families.score_pad_id(values)
      except ValueError as error:
        raise ValueError(f'{directory}: {error}') from error
    for name in _architectures(folder, values):
      if kind == 'policy' and name.endswith('ForSequenceClassification'):
        raise ValueError(
          f'{directory}: config.json: {name} is a reward model; a policy is a '
          'language model'
        )
    if tokenizer.vocab_size > shape.embedding_rows + 1:
      raise ValueError(
        f'{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the '
        f'embedding {shape.embedding_rows} rows; tokens that were added need '
        'weights: take the folder of the model that was trained with them'
      )
    return {'kind': kind, 'about': {'from': str(folder)}}
  _refuse_other_formats(directory)
  described = checkpoint.load_metadata(directory)
  if described['kind'] != kind:
    raise checkpoint.CheckpointError(
      f'{directory} holds a {described["kind"]} model where a {kind} model is '
      'needed'
    )
  if described['tokenizer'] != tokenizer.fingerprint:
    raise checkpoint.CheckpointError(
      f'{directory} was trained with tokenizer {described["tokenizer"][:12]}, '
      f'this run uses {tokenizer.fingerprint[:12]}. Policy, reference, reward '
      'and value models must share one tokenizer.'
    )
  if 'base' in described:
    _find_base(directory, described['base'])
  return described


def check_weights(directory: epath.PathLike, kind: str) -> None:
  """Reads all weights of a published folder; see `hf.check_weights`."""
  if is_published(directory):
    hf.check_weights(hub.locate(str(directory)), kind == 'scalar')


def _architectures(folder, values) -> list[str]:
  found = values.get('architectures') or []
  if isinstance(found, list) and all(isinstance(x, str) for x in found):
    return found
  raise ValueError(
    f'{folder}/config.json: architectures must be a list of names: {found!r}'
  )


def _refuse_other_formats(directory) -> None:
  """Raises ValueError for a model folder in an unsupported format."""
  place = epath.Path(directory)
  if (place / 'adapter_config.json').exists():
    raise ValueError(
      f'{directory}: adapters of PEFT without their base; merge them once: '
      'peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER)'
      '.merge_and_unload().save_pretrained(NEW_FOLDER)'
    )
  if place.is_dir() and any(place.glob('*.gguf')):
    raise ValueError(
      f'{directory}: a GGUF file is not read; take the folder with config.json '
      'and safetensors that it was made from'
    )


def _path_from(directory, source) -> str:
  """The path of a base, as recorded with its adapters.

  It is relative if both are in the folder of one run, which may be moved.
  """
  name = source.removeprefix('hf:')
  if name != source and not epath.Path(name).is_dir():
    return source  # On the hub.
  place, base = files.absolute(directory), files.absolute(name)
  run, _ = origin.stages_of(str(place))
  if not base.is_relative_to(run):
    return str(base)
  up = len(place.relative_to(run).parts)
  return '/'.join([*['..'] * up, *base.relative_to(run).parts])


def _find_base(directory, described) -> str:
  """Finds the folder of a base, and checks that it has not changed.

  Raises:
    checkpoint.CheckpointError: it is missing or has changed.
  """
  path = described['path']
  if path.startswith('../'):
    place = files.absolute(directory)
    for part in path.split('/'):
      place = place.parent if part == '..' else place / part
    path = str(place)
  if inputs.problem(path):
    raise checkpoint.CheckpointError(
      f'{directory} holds adapters of {path}, which is missing; put that model '
      'back, or a link to it'
    )
  found = _identity(path)
  if found != described['sha256']:
    raise checkpoint.CheckpointError(
      f'{directory} holds adapters of {path}, which has changed since '
      f'(SHA-256 {described["sha256"][:12]}, now {found[:12]}); put the former '
      'one back, or train the adapters again'
    )
  return path


def _identity(folder) -> str:
  """SHA-256 of everything that determines a model's outputs.

  For our folders that is model.json, which has a checksum of each array and the
  identity of the base, if there is one.
  """
  if not is_published(folder):
    return inputs.content_hash(str(folder))
  place = epath.Path(hub.locate(str(folder)))
  total = hashlib.sha256()
  for path in [place / 'config.json', *sorted(place.glob('*.safetensors'))]:
    total.update(f'{path.name}\0{inputs.content_hash(str(path))}\0'.encode())
  return total.hexdigest()


def make_mesh(
  shape: Sequence[int],
  folders: Sequence[epath.PathLike],
  rows: Sequence[int],
) -> jax.sharding.Mesh:
  """Makes the mesh of a stage, chosen to fit its models if `shape` is ().

  Args:
    shape: `config.mesh`.
    folders: model folders, of which only the descriptions are read.
    rows: number of rows of each batch and microbatch.

  Raises:
    checkpoint.CheckpointError: a folder is missing or damaged.
    ValueError: the shape does not multiply to the number of devices.
  """
  heads = []
  for folder in folders if not shape else ():
    config = shape_of(folder)
    heads += [config.num_heads, config.kv_heads, config.mlp_dim]
  return sharding.make_mesh(shape, rows=rows, heads=heads)


def shape_of(folder: epath.PathLike) -> TransformerConfig:
  """The shape of a model, without adapters, from its description.

  Raises:
    checkpoint.CheckpointError, ValueError: the folder, or the base of its
      adapters, is missing or damaged.
  """
  if is_published(folder):
    place = hub.locate_description(str(folder))
    return hf.shape_of(place)
  described = checkpoint.load_metadata(folder)
  if 'base' in described:
    _find_base(folder, described['base'])
  config = TransformerConfig.from_dict(described['model'])
  return dataclasses.replace(config, lora=None)


def check_contexts(
  folders: Mapping[str, epath.PathLike], num_tokens: int, what: str
) -> None:
  """Refuses rows that exceed a model's context, before models are loaded.

  Args:
    folders: name for the message -> model folder.
    num_tokens: tokens of a row.
    what: the config keys that set `num_tokens`.

  Raises:
    ValueError: with the numbers; or see `shape_of`.
  """
  for name, folder in folders.items():
    length = shape_of(folder).context_length
    if num_tokens > length:
      raise ValueError(
        f'{name}: {what} ask for {num_tokens} tokens, but the context of '
        f'{folder} has {length}; lower them'
      )


def named_folders(text: str, key: str = 'models') -> dict[str, str]:
  """Parses `NAME=FOLDER,NAME=FOLDER` into a mapping.

  Args:
    text: of that form, or ''.
    key: config key, for the message.

  Raises:
    ValueError: a part is not of this form, or a name is repeated.
  """
  folders = {}
  for part in filter(None, text.split(',')):
    name, separator, folder = part.partition('=')
    if not (name and separator and folder) or name in folders:
      raise ValueError(
        f'{key} must be NAME=FOLDER,NAME=FOLDER with distinct names: {text!r}'
      )
    folders[name] = folder
  return folders


def named_files(text: str, key: str, name: str) -> dict[str, str]:
  """Parses `FILE`, which gets this name, or `NAME=FILE,NAME=FILE`."""
  if text and '=' not in text:
    return {name: text}
  return named_folders(text, key)


def is_published(directory: epath.PathLike) -> bool:
  """Whether it is `hf:NAME` or a folder in the Hugging Face format."""
  if str(directory).startswith('hf:'):
    return True
  return (epath.Path(directory) / 'config.json').exists()


def _load_published(folder, kind, mesh, end_ids, changes):
  described = hf.read_config(folder)
  published = hf.shape_of(folder)
  about, attributes = {'from': str(folder)}, {}
  if kind == 'scalar':
    # Its scores on its training data are not published, so any are allowed.
    about['score_range'] = (-math.inf, math.inf)
    attributes['skipped_id'] = families.score_pad_id(described)
    # Our own exports record the ids that they expect at the end of an answer.
    attributes['end_ids'] = tuple(described.get('score_end_ids', end_ids))
  elif published.tied:
    published = hf.published_config(folder)
    if not published.tied:
      run_lib.say(
        f'{folder}: config.json says that the unembedding is the embedding, '
        'but its files hold another one, which is used, as in transformers'
      )
  config = _changed(folder, published, {'vocab_multiple': 128, **changes})
  params = hf.load_params(
    folder, config, model_fns.abstract_params(kind, config, mesh)
  )
  return model_fns.Model(
    kind, model_fns.make_module(kind, config, **attributes), params, about
  )


def _changed(directory, config, changes):
  """The config with the changes; reports a changed compute dtype."""
  changed = dataclasses.replace(config, **changes)
  if changed.compute_dtype != config.compute_dtype:
    run_lib.say(
      f'{directory}: computes in {changed.compute_dtype} (compute_dtype), not '
      f'in {config.compute_dtype} as its folder says; weights stay float32'
    )
  return changed


def load(
  directory: epath.PathLike,
  kind: str,
  mesh: jax.sharding.Mesh,
  tokenizer: tokenizer_lib.Tokenizer,
  **changes: Any,
) -> model_fns.Model:
  """Reads a model folder onto the mesh, with adapters merged into their base.

  Args:
    directory: written by `save`, or published.
    kind: the kind that the caller needs.
    mesh: may differ from the mesh that the model was saved from.
    tokenizer: the tokenizer in use; published models get an embedding for its
      PAD.
    **changes: fields of `TransformerConfig` that do not change the parameters
      (dropout, remat, compute_dtype, scan_unroll). A `compute_dtype` of '' is
      the folder's, float32 for a published one.

  Raises:
    ValueError: a published model that is not supported, has another tokenizer
      or has damaged files; see `hf.load_params`.
    checkpoint.CheckpointError: see `check`; or damaged arrays.
  """
  model = read(directory, kind, mesh, tokenizer, **changes)
  if model.config.lora is None:
    return model
  base = load(model.source, 'policy', mesh, tokenizer).params
  if kind == 'scalar':  # Its base is a policy's trunk.
    base = {'trunk': model_fns.without_unembedding(base['trunk'])}
  model = dataclasses.replace(model, base=base, source=str(directory))
  return model_fns.merged(model, mesh)


def read(
  directory: epath.PathLike,
  kind: str,
  mesh: jax.sharding.Mesh,
  tokenizer: tokenizer_lib.Tokenizer,
  **changes: Any,
) -> model_fns.Model:
  """`load` without merging.

  Returns:
    The model; or only its adapters (and a scalar model's head), with the folder
    of their base as `source`.
  """
  if changes.get('compute_dtype') == '':
    del changes['compute_dtype']
  described = check(directory, kind, tokenizer)
  if is_published(directory):
    changes['vocab_size'] = tokenizer.vocab_size
    model = _load_published(
      hub.locate(str(directory)), kind, mesh, tokenizer.end_ids, changes
    )
    return dataclasses.replace(model, source=str(directory))
  config = _changed(
    directory, TransformerConfig.from_dict(described['model']), changes
  )
  abstract, source = model_fns.abstract_params(kind, config, mesh), directory
  if 'base' in described:
    abstract, _ = lora.split(abstract)
    source = _find_base(directory, described['base'])
  params, _ = checkpoint.load_model(directory, abstract)
  attributes = {}
  if 'skipped_id' in described:
    attributes['skipped_id'] = described['skipped_id']
    attributes['end_ids'] = tuple(described.get('end_ids', ()))
  module = model_fns.make_module(kind, config, **attributes)
  return model_fns.Model(kind, module, params, described['about'], str(source))
