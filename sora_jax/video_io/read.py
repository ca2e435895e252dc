"""Reads clips of videos and images: any start, any frame rate, any size."""

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from sora_jax.video_io import pictures
from sora_jax.video_io.paths import IMAGE_SUFFIXES, READABLE_SUFFIXES
from sora_jax.video_io.sheet import fit

SCALED_BELOW = 0.5  # of a frame's size: there its chroma is no coarser than what is wanted
COMMON_RATES = (8, 10, 12, 15, 16, 20, 24, 25, 30, 48, 50)


class Clip(NamedTuple):
    """Frames read from a file, and how many of them make a second (0 for a still image)."""

    frames: UInt8[np.ndarray, "F H W 3"]
    fps: float


class VideoInfo(NamedTuple):
    """What a file shows: its size upright, with square pixels; hidden frames do not count.

    A still image has one frame, fps 0 and duration 0 (seconds).
    """

    num_frames: int
    fps: float
    width: int
    height: int
    duration: float


def probe(path: str | os.PathLike) -> VideoInfo:
    """Frame count, rate, size and duration of a video or image; decodes the first frame only.

    Raises:
      ValueError: missing, damaged or empty file, or one of an unknown kind; one line.
    """
    path = _check_input_path(path)
    with _decoder_errors(path):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return _probe_image(path)
        return _probe_video(path)


def frames_available(info: VideoInfo, *, start: float | int, fps: float | int) -> int:
    """How many frames at `fps` a clip that starts at `start` seconds can have; 0 past the end."""
    if info.duration == 0:
        return int(start == 0)
    # A hundredth of a frame, so that 250 frames at 25/s are 80 at 8/s whatever the rounding.
    return max(0, math.ceil((info.duration - start) * fps - 0.01))


def read_video(
    path: str | os.PathLike,
    *,
    start: float | int = 0.0,
    num_frames: int | None = None,
    fps: float | int | None = None,
    size: tuple[int, int] | None = None,
    info: VideoInfo | None = None,
) -> Clip:
    """Reads `num_frames` frames at `fps`, from `start` seconds on, fitted to `size`.

    Frame k is what a player shows at `start + k / fps`, so a lower rate drops frames and a higher
    one repeats them. `size` (height, width) is reached by area-averaged resizing and a centre
    crop. Only the part of the file from the last key frame before `start` is decoded.

    Args:
      num_frames: None reads to the end of the file.
      fps: None keeps the file's own rate; a still image takes any rate.
      size: None keeps the file's own size.
      info: what `probe` said, to save probing the same file for each of many clips.

    Raises:
      ValueError: a file that `probe` refuses, one that breaks off early, or a clip that does not
        fit into it; one line.
    """
    path = _check_input_path(path)
    info = probe(path) if info is None else info
    rate = info.fps if fps is None else float(fps)
    if not (math.isfinite(rate) and (rate > 0 or info.duration == 0)):
        raise ValueError(f"{path}: fps {fps}; give a rate above 0.")
    available = frames_available(info, start=start, fps=rate)
    wanted = available if num_frames is None else num_frames
    if start < 0 or wanted < 1 or wanted > available:
        raise ValueError(
            f"{path}: {wanted} frames at {rate:g} fps from {start:g} s asked for, {available} "
            f"there (the file lasts {info.duration:.2f} s); lower num_frames or start, or raise "
            "fps."
        )
    times = [start + k / rate for k in range(wanted)] if info.duration else [0.0]
    with _decoder_errors(path):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            frames = _pick(_image_frames(path), times, rate=rate, info=info, path=path, size=None)
        else:
            frames = _read_stream(path, times, rate=rate, info=info, size=size)
    if size is not None:
        frames = [fit(frame, size) for frame in frames]
    return Clip(np.stack(frames), rate)


def _check_input_path(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.suffix.lower() not in READABLE_SUFFIXES:
        raise ValueError(f"{path}: not a video or image; use {', '.join(READABLE_SUFFIXES)}.")
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty.")
    return path


@contextlib.contextmanager
def _one_line_errors(path: Path, kinds: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turns a decoder's exceptions into one line that names the file."""
    try:
        yield
    except kinds as error:
        if str(error).startswith(str(path)):  # one of ours, raised while decoding
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(
            f"{path}: cannot be decoded ({' '.join(reason.split())}): damaged, or not what its "
            "extension says; replace or remove it."
        ) from error


def _decoder_errors(path: Path) -> contextlib.AbstractContextManager[None]:
    if path.suffix.lower() in IMAGE_SUFFIXES:
        kinds = pictures.image_errors()
    else:
        import av

        kinds = (av.FFmpegError,)
    return _one_line_errors(path, kinds)


def _probe_image(path: Path) -> VideoInfo:
    durations, frame = [], None
    for _, duration, frame in _image_frames(path):  # noqa: B007  (the size is the same in all)
        durations.append(duration)
    height, width, _ = frame.shape
    if len(durations) == 1:
        return VideoInfo(1, 0.0, width, height, 0.0)
    total = sum(durations)
    fps = len(durations) / total
    # GIF counts in hundredths of a second and WebP in thousandths, so 17 frames at 8/s are
    # 2.12 s, not 2.125: a whole rate that explains the total is the one that was meant. Two frames
    # of a GIF at 30/s are .06 s, which 33/s explains too: it is the one that is in use.
    common = COMMON_RATES if path.suffix.lower() == ".gif" else ()
    for rate in (*sorted(common, key=lambda rate: abs(rate - fps)), round(fps)):
        if rate and abs(len(durations) / rate - total) <= 0.01:
            fps = float(rate)
            break
    return VideoInfo(len(durations), fps, width, height, len(durations) / fps)


def _image_frames(path: Path) -> Iterator[tuple[float, float, np.ndarray]]:
    """Start and length in seconds, and pixels, of each frame."""
    from PIL import Image

    with Image.open(path) as image:
        at = 0.0
        for length, pixels in pictures.stills(image):
            yield at, length, pixels
            at += length


def _video_stream(container: Any, path: Path) -> Any:
    streams = pictures.playing_streams(container)
    if not streams:
        raise ValueError(f"{path}: holds no video that can be decoded; replace or remove it.")
    return streams[0]


def _probe_video(path: Path) -> VideoInfo:
    with pictures.open_container(path) as container:
        stream = _video_stream(container, path)
        frame = next(container.decode(stream), None)
        if frame is None:
            raise ValueError(f"{path}: holds no video frame; replace or remove it.")
        height, width = pictures.Upright().size(frame, stream.sample_aspect_ratio)
        num_frames, rate = stream.frames, stream.average_rate
        seconds = (stream.duration or 0) * stream.time_base
    # A WebM states none of them, and what an edit list hides is counted though it is not shown.
    if not (num_frames and rate and abs(num_frames / rate - seconds) <= 1 / rate):
        num_frames, rate = _count_packets(path)
    return VideoInfo(num_frames, float(rate), width, height, float(num_frames / rate))


def _count_packets(path: Path) -> tuple[int, Fraction]:
    with pictures.open_container(path) as container:
        stream = _video_stream(container, path)
        packets = container.demux(stream)
        times = sorted(p.pts for p in packets if p.pts is not None and not p.is_discard)
        rate = stream.average_rate or stream.guessed_rate or Fraction(1)
        if len(times) > 1 and times[-1] > times[0]:
            measured = (len(times) - 1) / ((times[-1] - times[0]) * stream.time_base)
            # Time stamps in whole milliseconds: the stated rate, where it fits, is the exact one.
            rate = rate if abs(rate - measured) < measured / 100 else measured
    return len(times), Fraction(rate)


def _read_stream(
    path: Path,
    times: list[float],
    *,
    rate: float,
    info: VideoInfo,
    size: tuple[int, int] | None,
) -> list[np.ndarray]:
    with pictures.open_container(path) as container:
        stream = _video_stream(container, path)
        first_pts = stream.start_time or 0
        if times[0] > 0:
            offset = first_pts + int(times[0] / stream.time_base)
            container.seek(offset, stream=stream, backward=True)
            first = next(container.decode(stream), None)
            late = first is None or first.pts is None
            late = late or float((first.pts - first_pts) * stream.time_base) > times[0]
            container.seek(first_pts if late else offset, stream=stream, backward=True)
        frames = _stream_frames(container, stream, first_pts, info)
        return _pick(frames, times, rate=rate, info=info, path=path, size=size)


def _stream_frames(
    container: Any, stream: Any, first_pts: int, info: VideoInfo
) -> Iterator[tuple[float, float, Any]]:
    at, step = 0.0, 1 / info.fps
    for frame in container.decode(stream):
        if frame.pts is not None:
            at = float((frame.pts - first_pts) * stream.time_base)
        length = float(frame.duration * stream.time_base) if frame.duration else step
        yield at, length, frame
        at += length


def _pick(
    frames: Iterator[tuple[float, float, Any]],
    times: list[float],
    *,
    rate: float,
    info: VideoInfo,
    path: Path,
    size: tuple[int, int] | None,
) -> list[np.ndarray]:
    """The frame on show at each of `times`, from frames given as (start, length, frame)."""
    # A quarter of a frame forgives time stamps rounded to milliseconds or hundredths.
    slack = 0.25 / max(rate, info.fps, 1.0)
    to_rgb = functools.partial(_to_rgb, upright=pictures.Upright(), size=size, info=info)
    picked: list[np.ndarray] = []
    shown, pixels, end = None, None, 0.0
    for start, length, frame in frames:
        while shown is not None and len(picked) < len(times):
            if times[len(picked)] + slack >= start:
                break
            pixels = to_rgb(shown) if pixels is None else pixels
            picked.append(pixels)
        if len(picked) == len(times):
            return picked
        shown, pixels, end = frame, None, start + length
    while shown is not None and len(picked) < len(times) and times[len(picked)] < end + slack:
        pixels = to_rgb(shown) if pixels is None else pixels
        picked.append(pixels)
    if len(picked) < len(times):
        raise ValueError(
            f"{path}: breaks off at {end:.2f} s of {info.duration:.2f} s, so it is damaged; "
            "replace or remove it."
        )
    return picked


def _to_rgb(
    frame: Any, *, upright: pictures.Upright, size: tuple[int, int] | None, info: VideoInfo
) -> np.ndarray:
    """An upright RGB array of a decoded frame, of `size` already where that is much smaller.

    Arrays pass through.
    """
    if isinstance(frame, np.ndarray):
        return frame
    whole = info.height, info.width
    scale = 1.0 if size is None else max(size[0] / info.height, size[1] / info.width)
    if scale > SCALED_BELOW:
        return upright.rgb(frame, whole)
    # As much too large on both sides: a pixel more on one would move the picture by half of one.
    height, width = (
        want + 2 * round((have * scale - want) / 2) for have, want in zip(whole, size, strict=True)
    )
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return upright.rgb(frame, (height, width))[top : top + size[0], left : left + size[1]]
