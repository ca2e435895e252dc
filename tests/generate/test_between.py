"""Frames between show what moves part of the way, and never a mixture of two shots."""

import dataclasses
import itertools

import numpy as np
import pytest

from sora_jax.data.paperworld.render import render
from sora_jax.data.paperworld.source import seen_prompts
from sora_jax.evaluate.paperworld import psnr
from sora_jax.generate.between import between


def scenes(verb):
    return [p.scene for p in seen_prompts(40, seed=7) if p.scene.subject.verb == verb]


def at_times_the_rate(scene, times):
    shots = tuple(dataclasses.replace(s, frames=times * (s.frames - 1) + 1) for s in scene.shots)
    return render(dataclasses.replace(scene, fps=times * scene.fps, shots=shots))


@pytest.mark.parametrize(
    "times, verb, more", [(2, "rolls", 8.0), (3, "slides", 8.0), (2, "spins", 1.0)]
)
def test_what_moves_is_where_it_is_in_true_renderings(times, verb, more):
    scene = scenes(verb)[0]
    clip, truth = render(scene), at_times_the_rate(scene, times)
    np.testing.assert_array_equal(truth[::times], clip)
    made = between(clip, times)
    np.testing.assert_array_equal(made[::times], clip)
    share = np.arange(len(made))[:, None, None, None] % times / times
    first = np.repeat(clip, times, axis=0)[: len(made)]
    last = np.concatenate([np.repeat(clip[1:], times, axis=0), clip[-1:]])
    blended = np.rint((1 - share) * first + share * last).astype(np.uint8)
    ours, mixed = (psnr(v[1::times, None], truth[1::times, None]) for v in (made, blended))
    assert np.median(ours) > np.median(mixed) + more


def test_what_stays_is_the_same():
    clip = np.repeat(render(scenes("stays")[0])[:1], 3, axis=0)
    np.testing.assert_array_equal(between(clip, 2), np.repeat(clip[:1], 5, axis=0))
    np.testing.assert_array_equal(between(clip[:1], 2), clip[:1])


def test_at_a_cut_the_nearer_frame_stays():
    clip = np.stack([render(scenes(verb)[0])[-1] for verb in ("rolls", "flies", "hides")])
    made = between(clip, 4)
    for begin, (first, last) in zip((0, 4), itertools.pairwise(clip), strict=True):
        wanted = [first, first, last, last]  # at 0, 1/4, 1/2 and 3/4 of the way
        np.testing.assert_array_equal(made[begin : begin + 4], wanted)


def test_any_size_has_frames_between():
    rng = np.random.default_rng(0)
    for shape in ((8, 8), (6, 200), (600, 20)):
        clip = np.sort(rng.integers(0, 256, (2, *shape, 3), dtype=np.uint8), axis=1)
        made = between(clip, 2)
        assert made.shape == (3, *shape, 3)
        np.testing.assert_array_equal(made[::2], clip)
