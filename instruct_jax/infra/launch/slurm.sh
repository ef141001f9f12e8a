#!/usr/bin/env bash
# A run on GPUs by SLURM, from the checkout, with a work directory that all nodes
# see:
#
#   sbatch --nodes=2 instruct_jax/infra/launch/slurm.sh \
#     --config=configs/ppo_ptx.py:1p3b --workdir=/shared/RUN --config.init=...
#
# VENV: the environment with requirements.txt and jax[cuda12]. PORT: a free one.
#
# One process a node, with all of its GPUs: the tensor axis stays in a process.
#SBATCH --job-name=instruct_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
# Tokenizing and loading have threads.
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
# SIGTERM two minutes before that: the run saves at its next step and ends with
# code 75. A preemption sends it too.
#SBATCH --signal=TERM@120
# The same job may run again, and adds to its output.
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
# sbatch runs a copy of this file elsewhere.
cd "${SLURM_SUBMIT_DIR:?run this file by sbatch}"
# shellcheck disable=SC1091
source "${VENV:-.venv}/bin/activate"
# The first node keeps the service through which the processes meet.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export COORDINATOR="$first:${PORT:-9911}"
# From SLURM 22.05 on, srun does not know what sbatch was asked for.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-32}"
# As plans assume; jax takes three quarters otherwise.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}"
code=0
# Each node fills in its own number. Where jax finds SLURM_LOCALID, it gives a
# process one GPU alone.
# shellcheck disable=SC2016
srun bash -c '
  unset SLURM_LOCALID
  exec python -m instruct_jax.main --coordinator="$COORDINATOR" \
    --num_processes="$SLURM_NTASKS" --process_id="$SLURM_PROCID" "$@"
' instruct_jax "$@" || code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
