#!/usr/bin/env bash
# On a TPU VM, called by launch/tpu.py over ssh: installs, starts, stops and tells how a run is.
#
#   worker.sh setup [--extras A,B] [--bucket NAME | --nfs SERVER:/SHARE]
#   worker.sh start RUN [--restarts K] [--logs DIR] [--secret VARIABLE=NAME] ... -- COMMAND ...
#   worker.sh stop RUN
#   worker.sh state RUN      one line: worker HOST WORD [STATUS], and the last line of the log
#
# All is under ~/sora_jax: src (the sources), venv, and run/RUN with pid, status and log.
set -euo pipefail

home=${SORA_JAX_HOME:-$HOME/sora_jax}
python=3.12 # the image's own is too old

fail() {
  echo "worker.sh on $(hostname): $1" >&2
  exit 2
}

mount_at() { # bucket|nfs SOURCE
  local at=/mnt/sora
  if mountpoint -q "$at"; then return; fi
  sudo mkdir -p "$at"
  if [[ $1 == nfs ]]; then
    command -v mount.nfs >/dev/null || sudo apt-get install -y -q nfs-common
    sudo mount -t nfs -o nconnect=8 "$2" "$at"
  else
    command -v gcsfuse >/dev/null ||
      fail "gcsfuse is not on this image; install it, or give a share with --nfs."
    sudo chown "$(id -u):$(id -g)" "$at"
    # Checkpoints are folders that are renamed, which gcsfuse refuses without a limit.
    gcsfuse --implicit-dirs --rename-dir-limit=200000 "$2" "$at"
  fi
}

setup() {
  local extras=tpu
  while (($#)); do
    case $1 in
      --extras) extras+=,${2-} ;;
      --bucket) mount_at bucket "${2-}" ;;
      --nfs) mount_at nfs "${2-}" ;;
      *) fail "unknown option $1." ;;
    esac
    shift $(($# < 2 ? $# : 2))
  done
  command -v uv >/dev/null ||
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  export PATH=$HOME/.local/bin:$PATH
  [[ -x $home/venv/bin/python ]] || uv venv --quiet --python "$python" "$home/venv"
  cd "$home/src"
  uv pip install --quiet --python "$home/venv/bin/python" -c requirements.lock ".[$extras]"
  "$home/venv/bin/sora-jax" --help >/dev/null
  echo "worker $(hostname) ready"
}

alive() { # DIRECTORY
  local pid
  pid=$(cat "$1/pid" 2>/dev/null) || return 1
  # After a reboot the number may be another process's.
  grep -qz restart.sh "/proc/$pid/cmdline" 2>/dev/null
}

copy_log() { # DIRECTORY LOGS: every minute, and at the end
  mkdir -p "$2"
  while alive "$1"; do
    for ((i = 0; i < 60; i++)); do
      alive "$1" || break
      sleep 1
    done
    cp "$1/log" "$2/$(hostname).log"
  done
}

start() {
  local dir=$home/run/$1 restarts=10 logs='' value
  shift
  while (($#)); do
    case $1 in
      --restarts) restarts=$2 && shift 2 ;;
      --logs) logs=$2 && shift 2 ;;
      --secret)
        # Read here, by the VM's own account: neither a file nor a command line ever holds it.
        value=$(gcloud secrets versions access latest --secret="${2#*=}")
        export "${2%%=*}=$value"
        shift 2
        ;;
      --) shift && break ;;
      *) fail "unknown option $1." ;;
    esac
  done
  (($#)) || fail "no command."
  if alive "$dir"; then
    echo "worker $(hostname) runs already"
    return
  fi
  mkdir -p "$dir"
  rm -f "$dir/status" "$dir/stopped" "$dir/pid"
  cd "$home/src"
  PATH=$home/venv/bin:$PATH setsid nohup ./launch/restart.sh --restarts "$restarts" \
    --state "$dir" -- "$@" </dev/null >>"$dir/log" 2>&1 &
  until alive "$dir" || [[ -f $dir/status ]]; do sleep 0.05; done
  if [[ -n $logs ]]; then (copy_log "$dir" "$logs") </dev/null >/dev/null 2>&1 & fi
  echo "worker $(hostname) started"
}

stop() {
  local dir=$home/run/$1
  if ! alive "$dir"; then
    echo "worker $(hostname) runs nothing"
    return
  fi
  touch "$dir/stopped"
  kill -TERM "$(cat "$dir/pid")"
  echo "worker $(hostname) told to stop; it saves first"
}

state() {
  local dir=$home/run/$1 word=absent
  if alive "$dir"; then
    word=running
  elif [[ -f $dir/stopped ]]; then
    word=stopped
  elif [[ -f $dir/status ]]; then
    word="ended $(cat "$dir/status")"
  elif [[ -f $dir/pid ]]; then
    word=lost # the host went down with it
  fi
  echo "worker $(hostname) $word"
  if [[ -f $dir/log ]]; then tail -n 1 "$dir/log"; fi
}

case ${1-} in
  setup | start | stop | state) "$@" ;;
  *) fail "unknown action '${1-}'; see the head of this file." ;;
esac
