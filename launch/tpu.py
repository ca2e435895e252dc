#!/usr/bin/env python3
"""Cloud TPU VMs by queued resources: from nothing to a run on every host of a slice, and back.

    launch/tpu.py watch --name minute --zone us-east5-a --type v5p:8x8x8 --bucket my-bucket -- \\
        sora-jax train --config configs/sora_minute.py --workdir /mnt/sora/minute

`watch` does all that is missing, over and over, until the command has ended: create, setup, run,
and create again what was preempted. The others are its steps, by hand. All may be repeated.
"""

import argparse
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

import shell
import slices

ROOT = Path(__file__).resolve().parents[1]
GCLOUD = ("gcloud", "compute", "tpus", "queued-resources")
# States of a queued resource that never become ACTIVE again.
DEAD = ("SUSPENDED", "SUSPENDING", "FAILED")
ACTIONS = {
    "create": "ask for the slice; it may have to wait in the queue",
    "setup": "copy the sources of the current commit to every host and install them",
    "run": "start the command on every host, under launch/restart.sh",
    "watch": "do whatever is missing until the command has ended; its status becomes this one's",
    "stop": "ask the command to save its checkpoint and end",
    "delete": "delete the slice, and stop paying",
}


def parser() -> argparse.ArgumentParser:
    top = shell.action_parser(
        "launch/tpu.py",
        "--name NAME --zone ZONE [OPTIONS] [-- COMMAND [ARGUMENT ...]]",
        __doc__,
        ACTIONS,
    )
    add = top.add_argument
    add("--name", required=True, type=shell.check_name, help="of the queued resource and the run")
    add("--zone", required=True, help="such as us-east5-a")
    add("--project", help="default: gcloud's own")
    add(
        "--type",
        metavar="CHIP:TOPOLOGY",
        help="of each slice, as `sora-jax plan --topology` has it",
    )
    add("--slices", type=int, default=1, metavar="N", help="joined over the data centre's network")
    kind = top.add_mutually_exclusive_group()
    kind.add_argument("--spot", action="store_true", help="cheaper, and may be taken away")
    kind.add_argument("--reserved", action="store_true", help="from a reservation")
    add("--runtime", metavar="VERSION", help="image of the VMs; default: by the chip")
    add("--service-account", metavar="EMAIL", help="of the VMs; reads secrets and the bucket")
    add("--network", help="default: default")
    add("--subnetwork")
    add("--internal-ips", action="store_true", help="no public addresses; ssh by the proxy (IAP)")
    disk = top.add_mutually_exclusive_group()
    disk.add_argument("--bucket", metavar="NAME", help=f"mounted at {shell.MOUNT} by gcsfuse")
    disk.add_argument("--nfs", metavar="SERVER:/SHARE", help=f"mounted at {shell.MOUNT}")
    add(
        "--secret",
        action="append",
        default=[],
        type=shell.check_secret,
        metavar="VARIABLE=NAME",
        help="set VARIABLE to the secret NAME of Secret Manager, on the hosts; may be repeated",
    )
    add("--extras", metavar="A,B", help="of pyproject.toml, beside tpu; such as wandb")
    add("--restarts", type=int, default=10, metavar="K", help="of the command, in a row")
    add("--poll", type=float, default=60, metavar="S", help="seconds between looks of `watch`")
    add("--dry-run", action="store_true", help="print every command, run none")
    return top


def place(args) -> list[str]:
    project = [f"--project={args.project}"] if args.project else []
    return [f"--zone={args.zone}", *project]


def describe(sh: shell.Shell, args) -> str:
    """The queued resource's state, "" if there is none."""
    command = (*GCLOUD, "describe", args.name, *place(args), "--format=value(state.state)")
    return sh.read(*command) or ""


def create(sh: shell.Shell, args, state: str | None = None) -> None:
    """Asks for the slice, in the place of one that is dead.

    Raises:
      ValueError: no --type, or one that does not exist.
    """
    wanted = needed(args)
    state = describe(sh, args) if state is None else state
    if state and state not in DEAD:
        sh.note(f"{args.name} is {state} already.")
        return
    if state:
        delete(sh, args, state)
    nodes = [f"--node-id={args.name}"]
    if args.slices > 1:
        nodes = [f"--node-count={args.slices}", f"--node-prefix={args.name}"]
    options = [
        *(["--spot"] if args.spot else []),
        *(["--reserved"] if args.reserved else []),
        *(["--internal-ips"] if args.internal_ips else []),
        *([f"--service-account={args.service_account}"] if args.service_account else []),
        *([f"--network={args.network}"] if args.network else []),
        *([f"--subnetwork={args.subnetwork}"] if args.subnetwork else []),
    ]
    sh.run(
        *(*GCLOUD, "create", args.name, *place(args), *nodes),
        f"--accelerator-type={wanted.accelerator_type}",
        f"--runtime-version={args.runtime or wanted.chip.runtime}",
        *(*options, "--scopes=https://www.googleapis.com/auth/cloud-platform", "--async"),
    )


def needed(args) -> slices.Slice:
    if not args.type:
        raise ValueError("--type is missing; give the slice, such as --type v5p:4x4x8.")
    return slices.parse(args.type)


def everywhere(args) -> list[str]:
    """Options that reach all hosts of all slices."""
    return ["--worker=all", "--node=all", *(["--tunnel-through-iap"] if args.internal_ips else [])]


def on_hosts(args, *command: str) -> list[str]:
    """gcloud's command for one that bash reads on every host."""
    line = f"--command={shlex.join(command)}"
    return [*GCLOUD, "ssh", args.name, *place(args), *everywhere(args), line]


def worker(args, action: str, *options: str) -> list[str]:
    return on_hosts(args, "sora_jax/src/launch/worker.sh", action, *options)


def setup(sh: shell.Shell, args) -> None:
    """What runs is what was committed: `git archive`, not the files as they lie here."""
    git = shell.Shell(dry_run=False)
    commit = git.read("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if commit is None:
        raise ValueError(f"{ROOT} is no git repository; clone it, since what runs is a commit.")
    if git.read("git", "-C", str(ROOT), "status", "--porcelain"):
        sh.note(f"warning: uncommitted changes do not go along; commit {commit} does.")
    archive = str(Path(tempfile.gettempdir()) / f"sora_jax-{commit}.tar.gz")
    sh.run("git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={archive}", commit)
    there = f"{args.name}:sora_jax.tar.gz"
    sh.run(*GCLOUD, "scp", archive, there, *place(args), *everywhere(args))
    unpack = (
        "rm -rf sora_jax/src && mkdir -p sora_jax/src && tar -xzf sora_jax.tar.gz -C sora_jax/src"
    )
    sh.run(*on_hosts(args, "bash", "-c", unpack))
    options = []
    for name in ("extras", "bucket", "nfs"):
        if value := getattr(args, name):
            options += [f"--{name}", value]
    sh.run(*worker(args, "setup", *options))


def run(sh: shell.Shell, args, command: list[str]) -> None:
    command = shell.as_one_job(command)
    options = [args.name, "--restarts", str(args.restarts)]
    if workdir := option_of(command, "--workdir"):
        options += ["--logs", f"{workdir}/logs"]
    for secret in args.secret:
        options += ["--secret", secret]
    sh.run(*worker(args, "start", *options, "--", *command))


def option_of(command: list[str], name: str) -> str | None:
    for at, word in enumerate(command):
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
        if word == name and at + 1 < len(command):
            return command[at + 1]
    return None


def ask(args) -> list[str]:
    """How the run is on every host; one without sources is bare."""
    script = "sora_jax/src/launch/worker.sh"
    state = shlex.join((script, "state", args.name))
    return on_hosts(
        args,
        "bash",
        "-c",
        f"if [[ -x {script} ]]; then {state}; else echo worker $HOSTNAME bare; fi",
    )


def hosts_say(text: str) -> list[str]:
    """The words of all hosts: bare, absent, running, ended STATUS, lost or stopped."""
    lines = [line.split(maxsplit=2) for line in text.splitlines()]
    return [line[2] for line in lines if len(line) == 3 and line[0] == "worker"]


def look(sh: shell.Shell, args, command: list[str]) -> int | None:
    """One look at slice and run, and what follows from it; the run's status once it has ended."""
    state = describe(sh, args)
    if not state or state in DEAD:
        sh.note(f"{args.name} is {state or 'not there'}; asking for it.")
        create(sh, args, state)
        return None
    if state != "ACTIVE":
        sh.note(f"{args.name} is {state}.")
        return None
    text = sh.read(*ask(args))
    if text is None:
        sh.note(f"{args.name} is ACTIVE, but not all hosts answer.")
        return None
    said = hosts_say(text)
    hosts = needed(args).hosts * args.slices
    if said:
        sh.note(f"{args.name}: {text.splitlines()[-1]}")
    ended = [int(word.split()[1]) for word in said if word.startswith("ended")]
    mistakes = [status for status in ended if status not in (0, shell.RESTART)]
    if "stopped" in said and "running" not in said:
        sh.note(f"{args.name} was stopped; `run` starts it again, `delete` ends the bill.")
        return shell.RESTART
    if mistakes and "running" not in said:
        return mistakes[0]
    if len(ended) == hosts and not any(ended):
        return 0
    if any(word != "running" for word in said):
        # New hosts, or hosts that were maintained: those that run already are left alone.
        if "bare" in said:
            setup(sh, args)
        run(sh, args, command)
    return None


def watch(sh: shell.Shell, args, command: list[str]) -> int:
    needed(args)
    command = shell.as_one_job(command)
    if sh.dry_run:
        state = describe(sh, args)
        sh.note("if there is none, or it was preempted (SUSPENDED, FAILED), after deleting that:")
        create(sh, args, state)
        sh.note("once it is ACTIVE, on hosts without sources:")
        setup(sh, args)
        sh.note("on hosts without a run:")
        run(sh, args, command)
        sh.note(f"and every {args.poll:g} seconds, until it has ended:")
        sh.read(*ask(args))
        return 0
    while (status := look(sh, args, command)) is None:
        time.sleep(args.poll)
    return status


def delete(sh: shell.Shell, args, state: str | None = None) -> None:
    state = describe(sh, args) if state is None else state
    if not state and not sh.dry_run:
        sh.note(f"{args.name} is not there.")
        return
    sh.run(*GCLOUD, "delete", args.name, *place(args), "--force", "--quiet")


def main(argv: list[str]) -> int:
    options, command = shell.split_command(argv)
    args = parser().parse_args(options)
    sh = shell.Shell(dry_run=args.dry_run)
    try:
        if args.slices < 1 or args.restarts < 0 or args.poll <= 0:
            raise ValueError("--slices takes 1 or more, --restarts 0 or more, --poll above 0.")
        if command and args.action not in ("run", "watch"):
            raise ValueError(f"`{args.action}` takes no command; `run` and `watch` do.")
        if args.action == "watch":
            return watch(sh, args, command)
        if args.action == "run":
            run(sh, args, command)
        elif args.action == "stop":
            sh.run(*worker(args, "stop", args.name))
        else:
            {"create": create, "setup": setup, "delete": delete}[args.action](sh, args)
    except ValueError as error:
        print(f"launch/tpu.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("launch/tpu.py: left; the run goes on, and so does the bill.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    # gcloud asks no questions that nobody would answer.
    os.environ.setdefault("CLOUDSDK_CORE_DISABLE_PROMPTS", "1")
    sys.exit(main(sys.argv[1:]))
