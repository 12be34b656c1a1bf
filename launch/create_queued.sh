#!/usr/bin/env bash
# Requests the TPU VM $POD as a queued resource and waits until it is active. A resource that was preempted or has failed
# is deleted and requested again; one that is already active is left alone.
#   PROVISIONING=spot PROJECT=p ZONE=us-east5-a POD=gdsd ACCELERATOR=v5p-64 launch/create_queued.sh
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/common.sh"
require PROJECT ZONE POD ACCELERATOR
describe_accelerator
describe_provisioning

while :; do
  state=$(pod_state)
  echo "$POD: ${state:-not requested yet}" >&2
  case $state in
    ACTIVE) exit 0 ;;
    SUSPENDED | FAILED) "$here/delete.sh" ;;
    '')
      tpus queued-resources create "$POD" --node-id="$POD" --accelerator-type="$ACCELERATOR" \
        --runtime-version="$software" --scopes=https://www.googleapis.com/auth/cloud-platform "${provisioning[@]}"
      ;;
  esac
  [[ ${DRY_RUN:-} != 1 ]] || exit 0
  sleep 30
done
