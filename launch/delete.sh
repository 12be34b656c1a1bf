#!/usr/bin/env bash
# Deletes $POD: its queued resource with its VMs, or the VM that create_tpu_vm.sh made.
#   PROJECT=p ZONE=us-east5-a POD=gdsd launch/delete.sh [queued|vm]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require PROJECT ZONE POD

case ${1:-queued} in
  queued) tpus queued-resources delete "$POD" --force ;;
  vm) tpus tpu-vm delete "$POD" ;;
  *) echo "usage: launch/delete.sh [queued|vm]" >&2 && exit 2 ;;
esac
