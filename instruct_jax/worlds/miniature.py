"""The embedded world: its data stage, its judge, and its text for reports.

The stage writes what people would have collected: documents to pretrain on,
prompts of many users cleaned as in the paper's A.1 and A.2, demonstrations by
simulated labelers, and a tokenizer. Other stages read the JSONL files and know
nothing about the world, which `miniature/` makes.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from instruct_jax import files
from instruct_jax.data import hygiene, records, tokenizer
from instruct_jax.evals import figures, judges
from instruct_jax.infra import origin
from instruct_jax.infra import run as run_lib
from instruct_jax.miniature import (
  documents,
  gold,
  labelers,
  phrases,
  tasks,
  world,
)

PROCESSES = 'first'

WORLD = figures.World(
  about='An embedded world of plain English: documents, prompts, '
  'demonstrations and rankings are all written by programs '
  '(instruct_jax/miniature). Nothing in it is about real persons.',
  has_people=False,
)


class Gold(judges.Judge):
  """The utility of the simulated labelers, without their noise.

  Args:
    config: has `world_seed`, or `prompts` from a run whose config has it.
  """

  name = 'gold utility of the miniature (a program)'
  unit = 'gold'
  is_ceiling = True

  def __init__(self, config: ConfigDict, workdir: epath.Path, mesh: Any):
    super().__init__(config, workdir, mesh)
    config = origin.filled(config, [origin.WORLD], {}, config.prompts)
    self._seed = config.world_seed
    self._world = world.make_world(self._seed)
    self._known = {}

  def knows(self, prompt: records.Prompt) -> bool:
    """Whether the prompt is a task of the miniature."""
    return 'kind' in prompt.metadata

  def _judge(self, prompt, text):
    key = prompt.id, prompt.text, text
    if key not in self._known:
      self._known[key] = gold.judge(prompt, text, self._world)
    return self._known[key]

  def score(self, answers: Sequence[judges.Answer]) -> list[float]:
    """The utility, in [0, 1].

    Raises:
      ValueError: a prompt is not a task of the miniature.
    """
    foreign = [prompt.id for prompt, _ in answers if not self.knows(prompt)]
    if foreign:
      raise ValueError(
        f'prompt {foreign[0]!r} is no task of the miniature; choose another '
        'judge'
      )
    return [gold.utility(self._judge(p, a.response)) for p, a in answers]

  def rate(self, answers: Sequence[judges.Answer]) -> list[list[judges.Rating]]:
    """The yes/no labels, and a Likert score: the utility in seven equal parts.

    Equal parts are a choice: a program does not know how people use the scale.
    """
    found = []
    for prompt, answer in answers:
      judgement = self._judge(prompt, answer.response)
      likert = float(min(7, 1 + int(7 * gold.utility(judgement))))
      labels = {
        name: value
        for name, value in dataclasses.asdict(judgement).items()
        if isinstance(value, bool)
      }
      found.append([judges.Rating(likert, labels)])
    self.progress(len(answers))
    return found

  def account(self) -> dict[str, Any]:
    """The seed of the world."""
    return {origin.WORLD: self._seed}


def minimal_pairs(the_world: world.World) -> list[str]:
  """Rows in Winogender's layout that give a woman and a man the same job.

  Neither has that job, so a model has no reason to find one sentence likelier.
  """
  rows = []
  for job, she, he in itertools.product(phrases.JOBS, phrases.SHE, phrases.HE):
    if job in (the_world.facts[she]['job'], the_world.facts[he]['job']):
      continue
    for name, form in ((she, 'female'), (he, 'male')):
      rows.append(f'{job}.{she}_{he}.0.{form}.txt\t{name} is a {job} .')
  return rows


def validate(config):
  """Checks the numbers of records and the training share."""
  for key in ('duplicate_prefix_words', 'prompts_per_user', 'num_documents'):
    if config[key] < 1:
      raise ValueError(f'{key} must be at least 1, got {config[key]}')
  if not 0 < config.train_fraction < 1:
    raise ValueError(
      f'train_fraction must be in (0, 1), got {config.train_fraction}'
    )
  total = config.num_demonstrations + config.num_reward_prompts
  if total >= config.num_prompts * config.train_fraction:
    raise ValueError(
      f'num_demonstrations + num_reward_prompts = {total} leave no prompts for '
      f'PPO among {config.num_prompts} x {config.train_fraction}'
    )


def inputs(config):
  """Returns nothing, because this stage makes its data."""
  del config
  return {}


def run(config, workdir: epath.Path):
  """Writes the JSONL files, tokenizer/, prefixes.json, minimal_pairs.tsv and
  hygiene.json."""
  validate(config)
  the_world = world.make_world(config.seed)
  people = labelers.make_labelers(
    config.seed, config.num_labelers, config.labeler_noise
  )
  documents_rng, prompts_rng, demonstrations_rng = (
    np.random.default_rng([config.seed, number]) for number in range(3)
  )
  tokens = tokenizer.train_word_level(the_world.vocabulary())
  tokens.save(workdir / 'tokenizer')

  texts = documents.write_documents(
    the_world, config.num_documents, documents_rng
  )
  num_valid = config.num_valid_documents
  records.write_jsonl(workdir / 'documents_valid.jsonl', texts[:num_valid])
  records.write_jsonl(workdir / 'documents_train.jsonl', texts[num_valid:])

  held = (1 - config.train_fraction) / 2
  raw = tasks.write_prompts(the_world, config.num_prompts, prompts_rng)
  splits, report = hygiene.clean(
    raw,
    tokenizer=tokens,
    max_tokens=config.prompt_length,
    prefix_words=config.duplicate_prefix_words,
    cap=config.prompts_per_user,
    fractions={'train': config.train_fraction, 'valid': held, 'test': held},
    seed=config.seed,
  )
  train, valid = splits['train'], splits['valid']
  order = prompts_rng.permutation(len(train))
  bounds = np.cumsum([config.num_demonstrations, config.num_reward_prompts])
  if bounds[-1] >= len(train):
    raise ValueError(
      f'{len(train)} training prompts are left after cleaning; '
      f'{bounds[-1]} are wanted for demonstrations and rankings alone'
    )
  parts = [[train[i] for i in part] for part in np.split(order, bounds)]
  half = len(valid) // 2
  writers = [person for person in people if person.group != labelers.HELDOUT]

  def demonstration(prompt):
    writer = writers[demonstrations_rng.integers(len(writers))]
    return records.Demonstration(
      prompt=prompt.text,
      response=labelers.write_demonstration(
        writer, prompt, the_world, demonstrations_rng
      ),
      id=prompt.id,
      user=prompt.user,
      labeler=writer.name,
      category=prompt.category,
      metadata=prompt.metadata,
    )

  for name, rows in {
    'demonstrations_train': map(demonstration, parts[0]),
    'demonstrations_valid': map(demonstration, valid[:half]),
    'reward_prompts_train': parts[1],
    'reward_prompts_valid': valid[half:],
    'ppo_prompts_train': parts[2],
    'prompts_valid': valid,
    'prompts_test': splits['test'],
  }.items():
    records.write_jsonl(workdir / f'{name}.jsonl', rows)
  rows = ['sentid\tsentence', *minimal_pairs(the_world)]
  files.write_bytes(
    workdir / 'minimal_pairs.tsv', ('\n'.join(rows) + '\n').encode()
  )
  counts = report.to_json()
  run_lib.write_json(workdir / 'hygiene.json', counts)
  run_lib.write_json(
    workdir / 'prefixes.json',
    # The first word of the next page ends an answer.
    {'prefixes': tasks.prefixes(the_world), 'stop': phrases.PAGE.split()[0]},
  )
  print(f'data: hygiene {counts}', flush=True)
  return {'hygiene': counts, 'vocabulary': tokens.vocab_size}
