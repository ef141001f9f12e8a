"""Recorded samples and the side-by-side table."""

import codecs
import gzip
import json

import pytest

from instruct_jax.data import records
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
    ({'score_judge': float('nan')}, "'score_judge' is not JSON: numbers must"),
    ({'score_reward': 10**400}, "'score_reward' is not JSON"),
    ({'response': '\ud800'}, "'response' is not JSON: .* lone surrogates"),
    ({'metadata': {'x': [float('inf')]}}, "'metadata' is not JSON"),
    ({'metadata': {'ids': [1, True]}}, "'ids' of 'metadata' must be a list"),
    ({'metadata': {'ids': 'ab'}}, "'ids' of 'metadata' must be a list"),
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


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'\x1f\x8b\x08', 'is compressed with gzip; let its name end in .gz'),
    ('é'.encode('latin-1'), ':1: byte 0 is not UTF-8'),
    ('é'.encode('utf-16'), 'is UTF-16; convert the file to UTF-8'),
    (b'{"model": "a", "model": "b"}', r":1: not JSON \(key 'model' more than"),
    (b'[' * 100_000, ':1: not JSON'),
    (b'7', ':1: expected a JSON object, found 7'),
  ],
)
def test_files_of_other_kinds_are_named(tmp_path, content, message):
  path = tmp_path / 'x.jsonl'
  path.write_bytes(content)
  with pytest.raises(records.RecordError, match=message) as error:
    samples.read_samples(path)
  assert str(error.value).startswith(str(path))
  assert '\n' not in str(error.value)


def test_a_byte_order_mark_and_gzip_are_read(tmp_path):
  path = samples.write_samples(tmp_path / 'x.jsonl', [_sample()])
  path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
  assert samples.read_samples(path) == [_sample()]
  path = samples.write_samples(tmp_path / 'x.jsonl.gz', [_sample()])
  assert gzip.decompress(path.read_bytes()).startswith(b'{')
  assert samples.read_samples(path) == [_sample()]


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
