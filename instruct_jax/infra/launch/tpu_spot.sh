#!/usr/bin/env bash
# Runs a command on a spot TPU slice until it has ended, on as many slices one
# after the other as that takes. From any machine with gcloud:
#
#   NAME=ppo ZONE=us-central2-b TYPE=v4-32 REPO=https://HOST/instruct_jax.git \
#     bash instruct_jax/infra/launch/tpu_spot.sh \
#     python -m instruct_jax.main --config=configs/ppo_ptx.py:6b \
#     --coordinator=auto --workdir=gs://BUCKET/RUN --config.init=...
#
# NAME: of the queued resource and of the slice. ZONE, TYPE: what is asked for.
# REPO: what every worker clones. RUNTIME: image of the workers. SLICES: how often
# to begin on a slice. POLL: seconds between looks. GRACE: seconds in which a
# preemption shows after the connection broke. KEEP=1: leave the slice at the end.
set -euo pipefail
: "${NAME:?give NAME=...}" "${ZONE:?give ZONE=...}" "${TYPE:?give TYPE=...}"
: "${REPO:?give REPO=...}"
if [ $# -eq 0 ]; then echo 'error: give the command to run' >&2; exit 2; fi
RUNTIME=${RUNTIME:-tpu-ubuntu2204-base}
SLICES=${SLICES:-20} POLL=${POLL:-30} GRACE=${GRACE:-180} KEEP=${KEEP:-}

# Each call twice more: the API refuses now and then.
tpus() {
  local try
  for try in 1 2 3; do
    gcloud compute tpus "$@" --zone="$ZONE" && return
    [ "$try" = 3 ] || sleep "$POLL"
  done
  return 1
}

# State of the queued resource, such as ACTIVE; NONE if there is none, UNKNOWN
# while the API does not tell.
problem=$(mktemp)
trap 'rm -f "$problem"' EXIT
state() {
  if gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
    --format='value(state.state)' 2> "$problem"; then
    return
  fi
  if grep -q NOT_FOUND "$problem"; then echo NONE; return; fi
  cat "$problem" >&2
  echo UNKNOWN
}

# --force deletes the slice with its queued resource.
give_back() {
  tpus queued-resources delete "$NAME" --force --quiet
}

# Waits in the queue, which has no end but yours, until there is a slice.
request() {
  local now
  while true; do
    now=$(state)
    case "$now" in
      ACTIVE) return ;;
      NONE) tpus queued-resources create "$NAME" --node-id="$NAME" --spot \
        --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ;;
      # What was preempted, or could not be made, is asked for anew.
      FAILED | SUSPENDED) give_back ;;
      *) echo "$NAME: $now" ;;
    esac
    sleep "$POLL"
  done
}

# On every worker: the code once, its installation, then the command. Code 75
# says that it was told to stop and has saved, so that it may go on.
remote="test -d instruct_jax || git clone --quiet $(printf '%q' "$REPO") \
instruct_jax; cd instruct_jax && bash tpu_setup.sh && \
source ~/venv-instruct-jax/bin/activate && \
{ until $(printf '%q ' "$@"); do [ \$? -eq 75 ] || exit 1; done; }"

for ((number = 1; number <= SLICES; number++)); do
  request
  echo "$NAME: slice $number of at most $SLICES"
  code=0
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
    --command="$remote" || code=$?
  if [ "$code" -eq 0 ]; then
    [ -n "$KEEP" ] || give_back
    exit 0
  fi
  # A slice that is still there after a while was not preempted.
  waited=0
  while [[ "$(state)" =~ ^(ACTIVE|UNKNOWN)$ ]]; do
    if [ "$waited" -ge "$GRACE" ]; then
      # 255 is ssh's own: it lost the slice, or came before it was ready.
      [ "$code" -ne 255 ] || continue 2
      # Otherwise the command has failed, and another slice would not help.
      echo "error: the command failed on $NAME, which is still there and" \
        "costs money: gcloud compute tpus queued-resources delete $NAME" \
        "--force --zone=$ZONE" >&2
      exit 1
    fi
    sleep "$POLL"
    waited=$((waited + POLL))
  done
  echo "$NAME: preempted"
done
echo "error: used up $SLICES slices or connections; the same command goes on" >&2
exit 75
