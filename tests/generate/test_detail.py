"""Detail that the VAE loses is carried from given frames to where nothing moves."""

import numpy as np
import pytest

from sora_jax.generate import canvas as canvas_of
from sora_jax.generate import detail

BASE = np.full((24, 24, 3), 120, np.uint8)


@pytest.fixture
def video():
    """(given frame with fine dots, decoded frames without them, a square in the last of these)."""
    given = BASE.copy()
    given[::4, ::4] += 8
    decoded = np.stack([BASE] * 3)
    decoded[2, 8:16, 8:16] = 250
    return given, decoded


def finished(given, decoded):
    canvas = canvas_of.blank(3, 24, 24)
    canvas_of.place(canvas, given[None], at=0)
    return detail.finish(canvas, decoded)


def test_a_still_place_keeps_its_detail_and_a_moving_one_does_not(video):
    given, decoded = video
    made = finished(given, decoded)
    np.testing.assert_array_equal(made[0], given)
    np.testing.assert_array_equal(made[1], given)
    np.testing.assert_array_equal(made[2, 8:16, 8:16], decoded[2, 8:16, 8:16])
    np.testing.assert_array_equal(made[2, :3, :3], given[:3, :3])


def test_nothing_given_changes_nothing(video):
    _, decoded = video
    np.testing.assert_array_equal(detail.finish(canvas_of.blank(3, 24, 24), decoded), decoded)


def test_the_nearer_of_two_references_counts_more(video):
    given, decoded = video
    darker = BASE - (given - BASE)
    known = [detail.Reference(0, given, BASE), detail.Reference(9, darker, BASE)]
    near, far = detail.carry(decoded[:1], known, begin=1), detail.carry(decoded[:1], known, begin=8)
    assert near[0, 0, 0, 0] > 124 and far[0, 0, 0, 0] < 116


def test_references_are_whole_frames_beside_made_ones(video):
    given, decoded = video
    canvas = canvas_of.blank(5, 24, 24)
    canvas_of.place(canvas, np.stack([given] * 3), at=0)
    canvas.known[4, :12] = True  # half of a frame
    found = detail.references(canvas, np.concatenate([decoded, decoded[:2]]))
    assert [r.frame for r in found] == [2]
