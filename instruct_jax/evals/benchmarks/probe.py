"""Public NLP tasks run during RL, to track the alignment tax (4.2, E.6).

A probe is one task under one prompt type. Its items are drawn once, so scores
at two times differ only because the model does.
"""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence

from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import released_samples
from instruct_jax.evals.benchmarks import runner, tasks

# Scored by judges that only the suite (configs/nlp_suite.py) trains.
_NEED_A_JUDGE = ('real_toxicity', 'truthful_qa')


@dataclasses.dataclass(frozen=True)
class Probe:
  """One task and prompt type, in the model's tokens."""

  task: str
  prompt_type: str
  queries: Sequence[runner.Query]
  counts: runner.Counts

  @property
  def name(self) -> str:
    """The name, as in the names of metrics."""
    return f'{self.task}_{self.prompt_type}'.replace(' ', '_')


def check_names(names: Sequence[str]) -> None:
  """Raises ValueError for an unknown task, or one that needs a judge."""
  for name in names:
    if name not in tasks.TASKS:
      raise ValueError(
        f'probe of an unknown task {name!r}; known: {", ".join(tasks.TASKS)}'
      )
    if name in _NEED_A_JUDGE:
      raise ValueError(
        f'{name} needs a judge and cannot be a probe; run '
        'configs/nlp_suite.py on the snapshots'
      )


def make_probes(
  files: Mapping[str, str],
  tokenizer: tokenizer_lib.Tokenizer,
  context_length: int,
  max_items: int,
  few_shot: bool,
  seed: int,
) -> list[Probe]:
  """Makes a probe for each of `files`, task -> official file.

  At most `max_items` per task are drawn at random; 0 asks all. With `few_shot`,
  tasks that have such a prompt type are asked with examples.

  Raises:
    ValueError: no item of a task fits the model.
  """
  check_names(list(files))
  probes = []
  for name, path in files.items():
    prompts = tasks.TASKS[name].prompts
    prompt_type = 'fewshot' if few_shot and 'fewshot' in prompts else prompts[0]
    shots, asked, _ = runner.read_items(name, path, '', max_items, seed)
    queries, counts = runner.make_queries(
      name, asked, prompt_type, shots, tokenizer, context_length
    )
    if not queries:
      raise ValueError(
        f'{path}: none of {len(asked)} items of {name} fits a context of '
        f'{context_length} tokens'
      )
    probes.append(Probe(name, prompt_type, queries, counts))
  return probes


def ask(
  probes: Sequence[Probe],
  tokenizer: tokenizer_lib.Tokenizer,
  generate_fn: runner.GenerateFn,
  choice_fn: runner.ChoiceFn,
  batch_size: int,
) -> dict[str, float]:
  """`TASK_PROMPT_METRIC` -> score of the model behind the two functions."""
  scores = {}
  for each in probes:
    with tempfile.TemporaryDirectory() as folder:
      results = runner.run_queries(
        each.task,
        each.queries,
        f'{folder}/journal.jsonl',
        tokenizer=tokenizer,
        generate_fn=generate_fn,
        choice_fn=choice_fn,
        batch_size=batch_size,
      )
    rows = runner.to_rows(
      each.task,
      'policy',
      each.prompt_type,
      each.queries,
      results,
      dataclasses.replace(each.counts),
    )
    cells, _ = released_samples.score_task(each.task, rows)
    for cell in cells:
      scores[f'{each.name}_{cell.metric}'.replace(' ', '_')] = cell.score
  return scores
