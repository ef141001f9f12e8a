"""InstructGPT (Ouyang et al. 2022, arXiv 2203.02155), end to end.

  python -m instruct_jax.main --config=configs/ppo_ptx.py

The default runs the whole recipe on the embedded world; README.md has its time
and figures. Other variants, after a colon:

  smoke           the same in under 90 seconds, for CI; figures mean nothing
  e2e             real human rankings (--config.data.root=DIR)
  1p3b 6b 175b    the RL stage alone at the paper's sizes (C.4)
  gpt2            the RL stage alone for published models of GPT-2's size
                  (--config.init=hf:FOLDER --config.reward_model=FOLDER)

`--config.stages.ppo_ptx.ptx_coef=0`, for example, changes one stage.
"""

from configs import common, miniature, restaurant, rl


def paper(size: str):
  """C.4 at the paper's sizes; the models are given as folders."""
  config = rl.stage(0, '')
  # E.9 tried 2.55e-6 and 3.74e-6 for 175B and does not print the choices.
  config.learning_rate = {'1p3b': 9.0e-6, '6b': 9.0e-6, '175b': 2.55e-6}[size]
  config.value_learning_rate = {'1p3b': 9e-6, '6b': 9e-6, '175b': 5e-6}[size]
  config.remat = 'full'
  config.logprob_chunk = 128
  config.num_slices = 8  # Activations of 512 rows would fill the memory.
  config.num_slots = 64  # So would their cache.
  config.frozen_dtype = 'bfloat16'
  config.num_microbatches = {'1p3b': 1, '6b': 2, '175b': 8}[size]
  return common.single(config, size)


def gpt2():
  """A published policy; none of these numbers is the paper's.

  Policy and value model of 124 M parameters with Adam, reference, reward model
  and moving average: 6 GB in float32 before activations; one GPU or a v4-8.
  """
  config = rl.stage(0, '')
  config.update(prompt_length=384, response_length=128, ptx_row_length=512)
  config.update(num_episodes=32_768, batch_size=128)
  config.update(num_minibatches=4, num_microbatches=2)
  config.update(learning_rate=1e-5, value_learning_rate=2e-5)
  # gamma does not carry over between scales. A rule: metrics.jsonl logs both
  # gradient norms, and pretraining's, with gamma, should be a fifth to a half
  # of PPO's, as on the miniature. There, a tenth of that gamma no longer undoes
  # the tax, and ten times that gamma costs reward. For SmolLM2-135M with
  # minibatches of 32, PPO's norm is 2.4 and pretraining's 4.3 before gamma;
  # with 27.8 it would be 49 times PPO's.
  config.ptx_coef = 0.3
  config.ptx_per_episode = 1
  config.remat = 'dots'
  return common.single(config, 'gpt2')


def get_config(variant: str = 'miniature'):
  """A pipeline, or the RL stage alone; see the top of this file."""
  pipelines = {
    'miniature': miniature.miniature,
    'smoke': miniature.smoke,
    'e2e': restaurant.restaurant,
  }
  common.check(variant, (*pipelines, 'gpt2', '1p3b', '6b', '175b'))
  if variant == 'gpt2':
    return gpt2()
  if variant not in pipelines:
    return paper(variant)
  config = pipelines[variant]()
  config.lock()
  return config
