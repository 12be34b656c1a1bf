#!/usr/bin/env bash
# Creates the TPU VM $POD at once, or fails if the zone has no free chips. create_queued.sh waits for them instead.
#   PROJECT=p ZONE=us-east5-a POD=gdsd ACCELERATOR=v5litepod-8 launch/create_tpu_vm.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require PROJECT ZONE POD ACCELERATOR
describe_accelerator
describe_provisioning

tpus tpu-vm create "$POD" --accelerator-type="$ACCELERATOR" --version="$software" \
  --scopes=https://www.googleapis.com/auth/cloud-platform "${provisioning[@]}"
