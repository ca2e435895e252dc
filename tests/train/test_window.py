"""Steps from dispatch to log: waited for in order, timed by the devices' work, averaged."""

import math

import jax.numpy as jnp
import pytest

from sora_jax.train.skips import SkipConfig, Skips
from sora_jax.train.window import Window, average


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def metrics(loss, *, skipped=0.0):
    values = {"train/loss": loss, "train/grad_norm": 1.0, "train/skipped": skipped}
    return {name: jnp.float32(value) for name, value in values.items()}


def test_steps_are_timed_from_the_end_of_the_one_before():
    clock = Clock()
    window = Window(Skips(SkipConfig()), clock=clock)
    durations = [1.0, 2.0, 3.0, 4.0]
    clock.now = 50.0  # compiling
    for step in range(1, len(durations) + 1):
        window.batch(0.5)
        window.started(step, metrics(step), records=list)
        if step > 1:
            clock.now += durations[step - 2]
            window.finish(step - 1)
    clock.now += durations[-1]
    window.finish(4)
    step, values = window.take(3)
    assert step == 3 and values["train/loss"] == 2.0
    assert values["perf/step_seconds_p50"] == 2.5 and values["perf/step_seconds_p99"] < 4.0
    assert values["perf/step_seconds_p90"] == pytest.approx(3.7)
    assert values["perf/data_wait_share"] == 0.5 / 2.5
    for kind in ("min", "mean", "max"):
        assert values[f"hosts/step_seconds_{kind}"] == 2.5
    assert window.take(3) is None
    assert window.take(4)[1]["train/loss"] == 4.0


def test_times_of_all_processes_are_gathered_and_the_slowest_named(monkeypatch):
    monkeypatch.setattr("sora_jax.agreement.gather", lambda mine: [mine, [9.0, 0.25], [3.0, 0.5]])
    clock = Clock()
    window = Window(Skips(SkipConfig()), clock=clock)
    window.batch(0.0)
    window.started(1, metrics(1), records=list)
    clock.now += 3.0
    window.finish(1)
    values = window.take(1)[1]
    found = {name: value for name, value in values.items() if name.startswith("hosts/step")}
    assert found == {
        "hosts/step_seconds_min": 3.0,
        "hosts/step_seconds_mean": 5.0,
        "hosts/step_seconds_max": 9.0,
        "hosts/step_slowest": 1.0,
    }
    assert values["hosts/data_wait_slowest"] == 2.0
    assert window.hosts == {
        "step_seconds": [3.0, 9.0, 3.0],
        "data_wait_seconds": [0.0, 0.25, 0.5],
    }


def test_skipped_steps_are_counted_and_left_out_of_the_means():
    window = Window(Skips(SkipConfig(in_row=2)))
    for step, (loss, skipped) in enumerate([(1.0, 0), (math.nan, 1), (3.0, 0)], start=1):
        window.started(step, metrics(loss, skipped=skipped), records=lambda: [7])
    window.finish(3)
    assert window.loss_since_save() == 2.0 and window.loss_since_save() is None
    values = window.take(3)[1]
    assert values["train/loss"] == 2.0 and values["train/skipped"] == 1
    assert math.isnan(average([(2, metrics(math.nan, skipped=1))])["train/loss"])
