#!/bin/bash
# What a GPU computes and how fast, in ten minutes, without network:
#
#   instruct_jax/infra/gpu.sh FOLDER [PYTHON]
#
# FOLDER gets a work directory for each work below. PYTHON, of an environment
# with torch and transformers, sets some of them in PyTorch beside ours. A work
# that fails or takes too long leaves the others alone; if one does, the script
# ends with 1. WORKS and BESIDE are other works, each with its limit in seconds:
#
#   JAX_PLATFORMS=cpu WORKS='tiny,check:300 tiny,sft:300' BESIDE= \
#     instruct_jax/infra/gpu.sh FOLDER
set -u
cd "$(dirname "$0")/../.."
folder=${1:?give a folder for the results}
peer=${2:-}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
# First whether the GPU agrees with the CPU, then the times.
works=${WORKS-tiny,check:45 s,check:60 s,iteration:45 135m,iteration:75 \
  135m,sft:45 1p3b,iteration:120 1p3b,sft:45}
beside=${BESIDE-135m,iteration:105 135m,sft:60}
code=0

measure() {  # WORK:SECONDS NAME FLAG...
  local work=${1%:*} seconds=${1#*:} name=$2
  shift 2
  timeout "$seconds" python -m instruct_jax.main \
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
    measure "$work" "beside_torch_${name/,/_}" --config.hf_python="$peer" \
      --config.num_iterations=5
  done
fi
exit "$code"
