"""A published model here and in `transformers`: ids, numbers and answers.

Slow, and needs torch 2.13.0, SmolLM2-135M-Instruct below INSTRUCT_JAX_MODELS
and the data below INSTRUCT_JAX_DATA:

  python -m pytest -m slow tests/test_parity.py
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from instruct_jax import (
  export,
  model_fns,
  model_folder,
  queries,
  rollout,
)
from instruct_jax.data import importers, loader, sources
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import sharding

torch = pytest.importorskip('torch', reason='compares with transformers')
pytestmark = pytest.mark.slow

NAME = 'SmolLM2-135M-Instruct'
QUESTIONS = [
  f'{question}?'
  for question in (
    'What is the capital of France',
    'How many legs has a spider',
    'Can you name three fruits',
    'Why is the sky blue',
    'What is 12 plus 30',
    'Who wrote Hamlet',
    'What does a baker make',
    'How do plants eat',
    'What is the opposite of hot',
    'Where do penguins live',
    'Can you write a line about rain',
    'What is a noun',
    'How long is a year',
    'What colour are bananas',
    'Why do we sleep',
    'What is ice',
    'Who was Einstein',
    'How do I boil an egg',
    'What is a triangle',
    'Can fish fly',
  )
]


@pytest.fixture(scope='module')
def folder(models_root):
  found = models_root / NAME
  if not found.is_dir():
    pytest.skip(f'{found} is not there')
  return found


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh((1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope='module')
def tokenizer(folder):
  return tokenizer_lib.Tokenizer.load(folder).with_format(
    tokenizer_lib.CHAT, ()
  )


@pytest.fixture(scope='module')
def ours(folder, tokenizer, mesh):
  with sharding.use_mesh(mesh):
    return queries.load_policy(str(folder), tokenizer, mesh)


@pytest.fixture(scope='module')
def theirs(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager'
  ).eval()


def varied_lines(data_root):
  """1,000 lines of dialogues, books and code-like text."""
  dialogues = importers.read_hh(data_root / 'hh_helpful' / 'train_gt.jsonl.gz')
  lines = [text for c in dialogues.comparisons for text in c.completions][:500]
  books = sources.read_documents(data_root / 'books', words_per_document=40)
  lines += [document.text for document in books[:: len(books) // 400]][:400]
  lines += [
    f'x_{i} = {i**3:,}  # é {chr(0x4E00 + i)} \t{i}' for i in range(100)
  ]
  return lines


def test_ids(folder, tokenizer, data_root):
  reference = transformers.AutoTokenizer.from_pretrained(folder)
  lines = varied_lines(data_root)
  assert len(lines) == 1_000
  assert tokenizer.encode_batch(lines) == [
    reference(line, add_special_tokens=False)['input_ids'] for line in lines
  ]
  chats = [[{'role': 'user', 'content': text}] for text in QUESTIONS]
  assert tokenizer.encode_prompts(QUESTIONS) == [
    reference.apply_chat_template(chat, add_generation_prompt=True)['input_ids']
    for chat in chats
  ]


def test_logprobs_of_real_text(ours, theirs, tokenizer, mesh, data_root):
  text = sources.read_documents(data_root / 'books', words_per_document=6_000)
  ids = np.array(tokenizer.encode(text[0].text)[:5_120], np.int32)
  rows = ids.reshape(10, 512)
  logprobs_fn = jax.jit(model_fns.logprobs_fn(ours.module))
  with sharding.use_mesh(mesh):
    found, _ = logprobs_fn(ours.params, rows, np.ones_like(rows))
  with torch.no_grad():
    logits = theirs(torch.tensor(rows).long()).logits[:, :-1]
    wanted = torch.log_softmax(logits, -1)
    wanted = wanted.gather(2, torch.tensor(rows[:, 1:, None]).long())[..., 0]
  # The first token of a row is predicted by nothing.
  difference = np.abs(np.asarray(found)[:, 1:] - wanted.numpy())
  print(f'largest difference {difference.max():.2e}')
  assert difference.max() < 1e-3


def test_greedy_answers(ours, theirs, tokenizer, mesh):
  rows, _ = loader.prompt_rows(QUESTIONS, tokenizer, 64)
  with sharding.use_mesh(mesh):
    sampled = queries.sample(
      ours,
      rows,
      jax.random.key(0),
      mesh,
      name='greedy',
      stop_ids=tokenizer.stop_ids,
      response_length=48,
      temperature=0.0,
      batch_size=20,
    )
  answers = tokenizer.decode_responses(rollout.response_ids(sampled))
  for question, answer in zip(QUESTIONS, answers, strict=True):
    (ids,) = tokenizer.encode_prompts([question])
    with torch.no_grad():
      wanted = theirs.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)).long(),
        max_new_tokens=48,
        do_sample=False,
        pad_token_id=0,
      )[0, len(ids) :]
    assert answer == tokenizer.decode_response(wanted.tolist()), question


def test_exports_come_back(folder, ours, theirs, tokenizer, mesh, tmp_path):
  tokenizer.save(tmp_path / 'tokenizer')
  ids = np.array([tokenizer.encode_prompts(QUESTIONS[:1])[0]], np.int32)
  with sharding.use_mesh(mesh):
    model_folder.save(tmp_path / 'policy', ours, tokenizer, {})
    reward = model_fns.scalar_from_policy(ours, mesh, jax.random.key(0))
    params = {**reward.params, 'head_bias': jnp.float32(0.25)}
    reward = dataclasses.replace(reward, params=params)
    model_folder.save(tmp_path / 'reward', reward, tokenizer, {})
    scalars = model_fns.scalars_fn(reward.module)(
      params, jnp.asarray(ids), jnp.ones_like(ids)
    )
  for name in ('policy', 'reward'):
    export.export(
      tmp_path / name, tmp_path / 'tokenizer', tmp_path / f'{name}_out'
    )
  # Our weights went through the JAX tree and back.
  again = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'policy_out', attn_implementation='eager'
  )
  scorer = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / 'reward_out', attn_implementation='eager'
  )
  with torch.no_grad():
    tokens = torch.tensor(ids).long()
    # Ours has one token more, the PAD.
    wanted = theirs(tokens).logits
    found = again(tokens).logits[..., : wanted.shape[-1]]
    np.testing.assert_array_equal(found, wanted)
    score = scorer(tokens).logits[0, 0].item()
  path = tmp_path / 'reward_out' / 'config.json'
  shift = json.loads(path.read_text())['score_shift']
  assert score + shift == pytest.approx(float(scalars[0, -1]), abs=1e-3)
