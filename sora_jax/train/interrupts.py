"""Ctrl-C and SIGTERM end a run after the step under way, with a checkpoint."""

import signal
import threading
from typing import Any

import jax

RESTART = 75  # exit status (EX_TEMPFAIL) that asks the launcher to start the run again
NONE, TERMINATED, INTERRUPTED = 0, 1, 2  # by whom; of several processes' the largest counts


class Preempted(KeyboardInterrupt):
    """SIGTERM ended the run, its checkpoint is saved: start it again."""

    exit_code = RESTART


def end(reason: int, step: int) -> KeyboardInterrupt:
    """What to raise for `reason` when the checkpoint of `step` is saved.

    Its `quiet` is true in all processes but the first, which prints it for all.
    """
    kind = Preempted if reason == TERMINATED else KeyboardInterrupt
    interrupt = kind(f"stopped at step {step}; the checkpoint is saved.")
    interrupt.quiet = jax.process_index() != 0
    return interrupt


class Interrupts:
    """Turns Ctrl-C and SIGTERM into a request that the loop honours after the current step.

    A second Ctrl-C stops at once, without a checkpoint; a second SIGTERM changes nothing, for
    launcher and scheduler may both send one.
    """

    def __init__(self):
        self.requested = NONE
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        # Elsewhere signals cannot be caught: the caller keeps its handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, _) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt("stopped at once; the last checkpoint is kept.")
        reason = INTERRUPTED if number == signal.SIGINT else TERMINATED
        self.requested = max(self.requested, reason)

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
