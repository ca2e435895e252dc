"""Killed anywhere and started again, a build ends in the bytes of one that nobody disturbed."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sora_jax import video_io
from tests.data.build.fakes import contents

# Imports once what every attempt needs; each line of its input is an attempt in a fork of it, at
# the head of a process group of its own.
ATTEMPTS = """
import os, sys
sys.path.insert(0, os.getcwd())
from sora_jax.data.build import report, run, settings
import tensorflow_datasets
small = settings.BuildSettings(
    shots=None, length=None, motion=None, duplicate=None,
    write=settings.WriteSettings(shard_mebibytes=1, preset="ultrafast", crf=0),
)
for line in sys.stdin:
    source, out, workers = line.split()
    child = os.fork()
    if not child:
        os.setsid()
        sys.stdin.close()
        try:
            run.build(source, out, small, workers=int(workers), captions="allow")
            os._exit(0)
        except KeyboardInterrupt as interrupt:
            print(interrupt, file=sys.stderr, flush=True)
            os._exit(130)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Attempts:
    """Builds that can be interrupted."""

    def __init__(self, errors: Path):
        self.errors = errors
        self.process = subprocess.Popen(
            [sys.executable, "-c", ATTEMPTS],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors.open("w"), text=True,
        )  # fmt: skip

    def begin(self, source, out, workers=1) -> int:
        print(source, out, workers, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def end(self) -> int:
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def attempts(tmp_path_factory):
    attempts = Attempts(tmp_path_factory.mktemp("attempts") / "errors")
    yield attempts
    attempts.process.stdin.close()
    attempts.process.wait(20)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (16, 128, 160, 3), np.uint8)
        video_io.write_video(folder / f"{i}.mp4", noise, fps=8)
    return folder


def is_running(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def progress(out: Path) -> int:
    """Files that are there for good, so far."""
    names = [name for _, _, names in os.walk(out) for name in names]  # some go while we look
    return sum(not name.startswith(".") for name in names)


def test_killed_at_ten_moments_the_shards_are_those_of_an_undisturbed_build(
    attempts, clips, tmp_path
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    attempts.begin(clips, whole)
    assert attempts.end() == 0, attempts.errors.read_text()
    rng = random.Random(4)
    moments = set()
    for attempt in range(10):
        begun = progress(out)
        pid = attempts.begin(clips, out, workers=1 + attempt % 2)
        # Most of an attempt is spent on starting processes: moments are counted in what is done.
        wanted = begun + rng.randrange(4)
        deadline = time.monotonic() + 5
        while progress(out) < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if attempts.end() == 0:  # it was quicker than us: on with another
            assert contents(out) == contents(whole)
            out = tmp_path / "another"
        moments.add(progress(out))
    assert len(moments) > 2
    attempts.begin(clips, out)
    assert attempts.end() == 0, attempts.errors.read_text()
    assert contents(out) == contents(whole)
    assert len(list(out.glob("clips-*"))) > 2
    assert attempts.errors.read_text().count("Traceback") == 0


def test_ctrl_c_ends_all_workers_at_once_and_the_same_command_goes_on(attempts, clips, tmp_path):
    out = tmp_path / "out"
    pid = attempts.begin(clips, out, workers=2)
    while not list(out.glob(".build/files/*/*.json")):
        time.sleep(0.01)
    os.killpg(pid, signal.SIGINT)
    began = time.monotonic()
    assert attempts.end() == 130
    assert time.monotonic() - began < 2
    while is_running(pid):  # multiprocessing's own tracker takes a moment more
        assert time.monotonic() - began < 5
        time.sleep(0.02)
    assert "files are finished: the same command goes on." in attempts.errors.read_text()
