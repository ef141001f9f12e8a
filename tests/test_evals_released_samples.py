"""Released samples: hand-made files, and OpenAI's own if available."""

import collections
import csv
import functools
import gzip
import json
import math
import re

import numpy as np
import pytest
import sacrebleu

from instruct_jax.data import records
from instruct_jax.evals import released_samples
from instruct_jax.evals.benchmarks import released_csv, table14


def write_rows(folder, task, rows):
  released_csv.write(folder / released_csv.file_name(task), task, rows)


def squad_row(model, context, references, sample, prompt='zeroshot'):
  return {
    'model_type': model,
    'prompt_type': prompt,
    'context': context,
    'ref_text': references,
    'sample': sample,
  }


def only_cell(cells, **wanted):
  found = [
    c for c in cells if all(c[key] == value for key, value in wanted.items())
  ]
  assert len(found) == 1
  return found[0]


def score_of(folder, task, rows):
  """Metric -> cell of one task's rows under its first prompt."""
  prompt = released_csv.LAYOUTS[task].prompts[0]
  about = {'model_type': 'mine', 'prompt_type': prompt}
  write_rows(folder, task, [about | row for row in rows])
  found = released_samples.score_folder(folder)['cells']
  return {cell['metric']: cell for cell in found}


def test_truthful_choices_by_hand(tmp_path):
  def row(context, right, *chances):
    """Choices a, b, ... with these probabilities."""
    names = 'abc'[: len(chances)]
    return {
      'context': context,
      'choices': '|'.join(names),
      'logprobs': '|'.join(repr(math.log(x)) for x in chances),
      'num_tokens': '|'.join('1' * len(chances)),
      'ref_text': right,
      'sample': 'a',
    }

  rows = [row('1', 'a', 0.2, 0.1, 0.1), row('2', 'a', 0.1, 0.3)]
  # By probability, not by that of a token: the right one is shorter.
  rows.append(row('3', 'a', 0.2, 0.1) | {'num_tokens': '1|9'})
  found = score_of(tmp_path, 'truthful_mc1', rows)['MC1']
  assert found['score'] == pytest.approx(2 / 3)
  # Equal is not more.
  found = score_of(tmp_path, 'truthful_mc1', [row('1', 'a', 0.2, 0.2)])['MC1']
  assert found['score'] == 0
  # (0.2 + 0.1) / 0.4 = 0.75, and 0.1 / 0.4 = 0.25.
  (tmp_path / 'truthful_mc1_samples.csv').unlink()
  rows = [row('1', 'a|b', 0.2, 0.1, 0.1), row('2', 'a', 0.1, 0.3)]
  found = score_of(tmp_path, 'truthful_mc2', rows)['MC2']
  assert found['score'] == pytest.approx(0.5)


def test_last_words_and_refusals_by_hand(tmp_path):
  rows = [
    {'context': str(i), 'ref_text': 'signs', 'sample': sample}
    for i, sample in enumerate(('signs.', '"signs" of', 'sign', ''))
  ]
  found = score_of(tmp_path, 'lambada', rows)['accuracy']
  assert found['score'] == 0.5
  (tmp_path / 'lambada_samples.csv').unlink()
  samples = ['I cannot.', 'Type kill.', 'Type kill.', 'Sorry, no.', 'Hit it.']
  rows = [
    {'context': str(i), 'label': label, 'kind': 'x', 'sample': samples[i]}
    for i, label in enumerate(('safe', 'safe', 'safe', 'unsafe', 'unsafe'))
  ]
  found = score_of(tmp_path, 'xstest', rows)
  assert found['refused, safe prompts']['score'] == pytest.approx(1 / 3)
  assert found['refused, unsafe prompts']['score'] == pytest.approx(1 / 2)


def test_scores_and_reweighting_by_hand(tmp_path):
  """Answerable: F1 1, 0 and 2/3. Unanswerable: 1."""
  write_rows(
    tmp_path,
    'squadv2',
    [
      squad_row('gpt-xl', 'a', 'red|a red fox', 'red'),
      squad_row('gpt-xl', 'b', 'blue', 'green'),
      squad_row('gpt-xl', 'c', 'one two', 'two'),
      squad_row('gpt-xl', 'd', 'Not in background.', 'Not in background.'),
    ],
  )
  result = released_samples.score_folder(tmp_path)
  cell = only_cell(result['cells'], task='squadv2')
  mean = (1 + 0 + 2 / 3 + 1) / 4
  assert cell['score'] == pytest.approx(100 * mean)
  # 5,945 of 11,873 dev questions have no answer.
  share = 5945 / 11873
  expected = share * 1 + (1 - share) * (1 + 0 + 2 / 3) / 3
  assert cell['reweighted'] == pytest.approx(100 * expected)
  assert cell['paper'] == 51.97
  assert cell['num_items'] == 4
  assert cell['low'] < cell['score'] < cell['high']
  row = result['rows'][0]
  assert row['difference'] == pytest.approx(100 * mean - 51.97)
  assert row['correlation'] is None  # One model.


def test_other_readings_are_compared_with_the_usual(tmp_path):
  """ "Not in town" shares two words of three with the abstention, which counts
  only where that is a text like any other: F1 2/3."""
  rows = [
    squad_row('gpt-xl', 'a', 'Not in background.', 'not in town'),
    squad_row('gpt-xl', 'b', 'hen|fox', 'fox'),
  ]
  write_rows(tmp_path, 'squadv2', rows)
  result = released_samples.score_folder(tmp_path)
  assert result['cells'][0]['score'] == pytest.approx(50)
  found = {
    row['reading']: row['difference'] + 51.97 for row in result['readings']
  }
  assert found == {
    'abstaining is a text like any other': pytest.approx(500 / 6),
    'first reference only': pytest.approx(0),
  }
  text = released_samples.to_markdown(result)
  assert '| squadv2 | F1, first reference only | zeroshot |' in text


def test_reason_names_the_mix(tmp_path):
  """30 unanswerable questions, all abstained; 1 answerable, always wrong."""
  rows = [
    squad_row('gpt-xl', str(i), 'Not in background.', 'not in background')
    for i in range(30)
  ] + [squad_row('gpt-xl', f'x{i}', 'fox', 'hen') for i in range(3)]
  write_rows(tmp_path, 'squadv2', rows)
  cell = released_samples.score_folder(tmp_path)['cells'][0]
  assert cell['inside'] is False
  # 100 * share: no chance left within the strata, and 50.07 is not 51.97.
  assert cell['reweighted'] == pytest.approx(100 * 5945 / 11873)
  assert 'at the mix of the benchmark too (91% of these items' in cell['why']
  assert cell['why'].startswith('above')


def test_too_few_or_equal_items_have_no_interval(tmp_path):
  """Nine items, and twelve that all score 0: neither has a sound interval."""
  rows = [
    squad_row('gpt-xl', str(i), 'fox', 'fox' if i < 4 else 'hen')
    for i in range(9)
  ] + [squad_row('gpt-6b', str(i), 'fox', 'hen') for i in range(12)]
  write_rows(tmp_path, 'squadv2', rows)
  result = released_samples.score_folder(tmp_path)
  few, same = result['cells']
  assert (few['inside'], same['inside']) == (None, None)
  assert few['why'] == 'too few items for an interval: 9 of 10'
  assert same['why'] == 'no interval: all items score the same'
  assert result['rows'][0]['num_cells'] == 0
  assert 'figures lie in the 95 %' not in released_samples.to_markdown(result)


def test_bleu_is_sacrebleus(tmp_path):
  samples = ['the cat sat on the mat today', 'he went home', 'no idea at all']
  texts = ['the cat sat on a mat today', 'she went home early', 'none at all']
  write_rows(
    tmp_path,
    'fr_to_en',
    [
      squad_row('ours', str(i), text, sample)
      for i, (text, sample) in enumerate(zip(texts, samples, strict=True))
    ],
  )
  cell = released_samples.score_folder(tmp_path)['cells'][0]
  assert cell['score'] == pytest.approx(
    sacrebleu.corpus_bleu(samples, [texts]).score
  )
  assert cell['paper'] is None
  assert cell['why'] == 'the paper prints no figure'


def test_bootstrap_interval_against_the_normal_one(tmp_path, rng):
  """400 items: the bootstrap and the textbook interval must nearly agree."""
  values = rng.beta(0.5, 1.5, 400)
  write_rows(
    tmp_path,
    'real_toxicity',
    [
      {
        'model_type': 'gpt-xl',
        'prompt_type': 'basic prompt',
        'context': str(i),
        'sample': 'x',
        'toxicity': repr(float(value)),
      }
      for i, value in enumerate(values)
    ],
  )
  cell = released_samples.score_folder(tmp_path)['cells'][0]
  half = 1.96 * values.std(ddof=1) / 20
  assert cell['score'] == pytest.approx(values.mean())
  assert cell['low'] == pytest.approx(values.mean() - half, abs=0.15 * half)
  assert cell['high'] == pytest.approx(values.mean() + half, abs=0.15 * half)


def answers(model, right, count=40):
  """`count` questions, of which the first `right` are answered."""
  return [
    squad_row(model, str(i), 'fox', 'fox' if i < right else 'hen')
    for i in range(count)
  ]


def best_of(folder, rows):
  write_rows(folder, 'squadv2', rows)
  cells = released_samples.score_folder(folder)['cells']
  return {cell['model']: cell['best'] for cell in cells}


def test_the_best_model_is_marked_if_it_is_clearly_better(tmp_path):
  # Right on the same questions and on others: paired, 30 of 40 and 20 of 40
  # differ by 10 questions, all in one direction; 30 and 29 by one.
  clear = best_of(tmp_path, answers('a', 20) + answers('b', 30))
  assert clear == {'a': False, 'b': True}
  close = best_of(
    tmp_path, answers('a', 20) + answers('b', 30) + answers('c', 29)
  )
  assert not any(close.values())
  # A single model, eight questions, or different questions are not compared.
  assert best_of(tmp_path, answers('a', 20)) == {'a': False}
  assert not any(
    best_of(tmp_path, answers('a', 0, 8) + answers('b', 8, 8)).values()
  )
  assert not any(
    best_of(tmp_path, answers('a', 20) + answers('b', 30, 39)).values()
  )


def test_less_toxicity_is_better(tmp_path):
  rows = [
    {
      'model_type': model,
      'prompt_type': 'basic prompt',
      'context': str(i),
      'sample': 'x',
      'toxicity': repr(level + 0.01 * (i % 3)),
    }
    for model, level in (('mild', 0.1), ('rude', 0.6))
    for i in range(20)
  ]
  write_rows(tmp_path, 'real_toxicity', rows)
  result = released_samples.score_folder(tmp_path)
  assert only_cell(result['cells'], model='mild')['best']
  assert not only_cell(result['cells'], model='rude')['best']
  assert 'toxicity (lower is better)' in released_samples.to_markdown(result)


def test_other_models_have_a_table_without_the_papers_figures(tmp_path):
  write_rows(tmp_path, 'squadv2', answers('a|b', 10) + answers('b', 30))
  text = released_samples.to_markdown(released_samples.score_folder(tmp_path))
  head, _, row = [line for line in text.split('\n') if line.startswith('|')][:3]
  assert head == '| task | a&#124;b | b | items |'
  assert re.fullmatch(
    r'\| squadv2, zeroshot, F1 \| 25\.0 \[[\d., ]+\] '
    r'\| \*\*75\.0 \[[\d., ]+\]\*\* \| 40 \|',
    row,
  )
  for absent in ('Table 14', 'paper', 'other scorers', 'correlation'):
    assert absent not in text.split('## Files')[0].split('\n', 1)[1]


def test_reweighted_scores_of_other_models_are_kept(tmp_path):
  rows = answers('a', 10) + [
    squad_row('a', f'n{i}', 'Not in background.', 'not in background')
    for i in range(5)
  ]
  write_rows(tmp_path, 'squadv2', rows)
  text = released_samples.to_markdown(released_samples.score_folder(tmp_path))
  mixed = text.split("At the benchmark's mix of items")[1]
  expected = 100 * (0.25 * (1 - 5945 / 11873) + 5945 / 11873)
  assert f'| squadv2, zeroshot, F1 | {expected:.1f} [' in mixed


def truthful_rows(figures_of):
  """1,000 questions a cell whose shares true are exactly `figures_of`."""
  rows = []
  for prompt in released_csv.TRUTHFUL_PROMPTS:
    figure = figures_of(prompt)
    for i in range(1000):
      rows.append(
        {
          'model_type': 'ppo-ptx-175b',
          'prompt_type': prompt,
          'adversarial': str(i % 2 == 0),
          'question': str(i),
          'answer': 'x',
          'true': '1.0' if i < 1000 * figure else '0.0',
          'info': '0.0',
        }
      )
  return rows


def test_label_conflict_is_found_only_if_there_is_one(tmp_path):
  other = {
    'QA prompt': 'QA prompt',
    'QA + instruction': 'instruction prompt',
    'instruction prompt': 'QA + instruction',
  }
  for name, exchange in (('same', False), ('exchanged', True)):
    folder = tmp_path / name
    rows = truthful_rows(
      lambda prompt, exchange=exchange: table14.figure(
        'truthful_qa',
        'true',
        other[prompt] if exchange else prompt,
        'ppo-ptx-175b',
      )
    )
    write_rows(folder, 'truthful_qa', rows)
    result = released_samples.score_folder(folder)
    cells = [c for c in result['cells'] if c['metric'] == 'true']
    fits = {c['prompt']: c['fits_other_label'] for c in cells}
    assert fits == {
      'QA prompt': False,
      'QA + instruction': exchange,
      'instruction prompt': exchange,
    }
    labels = result['labels']
    assert (labels['exchanged']['rms'] < labels['as labeled']['rms']) == (
      exchange
    )


def choice_row(means, right):
  return {
    'model_type': 'ours',
    'prompt_type': 'zeroshot',
    'context': repr(means),
    'choices': 'yes|no',
    # Summed over 2 and 5 tokens.
    'logprobs': f'{2 * means[0]}|{5 * means[1]}',
    'num_tokens': '2|5',
    'ref_text': right,
    'sample': '',
  }


def test_our_own_tasks_in_the_same_layout(tmp_path):
  write_rows(
    tmp_path,
    'rte',
    # By sums the longer "no" would lose every time.
    [choice_row((-2.0, -1.0), 'no'), choice_row((-1.0, -1.5), 'no')],
  )
  entropy = {
    'model_type': 'ours',
    'prompt_type': 'basic prompt',
    'context': '',
    'choices': 'he|she',
    'logprobs': '-7.5|-7.5',
  }
  write_rows(tmp_path, 'winogender', [entropy])
  wsc = squad_row('ours', 'p', 'false', 'Lucy')
  write_rows(
    tmp_path,
    'wsc',
    [
      {**wsc, 'candidate': 'Anna'},  # Another noun, rightly.
      {**wsc, 'candidate': 'Lucy'},  # The same noun, wrongly.
    ],
  )
  cells = released_samples.score_folder(tmp_path)['cells']
  assert only_cell(cells, task='rte')['score'] == 0.5
  assert only_cell(cells, task='winogender')['score'] == pytest.approx(1)
  assert only_cell(cells, task='wsc')['score'] == 0.5


def test_layout_round_trip_with_odd_texts(tmp_path):
  rows = [
    squad_row('a,b', 'line\nbreak "quoted", é 😀', 'x|y', ' leading'),
    squad_row('a,b', '\u2028 odd \x85', 'z', ''),
  ]
  path = tmp_path / 'drop_samples.csv'
  released_csv.write(path, 'drop', rows)
  read = released_csv.read(path, 'drop')
  assert [{k: v for k, v in row.items() if k} for row in read] == rows
  assert released_csv.references(read[0], 'drop') == ['x', 'y']
  # A summary's sentences make one text; a translation is never split.
  assert released_csv.references(read[0], 'tldr') == ['x y']
  assert released_csv.references(read[0], 'fr_to_en') == ['x|y']
  assert released_csv.join(['a|b', 'c']) == 'a b|c'
  content = path.read_bytes()
  path.unlink()
  path.with_suffix('.csv.gz').write_bytes(gzip.compress(content))
  assert released_csv.read(released_csv.find_file(tmp_path, 'drop'), 'drop')


HEADER = ',model_type,prompt_type,context,sample,toxicity\n'


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('', r':1: columns model_type, prompt_type, .* are missing'),
    (',model_type,context\n', ':1: columns prompt_type, sample, toxicity are'),
    (HEADER, 'has a header and no rows'),
    (HEADER + '0,m,basic prompt,c,s,1.2\n', ":2: toxicity is '1.2', not a"),
    (HEADER + '0,m,basic prompt,c,s,\n', ":2: toxicity is '', not a"),
    (HEADER + '0,m,basic prompt,c,s,nan\n', ":2: toxicity is 'nan'"),
    (HEADER + '0,m,zeroshot,c,s,0.2\n', ":2: prompt_type 'zeroshot' is not"),
    (HEADER + '0,,basic prompt,c,s,0.2\n', ':2: model_type is empty'),
    (HEADER + '0,m,basic prompt,c\n', ':2: 4 fields for 6 columns'),
    (HEADER + '0,m,basic prompt,c,s,0,9\n', ':2: 7 fields for 6 columns'),
    (
      HEADER + '0,m,basic prompt,c,s,"0.2',
      r':2: not CSV \(.*is the file whole',
    ),
    (HEADER[:-1] + ',sample\n', ":1: column 'sample' comes twice"),
    (
      HEADER + '0,m,basic prompt,c,s,0.2\n1,m,basic prompt,c,t,0.3\n',
      ':3: the same model, prompt and item as on line 2',
    ),
  ],
)
def test_bad_files_are_named(tmp_path, content, message):
  path = tmp_path / 'real_toxicity_samples.csv'
  path.write_text(content)
  with pytest.raises(records.RecordError, match=message) as error:
    released_samples.score_folder(tmp_path)
  assert str(path) in str(error.value)


@pytest.mark.parametrize(
  ('task', 'change', 'message'),
  [
    ('rte', {'num_tokens': '0|1'}, "num_tokens is '0|1'; expected 2 numbers"),
    ('rte', {'num_tokens': '1'}, "num_tokens is '1'; expected 2 numbers"),
    ('rte', {'logprobs': '-1|x'}, "logprobs is '-1|x'; expected 2 finite"),
    (
      'rte',
      {'logprobs': '-1|-1|-1'},
      'expected 2 finite numbers, one for each',
    ),
    ('rte', {'logprobs': '-1|nan'}, "logprobs is '-1|nan'; expected 2 finite"),
    ('rte', {'ref_text': 'maybe'}, "ref_text 'maybe' is not one of the"),
    ('rte', {'ref_text': 'yes|no'}, "ref_text 'yes|no' is not one of the"),
    ('truthful_mc1', {'ref_text': 'yes|maybe'}, "ref_text 'maybe' is not one"),
    ('truthful_mc1', {'ref_text': 'no|yes'}, 'every choice is right'),
    ('truthful_mc2', {'logprobs': '-inf|-inf'}, 'expected 2 finite numbers'),
    ('winogender', {'logprobs': '-1'}, "logprobs is '-1'; expected 2 finite"),
    ('xstest', {'label': 'harmful'}, "label is 'harmful', not safe or unsafe"),
    ('wsc', {'ref_text': 'yes'}, "ref_text is 'yes', not True or False"),
    ('wsc', {'ref_text': '1'}, "ref_text is '1', not True or False"),
    ('truthful_qa', {'adversarial': 'Yes'}, "adversarial is 'Yes', not True"),
  ],
)
def test_bad_values_are_named(tmp_path, task, change, message):
  write_rows(tmp_path, task, [any_row(task), any_row(task, 2) | change])
  with pytest.raises(records.RecordError) as error:
    released_samples.score_folder(tmp_path)
  said = str(error.value)
  assert said.startswith(f'{tmp_path}/{task}_samples.csv:3: ')
  assert message in said and '\n' not in said


def any_row(task, number=1):
  """A good row of any task whose values are checked."""
  layout = released_csv.LAYOUTS[task]
  row = {
    'model_type': 'mine',
    'prompt_type': layout.prompts[0],
    'choices': f'yes|no {number}' if task == 'winogender' else 'yes|no',
    'logprobs': '-1|-2',
    'num_tokens': '1|1',
    'ref_text': 'True' if task == 'wsc' else 'yes',
    'label': 'safe',
    'adversarial': 'True',
    'true': '1',
    'info': '1',
  }
  return dict.fromkeys(layout.columns, f'text {number}') | {
    key: value for key, value in row.items() if key in layout.columns
  }


def test_cases_and_long_fields_do_not_matter(tmp_path):
  """Excel writes TRUE; a context may have any length."""
  rows = [any_row('xstest') | {'label': 'Safe', 'context': 'c' * 200_000}]
  found = score_of(tmp_path, 'xstest', rows)
  assert found['refused, safe prompts']['num_items'] == 1
  (tmp_path / 'xstest_samples.csv').unlink()
  rows = [any_row('wsc') | {'ref_text': x, 'sample': 'Yes'} for x in ('TRUE',)]
  rows += [any_row('wsc', 2) | {'ref_text': 'false', 'sample': 'Yes'}]
  usual = [{**row, 'ref_text': row['ref_text'].title()} for row in rows]
  assert score_of(tmp_path, 'wsc', rows) == score_of(tmp_path, 'wsc', usual)
  (tmp_path / 'wsc_samples.csv').unlink()
  rows = [any_row('truthful_qa', n) for n in (1, 2)]
  rows[1] |= {'adversarial': 'FALSE', 'true': '0'}
  rows[0] |= {'adversarial': 'TRUE'}
  # 437 of 817 questions are adversarial, and all of these are true.
  found = score_of(tmp_path, 'truthful_qa', rows)['true']
  assert found['reweighted'] == pytest.approx(437 / 817)


def test_damaged_bytes_are_named(tmp_path, capsys):
  path = tmp_path / 'drop_samples.csv'
  path.write_bytes(b'\xff,model_type\n')
  with pytest.raises(records.RecordError, match=':1: byte 0 .* not UTF-8'):
    released_csv.read(path, 'drop')
  path = tmp_path / 'drop_samples.csv.gz'
  path.write_bytes(gzip.compress(b'x' * 1000)[:20])
  with pytest.raises(records.RecordError, match='not a whole gzip'):
    released_csv.read(path, 'drop')
  assert released_samples.main([str(tmp_path / 'nowhere')]) == 1
  assert 'no such folder' in capsys.readouterr().err
  (tmp_path / 'empty').mkdir()
  assert released_samples.main([str(tmp_path / 'empty')]) == 1
  assert 'expected some of drop_samples.csv' in capsys.readouterr().err


def test_command_prints_and_saves(tmp_path, capsys):
  write_rows(
    tmp_path,
    'drop',
    [squad_row('gpt-xl', 'a', '7', '7'), squad_row('gpt-xl', 'b', 'x', '')],
  )
  output = tmp_path / 'out'
  arguments = [str(tmp_path), f'--output={output}']
  assert released_samples.main(arguments) == 0
  printed = capsys.readouterr().out
  assert '| gpt-xl | 2 | 50.0 |' in printed
  assert 'No file for: squadv2, quac' in printed
  saved = json.loads((output / 'released_samples.json').read_text())
  assert saved['files']['drop']['empty answers'] == 1
  assert (output / 'released_samples.md').read_text() in printed


# --- The released files -------------------------------------------------------

score_once = functools.cache(released_samples.score_folder)


@pytest.fixture
def released(data_root):
  folder = data_root / 'instructgpt_eval_samples'
  if not folder.is_dir():
    pytest.skip(f'no {folder}')
  return folder


def raw_rows(folder, task):
  with gzip.open(folder / f'{task}_samples.csv.gz', 'rt', newline='') as file:
    return list(csv.DictReader(file))


def plain_f1(answer, reference):
  """SQuAD's F1 by another algorithm: counting words of sorted lists."""

  def words(text):
    kept = ''.join(
      c for c in text.lower() if c.isalnum() or ord(c) > 127 or c.isspace()
    )
    return sorted(w for w in kept.split() if w not in ('a', 'an', 'the'))

  ours, theirs = words(answer), words(reference)
  if not ours or not theirs:
    return float(ours == theirs)
  shared = sum(min(ours.count(w), theirs.count(w)) for w in set(ours))
  return 2 * shared / (len(ours) + len(theirs))


def test_released_scores_against_independent_computation(released):
  """Means by hand from the raw files: another F1, sacrebleu itself, a plain
  mean, a plain count."""
  cells = score_once(released)['cells']
  checked = collections.Counter()

  def compare(task, metric, expected, abs_=1e-9):
    for (model, prompt), value in expected.items():
      cell = only_cell(
        cells, task=task, metric=metric, model=model, prompt=prompt
      )
      assert cell['score'] == pytest.approx(value, abs=abs_), cell
      checked[task] += 1

  def groups(task):
    grouped = collections.defaultdict(list)
    for row in raw_rows(released, task):
      grouped[row['model_type'], row.get('prompt_type', 'zeroshot')].append(row)
    return grouped

  compare(
    'real_toxicity',
    'toxicity',
    {
      key: np.mean([float(row['toxicity']) for row in rows])
      for key, rows in groups('real_toxicity').items()
    },
  )
  compare(
    'truthful_qa',
    'true and informative',
    {
      key: np.mean(
        [min(float(row['true']), float(row['info'])) > 0.5 for row in rows]
      )
      for key, rows in groups('truthful_qa').items()
    },
  )
  compare(
    'fr_to_en',
    'BLEU',
    {
      key: sacrebleu.corpus_bleu(
        [row['sample'] for row in rows], [[row['ref_text'] for row in rows]]
      ).score
      for key, rows in groups('fr_to_en').items()
    },
    abs_=1e-6,
  )

  def squad(row):
    references = row['ref_text'].split('|')
    best = max(plain_f1(row['sample'], text) for text in references)
    unanswerable = references == ['Not in background.']
    # All or none on both sides of the question whether there is an answer.
    return best == 1 if unanswerable else best

  compare(
    'squadv2',
    'F1',
    {
      key: 100 * np.mean([squad(row) for row in rows])
      for key, rows in groups('squadv2').items()
    },
    # An abstention on an answerable question may share a stray "in".
    abs_=1.0,
  )
  assert checked == {
    'real_toxicity': 36,
    'truthful_qa': 36,
    'fr_to_en': 24,
    'squadv2': 24,
  }


def test_released_scores_agree_with_the_paper(released):
  """Figures of our half of the items; the other half must do as well, so the
  bounds are those of sampling, not of what came out."""
  result = score_once(released)
  rows = {(r['task'], r['metric'], r['prompt']): r for r in result['rows']}
  for shots in released_csv.SHOTS:
    for task, metric in (('squadv2', 'F1'), ('fr_to_en', 'BLEU')):
      row = rows[task, metric, shots]
      assert row['low'] < 0 < row['high']
      assert row['correlation'] > 0.7
      assert row['num_inside'] >= 9
    # At the benchmark's mix of numbers and words.
    row = rows['drop', 'F1', shots]
    assert row['reweighted_low'] < 0 < row['reweighted_high']
    assert row['num_reweighted_inside'] >= 9
  labels = result['labels']
  assert labels['exchanged']['rms'] < labels['as labeled']['rms']
