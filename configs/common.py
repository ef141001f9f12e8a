"""What the config files share: sizes of models and keys of every stage.

Keys about memory, speed and the machine may change while a run goes on:
`instruct_jax/infra/stages.py` lists them, each with its reason.

Each key is declared here or in the stage's own file, once, with its unit and
where it comes from ("C.1" is appendix C.1 of Ouyang et al. 2022). Keys that the
paper does not print say so.
"""

from ml_collections import ConfigDict

from instruct_jax.models.config import PRESETS


def check_size(size: str) -> str:
  """The size, or an error that lists the ones there are."""
  if size not in PRESETS:
    raise ValueError(f'unknown size {size!r}; known: {", ".join(PRESETS)}')
  return size


def model(size: str, **changes) -> ConfigDict:
  """Shape of a paper-size model (GPT-3 Table 2.1; Stiennon et al. Table 3)."""
  values = dict(
    PRESETS[check_size(size)],
    dropout=0.0,
    compute_dtype='bfloat16',  # The paper: fp16 activations, fp32 weights.
    remat='full',
    vocab_multiple=128,
    scan_unroll=1,
    attention='auto',  # The platform's flash kernel where there is one.
    logprob_chunk=128,  # Columns whose float32 logits exist at one time.
  )
  values.update(changes)
  return ConfigDict(values)


def stage(name: str, experiment: str, seed, workdir) -> ConfigDict:
  """Keys that every experiment has."""
  config = ConfigDict()
  config.name = name  # Folder of the stage, and its name in messages.
  config.experiment = experiment  # Module under experiments/.
  config.seed = seed
  config.workdir = workdir  # Of the whole run; main.py fills it in.
  config.mesh = ()  # Devices along data, fsdp, tensor; -1 fills, () chooses.
  return config


def adam(config: ConfigDict) -> ConfigDict:
  """Adam as in C: beta 0.9 and 0.95 everywhere."""
  config.adam_b1 = 0.9
  config.adam_b2 = 0.95
  config.adam_eps = 1e-8  # Not printed; a choice. PPO uses 1e-5 (Ziegler).
  config.max_grad_norm = 1.0  # Not printed; a safety. 0 switches it off.
  return config


def loop(config: ConfigDict) -> ConfigDict:
  """How a training loop saves, stops and is looked at; may change on resume."""
  config.loop = ConfigDict(
    dict(
      # A checkpoint is also due after so long without one; 0: by steps alone.
      checkpoint_minutes=0.0,
      keep=2,  # Newest checkpoints kept.
      keep_every=0,  # Steps; checkpoints at multiples stay for good. 0: none.
      max_skips=10,  # Non-finite updates in a row that stop the run.
      profile_steps='',  # Say 3-5: a trace of these goes to WORKDIR/profile.
    )
  )
  return config


def models(config: ConfigDict) -> ConfigDict:
  """How the models of a stage that loads some are computed with."""
  # Of activations and matrix products: 'float32', 'bfloat16', or '' for what
  # each model folder says, which for published ones is float32.
  config.compute_dtype = ''
  return config


def lora(config: ConfigDict) -> ConfigDict:
  """Low-rank adapters in the place of all weights (Hu et al. 2021).

  Adapters and a scalar model's head are trained, checkpointed and saved; all
  else is a frozen base. They want a learning rate about ten times as high.
  """
  config.lora = ConfigDict(
    dict(
      rank=0,  # r of the product A B beside a matrix; 0: no adapters.
      alpha=16.0,  # The product counts alpha / rank times.
      # Of 'query', 'key', 'value', 'out', 'gate', 'up', 'down', in every layer;
      # () is all that the model has. Hu et al. take query and value.
      targets=(),
    )
  )
  return config


# XLA's CPU backend by default keeps the results of many operations at a time,
# to run several side by side. From a few million parameters on one operation
# fills the cores: in order they need half of the room and take as long.
LEAN_ON_CPU = '--xla_cpu_enable_concurrency_optimized_scheduler=false'


def machine(config: ConfigDict) -> ConfigDict:
  """Keys about the machine, not the method; they may change on resume."""
  config.mesh = ()  # Devices along data, fsdp, tensor; -1 fills, () chooses.
  config.xla_flags = ''  # Added to XLA_FLAGS before the first device is used.
  config.compilation_cache = '~/.cache/instruct_jax'  # '' switches it off.
  return config


def single(config: ConfigDict, size: str) -> ConfigDict:
  """Turns one stage's config into a run of its own."""
  config.default_workdir = f'runs/{config.name}_{size}'
  machine(config)
  config.xla_flags = LEAN_ON_CPU
  config.lock()
  return config


def root(name: str, seed: int = 0) -> ConfigDict:
  """A pipeline: stages that run in order, each into WORKDIR/<its name>/."""
  config = ConfigDict()
  config.name = name
  config.seed = seed  # Root of every random choice of every stage.
  config.workdir = ''
  config.default_workdir = f'runs/{name}'
  machine(config)
  config.stages = ConfigDict()
  return config
