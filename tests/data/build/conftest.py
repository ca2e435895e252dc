"""Small videos of every kind, made on the spot."""

import contextlib
import struct
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

VideoMaker = Callable[..., Path]


@pytest.fixture
def make_video(tmp_path) -> VideoMaker:
    """make_video(name, frames, ...): writes a file under tmp_path and returns its path."""

    def make(name: str, frames: Iterable[np.ndarray], **options: Any) -> Path:
        return write_video(tmp_path / name, frames, **options)

    return make


@pytest.fixture
def moving() -> Callable[..., np.ndarray]:
    return moving_frames


@pytest.fixture
def turn_clockwise() -> Callable[[Path], None]:
    return write_matrix


def moving_frames(
    count: int, height: int = 48, width: int = 64, *, seed: int = 0, speed: float = 1.0
) -> np.ndarray:
    """Frames of a random texture that slides `speed` pixels a frame to the left."""
    import cv2

    rng = np.random.default_rng(seed)
    length = width + int(abs(speed) * count) + 2
    coarse = rng.integers(0, 256, (height // 4 + 1, length // 4 + 1, 3), dtype=np.uint8)
    scene = cv2.resize(coarse, (length, height), interpolation=cv2.INTER_CUBIC)
    starts = [int(speed * i) for i in range(count)]
    return np.stack([scene[:, s : s + width] for s in starts])


def write_video(
    path: Path,
    frames: Iterable[np.ndarray],
    *,
    fps: float | Fraction = 10,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int = 5,
    times: list[float] | None = None,
    format: str | None = None,
    aspect: Fraction | None = None,
    **options: str,
) -> Path:
    """`times` gives each frame's start in seconds instead of a constant rate."""
    import av

    rate = Fraction(fps).limit_denominator(1001)
    source = "rgb24"
    with av.open(str(path), "w", format=format) as container:
        stream = None
        for i, frame in enumerate(frames):
            if stream is None:
                source = {3: "rgb24", 4: "rgba"}[frame.shape[2]]
                stream = container.add_stream(codec, rate=rate, options=options)
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = pix_fmt
                stream.codec_context.gop_size = gop
                if aspect is not None:
                    stream.codec_context.sample_aspect_ratio = aspect
                if times is not None:
                    stream.codec_context.time_base = Fraction(1, 1000)
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=source)
            picture = picture.reformat(format=pix_fmt)
            picture.pts = i
            if times is not None:
                picture.pts, picture.time_base = round(times[i] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def write_matrix(path: Path, a: int = 0, b: int = 1, c: int = -1, d: int = 0) -> None:
    """Writes into an MP4 that (x, y) is shown at (ax + cy, bx + dy); turned clockwise as it is."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", *(v << 16 for v in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    path.write_bytes(data)


def write_trimmed(source: Path, target: Path, start: float) -> Path:
    """The packets of `source` behind an edit list that hides those before `start` seconds."""
    import av

    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                packet.pts -= round(start / packet.time_base)
                packet.dts -= round(start / packet.time_base)
                new.mux(packet)
    return target


def write_covered(target: Path, source: Path | None) -> Path:
    """An MP4 whose first stream is a cover, a white still; then the packets of `source`, if any."""
    import av

    picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 255, np.uint8))
    with av.open(str(target), "w") as new, contextlib.ExitStack() as stack:
        cover = new.add_stream("png", rate=1)
        cover.height, cover.width, cover.pix_fmt = 32, 32, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        packets = []
        if source is not None:
            old = stack.enter_context(av.open(str(source)))
            stream = new.add_stream_from_template(old.streams.video[0])
            packets = [packet for packet in old.demux(video=0) if packet.dts is not None]
        new.mux([*cover.encode(picture), *cover.encode()])
        for packet in packets:
            packet.stream = stream
            new.mux(packet)
    # FFmpeg writes the box that holds the cover behind the tracks, and takes streams as they come.
    data = target.read_bytes()
    at = data.index(b"moov") + 4
    boxes = sorted(_boxes(data[at:]), key=lambda box: box[4:8] == b"trak")
    target.write_bytes(data[:at] + b"".join(boxes))
    return target


def _boxes(data: bytes) -> Iterator[bytes]:
    while data:
        size = int.from_bytes(data[:4])
        yield data[:size]
        data = data[size:]
