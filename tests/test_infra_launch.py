"""Scripts that start runs elsewhere, with stand-ins for gcloud, SLURM and XPK.

No slice, cluster or image is made: the stand-ins write down how they are called
and answer from a list.
"""

import os
import pathlib
import re
import shlex
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / 'instruct_jax' / 'infra' / 'launch'
SCRIPTS = [ROOT / 'tpu_setup.sh', *sorted(LAUNCH.glob('*.sh'))]

# Writes its arguments into `calls`. If `answers/NAME` has lines, the first is
# taken away: a text to print (as an error if it fails), and an exit code after
# a tab.
STAND_IN = r"""#!/usr/bin/env bash
printf '%s\n' "$(basename "$0") $(printf '%q ' "$@")" >> "$FAKE/calls"
for key in "$(basename "$0")" "${!#}" "$3" "$4"; do
  file="$FAKE/answers/$key"
  if [ -f "$file" ] && [ -s "$file" ]; then
    line=$(head -n 1 "$file")
    sed -i 1d "$file"
    [ "${line##*$'\t'}" -eq 0 ] || exec >&2
    [ -z "${line%%$'\t'*}" ] || printf '%s\n' "${line%%$'\t'*}"
    exit "${line##*$'\t'}"
  fi
done
"""


@pytest.fixture
def fake(tmp_path):
  """`fake(names, answers)` puts stand-ins first in PATH."""

  def make(names, answers=()):
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'answers').mkdir()
    for name in names:
      path = tmp_path / 'bin' / name
      path.write_text(STAND_IN)
      path.chmod(0o755)
    for name, lines in dict(answers).items():
      text = ''.join(f'{said}\t{code}\n' for said, code in lines)
      (tmp_path / 'answers' / name).write_text(text)
    return tmp_path

  return make


def run(folder, script, *arguments, **variables):
  env = {
    **os.environ,
    'PATH': f'{folder / "bin"}{os.pathsep}{os.environ["PATH"]}',
    'FAKE': str(folder),
  }
  ended = subprocess.run(
    ['bash', script, *arguments],
    env=env | variables,
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  calls = folder / 'calls'
  lines = calls.read_text().splitlines() if calls.exists() else []
  return ended, [shlex.split(line) for line in lines]


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
  subprocess.run(['bash', '-n', script], check=True)
  text = script.read_text()
  assert text.startswith('#!/usr/bin/env bash\n# ')
  assert '\nset -euo pipefail\n' in text


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_lines_are_explained(script):
  """No more than a few commands follow each other without a comment."""
  unexplained = 0
  for line in script.read_text().splitlines():
    if line.strip().startswith('# ') or not line.strip():
      unexplained = 0
    unexplained += 1
    assert unexplained <= 16, line


# --- A spot slice -------------------------------------------------------------

SLICE = {
  'NAME': 'ppo',
  'ZONE': 'zone-b',
  'TYPE': 'v4-32',
  'REPO': 'https://host/a b.git',
  'POLL': '0',
  'GRACE': '0',
}
COMMAND = ('python', '-m', 'x', '--config.text=two words')


def states(*names):
  """Answers to looks at the queued resource."""
  lines = [
    (f'ERROR: {name}', 1) if name in ('NOT_FOUND', 'HTTP 503') else (name, 0)
    for name in names
  ]
  return {'--format=value(state.state)': lines}


def verbs(calls):
  """What gcloud was asked for, but for looks."""
  words = [call[3:5] for call in calls if call[4] != 'describe']
  return [verb if group != 'tpu-vm' else 'ssh' for group, verb in words]


def test_a_preempted_slice_is_asked_for_anew(fake):
  first = ('NOT_FOUND', 'WAITING_FOR_RESOURCES', 'ACTIVE', 'SUSPENDED')
  second = ('SUSPENDED', 'NOT_FOUND', 'PROVISIONING', 'ACTIVE')
  answers = states(*first, *second) | {'ssh': [('', 255), ('', 0)]}
  folder = fake(['gcloud'], answers)
  ended, calls = run(folder, LAUNCH / 'tpu_spot.sh', *COMMAND, **SLICE)
  assert ended.returncode == 0, ended.stderr
  assert verbs(calls) == ['create', 'ssh', 'delete', 'create', 'ssh', 'delete']
  assert 'ppo: preempted' in ended.stdout
  (create, *_), (ssh, *_) = (
    [call for call in calls if verb in call] for verb in ('create', 'ssh')
  )
  for flag in ('--spot', '--accelerator-type=v4-32', '--zone=zone-b'):
    assert flag in create
  remote = ssh[-1].removeprefix('--command=')
  subprocess.run(['bash', '-n'], input=remote, text=True, check=True)
  assert 'git clone --quiet https://host/a\\ b.git instruct_jax' in remote


def test_the_remote_command_goes_on_after_code_75(fake, tmp_path):
  """Run as a worker would, in a checkout that is there."""
  folder = fake(['gcloud'], states('ACTIVE', 'ACTIVE'))
  _, calls = run(folder, LAUNCH / 'tpu_spot.sh', *COMMAND, **SLICE)
  (ssh,) = [call for call in calls if 'ssh' in call]
  remote = ssh[-1].removeprefix('--command=')
  home = tmp_path / 'home'
  (home / 'venv-instruct-jax/bin').mkdir(parents=True)
  (home / 'venv-instruct-jax/bin/activate').write_text('')
  (home / 'instruct_jax').mkdir()
  (home / 'instruct_jax' / 'tpu_setup.sh').write_text('')
  for codes, expected in (([75, 75, 0], 0), ([75, 1], 1)):
    (folder / 'calls').unlink()
    python = folder / 'bin' / 'python'
    python.write_text(STAND_IN)
    python.chmod(0o755)
    (folder / 'answers' / 'python').write_text(
      ''.join(f'\t{code}\n' for code in codes)
    )
    ended = subprocess.run(
      ['bash', '-c', remote],
      cwd=home,
      env={
        **os.environ,
        'HOME': str(home),
        'PATH': f'{folder / "bin"}{os.pathsep}{os.environ["PATH"]}',
        'FAKE': str(folder),
      },
    )
    assert ended.returncode == expected
    lines = (folder / 'calls').read_text().splitlines()
    assert [shlex.split(line) for line in lines] == [[*COMMAND]] * len(codes)
    python.unlink()


def test_a_command_that_fails_is_not_tried_on_another_slice(fake):
  answers = states(*['ACTIVE'] * 4) | {'ssh': [('', 1)]}
  folder = fake(['gcloud'], answers)
  ended, calls = run(folder, LAUNCH / 'tpu_spot.sh', *COMMAND, **SLICE)
  assert ended.returncode == 1
  assert verbs(calls) == ['ssh']
  assert 'queued-resources delete ppo --force' in ended.stderr


def test_a_busy_api_is_asked_again_and_slices_are_counted(fake):
  first = ('NOT_FOUND', 'ACTIVE', 'FAILED', 'FAILED')
  second = ('NOT_FOUND', 'ACTIVE', 'SUSPENDED')
  answers = states(*first, *second) | {
    'ssh': [('', 255), ('', 255)],
    'create': [('', 1), ('', 0)],
  }
  folder = fake(['gcloud'], answers)
  ended, calls = run(
    folder, LAUNCH / 'tpu_spot.sh', *COMMAND, **SLICE, SLICES='2'
  )
  assert ended.returncode == 75
  assert verbs(calls) == ['create', 'create', 'ssh', 'delete', 'create', 'ssh']
  assert 'used up 2 slices' in ended.stderr


def test_an_api_that_does_not_tell_is_no_preemption(fake):
  """Neither is a slice made again, nor the failed command repeated."""
  down = ('HTTP 503',)
  answers = states(*down, 'ACTIVE', *down, 'ACTIVE') | {'ssh': [('', 1)]}
  folder = fake(['gcloud'], answers)
  ended, calls = run(folder, LAUNCH / 'tpu_spot.sh', *COMMAND, **SLICE)
  assert ended.returncode == 1
  assert verbs(calls) == ['ssh']
  assert ended.stderr.count('HTTP 503') == 2
  assert 'ppo: UNKNOWN' in ended.stdout and 'preempted' not in ended.stdout


def test_a_lost_connection_is_tried_again_on_the_same_slice(fake):
  answers = states(*['ACTIVE'] * 3) | {'ssh': [('', 255), ('', 0)]}
  folder = fake(['gcloud'], answers)
  ended, calls = run(folder, LAUNCH / 'tpu_spot.sh', *COMMAND, **SLICE)
  assert ended.returncode == 0, ended.stderr
  assert verbs(calls) == ['ssh', 'ssh', 'delete']


@pytest.mark.parametrize('missing', ['NAME', 'ZONE', 'TYPE', 'REPO'])
def test_what_a_slice_needs_is_asked_for(fake, missing):
  given = {k: v for k, v in SLICE.items() if k != missing}
  ended, calls = run(fake(['gcloud']), LAUNCH / 'tpu_spot.sh', 'x', **given)
  assert ended.returncode != 0 and not calls
  assert f'give {missing}=...' in ended.stderr


# --- SLURM --------------------------------------------------------------------


@pytest.mark.parametrize(
  ('code', 'requeued'), [(0, False), (75, True), (1, False)]
)
def test_slurm_starts_a_process_a_node_and_requeues(fake, code, requeued):
  folder = fake(
    ['scontrol', 'python'],
    {'scontrol': [('node1', 0)], 'python': [('', code)]},
  )
  # The node's part of srun.
  srun = folder / 'bin' / 'srun'
  srun.write_text(
    '#!/usr/bin/env bash\n'
    # As srun does from version 22.05 on.
    'unset SLURM_CPUS_PER_TASK\n'
    '[ "$SRUN_CPUS_PER_TASK" = 32 ] || exit 9\n'
    'SLURM_LOCALID=0 SLURM_PROCID=1 "$@"\n'
  )
  srun.chmod(0o755)
  (folder / 'activate').write_text('')
  venv = folder / 'venv' / 'bin'
  venv.mkdir(parents=True)
  (venv / 'activate').write_text('')
  ended, calls = run(
    folder,
    LAUNCH / 'slurm.sh',
    '--config=configs/x.py',
    '--config.text=two words',
    SLURM_SUBMIT_DIR=str(ROOT),
    SLURM_JOB_NODELIST='node[1-2]',
    SLURM_JOB_ID='7',
    SLURM_NTASKS='2',
    SLURM_CPUS_PER_TASK='32',
    VENV=str(folder / 'venv'),
  )
  assert ended.returncode == code, ended.stderr
  assert calls[:2] == [
    ['scontrol', 'show', 'hostnames', 'node[1-2]'],
    [
      *('python', '-m', 'instruct_jax.main', '--coordinator=node1:9911'),
      *('--num_processes=2', '--process_id=1', '--config=configs/x.py'),
      '--config.text=two words',
    ],
  ]
  assert calls[2:] == [['scontrol', 'requeue', '7']] * requeued


def test_slurm_reads_its_settings():
  """They stand before the first command, or SLURM ignores them."""
  lines = (LAUNCH / 'slurm.sh').read_text().splitlines()
  first = next(i for i, line in enumerate(lines) if line and line[0] != '#')
  settings = [i for i, line in enumerate(lines) if line.startswith('#SBATCH')]
  assert len(settings) >= 6 and max(settings) < first


# --- GKE ----------------------------------------------------------------------

GKE = {'PROJECT': 'p', 'ZONE': 'z', 'CLUSTER': 'c', 'TPU': 'v4-32'}


def test_gke_makes_a_cluster_and_starts_a_job(fake):
  folder = fake(['xpk', 'docker'])
  ended, calls = run(folder, LAUNCH / 'gke.sh', 'cluster', **GKE)
  assert ended.returncode == 0, ended.stderr
  assert calls[0][:3] == ['xpk', 'cluster', 'create']
  assert {'--spot', '--tpu-type=v4-32', '--cluster=c'} <= set(calls[0])
  ended, (_, build, push, create) = run(
    folder,
    LAUNCH / 'gke.sh',
    *('run', 'ppo', '--config=x.py', '--config.text=two words'),
    **GKE,
    IMAGE='host/image',
  )
  assert ended.returncode == 0, ended.stderr
  (tag,) = [word for word in build if word.startswith('host/image:ppo-')]
  assert push == ['docker', 'push', tag]
  assert f'--docker-image={tag}' in create
  assert {'--workload=ppo', '--restart-on-exit-codes=75'} <= set(create)
  assert shlex.split(create[-1].removeprefix('--command=')) == [
    *('python', '-m', 'instruct_jax.main', '--coordinator=auto'),
    *('--config=x.py', '--config.text=two words'),
  ]
  ended, calls = run(folder, LAUNCH / 'gke.sh', **GKE)
  assert ended.returncode == 2 and 'give cluster, or run NAME' in ended.stderr


# --- The image ----------------------------------------------------------------


def instructions():
  """(instruction, arguments) of the Dockerfile, lines joined."""
  text = re.sub(r'(?m)^#.*\n', '', (LAUNCH / 'Dockerfile').read_text())
  joined = text.replace('\\\n', '')
  return [line.split(maxsplit=1) for line in joined.splitlines() if line]


def test_the_dockerfile_is_well_formed():
  found = instructions()
  known = {'FROM', 'ARG', 'ENV', 'WORKDIR', 'COPY', 'RUN', 'ENTRYPOINT'}
  assert {name for name, _ in found} <= known
  assert found[0][0] == 'FROM' and found[-1][0] == 'ENTRYPOINT'
  for name, arguments in found:
    if name == 'RUN':
      subprocess.run(['bash', '-n'], input=arguments, text=True, check=True)
    if name == 'COPY':
      *sources, _ = arguments.split()
      for source in sources:
        assert (ROOT / source).exists(), source
  # What pyproject.toml reads is there before the package is installed.
  copied = ' '.join(arguments for name, arguments in found if name == 'COPY')
  pyproject = (ROOT / 'pyproject.toml').read_text()
  for file in re.findall(r'requirements[\w-]*\.txt', pyproject):
    assert file in copied, file
  assert 'README.md' in copied


@pytest.mark.parametrize(
  ('device', 'wanted'),
  [('tpu', 'jax[tpu]=='), ('cuda12', 'jax[cuda12]=='), ('cpu', 'jax==')],
)
def test_the_image_has_the_pinned_jax_for_its_device(fake, device, wanted):
  """The first RUN, as the build would run it."""
  folder = fake(['pip'])
  install = next(text for name, text in instructions() if name == 'RUN')
  script = folder / 'run.sh'
  script.write_text(f'set -e\n{install}\n')
  ended, ((_, *arguments),) = run(folder, script, DEVICE=device)
  assert ended.returncode == 0, ended.stderr
  pin = re.search(
    r'^jax==(.*)$', (ROOT / 'requirements.txt').read_text(), re.MULTILINE
  )[1]
  assert f'{wanted}{pin}' in arguments
  assert 'requirements-gcs.txt' in arguments


def test_an_unknown_device_is_refused(fake):
  install = next(text for name, text in instructions() if name == 'RUN')
  folder = fake(['pip'])
  script = folder / 'run.sh'
  script.write_text(f'set -e\n{install}\n')
  ended, calls = run(folder, script, DEVICE='abacus')
  assert ended.returncode == 1 and not calls
  assert 'must be tpu, cuda12 or cpu: abacus' in ended.stderr


# --- tpu_setup.sh -------------------------------------------------------------


@pytest.mark.parametrize(('codes', 'ends'), [([1, 1, 0], 0), ([1] * 4, 1)])
def test_the_setup_asks_the_package_index_again(fake, codes, ends):
  folder = fake(['pip'], {'pip': [('', code) for code in codes]})
  text = (ROOT / 'tpu_setup.sh').read_text()
  function = text[text.index('pip_install() {') : text.index("\npython=''")]
  script = folder / 'run.sh'
  script.write_text(f'set -euo pipefail\nPAUSE=0\n{function}\npip_install x\n')
  ended, calls = run(folder, script)
  assert ended.returncode == ends
  assert calls == [['pip', 'install', '--quiet', 'x']] * len(codes)
  assert ('pip could not install x' in ended.stderr) == bool(ends)


@pytest.mark.parametrize('may_install', [True, False])
def test_the_setup_installs_python_where_it_may(tmp_path, may_install):
  """Images of Ubuntu 22.04 have 3.10, and a slice that comes back is new."""
  text = (ROOT / 'tpu_setup.sh').read_text()
  part = text[text.index("python=''") : text.index('"$python" -m venv')]
  script = tmp_path / 'run.sh'
  script.write_text(
    f"""set -euo pipefail
cd {shlex.quote(str(tmp_path))}
hostname() {{ echo vm; }}
command() {{
  case "$2" in
    apt-get) true ;;
    python3.11) [ -e installed ] ;;
    *) false ;;
  esac
}}
sudo() {{
  {'true' if may_install else 'return 1'}
  case "$*" in *"install -y python3.11 python3.11-venv") touch installed ;; esac
}}
{part}
echo "takes $python"
"""
  )
  ended = subprocess.run(
    ['bash', script], capture_output=True, text=True, timeout=60
  )
  if may_install:
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == 'takes python3.11'
  else:
    assert ended.returncode == 1
    assert 'vm: Python 3.11 or newer is needed' in ended.stderr
