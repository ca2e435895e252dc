"""What the launchers share: commands shown instead of run, checked names, the user's command."""

import argparse
import re
import shlex
import subprocess
import sys

NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
SECRET = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[A-Za-z0-9][-A-Za-z0-9_./]*")
RESTART = 75  # status of a run that saved its checkpoint and asks to be started again
MISTAKES = (2, 130)  # statuses that no restart mends: bad input, Ctrl-C
MOUNT = "/mnt/sora"  # where --bucket and --nfs are found by a run


class Shell:
    """Runs commands, or with `dry_run` prints each as bash reads it."""

    def __init__(self, *, dry_run: bool):
        self.dry_run = dry_run

    def note(self, text: str) -> None:
        """A comment among the printed commands; on stderr otherwise."""
        print(f"# {text}" if self.dry_run else text, file=None if self.dry_run else sys.stderr)

    def run(self, *command: str, stdin: str | None = None, check: bool = True) -> int:
        """The command's status.

        Raises:
          SystemExit: with that status, if it is not 0, unless `check` is off.
        """
        if self.dry_run:
            self._print(command, stdin)
            return 0
        status = subprocess.run(command, input=stdin, text=True).returncode
        if status and check:
            sys.exit(status)
        return status

    def read(self, *command: str) -> str | None:
        """What the command prints, stripped; None if it fails, and in a dry run."""
        if self.dry_run:
            self._print(command, None)
            return None
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        return None if done.returncode else done.stdout.strip()

    def exists(self, *command: str) -> bool:
        """Whether a `describe` finds its object; False in a dry run."""
        if self.dry_run:
            self._print(command, None)
            return False
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.run(command, **quiet).returncode == 0

    def _print(self, command: tuple[str, ...], stdin: str | None) -> None:
        line = shlex.join(command)
        print(
            line if stdin is None else f"{line} <<'END_OF_INPUT'\n{stdin}END_OF_INPUT", flush=True
        )


def check_name(name: str) -> str:
    """For argparse: a name that clouds accept.

    Raises:
      ArgumentTypeError: it is none.
    """
    if not NAME.fullmatch(name):
        raise argparse.ArgumentTypeError(
            f"{name!r}: use up to 40 of a-z, 0-9 and -, a letter first and no - last"
        )
    return name


def check_secret(text: str) -> str:
    """For argparse: VARIABLE=SECRET, a secret's name and never its value.

    Raises:
      ArgumentTypeError: it is not of that form.
    """
    if not SECRET.fullmatch(text):
        raise argparse.ArgumentTypeError(
            "write VARIABLE=NAME, the name that the secret has where secrets are kept"
        )
    return text


def split_command(argv: list[str]) -> tuple[list[str], list[str]]:
    """Options, and the user's command behind the first `--`."""
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def as_one_job(command: list[str]) -> list[str]:
    """The command as each of several processes runs it: train or sample with --distributed.

    Raises:
      ValueError: there is none.
    """
    if not command:
        raise ValueError("no command; write it after --, such as -- sora-jax train --config ...")
    joins = command[0] == "sora-jax" and command[1:2] in (["train"], ["sample"])
    if joins and "--distributed" not in command:
        return [*command[:2], "--distributed", *command[2:]]
    return command


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str):
        print(f"{self.prog}: {message} (--help shows the options)", file=sys.stderr)
        sys.exit(2)


def action_parser(prog: str, usage: str, doc: str, actions: dict[str, str]) -> Parser:
    """A parser whose first argument is one of `actions`, which its help explains.

    Args:
      usage: what follows the action.
      doc: of the script, whose first paragraph describes it.
    """
    top = Parser(
        prog=prog,
        usage=f"{prog} ACTION {usage}",
        description=doc.split("\n\n")[0],
        epilog="actions:\n" + "\n".join(f"  {name:8} {what}" for name, what in actions.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("action", choices=actions, metavar="ACTION")
    return top
