"""What workers are given in tests: tasks that end well, badly, or not at all."""

import errno
import gc
import os
import signal
import time
from multiprocessing import connection
from pathlib import Path


def do(task: tuple) -> str:
    what, *rest = task
    if what == "double":
        return str(2 * rest[0])
    if what == "sleep":
        time.sleep(rest[0])
        return "woke"
    if what == "spin":
        while True:
            pass
    if what == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "die once":
        marker = Path(rest[0])
        if not marker.exists():
            marker.touch()
            os._exit(3)
        return "second try"
    if what == "grow":
        kept = []
        while True:
            kept.append(b"\1" * (16 << 20))
    if what == "huge":
        bytearray(rest[0])
    if what == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")
    if what == "deaf":
        for thing in gc.get_objects():
            if isinstance(thing, connection.Connection):
                thing.close()
        time.sleep(60)
    if what == "fault":
        raise KeyError("no such thing")
    if what == "pid":
        return str(os.getpid())
    if what == "long":
        return "é" * 5000
    raise AssertionError(what)
