#!/usr/bin/env bash
# Runs a command again when it fails, so that a lost machine or a broken collective at night does not end the run:
# every try goes on from the newest checkpoint that verifies.
#
#   RETRIES=5 launch/retry.sh launch/multi_node.sh launch/train.py --deepspeed ds_configs/zero3.json ...
#
# Settings (environment variables):
#   RETRIES        how often a failed command is run again (default: 3)
#   PAUSE_SECONDS  before each of them: machines must notice that their peers are gone (default: 60)
#
# Not run again: 0 done, 2 wrong input, 75 stopped well (somebody asked for it), 130 and 143 (interrupted).
# The exit code is the last try's.
set -euo pipefail

(($#)) || { echo "error: name the command, as in: $0 launch/single_node.sh launch/train.py ..." >&2; exit 2; }
tries_left=${RETRIES:-3}
[[ $tries_left =~ ^(0|[1-9][0-9]*)$ ]] || { echo "error: RETRIES=$tries_left is not a whole number" >&2; exit 2; }
while true; do
  code=0
  "$@" || code=$?
  case $code in
    0 | 2 | 75 | 130 | 143) exit "$code" ;;
  esac
  ((tries_left > 0)) || exit "$code"
  tries_left=$((tries_left - 1))
  echo "retry.sh: exit code $code; again in ${PAUSE_SECONDS:-60} s, $tries_left more after that" >&2
  sleep "${PAUSE_SECONDS:-60}"
done
