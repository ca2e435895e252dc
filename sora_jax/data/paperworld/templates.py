"""Recognises silhouettes: ink masks compared with drawn ones in every pose."""

import functools
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float

from sora_jax.data.paperworld import vocab
from sora_jax.data.paperworld.render import draw_actor
from sora_jax.data.paperworld.scene import Actor
from sora_jax.data.paperworld.segment import UNIT, Track

_GRID = 20  # side of the normalised patch
_REACH = 1.25  # half its extent, in square roots of the inked area
_ANGLES = 36
_BLUR = 0.7  # pixels; blurred generated masks and sharp ones then look alike


class Match(NamedTuple):
    """How well a track fits each shape, upright or turned anyhow: mean correlation over frames."""

    upright: Float[np.ndarray, " s"]
    turned: Float[np.ndarray, " s"]


def _normalise(mask: np.ndarray) -> np.ndarray:
    """A mask, centred and scaled to a common area, as a vector of unit length and zero mean."""
    soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), _BLUR)
    total = float(soft.sum())
    x = float(soft.sum(0) @ np.arange(mask.shape[1])) / total
    y = float(soft.sum(1) @ np.arange(mask.shape[0])) / total
    scale = 2 * _REACH * np.sqrt(total) / _GRID
    centre = (_GRID - 1) / 2
    matrix = np.array([[scale, 0, x - scale * centre], [0, scale, y - scale * centre]])
    patch = cv2.warpAffine(
        soft, matrix, (_GRID, _GRID), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    )
    patch -= patch.mean()
    return (patch / np.linalg.norm(patch)).ravel()


@functools.cache
def _ink(shape: str, size: str, side: str, step: int) -> np.ndarray:
    """The drawn ink mask of a shape in one pose, at working resolution."""
    actor = Actor(
        colour="black",
        shape=shape,
        size=size,
        verb="stays",
        direction=side,
        scale=vocab.SIZES[size],
        start=(0.5, 0.5),
        travel=0.0,
        tempo=1.0,
    )
    canvas = np.full((UNIT, UNIT, 3), 255, np.uint8)
    angle = 2 * np.pi * step / _ANGLES
    draw_actor(canvas, actor, centre=np.array([UNIT / 2, UNIT / 2]), angle=angle, unit=UNIT)
    return canvas.max(-1) < 110


@functools.cache
def _library() -> tuple[np.ndarray, np.ndarray]:
    """Vectors of all poses, shape by shape, and the angle steps of one shape's poses."""
    vectors = [
        _normalise(_ink(shape, size, side, step))
        for shape in vocab.SHAPES
        for size in vocab.SIZES
        for side in vocab.DIRECTIONS
        for step in range(_ANGLES)
    ]
    steps = np.tile(np.arange(_ANGLES), len(vocab.SIZES) * len(vocab.DIRECTIONS))
    return np.stack(vectors), steps


def usable_frames(track: Track) -> np.ndarray:
    """Frames in which the whole object is seen, neither cut by an edge nor half hidden."""
    whole = track.whole if track.whole.any() else track.area > 0
    return np.flatnonzero(whole & (track.area > 0.85 * np.median(track.area[whole])))


def match(track: Track) -> Match:
    """Compares a track with every shape."""
    vectors, steps = _library()
    frames = usable_frames(track)
    patches = np.stack([_normalise(track.mask[f]) for f in frames])
    fit = (patches @ vectors.T).reshape(len(frames), len(vocab.SHAPES), len(steps))
    near = np.flatnonzero(np.minimum(steps, _ANGLES - steps) <= 1)
    return Match(upright=fit[:, :, near].max(2).mean(0), turned=fit.max(2).mean(0))


@functools.cache
def ink_area(shape: str, size: str) -> float:
    """Inked pixels of an upright shape at working resolution."""
    return float(_ink(shape, size, "right", 0).sum())
