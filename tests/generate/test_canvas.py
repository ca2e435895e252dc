"""What is given of a video, as pixels and as tokens."""

import numpy as np
import pytest

from sora_jax.generate import canvas as canvas_of

CELL = (1, 8, 8)  # latent frames, rows and columns in pixels


def clip(frames: int, height: int = 16, width: int = 24) -> np.ndarray:
    """Frames that each have a grey of their own."""
    return np.broadcast_to(
        (10 * np.arange(1, frames + 1, dtype=np.uint8))[:, None, None, None],
        (frames, height, width, 3),
    )


def given_frames(known: list[int], frames: int = 9) -> list[int]:
    canvas = canvas_of.blank(frames, 16, 24)
    canvas.known[known] = True
    given = canvas_of.given_tokens(canvas, temporal=2, cell=CELL)
    assert given.shape == ((frames - 1) // 2 + 1, 2, 3)
    assert (given == given[:, :1, :1]).all()
    return np.flatnonzero(given[:, 0, 0]).tolist()


@pytest.mark.parametrize(
    ("known", "latents"),
    [
        ([0], [0]),
        ([0, 1, 2], [0, 1]),
        ([0, 1], [0]),  # half of latent frame 1 goes on from a longer part: made, not given
        ([7, 8], [4]),
        ([6, 7, 8], [4]),
        ([3], [2]),  # a keyframe is held through its latent frame
        ([0, 4, 8], [0, 2, 4]),
        ([0, 1, 2, 6], [0, 1, 3]),
        ([], []),
    ],
)
def test_which_latent_frames_are_given(known, latents):
    assert given_frames(known) == latents


def test_a_token_with_a_hole_is_not_given():
    canvas = canvas_of.of_clip(clip(3), 3, at=0)
    canvas.known[:, 3, 20] = False
    given = canvas_of.given_tokens(canvas, temporal=2, cell=CELL)
    assert (given == [[[True, True, False], [True, True, True]]]).all()


def test_pictures_are_held_to_the_nearest_in_time():
    canvas = canvas_of.of_pictures({0: clip(1)[0], 4: clip(2)[1]}, 5, size=(24, 16))
    values = canvas_of.filled(canvas)[:, 0, 0, 0]
    assert values.tolist() == [10, 10, 10, 20, 20]


def test_holes_in_space_are_painted_from_around():
    canvas = canvas_of.of_clip(clip(2), 2, at=0)
    canvas.frames[:, 4:8, 4:8] = 255
    canvas.known[:, 4:8, 4:8] = False
    filled = canvas_of.filled(canvas)
    # The painting's weights are rounded; the white of the hole is 235 and more away.
    assert np.abs(filled.astype(int) - clip(2)).max() <= 2


def test_given_pixels_come_back_and_others_are_made():
    canvas = canvas_of.of_clip(clip(4), 6, at=2)
    made = np.full((6, 16, 24, 3), 99, np.uint8)
    pasted = canvas_of.paste(canvas, made)
    assert (pasted[:2] == 99).all() and (pasted[2:] == clip(4)).all()


def test_what_lies_outside_is_left_out():
    early, late = canvas_of.of_clip(clip(4), 3, at=-2), canvas_of.of_clip(clip(4), 3, at=1)
    assert early.frames[:2, 0, 0, 0].tolist() == [30, 40] and early.known[:, 0, 0].sum() == 2
    assert late.frames[1:, 0, 0, 0].tolist() == [10, 20] and not late.known[0].any()


def test_errors_say_what_to_change():
    with pytest.raises(ValueError, match="keyframe 5 is outside the video; use 0 to 4"):
        canvas_of.of_pictures({5: clip(1)[0]}, 5, size=(24, 16))
    with pytest.raises(ValueError, match="nothing of the canvas is given"):
        canvas_of.filled(canvas_of.blank(3, 16, 24))
