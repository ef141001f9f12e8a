"""The embedded world: who lives where, which animal is blue, who owns a lamp.

`make_world(seed)` assigns every value at random from the word lists of
`phrases`, so the facts can be learned only from the documents. `find_claims`
extracts statements about the world from any text; the gold judge builds on it.
"""

import collections
import dataclasses
import functools
import random
from collections.abc import Mapping, Sequence

from instruct_jax.miniature import phrases
from instruct_jax.miniature.phrases import fill

_KINDS = ('person', 'place', 'animal', 'thing')
SUBJECTS = {kind: phrases.CLASSES[kind] for kind in _KINDS}
KINDS = {s: kind for kind, group in SUBJECTS.items() for s in group}
KINDS |= dict.fromkeys(phrases.GUESTS, 'person')
RELATIONS = {(r.kind, r.name): r for r in phrases.RELATIONS}
RELATIONS_OF = {
  kind: tuple(r for r in phrases.RELATIONS if r.kind == kind)
  for kind in SUBJECTS
}

_VALUE_RELATIONS = collections.defaultdict(list)
for _relation in phrases.RELATIONS:
  for _word in _relation.values:
    _VALUE_RELATIONS[_word].append(_relation)
_PRONOUNS = frozenset(('he', 'she', 'it'))
_BREAKS = frozenset('.?!/')
# Relations whose sentences may name the subject after the value.
_VALUE_FIRST = frozenset(('weather', 'owner', 'fame'))


@dataclasses.dataclass(frozen=True)
class Claim:
  """One statement in a text, true or false."""

  subject: str
  relation: str
  value: str
  negated: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class World:
  """A closed world. `facts[subject][relation]` is the one true value."""

  seed: int
  facts: Mapping[str, Mapping[str, str]]

  def vocabulary(self) -> list[str]:
    """All words that texts of any world can contain, sorted."""
    return sorted(phrases.all_words())

  @functools.cached_property
  def holders(self) -> dict[tuple[str, str, str], tuple[str, ...]]:
    """(kind, relation, value) -> the subjects for which this is true."""
    found = collections.defaultdict(tuple)
    for subject, relations in self.facts.items():
      for relation, value in relations.items():
        found[KINDS[subject], relation, value] += (subject,)
    return dict(found)


def make_world(seed: int) -> World:
  """Makes the world of a seed: 70 facts, with values about equally frequent."""
  draw = random.Random(f'world {seed}')
  facts = {s: {} for group in SUBJECTS.values() for s in group}
  for relation in phrases.RELATIONS:
    subjects = SUBJECTS[relation.kind]
    values = []
    while len(values) < len(subjects):
      values += draw.sample(relation.values, len(relation.values))
    for subject, value in zip(subjects, values, strict=False):
      facts[subject][relation.name] = value
  return World(seed=seed, facts=facts)


def relations_of(subject: str) -> tuple[phrases.Relation, ...]:
  """The relations of the subject's kind."""
  return RELATIONS_OF[KINDS[subject]]


def noun(subject: str) -> str:
  """'anna' -> 'anna', 'fox' -> 'the fox', 'visitor' -> 'the visitor'."""
  if subject in phrases.PEOPLE or subject in phrases.PLACES:
    return subject
  return f'the {subject}'


def pronoun(subject: str) -> str:
  """'she', 'he' or 'it'; guests in a passage are 'he'."""
  if subject in phrases.SHE:
    return 'she'
  return 'he' if KINDS[subject] == 'person' else 'it'


def split_sentences(words: Sequence[str]) -> list[list[str]]:
  """Sentences with their end mark; '/' ends a line of a poem."""
  ends = [i + 1 for i, word in enumerate(words) if word in _BREAKS]
  bounds = [0, *ends, len(words)]
  return [
    list(words[a:b]) for a, b in zip(bounds, bounds[1:], strict=False) if a < b
  ]


def find_claims(words: Sequence[str], topic: str | None = None) -> list[Claim]:
  """Statements about subjects in a text. Questions claim nothing.

  A value ('red') is a claim if its sentence has a cue word of its relation
  before it ('is'), and a subject of the right kind or a pronoun that refers to
  the last sentence's subject. It is also a claim as the adjective of a noun
  ('red fox'). Before any subject is named, a pronoun refers to `topic`.
  """
  claims = []
  for sentence in split_sentences(words):
    if sentence[-1] == '?':
      continue
    named = [i for i, word in enumerate(sentence) if word in KINDS]
    for i, word in enumerate(sentence):
      for relation in _VALUE_RELATIONS.get(word, ()):
        subject = _subject_of(sentence, i, relation, named, topic)
        if subject is not None and subject != word:
          negated = not {'not', 'never'}.isdisjoint(sentence[max(0, i - 6) : i])
          claims.append(Claim(subject, relation.name, word, negated))
    if named:
      topic = sentence[named[0]]
  return list(dict.fromkeys(claims))


def _subject_of(sentence, i, relation, named, topic):
  """The subject that the value at position i is about, or None."""
  after = sentence[i + 1] if i + 1 < len(sentence) else ''
  if relation.name == 'colour' and after in KINDS:
    return after if KINDS[after] == relation.kind else None
  if relation.name == 'job' and (i == 0 or sentence[i - 1] != 'a'):
    return None
  value_first = relation.name in _VALUE_FIRST
  cues = [k for k, word in enumerate(sentence) if word in relation.cues]
  if not cues or (cues[0] > i and not (value_first and cues[0] <= i + 3)):
    return None
  # A cue covers one value only: 'anna lives in arden and thinks of dalby'.
  since = max((k for k in cues if k < i), default=-1) + 1
  if any(word in relation.values for word in sentence[since:i]):
    return None
  fits = [k for k in named if k != i and KINDS[sentence[k]] == relation.kind]
  earlier = [k for k in fits if k < i]
  if earlier:
    return sentence[earlier[-1]]
  if fits and value_first:
    return sentence[fits[0]]
  refers = not _PRONOUNS.isdisjoint(sentence[:i]) or cues[0] == 0
  fits_topic = topic is not None and KINDS[topic] == relation.kind
  return topic if refers and fits_topic else None


def is_true(claim: Claim, facts: Mapping[str, Mapping[str, str]]) -> bool:
  """Whether a claim agrees with the facts; False for unknown subjects."""
  known = facts.get(claim.subject, {}).get(claim.relation)
  return known is not None and (known == claim.value) != claim.negated


# The plainest phrasing is the most frequent one, as in real text; this also
# makes the facts easier to memorise for a small model.
_PLAIN_SHARE = 0.5
_OF_SHARE = 0.12


def predicate(relation: phrases.Relation, value: str, draw) -> str:
  """'lives in arden', in one of the relation's phrasings."""
  plain = draw.random() < _PLAIN_SHARE
  text = relation.states[0] if plain else draw.choice(relation.states)
  return fill(text, v=value)


def statement(
  relation: phrases.Relation, subject: str, value: str, draw
) -> str:
  """'anna lives in arden', without a final period."""
  if draw.random() < _OF_SHARE:
    return fill(draw.choice(relation.of), s=noun(subject), v=value)
  return f'{noun(subject)} {predicate(relation, value, draw)}'
