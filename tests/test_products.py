"""Matrix products in bfloat16 with float32 sums, against float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.models import products
from instruct_jax.models.transformer import dense, kernel_on_the_left

# Spec, and the axes' sizes; one row or one column too.
CASES = [
  ('mk,kn->mn', dict(m=48, k=40, n=24)),
  ('mk,kn->mn', dict(m=1, k=40, n=24)),
  ('mk,kn->mn', dict(m=300, k=128, n=1)),
  ('mk,kn->mn', dict(m=5, k=1, n=7)),
  ('md,vd->mv', dict(m=33, d=64, v=257)),
  ('nk,km->nm', dict(m=16, k=64, n=130)),
  ('bnth,bnsh->bnts', dict(b=2, n=3, t=17, s=19, h=8)),
  ('bnts,bnsh->bnth', dict(b=2, n=3, t=17, s=19, h=8)),
  ('bnts,bnsh->bnth', dict(b=1, n=1, t=1, s=1, h=8)),
]


def factors(spec, sizes, dtype='bfloat16'):
  keys = jax.random.split(jax.random.key(0))
  terms = spec.split('->')[0].split(',')
  return [
    jax.random.normal(key, [sizes[axis] for axis in term]).astype(dtype)
    for key, term in zip(keys, terms, strict=True)
  ]


@pytest.mark.parametrize('spec, sizes', CASES)
@pytest.mark.parametrize('in_program', [False, True])
def test_values_and_gradients_are_those_of_float32_sums(
  spec, sizes, in_program
):
  x, y = factors(spec, sizes)
  y = y.astype(jnp.float32)  # As parameters are.
  out = products.product(spec, x, y, 'bfloat16')
  weights = jax.random.normal(jax.random.key(1), out.shape)

  def loss(x, y):
    return (products.product(spec, x, y, 'bfloat16') * weights).sum()

  gradient = jax.grad(loss, (0, 1))
  got = (jax.jit(gradient) if in_program else gradient)(x, y)
  assert out.dtype == jnp.float32
  assert [g.dtype for g in got] == [jnp.bfloat16, jnp.float32]
  left, right, result = spec.replace('->', ',').split(',')
  exact = [np.asarray(a, np.float64) for a in (x, y)]
  np.testing.assert_allclose(out, np.einsum(spec, *exact), atol=1e-4)
  cotangent = np.asarray(weights.astype(jnp.bfloat16), np.float64)
  dx = np.einsum(f'{result},{right}->{left}', cotangent, exact[1])
  dy = np.einsum(f'{left},{result}->{right}', exact[0], cotangent)
  # Half a unit of bfloat16's last bit, then float32 sums.
  np.testing.assert_allclose(
    np.asarray(got[0], np.float64), dx, rtol=2**-8, atol=1e-4
  )
  np.testing.assert_allclose(got[1], dy, atol=2e-4)


@pytest.mark.parametrize('spec, sizes', CASES)
def test_float32_and_several_devices_take_einsum(spec, sizes):
  x, y = factors(spec, sizes, 'float32')
  np.testing.assert_array_equal(
    products.product(spec, x, y, 'float32'), jnp.einsum(spec, x, y)
  )
  mesh = jax.make_mesh((len(jax.devices()),), ('data',))
  with jax.set_mesh(mesh):
    assert products.activation_dtype('bfloat16') == jnp.bfloat16


@pytest.mark.parametrize('spec, sizes', CASES)
def test_gradients_of_weights_are_not_rounded_over_several_devices(spec, sizes):
  """As on accelerators: all factors are bfloat16, activations stay it."""
  x, y = factors(spec, sizes)
  y = y.astype(jnp.float32)
  with jax.set_mesh(jax.make_mesh((len(jax.devices()),), ('data',))):
    out = products.product(spec, x, y, 'bfloat16')
    weights = jax.random.normal(jax.random.key(1), out.shape)

    def loss(x, y):
      out = products.product(spec, x, y, 'bfloat16', 'float32')
      return (out * weights).sum()

    gradient = jax.grad(loss, (0, 1))
    got = gradient(x, y)
    whole = jax.jit(jax.value_and_grad(loss, (0, 1)))
    program = whole.lower(x, y).as_text()
  assert out.dtype == jnp.bfloat16
  assert [g.dtype for g in got] == [jnp.bfloat16, jnp.float32]
  types = [
    tuple(re.findall(r'x(bf16|f32)>', line.rpartition(' : ')[2]))
    for line in program.splitlines()
    if 'dot_general' in line
  ]
  # Forward, and the gradients of activations and of weights.
  wanted = [('bf16', 'bf16', out) for out in ('f32', 'bf16', 'f32')]
  assert sorted(types) == sorted(wanted)
  left, right, result = spec.replace('->', ',').split(',')
  exact = [np.asarray(a, np.float64) for a in (x, weights.astype('bfloat16'))]
  dy = np.einsum(f'{left},{result}->{right}', *exact)
  np.testing.assert_allclose(got[1], dy, atol=2e-4)


def test_the_kernel_on_the_left_gives_the_same():
  x, kernel = factors('mk,nk->mn', dict(m=16, k=64, n=130))
  want = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
  got = jax.jit(kernel_on_the_left, static_argnums=2)(x, kernel, 'bfloat16')
  np.testing.assert_allclose(got, want, atol=1e-4)
  stepped = dense(x[:, None], kernel.T, None, 'bfloat16', kernel_first=True)
  assert stepped.dtype == jnp.float32 and stepped.shape == (16, 1, 130)
  np.testing.assert_allclose(stepped[:, 0], want, atol=1e-4)
