"""PPO and PPO-ptx against a reward model (paper 3.5, C.4).

  respond -> score -> penalise -> train

One iteration samples responses to a batch of prompts, scores them, subtracts
the per-token KL penalty, estimates advantages, and makes `num_epochs` passes of
minibatch updates, each of which adds gamma times the gradient on pretraining
text. `ptx_coef = 0` is PPO.

The policy starts from the RL initialisation, which is also the KL reference.
The value model starts from the reward model, including its head, or from the
policy's trunk (`value_from`, or if only a Python function `reward_fn` scores).
"""

import functools

import jax
from etils import epath

from instruct_jax import (
  lora,
  model_fns,
  ppo,
  rl,
  rollout,
  supervised,
)
from instruct_jax.data import loader
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import loop, sharding

PROCESSES = 'all'

validate = rl.validate
inputs = rl.inputs


def build_programs(config, policy, value, stop_ids, reward=None):
  """The jitted programs of one iteration.

  Args:
    policy, value, reward: pure modules; `reward` defaults to `value`.
  """
  method = rl.method_of(config)
  longest = config.prompt_length + config.response_length
  logprobs_fn = model_fns.logprobs_fn(policy, config.temperature, longest)
  values_fn = model_fns.scalars_fn(value, longest)
  penalise = ppo.make_penalise(
    logprobs_fn, values_fn, ppo.gae_advantages(method), method
  )
  loss_fns = {
    'policy': ppo.make_policy_loss(logprobs_fn, method),
    'value': ppo.make_value_loss(values_fn, method),
    'ptx': supervised.make_text_loss(model_fns.logprobs_fn(policy)),
  }
  train = ppo.make_train(loss_fns, rl.make_optimizers(config), method)
  return {
    'respond': jax.jit(rl.make_respond(config, policy, stop_ids)),
    'lengths': jax.jit(rollout.episode_lengths),
    'score': jax.jit(rl.make_score(config, reward or value)),
    'penalise': jax.jit(penalise),
    'train': jax.jit(train, donate_argnums=0),
  }


def run(config, workdir: epath.Path):
  """Trains a policy; see the top of this file.

  Reads the initialisation, the reward model, prompts and pretraining text;
  writes `policy` and `ema` (model folders), metrics, alarms.json, snapshots.
  """
  validate(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  mesh = rl.make_mesh(config, tokenizer)
  data = rl.read_data(config, tokenizer)
  with sharding.use_mesh(mesh):
    policy, reward = rl.load_models(config, tokenizer, mesh)
    value = rl.value_model(config, policy, reward, mesh)
    policy, value = rl.add_adapters(config, mesh, policy, value)
    programs = build_programs(
      config, policy.module, value.module, tokenizer.stop_ids,
      reward and reward.module,
    )  # fmt: skip
    state = rl.initial_state(config, policy.params, value.params)
    # Adapters start as zero changes, so their base is the reference.
    models = {'reference': policy.base or policy.params}
    if reward is not None:
      models['reward'] = reward.params
    bases = {'policy': policy.base, 'value': value.base}
    frozen = rl.Frozen(config, models, bases)
    evaluate = rl.make_evaluate(config, policy.module, tokenizer, mesh, data)
    outputs = rl.Outputs(config, workdir, policy, tokenizer, reward)
    # Frees these weights: the state and `frozen` have their own.
    del policy, reward, value, models, bases

    with loop.Loop(
      workdir,
      config.name,
      rl.num_iterations(config),
      log_every=1,
      checkpoint_every=config.checkpoint_every,
      **config.loop,
    ) as iterations:
      programs = iterations.watched(programs)
      score_fn = rl.make_score_fn(
        config, programs, frozen, data.prompts, tokenizer, mesh
      )
      state = iterations.restore(sharding.place(state, mesh))
      root = jax.random.key(config.seed)
      whole = functools.partial(lora.join, base=frozen.bases['policy'])
      for iteration, (prompts, ptx) in iterations.steps_with(
        loader.ahead(data.batches)
      ):
        keys = jax.random.split(jax.random.fold_in(root, iteration))
        keys = dict(zip(('respond', 'train'), keys, strict=True))
        values = {}
        if iteration == 0:
          values = evaluate(0, whole(state.policy.params), whole(state.ema))

        # Respond.
        state = state.replace(ema=frozen.store('ema', state.ema))
        responses = programs['respond'](
          whole(state.policy.params),
          sharding.put_batch(prompts, mesh),
          keys['respond'],
        )
        layout = rl.lay_out(config, programs, responses, mesh, iteration)
        # Score.
        scores = score_fn(rl.sampled_of(config, responses, layout, prompts))
        # Penalise.
        batch, kl, objective = programs['penalise'](
          state.replace(ema=None),
          {'reference': frozen['reference'], **frozen.bases},
          responses,
          layout,
          scores,
        )
        # Train.
        state, metrics = programs['train'](
          state.replace(ema=frozen.load('ema', state.ema)),
          frozen.bases,
          batch,
          sharding.put_batch(ptx, mesh),
          kl,
          keys['train'],
        )

        done = iteration + 1
        values |= evaluate(done, whole(state.policy.params), whole(state.ema))
        outputs.snapshot(done, state.policy.params)
        iterations.end_step(
          iteration,
          state,
          {**objective, **metrics},
          states=rl.in_training(config, state),
          values=values,
          num_items=config.batch_size,
          text_fn=rl.summary,
        )
        outputs.tell_alarms(iterations.lines)
      lines = iterations.lines
    return outputs.finish(state.policy.params, state.ema, lines, data)
