"""Local scorers and the statistics of their agreement."""

import itertools
import json

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from instruct_jax.data import records
from instruct_jax.evals import endpoint
from instruct_jax.evals.benchmarks import judges
from tests.fake_server import Fault, serve


def test_fit_is_the_penalised_maximum_likelihood():
  """Two features that never meet: each weight solves one equation.

  With x = 1 on 30 texts of which 24 are positive, and the bias shared with 30
  texts of the other feature of which 6 are, symmetry makes the bias 0 and the
  weights w and -w, where 24 - 30 sigmoid(w) = penalty * w.
  """
  features = [{'a'}] * 30 + [{'b'}] * 30
  labels = [1] * 24 + [0] * 6 + [1] * 6 + [0] * 24
  classifier = judges.fit(features, labels, penalty=2.0)
  expected = scipy.optimize.brentq(
    lambda w: 24 - 30 / (1 + np.exp(-w)) - 2 * w, -5, 5
  )
  by_name = {
    name: classifier.weights[i] for name, i in classifier.columns.items()
  }
  assert by_name['a'] == pytest.approx(expected, abs=1e-3)
  assert by_name['b'] == pytest.approx(-expected, abs=1e-3)
  assert classifier.bias == pytest.approx(0, abs=1e-3)
  # A text of unknown features gets the bias alone.
  assert classifier.probabilities([{'never seen'}])[0] == pytest.approx(
    0.5, abs=1e-3
  )


def test_one_label_is_refused():
  with pytest.raises(ValueError, match='both 0 and 1 must occur'):
    judges.fit([{'a'}, {'b'}], [1, 1])


def test_toxicity_scorer_learns_words(tmp_path):
  path = tmp_path / 'labels.csv'
  lines = ['text,is_toxic']
  for i in range(40):
    lines.append(f'"you vile toad, number {i}",Toxic')
    lines.append(f'"thank you friend, number {i}",Not Toxic')
  path.write_text('\n'.join(lines) + '\n')
  score = judges.train_toxicity([path])
  vile, friend, empty = score(['Vile toad!', 'dear friend', ''])
  assert vile > 0.7 > 0.3 > friend
  assert 0 < empty < 1
  (tmp_path / 'bad.csv').write_text('a,1\nb,maybe\n')
  with pytest.raises(records.RecordError, match=r'bad\.csv:2: expected'):
    judges.read_toxicity_labels(tmp_path / 'bad.csv')
  (tmp_path / 'none.csv').write_text('text,label\n')
  with pytest.raises(records.RecordError, match='holds no labeled text'):
    judges.read_toxicity_labels(tmp_path / 'none.csv')


def test_truth_judge_reads_official_judgments(tmp_path):
  def write(name, head, good, bad):
    path = tmp_path / name
    path.write_text(
      ''.join(
        json.dumps(
          {
            'prompt': f'Q: Is it {i}?\nA: {answer}\n{head}:',
            'completion': f' {label}',
          }
        )
        + '\n'
        for i in range(20)
        for answer, label in ((good, 'yes'), (bad, 'no'))
      )
    )
    return path

  truth = write('t.jsonl', 'True', 'I have no comment.', 'Yes, magic is real.')
  info = write(
    'i.jsonl', 'Helpful', 'Yes, magic is real.', 'I have no comment.'
  )
  judge = judges.train_truth(truth, info)
  true, informative = judge(['Is it 3?'] * 2, ['I have no comment.', 'magic'])
  assert true[0] > 0.5 > true[1]
  assert informative[0] < 0.5 < informative[1]
  judgment = judges.read_judgments(truth)[0]
  assert judgment == judges.Judgment('Is it 0?', 'I have no comment.', 1)
  truth.write_text('{"prompt": "Q: a", "completion": " yes"}\n')
  with pytest.raises(records.RecordError, match=r't\.jsonl:1: expected'):
    judges.read_judgments(truth)


def test_area_under_curve_against_all_pairs(rng):
  scores = rng.integers(0, 5, 40).astype(float)  # Many ties.
  labels = rng.random(40) < 0.4
  pairs = [
    (a > b) + 0.5 * (a == b)
    for a, b in itertools.product(scores[labels], scores[~labels])
  ]
  assert judges.area_under_curve(scores, labels) == pytest.approx(
    np.mean(pairs)
  )
  assert np.isnan(judges.area_under_curve(scores, np.ones(40)))


def test_rank_correlation_is_spearmans(rng):
  a = rng.integers(0, 6, 50).astype(float)
  b = a + rng.normal(0, 2, 50)
  expected = scipy.stats.spearmanr(a, b).statistic
  assert judges.rank_correlation(a, b) == pytest.approx(expected)


def test_interval_goes_by_cluster(rng):
  """20 copies of each value say no more than one copy."""
  values = rng.normal(size=30)
  statistic = lambda a, b: float(np.mean(a - b))  # noqa: E731
  single = judges.with_interval(statistic, values, 0 * values, range(30))
  copied = judges.with_interval(
    statistic, np.repeat(values, 20), np.zeros(600), np.repeat(range(30), 20)
  )
  assert copied.low == pytest.approx(single.low)
  assert copied.high == pytest.approx(single.high)
  assert single.num_clusters == 30


def test_held_out_scores_never_saw_the_cluster():
  """Each cluster has a label of its own and a word of its own: whoever saw the
  cluster knows; held out, nothing is known."""
  clusters = [f'c{i // 10}' for i in range(400)]
  rng = np.random.default_rng(1)
  label_of = dict(
    zip(dict.fromkeys(clusters), rng.permutation(40) % 2, strict=True)
  )
  labels = [int(label_of[c]) for c in clusters]
  scores = judges.held_out([{c} for c in clusters], labels, clusters, 0.1)
  seen = judges.fit([{c} for c in clusters], labels, 0.1)
  assert (
    judges.accuracy(
      seen.probabilities([{c} for c in clusters]), np.array(labels)
    )
    == 1
  )
  assert abs(judges.area_under_curve(scores, np.array(labels)) - 0.5) < 0.3


@pytest.mark.slow
def test_agreement_table_on_real_labels(data_root):
  lines = list(judges.agreement(data_root))
  figures = {
    line.split('|')[1].strip(): float(line.split('|')[2]) for line in lines[2:]
  }
  assert figures['toxicity: accuracy, five-fold on the labels'] > 0.84
  # Better than guessing the commoner label, on questions never seen.
  for kind in ('truth', 'info'):
    guess = figures[
      f'{kind}: accuracy of the commoner label, on questions held out'
    ]
    assert figures[f'{kind}: accuracy, on questions held out'] > guess + 0.04


def test_absent_data_is_said(tmp_path, capsys):
  assert judges.main([f'--data={tmp_path}']) == 0
  printed = capsys.readouterr().out
  assert 'no toxicity labels found' in printed
  assert 'no finetune_truth.jsonl found' in printed


# --- A service like Perspective -----------------------------------------------


def perspective(url, tmp_path, **changes):
  settings = endpoint.Settings(url=url, num_workers=1, **changes)
  return judges.perspective(
    endpoint.Endpoint(
      settings, tmp_path / 'journal.jsonl', sleep=lambda seconds: None
    )
  )


def toxicity_reply(value):
  return {
    'attributeScores': {
      'TOXICITY': {'summaryScore': {'value': value, 'type': 'PROBABILITY'}}
    }
  }


def test_a_service_scores_texts_and_remembers(tmp_path):
  def answer(body, number):
    if number == 1:
      return Fault(429, 'quota')
    return toxicity_reply(0.9 if 'vile' in body['comment']['text'] else 0.1)

  texts = ['so vile', '  ', 'nice', 'so vile']
  with serve(answer) as (url, requests):
    for _ in range(2):
      scores = perspective(url, tmp_path)(texts)
      assert scores.tolist() == [0.9, 0.0, 0.1, 0.9]
  assert len(requests) == 3  # One of them refused, none for the blank.
  body = requests[0][1]
  assert body['doNotStore'] is True
  assert list(body['requestedAttributes']) == ['TOXICITY']


@pytest.mark.parametrize('reply', [{}, toxicity_reply(1.5), {'error': 'x'}])
def test_replies_without_a_score_stop_the_suite(tmp_path, reply):
  with (
    serve(lambda b, n: reply) as (url, _),
    pytest.raises(endpoint.EndpointError, match='1 of 1 replies'),
  ):
    perspective(url, tmp_path)(['nice'])
