"""Collects comparisons: K answers per prompt, ranked by simulated labelers.

Paper 3.1 and 3.4: answers come from several models, mostly the SFT model, K is
between 4 and 9. Validation prompts are ranked by several labelers, which gives
the agreement figures, and once more by held-out ones.
"""

import functools

import jax
import numpy as np
from etils import epath

from instruct_jax import model_fns, model_folder, queries, rollout
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import run as run_lib
from instruct_jax.infra import sharding
from instruct_jax.miniature import labelers, world
from instruct_jax.models.config import check_stage

PROCESSES = 'all'


def validate(config):
  check_stage(config)
  if not 2 <= config.min_candidates <= config.max_candidates:
    raise ValueError(
      f'need 2 <= min_candidates ({config.min_candidates}) <= max_candidates '
      f'({config.max_candidates})'
    )
  shares = {name: each.share for name, each in config.policies.items()}
  if not shares or min(shares.values()) <= 0:
    raise ValueError(
      f'policies: every share must be above 0, got {shares}; leave a policy '
      'out to sample nothing from it'
    )
  most = labelers.num_training(config.num_labelers)
  for key in ('rankers_per_prompt', 'rankers_per_valid'):
    if not 1 <= config[key] <= most:
      raise ValueError(
        f'{key} must be from 1 to {most}, the training labelers among '
        f'{config.num_labelers}, got {config[key]}'
      )
  for name, each in config.policies.items():
    if each.temperature < 0:
      raise ValueError(
        f'policies.{name}.temperature must not be negative (0 takes '
        f'the most probable token), got {each.temperature}'
      )


def inputs(config):
  """What this stage reads, by config key."""
  found = {
    key: config[key] for key in ('tokenizer', 'prompts', 'valid_prompts')
  }
  for name, each in config.policies.items():
    found[f'policies.{name}.model'] = each.model
  return found


def run(config, workdir: epath.Path):
  validate(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  the_world = world.make_world(config.seed)
  people = labelers.make_labelers(
    config.seed, config.num_labelers, config.labeler_noise
  )
  training = [p for p in people if p.group != labelers.HELDOUT]
  heldout = [p for p in people if p.group == labelers.HELDOUT]
  mesh = sharding.make_mesh(config.mesh)
  key = jax.random.key(config.seed)

  with sharding.use_mesh(mesh):
    policies = [
      model_folder.load(
        each.model,
        'policy',
        mesh,
        tokenizer,
        compute_dtype=config.compute_dtype,
      )
      for each in config.policies.values()
    ]
    for policy in policies:
      model_fns.check_context(
        policy,
        config.prompt_length + config.response_length,
        'prompt_length + response_length',
      )
    generators = [
      queries.generate_program(
        policy.module,
        config.response_length,
        tokenizer.stop_ids,
        each.temperature,
        num_slots=config.batch_size,
      )
      for policy, each in zip(policies, config.policies.values(), strict=True)
    ]
    shares = np.array([each.share for each in config.policies.values()])
    bounds = np.cumsum(shares / shares.sum())
    bounds[-1] = 1.0  # Whatever the rounding.

    def draw_sources(size, rng):
      """Systematic sampling: each policy's count is its share, rounded."""
      points = (np.arange(size) + rng.random()) / size
      return rng.permutation(np.searchsorted(bounds, points, side='right'))

    def sample(generate, params, key, batch):
      batch = sharding.put_whole(batch, mesh)
      return sharding.fetch(generate(params, batch, key))

    def collect(name, path, number):
      """Prompts with K sampled completions each, K drawn per prompt.

      The policies share a prompt's completions as evenly as K allows, in
      random order.
      """
      prompts = records.read_jsonl(path, records.Prompt)
      rng = np.random.default_rng([config.seed, number])
      sizes = rng.integers(
        config.min_candidates, config.max_candidates + 1, len(prompts)
      )
      owners = np.repeat(np.arange(len(prompts)), sizes)
      sources = np.concatenate([draw_sources(size, rng) for size in sizes])
      texts = [None] * len(owners)
      with run_lib.Progress(f'compare {name}', len(owners)) as progress:
        for source, policy in enumerate(policies):
          mine = np.flatnonzero(sources == source)
          if not len(mine):
            continue
          rows, _ = loader.prompt_rows(
            [prompts[owners[i]] for i in mine], tokenizer, config.prompt_length
          )
          sampled = rollout.in_queues(
            functools.partial(
              sample,
              generators[source],
              policy.params,
              jax.random.fold_in(key, number + 100 * source),
            ),
            rows,
            config.batch_size,
            progress=progress.update,
          )
          answers = tokenizer.decode_responses(rollout.response_ids(sampled))
          for row, text in zip(rows.indices, answers, strict=True):
            texts[mine[row]] = text
      # In the order drawn: the order of the answers tells nothing of the model.
      by_prompt = [[] for _ in prompts]
      for owner, text in zip(owners, texts, strict=True):
        if text is not None:  # The prompt was too long.
          by_prompt[owner].append(text)
      run_lib.say_left_out(
        config.name,
        sum(not texts for texts in by_prompt),
        len(prompts),
        f'{name} prompts',
        f'prompt_length ({config.prompt_length} tokens)',
      )
      return prompts, by_prompt

    def rank(prompts, by_prompt, rankers, per_prompt, number):
      rng = np.random.default_rng([config.seed, number])
      found = []
      for prompt, completions in zip(prompts, by_prompt, strict=True):
        if len(completions) < 2:
          continue
        chosen = rng.choice(len(rankers), per_prompt, replace=False)
        judgements = labelers.judge_each(prompt, completions, the_world)
        for index in chosen:
          ranks = labelers.rank(rankers[index], completions, judgements, rng)
          found.append(
            records.Comparison(
              prompt=prompt.text,
              completions=tuple(completions),
              ranks=ranks,
              id=prompt.id,
              user=prompt.user,
              labeler=rankers[index].name,
              category=prompt.category,
              metadata=prompt.metadata,
              turns=prompt.turns,
            )
          )
      return found

    train = collect('train', config.prompts, 10)
    valid = collect('valid', config.valid_prompts, 11)
  sets = {
    'comparisons_train': rank(*train, training, config.rankers_per_prompt, 20),
    'comparisons_valid': rank(*valid, training, config.rankers_per_valid, 21),
    'comparisons_heldout': rank(*valid, heldout, 2, 22),
  }
  if jax.process_index() == 0:
    for name, rows in sets.items():
      records.write_jsonl(workdir / f'{name}.jsonl', rows)
  return {name: len(rows) for name, rows in sets.items()}
