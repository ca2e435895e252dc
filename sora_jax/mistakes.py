"""What the command says of mistakes and interrupts: one line each."""

import argparse
import contextlib
import errno
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

# What to change where the system refuses a file.
_ROOM = "make room, or use another folder"
_PERMISSIONS = "change its permissions, or give another"
_MENDS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _PERMISSIONS),
    errno.ENAMETOOLONG: "use a shorter one",
    errno.EISDIR: "give a file",
}


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as all others are told; subparsers are of the same class."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument ") and "expected" in message:
            name = message.removeprefix("argument ").partition(":")[0].split("/")[0]
            message += f" (one that begins with - is written {name}=VALUE)"
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def told(error: Exception) -> str:
    """What a mistake says, or the system of a file that it refuses, in one line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename else ""
        text = f"{named}{error.strerror}; {_MENDS.get(error.errno, 'check that it is there')}."
    return " ".join(text.split())


@contextlib.contextmanager
def interrupts_come_again() -> Iterator[None]:
    """Repeats Ctrl-C that came where Python drops exceptions, as in JAX's hook of the collector."""
    before = sys.unraisablehook

    def hook(unraisable) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            # A little later: here it would be dropped again.
            main_thread = threading.main_thread().ident
            threading.Timer(0.05, signal.pthread_kill, (main_thread, signal.SIGINT)).start()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
