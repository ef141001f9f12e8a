"""Probes along RL: the same items each time, scored as the suite does."""

import json

import pytest

from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals.benchmarks import probe


@pytest.fixture
def files(tmp_path):
  rows = [
    {'premise': f'A fox {i}.', 'hypothesis': 'It left.', 'label': label}
    for i, label in enumerate(['entailment', 'not_entailment'] * 12)
  ]
  (tmp_path / 'rte.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  drop = [
    {'context': f'{i} foxes left.', 'question': 'how many?', 'answer': f'{i}'}
    for i in range(9)
  ]
  (tmp_path / 'drop.json').write_text(json.dumps(drop))
  return {
    name.split('.')[0]: f'{tmp_path}/{name}'
    for name in ('rte.jsonl', 'drop.json')
  }


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizer_lib.train_bpe(['a fox said that he left'] * 3, 270)


def make(files, tokenizer, **changes):
  return probe.make_probes(
    files,
    tokenizer,
    **{
      'context_length': 2048,
      'max_items': 6,
      'few_shot': False,
      'seed': 0,
      **changes,
    },
  )


def test_scores_follow_the_model(files, tokenizer):
  probes = make(files, tokenizer)
  assert [p.name for p in probes] == ['rte_zeroshot', 'drop_zeroshot']

  def yes(contexts, choices):
    return [[-1.0, -50.0] for _ in contexts]

  def no_answer(prompts, most):
    return [tokenizer.encode(' no idea') for _ in prompts]

  scores = probe.ask(probes, tokenizer, no_answer, yes, 4)
  # "Yes" is right for entailment, which the drawn items hold a share of.
  rows = [query.item for query in probes[0].queries]
  share = sum('Yes' in item.references[0] for item in rows) / len(rows)
  assert scores['rte_zeroshot_accuracy'] == pytest.approx(share)
  assert scores['drop_zeroshot_F1'] == 0
  # Asked again it is the same; nothing is carried over.
  assert probe.ask(probes, tokenizer, no_answer, yes, 4) == scores


def test_the_same_items_every_time(files, tokenizer):
  first, again = (make(files, tokenizer)[0].queries for _ in range(2))
  assert [q.key for q in first] == [q.key for q in again]
  other = make(files, tokenizer, seed=1)[0].queries
  assert [q.key for q in first] != [q.key for q in other]


def test_few_shot_where_the_task_has_it(files, tokenizer):
  few = make(files, tokenizer, few_shot=True)
  assert [p.prompt_type for p in few] == ['fewshot', 'fewshot']
  assert len(few[1].queries[0].ids) > len(
    make(files, tokenizer)[1].queries[0].ids
  )


def test_what_cannot_be_a_probe_is_named(files, tokenizer):
  with pytest.raises(ValueError, match="unknown task 'sing'"):
    probe.check_names(['sing'])
  with pytest.raises(ValueError, match='real_toxicity needs a judge'):
    probe.check_names(['real_toxicity'])
  with pytest.raises(ValueError, match='none of 6 items of rte fits'):
    make(files, tokenizer, context_length=4)
