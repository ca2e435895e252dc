#!/usr/bin/env bash
# Runs a command as N processes on this machine, which together are one JAX job:
#
#   launch/local.sh [--dry-run] [--restarts K] N sora-jax train --distributed --config FILE --workdir DIR
#
# Ctrl-C and SIGTERM reach all of them, once; if one fails, the others are stopped with its status.
# All are started again, at most K times in a row (default 0), after status 75 and after crashes.
# --dry-run prints every process's command, and runs none.
set -euo pipefail

usage="usage: launch/local.sh [--dry-run] [--restarts K] N COMMAND [ARGUMENT ...]   N processes, 1 or more"

if [[ ${1-} == -h || ${1-} == --help ]]; then
  echo "$usage"
  exit 0
fi
restarts=0
dry=''
while [[ ${1-} == --* ]]; do
  if [[ $1 == --dry-run ]]; then
    dry=1
    shift
  elif [[ $1 == --restarts ]]; then
    restarts=${2-}
    shift $(($# < 2 ? $# : 2))
  else
    break # N is missing
  fi
done
if (($# < 2)) || ! [[ $1 =~ ^[1-9][0-9]*$ && $restarts =~ ^[0-9]+$ ]]; then
  echo "$usage" >&2
  exit 2
fi
if [[ -n $dry ]]; then
  count=$1
  shift
  for ((i = 0; i < count; i++)); do
    echo "JAX_COORDINATOR_ADDRESS=localhost:PORT JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$i ${*@Q} &"
  done
  ((restarts == 0)) || echo "# all again after status 75 and after crashes, $restarts times at most"
  exit 0
fi
if ((restarts > 0)); then
  exec "$(dirname "$0")/restart.sh" --restarts "$restarts" -- "$0" "$@"
fi
count=$1
shift

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$count

pids=()
told=''
tell() { # SIGNAL: to all, the first time alone; a second would stop their save
  if [[ -z $told ]]; then
    told=$1
    kill -"$1" "${pids[@]}" 2>/dev/null || true
  fi
}
trap 'tell TERM' TERM
trap 'tell INT' INT
# Process groups of their own: a terminal's Ctrl-C reaches this script alone, which passes it on.
set -m
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
  if ((result != 0 && status == 0)) && [[ -z $told ]]; then
    status=$result
    tell TERM
  fi
done
# Those that ended together with the last one have not been asked yet; 127 says that one has.
for pid in "${pids[@]}"; do
  result=0
  wait "$pid" || result=$?
  if ((result != 0 && result != 127 && status == 0)); then status=$result; fi
done
exit "$status"
