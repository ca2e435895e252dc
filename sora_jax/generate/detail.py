"""What a VAE loses of given frames, carried to the frames beside them where nothing moves.

A given frame comes back exactly, and the frames made next to it are decoded: grain, thin lines
and text that the VAE smooths away would vanish at the seam. What was lost is known at the given
frame, as the difference between it and its own decoded latents; where a made frame's decoded
pixels are those of the given frame's, the same was lost there, and is added again. Where something
moves nothing is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from sora_jax.generate.canvas import Canvas, paste

TOLERANCE = 20.0  # of 255: a local difference from which on a place counts as another one
_REACH = 5  # pixels over which it is looked at
Image = UInt8[np.ndarray, "H W 3"]


class Reference(NamedTuple):
    """A given frame, and the same as it is decoded."""

    frame: int
    given: Image
    decoded: Image


def references(canvas: Canvas, decoded: UInt8[np.ndarray, "F H W 3"]) -> list[Reference]:
    """The frames that are given whole and have a neighbour that is not."""
    whole = canvas.known.all(axis=(1, 2))
    beside = np.zeros_like(whole)
    beside[1:] |= ~whole[:-1]
    beside[:-1] |= ~whole[1:]
    ends = np.flatnonzero(whole & beside)
    return [Reference(int(i), canvas.frames[i], decoded[i]) for i in ends]


def carry(
    decoded: UInt8[np.ndarray, "n H W 3"], known: Sequence[Reference], *, begin: int = 0
) -> UInt8[np.ndarray, "n H W 3"]:
    """`decoded`, the first of which is frame `begin`, with what references say was lost.

    Of several references that fit a place the nearer in time counts more.
    """
    made = decoded.copy()
    for i, frame in enumerate(decoded if known else ()):
        total = np.zeros(frame.shape, np.float32)
        weights = np.full((*frame.shape[:2], 1), 1e-6, np.float32)
        sure = np.zeros_like(weights)
        for reference in known:
            alike = _alike(frame, reference.decoded)
            near = alike / (1 + abs(reference.frame - begin - i)) ** 2
            total += near * np.subtract(reference.given, reference.decoded, dtype=np.float32)
            weights += near
            sure = np.maximum(sure, alike)
        made[i] = np.clip(np.rint(frame + sure * total / weights), 0, 255)
    return made


def _alike(x: Image, y: Image) -> Float[np.ndarray, "H W 1"]:
    """1 where two frames show the same around a pixel, 0 where they do not."""
    import cv2

    apart = np.abs(np.subtract(x, y, dtype=np.float32)).max(axis=-1)
    around = cv2.blur(apart, (_REACH, _REACH))
    # A thing may pass near by: the largest difference around decides, softened.
    around = cv2.dilate(around, np.ones((_REACH, _REACH), np.uint8))
    return np.clip(1.5 - 1.5 * around / TOLERANCE, 0, 1)[..., None]


def finish(canvas: Canvas, decoded: UInt8[np.ndarray, "F H W 3"]) -> UInt8[np.ndarray, "F H W 3"]:
    """A decoded video with the given pixels as they were given, and their detail beside them."""
    return paste(canvas, carry(decoded, references(canvas, decoded)))
