"""Silhouettes of the cut-outs as polygons: x right, y down, centred, largest extent 1.

Every silhouette faces right. Details are holes through which cream paper shows; they make
rotation visible on round shapes without touching the subject's colour.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

SCRAP = "scrap"  # word of what is cut at random
Polygon = Float[np.ndarray, "p 2"]


class Silhouette(NamedTuple):
    """A cut-out of largest extent 1 around the origin."""

    outline: tuple[Polygon, ...]  # their union is the silhouette
    details: tuple[Polygon, ...]
    half_width: float
    half_height: float
    radius: float  # of the circle around the origin that contains it


def _ellipse(
    cx: float | int, cy: float | int, rx: float | int, ry: float | int, points: int = 40
) -> np.ndarray:
    a = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([cx + rx * np.cos(a), cy + ry * np.sin(a)], axis=1)


def _polygon(*points: tuple[float | int, float | int]) -> np.ndarray:
    return np.array(points, dtype=np.float64)


def _star(outer: float | int, inner: float | int) -> np.ndarray:
    a = -np.pi / 2 + np.arange(10) * np.pi / 5
    r = np.where(np.arange(10) % 2 == 0, outer, inner)
    return np.stack([r * np.cos(a), r * np.sin(a)], axis=1)


def _wedge(start: float | int, stop: float | int, radius: float | int) -> np.ndarray:
    a = np.linspace(start, stop, 12)
    arc = np.stack([radius * np.cos(a), radius * np.sin(a)], axis=1)
    return np.concatenate([np.zeros((1, 2)), arc])


def _ball() -> tuple[list[np.ndarray], list[np.ndarray]]:
    half = np.radians(26)
    wedges = [_wedge(c - half, c + half, 1.0) for c in (np.pi / 2, -np.pi / 2)]
    return [_ellipse(0, 0, 1, 1)], wedges


def _box() -> tuple[list[np.ndarray], list[np.ndarray]]:
    body = _polygon((-1, -1), (1, -1), (1, 1), (-1, 1))
    ribbon = _polygon((-0.13, -1), (0.13, -1), (0.13, 1), (-0.13, 1))
    return [body], [ribbon, ribbon[:, ::-1].copy()]


def _heart() -> tuple[list[np.ndarray], list[np.ndarray]]:
    a = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    x = 16 * np.sin(a) ** 3
    y = -(13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a))
    return [np.stack([x, y], axis=1)], [_ellipse(-7.5, -5.5, 3.4, 3.0)]


def _boat() -> tuple[list[np.ndarray], list[np.ndarray]]:
    hull = _polygon((-1, 0.22), (1, 0.22), (0.62, 0.92), (-0.68, 0.92))
    mast = _polygon((-0.2, -0.98), (0.06, -0.98), (0.06, 0.4), (-0.2, 0.4))
    sail = _polygon((0.0, -0.98), (0.94, 0.12), (0.0, 0.12))
    jib = _polygon((-0.18, -0.8), (-0.18, 0.12), (-0.84, 0.12))
    return [hull, mast, sail, jib], [_ellipse(0.0, 0.54, 0.14, 0.14)]


def _bird() -> tuple[list[np.ndarray], list[np.ndarray]]:
    body = _ellipse(0.02, 0.2, 0.66, 0.46)
    head = _ellipse(0.56, -0.16, 0.34, 0.34)
    beak = _polygon((0.74, -0.4), (1.14, -0.1), (0.74, 0.1))
    tail = _polygon((-0.3, -0.1), (-1.0, -0.16), (-0.96, 0.34), (-0.3, 0.5))
    wing = _polygon((0.3, 0.1), (-0.34, -0.92), (-0.66, -0.62), (-0.5, 0.16))
    return [body, head, beak, tail, wing], [_ellipse(0.6, -0.2, 0.13, 0.13)]


def _fish() -> tuple[list[np.ndarray], list[np.ndarray]]:
    body = _ellipse(0.24, 0, 0.76, 0.58)
    tail = _polygon((-0.2, 0), (-1.0, -0.64), (-0.8, 0), (-1.0, 0.64))
    return [body, tail], [_ellipse(0.6, -0.12, 0.15, 0.15)]


def _tree() -> tuple[list[np.ndarray], list[np.ndarray]]:
    top = _polygon((0, -1), (0.56, -0.24), (-0.56, -0.24))
    middle = _polygon((0, -0.66), (0.74, 0.22), (-0.74, 0.22))
    bottom = _polygon((0, -0.24), (0.9, 0.66), (-0.9, 0.66))
    trunk = _polygon((-0.22, 0.6), (0.22, 0.6), (0.22, 1), (-0.22, 1))
    return [top, middle, bottom, trunk], [_ellipse(0.12, 0.34, 0.15, 0.15)]


def _scrap(seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A star-shaped polygon of five to nine corners, sharp or cut round, with one or two holes."""
    rng = np.random.default_rng([seed, 11])
    corners = int(rng.integers(5, 10))
    a = 2 * np.pi * (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) / corners
    r = rng.uniform(0.45, 1.0, corners)
    outline = np.stack([r * np.cos(a), r * np.sin(a)], axis=1)
    for _ in range(int(rng.choice([0, 3]))):  # Chaikin's corner cutting
        ahead = np.roll(outline, -1, axis=0)
        outline = np.stack([0.75 * outline + 0.25 * ahead, 0.25 * outline + 0.75 * ahead], 1)
        outline = outline.reshape(-1, 2)
    holes = []
    for _ in range(int(rng.integers(1, 3))):
        turn, way = rng.uniform(0, 2 * np.pi, 2)
        cos, sin = np.cos(turn), np.sin(turn)
        size = rng.uniform(0.1, 0.2) * np.array([1.0, rng.choice([1.0, 2.0])])
        hole = _ellipse(0, 0, *size) @ np.array([[cos, sin], [-sin, cos]])
        holes.append(hole + rng.uniform(0.0, 0.3) * np.array([np.cos(way), np.sin(way)]))
    return [outline], holes


_BUILDERS = {
    "ball": _ball,
    "box": _box,
    "star": lambda: ([_star(1.0, 0.52)], [_ellipse(0, 0, 0.2, 0.2)]),
    "heart": _heart,
    "boat": _boat,
    "bird": _bird,
    "fish": _fish,
    "tree": _tree,
}
# A square or a disc looks larger than a star of the same extent.
_RELATIVE = {"ball": 0.94, "box": 0.86, "star": 1.06, "heart": 0.98, "tree": 1.04}


@functools.lru_cache(maxsize=1024)
def silhouette(shape: str) -> Silhouette:
    """The cut-out of a shape word, centred on its bounding box, largest extent about 1.

    "scrap 7" is one of endlessly many outlines that have no name, told apart by their number.
    """
    word, _, number = shape.partition(" ")
    outline, details = _scrap(int(number)) if word == SCRAP else _BUILDERS[shape]()
    points = np.concatenate(outline)
    low, high = points.min(axis=0), points.max(axis=0)
    centre, scale = (low + high) / 2, _RELATIVE.get(shape, 1.0) / (high - low).max()
    outline = tuple((p - centre) * scale for p in outline)
    details = tuple((p - centre) * scale for p in details)
    points = np.concatenate(outline)
    half = np.abs(points).max(axis=0)
    radius = float(np.hypot(*points.T).max())
    return Silhouette(outline, details, float(half[0]), float(half[1]), radius)
