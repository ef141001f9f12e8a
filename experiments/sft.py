"""Supervised fine-tuning on demonstrations, and the RL initialisation.

Paper 3.5 and C.1: 16 epochs, cosine schedule to 10 %, no warm-up, residual
dropout 0.2. The model of every epoch is kept: the best is chosen by validation
loss, and later by reward-model score (`select_sft.py`).

Paper C.3: with `ptx_fraction` 0.1 and 2 epochs, from the pretrained model, this
makes the RL initialisation: PPO starts from it, and it is the KL reference.
"""

import dataclasses

import grain
import jax
from etils import epath

from instruct_jax import lora, model_fns, model_folder, queries, supervised
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import (
  checkpoint,
  loop,
  sharding,
  train_state,
)
from instruct_jax.infra import run as run_lib
from instruct_jax.models.config import check_stage, lora_of
from instruct_jax.types import TextBatch

PROCESSES = 'all'


def validate(config):
  """Checks choices and sizes; errors name the key."""
  run_lib.check_choice(config, 'loss_on', ('response', 'all'))
  run_lib.check_choice(config, 'select_by', ('valid_loss', 'last'))
  check_stage(config)
  if not 0 <= config.ptx_fraction < 1:
    raise ValueError(f'ptx_fraction must be in [0, 1): {config.ptx_fraction}')
  if config.ptx_fraction and not config.documents:
    raise ValueError('ptx_fraction > 0 needs documents to mix in')
  supervised.check_microbatches(config)


def inputs(config):
  """The inputs of this stage: config key -> path."""
  keys = ['tokenizer', 'init', 'demonstrations', 'valid_demonstrations']
  if config.ptx_fraction:
    keys.append('documents')
  return {key: config[key] for key in keys}


def build_programs(config, module, num_steps):
  """The jitted programs of this stage."""
  tx = supervised.make_adam(config, num_steps)
  loss_fn = supervised.make_text_loss(model_fns.logprobs_fn(module), True)
  update = supervised.make_update(loss_fn, tx, config.num_microbatches)
  return {'optimizer': tx, 'update': jax.jit(update, donate_argnums=0)}


def check_epochs(workdir, num_done, tokenizer):
  """Checks the models of the epochs that a resumed run will not write again.

  Raises:
    checkpoint.CheckpointError: one is missing or damaged.
  """
  for epoch in range(1, num_done + 1):
    try:
      model_folder.check(workdir / 'epochs' / str(epoch), 'policy', tokenizer)
    except checkpoint.CheckpointError as error:
      raise checkpoint.CheckpointError(
        f'epoch {epoch} cannot be used, and the checkpoints are past it: '
        f'{error} Or delete {workdir} to run this stage again from its start.'
      ) from error


@dataclasses.dataclass(frozen=True)
class Data:
  """Training and held-out data.

  Attributes:
    batches: this process's rows of the batches of all epochs.
    valid_rows: held-out demonstrations.
    num_rows: rows of demonstrations in an epoch.
    num_dropped: demonstrations that are too long.
  """

  batches: grain.MapDataset
  valid_rows: TextBatch
  num_rows: int
  num_dropped: int


def read_data(config, tokenizer) -> Data:
  """Reads demonstrations and documents to mix in; prints what is dropped."""

  def read(what, path, pack, most=0):
    rows, dropped = loader.demonstration_rows(
      records.read_jsonl(path, records.Demonstration)[: most or None],
      tokenizer,
      config.row_length,
      loss_on=config.loss_on,
      pack=pack,
    )
    run_lib.tell_dropped(config.name, dropped.describe(what, 'row_length'))
    return rows, dropped.total

  rows, num_dropped = read(
    *('demonstrations', config.demonstrations, config.pack),
    config.max_demonstrations,
  )
  valid_rows, _ = read(
    'held-out demonstrations', config.valid_demonstrations, False
  )
  num_rows = loader.num_rows(rows)
  run_lib.check_enough(
    num_rows, config.batch_size, 'rows of demonstrations', 'batch_size'
  )
  settings = {
    'batch_size': config.batch_size,
    'seed': config.seed,
    'num_epochs': config.num_epochs,
    'process_index': jax.process_index(),
    'process_count': jax.process_count(),
  }
  if config.ptx_fraction:
    text = loader.document_rows(
      config.documents, tokenizer, config.row_length, cut=config.cut_documents
    )
    batches = loader.mixture(
      rows, text, fraction=config.ptx_fraction, **settings
    )
  else:
    batches = loader.make_batches(rows, **settings)
  return Data(batches, valid_rows, num_rows, num_dropped)


def choose_epoch(config, workdir, tokenizer) -> tuple[int, list[dict]]:
  """The epoch that `select_by` chooses, and the held-out loss of each."""
  epochs = []
  for epoch in range(1, config.num_epochs + 1):
    folder = workdir / 'epochs' / str(epoch)
    about = model_folder.check(folder, 'policy', tokenizer)['about']
    epochs.append({'epoch': epoch, 'valid_loss': about['valid_loss']})
  if config.select_by == 'valid_loss':
    return min(epochs, key=lambda row: row['valid_loss'])['epoch'], epochs
  return config.num_epochs, epochs


def run(config, workdir: epath.Path):
  """Fine-tunes a policy.

  Reads `init`, demonstrations and documents to mix in; writes the model of each
  epoch to `epochs/`, the chosen one to `model`, and epochs.json.
  """
  validate(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  model_folder.check(config.init, 'policy', tokenizer)
  mesh = model_folder.make_mesh(
    config.mesh,
    [config.init],
    [config.batch_size // config.num_microbatches, config.eval_batch_size],
  )
  data = read_data(config, tokenizer)
  steps_per_epoch = len(data.batches) // config.num_epochs
  num_steps = steps_per_epoch * config.num_epochs

  with sharding.use_mesh(mesh):
    model = model_folder.load(
      config.init,
      'policy',
      mesh,
      tokenizer,
      dropout=config.dropout,
      remat=config.remat,
      attention=config.attention,
      logprob_chunk=config.logprob_chunk,
      compute_dtype=config.compute_dtype,
    )
    model_fns.check_context(model, config.row_length, 'row_length')
    model = model_fns.adapted(model, lora_of(config), mesh, config.seed)
    programs = build_programs(config, model.module, num_steps)
    state = train_state.create(model.params, programs['optimizer'])
    frozen = {'policy': model.base}
    # The dropout rate belongs to this stage, so it is not saved.
    module = model_fns.make_module(
      'policy', dataclasses.replace(model.config, dropout=0.0)
    )
    model = dataclasses.replace(model, module=module, params=None)
    valid_loss = queries.make_heldout_loss(
      module, data.valid_rows, config.eval_batch_size, mesh
    )

    def save(directory, params, epoch, loss):
      about = {'stage': config.name, 'seed': config.seed}
      about |= {'epoch': epoch, 'valid_loss': loss}
      saved = dataclasses.replace(model, params=params)
      model_folder.save(directory, saved, tokenizer, about)

    with loop.Loop(
      workdir,
      config.name,
      num_steps,
      log_every=config.log_every,
      checkpoint_every=config.checkpoint_every,
      **config.loop,
    ) as steps:
      programs = steps.watched(programs)
      state = steps.restore(sharding.place(state, mesh))
      check_epochs(workdir, steps.start // steps_per_epoch, tokenizer)
      root = jax.random.key(config.seed)
      for step, host_batch in steps.steps_with(
        loader.ahead(data.batches.__getitem__)
      ):
        batch = sharding.put_batch(host_batch, mesh)
        state, metrics = programs['update'](
          state, frozen, batch, jax.random.fold_in(root, step)
        )
        values = None
        if (step + 1) % steps_per_epoch == 0:
          epoch = (step + 1) // steps_per_epoch
          loss = valid_loss(lora.join(state.params, model.base)).mean
          values = {'epoch': epoch, 'eval/loss': loss}
          save(workdir / 'epochs' / str(epoch), state.params, epoch, loss)
        steps.end_step(
          step,
          state,
          metrics,
          states={config.name: state},
          values=values,
          num_items=config.batch_size * config.row_length,
        )
    del state

    chosen, epochs = choose_epoch(config, workdir, tokenizer)
    best = model_folder.read(
      workdir / 'epochs' / str(chosen), 'policy', mesh, tokenizer
    )
    loss = epochs[chosen - 1]['valid_loss']
    save(workdir / 'model', best.params, chosen, loss)
  run_lib.write_json(workdir / 'epochs.json', epochs)
  return {
    'selected_epoch': chosen,
    'selected_by': config.select_by,
    'num_rows': data.num_rows,
    'num_dropped': data.num_dropped,
  }
