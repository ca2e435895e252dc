"""What moves in a clip and how, read from its pixels: paths, seams, cuts, arcs and collisions.

Lengths are parts of the frame's shorter side, speeds the same a frame. A ratio that has no end,
as of something that is lost from view, is `MOST`.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from sora_jax.data.paperworld import segment, vocab
from sora_jax.data.paperworld.segment import UNIT, Track

MOST = 10.0
REACH = 4  # frames on each side of a seam from which speed is told
_ARC = 5  # frames between two impacts without which a parabola says nothing
_SEEN = 0.2  # of the largest area; less is hidden
_MOVED = 1.0 / UNIT  # what a cut-out at rest never seems to move
_STRUCK = 2  # frames for which the one that struck still moves


class Path(NamedTuple):
    """Where the largest cut-out of each frame is, whatever its colour."""

    centre: Float[np.ndarray, "F 2"]  # of its ink, x right, y down; nan where none is seen
    area: Float[np.ndarray, " F"]  # of its ink


def tracks(video: UInt8[np.ndarray, "F H W 3"]) -> list[Track]:
    """The objects of a clip of one shot, in the place that most of its frames show."""
    video = segment.to_working_size(video)
    place = np.bincount(segment.classify_places(video)).argmax()
    return segment.find_tracks(video, tuple(vocab.PLACES)[place])


def subject_path(video: UInt8[np.ndarray, "F H W 3"]) -> Path:
    """The path of a clip's largest cut-out, which may change its colour on the way."""
    found = tracks(video)
    if not found:
        return Path(np.full((len(video), 2), np.nan), np.zeros(len(video)))
    areas = np.stack([track.area for track in found])
    largest, frames = areas.argmax(axis=0), np.arange(len(video))
    centres = np.stack([track.centre for track in found])[largest, frames]
    return Path(centres / UNIT, areas.max(axis=0) / UNIT**2)


def changes(video: UInt8[np.ndarray, "F H W 3"]) -> Float[np.ndarray, " G"]:
    """Mean absolute difference of each frame to the one before, in grey levels."""
    return np.abs(np.diff(video.astype(np.float32), axis=0)).mean(axis=(1, 2, 3))


def seams(known: Bool[np.ndarray, "F H W"]) -> list[int]:
    """Frames at which what is given goes over into what is made, or back."""
    whole = known.all(axis=(1, 2))
    return (np.flatnonzero(whole[1:] != whole[:-1]) + 1).tolist()


def seam_ratio(video: UInt8[np.ndarray, "F H W 3"], at: Sequence[int]) -> float:
    """How much more the picture changes into the frames `at` than it usually does: 1 is no seam.

    The change there over the median of all others; of several seams the worst. It says something
    where the motion is steady.
    """
    change, into = changes(video), np.asarray(at) - 1
    return _ratio(float(change[into].max()), float(np.median(np.delete(change, into))))


def _ratio(part: float, whole: float) -> float:
    """At most `MOST`; nothing is no part of nothing."""
    return float(min(part / whole, MOST)) if whole else MOST if part else 0.0


def velocity_jump(path: Path, at: int) -> float:
    """By which part of itself the sideways speed changes at frame `at`.

    The greater of two: from the `REACH` steps before to those after, and from their mean to the
    step over the seam, where a jump would be.
    """
    x = path.centre[at - 1 - REACH : at + 1 + REACH, 0]
    if len(x) < 2 * REACH + 2 or not np.isfinite(x).all():
        return MOST
    before, over, after = (x[REACH] - x[0]) / REACH, x[REACH + 1] - x[REACH], x[-1] - x[REACH + 1]
    after /= REACH
    jump = max(abs(after - before), abs(over - (before + after) / 2))
    return _ratio(float(jump), float(abs(before) + abs(after)) / 2)


def hidden(path: Path) -> tuple[int, int] | None:
    """First and last frame of the longest time out of sight, two frames or more, between sights."""
    seen = np.flatnonzero(path.area > _SEEN * path.area.max())
    gaps = np.diff(seen)
    if not len(gaps) or gaps.max() <= 2:
        return None
    longest = int(gaps.argmax())
    return int(seen[longest]) + 1, int(seen[longest + 1]) - 1


def way(path: Path) -> float:
    """Distance between the first and the last centre that are seen; `MOST` where none is."""
    centres = path.centre[np.isfinite(path.centre[:, 0])]
    return float(np.hypot(*(centres[-1] - centres[0]))) if len(centres) else MOST


def cut(video: UInt8[np.ndarray, "F H W 3"]) -> int:
    """The frame into which the picture changes most, where a cut is, if there is one."""
    return int(changes(video).argmax()) + 1


def arcs(y: Float[np.ndarray, " F"]) -> list[slice]:
    """Frames between impacts: those strictly between two lowest points.

    An impact falls between frames, so that the lowest frame belongs to the arc before or after it,
    and to neither here; nor does the last frame if it is still on its way down.
    """
    lowest = [k for k in range(1, len(y) - 1) if y[k] >= y[k - 1] and y[k] > y[k + 1]]
    ends = [*lowest, len(y) - int(len(y) > 1 and y[-1] > y[-2])]
    pairs = itertools.pairwise(ends)
    return [slice(a + 1, b) for a, b in pairs if b - a - 1 >= _ARC]


def parabola_fit(path: Path) -> float:
    """R^2 of a parabola in time through the height between impacts, the median of all arcs.

    Free fall leaves nothing unexplained: 1. A clip without an arc between two impacts has 0.
    """
    y = path.centre[:, 1]
    if not np.isfinite(y).all():
        return 0.0
    return float(np.median([_r2(y[arc]) for arc in arcs(y)] or [0.0]))


def _r2(y: np.ndarray) -> float:
    t = np.arange(len(y)) - (len(y) - 1) / 2
    left = y - np.polyval(np.polyfit(t, y, 2), t)
    spread = float(((y - y.mean()) ** 2).sum())
    return 1 - float((left**2).sum()) / spread if spread else 0.0


def momentum_change(
    video: UInt8[np.ndarray, "F H W 3"],
    colours: tuple[str, str],
    *,
    masses: tuple[float | int, float | int],
    drag: float | int,
) -> float | None:
    """By which part of itself momentum changes in a collision; None where none can be seen.

    Speeds are those next to the impact: `drag` (lengths a frame squared) is what the ground takes
    from cut-outs that slide on it, and is given back to them before a line is laid through their
    ways.

    Args:
      colours: of the one that strikes and the one that is struck.
    """
    found = {track.colour: track for track in tracks(video)}
    if not set(colours) <= set(found):
        return None
    striker, struck = (found[colour].centre[:, 0] / UNIT for colour in colours)
    if not (np.isfinite(striker).all() and np.isfinite(struck).all()):
        return None
    moved = np.abs(struck - struck[0]) > _MOVED
    after = int(moved.argmax())  # the first frame after the impact
    if not moved.any() or after < 3 or after > len(struck) - 2:
        return None
    impact = after - 0.5
    before = slice(max(0, after - 1 - REACH), after - 1)
    first = _speed(striker, before, at=impact, drag=drag)
    second = _speed(struck, slice(after, after + REACH), at=impact, drag=drag)
    # It comes to rest at once, and a line through more frames would miss that it still moved.
    rest = _speed(striker, slice(after, after + _STRUCK), at=impact, drag=0.0)
    if abs(first) < 1e-3:
        return None
    given, kept = masses[0] * first, masses[0] * rest + masses[1] * second
    return float(min(abs(kept - given) / abs(given), MOST))


def _speed(x: np.ndarray, frames: slice, *, at: float, drag: float | int) -> float:
    """Speed at the time `at` of what moves over `frames`, slowed by `drag`."""
    t = np.arange(len(x))[frames] - at
    x = x[frames]
    return float(np.polyfit(t, x + np.sign(x[-1] - x[0]) * drag * t**2 / 2, 1)[0])
