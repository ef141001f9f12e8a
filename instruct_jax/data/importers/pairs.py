"""Readers for pairs of answers, one of them preferred or both tied."""

import functools
import os.path
import re

from instruct_jax.data import invisible, records
from instruct_jax.data.importers.entries import (
  FIRST,
  SECOND,
  TIE,
  Skip,
  asked,
  post_prompt,
  reader,
  split_answers,
)

# Marks of chat templates, in texts.
_MARK = re.compile(
  r'<\|(?:im_start|start_header_id|system|user|assistant)\|>|\[INST\]'
  r'|<start_of_turn>|<\uff5c(?:User|Assistant)\uff5c>'
  r'|^### (?:Human|Assistant|Instruction|Response|User):',
  re.MULTILINE,
)


def _dialogue(text: str) -> tuple[records.Turn, ...]:
  """The turns of a text in HH's layout; leading line breaks may be missing."""
  return records.dialogue_turns('\n\n' * text.startswith('Human:') + text)


@reader
def read_hh(imported, entry):
  """HH: comparisons and, from the chosen side, demonstrations.

  Both texts are dialogues that differ only in the assistant's last turn. The
  chosen answers were written by models and chosen by people.
  """
  sides = [_dialogue(entry.text(name)) for name in ('chosen', 'rejected')]
  # An even number of turns ends with the assistant's.
  if any(not side or len(side) % 2 for side in sides):
    return 'not a dialogue that ends with the assistant'
  turns = sides[0][:-1]
  if turns != sides[1][:-1]:
    return 'the two sides answer different prompts'
  texts = [side[-1].content for side in sides]
  if texts[0] == texts[1]:
    return 'both answers are the same'
  if invisible.is_blank(turns[-1].content):
    return 'the last question is empty'
  about = {
    'prompt': records.text_of_turns(turns),
    'id': f'hh:{entry.name}',
    'turns': turns,
  }
  completions = tuple(f' {text}' if text else '' for text in texts)
  imported.comparisons.append(
    records.Comparison(completions=completions, ranks=(1, 2), **about)
  )
  if invisible.is_blank(completions[0]):
    return 'no demonstration: the chosen answer is empty'
  imported.add(records.Demonstration(response=completions[0], **about))


@reader
def read_summarize_feedback(imported, entry):
  """Pairs of summaries of a post, with workers and, if given, confidence.

  Files of single summaries that are rated on axes are refused, because they
  have no comparisons.
  """
  summaries, info = entry.entries('summaries'), entry.entry('info')
  texts = tuple(summary.answer('text') for summary in summaries)
  choice, worker = entry.get('choice', int, 'a number'), entry.text('worker')
  if choice is None:
    return 'no choice was made'
  if len(texts) != 2 or choice not in (0, 1):
    raise records.RecordError(
      f'{len(texts)} summaries with choice {choice}; expected two, and 0 or 1'
    )
  if texts[0].strip() == texts[1].strip():
    return 'both summaries are the same'
  prompt = post_prompt(info)
  if not prompt:
    return 'the post is empty'
  extra = {}
  if 'extra' in entry.values:
    extra = entry.entry('extra')
    extra = extra.details(*extra.values)
  imported.comparisons.append(
    records.Comparison(
      prompt=prompt,
      completions=texts,
      ranks=(1, 2) if choice == 0 else (2, 1),
      id=info.optional('id') or entry.name,
      labeler=worker,
      category=entry.optional('batch'),
      metadata={
        'policies': [summary.optional('policy') for summary in summaries],
        'split': entry.optional('split'),
        'extra': extra,
      },
    )
  )


def _add_safe_rlhf(imported, entry, label):
  """Safe RLHF: two answers; the field `label` says which one is better.

  There is one such field for helpfulness and one for safety.
  """
  imported.add_ranked(
    asked(entry.text('prompt')),
    (entry.answer('response_0'), entry.answer('response_1')),
    entry.label(label, {'0': FIRST, '1': SECOND}),
    id=f'safe_rlhf:{entry.name}',
    category=entry.optional('prompt_source'),
    metadata=entry.details(
      'is_response_0_safe',
      'is_response_1_safe',
      'response_0_severity_level',
      'response_1_severity_level',
    ),
  )


# --- Chosen and rejected ------------------------------------------------------


def _sides(entry, prompt='prompt', chosen='chosen', rejected='rejected'):
  """(prompt, [chosen answer, rejected answer]) of a pair.

  A side is a text (the answer to the prompt) or messages (see `_conversation`).
  """
  given = entry.values.get(prompt)
  if entry.holds_list(prompt):
    asked_before = entry.messages(prompt)
  elif given is None:
    asked_before = ()
  else:
    asked_before = asked(entry.text(prompt))
  if not any(map(entry.holds_list, (chosen, rejected))):
    answers = [entry.answer(chosen), entry.answer(rejected)]
    if not asked_before:
      raise records.RecordError(
        entry.where(
          f'{chosen!r} is a text and there is no {prompt!r} before it'
        )
      )
    if entry.holds_list(prompt):
      return asked_before, answers
    return entry.text(prompt), answers
  return split_answers(
    _conversation(asked_before, entry.messages(key))
    for key in (chosen, rejected)
  )


def _conversation(asked_before, messages):
  """The whole conversation of a prompt and the messages of one side.

  If the first message is the assistant's, the messages follow the prompt. If
  they contain the prompt's turns, or the prompt is blank, they are the whole
  conversation. If they begin by repeating the prompt's last turns, the rest
  follows the prompt. If the prompt is only a system turn and a user message
  comes first, they follow the prompt.

  Raises:
    Skip: none of these applies.
  """
  if not messages or messages[0].role == 'assistant':
    return asked_before + messages
  before, after = (
    [(turn.role, records.composed(turn.content.strip())) for turn in turns]
    for turns in (asked_before, messages)
  )
  size = len(before)
  starts = range(len(after) - size + 1)
  is_blank = all(invisible.is_blank(text) for _, text in before)
  if is_blank or any(after[i : i + size] == before for i in starts):
    return messages
  for common in range(min(size, len(after)), 0, -1):
    if before[-common:] == after[:common]:
      return asked_before + messages[common:]
  if {role for role, _ in before} == {'system'} and after[0][0] == 'user':
    return asked_before + messages
  raise Skip('the prompt is not that of the conversations of the answers')


@reader
def read_chosen_rejected(imported, entry):
  """The preference format of TRL, standard or conversational.

  The prompt may be implicit. In whole conversations it is everything before the
  last answer; in texts it is what both begin with, up to a space or a line
  break. Prompts and answers that are texts are read unchanged.
  """
  texts = [entry.values.get(key) for key in ('chosen', 'rejected')]
  if (
    'prompt' in entry.values
    or any(map(entry.holds_list, ('chosen', 'rejected')))
    or not all(isinstance(text, str) for text in texts)
  ):
    prompt, answers = _sides(entry)
  elif found := next(filter(None, map(_MARK.search, texts)), None):
    raise records.RecordError(
      f"'chosen' and 'rejected' are written in a chat template, with "
      f"{found[0]!r}; give lists of messages, or 'prompt' and answers without "
      'its marks'
    )
  elif any(map(_dialogue, texts)):
    raise records.RecordError(
      "'chosen' and 'rejected' are dialogues of Anthropic HH; they are the "
      'format hh'
    )
  else:
    texts = entry.text('chosen'), entry.text('rejected')
    common = os.path.commonprefix(texts)
    end = max(common.rfind(space) for space in ' \n')
    prompt = common[: max(0, end)]
    answers = [text[len(prompt) :] for text in texts]
  imported.add_ranked(
    prompt, answers, FIRST, id=f'chosen_rejected:{entry.name}'
  )


def _add_rated_sides(imported, entry, name, ratings, **keys):
  """Adds a pair whose sides have ratings; equal ratings tie.

  `ratings` are pairs of keys, of which the first that the entry has is used.
  """
  found = [pair for pair in ratings if pair[0] in entry.values]
  first, second = (found or ratings)[0]
  scores = entry.number(first), entry.number(second)
  prompt, answers = _sides(entry, **keys)
  if isinstance(prompt, str):
    prompt = asked(prompt)
  about = {
    'id': f'{name}:{entry.name}',
    'category': entry.optional('source') or entry.optional('dataset'),
  }
  if None in scores:
    imported.add_ranked(prompt, answers, FIRST, **about)
  elif scores[0] < scores[1]:
    raise Skip('the rejected answer is rated higher')
  else:
    imported.add_scored(prompt, answers, scores, **about)


@reader
def read_ultrafeedback_binarized(imported, entry):
  """The best answer and another one, with overall scores; equal scores tie."""
  ratings = (('score_chosen', 'score_rejected'),)
  _add_rated_sides(imported, entry, 'ultrafeedback_binarized', ratings)


_ARGILLA = (
  ('chosen_rating', 'rejected_rating'),
  ('chosen-rating', 'rejected-rating'),
  ('rating_chosen', 'rating_rejected'),
  ('chosen_avg_rating', 'rejected_avg_rating'),
)


@reader
def read_argilla(imported, entry):
  """DPO mixes of Argilla: each side has a rating, under one of several keys."""
  keys = {}
  if 'chosen_response' in entry.values:
    keys = {
      'prompt': 'instruction',
      'chosen': 'chosen_response',
      'rejected': 'rejected_response',
    }
  _add_rated_sides(imported, entry, 'argilla', _ARGILLA, **keys)


@reader
def read_argilla_orca(imported, entry):
  """Orca pairs that Argilla re-rated; `status` says which are ties."""
  ranks = entry.label(
    'status', {'unchanged': FIRST, 'swapped': FIRST, 'tie': TIE}
  )
  imported.add_ranked(
    asked(entry.text('input'), entry.text('system')),
    (entry.answer('chosen'), entry.answer('rejected')),
    ranks,
    id=f'argilla_orca:{entry.name}',
    metadata=entry.details('status', 'chosen_score', 'in_gsm8k_train'),
  )


# --- Arena --------------------------------------------------------------------


_WINNERS = {
  'model_a': FIRST,
  'model_b': SECOND,
  'tie': TIE,
  'tie (bothbad)': TIE,
  'both_bad': TIE,
  # GPT-4 changed its verdict with the order of the answers.
  'tie (inconsistent)': TIE,
}


@reader
def read_arena(imported, entry):
  """Votes from LMSYS's arena, from LMArena and by MT-bench's judges.

  "Both are bad" is a tie, and so is a verdict that changes with the order of
  the answers, as in FastChat's `show_result`; `winner` in the metadata tells
  them apart. The labeler is the `judge`: in MT-bench `expert_0` and the like
  are people, and `gpt4_pair` is GPT-4. The vote is for whole conversations.
  Those that differ before the last answer are left out, and with them most
  votes after the first of a session.
  """
  if 'conversation_a' in entry.values:
    winner = entry.text('winner')
    ranks = entry.label('winner', _WINNERS)
    # MT-bench's judges voted after this many rounds.
    rounds = entry.number('turn') if 'turn' in entry.values else None
    sides = [
      _with_history(
        entry,
        side,
        _first_rounds(entry.messages(f'conversation_{side}'), rounds),
      )
      for side in 'ab'
    ]
  else:
    winner, ranks = _kaggle_winner(entry)
    questions = entry.json_texts('prompt')
    sides = []
    for side in 'ab':
      answers = entry.json_texts(f'response_{side}')
      if len(answers) != len(questions):
        raise Skip('not as many answers as questions')
      turns = zip(questions, answers, strict=True)
      sides.append([turn for pair in turns for turn in _round(*pair)])
  prompt, answers = split_answers(sides)
  models = [entry.text('model_a'), entry.text('model_b')]
  name = entry.optional('question_id') or entry.optional('id') or entry.name
  imported.add_ranked(
    prompt,
    answers,
    ranks,
    id=f'arena:{name}',
    labeler=entry.optional('judge'),
    category=entry.optional('language'),
    time=entry.optional('tstamp') or entry.optional('timestamp'),
    metadata={'winner': winner},
    each={'models': models},
  )


def _round(question: str, answer: str):
  return records.Turn('user', question), records.Turn('assistant', answer)


def _first_rounds(turns, rounds):
  """The turns up to that number of answers; all if there is no number."""
  if not rounds:
    return turns
  left = rounds
  for number, turn in enumerate(turns, start=1):
    left -= turn.role == 'assistant'
    if left == 0:
      return turns[:number]
  return turns


def _with_history(entry, side, turns):
  """The turns, preceded by those of earlier votes.

  In the 140k data set, `conversation_a` of a later vote begins where the
  previous vote was. `full_conversation` has both sides of every round,
  including rounds after the vote.
  """
  is_later = 'evaluation_order' in entry.values and (
    (entry.number('evaluation_order') or 1) > 1
  )
  if not (is_later and turns and entry.values.get('full_conversation')):
    return turns
  parts = [
    part.values.get(key) and part.entry(key).message()
    for part in entry.entries('full_conversation')
    for key in ('user', f'model_side_{side}')
  ]
  ends = range(len(parts), len(turns) - 1, -1)
  found = [end for end in ends if tuple(parts[end - len(turns) : end]) == turns]
  if not found or not all(parts[: found[0]]):
    raise Skip('full_conversation does not hold the conversation of the vote')
  return tuple(parts[: found[0]])


def _kaggle_winner(entry):
  """(winner, ranks) from three columns, one of which is 1."""
  names = {
    'winner_model_a': 'model_a',
    'winner_model_b': 'model_b',
    'winner_tie': 'tie',
  }
  won = [name for column, name in names.items() if entry.number(column) == 1]
  if len(won) != 1:
    raise records.RecordError(
      f'{", ".join(names)}: one must be 1 and the others 0'
    )
  return won[0], _WINNERS[won[0]]


READERS = {
  'hh': read_hh,
  'summarize_feedback': read_summarize_feedback,
  'safe_rlhf_helpful': reader(
    functools.partial(_add_safe_rlhf, label='better_response_id')
  ),
  'safe_rlhf_harmless': reader(
    functools.partial(_add_safe_rlhf, label='safer_response_id')
  ),
  'chosen_rejected': read_chosen_rejected,
  'ultrafeedback_binarized': read_ultrafeedback_binarized,
  'argilla': read_argilla,
  'argilla_orca': read_argilla_orca,
  'arena': read_arena,
}
