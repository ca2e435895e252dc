"""Reads back from pixels what a clip shows: colour, shape, verb, direction, place, number.

Plain image analysis and no learning, so that it can judge a learned model: a place is the landscape
that fits best; a subject is the pixels of an ink; its shape is the best-fitting drawn silhouette;
its verb follows from its path, its rotation and its disappearance. A verb is read only where the
subject is in sight to the end, and nearly all the time unless it hides; it hides where there is a
wall or a rock to hide behind. What is not in sight so is not counted either.
"""

import dataclasses
import itertools

import numpy as np
from jaxtyping import UInt8

from sora_jax.data.paperworld import segment, templates, vocab
from sora_jax.data.paperworld.scene import GROUND, WALL, Scene
from sora_jax.data.paperworld.segment import UNIT, Track

_TRAVEL = 0.34  # of the frame's width; less is a camera's pan
_TRAVEL_FRAMES = 10  # frame steps in which that is reached; shorter shots show a part
_TURN = 0.035  # by how much correlation must improve to call a cut-out turned
_SHORTEST_SHOT = 3  # frames; a shorter change of place is noise
_GONE = 2  # frames out of sight; fewer are noise
_ABSENT = 0.2  # part of a shot out of sight, as above the view of a camera that zooms out
_RISE = 0.22  # of the shorter side; less is the wobble of a spin under a zoom
_BRIM = 0.1  # of the shorter side, by which one that hides is above its hiding place at last


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one shot shows; None where it cannot be told. Words are those of `vocab`.

    Attributes:
      occluder: what stands there to hide behind.
      shots: of the whole clip.
    """

    colour: str | None
    shape: str | None
    size: str | None
    verb: str | None
    direction: str | None
    place: str
    number: int
    other_colour: str | None = None
    other_shape: str | None = None
    occluder: str | None = None
    shots: int = 1


def _cuts(labels: np.ndarray) -> list[tuple[int, int]]:
    """Runs of one place as (begin, end); runs too short are joined to the one before."""
    edges = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
    runs: list[tuple[int, int]] = []
    for begin, end in itertools.pairwise(edges):
        same = bool(runs) and labels[runs[-1][0]] == labels[begin]
        if runs and (end - begin < _SHORTEST_SHOT or same):
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((begin, end))
    return runs


def _sights(track: Track) -> np.ndarray:
    """Frames in which the object is seen."""
    return np.flatnonzero(track.area > 0.2 * track.area.max())


def _is_lost(track: Track) -> bool:
    """Whether it is gone at the end of the shot."""
    return len(track.area) - 1 - int(_sights(track)[-1]) >= _GONE


def _vanishes(track: Track) -> bool:
    """Seen, then gone for a while, then seen again."""
    return int(np.diff(_sights(track)).max(initial=0)) > _GONE


def _is_behind(track: Track) -> bool:
    """Whether it goes out of sight at the upper edge of what stands in the middle of the view."""
    seen = _sights(track)
    last = seen[int(np.diff(seen).argmax())]
    height, width = track.mask.shape[1:]
    top = height - (WALL + _BRIM) * UNIT
    aside = abs(float(track.centre[last, 0]) - width / 2)
    return float(track.low[last]) > top and aside < WALL * UNIT


def _is_there(track: Track, occluder: str | None) -> bool:
    """Whether it is in sight to the end and nearly all the time, or hides behind `occluder`."""
    if _is_lost(track):
        return False
    if _vanishes(track):
        return occluder is not None and _is_behind(track)
    return len(_sights(track)) >= (1 - _ABSENT) * len(track.area)


def _displacement(track: Track) -> float:
    """Signed horizontal way from the first to the last sight, as part of the frame's width."""
    x = track.centre[track.area > 0.25 * track.area.max(), 0]
    return float((x[-1] - x[0]) / track.mask.shape[2]) if len(x) > 1 else 0.0


def _vertical(track: Track) -> tuple[float, float]:
    """Ways down and up in units of the shorter side, each summed over runs in one direction."""
    y = track.centre[track.area > 0.5 * track.area.max(), 1] / UNIT
    steps = np.diff(y)
    steps = np.where(np.abs(steps) < 0.012, 0.0, steps)
    return float(steps[steps > 0].sum()), float(-steps[steps < 0].sum())


def _solo_verb(
    track: Track, *, turned: bool, occluder: str | None
) -> tuple[str | None, str | None]:
    """Verb and direction; no verb of one that is lost, vanishes before nothing, or rises."""
    if not _is_there(track, occluder):
        return None, None
    if _vanishes(track):
        return "hides", None
    way = _displacement(track)
    if abs(way) > _TRAVEL * min(1.0, (len(track.area) - 1) / _TRAVEL_FRAMES):
        side = "right" if way > 0 else "left"
        if turned:
            return "rolls", side
        floor = track.mask.shape[1] - GROUND * UNIT
        aloft = float(np.nanmedian(track.low)) < floor - 0.09 * UNIT
        return ("flies" if aloft else "slides"), side
    down, up = _vertical(track)
    if down > 0.15 and up > 0.12:
        return "bounces", None
    if down > 0.15:
        return "falls", None
    if up - down > _RISE:
        return None, None
    return ("spins" if turned else "stays"), None


def _collision(tracks: list[Track]) -> tuple[int, str] | None:
    """Which of two objects ran into the other, and in which direction; None without contact."""
    if any(_is_lost(t) or _vanishes(t) for t in tracks):
        return None
    ways = [_displacement(t) for t in tracks]
    if min(abs(w) for w in ways) < 0.08 or ways[0] * ways[1] < 0:
        return None
    starts = []
    for track in tracks:
        x = track.centre[:, 0]
        moved = np.abs(x - x[np.isfinite(x)][0]) > 0.04 * UNIT
        starts.append(int(moved.argmax()))
    if starts[0] == starts[1]:
        return None
    first = int(np.argmin(starts))
    return first, "right" if ways[first] > 0 else "left"


def _shape(track: Track) -> tuple[str, bool]:
    """The silhouette, and whether it is seen turned."""
    fit = templates.match(track)
    turned = float(fit.turned.max() - fit.upright.max()) > _TURN
    return vocab.SHAPES[int((fit.turned if turned else fit.upright).argmax())], turned


def _size(track: Track, shape: str) -> str:
    frames = np.flatnonzero(track.whole) if track.whole.any() else templates.usable_frames(track)
    # A zoom only enlarges, so the smaller end tells the size; both ends are out of hiding.
    area = float(min(track.area[frames[:2]].mean(), track.area[frames[-2:]].mean()))
    names = list(vocab.SIZES)
    ratios = [abs(np.log(area / templates.ink_area(shape, size))) for size in names]
    return names[int(np.argmin(ratios))]


def _read_shot(video: np.ndarray, place: str) -> Reading:
    tracks = segment.find_tracks(video, place)[:2]
    occluder = segment.find_occluder(video)
    if not tracks:
        return Reading(None, None, None, None, None, place, 0, occluder=occluder)
    shapes = [_shape(t) for t in tracks]
    subject, hit = 0, None
    if len(tracks) == 2:
        hit = _collision(tracks)
        verbs = [
            _solo_verb(t, turned=s[1], occluder=occluder)[0]
            for t, s in zip(tracks, shapes, strict=True)
        ]
        subject = hit[0] if hit else int(verbs[0] == "stays" and verbs[1] not in ("stays", None))
    track, (shape, turned) = tracks[subject], shapes[subject]
    if len(video) == 1:
        verb, direction = None, None
    elif hit is not None:
        verb, direction = "collides", hit[1]
    else:
        verb, direction = _solo_verb(track, turned=turned, occluder=occluder)
    other = 1 - subject if len(tracks) == 2 else None
    return Reading(
        colour=track.colour,
        shape=shape,
        size=_size(track, shape),
        verb=verb,
        direction=direction,
        place=place,
        number=sum(_is_there(t, occluder) for t in tracks),
        other_colour=None if other is None else tracks[other].colour,
        other_shape=None if other is None else shapes[other][0],
        occluder=occluder,
    )


def read_shots(video: UInt8[np.ndarray, "F H W 3"]) -> tuple[Reading, ...]:
    """What each shot of a clip shows; a cut is a lasting change of place."""
    video = segment.to_working_size(video)
    labels = segment.classify_places(video)
    names = tuple(vocab.PLACES)
    readings = []
    for begin, end in _cuts(labels):
        place = names[int(np.bincount(labels[begin:end]).argmax())]
        readings.append(_read_shot(video[begin:end], place))
    return tuple(dataclasses.replace(reading, shots=len(readings)) for reading in readings)


def read(video: UInt8[np.ndarray, "F H W 3"]) -> Reading:
    """What the first shot of a clip shows."""
    return read_shots(video)[0]


def score(reading: Reading, scene: Scene, *, shot: int = 0) -> dict[str, bool]:
    """Which attributes of a scene's shot were read.

    A verb counts only with its direction, or behind what it hides, and where the clip has as many
    shots as the scene. Of two that both stay still, or in an image, either may be taken for the
    subject.
    """
    expected = scene.shots[shot]
    subject, *others = expected.actors
    alike = subject.verb == "stays" or scene.frames == 1
    if others and alike and reading.colour == others[0].colour:
        subject = others[0]
    verb = reading.verb == subject.verb and reading.direction == subject.direction
    if subject.verb == "hides":
        verb = verb and reading.occluder == expected.occluder
    verb = verb and reading.shots == len(scene.shots)
    return {
        "colour": reading.colour == subject.colour,
        "shape": reading.shape == subject.shape,
        "size": reading.size == subject.size,
        "verb": verb or scene.frames == 1,
        "place": reading.place == expected.place,
        "number": reading.number == len(expected.actors),
    }
