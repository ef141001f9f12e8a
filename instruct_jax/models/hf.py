"""Model folders in the Hugging Face format, in and out.

Safetensors files are read one published tensor at a time, in blocks, straight
into the shard that each device holds; tensors of stacked layers go into the
stack on the device, layer by layer. So the host holds a shard of one tensor and
never the model. Reading is strict both ways: no tensor missing, none left over,
every shape as config.json says, every number finite.
"""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

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
_BLOCK_BYTES = 16 * 1024**2


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
  return _read_object(path)


def _read_object(path):
  try:
    values = json.loads(path.read_text('utf-8-sig'))
  except ValueError as error:
    raise ValueError(f'{path}: not JSON ({error})') from error
  if not isinstance(values, dict):
    raise ValueError(f'{path}: not a JSON object')
  return values


def open_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of the safetensors files of a folder, not read yet.

  Those that the index names; without one, `model.safetensors`; else all.

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
  index = folder / 'model.safetensors.index.json'
  if index.is_file():
    # Some folders hold the same weights once more in their authors' own format.
    weight_map = _read_object(index).get('weight_map')
    if not isinstance(weight_map, dict):
      raise ValueError(
        f"{index}: no 'weight_map' that says which file holds each tensor; "
        'copy the file again'
      )
    expected = set(weight_map.values())
    absent = sorted(expected - {path.name for path in paths})
    if absent:
      raise ValueError(f'{index}: files are missing: {", ".join(absent)}')
    paths = [path for path in paths if path.name in expected]
  elif folder / 'model.safetensors' in paths:
    paths = [folder / 'model.safetensors']
  tensors = {}
  for path in paths:
    for name, tensor in _open_file(path).items():
      if name in tensors:
        raise ValueError(f'{path}: tensor {name} is in another file, too')
      tensors[name] = tensor
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


def published_config(folder: pathlib.Path) -> TransformerConfig:
  """The shape of a folder's language model, by config.json and its tensors.

  Where config.json says that the unembedding is the embedding and the files
  hold another one, the model has both, as in `transformers`.

  Raises:
    ValueError: see `TransformerConfig.from_hf` and `open_tensors`.
  """
  described = read_config(folder)
  config = TransformerConfig.from_hf(described)
  if config.tied and _other_unembedding(
    described['model_type'], _open_named(folder, described['model_type'])
  ):
    return dataclasses.replace(config, tied=False)
  return config


def _open_named(folder, family):
  """`open_tensors`, under the names that the language model gives them."""
  tensors = open_tensors(folder)
  prefix = {'gpt2': 'transformer.', 'gptj': 'transformer.'}.get(family, '')
  if prefix and not any(name.startswith(prefix) for name in tensors):
    # GPT-2's own files were saved from inside the language model.
    tensors = {
      name if name.startswith('lm_head') else prefix + name: tensor
      for name, tensor in tensors.items()
    }
  return tensors


def _other_unembedding(family, tensors) -> bool:
  """Whether the files hold an unembedding that is not the embedding."""
  embedding, unembedding = map(tensors.get, families.embedding_names(family))
  if embedding is None or unembedding is None:
    return False
  if embedding.shape != unembedding.shape:
    return True
  step = max(1, _BLOCK_BYTES // max(1, embedding[:1].nbytes))
  return any(
    not np.array_equal(
      _map_again(embedding)[start : start + step],
      _map_again(unembedding)[start : start + step],
    )
    for start in range(0, len(embedding), step)
  )


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
    config: of the model to make; may have more tokens than the folder's. Of
      a language model it is tied or not as `published_config` says.
    abstract: `ShapeDtypeStruct`s with shardings; 'head_kernel' in it asks for
      a sequence classifier with one label.

  Raises:
    ValueError: a tensor is missing, left over, of the wrong shape, or holds
      numbers that are not finite; each is named. Or `config` is tied and the
      files hold an unembedding of its own.
  """
  described = read_config(folder)
  family = described['model_type']
  published = dataclasses.replace(
    TransformerConfig.from_hf(described), tied=config.tied
  )
  scalar = 'head_kernel' in abstract
  entries = families.entries(family, published, scalar)
  tensors = _open_named(folder, family)
  embedding, unembedding = families.embedding_names(family)
  if config.tied and not scalar and embedding not in tensors:
    # One matrix, under its other name.
    if unembedding in tensors:
      tensors[embedding] = tensors.pop(unembedding)
  elif config.tied and not scalar and _other_unembedding(family, tensors):
    raise ValueError(
      f'{folder}: config.json says that the unembedding is the embedding, and '
      f'{unembedding} holds another one'
    )
  _check_names(folder, family, entries, tensors, published)
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


def _check_names(folder, family, entries, tensors, config):
  shapes = {}
  for entry in entries:
    for name in _names(entry, config):
      shapes[name] = math.prod(entry.view), entry.view
  missing = sorted(set(shapes) - set(tensors))
  extra = sorted(set(tensors) - set(shapes))
  extra = [name for name in extra if not name.endswith(_BUFFERS)]
  if config.tied:
    # Some files repeat the tied embedding.
    extra = [n for n in extra if n != families.embedding_names(family)[1]]
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
  """The parameter of one entry, laid out as `struct` asks."""

  def from_callback(layer, shape, layout, buffers):
    name = entry.name.format(layer)

    def read(index):
      bounds = tuple(
        part.indices(size)[:2] for part, size in zip(index, shape, strict=True)
      )
      if bounds not in buffers:
        sizes = [stop - start for start, stop in bounds]
        buffers[bounds] = np.empty(sizes, np.float32)
      where = f'{folder}: tensor {name}'
      _read_shard(
        entry, tensors[name], bounds, buffers[bounds], where, vocab_size
      )
      return buffers[bounds]

    return jax.make_array_from_callback(shape, layout, read)

  if not entry.stacked:
    return from_callback(0, struct.shape, struct.sharding, {})
  spec = struct.sharding.spec
  if spec and spec[0] is not None:
    raise ValueError(
      f'{"/".join(entry.path)}: layers are sharded over {spec[0]}; published '
      'models are read layer by layer, so they must not be'
    )
  layer_sharding = jax.sharding.NamedSharding(
    struct.sharding.mesh, jax.sharding.PartitionSpec(*spec[1:])
  )
  stack = _make_stack(struct.shape, struct.sharding)()
  write = _write_layer(struct.sharding)
  # The same host memory for all layers: freed buffers linger in jax, and each
  # layer is in the stack before the next one is read.
  buffers = {}
  for layer in range(struct.shape[0]):
    part = from_callback(layer, struct.shape[1:], layer_sharding, buffers)
    stack = write(stack, part, layer)
    stack.block_until_ready()
    del part
  return stack


@functools.cache
def _make_stack(shape, layout):
  return jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=layout)


@functools.cache
def _write_layer(layout):
  return jax.jit(
    lambda stack, part, layer: jax.lax.dynamic_update_index_in_dim(
      stack, part, layer, 0
    ),
    donate_argnums=0,
    out_shardings=layout,
  )


def _read_shard(entry, stored, bounds, out, where, vocab_size):
  """Fills `out` with a part of one parameter of ours, float32.

  The tensor is read in blocks along the slowest of its own axes. Each block is
  mapped afresh, so that no more of the file than a block is ever resident.

  Args:
    bounds: (start, stop) of the part along each of our axes.
  """
  # The published axis that each of ours is, and ours of the slowest.
  kept = [
    axis
    for axis in range(len(entry.view))
    if entry.part is None or axis != entry.part[0]
  ]
  axes = [kept[axis] for axis in entry.order]
  slowest = int(np.argmin(axes)) if axes else 0
  start, stop = bounds[slowest]
  # Rows of tokens beyond the published ones are filled in afterwards.
  num_rows = entry.view[axes[slowest]]
  step = max(1, _BLOCK_BYTES // max(1, 4 * out[_at(slowest, 0, 1)].size))

  def block(first, last):
    view = _map_again(stored).reshape(entry.view)
    if entry.part is not None:
      view = view[_at(entry.part[0], entry.part[1], None)]
    wanted = [slice(low, high) for low, high in bounds]
    wanted[slowest] = slice(first, last)
    return view.transpose(entry.order)[tuple(wanted)]

  for first in range(start, min(stop, num_rows), step):
    last = min(first + step, stop, num_rows)
    place = out[_at(slowest, first - start, last - start)]
    np.copyto(place, block(first, last), casting='same_kind')
    if not np.isfinite(place).all():
      raise ValueError(f'{where} holds NaN or infinity')
  if entry.path[0] in _VOCABULARY and stop > num_rows:
    out[max(num_rows - start, 0) :] = 0
    if num_rows < vocab_size:
      total = np.zeros(out.shape[1:], np.float64)
      for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        total += block(first, last).astype(np.float32).sum(0, np.float64)
      low, high = max(num_rows - start, 0), max(vocab_size - start, 0)
      out[low:high] = total / num_rows
  return out


def _at(axis, first, last):
  """An index at one axis: a slice, or one element where `last` is None."""
  part = first if last is None else slice(first, last)
  return (slice(None),) * axis + (part,)


def _map_again(stored):
  """A fresh map of the same bytes; what it brings into memory goes with it."""
  if not isinstance(stored, np.memmap):
    return stored
  return np.memmap(
    stored.filename, stored.dtype, 'r', stored.offset, stored.shape
  )


# --- Out ----------------------------------------------------------------------


def save(
  folder: epath.PathLike, config: TransformerConfig, params: Params
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
    if family == 'gemma3_text':
      name += 'Text'  # Without it, the class is that of text and images.
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
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  write_tensors(folder, shapes, tensor)
  (folder / 'config.json').write_text(
    json.dumps(described, indent=2) + '\n', 'utf-8'
  )


def save_adapters(
  folder: epath.PathLike, config: TransformerConfig, params: Params, base: str
) -> None:
  """Writes adapter_config.json and safetensors that `peft` opens.

  A published matrix that holds several of ours (queries, keys and values of
  GPT-2 and GPT-NeoX) gets their factors side by side: its rank is that many
  times higher, and B is 0 outside of a block for each.

  Args:
    folder: made if it does not exist.
    config: of the model, with adapters.
    params: the adapters; of a scalar model the head, too. Its bias is left out,
      for published classifiers have none.
    base: name or folder of the published base.

  Raises:
    ValueError: no published family has this model.
  """
  plain, adapters = dataclasses.replace(config, lora=None), config.lora
  family = families.write_config(plain)['model_type']
  layers, tensors, sources = params['trunk']['layers'], {}, {}
  for entry in families.entries(family, plain):
    if f'{_stem(entry)}_lora_a' in layers:
      sources.setdefault(entry.name, []).append(entry)
  for published, found in sources.items():
    name = published.removesuffix('.weight')
    for layer in range(config.num_layers):
      place = 'base_model.model.' + name.format(layer)
      factors = _factors(found, layers, layer, adapters.rank)
      for letter, factor in zip('AB', factors, strict=True):
        tensors[f'{place}.lora_{letter}.weight'] = factor
  if 'head_kernel' in params:
    head = np.asarray(params['head_kernel'])[None]
    tensors['base_model.model.score.weight'] = head
  described = {
    'peft_type': 'LORA',
    'task_type': 'SEQ_CLS' if 'head_kernel' in params else 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'inference_mode': True,
    'r': adapters.rank,
    'lora_alpha': adapters.alpha,
    'lora_dropout': 0.0,
    'bias': 'none',
    'target_modules': [_module(name) for name in sources],
    'modules_to_save': ['score'] if 'head_kernel' in params else None,
    # Its matrices are stored with the inputs first.
    'fan_in_fan_out': family == 'gpt2',
  }
  for key, value in (
    ('rank_pattern', adapters.rank),
    ('alpha_pattern', adapters.alpha),
  ):
    described[key] = {
      _module(name): len(found) * value
      for name, found in sources.items()
      if len(found) > 1
    }
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  shapes = {name: x.shape for name, x in tensors.items()}
  write_tensors(  # `peft` reads one file.
    folder, shapes, tensors.__getitem__, 2**63, stem='adapter_model'
  )
  (folder / 'adapter_config.json').write_text(
    json.dumps(described, indent=2) + '\n', 'utf-8'
  )


def _stem(entry):
  """The name of a matrix of ours, as its adapters have it."""
  return entry.path[-1].removesuffix('_kernel')


def _module(name):
  """A published matrix's name within its layer, such as 'attn.c_attn'."""
  return name.partition('{}.')[2].removesuffix('.weight')


def _factors(entries, layers, layer, rank):
  """A [r, inputs] and B [outputs, r] of a published matrix in one layer.

  Args:
    entries: of ours that lie in it.
    layers: adapters of all layers.
    layer: its number.
    rank: of each of ours.
  """
  view, whole_a, whole_b = entries[0].view, [], None
  for number, entry in enumerate(entries):
    a, b = (
      np.asarray(layers[f'{_stem(entry)}_lora_{leaf}'][layer]) for leaf in 'ab'
    )
    whole_a.append(a.reshape(-1, rank).T)
    fused = None if entry.part is None else entry.part[0]
    kept = [axis for axis in range(len(view)) if axis != fused]
    inputs = [kept[i] for i in entry.order[: a.ndim - 1]]
    outputs = [axis for axis in range(len(view)) if axis not in inputs]
    if whole_b is None:
      sizes = [view[axis] for axis in outputs]
      whole_b = np.zeros((*sizes, len(entries), rank), np.float32)
    block = whole_b[..., number, :]
    if fused is not None:
      block = block[_at(outputs.index(fused), entry.part[1], None)]
    block[...] = np.moveaxis(b, 0, -1)
  return np.concatenate(whole_a), whole_b.reshape(-1, len(entries) * rank)


def fold_shift(params: Params) -> Params:
  """A reward model's parameters with its bias moved into the final norm's.

  The score is w . (h + b) + c, with h the normed state, b the norm's bias and c
  the head's: b + w c / |w|^2 in the place of b makes c superfluous.

  Raises:
    ValueError: a policy, or a final norm without bias (RMS).
  """
  if 'head_kernel' not in params:
    raise ValueError(
      'only reward models have a shift to fold; this is a policy'
    )
  norm = params['trunk']['final_norm']
  if 'bias' not in norm:
    raise ValueError(
      'the final norm of this family has no bias to fold the shift into; add '
      '`score_shift` of config.json to the logit'
    )
  head = np.asarray(params['head_kernel'], np.float64)
  added = head * float(params['head_bias']) / np.sum(head**2)
  bias = (np.asarray(norm['bias'], np.float64) + added).astype(np.float32)
  return {
    **params,
    'trunk': {**params['trunk'], 'final_norm': {**norm, 'bias': bias}},
    'head_bias': np.zeros((), np.float32),
  }


def write_tensors(
  folder: epath.PathLike,
  shapes: dict[str, tuple[int, ...]],
  tensor_fn,
  shard_bytes: int = _SHARD_BYTES,
  stem: str = 'model',
) -> None:
  """Writes float32 tensors, one at a time in memory, as safetensors files.

  Args:
    folder: exists.
    shapes: name -> shape, in the order of the file.
    tensor_fn: name -> array.
    shard_bytes: of tensors in one file, about.
    stem: of the files' names.
  """
  folder = epath.Path(folder)
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
    file_name = f'{stem}-{number:05}-of-{len(shards):05}.safetensors'
    if len(shards) == 1:
      file_name = f'{stem}.safetensors'
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
    (folder / f'{stem}.safetensors.index.json').write_text(
      json.dumps(
        {'metadata': {'total_size': total}, 'weight_map': weight_map}, indent=2
      ),
      'utf-8',
    )
