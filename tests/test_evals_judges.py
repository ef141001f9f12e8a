"""Judges: scores, people, and a chat model behind a faulty local server."""

import dataclasses
import json

import pytest
from etils import epath

from configs import evaluate as config_file
from instruct_jax import judge_fns
from instruct_jax.data import records
from instruct_jax.evals import chat_judge as chat
from instruct_jax.evals import judges, preferences
from instruct_jax.evals.samples import Sample
from instruct_jax.miniature import gold, tasks, world
from tests.fake_server import Fault, serve

PROMPT = records.Prompt('p1', 'name a colour', category='open qa')


def answer(model, text, tokens=3, prompt=PROMPT):
  return Sample(model, prompt.id, prompt.text, text, tokens, True)


def pair(first='red', second='the colour red', prompt=PROMPT):
  return judges.Pair(
    prompt, answer('x', first, prompt=prompt), answer('y', second, 6, prompt)
  )


def make(name, workdir, **changes):
  """The judge of configs/evaluate.py:NAME, or of a dotted name."""
  config = config_file.get_config(
    name if name in config_file.JUDGES else 'gold'
  )
  config.judge = config_file.JUDGES.get(name, name)
  config.update(changes)
  judge = judge_fns.find(config.judge)
  judge.validate(config)
  return judge(config, epath.Path(workdir), None)


class Scripted(judges.Judge):
  """Gives the verdicts of a function of the first answer's text."""

  def __init__(self, say):
    super().__init__(None, epath.Path('/nowhere'), None)
    self._say = say

  def compare(self, pairs):
    return [self._say(pair.first.response) for pair in pairs]


def judged(judge, pairs):
  """`ask_both_orders`, without judgements that have no outcome."""
  found, account = judges.ask_both_orders(judge, pairs)
  return [j for j in found if j.outcome is not None], account


def length(prompts, responses, metadata):
  """A user-defined judge: a function of the texts."""
  assert len(prompts) == len(responses) == len(metadata)
  return [len(response) for response in responses]


def test_a_function_of_the_texts_judges_by_its_dotted_name(tmp_path):
  judge = make('tests.test_evals_judges.length', tmp_path)
  pairs = [pair(), pair('same', 'size'), pair('long one', 'no')]
  answers = [(p.prompt, a) for p in pairs for a in (p.first, p.second)]
  scores = judge.score(answers)
  assert list(scores) == [3, 14, 4, 4, 8, 2]
  scored = [
    dataclasses.replace(a, score_judge=float(score))
    for (_, a), score in zip(answers, scores, strict=True)
  ]
  pairs = [
    judges.Pair(PROMPT, *both)
    for both in zip(scored[::2], scored[1::2], strict=True)
  ]
  found, account = judges.ask_both_orders(judge, pairs)
  assert [j.outcome for j in found] == [0.0, 0.5, 1.0]
  assert (found[0].model, found[0].other) == ('x', 'y')
  assert found[0].log_length_ratio == pytest.approx(-0.6931, abs=1e-4)
  assert found[0].category == 'open qa'
  assert account == judges.Account(pairs=3, judgements=3)
  assert found[0].orders[0].raw == 'scores 3 and 14'
  assert 'tests.test_evals_judges.length' in judge.name


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('nowhere', 'judge'),
    ('instruct_jax.nowhere.f', 'judge .*instruct_jax.nowhere'),
    ('instruct_jax.evals.judges.LIKERT', 'must be a function of texts'),
    ('instruct_jax.evals.judges.Pair', 'or a class of judges.Judge'),
    ('reward', 'judge_model is empty; the judge .*RewardModel needs it'),
    ('people', 'rankings is empty; the judge .*People needs it'),
    ('http', 'endpoint.url is empty; the judge .*ChatJudge needs it'),
  ],
)
def test_judges_that_cannot_judge_are_named(name, message, tmp_path):
  with pytest.raises(ValueError, match=message) as error:
    make(name, tmp_path)
  assert '\n' not in str(error.value)


def test_position_bias_cancels_and_is_counted():
  found, account = judged(
    Scripted(lambda text: [judges.Verdict(1.0)]), [pair()]
  )
  assert found[0].outcome == 0.5 and found[0].contradicts
  assert account.contradictions == 1


def test_every_blank_answer_counts_once():
  """Two samples of a prompt, compared with two others."""
  blank, again, red = answer('x', ''), answer('x', ''), answer('y', 'red')
  other = answer('z', 'blue')
  sides = ((blank, red), (again, red), (blank, other), (again, other))
  pairs = [judges.Pair(PROMPT, *both) for both in sides]
  _, account = judged(Scripted(lambda text: []), pairs)
  assert account.empty == 2


def test_nothing_is_dropped_silently():
  verdicts = {
    'red': [judges.Verdict(1.0)],
    'the colour red': [judges.Verdict(None)],
  }
  pairs = [pair(), pair('blue', 'red'), pair('', 'red')]
  found, account = judged(Scripted(lambda text: verdicts.get(text, [])), pairs)
  assert not found
  # The other two pairs have a verdict in only one order.
  assert account == judges.Account(pairs=3, unjudged=2, unparsed=1, empty=1)


def test_the_gold_judge_is_the_utility_of_its_world(rng, tmp_path):
  the_world = world.make_world(3)
  prompts = tasks.write_prompts(the_world, 20, rng)
  judge = make('gold', tmp_path, world_seed=3)
  assert judge.is_ceiling and judge.account() == {'world_seed': 3}
  for prompt in prompts[:5]:
    said = gold.judge(prompt, 'the wolf is red .', the_world)
    found = [(prompt, answer('x', 'the wolf is red .', prompt=prompt))]
    assert judge.score(found) == [gold.utility(said)]
    rating = judge.rate(found)[0][0]
    assert rating.labels['hallucination'] == said.hallucination
    assert rating.likert - 1 <= 7 * gold.utility(said) <= rating.likert
    applies = said.satisfies_constraint is not None
    assert ('satisfies_constraint' in rating.labels) == applies
  # Whether a label applies does not depend on the answer.
  assert judge.knows(prompts[0]) and not judge.knows(PROMPT)
  with pytest.raises(ValueError, match="'p1' is no task of the miniature"):
    judge.score([(PROMPT, answer('x', 'red'))])


# --- People -------------------------------------------------------------------


def people(tmp_path, *comparisons):
  path = tmp_path / 'rankings.jsonl'
  records.write_jsonl(path, comparisons)
  return make('people', tmp_path, rankings=str(path))


def ranking(labeler, ranks, **metadata):
  return records.Comparison(
    'name a colour',
    ('red', 'the colour red', 'no'),
    ranks,
    labeler=labeler,
    metadata=metadata,
  )


def test_people_judge_by_their_ranks(tmp_path):
  judge = people(
    tmp_path,
    ranking('ann', (1, 2, 3)),
    ranking('bob', (1, 1, 2)),
    ranking('cy', (3, 2, 1)),
  )
  assert judge.name.startswith('people (3 by name)')
  found, account = judged(judge, [pair()])
  assert {j.labeler: j.outcome for j in found} == {
    'ann': 1.0,
    'bob': 0.5,
    'cy': 0.0,
  }
  assert account.judgements == 3 and account.contradictions == 0
  _, account = judged(judge, [pair('green', 'red')])
  assert account.unjudged == 1


def test_anonymous_rankings_are_separate_judgements(tmp_path):
  judge = people(
    tmp_path,
    ranking('', (1, 2, 3)),
    ranking('', (2, 1, 3)),
    ranking('ann', (1, 2, 3)),
    ranking('ann', (2, 1, 3)),  # She was asked twice.
  )
  found, account = judged(judge, [pair()])
  assert [(j.labeler, j.outcome) for j in found] == [
    ('', 1.0), ('', 0.0), ('ann', 1.0), ('ann', 0.0),
  ]  # fmt: skip
  assert account == judges.Account(pairs=1, judgements=4)
  assert not any(j.contradicts for j in found)
  assert judge.name.startswith('people (1 by name)')
  # The nameless rankings may be one person's or several people's.
  assert preferences.rates(found).by_labeler is None


def test_verdicts_in_only_one_order_are_counted():
  said = {
    'red': [
      judges.Verdict(1.0, 'ann'),
      judges.Verdict(1.0),
      judges.Verdict(0.0),
    ],
    'the colour red': [judges.Verdict(0.0, 'ann'), judges.Verdict(1.0)],
  }
  found, account = judges.ask_both_orders(Scripted(said.get), [pair()])
  # Ann's match; the third could match either of two nameless verdicts.
  assert [j.outcome for j in found] == [1.0, None, None, None]
  assert account == judges.Account(pairs=1, one_order=3, judgements=1)


def test_a_text_ranked_twice_is_rated_twice(tmp_path):
  twice = records.Comparison(
    'name a colour', ('red', 'no', 'red'), (1, 2, 3), labeler='ann',
    metadata={'likert': [6, 1, 4]},
  )  # fmt: skip
  judge = people(tmp_path, twice)
  found = judge.rate([(PROMPT, answer('x', 'red'))])[0]
  assert [rating.likert for rating in found] == [6.0, 4.0]
  # Mean rank 2 against 2: a tie.
  assert judge.compare([pair('red', 'no')])[0][0].preference == 0.5


def test_people_rate(tmp_path):
  judge = people(
    tmp_path,
    ranking(
      'ann',
      (1, 2, 3),
      likert=[6, None, 1],
      labels=[{'hallucination': False}, {}, {'hallucination': True}],
    ),
  )
  found = judge.rate(
    [(PROMPT, answer('x', text)) for text in ('red', 'the colour red', 'mauve')]
  )
  assert found[0] == [judges.Rating(6.0, {'hallucination': False}, 'ann')]
  assert found[1] == found[2] == []


@pytest.mark.parametrize(
  ('metadata', 'message'),
  [
    ({'likert': [6, 1]}, 'list of 3 entries'),
    ({'likert': [6, 8, 1]}, 'holds 8; expected 1 to 7'),
    ({'likert': [6, True, 1]}, 'holds True'),
    ({'labels': [{}, {'rude': 1}, {}]}, 'object of true and false'),
  ],
)
def test_malformed_ratings_are_named(tmp_path, metadata, message):
  with pytest.raises(records.RecordError, match=f'record 1.*{message}'):
    people(tmp_path, ranking('ann', (1, 2, 3), **metadata))


# --- A chat model -------------------------------------------------------------


def reply(text, prompt_tokens=10, completion_tokens=2):
  return {
    'choices': [{'message': {'role': 'assistant', 'content': text}}],
    'usage': {
      'prompt_tokens': prompt_tokens,
      'completion_tokens': completion_tokens,
    },
  }


def chat_judge(url, workdir):
  workdir.mkdir(exist_ok=True)
  config = config_file.get_config('http')
  config.endpoint.update(
    {
      'url': url,
      'key_variable': '',
      'timeout': 2.0,
      'num_workers': 2,
      'model': 'some-model',
      'prompt_price': 1.0,
      'completion_price': 5.0,
    }
  )
  return make('http', workdir, endpoint=config.endpoint)


def content_of(body):
  return body['messages'][0]['content']


def prefers_short(body, number):
  text = content_of(body)
  first, second = (
    text.split(f'<answer_{i}>\n')[1].split(f'\n</answer_{i}>')[0]
    for i in (1, 2)
  )
  better = 1 if len(first) < len(second) else 2
  return reply(f'```json\n{{"better": {better}}}\n```')


def test_a_chat_model_compares_in_both_orders(tmp_path):
  with serve(prefers_short) as (url, requests):
    judge = chat_judge(url, tmp_path)
    found, account = judged(judge, [pair(), pair('a long answer', 'no')])
    assert [j.outcome for j in found] == [1.0, 0.0]
    assert account.contradictions == 0
    # 4 replies of 10 and 2 tokens, at 1 and 5 a million.
    cost = {
      'replies': 4,
      'replies without usage': 0,
      'prompt_tokens': 40,
      'completion_tokens': 8,
      'cost': pytest.approx(80e-6),
    }
    used = judge.account()
    assert used == used | cost | {'requests': 4, 'remembered': 0}
    # A second run is free, and reports the cost of the result.
    again = chat_judge(url, tmp_path)
    judged(again, [pair(), pair('a long answer', 'no')])
    used = again.account()
    assert used == used | cost | {'requests': 0, 'remembered': 4}
  assert len(requests) == 4
  body = requests[0][1]
  assert (body['model'], body['temperature']) == ('some-model', 0)
  assert 'name a colour' in content_of(body)


def test_faults_and_malformed_replies_are_counted(tmp_path):
  def answer_of(body, number):
    if number == 1:
      return Fault(503, 'busy')
    if 'gibberish' in content_of(body):
      return reply('I like both.')
    return prefers_short(body, number)

  with serve(answer_of) as (url, _):
    judge = chat_judge(url, tmp_path)
    found, account = judged(judge, [pair('gibberish', 'red'), pair()])
  assert len(found) == 1
  assert account == judges.Account(pairs=2, unparsed=1, judgements=1)


def test_a_chat_model_rates(tmp_path):
  def answer_of(body, number):
    if 'mauve' in content_of(body):
      return reply('{"overall": 9}')
    return reply(
      json.dumps(
        {'overall': 6, 'hallucination': False, 'expresses opinion': None}
      )
    )

  with serve(answer_of) as (url, _):
    found = chat_judge(url, tmp_path).rate(
      [(PROMPT, answer('x', text)) for text in ('red', 'mauve')]
    )
  assert found == [[judges.Rating(6.0, {'hallucination': False})], []]


THINKING = '<think>Is {"better": 1} or {"better": 2} right? {x}</think>'


@pytest.mark.parametrize(
  ('text', 'preference'),
  [
    ('{"better": 1}', 1.0),
    ('Sets {a, b} differ, so: {"better": 2}', 0.0),
    ('{"better": 2} because {a} is no {b}.', 0.0),
    ('{"note": {"x": 1}} then {"better": 0}', 0.5),
    ('{"verdict": {"better": 1}, "why": "{"}', 1.0),
    ('{"why": "not {\\"better\\": 2}", "better": 1}', 1.0),
    ('```json\n{"better": 1}\n```\nSo {"better": 1}.', 1.0),
    ('[{"better": 2}]', 0.0),
    (f'{THINKING}\n{{"better": 1}}', 1.0),
    (f'{{"better": 2}}\n{THINKING}', 0.0),
    (f'{{"better": 2}}\n{THINKING[:-8]}', 0.0),  # Cut within its reasoning.
    # The opening mark was part of the prompt.
    ('{"better": 1}? No. </think> {"better": 2}', 0.0),
    ('I avoid <think> here. {"better": 2}', 0.0),
    ('<THINK>well</THINK>{"better": 1}', 1.0),
    # Other models' marks.
    ('[THINK]{"better": 1}?[/THINK]{"better": 2}', 0.0),
    ('{"better": 0} ◁think▷{"better": 1}◁/think▷', 0.5),
    ('<seed:think>{"better": 1}</seed:think>{"better": 2}', 0.0),
    ('<analysis>{"better": 1}</analysis>\n{"better": 2}', 0.0),
    (
      '<|channel|>analysis<|message|>{"better": 1}?<|end|><|start|>assistant'
      '<|channel|>final<|message|>{"better": 2}',
      0.0,
    ),
    # Cut before the final channel: all that it said is read.
    ('<|channel|>analysis<|message|>Say {"better": 1}.', 1.0),
    ('{"better": null} stands for {"better": 1}', 1.0),
    ('{' * 5000 + '{"better": 1}', 1.0),
    ('[' * 100_000 + '{"a":' * 2000 + '{"better": 1}', 1.0),
  ],
)
def test_a_preference_is_found_anywhere(text, preference):
  assert chat.read_preference(text) == preference


@pytest.mark.parametrize(
  'text',
  ['', '{}', '{"better": 3}', '{"better": true}', '{"better": "1"}', '[1]',
   'better: 1', '{"better": 1} or {"better": 2}', '{"better": 1, "better": 2}',
   THINKING, '{"better": 1', '{better: 1}', '{"better": NaN}'],
)  # fmt: skip
def test_text_without_a_preference_is_refused(text):
  with pytest.raises(ValueError):
    chat.read_preference(text)


def test_a_rating_is_found_anywhere():
  text = '<think>{"overall": 1}</think> {fine} {"overall": 6, "x": 1} {}'
  assert chat.read_rating(text) == judges.Rating(6.0, {})
  with pytest.raises(ValueError, match='contradictory'):
    chat.read_rating('{"overall": 6} {"overall": 5}')
  with pytest.raises(ValueError, match='"overall" is 8'):
    chat.read_rating('{"overall": 8}')


def test_reasoning_around_the_verdict_reaches_the_judgement(tmp_path):
  """By HTTP: prose with braces, parts, reasoning; contradictions count."""

  def answer_of(body, number):
    text = content_of(body)
    if 'gibberish' in text:
      return reply('{"better": 1}, or rather {"better": 2}')
    if text.index('<answer_1>\nred') < 0:
      raise AssertionError(text)
    return reply(f'{THINKING} The set {{a}}. {{"better": 1}} Since {{b}}.')

  def parts_of(body, number):
    return reply([{'type': 'text', 'text': '{"better":'},
                  {'type': 'text', 'text': ' 1}'}])  # fmt: skip

  pairs = [pair('red', 'red'), pair('gibberish', 'red')]
  with serve(answer_of) as (url, _):
    judge = chat_judge(url, tmp_path)
    found, account = judges.ask_both_orders(judge, pairs)
  assert account == judges.Account(
    pairs=2, unparsed=1, judgements=1, contradictions=1
  )
  # Every reply is kept with its order.
  assert [o.preference for o in found[0].orders] == [1.0, 1.0]
  assert [o.first for o in found[0].orders] == ['x', 'y']
  assert found[0].orders[0].raw.endswith('Since {b}.')
  assert found[1].outcome is None
  assert {o.preference for o in found[1].orders} == {None}
  assert 'or rather' in found[1].orders[0].raw
  with serve(parts_of) as (url, _):
    judge = chat_judge(url, tmp_path / 'parts')
    assert judge.compare(pairs[:1]) == [[judges.Verdict(1.0)]]


def test_reasoning_sent_apart_is_no_verdict(tmp_path):
  """`reasoning_content` is read only if the content has no verdict."""

  def answer_of(body, number):
    found = reply('{"better": 2}')
    message = found['choices'][0]['message']
    message['reasoning_content'] = 'Is {"better": 1} right?'
    if 'gibberish' in content_of(body):
      message.pop('reasoning_content')
      message |= {'content': None, 'reasoning': 'So {"better": 1}'}
    return found

  with serve(answer_of) as (url, _):
    judge = chat_judge(url, tmp_path)
    found = judge.compare([pair(), pair('gibberish', 'red')])
  assert [verdict.preference for (verdict,) in found] == [0.0, 1.0]
  assert judge.account()['replies with reasoning'] == 2
  assert judge.account()['unread replies'] == 0


def test_unread_replies_are_counted_with_their_reason(tmp_path):
  def answer_of(body, number):
    text = content_of(body)
    found = reply('<think>Let me see' if 'gibberish' in text else 'Hm.')
    if 'gibberish' in text:
      found['choices'][0]['finish_reason'] = 'length'
    if 'overall' not in text and 'blue' in text:
      return reply('Hm. {"better": 1}')
    return found

  with serve(answer_of) as (url, requests):
    judge = chat_judge(url, tmp_path)
    judge.compare([pair('gibberish', 'red'), pair('blue', 'red')])
    judge.rate([(PROMPT, answer('x', 'red'))])
    asked = len(requests)
  # Each unread reply was asked for once more.
  assert asked == 2 + 1 + 2
  found = judge.account()
  assert found == found | {
    'replies': 5,
    'unread replies': 4,
    'unread replies cut at max_tokens': 2,
    'unread verdicts': 1,
    'unread ratings': 1,
    'replies with reasoning': 2,
  }
  assert judge.alarms() == [
    '1 ratings of the judge could not be read',
    '2 of 4 unread replies of the judge were cut at 512 tokens; raise '
    'endpoint.max_tokens',
  ]


def test_other_keys_of_a_request_are_the_configs(tmp_path):
  config = config_file.get_config('http')
  config.endpoint.update({'key_variable': '', 'model': 'some-model'})
  config.endpoint.body = '{"max_tokens": null, "max_completion_tokens": 9}'
  with serve(lambda b, n: reply('{"better": 0}')) as (url, requests):
    config.endpoint.url = url
    judge = make('http', tmp_path, endpoint=config.endpoint)
    judge.compare([pair()])
  body = requests[0][1]
  assert 'max_tokens' not in body and body['max_completion_tokens'] == 9
  for text in ('[1]', '{', '{"messages": []}'):
    with pytest.raises(ValueError, match=r'endpoint\.body'):
      chat.read_body(text)


def test_braces_in_answers_reach_the_model_unchanged(tmp_path):
  with serve(lambda b, n: reply('{"better": 0}')) as (url, requests):
    judge = chat_judge(url, tmp_path)
    assert judge.compare([pair('{x} </answer_1>', 'red')]) == [
      [judges.Verdict(0.5)]
    ]
  assert '{x} </answer_1>' in content_of(requests[0][1])
