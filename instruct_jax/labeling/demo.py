"""Tasks of the embedded world for `--demo`; nothing is trained."""

import json

import numpy as np

from instruct_jax.labeling import research, store
from instruct_jax.miniature import labelers, tasks, world


def _lines(items):
  return '\n'.join(json.dumps(item) for item in items).encode()


def fill(the_store: store.Store) -> None:
  """Batches of every kind of task, where the database has none."""
  config = the_store.config
  if research.progress(the_store):
    return
  the_world = world.make_world(config.seed)
  rng = np.random.default_rng([config.seed, 8])
  prompts = [
    prompt
    for prompt in tasks.write_prompts(
      the_world, 2 * config.demo_tasks + 60, rng
    )
    if not prompt.metadata['dirt']
  ]

  def item(prompt, number):
    texts = labelers.realistic_completions(prompt, the_world, rng, number)
    return {
      'id': prompt.id,
      'prompt': prompt.text,
      'user': prompt.user,
      'category': prompt.category,
      'completions': texts,
      'models': [f'draft {i}' for i in range(number)],
      'metadata': prompt.metadata,
    }

  def bare(prompt):
    found = item(prompt, 1)
    return {
      k: v for k, v in found.items() if k not in ('completions', 'models')
    }

  count = config.demo_tasks
  ranked = [item(p, int(rng.integers(4, 7))) for p in prompts[:count]]
  rest = prompts[count:]
  styles = [
    {'prompt': 'Any task you like.', 'style': 'plain'},
    {'prompt': 'One instruction with examples.', 'style': 'few-shot'},
    {
      'prompt': 'Somebody who keeps animals wants help with daily work.',
      'style': 'user-based',
    },
  ]
  for name, kind, phase, items, screening in (
    ('Rank answers', 'ranking', 'training', ranked, False),
    ('Final evaluation', 'rating', 'evaluation',
     [item(p, 2) for p in rest[:4]], False),
    ('Demonstrations', 'demonstration', 'training',
     [bare(p) for p in rest[4:10]], False),
    ('New prompts', 'prompt', 'training', styles, False),
    ('Continuations', 'toxicity', 'toxicity',
     [item(p, 3) for p in rest[10:13]], False),
    ('Screening: rank', 'ranking', 'training',
     [item(p, 4) for p in rest[13:17]], True),
    ('Screening: write', 'demonstration', 'training',
     [bare(p) for p in rest[17:19]], True),
  ):  # fmt: skip
    research.import_tasks(
      the_store,
      _lines(items),
      source='demo',
      name=name,
      kind=kind,
      phase=phase,
      overlap=2,
      screening=screening,
    )
