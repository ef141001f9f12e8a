"""The embedded world: a small closed world in plain lower-case English.

Ten people, six places, six animals and eight things with 130 facts among them,
all assigned at random from a seed, in about 580 words: no more than a model of
half a million parameters learns by heart from two million words. Text is
words and punctuation separated by single spaces, so word-level tokens round
trip exactly. The modules, lowest first:

  phrases    every word and turn of phrase, as data
  world      `make_world`, the facts; `find_claims` reads facts out of any text
  answers    good answers to tasks, and the ways in which answers go wrong
  tasks      `write_prompts`, `prefixes`: what users ask for (paper Table 1)
  documents  `write_documents`: what the language model is pretrained on
  gold       `judge`, `utility`: the explicit gold judge, never seen by training
  labelers   `make_labelers`, `write_demonstration`, `rank`, `agreement`

A model of the documents knows the facts but goes on asking when it is asked.
Demonstrations teach it to answer, and the lapses of their writers with it:
people judge better than they write. Rankings by labelers who agree on about
73 % of pairs leave reinforcement learning something to gain (politeness, an
answer at all, the right length, constraints) and something to lose (fluency,
variety, the documents themselves).
"""
