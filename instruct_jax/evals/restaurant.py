"""Restaurant descriptions (E2E NLG): slots realised, missing, invented; BLEU.

A prompt of these data is a list of facts, `name[Cocum], area[riverside]`; an
answer should state all of them and no others. Closed-domain hallucination
(paper, Table 3) is then countable: a value that the prompt does not give.
Patterns find nearly every mention, because the data have eight slots of a few
values. On the 4,672 human references of the development set they find 92.1 % of
the given values, and 1.4 % of the values found are inventions. Reading by hand
shows that nearly all of the missing and invented values are the writers'
omissions and slips, so these shares, not 100 % and 0 %, are the best that a
model trained on these writers can reach.

What counts as a mention of a value:
  name, near       the value, with or without "the"; accents and case do not
                   matter. A different one counts as invented only if it is one
                   of the data's own, `NAMES` and `NEIGHBOURS`.
  food             the adjective or a typical dish.
  eatType          coffee shop = café; pub = bar. People call any place a
                   restaurant or name only what it serves: either realises
                   "restaurant", and "restaurant" is never an invention.
  priceRange       three levels, because people write one form for the other:
                   cheap = less than £20, moderate = £20-25, high = more than
                   £30; a word beside "price" or one that suffices alone.
  customer rating  three levels: low = 1 out of 5, average = 3, high = 5.
  area             riverside = by the river; city centre = downtown.
  familyFriendly   family, child or kid; no = a negation near it, or "adult".
"""

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from instruct_jax.evals import win_rate

NAMES = (
  *('Alimentum', 'Aromi', 'Bibimbap House', 'Blue Spice', 'Browns Cambridge'),
  *('Clowns', 'Cocum', 'Cotto', 'Fitzbillies', 'Giraffe', 'Green Man'),
  *('Midsummer House', 'Strada', 'Taste of Cambridge', 'The Cambridge Blue'),
  *('The Cricketers', 'The Eagle', 'The Golden Palace', 'The Mill'),
  *('The Phoenix', 'The Plough', 'The Punter', 'The Vaults', 'The Waterman'),
  *('The Wrestlers', 'Travellers Rest Beefeater', 'Wildwood', 'Zizzi'),
)
NEIGHBOURS = (
  *('All Bar One', 'Avalon', 'Burger King', 'Café Brazil', 'Café Rouge'),
  *('Café Sicilia', 'Clare Hall', 'Crowne Plaza Hotel'),
  *('Express by Holiday Inn', 'Rainbow Vegetarian Café', 'Raja Indian Cuisine'),
  *('Ranch', 'The Bakers', 'The Portland Arms', 'The Rice Boat'),
  'The Sorrento',
)
_NUM_BLEU_BOOTSTRAP = 1000

# Values that people use interchangeably, with the level they share.
_LEVELS: Mapping[str, Mapping[str, str]] = {
  'priceRange': {
    **{'cheap': 'low', 'less than £20': 'low'},
    **{'moderate': 'average', '£20-25': 'average'},
    **{'high': 'high', 'more than £30': 'high'},
  },
  'customer rating': {
    **{'low': 'low', '1 out of 5': 'low'},
    **{'average': 'average', '3 out of 5': 'average'},
    **{'high': 'high', '5 out of 5': 'high'},
  },
}

# Words between a level and its noun: "average customer rating", but not "high
# prices and a rating".
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


# Applied in this order, each to the text without the earlier matches: a rating
# "5 out of 5 customers" is no price, "Indian pub" has two slots.
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
  'eatType': {'coffee shop': r'coffee|coffees|cafes?', 'pub': r'pubs?|bar'},
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


# Slot -> value, or (slot, value) pairs, which JSON returns as lists.
Slots = Mapping[str, str] | Sequence[Sequence[str]]


def plain(text: str) -> str:
  """Lower case without accents, single spaces, straight apostrophes."""
  text = unicodedata.normalize('NFKD', text.replace('’', "'").lower())
  text = ''.join(mark for mark in text if not unicodedata.combining(mark))
  return ' '.join(text.split())


@dataclasses.dataclass(frozen=True)
class SlotReport:
  """Slots of a prompt in one answer."""

  realised: tuple[str, ...]  # Slots of the prompt whose value it states.
  missing: tuple[str, ...]  # The other slots of the prompt.
  # `slot[value]` stated but not given; `_LEVELS` slots have the levels.
  invented: tuple[str, ...]


def _cut(text: str, value: str) -> tuple[str, bool]:
  """The text without any mention of a name, and whether there was one."""
  # Generated text writes "crowne plaza" and "crowne-plaza".
  words = plain(value).removeprefix('the ').split()
  pattern = r'[ -]'.join(map(re.escape, words))
  text, count = re.subn(rf'(?<!\w)(?:the )?{pattern}(?!\w)', ' # ', text)
  return text, count > 0


def _family_values(text: str) -> set[str]:
  return {
    'no' if _NEGATION.search(clause) else 'yes'
    for clause in re.split(r'[.;!?]|, | but | however ', text)
    if _FAMILY.search(clause)
  }


def mentions(text: str, slots: Mapping[str, str]) -> dict[str, set[str]]:
  """Each of the eight slots -> values the text states, in plain lower case.

  Slots of `_LEVELS` have levels. The prompt's own name and near are matched
  first, so that "Raja Indian Cuisine" is not Indian food.
  """
  text = plain(text)
  found: dict[str, set[str]] = {
    slot: set() for slot in (*_COMPILED, 'name', 'near', 'familyFriendly')
  }
  own = [(slot, slots[slot]) for slot in ('name', 'near') if slot in slots]
  known = [('name', value) for value in NAMES]
  known += [('near', value) for value in NEIGHBOURS]
  # The prompt's own first, then long before short, so no name hides another.
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
  """Compares an answer with its facts, in the prompt's order.

  A slot stated both rightly and wrongly is realised and has an invention.

  Raises:
    ValueError: a slot or a level outside the E2E data.
  """
  slots = dict(slots)
  found = mentions(text, slots)
  unknown = sorted(set(slots) - set(found))
  if unknown:
    raise ValueError(f'unknown slots {unknown}; E2E has {sorted(found)}')
  expected = {}
  for slot, value in slots.items():
    if slot in _LEVELS and value not in _LEVELS[slot]:
      raise ValueError(
        f'{slot}[{value}] is outside the data; known: {sorted(_LEVELS[slot])}'
      )
    expected[slot] = _LEVELS[slot][value] if slot in _LEVELS else plain(value)
  return SlotReport(
    tuple(slot for slot in slots if expected[slot] in found[slot]),
    tuple(slot for slot in slots if expected[slot] not in found[slot]),
    tuple(
      f'{slot}[{value}]'
      for slot, values in found.items()
      for value in sorted(values - {expected.get(slot)})
      if (slot, value) != ('eatType', 'restaurant')
    ),
  )


@dataclasses.dataclass(frozen=True)
class SlotRates:
  """Slot errors of many answers, each with its 95 % interval."""

  realised: win_rate.Interval  # Share of the given slots that are stated.
  invented: win_rate.Interval  # Share of the stated values (hallucination).
  invented_answers: win_rate.Interval  # Share of answers that invent a value.
  faithful: win_rate.Interval  # Share that state everything, invent nothing.


def slot_rates(
  slots: Sequence[Slots], texts: Sequence[str], cluster_ids: win_rate.Ids
) -> SlotRates:
  """`slot_report` over many answers, with intervals clustered by prompt."""
  if not len(slots) == len(texts) == len(cluster_ids):
    raise ValueError(
      f'{len(slots)} slots, {len(texts)} texts, {len(cluster_ids)} cluster ids'
    )
  reports = [
    slot_report(facts, text) for facts, text in zip(slots, texts, strict=True)
  ]
  realised, missing, invented = (
    np.array([len(getattr(report, name)) for report in reports])
    for name in ('realised', 'missing', 'invented')
  )
  ones = np.ones(len(reports))
  stated = realised + invented
  ratios = {
    'realised': (realised, realised + missing),
    # If nothing is stated, nothing is invented.
    'invented': (invented, stated if stated.any() else ones),
    'invented_answers': (invented > 0, ones),
    'faithful': ((missing == 0) & (invented == 0), ones),
  }
  return SlotRates(
    **{
      name: win_rate.ratio_interval(*ratio, cluster_ids)
      for name, ratio in ratios.items()
    }
  )


@functools.cache
def _bleu(lowercase: bool):
  import sacrebleu

  return sacrebleu.BLEU(effective_order=True, lowercase=lowercase)


def bleu_counts(
  text: str, references: Sequence[str], lowercase: bool = False
) -> np.ndarray:
  """What BLEU-4 sums over texts: matches and n-grams by order, both lengths."""
  one = _bleu(lowercase).sentence_score(text, list(references))
  return np.array([*one.counts, *one.totals, one.sys_len, one.ref_len])


def bleu_score(sums: np.ndarray, smooth_method: str) -> float:
  """BLEU, 0 to 100, of summed `bleu_counts` [10]."""
  numbers = [int(number) for number in sums.round()]
  order = _bleu(False).max_ngram_order
  return (
    _bleu(False)
    .compute_bleu(
      correct=numbers[:order],
      total=numbers[order : 2 * order],
      sys_len=numbers[-2],
      ref_len=numbers[-1],
      smooth_method=smooth_method,
      max_ngram_order=order,
    )
    .score
  )


def bleu(
  texts: Sequence[str],
  references: Sequence[Sequence[str]],
  cluster_ids: win_rate.Ids,
) -> win_rate.Interval:
  """Corpus BLEU against several references, with a clustered interval.

  sacrebleu's BLEU-4, 13a tokens, case kept, closest reference length, scale 0
  to 100. As corpus BLEU requires, counts are summed over the answers of each
  redraw before the geometric mean is taken. The E2E challenge's own script
  tokenises differently, so its printed figures are near, not the same.

  Args:
    texts: the answers.
    references: per answer, at least one human text; the numbers may differ.
    cluster_ids: per answer, its prompt's id.

  Raises:
    ValueError: lengths differ, no answer, or an answer without reference.
  """
  if not len(texts) == len(references) == len(cluster_ids) or not len(texts):
    raise ValueError(
      f'{len(texts)} texts, {len(references)} lists of references, '
      f'{len(cluster_ids)} cluster ids; expected the same number, at least 1'
    )
  codes, num_clusters = win_rate.cluster_codes(cluster_ids)
  sums = np.zeros((num_clusters, 10))
  for row, (text, several) in enumerate(zip(texts, references, strict=True)):
    if not several:
      raise ValueError(f'text {row} has no reference')
    sums[codes[row]] += bleu_counts(text, several)
  redraws = [
    bleu_score(row, 'none')
    for counts in win_rate.redraw_counts(num_clusters, _NUM_BLEU_BOOTSTRAP, 0)
    for row in counts @ sums
  ]
  low, high = win_rate.bounds(redraws)
  score = bleu_score(sums.sum(0), 'none')
  return win_rate.Interval(score, float(low), float(high), num_clusters)
