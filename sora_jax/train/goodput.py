"""Where the time of a run goes, over all its restarts: workdir/goodput.json.

Every moment belongs to one category, so the categories add up to the wall time:

step: the devices work on steps; compile: the first call of a step with new shapes; init: mesh,
first weights; restore: checkpoints found, checked and read; data: no device works, for want of a
batch; save: starting checkpoints and waiting for them; preview; lost: steps that were done again
after a restart; down: from the last record of a run until the next one begins, what it did since
then included; other: the rest.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

CATEGORIES = ("step", "compile", "init", "restore", "data", "save", "preview", "lost", "down")
CATEGORIES += ("other",)
_SAVES_KEPT = 100


class Goodput:
    """Counts seconds by category from its creation on, on top of those in `file`.

    The first process alone reads and writes the file. A start that is refused before `resumed`
    leaves it as it is: for the next one that time was down.

    Args:
      clock: seconds within a run; a test's own.
      date: seconds that go on between runs.
    """

    def __init__(
        self,
        file: Path,
        *,
        clock: Callable[[], float] = time.perf_counter,
        date: Callable[[], float] = time.time,
    ):
        self._file, self._clock, self._date = Path(file), clock, date
        self._active = jax.process_index() == 0
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._wall, self._runs, self._step = 0.0, 0, 0
        self._saves: list[list[float]] = []  # [step, seconds of steps up to it]
        if self._active and self._file.is_file():
            old = json.loads(self._file.read_text())
            self._seconds |= old["seconds"]
            self._wall, self._runs, self._step = old["wall_seconds"], old["runs"], old["step"]
            self._saves = old["saves"]
            # Files of earlier versions have no date.
            down = max(0.0, self._date() - old.get("date", math.inf))
            self._seconds["down"] += down
            self._wall += down
        self._resumed = False
        self._phase = "other"
        self._since = self._clock()

    def _switch(self, phase: str) -> str:
        now = self._clock()
        self._seconds[self._phase] += now - self._since
        self._wall += now - self._since
        before, self._phase, self._since = self._phase, phase, now
        return before

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside belongs to category `name`, but for phases within it."""
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def move(self, seconds: float, *, source: str, target: str) -> None:
        """Counts `seconds` of one category as another's."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def seconds(self, name: str) -> float:
        """Of a category so far, the phase under way left out."""
        return self._seconds[name]

    def resumed(self, step: int) -> None:
        """The run goes on from `step`: what an earlier one did beyond it was lost."""
        self._runs, self._resumed = self._runs + 1, True
        if self._step > step:
            kept = [done for saved, done in self._saves if saved <= step]
            lost = self._seconds["step"] - (kept[-1] if kept else 0.0)
            self.move(lost, source="step", target="lost")
        self._saves = [save for save in self._saves if save[0] <= step]
        self._step = step

    def finished(self, step: int) -> None:
        """The devices are done with `step`."""
        self._step = step

    def saved(self, step: int) -> None:
        """A checkpoint of `step` is under way."""
        self._switch(self._phase)
        self._saves = [*self._saves, [step, self._seconds["step"]]][-_SAVES_KEPT:]

    def write(self) -> None:
        """Replaces the file, once the run has begun."""
        self._switch(self._phase)
        if not self._active or not self._resumed:
            return
        record = {
            "goodput": self._seconds["step"] / max(self._wall, 1e-9),
            "wall_seconds": self._wall,
            "date": self._date(),
            "seconds": self._seconds,
            "runs": self._runs,
            "step": self._step,
            "saves": self._saves,
        }
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(partial, self._file)

    def line(self) -> str:
        """Shares of the wall time in one line, the largest first."""
        self._switch(self._phase)
        # Equal shares by name, whatever their last bits.
        shares = sorted(self._seconds.items(), key=lambda item: (-round(item[1], 6), item[0]))
        wall = max(self._wall, 1e-9)
        parts = ", ".join(f"{name} {s / wall:.1%}" for name, s in shares if s / wall >= 5e-4)
        runs = f" over {self._runs} runs" if self._runs > 1 else ""
        return f"{self._wall / 3600:.2f} h{runs}: {parts}"
