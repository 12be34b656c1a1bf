#!/usr/bin/env bash
# Runs COMMAND on every worker of $POD at the same time, in the checkout and with the environment of tpu_env.sh. Fails if
# COMMAND fails on any worker. gcloud repeats COMMAND if a connection breaks: the lock makes the repetition wait. Without a
# fork no other process is between a signal and COMMAND, which saves and then leaves with a code of its own.
#   PROJECT=p ZONE=us-east5-a POD=gdsd launch/run_all.sh python -m gdsd_jax.train --config ... --workdir ...
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require PROJECT ZONE POD
[[ $# -gt 0 ]] || { echo "usage: launch/run_all.sh COMMAND..." >&2 && exit 2; }

on_workers "cd gdsd_jax && source launch/tpu_env.sh && exec flock --no-fork /tmp/gdsd.lock $(printf '%q ' "$@")"
