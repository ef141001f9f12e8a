"""Readers for answers with ranks, scores or preference strengths.

A source that ranks K answers gives rankings of K.
"""

import functools
import itertools
import json
import re

from instruct_jax.data import invisible, records, restaurant, sources
from instruct_jax.data.importers.entries import (
  FIRST,
  SECOND,
  TIE,
  Entry,
  Imported,
  Rating,
  Skip,
  asked,
  instruction_prompt,
  post_prompt,
  rated_reader,
  reader,
  split_answers,
  texts_of,
)

# --- People -------------------------------------------------------------------


_OASST_ROLES = {'prompter': 'user', 'assistant': 'assistant'}


@reader
def read_oasst(imported, entry):
  """OpenAssistant: each prompter message with its ranked replies.

  The best reply becomes a demonstration; by a model, if it is `synthetic`.
  `rank` 0 is best. Messages that were deleted or failed review are left out,
  with everything below them. Ranks are merged from the annotators' votes, so no
  labeler is named.
  """
  tree = entry.optional('message_tree_id') or str(entry.line)
  try:
    left = [(entry.entry('prompt'), ())]
    # A stack instead of recursion, because conversations may be deep.
    while left:
      node, turns = left.pop()
      node.place = f'message {node.values.get("message_id")!r}'
      left += reversed(_visit_oasst(imported, node, turns, tree))
  except records.RecordError as error:
    raise records.RecordError(
      f'tree {tree} is not an OpenAssistant tree ({error})'
    ) from error


def _is_gone(node: Entry) -> bool:
  values = node.values
  return bool(values.get('deleted')) or values.get('review_result') is False


def _visit_oasst(imported, node, turns, tree):
  """Adds the records of one message; returns (message, turns) below it."""
  if _is_gone(node):
    imported.skip('deleted or failed review')
    return []
  role, text = _OASST_ROLES.get(node.text('role')), node.text('text')
  if role is None or invisible.is_blank(text):
    imported.skip('unknown role or empty text')
    return []
  turns = (*turns, records.Turn(role, text))
  below = node.entries('replies') if 'replies' in node.values else []
  replies = [
    reply
    for reply in below
    if not _is_gone(reply)
    and _OASST_ROLES.get(reply.text('role')) == 'assistant'
    and not invisible.is_blank(reply.text('text'))
  ]
  below = [(reply, turns) for reply in below]
  if role != 'user' or not replies:
    return below
  about = {
    'id': f'oasst:{node.optional("message_id") or tree}',
    'user': node.optional('user_id'),
    'category': node.optional('lang'),
  }
  ranked = []
  for reply in replies:
    if 'rank' in reply.values:
      rank = reply.get('rank', (int, float), 'a number')
      if rank is not None:
        ranked.append((rank, reply))
  ranked.sort(key=lambda pair: pair[0])
  if len(ranked) > 1:
    try:
      imported.add_ranked(
        turns,
        [reply.text('text') for _, reply in ranked],
        [rank for rank, _ in ranked],
        time=node.optional('created_date'),
        **about,
      )
    except Skip as reason:
      imported.skip(str(reason))
    unranked = len(replies) - len(ranked)
    imported.skip('an unranked reply among ranked ones', unranked)
  else:
    imported.skip('fewer than two ranked replies')
  best = ranked[0][1] if ranked else replies[0]
  model = ''
  if best.values.get('synthetic') is True:
    model = best.optional('model_name') or 'unnamed'
  response = f' {best.text("text")}'
  prompt = records.text_of_turns(turns)
  imported.add(
    records.Demonstration(prompt, response, turns=turns, **about), model
  )
  return below


_AXES = ('overall', 'accuracy', 'coverage', 'coherence', 'compatible')


def _rate_summary(entry: Entry, axis: str) -> Rating:
  """A summary that a worker rated from 1 to 7 on several axes.

  One worker's ratings of a post's summaries on `axis` form one ranking.
  """
  summary, info = entry.entry('summary'), entry.entry('info')
  axes, worker = summary.entry('axes'), entry.text('worker')
  text, score = summary.answer('text'), axes.number(axis)
  prompt = post_prompt(info)
  if score is None:
    raise Skip(f'the summary has no rating of {axis!r}')
  name = info.optional('id')
  return Rating(
    (name, prompt, worker),
    prompt,
    text,
    score,
    about={
      'id': name or entry.name,
      'labeler': worker,
      'category': entry.optional('batch'),
      'metadata': {'split': entry.optional('split')},
    },
    each={
      'policies': summary.optional('policy'),
      'axes': axes.details(*_AXES),
    },
  )


@reader
def read_qa_feedback(imported, entry):
  """Rankings of K = 4 from six pairwise preferences, and written answers.

  A completion's score is the number of others that it was preferred to, plus a
  half for each "no preference" (Copeland); equal scores tie. The gold answer is
  the demonstration.
  """
  preference, question = entry.items('preference'), entry.text('question')
  gold = entry.text('gold').strip()
  if len(preference) != 6 or any(p not in (0, 1, 2) for p in preference):
    raise records.RecordError(
      f'preference {preference}; expected six of 0, 1 and 2'
    )
  passages = []
  for number, passage in enumerate(entry.items('passages')):
    where = f'passages[{number}]'
    if not isinstance(passage, list):
      raise records.RecordError(f'{where} is not a list of sentences')
    passages.append(' '.join(filter(None, texts_of(passage[1:], where))))
  if invisible.is_blank(question):
    return 'the question is empty'
  prompt = instruction_prompt('\n\n'.join(filter(None, passages)), question)
  about = {'prompt': prompt, 'id': f'qa_feedback:{entry.line}'}
  scores = [0.0] * 4
  pairs = itertools.combinations(range(4), 2)
  for (a, b), choice in zip(pairs, preference, strict=True):
    points = {0: 0.5, 1: 1.0, 2: 0.0}[choice]
    scores[a] += points
    scores[b] += 1 - points
  # A text that was sampled twice becomes one completion, with its mean score.
  try:
    answers = [
      records.composed(entry.answer(f'prediction {number}').strip())
      for number in range(1, 5)
    ]
    imported.add_scored(completions=answers, scores=scores, **about)
  except Skip as reason:
    imported.skip(str(reason))
  if invisible.is_blank(gold):
    return 'no demonstration: the gold answer is empty'
  imported.add(records.Demonstration(response=gold, **about))


def _read_e2e(path, criterion):
  comparisons, counts = restaurant.read_rankings(path, criterion)
  imported = Imported(comparisons=comparisons)
  imported.skip('check items failed', counts.tainted)
  imported.skip('fewer than two texts', counts.too_few)
  imported.skip('rows with repeated texts, merged', counts.merged)
  return imported


# --- Votes, ratings and strengths ---------------------------------------------


def _add_shp(imported, entry, min_ratio):
  """SHP: two comments on a Reddit post; the later one has more votes.

  The scores are the votes. Pairs whose score ratio is below `min_ratio` are
  left out.
  """
  answers = entry.answer('human_ref_A'), entry.answer('human_ref_B')
  scores = entry.number('score_A'), entry.number('score_B')
  ranks = entry.label('labels', {'1': FIRST, '0': SECOND})
  ratio = entry.number('score_ratio')
  if None in scores or ratio is None:
    raise Skip('a score is missing')
  if records.ranks_of_scores(scores) != ranks:
    raise Skip('the label and the scores disagree')
  if ratio < min_ratio:
    raise Skip(f'the ratio of the scores is below {min_ratio:g}')
  comments = (entry.optional(f'c_root_id_{side}') for side in 'AB')
  imported.add_scored(
    asked(entry.text('history')),
    answers,
    scores,
    id=':'.join(('shp', entry.cell('post_id'), *comments)),
    category=entry.optional('domain'),
    metadata=entry.details('score_ratio', 'seconds_difference', 'upvote_ratio'),
  )


_ASPECTS = ('helpfulness', 'honesty', 'instruction_following', 'truthfulness')


@reader
def read_ultrafeedback(imported, entry):
  """UltraFeedback: four answers by models, ranked by mean aspect rating.

  The mean is over four aspects. Upstream's overall score is kept as metadata
  only: it had errors, and makers of binarized sets switched to the ratings.
  """
  question, rated = entry.text('instruction'), []
  for completion in entry.entries('completions'):
    annotations = completion.entry('annotations')
    ratings = [_rating(annotations, aspect) for aspect in _ASPECTS]
    numbers = [number for number in ratings if number is not None]
    if numbers:
      score = sum(numbers) / len(numbers)
      rated.append((completion, completion.answer('response'), score))
    else:
      imported.skip('an answer without a rating')
  if len(rated) < 2:
    raise Skip('fewer than two answers with a rating')
  completions, texts, scores = zip(*rated, strict=True)
  imported.add_scored(
    asked(question),
    texts,
    scores,
    id=f'ultrafeedback:{entry.name}',
    category=entry.optional('source'),
    each={
      'models': [one.optional('model') for one in completions],
      'overall_scores': [one.optional('overall_score') for one in completions],
    },
  )


def _rating(annotations: Entry, aspect: str) -> int | float | None:
  """A rating of UltraFeedback; None for 'N/A', or if nothing was rated."""
  if annotations.values.get(aspect) == []:  # Upstream could not parse one.
    return None
  found = annotations.entry(aspect)
  if not found.values:
    return None
  is_missing = found.values.get('Rating') == 'N/A'
  return None if is_missing else found.number('Rating')


_HELPSTEER = ('correctness', 'coherence', 'complexity', 'verbosity')
# HelpSteer 2 stores a conversation as one text.
_MARK = re.compile(r'\n?<extra_id_1>(User|Assistant)\n')


def _steered(text: str) -> tuple[records.Turn, ...]:
  """The turns of a prompt of HelpSteer 1 and 2."""
  first, *rest = _MARK.split(text)
  turns = [records.Turn('user', first.strip())]
  for role, content in zip(rest[::2], rest[1::2], strict=True):
    turns.append(records.Turn(role.lower(), content.strip()))
  return tuple(turns)


@rated_reader
def read_helpsteer(entry):
  """Answers with five attributes from 0 to 4, ranked by helpfulness.

  HelpSteer has up to four answers per prompt, HelpSteer 2 has two.
  """
  prompt, response = entry.text('prompt'), entry.answer('response')
  score = entry.number('helpfulness')
  attributes = {name: entry.number(name) for name in _HELPSTEER}
  if score is None:
    raise Skip('the answer has no rating of helpfulness')
  return Rating(
    prompt,
    _steered(prompt),
    response,
    score,
    about={'id': f'helpsteer:{entry.name}'},
    each=attributes,
  )


def _add_strength(imported, entry, key, turns, answers, metadata, **about):
  """Adds a pair whose preference is from -3 to 3.

  At -3 the first answer is much better, at 3 the second.
  """
  strength = entry.number(key)
  if strength is None or not -3 <= strength <= 3:
    raise records.RecordError(f'{key!r} is {strength}, expected -3 to 3')
  ranks = TIE if not strength else FIRST if strength < 0 else SECOND
  metadata = {'strength': strength, **metadata}
  imported.add_ranked(turns, answers, ranks, metadata=metadata, **about)


@reader
def read_helpsteer2_preference(imported, entry):
  """preference.jsonl of HelpSteer 2: two answers and a preference strength."""
  _add_strength(
    imported,
    entry,
    'preference_strength',
    _steered(entry.text('prompt')),
    (entry.answer('response_1'), entry.answer('response_2')),
    entry.details('split', 'preference_statement'),
    id=f'helpsteer2:{entry.name}',
  )


@reader
def read_helpsteer3(imported, entry):
  """HelpSteer 3: a conversation, two answers and an overall preference."""
  votes = [
    one.number('score') for one in entry.entries('individual_preference')
  ]
  _add_strength(
    imported,
    entry,
    'overall_preference',
    entry.messages('context'),
    (entry.answer('response1'), entry.answer('response2')),
    {'votes': votes, **entry.details('language')},
    id=f'helpsteer3:{entry.name}',
    category=entry.text('domain'),
  )


def _webgpt_entries(path):
  """Entries of WebGPT: rows of the Hub, or upstream's lines of two answers."""
  is_json = str(path).endswith(sources.JSON_SUFFIXES)
  if not is_json or not records.begins_with(path, b'['):
    yield from sources.read_objects(path)
    return
  text = records.read_text(path)
  if '\n' not in text.strip() and not _is_pair(text):
    yield from sources.read_objects(path)
    return
  for number, line in enumerate(text.split('\n'), start=1):
    if not line.strip():
      continue
    pair = _is_pair(line)
    if not pair:
      yield number, 'expected a list of two answers, or rows of the Hub'
      continue
    # Both answers repeat the question.
    values = {}
    for side, answer in enumerate(pair):
      for key, value in answer.items():
        values[key if key == 'question' else f'{key}_{side}'] = value
    yield number, values


def _is_pair(line: str) -> list[dict] | None:
  """The two answers on a line of upstream's file; None for any other line."""
  try:
    pair = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if (
    isinstance(pair, list)
    and len(pair) == 2
    and all(isinstance(one, dict) and 'answer' in one for one in pair)
  ):
    return pair
  return None


def _add_webgpt(imported, entry):
  """Two answers to a question, with scores from -1 to 1 that sum to 0."""
  question = entry.entry('question')
  answers = entry.answer('answer_0'), entry.answer('answer_1')
  scores = entry.number('score_0'), entry.number('score_1')
  if None in scores:
    raise Skip('a score is missing')
  imported.add_scored(
    asked(question.text('full_text')),
    answers,
    scores,
    id=f'webgpt:{question.optional("id") or entry.name}',
    category=question.optional('dataset'),
  )


@reader
def read_nectar(imported, entry):
  """Seven answers to a dialogue, ranked by GPT-4; rank 1 is best."""
  turns = records.dialogue_turns('\n\n' + entry.text('prompt').strip())
  if not turns or turns[-1] != records.Turn('assistant', ''):
    raise Skip('not a dialogue that asks for an answer')
  answers = entry.entries('answers')
  ranks = [answer.number('rank') for answer in answers]
  if None in ranks:
    raise Skip('an answer has no rank')
  imported.add_ranked(
    turns[:-1],
    [answer.answer('answer') for answer in answers],
    ranks,
    id=f'nectar:{entry.name}',
    metadata=entry.details('good_natured'),
    each={'models': [answer.optional('model') for answer in answers]},
  )


@reader
def read_dsp(imported, entry):
  """The cleaned sets of DSP: whole dialogues, each with a score."""
  dialogues, scores = entry.texts('text'), entry.items('score')
  if len(scores) != len(dialogues) or not all(map(records.is_number, scores)):
    raise records.RecordError(
      f"'score' must have a number for each of {len(dialogues)} texts"
    )
  turns, answers = split_answers(map(_dsp_turns, dialogues))
  imported.add_scored(turns, answers, scores, id=f'dsp:{entry.name}')


_HEADINGS = re.compile(r'## Human:\n(.*?)\n\n## Assistant:\n(.*)', re.DOTALL)


def _dsp_turns(text: str) -> tuple[records.Turn, ...]:
  """A dialogue in the layout of HH, or one question under a heading."""
  match = _HEADINGS.fullmatch(text)
  if not match:
    return records.dialogue_turns(text)
  question, answer = (part.strip() for part in match.groups())
  return records.Turn('user', question), records.Turn('assistant', answer)


READERS = {
  'oasst': read_oasst,
  'summarize_axis': rated_reader(
    functools.partial(_rate_summary, axis='overall')
  ),
  'qa_feedback': read_qa_feedback,
  'e2e_quality': functools.partial(_read_e2e, criterion='quality'),
  'e2e_naturalness': functools.partial(_read_e2e, criterion='naturalness'),
  'shp': reader(functools.partial(_add_shp, min_ratio=1)),
  'shp_ratio_2': reader(functools.partial(_add_shp, min_ratio=2)),
  'ultrafeedback': read_ultrafeedback,
  'helpsteer': read_helpsteer,
  'helpsteer2_preference': read_helpsteer2_preference,
  'helpsteer3': read_helpsteer3,
  'webgpt': reader(_add_webgpt, entries=_webgpt_entries),
  'nectar': read_nectar,
  'dsp': read_dsp,
}
