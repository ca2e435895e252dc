"""What is left is told from what took time."""

import pytest

from sora_jax import progress
from sora_jax.progress import LearnedProgress, Progress, StagedProgress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    return now


def test_time_left_is_that_of_the_steps_to_come(clock, capsys):
    """Of eight steps a cache leaves four, of 20 s each: those that reuse are over at once."""
    with LearnedProgress("denoising") as shown:
        for done, seconds in ((1, 20), (1, 0), (1, 0), (2, 20), (3, 20), (3, 0), (4, 20), (4, 0)):
            clock[0] += seconds
            shown.on_step(done, 4)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "denoising 3/4 steps, 0.05 a second, 0.3 min left  ",
        "denoising 4/4 steps, 0.05 a second, 0.0 min left  ",
    ]


def test_the_last_line_is_printed_once(clock, capsys):
    with Progress("denoising", total=2) as shown:
        for done in (1, 2, 2, 2):
            clock[0] += 1.0
            shown.update(done)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_every_stage_counts_from_the_end_of_the_last(clock, capsys):
    with StagedProgress(unit="videos") as shown:
        for stage, done in (("animate", 1), ("animate", 2), ("loop", 1), ("loop", 2)):
            clock[0] += 40.0
            shown.on_progress(stage, done, 2)
    assert capsys.readouterr().err.splitlines() == [
        "animate 1/2 videos, 0.03 a second, 0.7 min left  ",
        "animate 2/2 videos, 0.03 a second, 0.0 min left  ",
        "loop 1/2 videos, 0.03 a second, 0.7 min left  ",
        "loop 2/2 videos, 0.03 a second, 0.0 min left  ",
    ]
