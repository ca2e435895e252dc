"""The cases of tasks: their scenes, and what is given of the true renderings.

What is given is an array that spreads over frames, rows and columns. Clips are cut where a VAE with
`step` frames in a latent frame can cut them.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from sora_jax.data.paperworld import physics, places
from sora_jax.data.paperworld.render import render
from sora_jax.data.paperworld.scene import Scene, sample_scene
from sora_jax.data.paperworld.settings import PaperworldSettings
from sora_jax.generate.canvas import Canvas

Clip = UInt8[np.ndarray, "F H W 3"]

OTHER_WORLD = 1_000_003  # added to the seed of the kinds of scenes that only training has
_VISIBLE = 4  # grey levels


class Case(NamedTuple):
    """A sentence, what it shows in truth, and the part of that which is given, if any."""

    prompt: str
    scene: Scene
    truth: Clip
    canvas: Canvas | None


class Made(NamedTuple):
    """What was made of a case.

    `decoded` are the frames before given pixels took their places, as the model and its VAE show
    them. `exact` says whether the given tokens are what they were; None where there are none.
    """

    frames: Clip
    decoded: Clip
    exact: bool | None = None


# The endless scenes of a task, from the world's settings and a seed.
Scenes = Callable[[PaperworldSettings, int], Iterator[Scene]]


def scenes(
    *splits: str, keep: Callable[[Scene], bool] = lambda scene: True, **shares: float
) -> Scenes:
    """Scenes of `splits` in turn that are to be kept, of a world with those shares of kinds."""

    def stream(settings: PaperworldSettings, seed: int) -> Iterator[Scene]:
        world = dataclasses.replace(settings, **shares)
        for index, split in ((i, s) for i in itertools.count() for s in splits):
            first = seed + (OTHER_WORLD if split == "train" else 0)
            scene = sample_scene(first, index, split=split, settings=world)
            if keep(scene):
                yield scene

    return stream


def of_verbs(*verbs: str) -> Callable[[Scene], bool]:
    """Keeps scenes whose subject does one of `verbs`."""
    return lambda scene: scene.subject.verb in verbs


def first(scene: Scene, truth: Clip, step: int) -> Bool[np.ndarray, "F 1 1"]:
    """The first frame."""
    return _spread(np.arange(len(truth)) == 0)


def keyframes(scene: Scene, truth: Clip, step: int) -> Bool[np.ndarray, "F 1 1"]:
    """The first, the middle and the last frame."""
    last = len(truth) - 1
    return _spread(np.isin(np.arange(len(truth)), (0, last // 2, last)))


def beginning(scene: Scene, truth: Clip, step: int) -> Bool[np.ndarray, "F 1 1"]:
    """The first half, of 17 frames 9."""
    return _spread(np.arange(len(truth)) < _whole((len(truth) + 1) // 2, step))


def end(scene: Scene, truth: Clip, step: int) -> Bool[np.ndarray, "F 1 1"]:
    """The last half, of 17 frames 8."""
    return _spread(np.arange(len(truth)) >= len(truth) - len(truth) // 2 // step * step)


def before_cut(scene: Scene, truth: Clip, step: int) -> Bool[np.ndarray, "F 1 1"]:
    """The first shot but for what shares a latent frame with the second."""
    return _spread(np.arange(len(truth)) < _whole(scene.shots[0].frames - 1, step))


def ends(scene: Scene, truth: Clip, step: int) -> Bool[np.ndarray, "F 1 1"]:
    """All but a gap of half the frames, of 17 frames 5 and 4."""
    before, gap = _gap(len(truth), step)
    at = np.arange(len(truth))
    return _spread((at < before) | (at >= before + gap))


def around_subject(scene: Scene, truth: Clip, step: int) -> Bool[np.ndarray, "1 H W"]:
    """All but a box that covers the subject's whole way."""
    shot, (height, width) = scene.shots[0], truth.shape[1:3]
    back = places.background(shot.place, shot.layout, width=width, height=height)
    covered = np.abs(truth.astype(np.int16) - back).max(axis=(0, 3)) > _VISIBLE
    known = np.ones((1, height, width), bool)
    known[:, _span(covered.any(axis=1)), _span(covered.any(axis=0))] = False
    return known


def middle(scene: Scene, truth: Clip, step: int) -> Bool[np.ndarray, "1 H W"]:
    """The middle of the picture, half as high and half as wide."""
    height, width = truth.shape[1:3]
    known = np.zeros((1, height, width), bool)
    known[:, height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    return known


def once_more(scene: Scene, step: int) -> Clip:
    """The end of a spin, what leads back to its beginning, and that beginning.

    It turns at such a rate that a gap after its last frame it is as it was in its first.
    """
    shot, actor = scene.shots[0], scene.subject
    before, gap = _gap(shot.frames, step)
    angle = physics.trajectories(scene)[0][0].angle
    turns = (angle[-1] - angle[0]) / (shot.frames - 1) * (shot.frames + gap) / (2 * np.pi)
    actor = dataclasses.replace(actor, tempo=actor.tempo * max(1, round(turns)) / turns)
    longer = dataclasses.replace(shot, actors=(actor,), frames=shot.frames + gap)
    clip = render(dataclasses.replace(scene, shots=(longer,), frames=longer.frames))
    return np.concatenate([clip[shot.frames - before :], clip[: shot.frames - gap - before]])


def _spread(known: np.ndarray) -> np.ndarray:
    return known[:, None, None]


def _whole(frames: int, step: int) -> int:
    """The longest beginning of `frames` frames that the VAE takes."""
    return 1 + (frames - 1) // step * step


def _gap(frames: int, step: int) -> tuple[int, int]:
    """Frames before a gap of half the frames, and frames of it."""
    gap = frames // 2 // step * step
    return _whole((frames - gap + 1) // 2, step), gap


def _span(marked: np.ndarray) -> slice:
    """From the first to the last that is marked, and one more on each side."""
    found = np.flatnonzero(marked)
    return slice(max(0, found[0] - 1), found[-1] + 2)
