"""Adapts the stages of configs/recipe.py to the given models and the device.

`prepare` runs after the flags are read and before the config is recorded. It
leaves out the stages whose models are given, and chooses adapters and
rematerialisation for the device.
"""

import dataclasses
import os
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from instruct_jax import judge_fns, model_fns, model_folder, queries
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import cost, origin, pipeline, sharding
from instruct_jax.infra import run as run_lib
from instruct_jax.infra import stages as stages_lib
from instruct_jax.jobs import plan
from instruct_jax.models.config import TransformerConfig, check_stage
from instruct_jax.types import PromptBatch
from instruct_jax.worlds import (
  preference_lengths,
  preference_sources,
  preference_splits,
  preferences,
)

# Bytes per weight in PPO: policy and value model, each with its gradient and
# Adam's two moments; then average, reference and reward model. With adapters,
# only the two bases count.
ALL_BYTES = 2 * 16 + 3 * 4
ADAPTED_BYTES = 2 * 4
# Share of the memory that weights may take; the rest is for activations.
WEIGHTS_SHARE = 0.6
# Shares of a CPU's memory. Activations above the first are recomputed; float32
# logits and their gradients above the second are computed in chunks.
KEPT_SHARE, LOGITS_SHARE = 0.3, 0.1
# Columns of logits in a chunk.
LOGPROB_CHUNK = 128
LORA_RANK = 16
MODEL = 'hf:HuggingFaceTB/SmolLM2-135M-Instruct'  # In messages.
# The judge that the recipe trains, and the judge for a given `judge_model`.
OWN_JUDGE = 'instruct_jax.worlds.preferences.OtherConversations'
GIVEN_JUDGE = 'instruct_jax.judge_fns.RewardModel'


@dataclasses.dataclass(frozen=True)
class Choice:
  """What was chosen for the device.

  Attributes:
    rank: rank of the adapters; 0 trains all weights.
    remat: what the backward pass recomputes.
    logprob_chunk: columns of float32 logits at a time; 0 is all.
    why: one line for the user.
  """

  rank: int
  remat: str
  logprob_chunk: int
  why: str


def prepare(config: ConfigDict, workdir: epath.Path) -> bool:
  """Adapts the config, in place.

  Args:
    config: of the whole recipe, with an empty `workdir`.
    workdir: of the run. A resumed run keeps its adapters' rank.

  Returns:
    Whether the run goes on; False after a dry run.

  Raises:
    ValueError: a key or a model is invalid, the model does not fit the device,
      or the disk is too full.
  """
  check_given(config, {'model': MODEL, 'preferences': 'hh:DIR'})
  for name, stage in config.stages.items():
    stages_lib.check_numbers(f'stages.{name}', stage)
  preferences.validate(config.stages.data)
  check_stage(config)
  tokenizer = preferences.load_tokenizer(config.stages.data)
  file = workdir / stages_lib.CONFIG_FILE
  before = run_lib.read_json(file) if run_lib.agreed(file.exists()) else {}
  reads = not before and jax.process_index() == 0
  own_length = preferences.check_model(config.stages.data, tokenizer, reads)
  others = check_models(config, tokenizer, reads)
  context_length = min([own_length, *others])
  with config.unlocked():
    if context_length < own_length:  # Rows must also fit the given models.
      config.stages.data.context_length = context_length
    leave_out_stages(config)
    for name in set(config.stage_order) & {'reward', 'judge'}:
      most = config.stages[name].max_candidates
      config.stages.data.max_answers[name] = most
    compare_models(config)
    if config.lora.rank is None:
      config.lora.rank = before.get('lora', {}).get('rank')
    choice = choose(config)
    apply(config, choice)
    for name, stage, number in (
      ('comparisons_train', 'reward', 1),
      ('judge_comparisons_train', 'judge', 1),
      ('prompts_train', 'ppo', config.stages.ppo.samples_per_prompt),
    ):
      if stage in config.stage_order:
        size = config.stages[stage].batch_size // number
        config.stages.data.least[name] = size
  run_lib.say(f'recipe: {choice.why}')
  if not before:
    run_lib.check_room(workdir, disk_bytes(config), 'the models of this run')
  if config.dry_run:
    described = config.copy_and_resolve_references()
    with config.unlocked():
      config.workdir = str(workdir)
    pipeline.check(config, workdir, described)
    describe(config, tokenizer, context_length)
  return not config.dry_run


def prepare_sentiment(config: ConfigDict, workdir: epath.Path) -> bool:
  """Checks configs/sentiment.py."""
  del workdir
  given = {'model': MODEL, 'documents': 'DIR', 'labels': 'SST2/train.tsv'}
  check_given(config, given)
  check_stage(config)
  return True


def check_given(config: ConfigDict, examples: Mapping[str, str]) -> None:
  """Refuses empty keys.

  Args:
    config: of the run.
    examples: key -> example of a value, for the message.
  """
  for key, example in examples.items():
    if not config[key]:
      raise ValueError(f'{key} is empty; give --config.{key}={example}')


def check_models(
  config: ConfigDict,
  tokenizer: tokenizer_lib.Tokenizer,
  reads_weights: bool,
) -> list[int]:
  """Refuses given models that the stages could not load.

  Policies and reward models must use the run's tokenizer; a published judge may
  have another one.

  Returns:
    Context lengths of the given models that use the run's tokenizer.
  """
  contexts = []
  kinds = {'sft_model': 'policy', 'reward_model': 'scalar'}
  for key, kind in {**kinds, 'judge_model': 'scalar'}.items():
    folder, read = config[key], tokenizer
    if not folder:
      continue
    if key == 'judge_model' and model_folder.is_published(folder):
      read = tokenizer_lib.Tokenizer.load(folder)
    model_folder.check(folder, kind, read)
    if reads_weights:
      model_folder.check_weights(folder, kind)
    if read is tokenizer:
      contexts.append(model_folder.shape_of(folder).context_length)
  return contexts


def disk_bytes(config: ConfigDict) -> float:
  """Bytes of the float32 models that the stages write, and of a checkpoint."""
  whole = 4.0 * model_folder.shape_of(config.model).num_params
  total = 0.0
  for name in config.stage_order:
    stage, copies = config.stages[name], 0
    if name == 'export':
      copies = len(model_folder.named_folders(stage.models))
    elif 'lora' in stage and not stage.lora.rank:
      copies = {'sft': stage.get('num_epochs', 1), 'ppo': 2, 'ppo_ptx': 2}.get(
        name, 1
      )
    total += copies * whole
  return total + 3 * whole


# --- Stages -------------------------------------------------------------------


def leave_out_stages(config: ConfigDict) -> None:
  """Leaves out stages whose models are given or unused, or lack documents."""
  stages, gone = config.stages, set()
  rl = [stages[name] for name in ('ppo', 'ppo_ptx')]
  if config.sft_model:
    gone |= {'sft', 'rl_init', 'select'}
    for each in (*rl, stages.reward, stages.judge):
      each.init = config.sft_model
  if config.reward_model:
    gone.add('reward')
    for each in (*rl, stages.select, stages.evaluate):
      each.reward_model = config.reward_model
  names = filter(None, (config.judge, *config.other_judges.split(',')))
  kinds = [judge_fns.find(name) for name in names]
  if config.judge_model or not any(
    issubclass(kind, judge_fns.RewardModel) for kind in kinds
  ):
    gone.add('judge')
    stages.evaluate.judge_model = config.judge_model
    stages.data.judge_fraction = 0.0  # No rankings are set aside for a judge.
  if config.judge_model and config.judge == OWN_JUDGE:
    config.judge = GIVEN_JUDGE
  if not config.documents:
    gone.add('ppo_ptx')
    stages.rl_init.ptx_fraction = 0.0
    stages.ppo.valid_documents = ''
    tax = 'measured on other_documents alone'
    if not config.other_documents:
      tax = 'not measured'
    run_lib.say(
      f'recipe: documents is empty: no PPO-ptx, and the alignment tax is {tax}'
    )
  config.stage_order = tuple(n for n in config.stage_order if n not in gone)
  for name in gone:
    del stages[name]


def compare_models(config: ConfigDict) -> None:
  """Lists the models that are evaluated and exported."""
  workdir, stages = config.get_ref('workdir'), config.stages

  def listed(folders):
    text = ''
    for number, (name, folder) in enumerate(folders.items()):
      text = text + f'{"," * (number > 0)}{name}=' + folder
    return text

  sft = config.sft_model or workdir + '/select/model'
  trained = {
    name: workdir + f'/{name}/ema'  # Averaged weights (C.4).
    for name in ('ppo', 'ppo_ptx')
    if name in config.stage_order
  }
  last = {
    f'{name}_last': workdir + f'/{name}/policy'
    for name in trained
    if config.last_weights
  }
  others = {} if config.sft_model else {'rl_init': workdir + '/rl_init/model'}
  evaluate = stages.evaluate
  compared = {'pretrained': config.model, 'sft': sft, **trained}
  pairs = ['ppo_ptx=ppo'] * (len(trained) == 2)
  if config.stages.data.references:
    name = preference_splits.REFERENCES
    compared[name] = workdir + f'/data/{name}_test.jsonl'
    pairs += [f'{each}={name}' for each in trained]
  evaluate.models = listed(compared)
  evaluate.other_models = listed({**others, **last})
  evaluate.pairs = ','.join(pairs)
  evaluate.reference = 'sft' if config.sft_model else 'rl_init'
  evaluate.prompted = evaluate.prefixes = evaluate.crossval = ''
  evaluate.suite = workdir + '/nlp_suite/suite.json'
  data, kinds = workdir + '/data', preference_sources.other_documents(config)
  texts = {'pretraining': data + '/documents_valid.jsonl'}
  texts |= {kind: data + f'/documents_{kind}.jsonl' for kind in kinds}
  if not config.documents:
    del texts['pretraining']
  evaluate.documents = listed(texts)
  own = {'sft': sft, **trained}
  stages.nlp_suite.models = listed({'pretrained': config.model, **own})
  if 'reward' in config.stage_order:
    own['reward'] = workdir + '/reward/model'
  stages.export.models = listed(own)


# --- The device ---------------------------------------------------------------


def memory_bytes() -> float:
  """Memory of all devices together, or of the machine if they are CPUs."""
  devices = jax.devices()
  if devices[0].platform == 'cpu':
    return float(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
  stats = [device.memory_stats() or {} for device in devices]
  return float(sum(found.get('bytes_limit', 0) for found in stats))


def choose(config: ConfigDict) -> Choice:
  """Chooses what suits the device; a given rank is kept."""
  devices = jax.devices()
  on_cpu = devices[0].platform == 'cpu'
  shape = model_folder.shape_of(config.model)
  memory = memory_bytes()
  size = f'{memory / 2**30:.0f} GiB'
  said = [
    f'{len(devices)} x {devices[0].device_kind}, {size}, '
    f'{shape.num_params / 1e6:.0f} M parameters'
  ]
  rows = [config.stages.ppo.batch_size]
  mesh = model_folder.make_mesh(config.mesh, [config.model], rows)
  cut = ' x '.join(map(str, mesh.devices.shape))
  said.append(f'mesh of RL {cut} (data, fsdp, tensor)')
  said.append(config.compute_dtype or "each folder's own dtype")
  rank, why = config.lora.rank, 'as given, or as the run began'
  if rank is None:
    need = shape.num_params * ALL_BYTES
    fits = not memory or need <= WEIGHTS_SHARE * memory
    rank = 0 if fits else LORA_RANK
    why = f'all weights take {need / 2**30:.0f} GiB in PPO'
    if not fits and shape.num_params * ADAPTED_BYTES > WEIGHTS_SHARE * memory:
      raise ValueError(
        f'{config.model}: {shape.num_params:,} parameters need '
        f'{shape.num_params * ADAPTED_BYTES / 2**30:.0f} GiB with adapters, '
        f'and the device has {size}; take more devices or a smaller model'
      )
  what = f'adapters of rank {rank}' if rank else 'all weights trained'
  said.append(f'{what} ({why})')
  if own := own_adapters(config):
    said.append(f'adapters of their own: {", ".join(own)}')
  remat, chunk = 'dots' if shape.num_params < 5e8 else 'full', LOGPROB_CHUNK
  if on_cpu:
    num_rows, length = largest_batch(config, shape.context_length)
    kept = kept_bytes(shape, num_rows, length)
    remat = 'none' if kept <= KEPT_SHARE * memory else 'full'
    logits = 3 * 4.0 * num_rows * length * shape.vocab_size
    chunk = 0 if logits <= LOGITS_SHARE * memory else LOGPROB_CHUNK
  parts = f'{chunk} columns of logits at a time' if chunk else 'all logits'
  said.append(f'remat {remat}, {parts}, unless a stage sets it')
  return Choice(rank, remat, chunk, ', '.join(said))


def largest_batch(config: ConfigDict, context_length: int) -> tuple[int, int]:
  """The most (rows, tokens per row) that a backward pass may have.

  Lengths that are not given are proposed later from the data, up to the maxima
  of the config.
  """
  data, rows = config.stages.data, []
  length = sum(
    data[f'{part}_length'] or data[f'max_{part}_length']
    for part in ('prompt', 'response')
  )
  for name in config.stage_order:
    stage = config.stages[name]
    if 'num_microbatches' in stage:
      num_parts = stage.num_microbatches * stage.get('num_minibatches', 1)
      answers = 2 if 'max_candidates' in stage else 1  # A ranking has >= 2.
      rows.append(-(-answers * stage.batch_size // num_parts))
  return max(rows, default=1), min(length, context_length)


def kept_bytes(shape: TransformerConfig, num_rows: int, length: int) -> float:
  """Rough number of bytes that a forward pass keeps for the backward pass.

  In float32: three attention matrices per head, and the inputs of a block's
  matrix products and norms.
  """
  per_token = (
    3 * shape.num_heads * length + 12 * shape.width + 4 * shape.mlp_dim
  )
  return 4.0 * shape.num_layers * num_rows * length * per_token


def own_adapters(config: ConfigDict) -> list[str]:
  """Stages that set their own rank; their learning rates are not scaled."""
  return [
    name
    for name in config.stage_order
    if 'lora' in config.stages[name]
    and config.stages[name].lora.rank != config.lora.rank
  ]


def apply(config: ConfigDict, choice: Choice) -> None:
  """Writes the choice into the stages; values that the user gave are kept."""
  own = own_adapters(config)
  config.lora.rank = choice.rank
  for name in config.stage_order:
    stage = config.stages[name]
    for key in ('remat', 'logprob_chunk'):
      if key in stage and stage[key] is None:
        stage[key] = getattr(choice, key)
    for key in ('learning_rate', 'value_learning_rate'):
      if choice.rank and key in stage and name not in own:
        stage[key] = stage[key] * config.lora_rate


# --- A dry run ----------------------------------------------------------------


def describe(
  config: ConfigDict, tokenizer: tokenizer_lib.Tokenizer, context_length: int
) -> None:
  """Prints stages, sizes, memory and time; nothing is written.

  Memory is the compiler's figure. Time is the operations of each stage at the
  rate of one measured step (SFT's if there is one), plus its sampled tokens
  times the measured time of one.
  """
  data = config.stages.data
  files, lengths, report = preferences.make_records(
    data, tokenizer, context_length
  )
  run_lib.say(preference_lengths.describe_lengths('data', lengths))
  for name, rows in files.items():
    run_lib.say(f'data: {len(rows):,} {name}')
  for reason, number in report['left_out'].items():
    run_lib.say(f'data: left out: {number:,} {reason}')
  stages = {}
  for name in config.stage_order:
    stages[name] = config.stages[name].copy_and_resolve_references()
    origin.fill(stages[name], lengths)
  trained = {n: work_of(n, s, files, tokenizer) for n, s in stages.items()}
  mesh = sharding.make_mesh(config.mesh)
  shape = dataclasses.replace(
    model_folder.shape_of(config.model),
    compute_dtype=stages['ppo'].compute_dtype,
    vocab_multiple=128,
  )
  measured = measure_programs(shape, stages, mesh)
  total = 0.0
  for name, work in trained.items():
    if work is None:
      run_lib.say(f'{name}: no model is trained; not timed')
      continue
    seconds = (
      work.num_steps * measured.seconds(work.program)
      + work.num_tokens * measured.token_seconds
    )
    total += seconds
    what = f'{work.num_tokens:,} tokens in sequence'
    if work.program:
      memory = measured.memory.get(work.program, 0)
      what = f'{work.num_steps:,} steps, {memory / 2**30:.1f} GiB'
    run_lib.say(f'{name}: {what}, about {seconds / 60:.0f} min')
  run_lib.say(
    f'all stages: about {total / 3600:.1f} h on this device; scoring, judging '
    'and held-out losses are not in it'
  )


@dataclasses.dataclass(frozen=True)
class Work:
  """The work of a stage.

  Attributes:
    program: the program that it runs, 'sft', 'reward', 'train' or '' for none.
    num_steps: calls of that program.
    num_tokens: sequential sampling steps; each samples a token in every slot.
  """

  program: str
  num_steps: int
  num_tokens: int


def work_of(name, stage, files, tokenizer) -> Work | None:
  """The work of a stage; None if it is not estimated."""
  if name in ('sft', 'rl_init'):
    rows = files['demonstrations_train']
    texts = [row.prompt + row.response for row in rows]
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    num_rows = -(-tokens // stage.row_length)
    steps = stage.num_epochs * max(1, num_rows // stage.batch_size)
    return Work('sft', steps, 0)
  if name in ('reward', 'judge'):
    prefix = 'judge_' * (name == 'judge')
    rows = files[f'{prefix}comparisons_train']
    steps = max(1, len(rows) // stage.batch_size)
    return Work('reward', stage.num_epochs * steps, 0)
  if name in ('ppo', 'ppo_ptx'):
    iterations = stage.num_episodes // stage.batch_size
    return Work('train', iterations, iterations * stage.response_length)
  if name in ('select', 'evaluate'):
    models = 6 if name == 'evaluate' else 2
    batches = -(-stage.num_prompts // stage.batch_size)
    return Work('', 0, models * batches * stage.response_length)
  return None


@dataclasses.dataclass(frozen=True)
class Measured:
  """Measurements of the compiled programs.

  Attributes:
    memory: program -> bytes per device.
    flops: program -> operations of one call.
    rate: operations per second of the timed program.
    token_seconds: seconds to sample one token in every slot.
  """

  memory: Mapping[str, float]
  flops: Mapping[str, float]
  rate: float
  token_seconds: float

  def seconds(self, program: str) -> float:
    """Seconds of one call of a program, estimated from its operations."""
    return self.flops.get(program, 0.0) / self.rate


def measure_programs(shape: TransformerConfig, stages, mesh) -> Measured:
  """Compiles the updates of SFT, reward model and PPO, and times one of them.

  SFT's is timed; without an SFT stage, PPO's.
  """
  rl_stage = stages['ppo']
  described = ConfigDict(
    {
      'policy': shape.to_dict(),
      'scalar': shape.to_dict(),
      'ppo': stages.get('ppo_ptx', rl_stage),
      'num_reward_rows': 1,
    }
  )
  parts = {'train': rl_stage.num_microbatches}
  for name in ('sft', 'reward'):
    if name in stages:
      described[name] = stages[name]
      parts[name] = stages[name].num_microbatches
  if 'reward' in parts:
    described.num_reward_rows = stages['reward'].batch_size * 2
  memory, flops, seconds = {}, {}, {}
  with sharding.use_mesh(mesh):
    for name in sorted(parts, key=lambda name: name != 'sft'):
      program, arguments, resident = plan.build(
        name, described, mesh, rl_stage.remat, parts[name]
      )
      traced = program.trace(*arguments)
      flops[name] = cost.flops(traced.jaxpr)
      compiled = traced.lower().compile()
      found = compiled.memory_analysis()
      memory[name] = found.temp_size_in_bytes + sum(
        map(cost.bytes_per_chip, resident.values())
      )
      if not seconds:
        seconds[name] = timed(compiled, arguments)
    policy = model_fns.init('policy', shape, mesh, jax.random.key(0))
    token_seconds = timed_token(policy, rl_stage, mesh)
  ((first, taken),) = seconds.items()
  return Measured(memory, flops, flops[first] / taken, token_seconds)


def timed(compiled, arguments) -> float:
  """Seconds of the second of two calls, on arrays of ones."""

  def filled(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.key(0)
    return jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding)

  taken = 0.0
  for _ in range(2):
    own = jax.tree.map(filled, arguments)
    begin = time.perf_counter()
    jax.block_until_ready(compiled(*own))
    taken = time.perf_counter() - begin
  return taken


def timed_token(policy: model_fns.Model, stage, mesh, num_tokens=8) -> float:
  """Seconds to sample one token in every slot, including reading prompts."""
  generate = queries.generate_program(
    policy.module, num_tokens, (), 1.0, stage.num_slots
  )
  B, P = stage.batch_size, stage.prompt_length
  prompts = PromptBatch(
    tokens=np.ones((B, P), np.int32),
    mask=np.ones((B, P), bool),
    indices=np.arange(B, dtype=np.int32),
  )
  taken = 0.0
  for _ in range(2):
    begin = time.perf_counter()
    batch = sharding.put_batch(prompts, mesh)
    jax.block_until_ready(generate(policy.params, batch, jax.random.key(0)))
    taken = time.perf_counter() - begin
  return taken / num_tokens
