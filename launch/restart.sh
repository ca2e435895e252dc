#!/usr/bin/env bash
# Runs a command again when it asks for it or crashes:
#
#   launch/restart.sh [OPTIONS] -- COMMAND [ARGUMENT ...]
#
# Again after status 75 ("restart me", the checkpoint is saved) and after a crash (1, or death by a
# signal); not after 0, a mistake (2), Ctrl-C (130) or any other status, which becomes its own.
# SIGTERM and Ctrl-C are passed on, once, and nothing is run again after them.
set -euo pipefail

usage="usage: launch/restart.sh [OPTIONS] -- COMMAND [ARGUMENT ...]
  --restarts K   at most K times in a row (default 10)
  --wait S       seconds before the first of them, twice as many before each further, up to 60 (5)
  --fresh S      a run of S seconds or more begins the count anew (600)
  --state DIR    keep this script's pid, and in the end its status, in files of DIR"
restarts=10 pause=5 fresh=600 state=''

fail() {
  echo "launch/restart.sh: $1" >&2
  exit 2
}

number() { # OPTION VALUE
  [[ $2 =~ ^[0-9]+$ ]] || fail "$1 $2: give a number, 0 or more."
}

while (($#)); do
  case $1 in
    -h | --help) echo "$usage" && exit 0 ;;
    --restarts) number "$1" "${2-}" && restarts=$2 && shift 2 ;;
    --wait) number "$1" "${2-}" && pause=$2 && shift 2 ;;
    --fresh) number "$1" "${2-}" && fresh=$2 && shift 2 ;;
    --state)
      [[ -d ${2-} ]] || fail "--state ${2-}: no such folder."
      state=$2 && shift 2
      ;;
    --) shift && break ;;
    *) fail "unknown option $1; write -- before the command (--help shows the options)." ;;
  esac
done
(($#)) || fail "no command; write it after --."

if [[ -n $state ]]; then
  trap 'echo $? >"$state/status"' EXIT
  echo $$ >"$state/pid"
fi

child='' sleeper='' asked=''
pass_on() { # SIGNAL: to the command, the first time alone; a second would stop its save
  if [[ -z $asked ]]; then
    asked=$1
    if [[ -n $child ]]; then kill -"$1" "$child" 2>/dev/null || true; fi
    if [[ -n $sleeper ]]; then kill "$sleeper" 2>/dev/null || true; fi
  fi
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

# Process groups of their own: a terminal's Ctrl-C reaches this script alone, which passes it on.
set -m
used=0 wait_now=$pause
while true; do
  begun=$SECONDS
  "$@" &
  child=$!
  status=0
  wait "$child" || status=$?
  # A trapped signal ends `wait`, not the command.
  while kill -0 "$child" 2>/dev/null; do
    status=0
    wait "$child" || status=$?
  done
  child=''
  if [[ -n $asked ]]; then
    if [[ $asked == INT && $status == 0 ]]; then status=130; fi
    exit "$status"
  fi
  if ((SECONDS - begun >= fresh)); then used=0 wait_now=$pause; fi
  if ! ((status == 75 || status == 1 || (status > 128 && status != 130))); then exit "$status"; fi
  if ((used >= restarts)); then
    if ((restarts > 0)); then
      echo "launch/restart.sh: ended with $status after $used restarts; no more." >&2
    fi
    exit "$status"
  fi
  used=$((used + 1))
  echo "launch/restart.sh: ended with $status; restart $used of $restarts in $wait_now s." >&2
  sleep "$wait_now" &
  sleeper=$!
  wait "$sleeper" || true
  sleeper=''
  if [[ -n $asked ]]; then exit "$status"; fi
  wait_now=$((wait_now * 2 > 60 ? 60 : wait_now * 2))
done
