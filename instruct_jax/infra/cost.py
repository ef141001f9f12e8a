"""The cost of a program, computed before it runs.

`flops` counts the arithmetic of a traced program with all iterations of its
loops (`compiled.cost_analysis()` counts them once). `traffic` takes from the
optimised HLO text the bytes to and from memory and between chips. `ceiling`
compares both with a chip's published figures.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping

import jax
from jax.extend import core

COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of one chip.

  Attributes:
    flops: bfloat16 peak, per second.
    memory: bytes; for v5e, what the compiler grants of the published 16 GiB;
      for H100, 95 % of the card's, the most that jax should use.
    bandwidth: of the memory, bytes per second.
    interconnect: bytes per second; of all links of a TPU together, of a GPU's
      NVLink in one direction, or of its network card.
  """

  flops: float
  memory: float
  bandwidth: float
  interconnect: float


# cloud.google.com/tpu/docs/system-architecture: v4, v5e, v5p. NVIDIA's data
# sheet of the H100 SXM (dense bfloat16) and of the DGX H100 (ConnectX-7).
CHIPS = {
  'v4': Chip(275e12, 32.0 * 2**30, 1228e9, 2400e9 / 8),
  'v5e': Chip(197e12, 15.75 * 2**30, 819e9, 1600e9 / 8),
  'v5p': Chip(459e12, 95.0 * 2**30, 2765e9, 4800e9 / 8),
  'h100': Chip(989e12, 0.95 * 79.1 * 2**30, 3350e9, 900e9 / 2),
  # Rings over several hosts are as slow as their slowest link.
  'h100_network': Chip(989e12, 0.95 * 79.1 * 2**30, 3350e9, 400e9 / 8),
}


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Bytes that one chip moves in one run of a program.

  Attributes:
    memory: read from and written to its memory.
    collectives: received from other chips, by kind.
  """

  memory: float
  collectives: Mapping[str, float]


def ceiling(chip: Chip, num_flops: float, moved: Traffic) -> dict[str, float]:
  """Least seconds that one chip's arithmetic, memory and interconnect take."""
  return {
    'arithmetic': num_flops / chip.flops,
    'memory': moved.memory / chip.bandwidth,
    'interconnect': sum(moved.collectives.values()) / chip.interconnect,
  }


# --- Arithmetic ---------------------------------------------------------------

# Products [T, S] x H in cuDNN's attention; the backward pass recomputes the
# scores.
_CUDNN = {
  'dot_product_attention_fwd_wrapper': 2,
  'dot_product_attention_bwd_wrapper': 5,
}


def flops(jaxpr) -> float:
  """Floating-point operations of all matrix products of a traced program.

  The sum over all chips, including recomputed activations. A `while_loop`
  counts once. Results that nothing reads do not count: the compiler drops them.
  Other operations are a small part of a Transformer's arithmetic.

  Args:
    jaxpr: `jax.jit(f).trace(...).jaxpr`.
  """
  total = 0.0
  for equation in _live(getattr(jaxpr, 'jaxpr', jaxpr)):
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      left = equation.invars[0].aval.shape
      inner = math.prod(left[axis] for axis in contracted)
      total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
      continue
    if name in _CUDNN:
      # An upper bound: it counts products between all tokens of a row.
      (B, T, N, H), S = (
        equation.invars[0].aval.shape,
        equation.invars[1].aval.shape[1],
      )
      total += _CUDNN[name] * 2 * B * N * T * S * H
      continue
    if name == 'pallas_call':
      # An upper bound: it includes tiles that the mask leaves out.
      grid = math.prod(params['grid_mapping'].grid)
      total += grid * flops(params['jaxpr'])
      continue
    inner = [flops(each) for each in _programs_in(params)]
    if name == 'scan':
      total += params['length'] * sum(inner)
    elif name == 'cond':
      total += max(inner, default=0.0)
    elif name == 'shard_map':
      total += params['mesh'].size * sum(inner)
    elif name == 'custom_vjp_call':
      total += inner[0]
    else:
      total += sum(inner)
  return total


def _live(jaxpr):
  """Yields equations with effects or whose results are read, last first."""

  def variables(atoms):
    return {atom for atom in atoms if not isinstance(atom, core.Literal)}

  read = variables(jaxpr.outvars)
  for equation in reversed(jaxpr.eqns):
    if equation.effects or read & set(equation.outvars):
      read |= variables(equation.invars)
      yield equation


def _programs_in(params):
  for value in params.values():
    for each in value if isinstance(value, (tuple, list)) else (value,):
      if hasattr(each, 'eqns') or hasattr(each, 'jaxpr'):
        yield each


# --- HLO text -----------------------------------------------------------------

# Instructions that move no bytes.
_FREE = {
  *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast'),
  *('after-all', 'partition-id', 'replica-id', 'opt-barrier'),
}
# Bits of the dtype ('' for pred), dimensions, layout.
_ARRAY = re.compile(
  r'\b(?:pred|(?:bf|[fsu])(8|16|32|64))\[([\d,]*)\](\{[^}]*\})?'
)
_KERNELS = r'tpu_custom_call|__cudnn\$fmha'
_CALLED = re.compile(r'(calls|to_apply|body|condition)=%?([\w.\-]+)')


@dataclasses.dataclass
class _Instruction:
  name: str
  type: str
  opcode: str
  operands: list[str]
  text: str  # The operands as text.
  attributes: str
  is_root: bool


def _closing(text: str, start: int) -> int:
  """Index after the parenthesis that closes the one at `start`."""
  depth = 0
  for index in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[index], 0)
    if depth == 0:
      return index + 1
  raise ValueError(f'no closing parenthesis: {text[start : start + 80]!r}')


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  """Instructions by computation, and the name of the entry computation."""
  computations, current, entry = {}, None, ''
  for line in text.splitlines():
    if not line.startswith(' '):
      header = re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line)
      if header and '->' in line:
        current = computations.setdefault(header[2], [])
        entry = header[2] if header[1] else entry
      continue
    match = re.match(r'\s+(ROOT )?%?([\w.\-]+) = ', line)
    if match is None or current is None:
      continue
    line = re.sub(r'/\*.*?\*/', '', line[match.end() :])
    end = _closing(line, 0) if line[0] == '(' else line.index(' ')
    result, line = line[:end], line[end:].lstrip()
    opening = line.index('(')
    end = _closing(line, opening)
    inside = line[opening + 1 : end - 1]
    current.append(
      _Instruction(
        name=match[2],
        type=result,
        opcode=line[:opening],
        operands=re.findall(r'%([\w.\-]+)', inside),
        text=inside,
        attributes=line[end:],
        is_root=bool(match[1]),
      )
    )
  return computations, entry


def _size(type_text: str, on_chip: bool = False) -> float:
  """Bytes of a type; on-chip memory, `S(1)`, counts only with `on_chip`."""
  total = 0.0
  for bits, dims, layout in _ARRAY.findall(type_text):
    if on_chip or 'S(1)' not in layout:
      size = math.prod(int(d) for d in dims.split(',') if d)
      total += size * int(bits or 8) // 8
  return total


def traffic(hlo_text: str) -> Traffic:
  """Bytes moved, from the text of an optimised program.

  Loops whose number of trips the compiler knows, or whose condition is `index <
  constant`, count that often, others once. A fusion reads its operands and
  writes its result; for an array that it only slices or updates, just the slice
  counts.

  Args:
    hlo_text: `compiled.as_text()`.
  """
  computations, entry = _parse(hlo_text)
  moved = dict(sorted(_Reader(computations).cost(entry).items()))
  return Traffic(float(moved.pop('memory', 0.0)), moved)


class _Reader:
  """Adds up the bytes of 'memory' and of each kind of collective."""

  def __init__(self, computations):
    self._computations = computations
    self._known = {}

  def cost(self, name: str) -> dict[str, float]:
    if name not in self._known:
      total = Counter()
      instructions = self._computations.get(name, [])
      types = {i.name: i.type for i in instructions}
      for instruction in instructions:
        total.update(self._one(instruction, types))
      self._known[name] = total
    return self._known[name]

  def _one(self, instruction, types) -> Mapping[str, float]:
    opcode = instruction.opcode
    called = dict(_CALLED.findall(instruction.attributes))
    if opcode in _FREE or opcode.endswith('-done'):
      return {}
    if opcode == 'while':
      known = re.search(
        r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes
      )
      trips = int(known[1]) if known else self._trips(called['condition'])
      once = self.cost(called['body'])
      return {kind: trips * size for kind, size in once.items()}
    if opcode == 'conditional':
      names = re.findall(
        r'%([\w.\-]+)', instruction.attributes.split('meta')[0]
      )
      costs = [self.cost(n) for n in names if n in self._computations]
      return max(costs, key=lambda c: c['memory'], default={})
    if opcode in ('call', 'async-start'):
      return self.cost(called.get('to_apply') or called.get('calls', ''))
    kind = opcode.removesuffix('-start')
    if kind in COLLECTIVES:
      return {kind: _received(kind, instruction, types)}
    operands = [types.get(name, '') for name in instruction.operands]
    if opcode == 'fusion':
      inside = self._computations.get(called['calls'], [])
      total = Counter(memory=_fusion_bytes(inside, operands, instruction.type))
      inner = {i.name: i.type for i in inside}
      is_scatter = any(i.opcode == 'dynamic-slice' for i in inside)
      for each in inside:
        kind = each.opcode.removesuffix('-start')
        if kind not in COLLECTIVES:
          continue
        size = _received(kind, each, inner)
        if kind == 'all-reduce' and is_scatter:
          # An all-reduce of which each chip keeps only its part.
          kind, size = 'reduce-scatter', size / 2
        total[kind] += size
      return total
    if opcode == 'custom-call' and not re.search(
      f'"({_KERNELS}|__cublas)', instruction.attributes
    ):
      return {}
    if opcode in ('dynamic-slice', 'gather', 'slice'):
      moved = 2 * _size(instruction.type)
    elif opcode == 'dynamic-update-slice':
      moved = 2 * _size(operands[1])
    elif opcode.endswith('-start'):
      # An asynchronous copy between memories: its first operand, once.
      moved = sum(map(_size, operands[:1]))
    else:
      moved = _size(instruction.type) + sum(map(_size, operands))
    return {'memory': moved}

  def _trips(self, condition: str) -> int:
    """N of `index < N`; 1 for other conditions."""
    instructions = {i.name: i for i in self._computations[condition]}
    root = next(i for i in instructions.values() if i.is_root)
    if root.opcode == 'compare' and 'direction=LT' in root.attributes:
      limit = instructions.get(root.operands[-1])
      if limit is not None and limit.opcode == 'constant':
        return int(limit.text)
    fused = [i for i in instructions.values() if i.opcode == 'fusion']
    if len(fused) == 1 and len(instructions) <= 5:
      constants = [i for i in instructions.values() if i.opcode == 'constant']
      name = dict(_CALLED.findall(fused[0].attributes))['calls']
      inside = self._computations[name]
      if len(constants) == 1 and all(
        i.opcode in ('parameter', 'compare', 'constant', 'bitcast')
        for i in inside
      ):
        return int(constants[0].text)
    return 1


def _received(kind, instruction, types) -> float:
  """Bytes that reach one chip with ring algorithms."""
  group = _group_size(instruction.attributes)
  before = sum(
    _size(types.get(name, ''), on_chip=True) for name in instruction.operands
  )
  share = (group - 1) / group
  if kind == 'all-gather':
    return before * (group - 1)
  if kind == 'all-reduce':
    return 2 * before * share
  return before if kind == 'collective-permute' else before * share


def _group_size(attributes: str) -> int:
  """Number of chips in one collective, from any of three notations."""
  mesh = re.search(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}', attributes)
  if mesh:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    return math.prod(int(sizes[a]) for a in re.findall(r"'([^']+)'", mesh[2]))
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', attributes)
  if listed:
    return listed[1].count(',') + 1
  tiled = re.search(r'replica_groups=\[(\d+),(\d+)\]', attributes)
  return int(tiled[2]) if tiled else 1


def _fusion_bytes(inside, operands, result) -> float:
  parameters = {i.name: int(i.text) for i in inside if i.opcode == 'parameter'}
  types = {i.name: i.type for i in inside}
  by_name = {i.name: i for i in inside}
  total = 0.0
  for name, number in parameters.items():
    if number >= len(operands) or not _size(operands[number]):
      continue
    whole, touched = float(_size(operands[number])), 0.0
    for user in _users(inside, name):
      if user.opcode in ('dynamic-slice', 'gather', 'slice'):
        touched += _size(user.type, on_chip=True)
      elif user.opcode != 'dynamic-update-slice' or name in user.operands[1:]:
        touched = whole
    total += min(whole, touched)
  roots = [i for i in inside if i.is_root]
  if roots and roots[0].opcode == 'tuple':
    roots = [by_name[name] for name in roots[0].operands if name in by_name]
  updates = [i for i in roots if i.opcode == 'dynamic-update-slice']
  if updates and len(updates) == len(roots):
    return total + 2.0 * sum(
      _size(types.get(i.operands[1], ''), on_chip=True) for i in updates
    )
  return total + _size(result)


def _users(inside, name):
  """Instructions that read a value, directly or through bitcasts."""
  for instruction in inside:
    if name in instruction.operands:
      if instruction.opcode == 'bitcast':
        yield from _users(inside, instruction.name)
      else:
        yield instruction


def num_kernels(hlo_text: str) -> int:
  """Number of attention kernels: Pallas's for TPUs, cuDNN's for GPUs."""
  return len(re.findall(f'custom_call_target="({_KERNELS})', hlo_text))


# --- Memory -------------------------------------------------------------------


def bytes_per_chip(tree) -> float:
  """Size of a tree of sharded arrays or `ShapeDtypeStruct`s on one chip."""
  sizes = (
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )
  return float(sum(sizes))
