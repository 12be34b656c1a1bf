#!/usr/bin/env bash
# Runs on each worker of a pod, from setup.sh: installs a newer Python (TPU VM images have 3.10) and the pinned
# requirements, mounts BUCKET, if given, at /mnt/gdsd, and checks that all workers together see CHIPS devices.
#   launch/setup_worker.sh CHIPS [BUCKET]
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"
[[ $# == 1 || $# == 2 ]] || { echo "usage: launch/setup_worker.sh CHIPS [BUCKET]" >&2 && exit 2; }

uv=$HOME/.gdsd_jax_uv
environment=$here/../.venv-tpu
run python3 -m pip install --quiet --target "$uv" uv==0.13.9
run "$uv/bin/uv" venv --quiet --allow-existing --managed-python --python 3.12 "$environment"
run "$uv/bin/uv" pip install --quiet --python "$environment" --requirement "$here/../requirements-tpu.txt"
[[ -z ${2:-} ]] || "$here/mount_bucket.sh" "$2" /mnt/gdsd
run "$environment/bin/python" "$here/check_devices.py" "$1"
