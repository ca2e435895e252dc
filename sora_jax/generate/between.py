"""Frames between frames: what moves from one to the next, part of the way.

Both are warped to the time between along the optical flow from each to the other, and blended
(Jiang et al. 2018, arXiv:1712.00080, Eq. 2 and 4; the flow is that of Kroeger et al. 2016,
arXiv:1603.03590). Where nothing moves from one into the other, as at a cut, the nearer one stays.
"""

import itertools

import numpy as np
from jaxtyping import Float, UInt8

_FLOW_SIDE = 256  # pixels to which a shorter side is enlarged to read flow: patches are of 8
_CUT = 12.0  # of 255: frames that differ by as much once they are warped, and by half of what
_SHARE = 0.5  # they did before, are of two shots

Picture = UInt8[np.ndarray, "H W 3"]


def between(clip: UInt8[np.ndarray, "F H W 3"], times: int) -> UInt8[np.ndarray, "G H W 3"]:
    """`clip` at `times` its frame rate, its own frames among them: G = (F - 1) times + 1."""
    frames = [clip[0]]
    for first, last in itertools.pairwise(clip):
        frames += [*_part_of_the_way(first, last, times), last]
    return np.stack(frames)


def _part_of_the_way(first: Picture, last: Picture, times: int) -> list[Picture]:
    shares = np.arange(1, times) / times
    if np.array_equal(first, last):
        return [first for _ in shares]
    there, back = _flow(first, last), _flow(last, first)
    made = []
    for s in shares:
        from_first = _warp(first, s * s * back - (1 - s) * s * there)
        from_last = _warp(last, (1 - s) ** 2 * there - s * (1 - s) * back)
        if _difference(from_first, from_last) > max(_CUT, _SHARE * _difference(first, last)):
            made.append(first if s < 0.5 else last)
            continue
        blend = (1 - s) * from_first.astype(np.float32) + s * from_last
        made.append(np.clip(np.rint(blend), 0, 255).astype(np.uint8))
    return made


def _flow(first: Picture, last: Picture) -> Float[np.ndarray, "H W 2"]:
    """How far, in pixels (x, y), what is in `first` lies from there in `last`."""
    import cv2

    height, width = first.shape[:2]
    scale = max(1.0, _FLOW_SIDE / min(height, width))
    size = round(width * scale), round(height * scale)
    grey = [
        cv2.cvtColor(cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC), cv2.COLOR_RGB2GRAY)
        for frame in (first, last)
    ]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)
    return cv2.resize(flow, (width, height), interpolation=cv2.INTER_AREA) / scale


def _warp(frame: Picture, flow: Float[np.ndarray, "H W 2"]) -> Picture:
    """At each pixel what `frame` has `flow` away from it."""
    import cv2

    rows, columns = np.indices(frame.shape[:2], np.float32)
    x, y = (columns + flow[..., 0]).astype(np.float32), (rows + flow[..., 1]).astype(np.float32)
    return cv2.remap(frame, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)


def _difference(a: Picture, b: Picture) -> float:
    return float(np.mean(np.abs(a.astype(np.float32) - b)))
