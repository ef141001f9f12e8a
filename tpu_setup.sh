#!/usr/bin/env bash
# Installs instruct_jax and its pinned stack on a TPU VM, or on all workers of a
# pod, then checks every chip and the links between them.
#
#   one VM:      bash tpu_setup.sh
#   whole pod:   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \
#                  --command='cd instruct_jax && bash tpu_setup.sh'
#
# On a queued resource, the same with its node's name. For a spot slice that may
# be taken away, instruct_jax/infra/launch/tpu_spot.sh asks for one, runs this
# file and then a command, and asks for the next slice when it has to.
#
# The repository must lie on every worker, in the same place (git clone with
# --worker=all first). VENV: another folder for the environment. WAIT: seconds
# that the check waits for workers that install more slowly (600). PAUSE: seconds
# before the package index is asked again (20), three times.
#
# When it fails:
#   no Python 3.11      it is installed where sudo asks for no password; if not,
#                       the line that it prints does it; then run it again
#   pip finds no jax    another Python is first in PATH; look at $VENV/bin
#   the check waits     a worker does not run it: with a pod, --worker=all; the
#                       one that is missing is in the error after WAIT seconds
#   not a TPU, or busy  another process holds the chips; the error says how to
#                       find it. After a preemption: make the slice anew
#   a wrong sum         a chip or a link is broken: delete the slice, make it
#                       anew, and report the worker's name to Google
set -euo pipefail
cd "$(dirname "$0")"
VENV=${VENV:-$HOME/venv-instruct-jax}
export WAIT=${WAIT:-600}
PAUSE=${PAUSE:-20}

# A machine that has just begun may not reach the package index yet.
pip_install() {
  local try
  for try in 1 2 3 4; do
    pip install --quiet "$@" && return
    [ "$try" = 4 ] || sleep "$PAUSE"
  done
  echo "error: $(hostname): pip could not install $*" >&2
  return 1
}

python=''
find_python() {
  local candidate
  for candidate in python3.12 python3.11; do
    if command -v "$candidate" > /dev/null; then python=$candidate; return; fi
  done
}
find_python
# TPU images of Ubuntu 22.04 come with Python 3.10; a slice that was just made
# has nobody to install another.
if [ -z "$python" ] && command -v apt-get > /dev/null &&
  sudo -n true 2> /dev/null; then
  echo "$(hostname): installs Python 3.11"
  { sudo apt-get -q -o DPkg::Lock::Timeout=300 update &&
    sudo apt-get -q -o DPkg::Lock::Timeout=300 install -y \
      python3.11 python3.11-venv; } || true
  find_python
fi
if [ -z "$python" ]; then
  echo "error: $(hostname): Python 3.11 or newer is needed." >&2
  echo 'On Ubuntu 22.04: sudo apt-get update &&' \
    'sudo apt-get install -y python3.11 python3.11-venv' >&2
  exit 1
fi

"$python" -m venv "$VENV"
# shellcheck disable=SC1091
source "$VENV/bin/activate"
pip_install --upgrade pip
# The same jax as everywhere, with the TPU runtime it was released with; gcsfs
# for work directories and data on gs://.
jax=$(grep '^jax==' requirements.txt)
pip_install "${jax/jax==/jax[tpu]==}" -r requirements.txt \
  -r requirements-gcs.txt \
  -f https://storage.googleapis.com/jax-releases/libtpu_releases.html
pip_install --no-deps -e .

python -m instruct_jax.infra.device_check --backend=tpu --wait="$WAIT"
echo "Next, on all workers alike: source $VENV/bin/activate"
echo '  one VM: python -m instruct_jax.main --config=configs/ppo_ptx.py'
echo '  a pod:  the same with --coordinator=auto --workdir=gs://BUCKET/RUN'
