"""Sentiment: a language model continues text, and positive text is rewarded.

This was the first demonstration of RL from human preferences on language models
(Ziegler et al. 2019, section 3.1), and is TRL's, too. The reward is the
probability of 'positive', from 0 to 1, by a classifier of reviews: a logistic
regression on n-grams, trained here on the labels of SST-2 (Socher et al. 2013).
Prompts are openings of passages of books, or of any other text.
"""

import functools
import json
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from instruct_jax.data import records, sources
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import figures, win_rate
from instruct_jax.evals.benchmarks import tasks, text_judges
from instruct_jax.infra import run as run_lib

PROCESSES = 'first'

CLASSIFIER_FILE = 'classifier.json'
_PENALTY = 0.1  # On the classifier's weights; chosen on held-out labels.


# --- The classifier -----------------------------------------------------------


def train_classifier(path: epath.PathLike) -> text_judges.Classifier:
  """Trains the classifier on an SST-2 file of `sentence<TAB>label` lines.

  Raises:
    RecordError: the file is missing or not of this form.
  """
  texts, labels = zip(*tasks.sst_rows(path), strict=True)
  features = list(map(text_judges.text_features, texts))
  return text_judges.fit(features, labels, _PENALTY)


def save_classifier(
  path: epath.PathLike, classifier: text_judges.Classifier
) -> None:
  """Writes a classifier as JSON: feature -> [rarity, weight], and the bias."""
  columns = zip(
    classifier.columns,
    classifier.rarity.tolist(),
    classifier.weights.tolist(),
    strict=True,
  )
  found = {name: values for name, *values in columns}
  content = {'bias': classifier.bias, 'features': found}
  records.write_bytes(path, json.dumps(content).encode())


@functools.lru_cache(maxsize=2)
def load_classifier(path: str) -> text_judges.Classifier:
  """Loads a classifier that `save_classifier` wrote."""
  content = records.read_json(path)
  features = content['features']
  rarity, weights = np.array(list(features.values())).T
  columns = {name: number for number, name in enumerate(features)}
  return text_judges.Classifier(columns, rarity, weights, content['bias'])


def positive(
  prompts: list[str],
  responses: list[str],
  metadata: list[dict[str, Any]],
  file: str,
) -> np.ndarray:
  """P(positive) of each response, for use as `reward_fn` and as judge.

  Args:
    prompts: not used: the policy is not responsible for its prompt.
    responses: one per prompt.
    metadata: not used.
    file: the classifier's file, given after the function's name: NAME@FILE.
  """
  del prompts, metadata
  features = list(map(text_judges.text_features, responses))
  return load_classifier(file).probabilities(features)


WORLD = figures.World(
  about='Continuations of openings of books; a classifier of the sentiment of '
  'film reviews (SST-2) scores them, and simulated labelers rank them by it.',
  has_people=False,
)


# --- The data stage -----------------------------------------------------------


def validate(config: ConfigDict) -> None:
  """Checks the numbers of prompts, their tokens, and words per document."""
  keys = [f'num_{split}_prompts' for split in ('train', 'valid', 'test')]
  for key in (*keys, 'num_prompt_tokens', 'words_per_document'):
    if config[key] < 1:
      raise ValueError(f'{key} must be at least 1, got {config[key]}')


def inputs(config: ConfigDict) -> dict[str, str]:
  """What this stage reads, by config key."""
  keys = ['model', 'documents', 'labels']
  keys += ['valid_labels'] * bool(config.valid_labels)
  return {key: config[key] for key in keys}


def make_prompts(
  config: ConfigDict, tokenizer: tokenizer_lib.Tokenizer
) -> list[records.Prompt]:
  """Openings of pieces of text, `num_prompt_tokens` ids each, shuffled.

  Raises:
    ValueError: there are fewer than the config asks for.
  """
  files = sources.document_files(config.documents)
  if unread := sources.unread(files, config.documents):
    run_lib.say(f'{config.name}: documents: {unread}')
  documents = sources.read_documents(
    config.documents, words_per_document=config.words_per_document
  )
  order = np.random.default_rng([config.seed, 1]).permutation(len(documents))
  wanted = sum(
    config[f'num_{split}_prompts'] for split in ('train', 'valid', 'test')
  )
  num_tokens = config.num_prompt_tokens - len(tokenizer.prefix_ids)
  found = {}
  for number in order:
    if len(found) == wanted:
      return list(found.values())
    ids = tokenizer.encode(documents[number].text)
    if len(ids) <= num_tokens:
      continue
    text = tokenizer.decode(ids[:num_tokens])
    # A cut inside a character, or before a merge, changes the ids.
    if tokenizer.encode(text) == ids[:num_tokens]:
      found.setdefault(text, records.Prompt(id=f'p{len(found)}', text=text))
  raise ValueError(
    f'documents: {len(documents)} pieces give {len(found)} different openings '
    f'of {config.num_prompt_tokens} tokens; {wanted} are wanted'
  )


def run(config: ConfigDict, workdir: epath.Path) -> dict[str, Any]:
  """Writes prompts_*.jsonl, tokenizer/ and the classifier.

  Returns:
    Numbers of prompts, and the classifier's accuracy on held-out labels.
  """
  validate(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.model).with_format('', ())
  prompts = make_prompts(config, tokenizer)
  tokenizer.save(workdir / 'tokenizer')
  counts, start = {}, 0
  for split in ('train', 'valid', 'test'):
    number = config[f'num_{split}_prompts']
    counts[split] = number
    records.write_jsonl(
      workdir / f'prompts_{split}.jsonl', prompts[start : start + number]
    )
    start += number
  classifier = train_classifier(config.labels)
  save_classifier(workdir / CLASSIFIER_FILE, classifier)
  if config.valid_labels:
    texts, labels = zip(*tasks.sst_rows(config.valid_labels), strict=True)
    features = list(map(text_judges.text_features, texts))
    right = (classifier.logits(features) > 0) == np.array(labels, bool)
    accuracy = win_rate.share_interval(
      right.astype(float), list(range(len(right))), num_bootstrap=1000
    )
    counts['accuracy'] = [accuracy.mean, accuracy.low, accuracy.high]
    run_lib.say(
      f'{config.name}: the classifier is right on {accuracy.mean:.3f} '
      f'[{accuracy.low:.3f}, {accuracy.high:.3f}] of {len(right)} held-out '
      'labels'
    )
  return counts
