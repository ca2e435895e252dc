"""What a build kept, dropped and left out, as report.json and report.html.

Rows (millions, perhaps) are read once, in bounded memory: counters, histograms of fixed bins and
samples by a stable hash. What is written depends neither on their order nor on a clock.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax import video_io
from sora_jax.data.build import report_page
from sora_jax.data.build.histograms import (
    Counts,
    Linear,
    Log,
    Sample,
    Score,
    Tally,
    is_number,
)
from sora_jax.data.build.settings import SCORE_UNITS, STAGES

FORMAT = 1  # of report.json; raised when a key changes its meaning
MOST_FILES_NAMED = 10_000  # of those left out; beyond, only counted
SHOWN_CLIPS = 18  # kept ones, with pictures
DROPPED_SHOWN = 4  # of each stage, by name
DROP_NOTHING = ("probe", "letterbox", "resize", "write")  # stages that only leave out whole files

_KEY = re.compile(r"#\d{8}\b")
_MEASURED = re.compile(r"\s*\([^()]*\d[^()]*\)")
_NUMBER = re.compile(r"(?<![A-Za-z\d.])[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?")

Frames = Callable[[str], np.ndarray | None]


def write_report(
    out: Path, rows: Iterable[dict[str, Any]], *, settings: dict[str, Any], frames: Frames
) -> dict[str, Any]:
    """Writes `out`/report.json and `out`/report.html, each by an atomic rename.

    Args:
      rows: the results of all files, in any order; see `Report.add`.
      settings: of the build, a section a stage; shown as they are.
      frames: the frames of a kept clip by its key, uint8 (F H W 3) or (H W 3), or None if there
        are none to show. Called for a few clips, after the last row.

    Returns:
      What report.json holds.
    """
    report = Report()
    for row in rows:
        report.add(row)
    result = report.as_dict(json.loads(json.dumps(settings)))  # tuples become lists, as in the file
    shown = [(clip, frames(clip["key"])) for clip in result["clips_shown"]]
    page = report_page.page(result, shown)
    with video_io.atomic_path(Path(out) / "report.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
    with video_io.atomic_path(Path(out) / "report.html") as temporary:
        temporary.write_text(page, "utf-8")
    return result


class _Stage:
    """What one stage dropped."""

    def __init__(self) -> None:
        self.clips = self.milliseconds = 0
        self.reasons = Tally(32)
        self.sample = Sample(DROPPED_SHOWN)

    def add(self, clip: dict[str, Any]) -> None:
        reason = clip["dropped"]["reason"]
        self.clips += 1
        self.milliseconds += _milliseconds(clip)
        self.reasons.add(without_numbers(reason))
        self.sample.add(clip["key"], {"key": clip["key"], "reason": reason})


class Report:
    """Adds up rows; `as_dict` is what report.json holds."""

    def __init__(self) -> None:
        self._files = self._left_out = 0
        self._milliseconds = {"read": 0, "cut": 0, "kept": 0}  # whole, so that sums are exact
        self._kept = dict.fromkeys(
            ("clips", "images", "frames", "bytes", "captions", "without_caption"), 0
        )
        self._clips = 0
        self._stages: dict[str, _Stage] = {}
        self._left_out_by_stage, self._left_out_by_reason = Tally(), Tally(64)
        self._left_out_files = Sample(MOST_FILES_NAMED)
        self._warned, self._warned_files = 0, Sample(MOST_FILES_NAMED)
        self._shown = Sample(SHOWN_CLIPS)
        self._tallies = {name: Tally() for name in ("codec", "size", "fps", "caption_kind")}
        self._histograms = {
            "duration": Linear(0.05, 12_000, "seconds"),
            "aspect": Log(-4, 4, "width / height", per_octave=8, centred=True),
            "frames": Counts(10_000, "frames"),
            "caption": Counts(2_000, "words"),
        }
        self._scores: dict[str, Any] = {
            "motion": Log(-12, 14, SCORE_UNITS["motion"]),
            "sharpness": Log(-20, 24, SCORE_UNITS["sharpness"]),
        }

    def add(self, row: dict[str, Any]) -> None:
        """Counts one file: a FileResult, whose clips say for themselves if they were dropped."""
        self._files += 1
        if row.get("error"):
            self._add_left_out(row)
            return
        if is_number(row.get("seconds")):
            self._milliseconds["read"] += round(1000 * row["seconds"])
        if row.get("codec"):
            self._tallies["codec"].add(str(row["codec"]))
        if row.get("warning"):
            self._warned += 1
            warned = {"source": row["source"], "warning": one_line(row["warning"])}
            self._warned_files.add(row["source"], warned)
        for clip in row.get("clips") or ():
            self._add_clip(clip)

    def _add_left_out(self, row: dict[str, Any]) -> None:
        stage, reason = str(row.get("stage") or "other"), one_line(row["error"])
        self._left_out += 1
        self._left_out_by_stage.add(stage)
        self._left_out_by_reason.add(without_numbers(_without_name(reason, row["source"])))
        file = {"source": row["source"], "stage": stage, "reason": reason}
        self._left_out_files.add(row["source"], file)

    def _add_clip(self, clip: dict[str, Any]) -> None:
        self._clips += 1
        self._milliseconds["cut"] += _milliseconds(clip)
        dropped = clip.get("dropped")
        if dropped:
            self._stages.setdefault(dropped["stage"], _Stage()).add(clip)
        else:
            self._add_kept(clip)
        if _milliseconds(clip) and clip.get("num_frames") != 1:
            self._histograms["duration"].add(_milliseconds(clip) / 1000, dropped=bool(dropped))
        for name, value in sorted((clip.get("scores") or {}).items()):
            if is_number(value):
                scores = self._scores.setdefault(name, Score(SCORE_UNITS.get(name, "")))
                scores.add(value, dropped=bool(dropped))

    def _add_kept(self, clip: dict[str, Any]) -> None:
        kept, captions = self._kept, [c for c in clip.get("captions") or () if c]
        self._milliseconds["kept"] += _milliseconds(clip)
        kept["clips"] += 1
        kept["images"] += clip["num_frames"] == 1
        kept["frames"] += clip["num_frames"]
        kept["bytes"] += clip.get("bytes") or 0
        kept["captions"] += len(captions)
        kept["without_caption"] += not captions
        self._tallies["size"].add(f"{clip['width']}×{clip['height']}")
        self._histograms["aspect"].add(clip["width"] / clip["height"])
        self._histograms["frames"].add(clip["num_frames"])
        if clip["num_frames"] > 1 and is_number(clip.get("fps")):
            self._tallies["fps"].add(f"{clip['fps']:.2f}".rstrip("0").rstrip("."))
        for caption in captions:
            self._histograms["caption"].add(len(caption.split()))
        for kind in clip.get("caption_kinds") or ():
            self._tallies["caption_kind"].add(kind)
        shown = ("key", "width", "height", "num_frames", "fps", "start", "end")
        self._shown.add(
            clip["key"],
            {name: clip.get(name) for name in shown}
            | {
                "caption_kinds": list(clip.get("caption_kinds") or ()),
                "captions": [cut_short(caption) for caption in clip.get("captions") or ()],
            },
        )

    def as_dict(self, settings: dict[str, Any]) -> dict[str, Any]:
        seconds = {name: value / 1000 for name, value in self._milliseconds.items()}
        histograms = self._histograms | dict(sorted(self._scores.items()))
        return {
            "format": FORMAT,
            "totals": {
                "files": self._files,
                "files_read": self._files - self._left_out,
                "files_left_out": self._left_out,
                "seconds_read": seconds["read"],
                "clips_cut": self._clips,
                "seconds_cut": seconds["cut"],
                **{f"{name}_kept": self._kept[name] for name in ("clips", "images", "frames")},
                "seconds_kept": seconds["kept"],
                "bytes_kept": self._kept["bytes"],
                "captions": self._kept["captions"],
                "clips_without_caption": self._kept["without_caption"],
            },
            "stages": self._funnel(settings),
            "files_left_out": {
                "by_stage": self._left_out_by_stage.as_dict(),
                "by_reason": self._left_out_by_reason.as_dict(),
                "limit": MOST_FILES_NAMED,
                "files": list(self._left_out_files),
            },
            "warnings": {
                "count": self._warned,
                "limit": MOST_FILES_NAMED,
                "files": list(self._warned_files),
            },
            "histograms": {name: h.as_dict() for name, h in histograms.items() if h},
            "tallies": {name: tally.as_dict() for name, tally in self._tallies.items()},
            "clips_shown": list(self._shown),
            "settings": settings,
        }

    def _funnel(self, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """The stages in order, each with the clips that reached it and those that it dropped."""
        clips, milliseconds, stages = self._clips, self._milliseconds["cut"], []
        for name in _stages_in_order(self._stages, settings):
            stage = self._stages.get(name, _Stage())
            shown = {"stage": name, "clips_in": clips, "seconds_in": milliseconds / 1000}
            clips, milliseconds = clips - stage.clips, milliseconds - stage.milliseconds
            stages.append(
                shown
                | {
                    "dropped": stage.clips,
                    "seconds_dropped": stage.milliseconds / 1000,
                    "kept": clips,
                    "seconds_kept": milliseconds / 1000,
                    "reasons": stage.reasons.as_dict(),
                    "examples": list(stage.sample),
                }
            )
        return stages


def _stages_in_order(dropped: Iterable[str], settings: dict[str, Any]) -> list[str]:
    """Stages that could drop a clip: those that did, and those whose settings are on."""
    scores = [score["name"] for score in settings.get("scores") or ()]
    plugins = [*scores, *sorted(set(dropped) - set(STAGES) - set(scores))]
    first = STAGES.index("letterbox") + 1
    order = [*STAGES[:first], *plugins, *STAGES[first:]]
    on = {name for name in STAGES if settings.get(name)} - set(DROP_NOTHING) | set(scores)
    return [name for name in order if name in dropped or name in on]


def _milliseconds(clip: dict[str, Any]) -> int:
    start, end = clip.get("start"), clip.get("end")
    return round(1000 * (end - start)) if is_number(start) and is_number(end) else 0


def one_line(text: str) -> str:
    return " ".join(str(text).split())


def cut_short(text: str, most: int = 600) -> str:
    """`text` in one line of at most `most` characters."""
    text = one_line(text)
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _without_name(reason: str, source: str) -> str:
    """The reason alone, where an error begins with its file as ours do."""
    head, separator, rest = reason.partition(": ")
    return rest if separator and head.endswith(source.rsplit("/", 1)[-1]) else reason


def without_numbers(reason: str) -> str:
    """Reasons that differ in numbers or keys alone become one: "too short (.3 s)", "too short"."""
    words = _MEASURED.sub("", one_line(reason)).split(" ")
    return " ".join("another clip" if _KEY.search(w) else _NUMBER.sub("…", w) for w in words)
