"""Backgrounds: layers of muted paper, each with a soft shadow on the layer behind it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from sora_jax.data.paperworld.vocab import PAPER, RGB

SUPERSAMPLE = 4
_SHIFT = 4  # fractional bits of polygon vertices
_SHADOW = 0.22
Polygons = list[np.ndarray]


class Layer(NamedTuple):
    """One sheet of paper: polygons of a colour, in world units."""

    colour: RGB
    polygons: Polygons
    shadow: bool = True


def fill(
    mask: np.ndarray, points: np.ndarray, *, value: float | int | tuple, scale: float | int
) -> None:
    """Fills a polygon given in world units into a supersampled array, in place."""
    fixed = np.rint((points * scale - 0.5) * (1 << _SHIFT)).astype(np.int32)
    cv2.fillPoly(mask, [fixed], value, lineType=cv2.LINE_8, shift=_SHIFT)


def _ridge(
    width: float | int,
    bottom: float | int,
    *,
    level: float | int,
    amplitude: float,
    waves: float,
    phase: float | int,
) -> np.ndarray:
    """A hill line at height `level` (y down) filled down to `bottom`."""
    x = np.linspace(-0.3, width + 0.3, 80)
    y = level + amplitude * np.sin(2 * np.pi * (waves * x + phase))
    foot = np.array([[width + 0.3, bottom + 0.3], [-0.3, bottom + 0.3]])
    return np.concatenate([np.stack([x, y], axis=1), foot])


def _scallops(
    width: float | int, bottom: float | int, *, level: float | int, pitch: float, phase: float | int
):
    """A row of paper waves."""
    x = np.linspace(-0.3, width + 0.3, 160)
    y = level - 0.035 * np.abs(np.sin(np.pi * (x / pitch + phase)))
    foot = np.array([[width + 0.3, bottom + 0.3], [-0.3, bottom + 0.3]])
    return np.concatenate([np.stack([x, y], axis=1), foot])


def _disc(
    x: float | int, y: float | int, radius: float | int, *, squash: float = 1.0
) -> np.ndarray:
    a = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return np.stack([x + radius * np.cos(a), y + radius * squash * np.sin(a)], axis=1)


def _rectangle(
    x: float | int, y: float | int, width: float | int, height: float | int
) -> np.ndarray:
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])


def _cloud(x: float | int, y: float | int, size: float | int) -> Polygons:
    return [
        _disc(x - 0.5 * size, y, 0.42 * size, squash=0.8),
        _disc(x, y - 0.12 * size, 0.55 * size, squash=0.85),
        _disc(x + 0.55 * size, y, 0.4 * size, squash=0.8),
    ]


def _pine(x: float | int, y: float | int, size: float | int) -> Polygons:
    tiers = ((0.0, 0.5), (0.28, 0.75), (0.6, 1.0))
    return [
        np.array(
            [
                [x, y - size + top * size * 0.8],
                [x + 0.26 * size * spread, y - size + (top + 0.5) * size * 0.9],
                [x - 0.26 * size * spread, y - size + (top + 0.5) * size * 0.9],
            ]
        )
        for top, spread in tiers
    ]


def _night(w: float, h: float, u: float) -> tuple[RGB, list[Layer]]:
    spots = ((0.1, 0.12), (0.3, 0.3), (0.46, 0.1), (0.62, 0.24), (0.93, 0.42), (0.14, 0.48))
    stars = [_disc(w * x, h * y + 0.02 * u, 0.011) for x, y in spots]
    return (66, 74, 122), [
        Layer((250, 240, 212), [_disc(w * 0.8, 0.17, 0.095), *stars], shadow=False),
        Layer(
            (84, 94, 144),
            [_ridge(w, h, level=h - 0.33, amplitude=0.05, waves=0.9, phase=0.1 + 0.12 * u)],
        ),
        Layer(
            (106, 116, 164),
            [_ridge(w, h, level=h - 0.19, amplitude=0.015, waves=0.7, phase=0.6 + 0.2 * u)],
        ),
    ]


def _meadow(w: float, h: float, u: float) -> tuple[RGB, list[Layer]]:
    flowers = [
        _disc(w * x, h - y, 0.014)
        for x, y in ((0.06, 0.05), (0.28, 0.04), (0.52, 0.06), (0.74, 0.04), (0.93, 0.06))
    ]
    return (196, 228, 242), [
        Layer((250, 252, 250), _cloud(w * 0.22 + 0.06 * u, 0.16, 0.13)),
        Layer(
            (186, 216, 160),
            [_ridge(w, h, level=h - 0.34, amplitude=0.06, waves=0.8, phase=0.3 + 0.15 * u)],
        ),
        Layer(
            (160, 200, 128),
            [_ridge(w, h, level=h - 0.18, amplitude=0.015, waves=0.6, phase=0.8 + 0.2 * u)],
        ),
        Layer((252, 250, 240), flowers, shadow=False),
    ]


def _snow(w: float, h: float, u: float) -> tuple[RGB, list[Layer]]:
    spots = ((0.08, 0.1), (0.24, 0.34), (0.4, 0.14), (0.6, 0.38), (0.7, 0.1), (0.92, 0.22))
    flakes = [_disc(w * x, h * y + 0.03 * u, 0.013) for x, y in spots]
    pines = _pine(w * 0.13 + 0.03 * u, h - 0.24, 0.3) + _pine(w * 0.88, h - 0.24, 0.36)
    return (182, 200, 222), [
        Layer((250, 252, 254), flakes, shadow=False),
        Layer(
            (216, 226, 238),
            [_ridge(w, h, level=h - 0.32, amplitude=0.05, waves=0.8, phase=0.55 + 0.15 * u)],
        ),
        Layer((150, 172, 196), pines),
        Layer(
            (246, 249, 252),
            [_ridge(w, h, level=h - 0.2, amplitude=0.018, waves=0.7, phase=0.1 + 0.2 * u)],
        ),
    ]


def _sea(w: float, h: float, u: float) -> tuple[RGB, list[Layer]]:
    return (206, 236, 240), [
        Layer((255, 250, 226), [_disc(w * 0.8, 0.17, 0.1)]),
        Layer((146, 208, 212), [_scallops(w, h, level=h - 0.4, pitch=0.23, phase=0.5 * u)]),
        Layer((112, 186, 196), [_scallops(w, h, level=h - 0.29, pitch=0.23, phase=0.4 + 0.5 * u)]),
        Layer(
            (242, 228, 196),
            [_ridge(w, h, level=h - 0.18, amplitude=0.012, waves=0.5, phase=0.2 + 0.2 * u)],
        ),
    ]


def _cactus(x: float | int, y: float | int, size: float | int) -> Polygons:
    t = 0.15 * size
    return [
        _rectangle(x - t, y - size, 2 * t, size),
        _disc(x, y - size, t),
        _rectangle(x - 0.5 * size, y - 0.62 * size, 0.5 * size, 1.4 * t),
        _rectangle(x - 0.5 * size, y - 0.85 * size, 1.4 * t, 0.3 * size),
        _rectangle(x, y - 0.48 * size, 0.46 * size, 1.4 * t),
        _rectangle(x + 0.46 * size - 1.4 * t, y - 0.75 * size, 1.4 * t, 0.36 * size),
    ]


def _desert(w: float, h: float, u: float) -> tuple[RGB, list[Layer]]:
    return (252, 230, 204), [
        Layer((255, 249, 234), [_disc(w * 0.22, 0.18, 0.11)]),
        Layer(
            (232, 196, 158),
            [_ridge(w, h, level=h - 0.34, amplitude=0.06, waves=0.75, phase=0.65 + 0.15 * u)],
        ),
        Layer((158, 170, 134), _cactus(w * 0.86 + 0.03 * u, h - 0.17, 0.26)),
        Layer(
            (212, 172, 132),
            [_ridge(w, h, level=h - 0.19, amplitude=0.018, waves=0.6, phase=0.2 + 0.2 * u)],
        ),
    ]


def _forest(w: float, h: float, u: float) -> tuple[RGB, list[Layer]]:
    count = max(4, round(4 * w))
    far = [_pine(w * (i + 0.5) / count + 0.03 * u, h - 0.18, 0.5) for i in range(count)]
    near = [_pine(w * i / count + 0.03 * u, h - 0.1, 0.34) for i in range(count + 1)]
    return (212, 226, 212), [
        Layer((164, 190, 174), [p for tree in far for p in tree]),
        Layer((132, 162, 148), [p for tree in near for p in tree]),
        Layer(
            (158, 142, 122),
            [_ridge(w, h, level=h - 0.17, amplitude=0.012, waves=0.6, phase=0.4 + 0.2 * u)],
        ),
    ]


def _city(w: float, h: float, u: float) -> tuple[RGB, list[Layer]]:
    count = max(5, round(5 * w))
    heights = (0.44, 0.6, 0.38, 0.54, 0.48, 0.64, 0.4)
    pitch = (w + 0.4) / count
    towers, windows = [], []
    for i in range(count):
        x, top = -0.2 + i * pitch + 0.05 * u, h - heights[i % len(heights)]
        towers.append(_rectangle(x, top, pitch * 0.82, 1.0))
        for row in range(3):
            windows.append(_rectangle(x + 0.05, top + 0.06 + 0.1 * row, 0.035, 0.045))
            windows.append(
                _rectangle(x + pitch * 0.82 - 0.085, top + 0.06 + 0.1 * row, 0.035, 0.045)
            )
    return (222, 214, 228), [
        Layer((162, 162, 186), towers),
        Layer((236, 232, 226), windows, shadow=False),
        Layer((126, 128, 144), [_rectangle(-0.3, h - 0.18, w + 0.6, 1.0)]),
        Layer(
            (206, 206, 212),
            [_rectangle(x, h - 0.055, 0.14, 0.016) for x in np.arange(-0.2, w + 0.2, 0.26)],
            shadow=False,
        ),
    ]


_PLACES: dict[str, Callable[[float, float, float], tuple[RGB, list[Layer]]]] = {
    "night": _night,
    "meadow": _meadow,
    "snow": _snow,
    "sea": _sea,
    "desert": _desert,
    "forest": _forest,
    "city": _city,
}


OCCLUDER_COLOURS: dict[str, tuple[RGB, RGB]] = {  # body and seams
    "wall": ((178, 150, 124), (206, 184, 160)),
    "rock": ((150, 146, 148), (184, 180, 180)),
}


def colours(place: str) -> list[RGB]:
    """The papers that a place is made of."""
    sky, layers = _PLACES[place](1.0, 1.0, 0.0)
    return [sky, *(layer.colour for layer in layers)]


def shrink(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Averages a supersampled 8-bit array down to float32 in its own range."""
    return cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)


def lay(
    canvas: np.ndarray, alpha: np.ndarray, colour: np.ndarray, *, unit: float | int, shadow: float
) -> None:
    """Lays a sheet with coverage `alpha` onto a float canvas over its own soft shadow, in place."""
    if shadow:
        sigma = 0.02 * unit
        shift = np.float32([[1, 0, 0.018 * unit], [0, 1, 0.024 * unit]])
        height, width = alpha.shape
        soft = cv2.warpAffine(alpha, shift, (width, height), borderMode=cv2.BORDER_REPLICATE)
        soft = cv2.GaussianBlur(soft, (0, 0), sigma)
        canvas *= 1 - shadow * soft[..., None]
    canvas += (colour - canvas) * alpha[..., None]


def background(
    place: str, layout: float, *, width: int, height: int, margin: int = 0
) -> UInt8[np.ndarray, "H W 3"]:
    """The paper landscape of a place, `margin` pixels wider than the view on each side.

    Args:
      layout: in [0, 1); shifts hills, waves and clouds a little.
    """
    unit = min(width, height)
    sky, layers = _PLACES[place](width / unit, height / unit, layout)
    wide = width + 2 * margin
    canvas = np.empty((height, wide, 3), np.float32)
    canvas[:] = sky
    offset = np.array([margin / unit, 0.0])
    for layer in layers:
        mask = np.zeros((height * SUPERSAMPLE, wide * SUPERSAMPLE), np.uint8)
        for points in layer.polygons:
            fill(mask, points + offset, value=255, scale=unit * SUPERSAMPLE)
        alpha = shrink(mask, height, wide) / 255
        colour = np.array(layer.colour, np.float32)
        lay(canvas, alpha, colour, unit=unit, shadow=_SHADOW if layer.shadow else 0.0)
    return np.rint(canvas).astype(np.uint8)


@functools.lru_cache(maxsize=16)
def occluder(
    kind: str, *, width: int, height: int
) -> tuple[Float[np.ndarray, "H W"], Float[np.ndarray, "H W 3"]]:
    """Coverage in [0, 1] and colour in [0, 255] of a wall or a rock in the middle of the view."""
    unit = min(width, height)
    w, h = width / unit, height / unit
    top = h - 0.47
    if kind == "wall":
        body = [_rectangle(w / 2 - 0.36, top, 0.72, 1.0)]
        seams = [_rectangle(w / 2 - 0.36, top + y, 0.72, 0.014) for y in (0.11, 0.23, 0.35)]
        seams += [
            _rectangle(w / 2 + x, top + y, 0.014, 0.12)
            for y, xs in (
                (0.0, (-0.2, 0.02, 0.22)),
                (0.11, (-0.1, 0.12)),
                (0.23, (-0.2, 0.02, 0.22)),
            )
            for x in xs
        ]
    else:
        outline = np.array(
            [
                [-0.44, 0.7],
                [-0.4, 0.16],
                [-0.32, 0.02],
                [-0.1, -0.02],
                [0.22, -0.01],
                [0.35, 0.06],
                [0.42, 0.26],
                [0.46, 0.7],
            ]
        )
        body = [outline + np.array([w / 2, top])]
        seams = [
            _rectangle(w / 2 + x, top + y, 0.1, 0.016)
            for x, y in ((-0.2, 0.14), (0.1, 0.22), (-0.1, 0.34))
        ]
    base, line = OCCLUDER_COLOURS[kind]
    shape = (height * SUPERSAMPLE, width * SUPERSAMPLE)
    mask, colour = np.zeros(shape, np.uint8), np.empty((*shape, 3), np.uint8)
    for points in body:
        fill(mask, points, value=255, scale=unit * SUPERSAMPLE)
    rim = cv2.erode(mask, np.ones((5, 5), np.uint8))
    colour[:] = PAPER
    colour[rim > 0] = base
    for points in seams:
        fill(colour, points, value=line, scale=unit * SUPERSAMPLE)
    return shrink(mask, height, width) / 255, shrink(colour, height, width)
