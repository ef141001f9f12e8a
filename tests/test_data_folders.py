"""Output folders: all files of a run or none, no old file beside new ones."""

import codecs
import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from instruct_jax.data import convert, folders, hygiene, records, tokenizer
from tests import published


def write(folder, files, owned=('*',), **options):
  with folders.writing(folder, owned, command='test', **options) as unfinished:
    for name, text in files.items():
      (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
      (unfinished / name).write_text(text)


def read(folder):
  return {
    str(path.relative_to(folder)): path.read_text()
    for path in sorted(pathlib.Path(folder).rglob('*'))
    if path.is_file() and path.name != folders.MANIFEST
  }


def test_files_come_together_and_are_listed(tmp_path):
  out = tmp_path / 'new' / 'out'
  files = {'a_train': '1', 'below/c': '22'}
  write(out, files, settings={'seed': 3})
  assert read(out) == files
  assert folders.written(out) == {
    'a_train': {'bytes': 1, 'command': 'test', 'settings': {'seed': 3}},
    'below/c': {'bytes': 2, 'command': 'test', 'settings': {'seed': 3}},
  }
  first = (out / folders.MANIFEST).read_bytes()
  write(out, files, settings={'seed': 3})
  assert (out / folders.MANIFEST).read_bytes() == first
  # Nothing else is left, here or beside.
  assert [path.name for path in tmp_path.rglob('*')].count('out') == 1
  assert not list(tmp_path.rglob('*unfinished*'))
  assert folders.written(tmp_path) == {}


@pytest.mark.parametrize('there', [False, True])
def test_a_run_that_fails_changes_nothing(there, tmp_path):
  out = tmp_path / 'out'
  if there:
    write(out, {'a': 'old'})
  before = read(tmp_path)
  with (
    pytest.raises(records.RecordError) as info,
    folders.writing(out, ('*',), command='test') as unfinished,
  ):
    (unfinished / 'a').write_text('new')
    records.write_jsonl(unfinished / 'b.jsonl', [])
  # The error names the place where the file was to be.
  assert str(info.value).startswith(f'{out}/b.jsonl: refused')
  assert read(tmp_path) == before and out.exists() == there


@pytest.mark.parametrize('there', [False, True])
def test_a_second_writer_is_refused(there, tmp_path):
  out = tmp_path / 'out'
  if there:
    write(out, {'a': 'old'})
  with folders.writing(out, ('*',), command='test') as unfinished:
    (unfinished / 'a').write_text('first')
    with pytest.raises(records.RecordError, match='another process is writing'):
      write(out, {'a': 'second', 'b': 'second'})
    assert (unfinished / 'a').read_text() == 'first'
  assert read(out) == {'a': 'first'}
  write(out, {'a': 'third'})
  assert read(out) == {'a': 'third'}
  assert not list(tmp_path.rglob('*unfinished*'))


def test_a_folder_that_came_meanwhile_is_kept(tmp_path):
  out = tmp_path / 'out'
  with folders.writing(out, ('a',), command='test') as unfinished:
    (unfinished / 'a').write_text('new')
    out.mkdir()
    (out / 'notes').write_text('mine')
  assert read(out) == {'a': 'new', 'notes': 'mine'}


def test_an_input_below_a_link_is_not_overwritten(tmp_path):
  out, link = tmp_path / 'out', tmp_path / 'link'
  write(out, {'a': 'old'})
  link.symlink_to(out)
  for target, given in ((out, link / 'a'), (link, out / 'a'), (out, link)):
    with pytest.raises(records.RecordError, match='would be overwritten'):
      write(target, {'a': 'new'}, inputs=[given])
  assert read(out) == {'a': 'old'}


def test_old_files_are_refused_or_removed_by_name(tmp_path, capsys):
  out = tmp_path / 'out'
  write(out, {'a_train': 'old', 'a_valid': 'old', 'b_train': 'old'})
  before = read(out)
  with pytest.raises(records.RecordError, match=r'holds a_valid of an earlier'):
    write(out, {'a_train': 'new'}, ('a_*',))
  assert read(out) == before
  write(out, {'a_train': 'new'}, ('a_*',), replace=True)
  assert read(out) == {'a_train': 'new', 'b_train': 'old'}
  error = capsys.readouterr().err
  assert f'note: {out}: removed a_valid of test\n' in error
  assert f'{out}: also holds b_train, not written by this run but by' in error
  # The same names again are no old files.
  write(out, {'a_train': 'newer'}, ('a_*',))
  assert sorted(folders.written(out)) == ['a_train', 'b_train']


def test_only_what_is_listed_as_it_is_gets_removed(tmp_path):
  out = tmp_path / 'out'
  write(out, {'a_train': 'old', 'a_valid': 'old'})
  (out / 'a_valid').write_text('edited by hand')
  for replace in (False, True):
    with pytest.raises(records.RecordError, match=r'a_valid, .*move it away'):
      write(out, {'a_train': 'new'}, ('a_*',), replace=replace)
  (out / 'a_valid').unlink()
  (out / 'a_test').write_text('of somebody else')
  with pytest.raises(records.RecordError, match=r'a_test, .*move it away'):
    write(out, {'a_train': 'new'}, ('a_*',), replace=True)
  (out / folders.MANIFEST).write_text('[1]')
  with pytest.raises(records.RecordError, match='written.json: not a list of'):
    write(out, {'a_train': 'new'}, ('a_*',))


def test_inputs_are_not_overwritten_and_files_are_no_folders(tmp_path):
  out = tmp_path / 'out'
  write(out, {'a_train': 'old'})
  with pytest.raises(
    records.RecordError, match='a_train: is an input and would'
  ):
    write(out, {'a_train': 'x'}, ('a_*',), inputs=[out / 'a_train'])
  with pytest.raises(records.RecordError, match='out: is an input and would'):
    write(out, {'a_train': 'x'}, ('a_*',), inputs=[out])
  write(out, {'a_train': 'x'}, ('a_*',), inputs=[out / 'other'])
  with pytest.raises(records.RecordError, match='a_train: is a file; name a'):
    write(out / 'a_train', {'x': 'x'})


def test_a_relative_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write('.', {'a': '1'})
  write('below', {'b': '2'})
  assert read(tmp_path) == {'a': '1', 'below/b': '2'}


# --- Commands -----------------------------------------------------------------


def alpaca(path, kind, number):
  path.write_text(
    json.dumps(
      [
        {'instruction': f'Name {kind} {i}.', 'input': '', 'output': f'{kind}.'}
        for i in range(number)
      ]
    )
  )
  return str(path)


def test_a_smaller_conversion_into_the_same_folder(tmp_path, capsys):
  big = alpaca(tmp_path / 'a.json', 'bird', 200)
  small = alpaca(tmp_path / 'b.json', 'tree', 5)
  out = tmp_path / 'out'
  first = ['alpaca', big, f'--output={out}', '--valid=0.1']
  second = ['alpaca', small, f'--output={out}', '--valid=0.0001']
  assert convert.main(first) == 0
  assert convert.main(second) == 1
  error = capsys.readouterr().err
  assert 'demonstrations_valid.jsonl, prompts_valid.jsonl of an' in error
  assert all('bird' in text for text in read(out).values())
  assert convert.main([*second, '--replace']) == 0
  captured = capsys.readouterr()
  assert 'removed demonstrations_valid.jsonl' in captured.err
  # What a split got none of is said.
  assert 'prompts_valid: 0\n' in captured.out
  assert sorted(read(out)) == [
    'demonstrations_train.jsonl',
    'prompts_train.jsonl',
  ]
  assert not any('bird' in text for text in read(out).values())


def test_kinds_from_several_conversions_share_a_folder(tmp_path, capsys):
  rows = [records.Prompt(f'p{i}', f'Name tree {i}.') for i in range(60)]
  records.write_jsonl(tmp_path / 'prompts.jsonl', rows)
  big = alpaca(tmp_path / 'a.json', 'bird', 60)
  out = f'--output={tmp_path / "out"}'
  assert convert.main(['alpaca', big, out, '--valid=0.3']) == 0
  prompts = ['prompts', str(tmp_path / 'prompts.jsonl'), out]
  assert convert.main([*prompts, '--valid=0.3']) == 0
  error = capsys.readouterr().err
  assert 'also holds demonstrations_train.jsonl, demonstrations_valid' in error
  assert 'but by convert alpaca' in error
  # Split otherwise, one conversation could be on both sides.
  assert convert.main([*prompts, '--valid=0.3', '--seed=1']) == 1
  error = capsys.readouterr().err
  assert (
    'was split by convert alpaca with --seed=0 --valid=0.3, this run' in error
  )
  own = [prompts[0], str(tmp_path / 'out' / 'prompts_train.jsonl'), out]
  assert convert.main([*own, '--valid=0.3']) == 1
  assert (
    'out/prompts_train.jsonl: is an input and would' in capsys.readouterr().err
  )


def test_hygiene_leaves_no_old_split(tmp_path, capsys):
  tokenizer.train_word_level(['a']).save(tmp_path / 'tokenizer')
  rows = [records.Prompt(f'p{i}', f'q{i}', user=f'u{i}') for i in range(20)]
  records.write_jsonl(tmp_path / 'prompts.jsonl', rows)
  command = [
    str(tmp_path / 'prompts.jsonl'),
    f'--output={tmp_path / "out"}',
    f'--tokenizer={tmp_path / "tokenizer"}',
  ]
  assert hygiene.main(command) == 0
  assert hygiene.main([*command, '--test=0']) == 1
  assert 'holds prompts_test.jsonl of an earlier' in capsys.readouterr().err
  assert hygiene.main([*command, '--test=0', '--replace']) == 0
  assert sorted(read(tmp_path / 'out')) == [
    'hygiene.json',
    'prompts_train.jsonl',
    'prompts_valid.jsonl',
  ]
  inside = [str(tmp_path / 'out' / 'prompts_train.jsonl'), *command[1:]]
  assert hygiene.main(inside) == 1
  assert 'is an input and would be overwritten' in capsys.readouterr().err


def test_a_tokenizer_keeps_no_template_of_an_earlier_one(tmp_path, capsys):
  published.save_byte_tokenizer(tmp_path / 'chat', template=published.TEMPLATE)
  tokenizer.train_bpe(['a'], 258).save(tmp_path / 'plain')
  out = tmp_path / 'out'
  chat = [str(tmp_path / 'chat'), f'--output={out}', '--template=chat']
  plain = [str(tmp_path / 'plain'), f'--output={out}']
  assert tokenizer.main(chat) == 0
  assert tokenizer.main(plain) == 1
  assert 'prompt_format.json of an earlier run' in capsys.readouterr().err
  assert tokenizer.Tokenizer.load(out).template == 'chat'
  assert tokenizer.main([*plain, '--replace']) == 0
  assert tokenizer.Tokenizer.load(out).template == ''
  # The folder that it reads, and a model's, are not for writing.
  assert tokenizer.main([str(out), f'--output={out}']) == 1
  (tmp_path / 'model').mkdir()
  (tmp_path / 'model' / 'model.safetensors').write_text('')
  assert tokenizer.main([*plain[:1], f'--output={tmp_path / "model"}']) == 1
  assert 'model.safetensors, which' in capsys.readouterr().err


def test_byte_order_marks_in_a_tokenizer_s_folder(tmp_path):
  """Editors on Windows put one before each file that they touch."""
  folder = tmp_path / 'chat'
  published.save_byte_tokenizer(
    folder, template=published.TEMPLATE, prepared=True
  )
  before = tokenizer.Tokenizer.load(folder)
  for path in folder.iterdir():
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
  after = tokenizer.Tokenizer.load(folder)
  prompts = [records.Prompt('p', 'Ein Café?')]
  assert after.encode_prompts(prompts) == before.encode_prompts(prompts)
  assert (after.fingerprint, after.stop_ids) == (
    before.fingerprint,
    before.stop_ids,
  )
  vocabulary = {'l': 0, 'o': 1, 'lo': 2, '<|endoftext|>': 3}
  files = {'encoder.json': json.dumps(vocabulary), 'vocab.bpe': 'l o\n'}
  found = []
  for mark in (b'', codecs.BOM_UTF8):
    for name, text in files.items():
      (tmp_path / name).write_bytes(mark + text.encode())
    loaded = tokenizer.load_gpt2_bpe(*(tmp_path / name for name in files))
    found.append(loaded.fingerprint)
  assert found[0] == found[1]


@pytest.mark.parametrize('fresh', [False, True])
def test_a_kill_leaves_no_mixture(fresh, tmp_path):
  """Two conversions take turns in one folder, each killed at some moment; or
  every one has a folder of its own, which is whole or not there."""
  paths = [alpaca(tmp_path / f'{k}.json', k, 4000) for k in ('bird', 'tree')]
  program = (
    'import sys\nfrom instruct_jax.data import convert\n'
    'print("ready", flush=True)\nsys.stdin.readline()\n'
    'sys.exit(convert.main(sys.argv[1:]))'
  )
  waits = (None, 0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, None)
  killed = 0
  for number, wait in enumerate(waits):
    out = tmp_path / (f'out{number}' if fresh else 'out')
    process = subprocess.Popen(
      [sys.executable, '-c', program, 'alpaca', paths[number % 2]]
      + [f'--output={out}', '--valid=0.2'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    assert process.stdout.readline() == 'ready\n'
    process.stdin.write('\n')
    process.stdin.flush()
    if wait is not None:
      time.sleep(wait)
      process.send_signal(signal.SIGKILL)
    process.communicate()
    killed += process.returncode == -signal.SIGKILL
    texts = [path.read_text() for path in sorted(out.glob('*.jsonl'))]
    kinds = {kind for kind in ('bird', 'tree') for t in texts if kind in t}
    assert len(kinds) <= 1
    assert not fresh or len(texts) == (4 if out.exists() else 0)
    if wait is None:
      # The folder is whole again, whatever was left there.
      assert process.returncode == 0 and len(texts) == 4
      assert not (out / '.unfinished').exists()
  assert killed
