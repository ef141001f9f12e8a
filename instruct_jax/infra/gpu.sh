#!/bin/bash
# What a GPU computes and how fast, in ten minutes, without network:
#
#   instruct_jax/infra/gpu.sh FOLDER [PEER]
#
# FOLDER gets a work directory for each work below. PEER, the Python of an
# environment with torch and transformers, sets some of them in PyTorch beside
# ours. A work that fails or takes too long leaves the others alone; if one does,
# the script ends with 1. PYTHON runs ours (python3). WORKS and BESIDE are other
# works, each with its limit in seconds:
#
#   JAX_PLATFORMS=cpu WORKS='tiny,check:300 tiny,sft:300' BESIDE= \
#     instruct_jax/infra/gpu.sh FOLDER
set -u
cd "$(dirname "$0")/../.."
folder=${1:?give a folder for the results}
peer=${2:-}
python=${PYTHON:-python3}
seconds_in_all=${SECONDS_IN_ALL:-600}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
# First whether the GPU agrees with the CPU, then the times.
works=${WORKS-tiny,check:60 s,check:60 s,iteration:45 135m,iteration:75 \
  135m,sft:45 1p3b,iteration:150 1p3b,sft:60}
beside=${BESIDE-135m,sft:60 135m,iteration:105}
code=0

"$python" -c 'import instruct_jax.main, instruct_jax.jobs.speed' || {
  echo "$python lacks a package: instruct_jax/infra/README.md, 'On a GPU'"
  exit 1
}

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
  measure "$work" "${name/,/_}"
done
if [ -n "$peer" ]; then
  for work in $beside; do
    name=${work%:*}
    JAX_PLATFORMS=cpu measure "$work" "beside_torch_${name/,/_}" \
      --config.hf_python="$peer" --config.platforms="$JAX_PLATFORMS" \
      --config.torch_precisions=bfloat16 --config.num_iterations=5 \
      --config.reward=tokens
  done
fi
exit "$code"
