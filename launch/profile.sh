#!/usr/bin/env bash
# Traces a command that runs under launch/with_profiler.py for MILLISECONDS (default 5000) on every worker, and copies the
# traces to the bucket as one run. To view it: pip install xprof gcsfs && xprof --logdir=gs://BUCKET/profiles
#   PROJECT=p ZONE=us-east5-a POD=gdsd PROFILES=gs://BUCKET/profiles launch/profile.sh [MILLISECONDS]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require PROJECT ZONE POD PROFILES

taken=$PROFILES/plugins/profile/$(date +%Y_%m_%d_%H_%M_%S)/
trace="python -m jax.collect_profile ${PROFILER_PORT:-9012} ${1:-5000} --host=\$(hostname) --log_dir=/tmp/profile"
on_workers "cd gdsd_jax && source launch/tpu_env.sh && rm -rf /tmp/profile && $trace --no_perfetto_link && \
gcloud storage cp '/tmp/profile/plugins/profile/*/*' $taken"
