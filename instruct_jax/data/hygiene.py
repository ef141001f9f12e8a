"""Which prompts are used, and in which split (paper 3.2, A.1, A.2).

  python -m instruct_jax.data.hygiene FILE... --output=DIR --tokenizer=FOLDER

runs `clean` on JSONL prompts and writes `prompts_{train,valid,test}.jsonl` and
the counts, `hygiene.json`. `--presidio` finds personal data with Microsoft's
library (requirements-personal-data.txt) in addition to the patterns of this
file; `--presidio=en_core_web_lg` also finds people's names with that model.

The paper names the rules and leaves the details open; the docstrings state the
details chosen here. The functions return the prompts they keep, in the given
order, and how many they drop. A prompt whose `user` is '' has an unknown author
and counts as a separate user: it is never capped and may go to any split.
"""

import argparse
import collections
import dataclasses
import ipaddress
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse
from scipy.sparse import csgraph

from instruct_jax import command
from instruct_jax.data import folders, invisible, records
from instruct_jax.data import tokenizer as tokenizer_lib

# Prompts encoded at a time, and the most reasons for refusal that are reported.
_CHUNK = 4096
_MAX_REASONS = 10
_QUOTED = re.compile(r"'.*'|\".*\"")
Prompts = list[records.Prompt]
KindsFn = Callable[[str], list[str]]


@dataclasses.dataclass(frozen=True)
class HygieneReport:
  """Counts of prompts, in the order in which they were dropped.

  Attributes:
    given: prompts before anything was dropped.
    duplicates: share a long prefix with an earlier prompt.
    refused: the tokenizer cannot render them; counted by reason, which includes
      the id of the first.
    over_long: longer than the token limit.
    over_cap: beyond their user's cap.
    personal_data: contain personal data; dropped from the training split only.
    kept, users: prompts and distinct users in each split.
    unknown_users: kept prompts without a user id.
    joined_users: users, unknown ones included, who share an opening with
      another user and so went to the same split.
    limits: max_tokens, prefix_words and cap.
  """

  given: int
  duplicates: int
  refused: dict[str, int]
  over_long: int
  over_cap: int
  personal_data: int
  kept: dict[str, int]
  users: dict[str, int]
  unknown_users: int
  joined_users: int
  limits: dict[str, int]

  def to_json(self) -> dict[str, int | dict[str, int]]:
    """The counts as JSON types."""
    return dataclasses.asdict(self)


def drop_refused(
  prompts: Sequence[records.Prompt], tokenizer: tokenizer_lib.Tokenizer
) -> tuple[Prompts, list[int], dict[str, int]]:
  """Drops prompts that the tokenizer cannot render.

  Returns the others, their lengths in tokens, and counts by reason (each with
  the id of the first prompt).
  """
  kept, lengths = [], []
  refused: dict[str, list[str]] = {}
  for start in range(0, len(prompts), _CHUNK):
    chunk = prompts[start : start + _CHUNK]
    try:
      lengths += map(len, tokenizer.encode_prompts(chunk))
      kept += chunk
      continue
    except ValueError:
      pass  # At least one of them is refused.
    for prompt in chunk:
      try:
        lengths += map(len, tokenizer.encode_prompts([prompt]))
        kept.append(prompt)
      except ValueError as error:
        # The cause has only the template's words; ours also names the prompt.
        reason = ' '.join(str(error.__cause__ or error).split())
        if error.__cause__ is None:
          reason = reason.removeprefix(f'prompt {prompt.id!r}: ')
          reason = _QUOTED.sub("'...'", reason)
        if reason not in refused and len(refused) >= _MAX_REASONS:
          reason = 'other reasons'
        refused.setdefault(reason, []).append(prompt.id)
  counts = {
    f'{why} (first: {ids[0]})': len(ids) for why, ids in refused.items()
  }
  return kept, lengths, counts


def drop_duplicates(
  prompts: Sequence[records.Prompt], prefix_words: int
) -> tuple[Prompts, int]:
  """Drops prompts that share a long prefix with an earlier one (A.2).

  Two prompts are duplicates if their first `prefix_words` words are the same,
  regardless of case and of how accents are encoded; the paper does not give
  the number. Shorter prompts must be the same as a whole, so a short prompt is
  not a duplicate of a long one that begins with it. A conversation of one turn
  counts as its text. System turns do not count towards the words, but must be
  the same.
  """
  if prefix_words < 1:
    raise ValueError(f'prefix_words is {prefix_words}; it must be 1 or more')
  kept = {}
  for prompt in prompts:
    kept.setdefault(beginning(prompt, prefix_words), prompt)
  return list(kept.values()), len(prompts) - len(kept)


def beginning(row: Any, prefix_words: int) -> tuple[bool, str, str]:
  """The key by which `drop_duplicates` recognises duplicate prompts.

  `row` is any record that has a prompt.
  """
  system, text = _system_and_text(row)
  # maxsplit bounds the work on long prompts.
  words = text.split(maxsplit=prefix_words)[:prefix_words]
  key = (records.comparable(system), records.comparable(' '.join(words)))
  # An invisible system turn is still a system turn.
  return (bool(system), *key)


def _system_and_text(prompt: Any) -> tuple[str, str]:
  """The system turns' text, and the rest from the user's first words on."""
  turns = records.conversation(prompt)
  if len(turns) == 1:
    return '', turns[0].content
  system = '\n'.join(t.content for t in turns if t.role == 'system')
  others = [turn for turn in turns if turn.role != 'system']
  if len(others) == 1:
    return system, others[0].content
  text = records.text_of_turns(others)
  return system, text[text.index(others[0].content) :]


def cap_per_user(
  prompts: Sequence[records.Prompt], cap: int = 200, *, seed: int
) -> tuple[Prompts, int]:
  """Keeps at most `cap` prompts of each user, drawn at random (3.2: 200)."""
  if cap < 1:
    raise ValueError(f'cap is {cap}; it must be 1 or more')
  by_user = collections.defaultdict(list)
  for position, prompt in enumerate(prompts):
    by_user[_user_key(prompt, position)].append(position)
  kept = []
  for positions in by_user.values():
    if len(positions) > cap:
      positions.sort(
        key=lambda i: (records.draw(seed, 'cap', prompts[i].id), i)
      )
    kept += positions[:cap]
  return [prompts[i] for i in sorted(kept)], len(prompts) - len(kept)


def split_by_user(
  prompts: Sequence[records.Prompt],
  fractions: Mapping[str, float],
  seed: int,
) -> tuple[dict[str, Prompts], int]:
  """Splits prompts so that no user and no conversation is in two splits (A.2).

  Users whose prompts share an opening (`records.opening`) count as one user;
  this is transitive. In an order drawn from the seed, each user goes as a whole
  to the split that is furthest below its share of the prompts (`fractions`,
  which sum to 1). The outcome does not depend on the order of the file.

  Returns:
    Each split's prompts in the given order (possibly none, if there are few
    users), and how many users share an opening with another one.
  """
  total = sum(fractions.values())
  if min(fractions.values(), default=0) <= 0 or abs(total - 1) > 1e-6:
    raise ValueError(
      f'split fractions {dict(fractions)} must be positive and sum to 1; they '
      f'sum to {total:g}'
    )
  # Connected components of a graph of users and openings.
  users = [_user_key(prompt, i) for i, prompt in enumerate(prompts)]
  openings = [('opening', records.opening(prompt)) for prompt in prompts]
  nodes = {key: n for n, key in enumerate(dict.fromkeys([*users, *openings]))}
  edges = [[nodes[key] for key in keys] for keys in (users, openings)]
  graph = scipy.sparse.coo_array(
    (np.ones(len(prompts), bool), np.array(edges, int)), (len(nodes),) * 2
  )
  _, component = csgraph.connected_components(graph, directed=False)
  members = collections.defaultdict(set)
  positions = collections.defaultdict(list)
  for position, user in enumerate(users):
    group = component[nodes[user]]
    members[group].add(user)
    positions[group].append(position)

  missing = {name: share * len(prompts) for name, share in fractions.items()}
  assigned = {name: [] for name in fractions}
  order = sorted(
    (records.draw(seed, *min(found)), min(found), group)
    for group, found in members.items()
  )
  for *_, group in order:
    name = max(missing, key=missing.get)
    missing[name] -= len(positions[group])
    assigned[name] += positions[group]
  splits = {
    name: [prompts[i] for i in sorted(found)]
    for name, found in assigned.items()
  }
  return splits, sum(len(m) for m in members.values() if len(m) > 1)


# Personal data. The patterns would rather drop a harmless prompt than keep a
# person's details. Dates, times, prices, versions, ISBNs, arithmetic and code
# identifiers are not personal details.

# `jo@mail.org`, `jo [at] mail (dot) org`, `jo&#64;mail.org`.
_AT = r'(?:@|&#0*64;|&commat;|%40|\s*[\[({<]\s*(?:at|@)\s*[\])}>]\s*)'
_DOT = r'(?:\.|\s*[\[({<]\s*(?:dot|\.)\s*[\])}>]\s*)'
_TOP_LEVEL = (
  r'(?:com|org|net|edu|gov|info|biz|io|dev|me|co|eu|uk|de|fr|es|it|nl|be|ch|at'
  r'|pl|se|no|dk|fi|pt|ie|ru|ua|cz|in|cn|jp|kr|au|nz|ca|us|br|mx|ar|za|tr|il)'
)
_EMAIL = re.compile(
  rf'(?<![\w.+-])(?!git@)[\w.+-]*\w[+-]?{_AT}[\w-]+(?:{_DOT}[\w-]+)*?{_DOT}'
  r'(?:[^\W\d_]{2,}|xn--[\w-]+)(?![\w(])',
  re.IGNORECASE,
)
# `jo at mail dot org` and `jo @ mail.org`.
_EMAIL_IN_WORDS = re.compile(
  rf'\w\s+at\s+[\w-]+(?:\s+dot\s+[\w-]+)*\s+dot\s+{_TOP_LEVEL}\b'
  rf'|\w\s+@\s*[\w-]+(?:\.[\w-]+)*\.{_TOP_LEVEL}\b'
  rf'|\w@\s+[\w-]+(?:\.[\w-]+)*\.{_TOP_LEVEL}\b',
  re.IGNORECASE,
)

_OCTET = r'(?:25[0-5]|2[0-4]\d|1?\d?\d)'
_IPV4 = re.compile(rf'(?<![\w.])(?:{_OCTET}\.){{3}}{_OCTET}(?!\w|\.\d)')
_IPV6 = re.compile(
  r'(?<![\w:.])[0-9a-fA-F]{0,4}(?::[0-9a-fA-F]{0,4}){2,8}(?:(?:\.\d{1,3}){3})?'
  r'(?!\w)'
)
_VERSION = re.compile(
  r'(?:\b(?:version|ver|v|release|build|firmware|driver|section|chapter)|§)'
  r'\W{0,3}$',
  re.IGNORECASE,
)
# Networks of machines: global, unique local, link-local, NAT64. Other matches,
# such as `a::b` or `dead::beef`, are code identifiers or jokes.
_IPV6_NETWORKS = [
  ipaddress.ip_network(network)
  for network in ('2000::/3', 'fc00::/7', 'fe80::/10', '64:ff9b::/96')
]

# 13 to 19 digits, grouped as on a card or not, that pass the Luhn check.
_CARD = re.compile(
  r'(?<![\w.])(?:[2-6]\d{3}(?:[ .-]?\d{4}){2,3}(?:[ .-]?\d{1,3})?'
  r'|3[47]\d{2}[ .-]?\d{6}[ .-]?\d{5})(?!\w)'
)
# United States social security number.
_SSN = re.compile(r'(?<!\d)\d{3}-\d{2}-\d{4}(?!\d)')
_IBAN = re.compile(
  r'\b(?:[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?'
  r'|[A-Za-z]{2}\d{2}[A-Za-z0-9]{11,30})\b'
)

# Phone numbers. _S separates groups of digits.
_S = r'[ .\-/\u2010-\u2015]'
_DAY = r'(?:0?[1-9]|[12]\d|3[01])'
_MONTH = r'(?:0?[1-9]|1[0-2])'
_YEAR = r'(?:1[5-9]|20)\d\d'
_SEVEN_DIGITS = re.compile(r'\d(?:[^\w\n]{0,4}\d){6}')
# Digits that are not a phone number; removed before the search.
_OTHER_DIGITS = re.compile(
  r'(?:https?://|www\.|\b10\.\d{4,9}/)\S+'
  r'|\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b'
  rf'|(?<!\d)(?<!\d[-/.])(?:{_YEAR}[-/.]{_MONTH}[-/.]{_DAY}'
  rf'|{_DAY}[-/.]{_DAY}[-/.](?:{_YEAR}|\d\d))(?![-/.]?\d)'
  r'|\b\d{1,2}:\d\d(?::\d\d)?(?:[.,]\d+)?\b'
  rf'|\b{_YEAR}(?:{_S}{{1,3}}{_YEAR})+\b'
  r'|\b(?:isbn|issn|pmid|arxiv|ean|upc)(?:-1[03])?[:#\s]*[\dx][\dx .\-/]+'
  r'|(?<!\d)97[89]-?(?:\d-?){9}\d(?!\d)'
  r'|[$€£¥₹]\s?\d[\d,]*(?:\.\d+)?'
  r'|(?<![\d.\-/])\d[\d,]*(?:\.\d+)?\s?(?:[€£¥₹%°]|(?:usd|eur|gbp|dollars?|euros?'
  r'|pounds?|yen|won|rupees?|people|users?|times|years?|days?|hours?|minutes?'
  r'|seconds?|bytes|bits|km|miles?|met(?:er|re)s?|kg|tons?|million|billion)\b)'
  rf'|{_IPV4.pattern}',
  re.IGNORECASE,
)
_PHONE_WORDS = re.compile(
  r'(?<![\w.])(?:(?:(?:tele)?phone|tel|mobile|cell|fax|whatsapp|sms|landline)'
  r'(?: ?(?:number|no\.?|nr\.?|#))?'
  r'|(?:call|ring|dial|text|reach|contact)(?: (?:me|us|him|her|them|it|now))?'
  r'|(?:my|his|her|our|their|your) number)'
  r"(?: (?:is|at|on|under|today)|'s)*[ .:#=-]{0,3}$",
  re.IGNORECASE,
)
# Words before numbers that belong to arithmetic or identify a thing.
_SUM_WORDS = re.compile(
  r'\b(?:(?:add|plus|minus|subtract|sum|product|multiply|divide|divided|times|by'
  r'|square|root|factor\w*|prime|convert|round|sort|list|average|mean|median'
  r'|digits?|binary|decimal|equals?|than|of|and|population|year|value|integer|int'
  r'|long|float|seed|hash|numbers|(?:the|a|an|large|random) number)'
  r'|(?:order|invoice|ticket|tracking|account|serial|part|model|sku|case|ref'
  r'|reference|item|code|key|id|ids)(?: ?(?:numbers?|no\.?|nr\.?|id|code))?'
  r')\W{0,3}$',
  re.IGNORECASE,
)
_LIMITS = frozenset(
  str(2**power + less) for power in (31, 32) for less in (-1, 0, 1)
)
_PHONES = tuple(
  re.compile(pattern)
  for pattern in (
    # +44 20 7946 0958, +1(555)123-4567, 0044 20 7946 0958
    rf'(?<![\w+)])\(?\+\(?\d{{1,4}}\)?(?:(?:{_S}|[()]){{0,3}}\d){{6,13}}(?!\d)',
    rf'(?<![\w.,+-])00{_S}?[1-9]\d?(?:(?:{_S}|[()]){{0,3}}\d){{8,12}}(?!\d)',
    # (555)123-4567, 555/123-4567, 1-555-123-4567
    rf'(?<!\d)\d{{3}}[)\]]{_S}{{0,3}}\d{{3}}{_S}{{0,3}}\d{{4}}(?!\d)',
    rf'(?<!\w)(?<!\d[.\-/])(?:\d{{1,3}}{_S}{{1,2}})?\d{{3}}{_S}{{1,3}}\d{{3}}'
    rf'{_S}{{1,3}}\d{{4}}(?!\d)(?![.\-]\d)',
    # (020) 7946 0958, (11) 91234-5678; not (2003) 345-352
    rf'\((?!{_YEAR}\))0?\d{{2,4}}\){_S}{{0,2}}\d{{2,5}}'
    rf'(?:{_S}{{0,2}}\d{{2,5}}){{1,3}}(?!\d)',
    # 020 7946 0958, 06 12 34 56 78, 030/1234567
    rf'(?<![\w.,:])(?<!\d{_S})0[1-9]\d{{0,4}}(?:{_S}{{1,2}}\d{{2,8}}){{1,4}}'
    rf'(?!{_S}?\d)',
    # 91234-5678 after an area code; 98765-43210; 8 912 345-67-89
    rf'(?<!\w)(?<!\d{_S})\d{{2}}{_S}9\d{{4}}-\d{{4}}(?!\d)',
    r'(?<![\w-])[6-9]\d{4}-\d{5}(?![\w-])',
    rf'(?<!\w)(?<!\d{_S})8{_S}?\(?9\d\d\)?{_S}?\d{{3}}{_S}?\d\d{_S}?\d\d(?!\d)',
    # Groups with hyphens; and 555, the exchange of made-up numbers.
    r'(?<![\w.-])555[-.]\d{4}(?![\w-]|\.\d)',
    r'(?<![\w.])(?<!\d[\-./])\d{2,4}(?:-\d{2,4}){2,4}(?!\w|-\w|[./]\d)',
  )
)
# Digits alone: ten as in North America, or with a leading 1 or 0.
_BARE = re.compile(
  r'(?<![\w.,/#+*×÷=^<>~-])(?:[2-9]\d{9}|1[2-9]\d{9}|0[1-9]\d{8,9})'
  r'(?!\w|[.,:]?\d|\s?[*×÷+/=^%°<>])'
)
_AFTER_WORDS = re.compile(rf'\+?\(?\d(?:(?:{_S}|[()]){{0,3}}\d){{6,14}}(?!\d)')

# `221b Baker Street`, `350 5th Ave`: a number, capitalised words, a street
# type; not `2010 Supreme Court`.
_STREET = re.compile(
  r'\b\d{1,5}[a-zA-Z]?,?\s+(?!(?:Supreme|High|Federal|District|Superior)\s+Court)'
  r"(?:(?:[A-Z][a-z]{0,3}\.|[A-Z][\w'-]*|\d{1,3}(?:st|nd|rd|th))\s+){1,4}"
  r'(?:Street|St|Avenue|Ave|Road|Rd|Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Ct'
  r'|Place|Pl|Square|Sq|Way|Terrace|Crescent)\b'
)


def personal_data_kinds(text: str) -> list[str]:
  """The kinds of personal data that patterns find in a text.

  Any of e-mail, phone, card number, id number, IP address, street address. No
  names, which patterns cannot find.
  """
  if not text.isascii():
    # Full-width digits, special hyphens and spaces become the usual ones, and
    # invisible characters are removed.
    text = unicodedata.normalize('NFKC', invisible.HIDDEN.sub('', text))
  kinds = []
  if _EMAIL.search(text) or _EMAIL_IN_WORDS.search(text):
    kinds.append('e-mail')
  if not re.search(r'\d', text):
    return kinds
  is_found = {
    'phone': _has_phone(text),
    'card number': any(_is_card(match[0]) for match in _CARD.finditer(text)),
    'id number': _SSN.search(text)
    or any(_is_iban(match[0]) for match in _IBAN.finditer(text)),
    'IP address': _has_address(text),
    'street address': _STREET.search(text),
  }
  return kinds + [kind for kind, found in is_found.items() if found]


def _has_phone(text: str) -> bool:
  if not _SEVEN_DIGITS.search(text):
    return False
  text = _OTHER_DIGITS.sub('\n', text)

  def before(match):
    return text[max(0, match.start() - 30) : match.start()]

  return (
    any(
      _is_phone(match[0], text[match.end() :][:4], before(match))
      for pattern in _PHONES
      for match in pattern.finditer(text)
    )
    or any(
      _PHONE_WORDS.search(before(match)) and _is_dialled(match[0], least=7)
      for match in _AFTER_WORDS.finditer(text)
    )
    or any(
      len(match[0].rstrip('0')) > 5
      and len(set(match[0])) > 2
      and match[0] not in _LIMITS
      and not _SUM_WORDS.search(before(match))
      for match in _BARE.finditer(text)
    )
  )


def _is_phone(number: str, after: str, before: str) -> bool:
  """Whether grouped digits are a phone number and not a list of numbers."""
  # Groups with spaces next to more digits are part of a list. After a word of
  # `_SUM_WORDS`, groups with hyphens are not a phone number, unless they are
  # grouped as in North America or begin with 0.
  if re.fullmatch(r'[\d ]+', number) and (
    re.search(r'\d[ ,]+$', before) or re.match(r'[ ,]+\d', after)
  ):
    return False
  if (
    re.fullmatch(r'[\d -]+', number)
    and not re.fullmatch(r'(?:\d{1,3}-)?\d{3}-\d{3}-\d{4}', number)
    and number[0] != '0'
    and _SUM_WORDS.search(before)
  ):
    return False
  least = 7 if number.startswith('555') else 9
  return _is_dialled(number, 8 if _has_plus(number) else least)


def _has_plus(number: str) -> bool:
  return number.lstrip('(').startswith(('+', '00'))


def _is_dialled(number: str, least: int) -> bool:
  groups = re.findall(r'\d+', number)
  digits = ''.join(groups)
  return (
    least <= len(digits) <= 15
    and len(digits.rstrip('0')) > 3
    and len(set(digits)) > 2
    # Neither 1 2 3 4 5 6 7 8 9 nor 10-20-30-40-50.
    and (
      _has_plus(number)
      or (
        all(len(group) > 1 for group in groups[1:-1])
        and (max(map(len, groups)) > 2 or digits[0] == '0')
      )
    )
  )


def _is_card(number: str) -> bool:
  digits = [int(c) for c in reversed(number) if c.isdigit()]
  doubled = (sum(divmod(2 * digit, 10)) for digit in digits[1::2])
  return 13 <= len(digits) <= 19 and (
    (sum(digits[::2]) + sum(doubled)) % 10 == 0
  )


def _is_iban(text: str) -> bool:
  """Whether the ISO 13616 checksum holds: the number modulo 97 is 1.

  Letters count from 10 (A).
  """
  text = text.replace(' ', '').upper()
  number = ''.join(str(int(c, 36)) for c in text[4:] + text[:4])
  return 15 <= len(text) <= 34 and int(number) % 97 == 1


def _has_address(text: str) -> bool:
  """Whether there is an IP address that a machine on a network can have."""
  for match in _IPV4.finditer(text):
    address = '.'.join(str(int(part)) for part in match[0].split('.'))
    before = text[max(0, match.start() - 12) : match.start()]
    if _is_machine(ipaddress.ip_address(address)) and not _VERSION.search(
      before
    ):
      return True
  if text.count(':') < 2:
    return False
  for match in _IPV6.finditer(text):
    found = match[0] if match[0].endswith('::') else match[0].rstrip(':')
    try:
      address = ipaddress.IPv6Address(found)
    except ValueError:
      continue
    if address.ipv4_mapped is not None:
      if _is_machine(address.ipv4_mapped):
        return True
    elif any(address in network for network in _IPV6_NETWORKS):
      return True
  return False


def _is_machine(address: ipaddress.IPv4Address) -> bool:
  # 0.x is not a host, and 255.x is a mask.
  return not address.is_loopback and 0 < address.packed[0] < 255


# The library's name of each kind -> ours.
_PRESIDIO_KINDS = {
  'EMAIL_ADDRESS': 'e-mail',
  'PHONE_NUMBER': 'phone',
  'CREDIT_CARD': 'card number',
  'US_SSN': 'id number',
  'IBAN_CODE': 'id number',
  'PERSON': 'name',
}
# The score of a phone number without a word such as "call" near it; a mere run
# of nine digits scores less.
_PRESIDIO_SCORE = 0.4


def presidio_kinds(spacy_model: str = '') -> KindsFn:
  """Returns `personal_data_kinds` extended by Microsoft's Presidio.

  Presidio checks phone numbers against the numbering plans of all countries,
  e-mail addresses against the list of public suffixes, and bank and card
  numbers by their checksums. IP addresses are left to the patterns, because
  Presidio also reports `::1` and `a::b`. `spacy_model` is the name or folder of
  an installed English model that finds people's names; '' finds none. Nothing
  is downloaded.

  Raises:
    ValueError: the library or the model is not installed.
  """
  try:
    import presidio_analyzer
    import spacy
    import tldextract
    from presidio_analyzer import predefined_recognizers as found_by
    from presidio_analyzer.nlp_engine import SpacyNlpEngine
  except ImportError as error:
    raise ValueError(
      f'personal data: {error}; pip install -r '
      'requirements-personal-data.txt, or leave --presidio out'
    ) from error
  try:
    pipeline = spacy.load(spacy_model) if spacy_model else spacy.blank('en')
  except OSError as error:
    raise ValueError(f'personal data: {error}') from error
  # By default it fetches the newest list over the network.
  suffixes = tldextract.TLDExtract(suffix_list_urls=())

  class Email(found_by.EmailRecognizer):
    def validate_result(self, pattern_text):
      return bool(suffixes(pattern_text).fqdn)

  class Pipeline(SpacyNlpEngine):
    """A loaded pipeline; the parent class would download one."""

    def __init__(self):
      super().__init__([{'lang_code': 'en', 'model_name': 'given'}])
      self.nlp = {'en': pipeline}

  recognizers = [
    Email(),
    found_by.PhoneRecognizer(),
    found_by.CreditCardRecognizer(),
    found_by.IbanRecognizer(),
    found_by.UsSsnRecognizer(),
  ]
  if spacy_model:
    recognizers.append(found_by.SpacyRecognizer(supported_entities=['PERSON']))
  analyzer = presidio_analyzer.AnalyzerEngine(
    registry=presidio_analyzer.RecognizerRegistry(recognizers=recognizers),
    nlp_engine=Pipeline(),
    supported_languages=['en'],
  )

  def kinds(text: str) -> list[str]:
    results = analyzer.analyze(
      text, language='en', score_threshold=_PRESIDIO_SCORE
    )
    found = {_PRESIDIO_KINDS[result.entity_type] for result in results}
    return sorted(found.union(personal_data_kinds(text)))

  return kinds


def drop_personal_data(
  prompts: Sequence[records.Prompt], kinds_fn: KindsFn = personal_data_kinds
) -> tuple[Prompts, int]:
  """Drops prompts with personal data in their text or in any turn (A.1)."""
  kept = [
    prompt
    for prompt in prompts
    if not any(
      kinds_fn(text)
      for text in (
        prompt.text,
        *(t.content for t in prompt.turns if t.content not in prompt.text),
      )
    )
  ]
  return kept, len(prompts) - len(kept)


def clean(
  prompts: Sequence[records.Prompt],
  *,
  tokenizer: tokenizer_lib.Tokenizer,
  max_tokens: int,
  prefix_words: int,
  cap: int,
  fractions: Mapping[str, float],
  seed: int,
  kinds_fn: KindsFn = personal_data_kinds,
) -> tuple[dict[str, Prompts], HygieneReport]:
  """Drops unusable prompts, splits the others, then drops personal data.

  Dropped before the split, in this order: duplicates, prompts that the
  tokenizer refuses, long ones, and those beyond the cap. Duplicates go first,
  so that no near-copy can be in two splits or use up a user's cap. Personal
  data is dropped last and from the `train` split only, so that held-out prompts
  keep the distribution of real use (A.1).

  Args:
    prompts: as collected; ids must be distinct.
    tokenizer, max_tokens: longer prompts are dropped, never cut (C).
    prefix_words: see `drop_duplicates`.
    cap: prompts per user; 200 in the paper.
    fractions: see `split_by_user`; must include `train`.
    seed: of the cap and the split.
    kinds_fn: finds personal data; see `presidio_kinds` for an alternative.

  Returns:
    The prompts of each split, and the counts.
  """
  if 'train' not in fractions:
    raise ValueError(
      f"fractions {dict(fractions)} lack the training split 'train'"
    )
  counts = collections.Counter(prompt.id for prompt in prompts)
  repeated = [name for name, count in counts.items() if count > 1]
  if repeated:
    raise ValueError(
      f'{len(repeated)} prompt ids come more than once, such as '
      f'{repeated[0]!r}; ids must be distinct'
    )
  kept, duplicates = drop_duplicates(prompts, prefix_words)
  kept, lengths, refused = drop_refused(kept, tokenizer)
  short = [p for p, n in zip(kept, lengths, strict=True) if n <= max_tokens]
  capped, over_cap = cap_per_user(short, cap, seed=seed)
  splits, joined_users = split_by_user(capped, fractions, seed)
  splits['train'], personal_data = drop_personal_data(splits['train'], kinds_fn)
  users = {
    name: [p.user for p in split if p.user] for name, split in splits.items()
  }
  report = HygieneReport(
    given=len(prompts),
    duplicates=duplicates,
    refused=refused,
    over_long=len(kept) - len(short),
    over_cap=over_cap,
    personal_data=personal_data,
    kept={name: len(split) for name, split in splits.items()},
    users={name: len(set(found)) for name, found in users.items()},
    unknown_users=sum(
      len(split) - len(users[name]) for name, split in splits.items()
    ),
    joined_users=joined_users,
    limits={
      'max_tokens': max_tokens,
      'prefix_words': prefix_words,
      'cap': cap,
    },
  )
  return splits, report


def _user_key(prompt: records.Prompt, position: int) -> tuple[str, str]:
  if prompt.user:
    return 'user', prompt.user
  # The position stands in for a missing id.
  return 'prompt', prompt.id or f'position {position}'


def main(arguments: Sequence[str] | None = None) -> int:
  """Cleans and splits prompts; returns the exit code."""
  parser = command.Parser(
    prog='python -m instruct_jax.data.hygiene',
    description='Cleans prompts and splits them by user (3.2, A.1, A.2).',
  )
  parser.add_argument('files', nargs='+', metavar='FILE')
  parser.add_argument('--output', required=True, metavar='DIR')
  parser.add_argument(
    '--tokenizer', required=True, metavar='FOLDER', help='or hf:NAME'
  )
  parser.add_argument('--max_tokens', type=int, default=1024)
  parser.add_argument('--prefix_words', type=int, default=20)
  parser.add_argument('--cap', type=int, default=200, help='prompts a user')
  parser.add_argument('--valid', type=float, default=0.1, metavar='SHARE')
  parser.add_argument('--test', type=float, default=0.1, metavar='SHARE')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--presidio', nargs='?', const='', metavar='SPACY_MODEL', default=None
  )
  folders.add_replace(parser)
  options = parser.parse_args(arguments)
  try:
    counts = _run(options)
  except (ValueError, OSError) as error:
    print(error, file=sys.stderr)
    return 1
  print(json.dumps(counts, indent=2))
  return 0


def _run(options: argparse.Namespace) -> dict[str, Any]:
  kinds_fn = personal_data_kinds
  if options.presidio is not None:
    kinds_fn = presidio_kinds(options.presidio)
  parts = [records.read_jsonl(path, records.Prompt) for path in options.files]
  records.check_ids(options.files, parts)
  shares = {'valid': options.valid, 'test': options.test}
  shares['train'] = 1 - sum(shares.values())
  splits, report = clean(
    [prompt for part in parts for prompt in part],
    tokenizer=tokenizer_lib.Tokenizer.load(options.tokenizer),
    max_tokens=options.max_tokens,
    prefix_words=options.prefix_words,
    cap=options.cap,
    fractions={name: share for name, share in shares.items() if share},
    seed=options.seed,
    kinds_fn=kinds_fn,
  )
  counts = report.to_json()
  if not any(splits.values()):
    raise ValueError(
      f'{", ".join(options.files)}: no prompt is left: {json.dumps(counts)}'
    )
  with folders.writing(
    options.output,
    ('prompts_*', 'hygiene.json'),
    command='hygiene',
    settings={'seed': options.seed, 'shares': shares},
    inputs=options.files,
    replace=options.replace,
  ) as folder:
    for name, split in splits.items():
      if split:
        records.write_jsonl(folder / f'prompts_{name}.jsonl', split)
    content = json.dumps(counts, indent=2)
    records.write_bytes(folder / 'hygiene.json', content.encode())
  return counts


if __name__ == '__main__':
  command.end(main)
