"""The second pass: frames of one clip cropped, resized and encoded as they come."""

import io
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from jaxtyping import UInt8

from sora_jax import video_io
from sora_jax.data.build.cut import SLACK
from sora_jax.data.build.filters import Crop
from sora_jax.data.build.media import Media
from sora_jax.data.build.settings import ResizeSettings, WriteSettings

BT709 = 1  # the code of its matrix, primaries and transfer curve alike
LIMITED_RANGE = 1


def fitted_size(height: int, width: int, settings: ResizeSettings | None) -> tuple[int, int]:
    """(height, width) that a picture is written at.

    Of the multiples around the ideal size, the one that shows most of the picture at most pixels;
    what differs from its shape is cut off at the edges. Never larger than the picture. Without
    settings, the picture's own size made even.

    Raises:
      ValueError: the picture is smaller than one multiple.
    """
    if settings is None:
        multiple, budget = 2, math.inf
    else:
        multiple, budget = settings.multiple, settings.max_pixels
    if min(height, width) < multiple:
        raise ValueError(f"too small ({width}x{height}; each side at least {multiple})")
    scale = min(1.0, math.sqrt(budget / (height * width)))
    best = (0.0, (multiple, multiple))
    for h in _multiples(height * scale, height, multiple):
        for w in _multiples(width * scale, width, multiple):
            if h * w <= budget:
                shown = min(h / height, w / width) / max(h / height, w / width)
                best = max(best, (shown * h * w, (h, w)))
    return best[1]


def _multiples(ideal: float, most: int, multiple: int) -> set[int]:
    below = max(multiple, int(ideal) // multiple * multiple)
    return {below, min(below + multiple, most // multiple * multiple)}


def clip_frames(
    media: Media,
    *,
    start: float,
    num_frames: int,
    rate: Fraction,
    size: tuple[int, int],
    crop: Crop,
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Frames k = 0, 1, ... of a clip: what is on show at start + k / rate, at `size`.

    Raises:
      ValueError: the file breaks off before the clip ends.
    """
    step = 1 / rate if rate else Fraction(0)
    slack = SLACK * float(step)
    made, shown = 0, None

    def due(until: float) -> int:
        """Frames of the clip that begin before `until`."""
        return min(num_frames, math.ceil((until - slack - start) / step)) if step else num_frames

    for frame in media.frames(start):
        ready = due(frame.time) if shown is not None else 0
        if ready > made:
            picture = _picture(shown.rgb(), size, crop)
            yield from (picture for _ in range(ready - made))
            made = ready
        if made == num_frames:
            return
        shown = frame
    if shown is not None:
        # The last frame of a file is on show until the clip ends.
        if step and due(shown.time + shown.length + 2 * slack) < num_frames:
            raise ValueError(f"{made} of {num_frames} frames are left; {media.damage or 'the end'}")
        picture = _picture(shown.rgb(), size, crop)
        yield from (picture for _ in range(num_frames - made))
        return
    raise ValueError(f"no frame is left at {start:.2f} s; {media.damage or 'the end'}")


def _picture(rgb: np.ndarray, size: tuple[int, int], crop: Crop) -> np.ndarray:
    top, bottom, left, right = crop_pixels(rgb.shape[0], rgb.shape[1], crop)
    return video_io.fit(rgb[top:bottom, left:right], size)


def crop_pixels(height: int, width: int, crop: Crop) -> tuple[int, int, int, int]:
    """The rows top <= y < bottom and columns left <= x < right that a crop leaves."""
    return (
        math.ceil(crop.top * height),
        height - math.ceil(crop.bottom * height),
        math.ceil(crop.left * width),
        width - math.ceil(crop.right * width),
    )


class ClipEncoder:
    """Frames to the bytes of an MP4: H.264 yuv420p, short GOPs, the same bytes every time.

    encoder = ClipEncoder((height, width), rate, settings)
    for frame in frames:
        encoder.add(frame)
    data = encoder.finish()
    """

    def __init__(self, size: tuple[int, int], rate: Fraction, settings: WriteSettings) -> None:
        import av
        from av.video.reformatter import VideoReformatter

        self._converter = VideoReformatter()
        self._buffer = io.BytesIO()
        # bitexact: no version and no time in the file.
        self._container = av.open(self._buffer, "w", format="mp4", options={"fflags": "+bitexact"})
        stream = self._container.add_stream(
            "libx264",
            rate=rate,
            options={
                "crf": str(settings.crf),
                "preset": settings.preset,
                "threads": "1",  # with more, rate control depends on their timing
                # Key frames every `gop` frames and nowhere else, none referred to across.
                "x264-params": f"keyint={settings.gop}:min-keyint={settings.gop}:scenecut=0:"
                "open-gop=0",
            },
        )
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.gop_size = settings.gop
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        self._stream, self._count = stream, 0

    def add(self, frame: UInt8[np.ndarray, "H W 3"]) -> None:
        import av
        from av.video.reformatter import Interpolation as I

        rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        # Without these flags swscale rounds colours down: 0.4 dB less after reading back.
        flags = I.AREA | I.ACCURATE_RND | I.FULL_CHR_H_INT | I.FULL_CHR_H_INP | I.BITEXACT
        yuv = self._converter.reformat(
            rgb,
            format="yuv420p",
            dst_colorspace=BT709,
            dst_color_range=LIMITED_RANGE,
            interpolation=flags,
        )
        yuv.pts = self._count
        self._count += 1
        self._container.mux(self._stream.encode(yuv))

    def finish(self) -> bytes:
        self._container.mux(self._stream.encode())
        self._container.close()
        return self._buffer.getvalue()


def png_bytes(frame: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """The exact pixels of one frame as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()
