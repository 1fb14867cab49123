#!/usr/bin/env bash
# One machine: a rank for each of its accelerators.
#
#   launch/single_node.sh launch/train.py --deepspeed ds_configs/zero3.json --config RECIPE.yaml [section.key=value ...]
#
# Settings (environment variables):
#   NUM_GPUS     ranks to start (default: as many as there are accelerators, heeding CUDA_VISIBLE_DEVICES)
#   MASTER_PORT  port on which they meet (default: a free one, so that two jobs on one machine get along)
#
# The exit code is the program's: 0 done, 1 failed, 2 wrong input, 75 stopped well (the same command goes on).
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

(($#)) || fail "name the program, as in: $0 launch/train.py --deepspeed ds_configs/zero3.json"
command -v deepspeed >/dev/null || fail "there is no 'deepspeed' on the PATH; activate the environment recap_ds is in"
MASTER_PORT=${MASTER_PORT:-$(free_port)}

# No hostfile: DeepSpeed would otherwise read /job/hostfile where there is one, and leave this machine.
exec deepspeed --hostfile /dev/null ${NUM_GPUS:+--num_gpus "$NUM_GPUS"} --master_port "$MASTER_PORT" "$@"
