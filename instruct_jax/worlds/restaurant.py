"""Restaurants, the E2E data: their data stage, and what a report says of them.

Books to pretrain on, people's sentences for facts about restaurants, and crowd
workers' rankings of five systems' sentences; `data/restaurant.py` says what is
in them and how they are split. Other stages read the JSONL files and know
nothing of restaurants. The judge is a second reward model, trained on the
rankings of the other half of the workers.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from instruct_jax import judge_fns
from instruct_jax.data import records
from instruct_jax.data import restaurant as data
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import figures, restaurant
from instruct_jax.infra import run as run_lib

PROCESSES = 'first'

FOLDERS = ('e2e_nlg', 'e2e_rankings', 'books')
NUM_PREFIXES = 8
# What ends an example. No sentence has a line feed, so it is the stop as well.
STOP = '\n'


class OtherWorkers(judge_fns.RewardModel):
  """A reward model that the other half of the workers taught."""

  def __init__(self, *args):
    super().__init__(*args)
    self.name = (
      'a second reward model (no person), trained on the other half of the '
      'workers'
    )


def label_answer(prompt: records.Prompt, text: str) -> dict[str, bool]:
  """Whether an answer says all of its facts, and no others."""
  found = restaurant.slot_report(prompt.metadata['slots'], text)
  return {
    'says every slot': not found.missing,
    'invents a value (hallucination)': bool(found.invented),
  }


def make_tables(
  prompts: Sequence[records.Prompt], texts: Mapping[str, Sequence[str]]
) -> dict[str, figures.Rows]:
  """Slot errors and BLEU of each model, and of what people wrote.

  Args:
    prompts: of each answer.
    texts: model -> its answers.
  """
  slots = [prompt.metadata['slots'] for prompt in prompts]
  ids = [prompt.id for prompt in prompts]
  with_references = [
    i for i, prompt in enumerate(prompts) if prompt.metadata['references']
  ]
  references = [prompts[i].metadata['references'] for i in with_references]
  reference_ids = [ids[i] for i in with_references]
  table = {
    name: {
      'BLEU': restaurant.bleu(
        [several[i] for i in with_references], references, reference_ids
      ),
      **slot_columns(slots, several, ids),
    }
    for name, several in texts.items()
  }
  # What people wrote for the same facts, as the measure of the measure.
  written = [
    (slots[i], text, ids[i])
    for i, several in zip(with_references, references, strict=True)
    for text in several
  ]
  table['people'] = slot_columns(*zip(*written, strict=True))
  return {'Slots and BLEU': table}


def slot_columns(slots, texts, ids):
  """Column -> rate with its interval; see `restaurant.slot_rates`."""
  rates = restaurant.slot_rates(slots, texts, ids)
  return {
    'slots realised': rates.realised,
    'values invented': rates.invented,
    'answers with an invention': rates.invented_answers,
    'answers without any slot error': rates.faithful,
  }


WORLD = figures.World(
  about='Restaurant facts with sentences written by crowd workers (E2E), and '
  'their rankings of system outputs; books as pretraining text.',
  has_people=True,
  label_fn=label_answer,
  tables_fn=make_tables,
)


def validate(config):
  """Checks the criteria, and that the data are given."""
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
  """Writes the JSONL files, tokenizer/, prefixes.json and hygiene.json."""
  validate(config)
  hygiene = data.write(
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
