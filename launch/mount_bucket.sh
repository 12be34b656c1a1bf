#!/usr/bin/env bash
# Runs on each worker of a pod, from setup_worker.sh: mounts a bucket, so that all workers see one directory for runs.
#   launch/mount_bucket.sh BUCKET DIRECTORY
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ $# == 2 ]] || { echo "usage: launch/mount_bucket.sh BUCKET DIRECTORY" >&2 && exit 2; }

if ! command -v gcsfuse >/dev/null; then
  source /etc/os-release
  key=/usr/share/keyrings/cloud.google.asc
  archive="deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$VERSION_CODENAME main"
  run sudo curl --silent --show-error --fail --output "$key" https://packages.cloud.google.com/apt/doc/apt-key.gpg
  run sudo bash -c "echo '$archive' >/etc/apt/sources.list.d/gcsfuse.list"
  run sudo apt-get update --quiet
  run sudo apt-get install --quiet --yes gcsfuse
fi
if ! mountpoint --quiet "$2"; then
  run sudo install --directory --owner "$(id -un)" "$2"
  # A checkpoint appears under its name by the renaming of a directory.
  run gcsfuse --implicit-dirs --rename-dir-limit=100000 "$1" "$2"
fi
