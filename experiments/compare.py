"""Collects comparisons: K answers per prompt, ranked by simulated labelers.

Paper 3.1 and 3.4: answers come from several models, mostly the SFT model; K is
4 to 9. For the agreement figures, several labelers rank the answers to each
validation prompt, and so do held-out labelers.
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
  """Checks shares, counts and temperatures; errors name the key."""
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
  """The inputs of this stage: config key -> path."""
  keys = ('tokenizer', 'prompts', 'valid_prompts')
  return {key: config[key] for key in keys} | {
    f'policies.{name}.model': each.model
    for name, each in config.policies.items()
  }


def load_samplers(config, tokenizer, mesh):
  """Loads the policies; returns `sample(key, batch) -> Rollout` for each."""

  def sample(generate, params, key, batch):
    batch = sharding.put_whole(batch, mesh)
    return sharding.fetch(generate(params, batch, key))

  samplers = []
  for each in config.policies.values():
    policy = model_folder.load(
      each.model, 'policy', mesh, tokenizer, compute_dtype=config.compute_dtype
    )
    model_fns.check_context(
      policy,
      config.prompt_length + config.response_length,
      'prompt_length + response_length',
    )
    generate = queries.generate_program(
      policy.module,
      config.response_length,
      tokenizer.stop_ids,
      each.temperature,
      num_slots=config.batch_size,
    )
    samplers.append(functools.partial(sample, generate, policy.params))
  return samplers


def draw_sources(shares, sizes, rng):
  """Draws the index of a policy for each completion of each prompt.

  Systematic sampling: within a prompt, each policy's count is its share of the
  completions, rounded up or down; the order is random.

  Args:
    shares: of the policies, above 0; they need not sum to 1.
    sizes: number of completions of each prompt.
    rng: random generator.
  """
  bounds = np.cumsum(np.array(shares) / np.sum(shares))
  bounds[-1] = 1.0  # Despite rounding.

  def draw(size):
    points = (np.arange(size) + rng.random()) / size
    return rng.permutation(np.searchsorted(bounds, points, side='right'))

  return np.concatenate([draw(size) for size in sizes])


def sample_answers(config, samplers, tokenizer, prompts, name, number):
  """Samples the completions of each prompt; K is drawn for each prompt.

  A prompt that is too long gets none.

  Returns:
    For each prompt, (text, whether it ended by itself) of each completion.

  Args:
    samplers: see `load_samplers`.
    name: name of the prompts, for messages.
    number: with `config.seed`, seeds the random numbers.
  """
  rng = np.random.default_rng([config.seed, number])
  sizes = rng.integers(
    config.min_candidates, config.max_candidates + 1, len(prompts)
  )
  owners = np.repeat(np.arange(len(prompts)), sizes)
  shares = [each.share for each in config.policies.values()]
  sources = draw_sources(shares, sizes, rng)
  found = [None] * len(owners)
  with run_lib.Progress(f'compare {name}', len(owners)) as progress:
    for source, sample in enumerate(samplers):
      mine = np.flatnonzero(sources == source)
      if not len(mine):
        continue
      rows, _ = loader.prompt_rows(
        [prompts[owners[i]] for i in mine], tokenizer, config.prompt_length
      )
      key = jax.random.key(config.seed)
      key = jax.random.fold_in(key, number + 100 * source)
      sampled = rollout.in_queues(
        functools.partial(sample, key),
        rows,
        config.batch_size,
        progress=progress.update,
      )
      answers = tokenizer.decode_responses(rollout.response_ids(sampled))
      for row, *answer in zip(
        rows.indices, answers, map(bool, sampled.ended), strict=True
      ):
        found[mine[row]] = tuple(answer)
  # Completions stay in the drawn order, which is independent of the policy.
  by_prompt = [[] for _ in prompts]
  for owner, answer in zip(owners, found, strict=True):
    if answer is not None:  # The prompt was too long.
      by_prompt[owner].append(answer)
  run_lib.say_left_out(
    config.name,
    sum(not answers for answers in by_prompt),
    len(prompts),
    f'{name} prompts',
    f'prompt_length ({config.prompt_length} tokens)',
  )
  return by_prompt


def rank(the_world, prompts, by_prompt, rankers, per_prompt, rng):
  """Ranks each prompt's completions by labelers that are drawn for it.

  Args:
    the_world: the world by which the labelers judge.
    by_prompt: completions of each prompt, see `sample_answers`; fewer than two
      are not ranked.
    rankers: labelers to draw from.
    per_prompt: number of labelers per prompt.
    rng: for the draw and the labelers' noise.
  """
  found = []
  for prompt, answers in zip(prompts, by_prompt, strict=True):
    if len(answers) < 2:
      continue
    completions, ended = zip(*answers, strict=True)
    chosen = rng.choice(len(rankers), per_prompt, replace=False)
    judgements = labelers.judge_each(prompt, completions, the_world)
    found += [
      records.Comparison(
        prompt=prompt.text,
        completions=completions,
        ranks=labelers.rank(rankers[index], completions, judgements, rng),
        id=prompt.id,
        user=prompt.user,
        labeler=rankers[index].name,
        category=prompt.category,
        metadata=prompt.metadata,
        turns=prompt.turns,
        ended=ended,
      )
      for index in chosen
    ]
  return found


def run(config, workdir: epath.Path):
  """Samples and ranks answers.

  Reads the policies and the prompts; writes comparisons_train.jsonl,
  comparisons_valid.jsonl (several labelers per prompt) and
  comparisons_heldout.jsonl (the same answers as valid, held-out labelers).
  """
  validate(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  mesh = sharding.make_mesh(config.mesh)
  prompts = {
    'train': records.read_jsonl(config.prompts, records.Prompt),
    'valid': records.read_jsonl(config.valid_prompts, records.Prompt),
  }
  with sharding.use_mesh(mesh):
    samplers = load_samplers(config, tokenizer, mesh)
    answers = {
      name: sample_answers(config, samplers, tokenizer, given, name, number)
      for number, (name, given) in enumerate(prompts.items(), 10)
    }

  the_world = world.make_world(config.seed)
  people = labelers.make_labelers(
    config.seed, config.num_labelers, config.labeler_noise
  )
  training = [p for p in people if p.group != labelers.HELDOUT]
  heldout = [p for p in people if p.group == labelers.HELDOUT]
  sets = {}
  for number, (name, split, rankers, per_prompt) in enumerate(
    [
      ('train', 'train', training, config.rankers_per_prompt),
      ('valid', 'valid', training, config.rankers_per_valid),
      ('heldout', 'valid', heldout, 2),
    ],
    20,
  ):
    rng = np.random.default_rng([config.seed, number])
    sets[f'comparisons_{name}'] = rank(
      the_world, prompts[split], answers[split], rankers, per_prompt, rng
    )
  if jax.process_index() == 0:
    for name, rows in sets.items():
      records.write_jsonl(workdir / f'{name}.jsonl', rows)
  return {name: len(rows) for name, rows in sets.items()}
