"""What a frame or an image looks like when it is shown: upright, square pixels, its own colours.

`read` and the reader of `data.build` both show files by these functions, so they show them alike.
Transparent pixels lie on white, and what is deeper than 8 bits becomes 8.
"""

import itertools
import os
import struct
import zlib
from collections.abc import Iterator
from fractions import Fraction
from numbers import Rational
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sora_jax.video_io.paths import ffmpeg_name

DEFAULT_FRAME_SECONDS = 0.1  # what browsers give a GIF frame without a delay
ORIENTATION = 0x0112  # the EXIF tag that says how a camera was held
BT709, UNSPECIFIED = 1, 2  # ITU-T H.273 table 4
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # Pillow's names for grey of 16 bits


def open_container(path: str | os.PathLike, options: dict[str, str] | None = None) -> Any:
    """FFmpeg's view of a file to read, whose words about itself need not be UTF-8."""
    import av

    # PyAV 19 has no such argument: there they never need.
    is_lenient = int(av.__version__.split(".")[0]) >= 19
    how = {} if is_lenient else {"metadata_errors": "replace"}
    return av.open(ffmpeg_name(path), options=options or {}, **how)


def playing_streams(container: Any) -> list[Any]:
    """The video streams of a file that play and can be decoded: not its cover, a still."""
    from av.stream import Disposition

    return [
        stream
        for stream in container.streams.video
        if not stream.disposition & Disposition.attached_pic and stream.codec_context
    ]


class Upright:
    """Upright RGB of the FFmpeg frames of one file; how they lie is read from the first of them."""

    def __init__(self) -> None:
        from av.video.reformatter import VideoReformatter

        self._reformatter = VideoReformatter()  # one for all: making it takes a millisecond
        self._matrix: tuple[bool, slice, slice] | None = None

    def size(self, frame: Any, aspect: Rational | None) -> tuple[int, int]:
        """(height, width) on show, where pixels are `aspect` times as wide as high."""
        width, height = _square_pixels(frame.width, frame.height, aspect)
        return (width, height) if self._turn(frame)[0] else (height, width)

    def rgb(self, frame: Any, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
        """Pixels resized to `size` (height, width)."""
        transposed, rows, columns = self._turn(frame)
        height, width = size[::-1] if transposed else size
        pixels = _converted(frame, height, width, self._reformatter)
        if transposed:
            pixels = pixels.swapaxes(0, 1)
        return np.ascontiguousarray(pixels[rows, columns])

    def _turn(self, frame: Any) -> tuple[bool, slice, slice]:
        # Asked once: a frame and its side data hold each other, and so much memory, until the
        # garbage collector runs.
        if self._matrix is None:
            self._matrix = _matrix(frame)
        return self._matrix


def _square_pixels(width: int, height: int, aspect: Rational | None) -> tuple[int, int]:
    """The size with square pixels that loses none and invents none: the longer side shrinks."""
    if not aspect or not Fraction(1, 8) <= aspect <= 8:
        return width, height
    if aspect > 1:
        return width, max(1, round(height / aspect))
    return max(1, round(width * aspect)), height


def _matrix(frame: Any) -> tuple[bool, slice, slice]:
    """How a frame is put upright: transposed or not, then which way its rows and columns run.

    A frame's own `rotation` says nothing of mirrors, and takes a mirrored frame for a turned one.
    """
    forwards, backwards = slice(None), slice(None, None, -1)
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, forwards, forwards
    # A pixel (x, y) is shown at (a x + c y, b x + d y), moved into the picture.
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
    transposed = abs(b) + abs(c) > abs(a) + abs(d)
    down, right = (b, c) if transposed else (d, a)
    return transposed, backwards if down < 0 else forwards, backwards if right < 0 else forwards


def _converted(frame: Any, height: int, width: int, reformatter: Any) -> np.ndarray:
    """RGB of an FFmpeg frame at a size, not yet upright."""
    from av.video.reformatter import Interpolation

    smaller = height < frame.height or width < frame.width
    # Areas are averaged while colours are converted: a twelfth of the time of doing it after.
    method = Interpolation.AREA if smaller else Interpolation.BICUBIC
    # Without these flags swscale truncates, which darkens every pixel by 1/255.
    method |= Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
    has_alpha = any(component.is_alpha for component in frame.format.components)
    options = {
        "format": "rgba" if has_alpha or frame.format.has_palette else "rgb24",
        "src_colorspace": BT709 if _means_bt709(frame) else None,
        "interpolation": method,
    }
    pixels = reformatter.reformat(frame, width, height, **options).to_ndarray()
    if pixels.shape[-1] == 3:
        return pixels
    alpha = pixels[..., 3:].astype(np.uint16)
    return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _means_bt709(frame: Any) -> bool:
    """Untagged, and larger than PAL: players (mpv's rule) take it for HD, swscale for BT.601."""
    untagged = frame.colorspace == UNSPECIFIED and not frame.format.is_rgb
    return untagged and (frame.width >= 1280 or frame.height > 576)


def image_errors() -> tuple[type[Exception], ...]:
    """What Pillow raises on damaged files, which goes beyond what it documents."""
    from PIL import Image

    kinds = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError)
    return (*kinds, struct.error, zlib.error, Image.DecompressionBombError)


def count_stills(image: Any) -> int:
    """How many pictures `stills` gives."""
    first, end = _shown(image)
    return end - first


def stills(image: Any) -> Iterator[tuple[float, UInt8[np.ndarray, "H W 3"]]]:
    """Seconds on show, and upright pixels, of each picture of an image that Pillow opened.

    What no viewer shows is left out: what lies behind the picture of a JPEG (a gain map, a
    preview), and the poster of an animated PNG that is none of its frames.
    """
    from PIL import ImageOps, ImageSequence

    for frame in itertools.islice(ImageSequence.Iterator(image), *_shown(image)):
        frame.load()  # WebP tells a frame's length only after decoding it
        seconds = frame.info.get("duration", 0) / 1000 or DEFAULT_FRAME_SECONDS
        yield seconds, _on_white(ImageOps.exif_transpose(frame))


def _shown(image: Any) -> tuple[int, int]:
    """The pictures first <= i < end that viewers show."""
    count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    return int(getattr(image, "default_image", False) and count > 1), count


def _on_white(image: Any) -> np.ndarray:
    from PIL import Image

    if image.mode in SIXTEEN_BITS:  # Pillow's own conversion clips instead of scaling
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        grey = ((deep + 128) // 257).astype(np.uint8)
        grey[deep == image.info.get("transparency", -1)] = 255
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))
