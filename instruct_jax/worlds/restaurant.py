"""The restaurant world (E2E data): its data stage and its tables for reports.

The data are books to pretrain on, people's sentences for facts about
restaurants, and crowd workers' rankings of five systems' sentences;
`data/restaurant.py` describes and splits them. Other stages read the JSONL
files and know nothing about restaurants. The judge is a second reward model,
trained on the rankings of the other half of the workers.
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
# Ends an example and, because no sentence has a line feed, an answer.
STOP = '\n'


class OtherWorkers(judge_fns.RewardModel):
  """A reward model trained on the rankings of the other half of the workers."""

  def __init__(self, *args):
    super().__init__(*args)
    self.name = (
      'a second reward model (no person), trained on the other half of the '
      'workers'
    )


def label_answer(prompt: records.Prompt, text: str) -> dict[str, bool]:
  """Whether an answer states every slot, and whether it invents a value."""
  found = restaurant.slot_report(prompt.metadata['slots'], text)
  return {
    'says every slot': not found.missing,
    'invents a value (hallucination)': bool(found.invented),
  }


def make_tables(
  prompts: Sequence[records.Prompt], texts: Mapping[str, Sequence[str]]
) -> dict[str, figures.Rows]:
  """Slot errors and BLEU of each model, and slot errors of people's sentences.

  `texts` maps a model to its answers, one per prompt.
  """
  slots = [prompt.metadata['slots'] for prompt in prompts]
  ids = [prompt.id for prompt in prompts]
  references = {
    i: prompt.metadata['references']
    for i, prompt in enumerate(prompts)
    if prompt.metadata['references']
  }
  reference_ids = [ids[i] for i in references]
  table = {
    name: {
      'BLEU': restaurant.bleu(
        [several[i] for i in references],
        list(references.values()),
        reference_ids,
      ),
      **_slot_columns(slots, several, ids),
    }
    for name, several in texts.items()
  }
  # People's sentences for the same facts show what scores are attainable.
  written = [
    (slots[i], text, ids[i])
    for i, several in references.items()
    for text in several
  ]
  table['people'] = _slot_columns(*zip(*written, strict=True))
  return {'Slots and BLEU': table}


def _slot_columns(slots, texts, ids):
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
  """Checks the criteria and the data root."""
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

  Each example is its facts, their sentence and a blank line. No two examples of
  a prefix have the same facts, and together they have at most `prefix_length`
  tokens. `{prompt}` ends the prefix.

  Raises:
    ValueError: too few examples are short enough.
  """
  rng = np.random.default_rng([seed, 0])
  texts = [f'{d.prompt}{d.response}{2 * STOP}' for d in demonstrations]
  lengths = np.array([len(ids) for ids in tokenizer.encode_batch(texts)])
  prefixes = []
  for number in range(NUM_PREFIXES):
    num_examples = 2 + number % 2
    # An even share for each example keeps the sum within the limit.
    short = np.flatnonzero(lengths <= prefix_length // num_examples)
    chosen = {}  # Facts -> example.
    for i in rng.permutation(short):
      chosen.setdefault(demonstrations[i].prompt, texts[i])
      if len(chosen) == num_examples:
        break
    else:
      raise ValueError(
        f'no {num_examples} training examples fit into {prefix_length} '
        'tokens; raise prefix_length'
      )
    prefixes.append(''.join([*chosen.values(), '{prompt}']))
  return prefixes
