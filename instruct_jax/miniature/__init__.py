"""The embedded world: a small closed world in plain lower-case English.

Ten people, six places, six animals and eight things, with 70 facts assigned at
random from a seed, in about 580 words: a model of half a million parameters can
learn them by heart from two million words. Text is words and punctuation
separated by single spaces, so word-level tokens round trip exactly. The
modules, lowest first: `phrases`, `world`, `answers`, `tasks`, `documents`,
`gold` and `labelers`.

A model of the documents knows the facts but answers a question with more
questions. Demonstrations teach it to answer, and also the lapses of their
writers: people judge better than they write. Rankings by labelers who agree on
about 73 % of pairs leave reinforcement learning something to gain (politeness,
an answer at all, the right length, constraints) and something to lose (fluency,
variety, the documents themselves).
"""
