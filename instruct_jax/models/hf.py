"""Reads and writes model folders in the Hugging Face format.

Safetensors files are read one published tensor at a time, in blocks, straight
into the shard of each device; stacked layers enter their stack on the device
one by one. So the host holds a shard of one tensor, never the model. Reading
checks that no tensor is missing or left over, that every shape is as
config.json says, and that every number is finite.
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
from flax import traverse_util

from instruct_jax import files
from instruct_jax.models import families
from instruct_jax.models.config import TransformerConfig
from instruct_jax.types import Params

_DTYPES = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': jnp.bfloat16,
}
# Buffers that old checkpoints saved beside the weights; they are not learned.
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
  """Reads the config.json of a model folder.

  Raises:
    ValueError: it is missing or not a JSON object.
  """
  path = folder / 'config.json'
  if not path.is_file():
    raise ValueError(
      f'{folder}: no config.json here; give a folder with a model in the '
      'Hugging Face format'
    )
  return _read_object(path)


def _check_pointer(path):
  with path.open('rb') as file:
    if file.read(len(files.LFS_MARK)) == files.LFS_MARK:
      raise ValueError(f'{path}: {files.LFS_PROBLEM}')


def _read_object(path):
  _check_pointer(path)
  try:
    values = json.loads(path.read_text('utf-8-sig'))
  except ValueError as error:
    raise ValueError(f'{path}: not JSON ({error})') from error
  if not isinstance(values, dict):
    raise ValueError(f'{path}: not a JSON object')
  return values


def shape_of(folder: pathlib.Path) -> TransformerConfig:
  """The shape that a folder's config.json describes.

  Raises:
    ValueError: see `TransformerConfig.from_hf`; the message names the folder.
  """
  try:
    return TransformerConfig.from_hf(read_config(folder))
  except ValueError as error:
    known = str(error).startswith(str(folder))
    raise ValueError(f'{"" if known else f"{folder}: "}{error}') from error


def open_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Memory maps of the tensors in a folder's safetensors files.

  The files are those that the index names; without an index,
  `model.safetensors`; without that, all.

  Raises:
    ValueError: there are none (pickled weights are refused), a file is
      truncated or damaged, two files hold the same tensor, or there is both
      an index and a `model.safetensors` that it does not name.
  """
  paths = sorted(folder.glob('*.safetensors'))
  if not paths:
    pickled = sorted(
      path.name for path in folder.iterdir() if path.suffix in ('.bin', '.pt')
    )
    if pickled:
      raise ValueError(
        f'{folder}: {", ".join(pickled)} are pickles, which can run code when '
        'opened, and are not read. Convert them once, where that is safe: '
        'transformers.AutoModelForCausalLM (of a reward model '
        'AutoModelForSequenceClassification).from_pretrained(FOLDER)'
        '.save_pretrained(NEW_FOLDER) writes safetensors'
      )
    raise ValueError(
      f'{folder}: no *.safetensors file here; a model that comes as pickles '
      'alone (*.bin) has to be converted once: transformers.'
      'AutoModelForCausalLM (of a reward model '
      'AutoModelForSequenceClassification).from_pretrained(NAME)'
      '.save_pretrained(FOLDER)'
    )
  index = folder / 'model.safetensors.index.json'
  if index.is_file():
    # Some folders also hold the same weights in their authors' own format.
    weight_map = _read_object(index).get('weight_map')
    if not isinstance(weight_map, dict):
      raise ValueError(
        f"{index}: no 'weight_map' from tensors to files; copy the file again"
      )
    bad = [x for x in weight_map.items() if not isinstance(x[1], str)]
    if bad:
      raise ValueError(
        f"{index}: 'weight_map' gives tensor {bad[0][0]} the file "
        f'{bad[0][1]!r:.60}, which is not a name; the file is damaged'
      )
    expected = set(weight_map.values())
    if folder / 'model.safetensors' in paths and expected != {
      'model.safetensors'
    }:
      raise ValueError(
        f'{folder}: holds two sets of weights, model.safetensors (which '
        f'transformers takes) and the files of {index.name}; move one of them '
        'away'
      )
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
        raise ValueError(f'{path}: tensor {name} is also in another file')
      tensors[name] = tensor
  return tensors


def _open_file(path):
  _check_pointer(path)
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
  if not isinstance(header, dict):
    raise ValueError(
      f'{path}: damaged header (not a JSON object); copy the file again'
    )
  header.pop('__metadata__', None)
  tensors = {}
  for name, entry in header.items():
    if not _is_entry(entry):
      raise ValueError(
        f'{path}: damaged header (tensor {name}: {str(entry)[:80]}); copy the '
        'file again'
      )
    start, end = entry['data_offsets']
    if 8 + header_size + end > size:
      raise ValueError(
        f'{path}: truncated: tensor {name} ends at byte '
        f'{8 + header_size + end}, the file at {size}; copy the file again'
      )
    if entry['dtype'] not in _DTYPES:
      if name.endswith(_BUFFERS):  # Such as boolean masks.
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


def _is_entry(entry) -> bool:
  """Whether an entry of a header has a dtype, a shape and two offsets."""

  def are_sizes(values, *length):
    return (
      isinstance(values, list)
      and all(type(x) is int and x >= 0 for x in values)
      and len(values) in (length or (len(values),))
    )

  return (
    isinstance(entry, dict)
    and isinstance(entry.get('dtype'), str)
    and are_sizes(entry.get('shape'))
    and are_sizes(entry.get('data_offsets'), 2)
  )


def published_config(folder: pathlib.Path) -> TransformerConfig:
  """The shape of a folder's language model, from config.json and its tensors.

  If config.json ties the unembedding to the embedding but the files hold a
  different one, the model has both, as in `transformers`.

  Raises:
    ValueError: see `TransformerConfig.from_hf` and `open_tensors`.
  """
  family, config = read_config(folder).get('model_type'), shape_of(folder)
  if config.tied and _other_unembedding(family, _open_named(folder, family)):
    return dataclasses.replace(config, tied=False)
  return config


def _open_named(folder, family):
  """`open_tensors`, under the names that the language model gives them."""
  tensors = open_tensors(folder)
  prefix = {'gpt2': 'transformer.', 'gptj': 'transformer.'}.get(family, '')
  if prefix and not any(name.startswith(prefix) for name in tensors):
    # The original GPT-2 files lack the prefix of the language model.
    tensors = {
      name if name.startswith('lm_head') else prefix + name: tensor
      for name, tensor in tensors.items()
    }
  return tensors


def _other_unembedding(family, tensors) -> bool:
  """Whether the files hold an unembedding other than the embedding."""
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
  """Reads the weights of a folder into the shards of `abstract`.

  Embedding rows of tokens that the published model lacks (such as our PAD)
  start at the mean of its rows; rows beyond `vocab_size` are zero.

  Args:
    folder: holds config.json and safetensors files.
    config: of the model to build; may have more tokens than the folder's. For
      a language model, `tied` is as in `published_config`.
    abstract: `ShapeDtypeStruct`s with shardings; with a 'head_kernel' for a
      sequence classifier with one label.

  Raises:
    ValueError: names a tensor that is missing, left over, of the wrong shape
      or not finite; or `config` is tied but the files hold an unembedding.
  """
  described = read_config(folder)
  scalar = 'head_kernel' in abstract
  entries, tensors = _find_tensors(folder, config.tied, scalar)
  structs = traverse_util.flatten_dict(abstract)
  params = {
    entry.path: _place(
      entry, tensors, structs[entry.path], folder, config.vocab_size
    )
    for entry in entries
  }
  if scalar:
    shift = jnp.asarray(described.get('score_shift', 0.0), jnp.float32)
    path = ('head_bias',)
    params[path] = jax.device_put(shift, structs[path].sharding)
  return traverse_util.unflatten_dict(params)


def check_weights(folder: pathlib.Path, scalar: bool) -> None:
  """Raises if the weights of a folder could not be loaded; reads all of them.

  Args:
    folder: holds config.json and safetensors files.
    scalar: whether it is a reward model.

  Raises:
    ValueError: as for `load_params`, which might otherwise fail hours later.
  """
  shape = shape_of(folder) if scalar else published_config(folder)
  entries, tensors = _find_tensors(folder, shape.tied, scalar)
  names = dict.fromkeys(x for entry in entries for x in _names(entry, shape))
  for name in names:
    size, step = tensors[name].size, _BLOCK_BYTES // tensors[name].itemsize
    for start in range(0, size, step):
      block = _map_again(tensors[name]).reshape(-1)[start : start + step]
      if not np.isfinite(block).all():
        raise ValueError(
          f'{folder}: tensor {name} holds NaN or infinity; copy the file again'
        )


def _find_tensors(folder, tied, scalar):
  """Returns (entries, name -> tensor); ValueError as for `load_params`."""
  family = read_config(folder).get('model_type')
  published = dataclasses.replace(shape_of(folder), tied=tied)
  entries = families.entries(family, published, scalar)
  tensors = _open_named(folder, family)
  embedding, unembedding = families.embedding_names(family)
  if tied and not scalar and embedding not in tensors:
    if unembedding in tensors:  # The same matrix under its other name.
      tensors[embedding] = tensors.pop(unembedding)
  elif tied and not scalar and _other_unembedding(family, tensors):
    raise ValueError(
      f'{folder}: config.json says that the unembedding is the embedding, but '
      f'{unembedding} holds another one'
    )
  _check_tensors(folder, family, entries, tensors, published)
  return entries, tensors


def _names(entry, config):
  layers = range(config.num_layers) if entry.stacked else (0,)
  return [entry.name.format(layer) for layer in layers]


def _check_tensors(folder, family, entries, tensors, config):
  shapes = {
    name: entry.shape for entry in entries for name in _names(entry, config)
  }
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
  for name, shape in shapes.items():
    if tensors[name].shape != shape:
      raise ValueError(
        f'{folder}: tensor {name} has shape {tensors[name].shape}; config.json '
        f'asks for {shape}'
      )


def _place(entry, tensors, struct, folder, vocab_size):
  """Reads the parameter of one entry, with the sharding of `struct`."""

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
  # All layers share host buffers, since jax keeps freed ones for a while; each
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
  """Fills `out` with the part of our float32 parameter that is within `bounds`.

  These are (start, stop) along each axis. The tensor is read in blocks along
  the slowest of its axes. Each block has a new memory map, so that no more of
  the file than a block is ever resident.
  """
  axes = _view_axes(entry)
  slowest = int(np.argmin(axes)) if axes else 0
  start, stop = bounds[slowest]
  # Rows of tokens beyond the published ones are filled in afterwards.
  num_rows = entry.view[axes[slowest]]
  step = max(1, _BLOCK_BYTES // max(1, 4 * out[_at(slowest, 0, 1)].size))

  def block(first, last):
    view = _part_of(entry, _map_again(stored).reshape(entry.view))
    wanted = [slice(low, high) for low, high in bounds]
    wanted[slowest] = slice(first, last)
    return view.transpose(entry.order)[tuple(wanted)]

  for first in range(start, min(stop, num_rows), step):
    last = min(first + step, stop, num_rows)
    place = out[_at(slowest, first - start, last - start)]
    np.copyto(place, block(first, last), casting='same_kind')
    if not np.isfinite(place).all():
      raise ValueError(f'{where} holds NaN or infinity')
  if entry.path[-1] in _VOCABULARY and stop > num_rows:
    out[max(num_rows - start, 0) :] = 0
    if num_rows < vocab_size:
      total = np.zeros(out.shape[1:], np.float64)
      for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        total += block(first, last).astype(np.float32).sum(0, np.float64)
      low, high = max(num_rows - start, 0), max(vocab_size - start, 0)
      out[low:high] = total / num_rows
  return out


def _view_axes(entry):
  """For each of our axes, its axis in the view."""
  fused = None if entry.part is None else entry.part[0]
  kept = [axis for axis in range(len(entry.view)) if axis != fused]
  return [kept[axis] for axis in entry.order]


def _at(axis, first, last=None):
  """An index at one axis: a slice, or one element where `last` is None."""
  part = first if last is None else slice(first, last)
  return (slice(None),) * axis + (part,)


def _part_of(entry, view):
  """The part of an array of shape `entry.view` that is ours."""
  return view if entry.part is None else view[_at(*entry.part)]


def _map_again(stored):
  """A new map of the same bytes, so that pages of the old can leave memory."""
  if not isinstance(stored, np.memmap):
    return stored
  return np.memmap(
    stored.filename, stored.dtype, 'r', stored.offset, stored.shape
  )


# --- Writing ------------------------------------------------------------------


def save(
  folder: epath.PathLike, config: TransformerConfig, params: Params
) -> None:
  """Writes config.json and safetensors that `transformers` opens.

  A scalar model becomes a sequence classifier with one label. Published
  classifiers have no bias, so it is written to `score_shift` of config.json, to
  be added to the logit.

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
      name += 'Text'  # Without it, the class would be for text and images.
    described |= {
      'architectures': [f'{name}ForSequenceClassification'],
      'num_labels': 1,
      'id2label': {'0': 'score'},
      'label2id': {'score': 0},
      'problem_type': 'regression',
      'score_shift': float(params['head_bias']),
    }
  published = TransformerConfig.from_hf(described)
  leaves, sources = traverse_util.flatten_dict(params), {}
  for entry in families.entries(family, published, scalar):
    for layer, name in enumerate(_names(entry, config)):
      sources.setdefault(name, []).append((entry, layer))

  def tensor(name):
    first, _ = sources[name][0]
    whole = np.empty(first.view, np.float32)
    for entry, layer in sources[name]:
      ours = leaves[entry.path]
      ours = np.asarray(ours[layer] if entry.stacked else ours)
      if entry.path[-1] in _VOCABULARY:
        ours = ours[: entry.view[0]]
      _part_of(entry, whole)[...] = ours.transpose(np.argsort(entry.order))
    return whole.reshape(first.shape)

  shapes = {name: found[0][0].shape for name, found in sources.items()}
  write_tensors(folder, shapes, tensor)
  _write_json(folder, 'config.json', described)


def _write_json(folder, name, values):
  text = json.dumps(values, indent=2) + '\n'
  (epath.Path(folder) / name).write_text(text, 'utf-8')


def save_adapters(
  folder: epath.PathLike, config: TransformerConfig, params: Params, base: str
) -> None:
  """Writes adapter_config.json and safetensors that `peft` opens.

  If a published matrix holds several of ours (queries, keys and values of
  GPT-2 and GPT-NeoX), their factors are concatenated: its rank is that many
  times higher, and B is 0 outside of a block for each.

  Args:
    params: the adapters, and the head of a scalar model. Its bias is not
      written, since published classifiers have none.
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
      module = 'base_model.model.' + name.format(layer)
      factors = _factors(found, layers, layer, adapters.rank)
      for letter, factor in zip('AB', factors, strict=True):
        tensors[f'{module}.lora_{letter}.weight'] = factor
  if 'head_kernel' in params:
    head = np.asarray(params['head_kernel'])[None]
    tensors['base_model.model.score.weight'] = head
  # How many times higher `rank` and `alpha` are for these matrices.
  multiples = {
    _module(name): len(found)
    for name, found in sources.items()
    if len(found) > 1
  }
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
    # GPT-2's matrices are stored with the inputs first.
    'fan_in_fan_out': family == 'gpt2',
    'rank_pattern': {n: k * adapters.rank for n, k in multiples.items()},
    'alpha_pattern': {n: k * adapters.alpha for n, k in multiples.items()},
  }
  shapes = {name: x.shape for name, x in tensors.items()}
  write_tensors(  # `peft` reads one file.
    folder, shapes, tensors.__getitem__, 2**63, stem='adapter_model'
  )
  _write_json(folder, 'adapter_config.json', described)


def _stem(entry):
  """Our name of a matrix, from which the names of its adapters are made."""
  return entry.path[-1].removesuffix('_kernel')


def _module(name):
  """A published matrix's name within its layer, such as 'attn.c_attn'."""
  return name.partition('{}.')[2].removesuffix('.weight')


def _factors(entries, layers, layer, rank):
  """A [r, inputs] and B [outputs, r] of a published matrix in one layer.

  Args:
    entries: our matrices within it.
  """
  view, whole_a, whole_b = entries[0].view, [], None
  for number, entry in enumerate(entries):
    a, b = (
      np.asarray(layers[f'{_stem(entry)}_lora_{leaf}'][layer]) for leaf in 'ab'
    )
    whole_a.append(a.reshape(-1, rank).T)
    inputs = _view_axes(entry)[: a.ndim - 1]
    outputs = [axis for axis in range(len(view)) if axis not in inputs]
    if whole_b is None:
      sizes = [view[axis] for axis in outputs]
      whole_b = np.zeros((*sizes, len(entries), rank), np.float32)
    block = whole_b[..., number, :]
    if entry.part is not None:
      fused, part = entry.part
      block = block[_at(outputs.index(fused), part)]
    block[...] = np.moveaxis(b, 0, -1)
  return np.concatenate(whole_a), whole_b.reshape(-1, len(entries) * rank)


def fold_shift(params: Params) -> Params:
  """Returns a reward model's parameters with its bias moved to the final norm.

  The score is w . (h + b) + c, with h the normed state, b the norm's bias and c
  the head's. It does not change if b + w c / |w|^2 replaces b and 0 replaces c.

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
    shapes: name -> shape, in the order of the file.
    tensor_fn: name -> array.
    shard_bytes: approximate size of one file.
    stem: of the files' names.
  """
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
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
