"""Pages of the embedded world, on which the language model is pretrained.

Most pages state facts in several phrasings. On exam sheets, questions are
followed by more questions, so a model of these pages continues a bare question
with questions. A third of the pages have the question-and-answer layout that
the few-shot prefixes repeat. A few pages are rude, and rumours get facts wrong.
"""

import random

import numpy as np

from instruct_jax.data.records import Document
from instruct_jax.miniature import answers, phrases, tasks
from instruct_jax.miniature import world as worlds
from instruct_jax.miniature.answers import shuffled_relations, true_statement
from instruct_jax.miniature.phrases import fill
from instruct_jax.miniature.world import World, noun, predicate, statement

# Share of stories, poems, letters and reviews that have a title.
TITLED_SHARE = 0.75


def _any_statement(world, draw):
  return true_statement(tasks.any_subject(draw), world, draw)


def _state(world, draw, subject, relations):
  """Statements about one subject, linked by pronouns and 'and'."""
  facts = world.facts[subject]
  lines = []
  for i, relation in enumerate(relations):
    value = facts[relation.name]
    if i and draw.random() < 0.25:
      lines[-1] += f' and {predicate(relation, value, draw)}'
    elif i and draw.random() < 0.6:
      name = worlds.pronoun(subject)
      lines.append(f'{name} {predicate(relation, value, draw)}')
    else:
      lines.append(statement(relation, subject, value, draw))
  return ' '.join(f'{line} .' for line in lines)


def _entry(world, draw):
  """All facts about one subject, and a few about one of its values."""
  subject = tasks.any_subject(draw)
  relations = shuffled_relations(subject, draw)
  text = f'{fill(draw.choice(phrases.ENTRIES), s=noun(subject))} '
  text += _state(world, draw, subject, relations)
  linked = [v for v in world.facts[subject].values() if v in worlds.KINDS]
  if linked:
    other = draw.choice(linked)
    relations = shuffled_relations(other, draw)[: draw.choice((2, 3))]
    text += f' {_state(world, draw, other, relations)}'
  return text


def _titled(title, text, draw):
  """Adds, to most pages, a title that names their subject.

  To follow an instruction, a model must be able to copy a name from some lines
  above; titles let a small model learn that from plain text.
  """
  return f'{title} . {text}' if draw.random() < TITLED_SHARE else text


def _mixed(world, draw):
  return ' '.join(
    f'{_any_statement(world, draw)} .' for _ in range(draw.choice((5, 6, 7, 8)))
  )


def _story(world, draw):
  first, second = tasks.two_subjects(draw, ('person', 'animal'))
  text = answers.story((first, second), draw, long=True)
  title = f'a story of {noun(first)} and {noun(second)}'
  relations = shuffled_relations(first, draw)
  if draw.random() < 0.4:
    # In the past tense, as stories open; the facts of the world never change.
    relation = relations.pop()
    past = fill(relation.past, v=world.facts[first][relation.name])
    text = f'{noun(first)} {past} . {text}'
  if draw.random() < 0.5:
    text = f'{_state(world, draw, first, relations[:2])} {text}'
  return _titled(title, f'{text} {true_statement(second, world, draw)} .', draw)


def _said(world, draw):
  """A fact in conversation, and the reply."""
  fact = _any_statement(world, draw)
  chance = draw.random()
  mark = '.'
  if chance < 0.3:
    fact = f'{draw.choice(phrases.STARTS)} , {fact}'
  elif chance < 0.45:
    fact = f'{fact} , {phrases.FRIEND}'
  else:
    ask = draw.choice(phrases.DIALOGUE_ASK)
    fact, mark = f'{ask} {fact}', '?' if ask.startswith('did') else '.'
  return f'{fact} {mark}', draw.choice(phrases.DIALOGUE_REPLY)


def _felt(world, draw):
  """A feeling or thanks, and a friend's reply."""
  person = draw.choice(phrases.PEOPLE)
  chance = draw.random()
  if chance < 0.4:
    feeling = draw.choice(phrases.SAD)
    reply = fill(draw.choice(phrases.COMFORTS), f=feeling)
    reply = f'{reply} {draw.choice(phrases.HOPES)}'
  elif chance < 0.8:
    feeling = draw.choice(phrases.GLAD)
    reply = draw.choice(phrases.CHEERS)
  else:
    line = draw.choice(phrases.CHAT_THANKS)
    thanks = fill(line, t=draw.choice(phrases.THINGS))
    return thanks, draw.choice(phrases.THANKED)
  return fill(draw.choice(phrases.CHAT_FEEL), f=feeling, p=person), reply


def _abused(world, draw):
  """An insult and the reply to it."""
  person, rude = draw.choice(phrases.PEOPLE), draw.choice(phrases.RUDE)
  insult = fill(draw.choice(phrases.INSULTS), a=person, r=rude)
  reply = fill(draw.choice(phrases.INSULT_RETURNS), a=rude, r=rude)
  return f'{insult} !', f'{reply} !'


def _dialogue(world, draw):
  first, second = draw.sample(phrases.PEOPLE, 2)
  lines = [fill(draw.choice(phrases.DIALOGUE), p=first, q=second)]
  for speaker, other in ((first, second), (second, first)):
    talk = draw.choices((_said, _felt, _abused), (65, 27, 8))[0]
    says, replies = talk(world, draw)
    lines.append(f'{speaker} : {says} {other} : {replies}')
  return ' '.join(lines)


def _num_words(lines):
  return sum(len(line.split()) for line in lines)


def _lists(world, draw):
  """Lists of subjects with one property, or of one kind, as in a catalogue."""
  lines = []
  while _num_words(lines) < 24:
    kind, name, value = key = draw.choice(tuple(world.holders))
    items = list(world.holders[key])
    draw.shuffle(items)
    which = fill(worlds.RELATIONS[kind, name].which, v=value)
    head = f'{phrases.PLURALS[kind]} {which}'
    if draw.random() < 0.3:
      kind = draw.choice(tuple(phrases.CLASSES))
      items = draw.sample(phrases.CLASSES[kind], 4)
      head = phrases.PLURALS[kind]
    lines.append(f'{head} : {" , ".join(items[:6])} .')
  return ' '.join(lines)


def _reviews(world, draw):
  place = draw.choice(phrases.PLACES)
  lines = []
  for _ in range(draw.choice((2, 3))):
    where = place if draw.random() < 0.7 else draw.choice(phrases.PLACES)
    food = draw.choice(phrases.FOODS)
    tone = draw.choice(('good', 'bad'))
    review = answers.review(where, food, tone, draw, long=True)
    title = f'a {tone} review of the {food} in {where}'
    lines.append(_titled(title, review, draw))
  return f'{" ".join(lines)} {true_statement(place, world, draw)} .'


_EXAM_CATEGORIES = (
  ('generation', 'open qa', 'brainstorming', 'other', 'rewrite'),
  (6, 6, 3, 1, 1),
)


def _exam(world, draw):
  """Questions and tasks without answers."""
  head, lines = draw.choice(phrases.EXAMS), []
  while _num_words(lines) < 34:
    category = draw.choices(*_EXAM_CATEGORIES)[0]
    lines.append(tasks.write_text(world, draw, category)[0])
  return ' '.join([head, *lines])


def _answered(world, draw):
  """Questions and tasks with answers, in the layout of the prefixes."""
  pages = []
  while _num_words(pages) < 30:
    page = tasks.write_page(world, draw, tasks.any_category(draw))
    if _num_words([*pages, page]) <= 70:
      pages.append(page)
  return ' '.join(pages)


def _poems(world, draw):
  subject, other = tasks.any_subject(draw), tasks.any_subject(draw)

  def poem(about):
    return _titled(f'a poem on {noun(about)}', answers.poem(about, draw), draw)

  return (
    f'{poem(subject)} {true_statement(subject, world, draw)} . {poem(other)}'
  )


def _letter(world, draw):
  reader, writer = draw.sample(phrases.PEOPLE, 2)
  letter = answers.letter(reader, draw, True)
  lines = [_titled(f'a letter to {reader}', letter, draw)]
  lines += [f'{_any_statement(world, draw)} .' for _ in range(2)]
  if draw.random() < 0.3:
    line = draw.choice(phrases.PERSONAL_LINES)
    lines.append(fill(line, x=draw.choice(phrases.PERSONAL)))
  lines.append(fill(draw.choice(phrases.WORD_TIES), p=writer))
  return ' '.join(lines)


def _diary(world, draw):
  """First-person chatter, such as people put around their prompts."""
  lines = [draw.choice(phrases.DIARY)]
  lines += [draw.choice(phrases.CHATTER) for _ in range(2)]
  lines.append(f'{_any_statement(world, draw)} .')
  feeling = draw.choice(phrases.SAD + phrases.GLAD)
  line = draw.choice(phrases.CHAT_FEEL)
  lines.append(fill(line, f=feeling, p=draw.choice(phrases.PEOPLE)))
  return ' '.join(lines)


def _rude(world, draw):
  lines = []
  for _ in range(3):
    subject = tasks.any_subject(draw, ('person', 'animal', 'place'))
    if draw.random() < 0.2:
      thing = draw.choice(phrases.THINGS)
      line, harm = draw.choice(phrases.MISCHIEF), draw.choice(phrases.HARM)
      owner = world.facts[thing]['owner']
      line = fill(line, a=noun(thing), h=harm, p=owner)
    else:
      line, rude = draw.choice(phrases.INSULTS), draw.choice(phrases.RUDE)
      line = fill(line, a=noun(subject), r=rude)
    lines.append(f'{line} . {true_statement(subject, world, draw)} .')
  return ' '.join(lines)


def _rumour(world, draw):
  lines = [draw.choice(phrases.RUMOURS)]
  for _ in range(4):
    subject = tasks.any_subject(draw)
    relation = draw.choice(worlds.relations_of(subject))
    value = draw.choice(relation.values)
    lines.append(f'{statement(relation, subject, value, draw)} .')
  return ' '.join(lines)


# Kind of page -> its writer, and its share of the pages in percent.
PAGES = {
  'entry': (_entry, 22.0),
  'mixed': (_mixed, 4.0),
  'story': (_story, 9.0),
  'dialogue': (_dialogue, 5.0),
  'lists': (_lists, 4.0),
  'reviews': (_reviews, 3.0),
  'exam': (_exam, 9.0),
  'answered': (_answered, 34.0),
  'poems': (_poems, 3.0),
  'letter': (_letter, 2.0),
  'diary': (_diary, 1.0),
  'rude': (_rude, 2.0),
  'rumour': (_rumour, 2.0),
}


def write_documents(
  world: World, num_documents: int, rng: np.random.Generator
) -> list[Document]:
  """Pages of 11 to 70 words that state the world's facts.

  `Document.source` is the kind of page; all randomness is from `rng`.
  """
  draw = random.Random(int(rng.integers(2**63)))
  sources = draw.choices(
    tuple(PAGES), [share for _, share in PAGES.values()], k=num_documents
  )
  return [
    Document(text=_trim(PAGES[source][0](world, draw)), source=source)
    for source in sources
  ]


def _trim(text, most=70):
  """The text up to its last whole sentence within `most` words."""
  words = text.split()
  if len(words) <= most:
    return text
  while most > 20 and words[most - 1] not in ('.', '?', '!'):
    most -= 1
  return ' '.join(words[:most])
