"""Workers end what does not end by itself, say why, and go on with the rest."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sora_jax.data.build import workers
from sora_jax.data.build.workers import CannotStore, Limits, is_disk_full, run_tasks
from tests.data.build.tasks import do

ROOMY = Limits(seconds=60, mebibytes=2048)


def outcomes(tasks, *, workers=1, limits=ROOMY):
    return {
        o.index: (o.status, o.text) for o in run_tasks(do, tasks, workers=workers, limits=limits)
    }


def test_every_task_is_done_once_whatever_became_of_its_neighbours(tmp_path):
    limits = Limits(seconds=60, mebibytes=400)
    tasks = [
        ("double", 4),
        ("die",),
        ("grow",),
        ("huge", 1 << 44),
        ("die once", str(tmp_path / "marker")),
        ("long",),
        ("double", 5),
    ]
    assert outcomes(tasks, workers=2, limits=limits) == {
        0: ("done", "8"),
        1: ("crash", "ended the process that read it (SIGSEGV)"),
        2: ("memory", "took more than 400 MiB of memory"),
        3: ("memory", "asked for more memory than the limit"),
        4: ("done", "second try"),
        5: ("done", "é" * 253 + "\ufffd"),
        6: ("done", "10"),
    }


def test_what_never_ends_is_ended_in_time():
    began = time.monotonic()
    tasks = [("double", 4), ("spin",), ("sleep", 600), ("double", 5)]
    assert outcomes(tasks, workers=2, limits=Limits(seconds=1)) == {
        0: ("done", "8"),
        1: ("timeout", "took longer than 1 s"),
        2: ("timeout", "took longer than 1 s"),
        3: ("done", "10"),
    }
    assert time.monotonic() - began < 60


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


def test_a_worker_that_closes_its_pipe_but_stays_is_ended(monkeypatch):
    monkeypatch.setattr(workers, "END_SECONDS", 0.2)
    assert outcomes([("deaf",)]) == {
        0: ("crash", "ended the process that read it (it closed its pipe)")
    }


def test_workers_that_cannot_start_end_the_run_in_one_line():
    program = "from sora_jax.data.build.workers import run_tasks\n"
    program += "from tests.data.build.tasks import do\nlist(run_tasks(do, [('pid',)], workers=1))\n"
    path = Path(__file__).with_name("no_guard.py")
    try:
        path.write_text(program)
        command = [sys.executable, "-m", "tests.data.build.no_guard"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    finally:
        path.unlink()
    assert "CannotStart: a worker ended while it started (exit 1)" in done.stderr


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
