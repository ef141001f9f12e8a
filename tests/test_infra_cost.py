"""What programs cost, read off jaxprs and HLO text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from instruct_jax.infra import cost, sharding

# A loop of five steps around a fusion that slices one layer of a stack, an
# update in place, one collective of each notation, and arrays on the chip.
HLO = """\
HloModule jit_f, is_scheduled=true

%fused_slice (param_0: f32[5,8,16], param_1: s32[]) -> f32[8,16] {
  %param_0 = f32[5,8,16]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %constant.9 = s32[] constant(0)
  %ds = f32[1,8,16]{2,1,0} dynamic-slice(%param_0, %param_1, %constant.9, \
/*index=3*/%constant.9), dynamic_slice_sizes={1,8,16}
  ROOT %bitcast.1 = f32[8,16]{1,0} bitcast(%ds)
}

%fused_update (param_0.1: f32[5,8,16], param_1.1: f32[1,8,16], p2: s32[]) -> \
f32[5,8,16] {
  %param_0.1 = f32[5,8,16]{2,1,0} parameter(0)
  %param_1.1 = f32[1,8,16]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %dus = f32[5,8,16]{2,1,0} dynamic-update-slice(%param_0.1, %param_1.1, \
%p2, %p2, %p2)
}

%body (state: (s32[], f32[5,8,16])) -> (s32[], f32[5,8,16]) {
  %state = (s32[], f32[5,8,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %stack = f32[5,8,16]{2,1,0} get-tuple-element(%state), index=1
  %layer = f32[8,16]{1,0} fusion(%stack, %i), kind=kLoop, calls=%fused_slice
  %whole = f32[8,64]{1,0} all-gather(%layer), replica_groups={{0,1,2,3}}, \
dimensions={1}
  %piece = f32[1,8,16]{2,1,0:T(8,128)S(1)} custom-call(%whole), \
custom_call_target="tpu_custom_call"
  %next = f32[5,8,16]{2,1,0} fusion(%stack, %piece, %i), kind=kLoop, \
calls=%fused_update
  ROOT %pair = (s32[], f32[5,8,16]{2,1,0}) tuple(%i, %next)
}

%condition (state.1: (s32[], f32[5,8,16])) -> pred[] {
  %state.1 = (s32[], f32[5,8,16]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %five), direction=LT
}

ENTRY %main (a: (s32[], f32[5,8,16])) -> f32[5,8,16] {
  %a = (s32[], f32[5,8,16]{2,1,0}) parameter(0)
  %loop = (s32[], f32[5,8,16]{2,1,0}) while(%a), condition=%condition, \
body=%body
  %out = f32[5,8,16]{2,1,0} get-tuple-element(%loop), index=1
  %sum = f32[5,8,16]{2,1,0} all-reduce(%out), \
replica_groups=mesh['x'=2,'y'=4] {'x'}, to_apply=%add
  %moved = f32[5,8,16]{2,1,0} collective-permute-start(%sum), \
source_target_pairs={{0,1},{1,0}}
  %done = f32[5,8,16]{2,1,0} collective-permute-done(%moved)
  ROOT %neg = f32[5,8,16]{2,1,0} negate(%done)
}
"""


def test_traffic_by_hand():
  moved = cost.traffic(HLO)
  layer, stack = 8 * 16 * 4, 5 * 8 * 16 * 4
  # A step: the slice is read (with its index, 4 bytes) and written; the kernel
  # reads the gathered rows and writes on the chip; the update reads and writes
  # a slice, not the stack, and reads its index.
  step = (2 * layer + 4) + 4 * layer + (2 * layer + 4)
  assert moved.memory == 5 * step + 2 * stack
  assert moved.collectives == {
    # Three other chips' pieces, five times.
    'all-gather': 5 * 3 * layer,
    # Out and back round a ring of two.
    'all-reduce': 2 * stack / 2,
    'collective-permute': stack,
  }
  assert cost.num_kernels(HLO) == 1


def test_a_loop_without_a_constant_end_counts_once():
  moved = cost.traffic(HLO.replace('direction=LT', 'direction=NE'))
  layer = 8 * 16 * 4
  assert moved.collectives['all-gather'] == 3 * layer


@pytest.mark.parametrize(
  ('attributes', 'size'),
  [
    ('replica_groups={{0,1,2,3},{4,5,6,7}}', 4),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 8),
    ('replica_groups=[2,16]<=[32]', 16),
    ('channel_id=1', 1),
  ],
)
def test_group_sizes(attributes, size):
  assert cost._group_size(attributes) == size


def test_flops_multiply_loops_out():
  def layer(x, w):
    return jnp.tanh(x @ w), None

  def f(x, stack):
    def loss(stack):
      y, _ = jax.lax.scan(jax.checkpoint(layer), x, stack)
      return jnp.sum(y)

    return jax.grad(loss)(stack)

  x, stack = jnp.ones((4, 8)), jnp.ones((6, 8, 8))
  jaxpr = jax.jit(f).trace(x, stack).jaxpr
  # 2 x 4 x 8 x 8 for each of: forward, again, and two in the backward pass.
  assert cost.flops(jaxpr) == 6 * 4 * (2 * 4 * 8 * 8)

  def g(x, w):
    return jax.lax.while_loop(
      lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] @ w), (0, x)
    )

  # How often is not known.
  jaxpr = jax.jit(g).trace(x, stack[0]).jaxpr
  assert cost.flops(jaxpr) == 2 * 4 * 8 * 8


def test_flops_leave_out_what_nothing_reads():
  @jax.custom_vjp
  def product(x, w):
    return x @ w

  def backward(kept, cotangent):
    x, w = kept
    return cotangent @ w.T, x.T @ cotangent

  product.defvjp(lambda x, w: (x @ w, (x, w)), backward)

  def loss(x, w):
    def step(x, _):
      return jnp.tanh(product(x, w)), None

    return jnp.sum(jax.lax.scan(step, x, None, 6)[0])

  x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
  jaxpr = jax.jit(jax.grad(loss)).trace(x, w).jaxpr
  # Forward and the gradient of x; that of w is written down and not read.
  assert cost.flops(jaxpr) == 6 * 2 * (2 * 4 * 8 * 8)


def test_a_real_program_on_eight_devices():
  mesh = sharding.make_mesh((1, 8, 1))

  def f(x, w):
    def step(x, w):
      return jnp.tanh(x @ w), None

    return jax.lax.scan(step, x, w)[0]

  x = jax.device_put(
    np.ones((64, 32), np.float32), sharding.batch_sharding(mesh)
  )
  w = jax.device_put(
    np.ones((3, 32, 32), np.float32), NamedSharding(mesh, P(None, 'fsdp'))
  )
  with sharding.use_mesh(mesh):
    text = jax.jit(f).lower(x, w).compile().as_text()
  moved = cost.traffic(text)
  # Three layers' weights reach every device, 7 of their 8 parts from others.
  assert moved.collectives['all-gather'] == 3 * 32 * 32 * 4 * 7 / 8
  assert moved.memory > 3 * 32 * 32 * 4
  assert cost.bytes_per_chip((x, w)) == 8 * 32 * 4 + 3 * 4 * 32 * 4


def test_the_ceiling_by_hand():
  chip = cost.Chip(flops=100.0, memory=1.0, bandwidth=10.0, interconnect=5.0)
  moved = cost.Traffic(40.0, {'all-gather': 10.0, 'all-reduce': 5.0})
  assert cost.ceiling(chip, 300.0, moved) == {
    'arithmetic': 3.0,
    'memory': 4.0,
    'interconnect': 3.0,
  }
