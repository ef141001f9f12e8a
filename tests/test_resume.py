"""What may change between two starts of one command, and what is refused.

Toy stages, from the command line: `a` and `d` read files of the user, `b` reads
what `a` wrote and `c` what `b` wrote.
"""

import json
import os
import pathlib
import shutil
import textwrap

import pytest

from instruct_jax.infra import stages
from tests import test_keys

STAGE = """
  from etils import epath

  PROCESSES = 'all'

  def validate(config):
    if config.size < 1:
      raise ValueError(f'size must be positive: {config.size}')

  def inputs(config):
    return {'reads': config.reads}

  def run(config, workdir):
    with (workdir / 'runs').open('a') as file:
      file.write('run\\n')
    if config.size == 13:
      raise RuntimeError('size 13 fails late')
    out = workdir / 'out'
    out.mkdir(parents=True, exist_ok=True)
    text = f'{config.size} {epath.Path(config.reads).is_dir()}\\n'
    (out / 'text').write_text(text)
    return {'size': config.size}
  """

# Reads before it saves anything.
STRICT = """
  from toys import stage
  from toys.stage import PROCESSES, inputs, validate

  def run(config, workdir):
    if 'bad' in open(config.reads).read():
      raise ValueError(f'{config.reads}:1: bad; mend the line')
    return stage.run(config, workdir)
  """

CONFIG = """
  from ml_collections import ConfigDict

  def get_config(argument=''):
    config = ConfigDict(dict(
      name='toy', seed=0, workdir='', default_workdir='runs/toy', mesh=(),
      xla_flags='', compilation_cache='', loggers='', stages={},
      stage_order=tuple('abcd'),
    ))
    workdir = config.get_ref('workdir')
    for name in config.stage_order:
      config.stages[name] = ConfigDict(dict(
        name=name, experiment='toys.stage', workdir=workdir, size=1, reads='',
        mesh=(), remat='none', learning_rate=1.0, batch_size=8, dropout=0.0,
        num_microbatches=1,
      ))
    config.stages.a.reads = config.stages.d.reads = FOLDER + '/words'
    config.stages.d.experiment = 'toys.strict'
    config.stages.b.reads = workdir + '/a/out'
    config.stages.c.reads = workdir + '/b/out'
    config.lock()
    return config
  """


class Toy:
  """A config, its data, and the command on them."""

  def __init__(self, folder: pathlib.Path, starts):
    self._starts = starts
    self.folder, self.workdir = folder, folder / 'run'
    self.words = folder / 'words'
    self.words.write_text('one two\n')
    modules = folder / 'modules' / 'toys'
    modules.mkdir(parents=True)
    for name, source in (
      ('__init__', ''),
      ('stage', STAGE),
      ('strict', STRICT),
    ):
      (modules / f'{name}.py').write_text(textwrap.dedent(source))
    source = f'FOLDER = {str(folder)!r}\n' + textwrap.dedent(CONFIG)
    (folder / 'config.py').write_text(source)

  def start(self, *flags: str, code: int = 0):
    ended = self._starts(
      'instruct_jax.main',
      f'--config={self.folder}/config.py',
      f'--workdir={self.workdir}',
      *flags,
      env={'PYTHONPATH': str(self.folder / 'modules')},
    )
    assert ended.returncode == code, ended.stderr
    assert 'Traceback' not in ended.stderr
    return ended

  def runs(self) -> str:
    """How often each stage ran, say 'a1 b1'."""
    files = sorted(self.workdir.glob('*/runs'))
    return ' '.join(
      f'{f.parent.name}{len(f.read_text().splitlines())}' for f in files
    )


@pytest.fixture
def toy(tmp_path, start):
  return Toy(tmp_path, start)


def set_size(name, size):
  return f'--config.stages.{name}.size={size}'


def follow(toy, message):
  """Deletes the folders that a message asks to delete."""
  folders = message.strip().splitlines()[-1].rpartition('again: ')[2].split()
  assert folders
  for folder in folders:
    shutil.rmtree(folder)
  return [pathlib.Path(folder).name for folder in folders]


# --- Inputs -------------------------------------------------------------------


def test_a_replaced_input_of_a_finished_stage_is_refused(toy):
  toy.start()
  inputs = (toy.workdir / 'a' / 'inputs.json').read_text()
  old = json.loads(inputs)['reads']['sha256']
  toy.words.write_text('one three\n')
  message = toy.start(code=1).stderr
  line = next(line for line in message.splitlines() if 'a is finished' in line)
  assert 'stages.a.reads' in line and str(toy.words) in line
  new = line.split()[-1]
  assert old[:12] in line and len(new) == 12 and new != old[:12]
  assert 'd is finished' in message and '--accept_new_inputs' in message
  assert toy.runs() == 'a1 b1 c1 d1'
  # Again, for nothing was accepted.
  toy.start(code=1)

  toy.start('--accept_new_inputs')
  assert (toy.workdir / 'a' / 'inputs.json').read_text() == inputs
  (row,) = json.loads((toy.workdir / 'a' / 'accepted_inputs.json').read_text())
  assert row['before'] == old and row['sha256'].startswith(new)
  assert row['label'] == 'reads' and row['time'].startswith('20')
  toy.start()
  assert toy.runs() == 'a1 b1 c1 d1'
  # What was accepted is what counts from now on.
  toy.words.write_text('one two\n')
  toy.start(code=1)


def test_the_advice_about_replaced_inputs_works(toy):
  toy.start()
  toy.words.write_text('one three\n')
  assert follow(toy, toy.start(code=1).stderr) == ['a', 'b', 'c', 'd']
  toy.start()
  toy.words.write_text('one four\n')
  toy.start(code=1)
  toy.words.write_text('one three\n')  # Brought back.
  toy.start()


def test_a_replaced_input_of_a_stage_under_way_is_refused(toy):
  toy.start(set_size('a', 13), code=1)
  toy.words.write_text('one three\n')
  message = toy.start(set_size('a', 13), code=1).stderr
  assert 'a is under way; stages.a.reads' in message
  # d, which has not begun, is not concerned.
  assert 'd is' not in message
  assert toy.runs() == 'a1'


def test_what_an_earlier_stage_wrote_is_compared_too(toy):
  toy.start()
  (toy.workdir / 'b' / 'out' / 'text').write_text('by hand\n')
  message = toy.start(code=1).stderr
  assert f'stages.c.reads: {toy.workdir}/b/out had SHA-256' in message


def test_times_and_places_do_not_count(toy):
  toy.start()
  os.utime(toy.words, (1, 1))
  toy.start()
  shutil.copytree(toy.workdir, toy.folder / 'other')
  toy.workdir = toy.folder / 'other'
  moved = toy.folder / 'moved'
  toy.words.rename(moved)
  reads = [f'--config.stages.{name}.reads={moved}' for name in 'ad']
  told = toy.start(*reads).stdout
  assert 'the contents are the same' in told
  assert toy.runs() == 'a1 b1 c1 d1'
  # Elsewhere and other.
  moved.write_text('one three\n')
  assert 'a is finished; stages.a.reads' in toy.start(*reads, code=1).stderr


def test_an_input_that_nobody_needs_any_more_may_go(toy):
  toy.start()
  toy.words.unlink()
  shutil.rmtree(toy.workdir / 'a' / 'out')
  toy.start()
  assert toy.runs() == 'a1 b1 c1 d1'


def test_a_file_may_be_mended_before_anything_was_saved(toy):
  toy.words.write_text('bad\n')
  message = toy.start(code=1).stderr
  assert f'error: d: {toy.words}:1: bad' in message
  # a has finished with the bad file; d has nothing to lose.
  message = toy.words.write_text('good\n') and toy.start(code=1).stderr
  assert 'a is finished' in message and 'd is' not in message
  toy.start('--accept_new_inputs')
  record = json.loads((toy.workdir / 'd' / 'inputs.json').read_text())
  assert not (toy.workdir / 'd' / 'accepted_inputs.json').exists()
  assert record['reads']['path'] == str(toy.words)
  toy.start()


# --- Inputs that are not there ------------------------------------------------


def test_every_missing_input_is_told_before_the_first_stage(toy):
  nowhere = toy.folder / 'nowhere'
  message = toy.start(
    f'--config.stages.d.reads={nowhere}', '--config.stages.c.reads=', code=1
  ).stderr
  lines = message.splitlines()
  assert lines == [
    'error: c: reads is empty; give --config.stages.c.reads=PATH',
    f'd: reads: {nowhere}: no such file or folder; correct '
    '--config.stages.d.reads',
  ]
  assert not toy.workdir.exists()
  toy.start()


@pytest.mark.parametrize(
  ('config', 'lines'),
  [
    (
      'sft.py:gpt2',
      [
        'error: sft: tokenizer is empty; give --config.tokenizer=PATH',
        'sft: init: hf:/nowhere: no such file or folder; correct --config.init',
        'sft: demonstrations is empty; give --config.demonstrations=PATH',
        'sft: valid_demonstrations is empty; give '
        '--config.valid_demonstrations=PATH',
      ],
    ),
    (
      'reward.py:6b',
      [
        'error: reward: tokenizer is empty; give --config.tokenizer=PATH',
        'reward: init: hf:/nowhere: no such file or folder; correct '
        '--config.init',
        *(
          f'reward: {key}: ./{name}.jsonl: no such file or folder; correct '
          f'--config.{key}'
          for key, name in (
            ('comparisons', 'comparisons_train'),
            ('valid_comparisons', 'comparisons_valid'),
            ('demonstrations', 'demonstrations'),
          )
        ),
      ],
    ),
  ],
)
def test_a_run_of_one_stage_names_its_keys(start, tmp_path, config, lines):
  ended = start(
    'instruct_jax.main',
    f'--config=configs/{config}',
    f'--workdir={tmp_path}/out',
    '--config.init=hf:/nowhere',
  )
  assert ended.returncode == 1
  found = ended.stderr.splitlines()
  # The hub words its refusal itself.
  for line, wanted in zip(found, lines, strict=True):
    start_of_line, _, _ = wanted.partition('hf:/nowhere')
    assert line.startswith(start_of_line)
    assert line.endswith(wanted.rpartition('; ')[2])
  assert not (tmp_path / 'out').exists()


def test_what_an_earlier_stage_makes_need_not_be_there_yet(toy):
  # Of a later one it must.
  reads = f'--config.stages.a.reads={toy.workdir}/b/out'
  assert 'a: reads: ' in toy.start(reads, code=1).stderr
  assert not toy.workdir.exists()


def test_what_no_stage_wrote_is_told_as_soon_as_it_is_known(toy):
  reads = f'--config.stages.c.reads={toy.workdir}/a/typo'
  message = toy.start(reads, code=1).stderr
  assert message.startswith(
    f'error: c: reads: {toy.workdir}/a/typo is missing, though a is done'
  )
  # b has not run for nothing.
  assert toy.runs() == 'a1'
  toy.start()


def test_a_finished_stage_makes_again_what_is_gone_and_needed(toy):
  toy.start()
  for name in 'ab':
    shutil.rmtree(toy.workdir / name / 'out')
  (toy.workdir / 'c' / 'done.json').unlink()
  told = toy.start().stdout
  assert (
    f'b: {toy.workdir}/b/out, which c reads, is gone; it runs again' in told
  )
  # b needs what a wrote.
  assert toy.runs() == 'a2 b2 c2 d1'


# --- Keys ---------------------------------------------------------------------


def test_a_changed_finished_stage_names_what_depends_on_it(toy):
  toy.start()
  message = toy.start(set_size('b', 2), code=1).stderr
  assert 'b is finished; stages.b.size: was 1, is now 2' in message
  assert follow(toy, message) == ['b', 'c']
  toy.start(set_size('b', 2))
  assert (toy.workdir / 'c' / 'runs').read_text() == 'run\n'
  (row,) = json.loads((toy.workdir / 'config_history.json').read_text())
  assert row['changes'] == {'stages.b.size': [1, 2]}
  toy.start(set_size('b', 2))
  # Going back is a change as well.
  assert 'stages.b.size: was 2, is now 1' in toy.start(code=1).stderr


def test_a_changed_stage_under_way_names_the_key(toy):
  toy.start(set_size('c', 13), code=1)
  message = toy.start(set_size('c', 2), code=1).stderr
  assert 'c is under way; stages.c.size: was 13, is now 2' in message
  assert follow(toy, message) == ['c']
  toy.start(set_size('c', 2))


def test_a_stage_that_has_not_begun_may_change(toy):
  toy.start(set_size('b', 13), code=1)
  told = toy.start(set_size('b', 13), set_size('c', 5), code=1).stdout
  assert 'c: stages.c.size: was 1, is now 5; nothing of it was saved' in told
  shutil.rmtree(toy.workdir / 'b')
  toy.start(set_size('c', 5))
  assert (toy.workdir / 'c' / 'out' / 'text').read_text() == '5 True\n'
  config = json.loads((toy.workdir / 'config.json').read_text())
  assert config['stages']['c']['size'] == 5
  assert config['stages']['b']['size'] == 1


def test_a_flag_may_be_corrected_after_a_run_that_did_nothing(toy):
  toy.start(set_size('a', 0), code=1)
  assert not toy.workdir.exists()
  toy.words.write_text('bad\n')
  toy.start(code=1)
  assert toy.runs() == 'a1 b1 c1'
  toy.start(set_size('d', 3), code=1)  # The file is still bad.
  toy.words.write_text('one two\n')
  toy.start(set_size('d', 3), '--accept_new_inputs')
  assert (toy.workdir / 'd' / 'out' / 'text').read_text() == '3 False\n'


def test_memory_and_speed_may_change_at_any_time(toy):
  toy.start()
  told = toy.start(
    '--config.mesh=(1,1,1)',
    '--config.stages.a.mesh=(1,-1,1)',
    '--config.stages.a.remat=full',
    '--config.stages.b.num_microbatches=4',
  ).stdout
  assert (
    'stages.a.remat: was "none", is now "full"; this change is allowed' in told
  )
  assert toy.runs() == 'a1 b1 c1 d1'
  # Dropout draws anew in each microbatch; a batch of training is the method.
  for flags, key in (
    (('--config.stages.b.batch_size=4',), 'batch_size'),
    (
      (
        '--config.stages.b.dropout=0.5',
        '--config.stages.b.num_microbatches=2',
      ),
      'num_microbatches',
    ),
  ):
    assert f'stages.b.{key}: ' in toy.start(*flags, code=1).stderr


def test_stages_of_another_config_are_remembered(toy):
  toy.start()
  toy.start("--config.stage_order=('a','b')", set_size('c', 7))
  assert (
    'stages.c.size: was 1, is now 8'
    in toy.start(set_size('c', 8), code=1).stderr
  )
  assert toy.runs() == 'a1 b1 c1 d1'


def test_the_table_says_why_each_key_may_change():
  for key, reason in stages.MAY_CHANGE.items():
    assert key and reason
  assert not set(stages.MAY_CHANGE) & set(stages.MAY_CHANGE_IF)


def test_every_key_that_may_change_is_in_some_config():
  known = test_keys.known_keys()
  assert set(stages.MAY_CHANGE) | set(stages.MAY_CHANGE_IF) <= known


def test_what_may_change_depends_on_the_stage():
  configs = {
    'sft': ('sft', '1p3b'),  # Drops out 0.2.
    'init': ('sft', '1p3b,init'),
    'reward': ('reward', '6b'),
    'ppo': ('ppo_ptx', '1p3b'),
    'sample': ('sample', ''),
  }
  found = {
    name: {
      key
      for key in stages.MAY_CHANGE_IF
      if stages.may_change(key, test_keys.flat(test_keys.get_config(*which)))
    }
    for name, which in configs.items()
  }
  assert found == {
    'sft': set(),
    'init': {'num_microbatches'},
    'reward': {'num_microbatches'},
    'ppo': {'pack'},
    'sample': {'num_microbatches', 'batch_size'},
  }
