"""Shared by the config files: sizes of models, and keys of every stage.

Keys about memory, speed and the machine may change when a run resumes:
`instruct_jax/infra/stages.py` lists them, each with its reason.

Each key is declared once, here or in the stage's own file, with its unit and
its source ("C.1" is appendix C.1 of Ouyang et al. 2022), or a note that the
paper does not print it.
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from instruct_jax.models.config import PRESETS


def check(argument: str, known: Iterable[str], what: str = 'variant') -> str:
  """Returns a known argument; otherwise ValueError lists the known ones."""
  if argument not in known:
    raise ValueError(f'unknown {what} {argument!r}; known: {", ".join(known)}')
  return argument


def check_none(argument: str, name: str) -> None:
  """Refuses an argument of a config without variants."""
  if argument:
    raise ValueError(f'{name} has no variants: {argument!r}')


def check_size(size: str) -> str:
  """Returns a known size; otherwise ValueError lists the known ones."""
  return check(size, PRESETS, 'size')


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
    logprob_chunk=128,  # Columns whose float32 logits exist at a time.
  )
  return ConfigDict(values | changes)


def tiny_model(
  width: int, num_layers: int, context: int, unroll: int
) -> ConfigDict:
  """Shape of a model for CPUs, with heads of 32 channels; our choice."""
  return ConfigDict(
    dict(
      vocab_size=0,  # 0: the tokenizer's.
      context_length=context,
      num_layers=num_layers,
      width=width,
      num_heads=max(1, width // 32),
      head_dim=32,
      mlp_dim=4 * width,
      dropout=0.0,
      compute_dtype='float32',
      remat='none',
      vocab_multiple=64,
      scan_unroll=unroll,
    )
  )


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
  config.max_grad_norm = 1.0  # Not printed; a safeguard. 0 disables it.
  return config


def loop(config: ConfigDict) -> ConfigDict:
  """How a training loop saves, stops and profiles; may change on resume."""
  config.loop = ConfigDict(
    dict(
      # Also save after this long without a checkpoint; 0: by steps alone.
      checkpoint_minutes=0.0,
      keep=2,  # Newest checkpoints kept.
      keep_every=0,  # Steps; checkpoints at its multiples are kept. 0: none.
      max_skips=10,  # Non-finite updates in a row that stop the run.
      profile_steps='',  # Such as 3-5; their trace goes to WORKDIR/profile.
    )
  )
  return config


def models(config: ConfigDict) -> ConfigDict:
  """Precision of the models that a stage loads."""
  # Dtype of activations and matrix products: 'float32', 'bfloat16', 'auto' for
  # the one that the device multiplies faster, or '' for the dtype in each model
  # folder, which for published ones is float32.
  config.compute_dtype = ''
  return config


def lora(config: ConfigDict) -> ConfigDict:
  """Low-rank adapters instead of all weights (Hu et al. 2021).

  Adapters and a scalar model's head are trained, checkpointed and saved; all
  other weights are a frozen base. Adapters need a learning rate about ten times
  as high.
  """
  config.lora = ConfigDict(
    dict(
      rank=0,  # r of the product A B added to a matrix; 0: no adapters.
      alpha=16.0,  # The product is scaled by alpha / rank.
      # Some of 'query', 'key', 'value', 'out', 'gate', 'up', 'down', in every
      # layer; () is all that the model has. Hu et al. use query and value.
      targets=(),
    )
  )
  return config


def tuning(name: str, experiment: str, seed, workdir) -> ConfigDict:
  """Keys of every stage that loads a model and trains it."""
  config = lora(models(loop(adam(stage(name, experiment, seed, workdir)))))
  config.tokenizer = ''  # Folder of the tokenizer.
  config.num_microbatches = 1  # Gradient accumulation in a (mini)batch.
  config.remat = 'none'
  config.attention = 'auto'  # The platform's flash kernel; or 'xla', 'flash'.
  return config


def endpoint(key_variable: str) -> ConfigDict:
  """Keys of an HTTP service; see `endpoint.Settings`."""
  config = ConfigDict()
  config.url = ''
  config.key_variable = key_variable  # Environment variable; '' sends no key.
  config.timeout = 60.0  # Seconds.
  config.max_retries = 6
  config.requests_per_minute = 0.0  # 0 for no limit.
  config.num_workers = 4  # Concurrent requests.
  return config


# By default XLA's CPU backend runs several operations at a time, which keeps
# many results in memory. From a few million parameters on, one operation fills
# the cores: run in order, they need half the memory and take as long.
LEAN_ON_CPU = '--xla_cpu_enable_concurrency_optimized_scheduler=false'


def machine(config: ConfigDict) -> ConfigDict:
  """Keys about the machine, not the method; they may change on resume."""
  config.mesh = ()  # Devices along data, fsdp, tensor; -1 fills, () chooses.
  config.xla_flags = ''  # Added to XLA_FLAGS before the first device is used.
  config.compilation_cache = '~/.cache/instruct_jax'  # '' disables it.
  # Services that show all stages: 'tensorboard', 'wandb', 'trackio', several
  # separated by commas. '' leaves metrics.jsonl, which is always written.
  config.loggers = 'tensorboard'
  return config


def single(config: ConfigDict, size: str) -> ConfigDict:
  """Turns one stage's config into that of a run of this stage alone."""
  config.default_workdir = f'runs/{config.name}_{size}'
  machine(config)
  config.xla_flags = LEAN_ON_CPU
  config.lock()
  return config


def root(name: str) -> ConfigDict:
  """A pipeline: stages that run in order, each into WORKDIR/<its name>/."""
  config = ConfigDict()
  config.name = name
  config.seed = 0  # Root of every random choice of every stage.
  config.workdir = ''
  config.default_workdir = f'runs/{name}'
  machine(config)
  config.stages = ConfigDict()
  return config
