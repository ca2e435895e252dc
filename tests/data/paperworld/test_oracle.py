"""The oracle reads rendered clips back, and does not read what is not there."""

import collections

import cv2
import numpy as np
import pytest

from sora_jax.data.paperworld import oracle, vocab
from sora_jax.data.paperworld.places import background
from sora_jax.data.paperworld.render import render
from sora_jax.data.paperworld.scene import sample_scene
from sora_jax.data.paperworld.settings import PaperworldSettings

ATTRIBUTES = ("colour", "shape", "size", "verb", "place", "number")


def blur_and_noise(video, rng):
    """About what a VAE of 30 dB leaves of a clip."""
    soft = np.stack([cv2.GaussianBlur(frame, (0, 0), 0.7) for frame in video])
    noisy = np.rint(soft + rng.normal(0, 6, soft.shape))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def accuracy(count, *, split="train", degrade=False, seed=21, **changes):
    """Part of the shots whose attributes were read rightly, by attribute."""
    settings = PaperworldSettings(**changes)
    rng = np.random.default_rng(0)
    right, shots = collections.Counter(), 0
    for i in range(count):
        scene = sample_scene(seed, i, split=split, settings=settings)
        video = render(scene)
        video = blur_and_noise(video, rng) if degrade else video
        readings = oracle.read_shots(video)
        assert len(readings) == len(scene.shots)
        for shot, reading in enumerate(readings):
            shots += 1
            right.update(oracle.score(reading, scene, shot=shot))
    return {name: right[name] / shots for name in ATTRIBUTES}


@pytest.mark.parametrize("split", ["seen", "heldout"])
@pytest.mark.parametrize("degrade", [False, True], ids=["clean", "blurred and noisy"])
def test_every_attribute_of_an_evaluation_clip_is_read(split, degrade):
    found = accuracy(128 if degrade else 160, split=split, degrade=degrade)
    assert min(found.values()) >= 0.99, found


def test_every_attribute_of_the_training_world_is_read():
    found = accuracy(260)
    assert min(found.values()) >= 0.99, found


@pytest.mark.parametrize(
    "changes",
    [
        {"multi_shot": 1.0, "collisions": 0.0, "companions": 0.0},
        {"multi_shot": 1.0, "collisions": 0.0, "companions": 0.0, "frames": 33},
        {"multi_shot": 0.0, "collisions": 1.0, "companions": 0.0},
        {"multi_shot": 0.0, "collisions": 0.0, "companions": 1.0},
        {"moving_camera": 0.5},
        {"frames": 1},
        {"frames": 9},
        {"width": 96},
        {"height": 96},
        {"width": 128, "height": 128},
    ],
    ids=str,
)
def test_other_kinds_of_clips_are_read(changes):
    found = accuracy(24, **changes)
    assert min(found.values()) >= 0.95, found


def test_both_objects_of_a_pair_are_named():
    settings = PaperworldSettings(multi_shot=0.0, collisions=1.0, companions=0.0)
    for i in range(10):
        scene = sample_scene(2, i, settings=settings)
        other = scene.shots[0].actors[1]
        reading = oracle.read(render(scene))
        assert (reading.other_colour, reading.other_shape) == (other.colour, other.shape)


@pytest.mark.parametrize("place", vocab.PLACES)
def test_an_empty_place_has_no_subject(place):
    for layout in (0.0, 0.4, 0.9):
        frame = background(place, layout, width=64, height=64)
        reading = oracle.read(np.repeat(frame[None], 17, axis=0))
        assert reading == oracle.Reading(None, None, None, None, None, place, 0)


def test_playing_backwards_turns_left_into_right_and_a_fall_into_none():
    mirrored = {"left": "right", "right": "left"}
    seen = set()
    for i in range(48):
        scene = sample_scene(0, i, split="seen")
        subject = scene.subject
        reading = oracle.read(render(scene)[::-1].copy())
        if subject.verb in ("slides", "flies"):
            assert reading.direction == mirrored[subject.direction]
            seen.add(subject.verb)
        if subject.verb == "falls":
            assert reading.verb != "falls"
            seen.add(subject.verb)
    assert seen == {"slides", "flies", "falls"}


def test_a_frozen_clip_stays():
    for i in range(16):
        scene = sample_scene(1, i, split="seen")
        if scene.subject.verb in ("slides", "flies", "falls", "bounces", "hides"):
            first = render(scene)[:1]
            assert oracle.read(np.repeat(first, 17, axis=0)).verb == "stays"


def test_score_wants_the_direction_with_the_verb():
    scene = next(
        s
        for s in (sample_scene(0, i, split="seen") for i in range(20))
        if s.subject.verb == "slides"
    )
    reading = oracle.read(render(scene))
    assert oracle.score(reading, scene)["verb"]
    flipped = oracle.read(render(scene)[:, :, ::-1].copy())
    assert flipped.verb == "slides" and not oracle.score(flipped, scene)["verb"]
