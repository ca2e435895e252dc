"""What is left of the suite of tasks: contact sheets of every task, and a printed table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sora_jax import video_io
from sora_jax.evaluate.measures import Measure
from sora_jax.evaluate.tasks import TASKS

MOST = 8  # videos on a sheet
COLUMNS = 17  # frames shown of each: all, as a seam may be between any two
SCALE = 1.5


class TaskGallery:
    """Keeps the few videos of each task that are shown; `add` is `tasks.evaluate`'s `on_video`."""

    def __init__(self) -> None:
        self.first: dict[str, list[tuple[str, np.ndarray]]] = {}
        self.failures: dict[str, list[tuple[str, np.ndarray]]] = {}

    def add(self, task: str, record: dict[str, Any], frames: UInt8[np.ndarray, "F H W 3"]) -> None:
        """Keeps one of the first videos of `task`, or one that is not what is asked."""
        label = f"{task}: {record['prompt']}"
        wrong = failures(TASKS[task].judge.measures, record["outcome"])
        first, failed = (kept.setdefault(task, []) for kept in (self.first, self.failures))
        if len(first) < MOST:
            first.append((label, frames))
        if wrong and len(failed) < MOST:
            failed.append((f"{label} ({wrong})", frames))

    def save(self, out: Path) -> list[Path]:
        """Writes the sheets beside `out`; removes those that an earlier run left of other tasks.

        Of extend forward, for example, OUT_extend_forward.png and OUT_extend_forward_failures.png.
        """
        written = []
        for task in TASKS:
            for kept, path in zip((self.first, self.failures), sheet_paths(out, task), strict=True):
                if not kept.get(task):
                    path.unlink(missing_ok=True)
                    continue
                labels, clips = zip(*kept[task], strict=True)
                sheet = video_io.contact_sheet(clips, columns=COLUMNS, labels=labels, scale=SCALE)
                written.append(video_io.save_image(path, sheet))
        return written


def failures(measures: Sequence[Measure], outcome: dict[str, Any]) -> str:
    """What a case did wrong in words: "seam 1.84, subject"."""
    words = (measure.failed(outcome[measure.name]) for measure in measures)
    return ", ".join(word for word in words if word)


def sheet_paths(out: Path, task: str) -> tuple[Path, Path]:
    """Where the sheets of a task's first videos and of its failures lie: beside `out`."""
    stem = f"{out.stem}_{task.replace(' ', '_')}"
    return out.with_name(f"{stem}.png"), out.with_name(f"{stem}_failures.png")


def table(result: dict[str, Any]):
    """A `rich` table, narrow enough for 80 columns: a row for each measure of each task."""
    from rich.table import Table

    shown = Table(title=f"tasks: {result.get('checkpoint', 'checkpoint')}")
    shown.add_column("measure")
    for heading in ("value", "95 % interval", "truth", "VAE", "target"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for task, section in result["tasks"].items():
        shown.add_row(f"[bold]{task}[/bold]", f"[dim]{section['cases']}[/dim]")
        for measure in TASKS[task].judge.measures:
            row = section["measures"][measure.name]
            shown.add_row(
                f"  {measure.name}" + (f", {measure.unit}" if measure.unit else ""),
                _number(row["value"]),
                _interval(row),
                _number(row["truth"]),
                _number(row["vae"]),
                _target(measure, result["targets"].get(f"{task}/{measure.name}")),
            )
        shown.add_section()
    shown.caption = (
        f"Rates; of numbers the median, of what is given the least. {_seconds(result)}"
        + "".join(f" Skipped: {name}, {why}." for name, why in result["skipped"].items())
    )
    return shown


def _seconds(result: dict[str, Any]) -> str:
    each = [section["seconds_per_video"] for section in result["tasks"].values()]
    return f"{np.mean(each):.2f} s a video on {result['device']}." if each else "Nothing was run."


def _interval(row: dict[str, Any]) -> str:
    """A dash where there are values of which none can be told."""
    if row["interval"] is None:
        return "" if row["value"] is None else "-"
    return " to ".join(map(_number, row["interval"]))


def _number(value: float | int | None) -> str:
    """Three digits or so; nothing of None."""
    return "" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _target(measure: Measure, row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    reached = "<=" if measure.at_most else ">="
    missed = "above" if measure.at_most else "below"
    return f"{reached if row['passed'] else missed} {row['target']:g}"
