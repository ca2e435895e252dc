"""The steps under way and those since the last row of the log: awaited, timed, judged, averaged."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from sora_jax import agreement
from sora_jax.train.skips import Skips

PERCENTILES = (50, 90, 99)


class _Step(NamedTuple):
    step: int
    metrics: dict[str, Any]
    records: Callable[[], list[int]]


class Window:
    """Steps from their dispatch until their means are logged."""

    def __init__(self, skips: Skips, *, clock: Callable[[], float] = time.perf_counter):
        self._skips, self._clock = skips, clock
        self._running: list[_Step] = []
        self._done: list[_Step] = []
        self._seconds: list[float] = []  # of the steps done
        self._data: list[float] = []  # waits for a batch
        self._losses: list[float] = []  # since the last checkpoint
        # Of the last row taken, by the number of the process; None where it finished no step.
        self.hosts: dict[str, list[float | None]] = {}
        self._free = clock()  # when the step before was done, or the first one dispatched

    @property
    def busy(self) -> bool:
        """A step is under way on the devices."""
        return bool(self._running) and not self._running[-1].metrics["train/loss"].is_ready()

    def batch(self, seconds: float) -> None:
        """The host waited that long for a batch."""
        self._data.append(seconds)

    def started(
        self, step: int, metrics: dict[str, Any], *, records: Callable[[], list[int]]
    ) -> None:
        """`step` was dispatched; `records` tells those of its batch."""
        if not self._running:
            self._free = self._clock()
        self._running.append(_Step(step, metrics, records))

    def finish(self, through: int) -> None:
        """Waits for the steps up to `through`.

        Raises:
          FloatingPointError: one of them is not finite, as `Skips.judge` has it.
        """
        while self._running and self._running[0].step <= through:
            done = self._running.pop(0)
            names = ("train/loss", "train/grad_norm", "train/skipped")
            judged = jax.device_get({name: done.metrics[name] for name in names})
            now = self._clock()
            self._seconds.append(now - self._free)
            self._free = now
            self._done.append(done)
            if not judged["train/skipped"]:
                self._losses.append(float(judged["train/loss"]))
            self._skips.judge(done.step, judged, records=done.records)

    def loss_since_save(self) -> float | None:
        """Mean loss of the finished steps since the last call; None without any."""
        losses, self._losses = self._losses, []
        return sum(losses) / len(losses) if losses else None

    def take(self, through: int) -> tuple[int, dict[str, float]] | None:
        """(last step, means) of the finished steps up to `through`; None if there are none.

        All processes must call it: it gathers their times.
        """
        rows = [(done.step, done.metrics) for done in self._done if done.step <= through]
        if not rows:
            return None
        self._done = self._done[len(rows) :]
        values = average(rows) | self._times()
        self._seconds, self._data = [], []
        return rows[-1][0], values

    def _times(self) -> dict[str, float]:
        steps, waits = self._seconds, self._data
        values = {}
        if steps:
            for p in PERCENTILES:
                values[f"perf/step_seconds_p{p}"] = float(np.percentile(steps, p))
        mine = [float(np.mean(x)) if x else math.nan for x in (steps, waits)]
        if not math.isnan(sum(mine)):
            # What was read while a step ran cost nothing: this is the share of a step's time.
            values["perf/data_wait_share"] = mine[1] / max(mine[0], 1e-9)
        # JSON has no NaN.
        rows = agreement.gather([None if math.isnan(x) else x for x in mine])
        for name, column in zip(("step", "data_wait"), zip(*rows, strict=True), strict=True):
            self.hosts[f"{name}_seconds"] = list(column)
            if None in column:
                continue
            values[f"hosts/{name}_seconds_min"] = min(column)
            values[f"hosts/{name}_seconds_mean"] = sum(column) / len(column)
            values[f"hosts/{name}_seconds_max"] = max(column)
            values[f"hosts/{name}_slowest"] = float(column.index(max(column)))
        return values


def average(pending: list[tuple[int, dict]]) -> dict[str, float]:
    """Means over steps: NaN left out where a step has none (a bucket of t without examples).

    Skipped steps count in "train/skipped", which is their number, alone.

    Raises:
      FloatingPointError: naming the first metric of train/ that is not finite, and its step.
    """
    rows = jax.device_get(pending)
    if not rows:
        return {}
    skipped = sum(float(metrics.get("train/skipped", 0)) for _, metrics in rows)
    kept = [(step, metrics) for step, metrics in rows if not metrics.get("train/skipped")]
    for step, metrics in kept:
        # The loss first: what else is not finite follows from it more often than not.
        for name in sorted(metrics, key=lambda name: name != "train/loss"):
            value = metrics[name]
            if name.startswith("train/") and not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {step}; lower config.optim.peak_lr and run again, "
                    "which goes on from the last checkpoint."
                )
    means = {}
    for name in rows[0][1]:
        values = [float(m[name]) for _, m in kept if not math.isnan(m[name])]
        means[name] = sum(values) / len(values) if values else math.nan
    if "train/skipped" in means:
        means["train/skipped"] = skipped
    return means
