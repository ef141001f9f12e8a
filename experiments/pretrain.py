"""Pretrains a GPT on documents.

Paper section 3.5 starts from GPT-3; this trains a small model instead: packed
rows, next-token loss on every token, Adam, cosine schedule to 10 %.
"""

import functools

import jax
from etils import epath

from instruct_jax import model_fns, model_folder, queries, supervised
from instruct_jax.data import loader
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import loop, sharding, train_state
from instruct_jax.infra import run as run_lib
from instruct_jax.models.config import TransformerConfig

PROCESSES = 'all'


def model_config(config, vocab_size: int) -> TransformerConfig:
  """The model's shape; a `vocab_size` of 0 takes the tokenizer's.

  Raises:
    ValueError: `vocab_size` differs from the tokenizer's.
  """
  values = config.model.to_dict()
  if values['vocab_size'] not in (0, vocab_size):
    raise ValueError(
      f'the tokenizer has {vocab_size} tokens, but model.vocab_size is '
      f'{values["vocab_size"]}; set it to that number, or to 0'
    )
  return TransformerConfig.from_dict({**values, 'vocab_size': vocab_size})


def validate(config):
  """Checks the model's shape and the sizes; errors name the key."""
  model_config(config, config.model.vocab_size or 1)
  if config.row_length > config.model.context_length:
    raise ValueError(
      f'row_length {config.row_length} exceeds model.context_length '
      f'{config.model.context_length}'
    )
  supervised.check_microbatches(config)
  if not 0 <= config.num_warmup < config.num_steps:
    raise ValueError(
      f'num_warmup must be from 0 to below num_steps {config.num_steps}: '
      f'{config.num_warmup}'
    )


def inputs(config):
  """The inputs of this stage: config key -> path."""
  return {key: config[key] for key in ('tokenizer', 'documents', 'valid')}


def build_programs(config, module):
  """The jitted programs of this stage."""
  tx = supervised.make_adam(config, config.num_steps, config.num_warmup)
  loss_fn = supervised.make_text_loss(model_fns.logprobs_fn(module), True)
  update = supervised.make_update(loss_fn, tx, config.num_microbatches)
  return {'optimizer': tx, 'update': jax.jit(update, donate_argnums=0)}


def run(config, workdir: epath.Path):
  """Trains a model from random weights.

  Reads the tokenizer, documents and held-out documents; writes metrics.jsonl,
  checkpoints and `model/`.
  """
  validate(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  shape = model_config(config, tokenizer.vocab_size)
  mesh = sharding.make_mesh(
    config.mesh,
    rows=[config.batch_size // config.num_microbatches, config.eval_batch_size],
    heads=[shape.num_heads, shape.kv_heads, shape.mlp_dim],
  )

  documents = functools.partial(
    loader.document_rows, tokenizer=tokenizer, row_length=config.row_length
  )
  train_rows = documents(config.documents, cut=config.cut_documents)
  # Held-out documents stay whole, so that losses are comparable.
  valid_rows = documents(config.valid)
  run_lib.check_enough(
    loader.num_rows(train_rows),
    config.batch_size,
    'rows of documents',
    'batch_size',
  )
  batches = loader.make_batches(
    train_rows,
    batch_size=config.batch_size,
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  root = jax.random.key(config.seed)
  keys = dict(zip(('init', 'loop'), jax.random.split(root), strict=True))
  with sharding.use_mesh(mesh):
    model = model_fns.init('policy', shape, mesh, keys['init'])
    programs = build_programs(config, model.module)
    state = train_state.create(model.params, programs['optimizer'])

    valid_loss = queries.make_heldout_loss(
      model.module, valid_rows, config.eval_batch_size, mesh
    )
    with loop.Loop(
      workdir,
      config.name,
      config.num_steps,
      log_every=config.log_every,
      checkpoint_every=config.checkpoint_every,
      **config.loop,
    ) as steps:
      programs = steps.watched(programs)
      state = steps.restore(sharding.place(state, mesh))
      data = loader.ahead(batches.__getitem__)
      for step, host_batch in steps.steps_with(data):
        batch = sharding.put_batch(host_batch, mesh)
        state, metrics = programs['update'](
          state, {}, batch, jax.random.fold_in(keys['loop'], step)
        )
        values = None
        if (step + 1) % config.eval_every == 0 or step + 1 == config.num_steps:
          values = {'eval/loss': valid_loss(state.params).mean}
        steps.end_step(
          step,
          state,
          metrics,
          states={config.name: state},
          values=values,
          num_items=config.batch_size * config.row_length,
        )
    final = valid_loss(state.params).mean
    model_folder.save(
      workdir / 'model',
      model_fns.Model('policy', model.module, state.params, {}),
      tokenizer,
      {'stage': config.name, 'seed': config.seed, 'valid_loss': final},
    )
  return {'valid_loss': final, 'num_rows': loader.num_rows(train_rows)}
