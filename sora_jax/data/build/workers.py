"""Processes that do one task at a time and can be ended: no file can hang or kill a build.

A worker is spawned, takes a task over a pipe and answers with one short line; whatever else it
makes, it writes to disk itself. The parent ends a worker that is late or too large and starts
another in its place, so that the task is all that is lost. A worker whose parent dies ends itself.
"""

import contextlib
import dataclasses
import errno
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any, Literal, NamedTuple

START_SECONDS = 300  # to import what tasks need, on a busy machine
END_SECONDS = 10  # for a process to be gone that has been killed, or has closed its pipe
TRIES = 2  # of a task whose worker died: the task before may have damaged its memory
POLL_SECONDS = 0.1  # how often memory is looked at
# A pipe of Linux and macOS takes so many bytes in one piece: a worker never dies inside an answer.
MOST_ANSWER_BYTES = 512
# Threads of a worker share its core with the other workers.
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

Status = Literal["done", "timeout", "memory", "crash"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one task may cost.

    Attributes:
      seconds: wall clock.
      mebibytes: resident memory of the worker, looked at several times a second.
      address_space: have the system refuse requests of several times that much, as a damaged file
        may lead to; not for libraries that reserve what they never use, as CUDA's do.
    """

    seconds: float | int = float("inf")
    mebibytes: float | int = float("inf")
    address_space: bool = True


class Outcome(NamedTuple):
    """What became of task number `index`.

    Attributes:
      text: what the function returned, or one line that says why it did not.
    """

    index: int
    status: Status
    text: str


class CannotStore(Exception):
    """Reading or writing what is kept failed, as on a full disk: no task could be done after it."""


class CannotStart(RuntimeError):
    """A worker ended, or hung, before it was given anything."""


def run_tasks(
    function: Callable[[Any], str],
    tasks: Sequence[Any],
    *,
    workers: int,
    limits: Limits = Limits(),
) -> Iterator[Outcome]:
    """Does every task in one of `workers` processes, and yields what became of each as it ends.

    All workers are ended when the generator is closed or left by an exception, Ctrl-C included.

    Args:
      function: importable by name; returns a short line.
      tasks: what it is called with; pickled one at a time.

    Raises:
      CannotStore: `function` raised an OSError.
      ImportError: `function` raised one.
      CannotStart: so it is with workers.
      RuntimeError: `function` raised anything else: a fault of the program, not of a file.
    """
    waiting = deque((index, 1) for index in range(len(tasks)))
    pool: list[Worker] = []
    try:
        while waiting or any(worker.busy for worker in pool):
            for worker in [w for w in pool if not w.alive]:
                pool.remove(worker)
            while len(pool) < min(workers, len(waiting) + sum(w.busy for w in pool)):
                pool.append(Worker(function, limits))
            for worker in pool:
                if waiting and not worker.busy:
                    index, attempt = waiting.popleft()
                    worker.begin(index, tasks[index], attempt)
            connection.wait([handle for w in pool for handle in w.handles], POLL_SECONDS)
            for worker in pool:
                outcome = worker.look()
                if outcome is None:
                    continue
                if outcome.status == "crash" and worker.attempt < TRIES:
                    waiting.appendleft((outcome.index, worker.attempt + 1))
                else:
                    yield outcome
    finally:
        for worker in pool:
            worker.end()


def finish(
    worker: "Worker | None", function: Callable[[Any], str], task: Any, limits: Limits
) -> "tuple[Outcome, Worker | None]":
    """Does one task in `worker` or a new one; returns the worker too if it can go on.

    Raises: as `run_tasks`.
    """
    for attempt in range(1, TRIES + 1):
        if worker is None or not worker.alive:
            worker = Worker(function, limits)
        try:
            worker.begin(0, task, attempt)
            while (outcome := worker.look()) is None:
                connection.wait(worker.handles, POLL_SECONDS)
        except BaseException:
            worker.end()
            raise
        if outcome.status != "crash":
            break
    return outcome, worker if worker.alive else None


class Worker:
    """One process, started at once; its first task waits until it is ready."""

    def __init__(self, function: Callable[[Any], str], limits: Limits) -> None:
        self.limits = limits
        self.attempt = 0
        self._index: int | None = None
        self._ready = False
        self._deadline = time.monotonic() + START_SECONDS
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, function, limits), daemon=True)
        with _one_thread():
            self._process.start()
        theirs.close()  # so that the pipe ends when the worker does

    @property
    def alive(self) -> bool:
        return not self._pipe.closed

    @property
    def busy(self) -> bool:
        return self._index is not None

    @property
    def handles(self) -> list[Any]:
        return [self._pipe, self._process.sentinel] if self.alive else []

    def begin(self, index: int, task: Any, attempt: int = 1) -> None:
        """Hands over a task; the clock runs from when the worker is ready for it."""
        self._index, self.attempt, self._task = index, attempt, pickle.dumps(task)
        if self._ready:
            self._send()

    def _send(self) -> None:
        """To a worker that is waiting for it, so that this never blocks."""
        self._deadline = time.monotonic() + self.limits.seconds
        with contextlib.suppress(OSError):  # one that has died is found by `look`
            self._pipe.send_bytes(self._task)

    def look(self) -> Outcome | None:
        """What became of the task, if it has ended, by itself or by us."""
        if not self.alive:
            return None
        try:
            while self._pipe.poll():
                kind, _, text = self._pipe.recv_bytes().decode("utf-8", "replace").partition(" ")
                if kind == "ready":
                    self._ready, self._deadline = True, float("inf")
                    if self.busy:
                        self._send()
                    continue
                return self._answered(kind, text)
        except (EOFError, OSError):
            return self._died()
        if not self._process.is_alive():  # and a child of its own keeps the pipe open
            return self._died()
        if time.monotonic() > self._deadline:
            if not self._ready:
                self.end()
                raise CannotStart(f"a worker did not start within {START_SECONDS} s.")
            return self._ended("timeout", f"took longer than {self.limits.seconds:g} s")
        size = resident_mebibytes(self._process.pid)
        if self.busy and size > self.limits.mebibytes:
            return self._ended("memory", f"took more than {self.limits.mebibytes:g} MiB of memory")
        return None

    def end(self) -> None:
        """Kills the process; nothing of it is left when this returns.

        But for one that hangs in the kernel, on a file server that has gone, say: it ends when
        the kernel lets it, and is not waited for.
        """
        if self.alive:
            self._process.kill()
            self._process.join(END_SECONDS)
            self._pipe.close()
            if self._process.exitcode is not None:
                self._process.close()

    def _answered(self, kind: str, text: str) -> Outcome:
        index, self._index = self._index, None
        if kind == "store":
            raise CannotStore(text)
        if kind == "missing":
            raise ImportError(text)
        if kind == "fault":
            raise RuntimeError(text)
        if resident_mebibytes(self._process.pid) > 0.75 * self.limits.mebibytes:
            self.end()  # what libraries keep is not the next file's fault
        self._deadline = float("inf")
        return Outcome(index, "memory" if kind == "memory" else "done", text)

    def _ended(self, status: Status, text: str) -> Outcome | None:
        index, self._index = self._index, None
        self.end()
        return None if index is None else Outcome(index, status, text)

    def _died(self) -> Outcome | None:
        self._process.join(END_SECONDS)
        code = self._process.exitcode
        if not self._ready:
            self.end()
            raise CannotStart(
                f"a worker ended while it started (exit {code}); scripts that call build() need "
                "`if __name__ == '__main__':` around it."
            )
        return self._ended("crash", f"ended the process that read it ({_exit_name(code)})")


def resident_mebibytes(pid: int | None) -> float:
    """Resident memory of a process; 0 where the system does not say (not Linux)."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, IndexError, ValueError):
        return 0.0


def is_disk_full(error: BaseException | None) -> bool:
    """`error`, or one that it came of, says that a disk or quota is used up."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The environment that a worker is started with."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update({name: "1" for name in ONE_THREAD if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def _exit_name(code: int | None) -> str:
    if code is None:
        return "it closed its pipe"
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit {code}"


def _serve(pipe: connection.Connection, function: Callable[[Any], str], limits: Limits) -> None:
    """A worker's life: an answer for each task, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if limits.address_space:
        _limit_address_space(limits.mebibytes)
    try:
        pipe.send_bytes(b"ready ")
        while True:
            task = pickle.loads(pipe.recv_bytes())
            pipe.send_bytes(_answer(function, task)[:MOST_ANSWER_BYTES])
    except (EOFError, OSError):  # the parent has gone
        return


def _answer(function: Callable[[Any], str], task: Any) -> bytes:
    try:
        kind, text = "done", function(task)
    except MemoryError:
        kind, text = "memory", "asked for more memory than the limit"
    except Exception as error:
        if isinstance(error, OSError):
            kind, text = "store", str(error)
        elif isinstance(error, ImportError):
            kind, text = "missing", str(error)
        else:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{os.path.basename(last.filename)}:{last.lineno}"
            kind, text = "fault", f"{type(error).__name__}: {error} ({place})"
    return f"{kind} {' '.join(text.split())}".encode()


def _end_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _limit_address_space(mebibytes: float | int) -> None:
    """Makes one request for far more than the limit fail before memory is touched."""
    if mebibytes == float("inf") or not sys.platform.startswith("linux"):
        return
    import resource

    # Twice, and as much for what is reserved and never used: stacks and arenas of threads.
    most = int(2 * mebibytes * 2**20) + 8 * 2**30
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
