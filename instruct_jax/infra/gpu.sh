#!/bin/bash
# What a GPU computes and how fast, in about ten minutes, without network:
#
#   instruct_jax/infra/gpu.sh FOLDER [PYTHON]
#
# FOLDER gets a work directory for each line below. PYTHON, of an environment
# with torch and transformers, sets the same works in PyTorch beside ours. A
# work that fails or takes too long leaves the others alone.
set -u
cd "$(dirname "$0")/../.."
folder=${1:?give a folder for the results}
peer=${2:-}
export JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
# First whether the GPU agrees with the CPU, then the times.
for limited in tiny,check:90 s,check:90 s,iteration:60 135m,iteration:90 \
  135m,sft:60 1p3b,iteration:150 1p3b,sft:60; do
  work=${limited%:*} seconds=${limited#*:}
  timeout "$seconds" python -m instruct_jax.main \
    --config="configs/speed.py:$work" --workdir="$folder/${work/,/_}" \
    --config.policy.compute_dtype=bfloat16 \
    --config.scalar.compute_dtype=bfloat16 \
    || echo "$work: ended with $?"
done
[ -n "$peer" ] || exit 0
for work in s,iteration 135m,iteration 135m,sft; do
  timeout 120 python -m instruct_jax.main \
    --config="configs/speed.py:$work" \
    --workdir="$folder/beside_torch_${work/,/_}" \
    --config.hf_python="$peer" --config.num_iterations=5 \
    || echo "$work beside torch: ended with $?"
done
