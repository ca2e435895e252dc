"""Finds places and inked pixels in a clip: the colour analysis under the oracle.

Everything happens at one working resolution (shorter side 64 pixels), so thresholds in pixels mean
the same for every clip.
"""

import functools
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, Int8, UInt8

from sora_jax.data.paperworld import places, vocab
from sora_jax.data.paperworld.vocab import RGB

UNIT = 64  # shorter side at working resolution, in pixels
_CELLS = 10  # a place is recognised from this many cells along the shorter side
_INK_SHARES = (1.0, 0.85, 0.7)  # the rest is paper
_FAR = 90.0  # RGB distance beyond which a pixel belongs to no colour
_LEAST = 12  # solid pixels of an object in a frame
_UNLIKE = 20.0  # grey levels from a drawn occluder; blurred ones differ by 6, all else by 30


class Track(NamedTuple):
    """The inked pixels of one colour through a shot, at working resolution."""

    colour: str
    mask: Bool[np.ndarray, "F H W"]
    area: Float[np.ndarray, " F"]  # pixels; 0 where the object is not seen
    centre: Float[np.ndarray, "F 2"]  # x right, y down, in pixels; nan where not seen
    low: Float[np.ndarray, " F"]  # the lowest inked row; nan where not seen
    whole: Bool[np.ndarray, " F"]  # seen, and clear of the frame's edges


def to_working_size(video: UInt8[np.ndarray, "F H W 3"]) -> UInt8[np.ndarray, "F h w 3"]:
    """Resizes so that the shorter side has 64 pixels."""
    height, width = video.shape[1:3]
    unit = min(height, width)
    if unit == UNIT:
        return video
    size = (round(width * UNIT / unit), round(height * UNIT / unit))
    method = cv2.INTER_AREA if unit > UNIT else cv2.INTER_CUBIC
    return np.stack([cv2.resize(frame, size, interpolation=method) for frame in video])


@functools.lru_cache(maxsize=8)
def _landscapes(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Small pictures of every place in several layouts, and which place each is."""
    grid = (round(_CELLS * width / UNIT), round(_CELLS * height / UNIT))
    pictures, names = [], []
    for i, place in enumerate(vocab.PLACES):
        for layout in (0.0, 0.25, 0.5, 0.75, 1.0):
            picture = places.background(place, layout, width=width, height=height)
            pictures.append(cv2.resize(picture, grid, interpolation=cv2.INTER_AREA))
            names.append(i)
    return np.stack(pictures).astype(np.float32), np.array(names)


def classify_places(video: UInt8[np.ndarray, "F H W 3"]) -> Int[np.ndarray, " F"]:
    """Index into `vocab.PLACES` for every frame of a clip at working resolution.

    Cells that fit worst (those a cut-out covers) do not count.
    """
    height, width = video.shape[1:3]
    pictures, names = _landscapes(height, width)
    grid = (pictures.shape[2], pictures.shape[1])
    found = []
    for frame in video:
        small = cv2.resize(frame, grid, interpolation=cv2.INTER_AREA).astype(np.float32)
        error = np.abs(pictures - small).sum(-1).reshape(len(pictures), -1)
        kept = int(0.6 * error.shape[1])
        score = np.partition(error, kept, axis=1)[:, :kept].mean(axis=1)
        found.append(names[score.argmin()])
    return np.array(found)


def find_occluder(video: UInt8[np.ndarray, "F H W 3"]) -> str | None:
    """What stands in the middle of a shot at working resolution to hide behind, if anything does.

    It stands before all else and still, so that the median over time shows it.
    """
    height, width = video.shape[1:3]
    middle = np.median(video, axis=0)
    unlike = {}
    for kind in vocab.OCCLUDERS:
        alpha, colour = places.occluder(kind, width=width, height=height)
        body = alpha > 0.99
        unlike[kind] = float(np.abs(middle[body] - colour[body]).max(axis=-1).mean())
    nearest = min(unlike, key=unlike.__getitem__)
    return nearest if unlike[nearest] < _UNLIKE else None


def _mix(first: RGB, second: RGB, share: float) -> tuple[float, ...]:
    return tuple(share * a + (1 - share) * b for a, b in zip(first, second, strict=True))


@functools.cache
def _label_table(place: str) -> np.ndarray:
    """Ink index, or -1, of every colour with six bits a channel: the label of the nearest sample.

    Samples are the inks, pale where blurred into their paper rim, and all else that a clip of this
    place consists of, also under a drop shadow.
    """
    samples, labels = [], []
    for i, ink in enumerate(vocab.COLOURS.values()):
        for share in _INK_SHARES:
            samples.append(_mix(ink, vocab.PAPER, share))
            labels.append(i)
    walls = [colour for pair in places.OCCLUDER_COLOURS.values() for colour in pair]
    for colour in (vocab.PAPER, *places.colours(place), *walls):
        samples += [colour, _mix(colour, (0, 0, 0), 0.8)]
        labels += [-1, -1]
    for colour in places.colours(place):  # the outer edge of a blurred rim
        samples.append(_mix(colour, vocab.PAPER, 0.6))
        labels.append(-1)
    levels = np.arange(2, 256, 4, dtype=np.float32)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    best = np.full(len(cube), _FAR**2, np.float32)
    table = np.full(len(cube), -1, np.int8)
    for sample, label in zip(samples, labels, strict=True):
        distance = ((cube - np.array(sample, np.float32)) ** 2).sum(1)
        nearer = distance < best
        best[nearer], table[nearer] = distance[nearer], label
    return table


def label_inks(video: UInt8[np.ndarray, "F H W 3"], place: str) -> Int8[np.ndarray, "F H W"]:
    """Index into `vocab.COLOURS` of every pixel, or -1 where it is not ink."""
    high = (video >> 2).astype(np.int32)
    return _label_table(place)[(high[..., 0] << 12) | (high[..., 1] << 6) | high[..., 2]]


def _track(colour: str, mask: np.ndarray) -> Track:
    height, width = mask.shape[1:]
    area = mask.sum((1, 2)).astype(np.float64)
    seen = area > 0
    count = np.where(seen, area, np.nan)
    x = mask.sum(1) @ np.arange(width) / count
    y = mask.sum(2) @ np.arange(height) / count
    rows = mask.any(2)
    low = np.where(seen, height - 1 - rows[:, ::-1].argmax(1), np.nan)
    edges = mask[:, 0].any(1) | mask[:, -1].any(1) | mask[:, :, 0].any(1) | mask[:, :, -1].any(1)
    return Track(colour, mask, area, np.stack([x, y], 1), low, seen & ~edges)


def _keep_main_part(mask: np.ndarray) -> np.ndarray:
    """Drops specks: keeps, in every frame, the parts near the largest one."""
    kept = np.zeros_like(mask)
    near = np.ones((7, 7), np.uint8)  # joins the panels of a box or a ball
    for out, frame in zip(kept, mask, strict=True):
        joined = cv2.morphologyEx(frame.astype(np.uint8), cv2.MORPH_CLOSE, near)
        count, parts = cv2.connectedComponents(joined)
        if count > 1:
            sizes = np.bincount(parts[frame], minlength=count)
            sizes[0] = 0
            out[:] = frame & (parts == sizes.argmax())
    return kept


def find_tracks(video: UInt8[np.ndarray, "F H W 3"], place: str) -> list[Track]:
    """The objects of a shot, largest first: at most one for each ink.

    A colour counts as an object where it fills more than the seam between two others would.
    """
    label = label_inks(video, place)
    tracks: list[Track] = []
    masks = [(label == i) for i in range(len(vocab.COLOURS))]
    order = np.argsort([-int(m.sum()) for m in masks])
    names = tuple(vocab.COLOURS)
    core = np.ones((2, 2), np.uint8)
    fewest = max(1, min(3, len(video) // 3))
    for i in order:
        if (masks[i].sum((1, 2)) >= _LEAST).sum() < fewest:
            continue
        mask = _keep_main_part(masks[i])
        solid = np.stack([cv2.erode(frame.astype(np.uint8), core) for frame in mask])
        enough = solid.sum((1, 2)) >= _LEAST
        if enough.sum() < fewest:
            continue
        mask[~enough & (mask.sum((1, 2)) < _LEAST)] = False
        if tracks and _is_fringe(mask, tracks[0].mask):
            continue
        tracks.append(_track(names[i], mask))
    return tracks


def _is_fringe(mask: np.ndarray, of: np.ndarray) -> bool:
    """Whether most of a mask lies within three pixels of another: a mixed edge, not an object."""
    wide = np.ones((7, 7), np.uint8)
    near = np.stack([cv2.dilate(frame.astype(np.uint8), wide) for frame in of]) > 0
    return bool((mask & near).sum() > 0.5 * mask.sum())
