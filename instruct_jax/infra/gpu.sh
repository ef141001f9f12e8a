#!/bin/bash
# What a GPU computes and how fast, in nine minutes, without network:
#
#   instruct_jax/infra/gpu.sh FOLDER [PEER]
#
# FOLDER gets a work directory for each work below. PEER, the Python of an
# environment with torch and transformers, sets some of them in PyTorch beside
# ours. A work that fails or takes too long leaves the others alone; if one does,
# the script ends with 1. PYTHON runs ours (python3). WORKS are other works, each
# with its limit in seconds; those with +torch have PyTorch beside ours:
#
#   JAX_PLATFORMS=cpu WORKS='tiny,check:300 tiny,sft+torch:300' \
#     instruct_jax/infra/gpu.sh FOLDER PEER
set -u
cd "$(dirname "$0")/../.."
folder=${1:?give a folder for the results}
peer=${2:-}
python=${PYTHON:-python3}
seconds_in_all=${SECONDS_IN_ALL:-540}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
# First whether the GPU agrees with the CPU, then the times, what matters most
# first: what the time does not suffice for is left out.
works=${WORKS-tiny,check:90 s,check:120 s,iteration:60 135m,sft+torch:90 \
  135m,iteration+torch:180 135m,iteration:90 1p3b,sft:90 1p3b,iteration:150}
code=0

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader \
  || true
"$python" -c '
import instruct_jax.main, instruct_jax.jobs.speed, jax
print("jax", jax.__version__, *(d.device_kind for d in jax.devices()), sep=", ")
' || {
  echo "$python lacks a package or a device: instruct_jax/infra/README.md," \
    "On a GPU"
  exit 1
}
# Trying every form of every product takes longer than a check has.
untuned=--xla_gpu_autotune_level=0
if ! XLA_FLAGS=$untuned "$python" -c 'import jax; jax.devices()' 2> /dev/null
then untuned=  # Not known to this jax.
fi

measure() {  # WORK:SECONDS NAME FLAG...
  local work=${1%:*} seconds=${1#*:} name=$2
  local left=$((seconds_in_all - SECONDS))
  shift 2
  if [ "$left" -le 5 ]; then
    echo "$name: left out, the $seconds_in_all s are over"
    code=1
    return
  fi
  # One that does not end when asked, in a long compilation, is ended.
  timeout -k 5 "$((seconds < left - 5 ? seconds : left - 5))" \
    "$python" -m instruct_jax.main \
    --config="configs/speed.py:$work" --workdir="$folder/$name" \
    --config.policy.compute_dtype=bfloat16 \
    --config.scalar.compute_dtype=bfloat16 "$@" \
    || { echo "$name: ended with $?"; code=1; }
}

for work in $works; do
  name=${work%:*}
  case $name in
  *,check)
    XLA_FLAGS=$untuned measure "$work" "${name/,/_}" \
      --config.ppo.response_length=32
    ;;
  *+torch)
    name=${name%+torch}
    [ -z "$peer" ] || JAX_PLATFORMS=cpu measure "$name:${work#*:}" \
      "beside_torch_${name/,/_}" --config.hf_python="$peer" \
      --config.platforms="$JAX_PLATFORMS" \
      --config.torch_precisions=bfloat16 --config.num_warmups=1 \
      --config.num_iterations=5 --config.reward=tokens --config.saves=False
    ;;
  *)
    measure "$work" "${name/,/_}" --config.saves=False
    ;;
  esac
done
exit "$code"
