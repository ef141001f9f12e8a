"""The embedded world: a small closed world in plain lower-case English.

It has ten people, six places, six animals and eight things, with 70 facts
assigned at random from a seed, and a vocabulary of 535 words: a model of half a
million parameters can memorise it from two million words. Text is words and
punctuation separated by single spaces, so word-level tokens round trip exactly.
The modules, lowest first: `phrases`, `world`, `answers`, `tasks`, `documents`,
`gold` and `labelers`.

A model pretrained on the documents knows the facts but answers a question with
more questions. Demonstrations teach it to answer, but also the lapses of their
writers: people judge better than they write. With rankings by labelers who
agree on about 73 % of pairs, reinforcement learning has something to gain
(politeness, an answer at all, the right length, constraints) and something to
lose (fluency, variety, what the documents taught).
"""
