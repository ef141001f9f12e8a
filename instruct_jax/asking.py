"""Asks several models the same prompts.

A model is a model folder, a published model, or a file of recorded answers.
Answers are cached under a hash of everything they depend on, so that adding a
judge or a model does not sample them again. KL and the loss on held-out text
are measured while a model is in memory.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from instruct_jax import model_fns, model_folder, queries, rollout
from instruct_jax.data import invisible, loader, records, sources
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import heldout_loss
from instruct_jax.evals import samples as samples_lib
from instruct_jax.infra import inputs, origin
from instruct_jax.infra import run as run_lib

_RECORDED = ('.jsonl', '.jsonl.gz')

PRETRAINING = 'pretraining'  # Name of the held-out text of 4.2.
_WORDS = 100  # Per piece of plain text; pieces are packed into rows.


@dataclasses.dataclass(frozen=True)
class Model:
  """A model that answers.

  Attributes:
    name: its name in the config.
    source: model folder, `hf:NAME`, or FILE.jsonl of recorded answers.
    has_columns: whether it has a column in every table, as those of `models`
      do; `other_models` appear only in the table of all models.
    is_prompted: whether it is asked with a few-shot prefix.
  """

  name: str
  source: str
  has_columns: bool
  is_prompted: bool

  @property
  def is_recorded(self) -> bool:
    """Whether its source is a file of recorded answers."""
    return self.source.partition('#')[0].endswith(_RECORDED)


def read_models(config) -> dict[str, Model]:
  """Name -> model, in the order of the config; those with columns come first.

  Raises:
    ValueError: a name is given twice, a key names a model that is not given,
      or `reference` or `prompted` names recorded answers.
  """
  prompted = [name for name in config.prompted.split(',') if name]
  found = {}
  for key in ('models', 'other_models'):
    for name, source in model_folder.named_folders(config[key], key).items():
      if name in found:
        raise ValueError(f'{name!r} is in both models and other_models')
      found[name] = Model(name, source, key == 'models', name in prompted)
  for key, names in (
    ('baseline', [config.baseline]),
    ('reference', [config.reference] * bool(config.reference)),
    ('prompted', prompted),
  ):
    unknown = sorted(set(names) - set(found))
    if unknown:
      raise ValueError(f'{key} names {unknown}; models are {list(found)}')
    recorded = [name for name in names if found[name].is_recorded]
    if recorded and key != 'baseline':
      raise ValueError(
        f'{key} names {recorded}, recorded answers, which have no model'
      )
  return found


# --- Answers ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prefix:
  """A few-shot prefix.

  Attributes:
    text: the examples, then `{prompt}`.
    stop_id: token that begins the next example, and so ends an answer.
  """

  text: str
  stop_id: int


def read_prefixes(path: str, tokenizer: tokenizer_lib.Tokenizer):
  """Reads the few-shot prefixes of a file `{"prefixes": [...], "stop": ...}`.

  Raises:
    ValueError: the file is not of this form, or the stop text is not a single
      token.
  """
  content = records.read_json(path)
  texts = content.get('prefixes') if isinstance(content, dict) else None
  if (
    not isinstance(texts, list)
    or not texts
    or not all(isinstance(text, str) and '{prompt}' in text for text in texts)
    or not isinstance(content.get('stop'), str)
  ):
    raise ValueError(
      f"{path}: expected {{'prefixes': [...], 'stop': '...'}}, with at least "
      'one prefix, each a text that contains {prompt}, and a text as stop'
    )
  stop = tokenizer.encode(content['stop'])
  if len(stop) != 1:
    raise ValueError(
      f'{path}: the stop {content["stop"]!r} has {len(stop)} tokens; choose a '
      'text that is a single token'
    )
  return [Prefix(text, stop[0]) for text in texts]


def draw(config, key: str, number: int):
  """Draws prompts from the file that a config key names.

  Returns:
    (drawn prompts, number of prompts in the file).
  """
  given = records.read_jsonl(config[key], records.Prompt)
  drawn = samples_lib.draw_prompts(given, number, config.seed)
  run_lib.say_drawn(config.name, len(drawn), len(given), key)
  return drawn, len(given)


def _prompt_rows(config, name, policy, prompts, tokenizer, prefix):
  """Rows of the prompts that fit, each after the prefix if there is one."""
  rows, dropped = loader.prompt_rows(prompts, tokenizer, config.prompt_length)
  run_lib.tell_dropped(
    f'{config.name}, {name}', dropped.describe('prompts', 'prompt_length')
  )
  if prefix is None:
    return rows
  length = config.prompt_length + config.prefix_length
  texts = [prompts[i].text for i in rows.indices]
  prefixed, dropped = loader.prompt_rows(
    [prefix.text.replace('{prompt}', text) for text in texts], tokenizer, length
  )
  if dropped.total:
    raise ValueError(
      f'a prefix and a prompt exceed {length} tokens together; raise '
      f'prefix_length ({config.prefix_length}): {prefix.text!r}'
    )
  # Only the longest row counts, since padding takes up no positions.
  model_fns.check_context(
    policy,
    int(prefixed.mask.sum(axis=1).max()) + config.response_length,
    f'the prefix {prefix.text!r}, prompt_length and response_length',
  )
  return dataclasses.replace(prefixed, indices=rows.indices)


def sample(
  config, name, policy, prompts, tokenizer, mesh, num_samples, prefix=None
):
  """Samples answers to each prompt that is short enough.

  After a few-shot prefix, an answer ends where the model begins another
  example. That token is replaced by the end token, so that the reward model
  reads a complete answer.
  """
  rows = _prompt_rows(config, name, policy, prompts, tokenizer, prefix)
  stop_ids = tokenizer.stop_ids + ((prefix.stop_id,) if prefix else ())
  sampled = queries.sample(
    policy,
    rows,
    jax.random.key(config.seed),
    mesh,
    name=name,
    stop_ids=stop_ids,
    response_length=config.response_length,
    temperature=config.temperature,
    batch_size=config.batch_size,
    num_samples=num_samples,
  )
  ids = rollout.response_ids(sampled)
  if prefix:
    ids = [
      [*answer[:-1], tokenizer.end_id] if answer[-1] in stop_ids else answer
      for answer in ids
    ]
  owners = np.repeat(rows.indices, num_samples)
  return [
    samples_lib.Sample(
      model=name,
      prompt_id=prompts[owner].id,
      prompt=prompts[owner].text,
      response=text,
      num_tokens=len(answer),
      ended=bool(ended),
      category=prompts[owner].category,
      # Scores need the sampled ids: decoding and encoding may change them.
      metadata={'ids': answer, 'tokenizer': tokenizer.fingerprint},
    )
    for owner, text, answer, ended in zip(
      owners,
      tokenizer.decode_responses(ids),
      ids,
      sampled.ended,
      strict=True,
    )
  ]


def _kept_answers(config, model, prompts, tokenizer, prefix, sample_fn):
  """(a model's answers, their origin), read from the cache or sampled."""
  keys = (*origin.LENGTHS, 'samples_per_prompt', 'temperature', 'seed')
  settings = {
    'model': inputs.content_hash(model.source),
    'tokenizer': tokenizer.fingerprint,
    'prompts': [records.to_values(prompt) for prompt in prompts],
    'prefix': prefix and dataclasses.asdict(prefix),
    'compute_dtype': config.compute_dtype,
    **{key: config[key] for key in keys},
  }
  content = json.dumps(settings, sort_keys=True).encode()
  name = f'{hashlib.sha256(content).hexdigest()[:32]}.jsonl'
  path = epath.Path(config.cache) / name
  if run_lib.agreed(path.exists()):
    # The same weights may have been cached under another name.
    return [
      dataclasses.replace(answer, model=model.name)
      for answer in samples_lib.read_samples(path)
    ], 'from the cache'
  answers = sample_fn(model.name, prompts, config.samples_per_prompt, prefix)
  if jax.process_index() == 0:
    samples_lib.write_samples(path, answers)
  return answers, 'sampled'


def _choose_prefix(config, name, prompts, tokenizer, score_fn, sample_fn):
  """The prefix with the highest mean reward (3.5), and the scores of all."""
  by_id = {prompt.id: prompt for prompt in prompts}
  prefixes, scores = read_prefixes(config.prefixes, tokenizer), []
  for number, prefix in enumerate(prefixes, start=1):
    answers = sample_fn(f'{name}, prefix {number}', prompts, 1, prefix)
    found = score_fn([(by_id[each.prompt_id], each) for each in answers])
    scores.append(float(np.mean(found)))
  best = int(np.argmax(scores))
  return prefixes[best], {
    prefix.text: {'reward model': score, 'chosen': 'yes' if i == best else ''}
    for i, (prefix, score) in enumerate(zip(prefixes, scores, strict=True))
  }


def read_recorded(model: Model, prompts, samples_per_prompt: int):
  """Reads a model's first recorded answers to each of these prompts.

  Prompts with fewer than `samples_per_prompt` answers are left out.

  Raises:
    ValueError: the file does not hold the model, or holds several and the
      source does not say which; an id belongs to another prompt; or no prompt
      has enough answers.
  """
  path, _, wanted = model.source.partition('#')
  found = samples_lib.read_samples(path)
  models = sorted({answer.model for answer in found})
  if not wanted:
    wanted = models[0] if len(models) == 1 else model.name
  if wanted not in models:
    raise ValueError(
      f'{path} holds answers of {", ".join(models)}; choose one as '
      f'{model.name}={path}#MODEL'
    )
  texts = {prompt.id: prompt.text for prompt in prompts}
  by_prompt = {prompt.id: [] for prompt in prompts}
  for answer in found:
    if answer.model == wanted and answer.prompt_id in by_prompt:
      by_prompt[answer.prompt_id].append(answer)
  chosen = [
    dataclasses.replace(answer, model=model.name)
    for several in by_prompt.values()
    if len(several) >= samples_per_prompt
    for answer in several[:samples_per_prompt]
  ]
  other = [s.prompt_id for s in chosen if s.prompt != texts[s.prompt_id]]
  if other:
    raise ValueError(
      f'{path}: {len(other)} prompts have ids of other texts than those in the '
      f'prompt file, first {other[0]!r}; give the file they were sampled from'
    )
  if not chosen:
    raise ValueError(
      f'{path}: {wanted} answers none of the {len(texts)} prompts '
      f'({samples_per_prompt} answers each)'
    )
  return chosen


# --- All of them --------------------------------------------------------------


@dataclasses.dataclass
class Asked:
  """Answers and measurements of all models.

  Attributes:
    answers: model -> its answers, in the order of the prompts.
    account: model -> origin of its answers, and counts.
    prefixes: prompted model -> few-shot prefix -> score, whether it was chosen.
    kl: model -> KL to the reference, nats per response; see `figures.Figures`.
    text_loss: held-out text -> model -> (loss, fingerprint of the tokenizer).
  """

  answers: dict[str, list[samples_lib.Sample]]
  account: dict[str, dict[str, Any]]
  prefixes: dict[str, dict]
  kl: dict[str, dict[str, float]]
  text_loss: dict[str, dict[str, tuple[heldout_loss.HeldoutLoss, str]]]


def ask(config, models: Mapping[str, Model], prompts, score_fn, mesh) -> Asked:
  """Asks every model in turn.

  At most two models are in memory: the current one and the reference.
  """

  @functools.cache
  def tokenizer_of(source):
    return queries.tokenizer_of(source, config.tokenizer, chat=True)

  @functools.lru_cache(maxsize=2)
  def load(source):
    return queries.load_policy(
      source, tokenizer_of(source), mesh, compute_dtype=config.compute_dtype
    )

  def sample_from(source, name, prompts, num_samples, prefix):
    policy, tokenizer = load(source), tokenizer_of(source)
    return sample(
      config, name, policy, prompts, tokenizer, mesh, num_samples, prefix
    )

  # Read before anything is sampled, since a file may be bad.
  texts = read_texts(config)
  found = Asked({}, {}, {}, {}, {kind: {} for kind in texts})
  prefix_prompts = ()
  if any(model.is_prompted for model in models.values()):
    prefix_prompts, _ = draw(
      config, 'prefix_prompts', config.num_prefix_prompts
    )
  reference = models[config.reference] if config.reference else None
  for name, model in models.items():
    if model.is_recorded:
      answers = read_recorded(model, prompts, config.samples_per_prompt)
      how, read = 'recorded', 'recorded; how it was asked is not known'
    else:
      tokenizer = tokenizer_of(model.source)
      sample_fn = functools.partial(sample_from, model.source)
      read, prefix = tokenizer.describe(), None
      if model.is_prompted:
        prefix, found.prefixes[name] = _choose_prefix(
          config, name, prefix_prompts, tokenizer, score_fn, sample_fn
        )
      answers, how = _kept_answers(
        config, model, prompts, tokenizer, prefix, sample_fn
      )
      for kind, documents in texts.items() if not model.is_prompted else ():
        loss = _text_loss(
          config,
          f'{kind}, {name}',
          documents,
          load(model.source),
          tokenizer,
          mesh,
        )
        found.text_loss[kind][name] = loss, tokenizer.fingerprint
      if (
        reference
        and not model.is_prompted
        and name != reference.name
        and tokenizer_of(reference.source).fingerprint == tokenizer.fingerprint
      ):
        # The reference is loaded last, so that it stays in the LRU cache.
        policies = load(model.source), load(reference.source)
        signed, k3 = queries.kl_of_answers(
          config, *policies, prompts, answers, tokenizer, mesh
        )
        found.kl[name] = {
          'signed mean': float(np.mean(signed)),
          'k3': float(np.mean(k3)),
        }
    found.answers[name] = answers
    num_answered = len(answers) // config.samples_per_prompt
    found.account[name] = {
      'from': how,
      'asked with': read,
      'answers': len(answers),
      'prompts without': len(prompts) - num_answered,
      'blank': sum(invisible.is_blank(answer.response) for answer in answers),
      'not ended': sum(not answer.ended for answer in answers),
      'mean tokens': float(np.mean([answer.num_tokens for answer in answers])),
    }
  return found


def texts_of(config) -> dict[str, str]:
  """Name of each held-out text -> its file."""
  return model_folder.named_files(config.documents, 'documents', PRETRAINING)


def read_texts(config) -> dict[str, list[records.Document]]:
  """Name of each held-out text -> its documents."""
  found = {}
  for name, path in texts_of(config).items():
    if unread := sources.unread(sources.document_files(path), path):
      run_lib.say(f'{config.name}: {name}: {unread}')
    found[name] = sources.read_documents(path, words_per_document=_WORDS)
  return found


def _text_loss(
  config, name, documents, policy, tokenizer, mesh
) -> heldout_loss.HeldoutLoss:
  """A policy's loss on documents; `name` is shown in the progress bar."""
  model_fns.check_context(policy, config.row_length, 'row_length')
  rows = loader.pack_documents(
    tokenizer.encode_documents([document.text for document in documents]),
    config.row_length,
    tokenizer.eos_id,
    tokenizer.pad_id,
  )
  with run_lib.Progress(
    f'loss on {name}', len(rows.tokens), unit='rows'
  ) as bar:
    loss_fn = queries.make_heldout_loss(
      policy.module, rows, 64, mesh, bar.update
    )
    return loss_fn(policy.params)


def aligned(prompts, answers: Mapping[str, Sequence[samples_lib.Sample]]):
  """The prompts that all models answered, and model -> answers to them.

  A prompt is repeated for each of its answers.

  Raises:
    ValueError: there is no such prompt.
  """
  by_id = {name: {} for name in answers}
  for name, several in answers.items():
    for answer in several:
      by_id[name].setdefault(answer.prompt_id, []).append(answer)
  common = [p for p in prompts if all(p.id in row for row in by_id.values())]
  if not common:
    raise ValueError('no prompt has an answer of every model')
  found = {
    name: [answer for prompt in common for answer in row[prompt.id]]
    for name, row in by_id.items()
  }
  several = len(next(iter(found.values()))) // len(common)
  return [prompt for prompt in common for _ in range(several)], found
