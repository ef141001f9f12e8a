"""Every advice that an error gives about files and runs is followed here.

From the command line, on real stages: a small pretraining run, and the smoke
pipeline up to its SFT model.
"""

import json
import pathlib
import re
import shutil

import pytest
from etils import epath

from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import metrics
from tests import starts
from tests.fake_server import Fault, serve
from tests.test_keys import messages
from tests.tiny_run import MAIN, NUM_STEPS

ROOT = pathlib.Path(__file__).parents[1]
# Checkpoints and lines that come often, so that there is something to damage.
OFTEN = (
  *('--config.log_every=1', '--config.checkpoint_every=1'),
  '--config.num_steps=24',
)
MODEL = 'model/model.json'

# Words around an advice in the source -> the test that does what it says.
FOLLOWED = {
  'Bring one back from a copy, or delete': 'test_no_readable_checkpoint',
  'copy it again, or name another': 'test_a_damaged_model_is_made_again',
  'makes it again; or': 'test_a_damaged_model_is_made_again',
  'Make room, or make the directory': 'test_a_disk_that_was_full',
  'make its place writable again': 'test_a_disk_that_was_full_for_the_model',
  'Use the config it was made with': 'test_a_checkpoint_of_another_shape',
  'and there is no checkpoint in': 'test_lost_checkpoints',
  'continues from the last checkpoint that': 'test_a_moved_work_directory',
  'again with another config, delete': 'test_a_run_that_met_only_nan',
  'It holds only times: delete it': 'test_a_damaged_file_of_times',
  'and the checkpoints are past it': 'test_an_epoch_that_is_gone',
  'the same command resumes': 'test_a_service_that_did_not_answer',
  'delete the file to restart this task': 'test_a_damaged_journal',
  'stop it, or choose another work directory': 'tests/test_infra_run.py',
  'Go back to these values, choose another': 'tests/test_resume.py',
  'Restore them, continue with the new ones': 'tests/test_resume.py',
  'though': 'tests/test_resume.py',
  'put the former one back': 'tests/test_lora.py',
  'make room, or give a --workdir elsewhere': 'tests/test_recipe.py',
  'The same command goes on from where': 'tests/test_study.py',
  'and the services show the rest as a new run': 'tests/test_infra_logger.py',
}
# Advice to get something elsewhere again, which no test can do for the user;
# and about a version of this package that is no more.
NOT_FOLLOWED = (
  'copy the file again',
  'fetch it again',
  'and save it again',
  'write it again with flatten_indices',
  'by a version that kept no lines of metrics',
  'runs in a single process, and there are',  # tests/test_multihost.py
)


def advice(text):
  """Whether a message says what to do about files or a run."""
  return re.search(
    r'[Dd]elete |[Bb]ring |Restore |same command|[Mm]ake room|\bagain\b',
    text,
  )


def test_every_advice_is_followed():
  tests = pathlib.Path(__file__).read_text()
  found = [
    (file, line, text)
    for file, line, text in messages()
    if advice(text) and not file.startswith('instruct_jax/labeling/')
  ]
  assert len(found) >= 10
  for file, line, text in found:
    if any(words in text for words in NOT_FOLLOWED):
      continue
    names = [name for words, name in FOLLOWED.items() if words in text]
    assert names, f'{file}:{line}: nobody follows {text!r}'
  source = ''.join(
    path.read_text()
    for top in ('instruct_jax', 'experiments')
    for path in (ROOT / top).rglob('*.py')
  )
  joined = re.sub(r"'\s*\n\s*f?'", '', source)
  for words, name in FOLLOWED.items():
    assert words in joined, f'no error says {words!r} any more'
    assert f'def {name}(' in tests or (ROOT / name).exists(), name


# --- A run that trains --------------------------------------------------------


class Run:
  """One run of the small config, started over and over."""

  def __init__(self, start, tiny_run, workdir):
    self._start, self.workdir = start, workdir
    self._config = f'--config={tiny_run}/config.py'

  def __call__(self, *flags, code=0, **more):
    ended = self._start(
      MAIN, self._config, f'--workdir={self.workdir}', *flags, **more
    )
    assert ended.returncode == code, ended.stderr
    assert 'Traceback' not in ended.stderr
    return ended

  def stopped(self, *flags):
    """Stopped by SIGTERM after a few more steps."""

    def newest():
      names = [p.name for p in (self.workdir / 'checkpoints').glob('*')]
      return max((int(name) for name in names if name.isdigit()), default=0)

    before = newest()
    return self(*flags, code=75, until=lambda: newest() > before + 3)


@pytest.fixture
def run(start, tiny_run, tmp_path):
  return Run(start, tiny_run, tmp_path / 'run')


@pytest.fixture(scope='module')
def model(start, tiny_run, tmp_path_factory):
  """model.json, with a checksum of each array, of a run without mishaps."""
  run = Run(start, tiny_run, tmp_path_factory.mktemp('whole') / 'run')
  run(*OFTEN)
  return (run.workdir / MODEL).read_bytes()


def delete(message):
  """Does what 'delete PATH' says."""
  (path,) = re.findall(r'[Dd]elete (/\S*[^\s.:;,])', message)
  path = pathlib.Path(path)
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  return path


def corrupt(folder):
  """Turns a bit in every larger file of a folder."""
  for path in folder.rglob('*'):
    if path.is_file() and path.stat().st_size > 200:
      content = bytearray(path.read_bytes())
      content[len(content) // 2] ^= 1
      path.write_bytes(content)


def test_no_readable_checkpoint(run, model, tmp_path):
  run.stopped(*OFTEN)
  checkpoints = run.workdir / 'checkpoints'
  shutil.copytree(run.workdir, tmp_path / 'copy')
  corrupt(checkpoints)
  message = run(*OFTEN, code=1).stderr
  assert 'no checkpoint in' in message
  # Bring one back.
  shutil.rmtree(checkpoints)
  shutil.copytree(tmp_path / 'copy' / 'checkpoints', checkpoints)
  assert 'continues after step' in run(*OFTEN).stdout
  assert (run.workdir / MODEL).read_bytes() == model


@pytest.mark.slow
def test_unreadable_checkpoints_are_deleted(run, model):
  run.stopped(*OFTEN)
  corrupt(run.workdir / 'checkpoints')
  assert delete(run(*OFTEN, code=1).stderr) == run.workdir
  run(*OFTEN)
  assert (run.workdir / MODEL).read_bytes() == model


@pytest.mark.slow
def test_lost_checkpoints(run, model, tmp_path):
  run.stopped(*OFTEN)
  (run.workdir / 'checkpoints').rename(tmp_path / 'aside')
  message = run(*OFTEN, code=1).stderr
  assert 'and there is no checkpoint in' in message
  shutil.rmtree(run.workdir / 'checkpoints')
  (tmp_path / 'aside').rename(run.workdir / 'checkpoints')
  run.stopped(*OFTEN)
  shutil.rmtree(run.workdir / 'checkpoints')
  assert delete(run(*OFTEN, code=1).stderr) == run.workdir
  run(*OFTEN)
  assert (run.workdir / MODEL).read_bytes() == model


def test_a_disk_that_was_full(run, model):
  # Arrays take more; what is written of a run beside them takes less.
  message = run(*OFTEN, code=1, env={starts.FILE_LIMIT: '20000'}).stderr
  assert 'no checkpoint could be written to' in message
  run(*OFTEN)
  assert (run.workdir / MODEL).read_bytes() == model


@pytest.mark.slow
def test_a_disk_that_was_full_for_the_model(run, model):
  run(*OFTEN)
  shutil.rmtree(run.workdir / 'model')
  (run.workdir / 'done.json').unlink()
  message = run(*OFTEN, code=1, env={starts.FILE_LIMIT: '20000'}).stderr
  assert f'the model folder {run.workdir}/model could not be' in message
  run(*OFTEN)
  assert (run.workdir / MODEL).read_bytes() == model


def test_a_checkpoint_of_another_shape(run, model, tiny_run, tmp_path):
  run.stopped(*OFTEN)
  tokenizer = tiny_run / 'data' / 'tokenizer'
  shutil.copytree(tokenizer, tmp_path / 'before')
  try:
    words = [f'w{i}' for i in range(2000)]
    tokenizer_lib.train_word_level(words).save(tokenizer)
    assert 'tokenizer' in run(*OFTEN, code=1).stderr
    message = run(*OFTEN, '--accept_new_inputs', code=1).stderr
    assert 'Use the config it was made with' in message
  finally:
    shutil.rmtree(tokenizer)
    shutil.copytree(tmp_path / 'before', tokenizer)
  run(*OFTEN, '--accept_new_inputs')
  assert (run.workdir / MODEL).read_bytes() == model


def test_a_moved_work_directory(run):
  """Between two checkpoints: the next line does not find its file."""
  flags = ('--config.log_every=1', '--config.checkpoint_every=200')
  away = run.workdir.with_name('away')
  lines = run.workdir / metrics.METRICS_FILE

  def move():
    if (run.workdir / 'checkpoints' / '200').exists():
      run.workdir.rename(away)
    return False

  message = run(*flags, code=1, until=move).stderr
  assert f'the work directory {run.workdir} is gone' in message
  if run.workdir.exists():
    shutil.rmtree(run.workdir)
  away.rename(run.workdir)
  assert 'continues after step 200' in run(*flags).stdout
  steps = [line['step'] for line in metrics.read_lines(epath.Path(lines))]
  assert steps == list(range(1, NUM_STEPS + 1))


def test_a_run_that_met_only_nan(run):
  flags = (*OFTEN, '--config.num_warmup=0', '--config.max_grad_norm=0.0')
  flags += ('--config.loop.max_skips=2',)
  message = run('--config.learning_rate=1e38', *flags, code=1).stderr
  assert 'Lower the learning rate' in message
  assert (
    'learning_rate' in run('--config.learning_rate=1e-3', *flags, code=1).stderr
  )
  assert delete(message) == run.workdir
  run('--config.learning_rate=1e-3', *flags)


def test_a_damaged_file_of_times(run, model):
  run.stopped(*OFTEN)
  path = run.workdir / metrics.TIMING_FILE
  lines = path.read_text().splitlines()
  path.write_text('\n'.join(['{"half', *lines]) + '\n')
  message = run(*OFTEN, code=1).stderr
  assert f'{path}:1 is not JSON' in message
  path.unlink()
  run(*OFTEN)
  assert (run.workdir / MODEL).read_bytes() == model


# --- A pipeline ---------------------------------------------------------------


@pytest.fixture(scope='module')
def finished(start, tmp_path_factory):
  """Data, pretraining and SFT of the smoke config."""
  workdir = tmp_path_factory.mktemp('pipeline') / 'run'
  pipeline(start, workdir)
  return workdir


STAGES = "('data','pretrain','sft')"


def pipeline(start, workdir, code=0):
  ended = start(
    MAIN,
    '--config=configs/ppo_ptx.py:smoke',
    f'--workdir={workdir}',
    f'--config.stage_order={STAGES}',
    '--config.stages.sft.checkpoint_every=4',
    '--config.stages.sft.log_every=4',
  )
  assert ended.returncode == code, ended.stderr
  assert 'Traceback' not in ended.stderr
  return ended


def damage(folder, how):
  if how == 'arrays':
    corrupt(folder / 'params')
  elif how == 'description':
    path = folder / 'model.json'
    path.write_text(path.read_text().replace('"policy"', '"scalar"'))
  else:
    (folder / 'model.json').unlink()


@pytest.mark.parametrize('how', ['arrays', 'description', 'gone'])
def test_a_damaged_model_is_made_again(start, finished, tmp_path, how):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  before = (workdir / 'pretrain' / MODEL).read_bytes()
  (workdir / 'sft' / 'done.json').unlink()
  model = workdir / 'pretrain' / 'model'
  damage(model, how)
  if how == 'description':
    # It is compared before it is read.
    message = pipeline(start, workdir, code=1).stderr
    assert '--accept_new_inputs' in message and str(model) in message
    shutil.rmtree(model)
  elif how == 'arrays':
    message = pipeline(start, workdir, code=1).stderr
    done = workdir / 'pretrain' / 'done.json'
    assert f'Delete it and {done}, and the command of that run' in message
    done.unlink()
    shutil.rmtree(model)
  told = pipeline(start, workdir).stdout
  assert 'pretrain: continues after step' in told
  assert (workdir / 'pretrain' / MODEL).read_bytes() == before
  assert (workdir / 'sft' / MODEL).read_bytes() == (
    finished / 'sft' / MODEL
  ).read_bytes()


def test_a_damaged_model_is_named_by_other_programs(start, finished, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  corrupt(workdir / 'sft' / 'model' / 'params')

  def export():
    return start(
      'instruct_jax.export',
      f'--checkpoint={workdir}/sft/model',
      f'--tokenizer={workdir}/data/tokenizer',
      f'--output={tmp_path}/out',
    )

  ended = export()
  assert ended.returncode == 1
  (line,) = ended.stderr.splitlines()
  assert f'Delete it and {workdir}/sft/done.json' in line
  shutil.rmtree(workdir / 'sft' / 'model')
  (workdir / 'sft' / 'done.json').unlink()
  pipeline(start, workdir)
  assert export().returncode == 0


def test_an_epoch_that_is_gone(start, finished, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  shutil.rmtree(workdir / 'sft' / 'epochs' / '1')
  (workdir / 'sft' / 'done.json').unlink()
  message = pipeline(start, workdir, code=1).stderr
  assert 'epoch 1 cannot be used, and the checkpoints are past it' in message
  assert delete(message) == workdir / 'sft'
  pipeline(start, workdir)
  for name in ('epochs/1/model.json', MODEL):
    assert (workdir / 'sft' / name).read_bytes() == (
      finished / 'sft' / name
    ).read_bytes()


# --- Evaluation ---------------------------------------------------------------


def test_a_service_that_did_not_answer(start, tmp_path):
  prompts = [{'id': f'p{i}', 'text': f'Question {i}?'} for i in range(6)]
  answers = [
    {
      'model': model,
      'prompt_id': prompt['id'],
      'prompt': prompt['text'],
      'response': f'{model} says {prompt["id"]}',
      'num_tokens': 3,
      'ended': True,
    }
    for model in 'ab'
    for prompt in prompts
  ]
  for name, rows in (('prompts', prompts), ('answers', answers)):
    (tmp_path / f'{name}.jsonl').write_text(
      ''.join(json.dumps(row) + '\n' for row in rows)
    )
  up = []

  def answer(body, number):
    if not up and number > 5:
      return Fault(status=503)
    said = '{"better": 1}' if '<answer_1>' in str(body) else '{"overall": 4}'
    usage = {'prompt_tokens': 1, 'completion_tokens': 1}
    return {'choices': [{'message': {'content': said}}], 'usage': usage}

  with serve(answer) as (url, requests):
    recorded = f'{tmp_path}/answers.jsonl'
    flags = (
      MAIN,
      '--config=configs/evaluate.py:http',
      f'--workdir={tmp_path}/out',
      f'--config.models=a={recorded}#a,b={recorded}#b',
      '--config.baseline=a',
      f'--config.prompts={tmp_path}/prompts.jsonl',
      f'--config.endpoint.url={url}',
      '--config.endpoint.model=m',
      '--config.endpoint.key_variable=',
      '--config.endpoint.max_retries=0',
      '--config.endpoint.num_workers=1',
      '--config.num_bootstrap=20',
    )
    ended = start(*flags)
    assert ended.returncode == 1
    assert 'the same command resumes' in ended.stderr.splitlines()[-1]
    assert len(requests) == 6
    up.append(True)
    ended = start(*flags)
    assert ended.returncode == 0, ended.stderr
  # Both orders of six pairs, and twelve ratings; the sixth was asked twice.
  assert len(requests) == 12 + 12 + 1


def test_a_damaged_journal(start, finished, tmp_path):
  rows = ['sentid\tsentence']
  for noun in ('owl', 'cat'):
    for gender, word in (('male', 'he'), ('female', 'she')):
      rows.append(f'{noun}.cat.0.{gender}.txt\tThe {noun} said {word} left.')
  (tmp_path / 'winogender.tsv').write_text('\n'.join(rows) + '\n')
  flags = (
    MAIN,
    '--config=configs/nlp_suite.py',
    f'--workdir={tmp_path}/out',
    f'--config.models=sft={finished}/sft/model',
    f'--config.tokenizer={finished}/data/tokenizer',
    f'--config.data.winogender={tmp_path}/winogender.tsv',
  )
  ended = start(*flags)
  assert ended.returncode == 0, ended.stderr
  suite = (tmp_path / 'out' / 'suite.json').read_bytes()
  (tmp_path / 'out' / 'done.json').unlink()
  journal = next((tmp_path / 'out' / 'journal').rglob('*.jsonl'))
  journal.write_text('{"half\n' + journal.read_text())
  ended = start(*flags)
  assert ended.returncode == 1
  assert f'{journal}:1: not a line of a journal' in ended.stderr
  journal.unlink()
  ended = start(*flags)
  assert ended.returncode == 0, ended.stderr
  assert (tmp_path / 'out' / 'suite.json').read_bytes() == suite
