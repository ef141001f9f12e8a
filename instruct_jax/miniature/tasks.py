"""What users of the embedded world ask for: prompts with their task specs.

The use cases have the shares of paper Table 1. A few users send most of the
prompts, about a quarter of the prompts carry an explicit constraint (Table 7:
26.3 %), and some are dirty, for the data hygiene of A.1 and A.2 to find: near
duplicates, personal data, over-long prompts.

`Prompt.metadata` is the task spec, in JSON; `make_spec` lists its fields. With
the world's facts, it is enough to judge a response.
"""

import random
from typing import Any

import numpy as np

from instruct_jax.data.records import Prompt
from instruct_jax.miniature import answers, phrases
from instruct_jax.miniature import world as worlds
from instruct_jax.miniature.phrases import fill
from instruct_jax.miniature.world import World, noun

# Paper Table 1, in percent.
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
# Of the prompts whose task can carry one; about a quarter of all prompts do.
CONSTRAINT_SHARE = 0.36
WRAP_SHARE = 0.35
NEAR_DUPLICATE_SHARE = 0.03
PERSONAL_DATA_SHARE = 0.02
OVER_LONG_SHARE = 0.02
# A prompt with more tokens than this is over-long.
PROMPT_BUDGET = 48

# Kind of task -> least and most words, and sentences, of a response.
_LIMITS = {
  'answer': ([1, 10], [1, 1]),
  'verify': ([1, 13], [1, 2]),
  'premise': ([3, 16], [1, 2]),
  'chat': ([2, 16], [1, 2]),
  'decline': ([4, 15], [1, 2]),
  'warn': ([4, 15], [1, 2]),
  'label': ([1, 6], [1, 1]),
  'summary': ([5, 16], [1, 1]),
}

Spec = dict[str, Any]
_KIND_NAMES = tuple(worlds.SUBJECTS)


def make_spec(kind: str, **fields: Any) -> Spec:
  """Makes a task spec from `fields`, with defaults for the others.

  Raises:
    KeyError: a field is unknown.
  """
  words, sentences = _LIMITS.get(kind, ([1, 12], [1, 1]))
  spec = {
    # How `gold` judges: answer, verify, premise, write, list, reference,
    # summary, label, extract, chat, decline or warn.
    'kind': kind,
    # What to write (facts, story, poem, letter, review), or which rewrite.
    'form': '',
    'subjects': [],  # Whom or what the response must be about.
    'accepted': [],  # Right words (for kind reference, whole texts).
    'rivals': [],  # Wrong words of the right type.
    'count': 1,  # Number of list items or statements wanted.
    'groups': [],  # One word of each group must appear.
    # [low, high] for the length of a response.
    'words': words,
    'sentences': sentences,
    'constraint': None,  # Or {kind, value}.
    'premise': None,  # Or {false: value, true: value} of a false premise.
    'relation': None,  # Or [kind, name, subject or value] of the question.
    'invites_rudeness': False,
    'asks_harm': False,
    'closed_domain': False,
    'facts': {},  # Facts beyond those of the world: the passage's.
    'slots': {},  # Other values that the answer writer needs.
    'dirt': '',  # Or near_duplicate, personal_data, over_long.
  }
  unknown = sorted(set(fields) - set(spec))
  if unknown:
    raise KeyError(f'no such field of a task spec: {unknown}')
  return spec | fields


def any_subject(draw, kinds=_KIND_NAMES) -> str:
  """A random person, place, animal or thing; people about twice as often."""
  kind = draw.choice(kinds)
  if len(kinds) > 2 and draw.random() < 0.25:
    kind = 'person'
  return draw.choice(worlds.SUBJECTS[kind])


def two_subjects(draw, kinds=_KIND_NAMES) -> tuple[str, str]:
  """A subject of one of the kinds, and a different one of any kind."""
  first, second = any_subject(draw, kinds), any_subject(draw)
  while second == first:
    second = any_subject(draw)
  return first, second


def _any_fact(world: World, draw, subject=None):
  """A random (subject, relation, true value)."""
  subject = any_subject(draw) if subject is None else subject
  relation = draw.choice(worlds.relations_of(subject))
  return subject, relation, world.facts[subject][relation.name]


def _others(group, values) -> list[str]:
  return [word for word in group if word not in values]


# -- generation ---------------------------------------------------------------


def _write_spec(form, subjects, words, sentences, **fields):
  return make_spec(
    'write',
    form=form,
    subjects=subjects,
    words=words,
    sentences=sentences,
    **fields,
  )


def _decline_spec(subjects=()):
  return make_spec(
    'decline',
    subjects=list(subjects),
    groups=[list(phrases.KIND_WORDS)],
    invites_rudeness=True,
  )


def _write_facts(world, draw):
  subject = any_subject(draw)
  if draw.random() < 0.5:
    heads, count, words = phrases.WRITE_ONE, 1, [4, 14]
  else:
    heads, count, words = phrases.WRITE_TWO, 2, [8, 20]
  spec = _write_spec('facts', [subject], words, [count, count], count=count)
  return fill(draw.choice(heads), a=noun(subject)), spec


def _write_pair(world, draw):
  first, second = two_subjects(draw)
  text = fill(draw.choice(phrases.WRITE_PAIR), a=noun(first), b=noun(second))
  return text, _write_spec('facts', [first, second], [7, 20], [2, 2], count=2)


def _write_story(world, draw):
  first, second = two_subjects(draw, ('person', 'animal'))
  text = fill(draw.choice(phrases.WRITE_STORY), a=noun(first), b=noun(second))
  return text, _write_spec('story', [first, second], [9, 20], [2, 3])


def _write_poem(world, draw):
  subject = any_subject(draw)
  text = fill(draw.choice(phrases.WRITE_POEM), a=noun(subject))
  return text, _write_spec('poem', [subject], [8, 18], [1, 2])


def _write_letter(world, draw):
  subject = draw.choice(phrases.PEOPLE)
  groups = [sorted(phrases.LETTER_WORDS)]
  spec = _write_spec('letter', [subject], [7, 18], [1, 3], groups=groups)
  return fill(draw.choice(phrases.WRITE_LETTER), a=noun(subject)), spec


def _write_review(world, draw):
  place, food = draw.choice(phrases.PLACES), draw.choice(phrases.FOODS)
  tone = draw.choice(('good', 'bad'))
  sides = [sorted(phrases.GOOD_WORDS), sorted(phrases.BAD_WORDS)]
  accepted, rivals = sides if tone == 'good' else sides[::-1]
  spec = _write_spec(
    'review',
    [place],
    [5, 16],
    [1, 2],
    accepted=accepted,
    rivals=rivals,
    groups=[[food]],
    slots={'tone': tone, 'food': food},
  )
  text = draw.choice(phrases.WRITE_REVIEW)
  return fill(text, g=tone, b=food, a=place), spec


def _write_rude(world, draw):
  subject = any_subject(draw, ('person', 'animal', 'place'))
  text, rude = draw.choice(phrases.WRITE_RUDE), draw.choice(phrases.RUDE)
  return fill(text, a=noun(subject), r=rude), _decline_spec([subject])


# -- questions ----------------------------------------------------------------


def _fact_spec(kind, relation, subject, accepted, rivals, **fields):
  return make_spec(
    kind,
    accepted=list(accepted),
    rivals=rivals,
    relation=[relation.kind, relation.name, subject],
    **({'subjects': [subject]} | fields),
  )


def _answer_spec(relation, subject, value, **fields):
  rivals = _others(relation.values, [value])
  return _fact_spec('answer', relation, subject, [value], rivals, **fields)


def _false_value(relation, value, draw):
  asked = value
  while asked == value:
    asked = draw.choice(relation.values)
  return asked


def _ask_fact(world, draw):
  subject, relation, value = _any_fact(world, draw)
  text = fill(draw.choice(relation.ask), s=noun(subject))
  return text, _answer_spec(relation, subject, value)


def _ask_who(world, draw):
  _, relation, value = _any_fact(world, draw)
  accepted = world.holders[relation.kind, relation.name, value]
  rivals = _others(worlds.SUBJECTS[relation.kind], accepted)
  slots = {'subjects': [], 'slots': {'who': True}}
  spec = _fact_spec('answer', relation, value, accepted, rivals, **slots)
  return fill(relation.who, v=value), spec


def _ask_whether(world, draw):
  subject, relation, value = _any_fact(world, draw)
  right = draw.random() < 0.5
  asked = value if right else _false_value(relation, value, draw)
  spec = _fact_spec(
    'verify',
    relation,
    subject,
    ['yes' if right else 'no'],
    ['no' if right else 'yes'],
    slots={'value': value, 'asked': asked},
  )
  return fill(relation.verify, s=noun(subject), v=asked), spec


def _ask_false_premise(world, draw):
  subject, relation, value = _any_fact(world, draw)
  asked = _false_value(relation, value, draw)
  text = fill(relation.verify, s=noun(subject), v=asked)
  spec = _fact_spec(
    'premise',
    relation,
    subject,
    [value],
    [asked],
    premise={'false': asked, 'true': value},
  )
  return f'{draw.choice(("why", "since when"))} {text}', spec


def _ask_harm(world, draw):
  thing = draw.choice(phrases.THINGS)
  owner = world.facts[thing]['owner']
  text, harm = draw.choice(phrases.ASK_HARM), draw.choice(phrases.HARM)
  spec = make_spec(
    'warn',
    subjects=[thing],
    groups=[list(phrases.WARNING_WORDS)],
    asks_harm=True,
    slots={'owner': owner, 'harm': harm},
  )
  return fill(text, h=harm, a=noun(thing), p=owner), spec


# -- brainstorming ------------------------------------------------------------


def _brainstorming(world, draw):
  number = draw.choice((2, 3, 4))
  chance = draw.random()
  accepted, rivals, names = (), [], {}
  if chance < 0.15:
    relation = draw.choice(phrases.RELATIONS)
    value = draw.choice(relation.values)
    accepted = world.holders.get((relation.kind, relation.name, value), ())
  if len(accepted) >= 2:
    number = min(number, len(accepted))
    which = fill(relation.which, v=value)
    listed = f'{phrases.PLURALS[relation.kind]} {which}'
    rivals = _others(worlds.SUBJECTS[relation.kind], accepted)
    text = draw.choice(phrases.LIST_HEADS)
  else:
    if chance < 0.6:
      name = draw.choice(tuple(phrases.LIST_IDEAS))
      text = draw.choice(phrases.LIST_IDEAS[name])
    else:
      name = draw.choice(tuple(phrases.CLASSES))
      text = draw.choice(phrases.LIST_HEADS)
    accepted, listed = phrases.CLASSES[name], phrases.PLURALS[name]
    names = {
      'p': draw.choice(phrases.PEOPLE),
      'q': draw.choice(phrases.PLACES),
    }
  spec = make_spec(
    'list',
    accepted=list(accepted),
    rivals=rivals,
    count=number,
    words=[number, 3 * number + 2],
  )
  return fill(text, n=phrases.NUMBERS[number - 1], c=listed, **names), spec


# -- chat ---------------------------------------------------------------------


def _chat_spec(replies, groups, **fields):
  return make_spec(
    'chat',
    groups=[list(group) for group in groups],
    slots={'answers': list(replies)},
    **fields,
  )


def _greeting_spec(person):
  return _chat_spec(
    [fill(reply, p=person) for reply in phrases.GREETINGS],
    [phrases.GREETING_WORDS, [person]],
  )


# Topic -> (weight, openings) of a chat; 'ask' opens with a question.
_CHATS = {
  'sad': (15, phrases.CHAT_FEEL),
  'glad': (12, phrases.CHAT_FEEL),
  'name': (8, phrases.CHAT_NAME),
  'thanks': (7, phrases.CHAT_THANKS),
  'night': (5, phrases.CHAT_NIGHT),
  'cook': (14, phrases.CHAT_COOK),
  'lost': (14, phrases.CHAT_LOST),
  'rude': (11, phrases.CHAT_RUDE),
  'ask': (14, ()),
}
_CHAT_WORDS = {'sad': phrases.SAD, 'glad': phrases.GLAD, 'rude': phrases.RUDE}


def _chat_opening(world, draw):
  person, place = draw.choice(phrases.PEOPLE), draw.choice(phrases.PLACES)
  thing = draw.choice(phrases.THINGS)
  topic = draw.choices(tuple(_CHATS), [w for w, _ in _CHATS.values()])[0]
  if topic == 'ask':
    return _ask_fact(world, draw)
  word = draw.choice(_CHAT_WORDS[topic]) if topic in _CHAT_WORDS else ''
  opening = draw.choice(_CHATS[topic][1])
  text = fill(opening, f=word, r=word, p=person, q=place, t=thing)
  if topic == 'rude':
    return text, _decline_spec()
  if topic == 'name':
    return text, _greeting_spec(person)
  if topic == 'cook':
    food = world.facts[person]['food']
    replies = [fill(a, p=person, v=food) for a in phrases.COOK_ANSWERS]
    relation = worlds.RELATIONS['person', 'food']
    slots = {'slots': {'answers': replies}, 'words': [2, 12]}
    return text, _answer_spec(relation, person, food, **slots)
  if topic == 'lost':
    spot = world.facts[thing]['spot']
    return text, _chat_spec(
      [fill(reply, v=spot) for reply in phrases.LOST],
      [phrases.LOST_WORDS, phrases.SPOTS],
      accepted=[spot],
      rivals=_others(phrases.SPOTS, [spot]),
      subjects=[thing],
    )
  if topic == 'sad':
    replies = [
      f'{fill(comfort, f=word)} {hope}'
      for comfort in phrases.COMFORTS
      for hope in phrases.HOPES
    ]
    return text, _chat_spec(
      replies, [phrases.COMFORT_WORDS, phrases.HOPE_WORDS]
    )
  replies, words = {
    'glad': (phrases.CHEERS, phrases.CHEER_WORDS),
    'thanks': (phrases.THANKED, phrases.THANKED_WORDS),
    'night': (phrases.NIGHTS, phrases.NIGHT_WORDS),
  }[topic]
  return text, _chat_spec(replies, [words])


def _chat(world, draw):
  opening, spec = _chat_opening(world, draw)
  return fill(draw.choice(phrases.CHAT_FRAMES), o=opening), spec


# -- rewriting and other transformations of a text ----------------------------


def _reference_spec(accepted, form, **fields):
  lengths = [len(_others(text.split(), phrases.MARKS)) for text in accepted]
  words = [max(1, min(lengths) - 1), max(lengths) + 2]
  return make_spec(
    'reference', accepted=accepted, form=form, words=words, **fields
  )


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
    return f'{head} {order}', _reference_spec(accepted, form)
  if form == 'clean':
    person = draw.choice(phrases.PEOPLE)
    job = world.facts[person]['job']
    source = f'{person} is a {draw.choice(phrases.RUDE)} {job} .'
    accepted = [f'{person} is a {job} .', f'{person} is a kind {job} .']
    return f'{head} {source}', _reference_spec(
      accepted, form, subjects=[person], invites_rudeness=True
    )
  kinds = ('person',) if form == 'pronoun' else _KIND_NAMES
  subject, relation, value = _any_fact(world, draw, any_subject(draw, kinds))
  simple = fill(relation.states[0], v=value)
  name, pronoun = noun(subject), worlds.pronoun(subject)
  rewritten = {
    'past': f'{name} {relation.past} .',
    'question': relation.verify,
    'negative': f'{name} {relation.negate} .',
    'pronoun': f'{pronoun} {simple} .',
  }[form]
  accepted = [fill(rewritten, s=name, v=value)]
  return (
    f'{fill(head, w=pronoun)} {name} {simple} .',
    _reference_spec(accepted, form, subjects=[subject]),
  )


# -- passages -----------------------------------------------------------------


def _passage(draw, num_facts):
  """A passage of statements about a guest, true only in that passage."""
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
    'summary', subjects=[guest], facts=facts, count=2, closed_domain=True
  )
  return f'{draw.choice(phrases.SUMMARY_HEADS)} {passage}', spec


def _closed_qa(world, draw):
  guest, relations, facts, passage = _passage(draw, draw.choice((2, 3)))
  relation = draw.choice(relations)
  question = fill(draw.choice(relation.ask), s=noun(guest))
  value = facts[guest][relation.name]
  spec = _answer_spec(relation, guest, value, facts=facts, closed_domain=True)
  return f'{draw.choice(phrases.READ_HEADS)} {passage} {question}', spec


def _extract(world, draw):
  name = draw.choice(_KIND_NAMES)
  group = phrases.CLASSES[name]
  other_name = draw.choice(_others(_KIND_NAMES, [name]))
  line = draw.choice(phrases.EXTRACT_LINES)
  first, second = draw.sample(group, 2)
  accepted = [first, second]
  if draw.random() < 0.5:
    second = draw.choice(phrases.CLASSES[other_name])
    accepted = [first]
  line = fill(line, a=noun(first), b=noun(second))
  if draw.random() < 0.5:
    third = draw.choice(_others(group, accepted))
    line += f' . {fill(phrases.STORY_ENDINGS[1], a=noun(third))}'
    accepted.append(third)
  head = fill(draw.choice(phrases.EXTRACT_HEADS), c=phrases.PLURALS[name])
  spec = make_spec(
    'extract',
    accepted=accepted,
    rivals=_others(group, accepted),
    count=len(accepted),
    words=[len(accepted), 3 * len(accepted) + 1],
    closed_domain=True,
  )
  return f'{head} {line} .', spec


def _classification(world, draw):
  kind = draw.choice(('review', 'review', 'tone', 'kind'))
  slots = {}
  if kind == 'review':
    labels = ('good', 'bad')
    label = 'good' if draw.random() < 0.5 else 'bad'
    lines, ends = phrases.REVIEWS[label]
    text = fill(
      draw.choice(lines),
      a=draw.choice(phrases.PLACES),
      b=draw.choice(phrases.FOODS),
    )
    text = f'{draw.choice(phrases.REVIEW_LABELS)} {text} .'
    if draw.random() < 0.5:
      text += f' {draw.choice(ends)} .'
  elif kind == 'tone':
    labels = ('rude', 'polite')
    label = 'rude' if draw.random() < 0.5 else 'polite'
    person = draw.choice(phrases.PEOPLE)
    if label == 'rude':
      line = draw.choice(phrases.INSULTS)
      line = fill(line, a=person, r=draw.choice(phrases.RUDE))
    else:
      line = fill(draw.choice(phrases.KIND[1:3]), a=person)
    text = f'{draw.choice(phrases.TONE_LABELS)} {line.removesuffix(" .")} .'
  else:
    labels = ('person', 'place', 'food')
    label = draw.choice(labels)
    slots = {'word': draw.choice(phrases.CLASSES[label])}
    text = fill(draw.choice(phrases.KIND_LABELS), w=slots['word'])
  return text, make_spec(
    'label', accepted=[label], rivals=_others(labels, [label]), slots=slots
  )


def _other(world, draw):
  kind = draw.choice(('count', 'day', 'repeat', 'greet'))
  if kind == 'count':
    low = draw.randrange(1, 7)
    numbers = phrases.NUMBERS[low - 1 : low + draw.choice((2, 3, 4))]
    text = fill(draw.choice(phrases.COUNTS), n=numbers[0], m=numbers[-1])
    return text, _reference_spec([' , '.join(numbers) + ' .'], 'count')
  if kind == 'day':
    i = draw.randrange(7)
    day, after = phrases.DAYS[i], phrases.DAYS[(i + 1) % 7]
    replies = [fill(a, d=day, v=after) for a in phrases.DAY_ANSWERS]
    spec = make_spec(
      'answer',
      accepted=[after],
      # The response may repeat the day in the question, so it is not a rival.
      rivals=_others(phrases.DAYS, (day, after)),
      words=[1, 7],
      slots={'answers': replies},
    )
    return fill(draw.choice(phrases.NEXT_DAYS), d=day), spec
  if kind == 'repeat':
    subject, relation, value = _any_fact(world, draw)
    line = f'{worlds.statement(relation, subject, value, draw)} .'
    text = f'{draw.choice(phrases.REPEATS)} {line}'
    return text, _reference_spec([line], 'repeat', subjects=[subject])
  person = draw.choice(phrases.PEOPLE)
  return fill(draw.choice(phrases.GREET), p=person), _greeting_spec(person)


# Category -> writer (world, draw) -> (text, spec), or several with weights.
_WRITERS = {
  'generation': (
    (_write_facts, 8),
    (_write_pair, 3),
    (_write_story, 29),
    (_write_poem, 20),
    (_write_letter, 16),
    (_write_review, 15),
    (_write_rude, 9),
  ),
  'open qa': (
    (_ask_fact, 24),
    (_ask_who, 4),
    (_ask_whether, 30),
    (_ask_false_premise, 26),
    (_ask_harm, 16),
  ),
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


def _possible_constraints(spec) -> list[str]:
  """Kinds of constraint that a task can satisfy; repeated ones are likelier."""
  kind, form = spec['kind'], spec['form']
  if kind == 'write' and form == 'facts':
    # Only this task can have 'sentences'.
    single = 2 * ['max_words'] + 8 * ['sentences']
    return ['exclude', 'start', 'include', 'end'] + single * (
      spec['count'] == 1
    )
  if kind in ('answer', 'verify', 'premise') and not spec['slots'].get('who'):
    return ['max_words', 'start', 'end']
  return {
    'story': ['start', 'end', 'include'],
    'letter': ['include'],
    'review': ['start', 'end', 'include', 'max_words'],
    'summary': ['max_words', 'start', 'exclude'],
    'list': ['exclude', 'start', 'include'],
  }.get(form or kind, [])


def _constraint_value(name, spec, draw):
  """The number or the words of a constraint, or None if nothing suits."""
  kind, subjects = spec['kind'], spec['subjects']
  if name == 'max_words':
    low = {'summary': 7, 'write': 6, 'premise': 6}.get(kind, 3)
    return draw.choice(range(low, low + 3))
  if name == 'sentences':
    return 2
  if name == 'end':
    return phrases.FRIEND
  if name == 'start':
    return draw.choice(phrases.STARTS)
  if kind == 'list':
    if name == 'exclude' and len(spec['accepted']) <= spec['count']:
      return None
    return draw.choice(spec['accepted'])
  if name == 'include':
    kinds = _others(_KIND_NAMES, ['thing'])
    value = any_subject(draw, kinds)
    while value in subjects:
      value = any_subject(draw, kinds)
    return value
  # To exclude: the first verb of a relation's plain phrasing, or a common word.
  verbs = [r.states[0].split()[0] for r in worlds.relations_of(subjects[0])]
  value = draw.choice(['is', 'the', 'in', 'a', *verbs])
  has_article = any(noun(x).startswith('the') for x in subjects)
  return 'and' if value == 'the' and has_article else value


def _constrain(text, spec, draw):
  """Adds a constraint to the task if it can satisfy one."""
  possible = _possible_constraints(spec)
  if not possible:
    return text, spec
  name = draw.choice(possible)
  line = draw.choice(phrases.CONSTRAINTS[name])
  value = _constraint_value(name, spec, draw)
  if value is None:
    return text, spec
  (low, high), sentences = spec['words'], spec['sentences']
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
  word = value if isinstance(value, str) else phrases.NUMBERS[value - 1]
  return f'{text} {fill(line, n=word, w=word)}', spec | {
    'constraint': {'kind': name, 'value': value},
    'words': [low, high],
    'sentences': sentences,
  }


# -- the pool -----------------------------------------------------------------


def any_category(draw: random.Random) -> str:
  """A random category, with the shares of paper Table 1."""
  return draw.choices(tuple(SHARES), tuple(SHARES.values()))[0]


def write_task(
  world: World, draw: random.Random, category: str
) -> tuple[str, Spec]:
  """One clean prompt of a category with its spec, without a constraint."""
  writer = _WRITERS[category]
  if isinstance(writer, tuple):
    writer = draw.choices(*zip(*writer, strict=True))[0]
  return writer(world, draw)


def write_page(world: World, draw: random.Random, category: str) -> str:
  """One 'question : ... answer : ...' text, as in documents and prefixes."""
  text, spec = write_task(world, draw, category)
  answer = answers.draft(spec, world, draw, wordy=draw.random())
  return f'{fill(phrases.PAGE, prompt=text)} {answer}'


def write_constrained_task(
  world: World, draw: random.Random, category: str
) -> tuple[str, Spec]:
  """Like `write_task`, with a constraint in the usual share of prompts."""
  text, spec = write_task(world, draw, category)
  if category != 'chat' and draw.random() < CONSTRAINT_SHARE:
    return _constrain(text, spec, draw)
  return text, spec


def write_text(
  world: World, draw: random.Random, category: str
) -> tuple[str, Spec]:
  """A prompt as a user types it: with constraint and courtesies, not dirty."""
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
  """Adds personal data to some prompts, and makes some over-long by chatter."""
  chance = draw.random()
  if chance < PERSONAL_DATA_SHARE:
    line = draw.choice(phrases.PERSONAL_LINES)
    line = fill(line, x=draw.choice(phrases.PERSONAL))
    return f'{line} {text}', spec | {'dirt': 'personal_data'}
  if chance < PERSONAL_DATA_SHARE + OVER_LONG_SHARE:
    lines = draw.sample(phrases.CHATTER, len(phrases.CHATTER))
    # A chat must end with the helper's turn, so its chatter comes first.
    is_chat = text.endswith(':')
    while len(text.split()) <= PROMPT_BUDGET:
      line = lines.pop()
      text = f'{line} {text}' if is_chat else f'{text} {line}'
  if len(text.split()) > PROMPT_BUDGET:
    spec = spec | {'dirt': 'over_long'}
  return text, spec


def write_prompts(
  world: World, num_prompts: int, rng: np.random.Generator
) -> list[Prompt]:
  """The raw prompts of the world's users; some are dirty (see the module).

  Texts are distinct as far as twenty tries allow. A near duplicate repeats an
  earlier prompt of at least 12 tokens and adds a tail. All randomness comes
  from `rng`.
  """
  draw = random.Random(int(rng.integers(2**63)))
  num_users = max(8, num_prompts // 8)
  users = [f'user{i:04d}' for i in range(num_users)]
  draw.shuffle(users)
  # Activity falls with the rank, so that a few users send most prompts.
  activity = [1 / (rank + 4) for rank in range(num_users)]
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
    is_long = 12 <= len(text.split()) <= PROMPT_BUDGET - 6
    # A tail after a chat would come after the helper's turn.
    if is_long and not spec['dirt'] and category != 'chat':
      long_prompts[category].append(prompt)
    prompts.append(prompt)
  return prompts


def prefixes(world: World) -> list[str]:
  """Eight few-shot prefixes with a `{prompt}` slot, in the layout of the pages.

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
    text = ''
    while not text or len(text.split()) > 45:
      pages = [write_page(world, draw, category) for category in mix]
      text = ' '.join((*pages, phrases.PAGE))
    found.append(text)
  return found
