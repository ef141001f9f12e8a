#!/usr/bin/env bash
# A run on TPUs of Google Kubernetes Engine by XPK (pip install xpk), from the
# checkout:
#
#   export PROJECT=... ZONE=us-central2-b CLUSTER=rlhf TPU=v4-32 \
#     IMAGE=us-docker.pkg.dev/PROJECT/REPOSITORY/instruct_jax
#   bash instruct_jax/infra/launch/gke.sh cluster
#   bash instruct_jax/infra/launch/gke.sh run ppo \
#     --config=configs/ppo_ptx.py:6b --workdir=gs://BUCKET/RUN --config.init=...
#
# `cluster` makes a cluster with one spot slice, once. `run NAME ...` builds the
# image, uploads it and starts the job NAME. RESTARTS: how often it may start
# again after a preemption. DOCKER: another program than docker.
set -euo pipefail
cd "$(dirname "$0")/../../.."
: "${PROJECT:?give PROJECT=...}" "${ZONE:?give ZONE=...}"
: "${CLUSTER:?give CLUSTER=...}" "${TPU:?give TPU=...}"
where=(--project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER")

case "${1:-}" in
  cluster)
    # Spot machines cost less and may be taken away at any time.
    xpk cluster create "${where[@]}" --tpu-type="$TPU" --num-slices=1 --spot
    ;;
  run)
    name=${2:?give the name of the job}
    : "${IMAGE:?give IMAGE=...}"
    shift 2
    # A tag of its own, so that a restart finds the code that the run began with.
    image="$IMAGE:$name-$(date -u +%Y%m%d-%H%M%S)"
    "${DOCKER:-docker}" build --build-arg DEVICE=tpu --tag "$image" \
      --file instruct_jax/infra/launch/Dockerfile .
    "${DOCKER:-docker}" push "$image"
    # The grace lets a run save when its machine is taken away. Code 75, with
    # which it then ends, starts it again beside what XPK restarts by itself.
    xpk workload create "${where[@]}" --workload="$name" --tpu-type="$TPU" \
      --num-slices=1 --docker-image="$image" \
      --max-restarts="${RESTARTS:-50}" --restart-on-exit-codes=75 \
      --termination-grace-period-seconds=120 \
      --command="$(printf '%q ' python -m instruct_jax.main --coordinator=auto "$@")"
    ;;
  *)
    echo 'error: give cluster, or run NAME --config=...; see the top' >&2
    exit 2
    ;;
esac
