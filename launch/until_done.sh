#!/usr/bin/env bash
# Runs COMMAND on the pod until it has succeeded: after a preemption the pod is asked for again, set up, and the command,
# which goes on from its last checkpoint, started anew. Gives up when it fails ATTEMPTS times (5) on a pod that is still there.
#   PROVISIONING=spot PROJECT=p ZONE=us-east5-a POD=gdsd ACCELERATOR=v5p-64 \
#     launch/until_done.sh python -m gdsd_jax.train --config ... --workdir /mnt/gdsd/runs/NAME
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/common.sh"
require PROJECT ZONE POD ACCELERATOR
[[ $# -gt 0 ]] || { echo "usage: launch/until_done.sh COMMAND..." >&2 && exit 2; }

failures=0
until "$here/create_queued.sh" && "$here/setup.sh" && "$here/stop.sh" && "$here/run_all.sh" "$@"; do
  # A cloud that does not answer counts as a pod that is there: it must not be asked for ever.
  if state=$(pod_state) && [[ $state != ACTIVE ]]; then
    failures=0
  elif ((++failures == ${ATTEMPTS:-5})); then
    echo "$POD: failed $failures times without a preemption, giving up" >&2
    exit 1
  fi
  sleep 60
done
