"""Masks of tasks, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import tasks
from sora_jax.diffusion.tasks import MASKS, TaskMixture
from sora_jax.dit import patchify

GRID = (9, 4, 5)
MANY = 400


def masks_of(name: str, grid=GRID, count: int = MANY) -> np.ndarray:
    """`count` draws of one mask, as booleans (count, f, h, w)."""
    draws = tasks.draw(jax.random.key(0), (count,), TaskMixture({name: 1.0}))
    places = patchify.positions(*grid)
    n = len(places)
    of_token = jax.tree.map(lambda x: jnp.repeat(x[:, None], n, axis=1), draws)
    given = tasks.given(
        of_token,
        jnp.broadcast_to(places, (count, n, 3)),
        jnp.broadcast_to(jnp.array(grid), (count, n, 3)),
        u_token=jax.random.uniform(jax.random.key(1), (count, n)),
    )
    return np.asarray(given).reshape(count, *grid)


def frames_of(name: str) -> np.ndarray:
    """Which frames are given, of a mask that is whole in space."""
    mask = masks_of(name)
    assert (mask == mask[:, :, :1, :1]).all()
    return mask[:, :, 0, 0]


def test_none_gives_nothing_and_first_the_first_frame_alone():
    assert not masks_of("none").any()
    first = frames_of("first")
    assert first[:, 0].all() and not first[:, 1:].any()
    both = frames_of("first_last")
    assert both[:, [0, -1]].all() and not both[:, 1:-1].any()


@pytest.mark.parametrize(("name", "step"), [("prefix", 1), ("suffix", -1)])
def test_ends_have_every_length_but_all_and_none(name, step):
    frames = frames_of(name)[:, ::step]
    counts = frames.sum(axis=1)
    assert set(counts) == set(range(1, GRID[0]))
    assert all(row[:count].all() for row, count in zip(frames, counts, strict=True))


def test_middle_leaves_one_gap_between_two_given_ends():
    frames = frames_of("middle")
    assert frames[:, [0, -1]].all()
    gaps = np.abs(np.diff(frames.astype(int), axis=1)).sum(axis=1)
    assert (gaps == 2).all()
    assert set((~frames).sum(axis=1)) == set(range(1, GRID[0] - 1))


def test_loop_gives_motion_at_both_ends():
    frames = frames_of("loop")
    assert (frames == [True, True, *[False] * 5, True, True]).all()


def test_keyframes_are_one_to_four_anywhere():
    frames = frames_of("keyframes")
    assert set(frames.sum(axis=1)) == {1, 2, 3, 4}
    assert frames.any(axis=0).all()


@pytest.mark.parametrize("name", ["box", "border"])
def test_boxes_are_rectangles_through_all_frames(name):
    given = masks_of(name)
    assert (given == given[:, :1]).all()
    inside = given[:, 0] if name == "border" else ~given[:, 0]
    rows, columns = inside.any(axis=2), inside.any(axis=1)
    assert (inside == rows[:, :, None] & columns[:, None, :]).all()
    assert set(rows.sum(axis=1)) == {1, 2, 3} and set(columns.sum(axis=1)) == {1, 2, 3, 4}
    for axis in (rows, columns):  # runs without a hole, everywhere
        assert (
            np.abs(np.diff(np.pad(axis, ((0, 0), (1, 1))).astype(int), axis=1)).sum(1) == 2
        ).all()
        assert axis.any(axis=0).all()


def test_tokens_are_given_at_every_rate():
    share = masks_of("tokens").mean(axis=(1, 2, 3))
    counts, _ = np.histogram(share, bins=4, range=(0, 1))
    assert (counts > MANY / 8).all()


@pytest.mark.parametrize("name", MASKS)
def test_an_image_has_no_mask_in_time(name):
    given = masks_of(name, grid=(1, 4, 4))
    assert given.any() == (name in ("box", "border", "tokens"))
    if name != "tokens":
        assert not given.all(axis=(1, 2, 3)).any(), "something must be left to learn"


def test_shares_follow_the_weights():
    mixture = TaskMixture({"none": 3, "box": 1}, given_noise=0.2, frame_noise=0.25)
    draws = tasks.draw(jax.random.key(0), (4000,), mixture)
    counts = np.bincount(draws.mask, minlength=len(MASKS)) / 4000
    assert abs(counts[0] - 0.75) < 0.03 and abs(counts[MASKS.index("box")] - 0.25) < 0.03
    assert counts.sum() == counts[0] + counts[MASKS.index("box")]
    assert abs(float(draws.by_frame.mean()) - 0.25) < 0.03
    noised = np.asarray(draws.t_given)
    assert noised.max() < 0.2 and abs((noised > 0).mean() - 0.5) < 0.03
    assert mixture.trained == ("none", "box") and not mixture.is_plain
    assert TaskMixture().is_plain and not TaskMixture({"none": 1}, frame_noise=0.1).is_plain
    assert mixture.recorded == ("none", "box", "frame_times")
    assert TaskMixture().recorded == ("none",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": {"sufix": 1}}, "did you mean 'suffix'"),
        ({"weights": {"none": -1}}, "below 0"),
        ({"weights": {"none": 0}}, "all 0"),
        ({"given_noise": 1.0}, "given_noise 1.0"),
        ({"frame_noise": 1.5}, "frame_noise 1.5"),
    ],
)
def test_bad_mixtures_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TaskMixture(**values)
