"""What is left of an evaluation: a JSON file, contact sheets beside it, and a printed table."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sora_jax import video_io
from sora_jax.evaluate import scores

FIRST = 16  # videos on the sheet
MOST_FAILURES = 16  # videos of each split on the sheet of failures
COLUMNS = 9  # frames shown of each: every second of 17


class Gallery:
    """Keeps the few videos of an evaluation that are shown; `add` is its `on_video`."""

    def __init__(self) -> None:
        self.first: list[tuple[str, np.ndarray]] = []
        self.failures: dict[str, list[tuple[str, np.ndarray]]] = {}

    def add(self, split: str, record: dict[str, Any], frames: UInt8[np.ndarray, "F H W 3"]) -> None:
        """Keeps one of the first videos, or one with a wrong attribute; forgets the others."""
        if len(self.first) < FIRST:
            self.first.append((record["prompt"], frames))
        failures = self.failures.setdefault(split, [])
        wrong = wrong_words(record)
        if wrong and len(failures) < MOST_FAILURES:
            failures.append((f"{split}: {record['prompt']} ({wrong})", frames))


def wrong_words(record: dict[str, Any]) -> str:
    """What was asked and what was read instead: "red -> orange, rolls left -> flies left"."""
    return ", ".join(
        f"{record['asked'][name]} -> {record['read'][name]}"
        for name in scores.ATTRIBUTES
        if not record["right"][name]
    )


def sheet_paths(out: Path) -> tuple[Path, Path]:
    """Where the sheets of the first videos and of the failures lie: beside `out`."""
    return out.with_suffix(".png"), out.with_name(f"{out.stem}_failures.png")


def write(result: dict[str, Any], out: Path, *, gallery: Gallery) -> list[Path]:
    """Writes the sheets, then `out`, each by an atomic rename; returns the paths written.

    Where nothing failed there is no sheet of failures, and one of an earlier run is removed.
    """
    failures = [item for items in gallery.failures.values() for item in items]
    written = []
    for path, items in zip(sheet_paths(out), (gallery.first, failures), strict=True):
        if not items:
            path.unlink(missing_ok=True)
            continue
        labels, clips = zip(*items, strict=True)
        sheet = video_io.contact_sheet(clips, columns=COLUMNS, labels=labels)
        written.append(video_io.save_image(path, sheet))
    return [*written, save_json(result, out)]


def save_json(result: dict[str, Any], out: Path) -> Path:
    """Writes `result` by an atomic rename, and returns the path."""
    with video_io.atomic_path(out) as temporary:
        temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    return out


def partial_path(out: Path) -> Path:
    """Where what is known of a suite lies until it is done: OUT.partial.json."""
    return out.with_suffix(".partial.json")


def table(result: dict[str, Any]):
    """A `rich` table, narrow enough for 80 columns: a row for each split and attribute."""
    from rich.table import Table

    shown = Table(title=f"{result['suite']}: {result.get('checkpoint', 'checkpoint')}")
    for heading in ("prompts", "attribute"):
        shown.add_column(heading)
    for heading in ("rate", "95 % interval", "ceiling", "target"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for split in ("heldout", "seen"):
        section = result[split]
        for name, score in section["attributes"].items():
            low, high = score["interval"]
            shown.add_row(
                split,
                name,
                f"{score['rate']:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{section['ceiling']['attributes'][name]['rate']:.3f}",
                _target(result["targets"].get(f"{split}/{name}")),
            )
        shown.add_section()
    vae = result["vae"]
    shown.caption = (
        f"VAE {vae['psnr_mean']:.2f} dB ({_target(result['targets']['vae/psnr'])}); all four read "
        f"right in {vae['attributes']['all']['rate']:.3f} of its reconstructions. "
        f"{result['heldout']['seconds_per_video']:.2f} s a video on {result['device']}."
    )
    return shown


def print_table(result: dict[str, Any], console=None) -> None:
    """Prints the table of the result's suite, by default to standard output."""
    from rich.console import Console

    from sora_jax.evaluate import task_report

    make = task_report.table if result["suite"] == "tasks" else table
    (console or Console()).print(make(result))


def _target(target: dict[str, Any] | None) -> str:
    if target is None:
        return ""
    return f"{'>=' if target['passed'] else 'below'} {target['target']:g}"
