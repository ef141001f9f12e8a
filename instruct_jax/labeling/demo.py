"""Tasks of the miniature world for `--demo`; nothing is trained."""

import json

import numpy as np

from instruct_jax.labeling import importing, research, store
from instruct_jax.miniature import labelers, tasks, world


def fill(the_store: store.Store) -> None:
  """Adds batches of every kind of task to a database that has none."""
  config = the_store.config
  if research.progress(the_store):
    return
  the_world = world.make_world(config.seed)
  rng = np.random.default_rng([config.seed, 8])
  count = config.demo_tasks
  written = tasks.write_prompts(the_world, 2 * count + 60, rng)
  prompts = [prompt for prompt in written if not prompt.metadata['dirt']]

  def item(prompt, number):
    return {
      'id': prompt.id,
      'prompt': prompt.text,
      'user': prompt.user,
      'category': prompt.category,
      'metadata': prompt.metadata,
      'completions': labelers.realistic_completions(
        prompt, the_world, rng, number
      ),
      'models': [f'draft {i}' for i in range(number)],
    }

  def bare(prompt):
    found = item(prompt, 1)
    del found['completions'], found['models']
    return found

  ranked = [item(p, int(rng.integers(4, 7))) for p in prompts[:count]]
  others = prompts[count:]
  person = 'Somebody who keeps animals wants help with daily work.'
  styles = [
    {'prompt': 'Any task you like.', 'style': 'plain'},
    {'prompt': 'One instruction with examples.', 'style': 'few-shot'},
    {'prompt': person, 'style': 'user-based'},
  ]
  for name, kind, phase, items in (
    ('Rank answers', 'ranking', 'training', ranked),
    ('Final evaluation', 'rating', 'evaluation',
     [item(p, 2) for p in others[:4]]),
    ('Demonstrations', 'demonstration', 'training',
     [bare(p) for p in others[4:10]]),
    ('New prompts', 'prompt', 'training', styles),
    ('Continuations', 'toxicity', 'toxicity',
     [item(p, 3) for p in others[10:13]]),
    ('Screening: rank', 'ranking', 'training',
     [item(p, 4) for p in others[13:17]]),
    ('Screening: write', 'demonstration', 'training',
     [bare(p) for p in others[17:19]]),
  ):  # fmt: skip
    importing.import_tasks(
      the_store,
      '\n'.join(map(json.dumps, items)).encode(),
      source='demo',
      name=name,
      kind=kind,
      phase=phase,
      overlap=2,
      screening=name.startswith('Screening'),
    )
