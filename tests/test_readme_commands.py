"""Every shell command of the READMEs is run as printed, or listed with why not.

A block of commands runs in a copy of the repository, in order. Only stand-ins
for the reader's own files and names are replaced, by what `STAND_INS` and the
rules say. A command that no rule knows is an error: it is neither run nor
listed.
"""

import dataclasses
import functools
import glob
import gzip
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from instruct_jax import model_fns
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.models import hf
from instruct_jax.models.config import TransformerConfig
from tests import published, tiny

ROOT = pathlib.Path(__file__).parents[1]
# experiments/README.md is a log: what it says was run, on another day.
READMES = sorted(
  path
  for path in {ROOT / 'README.md', *ROOT.glob('*/**/README.md')}
  if path.parent.name != 'experiments' and '.' not in path.parent.name
)

# Files and names that are the reader's, and what stands for them here.
STAND_INS = {
  'hf:gpt2': 'hf:{inputs}/gpt2',
  'hf:NAME': 'hf:{inputs}/gpt2',
  'train.jsonl.gz': '{inputs}/train.jsonl.gz',
  'DOCUMENTS.jsonl': '{inputs}/documents.jsonl',
  'HELD_OUT.jsonl': '{inputs}/documents.jsonl',
  'PROMPTS.jsonl': '{inputs}/prompts.jsonl',
  'FILE...': '{inputs}/prompts.jsonl {inputs}/documents.jsonl',
  'drop_dataset_dev.json': '{inputs}/drop.json',
  'RUN': '{run}',
  '/tmp/two': '{inputs}/two',
  'localhost:9911': 'localhost:{port}',
}


@dataclasses.dataclass
class Rule:
  """How one kind of command is run.

  Attributes:
    pattern: of the commands, from their start.
    how: 'run' to the end; 'stop' it, by SIGTERM, once `sign` is there, because
      it would take long; 'serve' until its output matches `sign`; 'skip'.
    why: of 'skip'.
    sign: see `how`; of 'stop' a file in the checkout.
    writes: patterns of files that must be there in the end.
    stand_ins: parts of the command, and what stands for them; first of all.
    stdin: what it reads.
    is_quick: whether it belongs to the tests that always run.
    data: folder of real data that it reads.
    after: a command that comes first, in another block of the page.
  """

  pattern: str
  how: str = 'run'
  why: str = ''
  sign: str = ''
  writes: tuple[str, ...] = ()
  stand_ins: dict[str, str] = dataclasses.field(default_factory=dict)
  stdin: str = ''
  is_quick: bool = False
  data: str = ''
  after: str = ''


MAIN = 'python -m instruct_jax.main --config=configs/'
RULES = [
  # What cannot be run here.
  Rule('.*python -m pytest', 'skip', 'the tests themselves'),
  Rule('gcloud|bash tpu_setup.sh', 'skip', 'a TPU slice and a bucket'),
  Rule(
    'NAME=ppo|export PROJECT|bash .*/launch/|sbatch',
    'skip',
    'clusters; tests/test_infra_launch.py has stand-ins for them',
  ),
  Rule('.*lm_eval_adapter|pip install -e', 'skip', 'torch and the network'),
  Rule(f'.*{MAIN}plan.py|for plan in', 'skip', 'the TPU compiler'),
  Rule('WANDB_MODE=', 'skip', 'extras; tests/test_infra_logger.py does it'),
  Rule('for seed in .*tldr_1b', 'skip', 'Pythia 1B, a GPU and their data'),
  Rule('vllm serve', 'skip', 'a server that is none of the requirements'),
  Rule('python -m instruct_jax.export .*push_to', 'skip', 'tests/test_hub.py'),
  Rule('xprof', 'skip', 'a program that is none of the requirements'),
  # `pip` stands for itself: it looks whether the files are there.
  Rule('pip install [^&]*$|export |cp |\\$EDITOR', is_quick=True),
  # Data.
  Rule('python -m instruct_jax.data FILE', is_quick=True),
  Rule('python -m instruct_jax.data formats', is_quick=True),
  Rule(
    'python -m instruct_jax.data.convert hh',
    writes=('DATA/*_train.jsonl',),
    is_quick=True,
  ),
  Rule(
    'python -m instruct_jax.data.tokenizer',
    writes=('TOKENIZER/tokenizer.json',),
    is_quick=True,
  ),
  Rule(
    'python -m instruct_jax.data.hygiene',
    stand_ins={
      '--output=DIR': '--output=cleaned',
      '--tokenizer=DIR': '--tokenizer={inputs}/gpt2',
    },
    writes=('cleaned/hygiene.json',),
    is_quick=True,
  ),
  # Pipelines and stages.
  Rule(
    f'pip .* && {MAIN}ppo_ptx.py$',
    'stop',
    sign='runs/ppo_ptx_miniature/pretrain/metrics.jsonl',
    stand_ins={'pip install -r requirements.txt && ': ''},
  ),
  Rule(
    f'{MAIN}ppo_ptx.py:smoke .*my_ppo',
    writes=('runs/*/ppo_ptx/ema/model.json',),
  ),
  Rule(f'{MAIN}rloo.py:smoke', writes=('runs/*/report.md',)),
  Rule(
    f'{MAIN}ppo_ptx.py:e2e',
    'stop',
    sign='runs/*e2e*/pretrain/metrics.jsonl',
    stand_ins={'DIR': '{data}'},
    data='.',
  ),
  Rule(
    f'{MAIN}reward.py:hh',
    'stop',
    sign='runs/*hh*/*/metrics.jsonl',
    stand_ins={'DIR': '{data}'},
    data='.',
  ),
  Rule(
    f'{MAIN}center_reward.py',
    stand_ins={
      'hf:NAME': 'hf:{inputs}/classifier',
      'TOKENIZER': '{inputs}/gpt2',
      'DATA': '{run}/data',
    },
    writes=('CENTRED/model/model.json',),
  ),
  Rule(
    f'{MAIN}recipe.py',
    stand_ins={
      'recipe.py': 'recipe.py:smoke',
      'hf:HuggingFaceTB/SmolLM2-135M-Instruct': '{inputs}/gpt2',
      'hh:DIR': 'hh:train.jsonl.gz',
      '--workdir=RUN': '--workdir=recipe',
      'BOOKS': '{inputs}/documents.jsonl',
    },
    writes=('recipe/report.md', 'recipe/export/ppo/model.safetensors'),
  ),
  Rule(
    f'{MAIN}sentiment.py',
    stand_ins={
      # Bytes that are no text come back longer.
      'sentiment.py': 'sentiment.py:smoke '
      '--config.stages.reward.row_length=120',
      'hf:HuggingFaceTB/SmolLM2-135M-Instruct': '{inputs}/gpt2',
      'BOOKS': '{inputs}/openings.jsonl',
      'SST2/train.tsv': '{inputs}/labels.tsv',
      'SST2/dev.tsv': '{inputs}/labels.tsv',
    },
    writes=('SENTIMENT/report.md',),
  ),
  Rule(f'{MAIN}sft.py:gpt2', writes=('SFT/model/model.json',)),
  Rule(f'{MAIN}reward.py:gpt2', writes=('REWARD/model/model.json',)),
  Rule(f'{MAIN}ppo_ptx.py:gpt2', 'stop', sign='PPO/metrics.jsonl'),
  Rule(
    f'{MAIN}reward.py --config.data.comparisons=OUT',
    stand_ins={
      '=OUT': '={run}/compare',
      'SFT_MODEL': '{run}/select/model',
      # Sizes of the small model, not of 6B.
      'DIR': '{run}/data/tokenizer --config.row_length=64 '
      '--config.batch_size=8 --config.num_microbatches=2',
    },
    writes=('runs/reward*/model/model.json',),
  ),
  Rule('for i in 0 1; do XLA_FLAGS=', writes=('{inputs}/two/report.md',)),
  Rule(
    f'{MAIN}tax.py',
    'stop',
    sign='runs/tax*/**/metrics.jsonl',
    stand_ins={
      'hellaswag=FILE': 'hellaswag={inputs}/hellaswag.jsonl',
      'drop=FILE': 'drop={inputs}/drop.json',
    },
  ),
  Rule(f'{MAIN}speed.py', writes=('runs/*/speed.md',)),
  Rule(
    f'{MAIN}study.py',
    stand_ins={'11,12,13,14,15': '0 --config.smoke=True'},
    writes=('STUDY/study.md',),
  ),
  # Evaluation.
  Rule(
    'python -m instruct_jax.evals.released_samples DIR',
    stand_ins={'DIR': '{data}'},
    data='instructgpt_eval_samples',
  ),
  Rule(
    'python -m instruct_jax.evals.benchmarks.text_judges',
    stand_ins={'DIR': '{data}'},
    data='.',
  ),
  Rule(f'{MAIN}nlp_suite.py', writes=('runs/*suite*/suite.md',)),
  Rule(
    f'{MAIN}evaluate.py',
    # In bytes, as the small gpt2 here has them, no prompt of the run fits.
    stand_ins={'hf:gpt2': '{run}/pretrain/model'},
    writes=('runs/*/report.md',),
  ),
  Rule(
    f'{MAIN}reward_bench.py',
    stand_ins={
      'rewardbench:FILE': 'rewardbench:{inputs}/rewardbench.jsonl',
      'hf:NAME': 'hf:{inputs}/classifier',
    },
    writes=('runs/reward_bench*/reward_bench.md',),
  ),
  Rule(
    'python -m instruct_jax.evals.tax',
    stand_ins={'DIR': 'figures'},
    writes=('figures/*',),
  ),
  Rule(
    'python -m instruct_jax.export',
    stand_ins={
      '--checkpoint=...': '--checkpoint=RUN/ppo/policy',
      '--tokenizer=...': '--tokenizer=RUN/data/tokenizer',
      '--output=DIR': '--output=exported',
    },
    writes=('exported/model.safetensors',),
  ),
  Rule('python -m instruct_jax.chat', stdin='write a poem\n'),
  # The labeling site.
  Rule(
    'python -m instruct_jax.labeling .*--demo',
    'serve',
    sign='http://.*\n(.*\n)*.*http://',
    is_quick=True,
  ),
  Rule(
    'python -m instruct_jax.labeling .*--export=OUT',
    writes=('OUT/statistics.json',),
    after='python -m instruct_jax.labeling --config=configs/labeling.py --demo',
  ),
]


# --- The commands -------------------------------------------------------------


def statements(text):
  """Whole shell statements, in order: as bash reads them."""
  found, lines = [], []
  for line in text.strip('\n').splitlines():
    lines.append(line)
    whole = '\n'.join(lines)
    if line.endswith('\\'):
      continue
    parsed = subprocess.run(['bash', '-n', '-c', whole], capture_output=True)
    if parsed.returncode == 0:
      found.append(whole)
      lines = []
  assert not lines, f'bash cannot read {lines}'
  return found


def blocks(path):
  """Lists of statements: of each block, and of each command within a line."""
  text = path.read_text()
  pattern = r'^```(\w*)\n(.*?)^```$'
  for kind, content in re.findall(pattern, text, re.S | re.M):
    if kind in ('bash', 'sh', 'shell'):
      yield statements(content)
  rest = re.sub(pattern, '', text, flags=re.S | re.M)
  for code in re.findall(r'`([^`]+)`', rest):
    code = ' '.join(code.split())
    if re.match(r'(python -m|pip install|bash|xprof|gcloud) ', code):
      yield [code]


def flat(statement):
  """On one line, for the patterns."""
  return ' '.join(statement.replace('\\\n', ' ').split())


def rule_of(statement):
  found = [rule for rule in RULES if re.match(rule.pattern, flat(statement))]
  assert found, f'neither run nor listed: {statement}'
  return found[0]


def marks(block):
  """Slow unless each of its commands is quick."""
  rules = [rule_of(statement) for statement in block]
  if all(rule.is_quick or rule.how == 'skip' for rule in rules):
    return ()
  return (pytest.mark.slow,)


BLOCKS = [
  pytest.param(
    block,
    id=f'{path.relative_to(ROOT)}: {flat(block[0])[:60]}',
    marks=marks(block),
  )
  for path in READMES
  for block in blocks(path)
]


def test_all_rules_are_for_something():
  found = [s for path in READMES for block in blocks(path) for s in block]
  used = [rule_of(statement).pattern for statement in found]
  unused = [rule.pattern for rule in RULES if rule.pattern not in used]
  assert not unused, f'rules for commands that no README has: {unused}'
  assert all(rule.why for rule in RULES if rule.how == 'skip')


# --- Running them -------------------------------------------------------------

PIP = """#!/bin/sh
# Looks whether the files of requirements are there; installs nothing.
while [ $# -gt 0 ]; do
  if [ "$1" = -r ]; then shift; test -s "$1" || exit 1; fi
  shift
done
"""


@pytest.fixture(scope='module')
def inputs(tmp_path_factory, quick_compile):
  """What a reader would have: data, a published model, a reward model."""
  folder = tmp_path_factory.mktemp('inputs')
  for name, kind in (('gpt2', 'policy'), ('classifier', 'scalar')):
    published.save_byte_tokenizer(folder / name, template=published.TEMPLATE)
    tokenizer = tokenizer_lib.Tokenizer.load(folder / name)
    config = TransformerConfig(
      vocab_size=tokenizer.vocab_size,
      context_length=1024,
      num_layers=1,
      width=16,
      num_heads=2,
      head_dim=8,
      mlp_dim=32,
      vocab_multiple=1,
    )
    model = model_fns.init(kind, config, tiny.one_device(), jax.random.key(0))
    hf.save(folder / name, config, model.params)

  def write(name, rows):
    text = ''.join(json.dumps(row) + '\n' for row in rows)
    opened = gzip.open if name.endswith('.gz') else open
    with opened(folder / name, 'wt') as file:
      file.write(text)

  write(
    'train.jsonl.gz',
    [
      {
        'chosen': f'\n\nHuman: Name {i}?\n\nAssistant: It is {i}.',
        'rejected': f'\n\nHuman: Name {i}?\n\nAssistant: No.',
      }
      for i in range(1000)
    ],
  )
  texts = [f'The number {i} comes after {i - 1}. ' * 40 for i in range(1, 90)]
  write('documents.jsonl', [{'text': text} for text in texts])
  write(
    'rewardbench.jsonl',
    [
      {
        'prompt': f'{i}?',
        'chosen': f'{i}.',
        'rejected': 'a',
        'subset': 'hep-go',
      }
      for i in range(9)
    ],
  )
  write('openings.jsonl', [{'text': f'{i:05} foxes.'} for i in range(90)])
  labels = ['a lovely film\t1', 'a stupid film\t0'] * 5
  (folder / 'labels.tsv').write_text('\n'.join(labels))
  prompts = [
    {'id': str(i), 'text': f'write about {i}', 'user': f'u{i % 20}'}
    for i in range(60)
  ]
  write('prompts.jsonl', prompts)
  drop = [
    {'context': f'{"fox " * i}left.', 'question': 'who?', 'answer': f'fox {i}'}
    for i in range(9)
  ]
  (folder / 'drop.json').write_text(json.dumps(drop))
  endings = ['he left.', 'she runs.', 'it rains.', 'they sit.']
  choices = {'activity_label': 'Fox', 'endings': endings}
  write(
    'hellaswag.jsonl',
    [
      choices | {'ctx': f'fox {i}', 'label': i % 4, 'ind': i} for i in range(40)
    ],
  )
  return folder


def copy_repository(folder):
  """A checkout, with `python` and `pip` in a folder for the path."""
  names = subprocess.run(
    ['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True
  )
  for name in names.stdout.splitlines():
    if (ROOT / name).is_file():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      (folder / name).write_bytes((ROOT / name).read_bytes())
  (folder / 'bin').mkdir()
  programs = {'python': f'#!/bin/sh\nexec {sys.executable} "$@"\n', 'pip': PIP}
  for name, text in programs.items():
    (folder / 'bin' / name).write_text(text)
    (folder / 'bin' / name).chmod(0o755)
  return folder


@pytest.fixture
def checkout(tmp_path):
  """A copy of the repository for one block of commands."""
  return copy_repository(tmp_path)


def shell(checkout, text, **more):
  paths = [path for path in sys.path if path != str(ROOT)]
  return subprocess.Popen(
    ['bash', '-c', text],
    cwd=checkout,
    env={
      **os.environ,
      'PATH': f'{checkout / "bin"}:{os.environ["PATH"]}',
      'PYTHONPATH': os.pathsep.join(paths),
      'HOME': str(checkout.parent),  # Where compiled programs are kept.
      'EDITOR': 'true',
      'XLA_FLAGS': '',
      'JAX_PLATFORMS': 'cpu',
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    **more,
  )


@pytest.fixture(scope='module')
def finished_run(tmp_path_factory):
  """The folder of a run that is over, for commands that look at one."""
  checkout = copy_repository(tmp_path_factory.mktemp('finished'))
  command = f'{MAIN}ppo_ptx.py:smoke --workdir=finished'
  process = shell(checkout, command)
  output, _ = process.communicate(timeout=1800)
  assert process.returncode == 0, output[-3000:]
  # As an export of the labeling site has them.
  (checkout / 'finished' / 'compare' / 'demonstrations.jsonl').write_bytes(
    (checkout / 'finished/data/demonstrations_train.jsonl').read_bytes()
  )
  return checkout / 'finished'


def wait_for(process, is_there, seconds=1200):
  deadline = time.monotonic() + seconds
  while not is_there():
    assert process.poll() is None, process.stdout.read()[-3000:]
    assert time.monotonic() < deadline
    time.sleep(0.2)


@pytest.mark.parametrize('block', BLOCKS)
def test_command(block, checkout, inputs, request):
  exports = [s for s in block if s.startswith('export ')]
  for statement in block:
    rule = rule_of(statement)
    if rule.how == 'skip':
      continue
    text, names = statement, {'inputs': inputs, 'port': free_port()}
    for found, stand_in in {
      **rule.stand_ins,
      **STAND_INS,
      **rule.stand_ins,
    }.items():
      if re.search(rf'(?<!\w){re.escape(found)}(?!\w)', text) or found in (
        rule.stand_ins
      ):
        text = text.replace(found, stand_in)
    if rule.after:
      run(checkout, rule_of(rule.after), rule.after)
    if '{run}' in text:
      names['run'] = request.getfixturevalue('finished_run')
    if rule.data:
      names['data'] = request.getfixturevalue('data_root') / rule.data
    for name, value in names.items():
      text = text.replace(f'{{{name}}}', str(value))
    run(checkout, rule, '\n'.join([*exports, text]))
    for pattern in rule.writes:
      pattern = pattern.replace('{inputs}', str(inputs))
      assert glob.glob(str(checkout / pattern)), f'{text}: no {pattern}'


def run(checkout, rule, text):
  """One statement, its stand-ins replaced; it must end as its rule says."""
  if rule.how == 'run':
    process = shell(checkout, text, stdin=subprocess.PIPE)
    output, _ = process.communicate(rule.stdin, timeout=3600)
    assert process.returncode == 0, f'{text}\n{output[-4000:]}'
    assert 'Traceback' not in output, f'{text}\n{output[-4000:]}'
    return
  process = shell(checkout, f'exec {text}', stdin=subprocess.DEVNULL)
  try:
    if rule.how == 'stop':
      sign = str(checkout / rule.sign)
      is_there = functools.partial(glob.glob, sign, recursive=True)
      wait_for(process, is_there)
      process.send_signal(signal.SIGTERM)
      output, _ = process.communicate(timeout=600)
      assert process.returncode == 75, f'{text}\n{output[-4000:]}'
      return
    output = ''
    deadline = time.monotonic() + 120
    while not re.search(rule.sign, output):
      assert process.poll() is None and time.monotonic() < deadline, output
      output += process.stdout.readline()
    # Not SIGINT, which the tests, and so the command, may have been told to
    # ignore: a script's background does that.
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
  finally:
    process.kill()
    process.communicate()


def free_port():
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    return probe.getsockname()[1]
