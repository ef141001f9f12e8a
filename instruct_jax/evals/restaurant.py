"""Restaurant descriptions (E2E NLG): slots said, left out, made up; and BLEU.

A prompt of these data is a list of facts, `name[Cocum], area[riverside]`; an
answer should state them all and no others. Closed-domain hallucination (paper,
Table 3) is then countable: a value that the prompt does not give. The data are
closed, eight slots of a few values, so patterns find nearly every mention.
On the 4,672 human references of the development set they find 92.1 % of the
given values, and 1.4 % of the values found are inventions; read by hand,
nearly all of both are the writers' own omissions and slips. That, not 100 %, is
what a model trained on those people can be held to.

What counts as saying a value, and what is not told apart:
  name, near       the value, with or without "the"; accents and case do not
                   matter. Another one counts as invented only when it is one
                   of the data's own, `NAMES` and `NEIGHBOURS`.
  food             the adjective or a typical dish.
  eatType          coffee shop = café; pub = bar. People call any place a
                   restaurant or name only what it serves: either realises
                   "restaurant", and "restaurant" is never an invention.
  priceRange       three levels, because people write one form for the other:
                   cheap = less than £20, moderate = £20-25, high = more than
                   £30; a word beside "price" or one that speaks for itself.
  customer rating  three levels: low = 1 out of 5, average = 3, high = 5.
  area             riverside = by the river; city centre = downtown.
  familyFriendly   family, child or kid; no = a negation near it, or "adult".
"""

import dataclasses
import re
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from instruct_jax.evals import win_rate

NAMES = (
  'Alimentum',
  'Aromi',
  'Bibimbap House',
  'Blue Spice',
  'Browns Cambridge',
  'Clowns',
  'Cocum',
  'Cotto',
  'Fitzbillies',
  'Giraffe',
  'Green Man',
  'Midsummer House',
  'Strada',
  'Taste of Cambridge',
  'The Cambridge Blue',
  'The Cricketers',
  'The Eagle',
  'The Golden Palace',
  'The Mill',
  'The Phoenix',
  'The Plough',
  'The Punter',
  'The Vaults',
  'The Waterman',
  'The Wrestlers',
  'Travellers Rest Beefeater',
  'Wildwood',
  'Zizzi',
)
NEIGHBOURS = (
  'All Bar One',
  'Avalon',
  'Burger King',
  'Café Brazil',
  'Café Rouge',
  'Café Sicilia',
  'Clare Hall',
  'Crowne Plaza Hotel',
  'Express by Holiday Inn',
  'Rainbow Vegetarian Café',
  'Raja Indian Cuisine',
  'Ranch',
  'The Bakers',
  'The Portland Arms',
  'The Rice Boat',
  'The Sorrento',
)

# Values that people use for one another, by the level they share.
_LEVELS: Mapping[str, Mapping[str, str]] = {
  'priceRange': {
    'cheap': 'low',
    'less than £20': 'low',
    'moderate': 'average',
    '£20-25': 'average',
    'high': 'high',
    'more than £30': 'high',
  },
  'customer rating': {
    'low': 'low',
    '1 out of 5': 'low',
    'average': 'average',
    '3 out of 5': 'average',
    'high': 'high',
    '5 out of 5': 'high',
  },
}

# Words between a level and what it is about: "average customer rating", but
# not "high prices and a rating".
_GAP = r"(?:[ -](?!(?:and|but|with|pric\w*|rat\w+)\b)[\w']+){0,3}[ -]"


def _beside(level: str, noun: str) -> str:
  return rf'(?:{level}){_GAP}(?:{noun})|(?:{noun}){_GAP}(?:{level})'


def _rating(level: str, digit: str, number: str) -> str:
  noun = r'rat(?:ed|ings?|es?)|reviews?|reviewed|scores?|scoring|customers?'
  score = (
    rf'(?:{digit}|{number})(?:(?: stars?)? (?:out )?of (?:a possible )?|/)'
    rf'(?:5|five)|(?:{digit}|{number})[ -]*stars?'
  )
  return f'{_beside(level, noun)}|{score}'


# Read in this order, each on the text without the matches before it: a rating
# "5 out of 5 customers" says nothing of prices, "Indian pub" has two slots.
_PATTERNS: Mapping[str, Mapping[str, str]] = {
  'customer rating': {
    'low': _rating(r'low|lowly|lower|poor|poorly|bad|badly', '1', 'one'),
    'average': _rating(
      r'average|averagely|medium|moderate|moderately|decent|mediocre|ok|okay|fair',
      '3',
      'three',
    ),
    'high': _rating(
      r'(?<!not )(?:high|highly)|good|great|excellent|well|top|perfect|best',
      '5',
      'five',
    ),
  },
  'priceRange': {
    'low': r'cheap\w*|inexpensive\w*|affordabl[ey]|low[- ]cost|budget'
    r'|(?:less|lower|cheaper) th[ae]n (?:£ ?)?20|(?:under|below) (?:£ ?)?20|'
    + _beside('low|lower|reasonable', r'pric\w+|costs?'),
    'average': r'(?:£ ?)?20 ?(?:-|–|to|and) ?(?:£ ?)?25'
    r'|mid[- ]?(?:range|priced)|moderate|moderately|'
    + _beside('average|medium|mid|reasonabl[ey]|fair', r'pric\w+|costs?'),
    'high': r'expensive\w*|pricey|upscale|high[- ]end|costly'
    r'|(?:more|greater|higher) th[ae]n (?:£ ?)?30|(?:over|above) (?:£ ?)?30|'
    + _beside('high|higher|highly', r'pric\w+|costs?'),
  },
  'food': {
    'chinese': r'chinese',
    'english': r'english|british|fish and chips',
    'fast food': r'fast[ -]?foods?|burgers?',
    'french': r'french',
    'indian': r'indian|curry|curries',
    'italian': r'italian|pasta|pizzas?',
    'japanese': r'japanese|sushi',
  },
  'eatType': {
    'coffee shop': r'coffee|coffees|cafes?',
    'pub': r'pubs?|bar',
  },
  'area': {
    'riverside': r'river\w*|waterfront|waterside',
    'city centre': r'(?:city|town)(?:\'?s)?[ -]?cent(?:re|er)|cent(?:re|er|ral)'
    r'|centrally|downtown|heart of|middle of|inner city',
  },
}
_COMPILED = {
  slot: {
    value: re.compile(rf'(?<!\w)(?:{pattern})(?!\w)')
    for value, pattern in patterns.items()
  }
  for slot, patterns in _PATTERNS.items()
}
_RESTAURANT = re.compile(
  r'\b(?:restaurants?|diner|eatery|eateries|dining|dine|eat|food|foods|meals?'
  r'|cuisine|dishes|serv\w+)\b'
)
_FAMILY = re.compile(r'\b(?:famil\w+|kids?|child\w*|adults?)\b')
_NEGATION = re.compile(
  r"\b(?:no|non|not(?! far| only)|never|free|\w+n't|cannot|without|lacks?"
  r'|unfriendly|unsuitable|adults?)\b'
)


# Slot -> value, or the same as pairs, which is what JSON makes of tuples.
Slots = Mapping[str, str] | Sequence[Sequence[str]]


def plain(text: str) -> str:
  """Lower case without accents, single spaces, straight apostrophes."""
  text = unicodedata.normalize('NFKD', text.replace('’', "'").lower())
  text = ''.join(mark for mark in text if not unicodedata.combining(mark))
  return ' '.join(text.split())


def parse_slots(facts: str) -> dict[str, str]:
  """`'name[Cocum], area[riverside]'` -> `{'name': 'Cocum', ...}`.

  Raises:
    ValueError: a slot appears twice, or nothing is in that form.
  """
  pairs = re.findall(r'([^\[\],]+)\[([^\]]*)\]', facts)
  slots = {name.strip(): value.strip() for name, value in pairs}
  if not pairs or len(slots) != len(pairs):
    raise ValueError(
      f'expected slot[value], ... with every slot once, got {facts!r}'
    )
  return slots


@dataclasses.dataclass(frozen=True)
class SlotReport:
  """What one text makes of its slots.

  Attributes:
    realised: slots of the prompt whose value is said.
    missing: the other slots of the prompt.
    invented: `slot[value]` said but not given; values of `_LEVELS` slots are
      the levels low, average, high.
  """

  realised: tuple[str, ...]
  missing: tuple[str, ...]
  invented: tuple[str, ...]


def _cut(text: str, value: str) -> tuple[str, bool]:
  """Removes every mention of a name; returns the rest and if there was one."""
  core = plain(value)
  core = core.removeprefix('the ')
  # Flexible blanks: generated text writes "crowne plaza" and "crowne-plaza".
  pattern = r'[ -]'.join(re.escape(word) for word in core.split())
  rest, count = re.subn(rf'(?<!\w)(?:the )?{pattern}(?!\w)', ' # ', text)
  return rest, count > 0


def _family_values(text: str) -> set[str]:
  values = set()
  for clause in re.split(r'[.;!?]|, | but | however ', text):
    if _FAMILY.search(clause):
      values.add('no' if _NEGATION.search(clause) else 'yes')
  return values


def mentions(text: str, slots: Mapping[str, str]) -> dict[str, set[str]]:
  """Slot -> values the text states; levels for `_LEVELS` slots.

  Args:
    text: an answer.
    slots: the prompt's facts; its name and near are looked for first, so that
      "Raja Indian Cuisine" is no Indian food.

  Returns:
    For each of the eight slots the set of values found, plain lower case.
  """
  text = plain(text)
  found: dict[str, set[str]] = {slot: set() for slot in _COMPILED}
  found |= {'name': set(), 'near': set(), 'familyFriendly': set()}
  own = [(slot, slots[slot]) for slot in ('name', 'near') if slot in slots]
  known = [('name', value) for value in NAMES]
  known += [('near', value) for value in NEIGHBOURS]
  # The prompt's own first, then long before short: no name hides another.
  for slot, value in own + sorted(known, key=lambda pair: -len(pair[1])):
    text, present = _cut(text, value)
    if present:
      found[slot].add(plain(value))
  found['familyFriendly'] = _family_values(text)
  if _RESTAURANT.search(text):
    found['eatType'].add('restaurant')
  for slot, patterns in _COMPILED.items():
    for value, pattern in patterns.items():
      text, count = pattern.subn(' # ', text)
      if count:
        found[slot].add(value)
  return found


def slot_report(slots: Slots, text: str) -> SlotReport:
  """Compares what a text says with the facts it was given.

  Args:
    slots: slot name to value, as `parse_slots` returns them, or pairs.
    text: an answer.

  Returns:
    Realised and missing slots, in the prompt's order, and invented values. A
    slot said both rightly and wrongly is realised and has an invention.

  Raises:
    ValueError: a slot or a level outside the E2E data.
  """
  slots = dict(slots)
  found = mentions(text, slots)
  unknown = sorted(set(slots) - set(found))
  if unknown:
    raise ValueError(f'unknown slots {unknown}; E2E has {sorted(found)}')
  realised, missing, invented = [], [], []
  expected = {}
  for slot, value in slots.items():
    if slot in _LEVELS and value not in _LEVELS[slot]:
      raise ValueError(
        f'{slot}[{value}] is outside the data; known: {sorted(_LEVELS[slot])}'
      )
    expected[slot] = _LEVELS[slot][value] if slot in _LEVELS else plain(value)
    (realised if expected[slot] in found[slot] else missing).append(slot)
  for slot, values in found.items():
    extra = values - {expected[slot]} if slot in expected else values
    if slot == 'eatType':
      extra = extra - {'restaurant'}
    invented += [f'{slot}[{value}]' for value in sorted(extra)]
  return SlotReport(tuple(realised), tuple(missing), tuple(invented))


@dataclasses.dataclass(frozen=True)
class SlotRates:
  """Slot errors of many answers, each with its 95 % interval.

  Attributes:
    realised: share of the given slots that are said.
    invented: share of the values said that are made up (hallucination).
    invented_answers: share of answers with at least one made-up value.
    faithful: share of answers that say everything and make up nothing.
  """

  realised: win_rate.Interval
  invented: win_rate.Interval
  invented_answers: win_rate.Interval
  faithful: win_rate.Interval


def slot_rates(
  slots: Sequence[Slots],
  texts: Sequence[str],
  cluster_ids: win_rate.Ids,
  *,
  num_bootstrap: int = 2000,
  seed: int = 0,
) -> SlotRates:
  """`slot_report` over many answers, with intervals clustered by prompt.

  Args:
    slots: per answer, the facts it was given.
    texts: the answers.
    cluster_ids: per answer, its prompt's id.
    num_bootstrap: see `win_rate.ratio_interval`.
    seed: see `win_rate.ratio_interval`.
  """
  if not len(slots) == len(texts) == len(cluster_ids):
    raise ValueError(
      f'{len(slots)} slots, {len(texts)} texts, {len(cluster_ids)} cluster ids'
    )
  reports = [
    slot_report(facts, text) for facts, text in zip(slots, texts, strict=True)
  ]
  realised = np.array([len(report.realised) for report in reports])
  missing = np.array([len(report.missing) for report in reports])
  invented = np.array([len(report.invented) for report in reports])

  def interval(top: np.ndarray, bottom: np.ndarray) -> win_rate.Interval:
    return win_rate.ratio_interval(
      top, bottom, cluster_ids, num_bootstrap=num_bootstrap, seed=seed
    )

  ones = np.ones(len(reports))
  said = realised + invented
  return SlotRates(
    realised=interval(realised, realised + missing),
    # Nothing said at all: nothing made up, 0 of 1.
    invented=interval(invented, said if said.any() else ones),
    invented_answers=interval(invented > 0, ones),
    faithful=interval((missing == 0) & (invented == 0), ones),
  )


def bleu(
  texts: Sequence[str],
  references: Sequence[Sequence[str]],
  cluster_ids: win_rate.Ids,
  *,
  num_bootstrap: int = 1000,
  seed: int = 0,
) -> win_rate.Interval:
  """Corpus BLEU against several references, with a clustered interval.

  sacrebleu's BLEU-4, 13a tokens, case kept, closest reference length, scale 0
  to 100: its counts are summed over the answers of each redraw before the
  geometric mean is taken, as corpus BLEU asks. The E2E challenge's own script
  tokenises otherwise, so its printed figures are near, not the same.

  Args:
    texts: the answers.
    references: per answer, at least one human text; the numbers may differ.
    cluster_ids: per answer, its prompt's id.
    num_bootstrap: number of redraws.
    seed: see `win_rate.ratio_interval`.

  Raises:
    ValueError: lengths differ, no answer, or an answer without reference.
  """
  import sacrebleu

  if not len(texts) == len(references) == len(cluster_ids) or not len(texts):
    raise ValueError(
      f'{len(texts)} texts, {len(references)} lists of references, '
      f'{len(cluster_ids)} cluster ids; expected the same number, at least 1'
    )
  metric = sacrebleu.BLEU(effective_order=True)
  order = metric.max_ngram_order
  codes, num_clusters = win_rate.cluster_codes(cluster_ids)
  # Columns: matches by order, totals by order, length, reference length.
  sums = np.zeros((num_clusters, 2 * order + 2))
  for row, (text, several) in enumerate(zip(texts, references, strict=True)):
    if not several:
      raise ValueError(f'text {row} has no reference')
    one = metric.sentence_score(text, list(several))
    sums[codes[row]] += [*one.counts, *one.totals, one.sys_len, one.ref_len]

  def score(columns: np.ndarray) -> float:
    numbers = [int(number) for number in columns.round()]
    return sacrebleu.BLEU.compute_bleu(
      correct=numbers[:order],
      total=numbers[order : 2 * order],
      sys_len=numbers[-2],
      ref_len=numbers[-1],
      max_ngram_order=order,
    ).score

  redraws = [
    score(row)
    for counts in win_rate.redraw_counts(num_clusters, num_bootstrap, seed)
    for row in counts @ sums
  ]
  tail = 100 * (1 - win_rate.CONFIDENCE) / 2
  low, high = np.percentile(redraws, [tail, 100 - tail])
  return win_rate.Interval(
    score(sums.sum(0)), float(low), float(high), num_clusters
  )
