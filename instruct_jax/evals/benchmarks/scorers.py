"""Scores of the public NLP suite, item by item (paper appendix D).

Host side, NumPy. One answer against its references gives one number in [0, 1],
except BLEU, which is a property of a whole set of answers and lives in
`evals/restaurant.bleu`. What each data set's authors publish as its metric is
what is computed here; where the paper's own choice is not printed, the doc says
so, and `evals/released_samples.py` shows how well the choice reproduces the
paper's figures on the paper's own outputs.
"""

import calendar
import collections
import functools
import re
import string
from collections.abc import Callable, Sequence

import numpy as np

SQUAD_NO_ANSWER = 'Not in background.'
QUAC_NO_ANSWER = "I don't know."
# What the QuAC files themselves say where there is no answer.
CANNOT_ANSWER = 'CANNOTANSWER'
_PUNCTUATION = str.maketrans('', '', string.punctuation)
_ARTICLES = re.compile(r'\b(?:a|an|the)\b')


# --- Answers in words: SQuAD, QuAC, DROP --------------------------------------


def answer_words(text: str) -> list[str]:
  """Lower-cased words without ASCII punctuation and English articles.

  The normalisation of the SQuAD script (Rajpurkar et al. 2016): punctuation is
  deleted, not replaced, so `co-op` is one word.
  """
  lowered = text.lower().translate(_PUNCTUATION)
  return _ARTICLES.sub(' ', lowered).split()


def word_f1(answer: str, reference: str) -> float:
  """F1 of the two bags of `answer_words`; two empty bags agree."""
  ours, theirs = answer_words(answer), answer_words(reference)
  if not ours or not theirs:
    return float(ours == theirs)
  shared = collections.Counter(ours) & collections.Counter(theirs)
  return 2 * sum(shared.values()) / (len(ours) + len(theirs))


def says(answer: str, phrase: str) -> bool:
  """Whether the answer is that phrase, up to case, articles, punctuation."""
  return answer_words(answer) == answer_words(phrase)


def squad2_f1(
  answer: str,
  references: Sequence[str],
  no_answer: str = SQUAD_NO_ANSWER,
) -> float:
  """F1 of SQuAD 2.0: the best over the references; abstaining is all or none.

  Args:
    answer: the model's.
    references: the accepted answers; none, or `no_answer` alone, says that the
      passage has no answer. Then only an abstention scores, and it scores 1.
    no_answer: the phrase by which the prompt asks the model to abstain; an
      empty answer abstains as well.
  """
  abstains = not answer_words(answer) or says(answer, no_answer)
  answers = [text for text in references if not says(text, no_answer)]
  if not answers:
    return float(abstains)
  if abstains:
    return 0.0
  return max(word_f1(answer, reference) for reference in answers)


def quac_f1(
  answer: str,
  references: Sequence[str],
  no_answer: str = QUAC_NO_ANSWER,
) -> float:
  """F1 of QuAC (Choi et al. 2018), with people held to the same rule.

  A question that at least half of the annotators could not answer counts as
  unanswerable, else those annotators are left out. With several references the
  result is the mean over leaving out each of them of the best of the rest, so
  that a model and a person meet equally many references.

  Raises:
    ValueError: no reference.
  """
  if not references:
    raise ValueError('a QuAC question needs at least one reference')
  unknown = [
    says(text, CANNOT_ANSWER) or says(text, no_answer) for text in references
  ]
  abstains = (
    not answer_words(answer)
    or says(answer, no_answer)
    or says(answer, CANNOT_ANSWER)
  )
  if 2 * sum(unknown) >= len(references):
    return float(abstains)
  if abstains:
    return 0.0
  scores = [
    word_f1(answer, text)
    for text, empty in zip(references, unknown, strict=True)
    if not empty
  ]
  if len(scores) == 1:
    return scores[0]
  # The maximum without score i is the best, or the second if i is the best.
  ordered = sorted(scores)
  best, second = ordered[-1], ordered[-2]
  return ((len(scores) - 1) * best + second) / len(scores)


def _as_number(word: str) -> float | None:
  try:
    return float(word)
  except ValueError:
    return None


def drop_words(text: str) -> set[str]:
  """DROP's words: split at spaces and hyphens, numbers in one spelling."""
  words = set()
  for part in re.split(r'[ \-]', text.lower()):
    word = (
      part if _as_number(part) is not None else part.translate(_PUNCTUATION)
    )
    number = _as_number(word)
    if number is not None:
      words.add(str(number))
    else:
      words.update(_ARTICLES.sub(' ', word).split())
  return words


def _drop_span_f1(answer: set[str], reference: set[str]) -> float:
  numbers = {word for word in reference if _as_number(word) is not None}
  if numbers and not numbers & answer:
    return 0.0  # A wrong number is wrong, whatever else agrees.
  shared = len(answer & reference)
  precision = shared / len(answer) if answer else 1.0
  recall = shared / len(reference) if reference else 1.0
  total = precision + recall
  return 2 * precision * recall / total if total else 0.0


def drop_f1(
  answer: Sequence[str] | str,
  references: Sequence[Sequence[str] | str],
) -> float:
  """F1 of DROP (Dua et al. 2019): the best over the annotators' answers.

  Sets of words, not bags; a reference with a number scores nothing unless the
  answer holds one of its numbers. Several spans are matched one to one so that
  the sum of their F1 is largest; the divisor is the larger number of spans.

  Args:
    answer: one text, or several spans.
    references: one entry an annotator: a text, or several spans.

  Raises:
    ValueError: no reference.
  """
  if not references:
    raise ValueError('a DROP question needs at least one reference')
  ours = [answer] if isinstance(answer, str) else list(answer)
  scores = []
  for reference in references:
    theirs = [reference] if isinstance(reference, str) else list(reference)
    table = [
      [_drop_span_f1(drop_words(a), drop_words(b)) for b in theirs]
      for a in ours
    ]
    best = _best_matching(np.asarray(table).reshape(len(ours), len(theirs)))
    scores.append(best / max(len(ours), len(theirs), 1))
  # The published script rounds each score to two digits.
  return round(max(scores), 2)


def _best_matching(table: np.ndarray) -> float:
  """The largest sum of entries of a table, at most one in a row or column.

  Dynamic programme over subsets of the shorter side; answers have few spans.
  """
  rows, columns = table.shape
  if rows < columns:
    return _best_matching(table.T)
  if columns > 12:  # 2^12 subsets; no DROP answer comes near.
    raise ValueError(f'{columns} spans on both sides are too many to match')

  @functools.cache
  def best(row: int, free: int) -> float:
    if row == rows or not free:
      return 0.0
    taken = [
      table[row, column] + best(row + 1, free & ~(1 << column))
      for column in range(columns)
      if free >> column & 1
    ]
    return max(best(row + 1, free), *taken)

  return float(best(0, (1 << columns) - 1))


# --- Choices and pairs --------------------------------------------------------


def choose(mean_logprobs: Sequence[float]) -> int:
  """The choice of highest mean log-probability per token (D).

  The paper's sentence says lowest, which its own accuracies rule out. Equal
  choices: the first.

  Raises:
    ValueError: fewer than two choices, or a figure that is not finite.
  """
  values = np.asarray(mean_logprobs, np.float64)
  if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all():
    raise ValueError(
      f'expected two or more finite log-probabilities, got {values.tolist()}'
    )
  return int(values.argmax())


def entropy_bits(logprobs: Sequence[float]) -> float:
  """Entropy of the choice among whole sentences, in bits (D.1).

  P_i ∝ exp(logprob_i), H = -Σ P_i log2 P_i: 1 bit for two equally likely
  sentences, 0 for a certain preference.

  Args:
    logprobs: summed over each sentence's tokens, nats.

  Raises:
    ValueError: fewer than two sentences, or a figure that is not finite.
  """
  values = np.asarray(logprobs, np.float64)
  if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all():
    raise ValueError(
      f'expected two or more finite log-probabilities, got {values.tolist()}'
    )
  shifted = values - values.max()
  log_p = shifted - np.log(np.exp(shifted).sum())
  return float(-(np.exp(log_p) * log_p).sum() / np.log(2.0))


def same_noun(answer: str, candidate: str) -> bool:
  """WSC (D): whether the sampled noun holds the candidate or the reverse."""
  ours, theirs = (' '.join(answer_words(text)) for text in (answer, candidate))
  return bool(ours) and bool(theirs) and (ours in theirs or theirs in ours)


# --- Summaries ----------------------------------------------------------------


@functools.cache
def _rouge_scorer():
  # Its stemmer imports nltk, half a second that the other scores need not wait.
  from rouge_score import rouge_scorer

  return rouge_scorer.RougeScorer(['rougeL'], use_stemmer=False)


def rouge_l(answer: str, reference: str) -> float:
  """ROUGE-L F1 of `rouge-score`, words lower-cased, not stemmed (D)."""
  return float(_rouge_scorer().score(reference, answer)['rougeL'].fmeasure)


# --- Temporal questions -------------------------------------------------------

_ISO_DATE = re.compile(r'^(-?\d{1,4})-(\d\d)-(\d\d)(?:T00:00:00Z)?$')


def answer_forms(answer: str) -> set[str]:
  """Ways to write a gold answer: itself, and for an ISO date the usual ones.

  The first of January also stands for its year, since that is how the files
  write a year (they give no precision).
  """
  forms = {answer}
  date = _ISO_DATE.match(answer.strip().lstrip('+'))
  if date:
    year, month, day = (int(part) for part in date.groups())
    if 1 <= month <= 12 and 1 <= day <= 31:
      name = calendar.month_name[month]
      forms |= {
        f'{year:04d}-{month:02d}-{day:02d}',
        f'{day} {name} {year}',
        f'{name} {day}, {year}',
        f'{name} {day} {year}',
      }
      if (month, day) == (1, 1):
        forms.add(str(year))
  return forms


def _plain(text: str) -> str:
  """Lower case, no quotes or plus signs, single spaces, no final stop."""
  text = re.sub(r'["“”\'‘’+]', '', text.lower())
  return ' '.join(text.split()).removesuffix('.')


def precision_at_1(answer: str, references: Sequence[str]) -> float:
  """1 if the answer is a gold label, alias or date, else 0.

  As FAITH compares ids (lower case, without quotes and plus signs), here on
  texts, because a model that answers in words names no Wikidata id. Without
  Wikidata's aliases this is a lower bound of the published P@1.
  """
  ours = _plain(answer)
  return float(
    bool(ours)
    and any(
      ours == _plain(form) for gold in references for form in answer_forms(gold)
    )
  )


# (answer, references) -> score in [0, 1].
Scorer = Callable[[str, Sequence[str]], float]
