"""A video of which a part is given: what every task but text to video begins from.

The given pixels come back as they were, the rest is made to go with them. For the transformer the
canvas becomes latents and the tokens that are given: those whose every pixel is. A latent frame
stands for several frames (the first for one); where only some of them are given it counts as
given if it is a keyframe between frames to be made, its picture held through all of them, and not
if it is the end of a longer given part, which pixels alone then continue.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from sora_jax import video_io

_INPAINT_RADIUS = 3  # pixels


class Canvas(NamedTuple):
    """Frames, and which of their pixels are given; the others may hold anything."""

    frames: UInt8[np.ndarray, "F H W 3"]
    known: Bool[np.ndarray, "F H W"]


def blank(frames: int, height: int, width: int) -> Canvas:
    """Nothing given."""
    return Canvas(
        np.zeros((frames, height, width, 3), np.uint8), np.zeros((frames, height, width), bool)
    )


def of_pictures(
    pictures: Mapping[int, np.ndarray], frames: int, *, size: tuple[int, int]
) -> Canvas:
    """Pictures of any size at frames of a video of `size` (width, height), their centres cut.

    Raises:
      ValueError: a frame outside the video.
    """
    width, height = size
    canvas = blank(frames, height, width)
    for frame, picture in pictures.items():
        if not 0 <= frame < frames:
            raise ValueError(
                f"keyframe {frame} is outside the video; use 0 to {frames - 1}, or more frames."
            )
        canvas.frames[frame] = video_io.fit(picture, (height, width))
        canvas.known[frame] = True
    return canvas


def of_clip(clip: UInt8[np.ndarray, "G H W 3"], frames: int, *, at: int) -> Canvas:
    """A clip that begins at frame `at` of a longer video; what is outside is left out."""
    canvas = blank(frames, *clip.shape[1:3])
    place(canvas, clip, at=at)
    return canvas


def place(canvas: Canvas, clip: UInt8[np.ndarray, "G H W 3"], *, at: int) -> None:
    """Puts a clip on the canvas, in place."""
    begin, end = max(at, 0), min(at + len(clip), len(canvas.frames))
    canvas.frames[begin:end] = clip[begin - at : end - at]
    canvas.known[begin:end] = True


def paste(canvas: Canvas, video: UInt8[np.ndarray, "F H W 3"]) -> UInt8[np.ndarray, "F H W 3"]:
    """`video` with the given pixels as they were given."""
    return np.where(canvas.known[..., None], canvas.frames, video)


def filled(canvas: Canvas) -> UInt8[np.ndarray, "F H W 3"]:
    """Frames without holes, for the encoder: pictures are held in time, holes closed in space.

    A frame without a given pixel shows the nearest that has some, of two as near the earlier. What
    is missing within a frame is painted over from around it, so that the encoder, which sees
    beyond a token, meets no edge.

    Raises:
      ValueError: nothing is given.
    """
    import cv2

    some = np.flatnonzero(canvas.known.any(axis=(1, 2)))
    if not len(some):
        raise ValueError("nothing of the canvas is given.")
    frames = canvas.frames.copy()
    for frame in some:
        holes = ~canvas.known[frame]
        if holes.any():
            frames[frame] = cv2.inpaint(
                frames[frame], holes.astype(np.uint8), _INPAINT_RADIUS, cv2.INPAINT_TELEA
            )
    distance = np.abs(np.arange(len(frames))[:, None] - some)
    return frames[some[distance.argmin(axis=1)]]


def given_tokens(
    canvas: Canvas, *, temporal: int, cell: tuple[int, int, int]
) -> Bool[np.ndarray, "f_grid h_grid w_grid"]:
    """Which tokens are given.

    Args:
      temporal: frames in a latent frame after the first.
      cell: latent frames, and rows and columns in pixels, of a token.
    """
    depth, height, width = cell
    frames, rows, columns = canvas.known.shape
    tiles = canvas.known.reshape(frames, rows // height, height, columns // width, width)
    whole = tiles.all(axis=(2, 4))  # (F, h', w')
    nothing = np.zeros_like(whole[:1])
    before, after = np.concatenate([nothing, whole[:-1]]), np.concatenate([whole[1:], nothing])

    def latent(values: np.ndarray) -> np.ndarray:
        """(latent frames after the first, frames in them, h', w')."""
        return values[1:].reshape(-1, temporal, *values.shape[1:])

    full, part = latent(whole).all(axis=1), latent(whole).any(axis=1)
    continued = latent(whole & before)[:, 0] | latent(whole & after)[:, -1]
    given = np.concatenate([whole[:1], full | (part & ~continued)])
    return given.reshape(-1, depth, *given.shape[1:]).all(axis=1)


def to_unit(frames: UInt8[np.ndarray, "*s 3"]) -> Float[np.ndarray, "*s 3"]:
    """0..255 to [-1, 1], as the VAE takes it."""
    return frames.astype(np.float32) / 127.5 - 1
