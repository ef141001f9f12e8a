"""Models in memory: how they are created, and as functions for the method."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from instruct_jax import lora
from instruct_jax.infra import sharding, train_state
from instruct_jax.models import decoding, heads
from instruct_jax.models.config import Lora, TransformerConfig
from instruct_jax.types import Decoder, Key, LogprobsFn, Params, ScalarsFn

KINDS = {'policy': heads.Policy, 'scalar': heads.ScalarModel}


@dataclasses.dataclass(frozen=True)
class Model:
  """A module with its parameters on a mesh.

  Attributes:
    kind: 'policy' (tokens) or 'scalar' (reward and value models).
    module: pure Linen module of that kind.
    params: float32, sharded; with a base, only the trained parameters.
    metadata: JSON values that are saved with the parameters.
    source: folder of the parameters, or of the base; '' if there is none.
    base: frozen weights under adapters, or None.
  """

  kind: str
  module: heads.Policy | heads.ScalarModel
  params: Params
  metadata: dict[str, Any]
  source: str = ''
  base: Params | None = None

  @property
  def config(self) -> TransformerConfig:
    """The module's shape and arithmetic."""
    return self.module.config


def make_module(
  kind: str, config: TransformerConfig, **attributes: Any
) -> heads.Policy | heads.ScalarModel:
  """The module of a kind; `attributes` are other fields of the module."""
  if kind not in KINDS:
    raise ValueError(f'kind must be one of {sorted(KINDS)}: {kind!r}')
  return KINDS[kind](config, **attributes)


def _init_fn(module):
  """Returns key -> boxed params, whose shapes do not depend on the tokens."""

  def init(key):
    ones = jnp.ones((1, 2), jnp.int32)
    return module.init(key, ones, ones)['params']

  return init


def abstract_params(
  kind: str, config: TransformerConfig, mesh: jax.sharding.Mesh
) -> Params:
  """Shapes, dtypes and shardings of a model's parameters; computes nothing.

  Raises:
    ValueError: the mesh does not divide an axis; with names and numbers.
  """
  boxed = jax.eval_shape(_init_fn(make_module(kind, config)), jax.random.key(0))
  shardings = sharding.param_shardings(boxed, mesh)
  return sharding.with_shardings(sharding.unbox(boxed), shardings)


def abstract_state(
  kind: str,
  config: TransformerConfig,
  mesh: jax.sharding.Mesh,
  optimizer: optax.GradientTransformation,
) -> tuple[train_state.TrainState, Params | None]:
  """Shapes, dtypes and shardings of a train state; computes nothing.

  Returns:
    (train state, base): with `config.lora` the state holds adapters and heads,
    and the base all other weights; otherwise the base is None.
  """
  init_fn = _init_fn(make_module(kind, config))
  base = None
  if config.lora is not None:
    _, base = lora.split(abstract_params(kind, config, mesh))
  state = train_state.abstract_state(
    init_fn if base is None else lambda key: lora.split(init_fn(key))[0],
    optimizer,
    mesh,
  )
  return state, base


def init(
  kind: str, config: TransformerConfig, mesh: jax.sharding.Mesh, key: Key
) -> Model:
  """A freshly initialised model, created shard by shard."""
  module = make_module(kind, config)
  shardings = sharding.shardings_of(abstract_params(kind, config, mesh))
  init_fn = _init_fn(module)
  params = jax.jit(
    lambda key: sharding.unbox(init_fn(key)), out_shardings=shardings
  )(key)
  return Model(kind, module, params, {})


def scalar_from_policy(
  policy: Model, mesh: jax.sharding.Mesh, key: Key
) -> Model:
  """A reward model with a copy of the policy's trunk and a fresh head.

  Paper 3.5; Stiennon et al. B.1.
  """
  fresh = init('scalar', policy.config, mesh, key)
  trunk = jax.tree.map(jnp.copy, without_unembedding(policy.params['trunk']))
  return dataclasses.replace(
    fresh, params={**fresh.params, 'trunk': trunk}, source=policy.source
  )


def without_unembedding(trunk: Params) -> Params:
  """The part of a policy's trunk that a scalar model has, too."""
  return {
    name: x for name, x in trunk.items() if not name.startswith('unembedding')
  }


def adapted(
  model: Model, adapters: Lora | None, mesh: jax.sharding.Mesh, seed: int
) -> Model:
  """Adds fresh adapters on a frozen base; the outputs stay the same.

  The result's `params` are the adapters and a scalar model's head. All other
  parameters become the `base`, without a copy.

  Args:
    model: without adapters.
    adapters: None returns the model unchanged, to be trained as a whole.
    seed: the stage's seed, from which the factors A are drawn.

  Raises:
    ValueError: a target that the model does not have.
  """
  if adapters is None:
    return model
  config = dataclasses.replace(model.config, lora=adapters)
  module = model.module.clone(config=config)
  abstract, _ = lora.split(abstract_params(model.kind, config, mesh))
  init_fn = _init_fn(module)
  # Steps and heads fold smaller numbers into the seed's key, so none collides.
  number = 2**32 - 1 - list(KINDS).index(model.kind)
  key = jax.random.fold_in(jax.random.key(seed), number)
  fresh = jax.jit(
    lambda key: lora.split(sharding.unbox(init_fn(key)))[0],
    out_shardings=sharding.shardings_of(abstract),
  )(key)
  head, base = lora.split(model.params)
  return dataclasses.replace(
    model, module=module, params={**fresh, **head}, base=base
  )


def merged(model: Model, mesh: jax.sharding.Mesh) -> Model:
  """Merges adapters into a plain model; the base's buffers are donated."""
  config = dataclasses.replace(model.config, lora=None)
  scale = model.config.lora.scale
  plain = abstract_params(model.kind, config, mesh)
  merge = jax.jit(
    lambda base, trained: lora.merge(lora.join(trained, base), scale),
    donate_argnums=0,
    out_shardings=sharding.shardings_of(plain),
  )
  return dataclasses.replace(
    model,
    module=model.module.clone(config=config),
    params=merge(model.base, model.params),
    base=None,
  )


def check_context(model: Model, num_tokens: int, what: str) -> None:
  """Refuses rows that exceed the model's context.

  Raises:
    ValueError: with the numbers and `what`, the config keys that set them.
  """
  more = 0
  if model.kind == 'scalar':
    more = max(len(model.module.end_ids) - 1, 0)
  if num_tokens + more > model.config.context_length:
    behind = f' and {more} after an answer' if more else ''
    raise ValueError(
      f'{what} ask for {num_tokens} tokens{behind}, but the model from '
      f'{model.source} has a context of {model.config.context_length}; lower '
      'them'
    )


# --- A model as functions for the method --------------------------------------


def decoder(module: heads.Policy, gather_weights: bool = True) -> Decoder:
  """A policy as the functions of `rollout.generate`.

  Args:
    gather_weights: gather the weights over `fsdp` once per rollout, in the
      compute dtype. Otherwise they are gathered again for every token, which is
      slower but needs less memory.
  """
  config = dataclasses.replace(module.config, lora=None)
  # The key is abstract too, since the current mesh may be.
  boxed = jax.eval_shape(
    lambda: _init_fn(make_module('policy', config))(jax.random.key(0))
  )
  kept = {'embed': None} if gather_weights else {}

  def lay_out(leaf, x):
    return sharding.constrain(x, *(kept.get(n, n) for n in leaf.names))

  def prepare(params):
    plain = params
    if module.config.lora is not None:
      plain = lora.merge(params, module.config.lora.scale)
    laid_out, cast = (
      jax.tree.map(
        lay_out, boxed, tree, is_leaf=lambda x: isinstance(x, nn.Partitioned)
      )
      for tree in (plain, decoding.in_compute_dtype(config, plain))
    )
    # Prompts are read with the sharded layers, gathered one at a time, and with
    # unmerged adapters, since a merged copy would take memory.
    trunk = {**laid_out['trunk'], 'layers': params['trunk']['layers']}
    return decoding.weights_of(config, {'trunk': trunk}, cast)

  def make_cache(num_slots, num_columns):
    return jax.tree.map(
      lambda x: sharding.constrain(x, 'batch', 'kv_heads', None, None),
      decoding.make_cache(module.config, num_slots, num_columns),
    )

  return Decoder(
    prepare=prepare,
    make_cache=make_cache,
    read=functools.partial(decoding.read, module),
    step=functools.partial(decoding.step, module),
  )


def logprobs_fn(
  module: heads.Policy, temperature: float = 1.0, longest: int = 0
) -> LogprobsFn:
  """A policy as `types.LogprobsFn`; see `heads.Policy.logprobs`."""

  def logprobs(params, tokens, segments, where=None, dropout_key=None):
    return module.apply(
      {'params': params},
      tokens,
      segments,
      where,
      temperature=temperature,
      longest=longest,
      deterministic=dropout_key is None,
      method='logprobs',
      rngs=None if dropout_key is None else {'dropout': dropout_key},
    )

  return logprobs


def scalars_fn(module: heads.ScalarModel, longest: int = 0) -> ScalarsFn:
  """A reward or value model as `types.ScalarsFn`; see `heads.ScalarModel`."""
  return lambda params, tokens, segments: module.apply(
    {'params': params}, tokens, segments, longest
  )


def scores_fn(module: heads.ScalarModel):
  """Returns (params, tokens, segments, ends=None) -> `heads.read_scores`.

  Without `ends`, each row is one sequence and is extended by `heads.with_ends`.
  """
  scalars = scalars_fn(module)

  def scores(params, tokens, segments, ends=None):
    if ends is None:
      tokens, segments = heads.with_ends(module, tokens, segments > 0)
    return heads.read_scores(
      module, scalars(params, tokens, segments), tokens, segments, ends
    )

  return scores
