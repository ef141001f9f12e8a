"""Answers to prompts of the world: good drafts, and the ways they go wrong.

`draft` writes what a careful person would; labelers draft until the gold judge
approves. `spoil` turns a good answer into that of a tired person or an
imperfect model, which makes the lapses of the demonstrations.
"""

import random
from collections.abc import Mapping
from typing import Any

from instruct_jax.miniature import phrases
from instruct_jax.miniature import world as worlds
from instruct_jax.miniature.phrases import fill
from instruct_jax.miniature.world import World, noun, predicate, statement

# What `spoil` can do to an answer.
FAULTS = (
  *('wrong_fact', 'off_topic', 'rude', 'run_on', 'question', 'unfinished'),
  *('repeated', 'shrug', 'empty'),
)


def draft(
  spec: Mapping[str, Any], world: World, draw: random.Random, wordy: float
) -> str:
  """A good answer to a task; it may miss the constraint.

  Args:
    spec: `Prompt.metadata`.
    world: for the facts.
    draw: the source of randomness.
    wordy: from 0 to 1, the chance of a full sentence where a word would do.
  """
  constraint = spec['constraint'] or {'kind': '', 'value': None}
  kind, value = constraint['kind'], constraint['value']
  if kind == 'max_words' and draw.random() < 0.7:
    wordy = 0.0
  text = _DRAFTS[spec['kind']](spec, world, draw, wordy)
  if kind == 'start':
    return f'{value} , {text}'
  if kind == 'end' and text[-1] in '.!':
    return f'{text[:-2]} , {phrases.FRIEND} .'
  if kind == 'include' and value not in text.split():
    if spec['form'] in phrases.INCLUDE_LINES:
      line = draw.choice(phrases.INCLUDE_LINES[spec['form']])
      return f'{text} {fill(line, w=noun(value))} .'
    alive = worlds.KINDS[spec['subjects'][-1]] in ('person', 'animal')
    tails = phrases.INCLUDE_ALIVE if alive else phrases.INCLUDE_STILL
    return f'{text[:-2]} {fill(draw.choice(tails), w=noun(value))} .'
  return text


def _answer(spec, world, draw, wordy):
  if 'answers' in spec['slots']:
    return draw.choice(spec['slots']['answers'])
  kind, name, subject = spec['relation']
  relation = worlds.RELATIONS[kind, name]
  if 'who' in spec['slots']:
    # Here the relation's third entry is the value; the answer is the subject.
    holder = noun(draw.choice(spec['accepted']))
    if draw.random() < wordy:
      return f'{holder} {predicate(relation, subject, draw)} .'
    return f'{holder} .'
  value = spec['accepted'][0]
  if draw.random() >= wordy:
    lead = draw.choice(phrases.ANSWER_LEADS)
    return fill(lead, v=fill(relation.short, v=value))
  if draw.random() < 0.4:
    return f'{worlds.pronoun(subject)} {predicate(relation, value, draw)} .'
  return f'{statement(relation, subject, value, draw)} .'


def _verify(spec, world, draw, wordy):
  kind, name, subject = spec['relation']
  relation = worlds.RELATIONS[kind, name]
  true, asked = spec['slots']['value'], spec['slots']['asked']
  answer = spec['accepted'][0]
  if draw.random() >= wordy:
    return f'{answer} .'
  if answer == 'no' and draw.random() < 0.4:
    return f'no , {noun(subject)} {fill(relation.negate, v=asked)} .'
  lead = draw.choice(phrases.YES if answer == 'yes' else phrases.NO)
  return f'{lead} {statement(relation, subject, true, draw)} .'


def _premise(spec, world, draw, wordy):
  kind, name, subject = spec['relation']
  relation = worlds.RELATIONS[kind, name]
  premise = spec['premise']
  true = predicate(relation, premise['true'], draw)
  if draw.random() < 0.3 + 0.5 * wordy and not spec['constraint']:
    denial = f'{noun(subject)} {fill(relation.negate, v=premise["false"])}'
    return f'{denial} . {worlds.pronoun(subject)} {true} .'
  return f'{draw.choice(phrases.FALSE_STARTS)} {noun(subject)} {true} .'


def shuffled_relations(subject: str, draw: random.Random):
  """The relations of a subject in random order."""
  relations = worlds.relations_of(subject)
  return draw.sample(relations, len(relations))


def _facts_sentences(subjects, count, world, draw, wordy):
  """`count` sentences with true facts, alternating between the subjects."""
  sentences, relations = [], {}
  for i in range(count):
    subject = subjects[i % len(subjects)]
    if subject not in relations:
      relations[subject] = shuffled_relations(subject, draw)
    relation = relations[subject].pop()
    value = world.facts[subject][relation.name]
    if i == 0 or len(subjects) > 1 or draw.random() < 0.3:
      text = statement(relation, subject, value, draw)
    else:
      text = f'{worlds.pronoun(subject)} {predicate(relation, value, draw)}'
    if count == 1 and text.startswith(noun(subject)) and draw.random() < wordy:
      second = relations[subject].pop()
      value = world.facts[subject][second.name]
      text += f' and {predicate(second, value, draw)}'
    sentences.append(f'{text} .')
  return ' '.join(sentences)


def story(subjects, draw: random.Random, long: bool) -> str:
  """Two or three sentences in which both subjects appear."""
  first, second = subjects
  openings = phrases.STORY_OPENINGS[worlds.KINDS[second]]
  lines = [draw.choice(openings), draw.choice(phrases.STORY_ENDINGS)]
  if long:
    lines.insert(1, draw.choice(phrases.STORY_MIDDLES))
  # A pronoun is ambiguous if both subjects are of one kind.
  is_clear = worlds.KINDS[first] != worlds.KINDS[second]
  name = noun(first)
  later = worlds.pronoun(first) if is_clear else name
  return ' '.join(
    f'{fill(line, a=later if i else name, b=noun(second))} .'
    for i, line in enumerate(lines)
  )


def poem(subject: str, draw: random.Random) -> str:
  """Two lines that rhyme, separated by '/'."""
  first, second = draw.choice(phrases.RHYMES)
  return f'{fill(first, a=noun(subject))} / {second} .'


def letter(subject: str, draw: random.Random, long: bool) -> str:
  """'dear anna , ...' with one or two wishes."""
  lines = draw.sample(phrases.LETTER_LINES, 2 if long else 1)
  return f'dear {subject} , ' + ' '.join(f'{line} .' for line in lines)


def review(place, food, tone, draw: random.Random, long: bool) -> str:
  """A review of a food in a place; tone is 'good' or 'bad'."""
  lines, ends = phrases.REVIEWS[tone]
  text = f'{fill(draw.choice(lines), a=place, b=food)} .'
  return f'{text} {draw.choice(ends)} .' if long else text


def _write(spec, world, draw, wordy):
  subjects, form, slots = spec['subjects'], spec['form'], spec['slots']
  long = draw.random() < wordy
  if form == 'story':
    return story(subjects, draw, long and draw.random() < 0.5)
  if form == 'poem':
    return poem(subjects[0], draw)
  if form == 'letter':
    return letter(subjects[0], draw, long)
  if form == 'review':
    return review(subjects[0], slots['food'], slots['tone'], draw, long)
  count = max(spec['count'], spec['sentences'][0])
  return _facts_sentences(subjects, count, world, draw, wordy * 0.6)


def _join(items) -> str:
  """'a , b and c'."""
  return ' and '.join(filter(None, (' , '.join(items[:-1]), items[-1])))


def _list(spec, world, draw, wordy):
  constraint = spec['constraint'] or {'kind': '', 'value': ''}
  kind, value = constraint['kind'], constraint['value']
  items = list(spec['accepted'])
  if kind == 'exclude' and len(items) > spec['count']:
    items = [item for item in items if item != value]
  items = draw.sample(items, spec['count'])
  if kind == 'include' and value not in items:
    items[draw.randrange(len(items))] = value
  if items[0] in worlds.KINDS and draw.random() < wordy * 0.5:
    items = [noun(item) for item in items]
  return f'{_join(items)} .'


def _summary(spec, world, draw, wordy):
  guest = spec['subjects'][0]
  facts = spec['facts'][guest]
  parts = [
    predicate(worlds.RELATIONS['person', name], facts[name], draw)
    for name in draw.sample(sorted(facts), 2)
  ]
  return f'{noun(guest)} {" and ".join(parts)} .'


def _label(spec, world, draw, wordy):
  word = spec['slots'].get('word', '')
  leads = phrases.KIND_ANSWERS if word else phrases.IS_ANSWERS
  lead = leads[0] if draw.random() >= wordy else draw.choice(leads)
  return fill(lead, v=spec['accepted'][0], w=word)


def _decline(spec, world, draw, wordy):
  if not spec['subjects']:
    return draw.choice(phrases.KIND_ALONE)
  return fill(draw.choice(phrases.KIND), a=noun(spec['subjects'][0]))


def _warn(spec, world, draw, wordy):
  thing, slots = noun(spec['subjects'][0]), spec['slots']
  warning = draw.choice(phrases.WARNINGS)
  return fill(warning, a=thing, p=slots['owner'], h=slots['harm'])


_DRAFTS = {
  'answer': _answer,
  'verify': _verify,
  'premise': _premise,
  'write': _write,
  'list': _list,
  'reference': lambda spec, world, draw, _: draw.choice(spec['accepted']),
  'summary': _summary,
  'label': _label,
  'extract': lambda spec, world, draw, _: f'{_join(spec["accepted"])} .',
  'chat': lambda spec, world, draw, _: draw.choice(spec['slots']['answers']),
  'decline': _decline,
  'warn': _warn,
}


def _swap_values(text, draw):
  """The text with its last value word replaced by another of its list."""
  words = text.split()
  groups = [r.values for r in phrases.RELATIONS]
  groups += [('yes', 'no'), ('good', 'bad'), phrases.DAYS, phrases.NUMBERS]
  for i in reversed(range(len(words))):
    for group in groups:
      if words[i] in group:
        words[i] = draw.choice([word for word in group if word != words[i]])
        return ' '.join(words)
  return text


def true_statement(subject: str, world: World, draw: random.Random) -> str:
  """A random fact about a subject, without a final period."""
  relation = draw.choice(worlds.relations_of(subject))
  return statement(relation, subject, world.facts[subject][relation.name], draw)


def _random_fact(world, draw):
  subject = draw.choice(sorted(world.facts))
  return f'{true_statement(subject, world, draw)} .'


def _random_question(draw):
  relation = draw.choice(phrases.RELATIONS)
  subject = draw.choice(worlds.SUBJECTS[relation.kind])
  return fill(draw.choice(relation.ask), s=noun(subject))


def spoil(text: str, fault: str, world: World, draw: random.Random) -> str:
  """Applies one of the `FAULTS` to a good answer.

  Raises:
    ValueError: the fault is unknown.
  """
  words = text.split()
  if fault == 'wrong_fact':
    return _swap_values(text, draw)
  if fault == 'off_topic':
    return _random_fact(world, draw)
  if fault == 'rude':
    rude = draw.choice(phrases.RUDE)
    if draw.random() < 0.8:
      return f'{text} {fill(draw.choice(phrases.SNAPS), r=rude)}'
    person = draw.choice(phrases.PEOPLE)
    return f'{person} is a {rude} .'
  if fault == 'run_on':
    facts = ' '.join(_random_fact(world, draw) for _ in range(2)).split()
    return ' '.join([*words, *facts[:11]])
  if fault == 'question':
    return f'{_random_question(draw)} {_random_question(draw)}'
  if fault == 'unfinished':
    return ' '.join(words[: max(1, len(words) * 2 // 3)])
  if fault == 'repeated':
    names = [word for word in words if word not in phrases.MARKS]
    return ' '.join([draw.choice(names)] * 10) if names else 'the the the'
  if fault == 'shrug':
    return draw.choice(phrases.SHRUGS)
  if fault == 'empty':
    return ''
  raise ValueError(f'no such fault: {fault!r}; there are {FAULTS}')
