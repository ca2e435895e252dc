"""A folder that one process alone writes to."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(folder: str | os.PathLike, *, busy: str, wait: float = 0.0) -> Iterator[None]:
    """Holds `folder`, which must exist, until the block ends or this process does.

    Where the file system has no locks, nothing is held.

    Args:
      busy: what to say where another process holds it.
      wait: seconds to wait for it.

    Raises:
      ValueError: `busy`.
    """
    import fcntl

    until = time.monotonic() + wait
    handle = os.open(Path(folder), os.O_RDONLY)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise ValueError(busy) from None
                time.sleep(0.5)
            except OSError:
                break
        yield
    finally:
        os.close(handle)
