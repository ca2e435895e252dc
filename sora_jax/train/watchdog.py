"""A thread that says where a run hangs, and ends it so that the launcher starts it again."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sora_jax.train.interrupts import RESTART

PATIENCE = 4  # times the limit for what may compile: the first step, previews


class Watchdog:
    """Dumps the stacks of all threads to `file` and stderr where no `beat` came for `minutes`.

    Where none came for twice that, the process exits with status 75, without a checkpoint: other
    processes wait for it, or it for them. Until the first `beat` both limits are four times that.

    Args:
      minutes: 0 watches nothing.
      exit: ends the process; a test's own.
    """

    def __init__(
        self, minutes: float | int, file: Path, *, exit: Callable[[int], object] = os._exit
    ):
        self._limit, self._file, self._exit = 60.0 * minutes, Path(file), exit
        self._allowed = PATIENCE
        self._last = time.monotonic()
        self._dumped = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._limit:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        if self._limit:
            self._thread.join()

    def beat(self, *, allow: int = 1) -> None:
        """A step is done. What comes next may take `allow` times the limit."""
        self._last, self._allowed, self._dumped = time.monotonic(), allow, False

    def _watch(self) -> None:
        while not self._closed.wait(min(5.0, self._limit / 10)):
            silent = time.monotonic() - self._last
            limit = self._limit * self._allowed
            if silent > limit and not self._dumped:
                self._dumped = True
                self._dump(silent)
            if silent > 2 * limit:
                self._say(f"no step for {silent / 60:.3g} minutes: exit with status {RESTART}.")
                self._exit(RESTART)
                return

    def _dump(self, silent: float) -> None:
        self._say(f"no step for {silent / 60:.3g} minutes; stacks are in {self._file}.")
        with self._file.open("a") as file:
            file.write(f"{time.ctime()}: no step for {silent / 60:.3g} minutes\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)

    @staticmethod
    def _say(text: str) -> None:
        print(f"sora-jax: {text}", file=sys.stderr, flush=True)
