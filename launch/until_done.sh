#!/usr/bin/env bash
# Runs COMMAND on the pod until it is done. After a preemption it requests and sets up the pod again and restarts COMMAND,
# which resumes from its last checkpoint. Gives up if COMMAND fails ATTEMPTS times (default 5) without a preemption.
# To stop a run for good, end this script before stop.sh.
#   PROVISIONING=spot PROJECT=p ZONE=us-east5-a POD=gdsd ACCELERATOR=v5p-64 \
#     launch/until_done.sh python -m gdsd_jax.train --config ... --workdir /mnt/gdsd/runs/NAME
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/common.sh"
require PROJECT ZONE POD ACCELERATOR
[[ $# -gt 0 ]] || { echo "usage: launch/until_done.sh COMMAND..." >&2 && exit 2; }

# Training that SIGTERM has stopped has saved and is not done: here it leaves with this code, not with 0.
stopped=75
failures=0
until "$here/create_queued.sh" && "$here/setup.sh" && "$here/stop.sh" &&
  "$here/run_all.sh" env GDSD_STOPPED_EXIT_CODE=$stopped "$@"; do
  code=$?
  # If the cloud does not answer, the failure counts, so that the loop ends.
  if state=$(pod_state) && [[ $state != ACTIVE ]]; then
    failures=0
  elif ((code != stopped && ++failures == ${ATTEMPTS:-5})); then
    echo "$POD: failed $failures times without a preemption, giving up" >&2
    exit 1
  fi
  sleep 60
done
