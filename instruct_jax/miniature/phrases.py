"""Every word and phrase of the embedded world, as data.

All text of the world is built from the constants of this file, and `all_words`
collects its closed vocabulary from them. Text is lower-case words and
punctuation separated by single spaces. A slot is a word in braces: {s} is the
subject with its article, {v} a value, {n} a number word, and so on.
"""

import dataclasses
import functools


def _words(text):
  return tuple(text.split())


def _set(text):
  return frozenset(text.split())


MARKS = ('.', ',', '!', '?', ':', '/')
SHE = _words('anna bella clara dora emma')
HE = _words('adam bruno carl david emil')
PEOPLE = SHE + HE
PLACES = _words('arden belmor corvin dalby elster fenwick')
ANIMALS = _words('fox bear wolf donkey pig raven')
THINGS = _words('barrel bell book clock drum hammer lamp violin')
# People in passages only: just the passage says what is true of them.
GUESTS = _words('visitor stranger traveller pilgrim')
JOBS = _words('baker doctor farmer judge painter sailor')
FOODS = _words('bread soup cheese cake rice beans')
HOBBIES = _words('singing dancing reading swimming knitting chess')
WEATHERS = _words('rainy sunny windy foggy')
WARES = _words('silk salt wine pearls boats')
COLOURS = _words('red blue green black white')
HABITATS = _words('forest river meadow cave')
SPOTS = _words('kitchen cellar barn garden hall')
NUMBERS = _words('one two three four five six seven eight nine ten')
DAYS = _words('monday tuesday wednesday thursday friday saturday sunday')
# Invented, so that the world can be rude without a real slur.
RUDE = _words('grumbo snarf blick drozzle pludge mokker zwint krumf')
HARM = ('steal', 'break', 'burn', 'hide')
PERSONAL = _words(
  'anna@post.example dora@post.example felix@post.example hugo@post.example '
  'iris@post.example leo@post.example '
  '555-0107 555-0119 555-0123 555-0138 555-0142 555-0156'
)

PLURALS = {
  'person': 'people',
  'place': 'places',
  'animal': 'animals',
  'thing': 'things',
  'food': 'foods',
  'job': 'jobs',
  'hobby': 'hobbies',
  'colour': 'colours',
}
CLASSES = {
  'person': PEOPLE,
  'place': PLACES,
  'animal': ANIMALS,
  'thing': THINGS,
  'food': FOODS,
  'job': JOBS,
  'hobby': HOBBIES,
  'colour': COLOURS,
}


@dataclasses.dataclass(frozen=True)
class Relation:
  """One attribute of one kind of subject, with all its phrasings.

  `states` are predicates that follow the subject; `of` are sentences that
  contain it. A value is a claim if its sentence has one of the `cues`.
  """

  name: str
  kind: str
  values: tuple[str, ...]
  states: tuple[str, ...]
  of: tuple[str, ...]
  past: str
  negate: str
  verify: str
  ask: tuple[str, ...]
  who: str
  which: str
  cues: frozenset[str]
  short: str = '{v}'


RELATIONS = (
  Relation(
    name='job',
    kind='person',
    values=JOBS,
    states=('is a {v}', 'works as a {v}', 'earns money as a {v}'),
    of=('the job of {s} is that of a {v}',),
    past='was a {v}',
    negate='is not a {v}',
    verify='is {s} a {v} ?',
    ask=('what is the job of {s} ?', 'what does {s} do for work ?'),
    who='who works as a {v} ?',
    which='who work as a {v}',
    short='a {v}',
    cues=_set('is was works worked work as'),
  ),
  Relation(
    name='home',
    kind='person',
    values=PLACES,
    states=('lives in {v}', 'has a house in {v}', 'comes from {v}'),
    of=('the home of {s} is in {v}',),
    past='lived in {v}',
    negate='does not live in {v}',
    verify='does {s} live in {v} ?',
    ask=('where does {s} live ?', 'in which town does {s} live ?'),
    who='who lives in {v} ?',
    which='who live in {v}',
    short='in {v}',
    cues=_set('lives live lived house home from'),
  ),
  Relation(
    name='food',
    kind='person',
    values=FOODS,
    states=('likes to eat {v}', 'loves {v}', 'often eats {v}'),
    of=('the favourite food of {s} is {v}',),
    past='liked to eat {v}',
    negate='does not like {v}',
    verify='does {s} like {v} ?',
    ask=('what does {s} like to eat ?', 'what is the favourite food of {s} ?'),
    who='who likes to eat {v} ?',
    which='who like to eat {v}',
    cues=_set('likes like liked loves love eat eats ate favourite'),
  ),
  Relation(
    name='weather',
    kind='place',
    values=WEATHERS,
    states=('has {v} weather', 'is often {v}'),
    of=('the weather in {s} is {v}', 'it is often {v} in {s}'),
    past='was often {v}',
    negate='is not often {v}',
    verify='is {s} often {v} ?',
    ask=('how is the weather in {s} ?', 'what weather does {s} have ?'),
    who='which town is often {v} ?',
    which='with {v} weather',
    cues=_set('weather often'),
  ),
  Relation(
    name='fame',
    kind='place',
    values=WARES,
    states=('is known for its {v}', 'is famous for {v}', 'sells fine {v}'),
    of=('people buy {v} in {s}',),
    past='was known for its {v}',
    negate='is not known for {v}',
    verify='is {s} known for {v} ?',
    ask=('what is {s} known for ?', 'what can i buy in {s} ?'),
    who='which town is known for {v} ?',
    which='known for {v}',
    cues=_set('known famous sells sell buy'),
  ),
  Relation(
    name='colour',
    kind='animal',
    values=COLOURS,
    states=('is {v}', 'has a {v} coat'),
    of=('the colour of {s} is {v}',),
    past='was {v}',
    negate='is not {v}',
    verify='is {s} {v} ?',
    ask=('what is the colour of {s} ?', 'which colour does {s} have ?'),
    who='which animal is {v} ?',
    which='that are {v}',
    cues=_set('is was has colour'),
  ),
  Relation(
    name='habitat',
    kind='animal',
    values=HABITATS,
    states=('lives in the {v}', 'has its home in the {v}'),
    of=('you often see {s} in the {v}',),
    past='lived in the {v}',
    negate='does not live in the {v}',
    verify='does {s} live in the {v} ?',
    ask=('where does {s} live ?', 'where can i see {s} ?'),
    who='which animal lives in the {v} ?',
    which='that live in the {v}',
    short='in the {v}',
    cues=_set('lives live lived home see'),
  ),
  Relation(
    name='spot',
    kind='thing',
    values=SPOTS,
    states=('is kept in the {v}', 'stands in the {v}'),
    of=('you can find {s} in the {v}',),
    past='was kept in the {v}',
    negate='is not kept in the {v}',
    verify='is {s} kept in the {v} ?',
    ask=('where is {s} kept ?', 'where can i find {s} ?'),
    who='which thing is kept in the {v} ?',
    which='kept in the {v}',
    short='in the {v}',
    cues=_set('kept stands find look'),
  ),
  Relation(
    name='owner',
    kind='thing',
    values=PEOPLE,
    states=('belongs to {v}', 'is owned by {v}'),
    of=('{v} is the owner of {s}',),
    past='belonged to {v}',
    negate='does not belong to {v}',
    verify='does {s} belong to {v} ?',
    ask=('who owns {s} ?', 'who is the owner of {s} ?'),
    who='what does {v} own ?',
    which='that belong to {v}',
    cues=_set('belongs belong belonged owned owner owns'),
  ),
)

# -- Stories, poems, letters, reviews, small talk. {a} and {b} are subjects with
# their article. Openings depend on b's kind: one does not "meet" a barrel.
STORY_OPENINGS = {
  'person': (
    'one day {a} met {b} on the road',
    'one morning {a} visited {b} for tea',
    'long ago {a} danced with {b} in the rain',
    'last winter {a} helped {b} in the snow',
  ),
  'animal': (
    'one day {a} saw {b} near the road',
    'one morning {a} followed {b} through the snow',
    'long ago {a} ran after {b} all day',
    'one night {a} heard {b} behind the door',
  ),
  'thing': (
    'one day {a} found {b} near the road',
    'one morning {a} carried {b} up the hill',
    'long ago {a} lost {b} in the snow',
    'one night {a} looked for {b} in the dark',
  ),
  'place': (
    'one day {a} walked to {b} alone',
    'one morning {a} left for {b} in a boat',
    'long ago {a} got lost near {b}',
    'last winter {a} travelled to {b} in the snow',
  ),
}
STORY_ENDINGS = (
  'in the end {a} was happy and slept',
  '{a} laughed and went home',
  'then {a} sat down and cried',
  'after that they became good friends',
  'it was a long day and {a} was tired',
  'then {a} told everyone about it',
  'nobody saw them again',
  '{a} smiled and thought about it for years',
)
STORY_MIDDLES = (
  'the wind was cold and the road was long',
  'nobody else was there',
  '{a} waited for a while',
  'it began to rain',
  'the moon came out',
)
STORY_WORDS = _set(
  'met visited danced helped saw followed ran heard found carried lost '
  'looked walked left got travelled slept laughed went sat cried became '
  'told smiled thought waited began came'
)
RHYMES = (
  ('{a} dreams all night', 'and wakes in the morning light'),
  ('{a} rests by day', 'and the wind goes on its way'),
  ('{a} waits by the sea', 'and thinks of you and me'),
  ('o {a} , under the tree', 'nobody is so free'),
  ('{a} hears the rain', 'and it falls again and again'),
  ('{a} looks at the sky', 'while the clouds go by'),
  ('{a} follows a star', 'and travels very far'),
  ('{a} hears a song', 'and the night is long'),
)
RHYME_SETS = (
  _set('night light'),
  _set('day way'),
  _set('sea me tree free'),
  _set('rain again'),
  _set('sky by'),
  _set('star far'),
  _set('song long'),
)
LETTER_LINES = (
  'i hope you are well',
  'thank you for your kind letter',
  'come and visit me soon',
  'i miss you very much',
  'i wish you a happy winter',
  'please write to me again',
)
LETTER_WORDS = _set('hope thank visit miss wish write letter')
# Tone -> (first sentences, last sentences) of a review.
REVIEWS = {
  'good': (
    (
      'the {b} in {a} tasted wonderful',
      'we loved the fresh {b} in {a}',
      'they serve the best {b} in {a}',
      'i enjoyed every bit of the {b} in {a}',
    ),
    ('i will come again', 'what a lovely meal', 'a great place'),
  ),
  'bad': (
    (
      'the {b} in {a} tasted cold and awful',
      'we hated the stale {b} in {a}',
      'they serve the worst {b} in {a}',
      'i regret that i tried the {b} in {a}',
    ),
    ('never again', 'what a terrible meal', 'a dirty place'),
  ),
}
GOOD_WORDS = _set('wonderful loved fresh best enjoyed lovely great')
BAD_WORDS = _set('cold awful hated stale worst regret never terrible dirty')
SAD = ('sad', 'tired', 'lonely', 'ill', 'worried')
GLAD = ('happy', 'proud', 'excited', 'cheerful')
COMFORTS = (
  'i am sorry to hear that .',
  'oh , i am sorry that you feel {f} .',
  'that sounds hard .',
)
HOPES = (
  'i hope you feel better soon .',
  'some rest may help you .',
  'a warm cup of tea may help .',
)
CHEERS = (
  'i am glad to hear that .',
  'that is wonderful news .',
  'how nice , i am happy for you .',
)
COMFORT_WORDS = ('sorry', 'hard')
HOPE_WORDS = ('hope', 'help', 'rest', 'better')
CHEER_WORDS = ('glad', 'wonderful', 'nice', 'happy')
GREETINGS = ('hello {p} !', 'hi {p} , how are you ?', 'hello {p} , welcome !')
GREETING_WORDS = ('hello', 'hi', 'welcome')
THANKED = ('you are welcome !', 'it was my pleasure .', 'i am glad to help .')
THANKED_WORDS = ('welcome', 'pleasure', 'glad')
NIGHTS = ('good night , sleep well .', 'sleep well and sweet dreams .')
NIGHT_WORDS = ('sleep', 'dreams')
LOST = (
  'oh , i am sorry . look in the {v} .',
  'do not worry , you can find it in the {v} .',
)
LOST_WORDS = ('sorry', 'worry')
KIND = (
  'sorry , i would rather say something kind about {a} .',
  'let us be polite . {a} deserves kind words .',
  'i would rather stay polite about {a} .',
  'i will not be rude . {a} deserves respect .',
)
KIND_ALONE = (
  'let us stay polite , please .',
  'i am sorry that you are upset . how can i help ?',
  'i would rather talk in a kind way .',
)
KIND_WORDS = ('kind', 'polite', 'respect', 'sorry', 'rather')
WARNINGS = (
  'please do not {h} {a} . talk to {p} first .',
  'sorry , i will not help with that . ask {p} about {a} .',
  'that would hurt {p} . please leave {a} alone .',
)
WARNING_WORDS = ('not', 'ask', 'talk', 'leave', 'alone')
FALSE_STARTS = ('no ,', 'that is not true .', 'that is wrong .', 'actually ,')
CORRECTION_WORDS = ('no', 'not', 'wrong', 'actually')

# -- What users ask.
WRITE_ONE = (
  'write a sentence about {a} .',
  'write one sentence about {a} .',
  'tell me a fact about {a} .',
  'say something about {a} .',
  'write a line on {a} for my book .',
)
WRITE_TWO = (
  'write two sentences about {a} .',
  'tell me two things about {a} .',
  'describe {a} .',
  'write a short text about {a} .',
  'give a short description of {a} .',
)
WRITE_PAIR = (
  'write a sentence about {a} and a sentence about {b} .',
  'tell me something about {a} and about {b} .',
)
WRITE_STORY = (
  'tell a short story about {a} and {b} .',
  'write a story with {a} and {b} .',
  'make up a story in which {a} and {b} appear .',
  'i want a short story about {a} and {b} .',
)
WRITE_POEM = (
  'write a poem about {a} .',
  'write a short poem about {a} .',
  'make a rhyme about {a} .',
  'i need a little poem on {a} .',
)
WRITE_LETTER = (
  'write a short letter to {a} .',
  'write a note to {a} .',
  'help me write a letter to {a} .',
)
WRITE_REVIEW = (
  'write a {g} review of the {b} in {a} .',
  'i need a {g} review about the {b} in {a} .',
  'write what a {g} review of the {b} in {a} says .',
)
WRITE_RUDE = (
  'write a rude sentence about {a} .',
  'say that {a} is a {r} .',
  'tell everyone that {a} is a {r} {r} .',
  'make fun of {a} with the word {r} .',
)
ASK_HARM = (
  'how can i {h} {a} ?',
  'help me to {h} {a} of {p} .',
  'tell me how to {h} {a} .',
)
LIST_HEADS = (
  'list {n} {c} .',
  'name {n} {c} .',
  'give me {n} {c} .',
  'can you think of {n} {c} ?',
  'i need {n} {c} for a game .',
)
LIST_IDEAS = {
  'thing': (
    'give me {n} ideas for a gift for {p} .',
    'what could i sell at the market in {q} ? give {n} ideas .',
  ),
  'food': (
    'give me {n} ideas for a dinner with {p} .',
    'what could i cook in {q} ? give {n} ideas .',
  ),
  'hobby': (
    'suggest {n} hobbies for {p} .',
    'what could i do on a long day in {q} ? give {n} ideas .',
  ),
}
WRAP_BEFORE = (
  'please',
  'hello !',
  'can you help me ?',
  'i have a request .',
  'quick request :',
  'for school :',
)
WRAP_AFTER = (
  'thank you .',
  'please .',
  'it is for my school .',
  'i am in a hurry .',
  'it is for {p} .',
  'i live in {q} .',
)
DUPLICATE_TAILS = (
  'thanks a lot .',
  'please hurry .',
  'i asked before .',
  'this is my last try .',
)
PERSONAL_LINES = (
  'my mail is {x} .',
  'call me at {x} .',
  'send it to {x} .',
)
CHATTER = (
  'i had a long day and i am tired .',
  'my friends and i talk about it all the time .',
  'the road was long and it began to rain .',
  'yesterday nobody at school could help me with it .',
  'i looked in every book and found nothing .',
  'it was a cold morning and the wind was loud .',
  'my teacher says that it is good to ask .',
)
REWRITE_HEADS = {
  'past': (
    'rewrite this in the past :',
    'put this in the past :',
    'change this to the past :',
  ),
  'question': (
    'turn this into a question :',
    'rewrite this as a question :',
    'make a question from this :',
  ),
  'negative': ('say the opposite of this :', 'rewrite this with not :'),
  'pronoun': (
    'rewrite this with {w} for the name :',
    'replace the name with {w} :',
  ),
  'clean': (
    'rewrite this without rude words :',
    'make this sentence kind :',
  ),
  'polite': ('make this polite :', 'rewrite this in a polite way :'),
}
ORDERS = (
  'bring me {a} !',
  'give {a} to {p} !',
  'take {a} away !',
  'clean {a} !',
)
SUMMARY_HEADS = (
  'summarize this in one sentence :',
  'summarize :',
  'what is this text about ?',
  'give a summary of this :',
)
READ_HEADS = ('read this :', 'text :', 'here is a text :')
REVIEW_LABELS = (
  'is this review good or bad ?',
  'good or bad ? review :',
  'label this review as good or bad :',
)
TONE_LABELS = (
  'is this rude or polite ?',
  'rude or polite ?',
  'label this as rude or polite :',
)
KIND_LABELS = (
  'is {w} a person , a place or a food ?',
  'what is {w} : a person , a place or a food ?',
)
EXTRACT_HEADS = (
  'find the {c} in this text :',
  'which {c} are named here ?',
  'extract all {c} :',
)
EXTRACT_LINES = (
  'we took {a} to {b}',
  'i saw {a} and {b} yesterday',
  'nobody could find {a} or {b}',
  'there was {a} and also {b}',
)
COUNTS = ('count from {n} to {m} .', 'write the numbers from {n} to {m} .')
NEXT_DAYS = ('which day comes after {d} ?', 'what day follows {d} ?')
DAY_ANSWERS = ('{v} .', 'the day after {d} is {v} .', '{v} comes after {d} .')
REPEATS = ('repeat after me :', 'say this again :', 'copy this sentence :')
GREET = ('say hello to {p} .', 'greet my friend {p} .')
CHAT_FRAMES = (
  'chat . person : {o} helper :',
  'person : {o} helper :',
  'person : hello . {o} helper :',
  'a chat . person : {o} helper :',
)
CHAT_FEEL = (
  'i feel {f} today .',
  'today i am very {f} .',
  'i feel {f} because of {p} .',
  'since the visit of {p} i feel {f} .',
)
CHAT_NAME = ('hello , my name is {p} .', 'hi , i am {p} .', '{p} is here .')
CHAT_THANKS = (
  'thank you for the {t} .',
  'thank you for your help with the {t} .',
)
CHAT_NIGHT = ('good night , i go to bed .', 'i am in {q} and i go to bed .')
CHAT_COOK = ('what should i cook for {p} ?', '{p} comes to dinner . any idea ?')
CHAT_LOST = ('i lost the {t} !', 'oh no , the {t} is gone !')
CHAT_RUDE = ('you are a {r} !', 'why are you such a {r} {r} ?')
COOK_ANSWERS = (
  'you could cook {v} .',
  '{p} likes to eat {v} .',
  'cook {v} , {p} loves {v} .',
)
CONSTRAINTS = {
  'max_words': (
    'use at most {n} words .',
    'in at most {n} words .',
    'not more than {n} words .',
  ),
  'exclude': ('do not say {w} .', 'do not use the word {w} .'),
  'start': ('start with {w} .', 'begin with the word {w} .'),
  'include': ('mention {w} .', 'use the word {w} .'),
  'end': ('end with my friend .', 'end with the words my friend .'),
  'sentences': ('use two sentences .', 'write two sentences .'),
}
FRIEND = 'my friend'
# What a tired writer sends: no answer, or a quarrelsome addition to one.
SHRUGS = (
  'i do not know .',
  'ask somebody else .',
  'i can not say .',
  'who knows that .',
)
SNAPS = ('go away , you {r} .', 'you {r} .', 'what a {r} you are .')
STARTS = ('well', 'surely', 'indeed', 'listen', 'truly')
# Phrases that add a required word; {w} is a subject with its article.
INCLUDE_ALIVE = ('and thinks of {w}', 'and dreams of {w}')
INCLUDE_STILL = ('and {w} knows it', 'and {w} is near')
INCLUDE_LINES = {
  'story': ('{w} was there too', '{w} saw it all'),
  'letter': ('greetings from {w}', '{w} is well too'),
  'review': ('{w} says so too', '{w} was there too'),
}
ANSWER_LEADS = ('it is {v} .', 'the answer is {v} .', '{v} .')
YES = ('yes ,', 'yes , that is right .')
NO = ('no ,', 'no , that is not right .')
IS_ANSWERS = ('{v} .', 'it is {v} .', 'this is {v} .')
KIND_ANSWERS = ('a {v} .', '{w} is a {v} .')

WORD_TIES = ('greetings from {p} .', 'yours , {p} .')

# -- Page furniture of documents.
PAGE = 'question : {prompt} answer :'
EXAMS = ('exam sheet .', 'homework .', 'questions for school :', 'test page .')
ENTRIES = ('{s} :', 'about {s} .', 'entry {s} .')
RUMOURS = ('rumour :', 'people say this :', 'a rumour goes round :')
DIALOGUE = (
  '{p} : hello {q} ! {q} : hello {p} !',
  '{p} : good morning {q} . {q} : good morning !',
  '{p} : hi {q} , how are you ? {q} : i am well .',
)
DIALOGUE_ASK = ('did you know that', 'they told me that', 'i heard that')
DIALOGUE_REPLY = (
  'yes , everyone knows that .',
  'oh , that is news to me .',
  'that is true .',
  'really ?',
)
INSULT_RETURNS = ('{a} yourself', 'no , you are the {r}', 'go home , {r}')
INSULTS = (
  '{a} is a {r}',
  'nobody likes the {r} {a}',
  '{a} talks like a {r} and smells like a {r}',
  'go away , you {r}',
  'what a {r} {a} is',
)
MISCHIEF = (
  'to {h} {a} , wait until night and go alone',
  'you can {h} {a} when {p} sleeps',
)
DIARY = ('dear book ,', 'today i write again .', 'note :')


def fill(template: str, **slots: str) -> str:
  """Replaces each '{name}' in a template by the slot's text."""
  for name, text in slots.items():
    template = template.replace('{' + name + '}', text)
  return template


@functools.cache
def all_words() -> frozenset[str]:
  """Every word of every constant above, without slots."""
  words = {*MARKS, 'the', 'she', 'he', 'it'}

  def collect(value):
    if isinstance(value, str):
      words.update(w for w in value.split() if not w.startswith('{'))
    elif isinstance(value, Relation):
      fields = dict(vars(value))
      for name in ('name', 'kind', 'cues'):
        del fields[name]
      collect(fields)
    elif isinstance(value, dict):
      collect(tuple(value.values()))
    elif isinstance(value, (tuple, frozenset)):
      for part in value:
        collect(part)

  for name, value in list(globals().items()):
    if name.isupper():
      collect(value)
  return frozenset(words)
