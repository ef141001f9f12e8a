"""The check at the end of tpu_setup.sh, on what is here; and the script."""

import pathlib
import subprocess

import jax
import pytest

from instruct_jax.infra import device_check

ROOT = pathlib.Path(__file__).parents[1]


def test_all_devices_are_counted(capsys):
  assert device_check.check('cpu') == '8 of 8 x cpu here, 1 processes'
  device_check.main(['--backend=cpu'])
  assert capsys.readouterr().out.startswith('ok: ')


def test_another_platform_is_an_error(capsys):
  with pytest.raises(SystemExit, match='1'):
    device_check.main(['--backend=gpu'])
  assert 'jax found cpu, not gpu' in capsys.readouterr().err


def test_a_wrong_result_names_the_device(monkeypatch):
  real = jax.lax.ppermute
  # A link that does not carry: everyone keeps his own.
  monkeypatch.setattr(
    jax.lax,
    'ppermute',
    lambda x, axis, shift: real(x, axis, [(i, i) for i, _ in shift]),
  )
  with pytest.raises(RuntimeError, match='shift over 8 devices: .* instead of'):
    device_check.check('cpu')


def test_the_script_installs_the_pinned_jax():
  script = ROOT / 'tpu_setup.sh'
  subprocess.run(['bash', '-n', script], check=True)
  text = script.read_text()
  assert "jax=$(grep '^jax==' requirements.txt)" in text
  assert '-m instruct_jax.infra.device_check --backend=tpu' in text
  # What bash makes of the pin.
  shown = subprocess.run(
    [
      'bash',
      '-c',
      'jax=$(grep "^jax==" requirements.txt); echo "${jax/jax==/jax[tpu]==}"',
    ],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
  ).stdout.strip()
  pins = (ROOT / 'requirements.txt').read_text().split()
  assert shown.replace('[tpu]', '') in pins
  assert shown.startswith('jax[tpu]==0.')
