"""How the results of tasks are judged: what each has to show, and what is asked of it.

Where motion is uneven, frames differ unevenly in truth too: seams are looked for where it is steady
alone, and changes of speed where there is one.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sora_jax.data.paperworld import oracle, physics, vocab
from sora_jax.data.paperworld.scene import Scene
from sora_jax.evaluate import motion, scores
from sora_jax.evaluate.measures import Measure, Outcome
from sora_jax.evaluate.task_cases import Case, Clip, Made
from sora_jax.generate.canvas import Canvas

STEADY = ("rolls", "slides", "flies", "spins")  # every frame changes as much as another
DIRECTED = ("rolls", "slides", "flies")
SEAM = 1.2  # of the usual change from frame to frame
JUMP = 0.2  # of the speed
PARABOLA = 0.95
MOMENTUM = 0.25  # of itself, lost or won
RETURNED = 0.08  # of the frame's shorter side, from where it hid to where it comes out
_LAST = 3  # frames in which what came out of hiding is looked at
_PEAK_DB = 126.0  # of frames without a difference, as JSON has no infinity


class Judge(NamedTuple):
    """What is measured of a task's results; `outcome` has a value by the name of each measure."""

    measures: tuple[Measure, ...]
    outcome: Callable[[Case, Made], Outcome]


def _same_subject(clip: Clip, scene: Scene) -> bool:
    """Whether the first object of `clip` has the colour and the shape of the scene's subject."""
    right = oracle.score(oracle.read(clip), scene)
    return right["colour"] and right["shape"]


def _kept(canvas: Canvas, video: Clip) -> float:
    """PSNR in dB of the given pixels, in the frame where it is least."""
    error = (np.subtract(video, canvas.frames, dtype=np.float32) / 127.5) ** 2
    least = max(
        float(frame[known].mean())
        for frame, known in zip(error, canvas.known, strict=True)
        if known.any()
    )
    return min(_PEAK_DB, float(10 * np.log10(4 / max(least, 1e-12))))


def _moves(video: Clip, scene: Scene) -> bool:
    return oracle.score(oracle.read(video), scene)["verb"]


def _seams(case: Case, made: Made) -> Outcome:
    """Seams where the motion is steady: of what is shown, and of what was decoded."""
    if case.scene.subject.verb not in STEADY:
        return {"seam": None, "seam decoded": None, "seamless": None}
    at = motion.seams(case.canvas.known)
    shown = motion.seam_ratio(made.frames, at)
    decoded = motion.seam_ratio(made.decoded, at)
    return {"seam": shown, "seam decoded": decoded, "seamless": shown <= SEAM}


def _animate(case: Case, made: Made) -> Outcome:
    return {
        "kept": _kept(case.canvas, made.frames),
        "decoded": _kept(case.canvas, made.decoded),
        "subject": _same_subject(made.frames[-1:], case.scene),
        "motion": _moves(made.frames, case.scene),
    }


def _keyframes(case: Case, made: Made) -> Outcome:
    return {
        "met": _kept(case.canvas, made.frames),
        "decoded": _kept(case.canvas, made.decoded),
        "motion": _moves(made.frames, case.scene),
    } | _seams(case, made)


def _extend(case: Case, made: Made) -> Outcome:
    """The frame farthest from what is given tells whether the subject was kept."""
    (at,) = motion.seams(case.canvas.known)
    far = -1 if case.canvas.known[0].all() else 0
    jump = None
    if case.scene.subject.verb in DIRECTED:
        jump = motion.velocity_jump(motion.subject_path(made.frames), at)
    return _seams(case, made) | {
        "speed change": jump,
        "speed steady": None if jump is None else jump <= JUMP,
        "subject": _same_subject(made.frames[far:][:1], case.scene),
        "motion": _moves(made.frames, case.scene),
    }


def _bridge(case: Case, made: Made) -> Outcome:
    """The frame amid the gap tells whether the subject was kept."""
    begin, end = motion.seams(case.canvas.known)
    amid = made.frames[(begin + end) // 2 :][:1]
    return _seams(case, made) | {"subject": _same_subject(amid, case.scene)}


def _paint(case: Case, made: Made) -> Outcome:
    right = oracle.score(oracle.read(made.frames), case.scene)
    return {
        "latents": made.exact,
        "kept": _kept(case.canvas, made.frames),
        "decoded": _kept(case.canvas, made.decoded),
        "prompt": all(right[word] for word in scores.ATTRIBUTES),
    } | {word: right[word] for word in scores.ATTRIBUTES}


def _permanence(case: Case, made: Made) -> Outcome:
    path = motion.subject_path(made.frames)
    wall = oracle.read(made.frames).occluder
    hides = motion.hidden(path) is not None and wall == case.scene.shots[0].occluder
    return {
        "hides": hides,
        "subject": hides and _same_subject(made.frames[-_LAST:], case.scene),
        "place": hides and motion.way(path) <= RETURNED,
    }


def _shots(case: Case, made: Made) -> Outcome:
    readings = oracle.read_shots(made.frames)
    right = oracle.score(readings[-1], case.scene, shot=1)
    late = motion.cut(made.frames) - case.scene.shots[0].frames
    return {
        "subject": right["colour"] and right["shape"],
        "place": right["place"],
        "cut": len(readings) == 2 and abs(late) <= 1,
        "motion": right["verb"],
    }


def _bounce(case: Case, made: Made) -> Outcome:
    fit = motion.parabola_fit(motion.subject_path(made.frames))
    return {
        "parabola": fit,
        "parabolic": fit >= PARABOLA,
        "motion": _moves(made.frames, case.scene),
    }


def _collision(case: Case, made: Made) -> Outcome:
    """Momentum of whichever of the two strikes, and whichever way.

    That it is the one that was asked is `roles`; that it goes the way that was asked, `motion`.
    """
    shot = case.scene.shots[0]
    frame = shot.rate / case.scene.fps  # seconds of the action
    for actors in (shot.actors, shot.actors[::-1]):
        change = motion.momentum_change(
            made.frames,
            tuple(actor.colour for actor in actors),
            masses=tuple(vocab.SIZES[actor.size] ** 2 for actor in actors),
            drag=physics.DRAG * physics.GRAVITY * frame**2,
        )
        if change is not None:
            break
    return {
        "momentum": change is not None and change <= MOMENTUM,
        "momentum change": change,
        "roles": change is not None and actors is shot.actors,
        "motion": _moves(made.frames, case.scene),
    }


_DECODED = Measure("decoded", "median", unit="dB")
_SEAM = Measure("seam", "median", SEAM, at_most=True)
_SEAMS = (_SEAM, Measure("seamless"), Measure("seam decoded", "median"))

ANIMATE = Judge(
    (
        Measure("kept", "least", 35.0, unit="dB"),
        _DECODED,
        Measure("subject", target=0.97),
        Measure("motion", target=0.93),
    ),
    _animate,
)
KEYFRAMES = Judge(
    (
        Measure("met", "least", 33.0, unit="dB"),
        _DECODED,
        Measure("motion"),
        dataclasses.replace(_SEAM, target=None),
        *_SEAMS[1:],
    ),
    _keyframes,
)
EXTEND = Judge(
    (
        *_SEAMS,
        Measure("speed change", "median", JUMP, at_most=True),
        Measure("speed steady"),
        Measure("subject", target=0.97),
        Measure("motion"),
    ),
    _extend,
)
BRIDGE = Judge((*_SEAMS, Measure("subject")), _bridge)
PAINT = Judge(
    (
        Measure("latents", target=1.0),
        Measure("kept", "least", 35.0, unit="dB"),
        _DECODED,
        Measure("prompt", target=0.93),
        *(Measure(word) for word in scores.ATTRIBUTES),
    ),
    _paint,
)
PERMANENCE = Judge(
    (Measure("hides"), Measure("subject", target=0.95), Measure("place", target=0.9)), _permanence
)
SHOTS = Judge(
    (
        Measure("subject", target=0.95),
        Measure("place", target=0.95),
        Measure("cut", target=0.95),
        Measure("motion"),
    ),
    _shots,
)
BOUNCE = Judge(
    (Measure("parabola", "median", PARABOLA, unit="R2"), Measure("parabolic"), Measure("motion")),
    _bounce,
)
COLLISION = Judge(
    (
        Measure("momentum", target=0.8),
        Measure("momentum change", "median"),
        Measure("roles"),
        Measure("motion"),
    ),
    _collision,
)
