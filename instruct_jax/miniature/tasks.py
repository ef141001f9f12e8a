"""What users of the embedded world ask for: prompts with their task specs.

The use cases have the shares of paper Table 1, users send with heavy-tailed
activity, about a quarter of the prompts carry an explicit constraint (Table 7:
26.3 %), and there is some raw dirt for the data hygiene of A.1 and A.2 to find:
near duplicates, personal data, over-long prompts.

`Prompt.metadata` is the task spec, JSON, enough to judge a response by:

  kind             how `gold` judges: answer verify premise write list
                   reference summary label extract chat decline warn
  form             what is to be written: facts story poem letter review; or
                   which rewrite
  subjects         whom the response must be about
  accepted         words (kind reference: whole texts) that are right
  rivals           words of the right type that are wrong
  count            items of a list, or statements wanted
  groups           one word of each group must appear (letters, chat)
  words, sentences [low, high] of a response of the right length
  constraint       null or {kind, value}
  premise          null or {false: claim, true: value} of a false premise
  relation         of an answer, as [kind, name, subject], or null
  invites_rudeness, asks_harm, closed_domain
  facts            what is true beyond the world: the passage's facts
  slots            what else a writer needs to know
  dirt             '', near_duplicate, personal_data or over_long
"""

import random
from typing import Any

import numpy as np

from instruct_jax.data.records import Prompt
from instruct_jax.miniature import answers, phrases
from instruct_jax.miniature import world as worlds
from instruct_jax.miniature.phrases import fill
from instruct_jax.miniature.world import World, noun

# Paper Table 1, percent.
SHARES = {
  'generation': 45.6,
  'open qa': 12.4,
  'brainstorming': 11.2,
  'chat': 8.4,
  'rewrite': 6.6,
  'summarization': 4.2,
  'classification': 3.5,
  'other': 3.5,
  'closed qa': 2.6,
  'extract': 1.9,
}
# Of the prompts whose task can carry one; gives a quarter of all prompts.
CONSTRAINT_SHARE = 0.36
WRAP_SHARE = 0.35
NEAR_DUPLICATE_SHARE = 0.03
PERSONAL_DATA_SHARE = 0.02
OVER_LONG_SHARE = 0.02
# A prompt above this many tokens is over-long.
PROMPT_BUDGET = 48

Spec = dict[str, Any]
_KIND_NAMES = tuple(worlds.SUBJECTS)


def make_spec(kind: str, **fields: Any) -> Spec:
  """A task spec with the defaults of the module docstring."""
  spec = {
    'kind': kind,
    'form': '',
    'subjects': [],
    'accepted': [],
    'rivals': [],
    'count': 1,
    'groups': [],
    'words': [1, 12],
    'sentences': [1, 1],
    'constraint': None,
    'premise': None,
    'relation': None,
    'invites_rudeness': False,
    'asks_harm': False,
    'closed_domain': False,
    'facts': {},
    'slots': {},
    'dirt': '',
  }
  unknown = sorted(set(fields) - set(spec))
  if unknown:
    raise KeyError(f'no such field of a task spec: {unknown}')
  return spec | fields


def any_subject(draw, kinds=_KIND_NAMES) -> str:
  """A random person, place, animal or thing; people twice as often."""
  kind = draw.choice(kinds)
  if len(kinds) > 2 and draw.random() < 0.25:
    kind = 'person'
  return draw.choice(worlds.SUBJECTS[kind])


def any_fact(world: World, draw, subject=None):
  """A random (subject, relation, true value)."""
  subject = any_subject(draw) if subject is None else subject
  relation = draw.choice(worlds.RELATIONS_OF[worlds.KINDS[subject]])
  return subject, relation, world.facts[subject][relation.name]


# -- generation ---------------------------------------------------------------


def _write_facts(world, draw):
  subject = any_subject(draw)
  if draw.random() < 0.5:
    text = draw.choice(phrases.WRITE_ONE)
    limits = {'count': 1, 'words': [4, 14], 'sentences': [1, 1]}
  else:
    text = draw.choice(phrases.WRITE_TWO)
    limits = {'count': 2, 'words': [8, 20], 'sentences': [2, 2]}
  spec = make_spec('write', form='facts', subjects=[subject], **limits)
  return fill(text, a=noun(subject)), spec


def _write_pair(world, draw):
  first, second = any_subject(draw), any_subject(draw)
  while second == first:
    second = any_subject(draw)
  text = draw.choice(phrases.WRITE_PAIR)
  spec = make_spec(
    'write',
    form='facts',
    subjects=[first, second],
    count=2,
    words=[7, 20],
    sentences=[2, 2],
  )
  return fill(text, a=noun(first), b=noun(second)), spec


def _write_story(world, draw):
  first = any_subject(draw, ('person', 'animal'))
  second = any_subject(draw)
  while second == first:
    second = any_subject(draw)
  spec = make_spec(
    'write',
    form='story',
    subjects=[first, second],
    words=[9, 20],
    sentences=[2, 3],
  )
  text = draw.choice(phrases.WRITE_STORY)
  return fill(text, a=noun(first), b=noun(second)), spec


def _write_poem(world, draw):
  subject = any_subject(draw)
  spec = make_spec(
    'write', form='poem', subjects=[subject], words=[8, 18], sentences=[1, 2]
  )
  return fill(draw.choice(phrases.WRITE_POEM), a=noun(subject)), spec


def _write_letter(world, draw):
  subject = draw.choice(phrases.PEOPLE)
  spec = make_spec(
    'write',
    form='letter',
    subjects=[subject],
    groups=[sorted(phrases.LETTER_WORDS)],
    words=[7, 18],
    sentences=[1, 3],
  )
  return fill(draw.choice(phrases.WRITE_LETTER), a=noun(subject)), spec


def _write_review(world, draw):
  place, food = draw.choice(phrases.PLACES), draw.choice(phrases.FOODS)
  tone = draw.choice(('good', 'bad'))
  sides = [sorted(phrases.GOOD_WORDS), sorted(phrases.BAD_WORDS)]
  accepted, rivals = sides if tone == 'good' else sides[::-1]
  spec = make_spec(
    'write',
    form='review',
    subjects=[place],
    accepted=accepted,
    rivals=rivals,
    groups=[[food]],
    words=[5, 16],
    sentences=[1, 2],
    slots={'tone': tone, 'food': food},
  )
  text = draw.choice(phrases.WRITE_REVIEW)
  return fill(text, g=tone, b=food, a=place), spec


def _write_rude(world, draw):
  subject = any_subject(draw, ('person', 'animal', 'place'))
  text = draw.choice(phrases.WRITE_RUDE)
  spec = make_spec(
    'decline',
    subjects=[subject],
    groups=[list(phrases.KIND_WORDS)],
    words=[4, 15],
    sentences=[1, 2],
    invites_rudeness=True,
  )
  rude = draw.choice(phrases.RUDE)
  return fill(text, a=noun(subject), r=rude), spec


def _generation(world, draw):
  return draw.choices(
    (
      _write_facts,
      _write_pair,
      _write_story,
      _write_poem,
      _write_letter,
      _write_review,
      _write_rude,
    ),
    (8, 3, 29, 20, 16, 15, 9),
  )[0](world, draw)


# -- questions ----------------------------------------------------------------


def _answer_spec(relation, subject, value, **fields):
  return make_spec(
    'answer',
    subjects=[subject],
    accepted=[value],
    rivals=[v for v in relation.values if v != value],
    relation=[relation.kind, relation.name, subject],
    **({'words': [1, 10]} | fields),
  )


def _ask_fact(world, draw):
  subject, relation, value = any_fact(world, draw)
  text = fill(draw.choice(relation.ask), s=noun(subject))
  return text, _answer_spec(relation, subject, value)


def _ask_who(world, draw):
  _, relation, value = any_fact(world, draw)
  accepted = world.holders[relation.kind, relation.name, value]
  group = worlds.SUBJECTS[relation.kind]
  spec = make_spec(
    'answer',
    accepted=list(accepted),
    rivals=[s for s in group if s not in accepted],
    relation=[relation.kind, relation.name, value],
    words=[1, 10],
    slots={'who': True},
  )
  return fill(relation.who, v=value), spec


def _ask_whether(world, draw):
  subject, relation, value = any_fact(world, draw)
  right = draw.random() < 0.5
  asked = value
  while not right and asked == value:
    asked = draw.choice(relation.values)
  spec = make_spec(
    'verify',
    subjects=[subject],
    accepted=['yes' if right else 'no'],
    rivals=['no' if right else 'yes'],
    relation=[relation.kind, relation.name, subject],
    words=[1, 13],
    sentences=[1, 2],
    slots={'value': value, 'asked': asked},
  )
  return fill(relation.verify, s=noun(subject), v=asked), spec


def _ask_false_premise(world, draw):
  subject, relation, value = any_fact(world, draw)
  asked = value
  while asked == value:
    asked = draw.choice(relation.values)
  text = fill(relation.verify, s=noun(subject), v=asked)
  spec = make_spec(
    'premise',
    subjects=[subject],
    accepted=[value],
    rivals=[asked],
    relation=[relation.kind, relation.name, subject],
    premise={'false': asked, 'true': value},
    words=[3, 16],
    sentences=[1, 2],
  )
  return f'{draw.choice(("why", "since when"))} {text}', spec


def _ask_harm(world, draw):
  thing = draw.choice(phrases.THINGS)
  owner = world.facts[thing]['owner']
  text = draw.choice(phrases.ASK_HARM)
  harm = draw.choice(phrases.HARM)
  spec = make_spec(
    'warn',
    subjects=[thing],
    groups=[list(phrases.WARNING_WORDS)],
    words=[4, 15],
    sentences=[1, 2],
    asks_harm=True,
    slots={'owner': owner, 'harm': harm},
  )
  return fill(text, h=harm, a=noun(thing), p=owner), spec


def _open_qa(world, draw):
  return draw.choices(
    (_ask_fact, _ask_who, _ask_whether, _ask_false_premise, _ask_harm),
    (24, 4, 30, 26, 16),
  )[0](world, draw)


# -- brainstorming ------------------------------------------------------------


def _list_spec(number, accepted, rivals):
  return make_spec(
    'list',
    accepted=list(accepted),
    rivals=list(rivals),
    count=number,
    words=[number, 3 * number + 2],
  )


def _brainstorming(world, draw):
  number = draw.choice((2, 3, 4))
  kind = draw.random()
  if kind < 0.15:
    relations = phrases.RELATIONS
    relation = draw.choice(relations)
    value = draw.choice(relation.values)
    accepted = world.holders.get((relation.kind, relation.name, value), ())
    if len(accepted) >= 2:
      number = min(number, len(accepted))
      named = (
        f'{phrases.PLURALS[relation.kind]} {fill(relation.which, v=value)}'
      )
      group = worlds.SUBJECTS[relation.kind]
      rivals = [s for s in group if s not in accepted]
      text = fill(
        draw.choice(phrases.LIST_HEADS),
        n=phrases.NUMBERS[number - 1],
        c=named,
      )
      return text, _list_spec(number, accepted, rivals)
  if kind < 0.6:
    name = draw.choice(tuple(phrases.LIST_IDEAS))
    text = draw.choice(phrases.LIST_IDEAS[name])
  else:
    name = draw.choice(tuple(phrases.CLASSES))
    text = draw.choice(phrases.LIST_HEADS)
  text = fill(
    text,
    n=phrases.NUMBERS[number - 1],
    c=phrases.PLURALS[name],
    p=draw.choice(phrases.PEOPLE),
    q=draw.choice(phrases.PLACES),
  )
  return text, _list_spec(number, phrases.CLASSES[name], ())


# -- chat ---------------------------------------------------------------------


def _chat_spec(answers, groups, **fields):
  return make_spec(
    'chat',
    groups=[list(group) for group in groups],
    words=[2, 16],
    sentences=[1, 2],
    slots={'answers': list(answers)},
    **fields,
  )


def _chat_opening(world, draw):
  person, place = draw.choice(phrases.PEOPLE), draw.choice(phrases.PLACES)
  thing = draw.choice(phrases.THINGS)
  topic = draw.choices(
    ('sad', 'glad', 'name', 'thanks', 'night', 'cook', 'lost', 'rude', 'ask'),
    (15, 12, 8, 7, 5, 14, 14, 11, 14),
  )[0]
  if topic in ('sad', 'glad'):
    feeling = draw.choice(phrases.SAD if topic == 'sad' else phrases.GLAD)
    text = fill(draw.choice(phrases.CHAT_FEEL), f=feeling, p=person)
    if topic == 'glad':
      spec = _chat_spec(phrases.CHEERS, [phrases.CHEER_WORDS])
    else:
      answers = [
        f'{fill(comfort, f=feeling)} {hope}'
        for comfort in phrases.COMFORTS
        for hope in phrases.HOPES
      ]
      spec = _chat_spec(answers, [phrases.COMFORT_WORDS, phrases.HOPE_WORDS])
  elif topic == 'name':
    text = fill(draw.choice(phrases.CHAT_NAME), p=person)
    answers = [fill(answer, p=person) for answer in phrases.GREETINGS]
    spec = _chat_spec(answers, [phrases.GREETING_WORDS, [person]])
  elif topic == 'thanks':
    text = fill(draw.choice(phrases.CHAT_THANKS), t=thing)
    spec = _chat_spec(phrases.THANKED, [phrases.THANKED_WORDS])
  elif topic == 'night':
    text = fill(draw.choice(phrases.CHAT_NIGHT), q=place)
    spec = _chat_spec(phrases.NIGHTS, [phrases.NIGHT_WORDS])
  elif topic == 'cook':
    text = fill(draw.choice(phrases.CHAT_COOK), p=person)
    relation = worlds.RELATIONS['person', 'food']
    food = world.facts[person]['food']
    answers = [fill(a, p=person, v=food) for a in phrases.COOK_ANSWERS]
    spec = _answer_spec(
      relation, person, food, slots={'answers': answers}, words=[2, 12]
    )
  elif topic == 'lost':
    text = fill(draw.choice(phrases.CHAT_LOST), t=thing)
    spot = world.facts[thing]['spot']
    answers = [fill(answer, v=spot) for answer in phrases.LOST]
    spec = _chat_spec(
      answers,
      [phrases.LOST_WORDS, list(phrases.SPOTS)],
      accepted=[spot],
      rivals=[s for s in phrases.SPOTS if s != spot],
      subjects=[thing],
    )
  elif topic == 'rude':
    rude = draw.choice(phrases.RUDE)
    text = fill(draw.choice(phrases.CHAT_RUDE), r=rude)
    spec = make_spec(
      'decline',
      groups=[list(phrases.KIND_WORDS)],
      words=[4, 15],
      sentences=[1, 2],
      invites_rudeness=True,
    )
  else:
    text, spec = _ask_fact(world, draw)
  return text, spec


def _chat(world, draw):
  opening, spec = _chat_opening(world, draw)
  return fill(draw.choice(phrases.CHAT_FRAMES), o=opening), spec


# -- rewriting and other transformations of a text ----------------------------


def _reference_spec(accepted, **fields):
  lengths = [_num_words(text) for text in accepted]
  return make_spec(
    'reference',
    accepted=list(accepted),
    words=[max(1, min(lengths) - 1), max(lengths) + 2],
    **fields,
  )


def _num_words(text):
  return sum(word not in phrases.MARKS for word in text.split())


def _rewrite(world, draw):
  form = draw.choice(tuple(phrases.REWRITE_HEADS))
  head = draw.choice(phrases.REWRITE_HEADS[form])
  if form == 'polite':
    order = fill(
      draw.choice(phrases.ORDERS),
      a=noun(draw.choice(phrases.THINGS)),
      p=draw.choice(phrases.PEOPLE),
    )
    core = order.removesuffix(' !')
    accepted = [f'please {core} .', f'could you please {core} ?']
    return f'{head} {order}', _reference_spec(accepted, form=form)
  if form == 'clean':
    person = draw.choice(phrases.PEOPLE)
    relation = worlds.RELATIONS['person', 'job']
    job = world.facts[person]['job']
    source = f'{person} is a {draw.choice(phrases.RUDE)} {job} .'
    spec = _reference_spec(
      [f'{person} is a {job} .', f'{person} is a kind {job} .'],
      form=form,
      subjects=[person],
      invites_rudeness=True,
    )
    return f'{head} {source}', spec
  kinds = ('person',) if form == 'pronoun' else _KIND_NAMES
  subject, relation, value = any_fact(world, draw, any_subject(draw, kinds))
  simple = fill(relation.states[0], v=value)
  name = noun(subject)
  pronoun = worlds.pronoun(subject)
  rewritten = {
    'past': f'{name} {relation.past} .',
    'question': relation.verify,
    'negative': f'{name} {relation.negate} .',
    'pronoun': f'{pronoun} {simple} .',
  }[form]
  spec = _reference_spec(
    [fill(rewritten, s=name, v=value)], form=form, subjects=[subject]
  )
  return f'{fill(head, w=pronoun)} {name} {simple} .', spec


# -- passages -----------------------------------------------------------------


def _passage(draw, num_facts):
  """Statements about a guest, true only in the passage."""
  guest = draw.choice(phrases.GUESTS)
  relations = draw.sample(worlds.RELATIONS_OF['person'], num_facts)
  facts = {r.name: draw.choice(r.values) for r in relations}
  lines = [
    f'{noun(guest) if i == 0 or draw.random() < 0.5 else "he"} '
    f'{worlds.predicate(r, facts[r.name], draw)} .'
    for i, r in enumerate(relations)
  ]
  return guest, relations, {guest: facts}, ' '.join(lines)


def _summarization(world, draw):
  guest, _, facts, passage = _passage(draw, 3)
  spec = make_spec(
    'summary',
    subjects=[guest],
    facts=facts,
    count=2,
    words=[5, 16],
    closed_domain=True,
  )
  return f'{draw.choice(phrases.SUMMARY_HEADS)} {passage}', spec


def _closed_qa(world, draw):
  guest, relations, facts, passage = _passage(draw, draw.choice((2, 3)))
  relation = draw.choice(relations)
  question = fill(draw.choice(relation.ask), s=noun(guest))
  spec = _answer_spec(
    relation,
    guest,
    facts[guest][relation.name],
    facts=facts,
    closed_domain=True,
  )
  return f'{draw.choice(phrases.READ_HEADS)} {passage} {question}', spec


def _extract(world, draw):
  name = draw.choice(('person', 'place', 'animal', 'thing'))
  group = phrases.CLASSES[name]
  others = draw.choice([k for k in worlds.SUBJECTS if k != name])
  line = draw.choice(phrases.EXTRACT_LINES)
  first, second = draw.sample(group, 2)
  accepted = [first, second]
  if draw.random() < 0.5:
    second = draw.choice(phrases.CLASSES[others])
    accepted = [first]
  line = fill(line, a=noun(first), b=noun(second))
  if draw.random() < 0.5:
    third = draw.choice([s for s in group if s not in accepted])
    line += f' . {fill(phrases.STORY_ENDINGS[1], a=noun(third))}'
    accepted.append(third)
  head = fill(draw.choice(phrases.EXTRACT_HEADS), c=phrases.PLURALS[name])
  spec = make_spec(
    'extract',
    accepted=accepted,
    rivals=[s for s in group if s not in accepted],
    count=len(accepted),
    words=[len(accepted), 3 * len(accepted) + 1],
    closed_domain=True,
  )
  return f'{head} {line} .', spec


def _classification(world, draw):
  kind = draw.choice(('review', 'review', 'tone', 'kind'))
  if kind == 'review':
    good = draw.random() < 0.5
    lines = phrases.GOOD_REVIEWS if good else phrases.BAD_REVIEWS
    ends = phrases.GOOD_ENDINGS if good else phrases.BAD_ENDINGS
    text = fill(
      draw.choice(lines),
      a=draw.choice(phrases.PLACES),
      b=draw.choice(phrases.FOODS),
    )
    text = f'{draw.choice(phrases.REVIEW_LABELS)} {text} .'
    if draw.random() < 0.5:
      text += f' {draw.choice(ends)} .'
    labels = ['good', 'bad'] if good else ['bad', 'good']
  elif kind == 'tone':
    rude = draw.random() < 0.5
    person = draw.choice(phrases.PEOPLE)
    if rude:
      line = draw.choice(phrases.INSULTS)
      line = fill(line, a=person, r=draw.choice(phrases.RUDE))
    else:
      line = fill(draw.choice(phrases.KIND[1:3]), a=person)
      line = line.removesuffix(' .')
    text = f'{draw.choice(phrases.TONE_LABELS)} {line} .'
    labels = ['rude', 'polite'] if rude else ['polite', 'rude']
  else:
    name = draw.choice(('person', 'place', 'food'))
    word = draw.choice(phrases.CLASSES[name])
    text = fill(draw.choice(phrases.KIND_LABELS), w=word)
    labels = [name] + [k for k in ('person', 'place', 'food') if k != name]
    spec = make_spec(
      'label',
      accepted=labels[:1],
      rivals=labels[1:],
      words=[1, 6],
      slots={'word': word},
    )
    return text, spec
  return text, make_spec(
    'label', accepted=labels[:1], rivals=labels[1:], words=[1, 6]
  )


def _other(world, draw):
  kind = draw.choice(('count', 'day', 'repeat', 'greet'))
  if kind == 'count':
    low = draw.randrange(1, 7)
    high = low + draw.choice((2, 3, 4))
    numbers = phrases.NUMBERS[low - 1 : high]
    text = fill(draw.choice(phrases.COUNTS), n=numbers[0], m=numbers[-1])
    return text, _reference_spec([' , '.join(numbers) + ' .'], form='count')
  if kind == 'day':
    i = draw.randrange(7)
    day, after = phrases.DAYS[i], phrases.DAYS[(i + 1) % 7]
    answers = [fill(a, d=day, v=after) for a in phrases.DAY_ANSWERS]
    # The asked day may be repeated in the answer, so it is no rival.
    spec = make_spec(
      'answer',
      accepted=[after],
      rivals=[d for d in phrases.DAYS if d not in (day, after)],
      words=[1, 7],
      slots={'answers': answers},
    )
    return fill(draw.choice(phrases.NEXT_DAYS), d=day), spec
  if kind == 'repeat':
    subject, relation, value = any_fact(world, draw)
    line = f'{worlds.statement(relation, subject, value, draw)} .'
    text = f'{draw.choice(phrases.REPEATS)} {line}'
    return text, _reference_spec([line], form='repeat', subjects=[subject])
  person = draw.choice(phrases.PEOPLE)
  answers = [fill(answer, p=person) for answer in phrases.GREETINGS]
  spec = _chat_spec(answers, [phrases.GREETING_WORDS, [person]])
  return fill(draw.choice(phrases.GREET), p=person), spec


_WRITERS = {
  'generation': _generation,
  'open qa': _open_qa,
  'brainstorming': _brainstorming,
  'chat': _chat,
  'rewrite': _rewrite,
  'summarization': _summarization,
  'classification': _classification,
  'other': _other,
  'closed qa': _closed_qa,
  'extract': _extract,
}

# -- constraints --------------------------------------------------------------


def _constrain(spec, draw):
  """(text, constraint) that this task can satisfy, or None."""
  kind, form, subjects = spec['kind'], spec['form'], spec['subjects']
  if kind == 'write' and form == 'facts':
    choices = ['exclude', 'start', 'include', 'end']
    if spec['count'] == 1:
      # No other task can have the last one.
      choices += 2 * ['max_words'] + 8 * ['sentences']
  elif kind == 'write' and form in ('story', 'letter', 'review'):
    choices = ['start', 'end', 'include'] if form != 'letter' else ['include']
    if form == 'review':
      choices.append('max_words')
  elif kind in ('answer', 'verify', 'premise') and not spec['slots'].get('who'):
    choices = ['max_words', 'start', 'end']
  elif kind == 'summary':
    choices = ['max_words', 'start', 'exclude']
  elif kind == 'list':
    choices = ['exclude', 'start', 'include']
  else:
    return None
  name = draw.choice(choices)
  text = draw.choice(phrases.CONSTRAINTS[name])
  if name == 'max_words':
    low = {'summary': 7, 'write': 6, 'premise': 6}.get(kind, 3)
    value = draw.choice(range(low, low + 3))
    return fill(text, n=phrases.NUMBERS[value - 1]), name, value
  if name == 'sentences':
    return text, name, 2
  if name == 'end':
    return text, name, phrases.FRIEND
  if name == 'start':
    value = draw.choice(phrases.STARTS)
  elif name == 'include' and kind == 'list':
    value = draw.choice(spec['accepted'])
  elif name == 'include':
    others = [k for k in worlds.SUBJECTS if k != 'thing']
    value = any_subject(draw, others)
    while value in subjects:
      value = any_subject(draw, others)
  elif kind == 'list':
    if len(spec['accepted']) <= spec['count']:
      return None
    value = draw.choice(spec['accepted'])
  else:
    relations = worlds.RELATIONS_OF[worlds.KINDS[subjects[0]]]
    value = draw.choice(('is', 'the', 'in', 'a') + _cue_words(relations))
    if value == 'the' and noun(subjects[-1]).startswith('the'):
      value = 'and'
    if value == 'the' and noun(subjects[0]).startswith('the'):
      value = 'and'
  return fill(text, w=value), name, value


def _cue_words(relations):
  """The first verb of each relation's plainest phrasing."""
  return tuple(r.states[0].split()[0] for r in relations)


def _apply_constraint(text, spec, draw):
  found = _constrain(spec, draw)
  if found is None:
    return text, spec
  line, name, value = found
  low, high = spec['words']
  sentences = spec['sentences']
  if name == 'max_words':
    high = min(high, value)
    low = min(low, high)
  elif name == 'sentences':
    low, high, sentences = low + 2, high + 6, [2, 2]
  elif name in ('start', 'end'):
    high += 2
  elif name == 'include' and spec['kind'] != 'list':
    high += 4
    if spec['form'] in phrases.INCLUDE_LINES:
      sentences = [sentences[0], sentences[1] + 1]
  spec = spec | {
    'constraint': {'kind': name, 'value': value},
    'words': [low, high],
    'sentences': sentences,
  }
  return f'{text} {line}', spec


# -- the pool -----------------------------------------------------------------


def write_task(
  world: World, draw: random.Random, category: str
) -> tuple[str, Spec]:
  """One clean prompt of a category with its spec, without constraint."""
  return _WRITERS[category](world, draw)


def write_page(world: World, draw: random.Random, category: str) -> str:
  """One 'question : ... answer : ...' as documents and prefixes have it."""
  text, spec = write_task(world, draw, category)
  answer = answers.draft(spec, world, draw, wordy=draw.random())
  return f'{phrases.PAGE.replace("{prompt}", text)} {answer}'


def write_constrained_task(
  world: World, draw: random.Random, category: str
) -> tuple[str, Spec]:
  """As `write_task`, with a constraint at the natural rate."""
  text, spec = write_task(world, draw, category)
  if category != 'chat' and draw.random() < CONSTRAINT_SHARE:
    return _apply_constraint(text, spec, draw)
  return text, spec


def write_text(
  world: World, draw: random.Random, category: str
) -> tuple[str, Spec]:
  """A prompt as a user types it: constraint and courtesies, no dirt."""
  text, spec = write_constrained_task(world, draw, category)
  if category != 'chat' and draw.random() < WRAP_SHARE:
    if draw.random() < 0.5:
      text = f'{draw.choice(phrases.WRAP_BEFORE)} {text}'
    else:
      tail = fill(
        draw.choice(phrases.WRAP_AFTER),
        p=draw.choice(phrases.PEOPLE),
        q=draw.choice(phrases.PLACES),
      )
      text = f'{text} {tail}'
  return text, spec


def _soil(text, spec, draw):
  """Personal data, or so much chatter that the prompt is over-long."""
  chance = draw.random()
  if chance < PERSONAL_DATA_SHARE:
    line = draw.choice(phrases.PERSONAL_LINES)
    line = fill(line, x=draw.choice(phrases.PERSONAL))
    return f'{line} {text}', spec | {'dirt': 'personal_data'}
  if chance < PERSONAL_DATA_SHARE + OVER_LONG_SHARE:
    lines = draw.sample(phrases.CHATTER, len(phrases.CHATTER))
    # A chat must end with the helper's turn, so its chatter comes first.
    first = text.endswith(':')
    while len(text.split()) <= PROMPT_BUDGET:
      line = lines.pop()
      text = f'{line} {text}' if first else f'{text} {line}'
  if len(text.split()) > PROMPT_BUDGET:
    return text, spec | {'dirt': 'over_long'}
  return text, spec


def _user_names(num_prompts, draw):
  """Users and their weights: activity falls as 1 / (rank + 3)."""
  num_users = max(8, num_prompts // 8)
  names = [f'user{i:04d}' for i in range(num_users)]
  draw.shuffle(names)
  return names, [1 / (rank + 4) for rank in range(num_users)]


def write_prompts(
  world: World, num_prompts: int, rng: np.random.Generator
) -> list[Prompt]:
  """The raw prompts of the world's users, dirt included (see module docstring).

  Texts are distinct as far as twenty tries allow. A near duplicate repeats an
  earlier prompt of at least 12 tokens and adds a tail.

  Args:
    world: whose facts are asked for.
    num_prompts: how many, all categories together.
    rng: the only source of chance.
  """
  draw = random.Random(int(rng.integers(2**63)))
  users, activity = _user_names(num_prompts, draw)
  senders = draw.choices(users, activity, k=num_prompts)
  categories = draw.choices(
    tuple(SHARES), tuple(SHARES.values()), k=num_prompts
  )
  prompts, seen = [], set()
  long_prompts = {category: [] for category in SHARES}
  for i, (user, category) in enumerate(zip(senders, categories, strict=True)):
    if long_prompts[category] and draw.random() < NEAR_DUPLICATE_SHARE:
      source = draw.choice(long_prompts[category])
      text = f'{source.text} {draw.choice(phrases.DUPLICATE_TAILS)}'
      spec = source.metadata | {'dirt': 'near_duplicate'}
    else:
      for _ in range(20):
        text, spec = _soil(*write_text(world, draw, category), draw)
        if text not in seen:
          break
    seen.add(text)
    prompt = Prompt(
      id=f'p{i:06d}', text=text, user=user, category=category, metadata=spec
    )
    size = len(text.split())
    ready = 12 <= size <= PROMPT_BUDGET - 6 and not spec['dirt']
    # A tail behind a chat would stand after the helper's turn.
    if ready and category != 'chat':
      long_prompts[category].append(prompt)
    prompts.append(prompt)
  return prompts


def prefixes(world: World) -> list[str]:
  """Eight few-shot prefixes with a `{prompt}` slot, laid out as the pages are.

  The prompted baseline puts a user's prompt into the slot; the reward model
  chooses among the eight (paper 3.5, footnote 6).
  """
  draw = random.Random(f'prefixes {world.seed}')
  mixes = (
    ('open qa', 'open qa'),
    ('generation', 'generation'),
    ('generation', 'open qa'),
    ('brainstorming', 'generation'),
    ('open qa', 'generation', 'open qa'),
    ('rewrite', 'generation'),
    ('other', 'brainstorming'),
    ('open qa', 'brainstorming', 'open qa'),
  )
  found = []
  for mix in mixes:
    while True:
      pages = [write_page(world, draw, category) for category in mix]
      text = ' '.join((*pages, phrases.PAGE))
      if len(text.split()) <= 45:
        break
    found.append(text)
  return found
