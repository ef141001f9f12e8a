"""What a program will cost, read off before it runs.

`flops` counts the arithmetic of a traced program, loops multiplied out, which
`compiled.cost_analysis()` does not do. `traffic` reads the optimised HLO text
for bytes to and from memory and between chips. `ceiling` sets both against a
chip's published figures.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax

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
    flops: peak in bfloat16, a second.
    memory: bytes; v5e: what the compiler grants of the published 16 GiB.
    bandwidth: of the memory, bytes a second.
    interconnect: of all links of a chip together, bytes a second.
  """

  flops: float
  memory: float
  bandwidth: float
  interconnect: float


# cloud.google.com/tpu/docs/system-architecture: v4, v5e, v5p.
CHIPS = {
  'v4': Chip(275e12, 32.0 * 2**30, 1228e9, 2400e9 / 8),
  'v5e': Chip(197e12, 15.75 * 2**30, 819e9, 1600e9 / 8),
  'v5p': Chip(459e12, 95.0 * 2**30, 2765e9, 4800e9 / 8),
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

  def __add__(self, other: 'Traffic') -> 'Traffic':
    names = {*self.collectives, *other.collectives}
    return Traffic(
      self.memory + other.memory,
      {
        name: self.collectives.get(name, 0.0) + other.collectives.get(name, 0.0)
        for name in sorted(names)
      },
    )

  def times(self, count: int) -> 'Traffic':
    """The traffic of `count` runs."""
    return Traffic(
      self.memory * count,
      {name: count * size for name, size in self.collectives.items()},
    )


def ceiling(chip: Chip, num_flops: float, moved: Traffic) -> dict[str, float]:
  """Seconds that arithmetic, memory and interconnect each need at least.

  Args:
    chip: published figures.
    num_flops: of one chip.
    moved: by one chip.
  """
  return {
    'arithmetic': num_flops / chip.flops,
    'memory': moved.memory / chip.bandwidth,
    'interconnect': sum(moved.collectives.values()) / chip.interconnect,
  }


# --- Arithmetic ---------------------------------------------------------------


def flops(jaxpr, num_trips: int = 1) -> float:
  """Floating-point operations of all matrix products of a traced program.

  Of all chips together; recomputed activations count as often as they are
  computed. Everything else is a small part of a Transformer's arithmetic.

  Args:
    jaxpr: `jax.jit(f).trace(...).jaxpr`.
    num_trips: of a `while_loop`, whose trips are not known.
  """
  return _flops(getattr(jaxpr, 'jaxpr', jaxpr), num_trips)


def _flops(jaxpr, num_trips):
  total = 0.0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      left = equation.invars[0].aval.shape
      inner = math.prod(left[axis] for axis in contracted)
      total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
      continue
    if name == 'pallas_call':
      # Upper bound: tiles that the mask leaves out are counted.
      grid = math.prod(params['grid_mapping'].grid)
      total += grid * _flops(params['jaxpr'], num_trips)
      continue
    inner = [
      _flops(getattr(value, 'jaxpr', value), num_trips)
      for value in _programs_in(params)
    ]
    if name == 'scan':
      total += params['length'] * sum(inner)
    elif name == 'while':
      total += num_trips * sum(inner)
    elif name == 'cond':
      total += max(inner, default=0.0)
    elif name == 'shard_map':
      total += params['mesh'].size * sum(inner)
    elif name == 'custom_vjp_call':
      total += inner[0]
    else:
      total += sum(inner)
  return total


def _programs_in(params):
  for value in params.values():
    for each in value if isinstance(value, (tuple, list)) else (value,):
      if hasattr(each, 'eqns') or hasattr(each, 'jaxpr'):
        yield each


# --- HLO text -----------------------------------------------------------------

_BYTES = {
  'pred': 1,
  's8': 1,
  'u8': 1,
  's16': 2,
  'u16': 2,
  'bf16': 2,
  'f16': 2,
  's32': 4,
  'u32': 4,
  'f32': 4,
  's64': 8,
  'u64': 8,
  'f64': 8,
}
_FREE = {
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'after-all',
  'partition-id',
  'replica-id',
  'opt-barrier',
}
_ARRAY = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?')
_CALLED = re.compile(r'(calls|to_apply|body|condition)=%?([\w.\-]+)')


@dataclasses.dataclass
class _Instruction:
  name: str
  type: str
  opcode: str
  operands: list[str]
  text: str  # Operands of a constant or parameter as they are written.
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
    rest = re.sub(r'/\*.*?\*/', '', line[match.end() :])
    end = _closing(rest, 0) if rest[0] == '(' else rest.index(' ')
    result, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index('(')
    end = _closing(rest, opening)
    inside = rest[opening + 1 : end - 1]
    current.append(
      _Instruction(
        name=match[2],
        type=result,
        opcode=rest[:opening],
        operands=re.findall(r'%([\w.\-]+)', inside),
        text=inside,
        attributes=rest[end:],
        is_root=bool(match[1]),
      )
    )
  return computations, entry


def _size(type_text: str, on_chip: bool = False) -> float:
  """Bytes of a type; `S(1)` is on-chip memory, which costs no traffic."""
  total = 0.0
  for dtype, dims, layout in _ARRAY.findall(type_text):
    if dtype in _BYTES and (on_chip or 'S(1)' not in layout):
      total += _BYTES[dtype] * math.prod(int(d) for d in dims.split(',') if d)
  return total


def traffic(hlo_text: str, num_trips: int = 1) -> Traffic:
  """Bytes moved, from the text of an optimised program.

  Loops count as often as their condition says: `index < constant`. A fusion
  reads its operands and writes its result, but of an array that it only slices
  or updates it touches the slice.

  Args:
    hlo_text: `compiled.as_text()`.
    num_trips: of loops whose condition is none of that kind.
  """
  computations, entry = _parse(hlo_text)
  return _Reader(computations, num_trips).cost(entry)


class _Reader:
  """Adds up the instructions of computations, each computation once."""

  def __init__(self, computations, num_trips):
    self._computations = computations
    self._num_trips = num_trips
    self._known = {}

  def cost(self, name: str) -> Traffic:
    if name not in self._known:
      total = Traffic(0.0, {})
      instructions = self._computations.get(name, [])
      types = {i.name: i.type for i in instructions}
      for instruction in instructions:
        total += self._one(instruction, types)
      self._known[name] = total
    return self._known[name]

  def _one(self, instruction, types) -> Traffic:
    opcode = instruction.opcode
    called = dict(_CALLED.findall(instruction.attributes))
    if opcode in _FREE or opcode.endswith('-done'):
      return Traffic(0.0, {})
    if opcode == 'while':
      trips = self._trips(called['condition'])
      return self.cost(called['body']).times(trips)
    if opcode == 'conditional':
      names = re.findall(
        r'%([\w.\-]+)', instruction.attributes.split('meta')[0]
      )
      costs = [self.cost(n) for n in names if n in self._computations]
      return max(costs, key=lambda c: c.memory, default=Traffic(0.0, {}))
    if opcode in ('call', 'async-start'):
      return self.cost(called.get('to_apply') or called.get('calls', ''))
    kind = opcode.removesuffix('-start')
    if kind in COLLECTIVES:
      return Traffic(0.0, {kind: self._received(kind, instruction, types)})
    operands = [types.get(name, '') for name in instruction.operands]
    if opcode == 'fusion':
      inside = self._computations.get(called['calls'], [])
      received = Traffic(0.0, {})
      inner = {i.name: i.type for i in inside}
      is_scatter = any(i.opcode == 'dynamic-slice' for i in inside)
      for each in inside:
        kind = each.opcode.removesuffix('-start')
        if kind not in COLLECTIVES:
          continue
        size = self._received(kind, each, inner)
        if kind == 'all-reduce' and is_scatter:
          # An all-reduce of which each chip keeps its part.
          kind, size = 'reduce-scatter', size / 2
        received += Traffic(0.0, {kind: size})
      moved = _fusion_bytes(inside, operands, instruction.type)
      return received + Traffic(moved, {})
    if opcode == 'custom-call' and 'tpu_custom_call' not in (
      instruction.attributes
    ):
      return Traffic(0.0, {})
    if opcode in ('dynamic-slice', 'gather', 'slice'):
      return Traffic(2.0 * _size(instruction.type), {})
    if opcode == 'dynamic-update-slice':
      return Traffic(2.0 * _size(operands[1]), {})
    if opcode.endswith('-start'):
      # An asynchronous copy between memories: its first operand, once.
      return Traffic(float(_size(operands[0]) if operands else 0.0), {})
    moved = _size(instruction.type) + sum(map(_size, operands))
    return Traffic(float(moved), {})

  def _trips(self, condition: str) -> int:
    """N of `index < N`; `num_trips` where there is more to it."""
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
    return self._num_trips

  def _received(self, kind, instruction, types) -> float:
    """Bytes that reach one chip, all of them working round rings."""
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
  """Chips that one collective joins, from any of three notations."""
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
  """Instructions that read a value, looked at through bitcasts."""
  for instruction in inside:
    if name in instruction.operands:
      if instruction.opcode == 'bitcast':
        yield from _users(inside, instruction.name)
      else:
        yield instruction


def num_kernels(hlo_text: str) -> int:
  """Hand-written (Pallas) kernels in a program for TPUs."""
  return hlo_text.count('custom_call_target="tpu_custom_call"')


# --- Memory -------------------------------------------------------------------


def bytes_per_chip(tree) -> float:
  """Of a tree of sharded arrays or `ShapeDtypeStruct`s."""
  total = 0.0
  for leaf in jax.tree.leaves(tree):
    shape = leaf.sharding.shard_shape(leaf.shape)
    total += math.prod(shape) * leaf.dtype.itemsize
  return total
