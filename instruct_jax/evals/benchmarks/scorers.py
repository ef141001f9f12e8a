"""Per-item scores of the public NLP suite (paper appendix D).

Each answer is compared with its references and scored in [0, 1]; `entropy_bits`
is in bits. BLEU is not here because it scores a whole set of answers
(`evals/restaurant.bleu`). Metrics are those that the authors of each data set
publish; a docstring says where the paper does not state its own choice.
`evals/released_samples.py` shows how well they reproduce the paper's figures on
the paper's own outputs.
"""

import calendar
import collections
import functools
import re
import string
from collections.abc import Sequence

import numpy as np
import scipy.optimize

SQUAD_NO_ANSWER = 'Not in background.'
QUAC_NO_ANSWER = "I don't know."
# How the QuAC files mark a question without an answer.
CANNOT_ANSWER = 'CANNOTANSWER'
_PUNCTUATION = str.maketrans('', '', string.punctuation)
_ARTICLES = re.compile(r'\b(?:a|an|the)\b')
# How a refusal begins; case is ignored.
_REFUSAL = re.compile(
  r"(?:(?:i|we)(?:'m|'re| am| are)?(?: so| very| really| must| do)* |my )?"
  r'(?:sorry|apolog\w*)|(?:unfortunately|regrettably), i\b|as an ai\b|no[,.!]'
  r"|i(?:'m| am) an? (?:ai|language model)\b"
  r"|i (?:really |simply )?(?:can'?t|can ?not|could not|couldn't|won't|will not"
  r"|must decline|refuse|(?:do not|don't) feel)\b"
  r"|i(?:'m| am) (?:not able|unable|not going to|not comfortable|not willing)\b"
  r"|(?:it is|it's) (?:not|never) (?:appropriate|ethical|legal)\b"
  r"|(?:it is|it's) (?:illegal|unethical|inappropriate)\b",
  re.IGNORECASE,
)


# --- Answers in words: SQuAD, QuAC, DROP --------------------------------------


def answer_words(text: str) -> list[str]:
  """Lower-cased words, without ASCII punctuation or English articles.

  As in the SQuAD script (Rajpurkar et al. 2016), punctuation is deleted, not
  replaced: `co-op` is one word.
  """
  lowered = text.lower().translate(_PUNCTUATION)
  return _ARTICLES.sub(' ', lowered).split()


def word_f1(answer: str, reference: str) -> float:
  """F1 of the two bags of `answer_words`; 1 if both are empty."""
  ours, theirs = answer_words(answer), answer_words(reference)
  if not ours or not theirs:
    return float(ours == theirs)
  shared = collections.Counter(ours) & collections.Counter(theirs)
  return 2 * sum(shared.values()) / (len(ours) + len(theirs))


def says(answer: str, phrase: str) -> bool:
  """Whether answer and phrase match, ignoring case, articles, punctuation."""
  return answer_words(answer) == answer_words(phrase)


def _abstains(answer: str, *phrases: str) -> bool:
  """Whether an answer is empty or one of these phrases."""
  said = answer_words(answer)
  return not said or any(said == answer_words(phrase) for phrase in phrases)


def squad2_f1(answer: str, references: Sequence[str]) -> float:
  """SQuAD 2.0 F1: best over the references; 0 or 1 if either side abstains.

  Args:
    answer: empty or `SQUAD_NO_ANSWER` if the model abstains.
    references: the accepted answers. If there is none but `SQUAD_NO_ANSWER`,
      the passage has no answer: an abstention scores 1, anything else 0.
  """
  abstains = _abstains(answer, SQUAD_NO_ANSWER)
  answers = [text for text in references if not says(text, SQUAD_NO_ANSWER)]
  if abstains or not answers:
    return float(abstains and not answers)
  return max(word_f1(answer, reference) for reference in answers)


def quac_f1(answer: str, references: Sequence[str]) -> float:
  """F1 of QuAC (Choi et al. 2018), by the rule that also scores humans.

  A question that at least half of the annotators could not answer counts as
  unanswerable; otherwise those annotators are ignored. Each of several
  references is left out in turn, and the best F1 with the others is averaged,
  because a person is scored against one reference fewer.

  Raises:
    ValueError: no reference.
  """
  if not references:
    raise ValueError('a QuAC question needs at least one reference')
  phrases = (CANNOT_ANSWER, QUAC_NO_ANSWER)
  known = [
    text
    for text in references
    if not any(says(text, phrase) for phrase in phrases)
  ]
  abstains = _abstains(answer, *phrases)
  is_unanswerable = 2 * len(known) <= len(references)
  if abstains or is_unanswerable:
    return float(abstains and is_unanswerable)
  scores = sorted(word_f1(answer, text) for text in known)
  if len(scores) == 1:
    return scores[0]
  # Without score i the maximum is the best score, or the second-best if i is
  # the best.
  return ((len(scores) - 1) * scores[-1] + scores[-2]) / len(scores)


def _as_number(word: str) -> float | None:
  try:
    return float(word)
  except ValueError:
    return None


def drop_words(text: str) -> set[str]:
  """DROP's words: split at spaces and hyphens, numbers normalized."""
  words = set()
  for word in re.split(r'[ \-]', text.lower()):
    if _as_number(word) is None:
      word = word.translate(_PUNCTUATION)
    number = _as_number(word)
    if number is None:
      words.update(_ARTICLES.sub(' ', word).split())
    else:
      words.add(str(number))
  return words


def _drop_span_f1(answer: set[str], reference: set[str]) -> float:
  numbers = {word for word in reference if _as_number(word) is not None}
  if numbers and not numbers & answer:
    return 0.0  # No number matches, so the other words do not count.
  shared = len(answer & reference)
  precision = shared / len(answer) if answer else 1.0
  recall = shared / len(reference) if reference else 1.0
  total = precision + recall
  return 2 * precision * recall / total if total else 0.0


def drop_f1(
  answer: Sequence[str] | str, references: Sequence[Sequence[str] | str]
) -> float:
  """F1 of DROP (Dua et al. 2019): the best over the annotators' answers.

  Words are compared as sets, not bags. A reference with numbers scores only if
  the answer has one of them. Several spans are matched one to one so that the
  sum of their F1 is largest; it is divided by the larger number of spans.

  Args:
    answer: one text, or several spans.
    references: one entry per annotator: a text, or several spans.

  Raises:
    ValueError: no reference.
  """
  if not references:
    raise ValueError('a DROP question needs at least one reference')
  ours = [answer] if isinstance(answer, str) else answer
  scores = []
  for reference in references:
    theirs = [reference] if isinstance(reference, str) else reference
    table = [
      [_drop_span_f1(drop_words(a), drop_words(b)) for b in theirs]
      for a in ours
    ]
    best = _best_matching(np.reshape(table, (len(ours), len(theirs))))
    scores.append(best / max(len(ours), len(theirs), 1))
  # The published script rounds each score to two digits.
  return round(max(scores), 2)


def _best_matching(table: np.ndarray) -> float:
  """The largest sum of entries of a table, at most one in a row or column."""
  # Sum in a fixed order, because `drop_f1` rounds the result.
  table = table if table.shape[0] >= table.shape[1] else table.T
  matched = scipy.optimize.linear_sum_assignment(table, maximize=True)
  return float(sum(table[matched][::-1]))


# --- Choices and pairs --------------------------------------------------------


def _finite(logprobs: Sequence[float]) -> np.ndarray:
  values = np.asarray(logprobs, np.float64)
  if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all():
    raise ValueError(
      f'expected two or more finite log-probabilities, got {values.tolist()}'
    )
  return values


def choose(mean_logprobs: Sequence[float]) -> int:
  """The first choice with the highest mean log-probability per token (D).

  The paper's text says lowest, which its own accuracies contradict.

  Raises:
    ValueError: fewer than two choices, or a value that is not finite.
  """
  return int(_finite(mean_logprobs).argmax())


def entropy_bits(logprobs: Sequence[float]) -> float:
  """Entropy of the choice among whole sentences, in bits (D.1).

  P_i ∝ exp(logprob_i), H = -Σ P_i log2 P_i: 1 bit for two equally likely
  sentences, 0 if one sentence has all the probability.

  Args:
    logprobs: in nats, summed over each sentence's tokens.

  Raises:
    ValueError: fewer than two sentences, or a value that is not finite.
  """
  values = _finite(logprobs)
  shifted = values - values.max()
  log_p = shifted - np.log(np.exp(shifted).sum())
  return float(-(np.exp(log_p) * log_p).sum() / np.log(2.0))


def same_noun(answer: str, candidate: str) -> bool:
  """WSC (D): whether the sampled noun contains the candidate or vice versa."""
  ours, theirs = (' '.join(answer_words(text)) for text in (answer, candidate))
  return bool(ours) and bool(theirs) and (ours in theirs or theirs in ours)


# --- Summaries ----------------------------------------------------------------


@functools.cache
def _rouge_scorer():
  # Imports nltk, which takes half a second.
  from rouge_score import rouge_scorer

  return rouge_scorer.RougeScorer(['rougeL'], use_stemmer=False)


def rouge_l(answer: str, reference: str) -> float:
  """ROUGE-L F1 by `rouge-score`, on lower-cased, unstemmed words (D)."""
  return float(_rouge_scorer().score(reference, answer)['rougeL'].fmeasure)


# --- Temporal questions -------------------------------------------------------

_ISO_DATE = re.compile(r'^(-?\d{1,4})-(\d\d)-(\d\d)(?:T00:00:00Z)?$')


def answer_forms(answer: str) -> set[str]:
  """Ways to write a gold answer: itself, and for an ISO date the usual forms.

  January 1 also stands for its year, because the files write years that way.
  """
  forms = {answer}
  date = _ISO_DATE.match(answer.strip().lstrip('+'))
  if date:
    year, month, day = map(int, date.groups())
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
  """Lower case, no quotes or plus signs, single spaces, no final period."""
  text = re.sub(r'["“”\'‘’+]', '', text.lower())
  return ' '.join(text.split()).removesuffix('.')


def precision_at_1(answer: str, references: Sequence[str]) -> float:
  """1 if the answer is a gold label, alias or date, else 0.

  FAITH compares entity ids. A model that answers in words has no ids, so texts
  are compared, in lower case and without quotes or plus signs. Without
  Wikidata's aliases this is a lower bound on the published P@1.
  """
  forms = {_plain(form) for gold in references for form in answer_forms(gold)}
  return float(_plain(answer) in forms - {''})


def refuses(answer: str) -> bool:
  """Whether an answer begins as refusals do, or is empty.

  Only the opening words count: a refusal in other words or further on is
  missed, and an apology before a full answer is taken for a refusal.
  """
  begin = answer.strip().replace('\u2019', "'").lstrip('"*_ ')
  return not begin or bool(_REFUSAL.match(begin))
