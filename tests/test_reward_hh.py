"""The HH pipeline: its data, and the table beside the baselines."""

import dataclasses
import itertools
import json
import unicodedata

import jax
import pytest
from etils import epath

from configs import reward
from instruct_jax import model_fns, model_folder
from instruct_jax.data import records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import pipeline, sharding
from instruct_jax.jobs import hh_data, reward_baselines
from tests import tiny

pytestmark = pytest.mark.usefixtures('quick_compile')


def write_set(folder, better, worse):
  """40 prompts with two answers, one of which always says `better`."""
  folder.mkdir(parents=True)
  lines = []
  for i in range(40):
    asked = f'\n\nHuman: Number {i}?\n\nAssistant: '
    lines.append(
      json.dumps(
        {'chosen': f'{asked}{better} {i}', 'rejected': f'{asked}{worse} {i}'}
      )
    )
  (folder / 'train.jsonl').write_text('\n'.join(lines))


def test_data_and_baselines(tmp_path, capsys):
  root = tmp_path / 'root'
  write_set(root / 'hh_helpful', 'surely it is', 'no')
  write_set(root / 'hh_harmless', 'sorry', 'well it must be')
  config = reward.get_config('hh')
  with config.unlocked():
    config.workdir = str(tmp_path / 'run')
  config.data.root = str(root)
  config.stages.data.vocab_size = 300
  config.stages.data.valid_fraction = 0.3
  for name in config.stage_order:
    stage = config.stages[name]
    pipeline.find_experiment(stage.experiment).validate(stage)

  folder = epath.Path(tmp_path / 'run' / 'data')
  counts = hh_data.run(config.stages.data, folder)
  assert sum(n for name, n in counts.items() if '/comparisons_' in name) == 80

  def prompts(split, name):
    path = folder / name / f'comparisons_{split}.jsonl'
    return {c.prompt for c in records.read_jsonl(path, records.Comparison)}

  # The two sets ask the same 40 questions: each is in one split for both.
  train, valid = (prompts(split, 'hh_helpful') for split in ('train', 'valid'))
  assert not train & valid
  assert prompts('train', 'hh_harmless') == train
  documents = records.read_jsonl(
    folder / 'documents_train.jsonl', records.Document
  )
  assert len(documents) == 2 * 2 * len(train)
  assert not any(d.text.startswith(p) for d in documents for p in valid)

  tokenizer = tokenizer_lib.Tokenizer.load(folder / 'tokenizer')
  shape = dataclasses.replace(
    tiny.CONFIG, vocab_size=tokenizer.vocab_size, context_length=48
  )
  mesh = sharding.make_mesh((1, -1, 1))
  model = model_fns.init('scalar', shape, mesh, jax.random.key(0))
  for name in ('helpful', 'harmless'):
    model_folder.save(
      tmp_path / 'run' / f'reward_{name}' / 'model',
      model,
      tokenizer,
      {},
    )
  config.stages.baselines.row_length = 48
  config.stages.baselines.batch_size = 16
  results = reward_baselines.run(
    config.stages.baselines, epath.Path(tmp_path / 'run' / 'baselines')
  )
  for name, length in (('hh_helpful', 1.0), ('hh_harmless', 0.0)):
    row = results[name]
    # Longer is always better in one set and always worse in the other.
    assert row['longer is better']['accuracy'] == length
    assert row['length']['accuracy'] == 1
    assert row['bag of words']['accuracy'] == 1
    assert 0 <= row['reward model']['accuracy'] <= 1
  assert 'hh_harmless: reward model' in capsys.readouterr().out


def test_missing_folders_are_named(tmp_path):
  config = reward.get_config('hh').stages.data
  with pytest.raises(ValueError, match='set --config.data.root=DIR with hh_h'):
    hh_data.validate(config)
  config.root = str(tmp_path)
  assert set(hh_data.inputs(config).values()) == {
    f'{tmp_path}/hh_helpful',
    f'{tmp_path}/hh_harmless',
  }
  (tmp_path / 'hh_helpful').mkdir()
  with pytest.raises(ValueError, match='hh_helpful has no .jsonl or'):
    hh_data.run(config, epath.Path(tmp_path / 'out'))


def test_dialogues_that_begin_alike_are_in_one_split(tmp_path):
  """One set asks, the other asks on; and accents are spelt in two ways."""
  root = tmp_path / 'root'
  for name, form, more in (
    ('hh_helpful', 'NFC', ''),
    ('hh_harmless', 'NFD', 'What?\n\nHuman: Tell me\n\nAssistant: '),
  ):
    (root / name).mkdir(parents=True)
    lines = []
    for i in range(80):
      asked = unicodedata.normalize(form, f'\n\nHuman: Café {i}?')
      asked = f'{asked}\n\nAssistant: {more}'
      lines.append(
        json.dumps({'chosen': f'{asked}yes {i}', 'rejected': f'{asked}no {i}'})
      )
    (root / name / 'train.jsonl').write_text('\n'.join(lines))
  config = reward.get_config('hh').stages.data
  config.root = str(root)
  config.vocab_size = 300
  config.valid_fraction = 0.3
  folder = epath.Path(tmp_path / 'run')
  hh_data.run(config, folder)
  splits = {}
  for name, kind, split in itertools.product(
    config.sets, ('comparisons', 'demonstrations'), ('train', 'valid')
  ):
    types = {'c': records.Comparison, 'd': records.Demonstration}
    path = folder / name / f'{kind}_{split}.jsonl'
    for row in records.read_jsonl(path, types[kind[0]]):
      splits.setdefault(records.opening(row), set()).add(split)
  assert len(splits) == 80
  assert all(len(found) == 1 for found in splits.values())
  documents = {
    split: records.read_jsonl(
      folder / f'documents_{split}.jsonl', records.Document
    )
    for split in ('train', 'valid')
  }
  for split, rows in documents.items():
    for row in rows:
      opening = records.dialogue_turns(row.text)[0].content
      assert splits[records.comparable(opening)] == {split}
