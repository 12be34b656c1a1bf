#!/usr/bin/env bash
# Creates the TPU VM $POD at once, or fails where the zone has no chips free. What may wait is create_queued.sh.
#   PROJECT=p ZONE=us-east5-a POD=gdsd ACCELERATOR=v5litepod-8 launch/create_tpu_vm.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require PROJECT ZONE POD ACCELERATOR
describe_accelerator
describe_provisioning

tpus tpu-vm create "$POD" --accelerator-type="$ACCELERATOR" --version="$software" \
  --scopes=https://www.googleapis.com/auth/cloud-platform "${provisioning[@]}"
