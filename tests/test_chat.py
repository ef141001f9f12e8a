"""Talking to tiny policies: streamed tokens, columns, transcript."""

import io
import json

import jax
import numpy as np
import pytest

from instruct_jax import chat, queries, rollout
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import samples
from instruct_jax.types import PromptBatch
from tests import tiny

pytestmark = pytest.mark.usefixtures('quick_compile')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp('chat')
  tokenizer = tokenizer_lib.train_bpe(['a fox said that he left'] * 3, 270)
  tokenizer.save(root / 'tokenizer')
  for seed, name in enumerate(('run/one', 'run/two')):
    tiny.save_model(root, name, 'policy', tokenizer, seed)
  tiny.save_model(root, 'reward', 'scalar', tokenizer, 5)
  return root


def test_streamed_tokens_are_those_of_a_rollout(folder):
  tokenizer = tokenizer_lib.Tokenizer.load(folder / 'tokenizer')
  mesh = tiny.one_device()
  model = queries.load_policy(f'{folder}/run/one', tokenizer, mesh)
  ids = tokenizer.encode('the fox')
  key = jax.random.key(3)
  streamed = list(chat.stream(model, ids, tokenizer, 12, 1.0, key))
  tokens, mask = queries.padded([ids], 32, tokenizer.pad_id, left=True)
  program = queries.generate_program(model.module, 12, (tokenizer.eos_id,), 1.0)
  sampled = program(
    model.params, PromptBatch(tokens, mask, np.zeros(1, np.int32)), key
  )
  assert streamed == rollout.response_ids(sampled)[0]
  with pytest.raises(
    ValueError, match='60 for the answer the model reads 1 to 4'
  ):
    list(chat.stream(model, ids * 5, tokenizer, 60, 1.0, key))


def test_pieces_hold_back_unfinished_characters(folder):
  tokenizer = tokenizer_lib.Tokenizer.load(folder / 'tokenizer')
  ids = tokenizer.encode('fox é left')
  assert len(ids) > len('fox')  # é takes more than one token.
  collected = []
  found = list(chat.pieces(tokenizer, iter(ids), collected))
  assert ''.join(found) == 'fox é left'
  assert '\ufffd' not in ''.join(found) and collected == ids


def test_a_conversation_is_shown_scored_and_saved(folder, monkeypatch, capsys):
  monkeypatch.setattr('sys.stdin', io.StringIO('the fox\n\n/quit\nignored\n'))
  path = folder / 'transcript.jsonl'
  code = chat.main(
    [
      f'--checkpoint={folder}/run/one',
      f'--compare={folder}/run/two',
      f'--reward={folder}/reward',
      f'--tokenizer={folder}/tokenizer',
      '--max_tokens=8',
      f'--transcript={path}',
    ]
  )
  assert code == 0
  shown = capsys.readouterr().out
  assert 'run/one> ' in shown and 'run/two> ' in shown
  assert shown.count('[reward ') == 4  # Streamed, and again in columns.
  saved = samples.read_samples(path)
  assert [s.model for s in saved] == ['run/one', 'run/two']
  assert {s.prompt for s in saved} == {'the fox'}
  assert all(np.isfinite(s.score_reward) for s in saved)
  assert json.loads(path.read_text().splitlines()[0])['prompt_id'] == 'turn1'


def test_a_missing_model_is_one_line(folder, capsys):
  code = chat.main(
    [f'--checkpoint={folder}/none', f'--tokenizer={folder}/tokenizer']
  )
  assert code == 1
  assert 'none' in capsys.readouterr().err


def test_columns_share_the_width():
  text = chat.side_by_side([('one', 'a b c ' * 6), ('two', 'short')], 40)
  lines = text.split('\n')
  assert all(len(line) <= 40 for line in lines)
  assert lines[0].split(' | ') == [f'{"one":<18}', 'two']
  assert 'short' in lines[2]


def test_answers_cannot_steer_the_terminal():
  assert chat.plain('a\x1b[2Jb\nc') == 'a\ufffd[2Jb\nc'
