#!/usr/bin/env bash
# Ends the command that run_all.sh started: sends SIGTERM, at which training saves, and after two minutes SIGKILL.
#   PROJECT=p ZONE=us-east5-a POD=gdsd launch/stop.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require PROJECT ZONE POD

pattern="'python.*[g]dsd_jax[.]'" # the brackets keep it from matching the shell that runs pkill
on_workers "pkill -TERM -f $pattern; timeout 120 flock /tmp/gdsd.lock true || pkill -KILL -f $pattern"
