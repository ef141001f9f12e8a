"""The embedded world: a small closed world in plain lower-case English.

Twenty people, ten places, twelve animals and sixteen things with 252 facts
among them, all assigned at random from a seed, in about 640 words: no more than
a model of a million parameters learns by heart from a million words. Text is
words and punctuation separated by single spaces, so word-level tokens round
trip exactly. The modules, lowest first:

  phrases    every word and turn of phrase, as data
  world      `make_world`, the facts; `find_claims` reads facts out of any text
  answers    good answers to tasks, and the ways in which answers go wrong
  tasks      `write_prompts`, `prefixes`: what users ask for (paper Table 1)
  documents  `write_documents`: what the language model is pretrained on
  gold       `judge`, `utility`: the explicit gold judge, never seen by training
  labelers   `make_labelers`, `write_demonstration`, `rank`, `agreement`

A model of the documents knows the facts but goes on asking when it is asked;
demonstrations teach it to answer, imperfectly; rankings by labelers who agree
on about 73 % of pairs leave reinforcement learning something to gain (true
answers, constraints, right length, politeness) and something to lose (fluency,
variety, the documents themselves).
"""
