#!/usr/bin/env bash
# Runs COMMAND on a GKE cluster with TPU node pools: builds and pushes the image of launch/Dockerfile, then hands it to xpk
# (pip install xpk), which makes a JobSet with one pod per host. With SLICES above 1, the data axis spans several slices
# and the network between them. STORAGE names the storage that `xpk storage attach` has mounted at /mnt/gdsd. A preempted
# job is restarted and resumes from its last checkpoint: training that SIGTERM has stopped leaves with 75 here, not with 0.
#   PROJECT=p ZONE=us-east5-a CLUSTER=c POD=gdsd ACCELERATOR=v5p-64 IMAGE=us-docker.pkg.dev/p/r/gdsd_jax:1 \
#     launch/gke.sh python -m gdsd_jax.train --config ... --workdir /mnt/gdsd/runs/NAME
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/common.sh"
require PROJECT ZONE CLUSTER POD ACCELERATOR IMAGE
[[ $# -gt 0 ]] || { echo "usage: launch/gke.sh COMMAND..." >&2 && exit 2; }

storage=()
[[ -z ${STORAGE:-} ]] || storage=("--storage=$STORAGE")

run docker build --file "$here/Dockerfile" --tag "$IMAGE" "$here/.."
run docker push "$IMAGE"
run xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$POD" \
  --tpu-type="$ACCELERATOR" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" "${storage[@]}" \
  --max-restarts=100 --restart-on-exit-codes=1,3,75 --termination-grace-period-seconds=120 \
  --command="cd /gdsd_jax && source launch/tpu_env.sh && export GDSD_STOPPED_EXIT_CODE=75 && exec $(printf '%q ' "$@")"
