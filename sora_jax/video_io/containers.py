"""Byte layouts that Pillow and FFmpeg cannot write as we need: APNG, WebP, GIF comments.

Both libraries merge equal neighbouring frames of an animation, so that a ball that rests would
lose frames, and FFmpeg drops the metadata of all three formats. The containers are simple chunk
lists, so they are assembled here from stills that Pillow encodes: PNG third edition (W3C, 2025)
chapters 5 and 11.3.6, the WebP container specification (RFC 9649), GIF89a section 24.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from jaxtyping import UInt8

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
WEBP_LOSSLESS_PIXELS = 2**20  # animations up to this many pixels in all are kept exact
IMAGE_DESCRIPTION = 0x010E  # the EXIF tag that holds the metadata in WebP


def png_bytes(frames: UInt8[np.ndarray, "F H W 3"], rate: Fraction, comment: str | None) -> bytes:
    """A PNG for one frame, an endlessly looping APNG for more; exact pixels and frame rate."""
    num_frames, height, width, _ = frames.shape
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    if num_frames > 1:
        chunks.append((b"acTL", struct.pack(">II", num_frames, 0)))
    if comment is not None:
        chunks.append((b"tEXt", b"Comment\0" + comment.encode("ascii")))
    sequence = 0
    for i, frame in enumerate(frames):
        if num_frames > 1:
            region = struct.pack(">IIIII", sequence, width, height, 0, 0)
            delay = struct.pack(">HHBB", rate.denominator, rate.numerator, 0, 0)
            chunks.append((b"fcTL", region + delay))
            sequence += 1
        data = b"".join(data for kind, data in _png_chunks(_still(frame)) if kind == b"IDAT")
        if i == 0:
            chunks.append((b"IDAT", data))
        else:
            chunks.append((b"fdAT", struct.pack(">I", sequence) + data))
            sequence += 1
    chunks.append((b"IEND", b""))
    return PNG_SIGNATURE + b"".join(_png_chunk(kind, data) for kind, data in chunks)


def _still(frame: np.ndarray, **options: object) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, **({"format": "PNG"} | options))
    return buffer.getvalue()


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def _png_chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(PNG_SIGNATURE)
    while at < len(png):
        (size,) = struct.unpack_from(">I", png, at)
        yield png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        at += 12 + size


def webp_bytes(frames: UInt8[np.ndarray, "F H W 3"], rate: Fraction, comment: str | None) -> bytes:
    """A still or endlessly looping WebP: exact if small, else at quality 95; times in ms."""
    from PIL import Image

    num_frames, height, width, _ = frames.shape
    lossless = frames.size // 3 <= WEBP_LOSSLESS_PIXELS
    flags = (0x08 if comment is not None else 0) | (0x02 if num_frames > 1 else 0)
    size = _uint24(width - 1) + _uint24(height - 1)
    chunks = [_riff_chunk(b"VP8X", struct.pack("<I", flags) + size)]
    if num_frames > 1:
        chunks.append(_riff_chunk(b"ANIM", struct.pack("<IH", 0, 0)))
    ticks = tick_times(num_frames, rate, per_second=1000)
    for i, frame in enumerate(frames):
        options = {"lossless": True, "quality": 75} if lossless else {"quality": 95}
        still = _still(frame, format="WEBP", **options)
        image = next(c for c in _riff_chunks(still[12:]) if c[:4] in (b"VP8 ", b"VP8L"))
        if num_frames > 1:
            # 0x02: do not blend with what was there before.
            header = bytes(6) + size + _uint24(ticks[i + 1] - ticks[i]) + b"\x02"
            image = _riff_chunk(b"ANMF", header + image)
        chunks.append(image)
    if comment is not None:
        exif = Image.Exif()
        exif[IMAGE_DESCRIPTION] = comment
        # Pillow's bytes start with a JPEG marker that has no place in a WebP chunk.
        chunks.append(_riff_chunk(b"EXIF", exif.tobytes().removeprefix(b"Exif\0\0")))
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _uint24(value: int) -> bytes:
    return value.to_bytes(3, "little")


def _riff_chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _riff_chunks(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at + 4)
        end = at + 8 + size + size % 2
        yield data[at:end]
        at = end


def gif_with_comment(gif: bytes, comment: str) -> bytes:
    """`gif` with a comment extension placed before its first frame."""
    flags = gif[10]
    at = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)  # header, then the global palette
    text = comment.encode("ascii")
    blocks = (text[i : i + 255] for i in range(0, len(text), 255))
    extension = b"\x21\xfe" + b"".join(bytes([len(b)]) + b for b in blocks) + b"\0"
    return gif[:at] + extension + gif[at:]


def tick_times(num_frames: int, rate: Fraction, *, per_second: int) -> list[int]:
    """When each frame starts, and the last ends, in ticks: rounded down, so never late."""
    return [int(i * per_second / rate) for i in range(num_frames + 1)]
