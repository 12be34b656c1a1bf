# shellcheck shell=bash disable=SC2034 # what it sets is read by the scripts that source it
# Sourced by the scripts beside it. Settings come from the environment:
#   PROJECT, ZONE   of the cloud
#   POD             name of the TPU, and of its queued resource
#   ACCELERATOR     its type: v5litepod-8 (chips), v5p-64 (cores, two a chip), v6e-16 (chips)
#   PROVISIONING    on-demand (default), spot or reserved
#   DRY_RUN=1       prints every command, quoted for a shell, and runs none
set -euo pipefail
exec 3>&1 # the output of a dry run also reaches the terminal from inside $(...)

run() {
  if [[ ${DRY_RUN:-} == 1 ]]; then
    { printf '%q ' "$@" && echo; } >&3
  else
    "$@"
  fi
}

require() {
  local name
  for name; do
    [[ -n ${!name:-} ]] || { echo "${0##*/}: set $name, see launch/README.md" >&2 && exit 2; }
  done
}

tpus() { run gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet; }

on_workers() { tpus tpu-vm ssh "$POD" --worker=all --command="$1"; }

# Prints the state of the queued resource, or nothing if there is none.
pod_state() { tpus queued-resources list --filter="name~/$POD\$" --format='value(state.state)'; }

# Sets `software`, the image of the TPU VMs, and `chips`, the number of devices in JAX.
describe_accelerator() {
  chips=${ACCELERATOR##*-}
  case $ACCELERATOR in
    v5litepod-*) software=v2-alpha-tpuv5-lite ;;
    v5p-*) software=v2-alpha-tpuv5 && chips=$((chips / 2)) ;;
    v6e-*) software=v2-alpha-tpuv6e ;;
    *) echo "ACCELERATOR=$ACCELERATOR is none of v5litepod-N, v5p-N, v6e-N" >&2 && exit 2 ;;
  esac
}

# Sets `provisioning`, the flags of the kind of reservation.
describe_provisioning() {
  case ${PROVISIONING:-on-demand} in
    on-demand) provisioning=() ;;
    spot | reserved) provisioning=("--$PROVISIONING") ;;
    *) echo "PROVISIONING=$PROVISIONING is none of on-demand, spot, reserved" >&2 && exit 2 ;;
  esac
}
