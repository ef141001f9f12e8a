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
from instruct_jax.models import hf
from instruct_jax.models.config import TransformerConfig
from tests import test_models_hf as published

pytestmark = pytest.mark.usefixtures('quick_compile')

# bfloat16 has 8 bits, relative steps of 1/256. Logits: share of their spread.
# Log-probabilities: mean difference, nats. Gradients: 1 - cosine, and share of
# their norm. About one and a half times the most that any family differs: on
# one device 0.017, 0.035, 0.018 and 0.048, on eight 0.023, 0.049, 0.013, 0.043.
TOLERANCES = {
  1: {'logits': 0.025, 'logprobs': 0.05, 'cosine': 0.03, 'norm': 0.07},
  8: {'logits': 0.035, 'logprobs': 0.075, 'cosine': 0.03, 'norm': 0.07},
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
  most = TOLERANCES[num_devices]
  logits = [found[0][..., :V] for found in (exact, rough)]
  error = np.abs(logits[1] - logits[0]).mean()
  assert error < most['logits'] * np.std(logits[0])
  difference = np.abs(rough[1] - exact[1]).mean()
  assert 0 < difference < most['logprobs']
  a, b = flat(exact[2]), flat(rough[2])
  norms = np.linalg.norm(a), np.linalg.norm(b)
  assert 1 - a @ b / (norms[0] * norms[1]) < most['cosine']
  assert abs(norms[1] / norms[0] - 1) < most['norm']
