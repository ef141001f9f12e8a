#!/usr/bin/env bash
# Installs instruct_jax and its pinned stack on a TPU VM, then checks the chips.
#
#   one VM:      bash tpu_setup.sh
#   whole pod:   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \
#                  --command='cd instruct_jax && bash tpu_setup.sh'
#
# The repository must lie on every worker (git clone with --worker=all first).
# Set VENV to choose another folder for the environment.
set -euo pipefail
cd "$(dirname "$0")"
VENV=${VENV:-$HOME/venv-instruct-jax}

python=''
for candidate in python3.12 python3.11; do
  if command -v "$candidate" > /dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
  echo 'error: Python 3.11 or newer is needed.' >&2
  echo 'On Ubuntu 22.04: sudo apt-get install -y python3.11 python3.11-venv' >&2
  exit 1
fi

"$python" -m venv "$VENV"
# shellcheck disable=SC1091
source "$VENV/bin/activate"
pip install --quiet --upgrade pip
# The same jax as everywhere, with the TPU runtime it was released with.
jax=$(grep '^jax==' requirements.txt)
pip install --quiet "${jax/jax==/jax[tpu]==}" -r requirements.txt \
  -f https://storage.googleapis.com/jax-releases/libtpu_releases.html
pip install --quiet --no-deps -e .

python - <<'PYTHON'
import jax
import jax.numpy as jnp

# On a pod every worker runs this script at the same time, and must.
if jax.default_backend() != 'tpu':
  raise SystemExit(
    f'error: jax found {jax.default_backend()}, not a TPU. Is another process '
    'holding the chips (sudo lsof /dev/accel* /dev/vfio/*)? Is this a TPU VM?'
  )
devices = jax.local_devices()
total = jax.pmap(lambda x: jax.lax.psum(x, 'i'), axis_name='i')(
  jnp.ones(len(devices))
)
if int(total[0]) != len(devices):
  raise SystemExit(f'error: a sum over {len(devices)} chips gave {total[0]}')
print(f'ok: {len(devices)} x {devices[0].device_kind} on this host')
PYTHON
echo "Next: source $VENV/bin/activate"
echo '      python -m instruct_jax.main --config=configs/ppo_ptx.py'
