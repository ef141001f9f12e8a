"""Which prompts are used, and in which split (paper 3.2, A.1, A.2).

Pure functions over lists of prompts; each returns what it keeps, in the given
order, and how many it dropped. `clean` runs them all and reports every count.
The paper names the rules and leaves their details open; ours are written in
the docstrings.

A prompt whose `user` is '' has an unknown author: it counts as a user of its
own, so it is never capped and may go to any split.

  python -m instruct_jax.data.hygiene FILE... --output=DIR --tokenizer=FOLDER

runs `clean` on prompts (JSONL) and writes `prompts_{train,valid,test}.jsonl`
and the counts, `hygiene.json`. `--presidio` finds personal data with
Microsoft's library (requirements-personal-data.txt) beside the patterns of this
file; `--presidio=en_core_web_lg` finds people's names, too, with that spaCy
model.
"""

import collections
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence

from etils import epath

from instruct_jax import command
from instruct_jax.data import records
from instruct_jax.data import tokenizer as tokenizer_lib

Prompts = list[records.Prompt]
KindsFn = Callable[[str], list[str]]


@dataclasses.dataclass(frozen=True)
class HygieneReport:
  """Counts of prompts, in the order in which they were dropped.

  Attributes:
    given: prompts before anything was dropped.
    duplicates: shared a long prefix with an earlier prompt.
    over_long: longer than the token limit.
    over_cap: beyond the cap of their user.
    personal_data: dropped from the training split only.
    kept: prompts left in each split.
    users: distinct users in each split.
    unknown_users: kept prompts without a user id.
  """

  given: int
  duplicates: int
  over_long: int
  over_cap: int
  personal_data: int
  kept: dict[str, int]
  users: dict[str, int]
  unknown_users: int

  def to_json(self) -> dict[str, int | dict[str, int]]:
    """The counts as JSON types."""
    return dataclasses.asdict(self)


def drop_long(
  prompts: Sequence[records.Prompt],
  tokenizer: tokenizer_lib.Tokenizer,
  max_tokens: int,
) -> tuple[Prompts, int]:
  """Drops prompts of more than `max_tokens` tokens; none is ever cut (C)."""
  lengths = map(len, tokenizer.encode_prompts(prompts))
  kept = [
    prompt
    for prompt, length in zip(prompts, lengths, strict=True)
    if length <= max_tokens
  ]
  return kept, len(prompts) - len(kept)


def drop_duplicates(
  prompts: Sequence[records.Prompt], prefix_words: int
) -> tuple[Prompts, int]:
  """Drops prompts that share a long prefix with an earlier one (A.2).

  Rule: two prompts are duplicates when their first `prefix_words` words are
  the same, upper and lower case alike; a prompt with fewer words must be the
  same as a whole. So a short prompt is no duplicate of a long one that begins
  with it. The first is kept. One pass with a hash set.

  Args:
    prompts: any prompts.
    prefix_words: how long a shared prefix is "long"; at least 1. The paper
      does not print it.
  """
  if prefix_words < 1:
    raise ValueError(f'prefix_words is {prefix_words}; it must be 1 or more')
  kept, seen = [], set()
  for prompt in prompts:
    # maxsplit bounds the work on long prompts; the last piece is the rest.
    words = prompt.text.lower().split(maxsplit=prefix_words)[:prefix_words]
    key = ' '.join(words)
    if key not in seen:
      seen.add(key)
      kept.append(prompt)
  return kept, len(prompts) - len(kept)


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
      positions = sorted(
        positions, key=lambda i: (_draw(seed, 'cap', prompts[i].id), i)
      )[:cap]
    kept.extend(positions)
  return [prompts[i] for i in sorted(kept)], len(prompts) - len(kept)


def split_by_user(
  prompts: Sequence[records.Prompt],
  fractions: Mapping[str, float],
  seed: int,
) -> dict[str, Prompts]:
  """Splits prompts so that no user is in two splits (3.2, A.2).

  Users are taken in an order drawn from the seed and given, whole, to the
  split that is furthest below its share of prompts. The outcome depends on the
  seed and the set of users and their counts, not on the order of the file.

  Args:
    prompts: any prompts.
    fractions: split name to its share of the prompts; they sum to 1.
    seed: of the order of users.

  Returns:
    Each split's prompts in the given order. With few users a split may be
    empty.
  """
  total = sum(fractions.values())
  if min(fractions.values(), default=0) <= 0 or abs(total - 1) > 1e-6:
    raise ValueError(
      f'split fractions {dict(fractions)} must be positive and sum to 1; they '
      f'sum to {total:g}'
    )
  by_user = collections.defaultdict(list)
  for position, prompt in enumerate(prompts):
    by_user[_user_key(prompt, position)].append(position)
  missing = {name: share * len(prompts) for name, share in fractions.items()}
  assigned = {name: [] for name in fractions}
  for user in sorted(by_user, key=lambda user: (_draw(seed, *user), user)):
    name = max(missing, key=lambda name: missing[name])
    missing[name] -= len(by_user[user])
    assigned[name].extend(by_user[user])
  return {
    name: [prompts[i] for i in sorted(positions)]
    for name, positions in assigned.items()
  }


# What counts as personal data. The patterns lean towards dropping a harmless
# prompt rather than keeping a person's details.
_EMAIL = re.compile(r'(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+')
# Groups of digits with separators; 9 to 15 digits (E.164) are a phone number.
_PHONE = re.compile(
  r'(?<![\w.])\+?\(?\d{1,4}\)?(?:[ .-]{1,2}\(?\d{2,4}\)?){2,5}(?![\w])'
  r'|(?<!\w)\+\d{9,15}(?!\w)'
)
# 13 to 19 digits, grouped or not, that pass the Luhn check, are a card.
_CARD = re.compile(r'(?<!\d)\d(?:[ -]?\d){12,18}(?!\d)')
# United States social security number; IBAN.
_ID_NUMBER = re.compile(
  r'(?<!\d)\d{3}-\d{2}-\d{4}(?!\d)'
  r'|\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b'
)
_OCTET = r'(?:25[0-5]|2[0-4]\d|1?\d?\d)'
_IP = re.compile(
  rf'(?<![\d.])(?:{_OCTET}\.){{3}}{_OCTET}(?![\d.]*\d)'
  r'|(?<![\w:])(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}(?![\w:])'
)
# `221b Baker Street`: a number, capitalised words, a kind of street.
_STREET = re.compile(
  r"\b\d{1,5}[a-zA-Z]?,?\s+(?:[A-Z][\w.'-]*\s+){1,4}"
  r'(?:Street|St|Avenue|Ave|Road|Rd|Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Ct'
  r'|Place|Pl|Square|Sq|Way|Terrace|Crescent)\b'
)


def personal_data_kinds(text: str) -> list[str]:
  """Kinds of personal data in a text: any of e-mail, phone, card number, id
  number, IP address, street address. Patterns only, so names go unnoticed.
  """
  kinds = []
  if _EMAIL.search(text):
    kinds.append('e-mail')
  for match in _PHONE.finditer(text):
    if 9 <= sum(c.isdigit() for c in match[0]) <= 15:
      kinds.append('phone')
      break
  if any(_passes_luhn(match[0]) for match in _CARD.finditer(text)):
    kinds.append('card number')
  if _ID_NUMBER.search(text):
    kinds.append('id number')
  if _IP.search(text):
    kinds.append('IP address')
  if _STREET.search(text):
    kinds.append('street address')
  return kinds


# The library's names of what it finds, and ours.
_PRESIDIO_KINDS = {
  'EMAIL_ADDRESS': 'e-mail',
  'PHONE_NUMBER': 'phone',
  'CREDIT_CARD': 'card number',
  'US_SSN': 'id number',
  'IBAN_CODE': 'id number',
  'IP_ADDRESS': 'IP address',
  'PERSON': 'name',
}
# What a phone number has without a word such as "call" beside it; weaker finds
# are any nine digits.
_PRESIDIO_SCORE = 0.4


def presidio_kinds(spacy_model: str = '') -> KindsFn:
  """`personal_data_kinds` with Microsoft's Presidio beside the patterns.

  Phone numbers are then checked against the numbering plans of all countries,
  e-mail addresses against the list of public suffixes, and bank and card
  numbers by their checksums. Nothing is downloaded.

  Args:
    spacy_model: name or folder of an installed English model that knows
      people's names, which then count as personal data, the famous ones too;
      '' finds no names.

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
  # Its default fetches the newest list over the network.
  suffixes = tldextract.TLDExtract(suffix_list_urls=())

  class Email(found_by.EmailRecognizer):
    def validate_result(self, pattern_text):
      return bool(suffixes(pattern_text).fqdn)

  class Pipeline(SpacyNlpEngine):
    """One that is already there; the parent's would download it."""

    def __init__(self):
      super().__init__([{'lang_code': 'en', 'model_name': 'given'}])
      self.nlp = {'en': pipeline}

  recognizers = [
    Email(),
    found_by.PhoneRecognizer(),
    found_by.CreditCardRecognizer(),
    found_by.IbanRecognizer(),
    found_by.IpRecognizer(),
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
  """Drops prompts that hold personal data; for the training split (A.1)."""
  kept = [prompt for prompt in prompts if not kinds_fn(prompt.text)]
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
  training_split: str = 'train',
  kinds_fn: KindsFn = personal_data_kinds,
) -> tuple[dict[str, Prompts], HygieneReport]:
  """All of the above: duplicates, length, cap, split, then personal data.

  Duplicates go first, so that no near-copy can land in two splits or use up a
  user's cap; personal data goes last, from the training split only, so that
  held-out prompts keep the distribution of real use (A.1).

  Args:
    prompts: as collected; ids must be distinct.
    tokenizer: counts the tokens of `max_tokens`.
    max_tokens: longest prompt kept.
    prefix_words: see `drop_duplicates`.
    cap: prompts per user; the paper's is 200.
    fractions: see `split_by_user`; must hold `training_split`.
    seed: of the cap and the split.
    training_split: the split that is searched for personal data.
    kinds_fn: what finds it; or `presidio_kinds`.

  Returns:
    The prompts of each split, and the counts.
  """
  if training_split not in fractions:
    raise ValueError(
      f'fractions {dict(fractions)} lack the training split {training_split!r}'
    )
  repeated = [
    name
    for name, count in collections.Counter(p.id for p in prompts).items()
    if count > 1
  ]
  if repeated:
    raise ValueError(
      f'{len(repeated)} prompt ids come more than once, such as '
      f'{repeated[0]!r}; ids must be distinct'
    )
  kept, duplicates = drop_duplicates(prompts, prefix_words)
  kept, over_long = drop_long(kept, tokenizer, max_tokens)
  kept, over_cap = cap_per_user(kept, cap, seed=seed)
  splits = split_by_user(kept, fractions, seed)
  splits[training_split], personal_data = drop_personal_data(
    splits[training_split], kinds_fn
  )
  report = HygieneReport(
    given=len(prompts),
    duplicates=duplicates,
    over_long=over_long,
    over_cap=over_cap,
    personal_data=personal_data,
    kept={name: len(split) for name, split in splits.items()},
    users={
      name: len({prompt.user for prompt in split if prompt.user})
      for name, split in splits.items()
    },
    unknown_users=sum(
      not prompt.user for split in splits.values() for prompt in split
    ),
  )
  return splits, report


def _user_key(prompt: records.Prompt, position: int) -> tuple[str, str]:
  if prompt.user:
    return 'user', prompt.user
  # Ids are unique in a file; the position guards against those that are not.
  return 'prompt', prompt.id or f'position {position}'


def _draw(seed: int, *parts: str) -> bytes:
  """A random-looking key that depends on nothing but its arguments."""
  text = '\0'.join((str(seed), *parts))
  return hashlib.blake2b(text.encode('utf-8'), digest_size=8).digest()


def _passes_luhn(number: str) -> bool:
  digits = [int(c) for c in reversed(number) if c.isdigit()]
  doubled = (sum(divmod(2 * digit, 10)) for digit in digits[1::2])
  return (sum(digits[::2]) + sum(doubled)) % 10 == 0


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
  options = parser.parse_args(arguments)
  try:
    kinds_fn = personal_data_kinds
    if options.presidio is not None:
      kinds_fn = presidio_kinds(options.presidio)
    prompts = [
      prompt
      for path in options.files
      for prompt in records.read_jsonl(path, records.Prompt)
    ]
    shares = {'valid': options.valid, 'test': options.test}
    shares['train'] = 1 - sum(shares.values())
    splits, report = clean(
      prompts,
      tokenizer=tokenizer_lib.Tokenizer.load(options.tokenizer),
      max_tokens=options.max_tokens,
      prefix_words=options.prefix_words,
      cap=options.cap,
      fractions={name: share for name, share in shares.items() if share},
      seed=options.seed,
      kinds_fn=kinds_fn,
    )
  except ValueError as error:
    print(error, file=sys.stderr)
    return 1
  output = epath.Path(options.output)
  for name, split in splits.items():
    if split:
      records.write_jsonl(output / f'prompts_{name}.jsonl', split)
  counts = json.dumps(report.to_json(), indent=2)
  records.write_bytes(output / 'hygiene.json', counts.encode('utf-8'))
  print(counts)
  return 0


if __name__ == '__main__':
  command.end(main)
