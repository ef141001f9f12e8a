"""Supervised fine-tuning on demonstrations, and the RL initialisation.

Paper 3.5 and C.1: 16 epochs, cosine to 10 %, no warm-up, residual dropout 0.2;
every epoch is kept, because the checkpoint is chosen by reward-model score once
there is a reward model (`select_sft.py`), and by validation loss until then.

Paper C.3: with `ptx_fraction` 0.1 and 2 epochs, from the pretrained model, this
is the RL initialisation: it starts PPO and is its KL reference.
"""

import dataclasses

import jax
from etils import epath

from instruct_jax import lora, model_fns, model_folder, queries, supervised
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import (
  checkpoint,
  loop,
  optimizer,
  sharding,
  train_state,
)
from instruct_jax.infra import run as run_lib
from instruct_jax.models.config import check_stage, lora_of

PROCESSES = 'all'


def validate(config):
  run_lib.check_choice(config, 'loss_on', ('response', 'all'))
  run_lib.check_choice(config, 'select_by', ('valid_loss', 'last'))
  check_stage(config)
  if not 0 <= config.ptx_fraction < 1:
    raise ValueError(f'ptx_fraction must be in [0, 1): {config.ptx_fraction}')
  if config.ptx_fraction and not config.documents:
    raise ValueError('ptx_fraction > 0 needs documents to mix in')
  if config.batch_size % config.num_microbatches:
    raise ValueError(
      f'num_microbatches {config.num_microbatches} does not divide '
      f'batch_size {config.batch_size}'
    )


def inputs(config):
  """What this stage reads, by config key."""
  keys = ['tokenizer', 'init', 'demonstrations', 'valid_demonstrations']
  if config.ptx_fraction:
    keys.append('documents')
  return {key: config[key] for key in keys}


def build_programs(config, module, num_steps):
  """The jitted programs of this stage."""
  tx = optimizer.make_adam(
    optimizer.cosine_to_fraction(config.learning_rate, num_steps, 0.1),
    b1=config.adam_b1,
    b2=config.adam_b2,
    eps=config.adam_eps,
    max_grad_norm=config.max_grad_norm,
  )
  loss_fn = supervised.make_text_loss(model_fns.logprobs_fn(module), True)

  update = supervised.make_update(loss_fn, tx, config.num_microbatches)

  return {'optimizer': tx, 'update': jax.jit(update, donate_argnums=0)}


def check_epochs(workdir, num_done, tokenizer):
  """Refuses to go on without an epoch that this stage has saved before.

  Raises:
    checkpoint.CheckpointError: one is gone or damaged; a resumed run would not
      write it again.
  """
  for epoch in range(1, num_done + 1):
    try:
      model_folder.check(workdir / 'epochs' / str(epoch), 'policy', tokenizer)
    except checkpoint.CheckpointError as error:
      raise checkpoint.CheckpointError(
        f'epoch {epoch} cannot be used, and the checkpoints are past it: '
        f'{error} Or delete {workdir} to run this stage again from its start.'
      ) from error


def run(config, workdir: epath.Path):
  validate(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  model_folder.check(config.init, 'policy', tokenizer)
  mesh = model_folder.make_mesh(
    config.mesh,
    [config.init],
    [config.batch_size // config.num_microbatches, config.eval_batch_size],
  )

  def demonstration_rows(path, pack):
    return loader.demonstration_rows(
      records.read_jsonl(path, records.Demonstration),
      tokenizer,
      config.row_length,
      loss_on=config.loss_on,
      pack=pack,
    )

  rows, dropped = demonstration_rows(config.demonstrations, config.pack)
  valid_rows, valid_dropped = demonstration_rows(
    config.valid_demonstrations, False
  )
  for what, each in (
    ('demonstrations', dropped),
    ('held-out demonstrations', valid_dropped),
  ):
    run_lib.tell_dropped(config.name, each.describe(what, 'row_length'))
  processes = {
    'process_index': jax.process_index(),
    'process_count': jax.process_count(),
  }
  run_lib.check_enough(
    loader.num_rows(rows),
    config.batch_size,
    'rows of demonstrations',
    'batch_size',
  )
  if config.ptx_fraction:
    ptx_rows = loader.document_rows(
      config.documents,
      tokenizer,
      config.row_length,
      cut=config.cut_documents,
    )
    batches = loader.mixture(
      rows,
      ptx_rows,
      fraction=config.ptx_fraction,
      batch_size=config.batch_size,
      seed=config.seed,
      num_epochs=config.num_epochs,
      **processes,
    )
  else:
    batches = loader.make_batches(
      rows,
      batch_size=config.batch_size,
      seed=config.seed,
      num_epochs=config.num_epochs,
      **processes,
    )
  steps_per_epoch = len(batches) // config.num_epochs
  num_steps = steps_per_epoch * config.num_epochs
  root = jax.random.key(config.seed)

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
    # Saved models have no dropout rate to inherit: it belongs to this stage.
    module = model_fns.make_module(
      'policy', dataclasses.replace(model.config, dropout=0.0)
    )
    model = dataclasses.replace(model, module=module, params=None)

    valid_loss = queries.make_heldout_loss(
      module, valid_rows, config.eval_batch_size, mesh
    )

    def save(directory, params, epoch, loss):
      model_folder.save(
        directory,
        dataclasses.replace(model, params=params),
        tokenizer,
        {
          'stage': config.name,
          'seed': config.seed,
          'epoch': epoch,
          'valid_loss': loss,
        },
      )

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
      data = loader.ahead(batches.__getitem__)
      for step, host_batch in steps.steps_with(data):
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

    epochs = []
    for epoch in range(1, config.num_epochs + 1):
      about = model_folder.check(
        workdir / 'epochs' / str(epoch), 'policy', tokenizer
      )['about']
      epochs.append({'epoch': epoch, 'valid_loss': about['valid_loss']})
    if config.select_by == 'valid_loss':
      selected = min(epochs, key=lambda row: row['valid_loss'])['epoch']
    else:
      selected = config.num_epochs
    best = model_folder.read(
      workdir / 'epochs' / str(selected),
      'policy',
      mesh,
      tokenizer,
    )
    save(
      workdir / 'model',
      best.params,
      selected,
      epochs[selected - 1]['valid_loss'],
    )
  run_lib.write_json(workdir / 'epochs.json', epochs)
  return {
    'selected_epoch': selected,
    'selected_by': config.select_by,
    'num_rows': loader.num_rows(rows),
    'num_dropped': dropped.total,
  }
