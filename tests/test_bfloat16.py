"""Each family in bfloat16 against itself in float32, to stated tolerances.

On one CPU device, where only the factors of products are bfloat16, and over
several, where activations are too, as on accelerators.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax import model_fns
from instruct_jax.infra import sharding
from instruct_jax.models import hf, products
from instruct_jax.models.config import TransformerConfig
from tests import test_models_hf as published
from tests import tiny

pytestmark = pytest.mark.usefixtures('quick_compile')

# bfloat16 has 8 bits, relative steps of 1/256. Family -> logits: share of their
# spread; log-probabilities: mean difference, nats; gradients: 1 - cosine, and
# share of their norm. About one and a half times what one device or eight
# differ by (no less than 0.001 and 0.005 for gradients). The weights are
# random, with logits much larger for some families than for others.
TOLERANCES = {
  'gemma': (0.025, 0.052, 0.004, 0.025),
  'gemma2': (0.012, 0.017, 0.001, 0.007),
  'gemma3': (0.010, 0.023, 0.001, 0.005),
  'gpt2': (0.014, 0.024, 0.001, 0.005),
  'gpt_neox': (0.010, 0.020, 0.001, 0.005),
  'gpt_neox_sequential': (0.013, 0.026, 0.001, 0.005),
  'gptj': (0.010, 0.018, 0.001, 0.005),
  'llama2': (0.033, 0.056, 0.010, 0.015),
  'llama3': (0.030, 0.047, 0.009, 0.025),
  'llama_dynamic': (0.028, 0.050, 0.006, 0.020),
  'llama_yarn': (0.031, 0.057, 0.028, 0.073),
  'mistral': (0.024, 0.039, 0.007, 0.006),
  'qwen2': (0.035, 0.074, 0.020, 0.063),
  'qwen3': (0.016, 0.027, 0.001, 0.005),
}


def measured(folder, tokens, dtype, num_devices):
  """(logits, log-probabilities, gradient) of a policy."""
  mesh = sharding.make_mesh((num_devices, 1, 1), jax.devices()[:num_devices])
  config = TransformerConfig.from_hf(hf.read_config(folder))
  config = dataclasses.replace(config, vocab_multiple=8, compute_dtype=dtype)
  segments = jnp.ones_like(tokens)
  with sharding.use_mesh(mesh):
    params = hf.load_params(
      folder, config, model_fns.abstract_params('policy', config, mesh)
    )
    module = model_fns.make_module('policy', config)
    logprobs_fn = model_fns.logprobs_fn(module)

    def loss(params):
      logprobs = logprobs_fn(params, tokens, segments)[0]
      return -jnp.mean(logprobs), logprobs

    tokens, segments = sharding.put_batch((tokens, segments), mesh)
    logits = jax.jit(module.apply)({'params': params}, tokens, segments)
    (_, logprobs), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
      params
    )
  return jax.device_get((logits, logprobs, gradient))


def flat(tree):
  """All leaves as one float64 vector."""
  leaves = jax.tree.leaves(tree)
  return np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves])


# Between them all that a layer may have.
QUICK = ('gpt2', 'gpt_neox', 'gptj', 'gemma3', 'qwen3')
CASES = [
  pytest.param(
    name,
    num_devices,
    marks=[pytest.mark.slow] * (num_devices == 8 or name not in QUICK),
  )
  for name in published.FAMILIES
  for num_devices in (1, 8)
]


@pytest.mark.parametrize('name, num_devices', CASES)
def test_a_family_in_bfloat16(name, num_devices, tmp_path):
  golden = published.write_folder(tmp_path / name, name)
  V = golden['logits'].shape[-1]
  config = TransformerConfig.from_hf(hf.read_config(tmp_path / name))
  tokens = np.random.default_rng(0).integers(
    0, V, (8, min(24, config.context_length))
  )
  tokens = jnp.asarray(tokens, jnp.int32)
  exact, rough = (
    measured(tmp_path / name, tokens, dtype, num_devices)
    for dtype in ('float32', 'bfloat16')
  )
  most_logits, most_logprobs, most_cosine, most_norm = TOLERANCES[name]
  logits = [found[0][..., :V] for found in (exact, rough)]
  error = np.abs(logits[1] - logits[0]).mean()
  assert error < most_logits * np.std(logits[0])
  difference = np.abs(rough[1] - exact[1]).mean()
  assert 0 < difference < most_logprobs
  a, b = flat(exact[2]), flat(rough[2])
  norms = np.linalg.norm(a), np.linalg.norm(b)
  assert 1 - a @ b / (norms[0] * norms[1]) < most_cosine
  assert abs(norms[1] / norms[0] - 1) < most_norm


def test_a_step_reads_the_cache_as_it_is():
  """XLA would turn a cache into bfloat16 and back for each step's product."""
  config = dataclasses.replace(tiny.CONFIG, compute_dtype='bfloat16')
  decoder = model_fns.decoder(model_fns.make_module('policy', config))
  num_slots, num_columns = 3, 11
  cache = decoder.make_cache(num_slots, num_columns)
  row = jnp.zeros(num_slots, jnp.int32)

  def step(params, row, cache):
    return decoder.step(decoder.prepare(params), row, row, cache)

  program = jax.jit(step).lower(tiny.params('policy'), row, cache).compile()
  text = program.as_text()
  shapes = {','.join(map(str, x.shape)) for x in jax.tree.leaves(cache)}
  assert all(f'f32[{shape}]' in text for shape in shapes)
  assert not any(f'bf16[{shape}]' in text for shape in shapes)


def test_a_product_with_rounded_numbers_is_the_product(rng):
  x, y = (
    jnp.asarray(rng.normal(size=(2, 3, size, 8)), jnp.float32)
    for size in (1, 7)
  )
  spec = 'bnth,bnsh->bnts'
  expected = products.product(spec, x, y, 'bfloat16')
  y = products.rounded(y, 'bfloat16')
  ours = products.product_with_rounded(spec, x, y, 'bfloat16')
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
  # Closer to it than to the product of unrounded numbers.
  exact = products.product(spec, x, y, 'float32')
  assert np.abs(exact - expected).max() > 1e-3
