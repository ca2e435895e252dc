"""One file to its clips: scan, cut, filter, encode. Local workers and Beam both call this."""

import functools
import hashlib
import importlib
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sora_jax import video_io
from sora_jax.data.build import filters
from sora_jax.data.build.captioner import CaptionQueue, check_captioner
from sora_jax.data.build.cut import Span, chosen_spans, cut_shots, frame_count, output_rate
from sora_jax.data.build.encode import (
    ClipEncoder,
    clip_frames,
    crop_pixels,
    fitted_size,
    png_bytes,
)
from sora_jax.data.build.inputs import InputFile
from sora_jax.data.build.media import Media, MediaInfo
from sora_jax.data.build.scan import Scan, load_detector, scan
from sora_jax.data.build.settings import BuildSettings, ScoreSettings


def staged_path(staging: Path, key: str) -> Path:
    """Where the bytes of the clip named `key` lie until they are written to a shard."""
    return Path(staging) / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.clip"


def process_file(input: InputFile, settings: BuildSettings, staging: Path) -> dict[str, Any]:
    """Cuts one file into clips and stages the bytes of those that pass every filter.

    Deterministic, and atomic for each clip: a staged file is always whole. Of a file that breaks
    off, the clips that lie whole in front of the damage are kept. A clip's size, frames and rate
    are filled in for dropped clips too: those that it would have had.

    Returns:
      the FileResult row: JSON values only. A file that cannot be used has `error` and `stage`;
      `warning` is None or one line, such as where a damaged file breaks off.

    Raises:
      ImportError: a package or plug-in that the settings need is missing; `check_packages` tells.
      OSError: a clip cannot be written.
    """
    row: dict[str, Any] = {"source": input.key, "error": None, "stage": None, "warning": None}
    row |= dict.fromkeys(("width", "height", "fps", "seconds", "codec")) | {"clips": []}
    stage = "probe"
    try:
        limit = settings.probe.max_source_pixels if settings.probe else None
        with Media(input.path, max_pixels=limit) as media:
            info = media.info
            row |= {"width": info.width, "height": info.height, "codec": info.codec}
            row |= {"fps": round(info.fps, 6), "seconds": round(info.seconds, 6)}
            stage = "scan"
            seen = scan(media, settings, start=input.start, end=input.end)
            row["fps"] = round(float(seen.rate), 6)
            read = float(seen.times[-1] - seen.times[0])
            row["seconds"] = 0.0 if info.is_image else round(read, 6)
            row["warning"] = _warning(media, seen)
            captions = CaptionQueue(settings.caption)
            row["clips"] = [
                _finished(media, seen, clip, settings, staging, captions)
                for clip in _planned(input, info, seen, settings)
            ]
            captions.flush()
    except ValueError as error:
        row |= {"error": " ".join(str(error).split()), "stage": stage, "clips": []}
    return row


class _Clip(NamedTuple):
    row: dict[str, Any]
    start: float
    rate: Fraction
    crop: filters.Crop


def _warning(media: Media, seen: Scan) -> str | None:
    lines = list(media.warnings)
    declared, decoded = media.info.seconds, float(seen.times[-1])
    if seen.damage:
        lines.insert(0, f"{seen.damage}; clips in front of it are kept")
    elif seen.whole and decoded < 0.9 * declared - 0.5:
        lines.insert(0, f"ends at {decoded:.2f} s, though it declares {declared:.2f} s")
    return "; ".join(lines) or None


def _planned(input: InputFile, info: MediaInfo, seen: Scan, settings: BuildSettings) -> list[_Clip]:
    """Every clip of the file in order, with what the first pass alone decides."""
    spans = cut_shots(seen.times, seen.cuts, cut=settings.cut, length=settings.length)
    chosen = chosen_spans(len(spans), settings.cut.max_clips if settings.cut else 0)
    clips = []
    for number, span in enumerate(spans):
        clip = _plan(input, info, seen, span, settings)
        if number not in chosen:
            reason = f"one of {len(spans)} clips of this file (at most {settings.cut.max_clips})"
            clip.row["dropped"] = {"stage": "cut", "reason": reason}
        clips.append(clip)
    return clips


def _plan(
    input: InputFile, info: MediaInfo, seen: Scan, span: Span, settings: BuildSettings
) -> _Clip:
    start, end = float(seen.times[span.first]), float(seen.times[span.last])
    rate = output_rate(seen.rate, settings.write.fps)
    num_frames = 1 if info.is_image else frame_count(end - start, rate)
    still = settings.freeze.difference if settings.freeze else 0.0
    stats = filters.clip_stats(
        seen, span, num_frames=num_frames, is_image=info.is_image, still=still
    )
    dropped = filters.first_reason(stats, settings)
    crop = filters.letterbox(seen, span, settings.letterbox)
    top, bottom, left, right = crop_pixels(info.height, info.width, crop)
    try:
        height, width = fitted_size(bottom - top, right - left, settings.resize)
    except ValueError as error:
        height, width = bottom - top, right - left
        dropped = dropped or {"stage": "resize", "reason": str(error)}
    row = {
        "key": f"{input.key}#{span.first:08d}",
        "start": round(start, 6),
        "end": 0.0 if info.is_image else round(end, 6),
        "dropped": dropped,
        "width": width,
        "height": height,
        "num_frames": num_frames,
        "fps": round(float(rate), 6),
        "bytes": 0,
        "caption_kinds": [kind for kind, _ in input.captions],
        "captions": [text for _, text in input.captions],
        "scores": stats.scores,
        "phash": f"{seen.hashes[(span.first + span.last) // 2]:016x}",
    }
    return _Clip(row, start, rate, crop)


def _finished(
    media: Media,
    seen: Scan,
    clip: _Clip,
    settings: BuildSettings,
    staging: Path,
    captions: CaptionQueue,
) -> dict[str, Any]:
    """The clip's row, once it is read again, scored, and staged if it stays.

    Captions of a model are in it by the time that `captions` is flushed.
    """
    row = clip.row
    if row["dropped"]:
        return row
    try:
        looks = [score.frames for score in settings.scores] + [captions.wants(row)]
        data, shown = _encoded(media, clip, settings, looks)
    except ValueError as error:  # the second pass met damage that the first did not
        row["dropped"] = {"stage": "resize", "reason": f"cannot be read again ({error})"}
        return row
    for score in settings.scores:
        frames = np.stack([shown[k] for k in _evenly(row["num_frames"], score.frames)])
        value = float(load_score(score)(frames))
        if math.isfinite(value):
            row["scores"][score.name] = filters.rounded(value)
        reason = filters.bad_score(value, score)
        if reason and not row["dropped"]:
            row["dropped"] = {"stage": score.name, "reason": reason}
    if not row["dropped"]:
        with video_io.atomic_path(staged_path(staging, row["key"])) as path:
            path.write_bytes(data)
        row["bytes"] = len(data)
        if captions.wants(row):
            frames = _evenly(row["num_frames"], captions.wants(row))
            captions.add(row, np.stack([shown[k] for k in frames]))
    return row


def _encoded(
    media: Media, clip: _Clip, settings: BuildSettings, looks: list[int]
) -> tuple[bytes, dict[int, np.ndarray]]:
    """The clip's bytes, and by index the few frames of each look at it: of scores, of captions."""
    row = clip.row
    size = row["height"], row["width"]
    frames = clip_frames(
        media,
        start=clip.start,
        num_frames=row["num_frames"],
        rate=clip.rate,
        size=size,
        crop=clip.crop,
    )
    wanted = {k for look in looks for k in _evenly(row["num_frames"], look)}
    shown: dict[int, np.ndarray] = {}
    encoder = None if media.info.is_image else ClipEncoder(size, clip.rate, settings.write)
    data = b""
    for index, frame in enumerate(frames):
        if index in wanted:
            shown[index] = frame
        if encoder is None:
            data = png_bytes(frame)
        else:
            encoder.add(frame)
    return encoder.finish() if encoder else data, shown


def _evenly(num_frames: int, count: int) -> list[int]:
    """At most `count` indices spread over a clip, in the middle of equal parts."""
    count = min(count, num_frames)
    return [int((2 * k + 1) * num_frames / (2 * count)) for k in range(count)]


@functools.cache
def load_score(score: ScoreSettings) -> Callable[[np.ndarray], float]:
    """The function that a plug-in score names.

    Raises:
      ImportError: no such module or function; one line.
    """
    module, _, name = score.function.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"scores.{score.name}.function {score.function!r}: {error}; it must be importable here "
            "as 'module:function'."
        ) from error


def check_packages(settings: BuildSettings) -> None:
    """Imports what these settings need, so that a missing package is told before any work.

    Raises:
      ValueError: what is missing, and what to do; one line.
    """
    try:
        if settings.shots:
            load_detector()
        for score in settings.scores:
            load_score(score)
        if settings.caption and settings.caption.model:
            check_captioner(settings.caption)
    except ImportError as error:
        raise ValueError(str(error)) from error
