"""Tiny models, batches and programs that several test files share.

Whatever is jitted here is compiled once per shape in a test run, so the files
keep to one shape: B = 16 rows of P = 6 prompt and R = 10 response columns.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from instruct_jax import (
  model_fns,
  model_folder,
  packing,
  ppo,
  rewards,
  rollout,
  score_fns,
  supervised,
)
from instruct_jax.infra import run, sharding, train_state
from instruct_jax.jobs import evaluate
from instruct_jax.models import heads
from instruct_jax.models.config import TransformerConfig
from instruct_jax.types import Episodes, PromptBatch, TextBatch

B, P, R = 16, 6, 10
T = P + R
PAD, EOS = 0, 1
# Two stop tokens, so that a good part of the responses ends on its own.
STOPS = (EOS, 7)
TEMPERATURE = 0.7
# 30 tokens in 32 embedding rows: two rows can never be sampled.
CONFIG = TransformerConfig(
  vocab_size=30,
  context_length=24,
  num_layers=2,
  width=16,
  num_heads=4,
  head_dim=4,
  mlp_dim=32,
  vocab_multiple=8,
)
POLICY = model_fns.make_module('policy', CONFIG)
SCALAR = model_fns.make_module('scalar', CONFIG)


def save_model(root, name, kind, tokenizer, seed, context_length=64):
  """A model folder with weights far from a fresh model's."""
  config = TransformerConfig(
    vocab_size=tokenizer.vocab_size,
    context_length=context_length,
    num_layers=1,
    width=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    vocab_multiple=8,
  )
  model = model_fns.init(kind, config, one_device(), jax.random.key(seed))
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda x: jnp.asarray(x + rng.normal(0, 0.3, x.shape), jnp.float32),
    model.params,
  )
  model_folder.save(
    root / name,
    model_fns.Model(kind, model.module, params, {}),
    tokenizer,
    {},
  )


def run_evaluation(config):
  """`jobs/evaluate.py` in the folder that `main` would have made ready."""
  workdir = epath.Path(config.workdir)
  run.write_json(
    workdir / 'provenance.json',
    {'command': 'a command', 'commit': None, 'versions': {'jax': '1'}},
  )
  return evaluate.run(config, workdir)


def one_device():
  return sharding.make_mesh((1, 1, 1), jax.devices()[:1])


@functools.cache
def params(kind: str, seed: int = 0):
  """Parameters far from a fresh model's, so that everything matters: with
  GPT-2's small initial weights a wrong position would change next to nothing.
  """
  rng = np.random.default_rng(seed)

  def leaf(path, x):
    scale = 1.0 if 'scale' in jax.tree_util.keystr(path) else 0.0
    return jnp.asarray(scale + rng.normal(0, 0.35, x.shape), jnp.float32)

  abstract = model_fns.abstract_params(kind, CONFIG, one_device())
  return jax.tree_util.tree_map_with_path(leaf, abstract)


def prompts(seed: int = 0) -> PromptBatch:
  """Ragged prompts, padded on the left; the first is full, the last one token
  long."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, P + 1, B)
  lengths[0], lengths[-1] = P, 1
  mask = np.arange(P)[None] >= P - lengths[:, None]
  tokens = np.where(mask, rng.integers(2, 30, (B, P)), PAD).astype(np.int32)
  return PromptBatch(tokens, mask, np.arange(100, 100 + B, dtype=np.int32))


def text(seed: int = 0, rows: int = B) -> TextBatch:
  """Rows of two packed documents each and some padding."""
  rng = np.random.default_rng(seed)
  first = rng.integers(2, 8, rows)[:, None]
  last = rng.integers(9, T + 1, rows)[:, None]
  columns = np.arange(T)[None]
  segments = np.where(columns < first, 1, np.where(columns < last, 2, 0))
  starts = (columns == 0) | (columns == first)
  mask = segments > 0
  tokens = np.where(mask, rng.integers(2, 30, (rows, T)), PAD)
  return TextBatch(
    tokens.astype(np.int32), mask, mask & ~starts, segments.astype(np.int32)
  )


def as_rows(rollout) -> Episodes:
  """A rollout as it is: each episode in its own row."""
  B, R = rollout.response_mask.shape
  P = rollout.tokens.shape[1] - R
  # Response token t is in column P + t.
  where = jnp.broadcast_to(P - 1 + jnp.arange(R, dtype=jnp.int32)[None], (B, R))
  return Episodes(
    tokens=rollout.tokens,
    segments=rollout.mask.astype(jnp.int32),
    where=where,
    response_mask=rollout.response_mask,
  )


# --- Programs -----------------------------------------------------------------


@jax.jit
def forward(policy, scalar, tokens, segments):
  """Everything the two models say about [B, T] rows."""
  mask = segments > 0
  where = jnp.broadcast_to(P - 1 + jnp.arange(R)[None], (tokens.shape[0], R))
  logprobs, entropies = model_fns.logprobs_fn(POLICY, TEMPERATURE)(
    policy, tokens, mask.astype(jnp.int32), where
  )
  return {
    'logits': POLICY.apply({'params': policy}, tokens, segments),
    'text_logprobs': model_fns.logprobs_fn(POLICY)(policy, tokens, segments)[0],
    'logprobs': logprobs,
    'entropies': entropies,
    'scalars': model_fns.scalars_fn(SCALAR)(scalar, tokens, mask),
    # The scalar trunk on packed rows, which its public call does not take.
    'hidden': SCALAR.apply(
      {'params': scalar},
      tokens,
      segments,
      method=lambda model, tokens, segments: model.trunk(tokens, segments)[0],
    ),
  }


def extend(params, tokens, mask, cache):
  """A `simple_rollout.ExtendFn`: the cache is all tokens so far, and every
  step reads all of them as training does."""
  kept, kept_mask, length = cache
  kept = jax.lax.dynamic_update_slice(kept, tokens, (0, length))
  kept_mask = jax.lax.dynamic_update_slice(kept_mask, mask, (0, length))
  length += tokens.shape[1]
  logits = POLICY.apply({'params': params}, kept, kept_mask.astype(jnp.int32))
  logits = jax.lax.dynamic_index_in_dim(logits, length - 1, 1, keepdims=False)
  return logits, (kept, kept_mask, length)


def make_extend_cache(batch, columns):
  """An empty cache of `extend`."""
  empty = jnp.zeros((batch, columns), jnp.int32)
  return empty, empty > 0, jnp.zeros((), jnp.int32)


generate = jax.jit(
  functools.partial(
    rollout.generate,
    decoder=model_fns.decoder(POLICY),
    num_response=R,
    stop_ids=STOPS,
    temperature=TEMPERATURE,
  )
)

METHOD = ppo.PPOConfig(
  ptx_coef=2.0,
  num_minibatches=2,
  sampler_tolerance=0.0,
  kl_target=1.0,
  kl_horizon=100,
)


def lengths_of(rollout) -> tuple[np.ndarray, np.ndarray]:
  """Tokens of each prompt and response, on the host."""
  mask, response_mask = jax.device_get((rollout.mask, rollout.response_mask))
  responses = response_mask.sum(axis=1)
  return mask.sum(axis=1) - responses, responses


def lay_out(rollout, groups=None, *, seed=(0,), **changes) -> packing.Layout:
  """A layout of a rollout; by default each episode alone in its row.

  Args:
    rollout: [B, T].
    groups: which episodes go into which step; None deals them out.
    seed: of the deal.
    **changes: fields of `packing.Sizes`.
  """
  num_responses = rollout.response_mask.shape[1]
  sizes = packing.Sizes(
    **{
      'prompt_columns': rollout.tokens.shape[1] - num_responses,
      'response_columns': num_responses,
      'num_minibatches': METHOD.num_minibatches,
      'num_microbatches': 1,
      'num_epochs': 1,
      'num_shards': 1,
      'row_episodes': 0,
      'multiple': 8,
      'spare': 1.1,
    }
    | changes
  )
  prompts, responses = lengths_of(rollout)
  if groups is None:
    groups = packing.deal_epochs(prompts + responses, sizes, seed)
  return packing.lay_out(prompts, responses, groups, sizes)


def adam(rate: float) -> optax.GradientTransformation:
  return optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.95, eps=1e-5)
  )


POLICY_ADAM, VALUE_ADAM = adam(3e-3), adam(1e-2)


def ppo_state() -> ppo.RLState:
  """Before the first update: EMA and reference are the policy itself."""
  policy, value = params('policy'), params('scalar', 2)
  return ppo.RLState(
    policy=train_state.create(policy, POLICY_ADAM),
    value=train_state.create(value, VALUE_ADAM),
    ema=policy,
    kl=rewards.KLState(coef=jnp.float32(0.1)),
  )


LOGPROBS_FN = model_fns.logprobs_fn(POLICY, TEMPERATURE, T)
SCALARS_FN = model_fns.scalars_fn(SCALAR, T)
score = jax.jit(
  score_fns.reward_program(
    SCALARS_FN, functools.partial(heads.read_scores, SCALAR), 1
  )
)
penalise = jax.jit(
  ppo.make_penalise(LOGPROBS_FN, SCALARS_FN, ppo.gae_advantages(METHOD), METHOD)
)
train = jax.jit(
  ppo.make_train(
    {
      'policy': ppo.make_policy_loss(LOGPROBS_FN, METHOD),
      'value': ppo.make_value_loss(SCALARS_FN, METHOD),
      'ptx': supervised.make_text_loss(model_fns.logprobs_fn(POLICY)),
    },
    {'policy': POLICY_ADAM, 'value': VALUE_ADAM},
    METHOD,
  )
)


def assert_trees_close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def assert_trees_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)
