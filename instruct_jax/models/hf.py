"""Model folders in the Hugging Face format, in and out.

Safetensors files are read through a memory map, one published tensor at a
time, straight into the shard that each device holds; the host never has the
model. Reading is strict both ways: no tensor missing, none left over, every
shape as config.json says, every number finite.
"""

import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instruct_jax.models import families
from instruct_jax.models.config import TransformerConfig
from instruct_jax.types import Params

_DTYPES = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': jnp.bfloat16,
}
# Buffers that old checkpoints saved beside the weights; they hold no number
# that was learned.
_BUFFERS = (
  '.attn.bias',
  '.attn.masked_bias',
  '.attention.bias',
  '.attention.masked_bias',
  '.rotary_emb.inv_freq',
)
_VOCABULARY = ('token_embedding', 'unembedding', 'unembedding_bias')
_SHARD_BYTES = 2 * 1024**3


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """config.json of a model folder.

  Raises:
    ValueError: it is missing or not a JSON object.
  """
  path = folder / 'config.json'
  if not path.is_file():
    raise ValueError(
      f'{folder}: no config.json here; name the folder that holds a model in '
      'the Hugging Face format'
    )
  try:
    values = json.loads(path.read_text('utf-8'))
  except ValueError as error:
    raise ValueError(f'{path}: not JSON ({error})') from error
  if not isinstance(values, dict):
    raise ValueError(f'{path}: not a JSON object')
  return values


def open_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of all safetensors files of a folder, not read yet.

  Raises:
    ValueError: there are none (pickled weights are refused), or a file is
      truncated, damaged, or holds a tensor that another holds too.
  """
  paths = sorted(folder.glob('*.safetensors'))
  if not paths:
    pickled = sorted(
      path.name for path in folder.iterdir() if path.suffix in ('.bin', '.pt')
    )
    if pickled:
      raise ValueError(
        f'{folder}: {", ".join(pickled)} are pickles, which run code when '
        'they are opened, and are not read. Convert them once, where that is '
        'safe: transformers.AutoModelForCausalLM.from_pretrained(FOLDER)'
        '.save_pretrained(NEW_FOLDER) writes safetensors'
      )
    raise ValueError(f'{folder}: no *.safetensors file here')
  tensors = {}
  for path in paths:
    for name, tensor in _open_file(path).items():
      if name in tensors:
        raise ValueError(f'{path}: tensor {name} is in another file, too')
      tensors[name] = tensor
  index = folder / 'model.safetensors.index.json'
  if index.is_file():
    expected = json.loads(index.read_text('utf-8'))['weight_map']
    absent = sorted(set(expected.values()) - {path.name for path in paths})
    if absent:
      raise ValueError(f'{index}: files are missing: {", ".join(absent)}')
  return tensors


def _open_file(path):
  size = path.stat().st_size
  with path.open('rb') as file:
    header_size = int.from_bytes(file.read(8), 'little')
    if size < 8 or header_size > size - 8:
      raise ValueError(
        f'{path}: truncated or not safetensors: {size} bytes, and the header '
        f'alone should have {header_size}; copy the file again'
      )
    try:
      header = json.loads(file.read(header_size))
    except ValueError as error:
      raise ValueError(f'{path}: damaged header ({error})') from error
  header.pop('__metadata__', None)
  tensors = {}
  for name, entry in header.items():
    start, end = entry['data_offsets']
    if 8 + header_size + end > size:
      raise ValueError(
        f'{path}: truncated: tensor {name} ends at byte '
        f'{8 + header_size + end}, the file at {size}; copy the file again'
      )
    if entry['dtype'] not in _DTYPES:
      # Masks and such are refused by name if they are not known buffers.
      if name.endswith(_BUFFERS):
        continue
      raise ValueError(
        f'{path}: tensor {name} has dtype {entry["dtype"]}; only '
        f'{", ".join(_DTYPES)} are handled'
      )
    dtype, shape = np.dtype(_DTYPES[entry['dtype']]), tuple(entry['shape'])
    if math.prod(shape) * dtype.itemsize != end - start:
      raise ValueError(
        f'{path}: tensor {name} has {end - start} bytes for {shape}'
      )
    tensors[name] = np.memmap(
      path, dtype, 'r', offset=8 + header_size + start, shape=shape
    )
  return tensors


def load_params(
  folder: pathlib.Path,
  config: TransformerConfig,
  abstract: Params,
) -> Params:
  """Reads the weights of a folder into the shards that `abstract` asks for.

  Embedding rows of tokens that the published model lacks (a PAD of our own)
  start at the mean of its rows; rows beyond `vocab_size` are zero.

  Args:
    folder: holds config.json and safetensors files.
    config: of the model to make; may have more tokens than the folder's.
    abstract: `ShapeDtypeStruct`s with shardings; 'head_kernel' in it asks for
      a sequence classifier with one label.

  Raises:
    ValueError: a tensor is missing, left over, of the wrong shape, or holds
      numbers that are not finite; each is named.
  """
  described = read_config(folder)
  family = described['model_type']
  published = TransformerConfig.from_hf(described)
  scalar = 'head_kernel' in abstract
  entries = families.entries(family, published, scalar)
  tensors = open_tensors(folder)
  prefix = {'gpt2': 'transformer.', 'gptj': 'transformer.'}.get(family, '')
  if prefix and not any(name.startswith(prefix) for name in tensors):
    # GPT-2's own files were saved from inside the language model.
    tensors = {
      name if name.startswith('lm_head') else prefix + name: tensor
      for name, tensor in tensors.items()
    }
  _check_names(folder, entries, tensors, published)
  params = {}
  for entry in entries:
    path = (
      entry.path
      if entry.path[0] == 'head_kernel'
      else (
        'trunk',
        *entry.path,
      )
    )
    place, struct = params, abstract
    for part in path[:-1]:
      place, struct = place.setdefault(part, {}), struct[part]
    place[path[-1]] = _place(
      entry, tensors, struct[path[-1]], folder, config.vocab_size
    )
  if scalar:
    shift = 0.0
    if 'score_shift' in described:
      shift = described['score_shift']
    struct = abstract['head_bias']
    params['head_bias'] = jax.device_put(
      jnp.asarray(shift, jnp.float32), struct.sharding
    )
  return params


def _names(entry, config):
  layers = range(config.num_layers) if entry.stacked else (0,)
  return [entry.name.format(layer) for layer in layers]


def _check_names(folder, entries, tensors, config):
  shapes = {}
  for entry in entries:
    for name in _names(entry, config):
      shapes[name] = math.prod(entry.view), entry.view
  missing = sorted(set(shapes) - set(tensors))
  extra = sorted(set(tensors) - set(shapes))
  extra = [name for name in extra if not name.endswith(_BUFFERS)]
  if config.tied:
    # Some files repeat the tied embedding.
    extra = [n for n in extra if n not in ('lm_head.weight',)]
  for kind, names in (('missing', missing), ('left over', extra)):
    if names:
      raise ValueError(
        f'{folder}: {len(names)} tensors are {kind}: {", ".join(names[:5])}'
      )
  for entry in entries:
    for name in _names(entry, config):
      allowed = _published_shapes(entry)
      if tensors[name].shape not in allowed:
        raise ValueError(
          f'{folder}: tensor {name} has shape {tensors[name].shape}; '
          f'config.json asks for {" or ".join(map(str, allowed))}'
        )


def _published_shapes(entry):
  """The published shape: the view with the fused axes joined again."""
  view = entry.view
  if len(view) == 1:
    return (view,)
  if entry.name.endswith('.bias'):
    return ((math.prod(view),),)
  if entry.path[0] in _VOCABULARY or entry.path[0] in (
    'head_kernel',
    'position_embedding',
  ):
    return (view,)
  inner_last = 'out_kernel' in entry.path
  if 'c_attn' in entry.name:
    split = 1
  elif entry.order == tuple(range(len(view))):
    split = len(view) - 1
  else:
    split = 1 if inner_last else len(view) - 1
  return ((math.prod(view[:split]), math.prod(view[split:])),)


def _place(entry, tensors, struct, folder, vocab_size):
  def one(layer):
    name = entry.name.format(layer)
    tensor = np.asarray(tensors[name]).reshape(entry.view)
    if entry.part is not None:
      tensor = np.take(tensor, entry.part[1], axis=entry.part[0])
    tensor = tensor.transpose(entry.order).astype(np.float32)
    if not np.isfinite(tensor).all():
      raise ValueError(f'{folder}: tensor {name} holds NaN or infinity')
    if entry.path[0] in _VOCABULARY:
      rows = struct.shape[0]
      added = np.zeros((rows - tensor.shape[0], *tensor.shape[1:]), np.float32)
      added[: max(vocab_size - tensor.shape[0], 0)] = tensor.mean(axis=0)
      tensor = np.concatenate([tensor, added])
    return tensor

  def shard(index):
    if not entry.stacked:
      return one(0)[index]
    layers = range(*index[0].indices(struct.shape[0]))
    return np.stack([one(layer)[index[1:]] for layer in layers])

  return jax.make_array_from_callback(struct.shape, struct.sharding, shard)


# --- Out ----------------------------------------------------------------------


def save(
  folder: pathlib.Path, config: TransformerConfig, params: Params
) -> None:
  """Writes config.json and safetensors that `transformers` opens.

  Args:
    folder: made if it does not exist.
    config: of the model.
    params: a policy's, or a scalar model's: that becomes a sequence classifier
      with one label; its bias goes to `score_shift` of config.json, because
      the published classifiers have none, and is to be added to the logit.

  Raises:
    ValueError: no published family has this model.
  """
  described = families.write_config(config)
  family, scalar = described['model_type'], 'head_kernel' in params
  if scalar:
    name = families.FAMILIES[family]
    for ending in ('LMHeadModel', 'ForCausalLM'):
      name = name.removesuffix(ending)
    described |= {
      'architectures': [f'{name}ForSequenceClassification'],
      'num_labels': 1,
      'id2label': {'0': 'score'},
      'label2id': {'score': 0},
      'problem_type': 'regression',
      'score_shift': float(params['head_bias']),
    }
  published = TransformerConfig.from_hf(described)
  sources = {}
  for entry in families.entries(family, published, scalar):
    for layer, name in enumerate(_names(entry, config)):
      sources.setdefault(name, []).append((entry, layer))

  def tensor(name):
    found = sources[name]
    whole = np.empty(found[0][0].view, np.float32)
    for entry, layer in found:
      ours = params if entry.path[0] == 'head_kernel' else params['trunk']
      for part in entry.path:
        ours = ours[part]
      ours = np.asarray(ours[layer] if entry.stacked else ours)
      if entry.path[0] in _VOCABULARY:
        ours = ours[: entry.view[0]]
      where = [slice(None)] * len(entry.view)
      if entry.part is not None:
        where[entry.part[0]] = entry.part[1]
      whole[tuple(where)] = ours.transpose(np.argsort(entry.order))
    return whole.reshape(_published_shapes(found[0][0])[0])

  shapes = {
    name: _published_shapes(found[0][0])[0] for name, found in sources.items()
  }
  folder.mkdir(parents=True, exist_ok=True)
  write_tensors(folder, shapes, tensor)
  (folder / 'config.json').write_text(
    json.dumps(described, indent=2) + '\n', 'utf-8'
  )


def write_tensors(
  folder: pathlib.Path,
  shapes: dict[str, tuple[int, ...]],
  tensor_fn,
  shard_bytes: int = _SHARD_BYTES,
) -> None:
  """Writes float32 tensors, one at a time in memory, as safetensors files."""
  shards, size = [[]], 0
  for name, shape in shapes.items():
    num_bytes = 4 * math.prod(shape)
    if shards[-1] and size + num_bytes > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += num_bytes
  weight_map, total = {}, 0
  for number, names in enumerate(shards, start=1):
    file_name = f'model-{number:05}-of-{len(shards):05}.safetensors'
    if len(shards) == 1:
      file_name = 'model.safetensors'
    header, offset = {'__metadata__': {'format': 'pt'}}, 0
    for name in names:
      end = offset + 4 * math.prod(shapes[name])
      header[name] = {
        'dtype': 'F32',
        'shape': list(shapes[name]),
        'data_offsets': [offset, end],
      }
      weight_map[name], offset = file_name, end
    total += offset
    encoded = json.dumps(header).encode()
    encoded += b' ' * (-len(encoded) % 8)
    with (folder / file_name).open('wb') as file:
      file.write(len(encoded).to_bytes(8, 'little') + encoded)
      for name in names:
        file.write(np.ascontiguousarray(tensor_fn(name), '<f4').tobytes())
  if len(shards) > 1:
    (folder / 'model.safetensors.index.json').write_text(
      json.dumps(
        {'metadata': {'total_size': total}, 'weight_map': weight_map}, indent=2
      ),
      'utf-8',
    )
