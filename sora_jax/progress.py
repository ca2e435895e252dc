"""Progress with rate and time left: a bar in a terminal, a line now and then elsewhere."""

import sys
import time

import jax


class Progress:
    """`with Progress("training", total=1000) as p: p.update(step, loss="0.3")`.

    Of several processes of a run the first alone shows it; `alone` says without asking JAX, which
    would take hold of the devices, that there is one. `since`, a time of `time.monotonic`: work on
    it began earlier than the object did.
    """

    def __init__(
        self,
        title: str,
        *,
        total: int,
        unit: str = "steps",
        start: int = 0,
        alone: bool = False,
        since: float | None = None,
    ):
        self._title, self._total, self._unit = title, total, unit
        self._start, self._done, self._bar = start, start, None
        self._quiet = not alone and jax.process_index() != 0
        self._begun = self._printed = time.monotonic() if since is None else since

    def __enter__(self):
        if not self._quiet and sys.stderr.isatty():
            from rich import progress as rich_progress
            from rich.console import Console

            self._bar = rich_progress.Progress(
                rich_progress.TextColumn("{task.description}"),
                rich_progress.BarColumn(),
                rich_progress.MofNCompleteColumn(),
                rich_progress.TextColumn("{task.fields[rate]}"),
                rich_progress.TimeRemainingColumn(),
                rich_progress.TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self._title, total=self._total, completed=self._start, rate="", note=""
            )
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, **notes: str) -> None:
        """`done` units are complete; `notes` are shown beside the bar."""
        if self._quiet:
            return
        moved, self._done = done > self._done, done
        now = time.monotonic()
        rate = (done - self._start) / max(now - self._begun, 1e-9)
        note = "  ".join(f"{name} {value}" for name, value in notes.items())
        if self._bar is not None:
            shown = f"{rate:.2f} {self._unit}/s"
            self._bar.update(self._task, completed=done, rate=shown, note=note)
        elif now - self._printed > 30 or (moved and done >= self._total):
            self._printed = now
            left = (self._total - done) / rate if rate else 0.0
            print(
                f"{self._title} {done}/{self._total} {self._unit}, {rate:.2f} a second, "
                f"{left / 60:.1f} min left  {note}",
                file=sys.stderr,
                flush=True,
            )


class LearnedProgress:
    """A `Progress` that learns its total with the first step: `on_step(step, total, ...)`."""

    def __init__(self, title: str, *, unit: str = "steps"):
        self._title, self._unit = title, unit
        self._shown: Progress | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._shown is not None:
            self._shown.__exit__()

    def on_step(self, step: int, total: int, *_) -> None:
        if self._shown is None:
            shown = Progress(self._title, total=total, unit=self._unit, start=step)
            self._shown = shown.__enter__()
        self._shown.update(step)


class StagedProgress:
    """A `Progress` for one stage after the other: `on_progress(stage, done, total)`."""

    def __init__(self, *, unit: str):
        self._unit, self._stage = unit, ""
        self._shown: Progress | None = None
        self._told = time.monotonic()  # a stage begins where the last one ended

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._shown is not None:
            self._shown.__exit__()

    def on_progress(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self.__exit__()
            shown = Progress(stage, total=total, unit=self._unit, since=self._told)
            self._shown, self._stage = shown.__enter__(), stage
        self._shown.update(done)
        self._told = time.monotonic()
