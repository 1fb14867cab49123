#!/usr/bin/env bash
# Several machines named in a hostfile, over ssh (pdsh), or without ssh by running this on each of them.
#
#   launch/multi_node.sh launch/train.py --deepspeed ds_configs/zero3.json --config RECIPE.yaml [section.key=value ...]
#
# Every machine needs this folder, the Python environment and the shards under the same paths; see hostfile.example.
#
# Settings (environment variables):
#   HOSTFILE           machines and their accelerators (default: launch/hostfile)
#   NODE_RANK          set: no ssh. Run the same command on every machine, with NODE_RANK=0 on the first, 1 on the next
#   MASTER_ADDR        the first machine's address as the others reach it
#                      (default: the first that 'hostname -I' prints there; with NODE_RANK: its name in the hostfile)
#   MASTER_PORT        port on which the ranks meet (default: a free one of the first machine; with NODE_RANK: 29500)
#   SSH_PORT           (default: ssh's own)
#   SSH_ALIVE_SECONDS  a machine that has been silent for so long is given up (default: 60)
#   DS_ENV_FILE        NAME=value lines for every rank: NCCL_SOCKET_IFNAME=ib0 ...
#                      (default: .deepspeed_env in the home folder and in this one)
#
# The exit code is the largest of any machine: 0 done, 1 failed, 2 wrong input, 75 stopped well (the same command goes
# on), 255 a machine was lost.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

(($#)) || fail "name the program, as in: $0 launch/train.py --deepspeed ds_configs/zero3.json"
HOSTFILE=${HOSTFILE:-launch/hostfile}
[[ -f $HOSTFILE ]] || fail "there is no hostfile '$HOSTFILE'; write one like launch/hostfile.example, or set HOSTFILE"
command -v deepspeed >/dev/null || fail "there is no 'deepspeed' on the PATH; activate the environment recap_ds is in"
mapfile -t hosts < <(awk '!/^[[:space:]]*(#|$)/ {print $1}' "$HOSTFILE")
((${#hosts[@]})) || fail "$HOSTFILE names no machine; write lines like 'node-0 slots=8'"
first_host=${hosts[0]}

if [[ -n ${NODE_RANK:-} ]]; then
  [[ $NODE_RANK =~ ^(0|[1-9][0-9]*)$ && $NODE_RANK -lt ${#hosts[@]} ]] ||
    fail "NODE_RANK=$NODE_RANK: the ${#hosts[@]} machine(s) of $HOSTFILE count from 0"
  export_environment_files
  exec deepspeed --hostfile "$HOSTFILE" --no_ssh --node_rank "$NODE_RANK" \
    --master_addr "${MASTER_ADDR:-$first_host}" --master_port "${MASTER_PORT:-29500}" "$@"
fi

command -v pdsh >/dev/null || fail "there is no 'pdsh' on the PATH; install it, or set NODE_RANK on each machine (no ssh)"
check_environment_files
plain='^[A-Za-z0-9_@+=:,./-]+$'
[[ $PWD =~ $plain ]] || fail "'$PWD': a path with spaces or signs does not survive pdsh; move the folder"

# pdsh hands one line to a shell over there. What is not plain is written as $'...', which has neither spaces nor
# anything else that DeepSpeed, pdsh (%) or that shell would touch.
for_remote_shell() {
  local LC_ALL=C word=$1 quoted='' char code i
  if [[ $word =~ $plain ]]; then
    printf '%s' "$word"
    return
  fi
  for ((i = 0; i < ${#word}; i++)); do
    char=${word:i:1}
    if [[ $char =~ $plain ]]; then
      quoted+=$char
    else
      printf -v code '\\x%02x' "'$char"
      quoted+=\\x${code: -2}
    fi
  done
  printf "\$'%s'" "$quoted"
}
words=()
for word in "$@"; do
  words+=("$(for_remote_shell "$word")")
done

# Without these a machine whose cable is pulled leaves pdsh waiting for ever.
alive="-o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=$((${SSH_ALIVE_SECONDS:-60} / 4 + 1))"
export PDSH_SSH_ARGS_APPEND="$alive -o ServerAliveCountMax=4 ${PDSH_SSH_ARGS_APPEND:-}"
if [[ -z ${MASTER_PORT:-} ]]; then
  # The same Python under the same path, as DeepSpeed expects it too.
  free_port_there=$(printf '%q ' "$(command -v python)" -c "$FREE_PORT_CODE")
  # shellcheck disable=SC2029 # quoted here, for the shell over there
  MASTER_PORT=$(ssh -o BatchMode=yes -o ConnectTimeout=15 ${SSH_PORT:+-p "$SSH_PORT"} "$first_host" "$free_port_there") ||
    fail "ssh to '$first_host', the first machine of $HOSTFILE, failed; see 'recap-ds doctor --hostfile $HOSTFILE'"
fi

# --force_multi: with one machine in the hostfile DeepSpeed would not use a shell, and the quoting would be wrong.
exec deepspeed --hostfile "$HOSTFILE" --force_multi --launcher pdsh ${SSH_PORT:+--ssh_port "$SSH_PORT"} \
  ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} --master_port "$MASTER_PORT" "${words[@]}"
