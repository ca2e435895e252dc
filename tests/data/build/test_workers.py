"""Workers end what does not end by itself, say why, and go on with the rest."""

import os
import signal
import subprocess
import sys
import time

import pytest

from sora_jax.data.build.workers import CannotStore, Limits, is_disk_full, run_tasks
from tests.data.build.tasks import do

ROOMY = Limits(seconds=60, mebibytes=2048)


def outcomes(tasks, *, workers=1, limits=ROOMY):
    return {
        o.index: (o.status, o.text) for o in run_tasks(do, tasks, workers=workers, limits=limits)
    }


def test_every_task_is_done_once_whatever_became_of_its_neighbours(tmp_path):
    limits = Limits(seconds=3, mebibytes=400)
    tasks = [
        ("double", 4),
        ("spin",),
        ("die",),
        ("grow",),
        ("huge", 1 << 44),
        ("die once", str(tmp_path / "marker")),
        ("long",),
        ("double", 5),
    ]
    began = time.monotonic()
    assert outcomes(tasks, workers=2, limits=limits) == {
        0: ("done", "8"),
        1: ("timeout", "took longer than 3 s"),
        2: ("crash", "ended the process that read it (SIGSEGV)"),
        3: ("memory", "took more than 400 MiB of memory"),
        4: ("memory", "asked for more memory than the limit"),
        5: ("done", "second try"),
        6: ("done", "é" * 253 + "\ufffd"),
        7: ("done", "10"),
    }
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("task", "error", "line"),
    [
        ("full", CannotStore, "No space left on device"),
        ("fault", RuntimeError, r"KeyError: 'no such thing' \(tasks.py:"),
    ],
)
def test_faults_that_are_no_task_s_own_end_the_run_and_its_workers(task, error, line):
    pids = []
    with pytest.raises(error, match=line):
        for outcome in run_tasks(do, [("pid",), (task,)], workers=1, limits=ROOMY):
            pids.append(int(outcome.text))
    assert pids and not any(is_running(pid) for pid in pids)


def test_leaving_the_generator_ends_its_workers():
    running = run_tasks(do, [("pid",), ("spin",)], workers=1, limits=ROOMY)
    pid = int(next(running).text)
    assert is_running(pid)
    running.close()
    assert not is_running(pid)


def test_workers_end_with_a_parent_that_is_killed():
    program = (
        "from sora_jax.data.build.workers import run_tasks\n"
        "from tests.data.build.tasks import do\n"
        "if __name__ == '__main__':\n"
        "    for o in run_tasks(do, [('pid',), ('sleep', 60)], workers=1):\n"
        "        print(o.text, flush=True)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": "."},
    )
    pid = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(pid)


def test_a_full_disk_is_recognised_behind_other_errors():
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise ValueError("cannot encode") from error
    except ValueError as error:
        assert is_disk_full(error)
    assert not is_disk_full(ValueError("else"))


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
