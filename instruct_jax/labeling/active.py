"""Puts first the tasks of which a reward model is least sure (`--active`).

With the scores r of a task's K completions, p_ij = 1 / (1 + exp(r_j - r_i)) is
the reward model's probability that a person prefers i to j (equation 1 of the
paper). A task's uncertainty is the mean entropy of its pairs, in bits:

  U = 1 / |D| sum_{(i, j) in D} H(p_ij),
  H(p) = -p log2 p - (1 - p) log2 (1 - p)

D holds the pairs i < j whose texts differ in more than surrounding whitespace,
because an order of equal texts carries no information. U is 1 if all scores are
equal, near 0 if all differ much, and 0 if D is empty. Labels of uncertain tasks
are more informative but not a random sample, so the export names the model and
the uncertainty of each task.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import sqlalchemy as sa
from etils import epath
from ml_collections import ConfigDict
from scipy import special, stats

from instruct_jax import judge_fns, model_folder
from instruct_jax.data import records
from instruct_jax.evals import samples
from instruct_jax.infra import sharding
from instruct_jax.labeling import answers, research, schema, store
from instruct_jax.models.config import check_stage

_PREFIX = 'reward:'


def uncertainty(
  scores: Sequence[float] | np.ndarray, texts: Sequence[str] = ()
) -> float:
  """Mean entropy of the pairs of different texts, in bits; 0 if none differ.

  Args:
    scores: of K >= 2 completions, in reward units.
    texts: the completions; if empty, all count as different.
  """
  texts = [records.composed(text.strip()) for text in texts]
  gaps = [
    scores[i] - scores[j]
    for i, j in itertools.combinations(range(len(scores)), 2)
    if not texts or texts[i] != texts[j]
  ]
  if not gaps:
    return 0.0
  chances = special.expit(np.asarray(gaps, float))
  return float(np.mean(stats.entropy([chances, 1 - chances], base=2)))


def check(name: str, config: ConfigDict) -> str:
  """Returns the model folder of `reward:FOLDER`.

  Raises:
    StoreError: the name has another form, or the model or its tokenizer is
      missing.
    ValueError: an unknown compute_dtype.
  """
  check_stage(config)
  folder = name.removeprefix(_PREFIX)
  if folder == name or not folder:
    raise store.StoreError(
      f'active must be reward:MODEL, the folder of a reward model: {name!r}'
    )
  if not config.tokenizer and not model_folder.is_published(folder):
    if not epath.Path(folder).is_dir():
      raise store.StoreError(
        f'{folder}: no such folder; active must be reward:MODEL, the folder of '
        'a reward model'
      )
    raise store.StoreError(
      f'{folder}: no tokenizer.json; give --config.active.tokenizer, a folder'
    )
  return folder


def order(the_store: store.Store, name: str, config: ConfigDict) -> dict:
  """Sets the priority of the ranking tasks with free slots in open batches.

  A task's priority is its uncertainty; tasks that are too long for the model
  lose their priority. The order of the batches does not change.

  Args:
    the_store: the site's store.
    name: reward:FOLDER, ours or a published classifier.
    config: has tokenizer, compute_dtype and batch_size.

  Returns:
    The numbers of tasks that were `ordered` and that are `too long`.

  Raises:
    StoreError: as `check`; there are no such tasks; scores are not finite.
    ValueError, checkpoint.CheckpointError: the model cannot be read.
  """
  folder = check(name, config)
  found = _tasks(the_store)
  if not found:
    raise store.StoreError('There are no free tasks to rank; nothing to order')
  context = model_folder.shape_of(folder).context_length
  mesh = sharding.make_mesh((), rows=(config.batch_size,))
  with sharding.use_mesh(mesh):
    score_fn, tokenizer = judge_fns.reward_score(config, folder, mesh)
    pairs = {key: _pairs(key, *task) for key, task in found.items()}
    fitting = {
      key: own
      for key, own in pairs.items()
      if _length(own, tokenizer) <= context
    }
    flat = [pair for own in fitting.values() for pair in own]
    scores = np.asarray(score_fn(flat), float) if flat else np.zeros(0)
  bad = int(np.sum(~np.isfinite(scores)))
  if bad:
    raise store.StoreError(
      f'{folder}: {bad} of {len(scores)} scores are not finite; nothing was '
      'ordered'
    )
  ends = np.cumsum([len(own) for own in fitting.values()])
  split = np.split(scores, ends[:-1]) if fitting else []
  values = {
    key: uncertainty(own, found[key][2])
    for key, own in zip(fitting, split, strict=True)
  }
  with the_store.write() as c:
    for key, (_, record, _) in found.items():
      record = {k: v for k, v in record.items() if k != 'active'}
      value = values.get(key)
      if value is not None:
        record['active'] = {'by': name, 'uncertainty': value}
      schema.update(c, schema.tasks, key, record=record, priority=value)
    the_store.audit(c, None, 'order', f'{len(values)} tasks by {name}')
  return {'ordered': len(values), 'too long': len(found) - len(values)}


def _tasks(the_store):
  """Task id -> (prompt, record, texts) of ranking tasks with free slots."""
  tasks, batches, slots = schema.tasks, schema.batches, schema.slots
  free = sa.select(slots.c.id).where(
    slots.c.task_id == tasks.c.id,
    slots.c.number > 0,
    slots.c.holder.is_(None),
  )
  query = (
    sa.select(tasks.c['id', 'prompt', 'record'])
    .join(batches)
    .where(batches.c.kind.in_(answers.RANKED), ~batches.c.closed, free.exists())
    .order_by(tasks.c.id)
  )
  with the_store.read() as c:
    outputs = research.outputs_of(c)
    return {
      row.id: (row.prompt, row.record, outputs[row.id]['texts'])
      for row in c.execute(query)
    }


def _pairs(key, prompt, record, texts):
  """(prompt, sample) of each completion; `ended` is false if it was cut."""
  turns = tuple(records.Turn(**turn) for turn in record.get('turns', ()))
  asked = records.Prompt(id=str(key), text=prompt, turns=turns)
  ends = record.get('ended') or [True] * len(texts)
  return [
    (asked, samples.Sample('', asked.id, prompt, text, 0, ended))
    for text, ended in zip(texts, ends, strict=True)
  ]


def _length(pairs, tokenizer):
  """Number of tokens of the longest row."""
  (prompt,) = tokenizer.encode_prompts([pairs[0][0]])
  texts = [answer.response for _, answer in pairs]
  # Each answer counts with an end token, so even an empty one has a token.
  return len(prompt) + max(
    map(len, tokenizer.encode_responses(texts, ended=True))
  )
