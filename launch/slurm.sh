#!/usr/bin/env bash
#SBATCH --job-name=sora-jax
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# On a GPU cluster under Slurm: one process a GPU, all of them one JAX job.
#
#   launch/slurm.sh run --nodes 4 --gpus 8 -- sora-jax train --config FILE --workdir DIR
#
# `run` hands this script to sbatch; within the job it starts the command by srun on every GPU. Two
# minutes before the time limit, and on preemption, the processes get SIGTERM, save, and end with
# status 75: the job queues again and goes on. So it does after crashes, K times.
set -euo pipefail

usage="usage: launch/slurm.sh run --nodes N --gpus G [OPTIONS] -- COMMAND [ARGUMENT ...]
       launch/slurm.sh watch|delete --name NAME [--dry-run]
  --nodes N        hosts
  --gpus G         GPUs of each, and processes
  --name NAME      of the job (sora-jax); one of that name that is there already is left alone
  --time LIMIT     such as 24:00:00
  --partition P    --account A   --qos Q   as sbatch has them
  --log FILE       (NAME.log) of all processes, appended to
  --restarts K     after crashes (10); preemptions are free
  --dry-run        print every command, run none"

fail() {
  echo "launch/slurm.sh: $1" >&2
  exit 2
}

do_or_show() { # COMMAND: as bash reads it, if --dry-run
  if [[ -n $dry ]]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

in_job() { # RESTARTS COMMAND
  local most=$1 status=0 crashes=0 count=".sora-jax-$SLURM_JOB_ID.crashes"
  shift
  # A count of our own: Slurm's grows with every preemption too.
  if [[ -f $count ]]; then crashes=$(<"$count"); fi
  # Slurm signals the processes; this shell only waits for them.
  trap : TERM
  srun --kill-on-bad-exit=1 --label "$@" || status=$?
  if ((status == 75)) || { ((status == 1 || status > 128)) && ((status != 130 && crashes < most)); }; then
    if ((status != 75)); then echo $((crashes + 1)) >"$count"; fi
    # A job that was cancelled is not RUNNING, and stays away; one that was preempted comes by itself.
    if [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
      echo "launch/slurm.sh: ended with $status; queued again." >&2
      scontrol requeue "$SLURM_JOB_ID"
    fi
  else
    rm -f "$count"
  fi
  exit "$status"
}

run() {
  [[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes '$nodes': give a number, 1 or more."
  [[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "--gpus '$gpus': give a number, 1 or more."
  [[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts '$restarts': give a number, 0 or more."
  (($#)) || fail "no command; write it after --, such as -- sora-jax train --config ..."
  local command=("$@") word distributed=''
  for word in "$@"; do
    if [[ $word == --distributed ]]; then distributed=yes; fi
  done
  if [[ "${1-} ${2-}" =~ ^sora-jax\ (train|sample)$ && -z $distributed ]]; then
    command=(sora-jax "$2" --distributed "${@:3}")
  fi
  if [[ -z $dry && -n $(squeue --noheader --me --name="$name") ]]; then
    echo "launch/slurm.sh: a job of the name $name is there already." >&2
    return
  fi
  do_or_show sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" \
    --gpus-per-node="$gpus" --output="${log:-$name.log}" "${options[@]}" \
    "$0" job "$restarts" "${command[@]}"
}

action=${1-}
case $action in
  -h | --help) echo "$usage" && exit 0 ;;
  job) shift && in_job "$@" ;;
  run | watch | delete) shift ;;
  create) fail "there is nothing to create: Slurm has the hosts; one of run, watch and delete." ;;
  *) fail "unknown action '$action'; one of run, watch and delete (--help shows the options)." ;;
esac

nodes='' gpus='' name=sora-jax log='' restarts=10 dry='' options=()
while (($#)); do
  case $1 in
    --nodes | --gpus | --name | --log | --restarts)
      (($# > 1)) || fail "$1 has no value."
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --time | --partition | --account | --qos)
      (($# > 1)) || fail "$1 has no value."
      options+=("$1=$2")
      shift 2
      ;;
    --dry-run) dry=yes && shift ;;
    -h | --help) echo "$usage" && exit 0 ;;
    --) shift && break ;;
    *) fail "unknown option $1; write -- before the command (--help shows the options)." ;;
  esac
done
[[ $action == run || $# == 0 ]] || fail "$action takes no command; run does."

case $action in
  run) run "$@" ;;
  watch)
    do_or_show squeue --me --name="$name"
    do_or_show tail -n 20 -F "${log:-$name.log}"
    ;;
  delete) do_or_show scancel --me --name="$name" ;;
esac
