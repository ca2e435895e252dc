"""Opens a video or image and streams its frames, upright, with the times at which they show.

What a file is goes by its contents, not its extension: PNG, JPEG, GIF and WebP are read by Pillow,
everything else by FFmpeg. Only one frame is in memory at a time.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from sora_jax.video_io import pictures

MAGIC = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF"}
# Demuxers that read one local file; playlists (HLS, DASH, concat) would open others.
DEMUXERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,ivf,h264,hevc,mxf,nut"
SUFFIXES = {"PNG": (".png", ".apng"), "JPEG": (".jpg", ".jpeg"), "GIF": (".gif",)}
HDR_CURVES = {16: "PQ", 18: "HLG"}  # ITU-T H.273 table 3
MAX_FPS = 240
MAX_GAP_SECONDS = 30.0  # from one frame to the next; beyond, what follows must bear it out
MAX_STILL_SECONDS = 3600.0  # beyond, the time stamps are damaged whatever follows
LONG_STEP = 4  # times the median step: what stands longer says nothing of how fast the rest moves


class MediaInfo(NamedTuple):
    """What a file says of itself: size upright with square pixels; an image has fps 0."""

    width: int
    height: int
    fps: float  # as declared; 0 where nothing is
    seconds: float  # as declared; 0 where nothing is
    codec: str
    is_image: bool


class Frame:
    """One decoded frame; converted only when asked for."""

    def __init__(
        self,
        time: float,
        length: float,
        source: Any,
        size: tuple[int, int],
        upright: pictures.Upright | None = None,
    ) -> None:
        self.time, self.length = time, length
        self._source, self._size, self._upright = source, size, upright

    def rgb(self) -> UInt8[np.ndarray, "H W 3"]:
        """Upright pixels at the size that the file's info states."""
        return self.reduced(self._size)

    def reduced(self, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
        """Upright pixels resized to `size` (height, width)."""
        if isinstance(self._source, np.ndarray):
            return _resized(self._source, size)
        return self._upright.rgb(self._source, size)


class Media:
    """An opened file. `frames` may be called again and again; each call starts anew.

    Attributes:
      info: what the file declares.
      damage: after `frames` ended, None or one line that says where and why it broke off.
      warnings: one line for each property that is read but not treated.

    Raises:
      ValueError: unreadable, no video in it, or declaring more than `max_pixels`; one line that
        does not name the file.
    """

    def __init__(self, path: str | os.PathLike, *, max_pixels: int | None = None) -> None:
        self.path = os.fspath(path)
        self.damage: str | None = None
        self.warnings: list[str] = []
        self._max_pixels = max_pixels
        kind = _image_kind(self.path)
        self._reader = _Images(self, kind) if kind else _Video(self)
        self.info: MediaInfo = self._reader.info

    def frames(self, start: float = 0.0) -> Iterator[Frame]:
        """Frames in order from the one on show at `start` seconds, at the latest."""
        self.damage = None
        return self._reader.frames(start)

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> "Media":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_size(self, width: int, height: int) -> None:
        if width < 1 or height < 1:
            raise ValueError("declares no size; damaged, or no video.")
        if self._max_pixels is not None and width * height > self._max_pixels:
            raise ValueError(
                f"declares {width}x{height} = {width * height} pixels, more than "
                f"{self._max_pixels}; raise probe.max_source_pixels, or remove the file."
            )


class _Video:
    """Frames by FFmpeg, one thread: workers run side by side, and results do not vary."""

    def __init__(self, media: Media) -> None:
        self._media = media
        self._container: Any = None
        self._upright = pictures.Upright()
        self._exact_times = True  # every frame so far had a time stamp
        try:
            self._open()
            first = next(self._frames, None)
        except _ffmpeg_errors() as error:
            self.close()
            raise ValueError(f"cannot be read ({_reason(error)}): damaged, or no video.") from error
        except ValueError:
            self.close()
            raise
        if first is None:
            self.close()
            raise ValueError("holds no video frame; damaged, or no video.")
        self._pending = first
        self._first_stamp = self._stamp(first)
        self.info = self._describe(first)

    def _open(self) -> None:
        self.close()
        options = {"format_whitelist": DEMUXERS}
        if self._media._max_pixels is not None:
            # While it probes, FFmpeg decodes frames of whatever size a file declares.
            options["max_pixels"] = str(4 * self._media._max_pixels)
        self._container = pictures.open_container(self._media.path, options)
        streams = pictures.playing_streams(self._container)
        if not streams:
            raise ValueError("holds no video stream that can be decoded; leave it out.")
        self._stream = streams[0]
        context = self._stream.codec_context
        self._media.check_size(context.width or 1, context.height or 1)
        context.thread_type = "NONE"
        # A damaged slice is an error, not a guess.
        context.options = {"err_detect": "bitstream+buffer+explode"}
        self._frames = self._container.decode(self._stream)

    def _describe(self, frame: Any) -> MediaInfo:
        media, stream = self._media, self._stream
        height, width = self._upright.size(frame, stream.sample_aspect_ratio)
        media.check_size(width, height)
        if frame.color_trc in HDR_CURVES:
            media.warnings.append(f"HDR ({HDR_CURVES[frame.color_trc]}) is not tone-mapped")
        if frame.interlaced_frame:
            media.warnings.append("interlaced, and not deinterlaced")
        base, duration = stream.time_base, stream.duration
        seconds = float(duration * base) if duration and base else 0.0
        if not seconds and self._container.duration:
            seconds = self._container.duration / 1e6
        return MediaInfo(
            width=width,
            height=height,
            fps=float(stream.average_rate or stream.guessed_rate or 0),
            seconds=seconds,
            codec=stream.codec_context.name,
            is_image=False,
        )

    def _stamp(self, frame: Any) -> int | None:
        """When a frame is shown, in ticks.

        AVI holds no such times, only packets at an even rate, and FFmpeg gives the frames of H.264
        those of their own packets, which B-frames put in another order. There a frame is shown
        when the packet comes that lets the decoder give it: their dts.
        """
        return frame.dts if self._container.format.name == "avi" else frame.pts

    def frames(self, start: float) -> Iterator[Frame]:
        """Streams frames; damage ends them and is noted in the media."""
        last = 0.0
        try:
            if start > 0:
                self._seek(start)
            elif self._pending is None:
                self._open()
            pending, self._pending = self._pending, None
            for frame in self._timed(pending):
                last = frame.time + frame.length
                yield frame
        except (*_ffmpeg_errors(), _Damage) as error:
            self._media.damage = f"breaks off at {last:.2f} s ({_reason(error)})"

    def _seek(self, start: float) -> None:
        """Leaves the decoder at a frame at or before `start`, pending; at worst at the first."""
        base = self._stream.time_base
        self._pending = None
        # The second try is for containers whose index is vague.
        for earlier in (0.0, 10.0) if self._exact_times and base else ():
            seconds = start - earlier
            if seconds <= 0:
                break
            with contextlib.suppress(*_ffmpeg_errors()):
                offset = self._first_stamp + math.floor(seconds / base)
                self._container.seek(offset, stream=self._stream, backward=True)
                self._frames = self._container.decode(self._stream)
                frame = next(self._frames, None)
                stamp = None if frame is None else self._stamp(frame)
                if stamp is not None and (stamp - self._first_stamp) * base <= start + 1e-6:
                    self._pending = frame
                    return
        self._open()

    def _timed(self, pending: Any) -> Iterator[Frame]:
        base, info = self._stream.time_base, self.info
        step = 1 / info.fps if info.fps > 0 else 1 / 25
        step = max(step, 1 / MAX_FPS)
        size, previous = (info.height, info.width), None
        held: Frame | None = None  # behind a long gap: a long still, if time goes on behind it
        for frame in _chain(pending, self._frames):
            if frame.is_corrupt:
                if previous is None:
                    continue  # a stream cut out of a longer one starts like this
                raise _Damage("a damaged frame")
            at = self._time(frame)
            if at is None:
                at = 0.0 if previous is None else previous + step
            gap = 0.0 if previous is None else at - previous
            if not -MAX_GAP_SECONDS <= gap <= MAX_STILL_SECONDS or (held and gap <= 0):
                raise _Damage(f"the next time stamp is {at:.6g} s")
            if previous is not None and gap <= 0:  # time stamps that stand still or go back
                at = previous + min(step, 1e-3)
            if held:
                yield held
            length = float(frame.duration * base) if frame.duration and base else step
            shown = Frame(at, min(length, MAX_GAP_SECONDS), frame, size, self._upright)
            held = shown if gap > MAX_GAP_SECONDS else None
            if not held:
                yield shown
            previous = at
        if held:
            if held.time > info.seconds + 1:
                raise _Damage(f"the last time stamp is {held.time:.6g} s")
            yield held

    def _time(self, frame: Any) -> float | None:
        """Seconds since the first frame; None where there are no time stamps."""
        stamp, base = self._stamp(frame), self._stream.time_base
        known = self._first_stamp is not None and bool(base)
        if known and stamp is not None:
            return float((stamp - self._first_stamp) * base)
        # The last frames of an AVI come when no packet does; such a file can be sought in still.
        self._exact_times &= known and self._container.format.name == "avi"
        return None

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None


class _Images:
    """Frames by Pillow: a still, or an animation."""

    def __init__(self, media: Media, kind: str) -> None:
        self._media = media
        suffix = os.path.splitext(media.path)[1].lower()
        if suffix not in SUFFIXES.get(kind, (".webp",)):
            media.warnings.append(f"named {suffix or 'without extension'}, but holds {kind}")
        with self._opened() as image:
            media.check_size(*image.size)
            count = pictures.count_stills(image)
            # EXIF orientations 5 to 8 lie on a side.
            turned = image.getexif().get(pictures.ORIENTATION) in range(5, 9)
            width, height = image.size[::-1] if turned else image.size
        self.info = MediaInfo(width, height, 0.0, 0.0, kind.lower(), is_image=count == 1)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        from PIL import Image

        try:
            with Image.open(self._media.path) as image:
                yield image
        except pictures.image_errors() as error:
            if type(error) is ValueError and str(error).startswith("declares"):
                raise
            raise ValueError(f"cannot be read ({_reason(error)}): damaged, or no image.") from error

    def frames(self, start: float) -> Iterator[Frame]:
        del start  # an animation has no key frames but the first
        at, size = 0.0, (self.info.height, self.info.width)
        try:
            with self._opened() as image:
                for length, pixels in pictures.stills(image):
                    yield Frame(at, length, pixels, size)
                    at += length
        except ValueError as error:
            self._media.damage = f"breaks off at {at:.2f} s ({error})"

    def close(self) -> None:
        pass


class _Damage(Exception):
    """What follows in the stream cannot be used."""


def stated_rate(times: np.ndarray, declared: float) -> Fraction:
    """Frames a second of a stream whose frames start at `times`, the end of the last included.

    The declared rate where the time stamps bear it out; the mean where they are even; else that
    of the median step. Pauses do not count, so that they do not thin out what moves: an MP4
    declares the mean of all, pauses included.
    """
    steps = np.diff(times)
    step = float(np.median(steps))
    moving = steps[steps <= LONG_STEP * step]
    seconds = float(moving.sum())
    mean, median = len(moving) / seconds, 1 / step
    rate = mean
    if declared > 0 and abs(declared / mean - 1) < 5e-4 + 2e-3 / seconds:
        rate = declared
    elif abs(median / mean - 1) > 0.05:
        # Steps in whole milliseconds: the declared rate, where it fits, is the exact one.
        rate = declared if abs(declared / median - 1) < 0.02 else median
    return Fraction(min(rate, MAX_FPS)).limit_denominator(1001) or Fraction(1, 1001)


def _image_kind(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise ValueError(f"cannot be opened ({error.strerror or error}).") from error
    if not head:
        raise ValueError("the file is empty.")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    return next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)


def _ffmpeg_errors() -> tuple[type[Exception], ...]:
    import av

    return (av.FFmpegError,)


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    if first is not None:
        yield first
    yield from rest


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    import cv2

    if pixels.shape[:2] == size:
        return pixels
    return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA)
