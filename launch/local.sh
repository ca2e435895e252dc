#!/usr/bin/env bash
# Runs a command as N processes on this machine, which together are one JAX job:
#
#   launch/local.sh 2 sora-jax train --distributed --config FILE --workdir DIR
#
# Ctrl-C and SIGTERM reach all of them; if one fails, the others are stopped with its status.
set -euo pipefail

if (($# < 2)) || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N COMMAND [ARGUMENT ...]   N processes, 1 or more" >&2
  exit 2
fi
count=$1
shift

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$count

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < count; i++)); do
  JAX_PROCESS_ID=$i "$@" &
  pids+=($!)
done

status=0
running=$count
while ((running > 0)); do
  result=0
  wait -n || result=$?
  # A trapped signal ends `wait` early; the processes are then still there to be waited for.
  running=$(jobs -rp | wc -l)
  if ((result != 0 && status == 0)); then
    status=$result
    kill -TERM "${pids[@]}" 2>/dev/null || true
  fi
done
# Those that ended together with the last one have not been asked yet; 127 says that one has.
for pid in "${pids[@]}"; do
  result=0
  wait "$pid" || result=$?
  if ((result != 0 && result != 127 && status == 0)); then status=$result; fi
done
exit "$status"
