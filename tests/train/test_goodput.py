"""Goodput: every second in one category, over restarts, and what a crash cost."""

import json

import pytest

from sora_jax.train.goodput import CATEGORIES, Goodput


class Clock:
    now = 100.0

    def __call__(self):
        return self.now

    def run(self, goodput, phase, seconds):
        with goodput.phase(phase):
            self.now += seconds

    def goodput(self, tmp_path) -> Goodput:
        return Goodput(tmp_path / "goodput.json", clock=self, date=self)


@pytest.fixture
def clock():
    return Clock()


def read(tmp_path):
    return json.loads((tmp_path / "goodput.json").read_text())


def test_phases_within_phases_count_once_and_all_add_up_to_the_wall_time(tmp_path, clock):
    goodput = clock.goodput(tmp_path)
    clock.run(goodput, "compile", 30)
    with goodput.phase("init"):
        clock.now += 2
        clock.run(goodput, "data", 1)
        clock.now += 4
    clock.now += 0.5
    clock.run(goodput, "step", 10)
    goodput.move(4.0, source="step", target="data")
    goodput.resumed(0)
    goodput.write()
    told = read(tmp_path)
    expected = {"compile": 30, "init": 6, "data": 5, "step": 6, "other": 0.5}
    assert told["seconds"] == dict.fromkeys(CATEGORIES, 0) | expected
    assert told["wall_seconds"] == 47.5 == sum(told["seconds"].values())
    assert told["goodput"] == 6 / 47.5
    assert goodput.line() == (
        "0.01 h: compile 63.2%, init 12.6%, step 12.6%, data 10.5%, other 1.1%"
    )


def test_steps_done_again_after_a_crash_are_lost_and_no_others(tmp_path, clock):
    begun = clock.now
    first = clock.goodput(tmp_path)
    first.resumed(0)
    for step in range(1, 8):
        clock.run(first, "step", step)  # a step takes as many seconds as its number
        first.finished(step)
        if step in (2, 4):
            first.saved(step)
        first.write()
    clock.run(first, "step", 50)  # killed in step 8: its record is of step 7

    clock.now += 1000  # before it is started again
    second = clock.goodput(tmp_path)
    second.resumed(4)
    clock.run(second, "step", 5)
    second.finished(5)
    second.write()
    told = read(tmp_path)
    assert told["seconds"]["lost"] == 5 + 6 + 7
    assert told["seconds"]["step"] == 1 + 2 + 3 + 4 + 5
    assert told["seconds"]["down"] == 50 + 1000
    assert told["wall_seconds"] == clock.now - begun == sum(told["seconds"].values())
    assert told["goodput"] == 15 / told["wall_seconds"] and told["runs"] == 2

    third = clock.goodput(tmp_path)
    third.resumed(2)  # step 4 was damaged
    third.write()
    assert read(tmp_path)["seconds"]["lost"] == 18 + 3 + 4 + 5


def test_a_run_that_ended_well_has_lost_nothing(tmp_path, clock):
    first = clock.goodput(tmp_path)
    first.resumed(0)
    clock.run(first, "step", 3)
    first.finished(1)
    first.saved(1)
    first.write()
    second = clock.goodput(tmp_path)
    second.resumed(1)
    second.write()
    assert read(tmp_path)["seconds"]["lost"] == 0


def test_a_start_that_is_refused_is_no_run_and_its_time_down(tmp_path, clock):
    first = clock.goodput(tmp_path)
    first.resumed(0)
    clock.run(first, "step", 3)
    first.write()
    refused = clock.goodput(tmp_path)
    clock.run(refused, "init", 7)
    refused.write()
    clock.now += 5
    second = clock.goodput(tmp_path)
    second.resumed(0)
    second.write()
    told = read(tmp_path)
    assert told["runs"] == 2 and told["seconds"]["down"] == 12 and told["seconds"]["init"] == 0
    assert told["wall_seconds"] == 15 == sum(told["seconds"].values())


def test_a_file_without_a_date_goes_on_and_a_date_that_was_set_back_takes_nothing(tmp_path, clock):
    first = clock.goodput(tmp_path)
    first.resumed(0)
    clock.run(first, "step", 3)
    first.write()
    file, told = tmp_path / "goodput.json", read(tmp_path)
    for date in ({}, {"date": clock.now + 60}):
        file.write_text(json.dumps({k: v for k, v in told.items() if k != "date"} | date))
        second = clock.goodput(tmp_path)
        second.resumed(0)
        second.write()
        assert read(tmp_path)["wall_seconds"] == 3 and read(tmp_path)["seconds"]["down"] == 0
