#!/usr/bin/env bash
# Runs on each worker of a pod, from setup.sh: a Python of its own (TPU VM images ship 3.10), the pinned requirements, and
# a check that all workers together see CHIPS devices.
# With a bucket, that is mounted at /mnt/gdsd.
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
