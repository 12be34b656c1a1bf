#!/usr/bin/env bash
# Ends the command that run_all.sh started: SIGTERM, at which training saves, and SIGKILL to what is left after two minutes.
#   PROJECT=p ZONE=us-east5-a POD=gdsd launch/stop.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require PROJECT ZONE POD

pattern="'python.*[g]dsd_jax[.]'" # brackets: not the shell that runs pkill itself
on_workers "pkill -TERM -f $pattern; timeout 120 flock /tmp/gdsd.lock true || pkill -KILL -f $pattern"
