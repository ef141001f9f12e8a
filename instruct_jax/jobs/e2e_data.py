"""Writes the data sets of the restaurant variant, from files of real data.

Books to pretrain on, people's sentences for facts about restaurants, and crowd
workers' rankings of five systems' sentences; `instruct_jax.data.e2e` says what
is in them and how they are split. Everything after this stage reads the JSONL
files and knows nothing of restaurants.
"""

import numpy as np
from etils import epath

from instruct_jax.data import e2e, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import run as run_lib

PROCESSES = 'first'

FOLDERS = ('e2e_nlg', 'e2e_rankings', 'books')
NUM_PREFIXES = 8
# What ends an example. No sentence has a line feed, so it is the stop as well.
STOP = '\n'


def validate(config):
  run_lib.check_choice(config, 'criteria', ('quality', 'naturalness'))
  if not config.root:
    raise ValueError(
      'the data root is not given; set --config.data.root=DIR with '
      + ', '.join(FOLDERS)
    )


def inputs(config):
  """What this stage reads, by config key."""
  return {f'root/{name}': f'{config.root}/{name}' for name in FOLDERS}


def run(config, workdir: epath.Path):
  validate(config)
  hygiene = e2e.write_e2e(
    config.root,
    workdir,
    seed=config.seed,
    vocab_size=config.vocab_size or None,
    criteria=tuple(config.criteria),
    words_per_document=config.words_per_document,
    valid_documents=config.valid_documents,
  )
  prefixes = make_prefixes(
    records.read_jsonl(
      workdir / 'demonstrations_train.jsonl', records.Demonstration
    ),
    tokenizer_lib.Tokenizer.load(workdir / 'tokenizer'),
    config.prefix_length,
    config.seed,
  )
  run_lib.write_json(
    workdir / 'prefixes.json', {'prefixes': prefixes, 'stop': STOP}
  )
  print(f'data: {hygiene["records"]}', flush=True)
  return {'hygiene': hygiene, 'vocabulary': hygiene['vocab_size']}


def make_prefixes(
  demonstrations: list[records.Demonstration],
  tokenizer: tokenizer_lib.Tokenizer,
  prefix_length: int,
  seed: int,
) -> list[str]:
  """Few-shot prefixes of two or three training examples, for the GPT baseline.

  Facts, their sentence, a blank line; and so on; then the slot `{prompt}`.

  Args:
    demonstrations: of the training split.
    tokenizer: counts the tokens.
    prefix_length: the most tokens of a prefix without what fills its slot.
    seed: of the examples and their order.

  Returns:
    `NUM_PREFIXES` texts; no two examples of one have the same facts.

  Raises:
    ValueError: no examples are short enough.
  """
  rng = np.random.default_rng([seed, 0])
  texts = [f'{d.prompt}{d.response}{2 * STOP}' for d in demonstrations]
  lengths = np.array([len(ids) for ids in tokenizer.encode_batch(texts)])
  prefixes = []
  for number in range(NUM_PREFIXES):
    num_examples = 2 + number % 2
    chosen = []
    # An even share for each keeps the sum within the limit.
    for i in rng.permutation(
      np.flatnonzero(lengths <= prefix_length // num_examples)
    ):
      if all(
        demonstrations[i].prompt != demonstrations[j].prompt for j in chosen
      ):
        chosen.append(i)
      if len(chosen) == num_examples:
        break
    else:
      raise ValueError(
        f'no {num_examples} training examples fit into {prefix_length} '
        'tokens; raise prefix_length'
      )
    prefixes.append(''.join(texts[i] for i in chosen) + '{prompt}')
  return prefixes
