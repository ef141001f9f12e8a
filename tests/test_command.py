"""Every program of the package: one line for what its user can mend."""

import pathlib
import re

import pytest

from instruct_jax import command
from instruct_jax.data import tokenizer as tokenizer_lib
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = '--config=configs/labeling.py'

# Module -> command lines, each with a path, a value or a file that is not as it
# should be. NOWHERE does not exist, FILE is no folder and holds no records,
# TOKENS is a tokenizer and MODEL a policy.
WRONG = {
  'export': [
    (),
    ('--checkpoint=MODEL', '--tokenizer=TOKENS', '--output=OUT', '--nope'),
    ('--checkpoint=NOWHERE', '--tokenizer=TOKENS', '--output=OUT'),
    ('--checkpoint=', '--tokenizer=TOKENS', '--output=OUT'),
    ('--checkpoint=MODEL', '--tokenizer=TOKENS', '--output='),
    ('--checkpoint=MODEL', '--tokenizer=NOWHERE', '--output=OUT'),
    ('--checkpoint=MODEL', '--tokenizer=TOKENS', '--output=FILE'),
    ('--checkpoint=MODEL', '--tokenizer=TOKENS', '--output=TOKENS'),
    ('--checkpoint=MODEL', '--tokenizer=TOKENS', '--output=/proc/nowhere'),
    ('--checkpoint=TOKENS', '--tokenizer=TOKENS', '--output=OUT'),
    (
      *('--checkpoint=MODEL', '--tokenizer=TOKENS', '--output=OUT'),
      '--fold_shift',
    ),
  ],
  'chat': [
    (),
    ('--checkpoint=', '--tokenizer=TOKENS'),
    ('--checkpoint=NOWHERE', '--tokenizer=TOKENS'),
    ('--checkpoint=MODEL',),
    ('--checkpoint=MODEL', '--tokenizer=FILE'),
    ('--checkpoint=MODEL', '--tokenizer=TOKENS', '--max_tokens=0'),
    *(
      ('--checkpoint=MODEL', '--tokenizer=TOKENS', f'--temperature={number}')
      for number in ('hot', 'nan', 'inf', '-1')
    ),
    (
      *('--checkpoint=MODEL', '--tokenizer=TOKENS'),
      '--transcript=NOWHERE/x.jsonl',
    ),
  ],
  'data': [(), ('',), ('NOWHERE',), ('FILE',), ('FILE', '--limit=x')],
  'data.convert': [
    (),
    ('hh', 'NOWHERE', '--output=OUT'),
    ('nope', 'FILE', '--output=OUT'),
    ('documents', 'NOWHERE', '--output=OUT'),
    ('documents', 'tfds:nope/train', '--output=OUT'),
    ('hh', 'FILE', '--output=OUT', '--valid=3'),
  ],
  'data.hygiene': [
    ('NOWHERE', '--output=OUT', '--tokenizer=TOKENS'),
    ('PROMPTS', '--output=OUT', '--tokenizer=NOWHERE'),
    ('PROMPTS', '--output=/proc/nowhere', '--tokenizer=TOKENS'),
  ],
  'data.tokenizer': [
    ('NOWHERE', '--output=OUT'),
    ('TOKENS', '--output=/proc/nowhere'),
    ('TOKENS', '--output=OUT', '--template=x'),
  ],
  'evals.released_samples': [(), ('NOWHERE',), ('TOKENS',)],
  'evals.tax': [
    ('a', '--output=OUT'),
    ('a=NOWHERE', '--output=OUT'),
    ('a=TOKENS', '--output=OUT'),
  ],
  'evals.benchmarks.text_judges': [(), ('--data=NOWHERE',)],
  'labeling': [
    (),
    ('--config=configs/nowhere.py',),
    (CONFIG, '--config.nope=1'),
    (CONFIG, '--workdir=SITE', '--nope'),
    (CONFIG, '--workdir=SITE', 'word'),
    (CONFIG, '--workdir=/proc/nowhere'),
    (CONFIG, '--workdir=SITE', '--import_file=NOWHERE'),
    (CONFIG, '--workdir=SITE', '--import_file=FILE', '--format=argilla'),
    (CONFIG, '--workdir=SITE', '--export=OUT', '--format=argilla'),
    (CONFIG, '--workdir=SITE', '--export=OUT', '--format=nope'),
    (CONFIG, '--workdir=SITE', '--active=NOWHERE'),
    (CONFIG, '--workdir=SITE', '--backup=/proc/nowhere.gz'),
    (CONFIG, '--workdir=SITE', '--export=/proc/nowhere'),
    (CONFIG, '--workdir=SITE', '--config.database=nope://x'),
    *(
      (CONFIG, '--workdir=SITE', f'--{name}=')
      for name in ('import_file', 'export', 'backup', 'restore', 'active')
    ),
    (CONFIG, '--workdir=SITE', '--import_file=PROMPTS', '--batch='),
    (CONFIG, '--workdir='),
  ],
  'infra.device_check': [(), ('--backend=tpu', '--wait=x')],
  'main': [
    (),
    ('--config=configs/ppo_ptx.py:smoke', 'word'),
    ('--config=configs/ppo_ptx.py:smoke', '--nope'),
    ('--config=configs/ppo_ptx.py:smoke', '--workdir='),
  ],
}


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  folder = tmp_path_factory.mktemp('command')
  tokenizer = tokenizer_lib.train_bpe(['a fox said that he left'] * 3, 270)
  tokenizer.save(folder / 'tokens')
  tiny.save_model(folder, 'model', 'policy', tokenizer, 0)
  (folder / 'file').write_text('no records\n')
  (folder / 'prompts').write_text('{"id": "p", "text": "a fox"}\n')
  return {
    'NOWHERE': folder / 'nowhere',
    'FILE': folder / 'file',
    'PROMPTS': folder / 'prompts',
    'TOKENS': folder / 'tokens',
    'MODEL': folder / 'model',
    'SITE': folder / 'site',
  }


@pytest.mark.parametrize(
  ('module', 'arguments'),
  [
    (module, arguments)
    for module, several in WRONG.items()
    for arguments in several
  ],
  ids=lambda x: x if isinstance(x, str) else ' '.join(x)[:60],
)
def test_a_mistake_is_one_line(start, places, tmp_path, module, arguments):
  if module == 'labeling':
    pytest.importorskip('sqlalchemy')
    pytest.importorskip('uvicorn')
  places = {**places, 'OUT': tmp_path / 'out'}
  for name, place in places.items():
    arguments = [argument.replace(name, str(place)) for argument in arguments]
  ended = start(f'instruct_jax.{module}', *arguments)
  assert ended.returncode in (1, 2), ended.stderr
  (line,) = ended.stderr.splitlines()
  assert len(line) > 20
  assert not places['OUT'].exists()


@pytest.mark.parametrize(
  ('given', 'expected'),
  [
    ('~', '/home/ann'),
    ('--workdir=~', '--workdir=/home/ann'),
    ('Question: {prompt} Answer:~', None),
    ('~/x', '/home/ann/x'),
    ('sft=~/a,ppo=~/b#c', 'sft=/home/ann/a,ppo=/home/ann/b#c'),
    ('--workdir=~/x', '--workdir=/home/ann/x'),
    ('datasets:~/x', 'datasets:/home/ann/x'),
    (['~/a', 3], ['/home/ann/a', 3]),
    (('a~/b', 'gs://~/x', 'runs/~/x', '~5'), None),
    (7, None),
  ],
)
def test_a_tilde_is_the_home_folder(monkeypatch, given, expected):
  monkeypatch.setenv('HOME', '/home/ann')
  assert command.with_home(given) == (given if expected is None else expected)


def test_a_tilde_is_the_home_folder_in_arguments(monkeypatch):
  monkeypatch.setenv('HOME', '/home/ann')
  parser = command.Parser()
  parser.add_argument('--output', required=True)
  parser.add_argument('--compare', action='append', default=[])
  found = parser.parse_args(['--output=~/x', '--compare=~/y'])
  assert vars(found) == {'output': '/home/ann/x', 'compare': ['/home/ann/y']}


def test_a_tilde_is_the_home_folder_in_flags_and_configs(start, tmp_path):
  pytest.importorskip('sqlalchemy')
  pytest.importorskip('uvicorn')
  home = {'HOME': str(tmp_path)}
  text = (ROOT / 'configs/labeling.py').read_text()
  before, after = text.split('config.default_workdir = ')
  line, after = after.split('\n', 1)
  (tmp_path / 'own.py').write_text(
    f"{before}config.default_workdir = '~/b'\n{after}"
  )
  for flags in ((CONFIG, '--workdir=~/a'), ('--config=~/own.py',)):
    ended = start('instruct_jax.labeling', *flags, '--admin_link', env=home)
    assert ended.returncode == 0, ended.stderr
  assert (tmp_path / 'a/labeling.sqlite').exists()
  assert (tmp_path / 'b/labeling.sqlite').exists()


def test_every_program_is_tried():
  programs = {
    path.relative_to(ROOT / 'instruct_jax')
    for path in (ROOT / 'instruct_jax').rglob('*.py')
    if re.search(r"^if __name__ == '__main__':\n  \S", path.read_text(), re.M)
  }
  names = {
    '.'.join(path.with_suffix('').parts).removesuffix('.__main__')
    for path in programs
  }
  # The first needs what the tests do not install, and its arguments are read by
  # the same parser; `jobs/speed.py` starts the second and no user does.
  assert names - {'lm_eval_adapter', 'jobs.speed_torch'} == set(WRONG)


def test_a_missing_extra_is_one_line(start):
  try:
    import lm_eval  # noqa: F401

    pytest.skip('the extra is installed')
  except ModuleNotFoundError:
    ended = start('instruct_jax.lm_eval_adapter', '--help')
  assert ended.returncode == 1
  (line,) = ended.stderr.splitlines()
  assert "pip install -e '.[lm-eval]'" in line


def test_a_traceback_may_be_asked_for(start, places):
  ended = start(
    'instruct_jax.evals.tax',
    f'a={places["NOWHERE"]}',
    '--output=x',
    env={'INSTRUCT_JAX_TRACEBACK': '1'},
  )
  assert ended.returncode == 1 and 'Traceback' in ended.stderr
