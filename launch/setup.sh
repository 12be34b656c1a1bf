#!/usr/bin/env bash
# Copies the committed state of this checkout to every worker of $POD, into ~/gdsd_jax, and runs setup_worker.sh there.
# BUCKET, if set, is mounted at /mnt/gdsd on each of them.
#   PROJECT=p ZONE=us-east5-a POD=gdsd ACCELERATOR=v5p-64 launch/setup.sh
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/common.sh"
require PROJECT ZONE POD ACCELERATOR
describe_accelerator

archive=${TMPDIR:-/tmp}/gdsd_jax.tar.gz
run git -C "$here/.." archive --format=tar.gz --output="$archive" HEAD
tpus tpu-vm scp "$archive" "$POD:" --worker=all
on_workers "mkdir -p gdsd_jax && tar -xzf gdsd_jax.tar.gz -C gdsd_jax && gdsd_jax/launch/setup_worker.sh $chips ${BUCKET:-}"
