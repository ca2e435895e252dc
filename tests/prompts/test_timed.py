"""Time stamps are read strictly, and every latent frame finds its prompt."""

import numpy as np
import pytest

from sora_jax.data.paperworld.captions import stamped
from sora_jax.data.paperworld.scene import sample_scene
from sora_jax.data.paperworld.settings import PaperworldSettings
from sora_jax.prompts import timed
from sora_jax.prompts.timed import Segment

TWO = "[0s-1s] a red ball rolls left [1s-2s] the red ball stays still"


def test_segments_are_read_in_their_order():
    wanted = (
        Segment(0.0, 1.0, "a red ball rolls left"),
        Segment(1.0, 2.0, "the red ball stays still"),
    )
    assert timed.parse(TWO, duration=2.0) == wanted
    for stamps in ("[0-1]{}[1-2]{}", "[ 0.0 s – 1 s ]{}[1.s-2]{}", "[0s-1s]\n{}\n[1s-2s]\n{}\n"):
        assert timed.parse(stamps.format(*(s.text for s in wanted)), duration=2.0) == wanted
    assert timed.split(timed.render(wanted)) == wanted


def test_every_sentence_is_changed():
    begin = "close view: ".__add__
    assert timed.change("a red ball", begin) == "close view: a red ball"
    begun = timed.change("[0-1] a red ball [1-2] a blue box", begin)
    assert begun == "[0s-1s] close view: a red ball [1s-2s] close view: a blue box"


@pytest.mark.parametrize(
    ("caption", "texts", "of_latents"),
    [
        ("a red ball.", ["a red ball."], [0] * 9),
        (TWO, ["a red ball rolls left", "the red ball stays still"], [0] * 4 + [1] * 5),
        ("[0-1] a [1.5-9] b", ["a", "b"], [0] * 6 + [1] * 3),
        ("[.5-1] a [1-2] b", ["a", "b"], [0] * 4 + [1] * 5),
        ("[0-1] a [1.05-1.1] b [1.1-2] c", ["a", "c"], [0] * 5 + [1] * 4),
        ("[0-1] a [3-4] b", ["a"], [0] * 9),
        ("from [0:05-0:07] on a ball", ["from [0:05-0:07] on a ball"], [0] * 9),
        ("first [0-1] a", ["first [0-1] a"], [0] * 9),
        ("[1990s film] [0s] a dog.", ["[1990s film] [0s] a dog."], [0] * 9),
    ],
)
def test_captions_that_are_found_are_read_as_far_as_they_make_sense(caption, texts, of_latents):
    found, indices = timed.latent_texts(caption, frames=17, fps=8.0, temporal=2)
    assert (found, indices.tolist()) == (texts, of_latents)


def test_a_caption_for_one_text_has_no_stamps():
    assert timed.as_one("a red ball.") == "a red ball."
    assert timed.as_one("[0-1] a red ball. [1-2] a box") == "a red ball. a box"
    for wrong in ("first [0-1] a.", "[0-1] a [0.5-2]  b.", "[0 to 1] a."):
        assert timed.as_one(wrong) == wrong  # only text


@pytest.mark.parametrize(("frames", "fps"), [(17, 8), (49, 24), (17, 12), (121, 24), (4801, 24)])
def test_stamps_that_this_program_prints_are_read(frames, fps):
    shots = PaperworldSettings(frames=frames, fps=fps, multi_shot=1.0, collisions=0, companions=0)
    scene = sample_scene(0, 0, settings=shots)
    segments = timed.parse(stamped(scene), duration=frames / fps)
    ends = np.cumsum([shot.frames for shot in scene.shots]) / fps
    assert [s.end for s in segments] == ends.tolist() and len(segments) > 1
    with pytest.raises(ValueError) as error:
        timed.parse("[0-9999] a", duration=frames / fps)
    told = str(error.value).split("lasts ")[1].split(" s;")[0]
    assert len(told) < 9
    assert timed.parse(f"[0-{told}] a", duration=frames / fps)[0].end == frames / fps


def test_what_no_stamp_covers_belongs_to_the_prompt_before():
    segments = timed.parse("[0-1] a [1.5-1.75] b", duration=2.125)
    assert segments == (Segment(0.0, 1.5, "a"), Segment(1.5, 2.125, "b"))
    assert timed.split("[0-1] a [1.5-1.75] b")[0].end == 1.0


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a red ball", "no time stamp; write [START-END]"),
        ("[0s-1s a red ball", "time stamp '[0s-1s a red ball': write [START-END]"),
        ("[0s] a red ball", "time stamp '[0s]'"),
        ("[-1-2] a", "time stamp '[-1-2]'"),
        ("[0:00-0:05] a", "time stamp '[0:00-0:05]'"),
        ("[0-1] a [1 to 2] b", "time stamp '[1 to 2]'"),
        ("[0-1 sec] a", "time stamp '[0-1 sec]'"),
        ("first [0-1] a", "'first' stands before the first time stamp"),
        ("[1-1] a", "[1s-1s] ends before it has begun"),
        ("[0-1] a [1.5-1.2] b", "[1.5s-1.2s] ends before it has begun"),
        ("[0-1] [1-2] b", "[0s-1s] has no prompt"),
        ("[0-1] a [0.5-2] b", "[0.5s-2s] begins before [0s-1s] has ended"),
        ("[1-2] b [0-1] a", "[0s-1s] begins before [1s-2s] has ended"),
        ("[0.5-2] a", "[0.5s-2s] comes first"),
        ("[0-1] a [1-3] b", "[1s-3s] ends behind the video, which lasts 2 s"),
    ],
)
def test_mistakes_are_told_in_one_line(prompt, words):
    with pytest.raises(ValueError) as error:
        timed.parse(prompt, duration=2.0)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "prompt",
    ["a red ball", "a [small] ball", "[2 cats] play", "[a-b] x", "array[0]", "[x:1]", "",
     "a [1990s film] of a dog", "[3 to 5 children] play", "a screen of [16:9]", "[80s style] x",
     "see [1, 2]", "[35mm] a cat", "a [2.39:1] shot"],
)  # fmt: skip
def test_brackets_of_other_kinds_are_no_stamps(prompt):
    assert not timed.is_timed(prompt)
    assert timed.without_stamps(prompt) == prompt


def test_what_was_meant_as_a_stamp_is_one():
    for prompt in (TWO, "[0s-1 a", "[0 to 1] a", "a [1.5s] b"):
        assert timed.is_timed(prompt)
        assert not timed.is_timed(timed.without_stamps(prompt))
    assert timed.without_stamps(TWO) == "a red ball rolls left the red ball stays still"


def test_latent_frames_take_the_prompt_of_their_middle():
    # 17 frames at 8 a second, latent frames of 4: middles at 1/16, 3/8, 7/8, 11/8 and 15/8 s.
    segments = timed.parse(TWO, duration=17 / 8)
    found = timed.latent_prompts(segments, frames=17, fps=8.0, temporal=4)
    np.testing.assert_array_equal(found, [0, 0, 0, 1, 1])
    # Of 2: middles at 1/16 and then at 1/4, 1/2, ..., 2 s; that at 1 s is the second's.
    found = timed.latent_prompts(segments, frames=17, fps=8.0, temporal=2)
    np.testing.assert_array_equal(found, [0] * 4 + [1] * 5)


def test_by_brute_force_every_latent_frame_lies_where_most_of_it_is_seen():
    rng = np.random.default_rng(0)
    for _ in range(50):
        temporal, fps = int(rng.choice([2, 4])), float(rng.choice([8, 16, 24]))
        frames = 1 + temporal * int(rng.integers(3, 12))
        cuts = np.sort(rng.uniform(0.3, 0.9, 2)) * frames / fps
        segments = [
            Segment(float(a), float(b), "x")
            for a, b in zip([0.0, *cuts], [*cuts, frames / fps], strict=True)
        ]
        try:
            found = timed.latent_prompts(segments, frames=frames, fps=fps, temporal=temporal)
        except ValueError as error:
            assert "is too short" in str(error)
            continue
        for j, index in enumerate(found):
            first, last = (0, 0) if j == 0 else (1 + (j - 1) * temporal, j * temporal)
            middle = (first + last + 1) / 2 / fps
            assert segments[index].start <= middle < segments[index].end


def test_a_segment_without_a_latent_frame_is_refused():
    segments = timed.parse("[0-1] a [1-1.1] b [1.1-2] c", duration=17 / 8)
    with pytest.raises(ValueError, match=r"\[1s-1\.1s\] is too short: a latent frame is 0\.5 s"):
        timed.latent_prompts(segments, frames=17, fps=8.0, temporal=4)


def test_a_picture_has_one_prompt():
    segments = timed.parse("[0s-0.125s] a red ball", duration=1 / 8)
    assert timed.latent_prompts(segments, frames=1, fps=8.0, temporal=4).tolist() == [0]
