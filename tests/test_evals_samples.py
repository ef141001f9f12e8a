"""Recorded samples and the side-by-side table."""

import json

import pytest

from instruct_jax.evals import samples


def _sample(model='sft', prompt_id='0', category='', **changes):
  values = {
    'model': model,
    'prompt_id': prompt_id,
    'prompt': f'prompt {prompt_id}',
    'response': f'{model} says {prompt_id}',
    'num_tokens': 4,
    'ended': True,
    'category': category,
  }
  return samples.Sample(**(values | changes))


def test_round_trip(tmp_path):
  written = [
    _sample(score_judge=0.25, metadata={'hallucination': False}),
    _sample(response='two\nlines, \u2028 "quotes" and é', ended=False),
    _sample(response='', score_reward=-1.5),
  ]
  path = samples.write_samples(tmp_path / 'deep' / 'sft.jsonl', written)
  assert samples.read_samples(path) == written
  assert [p.name for p in path.parent.iterdir()] == ['sft.jsonl']


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'num_tokens': True}, "'num_tokens' holds True"),
    ({'ended': 1}, "'ended' holds 1"),
    ({'score_judge': 'high'}, "'score_judge' holds 'high'"),
    ({'color': 'red'}, r"unknown fields \['color'\]"),
  ],
)
def test_malformed_lines_are_named(tmp_path, change, message):
  path = samples.write_samples(tmp_path / 'x.jsonl', [_sample()])
  line = path.read_text()
  bad = json.dumps(json.loads(line) | change)
  path.write_text(line + bad + '\n')
  with pytest.raises(ValueError, match=r'x\.jsonl:2: .*' + message):
    samples.read_samples(path)


def test_broken_and_empty_files(tmp_path):
  path = tmp_path / 'x.jsonl'
  path.write_text('{"model": "sft"')
  with pytest.raises(ValueError, match=r'x\.jsonl:1'):
    samples.read_samples(path)
  path.write_text('\n')
  with pytest.raises(ValueError, match='no sample'):
    samples.read_samples(path)


def test_scores_must_be_finite(tmp_path):
  with pytest.raises(ValueError, match="score_judge of model 'sft'.*nan"):
    samples.write_samples(
      tmp_path / 'x.jsonl', [_sample(score_judge=float('nan'))]
    )
  assert not list(tmp_path.iterdir())


def test_side_by_side_alternates_between_categories():
  categories = ['chat', 'chat', 'chat', 'qa', 'qa', 'list']
  recorded = [
    _sample(model, str(i), category)
    for model in ('sft', 'ppo', 'other')
    for i, category in enumerate(categories)
  ]
  # Prompt 1 lacks ppo's answer, so it cannot be shown.
  recorded = [s for s in recorded if (s.model, s.prompt_id) != ('ppo', '1')]
  rows = samples.side_by_side(recorded, ('sft', 'ppo'), 4)
  assert [row.prompt_id for row in rows] == ['0', '3', '5', '2']
  assert list(rows[0].answers) == ['sft', 'ppo']
  assert rows[3].answers['ppo'].response == 'ppo says 2'
  assert len(samples.side_by_side(recorded, ('sft', 'ppo'), 99)) == 5


def test_side_by_side_shows_the_first_of_several_samples():
  recorded = [_sample(response='first'), _sample(response='second')]
  (row,) = samples.side_by_side(recorded, ('sft',), 3)
  assert row.answers['sft'].response == 'first'
